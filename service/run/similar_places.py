"""Places that pixels are compared with: points of a request, or a file of points and polygons."""

from __future__ import annotations

from collections.abc import Callable

from service.errors import InvalidRequest
from service.read.vectors import Fields, points_in_degrees, read_labels
from service.run.request import SimilarRequest

MAX_PLACES = 1_000
"""Places of one request: each pixel is compared with each of them."""
MAX_BANDS = 100
"""Places of a request for `similarities`, which has a band for each."""


def read_places(
    request: SimilarRequest, most: int, before_each: Callable[[], None] = lambda: None
) -> Fields:
    """The places of a request, as points and polygons.

    Args:
        request: the request.
        most: largest number of features of a file.
        before_each: called before each of these features; an error of it ends the reading.

    Raises:
        InvalidRequest: no places or both kinds, or too many of them.
        PIMCError: the file of places cannot be read.
    """
    if (request.place_points is None) == (request.place_file is None):
        raise InvalidRequest.of(
            "points", "send either `points` or `fields`: the places to compare every pixel with"
        )
    if request.place_file is not None:
        places = read_labels(request.place_file, most, before_each)
    else:
        points = request.place_points or ()
        given = [point.feature.get("id") for point in points]
        places = points_in_degrees(
            [(point.lon, point.lat) for point in points],
            [n if one is None else one for n, one in enumerate(given, start=1)],
        )
    limit = MAX_BANDS if "similarities" in (request.outputs or ()) else MAX_PLACES
    if len(places) > limit:
        raise InvalidRequest.of(
            "points" if request.place_file is None else "fields",
            f"the request has {len(places)} places, and at most {limit} are compared"
            + (
                f" with a band for each: send outputs=similarity, which takes {MAX_PLACES}"
                if limit == MAX_BANDS
                else ": send fewer places"
            ),
        )
    return places

"""Content negotiation by `Accept` (RFC 9110)."""

from __future__ import annotations

import pytest

from service.api.negotiation import negotiate
from service.errors import NotAcceptable

COG = "image/tiff; application=geotiff; profile=cloud-optimized"
ZIP = "application/zip"
JSON = "application/json"
OFFERS = (COG, ZIP, JSON)


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("", COG),
        ("*/*", COG),
        ("image/tiff", COG),
        ("image/*", COG),
        ("image/tiff; application=geotiff", COG),
        ('image/tiff; application="geotiff"; profile=cloud-optimized', COG),
        ("IMAGE/TIFF; Application=GeoTIFF", COG),
        ("application/zip", ZIP),
        ("application/*", ZIP),
        ("application/json", JSON),
        ("application/json, */*;q=0.1", JSON),
        ("application/json;q=0.5, application/zip;q=0.8", ZIP),
        ("text/html, application/xhtml+xml, */*;q=0.8", COG),
        # The closest range counts, not the most generous one.
        ("image/tiff;q=0, */*", ZIP),
        ("*/*, image/*;q=0, application/zip;q=0.2", JSON),
        ("application/json;q=0.2, application/*;q=0.9", ZIP),
        # Values that make no sense are ignored.
        ("nonsense, application/json", JSON),
        ("application/zip;q=x, application/json;q=0.1", JSON),
    ],
)
def test_the_type_with_the_highest_quality_is_chosen(accept: str, chosen: str) -> None:
    assert negotiate(accept, OFFERS) == chosen


@pytest.mark.parametrize(
    "accept",
    ["text/html", "image/png", "image/tiff; profile=other", "*/*;q=0", "application/json;q=0"],
)
def test_no_acceptable_type_is_an_error_with_both_sides(accept: str) -> None:
    with pytest.raises(NotAcceptable) as caught:
        negotiate(accept, OFFERS)
    assert accept in caught.value.detail
    assert ZIP in caught.value.detail


def test_a_single_type_is_returned_whatever_accept_says() -> None:
    assert negotiate("image/tiff", (JSON,)) == JSON


GEOJSON, CSV = "application/geo+json", "text/csv"


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("application/json", GEOJSON),
        ("application/json, text/html", GEOJSON),
        ("application/json, text/csv;q=0.1", CSV),
    ],
)
def test_a_type_with_the_syntax_of_json_is_returned_to_a_client_of_json(
    accept: str, chosen: str
) -> None:
    assert negotiate(accept, (CSV, GEOJSON)) == chosen


@pytest.mark.parametrize(
    "accept", ["application/json;q=0", "application/json, application/geo+json;q=0", "text/json"]
)
def test_a_client_that_does_not_accept_json_does_not_get_it(accept: str) -> None:
    with pytest.raises(NotAcceptable):
        negotiate(accept, (CSV, GEOJSON))


def test_a_summary_is_preferred_to_geojson_if_both_are_available() -> None:
    assert negotiate("application/json", (GEOJSON, CSV, JSON)) == JSON

"""Requests by STAC: a form and its items as a request on files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from anyio import to_thread

from service.api.admission import Place
from service.api.dependencies import AppState
from service.api.schemas import Operation, RasterForm, StacSearch
from service.read.geotiff import SourceFile
from service.read.placement import Bounds
from service.read.stac import Search
from service.read.stac_files import around, fetch_stac
from service.read.vectors import read_fields
from service.run.measured import BANDS, FURTHER_BANDS
from service.run.plan import bands_of
from service.run.request import MeasureRequest, RasterRequest


async def stac_request(
    task: Operation,
    stac: StacSearch | Mapping[str, Any] | str,
    fields: RasterForm,
    polygons: SourceFile | None,
    app: AppState,
    folder: Path,
    place: Place,
) -> RasterRequest:
    """The request on the files of STAC items, of which only the needed part is fetched.

    Args:
        task: the requested task.
        stac: an ItemCollection or Item, the URL of one, or a search.
        fields: the other parameters.
        polygons: the file of `fields`; None if it was not sent.
        app: application state.
        folder: of the request.
        place: of the request; the fetched bytes count as received.

    Raises:
        PIMCError: the items or their files cannot be fetched, or do not fit the model.
    """
    request = fields.request(task, (), polygons)
    measured = isinstance(request, MeasureRequest)
    bands = BANDS if measured else await to_thread.run_sync(bands_of, request, app.engine)
    optional = FURTHER_BANDS if measured else ()
    stack = request.stack
    if stack.bbox is None and stack.area is None:
        extent = await to_thread.run_sync(_extent, stac, request, app.settings.max_fields)
        stack = replace(stack, bbox=extent)
    asked = (
        Search(**{name: getattr(stac, name) for name in type(stac).model_fields})
        if isinstance(stac, StacSearch)
        else stac
    )
    fetched = await fetch_stac(
        asked, folder, app.settings, bands=bands, optional=optional, stack=stack
    )
    for file in fetched.files:
        if file.path.is_relative_to(folder):
            place.received(file.path.stat().st_size)
    return replace(request, files=fetched.files, stack=fetched.stack, items=fetched.items)


def _extent(
    stac: StacSearch | Mapping[str, Any] | str, request: RasterRequest, max_fields: int
) -> Bounds | None:
    """The part of the items that is read; None reads them whole."""
    found = None
    if request.points:
        lons, lats = [p.lon for p in request.points], [p.lat for p in request.points]
        found = (min(lons), min(lats), max(lons), max(lats))
    elif request.fields is not None:
        found = read_fields(request.fields, max_fields).extent
    if found is not None:
        return around(found)
    return stac.extent if isinstance(stac, StacSearch) else None

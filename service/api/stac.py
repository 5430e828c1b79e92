"""STAC requests: parameters and STAC items, converted to a request on fetched files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from anyio import to_thread

from service.api.admission import Admitted
from service.api.dependencies import AppState
from service.api.schemas.forms import RasterForm
from service.api.schemas.parameter_types import Operation
from service.api.schemas.request_bodies import StacSearch
from service.read.geotiff import SourceFile
from service.read.layouts import StackOptions
from service.read.placement import Bounds
from service.read.stac import Search
from service.read.stac_files import StacFiles, around, fetch_stac
from service.read.stack import LAND_BANDS
from service.read.vectors import read_fields, read_labels
from service.run.measured import BANDS, FURTHER_BANDS
from service.run.plan import bands_of
from service.run.request import MeasureRequest, RasterRequest

NEEDED_BANDS = ("B04", "B08")
"""Bands that items must have for own classes; other bands of the land are read if present."""


async def stac_request(
    task: Operation,
    stac: StacSearch | Mapping[str, Any] | str,
    parameters: RasterForm,
    polygons: SourceFile | None,
    app: AppState,
    folder: Path,
    admitted: Admitted,
    owner: str,
    *,
    on_demand: bool = False,
) -> RasterRequest:
    """The request on the files of STAC items, of which only the needed parts are fetched.

    Args:
        task: the requested task.
        stac: an ItemCollection or Item, the URL of one, or a search.
        parameters: the other parameters.
        polygons: the file of `fields`; None if it was not sent.
        app: application state.
        folder: folder of the request.
        admitted: the admitted request; fetched bytes count as bytes of its body.
        owner: the caller, whose own models the request may name.
        on_demand: whether blocks are fetched when they are read; those of a request of places are
            in any case.

    Raises:
        PIMCError: the items or their files cannot be fetched, or do not fit the model.
    """
    request = await to_thread.run_sync(parameters.request, task, (), polygons)
    measured = isinstance(request, MeasureRequest)
    bands = BANDS if measured else await to_thread.run_sync(bands_of, request, app.engine, owner)
    optional = FURTHER_BANDS if measured else ()
    stack = request.stack
    if stack.bbox is None and stack.area is None:
        extent = await to_thread.run_sync(_extent, stac, request, app.settings.max_fields)
        stack = replace(stack, bbox=extent)
    fetched = await _fetched(
        stac,
        stack,
        app,
        folder,
        admitted,
        bands=bands,
        optional=optional,
        on_demand=on_demand or request.of_places,
    )
    return replace(request, files=fetched.files, stack=fetched.stack, items=fetched.items)


async def stac_head(
    stac: StacSearch | Mapping[str, Any] | str,
    stack: StackOptions,
    labels: SourceFile,
    app: AppState,
    folder: Path,
    admitted: Admitted,
) -> StacFiles:
    """The files of STAC items around labels, in every band that shows the land.

    Args:
        stac: an ItemCollection or Item, the URL of one, or a search.
        stack: the other parameters.
        labels: points or polygons.
        app: application state.
        folder: folder of the request.
        admitted: the admitted request; fetched bytes count as bytes of its body.

    Raises:
        PIMCError: the items, their files or the labels cannot be read.
    """
    if stack.bbox is None and stack.area is None:
        found = await to_thread.run_sync(read_labels, labels, app.settings.max_fields)
        extent = found.extent
        stack = replace(stack, bbox=None if extent is None else around(extent))
    further = tuple(band for band in LAND_BANDS if band not in NEEDED_BANDS)
    return await _fetched(
        stac,
        stack,
        app,
        folder,
        admitted,
        bands=NEEDED_BANDS,
        optional=further,
        on_demand=True,
    )


async def _fetched(
    stac: StacSearch | Mapping[str, Any] | str,
    stack: StackOptions,
    app: AppState,
    folder: Path,
    admitted: Admitted,
    *,
    bands: Sequence[str],
    optional: Sequence[str],
    on_demand: bool,
) -> StacFiles:
    search = (
        Search(**{name: getattr(stac, name) for name in type(stac).model_fields})
        if isinstance(stac, StacSearch)
        else stac
    )
    fetched = await fetch_stac(
        search,
        folder,
        app.settings,
        bands=bands,
        optional=optional,
        stack=stack,
        on_demand=on_demand,
        remotes=app.remotes,
    )
    for file in fetched.files:
        if file.path.is_relative_to(folder):
            admitted.received(file.path.stat().st_size)
    return fetched


def _extent(
    stac: StacSearch | Mapping[str, Any] | str, request: RasterRequest, max_fields: int
) -> Bounds | None:
    """The part of the items to read, in degrees; None reads them whole."""
    found = None
    if request.points:
        lons, lats = [p.lon for p in request.points], [p.lat for p in request.points]
        found = (min(lons), min(lats), max(lons), max(lats))
    elif request.fields is not None:
        found = read_fields(request.fields, max_fields).extent
    if found is not None:
        return around(found)
    return stac.extent if isinstance(stac, StacSearch) else None

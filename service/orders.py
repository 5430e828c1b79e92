"""What to run, as a frozen value that knows no HTTP, and how to run it.

    form ─▶ RasterOrder ─┐
                         ├─ carry_out ─▶ Reply: files or a document, who answered, how fast
    JSON ─▶ SeriesOrder ─┘

A job will hold the same order and make the same call; only who waits for the reply differs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from models.card import Modality, Task
from service.engine import Engine, LoadedModel
from service.errors import InvalidRequest, RasterTooLarge
from service.executors import Executor, Timing
from service.geotiff import SourceFile
from service.pipeline import run_points, run_raster
from service.runs import RasterRun, plan_raster
from service.schemas import EmbedFields, PointCollection, RasterFields, SeriesRequest
from service.series import SeriesInput, run_series
from service.stack import Stack, StackOptions, StackWarning, check_radiometry, open_stack


@dataclass(frozen=True, kw_only=True)
class RasterOrder:
    """A task to do on a stack of GeoTIFFs."""

    task: Task
    files: tuple[SourceFile, ...]
    fields: RasterFields


@dataclass(frozen=True, kw_only=True)
class SeriesOrder:
    """A task to do on pixels that come as series."""

    task: Task
    request: SeriesRequest


Order = RasterOrder | SeriesOrder


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How large a run may be."""

    raster_bytes: int
    """Decoded bytes of a stack."""
    pixels: int | None
    """Pixels of a raster answered whole; None where nobody waits for the answer."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came of an order."""

    task: Task
    model: str
    """As `name@version`."""
    provider: str
    """The execution provider that computed."""
    document: Mapping[str, Any]
    """The answer as JSON, `warnings` included: a summary, GeoJSON, or a result a series."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Finished COGs by output name; empty where a document is the whole answer."""
    pixels: int
    """Pixels, patches, points or series answered."""
    timing: Timing
    warnings: tuple[StackWarning, ...]


def carry_out(
    order: Order,
    engine: Engine,
    bounds: Bounds,
    folder: Path,
    *,
    rasters: bool,
    executor: Executor,
    cancelled: threading.Event,
) -> Reply:
    """Run an order to its end, in the caller's thread.

    Args:
        order: what to run.
        engine: the models.
        bounds: how large it may be.
        folder: where files of the answer go.
        rasters: whether files are wanted; the document is made in any case.
        executor: where windows run.
        cancelled: set to stop the run soon.

    Raises:
        PIMCError: whatever of the order cannot be served.
        Cancelled: `cancelled` was set.
    """
    if isinstance(order, SeriesOrder):
        return _series(order, engine)
    begun = time.perf_counter()
    run = plan(order, engine, bounds, rasters=rasters)
    looked = Timing(read=time.perf_counter() - begun)
    if order.fields.points is not None:
        reply = _points(order.task, run, order.fields.points)
    else:
        reply = _raster(order.task, run, folder, executor, cancelled)
    return replace(reply, timing=looked + reply.timing)


def plan(order: RasterOrder, engine: Engine, bounds: Bounds, *, rasters: bool) -> RasterRun:
    """Understand the files, and see that they, the model and the fields go together.

    Raises:
        PIMCError: they do not; no more than a sample of the pixels has been read.
    """
    fields = order.fields
    model = engine.find(fields.model, order.task, _modality(fields))
    _check_fields(model, fields)
    options = StackOptions(
        layout=fields.layout,
        dates=fields.dates,
        bands=fields.bands,
        scale=fields.scale,
        offset=fields.offset,
        mask=fields.mask,
    )
    stack = open_stack(
        order.files,
        options,
        bands=model.card.bands,
        dated=model.card.modality == "pixel",
        max_bytes=bounds.raster_bytes,
    )
    if fields.points is None:
        _check_size(stack, bounds)
    run = plan_raster(model, stack, rasters=rasters, **_options(fields))
    odd = check_radiometry(stack, run.used)
    return replace(run, stack=replace(stack, warnings=_once((*stack.warnings, *odd))))


def _modality(fields: RasterFields) -> Modality | None:
    """What an embedding is made of; a model that is named says so itself."""
    if not isinstance(fields, EmbedFields):
        return None
    return fields.modality or (None if fields.model else "pixel")


def _options(fields: RasterFields) -> dict[str, Any]:
    """The fields that only some tasks have, as `plan_raster` takes them."""
    names = ("start", "outputs", "horizon", "stride")
    given = {name: getattr(fields, name, None) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def _check_fields(model: LoadedModel, fields: RasterFields) -> None:
    """Refuse what the model would have to pass over in silence."""
    card = model.card
    if card.window is None and getattr(fields, "start", None) is not None:
        raise InvalidRequest.of("start", f"'{card.id}' takes imagery and has no time window")
    if card.modality == "pixel" and getattr(fields, "stride", None) is not None:
        raise InvalidRequest.of("stride", f"'{card.id}' answers for every pixel, not for patches")


def _check_size(stack: Stack, bounds: Bounds) -> None:
    pixels = stack.grid.width * stack.grid.height
    if bounds.pixels is not None and pixels > bounds.pixels:
        # Once there are jobs, this is where a run goes on as one instead.
        raise RasterTooLarge(
            f"the raster has {stack.grid.width} x {stack.grid.height} = {pixels} pixels, and "
            f"{bounds.pixels} are answered while the caller waits (PIMC_SYNC_MAX_PIXELS)"
        )


def _raster(
    task: Task, run: RasterRun, folder: Path, executor: Executor, cancelled: threading.Event
) -> Reply:
    outcome = run_raster(run, folder, executor=executor, cancelled=cancelled)
    return Reply(
        task=task,
        model=run.model.card.id,
        provider=run.model.provider,
        document=outcome.summary,
        files=outcome.files,
        pixels=run.stack.grid.width * run.stack.grid.height,
        timing=outcome.timing,
        warnings=_once(outcome.warnings),
    )


def _points(task: Task, run: RasterRun, points: PointCollection) -> Reply:
    outcome = run_points(run, points.lonlat)
    warnings = _once(outcome.warnings)
    features = [
        {**point.model_dump(exclude_none=True), "properties": {**(point.properties or {}), **found}}
        for point, found in zip(points.features, outcome.results, strict=True)
    ]
    return Reply(
        task=task,
        model=run.model.card.id,
        provider=run.model.provider,
        document={
            "type": "FeatureCollection",
            "features": features,
            "model": run.model.card.id,
            "provider": run.model.provider,
            "warnings": _listed(warnings),
        },
        pixels=len(features),
        timing=outcome.timing,
        warnings=warnings,
    )


def _series(order: SeriesOrder, engine: Engine) -> Reply:
    request = order.request
    model = engine.find(request.model, order.task, "pixel")
    outcome = run_series(
        model,
        [SeriesInput(id=s.id, dates=s.dates, bands=s.bands) for s in request.series],
        start=request.start,
        horizon=getattr(request, "horizon", None),
    )
    warnings = _once(outcome.warnings)
    return Reply(
        task=order.task,
        model=model.card.id,
        provider=model.provider,
        document={
            "model": model.card.id,
            "provider": model.provider,
            "results": list(outcome.results),
            "warnings": _listed(warnings),
        },
        pixels=len(outcome.results),
        timing=outcome.timing,
        warnings=warnings,
    )


def _once(warnings: Iterable[StackWarning]) -> tuple[StackWarning, ...]:
    return tuple(dict.fromkeys(warnings))


def _listed(warnings: Iterable[StackWarning]) -> list[dict[str, str]]:
    return [{"code": warning.code, "detail": warning.detail} for warning in warnings]

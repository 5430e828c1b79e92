"""What to run, as a frozen value that knows no HTTP, and how to run it.

    form ─▶ RasterOrder ─┐
                         ├─ prepare ─▶ Ready ─ carry_out ─▶ Reply: files or a document
    JSON ─▶ SeriesOrder ─┘

Whoever waits for the reply and a job make the same two calls. A job keeps its order as a document
(`document_of`, `order_of`), and prepares it anew when its turn comes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from models.card import Modality, Task
from service.engine import Engine, LoadedModel
from service.errors import InvalidRequest
from service.executors import Executor, Timing
from service.geotiff import SourceFile
from service.pipeline import Journal, Outcome, run_points, run_raster
from service.runs import RasterRun, plan_raster
from service.schemas import (
    FIELDS,
    SERIES,
    EmbedFields,
    PointCollection,
    RasterFields,
    SeriesRequest,
)
from service.series import SeriesInput, SeriesRun, plan_series, run_series
from service.stack import StackOptions, StackWarning, check_radiometry, open_stack


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
class Ready:
    """An order that is known to fit its files and its model."""

    order: Order
    model: LoadedModel
    run: RasterRun | SeriesRun
    pixels: int
    """Of a raster answered whole; 0 for points and series, which are few."""
    looked: Timing
    """Spent on understanding the files."""


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


def prepare(order: Order, engine: Engine, *, max_raster_bytes: int, rasters: bool) -> Ready:
    """See that an order can be carried out, before a window is read.

    Args:
        order: what to run.
        engine: the models.
        max_raster_bytes: decoded bytes that a stack may have.
        rasters: whether files are wanted; the document is made in any case.

    Raises:
        PIMCError: whatever of the order cannot be served.
    """
    begun = time.perf_counter()
    run: RasterRun | SeriesRun
    if isinstance(order, SeriesOrder):
        run = _plan_series(order, engine)
        return Ready(order=order, model=run.model, run=run, pixels=0, looked=Timing())
    run = plan(order, engine, max_raster_bytes=max_raster_bytes, rasters=rasters)
    whole = order.fields.points is None
    return Ready(
        order=order,
        model=run.model,
        run=run,
        pixels=run.stack.grid.width * run.stack.grid.height if whole else 0,
        looked=Timing(read=time.perf_counter() - begun),
    )


def carry_out(
    ready: Ready,
    folder: Path,
    *,
    executor: Executor,
    cancelled: threading.Event,
    progress: Callable[[float], None] = lambda _: None,
    journal: Journal | None = None,
) -> Reply:
    """Run an order to its end, in the caller's thread.

    Args:
        ready: what to run.
        folder: where files of the answer go.
        executor: where windows run.
        cancelled: set to stop the run soon.
        progress: told the share of a raster done, 0 to 1, in the calling thread.
        journal: keeps a raster's finished windows; None keeps none.

    Raises:
        PIMCError: what only the pixels show, or the disk.
        Cancelled: `cancelled` was set.
    """
    order, run = ready.order, ready.run
    if isinstance(run, SeriesRun):
        return _series(order.task, run)
    points = order.fields.points if isinstance(order, RasterOrder) else None
    if points is not None:
        reply = _points(order.task, run, points)
    else:
        outcome = run_raster(
            run,
            folder,
            progress=progress,
            cancelled=cancelled,
            executor=executor,
            journal=journal,
        )
        reply = _raster(order.task, run, outcome)
    return replace(reply, timing=ready.looked + reply.timing)


def plan(order: RasterOrder, engine: Engine, *, max_raster_bytes: int, rasters: bool) -> RasterRun:
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
        max_bytes=max_raster_bytes,
    )
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


def _raster(task: Task, run: RasterRun, outcome: Outcome) -> Reply:
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


def _plan_series(order: SeriesOrder, engine: Engine) -> SeriesRun:
    request = order.request
    return plan_series(
        engine.find(request.model, order.task, "pixel"),
        [SeriesInput(id=s.id, dates=s.dates, bands=s.bands) for s in request.series],
        start=request.start,
        horizon=getattr(request, "horizon", None),
    )


def _series(task: Task, run: SeriesRun) -> Reply:
    model, outcome = run.model, run_series(run)
    warnings = _once(outcome.warnings)
    return Reply(
        task=task,
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


# As documents ---------------------------------------------------------------------------------


def document_of(order: Order, folder: Path, *, model: str | None = None) -> dict[str, Any]:
    """An order as JSON holds it.

    Args:
        order: what to keep.
        folder: files in it are named from here; others by where they lie.
        model: named in place of what the order says, which may be nothing.
    """
    named = {} if model is None else {"model": model}
    if isinstance(order, SeriesOrder):
        return {"task": order.task, "series": order.request.model_dump(mode="json") | named}
    files = [
        [f.name, str(f.path.relative_to(folder) if f.path.is_relative_to(folder) else f.path)]
        for f in order.files
    ]
    # `round_trip`: points are read from text, so they are written as text.
    fields = order.fields.model_dump(mode="json", round_trip=True)
    return {"task": order.task, "files": files, "fields": fields | named}


def order_of(document: Mapping[str, Any], folder: Path) -> Order:
    """The order that a document holds.

    Args:
        document: as `document_of` made it.
        folder: where the files lie that it names from there.

    Raises:
        ValidationError: another version of the service wrote it.
    """
    task: Task = document["task"]
    if "series" in document:
        request = SERIES[task].model_validate(document["series"])
        return SeriesOrder(task=task, request=request)
    return RasterOrder(
        task=task,
        files=tuple(SourceFile(name=name, path=folder / path) for name, path in document["files"]),
        fields=FIELDS[task].model_validate(document["fields"]),
    )


def reply_document(reply: Reply) -> dict[str, Any]:
    """A reply as JSON holds it; its files by name, all in one folder."""
    return {
        "task": reply.task,
        "model": reply.model,
        "provider": reply.provider,
        "document": reply.document,
        "files": {name: path.name for name, path in reply.files.items()},
        "pixels": reply.pixels,
        "timing": asdict(reply.timing),
        "warnings": _listed(reply.warnings),
    }


def reply_of(document: Mapping[str, Any], folder: Path) -> Reply:
    """The reply that a document holds, its files in a folder."""
    return Reply(
        task=document["task"],
        model=document["model"],
        provider=document["provider"],
        document=document["document"],
        files={name: folder / path for name, path in document["files"].items()},
        pixels=document["pixels"],
        timing=Timing(**document["timing"]),
        warnings=tuple(StackWarning(**warning) for warning in document["warnings"]),
    )

"""Execution: a plan run to its result.

    RasterRequest | SeriesRequest → plan → execute → Result: files or a document

A synchronous request and a job make the same two calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from models.card import Task
from service.errors import StackWarning, warning_list
from service.infer.model import LoadedModel
from service.read.geotiff import BlockCache
from service.read.vectors import Fields
from service.run.backtest import Backtested, no_backtest
from service.run.collect import Outcome
from service.run.executors import Executor, Timing
from service.run.fields import FieldOutcome, run_fields
from service.run.memory import MemoryBudget
from service.run.plan import Plan, RasterRun, dates_summary, unique
from service.run.points import run_points
from service.run.raster import backtest_sample, make_work, run_raster
from service.run.request import PointQuery, RasterRequest, Runnable, SimilarRequest
from service.run.series import SeriesRun, run_series
from service.run.similar import run_similar
from service.run.windows import Journal
from service.tracing import annotate, span
from service.write.fields import field_features, replaced_properties


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a run."""

    task: Runnable
    model: str
    """The model, as `name@version`."""
    provider: str
    """The execution provider of the model."""
    document: Mapping[str, Any]
    """JSON with `warnings`: a summary, GeoJSON, or one result per series."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Finished COGs by output name; empty if the result has no rasters."""
    pixels: int
    """Pixels, patches, points or series predicted."""
    timing: Timing
    warnings: tuple[StackWarning, ...]


@span("run")
def execute(
    plan: Plan,
    folder: Path,
    *,
    executor: Executor,
    cache: BlockCache | None = None,
    cancelled: threading.Event,
    progress: Callable[[float], None] = lambda _: None,
    journal: Journal | None = None,
    budget: MemoryBudget | None = None,
    patience: float | None = None,
) -> Result:
    """Run a plan to its result, in the calling thread.

    Args:
        plan: the plan to run.
        folder: folder for the result's files.
        executor: processes the windows.
        cache: GDAL's block cache; None creates one for a raster.
        cancelled: an event that cancels the run when it is set.
        progress: called with the finished share of a raster, 0 to 1, from one thread at a time.
        journal: stores a raster's finished windows; None stores none.
        budget: memory budget of all runs; None creates one for this run.
        patience: seconds to wait for memory; None waits without a limit.

    Raises:
        PIMCError: an error of the pixels or of the disk.
        Overloaded: other runs held the memory until `patience` had passed.
        Cancelled: `cancelled` was set.
    """
    request, run = plan.request, plan.run
    annotate(task=request.operation, model=plan.model.card.id, pixels=plan.pixels)
    budget = budget or MemoryBudget()
    if isinstance(run, SeriesRun):
        with budget.take(plan.need, cancelled=cancelled, patience=patience):
            return _as_requested(plan, _series(request.task, run, cancelled))
    with budget.take(plan.need, cancelled=cancelled, patience=patience):
        points = request.points if isinstance(request, RasterRequest) else None
        if points is not None:
            result = _points(request.task, run, points, cancelled=cancelled, cache=cache)
        else:
            run = backtest_sample(run, cancelled=cancelled, cache=cache)
            work = make_work(
                run,
                folder,
                progress=progress,
                cancelled=cancelled,
                executor=executor,
                cache=cache,
                journal=journal,
                window_bytes=budget.window_bytes,
            )
            if isinstance(request, SimilarRequest) and plan.fields is not None:
                result = _raster(request.operation, run, run_similar(work, plan.fields))
            elif plan.fields is not None:
                result = _fields(request.task, run, plan.fields, run_fields(work, plan.fields))
            else:
                result = _raster(request.task, run, run_raster(work))
    result = _as_requested(plan, result)
    document = result.document
    if isinstance(request, RasterRequest) and request.items:
        document = {**document, "sources": [dict(item) for item in _used(request.items, run)]}
    return replace(result, document=document, timing=plan.planning + result.timing)


def _used(items: Iterable[Mapping[str, Any]], run: RasterRun) -> list[Mapping[str, Any]]:
    """The STAC items whose date the run uses; all items if the stack has no dates."""
    days = {run.stack.dates[t].isoformat() for t in run.used} if run.stack.dates else None
    return [i for i in items if days is None or str(i.get("datetime", ""))[:10] in days]


def _raster(task: Runnable, run: RasterRun, outcome: Outcome) -> Result:
    return Result(
        task=task,
        model=run.model.card.id,
        provider=run.model.provider,
        document=outcome.summary,
        files=outcome.files,
        pixels=run.stack.grid.width * run.stack.grid.height,
        timing=outcome.timing,
        warnings=unique(outcome.warnings),
    )


def _points(
    task: Task,
    run: RasterRun,
    points: Sequence[PointQuery],
    *,
    cancelled: threading.Event,
    cache: BlockCache | None,
) -> Result:
    lonlat = [(point.lon, point.lat) for point in points]
    outcome = run_points(run, lonlat, cancelled=cancelled, cache=cache)
    own = [point.feature.get("properties") or {} for point in points]
    warnings = unique((*outcome.warnings, *replaced_properties(own, outcome.results)))
    features = [
        {
            **point.feature,
            "properties": {**properties, **found},
        }
        for point, properties, found in zip(points, own, outcome.results, strict=True)
    ]
    return Result(
        task=task,
        model=run.model.card.id,
        provider=run.model.provider,
        document={
            "type": "FeatureCollection",
            "features": features,
            **_of_model(run.model),
            **_backtest(outcome.backtested),
            "warnings": warning_list(warnings),
        },
        pixels=len(features),
        timing=outcome.timing,
        warnings=warnings,
    )


def _fields(task: Task, run: RasterRun, fields: Fields, outcome: FieldOutcome) -> Result:
    warnings = unique((*outcome.warnings, *replaced_properties(fields.properties, outcome.results)))
    return Result(
        task=task,
        model=run.model.card.id,
        provider=run.model.provider,
        document={
            "type": "FeatureCollection",
            "features": field_features(
                fields.ids, fields.properties, fields.geojson, outcome.results
            ),
            **_of_model(run.model),
            **dates_summary(run),
            **_backtest(outcome.backtested),
            "warnings": warning_list(warnings),
        },
        pixels=outcome.pixels,
        timing=outcome.timing,
        warnings=warnings,
    )


def _series(task: Task, run: SeriesRun, cancelled: threading.Event) -> Result:
    model, outcome = run.model, run_series(run, cancelled=cancelled)
    warnings = unique(outcome.warnings)
    return Result(
        task=task,
        model=model.card.id,
        provider=model.provider,
        document={
            **_of_model(model),
            "results": list(outcome.results),
            **_backtest(outcome.backtested),
            "warnings": warning_list(warnings),
        },
        pixels=len(outcome.results),
        timing=outcome.timing,
        warnings=warnings,
    )


def _as_requested(plan: Plan, result: Result) -> Result:
    """The result, with a warning if it was to be backtested and no earlier target was clear."""
    codes = {warning.code for warning in result.warnings}
    if not plan.request.backtest or "backtest" in result.document or "no_backtest" in codes:
        return result
    warnings = (*result.warnings, no_backtest(plan.model.card))
    document = {**result.document, "warnings": warning_list(warnings)}
    return replace(result, document=document, warnings=warnings)


def _of_model(model: LoadedModel) -> dict[str, Any]:
    return {"model": model.card.id, **model.card.use_in_answers(), "provider": model.provider}


def _backtest(found: Backtested | None) -> dict[str, Any]:
    return {} if found is None else {"backtest": found.record}

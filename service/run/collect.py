"""Collecting windows: rasters, sums and the summary of a run."""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from service.errors import StackWarning, warning_list
from service.grid import Grid, Window
from service.read.geotiff import BlockCache
from service.read.radiometry import why_missing
from service.run.executors import Executor, Timing, check
from service.run.extent import raster_outside_training
from service.run.passes import Pass, Stages
from service.run.plan import RasterRun, dates_summary
from service.run.time_window import outside_time_window, partial_season
from service.run.windows import Arrays, Journal, Step
from service.tracing import span
from service.write.cog import USE_TAG, OpenScratch, RasterWriter, stored
from service.write.polygons import write_polygons
from service.write.predictions import ATTRIBUTION, JSON, POLYGONS, ForecastPredictions, Layer
from service.write.stac_item import Provenance, result_item, write_item

Floats = NDArray[np.float32]
_OTHER_RESOLUTION = 2.05
"""Factor by which pixels may be larger or smaller than those of the training data without a
warning: pixels of up to 20 m for a model trained on 10 m."""
_COVERED = 0.95
"""Share of a raster that a patch run must cover; a smaller share is warned of."""
_COUNTS = "tally."
"""Prefix that distinguishes a tally's counts from layers in one mapping."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Files and summary of a raster run."""

    files: Mapping[str, Path]
    """Finished COGs by output name; a class map also has a side file in the same folder."""
    summary: dict[str, JSON]
    """The summary, as returned for `application/json`."""
    timing: Timing
    warnings: tuple[StackWarning, ...]


class Progress:
    """Progress of a run of several passes; not thread-safe.

    Args:
        report: called with the finished share of the run, 0 to 1.
    """

    def __init__(self, report: Callable[[float], None]) -> None:
        self._report = report
        self._done = 0.0

    def add(self, share: float) -> None:
        """Add a share of the run that has just been finished, 0 to 1, and report the sum."""
        self._done += share
        # The last percent is for finishing the files.
        self._report(min(self._done, 0.99))

    def finish(self) -> None:
        """Report that the run is complete."""
        self._report(1.0)


@dataclass(frozen=True, kw_only=True)
class Work:
    """A run with its executor, journal, progress and cancellation."""

    run: RasterRun
    folder: Path
    """Folder for the finished files."""
    progress: Progress
    cancelled: threading.Event | None
    """An event that cancels the run when it is set."""
    executor: Executor
    cache: BlockCache
    """GDAL's block cache."""
    journal: Journal | None
    """Stores finished windows; None stores none."""
    window_bytes: int
    """Memory of one window, bytes."""

    def run_pass(
        self,
        stage: str,
        parts: Sequence[Window],
        work: Pass | Stages,
        *,
        collect: Callable[[Window, Arrays], None],
        share: float,
    ) -> Timing:
        """Run one pass: read every window, infer, and store the result.

        Args:
            stage: name of the pass.
            parts: windows of the pass.
            work: the pass, whose windows the executor may compute elsewhere, or its stages, which
                run in this process.
            collect: takes the arrays of each window, in order: first those from the journal, then
                those that this pass computes.
            share: share of the whole run's progress that the pass counts, 0 to 1.

        Returns:
            The seconds of each stage.

        Raises:
            Cancelled: the run was cancelled.
        """
        steps = [Step(stage=stage, number=n, window=part) for n, part in enumerate(parts)]
        pixels = sum(part.width * part.height for part in parts)

        def finish(step: Step, arrays: Arrays) -> None:
            collect(step.window, arrays)
            self.progress.add(share * (step.window.width * step.window.height) / pixels)

        def write(step: Step, arrays: Arrays) -> None:
            if self.journal is not None:
                self.journal.save(step, arrays)
            finish(step, arrays)

        recalled = self._recall(steps, finish)
        return self.executor.run_pass(
            steps[recalled:],
            work,
            folder=self.folder,
            write=write,
            cache=self.cache,
            cancelled=self.cancelled,
        )

    def _recall(self, steps: Sequence[Step], finish: Callable[[Step, Arrays], None]) -> int:
        """Keep the windows from the journal up to the first missing one, and return their number.

        Windows after a missing one are computed again, because sums of floats depend on the order
        in which they are added.
        """
        if self.journal is None:
            return 0
        for step in steps:
            check(self.cancelled)
            arrays = self.journal.load(step)
            if arrays is None:
                return step.number
            finish(step, arrays)
        return len(steps)


@dataclass(frozen=True, kw_only=True)
class WindowPredictions:
    """The predictions of one window."""

    positions: NDArray[np.intp]
    """Positions (n) in the flattened window that have a prediction."""
    predictions: Floats
    """Predictions of these positions (n, …)."""
    classes: NDArray[np.uint8] | None = None
    """Classes of these positions (n) in a map that was cleaned; None takes the most probable."""
    attribution: Floats | None = None
    """Attribution of each date to their class (n, T); None if it was not requested."""


def spread(window: Window, found: WindowPredictions) -> Arrays:
    """Predictions (n, K) as an array `values` (K, h, w) of the window, NaN without a prediction."""
    values = np.full((found.predictions.shape[1], window.height * window.width), np.nan, np.float32)
    values[:, found.positions] = found.predictions.T
    return {"values": values.reshape(-1, window.height, window.width)}


def write_to(raster: OpenScratch) -> Callable[[Window, Arrays], None]:
    """A function that writes `values` (K, h, w) of each window to a scratch raster."""
    return lambda window, arrays: raster.write(window, arrays["values"])


class ToArrays(Protocol):
    """Turns the predictions of a window into the arrays that are stored. `pickle` copies it."""

    def __call__(self, window: Window, found: WindowPredictions) -> Arrays:
        """The arrays of a window."""
        ...


@dataclass(frozen=True, kw_only=True)
class LayerArrays:
    """The bands of a window by layer, its number of `valid` predictions, and its counts."""

    run: RasterRun
    grid: Grid
    """Grid of the predictions."""

    def __call__(self, window: Window, found: WindowPredictions) -> Arrays:
        """See `ToArrays`."""
        predictions = found.predictions
        # The sum of a prediction is NaN if any number is, and is faster than a test of each number.
        flat = predictions.reshape(len(predictions), math.prod(predictions.shape[1:]))
        missing = np.isnan(np.einsum("ij->i", flat))
        hectares = self.grid.hectares(window).ravel()
        meaning = self.run.predictions
        counts = meaning.tally().count(predictions, hectares[found.positions], found.classes)
        arrays = {f"{_COUNTS}{name}": values for name, values in counts.items()}
        arrays["valid"] = (~missing).sum()
        layers = layers_of(self.run)
        if not layers:
            return arrays
        bands = meaning.bands(predictions, found.classes)
        if found.attribution is not None:
            bands[ATTRIBUTION] = found.attribution.T
        for name, values in bands.items():
            layer = layers[name].empty(window.height * window.width)
            layer[:, found.positions] = values
            arrays[name] = layer.reshape(-1, window.height, window.width)
        return arrays


def layers_of(run: RasterRun) -> dict[str, Layer]:
    """The rasters that a run writes, by name."""
    return {layer.name: layer for layer in run.predictions.layers if run.rasters}


class Sink:
    """Counts the predictions of windows, and writes them to rasters if rasters are requested.

    Args:
        work: the run.
        grid: grid of the predictions.
        stack: contexts that the caller ends with the run; takes that of the raster writer.
    """

    def __init__(self, work: Work, grid: Grid, stack: ExitStack) -> None:
        run = work.run
        self._work = work
        self._grid = grid
        self._layers = layers_of(run)
        self.to_arrays: ToArrays = LayerArrays(run=run, grid=grid)
        """The bands and counts of a window, which `collect` takes."""
        self._tally = run.predictions.tally()
        self._valid = 0
        layers = tuple(self._layers.values())
        self._writer = stack.enter_context(
            RasterWriter(work.folder, grid, layers, _tags(run), room=work.cache.room)
        )

    def collect(self, window: Window, arrays: Arrays) -> None:
        """Add the counts of a window to the tally, and write its bands."""
        self._valid += int(arrays["valid"])
        self._tally.add(
            {n.removeprefix(_COUNTS): a for n, a in arrays.items() if n.startswith(_COUNTS)}
        )
        self._writer.write(window, {name: arrays[name] for name in self._layers})

    @span("finish")
    def outcome(self, timing: Timing) -> Outcome:
        """Finish the files and return them with the summary.

        Args:
            timing: seconds of the run's passes.

        Raises:
            Cancelled: the run was cancelled.
            InsufficientStorage: the disk is full.
            InvalidRequest: the map has more areas than `polygons` writes.
        """
        start = time.perf_counter()
        check(self._work.cancelled)
        files = self._writer.finish()
        check(self._work.cancelled)
        if files:
            layers = tuple(self._layers.values())
            card, made = self._work.run.model.card, _provenance(self._work.run)
            with stored():
                if self._work.run.polygons:
                    path = self._work.folder / f"{POLYGONS}.parquet"
                    cancelled = self._work.cancelled
                    write_polygons(
                        files["class"], self._grid, card.classes, path, lambda: check(cancelled)
                    )
                    files = {**files, POLYGONS: path}
                item = result_item(
                    card,
                    self._grid,
                    layers,
                    made,
                    task=self._work.run.operation,
                    polygons=self._work.run.polygons,
                )
                write_item(item, self._work.folder)
        self._work.progress.finish()
        run = self._work.run
        total = self._grid.width * self._grid.height
        warnings = run_warnings(self._work.run)
        if self._valid == 0:
            warnings += (all_missing(self._work.run, self._work.cache),)
        summary: dict[str, JSON] = {
            **_summary_head(self._work.run),
            "pixels": total,
            "valid_share": self._valid / total,
            **self._tally.summary(),
            **({"backtest": run.backtested.record} if run.backtested else {}),
            "warnings": warning_list(warnings),
        }
        return Outcome(
            files=files,
            summary=summary,
            timing=timing + Timing(write=time.perf_counter() - start),
            warnings=warnings,
        )


def _provenance(run: RasterRun) -> Provenance:
    stack = run.stack
    predictions = run.predictions
    return Provenance(
        dates=tuple(stack.dates[t] for t in run.used) if stack.dates else (),
        forecast_dates=predictions.dates if isinstance(predictions, ForecastPredictions) else (),
        sources=stack.files,
        provider=run.model.provider,
        backtest=run.backtested.record if run.backtested else None,
        parameters={
            "start": run.time_window.start.isoformat() if run.time_window else None,
            "mask": stack.mask,
            "outputs": list(run.outputs),
            **({"stride": run.stride} if run.model.card.modality == "patch" else {}),
            **cleaning(run),
            **({} if run.dtype == "float32" else {"dtype": run.dtype}),
            **({} if run.similar_to is None else {"similar_to": list(run.similar_to)}),
        },
    )


def run_warnings(run: RasterRun) -> tuple[StackWarning, ...]:
    """The warnings of a run: of its stack, its time window, and how both fit the model."""
    card, dates = run.model.card, run.stack.dates
    return (
        *run.stack.warnings,
        *outside_time_window(card, dates, run.time_window),
        *partial_season(card, dates, run.time_window),
        *_resolution(run),
        *raster_outside_training(card, run.stack.grid, run.kilometres_away),
        *_coverage(run),
        *(run.backtested.warnings if run.backtested else ()),
    )


def all_missing(run: RasterRun, cache: BlockCache | None) -> StackWarning:
    """The warning that no pixel or patch has a prediction, with the reason."""
    least = run.model.card.min_observations
    why = why_missing(run.stack, run.used, least, cache=cache)
    what = "pixel" if run.model.card.modality == "pixel" else "patch"
    return StackWarning(code="all_missing", detail=f"no {what} has a prediction: {why}")


def none_predicted(
    run: RasterRun,
    statuses: Sequence[JSON],
    noun: str,
    cache: BlockCache | None,
    lonlat: Sequence[tuple[float, float]] = (),
) -> tuple[StackWarning, ...]:
    """The warning that no point or field has a prediction, with the reason; empty if one has.

    Args:
        run: the run.
        statuses: status of each point or field: ok, no_data, outside or invalid.
        noun: `point` or `field`, for the message.
        cache: GDAL's block cache; None does not change it.
        lonlat: longitude and latitude of each point in degrees.
    """
    if "ok" in statuses:
        return ()
    if "no_data" in statuses:
        return (all_missing(run, cache),)
    away = run.stack.grid.away(lonlat)
    detail = f"no {noun} has a prediction: all {len(statuses)} are {away}"
    return (StackWarning(code="all_missing", detail=detail),)


def _resolution(run: RasterRun) -> tuple[StackWarning, ...]:
    """The warning that pixels are much larger or smaller than those of the training data."""
    card, size = run.model.card, run.stack.grid.pixel_size
    if card.pixel_size is None or not size:
        return ()
    smallest, largest = card.pixel_size
    if smallest / _OTHER_RESOLUTION <= size <= largest * _OTHER_RESOLUTION:
        return ()
    trained = f"{smallest:g} m" if smallest == largest else f"{smallest:g} to {largest:g} m"
    detail = (
        f"pixels are {size:.3g} m on the ground, and '{card.id}' was trained on pixels of "
        f"{trained}: expect more errors, or resample the files (gdalwarp -tr)"
    )
    return (StackWarning(code="resolution_suspected", detail=detail),)


def _coverage(run: RasterRun) -> tuple[StackWarning, ...]:
    """The warning that the patches cover only a part of the raster."""
    if run.model.card.modality != "patch":
        return ()
    covered, total = covered_pixels(run)
    if covered >= _COVERED * total:
        return ()
    rows, columns = run.patches.grid.height, run.patches.grid.width
    detail = (
        f"the {rows} x {columns} cells of {run.stride} pixels cover {covered / total:.0%} of the "
        "raster, from its upper left corner, and areas are those of the cells: a cell has a label "
        f"only if a whole patch of {run.model.card.patch} x {run.model.card.patch} pixels fits "
        "between its upper left corner and the raster's edges. Extend the raster to the right and "
        "below to cover the rest"
    )
    return (StackWarning(code="area_not_covered", detail=detail),)


def covered_pixels(run: RasterRun) -> tuple[int, int]:
    """Number of the raster's pixels that the cells of a patch run cover, and of all its pixels."""
    cells, grid = run.patches.grid, run.stack.grid
    total = grid.width * grid.height
    return min(cells.width * cells.height * run.stride**2, total), total


def cleaning(run: RasterRun) -> dict[str, JSON]:
    """The parameters with which a map was cleaned, for summaries; empty if it was not cleaned."""
    given: dict[str, JSON] = {"smooth": run.smooth, "min_area": run.min_area}
    return {name: value for name, value in given.items() if value}


def _summary_head(run: RasterRun) -> dict[str, JSON]:
    stack, card = run.stack, run.model.card
    head: dict[str, JSON] = {
        "model": card.id,
        "task": run.operation,
        **card.use_in_answers(),
        "provider": run.model.provider,
        **dates_summary(run),
        "layout": stack.layout,
        "scale": stack.scale,
        "offset": stack.offset,
        "reflectance": _reflectance(run),
        "sensor": stack.sensor,
        "mask": stack.mask,
    }
    if card.modality == "pixel":
        return {**head, **cleaning(run)}
    covered, total = covered_pixels(run)
    return {**head, "stride": run.stride, "covered_share": covered / total}


def _reflectance(run: RasterRun) -> list[JSON]:
    """Each scale and offset with its origin and the dates to which it was applied."""
    stack, used = run.stack, set(run.used)
    by_kind: dict[tuple[float, float, str | None, str | None], list[int]] = defaultdict(list)
    for acquisition in stack.acquisitions:
        if acquisition.observation in used:
            for p in dict.fromkeys(acquisition.planes):
                kind = p.scale, p.offset, p.scale_source, p.offset_source
                by_kind[kind].append(acquisition.observation)
    return [
        {
            "scale": scale,
            "offset": offset,
            "scale_source": scale_source,
            "offset_source": offset_source,
            "dates": [stack.dates[t].isoformat() for t in sorted(set(ts))] if stack.dates else [],
        }
        for (scale, offset, scale_source, offset_source), ts in by_kind.items()
    ]


def _tags(run: RasterRun) -> dict[str, str]:
    """Tags of every file: the model, the time window and the dates of the observations."""
    card = run.model.card
    tags = {"TIFFTAG_SOFTWARE": "PIMC", "PIMC_MODEL": card.id}
    if card.intended_use:
        tags[USE_TAG] = card.intended_use
    if run.time_window:
        tags["PIMC_WINDOW_START"] = run.time_window.start.isoformat()
    if run.stack.dates:
        tags["PIMC_DATES"] = ",".join(run.stack.dates[t].isoformat() for t in run.used)
    return tags

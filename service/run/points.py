"""Point runs: predictions for single points."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from service.errors import StackWarning
from service.infer.attribution import date_attribution
from service.infer.patches import fill_gaps
from service.read.geotiff import BlockCache
from service.read.reader import StackReader
from service.run.backtest import Backtested, History, predict_from_history
from service.run.collect import Floats, none_predicted, run_warnings
from service.run.executors import Timing, check
from service.run.patches import clear_composite
from service.run.pixels import model_time
from service.run.plan import RasterRun, check_run
from service.tracing import span
from service.write.predictions import ATTRIBUTION, JSON, dated


@dataclass(frozen=True, kw_only=True)
class PointOutcome:
    """Results of a point run."""

    results: tuple[dict[str, JSON], ...]
    """One result per point, in order: `status` (ok, outside or no_data), and the prediction if the
    status is ok."""
    timing: Timing
    warnings: tuple[StackWarning, ...]
    backtested: Backtested | None = None


def run_points(
    run: RasterRun,
    lonlat: Sequence[tuple[float, float]],
    *,
    cancelled: threading.Event | None = None,
    cache: BlockCache | None = None,
) -> PointOutcome:
    """Predict for single points.

    Args:
        run: the run; no rasters are written.
        lonlat: longitude and latitude of each point in degrees (EPSG:4326).
        cancelled: an event that cancels the run when it is set.
        cache: GDAL's block cache; None does not change it.

    Raises:
        Cancelled: `cancelled` was set.
        PIMCError: an error of the stack, the model or the request.
    """
    check_run(run)
    rows, cols, inside = run.stack.grid.locate(lonlat)
    pixels = partial(predict_pixels, cancelled=cancelled)
    predict = pixels if run.model.card.modality == "pixel" else _predict_patches
    with StackReader(
        run.stack, run.read, cache=cache, before_read=lambda: check(cancelled)
    ) as reader:
        found = predict(run, reader, rows[inside], cols[inside])
    results: list[dict[str, JSON]] = [{"status": "outside"} for _ in lonlat]
    dates = [run.stack.dates[t] for t in run.used] if run.stack.dates else []
    places = zip(np.flatnonzero(inside), found.predictions, strict=True)
    for n, (point, prediction) in enumerate(places):
        check(cancelled)
        predicted = not np.isnan(prediction).any()
        record = run.predictions.record(prediction) if predicted else {}
        if predicted and found.attribution is not None:
            record[ATTRIBUTION] = dated(dates, found.attribution[n])
        results[point] = {"status": "ok" if predicted else "no_data", **record}
    statuses = [result["status"] for result in results]
    warnings = (
        *run_warnings(run),
        *(found.backtested.warnings if found.backtested else ()),
        *none_predicted(run, statuses, "point", cache, lonlat),
    )
    return PointOutcome(
        results=tuple(results),
        timing=found.timing,
        warnings=warnings,
        backtested=found.backtested,
    )


@dataclass(frozen=True, kw_only=True)
class PointPredictions:
    """Predictions for the pixels or patches of N points."""

    predictions: Floats
    """(N, …) float32, NaN where too little is clear."""
    timing: Timing
    attribution: Floats | None = None
    """Attribution of each date to the class (N, T); None if it was not requested."""
    backtested: Backtested | None = None
    """The backtest of these pixels; None if the run has none."""


def predict_pixels(
    run: RasterRun,
    reader: StackReader,
    rows: NDArray[np.intp],
    cols: NDArray[np.intp],
    cancelled: threading.Event | None = None,
) -> PointPredictions:
    """Predict for pixels, NaN for one with too few clear dates.

    Args:
        run: the run.
        reader: reads the run's stack.
        rows: row of each pixel (N).
        cols: column of each pixel (N).
        cancelled: set it to cancel the run.
    """
    start = time.perf_counter()
    with span("read"):
        sits = reader.read_pixels(rows, cols)
    read = time.perf_counter()
    days, day_of_year = model_time(run)
    values, valid = sits.values.transpose(2, 0, 1), sits.valid.T
    attribution = None
    with span("infer"):
        predictions, backtested = predict_from_history(
            run.model,
            History(
                dates=tuple(run.stack.dates[t] for t in run.read) if run.stack.dates else (),
                values=values,
                valid=valid,
                elsewhere=run.elsewhere(rows, cols),
            ),
            used=len(run.used),
            days=days,
            day_of_year=day_of_year,
            backtested=run.backtest == "places",
            cancelled=cancelled,
        )
        if run.attribution:
            enough = valid.sum(axis=1) >= run.model.card.min_observations
            attribution = np.full((len(rows), len(days)), np.nan, np.float32)
            attribution[enough] = date_attribution(
                run.model,
                values[enough],
                valid[enough],
                days,
                day_of_year,
                predictions[enough],
                before_each=lambda: check(cancelled),
            )
    return PointPredictions(
        predictions=predictions,
        timing=Timing(read=read - start, infer=time.perf_counter() - read),
        attribution=attribution,
        backtested=backtested,
    )


def _predict_patches(
    run: RasterRun, reader: StackReader, rows: NDArray[np.intp], cols: NDArray[np.intp]
) -> PointPredictions:
    """Predict for the patches centred on pixels, NaN where one is not clear enough."""
    patches, grid = run.patches, run.stack.grid
    predictions = np.full((len(rows), *run.model.width), np.nan, np.float32)
    timing = Timing()
    for at in range(0, len(rows), run.model.chunk):
        part = slice(at, at + run.model.chunk)
        start = time.perf_counter()
        with span("read"):
            imagery = np.stack(
                [
                    clear_composite(run, reader.read(patches.centred(grid, int(row), int(col))))
                    for row, col in zip(rows[part], cols[part], strict=True)
                ]
            )
        read = time.perf_counter()
        with span("infer"):
            clear, filled = fill_gaps(imagery)
            predictions[part][clear] = run.model.patches(filled)
        timing += Timing(read=read - start, infer=time.perf_counter() - read)
    return PointPredictions(predictions=predictions, timing=timing)

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
from service.run.collect import Floats, none_predicted, run_warnings
from service.run.executors import Timing, check
from service.run.patches import clear_composite
from service.run.pixels import model_time
from service.run.plan import RasterRun, check_run
from service.write.predictions import ATTRIBUTION, JSON, dated


@dataclass(frozen=True, kw_only=True)
class PointOutcome:
    """Results of a point run."""

    results: tuple[dict[str, JSON], ...]
    """One result per point, in order: `status` (ok, outside or no_data), and the prediction if the
    status is ok."""
    timing: Timing
    warnings: tuple[StackWarning, ...]


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
        run.stack, run.used, cache=cache, before_read=lambda: check(cancelled)
    ) as reader:
        predictions, attribution, timing = predict(run, reader, rows[inside], cols[inside])
    results: list[dict[str, JSON]] = [{"status": "outside"} for _ in lonlat]
    dates = [run.stack.dates[t] for t in run.used] if run.stack.dates else []
    for n, (point, prediction) in enumerate(zip(np.flatnonzero(inside), predictions, strict=True)):
        predicted = not np.isnan(prediction).any()
        record = run.predictions.record(prediction) if predicted else {}
        if predicted and attribution is not None:
            record[ATTRIBUTION] = dated(dates, attribution[n])
        results[point] = {"status": "ok" if predicted else "no_data", **record}
    statuses = [result["status"] for result in results]
    warnings = (*run_warnings(run), *none_predicted(run, statuses, "point", cache))
    return PointOutcome(results=tuple(results), timing=timing, warnings=warnings)


def predict_pixels(
    run: RasterRun,
    reader: StackReader,
    rows: NDArray[np.intp],
    cols: NDArray[np.intp],
    cancelled: threading.Event | None = None,
) -> tuple[Floats, Floats | None, Timing]:
    """Predictions (N, …) for pixels, NaN where a pixel has too few clear dates.

    Also the attribution of each date (N, T), None if it is not asked for.
    """
    start = time.perf_counter()
    sits = reader.read_pixels(rows, cols)
    read = time.perf_counter()
    days, day_of_year = model_time(run)
    predictions = np.full((len(rows), *run.model.width), np.nan, np.float32)
    enough = sits.valid.sum(axis=0) >= run.model.card.min_observations
    observed = (
        sits.values[:, :, enough].transpose(2, 0, 1),
        sits.valid[:, enough].T,
        days,
        day_of_year,
    )
    predictions[enough] = run.model.pixels(*observed)
    attribution = None
    if run.attribution:
        attribution = np.full((len(rows), len(days)), np.nan, np.float32)
        attribution[enough] = date_attribution(
            run.model, *observed, predictions[enough], before_each=lambda: check(cancelled)
        )
    timing = Timing(read=read - start, infer=time.perf_counter() - read)
    return predictions, attribution, timing


def _predict_patches(
    run: RasterRun, reader: StackReader, rows: NDArray[np.intp], cols: NDArray[np.intp]
) -> tuple[Floats, None, Timing]:
    """Predictions (N, …) for the patches centred on pixels, NaN where one is not clear enough."""
    patches, grid = run.patches, run.stack.grid
    predictions = np.full((len(rows), *run.model.width), np.nan, np.float32)
    timing = Timing()
    for at in range(0, len(rows), run.model.chunk):
        part = slice(at, at + run.model.chunk)
        start = time.perf_counter()
        imagery = np.stack(
            [
                clear_composite(run, reader.read(patches.centred(grid, int(row), int(col))))
                for row, col in zip(rows[part], cols[part], strict=True)
            ]
        )
        read = time.perf_counter()
        clear, filled = fill_gaps(imagery)
        predictions[part][clear] = run.model.patches(filled)
        timing += Timing(read=read - start, infer=time.perf_counter() - read)
    return predictions, None, timing

"""Raster runs: predictions for every pixel or patch of a stack, as rasters and a summary.

    stack → read ahead → Sits → infer → predictions → write behind → COGs, summary

A run of a pixel model reads the stack once. A run of a patch model has two or three passes: it
makes a cloud-free composite, so that a file is not decoded again for each overlapping patch; it
predicts for the patches of the composite; and if patches overlap, it averages their probabilities.
Each window takes at most `WINDOW_BYTES` of memory for a raster of any size, and the result does not
depend on how the raster is divided into windows.

A run with a journal stores each finished window there before counting it. After an interruption the
run reads the finished windows from the journal and computes the others; its result is identical,
byte for byte, to that of an uninterrupted run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from service.read.geotiff import BlockCache
from service.read.reader import StackReader
from service.run.backtest import History, run_backtest, sample_pixels
from service.run.collect import Outcome, Progress, Work
from service.run.executors import Executor, ThreadExecutor, check
from service.run.patches import run_patches
from service.run.pixels import run_pixels
from service.run.plan import RasterRun, check_run
from service.run.windows import WINDOW_BYTES, Journal


def run_raster(work: Work) -> Outcome:
    """Predict for every pixel or patch of a raster.

    Args:
        work: the run; its plan has checked with `calibrate` that the values are reflectance.

    Raises:
        Cancelled: the run was cancelled.
        PIMCError: an error of the stack, the model or the request.
    """
    pixels = work.run.model.card.modality == "pixel"
    return run_pixels(work) if pixels else run_patches(work)


def backtest_sample(
    run: RasterRun,
    *,
    cancelled: threading.Event | None = None,
    cache: BlockCache | None = None,
) -> RasterRun:
    """The run with its backtest on a sample of the raster's pixels; unchanged without one.

    Raises:
        Cancelled: `cancelled` was set.
        PIMCError: an error of the stack or the model.
    """
    if run.backtest != "sample":
        return run
    grid, history = run.stack.grid, run.history
    rows, columns = sample_pixels(grid.height, grid.width)
    with StackReader(
        run.stack, history, cache=cache, before_read=lambda: check(cancelled)
    ) as reader:
        sits = reader.read_pixels(rows, columns)
    sample = History(
        dates=tuple(run.stack.dates[t] for t in history),
        values=sits.values.transpose(2, 0, 1),
        valid=sits.valid.T,
        elsewhere=run.elsewhere(rows, columns),
    )
    return replace(run, backtested=run_backtest(run.model, [sample], cancelled=cancelled))


def make_work(
    run: RasterRun,
    folder: Path,
    *,
    progress: Callable[[float], None] = lambda _: None,
    cancelled: threading.Event | None = None,
    executor: Executor | None = None,
    cache: BlockCache | None = None,
    journal: Journal | None = None,
    window_bytes: int = WINDOW_BYTES,
) -> Work:
    """A run with its folder, executor, cache, journal and progress.

    Args:
        run: the run.
        folder: existing folder for the finished files; a run that fails removes its files.
        progress: called with the finished share, 0 to 1, from one thread at a time.
        cancelled: an event that cancels the run when it is set.
        executor: processes the windows; None uses threads of this process.
        cache: GDAL's block cache; None creates one.
        journal: contains the windows that an earlier attempt finished, and stores further ones;
            None stores none.
        window_bytes: memory of one window, bytes.

    Raises:
        Cancelled: `cancelled` was set.
        PIMCError: the run does not fit its model.
    """
    check_run(run)
    check(cancelled)
    return Work(
        run=run,
        folder=folder,
        progress=Progress(progress),
        cancelled=cancelled,
        executor=executor or ThreadExecutor(),
        cache=cache or BlockCache(),
        journal=journal,
        window_bytes=window_bytes,
    )

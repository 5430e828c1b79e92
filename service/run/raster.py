"""Raster runs: windows of a stack through a model, into rasters and a summary.

    stack → read ahead → Sits → infer → predictions → write behind → COGs, summary

A run of a pixel model reads the stack once. A run of a patch model first makes a cloud-free
composite, so that overlapping patches do not decode a file twice; then it predicts for the patches
of the composite; if these overlap, a last pass averages their probabilities. Memory is bounded by
`WINDOW_BYTES` per window, whatever the raster's size, and a result does not depend on the windows.

If there is a journal, it stores each finished window before the window is counted. A run that
starts again gets the stored windows from the journal and computes only the missing ones; its result
is identical, byte for byte, to that of an uninterrupted run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from service.read.geotiff import BlockCache
from service.run.collect import Outcome, Progress, Work
from service.run.executors import Executor, ThreadExecutor, check
from service.run.patches import run_patches
from service.run.pixels import run_pixels
from service.run.plan import RasterRun, check_run
from service.run.windows import WINDOW_BYTES, Journal


def run_raster(work: Work) -> Outcome:
    """Predict for every pixel or patch of a raster.

    The plan has checked with `calibrate` that the values are reflectance.

    Raises:
        Cancelled: the run was cancelled.
        PIMCError: an error of the stack, the model or the request.
    """
    pixels = work.run.model.card.modality == "pixel"
    return run_pixels(work) if pixels else run_patches(work)


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
        folder: existing folder for the finished files. A run that fails leaves no file in it.
        progress: called with the finished share, 0 to 1, from one thread at a time.
        cancelled: set it to cancel the run.
        executor: runs the windows; None uses threads of this process.
        cache: GDAL's block cache; None creates one.
        journal: holds the windows that an earlier attempt finished, and stores further ones; None
            stores none.
        window_bytes: memory of one window.

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

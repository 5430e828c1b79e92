"""Raster runs: windows of a stack through a model, into rasters and a summary.

    stack → read ahead → Sits → infer → predictions → write behind → COGs, summary

Pixel models read the stack once. Patch models first make a cloud-free composite, so that
overlapping patches decode no file twice; then they predict its patches; where these overlap,
a last pass averages their probabilities. Memory is bounded by `WINDOW_BYTES` per window, whatever
the raster's size, and the borders of windows never show in a result.

A journal, if given, stores each finished window before it counts, and returns it to a run that
starts again: only the missing windows are read and predicted anew, and the result is byte for byte
that of an undisturbed run.
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


def run_raster(
    run: RasterRun,
    folder: Path,
    *,
    progress: Callable[[float], None] = lambda _: None,
    cancelled: threading.Event | None = None,
    executor: Executor | None = None,
    cache: BlockCache | None = None,
    journal: Journal | None = None,
    window_bytes: int = WINDOW_BYTES,
) -> Outcome:
    """Predict for every pixel or patch of a raster.

    `calibrate` checks beforehand whether its numbers are reflectance at all.

    Args:
        run: what to do.
        folder: where the finished files go; it exists. A run that fails leaves nothing in it.
        progress: called with the share done, 0 to 1, from one thread at a time.
        cancelled: set it to cancel the run.
        executor: where windows run; None takes threads of this process.
        cache: GDAL's block cache; None makes one.
        journal: holds the windows finished before, and receives those finished now; None keeps
            none.
        window_bytes: memory for one window.

    Raises:
        Cancelled: `cancelled` was set.
        PIMCError: a fault of the stack, the model or the request.
    """
    work = make_work(
        run,
        folder,
        progress=progress,
        cancelled=cancelled,
        executor=executor,
        cache=cache,
        journal=journal,
        window_bytes=window_bytes,
    )
    return run_pixels(work) if run.model.card.modality == "pixel" else run_patches(work)


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
    """A run with everything around it; the arguments are those of `run_raster`.

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

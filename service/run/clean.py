"""Clean maps: probabilities smoothed by their neighbourhood, and small areas joined to neighbours.

    probabilities → smoothed → classes of the whole map → sieved → layers and summary

Windows are read with a border as wide as the neighbourhood, and the sieve processes the whole map,
so that the result does not depend on how the raster is divided into windows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from service.grid import Grid, Window
from service.infer.smooth import smoothed
from service.run.collect import Floats, Sink, WindowPredictions, Work
from service.run.executors import Timing, check
from service.run.passes import Stages
from service.run.windows import Arrays, windows
from service.write.cog import OpenScratch, ScratchRaster
from service.write.predictions import NO_CLASS, classes_with_confidence
from service.write.sieve import sieved

_PASS = 0.1
"""Share of the run's progress that one pass counts."""
_COPIES = 4
"""Copies of a window's probabilities in memory at once: as read, as logits, smoothed, as bands."""


def clean(work: Work, raw: ScratchRaster, sink: Sink, stack: ExitStack) -> Timing:
    """Clean a map and write it to the sink.

    Args:
        work: the run, whose `smooth` or `min_area` is set.
        raw: probabilities (K) of every pixel, NaN for a pixel without a prediction.
        sink: takes the cleaned predictions.
        stack: contexts that the caller ends with the run; takes that of a temporary raster.
    """
    run, grid = work.run, work.run.stack.grid
    if not run.min_area:
        with raw.open() as file:
            return _to_sink(work, file, sink, radius=run.smooth, classes=None)
    classes = np.full((grid.height, grid.width), NO_CLASS, np.uint8)
    timing = Timing()
    source = raw
    if run.smooth:
        source = stack.enter_context(ScratchRaster(work.folder / "smoothed.scratch.tif"))
        with raw.open() as file, source.create(grid, run.model.width[0]) as target:
            timing += _smooth(work, file, target)
    with source.open() as file:
        timing += _decide(work, file, classes)
        check(work.cancelled)
        everything = Window(0, 0, grid.width, grid.height)
        classes = sieved(
            classes,
            grid.hectares(everything),
            run.min_area,
            check=lambda: check(work.cancelled),
        )
        return timing + _to_sink(work, file, sink, radius=0, classes=classes)


def around(grid: Grid, window: Window, radius: int) -> Window:
    """A window with a border of `radius` pixels, clipped to the grid."""
    (top, bottom), (left, right) = window.toranges()
    top, left = max(0, top - radius), max(0, left - radius)
    bottom, right = min(grid.height, bottom + radius), min(grid.width, right + radius)
    return Window(left, top, right - left, bottom - top)


def read_around(
    read: Callable[[Window], Floats], grid: Grid, window: Window, radius: int
) -> tuple[Window, Floats]:
    """A window and its probabilities with a border (K, h + 2 radius, w + 2 radius) float32.

    Args:
        read: returns the probabilities (K, h, w) of a window of the grid.
        grid: the grid.
        window: the window.
        radius: width of the border in pixels; it is NaN outside the grid.
    """
    (top, bottom), (left, right) = window.toranges()
    rows = (max(0, radius - top), max(0, bottom + radius - grid.height))
    columns = (max(0, radius - left), max(0, right + radius - grid.width))
    values = read(around(grid, window, radius))
    return window, np.pad(values, ((0, 0), rows, columns), constant_values=np.nan)


def _parts(work: Work) -> list[Window]:
    run = work.run
    bytes_of_pixel = _COPIES * 4 * run.model.width[0]
    return windows(run.stack.grid, (256, 256), bytes_of_pixel, work.window_bytes)


def _smooth(work: Work, file: OpenScratch, target: OpenScratch) -> Timing:
    grid, radius = work.run.stack.grid, work.run.smooth
    return work.run_pass(
        "smoothed",
        _parts(work),
        Stages(
            read=lambda window: read_around(file.read, grid, window, radius),
            infer=lambda item: smoothed(item[1], radius),
            to_arrays=lambda _, values: {"values": values},
        ),
        collect=lambda window, arrays: target.write(window, arrays["values"]),
        share=_PASS,
    )


def _decide(work: Work, file: OpenScratch, classes: NDArray[np.uint8]) -> Timing:
    """The class of every pixel, into the whole map."""

    def collect(window: Window, arrays: Arrays) -> None:
        classes[window.toslices()] = arrays["class"]

    return work.run_pass(
        "classes",
        _parts(work),
        Stages(
            read=file.read,
            infer=lambda values: classes_with_confidence(values.reshape(len(values), -1).T)[0],
            to_arrays=lambda w, found: {"class": found.reshape(w.height, w.width)},
        ),
        collect=collect,
        share=_PASS,
    )


def _to_sink(
    work: Work,
    file: OpenScratch,
    sink: Sink,
    *,
    radius: int,
    classes: NDArray[np.uint8] | None,
) -> Timing:
    grid = work.run.stack.grid

    def infer(item: tuple[Window, Floats]) -> WindowPredictions:
        window, values = item
        clean = smoothed(values, radius) if radius else values
        flat = clean.reshape(len(clean), -1)
        positions = np.flatnonzero(~np.isnan(flat[0]))
        return WindowPredictions(
            positions=positions,
            predictions=np.ascontiguousarray(flat[:, positions].T),
            classes=None if classes is None else classes[window.toslices()].ravel()[positions],
        )

    return work.run_pass(
        "cleaned",
        _parts(work),
        Stages(
            read=lambda window: read_around(file.read, grid, window, radius),
            infer=infer,
            to_arrays=sink.to_arrays,
        ),
        collect=sink.collect,
        share=_PASS,
    )

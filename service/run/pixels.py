"""Pixel runs: a prediction for every pixel of a stack."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from service.grid import Window
from service.infer.attribution import date_attribution
from service.read.buffers import BufferPool, spaced
from service.read.geotiff import BlockCache
from service.read.reader import StackReader
from service.read.stack import Sits
from service.run.clean import clean
from service.run.collect import Outcome, Sink, ToArrays, WindowPredictions, Work, spread, write_to
from service.run.executors import Timing, check
from service.run.passes import Stages
from service.run.plan import RasterRun
from service.run.windows import Arrays, windows
from service.write.cog import ScratchRaster


def run_pixels(work: Work) -> Outcome:
    """Predict for every pixel of a raster; see `run_raster`."""
    run = work.run
    grid = run.stack.grid
    with ExitStack() as stack:
        sink = Sink(work, grid, stack)
        if run.cleaned:
            raw = stack.enter_context(ScratchRaster(work.folder / "predictions.scratch.tif"))
            with raw.create(grid, run.model.width[0]) as file:
                timing = predict_windows(work, spread, write_to(file), share=0.6)
            return sink.outcome(timing + clean(work, raw, sink, stack))
        return sink.outcome(predict_windows(work, sink.to_arrays, sink.collect, share=0.9))


def predict_windows(
    work: Work,
    to_arrays: ToArrays,
    collect: Callable[[Window, Arrays], None],
    *,
    share: float,
    then: Then | None = None,
    stage: str = "predictions",
) -> Timing:
    """The pass that reads the stack and predicts; it frees the memory of its windows at its end.

    Args:
        work: the run.
        to_arrays: converts a window's predictions to the arrays that the journal stores.
        collect: takes the arrays of each window, in order.
        share: share of the run's progress.
        then: changes a window's predictions, in the stage that infers; None leaves them.
        stage: name of the pass.
    """
    run = work.run
    grid = run.stack.grid
    parts = windows(
        grid, run.stack.block, run.pixel_bytes + run.prediction_bytes, work.window_bytes
    )
    # The reader is closed and its memory freed before the files are finished, which takes memory.
    return work.run_pass(
        stage,
        parts,
        PixelPass(run=run, to_arrays=to_arrays, then=then),
        collect=collect,
        share=share,
    )


class Then(Protocol):
    """Changes the predictions of a window. `pickle` copies it."""

    def __call__(self, found: WindowPredictions) -> WindowPredictions:
        """The changed predictions."""
        ...


@dataclass(frozen=True, kw_only=True)
class PixelPass:
    """The `Pass` that reads the stack and predicts for every pixel."""

    run: RasterRun
    to_arrays: ToArrays
    then: Then | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """See `Pass.paths`."""
        return self.run.stack.paths

    @contextmanager
    def open(self, cache: BlockCache, cancelled: threading.Event | None) -> Iterator[Stages]:
        """See `Pass.open`."""
        with open_pixels(self.run, cache, cancelled) as stages:
            yield Stages(
                read=stages.read,
                infer=lambda clear: self._changed(stages.infer(clear)),
                to_arrays=self.to_arrays,
            )

    def _changed(self, found: WindowPredictions) -> WindowPredictions:
        return found if self.then is None else self.then(found)


@contextmanager
def open_pixels(
    run: RasterRun, cache: BlockCache, cancelled: threading.Event | None
) -> Iterator[PixelStages]:
    """The read and infer stages of a run, over its open files.

    Args:
        run: the run.
        cache: GDAL's block cache.
        cancelled: an event that cancels the run when it is set.
    """
    buffers = BufferPool()
    reader = StackReader(
        run.stack, run.read, cache=cache, buffers=buffers, before_read=lambda: check(cancelled)
    )
    with buffers, reader:
        yield PixelStages(run, reader, buffers, cancelled)


@dataclass(frozen=True, kw_only=True)
class ClearPixels:
    """A window of the stack with the pixels that have enough clear dates."""

    sits: Sits
    """The window's values and validity."""
    positions: NDArray[np.intp]
    """Positions (n) of these pixels in the flattened window."""
    seen: NDArray[np.integer[Any]]
    """Number of clear dates of every pixel (h, w)."""
    window: Window


class PixelStages:
    """The read and infer stages of a pixel run.

    Args:
        run: the run.
        reader: reads the run's stack.
        buffers: owns the memory of the windows.
        cancelled: an event that cancels the run when it is set.
    """

    def __init__(
        self,
        run: RasterRun,
        reader: StackReader,
        buffers: BufferPool,
        cancelled: threading.Event | None,
    ) -> None:
        self._model = run.model
        self._backtested = run.backtested
        self._dates = [run.stack.dates[t] for t in run.read]
        self._used = len(run.used)
        self._days, self._day_of_year = model_time(run)
        self._run = run
        self._attributed = run.attribution
        self._cancelled = cancelled
        self._reader = reader
        self._buffers = buffers

    def read(self, window: Window) -> ClearPixels:
        """The read stage: read a window and find the pixels that have enough clear dates."""
        sits = self._reader.read(window)
        T = self._used
        # Sums in the smallest type that can hold T: uint8 is six times as fast as uint32.
        kind = np.uint8 if T < 256 else np.uint32
        seen = np.add.reduce(sits.valid[-T:].view(np.uint8), axis=0, dtype=kind)
        positions = np.flatnonzero(seen >= self._model.card.min_observations)
        return ClearPixels(sits=sits, positions=positions, seen=seen, window=window)

    def infer(self, clear: ClearPixels) -> WindowPredictions:
        """The infer stage: predict for these pixels, and return the window's memory to the pool."""
        T, C, h, w = clear.sits.values.shape
        values = clear.sits.values.reshape(T, C, h * w)
        valid = clear.sits.valid.reshape(T, h * w)
        positions = clear.positions
        predictions = np.empty((len(positions), *self._model.width), np.float32)
        attribution = np.empty((len(positions), T), np.float32) if self._attributed else None
        # In chunks, so that only one chunk at a time is copied into (N, T, C), and a cancelled run
        # stops after the current chunk.
        for start in range(0, len(positions), self._model.chunk):
            check(self._cancelled)
            chunk = positions[start : start + self._model.chunk]
            chunk_values, chunk_valid = _chosen(values, chunk), _chosen(valid, chunk)
            part = slice(start, start + len(chunk))
            time = self._days, self._day_of_year
            seen = chunk_values[-self._used :].transpose(2, 0, 1), chunk_valid[-self._used :].T
            row, column = np.divmod(chunk, w)
            away = self._run.elsewhere(
                row + int(clear.window.row_off), column + int(clear.window.col_off)
            )
            found = self._model.pixels(*seen, *time, elsewhere=away)
            if self._backtested is not None:
                found = self._backtested.corrected(
                    found, chunk_values.transpose(2, 0, 1), chunk_valid.T, self._dates, self._used
                )
            predictions[part] = found
            if attribution is not None:
                attribution[part] = date_attribution(
                    self._model, *seen, *time, found, before_each=lambda: check(self._cancelled)
                )
        self.give_back(clear.sits)
        return WindowPredictions(
            positions=positions, predictions=predictions, attribution=attribution
        )

    def give_back(self, sits: Sits) -> None:
        """Return the memory of a window to the pool; the window must not be used afterwards."""
        self._buffers.give_back(sits.values, sits.valid)


def _chosen(planes: NDArray[Any], positions: NDArray[np.intp]) -> NDArray[Any]:
    """The pixels at ascending positions (n) of planes (..., N), shape (..., n)."""
    begin, end = positions[0], positions[-1] + 1
    if end - begin == len(positions):  # usual case, all pixels: a view instead of a copy
        return planes[..., begin:end]
    out = spaced(planes.shape[:-1], positions.shape, planes.dtype.type)
    out[...] = planes[..., positions]  # `np.take` would copy all planes first
    return out


def model_time(run: RasterRun) -> tuple[NDArray[np.float32], int]:
    """Days since the time window's first day (T) float32, and that day's day of the year.

    Raises:
        TypeError: the run has no time window, because its model takes imagery.
    """
    if run.time_window is None:
        raise TypeError(f"'{run.model.card.id}' does not take time series")
    days = np.asarray(run.time_window.days(run.stack.dates), np.float32)
    return days, run.time_window.first_day.timetuple().tm_yday

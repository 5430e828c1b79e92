"""Memory budget of the process: a run reserves all of its memory before it reads pixels.

    plan → need, from headers → within the budget? → reserve → windows → release
                                   │                    │
                            RasterTooLarge        waits; Cancelled or Overloaded

A run reserves all the memory that it needs at once and does not reserve more later, so that two
runs can never wait for each other. Of the waiting runs, the first that fits into the free memory
starts, so that a run that needs much memory does not delay runs that need little.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from service.container import usable_memory
from service.errors import Overloaded, RasterTooLarge
from service.grid import Grid
from service.infer.model import LoadedModel
from service.infer.patches import PatchGrid
from service.read.radiometry import sample_bytes
from service.read.reader import CELL_BYTES, Footprint, footprint
from service.read.stack import Stack
from service.run.executors import ThreadExecutor, check
from service.run.labels import MOST_OF_A_POLYGON
from service.run.request import SeriesInput
from service.run.series import SERIES_BATCH_BYTES
from service.run.windows import AT_ONCE, COVERAGE_BYTES, OVER, WINDOW_BYTES
from service.write.cog import finishing_bytes
from service.write.polygons import polygon_bytes
from service.write.predictions import Predictions
from service.write.sieve import sieve_bytes

_SHARE = 2
"""The budget is the memory of the container divided by this. Models, request bodies and buffers of
inference need the rest."""
_WINDOWS_PER_BUDGET = 32
"""A window takes at most the budget divided by this."""
_DOCUMENTS = 2
"""JSON bodies may take the budget divided by this, in addition to the budget."""
_MIN_BUDGET = 64 * 2**20
"""Smallest budget, bytes."""
_NUMBER_BYTES = 64
"""Memory of one number of a JSON document, as a Python object and as text."""
_FURTHER_NUMBERS = 5
"""Numbers of a measured date beside its bands (three indices, the clear share and the date), and of
a field beside its prediction (pixels, hectares, clear dates, confidence, status)."""
_SERIES_BYTES = 6_000
"""Memory of one series of a request beside its numbers: its objects, as given, checked, and in the
result."""
_DATE_BYTES = 200
"""Memory of one date of a series: as an object, and its part of the checked arrays."""
_POSITION_BYTES = 2 * 3 * 8
"""Row, column and label of a labelled pixel, as found and in order, bytes."""
_POLL_SECONDS = 0.1
"""Seconds between two checks of whether a waiting run was cancelled."""
_RETRY_SECONDS = 10
"""Seconds after which a client should retry, for the header `Retry-After`."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """Memory that a run takes at once, bytes."""

    files: Footprint | None = None
    """Memory that GDAL takes for the files; None if it reads none."""
    arrays: int
    """Memory of windows, samples, points and results."""
    what: str
    """Name of these arrays, for messages."""
    remedy: str
    """Advice on how to make the arrays smaller, for messages."""

    @property
    def total(self) -> int:
        """Memory of files and arrays together."""
        return self.arrays + (self.files.total if self.files else 0)


def default_budget() -> int:
    """Memory that runs may take, bytes: half of the memory of the container or the machine."""
    return max(_MIN_BUDGET, usable_memory() // _SHARE)


class MemoryBudget:
    """The memory that all runs of the process share. Thread-safe.

    Args:
        limit: memory of all runs together, bytes; None takes `default_budget`.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = default_budget() if limit is None else limit
        self._taken = 0
        self._waiting: list[_Ticket] = []  # in the order of arrival
        self._changed = threading.Condition()

    @property
    def taken(self) -> int:
        """Memory that runs have reserved at present, bytes."""
        return self._taken

    @property
    def awaited(self) -> int:
        """Number of runs that wait for memory."""
        return len(self._waiting)

    @property
    def document_bytes(self) -> int:
        """Memory of all JSON bodies of requests, bytes, in addition to that of runs.

        A request keeps what it has parsed while its run waits for memory. Both from one budget,
        requests could hold all of it and wait for each other.
        """
        return self.limit // _DOCUMENTS

    @property
    def window_bytes(self) -> int:
        """Memory of one window of a run, bytes."""
        return min(WINDOW_BYTES, self.limit // _WINDOWS_PER_BUDGET)

    def check(self, need: Need) -> None:
        """Reject a need that exceeds the budget.

        Raises:
            RasterTooLarge: the need exceeds the whole budget.
        """
        if need.total <= self.limit:
            return
        if need.files is not None and need.files.total >= need.arrays:
            heaviest = need.files.heaviest
            rows, columns = heaviest.block
            why = (
                f"one block of '{heaviest.source.name}', {rows} x {columns} pixels, decodes to "
                f"{heaviest.memory.block} bytes, and the table of its blocks takes "
                f"{heaviest.memory.blocks}; files and decoded blocks together take "
                f"{need.files.total}. Write the files in blocks of 256 x 256 or 512 x 512 pixels, "
                "as with gdal_translate -of COG"
            )
        else:
            why = f"{need.what} take {need.arrays} bytes. {need.remedy}"
        raise RasterTooLarge(
            f"the run needs {need.total} bytes of memory at once, and the limit is {self.limit} "
            f"(PIMC_MEMORY_BUDGET): {why}"
        )

    @contextmanager
    def take(
        self,
        need: Need,
        *,
        cancelled: threading.Event | None = None,
        patience: float | None = None,
    ) -> Iterator[None]:
        """Reserve memory for the duration of the context, after waiting until it is free.

        Args:
            need: memory to reserve; a run that has reserved memory must not reserve more.
            cancelled: an event that ends the wait when it is set.
            patience: seconds to wait; None waits without a limit.

        Raises:
            RasterTooLarge: the need exceeds the whole budget.
            Cancelled: `cancelled` was set.
            Overloaded: other runs held the memory until `patience` had passed.
        """
        self.check(need)
        size = need.total
        self._wait(size, cancelled, patience)
        try:
            yield
        finally:
            with self._changed:
                self._taken -= size
                self._changed.notify_all()

    def _wait(self, size: int, cancelled: threading.Event | None, patience: float | None) -> None:
        until = None if patience is None else time.monotonic() + patience
        with self._changed:
            ticket = _Ticket(size)
            self._waiting.append(ticket)
            try:
                while self._first_that_fits() is not ticket:
                    check(cancelled)
                    if until is not None and time.monotonic() >= until:
                        raise Overloaded(
                            f"the run needs {size} bytes of memory, and other runs use "
                            f"{self._taken} of {self.limit} (PIMC_MEMORY_BUDGET): retry after "
                            f"{_RETRY_SECONDS} s",
                            retry_after=_RETRY_SECONDS,
                        )
                    self._changed.wait(_POLL_SECONDS)
                self._taken += size
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def _first_that_fits(self) -> _Ticket | None:
        free = self.limit - self._taken
        return next((one for one in self._waiting if one.size <= free), None)


class _Ticket:
    """A waiting run, compared by identity."""

    def __init__(self, size: int) -> None:
        self.size = size


class ReadingRun(Protocol):
    """The properties of a run over a stack that determine its memory; `RasterRun` has them."""

    @property
    def model(self) -> LoadedModel: ...  # noqa: D102
    @property
    def stack(self) -> Stack: ...  # noqa: D102
    @property
    def read(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def rasters(self) -> bool: ...  # noqa: D102
    @property
    def polygons(self) -> bool: ...  # noqa: D102
    @property
    def min_area(self) -> float: ...  # noqa: D102
    @property
    def predictions(self) -> Predictions: ...  # noqa: D102
    @property
    def patches(self) -> PatchGrid: ...  # noqa: D102
    @property
    def pixel_bytes(self) -> int: ...  # noqa: D102
    @property
    def prediction_bytes(self) -> int: ...  # noqa: D102


def sampling_need(stack: Stack, used: Sequence[int]) -> Need:
    """The memory of reading the sample of pixels with which a plan checks the files.

    Args:
        stack: the stack.
        used: positions of the used observations on the stack's T axis.
    """
    return Need(
        files=footprint(stack, used),
        arrays=sample_bytes(stack, used),
        what=f"samples of {len(used)} dates",
        remedy="Send fewer dates",
    )


def _windows_bytes(
    stack: Stack, files: Footprint, *, read: int, predicted: int, window_bytes: int
) -> int:
    """The memory of the windows of a run, bytes.

    Args:
        stack: the stack that is read.
        files: memory that GDAL takes for its files.
        read: bytes of one pixel as read.
        predicted: bytes of one pixel's prediction.
        window_bytes: memory of one window.
    """
    pixel = read + predicted
    all_pixels = AT_ONCE * stack.grid.width * stack.grid.height * pixel
    windows = min(int(AT_ONCE * OVER * window_bytes), all_pixels)
    # And the buffers of reading, whose size is proportional to that of the window being read.
    return windows + windows // AT_ONCE * (files.raw + files.layers * read) // pixel


def raster_need(run: ReadingRun, window_bytes: int) -> Need:
    """The memory of a raster run.

    Args:
        run: the run.
        window_bytes: memory of one window.
    """
    files = footprint(run.stack, run.read)
    windows = _windows_bytes(
        run.stack,
        files,
        read=run.pixel_bytes,
        predicted=run.prediction_bytes,
        window_bytes=window_bytes,
    )
    arrays = max(windows, sample_bytes(run.stack, run.read), _finishing_bytes(run))
    arrays += _whole_map_bytes(run)
    return Need(
        files=files,
        arrays=arrays,
        what=f"windows of {len(run.read)} dates and {len(run.stack.bands_read)} bands",
        remedy="Send fewer dates",
    )


def _finishing_bytes(run: ReadingRun) -> int:
    if not run.rasters:
        return 0
    grid: Grid = run.patches.grid if run.model.card.modality == "patch" else run.stack.grid
    return max((finishing_bytes(layer, grid) for layer in run.predictions.layers), default=0)


def _whole_map_bytes(run: ReadingRun) -> int:
    """Memory of the steps that need the whole class map: removal of small areas, and polygons."""
    grid: Grid = run.patches.grid if run.model.card.modality == "patch" else run.stack.grid
    pixels = grid.width * grid.height
    sieve = sieve_bytes(pixels) if run.min_area else 0
    return max(sieve, polygon_bytes(pixels) if run.polygons and run.rasters else 0)


def points_need(run: ReadingRun, count: int) -> Need:
    """The memory of a point run.

    Args:
        run: the run.
        count: number of points.
    """
    files = footprint(run.stack, run.read)
    side = run.model.card.patch or 1
    # Three copies of each pixel: as read, gathered, and as rows. Patches keep only the medians of
    # one chunk.
    point_bytes = 3 * run.pixel_bytes if run.model.card.modality == "pixel" else 0
    chunk = min(count, run.model.chunk) * side * side * 4 * 4 * len(run.stack.bands)
    cells = _cells_bytes(run.stack, files, run.pixel_bytes)
    arrays = cells + count * (point_bytes + 2 * run.prediction_bytes) + chunk
    return Need(
        files=files,
        arrays=max(arrays, sample_bytes(run.stack, run.read)),
        what=f"{count} points of {len(run.read)} dates",
        remedy="Send fewer points at a time",
    )


def _cells_bytes(stack: Stack, files: Footprint, read: int) -> int:
    """The memory of the windows in which points are read, bytes."""
    all_pixels = stack.grid.width * stack.grid.height * read
    return (1 + files.layers) * min(CELL_BYTES, all_pixels)


def measuring_need(stack: Stack, window_bytes: int, *, points: int, fields: int) -> Need:
    """The memory of measuring the series of points or fields.

    Args:
        stack: the stack, all of whose dates are read.
        window_bytes: memory of one window.
        points: number of points.
        fields: number of polygons.
    """
    used = range(stack.observations)
    files = footprint(stack, used)
    read = len(used) * (4 * len(stack.bands_read) + 1)
    if fields:
        cells = _windows_bytes(stack, files, read=read, predicted=0, window_bytes=window_bytes)
        cells += AT_ONCE * COVERAGE_BYTES
    else:
        cells = _cells_bytes(stack, files, read)
    # Sums in float64, their means, and the numbers of the JSON document.
    place_bytes = 8 * read + _NUMBER_BYTES * len(used) * (len(stack.bands) + _FURTHER_NUMBERS)
    return Need(
        files=files,
        arrays=max(cells + (points + fields) * place_bytes, sample_bytes(stack, used)),
        what=f"series of {points + fields} places at {len(used)} dates",
        remedy="Send fewer places at a time",
    )


def series_need(
    model: LoadedModel,
    series: Sequence[SeriesInput],
    *,
    attribution: bool = False,
    as_json: bool = True,
) -> Need:
    """The memory of predicting for series of JSON.

    Args:
        model: the model.
        series: the series.
        attribution: whether the attribution of each date is requested.
        as_json: whether the predictions are returned as JSON; else they stay arrays.
    """
    dates = sum(len(one.dates) for one in series)
    days = len({day for one in series for day in one.dates})
    bands = max((len(one.bands) for one in series), default=0)
    # JSON holds each number as an object and as text; arrays hold it three times, once as the model
    # returns it.
    number_bytes = 2 * _NUMBER_BYTES if as_json else 3 * 4
    numbers = int(np.prod(model.width)) * len(series) + (dates if attribution else 0)
    return Need(
        arrays=2 * min(SERIES_BATCH_BYTES, min(model.chunk, len(series)) * days * (4 * bands + 1))
        + len(series) * _SERIES_BYTES
        + dates * (_DATE_BYTES + bands * _NUMBER_BYTES)
        + numbers * number_bytes,
        what=f"{len(series)} series of {dates} dates together, and their results,",
        remedy="Send fewer series at a time",
    )


def labelling_need(count: int) -> Need:
    """The memory of finding the pixels that points and polygons label.

    Args:
        count: number of labels.
    """
    return Need(
        arrays=COVERAGE_BYTES + count * MOST_OF_A_POLYGON * _POSITION_BYTES,
        what=f"pixels of {count} labels",
        remedy="Send fewer labels at a time",
    )


def fit_need(arrays: int, *, labels: int, classes: int) -> Need:
    """The memory of fitting own classes to labels.

    Args:
        arrays: memory of the fit, bytes: `fit_bytes`, which imports onnx.
        labels: number of labelled pixels.
        classes: number of classes.
    """
    return Need(
        arrays=arrays,
        what=f"the fit of {classes} classes to {labels} labelled pixels",
        remedy="Label fewer pixels",
    )


def fields_need(run: ReadingRun, window_bytes: int, count: int) -> Need:
    """The memory of a field run.

    Args:
        run: the run.
        window_bytes: memory of one window.
        count: number of polygons.
    """
    raster = raster_need(run, window_bytes)
    # Sums in float64 of one window and of all windows, and the means; and the coverage of each
    # window that is being inferred.
    field_bytes = 4 * 2 * (run.pixel_bytes + run.prediction_bytes)
    # The numbers of the JSON document; of classes, the probabilities and the shares.
    numbers = run.prediction_bytes // 8 * (2 if run.model.card.classes else 1)
    field_bytes += _NUMBER_BYTES * (numbers + _FURTHER_NUMBERS)
    return Need(
        files=raster.files,
        arrays=raster.arrays + count * field_bytes + ThreadExecutor.workers * COVERAGE_BYTES,
        what=f"windows, sums and results of {count} polygons of {len(run.read)} dates",
        remedy="Send fewer polygons at a time",
    )

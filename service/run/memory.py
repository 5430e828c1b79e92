"""Memory budget: one for the process, from which runs take what they need before they read.

    plan → need, from headers → fits at all? → take → windows → give back
                                   │             │
                            RasterTooLarge    waits its turn, or is cancelled, or Overloaded

A run takes all that it needs at once, and never more while it holds some, so that no two runs can
wait for each other. Of those that wait, the first that fits goes on: a run that needs much does not
keep out runs that need little.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from service.container import usable_memory
from service.errors import Overloaded, RasterTooLarge
from service.grid import Grid
from service.infer.model import LoadedModel
from service.infer.patches import PatchGrid
from service.read.radiometry import sample_bytes
from service.read.reader import CELL_BYTES, Footprint, footprint
from service.read.stack import Stack
from service.run.executors import check
from service.run.windows import AT_ONCE, COVERAGE_BYTES, OVER, WINDOW_BYTES
from service.write.cog import finishing_bytes
from service.write.polygons import polygon_bytes
from service.write.predictions import Predictions
from service.write.sieve import sieve_bytes

_SHARE = 2
"""The budget is the memory of the container divided by this: models, bodies of requests, and what
inference takes beside its windows, need the rest."""
_PIECES = 32
"""A window takes at most this part of the budget."""
_LEAST = 64 * 2**20
"""Least budget, bytes."""
_NUMBER_BYTES = 64
"""Of a number of a JSON document, as an object and as text."""
_FURTHER_NUMBERS = 5
"""Of a measured date: three indices, the clear share and the date."""
_LOOK_SECONDS = 0.1
_RETRY_SECONDS = 10


@dataclass(frozen=True, kw_only=True)
class Need:
    """Memory that a run takes at once, bytes."""

    files: Footprint
    """What GDAL takes for the files."""
    arrays: int
    """Windows, samples, points and results."""
    what: str
    """The arrays, for messages."""
    remedy: str
    """What makes them smaller."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.files.total + self.arrays


def default_budget() -> int:
    """Bytes that runs may take: half of what the container, or else the machine, has."""
    return max(_LEAST, usable_memory() // _SHARE)


class MemoryBudget:
    """Memory for runs. Thread-safe.

    Args:
        limit: bytes that all runs together may take; None takes `default_budget`.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = default_budget() if limit is None else limit
        self._taken = 0
        self._waiting: list[_Ticket] = []  # in the order of arrival
        self._changed = threading.Condition()

    @property
    def taken(self) -> int:
        """Bytes taken at present."""
        return self._taken

    @property
    def awaited(self) -> int:
        """Number of runs that wait."""
        return len(self._waiting)

    @property
    def window_bytes(self) -> int:
        """Memory for one window of a run."""
        return min(WINDOW_BYTES, self.limit // _PIECES)

    def check(self, need: Need) -> None:
        """Reject what can never fit.

        Raises:
            RasterTooLarge: the need is over the whole budget.
        """
        if need.total <= self.limit:
            return
        heaviest = need.files.heaviest
        if need.files.total >= need.arrays:
            rows, columns = heaviest.block
            why = (
                f"one block of '{heaviest.source.name}', {rows} x {columns} pixels, decodes to "
                f"{heaviest.memory.block} bytes, and the table of its blocks takes "
                f"{heaviest.memory.blocks}; files and decoded blocks together take "
                f"{need.files.total}. Write the files in blocks of 256 or 512 pixels a side, as "
                "with gdal_translate -of COG"
            )
        else:
            why = f"{need.what} take {need.arrays} bytes. {need.remedy}"
        raise RasterTooLarge(
            f"the run needs {need.total} bytes of memory at once, the limit is {self.limit} "
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
        """Hold memory within the context; wait for it first if it is taken.

        Args:
            need: what to take; a run that holds some must not take more.
            cancelled: set to end the wait.
            patience: seconds to wait; None waits for as long as it takes.

        Raises:
            RasterTooLarge: the need is over the whole budget.
            Cancelled: `cancelled` was set.
            Overloaded: the memory was not free in time.
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
                            f"the run needs {size} bytes of memory, and of {self.limit} "
                            f"(PIMC_MEMORY_BUDGET) other runs hold {self._taken}; nothing was "
                            "predicted",
                            retry_after=_RETRY_SECONDS,
                        )
                    self._changed.wait(_LOOK_SECONDS)
                self._taken += size
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def _first_that_fits(self) -> _Ticket | None:
        free = self.limit - self._taken
        return next((one for one in self._waiting if one.size <= free), None)


class _Ticket:
    """A run that waits; equal to no other."""

    def __init__(self, size: int) -> None:
        self.size = size


class ReadingRun(Protocol):
    """A run over a stack, as far as its memory goes; `RasterRun` is one."""

    @property
    def model(self) -> LoadedModel: ...  # noqa: D102
    @property
    def stack(self) -> Stack: ...  # noqa: D102
    @property
    def used(self) -> tuple[int, ...]: ...  # noqa: D102
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
    """The memory of comparing a few places of the files with what they state."""
    return Need(
        files=footprint(stack, used),
        arrays=sample_bytes(stack, used),
        what=f"samples of {len(used)} dates",
        remedy="Send fewer dates",
    )


def _windows_bytes(
    stack: Stack, files: Footprint, *, read: int, predicted: int, window_bytes: int
) -> int:
    """The memory of the windows of a run.

    Args:
        stack: what is read.
        files: of it.
        read: bytes that one pixel takes as read.
        predicted: bytes that its prediction takes.
        window_bytes: memory for one window.
    """
    pixel = read + predicted
    whole = AT_ONCE * stack.grid.width * stack.grid.height * pixel
    windows = min(int(AT_ONCE * OVER * window_bytes), whole)
    # What is read at once beside a window itself, in proportion to it.
    return windows + windows // AT_ONCE * (files.raw + files.layers * read) // pixel


def raster_need(run: ReadingRun, window_bytes: int) -> Need:
    """The memory of predicting for a whole raster.

    Args:
        run: what to do.
        window_bytes: memory for one window.
    """
    files = footprint(run.stack, run.used)
    windows = _windows_bytes(
        run.stack,
        files,
        read=run.pixel_bytes,
        predicted=run.prediction_bytes,
        window_bytes=window_bytes,
    )
    arrays = max(windows, sample_bytes(run.stack, run.used), _finishing_bytes(run))
    arrays += _whole_map_bytes(run)
    return Need(
        files=files,
        arrays=arrays,
        what=f"windows of {len(run.used)} dates and {len(run.stack.bands_read)} bands",
        remedy="Send fewer dates",
    )


def _finishing_bytes(run: ReadingRun) -> int:
    if not run.rasters:
        return 0
    grid: Grid = run.patches.grid if run.model.card.modality == "patch" else run.stack.grid
    return max((finishing_bytes(layer, grid) for layer in run.predictions.layers), default=0)


def _whole_map_bytes(run: ReadingRun) -> int:
    """What takes a class map as a whole: the removal of small areas, and polygons."""
    grid: Grid = run.patches.grid if run.model.card.modality == "patch" else run.stack.grid
    pixels = grid.width * grid.height
    sieve = sieve_bytes(pixels) if run.min_area else 0
    return max(sieve, polygon_bytes(pixels) if run.polygons and run.rasters else 0)


def points_need(run: ReadingRun, count: int) -> Need:
    """The memory of predicting for points.

    Args:
        run: what to do.
        count: points.
    """
    files = footprint(run.stack, run.used)
    side = run.model.card.patch or 1
    # Pixels are gathered and turned into rows; of patches only the medians are kept, by chunks.
    of_one = 3 * run.pixel_bytes if run.model.card.modality == "pixel" else 0
    chunk = min(count, run.model.chunk) * side * side * 4 * 4 * len(run.stack.bands)
    cells = _cells_bytes(run.stack, files, run.pixel_bytes)
    arrays = cells + count * (of_one + 2 * run.prediction_bytes) + chunk
    return Need(
        files=files,
        arrays=max(arrays, sample_bytes(run.stack, run.used)),
        what=f"{count} points of {len(run.used)} dates",
        remedy="Send fewer points at a time",
    )


def _cells_bytes(stack: Stack, files: Footprint, read: int) -> int:
    """The memory of the windows in which points are read."""
    whole = stack.grid.width * stack.grid.height * read
    return (1 + files.layers) * min(CELL_BYTES, whole)


def measuring_need(stack: Stack, window_bytes: int, *, points: int, fields: int) -> Need:
    """The memory of measuring the series of places.

    Args:
        stack: what is read, all of its dates.
        window_bytes: memory for one window.
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
    # Sums in float64 and their means, and the numbers of the document.
    of_one = 8 * read + _NUMBER_BYTES * len(used) * (len(stack.bands) + _FURTHER_NUMBERS)
    return Need(
        files=files,
        arrays=max(cells + (points + fields) * of_one, sample_bytes(stack, used)),
        what=f"series of {points + fields} places at {len(used)} dates",
        remedy="Send fewer places at a time",
    )


def fields_need(run: ReadingRun, window_bytes: int, count: int) -> Need:
    """The memory of predicting for polygons.

    Args:
        run: what to do.
        window_bytes: memory for one window.
        count: polygons.
    """
    whole = raster_need(run, window_bytes)
    # Sums in float64, of a window and of all, and their means.
    of_one = 4 * 2 * (run.pixel_bytes + run.prediction_bytes)
    return Need(
        files=whole.files,
        arrays=whole.arrays + count * of_one + COVERAGE_BYTES,
        what=f"windows and sums of {count} polygons of {len(run.used)} dates",
        remedy="Send fewer polygons at a time",
    )

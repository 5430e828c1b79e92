"""Windows of a raster, and the interface of the journal of finished windows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from service.grid import Grid, Window

Arrays = Mapping[str, NDArray[Any]]
"""The stored arrays of a window, by name."""
WINDOW_BYTES = 32 * 2**20
"""Memory of one window's values, validity and predictions, bytes, if the memory budget allows.

Rasters of about 1000 x 1000 pixels and more have windows of this size, so that a larger raster does
not take more memory. With 64 MiB, 4096 x 4096 pixels of 12 dates took 633 MB, and 1024 x 1024
pixels took 413 MB.
"""
AT_ONCE = 6
"""Number of a run's windows in memory at once: read ahead, being inferred, waiting to be written.
"""
COVERED_CELLS = 2**19
"""Largest number of cells that the fields of one window cover, counted by their bounding boxes."""
COVERAGE_BYTES = 48 * COVERED_CELLS
"""Memory of the positions and shares of `COVERED_CELLS` cells, bytes."""
OVER = 1.25
"""Factor by which a window of one whole block may exceed its budget."""
_MIN_WINDOWS = 8
"""Smallest number of windows of a larger raster, so that the stages of a run overlap."""
_MIN_PIXELS = 4096
"""Size up to which a window is not divided, pixels: the overhead would exceed the gain."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One window of one pass of a run."""

    stage: str
    """The pass: `composite`, `patches`, `predictions`."""
    number: int
    """Number of the window in the order of the pass, from 0."""
    window: Window


class Journal(Protocol):
    """Stores the finished windows of a run. Called from one thread at a time."""

    def load(self, step: Step) -> Arrays | None:
        """The stored arrays of a step; None if the step is not stored."""
        ...

    def save(self, step: Step, arrays: Arrays) -> None:
        """Store a finished step durably: it survives a crash after this method returns."""
        ...


def windows(
    grid: Grid, block: tuple[int, int], pixel_bytes: int, budget: int = WINDOW_BYTES
) -> list[Window]:
    """Windows that cover each pixel of a raster once, in an order that reads each block once.

    Args:
        grid: the raster's grid.
        block: rows and columns of a block in the file.
        pixel_bytes: memory per pixel of a window, bytes.
        budget: largest memory of a window, bytes. A window of one pixel may exceed it, and a window
            of one whole block may exceed it by a quarter (`OVER`).

    Returns:
        Windows of whole blocks, or of parts of a block if one block exceeds the budget.
    """
    raster = Window(0, 0, grid.width, grid.height)
    rows, cols = min(block[0], grid.height), min(block[1], grid.width)
    most = max(1, budget // pixel_bytes)
    # A block slightly over the budget is not split, because its halves would each decode all of it.
    if rows * cols <= OVER * most:
        most = max(most, rows * cols)
    if rows * cols > most:
        part_cols = min(cols, most)
        part_rows = max(1, most // part_cols)
        return [
            part
            for whole_block in _divided(raster, rows, cols)
            for part in _divided(whole_block, part_rows, part_cols)
        ]
    if grid.height * grid.width <= min(most, _MIN_PIXELS):
        return [raster]  # otherwise a remainder of a few rows would become a separate window
    aim = min(most, max(_MIN_PIXELS, -(-grid.height * grid.width // _MIN_WINDOWS)))
    blocks = max(1, aim // (rows * cols))
    across = -(-grid.width // cols)
    if blocks < across:
        return list(_divided(raster, rows, blocks * cols))
    return list(_divided(raster, rows * (blocks // across), grid.width))


def _divided(area: Window, rows: int, cols: int) -> Iterator[Window]:
    for row in range(0, area.height, rows):
        for col in range(0, area.width, cols):
            yield Window(
                area.col_off + col,
                area.row_off + row,
                min(cols, area.width - col),
                min(rows, area.height - row),
            )

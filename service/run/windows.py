"""Windows of a raster, and the journal of finished ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from service.grid import Grid, Window

Arrays = Mapping[str, NDArray[Any]]
"""The stored arrays of a window, by name."""
WINDOW_BYTES = 32 * 2**20
"""Bytes of values, validity and predictions of one window, if the memory budget allows.

Rasters from about 1000 x 1000 pixels on have windows of this size, so that memory does not grow
with them: with 64 MiB, 4096 x 4096 pixels of 12 dates took 633 MB and 1024 x 1024 took 413 MB.
"""
AT_ONCE = 6
"""Windows of a run that exist at once: read ahead, at work, and waiting to be written."""
COVERED_CELLS = 2**19
"""Cells that the fields of one window may cover together, counted by their bounding boxes."""
COVERAGE_BYTES = 48 * COVERED_CELLS
"""Memory of those: positions and shares, as computed and as kept."""
OVER = 1.25
"""Factor by which a window of one whole block may exceed its budget."""
_SEVERAL = 8
"""Smallest number of windows of a larger raster, so that the stages overlap."""
_FEW_PIXELS = 4096
"""Smallest window worth splitting, pixels: below it the overhead exceeds the gain from overlap."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One window of one pass of a run."""

    stage: str
    """The pass: `composite`, `patches`, `predictions`."""
    number: int
    """Number of the window, from 0, in the pass's order."""
    window: Window


class Journal(Protocol):
    """Stores the finished windows of a run. Called from one thread at a time."""

    def load(self, step: Step) -> Arrays | None:
        """The stored arrays of a step; None if it is not stored."""
        ...

    def save(self, step: Step, arrays: Arrays) -> None:
        """Store a finished step; it is durable after the return."""
        ...


def windows(
    grid: Grid, block: tuple[int, int], pixel_bytes: int, budget: int = WINDOW_BYTES
) -> list[Window]:
    """Windows that cover a raster, each pixel once, in an order that reads each block once.

    Args:
        grid: the raster's grid.
        block: rows and columns of a block on disk.
        pixel_bytes: memory per pixel of a window.
        budget: largest memory of a window, bytes. A window always has one pixel, and may be one
            whole block that exceeds the budget by at most a quarter.

    Returns:
        Windows of whole blocks, or of parts of a block if one block exceeds the budget.
    """
    whole = Window(0, 0, grid.width, grid.height)
    rows, cols = min(block[0], grid.height), min(block[1], grid.width)
    most = max(1, budget // pixel_bytes)
    # A block slightly over the budget is not split, because its halves would each decode all of it.
    if rows * cols <= OVER * most:
        most = max(most, rows * cols)
    if rows * cols > most:
        part_cols = min(cols, most)
        part_rows = max(1, most // part_cols)
        return [
            part for one in _tiles(whole, rows, cols) for part in _tiles(one, part_rows, part_cols)
        ]
    if grid.height * grid.width <= min(most, _FEW_PIXELS):
        return [whole]  # otherwise a remainder of a few rows would be a window of its own
    aim = min(most, max(_FEW_PIXELS, -(-grid.height * grid.width // _SEVERAL)))
    blocks = max(1, aim // (rows * cols))
    across = -(-grid.width // cols)
    if blocks < across:
        return list(_tiles(whole, rows, blocks * cols))
    return list(_tiles(whole, rows * (blocks // across), grid.width))


def _tiles(area: Window, rows: int, cols: int) -> Iterator[Window]:
    for row in range(0, area.height, rows):
        for col in range(0, area.width, cols):
            yield Window(
                area.col_off + col,
                area.row_off + row,
                min(cols, area.width - col),
                min(rows, area.height - row),
            )

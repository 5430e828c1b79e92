"""Windows of a raster, and the journal that keeps finished ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from service.grid import Grid, Window

Arrays = Mapping[str, NDArray[Any]]
"""What is kept of a window, by name."""
WINDOW_BYTES = 32 * 2**20
"""Values, validity and answers of one window. Up to six windows are alive at once.

Rasters from about 1000 x 1000 pixels on have windows of this size, so that none takes more memory
than these: with 64 MiB, 4096 x 4096 pixels of 12 dates took 633 MB and 1024 x 1024 took 413 MB.
"""
_OVER = 1.25
"""How far over its budget a window of one whole block may be."""
_SEVERAL = 8
"""Windows that a larger raster is cut into at least, so that the stages overlap."""
_FEW_PIXELS = 4096
"""Below this a window costs more to handle than its overlap brings."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One window of one pass of a run."""

    stage: str
    """The pass: `composite`, `patches`, `predictions`."""
    number: int
    """Of the window, from 0, in the pass's order."""
    window: Window


class Journal(Protocol):
    """Keeps what a run has finished. Called from one thread at a time."""

    def load(self, step: Step) -> Arrays | None:
        """What was saved of a step; None where nothing was."""
        ...

    def save(self, step: Step, arrays: Arrays) -> None:
        """Keep a finished step; it is safe once this returns."""
        ...


def windows(
    grid: Grid, block: tuple[int, int], pixel_bytes: int, budget: int = WINDOW_BYTES
) -> list[Window]:
    """Windows that cover a raster, each pixel once, in an order that reads each block once.

    Args:
        grid: of the raster.
        block: rows and columns of a block on disk.
        pixel_bytes: memory that a pixel of a window takes.
        budget: bytes that a window may take; one pixel is always taken, and one whole block where
            it takes a quarter more at most.

    Returns:
        Windows made of whole blocks, or, where one block is over the budget, of parts of one.
    """
    whole = Window(0, 0, grid.width, grid.height)
    rows, cols = min(block[0], grid.height), min(block[1], grid.width)
    most = max(1, budget // pixel_bytes)
    # A block a little over the budget is taken whole: what is cut in two is decoded twice.
    if rows * cols <= _OVER * most:
        most = max(most, rows * cols)
    if rows * cols > most:
        part_cols = min(cols, most)
        part_rows = max(1, most // part_cols)
        return [
            part for one in _tiles(whole, rows, cols) for part in _tiles(one, part_rows, part_cols)
        ]
    if grid.height * grid.width <= min(most, _FEW_PIXELS):
        return [whole]  # else a rest of a few rows would be read and answered by itself
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

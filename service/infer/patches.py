"""Patches of imagery: positions, gap filling, overlap averaging, cloud-free composites.

Patches start at multiples of the stride. Cell k of the result covers the stride x stride pixels in
the upper left corner of patch k. The patches k - reach to k contain the whole cell.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from affine import Affine
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from models.formulas import median_of_dates
from service.errors import InvalidRequest
from service.grid import Grid, Window

Floats = NDArray[np.float32]
CLEAR_SHARE = 0.5
"""A patch with a smaller share of clear pixels has no prediction."""


@dataclass(frozen=True, kw_only=True)
class PatchGrid:
    """Positions of patches, and the coarser grid of their predictions."""

    grid: Grid
    """Grid of the predictions: one cell per patch, from the imagery's corner."""
    side: int
    """Side of a patch in pixels (P)."""
    stride: int
    """Pixels between two patches, and the side of a cell."""

    @classmethod
    def over(cls, imagery: Grid, *, side: int, stride: int) -> PatchGrid:
        """The patches that are entirely inside the imagery.

        Args:
            imagery: grid of the imagery.
            side: side of a patch in pixels.
            stride: pixels between two patches, 1 to `side`.

        Raises:
            InvalidRequest: the stride is out of range, or the imagery is smaller than a patch.
        """
        if not 1 <= stride <= side:
            raise InvalidRequest.of(
                "stride", f"{stride} is not a number of pixels from 1 to {side}, the patch's side"
            )
        if imagery.width < side or imagery.height < side:
            raise InvalidRequest.of(
                "files",
                f"the raster has {imagery.width} x {imagery.height} pixels, and the model needs at "
                f"least one patch of {side} x {side}: send a larger raster",
            )
        cells = Grid(
            crs=imagery.crs,
            transform=imagery.transform @ Affine.scale(stride),
            width=(imagery.width - side) // stride + 1,
            height=(imagery.height - side) // stride + 1,
        )
        return cls(grid=cells, side=side, stride=stride)

    @property
    def reach(self) -> int:
        """Number of preceding patches, along each axis, that contain a whole cell."""
        return (self.side - self.stride) // self.stride

    def pixels(self, cells: Window) -> Window:
        """The pixels that the patches of a window of cells cover."""
        return Window(
            cells.col_off * self.stride,
            cells.row_off * self.stride,
            (cells.width - 1) * self.stride + self.side,
            (cells.height - 1) * self.stride + self.side,
        )

    def behind(self, cells: Window) -> Window:
        """A window of cells, extended by the preceding cells whose patches reach into it."""
        left, above = min(self.reach, cells.col_off), min(self.reach, cells.row_off)
        return Window(
            cells.col_off - left, cells.row_off - above, cells.width + left, cells.height + above
        )

    def cut(self, imagery: Floats) -> Floats:
        """A view (h, w, C, P, P) of the patches of imagery (C, H, W), reflectance in float32.

        A copy of overlapping patches would take up to 4,096 times the imagery's memory.
        """
        views = sliding_window_view(imagery, (self.side, self.side), axis=(1, 2))
        patches: Floats = views[:, :: self.stride, :: self.stride].transpose(1, 2, 0, 3, 4)
        return patches

    def centred(self, imagery: Grid, row: int, column: int) -> Window:
        """The window of the patch centred on a pixel, shifted to be inside the imagery."""
        top = min(max(row - self.side // 2, 0), imagery.height - self.side)
        left = min(max(column - self.side // 2, 0), imagery.width - self.side)
        return Window(left, top, self.side, self.side)


def fill_gaps(patches: Floats) -> tuple[NDArray[np.bool_], Floats]:
    """Patches that are clear enough for a prediction, with their gaps filled.

    Args:
        patches: reflectance (N, C, P, P) float32, unitless, NaN where not clear.

    Returns:
        True for each patch (N) in which at least half of the pixels are clear; and these n patches
        (n, C, P, P), each missing pixel filled with the patch's median of the band.
    """
    missing: NDArray[np.bool_] = np.asarray(np.isnan(patches).any(axis=1))
    clear = missing.mean(axis=(1, 2)) <= 1 - CLEAR_SHARE
    filled, gaps = patches[clear], missing[clear]
    for patch, gap in zip(filled, gaps, strict=True):
        if gap.any():
            patch[:, gap] = np.median(patch[:, ~gap], axis=1)[:, None]
    return clear, filled


def box_mean(values: Floats, size: int) -> Floats:
    """The mean over the box whose last cell is each cell, without NaN.

    Args:
        values: (K, h, w) float32, NaN in all K where missing.
        size: rows and columns of the box, clipped at the first row and column.

    Returns:
        Means (K, h, w) float32, NaN where all values of the box are missing.
    """
    present = ~np.isnan(values[:1])
    # float64, because rounding errors of float32 sums would depend on where a window begins.
    sums = _box_sum(np.where(present, values, 0.0).astype(np.float64), size)
    counts = _box_sum(present.astype(np.float64), size)
    mean = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0.5)
    return np.asarray(mean, np.float32)


def _box_sum(values: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Sums over the box of `size` x `size` cells that ends at each cell of (K, h, w)."""
    for axis in (1, 2):
        total = np.cumsum(values, axis=axis)
        before = np.zeros_like(total)
        length = values.shape[axis]
        if size < length:
            kept = np.take(total, np.arange(length - size), axis=axis)
            where = [slice(None)] * 3
            where[axis] = slice(size, None)
            before[tuple(where)] = kept
        values = total - before
    return values


def median_composite(values: Floats, valid: NDArray[np.bool_]) -> Floats:
    """The per-pixel median of the clear observations, NaN where none is clear.

    Args:
        values: reflectance (T, C, h, w) float32, unitless.
        valid: True where an observation exists and is clear (T, h, w).

    Returns:
        Reflectance (C, h, w) float32, unitless.
    """
    return median_of_dates(values, valid[:, None])

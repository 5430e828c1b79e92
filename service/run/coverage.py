"""Coverage: the pixels of a raster that polygons cover, and the share of each.

    polygons → pixel coordinates → windows that hold some → share of each cell → sums by polygon

The memory of the shares is bounded by window, and their number by request, so that neither polygons
that overlap nor large ones take more than a request may.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import shapely
from exactextract import exact_extract
from exactextract.raster import NumPyRasterSource
from numpy.typing import NDArray

from service.errors import TooManyFields
from service.grid import Grid, Window
from service.read.stack import Sits
from service.read.vectors import POLYGON_TYPES, Fields
from service.run import windows as windowing

MOST_CELLS = 2**33
"""Largest number of cells that the polygons of a request cover, counted by their bounding boxes."""
_TIMES = 10
"""A polygon wider or higher than this many times the raster is cut around it."""
_CELLS_AT_ONCE = 2**16
"""Number of cells of fields whose series are gathered at once, which bounds the memory."""


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Coverage of a window: one entry for each field and cell of which the field covers a part.

    Entries are sorted by field.
    """

    fields: NDArray[np.intp]
    """Numbers (n) of the fields that cover a cell, ascending."""
    starts: NDArray[np.intp]
    """Position (n) of the first entry of each of these fields."""
    cells: NDArray[np.intp]
    """Position (E) of each entry's cell in the flattened window."""
    share: NDArray[np.float64]
    """Share (E) of each entry's cell that the field covers, 0 to 1."""

    def sums(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Sums by field (n, …) of values by entry (E, …)."""
        if not len(self.fields):
            return np.zeros((0, *values.shape[1:]))
        return np.asarray(np.add.reduceat(values, self.starts, axis=0, dtype=np.float64))


class FieldGrid:
    """Fields on a raster's grid: the windows that contain them, and the covered shares of pixels.

    Args:
        fields: the polygons.
        grid: the raster's grid.
    """

    def __init__(self, fields: Fields, grid: Grid) -> None:
        self._shapes = np.full(len(fields), None, np.object_)
        self.usable = np.array([shape is not None for shape in fields.shapes], np.bool_)
        """Whether each field (N) has a shape, wherever it lies."""
        if fields.crs.is_geographic:
            fields = replace(fields, shapes=_turned(fields.shapes, grid))
        in_crs = _turned(_near(fields, grid), grid)
        known = np.array([shape is not None for shape in in_crs], np.bool_)
        to_pixels = ~grid.transform

        def to_grid(points: NDArray[np.float64]) -> NDArray[np.float64]:
            columns, rows = to_pixels @ (points[:, 0], points[:, 1])
            # The y axis of exactextract points up.
            return np.stack([columns, -rows], axis=1)

        if known.any():
            self._shapes[known] = shapely.transform(in_crs[known], to_grid)
        self._tree = shapely.STRtree(self._shapes)
        self._bounds = shapely.bounds(self._shapes)

    def middles(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Row and column of the middle of each field (N); NaN for one that is not on the grid."""
        left, bottom, right, top = self._bounds.T
        return -(bottom + top) / 2 - 0.5, (left + right) / 2 - 0.5

    def parts(
        self, windows: Iterable[Window], before_each: Callable[[], None] = lambda: None
    ) -> list[Window]:
        """The windows that contain a part of a field, in order.

        A window in which fields together cover more than `COVERED_CELLS` cells is divided: the
        entries of overlapping fields, such as one field sent 10,000 times, would take too much
        memory.

        Args:
            windows: windows of the grid.
            before_each: called before each window; an exception that it raises ends the search.
        """
        found = []
        for window in windows:
            before_each()
            numbers = self.within(window)
            if not len(numbers):
                continue
            if (
                window.width * window.height == 1
                or self.cells(window, numbers) <= windowing.COVERED_CELLS
            ):
                found.append(window)
            else:
                found += self.parts(_halves(window), before_each)
        return found

    def cells(self, window: Window, numbers: NDArray[np.intp] | None = None) -> int:
        """Number of cells of the fields' bounding boxes in a window, an upper limit of theirs.

        Args:
            window: a window of the grid.
            numbers: positions of the fields; None takes all that intersect the window.
        """
        if numbers is None:
            numbers = self.within(window)
        (top, bottom), (left, right) = window.toranges()
        west, south, east, north = self._bounds[numbers].T
        across = np.ceil(np.minimum(east, right)) - np.floor(np.maximum(west, left))
        down = np.ceil(np.minimum(-south, bottom)) - np.floor(np.maximum(-north, top))
        return int((np.maximum(across, 0) * np.maximum(down, 0)).sum())

    def within(self, window: Window) -> NDArray[np.intp]:
        """Numbers of the fields whose bounding box intersects a window, ascending."""
        (top, bottom), (left, right) = window.toranges()
        return np.sort(self._tree.query(shapely.box(left, -bottom, right, -top)))

    def coverage(self, window: Window) -> Coverage:
        """The share of each cell of a window that each field covers.

        The shares are exact for every affine grid, because exactextract computes them in pixel
        coordinates.
        """
        (top, bottom), (left, right) = window.toranges()
        numbers = self.within(window)
        # Only the shares are used, so all cells may have the same byte as their value.
        cells = np.broadcast_to(np.zeros((), np.uint8), (bottom - top, right - left))
        source = NumPyRasterSource(cells, left, -bottom, right, -top)
        features = [
            {
                "type": "Feature",
                "properties": {},
                "geometry": _geometry(self._shapes[number]),
            }
            for number in numbers
        ]
        found = exact_extract(source, features, ["cell_id", "coverage"]) if features else []
        parts = [one["properties"] for one in found]
        counts = np.array([len(part["cell_id"]) for part in parts], np.intp)
        some = counts > 0
        empty: NDArray[Any] = np.zeros(0)
        return Coverage(
            fields=numbers[some],
            starts=(np.cumsum(counts) - counts)[some],
            cells=np.concatenate([part["cell_id"] for part in parts] or [empty]).astype(np.intp),
            share=np.concatenate([part["coverage"] for part in parts] or [empty]).astype(float),
        )


def _near(fields: Fields, grid: Grid) -> NDArray[np.object_]:
    """The shapes (N) in a raster's CRS; None for one that is far from the raster.

    A polygon that is much larger than the raster is cut to the surroundings of the raster: the
    whole polygon, such as a box around the world, may have no projection, or a wrong shape.
    """
    shapes = fields.in_crs(grid.crs)
    around = grid.around(fields.crs)
    if around is None:
        return shapes
    west, south, east, north = around
    bounds = shapely.bounds(fields.shapes)
    with np.errstate(invalid="ignore"):  # bounds of a field without a shape
        size = bounds[:, 2:] - bounds[:, :2]
        large = (size > _TIMES * np.array([east - west, north - south])).any(axis=1)
    unknown = np.array([shape is None for shape in shapes], np.bool_)
    chosen = np.flatnonzero(~np.isnan(bounds[:, 0]) & (large | unknown))
    if len(chosen):
        cut = shapely.intersection(fields.shapes[chosen], shapely.box(*around))
        cut[~np.isin(shapely.get_type_id(cut), POLYGON_TYPES) | shapely.is_empty(cut)] = None
        shapes = shapes.copy()
        shapes[chosen] = replace(fields.part(chosen), shapes=cut).in_crs(grid.crs)
    return shapes


def _turned(shapes: NDArray[np.object_], grid: Grid) -> NDArray[np.object_]:
    """The shapes (N) with the longitudes of a raster in degrees that crosses the antimeridian.

    GeoJSON cuts a polygon there, and its longitudes are those from -180 to 180.
    """
    beyond = grid.beyond_antimeridian
    if beyond is None:
        return shapes
    west, east = beyond
    found = shapes.copy()
    for number, shape in enumerate(shapes):
        parts = shapely.get_parts(shape)
        bounds = shapely.bounds(parts)
        turn = 360.0 * ((bounds[:, 2] <= west) * 1 - (bounds[:, 0] >= east) * 1)
        if turn.any():
            moved = [
                shapely.transform(part, lambda at, by=by: at + np.array([by, 0]))
                for part, by in zip(parts, turn, strict=True)
            ]
            found[number] = shapely.multipolygons(moved)
    return found


def check_coverage(fields: Fields, grid: Grid) -> None:
    """Check that polygons do not cover the raster too many times over.

    Args:
        fields: polygons, and points.
        grid: the raster's grid.

    Raises:
        TooManyFields: the polygons cover too many cells.
    """
    cells = FieldGrid(fields, grid).cells(Window(0, 0, grid.width, grid.height))
    if cells > MOST_CELLS:
        raise TooManyFields(
            f"the {len(fields)} polygons cover {cells} pixels together, by their bounding boxes, "
            f"and at most {MOST_CELLS} are allowed; the raster has {grid.width * grid.height}: "
            "send polygons that overlap in several requests"
        )


def _halves(window: Window) -> tuple[Window, Window]:
    """The two halves of a window of several pixels, divided across its longer side."""
    left, top, width, height = window.col_off, window.row_off, window.width, window.height
    if width >= height:
        half = width // 2
        return Window(left, top, half, height), Window(left + half, top, width - half, height)
    half = height // 2
    return Window(left, top, width, half), Window(left, top + half, width, height - half)


def _geometry(shape: Any) -> dict[str, Any]:  # noqa: ANN401 - shapely has no types
    return dict(shapely.geometry.mapping(shape))


def series_sums(covered: Coverage, sits: Sits) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The sums that a window adds to the mean series of its fields.

    Args:
        covered: the cells of the window that fields cover.
        sits: the window's series.

    Returns:
        Clear pixels by field and date (n, T) float64, as sums of covered shares; and the sums of
        their reflectance (n, T, C) float64, weighted by these shares.
    """
    T, C, h, w = sits.values.shape
    values, valid = sits.values.reshape(T, C, h * w), sits.valid.reshape(T, h * w)
    clear, total = [], []
    for part, cells, share in pieces(covered):
        weight = np.where(valid[:, cells], share, 0.0)
        clear.append(part.sums(weight.T))
        # Invalid pixels may be NaN, whose product with the weight 0 is NaN.
        known = np.where(valid[:, None, cells], values[:, :, cells], 0.0)
        total.append(part.sums((known * weight[:, None]).transpose(2, 0, 1)))
    return (
        np.concatenate(clear or [np.zeros((0, T))]),
        np.concatenate(total or [np.zeros((0, T, C))]),
    )


def pieces(
    covered: Coverage,
) -> Iterator[tuple[Coverage, NDArray[np.intp], NDArray[np.float64]]]:
    """A coverage divided into parts of whole fields, each of about `_CELLS_AT_ONCE` entries."""
    ends = np.append(covered.starts[1:], len(covered.cells))
    begin = 0
    while begin < len(covered.fields):
        first = int(covered.starts[begin])
        stop = max(begin + 1, int(np.searchsorted(ends, first + _CELLS_AT_ONCE, side="right")))
        last = int(ends[stop - 1])
        part = Coverage(
            fields=covered.fields[begin:stop],
            starts=covered.starts[begin:stop] - first,
            cells=covered.cells[first:last],
            share=covered.share[first:last],
        )
        yield part, part.cells, part.share
        begin = stop

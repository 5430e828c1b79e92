"""Labelled pixels: the pixels of a raster that the points and polygons of a request label.

    points → the pixel of each
    polygons → parts of the raster → covered shares → up to 16 pixels of each

The covered shares are computed by part of the raster, so that their memory does not grow with the
polygons. Two passes: the first finds how many pixels each polygon labels, the second chooses some.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import shapely
from numpy.typing import NDArray

from service.grid import Grid, Window
from service.read.vectors import Fields
from service.run.coverage import FieldGrid

Pixels = tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]
"""Row (n) and column (n) of each labelled pixel, and the position (n) of its label."""
MOST_OF_A_POLYGON = 16
"""Largest number of pixels that one polygon labels; the pixels of a field hardly differ."""
_HALF = 0.5
"""Share of a pixel that a polygon must cover to label it."""


def label_pixels(
    labels: Fields, grid: Grid, before_part: Callable[[], None] = lambda: None
) -> Pixels:
    """The pixels of a raster that points and polygons label.

    Args:
        labels: points and polygons. A point labels the pixel in which it lies. A polygon labels the
            pixels of which it covers at least half or, if there are none, those of which it covers
            most; at most 16 of these, evenly spread.
        grid: grid of the raster.
        before_part: called before each part of the raster; an exception that it raises ends the
            search.

    Returns:
        The labelled pixels in the order of the labels.
    """
    shapes = labels.in_crs(grid.crs)
    kinds = shapely.get_type_id(shapes)
    points = np.flatnonzero(np.isin(kinds, [shapely.GeometryType.POINT,
                                            shapely.GeometryType.MULTIPOINT]))  # fmt: skip
    places, owners = shapely.get_coordinates(shapes[points], return_index=True)
    rows, columns, inside = grid.pixels_at(places[:, 0], places[:, 1])
    polygons = np.flatnonzero((kinds >= 0) & ~np.isin(np.arange(len(kinds)), points))
    row, column, which = _in_polygons(labels.part(polygons), grid, before_part)
    labelled = np.concatenate([points[owners[inside]], polygons[which]])
    order = np.argsort(labelled, kind="stable")
    return (
        np.concatenate([rows[inside], row])[order],
        np.concatenate([columns[inside], column])[order],
        labelled[order],
    )


def _in_polygons(polygons: Fields, grid: Grid, before_part: Callable[[], None]) -> Pixels:
    """The pixels that each polygon labels, in the order of the parts of the raster."""
    on_grid = FieldGrid(polygons, grid)
    parts = on_grid.parts([Window(0, 0, grid.width, grid.height)], before_part)

    def covered() -> Iterator[tuple[Window, int, NDArray[np.intp], NDArray[np.float64]]]:
        for part in parts:
            before_part()
            coverage = on_grid.coverage(part)
            ends = np.append(coverage.starts, len(coverage.cells))[1:]
            for number, begin, end in zip(coverage.fields, coverage.starts, ends, strict=True):
                yield part, int(number), coverage.cells[begin:end], coverage.share[begin:end]

    least = np.zeros(len(polygons))  # share from which a polygon labels a pixel
    count = np.zeros(len(polygons), np.intp)
    for _, number, _, share in covered():
        own = min(_HALF, float(share.max()))
        if own > least[number]:
            least[number], count[number] = own, 0
        count[number] += int((share >= least[number]).sum())
    found: list[Pixels] = []
    seen = np.zeros(len(polygons), np.intp)
    for part, number, cells, share in covered():
        labelled = np.sort(cells[share >= least[number]])
        total = int(count[number])
        spread = np.linspace(0, total - 1, min(total, MOST_OF_A_POLYGON)).round().astype(np.intp)
        spread -= seen[number]
        chosen = labelled[spread[(spread >= 0) & (spread < len(labelled))]]
        seen[number] += len(labelled)
        found.append(
            (
                part.row_off + chosen // part.width,
                part.col_off + chosen % part.width,
                np.full(len(chosen), number, np.intp),
            )
        )
    if not found:
        return (np.zeros(0, np.intp),) * 3
    row, column, which = (np.concatenate(some) for some in zip(*found, strict=True))
    return row, column, which

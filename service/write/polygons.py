"""Polygons of a class map: one per connected area, with exactly shared edges, as GeoParquet.

    class map → areas → outlines on pixel corners → nodes where areas meet → polygons in the CRS

Outlines follow the pixel edges of the whole map and do not depend on windows. Where three areas
meet, the polygon of each has a vertex. Neighbouring polygons therefore have the same vertices on
their shared edge, and still share it after a projection to degrees.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import rasterio
import rasterio.features
import shapely
from numpy.typing import NDArray
from rasterio.crs import CRS

from models.card import LegendClass
from service.errors import InvalidRequest
from service.grid import Grid, Window, transformed
from service.write.predictions import NO_CLASS
from service.write.sieve import areas_of, labelling_bytes

MAX_POLYGONS = 500_000
"""Largest number of polygons of one result, which are all in memory while they are written."""
_POLYGON_BYTES = 1500
_DEGREES = CRS.from_epsg(4326)
_ROWS = 256
_FEATURES = 1000
"""Number of polygons that are in memory as GeoJSON at once."""


def polygon_bytes(pixels: int) -> int:
    """Upper limit of the memory of `write_polygons` for a map of `pixels` pixels, bytes."""
    return labelling_bytes(pixels) + _POLYGON_BYTES * min(pixels, MAX_POLYGONS)


def write_polygons(
    raster: Path,
    grid: Grid,
    legend: Sequence[LegendClass],
    path: Path,
    before_each: Callable[[], None] = lambda: None,
) -> Path:
    """Write the areas of a finished class map as GeoParquet 1.1 in the map's CRS.

    The columns are `id` (from 1, in the order of the areas' first pixels by rows), `class`,
    `value`, `pixels`, `hectares` and `geometry`.

    Args:
        raster: file of the class map (uint8, 255 for no class).
        grid: grid of the map.
        legend: classes of the map.
        path: the file to write.
        before_each: called before each outline; an exception that it raises ends the work.

    Returns:
        The path.

    Raises:
        InvalidRequest: the map has more than `MAX_POLYGONS` areas.
    """
    with rasterio.open(raster) as file:
        classes = np.asarray(file.read(1))
    labels, count = areas_of(classes)
    value = np.empty(count, np.uint8)
    pixels, hectares = np.zeros(count), np.zeros(count)
    for top in range(0, grid.height, _ROWS):
        rows = slice(top, top + _ROWS)
        own = labels[rows].ravel()
        window = Window(0, top, grid.width, len(labels[rows]))
        value[own] = classes[rows].ravel()
        pixels += np.bincount(own, minlength=count)
        hectares += np.bincount(own, grid.hectares(window).ravel(), minlength=count)
    shown = np.flatnonzero(value != NO_CLASS)
    if len(shown) > MAX_POLYGONS:
        raise InvalidRequest.of(
            "outputs",
            f"the map has {len(shown)} connected areas, and `polygons` writes at most "
            f"{MAX_POLYGONS}: set `min_area` or `smooth`, or request a part of the raster (`bbox`)",
        )
    outlines = _outlines(labels, classes != NO_CLASS, grid, before_each)
    names = {c.value: c.name for c in legend}
    table = pa.table(
        {
            "id": pa.array(range(1, len(shown) + 1), pa.int64()),
            "class": pa.array([names[int(value[area])] for area in shown], pa.string()),
            "value": pa.array(value[shown].astype(np.int64)),
            "pixels": pa.array(pixels[shown].astype(np.int64)),
            "hectares": pa.array(hectares[shown]),
            "geometry": pa.array(shapely.to_wkb([outlines[int(area)] for area in shown])),
        }
    )
    crs = None if grid.crs == _DEGREES else grid.crs.to_dict(projjson=True)
    column: dict[str, Any] = {"encoding": "WKB", "geometry_types": ["MultiPolygon", "Polygon"]}
    if crs is not None:
        column["crs"] = crs
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
    stored = table.replace_schema_metadata({"geo": json.dumps(geo)})
    pyarrow.parquet.write_table(stored, path, compression="zstd")
    return path


def polygon_features(path: Path, crs: CRS) -> Iterator[dict[str, Any]]:
    """The rows of a file of `write_polygons` as GeoJSON features, in degrees (EPSG:4326).

    They are made in small batches: all at once, each would take some kilobytes of memory.

    Args:
        path: the file.
        crs: CRS of its polygons.
    """

    def project(places: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack(transformed(crs, _DEGREES, places[:, 0], places[:, 1]), axis=1)

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(_FEATURES):
            rows = batch.to_pylist()
            shapes = np.asarray(shapely.from_wkb([row.pop("geometry") for row in rows]), np.object_)
            if crs != _DEGREES:
                shapes = shapely.transform(shapes, project)
            for row, shape in zip(rows, shapes, strict=True):
                geometry = json.loads(shapely.to_geojson(shape))
                yield {
                    "type": "Feature",
                    "id": row.pop("id"),
                    "geometry": geometry,
                    "properties": row,
                }


def _outlines(
    labels: NDArray[np.int32],
    shown: NDArray[np.bool_],
    grid: Grid,
    before_each: Callable[[], None],
) -> Mapping[int, Any]:
    """The polygon of each area by its number, in the grid's CRS."""
    nodes = _nodes(labels)
    a, b, c, d, e, f = grid.transform[:6]

    def ring(corners: Sequence[tuple[float, float]]) -> NDArray[np.float64]:
        column, row = _with_nodes(np.asarray(corners, np.int64), nodes).T
        return np.stack([a * column + b * row + c, d * column + e * row + f], axis=1)

    found: dict[int, Any] = {}
    for geometry, area in rasterio.features.shapes(labels, mask=shown, connectivity=4):
        before_each()
        shell, *holes = (ring(corners) for corners in geometry["coordinates"])
        found[int(area)] = shapely.Polygon(shell, holes)
    numbers = list(found)
    shapes = np.array([found[number] for number in numbers], np.object_)
    # A ring that touches itself at a corner is not a valid shell; it is one with a hole.
    for at in np.flatnonzero(~shapely.is_valid(shapes)).tolist():
        before_each()
        found[numbers[at]] = shapely.make_valid(shapes[at])
    return found


def _nodes(labels: NDArray[np.int32]) -> NDArray[np.bool_]:
    """True for the pixel corners (H + 1, W + 1) at which three or four edges of areas meet."""
    height, width = labels.shape
    nodes = np.zeros((height + 1, width + 1), np.bool_)
    for top in range(0, height + 1, _ROWS):
        end = min(top + _ROWS, height + 1)
        # The rows of pixels above and below these corners; -1 outside the map.
        rows = labels[max(0, top - 1) : min(end, height)]
        ends = (int(top == 0), int(end == height + 1))
        around = np.pad(rows, (ends, (1, 1)), constant_values=-1)
        nw, ne, sw, se = around[:-1, :-1], around[:-1, 1:], around[1:, :-1], around[1:, 1:]
        edges = (nw != ne).astype(np.uint8)
        edges += ne != se
        edges += se != sw
        edges += sw != nw
        nodes[top:end] = edges > 2
    return nodes


def _with_nodes(ring: NDArray[np.int64], nodes: NDArray[np.bool_]) -> NDArray[np.int64]:
    """A ring of pixel corners (n, 2), as column and row, with the nodes on its edges added."""
    step = np.diff(ring, axis=0)
    length = np.abs(step).sum(axis=1)
    start = np.repeat(ring[:-1], length, axis=0)
    first = np.cumsum(length) - length
    along = np.arange(length.sum()) - np.repeat(first, length)
    corners = start + np.repeat(np.sign(step), length, axis=0) * along[:, None]
    kept = (along == 0) | nodes[corners[:, 1], corners[:, 0]]
    return np.concatenate([corners[kept], ring[-1:]])

"""Warping: a file seen on the grid of its stack, by GDAL's warper.

Reflectance is interpolated bilinearly over valid pixels alone; classes and bits take the nearest
pixel. Every window is the same part of the whole: the transform is exact, and the reach of the
kernel is one number for all windows.
"""

from __future__ import annotations

import rasterio
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT

from service.read.placement import Warp
from service.read.stack import Plane

_TOLERANCE = 1e-6
"""Pixels by which GDAL may interpolate coordinates; rasterio 1.4 fails on 0, which means exactly.
It is so small that no window differs from the whole."""
WARP_BYTES = 64 * 2**20
"""Memory that GDAL takes for one piece of a warp."""


def has_alpha(plane: Plane) -> bool:
    """Whether the warped file has an alpha band at its end that says where it has pixels.

    A quality band may mean something by each of its numbers, zero included, and an internal mask
    is not a number.
    """
    return plane.masked or plane.resampling == "nearest"


def fill_of(plane: Plane) -> int | float | None:
    """What a warped plane holds where the file has no pixel; None where alpha says so.

    Zero where the file names no nodata: integers of reflectance are never zero on land.
    """
    if has_alpha(plane):
        return None
    if plane.nodata is not None:
        return plane.nodata
    return 0 if plane.integer else float("nan")


def warped(source: rasterio.DatasetReader, plane: Plane, warp: Warp) -> WarpedVRT:
    """A file on the grid of its stack, in its own number type.

    Args:
        source: the file, open, with its georeference.
        plane: one of its bands that are read together.
        warp: where to.
    """
    grid = warp.grid
    fill = fill_of(plane)
    return WarpedVRT(
        source,
        crs=grid.crs,
        transform=grid.transform,
        width=grid.width,
        height=grid.height,
        resampling=Resampling[plane.resampling],
        src_nodata=fill,
        nodata=fill,
        add_alpha=fill is None,
        tolerance=_TOLERANCE,
        warp_mem_limit=WARP_BYTES // 2**20,
        XSCALE=warp.scale[0],
        YSCALE=warp.scale[1],
    )

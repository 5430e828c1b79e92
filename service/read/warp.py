"""Warping: a file on the grid of its stack, by GDAL's warper.

Reflectance is interpolated bilinearly, only over valid pixels; classes and bits take the nearest
pixel. The result does not depend on the windows: the transform is exact, and the reach of the
kernel is one number for all windows.
"""

from __future__ import annotations

import rasterio
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT

from service.read.placement import Warp
from service.read.stack import Plane

_TOLERANCE = 1e-6
"""Error in pixels that GDAL may make by interpolating coordinates. 0 would mean exact, but rasterio
1.4 fails on it. The error is so small that results do not depend on the windows."""
WARP_BYTES = 64 * 2**20
"""Memory that GDAL takes for one piece of a warp."""


def has_alpha(plane: Plane) -> bool:
    """Whether the warped file has an alpha band at its end, which marks its pixels.

    Every number of a quality band may have a meaning, including zero, and an internal mask is not a
    number.
    """
    return plane.masked or plane.resampling == "nearest"


def fill_of(plane: Plane) -> int | float | None:
    """Number of a warped plane where the file has no pixel; None if alpha marks it.

    Zero if the file has no nodata tag: integers of reflectance are never zero on land.
    """
    if has_alpha(plane):
        return None
    if plane.nodata is not None:
        return plane.nodata
    return 0 if plane.integer else float("nan")


def warped(source: rasterio.DatasetReader, plane: Plane, warp: Warp) -> WarpedVRT:
    """A file on the grid of its stack, in its own number type.

    Args:
        source: the open file, with its georeference.
        plane: one of the bands that are read together.
        warp: parameters of the warper.
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

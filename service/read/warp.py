"""Warping: resampling of a file to the grid of its stack, by GDAL's warper.

Reflectance is interpolated bilinearly over valid pixels; classes and bits take the nearest pixel.
The result does not depend on the division into windows, because the transform is exact and the size
of the kernel is the same for all windows.
"""

from __future__ import annotations

import rasterio
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT

from service.read.placement import Warp
from service.read.stack import Plane

_TOLERANCE = 1e-6
"""Largest error of GDAL's interpolation of coordinates, pixels. It is so small that results do not
depend on the windows. rasterio 1.4 fails on 0, which would request exact coordinates."""
WARP_BYTES = 64 * 2**20
"""Memory that GDAL takes for one piece of a warp, bytes."""


def has_alpha(plane: Plane) -> bool:
    """Whether the warped file has an alpha band at its end, which marks the file's own pixels.

    Quality bands and files with an internal mask need it: in a quality band every number may have a
    meaning, so none can mark missing pixels, and an internal mask is not a number.
    """
    return plane.masked or plane.resampling == "nearest"


def fill_of(plane: Plane) -> int | float | None:
    """The number that marks missing pixels of a warped plane; None if an alpha band marks them.

    Without a nodata tag it is NaN for floats and 0 for integers, because integers of reflectance
    are never 0 on land.
    """
    if has_alpha(plane):
        return None
    if plane.nodata is not None:
        return plane.nodata
    return 0 if plane.integer else float("nan")


def warped(source: rasterio.DatasetReader, plane: Plane, warp: Warp) -> WarpedVRT:
    """A file resampled to the grid of its stack, in its own number type.

    Args:
        source: the open file, with its georeference.
        plane: one of the bands that are read together.
        warp: parameters of the warper.

    Returns:
        A dataset that warps when it is read.
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

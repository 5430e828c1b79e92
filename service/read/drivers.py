"""GDAL drivers: all drivers that the service does not need are unregistered.

GDAL reads some 150 formats, and several of them can open other files or network addresses. The
service opens each file with one driver by name and needs no other. An unregistered driver cannot be
reached by a name inside a file either.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection

import rasterio

# Private: the extension that is linked with GDAL (rasterio 1.4 and 1.5).
from rasterio import _env

RASTERS = frozenset({"GTiff", "COG", "JP2OpenJPEG", "MEM", "Memory", "VRT"})
"""MEM rasterises polygons, Memory (a part of MEM from GDAL 3.11 on) outlines classes, and GDAL's
warper returns a VRT; no file is opened with these three."""
VECTORS = frozenset({"GPKG"})


def keep_needed_drivers() -> None:
    """Unregister every other driver of rasterio's GDAL, for the life of the process.

    pyogrio has a GDAL of its own and is imported when the first GeoPackage is read: see
    `keep_needed_vector_drivers`.
    """
    with rasterio.Env():  # registers all of them, once
        _unregister(_env.__file__, RASTERS)


def keep_needed_vector_drivers(extension: str) -> None:
    """Unregister the other drivers of pyogrio's GDAL, if `keep_needed_drivers` was called before.

    Args:
        extension: path of the extension module that is linked with pyogrio's GDAL.
    """
    with rasterio.Env() as env:
        if set(env.drivers()) <= RASTERS:
            _unregister(extension, VECTORS)


def _unregister(extension: str, needed: Collection[str]) -> None:
    # The lookup of a symbol includes the libraries with which the extension is linked.
    gdal = ctypes.CDLL(extension)
    gdal.GDALGetDriver.restype = ctypes.c_void_p
    gdal.GDALGetDriverShortName.argtypes = [ctypes.c_void_p]
    gdal.GDALGetDriverShortName.restype = ctypes.c_char_p
    gdal.GDALDeregisterDriver.argtypes = [ctypes.c_void_p]
    for number in reversed(range(gdal.GDALGetDriverCount())):
        driver = gdal.GDALGetDriver(number)
        if gdal.GDALGetDriverShortName(driver).decode() not in needed:
            gdal.GDALDeregisterDriver(driver)

"""Grids: CRS, transform and size of a raster, the area of its pixels, and places on it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import rasterio.warp
from affine import Affine
from numpy.typing import NDArray

# Private, as rasterio 1.4 and 1.5 have it: `warp.transform` and `shutil.copy` raise it, and
# `rasterio.errors` lacks it.
from rasterio._err import CPLE_BaseError as GDALError
from rasterio.crs import CRS
from rasterio.windows import Window

from service.errors import GridMismatch, NoGeoreference

__all__ = ["GDALError", "Grid", "Window", "crs_name"]

_TOLERANCE = 1e-3
"""Pixels by which a corner may lie elsewhere: writers round transforms differently."""
_WGS84 = (6378137.0, 298.257223563)
_ELLIPSOID = re.compile(r'(?:SPHEROID|ELLIPSOID)\["[^"]*",\s*([0-9.eE+]+),\s*([0-9.eE+]+)')
_COLUMNS_AVERAGED = 65


@dataclass(frozen=True, kw_only=True)
class Grid:
    """CRS, transform and size, the same for every file of a stack."""

    crs: CRS
    transform: Affine
    """From (column, row), counted from the upper left corner of the first pixel, to CRS units."""
    width: int
    height: int

    @classmethod
    def of(cls, name: str, *, crs: CRS | None, transform: Affine, width: int, height: int) -> Grid:
        """The grid that a file states.

        Args:
            name: the file's, for messages.
            crs: its CRS.
            transform: its transform; the identity where it states none.
            width: columns.
            height: rows.

        Raises:
            NoGeoreference: no CRS, no transform, or one whose pixels have no area.
        """
        if not crs:
            raise NoGeoreference(f"'{name}' has no CRS")
        if transform == Affine.identity():
            raise NoGeoreference(f"'{name}' has the CRS {crs_name(crs)} but no transform")
        if not (math.isfinite(transform.determinant) and transform.determinant):
            raise NoGeoreference(f"'{name}' has a transform whose pixels have no area")
        return cls(crs=crs, transform=transform, width=width, height=height)

    def locate(
        self, lonlat: Sequence[tuple[float, float]]
    ) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.bool_]]:
        """The pixel under each point.

        Args:
            lonlat: longitude and latitude in degrees (EPSG:4326) of N points.

        Returns:
            Row (N) and column (N), 0 for points outside; and which points (N) lie inside.
        """
        xs, ys = _projected(self.crs, lonlat)
        with np.errstate(invalid="ignore"):
            columns, rows = np.floor(~self.transform @ (xs, ys))
        # NaN, where the projection holds no such point, compares as outside.
        inside = (rows >= 0) & (rows < self.height) & (columns >= 0) & (columns < self.width)
        return (
            np.where(inside, rows, 0).astype(np.intp),
            np.where(inside, columns, 0).astype(np.intp),
            inside,
        )

    def hectares(self, rows: slice | range) -> NDArray[np.float64]:
        """Area of one pixel in each of the rows, in hectares, shape (rows,) float64.

        Projected: the transform's determinant, in metres. Geographic: exact on the ellipsoid
        (Snyder, Map Projections, USGS PP 1395, eq. 3-12), or, where a row is no parallel
        because the grid is rotated, the mean over the row of the area element.
        """
        if isinstance(rows, slice):
            rows = range(*rows.indices(self.height))
        row = np.asarray(rows, dtype=np.float64)
        unit = _unit(self.crs)
        if not self.crs.is_geographic:
            return np.full(row.shape, abs(self.transform.determinant) * unit**2 / 1e4)
        radius, e2 = _ellipsoid(self.crs)
        _, _, _, lat_by_column, lat_by_row, top = (unit * v for v in self.transform[:6])
        if lat_by_column == 0:
            edges = np.stack([top + lat_by_row * row, top + lat_by_row * (row + 1)])
            zones = _zone(np.clip(edges, -np.pi / 2, np.pi / 2), e2)
            width = abs(self.transform.a) * unit
            return np.asarray(radius**2 * width * np.abs(zones[1] - zones[0]) / 1e4)
        # The middles of equal stretches of the row.
        column = (np.arange(_COLUMNS_AVERAGED) + 0.5) * self.width / _COLUMNS_AVERAGED
        latitude = top + lat_by_row * (row[:, None] + 0.5) + lat_by_column * column
        element = (1 - e2) * np.cos(latitude) / (1 - e2 * np.sin(latitude) ** 2) ** 2
        extent = abs(self.transform.determinant) * unit**2
        return np.asarray(radius**2 * extent * element.mean(axis=1) / 1e4)

    def check_same(self, name: str, other: Grid, other_name: str) -> None:
        """Refuse another file's grid that is not this one.

        Raises:
            GridMismatch: it differs in size, CRS or transform; the message says both.
        """
        differs = f"'{other_name}' does not lie on the grid of '{name}'"
        if (self.width, self.height) != (other.width, other.height):
            raise GridMismatch(
                f"{differs}: {other.width} x {other.height} pixels, not "
                f"{self.width} x {self.height}"
            )
        if self.crs != other.crs and self.crs.to_wkt() != other.crs.to_wkt():
            raise GridMismatch(
                f"{differs}: its CRS is {crs_name(other.crs)}, not {crs_name(self.crs)}"
            )
        to_pixels = ~self.transform @ other.transform
        corners = [(0, 0), (self.width, 0), (0, self.height), (self.width, self.height)]
        away = max(math.dist(to_pixels @ corner, corner) for corner in corners)
        if away > _TOLERANCE:
            raise GridMismatch(
                f"{differs}: its transform is {_numbers(other.transform)}, not "
                f"{_numbers(self.transform)}, up to {away:.4g} pixels away"
            )


def _projected(
    crs: CRS, lonlat: Sequence[tuple[float, float]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """X and y of points in a CRS, NaN for those that it cannot hold."""
    try:
        xs, ys = rasterio.warp.transform(
            "EPSG:4326", crs, [p[0] for p in lonlat], [p[1] for p in lonlat]
        )
    except GDALError:
        # One point beyond the projection fails them all, so bisect.
        if len(lonlat) == 1:
            return np.array([np.nan]), np.array([np.nan])
        half = len(lonlat) // 2
        (ax, ay), (bx, by) = _projected(crs, lonlat[:half]), _projected(crs, lonlat[half:])
        return np.concatenate([ax, bx]), np.concatenate([ay, by])
    return np.asarray(xs, np.float64), np.asarray(ys, np.float64)


def crs_name(crs: CRS) -> str:
    """A CRS in few words: its EPSG code, else its PROJ parameters."""
    code = crs.to_epsg()
    if code:
        return f"EPSG:{code}"
    words = (f"+{key}={value}" for key, value in crs.to_dict().items())
    return " ".join(words) or crs.to_wkt()[:200]


def _numbers(transform: Affine) -> str:
    return f"({', '.join(f'{value:.10g}' for value in transform[:6])})"


def _unit(crs: CRS) -> float:
    """Metres or radians in one unit of a CRS."""
    _, factor = crs.units_factor
    return float(factor)


def _ellipsoid(crs: CRS) -> tuple[float, float]:
    """Semi-major axis in metres, and squared eccentricity."""
    found = _ELLIPSOID.search(crs.to_wkt())
    radius, inverse = (float(found[1]), float(found[2])) if found else _WGS84
    flattening = 1 / inverse if inverse else 0.0  # WKT writes a sphere as 0
    return radius, flattening * (2 - flattening)


def _zone(latitude: NDArray[np.float64], e2: float) -> NDArray[np.float64]:
    """Area from the equator to a latitude, for 1 radian of longitude and semi-major axis 1."""
    sine = np.sin(latitude)
    if e2 == 0:
        return np.asarray(sine)
    e = math.sqrt(e2)
    return np.asarray((1 - e2) / 2 * (sine / (1 - e2 * sine**2) + np.arctanh(e * sine) / e))

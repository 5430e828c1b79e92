"""Grids: CRS, transform and size of a raster, the area of its pixels, and the pixel of a point."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import rasterio.warp
from affine import Affine
from numpy.typing import ArrayLike, NDArray

# Private in rasterio 1.4 and 1.5: `warp.transform` and `shutil.copy` raise it, and
# `rasterio.errors` does not export it.
from rasterio._err import CPLE_BaseError as GDALError
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.windows import Window

from models.card import Box
from service.errors import GridMismatch, NoGeoreference

__all__ = [
    "CRSError",
    "GDALError",
    "Grid",
    "Window",
    "beyond",
    "crs_name",
    "crs_of",
    "kilometres",
    "transformed",
]

_TOLERANCE = 1e-3
"""Largest distance of corresponding corners, pixels: programs round transforms differently."""
_WGS84 = (6378137.0, 298.257223563)
_ELLIPSOID = re.compile(r'(?:SPHEROID|ELLIPSOID)\["[^"]*",\s*([0-9.eE+]+),\s*([0-9.eE+]+)')
_CRS_FORMS = re.compile(
    r"[A-Za-z][A-Za-z0-9_-]*:[A-Za-z0-9_.+-]+"  # EPSG:32631, OGC:CRS84, EPSG:32631+5773
    r"|urn:(ogc|x-ogc):def:crs:[A-Za-z0-9_.:-]+"
    r"|(WGS|NAD)[0-9]{2}"
    r"|\+proj=.*"
    r"|\{.*\}"  # PROJJSON
    r"|(PROJ|GEOG|GEOC|GEOD|PROJECTED|GEOGRAPHIC|GEODETIC|BOUND|COMPOUND)(_?CS|CRS)\s*[\[(].*",
    re.DOTALL | re.IGNORECASE,
)
_CRS_URL = re.compile(r"https?://www\.opengis\.net/def/crs/([A-Za-z]+)/[0-9.]+/([A-Za-z0-9]+)")
_CRS_FILES = re.compile(r"(grids|init|catalog)\s*=\s*(?!@null\b)|PARAMETERFILE", re.IGNORECASE)
"""Parts of a CRS that name a file, which PROJ opens."""
_CRS_LENGTH = 2**14
_DEGREES = CRS.from_epsg(4326)
_COLUMNS_AVERAGED = 65
_EQUAL_AREA = 0.005
"""Share by which a pixel's area on the ground may differ from that in the projection's plane."""
_TURN = 360.0
_NODES = 9
"""Number of points along each side of a grid at which the projection's areas are checked."""
_RADIUS_KM = 6371.0
"""Radius of a sphere with about the Earth's distances."""
_EDGE = np.linspace(0.0, 1.0, 17)
"""Positions along the sides of a box at which distances are measured, shares of a side."""
# Largest distance between points at which areas are computed. Linear interpolation between them has
# an error of at most 0.001 %.
_NODE_PIXELS = 64
_NODE_METRES = 20_000


def crs_of(text: str) -> CRS:
    """The CRS that a client's text states: a code of an authority, WKT, PROJJSON or a PROJ string.

    GDAL takes any other text for the name of a file or a URL, and reads it.

    Args:
        text: the text, such as `EPSG:32631`.

    Raises:
        CRSError: the text has another form, or states a CRS that is not known.
    """
    given = text.strip()
    url = _CRS_URL.fullmatch(given)
    if url:
        given = f"{url[1]}:{url[2]}"
    if len(given) > _CRS_LENGTH or not _CRS_FORMS.fullmatch(given) or _CRS_FILES.search(given):
        raise CRSError("the CRS is neither a code such as EPSG:32631, WKT, PROJJSON nor PROJ")
    return CRS.from_user_input(given)


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
        """The grid of a file, from its georeference.

        Args:
            name: name of the file, for messages.
            crs: CRS of the file; None if it has none.
            transform: transform of the file; the identity if it has none.
            width: number of columns.
            height: number of rows.

        Raises:
            NoGeoreference: the file has no CRS, no transform, or a transform whose pixels have no
                area.
        """
        if not crs:
            raise NoGeoreference(
                f"'{name}' has no CRS: assign one, as with gdal_translate -a_srs EPSG:32631"
            )
        if transform == Affine.identity():
            raise NoGeoreference(
                f"'{name}' has the CRS {crs_name(crs)} but no transform: assign one, as with "
                "gdal_translate -a_ullr"
            )
        if not (math.isfinite(transform.determinant) and transform.determinant):
            raise NoGeoreference(
                f"'{name}' has a transform whose pixels have no area: assign another, as with "
                "gdal_translate -a_ullr"
            )
        return cls(crs=crs, transform=transform, width=width, height=height)

    def part(self, left: int, top: int, right: int, bottom: int) -> Grid:
        """A rectangle of the grid's pixels as a grid, which may extend beyond this one.

        Args:
            left: its first column.
            top: its first row.
            right: the column after its last one.
            bottom: the row after its last one.
        """
        return Grid(
            crs=self.crs,
            transform=self.transform @ Affine.translation(left, top),
            width=right - left,
            height=bottom - top,
        )

    def locate(
        self, lonlat: Sequence[tuple[float, float]]
    ) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.bool_]]:
        """The pixel that contains each point.

        Args:
            lonlat: longitude and latitude of each point (N, 2) in degrees (EPSG:4326).

        Returns:
            Row (N) and column (N) of each pixel, 0 for points outside the grid; and True for each
            point (N) inside the grid.
        """
        return self.pixels_at(*transformed(_DEGREES, self.crs, *np.reshape(lonlat, (-1, 2)).T))

    def lonlat(
        self, rows: NDArray[np.number[Any]], columns: NDArray[np.number[Any]]
    ) -> NDArray[np.float64]:
        """Longitude and latitude of the middles of pixels (N, 2), degrees; NaN where unknown.

        Args:
            rows: row of each pixel (N).
            columns: column of each pixel (N).
        """
        return np.stack(self.coordinates(columns + 0.5, rows + 0.5, _DEGREES), axis=1)

    def coordinates(
        self, columns: NDArray[np.number[Any]], rows: NDArray[np.number[Any]], crs: CRS
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """X and y (N) in a CRS of positions on the grid; NaN where they are unknown.

        Args:
            columns: columns from the grid's left edge to each position (N).
            rows: rows from its upper edge (N).
            crs: the CRS.
        """
        a, b, c, d, e, f = self.transform[:6]
        xs, ys = a * columns + b * rows + c, d * columns + e * rows + f
        return transformed(self.crs, crs, xs, ys)

    def pixels_at(
        self, xs: NDArray[np.float64], ys: NDArray[np.float64]
    ) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.bool_]]:
        """The pixel that contains each point, as `locate` returns it.

        Args:
            xs: easting or longitude of each point (N) in the grid's CRS.
            ys: northing or latitude (N).
        """
        beyond = self.beyond_antimeridian
        if beyond is not None:
            west, east = beyond
            xs = np.where(xs < west, xs + _TURN, np.where(xs > east, xs - _TURN, xs))
        with np.errstate(invalid="ignore"):
            columns, rows = np.floor(~self.transform @ (xs, ys))
        # A point outside the projection is NaN, for which these comparisons are False.
        inside = (rows >= 0) & (rows < self.height) & (columns >= 0) & (columns < self.width)
        return (
            np.where(inside, rows, 0).astype(np.intp),
            np.where(inside, columns, 0).astype(np.intp),
            inside,
        )

    def hectares(self, window: Window) -> NDArray[np.float64]:
        """Area of each pixel of a window (h, w) float64, hectares, read-only.

        For a geographic CRS, the exact area on the ellipsoid (Snyder, Map Projections, USGS PP
        1395, eq. 3-12), or, if the grid is rotated so that a row is not a parallel, the mean of the
        area element over the row. For a projection that preserves areas on this grid to
        `_EQUAL_AREA`, the determinant of the transform. For any other projection, the area on the
        ellipsoid.
        """
        (top, bottom), (left, right) = window.toranges()
        shape = (bottom - top, right - left)
        if self.crs.is_geographic:
            return np.broadcast_to(self._geographic(np.arange(top, bottom))[:, None], shape)
        if self._equal_area:
            return np.broadcast_to(np.float64(self._plane_hectares), shape)
        return self._ellipsoidal(window)

    @cached_property
    def pixel_size(self) -> float:
        """Side of a square with the area of the middle pixel on the ground, metres."""
        middle = Window(self.width // 2, self.height // 2, 1, 1)
        return float(np.sqrt(self.hectares(middle)[0, 0] * 1e4))

    @property
    def _plane_hectares(self) -> float:
        """Area of a pixel in the plane of the projection, hectares."""
        return float(abs(self.transform.determinant) * _unit(self.crs) ** 2 / 1e4)

    @cached_property
    def _equal_area(self) -> bool:
        """Whether the projection preserves areas, to `_EQUAL_AREA`, on the whole grid."""
        column, row = np.meshgrid(
            np.linspace(0, self.width, _NODES), np.linspace(0, self.height, _NODES)
        )
        ratio = self._elements(column, row) / self._plane_hectares
        known = ratio[np.isfinite(ratio)]
        # In a local CRS, which is not a CRS of the Earth, no ratio is finite.
        return bool((np.abs(known - 1) <= _EQUAL_AREA).all())

    def _ellipsoidal(self, window: Window) -> NDArray[np.float64]:
        """Areas (h, w) on the ellipsoid, hectares, interpolated between nodes of a lattice."""
        step = int(np.clip(_NODE_METRES / math.sqrt(self._plane_hectares * 1e4), 1, _NODE_PIXELS))
        axes = []
        for start, stop in window.toranges():
            at = np.arange(start, stop) + 0.5
            nodes = np.arange(start // step, math.ceil(stop / step) + 1)
            axes.append((at / step - nodes[0], nodes * step))
        (row, rows), (column, columns) = axes
        areas = self._elements(*np.meshgrid(columns.astype(float), rows.astype(float)))
        by_row = _between(areas, row)
        # A pixel outside the projection has the area 0.
        return np.nan_to_num(_between(by_row.T, column).T, nan=0.0)

    def _elements(
        self, column: NDArray[np.float64], row: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Area of a pixel around each position (h, w), hectares; NaN outside the projection.

        The area of the parallelogram between the positions half a pixel to either side, as vectors
        from the Earth's centre, so that poles and the antimeridian need no special case.
        """
        half = max(0.5, 50 / math.sqrt(self._plane_hectares * 1e4))
        ends = [
            self._from_centre(column + half * right, row + half * down)
            for right, down in ((1, 0), (-1, 0), (0, 1), (0, -1))
        ]
        across, along = ends[0] - ends[1], ends[2] - ends[3]
        area = np.linalg.norm(np.cross(across, along), axis=-1)
        return np.asarray(area / (2 * half) ** 2 / 1e4)

    def _from_centre(
        self, column: NDArray[np.float64], row: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Positions on the grid (h, w) as vectors from the Earth's centre (h, w, 3), metres."""
        lon, lat = np.radians(self.coordinates(column.ravel(), row.ravel(), _DEGREES))
        radius, flattening = _WGS84[0], 1 / _WGS84[1]
        e2 = flattening * (2 - flattening)
        normal = radius / np.sqrt(1 - e2 * np.sin(lat) ** 2)
        places = [
            normal * np.cos(lat) * np.cos(lon),
            normal * np.cos(lat) * np.sin(lon),
            normal * (1 - e2) * np.sin(lat),
        ]
        return np.stack(places, axis=-1).reshape(*column.shape, 3)

    def _geographic(self, rows: NDArray[np.intp]) -> NDArray[np.float64]:
        """Area of one pixel in each row (n) of a geographic grid, hectares."""
        row = rows.astype(np.float64)
        unit = _unit(self.crs)
        radius, e2 = _ellipsoid(self.crs)
        _, _, _, lat_by_column, lat_by_row, top = (unit * v for v in self.transform[:6])
        if lat_by_column == 0:
            edges = np.stack([top + lat_by_row * row, top + lat_by_row * (row + 1)])
            zones = _zone(np.clip(edges, -np.pi / 2, np.pi / 2), e2)
            width = abs(self.transform.a) * unit
            return np.asarray(radius**2 * width * np.abs(zones[1] - zones[0]) / 1e4)
        # The middles of equal intervals of the row.
        column = (np.arange(_COLUMNS_AVERAGED) + 0.5) * self.width / _COLUMNS_AVERAGED
        latitude = top + lat_by_row * (row[:, None] + 0.5) + lat_by_column * column
        element = (1 - e2) * np.cos(latitude) / (1 - e2 * np.sin(latitude) ** 2) ** 2
        extent = abs(self.transform.determinant) * unit**2
        return np.asarray(radius**2 * extent * element.mean(axis=1) / 1e4)

    @cached_property
    def beyond_antimeridian(self) -> tuple[float, float] | None:
        """West and east of a grid in degrees of which one is beyond 180; None of any other grid.

        Longitudes from -180 to 180 that are outside these are a turn away from the grid's.
        """
        if not self.crs.is_geographic:
            return None
        corners = ((0, 0), (self.width, 0), (0, self.height), (self.width, self.height))
        place = self.transform
        xs = [place.a * column + place.b * row + place.c for column, row in corners]
        west, east = min(xs), max(xs)
        return (west, east) if west < -_TURN / 2 or east > _TURN / 2 else None

    def around(self, crs: CRS, *, margin: float = 0.1) -> tuple[float, float, float, float] | None:
        """West, south, east and north of a box around the grid in another CRS; None if unknown.

        Args:
            crs: CRS of the box.
            margin: share of the grid's extent by which the box is larger on each side.
        """
        xs, ys = self._lattice(crs)
        if not np.isfinite([xs, ys]).all():
            return None
        margin_x, margin_y = margin * np.ptp(xs), margin * np.ptp(ys)
        return (
            float(xs.min() - margin_x),
            float(ys.min() - margin_y),
            float(xs.max() + margin_x),
            float(ys.max() + margin_y),
        )

    def _lattice(self, crs: CRS) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """X and y in a CRS of points in equal distances on the grid; NaN where they are unknown."""
        across, down = np.meshgrid(np.linspace(0, 1, _NODES), np.linspace(0, 1, _NODES))
        return self.coordinates(across.ravel() * self.width, down.ravel() * self.height, crs)

    def kilometres_from(self, boxes: Sequence[Box]) -> float | None:
        """Distance from the nearest of some boxes, km; 0 if the grid and a box overlap.

        The distance of a lattice of points on the grid. They overlap if such a point is in a box,
        or the middle or a corner of a box is on the grid.

        Args:
            boxes: at least one.

        Returns:
            The distance; None if the CRS is not one of the Earth.
        """
        away = self._kilometres_from(boxes)
        if not len(away):
            return None
        west, south, east, north = np.array(boxes).T
        middle = (west + east) / 2, (south + north) / 2
        corners = [(x, y) for x in (west, east) for y in (south, north)]
        if self.locate(np.concatenate([middle, *corners], axis=1).T.tolist())[2].any():
            return 0.0
        return float(away.min())

    def share_beyond(self, boxes: Sequence[Box], limit: float) -> float:
        """Share of the grid that is further than a limit from every box, 0 to 1, by a lattice.

        Args:
            boxes: at least one.
            limit: the distance, km.
        """
        away = self._kilometres_from(boxes)
        return float((away > limit).mean()) if len(away) else 0.0

    def wholly_beyond(self, boxes: Sequence[Box], limit: float) -> bool | None:
        """Whether all pixels are further than a limit from every box; False if none is.

        Args:
            boxes: at least one.
            limit: the distance, km.

        Returns:
            None if some pixels may be and others not.
        """
        away = self._kilometres_from(boxes)
        if not len(away):
            return False
        # No pixel is further than this from a point of the lattice, with a margin for projections.
        apart = 1.5 * math.hypot(self.width, self.height) * self.pixel_size / 1000 / (_NODES - 1)
        if len(away) == _NODES**2 and (away > limit + apart).all():
            return True
        return False if (away <= limit - apart).all() else None

    def _kilometres_from(self, boxes: Sequence[Box]) -> NDArray[np.float64]:
        """Distance of a lattice of points on the grid, km; none of a point without a longitude."""
        lon, lat = self._lattice(_DEGREES)
        known = np.isfinite(lon) & np.isfinite(lat)
        return kilometres(lon[known], lat[known], boxes)

    def away(self, lonlat: Sequence[tuple[float, float]] = ()) -> str:
        """Where the grid is, for a message about places that are all outside it.

        Args:
            lonlat: longitude and latitude of each place in degrees, if these were given.
        """
        text = "outside the raster"
        extent = self.around(_DEGREES, margin=0.0)
        if extent is not None:
            west, south, east, north = extent
            text += (
                f", which covers longitudes {west:.4f} to {east:.4f} and latitudes {south:.4f} to "
                f"{north:.4f}"
            )
        # Latitudes beyond 90 degrees are no longitudes that were exchanged.
        swapped = [(lat, lon) for lon, lat in lonlat if abs(lon) <= 90]
        exchanged = int(self.locate(swapped)[2].sum()) if swapped else 0
        if exchanged:
            text += (
                f"; with longitude and latitude exchanged, {exchanged} of {len(lonlat)} are "
                "inside: give the longitude first"
            )
        return text

    def check_same(self, name: str, other: Grid, other_name: str) -> None:
        """Check that another file has the same grid.

        Raises:
            GridMismatch: the grids differ in size, CRS or transform; the message states both.
        """
        differs = f"'{other_name}' is not on the grid of '{name}'"
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


def kilometres(lon: ArrayLike, lat: ArrayLike, boxes: Sequence[Box]) -> NDArray[np.float64]:
    """Distance of each point from the nearest of some boxes (N), km; 0 if it is in a box.

    The great-circle distance, by the haversine formula, from the nearest place of each box in
    degrees and from points along its edges, which are nearer where the box is far away. A sphere is
    up to 0.5 % off. For some points: each is compared with 64 points of every box.

    Args:
        lon: longitude of each point (N), degrees.
        lat: latitude of each point (N).
        boxes: at least one.
    """
    west, south, east, north = np.array(boxes, np.float64).T[..., None]
    along, up = np.array([(t, s) for t in _EDGE for s in _EDGE if {t, s} & {0.0, 1.0}]).T
    edges = (west + along * (east - west)).ravel(), (south + up * (north - south)).ravel()
    x, y = np.atleast_1d(lon)[:, None], np.atleast_1d(lat)[:, None]
    return np.minimum(_from_nearest(x, y, boxes), _haversine(x, y, *edges))


def beyond(lon: ArrayLike, lat: ArrayLike, boxes: Sequence[Box], limit: float) -> NDArray[np.bool_]:
    """Whether each point is further than a limit from every box (N); for many points.

    By the nearest place of each box in degrees, which is right to a per cent for a limit of some
    hundred kilometres.

    Args:
        lon: longitude of each point (N), degrees; a point without one is not further.
        lat: latitude of each point (N).
        boxes: at least one.
        limit: the distance, km.
    """
    x, y = np.atleast_1d(lon)[:, None], np.atleast_1d(lat)[:, None]
    return _from_nearest(x, y, boxes) > limit


def _from_nearest(
    x: NDArray[np.float64], y: NDArray[np.float64], boxes: Sequence[Box]
) -> NDArray[np.float64]:
    """Distance of each point (N, 1) from the nearest place in degrees of the boxes (N), km."""
    west, south, east, north = np.array(boxes, np.float64).T
    # Degrees east of the west side; outside the box the nearer side counts.
    off, width = (x - west) % _TURN, east - west
    nearest = np.where(off <= width, x, np.where(off - width < _TURN - off, east, west))
    return _haversine(x, y, nearest, np.clip(y, south, north))


def _haversine(
    lon: NDArray[np.float64],
    lat: NDArray[np.float64],
    to_lon: NDArray[np.float64],
    to_lat: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The least great-circle distance of each point (N, 1) from places (N, M or M), km."""
    x, y, to_x, to_y = (np.radians(degrees) for degrees in (lon, lat, to_lon, to_lat))
    chord = np.sin((to_y - y) / 2) ** 2
    chord = chord + np.cos(to_y) * np.cos(y) * np.sin((to_x - x) / 2) ** 2
    least = np.clip(chord.min(axis=1), 0.0, 1.0)
    return np.asarray(2 * _RADIUS_KM * np.arcsin(np.sqrt(least)))


def transformed(
    source: CRS, target: CRS, xs: ArrayLike, ys: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points transformed from one CRS to another.

    Args:
        source: the CRS of the points.
        target: the CRS of the result.
        xs: x (or longitude) of each point (N).
        ys: y (or latitude) of each point (N).

    Returns:
        X and y (N) float64, NaN for points outside the area of either CRS.
    """
    x, y = np.asarray(xs, np.float64), np.asarray(ys, np.float64)
    try:
        found = rasterio.warp.transform(source, target, x.tolist(), y.tolist())
    except GDALError:
        # One point outside the projection makes GDAL reject all points, so bisect.
        if x.size == 1:
            return np.array([np.nan]), np.array([np.nan])
        half = x.size // 2
        (ax, ay), (bx, by) = (
            transformed(source, target, x[part], y[part])
            for part in (slice(half), slice(half, None))
        )
        return np.concatenate([ax, bx]), np.concatenate([ay, by])
    u, v = (np.asarray(values, np.float64) for values in found)
    finite = np.isfinite(u) & np.isfinite(v)
    return np.where(finite, u, np.nan), np.where(finite, v, np.nan)


def _between(values: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values interpolated linearly along the first axis, at positions in its steps."""
    low = np.minimum(at.astype(np.intp), len(values) - 2)
    weight = (at - low)[:, None]
    return np.asarray(values[low] * (1 - weight) + values[low + 1] * weight)


def crs_name(crs: CRS) -> str:
    """A short name of a CRS: its EPSG code, else its PROJ parameters."""
    code = crs.to_epsg()
    if code:
        return f"EPSG:{code}"
    words = (f"+{k}" if v is True else f"+{k}={v}" for k, v in crs.to_dict().items())
    return " ".join(words) or crs.to_wkt()[:200]


def _numbers(transform: Affine) -> str:
    return f"({', '.join(f'{value:.10g}' for value in transform[:6])})"


def _unit(crs: CRS) -> float:
    """Length of one unit of a CRS in metres or, for a geographic CRS, radians."""
    _, factor = crs.units_factor
    return float(factor)


def _ellipsoid(crs: CRS) -> tuple[float, float]:
    """Semi-major axis in metres, and squared eccentricity."""
    found = _ELLIPSOID.search(crs.to_wkt())
    radius, inverse = (float(found[1]), float(found[2])) if found else _WGS84
    flattening = 1 / inverse if inverse else 0.0  # WKT writes a sphere as 0
    return radius, flattening * (2 - flattening)


def _zone(latitude: NDArray[np.float64], e2: float) -> NDArray[np.float64]:
    """Area from the equator to a latitude in radians, for 1 radian and a semi-major axis of 1."""
    sine = np.sin(latitude)
    if e2 == 0:
        return np.asarray(sine)
    e = math.sqrt(e2)
    return np.asarray((1 - e2) / 2 * (sine / (1 - e2 * sine**2) + np.arctanh(e * sine) / e))

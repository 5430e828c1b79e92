"""Placement: the grid of a stack, and the position of each file on it.

    files' grids + `grid`, `bbox`, `area` → one Grid → each file: unchanged, at an offset, or warped

A file on the stack's grid is read directly, without resampling. A file whose pixels coincide with
those of the grid is read at an offset. GDAL's warper resamples any other file to the grid.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import unquote

import rasterio.warp
from affine import Affine
from rasterio.crs import CRS
from rasterio.transform import array_bounds

from service.errors import GridMismatch, InvalidRequest, NoGeoreference, StackWarning
from service.grid import CRSError, GDALError, Grid, Window, crs_name, crs_of
from service.read.geotiff import Header

Bounds = tuple[float, float, float, float]
"""Left, bottom, right, top."""
Resampling = Literal["bilinear", "nearest"]
_POLE, _FARTHEST = 90.0, 540.0
"""Largest latitude and longitude, degrees; longitudes may go around the Earth once more."""
_TOLERANCE = 1e-3
"""Tolerance of a corner's position, in pixels."""
_AS_FINE = 1.02
"""Pixels up to this many times as large on the ground count as equally fine: projections differ."""
_CRS_AND_SIZE = re.compile(r"\s*(?P<crs>[^@]+?)\s*@\s*(?P<size>[0-9.eE+-]+)\s*")
_DEGREES = CRS.from_epsg(4326)
_MOST_PIXELS = 2**31 - 1
_DENSIFY = 21
WARPED_BLOCK = (128, 512)
"""Rows and columns of the blocks that GDAL's warping datasets make."""
_KERNEL_ROOM = 3
"""Pixels that are read in addition to the warper's kernel, because the warper rounds its size."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """The requested grid: the parameters `grid`, `bbox` and `area`."""

    grid: str | None = None
    """`strict`, `finest`, `EPSG:32631@10`, or the name of a file; None see `place_files`."""
    bbox: Bounds | None = None
    """West, south, east, north in degrees; west is larger across the antimeridian."""
    area: Mapping[str, Any] | None = None
    """A GeoJSON Polygon or MultiPolygon, in degrees."""


@dataclass(frozen=True, kw_only=True)
class Warp:
    """Parameters of GDAL's warper, for a file on another grid than the stack's."""

    grid: Grid
    """The stack's grid."""
    scale: tuple[float, float]
    """Pixels of the stack per pixel of the file, across and down, at most 1."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """Position of a file on the stack's grid."""

    row: int = 0
    column: int = 0
    """Row and column of the stack's first pixel in the file, if the file is not warped."""
    warp: Warp | None = None


@dataclass(frozen=True, kw_only=True)
class Placed:
    """The grid of a stack and the position of each of its files."""

    grid: Grid
    positions: tuple[Position, ...]
    """The position of each file, in order."""
    area: Mapping[str, Any] | None
    """The polygon in the grid's CRS: pixels whose centre is outside are missing."""
    warnings: tuple[StackWarning, ...] = ()


AS_IT_LIES = Position()
"""On the stack's grid already."""


def place_files(used: Sequence[Header], everything: Sequence[Header], place: Place) -> Placed:
    """The grid of a stack, and the position of each file on it, inside `gdal_options`.

    Without `grid`, all files must share one grid, or one CRS and corner with pixel sizes that are
    whole multiples of the finest grid, which is then used.

    Args:
        used: files with a needed band or mask.
        everything: all files; `grid` may name any of them.
        place: the requested grid.

    Raises:
        NoGeoreference: a file has no CRS or no transform.
        GridMismatch: the files do not share a grid, and `grid` is not given.
        InvalidRequest: `grid` is not valid, or `bbox` or `area` are outside the files.
    """
    grids = _grids(used)
    if place.grid is None:
        base = _usual_grid(used, grids)
    elif place.grid == "strict":
        base = _one_grid(used, grids)
    else:
        base = _requested_grid(used, grids, everything, place.grid)
    grid, area = _cropped(base, place)
    if grid.width > _MOST_PIXELS or grid.height > _MOST_PIXELS:
        raise InvalidRequest.of(
            "grid",
            f"the grid has {grid.width} x {grid.height} pixels; at most {_MOST_PIXELS} per side "
            "are allowed: give a larger pixel size",
        )
    known: dict[int, Position] = {}
    for header, own in zip(used, grids, strict=True):
        if id(own) not in known:
            known[id(own)] = AS_IT_LIES if own is grid else _position(own, grid, header.name)
    positions = tuple(known[id(own)] for own in grids)
    return Placed(
        grid=grid,
        positions=positions,
        area=area,
        warnings=_resampled(used, grids, positions, grid),
    )


def _grids(headers: Sequence[Header]) -> list[Grid]:
    """Each file's grid; equal grids are one object."""
    known: dict[tuple[object, ...], Grid] = {}
    grids = []
    for header in headers:
        key = (id(header.crs), header.transform, header.width, header.height)
        if key not in known:
            known[key] = _grid_of(header)
        grids.append(known[key])
    return grids


def _grid_of(header: Header) -> Grid:
    if header.placed_by is not None:
        raise NoGeoreference(
            f"'{header.name}' has {header.placed_by} in place of a CRS and transform: bring it to "
            "a grid first, as with gdalwarp -t_srs EPSG:32631 -tr 10 10"
        )
    grid = Grid.of(
        header.name,
        crs=header.crs,
        transform=header.transform,
        width=header.width,
        height=header.height,
    )
    x, y = grid.transform @ (grid.width / 2, grid.height / 2)
    if grid.crs.is_geographic and (abs(y) > _POLE or abs(x) > _FARTHEST):
        raise NoGeoreference(
            f"the middle of '{header.name}' is at {x:.10g}, {y:.10g}, which is not a position in "
            f"{crs_name(grid.crs)}, whose unit is degrees, longitude first: assign the CRS of "
            "these coordinates, or the right ones, as with gdal_translate -a_srs EPSG:32631 or "
            "-a_ullr"
        )
    return grid


def _one_grid(headers: Sequence[Header], grids: Sequence[Grid]) -> Grid:
    """The grid that all files share.

    Raises:
        GridMismatch: two grids differ; the message states both and a suitable `grid`, and names a
            file that differs from most of the others.
    """
    usual = _most_common(grids)
    name = next(header.name for header, own in zip(headers, grids, strict=True) if own is usual)
    differs: dict[int, str | None] = {id(usual): None}
    for header, grid in zip(headers, grids, strict=True):
        if id(grid) not in differs:
            try:
                usual.check_same(name, grid, header.name)
                differs[id(grid)] = None
            except GridMismatch as error:
                differs[id(grid)] = error.detail
    detail = next((one for one in differs.values() if one), None)
    if detail:
        other = sum(differs[id(grid)] is not None for grid in grids)
        raise GridMismatch(f"{detail} ({other} of {len(grids)} files differ); {_advice(grids)}")
    return grids[0]


def _most_common(grids: Sequence[Grid]) -> Grid:
    """The grid of most files; of several, the first."""
    counts = Counter(map(id, grids))
    return max(grids, key=lambda grid: counts[id(grid)])


def _advice(grids: Sequence[Grid]) -> str:
    """The parameter `grid` that would make the files fit together, for messages."""
    finest = min(grids, key=_ground)
    usual = _most_common(grids)
    if _ground(usual) <= _AS_FINE * _ground(finest):  # one file may have the wrong CRS
        finest = usual
    own = f"{crs_name(finest.crs)}@{abs(finest.transform.a):.10g}"
    if all(grid.crs == finest.crs for grid in grids):
        return f"grid=finest brings all files to the finest of them, grid={own} to whole pixels"
    return f"grid={own} brings all files to one CRS and pixel size"


def _usual_grid(headers: Sequence[Header], grids: Sequence[Grid]) -> Grid:
    """The one grid, or the finest one if the others are whole multiples of it."""
    distinct = list({id(grid): grid for grid in grids}.values())
    finest = min(distinct, key=_ground)
    if all(_nests(grid, distinct[0]) for grid in distinct):
        return distinct[0]
    if all(_nests(grid, finest) for grid in distinct):
        return finest
    return _one_grid(headers, grids)


def _ground(grid: Grid) -> float:
    """Area of the pixel in the middle, in hectares."""
    middle = Window(grid.width // 2, grid.height // 2, 1, 1)
    return float(grid.hectares(middle).mean())


def _same_crs(one: Grid, other: Grid) -> bool:
    return bool(one.crs == other.crs or one.crs.to_wkt() == other.crs.to_wkt())


def _nests(coarse: Grid, fine: Grid) -> bool:
    """Whether each pixel of a coarse grid is a block of whole pixels of a fine one.

    Both grids must have the same upper left corner.
    """
    if not _same_crs(coarse, fine):
        return False
    step = ~fine.transform @ coarse.transform  # from pixels of one grid to pixels of the other
    across, down = round(step.a), round(step.e)
    size = max(coarse.width, coarse.height)
    if across < 1 or down < 1 or size * max(abs(step.a - across), abs(step.e - down)) > _TOLERANCE:
        return False
    if size * max(abs(step.b), abs(step.d)) > _TOLERANCE:
        return False
    if max(abs(step.c), abs(step.f)) > _TOLERANCE:
        return False
    # If the size is not a multiple, the last coarse pixel may or may not extend over the edge.
    wide: bool = abs(coarse.width * across - fine.width) < across
    high: bool = abs(coarse.height * down - fine.height) < down
    return wide and high


def _same_lattice(own: Grid, grid: Grid) -> tuple[int, int] | None:
    """Row and column of the grid's first pixel in a file; None if the lattices differ."""
    if not _same_crs(own, grid):
        return None
    step = ~own.transform @ grid.transform
    row, column = round(step.f), round(step.c)
    corners = [(0, 0), (grid.width, 0), (0, grid.height), (grid.width, grid.height)]
    away = max(math.dist(step @ (x, y), (x + column, y + row)) for x, y in corners)
    return (row, column) if away <= _TOLERANCE else None


def _position(own: Grid, grid: Grid, name: str) -> Position:
    at = _same_lattice(own, grid)
    if at is not None:
        row, column = at
        inside = row >= 0 and column >= 0
        if inside and row + grid.height <= own.height and column + grid.width <= own.width:
            return Position(row=row, column=column)
    return Position(warp=Warp(grid=grid, scale=_scale(own, grid, name)))


def _scale(own: Grid, grid: Grid, name: str) -> tuple[float, float]:
    """Pixels of the stack per pixel of the file, which set the size of the warper's kernel.

    The size is the same for all windows, so that the result does not depend on them.

    Raises:
        GridMismatch: the file's CRS cannot be transformed to that of the grid.
    """
    width, height = _sizes(own)
    if not _same_crs(own, grid):
        bounds = array_bounds(own.height, own.width, own.transform)
        try:
            default, _, _ = rasterio.warp.calculate_default_transform(
                own.crs, grid.crs, own.width, own.height, *bounds
            )
        except (GDALError, CRSError) as error:
            raise GridMismatch(
                f"'{name}', in {crs_name(own.crs)}, cannot be transformed to {crs_name(grid.crs)}: "
                "give a `grid` in a CRS that covers all files"
            ) from error
        width, height = abs(default.a), abs(default.e)
    into = _sizes(grid)
    across, down = width / into[0], height / into[1]
    # With a ratio above 0.95, GDAL uses the same kernel as with 1.
    return (across if across < 0.95 else 1.0, down if down < 0.95 else 1.0)


def _sizes(grid: Grid) -> tuple[float, float]:
    """Length of a pixel across and down, also of a rotated grid."""
    place = grid.transform
    return math.hypot(place.a, place.d), math.hypot(place.b, place.e)


def _requested_grid(
    used: Sequence[Header], grids: Sequence[Grid], everything: Sequence[Header], requested: str
) -> Grid:
    """The grid of the parameter `grid`.

    Raises:
        InvalidRequest: the parameter is neither a keyword, a CRS and pixel size, nor a file's name.
    """
    if requested == "finest":
        return _over(grids, min(grids, key=_ground))
    wanted = unquote(requested)  # as `label` names files
    named = [h for h in everything if wanted in {h.name, h.name.rpartition("/")[2]}]
    if named:
        return next((g for h, g in zip(used, grids, strict=True) if h is named[0]), None) or (
            _grid_of(named[0])
        )
    match = _CRS_AND_SIZE.fullmatch(requested)
    if not match:
        raise InvalidRequest.of(
            "grid",
            f"'{requested}' is neither strict, finest, a CRS and pixel size such as "
            "EPSG:32631@10, nor the name of a file of the request",
        )
    try:
        crs = crs_of(match["crs"])
        size = float(match["size"])
    except (CRSError, ValueError):
        raise InvalidRequest.of(
            "grid", f"'{requested}' is not a CRS and a pixel size such as EPSG:32631@10"
        ) from None
    if not (math.isfinite(size) and size > 0):
        raise InvalidRequest.of("grid", f"'{requested}': the pixel size must be above 0")
    corner = Grid(crs=crs, transform=Affine(size, 0, 0, 0, -size, 0), width=1, height=1)
    return _over(grids, corner)


def _over(grids: Sequence[Grid], lattice: Grid) -> Grid:
    """The part of a lattice that covers all grids."""
    boxes = [_box(grid, lattice) for grid in {id(g): g for g in grids}.values()]
    # Tiles on both sides of the antimeridian are neighbours.
    boxes = [_nearest_turn(box, boxes[0], lattice) for box in boxes]
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[2] for box in boxes), max(box[3] for box in boxes)
    if (left, top, right, bottom) == (0, 0, lattice.width, lattice.height):
        return lattice
    return lattice.part(left, top, right, bottom)


_Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels of a lattice."""


def _nearest_turn(box: _Box, other: _Box, lattice: Grid) -> _Box:
    """A box with the longitudes nearest to another box, of all turns around the Earth.

    In a CRS that is not in degrees, and on a rotated lattice, the box itself.
    """
    place = lattice.transform
    if not lattice.crs.is_geographic or place.b or place.d:
        return box
    turn = 2 * math.pi / lattice.crs.units_factor[1] / place.a
    by = round(round((other[0] + other[2] - box[0] - box[2]) / 2 / turn) * turn)
    return box[0] + by, box[1], box[2] + by, box[3]


def _box(grid: Grid, lattice: Grid) -> _Box:
    """Left, top, right and bottom of a grid in whole pixels of a lattice."""
    return _pixels(
        array_bounds(grid.height, grid.width, grid.transform), grid.crs, lattice, grid=grid
    )


def _pixels(bounds: Bounds, crs: CRS, lattice: Grid, *, grid: Grid | None = None) -> _Box:
    """Bounds in some CRS, as whole pixels of a lattice, outwards."""
    if grid is not None and _same_crs(grid, lattice):
        step = ~lattice.transform @ grid.transform
        corners = [(0, 0), (grid.width, 0), (0, grid.height), (grid.width, grid.height)]
        at = [step @ corner for corner in corners]
    else:
        try:
            left, bottom, right, top = rasterio.warp.transform_bounds(
                crs, lattice.crs, *bounds, densify_pts=_DENSIFY
            )
        except (GDALError, CRSError) as error:
            raise GridMismatch(
                f"the extent {bounds} in {crs_name(crs)} cannot be transformed to "
                f"{crs_name(lattice.crs)}: give a `grid` in a CRS that covers it"
            ) from error
        if lattice.crs.is_geographic and left > right:  # across the antimeridian
            right += 2 * math.pi / lattice.crs.units_factor[1]
        inverse = ~lattice.transform
        at = [inverse @ (x, y) for x in (left, right) for y in (bottom, top)]
    if not all(math.isfinite(value) for pair in at for value in pair):
        raise GridMismatch(
            f"an extent in {crs_name(crs)} cannot be transformed to {crs_name(lattice.crs)}: give "
            "a `grid` in a CRS that covers it"
        )
    columns, rows = [x for x, _ in at], [y for _, y in at]
    return (
        math.floor(min(columns) + _TOLERANCE),
        math.floor(min(rows) + _TOLERANCE),
        math.ceil(max(columns) - _TOLERANCE),
        math.ceil(max(rows) - _TOLERANCE),
    )


def _cropped(grid: Grid, place: Place) -> tuple[Grid, Mapping[str, Any] | None]:
    """The requested part of the grid, and the polygon in the grid's CRS."""
    area = None
    if place.bbox is not None:
        grid = _part(grid, place.bbox, "bbox")
    if place.area is not None:
        grid = _part(grid, extent_of(place.area), "area")
        try:
            area = rasterio.warp.transform_geom(_DEGREES, grid.crs, dict(place.area))
        except (GDALError, CRSError, ValueError) as error:
            raise InvalidRequest.of(
                "area",
                f"the polygon cannot be transformed to the files' CRS {crs_name(grid.crs)}: give a "
                "polygon on the files, in degrees",
            ) from error
        area = _on_the_grids_side(area, grid)
    return grid, area


def _on_the_grids_side(area: Mapping[str, Any], grid: Grid) -> dict[str, Any]:
    """A polygon in degrees with the longitudes nearest to a grid that lies beyond 180 degrees."""
    if grid.beyond_antimeridian is None:
        return dict(area)
    middle = sum(grid.beyond_antimeridian) / 2
    single = area["type"] == "Polygon"
    polygons = [area["coordinates"]] if single else area["coordinates"]
    moved = [
        [[[x + 360 * round((middle - x) / 360), *rest] for x, *rest in ring] for ring in rings]
        for rings in polygons
    ]
    return {**area, "coordinates": moved[0] if single else moved}


def _part(grid: Grid, bounds: Bounds, field: str) -> Grid:
    whole = (0, 0, grid.width, grid.height)
    left, top, right, bottom = _nearest_turn(_pixels(bounds, _DEGREES, grid), whole, grid)
    left, top = max(left, 0), max(top, 0)
    right, bottom = min(right, grid.width), min(bottom, grid.height)
    if left >= right or top >= bottom:
        own = rasterio.warp.transform_bounds(
            grid.crs, _DEGREES, *array_bounds(grid.height, grid.width, grid.transform)
        )
        raise InvalidRequest.of(
            field,
            f"({', '.join(f'{v:.6g}' for v in bounds)}) does not touch the files, which cover "
            f"({', '.join(f'{v:.6g}' for v in own)}; west, south, east, north in degrees): give a "
            "part of the files, longitude first",
        )
    if (left, top, right, bottom) == (0, 0, grid.width, grid.height):
        return grid
    return grid.part(left, top, right, bottom)


def extent_of(area: Mapping[str, Any]) -> Bounds:
    """West, south, east and north of a GeoJSON Polygon or MultiPolygon.

    West is larger than east if its parts lie on both sides of the antimeridian.
    """
    polygons = [area["coordinates"]] if area["type"] == "Polygon" else area["coordinates"]
    points = [point for rings in polygons for ring in rings for point in ring]
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    if len(polygons) > 1 and max(xs) - min(xs) > 180 and all(abs(x) > 90 for x in xs):
        # Cut at the antimeridian, as RFC 7946 requires it.
        return min(x for x in xs if x > 0), min(ys), max(x for x in xs if x < 0), max(ys)
    return min(xs), min(ys), max(xs), max(ys)


def _resampled(
    used: Sequence[Header], grids: Sequence[Grid], positions: Sequence[Position], grid: Grid
) -> tuple[StackWarning, ...]:
    """The warning that files were resampled."""
    warped = [
        (header, own)
        for header, own, position in zip(used, grids, positions, strict=True)
        if position.warp is not None and _same_lattice(own, grid) is None
    ]
    if not warped:
        return ()
    kinds = sorted({_described(own) for _, own in warped})
    names = ", ".join(f"'{header.name}'" for header, _ in warped[:3])
    more = f" and {len(warped) - 3} more" if len(warped) > 3 else ""
    detail = (
        f"{len(warped)} of {len(used)} files ({names}{more}) with {' and '.join(kinds)} are "
        f"brought to {_described(grid)}: reflectance bilinear, masks by the nearest pixel"
    )
    return (StackWarning(code="resampled", detail=detail),)


def _described(grid: Grid) -> str:
    across, down = _sizes(grid)
    size = f"{across:.6g}" if math.isclose(across, down) else f"{across:.6g} x {down:.6g}"
    unit = "degrees" if grid.crs.is_geographic else "m"
    return f"pixels of {size} {unit} in {crs_name(grid.crs)}"


def touches(header: Header, place: Place) -> bool:
    """Whether a file has pixels in the requested part, inside `gdal_options`.

    Args:
        header: the file's header.
        place: the requested part; without `bbox` and `area`, it is everything.
    """
    bounds = [place.bbox] if place.bbox else []
    if place.area is not None:
        bounds.append(extent_of(place.area))
    own = _grid_of(header)
    for one in bounds:
        try:
            box = _pixels(one, _DEGREES, own)
        except GridMismatch:  # the part has no place in the file's CRS
            return False
        left, top, right, bottom = _nearest_turn(box, (0, 0, own.width, own.height), own)
        if left >= own.width or top >= own.height or right <= 0 or bottom <= 0:
            return False
    return True


def needed_windows(headers: Sequence[Header], place: Place) -> tuple[Window | None, ...]:
    """The pixels of each file that the requested part needs, inside `gdal_options`.

    Args:
        headers: files with a needed band or mask.
        place: the requested part.

    Returns:
        One window per file, in the file's pixels; None for a file of which no pixel is needed.

    Raises:
        GridMismatch: see `place_files`.
        InvalidRequest: see `place_files`.
        NoGeoreference: see `place_files`.
    """
    placed = place_files(headers, headers, place)
    return tuple(
        _needed(own, position, placed.grid)
        for own, position in zip(_grids(headers), placed.positions, strict=True)
    )


def warped_part(own: Grid, warp: Warp, window: Window) -> Window | None:
    """The pixels of a warped file that a window of its stack's grid needs, inside `gdal_options`.

    Args:
        own: the file's grid.
        warp: parameters of the warper.
        window: a window of the stack's grid.

    Returns:
        A window in the file's pixels; None if no pixel is needed.
    """
    (top, bottom), (left, right) = window.toranges()
    rows, columns = WARPED_BLOCK
    top, left = top // rows * rows, left // columns * columns
    bottom = min(-(-bottom // rows) * rows, warp.grid.height)
    right = min(-(-right // columns) * columns, warp.grid.width)
    part = warp.grid.part(left, top, right, bottom)
    return _needed(own, Position(warp=warp), part)


def _needed(own: Grid, position: Position, grid: Grid) -> Window | None:
    if position.warp is None:
        return Window(position.column, position.row, grid.width, grid.height)
    # The warper's kernel extends by one pixel of the stack's grid, here in the file's pixels.
    across, down = (math.ceil(1 / scale) + _KERNEL_ROOM for scale in position.warp.scale)
    left, top, right, bottom = _box(grid, own)
    left, top = max(left - across, 0), max(top - down, 0)
    right, bottom = min(right + across, own.width), min(bottom + down, own.height)
    return Window(left, top, right - left, bottom - top) if left < right and top < bottom else None

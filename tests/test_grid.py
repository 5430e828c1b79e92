"""Pixel areas and the comparison of grids, against pyproj's geodesics and plain arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from affine import Affine
from pyproj import Geod, Transformer
from rasterio.crs import CRS
from rasterio.warp import transform as warp
from rasterio.windows import Window

from service.errors import GridMismatch
from service.grid import Grid, beyond, kilometres


def grid(crs: str, transform: Affine, width: int = 40, height: int = 30) -> Grid:
    return Grid(crs=CRS.from_string(crs), transform=transform, width=width, height=height)


def rows(of: Grid, expected: slice | range) -> np.ndarray:
    """Area of the first pixel of some rows."""
    return of.hectares(Window(0, 0, of.width, of.height))[expected, 0]


def geodesic_hectares(
    transform: Affine, row: int, column: int, *, ellipsoid: str = "WGS84"
) -> float:
    """Area of a pixel of a geographic grid, its edges cut fine: parallels are not geodesics."""
    steps = np.linspace(0, 1, 200)
    ring = [
        *((column + s, row) for s in steps),
        *((column + 1, row + s) for s in steps),
        *((column + 1 - s, row + 1) for s in steps),
        *((column, row + 1 - s) for s in steps),
    ]
    longitude, latitude = zip(*(transform @ corner for corner in ring), strict=True)
    area, _ = Geod(ellps=ellipsoid).polygon_area_perimeter(longitude, latitude)
    return abs(area) / 1e4


def test_projected_area_is_the_determinant_in_metres() -> None:
    utm = grid("EPSG:32631", Affine(10, 0, 5e5, 0, -20, 5.6e6))
    assert rows(utm, slice(None)) == pytest.approx(np.full(30, 0.02))
    feet = grid("EPSG:2225", Affine(100, 0, 6e6, 0, -100, 2e6))
    assert rows(feet, range(2)) == pytest.approx(np.full(2, (100 * 0.3048006096) ** 2 / 1e4))


def test_rotated_projected_area_does_not_change_by_the_rotation() -> None:
    turned = Affine.translation(5e5, 5.6e6) @ Affine.rotation(30) @ Affine.scale(10, -10)
    assert rows(grid("EPSG:32631", turned), range(3)) == pytest.approx(np.full(3, 0.01))


def test_sinusoidal_pixels_all_have_the_same_area() -> None:
    modis = "+proj=sinu +lon_0=0 +x_0=0 +y_0=0 +R=6371007.181 +units=m"
    side = 231.65635826
    areas = rows(grid(modis, Affine(side, 0, -6e6, 0, -side, -1.3e6)), slice(0, 30))
    assert areas == pytest.approx(np.full(30, side**2 / 1e4))


@pytest.mark.parametrize("top", [0.0, 51.0, -33.5, 80.0])
def test_geographic_area_is_exact_on_the_ellipsoid(top: float) -> None:
    transform = Affine(0.1, 0, 4.0, 0, -0.1, top)
    areas = rows(grid("EPSG:4326", transform), range(5, 25))
    expected = [geodesic_hectares(transform, row, 0) for row in range(5, 25)]
    assert areas == pytest.approx(expected, rel=1e-6)


def test_geographic_area_uses_the_ellipsoid_and_the_unit_of_the_crs() -> None:
    # EPSG:4807: Clarke 1880 (IGN), in grads. The same pixel in degrees, by pyproj.
    grads = Affine(0.1, 0, 1.0, 0, -0.1, 54.0)
    degrees = Affine.scale(0.9) @ grads
    areas = rows(grid("EPSG:4807", grads), range(3))
    expected = [geodesic_hectares(degrees, row, 0, ellipsoid="clrk80ign") for row in range(3)]
    assert areas == pytest.approx(expected, rel=1e-6)


def test_pixels_of_the_globe_sum_to_its_area() -> None:
    complete = grid("+proj=longlat +R=6371000", Affine(1, 0, -180, 0, -1, 90), 360, 180)
    total = rows(complete, slice(None)).sum() * 360
    assert total == pytest.approx(4 * np.pi * 6371000**2 / 1e4)


def test_rows_beyond_the_pole_have_no_area() -> None:
    beyond = grid("EPSG:4326", Affine(1, 0, 0, 0, -1, 92), 10, 10)
    assert rows(beyond, range(4))[:2] == pytest.approx([0, 0])
    assert (rows(beyond, range(4))[2:] > 0).all()


def test_rotated_geographic_area_is_the_mean_of_the_row() -> None:
    turned = Affine.translation(4, 51) @ Affine.rotation(25) @ Affine.scale(0.05, -0.05)
    areas = rows(grid("EPSG:4326", turned), range(0, 30, 10))
    expected = [
        np.mean([geodesic_hectares(turned, row, column) for column in range(40)])
        for row in range(0, 30, 10)
    ]
    assert areas == pytest.approx(expected, rel=1e-5)


def test_utm_pixels_are_close_to_their_geodesic_area() -> None:
    # Not ours to correct: the projection's own scale, 0.04 % at most within the zone's middle.
    transform = Affine(10, 0, 500_000, 0, -10, 5_600_000)
    corners = [transform @ c for c in [(0, 0), (1, 0), (1, 1), (0, 1)]]
    longitude, latitude = warp("EPSG:32631", "EPSG:4326", *zip(*corners, strict=True))
    area, _ = Geod(ellps="WGS84").polygon_area_perimeter(longitude, latitude)
    ours = rows(grid("EPSG:32631", transform), range(1))[0]
    assert ours == pytest.approx(abs(area) / 1e4, rel=1e-3)


def polygon_hectares(of: Grid, row: int, column: int) -> float:
    """Area of a pixel by pyproj alone: its outline, cut fine, as a polygon of geodesics."""
    steps = np.linspace(0, 1, 20, endpoint=False)
    ring = [
        *((column + s, row) for s in steps),
        *((column + 1, row + s) for s in steps),
        *((column + 1 - s, row + 1) for s in steps),
        *((column, row + 1 - s) for s in steps),
    ]
    x, y = zip(*(of.transform @ corner for corner in ring), strict=True)
    to_degrees = Transformer.from_crs(of.crs.to_wkt(), "EPSG:4326", always_xy=True)
    area, _ = Geod(ellps="WGS84").polygon_area_perimeter(*to_degrees.transform(x, y))
    return abs(area) / 1e4


@pytest.mark.parametrize(
    ("crs", "transform", "width", "height"),
    [
        ("EPSG:3857", Affine(10, 0, 480_000, 0, -10, 6_650_000), 300, 200),
        ("EPSG:3857", Affine(60_000, 0, -1e7, 0, -60_000, 1e7), 300, 233),
        ("EPSG:32631", Affine(10, 0, 300_000, 0, -10, 5_700_000), 300, 200),
        # Far outside its zone, where UTM stretches by more than the tolerance.
        ("EPSG:32631", Affine(100, 0, 1_300_000, 0, -100, 5_700_000), 300, 200),
        ("EPSG:3035", Affine(100, 0, 3_900_000, 0, -100, 3_100_000), 300, 200),
        # Across the pole, and far from it where the projection stretches.
        ("EPSG:3413", Affine(1000, 0, -150_000, 0, -1000, 100_000), 300, 200),
        ("EPSG:3031", Affine(30, 0, 2_500_000, 0, -30, 2_500_000), 300, 200),
        # Across the antimeridian.
        ("EPSG:3832", Affine(1000, 0, 3_300_000, 0, -1000, 5_000_000), 300, 200),
        # Turned by 30 degrees.
        (
            "EPSG:3857",
            Affine.translation(480_000, 6_650_000) @ Affine.rotation(30) @ Affine.scale(10, -10),
            300,
            200,
        ),
        ("EPSG:4326", Affine(1e-4, 0, 4.0, 0, -1e-4, 51.0), 300, 200),
        ("EPSG:4326", Affine(0.1, 0, -170.0, 0, -0.1, 80.0), 3400, 1600),
    ],
)
def test_areas_are_geodesic_to_half_a_per_cent(
    crs: str, transform: Affine, width: int, height: int
) -> None:
    one = grid(crs, transform, width, height)
    complete = one.hectares(Window(0, 0, width, height))
    assert complete.shape == (height, width)
    for row, column in [(0, 0), (height - 1, width - 1), (height // 2, width // 3), (5, width - 7)]:
        expected = polygon_hectares(one, row, column)
        assert complete[row, column] == pytest.approx(expected, rel=5e-3), (row, column)
        if abs(complete[row, column] / one.hectares(Window(0, 0, 1, 1))[0, 0] - 1) > 1e-9:
            # Not constant, so worked out on the ellipsoid.
            assert complete[row, column] == pytest.approx(expected, rel=2e-5), (row, column)


def test_areas_do_not_depend_on_the_window() -> None:
    one = grid("EPSG:3857", Affine(10, 0, 480_000, 0, -10, 6_650_000), 300, 200)
    complete = one.hectares(Window(0, 0, 300, 200))
    part = one.hectares(Window(70, 130, 90, 3))
    np.testing.assert_allclose(part, complete[130:133, 70:160], rtol=1e-12)


def test_web_mercator_does_not_stretch_hectares() -> None:
    """10 m by its own measure at 51 degrees north are 6.3 m on the ground."""
    one = grid("EPSG:3857", Affine(10, 0, 480_000, 0, -10, 6_621_293), 10, 10)
    assert one.hectares(Window(0, 0, 10, 10)) == pytest.approx(0.01 * 0.3966, rel=3e-3)
    assert one.pixel_size == pytest.approx(6.3, rel=1e-2)


def test_pixels_beyond_the_projection_have_no_area() -> None:
    disk = "+proj=ortho +lat_0=0 +lon_0=0 +ellps=WGS84"
    one = grid(disk, Affine(100_000, 0, -7e6, 0, -100_000, 7e6), 140, 140)
    areas = one.hectares(Window(0, 0, 140, 140))
    assert areas[0, 0] == 0
    assert areas[70, 70] == pytest.approx(1e6, rel=1e-3)


def test_a_local_crs_keeps_the_area_of_its_plane() -> None:
    local = 'LOCAL_CS["site",UNIT["metre",1],AXIS["x",EAST],AXIS["y",NORTH]]'
    one = grid(local, Affine(10, 0, 0, 0, -10, 0), 4, 4)
    assert one.hectares(Window(0, 0, 4, 4)) == pytest.approx(0.01)


NORTH_UP = Affine(10, 0, 5e5, 0, -10, 5.6e6)


def test_grids_that_differ_by_rounding_are_the_same() -> None:
    one = grid("EPSG:32631", NORTH_UP)
    one.check_same("a.tif", grid("EPSG:32631", Affine(10, 0, 5e5 + 5e-3, 0, -10, 5.6e6)), "b.tif")
    by_wkt = grid(CRS.from_epsg(32631).to_wkt(), NORTH_UP)
    one.check_same("a.tif", by_wkt, "b.tif")


@pytest.mark.parametrize(
    ("other", "both"),
    [
        (grid("EPSG:32632", NORTH_UP), ["EPSG:32631", "EPSG:32632"]),
        (grid("EPSG:32631", NORTH_UP, width=41), ["41 x 30", "40 x 30"]),
        (
            grid("EPSG:32631", Affine(10, 0, 5e5 + 5, 0, -10, 5.6e6)),
            ["500005", "500000", "0.5 pixels"],
        ),
        # Half a pixel off in the last corner alone.
        (grid("EPSG:32631", Affine(10.125, 0, 5e5, 0, -10, 5.6e6)), ["10.125", "0.5 pixels"]),
        (
            grid("+proj=sinu +R=6371007.181 +units=m", NORTH_UP),
            ["+proj=sinu", "EPSG:32631"],
        ),
    ],
)
def test_grids_that_differ_are_an_error_with_both_sides(other: Grid, both: list[str]) -> None:
    with pytest.raises(GridMismatch) as caught:
        grid("EPSG:32631", NORTH_UP).check_same("a.tif", other, "b.tif")
    for part in ["'a.tif'", "'b.tif'", *both]:
        assert part in caught.value.detail


def test_crs_without_an_epsg_code_are_compared_by_definition() -> None:
    sinusoidal = grid("+proj=sinu +R=6371007.181 +units=m", NORTH_UP)
    sinusoidal.check_same("a", grid("+proj=sinu +R=6371007.181 +units=m", NORTH_UP), "b")
    with pytest.raises(GridMismatch, match="CRS"):
        sinusoidal.check_same("a", grid("+proj=sinu +R=6371007.181 +lon_0=9", NORTH_UP), "b")


def boxed(west: float, south: float, east: float, north: float) -> Grid:
    """A grid in degrees."""
    shape = Affine((east - west) / 40, 0, west, 0, -(north - south) / 30, north)
    return grid("EPSG:4326", shape)


@pytest.mark.parametrize(
    "boxes",
    [
        [(-122.5, 34.6, -118.5, 40.5)],
        [(-122.5, 34.6, -118.5, 40.5), (140.9, -39.2, 150.0, -33.9), (3.0, 50.8, 3.1, 50.9)],
        [(-60.5, -18.3, -46.3, -9.3)],
    ],
)
@pytest.mark.parametrize("at", [(73.4, 18.1), (22.1, 45.2), (-100.0, 38.0), (179.9, -41.0)])
def test_the_distance_from_boxes_is_geodesic_to_a_per_cent(
    at: tuple[float, float], boxes: list[tuple[float, float, float, float]]
) -> None:
    """Against geodesics from the grid's middle to points all along the boxes' edges."""
    lon, lat = at
    small = boxed(lon - 0.01, lat - 0.01, lon + 0.01, lat + 0.01)
    fine = np.linspace(0, 1, 300)
    edges = []
    for west, south, east, north in boxes:
        x, y = west + fine * (east - west), south + fine * (north - south)
        edges += [
            *zip(x, np.full(300, south), strict=True),
            *zip(x, np.full(300, north), strict=True),
        ]
        edges += [
            *zip(np.full(300, west), y, strict=True),
            *zip(np.full(300, east), y, strict=True),
        ]
    x, y = np.array(edges).T
    away = Geod(ellps="WGS84").inv(np.full(len(x), lon), np.full(len(x), lat), x, y)[2] / 1000
    assert small.kilometres_from(boxes) == pytest.approx(away.min(), rel=0.01)


def test_a_grid_in_or_around_a_box_is_no_distance_away() -> None:
    box = (3.0, 50.8, 3.1, 50.9)
    assert boxed(3.02, 50.82, 3.08, 50.88).kilometres_from([box]) == 0
    assert boxed(3.05, 50.85, 3.3, 51.0).kilometres_from([box]) == 0
    assert grid("EPSG:32631", Affine(10, 0, 5e5, 0, -10, 5.635e6)).kilometres_from([box]) == 0
    # No point of the lattice lies in these boxes, but they lie on the grid.
    assert boxed(0, 48, 6, 54).kilometres_from([box]) == 0
    assert boxed(-10, 36, 30, 60).kilometres_from([box]) == 0
    assert grid("EPSG:3857", Affine(1e6, 0, -2e7, 0, -1e6, 2e7)).kilometres_from([box]) == 0
    assert boxed(179, -1, 181, 1).kilometres_from([(-179.5, -1, -179, 1)]) == 0


def test_a_grid_that_is_nowhere_on_earth_has_no_distance() -> None:
    local = 'LOCAL_CS["site",UNIT["metre",1],AXIS["x",EAST],AXIS["y",NORTH]]'
    assert grid(local, Affine(10, 0, 0, 0, -10, 0)).kilometres_from([(0, 0, 1, 1)]) is None


@pytest.mark.parametrize("side", range(4))
def test_the_distance_from_a_wide_box_is_that_of_its_side(side: int) -> None:
    """Between the points along the sides, too."""
    west, south, east, north = box = (-25.0, 34.0, 41.0, 71.0)
    rng = np.random.default_rng(side)
    for off in rng.uniform(0.2, 1.5, 20):
        lon, lat = rng.uniform(west, east), rng.uniform(south, north)
        lon, lat = [(lon, south - off), (lon, north + off), (west - off, lat), (east + off, lat)][
            side
        ]
        nearest = min(max(lon, west), east), min(max(lat, south), north)
        away = Geod(ellps="WGS84").inv(lon, lat, *nearest)[2] / 1000
        assert kilometres(lon, lat, [box])[0] == pytest.approx(away, rel=0.02)


def test_points_beyond_a_limit_are_those_at_such_a_distance() -> None:
    boxes = [(-25.0, 34.0, 41.0, 71.0), (140.9, -39.2, 150.0, -33.9), (179.0, -2.0, 181.0, 2.0)]
    rng = np.random.default_rng(0)
    lon, lat = rng.uniform(-180, 180, 3000), rng.uniform(-80, 80, 3000)
    away = kilometres(lon, lat, boxes)
    clear = np.abs(away - 500) > 5
    np.testing.assert_array_equal(beyond(lon, lat, boxes, 500)[clear], away[clear] > 500)
    assert not beyond(np.nan, np.nan, boxes, 500).any()
    assert beyond([], [], boxes, 500).shape == (0,)


def test_the_share_beyond_a_distance_is_that_of_the_area() -> None:
    """A degree of latitude has 111 km: of 12 degrees, those beyond the first 2 are further."""
    one = boxed(0.0, -6.0, 2.0, 6.0)
    box = (-1.0, -8.0, 3.0, -6.0)
    assert one.share_beyond([box], 222.5) == pytest.approx(10 / 12, abs=1 / 9)
    assert one.share_beyond([box], 2000) == 0
    assert one.share_beyond([(100.0, 0.0, 101.0, 1.0)], 2000) == 1
    np.testing.assert_allclose(kilometres([0.0, 0.0], [-7.0, -5.0], [box]), [0, 111.2], atol=0.5)


def test_a_grid_is_wholly_beyond_a_distance_or_wholly_within_it_or_neither() -> None:
    box = (-1.0, -8.0, 3.0, -6.0)
    small = boxed(0.0, 0.0, 0.5, 0.5)  # about 670 km north
    assert small.wholly_beyond([box], 600) is True
    assert small.wholly_beyond([box], 800) is False
    assert small.wholly_beyond([box], 670) is None
    wide = boxed(0.0, -6.0, 2.0, 6.0)
    assert wide.wholly_beyond([box], 600) is None
    # A box on the grid, but between the points of the lattice.
    assert boxed(-10, 36, 30, 60).wholly_beyond([(3.0, 50.8, 3.1, 50.9)], 110) is None


def test_the_middles_of_pixels_are_their_places() -> None:
    one = grid("EPSG:32631", NORTH_UP)
    rows, columns = np.array([0, 7, 29]), np.array([0, 11, 39])
    found = one.locate(one.lonlat(rows, columns))
    np.testing.assert_array_equal(found[0], rows)
    np.testing.assert_array_equal(found[1], columns)

"""Files on other grids: brought to one, as plain numpy and GDAL's own warper bring them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.warp
from affine import Affine
from rasterio.enums import Resampling
from rasterio.windows import Window

from service.errors import GridMismatch, InvalidRequest
from service.read.geotiff import SourceFile
from service.read.layouts import StackOptions
from service.read.reader import StackReader
from service.read.stack import Sits, Stack, open_stack
from tests.kits.rasters import write

BANDS = ("B02", "B04", "B08", "B11")
FINE = Affine(10, 0, 5e5, 0, -10, 5.6e6)
COARSE = Affine(20, 0, 5e5, 0, -20, 5.6e6)
rng = np.random.default_rng(5)


def opened(files: Sequence[SourceFile], bands: Sequence[str] = BANDS, **options: object) -> Stack:
    return open_stack(files, StackOptions(**options), bands=bands, max_bytes=2**30)


def read(stack: Stack, window: Window | None = None) -> Sits:
    with StackReader(stack) as reader:
        return reader.read(window or Window(0, 0, stack.grid.width, stack.grid.height))


def pixels(n: int, height: int, width: int) -> np.ndarray:
    return rng.integers(200, 6000, (n, height, width)).astype(np.uint16)


def mixed(folder: Path, height: int = 12, width: int = 16) -> tuple[list[SourceFile], np.ndarray]:
    """One date at 10 m, its B11 and SCL at 20 m; with the 20 m pixels (2, h, w)."""
    fine = pixels(3, height, width)
    coarse = pixels(2, (height + 1) // 2, (width + 1) // 2)
    coarse[1] = rng.integers(0, 12, coarse[1].shape)
    coarse[0, 2, 3] = 0  # missing
    files = [
        write(folder / "20210105_10m.tif", fine, descriptions=BANDS[:3], nodata=0),
        write(folder / "20210105_B11_20m.tif", coarse[:1], transform=COARSE, nodata=0),
        write(folder / "20210105_SCL_20m.tif", coarse[1:], transform=COARSE),
    ]
    return files, coarse


def doubled(coarse: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear over valid (not zero) pixels alone, at twice the resolution, (height, width)."""
    out = np.zeros((height, width))
    for r in range(height):
        for c in range(width):
            y, x = (r + 0.5) / 2 - 0.5, (c + 0.5) / 2 - 0.5
            top, left = int(np.floor(y)), int(np.floor(x))
            total = weight = 0.0
            for j in (top, top + 1):
                for i in (left, left + 1):
                    if 0 <= j < coarse.shape[0] and 0 <= i < coarse.shape[1] and coarse[j, i]:
                        share = (1 - abs(y - j)) * (1 - abs(x - i))
                        total += share * coarse[j, i]
                        weight += share
            # A pixel is there where the pixel that it lies in is there.
            out[r, c] = total / weight if coarse[r // 2, c // 2] else 0
    return out


@pytest.mark.parametrize("size", [(12, 16), (11, 15)])
def test_20_m_bands_come_to_10_m_as_plain_numpy_brings_them(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    files, coarse = mixed(tmp_path, *size)
    stack = opened(files)
    assert (stack.grid.transform, stack.grid.height, stack.grid.width) == (FINE, *size)
    (warning,) = stack.warnings
    assert warning.code == "resampled"
    assert "2 of 3 files ('20210105_B11_20m.tif', '20210105_SCL_20m.tif')" in warning.detail
    assert "pixels of 20 m in EPSG:32631" in warning.detail
    sits = read(stack)
    expected = doubled(coarse[0], *size)
    there = expected > 0
    scl = coarse[1].repeat(2, 0).repeat(2, 1)[: size[0], : size[1]]
    np.testing.assert_array_equal(sits.valid[0], there & (scl >= 4) & (scl <= 7))
    # Whole numbers, as GDAL keeps the file's number type: half a digital number away at most.
    np.testing.assert_allclose(sits.values[0, 3][there] * 1e4, expected[there], atol=0.501, rtol=0)
    with rasterio.open(files[0].path) as fine:  # the 10 m bands are untouched
        assert np.array_equal(np.rint(sits.values[0, 0][there] * 1e4), fine.read(1)[there])


def test_windows_are_parts_of_the_whole(tmp_path: Path) -> None:
    files, _ = mixed(tmp_path, 60, 80)
    stack = opened(files)
    complete = read(stack)
    for window in (Window(0, 0, 7, 9), Window(13, 11, 31, 17), Window(79, 59, 1, 1)):
        part = read(stack, window)
        (top, bottom), (left, right) = window.toranges()
        np.testing.assert_array_equal(part.values, complete.values[..., top:bottom, left:right])
        np.testing.assert_array_equal(part.valid, complete.valid[..., top:bottom, left:right])


def test_strict_takes_no_other_grid(tmp_path: Path) -> None:
    files, _ = mixed(tmp_path)
    with pytest.raises(GridMismatch, match="16 x 12 pixels, not 8 x 6"):
        opened(files, grid="strict")


def test_a_plain_stack_is_read_as_it_lies(tmp_path: Path) -> None:
    files = [
        write(tmp_path / f"2021010{t}.tif", pixels(4, 6, 5), descriptions=BANDS) for t in (1, 2)
    ]
    for grid in (None, "strict", "finest", "20210101.tif"):
        stack = opened(files, grid=grid, mask="none")
        assert stack.warnings == ()
        planes = [plane for one in stack.acquisitions for plane in one.planes]
        assert {(p.position.row, p.position.column, p.position.warp) for p in planes} == {
            (0, 0, None)
        }


# --- other CRS and tiles --------------------------------------------------------------------


def smooth(height: int, width: int, left: float, top: float, size: float) -> np.ndarray:
    """A surface in metres east and north, the same wherever a tile begins."""
    x = left + size * (np.arange(width) + 0.5)
    y = top - size * (np.arange(height) + 0.5)
    return 2000 + 800 * np.sin(x / 90)[None] + 700 * np.cos(y / 70)[:, None]


def test_another_crs_is_what_gdals_warper_makes_of_it(tmp_path: Path) -> None:
    # Western edge of zone 32 seen from zone 31.
    there = Affine(10, 0, 307_000, 0, -10, 5_650_000)
    data = smooth(200, 210, there.c, there.f, 10).astype(np.uint16)
    other = write(
        tmp_path / "20210105.tif", np.stack([data] * 4), descriptions=BANDS, crs="EPSG:32632",
        transform=there, nodata=0,
    )  # fmt: skip
    stack = opened([other], grid="EPSG:32631@10", mask="none")
    assert "pixels of 10 m in EPSG:32632" in stack.warnings[0].detail
    assert (stack.grid.transform.c % 10, stack.grid.transform.f % 10) == (0, 0)
    sits = read(stack)
    expected = np.zeros((stack.grid.height, stack.grid.width), np.uint16)
    with rasterio.open(other.path) as source:
        rasterio.warp.reproject(
            rasterio.band(source, 1), expected, src_nodata=0, dst_nodata=0,
            dst_transform=stack.grid.transform, dst_crs=stack.grid.crs,
            resampling=Resampling.bilinear,
        )  # fmt: skip
    found = np.where(sits.valid[0], np.rint(np.nan_to_num(sits.values[0, 0]) * 1e4), 0)
    np.testing.assert_array_equal(found > 0, expected > 0)
    # GDAL interpolates coordinates to an eighth of a pixel by default.
    assert np.abs(found - expected).max() <= 1
    assert (found == expected).mean() > 0.95
    assert (expected > 0).mean() > 0.8
    # And by hand, away from the edge: PROJ's coordinates, four neighbours.
    rows, columns = np.mgrid[0 : stack.grid.height, 0 : stack.grid.width].reshape(2, -1)
    xs, ys = stack.grid.transform @ (columns + 0.5, rows + 0.5)
    xs, ys = rasterio.warp.transform("EPSG:32631", "EPSG:32632", xs, ys)
    x, y = ~there @ (np.array(xs), np.array(ys))
    left, top = np.floor(x - 0.5).astype(int), np.floor(y - 0.5).astype(int)
    inner = (left >= 0) & (left < 209) & (top >= 0) & (top < 199)
    left, top, u, v = left[inner], top[inner], (x - 0.5 - left)[inner], (y - 0.5 - top)[inner]
    by_hand = (1 - v) * ((1 - u) * data[top, left] + u * data[top, left + 1]) + v * (
        (1 - u) * data[top + 1, left] + u * data[top + 1, left + 1]
    )
    assert inner.sum() > 30_000
    assert np.abs(found.ravel()[inner] - by_hand).max() < 0.501
    for window in (Window(3, 5, 70, 33), Window(100, 90, 60, 64)):
        part = read(stack, window)
        (top, bottom), (left, right) = window.toranges()
        np.testing.assert_array_equal(part.values, sits.values[..., top:bottom, left:right])


def test_tiles_of_one_lattice_become_one_without_a_seam(tmp_path: Path) -> None:
    complete = smooth(20, 30, 5e5, 5.6e6, 10).astype(np.uint16)
    files = []
    for name, part, left in (("west", complete[:, :18], 0), ("east", complete[:, 12:], 12)):
        files.append(
            write(
                tmp_path / f"{name}_20210105.tif", np.stack([part] * 4), descriptions=BANDS,
                transform=FINE @ Affine.translation(left, 0), nodata=0,
            )
        )  # fmt: skip
    with pytest.raises(GridMismatch, match="grid=finest"):
        opened(files)
    stack = opened(files, grid="finest", mask="none")
    sits = read(stack)
    assert (stack.grid.width, stack.grid.height, stack.observations) == (30, 20, 1)
    assert sits.valid.all()
    np.testing.assert_array_equal(np.rint(sits.values[0, 0] * 1e4), complete)
    # They are copied pixel by pixel, so nothing was resampled.
    assert [warning.code for warning in stack.warnings] == ["merged_dates"]


def test_masks_of_tiles_are_unclear_where_they_end(tmp_path: Path) -> None:
    # Zero is "clear" to QA60; beyond the mask's end nothing is known.
    files = [
        write(tmp_path / "20210105.tif", pixels(4, 4, 6), descriptions=BANDS, nodata=0),
        write(tmp_path / "20210105_QA60.tif", np.zeros((1, 4, 3), np.uint16)),
    ]
    stack = opened(files, grid="20210105.tif")
    assert read(stack).valid[0].tolist() == [[True] * 3 + [False] * 3] * 4


def test_the_grid_of_a_file_may_be_taken_though_the_file_is_not_used(tmp_path: Path) -> None:
    files = [
        write(tmp_path / "20210105.tif", pixels(4, 8, 8), descriptions=BANDS),
        write(
            tmp_path / "parcels.tif", np.zeros((1, 3, 2), np.uint8),
            transform=FINE @ Affine.translation(4, 2),
        ),
    ]  # fmt: skip
    stack = opened(files, grid="parcels.tif", mask="none")
    assert (stack.grid.width, stack.grid.height) == (2, 3)
    with rasterio.open(files[0].path) as raster:
        expected = raster.read(window=Window(4, 2, 2, 3))
    np.testing.assert_array_equal(np.rint(read(stack).values[0] * 1e4), expected)


@pytest.mark.parametrize(
    "grid", ["other.tif", "EPSG:32631", "EPSG:32631@0", "EPSG:32631@x", "EPSG:999999@10", "fine"]
)
def test_a_grid_that_names_nothing_is_refused(tmp_path: Path, grid: str) -> None:
    file = write(tmp_path / "20210105.tif", pixels(4, 8, 8), descriptions=BANDS)
    with pytest.raises(InvalidRequest) as caught:
        opened([file], grid=grid)
    assert caught.value.errors[0]["field"] == "grid"


# --- a part ---------------------------------------------------------------------------------


def lonlat(x: float, y: float) -> tuple[float, float]:
    (lon,), (lat,) = rasterio.warp.transform("EPSG:32631", "EPSG:4326", [x], [y])
    return lon, lat


def test_a_box_is_that_part_of_the_whole(tmp_path: Path) -> None:
    files = [
        write(tmp_path / f"2021010{t}.tif", pixels(4, 40, 50), descriptions=BANDS) for t in (1, 2)
    ]
    complete = read(opened(files, mask="none"))
    west, south = lonlat(5e5 + 105, 5.6e6 - 295)
    east, north = lonlat(5e5 + 305, 5.6e6 - 55)
    stack = opened(files, bbox=(west, south, east, north), mask="none")
    assert stack.warnings == ()
    left, top = (
        round((stack.grid.transform.c - 5e5) / 10),
        round((5.6e6 - stack.grid.transform.f) / 10),
    )
    assert (left, top, stack.grid.width, stack.grid.height) == (10, 5, 21, 25)
    part = read(stack)
    np.testing.assert_array_equal(part.values, complete.values[..., 5:30, 10:31])
    with StackReader(stack) as reader:
        points = reader.read_pixels([0, 24], [3, 20])
    np.testing.assert_array_equal(points.values, part.values[..., [0, 24], [3, 20]])


def test_an_area_is_read_inside_its_polygon_alone(tmp_path: Path) -> None:
    file = write(tmp_path / "20210105.tif", pixels(4, 40, 50), descriptions=BANDS)
    corners = [(5e5 + 100, 5.6e6 - 100), (5e5 + 300, 5.6e6 - 100), (5e5 + 100, 5.6e6 - 300)]
    ring = [list(lonlat(*corner)) for corner in (*corners, corners[0])]
    stack = opened([file], area={"type": "Polygon", "coordinates": [ring]}, mask="none")
    rows, columns = np.mgrid[0 : stack.grid.height, 0 : stack.grid.width] + 0.5
    xs, ys = stack.grid.transform @ (columns, rows)
    inside = (xs > 5e5 + 100) & (ys < 5.6e6 - 100) & ((xs - 5e5 - 100) + (5.6e6 - 100 - ys) < 200)
    found = read(stack).valid[0]
    # Pixels whose centre lies on the slanted edge itself may go either way.
    edge = np.isclose((xs - 5e5 - 100) + (5.6e6 - 100 - ys), 200, atol=0.5)
    np.testing.assert_array_equal(found[~edge], inside[~edge])
    part = read(stack, Window(3, 4, 9, 8)).valid[0]
    np.testing.assert_array_equal(part, found[4:12, 3:12])


def test_a_box_elsewhere_says_where_the_files_lie(tmp_path: Path) -> None:
    file = write(tmp_path / "20210105.tif", pixels(4, 8, 8), descriptions=BANDS)
    with pytest.raises(InvalidRequest, match=r"which cover \(3, 50\.5") as caught:
        opened([file], bbox=(10.0, 50.0, 11.0, 51.0))
    assert caught.value.errors[0]["field"] == "bbox"


def test_a_box_across_the_antimeridian(tmp_path: Path) -> None:
    # Zone 60 reaches to 180 degrees east, and a little over.
    transform = Affine(10, 0, 608_000, 0, -10, 7_800_000)
    file = write(
        tmp_path / "20210105.tif", pixels(4, 300, 900), descriptions=BANDS, crs="EPSG:32660",
        transform=transform,
    )  # fmt: skip
    stack = opened([file], bbox=(179.99, 70.0, -179.9, 70.5), mask="none")
    xs, _ = rasterio.warp.transform("EPSG:4326", "EPSG:32660", [179.99], [70.5])
    assert 0 < stack.grid.width < 900
    assert abs(stack.grid.transform.c - xs[0]) < 1000


def part_of_fiji(path: Path, crs: str, left: float, **how: object) -> SourceFile:
    """40 x 40 pixels at 16.5 degrees south, from a longitude on."""
    size = 1e-4 if crs == "EPSG:4326" else 10
    (x,), (y,) = rasterio.warp.transform("EPSG:4326", crs, [left], [-16.5])
    transform = Affine(size, 0, left if crs == "EPSG:4326" else round(x, -1), 0, -size, y)
    return write(path, pixels(4, 40, 40), descriptions=BANDS, crs=crs, transform=transform,
                 nodata=0, **how)  # fmt: skip


def test_tiles_on_both_sides_of_the_antimeridian_are_neighbours(tmp_path: Path) -> None:
    """In degrees the second tile lies beyond 180, and not a turn around the Earth to the west."""
    west = part_of_fiji(tmp_path / "T60_20210105.tif", "EPSG:32660", 179.997)
    east = part_of_fiji(tmp_path / "T01_20210105.tif", "EPSG:32601", -179.9995)
    for files in ([west, east], [east, west]):
        stack = opened(files, grid="EPSG:4326@0.0001", mask="none")
        assert 70 < stack.grid.width < 100
        values = read(stack).values[0, 0]
        # Both tiles are there, side by side, and meet but for what their slant leaves out.
        assert not np.isnan(values[12:28, 4:-6]).any()


@pytest.mark.parametrize("left", [179.998, 359.99])
def test_parts_of_degrees_beyond_180(tmp_path: Path, left: float) -> None:
    file = part_of_fiji(tmp_path / "20210105.tif", "EPSG:4326", left)
    west, east = left + 0.0005 - 360, left + 0.0035 - 360
    whole = read(opened([file], mask="none")).values
    if left < 180:  # the box lies across the antimeridian
        west += 360
    south, north = -16.503, -16.501
    stack = opened([file], bbox=(west, south, east, north), mask="none")
    assert (stack.grid.width, stack.grid.height) == (30, 20)
    np.testing.assert_array_equal(read(stack).values, whole[:, :, 10:30, 5:35])
    rings = [[[west, south], [east, south], [east, north], [west, north], [west, south]]]
    area = {"type": "Polygon", "coordinates": rings}
    if left < 180:  # cut there, as RFC 7946 requires it
        area = {"type": "MultiPolygon", "coordinates": [
            [[[x, south], [y, south], [y, north], [x, north], [x, south]]]
            for x, y in ((west, 180), (-180, east))
        ]}  # fmt: skip
    found = read(opened([file], area=area, mask="none"))
    np.testing.assert_array_equal(found.values, whole[:, :, 10:30, 5:35])


@pytest.mark.parametrize("angle", [0, 30, 90, 180])
def test_turned_and_south_up_files_lie_where_they_are(tmp_path: Path, angle: int) -> None:
    """A file's own rows need not run south: each pixel of the grid has the value under it."""
    turn = Affine.translation(503_000, 5_603_000) @ Affine.rotation(angle) @ Affine.scale(10, 10)
    x, y = turn @ (np.mgrid[0:40, 0:40][::-1] + 0.5)
    data = np.stack([1000 + (x - 502_000) / 2 + (y - 5_602_000) / 4] * 4).astype(np.uint16)
    file = write(tmp_path / "20210105.tif", data, descriptions=BANDS, transform=turn, nodata=0)
    stack = opened([file], grid="EPSG:32631@10", mask="none")
    values = read(stack).values[0, 0] * 1e4
    at = np.mgrid[0 : stack.grid.height, 0 : stack.grid.width][::-1] + 0.5
    x, y = stack.grid.transform @ at
    there = ~np.isnan(values)
    assert there.sum() > 1400
    expected = 1000 + (x - 502_000) / 2 + (y - 5_602_000) / 4
    inner = there[2:-2, 2:-2]
    away = np.abs(values - expected)[2:-2, 2:-2][inner]
    assert np.median(away) <= 1
    # As it lies, nothing is resampled.
    np.testing.assert_allclose(read(opened([file], mask="none")).values[0, 0] * 1e4, data[0])


# --- real files -----------------------------------------------------------------------------


@pytest.mark.slow
def test_flanders_at_10_and_20_m(shared_data: Path) -> None:
    """SCL and the 20 m bands in files of their own give what the 10 m files hold."""
    days = ("20180114", "20180421", "20180630")
    fine = [next((shared_data / "flanders_2017_2018").glob(f"S2_*_{day}_*.tif")) for day in days]
    coarse = [
        next((shared_data / "flanders_2017_2018_20m").glob(f"S2_*_{day}_*.tif")) for day in days
    ]
    files = [SourceFile(name=path.name, path=path) for path in (*fine, *coarse)]
    stack = opened(files, bands=("B02", "B04", "B08", "B11"))
    assert (stack.grid.height, stack.grid.width, stack.mask) == (64, 64, "scl")
    assert "resampled" in [warning.code for warning in stack.warnings]
    sits = read(stack)
    for t, (ten, twenty) in enumerate(zip(fine, coarse, strict=True)):
        with rasterio.open(ten) as raster:
            np.testing.assert_array_equal(np.rint(sits.values[t, 0] * 1e4), raster.read(1))
        with rasterio.open(twenty) as raster:
            number = raster.descriptions.index("B11") + 1
            expected = np.zeros((64, 64), np.uint16)
            rasterio.warp.reproject(
                rasterio.band(raster, number), expected, src_nodata=0, dst_nodata=0,
                dst_transform=stack.grid.transform, dst_crs=stack.grid.crs,
                resampling=Resampling.bilinear,
            )  # fmt: skip
        np.testing.assert_array_equal(np.rint(sits.values[t, 3] * 1e4), expected)

"""Windows of values and valid, against numpy on what plain rasterio wrote and reads."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.windows import Window

from service.errors import GridMismatch, InvalidRequest
from service.infer.patches import median_composite
from service.read import reader as reading
from service.read import stack as stacks
from service.read.buffers import BufferPool, spaced
from service.read.geotiff import BlockCache, SourceFile
from service.read.layouts import StackOptions
from service.read.reader import StackReader
from service.read.reflectance import BROWSER
from service.read.stack import Sits, Stack, open_stack
from tests.kits.rasters import UTM, write

BANDS = ("B02", "B04", "B08")
D1, D2 = date(2021, 1, 5), date(2021, 1, 15)


def scene(path: Path, pixels: np.ndarray, names: Sequence[str] = BANDS, **how) -> SourceFile:
    return write(path, pixels, descriptions=names, **how)


def opened(*files: SourceFile, bands: Sequence[str] = BANDS, **options) -> Stack:
    return open_stack(files, StackOptions(**options), bands=bands, max_bytes=2**30)


def read(stack: Stack, window: Window | None = None, used: Sequence[int] | None = None) -> Sits:
    with StackReader(stack, used) as reader:
        return reader.read(window or Window(0, 0, stack.grid.width, stack.grid.height))


def numbers(height: int = 6, width: int = 5, dtype: str = "uint16", seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(1, 9000, (3, height, width)).astype(dtype)


def test_values_are_reflectance_in_float32_and_order(tmp_path: Path) -> None:
    pixels = [numbers(seed=t) for t in (1, 2)]
    files = [scene(tmp_path / f"2021010{t}.tif", p) for t, p in enumerate(pixels, start=1)]
    sits = read(opened(*files))
    assert sits.values.shape == (2, 3, 6, 5)
    assert sits.values.dtype == np.float32
    assert sits.values[1, 2].flags.c_contiguous
    assert sits.valid.shape == (2, 6, 5)
    assert sits.valid.dtype == np.bool_
    assert sits.valid.all()
    np.testing.assert_allclose(sits.values, np.stack(pixels) * 1e-4, rtol=1e-6)


def test_a_recycled_windows_memory_is_reused_without_its_content(
    tmp_path: Path,
) -> None:
    first, second = numbers(64, 64, seed=1), numbers(64, 64, seed=2)
    first[:, :32], second[:, 32:] = 0, 0  # missing in the one half, and in the other
    stack = opened(
        scene(tmp_path / "20210101.tif", first), scene(tmp_path / "20210102.tif", second)
    )
    upper, lower, edge = Window(0, 0, 64, 32), Window(0, 32, 64, 32), Window(3, 60, 61, 4)
    buffers = BufferPool()
    with StackReader(stack, buffers=buffers) as reader:
        kept, gone = reader.read(upper), reader.read(lower)
        before = kept.values.copy(), kept.valid.copy()
        buffers.give_back(gone.values, gone.valid)
        small = reader.read(edge)
        assert np.shares_memory(small.values, gone.values)
        buffers.give_back(small.values, small.valid)
        again = reader.read(lower)
        assert np.shares_memory(again.values, gone.values)
        np.testing.assert_array_equal(kept.values, before[0])
        np.testing.assert_array_equal(kept.valid, before[1])
    fresh = read(stack, lower)
    np.testing.assert_array_equal(again.values, fresh.values)
    np.testing.assert_array_equal(again.valid, fresh.valid)


@pytest.mark.parametrize("kind", [np.float32, np.bool_])
@pytest.mark.parametrize("plane", [(256, 256), (7, 9), (65536,), (1,)])
def test_planes_lie_an_odd_number_of_cache_lines_apart(kind, plane: tuple[int, ...]) -> None:
    array = spaced((5, 3), plane, kind)
    assert array.shape == (5, 3, *plane)
    assert array.strides[1] % 128 == 64
    assert array.strides[0] == 3 * array.strides[1]
    assert array[4, 2].flags.c_contiguous
    assert array.reshape(5, 3, -1).base is array.base  # a view still


def test_dates_used_are_in_the_requested_order(tmp_path: Path) -> None:
    pixels = [numbers(seed=t) for t in range(4)]
    files = [scene(tmp_path / f"2021010{t + 1}.tif", p) for t, p in enumerate(pixels)]
    sits = read(opened(*files), used=[3, 1])
    np.testing.assert_allclose(sits.values, np.stack([pixels[3], pixels[1]]) * 1e-4, rtol=1e-6)
    none = read(opened(*files), used=[])
    assert none.values.shape == (0, 3, 6, 5)


def test_bands_of_file_per_band_may_be_read_in_part(tmp_path: Path) -> None:
    pixels = np.random.default_rng(3).uniform(0, 1, (3, 7, 4, 4))
    files = [
        write(tmp_path / f"{name}.tif", pixels[c], interleave="pixel")
        for c, name in enumerate(("blue", "red", "nir"))
    ]
    days = tuple(date(2021, m, 1) for m in range(1, 8))
    sits = read(opened(*files, dates=days), Window(1, 0, 2, 3), used=[6, 0, 3])
    np.testing.assert_allclose(sits.values, pixels[:, [6, 0, 3], :3, 1:3].swapaxes(0, 1), rtol=1e-6)


# --- scale and offset -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "how", "options", "scale", "offset"),
    [
        ("uint16", {}, {}, 1e-4, 0),
        ("int16", {}, {}, 1e-4, 0),
        ("float32", {}, {}, 1, 0),
        ("float64", {}, {}, 1, 0),
        ("uint16", {"tags": {"scale": "0.0002"}}, {}, 2e-4, 0),
        ("uint16", {"tags": {"scale": "0.0002", "offset": "-0.1"}}, {}, 2e-4, -0.1),
        ("uint16", {"tags": {"scale_factor": "0.0002", "add_offset": "-0.1"}}, {}, 2e-4, -0.1),
        ("uint16", {"tags": {"scale": "none"}}, {}, 1e-4, 0),
        # A decimal comma, a list for all bands, an offset in the numbers stored.
        ("uint16", {"tags": {"scale": "0,0002", "offset": "-0,1"}}, {}, 2e-4, -0.1),
        ("uint16", {"tags": {"scale": "[2e-4, 2e-4]", "offset": "(-0.1,)"}}, {}, 2e-4, -0.1),
        ("uint16", {"tags": {"scale": "0.0002", "add_offset": "-1000"}}, {}, 2e-4, -0.2),
        ("uint16", {"scales": (3e-4,) * 3, "offsets": (-1000,) * 3}, {}, 3e-4, -0.3),
        ("uint16", {"tags": {"scale": "0"}}, {}, 1e-4, 0),
        ("uint16", {"scales": (3e-4,) * 3, "offsets": (-0.1,) * 3}, {}, 3e-4, -0.1),
        ("uint16", {"scales": (3e-4,) * 3, "tags": {"scale": "1"}}, {}, 3e-4, 0),
        ("uint16", {"offsets": (-0.1,) * 3}, {}, 1e-4, -0.1),
        ("uint16", {"scales": (3e-4,) * 3, "offsets": (-0.1,) * 3}, {"scale": 1e-3}, 1e-3, -0.1),
        ("uint16", {"scales": (3e-4,) * 3}, {"scale": 1e-3, "offset": 0.5}, 1e-3, 0.5),
        ("float32", {}, {"scale": 0.01, "offset": 0.5}, 0.01, 0.5),
    ],
)
def test_scale_and_offset(
    tmp_path: Path, dtype: str, how: dict, options: dict, scale: float, offset: float
) -> None:
    pixels = numbers(dtype=dtype)
    stack = opened(scene(tmp_path / "20210105.tif", pixels, **how), **options)
    assert (stack.scale, stack.offset) == pytest.approx((scale, offset))
    expected = pixels.astype(np.float64) * scale + offset
    np.testing.assert_allclose(read(stack).values[0], expected, rtol=1e-5, atol=1e-7)


def test_each_file_and_band_has_its_own_scale(tmp_path: Path) -> None:
    pixels = numbers()
    files = [
        scene(tmp_path / "20210105.tif", pixels),
        scene(tmp_path / "20210115.tif", (pixels * 1e-4).astype("float32")),
        scene(tmp_path / "20210125.tif", pixels, band_tags={2: {"scale": "0.001"}}),
        scene(tmp_path / "20210204.tif", pixels, tags={"scale": "0.0001, 0.001, 0.0001"}),
    ]
    stack = opened(*files)
    assert stack.scale == 1e-4
    factors = np.array([1e-4, 1e-3, 1e-4])[:, None, None]
    expected = np.stack([pixels * 1e-4, pixels * 1e-4, pixels * factors, pixels * factors])
    np.testing.assert_allclose(read(stack).values, expected, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "full"), [("uint16", 65535), ("uint8", 255), ("float32", 1)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("clock", ["00_00", "00:00", "00-00"])
def test_raw_bands_of_the_copernicus_browser_are_read_by_their_number_type(
    tmp_path: Path, dtype: str, full: int, masked: bool, clock: str
) -> None:
    day = f"2021-01-05-{clock}_2021-01-05-{clock.replace('00', '23')}_Sentinel-2_L2A"
    files = []
    for band, level in zip(BANDS, (0.04, 0.06, 0.4), strict=True):
        pixels = np.full((1 + masked, 4, 4), round(level * full) if full > 1 else level, dtype)
        if masked:  # dataMask
            pixels[1] = 1
            pixels[1, 0, 0] = 0
        file = write(tmp_path / f"{band}-{dtype}.tif", pixels)
        files.append(SourceFile(name=f"{day}_{band}_(Raw).tiff", path=file.path))
    stack = opened(*files)
    sits = read(stack)
    np.testing.assert_allclose(sits.values[0, :, 1, 1], (0.04, 0.06, 0.4), atol=0.5 / full)
    assert sits.valid[0, 0, 0] == (not masked)
    # They are harmonised, and 8 bits are coarse.
    assert {plane.offset_source for plane in stack.acquisitions[0].planes} == {BROWSER}
    coarse = [warning.detail for warning in stack.warnings if warning.code == "scale_suspected"]
    assert [("in steps of 0.0039" in detail) for detail in coarse] == [True] * (dtype == "uint8")


@pytest.mark.parametrize(
    ("field", "value"),
    [("scale", 0.0), ("scale", float("nan")), ("scale", float("inf")), ("offset", float("nan"))],
)
def test_an_invalid_scale_is_rejected(tmp_path: Path, field: str, value: float) -> None:
    with pytest.raises(InvalidRequest) as caught:
        opened(scene(tmp_path / "20210105.tif", numbers()), **{field: value})
    assert caught.value.errors[0]["field"] == field


def test_no_files_are_an_error() -> None:
    with pytest.raises(InvalidRequest, match="files"):
        opened()


# --- what is missing ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "nodata"),
    [
        ("uint16", 0),
        ("uint16", 65535),
        ("int16", -9999),
        ("float32", -9999),
        ("float32", -3.4028234663852886e38),
        ("float32", 0.1),
        ("float64", -1.7e308),
        ("float64", float("nan")),
        ("float32", float("nan")),
    ],
)
def test_nodata_is_compared_before_scaling(tmp_path: Path, dtype: str, nodata: float) -> None:
    pixels = numbers(dtype=dtype)
    pixels[1, 2, 3] = nodata
    file = scene(tmp_path / "20210105.tif", pixels, nodata=nodata, tags={"offset": "0.5"})
    sits = read(opened(file))
    assert not sits.valid[0, 2, 3]
    assert np.isnan(sits.values[0, :, 2, 3]).all()
    assert (~sits.valid).sum() == 1
    assert np.isnan(sits.values).sum() == 3


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -3.4e38, 1e35])
def test_numbers_that_cannot_be_reflectance_are_missing_without_a_tag(
    tmp_path: Path, value: float
) -> None:
    pixels = numbers(dtype="float32")
    pixels[0, 1, 1] = value
    sits = read(opened(scene(tmp_path / "20210105.tif", pixels)))
    assert np.argwhere(~sits.valid).tolist() == [[0, 1, 1]]
    assert np.isnan(sits.values[0, :, 1, 1]).all()


def test_integers_that_a_scale_makes_no_reflectance_are_missing(tmp_path: Path) -> None:
    pixels = numbers()
    pixels[:, 2:] = 1
    for name, scales in (("none", (1e29,) * 3), ("nan", (np.nan, 1e-4, 1e-4))):
        (tmp_path / name).mkdir()
        stack = opened(scene(tmp_path / name / "20210105.tif", pixels, scales=scales))
        valid = read(stack).valid[0]
        assert not valid[:2].any()
        assert valid[2:].all() == (name == "none")


def test_nodata_that_the_number_type_cannot_hold_means_nothing(tmp_path: Path) -> None:
    pixels = numbers()
    file = scene(tmp_path / "20210105.tif", pixels, nodata=12345)
    content = file.path.read_bytes()
    assert b"12345" in content
    for text in (b"-9999", b"70000", b"3.5\0\0", b"1e999"):
        file.path.write_bytes(content.replace(b"12345", text))
        assert read(opened(file)).valid.all()


def test_integers_all_zero_are_missing_and_one_zero_is_dark(tmp_path: Path) -> None:
    pixels = numbers()
    pixels[:, 0, 0] = 0
    pixels[1, 1, 1] = 0
    sits = read(opened(scene(tmp_path / "20210105.tif", pixels)))
    assert np.argwhere(~sits.valid).tolist() == [[0, 0, 0]]
    assert np.isnan(sits.values[0, :, 0, 0]).all()
    assert sits.values[0, 1, 1, 1] == 0


def test_zeros_of_bands_that_are_not_needed_do_not_count(tmp_path: Path) -> None:
    pixels = np.concatenate([np.zeros((1, 6, 5), np.uint16), numbers()])
    pixels[1:, 0, 0] = 0
    pixels[0, 0, 0] = 77
    sits = read(opened(scene(tmp_path / "20210105.tif", pixels, ("B11", *BANDS))))
    assert np.argwhere(~sits.valid).tolist() == [[0, 0, 0]]


def test_float_zeros_in_all_bands_are_missing_as_in_integers(tmp_path: Path) -> None:
    pixels = np.zeros((3, 2, 2), np.float32)
    pixels[0, 1, 1] = 0.1
    sits = read(opened(scene(tmp_path / "20210105.tif", pixels)))
    assert sits.valid.tolist() == [[[False, False], [False, True]]]


def test_an_internal_mask_counts(tmp_path: Path) -> None:
    mask = np.full((6, 5), 255, np.uint8)
    mask[4, 2] = 0
    sits = read(opened(scene(tmp_path / "20210105.tif", numbers(), mask=mask)))
    assert np.argwhere(~sits.valid).tolist() == [[0, 4, 2]]


def test_a_fourth_band_is_not_alpha(tmp_path: Path) -> None:
    pixels = np.full((4, 3, 3), 90, np.uint8)
    pixels[3] = 0
    file = scene(tmp_path / "20210105.tif", pixels, ("B02", "B03", "B04", "B08"))
    assert read(opened(file)).valid.all()


def test_the_scene_classification_decides_what_is_clear(tmp_path: Path) -> None:
    scl = np.arange(12, dtype=np.uint16).reshape(1, 3, 4)
    pixels = np.concatenate([numbers(3, 4), scl])
    file = scene(tmp_path / "20210105.tif", pixels, (*BANDS, "SCL"), tags={"scale": "0.5"})
    stack = opened(file)
    sits = read(stack)
    assert stack.mask == "scl"
    assert np.flatnonzero(sits.valid).tolist() == [4, 5, 6, 7]
    assert not np.isnan(sits.values).any()  # a cloud keeps its values
    assert read(opened(file, mask="none")).valid.all()


# --- files of one date ----------------------------------------------------------------------


def test_the_first_clear_value_counts(tmp_path: Path) -> None:
    granules = [np.concatenate([numbers(seed=n), np.full((1, 6, 5), 4, np.uint16)]) for n in (1, 2)]
    granules[0][:, :, 3:] = 0  # half empty
    granules[1][:, :, :2] = 0
    granules[0][3, 0, 0] = 9  # cloud in the first, nothing in the second
    granules[0][3, 1, 2] = 9  # cloud in the first, clear in the second
    other = np.concatenate([numbers(seed=3), np.full((1, 6, 5), 4, np.uint16)])
    names = (*BANDS, "SCL")
    files = [
        scene(tmp_path / "a_20210105.tif", granules[0], names),
        scene(tmp_path / "20210115.tif", other, names),
        scene(tmp_path / "b_20210105.tif", granules[1], names),
    ]
    stack = opened(*files)
    assert [warning.code for warning in stack.warnings] == ["merged_dates"]
    sits = read(stack)
    expected = np.where(np.arange(5) < 3, granules[0][:3], granules[1][:3])
    expected[:, 1, 2] = granules[1][:3, 1, 2]
    clear = np.ones((6, 5), bool)
    clear[0, 0] = False
    np.testing.assert_array_equal(sits.valid, np.stack([clear, np.ones_like(clear)]))
    np.testing.assert_allclose(sits.values[0][:, clear], expected[:, clear] * 1e-4, rtol=1e-6)
    np.testing.assert_allclose(sits.values[1], other[:3] * 1e-4, rtol=1e-6)
    later = read(stack, used=[1])
    np.testing.assert_array_equal(later.values[0], sits.values[1])


# --- windows and points ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Stack, np.ndarray]:
    """Two dates of 70 x 90 pixels, tiled and in strips, with a hole."""
    folder = tmp_path_factory.mktemp("tiled")
    pixels = [numbers(70, 90, seed=t) for t in (1, 2)]
    pixels[0][:, 20:40, 30:60] = 0
    files = [
        scene(
            folder / "20210105.tif",
            pixels[0],
            tiled=True,
            blockxsize=16,
            blockysize=32,
            compress="deflate",
        ),
        scene(folder / "20210115.tif", pixels[1], compress="lzw", interleave="band"),
    ]
    return opened(*files), np.stack(pixels)


def test_the_block_is_the_largest_of_the_files(tiled: tuple[Stack, np.ndarray]) -> None:
    rows, columns = tiled[0].block
    assert rows >= 32
    assert columns == 90


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_window_is_that_part_of_the_whole(
    tiled: tuple[Stack, np.ndarray], data: st.DataObject
) -> None:
    stack, pixels = tiled
    top, left = data.draw(st.integers(0, 69)), data.draw(st.integers(0, 89))
    height, width = data.draw(st.integers(1, 70 - top)), data.draw(st.integers(1, 90 - left))
    part = pixels[:, :, top : top + height, left : left + width]
    missing = (part == 0).all(axis=1)
    sits = read(stack, Window(left, top, width, height))
    np.testing.assert_array_equal(sits.valid, ~missing)
    expected = np.where(missing[:, None], np.nan, part * 1e-4)
    np.testing.assert_allclose(sits.values, expected, rtol=1e-6)


@pytest.mark.parametrize("cell", [256, 16])
def test_points_are_the_pixels_of_the_whole(
    tiled: tuple[Stack, np.ndarray], monkeypatch: pytest.MonkeyPatch, cell: int
) -> None:
    monkeypatch.setattr(reading, "_CELL", cell)
    stack, _ = tiled
    rng = np.random.default_rng(1)
    rows, columns = rng.integers(0, 70, 60), rng.integers(0, 90, 60)
    rows[:2], columns[:2] = 30, 40  # the same pixel twice, and it is missing on one date
    complete = read(stack)
    with StackReader(stack, [1, 0]) as reader:
        sits = reader.read_pixels(rows, columns)
    assert sits.values.shape == (2, 3, 60)
    assert sits.valid.shape == (2, 60)
    np.testing.assert_array_equal(sits.values, complete.values[::-1][:, :, rows, columns])
    np.testing.assert_array_equal(sits.valid, complete.valid[::-1][:, rows, columns])


def test_no_points_give_nothing(tiled: tuple[Stack, np.ndarray]) -> None:
    with StackReader(tiled[0]) as reader:
        assert reader.read_pixels([], []).values.shape == (2, 3, 0)


@pytest.mark.parametrize("window", [Window(-1, 0, 5, 5), Window(80, 0, 20, 5), Window(0, 0, 0, 5)])
def test_a_window_outside_the_grid_is_an_error(
    tiled: tuple[Stack, np.ndarray], window: Window
) -> None:
    with StackReader(tiled[0]) as reader, pytest.raises(ValueError, match="70 rows x 90 columns"):
        reader.read(window)


def test_more_files_than_may_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_files_kept_open", lambda: 3)
    pixels = [numbers(seed=t) for t in range(7)]
    files = [scene(tmp_path / f"2021010{t + 1}.tif", p) for t, p in enumerate(pixels)]
    with StackReader(opened(*files)) as reader:
        for _ in range(2):
            sits = reader.read(Window(0, 0, 5, 6))
            np.testing.assert_allclose(sits.values, np.stack(pixels) * 1e-4, rtol=1e-6)
            assert len(reader._open) == 3
    assert not reader._open


def test_many_small_files_are_read_in_threads_and_in_order(tmp_path: Path) -> None:
    pixels = [numbers(seed=t) for t in range(28)]
    files = [scene(tmp_path / f"202101{t + 1:02d}.tif", p) for t, p in enumerate(pixels)]
    stack = opened(*files)
    with StackReader(stack) as reader:
        for _ in range(2):  # opened by one thread, the second time perhaps read by another
            sits = reader.read(Window(0, 0, 5, 6))
            np.testing.assert_allclose(sits.values, np.stack(pixels) * 1e-4, rtol=1e-6)


def test_files_that_hold_one_date_together_are_not_read_at_once(tmp_path: Path) -> None:
    """Two threads that clear bits of one array in place may undo each other's work."""
    pixels = [numbers(seed=t) for t in range(6)]
    together, apart = tmp_path / "together", tmp_path / "apart"
    together.mkdir()
    apart.mkdir()
    for t, bands in enumerate(pixels):
        scene(apart / f"2021010{t + 1}.tif", bands)
        for name, band in zip(BANDS, bands, strict=True):
            scene(together / f"2021010{t + 1}_{name}.tif", band[None], [name])
    one, many = (
        opened(*(SourceFile(name=path.name, path=path) for path in sorted(folder.iterdir())))
        for folder in (apart, together)
    )
    assert [layer.apart for layer in StackReader(one)._layers] == [True]
    assert [layer.apart for layer in StackReader(many)._layers] == [False]
    np.testing.assert_array_equal(read(many).values, read(one).values)


def test_a_stack_opened_here_is_read_in_another_thread(tiled: tuple[Stack, np.ndarray]) -> None:
    here = read(tiled[0])
    found: list[Sits] = []
    stack = pickle.loads(pickle.dumps(tiled[0]))  # noqa: S301 - ours, and what an executor does
    thread = threading.Thread(target=lambda: found.append(read(stack)))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(found[0].values, here.values)


# --- one grid -------------------------------------------------------------------------------

MOVED = Affine(10, 0, 500_020, 0, -10, 5_600_000)


@pytest.mark.parametrize(
    ("how", "both"),
    [
        ({"crs": "EPSG:32632"}, ["EPSG:32632", "EPSG:32631"]),
        ({"transform": MOVED}, ["500020", "500000", "2 pixels"]),
    ],
)
def test_files_on_different_grids_are_rejected(tmp_path: Path, how: dict, both: list[str]) -> None:
    files = [
        scene(tmp_path / "20210105.tif", numbers()),
        scene(tmp_path / "20210115.tif", numbers(), **how),
    ]
    with pytest.raises(GridMismatch) as caught:
        opened(*files)
    for part in ["'20210105.tif'", "'20210115.tif'", *both]:
        assert part in caught.value.detail


def test_a_mismatch_names_the_file_that_differs_from_most(tmp_path: Path) -> None:
    """The first file alone has the wrong CRS."""
    files = [
        scene(tmp_path / "20210105.tif", numbers(), crs="EPSG:32632"),
        *(scene(tmp_path / f"20210{month}15.tif", numbers()) for month in range(1, 5)),
    ]
    with pytest.raises(GridMismatch) as caught:
        opened(*files)
    assert caught.value.detail == (
        "'20210105.tif' is not on the grid of '20210115.tif': its CRS is EPSG:32632, not "
        "EPSG:32631 (1 of 5 files differ); grid=EPSG:32631@10 brings all files to one CRS and "
        "pixel size"
    )


def test_a_mismatch_names_a_suitable_grid(tmp_path: Path) -> None:
    files = [
        scene(tmp_path / "20210105.tif", numbers()),
        scene(tmp_path / "20210115.tif", numbers(), transform=MOVED),
    ]
    with pytest.raises(
        GridMismatch, match=r"\(1 of 2 files differ\); grid=finest brings all files"
    ):
        opened(*files)
    assert opened(*files, grid="finest", mask="none").grid.width == 7
    files[1] = scene(tmp_path / "20210125.tif", numbers(), crs="EPSG:32632")
    with pytest.raises(GridMismatch, match=r"grid=EPSG:3263[12]@10 brings"):
        opened(*files)


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        ("EPSG:4326", Affine(1e-4, 0, 4.0, 0, -1e-4, 51.0)),
        (UTM, Affine.translation(5e5, 5.6e6) @ Affine.rotation(20) @ Affine.scale(10, -10)),
        ("+proj=sinu +R=6371007.181 +units=m", Affine(231.6563582, 0, -6e6, 0, -231.6563582, -1e6)),
    ],
)
def test_geographic_rotated_and_nameless_grids_are_read(
    tmp_path: Path, crs: str, transform: Affine
) -> None:
    files = [
        scene(tmp_path / f"2021010{t}.tif", numbers(), crs=crs, transform=transform) for t in (1, 2)
    ]
    stack = opened(*files)
    assert stack.grid.transform.almost_equals(transform, 1e-6)
    assert read(stack).valid.all()
    assert (stack.grid.hectares(Window(0, 0, 1, 6)) > 0).all()


# --- the composite of imagery ---------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 5, 6])
def test_the_composite_is_the_median_of_the_clear(T: int) -> None:
    rng = np.random.default_rng(T)
    values = rng.uniform(0, 1, (T, 3, 8, 9)).astype(np.float32)
    valid = rng.random((T, 8, 9)) < 0.6
    values[(~valid & (rng.random(valid.shape) < 0.5))[:, None].repeat(3, axis=1)] = np.nan
    got = median_composite(values, valid)
    assert got.shape == (3, 8, 9)
    assert got.dtype == np.float32
    for row in range(8):
        for column in range(9):
            clear = valid[:, row, column]
            if clear.any():
                expected = np.median(values[clear][:, :, row, column], axis=0)
                np.testing.assert_allclose(got[:, row, column], expected, rtol=1e-6)
            else:
                assert np.isnan(got[:, row, column]).all()


@pytest.fixture
def decoded() -> list[int]:
    return []


def read_whole(stack: Stack, decoded: list[int]) -> Sits:
    with StackReader(stack, cache=BlockCache(decoded=decoded.append)) as reader:
        return reader.read(Window(0, 0, stack.grid.width, stack.grid.height))


def test_a_small_raster_is_decoded_once_for_all_readers(tmp_path: Path, decoded: list[int]) -> None:
    pixels = [numbers(seed=t) for t in (1, 2)]
    pixels[1][:, 2, 3] = 7
    stack = opened(*(scene(tmp_path / f"2021010{t + 1}.tif", p) for t, p in enumerate(pixels)))
    first = read_whole(stack, decoded)
    assert len(decoded) == 2
    late = stack.acquisitions[1]
    other = tuple(replace(p, scale=1e-3, offset=-0.1, nodata=7) for p in late.planes)
    corrected = replace(stack, acquisitions=(stack.acquisitions[0], replace(late, planes=other)))
    second = read_whole(corrected, decoded)
    assert len(decoded) == 2
    np.testing.assert_array_equal(second.values[0], first.values[0])
    assert not second.valid[1, 2, 3]
    np.testing.assert_allclose(
        second.values[1][:, second.valid[1]],
        (pixels[1] * 1e-3 - 0.1)[:, second.valid[1]],
        rtol=1e-6,
    )


def test_only_small_rasters_are_kept(
    tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "SMALL_SIDE", 5)  # the rasters have 6 rows
    stack = opened(*(scene(tmp_path / f"2021010{t}.tif", numbers()) for t in (1, 2)))
    first, second = read_whole(stack, decoded), read_whole(stack, decoded)
    assert len(decoded) == 4
    np.testing.assert_array_equal(first.values, second.values)


def test_a_stack_keeps_a_bounded_number_of_bytes(
    tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = numbers()
    monkeypatch.setattr(stacks, "KEPT_BYTES", 2 * one.nbytes)
    stack = opened(*(scene(tmp_path / f"2021010{t}.tif", one) for t in (1, 2, 3)))
    first, second = read_whole(stack, decoded), read_whole(stack, decoded)
    assert len(decoded) == 4  # the third file does not fit
    np.testing.assert_array_equal(first.values, second.values)


def test_a_stack_for_another_process_keeps_nothing(tmp_path: Path, decoded: list[int]) -> None:
    stack = opened(scene(tmp_path / "20210101.tif", numbers()))
    first = read_whole(stack, decoded)
    sent = pickle.dumps(stack.kept)  # as to a worker of a cluster
    second = read_whole(replace(stack, kept=pickle.loads(sent)), decoded)  # noqa: S301 - own bytes
    assert len(decoded) == 2
    np.testing.assert_array_equal(first.values, second.values)

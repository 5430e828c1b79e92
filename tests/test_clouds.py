"""The cloud mask made from the series: by hand, against a slow reference, and against SCL."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

import httpx
import numpy as np
import pytest
from rasterio.windows import Window

from benchmarks.serving import served
from benchmarks.tiny_zoo import write_zoo
from service.errors import MissingBands
from service.read import clouds, masks
from service.read.geotiff import SourceFile
from service.read.layouts import StackOptions
from service.read.radiometry import calibrate
from service.read.reader import StackReader
from service.read.stack import Sits, Stack, open_stack
from tests.kits.rasters import write

FLANDERS = Path(__file__).parents[2] / "shared" / "data" / "flanders_2017_2018"
NEEDED = ("B02", "B04", "B08")
# Blue, red and near infrared of what a pixel shows on single dates.
CROP, BARE, WATER = (0.03, 0.03, 0.35), (0.06, 0.10, 0.20), (0.05, 0.04, 0.02)
CLOUD, SHADOW, SNOW = (0.45, 0.46, 0.55), (0.012, 0.012, 0.06), (0.7, 0.72, 0.7)


def judged(*series: tuple[float, ...]) -> list[bool]:
    """The mask of one pixel with these reflectances, date by date."""
    values = np.array(series, np.float32)[:, :, None]
    seen = np.ones((len(series), 1), np.bool_)
    return clouds.clear(*values.transpose(1, 0, 2), seen)[:, 0].tolist()


def test_clouds_shadows_and_snow_of_a_series_are_masked() -> None:
    assert judged(CROP, CROP, CLOUD, CROP, SHADOW, CROP, SNOW, CROP) == [
        True, True, False, True, False, True, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize("ground", [CROP, BARE, WATER])
def test_ground_that_stays_the_same_is_clear(ground: tuple[float, ...]) -> None:
    assert judged(*[ground] * 6) == [True] * 6


def test_a_ploughed_and_growing_field_is_always_clear() -> None:
    growing = np.linspace(BARE, CROP, 8)
    assert judged(*[BARE] * 4, *map(tuple, growing), *[CROP] * 4, *[BARE] * 3) == [True] * 19


def test_a_pixel_with_too_few_dates_is_never_clear() -> None:
    assert judged(*[CROP] * clouds.MIN_DATES) == [True] * clouds.MIN_DATES
    assert judged(*[CROP] * (clouds.MIN_DATES - 1)) == [False] * (clouds.MIN_DATES - 1)


def reference(values: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """One pixel (T, 3) after the other date, in plain arithmetic of double precision."""
    found = np.zeros(len(values), np.float64)
    blue_usual = np.quantile(values[seen, 0], 0.2, method="lower")
    nir_usual = np.quantile(values[seen, 2], 0.25, method="lower")
    for t, (blue, red, nir) in enumerate(values):
        inputs = {
            "": 1.0,
            "blue": blue,
            "nir": nir,
            "ndvi": (nir - red) / (nir + red),
            "colour": abs(blue - red) / (blue + red),
            "usual_blue": blue_usual,
            "blue_gain": np.log((blue + 0.01) / (blue_usual + 0.01)),
            "nir_gain": np.log((nir + 0.01) / (nir_usual + 0.01)),
        }
        found[t] = max(
            sum(weight * inputs[name] for name, weight in weights.items())
            for weights in (clouds.CLOUD, clouds.SHADOW)
        )
    return found


def test_pixels_do_not_affect_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    values = random.uniform(0.02, 0.6, (20, 3, 60)).astype(np.float32)
    seen = random.random((20, 60)) < 0.8
    values[:, :, :][~np.broadcast_to(seen[:, None], values.shape)] = np.nan
    clear = clouds.clear(*values.transpose(1, 0, 2), seen)
    for n in range(60):
        sums = reference(values[:, :, n].astype(np.float64), seen[:, n])
        sure = seen[:, n] & (np.abs(sums) > 1e-3)  # float32 decides what lies at the border
        assert (clear[sure, n] == (sums[sure] < 0)).all()
        assert not clear[~seen[:, n], n].any()
    monkeypatch.setattr(clouds, "_BATCH", 20 * 7)
    assert (clouds.clear(*values.transpose(1, 0, 2), seen) == clear).all()


# Stacks -----------------------------------------------------------------------------------------


def series_of(folder: Path, bands: tuple[str, ...] = NEEDED, dates: int = 9) -> list[SourceFile]:
    """A date a file, 24 x 20 pixels of noisy crops; the third date is cloud on the left half."""
    random = np.random.default_rng(5)
    looks = {"B02": 0, "B03": 0, "B04": 1, "B08": 2, "B8A": 2}
    files = []
    for t in range(dates):
        day = date(2021, 1, 5) + timedelta(days=10 * t)
        pixels = np.empty((len(bands), 24, 20))
        for k, band in enumerate(bands):
            pixels[k] = CROP[looks[band]]
            if t == 2:
                pixels[k, :, :10] = CLOUD[looks[band]]
        pixels *= random.uniform(0.9, 1.1, pixels.shape)
        numbers = (pixels * 10_000).round().astype(np.uint16)
        files.append(write(folder / f"S2_{day}.tif", numbers, descriptions=bands))
    return files


def opened(files: list[SourceFile], mask: str = "cloud", bands: tuple[str, ...] = NEEDED) -> Stack:
    return open_stack(files, StackOptions(mask=mask), bands=bands, max_bytes=10**9)


def whole(stack: Stack) -> Sits:
    with StackReader(stack) as reader:
        return reader.read(Window(0, 0, stack.grid.width, stack.grid.height))


def expected(dates: int = 9) -> np.ndarray:
    clear = np.ones((dates, 24, 20), np.bool_)
    clear[2, :, :10] = False
    return clear


def test_a_stack_is_read_with_the_estimated_cloud_mask(tmp_path: Path) -> None:
    stack = opened(series_of(tmp_path))
    assert (stack.mask, stack.cloud_bands) == ("cloud", ())
    (warning,) = stack.warnings
    assert warning.code == "cloud_mask_estimated"
    sits = whole(stack)
    assert (sits.valid == expected()).all()
    assert not np.isnan(sits.values).any()  # clouds keep their values


def test_windows_and_points_agree_with_the_whole_raster(tmp_path: Path) -> None:
    stack = opened(series_of(tmp_path))
    valid = whole(stack).valid
    with StackReader(stack) as reader:
        for window in (Window(0, 0, 7, 24), Window(7, 3, 13, 11), Window(19, 23, 1, 1)):
            (top, bottom), (left, right) = window.toranges()
            assert (reader.read(window).valid == valid[:, top:bottom, left:right]).all()
        rows, columns = [0, 23, 5], [3, 19, 10]
        assert (reader.read_pixels(rows, columns).valid == valid[:, rows, columns]).all()


def test_bands_that_only_the_mask_needs_are_read_too(tmp_path: Path) -> None:
    files = series_of(tmp_path, ("B02", "B03", "B04", "B8A"))
    bands = ("B02", "B03", "B04")
    stack = calibrate(opened(files, bands=bands))
    assert (stack.bands, stack.cloud_bands) == (bands, ("B08",))
    assert [w.code for w in stack.warnings] == ["band_substituted", "cloud_mask_estimated"]
    sits = whole(stack)
    assert sits.values.shape[1] == 3
    assert (sits.valid == expected()).all()
    without = whole(opened(files, "none", bands))
    assert (sits.values == without.values).all()


def test_a_band_that_the_mask_lacks_is_named(tmp_path: Path) -> None:
    files = series_of(tmp_path, ("B02", "B03", "B04"))
    with pytest.raises(MissingBands, match=r"mask=cloud needs B02, B04, B08, and B08 not found"):
        opened(files, bands=("B02", "B03", "B04"))


def test_a_band_named_cloud_is_used_where_there_is_one(tmp_path: Path) -> None:
    files = []
    for t in range(2):
        pixels = np.full((4, 2, 2), 1000, np.uint16)
        pixels[3] = [[4, 8], [9, 5]]
        path = tmp_path / f"SENTINEL-2_MSI_31UES_2021-01-{5 + t:02d}.tif"
        files.append(write(path, pixels, descriptions=[*NEEDED, "CLOUD"]))
    stack = opened(files)
    assert (stack.mask, stack.cloud_bands, stack.warnings) == ("cloud", None, ())
    assert whole(stack).valid[0].tolist() == [[True, False], [False, True]]


def test_another_mask_counts_as_well(tmp_path: Path) -> None:
    files = series_of(tmp_path)
    for t, file in enumerate(files):
        day = file.name[3:13]
        qa60 = np.zeros((1, 24, 20), np.uint16)
        qa60[:, :, 15:] = 1024 if t == 5 else 0
        write(tmp_path / f"S2_{day}_QA60.tif", qa60)
    files += [SourceFile(name=p.name, path=p) for p in sorted(tmp_path.glob("*_QA60.tif"))]
    stack = opened(files, "qa60,cloud")
    assert stack.mask == "qa60,cloud"
    clear = expected()
    clear[5, :, 15:] = False
    assert (whole(stack).valid == clear).all()


def test_of_two_granules_of_a_day_the_clear_one_is_used(tmp_path: Path) -> None:
    files = series_of(tmp_path)
    numbers = (np.array(CROP) * 10_000).round().astype(np.uint16)
    pixels = np.broadcast_to(numbers[:, None, None], (3, 24, 20))
    third = files[2].name.removesuffix(".tif")
    files.append(write(tmp_path / f"{third}_again.tif", pixels, descriptions=NEEDED))
    sits = whole(opened(files))
    assert sits.valid.all()
    assert sits.values[2, :, 0, 0] == pytest.approx(CROP)


def test_the_warning_of_a_stack_without_a_mask_names_mask_cloud(tmp_path: Path) -> None:
    (warning,) = opened(series_of(tmp_path), "auto").warnings
    assert warning.code == "no_cloud_mask"
    assert "mask=cloud to estimate one from at least 6 dates" in warning.detail


# The service ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with served(model_dir=write_zoo(tmp_path_factory.mktemp("zoo"))) as client:
        yield client


def posted(service: httpx.Client, files: list[SourceFile], **parameters: str) -> dict:
    response = service.post(
        "/classify-pixels",
        files=[("files", (file.name, file.path.read_bytes())) for file in files],
        data=parameters,
        headers={"Accept": "application/json"},
    )
    return {"status": response.status_code, **response.json()}


def test_the_service_accepts_the_mask_and_warns_of_its_errors(
    service: httpx.Client, tmp_path: Path
) -> None:
    files = series_of(tmp_path)
    found = posted(service, files, mask="cloud")
    assert (found["mask"], found["valid_share"]) == ("cloud", 1.0)
    assert "cloud_mask_estimated" in [w["code"] for w in found["warnings"]]


def test_too_few_dates_are_an_error_with_the_number_needed(
    service: httpx.Client, tmp_path: Path
) -> None:
    refused = posted(service, series_of(tmp_path, dates=5), mask="cloud")
    assert (refused["status"], refused["code"]) == (422, "too_few_dates")
    assert "at least 6 dates, and 5 of 5 are used" in refused["detail"]


def test_the_warning_of_no_prediction_counts_with_this_mask(
    service: httpx.Client, tmp_path: Path
) -> None:
    files = []
    for t in range(6):
        pixels = np.broadcast_to(np.array(CLOUD)[:, None, None] * 10_000, (3, 8, 8))
        day = date(2021, 1, 5) + timedelta(days=10 * t)
        path = tmp_path / f"S2_{day}.tif"
        files.append(write(path, pixels.astype(np.uint16), descriptions=NEEDED))
    found = posted(service, files, mask="cloud")
    (warning,) = [w for w in found["warnings"] if w["code"] == "all_missing"]
    assert "has values on 6 and is clear on 0 (mask: cloud)" in warning["detail"]


# Against Sen2Cor --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not FLANDERS.is_dir(), reason="needs ../shared/data/flanders_2017_2018")
def test_flanders_agrees_with_scl() -> None:
    files = [SourceFile(name=p.name, path=p) for p in sorted(FLANDERS.glob("S2_L2A_2018*.tif"))]
    own, by_scl = (whole(opened(files, mask)) for mask in ("cloud", "scl"))
    with StackReader(open_stack(files, StackOptions(mask="none"), bands=("SCL",), max_bytes=10**9)
                     ) as reader:  # fmt: skip
        classes = reader.read(Window(0, 0, 64, 64)).values[:, 0]
    classes = (classes / 0.0001).round()
    assert masks.scl(classes).sum() == by_scl.valid.sum()
    assert (own.valid == by_scl.valid).mean() > 0.85  # without a mask 0.49
    assert own.valid[np.isin(classes, (4, 5, 6))].mean() > 0.98
    assert own.valid[np.isin(classes, (8, 9))].mean() < 0.15
    assert own.valid[classes == 3].mean() < 0.05


def test_what_is_brightened_is_compared_with_the_same_pixels_other_dates() -> None:
    blue = np.random.default_rng(3).uniform(0, 0.6, (9, 40)).astype(np.float32)
    blue[np.random.default_rng(4).random(blue.shape) < 0.3] = np.nan
    blue[1:, 0] = np.nan  # one date
    blue[:, 1] = np.nan
    found = clouds.brightened(blue)
    for (t, n), own in np.ndenumerate(blue):
        seen = np.sort(blue[~np.isnan(blue[:, n]), n])
        usual = seen[int(0.2 * (len(seen) - 1))] if len(seen) > 1 else 0.15
        assert found[t, n] == (own > 0.18 and own > 2 * usual)

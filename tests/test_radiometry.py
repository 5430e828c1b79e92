"""Radiometry checks: values that are rejected, that cause a warning, and that pass."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from datetime import date
from itertools import product
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import rasterio
from rasterio.warp import transform_bounds
from rasterio.windows import Window

from service.api.schemas.forms import RasterForm
from service.errors import ImplausibleReflectance, InvalidRequest, StackWarning
from service.jobs.serialise import request_document, request_of
from service.read.geotiff import SourceFile
from service.read.layouts import StackOptions
from service.read.radiometry import calibrate
from service.read.reader import StackReader
from service.read.stack import Stack, open_stack
from tests.kits.rasters import write

BANDS = ("B02", "B04", "B08")
BEFORE = ("20210105", "20210605", "20220124")
AFTER = ("20220125", "20220605", "20230105")


def opened(files: Sequence[SourceFile], bands: Sequence[str] = BANDS, **options) -> Stack:
    return open_stack(files, StackOptions(**options), bands=bands, dated=False, max_bytes=2**30)


def field(
    path: Path,
    *,
    levels: Sequence[float] = (0.04, 0.06, 0.30),
    side: int = 20,
    add: int = 0,
    dtype: str = "uint16",
    times: float = 10_000,
    **how,
) -> SourceFile:
    """A field of about the reflectance given in blue, red and near infrared.

    Fields of other names differ a little, because no two images have the same pixels.
    """
    rng = np.random.default_rng(0)
    spread = rng.uniform(0.8, 1.2, (3, side, side))
    spread *= np.random.default_rng(crc32(path.stem.encode())).normal(1, 0.002, spread.shape)
    pixels = np.asarray(levels)[:, None, None] * spread * times + add
    return write(path, pixels.astype(dtype), descriptions=BANDS, **how)


def found(stack: Stack, used: Sequence[int] | None = None) -> list[StackWarning]:
    """The warnings that the pixels add to those of the headers."""
    return [w for w in calibrate(stack, used).warnings if w not in stack.warnings]


def codes(stack: Stack, used: Sequence[int] | None = None) -> list[str]:
    return [warning.code for warning in found(stack, used)]


def test_a_plain_field_is_neither(tmp_path: Path) -> None:
    assert codes(opened([field(tmp_path / "20210105.tif")])) == []


@pytest.mark.parametrize(
    ("how", "options", "fix"),
    [
        ({}, {"scale": 1.0}, "scale=0.0001"),
        ({"dtype": "float32"}, {}, "scale=0.0001"),
        ({"dtype": "float32", "times": 100}, {}, "scale=0.01"),
        ({"dtype": "uint8", "times": 255}, {"scale": 1.0}, "percent"),
        ({"dtype": "uint8", "times": 255, "levels": (0.6, 0.7, 0.8)}, {"scale": 1.0}, "8-bit"),
        ({"dtype": "float32", "times": 1, "tags": {"offset": "5"}}, {}, "scale=1 and offset=0"),
        ({"dtype": "int16", "times": 0, "add": -9999}, {}, "no nodata tag"),
        ({"dtype": "uint32", "times": 1e9}, {}, "give the scale and offset"),
    ],
)
def test_implausible_medians_are_refused_with_the_likely_fix(
    tmp_path: Path, how: dict, options: dict, fix: str
) -> None:
    stack = opened([field(tmp_path / "20210105.tif", **how)], **options)
    with pytest.raises(ImplausibleReflectance) as caught:
        calibrate(stack)
    for part in (fix, "-0.2 to 1.6", f"scale {stack.scale:g} and offset {stack.offset:g}"):
        assert part in caught.value.detail


def test_the_message_says_the_median(tmp_path: Path) -> None:
    pixels = np.full((3, 5, 5), 3000, np.uint16)
    file = write(tmp_path / "20210105.tif", pixels, descriptions=BANDS)
    with pytest.raises(ImplausibleReflectance, match="sampled is 3000,"):
        calibrate(opened([file], scale=1.0))


@pytest.mark.parametrize("hidden", [0, 1, 150])
def test_the_message_says_the_median_of_the_clear_pixels_of_the_date(
    tmp_path: Path, hidden: int
) -> None:
    rng = np.random.default_rng(hidden)
    files, pixels = [], np.empty((4, 20, 20), np.uint16)
    for n, day in enumerate(("20210105", "20210115", "20210125", "20210205", "20210215")):
        pixels = rng.uniform(200, 4000, (4, 20, 20)).astype(np.uint16) * (10 if n == 4 else 1)
        pixels[3] = 4
        pixels[3].flat[:hidden] = 9
        files.append(write(tmp_path / f"{day}.tif", pixels, descriptions=(*BANDS, "SCL")))
    median = np.median(pixels[:3].reshape(3, -1)[:, hidden:]) / 10_000
    with pytest.raises(ImplausibleReflectance) as caught:
        calibrate(opened(files))
    assert "'20210215.tif' (2021-02-15): the median of its clear" in caught.value.detail
    stated = re.search(r"sampled is ([\d.]+), outside", caught.value.detail)
    assert stated
    assert float(stated[1]) == pytest.approx(median, abs=0.001)  # it has four digits


@pytest.mark.parametrize("level", [-0.19, 0.0001, 0.9, 1.59])
def test_snow_and_shadow_are_plausible(tmp_path: Path, level: float) -> None:
    pixels = np.full((3, 5, 5), level, np.float32)
    file = write(tmp_path / "20210105.tif", pixels, descriptions=BANDS)
    assert codes(opened([file])) == []


def test_nothing_clear_is_nothing_to_judge(tmp_path: Path) -> None:
    pixels = np.concatenate([np.full((3, 5, 5), 60_000), np.full((1, 5, 5), 9)]).astype("uint16")
    file = write(tmp_path / "20210105.tif", pixels, descriptions=(*BANDS, "SCL"))
    assert codes(opened([file])) == []
    with pytest.raises(ImplausibleReflectance):
        calibrate(opened([file], mask="none"))


def test_only_the_dates_used_are_judged(tmp_path: Path) -> None:
    files = [
        field(tmp_path / "20210105.tif"),
        field(tmp_path / "20210115.tif", times=1e6, dtype="uint32"),
    ]
    stack = opened(files)
    assert codes(stack, [0]) == []
    with pytest.raises(ImplausibleReflectance):
        calibrate(stack, [1])
    assert codes(stack, []) == []


# --- bands_suspected_swapped ----------------------------------------------------------------


def test_red_and_near_infrared_swapped_are_suspected(tmp_path: Path) -> None:
    stack = opened([field(tmp_path / "20210105.tif")], bands=BANDS)
    swapped = open_stack(
        [field(tmp_path / "20210105.tif")],
        StackOptions(bands=("B02", "B08", "B04")),
        bands=BANDS,
        max_bytes=2**30,
    )
    assert codes(stack) == []
    assert codes(swapped) == ["bands_suspected_swapped"]


@pytest.mark.parametrize(
    ("what", "levels"),
    [
        ("water", (0.06, 0.04, 0.02)),
        ("muddy water", (0.10, 0.14, 0.06)),
        ("snow", (0.90, 0.90, 0.85)),
        ("bare soil", (0.10, 0.20, 0.28)),
        ("a roof", (0.15, 0.20, 0.19)),
    ],
)
def test_what_is_dark_in_the_near_infrared_is_not_suspected(
    tmp_path: Path, what: str, levels: tuple[float, ...]
) -> None:
    assert codes(opened([field(tmp_path / "20210105.tif", levels=levels)])) == [], what


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_single_date_whose_dark_end_is_just_below_the_limit(tmp_path: Path) -> None:
    """No other date is there to compare it with."""
    even = write(tmp_path / "a.tif", np.full((3, 20, 20), 890, np.uint16), descriptions=BANDS)
    assert codes(opened([even])) == []


def test_one_date_with_its_bands_swapped_is_named(tmp_path: Path) -> None:
    files = [field(tmp_path / f"2021{n + 4:02d}05.tif") for n in range(6)]
    swapped = opened([*files, field(tmp_path / "20210515.tif", levels=(0.04, 0.30, 0.06))])
    (warning,) = found(swapped)
    assert warning.code == "bands_suspected_swapped"
    assert "'20210515.tif' (2021-05-15): red (B04) is far brighter" in warning.detail
    assert codes(opened(files)) == []


# --- pixels_repeated ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda own, other: own, None),
        (lambda own, other: other, "'20210205.tif' (2021-02-05), '20210305.tif' (2021-03-05) have"),
        (
            lambda own, other: own * [[[1]], [[1]], [[0]]] + 7,
            "all clear pixels sampled of B08 are 7",
        ),
        (lambda own, other: own[[0, 1, 1]], "B04 and B08 are equal in all clear pixels sampled"),
    ],
)
def test_pixels_that_no_two_images_have_alike_are_named(
    tmp_path: Path, change: Callable, said: str | None
) -> None:
    rng = np.random.default_rng(3)
    ground = np.array([400, 500, 3000])[:, None, None]
    dates = [ground + rng.integers(0, 300, (3, 20, 20)) for _ in range(5)]
    dates[2] = change(dates[2], dates[1])
    files = [
        write(tmp_path / f"20210{n}05.tif", own.astype(np.uint16), descriptions=BANDS)
        for n, own in enumerate(dates, 1)
    ]
    warnings = found(opened(files))
    assert [warning.code for warning in warnings] == (["pixels_repeated"] if said else [])
    assert all(said in warning.detail for warning in warnings)


@pytest.mark.parametrize(("flat", "said"), [(1, True), (4, True), (5, False)])
def test_a_date_without_any_contrast_is_named(tmp_path: Path, flat: int, said: bool) -> None:
    files = [field(tmp_path / f"2021{n + 1:02d}05.tif") for n in range(5)]
    for n, file in enumerate(files[:flat]):
        with rasterio.open(file.path, "r+") as written:
            levels = np.array([400, 500, 3000 + n])[:, None, None]
            written.write(np.broadcast_to(levels, (3, 20, 20)).astype(np.uint16))
    warnings = found(opened(files))
    assert [w.code for w in warnings] == ["pixels_repeated"] * said
    assert all("of each band are one number, unlike on other dates" in w.detail for w in warnings)


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint16"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda own: (own - own.mean()) / own.std(), "are below -0.2, which reflectance cannot be"),
        (lambda own: (own - own.min()) / np.ptp(own), "are from 0 to 1 exactly"),
        (lambda own: own, None),
    ],
)
def test_numbers_that_were_normalised_are_suspected(
    tmp_path: Path, change: Callable, said: str | None, dtype: str
) -> None:
    files = []
    for n in range(4):
        rng = np.random.default_rng(n)
        bands = np.array([0.04, 0.05, 0.3])[:, None, None] * rng.uniform(0.7, 1.3, (3, 20, 20))
        pixels = np.stack([change(band) for band in bands])
        if dtype == "uint16":  # extremes of integers may be alike by chance
            pixels = pixels.clip(0) * 10_000
        path = tmp_path / f"2021{n + 1:02d}05.tif"
        files.append(write(path, pixels.astype(dtype), descriptions=BANDS))
    details = [w.detail for w in found(opened(files)) if w.code == "scale_suspected"]
    assert any(said in detail for detail in details) == (dtype != "uint16") if said else not details


@pytest.mark.parametrize("copies", [0, 2, 4, 6, 8])
def test_one_image_under_many_dates_is_named(tmp_path: Path, copies: int) -> None:
    """Also if it is on more than half of the dates, or on all."""
    image = field(tmp_path / "image.tif").path.read_bytes()
    files = [field(tmp_path / f"2021{n + 1:02d}05.tif") for n in range(8)]
    for file in files[:copies]:
        file.path.write_bytes(image)
    (detail,) = [w.detail for w in found(opened(files))] or [""]
    assert (f"as another date ({copies} of 8 dates)" in detail) == (copies > 0)
    assert ("'20210105.tif' (2021-01-05), '20210205.tif'" in detail) == (copies > 0)


def test_imagery_without_near_infrared_is_not_judged_for_it(tmp_path: Path) -> None:
    file = field(tmp_path / "20210105.tif", levels=(0.04, 0.40, 0.06))
    assert codes(opened([file], bands=("B02", "B04"))) == []


# --- mask_doubted ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quality", "clear", "cloudy", "named"),
    [
        ("SCL", 4, 4, True),
        ("SCL", 4, 9, False),
        ("Fmask", 64, 64, True),
        ("QA60", 0, 0, True),
        ("QA60", 0, 1024, False),
        ("alpha", 255, 255, False),
    ],
)
@pytest.mark.parametrize("count", [2, 7])
def test_a_mask_that_is_clear_where_the_pixels_are_clouds_is_doubted(
    tmp_path: Path, quality: str, clear: int, cloudy: int, named: bool, count: int
) -> None:
    rng = np.random.default_rng(5)
    ground = np.array([400, 500, 3000])[:, None, None] * rng.uniform(0.8, 1.2, (3, 20, 20))
    files = []
    for n in range(count):
        pixels = ground + rng.integers(0, 50, (3, 20, 20))
        mask = np.full((1, 20, 20), clear)
        if n == 1:  # clouds over two fifths of the image
            pixels[:, 12:] = 5500 + rng.integers(0, 500, (3, 8, 20))
            mask[:, 12:] = cloudy
        own = np.concatenate([pixels, mask]).astype(np.uint16)
        path = tmp_path / f"2021{n + 1:02d}05.tif"
        files.append(write(path, own, descriptions=(*BANDS, quality)))
    warnings = found(opened(files))
    assert [warning.code for warning in warnings] == ["mask_doubted"] * named
    for warning in warnings:
        assert "hardly any pixel on 2021-02-05, nor on any other date" in warning.detail
        assert "at least 40% of the pixels" in warning.detail
    assert codes(opened(files), [1]) == ["mask_doubted"] * named
    assert codes(opened(files, mask="none")) == []


@pytest.mark.parametrize(
    ("times", "dtype", "shares"),
    [(1, "float32", True), (100, "float32", False), (100, "uint16", False)],
)
@pytest.mark.parametrize("mask", [None, "cldprb:70"])
def test_probabilities_of_clouds_may_be_shares_of_one(
    tmp_path: Path, times: int, dtype: str, shares: bool, mask: str | None
) -> None:
    files, clear = [], []
    for n in range(4):
        rng = np.random.default_rng(n)
        pixels = np.array([0.04, 0.05, 0.3])[:, None, None] * rng.uniform(0.8, 1.2, (3, 20, 20))
        probability = rng.integers(0, 101, (1, 20, 20)) / 100
        if dtype == "uint16":
            pixels *= 10_000
        own = np.concatenate([pixels, probability * times]).astype(dtype)
        path = tmp_path / f"2021{n + 1:02d}05.tif"
        files.append(write(path, own, descriptions=(*BANDS, "MSK_CLDPRB")))
        clear.append(np.rint(probability[0] * 100) < (70 if mask else 40))
    stack = calibrate(opened(files, **({"mask": mask} if mask else {})))
    said = [w.detail for w in stack.warnings if w.code == "mask_assumed"]
    assert len(said) == shares
    assert all("are read as shares of one, not as per cent" in detail for detail in said)
    with StackReader(stack) as reader:
        found = reader.read(Window(0, 0, 20, 20)).valid
    # 0.4 and 0.7 themselves are rounded by the file's numbers.
    assert (found != np.stack(clear)).mean() < 0.02


@pytest.mark.parametrize(
    ("times", "dtype", "per_cent"),
    [(1, "float32", False), (100, "float32", True), (100, "uint16", True)],
)
@pytest.mark.parametrize(("mask", "limit"), [(None, 60), ("cs:70", 70)])
def test_cloud_score_may_be_per_cent(
    tmp_path: Path, times: int, dtype: str, per_cent: bool, mask: str | None, limit: int
) -> None:
    files, clear = [], []
    for n in range(4):
        rng = np.random.default_rng(n)
        pixels = np.array([0.04, 0.05, 0.3])[:, None, None] * rng.uniform(0.8, 1.2, (3, 20, 20))
        if dtype == "uint16":
            pixels *= 10_000
        score = rng.integers(0, 101, (1, 20, 20))
        own = np.concatenate([pixels, score / 100 * times])
        own = (np.rint(own) if dtype == "uint16" else own).astype(dtype)
        path = tmp_path / f"2021{n + 1:02d}05.tif"
        files.append(write(path, own, descriptions=(*BANDS, "cs_cdf")))
        clear.append(score[0] >= limit)
    stack = calibrate(opened(files, **({"mask": mask} if mask else {})))
    said = [w.detail for w in stack.warnings if w.code == "mask_assumed"]
    assert len(said) == per_cent
    assert all("are up to 100 and are read as per cent" in detail for detail in said)
    with StackReader(stack) as reader:
        assert np.array_equal(reader.read(Window(0, 0, 20, 20)).valid, np.stack(clear))


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("count", [3, 6])
def test_a_mask_of_clear_pixels_instead_of_clouds_is_doubted(
    tmp_path: Path, inverted: bool, count: int
) -> None:
    files = []
    for n in range(count):
        rng = np.random.default_rng(n)
        pixels = np.array([400, 500, 3000])[:, None, None] * rng.uniform(0.8, 1.2, (3, 20, 20))
        cloud = np.zeros((20, 20), np.bool_)
        cloud[:, 4 * n % 20 : 4 * n % 20 + 8] = True
        pixels[:, cloud] = rng.uniform(5000, 6000, (3, int(cloud.sum())))
        mask = (~cloud if inverted else cloud)[None]
        own = np.concatenate([pixels, mask]).astype(np.uint16)
        path = tmp_path / f"2021{n + 1:02d}05.tif"
        files.append(write(path, own, descriptions=(*BANDS, "CLM")))
    warnings = found(opened(files))
    assert [w.code for w in warnings] == ["mask_doubted"] * (inverted and count > 3)
    for warning in warnings:
        assert "the cloud mask (clm) seems to be inverted: 100% of the pixels" in warning.detail
        assert "and 0% of those that it marks" in warning.detail


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(
    ("name", "numbers", "clear"),
    [
        # python-fmask: classes, most pixels clear; also with fill, and null at the edge.
        ("S2_{}", [1, 1, 1, 2, 3, 4, 5, 1, 1, 1], [1, 5]),
        ("S2_{}", [1, 1, 1, 2, 255, 0, 5, 1, 1, 1], [1, 5]),
        # HLS: bits, with aerosol, without, and cirrus of version 1.4 on few pixels.
        ("S2_{}", [64, 64, 66, 224, 96, 72, 64, 64, 64, 1], [64, 224, 96]),
        ("S2_{}", [0, 0, 0, 2, 4, 32, 8, 0, 0, 1], [0, 32]),
        ("S2_{}", [0, 0, 0, 2, 4, 5, 1, 1, 0, 0], [0]),
        ("HLS.S30.T31UES.2021{}T104421.v1.4", [0, 1, 1, 1, 1, 0, 1, 1, 1, 1], [0]),
    ],
)
def test_fmask_of_classes_and_of_bits_are_told_apart_by_their_numbers(
    tmp_path: Path, name: str, numbers: list[int], clear: list[int], beside: bool
) -> None:
    rng = np.random.default_rng(7)
    files, masks = [], []
    for n in range(6):
        pixels = np.array([400, 500, 3000])[:, None, None] * rng.uniform(0.8, 1.2, (3, 30, 30))
        mask = rng.choice(numbers, (1, 30, 30)).astype(np.uint8)
        stem = name.format(f"{n + 1:02d}05" if "S2" in name else f"{30 * n + 5:03d}")
        stem = stem.replace("S2_", "S2_2021")
        pixels = pixels.astype(np.uint16)
        masks.append(np.isin(mask[0], clear))
        if beside:
            files.append(write(tmp_path / f"{stem}_image.tif", pixels, descriptions=BANDS))
            files.append(write(tmp_path / f"{stem}_Fmask.tif", mask))
            continue
        both = np.concatenate([pixels, mask.astype(np.uint16)])
        files.append(write(tmp_path / f"{stem}.tif", both, descriptions=(*BANDS, "Fmask")))
    stack = calibrate(opened(files))
    classes = 5 in clear
    assert ("mask_assumed" in {w.code for w in stack.warnings}) == classes
    with StackReader(stack) as reader:
        for window in (Window(0, 0, 30, 30), Window(7, 3, 9, 20)):
            rows, columns = window.toslices()
            found = reader.read(window).valid
            np.testing.assert_array_equal(found, np.stack(masks)[:, rows, columns])


@pytest.mark.parametrize("levels", [(4000, 5000), (300, 4000)])
def test_what_is_always_bright_or_noise_is_no_cloud(
    tmp_path: Path, levels: tuple[int, int]
) -> None:
    """A salt pan has the same blue on every date, and clouds cover neighbours."""
    files = []
    for n in range(5):
        pixels = np.random.default_rng(n).uniform(*levels, (4, 20, 20)).astype(np.uint16)
        pixels[3] = 5
        path = tmp_path / f"2021{n + 1:02d}05.tif"
        files.append(write(path, pixels, descriptions=(*BANDS, "SCL")))
    assert "mask_doubted" not in codes(opened(files))


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_flanders_with_a_mask_of_one_class_and_with_its_own(
    shared_data: Path, tmp_path: Path, every: int
) -> None:
    """The dates named are among those on which SCL has clouds or snow."""
    real, files, marked = [], [], {}
    for path in sorted((shared_data / "flanders_2017_2018").glob("S2_L2A_*.tif"))[::every]:
        with rasterio.open(path) as file:
            pixels, names, profile = file.read(), file.descriptions, file.profile
        day = re.sub(r".*_(\d{4})(\d\d)(\d\d)_.*", r"\1-\2-\3", path.name)
        marked[day] = float(np.isin(pixels[4], (8, 9, 10, 11)).mean())
        pixels[4] = 4
        kept = {key: profile[key] for key in ("crs", "transform", "nodata")}
        files.append(write(tmp_path / path.name, pixels, descriptions=names, **kept))
        real.append(SourceFile(name=path.name, path=path))
    (warning,) = [w for w in found(opened(files)) if w.code == "mask_doubted"]
    days = re.findall(r"20\d\d-\d\d-\d\d", warning.detail)
    more = re.search(r"and (\d+) more", warning.detail)
    assert len(days) == 12 or not more
    assert all(marked[day] > 0.2 for day in days)
    cloudy = sum(share > 0.9 for share in marked.values())
    assert len(days) + int(more[1] if more else 0) >= 0.7 * cloudy
    assert "mask_doubted" not in codes(opened(real))


# --- baseline_offset_suspected --------------------------------------------------------------


def seasons(folder: Path, *, late: int, **how) -> list[SourceFile]:
    """Dates on both sides of the change of baseline, the later ones with `late` added."""
    early = [field(folder / f"{day}.tif", **how) for day in BEFORE]
    return early + [field(folder / f"{day}.tif", add=late, **how) for day in AFTER]


def offsets(stack: Stack, used: Sequence[int] | None = None) -> list[float]:
    """The offset of each date's first band after calibration."""
    return [acquisition.planes[0].offset for acquisition in calibrate(stack, used).acquisitions]


def test_the_offset_of_the_later_baseline_is_applied(tmp_path: Path) -> None:
    stack = opened(seasons(tmp_path, late=1000))
    (warning,) = found(stack)
    assert warning.code == "offset_applied"
    assert "2022-01-25" in warning.detail
    assert "from the pixels" in warning.detail
    assert offsets(stack) == [0, 0, 0, -0.1, -0.1, -0.1]
    assert codes(stack, [0, 1, 2]) == []
    # One date alone may be hazy: the caller decides.
    assert codes(stack, [5]) == ["baseline_offset_suspected"]
    assert offsets(stack, [5]) == [0] * 6


@pytest.mark.parametrize("side", [BEFORE, AFTER])
def test_a_stack_of_one_side_is_judged_by_itself(tmp_path: Path, side: Sequence[str]) -> None:
    """Wholly after the change, or Collection 1: reprocessed before it."""
    raised = opened([field(tmp_path / f"{day}.tif", add=1000) for day in side])
    assert codes(raised) == ["offset_applied"]
    assert offsets(raised) == [-0.1] * 3
    plain = opened([field(tmp_path / f"{day}.tif") for day in side])
    assert codes(plain) == []
    assert offsets(plain) == [0] * 3


def land(
    path: Path, *, seed: int = 0, add: float = 0.0, contrast: float = 1.0, side: int = 20
) -> SourceFile:
    """A landscape under a sky: `add` to all of it, and its contrast."""
    pattern = np.random.default_rng(seed).uniform(0.5, 1.5, (3, side, side))
    values = np.array([0.04, 0.06, 0.3])[:, None, None] * (1 + contrast * (pattern - 1)) + add
    noise = np.random.default_rng(int(path.stem)).normal(0, 0.002, values.shape)
    return write(path, ((values + noise) * 10_000).astype(np.uint16), descriptions=BANDS)


@pytest.mark.parametrize("with_offset", [{3}, {0, 1, 3, 4}])
def test_single_dates_with_the_offset_are_told_by_the_others(
    tmp_path: Path, with_offset: set[int]
) -> None:
    files = [
        land(tmp_path / f"2021{n + 4:02d}05.tif", add=0.1 * (n in with_offset)) for n in range(6)
    ]
    stack = opened(files)
    (warning,) = found(stack)
    assert warning.code == "offset_applied"
    assert "blue and red lie 0.1 above those of other dates" in warning.detail
    assert offsets(stack) == [-0.1 if n in with_offset else 0 for n in range(6)]


def test_single_dates_of_few_pixels_are_only_named(tmp_path: Path) -> None:
    """Haze over a few fields is as even as the offset."""
    days = [tmp_path / f"2021{n + 4:02d}05.tif" for n in range(6)]
    stack = opened([land(day, add=0.1 * (n == 3), side=19) for n, day in enumerate(days)])
    assert codes(stack) == ["baseline_offset_suspected"]
    assert offsets(stack) == [0] * 6


@pytest.mark.parametrize(
    ("same", "others", "applied"),
    [({2}, 6, False), ({2, 4}, 6, True), ({2}, 4, True)],
)
def test_a_single_date_with_the_offset_is_confirmed_by_two_dates(
    tmp_path: Path, same: set[int], others: int, applied: bool
) -> None:
    """Haze over one date may look as the offset beside one other date, hardly beside two."""
    files = [
        land(
            tmp_path / f"2021{n + 4:02d}05.tif",
            seed=0 if n in {3, *same} else n + 1,
            add=0.1 * (n == 3),
        )
        for n in range(others)
    ]
    stack = opened(files)
    assert codes(stack) == ["offset_applied" if applied else "baseline_offset_suspected"]
    assert offsets(stack) == [-0.1 if applied and n == 3 else 0 for n in range(others)]


def test_no_offset_is_applied_to_parts_of_flanders(shared_data: Path) -> None:
    paths = sorted((shared_data / "flanders_2017_2018").glob("S2_L2A_2018*.tif"))
    files = [SourceFile(path=path, name=path.name) for path in paths]
    bands = ("B02", "B04", "B08")
    with rasterio.open(paths[0]) as file:
        grid = file.transform
    for row, column in product((2, 13, 22, 33, 42), repeat=2):
        west, north = grid @ (column + 0.2, row + 0.2)
        east, south = grid @ (column + 19.8, row + 19.8)
        box = transform_bounds("EPSG:32631", "EPSG:4326", west, south, east, north)
        options = StackOptions(bbox=box)
        stack = open_stack(files, options, bands=bands, max_bytes=2**30)
        assert set(offsets(stack)) == {0}, (row, column)


@pytest.mark.parametrize("how", [{"contrast": 0.3}, {"seed": 1}])
def test_what_is_not_the_same_land_is_only_named(tmp_path: Path, how: dict) -> None:
    """Haze takes contrast away, and other pixels show nothing of each other."""
    sky = [{}, {"add": 0.1, **how}] * 3
    files = [land(tmp_path / f"2021{n + 4:02d}05.tif", **one) for n, one in enumerate(sky)]
    stack = opened(files)
    (warning,) = found(stack)
    assert warning.code == "baseline_offset_suspected"
    assert "2021-05-05, 2021-07-05, 2021-09-05" in warning.detail
    assert offsets(stack) == [0] * 6


@pytest.mark.parametrize(
    ("darkest", "named"),
    [((0.13, 0.13, 0.13), True), ((0.05, 0.05, 0.05), False), ((0.13, 0.13, 0.04), False)],
)
def test_a_single_date_that_may_hold_the_offset_is_named(
    tmp_path: Path, darkest: tuple[float, ...], named: bool
) -> None:
    """Not the same land, but as dark as the offset allows: only darker pixels rule it out."""
    files = [
        land(tmp_path / f"2021{n + 4:02d}05.tif", seed=n == 3, add=0.1 * (n == 3)) for n in range(6)
    ]
    with rasterio.open(files[3].path, "r+") as file:  # four pixels of 400, a shadow or water
        dark = np.asarray(darkest)[:, None, None] * np.full((3, 2, 2), 10_000)
        file.write(dark.astype(np.uint16), window=((0, 2), (0, 2)))
    stack = opened(files)
    assert codes(stack) == ["baseline_offset_suspected"] * named
    assert offsets(stack) == [0] * 6


@pytest.mark.parametrize(("nir", "named"), [(0.12, True), (0.0, False)])
def test_haze_over_the_offset_is_named_if_ndvi_returns(
    tmp_path: Path, nir: float, named: bool
) -> None:
    """Blue 0.15 above other dates: haze lifts it most, the offset lifts the near infrared too."""
    files = [land(tmp_path / f"2021{n + 4:02d}05.tif") for n in range(6)]
    with rasterio.open(files[3].path, "r+") as file:
        more = np.array([0.15, 0.13, nir])[:, None, None] * 10_000
        file.write((file.read() + more).astype(np.uint16))
    stack = opened(files)
    assert codes(stack) == ["baseline_offset_suspected"] * named
    assert offsets(stack) == [0] * 6


@pytest.mark.parametrize(("add", "named"), [(0.1, True), (0.13, False)])
def test_green_land_of_little_contrast_is_named_by_its_darkest_pixels(
    tmp_path: Path, add: float, named: bool
) -> None:
    """Dense vegetation is close to 0 in blue and red, so that the offset lifts both to 0.1."""
    files = [land(tmp_path / f"2021{n + 4:02d}05.tif") for n in range(6)]
    rng = np.random.default_rng(1)
    green = np.array([0.01, 0.012, 0.4])[:, None, None] * rng.uniform(0.5, 1.5, (3, 20, 20)) + add
    write(files[3].path, (green * 10_000).astype(np.uint16), descriptions=BANDS)
    stack = opened(files)
    assert codes(stack) == ["baseline_offset_suspected"] * named
    assert offsets(stack) == [0] * 6


def test_dates_hardly_brighter_than_the_others_are_not_suspected(tmp_path: Path) -> None:
    """Bright soil, whose dark end lies about 0.09: half of the dates are above it."""
    bright = {"levels": (0.11, 0.12, 0.25)}
    files = [
        field(tmp_path / f"2021{n + 4:02d}05.tif", add=n % 2 * 100, **bright) for n in range(6)
    ]
    assert codes(opened(files)) == []


def test_places_of_large_rasters_are_compared_with_themselves(tmp_path: Path) -> None:
    """Of many dates each is read at one place: no other's pixels may stand for its own."""
    files = []
    for n in range(12):
        pattern = np.random.default_rng(0).uniform(0.5, 1.5, (3, 600, 600))
        pattern[:, :300] *= 1.5  # places differ
        pixels = np.array([0.04, 0.06, 0.3])[:, None, None] * pattern + 0.1 * (n == 7)
        path = tmp_path / f"2021{n + 1:02d}05.tif"
        files.append(write(path, (pixels * 1e4).astype(np.uint16), descriptions=BANDS))
    assert offsets(opened(files)) == [0] * 7 + [-0.1] + [0] * 4


@pytest.mark.slow
def test_flanders_with_the_offset_on_some_dates(shared_data: Path, tmp_path: Path) -> None:
    """Every third clear date: each date is judged rightly, with SCL and without."""
    files, holds, clear = [], [], 0
    for path in sorted((shared_data / "flanders_2017_2018").glob("S2_L2A_2018*.tif"))[::2]:
        with rasterio.open(path) as file:
            pixels, names, profile = file.read(), file.descriptions, file.profile
        is_clear = np.isin(pixels[4], (4, 5, 6, 7)).mean() > 0.9
        holds.append(bool(is_clear and clear % 3 == 1))
        clear += is_clear
        pixels[:4] += np.where(pixels[:4] > 0, 1000 * holds[-1], 0).astype(np.uint16)
        kept = {key: profile[key] for key in ("crs", "transform", "nodata")}
        files.append(write(tmp_path / path.name, pixels, descriptions=names, **kept))
    for mask in ("scl", "none"):
        applied = np.array(offsets(opened(files, mask=mask))) < 0
        assert not applied[~np.array(holds)].any()
        assert applied.sum() >= 0.6 * sum(holds)


def test_a_single_large_scene_after_the_change_is_judged(tmp_path: Path) -> None:
    late = opened([field(tmp_path / "20230605.tif", add=1000, side=120)])
    assert (codes(late), offsets(late)) == (["offset_applied"], [-0.1])
    early = opened([field(tmp_path / "20190605.tif", add=1000, side=120)])
    assert (codes(early), offsets(early)) == (["baseline_offset_suspected"], [0])


def test_without_blue_the_red_band_warns(tmp_path: Path) -> None:
    stack = opened(seasons(tmp_path, late=1000), bands=("B04", "B08"))
    assert codes(stack) == ["baseline_offset_suspected"]


@pytest.mark.parametrize(
    ("tags", "band_tags", "name", "source"),
    [
        ({}, {"BOA_ADD_OFFSET": "-1000"}, "", "BOA_ADD_OFFSET -1000"),
        ({"BOA_ADD_OFFSET": "-1000", "BOA_QUANTIFICATION_VALUE": "10000"}, {}, "", "BOA_ADD"),
        ({"PROCESSING_BASELINE": "05.09"}, {}, "", "processing baseline 05.09"),
        ({"s2:processing_baseline": "04.00"}, {}, "", "processing baseline 04.00"),
        ({"PROCESSING_BASELINE": "N0509"}, {}, "", "processing baseline 05.09"),
        ({}, {}, "S2B_MSIL2A_20230605T104421_N0509_R008_", "processing baseline 05.09"),
        ({"earthsearch:boa_offset_applied": "false"}, {}, "", "boa_offset_applied"),
        ({"offset": "-0.1"}, {}, "", "the tag `offset`"),
    ],
)
def test_the_offset_is_known_from_the_file(
    tmp_path: Path, tags: dict, band_tags: dict, name: str, source: str
) -> None:
    how = {"tags": tags, "band_tags": dict.fromkeys((1, 2, 3), band_tags)}
    stack = opened([field(tmp_path / f"{name}20230605.tif", add=1000, **how)])
    (warning,) = found(stack)
    assert warning.code == "offset_applied"
    assert source in warning.detail
    assert offsets(stack) == [pytest.approx(-0.1)]


@pytest.mark.parametrize(
    "how",
    [
        {"tags": {"PROCESSING_BASELINE": "05.09"}},
        {"band_tags": {number: {"BOA_ADD_OFFSET": "-1000"} for number in (1, 2, 3)}},
        {"offsets": (-0.1,) * 3, "scales": (1e-4,) * 3},
    ],
)
def test_an_offset_that_was_applied_before_is_not_applied_again(tmp_path: Path, how: dict) -> None:
    """Harmonised values that kept their tags."""
    stack = opened([field(tmp_path / f"{day}.tif", **how) for day in AFTER])
    assert codes(stack) == ["baseline_offset_suspected"]
    assert offsets(stack) == [0] * 3
    assert codes(opened([field(tmp_path / "20230605.tif", **how)], offset=0.0)) == []


@pytest.mark.parametrize(
    "tags",
    [
        {"earthsearch:boa_offset_applied": "true"},
        {"PROCESSING_BASELINE": "02.09"},
        {"PROCESSING_BASELINE": "0209"},
    ],
)
def test_tags_may_say_that_there_is_no_offset(tmp_path: Path, tags: dict) -> None:
    stack = opened([field(tmp_path / f"{day}.tif", tags=tags) for day in AFTER])
    assert (codes(stack), offsets(stack)) == ([], [0] * 3)


@pytest.mark.parametrize(
    "tags",
    [{"earthsearch:boa_offset_applied": "true"}, {"PROCESSING_BASELINE": "02.09"}],
)
def test_pixels_that_contradict_such_a_tag_are_named(tmp_path: Path, tags: dict) -> None:
    files = [field(tmp_path / f"{day}.tif", add=1000, tags=tags) for day in AFTER]
    stack = opened(files)
    (warning,) = found(stack)
    assert (warning.code, offsets(stack)) == ("baseline_offset_suspected", [0] * 3)
    assert "give offset=-0.1 if they do" in warning.detail
    assert codes(opened(files, offset=0.0)) == []


def test_numbers_from_a_date_on(tmp_path: Path) -> None:
    given = ((date(2021, 1, 1), -0.05), (date(2022, 1, 25), -0.1))
    stack = opened(seasons(tmp_path, late=1000), offset=given)
    assert offsets(stack) == [-0.05] * 3 + [-0.1] * 3
    # Before the first date, the numbers stated by the files count.
    stack = opened(seasons(tmp_path, late=1000), offset=given[1:])
    assert offsets(stack) == [0] * 3 + [-0.1] * 3
    undated = field(tmp_path / "scene.tif")
    with pytest.raises(InvalidRequest, match=r"'scene.tif' has no date"):
        opened([undated], offset=given)


def mixed(folder: Path) -> list[SourceFile]:
    """Six dates of one year, processed by turns with and without the offset, as the names say."""
    files = []
    for n, month in enumerate((1, 3, 5, 7, 9, 11)):
        baseline, plus = (("N0510", 1000), ("N0301", 0))[n % 2]
        name = f"S2B_MSIL2A_2021{month:02d}05T104421_{baseline}_R008_T31UES.tif"
        files.append(field(folder / name, add=plus))
    return files


def test_baselines_mixed_date_by_date_are_read_by_each_ones_own(tmp_path: Path) -> None:
    stack = calibrate(opened(mixed(tmp_path)))
    assert offsets(stack) == pytest.approx([-0.1, 0, -0.1, 0, -0.1, 0])
    (warning,) = [w for w in stack.warnings if w.code == "offset_applied"]
    assert "2021-01-05, 2021-05-05, 2021-09-05, known from processing baseline 05.10" in (
        warning.detail
    )


def test_numbers_from_a_baseline_on(tmp_path: Path) -> None:
    files = mixed(tmp_path)
    given = (("04.00", -0.08), ("05.10", -0.09))
    assert offsets(opened(files, offset=given)) == [-0.09, 0, -0.09, 0, -0.09, 0]
    # A baseline counts before a date, and a date where the baseline is before all that are given.
    given = (("04.00", -0.1), (date(2021, 6, 1), -0.02))
    assert offsets(opened(files, offset=given)) == [-0.1, 0, -0.1, -0.02, -0.1, -0.02]
    plain = field(tmp_path / "S2_20210605.tif")
    assert offsets(opened([plain], offset=given)) == [-0.02]
    with pytest.raises(InvalidRequest, match=r"nor the name of 'S2_20210605.tif' states its base"):
        opened([*files, plain], offset=given[:1])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("-0.1", -0.1),
        ("04.00:-0.1", (("04.00", -0.1),)),
        ("N4.00:-0.1", (("04.00", -0.1),)),
        (
            "2022-01-25:-0.1,05.10:-0.2,04.00:-0.1",
            (("04.00", -0.1), ("05.10", -0.2), (date(2022, 1, 25), -0.1)),
        ),
    ],
)
def test_numbers_as_people_write_them(text: str, number: object) -> None:
    form = RasterForm(offset=text)
    assert form.offset == number
    source = SourceFile(name="a.tif", path=Path("/x/a.tif"))
    request = form.request("classify-pixels", (source,))
    stored = json.loads(json.dumps(request_document(request, Path("/x"))))
    assert request_of(stored, Path("/x")).stack.offset == number


@pytest.mark.parametrize("text", ["04.00:x", "4:-0.1", "04.00:-0.1,4.00:-0.2", "2022-13-01:0"])
def test_numbers_that_say_nothing_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="offset"):
        RasterForm(offset=text)


@pytest.mark.parametrize(
    ("how", "options", "warnings"),
    [
        ({"late": 0}, {}, []),
        ({"late": 400}, {}, []),
        ({"late": 1000}, {"offset": 0.0}, []),
        ({"late": 1000, "offsets": (-0.01,) * 3}, {}, ["offset_applied"]),
        ({"late": 1000, "tags": {"offset": "-0.01"}}, {}, ["offset_applied"]),
        # Floats are mostly a product's integers that somebody divided by 10,000.
        ({"late": 1000, "dtype": "float32"}, {"scale": 1e-4}, ["offset_applied"]),
        ({"late": 1000, "dtype": "float32"}, {"scale": 1e-4, "sensor": "hls"}, []),
    ],
)
def test_no_offset_is_suspected(
    tmp_path: Path, how: dict, options: dict, warnings: list[str]
) -> None:
    assert codes(opened(seasons(tmp_path, **how), **options)) == warnings


def test_one_hazy_date_is_no_baseline(tmp_path: Path) -> None:
    files = seasons(tmp_path, late=0)
    files[-1] = field(tmp_path / "20230105.tif", levels=(0.3, 0.3, 0.4))
    assert codes(opened(files)) == []


@pytest.mark.slow
def test_real_scenes_with_and_without_the_offset(shared_data: Path, tmp_path: Path) -> None:
    """Every date of Flanders, clouds masked and not: with 1000 added the offset is found."""
    paths = sorted((shared_data / "flanders_2017_2018").glob("S2_L2A_2018*.tif"))[::3]
    for add in (0, 1000):
        files = []
        for path in paths:
            with rasterio.open(path) as file:
                pixels, named = file.read(), file.descriptions
            pixels[:4] = np.where(pixels[:4] > 0, pixels[:4] + add, 0)
            day = re.sub(r".*_(2018\d{4})_.*", r"\1", path.name)
            files.append(write(tmp_path / f"{day}_{add}.tif", pixels, descriptions=named, nodata=0))
        for mask in (None, "none"):
            stack = opened(files, mask=mask)
            assert set(offsets(stack)) == {-add / 1e4}
            assert codes(stack) == ["offset_applied"] * (add > 0)


# --- scale_suspected ------------------------------------------------------------------------


def test_a_scale_that_counts_twice_is_suspected(tmp_path: Path) -> None:
    """Reflectance already, with the tag of the integers that it was made from."""
    scaled = {"dtype": "float32", "times": 1}
    twice = field(tmp_path / "a.tif", scales=(1e-4,) * 3, **scaled)
    (warning,) = found(opened([twice]))
    assert warning.code == "scale_suspected"
    assert "scale=1" in warning.detail
    assert codes(opened([twice], scale=1.0)) == []
    assert codes(opened([field(tmp_path / "b.tif", **scaled)])) == []


def test_numbers_next_to_zero_are_suspected(tmp_path: Path) -> None:
    almost = write(tmp_path / "a.tif", np.full((3, 9, 9), 1e-9, "float32"), descriptions=BANDS)
    assert codes(opened([almost])) == ["scale_suspected"]


def test_land_that_is_darker_than_land_is_suspected(tmp_path: Path) -> None:
    """Reflectance x 1000, read as x 10000; water is as dark, but not brighter than red."""
    thousand = field(tmp_path / "a.tif", times=1000)
    (warning,) = found(opened([thousand]))
    assert (warning.code, "scale=0.001" in warning.detail) == ("scale_suspected", True)
    assert codes(opened([thousand], scale=0.001)) == []
    assert codes(opened([field(tmp_path / "b.tif", levels=(0.05, 0.03, 0.02))])) == []


def test_flanders_in_thousandths_is_suspected(shared_data: Path, tmp_path: Path) -> None:
    files, thousandths = [], []
    for path in sorted((shared_data / "flanders_2017_2018").glob("S2_L2A_2018*.tif"))[::8]:
        with rasterio.open(path) as file:
            names, pixels = file.descriptions, file.read()
        files.append(SourceFile(name=path.name, path=path))
        pixels[:4] = pixels[:4] // 10
        thousandths.append(write(tmp_path / path.name, pixels, descriptions=names, nodata=0))
    assert "scale_suspected" not in codes(opened(files))
    (warning,) = [w for w in found(opened(thousandths)) if w.code == "scale_suspected"]
    assert "give scale=0.001" in warning.detail


def test_one_band_outside_what_is_plausible_is_refused(tmp_path: Path) -> None:
    """A 16-bit export for viewing: near infrared alone is above 1.6."""
    full = field(tmp_path / "a.tif", times=65_535)
    with pytest.raises(ImplausibleReflectance, match=r"median of B08 .* scale=0\.00001526"):
        calibrate(opened([full]))
    assert codes(opened([full], scale=1 / 65_535)) == []


def test_8_bits_need_a_scale(tmp_path: Path) -> None:
    eight = {"dtype": "uint8", "times": 250}
    stack = opened([field(tmp_path / "a.tif", **eight)], mask="none")
    (warning,) = stack.warnings
    assert warning.code == "scale_suspected"
    assert "'a.tif' holds 8-bit numbers" in warning.detail
    assert opened([field(tmp_path / "a.tif", **eight)], scale=0.004, mask="none").warnings == ()
    tagged = field(tmp_path / "b.tif", scales=(0.004,) * 3, **eight)
    assert opened([tagged], mask="none").warnings == ()


# --- a file of another kind ---------------------------------------------------------------------


def months(folder: Path, *odd: dict) -> list[SourceFile]:
    """Seven plain dates, and one date of another kind for each of `odd`."""
    plain = [field(folder / f"20210{month}05.tif") for month in range(1, 8)]
    return plain + [field(folder / f"202108{5 + n:02d}.tif", **how) for n, how in enumerate(odd)]


@pytest.mark.parametrize(
    ("how", "fix"),
    [
        ({"dtype": "float32"}, "scale=0.0001"),
        ({"dtype": "float32", "times": 100}, "scale=0.01"),
    ],
)
def test_one_file_in_other_units_is_refused_by_name(tmp_path: Path, how: dict, fix: str) -> None:
    with pytest.raises(ImplausibleReflectance, match=r"'20210805.tif' \(2021-08-05\)") as caught:
        calibrate(opened(months(tmp_path, how)))
    assert fix in caught.value.detail
    assert "in other units than the others" in caught.value.detail


@pytest.mark.parametrize("how", [{"times": 100}, {"times": 1000}])
def test_one_file_that_is_too_dark_is_named(tmp_path: Path, how: dict) -> None:
    (warning,) = found(opened(months(tmp_path, how)))
    assert warning.code == "scale_suspected"
    assert "'20210805.tif' (2021-08-05)" in warning.detail
    assert codes(opened(months(tmp_path, {"levels": (0.03, 0.03, 0.1)}))) == []


def test_landsats_numbers_without_a_name_are_suspected(tmp_path: Path) -> None:
    days = ("20210105", "20210205", "20210305")
    how = {"times": 1 / 0.0000275, "add": round(0.2 / 0.0000275)}
    bright = [field(tmp_path / f"bright_{day}.tif", **how) for day in days]
    with pytest.raises(ImplausibleReflectance, match=r"median of B08 .* sensor=landsat"):
        calibrate(opened(bright))
    assert "scale_suspected" not in codes(opened(bright, scale=0.0000275, offset=-0.2))
    levels = (0.04, 0.06, 0.15)
    files = [field(tmp_path / f"{day}.tif", levels=levels, **how) for day in days]
    warnings = found(opened(files))
    (warning,) = [w for w in warnings if w.code == "scale_suspected"]
    assert "those of Landsat Collection 2; give sensor=landsat" in warning.detail
    assert "scale_suspected" not in codes(opened(files, scale=0.0000275, offset=-0.2))
    assert "scale_suspected" not in codes(opened(files, scale=0.0001))
    snow = [field(tmp_path / f"snow_{day}.tif", levels=(0.8, 0.8, 0.7)) for day in days]
    assert "scale_suspected" not in codes(opened(snow))


def test_one_file_that_is_too_bright_is_named(tmp_path: Path) -> None:
    """Ten times the others, its median may still be one of reflectance."""
    days = ("20210105", "20210205", "20210305", "20210405")
    levels = (0.04, 0.06, 0.3)
    files = [field(tmp_path / f"{day}.tif", levels=levels) for day in days]
    files[2] = field(tmp_path / "20210305.tif", levels=levels, times=100_000, dtype="uint32")
    (warning,) = found(opened(files))
    assert warning.code == "scale_suspected"
    assert warning.detail.startswith("'20210305.tif' (2021-03-05): a tenth of the clear values")
    # White clouds do not indicate another unit.
    files[2] = field(tmp_path / "20210305.tif", levels=(0.8, 0.8, 0.9))
    assert codes(opened(files)) == []


@pytest.mark.parametrize("times", [2, 0.5])
def test_one_date_of_another_gain_is_named(shared_data: Path, tmp_path: Path, times: float) -> None:
    """All bands of a date of South Tyrol by 2 or 0.5; none of the seven dates is named as it is."""
    files, changed = [], []
    for path in sorted((shared_data / "south_tyrol_2022").glob("S2_L2A_2022-*.tif")):
        with rasterio.open(path) as file:
            names = file.descriptions
            pixels = file.read(window=Window(450, 350, 64, 64))
        files.append(write(tmp_path / path.name, pixels, descriptions=names, nodata=0))
        pixels[:4] = pixels[:4] * times
        changed.append(write(tmp_path / f"other_{path.name}", pixels, descriptions=names, nodata=0))
    assert found(opened(files)) == []
    (warning,) = found(opened([*files[:4], changed[4], *files[5:]]))
    assert warning.code == "scale_suspected"
    assert warning.detail.startswith(f"'{changed[4].name}' (2022-06-20): all bands are about")


def test_one_blank_file_is_missing(tmp_path: Path) -> None:
    stack = opened(months(tmp_path, {"dtype": "int16", "times": 0, "add": -9999}))
    (warning,) = found(stack)
    assert warning.code == "nodata_assumed"
    assert "'20210805.tif'" in warning.detail


def test_a_float_file_among_integers_is_read_by_its_own_numbers(tmp_path: Path) -> None:
    assert codes(opened(months(tmp_path, {"dtype": "float32", "times": 1}))) == []


@pytest.mark.parametrize(
    ("number", "dtype", "times"),
    [(-10_000, "int16", 10_000), (-9999, "float32", 1), (1, "float32", 1), (1, "uint16", 10_000)],
)
def test_a_number_that_stands_for_missing_is_found(
    tmp_path: Path, number: float, dtype: str, times: float
) -> None:
    files = []
    for month in range(1, 5):
        path = tmp_path / f"20210{month}05.tif"
        field(path, dtype=dtype, times=times)
        with rasterio.open(path, "r+") as file:
            pixels = file.read()
            pixels[:, :6] = number
            file.write(pixels)
        files.append(SourceFile(name=path.name, path=path))
    stack = opened(files)
    (warning,) = found(stack)
    assert warning.code == "nodata_assumed"
    assert warning.detail.startswith(f"{number} fills all bands")
    with StackReader(calibrate(stack)) as reader:
        sits = reader.read(Window(0, 0, 20, 20))
    assert not sits.valid[:, :6].any()
    assert sits.valid[:, 6:].all()


@pytest.mark.parametrize(
    ("number", "rows", "how"),
    [
        (0, 6, {}),
        (0, 20, {}),  # the whole band
        (0, 6, {"dtype": "float32", "times": 1}),
        (0, 6, {"nodata": 65_535}),
        (-9999, 6, {"dtype": "float32", "times": 1}),
        (-9999, 6, {"dtype": "int16"}),
    ],
)
@pytest.mark.parametrize("band", range(3))
def test_a_number_that_stands_for_missing_in_one_band_is_found(
    tmp_path: Path, number: float, rows: int, how: dict, band: int
) -> None:
    files = [field(tmp_path / f"20210{month}05.tif", **how) for month in range(1, 5)]
    with rasterio.open(files[2].path, "r+") as file:
        pixels = file.read()
        pixels[band, :rows] = number
        file.write(pixels)
    stack = opened(files)
    (warning,) = found(stack)
    assert warning.code == "nodata_assumed"
    share = f"{number} is in {BANDS[band]} of up to {rows / 20:.1%} of the pixels sampled"
    assert warning.detail.startswith(f"{share}, in '20210305.tif' (2021-03-05), though")
    with StackReader(calibrate(stack)) as reader:
        sits = reader.read(Window(0, 0, 20, 20))
    assert not sits.valid[2, :rows].any()
    assert sits.valid[2, rows:].all()
    assert sits.valid[[0, 1, 3]].all()


def test_zeros_in_one_band_beside_another_number_in_use_are_named(tmp_path: Path) -> None:
    files = [field(tmp_path / f"20210{month}05.tif", nodata=65_535) for month in range(1, 5)]
    with rasterio.open(files[2].path, "r+") as file:
        pixels = file.read()
        pixels[2, :6], pixels[:, 15:] = 0, 65_535
        file.write(pixels)
    (warning,) = found(opened(files))
    assert warning.code == "nodata_suspected"
    assert "0 is in B08 of up to 40.0% of the pixels sampled, in '20210305.tif'" in warning.detail


def test_land_so_dark_that_it_was_clipped_is_not_missing(shared_data: Path, tmp_path: Path) -> None:
    """Blue is 0 in up to 27 % of these pixels, forest on slopes in the shade."""
    files = []
    for path in sorted((shared_data / "south_tyrol_2022").glob("S2_L2A_2022-*.tif")):
        with rasterio.open(path) as file:
            names = file.descriptions
            pixels = file.read(window=Window(450, 350, 128, 128))
        files.append(write(tmp_path / path.name, pixels, descriptions=names))
    stack = opened(files)
    assert found(stack) == []
    with StackReader(calibrate(stack)) as reader:
        sits = reader.read(Window(0, 0, 128, 128))
    assert (sits.values[:, 0][sits.valid] == 0).mean(), "the test needs clipped pixels"


@pytest.mark.parametrize(
    ("number", "dtype", "times"),
    [(-1000, "int16", 10_000), (-0.1, "float32", 1), (64_536, "uint16", 10_000)],
)
@pytest.mark.parametrize("nodata", [0, None])
def test_missing_pixels_from_which_the_offset_was_subtracted_are_found(
    tmp_path: Path, number: float, dtype: str, times: float, nodata: float | None
) -> None:
    """0 becomes -1000, which wraps around without a sign; the nodata tag still names 0."""
    files = []
    for month in range(1, 5):
        path = tmp_path / f"20210{month}05.tif"
        field(path, dtype=dtype, times=times, nodata=nodata)
        with rasterio.open(path, "r+") as file:
            pixels = file.read()
            pixels[:, :6] = number
            if month == 4:  # the tag's number is in use as well
                pixels[:, 15:] = 0
            file.write(pixels)
        files.append(SourceFile(name=path.name, path=path))
    stack = opened(files)
    warnings = {warning.code: warning.detail for warning in found(stack)}
    assert "so these pixels count as missing" in warnings["nodata_assumed"]
    assert ("which is not in use" in warnings["nodata_assumed"]) == (nodata == 0)
    assert ("nodata_suspected" in warnings) == (nodata == 0)
    with StackReader(calibrate(stack)) as reader:
        sits = reader.read(Window(0, 0, 20, 20))
    dates = slice(0, 3 if nodata == 0 else 4)
    assert not sits.valid[dates, :6].any()
    assert sits.valid[:, 6:15].all()
    assert sits.valid[:3, 15:].all()
    assert not sits.valid[3, 15:].any()
    if nodata == 0:
        assert "'20210405.tif'" in warnings["nodata_suspected"]


@pytest.mark.parametrize(
    ("bands", "how", "code"),
    [
        ([0], {}, "nodata_suspected"),
        ([0, 2], {"nodata": 0}, "nodata_suspected"),
        ([0, 1, 2], {}, "nodata_assumed"),
        ([0], {"nodata": 65_535}, None),
    ],
)
def test_saturated_numbers_in_some_bands_are_named(
    tmp_path: Path, bands: list[int], how: dict, code: str | None
) -> None:
    files = [field(tmp_path / f"20210{month}05.tif", **how) for month in range(1, 5)]
    with rasterio.open(files[2].path, "r+") as file:
        pixels = file.read()
        pixels[bands, :2] = 65_535
        file.write(pixels)
    warnings = found(opened(files))
    assert [w.code for w in warnings] == ([code] if code else [])
    if code == "nodata_suspected":
        names = ", ".join(BANDS[c] for c in bands)
        said = f"is in {names} of up to 10.0% of the pixels sampled, in '20210305.tif'"
        assert said in warnings[0].detail


# --- the sample -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"tiled": True, "blockxsize": 64, "blockysize": 64}])
def test_a_large_raster_is_judged_by_places_spread_over_it(tmp_path: Path, how: dict) -> None:
    pixels = np.zeros((3, 300, 700), np.uint16)
    pixels[:, 200:, 400:] = 60_000  # the lower right alone has data
    file = write(tmp_path / "20210105.tif", pixels, descriptions=BANDS, **how)
    with pytest.raises(ImplausibleReflectance):
        calibrate(opened([file]))


def test_many_dates_are_judged_by_a_few_spread_over_them(tmp_path: Path) -> None:
    days = [f"20{year:02d}{month:02d}01" for year in (19, 20) for month in range(1, 13)]
    files = [
        field(tmp_path / f"{day}.tif", times=10_000 if day < "20200101" else 1e6, dtype="uint32")
        for day in days
    ]
    with pytest.raises(ImplausibleReflectance):
        calibrate(opened(files), [*range(8, 24)])
    assert codes(opened(files), range(12)) == []

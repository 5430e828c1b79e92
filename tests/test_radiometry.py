"""Radiometry checks: values that are rejected, that cause a warning, and that pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from service.errors import ImplausibleReflectance
from service.read.geotiff import SourceFile
from service.read.layouts import StackOptions
from service.read.radiometry import check_radiometry
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
    """A field of about the reflectance given in blue, red and near infrared."""
    rng = np.random.default_rng(0)
    spread = rng.uniform(0.8, 1.2, (3, side, side))
    pixels = np.asarray(levels)[:, None, None] * spread * times + add
    return write(path, pixels.astype(dtype), descriptions=BANDS, **how)


def codes(stack: Stack, used: Sequence[int] | None = None) -> list[str]:
    return [warning.code for warning in check_radiometry(stack, used)]


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
        check_radiometry(stack)
    for part in (fix, "-0.2 to 1.6", f"scale {stack.scale:g} and offset {stack.offset:g}"):
        assert part in caught.value.detail


def test_the_message_says_the_median(tmp_path: Path) -> None:
    pixels = np.full((3, 5, 5), 3000, np.uint16)
    file = write(tmp_path / "20210105.tif", pixels, descriptions=BANDS)
    with pytest.raises(ImplausibleReflectance, match="sampled is 3000,"):
        check_radiometry(opened([file], scale=1.0))


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
        check_radiometry(opened([file], mask="none"))


def test_only_the_dates_used_are_judged(tmp_path: Path) -> None:
    files = [
        field(tmp_path / "20210105.tif"),
        field(tmp_path / "20210115.tif", times=1e6, dtype="uint32"),
    ]
    stack = opened(files)
    assert codes(stack, [0]) == []
    with pytest.raises(ImplausibleReflectance):
        check_radiometry(stack, [1])
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


def test_imagery_without_near_infrared_is_not_judged_for_it(tmp_path: Path) -> None:
    file = field(tmp_path / "20210105.tif", levels=(0.04, 0.40, 0.06))
    assert codes(opened([file], bands=("B02", "B04"))) == []


# --- baseline_offset_suspected --------------------------------------------------------------


def seasons(folder: Path, *, late: int, **how) -> list[SourceFile]:
    """Dates on both sides of the change of baseline, the later ones with `late` added."""
    early = [field(folder / f"{day}.tif", **how) for day in BEFORE]
    return early + [field(folder / f"{day}.tif", add=late, **how) for day in AFTER]


def test_the_offset_of_the_later_baseline_is_suspected(tmp_path: Path) -> None:
    stack = opened(seasons(tmp_path, late=1000))
    (warning,) = check_radiometry(stack)
    assert warning.code == "baseline_offset_suspected"
    assert "2022-01-25" in warning.detail
    # Also where a run uses the dates of one side alone: the later ones then are wrong by 0.1.
    for used in ([2, 3], [0, 1, 2], [3, 4, 5], [5]):
        assert codes(stack, used) == ["baseline_offset_suspected"]
    assert codes(opened(seasons(tmp_path, late=1000)[:3])) == []


def test_without_blue_the_red_band_tells(tmp_path: Path) -> None:
    stack = opened(seasons(tmp_path, late=1000), bands=("B04", "B08"))
    assert codes(stack) == ["baseline_offset_suspected"]


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ({"late": 0}, {}),
        ({"late": 400}, {}),
        ({"late": 1000}, {"offset": 0.0}),
        ({"late": 1000, "offsets": (-0.01,) * 3}, {}),
        ({"late": 1000, "tags": {"offset": "-0.01"}}, {}),
        ({"late": 1000, "dtype": "float32"}, {"scale": 1e-4}),
    ],
)
def test_no_offset_is_suspected(tmp_path: Path, how: dict, options: dict) -> None:
    assert codes(opened(seasons(tmp_path, **how), **options)) == []


def test_one_hazy_date_is_no_baseline(tmp_path: Path) -> None:
    files = seasons(tmp_path, late=0)
    files[-1] = field(tmp_path / "20230105.tif", levels=(0.3, 0.3, 0.4))
    assert codes(opened(files)) == []


# --- scale_suspected ------------------------------------------------------------------------


def test_a_scale_that_counts_twice_is_suspected(tmp_path: Path) -> None:
    """Reflectance already, with the tag of the integers that it was made from."""
    scaled = {"dtype": "float32", "times": 1}
    twice = field(tmp_path / "a.tif", scales=(1e-4,) * 3, **scaled)
    (warning,) = check_radiometry(opened([twice]))
    assert warning.code == "scale_suspected"
    assert "scale=1" in warning.detail
    assert codes(opened([twice], scale=1.0)) == []
    assert codes(opened([field(tmp_path / "b.tif", **scaled)])) == []


def test_zeros_that_no_tag_calls_missing_are_suspected(tmp_path: Path) -> None:
    zeros = write(tmp_path / "a.tif", np.zeros((3, 9, 9), "float32"), descriptions=BANDS)
    assert codes(opened([zeros])) == ["scale_suspected"]


def test_8_bits_need_a_scale(tmp_path: Path) -> None:
    eight = {"dtype": "uint8", "times": 250}
    stack = opened([field(tmp_path / "a.tif", **eight)], mask="none")
    (warning,) = stack.warnings
    assert warning.code == "scale_suspected"
    assert "'a.tif' holds 8-bit numbers" in warning.detail
    assert opened([field(tmp_path / "a.tif", **eight)], scale=0.004, mask="none").warnings == ()
    tagged = field(tmp_path / "b.tif", scales=(0.004,) * 3, **eight)
    assert opened([tagged], mask="none").warnings == ()


# --- the sample -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"tiled": True, "blockxsize": 64, "blockysize": 64}])
def test_a_large_raster_is_judged_by_places_spread_over_it(tmp_path: Path, how: dict) -> None:
    pixels = np.zeros((3, 300, 700), np.uint16)
    pixels[:, 200:, 400:] = 60_000  # the lower right alone has data
    file = write(tmp_path / "20210105.tif", pixels, descriptions=BANDS, **how)
    with pytest.raises(ImplausibleReflectance):
        check_radiometry(opened([file]))


def test_many_dates_are_judged_by_a_few_spread_over_them(tmp_path: Path) -> None:
    days = [f"20{year:02d}{month:02d}01" for year in (19, 20) for month in range(1, 13)]
    files = [
        field(tmp_path / f"{day}.tif", times=10_000 if day < "20200101" else 1e6, dtype="uint32")
        for day in days
    ]
    with pytest.raises(ImplausibleReflectance):
        check_radiometry(opened(files), [*range(8, 24)])
    assert codes(opened(files), range(12)) == []

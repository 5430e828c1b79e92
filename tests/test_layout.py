"""Layouts: which band of which date each plane is, checked by the plane's own number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.enums import ColorInterp
from rasterio.windows import Window

from service.api.responses import warning_headers
from service.errors import InvalidRequest, MissingBands, MissingDates
from service.read.band_names import behind_counts, listed_bands
from service.read.geotiff import SourceFile, label
from service.read.layouts import StackOptions
from service.read.reader import StackReader
from service.read.stack import Stack, open_stack
from tests.kits.rasters import write

NEEDED = ("B02", "B04", "B08")
CODE = {"B02": 2, "B03": 3, "B04": 4, "B08": 8, "SCL": 5, "B8A": 80}
D1, D2, D3 = date(2021, 1, 5), date(2021, 1, 15), date(2021, 2, 4)


def plane(band: str, t: int) -> np.ndarray:
    """2 x 2 pixels whose value encodes band and date: 1000 t + the band's code."""
    value = 5 if band == "SCL" else 1000 * t + CODE.get(band, 99)
    return np.full((2, 2), value, dtype=np.uint16)


def bands_of(*what: tuple[str, int]) -> np.ndarray:
    return np.stack([plane(band, t) for band, t in what])


def opened(
    files: Sequence[SourceFile],
    *,
    bands: Sequence[str] = NEEDED,
    dated: bool = True,
    **options: object,
) -> Stack:
    return open_stack(files, StackOptions(**options), bands=bands, dated=dated, max_bytes=2**20)


def band_numbers(stack: Stack) -> list[list[int]]:
    """The number that each plane of a stack contains (T, C)."""
    with StackReader(stack) as reader:
        sits = reader.read(Window(0, 0, 2, 2))
    assert sits.valid.all()
    return np.rint(sits.values[:, :, 0, 0] / 1e-4).astype(int).tolist()


def expected(*ts: int) -> list[list[int]]:
    return [[1000 * t + CODE[band] for band in NEEDED] for t in ts]


def one_date(path: Path, t: int, names: Sequence[str] = ("B08", "B02", "B04"), **how: object):
    return write(path, bands_of(*((name, t) for name in names)), descriptions=names, **how)


# --- file-per-date --------------------------------------------------------------------------


def test_one_file_per_date_is_read_in_any_order(tmp_path: Path) -> None:
    files = [
        one_date(tmp_path / "x_20210115.tif", 2),
        one_date(tmp_path / "x_20210204.tif", 3, ("B02", "B03", "B04", "B08", "SCL")),
        one_date(tmp_path / "x_20210105.tif", 1),
    ]
    stack = opened(files, mask="none")
    assert (stack.layout, stack.dates, stack.bands) == ("file-per-date", (D1, D2, D3), NEEDED)
    assert band_numbers(stack) == expected(1, 2, 3)
    assert stack.warnings == ()


def test_one_file_of_one_date_is_a_file_per_date(tmp_path: Path) -> None:
    stack = opened([one_date(tmp_path / "x_20210105.tif", 1)])
    assert (stack.layout, stack.dates) == ("file-per-date", (D1,))


def test_bands_are_in_the_requested_order(tmp_path: Path) -> None:
    stack = opened([one_date(tmp_path / "x_20210105.tif", 1)], bands=("B08", "B02"))
    assert band_numbers(stack) == [[1008, 1002]]


@pytest.mark.parametrize("name", ["datetime", "ACQUISITION_DATE", "TIFFTAG_DATETIME"])
def test_tags_date_a_file_before_its_name(tmp_path: Path, name: str) -> None:
    text = "2021:01:05 10:54:16" if name == "TIFFTAG_DATETIME" else "2021-01-05T10:54:16Z"
    stack = opened([one_date(tmp_path / "x_20190101.tif", 1, tags={name: text})])
    assert stack.dates == (D1,)


def test_dates_that_may_be_those_of_writing_are_named(tmp_path: Path) -> None:
    def codes(name: str) -> list[str]:
        files = [
            one_date(tmp_path / name.format(t), t, tags={"TIFFTAG_DATETIME": f"2021:01:0{t} 10:00"})
            for t in (1, 2)
        ]
        stack = opened(files, mask="none")
        assert stack.dates == (date(2021, 1, 1), date(2021, 1, 2))
        return [warning.code for warning in stack.warnings]

    assert codes("x_{}.tif") == ["dates_assumed"]
    assert codes("x_2021010{}.tif") == []  # the names agree


def test_the_acquisition_counts_before_the_time_of_writing(tmp_path: Path) -> None:
    tags = {"TIFFTAG_DATETIME": "2023:05:05 00:00:00", "ACQUISITION_DATE": "2021-01-05"}
    assert opened([one_date(tmp_path / "x.tif", 1, tags=tags)]).dates == (D1,)


def test_files_all_written_on_one_day_are_dated_by_their_names(tmp_path: Path) -> None:
    tags = {"TIFFTAG_DATETIME": "2023:05:05 00:00:00"}
    files = [
        one_date(tmp_path / "x_20210105.tif", 1, tags=tags),
        one_date(tmp_path / "x_20210115.tif", 2, tags=tags),
    ]
    assert opened(files).dates == (D1, D2)


@pytest.mark.parametrize("tag", ["datetime", "date"])
def test_tags_and_names_of_different_dates_are_named(tmp_path: Path, tag: str) -> None:
    def stack(*days: str) -> Stack:
        return opened(
            [
                one_date(tmp_path / f"x_2021010{t}.tif", t, tags={tag: day})
                for t, day in enumerate(days, start=1)
            ],
            mask="none",
        )

    found = stack("2021-01-01", "2021-01-20", "2021-01-03")
    assert found.dates == (date(2021, 1, 1), date(2021, 1, 3), date(2021, 1, 20))
    (warning,) = found.warnings
    assert warning.code == "dates_contradicted"
    assert "'x_20210102.tif' has the date 2021-01-02 in its name and 2021-01-20" in warning.detail
    assert "(1 of 3 files are so): 2021-01-20 is used" in warning.detail
    # One day in all tags is that of writing, if the names distinguish the files.
    found = stack("2023-05-05", "2023-05-05")
    assert found.dates == (date(2021, 1, 1), date(2021, 1, 2))
    assert "(2 of 2 files are so): 2021-01-01 is used" in found.warnings[0].detail
    assert stack("2021-01-02", "2021-01-03").warnings == ()  # a day apart: time zones


def test_names_and_descriptions_of_different_dates_are_named(tmp_path: Path) -> None:
    names = ("B02", "B04", "B08")
    pixels = bands_of(*((name, 1) for name in names))
    files = [
        write(
            tmp_path / f"x_{day}.tif",
            pixels,
            descriptions=[f"{name}_2021-03-0{n}" for name in names],
        )
        for n, day in ((1, "20210301"), (2, "20210115"))
    ]
    stack = opened(files, mask="none")
    assert stack.dates == (D2, date(2021, 3, 1))
    (warning,) = stack.warnings
    assert warning.code == "dates_contradicted"
    assert "'x_20210115.tif' has the date 2021-01-15 in its name and 2021-03-02" in warning.detail


def test_names_from_addresses_are_decoded(tmp_path: Path) -> None:
    """The digits of %20 are not those of a date."""
    made = [one_date(tmp_path / f"{t}.tif", t) for t in (1, 2)]
    names = ("a%20folder/S2%20scene%202021-01-05.tif", "a%20folder/S2%20scene%202021-01-15.tif")
    files = [
        SourceFile(name=label(name, 0), path=file.path)
        for name, file in zip(names, made, strict=True)
    ]
    assert files[0].name == "a folder/S2 scene 2021-01-05.tif"
    assert opened(files).dates == (D1, D2)
    assert opened(files, grid=names[0].rpartition("/")[2]).dates == (D1, D2)
    assert label("50% of %2e%2e%2f%2e%2e%2fx%00.tif", 0) == "50% of ../x.tif"


@pytest.mark.parametrize("text", ["2021-01-05,2021-01-15", "['2021-01-05', '2021-01-15']",
                                  "2021-01-05T10:50:31Z 2021-01-15T10:50:31Z"])  # fmt: skip
def test_a_files_tag_may_list_its_dates(tmp_path: Path, text: str) -> None:
    two = bands_of(*((band, t) for t in (1, 2) for band in NEEDED))
    file = write(tmp_path / "stack.tif", two, descriptions=NEEDED * 2, tags={"dates": text})
    stack = opened([file])
    assert (stack.layout, stack.dates) == ("single-file", (D1, D2))
    assert band_numbers(stack) == expected(1, 2)
    files = [
        write(tmp_path / f"{band}.tif", bands_of((band, 1), (band, 2)), tags={"dates": text})
        for band in NEEDED
    ]
    stack = opened(files)
    assert (stack.layout, stack.dates) == ("file-per-band", (D1, D2))
    three = write(tmp_path / "x.tif", two, descriptions=NEEDED * 2,
                  tags={"dates": f"{text},2021-02-04"})  # fmt: skip
    with pytest.raises(MissingDates):
        opened([three])


def test_descriptions_date_a_file_that_nothing_else_does(tmp_path: Path) -> None:
    pixels = bands_of(("B02", 1), ("B04", 1), ("B08", 1))
    names = ["B02_2021-01-05", "B04_2021-01-05", "B08_2021-01-05"]
    stack = opened([write(tmp_path / "x.tif", pixels, descriptions=names)])
    assert (stack.layout, stack.dates) == ("file-per-date", (D1,))


def test_dates_given_count_before_those_of_the_files(tmp_path: Path) -> None:
    files = [one_date(tmp_path / f"x_2019010{t}.tif", t) for t in (1, 2)]
    stack = opened(files, dates=(D3, D1))
    assert stack.dates == (D1, D3)
    assert band_numbers(stack) == expected(2, 1)


def test_dates_may_be_given_for_all_files_or_for_those_used(tmp_path: Path) -> None:
    label = write(tmp_path / "LABEL.tif", bands_of(("LC", 1)))
    files = [label, *(one_date(tmp_path / f"{t}.tif", t) for t in (1, 2))]
    assert opened(files, dates=(D1, D2)).dates == (D1, D2)
    assert opened(files, dates=(D1, D2, D3)).dates == (D2, D3)


def test_fewer_dates_than_files_are_missing_and_more_are_invalid(tmp_path: Path) -> None:
    files = [one_date(tmp_path / f"{t}.tif", t) for t in range(8)]
    days = tuple(date(2021, 1, d) for d in range(1, 10))
    with pytest.raises(MissingDates, match="8 files but 7 dates"):
        opened(files, dates=days[:7])
    with pytest.raises(InvalidRequest, match="8 files but 9 dates") as caught:
        opened(files, dates=days)
    assert caught.value.errors[0]["field"] == "dates"


def test_missing_dates_name_the_files(tmp_path: Path) -> None:
    files = [one_date(tmp_path / "x_20210105.tif", 1), one_date(tmp_path / "march.tif", 2)]
    with pytest.raises(MissingDates, match=r"1 of 2 files \('march\.tif'\)"):
        opened(files)


def test_missing_bands_are_named_with_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(MissingBands) as caught:
        opened([one_date(tmp_path / "x_20210105.tif", 1, ("B02", "B03", "B8A"))])
    assert caught.value.detail.startswith("B04, B08 not found")
    assert "B02, B03, B8A" in caught.value.detail
    assert "'x_20210105.tif'" in caught.value.detail


def test_bands_without_a_name_are_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingBands, match="no band that is named and 4 bands without a name"):
        opened([write(tmp_path / "x_20210105.tif", np.ones((4, 2, 2), np.uint16))])


def test_a_band_missing_on_one_date_is_named(tmp_path: Path) -> None:
    files = [
        one_date(tmp_path / "x_20210105.tif", 1),
        one_date(tmp_path / "x_20210115.tif", 2, ("B02", "B04")),
    ]
    with pytest.raises(MissingBands, match=r"2021-01-15 has no B08.*x_20210115\.tif"):
        opened(files)


def test_b8a_replaces_a_missing_b08_with_a_warning(tmp_path: Path) -> None:
    files = [one_date(tmp_path / "x_20210105.tif", 1, ("B02", "B04", "B8A"))]
    stack = opened(files, mask="none")
    assert band_numbers(stack) == [[1002, 1004, 1080]]
    (warning,) = stack.warnings
    assert (warning.code, "no file has B08, so B8A" in warning.detail) == ("band_substituted", True)
    # The 20 m model takes both, and B8A is not read twice.
    with pytest.raises(MissingBands, match="B08 not found"):
        opened(files, bands=("B02", "B04", "B08", "B8A"))
    names = ("B8A", "B8", "B2", "B4")
    pixels = bands_of(("B8A", 1), ("B08", 1), ("B02", 1), ("B04", 1))
    stack = opened([write(tmp_path / "y_20210105.tif", pixels, descriptions=names)])
    assert band_numbers(stack) == expected(1)


def test_band_tags_name_bands_too(tmp_path: Path) -> None:
    pixels = bands_of(("B04", 1), ("B08", 1), ("B02", 1))
    tags = {1: {"long_name": "red"}, 2: {"name": "nir"}, 3: {"BandName": "blue"}}
    assert band_numbers(
        opened([write(tmp_path / "20210105.tif", pixels, band_tags=tags)])
    ) == expected(1)


def test_names_given_count_before_descriptions(tmp_path: Path) -> None:
    pixels = bands_of(("B04", 1), ("B02", 1), ("B08", 1))
    file = write(tmp_path / "20210105.tif", pixels, descriptions=NEEDED)
    assert band_numbers(opened([file], bands=NEEDED)) == [[1004, 1002, 1008]]
    stack = open_stack(
        [file],
        StackOptions(bands=("red", "B2", "nir")),
        bands=NEEDED,
        max_bytes=2**20,
    )
    assert stack.layout == "file-per-date"
    assert band_numbers(stack) == expected(1)


def with_names(files: Sequence[SourceFile], *names: str, **options: object) -> Stack:
    return open_stack(files, StackOptions(bands=names, **options), bands=NEEDED, max_bytes=2**20)


def test_names_that_do_not_fit_the_bands_are_rejected(tmp_path: Path) -> None:
    file = write(tmp_path / "20210105.tif", np.ones((4, 2, 2), np.uint16))
    with pytest.raises(InvalidRequest, match=r"5 names but '20210105\.tif' has 4 bands"):
        with_names([file], "B02", "B03", "B04", "B08", "SCL")
    with pytest.raises(InvalidRequest, match=r"3 names but '20210105\.tif' has 4 bands"):
        with_names([file], *NEEDED, layout="file-per-date")


@pytest.mark.parametrize(
    "order",
    [
        "B01 B02 B03 B04 B05 B06 B07 B08 B8A B09 B10 B11 B12",
        "B01 B02 B03 B04 B05 B06 B07 B08 B09 B10 B11 B12 B8A",
        "B01 B02 B03 B04 B05 B06 B07 B08 B8A B09 B11 B12",
    ],
)
def test_whole_products_need_no_names(tmp_path: Path, order: str) -> None:
    pixels = bands_of(*((band, 1) for band in order.split()))
    stack = opened([write(tmp_path / "x_20210105.tif", pixels)], mask="none")
    assert (stack.layout, band_numbers(stack)) == ("file-per-date", expected(1))
    # They are assumed, and never in silence.
    warning, *of_13 = stack.warnings
    assert warning.code == "bands_assumed"
    # Level 1C alone has 13 bands.
    assert [one.code for one in of_13] == ["top_of_atmosphere"] * ("B10" in order)
    assert "B02 is band 2, B04 is band 4, B08 is band 8" in warning.detail
    assert "'x_20210105.tif'" in warning.detail


def opened_with_names(files: Sequence[SourceFile], names: tuple[str, ...]) -> Stack:
    options = StackOptions(bands=names, mask="none")
    return open_stack(files, options, bands=NEEDED, max_bytes=2**20)


TEN = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")


@pytest.mark.parametrize("form", ["Band {}", "band_{:02d}", "b{}", "B{}", "S2_mosaic_Band_{}"])
def test_names_that_only_count_the_bands_are_not_those_of_sentinel_2(
    tmp_path: Path, form: str
) -> None:
    # "Band 2" of these ten is green, and "Band 8" is B8A.
    pixels = bands_of(*((band, 1) for band in TEN))
    names = [form.format(k) for k in range(1, 11)]
    file = write(tmp_path / "x_20210105.tif", pixels, descriptions=names)
    refused = re.escape(
        f"('{names[0]}' only states the band's position); name each band in its description, or"
    )
    with pytest.raises(MissingBands, match=refused):
        opened([file])
    assert band_numbers(opened_with_names([file], TEN)) == expected(1)


@pytest.mark.parametrize(
    "form", ["Band {n}: {b}", "Band {n} (T31UES_20210105T104421_{b}_10m.jp2)", "band_{n:02d} = {b}"]
)
def test_names_behind_the_bands_positions_count(tmp_path: Path, form: str) -> None:
    order = ("B04", "B03", "B08", "B02", "SCL")
    pixels = bands_of(*((band, 1) for band in order))
    names = [form.format(n=n, b=b) for n, b in enumerate(order, 1)]
    stack = opened([write(tmp_path / "x_20210105.tif", pixels, descriptions=names)])
    assert (stack.mask, band_numbers(stack)) == ("scl", expected(1))


@pytest.mark.parametrize("by_band", [False, True])
@pytest.mark.parametrize("form", ["{b}_{n}", "{b}.{n}", "{b}[{n}]", "{b}{n}", "t{n}_{b}", "R"])
def test_numbers_behind_the_names_count_the_dates(tmp_path: Path, form: str, by_band: bool) -> None:
    names = {"B02": "blue", "B04": "red", "B08": "nir"}
    what = [(band, t) for t in (1, 2, 3) for band in names]
    if by_band:
        what.sort()

    def name(band: str, t: int) -> str:
        if form == "R":  # R's make.unique and Earth Engine leave the first ones without a number
            return names[band] if t == 1 else f"{names[band]}.{t - 1}"
        return form.format(b=names[band], n=t)

    texts = [name(band, t) for band, t in what]
    file = write(tmp_path / "stack.tif", bands_of(*what), descriptions=texts)
    stack = opened([file], dates=(D1, D2, D3), mask="none")
    assert (stack.dates, band_numbers(stack)) == ((D1, D2, D3), expected(1, 2, 3))
    codes = [warning.code for warning in stack.warnings]
    assert codes == ([] if form == "t{n}_{b}" else ["dates_assumed"])  # nir_2 is a date, not a band
    with pytest.raises(
        MissingDates, match=r"for the 3 dates .* numbers \d to \d in the names count"
    ):
        opened([file])


@pytest.mark.parametrize("layout", ["single-file", "file-per-band"])
def test_numbers_count_the_dates_in_whatever_order_the_bands_are(
    tmp_path: Path, layout: str
) -> None:
    order = (3, 1, 2)
    groups = [NEEDED] if layout == "single-file" else [(band,) for band in NEEDED]
    files = [
        write(
            tmp_path / f"{n}.tif",
            bands_of(*((band, t) for t in order for band in group)),
            descriptions=[f"{band}_{t}" for t in order for band in group],
        )
        for n, group in enumerate(groups)
    ]
    stack = opened(files, dates=(D1, D2, D3), mask="none")
    assert (stack.layout, stack.dates) == (layout, (D1, D2, D3))
    assert band_numbers(stack) == expected(1, 2, 3)
    (warning,) = stack.warnings
    assert warning.code == "dates_assumed"
    assert f"1 is {D1}, 3 is {D3}" in warning.detail
    # Dates in the order of the bands agree with the numbers.
    stack = opened(files, dates=(D3, D1, D2), mask="none")
    assert band_numbers(stack) == expected(1, 2, 3)
    assert stack.warnings == ()


def test_one_number_behind_all_names_of_a_file_is_that_of_its_date(tmp_path: Path) -> None:
    names = ("nir", "blue", "red")
    files = [
        write(
            tmp_path / f"x_2021010{t}.tif",
            bands_of(*((band, t) for band in ("B08", "B02", "B04"))),
            descriptions=[f"{name}_{t}" for name in names],
        )
        for t in (1, 2, 3)
    ]
    assert band_numbers(opened(files, mask="none")) == expected(1, 2, 3)


@pytest.mark.parametrize(
    "names",
    [
        ("nir_1", "nir_2", "swir_1", "swir_2"),
        ("red_edge_1", "red_edge_2", "red_edge_3"),
        ("blue", "red", "nir_1", "nir_2"),
        ("B1", "B2", "B3"),
        ("B2", "B3"),
        ("B8", "B8_2", "B9"),
        ("nir_2", "swir_2"),
    ],
)
def test_numbers_that_are_parts_of_names_do_not_count_dates(names: tuple[str, ...]) -> None:
    assert behind_counts(names) == (names, None)


@pytest.mark.parametrize("text", ["B1", "Band 1", "B04", "red"])
def test_names_of_files_count_before_a_description_that_all_of_them_have(
    tmp_path: Path, text: str
) -> None:
    files = [
        write(tmp_path / f"x_2021010{t}_{band}.tif", bands_of((band, t)), descriptions=[text])
        for t in (1, 2)
        for band in (*NEEDED, "SCL")
    ]
    stack = opened(files)
    assert (stack.mask, band_numbers(stack), stack.warnings) == ("scl", expected(1, 2), ())


def test_names_and_descriptions_of_different_bands_are_named(tmp_path: Path) -> None:
    named = {"B02": "B04", "B04": "B02", "B08": "nir narrow"}
    files = [
        write(
            tmp_path / f"x_2021010{t}_{named[band]}.tif", bands_of((band, t)), descriptions=[band]
        )
        for t in (1, 2)
        for band in NEEDED
    ]
    stack = opened(files, mask="none")
    assert band_numbers(stack) == expected(1, 2)  # by the descriptions
    (warning,) = stack.warnings
    assert warning.code == "bands_contradicted"
    assert "_B04.tif' is B04 by its name and B02 by its description" in warning.detail
    assert "(4 of 6 files are so)" in warning.detail


def test_dates_in_another_order_than_the_files_are_numbered(tmp_path: Path) -> None:
    files = [one_date(tmp_path / f"x_{t}.tif", t) for t in (1, 10, 2)]
    stack = opened(files, dates=(D1, D2, D3), mask="none")
    (warning,) = stack.warnings
    assert warning.code == "dates_contradicted"
    assert f"{D3} to 'x_2.tif' and {D2} to 'x_10.tif'" in warning.detail
    assert opened(files, dates=(D1, D3, D2), mask="none").warnings == ()


def test_counted_bands_are_named_by_their_wavelengths(tmp_path: Path) -> None:
    pixels = bands_of(("B03", 1), ("B04", 1), ("B08", 1), ("B02", 1), ("SCL", 1))
    tags = {k: {"wavelength": w} for k, w in enumerate(("559.8", "664.6", "832.8", "492.4"), 1)}
    names = ("Band 1", "Band 2", "Band 3", "Band 4", "SCL")
    file = write(tmp_path / "x_20210105.tif", pixels, descriptions=names, band_tags=tags)
    stack = opened([file])
    assert (stack.mask, band_numbers(stack)) == ("scl", expected(1))


def test_counted_bands_of_a_whole_product_are_assumed_to_be_in_its_order(tmp_path: Path) -> None:
    order = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"]
    names = [f"Band {k}" for k in range(1, 13)]
    pixels = bands_of(*((band, 1) for band in order))
    stack = opened([write(tmp_path / "x_20210105.tif", pixels, descriptions=names)], mask="none")
    assert [warning.code for warning in stack.warnings] == ["bands_assumed"]
    assert band_numbers(stack) == expected(1)


def test_counted_bands_of_one_band_are_its_dates(tmp_path: Path) -> None:
    days = {k: {"datetime": day} for k, day in enumerate(("2021-01-05", "2021-01-15"), 1)}
    files = [
        write(
            tmp_path / f"{band}.tif",
            bands_of((band, 1), (band, 2)),
            descriptions=("Band 1", "Band 2"),
            band_tags=days,
        )
        for band in NEEDED
    ]
    stack = opened(files, mask="none")
    assert (stack.layout, band_numbers(stack)) == ("file-per-band", expected(1, 2))


def test_files_that_only_count_the_bands_of_a_stack_name_none(tmp_path: Path) -> None:
    files = [write(tmp_path / f"x_20210105_B{k}.tif", bands_of(("B02", 1))) for k in range(1, 11)]
    with pytest.raises(MissingBands, match="'x_20210105_B1' only states the band's position"):
        opened(files)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("view_zenith_B{}", "'view_zenith_B492': 'zenith' describes a band and is not its refle"),
        ("Rrs_{}", "'Rrs_492': the reflectance of water, not of the surface; export"),
        ("rhow_{}", "'rhow_492': the reflectance of water, not of the surface; export"),
        ("B{}_stdDev", "'B492_stdDev': 'stddev' is computed from bands and is not reflectance"),
    ],
)
def test_the_reason_is_given_for_a_name_that_is_not_read(
    tmp_path: Path, name: str, why: str
) -> None:
    names = [name.format(nm) for nm in (492, 665, 833)]
    pixels = bands_of(("B02", 1), ("B04", 1), ("B08", 1))
    with pytest.raises(MissingBands, match=re.escape(why)):
        opened([write(tmp_path / "x_20210105.tif", pixels, descriptions=names)])


def test_files_without_a_needed_band_are_left_out(tmp_path: Path) -> None:
    elsewhere = {"crs": "EPSG:3857", "transform": Affine(1, 0, 0, 0, -1, 9)}
    label = write(tmp_path / "LABEL_CT.tif", bands_of(("LC", 1)), **elsewhere)
    swir = one_date(tmp_path / "swir_20210105.tif", 1, ("B11", "B12"), crs=None)
    stack = opened([label, one_date(tmp_path / "x_20210105.tif", 1), swir], mask="none")
    (warning,) = stack.warnings
    assert warning.code == "files_unused"
    assert "2 of 3 files" in warning.detail
    assert "'LABEL_CT.tif': names no known band" in warning.detail
    assert "'swir_20210105.tif': the model does not take B11, B12" in warning.detail
    assert stack.files == ("x_20210105.tif",)
    assert band_numbers(stack) == expected(1)


def test_a_file_that_lost_its_names_is_not_left_out(tmp_path: Path) -> None:
    files = [
        one_date(tmp_path / "x_20210105.tif", 1),
        write(tmp_path / "x_20210115.tif", bands_of(*((band, 2) for band in NEEDED))),
    ]
    with pytest.raises(MissingBands, match=r"'x_20210115\.tif' has 3 bands like the other files"):
        opened(files)


def test_bands_of_one_date_in_several_files_are_put_together(tmp_path: Path) -> None:
    files = []
    for t, day in ((1, "20210105"), (2, "20210115")):
        files.append(one_date(tmp_path / f"{day}_10m.tif", t))
        files.append(write(tmp_path / f"{day}_SCL.tif", bands_of(("SCL", t))))
    stack = opened(files)
    assert (stack.mask, stack.dates, stack.warnings) == ("scl", (D1, D2), ())
    assert band_numbers(stack) == expected(1, 2)


def test_a_band_twice_in_a_file_of_one_date_is_rejected(tmp_path: Path) -> None:
    file = one_date(tmp_path / "20210105.tif", 1, ("B02", "B04", "B08", "B04"))
    with pytest.raises(InvalidRequest, match=r"holds B04 in its bands 2 and 4") as caught:
        opened([file], layout="file-per-date")
    assert caught.value.errors[0]["field"] == "layout"


def test_files_of_different_layouts_are_rejected(tmp_path: Path) -> None:
    red = write(tmp_path / "b.tif", bands_of(("B04", 1), ("B04", 2)), descriptions=["B04", "B04"])
    with pytest.raises(
        InvalidRequest, match=r"'20210105\.tif' looks like file-per-date but 'b\.tif'"
    ):
        opened([one_date(tmp_path / "20210105.tif", 1), red])


# --- file-per-band --------------------------------------------------------------------------


def one_band(path: Path, band: str, ts: Sequence[int] = (1, 2, 3), **how: object) -> SourceFile:
    return write(path, bands_of(*((band, t) for t in ts)), **how)


def colours(folder: Path, **how: object) -> list[SourceFile]:
    names = {"nir.tif": "B08", "blue.tif": "B02", "red.tif": "B04", "ndvi.tif": "x", "doy.tif": "x"}
    return [one_band(folder / name, band, **how) for name, band in names.items()]


def test_one_file_per_band_is_read_by_its_name(tmp_path: Path) -> None:
    stack = opened(colours(tmp_path), dates=(D3, D1, D2))
    assert (stack.layout, stack.dates) == ("file-per-band", (D1, D2, D3))
    assert stack.files == ("nir.tif", "blue.tif", "red.tif")
    assert band_numbers(stack) == expected(2, 3, 1)


def test_bands_of_a_file_are_dated_by_their_descriptions(tmp_path: Path) -> None:
    days = ["2021-02-04", "2021-01-05", "2021-01-15"]
    stack = opened(colours(tmp_path, descriptions=days))
    assert (stack.layout, stack.dates) == ("file-per-band", (D1, D2, D3))
    assert band_numbers(stack) == expected(2, 3, 1)


def test_bands_of_a_file_are_dated_by_their_tags(tmp_path: Path) -> None:
    tags = {n: {"datetime": d.isoformat()} for n, d in enumerate((D1, D2, D3), start=1)}
    assert opened(colours(tmp_path, band_tags=tags)).dates == (D1, D2, D3)


def test_one_file_per_band_is_read_by_its_descriptions(tmp_path: Path) -> None:
    files = [
        one_band(tmp_path / f"{n}.tif", band, descriptions=[f"{band}_{d}" for d in (D1, D2, D3)])
        for n, band in enumerate(NEEDED)
    ]
    stack = opened(files)
    assert (stack.layout, band_numbers(stack)) == ("file-per-band", expected(1, 2, 3))


def test_one_file_per_band_is_read_by_the_names_given(tmp_path: Path) -> None:
    files = [one_band(tmp_path / f"{n}.tif", b) for n, b in enumerate(("B08", "x", "B02", "B04"))]
    stack = with_names(files, "B08", "NDVI", "B02", "B04", dates=(D1, D2, D3))
    assert (stack.layout, band_numbers(stack)) == ("file-per-band", expected(1, 2, 3))
    with pytest.raises(InvalidRequest, match="3 names but 4 files"):
        with_names(files, *NEEDED, dates=(D1, D2, D3), layout="file-per-band")


def unused(stack: Stack) -> str:
    (warning,) = [warning for warning in stack.warnings if warning.code == "files_unused"]
    return warning.detail


def test_the_reason_why_a_bands_file_is_not_used_is_its_band(tmp_path: Path) -> None:
    files = [one_band(tmp_path / f"{band}.tif", band) for band in ("B02", "B03", "B04", "B08")]
    found = opened(files, dates=(D1, D2, D3))
    assert unused(found).endswith("'B03.tif': the model does not take B03")
    files = [one_band(tmp_path / f"{n}.tif", b) for n, b in enumerate(("B08", "x", "B02", "B04"))]
    found = with_names(files, "B08", "B03", "B02", "B04", dates=(D1, D2, D3))
    assert unused(found).endswith("'1.tif': the model does not take B03")


def test_names_as_many_as_files_and_bands_are_assigned_by_the_files_names(tmp_path: Path) -> None:
    by_band = [
        one_band(tmp_path / f"{c}.tif", b)
        for c, b in [("blue", "B02"), ("red", "B04"), ("nir", "B08")]
    ]
    stack = with_names(by_band, *NEEDED, dates=(D1, D2, D3))
    assert (stack.layout, band_numbers(stack)) == ("file-per-band", expected(1, 2, 3))
    by_date = [
        write(tmp_path / f"2021010{t}.tif", bands_of(*((b, t) for b in NEEDED))) for t in (1, 2, 3)
    ]
    stack = with_names(by_date, *NEEDED)
    assert (stack.layout, band_numbers(stack)) == ("file-per-date", expected(1, 2, 3))


def test_sentinel_2_names_give_band_and_date(tmp_path: Path) -> None:
    files = [
        one_band(tmp_path / f"T31UES_{day}T105416_{band}_10m.tif", band, (t,))
        for band in (*NEEDED, "B03", "SCL")
        for t, day in ((1, "20210105"), (2, "20210115"))
    ]
    stack = opened(files)
    assert stack.layout == "file-per-band-and-date"
    assert (stack.dates, stack.mask) == ((D1, D2), "scl")
    assert band_numbers(stack) == expected(1, 2)


def test_files_of_one_band_and_date_may_be_dated_one_by_one(tmp_path: Path) -> None:
    files = [one_band(tmp_path / f"{n}_{band}.tif", band, (n,)) for n in (1, 2) for band in NEEDED]
    stack = opened(files, dates=(D1, D1, D1, D2, D2, D2))
    assert band_numbers(stack) == expected(1, 2)


def test_dates_that_do_not_fit_the_bands_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(MissingDates, match=r"'nir\.tif' has 3 bands but 2 dates"):
        opened(colours(tmp_path), dates=(D1, D2))
    with pytest.raises(
        MissingDates, match=r"each of 3 files \('nir\.tif', 'blue\.tif', 'red\.tif'\)"
    ):
        opened(colours(tmp_path))


def test_a_band_file_with_one_date_less_is_rejected(tmp_path: Path) -> None:
    days = [f"{d}" for d in (D1, D2, D3)]
    files = [
        one_band(tmp_path / "blue.tif", "B02", descriptions=days),
        one_band(tmp_path / "red.tif", "B04", (1, 2), descriptions=days[:2]),
        one_band(tmp_path / "nir.tif", "B08", descriptions=days),
    ]
    with pytest.raises(MissingBands, match="2021-02-04 has no B04"):
        opened(files)


def test_a_layout_that_does_not_fit_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"file-per-band, but '20210105\.tif' holds B02, B04"):
        opened([one_date(tmp_path / "20210105.tif", 1)], layout="file-per-band")
    with pytest.raises(MissingBands):
        opened(colours(tmp_path), layout="single-file", dates=(D1, D2, D3))


# --- single-file ----------------------------------------------------------------------------

DATE_MAJOR = [(band, t) for t in (1, 2, 3) for band in ("B02", "B03", "B04", "B08")]
BAND_MAJOR = [(band, t) for band in ("B02", "B03", "B04", "B08") for t in (1, 2, 3)]
DAYS = {1: D1, 2: D2, 3: D3}


def test_dates_of_one_file_stand_together_by_default(tmp_path: Path) -> None:
    file = write(tmp_path / "stack.tif", bands_of(*DATE_MAJOR))
    stack = with_names([file], "B02", "B03", "B04", "B08", dates=(D1, D2, D3))
    assert (stack.layout, stack.dates) == ("single-file", (D1, D2, D3))
    assert band_numbers(stack) == expected(1, 2, 3)


@pytest.mark.parametrize("planes", [DATE_MAJOR, BAND_MAJOR, DATE_MAJOR[::-1]])
@pytest.mark.parametrize("form", ["{band}_{day}", "{day}_{band}", "{band} - {day:%Y%m%d}"])
def test_descriptions_decide_the_order(
    tmp_path: Path, planes: list[tuple[str, int]], form: str
) -> None:
    texts = [form.format(band=band, day=DAYS[t]) for band, t in planes]
    stack = opened([write(tmp_path / "stack.tif", bands_of(*planes), descriptions=texts)])
    assert (stack.layout, stack.dates) == ("single-file", (D1, D2, D3))
    assert band_numbers(stack) == expected(1, 2, 3)


@pytest.mark.parametrize("planes", [DATE_MAJOR, BAND_MAJOR])
def test_described_bands_and_given_dates(tmp_path: Path, planes: list[tuple[str, int]]) -> None:
    file = write(tmp_path / "stack.tif", bands_of(*planes), descriptions=[b for b, _ in planes])
    stack = opened([file], dates=(D1, D2, D3))
    assert (stack.layout, band_numbers(stack)) == ("single-file", expected(1, 2, 3))
    with pytest.raises(MissingDates, match=r"'stack\.tif' holds 3 dates \(12 bands\) but 2 dates"):
        opened([file], dates=(D1, D2))


@pytest.mark.parametrize("planes", [DATE_MAJOR, BAND_MAJOR])
def test_described_dates_and_given_bands(tmp_path: Path, planes: list[tuple[str, int]]) -> None:
    days = [str(DAYS[t]) for _, t in planes]
    file = write(tmp_path / "stack.tif", bands_of(*planes), descriptions=days)
    stack = with_names([file], "B02", "B03", "B04", "B08")
    assert (stack.layout, stack.dates) == ("single-file", (D1, D2, D3))
    assert band_numbers(stack) == expected(1, 2, 3)


def test_every_band_may_be_named_in_file_order(tmp_path: Path) -> None:
    file = write(tmp_path / "stack.tif", bands_of(*BAND_MAJOR))
    stack = with_names([file], *(band for band, _ in BAND_MAJOR), dates=(D1, D2, D3))
    assert (stack.layout, band_numbers(stack)) == ("single-file", expected(1, 2, 3))


def test_whole_products_in_one_file(tmp_path: Path) -> None:
    product = [f"B{n:02d}" for n in range(1, 14)]
    file = write(tmp_path / "stack.tif", bands_of(*((b, t) for t in (1, 2) for b in product)))
    stack = opened([file], dates=(D1, D2))
    assert (stack.layout, band_numbers(stack)) == ("single-file", expected(1, 2))


def test_a_date_of_a_single_file_that_lacks_a_band_is_refused(tmp_path: Path) -> None:
    planes = DATE_MAJOR[:-1]
    texts = [f"{band}_{DAYS[t]}" for band, t in planes]
    with pytest.raises(MissingBands, match="2021-02-04 has no B08"):
        opened([write(tmp_path / "stack.tif", bands_of(*planes), descriptions=texts)])


def test_uneven_described_dates_are_not_guessed_at(tmp_path: Path) -> None:
    planes = [("B02", 1), ("B04", 1), ("B08", 1), ("B02", 2), ("B04", 3), ("B08", 3)]
    days = [str(DAYS[t]) for _, t in planes]
    file = write(tmp_path / "stack.tif", bands_of(*planes), descriptions=days)
    with pytest.raises(InvalidRequest, match=r"3 names but 'stack\.tif' has 1 band of 2021-01-15"):
        with_names([file], *NEEDED)


def test_single_file_given_for_one_date(tmp_path: Path) -> None:
    stack = opened([one_date(tmp_path / "20210105.tif", 1)], layout="single-file")
    assert (stack.layout, stack.dates, band_numbers(stack)) == ("single-file", (D1,), expected(1))


# --- the same date, and no date -------------------------------------------------------------


def test_files_of_one_date_are_one_observation(tmp_path: Path) -> None:
    files = [
        one_date(tmp_path / "a_20210105.tif", 1),
        one_date(tmp_path / "b_20210105.tif", 2),
        one_date(tmp_path / "c_20210115.tif", 3),
    ]
    stack = opened(files, mask="none")
    assert stack.dates == (D1, D2)
    (warning,) = stack.warnings
    assert warning.code == "merged_dates"
    assert "3 observations on 2 dates" in warning.detail
    assert "2021-01-05" in warning.detail
    assert band_numbers(stack) == expected(1, 3)
    assert band_numbers(opened([files[1], files[0], files[2]])) == expected(2, 3)


def test_granules_with_one_file_per_band_stay_separate(tmp_path: Path) -> None:
    files = [
        one_band(tmp_path / f"{tile}_20210105_{band}.tif", band, (t,))
        for band in NEEDED
        for t, tile in ((1, "first"), (2, "second"))
    ]
    stack = opened(files, mask="none")
    assert [warning.code for warning in stack.warnings] == ["merged_dates"]
    assert band_numbers(stack) == expected(1)


def test_a_date_twice_in_a_band_file_is_one_observation(tmp_path: Path) -> None:
    stack = opened(colours(tmp_path), dates=(D1, D2, D1), mask="none")
    assert stack.dates == (D1, D2)
    assert [warning.code for warning in stack.warnings] == ["files_unused", "merged_dates"]
    assert band_numbers(stack) == expected(1, 2)


def test_imagery_needs_no_dates(tmp_path: Path) -> None:
    files = [one_date(tmp_path / f"{name}.tif", t) for t, name in ((1, "b"), (2, "a"))]
    stack = opened(files, dated=False, mask="none")
    assert (stack.dates, stack.observations, stack.warnings) == ((), 2, ())
    assert band_numbers(stack) == expected(1, 2)


def test_imagery_with_dates_keeps_them(tmp_path: Path) -> None:
    files = [one_date(tmp_path / f"{day}.tif", t) for t, day in ((2, "20210115"), (1, "20210105"))]
    stack = opened(files, dated=False)
    assert (stack.dates, band_numbers(stack)) == ((D1, D2), expected(1, 2))


def test_imagery_partly_dated_is_undated(tmp_path: Path) -> None:
    files = [one_date(tmp_path / "20210115.tif", 1), one_date(tmp_path / "scene.tif", 2)]
    stack = opened(files, dated=False)
    assert (stack.dates, stack.observations, band_numbers(stack)) == ((), 2, expected(1, 2))


def test_imagery_with_one_band_per_file_is_put_together(tmp_path: Path) -> None:
    stack = opened(
        [
            one_band(tmp_path / f"{c}.tif", b, (1,))
            for c, b in [("nir", "B08"), ("red", "B04"), ("blue", "B02")]
        ],
        dated=False,
    )
    assert (stack.dates, stack.observations, band_numbers(stack)) == ((), 1, expected(1))


# --- the scene classification ---------------------------------------------------------------


def test_a_requested_mask_that_is_missing_is_rejected(tmp_path: Path) -> None:
    files = [one_date(tmp_path / "20210105.tif", 1)]
    assert opened(files).mask == "none"
    with pytest.raises(InvalidRequest, match="0 of 1 observation") as caught:
        opened(files, mask="scl")
    assert caught.value.errors[0]["field"] == "mask"


def test_a_mask_of_only_some_dates_is_rejected(tmp_path: Path) -> None:
    files = [
        one_date(tmp_path / "20210105.tif", 1, (*NEEDED, "SCL")),
        one_date(tmp_path / "20210115.tif", 2),
    ]
    with pytest.raises(InvalidRequest, match=r"1 of 2 observations have .* '20210115\.tif' does"):
        opened(files)
    assert opened(files, mask="none").mask == "none"


# --- names and layouts as providers write them ----------------------------------------------


def in_folder(folder: Path, name: str, band: str, t: int, **how: object) -> SourceFile:
    """A file of one band and date, whose name has folders."""
    file = write(folder / name.replace("/", "+"), bands_of((band, t)), **how)
    return SourceFile(name=name, path=file.path)


def test_only_the_folder_may_name_the_date(tmp_path: Path) -> None:
    files = [
        in_folder(tmp_path, f"S2B_31UES_2021{day}_0_L2A/{band}.tif", band, t)
        for t, day in ((1, "0105"), (2, "0115"))
        for band in NEEDED
    ]
    stack = opened(files)
    assert stack.layout == "file-per-band-and-date"
    assert (stack.dates, band_numbers(stack)) == ((D1, D2), expected(1, 2))
    bare = [SourceFile(name=file.name.rpartition("/")[2], path=file.path) for file in files]
    with pytest.raises(MissingDates, match="no date for 6 of 6 files"):
        opened(bare)


def test_only_the_folder_may_name_the_band(tmp_path: Path) -> None:
    files = [
        in_folder(tmp_path, f"{band}/x_2021{day}.tif", band, t)
        for t, day in ((1, "0105"), (2, "0115"))
        for band in NEEDED
    ]
    stack = opened(files)
    assert stack.layout == "file-per-band-and-date"
    assert (stack.dates, band_numbers(stack)) == ((D1, D2), expected(1, 2))


def test_a_layout_of_one_band_and_date_a_file_may_be_given(tmp_path: Path) -> None:
    files = [in_folder(tmp_path, f"20210105_{band}.tif", band, 1) for band in NEEDED]
    stack = opened(files, layout="file-per-band-and-date")
    assert (stack.layout, band_numbers(stack)) == ("file-per-band-and-date", expected(1))


def test_names_that_distinguish_files_precede_the_time_of_writing(tmp_path: Path) -> None:
    files = [
        one_date(
            tmp_path / f"x_2021{day}.tif", t, tags={"TIFFTAG_DATETIME": f"2023:05:0{t} 00:00:00"}
        )
        for t, day in ((1, "0105"), (2, "0115"))
    ]
    assert opened(files).dates == (D1, D2)


def test_one_time_of_writing_for_all_files_is_no_acquisition(tmp_path: Path) -> None:
    tags = {"TIFFTAG_DATETIME": "2023:05:01 00:00:00"}
    files = [
        in_folder(tmp_path, f"x{t}_{band}.tif", band, t, tags=tags)
        for t in (1, 2)
        for band in NEEDED
    ]
    with pytest.raises(MissingDates, match="TIFFTAG_DATETIME is 2023-05-01 in all of them"):
        opened(files)
    assert opened(files[:3]).dates == (date(2023, 5, 1),)  # one image may be of that day


def test_months_in_names_come_before_the_time_of_writing(tmp_path: Path) -> None:
    files = [
        one_date(
            tmp_path / f"x_2021-0{t}.tif", t, tags={"TIFFTAG_DATETIME": f"2023:05:0{t} 00:00:00"}
        )
        for t in (1, 2)
    ]
    with pytest.raises(MissingDates, match="'2021-01': a month without a day"):
        opened(files)


def test_bands_corrected_for_slopes_count_before_the_same_ones_without(tmp_path: Path) -> None:
    name = "SENTINEL2B_{day}-104021-455_L2A_T31UES_C_V2-2_{kind}_{band}.tif"
    files = [
        in_folder(
            tmp_path, name.format(day=day, kind=kind, band=band), band, t + 2 * (kind == "SRE")
        )
        for t, day in ((1, "20210105"), (2, "20210115"))
        for kind in ("SRE", "FRE")
        for band in NEEDED
    ]
    for day in ("20210105", "20210115"):
        path = tmp_path / name.format(day=day, kind="CLM", band="R1")
        files.append(write(path, np.zeros((1, 2, 2), np.uint8)))
    stack = opened(files)
    assert (stack.mask, band_numbers(stack)) == ("clm", expected(1, 2))
    (warning,) = stack.warnings
    assert "6 of 14 files not used" in warning.detail
    assert "_SRE_B02.tif': B02, and other files have them" in warning.detail


def test_acolites_reflectance_of_the_surface_counts_before_that_of_the_top(tmp_path: Path) -> None:
    name = "S2A_MSI_{day}_10_10_21_T32TPS_L2R_{kind}_{nm}.tif"
    files = [
        in_folder(tmp_path, name.format(day=day, kind=kind, nm=nm), band, t + 2 * (kind == "rhot"))
        for t, day in ((1, "2021_01_05"), (2, "2021_01_15"))
        for kind in ("rhot", "rhos")
        for nm, band in zip(("492", "665", "833"), NEEDED, strict=True)
    ]
    stack = opened(files)
    assert band_numbers(stack) == expected(1, 2)
    assert stack.dates == (date(2021, 1, 5), date(2021, 1, 15))


@pytest.mark.parametrize("nir", ["BNR", "NIR"])
def test_forces_time_series_are_read_by_their_abbreviations(tmp_path: Path, nir: str) -> None:
    days = ("20210105", "20210115")
    files = [
        write(
            tmp_path / f"2021-2021_001-365_HL_TSA_SEN2L_{short}_TSS.tif",
            bands_of((band, 1), (band, 2)),
            descriptions=[f"{day}_SEN2A" for day in days],
        )
        for short, band in (("BLU", "B02"), ("GRN", "B03"), ("RED", "B04"), (nir, "B08"))
    ]
    stack = opened(files)
    assert (stack.layout, stack.dates, stack.sensor) == ("file-per-band", (D1, D2), "Sentinel-2")
    assert band_numbers(stack) == expected(1, 2)
    # FORCE's NIR is the narrow one.
    narrow = [warning for warning in stack.warnings if warning.code == "band_substituted"]
    assert bool(narrow) == (nir == "NIR")


def test_pictures_beside_bands_of_one_date_are_left_out(tmp_path: Path) -> None:
    day = "2021-01-05-00_00_2021-01-05-23_59_Sentinel-2_L2A"
    picture = write(
        tmp_path / f"{day}_Scene_classification_map_.tiff",
        np.zeros((3, 2, 2), np.uint8),
    )
    files = [in_folder(tmp_path, f"{day}_{band}.tiff", band, 1) for band in NEEDED]
    stack = opened([*files, picture], mask="none")
    assert band_numbers(stack) == expected(1)
    (warning,) = stack.warnings
    assert warning.code == "files_unused"
    assert "_map_.tiff': its 3 bands have neither a name nor a date" in warning.detail


def test_a_month_in_the_descriptions_of_one_file_is_named(tmp_path: Path) -> None:
    names = [f"2021_{month:02d}_{band}" for month in (1, 2) for band in NEEDED]
    pixels = bands_of(*((band, 1) for _ in (1, 2) for band in NEEDED))
    file = write(tmp_path / "stack.tif", pixels, descriptions=names)
    with pytest.raises(MissingDates, match=r"'2021_01': a month without a day.*2 of them"):
        opened([file])


def test_dates_in_another_order_than_the_files_are_named(tmp_path: Path) -> None:
    # Sorted dates for files that are not sorted.
    files = [one_date(tmp_path / f"S2_202101{day}.tif", t) for t, day in ((2, "15"), (1, "05"))]
    stack = opened(files, dates=(D1, D2), mask="none")
    assert band_numbers(stack) == expected(2, 1)
    (warning,) = stack.warnings
    assert warning.code == "dates_contradicted"
    assert "gives 2021-01-05 to 'S2_20210115.tif', which states 2021-01-15" in warning.detail
    assert "2 of 2 are so" in warning.detail
    assert opened(files, dates=(D2, D1), mask="none").warnings == ()
    # The dates of bands as well, and a time of writing states nothing.
    names = [f"{band}_{day}" for day in ("20210105", "20210115") for band in NEEDED]
    pixels = bands_of(*((band, t) for t in (1, 2) for band in NEEDED))
    one = write(tmp_path / "stack.tif", pixels, descriptions=names)
    (warning,) = opened([one], dates=(D2, D1), mask="none").warnings
    assert warning.code == "dates_contradicted"
    assert opened([one], dates=(D1, D2), mask="none").warnings == ()
    plain = [
        one_date(tmp_path / f"{t}.tif", t, tags={"TIFFTAG_DATETIME": f"2024:01:0{t} 10:00:00"})
        for t in (1, 2)
    ]
    assert opened(plain, dates=(D1, D2), mask="none").warnings == ()


def test_bands_in_another_order_than_the_descriptions_are_named(tmp_path: Path) -> None:
    file = one_date(tmp_path / "S2_20210105.tif", 1, ("B04", "B02", "B08"))
    (warning,) = opened_with_names([file], ("B02", "B04", "B08")).warnings
    assert warning.code == "bands_contradicted"
    assert "names band 1 of 'S2_20210105.tif' B02, and the file itself B04" in warning.detail
    assert "2 of 3 bands are so" in warning.detail
    assert opened_with_names([file], ("B04", "B02", "B08")).warnings == ()
    files = [one_band(tmp_path / f"S2_20210105_{band}.tif", band, (1,)) for band in NEEDED]
    (warning,) = opened_with_names(files, ("B04", "B02", "B08")).warnings
    assert warning.code == "bands_contradicted"
    assert opened_with_names(files, NEEDED).warnings == ()


SAFE = "S2A_MSIL{level}_{day}T105031_N0207_R051_T31UES_{day}T130000.SAFE/{band}.tif"


def test_level_1c_is_named_and_level_2a_comes_first(tmp_path: Path) -> None:
    files = [
        in_folder(tmp_path, SAFE.format(level=level, day=day, band=band), band, t)
        for level, day, t in (("1C", "20210105", 7), ("2A", "20210105", 1), ("1C", "20210115", 2))
        for band in NEEDED
    ]
    stack = opened(files, mask="none")
    assert band_numbers(stack) == expected(1, 2)
    (warning,) = [one for one in stack.warnings if one.code == "top_of_atmosphere"]
    assert "3 of 6 files ('S2A_MSIL1C_20210115T" in warning.detail
    assert "unlike the other files" in warning.detail
    only = opened(files[:3] + files[6:], mask="none")
    (warning,) = only.warnings
    assert "6 of 6 files" in warning.detail
    assert "unlike" not in warning.detail
    assert opened(files[3:6], mask="none").warnings == ()


@pytest.mark.parametrize(
    "tags",
    [
        {"PROCESSING_LEVEL": "Level-1C"},
        {"processing_level": "L1C"},
        {"PRODUCT_TYPE": "S2MSI1C"},
        {"s2:product_type": "S2MSI1C"},
        {"PRODUCT_URI": "S2A_MSIL1C_20210105T105031_N0207_R051_T31UES_20210105T130000.SAFE"},
        {"collection": "sentinel-2-l1c"},
        {"TIFFTAG_IMAGEDESCRIPTION": "Sentinel-2 L1C, cut"},
    ],
)
def test_tags_state_level_1c_too(tmp_path: Path, tags: dict[str, str]) -> None:
    file = one_date(tmp_path / "20210105.tif", 1, tags=tags)
    (warning,) = opened([file], mask="none").warnings
    assert warning.code == "top_of_atmosphere"
    assert "1 of 1 file ('20210105.tif')" in warning.detail
    assert next(iter(tags.values()))[:40] in warning.detail
    assert "states 2A" not in warning.detail
    of_2a = {key: value.replace("1C", "2A").replace("1c", "2a") for key, value in tags.items()}
    assert opened([one_date(tmp_path / "20210105.tif", 1, tags=of_2a)], mask="none").warnings == ()


@pytest.mark.parametrize(
    ("name", "codes"),
    [
        ("20210105.tif", ["top_of_atmosphere"]),
        ("T31UES_20210105_L2A.tif", []),  # the level that is stated counts
        ("HLS.S30.T31UES.2021005T104421.v2.0.tif", []),  # it has B10 as well
    ],
)
def test_the_cirrus_band_shows_level_1c(tmp_path: Path, name: str, codes: list[str]) -> None:
    file = one_date(tmp_path / name, 1, ("B02", "B04", "B08", "B10"))
    assert [warning.code for warning in opened([file], mask="none").warnings] == codes


@pytest.mark.parametrize(
    "tags",
    [
        {"Band_1": "B08", "Band_2": "red", "Band_3": "blue"},
        {"long_name": "('B08', 'B04', 'B02')"},
        {"BAND_1_NAME": "B08", "BAND_2_NAME": "red", "BAND_3_NAME": "blue"},
        {"BANDS": '["B08", "B04", "B02"]'},
        {"TIFFTAG_IMAGEDESCRIPTION": "B08;B04;B02"},
    ],
)
def test_a_files_own_tags_may_name_its_bands(tmp_path: Path, tags: dict[str, str]) -> None:
    pixels = bands_of(("B08", 1), ("B04", 1), ("B02", 1))
    assert band_numbers(opened([write(tmp_path / "20210105.tif", pixels, tags=tags)])) == expected(
        1
    )
    # Tags of a file with more bands, of which this one is a part, do not count.
    (key,) = set(tags) & {"Band_1", "long_name", "BAND_1_NAME", "BANDS", "TIFFTAG_IMAGEDESCRIPTION"}
    more = {key.replace("1", "4"): "B12"} if "1" in key else {key: "B08,B04,B03,B02"}
    with pytest.raises(MissingBands):
        opened([write(tmp_path / "x_20210105.tif", pixels, tags={**tags, **more})])


@pytest.mark.parametrize("listed", ["B08_B04_B02", "B8-B4-B2", "B8B4B2", "nir_red_blue"])
def test_bands_that_the_names_of_files_list_are_in_this_order(tmp_path: Path, listed: str) -> None:
    files = [
        write(
            tmp_path / f"T31UES_2021010{t}_{listed}_10m.tif",
            bands_of(("B08", t), ("B04", t), ("B02", t)),
        )
        for t in (1, 2)
    ]
    stack = opened(files, mask="none")
    assert band_numbers(stack) == expected(1, 2)
    (warning,) = stack.warnings
    assert warning.code == "bands_assumed"
    assert "as the files' names list them, so that B02 is band 3, B04 is band 2" in warning.detail


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("x_B08_B04_B02", 4),
        ("x_B08_B04_10m_B02", 3),
        ("x_B08_B04_B04", 3),
        ("x_NDVI_B8_B4", 2),
        ("x_B04", 1),
    ],
)
def test_other_names_list_no_bands(name: str, count: int) -> None:
    assert listed_bands(name, count) == ()


def test_folders_name_bands_but_not_by_the_name_of_a_place(tmp_path: Path) -> None:
    files = [
        write(tmp_path / f"{t}{band}.tif", bands_of((band, t)))
        for t in (1, 2)
        for band in (*NEEDED, "B03")
    ]
    names = [
        f"Red_River/{band}/R10m/x_2021010{t}.tif" for t in (1, 2) for band in (*NEEDED, "NDVI")
    ]
    stack = opened(
        [replace(file, name=name) for file, name in zip(files, names, strict=True)], mask="none"
    )
    assert band_numbers(stack) == expected(1, 2)
    names = [f"Red_River/x_2021010{t}_{band}.tif" for t in (1, 2) for band in (*NEEDED, "dem")]
    stack = opened(
        [replace(file, name=name) for file, name in zip(files, names, strict=True)], mask="none"
    )
    assert band_numbers(stack) == expected(1, 2)
    (warning,) = stack.warnings
    assert (warning.code, "2 of 8 files" in warning.detail) == ("files_unused", True)


def test_missing_dates_of_files_of_many_dates_are_asked_for_by_band(tmp_path: Path) -> None:
    files = [
        write(tmp_path / f"{band}.tif", bands_of((band, 1), (band, 2), (band, 3)))
        for band in NEEDED
    ]
    with pytest.raises(MissingDates, match=r"the 3 bands of each of 3 files .* of the 3 bands in "):
        opened(files)


def test_names_that_are_not_understood_are_quoted(tmp_path: Path) -> None:
    names = ("R490", "R665", "R842", "R865")
    pixels = bands_of(*((band, 1) for band in ("B02", "B04", "B08", "B8A")))
    file = write(tmp_path / "x_20210105.tif", pixels, descriptions=names)
    with pytest.raises(MissingBands, match=r"4 bands .*\('R490', 'R665', 'R842' and 1 more\); "):
        opened([file])


def test_a_name_and_a_tag_of_different_levels_are_both_named(tmp_path: Path) -> None:
    tags = {"PRODUCT_TYPE": "S2MSI1C"}
    file = one_date(tmp_path / "S2A_MSIL2A_20210105T105031.tif", 1, tags=tags)
    (warning,) = opened([file], mask="none").warnings
    assert warning.code == "top_of_atmosphere"
    assert "the tag product_type=S2MSI1C states 1C and the name states 2A" in warning.detail


@pytest.mark.parametrize("form", ["{band}_15-01-2021", "15.01.2021 {band}", "{band}_15/01/2021"])
def test_day_first_dates_in_all_descriptions(tmp_path: Path, form: str) -> None:
    names = [
        text.format(band=band) for text in (form.replace("15", "05", 1), form) for band in NEEDED
    ]
    pixels = bands_of(*((band, t) for t in (1, 2) for band in NEEDED))
    file = write(tmp_path / "stack.tif", pixels, descriptions=names)
    stack = opened([file], mask="none")
    assert (stack.layout, stack.dates) == ("single-file", (D1, D2))
    assert band_numbers(stack) == expected(1, 2)


@pytest.mark.parametrize("seed", range(4))
def test_granules_of_a_day_stay_apart_in_any_order(tmp_path: Path, seed: int) -> None:
    files = [
        in_folder(tmp_path, f"S2B_31UES_20210105_{granule}_L2A_{band}.tif", band, t)
        for t, granule in ((1, 0), (2, 1), (3, 2))
        for band in (*NEEDED, "SCL")
    ]
    order = np.random.default_rng(seed).permutation(len(files))
    stack = opened([files[n] for n in order])
    assert len(stack.acquisitions) == 3
    for acquisition in stack.acquisitions:
        sources = [*acquisition.planes, acquisition.masks[0].plane]
        assert len({plane.source.name.split("_")[3] for plane in sources}) == 1


def test_one_name_per_file_of_one_band_may_be_given(tmp_path: Path) -> None:
    files = [
        in_folder(tmp_path, f"HLS.L30.T31UES.{day}.{code}.tif", band, t)
        for t, day in ((1, "2021-01-05"), (2, "2021-01-15"))
        for band, code in (("B02", "B02"), ("B04", "B04"), ("B08", "B05"))
    ]
    stack = with_names(files, *(NEEDED * 2))
    assert stack.layout == "file-per-band-and-date"
    assert (stack.dates, band_numbers(stack)) == ((D1, D2), expected(1, 2))
    masks = [in_folder(tmp_path, f"HLS.L30.T31UES.{d}.Fmask.tif", "Fmask", 0) for d in (D1, D2)]
    beside = with_names([*masks, *files], *(NEEDED * 2), mask="none")
    assert band_numbers(beside) == expected(1, 2)


def test_names_for_stacks_with_masks_and_other_shapes_beside(tmp_path: Path) -> None:
    files = []
    for t, day in ((1, "20210105"), (2, "20210115")):
        files.append(write(tmp_path / f"S2_{day}_BOA_10.tif", bands_of(*((b, t) for b in NEEDED))))
        files.append(write(tmp_path / f"S2_{day}_SCL_10.tif", bands_of(("SCL", t))))
        files.append(write(tmp_path / f"S2_{day}_TCI_10.tif", bands_of(("x", t), ("y", t))))
    stack = with_names(files, *NEEDED)
    assert (stack.layout, stack.mask, band_numbers(stack)) == (
        "file-per-date",
        "scl",
        expected(1, 2),
    )
    (warning,) = stack.warnings
    assert "2 of 6 files not used: 'S2_20210105_TCI_10.tif', 'S2_20210115_TCI_10.tif'" in (
        warning.detail
    )


@pytest.mark.parametrize(
    ("name", "near_infrared", "count"),
    [
        ("S2A2A_{day}_008_Field_BOA_10.tif", "B08", 11),
        ("S2B2A_{day}_108_my-area_BOA_20.tif", "B8A", 11),
        ("S2A1C_{day}_008_Field_TOA_60.tif", "B8A", 12),
    ],
)
def test_sen2rs_unnamed_bands_are_in_its_own_order(
    tmp_path: Path, name: str, near_infrared: str, count: int
) -> None:
    order = [None, "B02", "B03", "B04", None, None, None, near_infrared]
    order += [None] * (count - len(order))
    files = []
    for t, day in ((1, "20210105"), (2, "20210115")):
        shown = ["B08" if band == near_infrared else band for band in order]
        pixels = bands_of(*((band or "x", t) for band in shown))
        files.append(write(tmp_path / name.format(day=day), pixels))
    stack = opened(files, mask="none")
    assert band_numbers(stack) == expected(1, 2)
    codes = [w.code for w in stack.warnings]
    expected_codes = ["band_substituted"] if near_infrared == "B8A" else []
    expected_codes += ["bands_assumed", *(["top_of_atmosphere"] if "TOA" in name else [])]
    assert codes == expected_codes
    places = f"B02 is band 2, B04 is band 4, {near_infrared} is band 8"
    assert places in stack.warnings[codes.index("bands_assumed")].detail
    # Eleven bands of anyone else are in no order that is known.
    other = write(tmp_path / "S2_20210105.tif", bands_of(*(("x", 1) for _ in range(11))))
    with pytest.raises(MissingBands, match="give `bands`"):
        opened([other])


def test_very_many_files_that_are_not_used_are_counted_by_reason(tmp_path: Path) -> None:
    used = [in_folder(tmp_path, f"20210105_{band}.tif", band, 1) for band in NEEDED]
    green = write(tmp_path / "green.tif", bands_of(("B03", 1))).path
    files = [SourceFile(name=f"S2_{n:03d}_B03.tif", path=green) for n in range(120)]
    files += [SourceFile(name="S2_quicklook.tif", path=green)]
    (warning,) = opened([*used, *files], mask="none").warnings
    assert warning.detail == (
        "121 of 124 files not used: 'S2_quicklook.tif': names no known band; "
        + ", ".join(f"'S2_{n:03d}_B03.tif'" for n in range(5))
        + " and 115 more: the model does not take B03"
    )
    (warning,) = opened([*used, *files[:24]], mask="none").warnings
    assert all(file.name in warning.detail for file in files[:24])
    # In a header, the reason stays where the names do not fit.
    (warning,) = opened([*used, *files[:40]], mask="none").warnings
    (header,) = warning_headers([warning])
    assert header == (
        "files_unused; 40 of 43 files not used: 'S2_000_B03.tif', 'S2_001_B03.tif', "
        "'S2_002_B03.tif' and 37 more: the model does not take B03"
    )


@pytest.mark.parametrize("how", ["described", "undescribed", "dataMask"])
def test_an_alpha_band_that_the_file_calls_alpha_is_a_mask(tmp_path: Path, how: str) -> None:
    pixels = bands_of(*((band, 1) for band in (*NEEDED, "x")))
    pixels[3] = [[255, 255], [255, 0]]
    names = {"described": ["alpha"], "undescribed": [None], "dataMask": ["dataMask"]}[how]
    file = write(tmp_path / "x_20210105.tif", pixels, descriptions=[*NEEDED, *names])
    if how == "undescribed":  # as gdalwarp -dstalpha leaves it
        with rasterio.open(file.path, "r+") as raster:
            raster.colorinterp = [*raster.colorinterp[:-1], ColorInterp.alpha]
    with StackReader(opened([file], mask="none")) as reader:
        sits = reader.read(Window(0, 0, 2, 2))
    assert sits.valid[0].tolist() == [[True, True], [True, False]]
    assert np.isnan(sits.values[0, :, 1, 1]).all()


def test_forces_nir_is_narrow_beside_its_broad_one(tmp_path: Path) -> None:
    names = ["BLUE", "GREEN", "RED", "BROADNIR", "NIR"]
    pixels = bands_of(*((band, 1) for band in ("B02", "B03", "B04", "B08", "B8A")))
    file = write(tmp_path / "20210105_LEVEL2_SEN2A_BOA.tif", pixels, descriptions=names)
    assert band_numbers(opened([file])) == expected(1)
    assert band_numbers(opened([file], bands=("B8A",))) == [[1080]]

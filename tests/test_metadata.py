"""Band names and dates in descriptions, tags and file names."""

from __future__ import annotations

from datetime import date

import pytest

from service.read.metadata import band_of, date_of, tagged_date, tagged_number


@pytest.mark.parametrize(
    ("text", "band"),
    [
        ("B02", "B02"),
        ("B2", "B02"),
        ("b04", "B04"),
        ("B8", "B08"),
        ("B8A", "B8A"),
        ("b08a", "B8A"),
        ("B08 - NIR", "B08"),
        ("B8A - narrow NIR", "B8A"),
        ("B11", "B11"),
        ("B1", "B01"),
        ("blue", "B02"),
        ("Red", "B04"),
        ("NIR", "B08"),
        ("Near-infrared", "B08"),
        ("nir08", "B8A"),
        ("red edge 1", "B05"),
        ("Vegetation red edge", "B05"),
        ("B06 red edge", "B06"),
        ("Shortwave infrared 2", "B12"),
        ("Scene classification (SCL)", "SCL"),
        ("T31UES_20180521T105416_B04_10m", "B04"),
        ("T31UES_20180521T105416_B8A_20m", "B8A"),
        ("S2B_MSIL2A_20180521T105031_N0208_R051_T31UES_20180521T140120_B03_10m", "B03"),
        ("B02_2021-01-05", "B02"),
        ("2021-01-05_B02", "B02"),
        ("S2_blue_2021", "B02"),
        ("ndvi", None),
        ("NDVI (B08, B04)", None),
        ("B08/B04", None),
        ("red_std", None),
        ("doy", None),
        ("LABEL_CT", None),
        ("redwood_creek", None),
        ("S2_L2A_20170804_000", None),
        ("B13", None),
        ("B0", None),
        ("QA60", None),
        # Landsat's fourth band is near infrared: neither name can be believed.
        ("B4 (NIR)", None),
        ("blue and green", None),
        ("", None),
        (None, None),
    ],
)
def test_band_of(text: str | None, band: str | None) -> None:
    assert band_of(text) == band


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("20180521", date(2018, 5, 21)),
        ("2018-05-21", date(2018, 5, 21)),
        ("2018_05_21.tif", date(2018, 5, 21)),
        ("2018:05:21 10:54:16", date(2018, 5, 21)),
        ("2018-11-27T10:56:51Z", date(2018, 11, 27)),
        ("20180521105416", date(2018, 5, 21)),
        ("T31UES_20180521T105416_B04_10m.tif", date(2018, 5, 21)),
        (
            "S2A_MSIL2A_20180521T105031_N0208_R051_T31UES_20190102T140120.tif",
            date(2018, 5, 21),
        ),
        ("MOD13Q1.A2018141.h12v10.006.2018158.tif", date(2018, 5, 21)),
        ("20180230_20180301", date(2018, 3, 1)),
        ("tile_00412345_2021-01-05", date(2021, 1, 5)),
        ("2018-0521", None),
        ("120180521", None),
        ("201805215", None),
        ("2018-13-01", None),
        ("30000101", None),
        ("A2018366", None),
        ("A2018000", None),
        ("N0208_R051_T31UES", None),
        ("", None),
        (None, None),
    ],
)
def test_date_of(text: str | None, day: date | None) -> None:
    assert date_of(text) == day


def test_acquisition_tags_come_in_order_and_bad_ones_are_passed_over() -> None:
    tags = {"datetime": "unknown", "acquisition_date": "2020-02-03", "date": "2021-01-01"}
    assert tagged_date(tags) == date(2020, 2, 3)
    assert tagged_date({"tifftag_datetime": "2020:02:03 00:00:00"}) is None


def test_tagged_number_takes_finite_numbers_alone() -> None:
    assert tagged_number({"scale": "0.0001"}, "scale") == 0.0001
    assert tagged_number({"scale": "n/a", "scale_factor": "2"}, "scale", "scale_factor") == 2
    assert tagged_number({"scale": "nan"}, "scale") is None
    assert tagged_number({"scale": "inf"}, "scale") is None
    assert tagged_number({}, "scale") is None

"""Band names and dates in descriptions, tags and file names."""

from __future__ import annotations

from datetime import date

import pytest

from service.read.metadata import (
    band_of,
    date_of,
    named_days,
    quality_of,
    stem,
    tagged_band,
    tagged_date,
    tagged_number,
)


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
        ("band04", "B04"),
        ("Band4", "B04"),
        ("band_4", "B04"),
        ("ga_s2am_nbart_3-2-1_31UES_2018-01-11_final_band08", "B08"),
        ("nbart_red", "B04"),
        ("nbart_nir_1", "B08"),
        ("grün", "B03"),
        ("Bande rouge", "B04"),
        ("Kanal 4 (rot)", "B04"),
        ("S2_azul_10m", "B02"),
        ("infrarrojo cercano", "B08"),
        ("proche infrarouge", "B08"),
        ("blå", "B02"),
        ("bande bleue", "B02"),
        ("ga_s2am_nbart_3-2-1_31UES_2018-01-11_final_nbart_swir_2", "B11"),
        ("ga_s2am_nbart_3-2-1_31UES_2018-01-11_final_nbart_swir_3", "B12"),
        ("ga_ls8c_nbart_swir_2", "B12"),
        ("S2A_20180111T105416_31UES_SCENECLASSIFICATION_20M_V200", "SCL"),
        ("Красный", "B04"),
        ("Канал 2 синий", None),
        ("Зелёный", "B03"),
        ("ближний ИК", "B08"),
        ("近红外", "B08"),
        ("红光", "B04"),
        # Places and other words, not colours.
        ("Cabo_Verde_2021", None),
        ("Baton_Rouge", None),
        ("Monte Rosso", None),
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
        ("HLS.S30.T31UES.2018141T104421.v2.0.B8A", date(2018, 5, 21)),
        ("LC81950252018141LGN00_B4", date(2018, 5, 21)),
        ("S2_21May2018.tif", date(2018, 5, 21)),
        ("21-Mar-2018", date(2018, 3, 21)),
        ("S2_2018366T104421", None),
        ("orbit_12018141", None),
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


def test_tagged_number_accepts_only_finite_numbers() -> None:
    assert tagged_number({"scale": "0.0001"}, "scale") == 0.0001
    assert tagged_number({"scale": "n/a", "scale_factor": "2"}, "scale", "scale_factor") == 2
    assert tagged_number({"scale": "nan"}, "scale") is None
    assert tagged_number({"scale": "inf"}, "scale") is None
    assert tagged_number({}, "scale") is None


@pytest.mark.parametrize(
    ("text", "band"),
    [
        ("QA60", "QA60"),
        ("MSK_CLDPRB_20m", "CLDPRB"),
        ("T31UES_20180111T104421_CLD_20m", "CLDPRB"),
        ("HLS.S30.T31UES.2018011T104421.v2.0.Fmask", "FMASK"),
        ("ga_s2am_oa_3-2-1_31UES_2018-01-11_final_fmask", "FMASK"),
        ("LC08_L2SP_195025_20180111_20200902_02_T1_QA_PIXEL", "QA_PIXEL"),
        ("SENTINEL2B_20180111-104021-455_L2A_T31UES_C_V2-2_CLM_R1", "CLM"),
        ("20180111_LEVEL2_SEN2B_QAI", "QAI"),
        ("20180111_103422_1020_3B_udm2_clip", "UDM2"),
        ("SENTINEL-2_MSI_31UES_CLOUD_2018-01-11", "CLOUD"),
        ("cloud_free_composite", None),
        ("CLOUD_COVER", None),
        ("cloudless", None),
        ("B02", None),
        (None, None),
    ],
)
def test_quality_of(text: str | None, band: str | None) -> None:
    assert quality_of(text) == band


def test_a_bands_tags_name_it_as_openeo_writes_them() -> None:
    assert tagged_band({"description": "B04"}) == "B04"
    assert tagged_band({"description": "CLM"}) == "CLM"


def test_a_last_part_that_is_not_a_suffix_stays() -> None:
    assert stem("a.b/HLS.S30.v2.0.B02") == "HLS.S30.v2.0.B02"
    assert stem("a/HLS.S30.v2.0.B02.TIF") == "HLS.S30.v2.0.B02"


J5, J15, J25 = date(2021, 1, 5), date(2021, 1, 15), date(2021, 1, 25)


@pytest.mark.parametrize(
    ("names", "days"),
    [
        (["S2B_31UES_20210105_0_L2A/B04.tif", "S2B_31UES_20210115_0_L2A/B04.tif"], [J5, J15]),
        # The file's own date counts before the folder's.
        (["20200101/x_20210105.tif", "20200101/x_20210115.tif"], [J5, J15]),
        # Unless it is the same in every file, as a date of processing is.
        (["20210105/x_20230101.tif", "20210115/x_20230101.tif"], [J5, J15]),
        # Of several numbers that look like dates the one that varies.
        (["a_20200101_20211231_20210105.tif", "a_20200101_20211231_20210115.tif"], [J5, J15]),
        # The first of those that vary is the acquisition.
        (["S2_20210105_20210203.tif", "S2_20210115_20210204.tif"], [J5, J15]),
        # Day first, where one of the files settles it.
        (["05-01-2021.tif", "15-01-2021.tif"], [J5, J15]),
        (["05012021.tif", "25012021.tif"], [J5, J25]),
        (["5.1.2021.tif"], [J5]),
        (["2021-1-5.tif", "2021-1-15.tif"], [J5, J15]),
        # Some of one digit, some of two.
        (["2021_1_5.tif", "2021_12_15.tif"], [J5, date(2021, 12, 15)]),
        # Year, month and day as folders.
        (["31/U/ES/2021/1/5/0/B04.tif", "31/U/ES/2021/1/15/0/B04.tif"], [J5, J15]),
        (["2021/01/05/B04.tif", "2021/01/15/B04.tif"], [J5, J15]),
        (["2021/31/U/B04.tif"], [None]),
        # 5 January or 1 May?
        (["05-01-2021.tif", "06-01-2021.tif"], [None, None]),
        # Not all files agree.
        (["05-01-2021.tif", "15-01-2021.tif", "01-15-2021.tif"], [None, None, None]),
        (["x_20210105.tif", "15-01-2021.tif"], [J5, None]),
        (["x.tif"], [None]),
        ([], []),
    ],
)
def test_named_days(names: list[str], days: list[date | None]) -> None:
    assert named_days(names) == days

"""Band names and dates in descriptions, tags and file names."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date

import pytest

from service.read.band_names import (
    band_of,
    behind_positions,
    level_of,
    only_positions,
    positions_in_names,
    quality_of,
    stem,
    tagged_band,
    tagged_number,
)
from service.read.dates import date_of, named_days, tagged_date, unclear_date


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
        ("B-4", "B04"),
        ("20180521B04", "B04"),
        ("20180521T105416B8A", "B8A"),
        ("B\u00a004", "B04"),
        ("B004", "B04"),
        ("bandB8A", "B8A"),
        ("B 13", None),
        ("Near-IR", "B08"),
        ("IVP", "B08"),
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
        # Wavelengths: ACOLITE's names of surface and top-of-atmosphere reflectance, and units.
        ("S2A_MSI_2021_02_03_10_10_21_T32TPS_L2R_rhos_492", "B02"),
        ("S2B_MSI_2021_02_03_10_10_21_T32TPS_L2R_rhot_833", "B08"),
        ("rhos_665", "B04"),
        ("490 nm", "B02"),
        ("492.4nm", "B02"),
        ("Reflectance 865 nanometers", "B8A"),
        ("B04 (664.6 nm)", "B04"),
        # Landsat 8 and 9, which have no band of Sentinel-2's colours.
        ("rhos_655", None),
        ("rhos_483", None),
        ("B04 (490 nm)", None),
        # A number is not a wavelength, and water's reflectance is not that of the surface.
        ("S2_665", None),
        ("Rrs_492", None),
        ("rhow_B4", None),
        ("C2RCC_rrs_B4", None),
        ("红光", "B04"),
        # Places and other words, not colours.
        ("Cabo_Verde_2021", None),
        ("Baton_Rouge", None),
        ("Monte Rosso", None),
        ("ndvi", None),
        # Computed from a band, or about it: Earth Engine, SNAP, products of Copernicus.
        ("B4_anomaly", None),
        ("B4_contrast", None),
        ("B8_amplitude", None),
        ("view_zenith_B4", None),
        ("T31UES_20180521T105416_B04_DETFOO", None),
        # ENVI's position against the wavelength, in micrometres.
        ("Band 3 (0.6646 Micrometers)", None),
        ("0.665 µm", "B04"),
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
        # Landsat's fourth band is near infrared: neither name can be trusted.
        ("B4 (NIR)", None),
        ("blue and green", None),
        ("", None),
        (None, None),
    ],
)
def test_band_of(text: str | None, band: str | None) -> None:
    assert band_of(text) == band


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["Band 1: B02", "Band 2: B04", "Band 3: SCL"], ["B02", "B04", "SCL"]),
        (["Band 1 (B04)", "Band 2 (B03)"], ["B04", "B03"]),
        (["Band 01 - Blue", "Band 02 - Red"], ["Blue", "Red"]),
        (["Band_1=x_B02_10m.jp2", "Band_2=x_B04_10m.jp2"], ["x_B02_10m.jp2", "x_B04_10m.jp2"]),
        (["Band 1: B08"], ["B08"]),
        # Not counted from 1, the same behind all, no band behind, not all of them.
        (["Band 2: Blue", "Band 4: Red"], None),
        (["Band 1: S2_red", "Band 2: S2_red"], None),
        (["Band 1: x.dat", "Band 2: y.dat"], None),
        (["Band 1: B02", "B04"], None),
        (["Band 1: B02", None], None),
        (["Band 1", "Band 2"], None),
        ([], None),
    ],
)
def test_names_behind_positions(names: list[str | None], found: list[str] | None) -> None:
    assert list(behind_positions(names)) == (names if found is None else found)


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("20180521", date(2018, 5, 21)),
        ("2018-05-21", date(2018, 5, 21)),
        ("2018_05_21.tif", date(2018, 5, 21)),
        ("x_2018-W21-1_B04.tif", date(2018, 5, 21)),
        ("x_2018W211.tif", date(2018, 5, 21)),
        ("x_2018-W21-8.tif", None),
        ("x_2018-W54-1.tif", None),
        ("20180521105416024_B04.tif", date(2018, 5, 21)),
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
        ("S2_2018Jan11", date(2018, 1, 11)),
        ("2018-JAN-11T10:54:21", date(2018, 1, 11)),
        ("January 11, 2018", date(2018, 1, 11)),
        ("S2_Jan-11-2018_B02", date(2018, 1, 11)),
        ("11 Jan 2018", date(2018, 1, 11)),
        ("S2_11ene2018", date(2018, 1, 11)),
        ("11_de_enero_de_2018", date(2018, 1, 11)),
        ("S2_11_février_2018_B04", date(2018, 2, 11)),
        ("11 août 2018", date(2018, 8, 11)),
        ("11. März 2018", date(2018, 3, 11)),
        ("11-Dez-2018", date(2018, 12, 11)),
        ("11gennaio2018", date(2018, 1, 11)),
        ("11-set-2018", date(2018, 9, 11)),
        ("11out2018", date(2018, 10, 11)),
        ("11_maio_2018", date(2018, 5, 11)),
        ("11_mrt_2018", date(2018, 3, 11)),
        ("11 mei 2018", date(2018, 5, 11)),
        ("S2_2018年01月11日_B04", date(2018, 1, 11)),
        ("2018年1月11日", date(2018, 1, 11)),
        ("2018년 1월 11일", date(2018, 1, 11)),
        ("２０１８年１月１１日", date(2018, 1, 11)),
        # Words that begin like a month, or that may not be months here.
        ("21Marigold2018", None),
        ("train_01_set_2018", None),
        ("run_01_out_2018", None),
        ("2018_set_12", None),
        ("31UES_2018", None),
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
    ("tags", "day"),
    [
        ({"time_coverage_start": "2018-01-11T10:54:21"}, date(2018, 1, 11)),
        ({"start_date": "2018-01-11"}, date(2018, 1, 11)),
        ({"datatake_sensing_start": "2018-01-11T10:54:21.024Z"}, date(2018, 1, 11)),
        ({"product_start_time": "2018-01-11T10:54:21.024Z"}, date(2018, 1, 11)),
        ({"date_acquired": "2018-01-11"}, date(2018, 1, 11)),
        ({"acquisition_date": "11-JAN-2018"}, date(2018, 1, 11)),
        ({"sensing_time": "2018-01-11T10:54:21Z + 2018-01-11T10:54:45Z"}, date(2018, 1, 11)),
        ({"datetime_from": "2018-01-11"}, date(2018, 1, 11)),
        ({"exif_datetimeoriginal": "2018:01:11 10:54:21"}, date(2018, 1, 11)),
        ({"acquisitiondatetime": "2018-01-11 10:54:21"}, date(2018, 1, 11)),
        ({"beginposition": "2018-01-11T10:54:21Z"}, date(2018, 1, 11)),
        ({"day": "2018-01-11"}, date(2018, 1, 11)),
        ({"day": "11"}, None),
        ({"rangebeginningdate": "2018-01-11"}, date(2018, 1, 11)),
        ({"acquisition": "2018-011"}, date(2018, 1, 11)),
        ({"date": "2018/011"}, date(2018, 1, 11)),
        # Milliseconds of Earth Engine; GDAL cuts the name at the colon.
        ({"system:time_start": "1515668061024"}, date(2018, 1, 11)),
        ({"system": "time_start=1515668061024"}, date(2018, 1, 11)),
        ({"timestamp": "1515668061"}, date(2018, 1, 11)),
        ({"time": "1515668061000000000"}, date(2018, 1, 11)),
        ({"time": "2018-01-11T10:54:21.000000000"}, date(2018, 1, 11)),
        # A netCDF's time, as GDAL's netCDF driver hands it on.
        ({"netcdf_dim_time": "17542", "time#units": "days since 1970-01-01"}, date(2018, 1, 11)),
        (
            {"netcdf_dim_t": "249.5", "t#units": "hours since 2018-01-01 00:00:00"},
            date(2018, 1, 11),
        ),
        ({"time": "17542"}, None),
        ({"datetime": "201801111054"}, date(2018, 1, 11)),
        ({"datetime": "2018011110"}, None),
        ({"generation_time": "2018-01-11", "tifftag_datetime": "2018:01:11 00:00:00"}, None),
        ({"netcdf_dim_time": "1e300", "time#units": "days since 1970-01-01"}, None),
    ],
)
def test_tags_of_the_acquisition(tags: dict[str, str], day: date | None) -> None:
    assert tagged_date(tags) == day


def test_a_bands_time_has_the_files_unit() -> None:
    assert tagged_date(
        {"netcdf_dim_time": "17542"}, {"time#units": "days since 1970-01-01"}
    ) == date(2018, 1, 11)


@pytest.mark.parametrize(
    ("text", "band"),
    [
        ("QA60", "QA60"),
        ("oa_s2cloudless_mask", "S2CLOUDLESS"),
        ("ga_s2bm_oa_3-2-1_55HFA_2018-01-11_final_s2cloudless-prob", "CLOUD_PROBABILITY"),
        ("probability", "CLOUD_PROBABILITY"),
        ("20180111T105421_20180111T105422_T31UES_probability", "CLOUD_PROBABILITY"),
        ("water_probability", None),
        # SNAP's names of a product's layers, and swisstopo's of its masks.
        ("quality_scene_classification", "SCL"),
        ("quality_cloud_confidence", "CLDPRB"),
        ("quality_snow_confidence", "SNWPRB"),
        ("quality_aot", None),
        ("cloudAndCloudShadowMask", "CLOUD_MASK"),
        ("cloudProbability", "CLDPRB"),
        ("terrainShadowMask", None),
        ("MSK_CLASSI_B00", "MSK_CLASSI"),
        ("MSK_CLASSI_OPAQUE", "MSK_CLASSI"),
        ("MSK_CLASSI_CIRRUS", "MSK_CLASSI_CIRRUS"),
        ("MSK_CLASSI_SNOW_ICE", "MSK_CLASSI_SNOW"),
        ("MSK_SNWPRB_20m", "SNWPRB"),
        ("cs_cdf", "CS"),
        ("20180111T105421_20180111T105422_T31UES_cs", "CS"),
        ("cs_2018_b4", None),
        ("CLP", "CLP"),
        ("LC08_L1TP_195025_20180111_20180119_01_T1_pixel_qa", "PIXEL_QA"),
        ("LC81950252018011LGN00_cfmask", "CFMASK"),
        ("LC8_30_16D_STK_v001_044049_2018-01-01_Fmask4", "CFMASK"),
        ("ls8_sr_pixel_quality", "QA_PIXEL"),
        ("HLS.S30.T31UES.2018011.v1.4.QA", "FMASK"),
        ("20180111_103422_1020_3B_AnalyticMS_DN_udm", "UDM"),
        ("S2_20180111_cloud_mask", "CLOUD_MASK"),
        ("CLOUDMASK", "CLOUD_MASK"),
        ("S2_20180111_valid", "VALID"),
        ("sr_cloud_qa", None),
        ("cloud_shadow", None),
        ("cloud_masked", None),
        ("SCL_mask", "SCL"),
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


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("S2_05-01-2021_B04.tif", "'05-01-2021': the day or the month may come first"),
        ("S2_2021_001.tif", "'2021_001': it may be a day of the year or a running number"),
        ("S2_2021001.tif", "'2021001': it may be a day of the year or a running number"),
        (
            "S2_2021-01-2.tif",
            "'2021-01-2': the last number may be a day, or count parts of the month",
        ),
        ("S2_2021-01.tif", "'2021-01': a month without a day"),
        ("S2_202101.tif", "'202101': a month without a day"),
        ("S2_2021-01_made-2024-03-01.tif", "'2021-01': a month without a day"),
        ("S2_2021w02.tif", "'2021w02': a week without a day"),
        ("Sentinel-2_mosaic_2021_Q1_31UES/B04.tif", "'2021_Q1': a quarter without a day"),
        ("S2_210105.tif", "'210105': the year may have two digits"),
        ("21-JAN-05.tif", "'21-JAN-05': the year may come first or last"),
        (
            "S2_1609840800.tif",
            "'1609840800': it may be a time since 1970 or a running number",
        ),
        ("S2_B04.tif", None),
        ("11_abc_22.tif", None),
    ],
)
def test_what_stands_in_place_of_a_date(name: str, why: str | None) -> None:
    assert unclear_date(name) == why


def test_a_bands_tags_name_it_as_openeo_writes_them() -> None:
    assert tagged_band({"description": "B04"}) == "B04"
    assert tagged_band({"description": "CLM"}) == "CLM"


def test_a_bands_wavelength_names_it_where_no_name_does() -> None:
    assert tagged_band({"wavelength": "664.6", "wavelength_units": "Nanometers"}) == "B04"
    assert tagged_band({"central_wavelength_um": "0.8328"}) == "B08"
    assert tagged_band({"wavelength": "655"}) is None
    assert tagged_band({"name": "B02", "wavelength": "664.6"}) == "B02"


@pytest.mark.parametrize(
    ("form", "count", "counted"),
    [
        ("Band {}", 4, True),
        ("band_{:02d}", 10, True),
        ("b{}", 8, True),
        ("B{}", 8, False),
        ("B{}", 10, True),
        ("B{}", 12, False),
        ("B{:02d}", 4, False),
        ("stack.{}", 4, False),  # not read as bands anyway
    ],
)
def test_only_positions(form: str, count: int, counted: bool) -> None:
    assert only_positions([form.format(k) for k in range(1, count + 1)]) is counted


@pytest.mark.parametrize(
    ("names", "counted"),
    [
        # ENVI's names with the wavelength, and those of an operation.
        ([f"Band {k} ({nm})" for k, nm in enumerate((492.4, 559.8, 664.6), 1)], True),
        ([f"Band {k} ({um} Micrometers)" for k, um in enumerate((0.49, 0.56), 1)], True),
        ([f"Resize (Band {k}:x.dat)" for k in (1, 2, 3, 4)], True),
        # Several dates, each after the other or by band.
        ([f"202101{day}_b{k}" for day in ("05", "15") for k in range(1, 11)], True),
        ([f"b{k}_202101{day}" for k in range(1, 11) for day in ("05", "15")], True),
        # Words that differ name the bands.
        (["B1 coastal", "B2 blue", "B3 green", *(f"B{k} x" for k in range(4, 11))], False),
        (["B1 x", "B2 x", "B2 x", "B3 x"], False),
        (["Band 1 (B02)", "Band 1 (B03)"], False),
    ],
)
def test_positions_beside_other_words(names: list[str], counted: bool) -> None:
    assert only_positions(names) is counted


@pytest.mark.parametrize(
    ("form", "numbers", "counted"),
    [
        ("2021-01-05/Band{:02d}.tif", range(1, 11), True),
        ("S2_20210105_B{}.tif", range(1, 11), True),
        ("S2_20210105_band_{}.tif", range(1, 9), True),
        ("S2_20210105_B{}.tif", range(1, 9), False),
        ("S2_20210105_B{}.tif", range(1, 13), False),
        ("ga_s2_20210105_band{:02d}.tif", (2, 3, 4, 8), False),
    ],
)
def test_files_that_only_count_bands(form: str, numbers: Iterable[int], counted: bool) -> None:
    names = [form.format(number) for number in numbers]
    assert positions_in_names(names) == (frozenset(names) if counted else frozenset())


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("S2A_MSIL1C_20180521T105031_N0206_R051_T31UES_20180521T130000.SAFE/B04.jp2", "1C"),
        ("S2A_MSIL2A_20180521T105031_N0207_R051_T31UES_20180521T130000.SAFE/B04.jp2", "2A"),
        ("L2A/S2_TOA_20180521.tif", "1C"),
        ("20180521_LEVEL2_SEN2A_BOA.tif", "2A"),
        ("S2A1C_20180521_051_Field_TOA_10.tif", "1C"),
        ("S2A_MSI_2018_05_21_10_50_21_T31UES_L1R_rhot_665.tif", "1C"),
        ("2018-05-21-00_00_2018-05-21-23_59_Sentinel-2_L1C_B04_(Raw).tiff", "1C"),
        ("T31UES_20180521T105416_B04_10m.jp2", None),
        ("TOA_and_BOA.tif", None),
    ],
)
def test_level_of(name: str, level: str | None) -> None:
    assert level_of(name) == level


def test_names_in_another_order_are_not_positions() -> None:
    assert not only_positions(["Band 2", "Band 3", "Band 4", "Band 8"])
    assert not only_positions(["Band 1", None])
    assert not only_positions(["Band 1"])


def test_gdal_leaves_the_band_of_a_netcdf_in_a_tag() -> None:
    assert tagged_band({"netcdf_varname": "B04", "grid_mapping": "crs"}) == "B04"


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
        # Times since 1970, of passes at 10:10 and 10:20 or at midnight.
        (["S2_1609841400_B04.tif", "S2_1610706000_B04.tif"], [J5, J15]),
        (["S2_1609804800000.tif", "S2_1610668800000.tif"], [J5, J15]),
        (["S2_1609804800000000000.tif", "S2_1610668800000000000.tif"], [J5, J15]),
        # Numbers at other times of the day, or on one day, are not times.
        (["S2_1609841400.tif", "S2_1610740000.tif"], [None, None]),
        (["S2_1609841400.tif", "S2_1609841460.tif"], [None, None]),
        # The day of the year after a separator.
        (["S2_2021-005.tif", "S2_2021-015.tif"], [J5, J15]),
        (["2021/005/B04.tif", "2021/015/B04.tif"], [J5, J15]),
        (["S2_2021_005_B04.tif", "S2_2021_015_B04.tif"], [J5, J15]),
        (["S2.2021.005.tif", "S2.2021.025.tif"], [J5, J25]),
        (["S2_2021-025.tif"], [J25]),
        # Running numbers, or one number that may be anything.
        (["S2_2021_000.tif", "S2_2021_001.tif", "S2_2021_002.tif"], [None, None, None]),
        (["S2_2021-001.tif", "S2_2021-002.tif"], [None, None]),
        (["2020_001.tif", "2021_001.tif"], [None, None]),
        (["field_2021_015.tif"], [None]),
        (["S2_2021-366.tif", "S2_2021-005.tif"], [None, None]),
        # The month first, where a day above 12 excludes the other order.
        (["01-05-2021.tif", "01-15-2021.tif"], [J5, J15]),
        (["01152021.tif", "01052021.tif"], [J15, J5]),
        # A year of two digits after a month in letters.
        (["S2_05-JAN-21.tif", "S2_15-JAN-21.tif"], [J5, J15]),
        (["S2_15-janv-21.tif"], [J15]),
        (["21-JAN-05.tif", "21-JAN-15.tif"], [None, None]),
        (["210105.tif", "210115.tif"], [None, None]),
        # 5 January or 1 May?
        (["05-01-2021.tif", "06-01-2021.tif"], [None, None]),
        (["05012021.tif", "06012021.tif"], [None, None]),
        # Digits behind a date without a separator are not a time if the date itself has separators.
        (["S2_2021_05_20230101.tif"], [date(2023, 1, 1)]),
        (["S2_20210105101021.tif"], [J5]),
        # The date of the making, which comes before that of the acquisition, or differs as much.
        (["20240301_S2_20210105.tif", "20240302_S2_20210115.tif"], [J5, J15]),
        (["2021-01-05_2021-02-05.tif", "2021-01-15_2021-02-15.tif"], [J5, J15]),
        # Folders of months have fewer dates than their files.
        (
            ["20210101/20210105.tif", "20210101/20210115.tif", "20210201/20210205.tif"],
            [J5, J15, date(2021, 2, 5)],
        ),
        # Composites of months, weeks and quarters with the date of their making.
        (["S2_2021-01_made-2024-03-01.tif", "S2_2021-02_made-2024-03-02.tif"], [None, None]),
        (["S2_202101_v20240301.tif", "S2_202102_v20240301.tif"], [None, None]),
        (["x_2021_Q1_20240301.tif", "x_2021_Q2_20240302.tif"], [None, None]),
        (["x_2021_W01_20240301.tif", "x_2021_W02_20240302.tif"], [None, None]),
        (["x_Jan2021_20240301.tif", "x_Feb2021_20240302.tif"], [None, None]),
        # A month beside its own days, a season, and times of the day that resemble months.
        (["2021-01/x_20210105.tif", "2021-02/x_20210205.tif"], [J5, date(2021, 2, 5)]),
        (
            ["2020-10_2021-09/x_20210105.tif", "2021-10_2022-09/x_20211105.tif"],
            [J5, date(2021, 11, 5)],
        ),
        (["x_20210105_201011.tif", "x_20210115_201112.tif"], [J5, J15]),
        # Decades of months, and numbers of files behind a year.
        (["x_2021-01-1.tif", "x_2021-01-2.tif", "x_2021-01-3.tif"], [None, None, None]),
        (["x_2021001.tif", "x_2021002.tif", "x_2021003.tif"], [None, None, None]),
        (
            ["x.A2021001.tif", "x.A2021002.tif", "x.A2021003.tif"],
            [date(2021, 1, d) for d in (1, 2, 3)],
        ),
        (["x_2021005.tif", "x_2021015.tif", "x_2021025.tif"], [J5, J15, J25]),
        # Not all files agree.
        (["05-01-2021.tif", "15-01-2021.tif", "01-15-2021.tif"], [None, None, None]),
        (["x_20210105.tif", "15-01-2021.tif"], [J5, None]),
        (["x.tif"], [None]),
        ([], []),
    ],
)
def test_named_days(names: list[str], days: list[date | None]) -> None:
    assert named_days(names) == days

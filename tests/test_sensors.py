"""Which satellite a file is of, and what its bands mean to a model of Sentinel-2 names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from service.api.schemas.forms import RasterForm
from service.errors import MissingBands, WrongSensor
from service.read.geotiff import SourceFile, gdal_options, read_header
from service.read.layouts import StackOptions
from service.read.radiometry import calibrate
from service.read.reader import StackReader
from service.read.sensors import BY_NAME, sensor_of
from service.read.stack import Stack, open_stack
from tests.kits.rasters import write

BANDS = ("B02", "B04", "B08")


def sensor_label(file: SourceFile) -> str | None:
    with gdal_options():
        found = sensor_of(read_header(file))
    return found[0].label if found else None


def opened(files: Sequence[SourceFile], sensors: Sequence[str] = (), **options: str) -> Stack:
    return open_stack(
        files, StackOptions(**options), bands=BANDS, max_bytes=2**30, sensors=sensors, model="m@1"
    )


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("LC08_L2SP_198024_20180126_20200825_02_T1_SR_B2.TIF", "Landsat 8 or 9"),
        ("LC09_L2SP_198024_20220126_20220825_02_T1_SR_B2.TIF", "Landsat 8 or 9"),
        ("LE07_L2SP_198024_20180126_20200825_02_T1_SR_B1.TIF", "Landsat 4 to 7"),
        ("LT05_L2SP_198024_20050126_20200825_02_T1_SR_B1.TIF", "Landsat 4 to 7"),
        ("landsat8_2018-01-26.tif", "Landsat 8 or 9"),
        ("HLS.S30.T31UES.2018011T104421.v2.0.B04.tif", "HLS S30"),
        ("HLS.L30.T31UES.2018011T104421.v2.0.B04.tif", "HLS L30"),
        ("MOD09A1_2018-01-26.tif", "MODIS"),
        ("MOD09A1.A2018001.h18v03.061.sur_refl_b01.tif", "MODIS"),
        ("MYD13Q1.A2018001.h18v03.061.tif", "MODIS"),
        ("MCD43A4.A2018001.h18v03.061.tif", "MODIS"),
        ("20200115_100000_1005_3B_AnalyticMS_SR.tif", "PlanetScope"),
        ("20200115_100000_37_2427_3B_AnalyticMS_SR_8b_clip.tif", "PlanetScope"),
        ("S2B_MSIL2A_20210105T104421_N0214_R008_T31UES_20210105T130000_10m.tif", "Sentinel-2"),
        ("S2_L2A_20180105_x.tif", "Sentinel-2"),
        ("S2B_31UES_20210105_0_L2A_B04.tif", "Sentinel-2"),
        ("20180105_LEVEL2_SEN2A_BOA.tif", "Sentinel-2"),
        ("S2A2A_20180105_008_Field_BOA_10.tif", "Sentinel-2"),
        ("PROBAV_S5_TOC_X18Y02_20180111_100M_V101_RED.tif", "PROBA-V"),
        ("MOD09GA.A2018005.h18v03.061.tif", "MODIS"),
        ("L8_20180111_red.tif", "Landsat 8 or 9"),
        ("LC8_16D_STK_v001_012010_2018-01-01_red.tif", "Landsat 8 or 9"),
        ("stack/L7_20180111_SR.tif", "Landsat 4 to 7"),
        ("lndsr_20180111.tif", "Landsat"),
        ("x_2018-01-11_plot_L8.tif", None),
        ("S2_20180111_K3A.tif", "Sentinel-2"),
        ("PF-SR/2018-01-11.tif", "PlanetScope"),
        ("global_monthly_2018_01_mosaic.tif", "PlanetScope"),
        ("AMAZONIA_1_WFI_20180111_BAND3.tif", "Amazonia-1"),
        ("K3A_20180111_MS.tif", "KOMPSAT"),
        ("VENUS-XS_20180111-105421-000_L2A_X_C_V1-0_FRE_B4.tif", "VENµS"),
        ("DE2_MS4_L1B_20180111_red.tif", "Deimos"),
        ("ZY3_MUX_20180111.tif", "Ziyuan"),
        ("HJ2A_CCD1_20180111.tif", "Huanjing"),
        ("SV1-01_20180111_MUX.tif", "SuperView"),
        ("JL1KF01A_20180111.tif", "Jilin-1"),
        ("TH_CAT_20180111_MS.tif", "THEOS"),
        ("ALAV2A203572620_20180111.tif", "ALOS"),
        ("IRS_P6_LIS3_20180111.tif", "Resourcesat"),
        ("wyvern_dragonette-001_20180111.tif", "Wyvern"),
        ("EO1H1980242010110_20180111.tif", "AVIRIS or EO-1"),
        ("DJI_20180111_MSP.tif", "a drone's camera"),
        ("IMG_PHR1A_MS_201801111050310_SEN_R1C1.TIF", "Pléiades"),
        ("WV03_20180111_M1BS.tif", "WorldView"),
        ("GF1_WFV1_E3.1_N51.0_20180111_L1A0003_MSS.tif", "Gaofen"),
        ("20180111_101010_ssc4_u0001_analytic_SR.tif", "SkySat"),
        ("AST_07XT_00301112018105031_SRF_VNIR_Band1.tif", "ASTER"),
        ("R2_LISS3_2018-01-11_B3.tif", "Resourcesat"),
        ("S1A_IW_GRDH_1SDV_20180111T055031.tif", "Sentinel-1"),
        ("S3A_SY_2_SYN____20180111T105031_SDR_Oa04.tif", "Sentinel-3"),
        ("20180111_PS_normalized_analytic.tif", "PlanetScope"),
        ("T31UES_20180105T104421_B04_10m.tif", None),
        ("wvale_ssc_2018-01-05.tif", None),
        ("stack_2018-01-05.tif", None),
        ("lc08.tif.2018-01-05.tif", "Landsat 8 or 9"),
        ("landscape_2018-01-05.tif", None),
        ("modish_2018.tif", None),
        ("20180105_LEVEL2_LND08_BOA.tif", "Landsat 8 or 9"),
        ("L2F_T31UES_20180103_LS8_R199_B04_10m.tif", "Landsat 8 or 9"),
        ("L08.002_SR_B4_CU_doy2018011_aid0001.tif", "Landsat 8 or 9"),
        ("HLSL30.020_B05_doy2018011_aid0001_31N.tif", "HLS L30"),
        ("20180105_LEVEL2_LND05_BOA.tif", "Landsat 4 to 7"),
        ("ga_ls8c_nbart_3-2-1_090084_2018-01-05_final_nbart_red.tif", "Landsat 8 or 9"),
        ("ga_ls5t_nbart_3-2-1_090084_2008-01-05_final_nbart_red.tif", "Landsat 4 to 7"),
        ("LC81980242018005LGN00_sr_band4.tif", "Landsat 8 or 9"),
        ("CB4A-WFI-L4-SR_20180105_red.tif", "CBERS"),
        ("CBERS-4_WFI_022024_B15_2018-01-05.tif", "CBERS"),
        ("2018-01-05T104421_RE2_3A_Analytic_SR.tif", "RapidEye"),
        ("S3A_OL_2_20180105T104421_red.tif", "Sentinel-3"),
        ("S3A_OLCI_2018_01_05_10_44_21_L2R_rhos_665.tif", "Sentinel-3"),
        ("S2A_MSI_2018_01_05_10_44_21_T31UES_L2R_rhos_665.tif", "Sentinel-2"),
        ("L8_OLI_2018_01_05_10_44_21_198024_L2R_rhos_655.tif", "Landsat 8 or 9"),
        ("L7_ETM_2018_01_05_10_44_21_198024_L2R_rhos_661.tif", "Landsat 4 to 7"),
        ("PRISMA_2018_01_05_10_44_21_L2R_rhos_665.tif", "PRISMA"),
        ("ENMAP01-____L2A-DT0000001049_20180105T104421Z_red.tif", "EnMAP"),
        ("SPOT7_MS_20180105.tif", "SPOT"),
        ("VNP09GA.A2018005.h18v03.002.tif", "VIIRS"),
        ("m_3712213_sw_10_060_20180105.tif", "NAIP"),
        ("planet_medres_normalized_analytic_2018-01_mosaic.tif", "PlanetScope"),
    ],
)
def test_the_sensor_is_detected_from_the_name(tmp_path: Path, name: str, label: str | None) -> None:
    write(tmp_path / "a.tif", np.ones((1, 2, 2), np.uint16))
    assert sensor_label(SourceFile(name=name, path=tmp_path / "a.tif")) == label


@pytest.mark.parametrize(
    ("how", "label"),
    [
        ({"tags": {"SPACECRAFT_ID": "LANDSAT_8"}}, "Landsat 8 or 9"),
        ({"tags": {"platform": "landsat-7"}}, "Landsat 4 to 7"),
        ({"tags": {"DATATAKE_1_SPACECRAFT_NAME": "Sentinel-2A"}}, "Sentinel-2"),
        ({"tags": {"collection": "sentinel-2-l2a"}}, "Sentinel-2"),
        ({"descriptions": ["SR_B2", "SR_B3", "SR_B4", "SR_B5"]}, "Landsat"),
        ({"descriptions": ["SR_B4", "SR_B5", "SR_B6"]}, "Landsat 8 or 9"),
        ({"descriptions": ["sur_refl_b01", "sur_refl_b02"]}, "MODIS"),
        ({"descriptions": ["coastal_blue", "blue", "green_i", "green", "yellow"]}, "PlanetScope"),
        ({"descriptions": ["B02", "B03", "B04", "B08"]}, None),
        ({"descriptions": ["blue", "green", "red", "nir"]}, None),
    ],
)
def test_the_sensor_is_detected_from_tags_and_bands(
    tmp_path: Path, how: dict, label: str | None
) -> None:
    pixels = np.ones((5, 2, 2), np.uint16)
    assert sensor_label(write(tmp_path / "a.tif", pixels, **how)) == label


LEVELS = {"B02": 0.04, "B03": 0.06, "B04": 0.05, "B08": 0.32}
DAYS = ("20180126", "20180227", "20180415")


def landsat(folder: Path, mission: str, names: dict[str, str]) -> list[SourceFile]:
    """One band per file, in Collection 2's numbers."""
    files = []
    for day in DAYS:
        for name, band in names.items():
            stored = round((LEVELS[band] + 0.2) / 0.0000275)
            pixels = np.full((1, 8, 8), stored, np.uint16)
            pixels[0, 0, 0] = 0
            path = folder / f"{mission}_L2SP_198024_{day}_20200825_02_T1_{name}.TIF"
            files.append(write(path, pixels))
    return files


OLI = {"SR_B2": "B02", "SR_B3": "B03", "SR_B4": "B04", "SR_B5": "B08"}
TM = {"SR_B1": "B02", "SR_B2": "B03", "SR_B3": "B04", "SR_B4": "B08"}


@pytest.mark.parametrize(("mission", "names"), [("LC08", OLI), ("LE07", TM), ("LT05", TM)])
def test_landsat_is_read_by_its_own_numbers(tmp_path: Path, mission: str, names: dict) -> None:
    stack = opened(landsat(tmp_path, mission, names), ["landsat"])
    calibrated = calibrate(stack)
    assert [warning.code for warning in calibrated.warnings if "offset" in warning.code] == [
        "offset_applied"
    ]
    with StackReader(calibrated) as reader:
        sits = reader.read_pixels([4], [4])
        assert not reader.read_pixels([0], [0]).valid.any()
    for position, band in enumerate(BANDS):
        np.testing.assert_allclose(sits.values[:, position], LEVELS[band], atol=2e-5)


def test_another_sensor_than_the_models_is_rejected(tmp_path: Path) -> None:
    files = landsat(tmp_path, "LC08", OLI)
    with pytest.raises(WrongSensor) as caught:
        opened(files, ["sentinel-2"])
    for part in ("LC08_L2SP_198024_20180126", "its name", "12 of 12", "'m@1'", "sentinel-2"):
        assert part in caught.value.detail
    # A card that states no sensors refuses none, and the caller may know better.
    assert opened(files).sensor == "Landsat 8 or 9"
    with pytest.raises(MissingBands):  # by Sentinel-2's names there is no near infrared
        opened(files, ["sentinel-2"], sensor="sentinel-2")


def test_a_card_may_allow_another_sensor_at_a_cost(tmp_path: Path) -> None:
    files = landsat(tmp_path, "LC08", OLI)
    cost = "accuracy 0.85 instead of 0.92 on held-out places"
    stack = open_stack(
        files,
        StackOptions(),
        bands=BANDS,
        max_bytes=2**30,
        sensors=["sentinel-2"],
        other_sensors={"landsat": cost},
        model="m@1",
    )
    warning = stack.warnings[0]
    assert warning.code == "other_sensor"
    for part in (files[0].name, "Landsat 8 or 9", "'m@1'", cost):
        assert part in warning.detail
    with StackReader(stack) as reader:  # by Landsat's numbers
        values = reader.read_pixels([4], [4]).values
    np.testing.assert_allclose(values[0, :, 0], [LEVELS[band] for band in BANDS], atol=2e-5)
    with pytest.raises(WrongSensor):
        open_stack(
            files,
            StackOptions(),
            bands=BANDS,
            max_bytes=2**30,
            sensors=["sentinel-2"],
            other_sensors={"modis": cost},
        )


def test_a_caller_may_name_the_sensor(tmp_path: Path) -> None:
    order = ("B04", "B08", "B02", "B03")
    pixels = np.stack([np.full((8, 8), round(LEVELS[band] * 1e4), np.int16) for band in order])
    names = ["b01", "b02", "b03", "b04"]
    files = [write(tmp_path / f"{day}.tif", pixels, descriptions=names) for day in DAYS]
    stack = opened(files, ["modis", "sentinel-2"], sensor="modis")
    with StackReader(stack) as reader:
        values = reader.read_pixels([0], [0]).values
    np.testing.assert_allclose(values[0, :, 0], [LEVELS[band] for band in BANDS], rtol=1e-5)
    with pytest.raises(WrongSensor, match="the parameter `sensor`"):
        opened(files, ["sentinel-2"], sensor="modis")


def test_hls_s30_counts_as_sentinel_2_and_l30_does_not(tmp_path: Path) -> None:
    pixels = np.full((1, 8, 8), 500, np.int16)
    for product, allowed in (("S30", True), ("L30", False)):
        files = [
            write(
                tmp_path / f"HLS.{product}.T31UES.2018{number}T104421.v2.0.{band}.tif",
                pixels,
                tags={"SENSING_TIME": f"{day}T10:44:21Z"},
            )
            for number, day in (("026", "2018-01-26"), ("058", "2018-02-27"), ("105", "2018-04-15"))
            for band in ("B02", "B04", "B08" if allowed else "B05")
        ]
        named = opened(files, ["hls"])
        assert named.sensor == f"HLS {product}"
        if allowed:
            assert opened(files, ["sentinel-2"]).observations == 3
        else:
            with pytest.raises(WrongSensor):
                opened(files, ["sentinel-2"])


def test_planetscope_bands_go_by_their_order(tmp_path: Path) -> None:
    pixels = np.stack([np.full((8, 8), n, np.uint16) for n in (400, 600, 500, 3200)])
    files = [write(tmp_path / f"{day}_100000_1005_3B_AnalyticMS_SR.tif", pixels) for day in DAYS]
    with StackReader(opened(files, ["planetscope"])) as reader:
        values = reader.read_pixels([0], [0]).values
    np.testing.assert_allclose(values[0, :, 0], [0.04, 0.05, 0.32], rtol=1e-5)


def test_landsat_of_unknown_generation_is_not_guessed(tmp_path: Path) -> None:
    """SR_B4 is red to Landsat 8 and near infrared to Landsat 7."""
    names = ["SR_B2", "SR_B3", "SR_B4", "SR_B5"]
    pixels = np.full((4, 8, 8), 9000, np.uint16)
    files = [write(tmp_path / f"{day}.tif", pixels, descriptions=names) for day in DAYS]
    with pytest.raises(MissingBands):
        opened(files, ["landsat"])


def test_forces_landsat_is_reflectance_times_10000(tmp_path: Path) -> None:
    """Collection 2's own numbers (0.0000275, -0.2) are not those of analysis-ready Landsat."""
    write(
        tmp_path / "a.tif", np.full((3, 2, 2), 500, np.uint16), descriptions=("BLUE", "RED", "NIR")
    )
    stack = opened([SourceFile(name="20180105_LEVEL2_LND08_BOA.tif", path=tmp_path / "a.tif")])
    assert (stack.scale, stack.offset) == (0.0001, 0)
    with pytest.raises(WrongSensor, match="Landsat 8 or 9"):
        opened(
            [SourceFile(name="20180105_LEVEL2_LND08_BOA.tif", path=tmp_path / "a.tif")],
            sensors=("sentinel-2",),
        )


def test_the_parameter_names_the_sensors_that_are_known() -> None:
    schema = RasterForm.model_json_schema()["properties"]["sensor"]
    named = [one["enum"] for one in schema["anyOf"] if "enum" in one]
    assert named == [list(BY_NAME)]

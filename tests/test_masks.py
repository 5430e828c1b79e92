"""Cloud masks: each provider's numbers by hand, and the masks that a stack is read with."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from rasterio.windows import Window

from service.errors import GridMismatch, InvalidRequest, NoGeoreference
from service.read import masks
from service.read.geotiff import SourceFile
from service.read.layouts import StackOptions
from service.read.masks import MaskRule, parse_mask
from service.read.reader import StackReader
from service.read.stack import Stack, open_stack
from tests.kits.rasters import write

NEEDED = ("B02", "B04", "B08")


def bits(*numbers: int) -> int:
    return sum(1 << number for number in numbers)


@pytest.mark.parametrize(
    ("decode", "clear", "unclear"),
    [
        (masks.scl, [4, 5, 6, 7], [0, 1, 2, 3, 8, 9, 10, 11, 255]),
        # Water, and any level of aerosol, is seen ground.
        (
            masks.fmask,
            [0, 64, bits(5), bits(6, 7), 224],
            [1, 2, 4, 8, 16, 66, bits(3, 6), 255],
        ),
        (masks.fmask_classes, [1, 5], [0, 2, 3, 4, 255]),
        # 21824 is Landsat's usual "clear with lows set", 21952 its water.
        (
            masks.qa_pixel,
            [21824, 21952],
            [1, 22280, 23888, 30048, bits(1), bits(2), bits(3), bits(4), bits(5)],
        ),
        (masks.clm, [0], [1, 2, 3, 8, 16, 32, 64, 128, 255]),
        (
            masks.qai,
            [0, bits(5), bits(6), bits(13)],
            [1, bits(1), bits(2), bits(1, 2), bits(3), bits(4), bits(8), bits(9)],
        ),
        (masks.udm2, [1], [0, 255]),
        (masks.qa60, [0, 1, bits(9)], [1024, 2048, 3072]),
        (masks.cldprb, [0, 1, 39], [40, 41, 100, 255]),
        (masks.probability, [0, 2, 39], [40, 41, 100, 255]),
        (masks.RULES["clp"][1], [0, 2, 101], [102, 103, 254, 255, 300]),
        (masks.classi, [0], [1, 255]),
        (masks.s2cloudless, [1], [0, 2, 255]),
        (masks.cfmask, [0, 1], [2, 3, 4, 255]),
        # The usual numbers of Landsat 8 (322 clear, 324 water) and of Landsat 5 (66, 68).
        (
            masks.pixel_qa,
            [66, 68, 130, 322, 324, 386],
            [1, 72, 80, 96, 224, 328, 336, 352, 834, 836, 1346],
        ),
        (masks.udm, [0], [1, 2, 3, 4, 255]),
        (masks.no_cloud, [0], [1, 2, 3, 255]),
        (masks.usable, [1, 2, 255], [0]),
        (masks.alpha, [1, 255], [0]),
    ],
)
def test_numbers_are_decoded_as_their_provider_defines(
    decode: masks.Decoder, clear: Sequence[int], unclear: Sequence[int]
) -> None:
    for dtype in (np.uint16, np.int32, np.float32):
        assert decode(np.array(clear, dtype)).all(), dtype
        assert not decode(np.array(unclear, dtype)).any(), dtype
    if decode is not masks.alpha:
        assert not decode(np.array([np.nan], np.float32)).any()


def test_shares_of_one_are_read_as_such() -> None:
    shares = np.array([0.0, 0.02, 0.39, 0.41, 0.99, 1.0, np.nan, -1.0], np.float32)
    clear = [True, True, True, False, False, False, False, False]
    assert masks.probability(shares).tolist() == clear
    assert masks.probability(shares, full=255).tolist() == clear


def test_cloud_score_counts_from_its_limit_on() -> None:
    scores = np.array([0.0, 0.59, 0.6, 0.61, 1.0, 1.5, np.nan], np.float32)
    assert masks.cloud_score(scores).tolist() == [False, False, True, True, True, False, False]
    assert masks.cloud_score(scores, limit=61).tolist()[2:4] == [False, True]
    # No provider defines integers.
    assert not masks.cloud_score(np.array([0, 1, 60, 100], np.uint8)).any()


@pytest.mark.parametrize("numbers", [[0.0004, 0.0009], [4.0, 5.5]])
def test_classes_that_are_fractions_are_refused_by_the_files_name(numbers: list[float]) -> None:
    decode = MaskRule(name="scl").decoder("S2/20210105.tif")
    with pytest.raises(InvalidRequest, match=r"SCL of 'S2/20210105.tif' holds .* whole numbers"):
        decode(np.array(numbers, np.float32))
    whole = np.array([4.0, 9.0, np.nan], np.float32)
    np.testing.assert_array_equal(decode(whole), [True, False, False])


def test_the_limit_of_cldprb_is_that_of_the_request() -> None:
    (rule,) = parse_mask("cldprb:20") or ()
    numbers = np.array([19, 20, 100], np.uint8)
    decode = pickle.loads(pickle.dumps(rule.decoder("x.tif")))  # noqa: S301 - goes to workers
    assert decode(numbers).tolist() == [True, False, False]
    assert str(rule) == "cldprb:20"


def test_a_name_with_two_meanings_is_decoded_by_the_file() -> None:
    numbers = np.arange(256, dtype=np.uint16)
    for rule, file, meant in (
        ("fmask", "HLS.S30.T31UES.2018011T104421.v2.0.Fmask.tif", masks.fmask),
        ("fmask", "ga_s2am_oa_3-2-1_31UES_2018-01-11_final_fmask.tif", masks.fmask_classes),
        ("cloud", "SENTINEL-2_MSI_31UES_CLOUD_2018-01-11.tif", masks.scl),
        ("cloud", "LANDSAT_OLI_195025_CLOUD_2018-01-11.tif", masks.qa_pixel),
        ("cloud", "HLS_MSI_31UES_CLOUD_2018-01-11.tif", masks.fmask),
    ):
        decoded = MaskRule(name=rule).decoder(file)(numbers)
        np.testing.assert_array_equal(decoded, meant(numbers), err_msg=file)


@pytest.mark.parametrize(
    "text", ["clouds", "scl,clouds", "scl:3", "cldprb:x", "cldprb:0", "clp:101", "none,scl"]
)
def test_an_unknown_mask_is_an_error_that_names_it(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_mask(text)
    assert caught.value.errors[0]["field"] == "mask"


def test_masks_are_read_from_text() -> None:
    assert parse_mask(None) is None
    assert parse_mask("auto") is None
    assert parse_mask("none") == ()
    assert parse_mask("scl, cldprb:40,scl") == (
        MaskRule(name="scl"),
        MaskRule(name="cldprb", limit=40),
    )


# --- a mask beside --------------------------------------------------------------------------

D1, D2 = date(2021, 1, 5), date(2021, 1, 15)


def beside(folder: Path, name: str, kind: str, data: np.ndarray) -> list[SourceFile]:
    """Two dates, a file a band, with a mask of the kind beside."""
    files = []
    for day in ("20210105", "20210115"):
        for band in (*NEEDED, kind):
            pixels = data if band == kind else np.full((2, 2), 1000, np.uint16)
            files.append(write(folder / name.format(day=day, band=band), pixels[None]))
    return files


def opened(files: Sequence[SourceFile], **options: object) -> Stack:
    return open_stack(files, StackOptions(**options), bands=NEEDED, max_bytes=2**20)


def valid(stack: Stack) -> list[list[bool]]:
    with StackReader(stack) as reader:
        sits = reader.read(Window(0, 0, stack.grid.width, stack.grid.height))
    assert (sits.valid[0] == sits.valid[1]).all()
    return sits.valid[0].tolist()


SEEN = [[True, False], [False, True]]


@pytest.mark.parametrize(
    ("how", "error", "why"),
    [
        ({}, InvalidRequest, "1 of 2 observations have the band SCL"),
        ({"crs": "EPSG:32632"}, GridMismatch, "its CRS is EPSG:32632"),
        ({"crs": None}, NoGeoreference, "has no CRS"),
    ],
)
def test_a_file_from_elsewhere_is_rejected_for_its_place_and_not_for_its_mask(
    tmp_path: Path, how: dict[str, object], error: type[Exception], why: str
) -> None:
    pixels = np.full((4, 2, 2), 1000, np.uint16)
    pixels[3] = 4
    names = (*NEEDED, "SCL")
    files = [
        write(tmp_path / "20210105.tif", pixels, descriptions=names),
        write(tmp_path / "20210115.tif", pixels[:3], descriptions=NEEDED, **how),
    ]
    with pytest.raises(error, match=why):
        opened(files)
    with pytest.raises(error, match=why):
        opened(files, mask="scl")


@pytest.mark.parametrize(
    ("name", "kind", "numbers", "rule"),
    [
        ("HLS.S30.T31UES.{day}.v2.0.{band}.tif", "Fmask", [64, 2, 8, 224], "fmask"),
        ("HLS.S30.T31UES.{day}.v1.4.{band}.tif", "QA", [64, 2, 8, 224], "fmask"),
        ("{day}T104421_T31UES.{band}.tif", "QA60", [0, 1024, 2048, 0], "qa60"),
        ("T31UES_{day}T104421_{band}_20m.tif", "MSK_CLDPRB", [0, 80, 40, 10], "cldprb:40"),
        ("SENTINEL2B_{day}-104021-455_L2A_{band}.tif", "CLM_R1", [0, 3, 32, 0], "clm"),
        ("{day}_LEVEL2_SEN2B_{band}.tif", "QAI", [0, 6, 8, 32], "qai"),
        ("LC08_L2SP_195025_{day}_SR_{band}.tif", "QA_PIXEL", [21824, 22280, 2, 21952], "qa_pixel"),
        ("SENTINEL-2_MSI_31UES_{band}_{day}.tif", "CLOUD", [4, 8, 3, 6], "cloud"),
        ("T31UES_{day}T104421_{band}.tif", "SCL", [4, 8, 3, 6], "scl"),
        ("{day}T104421_{band}.tif", "cs_cdf", [0.9, 0.1, 0.5, 0.6], "cs:60"),
        ("S2L2A_{day}_{band}.tif", "CLP", [0, 200, 102, 100], "clp:40"),
        ("{day}T104421_T31UES_{band}.tif", "probability", [0, 90, 40, 39], "probability:40"),
        ("ga_s2am_ard_3_{day}_{band}.tif", "oa_s2cloudless_mask", [1, 2, 0, 1], "s2cloudless"),
        (
            "ga_s2am_ard_3_{day}_{band}.tif",
            "oa_s2cloudless_prob",
            [0, 0.9, 1, 0.1],
            "probability:40",
        ),
        ("T31UES_{day}T104421_{band}.tif", "MSK_CLASSI_B00", [0, 1, 1, 0], "msk_classi"),
        ("LC08_L1TP_195025_{day}_01_T1_{band}.tif", "pixel_qa", [322, 352, 328, 324], "pixel_qa"),
        ("LC08_L1TP_195025_{day}_T1_{band}.tif", "cfmask", [0, 4, 2, 1], "cfmask"),
        ("{day}_103422_1020_3B_{band}.tif", "DN_udm", [0, 1, 2, 0], "udm"),
        ("S2_{day}_{band}.tif", "cloud_mask", [0, 1, 3, 0], "cloud_mask"),
        ("S2_{day}_{band}.tif", "valid", [1, 0, 0, 255], "valid"),
    ],
)
def test_a_mask_in_another_file_is_used(
    tmp_path: Path, name: str, kind: str, numbers: list[int], rule: str
) -> None:
    dtype = np.uint16 if all(float(number).is_integer() for number in numbers) else np.float32
    files = beside(tmp_path, name, kind, np.array(numbers, dtype).reshape(2, 2))
    stack = opened(files)
    assumed = ["mask_assumed"] if rule in masks.ASSUMED else []
    assert (stack.mask, [w.code for w in stack.warnings]) == (rule, assumed)
    assert valid(stack) == SEEN
    assert valid(opened(files, mask=rule)) == SEEN
    without = opened(files, mask="none")
    assert valid(without) == [[True, True], [True, True]]
    (warning,) = without.warnings
    assert (warning.code, "mask=none" in warning.detail) == ("files_unused", True)
    assert "2 of 8 files" in warning.detail


def test_a_udm2_in_another_file_is_used(tmp_path: Path) -> None:
    files = []
    for day in ("20210105", "20210115"):
        pixels = np.full((3, 2, 2), 1000, np.uint16)
        files.append(write(tmp_path / f"{day}_SR.tif", pixels, descriptions=["blue", "red", "nir"]))
        mask = np.zeros((8, 2, 2), np.uint8)
        mask[0] = SEEN
        files.append(write(tmp_path / f"{day}_3B_udm2.tif", mask))
    stack = opened(files)
    assert (stack.mask, valid(stack)) == ("udm2", SEEN)


def test_the_three_bands_of_msk_classi_count_together(tmp_path: Path) -> None:
    numbers = np.zeros((3, 2, 2), np.uint8)
    numbers[0, 0, 1] = numbers[1, 1, 0] = numbers[2, 1, 1] = 1
    files = beside(tmp_path, "T31UES_{day}T104421_{band}.tif", "B03", np.ones((2, 2), np.uint16))
    files = [file for file in files if "B03" not in file.name]
    for day in ("20210105", "20210115"):
        folder = f"S2A_MSIL1C_{day}T104421_N0400_R008_T31UES_{day}T120000.SAFE/QI_DATA"
        path = tmp_path / f"{day}.tif"
        write(path, numbers)
        files.append(SourceFile(name=f"{folder}/MSK_CLASSI_B00.jp2", path=path))
        # Other masks of the product name bands, and hold none.
        files.append(SourceFile(name=f"{folder}/MSK_QUALIT_B04.jp2", path=path))
    stack = opened(files)
    assert (stack.mask, valid(stack)) == ("msk_classi", [[True, False], [False, False]])
    (warning,) = stack.warnings
    assert "2 of 10 files not used" in warning.detail
    assert "QI_DATA/MSK_QUALIT_B04.jp2': names no known band" in warning.detail
    # The same as bands, by the names of Earth Engine.
    names = [*NEEDED, "MSK_CLASSI_OPAQUE", "MSK_CLASSI_CIRRUS", "MSK_CLASSI_SNOW_ICE", "QA60"]
    for day in ("20240205", "20240215"):
        pixels = np.full((7, 2, 2), 1000, np.uint16)
        pixels[3:6], pixels[6] = numbers, 0
        write(tmp_path / f"{day}_GEE.tif", pixels, descriptions=names)
    engine = [SourceFile(name=p.name, path=p) for p in sorted(tmp_path.glob("*_GEE.tif"))]
    assert valid(opened(engine)) == [[True, False], [False, False]]
    assert opened(engine).mask == "msk_classi"


@pytest.mark.parametrize(
    ("day", "mask", "warned"),
    [
        ("20210105", "qa60", []),
        ("20230105", "msk_classi", ["no_cloud_mask"]),
        ("20240305", "msk_classi", []),
    ],
)
def test_masks_that_earth_engine_left_empty_yield_to_others(
    tmp_path: Path, day: str, mask: str, warned: list[str]
) -> None:
    pixels = np.full((5, 2, 2), 1000, np.uint16)
    pixels[3:] = 0
    names = [*NEEDED, "QA60", "MSK_CLASSI_OPAQUE"]
    stack = opened([write(tmp_path / f"{day}.tif", pixels, descriptions=names)])
    assert (stack.mask, [w.code for w in stack.warnings]) == (mask, warned)


def test_a_datamask_in_another_file_marks_missing_values(tmp_path: Path) -> None:
    numbers = np.array([[1, 0], [0, 1]], np.uint16)
    files = beside(tmp_path, "S2_{day}_{band}.tif", "dataMask", numbers)
    stack = opened(files)
    assert (stack.mask, [w.code for w in stack.warnings]) == ("none", ["no_cloud_mask"])
    assert valid(stack) == SEEN
    with StackReader(stack) as reader:
        values = reader.read(Window(0, 0, 2, 2)).values
    assert np.isnan(values[0, :, 0, 1]).all()


def test_udm2_is_known_by_the_names_of_its_bands(tmp_path: Path) -> None:
    names = [
        "clear",
        "snow",
        "shadow",
        "light_haze",
        "heavy_haze",
        "cloud",
        "confidence",
        "unusable",
    ]
    numbers = np.zeros((8, 2, 2), np.uint8)
    numbers[0] = SEEN
    files = beside(tmp_path, "PS_{day}_{band}.tif", "B03", np.ones((2, 2), np.uint16))
    files = [file for file in files if "B03" not in file.name]
    for day in ("20210105", "20210115"):
        files.append(write(tmp_path / f"PS_{day}_usable.tif", numbers, descriptions=names))
    stack = opened(files)
    assert (stack.mask, stack.warnings, valid(stack)) == ("udm2", (), SEEN)


def test_snow_is_masked_only_on_request(tmp_path: Path) -> None:
    numbers = np.array([[0, 90], [50, 10]], np.uint8)
    files = beside(tmp_path, "T31UES_{day}_{band}.tif", "MSK_SNWPRB", numbers)
    assert "no_cloud_mask" in [w.code for w in opened(files).warnings]
    assert valid(opened(files, mask="snwprb")) == SEEN


def test_several_masks_count_together(tmp_path: Path) -> None:
    files = []
    for day in ("20210105", "20210115"):
        pixels = np.full((5, 2, 2), 1000, np.uint16)
        pixels[3] = [[4, 9], [4, 4]]
        pixels[4] = [[0, 0], [90, 0]]
        names = [*NEEDED, "SCL", "MSK_CLDPRB"]
        files.append(write(tmp_path / f"{day}.tif", pixels, descriptions=names))
    assert valid(opened(files)) == [[True, False], [True, True]]
    stack = opened(files, mask="scl,cldprb:50")
    assert (stack.mask, valid(stack)) == ("scl,cldprb:50", SEEN)


def test_a_stack_without_a_mask_has_a_warning(tmp_path: Path) -> None:
    files = beside(tmp_path, "S2_{day}_{band}.tif", "B03", np.ones((2, 2), np.uint16))
    assert [w.code for w in opened(files).warnings] == ["files_unused", "no_cloud_mask"]
    assert "no_cloud_mask" not in [w.code for w in opened(files, mask="none").warnings]


def test_a_mask_that_its_provider_left_empty_is_no_mask(tmp_path: Path) -> None:
    files = []
    for day in ("20220105", "20220205"):
        pixels = np.full((4, 2, 2), 1000, np.uint16)
        pixels[3] = 0
        files.append(write(tmp_path / f"{day}.tif", pixels, descriptions=[*NEEDED, "QA60"]))
    (warning,) = opened(files).warnings
    assert warning.code == "no_cloud_mask"
    assert "QA60 holds no clouds from 2022-01-25 to 2024-02-28" in warning.detail
    assert "1 of the dates" in warning.detail


def test_a_mask_of_a_date_without_bands_is_left_out_and_named(tmp_path: Path) -> None:
    files = beside(tmp_path, "T31UES_{day}_{band}.tif", "SCL", np.full((2, 2), 4, np.uint16))
    files.append(write(tmp_path / "T31UES_20210125_SCL.tif", np.full((1, 2, 2), 4, np.uint8)))
    stack = opened(files)
    assert stack.dates == (D1, D2)
    (warning,) = stack.warnings
    assert "'T31UES_20210125_SCL.tif': cloud mask SCL, and another mask is used, or no band" in (
        warning.detail
    )


def test_a_second_mask_of_a_date_is_left_out(tmp_path: Path) -> None:
    name = "SENTINEL2B_{day}-104021-455_L2A_{band}.tif"
    numbers = np.array([[0, 3], [32, 0]], np.uint16)
    files = beside(tmp_path, name, "CLM_R1", numbers)
    for day in ("20210105", "20210115"):
        path = tmp_path / name.format(day=day, band="CLM_R2")
        files.append(write(path, np.ones((1, 2, 2), np.uint16)))
    stack = opened(files)
    assert (stack.mask, stack.dates, valid(stack)) == ("clm", (D1, D2), SEEN)
    (warning,) = stack.warnings
    assert "2 of 10 files not used" in warning.detail
    assert "_CLM_R2.tif': cloud mask CLM, and another mask is used" in warning.detail
    # Also where the day has two granules, in whatever order.
    for file in tuple(files):
        other = tmp_path / file.name.replace("-455", "-456")
        other.write_bytes(file.path.read_bytes())
        files.append(SourceFile(name=other.name, path=other))
    for order in (files, files[::-1]):
        stack = opened(order)
        assert len(stack.acquisitions) == 4
        for one in stack.acquisitions:
            planes = [*one.planes, one.masks[0].plane]
            assert len({plane.source.name.split("_")[1] for plane in planes}) == 1

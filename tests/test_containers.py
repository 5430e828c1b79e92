"""Zips, SAFE products and JPEG 2000: understood as the files in them, and bounded."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.windows import Window

from service.errors import (
    BodyTooLarge,
    InvalidRequest,
    MissingDates,
    NotAGeoTIFF,
    PIMCError,
    RasterTooLarge,
)
from service.read import jp2_guard
from service.read.containers import unpack, unpacked_bytes
from service.read.geotiff import SourceFile, gdal_options, read_header
from service.read.layouts import StackOptions
from service.read.reader import StackReader
from service.read.stack import Stack, open_stack
from tests.kits.rasters import UTM, write

BANDS = ("B02", "B04", "B08")
ROOT = "S2A_MSIL2A_20221005T115411_N0400_R023_T31UES_20221005T164454.SAFE"
IMAGES = f"{ROOT}/GRANULE/L2A_T31UES_A038063_20221005T115413/IMG_DATA"
XML = """<?xml version="1.0"?><n1:Level-2A_User_Product><PRODUCT_START_TIME>2022-10-05T11:54:11.024Z
</PRODUCT_START_TIME><PROCESSING_BASELINE>04.00</PROCESSING_BASELINE>
<BOA_QUANTIFICATION_VALUE unit="none">10000</BOA_QUANTIFICATION_VALUE>{}
</n1:Level-2A_User_Product>"""
OFFSETS = "".join(f'<BOA_ADD_OFFSET band_id="{n}">-1000</BOA_ADD_OFFSET>' for n in range(13))
rng = np.random.default_rng(3)


def jp2(path: Path, data: np.ndarray, size: float = 10) -> Path:
    """One band (h, w), or several (n, h, w), lossless."""
    data = data if data.ndim == 3 else data[None]
    with rasterio.open(
        path, "w", driver="JP2OpenJPEG", width=data.shape[2], height=data.shape[1],
        count=data.shape[0], dtype=data.dtype, crs=UTM,
        transform=Affine(size, 0, 5e5, 0, -size, 5.6e6),
        QUALITY="100", REVERSIBLE="YES",
    ) as file:  # fmt: skip
        file.write(data)
    return path


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> SourceFile:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return SourceFile(name=path.name, path=path)


def opened(files: Sequence[SourceFile], folder: Path, **options: object) -> Stack:
    out = folder / "members"
    out.mkdir(exist_ok=True)
    unpacked = unpack(files, out, max_bytes=2**26, max_files=100)
    options_given = StackOptions(left_out=unpacked.left_out, **options)
    return open_stack(unpacked.files, options_given, bands=BANDS, max_bytes=2**26)


def values(stack: Stack) -> np.ndarray:
    with StackReader(stack) as reader:
        return reader.read(Window(0, 0, stack.grid.width, stack.grid.height)).values


@pytest.fixture
def product(tmp_path: Path) -> tuple[dict[str, bytes], dict[str, np.ndarray]]:
    """A product's folder: 10 m bands also at 20 m, SCL at 20 m, and files that are not bands."""
    members: dict[str, bytes] = {f"{ROOT}/MTD_MSIL2A.xml": XML.format(OFFSETS).encode()}
    bands: dict[str, np.ndarray] = {}
    for band in (*BANDS, "SCL"):
        for size in (10, 20) if band != "SCL" else (20,):
            side = 320 // size
            data = rng.integers(1100, 4000, (side, side)).astype(np.uint16)
            if band == "SCL":
                data = np.full((side, side), 4, np.uint8)
            name = f"{IMAGES}/R{size}m/T31UES_20221005T115411_{band}_{size}m.jp2"
            members[name] = jp2(tmp_path / f"{band}_{size}.jp2", data, size).read_bytes()
            bands[f"{band}_{size}"] = data
    members[f"{IMAGES}/R10m/T31UES_20221005T115411_TCI_10m.jp2"] = b"not read"
    members[f"{ROOT}/manifest.safe"] = b"<xml/>"
    members[f"__MACOSX/{ROOT}/._manifest.safe"] = b"x"
    return members, bands


def test_a_product_may_be_sent_as_a_zip(
    tmp_path: Path, product: tuple[dict[str, bytes], dict[str, np.ndarray]]
) -> None:
    members, bands = product
    stack = opened([zipped(tmp_path / "S2A.zip", members)], tmp_path)
    assert (stack.dates, stack.mask) == ((date(2022, 10, 5),), "scl")
    assert (stack.grid.height, stack.grid.width) == (32, 32)
    for at, band in enumerate(BANDS):
        np.testing.assert_allclose(
            values(stack)[0, at], bands[f"{band}_10"] * 1e-4 - 0.1, atol=1e-6
        )
    (unused,) = [w for w in stack.warnings if w.code == "files_unused"]
    for part in (
        "_B02_20m.jp2",
        "TCI_10m.jp2': its name contains no band",
        "manifest.safe': not a raster",
    ):
        assert part in unused.detail
    assert "MACOSX" not in unused.detail


def test_a_product_may_be_sent_as_a_folder_also_before_baseline_04(
    tmp_path: Path, product: tuple[dict[str, bytes], dict[str, np.ndarray]]
) -> None:
    members, bands = product
    members[f"{ROOT}/MTD_MSIL2A.xml"] = XML.format("").replace("04.00", "02.08").encode()
    files = []
    for number, (name, content) in enumerate(members.items()):
        if not name.endswith(("manifest.safe", "TCI_10m.jp2")):
            path = tmp_path / f"{number}.bin"
            path.write_bytes(content)
            files.append(SourceFile(name=name, path=path))
    stack = opened(files, tmp_path)
    np.testing.assert_allclose(values(stack)[0, 0], bands["B02_10"] * 1e-4, atol=1e-6)


def test_zips_of_products_without_their_folder_keep_their_own_offset(tmp_path: Path) -> None:
    # As `cd X.SAFE && zip -r ../X.zip .` makes them.
    zips = []
    for name, offsets, number in (
        ("S2C_MSIL2A_20250105T105031_N0511_R051_T31UES_20250105T130000", OFFSETS, 1500),
        ("S2A_MSIL2A_20180110T105031_N0206_R051_T31UES_20180110T130000", "", 500),
    ):
        day = name[11:19]
        xml = XML.format(offsets).replace("2022-10-05", f"{day[:4]}-{day[4:6]}-{day[6:]}")
        xml = xml if offsets else xml.replace("04.00", "02.06")
        images = f"GRANULE/L2A_T31UES_A1_{day}T105031/IMG_DATA/R10m"
        members = {"MTD_MSIL2A.xml": xml.encode()}
        for band in BANDS:
            data = np.full((32, 32), number, np.uint16)
            content = jp2(tmp_path / "one.jp2", data).read_bytes()
            members[f"{images}/T31UES_{day}T105031_{band}_10m.jp2"] = content
        zips.append(zipped(tmp_path / f"{number}.zip", members))
    stack = opened(zips, tmp_path, mask="none")
    assert stack.dates == (date(2018, 1, 10), date(2025, 1, 5))
    np.testing.assert_allclose(values(stack), 0.05, atol=1e-6)
    # The same files with the names that they have in the folder.
    folder = tmp_path / "folder"
    folder.mkdir()
    with zipfile.ZipFile(tmp_path / "1500.zip") as archive:
        files = []
        for n, name in enumerate(archive.namelist()):
            (folder / str(n)).write_bytes(archive.read(name))
            files.append(SourceFile(name=name, path=folder / str(n)))
    np.testing.assert_allclose(values(opened(files, folder, mask="none")), 0.05, atol=1e-6)


def test_zips_with_an_item_each_keep_their_own_date(tmp_path: Path) -> None:
    zips = []
    for day in ("2021-01-05", "2021-01-15"):
        item = {
            "type": "Feature",
            "stac_version": "1.0.0",
            "properties": {"datetime": f"{day}T10:00:00Z"},
            "assets": {band: {"href": f"./{band}.tif"} for band in BANDS},
        }
        members = {"item.json": json.dumps(item).encode()}
        for band in BANDS:
            members[f"{band}.tif"] = one_band(tmp_path, f"{band}.tif", 500).path.read_bytes()
        zips.append(zipped(tmp_path / f"{day[-2:]}.zip", members))
    stack = opened(zips, tmp_path, mask="none")
    assert stack.dates == (date(2021, 1, 5), date(2021, 1, 15))


def test_level_1c_with_its_raster_masks_as_a_zip_and_as_a_folder(tmp_path: Path) -> None:
    """RADIO_ADD_OFFSET, and MSK_CLASSI at 60 m; MSK_QUALIT_B04 is not the band B04."""
    root = ROOT.replace("MSIL2A", "MSIL1C")
    granule = f"{root}/GRANULE/L1C_T31UES_A038063_20221005T115413"
    xml = XML.format(OFFSETS).replace("BOA_ADD", "RADIO_ADD").replace("BOA_QUANT", "QUANT")
    members = {f"{root}/MTD_MSIL1C.xml": xml.replace("Level-2A", "Level-1C").encode()}
    pixels = rng.integers(1100, 4000, (36, 36)).astype(np.uint16)
    for band in BANDS:
        name = f"{granule}/IMG_DATA/T31UES_20221005T115411_{band}.jp2"
        members[name] = jp2(tmp_path / "band.jp2", pixels).read_bytes()
    classes = np.zeros((3, 6, 6), np.uint8)
    classes[0, 0, 0] = classes[1, 0, 1] = classes[2, 0, 2] = 1
    mask = jp2(tmp_path / "mask.jp2", classes, 60).read_bytes()
    for name in ("MSK_CLASSI_B00", "MSK_QUALIT_B04", "MSK_DETFOO_B02"):
        members[f"{granule}/QI_DATA/{name}.jp2"] = mask
    files = []
    for number, (name, content) in enumerate(members.items()):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(content)
        files.append(SourceFile(name=name, path=path))
    seen = np.ones((36, 36), np.bool_)
    seen[:6, :18] = False
    for sent in ([zipped(tmp_path / "S2A.zip", members)], files):
        stack = opened(sent, tmp_path)
        assert (stack.dates, stack.mask) == ((date(2022, 10, 5),), "msk_classi")
        with StackReader(stack) as reader:
            sits = reader.read(Window(0, 0, 36, 36))
        np.testing.assert_allclose(sits.values[0, 1], pixels * 1e-4 - 0.1, atol=1e-6)
        assert (sits.valid[0] == seen).all()
        (unused,) = [w.detail for w in stack.warnings if w.code == "files_unused"]
        assert "MSK_QUALIT_B04.jp2" in unused
        (tmp_path / "members").rename(tmp_path / f"members{len(sent)}")


def test_geotiffs_may_be_sent_in_a_zip(tmp_path: Path) -> None:
    pixels = rng.integers(1, 3000, (3, 4, 5)).astype(np.uint16)
    members = {}
    for day in ("20210105", "20210115"):
        file = write(tmp_path / f"x_{day}.tif", pixels, descriptions=BANDS)
        members[f"stack/{file.name}"] = file.path.read_bytes()
    stack = opened([zipped(tmp_path / "a.zip", members)], tmp_path, mask="none")
    assert stack.dates == (date(2021, 1, 5), date(2021, 1, 15))
    assert stack.files == ("stack/x_20210105.tif", "stack/x_20210115.tif")
    np.testing.assert_allclose(values(stack)[1], pixels * 1e-4, rtol=1e-6)


@pytest.mark.parametrize("by", ["date", "band", "order"])
def test_the_name_of_a_zip_adds_what_its_members_lack(tmp_path: Path, by: str) -> None:
    days = ("2021-01-05", "2021-01-15", "2021-02-04")
    names = ("B02", "B04", "B08")
    numbers = {
        (day, band): 1000 + 10 * d + b for d, day in enumerate(days) for b, band in enumerate(names)
    }
    content = {}
    for key, number in numbers.items():
        pixels = np.full((1, 2, 2), number, dtype=np.uint16)
        content[key] = write(tmp_path / "one.tif", pixels).path.read_bytes()
    if by == "band":
        zips = [
            zipped(tmp_path / f"{band}.zip", {f"{day}.tif": content[day, band] for day in days})
            for band in names
        ]
    else:
        # Without a date in its name, a zip still identifies its granule.
        name = "S2_{}.zip" if by == "date" else "download ({}).zip"
        zips = [
            zipped(
                tmp_path / name.format(day if by == "date" else n),
                {f"B/download.{band}.geotiff": content[day, band] for band in names},
            )
            for n, day in enumerate(days)
        ]
    dates = None
    if by == "order":
        dates = tuple(date.fromisoformat(day) for day in days for _ in names)
    stack = opened(zips, tmp_path, mask="none", dates=dates)
    assert [day.isoformat() for day in stack.dates] == list(days)
    found = np.rint(values(stack)[:, :, 0, 0] / 1e-4).astype(int).tolist()
    assert found == [[numbers[day, band] for band in names] for day in days]
    assert len(set(stack.files)) == 9


def test_a_zip_inside_a_zip_is_named(tmp_path: Path) -> None:
    pixels = rng.integers(1, 3000, (3, 4, 5)).astype(np.uint16)
    file = write(tmp_path / "x_20210105.tif", pixels, descriptions=BANDS)
    inner = zipped(tmp_path / "b.zip", {"x_20210115.tif": file.path.read_bytes()})
    members = {file.name: file.path.read_bytes(), "b.zip": inner.path.read_bytes()}
    stack = opened([zipped(tmp_path / "a.zip", members)], tmp_path, mask="none")
    (warning,) = stack.warnings
    assert warning.code == "files_unused"
    assert "'b.zip': a zip inside the zip, which is not unpacked: send it itself" in warning.detail


def test_a_zip_is_measured_before_it_is_unpacked(tmp_path: Path) -> None:
    members = {
        "a.tif": bytes(10**6),
        "b.jp2": bytes(10**6),
        "T31_B04.jp2": b"x" * 10,
        "c.txt": b"y",
    }
    sent = [zipped(tmp_path / "s.zip", members), zipped(tmp_path / "t.zip", {"d.tif": b"z" * 7})]
    assert unpacked_bytes(sent, max_bytes=10**7) == 10**6 + 10 + 7
    folder = tmp_path / "in"
    folder.mkdir()
    unpack(sent, folder, max_bytes=10**7, max_files=10)
    assert sum(path.stat().st_size for path in folder.iterdir()) == 10**6 + 10 + 7
    with pytest.raises(BodyTooLarge, match=r"s\.zip.* more than the 1000 bytes"):
        unpacked_bytes(sent, max_bytes=1000)


def test_the_content_of_a_zip_is_bounded_whatever_it_declares(tmp_path: Path) -> None:
    bomb = zipped(tmp_path / "bomb.zip", {"a.tif": bytes(10**6)})
    assert bomb.path.stat().st_size < 2000
    with pytest.raises(BodyTooLarge, match=r"bomb\.zip"):
        unpack([bomb], tmp_path, max_bytes=10**5, max_files=10)
    # A member that says it is small.
    lying = bytearray(bomb.path.read_bytes())
    at = lying.index(struct.pack("<L", 10**6), lying.index(b"PK\x01\x02"))
    lying[at : at + 4] = struct.pack("<L", 10)
    bomb.path.write_bytes(lying)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises((BodyTooLarge, InvalidRequest)):
        unpack([bomb], other, max_bytes=10**5, max_files=10)
    assert sum(path.stat().st_size for path in other.iterdir()) <= 10**5


def test_no_member_is_written_outside(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    file = zipped(tmp_path / "a.zip", {"../../up.tif": b"x", "/etc/passwd.tif": b"y"})
    found = unpack([file], folder, max_bytes=100, max_files=10)
    assert {source.path.parent for source in found.files} == {folder}
    assert [source.name for source in found.files] == ["up.tif", "etc/passwd.tif"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "in"]
    # A zip that was named stays; one that was sent is not kept twice.
    other = tmp_path / "other"
    other.mkdir()
    sent = zipped(other / "sent.zip", {"a.tif": b"z"})
    unpack([sent], other, max_bytes=100, max_files=10)
    assert not sent.path.exists()


@pytest.mark.parametrize("how", ["cut", "no raster", "many", "directory", "noise"])
def test_a_damaged_zip_is_rejected(tmp_path: Path, how: str) -> None:
    file = zipped(tmp_path / "a.zip", {"a.tif": b"II*\0" * 9} if how != "no raster" else {"a": b""})
    data = bytearray(file.path.read_bytes())
    if how == "cut":
        del data[-30:]
    elif how == "many":
        data[-12:-10] = struct.pack("<H", 65_000)
    elif how == "directory":
        data[-10:-6] = struct.pack("<L", 2**31)
    elif how == "noise":
        data[30:60] = bytes(30)
    file.path.write_bytes(data)
    with pytest.raises(InvalidRequest, match=r"a\.zip") as caught:
        unpack([file], tmp_path, max_bytes=1000, max_files=10)
    assert caught.value.errors[0]["field"] == "files"


def test_a_zip_of_which_nothing_is_read_is_refused_with_the_reason(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.tif", b"II*\0" * 9)
    inside = zipped(tmp_path / "c.zip", {"inner.zip": (tmp_path / "b.zip").read_bytes()})
    for path, match in (
        (tmp_path / "b.zip", "'a.tif': compressed by a method other than deflate.*with deflate"),
        (inside.path, r"but the zip 'inner\.zip': send that zip"),
    ):
        file = SourceFile(name=path.name, path=path)
        with pytest.raises(InvalidRequest, match=match):
            unpack([file], tmp_path, max_bytes=1000, max_files=10)
    store = zipped(tmp_path / "s2.zarr.zip", {".zgroup": b"{}", "B04/0.0": b"abc"})
    with pytest.raises(InvalidRequest, match=r"'s2\.zarr\.zip'.*a Zarr store.*to_raster"):
        opened([store], tmp_path)


def test_jpeg_2000_can_be_switched_off(tmp_path: Path) -> None:
    path = jp2(tmp_path / "20210105_B02.jp2", np.ones((8, 8), np.uint16))
    file = SourceFile(name=path.name, path=path)
    assert unpack([file], tmp_path, max_bytes=9, max_files=1).files == (file,)
    with pytest.raises(NotAGeoTIFF, match="PIMC_JP2"):
        unpack([file], tmp_path, max_bytes=9, max_files=1, jp2=False)


# --- metadata beside rasters ----------------------------------------------------------------


def one_band(folder: Path, name: str, number: int) -> SourceFile:
    file = write(folder / name.replace("/", "+"), np.full((1, 2, 2), number, np.uint16))
    return SourceFile(name=name, path=file.path)


def as_json(folder: Path, name: str, document: object) -> SourceFile:
    path = folder / name.replace("/", "+")
    path.write_text(json.dumps(document))
    return SourceFile(name=name, path=path)


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0"])
def test_a_stac_item_beside_its_assets_says_date_scale_and_offset(
    tmp_path: Path, version: str
) -> None:
    stated = {"scale": 0.0001, "offset": -0.1}
    extra = (
        {"raster:bands": [stated]}
        if version == "1.0.0"
        else {"bands": [{f"raster:{key}": value for key, value in stated.items()}]}
    )
    assets = {
        key: {"href": f"https://example.org/x/{band}.tif?token=1", **extra}
        for key, band in (("blue", "B02"), ("red", "B04"), ("nir", "B08"))
    }
    item = {
        "type": "Feature",
        "stac_version": version,
        "properties": {"datetime": "2021-01-05T10:00:00Z"},
        "assets": assets,
    }
    files = [
        as_json(tmp_path, "a/item.json", item),
        *(one_band(tmp_path, f"a/{band}.tif", 1500) for band in BANDS),
    ]
    stack = opened(files, tmp_path, mask="none")
    assert stack.dates == (date(2021, 1, 5),)
    np.testing.assert_allclose(values(stack), 0.05, atol=1e-6)


@pytest.mark.parametrize("form", ["items", "collection"])
@pytest.mark.parametrize("top", ["", "stack/"])
def test_items_in_one_folder_describe_the_files_that_they_link_to(
    tmp_path: Path, form: str, top: str
) -> None:
    files, items = [], []
    for n, day in enumerate(("2021-01-05", "2021-01-15", "2021-02-04")):
        assets = {
            band: {
                "href": f"https://example.org/scene{n}/{band}.tif?sig=1",
                "raster:bands": [{"scale": 0.0001 * (n + 1), "offset": 0}],
            }
            for band in ("B02", "B04", "B08")
        }
        item = {"type": "Feature", "stac_version": "1.0.0", "id": f"i{n}", "assets": assets,
                "properties": {"datetime": f"{day}T10:50:31Z"}}  # fmt: skip
        items.append(item)
        for band in assets:
            folder = tmp_path / f"{n}{band}"
            folder.mkdir()
            found = one_band(folder, f"{band}.tif", 1000)
            files.append(replace(found, name=f"{top}scene{n}/{band}.tif"))
    if form == "items":
        for n, item in enumerate(items):
            found = as_json(tmp_path, f"item{n}.geojson", item)
            files.append(replace(found, name=f"{top}{found.name}"))
    else:
        found = as_json(tmp_path, "a.json", {"type": "FeatureCollection", "features": items})
        files.append(replace(found, name=f"{top}{found.name}"))
    stack = opened(files, tmp_path, mask="none")
    assert [day.isoformat() for day in stack.dates] == ["2021-01-05", "2021-01-15", "2021-02-04"]
    np.testing.assert_allclose(values(stack)[:, 0, 0, 0], [0.1, 0.2, 0.3], rtol=1e-5)
    # Folders that no link names: none of the items is taken for another's.
    other = [replace(f, name=f.name.replace("scene", "s")) for f in files]
    with pytest.raises(MissingDates):
        opened(other, tmp_path, mask="none")


def test_an_item_of_many_dates_leaves_the_dates_to_the_names(tmp_path: Path) -> None:
    # As openEO describes the results of a batch job.
    days = ("2021-01-05", "2021-01-15")
    item = {
        "type": "Feature",
        "stac_version": "1.0.0",
        "properties": {"datetime": None, "start_datetime": "2021-01-01T00:00:00Z"},
        "assets": {
            f"openEO_{day}Z.tif": {
                "href": f"https://example.org/results/openEO_{day}Z.tif?expires=20220101",
                "eo:bands": [{"name": band} for band in BANDS],
            }
            for day in days
        },
    }
    pixels = np.full((3, 2, 2), 1500, np.uint16)
    files = [write(tmp_path / f"openEO_{day}Z.tif", pixels) for day in days]
    stack = opened([*files, as_json(tmp_path, "job-results.json", item)], tmp_path, mask="none")
    assert stack.dates == (date(2021, 1, 5), date(2021, 1, 15))
    # A composite has one date, the first of its period.
    first = item | {"assets": {"openEO_2021-01-05Z.tif": item["assets"]["openEO_2021-01-05Z.tif"]}}
    stack = opened([files[0], as_json(tmp_path, "item.json", first)], tmp_path, mask="none")
    assert stack.dates == (date(2021, 1, 1),)


def test_a_request_of_sentinelhub_py_says_the_date(tmp_path: Path) -> None:
    span = {"from": "2021-01-05T00:00:00Z", "to": "2021-01-05T23:59:59Z"}
    data = [{"dataFilter": {"timeRange": span}}]
    process = {
        "url": "https://x/api/v1/process",
        "headers": {},
        "payload": {"input": {"data": data}},
    }
    wcs = {"url": "https://x/wcs?TIME=2021-01-15T10%3A20%3A21Z%2F2021-01-15T10%3A20%3A21Z",
           "headers": {}, "payload": None}  # fmt: skip
    pixels = np.full((3, 2, 2), 1500, np.uint16)
    files = []
    for folder, request in (("06e820ebeff0", process), ("20c6b387fa6c", wcs)):
        files.append(as_json(tmp_path, f"{folder}/request.json", request))
        tiff = write(tmp_path / f"{folder}.tif", pixels, descriptions=BANDS)
        files.append(SourceFile(name=f"{folder}/response.tiff", path=tiff.path))
    assert opened(files, tmp_path, mask="none").dates == (date(2021, 1, 5), date(2021, 1, 15))
    # Newer versions keep the response beside the request; the batch API the request's body alone.
    as_json(tmp_path, "06e820ebeff0/request.json", {"request": process, "response": {}})
    as_json(tmp_path, "20c6b387fa6c/request.json", {"input": {"data": data}, "evalscript": ""})
    assert opened(files, tmp_path, mask="none").dates == (date(2021, 1, 5),)
    # A request for several weeks is a composite, which has no one date.
    span["to"] = "2021-02-28T23:59:59Z"
    as_json(tmp_path, "06e820ebeff0/request.json", process)
    with pytest.raises(MissingDates, match=r"'06e820ebeff0/response\.tiff'"):
        opened(files, tmp_path, mask="none")


def test_a_collection_beside_rasters_is_named_and_left_out(tmp_path: Path) -> None:
    # As openEO's client downloads the results of a job.
    about = {"type": "Collection", "stac_version": "1.0.0", "id": "j-1", "assets": {}}
    pixels = np.full((3, 2, 2), 500, np.uint16)
    file = write(tmp_path / "openEO_2021-01-05Z.tif", pixels, descriptions=BANDS)
    stack = opened([file, as_json(tmp_path, "job-results.json", about)], tmp_path, mask="none")
    assert stack.dates == (date(2021, 1, 5),)
    (warning,) = stack.warnings
    assert warning.code == "files_unused"
    assert "1 of 2 files not used: 'job-results.json': a STAC Collection" in warning.detail


@pytest.mark.parametrize("kind", ["Collection", "Feature"])
def test_metadata_without_rasters_is_refused(tmp_path: Path, kind: str) -> None:
    document = {"type": kind, "stac_version": "1.0.0", "properties": {"datetime": "2021-01-05"}}
    with pytest.raises(InvalidRequest, match=r"metadata \('item\.json'\) and no raster"):
        opened([as_json(tmp_path, "item.json", document)], tmp_path)


@pytest.mark.parametrize("document", [[], 3, {"url": "x"}, {"norm_factor": 0.0001}])
def test_other_json_beside_rasters_is_named_and_left_out(tmp_path: Path, document: object) -> None:
    files = [as_json(tmp_path, "a.json", document), *dated(tmp_path)]
    (warning,) = opened(files, tmp_path, mask="none").warnings
    assert warning.code == "files_unused"
    assert "1 of 2 files not used: 'a.json': metadata in a form that is not read" in warning.detail
    with pytest.raises(NotAGeoTIFF, match=r"'a\.json'"):
        opened(files[:1], tmp_path)


@pytest.mark.parametrize("name", ["area.json", "area.geojson"])
def test_geojson_among_rasters_is_rejected(tmp_path: Path, name: str) -> None:
    """The caller may expect that a polygon cuts the map."""
    area = as_json(tmp_path, name, {"type": "FeatureCollection", "features": []})
    with pytest.raises(NotAGeoTIFF, match=rf"'{name}' .*`fields`"):
        opened([*dated(tmp_path), area], tmp_path)


def dated(folder: Path) -> list[SourceFile]:
    """One file of one date."""
    return [write(folder / "S2_20210105.tif", np.full((3, 2, 2), 500, np.uint16),
                  descriptions=BANDS)]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("README.txt", b"Downloaded by hand", "a text or table"),
        ("README", b"", "a text or table"),
        ("dates.csv", b"2021-01-05\n", "give dates in `dates`"),
        ("S2_20210105.qml", b"<!DOCTYPE qgis>", "a style"),
        ("map.qgz", b"PK\x05\x06", "a style or project"),
        ("S2_20210105.prj", b"PROJCS[]", "a georeference beside a raster"),
        ("S2_20210105.TFW", b"10\n", "a georeference beside a raster"),
        (".DS_Store", b"\0\0\0\1Bud1", "data of a file manager"),
        (".gitkeep", b"", "data of a file manager"),
        ("_SUCCESS", b"", "data of a file manager"),
        ("x/Thumbs.db", b"\xd0\xcf\x11\xe0", "data of a file manager"),
        ("SHA256SUMS", b"ab  S2.tif", "checksums"),
        ("S2_20210105.tif.md5", b"ab", "checksums"),
        ("preview.png", b"\x89PNG\r\n", "a picture"),
        ("LC08_MTL.xml", b"<?xml?><LANDSAT/>", "metadata in a form that is not read"),
        ("evalscript.js", b"//VERSION=3", "metadata in a form that is not read"),
        ("S2_20210105.tif.ovr", b"II*\0", "overviews"),
        ("S2_20210105.tif.msk", b"II*\0", "marks as missing are not known"),
    ],
)
def test_files_that_lie_beside_rasters_are_named_and_left_out(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / "beside").write_bytes(content)
    beside = SourceFile(name=name, path=tmp_path / "beside")
    stack = opened([beside, *dated(tmp_path)], tmp_path, mask="none")
    assert stack.dates == (date(2021, 1, 5),)
    (warning,) = stack.warnings
    assert warning.code == "files_unused"
    last = name.rpartition("/")[2]
    assert f"1 of 2 files not used: '{last}': " in warning.detail
    assert reason in warning.detail
    if content[:2] != b"II":
        with pytest.raises(NotAGeoTIFF, match=rf"'{name}'"):
            opened([beside], tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("B04.tif.aux.xml", b"<PAMDataset>"),
        ("._README.txt", b"\x00\x05\x16\x07"),
        ("S2_20210115.xml", b"<!DOCTYPE html><html>"),
        ("S2_20210115.tif", b"\x89PNG\r\n"),
        ("cube.nc", b"CDF\x01"),
        ("cube.txt", b"\x89HDF\r\n"),
    ],
)
def test_data_among_rasters_is_rejected(tmp_path: Path, name: str, content: bytes) -> None:
    """A date of the stack may be missing, or what the caller expects to count."""
    (tmp_path / "beside").write_bytes(content)
    with pytest.raises(NotAGeoTIFF, match=rf"'{name}'"):
        opened([*dated(tmp_path), SourceFile(name=name, path=tmp_path / "beside")], tmp_path)


DAYS = ["2021-01-05", "2021-01-15", "2021-02-04"]


@pytest.mark.parametrize(
    "document",
    [
        {"norm_factor": 0.0002, "dates": DAYS},
        {"norm_factor": 0.0002, "dates": [f"{day}T10:50:31Z" for day in DAYS]},
        {"norm_factor": 0.0002, "scenes": [{"date": day, "tile": "31UES"} for day in DAYS]},
        {"userData": {"norm_factor": 0.0002, "serialized_dates": json.dumps(DAYS)}},
    ],
)
def test_sentinel_hubs_userdata_dates_the_bands(tmp_path: Path, document: object) -> None:
    files = [as_json(tmp_path, "31UES/userdata.json", document)]
    for n, band in enumerate(BANDS, start=1):
        pixels = np.arange(1, 4, dtype=np.uint16)[:, None, None] * np.full((1, 2, 2), 100 * n)
        made = write(tmp_path / f"{band}.tif", pixels.astype(np.uint16))
        files.append(SourceFile(name=f"31UES/{band}.tif", path=made.path))
    stack = opened(files, tmp_path, mask="none")
    assert [str(day) for day in stack.dates] == DAYS
    expected = np.outer([1, 2, 3], [1, 2, 3]) * 100 * 0.0002
    np.testing.assert_allclose(values(stack)[:, :, 0, 0], expected, atol=1e-7)
    (warning,) = stack.warnings
    assert warning.code == "dates_assumed"
    assert "the scale 0.0002 by its `norm_factor`" in warning.detail
    assert "of '31UES/userdata.json', in its order (2021-01-05 to 2021-02-04)" in warning.detail


@pytest.mark.parametrize("days", [DAYS[:2], DAYS * 2])
def test_dates_of_another_number_than_the_bands_are_not_used(
    tmp_path: Path, days: list[str]
) -> None:
    files = [as_json(tmp_path, "userdata.json", {"dates": days})]
    files += [write(tmp_path / f"{band}.tif", np.full((3, 2, 2), 500, np.uint16)) for band in BANDS]
    with pytest.raises(MissingDates, match=r"\('userdata\.json' is not used: its \d dates"):
        opened(files, tmp_path, mask="none")
    (unused,) = opened(
        files, tmp_path, mask="none", dates=[*map(date.fromisoformat, DAYS)]
    ).warnings
    assert (
        f"'userdata.json': its {len(days)} dates (2021-01-05, ...) are not those" in unused.detail
    )


def test_a_zip_keeps_its_items_and_names_other_json(tmp_path: Path) -> None:
    item = {"type": "Feature", "stac_version": "1.0.0", "properties": {"datetime": "2021-01-05"}}
    members = {
        f"a/{band}.tif": one_band(tmp_path, f"{band}.tif", 1500).path.read_bytes() for band in BANDS
    }
    members |= {"a/item.json": json.dumps(item).encode(), "a/other.json": b"[]"}
    stack = opened([zipped(tmp_path / "a.zip", members)], tmp_path, mask="none")
    assert stack.dates == (date(2021, 1, 5),)
    (unused,) = [w for w in stack.warnings if w.code == "files_unused"]
    assert "'other.json': not a raster" in unused.detail


# --- JPEG 2000 ------------------------------------------------------------------------------


def header(path: Path) -> None:
    with gdal_options():
        read_header(SourceFile(name=path.name, path=path))


def patched(path: Path, marker: int, offset: int, value: bytes) -> None:
    """Overwrite bytes of a marker segment, counted from its marker."""
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack(">H", marker), data.index(b"jp2c"))
    data[at + offset : at + offset + len(value)] = value
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("marker", "offset", "value", "match"),
    [
        # SIZ: the image and its one tile grow to 60,000 x 60,000.
        (0xFF51, 6, struct.pack(">8I", *[60_000, 60_000, 0, 0] * 2), "one tile of 60000 x 60000"),
        (0xFF51, 22, struct.pack(">2I", 1, 1), "tiles, and the limit"),
        (0xFF51, 38, struct.pack(">H", 16_000), "damaged"),
        (0xFF51, 41, b"\x02\x02", "different sizes"),
        # COD: 65,535 layers of precincts of one sample.
        (0xFF52, 6, struct.pack(">H", 65_535), "packets"),
        (0xFF52, 9, b"\x40", "damaged"),
    ],
)
def test_a_jp2_that_declares_too_much_is_rejected_before_it_is_read(
    tmp_path: Path, marker: int, offset: int, value: bytes, match: str
) -> None:
    path = jp2(tmp_path / "x.jp2", rng.integers(0, 999, (300, 300)).astype(np.uint16))
    header(path)
    patched(path, marker, offset, value)
    with pytest.raises((RasterTooLarge, NotAGeoTIFF), match=match):
        jp2_guard.check_jp2(path, path.name)


def test_a_truncated_jp2_is_named_in_the_error(tmp_path: Path) -> None:
    path = tmp_path / "T31UES_20180111T104421_B04_10m.jp2"
    path.write_bytes(jp2_guard.SIGNATURE + bytes(64))
    with pytest.raises(NotAGeoTIFF, match="an incomplete or damaged JPEG 2000 file"):
        header(path)


# rasterio's own log of a message that is not UTF-8, out of which nothing comes.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_jp2_files_raise_only_errors_of_the_service(tmp_path: Path) -> None:
    chance = np.random.default_rng(11)
    path = jp2(tmp_path / "20210105_B02.jp2", rng.integers(0, 999, (40, 40)).astype(np.uint16))
    whole = path.read_bytes()
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        reach = 700 if chance.random() < 0.8 else len(damaged)
        for _ in range(chance.integers(1, 7)):
            damaged[int(chance.integers(12, reach))] = int(chance.integers(256))
        if chance.random() < 0.2:
            del damaged[int(chance.integers(12, len(damaged))) :]
        path.write_bytes(damaged)
        try:
            stack = open_stack(
                [SourceFile(name=path.name, path=path)], StackOptions(), bands=("B02",),
                max_bytes=2**26,
            )  # fmt: skip
            values(stack)
        except PIMCError:
            refused += 1
    assert 20 < refused < 200


# --- what is not a raster -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("cube.nc", b"\x89HDF\r\n\x1a\n", "netCDF.*gdal_translate"),
        ("cube.nc", b"CDF\x01", "netCDF.*gdal_translate"),
        ("B04.tif", b"\n<!DOCTYPE html><html>", "an HTML page.*download"),
        ("B04.tif", b"<HTML><head>", "an HTML page"),
        ("B04.tif.aux.xml", b"<PAMDataset>", "statistics.*leave it out"),
        ("B04.tif.aux.xml", b"<?xml?><PAMDataset>", "statistics.*leave it out"),
        ("._B04.tif", b"\x00\x05\x16\x07", "macOS.*leave out"),
        ("x/._B04.tif", b"anything", "macOS.*leave out"),
        ("B04.tif", b'<VRTDataset rasterXSize="9">', "a VRT"),
        ("B04.tif", b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code>', "an error message"),
        ("B04.tif", b"\x89PNG\r\n", "a picture"),
        ("B04.tif", b'{"type": "FeatureCollection"}', "JSON"),
        ("B04.tif", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        ("stack.7z", b"7z\xbc\xaf\x27\x1c", "7-Zip.*send a zip"),
        ("stack.tar", b"B04.tif".ljust(257, b"\0") + b"ustar\x0000", "tar.*send a zip"),
        ("empty.zip", b"PK\x05\x06".ljust(22, b"\0"), "an empty zip"),
        ("B04.img", b"EHFA_HEADER_TAG\0", "ERDAS Imagine.*gdal_translate"),
        ("fields.gpkg", b"SQLite format 3\0", "`fields`"),
        ("fields.shp", b"\0\0\x27\x0a", "a shapefile.*`fields`"),
        ("points.csv", b"id,lon,lat\n", "`points`"),
        ("B04.tfw", b"10.0\n", "a side file of a raster"),
        ("manifest.safe", b'<?xml version="1.0"?>\n<xfdu:XFDU', "MTD_MSIL2A.xml"),
        ("s2.zarr/.zattrs", b"{}", "a Zarr store.*to_raster"),
        ("zarr.json", b'{"zarr_format":3}', "a Zarr store.*to_raster"),
        ("s2.zarr/B04/0.0.0", b"\x02\x01", "a Zarr store.*to_raster"),
        ("hdr.adf", b"GRID1.2\0", "an ESRI grid.*the folder"),
        ("w001001.adf", b"\0\0\x27\x0a\xff\xff", "an ESRI grid.*the folder"),
        ("area.json", b'{"type": "FeatureCollection"}', "GeoJSON.*`area`.*`fields`"),
        ("dem.asc", b"ncols 4\nnrows 3\nxllcorner 0.0\n", "an ESRI ASCII grid.*gdal_translate"),
        ("S2.dat", b"\1\2\3", "raw numbers without a header.*gdal_translate"),
        ("fields.dbf", b"\x03\x7a", "a part of a shapefile.*`fields`"),
        ("fields.fgb", b"fgb\x03fgb", "FlatGeobuf.*`fields`"),
        ("fields.kml", b'<?xml version="1.0"?>\n<kml>', "KML.*`fields`"),
        ("S2.ntf", b"NITF02.10", "NITF.*gdal_translate"),
        ("S2.hdf", b"\x0e\x03\x13\x01", "HDF4.*gdal_translate"),
        ("S2.grib", b"GRIB\0\0", "GRIB.*gdal_translate"),
        ("B04.tif", b"", "it is empty"),
        ("B04.tif", b"who knows", "reads GeoTIFF and JP2 files"),
        ("x.tif", b"SUkqAAgAAAARAAABAwABAAAA", "base64: send its bytes"),
    ],
)
def test_a_file_that_is_not_a_raster_is_named_with_what_to_do(
    tmp_path: Path, name: str, content: bytes, match: str
) -> None:
    path = tmp_path / "0000.tif"
    path.write_bytes(content)
    with gdal_options(), pytest.raises(NotAGeoTIFF, match=match):
        read_header(SourceFile(name=name, path=path))


# --- real products --------------------------------------------------------------------------


@pytest.mark.slow
def test_herault_folders(shared_data: Path) -> None:
    """Ten real SAFE folders, each file under its path, as a client that sends folders names it."""
    root = shared_data / "herault_safe_2018" / "eodata"
    paths = sorted([*root.rglob("*.jp2"), *root.rglob("MTD_MSIL2A.xml")])
    files = [SourceFile(name=str(path.relative_to(root)), path=path) for path in paths]
    stack = open_stack(files, StackOptions(), bands=(*BANDS, "B11"), max_bytes=2**30)
    assert len(stack.dates) == 10
    assert (stack.dates[0], stack.dates[-1]) == (date(2018, 1, 23), date(2018, 10, 5))
    assert (stack.mask, stack.grid.height, stack.grid.width) == ("scl", 353, 232)
    assert (stack.scale, stack.offset) == (1e-4, 0)
    window = Window(60, 120, 80, 90)
    with StackReader(stack) as reader:
        sits = reader.read(window)
    t = stack.dates.index(date(2018, 7, 7))
    red = next(p for p in paths if "20180707" in p.name and p.name.endswith("B04_10m.jp2"))
    scl = next(p for p in paths if "20180707" in p.name and p.name.endswith("SCL_20m.jp2"))
    with rasterio.open(red) as raster, rasterio.open(scl) as classes:
        there = raster.read(1, window=window)
        coarse = classes.read(1).repeat(2, 0).repeat(2, 1)[120:210, 60:140]
    present = ~np.isnan(sits.values[t, 1])
    np.testing.assert_allclose(sits.values[t, 1][present], there[present] * 1e-4, atol=1e-7)
    np.testing.assert_array_equal(sits.valid[t], present & (coarse >= 4) & (coarse <= 7))
    assert not sits.valid[stack.dates.index(date(2018, 2, 12))].any()  # all zero


def test_a_real_product_of_baseline_04(shared_data: Path, tmp_path: Path) -> None:
    xml = next((shared_data / "safe_metadata_0400").rglob("MTD_MSIL2A.xml"))
    path = jp2(tmp_path / "0.jp2", np.full((8, 8), 1500, np.uint16))
    folder = "S2A_MSIL2A_20221005T115411_N0400_R023_T29UNU_20221005T164454.SAFE"
    files = [
        SourceFile(name=f"{folder}/MTD_MSIL2A.xml", path=xml),
        SourceFile(name=f"{folder}/GRANULE/x/IMG_DATA/R10m/T29UNU_B04_10m.jp2", path=path),
    ]
    stack = open_stack(files, StackOptions(), bands=("B04",), max_bytes=2**20)
    assert stack.dates == (date(2022, 10, 5),)
    assert (stack.scale, stack.offset) == (1e-4, -0.1)
    np.testing.assert_allclose(values(stack), 0.05, atol=1e-6)


def test_earth_search_v0_with_its_item(shared_data: Path) -> None:
    folder = shared_data / "earthsearch_v0"
    paths = sorted(path for path in folder.iterdir() if path.suffix in {".tif", ".json"})
    files = [SourceFile(name=path.name, path=path) for path in paths]
    stack = open_stack(files, StackOptions(), bands=BANDS, max_bytes=2**30)
    assert stack.dates == (date(2020, 2, 19),)
    assert (stack.mask, stack.scale, stack.offset) == ("scl", 1e-4, 0)


def test_sentinelhub_pys_cache_folders(shared_data: Path) -> None:
    root = shared_data / "bavaria_2018" / "sentinelhub_10m"
    paths = sorted([*(root / "D2").rglob("*.json"), *(root / "D2").rglob("*.tiff")])
    files = [SourceFile(name=str(path.relative_to(root)), path=path) for path in paths]
    spectral = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
    names = ("clouds", "mask", *spectral, *(f"angle{n}" for n in range(4)), "index")
    stack = open_stack(files, StackOptions(bands=names), bands=BANDS, max_bytes=2**30)
    assert len(stack.dates) == 12
    assert {day.year for day in stack.dates} == {2018}
    assert date(2018, 6, 16) in stack.dates

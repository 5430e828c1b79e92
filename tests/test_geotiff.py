"""GeoTIFF access: files that must not open, and files beside them that must not be read."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from rasterio._env import get_gdal_config, set_gdal_config
from rasterio.windows import Window

from service.errors import CorruptRaster, NoGeoreference, NotAGeoTIFF, PIMCError, RasterTooLarge
from service.read.geotiff import (
    BlockCache,
    Georeference,
    SourceFile,
    for_each,
    gdal_options,
    read_header,
)
from service.read.layouts import StackOptions
from service.read.radiometry import calibrate
from service.read.reader import StackReader
from service.read.stack import open_stack
from tests.kits.rasters import NORTH_UP, write

BANDS = ("B02", "B04", "B08")
rng = np.random.default_rng(5)


def pixels(height: int = 40, width: int = 30) -> np.ndarray:
    return rng.integers(200, 4000, (3, height, width), dtype=np.uint16)


def scene(path: Path, **how: object) -> SourceFile:
    how = {"descriptions": BANDS, "tags": {"datetime": "2021-01-05"}, **how}
    return write(path, how.pop("bands", pixels()), **how)


def opened(*files: SourceFile, max_bytes: int = 2**24, **options: object):
    return open_stack(files, StackOptions(**options), bands=BANDS, max_bytes=max_bytes)


def test_a_vrt_that_names_another_file_is_never_opened(tmp_path: Path) -> None:
    inside = scene(tmp_path / "secret.tif")
    vrt = tmp_path / "stack.tif"
    vrt.write_text(
        '<VRTDataset rasterXSize="30" rasterYSize="40"><VRTRasterBand dataType="UInt16" band="1">'
        f"<SimpleSource><SourceFilename>{inside.path}</SourceFilename></SimpleSource>"
        "</VRTRasterBand></VRTDataset>"
    )
    with pytest.raises(NotAGeoTIFF, match=r"'upload\.tif' is not a TIFF"):
        opened(SourceFile(name="upload.tif", path=vrt))


@pytest.mark.parametrize(
    "content", [b"", b"II", b"\x89PNG\r\n\x1a\n", b"not a raster", b"MM\0\x2c"]
)
def test_other_files_are_rejected_by_their_first_bytes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tif").write_bytes(content)
    with pytest.raises(NotAGeoTIFF, match=r"'x\.tif'"):
        opened(SourceFile(name="x.tif", path=tmp_path / "x.tif"))


def test_all_files_that_are_no_rasters_are_named(tmp_path: Path) -> None:
    files = [scene(tmp_path / f"2021010{n}.tif") for n in (1, 2)]
    for n in range(8):
        (tmp_path / f"page-{n}.tif").write_bytes(b"<!DOCTYPE html>")
        files.insert(n, SourceFile(name=f"page-{n}.tif", path=tmp_path / f"page-{n}.tif"))
    with pytest.raises(NotAGeoTIFF) as caught:
        opened(*files)
    assert caught.value.detail.startswith("'page-0.tif' is not a TIFF: it is an HTML page")
    others = ", ".join(f"'page-{n}.tif'" for n in range(1, 6))
    said = f"; 7 other files are not a TIFF or JP2 either: {others} and 2 more"
    assert caught.value.detail.endswith(said)
    with pytest.raises(NotAGeoTIFF, match=r"again$"):
        opened(files[0], *files[8:])


def test_a_folder_or_missing_file_is_not_a_geotiff(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing.tif", Path("/vsimem/x.tif")):
        with pytest.raises(NotAGeoTIFF, match="cannot be opened") as caught:
            opened(SourceFile(name="x.tif", path=path))
        assert str(tmp_path) not in caught.value.detail


def test_a_tiff_without_a_directory_is_not_a_geotiff(tmp_path: Path) -> None:
    (tmp_path / "x.tif").write_bytes(b"II*\0" + struct.pack("<I", 8) + b"\0" * 20)
    with pytest.raises(NotAGeoTIFF, match="cannot read its header") as caught:
        opened(SourceFile(name="x.tif", path=tmp_path / "x.tif"))
    assert caught.value.__cause__ is not None


def test_complex_numbers_are_rejected(tmp_path: Path) -> None:
    file = scene(tmp_path / "x.tif", bands=np.ones((3, 4, 4), np.complex64))
    with pytest.raises(NotAGeoTIFF, match="complex64"):
        opened(file)


def test_a_tiff_of_several_images_is_rejected(tmp_path: Path) -> None:
    bands = np.full((1, 64, 64), 500, "uint16")
    pages = write(tmp_path / "a.tif", bands, tiled=True, blockxsize=16, blockysize=16)
    with gdal_options():
        read_header(with_overviews(tmp_path / "b.tif", bands))
        read_header(pages)
    with rasterio.open(write(tmp_path / "c.tif", bands + 1).path) as second:
        rasterio.shutil.copy(second, pages.path, driver="GTiff", APPEND_SUBDATASET="YES")
    said = "'a.tif' holds 2 images .* GTIFF_DIR:2:in.tif"
    with gdal_options(), pytest.raises(NotAGeoTIFF, match=said):
        read_header(pages)


def with_overviews(path: Path, bands: np.ndarray) -> SourceFile:
    """A file with overviews and an internal mask, which are directories of their own."""
    file = write(path, bands, mask=bands[0] > 0, tiled=True, blockxsize=16, blockysize=16)
    with rasterio.open(path, "r+") as dataset:
        dataset.build_overviews([2, 4])
    return file


def test_no_sidecar_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "x.tif", pixels(), crs=None, transform=Affine.identity())
    (tmp_path / "x.tfw").write_text("10\n0\n0\n-10\n500000\n5600000\n")
    (tmp_path / "x.tif.aux.xml").write_text(
        "<PAMDataset><SRS>EPSG:32631</SRS><Metadata><MDI key='datetime'>2021-01-05</MDI></Metadata>"
        "<PAMRasterBand band='1'><Description>B02</Description></PAMRasterBand></PAMDataset>"
    )
    scene(tmp_path / "x.tif.msk")
    with gdal_options():
        header = read_header(file)
    assert not header.crs
    assert header.transform == Affine.identity()
    assert header.descriptions == (None, None, None)
    assert "datetime" not in header.tags
    assert not header.masked


def test_equal_georeferences_are_parsed_once(
    tmp_path: Path,
) -> None:
    places = [
        {},
        {},
        {"transform": NORTH_UP @ Affine.translation(1, 0)},
        {"crs": "EPSG:32632"},
        {"crs": "EPSG:4326", "transform": Affine(1e-4, 0, 4, 0, -1e-4, 51)},
        {"transform": NORTH_UP @ Affine.rotation(20)},
        {"crs": None, "transform": Affine.identity()},
        {"crs": None, "transform": Affine.identity()},
    ]
    known: dict[bytes, Georeference] = {}
    with gdal_options():
        for number, place in enumerate(places):
            file = write(tmp_path / f"{number}.tif", pixels(), **place)
            alone, together = read_header(file), read_header(file, known)
            assert (together.crs, together.transform) == (alone.crs, alone.transform)
            assert (together.descriptions, together.block) == (alone.descriptions, alone.block)
            with rasterio.open(file.path) as plain:
                assert (together.crs, together.transform) == (plain.crs, plain.transform)
    # Of eight files the first two hold the same, and so do the last two.
    assert len(known) == 6


def test_the_block_cache_is_bounded_and_as_large_as_any_reader_needs() -> None:
    set_gdal_config("GDAL_CACHEMAX", 2**40)  # as much as GDAL may take by itself
    cache = BlockCache()
    assert get_gdal_config("GDAL_CACHEMAX") == 32 * 2**20
    with cache.room(512 * 2**20):
        assert get_gdal_config("GDAL_CACHEMAX") == 512 * 2**20
        with cache.room(2**10):
            assert get_gdal_config("GDAL_CACHEMAX") == 512 * 2**20
    with rasterio.Env():
        assert get_gdal_config("GDAL_CACHEMAX") == 32 * 2**20


@pytest.mark.parametrize("block_bytes", [0, 2**20])
@pytest.mark.parametrize("count", [0, 1, 8, 9, 100])
def test_results_of_files_are_in_order_and_made_inside_gdals_options(
    count: int, block_bytes: int
) -> None:
    def work(number: int) -> tuple[int, str]:
        return number, get_gdal_config("GDAL_DISABLE_READDIR_ON_OPEN")

    found = for_each(range(count), work, block_bytes=block_bytes)
    assert found == [(number, "EMPTY_DIR") for number in range(count)]


def test_no_georeference(tmp_path: Path) -> None:
    with pytest.raises(NoGeoreference, match=r"'a\.tif' has no CRS"):
        opened(scene(tmp_path / "a.tif", crs=None))
    with pytest.raises(NoGeoreference, match=r"'b\.tif' has the CRS EPSG:32631 but no transform"):
        opened(scene(tmp_path / "b.tif", transform=Affine.identity()))
    # Metres in a CRS of degrees, and latitude before longitude.
    for name, corner in (("c.tif", (500_000, 5_600_000)), ("d.tif", (51, 121))):
        place = Affine(1e-4, 0, corner[0], 0, -1e-4, corner[1])
        with pytest.raises(
            NoGeoreference, match=f"middle of '{name}' is at .* not a position in EPSG"
        ):
            opened(scene(tmp_path / name, crs="EPSG:4326", transform=place))


def test_the_size_limit_is_checked_from_headers(tmp_path: Path) -> None:
    file = scene(tmp_path / "x.tif")
    decoded = 40 * 30 * 3 * 2
    opened(file, max_bytes=decoded)
    with pytest.raises(RasterTooLarge) as caught:
        opened(file, max_bytes=decoded - 1)
    assert f"{decoded} bytes" in caught.value.detail
    assert f"limit is {decoded - 1}" in caught.value.detail


def test_bands_that_are_not_needed_do_not_count(tmp_path: Path) -> None:
    five = np.concatenate([pixels(), pixels()])
    names = [*BANDS, "B11", "B12", None]
    opened(scene(tmp_path / "x.tif", bands=five, descriptions=names), max_bytes=40 * 30 * 3 * 2)


def test_a_small_file_that_declares_a_huge_raster_is_rejected_before_it_is_read(
    tmp_path: Path,
) -> None:
    file = scene(tmp_path / "x.tif")
    huge = {256: 200_000, 257: 200_000}  # ImageWidth, ImageLength
    file.path.write_bytes(_with_tags(file.path.read_bytes(), huge))
    with pytest.raises(RasterTooLarge, match="200000 x 200000"):
        opened(file)


def test_a_small_file_that_declares_a_huge_strip_is_rejected_before_it_is_read(
    tmp_path: Path,
) -> None:
    # Compressed: of a strip that is not, GDAL makes small blocks by itself.
    file = scene(tmp_path / "x.tif", compress="deflate")
    claims = {256: 20_000, 257: 20_000, 278: 20_000}  # and RowsPerStrip
    file.path.write_bytes(_with_tags(file.path.read_bytes(), claims))
    with pytest.raises(RasterTooLarge, match="one block of 20000 x 20000"):
        opened(file, max_bytes=2**40)


def _with_tags(tiff: bytes, values: dict[int, int]) -> bytes:
    """A little-endian TIFF with numbers of its first directory written over, as LONG."""
    out = bytearray(tiff)
    (start,) = struct.unpack_from("<I", out, 4)
    (entries,) = struct.unpack_from("<H", out, start)
    for entry in range(start + 2, start + 2 + 12 * entries, 12):
        (tag,) = struct.unpack_from("<H", out, entry)
        if tag in values:
            struct.pack_into("<HII", out, entry + 2, 4, 1, values[tag])
    return bytes(out)


@pytest.mark.parametrize("compress", ["none", "deflate", "lzw"])
def test_pixels_that_do_not_decode_are_an_error_that_names_the_file(
    tmp_path: Path, compress: str
) -> None:
    good = scene(tmp_path / "a.tif")
    scene(tmp_path / "late.tif", bands=pixels(), tags={"datetime": "2021-02-05"})
    # A copy has its header first, so that the pixels alone are cut off.
    stored = tmp_path / "stored-name.tif"
    rasterio.shutil.copy(tmp_path / "late.tif", stored, driver="GTiff", compress=compress)
    stored.write_bytes(stored.read_bytes()[:-2000])
    stack = opened(good, SourceFile(name="b.tif", path=stored))
    with (
        StackReader(stack) as reader,
        pytest.raises(
            CorruptRaster, match=r"'b\.tif': .* rows 0 to 39 and columns 0 to 29"
        ) as caught,
    ):
        reader.read(Window(0, 0, 30, 40))
    assert caught.value.__cause__ is not None
    assert "stored-name" not in caught.value.detail


def test_of_many_files_the_first_that_fails_is_named(tmp_path: Path) -> None:
    files = [
        scene(tmp_path / f"{t}.tif", tags={"datetime": f"2021-01-{t + 1:02d}"}) for t in range(28)
    ]
    stack = opened(*files)
    for broken in (26, 11, 13):
        files[broken].path.write_bytes(b"no longer a raster")
    with StackReader(stack) as reader, pytest.raises(CorruptRaster, match=r"'11\.tif'"):
        reader.read(Window(0, 0, 30, 40))
    with pytest.raises(NotAGeoTIFF, match=r"'11\.tif'"):
        opened(*files)


def test_a_file_that_was_removed_is_an_error(tmp_path: Path) -> None:
    file = scene(tmp_path / "a.tif")
    stack = opened(file)
    file.path.unlink()
    with StackReader(stack) as reader, pytest.raises(CorruptRaster):
        reader.read(Window(0, 0, 30, 40))


def test_tags_that_are_not_utf_8_are_ignored(tmp_path: Path) -> None:
    file = scene(tmp_path / "x_20210105.tif", tags={"place": "Lièges"})
    content = file.path.read_bytes()
    file.path.write_bytes(content.replace("è".encode(), b"\xe8\xe8"))
    assert opened(file).dates


# rasterio's own log callback cannot decode some of what GDAL says of such files; it goes on.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_files_raise_only_errors_of_the_service(tmp_path: Path) -> None:
    """Bytes changed at random, mostly in the header: a normal result or one of our errors."""
    file = scene(tmp_path / "x.tif", compress="deflate", nodata=0)
    content = file.path.read_bytes()
    chance = np.random.default_rng(7)
    details = []
    for _ in range(250):
        damaged = bytearray(content)
        reach = 1200 if chance.random() < 0.8 else len(damaged)
        for _ in range(chance.integers(1, 7)):
            # The header stands at the end of the file.
            damaged[-int(chance.integers(1, reach))] = int(chance.integers(256))
        if chance.random() < 0.2:
            del damaged[int(chance.integers(len(damaged))) :]
        file.path.write_bytes(damaged)
        try:
            stack = opened(file)
            calibrate(stack)
            with StackReader(stack) as reader:
                reader.read(Window(0, 0, stack.grid.width, stack.grid.height))
        except PIMCError as error:
            details.append(error.detail)
    assert 30 < len(details) < 250
    assert all(re.search(r"x\.tif|median|decode to", detail) for detail in details)

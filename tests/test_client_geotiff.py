"""The GeoTIFF reader against rasterio: files as the server writes them, and errors for others."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from rasterio.io import MemoryFile
from rasterio.transform import Affine

from pimc_client.errors import GeoTIFFError
from pimc_client.geotiff import read_array, read_header

TRANSFORM = Affine(10.0, 0.0, 600_000.0, 0.0, -10.0, 5_600_000.0)
DTYPES = ["uint8", "int8", "float32"]


def pixels(dtype, bands, rows, columns):
    random = np.random.default_rng(rows * columns + bands)
    if np.dtype(dtype).kind == "f":
        values = random.normal(size=(bands, rows, columns)).astype(dtype)
        values[random.random(values.shape) < 0.1] = np.nan
        return values
    limits = np.iinfo(dtype)
    return random.integers(
        limits.min, limits.max, (bands, rows, columns), dtype=dtype, endpoint=True
    )


def write(path, values, *, crs="EPSG:32631", transform=TRANSFORM, driver="COG", **options):
    with rasterio.open(
        path,
        "w",
        driver=driver,
        count=values.shape[0],
        height=values.shape[1],
        width=values.shape[2],
        dtype=values.dtype,
        crs=crs,
        transform=transform,
        **{"compress": "deflate", **options},
    ) as file:
        file.write(values)
    return path


def described(path, values, describe, **options):
    """A COG with metadata, which the COG driver copies only from another data set."""
    shape = {"count": values.shape[0], "height": values.shape[1], "width": values.shape[2]}
    with MemoryFile() as memory:
        with memory.open(driver="GTiff", dtype=values.dtype, **shape, **options) as file:
            file.write(values)
            describe(file)
        with memory.open() as file:
            rasterio.shutil.copy(file, path, driver="COG", compress="deflate")
    return path


def read(path: Path):
    with path.open("rb") as file:
        header = read_header(file)
        return header, read_array(file, header)


def same_as_rasterio(path):
    header, found = read(path)
    with rasterio.open(path) as file:
        expected = file.read()
        assert header.count == file.count
        assert header.dtype == file.dtypes[0]
        assert header.transform == pytest.approx(tuple(file.transform)[:6], abs=1e-9)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    return header


@pytest.mark.parametrize("size", [(1, 1), (257, 300)])
@pytest.mark.parametrize("predictor", ["no", "yes"])
@pytest.mark.parametrize("bands", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cog_is_read_as_by_rasterio(tmp_path, dtype, bands, predictor, size):
    values = pixels(dtype, bands, *size)
    path = write(tmp_path / "a.tif", values, predictor=predictor, blocksize=128)
    header = same_as_rasterio(path)
    expected = 1 if predictor == "no" else 3 if dtype == "float32" else 2
    assert header.ifd.get(317, (1,))[0] == expected


def test_a_bigtiff_is_read_as_by_rasterio(tmp_path):
    path = write(tmp_path / "a.tif", pixels("float32", 4, 65, 70), predictor="yes", bigtiff="yes")
    assert path.read_bytes()[2:4] == b"+\0"
    same_as_rasterio(path)


def test_the_header_is_read_as_by_rasterio(tmp_path):
    def describe(file):
        file.write_colormap(1, {0: (16, 32, 255), 1: (1, 2, 3), 7: (255, 0, 128)})
        file.set_band_description(1, "class")
        file.update_tags(model="a@1.0.0", legend='{"0": "<é & co>"}')
        file.update_tags(1, unit="none")
        file.update_tags(ns="private", hidden="yes")

    values = pixels("uint8", 1, 5, 6)
    path = described(
        tmp_path / "a.tif", values, describe, nodata=255, crs="EPSG:32631", transform=TRANSFORM
    )
    header, found = read(path)
    np.testing.assert_array_equal(found, values)
    assert header.nodata == 255
    assert header.epsg == 32631
    assert header.descriptions == ("class",)
    assert header.tags["model"] == "a@1.0.0"
    assert header.tags["legend"] == '{"0": "<é & co>"}'
    assert header.band_tags[0]["unit"] == "none"
    assert "hidden" not in header.tags
    with rasterio.open(path) as file:
        for value, color in file.colormap(1).items():
            assert header.colors[value] == "#{:02x}{:02x}{:02x}".format(*color[:3])


def test_nan_nodata_and_band_descriptions_are_read(tmp_path):
    def describe(file):
        file.set_band_description(1, "NDVI_2021-11-05_q50")
        file.set_band_description(3, "EVI_2021-11-05_q50")

    path = described(
        tmp_path / "a.tif", np.zeros((3, 2, 2), "float32"), describe, nodata=np.nan,
        crs="EPSG:4326", transform=Affine(0.1, 0.0, 4.0, 0.0, -0.1, 51.0),
    )  # fmt: skip
    header = same_as_rasterio(path)
    assert header.nodata is not None
    assert np.isnan(header.nodata)
    assert header.epsg == 4326
    assert header.descriptions == ("NDVI_2021-11-05_q50", None, "EVI_2021-11-05_q50")


def test_the_transform_of_a_rotated_grid_is_read(tmp_path):
    rotated = Affine(8.0, 3.0, 1e5, 2.0, -9.0, 2e5)
    same_as_rasterio(write(tmp_path / "a.tif", pixels("uint8", 1, 3, 4), transform=rotated))


def test_a_crs_without_a_code_has_none(tmp_path):
    crs = "+proj=sinu +lon_0=0 +x_0=0 +y_0=0 +R=6371007.181 +units=m +no_defs"
    path = write(tmp_path / "a.tif", pixels("uint8", 1, 3, 3), crs=crs)
    assert same_as_rasterio(path).epsg is None


TILED = {"driver": "GTiff", "tiled": True, "blockxsize": 16, "blockysize": 16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compress": "zstd", **TILED}, "tiles of uint8, compression 50000"),
        ({"compress": "none", **TILED}, "compression 1,"),
        ({"driver": "GTiff", "blockysize": 4}, "strips of uint8, compression 8"),
        ({"interleave": "band", **TILED}, "planar configuration 2"),
        ({"nbits": 1, **TILED}, "tiles of uint1"),
    ],
)
def test_an_unsupported_form_is_an_error_that_names_it(tmp_path, options, message):
    path = write(tmp_path / "a.tif", np.ones((2, 9, 9), "uint8"), **options)
    with path.open("rb") as file:
        header = read_header(file)
        # The header is read, so that the file can be saved and opened with another program.
        assert (header.count, header.height, header.width) == (2, 9, 9)
        with pytest.raises(GeoTIFFError, match=rf"{message}.*open it with rasterio"):
            read_array(file, header)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float64"])
def test_an_unsupported_number_type_is_an_error_that_names_it(tmp_path, dtype):
    path = write(tmp_path / "a.tif", np.ones((1, 9, 9), dtype))
    with pytest.raises(GeoTIFFError, match=rf"has tiles of {dtype}.*rasterio"):
        read(path)


def test_big_endian_is_an_error(tmp_path):
    path = write(tmp_path / "a.tif", pixels("uint8", 1, 9, 9), endianness="big", **TILED)
    with pytest.raises(GeoTIFFError, match="not a little-endian TIFF"):
        read(path)


def test_a_file_that_is_not_a_tiff_is_an_error(tmp_path):
    path = tmp_path / "a.tif"
    for content in (b"<html>no</html>", b""):
        path.write_bytes(content)
        with pytest.raises(GeoTIFFError, match="not a little-endian TIFF"):
            read(path)


def test_every_truncation_is_a_geotiff_error(tmp_path):
    content = write(tmp_path / "a.tif", pixels("float32", 2, 20, 20), blocksize=128).read_bytes()
    path = tmp_path / "cut.tif"
    for length in np.linspace(2, len(content) - 64, 40, dtype=int):
        path.write_bytes(content[:length])
        with pytest.raises(GeoTIFFError):
            read(path)


def test_damage_is_a_geotiff_error_or_changes_pixels(tmp_path):
    content = bytearray(write(tmp_path / "a.tif", pixels("uint8", 1, 30, 30)).read_bytes())
    path = tmp_path / "broken.tif"
    random = np.random.default_rng(5)
    errors = 0
    for _ in range(200):
        broken = bytearray(content)
        for place in random.integers(8, len(broken), 6):
            broken[place] ^= 0xFF
        path.write_bytes(broken)
        try:
            read(path)
        except GeoTIFFError:
            errors += 1
    assert errors > 0


def test_a_list_of_tiles_that_does_not_fit_the_image_is_an_error(tmp_path):
    path = write(tmp_path / "a.tif", pixels("uint8", 1, 30, 30), **TILED)
    data = bytearray(path.read_bytes())
    (start,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, start)
    for entry in range(start + 2, start + 2 + entries * 12, 12):
        if struct.unpack_from("<H", data, entry) == (257,):
            struct.pack_into("<H", data, entry + 8, 300)
    path.write_bytes(data)
    with pytest.raises(GeoTIFFError, match=r"38 tiles.*4 offsets"):
        read(path)

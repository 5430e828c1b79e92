"""The TIFF reader against rasterio: files that rasterio writes, whatever their options."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.transform import Affine

from pimc_client.errors import GeoTIFFError
from pimc_client.geotiff import read_array, read_header

TRANSFORM = Affine(10.0, 0.0, 600_000.0, 0.0, -10.0, 5_600_000.0)
DTYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"]


def pixels(dtype, bands, rows, columns, *, smooth=False):
    random = np.random.default_rng(rows * columns + bands)
    if np.dtype(dtype).kind == "f":
        values = random.normal(size=(bands, rows, columns)).astype(dtype)
        values[random.random(values.shape) < 0.1] = np.nan
        return values
    limits = np.iinfo(dtype)
    if smooth:  # Long repeats, which fill LZW's table and make it start anew.
        return (np.arange(bands * rows * columns).reshape(bands, rows, columns) // 7).astype(dtype)
    return random.integers(
        limits.min, limits.max, (bands, rows, columns), dtype=dtype, endpoint=True
    )


def write(path, values, *, crs="EPSG:32631", transform=TRANSFORM, **options):
    with rasterio.open(
        path,
        "w",
        count=values.shape[0],
        height=values.shape[1],
        width=values.shape[2],
        dtype=values.dtype,
        crs=crs,
        transform=transform,
        **options,
    ) as file:
        file.write(values)
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
@pytest.mark.parametrize("dtype", DTYPES)
def test_cog_as_rasterio_reads_it(tmp_path, dtype, size):
    path = write(
        tmp_path / "a.tif",
        pixels(dtype, 3, *size),
        driver="COG",
        compress="deflate",
        predictor="yes",
        blocksize=128,
    )
    same_as_rasterio(path)


@pytest.mark.parametrize("compress", ["none", "deflate", "lzw"])
@pytest.mark.parametrize("interleave", ["pixel", "band"])
@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize(("dtype", "predictor"), [
    *itertools.product(["uint8", "uint16", "int16", "float32"], [1, 2]),
    ("float32", 3),
    ("float64", 3),
])  # fmt: skip
def test_every_layout_and_predictor(tmp_path, compress, interleave, tiled, dtype, predictor):
    blocks = {"tiled": True, "blockxsize": 32, "blockysize": 48} if tiled else {"blockysize": 7}
    if compress != "none":
        blocks["predictor"] = predictor
    path = write(
        tmp_path / "a.tif",
        pixels(dtype, 3, 61, 83),
        driver="GTiff",
        compress=compress,
        interleave=interleave,
        **blocks,
    )
    same_as_rasterio(path)


@pytest.mark.parametrize("rows", [1, 40, 333])
def test_lzw_widens_its_codes_and_starts_anew(tmp_path, rows):
    for smooth in (True, False):
        values = pixels("uint16", 1, rows, 301, smooth=smooth)
        same_as_rasterio(
            write(tmp_path / "a.tif", values, driver="GTiff", compress="lzw", blockysize=rows)
        )


def test_bigtiff(tmp_path):
    path = write(
        tmp_path / "a.tif",
        pixels("float32", 4, 65, 70),
        driver="COG",
        compress="deflate",
        predictor="yes",
        bigtiff="yes",
    )
    assert path.read_bytes()[2:4] == b"+\0"
    same_as_rasterio(path)


def test_sparse_blocks_are_nodata(tmp_path):
    path = tmp_path / "a.tif"
    options = {"driver": "GTiff", "tiled": True, "blockxsize": 16, "blockysize": 16}
    with rasterio.open(
        path, "w", count=1, height=40, width=40, dtype="float32", nodata=-9.0,
        crs="EPSG:32631", transform=TRANSFORM, sparse_ok=True, compress="deflate", **options,
    ) as file:  # fmt: skip
        file.write(np.ones((1, 16, 16), "float32"), window=((16, 32), (16, 32)))
    header = same_as_rasterio(path)
    assert 0 in header.ifd[325]


def test_what_the_header_says(tmp_path):
    path = tmp_path / "a.tif"
    values = pixels("uint8", 1, 5, 6)
    with rasterio.open(
        path, "w", driver="GTiff", count=1, height=5, width=6, dtype="uint8", nodata=255,
        crs="EPSG:32631", transform=TRANSFORM,
    ) as file:  # fmt: skip
        file.write(values)
        file.write_colormap(1, {0: (16, 32, 255), 1: (1, 2, 3), 7: (255, 0, 128)})
        file.set_band_description(1, "class")
        file.update_tags(model="a@1.0.0", legend='{"0": "<é & co>"}')
        file.update_tags(1, unit="none")
        file.update_tags(ns="private", hidden="yes")
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


def test_nan_nodata_and_band_descriptions(tmp_path):
    path = tmp_path / "a.tif"
    with rasterio.open(
        path, "w", driver="GTiff", count=3, height=2, width=2, dtype="float32", nodata=np.nan,
        crs="EPSG:4326", transform=Affine(0.1, 0.0, 4.0, 0.0, -0.1, 51.0),
    ) as file:  # fmt: skip
        file.write(np.zeros((3, 2, 2), "float32"))
        file.set_band_description(1, "NDVI_2021-11-05_q50")
        file.set_band_description(3, "EVI_2021-11-05_q50")
    header = same_as_rasterio(path)
    assert header.nodata is not None
    assert np.isnan(header.nodata)
    assert header.epsg == 4326
    assert header.descriptions == ("NDVI_2021-11-05_q50", None, "EVI_2021-11-05_q50")


@pytest.mark.parametrize("point", ["Area", "Point"])
@pytest.mark.parametrize("transform", [TRANSFORM, Affine(8.0, 3.0, 1e5, 2.0, -9.0, 2e5)])
def test_transform_of_areas_points_and_rotated_grids(tmp_path, transform, point):
    path = tmp_path / "a.tif"
    with rasterio.open(
        path, "w", driver="GTiff", count=1, height=3, width=4, dtype="uint8",
        crs="EPSG:32631", transform=transform,
    ) as file:  # fmt: skip
        file.update_tags(AREA_OR_POINT=point)
        file.write(np.zeros((1, 3, 4), "uint8"))
    same_as_rasterio(path)


def test_a_crs_without_a_code_has_none(tmp_path):
    crs = "+proj=sinu +lon_0=0 +x_0=0 +y_0=0 +R=6371007.181 +units=m +no_defs"
    path = write(tmp_path / "a.tif", pixels("uint8", 1, 3, 3), driver="GTiff", crs=crs)
    assert same_as_rasterio(path).epsg is None


def test_unknown_compression_names_it_and_the_way_out(tmp_path):
    path = write(tmp_path / "a.tif", pixels("uint8", 1, 9, 9), driver="GTiff", compress="zstd")
    with pytest.raises(GeoTIFFError, match=r"ZSTD.*rasterio"):
        read(path)


def test_sub_byte_pixels_are_refused(tmp_path):
    path = write(tmp_path / "a.tif", np.ones((1, 9, 9), "uint8"), driver="GTiff", nbits=1)
    with pytest.raises(GeoTIFFError, match=r"\[1\] bits"):
        read(path)


def test_big_endian_is_refused(tmp_path):
    path = write(tmp_path / "a.tif", pixels("uint8", 1, 9, 9), driver="GTiff", endianness="big")
    with pytest.raises(GeoTIFFError, match="big-endian"):
        read(path)


def test_not_a_tiff(tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(b"<html>no</html>")
    with pytest.raises(GeoTIFFError, match="not a TIFF"):
        read(path)
    path.write_bytes(b"")
    with pytest.raises(GeoTIFFError, match="not a TIFF"):
        read(path)


@pytest.mark.parametrize("compress", ["none", "deflate", "lzw"])
def test_every_truncation_is_an_error_of_ours(tmp_path, compress):
    whole = write(
        tmp_path / "a.tif",
        pixels("uint16", 2, 20, 20),
        driver="COG",
        compress=compress,
        blocksize=128,
    ).read_bytes()
    path = tmp_path / "cut.tif"
    for length in np.linspace(2, len(whole) - 64, 40, dtype=int):
        path.write_bytes(whole[:length])
        with pytest.raises(GeoTIFFError):
            read(path)


def test_damage_is_an_error_of_ours_or_another_picture(tmp_path):
    whole = bytearray(
        write(
            tmp_path / "a.tif", pixels("uint8", 1, 30, 30), driver="GTiff", compress="lzw"
        ).read_bytes()
    )
    path = tmp_path / "broken.tif"
    random = np.random.default_rng(5)
    refused = 0
    for _ in range(60):
        broken = bytearray(whole)
        for place in random.integers(8, len(broken), 6):
            broken[place] ^= 0xFF
        path.write_bytes(broken)
        try:
            read(path)
        except GeoTIFFError:
            refused += 1
    assert refused > 0


def test_a_block_list_that_does_not_fit_the_image(tmp_path):
    path = write(tmp_path / "a.tif", pixels("uint8", 1, 30, 30), driver="GTiff", blockysize=5)
    data = bytearray(path.read_bytes())
    (start,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, start)
    for entry in range(start + 2, start + 2 + entries * 12, 12):
        if struct.unpack_from("<H", data, entry) == (257,):
            struct.pack_into("<H", data, entry + 8, 300)
    path.write_bytes(data)
    with pytest.raises(GeoTIFFError, match=r"60 blocks.*6 offsets"):
        read(path)

"""The training reader of stacks against rasterio."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from training.datasets import Scene
from training.datasets.stacks import StackError, read_romania, read_stack, split_north

pytestmark = pytest.mark.slow


def write(path: Path, bands: dict[str, np.ndarray], **tags: str) -> None:
    first = next(iter(bands.values()))
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        height=first.shape[0],
        width=first.shape[1],
        count=len(bands),
        dtype=first.dtype,
        crs="EPSG:32631",
        transform=from_origin(500000, 5600000, 10, 10),
        nodata=0,
    ) as file:
        for i, (name, values) in enumerate(bands.items(), start=1):
            file.write(values, i)
            file.set_band_description(i, name)
        file.update_tags(**tags)


def layer(value: int, shape: tuple[int, int] = (4, 5)) -> np.ndarray:
    return np.full(shape, value, dtype=np.uint16)


def test_dates_come_from_tags_or_names_and_ascend(tmp_path):
    write(tmp_path / "b_20200301.tif", {"B4": layer(300)})
    write(tmp_path / "a.tif", {"B4": layer(100)}, datetime="2020-01-15T10:00:00")
    write(tmp_path / "c_2020-02-01.tif", {"B4": layer(200)})
    write(tmp_path / "labels.tif", {"code": layer(7)})
    scene = read_stack(tmp_path)
    assert scene.dates == (date(2020, 1, 15), date(2020, 2, 1), date(2020, 3, 1))
    assert scene.bands == ("B04",)
    values, valid = scene.read(("B04",))
    assert values[:, 0, 0, 0] == pytest.approx([0.01, 0.02, 0.03])
    assert valid.all()


def test_scl_determines_validity_and_zero_is_missing(tmp_path):
    scl = np.array([[4, 5, 6, 7, 8], [0, 1, 2, 3, 11], [4] * 5, [4] * 5], dtype=np.uint16)
    red = layer(500)
    red[2, 2] = 0
    write(tmp_path / "x_20200101.tif", {"B04": red, "SCL": scl})
    values, valid = read_stack(tmp_path).read(("B04",))
    expected = np.isin(scl, (4, 5, 6, 7)) & (red != 0)
    np.testing.assert_array_equal(valid[0], expected)
    np.testing.assert_array_equal(np.isnan(values[0, 0]), ~expected)


def test_files_of_one_date_are_merged_by_pixel(tmp_path):
    west, east = layer(100), layer(200)
    west[:, 3:] = 0
    east[:, :2] = 0
    write(tmp_path / "x_20200101_1.tif", {"B04": west})
    write(tmp_path / "x_20200101_2.tif", {"B04": east})
    scene = read_stack(tmp_path)
    assert scene.dates == (date(2020, 1, 1),)
    values, valid = scene.read(("B04",))
    assert valid.all()
    # Where both are clear the first one counts.
    assert values[0, 0, 0] == pytest.approx([0.01, 0.01, 0.01, 0.02, 0.02])


def test_offset_and_scale_are_applied_to_valid_values(tmp_path):
    write(tmp_path / "x_20230101.tif", {"B04": layer(2500)}, scale="0.0001")
    values, _ = read_stack(tmp_path, offset=-0.1).read(("B04",))
    assert values == pytest.approx(0.15)


def test_a_folder_that_is_not_a_stack_is_named_in_the_error(tmp_path):
    write(tmp_path / "x.tif", {"B04": layer(1)})
    with pytest.raises(StackError, match="no GeoTIFF with a date"):
        read_stack(tmp_path)
    write(tmp_path / "x_20200101.tif", {"B04": layer(1)})
    write(tmp_path / "x_20200102.tif", {"B08": layer(1)})
    with pytest.raises(StackError, match=r"B08.*B04"):
        read_stack(tmp_path)
    with pytest.raises(StackError, match="not the Romania cube"):
        read_romania(tmp_path / "x_20200101.tif")


def test_a_held_out_part_shares_nothing_with_the_rest():
    values = np.arange(2 * 1 * 8 * 3, dtype=np.uint16).reshape(2, 1, 8, 3)
    scene = Scene(
        source="x", bands=("B04",), dates=(date(2020, 1, 1),) * 2, values=values, scale=1.0
    )
    train, held_out = split_north(scene, 0.25)
    assert (train.validation, held_out.validation) == (False, True)
    assert held_out.shape == (2, 3)
    np.testing.assert_array_equal(np.concatenate([held_out.values, train.values], axis=2), values)
    assert split_north(scene, 0.0) == (scene,)


def test_pixels_are_the_scene_row_by_row():
    values = np.arange(1, 1 + 2 * 3 * 4 * 5, dtype=np.uint16).reshape(2, 3, 4, 5)
    fields = np.arange(20).reshape(4, 5)
    scene = Scene(
        source="x",
        bands=("B02", "B04", "B08"),
        dates=(date(2020, 1, 1), date(2020, 2, 1)),
        values=values,
        scale=0.1,
        fields=fields,
        labels=fields * 10,
    )
    pixels = scene.pixels(("B08", "B02"))
    row, col = 2, 3
    np.testing.assert_allclose(
        pixels.values[row * 5 + col], values[:, [2, 0], row, col] * 0.1, rtol=1e-6
    )
    assert pixels.places[row * 5 + col] == fields[row, col]
    assert pixels.labels is not None
    assert pixels.labels[row * 5 + col] == fields[row, col] * 10


def test_flanders_is_read_as_by_rasterio(shared_data):
    folder = shared_data / "flanders_2017_2018"
    scene = read_stack(folder, labels=folder / "LABEL_LC.tif")
    assert len(scene.dates) == 118
    assert scene.bands == ("B02", "B03", "B04", "B08")
    values, valid = scene.read(("B04", "B02"))
    for path in (sorted(folder.glob("S2*.tif"))[i] for i in (0, 40, 117)):
        with rasterio.open(path) as file:
            day = date.fromisoformat(file.tags()["datetime"][:10])
            red, blue, scl = file.read([3, 1, 5])
        t = scene.dates.index(day)
        clear = np.isin(scl, (4, 5, 6, 7))
        np.testing.assert_array_equal(valid[t], clear)
        np.testing.assert_allclose(values[t, 0][clear], red[clear] / 10000.0, rtol=1e-5)
        np.testing.assert_allclose(values[t, 1][clear], blue[clear] / 10000.0, rtol=1e-5)
    with rasterio.open(folder / "LABEL_LC.tif") as file:
        np.testing.assert_array_equal(scene.labels, file.read(1))


def test_hesbaye_has_no_scl(shared_data):
    scene = read_stack(shared_data / "hesbaye_a_monthly")
    assert len(scene.dates) == 20
    _, valid = scene.read(("B04",))
    with rasterio.open(shared_data / "hesbaye_a_monthly" / "S2_20201001.tif") as file:
        np.testing.assert_array_equal(valid[2], (file.read() != 0).all(axis=0))


def test_romania_lies_as_the_tree_cover_beside_it(romania):
    cube, cover = romania
    scene = read_romania(cube)
    assert scene.shape == (100, 100)
    assert (scene.dates[0], scene.dates[-1]) == (date(2015, 8, 1), date(2021, 1, 1))
    values, _ = scene.read(("B04", "B08"))
    with np.errstate(invalid="ignore"):
        ndvi = np.nanmean((values[:, 1] - values[:, 0]) / (values[:, 1] + values[:, 0]), axis=0)
    with rasterio.open(cover) as file:
        trees = np.kron(file.read(1), np.ones((2, 2)))

    def agreement(image: np.ndarray) -> float:
        return float(np.corrcoef(image.ravel(), trees.ravel())[0, 1])

    turned = [ndvi[::-1], ndvi[:, ::-1], ndvi[::-1, ::-1]]
    assert agreement(ndvi) > 0.7 > max(agreement(image) for image in turned)

"""Polygons of class maps: rasterised back, against scipy's areas, and as a coverage."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import geopandas
import httpx
import numpy as np
import pytest
import rasterio
import rasterio.features
import scipy.ndimage
import shapely
from affine import Affine
from rasterio.crs import CRS

from benchmarks.serving import served
from benchmarks.tiny_zoo import CLASSES, write_zoo
from models.card import LegendClass
from service.errors import InvalidRequest
from service.grid import Grid
from service.read.geotiff import SourceFile
from service.write import polygons
from service.write.polygons import polygon_features, write_polygons
from service.write.predictions import NO_CLASS
from tests.kits.client import connected
from tests.kits.jobs import waited
from tests.kits.marks import in_all_tests
from tests.kits.rasters import NORTH_UP, UTM, write

H, W = 41, 53
LEGEND = [LegendClass(value=n, name=f"Class {n}", color="#00ff00") for n in range(4)]
GEOJSON, PARQUET = "application/geo+json", "application/vnd.apache.parquet"


def noise(seed: int, classes: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    found = random.integers(0, classes, (H, W)).astype(np.uint8)
    found[random.random((H, W)) < 0.06] = NO_CLASS
    return found


def written(
    classes: np.ndarray, folder: Path, crs: str = UTM, transform: Affine = NORTH_UP
) -> tuple[geopandas.GeoDataFrame, Grid, Path]:
    raster = write(folder / "class.tif", classes[None], nodata=255, crs=crs, transform=transform)
    height, width = classes.shape
    grid = Grid(crs=CRS.from_user_input(crs), transform=transform, width=width, height=height)
    path = write_polygons(raster.path, grid, LEGEND, folder / "polygons.parquet")
    return geopandas.read_parquet(path), grid, path


@pytest.mark.parametrize("rows", [5, *in_all_tests(256)])
@pytest.mark.parametrize(("seed", "classes"), [(0, 2), (1, 3), (2, 4)])
def test_polygons_are_the_map(
    tmp_path: Path, seed: int, classes: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polygons, "_ROWS", rows)
    values = noise(seed, classes)
    frame, grid, path = written(values, tmp_path)
    assert frame.crs == UTM
    assert frame.geometry.is_valid.all()
    counts = [scipy.ndimage.label(values == value)[1] for value in range(classes)]
    assert frame["value"].value_counts().reindex(range(classes)).tolist() == counts
    assert frame["class"].tolist() == [f"Class {value}" for value in frame["value"]]
    back = rasterio.features.rasterize(
        zip(frame.geometry, frame["value"], strict=True),
        out_shape=values.shape, transform=NORTH_UP, fill=NO_CLASS, dtype="uint8",
    )  # fmt: skip
    np.testing.assert_array_equal(back, values)
    np.testing.assert_allclose(frame.geometry.area, frame["pixels"] * 100)
    np.testing.assert_allclose(frame["hectares"], frame.geometry.area / 1e4, rtol=5e-3)
    # Neighbours share every vertex of a common edge, also once it is bent.
    assert shapely.coverage_is_valid(frame.geometry.values)
    features = list(polygon_features(path, grid.crs))
    bent = np.array([shapely.from_geojson(json.dumps(f["geometry"])) for f in features], object)
    assert shapely.coverage_is_valid(bent)
    expected = frame.to_crs("EPSG:4326").geometry.values
    assert max(shapely.hausdorff_distance(bent, expected)) < 1e-9
    assert [f["id"] for f in features] == list(range(1, len(frame) + 1))


def test_a_hole_and_a_corner_touch_are_valid(tmp_path: Path) -> None:
    values = np.zeros((5, 5), np.uint8)
    values[1, 1] = values[2, 2] = values[3, 1] = 1  # touch at corners: three areas, three holes
    frame, _, _ = written(values, tmp_path)
    outer = frame[frame["value"] == 0].geometry
    assert len(outer) == 1
    assert outer.is_valid.all()
    assert outer.area.sum() == 22 * 100
    assert len(frame) == 4


def test_a_rotated_grid_in_degrees(tmp_path: Path) -> None:
    turned = Affine.translation(10, 50) @ Affine.rotation(30) @ Affine.scale(0.001, -0.001)
    values = noise(3, 3)
    frame, _, path = written(values, tmp_path, "EPSG:4326", turned)
    assert frame.crs == "OGC:CRS84"
    assert shapely.coverage_is_valid(frame.geometry.values)
    features = list(polygon_features(path, CRS.from_epsg(4326)))
    assert len(features) == len(frame)
    area = shapely.area(frame.geometry.values).sum()
    np.testing.assert_allclose(area, (values != NO_CLASS).sum() * 1e-6)


def test_features_are_made_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, grid, path = written(noise(1, 3), tmp_path)
    whole = list(polygon_features(path, grid.crs))
    made: list[int] = []
    plain = shapely.from_wkb

    def from_wkb(shapes: list[bytes]) -> Any:
        made.append(len(shapes))
        return plain(shapes)

    monkeypatch.setattr(polygons, "_FEATURES", 10)
    monkeypatch.setattr(shapely, "from_wkb", from_wkb)
    assert next(polygon_features(path, grid.crs)) == whole[0]
    assert made == [10]
    assert list(polygon_features(path, grid.crs)) == whole
    assert max(made) == 10 < len(whole)


def test_a_map_without_a_class_has_no_polygons(tmp_path: Path) -> None:
    frame, grid, path = written(np.full((4, 4), NO_CLASS, np.uint8), tmp_path)
    assert len(frame) == 0
    assert list(polygon_features(path, grid.crs)) == []


def test_too_many_polygons_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polygons, "MAX_POLYGONS", 5)
    with pytest.raises(InvalidRequest, match="set `min_area` or `smooth`"):
        written(noise(0, 2), tmp_path)


# Over HTTP -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> list[SourceFile]:
    folder, random = tmp_path_factory.mktemp("stack"), np.random.default_rng(7)
    level = scipy.ndimage.gaussian_filter(random.normal(0, 1, (3, 70, 70)), (0, 3, 3)) * 4000
    level = np.clip(2000 + level, 300, 6000)
    files = []
    for month in range(1, 5):
        values = (level * random.uniform(0.97, 1.03, (3, 70, 70))).astype(np.uint16)
        values[:, 20:24, 30:37] = 0
        name = f"s_2021-0{month}-01.tif"
        files.append(write(folder / name, values, descriptions=("B02", "B04", "B08"), nodata=0))
    return files


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with served(model_dir=write_zoo(tmp_path_factory.mktemp("zoo"))) as client:
        yield client


def posted(
    api: httpx.Client, stack: list[SourceFile], headers: dict[str, str] | None = None, **data: Any
) -> httpx.Response:
    files = [("files", (s.name, s.path.read_bytes())) for s in stack]
    response = api.post("/classify-pixels", files=files, data=data, headers=headers or {})
    assert response.status_code in {200, 202}, response.text
    return response


def test_polygons_of_every_type(api: httpx.Client, stack: list[SourceFile]) -> None:
    named = posted(api, stack, {"Accept": GEOJSON}, outputs="polygons")
    assert named.headers["content-type"] == GEOJSON
    features = named.json()["features"]
    assert named.json()["model"].startswith("pixels-landcover")
    table = posted(api, stack, {"Accept": PARQUET}, outputs="polygons")
    default = posted(api, stack, {"Accept": "*/*"}, outputs="polygons")
    assert default.headers["content-type"] == table.headers["content-type"] == PARQUET
    assert default.content == table.content
    frame = geopandas.read_parquet(io.BytesIO(table.content))
    assert frame["hectares"].tolist() == [f["properties"]["hectares"] for f in features]
    assert set(frame["class"]) <= set(CLASSES)
    zipped = posted(api, stack, outputs="class,polygons,confidence")
    with zipfile.ZipFile(io.BytesIO(zipped.content)) as archive:
        assert {"class.tif", "confidence.tif", "polygons.parquet"} <= set(archive.namelist())
        assert archive.read("polygons.parquet") == table.content
        item = json.loads(archive.read("item.json"))
        assert item["assets"]["polygons"]["href"] == "./polygons.parquet"
        with rasterio.MemoryFile(archive.read("class.tif")) as memory, memory.open() as file:
            values = file.read(1)
    back = rasterio.features.rasterize(
        zip(frame.geometry, frame["value"], strict=True),
        out_shape=values.shape, transform=NORTH_UP, fill=NO_CLASS, dtype="uint8",
    )  # fmt: skip
    np.testing.assert_array_equal(back, values)
    summary = posted(api, stack, {"Accept": "application/json"}, outputs="polygons").json()
    assert sum(row["pixels"] for row in summary["classes"]) == frame["pixels"].sum()


@pytest.mark.slow
def test_a_job_holds_polygons(api: httpx.Client, stack: list[SourceFile]) -> None:
    job = posted(api, stack, {"Prefer": "respond-async"}, outputs="polygons").json()["jobID"]
    assert waited(api, job)["status"] == "successful"
    result = api.get(f"/jobs/{job}/result")
    assert result.content == posted(api, stack, outputs="polygons").content
    one = api.get(f"/jobs/{job}/result/polygons")
    assert one.headers["content-type"] == result.headers["content-type"] == PARQUET
    assert one.content == result.content
    text = {"Accept": GEOJSON}
    assert api.get(f"/jobs/{job}/result/polygons", headers=text).content == (
        posted(api, stack, text, outputs="polygons").content
    )
    assert api.get(f"/jobs/{job}/result/class").content[:2] == b"II"


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_the_sdk_returns_a_table(
    api: httpx.Client, stack: list[SourceFile], kind: str, tmp_path: Path
) -> None:
    files = [source.path for source in stack]
    with connected(kind, str(api.base_url)) as client:
        table = client.classify_pixels(files, outputs="polygons", min_area=0.2)
        both = client.classify_pixels(files, outputs=["class", "polygons"], min_area=0.2)
        both.save(tmp_path)
    frame = geopandas.read_parquet(tmp_path / "polygons.parquet")
    assert [row["hectares"] for row in table] == frame["hectares"].tolist()
    assert min(frame["hectares"]) >= 0.2
    assert table.to_geopandas().geometry.is_valid.all()


def test_points_have_no_polygons(api: httpx.Client, stack: list[SourceFile]) -> None:
    point = {"type": "Point", "coordinates": [3.0, 50.0]}
    features = [{"type": "Feature", "geometry": point, "properties": {}}]
    points = json.dumps({"type": "FeatureCollection", "features": features})
    files = [("files", (s.name, s.path.read_bytes())) for s in stack]
    data = {"outputs": "polygons", "points": points}
    response = api.post("/classify-pixels", files=files, data=data)
    assert response.json()["errors"][0]["field"] == "outputs"

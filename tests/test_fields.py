"""Predictions per field, against exactextract on the plain maps, shapely and geopandas."""

from __future__ import annotations

import csv
import io
import json
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import geopandas
import httpx
import numpy as np
import pandas as pd
import pyarrow.parquet
import pyogrio
import pytest
import rasterio
import rasterio.io
import rasterio.warp
import shapely
from affine import Affine
from exactextract import exact_extract
from rasterio.crs import CRS
from rasterio.warp import transform_geom
from shapely.geometry import MultiPolygon, Polygon, box, mapping, shape

from benchmarks.fields import write_fields
from benchmarks.serving import served
from benchmarks.tiny_zoo import write_zoo
from models.registry import Registry
from service.errors import NotAVectorFile, TooManyFields
from service.grid import Grid, Window
from service.infer.engine import Engine
from service.infer.model import LoadedModel
from service.read.geotiff import SourceFile
from service.read.layouts import StackOptions
from service.read.stack import open_stack
from service.read.vectors import Fields, read_fields
from service.run import windows as windowing
from service.run.coverage import Coverage, FieldGrid
from service.run.fields import run_fields
from service.run.memory import fields_need
from service.run.plan import plan_raster
from service.run.raster import make_work
from tests.kits.jobs import waited
from tests.kits.marks import in_all_tests
from tests.kits.rasters import NORTH_UP, UTM, write

H, W, DATES = 40, 60, 5
BANDS = ("B02", "B04", "B08")
LEFT, TOP = NORTH_UP.c, NORTH_UP.f


def at(column: float, row: float) -> tuple[float, float]:
    return NORTH_UP @ (column, row)


def square(column: float, row: float, side: float) -> Polygon:
    return Polygon([at(column, row), at(column + side, row), at(column + side, row + side),
                    at(column, row + side)])  # fmt: skip


SHAPES: dict[str, Any] = {
    "whole pixels": square(2, 3, 6),
    "shares of pixels": square(10.3, 4.7, 5.4),
    "smaller than a pixel": square(20.2, 7.6, 0.3),
    "sliver": Polygon([at(5, 20), at(50, 20.4), at(50, 20.5)]),
    "hole": Polygon(square(22, 22, 12).exterior, [square(25.5, 25.5, 4).exterior]),
    "two parts": MultiPolygon([square(40, 2, 3.5), square(50, 30.5, 5)]),
    "half outside": square(56, 30, 9),
    "outside": square(200, 200, 5),
    "under clouds": square(45, 10, 4),
}
FIELDS = [
    {"type": "Feature", "id": name, "properties": {"crop": f"c{n}", "n": n}, "geometry": None}
    for n, name in enumerate(SHAPES)
]


def lonlat(geometry: Any) -> dict[str, Any]:
    return dict(transform_geom(UTM, "EPSG:4326", mapping(geometry), precision=-1))


def collection(shapes: dict[str, Any] = SHAPES) -> dict[str, Any]:
    features = [
        {"type": "Feature", "id": name, "properties": {"crop": f"c{n}", "n": n},
         "geometry": lonlat(one)}
        for n, (name, one) in enumerate(shapes.items())
    ]  # fmt: skip
    return {"type": "FeatureCollection", "features": features}


def frame() -> geopandas.GeoDataFrame:
    rows = {"name": list(SHAPES), "n": range(len(SHAPES))}
    return geopandas.GeoDataFrame(rows, geometry=list(SHAPES.values()), crs=UTM)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> list[SourceFile]:
    folder = tmp_path_factory.mktemp("stack")
    random = np.random.default_rng(3)
    level = random.uniform(500, 4000, (3, H, W))
    files = []
    for month in range(1, DATES + 1):
        values = (level * random.uniform(0.8, 1.2, (3, H, W))).astype(np.uint16)
        values[:, 9:16, 44:52] = 0  # never seen
        values[:, random.integers(0, H, 150), random.integers(0, W, 150)] = 0
        files.append(
            write(folder / f"s_2021-0{month}-01.tif", values, descriptions=BANDS, nodata=0)
        )
    return files


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def api(zoo: Path) -> Iterator[httpx.Client]:
    with served(model_dir=zoo, max_fields=50) as client:
        yield client


def posted(
    api: httpx.Client, stack: list[SourceFile], task: str = "classify-pixels", *,
    fields: Any = None, accept: str | None = None, **data: Any,
) -> httpx.Response:  # fmt: skip
    files: list[Any] = [("files", (s.name, s.path.read_bytes())) for s in stack]
    if isinstance(fields, tuple):
        files.append(("fields", fields))
    elif fields is not None:
        data["fields"] = json.dumps(fields)
    headers = {"Accept": accept} if accept else {}
    return api.post(f"/{task}", files=files, data=data, headers=headers)


def raster(response: httpx.Response) -> rasterio.io.MemoryFile:
    assert response.status_code == 200, response.text
    return rasterio.io.MemoryFile(response.content)


# Shares --------------------------------------------------------------------------------------


def fields_of(shapes: list[Any], crs: Any = UTM) -> Fields:
    return Fields(
        ids=tuple(range(len(shapes))),
        properties=({},) * len(shapes),
        shapes=np.array(shapes, np.object_),
        crs=CRS.from_user_input(crs),
        warnings=(),
    )


def covered_pixels(fields: Fields, grid: Grid, side: int) -> np.ndarray:
    """Pixels that each field covers, summed over windows."""
    on_grid, total = FieldGrid(fields, grid), np.zeros(len(fields))
    for row in range(0, grid.height, side):
        for column in range(0, grid.width, side):
            window = Window(
                column, row, min(side, grid.width - column), min(side, grid.height - row)
            )
            covered = on_grid.coverage(window)
            assert (covered.share > 0).all()
            assert (covered.share <= 1 + 1e-6).all()
            total[covered.fields] += covered.sums(covered.share)
    return total


@pytest.mark.parametrize("side", [7, 16, 100])
@pytest.mark.parametrize("turn", [0, 30])
def test_shares_sum_to_the_area_within_the_raster(side: int, turn: float) -> None:
    transform = NORTH_UP @ Affine.rotation(turn)
    grid = Grid(crs=CRS.from_user_input(UTM), transform=transform, width=W, height=H)
    corners = [transform @ corner for corner in ((0, 0), (W, 0), (W, H), (0, H))]
    shapes = list(SHAPES.values())
    expected = [one.intersection(Polygon(corners)).area / 100 for one in shapes]  # 10 m pixels
    found = covered_pixels(fields_of(shapes), grid, side)
    np.testing.assert_allclose(found, expected, atol=1e-4 * 36)


def test_fields_that_overlap_each_count_in_full() -> None:
    grid = Grid(crs=CRS.from_user_input(UTM), transform=NORTH_UP, width=W, height=H)
    same = [square(10, 10, 7.5)] * 3
    np.testing.assert_allclose(covered_pixels(fields_of(same), grid, 16), [56.25] * 3, atol=1e-3)


# Results -------------------------------------------------------------------------------------


def test_classes_are_those_of_the_mean_probability(
    api: httpx.Client, stack: list[SourceFile]
) -> None:
    response = posted(api, stack, fields=collection())
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/geo+json"
    features = response.json()["features"]
    assert [one["id"] for one in features] == list(SHAPES)
    assert [one["properties"]["crop"] for one in features] == [f"c{n}" for n in range(len(SHAPES))]
    with raster(posted(api, stack, outputs="probabilities")) as memory, memory.open() as file:
        names = file.descriptions
        # exactextract leaves NaN out, band by band.
        means = exact_extract(file, frame(), ["mean"], output="pandas")
        inside = exact_extract(file, frame(), ["count"], output="pandas").iloc[:, 0]
    for n, one in enumerate(features):
        found, expected = one["properties"], means.iloc[n].to_numpy()
        if one["id"] == "outside":
            assert found["status"] == "outside"
            continue
        if one["id"] == "under clouds":
            assert found["status"] == "no_data"
            assert "class" not in found
            continue
        assert found["status"] == "ok"
        probabilities = [found["probabilities"][name] for name in names]
        np.testing.assert_allclose(probabilities, expected, atol=2e-4)
        assert found["class"] == names[int(np.argmax(expected))]
        assert found["confidence"] == pytest.approx(max(expected), abs=2e-4)
        assert sum(found["share"].values()) == pytest.approx(1)
        assert list(found["share"]) == list(names)
        assert 0 < found["clear_dates"] <= DATES
        assert inside[n] <= found["pixels"] + 1e-3
    by_id = {one["id"]: one["properties"] for one in features}
    assert by_id["whole pixels"]["pixels"] == pytest.approx(36)
    assert by_id["whole pixels"]["hectares"] == pytest.approx(0.36, rel=0.005)
    assert by_id["smaller than a pixel"]["pixels"] == pytest.approx(0.09, rel=1e-3)
    assert by_id["half outside"]["pixels"] == pytest.approx(36)


@pytest.mark.parametrize("task", ["landcover", "embed"])
def test_models_of_patches_are_rejected_with_an_alternative(
    api: httpx.Client, stack: list[SourceFile], task: str
) -> None:
    data = {"modality": "patch"} if task == "embed" else {}
    response = posted(api, stack, task, fields=collection(), **data)
    assert response.json()["code"] == "invalid_request", response.text
    assert "use a pixel model with /classify-pixels" in response.json()["detail"]


def test_embeddings_are_the_mean_embedding(api: httpx.Client, stack: list[SourceFile]) -> None:
    features = posted(api, stack, "embed", fields=collection()).json()["features"]
    with raster(posted(api, stack, "embed")) as memory, memory.open() as file:
        means = exact_extract(file, frame(), ["mean"], output="pandas").to_numpy()
    for one, expected in zip(features, means, strict=True):
        if one["properties"]["status"] == "ok":
            np.testing.assert_allclose(one["properties"]["embedding"], expected, rtol=1e-4)


def test_a_forecast_is_that_of_the_fields_own_mean_series(
    api: httpx.Client, stack: list[SourceFile]
) -> None:
    features = posted(api, stack, "forecast", fields=collection()).json()["features"]
    found = {one["id"]: one["properties"] for one in features}
    name = "shares of pixels"
    series: dict[str, Any] = {"id": name, "dates": [f"2021-0{n}-01" for n in range(1, DATES + 1)]}
    for number, band in enumerate(BANDS, start=1):
        series[band] = []
        for source in stack:
            with rasterio.open(source.path) as file:
                one = geopandas.GeoDataFrame(geometry=[SHAPES[name]], crs=UTM)
                mean = exact_extract(file, one, ["mean"], output="pandas")
                values = mean.to_numpy()[0]
                series[band].append(float(values[number - 1]) / 10_000)
    expected = api.post("/forecast", json={"series": [series]}).json()["results"][0]
    for index in ("NDVI", "EVI", "SAVI"):
        np.testing.assert_allclose(found[name][index]["q50"], expected[index]["q50"], rtol=1e-3)
    assert found[name]["dates"] == expected["dates"]
    assert found["under clouds"]["status"] == "no_data"


def test_results_do_not_depend_on_the_windows(
    zoo: Path, stack: list[SourceFile], tmp_path: Path
) -> None:
    fields = fields_of(list(SHAPES.values()))
    with Engine(Registry.load(zoo), providers="cpu") as engine:
        for name in ("pixels-landcover", "forecast-vi", "embed-pixel"):
            model = engine.models[name]
            opened = open_stack(stack, StackOptions(), bands=model.card.bands, max_bytes=2**30)
            run = plan_raster(model, opened, rasters=False)
            at_once = run_fields(make_work(run, tmp_path), fields).results
            small = run_fields(make_work(run, tmp_path, window_bytes=2**13), fields).results
            for one, other in zip(at_once, small, strict=True):
                assert one["status"] == other["status"]
                flat, same = (json.dumps(x, sort_keys=True) for x in (one, other))
                numbers, others = (_numbers(json.loads(text)) for text in (flat, same))
                np.testing.assert_allclose(numbers, others, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_fields_that_overlap_are_counted_in_parts_of_bounded_size(
    zoo: Path, stack: list[SourceFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same field a hundred times, in a window that may hold only some of its cells."""
    shapes = [*SHAPES.values(), *[SHAPES["shares of pixels"]] * 100]
    coverage, most = FieldGrid.coverage, 0

    def watched(self: FieldGrid, window: Window) -> Coverage:
        nonlocal most
        found = coverage(self, window)
        most = max(most, len(found.cells))
        return found

    monkeypatch.setattr(FieldGrid, "coverage", watched)
    with Engine(Registry.load(zoo), providers="cpu") as engine:
        for name in ("pixels-landcover", "forecast-vi"):
            model = engine.models[name]
            opened = open_stack(stack, StackOptions(), bands=model.card.bands, max_bytes=2**30)
            run = plan_raster(model, opened, rasters=False)
            fields = fields_of(shapes)
            at_once, before = run_fields(make_work(run, tmp_path), fields).results, most
            with monkeypatch.context() as patched:
                patched.setattr(windowing, "COVERED_CELLS", 300)
                most = 0
                parts = run_fields(make_work(run, tmp_path), fields).results
            assert most <= 300 < before
            for one, other in zip(at_once, parts, strict=True):
                assert one["status"] == other["status"]
                np.testing.assert_allclose(_numbers(one), _numbers(other), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "numbers"), [("pixels-landcover", 2 * 3), ("embed-pixel", 3), ("forecast-vi", 3 * 3)]
)
def test_the_results_of_fields_count_as_memory(
    zoo: Path, stack: list[SourceFile], name: str, numbers: int
) -> None:
    """At least a Python float, its place in a list and twenty characters for each number."""
    with Engine(Registry.load(zoo), providers="cpu") as engine:
        model = engine.models[name]
        opened = open_stack(stack, StackOptions(), bands=model.card.bands, max_bytes=2**30)
        run = plan_raster(model, opened, rasters=False)
        many, none = (fields_need(run, 2**20, count).arrays for count in (100_000, 0))
        sums = 4 * 2 * (run.pixel_bytes + run.prediction_bytes)
        assert many - none - 100_000 * sums >= 100_000 * numbers * (24 + 8 + 20)


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [n for one in value.values() for n in _numbers(one)]
    if isinstance(value, list):
        return [n for one in value for n in _numbers(one)]
    return [float(value)] if isinstance(value, int | float) else []


def test_only_windows_that_hold_a_field_are_read(
    zoo: Path, stack: list[SourceFile], tmp_path: Path
) -> None:
    with Engine(Registry.load(zoo), providers="cpu") as engine:
        model = engine.models["pixels-landcover"]
        opened = open_stack(stack, StackOptions(), bands=model.card.bands, max_bytes=2**30)
        run = plan_raster(model, opened, rasters=False)
        one = fields_of([square(2, 3, 6)])
        work = make_work(run, tmp_path, window_bytes=2**13)
        assert run_fields(work, one).pixels < H * W / 4
        nothing = run_fields(work, fields_of([square(200, 200, 5)]))
        assert (nothing.pixels, nothing.results) == (0, ({"status": "outside"},))


def test_only_pixels_that_a_field_covers_are_inferred(
    zoo: Path, stack: list[SourceFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, inferred = LoadedModel.pixels, 0

    def counted(self: LoadedModel, values: Any, *others: Any, **more: Any) -> Any:
        nonlocal inferred
        inferred += len(values)
        return pixels(self, values, *others, **more)

    monkeypatch.setattr(LoadedModel, "pixels", counted)
    with Engine(Registry.load(zoo), providers="cpu") as engine:
        model = engine.models["pixels-landcover"]
        opened = open_stack(stack, StackOptions(), bands=model.card.bands, max_bytes=2**30)
        run = plan_raster(model, opened, rasters=False)
        # 6 x 6 whole pixels, the same again, and 7 x 6 of which the field covers a part.
        fields = fields_of([square(2, 3, 6), square(2, 3, 6), box(*square(20.5, 25, 6).bounds)])
        results = run_fields(make_work(run, tmp_path), fields).results
    assert [round(float(str(one["pixels"])), 6) for one in results] == [36, 36, 36]
    seen = sum(rasterio.open(file.path).read().any(axis=0) for file in stack) > 0
    assert inferred == seen[3:9, 2:8].sum() + seen[25:31, 20:27].sum()


# Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "crs", ["EPSG:4326", "EPSG:3035", *in_all_tests("EPSG:32631", "EPSG:3857")]
)
@pytest.mark.parametrize("ending", ["geojson", "gpkg", "parquet"])
def test_every_format_and_crs_gives_the_same(
    api: httpx.Client, stack: list[SourceFile], tmp_path: Path, ending: str, crs: str
) -> None:
    path = tmp_path / f"fields.{ending}"
    given = frame().to_crs(crs)
    if ending == "parquet":
        given.to_parquet(path)
    else:
        given.to_file(path, driver="GPKG" if ending == "gpkg" else "GeoJSON")
    response = posted(api, stack, fields=(path.name, path.read_bytes()))
    assert response.status_code == 200, response.text
    plain = posted(api, stack, fields=collection()).json()["features"]
    for one, other in zip(response.json()["features"], plain, strict=True):
        assert one["properties"]["name"] == other["id"]
        assert one["properties"]["n"] == other["properties"]["n"]
        assert one["properties"]["status"] == other["properties"]["status"]
        if one["properties"]["status"] == "ok":
            for key in ("confidence", "hectares"):
                assert one["properties"][key] == pytest.approx(other["properties"][key], rel=5e-3)
        assert shape(one["geometry"]).distance(shape(other["geometry"])) < 1e-6


def test_a_table_holds_a_row_for_each_field(api: httpx.Client, stack: list[SourceFile]) -> None:
    response = posted(api, stack, fields=collection(), accept="text/csv")
    assert response.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(response.text)))
    features = posted(api, stack, fields=collection()).json()["features"]
    assert [row["id"] for row in rows] == [one["id"] for one in features]
    for row, one in zip(rows, features, strict=True):
        assert row["status"] == one["properties"]["status"]
        if row["status"] == "ok":
            assert float(row["confidence"]) == one["properties"]["confidence"]
            name, share = next(iter(one["properties"]["share"].items()))
            assert float(row[f"share.{name}"]) == share
    forecast = posted(api, stack, "forecast", fields=collection(), accept="text/csv")
    columns = next(csv.reader(io.StringIO(forecast.text)))
    assert sum(name.startswith("NDVI_2021-") and name.endswith("_q50") for name in columns) == 3


def test_a_client_of_json_gets_geojson(api: httpx.Client, stack: list[SourceFile]) -> None:
    response = posted(api, stack, fields=collection(), accept="application/json")
    assert response.headers["content-type"] == "application/geo+json"
    assert response.json() == posted(api, stack, fields=collection()).json()


def test_geoparquet_is_read_by_geopandas(
    api: httpx.Client, stack: list[SourceFile], tmp_path: Path
) -> None:
    response = posted(api, stack, fields=collection(), accept="application/vnd.apache.parquet")
    assert response.status_code == 200, response.text
    path = tmp_path / "x.parquet"
    path.write_bytes(response.content)
    table = geopandas.read_parquet(path)
    assert table.crs == "OGC:CRS84"
    assert list(table["id"]) == list(SHAPES)
    assert len(pyarrow.parquet.read_table(path)) == len(SHAPES)
    moved = table.to_crs(UTM).geometry
    assert all(a.distance(b) < 1e-3 for a, b in zip(moved, SHAPES.values(), strict=True))


def test_a_job_gives_the_result_of_the_request(api: httpx.Client, stack: list[SourceFile]) -> None:
    plain = posted(api, stack, fields=collection()).json()["features"]
    files: list[Any] = [("files", (s.name, s.path.read_bytes())) for s in stack]
    files.append(("fields", ("fields.geojson", json.dumps(collection()).encode())))
    accepted = api.post("/classify-pixels", files=files, headers={"Prefer": "respond-async"})
    assert accepted.status_code == 202, accepted.text
    where = accepted.headers["Location"]
    job = waited(api, accepted.json()["jobID"])
    assert job["status"] == "successful", job
    result = api.get(where + "/result")
    assert result.json()["features"] == plain
    rows = api.get(where + "/result", headers={"Accept": "text/csv"})
    assert len(list(csv.DictReader(io.StringIO(rows.text)))) == len(SHAPES)


def rows_of(response: httpx.Response) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(response.text)))


def test_no_property_is_lost_in_a_table(
    api: httpx.Client, stack: list[SourceFile], tmp_path: Path
) -> None:
    document = collection({"a": square(2, 3, 6), "b": square(12, 3, 6)})
    one, other = document["features"]
    one["properties"] = {
        "id": 7,
        "dates": ["2020-05-01", "2020-06-01"],
        "empty": [],
        "none": {},
        "note": 'said "no",\r\nthen; left',
        "mixed": 1,
        "nested": {"farm": {"name": "Löß"}},
        "big": 2**70,
    }
    other["properties"] = {"mixed": "zwei", "big": True, "geometry": "a lot"}
    rows = rows_of(posted(api, stack, fields=document, accept="text/csv"))
    assert [row["id"] for row in rows] == ["a", "b"]
    assert rows[0]["properties.id"] == "7"
    assert json.loads(rows[0]["dates"]) == ["2020-05-01", "2020-06-01"]
    assert (rows[0]["empty"], rows[0]["none"]) == ("[]", "{}")
    assert rows[0]["note"] == one["properties"]["note"]
    assert [row["mixed"] for row in rows] == ["1", "zwei"]
    assert json.loads(rows[0]["nested.farm"]) == {"name": "Löß"}
    assert [row["big"] for row in rows] == [str(2**70), "True"]
    path = tmp_path / "fields.parquet"
    path.write_bytes(
        posted(api, stack, fields=document, accept="application/vnd.apache.parquet").content
    )
    table = geopandas.read_parquet(path)
    assert table["mixed"].tolist() == ["1", "zwei"]
    assert table["big"].tolist() == [str(2**70), "True"]
    assert table["properties.geometry"].dropna().tolist() == ["a lot"]
    forecast = rows_of(posted(api, stack, "forecast", fields=document, accept="text/csv"))
    assert sum(name.endswith("_q50") for name in forecast[0]) == 9


def test_results_that_replace_properties_are_a_warning(
    api: httpx.Client, stack: list[SourceFile]
) -> None:
    document = collection({"a": square(2, 3, 6)})
    assert "properties_replaced" not in codes(posted(api, stack, fields=document))
    document["features"][0]["properties"] = {"class": "Wheat", "owner": "me"}
    response = posted(api, stack, fields=document)
    (told,) = [w for w in response.json()["warnings"] if w["code"] == "properties_replaced"]
    assert "1 properties of the same name (class)" in told["detail"]
    point = mapping(shape(lonlat(square(2, 3, 6))).centroid)
    feature = {"type": "Feature", "geometry": point, "properties": {"status": "surveyed"}}
    points = json.dumps({"type": "FeatureCollection", "features": [feature]})
    assert "properties_replaced" in codes(posted(api, stack, points=points))


def test_ids_are_those_of_the_file(tmp_path: Path) -> None:
    polygon = mapping(box(0, 0, 1, 1))
    document = {"type": "FeatureCollection", "features": [
        {"type": "Feature", "id": 0, "properties": {"id": "own"}, "geometry": polygon},
        {"type": "Feature", "properties": {"id": "A12"}, "geometry": polygon},
        {"type": "Feature", "properties": None, "geometry": polygon},
    ]}  # fmt: skip
    path = tmp_path / "x.geojson"
    path.write_text(json.dumps(document))
    assert read_fields(SourceFile(name="x", path=path), 9).ids == (0, "A12", 3)


# Places --------------------------------------------------------------------------------------


def test_a_field_far_away_is_outside(api: httpx.Client, stack: list[SourceFile]) -> None:
    """Also beyond the area in which the raster's projection is defined."""
    document = collection({"here": square(2, 3, 6)})
    for name, (lon, lat) in {"Sydney": (151, -34), "Hawaii": (-157, 20), "pole": (90, 90)}.items():
        corners = box(lon - 1, max(lat - 1, -90), lon + 1, min(lat + 1, 90))
        document["features"].append(
            {"type": "Feature", "id": name, "properties": {}, "geometry": mapping(corners)}
        )
    response = posted(api, stack, fields=document)
    statuses = [one["properties"]["status"] for one in response.json()["features"]]
    assert statuses == ["ok", "outside", "outside", "outside"]
    assert codes(response) == codes(posted(api, stack, fields=collection()))


def test_a_field_larger_than_the_projection_covers_the_raster(
    api: httpx.Client, stack: list[SourceFile]
) -> None:
    world = mapping(box(-180, -90, 180, 90))
    (found,) = posted(api, stack, fields=world).json()["features"]
    assert found["properties"]["status"] == "ok"
    assert found["properties"]["pixels"] == pytest.approx(H * W)


@pytest.mark.parametrize("crs", ["EPSG:32760", "EPSG:4326"])
def test_a_field_and_points_across_the_antimeridian(
    api: httpx.Client, tmp_path: Path, crs: str
) -> None:
    """As GeoJSON has it: cut at 180 degrees, with longitudes from -180 to 180."""
    west, south, east, north = 179.998, -17.003, -179.998, -17.001
    if crs == "EPSG:4326":
        transform = Affine(0.0001, 0, 179.997, 0, -0.0001, -17)
    else:
        (left,), (top,) = rasterio.warp.transform("EPSG:4326", crs, [179.997], [-17.0])
        transform = Affine(10, 0, left, 0, -10, top)
    random = np.random.default_rng(4)
    files = [
        write(
            tmp_path / f"s_2021-0{month}-01.tif",
            random.integers(300, 4000, (3, H, W)).astype(np.uint16),
            descriptions=BANDS, nodata=0, crs=crs, transform=transform,
        )
        for month in range(1, DATES + 1)
    ]  # fmt: skip
    halves = MultiPolygon([box(west, south, 180, north), box(-180, south, east, north)])
    both, one = (
        posted(api, files, fields=mapping(shape)).json()["features"][0]["properties"]
        for shape in (halves, halves.geoms[0])
    )
    assert one["status"] == both["status"] == "ok"
    assert both["pixels"] == pytest.approx(2 * one["pixels"], rel=1e-3)
    points = {"type": "FeatureCollection", "features": [
        {"type": "Feature", "geometry": mapping(half.centroid), "properties": {}}
        for half in halves.geoms
    ]}  # fmt: skip
    found = posted(api, files, points=json.dumps(points)).json()["features"]
    assert [point["properties"]["status"] for point in found] == ["ok", "ok"]


def test_a_third_and_a_fourth_coordinate_are_ignored(
    api: httpx.Client, stack: list[SourceFile], tmp_path: Path
) -> None:
    plain = posted(api, stack, fields=collection()).json()["features"]
    document = collection()
    for feature in document["features"]:
        feature["geometry"] = mapping(shapely.force_3d(shape(feature["geometry"]), 812.5))
    for given in (document, _with_measures(tmp_path)):
        found = posted(api, stack, fields=given).json()["features"]
        for one, other in zip(found, plain, strict=True):
            for key in ("status", "class", "pixels"):
                expected = other["properties"].get(key)
                if isinstance(expected, float):
                    assert one["properties"][key] == pytest.approx(expected, rel=1e-6)
                else:
                    assert one["properties"].get(key) == expected


def _with_measures(folder: Path) -> tuple[str, bytes]:
    """A GeoParquet file of polygons with Z and M."""
    path = folder / "zm.parquet"
    frame().to_parquet(path)
    table = pyarrow.parquet.read_table(path)
    binary = [_zm(one) for one in SHAPES.values()]
    at = table.column_names.index("geometry")
    table = table.set_column(at, "geometry", pyarrow.array(binary, pyarrow.binary()))
    pyarrow.parquet.write_table(table, path)
    return path.name, path.read_bytes()


def _zm(polygon: Any) -> bytes:
    """The ISO well-known binary of a polygon whose vertices have a height and a measure."""
    if isinstance(polygon, MultiPolygon):
        parts = [_zm(part) for part in polygon.geoms]
        return struct.pack("<BII", 1, 3006, len(parts)) + b"".join(parts)
    rings = [polygon.exterior, *polygon.interiors]
    body = b"".join(
        struct.pack("<I", len(ring.coords))
        + b"".join(struct.pack("<4d", x, y, 812.5, 7.0) for x, y in ring.coords)
        for ring in rings
    )
    return struct.pack("<BII", 1, 3003, len(rings)) + body


def test_coordinates_beyond_every_projection_are_of_no_other_field(
    api: httpx.Client, stack: list[SourceFile]
) -> None:
    document = collection({"here": square(2, 3, 6)})
    ring = [[1e308, 1], [2, 1], [2, 2], [1e308, 1]]
    huge = {"type": "Polygon", "coordinates": [ring]}
    document["features"].append({"type": "Feature", "properties": {}, "geometry": huge})
    for task in ("classify-pixels", "series"):
        response = posted(api, stack, task, fields=document)
        assert response.status_code == 200, response.text
        statuses = [one["properties"]["status"] for one in response.json()["features"]]
        assert statuses == ["ok", "outside"], task


def test_geoparquet_that_is_not_read_names_the_reason(
    api: httpx.Client, stack: list[SourceFile], tmp_path: Path
) -> None:
    path = tmp_path / "x.parquet"
    frame().set_crs(None, allow_override=True).to_parquet(path)
    without_crs = posted(api, stack, fields=("x.parquet", path.read_bytes()))
    polygons = frame()[[isinstance(one, Polygon) for one in SHAPES.values()]]
    polygons.to_parquet(path, geometry_encoding="geoarrow")
    native = posted(api, stack, fields=("x.parquet", path.read_bytes()))
    for response, said in ((without_crs, "states no CRS"), (native, "encoding polygon")):
        assert (response.status_code, response.json()["code"]) == (422, "not_a_vector_file")
        assert said in response.json()["detail"]


# Faults --------------------------------------------------------------------------------------


def codes(response: httpx.Response) -> list[str]:
    return [one["code"] for one in response.json()["warnings"]]


def test_invalid_features_do_not_affect_the_others(
    api: httpx.Client, stack: list[SourceFile]
) -> None:
    bow = Polygon([at(4, 4), at(12, 12), at(12, 4), at(4, 12)])
    point = shapely.Point(at(5, 5))
    document = collection({"good": square(2, 3, 6), "bow": bow, "point": point})
    document["features"].append({"type": "Feature", "id": "good", "properties": None,
                                 "geometry": None})  # fmt: skip
    response = posted(api, stack, fields=document)
    statuses = [one["properties"]["status"] for one in response.json()["features"]]
    assert statuses == ["ok", "ok", "invalid", "invalid"]
    assert {"fields_repaired", "invalid_fields", "duplicate_ids"} <= set(codes(response))
    bow_found = response.json()["features"][1]["properties"]
    assert bow_found["pixels"] == pytest.approx(32, abs=1e-3)  # two triangles of 16


def star(points: int) -> Polygon:
    """A ring each of whose edges crosses almost all others."""
    turns = 2 * np.pi * (points // 2 * np.arange(points) % points) / points
    return Polygon([at(20 + 9 * np.cos(turn), 20 + 9 * np.sin(turn)) for turn in turns])


def test_only_simple_shapes_are_repaired(tmp_path: Path) -> None:
    path = tmp_path / "x.geojson"
    path.write_text(json.dumps(collection({"small": star(51), "large": star(2_001)})))
    found = read_fields(SourceFile(name="x.geojson", path=path), 9)
    assert found.shapes[0].area > 0
    assert found.shapes[1] is None  # its edges cross two million times
    assert [one.code for one in found.warnings] == ["fields_repaired", "invalid_fields"]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"id;x\n1;2\n", "not_a_vector_file"),
        (b"{not json", "not_a_vector_file"),
        (b'{"type": "Topology"}', "not_a_vector_file"),
        (b'{"type": ["Polygon", {}]}', "not_a_vector_file"),
        (b'{"type": "FeatureCollection", "features": 3}', "not_a_vector_file"),
        (b"SQLite format 3\0" + bytes(200), "not_a_vector_file"),
        (b"PAR1" + bytes(200) + b"PAR1", "not_a_vector_file"),
        (b"[" * 100_000, "not_a_vector_file"),
        (b'{"type": "FeatureCollection", "features": []}', "invalid_fields"),
        (json.dumps(collection({"p": shapely.Point(at(1, 1))})).encode(), "invalid_fields"),
        (json.dumps(collection(dict.fromkeys(map(str, range(51)), box(0, 0, 1, 1)))).encode(),
         "too_many_fields"),
    ],
)  # fmt: skip
def test_a_file_without_fields_is_rejected(
    api: httpx.Client, stack: list[SourceFile], content: bytes, code: str
) -> None:
    response = posted(api, stack, fields=("fields.bin", content))
    assert response.json()["code"] == code
    assert response.status_code in {413, 422}
    assert "fields.bin" in response.json()["detail"]


def test_points_and_fields_exclude_each_other(api: httpx.Client, stack: list[SourceFile]) -> None:
    point = {"type": "Feature", "geometry": {"type": "Point", "coordinates": [3, 51]}}
    points = json.dumps({"type": "FeatureCollection", "features": [point]})
    response = posted(api, stack, fields=collection(), points=points)
    assert response.json()["code"] == "invalid_request"
    assert "points" in response.json()["detail"]


def test_patch_models_are_rejected_for_fields(api: httpx.Client, stack: list[SourceFile]) -> None:
    response = posted(api, stack, "embed", fields=collection(), modality="patch")
    assert response.json()["code"] in {"invalid_request", "missing_bands"}


def test_the_content_determines_the_format_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "x.geojson"
    frame().to_file(tmp_path / "y.gpkg", driver="GPKG")
    (tmp_path / "y.gpkg").rename(path)
    assert len(read_fields(SourceFile(name="x.geojson", path=path), 99)) == len(SHAPES)
    with pytest.raises(TooManyFields, match="PIMC_MAX_FIELDS"):
        read_fields(SourceFile(name="x.geojson", path=path), 3)


def test_a_geopackage_without_geometry_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "x.gpkg"
    pyogrio.write_dataframe(pd.DataFrame({"a": [1]}), path, driver="GPKG")
    with pytest.raises(NotAVectorFile, match="0 layers with geometry"):
        read_fields(SourceFile(name="x.gpkg", path=path), 9)


@pytest.mark.slow
def test_the_benchmark_compares_fields_with_the_map(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.fields", "--side", "64", "--dates", "12",
         "--fields", "7", "--pairs", "1"],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True,
    )  # fmt: skip
    plain, fields, ratio = run.stdout.splitlines()
    assert plain.startswith("map: ")
    assert plain.endswith("4096 pixels")
    # The next square of fields, each of them within its cell.
    assert fields.startswith("fields: ")
    made = json.loads(write_fields(tmp_path / "fields.geojson", 64, 7).path.read_text())
    shapes = [shapely.from_geojson(json.dumps(one["geometry"])) for one in made["features"]]
    assert len(shapes) == 9
    assert all(shape.is_valid for shape in shapes)
    assert shapely.union_all(shapes).area == pytest.approx(sum(shape.area for shape in shapes))
    assert re.fullmatch(r"fields / map: \S+ by the clock, \S+ by processor time", ratio)

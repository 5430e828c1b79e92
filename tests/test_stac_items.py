"""STAC items of results and models, against the schemas of STAC and its extensions."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import rasterio
import rasterio.warp
from affine import Affine
from rasterio.crs import CRS
from referencing import Registry, Resource
from shapely.geometry import Point, shape

from benchmarks.serving import served
from benchmarks.tiny_zoo import CLASSES, write_zoo
from models.card import ModelCard
from models.registry import ZOO
from service.grid import Grid
from service.read.geotiff import SourceFile
from service.write.stac_item import class_name, footprint, model_item
from tests.kits.client import connected
from tests.kits.jobs import waited
from tests.kits.json_schema import json_schema
from tests.kits.rasters import NORTH_UP, UTM, write

pytestmark = pytest.mark.slow

SCHEMAS = Path(__file__).parent / "data" / "stac"
H, W = 70, 80
DAYS = [f"2021-{n:02d}-11" for n in range(1, 7)]
GEOJSON = "application/geo+json"


def _schemas() -> dict[str, Path]:
    """The files of the schemas, by their addresses."""
    found = {}
    for path in sorted(SCHEMAS.glob("*.json")):
        name = json.loads(path.read_text())["$id"]
        found[name.rstrip("#").replace("/commonjson", "/common.json")] = path
    return found


LOCAL = {address: str(path) for address, path in _schemas().items()}
"""Files that stac-validator reads in place of addresses, so that it needs no network."""
REGISTRY = Registry().with_resources(
    (address, Resource.from_contents(json.loads(path.read_text())))
    for address, path in _schemas().items()
)
ITEM_SCHEMA = "https://schemas.stacspec.org/v1.1.0/item-spec/json-schema/item.json"


def check_item(item: dict[str, Any], *extensions: str) -> None:
    """An item fits the schema of STAC 1.1 and of every extension that it names."""
    jsonschema = json_schema()
    from stac_validator.stac_validator import StacValidate  # takes seconds as well

    names = {url.split("/")[3] for url in item["stac_extensions"]}
    assert names >= set(extensions)
    for url in (ITEM_SCHEMA, *item["stac_extensions"]):
        validator = jsonschema.Draft7Validator(
            {"$ref": url}, registry=REGISTRY, format_checker=jsonschema.FormatChecker()
        )
        errors = [f"{url}: {e.json_path}: {e.message}" for e in validator.iter_errors(item)]
        assert not errors, "\n".join(errors)
    validator = StacValidate(schema_map=dict(LOCAL))
    assert validator.validate_dict(item), validator.message


def check_collection(document: dict[str, Any]) -> None:
    """An ItemCollection is valid, as are all of its items."""
    json_schema()
    from stac_validator.stac_validator import StacValidate

    assert document["type"] == "FeatureCollection"
    validator = StacValidate(schema_map=dict(LOCAL))
    validator.validate_item_collection_dict(document)
    assert len(validator.message) == len(document["features"]) > 0
    assert all(message["valid_stac"] for message in validator.message), validator.message


def test_the_validator_rejects_what_an_extension_does_not_allow() -> None:
    from stac_validator.stac_validator import StacValidate

    card = ModelCard.model_validate_json(next(ZOO.glob("*/card.json")).read_text("utf-8"))
    for change in ({"mlm:name": 7}, {"start_datetime": None}):
        item = model_item(card, "https://example.org/model")
        item["properties"] |= change
        assert not StacValidate(schema_map=dict(LOCAL)).validate_dict(item)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> list[SourceFile]:
    folder, random = tmp_path_factory.mktemp("stack"), np.random.default_rng(0)
    bands = ("B02", "B03", "B04", "B08")
    return [
        write(
            folder / f"s_{day}.tif",
            random.integers(300, 3000, (4, H, W)).astype(np.uint16),
            descriptions=bands,
            nodata=0,
        )
        for day in DAYS
    ]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with served(model_dir=write_zoo(tmp_path_factory.mktemp("zoo"))) as client:
        yield client


def posted(
    api: httpx.Client, stack: list[SourceFile], task: str, headers: dict[str, str], **data: str
) -> httpx.Response:
    files = [("files", (s.name, s.path.read_bytes())) for s in stack]
    response = api.post(f"/{task}", files=files, data=data, headers=headers)
    assert response.status_code in {200, 202}, response.text
    return response


def zipped(api: httpx.Client, stack: list[SourceFile], task: str, **data: str) -> zipfile.ZipFile:
    response = posted(api, stack, task, {"Accept": "application/zip"}, **data)
    return zipfile.ZipFile(io.BytesIO(response.content))


CASES = [
    ("classify-pixels", {"outputs": "class,confidence"}, "classification"),
    ("forecast", {"outputs": "q10,q90"}, "forecast"),
    ("landcover", {"stride": "4"}, "classification"),
    ("embed", {}, "mlm"),
    ("embed", {"dtype": "int8"}, "mlm"),
    ("classify-pixels", {"outputs": "probabilities", "dtype": "uint8"}, "mlm"),
    ("classify-pixels", {"outputs": "class,attribution"}, "classification"),
]


@pytest.mark.parametrize(("task", "data", "extension"), CASES)
def test_the_item_of_a_zip_is_valid_and_says_what_its_files_hold(
    api: httpx.Client, stack: list[SourceFile], task: str, data: dict[str, str], extension: str
) -> None:
    with zipped(api, stack, task, **data) as archive:
        item = json.loads(archive.read("item.json"))
        check_item(item, "projection", "raster", "processing", "mlm", extension)
        there = {asset["href"] for asset in item["assets"].values()}
        names = {name for name in archive.namelist() if name != "item.json"}
        assert names == {href.removeprefix("./") for href in there if href.startswith("./")}
        for key, asset in item["assets"].items():
            if asset["roles"] != ["data"]:
                continue
            with rasterio.MemoryFile(archive.read(f"{key}.tif")) as memory, memory.open() as file:
                assert [band["name"] for band in asset["bands"]] == list(file.descriptions)
                assert asset["data_type"] == file.dtypes[0]
                assert asset.get("raster:scale", 1.0) == file.scales[0]
                assert asset.get("raster:offset", 0) == file.offsets[0]
                assert str(asset["nodata"]) == str(file.nodata).removesuffix(".0")
                assert item["properties"]["proj:shape"] == list(file.shape)
                assert item["properties"]["proj:transform"] == list(file.transform)
                assert item["properties"]["proj:code"] == UTM
                bounds = rasterio.warp.transform_bounds(file.crs, "EPSG:4326", *file.bounds)
                np.testing.assert_allclose(item["bbox"], bounds, atol=1e-5)
    properties = item["properties"]
    card = api.get(f"/models/{properties['pimc:model']}").json()
    assert properties["mlm:name"] == card["name"]
    assert properties["pimc:sources"] == [source.name for source in stack]
    assert properties["pimc:dates_used"] == DAYS
    digest = item["assets"]["model"]["href"].removeprefix("ni:///sha-256;")
    assert base64.urlsafe_b64decode(digest + "=").hex() == card["sha256"]


def test_classes_and_forecasts_are_described(api: httpx.Client, stack: list[SourceFile]) -> None:
    with zipped(api, stack, "classify-pixels") as archive:
        item = json.loads(archive.read("item.json"))
    classes = item["assets"]["class"]["classification:classes"]
    assert [c["title"] for c in classes] == list(CLASSES)
    assert classes[0]["color_hint"] == "112233"
    assert item["properties"]["start_datetime"] == f"{DAYS[0]}T00:00:00Z"
    assert item["properties"]["end_datetime"] == f"{DAYS[-1]}T23:59:59Z"
    with zipped(api, stack, "forecast") as archive:
        properties = json.loads(archive.read("item.json"))["properties"]
    assert properties["forecast:reference_datetime"] == f"{DAYS[-1]}T00:00:00Z"
    assert properties["forecast:horizon"] == "P30D"
    assert properties["start_datetime"] == "2021-06-21T00:00:00Z"
    assert properties["end_datetime"] == "2021-07-11T23:59:59Z"


def test_equal_results_have_equal_items(api: httpx.Client, stack: list[SourceFile]) -> None:
    items = [zipped(api, stack, "classify-pixels").read("item.json") for _ in range(2)]
    assert items[0] == items[1]
    other = json.loads(zipped(api, stack[1:], "classify-pixels").read("item.json"))
    assert other["id"] != json.loads(items[0])["id"]


def test_jobs_are_listed_as_items(api: httpx.Client, stack: list[SourceFile]) -> None:
    accepted = posted(api, stack, "classify-pixels", {"Prefer": "respond-async"})
    point = {"type": "Point", "coordinates": [3.0, 50.0]}
    features = [{"type": "Feature", "geometry": point, "properties": {}}]
    points = json.dumps({"type": "FeatureCollection", "features": features})
    no_raster = posted(api, stack, "classify-pixels", {"Prefer": "respond-async"}, points=points)
    name = waited(api, accepted.json()["jobID"])["jobID"]
    other = waited(api, no_raster.json()["jobID"])["jobID"]
    found = api.get("/jobs", headers={"Accept": GEOJSON})
    assert found.headers["content-type"] == GEOJSON
    listed = found.json()
    assert listed["type"] == "FeatureCollection"
    # Other tests have jobs in the same service.
    (item,) = [one for one in listed["features"] if f"/jobs/{name}/result/" in json.dumps(one)]
    assert f"/jobs/{other}/" not in json.dumps(listed)
    check_item(item, "classification")
    check_collection(listed)
    assert api.get(item["assets"]["class"]["href"]).content[:2] == b"II"
    for asset in item["assets"].values():
        if asset["href"].startswith("/"):
            kept = api.get(asset["href"])
            assert (kept.status_code, kept.headers["content-type"]) == (200, asset["type"])
    assert {"class-style", "class-names"} <= set(item["assets"])
    single = api.get(f"/jobs/{name}/result/item.json")
    assert single.json() == item
    assert api.get(f"/jobs/{other}/result/item.json").json()["code"] == "not_found"
    assert "jobs" in api.get("/jobs").json()
    assert "jobs" in api.get("/jobs", headers={"Accept": "text/html"}).json()


def test_undated_imagery_has_an_item_of_all_times(api: httpx.Client, tmp_path: Path) -> None:
    pixels = np.random.default_rng(3).integers(300, 3000, (4, H, W)).astype(np.uint16)
    bands = ("B02", "B03", "B04", "B08")
    undated = write(tmp_path / "scene.tif", pixels, descriptions=bands, nodata=0)
    with zipped(api, [undated], "landcover") as archive:
        item = json.loads(archive.read("item.json"))
    check_item(item, "classification")
    found = item["properties"]
    assert (found["datetime"], found["pimc:undated"], found["pimc:dates_used"]) == (None, True, [])
    assert found["start_datetime"] < "1959" < "2100" < found["end_datetime"]
    assert "imagery without dates" in found["processing:lineage"]
    job = posted(api, [undated], "landcover", {"Prefer": "respond-async"}).json()["jobID"]
    assert waited(api, job)["status"] == "successful"
    assert api.get(f"/jobs/{job}/result/item.json").json()["id"] == item["id"]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_the_sdk_returns_items(api: httpx.Client, stack: list[SourceFile], kind: str) -> None:
    files = [source.path for source in stack]
    with connected(kind, str(api.base_url)) as client:
        rasters = client.classify_pixels(files, outputs=["class"])
        check_item(dict(rasters.item), "classification")
        job = client.submit("classify-pixels", files)
        job.wait()
        item = job.item()
    check_item(dict(item), "classification")
    assert item["id"] == rasters.item["id"]
    assert item["assets"]["class"]["href"] == f"/jobs/{job.id}/result/class"


def test_every_model_of_the_zoo_is_a_valid_item() -> None:
    paths = sorted(ZOO.glob("*/card.json"))
    assert paths
    for path in paths:
        card = ModelCard.model_validate_json(path.read_text("utf-8"))
        item = model_item(card, f"https://example.org/models/{card.id}")
        check_item(item, "mlm")
        assert item["properties"]["mlm:input"][0]["bands"] == list(card.bands)
        output = item["properties"]["mlm:output"][0]
        assert [c["title"] for c in output.get("classification:classes", [])] == [
            c.name for c in card.classes
        ]


def test_a_model_is_an_item_on_request(api: httpx.Client) -> None:
    card = api.get("/models/forecast-vi")
    assert card.headers["content-type"] == "application/json"
    response = api.get("/models/forecast-vi", headers={"Accept": GEOJSON})
    assert response.headers["content-type"] == GEOJSON
    check_item(response.json(), "mlm")
    assert response.json()["id"] == "forecast-vi@0.0.1"
    unknown = api.get("/models/nothing", headers={"Accept": GEOJSON})
    assert unknown.json()["code"] == "unknown_model"


@pytest.mark.parametrize(
    ("text", "name"),
    [("Tree cover", "Tree-cover"), ("Grass & herbs", "Grass-herbs"), ("Äcker/Wald", "cker-Wald")],
)
def test_names_of_classes_are_words(text: str, name: str) -> None:
    assert class_name(text) == name


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        (UTM, NORTH_UP),
        ("EPSG:3035", Affine.translation(4_000_000, 3_000_000) @ Affine.rotation(20)
         @ Affine.scale(500, -500)),
        ("EPSG:4326", Affine(0.01, 0, 10, 0, -0.01, 40)),
    ],
)  # fmt: skip
def test_a_footprint_holds_the_pixels(crs: str, transform: Affine) -> None:
    grid = Grid(crs=CRS.from_user_input(crs), transform=transform, width=200, height=100)
    geometry, bbox = footprint(grid)
    outline = shape(geometry)
    assert outline.is_valid
    assert tuple(bbox) == pytest.approx(outline.bounds)
    for column, row, inside in ((1, 1, True), (199, 99, True), (100, 50, True), (-3, 50, False)):
        x, y = transform @ (column, row)
        (lon,), (lat,) = rasterio.warp.transform(crs, "EPSG:4326", [x], [y])
        assert outline.contains(Point(lon, lat)) is inside


def test_a_footprint_is_cut_at_the_antimeridian() -> None:
    transform = Affine(1000, 0, 640_000, 0, -1000, 7_000_000)
    grid = Grid(crs=CRS.from_epsg(32660), transform=transform, width=200, height=100)
    geometry, (west, _, east, _) = footprint(grid)
    assert geometry["type"] == "MultiPolygon"
    assert west > 170 > -170 > east
    outline = shape(geometry)
    assert outline.is_valid
    assert outline.bounds[0] == pytest.approx(-180)
    assert outline.bounds[2] == pytest.approx(180)

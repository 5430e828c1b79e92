"""Similarity to places, against plain NumPy on the embeddings that the service returns."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import geopandas
import httpx
import numpy as np
import pytest
import rasterio
from exactextract import exact_extract
from rasterio.crs import CRS
from rio_cogeo import cog_validate
from shapely.geometry import MultiPoint, Point, Polygon
from typer.testing import CliRunner

from benchmarks.serving import served
from benchmarks.tiny_zoo import write_zoo
from models.registry import Registry
from pimc_client import Client
from pimc_client.cli import UsageError, app
from service.errors import InvalidRequest
from service.infer.engine import Engine
from service.read.geotiff import SourceFile
from service.read.layouts import StackOptions
from service.read.stack import open_stack
from service.read.vectors import Fields
from service.run.plan import plan_raster
from service.run.raster import make_work
from service.run.similar import run_similar, similarities, unit
from service.run.similar_places import MAX_BANDS, MAX_PLACES
from service.run.windows import Step, windows
from tests.kits.jobs import ASYNC, waited
from tests.kits.rasters import NORTH_UP, UTM, write

H, W, DATES = 40, 60, 4
BANDS = ("B02", "B04", "B08")


def at(column: float, row: float) -> tuple[float, float]:
    x, y = NORTH_UP @ (column, row)
    return float(x), float(y)


def square(column: float, row: float, side: float) -> Polygon:
    corners = [(column, row), (column + side, row), (column + side, row + side),
               (column, row + side)]  # fmt: skip
    return Polygon([at(*corner) for corner in corners])


PLACES: dict[str, Any] = {
    "point": Point(at(3.5, 4.5)),
    "field": square(10.3, 20.7, 6.4),
    "small": square(40.2, 7.6, 0.3),
    "half outside": square(57, 30, 9),
}
LOST: dict[str, Any] = {
    "cloudy point": Point(at(22.5, 12.5)),
    "cloudy field": square(21, 11, 3),
    "far point": Point(at(-50, 4)),
    "far field": square(200, 200, 5),
    "two points": MultiPoint([at(1, 1), at(2, 2)]),
}


def frame(places: dict[str, Any], crs: Any = UTM) -> geopandas.GeoDataFrame:
    return geopandas.GeoDataFrame(
        {"id": list(places)}, geometry=list(places.values()), crs=UTM
    ).to_crs(crs)


def geojson(places: dict[str, Any]) -> dict[str, Any]:
    found = json.loads(frame(places, "EPSG:4326").set_index("id").to_json(drop_id=False))
    return dict(found)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> list[SourceFile]:
    folder, random = tmp_path_factory.mktemp("stack"), np.random.default_rng(5)
    level = random.uniform(300, 3500, (3, H, W))
    files = []
    for month in range(1, DATES + 1):
        values = (level * random.uniform(0.9, 1.1, (3, H, W))).astype(np.uint16)
        values[:, 10:15, 20:30] = 0  # never seen
        files.append(
            write(folder / f"s_2021-0{month}-01.tif", values, descriptions=BANDS, nodata=0)
        )
    return files


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def engine(zoo: Path) -> Iterator[Engine]:
    with Engine(Registry.load(zoo), providers="cpu") as made:
        yield made


@pytest.fixture(scope="module")
def api(zoo: Path) -> Iterator[httpx.Client]:
    with served(model_dir=zoo) as client:
        yield client


def posted(
    api: httpx.Client, stack: list[SourceFile], task: str = "similar", *,
    headers: dict[str, str] | None = None, file: tuple[str, bytes] | None = None, **data: Any,
) -> httpx.Response:  # fmt: skip
    files: list[Any] = [("files", (s.name, s.path.read_bytes())) for s in stack]
    if file is not None:
        files.append(("fields", file))
    return api.post(f"/{task}", files=files, data=data, headers=headers)


def pixels(content: bytes) -> np.ndarray:
    with rasterio.MemoryFile(content) as memory, memory.open() as file:
        return file.read()


@pytest.fixture(scope="module")
def embeddings(api: httpx.Client, stack: list[SourceFile], tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("embeddings") / "embedding.tif"
    path.write_bytes(posted(api, stack, "embed").content)
    return path


def expected(embeddings: Path, names: Sequence[str] = tuple(PLACES)) -> np.ndarray:
    """Cosines (R, H, W), in float64 by NumPy and exactextract alone."""
    with rasterio.open(embeddings) as file:
        values = file.read().astype(float)
        references = []
        for name in names:
            shape = PLACES[name]
            if isinstance(shape, Point):
                row, column = file.index(shape.x, shape.y)
                references.append(values[:, row, column])
            else:
                one = frame({name: shape})
                found = exact_extract(file, one, ["mean"], output="pandas")
                references.append(found.to_numpy()[0].astype(float))
    reference = np.array(references)
    reference /= np.linalg.norm(reference, axis=1, keepdims=True)
    values /= np.linalg.norm(values, axis=0)
    return np.einsum("rd,dhw->rhw", reference, values)


# Values ---------------------------------------------------------------------------------------


def test_a_map_is_the_cosine_to_the_most_similar_place(
    api: httpx.Client, stack: list[SourceFile], embeddings: Path, tmp_path: Path
) -> None:
    response = posted(
        api, stack, fields=json.dumps(geojson(PLACES)), outputs="similarity,similarities"
    )
    assert response.status_code == 200, response.text
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert sorted(archive.namelist()) == [
            "item.json", "similarities.qml", "similarities.tif", "similarity.qml", "similarity.tif",
        ]  # fmt: skip
        archive.extractall(tmp_path)
        item = json.loads(archive.read("item.json"))
    cosines = expected(embeddings)
    assert np.isnan(cosines).any()
    with rasterio.open(tmp_path / "similarities.tif") as file:
        assert file.descriptions == tuple(PLACES)
        np.testing.assert_allclose(file.read(), cosines, atol=2e-6)
    with rasterio.open(tmp_path / "similarity.tif") as file:
        assert (file.count, file.dtypes, file.descriptions) == (1, ("float32",), ("similarity",))
        assert np.isnan(file.nodata)
        assert (file.transform, file.crs) == (NORTH_UP, CRS.from_string(UTM))
        np.testing.assert_allclose(file.read(1), cosines.max(axis=0), atol=2e-6)
        assert np.nanmax(file.read(1)) <= 1.0
    assert cog_validate(tmp_path / "similarity.tif", strict=True) == (True, [], [])
    assert item["properties"]["title"].startswith("similar by embed-pixel@")
    assert item["properties"]["pimc:parameters"]["similar_to"] == list(PLACES)


@pytest.mark.parametrize(
    ("name", "driver", "crs"),
    [("p.gpkg", "GPKG", "EPSG:3035"), ("p.geojson", "GeoJSON", "EPSG:4326"),
     ("p.parquet", "", "EPSG:3857")],
)  # fmt: skip
def test_places_come_in_any_crs_and_format(
    api: httpx.Client, stack: list[SourceFile], embeddings: Path, tmp_path: Path, name: str,
    driver: str, crs: str,
) -> None:  # fmt: skip
    path = tmp_path / name
    data = frame(PLACES, crs)
    if driver:
        data.to_file(path, driver=driver)
    else:
        data.to_parquet(path)
    response = posted(api, stack, file=(name, path.read_bytes()))
    assert response.status_code == 200, response.text
    # A polygon's edges are straight in its own CRS, so that shares differ a little.
    np.testing.assert_allclose(
        pixels(response.content)[0], expected(embeddings).max(axis=0), atol=1e-3
    )


def test_points_are_as_the_file_of_points(
    api: httpx.Client, stack: list[SourceFile], embeddings: Path
) -> None:
    points = json.dumps(geojson({"point": PLACES["point"]}))
    response = posted(api, stack, points=points)
    assert response.headers["content-type"].startswith("image/tiff")
    cosines = expected(embeddings, ["point"])[0]
    np.testing.assert_allclose(pixels(response.content)[0], cosines, atol=2e-6)
    summary = posted(api, stack, points=points, headers={"Accept": "application/json"}).json()
    assert summary["task"] == "similar"
    assert summary["similarity"] == {
        "mean": pytest.approx(np.nanmean(cosines)), "min": pytest.approx(np.nanmin(cosines)),
        "max": pytest.approx(1.0),
    }  # fmt: skip
    assert summary["places"] == [{"id": "point", "status": "ok"}]


def test_windows_do_not_show(engine: Engine, stack: list[SourceFile], tmp_path: Path) -> None:
    model = engine.models["embed-pixel"]
    opened = open_stack(stack, StackOptions(), bands=model.card.bands, dated=True, max_bytes=2**40)
    outputs = ("similarity", "similarities")
    run = plan_raster(model, opened, outputs=outputs, similar_to=tuple(PLACES))
    places = Fields(
        ids=tuple(PLACES), properties=({},) * len(PLACES),
        shapes=np.array(list(PLACES.values()), object), crs=CRS.from_string(UTM), warnings=(),
    )  # fmt: skip
    found = []
    for name, size in (("whole", 2**40), ("parts", 8000)):
        (tmp_path / name).mkdir()
        found.append(run_similar(make_work(run, tmp_path / name, window_bytes=size), places))
    assert len(windows(opened.grid, opened.block, run.pixel_bytes, 8000)) > 10
    for output in outputs:
        with (
            rasterio.open(found[0].files[output]) as one,
            rasterio.open(found[1].files[output]) as many,
        ):
            np.testing.assert_allclose(many.read(), one.read(), atol=1e-6)
    assert found[0].summary["valid_share"] == found[1].summary["valid_share"]


def test_a_run_that_starts_again_reads_only_what_is_missing(
    engine: Engine, stack: list[SourceFile], tmp_path: Path
) -> None:
    model = engine.models["embed-pixel"]
    opened = open_stack(stack, StackOptions(), bands=model.card.bands, dated=True, max_bytes=2**40)
    run = plan_raster(model, opened, outputs=("similarity",), similar_to=("field",))
    places = Fields(
        ids=("field",), properties=({},), shapes=np.array([PLACES["field"]], object),
        crs=CRS.from_string(UTM), warnings=(),
    )  # fmt: skip

    class Journal:
        """Keeps every window but the last ones."""

        def __init__(self) -> None:
            self.kept: dict[tuple[str, int], Any] = {}
            self.saved: list[tuple[str, int]] = []

        def load(self, step: Step) -> Any:
            return self.kept.get((step.stage, step.number))

        def save(self, step: Step, arrays: Any) -> None:
            self.saved.append((step.stage, step.number))
            self.kept[step.stage, step.number] = arrays

    journal = Journal()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    work = make_work(run, tmp_path / "a", journal=journal, window_bytes=8000)
    whole = run_similar(work, places)
    assert {stage for stage, _ in journal.saved} == {"fields", "similarities"}
    last = journal.saved[-3:]
    journal.kept = {key: value for key, value in journal.kept.items() if key not in last}
    journal.saved = []
    work = make_work(run, tmp_path / "b", journal=journal, window_bytes=8000)
    again = run_similar(work, places)
    assert journal.saved == last
    assert again.files["similarity"].read_bytes() == whole.files["similarity"].read_bytes()
    assert again.summary == whole.summary


def test_a_job_has_the_same_file(api: httpx.Client, stack: list[SourceFile]) -> None:
    for data in ({"fields": json.dumps(geojson(PLACES))},
                 {"points": json.dumps(geojson({"point": PLACES["point"]}))}):  # fmt: skip
        info = posted(api, stack, headers=ASYNC, **data).json()
        assert info["processID"] == "similar"
        assert waited(api, info["jobID"])["status"] == "successful"
        result = f"/jobs/{info['jobID']}/result"
        assert api.get(result).content == posted(api, stack, **data).content
        assert api.get(f"{result}/similarity").status_code == 200
        assert api.get(f"{result}/item.json").json()["id"].startswith("similar-embed-pixel-")


def test_cosines_of_short_and_missing_vectors() -> None:
    vectors = np.array([[3, 4], [0, 0], [np.nan, 1], [-6, -8], [4, -3]], np.float32)
    found = similarities(vectors, unit(np.array([[30, 40]], np.float32)), per_place=True)
    np.testing.assert_allclose(
        found, [[1, 1], [np.nan] * 2, [np.nan] * 2, [-1, -1], [0, 0]], atol=1e-7
    )
    many = np.random.default_rng(0).normal(size=(9000, 5)).astype(np.float32)
    apart = np.concatenate(
        [similarities(m, unit(many[:3]), per_place=False) for m in many[:, None]]
    )
    np.testing.assert_allclose(
        similarities(many, unit(many[:3]), per_place=False), apart, atol=1e-6
    )


# Places that cannot be compared with ----------------------------------------------------------


def test_places_without_an_embedding_are_named(
    api: httpx.Client, stack: list[SourceFile], embeddings: Path, tmp_path: Path
) -> None:
    path = tmp_path / "places.gpkg"
    frame({**LOST, **PLACES}).to_file(path, driver="GPKG")
    given = geojson({**LOST, **PLACES})
    response = posted(
        api, stack, fields=json.dumps(given), headers={"Accept": "application/json"}
    ).json()
    statuses = {place["id"]: place["status"] for place in response["places"]}
    assert statuses == {
        "cloudy point": "no_data", "cloudy field": "no_data", "far point": "outside",
        "far field": "outside", "two points": "invalid", **dict.fromkeys(PLACES, "ok"),
    }  # fmt: skip
    (warning,) = [w["detail"] for w in response["warnings"] if w["code"] == "places_unused"]
    for name in LOST:
        assert f"'{name}'" in warning
    each = posted(api, stack, fields=json.dumps(given), outputs="similarities")
    np.testing.assert_allclose(pixels(each.content), expected(embeddings), atol=2e-6)


def test_without_any_embedding_the_request_is_rejected(
    api: httpx.Client, stack: list[SourceFile]
) -> None:
    fields = json.dumps(geojson(LOST))
    response = posted(api, stack, fields=fields)
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
    for name in LOST:
        assert f"'{name}'" in response.json()["detail"]
    job = posted(api, stack, fields=fields, headers=ASYNC).json()["jobID"]
    info = waited(api, job)
    assert (info["status"], info["message"]) == ("failed", response.json()["detail"])


@pytest.mark.parametrize("kind", ["neither", "both"])
def test_places_are_points_or_fields(api: httpx.Client, stack: list[SourceFile], kind: str) -> None:
    points = json.dumps(geojson({"point": PLACES["point"]}))
    data = {} if kind == "neither" else {"points": points, "fields": points}
    response = posted(api, stack, **data)
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")


@pytest.mark.parametrize(
    ("count", "outputs"), [(MAX_PLACES + 1, "similarity"), (MAX_BANDS + 1, "similarities")]
)
def test_too_many_places_are_rejected(
    api: httpx.Client, stack: list[SourceFile], count: int, outputs: str
) -> None:
    points = geojson({str(n): Point(at(3.5, 4.5)) for n in range(count)})
    response = posted(api, stack, points=json.dumps(points), outputs=outputs)
    assert (response.status_code, response.json()["errors"][0]["field"]) == (422, "points")
    assert str(count) in response.json()["detail"]


def test_other_models_are_rejected(api: httpx.Client, stack: list[SourceFile]) -> None:
    points = json.dumps(geojson({"point": PLACES["point"]}))
    for model in ("embed-patch", "forecast-vi"):
        response = posted(api, stack, points=points, model=model)
        assert (response.status_code, response.json()["code"]) == (422, "wrong_task")


def test_a_file_without_points_and_polygons_is_rejected(
    api: httpx.Client, stack: list[SourceFile]
) -> None:
    nothing = {"type": "FeatureCollection", "features": []}
    response = posted(api, stack, fields=json.dumps(nothing))
    assert (response.status_code, response.json()["code"]) == (422, "invalid_fields")


def test_a_request_is_validated_without_running(api: httpx.Client, stack: list[SourceFile]) -> None:
    points = json.dumps(geojson({"point": PLACES["point"]}))
    found = posted(api, stack, "validate?task=similar", points=points).json()
    assert (found["valid"], found["estimate"]["pixels"]) == (True, H * W)


# SDK ------------------------------------------------------------------------------------------


def test_the_sdk_compares(
    api: httpx.Client, stack: list[SourceFile], embeddings: Path, tmp_path: Path
) -> None:
    paths = [source.path for source in stack]
    gpkg = tmp_path / "places.gpkg"
    frame(PLACES).to_file(gpkg, driver="GPKG")
    (lon, lat) = geojson({"p": PLACES["point"]})["features"][0]["geometry"]["coordinates"]
    with Client(str(api.base_url)) as pimc:
        raster = pimc.similar(paths, fields=gpkg)
        assert raster.name == "similarity"
        np.testing.assert_allclose(raster.array, expected(embeddings).max(axis=0), atol=1e-5)
        both = pimc.similar(paths, points=[(lon, lat)], outputs=["similarity", "similarities"])
        assert list(both) == ["similarity", "similarities"]
        job = pimc.submit("similar", paths, points=[(lon, lat)])
        np.testing.assert_array_equal(job.wait().array, both["similarity"].array)
        assert pimc.similar(paths, points=[(lon, lat)], answer="summary")["task"] == "similar"
        with pytest.raises(ValueError, match="either points or fields"):
            pimc.similar(paths)


def test_run_similar_names_what_is_missing(
    engine: Engine, stack: list[SourceFile], tmp_path: Path
) -> None:
    model = engine.models["embed-pixel"]
    opened = open_stack(stack, StackOptions(), bands=model.card.bands, dated=True, max_bytes=2**40)
    run = plan_raster(model, opened, outputs=("similarity",), similar_to=("x",))
    places = Fields(
        ids=("x",), properties=({},), shapes=np.array([LOST["far point"]], object),
        crs=CRS.from_string(UTM), warnings=(),
    )  # fmt: skip
    with pytest.raises(InvalidRequest, match="'x' outside the raster"):
        run_similar(make_work(run, tmp_path), places)
    assert list(tmp_path.iterdir()) == []


def test_results_by_ogc_are_links_to_the_rasters(
    api: httpx.Client, stack: list[SourceFile]
) -> None:
    points = json.dumps(geojson({"point": PLACES["point"]}))
    job = posted(api, stack, headers=ASYNC, points=points).json()["jobID"]
    assert waited(api, job)["status"] == "successful"
    response = api.get(f"/jobs/{job}/results")
    assert response.status_code == 200, response.text
    assert set(response.json()) == {"similarity", "summary"}


def run(api: httpx.Client, *words: str) -> Any:
    """The command `pimc`, with the service of the test."""
    return CliRunner().invoke(app, ["--url", str(api.base_url), "similar", *words])


@pytest.mark.slow
def test_the_command_compares(
    api: httpx.Client, stack: list[SourceFile], embeddings: Path, tmp_path: Path
) -> None:
    gpkg, points = tmp_path / "places.gpkg", tmp_path / "points.geojson"
    frame(PLACES).to_file(gpkg, driver="GPKG")
    points.write_text(json.dumps(geojson({"point": PLACES["point"]})))
    files, out = [str(source.path) for source in stack], tmp_path / "similarity.tif"
    done = run(api, *files, "--fields", str(gpkg), "-o", str(out))
    assert done.exit_code == 0, done.output
    np.testing.assert_allclose(
        pixels(out.read_bytes())[0], expected(embeddings).max(axis=0), atol=1e-5
    )
    names = "similarity,similarities"
    done = run(api, *files, "--points", str(points), "--output", names, "-o", str(tmp_path / "m"))
    assert done.exit_code == 0, done.output
    assert {"similarity.tif", "similarities.tif"} <= {p.name for p in (tmp_path / "m").iterdir()}
    done = run(api, *files, "--points", str(points), "--job")
    assert done.exit_code == 0, done.output
    job = done.stdout.split()[0]
    assert waited(api, job)["processID"] == "similar"
    for wrong in ([], ["--points", str(points)], ["--points", str(points), "--job", "-o", "x.tif"]):
        assert isinstance(run(api, *files, *wrong).exception, UsageError)

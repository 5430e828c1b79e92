"""Every endpoint over a real socket, checked against numpy and plain rasterio."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import rasterio
import rasterio.warp
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.serving import served
from benchmarks.tiny_zoo import CLASSES, HORIZON, SHARPNESS, SPREAD, STEP, write_zoo
from service.api.responses import COG, GEOJSON, ZIP
from tests.kits.patience import PATIENCE
from tests.kits.rasters import NORTH_UP, UTM, write

DATES = ("2021-03-01", "2021-04-01", "2021-05-01", "2021-06-01")
BANDS = ("B02", "B03", "B04", "B08", "SCL")
HEIGHT, WIDTH = 70, 90
CLOUD, CLEAR = 9, 4


@dataclass(frozen=True)
class Scene:
    """A stack with a file a date, and what it holds."""

    values: np.ndarray
    """(T, 4, H, W) reflectance of B02, B03, B04, B08."""
    clear: np.ndarray
    """(T, H, W)."""
    paths: list[Path] = field(default_factory=list)

    def files(self, *names: str) -> list[tuple[str, Any]]:
        called = names or tuple(path.name for path in self.paths)
        return [
            ("files", (name, path.read_bytes(), "image/tiff"))
            for name, path in zip(called, self.paths, strict=True)
        ]

    def mean(self, *bands: int) -> np.ndarray:
        """Mean over the clear dates (len(bands), H, W), NaN under fewer than two."""
        count = self.clear.sum(axis=0)
        total = np.where(self.clear[:, None], self.values, 0).sum(axis=0)
        return np.where(count >= 2, total / np.maximum(count, 1), np.nan)[list(bands)]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("stack")
    rng = np.random.default_rng(7)
    stored = rng.integers(300, 4000, (4, 4, HEIGHT, WIDTH)).astype(np.uint16)
    scl = np.full((4, 1, HEIGHT, WIDTH), CLEAR, np.uint16)
    scl[0, :, :20, :20] = CLOUD  # one date clouded
    scl[1:, :, :5, :5] = CLOUD  # and here only one or none is left
    paths = []
    for number, day in enumerate(DATES):
        path = folder / f"scene_{day}.tif"
        bands = np.concatenate([stored[number], scl[number]])
        write(path, bands, descriptions=BANDS, nodata=0)
        paths.append(path)
    values = stored.astype(np.float64) * 1e-4
    return Scene(values=values, clear=(scl == CLEAR)[:, 0], paths=paths)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with served(model_dir=write_zoo(tmp_path_factory.mktemp("zoo"))) as client:
        yield client


@contextmanager
def opened(content: bytes) -> Iterator[Any]:
    with rasterio.MemoryFile(content) as file, file.open() as raster:
        yield raster


def softmax(mean: np.ndarray) -> np.ndarray:
    grown = np.exp(SHARPNESS * (mean - mean.max(axis=0)))
    return grown / grown.sum(axis=0)


def expected_classes(scene: Scene) -> np.ndarray:
    mean = scene.mean(0, 2, 3)
    return np.where(np.isnan(mean[0]), 255, np.nan_to_num(mean).argmax(axis=0))


def lonlat(rows: list[int], cols: list[int]) -> list[tuple[float, float]]:
    """The middles of pixels, in degrees."""
    xs, ys = zip(
        *(NORTH_UP * (c + 0.5, r + 0.5) for r, c in zip(rows, cols, strict=True)), strict=True
    )
    return list(zip(*rasterio.warp.transform(UTM, "EPSG:4326", xs, ys), strict=True))


# Rasters ------------------------------------------------------------------------------------


def test_a_class_for_every_pixel(api: httpx.Client, scene: Scene) -> None:
    response = api.post("/classify-pixels", files=scene.files())
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == COG
    assert response.headers["content-disposition"] == 'attachment; filename="class.tif"'
    assert response.headers["PIMC-Model"] == "pixels-landcover@0.0.1"
    assert response.headers["PIMC-Provider"] == "CPUExecutionProvider"
    assert re.fullmatch(
        r"read;dur=\d+\.\d, infer;dur=\d+\.\d, write;dur=\d+\.\d", response.headers["Server-Timing"]
    )
    # Four dates of one spring.
    assert response.headers["PIMC-Warning"].startswith("partial_season; ")
    with opened(response.content) as raster:
        assert raster.crs == UTM
        assert raster.transform == NORTH_UP
        assert raster.nodata == 255
        found = raster.read(1)
    np.testing.assert_array_equal(found, expected_classes(scene))
    assert (found == 255).sum() == 25


@pytest.mark.parametrize(
    "outputs",
    [
        {"outputs": "class,confidence, entropy,probabilities"},
        {"outputs": ["class", "confidence", "entropy", "probabilities"]},
        {"outputs": ["class,confidence", "entropy,probabilities", "class"]},
    ],
)
def test_several_outputs_are_a_zip(
    api: httpx.Client, scene: Scene, outputs: dict[str, Any]
) -> None:
    response = api.post("/classify-pixels", files=scene.files(), data=outputs)
    assert response.headers["content-type"] == ZIP, response.text
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        tiffs = {name for name in archive.namelist() if name.endswith(".tif")}
        assert tiffs == {"class.tif", "confidence.tif", "entropy.tif", "probabilities.tif"}
        expected = softmax(scene.mean(0, 2, 3))
        with opened(archive.read("probabilities.tif")) as raster:
            assert raster.descriptions == CLASSES
            np.testing.assert_allclose(raster.read(), expected, rtol=1e-4, atol=1e-6)
        with opened(archive.read("confidence.tif")) as raster:
            confident = expected.max(axis=0)
            np.testing.assert_allclose(raster.read(1), confident, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("task", ["classify-pixels", "forecast", "landcover", "embed"])
def test_one_output_is_a_zip_if_accept_says_so(api: httpx.Client, scene: Scene, task: str) -> None:
    response = api.post(f"/{task}", files=scene.files(), headers={"Accept": ZIP})
    assert response.headers["content-type"] == ZIP
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.testzip() is None
        assert len([name for name in archive.namelist() if name.endswith(".tif")]) == 1


def test_a_summary_counts_the_pixels_of_the_raster(api: httpx.Client, scene: Scene) -> None:
    accept = {"Accept": "application/json"}
    response = api.post("/classify-pixels", files=scene.files(), headers=accept)
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    classes = expected_classes(scene)
    assert [row["pixels"] for row in body["classes"]] == [
        int((classes == value).sum()) for value in range(3)
    ]
    assert sum(row["hectares"] for row in body["classes"]) == pytest.approx(
        (classes != 255).sum() / 100, rel=1e-3
    )
    assert body["model"] == "pixels-landcover@0.0.1"
    assert body["provider"] == "CPUExecutionProvider"
    assert body["dates_used"] == list(DATES)
    assert body["start"] == "2021-01-01"
    assert body["layout"] == "file-per-date"
    assert [warning["code"] for warning in body["warnings"]] == ["partial_season"]


def test_a_forecast_names_index_date_and_quantile(api: httpx.Client, scene: Scene) -> None:
    fields = {"horizon": "2", "outputs": "q10,q90"}
    response = api.post("/forecast", files=scene.files(), data=fields)
    assert response.status_code == 200, response.text
    days = [date(2021, 6, 1) + timedelta(days=10 * step) for step in (1, 2)]
    with opened(response.content) as raster:
        assert list(raster.descriptions) == [
            f"{index}_{day}_{quantile}"
            for index in ("NDVI", "EVI", "SAVI")
            for day in days
            for quantile in ("q10", "q90")
        ]
        found = raster.read()
    mean = scene.mean(0, 2, 3)
    expected = [
        mean[index] + STEP * step + side * SPREAD
        for index in range(3)
        for step in (1, 2)
        for side in (-1, 1)
    ]
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-6)


@pytest.mark.parametrize(("stride", "rows", "cols"), [(None, 1, 1), ("16", 1, 2), ("2", 4, 14)])
def test_land_cover_on_a_coarser_grid(
    api: httpx.Client, scene: Scene, stride: str | None, rows: int, cols: int
) -> None:
    fields = {"stride": stride} if stride else {}
    response = api.post("/landcover", files=scene.files(), data=fields)
    assert response.status_code == 200, response.text
    step = int(stride or 64)
    with opened(response.content) as raster:
        assert (raster.height, raster.width) == (rows, cols)
        assert raster.transform.a == 10 * step
        assert (raster.transform.c, raster.transform.f) == (NORTH_UP.c, NORTH_UP.f)


def test_embeddings_of_pixels_and_patches(api: httpx.Client, scene: Scene) -> None:
    pixels = api.post("/embed", files=scene.files())
    with opened(pixels.content) as raster:
        np.testing.assert_allclose(raster.read(), scene.mean(0, 2, 3), atol=1e-6)
    requests: list[dict[str, Any]] = [
        {"data": {"modality": "patch"}},
        {"params": {"modality": "patch"}},
        {"params": {"modality": "patch"}, "data": {"modality": "patch"}},
        {"data": {"model": "embed-patch@0.0.1"}},
    ]
    for how in requests:
        patches = api.post("/embed", files=scene.files(), **how)
        assert patches.headers["PIMC-Model"] == "embed-patch@0.0.1", patches.text
        with opened(patches.content) as raster:
            assert (raster.count, raster.height, raster.width) == (3, 1, 1)


def test_parameters_state_what_the_files_do_not(
    api: httpx.Client, scene: Scene, tmp_path: Path
) -> None:
    bare = []
    for number, path in enumerate(scene.paths):
        with rasterio.open(path) as full:
            bands = full.read()
        source = write(tmp_path / f"{number}.tif", bands, nodata=0)
        bare.append(("files", (source.name, source.path.read_bytes())))
    for fields in (
        {"dates": ",".join(DATES), "bands": ",".join(BANDS), "layout": "file-per-date"},
        {"dates": list(DATES), "bands": list(BANDS), "mask": "scl", "scale": "0.0001"},
    ):
        response = api.post("/classify-pixels", files=bare, data=fields)
        assert response.status_code == 200, response.text
        with opened(response.content) as raster:
            np.testing.assert_array_equal(raster.read(1), expected_classes(scene))


def test_empty_parameters_count_as_not_given(api: httpx.Client, scene: Scene) -> None:
    empty = dict.fromkeys(["model", "dates", "bands", "scale", "outputs", "points", "start"], "")
    assert api.post("/classify-pixels", files=scene.files(), data=empty).status_code == 200


# Points and series --------------------------------------------------------------------------


def collection(places: list[tuple[float, float]]) -> dict[str, Any]:
    features = [
        {
            "type": "Feature",
            "id": number,
            "geometry": {"type": "Point", "coordinates": list(place)},
            "properties": {"field": f"f{number}"},
        }
        for number, place in enumerate(places)
    ]
    return {"type": "FeatureCollection", "features": features}


@pytest.mark.parametrize("accept", ["*/*", "application/json", GEOJSON])
def test_results_of_points_are_in_order(api: httpx.Client, scene: Scene, accept: str) -> None:
    rows, cols = [40, 2, 60], [50, 2, 10]
    places = [*lonlat(rows, cols), (0.0, 0.0)]
    response = api.post(
        "/classify-pixels",
        files=scene.files(),
        data={"points": json.dumps(collection(places))},
        headers={"Accept": accept},
    )
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == GEOJSON
    body = response.json()
    assert body["type"] == "FeatureCollection"
    found = [feature["properties"] for feature in body["features"]]
    assert [one["field"] for one in found] == ["f0", "f1", "f2", "f3"]
    assert [feature["id"] for feature in body["features"]] == [0, 1, 2, 3]
    assert body["features"][0]["geometry"]["coordinates"] == pytest.approx(places[0])
    assert [one["status"] for one in found] == ["ok", "no_data", "ok", "outside"]
    classes = expected_classes(scene)
    assert found[0]["value"] == classes[40, 50]
    assert found[2]["class"] == CLASSES[classes[60, 10]]
    assert found[0]["confidence"] == pytest.approx(
        softmax(scene.mean(0, 2, 3))[:, 40, 50].max(), rel=1e-4
    )
    assert "class" not in found[1]
    assert "class" not in found[3]


def test_points_may_be_sent_as_a_file(api: httpx.Client, scene: Scene) -> None:
    text = json.dumps(collection(lonlat([40], [50])))
    files = [*scene.files(), ("points", ("points.geojson", text, GEOJSON))]
    response = api.post("/embed", files=files)
    assert response.status_code == 200, response.text
    (feature,) = response.json()["features"]
    np.testing.assert_allclose(
        feature["properties"]["embedding"], scene.mean(0, 2, 3)[:, 40, 50], atol=1e-6
    )


def series(**extra: Any) -> dict[str, Any]:
    one = {
        "id": "field-7",
        "dates": ["2021-01-05", "2021-01-15", "2021-02-05"],
        "B02": [0.05, None, 0.07],
        "B04": [0.07, 0.06, 0.09],
        "B08": [0.31, 0.33, 0.35],
    }
    return {"series": [one, {**one, "id": "too cloudy", "B04": [None, None, 0.1]}], **extra}


def test_series_are_classified(api: httpx.Client) -> None:
    response = api.post("/classify-pixels", json=series(start="2021-01-01"))
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["PIMC-Model"] == "pixels-landcover@0.0.1"
    assert "Server-Timing" in response.headers
    body = response.json()
    assert body["model"] == "pixels-landcover@0.0.1"
    first, second = body["results"]
    assert (first["id"], first["status"], first["class"]) == ("field-7", "ok", "third")
    # The second date lacks a band, so two dates count.
    expected = softmax(np.array([0.06, 0.08, 0.33]))
    assert list(first["probabilities"].values()) == pytest.approx(list(expected), rel=1e-4)
    assert (second["id"], second["status"]) == ("too cloudy", "no_data")


def test_series_are_forecast_and_embedded(api: httpx.Client) -> None:
    ahead = api.post("/forecast", json=series(horizon=2)).json()["results"][0]
    assert ahead["dates"] == ["2021-02-15", "2021-02-25"]
    assert set(ahead["NDVI"]) == {"q10", "q50", "q90"}
    assert ahead["SAVI"]["q50"] == pytest.approx([0.33 + STEP, 0.33 + 2 * STEP], rel=1e-4)
    assert len(api.post("/forecast", json=series()).json()["results"][0]["dates"]) == HORIZON
    embedded = api.post("/embed", json=series(modality="pixel")).json()["results"][0]
    assert embedded["embedding"] == pytest.approx([0.06, 0.08, 0.33], rel=1e-4)


# Warnings -----------------------------------------------------------------------------------


def test_each_warning_is_stated_once_in_headers_and_in_json(
    api: httpx.Client, scene: Scene
) -> None:
    days = ["2019-03-01", "2021-04-01", "2021-05-01", "2021-05-01"]
    fields = {"dates": ",".join(days)}
    raster = api.post("/classify-pixels", files=scene.files(), data=fields)
    assert raster.status_code == 200, raster.text
    warnings = raster.headers.get_list("PIMC-Warning")
    codes = [text.partition("; ")[0] for text in warnings]
    assert sorted(codes) == [
        "dates_contradicted",
        "dates_outside_window",
        "merged_dates",
        "partial_season",
    ]
    summary = api.post(
        "/classify-pixels",
        files=scene.files(),
        data=fields,
        headers={"Accept": "application/json"},
    )
    assert [f"{w['code']}; {w['detail']}" for w in summary.json()["warnings"]] == warnings
    assert "PIMC-Warning" not in summary.headers


# Requests -----------------------------------------------------------------------------------


def test_a_hostile_file_name_stays_a_label(api: httpx.Client, scene: Scene) -> None:
    names = [f"../../etc/{day}\x07<b>é雪.tif" for day in DATES]
    good = api.post("/classify-pixels", files=scene.files(*names))
    assert good.status_code == 200, good.text
    broken = [("files", ("..\\..\\windows/ünï.tif", b"no tiff at all"))]
    response = api.post("/classify-pixels", files=broken)
    assert response.json()["code"] == "not_a_geotiff"
    assert "'windows/ünï.tif'" in response.json()["detail"]


def test_every_response_has_an_id_and_security_headers(api: httpx.Client, scene: Scene) -> None:
    for response in (
        api.get("/health/live", headers={"X-Request-ID": "mine-1"}),
        api.get("/nowhere", headers={"X-Request-ID": "mine-1"}),
        api.post("/embed", files=scene.files(), headers={"X-Request-ID": "mine-1"}),
    ):
        assert response.headers["X-Request-ID"] == "mine-1"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
    made = api.get("/health/live", headers={"X-Request-ID": "bad id"}).headers["X-Request-ID"]
    assert re.fullmatch(r"[0-9a-f]{32}", made)


# The rest -----------------------------------------------------------------------------------


def test_models_and_their_cards(api: httpx.Client) -> None:
    body = api.get("/models").json()
    assert body["defaults"] == {
        "classify-pixels": "pixels-landcover",
        "forecast": "forecast-vi",
        "landcover": "landcover-eurosat",
        "embed": "embed-pixel",
        "embed-patch": "embed-patch",
    }
    listed = {card["name"]: card for card in body["models"]}
    assert set(body["defaults"].values()) < set(listed)
    for reference in ("forecast-vi", "forecast-vi@0.0.1"):
        card = api.get(f"/models/{reference}").json()
        assert card == listed["forecast-vi"]
        assert card["window"] == {"steps": 36, "step_days": 10, "start": "last-steps"}
        assert card["horizon"] == HORIZON
    for reference in ("nobody", "forecast-vi@9.9.9"):
        assert api.get(f"/models/{reference}").json()["code"] == "unknown_model"


def test_the_service_is_live_and_ready(api: httpx.Client) -> None:
    assert api.get("/health/live").json() == {"status": "live"}
    ready = api.get("/health/ready")
    assert ready.status_code == 200
    body = ready.json()
    assert body["provider"] == "CPUExecutionProvider"
    assert "forecast-vi@0.0.1" in body["models"]
    assert body["refused"] == {}


def test_metrics_count_what_was_served(api: httpx.Client, scene: Scene) -> None:
    def counts() -> dict[str, float]:
        text = api.get("/metrics").text
        samples = [s for f in text_string_to_metric_families(text) for s in f.samples]
        return {
            "requests": sum(
                s.value
                for s in samples
                if s.name == "pimc_requests_total"
                and s.labels == {"route": "/embed", "method": "POST", "status": "200"}
            ),
            "pixels": sum(
                s.value
                for s in samples
                if s.name == "pimc_pixels_total" and s.labels["task"] == "embed"
            ),
            "provider": sum(
                s.value
                for s in samples
                if s.name == "pimc_provider_info" and s.labels["provider"] == "CPUExecutionProvider"
            ),
            "in flight": sum(
                s.value
                for s in samples
                if s.name in {"pimc_windows_in_flight", "pimc_runs_in_flight"}
            ),
        }

    before = counts()
    assert api.post("/embed", files=scene.files()).status_code == 200
    after = counts()
    assert after["requests"] == before["requests"] + 1
    assert after["pixels"] == before["pixels"] + HEIGHT * WIDTH
    assert after["provider"] == 1
    assert after["in flight"] == 0


def test_the_home_page_leads_a_browser_to_the_documentation(api: httpx.Client) -> None:
    page = api.get("/", headers={"Accept": "text/html"})
    assert page.headers["content-type"].startswith("text/html")
    for path in re.findall(r'(?:href|src)="([^":]+)"', page.text):
        assert api.get(path).status_code == 200, path


@pytest.mark.slow
def test_the_command_serves_and_logs_json(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "service"],
        cwd=Path(__file__).parents[1],
        env={
            **os.environ,
            "PIMC_PORT": "0",
            "PIMC_PROVIDERS": "cpu",
            "PIMC_MODEL_DIR": str(write_zoo(tmp_path)),
            "PIMC_STATE_DIR": str(tmp_path / "state"),
            "PIMC_MISSPELT": "1",
        },
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    lines: list[dict[str, Any]] = []
    try:
        for text in process.stderr:
            lines.append(json.loads(text))
            running = re.search(r"running on (http://127\.0\.0\.1:\d+)", lines[-1]["message"])
            if running:
                break
        else:
            pytest.fail("it ended before it served")
        response = httpx.get(
            f"{running[1]}/models/nobody", headers={"X-Request-ID": "mine"}, timeout=PATIENCE
        )
        assert response.status_code == 404
    finally:
        process.terminate()
        rest, _ = process.communicate(timeout=PATIENCE)[::-1]
    lines += [json.loads(text) for text in rest.splitlines()]
    (line,) = [line for line in lines if line.get("request_id") == "mine"]
    assert (line["route"], line["status"], line["level"]) == ("/models/{name}", 404, "info")
    assert any("PIMC_MISSPELT" in line["message"] for line in lines)
    assert any(line["logger"].startswith("uvicorn") for line in lines)


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "$ref":
                yield value
            else:
                yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_the_openapi_document_is_complete_and_correct(api: httpx.Client) -> None:
    document = api.get("/openapi.json").json()
    for reference in references(document):
        node: Any = document
        for step in reference.removeprefix("#/").split("/"):
            node = node[step]
    for task in ("classify-pixels", "forecast", "landcover", "embed"):
        route = document["paths"][f"/{task}"]["post"]
        bodies = route["requestBody"]["content"]
        assert "application/json" in bodies
        form = document["components"]["schemas"][
            bodies["multipart/form-data"]["schema"]["$ref"].rpartition("/")[2]
        ]
        assert form["required"] == ["files"]
        assert {"files", "model", "layout", "dates", "bands", "scale", "points"} <= set(
            form["properties"]
        )
        assert form["properties"]["dates"]["minItems"] == 1
        assert [kind["type"] for kind in form["properties"]["offset"]["anyOf"]] == [
            "number",
            "string",
        ]
        assert '"null"' not in json.dumps(form)
        offered = {COG, ZIP, GEOJSON, "application/json", "text/csv"}
        offered.add("application/vnd.apache.parquet")
        assert set(route["responses"]["200"]["content"]) == offered
        for status in ("401", "404", "406", "413", "415", "422", "500", "503", "507"):
            content = route["responses"][status]["content"]
            assert set(content) == {"application/problem+json"}

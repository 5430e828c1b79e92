"""Validation: the outcome of a request without its run, against the request itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import pytest
from rasterio.warp import transform_geom
from rasterio.windows import Window
from typer.testing import CliRunner

from benchmarks.serving import served
from benchmarks.tiny_zoo import write_zoo
from pimc_client.cli import app
from pimc_client.inputs import Series
from service.infer.model import LoadedModel
from service.read.geotiff import SourceFile
from service.run.memory import MemoryBudget
from service.run.pixels import PixelStages
from service.run.validate import Validation, rough_pace
from service.telemetry import Metrics
from tests.kits.client import connected
from tests.kits.marks import in_all_tests
from tests.kits.metrics import metric
from tests.kits.rasters import NORTH_UP, UTM, write

H, W, DATES = 70, 66, 5
BANDS = ("B02", "B03", "B04", "B08")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> list[SourceFile]:
    folder, random = tmp_path_factory.mktemp("stack"), np.random.default_rng(2)
    files = []
    for month in range(1, DATES + 1):
        values = random.integers(300, 3000, (4, H, W)).astype(np.uint16)
        name = f"s_2021-0{month}-01.tif"
        files.append(write(folder / name, values, descriptions=BANDS, nodata=0))
    return files


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    zoo = write_zoo(tmp_path_factory.mktemp("zoo"))
    with served(model_dir=zoo, sync_max_pixels=H * W) as client:
        yield client


def post(
    api: httpx.Client, path: str, stack: list[SourceFile], accept: str = "", **data: Any
) -> httpx.Response:
    files = [("files", (s.name, s.path.read_bytes())) for s in stack]
    headers = {"Accept": accept} if accept else {}
    return api.post(path, files=files, data=data, headers=headers)


@pytest.mark.parametrize("task", ["classify-pixels", "forecast", "landcover", "embed"])
def test_a_valid_request_has_the_warnings_of_its_run(
    api: httpx.Client, stack: list[SourceFile], task: str
) -> None:
    found = post(api, f"/validate?task={task}", stack).json()
    assert found["valid"], found
    summary = post(api, f"/{task}", stack, accept="application/json").json()
    assert found["warnings"] == summary["warnings"]
    assert found["model"] == summary["model"]
    estimate = found["estimate"]
    assert estimate["pixels"] == H * W
    assert estimate["dates"] == len(summary["dates_used"])
    # Three bands as float32 and one byte of validity.
    assert estimate["read_bytes"] == H * W * DATES * 13
    assert estimate["memory_bytes"] > 0
    assert estimate["becomes_a_job"] is False


CORNERS = [(60, 2), (63, 2), (63, 5), (60, 5), (60, 2)]
FIELDS = {"type": "Feature", "id": "a", "properties": {}, "geometry": dict(transform_geom(
    UTM, "EPSG:4326", {"type": "Polygon", "coordinates": [[NORTH_UP @ at for at in CORNERS]]}
))}  # fmt: skip
POINT = {"type": "Feature", "geometry": {"type": "Point", "coordinates": [3.0031, 50.5501]}}
POINTS = {"type": "FeatureCollection", "features": [POINT] * 3}


class Actual:
    """Measurements of runs: bytes of the windows read, and memory taken at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read = 0
        self.memory: list[int] = []
        plain_read, plain_wait = PixelStages.read, MemoryBudget._wait

        def read(stages: PixelStages, window: Window) -> Any:
            found = plain_read(stages, window)
            self.read += found.sits.values.nbytes + found.sits.valid.nbytes
            return found

        def wait(budget: MemoryBudget, size: int, *how: Any) -> None:
            self.memory.append(size)
            plain_wait(budget, size, *how)

        monkeypatch.setattr(PixelStages, "read", read)
        monkeypatch.setattr(MemoryBudget, "_wait", wait)


@pytest.mark.parametrize("task", ["classify-pixels", *in_all_tests("forecast", "embed")])
@pytest.mark.parametrize("of", ["raster", "fields", "points"])
def test_the_estimate_is_what_the_run_does(
    api: httpx.Client, stack: list[SourceFile], task: str, of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {
        "raster": {},
        "fields": {"fields": json.dumps(FIELDS)},
        "points": {"points": json.dumps(POINTS)},
    }[of]
    # Windows of one block each: the field lies in one of them.
    monkeypatch.setattr(MemoryBudget, "window_bytes", 16 * 66 * 100)
    found = post(api, f"/validate?task={task}", stack, **data).json()
    assert found["valid"], found
    estimate, actual = found["estimate"], Actual(monkeypatch)
    predicted = metric(api, f'pimc_pixels_total{{task="{task}"}}')
    ran = post(api, f"/{task}", stack, **data)
    assert ran.status_code == 200, ran.text
    run = metric(api, f'pimc_pixels_total{{task="{task}"}}') - predicted
    assert estimate["pixels"] == run
    if of == "points":
        assert estimate["pixels"] == 3
        assert actual.read == 0  # pixels are read by themselves
    else:
        assert estimate["read_bytes"] == actual.read > 0
    if of == "fields":
        assert estimate["dates"] == len(ran.json()["dates_used"])
        assert 9 <= estimate["pixels"] < H * W
    assert estimate["memory_bytes"] == max(actual.memory)


def test_the_estimate_of_the_pace_is_of_the_same_kind(
    api: httpx.Client, stack: list[SourceFile]
) -> None:
    """A point takes far longer than a pixel of a raster."""

    def runs(**data: str) -> int:
        found = post(api, "/validate?task=landcover", stack, **data).json()["estimate"]["seconds"]
        assert 0 < found["shortest"] < found["longest"]
        return int(found["runs"])

    points = {"points": json.dumps(POINTS)}
    before = runs(), runs(**points)
    assert post(api, "/landcover", stack).status_code == 200
    assert (runs(), runs(**points)) == (before[0] + 1, before[1])
    assert post(api, "/landcover", stack, **points).status_code == 200
    assert (runs(), runs(**points)) == (before[0] + 1, before[1] + 1)


def test_fields_become_a_job_by_the_size_of_the_raster(
    stack: list[SourceFile], tmp_path: Path
) -> None:
    data = {"fields": json.dumps(FIELDS)}
    with served(model_dir=write_zoo(tmp_path), sync_max_pixels=H * W - 1) as api:
        found = post(api, "/validate?task=classify-pixels", stack, **data).json()
        assert found["estimate"]["becomes_a_job"]
        assert post(api, "/classify-pixels", stack, **data).status_code == 202


@pytest.mark.parametrize(
    ("task", "data"),
    [
        ("classify-pixels", {"model": "nothing"}),
        ("classify-pixels", {"model": "forecast-vi"}),
        ("classify-pixels", {"start": "2001-01-01"}),
        ("forecast", {"horizon": 99}),
        ("classify-pixels", {"bands": "B02,B03,B05,B08"}),
        ("classify-pixels", {"scale": "10"}),
    ],
)
def test_a_rejected_request_has_the_problem_of_its_run(
    api: httpx.Client, stack: list[SourceFile], task: str, data: dict[str, Any]
) -> None:
    response = post(api, f"/validate?task={task}", stack, **data)
    assert response.status_code == 200
    found = response.json()
    problem = post(api, f"/{task}", stack, **data).json()
    assert found["valid"] is False
    assert found["estimate"] is None
    assert found["problem"]["code"] == problem["code"]
    assert found["problem"]["detail"] == problem["detail"]


def test_nothing_runs_and_runs_make_the_estimate(
    api: httpx.Client, stack: list[SourceFile]
) -> None:
    def runs() -> str:
        lines = api.get("/metrics").text.splitlines()
        return next((x for x in lines if x.startswith('pimc_pixels_total{task="forecast"}')), "")

    before = runs()
    assert post(api, "/validate?task=forecast", stack).json()["valid"]
    assert runs() == before
    assert post(api, "/forecast", stack).status_code == 200
    assert runs() != before
    seconds = post(api, "/validate?task=forecast", stack).json()["estimate"]["seconds"]
    assert seconds["runs"] >= 1
    assert 0 < seconds["shortest"] <= seconds["longest"]


@pytest.mark.parametrize("kind", ["raster", "points", "fields", "series", "patches", "similar"])
def test_the_seconds_of_a_first_request_are_a_rough_range(
    stack: list[SourceFile], tmp_path: Path, kind: str
) -> None:
    data: dict[str, str] = {
        "points": {"points": json.dumps(POINTS)},
        "similar": {"points": json.dumps(POINTS)},
        "fields": {"fields": json.dumps(FIELDS)},
    }.get(kind, {})
    task = {"patches": "landcover", "similar": "similar"}.get(kind, "classify-pixels")
    path = f"/validate?task={task}"
    with served(model_dir=write_zoo(tmp_path)) as api:
        if kind == "series":
            dates = [f"2021-0{n}-01" for n in range(1, 7)]
            bands = {"B02": [0.05] * 6, "B04": [0.06] * 6, "B08": [0.3] * 6}
            body = {"series": [{"id": "a", "dates": dates, **bands}]}
            found = api.post(path, json=body).json()
        else:
            found = post(api, path, stack, **data).json()
        seconds = found["estimate"]["seconds"]
        assert seconds["runs"] == 0
        assert 0 < seconds["shortest"] < seconds["longest"]
        assert "pimc_batch_size_count{" not in api.get("/metrics").text  # nothing ran


def test_a_rough_range_grows_with_predictions_bytes_and_files() -> None:
    class Model:
        def seconds_each(self) -> float:
            return 0.001

    def rough(**numbers: int) -> tuple[float, float]:
        found = rough_pace(Validation(**numbers), cast(LoadedModel, Model()))
        assert found.runs == 0
        return found.shortest, found.longest

    shortest, longest = rough(predictions=6000)
    assert shortest < 6.0 < longest  # what the batches take
    assert rough(predictions=12_000) == (pytest.approx(2 * shortest), longest + 18.0)
    assert rough(predictions=6000, read_bytes=10**12)[0] == pytest.approx(500.0)
    assert rough(predictions=6000, files=100)[1] == pytest.approx(longest + 2.0)


def test_a_pace_spans_the_last_runs_scaled_by_pixels() -> None:
    metrics = Metrics()
    assert metrics.pace("forecast", 100) is None
    metrics.ran(task="forecast", pixels=100, stages={"read": 1.0, "infer": 2.0, "write": 0.5})
    metrics.ran(task="forecast", pixels=200, stages={"read": 1.0, "infer": 1.0, "write": 1.0})
    found = metrics.pace("forecast", 400)
    assert found is not None
    assert (found.shortest, found.longest, found.runs) == (2.0, 14.0, 2)
    small = metrics.pace("forecast", 50)
    assert small is not None
    assert (small.shortest, small.longest) == (0.25, 3.5)
    for _ in range(30):
        metrics.ran(task="forecast", pixels=100, stages={"infer": 1.0})
    last = metrics.pace("forecast", 100)
    assert last is not None
    assert (last.shortest, last.longest, last.runs) == (1.0, 1.0, 20)


def test_a_file_of_places_that_cannot_be_read_is_one_problem(
    api: httpx.Client, stack: list[SourceFile]
) -> None:
    files: list[Any] = [("files", (s.name, s.path.read_bytes())) for s in stack]
    for task in ("similar", "classify-pixels"):
        sent = [*files, ("fields", ("places.gpkg", b"PK not a GeoPackage"))]
        found = api.post(f"/validate?task={task}", files=sent).json()
        assert [one["code"] for one in found["problems"]] == ["not_a_vector_file"], task


def test_series_and_unreadable_bodies(api: httpx.Client, stack: list[SourceFile]) -> None:
    dates = [f"2021-0{n}-01" for n in range(1, 7)]
    one = {"id": "a", "dates": dates, "B02": [0.05] * 6, "B04": [0.06] * 6, "B08": [0.3] * 6}
    found = api.post("/validate?task=classify-pixels", json={"series": [one]}).json()
    assert found["valid"]
    assert found["estimate"]["pixels"] == 1
    lacking = {key: value for key, value in one.items() if key != "B08"}
    found = api.post("/validate?task=classify-pixels", json={"series": [lacking]}).json()
    assert found["problem"]["code"] == "missing_bands"
    strange = post(api, "/validate?task=classify-pixels", stack, nonsense="1")
    assert (strange.status_code, strange.json()["code"]) == (422, "invalid_request")
    assert post(api, "/validate", stack).status_code == 422
    unknown = post(api, "/validate?task=paint", stack)
    assert [one["field"] for one in unknown.json()["errors"]] == ["task"]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_the_sdk_validates(api: httpx.Client, stack: list[SourceFile], kind: str) -> None:
    files = [source.path for source in stack]
    with connected(kind, str(api.base_url)) as client:
        assert client.validate("classify-pixels", files)["valid"]
        found = client.validate("classify-pixels", files, model="nothing")
    assert found["problem"]["code"] == "unknown_model"


def test_the_command_validates(api: httpx.Client, stack: list[SourceFile], tmp_path: Path) -> None:
    files = [str(source.path) for source in stack]
    arguments = ["--url", str(api.base_url), "validate", "classify-pixels", *files]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["valid"]
    bad = CliRunner().invoke(app, [*arguments, "--model", "nothing"])
    assert bad.exit_code == 1
    assert json.loads(bad.stdout)["problem"]["code"] == "unknown_model"


def test_the_command_takes_the_options_of_each_task(
    api: httpx.Client, stack: list[SourceFile], tmp_path: Path
) -> None:
    fields, points = tmp_path / "fields.geojson", tmp_path / "points.geojson"
    fields.write_text(json.dumps(FIELDS))
    points.write_text(json.dumps(POINTS))
    files = [str(source.path) for source in stack]

    def validated(*given: str) -> dict[str, Any]:
        done = CliRunner().invoke(app, ["--url", str(api.base_url), "validate", *given])
        return dict(json.loads(done.stdout))

    of_field = validated("classify-pixels", *files, "--fields", str(fields))
    assert of_field["valid"], of_field
    similar = validated("similar", *files, "--points", str(points), "--output", "similarities")
    assert (similar["valid"], similar["estimate"]["pixels"]) == (True, H * W)
    for given in (
        ("classify-pixels", "--smooth", "2", "--min-area", "0.5", "--output", "class,polygons"),
        ("classify-pixels", "--output", "probabilities", "--dtype", "uint8"),
        ("forecast", "--horizon", "3", "--no-backtest", "--output", "q10,q50"),
        ("landcover", "--stride", "16"),
        ("embed", "--modality", "patch", "--stride", "32"),
        ("classify-pixels", "--points", str(points)),
    ):
        assert validated(given[0], *files, *given[1:])["valid"], given
    rejected = validated("forecast", *files, "--fields", str(fields), "--horizon", "99")
    assert rejected["problem"]["errors"][0]["field"] == "horizon"


def test_series_are_validated_by_sdk_and_command(api: httpx.Client, tmp_path: Path) -> None:
    dates = [f"2021-0{n}-01" for n in range(1, 7)]
    bands = {"B02": [0.05] * 6, "B04": [0.06] * 6, "B08": [0.3] * 6}
    given = [Series(id="a", dates=dates, **bands), Series(id="b", dates=dates, **bands)]
    for kind in ("sync", "async"):
        with connected(kind, str(api.base_url)) as client:
            found = client.validate_series("forecast", given, horizon=2)
            assert (found["valid"], found["estimate"]["pixels"]) == (True, 2)
            assert not client.validate_series("forecast", given, model="nothing")["valid"]
    table = tmp_path / "fields.csv"
    rows = [f"a,{day},0.05,0.06,0.3" for day in dates]
    table.write_text("\n".join(["id,date,B02,B04,B08", *rows]))
    arguments = ["--url", str(api.base_url), "validate", "classify-pixels", str(table)]
    done = CliRunner().invoke(app, arguments)
    assert json.loads(done.stdout)["estimate"]["pixels"] == 1
    for wrong, said in (
        ([*arguments, "--grid", "finest"], "grid: for imagery only"),
        ([*arguments[:3], "similar", str(table)], "similar takes imagery"),
    ):
        failed = CliRunner().invoke(app, wrong)
        assert said in str(failed.exception)


def test_problems_that_do_not_follow_from_each_other_are_all_listed(
    api: httpx.Client, stack: list[SourceFile]
) -> None:
    files = [("files", (s.name, s.path.read_bytes())) for s in stack]
    files[1] = ("files", ("first.tif", b"no TIFF"))
    files[3] = ("files", ("second.tif", b"no TIFF either"))
    data = {"model": "nothing", "fields": "no GeoJSON", "bbox": "0,0,1,1"}
    found = api.post("/validate?task=classify-pixels", files=files, data=data).json()
    codes = [problem["code"] for problem in found["problems"]]
    assert codes == ["not_a_vector_file", "unknown_model", "not_a_geotiff", "not_a_geotiff"]
    assert found["problem"] == found["problems"][0]
    assert ["first.tif" in p["detail"] for p in found["problems"]] == [False, False, True, False]
    assert "second.tif" in found["problems"][3]["detail"]


def test_each_wrong_parameter_is_listed(api: httpx.Client, stack: list[SourceFile]) -> None:
    data = {"start": "2001-01-01", "bbox": "0,0,1,1"}
    found = post(api, "/validate?task=classify-pixels", stack, **data).json()
    assert [p["code"] for p in found["problems"]] == ["invalid_request", "too_few_dates"]
    assert found["problems"][0]["errors"][0]["field"] == "bbox"
    problem = post(api, "/classify-pixels", stack, **data).json()
    assert found["problem"]["detail"] == problem["detail"]
    found = post(api, "/validate?task=forecast", stack, horizon="99").json()
    assert [p["errors"][0]["field"] for p in found["problems"]] == ["horizon"]
    assert not found["valid"]


def test_what_may_follow_from_a_problem_is_not_listed(
    api: httpx.Client, stack: list[SourceFile]
) -> None:
    """Without the files that are no GeoTIFFs there are too few dates; with them there were not."""
    files = [("files", (s.name, s.path.read_bytes())) for s in stack[:1]]
    files += [("files", (f"{n}.tif", b"no TIFF")) for n in range(3)]
    for data in ({}, {"dates": "2021-01-01,2021-02-01,2021-03-01,2021-04-01"}):
        found = api.post("/validate?task=classify-pixels", files=files, data=data).json()
        assert [p["code"] for p in found["problems"]] == ["not_a_geotiff"] * 3
    only = api.post("/validate?task=classify-pixels", files=files[1:]).json()
    assert [p["code"] for p in only["problems"]] == ["not_a_geotiff"] * 3

"""Jobs over a real socket: from 202 to the result, failures, dismissal and expiry."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import threading
import uuid
import zipfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

from benchmarks.serving import served
from benchmarks.tiny_zoo import write_bundle, write_zoo
from service.api.responses import COG, GEOJSON, ZIP
from service.api.schemas.response_bodies import HeadList, JobList, ModelList
from tests.kits.gate import HELD, Gate, zoo_with_a_held_model
from tests.kits.jobs import (
    ASYNC,
    BACKENDS,
    BANDS,
    SERIES,
    Backend,
    Files,
    change,
    stack,
    swept,
    until,
    waited,
)
from tests.kits.marks import in_all_tests
from tests.kits.patience import soon
from tests.kits.rasters import write

POINTS = {
    "type": "FeatureCollection",
    "features": [
        {"type": "Feature", "id": 7, "geometry": {"type": "Point", "coordinates": [3.001, 50.53]}},
        {"type": "Feature", "geometry": {"type": "Point", "coordinates": [0, 0]}},
    ],
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo_with_a_held_model(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Backend:
    """As the fixture of single tests, for the service that most tests here share."""
    url = None
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").database()
    return Backend(tmp_path_factory.mktemp("state"), url)


@pytest.fixture(scope="module")
def state(backend: Backend) -> Path:
    return backend.state


@pytest.fixture(scope="module")
def api(zoo: Path, backend: Backend) -> Iterator[httpx.Client]:
    with served(model_dir=zoo, **backend.settings) as client:
        yield client


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return stack(tmp_path_factory.mktemp("stack"))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A stack that is read in eight windows."""
    return stack(tmp_path_factory.mktemp("large"), 128, 256)


def submit(
    api: httpx.Client, task: str = "classify-pixels", headers: Any = (), **how: Any
) -> dict[str, Any]:
    response = api.post(f"/{task}", headers={**ASYNC, **dict(headers)}, **how)
    assert response.status_code == 202, response.text
    return response.json()


def problem_of(response: httpx.Response, code: str, status: int) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/problem+json", response.text
    document = response.json()
    assert (document["code"], response.status_code) == (code, status), document
    return document


def gone(folder: Path) -> None:
    """Wait until a folder is removed."""
    assert soon(lambda: not folder.exists())


# From 202 to the result -----------------------------------------------------------------------


def test_the_status_of_a_job_follows_ogc_processes(api: httpx.Client, files: Files) -> None:
    response = api.post("/classify-pixels", files=files, headers=ASYNC)
    assert response.status_code == 202
    assert response.headers["Preference-Applied"] == "respond-async"
    info = response.json()
    assert response.headers["Location"] == f"/jobs/{info['jobID']}"
    assert str(uuid.UUID(info["jobID"], version=4)) == info["jobID"]
    assert (info["type"], info["processID"]) == ("process", "classify-pixels")
    assert (info["status"], info["progress"]) == ("accepted", 0)
    assert info["started"] is info["finished"] is None
    done = waited(api, info["jobID"])
    assert (done["status"], done["progress"]) == ("successful", 100)
    times = [datetime.fromisoformat(done[name]) for name in ("created", "started", "finished")]
    assert times == sorted(times)
    links = {link["rel"].rpartition("/")[2]: link["href"] for link in done["links"]}
    assert links["self"] == response.headers["Location"]
    assert api.get(links["results"]).status_code == 200


@pytest.mark.parametrize(
    ("task", "accept", "kind", "data"),
    [
        ("classify-pixels", "", COG, {}),
        ("classify-pixels", "", ZIP, {"outputs": "class,confidence,probabilities"}),
        ("forecast", "application/json", "application/json", {}),
        ("landcover", "", COG, {"stride": "3"}),
        *in_all_tests(
            ("classify-pixels", "application/zip", ZIP, {}),
            ("classify-pixels", "application/json", "application/json", {"start": "2021-01-01"}),
            ("classify-pixels", "", GEOJSON, {"points": json.dumps(POINTS)}),
            ("forecast", "", COG, {"outputs": "q10,q90", "horizon": "2"}),
            ("landcover", "application/json", "application/json", {"stride": "64"}),
            ("embed", "", COG, {}),
            ("embed", "", COG, {"modality": "patch", "stride": "16"}),
            names=True,
        ),
    ],
)
def test_the_result_of_a_job_equals_the_synchronous_response(
    api: httpx.Client, files: Files, task: str, accept: str, kind: str, data: dict[str, str]
) -> None:
    headers = {"Accept": accept} if accept else {}
    at_once = api.post(f"/{task}", files=files, data=data, headers=headers)
    assert at_once.status_code == 200, at_once.text
    job = submit(api, task, files=files, data=data, headers=headers)["jobID"]
    assert waited(api, job)["status"] == "successful"
    later = api.get(f"/jobs/{job}/result", headers=headers)
    assert later.headers["content-type"] == at_once.headers["content-type"] == kind
    assert later.content == at_once.content
    for name in ("PIMC-Model", "PIMC-Provider", "PIMC-Warning", "Content-Disposition", "Vary"):
        assert later.headers.get(name) == at_once.headers.get(name)
    assert "infer;dur=" in later.headers["Server-Timing"]


@pytest.mark.parametrize("task", ["classify-pixels", "forecast", "embed"])
def test_a_job_of_series(api: httpx.Client, task: str) -> None:
    at_once = api.post(f"/{task}", json=SERIES)
    job = submit(api, task, json=SERIES)["jobID"]
    assert waited(api, job)["status"] == "successful"
    assert api.get(f"/jobs/{job}/result").content == at_once.content
    problem_of(api.get(f"/jobs/{job}/result/class"), "not_found", 404)


def test_each_output_has_its_own_url(api: httpx.Client, files: Files) -> None:
    data = {"outputs": "class,confidence"}
    job = submit(api, files=files, data=data)["jobID"]
    waited(api, job)
    with zipfile.ZipFile(io.BytesIO(api.get(f"/jobs/{job}/result").content)) as archive:
        for output in ("class", "confidence"):
            response = api.get(f"/jobs/{job}/result/{output}")
            assert response.headers["content-type"] == COG
            assert response.content == archive.read(f"{output}.tif")
            part = api.get(f"/jobs/{job}/result/{output}", headers={"Range": "bytes=0-3"})
            assert (part.status_code, part.content) == (206, response.content[:4])
        for name in ("class.qml", "confidence.qml", "class.tif.aux.xml"):
            response = api.get(f"/jobs/{job}/result/{name}")
            assert response.headers["content-type"] == "application/xml"
            assert f'filename="{name}"' in response.headers["content-disposition"]
            assert response.content == archive.read(name)
    for strange in (
        "entropy", "reply.json", "..%2Freply.json", "class.tif", "entropy.qml", ".qml",
        "confidence.tif.aux.xml",
    ):  # fmt: skip
        problem_of(api.get(f"/jobs/{job}/result/{strange}"), "not_found", 404)


def test_the_media_type_of_a_result_is_negotiated_with_its_request(
    api: httpx.Client, files: Files
) -> None:
    job = submit(api, files=files, headers={"Accept": "application/json"})["jobID"]
    waited(api, job)
    assert api.get(f"/jobs/{job}/result").headers["content-type"] == COG
    summary = api.get(f"/jobs/{job}/result", headers={"Accept": "application/json"})
    assert summary.json()["pixels"] == 70 * 90
    refused = api.get(f"/jobs/{job}/result", headers={"Accept": "text/html"})
    problem_of(refused, "not_acceptable", 406)


@pytest.mark.slow
def test_a_large_raster_becomes_a_job_without_a_preference(zoo: Path, files: Files) -> None:
    with served(model_dir=zoo, sync_max_pixels=70 * 90 - 1) as api:
        response = api.post("/classify-pixels", files=files)
        assert response.status_code == 202
        assert response.headers["Location"] == f"/jobs/{response.json()['jobID']}"
        assert "Preference-Applied" not in response.headers  # the request has no preference
        assert waited(api, response.json()["jobID"])["status"] == "successful"
        # Points of a large raster are predicted synchronously.
        points = {"points": json.dumps(POINTS)}
        assert api.post("/classify-pixels", files=files, data=points).status_code == 200
    with served(model_dir=zoo, sync_max_pixels=70 * 90) as api:
        assert api.post("/classify-pixels", files=files).status_code == 200


@pytest.mark.parametrize(
    "prefer", ["respond-async, wait=5", "RESPOND-ASYNC; foo=bar", 'handling="a", respond-async']
)
def test_preferences_are_parsed_by_rfc_7240(api: httpx.Client, files: Files, prefer: str) -> None:
    response = api.post("/classify-pixels", files=files, headers={"Prefer": prefer})
    assert response.status_code == 202


def test_other_preferences_do_not_create_a_job(api: httpx.Client) -> None:
    response = api.post("/embed", json=SERIES, headers={"Prefer": "wait=10, return=minimal"})
    assert response.status_code == 200


# Rejections --------------------------------------------------------------------------------


def test_an_invalid_request_is_rejected_before_a_job_is_created(
    api: httpx.Client, files: Files
) -> None:
    before = len(api.get("/jobs").json()["jobs"])
    one = api.post("/classify-pixels", files=files[:1], headers=ASYNC)
    problem_of(one, "too_few_dates", 422)
    dark = {"series": [{**SERIES["series"][0], "B08": [90.0] * 2, "B04": [90.0] * 2}]}
    problem_of(api.post("/embed", json=dark, headers=ASYNC), "implausible_reflectance", 422)
    unknown = api.post("/embed", json={**SERIES, "model": "nobody"}, headers=ASYNC)
    problem_of(unknown, "unknown_model", 404)
    refused = api.post("/classify-pixels", files=files, headers={**ASYNC, "Accept": "text/html"})
    problem_of(refused, "not_acceptable", 406)
    assert len(api.get("/jobs").json()["jobs"]) == before


@pytest.mark.parametrize(
    "name",
    ["6d57d4c4-d0f5-47de-8d45-cbeb621176eb", "x", "..", "%2e%2e%2fjobs.sqlite", "a" * 5000],
)
def test_an_unknown_job_is_an_error(api: httpx.Client, name: str) -> None:
    for path in (f"/jobs/{name}", f"/jobs/{name}/result", f"/jobs/{name}/result/class"):
        if ".." in httpx.URL(path).path and name == "..":
            continue  # the HTTP client removes it from the path
        assert api.get(path).json()["code"] in {"unknown_job", "not_found"}
    assert api.delete(f"/jobs/{uuid.uuid4()}").json()["code"] == "unknown_job"


def test_a_result_of_an_unfinished_job_is_an_error(
    api: httpx.Client, gate: Gate, large: Files
) -> None:
    with gate.held(after=4):
        job = submit(api, files=large, data={"model": HELD})["jobID"]
        found = until(api, job, progress=1)
        assert found["status"] == "running"
        assert found["started"]
        waiting = submit(api, json=SERIES, task="embed")["jobID"]
        problem = problem_of(api.get(f"/jobs/{job}/result"), "result_not_ready", 409)
        assert "running" in problem["detail"]
        problem = problem_of(api.get(f"/jobs/{waiting}/result"), "result_not_ready", 409)
        assert "accepted" in problem["detail"]
        problem_of(api.get(f"/jobs/{job}/result/class"), "result_not_ready", 409)
        api.delete(f"/jobs/{job}")
    # Jobs run in the order of acceptance: after the first is dismissed, the second runs.
    assert waited(api, waiting)["status"] == "successful"


def test_progress_grows_with_every_window(api: httpx.Client, gate: Gate, large: Files) -> None:
    seen = [0]
    with gate.held():
        job = submit(api, files=large, data={"model": HELD})["jobID"]
        for windows in range(1, 5):
            gate.hold(after=3 + windows)
            seen.append(until(api, job, progress=seen[-1] + 1)["progress"])
            assert isinstance(seen[-1], int)
            assert api.get(f"/jobs/{job}").json()["progress"] < 100
    assert waited(api, job)["progress"] == 100


# Failures -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_job_fails_if_pixels_do_not_decode(
    api: httpx.Client, state: Path, tmp_path: Path
) -> None:
    files = stack(tmp_path, 600, 400, dates=2, compress="deflate")
    broken = bytearray(files[1][1][1])
    # The last rows, which are not in the sample that is read before a job is accepted.
    broken[-60_000:-20_000] = bytes(40_000)
    files[1] = ("files", (files[1][1][0], bytes(broken), "image/tiff"))
    job = submit(api, files=files)["jobID"]
    info = waited(api, job)
    assert info["status"] == "failed"
    problem = problem_of(api.get(f"/jobs/{job}/result"), "corrupt_raster", 422)
    assert problem["detail"] == info["message"]
    assert "scene_2021-02-01.tif" in problem["detail"]
    gone(state / "jobs" / job)
    assert waited(api, submit(api, "embed", json=SERIES)["jobID"])["status"] == "successful"


def test_an_internal_error_of_a_job_shows_no_internal_details(
    api: httpx.Client, tmp_path: Path
) -> None:
    files = stack(tmp_path, dates=3)
    job = submit(api, files=files, data={"model": "pixels-brittle"})["jobID"]
    assert waited(api, job)["status"] == "failed"
    problem = problem_of(api.get(f"/jobs/{job}/result"), "internal_error", 500)
    assert job in problem["detail"]
    assert "Reshape" not in problem["detail"]


# Dismissal ------------------------------------------------------------------------------------


def test_a_running_job_can_be_dismissed(
    api: httpx.Client, gate: Gate, state: Path, large: Files
) -> None:
    with gate.held(after=4):
        job = submit(api, files=large, data={"model": HELD})["jobID"]
        until(api, job, progress=1)
        response = api.delete(f"/jobs/{job}")
    assert (response.status_code, response.json()["status"]) == (200, "dismissed")
    assert response.json()["finished"]
    assert api.delete(f"/jobs/{job}").json()["status"] == "dismissed"
    problem = problem_of(api.get(f"/jobs/{job}/result"), "result_not_ready", 409)
    assert "dismissed" in problem["detail"]
    gone(state / "jobs" / job)
    assert waited(api, submit(api, "embed", json=SERIES)["jobID"])["status"] == "successful"
    assert api.get(f"/jobs/{job}").json()["status"] == "dismissed"


def test_a_dismissed_finished_job_is_removed_with_its_files(
    api: httpx.Client, state: Path, files: Files
) -> None:
    job = submit(api, files=files)["jobID"]
    waited(api, job)
    # The uploads and the finished windows are removed once the job's end is recorded.
    kept = {"request.json", "result-1"}
    assert soon(lambda: {path.name for path in (state / "jobs" / job).iterdir()} == kept)
    assert api.delete(f"/jobs/{job}").json()["status"] == "dismissed"
    assert not (state / "jobs" / job).exists()
    problem_of(api.get(f"/jobs/{job}/result"), "result_not_ready", 409)


@pytest.mark.slow
def test_a_result_is_sent_completely_if_the_job_is_dismissed_meanwhile(
    api: httpx.Client, state: Path, files: Files
) -> None:
    job = submit(api, "embed", files=files)["jobID"]
    waited(api, job)
    path = state / "jobs" / job / "result-1" / "embedding.tif"
    with path.open("ab") as file:
        file.write(bytes(2**24))  # more than the buffers of a connection hold
    complete = path.read_bytes()
    with api.stream("GET", f"/jobs/{job}/result") as response:
        chunks = response.iter_bytes(2**14)
        first = next(chunks)
        assert api.delete(f"/jobs/{job}").json()["status"] == "dismissed"
        assert first + b"".join(chunks) == complete


# Idempotency keys ------------------------------------------------------------------------------


def test_a_repeated_request_with_a_key_returns_the_first_job(
    api: httpx.Client, files: Files
) -> None:
    key = {"Idempotency-Key": "mine-1"}
    first = submit(api, files=files, headers=key)["jobID"]
    assert submit(api, files=files, headers=key)["jobID"] == first
    waited(api, first)
    again = submit(api, files=files, headers=key)
    assert (again["jobID"], again["status"]) == (first, "successful")
    # Also without a preference for a job: the key identifies the request.
    assert api.post("/classify-pixels", files=files, headers=key).json()["jobID"] == first
    assert submit(api, files=files)["jobID"] != first


@pytest.mark.parametrize("how", ["field", "pixel", "task", "name"])
def test_a_key_with_another_request_is_an_error(
    api: httpx.Client, tmp_path: Path, how: str
) -> None:
    files = stack(tmp_path, 8, 9)
    key = {"Idempotency-Key": f"conflict {how}".replace(" ", "-")}
    first = submit(api, files=files, headers=key)["jobID"]
    task, data = "classify-pixels", {}
    if how == "field":
        data = {"start": "2021-01-01"}
    elif how == "pixel":
        files = [*files[:-1], *stack(tmp_path, 8, 9, dates=5)[-1:]]
    elif how == "task":
        task = "embed"
    else:
        files = [*files[:-1], ("files", ("a_2021-04-01.tif", files[-1][1][1]))]
    response = api.post(f"/{task}", files=files, data=data, headers={**ASYNC, **key})
    problem = problem_of(response, "invalid_request", 422)
    assert problem["errors"][0]["field"] == "Idempotency-Key"
    assert first in problem["detail"]


def test_simultaneous_requests_with_one_key_create_one_job(api: httpx.Client, files: Files) -> None:
    found: list[str] = []
    key = {"Idempotency-Key": "at-once"}

    def send() -> None:
        found.append(submit(api, files=files, headers=key)["jobID"])

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1


@pytest.mark.parametrize("key", ["", "a" * 256, "two words"])
def test_an_invalid_key_is_an_error(api: httpx.Client, key: str) -> None:
    response = api.post("/embed", json=SERIES, headers={**ASYNC, "Idempotency-Key": key})
    problem = problem_of(response, "invalid_request", 422)
    assert problem["errors"][0]["field"].lower() == "idempotency-key"


# Owners -----------------------------------------------------------------------------------


def test_a_job_is_visible_only_to_its_api_key(zoo: Path, files: Files) -> None:
    with served(model_dir=zoo, api_keys=("anna", "ben")) as api:
        anna, ben = {"X-API-Key": "anna"}, {"Authorization": "Bearer ben"}
        key = {"Idempotency-Key": "1"}
        mine = submit(api, files=files, headers=anna | key)["jobID"]
        yours = submit(api, files=files, headers=ben | key)["jobID"]
        assert mine != yours  # each caller has its own idempotency keys
        status = lambda: api.get(f"/jobs/{mine}", headers=anna).json()["status"]  # noqa: E731
        assert soon(lambda: status() == "successful")
        assert [j["jobID"] for j in api.get("/jobs", headers=anna).json()["jobs"]] == [mine]
        for path in (f"/jobs/{mine}", f"/jobs/{mine}/result", f"/jobs/{mine}/result/class"):
            problem_of(api.get(path, headers=ben), "unknown_job", 404)
            problem_of(api.get(path), "unauthorized", 401)
            assert api.get(path, headers=anna).status_code == 200
        problem_of(api.delete(f"/jobs/{mine}", headers=ben), "unknown_job", 404)
        assert api.get(f"/jobs/{mine}/result", headers=anna).status_code == 200


def test_jobs_are_listed_newest_first(api: httpx.Client) -> None:
    made = [submit(api, "embed", json=SERIES)["jobID"] for _ in range(3)]
    listed = [job["jobID"] for job in api.get("/jobs").json()["jobs"]]
    assert listed[:3] == made[::-1]
    assert len(api.get("/jobs", params={"limit": 2}).json()["jobs"]) == 2
    problem_of(api.get("/jobs", params={"limit": 0}), "invalid_request", 422)


# Limits ---------------------------------------------------------------------------


def test_the_number_of_waiting_jobs_is_limited(zoo: Path, gate: Gate, large: Files) -> None:
    with served(model_dir=zoo, max_jobs=2) as api, gate.held(after=4):
        runs = submit(api, files=large, data={"model": HELD})["jobID"]
        until(api, runs, progress=1)
        key = {"Idempotency-Key": "1"}
        waiting = [submit(api, "embed", json=SERIES, headers=key)["jobID"]]
        waiting.append(submit(api, "embed", json=SERIES)["jobID"])
        response = api.post("/embed", json=SERIES, headers=ASYNC)
        problem_of(response, "overloaded", 503)
        assert int(response.headers["Retry-After"]) > 0
        # A repeated request has a job already, and a synchronous request needs none.
        assert submit(api, "embed", json=SERIES, headers=key)["jobID"] == waiting[0]
        assert api.post("/embed", json=SERIES).status_code == 200
        api.delete(f"/jobs/{waiting[1]}")
        submit(api, "embed", json=SERIES)
        api.delete(f"/jobs/{runs}")


@pytest.mark.slow
def test_expired_jobs_are_removed(
    zoo: Path, tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.jobs.runner._SWEEP_SECONDS", 0.1)
    with served(model_dir=zoo, state_dir=tmp_path, job_ttl=3600) as api:
        job = submit(api, files=files)["jobID"]
        assert waited(api, job)["status"] == "successful"
        assert api.get(f"/jobs/{job}/result").status_code == 200
        change(tmp_path, "UPDATE jobs SET age = 3600")
        swept(tmp_path)
        problem_of(api.get(f"/jobs/{job}/result"), "unknown_job", 404)
        # The job is unknown first; its files are removed a moment later.
        gone(tmp_path / "jobs" / job)


def metrics(api: httpx.Client) -> dict[tuple[str, ...], float]:
    """The value of each sample, by its name and its labels' values."""
    return {
        (s.name, *s.labels.values()): s.value
        for f in text_string_to_metric_families(api.get("/metrics").text)
        for s in f.samples
    }


def test_metrics_count_jobs(api: httpx.Client) -> None:
    submit(api, "embed", json=SERIES)
    for job in api.get("/jobs").json()["jobs"]:  # jobs of other tests may still run
        waited(api, job["jobID"])
    # The end of a job is stored before the gauge of runs decreases.
    assert soon(lambda: not metrics(api)["pimc_runs_in_flight",])
    counted, jobs = metrics(api), api.get("/jobs").json()["jobs"]
    for status in ("successful", "failed", "dismissed", "running", "accepted"):
        assert counted["pimc_jobs", status] == sum(j["status"] == status for j in jobs)
    assert counted["pimc_job_seconds_count", "embed"] > 0
    assert counted["pimc_windows_in_flight",] == 0


def test_no_file_of_a_request_remains(api: httpx.Client, state: Path) -> None:
    assert soon(lambda: not any(state.glob("requests/*")))  # jobs of other tests may run


# Starts and stops -----------------------------------------------------------------------------


def test_a_job_fails_with_the_reason_if_its_model_has_changed(
    zoo: Path, gate: Gate, large: Files, tmp_path: Path
) -> None:
    with gate.held(after=4), served(model_dir=zoo, state_dir=tmp_path / "state") as api:
        job = submit(api, files=large, data={"model": HELD})["jobID"]
        before = until(api, job, progress=1)["progress"]
    other = zoo_with_a_held_model(tmp_path / "zoo")
    card = other / HELD / "card.json"
    card.write_text(card.read_text().replace('"0.0.1"', '"0.0.2"'))
    with served(model_dir=other, state_dir=tmp_path / "state") as api:
        info = waited(api, job)
        assert info["status"] == "failed"
        assert info["progress"] >= before
        assert f"{HELD}@0.0.1" in info["message"]
        problem_of(api.get(f"/jobs/{job}/result"), "unknown_model", 404)


def upgraded(root: Path, held: str | None = "0.0.2") -> Path:
    """The zoo of the next release, with another version of the held model or without it."""
    other = zoo_with_a_held_model(root)
    card = other / HELD / "card.json"
    if held is None:
        shutil.rmtree(other / HELD)
    else:
        card.write_text(card.read_text().replace('"0.0.1"', f'"{held}"'))
    return other


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.0.2", None])
def test_a_key_can_be_used_again_after_its_job_failed_of_an_upgrade(
    zoo: Path, gate: Gate, large: Files, tmp_path: Path, version: str | None
) -> None:
    key = {"Idempotency-Key": "mine"}
    held = {"files": large, "data": {"model": HELD}}
    with gate.held(after=4), served(model_dir=zoo, state_dir=tmp_path / "state") as api:
        job = submit(api, headers=key, **held)["jobID"]
        until(api, job, progress=1)
    with served(model_dir=upgraded(tmp_path / "zoo", version), state_dir=tmp_path / "state") as api:
        info = waited(api, job)
        assert info["status"] == "failed"
        for word in ("Idempotency-Key", "model-upgrade", f"{HELD}@0.0.1"):
            assert word in info["message"]
        if version is None:
            return
        again = submit(api, headers=key, **held)["jobID"]
        assert again != job
        assert waited(api, again)["status"] == "successful"
        assert submit(api, headers=key, **held)["jobID"] == again


@pytest.mark.slow
def test_a_job_runs_with_the_next_version_if_the_request_allows_it(
    zoo: Path, gate: Gate, large: Files, tmp_path: Path
) -> None:
    prefer = {"Prefer": "respond-async, model-upgrade"}
    held = {"files": large, "data": {"model": f"{HELD}@0.0.1"}}
    with gate.held(after=4), served(model_dir=zoo, state_dir=tmp_path / "state") as api:
        response = api.post("/classify-pixels", headers=prefer, **held)
        assert response.headers["Preference-Applied"] == "respond-async, model-upgrade"
        job = response.json()["jobID"]
        before = until(api, job, progress=1)["progress"]
    with served(model_dir=upgraded(tmp_path / "zoo"), state_dir=tmp_path / "state") as api:
        info = waited(api, job)
        assert info["status"] == "successful", info
        assert info["progress"] >= before
        later = api.get(f"/jobs/{job}/result")
        assert later.headers["PIMC-Model"] == f"{HELD}@0.0.2"
        # Every window was computed by the new version.
        at_once = api.post("/classify-pixels", files=large, data={"model": HELD})
        assert later.content == at_once.content


@pytest.mark.slow
def test_a_job_fails_if_no_version_of_its_model_is_left(
    zoo: Path, gate: Gate, large: Files, tmp_path: Path
) -> None:
    prefer = {"Prefer": "respond-async, model-upgrade"}
    with gate.held(after=4), served(model_dir=zoo, state_dir=tmp_path / "state") as api:
        job = submit(api, headers=prefer, files=large, data={"model": HELD})["jobID"]
        until(api, job, progress=1)
    other = upgraded(tmp_path / "zoo", None)
    with served(model_dir=other, state_dir=tmp_path / "state") as api:
        assert waited(api, job)["status"] == "failed"
        problem_of(api.get(f"/jobs/{job}/result"), "unknown_model", 404)


@pytest.mark.slow
def test_a_job_keeps_the_default_model_of_its_submission(
    zoo: Path, gate: Gate, large: Files, tmp_path: Path
) -> None:
    with gate.held(), served(model_dir=zoo, state_dir=tmp_path / "state") as api:
        submit(api, files=large, data={"model": HELD})
        job = submit(api, json=SERIES)["jobID"]
    other = write_zoo(tmp_path / "zoo")
    write_bundle(other, "a-new-default", "classify-pixels", "pixel")
    card = other / "pixels-landcover" / "card.json"
    card.write_text(card.read_text().replace('"default": true', '"default": false'))
    with served(model_dir=other, state_dir=tmp_path / "state") as api:
        assert api.post("/classify-pixels", json=SERIES).json()["model"] == "a-new-default@0.0.1"
        assert waited(api, job)["status"] == "successful"
        assert api.get(f"/jobs/{job}/result").json()["model"] == "pixels-landcover@0.0.1"


# Lists ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "model"), [("/jobs", JobList), ("/heads", HeadList), ("/models", ModelList)]
)
def test_long_lists_are_not_made_on_the_event_loop(
    api: httpx.Client, monkeypatch: pytest.MonkeyPatch, path: str, model: type[BaseModel]
) -> None:
    plain, made = model.model_dump_json, []

    def text(document: BaseModel, **how: Any) -> str:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        made.append(document)
        return plain(document, **how)

    monkeypatch.setattr(model, "model_dump_json", text)
    assert api.get(path).status_code == 200
    assert len(made) == 1


# Stored files ---------------------------------------------------------------------------------


def test_a_hostile_file_name_is_used_as_a_label_only(
    api: httpx.Client, state: Path, tmp_path: Path
) -> None:
    pixels = np.full((4, 8, 9), 2000, np.uint16)
    files = []
    for month in (1, 2, 3):
        path = write(tmp_path / "a.tif", pixels, descriptions=BANDS, nodata=0).path
        name = f"../../../x/2021-0{month}-01.tif"
        files.append(("files", (name, path.read_bytes(), "image/tiff")))
    job = submit(api, files=files)["jobID"]
    assert waited(api, job)["status"] == "successful"
    assert sorted(p.name for p in (state / "jobs" / job / "result-1").iterdir()) == [
        "class.qml",
        "class.tif",
        "class.tif.aux.xml",
        "document.json",
        "item.json",
        "reply.json",
    ]

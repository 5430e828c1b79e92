"""Monitoring by operators: access records, metrics, readiness; over a socket."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.serving import served
from benchmarks.tiny_zoo import write_zoo
from service.api.dependencies import SharedText
from service.api.middleware import stage_times, trace_id
from service.api.routes import health, tasks
from service.jobs.store import JobStore
from service.run.execute import execute
from service.telemetry import JsonFormatter, Metrics
from tests.kits.clock import JumpingClock
from tests.kits.jobs import ASYNC, SERIES, waited
from tests.kits.patience import PATIENCE, soon
from tests.kits.rasters import write

KEY = "anna-has-a-key-of-her-own"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def api(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"anna {KEY}\n")
    with served(model_dir=zoo, api_keys_file=keys) as client:
        client.headers["X-API-Key"] = KEY
        yield client


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    """Every line of the log as it is written, parsed."""
    found: list[dict[str, Any]] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(json.loads(self.format(record)))

    handler = Collect(logging.INFO)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("service")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


def record(lines: list[dict[str, Any]], request_id: str) -> dict[str, Any]:
    (found,) = [
        line for line in lines if line["message"] == "request" and line["request_id"] == request_id
    ]
    return found


def sample(api: httpx.Client, name: str, **labels: str) -> float:
    for family in text_string_to_metric_families(api.get("/metrics").text):
        for one in family.samples:
            if one.name == name and labels.items() <= one.labels.items():
                return float(one.value)
    return 0.0


# Access records -------------------------------------------------------------------------------


def test_a_request_has_one_record_with_all_that_was_measured(
    api: httpx.Client, lines: list[dict[str, Any]]
) -> None:
    body = json.dumps(SERIES).encode()
    response = api.post(
        "/embed",
        content=body,
        headers={
            "Content-Type": "application/json",
            "User-Agent": "a test/1.0",
            "X-Request-ID": "whole",
            "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01",
        },
    )
    assert response.status_code == 200
    entry = record(lines, "whole")
    assert entry["key"] == "anna"
    assert entry["client"] == "127.0.0.1"
    assert entry["agent"] == "a test/1.0"
    assert entry["trace_id"] == TRACE
    assert (entry["method"], entry["route"], entry["path"]) == ("POST", "/embed", "/embed")
    assert (entry["status"], entry["complete"]) == (200, True)
    assert (entry["bytes_in"], entry["bytes_out"]) == (len(body), len(response.content))
    assert entry["model"] == response.headers["PIMC-Model"]
    assert set(entry["stages"]) == {"read", "infer", "write"}
    assert sum(entry["stages"].values()) <= entry["ms"]
    assert "code" not in entry
    assert KEY not in json.dumps(lines)


def test_a_record_of_an_error_names_its_code_and_no_key_that_was_refused(
    api: httpx.Client, lines: list[dict[str, Any]]
) -> None:
    response = api.get("/jobs", headers={"X-API-Key": "wrong", "X-Request-ID": "refused"})
    assert response.status_code == 401
    entry = record(lines, "refused")
    assert (entry["status"], entry["code"]) == (401, "unauthorized")
    assert "key" not in entry
    assert "wrong" not in json.dumps(entry)


def test_a_long_path_and_agent_are_cut(api: httpx.Client, lines: list[dict[str, Any]]) -> None:
    api.get(f"/no/{'a' * 5000}", headers={"User-Agent": "b" * 5000, "X-Request-ID": "long"})
    entry = record(lines, "long")
    assert (len(entry["path"]), len(entry["agent"])) == (256, 256)
    assert (entry["status"], entry["code"], entry["route"]) == (404, "not_found", "unmatched")


def test_all_lines_of_a_request_name_its_trace(lines: list[dict[str, Any]]) -> None:
    assert trace_id(f"00-{TRACE}-00f067aa0ba902b7-01") == TRACE
    assert trace_id(f"cc-{TRACE}-00f067aa0ba902b7-01-what-comes-later") == TRACE
    for bad in (
        None,
        "",
        TRACE,
        f"ff-{TRACE}-00f067aa0ba902b7-01",
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-{TRACE.upper()}-00f067aa0ba902b7-01",
        f"00-{TRACE}-00f067aa0ba902b7-01\n{{}}",
    ):
        assert trace_id(bad) is None


def test_stage_times_are_those_of_the_header() -> None:
    assert stage_times("read;dur=1.5, infer;dur=20.0") == {"read": 1.5, "infer": 20.0}
    assert stage_times(None) is None


# Metrics --------------------------------------------------------------------------------------


def test_metrics_count_failures_by_code_and_time_by_model(api: httpx.Client) -> None:
    codes = {
        code: sample(api, "pimc_problems_total", code=code) for code in ("not_found", "wrong_task")
    }
    response = api.post("/embed", json=SERIES)
    model = response.headers["PIMC-Model"]
    timed = sample(api, "pimc_model_seconds_count", model=model)
    sent = sample(api, "pimc_body_bytes_total", direction="in")
    api.get("/nothing")
    assert api.post("/embed", json={**SERIES, "model": "forecast-vi"}).status_code == 422
    api.post("/embed", json=SERIES)
    for code, before in codes.items():
        assert sample(api, "pimc_problems_total", code=code) == before + 1
    assert sample(api, "pimc_model_seconds_count", model=model) == timed + 1
    assert sample(api, "pimc_body_bytes_total", direction="in") > sent
    # The one that reads the metrics is in flight itself; the one before may be so for a moment.
    assert soon(lambda: sample(api, "pimc_requests_in_flight") == 1)


def test_metrics_include_the_build_the_disk_and_the_limits(api: httpx.Client) -> None:
    text = api.get("/metrics").text
    version = api.get("/openapi.json").json()["info"]["version"]
    assert f'pimc_build_info{{version="{version}"}} 1.0' in text
    for place in ("state", "scratch"):
        assert sample(api, "pimc_disk_free_bytes", place=place) > 0
    assert 0 < sample(api, "process_open_fds") < sample(api, "process_max_fds")
    assert "pimc_run_slots_held" in text


def test_batches_and_bytes_of_a_run_are_counted(api: httpx.Client, tmp_path: Path) -> None:
    side, dates = 40, 8
    parts = []
    for month in range(1, dates + 1):
        bands = np.full((3, side, side), 2000, np.uint16)
        names = ("B02", "B04", "B08")
        path = write(tmp_path / f"2021-{month:02d}-15.tif", bands, descriptions=names).path
        parts.append(("files", (path.name, path.read_bytes(), "image/tiff")))
    model = "pixels-landcover@0.0.1"
    before = [
        sample(api, "pimc_batch_size_sum", model=model),
        sample(api, "pimc_read_bytes_total", source="decoded"),
    ]
    response = api.post("/classify-pixels", files=parts)
    assert response.status_code == 200, response.text
    assert response.headers["PIMC-Model"] == model
    assert sample(api, "pimc_batch_size_sum", model=model) == before[0] + side * side
    timed = sample(api, "pimc_batch_seconds_count", model=model)
    assert timed == sample(api, "pimc_batch_size_count", model=model) > 0
    # Each pixel once for the map; a sample of them once more, for the check of their values.
    stack = dates * 3 * side * side * 2
    decoded = sample(api, "pimc_read_bytes_total", source="decoded") - before[1]
    assert stack <= decoded <= 2 * stack
    assert sample(api, "pimc_block_cache_bytes") >= 2**20


@pytest.mark.parametrize("private", [True, False])
def test_use_by_key_is_for_those_who_may_know_the_keys(
    zoo: Path, tmp_path: Path, private: bool
) -> None:
    (tmp_path / "keys").write_text(f"anna {KEY}\nben {KEY[::-1]}\n")
    with served(model_dir=zoo, api_keys_file=tmp_path / "keys", private=private) as api:
        for key, count in ((KEY, 2), (KEY[::-1], 1)):
            api.headers["X-API-Key"] = key
            for _ in range(count):
                assert api.post("/embed", json=SERIES).status_code == 200
        job = api.post("/embed", json=SERIES, headers=ASYNC).json()["jobID"]
        waited(api, job)
        text = api.get("/metrics").text
        assert ('key="anna"' in text) == private
        if private:
            assert sample(api, "pimc_key_requests_total", key="anna") == 2
            assert sample(api, "pimc_key_pixels_total", key="anna") == 2
            assert soon(lambda: sample(api, "pimc_key_pixels_total", key="ben") == 2)


def test_models_and_keys_make_a_bounded_number_of_series() -> None:
    metrics = Metrics(per_key=True)
    for number in range(200):
        metrics.request_completed(
            route="/a",
            method="POST",
            status=200,
            seconds=1,
            model=f"mine-{number}",
            key=f"caller-{number}",
        )
        metrics.batch(f"mine-{number}", 1, 1.0)
        metrics.ran(task="embed", pixels=1, stages={}, key=f"caller-{number}")
    for name in ("model_seconds_count", "batch_size_count", "key_requests_total"):
        assert metrics.text().count(f"pimc_{name}{{".encode()) == 65
    assert b'pimc_key_pixels_total{key="other"} 136.0' in metrics.text()


def test_the_age_of_the_oldest_job_is_that_of_the_longest_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    metrics = Metrics()
    monkeypatch.setattr("service.telemetry.time.time", lambda: 1000.0)
    for oldest, age in ((940.0, 60.0), (None, 0.0), (1010.0, 0.0)):
        metrics.jobs({"accepted": 1}, oldest)
        assert f"pimc_oldest_job_seconds {age}" in metrics.text().decode()


@pytest.mark.slow
def test_sweeps_are_counted(zoo: Path) -> None:
    with served(model_dir=zoo, job_ttl=1) as api:
        swept = threading.Event()
        plain = JobStore.sweep

        def sweep(store: JobStore, seconds: float) -> None:
            plain(store, seconds)
            swept.set()

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(JobStore, "sweep", sweep)
            assert swept.wait(PATIENCE)
            swept.clear()
            assert swept.wait(PATIENCE)
        assert sample(api, "pimc_sweeps_total", outcome="done") >= 1


# Scrapes --------------------------------------------------------------------------------------


def test_requests_for_metrics_share_a_text_that_is_made_after_the_last_of_them() -> None:
    events: list[str] = []

    def make() -> bytes:
        events.append("made")
        return str(len(events)).encode()

    async def request(text: SharedText) -> int:
        events.append("requested")
        requested = len(events)
        found = int(await text.latest())
        assert events[found - 1] == "made"
        assert found > requested
        return found

    async def request_at_once() -> list[int]:
        text = SharedText(make, interval=0.125, burst=20)
        found = await asyncio.gather(*(request(text) for _ in range(300)))
        # One that leaves takes nothing from those that wait with it.
        leaving, staying = (asyncio.create_task(request(text)) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        return [*found, await staying]

    with asyncio.Runner(loop_factory=JumpingClock) as runner:
        found = runner.run(request_at_once())
    assert events.count("made") == 20 + 1 + 1
    assert len(set(found[:20])) == 20
    assert len(set(found[20:300])) == 1


# Private --------------------------------------------------------------------------------------

OPEN = ("/metrics", "/docs", "/docs/swagger-ui.css", "/openapi.json", "/explorer/demo")


@pytest.mark.slow
def test_what_is_open_is_closed_where_the_service_is_private(zoo: Path) -> None:
    with served(model_dir=zoo, api_keys=(KEY,), private=True) as api:
        for path in OPEN:
            for headers in ({}, {"X-API-Key": "wrong"}):
                response = api.get(path, headers=headers)
                assert (response.status_code, response.json()["code"]) == (401, "unauthorized"), (
                    path
                )
                assert api.head(path, headers=headers).status_code == 401
            known = api.get(path, headers={"Authorization": f"Bearer {KEY}"})
            assert known.status_code == (404 if path == "/explorer/demo" else 200)
        # The explorer is the same page for everybody, and has a dialog for the key.
        assert api.get("/").status_code == 200
        # A load balancer has no key: it sees whether, and nothing of what.
        assert api.get("/health/live").json() == {"status": "live"}
        assert api.get("/health/ready").json() == {"status": "ready"}
        assert "provider" in api.get("/health/ready", headers={"X-API-Key": KEY}).json()


@pytest.mark.slow
def test_a_private_service_does_not_state_why_it_is_not_ready(zoo: Path) -> None:
    with served(model_dir=zoo, api_keys=(KEY,), private=True, min_free_bytes=2**60) as api:
        assert unready(api).startswith("the service is not ready; with an API key")
        response = api.get("/health/ready", headers={"X-API-Key": KEY})
        assert response.status_code == 503
        assert "PIMC_MIN_FREE_BYTES" in response.json()["detail"]


def test_by_default_they_are_open(api: httpx.Client) -> None:
    for path in (*OPEN[:-1], "/", "/health/ready"):
        assert httpx.get(api.base_url.join(path), timeout=PATIENCE).status_code == 200


# Readiness ------------------------------------------------------------------------------------


def unready(api: httpx.Client) -> str:
    response = api.get("/health/ready")
    assert (response.status_code, response.json()["code"]) == (503, "not_ready"), response.text
    assert api.get("/health/live").status_code == 200
    return str(response.json()["detail"])


def test_readiness_includes_workers_and_disk(api: httpx.Client) -> None:
    entry = api.get("/health/ready").json()
    assert entry["workers"] == 1
    assert set(entry["disk_free"]) == {"state", "scratch"}
    assert all(count > 0 for count in entry["disk_free"].values())


def test_a_server_is_not_ready_before_it_rejects_for_load(
    zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = threading.Event()

    def held(*arguments: Any, **options: Any) -> Any:
        assert opened.wait(PATIENCE)
        return execute(*arguments, **options)

    monkeypatch.setattr(tasks, "execute", held)
    keys = tuple(f"key-{number}" for number in range(8))
    # One run slot: 2 queue slots of each caller, 16 of all.
    with (
        served(model_dir=zoo, max_concurrency=1, api_keys=keys) as api,
        ThreadPoolExecutor(len(keys) * 2) as pool,
    ):

        def embed(key: str) -> int:
            return api.post("/embed", json=SERIES, headers={"X-API-Key": key}).status_code

        try:
            sent = [pool.submit(embed, key) for key in keys[:7] * 2]
            assert soon(lambda: sample(api, "pimc_run_slots_awaited") == 13)
            assert api.get("/health/ready").status_code == 200
            sent.append(pool.submit(embed, keys[7]))
            assert soon(lambda: sample(api, "pimc_run_slots_awaited") == 14)
            assert unready(api) == "15 of 16 queue slots are in use"
            assert api.get("/health/ready").headers["Retry-After"] == "5"
            # Requests that are sent nevertheless are still accepted.
            sent.append(pool.submit(embed, keys[7]))
            assert soon(lambda: sample(api, "pimc_run_slots_awaited") == 15)
        finally:
            opened.set()
        assert [one.result(PATIENCE) for one in sent] == [200] * 16
        assert soon(lambda: api.get("/health/ready").status_code == 200)


def test_open_files_count_as_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / str(number)).touch()
    monkeypatch.setattr(health, "_DESCRIPTORS", tmp_path)
    monkeypatch.setattr(health.resource, "getrlimit", lambda _: (10, 10))
    assert health._busy(0, 10) == ["9 of 10 files are open"]
    (tmp_path / "0").unlink()
    assert health._busy(8, 10) == []
    assert health._busy(9, 10) == ["9 of 10 queue slots are in use"]


@pytest.mark.slow
def test_a_disk_with_too_little_room_is_not_ready(zoo: Path) -> None:
    with served(model_dir=zoo, min_free_bytes=2**60) as api:
        entry = unready(api)
        assert "state" in entry
        assert "scratch" in entry
        assert "PIMC_MIN_FREE_BYTES" in entry


@pytest.mark.slow
def test_a_thread_of_jobs_that_died_is_not_ready(
    zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.threads._MOST_FAILURES", 1)
    with served(model_dir=zoo) as api:
        assert api.get("/health/ready").status_code == 200

        def broken(store: JobStore, resting: object) -> None:
            raise MemoryError("nobody foresaw this")

        with monkeypatch.context() as patched:
            patched.setattr(JobStore, "take", broken)
            assert api.post("/embed", json=SERIES, headers=ASYNC).status_code == 202
            assert soon(lambda: api.get("/health/ready").status_code != 200)
        assert "'job-0' has ended" in unready(api)


@pytest.mark.slow
def test_a_store_that_others_hold_is_not_ready_and_is_again(zoo: Path, tmp_path: Path) -> None:
    with served(model_dir=zoo, state_dir=tmp_path) as api:
        db = sqlite3.connect(tmp_path / "jobs.sqlite", isolation_level=None)
        try:
            db.execute("BEGIN EXCLUSIVE")
            assert soon(lambda: api.get("/health/ready").status_code == 503)
            assert "job store" in unready(api)
            db.execute("ROLLBACK")
        finally:
            db.close()
        assert soon(lambda: api.get("/health/ready").status_code == 200)
        job = api.post("/embed", json=SERIES, headers=ASYNC).json()["jobID"]
        assert waited(api, job)["status"] == "successful"

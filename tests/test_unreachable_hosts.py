"""Jobs whose remote files cannot be read for a while: they wait, and fail at last."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import pytest
from rasterio.windows import Window

from benchmarks.remote import degrees, stack, write_cog
from benchmarks.serving import served
from service.jobs import runner
from service.read import blocks
from tests.kits.gate import Gate, zoo_with_a_held_model
from tests.kits.jobs import SERIES, Files, finished, submitted, waited
from tests.kits.jobs import stack as small_stack
from tests.kits.patience import soon
from tests.kits.ranges import RangeServer, range_server
from tests.kits.replicas import submitted_held

pytestmark = pytest.mark.slow

SIDE, BLOCK = 512, 128


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo_with_a_held_model(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A stack of the job that holds the worker."""
    return small_stack(tmp_path_factory.mktemp("stack"))


class Host:
    """A web server of COGs that closes connections without a response while `away` is true."""

    def __init__(self, server: RangeServer) -> None:
        self.server = server
        self.away: Callable[[], bool] = lambda: False
        self.refused = 0
        server.tag, server.before = '"1"', self._refuse
        write_cog(server.folder / "tile.tif", SIDE, BLOCK, Window(0, 0, SIDE, SIDE))
        self.names = stack(server.folder, server.folder / "tile.tif", 4)

    def _refuse(self, request: BaseHTTPRequestHandler) -> bool:
        if not self.away():
            return False
        self.refused += 1
        request.close_connection = True
        return True

    def points(self) -> dict[str, Any]:
        """A request of one pixel."""
        west, south, east, north = degrees(Window(300, 200, 1, 1))
        at = {"type": "Point", "coordinates": [(west + east) / 2, (south + north) / 2]}
        feature = {"type": "Feature", "geometry": at, "properties": {}}
        items = [{"href": f"{self.server.url}/{name}"} for name in self.names]
        points = {"type": "FeatureCollection", "features": [feature]}
        return {"items": items, "mask": "none", "points": points}


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(blocks, "_PAUSE_SECONDS", 0.0)
    (tmp_path / "web").mkdir()
    with range_server(tmp_path / "web") as server:
        yield Host(server)


@contextmanager
def one_worker(zoo: Path) -> Iterator[httpx.Client]:
    with served(model_dir=zoo, allowed_hosts="127.0.0.1", job_workers=1) as api:
        yield api


def waits(caplog: pytest.LogCaptureFixture) -> int:
    """How often a job was put back because of its host."""
    return sum(record.getMessage() == "job waits for a host" for record in caplog.records)


def accepted(api: httpx.Client, host: Host, files: Files, gate: Gate) -> str:
    """A job that was accepted, and does not run because another holds the worker."""
    gate.hold()
    held = submitted_held(api, files)
    assert soon(lambda: api.get(f"/jobs/{held}").json()["status"] == "running")
    return submitted(api, "/classify-pixels", json=host.points())


def test_a_job_waits_for_its_host(
    zoo: Path, files: Files, host: Host, gate: Gate,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(runner, "_REST_SECONDS", 0.01)
    caplog.set_level(logging.WARNING)
    with one_worker(zoo) as api:
        job = accepted(api, host, files, gate)
        host.away = lambda: waits(caplog) < 2
        gate.open()
        found = finished(api, job)
        assert host.refused >= 2 * 3  # each start requests a range three times
        assert found == api.post("/classify-pixels", json=host.points()).content
    assert waits(caplog) == 2
    reasons = [vars(record) for record in caplog.records if "waits for" in record.getMessage()]
    assert all("'127.0.0.1'" in record["reason"] for record in reasons)
    assert [record["seconds"] for record in reasons] == [0.01, 0.02]


def test_a_job_whose_host_stays_away_fails_and_names_it(
    zoo: Path, files: Files, host: Host, gate: Gate,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(runner, "_REST_SECONDS", 0.001)
    caplog.set_level(logging.WARNING)
    with one_worker(zoo) as api:
        job = accepted(api, host, files, gate)
        host.away = lambda: True
        gate.open()
        assert waited(api, job)["status"] == "failed"
        problem = api.get(f"/jobs/{job}/result").json()
    assert problem["code"] == "unreachable_reference"
    assert "'127.0.0.1'" in problem["detail"]
    assert f"started {runner._HOST_ATTEMPTS} times" in problem["detail"]
    assert waits(caplog) == runner._HOST_ATTEMPTS - 1


def test_other_jobs_run_while_a_job_waits_for_its_host(
    zoo: Path, files: Files, host: Host, gate: Gate,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(runner, "_REST_SECONDS", 10_000.0)
    caplog.set_level(logging.WARNING)
    with one_worker(zoo) as api:
        job = accepted(api, host, files, gate)
        host.away = lambda: True
        gate.open()
        assert soon(lambda: waits(caplog) == 1)
        finished(api, submitted(api, json=SERIES))
        assert api.get(f"/jobs/{job}").json()["status"] == "accepted"
        assert api.delete(f"/jobs/{job}").json()["status"] == "dismissed"
    assert waits(caplog) == 1


def test_an_answer_that_will_not_change_fails_a_job_at_once(
    zoo: Path, files: Files, host: Host, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with one_worker(zoo) as api:
        job = accepted(api, host, files, gate)
        host.server.tag = '"2"'  # the files were replaced
        gate.open()
        assert waited(api, job)["status"] == "failed"
        assert "replaced the file" in api.get(f"/jobs/{job}/result").json()["detail"]
    assert waits(caplog) == 0

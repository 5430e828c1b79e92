"""Quotas of a caller, their `RateLimit` headers, and turns between callers. Over sockets."""

from __future__ import annotations

import json
import re
import socket
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from queue import Queue
from typing import Any

import httpx
import numpy as np
import pytest
import rasterio.warp

from benchmarks.serving import served
from benchmarks.tiny_zoo import write_zoo
from service.api.quotas import Limit, headers
from service.api.routes import tasks
from service.errors import Overloaded, TooManyRequests
from service.jobs import runner, store
from service.jobs.store import JobStore
from service.jobs.usage import Share, Usage
from service.run.execute import execute
from service.run.plan import Plan
from tests.kits.jobs import ASYNC, SERIES, Backend, waited
from tests.kits.patience import PATIENCE, soon
from tests.kits.rasters import NORTH_UP, UTM, write

ANNA, BEN = {"X-API-Key": "anna"}, {"X-API-Key": "ben"}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zoo(tmp_path_factory.mktemp("zoo"))


def embed(api: httpx.Client, count: int, *more: dict[str, str]) -> httpx.Response:
    head = {name: value for one in more for name, value in one.items()}
    return api.post("/embed", json={"series": SERIES["series"] * count}, headers=head)


def refused(response: httpx.Response, policy: str) -> dict[str, Any]:
    document = response.json()
    assert (response.status_code, document["code"]) == (429, "too_many_requests"), response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    assert document["violated-policies"] == [policy]
    assert int(response.headers["Retry-After"]) > 0
    # A rejection names the quota that it is for, and no other.
    assert list(left(response)) == [policy]
    assert policy in quotas(response)
    return dict(document)


def items(text: str) -> dict[str, dict[str, str]]:
    """A list of structured fields (RFC 9651): strings with parameters."""
    found = {}
    for item in text.split(", "):
        parts = re.fullmatch(r'"(\w+)"((?:;[a-z]+=(?:\d+|"[a-z-]+"))+)', item)
        assert parts, item
        found[parts[1]] = dict(p.split("=", 1) for p in parts[2].removeprefix(";").split(";"))
    return found


def left(response: httpx.Response) -> dict[str, dict[str, str]]:
    return items(response.headers["RateLimit"])


def quotas(response: httpx.Response) -> dict[str, dict[str, str]]:
    return items(response.headers["RateLimit-Policy"])


def exceeded(api: httpx.Client, policy: str) -> float:
    found = re.search(rf'^pimc_quota_exceeded_total{{quota="{policy}"}} (\S+)$',
                      api.get("/metrics").text, re.MULTILINE)  # fmt: skip
    return float(found[1]) if found else 0.0


class Gate:
    """Holds every run of a job until it is let through; `began` has their numbers of series."""

    def __init__(self) -> None:
        self.began: Queue[int] = Queue()
        self._let = threading.Semaphore(0)

    def __call__(self, plan: Plan, *arguments: Any, **options: Any) -> Any:
        self.began.put(len(plan.request.series))  # type: ignore[union-attr]
        assert self._let.acquire(timeout=PATIENCE)
        return execute(plan, *arguments, **options)

    def next(self) -> int:
        return self.began.get(timeout=PATIENCE)

    def open(self, runs: int = 1) -> None:
        self._let.release(runs)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate()
    monkeypatch.setattr(runner, "execute", made)
    yield made
    made.open(99)


# Jobs ---------------------------------------------------------------------------------------


def test_one_key_fills_half_of_the_places_for_jobs(zoo: Path, gate: Gate) -> None:
    with served(model_dir=zoo, max_jobs=4, api_keys=("anna", "ben")) as api:
        repeat = {"Idempotency-Key": "1"}
        first = embed(api, 1, ANNA, ASYNC, repeat)
        assert quotas(first) == {"jobs": {"q": "2", "qu": '"concurrent-requests"'}}
        assert left(first) == {"jobs": {"r": "1"}}
        assert embed(api, 1, ANNA, ASYNC).status_code == 202
        problem = refused(embed(api, 1, ANNA, ASYNC), "jobs")
        assert "PIMC_MAX_JOBS_PER_CALLER" in problem["detail"]
        assert exceeded(api, "jobs") == 1
        # Repeats and synchronous requests need no place, and the other key has its own.
        assert embed(api, 1, ANNA, ASYNC, repeat).json()["jobID"] == first.json()["jobID"]
        assert embed(api, 1, ANNA).status_code == 200
        for _ in range(2):
            assert embed(api, 1, BEN, ASYNC).status_code == 202
        refused(embed(api, 1, BEN, ASYNC), "jobs")
        gate.open(99)


@pytest.mark.slow
def test_one_key_alone_may_fill_all_places(zoo: Path, gate: Gate) -> None:
    with served(model_dir=zoo, max_jobs=2, api_keys=("anna",)) as api:
        responses = [embed(api, 1, ANNA, ASYNC)]
        assert gate.next() == 1  # it runs, and two more may wait
        responses += [embed(api, 1, ANNA, ASYNC) for _ in range(3)]
        assert [response.status_code for response in responses] == [202, 202, 202, 503]
        assert not [name for name in responses[0].headers if name.startswith("ratelimit")]
        gate.open(99)


def test_jobs_of_callers_take_turns(zoo: Path, gate: Gate) -> None:
    with served(model_dir=zoo, api_keys=("anna", "ben")) as api:
        for count in (1, 2, 3):
            assert embed(api, count, ANNA, ASYNC).status_code == 202
        for count in (4, 5):
            assert embed(api, count, BEN, ASYNC).status_code == 202
        order = []
        for _ in range(5):
            order.append(gate.next())
            gate.open()
        assert order == [1, 4, 2, 5, 3]


@pytest.mark.slow
def test_a_caller_with_fewer_running_jobs_comes_first(backend: Backend) -> None:
    with backend.opened() as jobs:
        for number, caller in enumerate(("many", "many", "many", "few", "many", "few")):
            backend.rows(
                "INSERT INTO jobs (id, owner, caller, task, model, sha256, created, updated) "
                "VALUES (?, '', ?, 'embed', 'm@1', 'x', 1, 1)",
                str(number),
                caller,
            )
        taken = [job for job in (jobs.take() for _ in range(3)) if job]
        assert [job.caller for job in taken] == ["many", "few", "many"]
        jobs.put_back(taken[0])
        # One runs for each; `few` was served longer ago, and a job put back keeps its place.
        following = [job for job in (jobs.take() for _ in range(4)) if job]
        assert [job.caller for job in following] == ["few", "many", "many", "many"]
        assert following[1].number == taken[0].number
        assert jobs.take() is None


# Requests, pixels, storage ------------------------------------------------------------------


@pytest.mark.slow
def test_requests_at_once_are_bounded(zoo: Path) -> None:
    with served(model_dir=zoo, max_requests_per_caller=2, api_keys=("anna", "ben")) as api:
        where = (api.base_url.host, api.base_url.port or 80)
        with socket.create_connection(where, PATIENCE) as upload:
            upload.sendall(
                b"POST /embed HTTP/1.1\r\nHost: here\r\nX-API-Key: anna\r\nContent-Length: 99\r\n"
                b"Content-Type: application/json\r\n\r\n{"
            )
            assert soon(lambda: "pimc_uploads_in_flight 1.0" in api.get("/metrics").text)
            response = embed(api, 1, ANNA)
            assert response.status_code == 200
            assert quotas(response)["requests"] == {"q": "2", "qu": '"concurrent-requests"'}
            with socket.create_connection(where, PATIENCE) as second:
                second.sendall(
                    b"POST /embed HTTP/1.1\r\nHost: here\r\nX-API-Key: anna\r\n"
                    b"Content-Length: 99\r\nContent-Type: application/json\r\n\r\n{"
                )
                assert soon(lambda: "pimc_uploads_in_flight 2.0" in api.get("/metrics").text)
                problem = refused(embed(api, 1, ANNA), "requests")
                assert "PIMC_MAX_REQUESTS_PER_CALLER" in problem["detail"]
                assert embed(api, 1, BEN).status_code == 200
        assert soon(lambda: embed(api, 1, ANNA).status_code == 200)
        assert exceeded(api, "requests") >= 1


@pytest.mark.slow
def test_pixels_of_a_day_are_bounded(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    today = 20_000
    monkeypatch.setattr("service.jobs.usage._day", lambda db: (today, 3600))
    settings: dict[str, Any] = {"model_dir": zoo, "state_dir": tmp_path, "max_pixels_per_day": 10}
    with served(**settings, api_keys=("anna", "ben")) as api:
        response = embed(api, 3, ANNA)
        assert response.status_code == 200
        assert quotas(response)["pixels"] == {"q": "10", "qu": '"pimc-pixels"', "w": "86400"}
        assert left(response)["pixels"]["r"] == "7"
        assert 0 < int(left(response)["pixels"]["t"]) <= 86_400
        assert left(embed(api, 4, ANNA, ASYNC))["pixels"]["r"] == "3"
        for how in ({}, ASYNC):
            response = embed(api, 4, ANNA, how)
            problem = refused(response, "pixels")
            assert "PIMC_MAX_PIXELS_PER_DAY" in problem["detail"]
            assert int(response.headers["Retry-After"]) >= int(left(response)["pixels"]["t"])
            assert left(response)["pixels"]["r"] == "3"  # what was rejected is not counted
        assert left(embed(api, 10, BEN))["pixels"]["r"] == "0"
        for how in ({}, ASYNC):  # no day is long enough, so there is nothing to wait for
            response = embed(api, 11, BEN, how)
            problem = response.json()
            assert (response.status_code, problem["code"]) == (413, "raster_too_large")
            assert "Retry-After" not in response.headers
            assert "has 11 pixels" in problem["detail"]
            assert "may use 10 a day (PIMC_MAX_PIXELS_PER_DAY" in problem["detail"]
            assert "send a smaller area or fewer series" in problem["detail"]
    with served(**settings, api_keys=("anna", "ben")) as api:  # a restart forgets nothing
        assert embed(api, 4, ANNA).status_code == 429
        today += 1
        assert embed(api, 4, ANNA).status_code == 200


def test_measured_series_and_own_classes_count_as_pixels(zoo: Path, tmp_path: Path) -> None:
    side, dates = 6, [f"2021-{month:02d}-15" for month in range(1, 9)]
    parts = []
    for day in dates:
        bands = np.full((4, side, side), 2000, np.uint16)
        path = write(tmp_path / f"{day}.tif", bands, descriptions=("B02", "B04", "B08", "B11")).path
        parts.append(("files", (path.name, path.read_bytes(), "image/tiff")))
    (lons, lats) = rasterio.warp.transform(
        UTM, "EPSG:4326", [NORTH_UP.c + 5, NORTH_UP.c + 45], [NORTH_UP.f - 5, NORTH_UP.f - 45]
    )
    corners = [(0, 0), (0, 1), (1, 1), (1, 0), (0, 0)]
    field = {"type": "Polygon", "coordinates": [[[lons[x], lats[y]] for x, y in corners]]}
    points = [{"type": "Point", "coordinates": list(one)} for one in zip(lons, lats, strict=True)]

    def measured(**geometries: list[dict[str, Any]]) -> httpx.Response:
        data = {
            name: json.dumps(
                {
                    "type": "FeatureCollection",
                    "features": [
                        {"type": "Feature", "geometry": one, "properties": {}} for one in shapes
                    ],
                }
            )
            for name, shapes in geometries.items()
        }
        return api.post("/series", files=parts, data=data, headers=ANNA)

    taught = [
        {
            "class": ("bare", "green")[n % 2],
            "dates": dates,
            "B04": [0.2 - 0.1 * (n % 2)] * 8,
            "B08": [0.25 + 0.02 * n] * 8,
        }
        for n in range(10)
    ]

    def teach(name: str) -> httpx.Response:
        return api.post("/heads", json={"name": name, "series": taught}, headers=ANNA)

    most = 2 + side * side + len(taught) + 1
    with served(model_dir=zoo, max_pixels_per_day=most, api_keys=("anna", "ben")) as api:
        remaining = []
        for response in (measured(points=points), measured(fields=[field]), teach("own")):
            assert response.is_success, response.text
            remaining.append(int(left(response)["pixels"]["r"]))
        assert remaining == [most - 2, most - 2 - side * side, 1]
        for rejected in (measured(points=points), measured(fields=[field]), teach("another")):
            refused(rejected, "pixels")
            assert left(rejected)["pixels"]["r"] == "1"
        assert [h["name"] for h in api.get("/heads", headers=ANNA).json()["heads"]] == ["own"]


@pytest.mark.slow
def test_the_storage_of_a_caller_is_bounded(zoo: Path) -> None:
    with served(model_dir=zoo, max_storage_per_caller=4000, api_keys=("anna", "ben")) as api:
        made = []
        for _ in range(20):
            response = embed(api, 1, ANNA, ASYNC)
            if response.status_code != 202:
                break
            made.append(response.json()["jobID"])
            api.headers.update(ANNA)
            waited(api, made[-1])
            api.headers.pop("X-API-Key")
        problem = refused(response, "storage")
        assert "PIMC_MAX_STORAGE_PER_CALLER" in problem["detail"]
        assert len(made) > 1
        assert int(response.headers["Retry-After"]) > 7 * 24 * 3600 - 600  # when the first expires
        assert quotas(response)["storage"] == {"q": "4000", "qu": '"content-bytes"'}
        assert embed(api, 1, BEN, ASYNC).status_code == 202
        response = embed(api, 400, BEN, ASYNC)
        problem = response.json()
        assert (response.status_code, problem["code"]) == (413, "body_too_large")
        assert "Retry-After" not in response.headers
        assert "may keep 4000 (PIMC_MAX_STORAGE_PER_CALLER" in problem["detail"]
        for job in made:
            api.delete(f"/jobs/{job}", headers=ANNA)
        assert int(left(embed(api, 1, ANNA))["storage"]["r"]) == 4000
        assert embed(api, 1, ANNA, ASYNC).status_code == 202


@pytest.mark.slow
def test_without_keys_an_address_is_a_caller(zoo: Path, gate: Gate) -> None:
    with served(model_dir=zoo, max_jobs_per_caller=1) as api:
        other = httpx.Client(
            base_url=api.base_url,
            transport=httpx.HTTPTransport(local_address="127.0.0.2"),
            timeout=PATIENCE,
        )
        with other:
            try:
                other.get("/health/live")
            except httpx.ConnectError:
                pytest.skip("needs a second loopback address")
            assert embed(api, 1, ASYNC).status_code == 202
            refused(embed(api, 1, ASYNC), "jobs")
            assert embed(other, 1, ASYNC).status_code == 202
        gate.open(99)


def test_headers_state_what_is_left() -> None:
    limits = [
        Limit(policy="jobs", quota=50, unit="concurrent-requests", left=49),
        Limit(policy="pixels", quota=9, unit="pimc-pixels", left=0, window=86_400, seconds=60),
    ]
    assert headers([], status=200, violated=None) == {}
    policy = '"jobs";q=50;qu="concurrent-requests", "pixels";q=9;qu="pimc-pixels";w=86400'
    assert headers(limits, status=200, violated=None) == {
        "RateLimit-Policy": policy,
        "RateLimit": '"jobs";r=49, "pixels";r=0;t=60',
    }
    # Retry-After of `overloaded` is earlier than the end of the day.
    assert headers(limits, status=503, violated=None) == {"RateLimit-Policy": policy}
    assert headers(limits, status=429, violated="jobs")["RateLimit"] == '"jobs";r=49'


@pytest.mark.slow
def test_a_run_that_finds_no_room_is_not_charged(
    zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> Any:
        raise Overloaded("no room in memory")

    with served(model_dir=zoo, max_pixels_per_day=10) as api:
        with monkeypatch.context() as patched:
            patched.setattr(tasks, "execute", full)
            assert embed(api, 6).status_code == 503
        assert left(embed(api, 1))["pixels"]["r"] == "9"


# The store ----------------------------------------------------------------------------------


def test_the_day_begins_by_the_clock_of_the_database(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = Share(pixels=10)
    with backend.opened() as jobs:
        jobs.usage.charge("anna", 10, share)
        before = jobs.usage.of("anna")
        assert 0 < before.day_left <= 86_400
        ahead = store.time.time() + 86_400
        monkeypatch.setattr(store.time, "time", lambda: ahead)  # of this replica
        assert jobs.usage.of("anna").pixels == 10
        with pytest.raises(TooManyRequests) as refusal:
            jobs.usage.charge("anna", 1, share)
        assert refusal.value.retry_after <= before.day_left


def test_a_day_is_charged_whole_or_not_at_all(backend: Backend) -> None:
    with backend.opened() as jobs:
        share = Share(pixels=10)
        jobs.usage.charge("anna", 6, share)
        with pytest.raises(TooManyRequests, match="6 of its 10"):
            jobs.usage.charge("anna", 5, share)
        jobs.usage.charge("anna", 4, share)
        assert jobs.usage.of("anna").pixels == 10
        jobs.usage.charge("ben", 10, share)
        jobs.usage.charge("anna", 5, Share())
        jobs.adopt({"ben": "anna"})
        assert jobs.usage.of("anna").pixels == 20
        assert jobs.usage.of("ben").pixels == 0


# As the release before this one made it: nobody's share was counted.
SCHEMA_2 = """
PRAGMA user_version = 2;
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL,
    idempotency_key TEXT, fingerprint TEXT, task TEXT NOT NULL,
    model TEXT NOT NULL, sha256 TEXT NOT NULL, status TEXT NOT NULL DEFAULT 'accepted',
    progress INTEGER NOT NULL DEFAULT 0, problem TEXT, computed_by TEXT,
    attempts INTEGER NOT NULL DEFAULT 0, created REAL NOT NULL, started REAL, finished REAL,
    updated REAL NOT NULL, age REAL NOT NULL DEFAULT 0, UNIQUE (owner, idempotency_key)
);
CREATE INDEX by_status ON jobs (status);
CREATE INDEX by_owner ON jobs (owner, number);
CREATE TABLE windows (
    job INTEGER NOT NULL REFERENCES jobs (number) ON DELETE CASCADE, stage TEXT NOT NULL,
    number INTEGER NOT NULL, place TEXT NOT NULL, offset INTEGER NOT NULL, length INTEGER NOT NULL,
    PRIMARY KEY (job, stage, number)
) WITHOUT ROWID;
CREATE TABLE clock (seen REAL NOT NULL);
INSERT INTO clock VALUES (strftime('%s', 'now'));
"""


def test_jobs_of_the_release_before_count_and_keep_their_owner(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "jobs.sqlite") as db:
        db.executescript(SCHEMA_2)
        for name, owner, status in (
            ("one", "0123456789abcdef", "accepted"), ("two", "", "successful"),
            ("three", "0123456789abcdef", "successful"),
        ):  # fmt: skip
            db.execute(
                "INSERT INTO jobs (id, owner, task, model, sha256, status, created, updated) "
                "VALUES (?, ?, 'embed', 'm@1', 'x', ?, 1, 1)",
                (name, owner, status),
            )
            (tmp_path / "jobs" / name / "result").mkdir(parents=True)
            (tmp_path / "jobs" / name / "result" / "class.tif").write_bytes(bytes(1000))
    db.close()
    for _ in range(2):  # the second start finds it upgraded
        with closing(JobStore(tmp_path, ttl=9e9, max_waiting=9)) as jobs:
            jobs.adopt({"0123456789abcdef": "anna"})
            assert [job.id for job in jobs.latest("anna", 9)] == ["three", "one"]
            assert jobs.usage.of("anna") == Usage(jobs=1, pixels=0, bytes=2000)
            assert jobs.usage.of("").bytes == 1000

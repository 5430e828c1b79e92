"""Turns of jobs: a long job makes way for other callers, and loses nothing by it."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.serving import served
from tests.kits.gate import HELD, Gate, zoo_with_a_held_model
from tests.kits.jobs import SERIES, Backend, Files, result, stack, submitted, waited
from tests.kits.patience import soon

pytestmark = pytest.mark.slow

ANNA, BEN = {"X-API-Key": "anna"}, {"X-API-Key": "ben"}
LONG = 4
"""Long jobs of one caller."""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo_with_a_held_model(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A stack of ten windows."""
    return stack(tmp_path_factory.mktemp("stack"), 150, 230)


def long_job(api: httpx.Client, files: Files, key: dict[str, str]) -> str:
    """A job whose windows wait at the gate."""
    return submitted(api, "/classify-pixels", files=files, data={"model": HELD}, headers=key)


def windows(backend: Backend) -> dict[int, int]:
    """Number of finished windows of each job that has some."""
    return dict(backend.rows("SELECT job, count(*) FROM windows GROUP BY job"))


def kept(backend: Backend) -> dict[int, int]:
    """Lease under which each finished window of the first job was computed."""
    return dict(backend.rows("SELECT number, lease FROM windows WHERE job = 1"))


def statuses(backend: Backend) -> list[str]:
    return [status for (status,) in backend.rows("SELECT status FROM jobs ORDER BY number")]


def test_a_short_job_begins_while_another_caller_has_four_long_ones(
    zoo: Path, files: Files, backend: Backend, gate: Gate
) -> None:
    settings: dict[str, Any] = {"model_dir": zoo, "api_keys": ("anna", "ben"), **backend.settings}
    with served(**settings, job_turn_seconds=1e-9) as api:
        gate.hold(after=4)
        first, *others = [long_job(api, files, ANNA) for _ in range(LONG)]
        # Four windows are read, of which two may be in flight.
        assert soon(lambda: windows(backend).get(1, 0) >= 2)
        before = kept(backend)
        short = submitted(api, json=SERIES, headers=BEN)
        # One more window, and the worker is free.
        gate.hold(after=6)
        api.headers.update(BEN)
        assert waited(api, short)["status"] == "successful"
        # The gate holds each run of a long job, so none of them has ended.
        assert "successful" not in statuses(backend)[:LONG]
        # The first goes on after what it has kept, under a later lease: not always the next one,
        # because a busy store also puts a job back.
        held = max(before.values())
        assert soon(lambda: max(kept(backend).values()) > held)
        now = kept(backend)
        assert {number: now[number] for number in before} == before
        gate.open()
        api.headers.update(ANNA)
        for job in (first, *others):
            assert waited(api, job)["status"] == "successful"
        # That it was interrupted does not show.
        assert result(api, first) == result(api, others[-1])
        if backend.url is None:
            assert not list(backend.state.glob("jobs/*/work-*"))


def test_two_callers_with_long_jobs_alternate(
    zoo: Path, files: Files, tmp_path: Path, gate: Gate
) -> None:
    backend = Backend(tmp_path / "state", None)
    with served(
        model_dir=zoo, api_keys=("anna", "ben"), job_turn_seconds=1e-9, **backend.settings
    ) as api:
        gate.hold(after=0)
        one = long_job(api, files, ANNA)
        assert soon(lambda: statuses(backend) == ["running"])
        other = long_job(api, files, BEN)
        gate.open()
        for key, job in ((ANNA, one), (BEN, other)):
            api.headers.update(key)
            assert waited(api, job)["status"] == "successful"
        leases = [lease for (lease,) in backend.rows("SELECT lease FROM jobs ORDER BY number")]
    # Each turn finishes at least two of the ten windows, and a last one the files.
    assert all(2 <= lease <= 6 for lease in leases)
    assert abs(leases[0] - leases[1]) <= 1


def test_a_caller_alone_is_not_interrupted(
    zoo: Path, files: Files, tmp_path: Path, gate: Gate
) -> None:
    backend = Backend(tmp_path / "state", None)
    with served(
        model_dir=zoo, api_keys=("anna", "ben"), job_turn_seconds=1e-9, **backend.settings
    ) as api:
        gate.hold(after=0)
        jobs = [long_job(api, files, ANNA) for _ in range(2)]
        gate.open()
        api.headers.update(ANNA)
        for job in jobs:
            assert waited(api, job)["status"] == "successful"
        assert [lease for (lease,) in backend.rows("SELECT lease FROM jobs")] == [1, 1]


def test_who_waits_with_fewer_running_jobs(backend: Backend) -> None:
    names = map(str, count())

    def add(caller: str) -> None:
        backend.rows(
            "INSERT INTO jobs (id, owner, caller, task, model, sha256, created, updated) "
            "VALUES (?, '', ?, 'embed', 'm@1', 'x', 1, 1)",
            next(names),
            caller,
        )

    with backend.opened() as jobs:
        for caller in ("anna", "anna", "anna"):
            add(caller)
        first, second = jobs.take(), jobs.take()
        assert first is not None
        assert second is not None
        assert not jobs.others_wait(first)  # only anna's own job waits
        add("ben")
        assert jobs.others_wait(first)
        of_ben = jobs.take()
        assert of_ben is not None
        assert of_ben.caller == "ben"
        assert not jobs.others_wait(of_ben)  # anna has more running jobs than ben
        add("ben")
        assert jobs.others_wait(first)  # two of anna's run, and one of ben's
        jobs.put_back(second)
        assert not jobs.others_wait(first)  # one each
        add("carla")
        assert jobs.others_wait(first)
        assert jobs.others_wait(of_ben)

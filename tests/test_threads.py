"""Long-lived threads: failed work is retried or ends the service; locks are waited for."""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from benchmarks.serving import served
from benchmarks.tiny_zoo import write_zoo
from service import threads
from service.jobs import database, runner
from service.jobs.job_files import JobFiles
from service.jobs.storage import StorageUnreachable
from service.jobs.store import JobStore
from service.telemetry import Metrics
from service.threads import SupervisedThread
from tests.kits.forks import Forked
from tests.kits.gate import HELD, Gate, zoo_with_a_held_model
from tests.kits.jobs import ASYNC, SERIES, running, series_plan, stack, until, waited
from tests.kits.patience import PATIENCE, soon


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(runner, "_PAUSE_SECONDS", 0.02)


# Supervision ----------------------------------------------------------------------------------


def test_a_loop_that_fails_is_logged_and_run_again(caplog: pytest.LogCaptureFixture) -> None:
    runs = []

    def loop() -> None:
        runs.append(len(runs))
        if len(runs) < 4:
            raise RuntimeError("broken")

    thread = SupervisedThread("worker", loop)
    thread.start()
    assert thread.join()
    assert (len(runs), thread.failed) == (4, False)
    found = [r for r in caplog.records if r.getMessage() == "thread failed"]
    assert [(vars(r)["loop"], vars(r)["failures"]) for r in found] == [
        ("worker", 1), ("worker", 2), ("worker", 3),
    ]  # fmt: skip
    assert all(r.exc_info for r in found)


def test_a_loop_that_always_fails_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    def loop() -> None:
        raise RuntimeError("broken")

    thread = SupervisedThread("worker", loop)
    thread.start()
    assert thread.join()
    assert thread.failed
    assert caplog.records[-1].levelno == logging.CRITICAL


def test_failures_far_apart_are_not_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_CALM_SECONDS", 0.0)
    left = 50

    def loop() -> None:
        nonlocal left
        left -= 1
        if left:
            raise RuntimeError("broken")

    thread = SupervisedThread("worker", loop)
    thread.start()
    assert thread.join()
    assert not thread.failed


def test_a_pause_ends_when_the_service_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_FIRST_PAUSE", 1e6)
    monkeypatch.setattr(threads, "_LONGEST_PAUSE", 1e6)
    stop, failed = threading.Event(), threading.Event()

    def loop() -> None:
        failed.set()
        raise RuntimeError("broken")

    thread = SupervisedThread("worker", loop, stop)
    thread.start()
    failed.wait()
    stop.set()
    assert thread.join()
    assert not thread.failed


def test_the_sweeper_survives_an_error_and_jobs_still_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_SWEEP_SECONDS", 0.01)
    sweep, broken, swept = JobStore.sweep, [True, True], threading.Event()

    def fails_twice(self: JobStore, seconds: float) -> None:
        sweeper = threading.current_thread().name == "jobs"  # and not the start
        if sweeper and broken:
            broken.pop()
            raise RuntimeError("broken")
        sweep(self, seconds)
        if sweeper:
            swept.set()

    monkeypatch.setattr(JobStore, "sweep", fails_twice)
    with served(model_dir=write_zoo(tmp_path / "zoo")) as api:
        assert swept.wait(PATIENCE)
        assert not broken
        assert api.get("/health/ready").status_code == 200
        job = api.post("/embed", json=SERIES, headers=ASYNC).json()["jobID"]
        assert waited(api, job)["status"] == "successful"


_CHILD = """
import os, sys, threading
from service import __main__ as program
from service import threads
from service.jobs import runner, store
from service.jobs.store import JobStore
threads._FIRST_PAUSE = 0.001
threads._LONGEST_PAUSE = 0.001
runner._SWEEP_SECONDS = 0.01
sweep = JobStore.sweep

def broken(self, seconds):
    if os.path.exists({mark!r}):
        raise RuntimeError("broken")
    sweep(self, seconds)

JobStore.sweep = broken
if {hangs!r}:
    program._STUCK_SECONDS = 0.1
    runner.JobRunner.join = lambda self: threading.Event().wait()
sys.argv = ["service"]
program.main()
"""


def lines_of_a_service(
    folder: Path, once_it_runs: Callable[[Forked, Path], None], *, hangs: bool
) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and log of a service in which something happens once it runs."""
    mark = folder / "broken"
    child = Forked(
        "tests.kits.code",
        _CHILD.format(mark=str(mark), hangs=hangs),
        variables={
            "PIMC_PORT": "0",
            "PIMC_PROVIDERS": "cpu",
            "PIMC_MODEL_DIR": str(write_zoo(folder / "zoo")),
            "PIMC_STATE_DIR": str(folder / "state"),
            "PIMC_GRACE_SECONDS": "0",
        },
    )
    assert child.stderr is not None
    lines = []
    for line in child.stderr:
        lines.append(json.loads(line))
        if "running on" in lines[-1]["message"]:
            once_it_runs(child, mark)
    code = child.wait(PATIENCE)
    child.stderr.close()
    return code, lines


@pytest.mark.slow
def test_a_service_whose_sweeper_is_given_up_ends_so_that_it_is_started_again(
    tmp_path: Path,
) -> None:
    code, lines = lines_of_a_service(tmp_path, lambda _, mark: mark.touch(), hangs=False)
    assert code == 1
    messages = [line["message"] for line in lines]
    assert messages.count("thread failed") == threads._MOST_FAILURES
    assert messages.count("thread failed too often and is not run again") == 1
    assert all("broken" in line["stack"] for line in lines if line["message"] == "thread failed")


@pytest.mark.slow
def test_sigterm_ends_a_service_that_hangs(tmp_path: Path) -> None:
    code, lines = lines_of_a_service(tmp_path, lambda child, _: child.terminate(), hangs=True)
    assert code == 1
    assert (lines[-1]["level"], "did not stop in time" in lines[-1]["message"]) == (
        "critical",
        True,
    )


# A store that another process holds -----------------------------------------------------------


@contextmanager
def locked(state: Path) -> Iterator[None]:
    """Another process's lock on the job store."""
    with closing(
        sqlite3.connect(state / "jobs.sqlite", isolation_level=None, timeout=PATIENCE)
    ) as db:
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            db.execute("ROLLBACK")


@pytest.mark.slow
def test_a_running_job_waits_for_a_locked_store_and_requests_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_BUSY_SECONDS", 0.5)
    caplog.set_level(logging.INFO)
    gate, state = Gate(tmp_path / "gate"), tmp_path / "state"
    zoo = zoo_with_a_held_model(tmp_path / "zoo")
    files = stack(tmp_path, 160, 256)
    with gate.installed(), served(model_dir=zoo, state_dir=state) as api:
        gate.hold(after=4)
        response = api.post("/classify-pixels", files=files, data={"model": HELD}, headers=ASYNC)
        job = response.json()["jobID"]
        until(api, job, progress=1)
        with locked(state):
            gate.open()
            assert soon(lambda: any(r.getMessage() == "job waits" for r in caplog.records))
            told = api.post("/embed", json=SERIES, headers=ASYNC)
            assert (told.status_code, told.json()["code"]) == (503, "overloaded")
            assert "in use by another process" in told.json()["detail"]
            assert int(told.headers["retry-after"]) > 0
            assert api.get("/health/live").status_code == 200
            assert api.get(f"/jobs/{job}").json()["status"] in {"accepted", "running"}
        assert waited(api, job)["status"] == "successful"
        assert soon(lambda: api.get("/health/ready").status_code == 200)


class Pauses(threading.Event):
    """An event that is set once a worker has waited for it `most` times; no wait takes time.

    Args:
        most: number of waits.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most
        self.seconds: list[float | None] = []
        """Of the worker's waits."""

    def wait(self, timeout: float | None = None) -> bool:
        if threading.current_thread().name != "job-0":
            return super().wait(timeout)
        self.seconds.append(timeout)
        if len(self.seconds) == self._most:
            self.set()
        return self.is_set()


def test_the_pauses_of_an_outage_are_bounded_however_long_it_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1100 attempts, each with twice the pause of the one before, would be more than a float."""

    def unreachable(*_: object) -> None:
        raise StorageUnreachable("no route")

    monkeypatch.setattr(runner, "_PAUSE_SECONDS", 1.0)
    closes, none = Pauses(1100), cast("Any", None)
    with (
        series_plan(write_zoo(tmp_path / "zoo")) as plan,
        closing(JobStore(tmp_path / "state", ttl=3600.0, max_waiting=9)) as store,
    ):
        store.accept(plan, tmp_path, owner="")
        job = store.take()
        monkeypatch.setattr(store, "take", lambda _: job)
        monkeypatch.setattr(JobFiles, "prepare", unreachable)
        for name in ("put_back", "tidy"):  # each would be synced to disk
            monkeypatch.setattr(store, name, lambda _: None)
        made = runner.JobRunner(
            store, none, Metrics(), max_raster_bytes=1, max_fields=1, roots=(), workers=1,
            turn_seconds=60.0,
            ttl=3600.0, closing=closes, cache=none, budget=none, executor=none,
            refresh=lambda _: None,
        )  # fmt: skip
        made.start()
        assert threading.Event.wait(closes, PATIENCE)
        made.join()
    assert not made.failed
    assert closes.seconds == [1.0, 2.0, 4.0, 8.0, 16.0, *[30.0] * 1095]


@pytest.mark.slow
def test_a_service_ends_on_sigterm_while_another_process_holds_its_store(tmp_path: Path) -> None:
    gate, state = Gate(tmp_path / "gate"), tmp_path / "state"
    zoo = zoo_with_a_held_model(tmp_path / "zoo")
    files = stack(tmp_path, 160, 256)
    gate.hold(after=4)
    with running(state, zoo, gate=gate) as service:
        response = service.api.post(
            "/classify-pixels", files=files, data={"model": HELD}, headers=ASYNC
        )
        job = response.json()["jobID"]
        until(service.api, job, progress=1)
        with locked(state):
            service.process.terminate()
            assert service.end() == 0
    gate.open()
    with running(state, zoo, gate=gate) as service:
        assert waited(service.api, job)["status"] == "successful"

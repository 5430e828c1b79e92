"""Replicas: several stores, and several processes, on one PostgreSQL database and one folder."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks.serving import served
from service.errors import InternalError, Overloaded, TooManyRequests, UnknownJob
from service.jobs.backup import back_up, restore
from service.jobs.job import Job
from service.jobs.job_requests import Idempotency
from service.jobs.store import JobStore, LeaseLost
from service.jobs.usage import Share
from service.jobs.window_journal import WindowFile
from service.run.plan import Plan
from service.run.request import Subscriber
from service.settings import Settings, SettingsError, read_settings
from tests.kits.forks import ran
from tests.kits.gate import HELD, Gate, zoo_with_a_held_model
from tests.kits.jobs import (
    ASYNC,
    SERIES,
    Backend,
    Files,
    Service,
    check_healthy,
    leftovers,
    result,
    running,
    series_plan,
    stack,
    taught,
    until,
    waited,
)
from tests.kits.patience import soon
from tests.kits.postgres import Postgres
from tests.kits.replicas import (
    STEPS,
    expire,
    publish,
    refusal,
    submitted_held,
    taken,
    windows,
)

WEEK = 7 * 24 * 3600.0


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo_with_a_held_model(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def plan(zoo: Path) -> Iterator[Plan]:
    with series_plan(zoo) as made:
        yield made


@pytest.fixture
def shared(postgres: Postgres, tmp_path: Path) -> Backend:
    """An empty state directory and database, for replicas."""
    return Backend(tmp_path / "state", postgres.database())


@pytest.fixture
def two(shared: Backend) -> Iterator[tuple[JobStore, JobStore]]:
    with shared.opened() as one, shared.opened() as other:
        yield one, other


def finish(store: JobStore, job: Job, text: str) -> None:
    """Publish a result with this text."""
    publish(store, job, text)
    store.succeed(job)


# Leases ---------------------------------------------------------------------------------------


def test_a_job_that_is_held_is_nobody_elses(
    two: tuple[JobStore, JobStore], plan: Plan, shared: Backend, tmp_path: Path
) -> None:
    one, other = two
    one.accept(plan, tmp_path, owner="anna")
    job = taken(one)
    assert other.take() is None
    expire(shared)
    assert one.renew([job]) == []  # nobody took it meanwhile
    assert other.take() is None
    expire(shared)
    again = taken(other)
    assert (again.id, again.lease) == (job.id, job.lease + 1)
    assert one.renew([job]) == [job]
    assert other.renew([again]) == []
    assert one.take() is None


def test_a_job_that_waits_for_a_host_rests_at_every_replica(
    two: tuple[JobStore, JobStore], plan: Plan, shared: Backend, tmp_path: Path
) -> None:
    one, other = two
    one.accept(plan, tmp_path, owner="anna")
    one.put_back(taken(one), counts=True, rest=WEEK)
    second = one.accept(plan, tmp_path, owner="ben")
    running = taken(other)
    assert running.id == second.id
    assert [store.take() for store in two] == [None, None]
    assert not other.others_wait(running)  # it could not start if this one made way
    expire(shared)
    assert taken(other).attempts == 2


def test_a_run_that_lost_its_lease_changes_nothing(
    two: tuple[JobStore, JobStore], plan: Plan, shared: Backend, tmp_path: Path
) -> None:
    one, other = two
    one.accept(plan, tmp_path, owner="anna")
    stalled = taken(one)
    one.begin(stalled, "CPU float32")
    old = WindowFile(one, stalled, lambda: 30)
    old.save(STEPS[0], {"a": np.arange(3)})
    expire(shared)
    job = taken(other)
    other.begin(job, "CPU float32")
    new = WindowFile(other, job, lambda: 60)
    new.save(STEPS[1], {"a": np.arange(4)})
    for change in (
        partial(old.save, STEPS[1], {"a": np.zeros(9)}),
        partial(old.save, STEPS[2], {"a": np.zeros(9)}),
        partial(one.begin, stalled, "CUDA float16"),
        partial(one.change_model, stalled, "m@2", "y"),
        partial(one.fail, stalled, InternalError("too late"), free_key=True),
        partial(one.succeed, stalled),
    ):
        with pytest.raises(LeaseLost, match=job.id):
            change()
    one.put_back(stalled)
    one.files.make_room(stalled)
    one.tidy(stalled)
    # The window that was kept before is lost with the file of the stalled run, no other.
    assert new.load(STEPS[0]) is None
    kept = new.load(STEPS[1])
    assert kept is not None
    np.testing.assert_array_equal(kept["a"], np.arange(4))
    assert new.load(STEPS[2]) is None
    publish(one, stalled, "stalled")
    with pytest.raises(LeaseLost):
        one.succeed(stalled)
    now = one.find("anna", job.id)
    assert (now.status, now.lease, now.progress, now.model) == ("running", 2, 60, job.model)
    finish(other, job, "new")
    for store in two:
        found = store.results.read(store.find("anna", job.id))
        assert found.files["class"].read_text() == "new"
    other.tidy(job)
    left = sorted(path.name for path in other.files.folder(job).iterdir())
    assert left == ["request.json", "result-2"]


def test_windows_of_a_dead_replica_are_read_by_the_next(
    two: tuple[JobStore, JobStore], plan: Plan, shared: Backend, tmp_path: Path
) -> None:
    one, other = two
    one.accept(plan, tmp_path, owner="")
    for number, store in enumerate((one, other, one)):
        job = taken(store)
        journal = WindowFile(store, job, lambda: 1)
        for step in STEPS[:number]:
            found = journal.load(step)
            assert found is not None
            assert found["a"] == step.number
        journal.save(STEPS[number], {"a": np.array(number)})
        expire(shared)
    kept = shared.rows("SELECT number, lease FROM windows ORDER BY number")
    assert kept == [(0, 1), (1, 2), (2, 3)]


def test_files_of_a_replica_that_ended_between_row_and_files_are_removed(
    two: tuple[JobStore, JobStore], plan: Plan, shared: Backend, tmp_path: Path
) -> None:
    one, other = two
    for _ in range(2):
        one.accept(plan, tmp_path, owner="")
    failed, dismissed = taken(one), taken(one)
    one.fail(failed, InternalError("no"))
    other.dismiss("", dismissed.id)
    other.sweep(1)  # it might still be at it
    assert one.files.folder(failed).exists()
    assert one.files.folder(dismissed).exists()
    expire(shared)
    other.sweep(1)
    assert not one.files.folder(failed).exists()
    assert not one.files.folder(dismissed).exists()
    assert [job.status for job in other.latest("", 9)] == ["dismissed", "failed"]


def test_replicas_count_the_time_once(
    two: tuple[JobStore, JobStore], plan: Plan, shared: Backend, tmp_path: Path
) -> None:
    one, other = two
    one.accept(plan, tmp_path, owner="")
    job = taken(one)
    finish(one, job, "x")
    shared.rows("UPDATE clock SET seen = seen - ?", 0.6 * WEEK)
    for store in (one, other, one, other):
        store.sweep(0.6 * WEEK)  # each has waited so long, but together
    assert one.find("", job.id).status == "successful"
    shared.rows("UPDATE clock SET seen = seen - ?", 0.6 * WEEK)
    other.sweep(0.6 * WEEK)
    with pytest.raises(UnknownJob):
        one.find("", job.id)
    assert not one.files.folder(job).exists()


def test_a_replica_that_starts_leaves_the_work_of_others_alone(
    shared: Backend, plan: Plan, tmp_path: Path
) -> None:
    with shared.opened() as one:
        one.accept(plan, tmp_path, owner="")
        job = taken(one)
        young, old = shared.state / "jobs" / "young", shared.state / "jobs" / "old"
        for folder in (young, old):
            folder.mkdir()
        two_days_ago = time.time() - 2 * 24 * 3600
        os.utime(old, (two_days_ago, two_days_ago))
        with shared.opened() as other:
            assert one.renew([job]) == []
            assert other.find("", job.id).status == "running"
            assert other.files.folder(job).exists()
            assert young.exists()  # another replica may be about to accept it
            assert not old.exists()


# What callers may use -------------------------------------------------------------------------


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Results of calls that begin together, each in a thread of its own; errors as values."""
    barrier = threading.Barrier(len(calls))

    def call(one: Callable[[], Any]) -> Any:
        barrier.wait()
        try:
            return one()
        except TooManyRequests as error:
            return error

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(call, calls))


def test_quotas_hold_across_replicas(
    two: tuple[JobStore, JobStore], plan: Plan, tmp_path: Path
) -> None:
    share = Share(pixels=5)
    charged = at_once(*[partial(store.usage.charge, "anna", 1, share) for store in two * 6])
    assert sum(result is None for result in charged) == 5
    assert [store.usage.of("anna").pixels for store in two] == [5, 5]
    accept = {"owner": "anna", "share": Share(jobs=3)}
    made = at_once(*[partial(store.accept, plan, tmp_path, **accept) for store in two * 4])
    assert sum(isinstance(result, Job) for result in made) == 3
    assert [store.usage.of("anna").jobs for store in two] == [3, 3]
    # Nothing is left of those that were rejected.
    assert len(list((tmp_path / "state" / "jobs").iterdir())) == 3


def test_a_key_of_repetition_makes_one_job_across_replicas(
    two: tuple[JobStore, JobStore], plan: Plan, tmp_path: Path
) -> None:
    same = Idempotency(key="k", fingerprint="1")
    accept = {"owner": "anna", "idempotency": same}
    made = at_once(*[partial(store.accept, plan, tmp_path, **accept) for store in two * 3])
    assert len({job.id for job in made}) == 1
    assert len(list((tmp_path / "state" / "jobs").iterdir())) == 1


def test_a_callback_is_sent_by_one_replica_and_by_the_other_if_that_ends(
    two: tuple[JobStore, JobStore], plan: Plan, tmp_path: Path
) -> None:
    one, other = two
    whom = Subscriber(success="https://example.org/done", failed=None, progress=None)
    called = replace(plan, request=replace(plan.request, subscriber=whom))
    one.accept(called, tmp_path, owner="")
    job = taken(other)
    finish(other, job, "x")
    now = time.time() + 1
    found = at_once(*[partial(store.outbox.due, now, 9) for store in two])
    assert sorted(len(due) for due in found) == [0, 1]
    assert other.outbox.due(now + 50, 9) == []
    (again,) = other.outbox.due(now + 70, 9)
    assert (again.job.id, again.attempts) == (job.id, 0)
    other.outbox.delivered(again)
    assert one.outbox.count() == 0


def test_each_job_is_taken_once(two: tuple[JobStore, JobStore], plan: Plan, tmp_path: Path) -> None:
    names = {two[0].accept(plan, tmp_path, owner=owner).id for owner in "abcd"}
    found = at_once(*[store.take for store in two * 3])
    assert {job.id for job in found if job} == names
    assert sum(job is not None for job in found) == 4


# The database ---------------------------------------------------------------------------------


def test_replicas_that_start_together_make_one_schema(shared: Backend) -> None:
    with ExitStack() as stack:
        starts = [lambda: stack.enter_context(shared.opened()) for _ in range(4)]
        made = at_once(*starts)
        assert [store.fault() for store in made] == [None] * 4
    assert shared.rows("SELECT count(*) FROM store") == [(1,)]
    assert shared.rows("SELECT count(*) FROM clock") == [(1,)]


def test_a_connection_that_breaks_is_opened_again(
    two: tuple[JobStore, JobStore], plan: Plan, shared: Backend, tmp_path: Path
) -> None:
    one, other = two
    job = one.accept(plan, tmp_path, owner="")
    shared.rows(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid != pg_backend_pid()"
    )
    with pytest.raises(Overloaded, match="cannot be reached"):
        one.find("", job.id)
    assert one.find("", job.id) == job
    assert other.fault() is None or other.fault() is None


def test_a_folder_and_a_database_that_do_not_belong_together(
    postgres: Postgres, shared: Backend, plan: Plan, tmp_path: Path
) -> None:
    with shared.opened() as store:
        store.accept(plan, tmp_path, owner="")
        assert "in use by another service" in refusal(Backend(shared.state, None))
    assert "replicas with PIMC_DATABASE_URL" in refusal(Backend(shared.state, None))
    other = Backend(shared.state, postgres.database())
    assert "belongs to the database" in refusal(other)
    (shared.state / "database").unlink()
    assert "jobs of another database" in refusal(other)
    alone = Backend(tmp_path / "alone", None)
    with alone.opened():
        said = refusal(Backend(alone.state, shared.url))
        assert "in use by another service" in said
    assert "without PIMC_DATABASE_URL" in refusal(Backend(alone.state, shared.url))


def test_a_database_of_a_later_release(shared: Backend) -> None:
    with shared.opened():
        pass
    shared.rows("UPDATE store SET version = 99")
    assert "schema has version 99" in refusal(shared)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://anna:secret@db/jobs", "not a URL such as"),
        ("secret", "not a URL such as"),
        ("postgresql://anna:secr@et@db/jobs", "%40"),
    ],
)
def test_a_url_that_is_none_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str, said: str
) -> None:
    monkeypatch.setenv("PIMC_DATABASE_URL", url)
    monkeypatch.setenv("PIMC_STATE_DIR", str(tmp_path))
    with pytest.raises(SettingsError) as caught:
        read_settings()
    assert str(caught.value).startswith("PIMC_DATABASE_URL: ")
    assert said in str(caught.value)
    assert "secr" not in str(caught.value)


def test_replicas_need_a_folder_that_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIMC_DATABASE_URL", "postgresql://anna:secret@db/jobs")
    with pytest.raises(SettingsError, match="PIMC_STATE_DIR must name the folder"):
        read_settings()


@pytest.mark.parametrize("rest", ["/jobs?connect_timeout=x", "/jobs?sslmode=secret", "/jobs"])
def test_a_password_is_in_no_message(tmp_path: Path, rest: str) -> None:
    # A port at which nobody listens, as it was given back.
    with socket.create_server(("127.0.0.1", 0)) as given:
        port = given.getsockname()[1]
    said = refusal(Backend(tmp_path, f"postgresql://anna:pass-word@127.0.0.1:{port}{rest}"))
    assert said.startswith("PIMC_DATABASE_URL: the database cannot be used: ")
    assert "pass-word" not in said
    url = f"postgresql://anna:pass-word@127.0.0.1:{port}{rest}"
    assert "pass-word" not in repr(Settings(state_dir=tmp_path, database_url=url))


# Processes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Ten windows: of one run five are read and of the next three, and some are left."""
    return stack(tmp_path_factory.mktemp("large"), 150, 230)


def logged(service: Service, *messages: str) -> None:
    """Wait until a service has logged one of these messages."""
    found = soon(
        lambda: any(f'"{message}"' in line for line in list(service.log) for message in messages)
    )
    assert found, f"none of {messages} is among {list(service.log)[-20:]}"


@pytest.mark.slow
def test_a_job_outlives_its_replica(
    zoo: Path, large: Files, shared: Backend, tmp_path: Path
) -> None:
    """One is killed in mid-job, the next stalls, and the third ends the job."""
    gate = Gate(tmp_path / "gate")
    key = {"Idempotency-Key": "once"}
    start = partial(running, shared.state, zoo, gate=gate, **shared.variables)
    with ExitStack() as services:
        first = services.enter_context(start())
        gate.hold(after=5)
        job = submitted_held(first.api, large, **key)
        until(first.api, job, progress=1)
        second = services.enter_context(start())
        info = second.api.get(f"/jobs/{job}").json()
        assert info["status"] == "running"
        assert submitted_held(second.api, large, **key) == job
        # Five are read, and two of them may be in flight.
        assert soon(lambda: len(windows(shared)) >= 3)
        first.kill()
        kept = windows(shared)
        assert set(kept.values()) == {1}
        gate.hold(after=3)
        expire(shared)
        assert soon(lambda: 2 in windows(shared).values())
        # Windows that the first replica has stored are not computed again.
        now = windows(shared)
        assert {number: now[number] for number in kept} == kept
        # The second stalls, and a third takes the job from it.
        second.process.send_signal(signal.SIGSTOP)
        kept = windows(shared)
        expire(shared)
        gate.open()
        third = services.enter_context(start())
        done = waited(third.api, job)
        assert (done["status"], done["progress"]) == ("successful", 100)
        whole = result(third.api, job)
        undisturbed = submitted_held(third.api, large)
        assert waited(third.api, undisturbed)["status"] == "successful"
        assert result(third.api, undisturbed) == whole
        second.process.send_signal(signal.SIGCONT)
        # A busy store may have put the job back before the replica stalled: then it waited.
        logged(second, "job stops", "job waits")
        assert second.api.get(f"/jobs/{job}").json() == done
        assert result(second.api, job) == whole
        folder = shared.state / "jobs" / job
        assert [path.name for path in folder.glob("result-*")] == ["result-3"]
        check_healthy(second.api)


def runner_of(*replicas: httpx.Client) -> tuple[httpx.Client, ...]:
    """The replicas, the one that runs a job first."""
    running: list[httpx.Client] = []

    def found() -> bool:
        running[:] = [
            one for one in replicas if "pimc_runs_in_flight 1.0" in one.get("/metrics").text
        ]
        return bool(running)

    assert soon(found)
    return running[0], *(other for other in replicas if other is not running[0])


def test_a_dismissal_and_a_stop_at_any_replica(
    zoo: Path, large: Files, shared: Backend, gate: Gate
) -> None:
    settings: dict[str, Any] = {"model_dir": zoo, **shared.settings}
    with ExitStack() as stack:
        stops = [ExitStack(), ExitStack()]
        both = [stops[n].enter_context(served(**settings)) for n in range(2)]
        for one in stops:
            stack.enter_context(one)
        gate.hold(after=1)
        job = submitted_held(both[0], large)
        runner, other = runner_of(*both)
        assert other.delete(f"/jobs/{job}").json()["status"] == "dismissed"
        # The run ends, which removes the files.
        assert soon(lambda: not (shared.state / "jobs" / job).exists())
        assert runner.get(f"/jobs/{job}").json()["status"] == "dismissed"
        # A replica that is stopped puts its job back, and the other continues it.
        gate.hold(after=5)
        job = submitted_held(both[1], large)
        until(both[0], job, progress=1)
        # Five are read, and two of them may be in flight.
        assert soon(lambda: len(windows(shared)) >= 3)
        runner, other = runner_of(*both)
        stops[both.index(runner)].close()
        kept = windows(shared)
        assert set(kept.values()) == {1}
        gate.hold(after=3)
        assert soon(lambda: 2 in windows(shared).values())
        now = windows(shared)
        assert {number: now[number] for number in kept} == kept
        gate.open()
        assert waited(other, job)["status"] == "successful"
        assert soon(lambda: leftovers(shared.state) == [])
        data = {"model": HELD, "outputs": "class,probabilities"}
        same = other.post("/classify-pixels", files=large, data=data)
        assert same.content == result(other, job)


def test_own_classes_are_the_same_at_every_replica(zoo: Path, shared: Backend) -> None:
    settings: dict[str, Any] = {"model_dir": zoo, **shared.settings, "max_heads": 2}
    with served(**settings) as one, served(**settings) as other:
        body = taught("crops")
        measured = {name: value for name, value in body["series"][0].items() if name[0] in "dB"}
        ask = {"series": [{"id": "a", **measured}], "model": "crops"}
        made = one.post("/heads", json=body)
        assert made.status_code == 201, made.text
        assert [card["name"] for card in other.get("/heads").json()["heads"]] == ["crops"]
        again = other.post("/heads", json=body)
        assert (again.status_code, again.json()["code"]) == (409, "name_taken")
        responses = [api.post("/classify-pixels", json=ask) for api in (one, other)]
        assert responses[0].status_code == 200, responses[0].text
        assert responses[0].json()["results"] == responses[1].json()["results"]
        # A job that either may run.
        job = other.post("/classify-pixels", json=ask, headers=ASYNC)
        assert waited(one, job.json()["jobID"])["status"] == "successful"
        assert other.delete("/heads/crops").status_code == 204
        assert one.get("/heads").json()["heads"] == []
        gone = one.post("/classify-pixels", json=ask)
        assert (gone.status_code, gone.json()["code"]) == (404, "unknown_model")
        # Of the same name, but another model.
        assert other.post("/heads", json=taught("crops", "Rye")).status_code == 201
        card = one.get("/models/crops").json()
        assert {entry["name"] for entry in card["classes"]} == {"Wheat", "Rye"}


# Backups and upgrades -------------------------------------------------------------------------


def command(name: str, folder: Path, of: Backend) -> str:
    """What `python -m service backup` or `restore` prints."""
    variables = {"PIMC_STATE_DIR": str(of.state), **of.variables}
    done = ran("service", name, str(folder), variables=variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_backup_of_replicas_is_restored_into_either_database(
    zoo: Path,
    large: Files,
    gate: Gate,
    postgres: Postgres,
    shared: Backend,
    tmp_path: Path,
) -> None:
    backup = tmp_path / "backup"
    key = {"Idempotency-Key": "once"}
    with served(model_dir=zoo, **shared.settings) as api:
        finished = api.post("/embed", json=SERIES, headers=ASYNC).json()["jobID"]
        waited(api, finished)
        expected = result(api, finished)
        with gate.held(after=4):
            job = submitted_held(api, large, **key)
            until(api, job, progress=1)
            said = command("backup", backup, shared)
            assert "2 jobs, 1 with a result" in said
            assert api.get(f"/jobs/{job}").json()["status"] == "running"
        assert waited(api, job)["status"] == "successful"
        whole = result(api, job)
    for url in (None, postgres.database()):
        other = Backend(tmp_path / ("sqlite" if url is None else "postgresql"), url)
        assert command("restore", backup, other) == f"2 jobs in {other.state}\n"
        with served(model_dir=zoo, **other.settings) as api:
            assert result(api, finished) == expected
            assert waited(api, job)["status"] == "successful"
            assert result(api, job) == whole
            assert submitted_held(api, large, **key) == job
            later = api.post("/embed", json=SERIES, headers=ASYNC).json()["jobID"]
            listed = [entry["jobID"] for entry in api.get("/jobs").json()["jobs"]]
            assert listed == [later, job, finished]
    with pytest.raises(SettingsError, match="already"):
        restore(backup, tmp_path / "third", database_url=shared.url)


def test_a_dump_by_postgresql_and_a_copy_of_the_folder_are_a_backup(
    shared: Backend, plan: Plan, postgres: Postgres, tmp_path: Path
) -> None:
    with shared.opened() as store:
        for _ in range(2):
            store.accept(plan, tmp_path, owner="anna")
        done = taken(store)
        finish(store, done, "whole")
        waits = taken(store)
        journal = WindowFile(store, waits, lambda: 40)
        journal.save(STEPS[0], {"a": np.arange(3)})
    dump = tmp_path / "jobs.sql"
    postgres.run("pg_dump", "--no-owner", f"--file={dump}", str(shared.url))
    other = Backend(tmp_path / "other", postgres.database())
    postgres.run("psql", "--quiet", "--set=ON_ERROR_STOP=1", f"--file={dump}", str(other.url))
    shutil.copytree(shared.state, other.state)
    with other.opened() as store:
        found = store.results.read(store.find("anna", done.id))
        assert found.files["class"].read_text() == "whole"
        expire(other)
        job = taken(store)
        assert job.id == waits.id
        journal = WindowFile(store, job, lambda: 40)
        assert journal.load(STEPS[0]) is not None
        assert store.accept(plan, tmp_path, owner="anna").number > job.number


# As the release before this one made it: jobs had no leases.
SCHEMA_3 = """
PRAGMA user_version = 3;
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL,
    idempotency_key TEXT, fingerprint TEXT, task TEXT NOT NULL, model TEXT NOT NULL,
    sha256 TEXT NOT NULL, status TEXT NOT NULL DEFAULT 'accepted',
    progress INTEGER NOT NULL DEFAULT 0, problem TEXT, computed_by TEXT,
    attempts INTEGER NOT NULL DEFAULT 0, created REAL NOT NULL, started REAL, finished REAL,
    updated REAL NOT NULL, age REAL NOT NULL DEFAULT 0, caller TEXT NOT NULL DEFAULT '',
    bytes INTEGER NOT NULL DEFAULT 0, UNIQUE (owner, idempotency_key)
);
CREATE INDEX by_status ON jobs (status);
CREATE INDEX by_owner ON jobs (owner, number);
CREATE INDEX by_caller ON jobs (caller, status);
CREATE TABLE windows (
    job INTEGER NOT NULL REFERENCES jobs (number) ON DELETE CASCADE, stage TEXT NOT NULL,
    number INTEGER NOT NULL, place TEXT NOT NULL, offset INTEGER NOT NULL, length INTEGER NOT NULL,
    PRIMARY KEY (job, stage, number)
) WITHOUT ROWID;
CREATE TABLE clock (seen REAL NOT NULL);
INSERT INTO clock VALUES (strftime('%s', 'now'));
CREATE TABLE turns (caller TEXT PRIMARY KEY, turn INTEGER NOT NULL);
CREATE TABLE usage (
    caller TEXT NOT NULL, day INTEGER NOT NULL, pixels INTEGER NOT NULL, PRIMARY KEY (caller, day)
);
"""


@pytest.fixture
def of_the_release_before(plan: Plan, tmp_path: Path) -> Path:
    """A state directory with a finished job, and one that was killed after a window."""
    made = Backend(tmp_path / "made", None)
    with made.opened() as store:
        for _ in range(2):
            store.accept(plan, tmp_path, owner="anna", caller="anna")
        finish(store, taken(store), "whole")
        job = taken(store)
        store.begin(job, "CPU float32")
        journal = WindowFile(store, job, lambda: 40)
        journal.save(STEPS[0], {"a": np.arange(3)})
    before = tmp_path / "before"
    (before / "jobs").mkdir(parents=True)
    columns = "number, id, owner, task, model, sha256, status, progress, computed_by, attempts, "
    columns += "created, started, finished, updated, age, caller, bytes"
    with closing(sqlite3.connect(before / "jobs.sqlite")) as db, db:
        db.executescript(SCHEMA_3)
        marks = ", ".join("?" * 17)
        for row in made.rows(f"SELECT {columns} FROM jobs"):  # noqa: S608
            db.execute(f"INSERT INTO jobs ({columns}) VALUES ({marks})", row)  # noqa: S608
        windows = made.rows('SELECT job, stage, number, place, "offset", length FROM windows')
        db.executemany("INSERT INTO windows VALUES (?, ?, ?, ?, ?, ?)", windows)
        db.execute("INSERT INTO usage VALUES ('anna', 99999, 7)")
    for folder in (made.state / "jobs").iterdir():
        place = shutil.copytree(folder, before / "jobs" / folder.name)
        for name in ("result", "windows"):
            for path in place.glob(f"{name}-*"):
                path.rename(place / name)
        for path in place.glob("work-*"):
            path.rename(place / "work")
    return before


def test_jobs_of_the_release_before_keep_results_and_windows(of_the_release_before: Path) -> None:
    for _ in range(2):  # the second start finds it upgraded
        with Backend(of_the_release_before, None).opened() as store:
            waits, done = store.latest("anna", 9)
            assert (done.status, waits.status) == ("successful", "accepted")
            assert store.results.read(done).files["class"].read_text() == "whole"
            job = taken(store)
            assert (job.id, job.progress) == (waits.id, 40)
            store.begin(job, "CPU float32")
            journal = WindowFile(store, job, lambda: 40)
            kept = journal.load(STEPS[0])
            assert kept is not None
            np.testing.assert_array_equal(kept["a"], np.arange(3))


def test_a_backup_of_the_release_before_moves_to_postgresql(
    of_the_release_before: Path, postgres: Postgres, tmp_path: Path
) -> None:
    backup = tmp_path / "backup"
    back_up(of_the_release_before, backup)
    assert restore(backup, tmp_path / "first") == 2  # as before, into a directory
    shared = Backend(tmp_path / "shared", postgres.database())
    assert restore(backup, shared.state, database_url=shared.url) == 2
    with shared.opened() as one, shared.opened() as other:
        waits, done = one.latest("anna", 9)
        assert (done.status, waits.status) == ("successful", "accepted")
        assert other.results.read(done).files["class"].read_text() == "whole"
        assert taken(other).id == waits.id
        assert one.usage.of("anna").bytes == other.usage.of("anna").bytes > 0
    # The backup itself is as it was.
    with closing(sqlite3.connect(backup / "jobs.sqlite")) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (3,)

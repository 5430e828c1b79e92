"""The job store: clocks that jump, full disks, unusable state directories."""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from rasterio.windows import Window

from benchmarks.serving import served
from service.errors import InsufficientStorage, InvalidRequest, ResultNotReady, UnknownJob
from service.jobs import serialise
from service.jobs.job import Job, JobStatus
from service.jobs.job_requests import Idempotency
from service.jobs.serialise import document_bytes, json_parts, loaded
from service.jobs.storage import FolderStorage
from service.jobs.store import JobStore
from service.jobs.window_journal import WindowFile
from service.run.execute import Result
from service.run.executors import Timing
from service.run.plan import Plan
from service.run.windows import Step
from service.settings import SettingsError
from tests.kits.gate import HELD, Gate, zoo_with_a_held_model
from tests.kits.jobs import (
    ASYNC,
    SERIES,
    Backend,
    change,
    check_full,
    check_healthy,
    leftovers,
    series_plan,
    stack,
    submitted,
    swept,
    until,
    waited,
)
from tests.kits.patience import PATIENCE, soon
from tests.kits.postgres import Postgres

YEAR = 365 * 24 * 3600.0
WEEK = 7 * 24 * 3600.0
STEP = Step(stage="predictions", number=0, window=Window(0, 0, 4, 2))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo_with_a_held_model(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def ready(zoo: Path) -> Iterator[Plan]:
    """The plan of a small request."""
    with series_plan(zoo) as made:
        yield made


@contextmanager
def opened(folder: Path, **how: Any) -> Iterator[JobStore]:
    store = JobStore(folder, **{"ttl": WEEK, "max_waiting": 9, **how})
    try:
        yield store
    finally:
        store.close()


def done(store: JobStore, ready: Plan, folder: Path) -> Job:
    """A finished, successful job."""
    store.accept(ready, folder, owner="")
    job = store.take()
    assert job is not None
    store.succeed(job)
    return store.find("", job.id)


# Files derived from results --------------------------------------------------------------------


@pytest.fixture
def finished(ready: Plan, tmp_path: Path) -> Iterator[tuple[JobStore, Job]]:
    """A store with a job whose result is stored."""
    with opened(tmp_path) as store:
        store.accept(ready, tmp_path, owner="anna")
        job = store.take()
        assert job is not None
        store.files.work(job).mkdir(parents=True)
        result = Result(
            task="embed", model="m@1", provider="CPU", files={}, document={}, pixels=1,
            timing=Timing(read=0, infer=0, write=0), warnings=(),
        )  # fmt: skip
        store.results.publish(job, store.files.work(job), result)
        store.succeed(job)
        store.tidy(job)
        yield store, store.find("anna", job.id)


def test_files_derived_from_a_result_are_few_and_count_for_the_quota(
    finished: tuple[JobStore, Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, job = finished
    before = store.usage.of("anna").bytes
    monkeypatch.setattr("service.jobs.result_files._MOST_DERIVED", 3)
    for number in range(5):
        store.results.derived(
            job, f"class-{number}.tif", lambda path: path.write_bytes(bytes(1000))
        )
        assert len(list((store.files.folder(job) / "ready").iterdir())) == number % 3 + 1
        assert store.usage.of("anna").bytes == before + 1000 * (number % 3 + 1)


def test_nothing_waits_while_a_file_is_derived_from_a_result(
    finished: tuple[JobStore, Job],
) -> None:
    store, job = finished
    begun, go = threading.Event(), threading.Event()

    def slow(path: Path) -> None:
        path.write_text("half")
        begun.set()
        assert go.wait(PATIENCE)

    with ThreadPoolExecutor() as threads:
        making = threads.submit(store.results.derived, job, "class.tif", slow)
        assert begun.wait(PATIENCE)
        other = store.results.derived(job, "embed.zip", lambda path: path.write_text("whole"))
        assert other.read_bytes() == b"whole"
        store.dismiss("anna", job.id)
        go.set()
        with pytest.raises(ResultNotReady, match="removed"):
            making.result()
    assert not store.files.folder(job).exists()


# Clocks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [-YEAR, YEAR, 100 * YEAR])
def test_a_jump_of_the_clock_while_the_service_is_stopped(
    ready: Plan, tmp_path: Path, jump: float
) -> None:
    with opened(tmp_path) as store:
        kept = done(store, ready, tmp_path)
        store.accept(ready, tmp_path, owner="")
    # As if the clock had jumped by `jump` seconds since these rows were written.
    change(tmp_path, "UPDATE clock SET seen = seen - ?", jump)
    change(
        tmp_path,
        "UPDATE jobs SET created = created - ?, started = started - ?, finished = finished - ?",
        *[jump] * 3,
    )
    for _ in range(2):  # the second start reads the rows of the first one
        with opened(tmp_path) as store:
            found = store.find("", kept.id)
            assert found.status == "successful"
            store.sweep(60)
            assert store.find("", kept.id)
            assert [job.status for job in store.latest("", 9)] == ["accepted", "successful"]
    with opened(tmp_path) as store:
        # After a week of running time the job expires, for any value of the clock.
        store.sweep(WEEK)
        with pytest.raises(UnknownJob):
            store.find("", kept.id)
        assert len(store.latest("", 9)) == 1


@pytest.mark.slow
def test_a_jump_of_the_clock_while_the_service_runs(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.jobs.runner._SWEEP_SECONDS", 0.1)
    with served(model_dir=zoo, state_dir=tmp_path, job_ttl=3600) as api:
        job = api.post("/embed", json=SERIES, headers=ASYNC).json()["jobID"]
        waited(api, job)
        change(tmp_path, "UPDATE jobs SET created = 9e9, started = 9e9, finished = 9e9 + 1")
        change(tmp_path, "UPDATE clock SET seen = 9e9")
        assert api.get(f"/jobs/{job}").json()["finished"].startswith("2255-")
        swept(tmp_path, 2)
        assert api.get(f"/jobs/{job}").status_code == 200
        change(tmp_path, "UPDATE jobs SET age = 3600")
        swept(tmp_path)
        assert api.get(f"/jobs/{job}").status_code == 404


JSON = {"Content-Type": "application/json"}


def test_the_time_of_a_stop_counts_only_in_part_for_the_age_of_results(
    ready: Plan, tmp_path: Path
) -> None:
    with opened(tmp_path) as store:
        kept = done(store, ready, tmp_path)
        store.sweep(WEEK / 2)
    change(tmp_path, "UPDATE clock SET seen = seen - ?", 1000.0)
    with opened(tmp_path) as store:
        store.sweep(WEEK / 2 - 1001)
        assert store.find("", kept.id)
        store.sweep(2)
        with pytest.raises(UnknownJob):
            store.find("", kept.id)


# State of an earlier service -------------------------------------------------------------------


def test_folders_without_a_job_are_removed_at_start(ready: Plan, tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        gone = done(store, ready, tmp_path)
        waits = store.accept(ready, tmp_path, owner="")
        (store.files.folder(gone) / "result-1").mkdir(parents=True)
        (store.files.folder(gone) / "work-1").mkdir()
        (store.files.folder(gone) / "windows-1").write_text("x")
    orphan = tmp_path / "jobs" / "0" / "input"
    orphan.mkdir(parents=True)
    (tmp_path / "requests" / "pimc-half" / "sent").mkdir(parents=True)
    with opened(tmp_path) as store:
        took = store.take()
        assert took is not None
        assert took.id == waits.id
        assert not orphan.exists()
        left = sorted(path.name for path in store.files.folder(gone).iterdir())
        assert left == ["request.json", "result-1"]
        assert list((tmp_path / "requests").iterdir()) == []


class Emptied(FolderStorage):
    """A folder whose jobs another replica removes just after it was listed."""

    def names(self, key: str) -> list[str]:
        found = super().names(key)
        for name in found:
            self.remove(f"{key}/{name}")
        return found


@pytest.mark.slow
def test_a_folder_that_another_replica_removes_meanwhile_is_no_error(
    tmp_path: Path, postgres: Postgres
) -> None:
    state, url = tmp_path / "state", postgres.database()
    with opened(state, database_url=url):
        (state / "jobs" / "rejected").mkdir()
    with opened(state, database_url=url, storage=Emptied(state)):
        assert list((state / "jobs").iterdir()) == []


def test_a_stored_window_is_used_only_if_its_bytes_are_complete(
    ready: Plan, tmp_path: Path, backend: Backend
) -> None:
    arrays = {"class": np.arange(8, dtype=np.uint8).reshape(1, 2, 4), "valid": np.array(8)}
    with backend.opened() as store:
        store.accept(ready, tmp_path, owner="")
        job = store.take()
        assert job is not None
        journal = WindowFile(store, job, lambda: 40)
        assert journal.load(STEP) is None
        journal.save(STEP, arrays)
        other = Step(stage="predictions", number=0, window=Window(0, 0, 2, 4))
        assert journal.load(other) is None  # the raster is divided differently: another window
        # Bytes without a row, as after a kill between the two writes.
        with (store.files.folder(job) / "windows-1").open("ab") as file:
            file.write(b"half a window")
        journal = WindowFile(store, job, lambda: 30)
        found = journal.load(STEP)
        assert found is not None
        np.testing.assert_array_equal(found["class"], arrays["class"])
        second = Step(stage="predictions", number=1, window=Window(0, 2, 4, 2))
        journal.save(second, arrays)
        assert store.find("", job.id).progress == 40
        with (store.files.folder(job) / "windows-1").open("r+b") as file:
            file.seek(100)
            file.write(b"?")
        journal = WindowFile(store, job, lambda: 0)
        assert journal.load(STEP) is None  # damaged, so computed again
        assert journal.load(second) is not None


def test_a_resting_job_is_not_started_and_its_starts_count(
    ready: Plan, tmp_path: Path, backend: Backend
) -> None:
    with backend.opened() as store:
        first, second = (store.accept(ready, tmp_path, owner="") for _ in range(2))
        for attempt in (1, 2):
            job = store.take()
            assert job is not None
            assert (job.id, job.attempts) == (first.id, attempt)
            store.put_back(job, counts=True)
        other = store.take({first.number})
        assert other is not None
        assert other.id == second.id
        assert store.take({first.number}) is None
        job = store.take()
        assert job is not None
        assert store.attempts(job) == 3
        WindowFile(store, job, lambda: 1).save(STEP, {"a": np.zeros(3)})
        assert store.attempts(job) == 0  # it has come one window further
        store.put_back(job)
        job = store.take({second.number})
        assert job is not None
        assert job.attempts == 1


def test_windows_of_another_provider_are_not_used(
    ready: Plan, tmp_path: Path, backend: Backend
) -> None:
    with backend.opened() as store:
        store.accept(ready, tmp_path, owner="")
        job = store.take()
        assert job is not None
        store.begin(job, "CPUExecutionProvider float32")
        journal = WindowFile(store, job, lambda: 1)
        journal.save(STEP, {"a": np.zeros(3)})
        store.put_back(job)
        job = store.take()
        assert job is not None
        store.begin(job, "CPUExecutionProvider float32")
        journal = WindowFile(store, job, lambda: 1)
        assert journal.load(STEP) is not None
        store.begin(job, "CUDAExecutionProvider float16")
        journal = WindowFile(store, job, lambda: 1)
        assert journal.load(STEP) is None


def test_an_idempotency_key_belongs_to_its_owner(
    ready: Plan, tmp_path: Path, backend: Backend
) -> None:
    with backend.opened() as store:
        same = Idempotency(key="k", fingerprint="1")
        first = store.accept(ready, tmp_path, owner="anna", idempotency=same)
        # Two simultaneous requests: the second finds the first one's job when it is stored.
        assert store.accept(ready, tmp_path, owner="anna", idempotency=same) == first
        assert store.accept(ready, tmp_path, owner="ben", idempotency=same) != first
        with pytest.raises(InvalidRequest, match=first.id):
            store.accept(
                ready, tmp_path, owner="anna", idempotency=Idempotency(key="k", fingerprint="2")
            )
        assert len(list((backend.state / "jobs").iterdir())) == 2


# Unusable folders ------------------------------------------------------------------


def refusal(folder: Path) -> str:
    with pytest.raises(SettingsError) as caught, opened(folder):
        pytest.fail("it was opened")
    message = str(caught.value)
    assert message.startswith(f"PIMC_STATE_DIR: {folder} ")
    assert "\n" not in message
    return message


def test_a_state_folder_in_use_is_an_error(tmp_path: Path) -> None:
    with opened(tmp_path):
        assert "in use by another service" in refusal(tmp_path)
    with opened(tmp_path):
        pass


def test_a_state_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refusal(tmp_path / "file" / "state")


def test_a_damaged_database_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite").write_text("no database at all, but some text " * 99)
    assert "not a database" in refusal(tmp_path)


def test_a_database_of_a_later_version_is_an_error(tmp_path: Path) -> None:
    with opened(tmp_path):
        pass
    change(tmp_path, "PRAGMA user_version = 99")
    assert "version 99" in refusal(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A separate file system of 16 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "pimc-test", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a file system of its own")
    try:
        yield place
    finally:
        unmount = ["umount", "--lazy", str(place)]
        subprocess.run(unmount, check=True)


@pytest.mark.slow
def test_a_read_only_state_folder_is_an_error(small_disk: Path) -> None:
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    subprocess.run(remount, check=True)
    assert "Read-only file system" in refusal(small_disk)
    assert "Read-only file system" in refusal(small_disk / "deeper" / "state")


# A full disk ----------------------------------------------------------------------------------


def fill(disk: Path) -> Path:
    """Fill the disk with a file."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


@pytest.mark.slow
def test_a_job_that_fills_the_disk_fails_and_frees_it(
    zoo: Path, small_disk: Path, tmp_path: Path
) -> None:
    with served(model_dir=zoo, state_dir=small_disk / "state", min_free_bytes=0) as api:
        # The upload has 8 MB, and embeddings of 700 x 700 pixels need 12 MB and more.
        big = stack(tmp_path, 700, 700, dates=2)
        response = api.post("/embed", files=big, headers=ASYNC)
        assert response.status_code == 202
        job = response.json()["jobID"]
        assert waited(api, job)["status"] == "failed"
        check_full(api.get(f"/jobs/{job}/result"))
        check_healthy(api)
        assert leftovers(small_disk / "state") == []


@pytest.mark.slow
def test_a_disk_filled_by_other_programs_is_reported(
    zoo: Path, small_disk: Path, tmp_path: Path
) -> None:
    files = stack(tmp_path, 128, 256)
    gate = Gate(tmp_path / "gate")
    with (
        gate.installed(),
        served(model_dir=zoo, state_dir=small_disk / "state", min_free_bytes=0) as api,
    ):
        gate.hold(after=4)
        response = api.post("/classify-pixels", files=files, data={"model": HELD}, headers=ASYNC)
        job = response.json()["jobID"]
        until(api, job, progress=1)
        filler = fill(small_disk)
        check_full(api.post("/classify-pixels", files=files, headers=ASYNC))
        assert api.get("/health/ready").status_code == 200
        assert api.get(f"/jobs/{job}").status_code == 200
        assert api.post("/classify-pixels", files=files).status_code == 200  # needs no state
        gate.open()
        filler.unlink()
        # The job failed because of the full disk, or succeeded; no other outcome is possible.
        info = waited(api, job)
        if info["status"] == "failed":
            check_full(api.get(f"/jobs/{job}/result"))
        else:
            same = api.post("/classify-pixels", files=files, data={"model": HELD})
            assert result_of(api, job) == same.content
        check_healthy(api)
        assert leftovers(small_disk / "state") == []


def test_a_complete_result_is_not_given_up_because_its_row_does_not_fit(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, end = stack(tmp_path, 64, 64), JobStore._end
    tries: list[tuple[str, list[str]]] = []

    def full_at_first(store: JobStore, job: Job, status: JobStatus, **how: Any) -> None:
        tries.append((status, sorted(path.name for path in store.files.folder(job).iterdir())))
        if len(tries) == 1:
            raise InsufficientStorage("no room for the row")
        end(store, job, status, **how)

    monkeypatch.setattr(JobStore, "_end", full_at_first)
    with served(model_dir=zoo, state_dir=tmp_path / "state") as api:
        job = submitted(api, "/classify-pixels", files=files)
        assert waited(api, job)["status"] == "successful"
        assert result_of(api, job) == api.post("/classify-pixels", files=files).content
        # Files that the run no longer needs were removed first, to make room.
        assert tries == [("successful", ["input", "request.json", "result-1"])] * 2
        assert soon(lambda: leftovers(tmp_path / "state") == [])


def result_of(api: httpx.Client, job: str) -> bytes:
    response = api.get(f"/jobs/{job}/result")
    assert response.status_code == 200
    return response.content


# Space ----------------------------------------------------------------------------------------

# A database of the previous release, which stored requests in the database.
SCHEMA_1 = """
PRAGMA user_version = 1;
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL,
    idempotency_key TEXT, fingerprint TEXT, task TEXT NOT NULL, document TEXT NOT NULL,
    model TEXT NOT NULL, sha256 TEXT NOT NULL, status TEXT NOT NULL DEFAULT 'accepted',
    progress INTEGER NOT NULL DEFAULT 0, problem TEXT, computed_by TEXT,
    attempts INTEGER NOT NULL DEFAULT 0, created REAL NOT NULL, started REAL, finished REAL,
    updated REAL NOT NULL, age REAL NOT NULL DEFAULT 0, UNIQUE (owner, idempotency_key)
);
CREATE INDEX by_status ON jobs (status);
CREATE TABLE windows (
    job INTEGER NOT NULL REFERENCES jobs (number) ON DELETE CASCADE, stage TEXT NOT NULL,
    number INTEGER NOT NULL, place TEXT NOT NULL, offset INTEGER NOT NULL, length INTEGER NOT NULL,
    PRIMARY KEY (job, stage, number)
) WITHOUT ROWID;
CREATE TABLE clock (seen REAL NOT NULL);
INSERT INTO clock VALUES (strftime('%s', 'now'));
"""


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_store_of_the_release_before_is_upgraded(tmp_path: Path) -> None:
    (tmp_path / "jobs" / "one").mkdir(parents=True)
    (tmp_path / "jobs" / "two").mkdir()
    points = {
        "type": "FeatureCollection",
        "features": [
            {"type": "Feature", "geometry": {"type": "Point", "coordinates": [3.0, 51.0]}}
        ],
    }
    raster = {
        "task": "classify-pixels",
        "files": [["a.tif", "0000.tif"]],
        "fields": {
            "model": "pixels-landcover@1.0.0", "layout": None, "dates": ["2021-01-05"],
            "bands": None, "scale": None, "offset": None, "mask": "scl",
            "points": json.dumps(points), "start": "2021-01-01", "outputs": ["class"],
        },
    }  # fmt: skip
    values = {"B02": [0.1, 0.1], "B04": [0.1, 0.1], "B08": [0.3, 0.3]}
    stored = {"series": [{"id": "a", "dates": ["2021-01-05", "2021-03-05"], **values}]}
    series = {"task": "embed", "series": stored | {"model": None, "start": None}}
    with sqlite3.connect(tmp_path / "jobs.sqlite") as db:
        db.executescript(SCHEMA_1)
        for name, document, status in (
            ("one", raster, "accepted"), ("two", series, "successful"), ("gone", series, "failed"),
        ):  # fmt: skip
            db.execute(
                "INSERT INTO jobs (id, owner, task, document, model, sha256, status, created, "
                "updated) VALUES (?, 'anna', 'embed', ?, 'm@1', 'x', ?, 1, 1)",
                (name, json.dumps(document | {"filler": "f" * 10**6}), status),
            )
    db.close()
    for _ in range(2):  # the second start reads the upgraded database
        with opened(tmp_path) as store:
            assert size_of(tmp_path) < 2.2 * 10**6  # two files of a megabyte, and no third
            assert (tmp_path / "jobs.sqlite").stat().st_size < 10**5
            one = store.job_requests.read(store.find("anna", "one"))
            assert one.points is not None
            assert (one.points[0].lon, one.points[0].lat) == (3.0, 51.0)
            assert one.stack.dates == (date(2021, 1, 5),)
            assert one.files[0].path == tmp_path / "jobs" / "one" / "input" / "0000.tif"
            two = store.job_requests.read(store.find("anna", "two"))
            assert two.series[0].bands["B02"] == (0.1, 0.1)
            assert store.find("anna", "gone").status == "failed"


@pytest.mark.slow
def test_a_dismissed_job_frees_its_space_at_once(
    ready: Plan, tmp_path: Path, backend: Backend
) -> None:
    request = ready.request
    many = replace(request, series=request.series * 20_000)
    large = replace(ready, request=many)
    with backend.opened(max_waiting=99) as store:
        empty = size_of(backend.state)
        for number in range(5):
            folder = tmp_path / str(number)
            folder.mkdir()
            job = store.accept(large, folder, owner="anna")
            assert size_of(backend.state) > empty + 10**6
            store.dismiss("anna", job.id)
        assert size_of(backend.state) < empty + 5 * 10**5
        with pytest.raises(ResultNotReady, match="removed"):
            store.job_requests.read(store.find("anna", job.id))


def test_a_list_continues_after_a_job(ready: Plan, tmp_path: Path, backend: Backend) -> None:
    with backend.opened() as store:
        names = []
        for number in range(5):
            folder = tmp_path / str(number)
            folder.mkdir()
            names.append(store.accept(ready, folder, owner="anna").id)
        newest = names[::-1]
        assert [job.id for job in store.latest("anna", 2)] == newest[:2]
        assert [job.id for job in store.latest("anna", 9, before=newest[1])] == newest[2:]
        with pytest.raises(UnknownJob):
            store.latest("ben", 9, before=newest[1])


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"results": [], "warnings": [{"code": "a", "detail": 'ü "quoted"'}], "model": "m@1"},
        {"results": [{"id": "a", "values": [1.5, None, True, 1e-300, [], {}]}, {}, [1, [2]]]},
        {"summary": {"classes": {"first": {"pixels": 3, "hectares": 0.03}}, "none": None}},
    ],
)
def test_a_document_that_is_encoded_in_parts_is_the_document(document: dict[str, Any]) -> None:
    whole = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    assert document_bytes(document) == whole.encode()
    assert json.loads("".join(json_parts(document))) == document
    for text in (whole, json.dumps(document), json.dumps(document, indent=1)):
        assert loaded(text) == document


def test_a_stored_document_is_parsed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    many = [{"id": str(n), "values": [n / 7] * 20} for n in range(100)]
    text = "".join(json_parts({"task": "embed", "series": {"series": many, "start": None}}))
    parts: list[int] = []

    def decode(text: str, at: int) -> tuple[Any, int]:
        value, end = json.JSONDecoder().raw_decode(text, at)
        parts.append(end - at)
        return value, end

    monkeypatch.setattr(serialise, "_DECODE", decode)
    assert loaded(text)["series"]["series"] == many
    assert max(parts) < len(text) / 50


def test_a_document_with_a_number_that_json_lacks_is_an_error() -> None:
    with pytest.raises(ValueError, match="JSON"):
        document_bytes({"results": [{"values": [math.nan]}]})

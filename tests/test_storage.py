"""Storage of uploads and results: one suite for a folder and for S3, and replicas that share it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest

from benchmarks.serving import served
from service.api.app import open_jobs
from service.errors import Overloaded, ResultNotReady, UnknownJob
from service.jobs import s3 as s3_module
from service.jobs.backup import back_up, restore
from service.jobs.database import DuplicateRow
from service.jobs.job import Job
from service.jobs.s3 import S3Storage, storage_of
from service.jobs.storage import (
    FolderStorage,
    Storage,
    StorageUnreachable,
    opened,
)
from service.jobs.store import JobStore, LeaseLost
from service.jobs.window_journal import WindowFile
from service.run.plan import Plan
from service.settings import SettingsError, read_settings
from tests.kits.gate import HELD, Gate, zoo_with_a_held_model
from tests.kits.jobs import (
    ASYNC,
    SERIES,
    Backend,
    Files,
    check_healthy,
    result,
    running,
    series_plan,
    stack,
    submitted,
    taught,
    until,
    waited,
)
from tests.kits.marks import in_all_tests
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
from tests.kits.s3 import S3, Way, way

WEEK = 7 * 24 * 3600.0
PART = 5 * 2**20
"""Of an upload in these tests: the smallest that S3 takes, but for the last one."""
LARGE = 11 * 2**20  # three parts of an upload


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo_with_a_held_model(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_module, "_PART_BYTES", PART)


@pytest.fixture(scope="module")
def plan(zoo: Path) -> Iterator[Plan]:
    with series_plan(zoo) as made:
        yield made


# Both kinds -----------------------------------------------------------------------------------


@pytest.fixture(params=["folder", *in_all_tests("s3")])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """An empty storage of either kind."""
    made: Storage
    if request.param == "folder":
        (tmp_path / "root").mkdir()
        made = FolderStorage(tmp_path / "root")
    else:
        s3: S3 = request.getfixturevalue("s3")
        made = S3Storage(f"s3://{s3.bucket()}/a/prefix", endpoint=s3.endpoint)
    yield made
    made.close()


def tree(folder: Path, **files: bytes) -> Path:
    """A folder with these files."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def placed(storage: Storage, key: str, folder: Path, **files: bytes) -> None:
    """Put a tree where a job's would be."""
    if isinstance(storage, FolderStorage):
        storage.file(key).parent.mkdir(parents=True, exist_ok=True)
    storage.put(key, tree(folder, **files))


def test_a_file_is_read_as_it_was_written(storage: Storage, tmp_path: Path) -> None:
    storage.write("database", b"one")
    storage.write("database", b"another")
    assert storage.read("database") == b"another"
    assert storage.file("database").read_bytes() == b"another"
    assert storage.names("") == ["database"]
    for gone in (partial(storage.read, "no"), storage.file("no").read_bytes):
        with pytest.raises(FileNotFoundError):
            gone()
    storage.remove("database")
    storage.remove("database")
    assert storage.names("") == []


def test_a_large_file_is_read_by_parts(storage: Storage, tmp_path: Path) -> None:
    content = np.random.default_rng(1).bytes(LARGE)
    path = tmp_path / "large.tif"
    path.write_bytes(content)
    storage.put("large.tif", path)
    assert not path.exists()
    file = storage.file("large.tif")
    assert (file.name, file.suffix, file.exists()) == ("large.tif", ".tif", True)
    assert not file.with_name("other.tif").exists()
    sent = opened(file, 2**16)
    assert sent.size == LARGE
    assert sent.read(LARGE - 5, 100) == content[-5:]
    assert sent.read(7, sent.block) == content[7 : 7 + sent.block]
    assert abs(sent.modified - time.time()) < 3600
    sent.close()
    with file.open("rb") as reader:
        assert reader.read(3) == content[:3]
        assert reader.read() == content[3:]
    storage.fetch("large.tif", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    assert storage.size("large.tif") == LARGE


def test_a_tree_is_moved_kept_in_part_and_fetched(storage: Storage, tmp_path: Path) -> None:
    files = {"a.tif": b"12345", "b.tif": b"", "reply.json": b"{}"}
    placed(storage, "jobs/x/result-1", tmp_path / "made", **files)
    assert not (tmp_path / "made").exists()
    assert storage.names("jobs/x") == ["result-1"]
    assert storage.names("jobs/x/result-1") == sorted(files)
    assert storage.size("jobs/x/result-1") == 7
    assert time.time() - storage.modified("jobs/x") < 3600
    storage.move("jobs/x/result-1", "jobs/x/result-2", last="reply.json")
    assert storage.names("jobs/x") == ["result-2"]
    storage.fetch("jobs/x/result-2", tmp_path / "copy")
    assert {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()} == files
    storage.fetch("jobs/x/input", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    storage.write("jobs/x/request.json", b"{}")
    placed(storage, "jobs/x/result-20", tmp_path / "other", **files)
    storage.keep_only("jobs/x", "result-2", "request.json")
    assert storage.names("jobs/x") == ["request.json", "result-2"]
    storage.remove("jobs/x")
    assert storage.names("jobs") == []
    with pytest.raises(FileNotFoundError):
        storage.move("jobs/x/result-1", "jobs/x/result-2", last="reply.json")


def test_a_log_is_read_by_the_pieces_that_were_appended(storage: Storage, tmp_path: Path) -> None:
    placed(storage, "jobs/x/input", tmp_path / "made")
    log = "jobs/x/windows-1"
    assert storage.length(log) == 0
    storage.append(log, 0, memoryview(b"first"))
    storage.append(log, 5, memoryview(b"second"))
    assert storage.length(log) == 11
    assert storage.read_part(log, 5, 6) == b"second"
    assert storage.read_part(log, 0, 5) == b"first"
    with pytest.raises(FileNotFoundError):
        storage.read_part("jobs/x/windows-2", 0, 5)
    storage.remove(log)
    assert storage.length(log) == 0


# Jobs -----------------------------------------------------------------------------------------


@pytest.fixture(params=["folder", "s3"])
def shared(request: pytest.FixtureRequest, postgres: Postgres, tmp_path: Path) -> Backend:
    """An empty database and storage of either kind, for replicas."""
    if request.param == "folder":
        return Backend(tmp_path / "state", postgres.database())
    return in_bucket(request.getfixturevalue("s3"), postgres, tmp_path)


@pytest.fixture
def bucket(postgres: Postgres, s3: S3, tmp_path: Path) -> Backend:
    """An empty database and bucket, for replicas."""
    return in_bucket(s3, postgres, tmp_path)


def in_bucket(s3: S3, postgres: Postgres, tmp_path: Path) -> Backend:
    url = f"s3://{s3.bucket()}/pimc"
    return Backend(tmp_path / "state", postgres.database(), url, s3.endpoint)


@pytest.fixture
def two(shared: Backend) -> Iterator[tuple[JobStore, JobStore]]:
    with shared.opened() as one, shared.opened() as other:
        yield one, other


def kept(store: JobStore, job: Job) -> list[str]:
    """Names of a job's files in the storage."""
    return store.storage.names(f"jobs/{job.id}")


def test_a_job_and_its_result_are_the_same_at_every_replica(
    two: tuple[JobStore, JobStore], plan: Plan, tmp_path: Path
) -> None:
    one, other = two
    one.accept(plan, tmp_path, owner="anna", upgrade=True, delivery={"response": "raw"})
    job = taken(other)
    for store in two:
        assert store.job_requests.may_upgrade(job)
        assert store.job_requests.delivery(job) == {"response": "raw"}
        assert store.job_requests.read(job).model == plan.model.card.id
    publish(other, job, "whole")
    with pytest.raises(ResultNotReady, match="running"):
        one.results.read(one.find("anna", job.id))
    other.succeed(job)
    other.tidy(job)
    found = one.find("anna", job.id)
    stored = one.results.read(found)
    assert stored.files["class"].read_bytes() == b"whole"
    assert stored.document.read_bytes() == b"{}"
    with one.results.on_disk(found, stored) as copy:
        assert isinstance(copy.files["class"], Path)
        assert copy.files["class"].read_text() == "whole"
    size = sum(len(file.read_bytes()) for file in (stored.files["class"], stored.document))
    assert one.usage.of("anna").bytes > size
    assert kept(one, job) == ["request.json", f"result-{job.lease}"]
    made: list[Path] = []

    def make(path: Path) -> None:
        made.append(path)
        path.write_text("derived")

    for store in (one, other, one):
        assert store.results.derived(found, "embed.zip", make).read_bytes() == b"derived"
    assert len(made) == 1
    other.dismiss("anna", job.id)
    assert kept(one, job) == []
    with pytest.raises(ResultNotReady, match="removed"):
        one.results.derived(found, "embed.csv", make)


def test_a_run_that_lost_its_lease_leaves_no_result(
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
    found = new.load(STEPS[0])  # of the run before
    assert found is not None
    np.testing.assert_array_equal(found["a"], np.arange(3))
    new.save(STEPS[1], {"a": np.arange(4)})
    with pytest.raises(LeaseLost):
        old.save(STEPS[1], {"a": np.zeros(9)})
    publish(one, stalled, "stalled")
    with pytest.raises(LeaseLost):
        one.succeed(stalled)
    one.tidy(stalled)
    again = new.load(STEPS[1])
    assert again is not None
    np.testing.assert_array_equal(again["a"], np.arange(4))
    publish(other, job, "new")
    other.succeed(job)
    other.tidy(job)
    for store in two:
        stored = store.results.read(store.find("anna", job.id))
        assert stored.files["class"].read_bytes() == b"new"
    assert kept(one, job) == ["request.json", "result-2"]


def test_a_result_that_was_published_but_not_recorded_is_the_next_owners(
    two: tuple[JobStore, JobStore], plan: Plan, shared: Backend, tmp_path: Path
) -> None:
    one, other = two
    one.accept(plan, tmp_path, owner="")
    dead = taken(one)
    publish(one, dead, "whole")
    expire(shared)
    job = taken(other)
    assert other.results.published(job)
    other.succeed(job)
    assert one.results.read(one.find("", job.id)).files["class"].read_bytes() == b"whole"
    with pytest.raises(LeaseLost):
        one.succeed(dead)


def test_half_a_result_of_a_dead_replica_is_none(
    bucket: Backend, plan: Plan, tmp_path: Path
) -> None:
    with bucket.opened() as one, bucket.opened() as other:
        one.accept(plan, tmp_path, owner="")
        dead = taken(one)
        # It was killed before it wrote the description, which comes last.
        one.storage.write(f"jobs/{dead.id}/result-{dead.lease}/class.tif", b"half")
        expire(bucket)
        job = taken(other)
        assert not other.results.published(job)
        publish(other, job, "whole")
        other.succeed(job)
        other.tidy(job)
        assert one.results.read(one.find("", job.id)).files["class"].read_bytes() == b"whole"
        assert kept(one, job) == ["request.json", "result-2"]


def test_files_are_removed_on_dismissal_failure_and_expiry(
    two: tuple[JobStore, JobStore], plan: Plan, shared: Backend, tmp_path: Path
) -> None:
    one, other = two
    jobs = [one.accept(plan, tmp_path, owner="") for _ in range(3)]
    assert [kept(other, job) for job in jobs] == [["request.json"]] * 3
    other.dismiss("", jobs[2].id)
    assert kept(one, jobs[2]) == []
    runs, expires = taken(one), taken(one)
    WindowFile(one, runs, lambda: 1).save(STEPS[0], {"a": np.arange(3)})
    other.dismiss("", runs.id)
    assert "windows-1" in kept(one, runs)  # its run removes them
    one.tidy(runs)
    publish(one, expires, "x")
    one.succeed(expires)
    one.tidy(expires)
    assert kept(other, expires) == ["request.json", "result-1"]
    shared.rows("UPDATE clock SET seen = seen - ?", 2 * WEEK)
    other.sweep(2 * WEEK)
    with pytest.raises(UnknownJob):
        one.find("", expires.id)
    assert one.storage.names("jobs") == []


def test_files_without_a_job_are_removed_once_they_are_old(
    bucket: Backend, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bucket.opened() as one:
        job = one.accept(plan, tmp_path, owner="")
        one.storage.write("jobs/orphan/request.json", b"{}")
        with bucket.opened():
            assert one.storage.names("jobs/orphan") == ["request.json"]
        monkeypatch.setattr("service.jobs.leftovers._ORPHAN_SECONDS", -1e6)
        with bucket.opened():
            assert one.storage.names("jobs") == [job.id]


def test_a_model_has_one_owner_and_one_name(shared: Backend, postgres: Postgres) -> None:
    with shared.opened() as one, shared.opened() as other:
        assert one.heads.add("anna", "crops", "1", most=2)
        with pytest.raises(DuplicateRow):
            other.heads.add("anna", "crops", "2", most=2)
        assert other.heads.add("anna", "trees", "3", most=2)
        assert not one.heads.add("anna", "more", "4", most=2)
        assert other.heads.add("ben", "crops", "5", most=2)
        assert one.heads.of("anna") == {"crops": "1", "trees": "3"}
        assert other.heads.adopt("anna", "ben") == ["crops"]
        assert one.heads.of("ben") == {"crops": "5", "trees": "3"}
        assert one.heads.remove("anna", "crops") == "1"
        assert other.heads.remove("anna", "crops") is None
        assert one.heads.owners() == ["ben"]


def test_a_backup_of_a_bucket_is_restored_into_each_kind(
    bucket: Backend, postgres: Postgres, s3: S3, plan: Plan, zoo: Path, tmp_path: Path
) -> None:
    with bucket.opened() as store:
        for _ in range(2):
            store.accept(plan, tmp_path, owner="anna")
        done = taken(store)
        publish(store, done, "whole")
        store.succeed(done)
        store.tidy(done)
        store.storage.write("heads/1/card.json", b"{}")
        assert store.heads.add("", "crops", "1", most=9)
        backup = tmp_path / "backup"
        made = back_up(tmp_path / "none", backup, database_url=bucket.url, storage=store.storage)
    assert (made.jobs, made.results) == (2, 1)
    assert (backup / "heads" / "_" / "crops" / "card.json").read_bytes() == b"{}"
    other = in_bucket(s3, postgres, tmp_path / "other")
    folder = Backend(tmp_path / "folder", postgres.database())
    alone = Backend(tmp_path / "alone", None)
    for target in (other, folder, alone):
        target.state.parent.mkdir(exist_ok=True)
        storage = storage_of(target.state, target.storage, target.endpoint)
        state = target.own_state()
        assert restore(backup, state, database_url=target.url, storage=storage) == 2
        with target.opened() as store:
            found = store.results.read(store.find("anna", done.id))
            assert found.files["class"].read_bytes() == b"whole"
            waits = taken(store)
            assert store.job_requests.read(waits).model == plan.model.card.id
            assert store.accept(plan, tmp_path, owner="anna").number > waits.number
    with other.opened() as store:
        ((name, version),) = store.heads.of("").items()
        assert store.storage.read(f"heads/{version}/card.json") == b"{}"
        assert name == "crops"
        said = partial(restore, backup, other.own_state(), storage=store.storage)
        with pytest.raises(SettingsError, match="holds 3 jobs already"):
            said(database_url=other.url)
        with pytest.raises(SettingsError, match="another database's jobs"):
            said(database_url=postgres.database())
    assert (folder.state / "heads" / "_" / "crops" / "card.json").exists()


# Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"PIMC_STORAGE_URL": "https://bucket"}, "PIMC_STORAGE_URL: the value is not a URL"),
        ({"PIMC_STORAGE_URL": "s3://bucket/"}, "PIMC_STORAGE_URL: the value is not a URL"),
        ({"PIMC_STORAGE_ENDPOINT": "minio:9000"}, "PIMC_STORAGE_ENDPOINT: the value is not"),
    ],
)
def test_settings_that_are_not_valid(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=said):
        read_settings()


def test_only_what_opens_the_jobs_needs_their_database(tmp_path: Path) -> None:
    """A worker of a cluster reads the bucket, and no database."""
    settings = read_settings(state_dir=tmp_path / "state", storage_url="s3://bucket")
    with pytest.raises(SettingsError, match="PIMC_DATABASE_URL: PIMC_STORAGE_URL is set"):
        open_jobs(settings)
    assert not settings.state_folder.exists()


def test_a_storage_that_does_not_belong_to_the_database(
    bucket: Backend, postgres: Postgres, s3: S3, plan: Plan, tmp_path: Path
) -> None:
    with bucket.opened() as store:
        store.accept(plan, tmp_path, owner="")
    assert "belongs to the database" in refusal(replace(bucket, url=postgres.database()))
    elsewhere = replace(bucket, storage=f"s3://{s3.bucket()}")
    assert "has no files of the database's 1 jobs" in refusal(elsewhere)
    no_bucket = replace(bucket, storage="s3://there-is-no-such-bucket")
    said = refusal(no_bucket)
    assert said.startswith("PIMC_STORAGE_URL: the bucket cannot be used: ")
    assert "NoSuchBucket" in said
    with way(s3.endpoint) as road:
        road.cut()
        said = refusal(replace(bucket, endpoint=road.endpoint))
    assert said.startswith("PIMC_STORAGE_URL: the bucket cannot be used: ")


# Services -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Ten windows: of one run five are read and of the next three, and some are left."""
    return stack(tmp_path_factory.mktemp("large"), 150, 230)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Four windows."""
    return stack(tmp_path_factory.mktemp("small"), 90, 130)


def objects(s3: S3, backend: Backend) -> list[str]:
    """Keys of the jobs' files in the bucket."""
    name, _, prefix = str(backend.storage).removeprefix("s3://").partition("/")
    return [key.removeprefix(f"{prefix}/") for key in s3.keys(name, f"{prefix}/jobs/")]


def test_replicas_answer_for_each_others_jobs(zoo: Path, small: Files, bucket: Backend) -> None:
    with (
        served(model_dir=zoo, **bucket.settings) as one,
        served(model_dir=zoo, **bucket.settings) as other,
    ):
        data = {"model": HELD, "outputs": "class,probabilities"}
        direct = one.post("/classify-pixels", files=small, data=data)
        assert direct.status_code == 200, direct.text
        job = submitted_held(one, small)
        assert waited(other, job)["status"] == "successful"
        for api in (one, other):
            assert result(api, job) == direct.content
        path = f"/jobs/{job}/result/class"
        whole = other.get(path)
        assert whole.headers["content-length"] == str(len(whole.content))
        head = one.head(path)
        assert (head.status_code, head.content) == (200, b"")
        for name in ("etag", "content-length", "last-modified", "accept-ranges"):
            assert head.headers[name] == whole.headers[name], name
        part = one.get(path, headers={"Range": "bytes=100-299"})
        assert (part.status_code, part.content) == (206, whole.content[100:300])
        assert part.headers["content-range"] == f"bytes 100-299/{len(whole.content)}"
        end = other.get(path, headers={"Range": "bytes=-7"})
        assert end.content == whole.content[-7:]
        beyond = one.get(path, headers={"Range": f"bytes={len(whole.content)}-"})
        assert (beyond.status_code, beyond.json()["code"]) == (416, "invalid_range")
        known = one.get(path, headers={"If-None-Match": whole.headers["etag"]})
        assert known.status_code == 304
        style = other.get(f"/jobs/{job}/result/class.qml")
        assert (style.status_code, style.content[:9]) == (200, b"<!DOCTYPE"), style.content[:99]
        item = other.get(f"/jobs/{job}/result/item.json").json()
        assert item["type"] == "Feature"
        items = one.get("/jobs", headers={"Accept": "application/geo+json"}).json()
        assert [feature["id"] for feature in items["features"]] == [item["id"]]
        cleaned = [api.get(path, params={"min_area": 0.1}) for api in (one, other)]
        assert cleaned[0].status_code == 200, cleaned[0].text
        assert cleaned[0].content == cleaned[1].content != whole.content
        polygons = submitted(
            one, "/classify-pixels", files=small, data={"model": HELD, "outputs": "polygons"}
        )
        assert waited(other, polygons)["status"] == "successful"
        text = {"Accept": "application/geo+json"}
        outlines = [api.get(f"/jobs/{polygons}/result", headers=text) for api in (one, other)]
        assert outlines[0].json()["features"] == outlines[1].json()["features"] != []
        kept_parts = other.get(f"/jobs/{job}/results")
        assert kept_parts.status_code in {200, 204}, kept_parts.text
        assert other.delete(f"/jobs/{job}").json()["status"] == "dismissed"
        assert one.get(path).json()["code"] == "result_not_ready"
        check_healthy(one)


def test_own_classes_are_the_same_at_every_replica(zoo: Path, bucket: Backend, s3: S3) -> None:
    body = taught("crops")
    measured = {name: value for name, value in body["series"][0].items() if name[0] in "dB"}
    ask = {"series": [{"id": "a", **measured}], "model": "crops"}
    start = partial(served, model_dir=zoo, max_heads=1)
    with start(**bucket.settings) as one, start(**bucket.settings) as other:
        assert one.post("/heads", json=body).status_code == 201
        again = other.post("/heads", json=body)
        assert (again.status_code, again.json()["code"]) == (409, "name_taken")
        more = other.post("/heads", json=taught("more"))
        assert (more.status_code, more.json()["code"]) == (422, "invalid_request")
        answers = [api.post("/classify-pixels", json=ask) for api in (one, other)]
        assert answers[0].status_code == 200, answers[0].text
        assert answers[0].json()["results"] == answers[1].json()["results"]
        job = other.post("/classify-pixels", json=ask, headers=ASYNC)
        assert waited(one, job.json()["jobID"])["status"] == "successful"
        with start(**bucket.settings) as third:  # which starts with it
            assert third.post("/classify-pixels", json=ask).json() == answers[0].json()
        assert other.delete("/heads/crops").status_code == 204
        assert one.get("/heads").json()["heads"] == []
        gone = one.post("/classify-pixels", json=ask)
        assert (gone.status_code, gone.json()["code"]) == (404, "unknown_model")
        name = str(bucket.storage).split("/")[2]
        assert s3.keys(name, "pimc/heads/") == []
        # Of the same name, but another model.
        assert other.post("/heads", json=taught("crops", "Rye")).status_code == 201
        card = one.get("/models/crops").json()
        assert {entry["name"] for entry in card["classes"]} == {"Wheat", "Rye"}


def finished(store: JobStore, plan: Plan, folder: Path, content: bytes) -> Job:
    """A successful job whose class map has this content."""
    store.accept(plan, folder, owner="")
    job = taken(store)
    publish(store, job, content, "classify-pixels")
    store.succeed(job)
    store.tidy(job)
    return job


def test_large_results_are_sent_by_blocks(
    bucket: Backend, zoo: Path, plan: Plan, tmp_path: Path
) -> None:
    """Whole, and by ranges that cross blocks."""
    content = np.random.default_rng(3).bytes(5 * 2**19)
    with bucket.opened() as store:
        job = finished(store, plan, tmp_path, content)
    with served(model_dir=zoo, **bucket.settings) as api:
        path = f"/jobs/{job.id}/result/class"
        assert api.get(path).content == content
        for begin, end in ((0, 1), (2**20 - 3, 2**20 + 5), (5, len(content) - 1)):
            got = api.get(path, headers={"Range": f"bytes={begin}-{end}"})
            assert got.content == content[begin : end + 1]


# Outages --------------------------------------------------------------------------------------


@pytest.fixture
def road(bucket: Backend, s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    """A way to the server, and clients that give up soon."""
    monkeypatch.setitem(s3_module._RETRY, "max_retries", 1)
    with way(s3.endpoint) as made:
        yield made


def test_a_job_waits_while_the_bucket_is_away(
    zoo: Path, large: Files, bucket: Backend, road: Way, gate: Gate
) -> None:
    far = replace(bucket, endpoint=road.endpoint)
    with served(model_dir=zoo, **far.settings) as api:
        whole = submitted_held(api, large)
        assert waited(api, whole)["status"] == "successful"
        gate.hold(after=5)
        job = submitted_held(api, large)
        until(api, job, progress=1)
        assert soon(lambda: len(windows(bucket)) >= 3)  # two of five may be in flight
        before = windows(bucket)
        road.cut()
        gate.open()
        # The run ends at the window that it cannot keep, and is retried.
        ((lease,),) = bucket.rows("SELECT max(lease) FROM jobs")
        assert soon(lambda: bucket.rows("SELECT max(lease) FROM jobs") > [(lease,)])
        assert api.get(f"/jobs/{job}").json()["status"] in {"accepted", "running"}
        not_ready = api.get("/health/ready")
        assert (not_ready.status_code, not_ready.json()["code"]) == (503, "not_ready")
        assert str(bucket.storage) in not_ready.json()["detail"]
        for path in (f"/jobs/{whole}/result", f"/jobs/{whole}/result/class"):
            away = api.get(path)
            assert (away.status_code, away.json()["code"]) == (503, "overloaded")
            assert int(away.headers["retry-after"]) > 0
        refused = api.post("/embed", json=SERIES, headers=ASYNC)
        assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
        assert api.post("/embed", json=SERIES).status_code == 200  # which needs no bucket
        road.mend()
        assert waited(api, job)["status"] == "successful"
        assert result(api, job) == result(api, whole)
        check_healthy(api)
        listed = [entry["jobID"] for entry in api.get("/jobs").json()["jobs"]]
        assert listed[1:] == [job, whole]  # the rejected request made no job
        assert len(before) >= 3


def test_an_upload_that_is_cut_leaves_nothing_to_see(
    bucket: Backend, road: Way, s3: S3, tmp_path: Path
) -> None:
    far = storage_of(tmp_path, bucket.storage, road.endpoint)
    path = tmp_path / "large.tif"
    content = np.random.default_rng(2).bytes(LARGE)
    path.write_bytes(content)
    road.cut(after=LARGE // 2)
    with pytest.raises(StorageUnreachable) as caught:
        far.put("large.tif", path)
    assert "not-a-secret" not in f"{caught.value} {caught.value.reason}"
    assert path.exists()
    road.mend()
    assert not far.file("large.tif").exists()
    far.put("large.tif", path)
    assert far.read("large.tif") == content
    far.close()


def test_the_rest_of_a_file_is_read_by_blocks(
    bucket: Backend, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = storage_of(tmp_path, bucket.storage, s3.endpoint)
    content = np.random.default_rng(5).bytes(5 * 2**19)
    near.write("large.tif", content)
    sizes: list[int] = []
    read = s3_module.OpenedObject.read

    def counted(file: s3_module.OpenedObject, start: int, size: int) -> bytes:
        sizes.append(size)
        return read(file, start, size)

    monkeypatch.setattr(s3_module.OpenedObject, "read", counted)
    with near.file("large.tif").open("rb") as reader:
        assert reader.read() == content
    assert sizes == [2**20] * 3
    near.close()


def test_an_upload_that_fails_is_aborted(bucket: Backend, s3: S3, tmp_path: Path) -> None:
    near = storage_of(tmp_path, bucket.storage, s3.endpoint)
    assert isinstance(near, S3Storage)

    def content() -> Iterator[bytes]:
        yield bytes(LARGE // 2)
        raise ValueError("the source breaks off")

    with pytest.raises(ValueError, match="breaks off"):
        near._upload("large.tif", content())
    name = str(bucket.storage).split("/")[2]
    assert s3.unfinished(name) == s3.keys(name) == []
    near.close()


def test_a_job_whose_upload_is_cut_is_none(
    bucket: Backend, road: Way, s3: S3, plan: Plan, tmp_path: Path
) -> None:
    far = replace(bucket, endpoint=road.endpoint)
    with far.opened() as store:
        road.cut()
        with pytest.raises(Overloaded, match="retry later"):
            store.accept(plan, tmp_path, owner="")
        assert store.latest("", 9) == []
        road.mend()
        job = store.accept(plan, tmp_path, owner="")
        # Dismissed meanwhile: the files are removed once the bucket is back.
        road.cut()
        assert store.dismiss("", job.id).status == "dismissed"
        road.mend()
        assert kept(store, job) == ["request.json"]
        store.sweep(1)
        assert kept(store, job) == []


def test_a_result_that_breaks_off_is_not_taken_for_whole(
    bucket: Backend, road: Way, zoo: Path, plan: Plan, tmp_path: Path
) -> None:
    content = np.random.default_rng(4).bytes(3 * 2**20)
    far = replace(bucket, endpoint=road.endpoint)
    with far.opened() as store:
        job = finished(store, plan, tmp_path, content)
    with served(model_dir=zoo, **far.settings) as api:
        path = f"/jobs/{job.id}/result/class"
        with api.stream("GET", path) as response:
            assert response.headers["content-length"] == str(len(content))
            parts = response.iter_raw(2**16)
            got = next(parts)
            road.cut()
            rest: list[bytes] = []
            with pytest.raises(httpx.HTTPError):
                rest.extend(parts)
            got += b"".join(rest)
        assert content.startswith(got)
        road.mend()
        later = api.get(path, headers={"Range": f"bytes={len(got)}-"})
        assert got + later.content == content


@pytest.mark.slow
def test_a_job_outlives_its_replica(
    zoo: Path, large: Files, bucket: Backend, s3: S3, tmp_path: Path
) -> None:
    """One is killed in mid-job, and the other ends the job without doing again what was kept."""
    gate = Gate(tmp_path / "gate")
    start = partial(running, zoo=zoo, gate=gate, **bucket.variables)
    with ExitStack() as services:
        first = services.enter_context(start(bucket.own_state()))
        gate.hold(after=5)
        job = submitted_held(first.api, large)
        until(first.api, job, progress=1)
        second = services.enter_context(start(bucket.own_state()))
        assert second.api.get(f"/jobs/{job}").json()["status"] == "running"
        # Five are read, and two of them may be in flight.
        assert soon(lambda: len(windows(bucket)) >= 3)
        first.kill()
        before = windows(bucket)
        assert set(before.values()) == {1}
        gate.hold(after=3)
        expire(bucket)
        assert soon(lambda: 2 in windows(bucket).values())
        now = windows(bucket)
        assert {number: now[number] for number in before} == before
        gate.open()
        assert waited(second.api, job)["status"] == "successful"
        whole = result(second.api, job)
        undisturbed = submitted_held(second.api, large)
        assert waited(second.api, undisturbed)["status"] == "successful"
        assert result(second.api, undisturbed) == whole
        left = {key.split("/")[2] for key in objects(s3, bucket) if key.split("/")[1] == job}
        assert left <= {"request.json", "result-2", "ready"}
        check_healthy(second.api)

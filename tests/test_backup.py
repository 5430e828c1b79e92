"""Backups while jobs run, and restored ones: as processes, and with jobs that end meanwhile."""

from __future__ import annotations

import base64
import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from benchmarks.serving import served
from service.jobs.backup import back_up, restore
from service.jobs.files import lock
from service.jobs.storage import FolderStorage
from service.jobs.store import JobStore
from service.settings import SettingsError
from tests.kits.client import Received, Reply, serving
from tests.kits.forks import ran
from tests.kits.gate import HELD, Gate, zoo_with_a_held_model
from tests.kits.jobs import SERIES, Files, result, stack, submitted, until, waited
from tests.kits.patience import PATIENCE, soon

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo_with_a_held_model(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return stack(tmp_path_factory.mktemp("stack"), 128, 256)


def service(command: str, folder: Path, state: Path) -> subprocess.CompletedProcess[str]:
    return ran("service", command, str(folder), variables={"PIMC_STATE_DIR": str(state)})


def test_jobs_continue_from_a_backup_that_was_made_while_they_ran(
    zoo: Path, files: Files, gate: Gate, tmp_path: Path
) -> None:
    state, backup = tmp_path / "state", tmp_path / "backup"
    key = {"Idempotency-Key": "once"}
    with served(model_dir=zoo, state_dir=state) as api:
        complete = submitted(
            api, "/classify-pixels", files=files, data={"outputs": "class,entropy"}
        )
        dismissed = submitted(api, json=SERIES)
        waited(api, complete)
        api.delete(f"/jobs/{dismissed}")
        expected = result(api, complete)
        with gate.held(after=4):
            held = {"files": files, "data": {"model": HELD}}
            running = submitted(api, "/classify-pixels", headers=key, **held)
            progress = until(api, running, progress=1)["progress"]
            waiting = submitted(api, json=SERIES)
            done = service("backup", backup, state)
            assert done.returncode == 0, done.stderr
            assert "4 jobs, 1 with a result" in done.stdout
            # The service noticed nothing.
            assert api.get(f"/jobs/{running}").json()["status"] == "running"
        assert waited(api, running)["status"] == "successful"
        undisturbed = result(api, running)
    # Half of its windows were done, but the backup repeats them.
    assert not (backup / "jobs" / running / "windows-1").exists()

    other = tmp_path / "other"
    done = service("restore", backup, other)
    assert (done.returncode, done.stdout) == (0, f"4 jobs in {other}\n")
    with served(model_dir=zoo, state_dir=other) as api:
        assert result(api, complete) == expected
        assert api.get(f"/jobs/{dismissed}").json()["status"] == "dismissed"
        info = waited(api, running)
        assert (info["status"], info["progress"]) == ("successful", 100)
        assert info["progress"] >= progress
        assert result(api, running) == undisturbed
        assert waited(api, waiting)["status"] == "successful"
        # Also the memory of repeated requests is there.
        assert submitted(api, "/classify-pixels", headers=key, **held) == running


class Watched(FolderStorage):
    """A storage that calls a function with each name before the file or tree is copied."""

    def __init__(self, root: Path, before: Callable[[str], None]) -> None:
        super().__init__(root)
        self._before = before

    def fetch(self, key: str, target: Path) -> None:
        self._before(target.name)
        super().fetch(key, target)


@pytest.mark.parametrize("ends", ["successful", "dismissed"])
def test_a_job_that_ends_while_it_is_copied_is_kept_as_it_ended(
    zoo: Path, files: Files, gate: Gate, tmp_path: Path, ends: str
) -> None:
    state, backup = tmp_path / "state", tmp_path / "backup"
    gate.hold(after=0)
    with served(model_dir=zoo, state_dir=state) as api:
        job = submitted(api, "/classify-pixels", files=files, data={"model": HELD})
        copied: list[str] = []

        def before(name: str) -> None:
            if name == "input" and "input" not in copied:
                if ends == "dismissed":
                    api.delete(f"/jobs/{job}")
                gate.open()
                waited(api, job)
            copied.append(name)

        back_up(state, backup, storage=Watched(state, before))
        assert copied[0] == "request.json"
    restore(backup, tmp_path / "other")
    with served(model_dir=zoo, state_dir=tmp_path / "other") as api:
        assert api.get(f"/jobs/{job}").json()["status"] == ends
        assert api.get(f"/jobs/{job}/result").status_code == (200 if ends == "successful" else 409)
        kept = (backup / "jobs" / job).exists()
        assert kept == (ends == "successful")


def test_a_job_that_is_copied_before_its_success_is_recorded_runs_again(
    zoo: Path, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A complete result whose row still states `running`: the backup needs the uploads."""
    state, backup, other = (tmp_path / name for name in ("state", "backup", "other"))
    reached, copied = Event(), Event()
    end = JobStore._end

    def held(*arguments: Any, **options: Any) -> None:
        reached.set()
        assert copied.wait(PATIENCE)
        end(*arguments, **options)

    monkeypatch.setattr(JobStore, "_end", held)
    with served(model_dir=zoo, state_dir=state) as api:
        job = submitted(api, "/classify-pixels", files=files)
        assert reached.wait(PATIENCE)
        done = service("backup", backup, state)
        copied.set()
        assert done.returncode == 0, done.stderr
        waited(api, job)
        undisturbed = result(api, job)
        # The uploads are removed once the row states how the job has ended.
        assert soon(lambda: not (state / "jobs" / job / "input").exists())
    assert service("restore", backup, other).returncode == 0
    with served(model_dir=zoo, state_dir=other) as api:
        assert waited(api, job)["status"] == "successful"
        assert result(api, job) == undisturbed


@pytest.mark.parametrize(("ends", "queued"), [("successful", ["success"]), ("dismissed", [])])
def test_the_callback_of_a_job_that_ends_while_it_is_copied_is_kept(
    zoo: Path, files: Files, gate: Gate, tmp_path: Path, ends: str, queued: list[str]
) -> None:
    """The receiver accepts nothing until the backup is restored, and then what the backup holds."""
    state, backup, other = (tmp_path / name for name in ("state", "backup", "other"))
    restored, delivered = Event(), Event()

    def receive(request: Received) -> Reply:
        if not restored.is_set():
            return Reply(status=503)
        delivered.set()
        return Reply()

    with serving(receive) as (url, _):
        calling = {
            "model_dir": zoo,
            "callback_hosts": url.removeprefix("http://"),
            "callback_secrets": "whsec_" + base64.b64encode(bytes(range(32))).decode(),
        }
        gate.hold(after=0)
        with served(state_dir=state, **calling) as api:
            whom = json.dumps({"successUri": f"{url}/done"})
            data = {"model": HELD, "subscriber": whom}
            job = submitted(api, "/classify-pixels", files=files, data=data)

            def before(name: str) -> None:
                if name == "input":
                    if ends == "dismissed":
                        api.delete(f"/jobs/{job}")
                    gate.open()
                    waited(api, job)

            back_up(state, backup, storage=Watched(state, before))
        restore(backup, other)
        with closing(sqlite3.connect(other / "jobs.sqlite")) as db, db:
            assert [event for (event,) in db.execute("SELECT event FROM callbacks")] == queued
            db.execute("UPDATE callbacks SET due = 0")  # it would be retried later
        restored.set()
        with served(state_dir=other, **calling) as api:
            assert api.get(f"/jobs/{job}").json()["status"] == ends
            assert delivered.wait(PATIENCE) if queued else not delivered.is_set()


def test_a_backup_of_an_idle_service_is_byte_for_byte_the_same_twice(
    idle: Path, tmp_path: Path
) -> None:
    made = [tmp_path / "one", tmp_path / "two"]
    for target in made:
        back_up(idle, target)
    first, second = (
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in made
    )
    assert first == second
    assert list(tmp_path.glob("*.part")) == []


@pytest.fixture(scope="module")
def idle(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state directory of a service that stopped after one job."""
    state = tmp_path_factory.mktemp("idle") / "state"
    with served(model_dir=zoo, state_dir=state) as api:
        waited(api, submitted(api, json=SERIES))
    return state


@pytest.fixture
def backup(idle: Path, tmp_path: Path) -> Path:
    """A backup of a copy of that state, which is beside it."""
    shutil.copytree(idle, tmp_path / "state")
    back_up(tmp_path / "state", tmp_path / "backup")
    return tmp_path / "backup"


def test_a_restore_overwrites_nothing(backup: Path, tmp_path: Path) -> None:
    before = (tmp_path / "state" / "jobs.sqlite").read_bytes()
    with pytest.raises(SettingsError, match="holds jobs already"):
        restore(backup, tmp_path / "state")
    assert (tmp_path / "state" / "jobs.sqlite").read_bytes() == before
    with pytest.raises(SettingsError, match="exists already"):
        back_up(tmp_path / "state", backup)


def test_a_restore_into_a_directory_in_use_is_rejected(backup: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    held = lock(other)
    try:
        with pytest.raises(SettingsError, match="in use by another service"):
            restore(backup, other)
    finally:
        os.close(held)
    assert restore(backup, other) == 1


def test_a_restore_that_was_killed_can_be_repeated(backup: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "jobs" / "half-copied").mkdir(parents=True)
    assert restore(backup, other) == 1
    assert not (other / "jobs" / "half-copied").exists()


def test_a_file_that_is_not_a_backup_is_rejected_in_one_sentence(
    backup: Path, tmp_path: Path
) -> None:
    done = service("restore", tmp_path, tmp_path / "other")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    with pytest.raises(SettingsError, match="holds no jobs"):
        back_up(tmp_path / "no-state", tmp_path / "new")
    db = sqlite3.connect(backup / "jobs.sqlite")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(SettingsError, match="schema version 99"):
        restore(backup, tmp_path / "other")
    (backup / "jobs.sqlite").write_bytes(b"SQLite format 3\0" + bytes(4096))
    with pytest.raises(SettingsError, match="damaged"):
        restore(backup, tmp_path / "other")
    assert not (tmp_path / "other" / "jobs.sqlite").exists()

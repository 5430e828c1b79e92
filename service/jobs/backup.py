"""Backups of the state directory: made while the service runs, restored into an empty one.

    database, copied by SQLite → for each job: its files, then its row as it is now → renamed
                                     │
                               changed meanwhile? again

A backup is a state directory itself. Jobs that wait or run are in it with their uploads and begin
anew; finished ones with their results, and the callers' own models. Jobs accepted and models made
after the backup began are not in it.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from service.jobs.files import lock, remove, sync_file, sync_folder
from service.jobs.heads import HEADS, copy_heads
from service.jobs.store import DATABASE, REQUEST, SCHEMA_VERSION
from service.settings import SettingsError

_JOBS = "jobs"
_ENDED = {"failed", "dismissed"}
_TRIES = 600
_PAUSE_SECONDS = 0.1
_BUSY_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Backup:
    """What a backup holds."""

    jobs: int
    """Jobs, finished or not."""
    results: int
    """Of them, those with a result."""
    size: int
    """Bytes."""


def back_up(
    state: Path, target: Path, *, copy: Callable[[Path, Path], None] | None = None
) -> Backup:
    """Copy a state directory while a service may use it.

    Args:
        state: the state directory.
        target: folder to make; its parent exists.
        copy: copies a file or a folder; None is `shutil`'s.

    Raises:
        SettingsError: there is no state, the target exists, or a job changes without end.
        OSError: the target cannot be written.
    """
    if not (state / DATABASE).is_file():
        raise SettingsError(f"PIMC_STATE_DIR: {state} holds no jobs ({DATABASE} is missing)")
    if target.exists():
        raise SettingsError(f"{target} exists already; name a new folder for each backup")
    half = target.with_name(f"{target.name}.part")
    remove(half)
    (half / _JOBS).mkdir(parents=True, mode=0o700)
    with (
        closing(_connected(state / DATABASE)) as live,
        closing(_connected(half / DATABASE)) as kept,
    ):
        live.backup(kept)
        # So that the copy is one file, whole without the files of a log beside it.
        kept.execute("PRAGMA journal_mode = DELETE")
        for (name,) in kept.execute("SELECT id FROM jobs ORDER BY number").fetchall():
            _keep_job(live, kept, name, state / _JOBS / name, half / _JOBS / name, copy or _copy)
        copy_heads(state, half)
        _check(kept, half)
        (jobs,) = kept.execute("SELECT count(*) FROM jobs").fetchone()
    for path in half.rglob("*"):
        (sync_folder if path.is_dir() else sync_file)(path)
    sync_folder(half)
    half.rename(target)
    sync_folder(target.parent)
    files = [path for path in target.rglob("*") if path.is_file()]
    return Backup(
        jobs=jobs,
        results=sum(1 for _ in target.glob(f"{_JOBS}/*/result")),
        size=sum(path.stat().st_size for path in files),
    )


def _keep_job(
    live: sqlite3.Connection,
    kept: sqlite3.Connection,
    name: str,
    place: Path,
    target: Path,
    copy: Callable[[Path, Path], None],
) -> None:
    """Copy a job's files and its row; again if it changed meanwhile."""
    for _ in range(_TRIES):
        row = _row(live, name)
        done = (place / "result").exists()
        try:
            if row is not None and row["status"] not in _ENDED:
                target.mkdir()
                copy(place / REQUEST, target / REQUEST)
                # A series has no input. A result is complete from the moment that it is there,
                # and uploads are removed only after that, or after the row says how it ended.
                part = "result" if done else "input"
                if done or (place / part).exists():
                    copy(place / part, target / part)
        except (FileNotFoundError, shutil.Error):
            pass  # changed meanwhile, or just about to: its row will say so
        else:
            again = _row(live, name)
            same = None if again is None else again["status"]
            if (
                same == (None if row is None else row["status"])
                and done == (place / "result").exists()
            ):
                _keep_row(kept, name, again)
                return
        remove(target)
        time.sleep(_PAUSE_SECONDS)
    raise SettingsError(f"job {name} changes again and again; its files do not fit its row")


def _row(db: sqlite3.Connection, name: str) -> sqlite3.Row | None:
    found: sqlite3.Row | None = db.execute("SELECT * FROM jobs WHERE id = ?", (name,)).fetchone()
    return found


def _keep_row(kept: sqlite3.Connection, name: str, row: sqlite3.Row | None) -> None:
    """Bring a row of the backup to the moment at which its files were copied."""
    if row is None:  # expired meanwhile
        kept.execute("DELETE FROM jobs WHERE id = ?", (name,))
        return
    values = dict(row)
    if values["status"] in {"accepted", "running"}:
        # Its finished windows are not kept: they are repeated.
        values |= {"status": "accepted", "computed_by": None, "attempts": 0}
    kept.execute("DELETE FROM windows WHERE job = ?", (row["number"],))
    columns = ", ".join(f"{column} = :{column}" for column in values)
    kept.execute(f"UPDATE jobs SET {columns} WHERE id = :id", values)  # noqa: S608 - our columns


def restore(backup: Path, state: Path) -> int:
    """Copy a backup into a state directory that holds no jobs.

    Args:
        backup: made by `back_up`.
        state: created if missing; locked meanwhile.

    Returns:
        Number of jobs.

    Raises:
        SettingsError: the backup is damaged, the state directory is in use or holds jobs.
        OSError: the state directory cannot be written.
    """
    if not (backup / DATABASE).is_file():
        raise SettingsError(f"{backup} is not a backup ({DATABASE} is missing)")
    with closing(_connected(backup / DATABASE)) as kept:
        _check(kept, backup)
        (jobs,) = kept.execute("SELECT count(*) FROM jobs").fetchone()
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    held = lock(state)
    try:
        if (state / DATABASE).exists():
            raise SettingsError(
                f"PIMC_STATE_DIR: {state} holds jobs already; move it away, or name another"
            )
        for name in (_JOBS, HEADS):
            remove(state / name)  # of a restore that did not come to its end
            if (backup / name).exists():
                shutil.copytree(backup / name, state / name)
        half = state / f"{DATABASE}.part"
        shutil.copyfile(backup / DATABASE, half)
        copied = [path for name in (_JOBS, HEADS) for path in (state / name).rglob("*")]
        for path in [*copied, state / _JOBS, half]:
            (sync_folder if path.is_dir() else sync_file)(path)
        # The database last: with it the directory is whole.
        half.rename(state / DATABASE)
        sync_folder(state)
    finally:
        os.close(held)
    return int(jobs)


def _connected(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, timeout=_BUSY_SECONDS)
    db.row_factory = sqlite3.Row
    return db


def _check(db: sqlite3.Connection, folder: Path) -> None:
    """Check a backup's database.

    Raises:
        SettingsError: it is damaged, or of another release.
    """
    try:
        found = [row[0] for row in db.execute("PRAGMA integrity_check").fetchall()]
        (version,) = db.execute("PRAGMA user_version").fetchone()
    except sqlite3.DatabaseError as error:
        raise SettingsError(f"{folder}: {DATABASE} is damaged: {error}") from error
    if found != ["ok"]:
        raise SettingsError(f"{folder}: {DATABASE} is damaged: {found[0]}")
    if not 1 <= version <= SCHEMA_VERSION:
        raise SettingsError(
            f"{folder}: {DATABASE} has schema {version}, but this release reads up to "
            f"{SCHEMA_VERSION}"
        )


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)

"""Backups of the state directory: made while the service runs, restored into an empty directory.

    database, copied by SQLite → for each job: its files, then its current row → renamed
                                     │
                               changed meanwhile? copied again

A backup is a state directory itself. It holds waiting and running jobs with their uploads, which
start from their first window after a restore; finished jobs with their results; and the callers'
own models. Jobs accepted and models made after the backup began are not in it.
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
    """Counts and size of a finished backup."""

    jobs: int
    """Number of jobs, finished or not."""
    results: int
    """Number of those jobs that have a result."""
    size: int
    """Size of all files, bytes."""


def back_up(
    state: Path, target: Path, *, copy: Callable[[Path, Path], None] | None = None
) -> Backup:
    """Copy a state directory while a service may use it.

    Args:
        state: the state directory.
        target: folder to create; its parent must exist.
        copy: copies a file or a folder; None uses `shutil`.

    Returns:
        What the backup holds.

    Raises:
        SettingsError: the state directory holds no jobs, the target exists, or a job changes
            during each of its copies.
        OSError: the target cannot be written.
    """
    if not (state / DATABASE).is_file():
        raise SettingsError(
            f"PIMC_STATE_DIR: {state} holds no jobs ({DATABASE} is missing); set PIMC_STATE_DIR to "
            "the state directory of the service"
        )
    if target.exists():
        raise SettingsError(f"{target} exists already; give a folder that does not exist yet")
    unfinished = target.with_name(f"{target.name}.part")
    remove(unfinished)
    (unfinished / _JOBS).mkdir(parents=True, mode=0o700)
    with (
        closing(_connected(state / DATABASE)) as live,
        closing(_connected(unfinished / DATABASE)) as kept,
    ):
        live.backup(kept)
        # Without a write-ahead log the copy is complete in one file.
        kept.execute("PRAGMA journal_mode = DELETE")
        for (name,) in kept.execute("SELECT id FROM jobs ORDER BY number").fetchall():
            _keep_job(
                live, kept, name, state / _JOBS / name, unfinished / _JOBS / name, copy or _copy
            )
        copy_heads(state, unfinished)
        _check(kept, unfinished)
        (jobs,) = kept.execute("SELECT count(*) FROM jobs").fetchone()
    for path in unfinished.rglob("*"):
        (sync_folder if path.is_dir() else sync_file)(path)
    sync_folder(unfinished)
    unfinished.rename(target)
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
    source: Path,
    target: Path,
    copy: Callable[[Path, Path], None],
) -> None:
    """Copy a job's files and its row; copy both again if the job changed meanwhile."""
    for _ in range(_TRIES):
        row = _row(live, name)
        done = (source / "result").exists()
        try:
            if row is not None and row["status"] not in _ENDED:
                target.mkdir()
                copy(source / REQUEST, target / REQUEST)
                # A job of series has no input folder. The service removes uploads only once the
                # complete result exists or the row holds the job's final status.
                part = "result" if done else "input"
                if done or (source / part).exists():
                    copy(source / part, target / part)
        except (FileNotFoundError, shutil.Error):
            pass  # the service has removed files; the row's status changes with them
        else:
            again = _row(live, name)
            same = None if again is None else again["status"]
            if (
                same == (None if row is None else row["status"])
                and done == (source / "result").exists()
            ):
                _keep_row(kept, name, again)
                return
        remove(target)
        time.sleep(_PAUSE_SECONDS)
    raise SettingsError(
        f"job {name} changed during each of {_TRIES} copies, so its files do not match its row; "
        "repeat the backup later"
    )


def _row(db: sqlite3.Connection, name: str) -> sqlite3.Row | None:
    found: sqlite3.Row | None = db.execute("SELECT * FROM jobs WHERE id = ?", (name,)).fetchone()
    return found


def _keep_row(kept: sqlite3.Connection, name: str, row: sqlite3.Row | None) -> None:
    """Update a row of the backup to the state in which the job's files were copied."""
    if row is None:  # expired meanwhile
        kept.execute("DELETE FROM jobs WHERE id = ?", (name,))
        return
    values = dict(row)
    if values["status"] in {"accepted", "running"}:
        # The backup holds no finished windows, so the job computes all of them again.
        values |= {"status": "accepted", "computed_by": None, "attempts": 0}
    kept.execute("DELETE FROM windows WHERE job = ?", (row["number"],))
    columns = ", ".join(f"{column} = :{column}" for column in values)
    kept.execute(f"UPDATE jobs SET {columns} WHERE id = :id", values)  # noqa: S608 - our columns


def restore(backup: Path, state: Path) -> int:
    """Copy a backup into a state directory that holds no jobs.

    Args:
        backup: folder that `back_up` made.
        state: state directory; created if missing, locked while it is written.

    Returns:
        Number of restored jobs.

    Raises:
        SettingsError: the backup is damaged, or the state directory is in use or holds jobs.
        OSError: the state directory cannot be written.
    """
    if not (backup / DATABASE).is_file():
        raise SettingsError(
            f"{backup} is not a backup ({DATABASE} is missing); give a folder that "
            "'python -m service backup' made"
        )
    with closing(_connected(backup / DATABASE)) as kept:
        _check(kept, backup)
        (jobs,) = kept.execute("SELECT count(*) FROM jobs").fetchone()
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    held = lock(state)
    try:
        if (state / DATABASE).exists():
            raise SettingsError(
                f"PIMC_STATE_DIR: {state} holds jobs already; move that directory elsewhere, or "
                "set PIMC_STATE_DIR to an empty one"
            )
        for name in (_JOBS, HEADS):
            remove(state / name)  # left by an interrupted restore
            if (backup / name).exists():
                shutil.copytree(backup / name, state / name)
        unfinished = state / f"{DATABASE}.part"
        shutil.copyfile(backup / DATABASE, unfinished)
        copied = [path for name in (_JOBS, HEADS) for path in (state / name).rglob("*")]
        for path in [*copied, state / _JOBS, unfinished]:
            (sync_folder if path.is_dir() else sync_file)(path)
        # The database comes last: a directory without it counts as empty.
        unfinished.rename(state / DATABASE)
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
        SettingsError: the database is damaged, or a later release wrote it.
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
            f"{folder}: {DATABASE} has schema version {version}, but this release reads versions 1 "
            f"to {SCHEMA_VERSION}; use the release that made the backup"
        )


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)

"""Backups of the state directory: made while services run, restored into an empty directory.

    database, as SQLite → for each job: its files, then its current row → renamed
                                 │
                           changed meanwhile? copied again

A backup is a state directory with SQLite, also if replicas with PostgreSQL made it, and also if
their files are in a bucket; each kind of service restores it. It holds waiting and running jobs
with their uploads, which start from their first window after a restore; finished jobs with their
results; and the callers' own models. Jobs accepted and models made after the backup began are not
in it.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from service.errors import PIMCError
from service.jobs.database import (
    Cursor,
    Database,
    Dialect,
    Postgres,
    Session,
    Sqlite,
    UnusableDatabase,
)
from service.jobs.files import lock, remove, size_of, sync_file, sync_folder, sync_tree
from service.jobs.head_rows import HEADS
from service.jobs.heads import copy_heads, head_folder, head_owner
from service.jobs.job_files import REQUEST, result_name
from service.jobs.schema import SCHEMA_VERSION, upgrade
from service.jobs.state_folder import DATABASE, mark_owner
from service.jobs.storage import MARK, FolderStorage, Storage
from service.settings import SettingsError

_JOBS = "jobs"
_ENDED = {"failed", "dismissed"}
_TRIES = 600
_PAUSE_SECONDS = 0.1
_BUSY_SECONDS = 60.0
_TABLES = ("jobs", "clock", "turns", "usage", "callbacks")
"""Tables of a backup, by reference; finished windows of running jobs are not kept."""


class _Live(Protocol):
    """The database of a service that may be running."""

    def execute(self, statement: str, values: Any = ..., /) -> Cursor: ...  # noqa: ANN401


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
    state: Path,
    target: Path,
    *,
    database_url: str | None = None,
    storage: Storage | None = None,
) -> Backup:
    """Copy a state directory while services may use it.

    Args:
        state: the state directory.
        target: folder to create; its parent must exist.
        database_url: of PostgreSQL; None is SQLite in the state directory.
        storage: where the jobs' files are; None is the state directory.

    Returns:
        Number of jobs and results, and size of the backup.

    Raises:
        SettingsError: the state directory holds no jobs, the target exists, or a job changes
            during each of its copies.
        OSError: the target cannot be written.
        Overloaded: the storage cannot be reached.
    """
    if database_url is None and not (state / DATABASE).is_file():
        raise SettingsError(
            f"PIMC_STATE_DIR: {state} holds no jobs ({DATABASE} is missing); set PIMC_STATE_DIR to "
            "the state directory of the service"
        )
    if target.exists():
        raise SettingsError(f"{target} exists already; give a folder that does not exist yet")
    storage = storage or FolderStorage(state)
    unfinished = target.with_name(f"{target.name}.part")
    remove(unfinished)
    (unfinished / _JOBS).mkdir(parents=True, mode=0o700)
    opened = (
        _sqlite(state, unfinished) if database_url is None else _postgres(database_url, unfinished)
    )
    with opened as live, closing(_connected(unfinished / DATABASE)) as kept:
        # Without a write-ahead log the copy is complete in one file.
        kept.execute("PRAGMA journal_mode = DELETE")
        for (name,) in kept.execute("SELECT id FROM jobs ORDER BY number").fetchall():
            _keep_job(live, kept, name, unfinished / _JOBS / name, storage)
        if storage.local:
            copy_heads(state, unfinished)
        else:
            _fetch_heads(live, storage, unfinished)
        _check(kept, unfinished)
        (jobs,) = kept.execute("SELECT count(*) FROM jobs").fetchone()
    sync_tree(unfinished)
    unfinished.rename(target)
    sync_folder(target.parent)
    return Backup(
        jobs=jobs,
        results=sum(1 for _ in target.glob(f"{_JOBS}/*/result*")),
        size=size_of(target),
    )


@contextmanager
def _sqlite(state: Path, target: Path) -> Iterator[_Live]:
    """The database of a service, copied into a folder."""
    with (
        closing(_connected(state / DATABASE)) as live,
        closing(_connected(target / DATABASE)) as kept,
    ):
        live.backup(kept)
        yield live


@contextmanager
def _postgres(url: str, target: Path) -> Iterator[_Live]:
    """The database of replicas, copied into a folder as SQLite."""
    with _opened(Postgres(url), "PIMC_DATABASE_URL: the database") as live, live.read() as source:
        version = live.dialect.version(source)
        if version != SCHEMA_VERSION:
            raise SettingsError(
                f"PIMC_DATABASE_URL: the database has schema version {version}, but this release "
                f"copies version {SCHEMA_VERSION}: use the release that the replicas run"
            )
        with _opened(Sqlite(target / DATABASE), str(target)) as kept:
            upgrade(kept, target / _JOBS)
            with kept.transaction() as copy:
                _copy_rows(source, copy)
        yield source


@contextmanager
def _opened(dialect: Dialect, what: str) -> Iterator[Database]:
    """A database; its errors are those of settings."""
    try:
        with closing(Database(dialect)) as database:
            yield database
    except (UnusableDatabase, PIMCError) as error:
        raise SettingsError(f"{what} cannot be used: {error}") from error


def _copy_rows(source: _Live, target: Session) -> None:
    """Copy all rows of a backup's tables into empty ones."""
    target.execute("DELETE FROM clock")  # which a new schema fills
    for table in _TABLES:
        for row in source.execute(f"SELECT * FROM {table}").fetchall():  # noqa: S608
            _insert(target, table, row)


def _insert(target: sqlite3.Connection | Session, table: str, row: Any) -> None:  # noqa: ANN401
    """Add a row of another database, of either library, to a table."""
    columns, marks = ", ".join(row.keys()), ", ".join("?" * len(row))
    statement = f"INSERT INTO {table} ({columns}) VALUES ({marks})"  # noqa: S608 - our columns
    target.execute(statement, tuple(row))


def _keep_job(
    live: _Live,
    kept: sqlite3.Connection,
    name: str,
    target: Path,
    storage: Storage,
) -> None:
    """Copy a job's files, row and callbacks; copy all again if the job changed meanwhile."""
    (number,) = kept.execute("SELECT number FROM jobs WHERE id = ?", (name,)).fetchone()
    for _ in range(_TRIES):
        row = _row(live, name)
        try:
            if row is not None and row["status"] not in _ENDED:
                target.mkdir()
                # A series has no input. Uploads are removed only after the row states how the job
                # ended, and a result is complete before.
                part = _result(row) if row["status"] == "successful" else "input"
                for one in (REQUEST, part):
                    storage.fetch(f"{_JOBS}/{name}/{one}", target / one)
                    if one != "input" and not (target / one).exists():
                        raise FileNotFoundError(target / one)  # noqa: TRY301 - removed meanwhile
        except (FileNotFoundError, shutil.Error):
            pass  # the service has removed files; the row's status changes with them
        else:
            # A job and the callback of its end change together: if the job is the same before and
            # after, the callbacks are those of that state.
            callbacks = _callbacks(live, kept, number)
            again = _row(live, name)
            if _ended(again) == _ended(row):
                _keep_row(kept, name, again)
                _keep_callbacks(kept, callbacks, number)
                return
        remove(target)
        time.sleep(_PAUSE_SECONDS)
    raise SettingsError(
        f"job {name} changed during each of {_TRIES} attempts to copy it, so its files do not "
        "match its state in the database; repeat the backup later"
    )


def _fetch_heads(live: _Live, storage: Storage, target: Path) -> None:
    """Copy the models that a bucket holds, as folders of a state directory.

    Args:
        live: the database.
        storage: of the bucket.
        target: the copy of the state directory.
    """
    for owner, name, version in live.execute("SELECT owner, name, version FROM heads").fetchall():
        folder = head_folder(target / HEADS, owner) / name
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            storage.fetch(f"{HEADS}/{version}", folder)
        except FileNotFoundError:  # removed meanwhile
            remove(folder)


def _row(db: _Live, name: str) -> Any:  # noqa: ANN401 - of either library
    return db.execute("SELECT * FROM jobs WHERE id = ?", (name,)).fetchone()


def _result(row: Any) -> str:  # noqa: ANN401 - of either library
    """Name of the folder of a job's result; before schema 4 there were no leases."""
    return result_name(row["lease"]) if "lease" in row.keys() else "result"  # noqa: SIM118


def _ended(row: Any) -> str | None:  # noqa: ANN401 - of either library
    """How a job has ended, on which its files depend; empty if it waits or runs."""
    if row is None:
        return None
    return "" if row["status"] in {"accepted", "running"} else str(row["status"])


def _keep_row(kept: sqlite3.Connection, name: str, row: Any) -> None:  # noqa: ANN401
    """Update a row of the backup to the state in which the job's files were copied."""
    if row is None:  # expired meanwhile
        kept.execute("DELETE FROM jobs WHERE id = ?", (name,))
        return
    values = dict(zip(row.keys(), row, strict=True))
    if values["status"] in {"accepted", "running"}:
        # The backup holds no finished windows, so the job computes all of them again.
        values |= {"status": "accepted", "computed_by": None, "attempts": 0}
    if "expires" in values:
        values["expires"] = None
    kept.execute("DELETE FROM windows WHERE job = ?", (row["number"],))
    columns = ", ".join(f"{column} = :{column}" for column in values)
    kept.execute(f"UPDATE jobs SET {columns} WHERE id = :id", values)  # noqa: S608 - our columns


def _callbacks(live: _Live, kept: sqlite3.Connection, job: int) -> list[Any]:
    """The queued callbacks of a job; none in a database of a release without callbacks."""
    if not kept.execute("SELECT 1 FROM sqlite_master WHERE name = 'callbacks'").fetchone():
        return []
    return live.execute("SELECT * FROM callbacks WHERE job = ?", (job,)).fetchall()


def _keep_callbacks(kept: sqlite3.Connection, callbacks: Sequence[Any], job: int) -> None:
    """Replace the queued callbacks of a job in the backup."""
    for callback in _callbacks(kept, kept, job):
        kept.execute("DELETE FROM callbacks WHERE number = ?", (callback["number"],))
    for callback in callbacks:
        _insert(kept, "callbacks", callback)


def restore(
    backup: Path,
    state: Path,
    *,
    database_url: str | None = None,
    storage: Storage | None = None,
) -> int:
    """Copy a backup into a state directory, or a storage, that holds no jobs.

    Args:
        backup: folder that `back_up` made.
        state: state directory; created if missing, locked while it is written.
        database_url: of PostgreSQL, with no jobs; None is SQLite in the state directory.
        storage: for the jobs' files, with PostgreSQL; None is the state directory.

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
        if database_url is None:
            _copy_files(backup, state)
            unfinished = state / f"{DATABASE}.part"
            shutil.copyfile(backup / DATABASE, unfinished)
            sync_file(unfinished)
            # The database comes last: a directory without it counts as empty.
            unfinished.rename(state / DATABASE)
            sync_folder(state)
        else:
            _restore_postgres(backup, state, database_url, storage or FolderStorage(state))
    finally:
        os.close(held)
    return int(jobs)


def _copy_files(backup: Path, state: Path) -> None:
    """Copy a backup's folders, synced to disk."""
    for name in (_JOBS, HEADS):
        remove(state / name)  # left by an interrupted restore
        if name == _JOBS or (backup / name).exists():  # there may be no models
            shutil.copytree(backup / name, state / name)
            sync_tree(state / name)


def _restore_postgres(backup: Path, state: Path, url: str, storage: Storage) -> None:
    """Copy a backup into the storage and the database of replicas, none of which runs.

    Raises:
        SettingsError: the database cannot be used, or holds jobs, or the storage holds those of
            another database.
    """
    with (
        TemporaryDirectory(prefix="pimc-restore-", dir=state) as copied,
        _opened(Postgres(url), "PIMC_DATABASE_URL: the database") as database,
    ):
        # The files of a bucket are upgraded here, before they are sent there.
        place = state if storage.local else Path(copied)
        upgrade(database, place / _JOBS)
        with database.read() as db:
            (found,) = db.execute("SELECT count(*) FROM jobs").fetchone()
            (ident,) = db.execute("SELECT id FROM store").fetchone()
        if found:
            raise SettingsError(
                f"PIMC_DATABASE_URL: the database holds {found} jobs already; name an empty "
                "database"
            )
        if not storage.local:
            _clear(storage, ident)
        _copy_files(backup, place)
        # A backup of an earlier release: a copy of its rows, and the files, are upgraded first.
        shutil.copyfile(backup / DATABASE, Path(copied) / DATABASE)
        with _opened(Sqlite(Path(copied) / DATABASE), str(backup)) as kept:
            upgrade(kept, place / _JOBS)
            models = [] if storage.local else _send(place, storage)
            mark_owner(storage, ident)
            # The rows come last: a database without them counts as empty.
            with kept.read() as rows, database.transaction(serial=True) as db:
                _copy_rows(rows, db)
                for model in models:
                    db.execute("INSERT INTO heads VALUES (?, ?, ?)", model)
                for table in ("jobs", "callbacks"):
                    db.execute(
                        f"SELECT setval(pg_get_serial_sequence('{table}', 'number'), "  # noqa: S608
                        f"(SELECT coalesce(max(number), 0) + 1 FROM {table}), false)"
                    )


def _clear(storage: Storage, ident: str) -> None:
    """Remove what an interrupted restore has left in a bucket, and let it belong to the database.

    Raises:
        SettingsError: the storage belongs to another database.
    """
    try:
        known = storage.read(MARK).decode().strip()
    except FileNotFoundError:
        known = "" if storage.names(_JOBS) else ident
    if known != ident:
        raise SettingsError(
            "PIMC_STORAGE_URL: the bucket or prefix holds the files of another database's jobs; "
            "name a new prefix, such as s3://bucket/restored"
        )
    mark_owner(storage, ident)
    for name in (_JOBS, HEADS):
        storage.remove(name)


def _send(place: Path, storage: Storage) -> list[tuple[str, str, str]]:
    """Send a state directory's jobs and models to a bucket.

    Returns:
        Owner, name and version of the models.
    """
    for job in sorted((place / _JOBS).iterdir()):
        storage.put(f"{_JOBS}/{job.name}", job)
    models = []
    for folder in sorted((place / HEADS).glob("[!.]*/*")):
        version = uuid.uuid4().hex
        models.append((head_owner(folder.parent.name), folder.name, version))
        storage.put(f"{HEADS}/{version}", folder)
    return models


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

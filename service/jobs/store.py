"""Jobs: what runs on after the connection closes, kept so that a kill at any moment loses nothing.

    accepted ─▶ running ─▶ successful | failed          dismissed, from any of them
        ▲          │
        └──────────┘ drained or killed: goes on from its last finished window

    PIMC_STATE_DIR/
        lock           held by the one service that uses the folder
        jobs.sqlite    what is promised: every job, and which of its windows count
        requests/      uploads under way and answers being sent; emptied at each start
        jobs/<id>/
            input/     the files sent, as 0000.tif, …
            windows    finished windows, one after the other
            work/      what the run is at; emptied when it begins
            result/    whole, or not there

Each promise is kept by one order of things: bytes on disk, then the row that says so. A row that is
missing costs work done twice; bytes that no row speaks of are overwritten or removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from models.card import Task
from service.errors import (
    InsufficientStorage,
    InvalidRequest,
    Overloaded,
    PIMCError,
    ResultNotReady,
    UnknownJob,
)
from service.jobs.files import keep_result, link, lock, remove, sync_file, sync_folder, take_over
from service.jobs.serialise import request_document, request_of, result_of
from service.run.execute import Result
from service.run.plan import Plan
from service.run.request import RasterRequest, TaskRequest
from service.run.windows import Step
from service.settings import SettingsError

JobStatus = Literal["accepted", "running", "successful", "failed", "dismissed"]
STATUSES: tuple[JobStatus, ...] = get_args(JobStatus)
_RESULT = "reply.json"
_BY_KEY = "SELECT * FROM jobs WHERE owner = ? AND idempotency_key = ?"
_SCHEMA_VERSION = 1
_SCHEMA = """
BEGIN;
PRAGMA user_version = 1;
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order of acceptance
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    idempotency_key TEXT,
    fingerprint TEXT,
    task TEXT NOT NULL,
    document TEXT NOT NULL,
    model TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'accepted',
    progress INTEGER NOT NULL DEFAULT 0,
    problem TEXT,
    computed_by TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,  -- begun since a window was last finished
    created REAL NOT NULL,
    started REAL,
    finished REAL,
    updated REAL NOT NULL,
    age REAL NOT NULL DEFAULT 0,  -- seconds since it ended, as `sweep` counts them
    UNIQUE (owner, idempotency_key)
);
CREATE INDEX by_status ON jobs (status);
CREATE TABLE windows (
    job INTEGER NOT NULL REFERENCES jobs (number) ON DELETE CASCADE,
    stage TEXT NOT NULL,
    number INTEGER NOT NULL,
    place TEXT NOT NULL,
    offset INTEGER NOT NULL,
    length INTEGER NOT NULL,
    PRIMARY KEY (job, stage, number)
) WITHOUT ROWID;
CREATE TABLE clock (seen REAL NOT NULL);
INSERT INTO clock VALUES (strftime('%s', 'now'));
COMMIT;
"""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job, as it was when asked for. Times are seconds since 1970, by the clock of then."""

    number: int
    """Its place in the order of acceptance."""
    id: str
    owner: str
    """The caller it belongs to; empty where no keys are set."""
    fingerprint: str | None
    """Of the request, where an idempotency key came with it."""
    task: Task
    document: str
    """The request, as JSON."""
    model: str
    """As `name@version`."""
    sha256: str
    """Of the model's card."""
    status: JobStatus
    progress: int
    """Per cent, 0 to 100; never falls."""
    problem: Mapping[str, Any] | None
    """Of a failed job: `code`, `detail`, `errors`."""
    computed_by: str | None
    """What its finished windows come from."""
    attempts: int
    created: float
    started: float | None
    finished: float | None
    updated: float

    @property
    def error(self) -> PIMCError:
        """What a failed job failed of."""
        said = self.problem or {}
        return PIMCError.of_code(said["code"], said["detail"], said.get("errors", ()))


@dataclass(frozen=True, kw_only=True)
class Idempotency:
    """What makes a request the same as an earlier one."""

    key: str
    """The caller's `Idempotency-Key`."""
    fingerprint: str
    """Of what was asked for."""


def fingerprint(request: TaskRequest, folder: Path) -> str:
    """A hash of everything that a request states, the content of its files included.

    Args:
        request: what is asked for.
        folder: where the files lie that came with it; others are known by their path.
    """
    document = request_document(request, folder)
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    for file in request.files if isinstance(request, RasterRequest) else ():
        if file.path.is_relative_to(folder):
            with file.path.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


class JobStore:
    """The state directory. Safe for many threads; one process at a time.

    Args:
        folder: made where it is not there.
        ttl: seconds for which an ended job is kept.
        max_waiting: jobs that may wait for their turn.

    Raises:
        SettingsError: the folder cannot be used, or another service uses it.
    """

    def __init__(self, folder: Path, *, ttl: float, max_waiting: int) -> None:
        self._ttl = ttl
        self._max_waiting = max_waiting
        self._jobs = folder / "jobs"
        self.requests = folder / "requests"
        """Where folders of single requests go."""
        self._mutex = threading.Lock()
        with _usable(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._held = lock(folder)
            try:
                shutil.rmtree(self.requests, ignore_errors=True)
                self.requests.mkdir()
                self._jobs.mkdir(exist_ok=True)
                self._db = _opened(folder / "jobs.sqlite")
                self._recover()
            except BaseException:
                os.close(self._held)
                raise

    def close(self) -> None:
        """Let the folder go."""
        with self._mutex:
            self._db.close()
            os.close(self._held)

    # What callers ask ----------------------------------------------------------------------

    def accept(
        self, plan: Plan, folder: Path, *, owner: str, idempotency: Idempotency | None = None
    ) -> Job:
        """Make a job of a plan; once this returns, no kill loses it.

        Args:
            plan: checked against its files and model.
            folder: of the request: files in it are moved into the job's.
            owner: the caller.
            idempotency: None where every request is a new one.

        Returns:
            The new job, or the first one's where this repeats a request.

        Raises:
            Overloaded: enough jobs wait already.
            InvalidRequest: the key came before, with another request.
            InsufficientStorage: the disk takes no more.
        """
        name = str(uuid.uuid4())
        # The model that was planned with, also where another becomes the default.
        document = request_document(plan.request, folder, model=plan.model.card.id)
        place = self._jobs / name
        try:
            if isinstance(plan.request, RasterRequest):
                take_over([f.path for f in plan.request.files], folder, place / "input")
            else:
                place.mkdir()
            sync_folder(self._jobs)
            now = time.time()
            with self._transaction() as db:
                self._check_room(db)
                db.execute(
                    "INSERT INTO jobs (id, owner, idempotency_key, fingerprint, task, document, "
                    "model, sha256, created, updated) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        name,
                        owner,
                        idempotency.key if idempotency else None,
                        idempotency.fingerprint if idempotency else None,
                        plan.request.task,
                        json.dumps(document),
                        plan.model.card.id,
                        plan.model.card.sha256,
                        now,
                        now,
                    ),
                )
        except BaseException as error:
            shutil.rmtree(place, ignore_errors=True)
            if isinstance(error, sqlite3.IntegrityError) and idempotency:
                # The same request came twice at once, and the other was first.
                first = self.repeated(owner, idempotency)
                if first:
                    return first
            raise
        return self.find(owner, name)

    def repeated(self, owner: str, idempotency: Idempotency) -> Job | None:
        """The job that an earlier request with this key made.

        Raises:
            InvalidRequest: that was another request.
        """
        job = self._one(_BY_KEY, owner, idempotency.key)
        if job and job.fingerprint != idempotency.fingerprint:
            raise InvalidRequest.of(
                "Idempotency-Key",
                f"'{idempotency.key}' made job {job.id} of another request; a new request needs a "
                "new key",
            )
        return job

    def check_room(self, owner: str, key: str | None) -> None:
        """See that one more job may wait, or that none need.

        Args:
            owner: the caller.
            key: of a request that may have come before; its job has its place already.

        Raises:
            Overloaded: enough do.
        """
        if key is None or self._one(_BY_KEY, owner, key) is None:
            with self._mutex, _stored():
                self._check_room(self._db)

    def _check_room(self, db: sqlite3.Connection) -> None:
        (waiting,) = db.execute("SELECT count(*) FROM jobs WHERE status = 'accepted'").fetchone()
        if waiting >= self._max_waiting:
            raise Overloaded(
                f"{waiting} jobs wait for their turn, and {self._max_waiting} may "
                "(PIMC_MAX_JOBS); nothing was started",
                retry_after=60,
            )

    def find(self, owner: str, name: str) -> Job:
        """A caller's job by its id.

        Raises:
            UnknownJob: there is none, or it is another caller's.
        """
        job = self._one("SELECT * FROM jobs WHERE owner = ? AND id = ?", owner, name)
        if job is None:
            raise UnknownJob(f"no job '{name[:64]}'")
        return job

    def latest(self, owner: str, limit: int) -> list[Job]:
        """A caller's latest jobs, the newest first."""
        with self._mutex, _stored():
            rows = self._db.execute(
                "SELECT * FROM jobs WHERE owner = ? ORDER BY number DESC LIMIT ?",
                (owner, limit),
            ).fetchall()
        return [_job(row) for row in rows]

    def dismiss(self, owner: str, name: str) -> Job:
        """Take a job back, whatever has come of it; a run of it must be told.

        Raises:
            UnknownJob: there is none, or it is another caller's.
        """
        job = self.find(owner, name)
        now = time.time()
        with self._transaction() as db:
            db.execute(
                "UPDATE jobs SET status = 'dismissed', finished = coalesce(finished, ?), "
                "updated = ? WHERE number = ? AND status != 'dismissed'",
                (now, now, job.number),
            )
            db.execute("DELETE FROM windows WHERE job = ?", (job.number,))
        if job.status != "running":  # else its run removes them, once it has let go of them
            self.remove(job)
        return self.find(owner, name)

    def counts(self) -> dict[str, int]:
        """How many jobs there are, by status."""
        with self._mutex, _stored():
            rows = self._db.execute("SELECT status, count(*) FROM jobs GROUP BY status").fetchall()
        return {**dict.fromkeys(STATUSES, 0), **dict(rows)}

    def request(self, job: Job) -> TaskRequest:
        """The request that a job runs."""
        return request_of(json.loads(job.document), self.folder(job) / "input")

    def result(self, job: Job, folder: Path) -> Result:
        """A finished job's result, its files in a folder of the request's own.

        The job may be dismissed while they are sent.

        Raises:
            ResultNotReady: the job has no result, or no longer.
        """
        if job.status != "successful":
            raise ResultNotReady(f"job {job.id} is {job.status}, at {job.progress} %: no result")
        place = self.folder(job) / "result"
        try:
            result = result_of(json.loads((place / _RESULT).read_text("utf-8")), folder)
            for path in place.iterdir():
                if path.name != _RESULT:
                    link(path, folder / path.name)
        except FileNotFoundError as error:
            raise ResultNotReady(f"the result of job {job.id} was removed meanwhile") from error
        return result

    # What runs ask -------------------------------------------------------------------------

    def folder(self, job: Job) -> Path:
        """Where a job's files lie."""
        return self._jobs / job.id

    def take(self) -> Job | None:
        """The job whose turn it is, now running; None where none waits."""
        now = time.time()
        with self._transaction() as db:
            row = db.execute(
                "UPDATE jobs SET status = 'running', started = coalesce(started, ?), updated = ?, "
                "attempts = attempts + 1 WHERE number = "
                "(SELECT min(number) FROM jobs WHERE status = 'accepted') "
                "RETURNING *",
                (now, now),
            ).fetchone()
        return _job(row) if row else None

    def put_back(self, job: Job) -> None:
        """Have a running job wait again, with what it has done."""
        with self._transaction() as db:
            db.execute(
                "UPDATE jobs SET status = 'accepted', attempts = 0, updated = ? "
                "WHERE number = ? AND status = 'running'",
                (time.time(), job.number),
            )

    def publish(self, job: Job, work: Path, document: Mapping[str, Any]) -> None:
        """Make what a run has finished the result: whole, on disk, and only then by its name.

        Args:
            job: running.
            work: the folder that holds its files and nothing else.
            document: the result, without its files.
        """
        (work / _RESULT).write_text(json.dumps(document), encoding="utf-8")
        for path in work.iterdir():
            sync_file(path)
        sync_folder(work)
        work.rename(self.folder(job) / "result")
        sync_folder(self.folder(job))

    def succeed(self, job: Job) -> None:
        """A running job's result is there, and is all that is kept."""
        keep_result(self.folder(job))
        self._end(job, "successful", progress=100)

    def fail(self, job: Job, error: PIMCError) -> None:
        """A running job came to nothing."""
        problem = {"code": error.code, "detail": error.detail}
        errors = [dict(e) for e in error.errors] if isinstance(error, InvalidRequest) else []
        self._end(job, "failed", problem=json.dumps({**problem, "errors": errors}))

    def _end(
        self, job: Job, status: JobStatus, *, progress: int = 0, problem: str | None = None
    ) -> None:
        now = time.time()
        with self._transaction() as db:
            db.execute(
                "UPDATE jobs SET status = ?, progress = max(progress, ?), problem = ?, "
                "finished = ?, updated = ? WHERE number = ? AND status = 'running'",
                (status, progress, problem, now, now, job.number),
            )
            db.execute("DELETE FROM windows WHERE job = ?", (job.number,))

    def clear(self, job: Job) -> None:
        """Remove the files of a job that ended without a result."""
        current = self._one("SELECT * FROM jobs WHERE number = ?", job.number)
        if current is None or current.status in {"failed", "dismissed"}:
            self.remove(job)

    def make_room(self, job: Job) -> None:
        """Remove what a run can make again."""
        remove(self.folder(job) / "work")
        remove(self.folder(job) / "windows")

    def remove(self, job: Job) -> None:
        """Remove a job's files."""
        remove(self.folder(job))

    def begin(self, job: Job, computed_by: str) -> None:
        """Forget the windows of another device or precision: one answer comes from one."""
        if job.computed_by == computed_by:
            return
        with self._transaction() as db:
            db.execute("DELETE FROM windows WHERE job = ?", (job.number,))
            db.execute(
                "UPDATE jobs SET computed_by = ? WHERE number = ?", (computed_by, job.number)
            )

    def window(self, job: Job, step: Step) -> tuple[int, int] | None:
        """Where a finished window's bytes lie, offset and length; None where it is not finished."""
        with self._mutex, _stored():
            row = self._db.execute(
                "SELECT offset, length FROM windows "
                "WHERE job = ? AND stage = ? AND number = ? AND place = ?",
                (job.number, step.stage, step.number, _place(step)),
            ).fetchone()
        return row or None

    def end_of_windows(self, job: Job) -> int:
        """Where the bytes of finished windows end."""
        with self._mutex, _stored():
            (end,) = self._db.execute(
                "SELECT coalesce(max(offset + length), 0) FROM windows WHERE job = ?", (job.number,)
            ).fetchone()
        return int(end)

    def count_window(
        self, job: Job, step: Step, *, offset: int, length: int, progress: int
    ) -> None:
        """A window's bytes are on disk: it is finished."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO windows VALUES (?, ?, ?, ?, ?, ?)",
                (job.number, step.stage, step.number, _place(step), offset, length),
            )
            db.execute(
                "UPDATE jobs SET progress = max(progress, ?), attempts = 0, updated = ? "
                "WHERE number = ?",
                (progress, time.time(), job.number),
            )

    # Time ----------------------------------------------------------------------------------

    def sweep(self, seconds: float) -> None:
        """Remove jobs that ended long enough ago.

        Their age is counted, not read off the clock, so that a clock that jumps removes nothing.

        Args:
            seconds: since the last sweep, by a clock that does not jump.
        """
        with self._transaction() as db:
            db.execute(
                "UPDATE jobs SET age = age + ? WHERE status NOT IN ('accepted', 'running')",
                (seconds,),
            )
            old = db.execute("DELETE FROM jobs WHERE age >= ? RETURNING id", (self._ttl,))
            names = [name for (name,) in old.fetchall()]
            db.execute("UPDATE clock SET seen = ?", (time.time(),))
        for name in names:
            remove(self._jobs / name)

    def _recover(self) -> None:
        """Take up what the last service left, however it ended."""
        # Files first: where the disk is full, this may be what frees it.
        kept = dict(self._db.execute("SELECT id, status FROM jobs").fetchall())
        for place in self._jobs.iterdir():
            status = kept.get(place.name)
            if status in {None, "failed", "dismissed"}:
                remove(place)
            elif status == "successful":
                keep_result(place)
        with self._transaction() as db:
            db.execute("UPDATE jobs SET status = 'accepted' WHERE status = 'running'")
            (seen,) = db.execute("SELECT seen FROM clock").fetchone()
        # How long nothing ran is known only by the clock, which may have jumped: no stop, however
        # long it looks, makes a result older by more than half of what it may become.
        self.sweep(min(max(0.0, time.time() - seen), self._ttl / 2))

    # SQLite --------------------------------------------------------------------------------

    def _one(self, query: str, *values: object) -> Job | None:
        with self._mutex, _stored():
            row = self._db.execute(query, values).fetchone()
        return _job(row) if row else None

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it, on disk, or nothing."""
        with self._mutex, _stored():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # a full disk has rolled it back already
                    self._db.execute("ROLLBACK")
                raise


@contextmanager
def _usable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise SettingsError(f"PIMC_STATE_DIR: {folder} cannot be used: {reason}") from error
    except (sqlite3.Error, InsufficientStorage) as error:
        raise SettingsError(
            f"PIMC_STATE_DIR: {folder} cannot be used: {error} (jobs.sqlite)"
        ) from error


def _opened(path: Path) -> sqlite3.Connection:
    """The database, of this version of its schema."""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA journal_mode = WAL")
    # What a row says was promised to somebody.
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA foreign_keys = ON")
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version == 0:
        db.executescript(_SCHEMA)
    elif version != _SCHEMA_VERSION:
        raise sqlite3.DatabaseError(
            f"it is of version {version}, and this service reads version {_SCHEMA_VERSION}"
        )
    return db


@contextmanager
def _stored() -> Iterator[None]:
    """Says in our terms that SQLite could not write.

    Raises:
        InsufficientStorage: the disk is full, or fails.
    """
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF in {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}:
            raise InsufficientStorage(
                "the job cannot be kept: the service's disk is full, or it fails"
            ) from error
        raise


def _job(row: sqlite3.Row) -> Job:
    job = Job(**{name: row[name] for name in Job.__dataclass_fields__})
    problem: Any = job.problem
    return replace(job, problem=json.loads(problem)) if problem else job


def _place(step: Step) -> str:
    window = step.window
    return f"{window.col_off},{window.row_off},{window.width},{window.height}"

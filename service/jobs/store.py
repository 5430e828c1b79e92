"""Job store: durable background jobs; killing the process loses none.

    accepted ─▶ running ─▶ successful | failed          dismissed, from any of them
        ▲          │
        └──────────┘ drained or killed: resumes at its last finished window

    PIMC_STATE_DIR/
        lock           held by the one service that uses the directory
        jobs.sqlite    every job, and which of its windows are finished
        requests/      running uploads and responses; emptied at each start
        jobs/<id>/
            request.json   the request
            input/     the uploaded files, as 0000.tif, …
            windows    finished windows, one after the other
            work/      files of the current run; emptied when it begins
            result/    complete, or missing
            ready/     files made of a result when it is first requested, such as its zip

Durability follows from one order: first the bytes are on disk, then the row is written. A missing
row costs repeated work; bytes without a row are overwritten or removed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
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
    TooManyRequests,
    UnknownJob,
    no_descriptors,
)
from service.jobs.files import keep_only, lock, remove, size_of, sync_file, sync_folder, take_over
from service.jobs.serialise import (
    StoredResult,
    document_bytes,
    request_document,
    request_of,
    result_head,
    stored_result,
)
from service.run.execute import Result
from service.run.plan import Plan
from service.run.request import RasterRequest, TaskRequest
from service.run.windows import Step
from service.settings import SettingsError

JobStatus = Literal["accepted", "running", "successful", "failed", "dismissed"]
STATUSES: tuple[JobStatus, ...] = get_args(JobStatus)
DATABASE = "jobs.sqlite"
_RESULT = "reply.json"
_DOCUMENT = "document.json"
_READY = "ready"
_UPGRADE = "upgrade"
_LOCKS = 16
_BY_KEY = "SELECT * FROM jobs WHERE owner = ? AND idempotency_key = ?"
REQUEST = "request.json"
SCHEMA_VERSION = 3
_DAY = 24 * 3600
JOBS, PIXELS, STORAGE = "jobs", "pixels", "storage"
"""Names of the quotas of waiting and running jobs, of pixels per day, and of bytes."""
_BUSY_SECONDS = 5.0
"""Seconds to wait for a lock that another process or another thread holds."""
_WAL_BYTES = 16 * 2**20
"""Size to which the write-ahead log is cut after a checkpoint."""
_SCHEMA = """
BEGIN;
PRAGMA user_version = 3;
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order of acceptance
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    idempotency_key TEXT,
    fingerprint TEXT,
    task TEXT NOT NULL,
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
    caller TEXT NOT NULL DEFAULT '',  -- whose share it takes: the owner, or an address
    bytes INTEGER NOT NULL DEFAULT 0,  -- of its files
    UNIQUE (owner, idempotency_key)
);
CREATE INDEX by_status ON jobs (status);
CREATE INDEX by_owner ON jobs (owner, number);
CREATE INDEX by_caller ON jobs (caller, status);
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
CREATE TABLE turns (caller TEXT PRIMARY KEY, turn INTEGER NOT NULL);
CREATE TABLE usage (
    caller TEXT NOT NULL,
    day INTEGER NOT NULL,  -- since 1970, UTC
    pixels INTEGER NOT NULL,
    PRIMARY KEY (caller, day)
);
COMMIT;
"""
_SHARES = """
ALTER TABLE jobs ADD COLUMN caller TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;
UPDATE jobs SET caller = owner;
CREATE INDEX by_caller ON jobs (caller, status);
CREATE TABLE turns (caller TEXT PRIMARY KEY, turn INTEGER NOT NULL);
CREATE TABLE usage (
    caller TEXT NOT NULL, day INTEGER NOT NULL, pixels INTEGER NOT NULL, PRIMARY KEY (caller, day)
)"""
_TAKE = """
UPDATE jobs SET
    status = 'running', started = coalesce(started, ?), updated = ?, attempts = attempts + 1
WHERE number = (
    SELECT min(number) FROM jobs LEFT JOIN turns USING (caller)
    WHERE status = 'accepted'
    GROUP BY caller
    ORDER BY
        (SELECT count(*) FROM jobs AS o WHERE o.caller = jobs.caller AND o.status = 'running'),
        coalesce(turn, 0),
        min(number)
    LIMIT 1
) RETURNING *
"""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job's state when it was read. Times are seconds since 1970, by the clock at the time."""

    number: int
    """Position in the order of acceptance."""
    id: str
    owner: str
    """The caller it belongs to; empty if no keys are set."""
    caller: str
    """Whose share it takes: the owner; an address if no keys are set."""
    fingerprint: str | None
    """Fingerprint of the request, if it had an idempotency key."""
    task: Task
    model: str
    """As `name@version`."""
    sha256: str
    """Of the model's card."""
    status: JobStatus
    progress: int
    """Per cent, 0 to 100; never decreases."""
    problem: Mapping[str, Any] | None
    """Of a failed job: `code`, `detail`, `errors`."""
    computed_by: str | None
    """Provider and variant that computed its finished windows."""
    attempts: int
    created: float
    started: float | None
    finished: float | None
    updated: float

    @property
    def error(self) -> PIMCError:
        """The error that a failed job ended with."""
        said = self.problem or {}
        return PIMCError.of_code(said["code"], said["detail"], said.get("errors", ()))


@dataclass(frozen=True, kw_only=True)
class Share:
    """The share of one caller; None is no bound."""

    jobs: int | None = None
    """Jobs that wait or run."""
    pixels: int | None = None
    """Pixels, series and points per day."""
    bytes: int | None = None
    """Files of jobs."""


UNBOUNDED = Share()


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What one caller uses."""

    jobs: int
    """Jobs that wait or run."""
    pixels: int
    """Pixels, series and points of this day."""
    bytes: int
    """Files of jobs."""


@dataclass(frozen=True, kw_only=True)
class Idempotency:
    """Identification of repeated requests."""

    key: str
    """The caller's `Idempotency-Key`."""
    fingerprint: str
    """Fingerprint of the request."""


def fingerprint(request: TaskRequest, folder: Path) -> str:
    """A hash of everything that a request states, the content of its files included.

    Args:
        request: the request.
        folder: folder of its uploaded files; other files are identified by their path.
    """
    document = request_document(request, folder)
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    for file in request.sources if isinstance(request, RasterRequest) else ():
        if file.path.is_relative_to(folder):
            with file.path.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


class JobStore:
    """The state directory. Thread-safe; one process at a time.

    Args:
        folder: created if missing.
        ttl: seconds for which a finished job is kept.
        max_waiting: largest number of waiting jobs.

    Raises:
        SettingsError: the folder cannot be used, or another service uses it.
    """

    def __init__(self, folder: Path, *, ttl: float, max_waiting: int) -> None:
        self._ttl = ttl
        self._max_waiting = max_waiting
        self._jobs = folder / "jobs"
        self.requests = folder / "requests"
        """Parent of the folders of single requests."""
        self._mutex = threading.Lock()
        self._making = [threading.Lock() for _ in range(_LOCKS)]
        with _usable(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._held = lock(folder)
            try:
                shutil.rmtree(self.requests, ignore_errors=True)
                self.requests.mkdir()
                self._jobs.mkdir(exist_ok=True)
                self._db = _opened(folder / DATABASE)
                self._recover()
            except BaseException:
                os.close(self._held)
                raise

    def close(self) -> None:
        """Release the directory."""
        with self._alone():
            self._db.close()
            os.close(self._held)

    # For requests --------------------------------------------------------------------------

    def accept(
        self,
        plan: Plan,
        folder: Path,
        *,
        owner: str,
        idempotency: Idempotency | None = None,
        upgrade: bool = False,
        caller: str | None = None,
        share: Share = UNBOUNDED,
        pixels: int = 0,
    ) -> Job:
        """Create a job from a plan; after the return no kill loses it.

        Args:
            plan: checked against its files and model.
            folder: of the request; files in it are moved into the job's folder.
            owner: the caller it belongs to.
            idempotency: None if every request is a new one.
            upgrade: whether a later version of the model may run it.
            caller: whose share it takes; None is the owner.
            share: that share.
            pixels: what it takes of that share.

        Returns:
            The new job, or the first request's if this repeats one.

        Raises:
            Overloaded: too many jobs are waiting.
            TooManyRequests: the share is used up.
            InvalidRequest: the key was used with another request.
            InsufficientStorage: the disk is full.
        """
        name = str(uuid.uuid4())
        # The model of the plan, even if another becomes the default.
        document = request_document(plan.request, folder, model=plan.model.card.id)
        document[_UPGRADE] = upgrade
        place = self._jobs / name
        try:
            if isinstance(plan.request, RasterRequest):
                take_over([f.path for f in plan.request.sources], folder, place / "input")
            else:
                place.mkdir()
            _write_request(place, json.dumps(document))
            sync_folder(self._jobs)
            now = time.time()
            size = size_of(place)
            whose = owner if caller is None else caller
            with self._transaction() as db:
                self._check_room(db, whose, share, size)
                _charge(db, whose, pixels, share)
                db.execute(
                    "INSERT INTO jobs (id, owner, caller, bytes, idempotency_key, fingerprint, "
                    "task, model, sha256, created, updated) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        name,
                        owner,
                        whose,
                        size,
                        idempotency.key if idempotency else None,
                        idempotency.fingerprint if idempotency else None,
                        plan.request.task,
                        plan.model.card.id,
                        plan.model.card.sha256,
                        now,
                        now,
                    ),
                )
        except BaseException as error:
            shutil.rmtree(place, ignore_errors=True)
            if isinstance(error, sqlite3.IntegrityError) and idempotency:
                # The same request arrived twice at once, and the other was first.
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
                f"'{idempotency.key}' was used for job {job.id} with another request; use a new "
                "key for a new request",
            )
        return job

    def check_room(
        self, owner: str, key: str | None, *, caller: str | None = None, share: Share = UNBOUNDED
    ) -> None:
        """Check that one more job may wait, unless the request is a repeat.

        Args:
            owner: the caller it would belong to.
            key: of a request that may be a repeat, whose job exists already.
            caller: whose share it would take; None is the owner.
            share: that share.

        Raises:
            Overloaded: too many jobs are waiting.
            TooManyRequests: the share is used up.
        """
        if key is None or self._one(_BY_KEY, owner, key) is None:
            with self._alone(), _stored():
                self._check_room(self._db, owner if caller is None else caller, share, 0)

    def _check_room(self, db: sqlite3.Connection, caller: str, share: Share, size: int) -> None:
        if share != UNBOUNDED:
            self._check_share(db, caller, share, size)
        (waiting,) = db.execute("SELECT count(*) FROM jobs WHERE status = 'accepted'").fetchone()
        if waiting >= self._max_waiting:
            raise Overloaded(
                f"job queue full: {waiting} of {self._max_waiting} jobs are waiting "
                "(PIMC_MAX_JOBS); nothing was started",
                retry_after=60,
            )

    def _check_share(self, db: sqlite3.Connection, caller: str, share: Share, size: int) -> None:
        used = _usage(db, caller)
        if share.jobs is not None and used.jobs >= share.jobs:
            raise TooManyRequests(
                f"{used.jobs} jobs of this caller wait or run, at most {share.jobs} are allowed "
                "(PIMC_MAX_JOBS_PER_CALLER); nothing was started",
                policy=JOBS,
            )
        if share.bytes is not None and used.bytes + size >= share.bytes:
            (age,) = db.execute(
                "SELECT coalesce(max(age), 0) FROM jobs WHERE caller = ? AND bytes > 0", (caller,)
            ).fetchone()
            raise TooManyRequests(
                f"the jobs of this caller keep {used.bytes} bytes, this one would add {size}, and "
                f"at most {share.bytes} are allowed (PIMC_MAX_STORAGE_PER_CALLER): dismiss "
                "finished jobs, or wait until the oldest one expires",
                policy=STORAGE,
                retry_after=max(1, math.ceil(self._ttl - age)),
            )

    def usage(self, caller: str) -> Usage:
        """What a caller uses."""
        with self._alone(), _stored():
            return _usage(self._db, caller)

    def charge(self, caller: str, pixels: int, share: Share) -> None:
        """Count pixels of a request that begins.

        Args:
            caller: whose share they take.
            pixels: of the request; negative to give back.
            share: that share.

        Raises:
            TooManyRequests: they exceed the day's share; then they are not counted.
        """
        if share.pixels is not None:
            with self._transaction() as db:
                _charge(db, caller, pixels, share)

    def find(self, owner: str, name: str) -> Job:
        """A caller's job by its id.

        Raises:
            UnknownJob: the job does not exist or belongs to another caller.
        """
        job = self._one("SELECT * FROM jobs WHERE owner = ? AND id = ?", owner, name)
        if job is None:
            raise UnknownJob(f"there is no job '{name[:64]}'")
        return job

    def latest(self, owner: str, limit: int, *, before: str | None = None) -> list[Job]:
        """A caller's latest jobs, the newest first.

        Args:
            owner: the caller.
            limit: largest number of jobs.
            before: only jobs accepted before the one of this id; None starts at the newest.

        Raises:
            UnknownJob: `before` is not the id of a job of the caller.
        """
        number = 2**63 - 1 if before is None else self.find(owner, before).number
        with self._alone(), _stored():
            rows = self._db.execute(
                "SELECT * FROM jobs WHERE owner = ? AND number < ? ORDER BY number DESC LIMIT ?",
                (owner, number, limit),
            ).fetchall()
        return [_job(row) for row in rows]

    def dismiss(self, owner: str, name: str) -> Job:
        """Dismiss a job in any status; the caller must cancel its run.

        Raises:
            UnknownJob: the job does not exist or belongs to another caller.
        """
        job = self.find(owner, name)
        now = time.time()
        with self._transaction() as db:
            db.execute(
                "UPDATE jobs SET status = 'dismissed', finished = coalesce(finished, ?), "
                "updated = ?, bytes = 0 WHERE number = ? AND status != 'dismissed'",
                (now, now, job.number),
            )
            db.execute("DELETE FROM windows WHERE job = ?", (job.number,))
        if job.status != "running":  # else its run removes them when it ends
            self.remove(job)
        return self.find(owner, name)

    def counts(self) -> dict[str, int]:
        """Number of jobs by status."""
        with self._alone(), _stored():
            rows = self._db.execute("SELECT status, count(*) FROM jobs GROUP BY status").fetchall()
        return {**dict.fromkeys(STATUSES, 0), **dict(rows)}

    def oldest(self) -> float | None:
        """When the job that has waited longest was accepted, seconds since 1970; None if none."""
        with self._alone(), _stored():
            (created,) = self._db.execute(
                "SELECT min(created) FROM jobs WHERE status = 'accepted'"
            ).fetchone()
        return None if created is None else float(created)

    def fault(self) -> str | None:
        """Why the store cannot be used; None if it can. Waits for whoever uses it."""
        try:
            with self._transaction() as db:  # as an acceptance does, but nothing is written
                db.execute("SELECT id FROM jobs LIMIT 1").fetchone()
        except (sqlite3.Error, PIMCError) as error:
            return f"the job store cannot be used: {error}"
        return None

    def request(self, job: Job) -> TaskRequest:
        """The request of a job.

        Raises:
            ResultNotReady: the job was dismissed or has failed, and its files are removed.
        """
        try:
            text = (self.folder(job) / REQUEST).read_text("utf-8")
        except FileNotFoundError as error:
            raise ResultNotReady(
                f"job {job.id} is {job.status}, and its files have been removed"
            ) from error
        return request_of(json.loads(text), self.folder(job) / "input")

    def result(self, job: Job) -> StoredResult:
        """A finished job's result.

        Raises:
            ResultNotReady: the job has no result, or it was removed.
        """
        if job.status != "successful":
            raise ResultNotReady(f"job {job.id} has no result: {job.status}, at {job.progress} %")
        place = self.folder(job) / "result"
        try:
            head = json.loads((place / _RESULT).read_text("utf-8"))
            if "document" in head:
                with self._making_for(job.id):
                    head = _move_document(place)
        except FileNotFoundError as error:
            raise removed(job) from error
        return stored_result(head, place, place / _DOCUMENT)

    def ready(self, job: Job, name: str, make: Callable[[Path], object]) -> Path:
        """A file made of a result, made once for all who ask for it.

        Args:
            job: successful.
            name: of the file.
            make: writes it; called with the path to write.

        Returns:
            Its path.

        Raises:
            ResultNotReady: the result was removed.
        """
        place = self.folder(job) / _READY
        path, half = place / name, place / f"half-{name}"
        with self._making_for(job.id):
            if not path.exists():
                try:
                    place.mkdir(exist_ok=True)
                    make(half)
                    half.rename(path)
                except FileNotFoundError as error:
                    raise removed(job) from error
                finally:
                    half.unlink(missing_ok=True)
        return path

    def _making_for(self, name: str) -> threading.Lock:
        """The lock of a job's derived files; their making and their removal exclude each other."""
        return self._making[hash(name) % _LOCKS]

    def adopt(self, names: Mapping[str, str]) -> None:
        """Give the jobs of former owners to new ones.

        If both used one idempotency key, the new owner's job keeps it.

        Args:
            names: new owner by former owner.
        """
        with self._transaction() as db:
            for former, owner in names.items():
                db.execute(
                    "UPDATE jobs SET idempotency_key = NULL WHERE owner = ? AND idempotency_key IN "
                    "(SELECT idempotency_key FROM jobs WHERE owner = ?)",
                    (former, owner),
                )
                db.execute("UPDATE jobs SET owner = ? WHERE owner = ?", (owner, former))
                db.execute("UPDATE jobs SET caller = ? WHERE caller = ?", (owner, former))
                db.execute(
                    "INSERT INTO usage SELECT ?, day, pixels FROM usage WHERE caller = ? "
                    "ON CONFLICT (caller, day) DO UPDATE SET pixels = pixels + excluded.pixels",
                    (owner, former),
                )
                db.execute("DELETE FROM usage WHERE caller = ?", (former,))

    # For runs ------------------------------------------------------------------------------

    def folder(self, job: Job) -> Path:
        """Folder of a job's files."""
        return self._jobs / job.id

    def take(self) -> Job | None:
        """Start the next waiting job; None if none waits.

        The next is the first of the caller with the fewest running jobs; callers with equally many
        take turns, so that one with a hundred jobs does not make another wait for all of them.
        """
        now = time.time()
        with self._transaction() as db:
            row = db.execute(_TAKE, (now, now)).fetchone()
            if row:
                db.execute(
                    "INSERT INTO turns VALUES (?, (SELECT coalesce(max(turn), 0) + 1 FROM turns)) "
                    "ON CONFLICT (caller) DO UPDATE SET turn = excluded.turn",
                    (row["caller"],),
                )
        return _job(row) if row else None

    def put_back(self, job: Job) -> None:
        """Return a running job to the queue; its finished windows are kept."""
        with self._transaction() as db:
            db.execute(
                "UPDATE jobs SET status = 'accepted', attempts = 0, updated = ? "
                "WHERE number = ? AND status = 'running'",
                (time.time(), job.number),
            )

    def publish(self, job: Job, work: Path, result: Result) -> None:
        """Publish a finished run's files as the result: synced to disk, then renamed.

        Args:
            job: running.
            work: the folder that holds exactly its files.
            result: of the run.
        """
        (work / _DOCUMENT).write_bytes(document_bytes(result.document))
        (work / _RESULT).write_text(json.dumps(result_head(result)), encoding="utf-8")
        for path in work.iterdir():
            sync_file(path)
        sync_folder(work)
        work.rename(self.folder(job) / "result")
        sync_folder(self.folder(job))

    def succeed(self, job: Job) -> None:
        """Mark a running job as successful and keep only its result."""
        keep_only(self.folder(job), "result", REQUEST)
        self._end(job, "successful", progress=100, size=size_of(self.folder(job)))

    def may_upgrade(self, job: Job) -> bool:
        """Whether the owner lets a later version of the model run the job."""
        document = json.loads((self.folder(job) / REQUEST).read_text("utf-8"))
        return bool(document.get(_UPGRADE))

    def change_model(self, job: Job, model: str, sha256: str) -> Job:
        """Let another model run a running job, from its first window.

        Args:
            job: running.
            model: as `name@version`.
            sha256: of its card.
        """
        with self._transaction() as db:
            db.execute("DELETE FROM windows WHERE job = ?", (job.number,))
            db.execute(
                "UPDATE jobs SET model = ?, sha256 = ?, computed_by = NULL WHERE number = ?",
                (model, sha256, job.number),
            )
        return replace(job, model=model, sha256=sha256, computed_by=None)

    def fail(self, job: Job, error: PIMCError, *, free_key: bool = False) -> None:
        """Mark a running job as failed.

        Args:
            job: running.
            error: its cause.
            free_key: whether a request with its idempotency key may make a new job.
        """
        if free_key:
            with self._transaction() as db:
                db.execute(
                    "UPDATE jobs SET idempotency_key = NULL, fingerprint = NULL WHERE number = ? "
                    "AND status = 'running'",
                    (job.number,),
                )
        problem = {"code": error.code, "detail": error.detail}
        errors = [dict(e) for e in error.errors] if isinstance(error, InvalidRequest) else []
        self._end(job, "failed", problem=json.dumps({**problem, "errors": errors}))

    def _end(
        self,
        job: Job,
        status: JobStatus,
        *,
        progress: int = 0,
        problem: str | None = None,
        size: int = 0,
    ) -> None:
        now = time.time()
        with self._transaction() as db:
            db.execute(
                "UPDATE jobs SET status = ?, progress = max(progress, ?), problem = ?, bytes = ?, "
                "finished = ?, updated = ? WHERE number = ? AND status = 'running'",
                (status, progress, problem, size, now, now, job.number),
            )
            db.execute("DELETE FROM windows WHERE job = ?", (job.number,))

    def clear(self, job: Job) -> None:
        """Remove the files of a job that ended without a result."""
        current = self._one("SELECT * FROM jobs WHERE number = ?", job.number)
        if current is None or current.status in {"failed", "dismissed"}:
            self.remove(job)

    def make_room(self, job: Job) -> None:
        """Remove files that a run can make again."""
        remove(self.folder(job) / "work")
        remove(self.folder(job) / "windows")

    def remove(self, job: Job) -> None:
        """Remove a job's files."""
        self._remove(job.id)

    def _remove(self, name: str) -> None:
        with self._making_for(name):
            remove(self._jobs / name)

    def begin(self, job: Job, computed_by: str) -> None:
        """Discard windows of another device or precision, so that no result mixes two."""
        if job.computed_by == computed_by:
            return
        with self._transaction() as db:
            db.execute("DELETE FROM windows WHERE job = ?", (job.number,))
            db.execute(
                "UPDATE jobs SET computed_by = ? WHERE number = ?", (computed_by, job.number)
            )

    def window(self, job: Job, step: Step) -> tuple[int, int] | None:
        """Offset and length of a finished window's bytes; None if it is not finished."""
        with self._alone(), _stored():
            row = self._db.execute(
                "SELECT offset, length FROM windows "
                "WHERE job = ? AND stage = ? AND number = ? AND place = ?",
                (job.number, step.stage, step.number, _place(step)),
            ).fetchone()
        return row or None

    def end_of_windows(self, job: Job) -> int:
        """End offset of the finished windows' bytes."""
        with self._alone(), _stored():
            (end,) = self._db.execute(
                "SELECT coalesce(max(offset + length), 0) FROM windows WHERE job = ?", (job.number,)
            ).fetchone()
        return int(end)

    def count_window(
        self, job: Job, step: Step, *, offset: int, length: int, progress: int
    ) -> None:
        """Mark a window as finished: its bytes are on disk."""
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
        """Remove expired jobs.

        Their age is counted, not read from the clock, so that a clock that jumps removes nothing.

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
            db.execute("DELETE FROM turns WHERE caller NOT IN (SELECT caller FROM jobs)")
            db.execute("DELETE FROM usage WHERE day < ?", (_today(),))
            db.execute("UPDATE clock SET seen = ?", (time.time(),))
        for name in names:
            self._remove(name)

    def _recover(self) -> None:
        """Recover the state that the last service left, however it ended."""
        # Files first: if the disk is full, this may free it.
        kept = dict(self._db.execute("SELECT id, status FROM jobs").fetchall())
        for place in self._jobs.iterdir():
            status = kept.get(place.name)
            if status in {None, "failed", "dismissed"}:
                remove(place)
            elif status == "successful":
                keep_only(place, "result", REQUEST)
        with self._transaction() as db:
            db.execute("UPDATE jobs SET status = 'accepted' WHERE status = 'running'")
            (seen,) = db.execute("SELECT seen FROM clock").fetchone()
        # The length of a stop is known only from the wall clock, which may have jumped: a stop ages
        # a result by at most half of its lifetime.
        self.sweep(min(max(0.0, time.time() - seen), self._ttl / 2))

    # SQLite --------------------------------------------------------------------------------

    def _one(self, query: str, *values: object) -> Job | None:
        with self._alone(), _stored():
            row = self._db.execute(query, values).fetchone()
        return _job(row) if row else None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The connection, for one thread at a time.

        Raises:
            Overloaded: other threads hold it, mostly because another process holds the database.
        """
        if not self._mutex.acquire(timeout=2 * _BUSY_SECONDS):
            raise _in_use()
        try:
            yield
        finally:
            self._mutex.release()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it on disk, or nothing."""
        with self._alone(), _stored():
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
    except (sqlite3.Error, InsufficientStorage, Overloaded) as error:
        raise SettingsError(
            f"PIMC_STATE_DIR: {folder} cannot be used: {error} (jobs.sqlite)"
        ) from error


def _opened(path: Path) -> sqlite3.Connection:
    """Open the database and check its schema version."""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=_BUSY_SECONDS)
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA journal_mode = WAL")
    # A row is a promise to a client.
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA foreign_keys = ON")
    db.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version not in range(SCHEMA_VERSION + 1):
        raise sqlite3.DatabaseError(
            f"its schema has version {version}, but this service needs version {SCHEMA_VERSION}"
        )
    if version == 0:
        db.executescript(_SCHEMA)
        return db
    if version < 2:
        _move_documents(db, path.parent / "jobs")
    if version < 3:
        _add_shares(db, path.parent / "jobs")
    return db


def _move_documents(db: sqlite3.Connection, jobs: Path) -> None:
    """Upgrade from schema 1, which kept requests in the database: each becomes a file.

    Files come first, so that a kill in between costs nothing but doing it again.
    """
    kept = "SELECT id, document FROM jobs WHERE status IN ('accepted', 'running', 'successful')"
    for name, document in db.execute(kept):
        place = jobs / name
        if place.is_dir():
            _write_request(place, document)
    db.executescript(
        "BEGIN; ALTER TABLE jobs DROP COLUMN document; "
        "CREATE INDEX by_owner ON jobs (owner, number); PRAGMA user_version = 2; COMMIT; VACUUM;"
    )
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def removed(job: Job) -> ResultNotReady:
    """The error of a result whose files are gone."""
    return ResultNotReady(f"the result of job {job.id} has been removed")


def _move_document(place: Path) -> Any:  # noqa: ANN401 - JSON
    """Split a result of the release before, which held the document with all else.

    Returns:
        Its head.
    """
    head = json.loads((place / _RESULT).read_text("utf-8"))
    if "document" in head:  # else another reader was first
        for name, content in (
            (_DOCUMENT, document_bytes(head.pop("document"))),
            (_RESULT, json.dumps(head).encode()),
        ):
            half = place / f"half-{name}"
            half.write_bytes(content)
            sync_file(half)
            half.rename(place / name)
        sync_folder(place)
    return head


def _add_shares(db: sqlite3.Connection, jobs: Path) -> None:
    """Upgrade from schema 2, which did not count what callers use."""
    names = [name for (name,) in db.execute("SELECT id FROM jobs").fetchall()]
    sizes = [(size_of(jobs / name), name) for name in names]
    db.execute("BEGIN IMMEDIATE")
    for statement in _SHARES.split(";"):
        db.execute(statement)
    db.executemany("UPDATE jobs SET bytes = ? WHERE id = ?", sizes)
    db.execute("PRAGMA user_version = 3")
    db.execute("COMMIT")


def _usage(db: sqlite3.Connection, caller: str) -> Usage:
    jobs, size = db.execute(
        "SELECT count(*) FILTER (WHERE status IN ('accepted', 'running')), coalesce(sum(bytes), 0) "
        "FROM jobs WHERE caller = ?",
        (caller,),
    ).fetchone()
    row = db.execute(
        "SELECT pixels FROM usage WHERE caller = ? AND day = ?", (caller, _today())
    ).fetchone()
    return Usage(jobs=jobs, pixels=row["pixels"] if row else 0, bytes=size)


def _charge(db: sqlite3.Connection, caller: str, pixels: int, share: Share) -> None:
    if share.pixels is None:
        return
    used = _usage(db, caller).pixels
    if used + pixels > share.pixels:
        raise TooManyRequests(
            f"this caller has used {used} of {share.pixels} pixels of this day (UTC; "
            f"PIMC_MAX_PIXELS_PER_DAY), and the request has {pixels}; nothing was started",
            policy=PIXELS,
            retry_after=seconds_of_day_left(),
        )
    db.execute(
        "INSERT INTO usage VALUES (?, ?, ?) "
        "ON CONFLICT (caller, day) DO UPDATE SET pixels = pixels + excluded.pixels",
        (caller, _today(), pixels),
    )


def _today() -> int:
    return int(time.time() // _DAY)


def seconds_of_day_left() -> int:
    """Seconds until the next day begins (UTC)."""
    return math.ceil(_DAY - time.time() % _DAY)


def _write_request(folder: Path, document: str) -> None:
    path = folder / REQUEST
    path.write_text(document, encoding="utf-8")
    sync_file(path)
    sync_folder(folder)


@contextmanager
def _stored() -> Iterator[None]:
    """Translate SQLite's errors of a full disk and of a database that is in use.

    Raises:
        InsufficientStorage: the disk is full or failing.
        Overloaded: another process holds the database, or no file descriptor is free.
    """
    try:
        yield
    except sqlite3.OperationalError as error:
        code = error.sqlite_errorcode & 0xFF
        if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            raise _in_use() from error
        if code in {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR}:
            busy = no_descriptors(error)
            if busy is not None:
                raise busy from error
        if code in {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}:
            raise InsufficientStorage(
                "the job cannot be stored: the server's disk is full or failing"
            ) from error
        raise


def _in_use() -> Overloaded:
    return Overloaded(
        f"the job store was in use by another process for {_BUSY_SECONDS:g} s (jobs.sqlite)",
        retry_after=10,
    )


def _job(row: sqlite3.Row) -> Job:
    job = Job(**{name: row[name] for name in Job.__dataclass_fields__})
    problem: Any = job.problem
    return replace(job, problem=json.loads(problem)) if problem else job


def _place(step: Step) -> str:
    window = step.window
    return f"{window.col_off},{window.row_off},{window.width},{window.height}"

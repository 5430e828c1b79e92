"""Job store: durable background jobs; killing the process loses none.

    accepted ─▶ running ─▶ successful | failed          dismissed, from any status
        ▲          │
        └──────────┘ service stopped or killed: the job resumes after its last finished window

    PIMC_STATE_DIR/
        lock           locked by the one service that uses the directory
        jobs.sqlite    every job, and which of its windows are finished
        requests/      files of requests in flight; emptied at each start
        jobs/<id>/
            request.json   the request
            input/     the uploaded files, as 0000.tif, …
            windows    bytes of the finished windows, appended
            work/      files of the current run; emptied when the run begins
            result/    the complete result, or missing
            ready/     files derived from the result at the first request for them, such as a zip

Durability follows from one order: the store syncs the bytes to disk before it writes the row. If
the row is missing, the work is repeated; bytes without a row are overwritten or removed.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

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
from service.jobs import outbox
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
from service.run.request import RasterRequest, Runnable, Subscriber, TaskRequest
from service.run.windows import Step
from service.settings import SettingsError

JobStatus = Literal["accepted", "running", "successful", "failed", "dismissed"]
STATUSES: tuple[JobStatus, ...] = get_args(JobStatus)
DATABASE = "jobs.sqlite"
_RESULT = "reply.json"
_DOCUMENT = "document.json"
_READY = "ready"
_UPGRADE, _ANSWER = "upgrade", "answer"
_LOCKS = 16
_BY_KEY = "SELECT * FROM jobs WHERE owner = ? AND idempotency_key = ?"
REQUEST = "request.json"
SCHEMA_VERSION = 4
_DAY = 24 * 3600
JOBS, PIXELS, STORAGE = "jobs", "pixels", "storage"
"""Names of the quotas of waiting and running jobs, of pixels per day, and of bytes."""
_BUSY_SECONDS = 5.0
"""Seconds to wait for a lock on the database that another process holds."""
_WAL_BYTES = 16 * 2**20
"""Size to which the write-ahead log is cut after a checkpoint."""
_SCHEMA = """
BEGIN;
PRAGMA user_version = 4;
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
    attempts INTEGER NOT NULL DEFAULT 0,  -- starts since the last finished window
    created REAL NOT NULL,
    started REAL,
    finished REAL,
    updated REAL NOT NULL,
    age REAL NOT NULL DEFAULT 0,  -- seconds since the job ended, as `sweep` counts them
    caller TEXT NOT NULL DEFAULT '',  -- counted for the quotas: the owner, or an address
    bytes INTEGER NOT NULL DEFAULT 0,  -- size of the job's files
    subscriber TEXT,  -- addresses that the job calls, JSON
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
    """A job's state when it was read. Times are seconds since 1970 by the wall clock."""

    number: int
    """Position in the order of acceptance."""
    id: str
    owner: str
    """The caller that the job belongs to; empty if no API keys are set."""
    caller: str
    """The caller whose share the job counts for: the owner, or an address without API keys."""
    fingerprint: str | None
    """Fingerprint of the request; None if the request had no idempotency key."""
    task: Runnable
    model: str
    """As `name@version`."""
    sha256: str
    """The sha256 in the model's card, hexadecimal."""
    status: JobStatus
    progress: int
    """Progress in per cent, 0 to 100; never decreases."""
    problem: Mapping[str, Any] | None
    """`code`, `detail` and `errors` of a failed job; None otherwise."""
    computed_by: str | None
    """Provider and variant that computed the finished windows; None before the first run."""
    attempts: int
    """Number of starts since a window was last finished."""
    created: float
    started: float | None
    finished: float | None
    updated: float
    subscriber: Subscriber | None
    """Whom it calls."""

    @property
    def error(self) -> PIMCError:
        """The error of a failed job."""
        problem = self.problem or {}
        return PIMCError.of_code(problem["code"], problem["detail"], problem.get("errors", ()))


@dataclass(frozen=True, kw_only=True)
class Callback:
    """A callback to send."""

    number: int
    job: Job
    event: outbox.Event
    message: str
    """Its id, the same in every attempt."""
    attempts: int
    """That have failed."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Quotas of one caller; None is unlimited."""

    jobs: int | None = None
    """Largest number of jobs that wait or run."""
    pixels: int | None = None
    """Largest number of pixels, series and points per day (UTC)."""
    bytes: int | None = None
    """Largest size of the files of all jobs."""


UNBOUNDED = Share()


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Current use of one caller's quotas."""

    jobs: int
    """Number of jobs that wait or run."""
    pixels: int
    """Number of pixels, series and points on this day (UTC)."""
    bytes: int
    """Size of the files of all jobs."""


@dataclass(frozen=True, kw_only=True)
class JobFilter:
    """Conditions on jobs; those that are None or empty hold for every job."""

    tasks: tuple[str, ...] = ()
    statuses: tuple[str, ...] = ()
    since: float | None = None
    """Created at or after this moment, seconds since 1970."""
    until: float | None = None
    """Created before this moment."""
    shortest: float | None = None
    """Seconds that the job has run at least; with a bound, jobs that have not begun are left out,
    and those that wait to go on."""
    longest: float | None = None
    """Seconds that it has run at most."""

    def sql(self, now: float) -> tuple[str, tuple[object, ...]]:
        """The conditions as `AND …`, and their values.

        Args:
            now: seconds since 1970, until which a running job has run.
        """
        ran = (
            "(CASE WHEN status = 'running' THEN ? "
            "WHEN status != 'accepted' THEN finished END - started)"
        )
        conditions: list[tuple[str, tuple[object, ...]]] = [
            (f"{column} IN ({', '.join('?' * len(values))})", values)
            for column, values in (("task", self.tasks), ("status", self.statuses))
            if values
        ]
        for condition, bound in (("created >= ?", self.since), ("created < ?", self.until)):
            if bound is not None:
                conditions.append((condition, (bound,)))
        for sign, bound in ((">=", self.shortest), ("<=", self.longest)):
            if bound is not None:
                conditions.append((f"{ran} {sign} ?", (now, bound)))
        return (
            "".join(f" AND {condition}" for condition, _ in conditions),
            tuple(value for _, values in conditions for value in values),
        )


@dataclass(frozen=True, kw_only=True)
class Idempotency:
    """Identification of repeated requests."""

    key: str
    """The caller's `Idempotency-Key`."""
    fingerprint: str
    """Fingerprint of the request."""


def fingerprint(request: TaskRequest, folder: Path, answer: Mapping[str, Any] | None = None) -> str:
    """SHA-256 of a request's parameters and of the content of its uploaded files, hexadecimal.

    Args:
        request: the request.
        folder: folder of the uploaded files; the path identifies any other file.
        answer: how its results are returned; None if that is not part of the request.
    """
    document = request_document(request, folder)
    if answer is not None:
        document[_ANSWER] = answer
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    for file in request.sources if isinstance(request, RasterRequest) else ():
        if file.path.is_relative_to(folder):
            with file.path.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


class JobStore:
    """The jobs in a state directory. Thread-safe; one process at a time uses a directory.

    Args:
        folder: the state directory; created if missing.
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
        self._ready_locks = [threading.Lock() for _ in range(_LOCKS)]
        with _translate_start_errors(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._held = lock(folder)
            try:
                shutil.rmtree(self.requests, ignore_errors=True)
                self.requests.mkdir()
                self._jobs.mkdir(exist_ok=True)
                self._db = _open_database(folder / DATABASE)
                self._recover()
            except BaseException:
                os.close(self._held)
                raise

    def close(self) -> None:
        """Close the database and unlock the directory."""
        with self._exclusive():
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
        answer: Mapping[str, Any] | None = None,
        status: Literal["accepted", "running"] = "accepted",
    ) -> Job:
        """Create a job from a plan; once this returns, a kill does not lose the job.

        Args:
            plan: the request, checked against its files and its model.
            folder: the request's folder; its files are moved into the job's folder.
            owner: the caller that the job belongs to.
            idempotency: identification of repeated requests; None if the request has no key.
            upgrade: whether a later version of the model may run the job.
            caller: the caller whose share the job counts for; None is the owner.
            share: the caller's share.
            pixels: pixels, series and points that the job counts for.
            answer: how its results are returned; None if the reader of the result chooses.
            status: `running` keeps the workers from taking the job.

        Returns:
            The new job, or the existing job if this request repeats an earlier one.

        Raises:
            Overloaded: too many jobs are waiting, or another process holds the database.
            TooManyRequests: the caller's share is used up.
            InvalidRequest: the idempotency key was used with another request.
            InsufficientStorage: the disk is full.
        """
        name = str(uuid.uuid4())
        # Store the plan's model: the default model may change before the job runs.
        document = request_document(plan.request, folder, model=plan.model.card.id)
        document[_UPGRADE] = upgrade
        document[_ANSWER] = answer
        job_folder, called = self._jobs / name, plan.request.subscriber
        try:
            if isinstance(plan.request, RasterRequest):
                take_over([f.path for f in plan.request.sources], folder, job_folder / "input")
            else:
                job_folder.mkdir()
            _write_request(job_folder, json.dumps(document))
            sync_folder(self._jobs)
            now = time.time()
            size = size_of(job_folder)
            charged = owner if caller is None else caller
            with self._transaction() as db:
                self._check_room(db, charged, share, size)
                _charge(db, charged, pixels, share)
                db.execute(
                    "INSERT INTO jobs (id, owner, caller, bytes, idempotency_key, fingerprint, "
                    "task, model, sha256, created, updated, status, started, subscriber) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        name,
                        owner,
                        charged,
                        size,
                        idempotency.key if idempotency else None,
                        idempotency.fingerprint if idempotency else None,
                        plan.request.operation,
                        plan.model.card.id,
                        plan.model.card.sha256,
                        now,
                        now,
                        status,
                        now if status == "running" else None,
                        called and json.dumps(asdict(called)),
                    ),
                )
        except BaseException as error:
            shutil.rmtree(job_folder, ignore_errors=True)
            if isinstance(error, sqlite3.IntegrityError) and idempotency:
                # Two equal requests arrived at once, and the other one was stored first.
                first = self.repeated(owner, idempotency)
                if first:
                    return first
            raise
        return self.find(owner, name)

    def keep(
        self,
        plan: Plan,
        folder: Path,
        work: Path,
        result: Result,
        *,
        owner: str,
        caller: str,
        share: Share,
        answer: Mapping[str, Any] | None,
    ) -> Job:
        """Keep a finished run as a successful job, whose result can be read again.

        Args:
            plan: that was run.
            folder: of the request, as for `accept`.
            work: a folder in the state directory that holds exactly the files of the run.
            result: of the run.
            owner: the caller it belongs to.
            caller: whose share it takes.
            share: that share.
            answer: how its results are returned.

        Raises:
            PIMCError: as `accept`.
        """
        job = self.accept(
            plan, folder, owner=owner, caller=caller, share=share, answer=answer, status="running"
        )
        try:
            self.publish(job, work, result)
            self.succeed(job)
        except BaseException:
            self.dismiss(owner, job.id)
            raise
        finally:
            self.clear(job)
        return self.find(owner, job.id)

    def repeated(self, owner: str, idempotency: Idempotency) -> Job | None:
        """The job that an earlier request with the same idempotency key made; None if none did.

        Args:
            owner: the caller.
            idempotency: the key, and the fingerprint of the request.

        Raises:
            InvalidRequest: the earlier request has another fingerprint.
        """
        job = self._first_job(_BY_KEY, owner, idempotency.key)
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
            owner: the caller that the job would belong to.
            key: the request's idempotency key; a repeated request has a job already.
            caller: the caller whose share the job would count for; None is the owner.
            share: the caller's share.

        Raises:
            Overloaded: too many jobs are waiting, or another process holds the database.
            TooManyRequests: the caller's share is used up.
        """
        if key is None or self._first_job(_BY_KEY, owner, key) is None:
            with self._exclusive(), _translate_errors():
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
                f"{used.jobs} jobs of this caller wait or run, and at most {share.jobs} are "
                "allowed (PIMC_MAX_JOBS_PER_CALLER): wait until one finishes, or dismiss one; "
                "nothing was started",
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
        """Current use of a caller's quotas."""
        with self._exclusive(), _translate_errors():
            return _usage(self._db, caller)

    def charge(self, caller: str, pixels: int, share: Share) -> None:
        """Count the pixels of a request for its caller's quota of the day.

        Args:
            caller: the caller.
            pixels: pixels, series and points of the request; negative if it was not run after all.
            share: the caller's share.

        Raises:
            TooManyRequests: the request exceeds the quota of the day; its pixels are not counted.
        """
        if share.pixels is not None:
            with self._transaction() as db:
                _charge(db, caller, pixels, share)

    def find(self, owner: str, name: str) -> Job:
        """A caller's job by its id.

        Raises:
            UnknownJob: the job does not exist or belongs to another caller.
        """
        job = self._first_job("SELECT * FROM jobs WHERE owner = ? AND id = ?", owner, name)
        if job is None:
            raise UnknownJob(
                f"there is no job '{name[:64]}' of this caller: check the id and the API key "
                "(finished jobs expire; GET /jobs lists those that are kept)"
            )
        return job

    def latest(
        self,
        owner: str,
        limit: int,
        *,
        before: str | None = None,
        which: JobFilter | None = None,
    ) -> list[Job]:
        """A caller's latest jobs, the newest first.

        Args:
            owner: the caller.
            limit: largest number of jobs to return.
            before: id of a job; only jobs accepted before it are returned. None starts at the
                newest job.
            which: conditions on the jobs returned; None returns all.

        Raises:
            UnknownJob: `before` is not the id of a job of the caller.
        """
        number = 2**63 - 1 if before is None else self.find(owner, before).number
        condition, values = ("", ()) if which is None else which.sql(time.time())
        with self._exclusive(), _translate_errors():
            rows = self._db.execute(
                f"SELECT * FROM jobs WHERE owner = ? AND number < ?{condition} "  # noqa: S608
                "ORDER BY number DESC LIMIT ?",
                (owner, number, *values, limit),
            ).fetchall()
        return [_job(row) for row in rows]

    def dismiss(self, owner: str, name: str) -> Job:
        """Dismiss a job in any status; `JobRunner.dismiss` also cancels its run.

        Args:
            owner: the caller that the job belongs to.
            name: the job's id.

        Returns:
            The dismissed job.

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
            outbox.drop(db, job.number)
        if job.status != "running":  # a running job's files are removed when its run ends
            self.remove(job)
        return self.find(owner, name)

    def counts(self) -> dict[str, int]:
        """Number of jobs by status."""
        with self._exclusive(), _translate_errors():
            rows = self._db.execute("SELECT status, count(*) FROM jobs GROUP BY status").fetchall()
        return {**dict.fromkeys(STATUSES, 0), **dict(rows)}

    def oldest(self) -> float | None:
        """Time of acceptance of the job that has waited longest, seconds since 1970, or None."""
        with self._exclusive(), _translate_errors():
            (created,) = self._db.execute(
                "SELECT min(created) FROM jobs WHERE status = 'accepted'"
            ).fetchone()
        return None if created is None else float(created)

    def fault(self) -> str | None:
        """The reason why the store cannot be used; None if it works. Waits while it is locked."""
        try:
            with self._transaction() as db:  # a transaction as in `accept`, but nothing is written
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

    def answer(self, job: Job) -> Mapping[str, Any] | None:
        """How a job's results are returned, as `accept` was told.

        Raises:
            ResultNotReady: the job's files are removed.
        """
        try:
            document = json.loads((self.folder(job) / REQUEST).read_text("utf-8"))
        except FileNotFoundError as error:
            raise removed(job) from error
        found: Mapping[str, Any] | None = document.get(_ANSWER)
        return found

    def result(self, job: Job) -> StoredResult:
        """A finished job's result.

        Raises:
            ResultNotReady: the job has no result, or it was removed.
        """
        if job.status != "successful":
            raise ResultNotReady(
                f"job {job.id} has no result: its status is '{job.status}', its progress "
                f"{job.progress} %; the result exists once the status is 'successful'"
            )
        folder = self.folder(job) / "result"
        try:
            head = json.loads((folder / _RESULT).read_text("utf-8"))
            if "document" in head:
                with self._ready_lock(job.id):
                    head = _split_result(folder)
        except FileNotFoundError as error:
            raise removed(job) from error
        return stored_result(head, folder, folder / _DOCUMENT)

    def ready(self, job: Job, name: str, make: Callable[[Path], object]) -> Path:
        """A file derived from a result, made at the first request and kept for later ones.

        Args:
            job: a successful job.
            name: name of the file.
            make: writes the file to the path that it receives.

        Returns:
            Path of the file.

        Raises:
            ResultNotReady: the result was removed.
        """
        folder = self.folder(job) / _READY
        path, unfinished = folder / name, folder / f"half-{name}"
        with self._ready_lock(job.id):
            if not path.exists():
                try:
                    folder.mkdir(exist_ok=True)
                    make(unfinished)
                    unfinished.rename(path)
                except FileNotFoundError as error:
                    raise removed(job) from error
                finally:
                    unfinished.unlink(missing_ok=True)
        return path

    def _ready_lock(self, name: str) -> threading.Lock:
        """The lock under which files derived from a job's result are made and removed."""
        return self._ready_locks[hash(name) % _LOCKS]

    def adopt(self, names: Mapping[str, str]) -> None:
        """Move the jobs of former owners to new owners.

        If both owners used the same idempotency key, the new owner's job keeps it.

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
        """Start the next waiting job; None if no job waits.

        The next job is the oldest one of the caller with the fewest running jobs. Callers with
        equally many running jobs take turns, so that a caller with a hundred jobs delays another
        caller by one job.
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
                if row["started"] == now:  # not when it resumes
                    outbox.queue_progress(db, row["number"], _job(row).subscriber, now)
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
        """Publish a finished run's files as the job's result: sync them to disk, then rename.

        Args:
            job: a running job.
            work: folder that holds the files of the result and nothing else.
            result: result of the run.
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
        """Whether the owner allows a later version of the model to run the job."""
        document = json.loads((self.folder(job) / REQUEST).read_text("utf-8"))
        return bool(document.get(_UPGRADE))

    def change_model(self, job: Job, model: str, sha256: str) -> Job:
        """Change the model of a running job and discard its finished windows.

        Args:
            job: a running job.
            model: the new model, as `name@version`.
            sha256: the sha256 in the new model's card, hexadecimal.

        Returns:
            The job with the new model.
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
            job: a running job.
            error: the error that ended it.
            free_key: whether a request with the job's idempotency key may make a new job.
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
            ended = db.execute(
                "UPDATE jobs SET status = ?, progress = max(progress, ?), problem = ?, bytes = ?, "
                "finished = ?, updated = ? WHERE number = ? AND status = 'running'",
                (status, progress, problem, size, now, now, job.number),
            )
            if ended.rowcount:
                outbox.queue_end(db, job.number, job.subscriber, status, now)
            db.execute("DELETE FROM windows WHERE job = ?", (job.number,))

    def clear(self, job: Job) -> None:
        """Remove the files of a job that ended without a result."""
        current = self._first_job("SELECT * FROM jobs WHERE number = ?", job.number)
        if current is None or current.status in {"failed", "dismissed"}:
            self.remove(job)

    def make_room(self, job: Job) -> None:
        """Free disk space: remove the files that a new run of the job would make again."""
        remove(self.folder(job) / "work")
        remove(self.folder(job) / "windows")

    def remove(self, job: Job) -> None:
        """Remove a job's files."""
        self._remove(job.id)

    def _remove(self, name: str) -> None:
        with self._ready_lock(name):
            remove(self._jobs / name)

    def begin(self, job: Job, computed_by: str) -> None:
        """Begin a run; discard windows that another device or precision computed.

        Args:
            job: a running job.
            computed_by: provider and variant of this run; one result never mixes two.
        """
        if job.computed_by == computed_by:
            return
        with self._transaction() as db:
            db.execute("DELETE FROM windows WHERE job = ?", (job.number,))
            db.execute(
                "UPDATE jobs SET computed_by = ? WHERE number = ?", (computed_by, job.number)
            )

    def window(self, job: Job, step: Step) -> tuple[int, int] | None:
        """Offset and length of a finished window's bytes; None if the window is not finished."""
        with self._exclusive(), _translate_errors():
            row = self._db.execute(
                "SELECT offset, length FROM windows "
                "WHERE job = ? AND stage = ? AND number = ? AND place = ?",
                (job.number, step.stage, step.number, _window_key(step)),
            ).fetchone()
        return row or None

    def end_of_windows(self, job: Job) -> int:
        """End offset of the finished windows' bytes."""
        with self._exclusive(), _translate_errors():
            (end,) = self._db.execute(
                "SELECT coalesce(max(offset + length), 0) FROM windows WHERE job = ?", (job.number,)
            ).fetchone()
        return int(end)

    def count_window(
        self, job: Job, step: Step, *, offset: int, length: int, progress: int
    ) -> None:
        """Mark a window as finished, after its bytes were synced to disk.

        Args:
            job: a running job.
            step: the window's step.
            offset: position of the window's bytes in the journal.
            length: number of bytes.
            progress: progress of the job, per cent.
        """
        now = time.time()
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO windows VALUES (?, ?, ?, ?, ?, ?)",
                (job.number, step.stage, step.number, _window_key(step), offset, length),
            )
            before, status = db.execute(
                "SELECT progress, status FROM jobs WHERE number = ?", (job.number,)
            ).fetchone()
            db.execute(
                "UPDATE jobs SET progress = max(progress, ?), attempts = 0, updated = ? "
                "WHERE number = ?",
                (progress, now, job.number),
            )
            further = progress // outbox.PROGRESS_STEP > before // outbox.PROGRESS_STEP
            if further and status == "running":
                outbox.queue_progress(db, job.number, job.subscriber, now)

    # Callbacks -----------------------------------------------------------------------------

    def callbacks_due(self, now: float, most: int) -> list[Callback]:
        """Callbacks to send now, first attempts before repeated ones.

        Args:
            now: seconds since 1970.
            most: largest number of callbacks.
        """
        with self._exclusive(), _translate_errors():
            rows = outbox.due(self._db, now, most)
            numbers = {row["job"] for row in rows}
            marks = ", ".join("?" * len(numbers))
            jobs = {
                row["number"]: _job(row)
                for row in self._db.execute(
                    f"SELECT * FROM jobs WHERE number IN ({marks})",  # noqa: S608 - marks alone
                    (*numbers,),
                ).fetchall()
            }
        return [
            Callback(
                number=row["number"],
                job=jobs[row["job"]],
                event=row["event"],
                message=row["message"],
                attempts=row["attempts"],
            )
            for row in rows
        ]

    def next_callback(self) -> float | None:
        """When the next callback is due, seconds since 1970; None if there is none."""
        with self._exclusive(), _translate_errors():
            return outbox.next_due(self._db)

    def waiting_callbacks(self) -> int:
        """Callbacks that were not delivered yet."""
        with self._exclusive(), _translate_errors():
            return outbox.count(self._db)

    def callback_failed(self, callback: Callback, *, until: float | None) -> None:
        """Record an attempt that failed.

        Args:
            callback: the callback.
            until: when it is sent again, seconds since 1970; None gives it up.
        """
        with self._transaction() as db:
            if until is None:
                outbox.settle(db, callback.number)
            else:
                outbox.postpone(db, callback.number, until)

    def callback_delivered(self, callback: Callback) -> None:
        """Record that the receiver has accepted a callback."""
        with self._transaction() as db:
            outbox.settle(db, callback.number)

    # Time ----------------------------------------------------------------------------------

    def sweep(self, seconds: float) -> None:
        """Remove expired jobs.

        The store adds up each job's age instead of reading the wall clock, so that a change of the
        clock removes no job.

        Args:
            seconds: seconds since the last sweep, by a monotonic clock.
        """
        with self._transaction() as db:
            db.execute(
                "UPDATE jobs SET age = age + ? WHERE status NOT IN ('accepted', 'running')",
                (seconds,),
            )
            old = db.execute("DELETE FROM jobs WHERE age >= ? RETURNING id", (self._ttl,))
            ids = [job_id for (job_id,) in old.fetchall()]
            db.execute("DELETE FROM turns WHERE caller NOT IN (SELECT caller FROM jobs)")
            db.execute("DELETE FROM usage WHERE day < ?", (_today(),))
            db.execute("UPDATE clock SET seen = ?", (time.time(),))
        for job_id in ids:
            self._remove(job_id)

    def _recover(self) -> None:
        """Remove the leftovers of the last service and put its running jobs back."""
        # Files come first: removing them may free a full disk.
        kept = dict(self._db.execute("SELECT id, status FROM jobs").fetchall())
        for job_folder in self._jobs.iterdir():
            status = kept.get(job_folder.name)
            if status in {None, "failed", "dismissed"}:
                remove(job_folder)
            elif status == "successful":
                keep_only(job_folder, "result", REQUEST)
        with self._transaction() as db:
            db.execute("UPDATE jobs SET status = 'accepted' WHERE status = 'running'")
            (seen,) = db.execute("SELECT seen FROM clock").fetchone()
        # Only the wall clock measures how long the service was stopped, and it may have been
        # changed. So one stop adds at most half of a job's lifetime to its age.
        self.sweep(min(max(0.0, time.time() - seen), self._ttl / 2))

    # SQLite --------------------------------------------------------------------------------

    def _first_job(self, query: str, *values: object) -> Job | None:
        with self._exclusive(), _translate_errors():
            row = self._db.execute(query, values).fetchone()
        return _job(row) if row else None

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Exclusive use of the connection by one thread.

        Raises:
            Overloaded: other threads use it, mostly because another process holds the database.
        """
        if not self._mutex.acquire(timeout=2 * _BUSY_SECONDS):
            raise _in_use()
        try:
            yield
        finally:
            self._mutex.release()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A transaction, which is committed to disk completely or not at all."""
        with self._exclusive(), _translate_errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # SQLite itself rolls back on a full disk
                    self._db.execute("ROLLBACK")
                raise


@contextmanager
def _translate_start_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise SettingsError(f"PIMC_STATE_DIR: {folder} cannot be used: {reason}") from error
    except (sqlite3.Error, InsufficientStorage, Overloaded) as error:
        raise SettingsError(
            f"PIMC_STATE_DIR: {folder} cannot be used: {error} (jobs.sqlite)"
        ) from error


def _open_database(path: Path) -> sqlite3.Connection:
    """Open the database and check its schema version."""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=_BUSY_SECONDS)
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA journal_mode = WAL")
    # Commits must survive a power failure: the client has received the id of its job.
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA foreign_keys = ON")
    db.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version not in range(SCHEMA_VERSION + 1):
        raise sqlite3.DatabaseError(
            f"its schema has version {version}, but this release reads versions up to "
            f"{SCHEMA_VERSION}; use the release that wrote it, or another directory"
        )
    if version == 0:
        db.executescript(f"{_SCHEMA}{outbox.TABLE}; COMMIT;")
        return db
    if version < 2:
        _upgrade_from_1(db, path.parent / "jobs")
    if version < 3:
        _upgrade_from_2(db, path.parent / "jobs")
    if version < 4:
        _upgrade_from_3(db)
    return db


def _upgrade_from_1(db: sqlite3.Connection, jobs: Path) -> None:
    """Upgrade from schema 1, which kept requests in the database: write each to a file.

    Files are written before the schema changes, so that the next start repeats the upgrade after a
    kill.
    """
    kept = "SELECT id, document FROM jobs WHERE status IN ('accepted', 'running', 'successful')"
    for name, document in db.execute(kept):
        folder = jobs / name
        if folder.is_dir():
            _write_request(folder, document)
    db.executescript(
        "BEGIN; ALTER TABLE jobs DROP COLUMN document; "
        "CREATE INDEX by_owner ON jobs (owner, number); PRAGMA user_version = 2; COMMIT; VACUUM;"
    )
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def removed(job: Job) -> ResultNotReady:
    """The error for a result whose files have been removed."""
    return ResultNotReady(
        f"the result of job {job.id} has been removed: the job was dismissed or has expired; send "
        "the request again"
    )


def _split_result(folder: Path) -> Any:  # noqa: ANN401 - JSON
    """Split a result of an earlier release, which kept description and document in one file.

    Returns:
        The description.
    """
    head = json.loads((folder / _RESULT).read_text("utf-8"))
    if "document" in head:  # another reader may have split it meanwhile
        for name, content in (
            (_DOCUMENT, document_bytes(head.pop("document"))),
            (_RESULT, json.dumps(head).encode()),
        ):
            unfinished = folder / f"half-{name}"
            unfinished.write_bytes(content)
            sync_file(unfinished)
            unfinished.rename(folder / name)
        sync_folder(folder)
    return head


def _upgrade_from_2(db: sqlite3.Connection, jobs: Path) -> None:
    """Upgrade from schema 2, which did not count the callers' use of their quotas."""
    ids = [job_id for (job_id,) in db.execute("SELECT id FROM jobs").fetchall()]
    sizes = [(size_of(jobs / job_id), job_id) for job_id in ids]
    db.execute("BEGIN IMMEDIATE")
    for statement in _SHARES.split(";"):
        db.execute(statement)
    db.executemany("UPDATE jobs SET bytes = ? WHERE id = ?", sizes)
    db.execute("PRAGMA user_version = 3")
    db.execute("COMMIT")


def _upgrade_from_3(db: sqlite3.Connection) -> None:
    """Upgrade from schema 3, which called nobody."""
    db.executescript(
        f"BEGIN; ALTER TABLE jobs ADD COLUMN subscriber TEXT; {outbox.TABLE}; "
        "PRAGMA user_version = 4; COMMIT;"
    )


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
            f"this caller has used {used} of its {share.pixels} pixels of this day (UTC; "
            f"PIMC_MAX_PIXELS_PER_DAY), and the request has {pixels} pixels: send a smaller area, "
            "or wait until the next day; nothing was started",
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
def _translate_errors() -> Iterator[None]:
    """Translate SQLite's errors for a full disk and for a database that is in use.

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
                "the job store cannot be written (PIMC_STATE_DIR): the server's disk is full or "
                "failing; the administrator must free space"
            ) from error
        raise


def _in_use() -> Overloaded:
    return Overloaded(
        f"the job store ({DATABASE}) has been in use by another process for more than "
        f"{_BUSY_SECONDS:g} s; retry later",
        retry_after=10,
    )


def _job(row: sqlite3.Row) -> Job:
    found: dict[str, Any] = {name: row[name] for name in Job.__dataclass_fields__}
    if found["problem"]:
        found["problem"] = json.loads(found["problem"])
    if found["subscriber"]:
        found["subscriber"] = Subscriber(**json.loads(found["subscriber"]))
    return Job(**found)


def _window_key(step: Step) -> str:
    window = step.window
    return f"{window.col_off},{window.row_off},{window.width},{window.height}"

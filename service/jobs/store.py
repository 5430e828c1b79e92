"""Job store: durable background jobs; killing the process loses none.

    accepted ─▶ running ─▶ successful | failed          dismissed, from any status
        ▲          │
        └──────────┘ service stopped or killed: the job resumes after its last finished window

    PIMC_STATE_DIR/
        lock           locked by the one service that uses the directory, or by replicas together
        jobs.sqlite    every job, and which of its windows are finished; replicas use PostgreSQL
        database       id of the replicas' database
        requests/      files of requests in flight; emptied at each start; replicas have none here
        jobs/<id>/
            request.json   the request
            input/         the uploaded files, as 0000.tif, …
            windows-<n>    bytes of the windows that were finished under lease n, appended
            work-<n>/      files of the run under lease n
            result-<n>/    the complete result, or missing
            ready/         files derived from the result at the first request for them

With a storage elsewhere (`storage.py`) the folders of jobs are there, and the state directory is
one replica's own:

    PIMC_STATE_DIR/
        jobs/<id>-<n>/     input/ and work-<n>/ of a run here; emptied at each start
        copies/            results from which files are derived; emptied at each start

Durability follows from one order: the store syncs the bytes to disk before it writes the row. If
the row is missing, the work is repeated; bytes without a row are removed.

Each run has a lease, numbered by job. It writes only files with its number, and changes the job's
row only while the row has that number. So a run that was given up, because its replica was dead or
seemed so, cannot affect the run that follows it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args
from weakref import WeakValueDictionary

from service.errors import (
    BodyTooLarge,
    Cancelled,
    InvalidRequest,
    Overloaded,
    PIMCError,
    RasterTooLarge,
    ResultNotReady,
    TooManyRequests,
    UnknownJob,
    shown,
)
from service.jobs import outbox
from service.jobs.database import (
    Database,
    DuplicateRow,
    Postgres,
    Session,
    Sqlite,
    UnusableDatabase,
)
from service.jobs.files import lock, remove, size_of, sync_folder, take_over
from service.jobs.schema import (
    REQUEST,
    result_name,
    upgrade,
    windows_name,
    work_name,
    write_request,
)
from service.jobs.serialise import (
    StoredResult,
    document_bytes,
    json_parts,
    loaded,
    outline_of,
    request_document,
    request_of,
    result_head,
    stored_result,
)
from service.jobs.storage import MARK, FolderStorage, RemoteFile, Storage, StorageUnreachable
from service.run.execute import Result
from service.run.plan import Plan
from service.run.request import RasterRequest, Runnable, Subscriber, TaskRequest
from service.run.windows import Step
from service.settings import SettingsError
from service.tracing import traceparent

JobStatus = Literal["accepted", "running", "successful", "failed", "dismissed"]
STATUSES: tuple[JobStatus, ...] = get_args(JobStatus)
DATABASE = "jobs.sqlite"
_RESULT = "reply.json"  # as earlier releases named it, whose results stay readable
_DOCUMENT = "document.json"
_READY = "ready"
_MOST_READY = 32
"""Number of files derived from one result beyond which the earlier ones are removed."""
_UNFINISHED = "half-"
"""Begin of the name of such a file that is not finished."""
INPUT = "input"
"""Name of the folder of a job's files, uploaded or fetched."""
_RESULT_COPY = "result"
JOBS_FOLDER = "jobs"
"""Name of the folder of the jobs."""
HEADS = "heads"
"""Name of the folder of the callers' own models."""
# Names in stored requests, also of earlier releases.
_UPGRADE, _DELIVERY, _SUBMITTED = "upgrade", "answer", "submitted"
_LOCKS = 16
_OUTLINES = 128
"""Number of requests that are kept in memory without what may be long."""
_BY_KEY = "SELECT * FROM jobs WHERE owner = ? AND idempotency_key = ?"
_DAY = 24 * 3600
JOBS, PIXELS, STORAGE = "jobs", "pixels", "storage"
"""Names of the quotas of waiting and running jobs, of pixels per day, and of bytes."""
_LEASE_SECONDS = 30.0
"""Seconds without a renewal after which another replica takes a job."""
_ORPHAN_SECONDS = 24 * 3600.0
"""Age at which a folder without a job is removed: a younger one may be about to be accepted."""
_LOOK_SECONDS = 3600.0
"""Seconds between looks for such folders."""
_CLAIM_SECONDS = 60.0
"""Seconds in which a replica sends a callback before another may send it."""
_WAITS = """
SELECT 1 FROM jobs
WHERE (status = 'accepted' AND NOT {rests} AND number NOT IN ({resting}))
OR (status = 'running' AND {expired})
LIMIT 1
"""
_GIVE_UP = "UPDATE jobs SET status = 'accepted' WHERE status = 'running' AND {expired}"
_TAKE = """
UPDATE jobs SET
    status = 'running', started = coalesce(started, ?), updated = ?, attempts = attempts + 1,
    lease = lease + 1, expires = {now} + ?
WHERE number = (
    SELECT min(number) FROM jobs LEFT JOIN turns USING (caller)
    WHERE status = 'accepted' AND NOT {rests} AND number NOT IN ({resting})
    GROUP BY caller
    ORDER BY
        (SELECT count(*) FROM jobs AS o WHERE o.caller = jobs.caller AND o.status = 'running'),
        coalesce(max(turn), 0),
        min(number)
    LIMIT 1
) RETURNING *
"""


_OTHERS_WAIT = """
SELECT 1 FROM jobs AS waiting
WHERE status = 'accepted' AND NOT {rests} AND caller != ?
AND (SELECT count(*) FROM jobs AS o WHERE o.caller = waiting.caller AND o.status = 'running')
    < (SELECT count(*) FROM jobs AS o WHERE o.caller = ? AND o.status = 'running')
LIMIT 1
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
    lease: int
    """Number of times that the job was taken; identifies the run that may change it."""
    created: float
    started: float | None
    finished: float | None
    updated: float
    subscriber: Subscriber | None
    """URLs that the job calls."""

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


class LeaseLost(Cancelled):
    """The job was dismissed, or another run has taken it over: this run may change nothing."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Current use of one caller's quotas."""

    jobs: int
    """Number of jobs that wait or run."""
    pixels: int
    """Number of pixels, series and points on this day (UTC)."""
    bytes: int
    """Size of the files of all jobs."""
    day: int = field(default=0, compare=False)
    """Number of this day since 1970 (UTC), by the database's clock."""
    day_left: int = field(default=_DAY, compare=False)
    """Seconds until the next day begins (UTC), by the database's clock."""


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


def fingerprint(
    request: TaskRequest, folder: Path, delivery: Mapping[str, Any] | None = None
) -> str:
    """SHA-256 of a request's parameters and of the content of its uploaded files, hexadecimal.

    Args:
        request: the request.
        folder: folder of the uploaded files; the path identifies any other file.
        delivery: how its results are returned; None if that is not part of the request.
    """
    document = request_document(request, folder)
    if delivery is not None:
        document[_DELIVERY] = delivery
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    files = request.sources if isinstance(request, RasterRequest) else ()
    for path in (path for file in files for path in file.paths):
        if path.is_relative_to(folder):
            with path.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


class JobStore:
    """The jobs in a state directory and its database. Thread-safe.

    With SQLite one process at a time uses a directory; with PostgreSQL, any number of replicas.

    Args:
        folder: the state directory; created if missing.
        ttl: seconds for which a finished job is kept.
        max_waiting: largest number of waiting jobs.
        database_url: address of a PostgreSQL database; None uses SQLite in the directory.
        storage: where the jobs' files are, which `close` closes; None is the directory. With any
            other, each replica has a directory of its own.

    Raises:
        SettingsError: the folder, the database or the storage cannot be used, or another service
            uses it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        ttl: float,
        max_waiting: int,
        database_url: str | None = None,
        storage: Storage | None = None,
    ) -> None:
        self._ttl = ttl
        self._max_waiting = max_waiting
        self._jobs = folder / JOBS_FOLDER
        self._copies = folder / "copies"
        self.storage = FolderStorage(folder) if storage is None else storage
        self._next_look = time.monotonic() + _LOOK_SECONDS
        self._ready_locks = [threading.Lock() for _ in range(_LOCKS)]
        self._makers = WeakValueDictionary[str, threading.Lock]()  # by the key of a derived file
        self._locking = threading.Lock()
        self._outlines: dict[str, Mapping[str, Any]] = {}  # in the order in which they were made
        self._outlining = threading.Lock()
        dialect = Sqlite(folder / DATABASE) if database_url is None else Postgres(database_url)
        self.shared = dialect.shared
        """Whether replicas share the jobs."""
        shares_folder = self.shared and self.storage.local
        self.requests = None if shares_folder else folder / "requests"
        """Parent of the folders of single requests; None if replicas share the directory."""
        with _translate_start_errors(folder, dialect.name):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._held = lock(folder, shared=shares_folder)
            opened = ExitStack()
            try:
                if self.requests:
                    shutil.rmtree(self.requests, ignore_errors=True)
                    self.requests.mkdir()
                _check_kind(folder, shared=self.shared, own=not self.storage.local)
                if not self.storage.local:
                    for place in (self._jobs, self._copies):
                        shutil.rmtree(place, ignore_errors=True)
                        place.mkdir()
                self._jobs.mkdir(exist_ok=True)
                self._db = opened.enter_context(closing(Database(dialect)))
                upgrade(self._db, self._jobs)
                if self.shared:
                    self._check_owner(folder)
                self._recover()
            except BaseException:
                opened.close()
                self.storage.close()
                os.close(self._held)
                raise

    def close(self) -> None:
        """Close the database and the storage, and unlock the directory."""
        self._db.close()
        self.storage.close()
        os.close(self._held)

    def _check_owner(self, folder: Path) -> None:
        """Check that the storage belongs to the database; mark a new one.

        Raises:
            SettingsError: the storage belongs to another database.
        """
        with self._db.read() as db:
            (ident,) = db.execute("SELECT id FROM store").fetchone()
            (jobs,) = db.execute("SELECT count(*) FROM jobs").fetchone()
        what = f"PIMC_STATE_DIR: {folder}" if self.storage.local else "PIMC_STORAGE_URL: the bucket"
        kind = "folder" if self.storage.local else "prefix"
        try:
            known = self.storage.read(MARK).decode().strip()
        except FileNotFoundError:
            if self.storage.names(JOBS_FOLDER):
                raise SettingsError(
                    f"{what} has jobs of another database; name a new {kind}, or restore a backup"
                ) from None
            if jobs and not self.storage.local:
                raise SettingsError(
                    f"{what} has no files of the database's {jobs} jobs: name the storage that has "
                    "them, or move the jobs with `python -m service backup` and `restore`"
                ) from None
            mark_owner(self.storage, ident)
            return
        if known != ident:
            raise SettingsError(
                f"{what} belongs to the database {known}, but PIMC_DATABASE_URL names the database "
                f"{ident}; set the two that belong together, or name a new {kind}"
            )

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
        delivery: Mapping[str, Any] | None = None,
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
            delivery: how its results are returned; None if the reader of the result chooses.
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
        document[_DELIVERY] = delivery
        document[_SUBMITTED] = traceparent()
        job_folder, called = self._jobs / name, plan.request.subscriber
        key = _key(name)
        try:
            if isinstance(plan.request, RasterRequest):
                paths = [path for file in plan.request.sources for path in file.paths]
                take_over(paths, folder, job_folder / INPUT)
            else:
                job_folder.mkdir()
            write_request(job_folder, "".join(json_parts(document)))
            sync_folder(self._jobs)
            now = time.time()
            size = size_of(job_folder)
            if not self.storage.local:
                self.storage.put(key, job_folder)
            charged = owner if caller is None else caller
            with self._db.transaction(serial=True) as db:
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
                if status == "running":
                    db.execute(
                        "UPDATE jobs SET expires = {now} + ? WHERE id = ?", (_LEASE_SECONDS, name)
                    )
        except BaseException as error:
            if isinstance(error, Overloaded) and error.uncertain:
                raise  # the row may exist, and then it needs the files
            shutil.rmtree(job_folder, ignore_errors=True)
            if not self.storage.local:
                with suppress(Overloaded):  # an orphan, which a sweep removes
                    self.storage.remove(key)
            if isinstance(error, DuplicateRow) and idempotency:
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
        delivery: Mapping[str, Any] | None,
    ) -> Job:
        """Keep a finished run as a successful job, whose result can be read again.

        Args:
            plan: that was run.
            folder: of the request, as for `accept`.
            work: a folder that holds exactly the files of the run; it is moved.
            result: of the run.
            owner: the caller it belongs to.
            caller: whose share it takes.
            share: that share.
            delivery: how its results are returned.

        Raises:
            PIMCError: as `accept`.
        """
        job = self.accept(
            plan,
            folder,
            owner=owner,
            caller=caller,
            share=share,
            delivery=delivery,
            status="running",
        )
        try:
            self.folder(job).mkdir(exist_ok=True)
            shutil.move(work, self.work(job))  # copies the files if they are on another disk
            self.publish(job, self.work(job), result)
            self.succeed(job)
        except BaseException:
            self.dismiss(owner, job.id)
            raise
        finally:
            with suppress(Overloaded):  # a sweep does it
                self.tidy(job)
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
            with self._db.read() as db:
                self._check_room(db, owner if caller is None else caller, share, 0)

    def _check_room(self, db: Session, caller: str, share: Share, size: int) -> None:
        if share != UNBOUNDED:
            self._check_share(db, caller, share, size)
        (waiting,) = db.execute("SELECT count(*) FROM jobs WHERE status = 'accepted'").fetchone()
        if waiting >= self._max_waiting:
            raise Overloaded(
                f"job queue full: {waiting} of {self._max_waiting} jobs are waiting "
                "(PIMC_MAX_JOBS); nothing was started, retry later",
                retry_after=60,
            )

    def _check_share(self, db: Session, caller: str, share: Share, size: int) -> None:
        used = _usage(db, caller)
        if share.jobs is not None and used.jobs >= share.jobs:
            raise TooManyRequests(
                f"{used.jobs} jobs of this caller wait or run, and at most {share.jobs} are "
                "allowed (PIMC_MAX_JOBS_PER_CALLER, or `jobs` of its key): wait until one "
                "finishes, or dismiss one; nothing was started",
                policy=JOBS,
            )
        if share.bytes is not None and size >= share.bytes:
            raise BodyTooLarge(
                f"the files of the job have {size} bytes, and the jobs of this caller may keep "
                f"{share.bytes} (PIMC_MAX_STORAGE_PER_CALLER, or `storage` of its key), so it "
                "would be rejected at any time: send a smaller area, or have the administrator "
                "raise the quota; nothing was started"
            )
        if share.bytes is not None and used.bytes + size >= share.bytes:
            (age,) = db.execute(
                "SELECT coalesce(max(age), 0) FROM jobs WHERE caller = ? AND bytes > 0", (caller,)
            ).fetchone()
            raise TooManyRequests(
                f"the jobs of this caller keep {used.bytes} bytes, this one would add {size}, and "
                f"at most {share.bytes} are allowed (PIMC_MAX_STORAGE_PER_CALLER, or `storage` of "
                "its key): dismiss finished jobs, or wait until the oldest one expires",
                policy=STORAGE,
                retry_after=max(1, math.ceil(self._ttl - age)),
            )

    def usage(self, caller: str) -> Usage:
        """Current use of a caller's quotas."""
        with self._db.read() as db:
            return _usage(db, caller)

    def charge(self, caller: str, pixels: int, share: Share) -> None:
        """Count the pixels of a request for its caller's quota of the day.

        Args:
            caller: the caller.
            pixels: pixels, series and points of the request; negative if it was not run after all.
            share: the caller's share.

        Raises:
            TooManyRequests: the request exceeds what is left of the day's quota; its pixels are
                not counted.
            RasterTooLarge: the request has more pixels than the quota of a day.
        """
        if share.pixels is not None:
            with self._db.transaction(serial=True) as db:
                _charge(db, caller, pixels, share)

    def find(self, owner: str, name: str) -> Job:
        """A caller's job by its id.

        Raises:
            UnknownJob: the job does not exist or belongs to another caller.
        """
        job = self._first_job("SELECT * FROM jobs WHERE owner = ? AND id = ?", owner, name)
        if job is None:
            raise _unknown(name)
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
        with self._db.read() as db:
            rows = db.execute(
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
        with self._db.transaction(serial=True) as db:
            row = db.execute("SELECT * FROM jobs WHERE number = ?", (job.number,)).fetchone()
            if row is None:
                raise _unknown(name)
            job = _job(row)
            db.execute(
                "UPDATE jobs SET status = 'dismissed', finished = coalesce(finished, ?), "
                "updated = ?, bytes = 0, "
                "expires = CASE WHEN status = 'running' THEN expires ELSE {now} END "
                "WHERE number = ? AND status != 'dismissed'",
                (now, now, job.number),
            )
            db.execute("DELETE FROM windows WHERE job = ?", (job.number,))
            outbox.drop(db, job.number)
        if job.status != "running":  # a running job's files are removed when its run ends
            with suppress(Overloaded):  # a sweep removes them
                self.tidy(job)
        return self.find(owner, name)

    def counts(self) -> dict[str, int]:
        """Number of jobs by status."""
        with self._db.read() as db:
            rows = db.execute("SELECT status, count(*) FROM jobs GROUP BY status").fetchall()
        return {**dict.fromkeys(STATUSES, 0), **dict(rows)}

    def oldest(self) -> float | None:
        """Time of acceptance of the job that has waited longest, seconds since 1970, or None."""
        with self._db.read() as db:
            (created,) = db.execute(
                "SELECT min(created) FROM jobs WHERE status = 'accepted'"
            ).fetchone()
        return None if created is None else float(created)

    def fault(self) -> str | None:
        """The reason why the store cannot be used; None if it works. Waits while it is locked."""
        try:
            # A transaction as in `accept`, but nothing is written.
            with self._db.transaction(serial=True) as db:
                db.execute("SELECT id FROM jobs LIMIT 1").fetchone()
        except (UnusableDatabase, PIMCError) as error:
            return f"the job store cannot be used: {error}"
        return self.storage.fault()

    def request(self, job: Job) -> TaskRequest:
        """The request of a job; its uploads are where `prepare` brings them.

        Raises:
            ResultNotReady: the job was dismissed or has failed, and its files are removed.
            Overloaded: the storage cannot be reached.
        """
        try:
            document = self._stored_request(job)
        except FileNotFoundError as error:
            raise ResultNotReady(
                f"job {job.id} is {job.status}, and its files have been removed: send the request "
                "again"
            ) from error
        return request_of(document, self.folder(job) / INPUT)

    def outline(self, job: Job) -> TaskRequest:
        """The request of a job without its files, items, points and series.

        Raises:
            ResultNotReady: the job's files are removed.
        """
        return request_of(self._outline(job), self.folder(job) / INPUT)

    def delivery(self, job: Job) -> Mapping[str, Any] | None:
        """How a job's results are returned, as stored by `accept`.

        Raises:
            ResultNotReady: the job's files are removed.
        """
        found: Mapping[str, Any] | None = self._outline(job).get(_DELIVERY)
        return found

    def submitted(self, job: Job) -> str | None:
        """The span of the request that submitted a job, as a `traceparent`; None if not traced."""
        try:
            found: str | None = self._outline(job).get(_SUBMITTED)
        except (ResultNotReady, StorageUnreachable):  # which ends its run soon
            return None
        return found

    def _outline(self, job: Job) -> Mapping[str, Any]:
        """The document of a job's request without what may be long.

        The last ones are kept, and one request at a time is parsed for it: of a request of 31 MB
        that takes a second and hundreds of megabytes.

        Raises:
            ResultNotReady: the job's files are removed.
        """
        found = self._outlines.get(job.id)
        if found is not None:
            return found
        with self._outlining:
            if job.id not in self._outlines:
                try:
                    self._outlines[job.id] = outline_of(self._stored_request(job))
                except FileNotFoundError as error:
                    raise removed(job) from error
                if len(self._outlines) > _OUTLINES:
                    del self._outlines[next(iter(self._outlines))]
            return self._outlines[job.id]

    def _stored_request(self, job: Job) -> Mapping[str, Any]:
        """The document of a job's request, as `accept` stored it.

        Raises:
            FileNotFoundError: the job's files are removed.
        """
        found: Mapping[str, Any] = loaded(self.storage.read(_key(job.id, REQUEST)).decode())
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
        key = _key(job.id, result_name(job.lease))
        try:
            head = json.loads(self.storage.read(f"{key}/{_RESULT}"))
            if "document" in head:
                with self._ready_lock(job.id):
                    head = _split_result(self.storage, key)
        except FileNotFoundError as error:
            raise removed(job) from error
        return stored_result(head, self.storage.file(f"{key}/{_RESULT}"), _DOCUMENT)

    @contextmanager
    def on_disk(self, job: Job, result: StoredResult) -> Iterator[StoredResult]:
        """A job's result with its files on this machine, for as long as the context lasts.

        Args:
            job: a successful job.
            result: its result.

        Raises:
            ResultNotReady: the result was removed.
        """
        if self.storage.local:
            yield result
            return
        with TemporaryDirectory(prefix=f"{job.id}-", dir=self._copies) as parent:
            folder = Path(parent) / _RESULT_COPY
            try:
                self.storage.fetch(_key(job.id, result_name(job.lease)), folder)
                head = json.loads((folder / _RESULT).read_text("utf-8"))
            except FileNotFoundError as error:
                raise removed(job) from error
            yield stored_result(head, folder / _RESULT, _DOCUMENT)

    @contextmanager
    def copied(self, file: Path | RemoteFile) -> Iterator[Path]:
        """A file of a result on this machine, for as long as the context lasts."""
        if isinstance(file, Path):
            yield file
            return
        with TemporaryDirectory(dir=self._copies) as folder:
            self.storage.fetch(file.key, Path(folder) / file.name)
            yield Path(folder) / file.name

    def ready(self, job: Job, name: str, make: Callable[[Path], object]) -> Path | RemoteFile:
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
        key = _key(job.id, _READY, name)
        file = self.storage.file(key)
        with self._making(key):
            if not file.exists():
                self._make(job, key, make)
        return file

    def _make(self, job: Job, key: str, make: Callable[[Path], object]) -> None:
        """Make a file derived from a result, and keep it.

        The job may be removed meanwhile: making a file may take a minute, and no removal waits.
        """
        result = self.storage.file(_key(job.id, result_name(job.lease), _RESULT))
        folder = self.folder(job) / _READY if self.storage.local else self._copies
        # Another replica may make the same file.
        path = folder / f"{_UNFINISHED}{uuid.uuid4()}-{key.rpartition('/')[2]}"
        try:
            if result.exists():
                folder.mkdir(exist_ok=True)
                make(path)
            with self._ready_lock(job.id):
                if result.exists():
                    self._keep_ready(job, key, path)
                    return
        except Exception:
            if result.exists():
                raise
        finally:
            path.unlink(missing_ok=True)
        remove(self.folder(job))  # what was made after the removal
        raise removed(job)

    def _keep_ready(self, job: Job, key: str, path: Path) -> None:
        """Keep a file derived from a result; it counts for the quota of the job's caller.

        A client may have as many maps derived as `min_area` has values. If there are too many
        files, the others are removed; they are made again when a client requests them.
        """
        ready = _key(job.id, _READY)
        names = self.storage.names(ready)
        unfinished = [name for name in names if name.startswith(_UNFINISHED)]
        if len(names) - len(unfinished) >= _MOST_READY:
            self.storage.keep_only(ready, *unfinished)
        self.storage.put(key, path)
        size = self.storage.size(
            *(_key(job.id, n) for n in (result_name(job.lease), REQUEST)), ready
        )
        with self._db.transaction() as db:
            db.execute(
                "UPDATE jobs SET bytes = ? WHERE number = ? AND status = 'successful'",
                (size, job.number),
            )

    @contextmanager
    def _making(self, key: str) -> Iterator[None]:
        """Hold the lock of one file derived from a result, so that it is made once."""
        with self._locking:
            lock = self._makers.setdefault(key, threading.Lock())
        with lock:
            yield

    def _ready_lock(self, name: str) -> threading.Lock:
        """The lock under which files derived from a job's result are kept and removed."""
        return self._ready_locks[hash(name) % _LOCKS]

    def adopt(self, names: Mapping[str, str]) -> None:
        """Move the jobs of former owners to new owners.

        If both owners used the same idempotency key, the new owner's job keeps it.

        Args:
            names: new owner by former owner.
        """
        with self._db.transaction(serial=True) as db:
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
                    "ON CONFLICT (caller, day) "
                    "DO UPDATE SET pixels = usage.pixels + excluded.pixels",
                    (owner, former),
                )
                db.execute("DELETE FROM usage WHERE caller = ?", (former,))

    # Models of own classes in a bucket -------------------------------------------------------

    def heads(self, owner: str) -> dict[str, str]:
        """A caller's models: their versions by name."""
        with self._db.read() as db:
            rows = db.execute("SELECT name, version FROM heads WHERE owner = ?", (owner,))
            return {row["name"]: row["version"] for row in rows.fetchall()}

    def head_owners(self) -> list[str]:
        """Callers that have models."""
        with self._db.read() as db:
            rows = db.execute("SELECT DISTINCT owner FROM heads ORDER BY owner").fetchall()
        return [owner for (owner,) in rows]

    def add_head(self, owner: str, name: str, version: str, *, most: int) -> bool:
        """Record a caller's model, whose files are in the storage.

        Args:
            owner: the caller.
            name: of the model.
            version: key of its files below `heads`.
            most: largest number of models of one caller.

        Returns:
            Whether it was recorded: not if the caller has as many already.

        Raises:
            DuplicateRow: the caller has a model of that name.
        """
        with self._db.transaction(serial=True) as db:
            (owned,) = db.execute("SELECT count(*) FROM heads WHERE owner = ?", (owner,)).fetchone()
            db.execute("INSERT INTO heads VALUES (?, ?, ?)", (owner, name, version))
            if owned >= most:
                db.execute("DELETE FROM heads WHERE owner = ? AND name = ?", (owner, name))
        return bool(owned < most)

    def remove_head(self, owner: str, name: str) -> str | None:
        """Remove the record of a caller's model; returns its version, None if there is none."""
        with self._db.transaction() as db:
            row = db.execute(
                "DELETE FROM heads WHERE owner = ? AND name = ? RETURNING version", (owner, name)
            ).fetchone()
        return row["version"] if row else None

    def adopt_heads(self, former: str, owner: str) -> list[str]:
        """Move the records of a former owner's models to a new owner.

        Returns:
            Names of the models that stay, because the new owner has one of the same name.
        """
        with self._db.transaction(serial=True) as db:
            db.execute(
                "UPDATE heads SET owner = ? WHERE owner = ? "
                "AND name NOT IN (SELECT name FROM heads WHERE owner = ?)",
                (owner, former, owner),
            )
            rows = db.execute("SELECT name FROM heads WHERE owner = ?", (former,)).fetchall()
        return [name for (name,) in rows]

    # For runs ------------------------------------------------------------------------------

    def folder(self, job: Job) -> Path:
        """Folder of a job's files on this machine; with a storage elsewhere, of one run's."""
        return self._jobs / (job.id if self.storage.local else f"{job.id}-{job.lease}")

    def prepare(self, job: Job) -> None:
        """Bring the files that a run needs to this machine.

        Args:
            job: a running job.

        Raises:
            Overloaded: the storage cannot be reached.
            OSError: the disk is full.
        """
        if not self.storage.local:
            self.folder(job).mkdir(exist_ok=True)
            self.storage.fetch(_key(job.id, INPUT), self.folder(job) / INPUT)

    def take(self, resting: Collection[int] = ()) -> Job | None:
        """Start the next waiting job; None if no job waits.

        The next job is the oldest one of the caller with the fewest running jobs. Callers with
        equally many running jobs take turns, so that a caller with a hundred jobs delays another
        caller by one job, and by one turn if that job is long: see `others_wait`.

        Args:
            resting: numbers of jobs that are not started.
        """
        numbers = ",".join(map(str, resting)) or "0"  # numbers of jobs begin at 1
        with self._db.read() as db:
            if db.execute(_WAITS.replace("{resting}", numbers)).fetchone() is None:
                return None
        now = time.time()
        with self._db.transaction(serial=True) as db:
            db.execute(_GIVE_UP)
            take = _TAKE.replace("{resting}", numbers)
            row = db.execute(take, (now, now, _LEASE_SECONDS)).fetchone()
            if row:
                db.execute(
                    "INSERT INTO turns VALUES (?, (SELECT coalesce(max(turn), 0) + 1 FROM turns)) "
                    "ON CONFLICT (caller) DO UPDATE SET turn = excluded.turn",
                    (row["caller"],),
                )
                if row["started"] == now:  # not when it resumes
                    outbox.queue_progress(db, row["number"], _job(row).subscriber, now)
        return _job(row) if row else None

    def others_wait(self, job: Job) -> bool:
        """Whether a job waits whose caller has fewer running jobs than the caller of this one.

        Args:
            job: a running job.
        """
        with self._db.read() as db:
            return db.execute(_OTHERS_WAIT, (job.caller, job.caller)).fetchone() is not None

    def renew(self, jobs: Iterable[Job]) -> list[Job]:
        """Prolong the leases of runs.

        Returns:
            The jobs whose lease is lost: their runs must end.
        """
        lost = []
        for job in jobs:
            with self._db.transaction() as db:
                renewed = db.execute(
                    "UPDATE jobs SET expires = {now} + ? WHERE number = ? AND lease = ? "
                    "AND status = 'running'",
                    (_LEASE_SECONDS, job.number, job.lease),
                )
                if not renewed.rowcount:
                    lost.append(job)
        return lost

    def holds(self, job: Job) -> bool:
        """Whether a run still has its job's lease."""
        current = self._first_job("SELECT * FROM jobs WHERE number = ?", job.number)
        return current is not None and _run_of(current) == _run_of(job)

    def attempts(self, job: Job) -> int:
        """How often a job was started since its last finished window."""
        current = self._first_job("SELECT * FROM jobs WHERE number = ?", job.number)
        return 0 if current is None else current.attempts

    def put_back(self, job: Job, *, counts: bool = False, rest: float = 0.0) -> None:
        """Return a running job to the queue; of its run only the finished windows are kept.

        Args:
            job: the job.
            counts: whether the run stays among the job's attempts.
            rest: seconds in which no replica starts the job, by the database's clock; SQLite, which
                one service uses, leaves them to its caller.
        """
        remove(self.work(job))
        with self._db.transaction() as db:
            db.execute(
                "UPDATE jobs SET status = 'accepted', updated = ?, expires = {now} + ?, "
                "attempts = CASE WHEN ? THEN attempts ELSE 0 END "
                "WHERE number = ? AND lease = ? AND status = 'running'",
                (time.time(), rest, counts, job.number, job.lease),
            )

    def work(self, job: Job) -> Path:
        """Path of the folder of the job's run."""
        return self.folder(job) / work_name(job.lease)

    def windows(self, job: Job, lease: int | None = None) -> str:
        """Key of the log of the windows that were finished under a lease; None is the job's."""
        return _key(job.id, windows_name(job.lease if lease is None else lease))

    def published(self, job: Job) -> bool:
        """Whether a run before published the result, but ended before it could record this.

        Then the result is this run's.
        """
        names = self.storage.names(_key(job.id))
        for lease in range(job.lease):
            if result_name(lease) in names:
                here = _key(job.id, result_name(lease))
                try:
                    self.storage.move(here, _key(job.id, result_name(job.lease)), last=_RESULT)
                except FileNotFoundError:  # it is not complete, or was removed
                    continue
                return True
        return False

    def publish(self, job: Job, work: Path, result: Result) -> None:
        """Publish a finished run's files as the job's result, complete or not at all.

        Args:
            job: a running job.
            work: folder that holds the files of the result and nothing else.
            result: result of the run.
        """
        (work / _DOCUMENT).write_bytes(document_bytes(result.document))
        (work / _RESULT).write_text(json.dumps(result_head(result)), encoding="utf-8")
        self.storage.put(_key(job.id, result_name(job.lease)), work, last=_RESULT)

    def succeed(self, job: Job) -> None:
        """Mark a running job, whose result is published, as successful; `tidy` removes its uploads.

        Raises:
            LeaseLost: the job was dismissed or taken over.
            InsufficientStorage: the disk has no room for the row.
        """
        if not self.holds(job):
            raise _lost(job)
        result = result_name(job.lease)
        size = self.storage.size(_key(job.id, result), _key(job.id, REQUEST))
        # From here on a run that takes the job over finds the result, so it needs no windows: on a
        # full disk they make room for the row. The uploads stay until the row states that the job
        # has ended, because until then a backup keeps it as a job that waits.
        done = set()
        for lease in range(job.lease + 1):  # a later one would be another run's
            done |= {windows_name(lease), work_name(lease)}
        for name in done.intersection(self.storage.names(_key(job.id))):
            self.storage.remove(_key(job.id, name))
        self._end(job, "successful", progress=100, size=size)

    def may_upgrade(self, job: Job) -> bool:
        """Whether the owner allows a later version of the model to run the job."""
        return bool(self._stored_request(job).get(_UPGRADE))

    def change_model(self, job: Job, model: str, sha256: str) -> Job:
        """Change the model of a running job and discard its finished windows.

        Args:
            job: a running job.
            model: the new model, as `name@version`.
            sha256: the sha256 in the new model's card, hexadecimal.

        Returns:
            The job with the new model.

        Raises:
            LeaseLost: the job was dismissed or taken over.
        """
        with self._db.transaction() as db:
            _change(
                db,
                job,
                "UPDATE jobs SET model = ?, sha256 = ?, computed_by = NULL "
                "WHERE number = ? AND lease = ? AND status = 'running'",
                model,
                sha256,
            )
            db.execute("DELETE FROM windows WHERE job = ?", (job.number,))
        return replace(job, model=model, sha256=sha256, computed_by=None)

    def fail(self, job: Job, error: PIMCError, *, free_key: bool = False) -> None:
        """Mark a running job as failed.

        Args:
            job: a running job.
            error: the error that ended it.
            free_key: whether a request with the job's idempotency key may make a new job.

        Raises:
            LeaseLost: the job was dismissed or taken over.
        """
        if free_key:
            with self._db.transaction() as db:
                _change(
                    db,
                    job,
                    "UPDATE jobs SET idempotency_key = NULL, fingerprint = NULL "
                    "WHERE number = ? AND lease = ? AND status = 'running'",
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
        with self._db.transaction() as db:
            _change(
                db,
                job,
                "UPDATE jobs SET status = ?, problem = ?, "
                "progress = CASE WHEN progress < ? THEN ? ELSE progress END, bytes = ?, "
                "finished = ?, updated = ? "
                "WHERE number = ? AND lease = ? AND status = 'running'",
                *(status, problem, progress, progress, size, now, now),
            )
            outbox.queue_end(db, job.number, job.subscriber, status, now)
            db.execute("DELETE FROM windows WHERE job = ?", (job.number,))

    def tidy(self, job: Job) -> None:
        """Remove what is not needed of the files of a run and of a job that has ended."""
        if not self.storage.local:
            remove(self.folder(job))
        current = self._first_job("SELECT * FROM jobs WHERE number = ?", job.number)
        if current is None:
            self.remove(job)
        elif current.status in {"failed", "dismissed", "successful"}:
            if current.status == "successful":
                kept = (result_name(current.lease), REQUEST, _READY)
                self.storage.keep_only(_key(job.id), *kept)
            else:
                self.remove(job)
            with self._db.transaction() as db:
                db.execute("UPDATE jobs SET expires = NULL WHERE number = ?", (job.number,))

    def make_room(self, job: Job) -> None:
        """Remove files of a run that can be made again."""
        remove(self.work(job))
        if self.storage.local:
            self.storage.remove(self.windows(job))

    def remove(self, job: Job) -> None:
        """Remove a job's files."""
        self._remove(job.id)

    def _remove(self, name: str) -> None:
        with self._ready_lock(name):
            self.storage.remove(_key(name))

    def begin(self, job: Job, computed_by: str) -> None:
        """Begin a run; discard windows that another device or precision computed.

        Args:
            job: a running job.
            computed_by: provider and variant of this run; one result never mixes two.

        Raises:
            LeaseLost: the job was dismissed or taken over.
        """
        if job.computed_by == computed_by:
            return
        with self._db.transaction() as db:
            _change(
                db,
                job,
                "UPDATE jobs SET computed_by = ? "
                "WHERE number = ? AND lease = ? AND status = 'running'",
                computed_by,
            )
            db.execute("DELETE FROM windows WHERE job = ?", (job.number,))

    def window(self, job: Job, step: Step) -> tuple[int, int, int] | None:
        """Lease, offset and length of a finished window's bytes; None if it is not finished."""
        with self._db.read() as db:
            row = db.execute(
                'SELECT lease, "offset", length FROM windows '
                "WHERE job = ? AND stage = ? AND number = ? AND place = ?",
                (job.number, step.stage, step.number, _window_key(step)),
            ).fetchone()
        return tuple(row) if row else None

    def count_window(
        self, job: Job, step: Step, *, offset: int, length: int, progress: int
    ) -> None:
        """Mark a window as finished, after its bytes were synced to disk.

        Args:
            job: a running job.
            step: the window's step.
            offset: position of the window's bytes in the journal of the job's lease.
            length: number of bytes.
            progress: progress of the job, per cent.

        Raises:
            LeaseLost: the job was dismissed or taken over.
        """
        now = time.time()
        with self._db.transaction() as db:
            row = db.execute("SELECT progress FROM jobs WHERE number = ?", (job.number,)).fetchone()
            _change(
                db,
                job,
                "UPDATE jobs SET progress = CASE WHEN progress < ? THEN ? ELSE progress END, "
                "attempts = 0, updated = ? WHERE number = ? AND lease = ? AND status = 'running'",
                *(progress, progress, now),
            )
            db.execute(
                'INSERT INTO windows (job, stage, number, place, "offset", length, lease) '
                "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (job, stage, number) DO UPDATE SET "
                'place = excluded.place, "offset" = excluded."offset", length = excluded.length, '
                "lease = excluded.lease",
                (job.number, step.stage, step.number, _window_key(step), offset, length, job.lease),
            )
            if progress // outbox.PROGRESS_STEP > row["progress"] // outbox.PROGRESS_STEP:
                outbox.queue_progress(db, job.number, job.subscriber, now)

    # Callbacks -----------------------------------------------------------------------------

    def callbacks_due(self, now: float, most: int) -> list[Callback]:
        """Callbacks to send now, first attempts before repeated ones.

        Args:
            now: seconds since 1970.
            most: largest number of callbacks.
        """
        with self._db.transaction(serial=True) as db:
            rows = outbox.due(db, now, most)
            if self.shared:
                for row in rows:
                    outbox.claim(db, row["number"], now + _CLAIM_SECONDS)
            numbers = {row["job"] for row in rows}
            marks = ", ".join("?" * len(numbers))
            jobs = {
                row["number"]: _job(row)
                for row in db.execute(
                    f"SELECT * FROM jobs WHERE number IN ({marks or 'NULL'})",  # noqa: S608 - marks
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
        with self._db.read() as db:
            return outbox.next_due(db)

    def waiting_callbacks(self) -> int:
        """Callbacks that were not delivered yet."""
        with self._db.read() as db:
            return outbox.count(db)

    def callback_failed(self, callback: Callback, *, until: float | None) -> None:
        """Record an attempt that failed.

        Args:
            callback: the callback.
            until: when it is sent again, seconds since 1970; None gives it up.
        """
        with self._db.transaction() as db:
            if until is None:
                outbox.settle(db, callback.number)
            else:
                outbox.postpone(db, callback.number, until)

    def callback_delivered(self, callback: Callback) -> None:
        """Record that the receiver has accepted a callback."""
        with self._db.transaction() as db:
            outbox.settle(db, callback.number)

    # Time ----------------------------------------------------------------------------------

    def sweep(self, seconds: float) -> None:
        """Remove expired jobs.

        The store adds up each job's age instead of reading the wall clock, so that a change of the
        clock removes no job.

        Args:
            seconds: seconds since the last sweep, by a monotonic clock.
        """
        self._expire(seconds, by_clock=self.shared)
        if self.shared and time.monotonic() >= self._next_look:
            self._remove_orphans()
            self._next_look = time.monotonic() + _LOOK_SECONDS
        with self._db.read() as db:
            # A replica ended before it could do this, or was stopped.
            left = db.execute(
                "SELECT * FROM jobs WHERE status NOT IN ('accepted', 'running') AND {expired}"
            ).fetchall()
        for row in left:
            self.tidy(_job(row))

    def _expire(self, seconds: float, *, by_clock: bool) -> None:
        """Let the ended jobs become older, and remove those that are too old.

        Args:
            seconds: by how much.
            by_clock: whether by no more than has passed by the database's clock: replicas, each of
                which calls this, together count the time once.
        """
        with self._db.transaction(serial=True) as db:
            (passed,) = db.execute("SELECT {now} - seen FROM clock").fetchone()
            db.execute(
                "UPDATE jobs SET age = age + ? WHERE status NOT IN ('accepted', 'running')",
                (min(seconds, max(0.0, passed)) if by_clock else seconds,),
            )
            old = db.execute("DELETE FROM jobs WHERE age >= ? RETURNING id", (self._ttl,))
            names = [name for (name,) in old.fetchall()]
            db.execute("DELETE FROM turns WHERE caller NOT IN (SELECT caller FROM jobs)")
            db.execute("DELETE FROM usage WHERE day < ?", (_day(db)[0],))
            db.execute("UPDATE clock SET seen = {now}")
        for name in names:
            self._remove(name)

    def _recover(self) -> None:
        """Recover the state that the last service left, however it ended.

        Replicas may be running: leases show them which jobs have no worker.
        """
        # Files first: if the disk is full, this may free it.
        if self.shared:
            self._remove_orphans()
        else:
            self._tidy_all()
        if not self.shared:
            with self._db.transaction() as db:
                db.execute("UPDATE jobs SET status = 'accepted' WHERE status = 'running'")
        # The length of a stop is known only from the wall clock, which may have jumped: a stop ages
        # a result by at most half of its lifetime.
        self._expire(self._ttl / 2, by_clock=True)

    def _remove_orphans(self) -> None:
        """Remove files without a job, and models without a record.

        They are left by a replica that ended before it accepted the job, and by removals while the
        storage could not be reached.
        """
        owned = {JOBS_FOLDER: "SELECT id FROM jobs"}
        if not self.storage.local:  # models in a folder have no rows
            owned[HEADS] = "SELECT version FROM heads"
        for kind, query in owned.items():
            # Names first: a job that is accepted meanwhile is in neither.
            names = self.storage.names(kind)
            with self._db.read() as db:
                kept = {name for (name,) in db.execute(query).fetchall()}
            for name in set(names) - kept:
                key = f"{kind}/{name}"
                if time.time() - self.storage.modified(key) > _ORPHAN_SECONDS:
                    self.storage.remove(key)

    def _tidy_all(self) -> None:
        """Remove the files of services that have ended: no other service uses the folder."""
        with self._db.read() as db:
            rows = db.execute("SELECT id, status, lease FROM jobs").fetchall()
        kept = {row["id"]: row for row in rows}
        for name in self.storage.names(JOBS_FOLDER):
            row = kept.get(name)
            if row is None or row["status"] in {"failed", "dismissed"}:
                self.storage.remove(_key(name))
            elif row["status"] == "successful":
                self.storage.keep_only(_key(name), result_name(row["lease"]), REQUEST, _READY)
                ready = self.storage.names(_key(name, _READY))
                for half in (one for one in ready if one.startswith(_UNFINISHED)):
                    self.storage.remove(_key(name, _READY, half))

    def _first_job(self, query: str, *values: object) -> Job | None:
        with self._db.read() as db:
            row = db.execute(query, values).fetchone()
        return _job(row) if row else None


def _change(db: Session, job: Job, statement: str, *values: object) -> None:
    """Change a running job's row.

    Args:
        db: in a transaction.
        job: as its run took it.
        statement: ends with the condition on number, lease and status.
        values: before those of the condition.

    Raises:
        LeaseLost: the job was dismissed or taken over.
    """
    if not db.execute(statement, (*values, job.number, job.lease)).rowcount:
        raise _lost(job)


def _lost(job: Job) -> LeaseLost:
    return LeaseLost(f"job {job.id} was dismissed, or taken over by another replica")


def _unknown(name: str) -> UnknownJob:
    return UnknownJob(
        f"there is no job '{shown(name)}' of this caller: check the id and the API key "
        "(finished jobs expire; GET /jobs lists those that are kept)"
    )


def _run_of(job: Job) -> tuple[str, int]:
    return job.status, job.lease


def _key(name: str, *parts: str) -> str:
    """Key of a job's files, or of some of them."""
    return "/".join((JOBS_FOLDER, name, *parts))


def job_of(folder: Path) -> str:
    """Id of the job whose run has this folder on this machine, with a storage elsewhere."""
    return folder.name.rpartition("-")[0]


def _check_kind(folder: Path, *, shared: bool, own: bool) -> None:
    """Check that a state directory is not one of the other kind of service.

    Args:
        folder: the state directory.
        shared: whether replicas share the database.
        own: whether their files are in another storage.

    Raises:
        SettingsError: it is.
    """
    if shared and (folder / DATABASE).exists():
        raise SettingsError(
            f"PIMC_STATE_DIR: {folder} has the jobs of a service without PIMC_DATABASE_URL "
            f"({DATABASE}): name a new folder, and move the jobs there with `python -m service "
            "backup` and `restore`"
        )
    if not shared and (folder / MARK).exists():
        raise SettingsError(
            f"PIMC_STATE_DIR: {folder} has the jobs of replicas with PIMC_DATABASE_URL: set "
            "PIMC_DATABASE_URL, or name another folder"
        )
    if own and (folder / MARK).exists():
        raise SettingsError(
            f"PIMC_STATE_DIR: {folder} has the files of replicas without PIMC_STORAGE_URL: name a "
            "new folder for each replica, and move the jobs to the storage with `python -m service "
            "backup` and `restore`"
        )


def mark_owner(storage: Storage, ident: str) -> None:
    """Let a storage belong to a database.

    Args:
        storage: the storage.
        ident: id of the database.
    """
    storage.write(MARK, f"{ident}\n".encode())


@contextmanager
def _translate_start_errors(folder: Path, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise SettingsError(f"PIMC_STATE_DIR: {folder} cannot be used: {reason}") from error
    except StorageUnreachable as error:
        message = f"PIMC_STORAGE_URL: the bucket cannot be used: {error.reason}"
        raise SettingsError(message) from error
    except (UnusableDatabase, PIMCError) as error:
        sqlite = name == DATABASE
        what = f"PIMC_STATE_DIR: {folder}" if sqlite else "PIMC_DATABASE_URL: the database"
        raise SettingsError(f"{what} cannot be used: {error} ({name})") from error


def removed(job: Job) -> ResultNotReady:
    """The error for a result whose files have been removed."""
    return ResultNotReady(
        f"the result of job {job.id} has been removed: the job was dismissed or has expired; send "
        "the request again"
    )


def _split_result(storage: Storage, key: str) -> Any:  # noqa: ANN401 - JSON
    """Split a result of an earlier release, which kept description and document in one file.

    Returns:
        The description.
    """
    head = json.loads(storage.read(f"{key}/{_RESULT}"))
    if "document" in head:  # another reader may have split it meanwhile
        storage.write(f"{key}/{_DOCUMENT}", document_bytes(head.pop("document")))
        storage.write(f"{key}/{_RESULT}", json.dumps(head).encode())
    return head


def _usage(db: Session, caller: str) -> Usage:
    jobs, size = db.execute(
        "SELECT count(*) FILTER (WHERE status IN ('accepted', 'running')), "
        "CAST(coalesce(sum(bytes), 0) AS BIGINT) "
        "FROM jobs WHERE caller = ?",
        (caller,),
    ).fetchone()
    today, left = _day(db)
    row = db.execute(
        "SELECT pixels FROM usage WHERE caller = ? AND day = ?", (caller, today)
    ).fetchone()
    pixels = row["pixels"] if row else 0
    return Usage(jobs=jobs, pixels=pixels, bytes=size, day=today, day_left=left)


def _charge(db: Session, caller: str, pixels: int, share: Share) -> None:
    if share.pixels is None:
        return
    if pixels > share.pixels:
        raise RasterTooLarge(
            f"the request has {pixels} pixels, and this caller may use {share.pixels} a day "
            "(PIMC_MAX_PIXELS_PER_DAY, or `pixels` of its key), so it would be rejected on every "
            "day: send a smaller area or fewer series, or have the administrator raise the quota; "
            "nothing was started"
        )
    used = _usage(db, caller)
    if used.pixels + pixels > share.pixels:
        raise TooManyRequests(
            f"this caller has used {used.pixels} of its {share.pixels} pixels of this day (UTC; "
            f"PIMC_MAX_PIXELS_PER_DAY, or `pixels` of its key), and the request has {pixels} "
            "pixels: send a smaller area, or wait until the next day; nothing was started",
            policy=PIXELS,
            retry_after=used.day_left,
        )
    db.execute(
        "INSERT INTO usage VALUES (?, ?, ?) "
        "ON CONFLICT (caller, day) DO UPDATE SET pixels = usage.pixels + excluded.pixels",
        (caller, used.day, pixels),
    )


def _day(db: Session) -> tuple[int, int]:
    """The day since 1970 (UTC), and the seconds until the next one, by the database's clock.

    Replicas, whose own clocks may differ, so begin a day together.
    """
    (now,) = db.execute("SELECT {now}").fetchone()
    return int(now // _DAY), math.ceil(_DAY - now % _DAY)


def _job(row: Any) -> Job:  # noqa: ANN401 - of either library
    found: dict[str, Any] = {name: row[name] for name in Job.__dataclass_fields__}
    if found["problem"]:
        found["problem"] = json.loads(found["problem"])
    if found["subscriber"]:
        found["subscriber"] = Subscriber(**json.loads(found["subscriber"]))
    return Job(**found)


def _window_key(step: Step) -> str:
    window = step.window
    return f"{window.col_off},{window.row_off},{window.width},{window.height}"

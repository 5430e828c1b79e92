"""Job store: durable background jobs; killing the process loses none.

    accepted ─▶ running ─▶ successful | failed          dismissed, from any status
        ▲          │
        └──────────┘ service stopped or killed: the job resumes after its last finished window

The store changes the rows of jobs. Other subjects are parts, in the same database and storage:

    job_requests   the stored requests
    results        results, and the files derived from them
    files          names and folders of a job's files
    usage          what callers have used of their quotas
    outbox         callbacks to send
    heads          rows of the callers' own models in a bucket

The change of a job's row and what follows from it in other tables are one transaction: the store
opens it and hands its session to the parts.

Durability follows from one order: the store syncs the bytes to disk before it writes the row. If
the row is missing, the work is repeated; bytes without a row are removed.

Each run has a lease, numbered by job. It writes only files with its number, and changes the job's
row only while the row has that number. So a run that was given up, because its replica was dead or
seemed so, cannot affect the run that follows it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from service.errors import Cancelled, InvalidRequest, Overloaded, PIMCError, UnknownJob, shown
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
from service.jobs.head_rows import HeadRows
from service.jobs.job import STATUSES, Job, JobFilter, JobStatus, job_of_row
from service.jobs.job_files import (
    INPUT,
    JOBS_FOLDER,
    READY,
    REQUEST,
    JobFiles,
    key_of,
    result_name,
    windows_name,
    work_name,
    write_request,
)
from service.jobs.job_requests import Idempotency, JobRequests, document_of
from service.jobs.leftovers import remove_leftovers, remove_orphans
from service.jobs.outbox import Outbox
from service.jobs.result_files import ResultFiles
from service.jobs.schema import upgrade
from service.jobs.serialise import json_parts
from service.jobs.state_folder import DATABASE, check_kind, check_owner, translate_start_errors
from service.jobs.storage import FolderStorage, Storage
from service.jobs.usage import UNBOUNDED, CallerUsage, Share
from service.run.execute import Result
from service.run.plan import Plan
from service.run.request import RasterRequest
from service.run.windows import Step

_BY_KEY = "SELECT * FROM jobs WHERE owner = ? AND idempotency_key = ?"
_LEASE_SECONDS = 30.0
"""Seconds without a renewal after which another replica takes a job."""
_LOOK_SECONDS = 3600.0
"""Seconds between looks for files without a job."""
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


class LeaseLost(Cancelled):
    """The job was dismissed, or another run has taken it over: this run may change nothing."""


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
        copies = folder / "copies"
        self.storage = FolderStorage(folder) if storage is None else storage
        self._next_look = time.monotonic() + _LOOK_SECONDS
        dialect = Sqlite(folder / DATABASE) if database_url is None else Postgres(database_url)
        self.shared = dialect.shared
        """Whether replicas share the jobs."""
        shares_folder = self.shared and self.storage.local
        self.requests = None if shares_folder else folder / "requests"
        """Parent of the folders of single requests; None if replicas share the directory."""
        with translate_start_errors(folder, dialect.name):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._held = lock(folder, shared=shares_folder)
            opened = ExitStack()
            try:
                if self.requests:
                    shutil.rmtree(self.requests, ignore_errors=True)
                    self.requests.mkdir()
                check_kind(folder, shared=self.shared, own=not self.storage.local)
                if not self.storage.local:
                    for place in (self._jobs, copies):
                        shutil.rmtree(place, ignore_errors=True)
                        place.mkdir()
                self._jobs.mkdir(exist_ok=True)
                self._db = opened.enter_context(closing(Database(dialect)))
                self.files = JobFiles(storage=self.storage, jobs=self._jobs)
                self.job_requests = JobRequests(self.files)
                self.results = ResultFiles(self._db, self.files, copies)
                self.usage = CallerUsage(self._db, ttl=ttl)
                self.outbox = Outbox(self._db, shared=self.shared)
                self.heads = HeadRows(self._db)
                upgrade(self._db, self._jobs)
                if self.shared:
                    check_owner(self._db, self.storage, folder)
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
        document = document_of(plan, folder, upgrade=upgrade, delivery=delivery)
        job_folder, called = self._jobs / name, plan.request.subscriber
        key = key_of(name)
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
                self.usage.count(db, charged, pixels, share)
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
            self.files.folder(job).mkdir(exist_ok=True)
            shutil.move(work, self.files.work(job))  # copies the files if they are on another disk
            self.results.publish(job, self.files.work(job), result)
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
        self.usage.check(db, caller, share, size)
        (waiting,) = db.execute("SELECT count(*) FROM jobs WHERE status = 'accepted'").fetchone()
        if waiting >= self._max_waiting:
            raise Overloaded(
                f"job queue full: {waiting} of {self._max_waiting} jobs are waiting "
                "(PIMC_MAX_JOBS); nothing was started, retry later",
                retry_after=60,
            )

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
        return [job_of_row(row) for row in rows]

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
            job = job_of_row(row)
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
                self.usage.adopt(db, former, owner)

    # For runs ------------------------------------------------------------------------------

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
                    outbox.queue_progress(db, row["number"], job_of_row(row).subscriber, now)
        return job_of_row(row) if row else None

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
        remove(self.files.work(job))
        with self._db.transaction() as db:
            db.execute(
                "UPDATE jobs SET status = 'accepted', updated = ?, expires = {now} + ?, "
                "attempts = CASE WHEN ? THEN attempts ELSE 0 END "
                "WHERE number = ? AND lease = ? AND status = 'running'",
                (time.time(), rest, counts, job.number, job.lease),
            )

    def succeed(self, job: Job) -> None:
        """Mark a running job, whose result is published, as successful; `tidy` removes its uploads.

        Raises:
            LeaseLost: the job was dismissed or taken over.
            InsufficientStorage: the disk has no room for the row.
        """
        if not self.holds(job):
            raise _lost(job)
        result = result_name(job.lease)
        size = self.storage.size(key_of(job.id, result), key_of(job.id, REQUEST))
        # From here on a run that takes the job over finds the result, so it needs no windows: on a
        # full disk they make room for the row. The uploads stay until the row states that the job
        # has ended, because until then a backup keeps it as a job that waits.
        done = set()
        for lease in range(job.lease + 1):  # a later one would be another run's
            done |= {windows_name(lease), work_name(lease)}
        for name in done.intersection(self.storage.names(key_of(job.id))):
            self.storage.remove(key_of(job.id, name))
        self._end(job, "successful", progress=100, size=size)

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
            remove(self.files.folder(job))
        current = self._first_job("SELECT * FROM jobs WHERE number = ?", job.number)
        if current is None:
            self.remove(job)
        elif current.status in {"failed", "dismissed", "successful"}:
            if current.status == "successful":
                kept = (result_name(current.lease), REQUEST, READY)
                self.storage.keep_only(key_of(job.id), *kept)
            else:
                self.remove(job)
            with self._db.transaction() as db:
                db.execute("UPDATE jobs SET expires = NULL WHERE number = ?", (job.number,))

    def remove(self, job: Job) -> None:
        """Remove a job's files."""
        self._remove(job.id)

    def _remove(self, name: str) -> None:
        with self.results.lock(name):
            self.storage.remove(key_of(name))

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
            remove_orphans(self._db, self.storage)
            self._next_look = time.monotonic() + _LOOK_SECONDS
        with self._db.read() as db:
            # A replica ended before it could do this, or was stopped.
            left = db.execute(
                "SELECT * FROM jobs WHERE status NOT IN ('accepted', 'running') AND {expired}"
            ).fetchall()
        for row in left:
            self.tidy(job_of_row(row))

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
            self.usage.forget(db)
            db.execute("UPDATE clock SET seen = {now}")
        for name in names:
            self._remove(name)

    def _recover(self) -> None:
        """Recover the state that the last service left, however it ended.

        Replicas may be running: leases show them which jobs have no worker.
        """
        # Files first: if the disk is full, this may free it.
        if self.shared:
            remove_orphans(self._db, self.storage)
        else:
            remove_leftovers(self._db, self.storage)
        if not self.shared:
            with self._db.transaction() as db:
                db.execute("UPDATE jobs SET status = 'accepted' WHERE status = 'running'")
        # The length of a stop is known only from the wall clock, which may have jumped: a stop ages
        # a result by at most half of its lifetime.
        self._expire(self._ttl / 2, by_clock=True)

    def _first_job(self, query: str, *values: object) -> Job | None:
        with self._db.read() as db:
            row = db.execute(query, values).fetchone()
        return job_of_row(row) if row else None


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


def _window_key(step: Step) -> str:
    window = step.window
    return f"{window.col_off},{window.row_off},{window.width},{window.height}"

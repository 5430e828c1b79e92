"""Job runner: worker threads that run jobs in the order of acceptance.

    take → plan → execute, window by window → publish → succeed
             │              │
           fail       stopped: put back; dismissed: removed

All of this happens in threads of its own; the event loop never waits for it.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from service.errors import (
    Cancelled,
    InternalError,
    Overloaded,
    PIMCError,
    UnknownModel,
    no_descriptors,
    no_room,
)
from service.infer.engine import Engine
from service.jobs.store import Job, JobStore
from service.jobs.window_journal import WindowFile
from service.read.geotiff import BlockCache
from service.read.references import check_again
from service.run.execute import execute
from service.run.executors import Executor
from service.run.memory import MemoryBudget
from service.run.plan import Plan, plan_request
from service.run.request import RasterRequest, TaskRequest
from service.telemetry import Metrics, job_named
from service.threads import SupervisedThread

_LOG = logging.getLogger(__name__)
_SWEEP_SECONDS = 60.0
_MAX_ATTEMPTS = 20
"""A job fails if the service ended so often during it without one more finished window."""
_PAUSE_SECONDS = 1.0
_JOIN_SECONDS = 20.0
"""Seconds that workers have to put their jobs back when the service stops."""


class JobRunner:
    """Worker threads that run jobs.

    Args:
        store: of the jobs.
        engine: the models.
        metrics: counts jobs and runs.
        max_raster_bytes: largest decoded size of a stack, bytes.
        roots: folders whose files a job may read in place.
        workers: number of jobs that run at once.
        ttl: seconds for which a finished job is kept.
        closing: set when the service stops.
        cache: GDAL's block cache.
        budget: memory for runs.
        executor: runs the windows.
    """

    def __init__(
        self,
        store: JobStore,
        engine: Engine,
        metrics: Metrics,
        *,
        max_raster_bytes: int,
        max_fields: int,
        roots: Sequence[Path],
        workers: int,
        ttl: float,
        closing: threading.Event,
        cache: BlockCache,
        budget: MemoryBudget,
        executor: Executor,
    ) -> None:
        self._store = store
        self._engine = engine
        self._metrics = metrics
        self._max_raster_bytes = max_raster_bytes
        self._max_fields = max_fields
        self._roots = roots
        self._sweep_seconds = min(_SWEEP_SECONDS, max(0.1, ttl / 10))
        self._closing = closing
        self._cache = cache
        self._budget = budget
        self._executor = executor
        self._turn = threading.Condition()
        self._running: dict[str, threading.Event] = {}
        self._sweep_fault: str | None = None
        self._threads = [SupervisedThread(f"job-{n}", self._work, closing) for n in range(workers)]
        self._threads.append(SupervisedThread("jobs", self._keep_time, closing))

    def start(self) -> None:
        """Start the workers."""
        self._count()
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Wait until every worker has put its job back; `closing` must be set.

        A worker that does not end in time is left: the next start resumes its job.
        """
        self._stop_runs()
        until = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            if not thread.join(max(0.0, until - time.monotonic())):
                _LOG.error("a thread does not end", extra={"loop": thread.name})

    @property
    def workers(self) -> int:
        """Workers that are alive."""
        return sum(thread.alive for thread in self._threads[:-1])

    @property
    def failed(self) -> bool:
        """Whether a thread was given up: the service must end, and be started again."""
        return any(thread.failed for thread in self._threads)

    def faults(self) -> list[str]:
        """Why jobs do not run as they should; empty if they do."""
        dead = [thread.name for thread in self._threads if not thread.alive]
        found = [f"thread '{name}' has ended" for name in dead]
        return found if self._sweep_fault is None else [*found, self._sweep_fault]

    def accepted(self) -> None:
        """Notify the workers of a new job."""
        with self._turn:
            self._turn.notify_all()
        self._count()

    def dismiss(self, owner: str, name: str) -> Job:
        """Dismiss a job; if it runs, its run ends within a window.

        Raises:
            UnknownJob: the job does not exist or belongs to another caller.
        """
        job = self._store.dismiss(owner, name)
        with self._turn:
            running = self._running.get(job.id)
        if running is not None:
            running.set()
        self._count()
        return job

    # Threads -------------------------------------------------------------------------------

    def _keep_time(self) -> None:
        last = time.monotonic()
        while not self._closing.wait(self._sweep_seconds):
            now = time.monotonic()
            try:
                self._store.sweep(now - last)
                self._count()
            except PIMCError as error:
                _LOG.exception("old jobs cannot be removed")
                self._sweep_fault = f"old jobs cannot be removed: {error}"
                self._metrics.swept("failed")
                continue
            self._sweep_fault = None
            self._metrics.swept("done")
            last = now
            with self._turn:  # a worker that could not take a job tries again
                self._turn.notify_all()
        self._stop_runs()

    def _stop_runs(self) -> None:
        """Cancel the running jobs, and let the workers see that the service stops."""
        with self._turn:
            for running in self._running.values():
                running.set()
            self._turn.notify_all()

    def _work(self) -> None:
        while True:
            with self._turn:
                # Taken and registered under one lock, so that a dismissal in between is not lost.
                job = self._take()
                while job is None and not self._closing.is_set():
                    self._turn.wait()
                    job = self._take()
                if job is None:
                    return
                cancelled = self._running[job.id] = threading.Event()
            try:
                with job_named(job.id):
                    self._run(job, cancelled)
            finally:
                with self._turn:
                    del self._running[job.id]

    def _take(self) -> Job | None:
        if self._closing.is_set():
            return None
        try:
            return self._store.take()
        except PIMCError:
            # Tried again with the next job, or after the next sweep.
            _LOG.exception("no job can be taken")
            return None

    def _run(self, job: Job, cancelled: threading.Event) -> None:
        _LOG.info("job begins", extra={"task": job.task, "model": job.model})
        self._count()
        begun = time.monotonic()
        try:
            self._carry_out(job, cancelled)
        except Cancelled:
            # A dismissed job stays dismissed: `put_back` changes running jobs only.
            self._settle(lambda: self._store.put_back(job))
            _LOG.info("job stops", extra={"stopping": self._closing.is_set()})
        except Exception as error:  # noqa: BLE001 - after any error the next job runs
            busy = _busy(error)
            if busy is None:
                self._fail(job, error)
            else:
                self._wait(job, busy)
        else:
            seconds = time.monotonic() - begun
            self._metrics.job_ran(task=job.task, seconds=seconds)
            _LOG.info("job ends", extra={"seconds": round(seconds, 3)})
        self._settle(lambda: self._store.clear(job))
        self._count()

    def _wait(self, job: Job, busy: Overloaded) -> None:
        """Put a job back, which is the next to run, and wait for what it lacked."""
        _LOG.warning("job waits", extra={"reason": busy.detail})
        self._settle(lambda: self._store.put_back(job))
        self._closing.wait(_PAUSE_SECONDS)

    def _fail(self, job: Job, error: Exception) -> None:
        problem = error if isinstance(error, PIMCError) else no_room(error)
        if problem is None or isinstance(problem, InternalError):
            problem = InternalError(
                f"internal error; the server's log has the cause under job {job.id}"
            )
        # A model that is gone says nothing of the request, which may be sent again as it is.
        free = isinstance(problem, UnknownModel)
        _LOG.error("job fails", exc_info=error, extra={"code": problem.code})
        # Free disk space first: without it the failure could not be recorded.
        self._store.make_room(job)
        self._settle(lambda: self._store.fail(job, problem, free_key=free))

    def _settle(self, write: Callable[[], None]) -> None:
        """Record a job's outcome; retries while the disk is full or the store is in use."""
        while True:
            try:
                write()
            except PIMCError:
                _LOG.exception("a job's outcome cannot be recorded")
                if self._closing.wait(_PAUSE_SECONDS):
                    return  # the next start runs it again
            else:
                return

    # One job -------------------------------------------------------------------------------

    def _carry_out(self, job: Job, cancelled: threading.Event) -> None:
        # If it exists, the last service ended before it could record it.
        if not (self._store.folder(job) / "result").exists():
            if job.attempts > _MAX_ATTEMPTS:
                raise InternalError(f"the server ended {_MAX_ATTEMPTS} times while it ran this job")
            self._compute(job, cancelled)
        self._store.succeed(job)

    def _compute(self, job: Job, cancelled: threading.Event) -> None:
        request = self._store.request(job)
        if isinstance(request, RasterRequest):
            check_again(request.files, self._store.folder(job), self._roots)
        plan = self._plan(job, request, cancelled)
        card = plan.model.card
        if (card.id, card.sha256) != (job.model, job.sha256):
            _LOG.info("job upgraded", extra={"from": job.model, "to": card.id})
            job = self._store.change_model(job, card.id, card.sha256)
        self._store.begin(job, f"{plan.model.provider} {plan.model.variant}")
        work = self._store.folder(job) / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        done = 0.0

        def progress(share: float) -> None:
            nonlocal done
            done = share

        with (
            WindowFile(self._store, job, lambda: int(100 * done)) as journal,
            self._metrics.run(),
        ):
            result = execute(
                plan,
                work,
                executor=self._executor,
                cache=self._cache,
                cancelled=cancelled,
                progress=progress,
                journal=journal,
                budget=self._budget,
            )
        self._metrics.ran(task=job.task, pixels=result.pixels, stages=asdict(result.timing))
        self._store.publish(job, work, result)

    def _plan(self, job: Job, request: TaskRequest, cancelled: threading.Event) -> Plan:
        """The plan with the model that the job was accepted for, or with a later one.

        Raises:
            UnknownModel: the model is not served any more, and the owner did not allow another.
        """
        plan_with = partial(
            plan_request,
            engine=self._engine,
            max_raster_bytes=self._max_raster_bytes,
            rasters=True,
            owner=job.owner,
            max_fields=self._max_fields,
            cache=self._cache,
            budget=self._budget,
            cancelled=cancelled,
        )
        name = job.model.partition("@")[0]
        now = self._engine.named(name, job.owner)
        if now is not None and (now.card.id, now.card.sha256) == (job.model, job.sha256):
            return plan_with(request)
        if now is not None and self._store.may_upgrade(job):
            return plan_with(replace(request, model=name))
        served = (
            "which is not served any more"
            if now is None
            else f"but the server now has '{now.card.id}' with sha256 {now.card.sha256[:12]}…"
        )
        raise UnknownModel(
            f"the job was accepted for '{job.model}' with sha256 {job.sha256[:12]}…, {served}: "
            "send the request again (its Idempotency-Key is free), with 'Prefer: model-upgrade' if "
            "any later version may run it"
        )

    def _count(self) -> None:
        try:
            self._metrics.jobs(self._store.counts(), self._store.oldest())
        except PIMCError:
            _LOG.exception("jobs cannot be counted")


def _busy(error: Exception) -> Overloaded | None:
    """What a job waits for; None if its error is another."""
    if isinstance(error, Overloaded):
        return error
    return no_descriptors(error) if isinstance(error, OSError) else None

"""Job runner: worker threads that run jobs in the order of acceptance.

    take → plan → execute, window by window → publish → succeed
             │              │
           fail       service stops, or the turn ends: put back; job dismissed: files removed;
                      lease lost: left to the run that has it; host does not respond: put back,
                      and started again after a pause

Jobs run in the runner's own threads; the event loop never waits for them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

from service.errors import (
    Cancelled,
    InsufficientStorage,
    InternalError,
    Overloaded,
    PIMCError,
    UnknownModel,
    UnreachableReference,
    no_descriptors,
    no_room,
)
from service.infer.engine import Engine
from service.jobs.callbacks import CallbackSender
from service.jobs.job import Job
from service.jobs.storage import StorageUnreachable
from service.jobs.store import JobStore, LeaseLost
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
from service.tracing import Attribute, Traces

_LOG = logging.getLogger(__name__)
_CHECK_SECONDS = 1.0
_STORE_SECONDS = 2.0
"""Seconds after which a store that does not respond makes the service unready."""
_SWEEP_SECONDS = 60.0
_MAX_ATTEMPTS = 20
"""Starts of a job without one more finished window after which the job fails."""
_PAUSE_SECONDS = 1.0
"""Seconds before a worker retries a write that failed or a job whose resources were in use."""
_MAX_PAUSE_SECONDS = 30.0
"""Longest pause while the storage cannot be reached."""
_HOST_ATTEMPTS = 8
"""Starts of a job without one more finished window, each ended by a host that does not respond or
is busy, after which the job fails."""
_REST_SECONDS = 2.0
"""Seconds before the second of these starts; before each further one twice as many, so that a host
may be away for four minutes."""
_BEAT_SECONDS = 1.0
"""Seconds between renewals of the leases, and between looks for jobs of other replicas."""
_JOIN_SECONDS = 20.0
"""Seconds within which workers must put their jobs back when the service stops."""


class JobRunner:
    """Worker threads that run jobs, each for a turn if jobs of other callers wait.

    Args:
        store: store that holds the jobs.
        engine: engine that holds the models.
        metrics: metrics that count jobs and runs.
        max_raster_bytes: largest decoded size of a stack, bytes.
        max_fields: largest number of polygons of one request.
        roots: folders whose files a job may read without copying them.
        workers: number of jobs that run at once, at least 1.
        turn_seconds: seconds after which a job makes way for one of another caller.
        ttl: seconds for which a finished job is kept.
        closing: event that is set when the service stops.
        cache: GDAL's block cache.
        budget: memory that runs may take.
        executor: executor that runs the windows.
        callbacks: sender of the jobs' callbacks; None sends none.
        refresh: called with a job's owner before the owner's model is looked for.
        traces: traces of the jobs; None makes none.
        loops: further loops that run until `closing` is set, by the names of their threads.
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
        turn_seconds: float,
        ttl: float,
        closing: threading.Event,
        cache: BlockCache,
        budget: MemoryBudget,
        executor: Executor,
        callbacks: CallbackSender | None = None,
        refresh: Callable[[str], None],
        traces: Traces | None = None,
        loops: Mapping[str, Callable[[], None]] = MappingProxyType({}),
    ) -> None:
        self._traces = traces or Traces(enabled=False, version="")
        self._refresh = refresh
        self._callbacks = callbacks
        self._store = store
        self._engine = engine
        self._metrics = metrics
        self._max_raster_bytes = max_raster_bytes
        self._max_fields = max_fields
        self._roots = roots
        self._turn_seconds = turn_seconds
        self._sweep_seconds = min(_SWEEP_SECONDS, max(0.1, ttl / 10))
        self._closing = closing
        self._cache = cache
        self._budget = budget
        self._executor = executor
        self._wakeup = threading.Condition()
        self._running: dict[str, tuple[Job, threading.Event]] = {}
        self._sweep_fault: str | None = None
        self._resting: dict[int, float] = {}
        """Numbers of jobs that wait for a host, and when they may start by the monotonic clock."""
        self._outage_pause = _PAUSE_SECONDS
        """Next pause of a worker if the storage cannot be reached; a finished run resets it."""
        self._store_fault: str | None = None
        self._check_begun: float | None = None
        self._workers = [SupervisedThread(f"job-{n}", self._work, closing) for n in range(workers)]
        self._threads = [*self._workers, SupervisedThread("jobs", self._sweep_repeatedly, closing)]
        self._threads.append(SupervisedThread("store check", self._check_store, closing))
        if store.shared:
            self._threads.append(SupervisedThread("leases", self._keep_leases, closing))
        self._threads += [SupervisedThread(n, loop, closing) for n, loop in loops.items()]
        if callbacks is not None:
            self._threads.append(SupervisedThread("callbacks", callbacks.run, closing))

    def start(self) -> None:
        """Start the workers."""
        self._update_metrics()
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Wait until every worker has put its job back; `closing` must be set.

        A worker that does not end in time is abandoned: the next start resumes its job.
        """
        self._stop_runs()
        until = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            if not thread.join(max(0.0, until - time.monotonic())):
                _LOG.error(
                    "thread did not end within the time limit",
                    extra={"loop": thread.name, "seconds": _JOIN_SECONDS},
                )

    @property
    def workers(self) -> int:
        """Number of worker threads that are alive."""
        return sum(thread.alive for thread in self._workers)

    @property
    def failed(self) -> bool:
        """Whether a thread failed too often and ended: the service must stop and be restarted."""
        return any(thread.failed for thread in self._threads)

    def faults(self) -> list[str]:
        """Current faults of the runner, one sentence each; empty if there are none."""
        ended = [thread.name for thread in self._threads if not thread.alive]
        faults = [f"thread '{name}' has ended" for name in ended]
        begun = self._check_begun
        if begun is not None and time.monotonic() - begun > _STORE_SECONDS:
            faults.append(f"the job store did not respond within {_STORE_SECONDS:g} s")
        return [*faults, *(fault for fault in (self._store_fault, self._sweep_fault) if fault)]

    def accepted(self) -> None:
        """Wake the workers after the store accepted a job."""
        with self._wakeup:
            self._wakeup.notify_all()
        self._update_metrics()

    def dismiss(self, owner: str, name: str) -> Job:
        """Dismiss a job; a running job ends after its current window at the latest.

        Args:
            owner: the caller that the job belongs to.
            name: the job's id.

        Returns:
            The dismissed job.

        Raises:
            UnknownJob: the job does not exist or belongs to another caller.
        """
        job = self._store.dismiss(owner, name)
        with self._wakeup:
            running = self._running.get(job.id)
        if running is not None:
            running[1].set()
        self._update_metrics()
        return job

    # Threads -------------------------------------------------------------------------------

    def _sweep_repeatedly(self) -> None:
        """Remove expired jobs until the service stops; then cancel the running jobs."""
        last = time.monotonic()
        while not self._closing.wait(self._sweep_seconds):
            now = time.monotonic()
            try:
                self._store.sweep(now - last)
                self._update_metrics()
            except PIMCError as error:
                _LOG.exception("expired jobs cannot be removed")
                self._sweep_fault = f"expired jobs cannot be removed: {error}"
                self._metrics.swept("failed")
                continue
            self._sweep_fault = None
            self._metrics.swept("done")
            last = now
            with self._wakeup:  # a worker that could not take a job tries again
                self._wakeup.notify_all()
        self._stop_runs()

    def _check_store(self) -> None:
        """Check once per second that the store works.

        A readiness probe returns the outcome of the last check: under load, a check within the
        probe would wait for a thread and make probes time out.
        """
        while not self._closing.is_set():
            self._check_begun = time.monotonic()
            self._store_fault = self._store.fault()
            self._check_begun = None
            self._closing.wait(_CHECK_SECONDS)

    def _keep_leases(self) -> None:
        """Renew the runs' leases; end runs whose job was dismissed elsewhere or taken over."""
        while not self._closing.wait(_BEAT_SECONDS):
            with self._wakeup:
                running = {job.id: (job, cancelled) for job, cancelled in self._running.values()}
            try:
                lost = self._store.renew(job for job, _ in running.values())
            except PIMCError:
                _LOG.exception("leases cannot be renewed")
                continue
            for job in lost:
                running[job.id][1].set()
            with self._wakeup:  # other replicas may have accepted jobs, or lost some
                self._wakeup.notify_all()

    def _stop_runs(self) -> None:
        """Cancel the running jobs, and wake the waiting threads so that they end."""
        if self._callbacks is not None:
            self._callbacks.notify()
        with self._wakeup:
            for _, cancelled in self._running.values():
                cancelled.set()
            self._wakeup.notify_all()

    def _work(self) -> None:
        while True:
            with self._wakeup:
                # Take and register a job under one lock: a dismissal in between would be lost.
                job = self._take()
                while job is None and not self._closing.is_set():
                    self._wakeup.wait(self._rest_left())
                    job = self._take()
                if job is None:
                    return
                cancelled = threading.Event()
                self._running[job.id] = job, cancelled
            try:
                with job_named(job.id), self._traced(job):
                    self._run(job, cancelled)
            finally:
                with self._wakeup:
                    del self._running[job.id]

    def _traced(self, job: Job) -> AbstractContextManager[None]:
        """The span of one run of a job."""
        if not self._traces.enabled:
            return nullcontext()
        attributes: dict[str, Attribute] = {
            "pimc.job": job.id,
            "pimc.model": job.model,
            "pimc.lease": job.lease,
        }
        return self._traces.job(
            f"job {job.task}", self._store.job_requests.submitted(job), attributes
        )

    def _take(self) -> Job | None:
        if self._closing.is_set():
            return None
        now = time.monotonic()
        self._resting = {number: until for number, until in self._resting.items() if until > now}
        try:
            return self._store.take(self._resting)
        except PIMCError:
            # The worker retries when the next job is accepted, or after the next sweep.
            _LOG.exception("the job store cannot start a job")
            return None

    def _rest_left(self) -> float | None:
        """Seconds until the next resting job may start; None if none rests."""
        until = min(self._resting.values(), default=None)
        return None if until is None else max(0.0, until - time.monotonic())

    def _run(self, job: Job, cancelled: threading.Event) -> None:
        _LOG.info("job begins", extra={"task": job.task, "model": job.model})
        self._update_metrics()
        begun = time.monotonic()
        try:
            self._complete(job, cancelled)
        except Cancelled:
            self._stop(job)
        except Exception as error:  # noqa: BLE001 - after any error the next job runs
            shortage = _shortage(error)
            if shortage is not None:
                self._retry_later(job, shortage)
            elif self._lost(job):  # the run that has the job now may have removed a file of this
                self._stop(job)
            elif isinstance(error, UnreachableReference) and error.later:
                self._rest(job, error)
            else:
                self._fail(job, error)
        else:
            self._outage_pause = _PAUSE_SECONDS
            seconds = time.monotonic() - begun
            self._metrics.job_ran(task=job.task, seconds=seconds)
            _LOG.info("job ends", extra={"seconds": round(seconds, 3)})
        self._record(lambda: self._store.tidy(job))
        self._update_metrics()

    def _stop(self, job: Job) -> None:
        # A dismissed job stays dismissed: `put_back` changes running jobs of this lease only.
        self._record(lambda: self._store.put_back(job))
        _LOG.info("job stops", extra={"stopping": self._closing.is_set()})

    def _lost(self, job: Job) -> bool:
        try:
            return not self._store.holds(job)
        except PIMCError:  # recording the outcome finds out
            return False

    def _retry_later(self, job: Job, shortage: Overloaded) -> None:
        """Put back a job whose memory, file descriptors or store are in use, and pause."""
        _LOG.warning("job waits", extra={"reason": shortage.detail})
        self._record(lambda: self._store.put_back(job))
        pause = _PAUSE_SECONDS
        if isinstance(shortage, StorageUnreachable):  # each attempt sends it requests
            pause = self._outage_pause
            self._outage_pause = min(2 * pause, _MAX_PAUSE_SECONDS)
        self._closing.wait(pause)

    def _rest(self, job: Job, error: UnreachableReference) -> None:
        """Put back a job whose host does not respond, to be started after a pause; at last fail it.

        Meanwhile the worker runs other jobs.
        """
        try:
            attempts = self._store.attempts(job)
        except PIMCError:  # recording the outcome finds out
            attempts = job.attempts
        if attempts >= _HOST_ATTEMPTS:
            detail = f"{error.detail}; the job was started {attempts} times, with growing pauses"
            self._fail(job, UnreachableReference(detail))
            return
        seconds = _REST_SECONDS * 2 ** max(0, attempts - 1)
        _LOG.warning("job waits for a host", extra={"reason": error.detail, "seconds": seconds})
        with self._wakeup:
            self._resting[job.number] = time.monotonic() + seconds
        self._record(lambda: self._store.put_back(job, counts=True, rest=seconds))

    def _fail(self, job: Job, error: Exception) -> None:
        problem = error if isinstance(error, PIMCError) else no_room(error)
        if problem is None or isinstance(problem, InternalError):
            problem = InternalError(
                f"internal error; the server's log has the cause under job {job.id}"
            )
        # The request itself is valid if only its model was removed: the client may repeat it.
        free = isinstance(problem, UnknownModel)
        _LOG.error("job fails", exc_info=error, extra={"code": problem.code})
        # Free disk space first: on a full disk the failure cannot be recorded.
        self._store.files.make_room(job)
        self._record(lambda: self._store.fail(job, problem, free_key=free))

    def _record(self, write: Callable[[], None]) -> bool:
        """Record a job's outcome; retry while the disk is full or the store is in use.

        Returns:
            Whether it was recorded; if not, another run has the job, or the service stops.
        """
        while True:
            try:
                write()
            except LeaseLost:
                return False  # the outcome is that of another run
            except PIMCError:
                _LOG.exception("the job's outcome cannot be recorded")
                if self._closing.wait(_PAUSE_SECONDS):
                    return False  # the job runs again after the next start
            else:
                return True

    # One job -------------------------------------------------------------------------------

    def _complete(self, job: Job, cancelled: threading.Event) -> None:
        # A result exists already if the service was killed before it recorded the success.
        if not self._store.results.published(job):
            if job.attempts > _MAX_ATTEMPTS:
                raise InternalError(
                    f"the server stopped {_MAX_ATTEMPTS} times while it ran job {job.id}, each "
                    "time before it finished another window; the server's log may have the cause"
                )
            self._compute(job, cancelled)
        try:
            self._store.succeed(job)
        except InsufficientStorage as error:
            # Only the row does not fit on the disk: the result is complete, and not given up.
            if not self._record(lambda: self._store.succeed(job)):
                raise Cancelled(f"the success of job {job.id} is not recorded") from error

    def _compute(self, job: Job, cancelled: threading.Event) -> None:
        self._store.files.prepare(job)
        request = self._store.job_requests.read(job)
        if isinstance(request, RasterRequest):
            check_again(request.files, self._store.files.folder(job), self._roots)
        plan = self._plan(job, request, cancelled)
        card = plan.model.card
        if (card.id, card.sha256) != (job.model, job.sha256):
            _LOG.info("job upgraded", extra={"from": job.model, "to": card.id})
            job = self._store.change_model(job, card.id, card.sha256)
        self._store.begin(job, f"{plan.model.provider} {plan.model.variant}")
        work = self._store.files.work(job)
        work.mkdir()
        done = 0.0

        def progress(share: float) -> None:
            nonlocal done
            done = share

        journal = WindowFile(
            self._store,
            job,
            lambda: int(100 * done),
            turn_seconds=self._turn_seconds,
            cancelled=cancelled,
        )
        with self._metrics.run():
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
        self._metrics.ran(
            task=job.task,
            pixels=result.pixels,
            stages=asdict(result.timing),
            key=job.owner,
            of=plan.predicts_for,
        )
        self._store.results.publish(job, work, result)

    def _plan(self, job: Job, request: TaskRequest, cancelled: threading.Event) -> Plan:
        """Plan a job with the model that it was accepted for, or with a later version.

        Raises:
            UnknownModel: the server no longer has the model, and the owner allowed no other.
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
        self._refresh(job.owner)
        now = self._engine.named(name, job.owner)
        if now is not None and (now.card.id, now.card.sha256) == (job.model, job.sha256):
            return plan_with(request)
        if now is not None and self._store.job_requests.may_upgrade(job):
            return plan_with(replace(request, model=name))
        served = (
            "which the server no longer has"
            if now is None
            else f"but the server now has '{now.card.id}' with sha256 {now.card.sha256[:12]}…"
        )
        raise UnknownModel(
            f"the job was accepted for '{job.model}' with sha256 {job.sha256[:12]}…, {served}: "
            "send the request again (its Idempotency-Key is free), with 'Prefer: model-upgrade' if "
            "any later version may run it"
        )

    def _update_metrics(self) -> None:
        """Update the metrics after a job has changed, and let its receivers be called."""
        if self._callbacks is not None:
            self._callbacks.notify()
        try:
            self._metrics.jobs(self._store.counts(), self._store.oldest())
        except PIMCError:
            _LOG.exception("jobs cannot be counted for the metrics")


def _shortage(error: Exception) -> Overloaded | None:
    """The shortage of a resource that an error reports; None for any other error."""
    if isinstance(error, Overloaded):
        return error
    return no_descriptors(error) if isinstance(error, OSError) else None

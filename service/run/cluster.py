"""Cluster executor: the windows of jobs on the workers of a Dask cluster.

    windows ──▶ tasks, a few per thread of the workers ──▶ results ──▶ written in order

Workers read the files and compute; the service writes what they return, window by window in order,
as it would write its own. Dask places the tasks, and moves those of a worker that dies. This module
decides what Dask cannot: which workers are refused, when a window is late, and what to do after the
scheduler has restarted.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future as LocalFuture
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distributed import Client, Future, KilledWorker

from service.errors import InternalError
from service.read.geotiff import BlockCache
from service.run.executors import ClusterState, ThreadExecutor, Timing, check
from service.run.passes import Pass, Stages
from service.run.shared import SharedFiles
from service.run.windows import Arrays, Step
from service.run.worker import Computed, ModelsPlugin, PassFile, Refused, compute, packed
from service.settings import project_version
from service.tracing import MOST_WINDOWS, span, traceparent

_LOG = logging.getLogger(__name__)
_LOOK_SECONDS = 1.0
"""Seconds between two looks at the workers, and between two checks of the windows in flight."""
_CONNECT_SECONDS = 10.0
_CALL_SECONDS = 30.0
"""Seconds within which the scheduler must answer a call."""
_PER_THREAD = 3
"""Windows begun and not yet written, per thread of the workers: one that is computed, one that
waits at the worker, and one that waits for an earlier window to be written."""
_FETCHED = 4
"""Results in the memory of the service at once; others stay with the workers."""
_MOST_LATE = 3
"""Workers on which a window may be late before its job fails."""
_REFUSED_SECONDS = 60.0
"""Seconds after which a refused worker may try again: its folder may have been mounted since."""


@dataclass(frozen=True, kw_only=True)
class Members:
    """The workers of a cluster, as one connection to its scheduler sees them."""

    client: Client
    connection: int
    """Number of the connection: futures of an earlier one are lost."""
    threads: Mapping[str, int]
    """Number of threads of each running worker, by address."""


class Cluster:
    """A connection to a Dask scheduler, which is made again whenever it is lost. Thread-safe.

    `run` keeps it, in a thread of its own.

    Args:
        address: of the scheduler, `tcp://host:port` or `tls://host:port`.
        closing: event that is set when the service stops.
    """

    def __init__(self, address: str, closing: threading.Event) -> None:
        self.address = address
        self._closing = closing
        self._lock = threading.Lock()
        self._members: Members | None = None
        self._refused: dict[str, str] = {}
        # Dask has put a handler of its own on its loggers; the service's log has one form.
        for name in ("distributed", "bokeh", "tornado"):
            logger = logging.getLogger(name)
            logger.handlers.clear()
            logger.propagate = True
        # Its tracebacks of lost connections add nothing to the warnings of `run`.
        logging.getLogger("distributed.client").setLevel(logging.CRITICAL)

    def members(self) -> Members | None:
        """The present workers; None without a connection."""
        return self._members

    def state(self) -> ClusterState:
        """The present state, for operators."""
        members = self._members
        with self._lock:
            refused = dict(self._refused)
        threads = {} if members is None else members.threads
        usable = [count for one, count in threads.items() if one not in refused]
        fault = None
        if members is None:
            fault = f"there is no connection to the Dask scheduler at {self.address}"
        elif not threads:
            fault = f"no worker has joined the Dask scheduler at {self.address}"
        elif not usable:
            reasons = "; ".join(refused.values())
            fault = (
                f"every worker of the Dask scheduler at {self.address} differs from the service "
                f"and computes no windows: {reasons}"
            )
        return ClusterState(
            scheduler=self.address,
            workers=len(usable),
            threads=sum(usable),
            refused=refused,
            fault=fault,
        )

    def refuse(self, worker: str, why: str) -> None:
        """Record that a worker was refused."""
        with self._lock:
            new = self._refused.get(worker) != why
            self._refused[worker] = why
        if new:
            _LOG.error("worker refused", extra={"worker": worker, "reason": why})

    def accept(self, worker: str) -> None:
        """Record that a worker has computed a window."""
        with self._lock:
            self._refused.pop(worker, None)

    def run(self) -> None:
        """Keep the connection until the service stops."""
        connections = 0
        while not self._closing.is_set():
            try:
                with self._connected() as client:
                    connections += 1
                    self._watch(client, connections)
            except (OSError, TimeoutError) as error:
                _LOG.warning(
                    "no connection to the Dask scheduler",
                    extra={"scheduler": self.address, "reason": repr(error)},
                )
            self._closing.wait(_LOOK_SECONDS)

    @contextmanager
    def _connected(self) -> Iterator[Client]:
        client = Client(self.address, timeout=_CONNECT_SECONDS, set_as_default=False, name="pimc")
        try:
            client.register_plugin(ModelsPlugin())
            _LOG.info("connected to the Dask scheduler", extra={"scheduler": self.address})
            yield client
        finally:
            self._members = None
            client.close(timeout=_CALL_SECONDS)

    def _watch(self, client: Client, connection: int) -> None:
        while not self._closing.is_set() and client.status == "running":
            found = client.sync(
                client.scheduler.identity, n_workers=-1, callback_timeout=_CALL_SECONDS
            )["workers"]
            threads = {
                address: worker["nthreads"]
                for address, worker in found.items()
                if worker.get("status", "running") == "running"
            }
            self._members = Members(client=client, connection=connection, threads=threads)
            with self._lock:
                for gone in self._refused.keys() - found.keys():
                    del self._refused[gone]
            self._closing.wait(_LOOK_SECONDS)


@dataclass(frozen=True, kw_only=True)
class ClusterExecutor:
    """An `Executor` that computes the windows of passes on a cluster."""

    cluster: Cluster
    files: SharedFiles
    """The storage of the jobs' files, which the workers share."""
    window_seconds: float
    """Seconds after which a window is given to another worker as well."""
    here: ThreadExecutor = field(default_factory=ThreadExecutor)
    """Runs what needs this process."""
    in_flight: Callable[[int], None] = lambda _: None
    """See `ThreadExecutor`."""
    counted: Callable[[str], None] = lambda _: None
    """Called with the outcome of each task of a window: `written`, `late`, `lost`, `refused`."""

    def run_pass(
        self,
        steps: Sequence[Step],
        work: Pass | Stages,
        *,
        folder: Path,
        write: Callable[[Step, Arrays], None],
        cache: BlockCache,
        cancelled: threading.Event | None = None,
    ) -> Timing:
        """See `Executor.run_pass`."""
        if isinstance(work, Stages):
            return self.here.run_pass(
                steps, work, folder=folder, write=write, cache=cache, cancelled=cancelled
            )
        if not steps:
            return Timing()
        shared = self.files.new_pass(folder)
        try:
            content = packed(work, shared.key)
            file = PassFile(
                key=shared.store(content),
                sha256=hashlib.sha256(content).hexdigest(),
                storage=self.files.name,
                opener=self.files.opener,
                version=project_version(),
            )
            with (
                span("cluster", windows=len(steps)),
                _PassRun(self, steps, file, write, cancelled) as run,
            ):
                return run.timing()
        finally:
            shared.remove()


@dataclass(kw_only=True)
class _Task:
    """One task of a window."""

    future: Future
    connection: int
    workers: frozenset[str]
    """The workers that may compute it."""
    due: float
    """When it is late, by the monotonic clock."""


@dataclass(kw_only=True)
class _Flight:
    """A window that was begun and is not written yet."""

    step: Step
    tasks: list[_Task] = field(default_factory=list)
    """Tasks of which the first result is taken; several after a task was late."""
    late: set[str] = field(default_factory=set)
    """Workers on which it was late."""
    finished: _Task | None = None
    fetched: LocalFuture[Computed] | None = None

    @property
    def here(self) -> bool:
        """Whether its result is in the memory of the service."""
        found = self.fetched
        return (
            found is not None
            and found.done()
            and not found.cancelled()
            and found.exception() is None
        )


class _PassRun:
    """One pass on a cluster; a context manager that releases the tasks.

    Args:
        executor: with the cluster.
        steps: the windows.
        file: the pass.
        write: takes a window and its arrays.
        cancelled: an event that cancels the run when it is set.
    """

    def __init__(
        self,
        executor: ClusterExecutor,
        steps: Sequence[Step],
        file: PassFile,
        write: Callable[[Step, Arrays], None],
        cancelled: threading.Event | None,
    ) -> None:
        self._executor = executor
        self._cluster = executor.cluster
        self._steps = steps
        self._file = file
        self._write = write
        self._cancelled = cancelled
        self._flights: dict[int, _Flight] = {}
        self._begun = self._written = 0
        self._events: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._refused: dict[str, tuple[float, Refused]] = {}
        self._suspects: set[str] = set()
        """Workers on which a window is late, which get no more windows while there are others."""
        self._waiting: str | None = None
        self._checked = 0.0
        self._traced_every = -(-len(steps) // MOST_WINDOWS)

    def __enter__(self) -> _PassRun:
        return self

    def __exit__(self, *_: object) -> None:
        for flight in self._flights.values():
            self._release(flight)
        self._executor.in_flight(-len(self._flights))

    def timing(self) -> Timing:
        """Compute and write all windows.

        Returns:
            The seconds in which each stage was busy, together on all workers.
        """
        timing = Timing()
        while self._written < len(self._steps):
            check(self._cancelled)
            members = self._cluster.members()
            now = time.monotonic()
            if now >= self._checked + _LOOK_SECONDS:
                self._checked = now
                for number in list(self._flights):
                    self._settle(number)
                self._check_all(members, now)
            self._hand_out(members)
            done = self._write_next()
            timing += done or Timing()
            if done is None:
                self._wait()
        return timing

    # Tasks ---------------------------------------------------------------------------------

    def _hand_out(self, members: Members | None) -> None:
        """Begin windows, as many as the workers' threads need."""
        usable = self._usable(members)
        if members is None or not usable:
            self._say_waiting()
            return
        self._waiting = None
        most = max(2, _PER_THREAD * sum(members.threads[one] for one in usable))
        for number, flight in self._flights.items():
            if not flight.tasks and flight.finished is None:
                self._submit(members, number, flight, usable)
        while self._begun < len(self._steps) and len(self._flights) < most:
            flight = self._flights[self._begun] = _Flight(step=self._steps[self._begun])
            self._executor.in_flight(1)
            self._submit(members, self._begun, flight, usable)
            self._begun += 1

    def _usable(self, members: Members | None) -> frozenset[str]:
        """The workers that get windows: not refused, and without a late window if there are any.

        Raises:
            PIMCError: every worker refuses the pass, for a reason that ends the run.
        """
        if members is None:
            return frozenset()
        now = time.monotonic()
        self._refused = {
            one: (until, why)
            for one, (until, why) in self._refused.items()
            if until > now and one in members.threads
        }
        accepted = members.threads.keys() - self._refused.keys()
        if members.threads and not accepted:
            errors = [why.error for _, why in self._refused.values()]
            if errors[0] is not None and None not in errors:
                raise errors[0]
        return frozenset(accepted - self._suspects or accepted)

    def _say_waiting(self) -> None:
        fault = self._cluster.state().fault
        if fault is not None and fault != self._waiting:
            self._waiting = fault
            _LOG.warning("job waits for workers", extra={"reason": fault})

    def _submit(
        self, members: Members, number: int, flight: _Flight, workers: frozenset[str]
    ) -> None:
        window = flight.step.window
        place = (window.col_off, window.row_off, window.width, window.height)
        future = members.client.submit(
            compute,
            self._file,
            tuple(map(int, place)),
            None if number % self._traced_every else traceparent(),
            key=f"pimc-window-{flight.step.stage}-{flight.step.number}-{uuid.uuid4().hex}",
            workers=sorted(workers),
            allow_other_workers=False,
            priority=-flight.step.number,  # the earliest window is written first
            pure=False,
        )
        flight.tasks.append(
            _Task(
                future=future,
                connection=members.connection,
                workers=workers,
                due=time.monotonic() + self._executor.window_seconds,
            )
        )
        future.add_done_callback(lambda _: self._events.put(number))

    def _wait(self) -> None:
        """Wait for an event, and settle the windows that have one."""
        try:
            numbers = {self._events.get(timeout=_LOOK_SECONDS)}
            while not self._events.empty():
                numbers.add(self._events.get_nowait())
        except queue.Empty:
            return
        for number in sorted(numbers):
            self._settle(number)

    def _settle(self, number: int) -> None:
        """Take note of the tasks of a window that have ended."""
        flight = self._flights.get(number)
        if flight is None or flight.finished is not None:
            return
        for task in list(flight.tasks):
            status = task.future.status
            if status == "finished":
                flight.finished = task
                for other in flight.tasks:
                    if other is not task:
                        other.future.release()
                flight.tasks = [task]
                return
            if status == "error":
                flight.tasks.remove(task)
                self._failed(task)
            elif status in {"cancelled", "lost"}:
                flight.tasks.remove(task)
                self._executor.counted("lost")

    def _failed(self, task: _Task) -> None:
        """Take note of the error of a task, or raise it.

        Raises:
            Exception: the error of the window.
        """
        error = task.future.exception(timeout=_CALL_SECONDS)
        task.future.release()
        if isinstance(error, Refused):
            self._executor.counted("refused")
            self._refused[error.worker] = time.monotonic() + _REFUSED_SECONDS, error
            self._cluster.refuse(error.worker, error.detail)
            return
        if isinstance(error, KilledWorker):
            raise InternalError(
                "several workers died while they computed the same window; the administrator finds "
                "the reason, such as too little memory, in the logs of the workers"
            ) from error
        if error is None:
            raise InternalError(
                "a task of the cluster failed without an error; the logs of the workers may have "
                "the cause"
            )
        raise error

    # Faults --------------------------------------------------------------------------------

    def _check_all(self, members: Members | None, now: float) -> None:
        """Drop tasks of lost connections and of workers that left; give late windows to others."""
        late: list[tuple[int, _Flight]] = []
        for number, flight in self._flights.items():
            if flight.here:
                continue
            for task in list(flight.tasks):
                # Dask keeps a task until a worker of the same address joins again.
                if (
                    members is None
                    or task.connection != members.connection
                    or task.workers.isdisjoint(members.threads)
                ):
                    self._drop(flight, task)
                    self._executor.counted("lost")
            # A result that waits with its worker for an earlier window is not late.
            awaited = flight.tasks if flight.finished is None or flight.fetched else []
            if awaited and min(task.due for task in awaited) <= now:
                late.append((number, flight))
        if late and members is not None:
            self._move(members, late, now)

    @staticmethod
    def _drop(flight: _Flight, task: _Task) -> None:
        """Give up a task of a window."""
        task.future.release()
        flight.tasks.remove(task)
        if flight.finished is task:
            flight.finished = flight.fetched = None

    def _move(self, members: Members, late: Sequence[tuple[int, _Flight]], now: float) -> None:
        """Give windows to other workers if those that have them do not return them in time."""
        try:
            processing: Mapping[str, Sequence[Any]] = members.client.sync(
                members.client.scheduler.processing,
                workers=None,
                callback_timeout=_CALL_SECONDS,
            )
            held: Mapping[Any, Sequence[str]] = members.client.sync(
                members.client.scheduler.who_has,
                keys=[flight.finished.future.key for _, flight in late if flight.finished],
                callback_timeout=_CALL_SECONDS,
            )
        except (OSError, TimeoutError):
            return  # the connection is made again if it is lost
        where = {key: worker for worker, keys in processing.items() for key in keys}
        where |= {key: workers[0] for key, workers in held.items() if workers}
        for number, flight in late:
            slow = {where[t.future.key] for t in flight.tasks if t.future.key in where}
            new = slow - flight.late
            pause = self._executor.window_seconds if slow == new else _LOOK_SECONDS
            for task in flight.tasks:
                task.due = now + pause
            if not slow:
                continue  # it waits for a free thread
            self._suspects |= slow
            flight.late |= slow
            if len(flight.late) >= _MOST_LATE:
                raise InternalError(
                    f"a window took longer than {self._executor.window_seconds:g} s "
                    f"(PIMC_DASK_WINDOW_SECONDS) on each of {', '.join(sorted(flight.late))}: the "
                    "administrator may raise the limit, or find the cause in the workers' logs"
                )
            if new:
                self._executor.counted("late")
                _LOG.warning("window is late", extra={"window": number, "workers": sorted(new)})
            others = self._usable(members) - slow
            if others:
                if flight.finished is not None:  # its worker hangs with the result
                    self._drop(flight, flight.finished)
                self._submit(members, number, flight, others)

    # Results -------------------------------------------------------------------------------

    def _write_next(self) -> Timing | None:
        """Write the next window if its result is here; returns the seconds it took."""
        members = self._cluster.members()
        for number in range(self._written, self._written + _FETCHED):
            flight = self._flights.get(number)
            if flight is not None and flight.finished is not None and flight.fetched is None:
                self._fetch(members, number, flight)
        flight = self._flights.get(self._written)
        if flight is None or flight.fetched is None or not flight.fetched.done():
            return None
        if not flight.here:
            # The worker was lost together with its result, or the connection was.
            self._executor.counted("lost")
            for task in list(flight.tasks):
                self._drop(flight, task)
            return None
        computed = flight.fetched.result()
        self._release(flight)
        self._suspects.discard(computed.worker)
        self._cluster.accept(computed.worker)
        begun = time.perf_counter()
        self._write(flight.step, computed.arrays)
        del self._flights[self._written]
        self._written += 1
        self._executor.in_flight(-1)
        self._executor.counted("written")
        return Timing(read=computed.read, infer=computed.infer, write=time.perf_counter() - begun)

    def _fetch(self, members: Members | None, number: int, flight: _Flight) -> None:
        """Begin to bring a result here, without waiting for a worker that may hang."""
        task = flight.finished
        if task is None or members is None or task.connection != members.connection:
            return
        client = members.client
        task.due = time.monotonic() + self._executor.window_seconds

        async def gathered() -> Computed:
            found: Computed = await client.gather(task.future, direct=True, asynchronous=True)
            return found

        flight.fetched = asyncio.run_coroutine_threadsafe(gathered(), client.loop.asyncio_loop)
        flight.fetched.add_done_callback(lambda _: self._events.put(number))

    def _release(self, flight: _Flight) -> None:
        for task in flight.tasks:
            task.future.release()

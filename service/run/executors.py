"""Executors: windows pass through the stages of a run, read ahead | infer | write behind.

    items ──▶ read (1 thread) ──▶ infer (2 threads) ──▶ write (1 thread, in the items' order)

An executor runs passes. The windows of a `Pass` may be computed elsewhere, see
`service.run.cluster`; those of `Stages` are computed in this process. It does not depend on models.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from service.errors import Cancelled
from service.read.geotiff import BlockCache
from service.run.passes import Pass, Stages
from service.run.windows import Arrays, Step
from service.tracing import stage_spans

_Item = TypeVar("_Item")
_Read = TypeVar("_Read")
_Inferred = TypeVar("_Inferred")
_Returned = TypeVar("_Returned")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds that each stage was busy; stages overlap, so the sum may exceed the wall time."""

    read: float = 0.0
    """Reading and scaling pixels."""
    infer: float = 0.0
    """Preparing the input and running the graph."""
    write: float = 0.0
    """Writing windows and finishing files."""

    def __add__(self, other: Timing) -> Timing:
        return Timing(
            read=self.read + other.read,
            infer=self.infer + other.infer,
            write=self.write + other.write,
        )


@dataclass(frozen=True, kw_only=True)
class ClusterState:
    """The state of a cluster, for operators."""

    scheduler: str
    """Its address."""
    workers: int
    """Number of workers that compute windows, or may."""
    threads: int
    """Number of threads of these workers."""
    refused: Mapping[str, str]
    """Why workers are refused, by address."""
    fault: str | None
    """Why no job can run, as a sentence; None if one can."""


class Executor(Protocol):
    """Runs passes."""

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
        """Compute every window of a pass, here or elsewhere, and write the results in order.

        Args:
            steps: the windows, in order.
            work: the pass, or its stages, which run in this process.
            folder: folder of the run.
            write: takes a window and its arrays; called for one window at a time.
            cache: GDAL's block cache.
            cancelled: an event that cancels the run when it is set.

        Returns:
            The seconds in which each stage was busy.

        Raises:
            Cancelled: `cancelled` was set.
            Exception: the exception of a stage, unchanged; no further window is started.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ThreadExecutor:
    """Reads in one thread, infers in several, writes in one."""

    depth: int = 1
    """Number of items read ahead of the next one, and of items that may wait to be written."""
    workers: int = 2
    """Number of items inferred at once: while one item's input is prepared, the batches of another
    run."""
    in_flight: Callable[[int], None] = lambda _: None
    """Called with +1 when the read of an item begins, and with -1 when the item is written or
    dropped."""

    def run(
        self,
        items: Sequence[_Item],
        *,
        read: Callable[[_Item], _Read],
        infer: Callable[[_Read], _Inferred],
        write: Callable[[_Item, _Inferred], None],
        cancelled: threading.Event | None = None,
    ) -> Timing:
        """Read, infer and write every item.

        Items are read one at a time and written one at a time, in their order; several items may be
        inferred at once. The number of items between two stages is bounded, and therefore memory.

        Args:
            items: the items, such as windows.
            read: reads an item.
            infer: predicts from the result of `read`.
            write: takes an item and the result of `infer`.
            cancelled: an event that cancels the run when it is set.

        Returns:
            The seconds in which each stage was busy.

        Raises:
            Cancelled: `cancelled` was set.
            Exception: the exception of a stage, unchanged; no further item is started.
        """
        reading, inferring, writing = (
            _Stage(name, len(items)) for name in ("read", "infer", "write")
        )
        reader = ThreadPoolExecutor(1, thread_name_prefix="read")
        inferrer = ThreadPoolExecutor(self.workers, thread_name_prefix="window")
        writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        ahead: deque[Future[_Read]] = deque()
        at_work: deque[tuple[int, _Item, Future[_Inferred]]] = deque()
        behind: deque[Future[None]] = deque()
        begun = ended = 0

        def hand_over() -> None:
            """Wait until the oldest item is inferred, and submit it to the writer."""
            nonlocal ended
            number, item, inferred = at_work.popleft()
            result = inferred.result()
            # A failed write raises here, and not only `depth` items later.
            while behind and (behind[0].done() or len(behind) >= self.depth):
                behind.popleft().result()
                ended += 1
                self.in_flight(-1)
            behind.append(writing.submit(writer, number, write, item, result))

        try:
            for at, item in enumerate(items):
                check(cancelled)
                for coming in range(at + len(ahead), min(at + 1 + self.depth, len(items))):
                    ahead.append(reading.submit(reader, coming, read, items[coming]))
                    begun += 1
                    self.in_flight(1)
                while len(at_work) >= self.workers:
                    hand_over()
                values = ahead.popleft().result()
                at_work.append((at, item, inferring.submit(inferrer, at, infer, values)))
                del values  # otherwise its memory is not freed while the next item is read
            while at_work:
                hand_over()
            for pending in behind:
                pending.result()
            check(cancelled)
        finally:
            # After an error, each shutdown cancels pending calls and waits for running ones.
            reader.shutdown(cancel_futures=True)
            inferrer.shutdown(cancel_futures=True)
            writer.shutdown(cancel_futures=True)
            self.in_flight(ended - begun)
            for stage in (reading, inferring, writing):
                stage.end()
        return Timing(read=reading.seconds, infer=inferring.seconds, write=writing.seconds)

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
        del folder  # for executors in other processes
        opened = nullcontext(work) if isinstance(work, Stages) else work.open(cache, cancelled)
        with opened as stages:
            return self.run(
                steps,
                read=lambda step: stages.read(step.window),
                infer=stages.infer,
                write=lambda step, found: write(step, stages.to_arrays(step.window, found)),
                cancelled=cancelled,
            )


def check(cancelled: threading.Event | None) -> None:
    """Raise `Cancelled` if the run was cancelled.

    Raises:
        Cancelled: `cancelled` is set.
    """
    if cancelled is not None and cancelled.is_set():
        raise Cancelled("the run was cancelled")


def unless_cancelled(items: Iterable[Any], cancelled: threading.Event | None) -> Iterator[Any]:
    """The items one by one, until the run is cancelled.

    Raises:
        Cancelled: `cancelled` is set.
    """
    for item in items:
        check(cancelled)
        yield item


class _Stage:
    """One stage of a run: measures its busy seconds; after a failure it makes no further call.

    Args:
        name: name of the stage.
        items: number of items that the stage processes.
    """

    def __init__(self, name: str, items: int) -> None:
        self._spans = stage_spans(name, items)
        self.seconds = 0.0
        self._inside = 0
        self._since = 0.0
        self._failed = False
        self._lock = threading.Lock()

    def submit(
        self,
        pool: ThreadPoolExecutor,
        number: int,
        function: Callable[..., _Returned],
        *arguments: object,
    ) -> Future[_Returned]:
        """Call a function as part of this stage, in a thread that logs with the run's ids."""
        return pool.submit(copy_context().run, self._call, number, function, *arguments)

    def end(self) -> None:
        """End the stage once no call is in progress."""
        if self._spans is not None:
            self._spans.end(self.seconds)

    def _call(
        self, number: int, function: Callable[..., _Returned], *arguments: object
    ) -> _Returned:
        with self._lock:
            if self._failed:
                # The executor never raises this error: it awaits items in order, and so raises the
                # earlier item's error first.
                raise Cancelled("an earlier item failed")
            if not self._inside:
                self._since = time.perf_counter()
            self._inside += 1
        try:
            if self._spans is None:
                return function(*arguments)
            with self._spans.window(number):
                return function(*arguments)
        except BaseException:
            self._failed = True
            raise
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self.seconds += time.perf_counter() - self._since

"""Executors: the three stages of a run, read ahead | infer | write behind.

    items ──▶ read (1 thread) ──▶ infer (2 threads) ──▶ write (1 thread, in the items' order)

An executor gets the windows and one function per stage; it does not depend on rasters or models.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from service.errors import Cancelled

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
    """Preparing input and running the graph."""
    write: float = 0.0
    """Writing windows and finishing files."""

    def __add__(self, other: Timing) -> Timing:
        return Timing(
            read=self.read + other.read,
            infer=self.infer + other.infer,
            write=self.write + other.write,
        )


class Executor(Protocol):
    """Runs items through three stages."""

    def run(
        self,
        items: Sequence[_Item],
        *,
        read: Callable[[_Item], _Read],
        infer: Callable[[_Read], _Inferred],
        write: Callable[[_Item, _Inferred], None],
        cancelled: threading.Event | None = None,
    ) -> Timing:
        """Pass every item through read, infer and write.

        Reads and writes happen in the items' order, one at a time each; several items may be
        inferred at once. The number of items between two stages is bounded, and so is memory.

        Raises:
            Cancelled: `cancelled` was set.
            Exception: the exception of a stage, unchanged; no further item is started.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ThreadExecutor:
    """Reads in one thread, infers in several, writes in one."""

    depth: int = 1
    """Items read ahead of the next one, and items that may wait to be written."""
    workers: int = 2
    """Items inferred at once: while one ends or gathers its input, the other's batches run."""
    in_flight: Callable[[int], None] = lambda _: None
    """Called with +1 when an item's read begins, and with -1 once it is written or abandoned."""

    def run(
        self,
        items: Sequence[_Item],
        *,
        read: Callable[[_Item], _Read],
        infer: Callable[[_Read], _Inferred],
        write: Callable[[_Item, _Inferred], None],
        cancelled: threading.Event | None = None,
    ) -> Timing:
        """See `Executor.run`."""
        reading, inferring, writing = _Stage(), _Stage(), _Stage()
        reader = ThreadPoolExecutor(1, thread_name_prefix="read")
        inferrer = ThreadPoolExecutor(self.workers, thread_name_prefix="window")
        writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        ahead: deque[Future[_Read]] = deque()
        at_work: deque[tuple[_Item, Future[_Inferred]]] = deque()
        behind: deque[Future[None]] = deque()
        begun = ended = 0

        def hand_over() -> None:
            """Wait until the oldest item is inferred, and pass it on to the writer."""
            nonlocal ended
            item, inferred = at_work.popleft()
            result = inferred.result()
            # A write that failed is raised now, not `depth` items later.
            while behind and (behind[0].done() or len(behind) >= self.depth):
                behind.popleft().result()
                ended += 1
                self.in_flight(-1)
            behind.append(writer.submit(writing.call, write, item, result))

        try:
            for at, item in enumerate(items):
                check(cancelled)
                for coming in items[at + len(ahead) : at + 1 + self.depth]:
                    ahead.append(reader.submit(reading.call, read, coming))
                    begun += 1
                    self.in_flight(1)
                while len(at_work) >= self.workers:
                    hand_over()
                values = ahead.popleft().result()
                at_work.append((item, inferrer.submit(inferring.call, infer, values)))
                del values  # otherwise its memory is kept while the next item is read
            while at_work:
                hand_over()
            for pending in behind:
                pending.result()
            check(cancelled)
        finally:
            # After an error this drops pending calls and waits for running ones.
            reader.shutdown(cancel_futures=True)
            inferrer.shutdown(cancel_futures=True)
            writer.shutdown(cancel_futures=True)
            self.in_flight(ended - begun)
        return Timing(read=reading.seconds, infer=inferring.seconds, write=writing.seconds)


def check(cancelled: threading.Event | None) -> None:
    """Raise `Cancelled` if the run was cancelled.

    Raises:
        Cancelled: `cancelled` is set.
    """
    if cancelled is not None and cancelled.is_set():
        raise Cancelled("the run was cancelled")


class _Stage:
    """One stage: measures the seconds in which it is busy; after a failure it runs nothing."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside = 0
        self._since = 0.0
        self._failed = False
        self._lock = threading.Lock()

    def call(self, function: Callable[..., _Returned], *arguments: object) -> _Returned:
        """Call a function as part of this stage."""
        with self._lock:
            if self._failed:
                # This error never leaves the executor: items are awaited in order, and the earlier
                # item's error is raised first.
                raise Cancelled("an earlier item failed")
            if not self._inside:
                self._since = time.perf_counter()
            self._inside += 1
        try:
            return function(*arguments)
        except BaseException:
            self._failed = True
            raise
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self.seconds += time.perf_counter() - self._since

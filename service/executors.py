"""Where windows run: the three stages of a run, read ahead | infer | write behind.

An `Executor` is handed the windows and one function a stage, and knows nothing of rasters or
models. The one here uses two threads of this process; one that sends windows to a cluster keeps
the same `run`, so the pipeline does not change.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

Item = TypeVar("Item")
Read = TypeVar("Read")
Answer = TypeVar("Answer")


class Cancelled(Exception):
    """The caller took the run back; nothing of it is left."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds that each stage was busy; they overlap, so the sum may exceed the wall time."""

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
        items: Sequence[Item],
        *,
        read: Callable[[Item], Read],
        infer: Callable[[Read], Answer],
        write: Callable[[Item, Answer], None],
        cancelled: threading.Event | None = None,
    ) -> Timing:
        """Pass every item through read, infer and write, in order.

        At most one call of each stage is in progress, and the number of items between two
        stages is bounded, so that memory is too.

        Raises:
            Cancelled: `cancelled` was set.
            Exception: whatever a stage raised, as it raised it; no further item is begun.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ThreadExecutor:
    """Reads in one thread, infers in the caller's, writes in another."""

    depth: int = 2
    """Items that may lie between two stages: one is in use while the next one is made."""

    def run(
        self,
        items: Sequence[Item],
        *,
        read: Callable[[Item], Read],
        infer: Callable[[Read], Answer],
        write: Callable[[Item, Answer], None],
        cancelled: threading.Event | None = None,
    ) -> Timing:
        """See `Executor.run`."""
        reading, inferring, writing = _Stage(), _Stage(), _Stage()
        reader = ThreadPoolExecutor(1, thread_name_prefix="read")
        writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        ahead: deque[Future[Read]] = deque()
        behind: deque[Future[None]] = deque()
        try:
            for at, item in enumerate(items):
                check(cancelled)
                for coming in items[at + len(ahead) : at + 1 + self.depth]:
                    ahead.append(reader.submit(reading.call, read, coming))
                values = ahead.popleft().result()
                answer = inferring.call(infer, values)
                del values  # else it lives on while the next item is read
                # A write that failed is raised now, not `depth` items later.
                while behind and (behind[0].done() or len(behind) >= self.depth):
                    behind.popleft().result()
                behind.append(writer.submit(writing.call, write, item, answer))
                del answer
            for pending in behind:
                pending.result()
            check(cancelled)
        finally:
            # On an error this drops what has not begun and waits for what has.
            reader.shutdown(cancel_futures=True)
            writer.shutdown(cancel_futures=True)
        return Timing(read=reading.seconds, infer=inferring.seconds, write=writing.seconds)


def check(cancelled: threading.Event | None) -> None:
    """Stop here where the run was taken back.

    Raises:
        Cancelled: `cancelled` is set.
    """
    if cancelled is not None and cancelled.is_set():
        raise Cancelled("the run was cancelled")


Result = TypeVar("Result")


class _Stage:
    """One stage: sums the seconds that it is busy, and does nothing more once it has failed."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._failed = False

    def call(self, function: Callable[..., Result], *arguments: object) -> Result:
        if self._failed:
            # Nobody hears this: items are asked after in order, and an earlier one failed.
            raise Cancelled("an earlier item failed")
        start = time.perf_counter()
        try:
            return function(*arguments)
        except BaseException:
            self._failed = True
            raise
        finally:
            self.seconds += time.perf_counter() - start

"""Admission control: bounded concurrency, 503 when full.

    arrival → queue slot? → body → run slot → run → response
                  │
              Overloaded

A request takes a queue slot before its body is read, so that nothing is uploaded in vain; without a
free slot it is rejected at once. It takes a run slot only for the run, so that a slow upload keeps
no model idle. There are twice as many queue slots as run slots, and run slots are granted in order
of arrival: a request with a queue slot is never rejected for load afterwards.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from service.errors import Overloaded

_QUEUE_SLOTS_PER_RUN_SLOT = 2
_RETRY_SECONDS = 5


class Admission:
    """Counts the requests that are queued or running, on one event loop.

    Args:
        run_slots: requests that may run at once.
    """

    def __init__(self, run_slots: int) -> None:
        self._free = anyio.Semaphore(run_slots)
        self._queue_slots = _QUEUE_SLOTS_PER_RUN_SLOT * run_slots
        self._held = 0

    @property
    def held(self) -> int:
        """Queue slots in use: requests being uploaded, waiting or running."""
        return self._held

    @asynccontextmanager
    async def queue_slot(self) -> AsyncIterator[None]:
        """A queue slot, for as long as the request is uploaded and run.

        Raises:
            Overloaded: every slot is in use.
        """
        if self._held >= self._queue_slots:
            raise Overloaded(
                f"server at capacity: {self._held} of {self._queue_slots} slots in use; nothing "
                f"was started, retry after {_RETRY_SECONDS} s",
                retry_after=_RETRY_SECONDS,
            )
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    @asynccontextmanager
    async def run_slot(self) -> AsyncIterator[None]:
        """A run slot, granted in the order of requests; the wait ends early only if cancelled."""
        async with self._free:
            yield

"""Who may start: a bounded number of requests, and an answer at once for the rest.

    arrival ──── a seat? ──── body ──── a place ──── run ──── answer
                   │
               Overloaded

A seat is taken before the body is read, so that nothing is uploaded in vain, and whoever gets none
is told at once. A place is taken only for the run, so that a slow upload keeps no model idle. There
are twice as many seats as places: who has a seat waits for at most as many others, in the order
they came, and is never turned away after that.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from service.errors import Overloaded

_SEATS_PER_PLACE = 2
_RETRY_SECONDS = 5


class Admission:
    """Counts who is in, on one event loop."""

    def __init__(self, places: int) -> None:
        self._free = anyio.Semaphore(places)
        self._seats = _SEATS_PER_PLACE * places
        self._seated = 0

    @property
    def seated(self) -> int:
        """Requests that are in."""
        return self._seated

    @asynccontextmanager
    async def seat(self) -> AsyncIterator[None]:
        """A seat, for as long as the request is being taken in and run.

        Raises:
            Overloaded: every seat is taken.
        """
        if self._seated >= self._seats:
            raise Overloaded(
                f"{self._seated} requests are running or waiting, and {self._seats} may; nothing "
                "was started",
                retry_after=_RETRY_SECONDS,
            )
        self._seated += 1
        try:
            yield
        finally:
            self._seated -= 1

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """A place to run, in the order of asking; the wait ends early only by cancelling it."""
        async with self._free:
            yield

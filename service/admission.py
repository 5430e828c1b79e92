"""Who may start: a bounded number of runs, and an answer at once for the rest.

    arrival ──── a seat? ──── body ──── a place? ──── run
                   │                      │
               Overloaded             Overloaded

A seat is taken before the body is read, so that nothing is uploaded in vain; a place is taken
only for the run, so that a slow upload keeps no model idle. There are twice as many seats as
places.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from service.errors import Overloaded

_SEATS_PER_PLACE = 2
_WAIT_SECONDS = 5.0
_RETRY_SECONDS = 5


class Admission:
    """Counts who is in, on one event loop."""

    def __init__(self, places: int, *, wait_seconds: float = _WAIT_SECONDS) -> None:
        self._places = places
        self._free = anyio.Semaphore(places)
        self._seats = _SEATS_PER_PLACE * places
        self._seated = 0
        self._wait_seconds = wait_seconds

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
        """A place to run, after a short wait if need be.

        Raises:
            Overloaded: no place came free in time.
        """
        with anyio.move_on_after(self._wait_seconds) as waiting:
            await self._free.acquire()
        if waiting.cancelled_caught:
            raise Overloaded(
                f"{self._places} runs may go on at once, and none ended within "
                f"{self._wait_seconds:g} s; nothing was started",
                retry_after=_RETRY_SECONDS,
            )
        try:
            yield
        finally:
            self._free.release()

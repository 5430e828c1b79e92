"""An event loop whose time passes only while all its tasks wait for a time."""

from __future__ import annotations

import asyncio
import selectors
from typing import Any


class _Jumps(selectors.DefaultSelector):
    """Does not wait for a time: it moves the clock there."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0 if timeout else timeout)
        if timeout and not ready:
            self.now += timeout
        return ready


class JumpingClock(asyncio.SelectorEventLoop):
    """An event loop for tests of time limits: a machine's load does not change what they measure.

    Code that it runs must not use threads, because time passes while they work.
    """

    def __init__(self) -> None:
        self._clock = _Jumps()
        super().__init__(self._clock)

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self._clock.now

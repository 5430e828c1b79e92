"""Waiting in tests: for events and states, with one generous time limit.

No test depends on time. It waits for an event or a state, and `PATIENCE` only ends a wait for one
that never comes: on a machine with twenty times the load, everything takes twenty times as long.
"""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 300.0
"""Seconds after which a wait fails, for sockets, processes, threads, queues and HTTP clients."""


def soon(true: Callable[[], bool], *, pause: float = 0.01) -> bool:
    """Wait until a condition holds.

    Args:
        true: the condition, called again and again until it holds.
        pause: seconds between two calls.

    Returns:
        Whether it held before `PATIENCE` had passed.
    """
    end = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
    return True

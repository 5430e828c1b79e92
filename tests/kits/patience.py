"""Waiting in tests: for events and states, with one generous time limit.

No test depends on time. It waits for an event or a state, and `PATIENCE` only ends a wait for one
that never comes: on a machine with twenty times the load, everything takes twenty times as long.
"""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 300.0
"""Seconds after which a wait fails, for sockets, processes, threads, queues and HTTP clients."""


_LONGEST_PAUSE = 0.2


def soon(true: Callable[[], bool], *, pause: float = 0.01) -> bool:
    """Wait until a condition holds, which it then keeps doing.

    Args:
        true: the condition, called again and again until it holds.
        pause: seconds between the first two calls; later pauses are an eighth of what has passed.

    Returns:
        Whether it held before `PATIENCE` had passed.
    """
    begun = time.monotonic()
    while not true():
        waited = time.monotonic() - begun
        if waited > PATIENCE:
            return False
        # A look, often a request, takes processor time from the work that is waited for.
        time.sleep(min(max(waited / 8, pause), _LONGEST_PAUSE))
    return True

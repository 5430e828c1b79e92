"""How long a test waits for what must come.

No test proves anything by the clock. It waits for an event or a state, and `PATIENCE` ends a wait
that has become hopeless: on a machine with twenty times its load everything takes twenty times as
long, and still comes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 300.0
"""Seconds until a wait is given up, for sockets, processes, threads, queues and HTTP clients."""


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

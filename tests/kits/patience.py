"""Waiting in tests: for events and states, with one generous time limit.

No test depends on time. It waits for an event or a state, and `PATIENCE` only ends a wait for one
that never comes: on a machine with twenty times the load, everything takes twenty times as long.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

PATIENCE = 300.0
"""Seconds after which a wait fails, for sockets, processes, threads, queues and HTTP clients."""


_LONGEST_PAUSE = 0.2


def soon(true: Callable[[], bool], *, pause: float = 0.01) -> bool:
    """Wait until a condition holds, which it then keeps doing.

    Args:
        true: the condition, called again and again until it holds. It does not hold yet if a file
            or folder that it looks at is removed meanwhile.
        pause: seconds between the first two calls; later pauses are an eighth of what has passed.

    Returns:
        Whether it held before `PATIENCE` had passed.
    """

    def holds() -> bool:
        try:
            return true()
        except FileNotFoundError:
            return False

    begun = time.monotonic()
    while not holds():
        waited = time.monotonic() - begun
        if waited > PATIENCE:
            return False
        # A look, often a request, takes processor time from the work that is waited for.
        time.sleep(min(max(waited / 8, pause), _LONGEST_PAUSE))
    return True


def files_below(folder: Path, pattern: str) -> list[Path]:
    """Files of a name in a folder and below it, from which others are removed meanwhile.

    `Path.rglob` fails if a folder is removed while it looks into it.
    """
    return [
        Path(root) / name
        for root, _, names in os.walk(folder)
        for name in names
        if fnmatch(name, pattern)
    ]

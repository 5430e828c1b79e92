"""Supervised threads: a loop that fails is logged and run again, or stops the service.

run ──▶ fails ──▶ log, wait, run again
             └──▶ failed too often in a row: `failed`, which readiness and the server check
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

_LOG = logging.getLogger(__name__)
_MOST_FAILURES = 8
"""Failures in a row after which the loop is not run again: about two minutes with the pauses."""
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 60.0
_CALM_SECONDS = 300.0
"""After a run of at least so many seconds, the next failure counts as the first."""


class SupervisedThread:
    """A long-lived thread whose loop is run again if it fails.

    Args:
        name: name of the thread, for logs.
        loop: function that runs until the service stops; an exception that it raises is logged.
        stop: event that is set when the service stops, and after which the loop must end soon;
            None if the loop runs until the process ends.
    """

    def __init__(
        self, name: str, loop: Callable[[], None], stop: threading.Event | None = None
    ) -> None:
        self.name = name
        self._loop = loop
        self._stop = stop or threading.Event()
        self._thread = threading.Thread(target=self._supervise, name=name, daemon=True)
        self.failed = False
        """Whether the loop failed too often and is no longer run."""

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread's end.

        Args:
            timeout: seconds to wait at most; None waits without a limit.

        Returns:
            Whether the thread has ended.
        """
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def _supervise(self) -> None:
        failures = 0
        while True:
            begun = time.monotonic()
            try:
                self._loop()
            except Exception:  # noqa: BLE001 - the service needs the loop after any error
                calm = time.monotonic() - begun >= _CALM_SECONDS
                failures = 1 if calm else failures + 1
                _LOG.exception("thread failed", extra={"loop": self.name, "failures": failures})
                if failures >= _MOST_FAILURES:
                    self.failed = True
                    _LOG.critical(
                        "thread failed too often and is not run again", extra={"loop": self.name}
                    )
                    return
                pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (failures - 1))
                if self._stop.wait(pause):
                    return
            else:
                return

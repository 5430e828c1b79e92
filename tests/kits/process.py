"""Processes that tests start, and where they listen."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Queue

from tests.kits.patience import PATIENCE

ROOT = Path(__file__).parents[2]
RUNNING = re.compile(r"running on http://\S*?:(\d+)")
"""The line of a log that names the port."""


class Process:
    """A process whose log, on standard error, names the address at which it listens.

    Args:
        command: program and arguments; it runs in the root of the repository.
        address: pattern of the address in the log, as a group.
        variables: environment in addition to that of the tests.
        before: called in the process before the program begins.
    """

    def __init__(
        self,
        command: Sequence[str],
        address: str,
        *,
        variables: dict[str, str] | None = None,
        before: Callable[[], object] | None = None,
    ) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(variables or {})},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            preexec_fn=before,
        )
        self.log: list[str] = []
        self._found: Queue[str | None] = Queue()
        # The log is read continuously, because a full pipe would block the process.
        self._reader = threading.Thread(target=self._listen, args=(address,), daemon=True)
        self._reader.start()

    def _listen(self, address: str) -> None:
        for line in self.process.stderr or ():
            self.log.append(line)
            if found := re.search(address, line):
                self._found.put(found[1])
        self._found.put(None)

    def address(self) -> str:
        """Wait until it listens, and return its address."""
        found = self._found.get(timeout=PATIENCE)
        if found is None:
            raise RuntimeError(f"it ended with {self.process.wait()}: {''.join(self.log)}")
        return found

    def kill(self) -> None:
        """Kill it without notice, as a power failure would; does nothing if it has ended."""
        self.process.kill()
        self.end()

    def end(self) -> int:
        """Wait for the end of the process and read the rest of its log; returns its exit code."""
        code = self.process.wait(PATIENCE)
        self._reader.join()
        if self.process.stderr:
            self.process.stderr.close()
        return code

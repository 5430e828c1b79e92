"""Processes that tests start, and where they listen."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Sequence
from queue import Queue

from tests.kits.forks import ROOT, Forked
from tests.kits.patience import PATIENCE

RUNNING = re.compile(r"running on http://\S*?:(\d+)")
"""The line of a log that names the port."""


class Process:
    """A process whose log, on standard error, names the address at which it listens.

    Args:
        process: the process.
        address: pattern of the address in the log, as a group.
    """

    def __init__(self, process: Forked | subprocess.Popen[str], address: str) -> None:
        self.process = process
        self.log: list[str] = []
        self._found: Queue[str | None] = Queue()
        # The log is read continuously, because a full pipe would block the process.
        self._reader = threading.Thread(target=self._listen, args=(address,), daemon=True)
        self._reader.start()

    @staticmethod
    def program(command: Sequence[str]) -> subprocess.Popen[str]:
        """Start a program with its arguments, in the root of the repository."""
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )

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

"""A Dask cluster of processes on the loopback interface, for tests.

    python -m tests.kits.cluster FOLDER SCHEDULER [VERSION]    runs a worker

A worker has a folder of its own. It appends each window that it begins to the file `windows`, and
then waits at the gate `gate` if the window is of the held model.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any
from unittest.mock import patch

from tests.kits.gate import Gate
from tests.kits.patience import PATIENCE

ROOT = Path(__file__).parents[2]
_QUIET = ["--no-dashboard"]


class Process:
    """A process of Dask, whose log is read until it ends."""

    def __init__(self, arguments: list[str], **variables: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **variables},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        self.log: list[str] = []
        self._found: Queue[str | None] = Queue()
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def _listen(self) -> None:
        for line in self.process.stderr or ():
            self.log.append(line)
            if found := re.search(r"(?:Scheduler at|Start worker at): +(\S+)", line):
                self._found.put(found[1])
        self._found.put(None)

    def address(self) -> str:
        """Wait until it listens, and return its address."""
        found = self._found.get(timeout=PATIENCE)
        if found is None:
            raise RuntimeError("".join(self.log))
        return found

    def kill(self) -> None:
        """End it as a power failure would."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)
        self._reader.join()
        if self.process.stderr:
            self.process.stderr.close()


@dataclass
class Worker:
    """A worker of one thread, in a process of its own."""

    folder: Path
    process: Process

    @property
    def gate(self) -> Gate:
        """Holds its windows."""
        return Gate(self.folder / "gate")

    @property
    def windows(self) -> list[str]:
        """The windows that it has begun to read."""
        file = self.folder / "windows"
        return file.read_text().splitlines() if file.exists() else []

    def stop(self) -> None:
        """Let it hang."""
        self.process.process.send_signal(signal.SIGSTOP)


@dataclass
class DaskCluster:
    """A scheduler and its workers."""

    folder: Path
    variables: dict[str, str]
    """Environment of workers."""
    scheduler: Process
    address: str
    workers: list[Worker] = field(default_factory=list)

    def join(self, *, version: str = "", held_after: int = -1, **variables: str) -> Worker:
        """Start a worker, without waiting until it has joined.

        Args:
            version: version of the project that it claims to have; empty for its own.
            held_after: number of windows of the held model that it computes before its gate holds
                the next; -1 for an open gate.
            variables: environment in addition to that of all workers.
        """
        folder = self.folder / f"worker-{len(self.workers)}"
        folder.mkdir()
        if held_after >= 0:
            Gate(folder / "gate").hold(after=held_after)
        arguments = ["tests.kits.cluster", str(folder), self.address, version]
        worker = Worker(folder, Process(arguments, **{**self.variables, **variables}))
        self.workers.append(worker)
        return worker

    def kill_scheduler(self) -> None:
        """End the scheduler as a power failure would."""
        self.scheduler.kill()

    def start_scheduler(self) -> None:
        """Start a scheduler at the same address."""
        self.scheduler = _scheduler(self.address.rpartition(":")[2])
        assert self.scheduler.address() == self.address

    def close(self) -> None:
        """Kill all processes."""
        for worker in self.workers:
            worker.process.kill()
        self.scheduler.kill()


def _scheduler(port: str) -> Process:
    host = ["--host", "127.0.0.1", "--port", port]
    return Process(["distributed.cli.dask_scheduler", *host, *_QUIET])


@contextmanager
def dask_cluster(folder: Path, **variables: str) -> Iterator[DaskCluster]:
    """A scheduler without workers; all processes are killed at the end of the context.

    Args:
        folder: empty folder of the workers.
        variables: environment of the workers, with the service's `PIMC_STATE_DIR`.
    """
    scheduler = _scheduler("0")
    try:
        cluster = DaskCluster(folder, variables, scheduler, scheduler.address())
    except BaseException:
        scheduler.kill()
        raise
    try:
        yield cluster
    finally:
        cluster.close()


def _work(folder: Path, address: str, version: str) -> None:
    """Run a worker until it is killed."""
    from distributed.cli.dask_worker import main

    from service.infer.engine import load_models
    from service.run import worker as tasks
    from service.run.pixels import PixelStages

    with ExitStack() as stack:
        if version:
            stack.enter_context(patch.object(tasks, "project_version", lambda: version))
        without = partial(load_models, built_in=None)  # they take longer than the rest of a start
        stack.enter_context(patch.object(tasks, "load_models", without))
        stack.enter_context(Gate(folder / "gate").installed(leave=True))
        read = PixelStages.read

        def counted(stages: Any, window: Any) -> Any:
            with (folder / "windows").open("a") as file:
                file.write(f"{window.col_off} {window.row_off}\n")
            return read(stages, window)

        stack.enter_context(patch.object(PixelStages, "read", counted))
        main(
            [
                *(address, "--nthreads", "1", "--no-nanny", "--host", "127.0.0.1", *_QUIET),
                *("--local-directory", str(folder), "--memory-limit", "0"),
            ],
            standalone_mode=False,
        )


if __name__ == "__main__":
    _work(Path(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else "")

"""A Dask cluster of processes on the loopback interface, for tests.

    python -m tests.kits.cluster FOLDER SCHEDULER [VERSION [int8]]    runs a worker

A worker has a folder of its own. It appends each window that it begins to the file `windows`, and
then waits at the gate `gate` if the window is of the held model. Its requests for remote files have
the header `BY_WORKER`.
"""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx

from tests.kits.forks import Forked
from tests.kits.gate import Gate
from tests.kits.metrics import metric
from tests.kits.patience import soon
from tests.kits.process import Process

_QUIET = ["--no-dashboard"]
BY_WORKER = "X-Test-Worker"
"""Header of a worker's requests for remote files."""


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

    def join(
        self, *, version: str = "", int8: bool = False, held_after: int = -1, **variables: str
    ) -> Worker:
        """Start a worker, without waiting until it has joined.

        Args:
            version: version of the project that it claims to have; empty for its own.
            int8: whether it runs as if its processor had instructions for int8.
            held_after: number of windows of the held model that it computes before its gate holds
                the next; -1 for an open gate.
            variables: environment in addition to that of all workers.
        """
        folder = self.folder / f"worker-{len(self.workers)}"
        folder.mkdir()
        if held_after >= 0:
            Gate(folder / "gate").hold(after=held_after)
        arguments = ["tests.kits.cluster", str(folder), self.address, version]
        arguments += ["int8"] * int8
        worker = Worker(folder, _started(arguments, **{**self.variables, **variables}))
        self.workers.append(worker)
        return worker

    def kill_scheduler(self) -> None:
        """End the scheduler as a power failure would."""
        self.scheduler.kill()

    def start_scheduler(self) -> None:
        """Start a scheduler at the same address."""
        protocol, _, place = self.address.partition("://")
        self.scheduler = _scheduler(place.rpartition(":")[2], protocol)
        assert self.scheduler.address() == self.address

    def close(self) -> None:
        """Kill all processes."""
        for worker in self.workers:
            worker.process.kill()
        self.scheduler.kill()


def _scheduler(port: str, protocol: str, **variables: str) -> Process:
    host = ["--host", "127.0.0.1", "--port", port, "--protocol", protocol]
    return _started(["distributed.cli.dask_scheduler", *host, *_QUIET], **variables)


def _started(module: Sequence[str], **variables: str) -> Process:
    """A module of Dask or of this kit, with its arguments, as a process."""
    process = Forked(*module, variables=variables)
    return Process(process, r"(?:Scheduler at|Start worker at): +(\S+)")


@contextmanager
def dask_cluster(folder: Path, *, protocol: str = "tcp", **variables: str) -> Iterator[DaskCluster]:
    """A scheduler without workers; all processes are killed at the end of the context.

    Args:
        folder: empty folder of the workers.
        protocol: `tcp`, or `tls` with certificates in the environment.
        variables: environment of the workers, with the service's `PIMC_STATE_DIR`; those of Dask
            are the scheduler's as well.
    """
    dask = {name: value for name, value in variables.items() if name.startswith("DASK_")}
    scheduler = _scheduler("0", protocol, **dask)
    try:
        cluster = DaskCluster(folder, variables, scheduler, scheduler.address())
    except BaseException:
        scheduler.kill()
        raise
    try:
        yield cluster
    finally:
        cluster.close()


class Fleet:
    """A cluster, and the settings of a service whose jobs it runs; they share a folder.

    Args:
        folder: empty folder of the workers and of the state.
        zoo: folder of the bundles.
        stack: ends the cluster.
        variables: further environment of the workers.
        settings: further settings of the service.
    """

    def __init__(
        self,
        folder: Path,
        zoo: Path,
        stack: ExitStack,
        variables: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        self.state = folder / "state"
        (folder / "workers").mkdir()
        self.cluster: DaskCluster = stack.enter_context(
            dask_cluster(
                folder / "workers",
                PIMC_STATE_DIR=str(self.state),
                PIMC_MODEL_DIR=str(zoo),
                PIMC_PROVIDERS="cpu",
                **(variables or {}),
            )
        )
        self.settings: dict[str, Any] = {
            "model_dir": zoo,
            "state_dir": self.state,
            "dask_scheduler": self.cluster.address,
            **settings,
        }

    def begun(self, *workers: Worker) -> Counter[str]:
        """How often each window was begun, by some workers or all."""
        return Counter(w for worker in workers or self.cluster.workers for w in worker.windows)


def ready(api: httpx.Client) -> dict[str, Any]:
    """The member `cluster` of the readiness response."""
    response = api.get("/health/ready")
    assert response.status_code == 200, response.text
    return dict(response.json()["cluster"])


def joined(api: httpx.Client, count: int) -> None:
    """Wait until the service sees a number of workers."""
    assert soon(lambda: ready(api)["workers"] == count)


def outcome(api: httpx.Client, name: str) -> float:
    """Number of windows with an outcome, such as `written`."""
    return metric(api, f'pimc_cluster_windows_total{{outcome="{name}"}}')


def _work(folder: Path, address: str, version: str, *, int8: bool) -> None:
    """Run a worker until it is killed."""
    from distributed.cli.dask_worker import main

    from service.infer import session
    from service.infer.engine import load_models
    from service.read.connect import Connections
    from service.run import worker as tasks
    from service.run.pixels import PixelStages

    with ExitStack() as stack:
        if int8:
            stack.enter_context(patch.object(session, "multiplies_int8", lambda: True))
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
        send = Connections._send

        def named(web: Any, remote: Any, method: str, headers: Any, content: Any) -> Any:
            return send(web, remote, method, {**headers, BY_WORKER: "1"}, content)

        stack.enter_context(patch.object(Connections, "_send", named))
        main(
            [
                *(address, "--nthreads", "1", "--no-nanny", "--host", "127.0.0.1", *_QUIET),
                *("--local-directory", str(folder), "--memory-limit", "0"),
            ],
            standalone_mode=False,
        )


if __name__ == "__main__":
    _work(Path(sys.argv[1]), sys.argv[2], "".join(sys.argv[3:4]), int8="int8" in sys.argv[4:])

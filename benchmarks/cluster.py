"""A job on a Dask cluster: two workers of one core each against one of them.

    python -m benchmarks.cluster [--side 2048] [--out cluster.json]

A scheduler, the workers and the service are processes of this machine. Each worker has a core of
its own; the service and the scheduler have what the workers leave. The same job runs on one worker
and then on both. On a busy machine the clock means little: processor seconds show what the second
worker costs, and what the service does while the workers compute.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.landscape import write_stack
from benchmarks.process import ROOT, Served, machine, processor_seconds, served

BAR = 1.85
"""Speed of two workers, as a multiple of that of one."""
FEWEST_WINDOWS = 256
_TILE = 128
_DATES = 24
_BUDGET = "256MiB"
"""Memory budget of the service with which a window is one tile."""
_PATIENCE = 600.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the job."""

    workers: int
    windows: int
    seconds: float
    """Seconds from the start of the job's run to its success, by the clock."""
    worker_seconds: tuple[float, ...]
    """Processor seconds of each worker."""
    service_seconds: float
    """Processor seconds of the service."""
    scheduler_seconds: float
    """Processor seconds of the scheduler."""
    sha256: str
    """SHA-256 of the result."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The same job on one worker and on two."""

    one: Run
    two: Run

    @property
    def ratio(self) -> float:
        """How much faster two workers are."""
        return self.one.seconds / self.two.seconds

    @property
    def overhead(self) -> float:
        """Processor time of service and scheduler, relative to that of the workers."""
        own = self.two.service_seconds + self.two.scheduler_seconds
        return own / sum(self.two.worker_seconds)


def measure(side: int) -> Compared:
    """Run the job on one worker and on two.

    Args:
        side: width and height of the raster, pixels.

    Raises:
        RuntimeError: a job failed, had fewer windows than `FEWEST_WINDOWS`, or the two results
            differ.
    """
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise RuntimeError("two workers of one core each need two cores")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pimc-cluster-")))
        tiles = {"blockxsize": _TILE, "blockysize": _TILE}
        for name in ("files", "small"):
            (folder / name).mkdir()
        files = write_stack(folder / "files", side, _DATES, **tiles)
        small = write_stack(folder / "small", 2 * _TILE, _DATES, **tiles)
        shared = {
            "PIMC_STATE_DIR": str(folder / "state"),
            "PIMC_ALLOWED_ROOTS": f"{folder / 'files'},{folder / 'small'}",
            "PIMC_PROVIDERS": "cpu",
        }
        (folder / "state").mkdir()
        scheduler, address = stack.enter_context(_scheduler(folder))
        shared |= {"PIMC_DASK_SCHEDULER": address}
        service = stack.enter_context(served(PIMC_MEMORY_BUDGET=_BUDGET, **shared))
        start = partial(_worker, folder, address, shared)
        workers = [stack.enter_context(start(cores[0]))]
        one = _job(service, scheduler, workers, files, small)
        workers.append(stack.enter_context(start(cores[1])))
        two = _job(service, scheduler, workers, files, small)
    if one.sha256 != two.sha256:
        raise RuntimeError("the results of one worker and of two differ")
    return Compared(one=one, two=two)


def _job(
    service: Served,
    scheduler: int,
    workers: Sequence[int],
    files: Sequence[Path],
    small: Sequence[Path],
) -> Run:
    _wait(lambda: service.metric("pimc_cluster_workers") == len(workers), "workers join")
    # Jobs of a few windows first: models load, and each process does what it does only once.
    for _ in workers:
        _finished(service, small)
    begun = service.metric("pimc_job_seconds_sum")
    written = service.metric("pimc_cluster_windows_total")
    used = [processor_seconds(pid) for pid in (*workers, service.process.pid, scheduler)]
    result = _finished(service, files)
    spent = [
        processor_seconds(pid) - before
        for pid, before in zip((*workers, service.process.pid, scheduler), used, strict=True)
    ]
    windows = int(service.metric("pimc_cluster_windows_total") - written)
    if windows < FEWEST_WINDOWS:
        raise RuntimeError(f"{windows} windows are fewer than {FEWEST_WINDOWS}: raise --side")
    return Run(
        workers=len(workers),
        windows=windows,
        seconds=service.metric("pimc_job_seconds_sum") - begun,
        worker_seconds=tuple(spent[: len(workers)]),
        service_seconds=spent[-2],
        scheduler_seconds=spent[-1],
        sha256=hashlib.sha256(result).hexdigest(),
    )


def _finished(service: Served, files: Sequence[Path]) -> bytes:
    """The class map of a job."""
    request = urllib.request.Request(  # noqa: S310 - ours
        f"{service.url}/classify-pixels",
        json.dumps({"items": [{"href": str(path)} for path in files]}).encode(),
        {"Content-Type": "application/json", "Prefer": "respond-async"},
    )
    with urllib.request.urlopen(request, timeout=_PATIENCE) as response:  # noqa: S310 - ours
        job = json.load(response)["jobID"]
    status: dict[str, Any] = {}

    def ended() -> bool:
        status.update(json.loads(service.get(f"/jobs/{job}")))
        return status["status"] in {"successful", "failed"}

    _wait(ended, "the job ends")
    if status["status"] != "successful":
        raise RuntimeError(f"the job failed: {status}")
    with urllib.request.urlopen(  # noqa: S310 - ours
        f"{service.url}/jobs/{job}/result/class", timeout=_PATIENCE
    ) as response:
        return bytes(response.read())


def _wait(true: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + _PATIENCE
    while not true():
        if time.monotonic() > until:
            raise RuntimeError(f"waited {_PATIENCE:g} s until {what}")
        time.sleep(0.5)


@contextmanager
def _scheduler(folder: Path) -> Iterator[tuple[int, str]]:
    """The process and the address of a scheduler."""
    log = folder / "scheduler.log"
    arguments = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--no-jupyter"]
    with _started(["distributed.cli.dask_scheduler", *arguments], log) as process:
        found: list[str] = []

        def listens() -> bool:
            found[:] = re.findall(r"Scheduler at: +(\S+)", log.read_text())
            return bool(found)

        _wait(listens, "the scheduler listens")
        yield process, found[0]


@contextmanager
def _worker(folder: Path, address: str, environment: dict[str, str], core: int) -> Iterator[int]:
    """The process of a worker of one thread, on one core."""
    arguments = [address, "--nthreads", "1", "--no-nanny", "--host", "127.0.0.1"]
    arguments += ["--no-dashboard", "--memory-limit", "0", "--local-directory", str(folder)]
    command = ["distributed.cli.dask_worker", *arguments]
    with _started(command, folder / f"worker-{core}.log", environment, core) as process:
        yield process


@contextmanager
def _started(
    command: Sequence[str],
    log: Path,
    environment: dict[str, str] | None = None,
    core: int | None = None,
) -> Iterator[int]:
    """A module as a process, which is killed at the end."""
    pinned = None if core is None else partial(os.sched_setaffinity, 0, {core})
    with log.open("wb") as file:
        process = subprocess.Popen(  # noqa: S603 - ours
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stderr=file,
            stdout=file,
            preexec_fn=pinned,
        )
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", type=int, default=2048, help="side of the raster, pixels")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    compared = measure(options.side)
    for run in (compared.one, compared.two):
        each = " + ".join(f"{seconds:.1f}" for seconds in run.worker_seconds)
        print(
            f"{run.workers} worker(s): {run.windows} windows in {run.seconds:.1f} s; processor "
            f"seconds: workers {each}, service {run.service_seconds:.1f}, scheduler "
            f"{run.scheduler_seconds:.1f}"
        )
    reached = "reached" if compared.ratio >= BAR else "not reached"
    print(f"ratio {compared.ratio:.2f}; the target of {BAR} is {reached}")
    print(f"service and scheduler take {compared.overhead:.1%} of the workers' processor time")
    if options.out:
        found = {"machine": machine(), "ratio": compared.ratio, "bar": BAR, **asdict(compared)}
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

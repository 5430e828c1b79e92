"""A job on a Dask cluster: two workers of one core each against one of them.

    python -m benchmarks.cluster [--side 2048] [--out cluster.json]
    python -m benchmarks.cluster --fetch service workers [--latency 0.02] [--threads 3]

With `--fetch` the files are on a web server, a process that waits `--latency` seconds a request:
`service` fetches them when it accepts the job, `workers` window by window; of several each is
measured in turn. Without it, service and workers read them in place.

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

import rasterio
import rasterio.warp

from benchmarks.landscape import write_stack
from benchmarks.process import ROOT, Served, machine, processor_seconds, served
from benchmarks.remote import range_server

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
    request_seconds: float
    """Seconds of the request that submits the job, in which the service may fetch files."""
    fetched_bytes: int
    """Bytes that the web server of the files sent for the job; 0 without one."""
    fetched_ranges: int
    """Requests that it got for the job."""
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

    fetch: str
    """Who fetches the files: `service`, `workers`, or `none` if they are read in place."""
    latency: float
    """Seconds that the web server of the files waits per request."""
    threads: int
    """Threads of each worker."""

    @property
    def ratio(self) -> float:
        """How much faster two workers are."""
        return self.one.seconds / self.two.seconds

    @property
    def overhead(self) -> float:
        """Processor time of service and scheduler, relative to that of the workers."""
        own = self.two.service_seconds + self.two.scheduler_seconds
        return own / sum(self.two.worker_seconds)


class _Files:
    """The files of the jobs, by path or by URL.

    Args:
        folder: folder of the files.
        url: of a web server of that folder; None names the files by path.
    """

    def __init__(self, folder: Path, url: str | None) -> None:
        self._folder = folder
        self._url = url
        self._jobs = 0

    def sent(self) -> tuple[int, int]:
        """Bytes and ranges that the web server has sent until now."""
        if self._url is None:
            return 0, 0
        with urllib.request.urlopen(f"{self._url}/sent", timeout=30) as response:  # noqa: S310 - ours
            found = json.load(response)
        return int(found["bytes"]), int(found["requests"])

    def request(self, paths: Sequence[Path]) -> dict[str, Any]:
        """The request for a map of files."""
        if self._url is None:
            return {"items": [{"href": str(path)} for path in paths]}
        self._jobs += 1  # URLs of their own, so that nothing is in a cache
        names = [path.relative_to(self._folder).as_posix() for path in paths]
        with rasterio.open(paths[0]) as file:
            bbox = rasterio.warp.transform_bounds(file.crs, "EPSG:4326", *file.bounds)
        items = [{"href": f"{self._url}/{name}?{self._jobs}"} for name in names]
        return {"items": items, "bbox": bbox}


def measure(side: int, *, fetch: str = "none", latency: float = 0.0, threads: int = 1) -> Compared:
    """Run the job on one worker and on two.

    Args:
        side: width and height of the raster, pixels.
        fetch: see `Compared`.
        latency: see `Compared`.
        threads: see `Compared`.

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
        url = None
        if fetch != "none":
            url = stack.enter_context(range_server(folder, latency))
            shared |= {"PIMC_ALLOWED_HOSTS": "127.0.0.1", "PIMC_DASK_FETCH": fetch}
        (folder / "state").mkdir()
        scheduler, address = stack.enter_context(_scheduler(folder))
        shared |= {"PIMC_DASK_SCHEDULER": address}
        service = stack.enter_context(served(PIMC_MEMORY_BUDGET=_BUDGET, **shared))
        start = partial(_worker, folder, address, shared, threads)
        workers = [stack.enter_context(start(cores[0]))]
        named = _Files(folder, url)
        one = _job(service, scheduler, workers, named, files, small)
        workers.append(stack.enter_context(start(cores[1])))
        two = _job(service, scheduler, workers, named, files, small)
    if one.sha256 != two.sha256:
        raise RuntimeError("the results of one worker and of two differ")
    return Compared(one=one, two=two, fetch=fetch, latency=latency, threads=threads)


def _job(
    service: Served,
    scheduler: int,
    workers: Sequence[int],
    named: _Files,
    files: Sequence[Path],
    small: Sequence[Path],
) -> Run:
    _wait(lambda: service.metric("pimc_cluster_workers") == len(workers), "workers join")
    # Jobs of a few windows first: models load, and each process does what it does only once.
    for _ in workers:
        _finished(service, named.request(small))
    begun = service.metric("pimc_job_seconds_sum")
    written = service.metric("pimc_cluster_windows_total")
    used = [processor_seconds(pid) for pid in (*workers, service.process.pid, scheduler)]
    sent = named.sent()
    result, request_seconds = _finished(service, named.request(files))
    fetched = [now - before for now, before in zip(named.sent(), sent, strict=True)]
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
        request_seconds=request_seconds,
        fetched_bytes=fetched[0],
        fetched_ranges=fetched[1],
        worker_seconds=tuple(spent[: len(workers)]),
        service_seconds=spent[-2],
        scheduler_seconds=spent[-1],
        sha256=hashlib.sha256(result).hexdigest(),
    )


def _finished(service: Served, body: dict[str, Any]) -> tuple[bytes, float]:
    """The class map of a job, and the seconds of the request that submitted it."""
    request = urllib.request.Request(  # noqa: S310 - ours
        f"{service.url}/classify-pixels",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Prefer": "respond-async"},
    )
    begun = time.monotonic()
    with urllib.request.urlopen(request, timeout=_PATIENCE) as response:  # noqa: S310 - ours
        job = json.load(response)["jobID"]
    submitting = time.monotonic() - begun
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
        return bytes(response.read()), submitting


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
def _worker(
    folder: Path, address: str, environment: dict[str, str], threads: int, core: int
) -> Iterator[int]:
    """The process of a worker, on one core."""
    arguments = [address, "--nthreads", str(threads), "--no-nanny", "--host", "127.0.0.1"]
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
    parser.add_argument(
        "--fetch",
        nargs="+",
        choices=("none", "service", "workers"),
        default=["none"],
        help="who fetches the files from a web server; none reads them in place",
    )
    parser.add_argument("--latency", type=float, default=0.02, help="of that server, seconds")
    parser.add_argument("--threads", type=int, default=1, help="threads of each worker")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    found = []
    for fetch in options.fetch:
        compared = measure(
            options.side, fetch=fetch, latency=options.latency, threads=options.threads
        )
        print(f"files fetched by: {fetch}")
        _print(compared)
        found.append({"ratio": compared.ratio, **asdict(compared)})
        if options.out:  # after each, because the next takes minutes
            document = {"machine": machine(), "bar": BAR, "compared": found}
            options.out.write_text(json.dumps(document, indent=1))


def _print(compared: Compared) -> None:
    for run in (compared.one, compared.two):
        each = " + ".join(f"{seconds:.1f}" for seconds in run.worker_seconds)
        print(
            f"{run.workers} worker(s): {run.windows} windows in {run.seconds:.1f} s, after a "
            f"request of {run.request_seconds:.1f} s; processor seconds: workers {each}, service "
            f"{run.service_seconds:.1f}, scheduler {run.scheduler_seconds:.1f}"
        )
        if run.fetched_ranges:
            print(f"fetched: {run.fetched_bytes / 1e6:.0f} MB in {run.fetched_ranges} ranges")
    reached = "reached" if compared.ratio >= BAR else "not reached"
    print(f"ratio {compared.ratio:.2f}; the target of {BAR} is {reached}")
    print(f"service and scheduler take {compared.overhead:.1%} of the workers' processor time")


if __name__ == "__main__":
    main()

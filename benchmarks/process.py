"""The service as a process: its address, memory and leftover files."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

ROOT = Path(__file__).parents[1]
_START_SECONDS = 120.0
_STOP_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Served:
    """A running service."""

    process: subprocess.Popen[bytes]
    host: str
    port: int
    scratch: Path
    """The folder of the service's temporary files."""
    log: Path
    at_start: frozenset[Path]
    """Files in that folder once the service is ready: ONNX Runtime writes one when imported."""
    ready_seconds: float
    """Seconds from the start of the process until the service is ready."""

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://{self.host}:{self.port}"

    def get(self, path: str) -> str:
        """The body of a response."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=30) as response:  # noqa: S310 - ours
            return str(response.read().decode())

    def metric(self, name: str, labels: str = ".*") -> float:
        """The sum of a metric over those of its labels that match an expression."""
        pattern = rf"^{name}(?:\{{{labels}\}})? (\S+)$"
        lines = re.findall(pattern, self.get("/metrics"), re.MULTILINE)
        return sum(map(float, lines))

    def leftovers(self) -> list[str]:
        """Temporary files that are left."""
        found = below(self.scratch) - self.at_start
        return sorted(str(path.relative_to(self.scratch)) for path in found)

    def resident(self) -> int:
        """Resident memory of the process and its children, bytes."""
        return sum(_status(pid, "VmRSS") for pid in _family(self.process.pid))

    def processor_seconds(self) -> float:
        """Processor time of the process so far, seconds."""
        return processor_seconds(self.process.pid)

    def peak(self) -> int:
        """Peak resident memory of the process since its start or `forget_peak`, bytes."""
        return peak_memory(self.process.pid)

    def forget_peak(self) -> None:
        """Reset the peak."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")


def below(folder: Path) -> frozenset[Path]:
    """All files and folders in a folder; `rglob` fails if one is removed while it looks into it."""
    return frozenset(
        Path(place) / name for place, names, files in os.walk(folder) for name in (*names, *files)
    )


def started(environment: Mapping[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start `python -m service`; its log goes to a file."""
    return subprocess.Popen(
        [sys.executable, "-m", "service"], env=environment, stderr=log, cwd=ROOT
    )


@contextmanager
def served(**settings: str) -> Iterator[Served]:
    """Run `python -m service` on a free port, with its own folder for temporary files.

    Args:
        settings: further environment variables.

    Raises:
        RuntimeError: the service ended before it was ready, or did not stop in time.
    """
    with tempfile.TemporaryDirectory(prefix="pimc-bench-") as own:
        folder = Path(own)
        scratch, log, state = folder / "scratch", folder / "log", folder / "state"
        scratch.mkdir()
        state.mkdir()
        environment = {
            **os.environ,
            "TMPDIR": str(scratch),
            "PIMC_PORT": "0",
            "PIMC_STATE_DIR": str(state),
            **settings,
        }
        begun = time.perf_counter()
        with log.open("wb") as file:
            process = started(environment, file)
        try:
            host, port = _address(process, log)
            service = Served(
                process=process,
                host=host,
                port=port,
                scratch=scratch,
                log=log,
                at_start=below(scratch),
                ready_seconds=time.perf_counter() - begun,
            )
            service.get("/health/ready")
            yield service
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise RuntimeError(
                    f"the service did not stop within {_STOP_SECONDS:g} s of SIGTERM"
                ) from None


def _address(process: subprocess.Popen[bytes], log: Path) -> tuple[str, int]:
    """The service's address, from its log once it is ready."""
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        for line in log.read_text().splitlines():
            found = re.search(r"running on http://([\d.]+):(\d+)", json.loads(line)["message"])
            if found:
                return found[1], int(found[2])
        time.sleep(0.005)
    raise RuntimeError(f"the service did not start: {log.read_text()[-2000:]}")


def processor_seconds(pid: int) -> float:
    """Processor time of a process so far, seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_memory(pid: int) -> int:
    """Peak resident memory of a process, bytes; 0 once it has ended."""
    return _status(pid, "VmHWM")


def _family(pid: int) -> list[int]:
    """A process and its children that still run."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return [pid]
    return [pid, *(each for child in text.split() for each in _family(int(child)))]


def _status(pid: int, field_name: str) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # the process has ended
        return 0
    found = re.search(rf"^{field_name}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


@dataclass(kw_only=True)
class Sampler:
    """Samples a number at intervals, in a thread; a context manager."""

    take: Callable[[], float]
    seconds: float = 1.0
    samples: list[tuple[float, float]] = field(default_factory=list)
    """Seconds since the start, and the number."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def between(self, begin: float, end: float) -> list[float]:
        """The numbers sampled in a span of seconds."""
        return [number for at, number in self.samples if begin <= at < end]

    def _run(self) -> None:
        begun = time.monotonic()
        while not self._stop.is_set():
            self.samples.append((time.monotonic() - begun, self.take()))
            self._stop.wait(self.seconds)


def machine() -> Mapping[str, str]:
    """Machine and versions of the measurement."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "instructions": _instructions(),
        "system": f"{platform.system()} {platform.release()}, CPython {platform.python_version()}",
        "load when begun": f"{os.getloadavg()[0]:.1f}",
    }
    for name in ("onnxruntime-gpu", "numpy", "rasterio", "torch", "uvicorn", "pyts"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _cpu_field(name: str) -> str:
    found = re.search(rf"^{name}\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else "unknown"


def _processor() -> str:
    model, family, number = (_cpu_field(n) for n in ("model name", "cpu family", "model"))
    return f"{model} (family {family}, model {number})"


def _instructions() -> str:
    relevant = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
    flags = set(_cpu_field("flags").split())
    return ", ".join(flag for flag in relevant if flag in flags)

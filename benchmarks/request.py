"""Whole requests over a socket against the bare session; memory and start of the service.

    python -m benchmarks.request [--side 2048] [--memory]

The session runs on the same number of pixels, as arrays in memory, before and after the request, so
that other load on the machine affects both. As in `benchmarks.session`, rates are reported by the
clock and by processor time; processor time is valid on a busy machine too.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.inputs import DATES, PIXELS, pixels_input
from benchmarks.landscape import FORM, days, form, write_stack
from benchmarks.process import ROOT, Served, machine, served
from benchmarks.session import CORES
from benchmarks.tiny_zoo import write_bundle
from models.registry import ZOO, Registry
from service.infer.engine import Engine
from service.infer.model import LoadedModel

SMALL = ROOT.parent / "shared" / "data" / "flanders_2017_2018"
MOST_RESIDENT = 1_500_000_000
"""Largest allowed memory of the service for any raster, bytes."""
_TIMEOUT = 3600.0
# Number of requests of the large raster, in turns with the bare session.
_TURNS = 3
# Large enough for every raster here to be served synchronously, not as a job.
_PATIENT = {"PIMC_SYNC_MAX_PIXELS": str(10**9)}


@dataclass(frozen=True, kw_only=True)
class Taken:
    """Duration of a request or of a run of the bare session."""

    clock: float
    """Seconds by the clock."""
    processor: float
    """Seconds of processor time, summed over the processors."""
    stages: str = ""
    """The response's `Server-Timing`."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A request and the bare session for the same pixels."""

    name: str
    pixels: int
    request: Taken
    session: Taken

    @property
    def share(self) -> tuple[float, float]:
        """The request's rate relative to the session's, by the clock and by processor time."""
        request, session = self.request, self.session
        return session.clock / request.clock, session.processor / request.processor

    @property
    def quiet_extra(self) -> float:
        """Seconds beyond the session by processor time, on one core."""
        return self.request.processor - self.session.processor


def bare(model: LoadedModel, count: int, dates: int, least: float = 0.0) -> Taken:
    """The bare session for a number of pixels, extrapolated from fewer."""
    few = min(count, PIXELS)
    feeds = pixels_input(model, few, dates)
    model.pixels(feeds["values"], feeds["valid"], feeds["days"], 1)
    times = 0
    began, cpu = time.perf_counter(), time.process_time()
    while not times or time.perf_counter() - began < least:
        model.pixels(feeds["values"], feeds["valid"], feeds["days"], 1)
        times += 1
    scale = count / few / times
    return Taken(
        clock=(time.perf_counter() - began) * scale, processor=(time.process_time() - cpu) * scale
    )


def post(service: Served, body: bytes, kind: str = FORM) -> Taken:
    """Send one request to `/classify-pixels`; the time from the first byte sent to the last read.

    Raises:
        RuntimeError: the status is not 200.
    """
    connection = http.client.HTTPConnection(service.host, service.port, timeout=_TIMEOUT)
    before, began = service.processor_seconds(), time.perf_counter()
    connection.request("POST", "/classify-pixels", body, {"Content-Type": kind})
    response = connection.getresponse()
    content = response.read()
    taken = time.perf_counter() - began
    connection.close()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {content[:300]!r}")
    return Taken(
        clock=taken,
        processor=service.processor_seconds() - before,
        stages=response.headers.get("Server-Timing", ""),
    )


def raster(service: Served, model: LoadedModel, side: int) -> Compared:
    """A tiled stack of `DATES` dates, files in to COG out."""
    with tempfile.TemporaryDirectory() as folder:
        paths = write_stack(Path(folder), side, DATES, scl=True)
        body = form({path.name: path.read_bytes() for path in paths})
    # The kernel writes files in the background, which slows the first measurement after it.
    os.sync()
    bare(model, side**2, DATES, least=5.0)
    alone, requests = [bare(model, side**2, DATES, least=5.0)], []
    for _ in range(_TURNS):
        requests.append(post(service, body))
        alone.append(bare(model, side**2, DATES, least=5.0))
    return Compared(name=f"{side} x {side}, {DATES} dates", pixels=side**2, request=_mean(requests),
                    session=_mean(alone))  # fmt: skip


def _mean(takes: Sequence[Taken]) -> Taken:
    return Taken(
        clock=statistics.mean(taken.clock for taken in takes),
        processor=statistics.mean(taken.processor for taken in takes),
        stages=takes[-1].stages,
    )


def small_raster(service: Served, model: LoadedModel, rounds: int) -> Compared:
    """64 x 64 pixels, one file per date: a real stack if available, else a synthetic one."""
    if SMALL.is_dir():
        paths = [path for path in sorted(SMALL.glob("*.tif")) if not path.name.startswith("LABEL")]
        files = {path.name: path.read_bytes() for path in paths}
    else:
        with tempfile.TemporaryDirectory() as folder:
            files = {p.name: p.read_bytes() for p in write_stack(Path(folder), 64, 118, scl=True)}
    body, dates = form(files), len(files)
    pairs = [(post(service, body), bare(model, 64**2, dates)) for _ in range(rounds)]
    return Compared(
        name=f"64 x 64, {dates} dates",
        pixels=64**2,
        request=_least(pair[0] for pair in pairs),
        session=_least(pair[1] for pair in pairs),
    )


def one_pixel(service: Served, model: LoadedModel, rounds: int) -> Compared:
    """A series of one pixel, as JSON."""
    when = [day.isoformat() for day in days(DATES)]
    series = {"id": "a", "dates": when, **{b: [0.1] * DATES for b in ("B02", "B04", "B08")}}
    body = json.dumps({"series": [series]}).encode()
    pairs = [
        (post(service, body, "application/json"), bare(model, 1, DATES)) for _ in range(20 * rounds)
    ]
    return Compared(
        name="one series",
        pixels=1,
        request=_middle([p[0] for p in pairs]),
        session=_middle([p[1] for p in pairs]),
    )


def _least(taken: Iterable[Taken]) -> Taken:
    """The minimum of each time, because other load on the machine only adds to it."""
    every = list(taken)
    return Taken(
        clock=min(t.clock for t in every),
        processor=min(t.processor for t in every),
        stages=min(every, key=lambda t: t.clock).stages,
    )


def _middle(taken: Sequence[Taken]) -> Taken:
    """The median by the clock, and the mean by processor time, which is measured coarsely."""
    return Taken(
        clock=statistics.median(t.clock for t in taken),
        processor=statistics.fmean(t.processor for t in taken),
    )


def memory(sides: Sequence[int], dates: int = 12) -> Mapping[int, int]:
    """Peak memory of the service, by the side of the raster.

    The sessions of the whole zoo are loaded, and the default classifier runs first. The rasters are
    predicted by a model that costs almost nothing, because only the pipeline's memory is measured.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        zoo = Path(folder) / "zoo"
        write_bundle(zoo, "pixels-cheap", "classify-pixels", "pixel", default=False)
        with served(PIMC_MODEL_DIR=str(zoo), **_PATIENT) as service:
            small = write_stack(Path(folder), 256, dates)
            post(service, form({path.name: path.read_bytes() for path in small}))
            for side in sides:
                own = Path(folder) / str(side)
                own.mkdir()
                paths = write_stack(own, side, dates, noise=0.0)
                body = form(
                    {path.name: path.read_bytes() for path in paths}, {"model": "pixels-cheap"}
                )
                service.forget_peak()
                post(service, body)
                found[side] = service.peak()
    return found


def start(times: int = 3) -> Mapping[str, Taken]:
    """Seconds until the service is ready, and of the SDK's import beyond Python's own start."""
    ready = []
    for _ in range(times):
        with served() as service:
            ready.append(Taken(clock=service.ready_seconds, processor=service.processor_seconds()))
    python, sdk = _imported("pass"), _imported("import pimc_client")
    imported = Taken(clock=sdk.clock - python.clock, processor=sdk.processor - python.processor)
    return {"service ready": _least(ready), "SDK imported": imported}


def _imported(code: str) -> Taken:
    found = []
    for _ in range(5):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)  # noqa: S603 - ours
        clock, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found.append(Taken(clock=clock, processor=spent))
    return _least(found)


def loads_torch() -> bool:
    """Whether importing the service imports torch."""
    code = "import service.api.app, service.__main__, sys; sys.exit('torch' in sys.modules)"
    return subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode != 0  # noqa: S603 - ours


def compare(side: int, rounds: int = 5) -> list[Compared]:
    """Measure the three requests."""
    with Engine(Registry.load(ZOO), providers="cpu") as engine, served(**_PATIENT) as service:
        model = engine.find(None, "classify-pixels")
        return [
            one_pixel(service, model, rounds),
            small_raster(service, model, rounds),
            raster(service, model, side),
        ]


def show(found: Sequence[Compared], console: Console) -> None:
    """Print the requests."""
    table = Table("request", "by the clock", "bare", "processor", "bare", "", "target", box=None)
    for one in found:
        clock, processor = one.share
        if one.pixels > PIXELS * 8:
            text = f"{clock:.0%} by the clock, {processor:.0%} by processor time"
            bar = "90 %"
        elif one.pixels == 1:
            text = f"{(one.request.clock - one.session.clock) * 1e3:.1f} ms over"
            bar = "10 ms"
        else:
            limit = 1.5 * one.session.clock + 0.15
            quiet = one.session.processor / CORES + one.quiet_extra
            quiet_limit = 1.5 * one.session.processor / CORES + 0.15
            text = (
                f"{one.request.clock / limit:.2f} of the limit; of processor time "
                f"{quiet * 1e3:.0f} of {quiet_limit * 1e3:.0f} ms"
            )
            bar = "1.5 x bare + 150 ms"
        seconds = (one.request.clock, one.session.clock, one.request.processor,
                   one.session.processor)  # fmt: skip
        table.add_row(one.name, *(f"{s * 1e3:,.1f} ms" for s in seconds), text, bar)
    console.print(table)
    for one in found:
        if one.request.stages:
            console.print(f"{one.name}, stages: {one.request.stages}")


def show_memory(found: Mapping[int, int], console: Console) -> None:
    """Print the memory."""
    for side, most in found.items():
        console.print(f"{side} x {side}, 12 dates: at most {most / 1e6:.0f} MB")
    first, *_, last = found.values()
    console.print(
        f"largest / smallest: {last / first:.2f} (target 1.10, and {MOST_RESIDENT / 1e6:.0f} MB)"
    )


def show_start(found: Mapping[str, Taken], console: Console) -> None:
    """Print the start."""
    for name, taken in found.items():
        console.print(
            f"{name}: {taken.clock * 1e3:.0f} ms by the clock, {taken.processor * 1e3:.0f} ms of "
            "processor time"
        )
    console.print("(targets: 5 s with the whole zoo, 150 ms)")
    console.print(f"torch is loaded with the service: {'yes' if loads_torch() else 'no'}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", type=int, default=2048, help="side of the raster, pixels")
    parser.add_argument(
        "--largest", type=int, help="measure only memory, up to a raster of this side"
    )
    options = parser.parse_args()
    console = Console()
    console.print(", ".join(f"{name} {value}" for name, value in machine().items()))
    if options.largest:
        show_memory(memory((1024, options.largest)), console)
        return
    show(compare(options.side), console)
    show_start(start(), console)


if __name__ == "__main__":
    main()

"""The bare session of the default pixel classifier against the machine and its peers.

    python -m benchmarks.session [--rounds 5] [--device-only]

If there is a CUDA device, the session on that device is measured last (`benchmarks.device`).

All candidates take turns, round by round, and the best round of each counts, so that other load on
the machine affects all of them equally. Two rates are reported: by the clock on all cores, and by
processor time on one thread times the cores, which is valid on a busy machine too.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks import device
from benchmarks.cost import Product, products_of
from benchmarks.inputs import DATES, PIXELS, pixels_input, product_session
from benchmarks.peers import MONTHS, STEPS, PeerMissing, Presto, UsualPipeline
from benchmarks.process import machine
from models.registry import ZOO, Registry
from service.infer.engine import Engine

CORES = len(os.sched_getaffinity(0))
PRODUCT_SIDE = 1024
_TURN_SECONDS = 0.2
_MEGA = 1e6
_GIGA = 1e9

Run = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Units of work per second."""

    clock: float
    """Rate by the clock, with all threads of the candidate."""
    processor: float
    """Rate by processor time, multiplied by the number of cores."""

    def over(self, other: Rate) -> Rate:
        """This rate relative to another."""
        return Rate(clock=self.clock / other.clock, processor=self.processor / other.processor)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A candidate to measure."""

    name: str
    amount: float
    """Units of work per run."""
    clock: Run
    """The run on all cores, measured by the clock."""
    processor: Run
    """The run on one thread, measured by processor time."""


def measure(candidates: list[Candidate], rounds: int) -> dict[str, Rate]:
    """The best round of each candidate; the candidates take turns.

    A turn begins with a run that is not counted, because the candidate before has filled the caches
    and left spinning threads. Then the candidate runs repeatedly for some time, because one call of
    the session takes only 25 ms.
    """
    clock: dict[str, float] = {}
    processor: dict[str, float] = {}
    for candidate in candidates:
        candidate.processor()
        candidate.clock()
    for _ in range(rounds):
        for candidate in candidates:
            taken = _turn(candidate.clock, time.perf_counter)
            clock[candidate.name] = min(taken, clock.get(candidate.name, taken))
            taken = _turn(candidate.processor, time.process_time)
            processor[candidate.name] = min(taken, processor.get(candidate.name, taken))
    return {
        c.name: Rate(clock=c.amount / clock[c.name], processor=CORES * c.amount / processor[c.name])
        for c in candidates
    }


def _turn(run: Run, now: Callable[[], float]) -> float:
    """Mean seconds of a run in one candidate's turn."""
    run()
    begun, times = now(), 0
    while not times or now() - begun < _TURN_SECONDS:
        run()
        times += 1
    return (now() - begun) / times


def bare(
    engine: Engine, alone: Engine, count: int = PIXELS, name: str = "bare session"
) -> Candidate:
    """The session that the engine uses for the default pixel classifier."""
    feeds = pixels_input(engine.find(None, "classify-pixels"), count)

    def on(which: Engine) -> Run:
        model = which.find(None, "classify-pixels")
        return lambda: model.pixels(feeds["values"], feeds["valid"], feeds["days"], 1)

    return Candidate(name=name, amount=count, clock=on(engine), processor=on(alone))


def product(side: int = PRODUCT_SIDE) -> list[Candidate]:
    """Square float32 products, in FLOP; the faster library gives the machine's rate."""
    random = np.random.default_rng(0)
    a, b = (random.standard_normal((side, side)).astype(np.float32) for _ in range(2))

    def by_runtime(threads: int) -> Run:
        session = product_session({"b": b}, threads=threads)
        return lambda: session.run(None, {"a": a})

    def by_torch(threads: int) -> Run:
        import torch

        x, y = torch.from_numpy(a), torch.from_numpy(b)

        def run() -> None:
            torch.set_num_threads(threads)
            torch.mm(x, y)

        return run

    return [
        Candidate(name=f"float32 product, {name}", amount=2.0 * side**3, clock=make(CORES),
                  processor=make(1))
        for name, make in (("ONNX Runtime", by_runtime), ("PyTorch", by_torch))
    ]  # fmt: skip


def peers() -> list[Candidate]:
    """Presto's encoder, and recurrence plots with a ResNet-18, each with its best batch size.

    Raises:
        PeerMissing: a package of the extra `peers` is not installed.
    """
    import torch

    random = np.random.default_rng(0)
    presto, usual = Presto(), UsualPipeline()
    months = random.uniform(0, 0.4, (256, MONTHS, 10)).astype(np.float32)
    series = random.uniform(0, 0.9, (64, 3, STEPS)).astype(np.float32)

    def on(threads: int, peer: Callable[[Any], object], given: NDArray[np.float32]) -> Run:
        def run() -> None:
            torch.set_num_threads(threads)
            peer(given)

        return run

    return [
        Candidate(name=name, amount=len(given), clock=on(CORES, peer, given),
                  processor=on(1, peer, given))
        for name, peer, given in (("Presto", presto, months), ("plots, ResNet-18", usual, series))
    ]  # fmt: skip


def precision(products: list[Product], rounds: int) -> dict[str, dict[str, Rate]]:
    """Rates of the graph's heaviest products in float32 and int8, in FLOP per second, by shape."""
    heaviest = sorted(products, key=lambda p: p.flop, reverse=True)
    shapes = list(dict.fromkeys((p.inner, p.columns, p.rows) for p in heaviest))[:4]
    random = np.random.default_rng(0)
    found = {}
    for inner, columns, rows in shapes:
        count = int(256 * rows)
        a = random.standard_normal((count, inner)).astype(np.float32)
        b = random.standard_normal((inner, columns)).astype(np.float32)
        candidates = []
        for kind in ("float32", "int8", "int8-alone"):
            given = a if kind != "int8-alone" else np.clip(a * 40 + 128, 0, 255).astype(np.uint8)
            sessions = [product_session({"b": b}, threads=t, kind=kind) for t in (CORES, 1)]
            both, one = (_repeat(session, given) for session in sessions)
            amount = 8 * 2.0 * count * inner * columns
            candidates.append(Candidate(name=kind, amount=amount, clock=both, processor=one))
        found[f"({count}, {inner}) x ({inner}, {columns})"] = measure(candidates, rounds)
    return found


def _repeat(session: onnxruntime.InferenceSession, given: NDArray[Any], times: int = 8) -> Run:
    def run() -> None:
        for _ in range(times):
            session.run(None, {"a": given})

    return run


@dataclass(frozen=True, kw_only=True)
class Found:
    """Results of the comparison."""

    model: str
    variant: str
    flop: float
    """Floating-point operations of all products, for one pixel of `DATES` dates."""
    rates: Mapping[str, Rate]
    missing: str | None
    """Why the peers were not measured; None if they were."""
    reduced: Mapping[str, Mapping[str, Rate]]

    @property
    def machine_rate(self) -> Rate:
        """The faster library's float32 product, in FLOP per second."""
        found = [rate for name, rate in self.rates.items() if name.startswith("float32 product")]
        return Rate(clock=max(r.clock for r in found), processor=max(r.processor for r in found))

    @property
    def share(self) -> Rate:
        """Share of the machine's rate that the session's products reach."""
        bare_rate = self.rates["bare session"]
        flop = Rate(clock=bare_rate.clock * self.flop, processor=bare_rate.processor * self.flop)
        return flop.over(self.machine_rate)


_EXACT = "session in float32"


def compare(rounds: int) -> Found:
    """Measure everything."""
    registry = Registry.load(ZOO)
    with (
        Engine(registry, providers="cpu") as engine,
        Engine(registry, providers="cpu", threads=1) as alone,
        Engine(registry, providers="cpu", precision="float32") as exact,
        Engine(registry, providers="cpu", precision="float32", threads=1) as exact_alone,
    ):
        model = engine.find(None, "classify-pixels")
        float32 = next(v for v in model.card.variants if v.name == "float32")
        products = products_of(
            ZOO / model.card.name / float32.file, pixels_input(model, 4), count=4
        )
        candidates = [bare(engine, alone), *product()]
        if model.variant != "float32":
            candidates.append(bare(exact, exact_alone, name=_EXACT))
        missing = None
        try:
            candidates += peers()
        except PeerMissing as error:
            missing = str(error)
        rates = measure(candidates, rounds)
        return Found(
            model=model.card.id,
            variant=model.variant,
            flop=sum(p.flop for p in products),
            rates=rates,
            missing=missing,
            reduced=precision(products, rounds),
        )


def show(found: Found, console: Console) -> None:
    """Print the results."""
    console.print(
        f"{found.model} ({found.variant}): {found.flop / _MEGA:.2f} MFLOP per pixel in products; "
        f"{PIXELS} pixels of {DATES} dates, {CORES} cores"
    )
    table = Table("", "by the clock", "by processor time", "target", box=None)
    bare_rate = found.rates["bare session"]
    for name, rate in found.rates.items():
        unit, size = ("GFLOP/s", _GIGA) if "product" in name else ("px/s", 1.0)
        cells = (f"{number / size:,.0f} {unit}" for number in (rate.clock, rate.processor))
        table.add_row(name, *cells, "")
    share = found.share
    table.add_row("session / product rate", f"{share.clock:.0%}", f"{share.processor:.0%}", "75 %")
    for name, bar in (("Presto", "30 x"), ("plots, ResNet-18", "60 x"), (_EXACT, "")):
        if name in found.rates:
            ratio = bare_rate.over(found.rates[name])
            cells = (f"{number:.3g} x" for number in (ratio.clock, ratio.processor))
            table.add_row(f"session / {name}", *cells, bar)
    console.print(table)
    if found.missing:
        console.print(f"the peers were not measured: {found.missing}")
    table = Table(
        "product", "float32", "int8", "int8 alone", box=None, title="GFLOP/s, one thread x cores"
    )
    for shape, rates in found.reduced.items():
        table.add_row(shape, *(f"{rates[k].processor / _GIGA:.0f}" for k in rates))
    console.print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds of each candidate")
    parser.add_argument("--device-only", action="store_true", help="measure only the CUDA device")
    options = parser.parse_args()
    console = Console()
    console.print(", ".join(f"{name} {value}" for name, value in machine().items()))
    if not options.device_only:
        show(compare(options.rounds), console)
    device.show(device.measure(options.rounds), console)


if __name__ == "__main__":
    main()

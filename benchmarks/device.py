"""The default pixel classifier on a CUDA device: rate, traffic, and the device's limits.

    python -m benchmarks.session    # reports it last, if there is such a device

The rate is that of the service's engine: batches are assembled on the CPU and copied to the device,
the graph runs, and the predictions are copied back. Two upper bounds are measured on the same
device: matrix products in the precision that the engine chose, and copies from NumPy's memory.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.cost import products_of
from benchmarks.inputs import DATES, pixels_input, product_session
from models.registry import ZOO, Bundle, Registry
from service.infer.engine import Engine
from service.infer.model import LoadedModel
from service.infer.session import CPU, CUDA, ProviderUnavailable, open_session

BATCHES = 8
"""Batches per call; the service passes as many within two chunks."""
RAW_BYTES = 2
"""Bytes of a value in a Sentinel-2 product: uint16."""
PLOT_BYTES = 3 * 64 * 64 * 4
"""Three recurrence plots of 64 steps in float32, which stay on the device."""
_PRODUCT_SIDE = 4096
_COPIED = 2**28
_MEGA = 1e6
_GIGA = 1e9
_TERA = 1e12


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes between the CPU and the session, for one pixel."""

    into: float
    out: float


@dataclass(frozen=True, kw_only=True)
class Device:
    """Results."""

    name: str
    model: str
    variant: str
    flop: float
    """Floating-point operations of all products, for one pixel."""
    rate: float
    """Pixels per second through the engine."""
    traffic: Traffic
    raw: int
    """Bytes of a pixel's values as its files hold them."""
    product: float
    """FLOP per second of a square product, all on the device."""
    copied: float
    """Bytes per second, from the CPU's memory to the device."""

    @property
    def by_products(self) -> float:
        """Upper bound of pixels per second by the products."""
        return self.product / self.flop

    @property
    def by_copies(self) -> float:
        """Upper bound of pixels per second by the copies, if both directions are equally fast."""
        return self.copied / (self.traffic.into + self.traffic.out)

    @property
    def roof(self) -> float:
        """Upper bound of pixels per second by both: a run copies, computes, and copies."""
        return 1 / (1 / self.by_products + 1 / self.by_copies)


class Counting:
    """ONNX Runtime's session that counts the bytes of its inputs and outputs."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self.into = self.out = 0

    def get_providers(self) -> list[str]:
        """The session's execution providers."""
        return list(self._session.get_providers())

    def run(
        self,
        names: Sequence[str],
        feeds: Mapping[str, NDArray[Any]],
        options: onnxruntime.RunOptions | None = None,
    ) -> list[NDArray[Any]]:
        """Run the session."""
        outputs: list[NDArray[Any]] = self._session.run(names, feeds, options)
        self.into += sum(array.nbytes for array in feeds.values())
        self.out += sum(array.nbytes for array in outputs)
        return outputs


def traffic(bundle: Bundle, provider: str, count: int, dates: int = DATES) -> Traffic:
    """Bytes that the engine moves per pixel, including the padding of its batches."""
    session = open_session(bundle, provider)
    counting = Counting(session.session)
    with ThreadPoolExecutor(1) as pool:
        model = LoadedModel(
            bundle.card, replace(session, session=counting), pool=pool, device=threading.Lock()
        )
        before = counting.into, counting.out  # bytes of the warm-up
        run_once(model, pixels_input(model, count, dates))
    return Traffic(into=(counting.into - before[0]) / count, out=(counting.out - before[1]) / count)


def run_once(model: LoadedModel, feeds: Mapping[str, NDArray[Any]]) -> None:
    """Call the model once, as a run does."""
    model.pixels(feeds["values"], feeds["valid"], feeds["days"], 1)


def product_rate(provider: str, precision: str, *, side: int, rounds: int) -> float:
    """FLOP per second of a square product, with all data on the device."""
    random = np.random.default_rng(0)
    kind = np.float16 if precision == "float16" else np.float32
    a, b = (random.standard_normal((side, side)).astype(kind) for _ in range(2))
    session = product_session({"b": b}, threads=1, kind=precision, provider=provider)
    where = "cuda" if provider == CUDA else "cpu"
    binding = session.io_binding()
    binding.bind_ortvalue_input("a", onnxruntime.OrtValue.ortvalue_from_numpy(a, where, 0))
    binding.bind_output("out", where, 0)
    # A run returns once the device has finished.
    return 2.0 * side**3 / _least(lambda: session.run_with_iobinding(binding), rounds)


def copy_rate(provider: str, *, size: int, rounds: int) -> float:
    """Bytes per second from NumPy's memory to the provider's, as a run copies its input."""
    here = np.ones(size, np.uint8)
    there = onnxruntime.OrtValue.ortvalue_from_numpy(here, "cuda" if provider == CUDA else "cpu", 0)
    return size / _least(lambda: there.update_inplace(here), rounds)


def _least(run: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest round, after one round that is not counted."""
    run()
    taken = []
    for _ in range(rounds):
        begun = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begun)
    return min(taken)


def measure(rounds: int) -> Device | None:
    """Measure the device; None if there is no CUDA device."""
    registry = Registry.load(ZOO)
    try:
        engine = Engine(registry, providers="cuda")
    except ProviderUnavailable:
        return None
    with engine:
        model = engine.find(None, "classify-pixels")
        bundle = registry.bundles[model.card.name]
        count = BATCHES * model.chunk // 4
        feeds = pixels_input(model, count)
        taken = _least(lambda: run_once(model, feeds), rounds)
        float32 = next(v for v in model.card.variants if v.name == "float32")
        products = products_of(bundle.path(float32.name), pixels_input(model, 4), count=4)
        return Device(
            name=_device_name(),
            model=model.card.id,
            variant=model.variant,
            flop=sum(p.flop for p in products),
            rate=count / taken,
            traffic=traffic(bundle, CUDA, count),
            raw=RAW_BYTES * DATES * len(model.card.bands),
            product=product_rate(CUDA, model.variant, side=_PRODUCT_SIDE, rounds=rounds),
            copied=copy_rate(CUDA, size=_COPIED, rounds=rounds),
        )


def _device_name() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    command = [tool, "--query-gpu=name", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - fixed words
    return done.stdout.strip() or "unknown"


def show(found: Device | None, console: Console) -> None:
    """Print the results."""
    if found is None:
        console.print(f"no GPU was measured: ONNX Runtime has no CUDA device here, only {CPU}")
        return
    console.print(
        f"{found.model} ({found.variant}) on {found.name}, through the service's engine: "
        f"{found.flop / _MEGA:.2f} MFLOP per pixel in products, {DATES} dates"
    )
    table = Table("", "", box=None)
    into, out = found.traffic.into, found.traffic.out
    for name, text in (
        ("pixels per second", f"{found.rate:,.0f} px/s"),
        ("to the device", f"{into:.0f} bytes per pixel, {into / found.raw:.2f} x its raw values"),
        ("if plots were copied too", f"{PLOT_BYTES / into:.0f} x as many"),
        ("back", f"{out:.0f} bytes per pixel"),
        (f"{found.variant} product", f"{found.product / _TERA:,.1f} TFLOP/s"),
        ("copies to the device", f"{found.copied / _GIGA:,.1f} GB/s"),
        ("bound by products", f"{found.by_products:,.0f} px/s"),
        ("bound by copies", f"{found.by_copies:,.0f} px/s"),
        ("share of the bound by both", f"{found.rate / found.roof:.0%}"),
    ):
        table.add_row(name, text)
    console.print(table)

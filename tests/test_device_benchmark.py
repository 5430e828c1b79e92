"""The benchmark of a CUDA device, run on the CPU's provider."""

from __future__ import annotations

import io

import numpy as np
import onnxruntime
import pytest
from rich.console import Console

from benchmarks.device import (
    RAW_BYTES,
    Device,
    Traffic,
    copy_rate,
    measure,
    product_rate,
    show,
    traffic,
)
from benchmarks.inputs import product_session
from models.registry import ZOO, Registry
from service.infer.model import PIXEL_BATCH
from service.infer.session import CPU

pytestmark = pytest.mark.slow


def shown(found: Device | None) -> str:
    text = io.StringIO()
    show(found, Console(file=text, width=120))
    return text.getvalue()


@pytest.fixture
def device() -> Device:
    return Device(
        name="a device",
        model="pixels-landcover@1.0.0",
        variant="float16",
        flop=2e6,
        rate=1e7,
        traffic=Traffic(into=450, out=50),
        raw=216,
        product=1e14,
        copied=1e10,
    )


def test_only_values_and_validity_are_copied_to_the_session_and_no_plot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.infer.session.pick_variant", lambda *_: "float32")
    registry = Registry.load(ZOO)
    bundle = registry.default("classify-pixels")
    assert bundle is not None
    T, C, count = 36, len(bundle.card.bands), 512  # whole batches, nothing rounded up
    found = traffic(bundle, CPU, count, T)
    own = 4 * (bundle.card.day_of_year + bundle.card.elsewhere)
    batches = count // PIXEL_BATCH[CPU]  # each also has `days`
    assert found.into * count == count * (T * (4 * C + 1) + own) + batches * 4 * T
    assert found.out == 4 * len(bundle.card.classes)


def test_float16_copies_little_more_than_the_bytes_of_the_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.infer.session.pick_variant", lambda *_: "float16")
    bundle = Registry.load(ZOO).default("classify-pixels")
    assert bundle is not None
    T, C = 36, len(bundle.card.bands)
    assert traffic(bundle, CPU, 256, T).into / (T * C * RAW_BYTES) < 1.2


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_rate_of_products_is_measured(precision: str) -> None:
    assert product_rate(CPU, precision, side=32, rounds=2) > 0
    b = np.eye(8, dtype=precision)
    session = product_session({"b": b}, threads=1, kind=precision)
    a = np.arange(16, dtype=precision).reshape(2, 8)
    np.testing.assert_array_equal(session.run(None, {"a": a})[0], a)


def test_the_rate_of_copies_is_measured() -> None:
    assert copy_rate(CPU, size=2**16, rounds=2) > 0


def test_the_bound_combines_products_and_copies(device: Device) -> None:
    assert device.by_products == pytest.approx(5e7)
    assert device.by_copies == pytest.approx(2e7)
    assert device.roof == pytest.approx(1 / (1 / 5e7 + 1 / 2e7))
    text = shown(device)
    for part in ("a device", "float16", "10,000,000 px/s", "450 bytes", "2.08 x", "70%"):
        assert part in text


def test_without_a_device_the_report_states_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    found = measure(rounds=1)
    assert found is None
    assert "no GPU was measured" in shown(found)

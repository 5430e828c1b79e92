"""CUDA with a device: the shipped bundles predict there what they predict on the CPU.

Skipped without a device, in continuous integration too: `tests/test_cuda_coverage.py` checks what
can be known without one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import rasterio

from benchmarks.serving import served
from models.registry import ZOO, Registry
from pimc_client import Client
from service.infer.engine import Engine
from service.infer.model import LoadedModel
from service.infer.session import CPU, CUDA, ProviderUnavailable, _cuda_options, _session_options

pytestmark = pytest.mark.slow

BUNDLES = sorted(path.parent.name for path in ZOO.glob("*/card.json"))
PIXELS = 700
DATES = 30
# Nodes of shapes alone, which ONNX Runtime leaves on the CPU by choice. All others compute.
OF_SHAPES = {"Concat", "Gather", "Shape", "Slice", "Squeeze", "Unsqueeze", "Cast", "Constant"}


@pytest.fixture(scope="module")
def engines() -> Iterator[tuple[Engine, Engine]]:
    """The zoo on the device and, in float32, on the CPU."""
    registry = Registry.load(ZOO)
    try:
        device = Engine(registry, providers="cuda")
    except ProviderUnavailable as error:
        pytest.skip(f"needs a CUDA device: {error}")
    with device, Engine(registry, providers="cpu", precision="float32", threads=4) as processor:
        yield device, processor


def predict(model: LoadedModel) -> np.ndarray:
    """Predictions of plausible input, the same for every provider: a season with gaps, or noise."""
    random = np.random.default_rng(3)
    card = model.card
    if card.modality == "patch":
        side = card.patch or 0
        return model.patches(random.uniform(0, 0.4, (96, len(card.bands), side, side)))
    window = card.window
    assert window is not None
    days = np.sort(random.uniform(0, window.steps * window.step_days - 1, DATES))
    season = 0.5 - 0.5 * np.cos(2 * np.pi * (days / 365 - random.uniform(0, 1, (PIXELS, 1))))
    bare, green = random.uniform(0.03, 0.12, (2, PIXELS, 1, len(card.bands)))
    values = bare + (green - bare) * season[..., None]
    values[..., card.bands.index("B08")] += 0.35 * season
    values += random.normal(0, 0.005, values.shape)
    valid = random.uniform(0, 1, values.shape[:2]) < 0.7
    return model.pixels(np.float32(values.clip(0.001)), valid, np.float32(days), 100)


@pytest.mark.parametrize("name", BUNDLES)
def test_a_bundle_predicts_on_the_device_what_it_predicts_on_the_cpu(
    engines: tuple[Engine, Engine], name: str
) -> None:
    device, processor = (engine.models[name] for engine in engines)
    assert (device.provider, processor.provider) == (CUDA, CPU)
    got, expected = predict(device), predict(processor)
    # float16 has eleven bits of precision; a recurrence plot and three levels of products follow.
    largest = np.abs(expected).max()
    assert np.isfinite(expected).all()
    assert np.abs(got - expected).max() < 0.03 * largest
    assert np.abs(got - expected).mean() < 0.003 * largest
    if device.card.output == "probabilities":
        assert (got.argmax(1) == expected.argmax(1)).mean() > 0.99


@pytest.mark.parametrize("name", BUNDLES)
def test_every_node_that_computes_runs_on_the_device(
    engines: tuple[Engine, Engine], name: str, tmp_path: Path
) -> None:
    model = engines[0].models[name]
    options = _session_options(CUDA)
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(
        Registry.load(ZOO).bundles[name].path(model.variant),
        sess_options=options,
        providers=[(CUDA, _cuda_options()), CPU],
    )
    model._session = replace(model._session, session=session)
    predict(model)
    events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [e["args"] for e in events if e.get("cat") == "Node" and "provider" in e["args"]]
    on_device = {node["op_name"] for node in nodes if node["provider"] == CUDA}
    elsewhere = {node["op_name"] for node in nodes if node["provider"] != CUDA}
    assert on_device & {"Conv", "FusedConv", "MatMul", "Gemm"}
    assert elsewhere <= OF_SHAPES


def test_a_map_of_the_device_is_that_of_the_cpu(
    engines: tuple[Engine, Engine], shared_data: Path, tmp_path: Path
) -> None:
    files = sorted((shared_data / "flanders_2017_2018").glob("S2_L2A_2018*.tif"))
    maps = []
    for providers in ("cuda", "cpu"):
        with served(providers=providers, precision="float32") as http:
            ready = http.get("/health/ready").json()
            assert providers in json.dumps(ready).lower()
            with Client(str(http.base_url)) as client:
                raster = client.classify_pixels(files, model="pixels-landcover")
                path = raster.save(tmp_path / f"{providers}.tif")
        with rasterio.open(path) as file:
            maps.append(file.read(1))
    assert (maps[0] == maps[1]).mean() > 0.999

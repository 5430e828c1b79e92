"""The engine against ONNX Runtime called directly, and bundles that it rejects."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument

from benchmarks.tiny_zoo import write_bundle, write_zoo
from models.registry import ZOO, BundleError, Registry, sha256_of
from service.errors import InternalError, UnknownModel, WrongTask
from service.infer.engine import Engine
from service.infer.model import PIXEL_BATCH, LoadedModel
from service.infer.session import (
    CPU,
    CUDA,
    ArenaShrinking,
    ProviderUnavailable,
    open_session,
    pick_variant,
)
from tests.kits.patience import PATIENCE

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return write_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def engine(zoo):
    with Engine(Registry.load(zoo), providers="cpu", threads=2) as engine:
        yield engine


def series(count, dates=5, seed=0):
    random = np.random.default_rng(seed)
    values = random.uniform(0, 0.5, (count, dates, 3)).astype(np.float32)
    valid = random.random((count, dates)) < 0.7
    valid[:, 0] = True
    return values, valid, np.arange(dates, dtype=np.float32)


def direct(zoo, name, feeds):
    session = onnxruntime.InferenceSession(
        zoo / name / "model.onnx", providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)[0]


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
@pytest.mark.parametrize("name", ["pixels-landcover", "forecast-vi", "embed-pixel"])
def test_pixels_equal_the_output_of_onnx_runtime(engine, zoo, name, count):
    values, valid, days = series(count)
    found = engine.models[name].pixels(values, valid, days)
    expected = direct(zoo, name, {"values": values, "valid": valid, "days": days})
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 8, 19])
@pytest.mark.parametrize("name", ["landcover-eurosat", "embed-patch"])
def test_patches_equal_the_output_of_onnx_runtime(engine, zoo, name, count):
    patches = np.random.default_rng(1).random((count, 3, 64, 64), np.float32)
    found = engine.models[name].patches(patches)
    np.testing.assert_allclose(found, direct(zoo, name, {"patches": patches}), rtol=1e-5)


def test_views_and_other_number_types_are_accepted(engine):
    values, valid, days = series(300)
    model = engine.models["pixels-landcover"]
    turned = np.asfortranarray(values).astype(np.float64)
    np.testing.assert_allclose(
        model.pixels(turned, valid.T.copy().T, days.astype(int)),
        model.pixels(values, valid, days),
        rtol=1e-6,
    )


def test_no_pixels_give_no_predictions(engine):
    values, valid, days = series(0)
    assert engine.models["pixels-landcover"].pixels(values, valid, days).shape == (0, 3)
    assert engine.models["forecast-vi"].pixels(values, valid, days).shape == (0, 3, 3, 3)


def test_a_pixel_without_dates_is_nan_and_does_not_affect_others(engine):
    values, valid, days = series(600)
    model = engine.models["pixels-landcover"]
    before = model.pixels(values, valid, days)
    values[100], valid[100] = np.nan, False
    values[~valid] = np.nan
    after = model.pixels(values, valid, days)
    assert np.isnan(after[100]).all()
    np.testing.assert_allclose(np.delete(after, 100, 0), np.delete(before, 100, 0), rtol=1e-6)


def test_concurrent_callers_get_their_own_predictions(engine, zoo):
    model = engine.models["pixels-landcover"]
    inputs = [series(700, dates=3 + n, seed=n) for n in range(6)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda one: model.pixels(*one), inputs))
    for (values, valid, days), prediction in zip(inputs, found, strict=True):
        expected = direct(zoo, "pixels-landcover", {"values": values, "valid": valid, "days": days})
        np.testing.assert_allclose(prediction, expected, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 3, 100, 255, 256, 257, 300])
def test_any_number_of_pixels_has_the_predictions_of_the_runtime_itself(engine, zoo, count):
    values, valid, days = series(count)
    expected = direct(zoo, "pixels-landcover", {"values": values, "valid": valid, "days": days})
    found = engine.models["pixels-landcover"].pixels(values, valid, days)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_runtime_error_is_an_internal_error_without_the_runtimes_message(engine):
    values, valid, days = series(600, dates=5)
    with pytest.raises(InternalError, match=r"pixels-brittle@0\.0\.1") as caught:
        engine.models["pixels-brittle"].pixels(values[:1], valid[:1], days)
    assert type(caught.value.__cause__).__module__.startswith("onnxruntime")
    assert "onnxruntime" not in caught.value.detail.lower()
    # 600 x 5 dates make whole rows of 4 dates, so it runs, and predicts for too many pixels.
    with pytest.raises(InternalError):
        engine.models["pixels-brittle"].pixels(values, valid, days)
    # And the engine goes on.
    assert engine.models["pixels-brittle"].pixels(*series(5, dates=4)).shape == (5, 3)


# Finding a model --------------------------------------------------------------------------------


def test_find_by_name_version_and_default(engine):
    assert engine.find(None, "classify-pixels").card.name == "pixels-landcover"
    assert engine.find("forecast-vi", "forecast").card.name == "forecast-vi"
    assert engine.find("forecast-vi@0.0.1", "forecast").card.name == "forecast-vi"
    assert engine.find(None, "embed", "patch").card.name == "embed-patch"
    assert engine.find(None, "embed", "pixel").card.name == "embed-pixel"


@pytest.mark.parametrize("reference", ["no-such", "forecast-vi@9.9.9"])
def test_an_unknown_model_is_an_error_that_lists_the_models(engine, reference):
    with pytest.raises(UnknownModel, match=rf"'{reference}'.*forecast-vi@0\.0\.1"):
        engine.find(reference, "forecast")


def test_a_wrong_task_names_both(engine):
    with pytest.raises(WrongTask, match=r"forecast-vi@0\.0\.1.*forecast.*classify-pixels"):
        engine.find("forecast-vi", "classify-pixels")
    with pytest.raises(WrongTask, match=r"embed-pixel@0\.0\.1.*pixel.*patch"):
        engine.find("embed-pixel", "embed", "patch")


# Bundles that are refused -----------------------------------------------------------------------

LEGEND = [{"value": v, "name": str(v), "color": "#000000"} for v in range(4)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bands": ["B02", "B04"]}, r"'values'.*'N', 'T', 3.*2 bands"),
        ({"day_of_year": True}, r"takes days, valid, values, but the card states day_of_year"),
        ({"classes": LEGEND}, r"'probabilities' has shape \(3,\).*\(4,\)"),
    ],
)
def test_a_bundle_that_differs_from_its_card_is_rejected_and_others_are_served(
    tmp_path, change, says
):
    write_bundle(tmp_path, "good", "classify-pixels", "pixel")
    write_bundle(tmp_path, "bad", "classify-pixels", "pixel", **change)
    with Engine(Registry.load(tmp_path), providers="cpu", threads=1) as engine:
        assert set(engine.models) == {"good"}
        assert set(engine.refused) == {"bad"}
        assert re.search(says, engine.refused["bad"])
        with pytest.raises(UnknownModel, match=r"bad@0\.0\.1' could not be loaded"):
            engine.find("bad", "classify-pixels")


def changed(folder, change):
    """A bundle whose graph was changed, with a card that has its sha256."""
    file = folder / "model.onnx"
    model = onnx.load(file)
    change(model)
    file.write_bytes(model.SerializeToString())
    card = json.loads((folder / "card.json").read_text())
    variant = card["variants"][0]
    card["sha256"] = variant["sha256"] = sha256_of(file)
    variant["opset"] = model.opset_import[0].version
    (folder / "card.json").write_text(json.dumps(card))


def newest_opset(model):
    model.opset_import[0].version = 999


def double(model):
    """Takes float64, as exporters left to themselves may have it."""
    values = model.graph.input[0]
    values.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    model.graph.node.insert(
        0, onnx.helper.make_node("Cast", ["values"], ["single"], to=onnx.TensorProto.FLOAT)
    )
    for node in model.graph.node[1:]:
        for at, name in enumerate(node.input):
            if name == "values":
                node.input[at] = "single"


def days_of_each(model):
    """Wants the days of each pixel, not of all."""
    shape = model.graph.input[2].type.tensor_type.shape
    shape.dim.add().dim_param = "more"


def sums_to_more(model):
    model.graph.node[-1].output[0] = "shares"
    two = onnx.numpy_helper.from_array(np.float32(2), "two")
    model.graph.initializer.append(two)
    model.graph.node.append(onnx.helper.make_node("Mul", ["shares", "two"], ["probabilities"]))


def no_number(model):
    model.graph.node[-1].output[0] = "shares"
    zero = onnx.numpy_helper.from_array(np.float32(0), "nought")
    model.graph.initializer.append(zero)
    model.graph.node.append(onnx.helper.make_node("Div", ["shares", "nought"], ["probabilities"]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            newest_opset,
            r"model\.onnx has opset 999, but ONNX Runtime [\d.]+ supports at most \d+",
        ),
        (double, r"'values' is a tensor\(double\) with 3 axes, but must be float32 with 3"),
        (days_of_each, r"'days' is a tensor\(float\) with 2 axes, but must be float32 with 1"),
        (sums_to_more, r"for a plausible pixel, probabilities sum to 2, not to 1"),
        (no_number, r"for a plausible pixel, 'probabilities' holds NaN or infinity"),
    ],
)
def test_an_unusable_graph_is_rejected_and_others_are_served(tmp_path, change, says):
    write_bundle(tmp_path, "good", "embed", "pixel")
    changed(write_bundle(tmp_path, "bad", "classify-pixels", "pixel"), change)
    with Engine(Registry.load(tmp_path), providers="cpu", threads=1) as engine:
        assert set(engine.models) == {"good"}
        assert engine.refused["bad"].startswith("bundle 'bad'")
        assert re.search(says, engine.refused["bad"])
        assert "/" not in engine.refused["bad"]


def outside(how, location, length):
    """A change of a graph: its weight `zero` is read from another file."""

    def change(model):
        kept = model.graph.initializer
        weight = kept.pop([w.name for w in kept].index("zero"))
        onnx.external_data_helper.set_external_data(weight, location, offset=0, length=length)
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        if how == "initializer":
            model.graph.initializer.append(weight)
        elif how == "attribute":
            constant = onnx.helper.make_node("Constant", [], [weight.name], value=weight)
            model.graph.node.insert(0, constant)
        elif how == "sparse":
            weight.dims.append(1)
            sparse = onnx.SparseTensorProto(values=weight, dims=[1])
            sparse.indices.CopyFrom(onnx.numpy_helper.from_array(np.array([0]), "at"))
            model.graph.sparse_initializer.append(sparse)
        else:  # in both branches of an If
            branches = {}
            for name in ("then_branch", "else_branch"):
                inner = onnx.helper.make_node("Constant", [], [name], value=weight)
                settings = onnx.helper.make_tensor_value_info(name, weight.data_type, weight.dims)
                branches[name] = onnx.helper.make_graph([inner], name, [], [settings])
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
            model.graph.node.insert(
                0, onnx.helper.make_node("If", ["yes"], [weight.name], **branches)
            )

    return change


@pytest.mark.parametrize("how", ["initializer", "sparse", "attribute", "branch"])
@pytest.mark.parametrize("place", ["above", "absolute"])
def test_weights_outside_a_bundles_folder_are_never_read(tmp_path, how, place):
    """ONNX Runtime refuses them; the registry refuses whatever else is within the folder."""
    zoo = tmp_path / "zoo"
    folder = write_bundle(zoo, "bad", "embed", "pixel")
    content = np.float32(0).tobytes()
    (tmp_path / "weights.bin").write_bytes(content)
    within = folder / "weights.bin"
    within.write_bytes(content)

    # The same graph loads and runs with the same bytes within the folder: its form is not at fault.
    changed(folder, outside(how, within.name, len(content)))
    onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    within.unlink()

    location = "../../weights.bin" if place == "above" else str(tmp_path / "weights.bin")
    shutil.rmtree(folder)
    changed(write_bundle(zoo, "bad", "embed", "pixel"), outside(how, location, len(content)))
    registry = Registry.load(zoo)
    assert registry.refused == {}
    with Engine(registry, providers="cpu", threads=1) as engine:
        assert engine.refused["bad"] == (
            "bundle 'bad': model.onnx: the float32 file cannot be loaded; "
            "the server's log states the cause"
        )


def test_quantiles_that_do_not_ascend_are_rejected(tmp_path):
    def descending(model):
        steps = next(c for c in model.graph.initializer if c.name == "steps")
        steps.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(steps), "steps"))

    changed(write_bundle(tmp_path, "bad", "forecast", "pixel"), descending)
    with Engine(Registry.load(tmp_path), providers="cpu", threads=1) as engine:
        assert "the quantiles do not ascend" in engine.refused["bad"]


def test_a_graph_of_another_task_is_rejected(tmp_path):
    folder = write_bundle(tmp_path, "embed", "embed", "pixel")
    card = json.loads((folder / "card.json").read_text())
    del card["embedding"], card["embedding_int8"]
    card |= {"task": "classify-pixels", "classes": LEGEND[:3]}
    (folder / "card.json").write_text(json.dumps(card))
    with Engine(Registry.load(tmp_path), providers="cpu", threads=1) as engine:
        assert "returns embedding, but the card states probabilities" in engine.refused["embed"]


def test_bundles_rejected_by_the_registry_are_listed_too(tmp_path):
    (write_bundle(tmp_path, "torn", "embed", "pixel") / "model.onnx").write_bytes(b"no")
    write_bundle(tmp_path, "good", "embed", "pixel")
    with Engine(Registry.load(tmp_path), providers="cpu", threads=1) as engine:
        assert "sha256" in engine.refused["torn"]
        assert set(engine.models) == {"good"}


def test_a_file_that_is_not_a_graph_is_rejected(tmp_path):
    folder = write_bundle(tmp_path, "junk", "embed", "pixel")
    (folder / "model.onnx").write_bytes(b"this is no graph")
    sha = sha256_of(folder / "model.onnx")
    card = json.loads((folder / "card.json").read_text())
    card["sha256"] = card["variants"][0]["sha256"] = sha
    (folder / "card.json").write_text(json.dumps(card))
    with Engine(Registry.load(tmp_path), providers="cpu", threads=1) as engine:
        assert "cannot be loaded" in engine.refused["junk"]


# Providers --------------------------------------------------------------------------------------


def test_the_provider_stated_is_the_one_that_the_session_got(zoo):
    with Engine(Registry.load(zoo), providers="auto", threads=1) as engine:
        got = {m._session.session.get_providers()[0] for m in engine.models.values()}
        assert got == {engine.provider}
        assert {m.provider for m in engine.models.values()} == got


def test_cuda_is_used_or_an_error_but_never_replaced(zoo):
    with Engine(Registry.load(zoo), providers="auto", threads=1) as engine:
        there = engine.provider == CUDA
    if there:
        with Engine(Registry.load(zoo), providers="cuda", threads=1) as engine:
            assert engine.provider == CUDA
    else:
        with pytest.raises(ProviderUnavailable, match="CUDA"):
            Engine(Registry.load(zoo), providers="cuda", threads=1)


def card_with(zoo, **losses):
    card = Registry.load(zoo).bundles["pixels-landcover"].card
    first = card.variants[0]
    more = [first.model_copy(update={"name": name, "loss": loss}) for name, loss in losses.items()]
    return card.model_copy(update={"variants": (first, *more)})


def half_values(model):
    (given,) = (i for i in model.graph.input if i.name == "values")
    given.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    model.graph.node.insert(
        0, onnx.helper.make_node("Cast", ["values"], ["whole"], to=onnx.TensorProto.FLOAT)
    )
    for node in model.graph.node[1:]:
        node.input[:] = ["whole" if name == "values" else name for name in node.input]


def test_reflectance_goes_into_a_float16_graph_as_float16(tmp_path):
    write_bundle(tmp_path, "whole", "embed", "pixel")
    changed(write_bundle(tmp_path, "half", "embed", "pixel"), half_values)
    with Engine(Registry.load(tmp_path), providers="cpu", threads=1) as engine:
        assert engine.refused == {}
        values, valid, days = series(40, dates=9)
        expected = engine.models["whole"].pixels(values, valid, days)
        got = engine.models["half"].pixels(values, valid, days)
    assert 0 < np.nanmax(np.abs(got - expected)) < 2e-3


def test_the_variant_with_a_negligible_loss_is_used(zoo, monkeypatch):
    monkeypatch.setattr("service.infer.session.multiplies_int8", lambda: True)
    assert pick_variant(card_with(zoo), CPU) == "float32"
    assert pick_variant(card_with(zoo, float16={"accuracy": 0.0}), CUDA) == "float16"
    assert pick_variant(card_with(zoo, float16={"accuracy": 0.0}), CPU) == "float32"
    assert pick_variant(card_with(zoo, float16={}), CUDA) == "float32"  # a loss nobody measured
    assert pick_variant(card_with(zoo, float16={"accuracy": -0.02}), CUDA) == "float32"
    assert pick_variant(card_with(zoo, int8={"accuracy": -0.001}), CPU) == "int8"
    assert pick_variant(card_with(zoo, int8={"accuracy": -0.001, "f1": -0.004}), CPU) == "float32"
    assert pick_variant(card_with(zoo, int8={}), CPU) == "float32"  # a loss nobody measured
    assert pick_variant(card_with(zoo, int8={"accuracy": 0.01}), CUDA) == "float32"
    monkeypatch.setattr("service.infer.session.multiplies_int8", lambda: False)
    assert pick_variant(card_with(zoo, int8={"accuracy": 0.01}), CPU) == "float32"


def test_float32_is_used_if_requested(monkeypatch):
    monkeypatch.setattr("service.infer.session.multiplies_int8", lambda: True)
    bundle = Registry.load(ZOO).bundles["pixels-landcover"]
    assert open_session(bundle, CPU).variant == "int8"
    assert open_session(bundle, CPU, "float32").variant == "float32"


class SmallDevice:
    """ONNX Runtime's session, with memory for so many pixels and one of another kind of fault."""

    def __init__(self, session, most, fault=None, times=10**9):
        self.session, self.most, self.fault, self.times = session, most, fault, times
        self.sizes = []
        self.holes = {}

    def get_providers(self):
        return [CUDA, CPU]

    def run(self, names, feeds, options=None):
        count = len(feeds.get("values", feeds.get("patches")))
        self.sizes.append(count)
        if self.fault and 1 < len(self.sizes) <= 1 + self.times:
            raise self.fault
        if count > self.most:
            raise Fail("BFCArena: Failed to allocate memory for requested buffer")
        (prediction,) = self.session.run(names, feeds)
        for row, value in self.holes.items():
            prediction[row] = value
        return [prediction]


def on_a_device(zoo, most, fault=None, times=10**9, kind=SmallDevice, name="pixels-landcover"):
    bundle = Registry.load(zoo).bundles[name]
    reference = open_session(bundle, CPU)
    small = kind(open_session(bundle, CPU).session, most, fault, times)
    session = replace(reference, session=small)
    model = LoadedModel(
        bundle.card,
        session,
        pool=ThreadPoolExecutor(1),
        device=threading.Lock(),
        reference=reference,
    )
    return model, small


def test_on_a_device_batches_are_padded_to_few_shapes(zoo, engine):
    model, device = on_a_device(zoo, most=10**9)
    assert model.provider == CUDA
    values, valid, days = series(PIXEL_BATCH[CUDA] + 700)
    found = model.pixels(values, valid, days)
    expected = engine.models["pixels-landcover"].pixels(values, valid, days)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert device.sizes[1:] == [PIXEL_BATCH[CUDA], 1024]


def test_out_of_memory_halves_the_batch_and_the_run_continues(zoo, engine):
    model, device = on_a_device(zoo, most=2048)
    values, valid, days = series(5000)
    found = model.pixels(values, valid, days)
    expected = engine.models["pixels-landcover"].pixels(values, valid, days)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert device.sizes[1:] == [8192, 4096, 2048, 2048, 1024]


def test_another_device_fault_does_not_halve_the_batch(zoo):
    model, device = on_a_device(zoo, most=10**9, fault=InvalidArgument("wrong rank"))
    with pytest.raises(InternalError):
        model.pixels(*series(100))
    assert device.sizes[1:] == [128, 128]  # tried once more, and reported
    assert model.failing


def test_a_transient_fault_is_retried_once_without_an_error(zoo, engine):
    model, _ = on_a_device(zoo, most=10**9, fault=Fail("CUDA failure 719"), times=1)
    values, valid, days = series(5000)
    found = model.pixels(values, valid, days)
    expected = engine.models["pixels-landcover"].pixels(values, valid, days)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert not model.failing


def test_a_device_that_works_again_is_not_failing(zoo):
    model, _ = on_a_device(zoo, most=10**9, fault=Fail("CUDA failure 719"), times=2)
    with pytest.raises(InternalError):
        model.pixels(*series(10))
    assert model.failing
    model.pixels(*series(10))
    assert not model.failing


@pytest.mark.parametrize("hole", [np.nan, np.inf])
def test_a_device_without_numbers_where_the_cpu_has_them_is_reported(zoo, hole):
    model, device = on_a_device(zoo, most=10**9)
    values, valid, days = series(300)
    valid[7] = False  # nothing to predict from: NaN is right
    assert np.isnan(model.pixels(values, valid, days)[7]).all()
    device.holes = {8: hole}
    with pytest.raises(InternalError):
        model.pixels(values, valid, days)


def test_a_device_predicts_for_patches_and_reports_one_without_numbers(zoo, engine):
    model, device = on_a_device(zoo, most=10**9, name="landcover-eurosat")
    side, bands = model.card.patch, len(model.card.bands)
    patches = np.random.default_rng(0).uniform(0, 0.4, (9, bands, side, side)).astype(np.float32)
    found = model.patches(patches)
    expected = engine.models["landcover-eurosat"].patches(patches)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    device.holes = {4: np.nan}
    with pytest.raises(InternalError):
        model.patches(patches)


def test_a_device_is_compared_with_the_cpu_in_float32(zoo, monkeypatch):
    opened = []

    def record(bundle, provider, precision="auto", **options):
        opened.append((provider, precision))
        session = open_session(bundle, CPU, precision, **options)
        small = SmallDevice(session.session, most=10**9)
        return replace(session, session=small) if provider == CUDA else session

    monkeypatch.setattr("service.infer.engine.open_session", record)
    monkeypatch.setattr("service.infer.engine.provider_to_request", lambda _: CUDA)
    with Engine(Registry.load(zoo), providers="cuda", threads=1) as engine:
        assert {model.provider for model in engine.models.values()} == {CUDA}
    assert set(opened) == {(CUDA, "auto"), (CPU, "float32")}


def test_a_device_that_differs_from_the_cpu_is_rejected(zoo):
    class Reversed(SmallDevice):
        def run(self, names, feeds, options=None):
            return [prediction[:, ::-1] for prediction in super().run(names, feeds)]

    with pytest.raises(
        BundleError, match="outputs on CUDAExecutionProvider differ from those on the CPU"
    ):
        on_a_device(zoo, most=10**9, kind=Reversed)
    on_a_device(zoo, most=10**9)  # which is not


# ONNX Runtime really runs out of memory, in a process of its own.
STARVED = """
import logging, resource, sys
import numpy as np
import onnxruntime
import threading
from concurrent.futures import ThreadPoolExecutor
from models.registry import Registry, ZOO
from service.infer import model as m
from service.infer import session as e

logging.basicConfig(stream=sys.stderr)
how, source, target = sys.argv[1:]
given = np.load(source)
bundle = Registry.load(ZOO).bundles["pixels-landcover"]
if how == "arena":  # an arena of 4 MiB, as one of a device that others fill
    options = e._session_options(e.CPU)  # the sessions share one, which the next takes the place of
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    config = onnxruntime.OrtArenaCfg({"max_mem": 4 * 2**20, "arena_extend_strategy": 1})
    onnxruntime.create_and_register_allocator(memory, config)
    inner = onnxruntime.InferenceSession(bundle.path(), options, providers=[e.CPU])
    kinds = {"values": np.float32, "valid": np.bool_, "days": np.float32}
    session = e.Session(session=inner, output="probabilities", kinds=kinds, variant="float32",
        shrinking=e.ArenaShrinking())
else:
    session = e.open_session(bundle, e.CPU, "float32")
pool = ThreadPoolExecutor(1)
model = m.LoadedModel(bundle.card, session, pool=pool, device=threading.Lock())
pool.submit(int).result()  # its thread takes memory as well
if how == "system":
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 2**20, -1))
predictions = model.pixels(given["values"], given["valid"], given["days"])
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
np.save(target, predictions)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited as Linux does it")
@pytest.mark.parametrize("how", ["arena", "system"])
def test_real_lack_of_memory_halves_the_batch_and_changes_no_prediction(tmp_path, how):
    values, valid, days = series(600, dates=40)
    days *= 9
    np.savez(tmp_path / "given.npz", values=values, valid=valid, days=days)
    done = subprocess.run(
        [sys.executable, "-c", STARVED, how, tmp_path / "given.npz", tmp_path / "predictions.npy"],
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"out of memory; a batch of \d+ is halved", done.stderr)
    registry = Registry.load(ZOO)
    with Engine(registry, providers="cpu", threads=1, precision="float32") as undisturbed:
        expected = undisturbed.models["pixels-landcover"].pixels(values, valid, days)
    found = np.load(tmp_path / "predictions.npy")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).all()


GIVEN_BACK = """
import ctypes, sys
import numpy as np
from models.registry import Registry, ZOO
from service.infer.engine import Engine

def resident():
    ctypes.CDLL(None).malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * 4096

with Engine(Registry.load(ZOO), providers="cpu", threads=1) as engine:
    turn = engine._shrinking
    turn.options()  # the first run that shrinks the arena; no other one for a while
    turn._next += 1e6
    model = engine.models["landcover-eurosat"]
    patches = np.full((32, 3, 64, 64), 0.1, np.float32)
    before = model.patches(patches)
    full = resident()
    turn._next = 0.0
    model.patches(patches[:1])
    left = resident()
    assert (model.patches(patches) == before).all()
print(full - left)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc"
)
def test_memory_of_a_large_batch_is_released_later() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GIVEN_BACK],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 2**23


def test_one_run_in_ten_seconds_shrinks_the_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("service.infer.session.time.monotonic", lambda: now)
    shrinking = ArenaShrinking(10.0)
    assert [shrinking.options() is None, shrinking.options() is None] == [False, True]
    now = 109.9
    assert shrinking.options() is None
    now = 110.0
    assert [shrinking.options() is None, shrinking.options() is None] == [False, True]


@pytest.mark.slow
def test_the_runtime_sends_no_telemetry(tmp_path: Path) -> None:
    # It is silent by itself where it believes to be under test.
    settings = {k: v for k, v in os.environ.items() if k not in {"ORT_DISABLE_TELEMETRY", "CI"}}
    for module, traces in (("onnxruntime", 1), ("service.infer.engine", 0)):
        folder = tmp_path / module
        folder.mkdir()
        subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            env={**settings, "TMPDIR": str(folder)},
            check=True,
            cwd=Path(__file__).parent.parent,
        )
        # Were the first 0 too, the runtime has changed, and this setting with it.
        assert len(list(folder.iterdir())) == traces

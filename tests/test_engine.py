"""The engine against ONNX Runtime called directly, and what it refuses."""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument
from tiny_zoo import write_bundle, write_zoo

from models.registry import Registry, sha256_of
from service.engine import (
    CPU,
    CUDA,
    PIXEL_BATCH,
    Engine,
    LoadedModel,
    ProviderUnavailable,
    Session,
    open_session,
    pick_variant,
)
from service.errors import InternalError, UnknownModel, WrongTask


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
def test_pixels_as_the_runtime_alone_answers(engine, zoo, name, count):
    values, valid, days = series(count)
    found = engine.models[name].pixels(values, valid, days)
    expected = direct(zoo, name, {"values": values, "valid": valid, "days": days})
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 8, 19])
@pytest.mark.parametrize("name", ["landcover-eurosat", "embed-patch"])
def test_patches_as_the_runtime_alone_answers(engine, zoo, name, count):
    patches = np.random.default_rng(1).random((count, 3, 64, 64), np.float32)
    found = engine.models[name].patches(patches)
    np.testing.assert_allclose(found, direct(zoo, name, {"patches": patches}), rtol=1e-5)


def test_views_and_other_number_types_are_taken(engine):
    values, valid, days = series(300)
    model = engine.models["pixels-landcover"]
    turned = np.asfortranarray(values).astype(np.float64)
    np.testing.assert_allclose(
        model.pixels(turned, valid.T.copy().T, days.astype(int)),
        model.pixels(values, valid, days),
        rtol=1e-6,
    )


def test_nothing_asked_nothing_answered(engine):
    values, valid, days = series(0)
    assert engine.models["pixels-landcover"].pixels(values, valid, days).shape == (0, 3)
    assert engine.models["forecast-vi"].pixels(values, valid, days).shape == (0, 3, 3, 3)


def test_a_pixel_without_dates_is_nan_and_leaves_its_neighbours_alone(engine):
    values, valid, days = series(600)
    model = engine.models["pixels-landcover"]
    before = model.pixels(values, valid, days)
    values[100], valid[100] = np.nan, False
    values[~valid] = np.nan
    after = model.pixels(values, valid, days)
    assert np.isnan(after[100]).all()
    np.testing.assert_allclose(np.delete(after, 100, 0), np.delete(before, 100, 0), rtol=1e-6)


def test_callers_at_the_same_time_get_their_own_answers(engine, zoo):
    model = engine.models["pixels-landcover"]
    asked = [series(700, dates=3 + n, seed=n) for n in range(6)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda one: model.pixels(*one), asked))
    for (values, valid, days), answer in zip(asked, found, strict=True):
        expected = direct(zoo, "pixels-landcover", {"values": values, "valid": valid, "days": days})
        np.testing.assert_allclose(answer, expected, rtol=1e-6)


def test_the_runtime_failing_is_our_error_with_its_cause_and_without_its_words(engine):
    values, valid, days = series(600, dates=5)
    with pytest.raises(InternalError, match=r"pixels-brittle@0\.0\.1") as caught:
        engine.models["pixels-brittle"].pixels(values[:3], valid[:3], days)
    assert type(caught.value.__cause__).__module__.startswith("onnxruntime")
    assert "onnxruntime" not in caught.value.detail.lower()
    # 600 x 5 dates make whole rows of 4 dates, so it runs, and answers for too many pixels.
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
def test_an_unknown_model_is_told_what_there_is(engine, reference):
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
        ({"day_of_year": True}, r"takes days, valid, values, the card says day_of_year"),
        ({"classes": LEGEND}, r"'probabilities' answers \(3,\).*\(4,\)"),
    ],
)
def test_a_bundle_that_is_not_its_card_is_refused_and_the_others_serve(tmp_path, change, says):
    write_bundle(tmp_path, "good", "classify-pixels", "pixel")
    write_bundle(tmp_path, "bad", "classify-pixels", "pixel", **change)
    with Engine(Registry.load(tmp_path), providers="cpu", threads=1) as engine:
        assert set(engine.models) == {"good"}
        assert set(engine.refused) == {"bad"}
        assert re.search(says, engine.refused["bad"])
        with pytest.raises(UnknownModel, match=r"bad@0\.0\.1' could not be loaded"):
            engine.find("bad", "classify-pixels")


def test_a_graph_of_another_task_is_refused(tmp_path):
    folder = write_bundle(tmp_path, "embed", "embed", "pixel")
    card = json.loads((folder / "card.json").read_text())
    del card["embedding"]
    card |= {"task": "classify-pixels", "classes": LEGEND[:3]}
    (folder / "card.json").write_text(json.dumps(card))
    with Engine(Registry.load(tmp_path), providers="cpu", threads=1) as engine:
        assert "returns embedding, the card says probabilities" in engine.refused["embed"]


def test_what_the_registry_refused_is_said_too(tmp_path):
    (write_bundle(tmp_path, "torn", "embed", "pixel") / "model.onnx").write_bytes(b"no")
    write_bundle(tmp_path, "good", "embed", "pixel")
    with Engine(Registry.load(tmp_path), providers="cpu", threads=1) as engine:
        assert "sha256" in engine.refused["torn"]
        assert set(engine.models) == {"good"}


def test_a_file_that_is_no_graph_is_refused(tmp_path):
    folder = write_bundle(tmp_path, "junk", "embed", "pixel")
    (folder / "model.onnx").write_bytes(b"this is no graph")
    sha = sha256_of(folder / "model.onnx")
    card = json.loads((folder / "card.json").read_text())
    card["sha256"] = card["variants"][0]["sha256"] = sha
    (folder / "card.json").write_text(json.dumps(card))
    with Engine(Registry.load(tmp_path), providers="cpu", threads=1) as engine:
        assert "does not load" in engine.refused["junk"]


# Providers --------------------------------------------------------------------------------------


def test_the_provider_stated_is_the_one_that_the_session_got(zoo):
    with Engine(Registry.load(zoo), providers="auto", threads=1) as engine:
        got = {m._session.session.get_providers()[0] for m in engine.models.values()}
        assert got == {engine.provider}
        assert {m.provider for m in engine.models.values()} == got


def test_cuda_is_had_or_refused_but_never_replaced(zoo):
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


def test_the_variant_that_costs_nothing_is_taken(zoo):
    assert pick_variant(card_with(zoo), CPU) == "float32"
    assert pick_variant(card_with(zoo, float16={}), CUDA) == "float16"
    assert pick_variant(card_with(zoo, float16={}), CPU) == "float32"
    assert pick_variant(card_with(zoo, float16={"accuracy": -0.02}), CUDA) == "float32"
    assert pick_variant(card_with(zoo, int8={"accuracy": -0.001}), CPU) == "int8"
    assert pick_variant(card_with(zoo, int8={"accuracy": -0.001, "f1": -0.004}), CPU) == "float32"
    assert pick_variant(card_with(zoo, int8={}), CPU) == "float32"  # a loss nobody measured
    assert pick_variant(card_with(zoo, int8={"accuracy": 0.01}), CUDA) == "float32"


class SmallDevice:
    """ONNX Runtime's session, with memory for so many pixels and one of another kind of fault."""

    def __init__(self, session, most, fault=None):
        self.session, self.most, self.fault = session, most, fault
        self.sizes = []

    def get_providers(self):
        return [CUDA, CPU]

    def run(self, names, feeds):
        self.sizes.append(len(feeds["values"]))
        if self.fault and len(self.sizes) > 1:
            raise self.fault
        if len(feeds["values"]) > self.most:
            raise Fail("BFCArena: Failed to allocate memory for requested buffer")
        return self.session.run(names, feeds)


def on_a_device(zoo, most, fault=None):
    bundle = Registry.load(zoo).bundles["pixels-landcover"]
    small = SmallDevice(open_session(bundle, CPU).session, most, fault)
    session = Session(session=small, output="probabilities", variant="float32")
    model = LoadedModel(bundle.card, session, pool=ThreadPoolExecutor(1), device=threading.Lock())
    return model, small


def test_on_a_device_batches_are_padded_to_few_shapes(zoo, engine):
    model, device = on_a_device(zoo, most=10**9)
    assert model.provider == CUDA
    values, valid, days = series(PIXEL_BATCH[CUDA] + 700)
    found = model.pixels(values, valid, days)
    expected = engine.models["pixels-landcover"].pixels(values, valid, days)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert device.sizes[1:] == [PIXEL_BATCH[CUDA], 1024]


def test_out_of_memory_halves_the_batch_and_goes_on(zoo, engine):
    model, device = on_a_device(zoo, most=2048)
    values, valid, days = series(5000)
    found = model.pixels(values, valid, days)
    expected = engine.models["pixels-landcover"].pixels(values, valid, days)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert device.sizes[1:] == [8192, 4096, 2048, 2048, 1024]


def test_another_fault_of_the_device_is_no_reason_to_halve(zoo):
    model, device = on_a_device(zoo, most=10**9, fault=InvalidArgument("wrong rank"))
    with pytest.raises(InternalError):
        model.pixels(*series(100))
    assert len(device.sizes) == 2

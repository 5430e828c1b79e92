"""Own classes without a server: the graph, the classifier, places, scores, the store."""

from __future__ import annotations

import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from benchmarks.tiny_zoo import write_bundle
from models.registry import Registry, load_bundle
from models.timegrid import TimeGrid
from service.errors import InvalidRequest, NameTaken, UnknownModel
from service.infer.engine import Engine
from service.jobs import files, heads
from service.jobs.heads import HeadStore
from service.learn import kernel
from service.learn.graph import (
    FEATURES,
    INDICES,
    STEP_DAYS,
    STEPS,
    Embedding,
    columns_of,
    feature_graph,
    indices_of,
    with_head,
)
from service.learn.places import folds_of, named_places, spatial_places
from service.learn.scores import calibration_error, place_interval, scores

BANDS = ("B02", "B03", "B04", "B08")
ZOO = Path(__file__).parents[1] / "models" / "zoo"


def run(model: bytes, values: np.ndarray, valid: np.ndarray, days: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    feeds = {"values": values, "valid": valid, "days": days}
    return session.run(None, feeds)[0]


@pytest.fixture(scope="module")
def pixels() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reflectance of 30 pixels on 20 dates of two years, a quarter of them cloudy."""
    random = np.random.default_rng(3)
    values = random.uniform(0.01, 0.6, (30, 20, len(BANDS))).astype(np.float32)
    valid = random.random((30, 20)) > 0.25
    days = np.sort(random.choice(700, 20, replace=False)).astype(np.float32)
    return values, valid, days


def expected_features(values: np.ndarray, valid: np.ndarray, days: np.ndarray) -> np.ndarray:
    """The same by the torch grid of the built-in models, and the indices by hand."""
    grid = TimeGrid(STEPS, STEP_DAYS, period=365.25)
    series, _ = grid(
        torch.from_numpy(values).transpose(1, 2), torch.from_numpy(valid), torch.from_numpy(days)
    )
    by_band = dict(zip(BANDS, series.numpy().transpose(1, 0, 2), strict=True))
    rows = [by_band[band] for band in BANDS]
    for name in indices_of(BANDS):
        a, b = (by_band[band] for band in INDICES[name])
        rows.append(np.clip((a - b) / np.maximum(a + b, 0.05), -1, 1))
    # Each band and index is followed by the means of two neighbouring ranks.
    ranked = [np.sort(row, axis=1).reshape(len(row), -1, 2).mean(axis=2) for row in rows]
    plain = [part for pair in zip(rows, ranked, strict=True) for part in pair]
    compressed = [np.arcsinh(part / 0.03) + np.log(0.03) for part in plain[: 2 * len(BANDS)]]
    return np.concatenate([*compressed, *plain], axis=1)


def test_the_features_are_those_of_the_torch_grid(pixels) -> None:
    values, valid, days = pixels
    found = run(feature_graph(BANDS, series=True, embedding=None), values, valid, days)
    assert indices_of(BANDS) == ("ndvi", "ndwi", "ngrdi")
    np.testing.assert_allclose(found, expected_features(values, valid, days), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("nonsense", [np.nan, np.inf, -np.inf, 1e30, 0.0])
def test_what_is_not_valid_has_no_say(pixels, nonsense: float) -> None:
    values, valid, days = pixels
    graph = feature_graph(BANDS, series=True, embedding=None)
    spoilt = np.where(valid[..., None], values, np.float32(nonsense))
    np.testing.assert_array_equal(run(graph, spoilt, valid, days), run(graph, values, valid, days))


def test_any_reflectance_has_features(pixels) -> None:
    values, valid, days = pixels
    graph = feature_graph(BANDS, series=True, embedding=None)
    for factor in (0, -0.1, -1, 400, -400):  # below zero, or not scaled
        assert np.isfinite(run(graph, values * np.float32(factor), valid, days)).all()


def test_a_band_that_is_not_a_number_makes_its_date_missing(pixels) -> None:
    values, valid, days = pixels
    graph = feature_graph(BANDS, series=True, embedding=None)
    spoilt, lost = values.copy(), valid.copy()
    spoilt[:, 4, 1], lost[:, 4] = np.nan, False
    np.testing.assert_array_equal(run(graph, spoilt, valid, days), run(graph, values, lost, days))


def test_a_pixel_without_a_usable_date_is_nan_and_others_are_not(pixels) -> None:
    values, valid, days = pixels
    valid = valid.copy()
    valid[7] = False
    features = run(feature_graph(BANDS, series=True, embedding=None), values, valid, days)
    assert np.isnan(features[7]).all()
    assert np.isfinite(np.delete(features, 7, axis=0)).all()
    head = fitted(np.delete(features, 7, axis=0)).head
    found = run(
        with_head(feature_graph(BANDS, series=True, embedding=None), head), values, valid, days
    )
    assert np.isnan(found[7]).all()
    assert np.isfinite(np.delete(found, 7, axis=0)).all()


def test_an_embedding_is_that_of_its_own_bundle(pixels) -> None:
    values, valid, _ = pixels
    days = np.linspace(0, 350, 20).astype(np.float32)
    bundle = load_bundle(ZOO / "embed-pixel")
    content = bundle.path().read_bytes()
    length = bundle.card.embedding
    assert length is not None
    embedding = Embedding(model=content, bands=("B02", "B04", "B08"), length=length)
    assert embedding.opset is not None
    both = run(feature_graph(BANDS, series=True, embedding=embedding), values, valid, days)
    alone = run(feature_graph(BANDS, series=False, embedding=embedding), values, valid, days)
    expected = run(content, values[..., [0, 2, 3]], valid, days)
    np.testing.assert_allclose(alone, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(both[:, -length:], expected, rtol=1e-4, atol=1e-4)


def simple(values: np.ndarray) -> kernel.Features:
    """Features of which each kernel takes all."""
    columns = np.arange(values.shape[1])
    return kernel.Features(values=values, columns={"Cauchy": columns, "linear": columns})


def fitted(features: np.ndarray) -> kernel.Fitted:
    classes = (np.arange(len(features)) % 3).astype(np.intp)
    folds = (np.arange(len(features)) % 4).astype(np.intp)
    cauchy, linear = columns_of(BANDS, series=True, embedding=None)
    own = kernel.Features(values=features, columns={"Cauchy": cauchy, "linear": linear})
    return kernel.fit({"series": own}, classes, folds)


def by_hand(found: kernel.Fitted, labels: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Probabilities by both kernels between every pixel and every label, from their definition."""
    targets = np.eye(3)[np.arange(len(labels)) % 3] - 1 / 3
    counts = np.bincount(np.arange(len(labels)) % 3)
    ridges = 3 * counts[np.arange(len(labels)) % 3] / len(labels)
    row = STEPS + STEPS // 2
    taken = {
        "Cauchy": np.r_[: len(BANDS) * row, 2 * len(BANDS) * row : features.shape[1]],
        "linear": np.arange(len(BANDS) * row, features.shape[1]),
    }
    logits = np.zeros((len(features), 3))
    for part, temperature in found.choice.parts.items():
        columns = taken[part.kernel]
        mean, deviation = labels[:, columns].mean(axis=0), labels[:, columns].std(axis=0)
        a, b = (
            (x[:, columns] - mean) / np.maximum(deviation, 1e-6) / np.sqrt(len(columns))
            for x in (features, labels)
        )

        def k(x: np.ndarray, y: np.ndarray, part: kernel.Candidate = part) -> np.ndarray:
            if part.kernel == "linear":
                return 0.1 + x @ y.T / part.width
            return 1 / (1 + ((x[:, None] - y[None]) ** 2).sum(axis=-1) / part.width)

        weights = np.linalg.solve(k(b, b) + part.ridge * np.diag(ridges), targets)
        share = {"Cauchy": 2 / 3, "linear": 1 / 3}[part.kernel]
        logits += share * k(a, b) @ weights / temperature / found.choice.temperature
    grown = np.exp(logits - logits.max(axis=1, keepdims=True))
    return grown / grown.sum(axis=1, keepdims=True)


def test_the_exported_head_is_the_fitted_one(pixels) -> None:
    values, valid, days = pixels
    graph = feature_graph(BANDS, series=True, embedding=None)
    features = run(graph, values, valid, days).astype(np.float64)
    made = fitted(features[:20])
    found = run(with_head(graph, made.head), values, valid, days)
    assert FEATURES == "embedding"
    assert {part.kernel for part in made.choice.parts} == {"Cauchy", "linear"}
    np.testing.assert_allclose(found, by_hand(made, features[:20], features), atol=2e-4)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)


def test_left_out_scores_are_those_of_heads_fitted_without_the_fold() -> None:
    random = np.random.default_rng(5)
    # The classes' counts in and out of the folds agree, so that the weights of classes do, too.
    classes = np.tile([0, 1, 2], 10).astype(np.intp)
    folds = np.repeat(np.arange(5), 6).astype(np.intp)
    x = random.normal(size=(30, 4)) + classes[:, None]
    gram = 1 / (1 + 0.3 * ((x[:, None] - x[None]) ** 2).sum(-1))
    found = kernel._left_out(gram.copy(), 0.2, classes, folds)
    targets = np.eye(3)[classes] - 1 / 3
    for fold in range(5):
        own, others = folds == fold, folds != fold
        inner = gram[np.ix_(others, others)] + 0.2 * np.eye(others.sum())
        expected = gram[np.ix_(own, others)] @ np.linalg.solve(inner, targets[others])
        np.testing.assert_allclose(found[own], expected, atol=1e-8)


def test_classes_apart_are_told_apart_and_noise_is_not() -> None:
    random = np.random.default_rng(6)
    classes = np.arange(60).astype(np.intp) % 2
    folds = (np.arange(60) // 12).astype(np.intp)
    noise = random.normal(size=(60, 5))
    apart = kernel.fit({"a": simple(noise + 6.0 * classes[:, None])}, classes, folds)
    assert (apart.probabilities.argmax(axis=1) == classes).all()
    lost = kernel.fit({"a": simple(noise)}, classes, folds)
    assert (lost.probabilities.argmax(axis=1) == classes).mean() < 0.75
    # Calibrated: the confidence is low where the features do not separate the classes.
    assert lost.probabilities.max(axis=1).mean() < apart.probabilities.max(axis=1).mean()
    assert calibration_error(lost.probabilities, classes) < 0.25
    # Thirty labels per class, all predicted correctly, give a confidence of about 31 in 32.
    assert apart.probabilities.max(axis=1).mean() == pytest.approx(31 / 32, abs=0.02)


def test_a_class_of_one_place_neither_lowers_confidence_nor_has_a_score() -> None:
    random = np.random.default_rng(8)
    classes = np.repeat(np.arange(6), 10).astype(np.intp)
    folds = np.where(classes < 3, np.arange(60) % 3, classes - 3).astype(np.intp)
    x = simple(random.normal(size=(60, 5)) + 8.0 * np.eye(6)[classes] @ random.normal(size=(6, 5)))
    found = kernel.fit({"a": x}, classes, folds)
    assert found.tested.tolist() == (classes < 3).tolist()
    rest = classes < 3
    alone = kernel.fit({"a": simple(x.values[rest])}, classes[rest], folds[rest])
    assert (found.probabilities[rest].argmax(axis=1) == classes[rest]).all()
    sure = found.probabilities[rest].max(axis=1).mean()
    assert sure == pytest.approx(alone.probabilities.max(axis=1).mean(), abs=0.05)
    card = scores(found.probabilities, classes, folds, found.tested)
    assert (card["n"], card["macro_f1"], card["f1"]) == (30, 1.0, [1.0] * 3 + [None] * 3)
    # If no class has a second fold, all labels count.
    assert kernel.known_elsewhere(classes, classes).all()


def test_the_better_features_are_chosen() -> None:
    random = np.random.default_rng(7)
    classes = np.arange(40).astype(np.intp) % 2
    folds = (np.arange(40) // 8).astype(np.intp)
    good = random.normal(size=(40, 3)) + 4.0 * classes[:, None]
    bad = random.normal(size=(40, 3))
    found = kernel.fit({"bad": simple(bad), "good": simple(good)}, classes, folds)
    assert found.choice.features == "good"


@pytest.mark.parametrize("count", [12, 60, 300])
def test_neighbours_are_never_in_two_places(count: int) -> None:
    random = np.random.default_rng(count)
    xy = random.integers(0, 400, (count, 2)).astype(np.float64)
    xy[1::2] = xy[::2] + 3  # two pixels of one label
    labels = (np.arange(count) // 2).astype(np.intp)
    places, near = spatial_places(xy, labels)
    away = np.hypot(*(xy[:, None] - xy[None]).transpose(2, 0, 1))
    other = places[:, None] != places[None]
    assert away[other].min() > near
    assert (places[::2] == places[1::2]).all()
    assert len(np.unique(places)) > 1
    assert near >= 1.5


def test_labels_that_touch_are_one_place() -> None:
    row = np.stack([np.arange(30.0), np.zeros(30)], axis=1)
    places, near = spatial_places(row, np.arange(30))
    assert len(np.unique(places)) == 1
    assert near == 1.5


def test_named_places_hold_whole_labels() -> None:
    # The second label has pixels in both places, so the two are one.
    names, labels = ["a", "a", "b", "b", "c"], np.array([0, 1, 1, 2, 3])
    assert named_places(names, labels).tolist() == [0, 0, 0, 0, 1]


def test_folds_hold_whole_places_and_spread_the_classes() -> None:
    random = np.random.default_rng(8)
    places = random.integers(0, 40, 400).astype(np.intp)
    classes = (places % 4).astype(np.intp)
    folds = folds_of(places, classes)
    assert set(folds) == set(range(5))
    for place in np.unique(places):
        assert len(np.unique(folds[places == place])) == 1
    counts = np.array([[((folds == f) & (classes == c)).sum() for c in range(4)] for f in range(5)])
    assert (counts > 0).all()
    assert folds_of(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])).tolist() in (
        [0, 0, 1, 1],
        [1, 1, 0, 0],
    )


@pytest.mark.slow
def test_scores_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import confusion_matrix, f1_score  # takes seconds

    random = np.random.default_rng(9)
    truth = random.integers(0, 3, 200)
    probabilities = random.dirichlet([1, 1, 1], 200)
    places = random.integers(0, 20, 200)
    found = scores(probabilities, truth, places, np.ones(200, np.bool_))
    guess = probabilities.argmax(axis=1)
    assert found["confusion"] == confusion_matrix(truth, guess).tolist()
    assert found["macro_f1"] == pytest.approx(f1_score(truth, guess, average="macro"), abs=1e-4)
    low, high = found["macro_f1_interval"]
    assert low < found["macro_f1"] < high
    assert place_interval(truth, guess, np.zeros(200, np.intp), 3) is None


def test_an_interval_by_place_is_wider_than_one_by_pixel() -> None:
    random = np.random.default_rng(10)
    places = np.repeat(np.arange(10), 50)
    truth = random.integers(0, 2, 500)
    # Whole places are right or wrong.
    found = np.where(np.isin(places, [0, 3]), 1 - truth, truth)
    low, high = place_interval(truth, found, places, 2)
    alone = place_interval(truth, found, np.arange(500), 2)
    assert high - low > 2 * (alone[1] - alone[0])


# The store ----------------------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path: Path):
    with Engine(Registry(bundles={}), providers="cpu", threads=1) as made:
        yield made


def publish(store: HeadStore, engine: Engine, source: Path, owner: str = "") -> None:
    with store.draft() as folder:
        for file in source.iterdir():
            shutil.copy(file, folder)
        store.publish(owner, folder, engine.load(load_bundle(folder)))


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "made", "mine", "classify-pixels", "pixel", default=False)


class Killed(BaseException):
    """Ends a process where it stands, for a test."""


def test_a_model_is_there_after_a_restart_and_gone_once_removed(tmp_path, engine, made) -> None:
    store = HeadStore(tmp_path, engine, most=9)
    publish(store, engine, made, "a")
    assert list(engine.own("a")) == ["mine"]
    assert engine.own("b") == {}
    with Engine(Registry(bundles={}), providers="cpu", threads=1) as second:
        again = HeadStore(tmp_path, second, most=9)
        assert second.own("a")["mine"].card == engine.own("a")["mine"].card
        with pytest.raises(UnknownModel):
            again.remove("b", "mine")
        again.remove("a", "mine")
        assert second.own("a") == {}
        assert [p.name for p in (tmp_path / "heads").rglob("*")] == ["a"]


@pytest.mark.parametrize("step", ["sync_file", "sync_folder", "rename", "after"])
def test_a_kill_while_publishing_leaves_all_or_nothing(
    tmp_path, engine, made, step, monkeypatch
) -> None:
    store = HeadStore(tmp_path, engine, most=9)

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        # As after a kill, nothing is tidied up.
        patch.setattr(heads.shutil, "rmtree", lambda *_, **__: None)
        if step == "rename":
            patch.setattr(Path, "rename", killed)
        elif step == "after":
            patch.setattr(engine, "add", killed)
        else:
            patch.setattr(files, step, killed)
        with pytest.raises(Killed):
            publish(store, engine, made)
    with Engine(Registry(bundles={}), providers="cpu", threads=1) as second:
        HeadStore(tmp_path, second, most=9)
        assert list(second.own("")) == (["mine"] if step == "after" else [])
    left = {p.name for p in (tmp_path / "heads").iterdir()}
    assert left <= {"_"}


def test_a_damaged_model_is_not_served_and_harms_no_other(tmp_path, engine, made) -> None:
    store = HeadStore(tmp_path, engine, most=9)
    publish(store, engine, made, "a")
    publish(store, engine, made, "b")
    with (tmp_path / "heads" / "a" / "mine" / "model.onnx").open("ab") as file:
        file.write(b"more")
    with Engine(Registry(bundles={}), providers="cpu", threads=1) as second:
        HeadStore(tmp_path, second, most=9)
        assert second.own("a") == {}
        assert list(second.own("b")) == ["mine"]


def test_names_and_numbers_of_models_are_limited(tmp_path, engine, made) -> None:
    store = HeadStore(tmp_path, engine, most=1)
    publish(store, engine, made)
    with pytest.raises(NameTaken, match="DELETE /heads/mine"):
        store.check_free("", "mine")
    with pytest.raises(InvalidRequest, match="PIMC_MAX_HEADS"):
        store.check_free("", "other")
    store.check_free("b", "mine")


@pytest.mark.parametrize(("n", "count"), [(400, 2), (200, 60)])
def test_a_fit_takes_no_more_memory_than_is_reserved_for_it(n: int, count: int) -> None:
    random = np.random.default_rng(7)
    classes = np.concatenate([np.arange(count), random.integers(0, count, n - count)])
    columns = {"Cauchy": np.arange(20), "linear": np.arange(20)}
    features = kernel.Features(values=random.normal(size=(n, 20)), columns=columns)
    places = np.arange(n)
    tracemalloc.start()
    try:
        fitted = kernel.fit({"series": features}, classes, folds_of(places, classes))
        scores(fitted.probabilities, classes, places, fitted.tested)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < kernel.fit_bytes(n, 20, count, 1) < 6 * peak

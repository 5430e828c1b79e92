"""Probes of frozen embeddings: linear and nearest neighbours.

frozen encoder -> embeddings of all places -> a linear map, or the nearest training pixels

All probes have fixed settings, none chosen on the validation places, so their scores are those of
places that neither the encoder nor the probe has seen.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

from models.heads import ClassificationHead
from training.calibration import macro_f1
from training.classification import PixelClassification
from training.forecasting import PixelForecast
from training.landcover import PatchClassification
from training.validation_outputs import AnyTask, Outputs, classes, forecasts

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
NEIGHBOURS = 15
_ITERATIONS = 2000
_BATCH = 256
# The smallest probability of a class under nearest neighbours, and the logit of a class that is
# missing from the linear probe's training data.
_SMALLEST = 1e-3
_UNSEEN = -30.0


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Embeddings with labels, split by place."""

    embeddings: Floats
    """(N, D)."""
    labels: Ints
    """(N)."""
    validation: NDArray[np.bool_]
    """True for the validation places (N)."""
    places: Ints
    """(N)."""

    def part(self, chosen: NDArray[np.bool_]) -> tuple[Floats, Ints]:
        """Embeddings and labels of the rows chosen."""
        return self.embeddings[chosen], self.labels[chosen]


def probe(data: Labelled, *, resamples: int = 1000, seed: int = 0) -> dict[str, object]:
    """Accuracy and macro-F1 of both probes on the validation places, with 95 % intervals.

    Args:
        data: embeddings; both probes are trained on the training places only.
        resamples: bootstrap resamples of the validation places.
        seed: of the bootstrap.
    """
    train, labels = data.part(~data.validation)
    rest, truth = data.part(data.validation)
    many = int(data.labels.max()) + 1
    found = {
        "linear_probe": linear_logits(train, labels, rest, many).argmax(axis=1),
        f"knn_{NEIGHBOURS}": nearest_logits(train, labels, rest, many).argmax(axis=1),
    }
    places = data.places[data.validation]
    scores: dict[str, object] = {
        name: score(truth, answer, places, resamples=resamples, seed=seed)
        for name, answer in found.items()
    }
    return {**scores, "n_train": len(train), "n_validation": len(rest)}


def linear_logits(train: Floats, labels: Ints, rest: Floats, many: int) -> Floats:
    """Logits (N, K) of a logistic regression on standardised embeddings."""
    weight, bias = _linear(train, labels, many)
    return np.asarray(rest @ weight.T + bias, dtype=np.float32)


def nearest_logits(train: Floats, labels: Ints, rest: Floats, many: int) -> Floats:
    """Logits (N, K) of the nearest training places' classes, by cosine."""
    # For unit vectors the nearest by distance are the nearest by cosine.
    model = KNeighborsClassifier(min(NEIGHBOURS, len(train)), weights="distance")
    model.fit(normalize(train), labels)
    shares = np.zeros((len(rest), many), dtype=np.float32)
    shares[:, model.classes_] = model.predict_proba(normalize(rest))
    return np.log(np.maximum(shares, _SMALLEST))


def _linear(train: Floats, labels: Ints, many: int) -> tuple[Floats, Floats]:
    """Weights (K, D) and biases (K) of a logistic regression, standardisation included."""
    scaler = StandardScaler().fit(train)
    weight = np.zeros((many, train.shape[1]), dtype=np.float32)
    bias = np.full(many, _UNSEEN, dtype=np.float32)
    there = np.unique(labels)
    if len(there) == 1:  # a single class
        bias[there] = 0.0
        return weight, bias
    model = LogisticRegression(C=0.1, tol=1e-3, max_iter=_ITERATIONS)
    model.fit(scaler.transform(train), labels)
    rows, offsets = model.coef_, model.intercept_
    if len(there) == 2:  # scikit-learn returns one row, for the second class
        rows, offsets = np.stack([-rows[0], rows[0]]) / 2, np.array([-offsets[0], offsets[0]]) / 2
    weight[there] = rows / scaler.scale_
    bias[there] = offsets - (rows / scaler.scale_) @ scaler.mean_
    return weight, bias


# Protocols of a run -----------------------------------------------------------------------------


def put_linear_head(task: AnyTask, graph: Any) -> None:  # noqa: ANN401  # of the task's kind
    """Make a graph's head a logistic regression on its frozen encoder's embeddings.

    The graph is then scored, calibrated and exported like any other.
    """
    if isinstance(task, PixelForecast) or not isinstance(graph.head, ClassificationHead):
        raise TypeError("a linear head is for classes")
    train, labels = embedded(task, graph, training=True)
    weight, bias = _linear(train, labels, graph.head.linear.out_features)
    with torch.no_grad():
        graph.head.linear.weight.copy_(torch.from_numpy(weight))
        graph.head.linear.bias.copy_(torch.from_numpy(bias))
    graph.eval()


def probed(task: AnyTask, graph: Any, protocol: str) -> Outputs:  # noqa: ANN401  # of the task's kind
    """Outputs of probes outside the graph: nearest neighbours, and regressions of forecasts."""
    if isinstance(task, PixelForecast):
        return _probed_forecast(task, graph, protocol)
    train, labels = embedded(task, graph, training=True)
    rest, _ = embedded(task, graph, training=False)
    many = len(task.legend)
    find = linear_logits if protocol == "linear" else nearest_logits
    return classes(task, find(train, labels, rest, many))


def embedded(
    task: PixelClassification | PatchClassification,
    graph: Any,  # noqa: ANN401  # of the task's kind
    *,
    training: bool,
) -> tuple[Floats, Ints]:
    """Embeddings (N, D) and labels (N) of the training or of the validation places."""
    bare = _headless(graph)
    if isinstance(task, PixelClassification):
        table = task.train if training else task.validation
        return task.logits(bare, table), table.labels
    chosen = task.train if training else task.validation
    with torch.inference_mode():
        parts = [
            bare.raw(torch.from_numpy(task.read(rows))).numpy()
            for rows in np.array_split(chosen, -(-len(chosen) // _BATCH))
        ]
    return np.concatenate(parts), task.labels[chosen]


def _probed_forecast(task: PixelForecast, graph: Any, protocol: str) -> Outputs:  # noqa: ANN401
    bare = _headless(graph)
    earlier = copy.copy(task)
    earlier.validation = task.train.take(task.scored)
    train, ahead, seen = earlier.predict(bare)
    rest, target, known = task.predict(bare)
    if protocol == "knn":
        train, rest = normalize(train), normalize(rest)
    found = []
    for step in range(ahead.shape[1]):
        rows = seen[:, step].all(axis=1)
        model = (
            make_pipeline(StandardScaler(), Ridge(10.0))
            if protocol == "linear"
            else KNeighborsRegressor(min(NEIGHBOURS, int(rows.sum())), weights="distance")
        )
        found.append(model.fit(train[rows], ahead[rows, step]).predict(rest))
    median = np.stack(found, axis=1).astype(np.float32)
    return forecasts(task, median[..., None], target, known)


def _headless(graph: Any) -> Any:  # noqa: ANN401  # of the task's kind
    """The same graph without its head, frozen: its output is the embedding."""
    bare = copy.copy(graph)
    # A shallow copy shares the table of parts with the graph, which must keep its head.
    bare._modules = {**graph._modules, "head": None}  # noqa: SLF001  # torch offers no other way
    return bare.eval()


def score(
    truth: Ints, answer: Ints, places: Ints, *, resamples: int, seed: int
) -> Mapping[str, object]:
    """Accuracy and macro-F1, each with a 95 % interval by bootstrap over places."""
    rng = np.random.default_rng(seed)
    classes = int(max(truth.max(), answer.max())) + 1
    rows = [np.flatnonzero(places == place) for place in np.unique(places)]
    accuracies, f1s = [], []
    for _ in range(resamples):
        chosen = np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))])
        accuracies.append(float((truth[chosen] == answer[chosen]).mean()))
        f1s.append(macro_f1(answer[chosen], truth[chosen], classes))
    return {
        "accuracy": round(float((truth == answer).mean()), 4),
        "accuracy_95": _interval(accuracies),
        "macro_f1": round(macro_f1(answer, truth, classes), 4),
        "macro_f1_95": _interval(f1s),
    }


def _interval(values: list[float]) -> list[float]:
    return [round(float(np.quantile(values, q)), 4) for q in (0.025, 0.975)]

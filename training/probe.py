"""Probes of frozen embeddings: linear and nearest neighbours.

frozen encoder -> embeddings of all places -> a linear map, or the nearest training pixels

All probes have fixed settings, none of them chosen on the validation places. So their scores are
those of places that neither the encoder nor the probe was trained on.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

from training.calibration import macro_f1
from training.task import Outputs

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
NEIGHBOURS = 15
_ITERATIONS = 2000
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


def joined(parts: Sequence[Labelled]) -> Labelled:
    """Several sets as one; places stay as they are numbered."""
    return Labelled(
        embeddings=np.concatenate([part.embeddings for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        validation=np.concatenate([part.validation for part in parts]),
        places=np.concatenate([part.places for part in parts]),
    )


def probe(data: Labelled, *, resamples: int = 1000, seed: int = 0) -> dict[str, object]:
    """Accuracy and macro-F1 of both probes on the validation places, with 95 % intervals.

    Args:
        data: embeddings; both probes are trained on the training places only.
        resamples: number of bootstrap resamples of the validation places.
        seed: seed of the bootstrap.
    """
    train, labels = data.part(~data.validation)
    rest, truth = data.part(data.validation)
    classes = int(data.labels.max()) + 1
    predictions = {
        "linear_probe": linear_logits(train, labels, rest, classes).argmax(axis=1),
        f"knn_{NEIGHBOURS}": nearest_logits(train, labels, rest, classes).argmax(axis=1),
    }
    places = data.places[data.validation]
    scores: dict[str, object] = {
        name: score(truth, predicted, places, resamples=resamples, seed=seed)
        for name, predicted in predictions.items()
    }
    return {**scores, "n_train": len(train), "n_validation": len(rest)}


def linear_logits(train: Floats, labels: Ints, rest: Floats, classes: int) -> Floats:
    """Logits (N, K) of a logistic regression on standardised embeddings."""
    weight, bias = _linear(train, labels, classes)
    return np.asarray(rest @ weight.T + bias, dtype=np.float32)


def nearest_logits(train: Floats, labels: Ints, rest: Floats, classes: int) -> Floats:
    """Logits (N, K) of the nearest training places' classes, by cosine."""
    # For unit vectors the nearest by distance are the nearest by cosine.
    model = KNeighborsClassifier(min(NEIGHBOURS, len(train)), weights="distance")
    model.fit(normalize(train), labels)
    shares = np.zeros((len(rest), classes), dtype=np.float32)
    shares[:, model.classes_] = model.predict_proba(normalize(rest))
    return np.log(np.maximum(shares, _SMALLEST))


def _linear(train: Floats, labels: Ints, classes: int) -> tuple[Floats, Floats]:
    """Weights (K, D) and biases (K) of a logistic regression, standardisation included."""
    # In float64 and to a small tolerance: numbers of an embedding depend on each other, and a
    # solution that is merely close changes with the last digits of the embedding.
    train = train.astype(np.float64)
    scaler = StandardScaler().fit(train)
    weight = np.zeros((classes, train.shape[1]), dtype=np.float32)
    bias = np.full(classes, _UNSEEN, dtype=np.float32)
    there = np.unique(labels)
    if len(there) == 1:  # a single class
        bias[there] = 0.0
        return weight, bias
    model = LogisticRegression(C=0.1, tol=1e-4, max_iter=_ITERATIONS)
    model.fit(scaler.transform(train), labels)
    rows, offsets = model.coef_, model.intercept_
    if len(there) == 2:  # scikit-learn returns one row, for the second class
        rows, offsets = np.stack([-rows[0], rows[0]]) / 2, np.array([-offsets[0], offsets[0]]) / 2
    weight[there] = rows / scaler.scale_
    bias[there] = offsets - (rows / scaler.scale_) @ scaler.mean_
    return weight, bias


# Protocols of a run -----------------------------------------------------------------------------


class Classifier(Protocol):
    """A classification task, as far as a probe uses it."""

    legend: Any
    """The task's classes (K)."""

    def embeddings(self, graph: Any, *, training: bool) -> tuple[Floats, Ints]:  # noqa: ANN401
        """Embeddings (N, D) and labels (N) of the training or of the validation places."""

    def outputs_of(self, logits: NDArray[Any]) -> Outputs:
        """Logits of the validation places (N, K), with their labels."""


def put_linear_head(task: Classifier, graph: Any) -> None:  # noqa: ANN401  # of the task's kind
    """Set a graph's head to a logistic regression on its frozen encoder's embeddings.

    The result is a graph like any other: it can be scored, calibrated and exported.
    """
    train, labels = task.embeddings(graph, training=True)
    weight, bias = _linear(train, labels, len(task.legend))
    with torch.no_grad():
        graph.head.linear.weight.copy_(torch.from_numpy(weight))
        graph.head.linear.bias.copy_(torch.from_numpy(bias))
    graph.eval()


def probed_classes(task: Classifier, graph: Any, protocol: str) -> Outputs:  # noqa: ANN401
    """Outputs of a `linear` or `knn` probe of a classifier's frozen encoder."""
    train, labels = task.embeddings(graph, training=True)
    rest, _ = task.embeddings(graph, training=False)
    find = linear_logits if protocol == "linear" else nearest_logits
    return task.outputs_of(find(train, labels, rest, len(task.legend)))


def regressed(protocol: str, train: Floats, ahead: Floats, rest: Floats) -> Floats:
    """Values (N, S) that a `linear` or `knn` probe predicts from embeddings.

    Args:
        protocol: `linear` is ridge regression, `knn` the mean of the nearest by cosine.
        train: embeddings of the training places (M, D).
        ahead: observed values of the training places (M, S).
        rest: embeddings to predict from (N, D).
    """
    if protocol == "linear":
        model = make_pipeline(StandardScaler(), Ridge(10.0))
        return np.asarray(model.fit(train, ahead).predict(rest))
    nearest = KNeighborsRegressor(min(NEIGHBOURS, len(train)), weights="distance")
    return np.asarray(nearest.fit(normalize(train), ahead).predict(normalize(rest)))


def headless(graph: Any) -> Any:  # noqa: ANN401  # of the task's kind
    """The same graph without its head, frozen: its output is the embedding."""
    bare = copy.copy(graph)
    # A shallow copy shares the dictionary of modules with the graph, which must keep its head.
    bare._modules = {**graph._modules, "head": None}  # noqa: SLF001  # torch has no other way
    return bare.eval()


def score(
    truth: Ints, predicted: Ints, places: Ints, *, resamples: int, seed: int
) -> Mapping[str, object]:
    """Accuracy and macro-F1, each with a 95 % interval by bootstrap over places."""
    rng = np.random.default_rng(seed)
    classes = int(max(truth.max(), predicted.max())) + 1
    rows = [np.flatnonzero(places == place) for place in np.unique(places)]
    accuracies, f1s = [], []
    for _ in range(resamples):
        chosen = np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))])
        accuracies.append(float((truth[chosen] == predicted[chosen]).mean()))
        f1s.append(macro_f1(predicted[chosen], truth[chosen], classes))
    return {
        "accuracy": round(float((truth == predicted).mean()), 4),
        "accuracy_95": _interval(accuracies),
        "macro_f1": round(macro_f1(predicted, truth, classes), 4),
        "macro_f1_95": _interval(f1s),
    }


def _interval(values: list[float]) -> list[float]:
    return [round(float(np.quantile(values, q)), 4) for q in (0.025, 0.975)]

"""What frozen embeddings know: a linear probe and nearest neighbours.

The validation places choose nothing here: both probes have fixed settings, so their scores are
those of places that neither the encoder nor the probe has seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

from training.calibration import macro_f1

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
NEIGHBOURS = 15
_ITERATIONS = 2000


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
        data: embeddings; both probes learn from the training places alone.
        resamples: bootstrap resamples of the validation places.
        seed: of the bootstrap.
    """
    train, labels = data.part(~data.validation)
    rest, truth = data.part(data.validation)
    linear = make_pipeline(
        StandardScaler(), LogisticRegression(C=0.1, tol=1e-3, max_iter=_ITERATIONS)
    )
    # On unit vectors the nearest by distance are the nearest by cosine.
    nearest = KNeighborsClassifier(NEIGHBOURS, weights="distance")
    found = {
        "linear_probe": linear.fit(train, labels).predict(rest),
        f"knn_{NEIGHBOURS}": nearest.fit(normalize(train), labels).predict(normalize(rest)),
    }
    places = data.places[data.validation]
    scores: dict[str, object] = {
        name: score(truth, answer, places, resamples=resamples, seed=seed)
        for name, answer in found.items()
    }
    return {**scores, "n_train": len(train), "n_validation": len(rest)}


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

"""Scores of left-out labels: macro-F1 with its interval by place, confusion, calibration error.

Shapes: n labels, K classes, P places.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_BINS = 10
_DRAWS = 1000
_INTERVAL = (2.5, 97.5)
SCORED_AT_ONCE = 2 * _DRAWS
"""Matrices (K, K) that an interval takes beside one for each place."""


def confusion_matrix(
    truth: NDArray[np.intp], found: NDArray[np.intp], count: int
) -> NDArray[np.int64]:
    """Number of labels by class (rows) and predicted class (columns), (K, K)."""
    matrix = np.zeros((count, count), np.int64)
    np.add.at(matrix, (truth, found), 1)
    return matrix


def f1_scores(matrix: NDArray[Any]) -> Floats:
    """F1 of each class (..., K) from confusion matrices (..., K, K); NaN for an absent class."""
    hits = np.diagonal(matrix, axis1=-2, axis2=-1).astype(np.float64)
    total = matrix.sum(axis=-1) + matrix.sum(axis=-2)
    f1 = np.divide(2 * hits, total, out=np.full(hits.shape, np.nan), where=total > 0)
    return np.asarray(f1)


def calibration_error(probabilities: Floats, truth: NDArray[np.intp]) -> float:
    """Expected calibration error with ten bins of equal width (Naeini et al. 2015)."""
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == truth
    which = np.minimum((confidence * _BINS).astype(np.intp), _BINS - 1)
    gaps = np.bincount(which, weights=right - confidence, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(truth))


def place_interval(
    truth: NDArray[np.intp], found: NDArray[np.intp], places: NDArray[np.intp], count: int
) -> tuple[float, float] | None:
    """95 % interval of the macro-F1 by a bootstrap of places; None for a single place.

    Args:
        truth: class of each label (n).
        found: predicted class of each label (n).
        places: place of each label (n), counting from 0.
        count: number of classes (K).

    Returns:
        The 2.5th and 97.5th percentile. The seed is fixed, so that the same labels give the same
        interval.
    """
    P = int(places.max()) + 1
    if P < 2:
        return None
    by_place = np.zeros((P, count, count))
    np.add.at(by_place, (places, truth, found), 1)
    random = np.random.default_rng(0)
    drawn = random.multinomial(P, np.full(P, 1 / P), size=_DRAWS).astype(np.float64)
    matrices = (drawn @ by_place.reshape(P, -1)).reshape(_DRAWS, count, count)
    scores = f1_scores(matrices)
    known = ~np.isnan(scores) & np.isin(np.arange(count), truth)
    means = np.where(known, scores, 0.0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    low, high = np.percentile(means, _INTERVAL)
    return float(low), float(high)


def scores(
    probabilities: Floats,
    classes: NDArray[np.intp],
    places: NDArray[np.intp],
    tested: NDArray[np.bool_],
) -> dict[str, Any]:
    """The scores for a model card, as JSON values.

    Args:
        probabilities: predicted probabilities of each label (n, K).
        classes: class of each label (n).
        places: place of each label (n), counting from 0.
        tested: the labels (n) to score, at least one; a class without any has no F1.
    """
    count = probabilities.shape[1]
    probabilities, truth = probabilities[tested], classes[tested]
    places = np.unique(places[tested], return_inverse=True)[1]
    found = probabilities.argmax(axis=1)
    matrix = confusion_matrix(truth, found, count)
    # A class without tested labels may still be predicted, wrongly.
    f1 = np.where(np.isin(np.arange(count), truth), f1_scores(matrix), np.nan)
    interval = place_interval(truth, found, places, count)
    return {
        "n": len(truth),
        "accuracy": _rounded(np.mean(found == truth)),
        "macro_f1": _rounded(np.nanmean(f1)),
        "macro_f1_interval": None if interval is None else [_rounded(x) for x in interval],
        "ece": _rounded(calibration_error(probabilities, truth)),
        "confusion": matrix.tolist(),
        "f1": [None if np.isnan(x) else _rounded(x) for x in f1],
    }


def _rounded(value: float | np.floating[Any]) -> float:
    return round(float(value), 4)

"""Calibration: temperature, expected calibration error, and scores of classifiers."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float32] | NDArray[np.float64]
Ints = NDArray[np.int64]
_BINS = 15
# Smallest distance between quantiles, whatever the calibration.
_LEAST_SPREAD = 0.05


def fit_temperature(logits: Floats, labels: Ints, weights: Floats | None = None) -> float:
    """The temperature of least cross entropy (Guo et al. 2017, arXiv 1706.04599).

    Args:
        logits: (N, K).
        labels: positions of the right classes (N).
        weights: weight of each row (N), above 0; None weighs all rows equally.
    """
    shares = np.ones(len(labels)) if weights is None else np.asarray(weights, dtype=np.float64)
    counts = torch.from_numpy(shares / shares.sum())
    scores = torch.from_numpy(np.asarray(logits, dtype=np.float64))
    target = torch.from_numpy(labels)
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        losses = torch.nn.functional.cross_entropy(
            scores / log_temperature.exp(), target, reduction="none"
        )
        loss = (losses * counts).sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own signature
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]  # torch's own signature
    return float(log_temperature.detach().exp())


def fit_spread(
    parts: Sequence[tuple[Floats, Floats, NDArray[np.bool_]]], *, tail: float = 0.1
) -> Floats:
    """Factors on the outer quantiles' distances from the median, so that each tail holds `tail`.

    Conformalised quantile regression (Romano et al. 2019, arXiv 1905.03222) with a factor instead
    of an offset, for each step and side. All parts have the same weight, whatever their size.

    Args:
        parts: for each region, quantiles (N, H, S, 3), targets (N, H, S) and which targets are
            known (N, H, S).
        tail: share of the targets that is beyond each outer quantile, 0 to 1.

    Returns:
        Factors (H, 2), below and above the median; 1 for a step without a known target.
    """
    horizon = parts[0][0].shape[1]
    factors = np.ones((horizon, 2))
    for h in range(horizon):
        for side, outer in enumerate((0, 2)):
            ratios = []
            for quantiles, target, known in parts:
                chosen, seen = quantiles[:, h][known[:, h]], target[:, h][known[:, h]]
                width = chosen[:, outer] - chosen[:, 1]
                ratios.append((seen - chosen[:, 1]) / np.where(width == 0, 1e-9, width))
            found = equal_quantile(ratios, 1 - tail)
            if found is not None:
                factors[h, side] = max(found, _LEAST_SPREAD)
    return factors


def equal_weights(parts: Sequence[Sized]) -> NDArray[np.float64]:
    """Weights of the joined values of several parts, by which each part counts the same (N)."""
    return np.concatenate([np.full(len(part), 1 / max(len(part), 1)) for part in parts])


def equal_quantile(parts: Sequence[Floats], share: float) -> float | None:
    """The value below which a share of all parts' values lies, each part with the same weight.

    Args:
        parts: values (N) of each part.
        share: 0 to 1.

    Returns:
        One of the values; None if there is none.
    """
    values, weights = np.concatenate(parts), equal_weights(parts)
    if not len(values):
        return None
    order = np.argsort(values)
    below = np.cumsum(weights[order]) / weights.sum()
    place = min(int(np.searchsorted(below, share)), len(values) - 1)
    return float(values[order][place])


def probabilities(logits: Floats, temperature: float = 1.0) -> NDArray[np.float64]:
    """Softmax of logits (N, K) under a temperature."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def expected_calibration_error(shares: Floats, labels: Ints) -> float:
    """Mean gap between confidence and accuracy, over 15 bins of confidence (Guo et al. 2017).

    Args:
        shares: probabilities (N, K).
        labels: positions of the right classes (N).
    """
    confidence, right = shares.max(axis=1), shares.argmax(axis=1) == labels
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = [
        abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean()
        for b in range(_BINS)
        if (bins == b).any()
    ]
    return float(np.sum(gaps))


def f1_by_class(predicted: Ints, labels: Ints, classes: int) -> NDArray[np.float64]:
    """F1 of each class (K); NaN for a class that is neither predicted nor present."""
    right = np.bincount(labels[predicted == labels], minlength=classes)
    both = np.bincount(predicted, minlength=classes) + np.bincount(labels, minlength=classes)
    with np.errstate(invalid="ignore"):
        return np.asarray(2 * right / both)


def macro_f1(predicted: Ints, labels: Ints, classes: int) -> float:
    """Mean F1 of the classes that are present."""
    there = np.bincount(labels, minlength=classes) > 0
    return float(np.nan_to_num(f1_by_class(predicted, labels, classes))[there].mean())


def cross_fitted_scores(logits: Floats, labels: Ints, places: Ints) -> dict[str, Any]:
    """Accuracy, macro-F1 and calibration of logits (N, K).

    The temperature is fitted on each half of the places and applied to the other half, so that the
    calibration error is that of pixels on which the temperature was not fitted.
    """
    half = np.unique(places, return_inverse=True)[1] % 2 == 0
    shares = np.empty(logits.shape)
    for part in (half, ~half):
        shares[part] = probabilities(logits[part], fit_temperature(logits[~part], labels[~part]))
    predicted = shares.argmax(axis=1)
    classes = logits.shape[1]
    return {
        "n": len(labels),
        "accuracy": round(float((predicted == labels).mean()), 4),
        "macro_f1": round(macro_f1(predicted, labels, classes), 4),
        "expected_calibration_error": round(expected_calibration_error(shares, labels), 4),
        "f1": [
            round(v, 3) if np.isfinite(v) else None
            for v in f1_by_class(predicted, labels, classes).tolist()
        ],
    }

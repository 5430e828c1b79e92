"""Kernel ridge classification with a Cauchy kernel, and its left-out scores in closed form.

    k(a, b) = 1 / (1 + g |a - b|²);  weights = (k + ridge W⁻¹)⁻¹ (onehot - 1/K)

W weights labels so that all classes have the same total weight. The kernel is a mixture of
Gaussians of all widths (a rational quadratic kernel, Rasmussen and Williams 2006, eq. 4.19), so
that few parameters are chosen from few labels. The fit needs no iterative optimiser, and one matrix
inverse gives the scores of every fold that is left out (Rifkin and Klautau 2004, "In Defense of
One-Vs-All Classification"; Rasmussen and Williams, eq. 5.12, for a block instead of one sample). A
temperature turns scores into probabilities (Guo et al. 2017, arXiv 1706.04599).

Shapes: n labels, D features, K classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.learn.graph import Head

Floats = NDArray[np.float64]
_WIDTHS = (0.25, 0.5, 1.0, 2.0)
"""Widths of the kernel that are tried, relative to the inverse of the median squared distance."""
_RIDGE = 0.03
_MIN_DEVIATION = 1e-6
"""Smallest standard deviation by which a feature is divided, so that noise is not amplified."""
_COLDEST, _HOTTEST = np.log(0.01), np.log(2.0)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A set of features with a width of the kernel."""

    features: str
    """Name of the features."""
    width: float
    """g of the kernel 1 / (1 + g |a - b|²)."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A head, and its predictions for labels to which it was not fitted."""

    candidate: Candidate
    head: Head
    probabilities: Floats
    """Probabilities of each label (n, K), by a head whose fit, candidate and temperature did not
    use the label's place."""


@dataclass(frozen=True, kw_only=True)
class _Scaled:
    """Features scaled so that their mean squared distance does not depend on their number (D)."""

    values: Floats
    mean: Floats
    scale: Floats


def fit(
    features: Mapping[str, NDArray[np.floating]],
    classes: NDArray[np.intp],
    folds: NDArray[np.intp],
    check: Callable[[], None] = lambda: None,
) -> Fitted:
    """Fit the candidate with the smallest loss on places that are left out.

    Args:
        features: features of the labels (n, D), finite, by name.
        classes: class of each label (n), counting from 0, each at least once.
        folds: fold of each label (n), at least two folds; labels of one place share a fold.
        check: called between the steps; an exception that it raises ends the fit.

    Returns:
        The head of that candidate, fitted to all labels, and the predictions for left-out labels.
    """
    scaled = {name: _standardised(np.asarray(x, np.float64)) for name, x in features.items()}
    squares = {name: _squares(one.values) for name, one in scaled.items()}
    left_out: dict[Candidate, Floats] = {}
    for name, width in itertools.product(features, _WIDTHS):
        check()
        g = width / _typical(squares[name])
        left_out[Candidate(features=name, width=g)] = _left_out(
            _kernel(squares[name], g), classes, folds
        )
    best, temperature = _choice(left_out, classes, np.ones(len(classes), np.bool_))
    probabilities = np.empty_like(left_out[best])
    for fold in np.unique(folds):
        check()
        # Candidate and temperature are chosen without the fold whose predictions are reported.
        others = folds != fold
        chosen, fold_temperature = _choice(left_out, classes, others)
        probabilities[~others] = softmax(left_out[chosen][~others] / fold_temperature)
    own = scaled[best.features]
    kernel = _kernel(squares[best.features], best.width)
    weights = np.linalg.solve(_regularised(kernel, classes), _targets(classes))
    return Fitted(
        candidate=best,
        head=Head(
            mean=own.mean,
            scale=own.scale,
            support=own.values,
            weights=np.asarray(weights, np.float64),
            width=best.width,
            temperature=temperature,
        ),
        probabilities=probabilities,
    )


def softmax(logits: Floats) -> Floats:
    """Probabilities (n, K) of logits (n, K)."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def _standardised(x: Floats) -> _Scaled:
    mean = x.mean(axis=0)
    scale = 1 / (np.maximum(x.std(axis=0), _MIN_DEVIATION) * np.sqrt(x.shape[1]))
    return _Scaled(values=(x - mean) * scale, mean=mean, scale=scale)


def _squares(x: Floats) -> Floats:
    """Squared distances (n, n) between rows (n, D)."""
    lengths = (x**2).sum(axis=1)
    return np.asarray(np.maximum(lengths[:, None] + lengths[None] - 2 * x @ x.T, 0.0))


def _kernel(squares: Floats, width: float) -> Floats:
    return np.asarray(1 / (1 + width * squares))


def _typical(squares: Floats) -> float:
    """The median of the squared distances above 0; 1 if all labels have the same features."""
    apart = squares[squares > 0]
    return float(np.median(apart)) if apart.size else 1.0


def _targets(classes: NDArray[np.intp]) -> Floats:
    count = int(classes.max()) + 1
    return np.eye(count)[classes] - 1 / count


def _regularised(kernel: Floats, classes: NDArray[np.intp]) -> Floats:
    counts = np.bincount(classes)
    weight = len(classes) / (len(counts) * counts[classes])
    out = kernel.copy()
    out[np.diag_indices_from(out)] += _RIDGE / weight
    return out


def _left_out(kernel: Floats, classes: NDArray[np.intp], folds: NDArray[np.intp]) -> Floats:
    """Scores (n, K) of each label by a head fitted without its fold."""
    targets = _targets(classes)
    inverse = np.linalg.inv(_regularised(kernel, classes))
    weights = inverse @ targets
    scores = np.empty_like(targets)
    for fold in np.unique(folds):
        own = folds == fold
        scores[own] = targets[own] - np.linalg.solve(inverse[np.ix_(own, own)], weights[own])
    return scores


def _choice(
    left_out: Mapping[Candidate, Floats], classes: NDArray[np.intp], rows: NDArray[np.bool_]
) -> tuple[Candidate, float]:
    """The candidate with the smallest loss on the labels of `rows`, and its temperature."""
    found = {
        candidate: _temperature(scores[rows], classes[rows])
        for candidate, scores in left_out.items()
    }
    best = min(found, key=lambda candidate: found[candidate][1])
    return best, found[best][0]


def _temperature(scores: Floats, classes: NDArray[np.intp]) -> tuple[float, float]:
    """The temperature with the smallest loss, and that loss.

    The loss is the mean over classes of the cross entropy of their labels. The target of a label of
    a class with n labels is (n + 1) / (n + 2) instead of 1 (Platt 1999), so that a class whose ten
    labels are all predicted correctly does not get probabilities of nearly 1.
    """
    counts = np.bincount(classes, minlength=scores.shape[1])
    weight = 1 / (np.count_nonzero(counts) * counts[classes])
    other = 1 / (counts[classes] + 2)  # target of all other classes together
    targets = np.repeat(other[:, None] / (scores.shape[1] - 1), scores.shape[1], axis=1)
    targets[np.arange(len(classes)), classes] = 1 - other

    def loss(log: float) -> float:
        logits = scores / np.exp(log)
        logits = logits - logits.max(axis=1, keepdims=True)
        likely = (targets * logits).sum(axis=1)
        return float(weight @ (np.log(np.exp(logits).sum(axis=1)) - likely))

    log = golden_section(loss, _COLDEST, _HOTTEST)
    return float(np.exp(log)), loss(log)


def golden_section(of: Callable[[float], float], low: float, high: float, steps: int = 30) -> float:
    """The position of the minimum of a unimodal function, by golden-section search.

    Args:
        of: the function.
        low: lower end of the interval.
        high: upper end of the interval.
        steps: number of reductions of the interval, each by the factor 0.618.
    """
    ratio = (np.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = of(left), of(right)
    for _ in range(steps):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = of(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = of(right)
    return float((low + high) / 2)

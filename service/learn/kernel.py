"""Kernel ridge classification with two kernels, and its left-out scores in closed form.

    Cauchy: k(a, b) = 1 / (1 + |a - b|² / width);  linear: k(a, b) = offset + a·b / width
    weights = (k + ridge W⁻¹)⁻¹ (onehot - 1/K)

W weights labels so that all classes have the same total weight. The Cauchy kernel is a mixture of
Gaussians of all widths (a rational quadratic kernel, Rasmussen and Williams 2006, eq. 4.19), so
that few parameters are chosen from few labels. A head adds the scores of both kernels, two thirds
of the Cauchy kernel and one of the linear one: few labels do not show which kernel is better, and
the sum is hardly worse than the better one. The fit needs no iterative optimiser, and one matrix
inverse gives the scores of every fold that is left out (Rifkin and Klautau 2004, "In Defense of
One-Vs-All Classification"; Rasmussen and Williams, eq. 5.12, for a block instead of one sample).
Temperatures turn scores into probabilities (Guo et al. 2017, arXiv 1706.04599).

Shapes: n labels, D features, d features of one kernel, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from service.learn.graph import Head
from service.learn.scores import SCORED_AT_ONCE

Floats = NDArray[np.float64]
Kernel = Literal["Cauchy", "linear"]
_SETTINGS: Mapping[Kernel, tuple[tuple[float, float], ...]] = {
    "Cauchy": ((4.0, 0.03), (2.0, 0.03), (1.0, 0.03), (0.5, 0.03)),
    "linear": ((0.5, 0.1), (0.5, 0.3), (0.5, 1.0), (0.5, 3.0)),
}
"""Width, relative to the median squared distance, and ridge of each kernel that are tried."""
_SHARES: Mapping[Kernel, float] = {"Cauchy": 2 / 3, "linear": 1 / 3}
_OFFSET = 0.1
"""Constant of the linear kernel, so that a score need not be 0 at the mean of the labels."""
_MIN_DEVIATION = 1e-6
"""Smallest standard deviation by which a feature is divided, so that noise is not amplified."""
_MATRICES = 5
"""Matrices (n, n) of a fit at once: the kernel, its inverse, and LAPACK's copies of both."""
_COLDEST, _HOTTEST = np.log(0.01), np.log(2.0)


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of the labels, and which of them each kernel takes."""

    values: NDArray[np.floating]
    """Features (n, D), finite."""
    columns: Mapping[Kernel, NDArray[np.intp]]
    """The features (d) of each kernel."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A classifier that may become a part of a head."""

    features: str
    """Name of the features."""
    kernel: Kernel
    width: float
    """Width of the kernel."""
    ridge: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The classifiers of a head and their temperatures."""

    parts: Mapping[Candidate, float]
    """The temperature of each classifier, one for each kernel."""
    temperature: float
    """Temperature of the sum."""

    @property
    def features(self) -> str:
        """Name of the features, which all parts share."""
        return next(iter(self.parts)).features

    def factors(self) -> dict[Candidate, float]:
        """The factors by which scores are multiplied before they are added to logits."""
        return {
            part: _SHARES[part.kernel] / (temperature * self.temperature)
            for part, temperature in self.parts.items()
        }

    def logits(self, scores: Mapping[Candidate, Floats], rows: NDArray[np.bool_]) -> Floats:
        """Logits of the chosen `rows` of scores (n, K)."""
        factors = self.factors().items()
        return np.asarray(sum(factor * scores[part][rows] for part, factor in factors))


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A head, and its predictions for labels to which it was not fitted."""

    choice: Choice
    head: Head
    probabilities: Floats
    """Probabilities of each label (n, K), by a head whose fit, choice and temperatures did not use
    the label's place."""
    tested: NDArray[np.bool_]
    """Whether that head knew the label's class (n): see `known_elsewhere`."""


@dataclass(frozen=True, kw_only=True)
class _Scaled:
    """Features of a kernel, scaled so that distances do not depend on their number (d)."""

    values: Floats
    mean: Floats
    scale: Floats
    typical: float
    """The median of the squared distances above 0; 1 if all labels have the same features."""

    def kernel(self, candidate: Candidate) -> Floats:
        """The kernel (n, n) of a candidate, computed anew: matrices of labels are the memory."""
        if candidate.kernel == "linear":
            products = self.values @ self.values.T
            products /= candidate.width
            products += _OFFSET
            return products
        squares = _squares(self.values)
        squares /= candidate.width
        squares += 1
        return np.asarray(np.divide(1, squares, out=squares))


def fit(
    features: Mapping[str, Features],
    classes: NDArray[np.intp],
    folds: NDArray[np.intp],
    check: Callable[[], None] = lambda: None,
) -> Fitted:
    """Fit the head with the smallest loss on places that are left out.

    Args:
        features: features of the labels, by name.
        classes: class of each label (n), counting from 0, each at least once.
        folds: fold of each label (n), at least two folds; labels of one place share a fold.
        check: called between the steps; an exception that it raises ends the fit.

    Returns:
        That head, fitted to all labels, and the predictions for left-out labels.
    """
    scaled: dict[tuple[str, Kernel], _Scaled] = {}
    left_out: dict[Candidate, Floats] = {}
    for name, one in features.items():
        for kind, settings in _SETTINGS.items():
            check()
            values = np.asarray(one.values[:, one.columns[kind]], np.float64)
            own = scaled[name, kind] = _scaled(values)
            for width, ridge in settings:
                check()
                candidate = Candidate(
                    features=name, kernel=kind, width=width * own.typical, ridge=ridge
                )
                left_out[candidate] = _left_out(own.kernel(candidate), ridge, classes, folds)
    tested = known_elsewhere(classes, folds)
    choice = _choice(left_out, classes, np.ones(len(classes), np.bool_), tested)
    probabilities = np.empty((len(classes), int(classes.max()) + 1))
    for fold in np.unique(folds):
        check()
        # Everything is chosen without the fold whose predictions are reported.
        own_fold = folds == fold
        fold_choice = _choice(left_out, classes, ~own_fold, tested)
        probabilities[own_fold] = softmax(fold_choice.logits(left_out, own_fold))
    chosen = features[choice.features]
    return Fitted(
        choice=choice,
        head=_head(
            {kind: scaled[choice.features, kind] for kind in _SETTINGS}, chosen, choice, classes
        ),
        probabilities=probabilities,
        tested=tested,
    )


def fit_bytes(labels: int, width: int, classes: int, sets: int) -> int:
    """Memory of a fit and of its scores, bytes.

    Args:
        labels: number of labels (n).
        width: number of features of all sets together (D).
        classes: number of classes (K).
        sets: number of sets of features that are tried.
    """
    candidates = sets * sum(map(len, _SETTINGS.values()))
    fitting = _MATRICES * labels**2 + labels * 6 * sets * width
    scoring = classes**2 * (labels + SCORED_AT_ONCE)
    return 8 * (max(fitting, scoring) + labels * (candidates + 8) * classes)


def known_elsewhere(classes: NDArray[np.intp], folds: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Whether the class of each label (n) has labels in another fold as well.

    A head that is fitted without the only fold of a class cannot predict that class. Its errors on
    that fold do not show how well the head of all labels, which knows the class, predicts it; they
    would only lower its confidence. If every class has one fold, all labels count.
    """
    counts = np.zeros((int(folds.max()) + 1, int(classes.max()) + 1), np.bool_)
    counts[folds, classes] = True
    known = counts.sum(axis=0)[classes] > 1
    return np.asarray(known | (not known.any()))


def _head(
    scaled: Mapping[Kernel, _Scaled],
    features: Features,
    choice: Choice,
    classes: NDArray[np.intp],
) -> Head:
    """The head of a choice, fitted to all labels."""
    weights = {
        part.kernel: factor * _weights(scaled[part.kernel].kernel(part), part.ridge, classes)
        for part, factor in choice.factors().items()
    }
    widths = {part.kernel: part.width for part in choice.parts}
    curved, straight = scaled["Cauchy"], scaled["linear"]
    # The linear kernel needs no labels once it is fitted: sums of features are enough.
    own = straight.scale[:, None] * (straight.values.T @ weights["linear"]) / widths["linear"]
    linear = np.zeros((features.values.shape[1], own.shape[1]))
    linear[features.columns["linear"]] = own
    return Head(
        columns=features.columns["Cauchy"],
        mean=curved.mean,
        scale=curved.scale,
        support=curved.values,
        weights=weights["Cauchy"],
        width=widths["Cauchy"],
        linear=linear,
        bias=_OFFSET * weights["linear"].sum(axis=0) - straight.mean @ own,
    )


def softmax(logits: Floats) -> Floats:
    """Probabilities (n, K) of logits (n, K)."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def _scaled(x: Floats) -> _Scaled:
    mean = x.mean(axis=0)
    scale = 1 / (np.maximum(x.std(axis=0), _MIN_DEVIATION) * np.sqrt(x.shape[1]))
    values = (x - mean) * scale
    apart = _squares(values)
    apart = apart[apart > 0]
    return _Scaled(
        values=values,
        mean=mean,
        scale=scale,
        typical=float(np.median(apart)) if apart.size else 1.0,
    )


def _squares(values: Floats) -> Floats:
    """Squared distances (n, n) of features (n, d)."""
    products = values @ values.T
    lengths = np.diagonal(products).copy()
    products *= 2
    squares = lengths[:, None] + lengths[None]
    squares -= products
    return np.asarray(np.maximum(squares, 0.0, out=squares))


def _targets(classes: NDArray[np.intp]) -> Floats:
    count = int(classes.max()) + 1
    return np.eye(count)[classes] - 1 / count


def _regularised(kernel: Floats, ridge: float, classes: NDArray[np.intp]) -> Floats:
    """The matrix (n, n) to invert, in the place of a kernel (n, n)."""
    counts = np.bincount(classes)
    weight = len(classes) / (len(counts) * counts[classes])
    kernel[np.diag_indices_from(kernel)] += ridge / weight
    return kernel


def _weights(kernel: Floats, ridge: float, classes: NDArray[np.intp]) -> Floats:
    """Weights (n, K) of the labels in the score of each class; overwrites the kernel."""
    return np.asarray(np.linalg.solve(_regularised(kernel, ridge, classes), _targets(classes)))


def _left_out(
    kernel: Floats, ridge: float, classes: NDArray[np.intp], folds: NDArray[np.intp]
) -> Floats:
    """Scores (n, K) of each label by a fit without its fold; overwrites the kernel."""
    targets = _targets(classes)
    inverse = np.linalg.inv(_regularised(kernel, ridge, classes))
    weights = inverse @ targets
    scores = np.empty_like(targets)
    for fold in np.unique(folds):
        own = folds == fold
        scores[own] = targets[own] - np.linalg.solve(inverse[np.ix_(own, own)], weights[own])
    return scores


def _choice(
    left_out: Mapping[Candidate, Floats],
    classes: NDArray[np.intp],
    rows: NDArray[np.bool_],
    tested: NDArray[np.bool_],
) -> Choice:
    """The candidate of each kernel with the smallest loss on the labels of `rows`.

    If there are several sets of features, the set whose head has the smallest loss is chosen. The
    temperature of the sum is fitted to those of the labels that are `tested`.
    """
    calibrated = rows & tested if (rows & tested).any() else rows
    found = {one: _temperature(scores[rows], classes[rows]) for one, scores in left_out.items()}
    heads: list[tuple[float, Choice]] = []
    for name in dict.fromkeys(one.features for one in left_out):
        parts: dict[Candidate, float] = {}
        for kind in _SETTINGS:
            own = [one for one in found if (one.features, one.kernel) == (name, kind)]
            best = min(own, key=lambda one: found[one][1])
            parts[best] = found[best][0]
        plain = Choice(parts=parts, temperature=1.0)
        _, loss = _temperature(plain.logits(left_out, rows), classes[rows])
        temperature, _ = _temperature(plain.logits(left_out, calibrated), classes[calibrated])
        heads.append((loss, replace(plain, temperature=temperature)))
    return min(heads, key=lambda head: head[0])[1]


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

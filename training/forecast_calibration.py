"""Calibration of forecasts across regions: what `models.forecast_calibration` applies.

embeddings of training series -> references -> distances
forecasts on validation places and in regions not trained on -> classifier, damping, factors
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LinearRegression, LogisticRegression

from models.forecast_calibration import (
    ANCHORS,
    CLOSEST,
    DIRECTIONS,
    FARTHEST,
    REFERENCES,
    ForecastCalibration,
)
from training.calibration import equal_quantile, equal_weights

Floats = NDArray[np.floating[Any]]
# Weight of the disagreement of the networks and power of the distance: chosen on regions left out
# (docs/decisions/forecasts.md).
_DISAGREEMENT = 6.0
_POWER = 0.5
_SHARE = 0.8
"""Share of the targets inside the interval."""
# Inverse strength of the classifier's penalty: strong, because it has to hold for other regions.
_INVERSE_PENALTY = 0.003
# Smallest standard deviation by which a number of the embedding is scaled.
_LEAST_DEVIATION = 0.05
_LEAST_FACTOR = 0.05
_LEAST_WIDTH = 1e-6
# Rows whose distances are computed at once.
_BATCH = 1024


@dataclass(frozen=True, kw_only=True)
class Nearness:
    """How far an embedding lies from those of the training series of the same networks."""

    projection: Floats
    """(D, P), scaled so that the median distance of the validation places is 1."""
    references: Floats
    """Projected embeddings of training series (K, P)."""
    unit: float
    """The median distance of the validation places before it was set to 1."""

    def of(self, embedding: Floats) -> Floats:
        """Relative distances (N), within their bounds, of embeddings (N, D)."""
        distances = _nearest(embedding @ self.projection, self.references)
        return np.asarray(distances.clip(CLOSEST, FARTHEST))


def fit_nearness(
    parts: Sequence[Floats], near: Sequence[Floats] = (), *, unit: float | None = None
) -> Nearness:
    """Choose references among the training series; parts have the same weight.

    Args:
        parts: embeddings (N, D) of the training series of each region.
        near: embeddings (N, D) of the validation places.
        unit: `Nearness.unit` of networks of the same shape that did not see the validation places,
            for networks that did; None takes it from `near`.
    """
    x = np.concatenate(parts).astype(np.float64)
    share = equal_weights(parts) / len(parts)
    mean = share @ x
    scale = np.sqrt(share @ np.square(x - mean)) + _LEAST_DEVIATION
    scaled = (x - mean) / scale
    _, directions = np.linalg.eigh((scaled * share[:, None]).T @ scaled)
    projection = directions[:, ::-1][:, : min(DIRECTIONS, x.shape[1])] / scale[:, None]
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(x), REFERENCES, replace=len(x) < REFERENCES, p=share)
    references = x[chosen] @ projection
    if unit is None:
        distances = [_nearest(e @ projection, references) for e in near]
        unit = float(np.median(np.concatenate(distances)))
    return Nearness(projection=projection / unit, references=references / unit, unit=unit)


def _nearest(places: Floats, references: Floats) -> Floats:
    """Distance of each place (N, P) from the nearest reference (K, P)."""
    own = np.square(references).sum(axis=1)
    parts = []
    for i in range(0, len(places), _BATCH):
        part = places[i : i + _BATCH]
        squared = (own - 2.0 * part @ references.T).min(axis=1) + np.square(part).sum(axis=1)
        parts.append(np.sqrt(squared.clip(0.0)))
    return np.concatenate(parts)


@dataclass(frozen=True, kw_only=True)
class Forecasts:
    """Forecasts of one region before calibration."""

    quantiles: Floats
    """Mean of the networks' quantiles (N, H, S, 3), index units."""
    disagreement: Floats
    """Relative disagreement of the networks (N)."""
    embedding: Floats
    """Embeddings of the first network (N, D)."""
    anchors: Floats
    """Last value and mean of the past (N, A, S), index units."""
    distance: Floats
    """Relative distance of each embedding from those of these networks' training series (N)."""
    target: Floats
    """(N, H, S), index units."""
    known: NDArray[np.bool_]
    """True where the target counts (N, H, S)."""

    def towards(self) -> Floats:
        """Differences of the anchors from the median (N, H, S, A)."""
        return np.asarray(np.moveaxis(self.anchors, 1, -1)[:, None] - self.quantiles[..., 1:2])

    def unlike(self) -> Floats:
        """How unlike the training series each pixel is (N), 0 to 1, by its distance."""
        return np.asarray(1.0 - CLOSEST / self.distance)

    def damped(self, shares: Floats) -> Forecasts:
        """These forecasts, moved towards the anchors by these shares (A), or by pixel (N, A)."""
        wide = np.broadcast_to(shares, (len(self.distance), ANCHORS))[:, None, None]
        moved = (self.towards() * wide).sum(axis=-1, keepdims=True)
        return replace(self, quantiles=self.quantiles + moved)

    def widening(self) -> Floats:
        """Factors by disagreement and distance alone (N)."""
        apart = np.sqrt(1.0 + np.square(_DISAGREEMENT * self.disagreement))
        return np.asarray(apart * self.distance**_POWER)

    def ratios(self) -> Floats:
        """Smallest factor on the widened interval that holds each known target."""
        factor = self.widening()[:, None, None]
        median = self.quantiles[..., 1]
        off = self.target - median
        below = (median - self.quantiles[..., 0]) * factor
        above = (self.quantiles[..., 2] - median) * factor
        width = np.where(off < 0, below, above).clip(_LEAST_WIDTH)
        return np.asarray((np.abs(off) / width)[self.known])


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The calibration of a `ForecastCalibration`, except its nearness."""

    weight: Floats
    """Weights of the classifier (D)."""
    bias: float
    near: float
    """Factor on the validation places' kind of series."""
    far: float
    """Factor on others."""
    damping: Floats
    """Share of each anchor in the median of a pixel wholly unlike the training series (A)."""
    damping_elsewhere: Floats
    """The same of a pixel whose place is known to be far from the training data (A)."""

    def calibrated(self, found: Forecasts, *, elsewhere: bool = False) -> Floats:
        """Calibrated quantiles (N, H, S, 3): a plain reference for `ForecastCalibration`.

        Args:
            found: the forecasts.
            elsewhere: whether their place is known to be far from the training data.
        """
        odds = found.embedding @ self.weight + self.bias
        other = np.ones(len(odds)) if elsewhere else 1.0 / (1.0 + np.exp(-odds))
        factor = self.near ** (1.0 - other) * self.far**other * found.widening()
        shares = (other * found.unlike())[:, None] * self.damping
        quantiles = found.damped(self.damping_elsewhere if elsewhere else shares).quantiles
        median = quantiles[..., 1:2]
        return np.asarray(median + (quantiles - median) * factor[:, None, None, None])

    def document(self) -> dict[str, Any]:
        """The calibration as JSON values."""
        return {
            "damping": self.damping.round(4).tolist(),
            "damping_elsewhere": self.damping_elsewhere.round(4).tolist(),
            "disagreement": _DISAGREEMENT,
            "power": _POWER,
            "near": round(self.near, 4),
            "far": round(self.far, 4),
            "bias": round(self.bias, 6),
            "weight": self.weight.round(6).tolist(),
        }


def fit_calibration(
    near: Sequence[Forecasts],
    far: Sequence[Forecasts],
    others: Sequence[Floats] = (),
    *,
    embeddings: tuple[Sequence[Floats], Sequence[Floats]] | None = None,
    narrower: float = 1.0,
) -> Calibration:
    """Fit classifier, damping and factors; regions have the same weight, whatever their size.

    Args:
        near: forecasts on the validation places.
        far: forecasts in regions that the networks were not trained in.
        others: embeddings (N, D) of further series unlike those of the validation places, for the
            classifier alone.
        embeddings: of the series of the validation places and of others (each N, D), by the
            networks that the calibration is for; None where the forecasts are theirs.
        narrower: how much wider the own interval of the networks that `far` is from is than that of
            the networks that the calibration is for.
    """
    ours, theirs = embeddings or (
        [f.embedding for f in near],
        [*(f.embedding for f in far), *others],
    )
    x = np.concatenate([*ours, *theirs]).astype(np.float64)
    label = np.repeat([0, 1], [sum(map(len, ours)), sum(map(len, theirs))])
    share = np.concatenate([equal_weights(side) / len(side) for side in (ours, theirs)])
    mean, deviation = x.mean(axis=0), x.std(axis=0) + _LEAST_DEVIATION
    classifier = LogisticRegression(C=_INVERSE_PENALTY, max_iter=200)
    classifier.fit((x - mean) / deviation, label, sample_weight=share * len(x) / share.sum())
    weight = classifier.coef_[0] / deviation
    elsewhere = _shares(far, [np.ones(len(part.distance)) for part in far])
    return Calibration(
        weight=weight,
        bias=float(classifier.intercept_[0] - mean @ weight),
        near=_factor(near),
        far=_factor([part.damped(elsewhere) for part in far]) * narrower,
        damping=_shares(far, [part.unlike() for part in far]),
        damping_elsewhere=elsewhere,
    )


def _shares(parts: Sequence[Forecasts], weights: Sequence[Floats]) -> Floats:
    """Shares of the anchors (A) with the least squared error, not negative.

    Args:
        parts: forecasts; all parts have the same weight.
        weights: factor on the shares of each pixel (N), by part.
    """
    errors = [(part.target - part.quantiles[..., 1])[part.known] for part in parts]
    if not sum(map(len, errors)):
        return np.zeros(ANCHORS)
    towards = np.concatenate(
        [
            (part.towards() * weight[:, None, None, None])[part.known]
            for part, weight in zip(parts, weights, strict=True)
        ]
    )
    fit = LinearRegression(fit_intercept=False, positive=True)
    fit.fit(towards, np.concatenate(errors), equal_weights(errors))
    return np.asarray(fit.coef_, np.float64)


def _factor(parts: Sequence[Forecasts]) -> float:
    """Factor whose interval holds `_SHARE` of the targets; parts have the same weight."""
    found = equal_quantile([part.ratios() for part in parts], _SHARE)
    return 1.0 if found is None else max(found, _LEAST_FACTOR)


def write_calibration(
    calibration: ForecastCalibration, document: Mapping[str, Any], nearness: Nearness
) -> None:
    """Write a calibration into that of a graph, in place.

    Those of earlier versions have no damping, or none for places far from the training data.
    """
    values = {
        "damping": [0.0] * ANCHORS,
        "damping_elsewhere": [0.0] * ANCHORS,
        **document,
        "projection": nearness.projection,
        "references": nearness.references,
    }
    for name, _ in calibration.named_buffers():
        value = torch.as_tensor(values[name], dtype=torch.float32)
        getattr(calibration, name).copy_(value)

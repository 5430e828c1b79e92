"""Calibration of a forecast's band across regions: see `models.band.ForecastBand`.

forecasts on validation places and in regions not trained on -> classifier, factors -> band
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from models.band import ForecastBand
from training.calibration import fit_spread

Floats = NDArray[np.floating[Any]]
# Weight of the disagreement of the networks, and share of the targets beyond each outer quantile
# in other regions: chosen on regions left out (docs/decisions/forecasts.md). A share below 0.1,
# because a further region differs from all those that the factors are fitted on.
_DISAGREEMENT = 10.0
_FAR_TAIL = 0.08
_NEAR_TAIL = 0.1
# Inverse strength of the classifier's penalty: strong, because it has to hold for other regions.
_INVERSE_PENALTY = 0.003
# Smallest standard deviation by which a number of the embedding is scaled.
_LEAST_DEVIATION = 0.05


@dataclass(frozen=True, kw_only=True)
class Forecasts:
    """Forecasts of one region before calibration."""

    quantiles: Floats
    """Mean of the networks' quantiles (N, H, S, 3), index units."""
    disagreement: Floats
    """Relative disagreement of the networks (N)."""
    embedding: Floats
    """Embeddings of the first network (N, D)."""
    target: Floats
    """(N, H, S), index units."""
    known: NDArray[np.bool_]
    """True where the target counts (N, H, S)."""

    def widened(self) -> Floats:
        """Quantiles scaled by the disagreement alone."""
        factor = np.sqrt(1.0 + np.square(_DISAGREEMENT * self.disagreement))
        median = self.quantiles[..., 1:2]
        return np.asarray(median + (self.quantiles - median) * factor[:, None, None, None])


@dataclass(frozen=True, kw_only=True)
class Band:
    """The calibration of a `ForecastBand`."""

    weight: Floats
    """Weights of the classifier (D)."""
    bias: float
    near: Floats
    """Factors on the validation places' kind of series, below and above the median (H, 2)."""
    far: Floats
    """Factors in other regions (H, 2)."""

    def scaled(self, found: Forecasts) -> Floats:
        """Calibrated quantiles (N, H, S, 3): a plain reference for `ForecastBand`."""
        odds = found.embedding @ self.weight + self.bias
        other = (1.0 / (1.0 + np.exp(-odds)))[:, None, None]
        factor = self.near ** (1.0 - other) * self.far**other
        factors = np.stack([factor[..., 0], np.ones(factor.shape[:2]), factor[..., 1]], axis=-1)
        quantiles = found.widened()
        median = quantiles[..., 1:2]
        return np.asarray(median + (quantiles - median) * factors[:, :, None])

    def document(self) -> dict[str, Any]:
        """The calibration as JSON values."""
        return {
            "disagreement": _DISAGREEMENT,
            "near": self.near.round(4).tolist(),
            "far": self.far.round(4).tolist(),
            "bias": round(self.bias, 6),
            "weight": self.weight.round(6).tolist(),
        }


def fit_band(
    near: Sequence[Forecasts],
    far: Sequence[Forecasts],
    others: Sequence[Floats] = (),
    *,
    embeddings: tuple[Sequence[Floats], Sequence[Floats]] | None = None,
) -> Band:
    """Fit classifier and factors; regions have the same weight, whatever their size.

    Args:
        near: forecasts on the validation places.
        far: forecasts in regions that the networks were not trained in.
        others: embeddings (N, D) of further series unlike those of the validation places, for the
            classifier alone.
        embeddings: of the series of the validation places and of others (each N, D), by the
            networks that the band is for; None where the forecasts are theirs.
    """
    ours, theirs = embeddings or (
        [f.embedding for f in near],
        [*(f.embedding for f in far), *others],
    )
    x = np.concatenate([*ours, *theirs]).astype(np.float64)
    label = np.repeat([0, 1], [sum(map(len, ours)), sum(map(len, theirs))])
    share = np.concatenate(
        [np.full(len(e), 1 / len(e) / len(side)) for side in (ours, theirs) for e in side]
    )
    mean, deviation = x.mean(axis=0), x.std(axis=0) + _LEAST_DEVIATION
    classifier = LogisticRegression(C=_INVERSE_PENALTY, max_iter=200)
    classifier.fit((x - mean) / deviation, label, sample_weight=share * len(x) / share.sum())
    weight = classifier.coef_[0] / deviation
    return Band(
        weight=weight,
        bias=float(classifier.intercept_[0] - mean @ weight),
        near=fit_spread([(f.widened(), f.target, f.known) for f in near], tail=_NEAR_TAIL),
        far=fit_spread([(f.widened(), f.target, f.known) for f in far], tail=_FAR_TAIL),
    )


def apply_band(band: ForecastBand, document: Mapping[str, Any]) -> None:
    """Write a calibration into a graph's band, in place."""
    for name in ("disagreement", "weight", "bias", "near", "far"):
        value = torch.as_tensor(document[name], dtype=torch.float32)
        getattr(band, name).copy_(value)

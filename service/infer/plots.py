"""Recurrence plots as a model sees them, in NumPy.

    reflectance → spectral indices → regular time grid → standardised → recurrence plots

The graph computes these inside and returns only its prediction. This module repeats the graph's
stages for display, so that a client can look at what an encoder was given; predictions never pass
through it. The tests compare it with the torch graph and with pyts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from models.card import ModelCard, TimeWindow
from models.formulas import (
    FAR,
    FORMULAS,
    INDEX_CENTER,
    INDEX_LIMIT,
    INDEX_SPREAD,
    NARROW,
    SMALLEST_DENOMINATOR,
    WIDE,
    WIDE_HEIGHT,
    YEAR,
)
from service.errors import InvalidRequest

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class PlotParameters:
    """How a model makes its recurrence plots."""

    indices: tuple[str, ...]
    """Spectral indices (K)."""
    window: TimeWindow
    clarity: float
    """How fast a date's weight falls with its blue reflectance; 0 weighs all dates equally."""
    threshold: float | Literal["point", "distance"] | None
    """As in pyts; None keeps distances."""
    percentage: float
    """Of the thresholds `point` and `distance`, 0 to 100."""

    @classmethod
    def of(cls, card: ModelCard) -> PlotParameters:
        """The parameters that a model's card states.

        Raises:
            InvalidRequest: the model sees no recurrence plots, or its card does not state how.
        """
        config = card.training.get("config") or {}
        encoder: Mapping[str, Any] = config.get("encoder") or config.get("pixel") or {}
        if card.window is None or not encoder.get("plots"):
            raise InvalidRequest.of(
                "plots",
                f"the card of '{card.id}' states no recurrence plots; name a model of pixels that "
                "has them as `model`",
            )
        return cls(
            indices=card.indices,
            window=card.window,
            clarity=float(config.get("clarity") or 0.0),
            threshold=encoder.get("threshold"),
            percentage=float(encoder.get("percentage", 10.0)),
        )


def spectral_index(name: str, bands: Mapping[str, Floats]) -> Floats:
    """A spectral index from reflectance.

    Args:
        name: a key of `models.formulas.FORMULAS`.
        bands: reflectance by band name, unitless, of any shape, NaN where missing.

    Returns:
        The index, unitless, -1.5 to 1.5; NaN where a band is missing or the formula's denominator
        is at most 0.05.
    """
    needs, formula = FORMULAS[name]
    numerator, denominator = formula(*(bands[band] for band in needs))
    known = denominator > SMALLEST_DENOMINATOR  # False for NaN
    ratio = np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=known)
    return np.asarray(np.clip(ratio, -INDEX_LIMIT, INDEX_LIMIT))


def regular_series(
    values: Floats,
    valid: NDArray[np.bool_],
    days: NDArray[Any],
    *,
    bands: tuple[str, ...],
    parameters: PlotParameters,
) -> Floats:
    """Spectral indices on a model's regular grid, as its graph computes them.

    Args:
        values: reflectance (N, T, C), unitless; any value where not valid.
        valid: True where usable (N, T).
        days: days since the window's first day (T).
        bands: names of the bands on the C axis.
        parameters: of the model.

    Returns:
        Series (N, K, M), NaN for a pixel without a usable date.
    """
    window = parameters.window
    by_name = {name: values[:, :, c] for c, name in enumerate(bands)}
    x = np.stack([spectral_index(name, by_name) for name in parameters.indices], axis=1)
    usable = valid & ~np.isnan(x).any(axis=1)
    steps = np.arange(window.steps, dtype=np.float32) * np.float32(window.step_days)
    distance = np.asarray(days, np.float32)[:, None] - steps
    if window.yearly:
        within = distance - YEAR * np.floor(distance / YEAR)
        distance = np.minimum(within, YEAR - within)
    square = np.square(distance, dtype=np.float64)
    narrow, wide = NARROW * window.step_days, WIDE * window.step_days
    weight = np.exp(np.maximum(-0.5 * square / narrow**2, -FAR))
    weight += WIDE_HEIGHT / (1.0 + square / wide**2)
    present = usable.astype(np.float64)
    if parameters.clarity:
        blue = np.clip(np.nan_to_num(by_name["B02"]), 0.0, 1.0)
        present *= np.exp(-parameters.clarity * blue.astype(np.float64))
    seen = np.where(usable[:, None], x, 0.0) * present[:, None]
    with np.errstate(invalid="ignore"):
        series = (seen @ weight) / (present @ weight)[:, None]
    return np.asarray(series, np.float32)


def recurrence_plots(series: Floats, parameters: PlotParameters) -> Floats:
    """Recurrence plots of regular series (Eckmann et al. 1987, doi:10.1209/0295-5075/4/9/004).

    Args:
        series: spectral indices on the regular grid (N, K, M).
        parameters: of the model.

    Returns:
        Plots (N, K, M, M): distances between the standardised values of each two steps, or 1 where
        they are below the threshold and 0 elsewhere.
    """
    levels = (series - np.float32(INDEX_CENTER)) / np.float32(INDEX_SPREAD)
    distances = np.abs(levels[..., :, None] - levels[..., None, :])
    threshold = parameters.threshold
    if threshold is None:
        return distances
    if threshold == "point":
        limit = np.percentile(distances, parameters.percentage, axis=(-2, -1), keepdims=True)
    elif threshold == "distance":
        limit = distances.max(axis=(-2, -1), keepdims=True) * (parameters.percentage / 100.0)
    else:
        limit = np.full((), threshold, np.float32)
    return np.asarray(distances < limit, np.float32)

"""Recurrence plots as a model sees them, in NumPy.

    reflectance → spectral indices → regular time grid → standardised → recurrence plots

A model's ONNX graph computes its recurrence plots internally and returns only the prediction. This
module computes the same plots for display, so that a client can see an encoder's input. No
prediction uses this module. The tests compare its plots with those of the torch graph and of pyts.

Shapes: N pixels, T dates, C bands, K spectral indices, M steps of the regular grid.
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
    time_window: TimeWindow
    """The model's span of dates, with the steps of the regular grid."""
    clarity: float
    """How fast a date's weight falls with its blue reflectance; 0 weighs all dates equally."""
    threshold: float | Literal["point", "distance"] | None
    """The parameter `threshold` of pyts; None returns distances instead of 0 and 1."""
    percentage: float
    """The parameter `percentage` of the thresholds `point` and `distance`, 0 to 100."""

    @classmethod
    def of(cls, card: ModelCard) -> PlotParameters:
        """The parameters from a model's card.

        Raises:
            InvalidRequest: the model does not use recurrence plots, or its card does not contain
                their parameters.
        """
        config = card.training.get("config") or {}
        encoder: Mapping[str, Any] = config.get("encoder") or config.get("pixel") or {}
        if card.window is None or not encoder.get("plots"):
            raise InvalidRequest.of(
                "plots",
                f"the card of '{card.id}' has no parameters of recurrence plots; set `model` to a "
                "pixel model that uses recurrence plots",
            )
        return cls(
            indices=card.indices,
            time_window=card.window,
            clarity=float(config.get("clarity") or 0.0),
            threshold=encoder.get("threshold"),
            percentage=float(encoder.get("percentage", 10.0)),
        )


def spectral_index(name: str, bands: Mapping[str, Floats]) -> Floats:
    """A spectral index from reflectance.

    Args:
        name: a key of `models.formulas.FORMULAS`.
        bands: reflectance by band name, unitless, arrays of one shape, NaN where missing.

    Returns:
        The index in the shape of the bands, float32, unitless, -1.5 to 1.5; NaN where a band is
        missing or the formula's denominator is at most 0.05.
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
    """Spectral indices on a model's regular time grid, equal to those that its graph computes.

    Args:
        values: reflectance (N, T, C) float32, unitless, 0 to 1; any value where not valid.
        valid: True where usable (N, T).
        days: days since the time window's first day (T).
        bands: names of the bands on the C axis.
        parameters: the model's parameters.

    Returns:
        Spectral indices (N, K, M) float32, unitless, NaN for a pixel without a usable date.
    """
    window = parameters.time_window
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
    weighted = np.where(usable[:, None], x, 0.0) * present[:, None]
    with np.errstate(invalid="ignore"):
        series = (weighted @ weight) / (present @ weight)[:, None]
    return np.asarray(series, np.float32)


def recurrence_plots(series: Floats, parameters: PlotParameters) -> Floats:
    """Recurrence plots of regular series (Eckmann et al. 1987, doi:10.1209/0295-5075/4/9/004).

    Args:
        series: spectral indices on the regular grid (N, K, M) float32, unitless.
        parameters: the model's parameters.

    Returns:
        Plots (N, K, M, M) float32. Without a threshold, the distance between the standardised
        values of each pair of steps; with one, 1 where the distance is below it and 0 elsewhere.
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

"""Attribution: how much each date mattered to a pixel's class.

    subsets of the dates → class probability of each subset → main effect of each date

The model predicts from many subsets of a pixel's dates; dates outside a subset count as cloudy. A
date's attribution is the mean probability of the pixel's class over the subsets with the date,
minus the mean over those without it: the Banzhaf value of a cooperative game (Wang and Jia 2023,
arXiv:2205.15466), and the main effect of a two-level experiment. The subsets are such an experiment
with a foldover (Plackett and Burman 1946, doi:10.1093/biomet/33.4.305; Box and Hunter 1961,
doi:10.1080/00401706.1961.10489951): every pair of dates occurs equally often with both, one or none
of them, so that the effects are confounded neither with each other nor with those of pairs.
docs/decisions/attribution.md compares this method with leaving out one date.

Shapes: N pixels, T dates, C bands, K classes, R subsets.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from service.infer.model import LoadedModel

Floats = NDArray[np.float32]

_EVERY_SUBSET = 6
"""Largest number of dates for which all subsets are used, so that the Banzhaf value is exact."""
_ROWS = 256
"""Largest number of rows (pixels x subsets) in one call of the model."""


def subsets(dates: int) -> NDArray[np.bool_]:
    """The subsets of T dates (R, T), True where a date is in the subset.

    Each date is in half of the subsets, and each pair of dates in a quarter. R is 2**T for up to
    six dates, and otherwise the smallest power of two above 2 T: 64 for up to 31 dates, 128 for up
    to 63.
    """
    if dates <= _EVERY_SUBSET:
        numbers = np.arange(2**dates)[:, None]
        return np.asarray((numbers >> np.arange(dates)) % 2 == 1)
    half = 1 << dates.bit_length()
    rows, columns = np.arange(half)[:, None], np.arange(1, dates + 1)
    # Sylvester's Hadamard matrix: the sign is the parity of the common bits.
    kept = np.bitwise_count(rows & columns) % 2 == 0
    return np.concatenate([kept, ~kept])


def date_attribution(
    model: LoadedModel,
    values: Floats,
    valid: NDArray[np.bool_],
    days: Floats,
    day_of_year: int,
    probabilities: Floats,
    *,
    before_each: Callable[[], None] = lambda: None,
) -> Floats:
    """The attribution of each date to the most probable class of each pixel.

    Args:
        model: a classifier of pixels.
        values: reflectance (N, T, C), unitless, 0 to 1.
        valid: True where usable (N, T).
        days: days (T) since the time window's first day.
        day_of_year: of the time window's first day.
        probabilities: class probabilities predicted from all dates (N, K).
        before_each: called before each subset, for instance to raise if the run was cancelled.

    Returns:
        Difference of the class's mean probability with and without the date (N, T), -1 to 1:
        positive if the date raises the probability, negative if it lowers it. NaN where the pixel
        is not clear on the date. A subset without a clear date has probability 1 / K.
    """
    best = probabilities.argmax(axis=1)[:, None]
    unknown = np.float32(1.0 / probabilities.shape[1])
    kept = subsets(valid.shape[1])
    effects = np.zeros(valid.shape, np.float32)
    at_once = max(1, _ROWS // max(1, len(values)))
    for start in range(0, len(kept), at_once):
        before_each()
        some = kept[start : start + at_once]
        repeated = values if len(some) == 1 else np.tile(values, (len(some), 1, 1))
        used = (valid & some[:, None]).reshape(-1, valid.shape[1])
        predicted = model.pixels(repeated, used, days, day_of_year).reshape(
            len(some), *best.shape[:1], -1
        )
        confidence = np.take_along_axis(predicted, best[None], axis=2)
        np.copyto(confidence, unknown, where=np.isnan(confidence))
        # One by one: sums of floats must not depend on how many subsets are predicted at once.
        for subset, chances in zip(some, confidence, strict=True):
            effects += np.where(subset, chances, -chances)
    effects *= 2.0 / len(kept)
    effects[~valid] = np.nan
    return effects

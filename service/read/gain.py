"""Dates whose values are scaled by another factor than those of the dates near them.

    reflectance of the sampled pixels → brightness relative to near dates → factor by date

Half the values on one date, as from a file of reflectance x 5000 among files of reflectance
x 10000, are plausible by themselves, and NDVI stays as it is. Only other dates show the factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
BANDS = ("B02", "B04", "B08")
# A date has another gain if all bands of its pixels are this many times (natural logarithms: 1.57
# to 3.3) brighter or darker than on a date near it, by nearly the same factor, and NDVI, which no
# gain changes, is the same; and if more dates near it are so than are nearly as bright as it.
# docs/decisions/gain-by-pixels.md has how many real dates are.
_OTHER = (0.45, 1.2)
_SAME = 0.3
_BETWEEN_BANDS = 0.4
_SPREAD = 0.6
_NDVI = 0.2
_CORRELATION = 0.3
# The darker one of the two dates is land: snow differs from snow by a factor as well.
_LAND_BLUE = 0.09
_NEAR = 8
_FEWEST_PIXELS = 50
_FEWEST_DATES = 4
_FIRST_PIXELS = 256
_LEAST = np.float32(1e-4)


def find_gains(
    values: Floats,
    valid: NDArray[np.bool_],
    days: Sequence[int],
    *,
    shared: Callable[[int, int], tuple[NDArray[np.intp], NDArray[np.intp]]],
    masked: bool,
) -> dict[int, float]:
    """The dates of another gain than the dates near them.

    Args:
        values: reflectance (T, 3, N) in `BANDS`, unitless, not NaN where `valid`.
        valid: usable pixels (T, N).
        days: the days of the dates (T).
        shared: for two dates, the positions on N of the pixels that both have, valid on both.
        masked: whether a cloud mask has left out clouds; without one, two other dates have to
            show the factor.

    Returns:
        By position on T, about how many times as bright the date is: 0.3 to 0.64, or 1.57 to 3.3.
        Empty for fewer than four dates of at least 50 usable pixels.
    """
    known = np.flatnonzero(valid.sum(axis=1) >= _FEWEST_PIXELS)
    if len(known) < _FEWEST_DATES:
        return {}
    at = np.array(days)[known]
    near = np.argsort(np.abs(at[:, None] - at), axis=1, kind="stable")
    near = near[near != np.arange(len(known))[:, None]].reshape(len(known), -1)[:, :_NEAR]
    # Medians of some pixels first, because to compare pixel by pixel takes far longer.
    some = slice(None, None, max(1, values.shape[2] // _FIRST_PIXELS))
    ordered = np.where(valid[known, None, some], values[known, :, some], np.float32(np.nan))
    ordered.sort(axis=2)  # NaN last
    count = valid[known, some].sum(axis=1)[:, None, None]
    levels = np.take_along_axis(ordered, np.maximum(count - 1, 0) // 2, axis=2)[:, :, 0]
    levels = np.log(np.maximum(levels, _LEAST))
    rough = levels[:, None] - levels[near]
    same = (np.abs(rough).max(axis=2) < _SAME).sum(axis=1)
    other = (np.abs(rough).min(axis=2) >= _SAME) & (np.ptp(rough, axis=2) <= 2 * _BETWEEN_BANDS)
    confirmed = set(known[same > 0].tolist())  # by a date that is nearly as bright
    gains: dict[int, dict[int, float]] = {}
    least: dict[int, int] = {}
    for n in np.flatnonzero(other.sum(axis=1) > same):
        t = int(known[n])
        least[t] = max(1 if masked else 2, int(same[n]) + 1)
        own = confirmed.intersection(known[near[n]][other[n]].tolist())
        each = {u: _gain(values, t, u, shared) for u in own} if len(own) >= least[t] else {}
        gains[t] = {u: gain for u, gain in each.items() if gain is not None}
    found: dict[int, float] = {}
    # A sound date differs from one of another gain as well: the date that differs from most first.
    for t in sorted(gains, key=lambda t: len(gains[t]), reverse=True):
        remaining = [gain for u, gain in gains[t].items() if u not in found]
        if len(remaining) >= least[t]:
            found[t] = float(np.exp(np.median(remaining)))
    return found


def _gain(
    values: Floats,
    t: int,
    u: int,
    shared: Callable[[int, int], tuple[NDArray[np.intp], NDArray[np.intp]]],
) -> float | None:
    """Natural logarithm of the factor between two dates of the same land; None if it is not one."""
    own, other = shared(t, u)
    y, x = values[t][:, own], values[u][:, other]
    positive = (y > 0).all(axis=0) & (x > 0).all(axis=0)
    if positive.sum() < _FEWEST_PIXELS:
        return None
    y, x = y[:, positive], x[:, positive]
    ratio = np.sort(np.log(y / x), axis=1)
    n = ratio.shape[1]
    lower, gain, upper = (ratio[:, int(share * (n - 1))] for share in (0.25, 0.5, 0.75))
    least, most = _OTHER
    if not least <= np.abs(gain).min() <= np.abs(gain).max() <= most:
        return None
    change = np.median(np.abs(_ndvi(y) - _ndvi(x)))
    is_factor = (
        np.ptp(gain) <= _BETWEEN_BANDS
        and (upper - lower).max() <= _SPREAD
        and change <= _NDVI
        and min(np.corrcoef(x[c], y[c])[0, 1] for c in (1, 2)) >= _CORRELATION
        and min(np.median(y[0]), np.median(x[0])) <= _LAND_BLUE
    )
    return float(gain.mean()) if is_factor else None


def _ndvi(values: Floats) -> Floats:
    return np.asarray((values[2] - values[1]) / (values[2] + values[1]))

"""Backtests: shares and prediction intervals of forecasts, fitted to hindcasts, and their errors.

    hindcasts ──▶ shares of persistence and last year's date, by step ──▶ corrected medians
              └─▶ conformal scores of these, by step ──▶ factor on the interval's half widths

Hindcasts are weighted by season, because errors in spring are a poor estimate of errors in autumn.
Factors are shrunk towards 1 and shares towards small fixed shares; the shrinkage decreases with the
evidence, counted in blocks of 30 days, because pixels of one date err together.

The factor is the conformal quantile of scaled scores: conformalised quantile regression (Romano,
Patterson and Candès 2019, arXiv 1905.03222) with scores in units of the predicted half width
(CQR-m of Sesia and Candès 2020, doi:10.1002/sta4.261), weighted by season (Barber et al. 2023,
arXiv 2202.13415). Each score uses shares fitted without the hindcast's own block and those around
it (cross-conformal prediction, Barber et al. 2021, arXiv 1905.02928), so that scores are not those
of training data.

Shapes: R hindcasts, N series, B blocks, H steps of the forecast, S spectral indices, Q quantiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]

BLOCK_DAYS = 30
"""Days of hindcasts that count as one independent piece of evidence."""
FACTORS = (0.5, 4.0)
"""Least and largest factor on the interval's half widths."""
_YEAR = 365.25
_SEASON_DAYS = 30.0
"""Standard deviation of the season weight, in days of the year."""
_OTHER_SEASON = 0.1
"""Weight of a hindcast from the opposite season in the interval's factor."""
_OTHER_SEASON_BLEND = 0.03
"""The same for the shares: the season matters more for which forecast is best than for the size of
the error."""
_STEPS_ALIKE = 1.5
"""Standard deviation, in steps, of the kernel that pools neighbouring steps."""
_PRIOR = 1.0
"""Strength of the shrinkage, in blocks of evidence."""
_PRIOR_SHARES = (0.1, 0.2)
"""Shares of persistence and last year's date without evidence; on most stacks, small shares of both
lower the error (docs/results.md)."""
_PRIOR_SHARE_ALONE = 0.1
"""Share of persistence where last year's date is unknown."""
_LEVEL = 0.8
"""Level of the conformal quantile. The finite-sample level, 0.8 (1 + 1/n) for n independent scores,
is not used: few blocks make it nearly 1, and the shrinkage towards the model's own interval, which
is calibrated on other regions, already guards against little evidence."""
_NARROWEST = 1e-3
"""Least half width of an interval in scores, index units."""
_HELD_OUT_DAYS = 100
"""Distance in days within which hindcasts are left out together, because their targets overlap."""


@dataclass(frozen=True, kw_only=True)
class Hindcasts:
    """Forecasts from earlier dates, and the values observed later."""

    quantiles: Floats
    """The model's quantiles (R, H, S, Q), index units; NaN without a prediction."""
    target: Floats
    """Observed values (R, H, S), index units; NaN where unknown."""
    persistence: Floats
    """The last clear value before the forecast (R, S), index units."""
    last_year: Floats
    """The value a year before each step (R, H, S), index units; NaN where there is none."""
    age: NDArray[np.int64]
    """Days from the start date of the hindcast to the last date of its series (R)."""
    month: NDArray[np.int64]
    """Month of the start date (R), 1 to 12."""
    weight: Floats
    """Weight (R): the weights of one block of 30 days sum to at most 1."""

    def __len__(self) -> int:
        return len(self.age)

    @property
    def median(self) -> Floats:
        """The model's median (R, H, S)."""
        return self.quantiles[..., self.quantiles.shape[-1] // 2]

    @property
    def known(self) -> Bools:
        """Whether forecast, persistence and target are known (R, H)."""
        # A sum over the indices is finite only if each of them is.
        total = self.target.sum(axis=-1) + self.median.sum(axis=-1)
        return np.asarray(np.isfinite(total + self.persistence.sum(axis=-1)[:, None]))


@dataclass(frozen=True, kw_only=True)
class Correction:
    """The correction of a forecast, by step."""

    shares: Floats
    """Shares of persistence and of last year's date in the median where both are known (H, 2)."""
    share_alone: Floats
    """Share of persistence where last year's date is unknown (H)."""
    factor: Floats
    """Factor on the half widths of the prediction interval (H)."""

    def apply(self, quantiles: Floats, persistence: Floats, last_year: Floats) -> Floats:
        """Correct quantiles; unchanged where persistence is unknown.

        Args:
            quantiles: the model's (N, H, S, Q), index units.
            persistence: the last clear value (N, S).
            last_year: the value a year before each step (N, H, S), NaN where there is none.

        Returns:
            Corrected quantiles (N, H, S, Q), in the dtype of `quantiles`.
        """
        middle = quantiles.shape[-1] // 2
        median = quantiles[..., middle]
        blended = _blend(median, persistence, last_year, self.shares, self.share_alone)
        spread = (quantiles - median[..., None]) * self.factor[:, None, None]
        return np.asarray(blended[..., None] + spread, quantiles.dtype)


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Errors of some hindcasts; an RMSE is the mean of the RMSE of the indices."""

    n: int
    """Pixel-dates with a known target."""
    rmse: dict[str, float]
    """RMSE of `forecast` (corrected), `model` (not corrected) and `persistence`."""
    coverage: float
    """Share of the targets inside the corrected prediction interval, 0 to 1."""
    coverage_model: float
    """Share of the targets inside the model's prediction interval, 0 to 1."""
    n_last_year: int
    """Pixel-dates with a known value of last year's date as well."""
    rmse_where_last_year: dict[str, float]
    """RMSE on these of `forecast`, `model`, `persistence` and `last_year`; empty without any."""


@dataclass(frozen=True, kw_only=True)
class Backtest:
    """A fitted correction and its errors."""

    correction: Correction
    overall: Errors
    """Weighted by season, as the correction is."""
    steps: tuple[Errors | None, ...]
    """By step (H), weighted by season; None where no target is known."""
    months: dict[int, Errors]
    """By month of the start date, not weighted."""


def backtest(found: Hindcasts) -> Backtest:
    """Fit a correction to hindcasts, and compute its errors.

    Args:
        found: hindcasts, at least one with a known target.
    """
    known = found.known
    distance = np.abs((found.age + _YEAR / 2) % _YEAR - _YEAR / 2)
    season = np.exp(-0.5 * np.square(distance / _SEASON_DAYS))
    blend_weight = found.weight * (_OTHER_SEASON_BLEND + (1 - _OTHER_SEASON_BLEND) * season)
    interval_weight = found.weight * (_OTHER_SEASON + (1 - _OTHER_SEASON) * season)
    shares, alone = _fit(found, known * blend_weight[:, None])
    median = _cross_fitted(found, known * blend_weight[:, None])
    scores = _scores(found, median)
    weights = known * interval_weight[:, None]
    factor = _factors(scores, weights, known * (found.weight * season)[:, None])
    correction = Correction(shares=shares, share_alone=alone, factor=factor)
    # As for the scores: the median of a fit without the hindcast's own block.
    inside = scores <= factor[:, None]
    own = scores_of_model(found)
    errors = _WeightedErrors(found, median, inside, own <= 1.0)
    steps = np.arange(weights.shape[1])
    return Backtest(
        correction=correction,
        overall=errors.of(weights),
        steps=tuple(
            errors.of(only) if (only := weights * (steps == h)).any() else None for h in steps
        ),
        months={
            int(m): errors.of(only)
            for m in np.unique(found.month)
            if (only := known * (found.month == m)[:, None] * 1.0).any()
        },
    )


def scores_of_model(found: Hindcasts) -> Floats:
    """Scores (R, H, S) of the model's own forecasts: at most 1 inside its interval."""
    return _scores(found, found.median)


def _scores(found: Hindcasts, median: Floats) -> Floats:
    """Distance of the targets from a median (R, H, S), in half widths of the model's interval."""
    below = np.maximum(found.median - found.quantiles[..., 0], _NARROWEST)
    above = np.maximum(found.quantiles[..., -1] - found.median, _NARROWEST)
    return np.asarray(np.maximum((median - found.target) / below, (found.target - median) / above))


def _factors(scores: Floats, weights: Floats, own_season: Floats) -> Floats:
    """The conformal factor of each step (H), shrunk towards 1.

    A factor above 1 is trusted by the evidence of all seasons. One below 1 is trusted by the
    evidence of the forecast's own season alone, in which pooled steps, whose targets are mostly
    those of the same dates, count as one: errors of winter are small, and an interval narrowed
    by them covers too little of spring.

    Args:
        scores: (R, H, S).
        weights: of the hindcasts (R, H), 0 where the target is unknown.
        own_season: their weights in which other seasons count nothing (R, H).
    """
    horizon = weights.shape[1]
    kernel = _alike(horizon)
    factors = np.ones(horizon)
    for h in range(horizon):
        weight = weights * kernel[h]
        evidence = weight.sum()
        if evidence <= 0:
            continue
        there = weight > 0
        found = weighted_quantile(
            scores[there].ravel(), np.repeat(weight[there], scores.shape[-1]), _LEVEL
        )
        if found < 1.0:
            evidence = (own_season * kernel[h]).sum() / kernel[h].sum()
        trust = evidence / (evidence + _PRIOR)
        factors[h] = np.clip(found, *FACTORS) ** trust
    return factors


def weighted_quantile(values: Floats, weights: Floats, level: float) -> float:
    """The smallest value v such that a share `level` of the weight is on values up to v.

    Args:
        values: (n).
        weights: weights of the values (n).
        level: share of the total weight, 0 to 1.
    """
    order = np.argsort(values, kind="stable")
    total = np.cumsum(weights[order])
    at = np.searchsorted(total, level * total[-1] * (1 - 1e-12))
    return float(values[order][min(int(at), len(values) - 1)])


def _alike(horizon: int) -> Floats:
    """Kernel that pools neighbouring steps (H, H), 1 on the diagonal."""
    steps = np.arange(horizon)
    kernel = np.exp(-0.5 * np.square((steps[:, None] - steps) / _STEPS_ALIKE))
    kernel[kernel < 0.05] = 0.0
    return np.asarray(kernel)


def _blend(
    median: Floats, persistence: Floats, last_year: Floats, shares: Floats, alone: Floats
) -> Floats:
    """Medians (N, H, S) blended with persistence and last year's date, by step.

    `shares` is (H, 2) and `alone` (H), or with a leading axis N if each series has its own.
    """
    to_last = np.nan_to_num(persistence[:, None] - median)
    to_year = last_year - median
    both = np.isfinite(to_year).all(axis=-1, keepdims=True)
    with_year = shares[..., 0, None] * to_last + shares[..., 1, None] * np.nan_to_num(to_year)
    return np.asarray(median + np.where(both, with_year, alone[..., None] * to_last))


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """Second moments by block and step, from which shares are fitted; C = 1 or 2 forecasts."""

    gram: Floats
    """Products of the forecasts' differences to the median (B, H, C, C)."""
    cross: Floats
    """Products of these differences and the error of the median (B, H, C)."""
    evidence: Floats
    """Sums of weights (B, H)."""


def _sums(found: Hindcasts, weights: Floats, block: NDArray[np.int64], *, years: bool) -> _Sums:
    error = np.nan_to_num(found.target - found.median)
    differences = [found.persistence[:, None] - found.median]
    if years:
        weights = weights * np.isfinite(found.last_year).all(axis=-1)
        differences.append(found.last_year - found.median)
    x = np.nan_to_num(np.stack(differences, axis=-1))
    gram = np.einsum("rh,rhsc,rhsd->rhcd", weights, x, x)
    cross = np.einsum("rh,rhsc,rhs->rhc", weights, x, error)
    count = int(block.max()) + 1
    sums = []
    for parts in (gram, cross, weights):
        total = np.zeros((count, *parts.shape[1:]))
        np.add.at(total, block, parts)
        sums.append(total)
    return _Sums(gram=sums[0], cross=sums[1], evidence=sums[2])


def _fit(found: Hindcasts, weights: Floats) -> tuple[Floats, Floats]:
    """Shares with last year's date (H, 2) and without (H), from all hindcasts."""
    block = np.zeros(len(found), np.int64)
    with_year = _solve(_sums(found, weights, block, years=True), _PRIOR_SHARES)
    alone = _solve(_sums(found, weights, block, years=False), (_PRIOR_SHARE_ALONE,))
    return with_year[0], alone[0, :, 0]


def _cross_fitted(found: Hindcasts, weights: Floats) -> Floats:
    """Blended medians (R, H, S), each with shares fitted without its own block and those around."""
    block = found.age // BLOCK_DAYS
    numbers, block = np.unique(block, return_inverse=True)
    near = np.abs(numbers[:, None] - numbers) * BLOCK_DAYS <= _HELD_OUT_DAYS
    fitted = []
    for years, prior in ((True, _PRIOR_SHARES), (False, (_PRIOR_SHARE_ALONE,))):
        sums = _sums(found, weights, block, years=years)
        apart = (~near).astype(np.float64)
        left = _Sums(
            gram=np.einsum("ab,b...->a...", apart, sums.gram),
            cross=np.einsum("ab,b...->a...", apart, sums.cross),
            evidence=apart @ sums.evidence,
        )
        fitted.append(_solve(left, prior)[block])
    return _blend(found.median, found.persistence, found.last_year, fitted[0], fitted[1][..., 0])


def _solve(sums: _Sums, prior: tuple[float, ...]) -> Floats:
    """Shares (B, H, C): not negative, with a sum of at most 1, shrunk towards a prior.

    The penalty has the weight of `_PRIOR` blocks in which the prior's shares were the best; its
    scale is the mean squared difference of each forecast to the median.
    """
    kernel = _alike(sums.gram.shape[1])
    gram = np.einsum("hg,bg...->bh...", kernel, sums.gram)
    cross = np.einsum("hg,bg...->bh...", kernel, sums.cross)
    evidence = np.einsum("hg,bg->bh", kernel, sums.evidence)
    shares = np.broadcast_to(np.asarray(prior), cross.shape).copy()
    for index in np.ndindex(*evidence.shape):
        if evidence[index] > 0:
            ridge = np.diagonal(gram[index]) * _PRIOR / evidence[index]
            shares[index] = bounded_least_squares(
                gram[index] + np.diag(ridge), cross[index] + ridge * np.asarray(prior)
            )
    return shares


def bounded_least_squares(gram: Floats, cross: Floats) -> Floats:
    """The minimum of t'Gt - 2c't over t >= 0 with sum(t) <= 1, for one or two shares.

    The minimum is the best of the candidates on the faces of the triangle of allowed t.

    Args:
        gram: G (C, C), positive semidefinite.
        cross: c (C).
    """
    tiny = 1e-12
    if len(cross) == 1:
        return np.asarray(np.clip(cross / (gram[0] + tiny), 0.0, 1.0))
    (a, b), (_, d) = gram
    candidates = [
        np.array([np.clip(cross[0] / (a + tiny), 0.0, 1.0), 0.0]),
        np.array([0.0, np.clip(cross[1] / (d + tiny), 0.0, 1.0)]),
    ]
    # On the edge where both sum to 1.
    along = np.clip((cross[0] - cross[1] + d - b) / (a + d - 2 * b + tiny), 0.0, 1.0)
    candidates.append(np.array([along, 1.0 - along]))
    determinant = a * d - b * b
    if determinant > tiny * max(a * d, tiny):
        inside = np.array([d * cross[0] - b * cross[1], a * cross[1] - b * cross[0]]) / determinant
        if (inside >= 0).all() and inside.sum() <= 1:
            candidates.append(inside)
    return min(candidates, key=lambda t: float(t @ gram @ t - 2 * cross @ t))


class _WeightedErrors:
    """Errors of hindcasts under different weights."""

    def __init__(
        self, found: Hindcasts, median: Floats, inside: Bools, inside_model: Bools
    ) -> None:
        target = found.target
        self._squared = {
            "forecast": np.square(median - target),
            "model": np.square(found.median - target),
            "persistence": np.square(found.persistence[:, None] - target),
            "last_year": np.square(found.last_year - target),
        }
        self._inside, self._inside_model = inside, inside_model
        self._years = np.isfinite(found.last_year).all(axis=-1)

    def of(self, weights: Floats) -> Errors:
        """The errors under weights (R, H), some of which are above 0."""
        years = weights * self._years
        return Errors(
            n=int((weights > 0).sum()),
            rmse={name: self._rmse(name, weights) for name in ("forecast", "model", "persistence")},
            coverage=_mean(self._inside, weights),
            coverage_model=_mean(self._inside_model, weights),
            n_last_year=int((years > 0).sum()),
            rmse_where_last_year=(
                {name: self._rmse(name, years) for name in self._squared} if years.any() else {}
            ),
        )

    def _rmse(self, name: str, weights: Floats) -> float:
        there = weights > 0
        squared = self._squared[name][there]
        return float(np.sqrt(np.average(squared, axis=0, weights=weights[there])).mean())


def _mean(values: NDArray[Any], weights: Floats) -> float:
    there = weights > 0
    return float(np.average(values[there].mean(axis=-1), weights=weights[there]))

"""Backtests of forecasts: hindcasts of the same series, and the correction fitted to them.

    series of a sample ──▶ forecasts from at most 24 earlier dates ──▶ Hindcasts ──▶ Backtested

A raster is sampled at 48 pixels; points, fields and series are sampled from those of the request.
The result depends on the input only, so a restarted job corrects its windows in the same way.

Shapes: N series, T dates, C bands, S spectral indices, H steps of the forecast, Q quantiles.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.card import ModelCard, TimeWindow
from service.errors import StackWarning
from service.infer.model import LoadedModel
from service.infer.plots import spectral_index
from service.learn.backtest import BLOCK_DAYS, Backtest, Correction, Errors, Hindcasts, backtest
from service.run.executors import check
from service.write.predictions import JSON

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
SAMPLED = 48
"""Largest number of pixels, points, fields or series in a backtest. With 150 the results on four
stacks were the same (docs/decisions/backtests.md)."""
_ORIGINS = 24
"""Largest number of start dates of the hindcasts, spread evenly over the possible ones."""
_FEWEST = 4
"""Smallest number of start dates of a backtest."""
_BY_DEFAULT = 6, 150
"""Smallest number of start dates, and of days from the first of them to the last date, for a
backtest by default."""
_YEAR_DAYS = 365
_WORSE = 1.02
"""Ratio of RMSE above which the warning `forecast_worse` is given."""


@dataclass(frozen=True, kw_only=True)
class Backtested:
    """The backtest of a run."""

    card: ModelCard
    correction: Correction
    record: dict[str, JSON]
    """The backtest as JSON values, for responses and items."""
    warnings: tuple[StackWarning, ...]

    def corrected(
        self, quantiles: Floats, values: Floats, valid: Bools, dates: Sequence[date], used: int
    ) -> Floats:
        """Correct a model's quantiles.

        Args:
            quantiles: (N, H, S, Q), NaN where there is no prediction.
            values: reflectance (N, T, C), bands in the card's order.
            valid: True where usable (N, T).
            dates: ascending (T), the last `used` of them those of the model's time window.
            used: number of dates that the model has seen.
        """
        indices = _indices(self.card, values, valid)
        days = _ordinals(dates)
        persistence = _latest(indices[:, len(dates) - used :])
        last_year = _year_before(self.card, indices, days, int(days[-1]))
        return np.asarray(self.correction.apply(quantiles, persistence, last_year), np.float32)


def can_backtest(card: ModelCard, dates: Sequence[date], *, requested: bool | None) -> bool:
    """Whether a series with these dates is backtested.

    Args:
        card: the model's card.
        dates: ascending dates up to the last one used.
        requested: whether the request has `backtest`; None decides by the length of the history.
    """
    if card.task != "forecast" or requested is False or not dates:
        return False
    origins = _origins(card, _ordinals(dates))
    if requested:
        return len(origins) >= _FEWEST
    fewest, days = _BY_DEFAULT
    return len(origins) >= fewest and (dates[-1] - dates[origins[0]]).days >= days


def no_backtest(card: ModelCard) -> StackWarning:
    """The warning that the history is too short for the requested backtest."""
    step = _window(card).step_days
    return StackWarning(
        code="no_backtest",
        detail=f"the history is too short for a backtest, so nothing was calibrated: it needs "
        f"{_FEWEST} dates, at least {step} days apart and before the last, that each have "
        f"{card.min_observations} clear dates before them; add earlier dates",
    )


def dates_for_correction(dates: Sequence[date], used: Sequence[int]) -> tuple[int, ...]:
    """Positions of the dates that a corrected forecast needs: those used, and the year before.

    Args:
        dates: of the stack, ascending.
        used: positions of those in the model's time window.
    """
    last = dates[used[-1]]
    return tuple(
        t
        for t, day in enumerate(dates)
        if t >= used[0] or 0 <= (last - day).days <= _YEAR_DAYS
        if day <= last
    )


def sample_pixels(height: int, width: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows and columns of the pixels of a raster that are backtested.

    Four pixels at each of twelve positions, so that few blocks of a large raster are decoded; on a
    small raster they are an even grid.
    """
    across, down, apart = 4, 3, 32
    offsets_y, offsets_x = min(height / down / 4, apart / 2), min(width / across / 4, apart / 2)
    ys = (np.arange(down) + 0.5) * height / down
    xs = (np.arange(across) + 0.5) * width / across
    rows = np.floor(ys[:, None] + offsets_y * np.array([-1, 1])).astype(np.intp)
    columns = np.floor(xs[:, None] + offsets_x * np.array([-1, 1])).astype(np.intp)
    # By position, so that the pixels of one position are read together.
    row, column = np.broadcast_arrays(rows[:, None, :, None], columns[None, :, None, :])
    pixels = np.unique(np.stack([row.ravel(), column.ravel()]), axis=1)
    return pixels[0].clip(0, height - 1), pixels[1].clip(0, width - 1)


def sample_of(positions: NDArray[np.intp]) -> NDArray[np.intp]:
    """At most `SAMPLED` of the positions (n), spread evenly."""
    count = min(len(positions), SAMPLED)
    return positions[np.linspace(0, len(positions) - 1, count).round().astype(np.intp)]


@dataclass(frozen=True, kw_only=True)
class History:
    """Series with common dates."""

    dates: tuple[date, ...]
    """Ascending (T); the forecast starts at the last one."""
    values: Floats
    """Reflectance (N, T, C), bands in the card's order; any value where not valid."""
    valid: Bools
    """True where usable (N, T)."""
    elsewhere: Bools | bool = False
    """Whether the series are known to be far from the model's training data, all or each (N)."""

    def far(self) -> Bools:
        """`elsewhere` of each series (N)."""
        return np.broadcast_to(np.asarray(self.elsewhere, np.bool_), len(self.values))


def predict_from_history(
    model: LoadedModel,
    history: History,
    *,
    used: int,
    days: Floats,
    day_of_year: int,
    backtested: bool,
    cancelled: threading.Event | None = None,
) -> tuple[Floats, Backtested | None]:
    """Predict for series, corrected by a backtest on some of them.

    Args:
        model: the model.
        history: the series.
        used: number of dates in the model's time window: the last ones of the history.
        days: days of these dates (used) since the window's first day.
        day_of_year: day of the year of the window's first day.
        backtested: whether to backtest.
        cancelled: an event that cancels the run when it is set.

    Returns:
        Predictions (N, …), NaN for a series with too few clear dates; and the backtest, None if
        there is none.

    Raises:
        Cancelled: `cancelled` was set.
    """
    values, valid = history.values, history.valid
    predictions = np.full((len(values), *model.width), np.nan, np.float32)
    enough = np.flatnonzero(valid[:, -used:].sum(axis=1) >= model.card.min_observations)
    for start in range(0, len(enough), model.chunk):
        check(cancelled)
        some = enough[start : start + model.chunk]
        predictions[some] = model.pixels(
            values[some, -used:],
            valid[some, -used:],
            days,
            day_of_year,
            elsewhere=history.far()[some],
        )
    if not backtested:
        return predictions, None
    chosen = sample_of(enough)
    sample = History(
        dates=history.dates,
        values=values[chosen],
        valid=valid[chosen],
        elsewhere=history.far()[chosen],
    )
    found = run_backtest(model, [sample], cancelled=cancelled)
    if found is None:
        return predictions, None
    for start in range(0, len(enough), model.chunk):
        check(cancelled)
        some = enough[start : start + model.chunk]
        predictions[some] = found.corrected(
            predictions[some], values[some], valid[some], history.dates, used
        )
    return predictions, found


def run_backtest(
    model: LoadedModel,
    histories: Iterable[History],
    *,
    cancelled: threading.Event | None = None,
) -> Backtested | None:
    """Forecast from earlier dates, and fit a correction to the errors.

    Args:
        model: a forecast model.
        histories: the series, at most some dozens in all.
        cancelled: an event that cancels the run when it is set.

    Returns:
        The backtest; None if no hindcast has a known target.

    Raises:
        Cancelled: `cancelled` was set.
    """
    parts: list[Hindcasts] = []
    origins: set[date] = set()
    pixels = 0
    for history in _together(histories):
        found, days = _hindcasts(model, history, cancelled)
        if found is None:
            continue
        parts.append(found)
        origins |= days
        pixels += len(history.values)
    if not parts:
        return None
    together = Hindcasts(
        **{name: np.concatenate([getattr(p, name) for p in parts]) for name in vars(parts[0])}
    )
    if not together.known.any():
        return None
    # All series together are one piece of evidence, because what moves one moves its neighbours.
    weight = together.weight / pixels
    together = Hindcasts(**{**vars(together), "weight": weight})
    result = backtest(together)
    record = _record(model.card, result, pixels=pixels, forecasts=len(together), origins=origins)
    return Backtested(
        card=model.card,
        correction=result.correction,
        record=record,
        warnings=_worse(result.overall),
    )


def _together(histories: Iterable[History]) -> list[History]:
    """Histories with the same dates joined into one, which the model predicts in one call."""
    by_dates: dict[tuple[date, ...], list[History]] = defaultdict(list)
    for history in histories:
        by_dates[history.dates].append(history)
    return [
        History(
            dates=dates,
            values=np.concatenate([one.values for one in alike]),
            valid=np.concatenate([one.valid for one in alike]),
            elsewhere=np.concatenate([one.far() for one in alike]),
        )
        for dates, alike in by_dates.items()
    ]


def _hindcasts(
    model: LoadedModel, history: History, cancelled: threading.Event | None
) -> tuple[Hindcasts | None, set[date]]:
    """Forecasts of series from their earlier dates, and the start dates."""
    card, days = model.card, _ordinals(history.dates)
    indices = _indices(card, history.values, history.valid)
    # A date on which an index cannot be computed is missing for the graph, too.
    valid = history.valid & np.isfinite(indices).all(axis=-1)
    origins = _origins(card, days)
    gaps = np.diff([*days[origins], days[-1]])
    rows: list[dict[str, NDArray[Any]]] = []
    for origin, gap in zip(origins, gaps.tolist(), strict=True):
        check(cancelled)
        dates = history.dates[: origin + 1]
        window = _window(card).resolve(dates)
        used = list(window.used)
        enough = valid[:, used].sum(axis=1) >= card.min_observations
        if not enough.any():
            continue
        quantiles = model.pixels(
            history.values[enough][:, used],
            valid[enough][:, used],
            np.asarray(window.days(dates), np.float32),
            window.first_day.timetuple().tm_yday,
            elsewhere=history.far()[enough],
        )
        before, own = indices[enough][:, : origin + 1], indices[enough]
        count = int(enough.sum())
        rows.append(
            {
                "quantiles": quantiles,
                "target": _after(card, own, days, int(days[origin])),
                "persistence": _latest(before[:, used]),
                "last_year": _year_before(card, before, days[: origin + 1], int(days[origin])),
                "age": np.full(count, days[-1] - days[origin]),
                "month": np.full(count, dates[-1].month),
                "weight": np.full(count, min(gap, BLOCK_DAYS) / BLOCK_DAYS),
            }
        )
    if not rows:
        return None, set()
    joined = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    return Hindcasts(**joined), {history.dates[origin] for origin in origins}


def _origins(card: ModelCard, days: NDArray[np.int64]) -> list[int]:
    """Positions of the start dates: at least a step apart, at most `_ORIGINS`."""
    window = _window(card)
    length = (window.steps - 1) * window.step_days
    behind = np.arange(1, len(days) + 1) - np.searchsorted(days, days - length)
    found: list[int] = []
    next_day = int(days[-1])
    for t in range(len(days) - 2, -1, -1):
        if next_day - days[t] >= window.step_days and behind[t] >= card.min_observations:
            found.append(t)
            next_day = int(days[t])
    found.reverse()
    if len(found) > _ORIGINS:
        found = [found[n] for n in np.linspace(0, len(found) - 1, _ORIGINS).round().astype(int)]
    return found


def _window(card: ModelCard) -> TimeWindow:
    if card.window is None:
        raise TypeError(f"'{card.id}' does not take time series")
    return card.window


def _ordinals(dates: Sequence[date]) -> NDArray[np.int64]:
    return np.array([day.toordinal() for day in dates], np.int64)


def _indices(card: ModelCard, values: Floats, valid: Bools) -> Floats:
    """The model's spectral indices (N, T, S), NaN in all of them where one is missing."""
    bands = {band: values[..., c] for c, band in enumerate(card.bands)}
    found = np.stack([spectral_index(name, bands) for name in card.indices], axis=-1)
    found[~(valid & np.isfinite(found).all(axis=-1))] = np.nan
    return np.asarray(found, np.float32)


def _latest(indices: Floats) -> Floats:
    """The last known indices (N, S) of series (N, T, S), NaN where none is known."""
    found = np.full((len(indices), indices.shape[2]), np.nan, np.float32)
    for t in range(indices.shape[1]):
        np.copyto(found, indices[:, t], where=np.isfinite(indices[:, t]))
    return found


def _nearest(indices: Floats, days: NDArray[np.int64], day: int, within: float) -> Floats:
    """The known indices (N, S) nearest to a day, NaN where none is within some days."""
    found = np.full((len(indices), indices.shape[2]), np.nan, np.float32)
    gaps = np.abs(days - day)
    near = np.flatnonzero(gaps <= within)
    for t in near[np.argsort(gaps[near], kind="stable")[::-1]]:  # the nearest last
        np.copyto(found, indices[:, t], where=np.isfinite(indices[:, t]))
    return found


def _after(card: ModelCard, indices: Floats, days: NDArray[np.int64], origin: int) -> Floats:
    """Observed values (N, H, S): the clear date nearest to each step, within half a step."""
    step, later = _window(card).step_days, days > origin
    return np.stack(
        [
            _nearest(indices[:, later], days[later], origin + step * h, step / 2)
            for h in range(1, (card.horizon or 0) + 1)
        ],
        axis=1,
    )


def _year_before(card: ModelCard, indices: Floats, days: NDArray[np.int64], origin: int) -> Floats:
    """The clear date (N, H, S) nearest to a year before each step, within a step."""
    step = _window(card).step_days
    return np.stack(
        [
            _nearest(indices, days, origin + step * h - _YEAR_DAYS, step)
            for h in range(1, (card.horizon or 0) + 1)
        ],
        axis=1,
    )


def _worse(errors: Errors) -> tuple[StackWarning, ...]:
    """The warning that a simple forecast was better on the same past; none if it was not."""
    better = []
    if errors.rmse["forecast"] > _WORSE * errors.rmse["persistence"]:
        better.append(
            f"the last value (persistence) had an RMSE of {errors.rmse['persistence']:.3f}, the "
            f"forecast {errors.rmse['forecast']:.3f}"
        )
    years = errors.rmse_where_last_year
    if years and years["forecast"] > _WORSE * years["last_year"]:
        better.append(
            f"the same date of the year before had an RMSE of {years['last_year']:.3f}, the "
            f"forecast {years['forecast']:.3f} on the same targets"
        )
    if not better:
        return ()
    detail = (
        f"in the backtest on earlier dates of this input, {'; and '.join(better)}: compare the "
        "forecast with these values before you rely on it"
    )
    return (StackWarning(code="forecast_worse", detail=detail),)


def _record(
    card: ModelCard, found: Backtest, *, pixels: int, forecasts: int, origins: set[date]
) -> dict[str, JSON]:
    correction = found.correction
    steps: list[JSON] = []
    for h, errors in enumerate(found.steps):
        shares = correction.shares[h]
        steps.append(
            {
                "step": h + 1,
                "factor": _number(correction.factor[h]),
                "share_of_persistence": _number(shares[0]),
                "share_of_last_year": _number(shares[1]),
                "share_of_persistence_alone": _number(correction.share_alone[h]),
                **({} if errors is None else _errors(errors)),
            }
        )
    changed = bool((correction.factor != 1).any())
    return {
        "calibrated": changed,
        "method": "conformalised quantile regression, scaled and weighted by season",
        "pixels": pixels,
        "forecasts": forecasts,
        "first": min(origins).isoformat(),
        "last": max(origins).isoformat(),
        "level": round(card.quantiles[-1] - card.quantiles[0], 6),
        **_errors(found.overall),
        "steps": steps,
        "months": [
            {"month": month, **_errors(errors)} for month, errors in sorted(found.months.items())
        ],
    }


def _errors(errors: Errors) -> dict[str, JSON]:
    years = errors.rmse_where_last_year
    return {
        "pixel_dates": errors.n,
        "rmse": {
            **{name: _number(value) for name, value in errors.rmse.items()},
            "last_year": _number(years["last_year"]) if years else None,
        },
        "where_last_year": {
            "pixel_dates": errors.n_last_year,
            "rmse": {name: _number(value) for name, value in years.items()},
        }
        if years
        else None,
        "coverage": _number(errors.coverage),
        "coverage_of_model": _number(errors.coverage_model),
    }


def _number(value: float) -> float:
    return round(float(value), 4)

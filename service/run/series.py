"""Series runs: predictions for pixels given as JSON, as series of dates and reflectance.

    series → checked, sorted, merged → a time window each → batches over all days → results

Every series has its own time window, and so its own day 0. The series of a batch share one T axis:
the axis contains every day that occurs in the batch, and `valid` is True on the days of a series.

Shapes: N series, T dates, C bands; predictions have K classes, or H steps x S spectral indices x Q
quantiles, or D numbers of an embedding.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date

import numpy as np
from numpy.typing import NDArray

from models.card import ModelCard, ResolvedTimeWindow
from service.errors import (
    ImplausibleReflectance,
    InvalidRequest,
    MissingBands,
    StackWarning,
    TooFewDates,
)
from service.infer.attribution import date_attribution
from service.infer.model import LoadedModel
from service.read.radiometry import PLAUSIBLE
from service.run.backtest import (
    Backtested,
    History,
    can_backtest,
    no_backtest,
    run_backtest,
    sample_of,
)
from service.run.executors import Timing, check, unless_cancelled
from service.run.extent import kilometres_away, outside_training
from service.run.request import SeriesInput
from service.run.time_window import outside_time_window, partial_season, resolve_time_window
from service.tracing import span
from service.write.predictions import (
    ATTRIBUTION,
    JSON,
    Predictions,
    dated,
    predictions_of,
    quantile_name,
)

Floats = NDArray[np.float32]
SERIES_BATCH_BYTES = 64 * 2**20
"""Memory of the input of the series that are inferred at once, bytes."""
_NAMED_AT_MOST = 5


@dataclass(frozen=True, kw_only=True)
class SeriesOutcome:
    """Result of a series run."""

    results: tuple[dict[str, JSON], ...]
    """One result per series, in order: `id`, `status` (ok or no_data), `start`, and the prediction
    if the status is ok."""
    timing: Timing
    warnings: tuple[StackWarning, ...]
    backtested: Backtested | None = None


@dataclass(frozen=True, kw_only=True)
class _Series:
    """A series in the form of the model's input."""

    id: str
    time_window: ResolvedTimeWindow | None
    """The time window; None if too few dates lie in it."""
    dates: tuple[date, ...]
    """The dates in the time window (T)."""
    days: NDArray[np.int64]
    """Days since the time window's first day (T), ascending, of the used dates."""
    values: Floats
    """Reflectance (T, C), unitless, 0 to 1; NaN in all bands of a date on which one is missing."""
    history: History | None = None
    """The series up to the last date used, those before the time window included."""
    away: float | None = None
    """Distance of its place from the model's training data, km; None if it is small or unknown."""


@dataclass(frozen=True, kw_only=True)
class SeriesRun:
    """Series checked against their model."""

    model: LoadedModel
    series: tuple[_Series, ...]
    interpretations: tuple[Predictions | None, ...]
    """The interpretation of each series' prediction; None for a series without a time window."""
    warnings: tuple[StackWarning, ...]
    seconds: float
    """Time spent on preparing the series."""
    attribution: bool = False
    """Whether the attribution of each date to a class is requested."""
    backtest: bool = False
    """Whether forecasts are backtested."""


def plan_series(
    model: LoadedModel,
    series: Sequence[SeriesInput],
    *,
    start: date | None = None,
    horizon: int | None = None,
    attribution: bool = False,
    backtest: bool = False,
    cancelled: threading.Event | None = None,
) -> SeriesRun:
    """Check that each series fits the model.

    Args:
        model: a pixel model.
        series: at least one series.
        start: first day of every series' time window; None applies the card's rule to each.
        horizon: number of steps of a forecast; None takes the card's maximum.
        attribution: whether the attribution of each date to a class is requested.
        backtest: whether forecasts are backtested on the earlier dates of the series.
        cancelled: an event that ends the check when it is set.

    Raises:
        Cancelled: `cancelled` was set.
        InvalidRequest: a band has more or fewer values than dates, `series` is empty, or the model
            does not have the horizon.
        MissingBands: a band that the model needs is missing.
        MissingDates: a series has no dates.
        ImplausibleReflectance: the median of a series is outside -0.2 to 1.6.
        TooFewDates: no series has enough dates in its time window.
    """
    began = time.perf_counter()
    if not series:
        raise InvalidRequest.of("series", "at least one series is required")
    warned: list[tuple[str, StackWarning]] = []
    prepared: list[_Series] = []
    too_short: list[TooFewDates] = []
    for one in series:
        check(cancelled)
        try:
            prepared.append(_prepare(model.card, one, start, warned))
        except TooFewDates as error:
            too_short.append(error)
            prepared.append(_without_time_window(one))
    if len(too_short) == len(series):
        raise too_short[0]
    possible = backtest and any(
        can_backtest(model.card, one.history.dates, requested=True)
        for one in prepared
        if one.history
    )
    return SeriesRun(
        model=model,
        series=tuple(prepared),
        interpretations=tuple(
            _interpretation(model.card, one, horizon)
            for one in unless_cancelled(prepared, cancelled)
        ),
        warnings=(
            *_gathered(warned),
            *_outside_training(model.card, prepared),
            *((no_backtest(model.card),) if backtest and not possible else ()),
        ),
        backtest=possible,
        seconds=time.perf_counter() - began,
        attribution=attribution,
    )


@span("infer")
def run_series(run: SeriesRun, *, cancelled: threading.Event | None = None) -> SeriesOutcome:
    """Predict for each series.

    Args:
        run: the checked series.
        cancelled: an event that cancels the run when it is set.

    Raises:
        Cancelled: `cancelled` was set.
    """
    began = time.perf_counter()
    predictions = predict_series(run, cancelled)
    backtested = _backtest(run, predictions, cancelled) if run.backtest else None
    missing = () if any(p is not None for p in predictions) else (_all_missing(run.model.card),)
    results = tuple(
        map(_result, unless_cancelled(run.series, cancelled), run.interpretations, predictions)
    )
    if run.attribution:
        for series, result, prediction in zip(run.series, results, predictions, strict=True):
            if prediction is not None:
                result[ATTRIBUTION] = _attribution(run.model, series, prediction, cancelled)
    return SeriesOutcome(
        results=results,
        timing=Timing(read=run.seconds, infer=time.perf_counter() - began),
        warnings=(*run.warnings, *(backtested.warnings if backtested else ()), *missing),
        backtested=backtested,
    )


def _backtest(
    run: SeriesRun, predictions: list[Floats | None], cancelled: threading.Event | None
) -> Backtested | None:
    """Backtest some of the series, and correct the predictions in place."""
    there = [
        (n, one.history, prediction)
        for n, (one, prediction) in enumerate(zip(run.series, predictions, strict=True))
        if one.history is not None and prediction is not None
    ]
    chosen = sample_of(np.arange(len(there)))
    found = run_backtest(run.model, [there[n][1] for n in chosen], cancelled=cancelled)
    if found is not None:
        for n, history, prediction in unless_cancelled(there, cancelled):
            predictions[n] = found.corrected(
                prediction[None],
                history.values,
                history.valid,
                history.dates,
                len(run.series[n].days),
            )[0]
    return found


def _all_missing(card: ModelCard) -> StackWarning:
    return StackWarning(
        code="all_missing",
        detail=f"no series has a prediction: each has fewer than the {card.min_observations} "
        f"observations that '{card.id}' needs in its time window",
    )


def _prepare(
    card: ModelCard,
    series: SeriesInput,
    start: date | None,
    warned: list[tuple[str, StackWarning]],
) -> _Series:
    values = _values(card, series)
    _check_plausible(series.id, values)
    dates, values = _merge(series.dates, values)
    if len(dates) < len(series.dates):
        detail = (
            f"{len(series.dates)} observations on {len(dates)} dates; of several observations of "
            "one date the first clear one is used"
        )
        warned.append((series.id, StackWarning(code="merged_dates", detail=detail)))
    time_window = resolve_time_window(card, dates, start, what=f"series '{series.id}'")
    if time_window is None:
        raise TypeError(f"'{card.id}' does not take series")
    warned += [(series.id, w) for w in outside_time_window(card, dates, time_window)]
    warned += [(series.id, w) for w in partial_season(card, dates, time_window)]
    away = kilometres_away(card, series.lonlat)
    return _Series(
        id=series.id,
        time_window=time_window,
        dates=tuple(dates[t] for t in time_window.used),
        days=np.asarray(time_window.days(dates), np.int64),
        values=values[list(time_window.used)],
        history=_history(card, dates, values, time_window, elsewhere=away is not None),
        away=away,
    )


def _history(
    card: ModelCard,
    dates: Sequence[date],
    values: Floats,
    time_window: ResolvedTimeWindow,
    *,
    elsewhere: bool,
) -> History | None:
    if card.task != "forecast" or not time_window.used:
        return None
    end = time_window.used[-1] + 1
    valid = ~np.isnan(values[:end, 0])
    return History(
        dates=tuple(dates[:end]),
        values=values[None, :end],
        valid=valid[None],
        elsewhere=elsewhere,
    )


def _without_time_window(series: SeriesInput) -> _Series:
    return _Series(
        id=series.id,
        time_window=None,
        dates=(),
        days=np.empty(0, np.int64),
        values=np.empty((0, 0), np.float32),
    )


def _values(card: ModelCard, series: SeriesInput) -> Floats:
    """Reflectance (T, C), NaN in all bands of a date on which one is missing."""
    lacking = [band for band in card.bands if band not in series.bands]
    if lacking:
        present = ", ".join(series.bands) or "none"
        raise MissingBands(
            f"series '{series.id}' lacks {', '.join(lacking)}, which '{card.id}' needs (bands of "
            f"the series: {present}): add the missing bands, or choose another model"
        )
    for band in card.bands:
        if len(series.bands[band]) != len(series.dates):
            raise InvalidRequest.of(
                "series",
                f"'{series.id}' has {len(series.dates)} dates but {len(series.bands[band])} "
                f"values of {band}: give one value per date, null if it is missing",
            )
    # float64 first: NumPy turns None into NaN, and the cast to float32 makes values beyond its
    # range infinite.
    columns = [np.array(series.bands[band], np.float64) for band in card.bands]
    with np.errstate(over="ignore"):
        values = np.stack(columns, axis=1).astype(np.float32)
    values[~np.isfinite(values).all(axis=1)] = np.nan
    return values


def _check_plausible(name: str, values: Floats) -> None:
    clear = values[~np.isnan(values)]
    low, high = PLAUSIBLE
    if len(clear) and not low <= (median := float(np.median(clear))) <= high:
        raise ImplausibleReflectance(
            f"series '{name}' has a median of {median:.4g}, outside {low} to {high}: values must "
            "be reflectance, 0 to 1"
        )


def _merge(dates: Sequence[date], values: Floats) -> tuple[list[date], Floats]:
    """Unique, ascending dates, each with its first clear observation, or its first if none is."""
    clear = np.asarray(~np.isnan(values).any(axis=1))
    chosen: dict[date, int] = {}
    for t, day in enumerate(dates):
        if day not in chosen or (clear[t] and not clear[chosen[day]]):
            chosen[day] = t
    unique = sorted(chosen)
    return unique, values[[chosen[day] for day in unique]]


def predict_series(run: SeriesRun, cancelled: threading.Event | None) -> list[Floats | None]:
    """The prediction for each series; None for a series with too few clear observations.

    Args:
        run: the checked series.
        cancelled: an event that cancels the run when it is set.

    Returns:
        Predictions (K,), (H, S, Q) or (D,), float32, in the order of the series.

    Raises:
        Cancelled: `cancelled` was set.
    """
    model, series = run.model, run.series
    least = model.card.min_observations
    enough = [
        n
        for n, one in enumerate(series)
        if one.time_window and int((~np.isnan(one.values[:, 0])).sum()) >= least
    ]
    predictions: list[Floats | None] = [None] * len(series)
    for part in _batches(model, series, enough):
        check(cancelled)
        batch = [series[n] for n in part]
        for n, prediction in zip(part, _infer_batch(model, batch), strict=True):
            predictions[n] = None if np.isnan(prediction).any() else prediction
    return predictions


def _batches(
    model: LoadedModel, series: Sequence[_Series], numbers: Sequence[int]
) -> Iterator[Sequence[int]]:
    """Numbers of series in parts, whose input fits into `SERIES_BATCH_BYTES` for all days.

    A part has at most `model.chunk` series, so that a cancelled run stops after it.
    """
    most_days = len(np.unique(np.concatenate([series[n].days for n in numbers]))) if numbers else 1
    fitting = SERIES_BATCH_BYTES // (most_days * (4 * len(model.card.bands) + 1))
    size = max(1, min(model.chunk, fitting))
    for at in range(0, len(numbers), size):
        yield numbers[at : at + size]


def _infer_batch(model: LoadedModel, batch: Sequence[_Series]) -> Floats:
    days = np.unique(np.concatenate([one.days for one in batch]))
    values = np.full((len(batch), len(days), len(model.card.bands)), np.nan, np.float32)
    for n, one in enumerate(batch):
        values[n, np.searchsorted(days, one.days)] = one.values
    first_days = [one.time_window.first_day for one in batch if one.time_window]
    return model.pixels(
        values,
        ~np.isnan(values[:, :, 0]),
        days.astype(np.float32),
        np.array([day.timetuple().tm_yday for day in first_days], np.float32),
        elsewhere=np.array([one.away is not None for one in batch]),
    )


def _attribution(
    model: LoadedModel,
    series: _Series,
    prediction: Floats,
    cancelled: threading.Event | None,
) -> JSON:
    """The attribution of each date of a series to its class, by ISO date."""
    if series.time_window is None:
        raise TypeError(f"series '{series.id}' has no time window, and so no prediction")
    found = date_attribution(
        model,
        series.values[None],
        ~np.isnan(series.values[None, :, 0]),
        series.days.astype(np.float32),
        series.time_window.first_day.timetuple().tm_yday,
        prediction[None],
        before_each=lambda: check(cancelled),
    )
    return dated(series.dates, found[0])


def _interpretation(card: ModelCard, series: _Series, horizon: int | None) -> Predictions | None:
    """The interpretation of a series' prediction; None for a series without a time window."""
    if series.time_window is None:
        return None
    outputs = tuple(quantile_name(q) for q in card.quantiles)
    return predictions_of(card, outputs, horizon=horizon, time_window=series.time_window)


def _result(
    series: _Series, interpretation: Predictions | None, prediction: Floats | None
) -> dict[str, JSON]:
    start = series.time_window.start.isoformat() if series.time_window else None
    head: dict[str, JSON] = {"id": series.id, "status": "no_data", "start": start}
    if interpretation is None or prediction is None:
        return head
    return {**head, "status": "ok", **interpretation.record(prediction)}


def _outside_training(card: ModelCard, series: Sequence[_Series]) -> tuple[StackWarning, ...]:
    """One warning for all series that are far from the training data; empty if none is."""
    far = [(one.away, one.id) for one in series if one.away is not None]
    if not far:
        return ()
    away, name = max(far)
    more = f", the farthest of {len(far)}, is" if len(far) > 1 else " is"
    return outside_training(card, away, f"series '{name}'{more}")


def _gathered(warned: Sequence[tuple[str, StackWarning]]) -> tuple[StackWarning, ...]:
    """One warning per code, which names the series that it concerns."""
    codes = dict.fromkeys(w.code for _, w in warned)
    return tuple(
        _one_warning(code, [(i, w) for i, w in warned if w.code == code]) for code in codes
    )


def _one_warning(code: str, warned: Sequence[tuple[str, StackWarning]]) -> StackWarning:
    shown = "; ".join(f"series '{i}': {w.detail}" for i, w in warned[:_NAMED_AT_MOST])
    more = len(warned) - _NAMED_AT_MOST
    return StackWarning(code=code, detail=shown + (f"; and {more} more" if more > 0 else ""))

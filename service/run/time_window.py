"""Time windows: a model's time window applied to the dates of a stack or series."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from itertools import pairwise

from models.card import ModelCard, ResolvedTimeWindow, shifted
from service.errors import MissingDates, StackWarning, TooFewDates


def resolve_time_window(
    card: ModelCard, dates: Sequence[date], start: date | None, *, what: str
) -> ResolvedTimeWindow | None:
    """Apply a model's time window to dates.

    Args:
        card: the model's card.
        dates: unique, ascending dates.
        start: first day of the time window; None applies the card's rule.
        what: the stack or series that has the dates, for messages.

    Returns:
        The time window with the dates inside it; None for a model of imagery.

    Raises:
        MissingDates: the model needs dates, and `dates` is empty.
        TooFewDates: fewer dates than the card's `min_observations` lie in the time window.
    """
    if card.window is None:
        return None
    if not dates:
        raise MissingDates(f"{what} has no dates, and '{card.id}' needs them: give `dates`")
    time_window = card.window.resolve(dates, start)
    if len(time_window.used) < card.min_observations:
        first, last = time_window_ends(card, time_window)
        raise TooFewDates(
            f"{what} has {len(time_window.used)} of its {len(dates)} dates in the time window from "
            f"{first} to {last}, and '{card.id}' needs at least {card.min_observations}: add "
            "dates, or give another `start`"
        )
    return time_window


def time_window_ends(card: ModelCard, time_window: ResolvedTimeWindow) -> tuple[date, date]:
    """The first and the last day of a time window.

    Raises:
        TypeError: the model takes imagery and has no time window.
    """
    if card.window is None:
        raise TypeError(f"'{card.id}' has no time window")
    length = card.window.steps * card.window.step_days
    if card.window.start == "last-steps":
        # This time window extends from the day of its first step to the day of its last step.
        first = max(time_window.start, time_window.first_day)
        return first, shifted(time_window.first_day, length - card.window.step_days)
    end = shifted(time_window.start, length - 1)
    # A time window of the rule `every-date` has no fixed length.
    return time_window.start, max(end, time_window.last or end)


def outside_time_window(
    card: ModelCard, dates: Sequence[date], time_window: ResolvedTimeWindow | None
) -> tuple[StackWarning, ...]:
    """The warning that dates are outside the time window; empty if all are inside."""
    if time_window is None or len(time_window.used) == len(dates):
        return ()
    first, last = time_window_ends(card, time_window)
    detail = (
        f"{len(dates) - len(time_window.used)} of {len(dates)} dates are outside the time window "
        f"from {first} to {last} and are not used: give `start` if another window is meant"
    )
    return (StackWarning(code="dates_outside_window", detail=detail),)


_WHOLE_YEAR = 365
_LONGEST_GAP = 180
"""Longest gap between dates, days; after a longer one the dates cover only a part of a season."""


def partial_season(
    card: ModelCard, dates: Sequence[date], time_window: ResolvedTimeWindow | None
) -> tuple[StackWarning, ...]:
    """The warning that the used dates cover only a part of the model's time window.

    Args:
        card: the model's card.
        dates: unique, ascending dates.
        time_window: the model's time window over the dates; None for a model of imagery.

    Returns:
        The warning; empty if no gap between used dates is longer than `_LONGEST_GAP` days.
    """
    if time_window is None or card.window is None or not time_window.used:
        return ()
    span = card.window.steps * card.window.step_days
    days = sorted(time_window.days(dates))
    if card.window.yearly:
        # All years are projected onto one year, so that a gap may include the turn of the year.
        in_year = sorted({day % _WHOLE_YEAR for day in days})
        gaps = [b - a for a, b in pairwise([*in_year, in_year[0] + _WHOLE_YEAR])]
        span = _WHOLE_YEAR
    else:
        gaps = [b - a for a, b in pairwise([0, *days, span])]
    if max(gaps) <= _LONGEST_GAP:
        return ()
    used = [dates[t] for t in time_window.used]
    detail = (
        f"the {len(used)} dates used, from {min(used)} to {max(used)}, leave {max(gaps)} of the "
        f"{span} days that '{card.id}' was trained on without an image: expect more errors, and "
        "add dates of the other seasons if there are any"
    )
    return (StackWarning(code="partial_season", detail=detail),)

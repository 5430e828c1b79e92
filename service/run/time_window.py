"""Time windows: a model's time window applied to the dates of a stack or series."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from itertools import pairwise

from models.card import ModelCard, ResolvedWindow, shifted
from service.errors import MissingDates, StackWarning, TooFewDates


def resolve_time_window(
    card: ModelCard, dates: Sequence[date], start: date | None, *, what: str
) -> ResolvedWindow | None:
    """Apply a model's time window to dates.

    Args:
        card: the model's card.
        dates: unique, ascending dates.
        start: first day of the window; None applies the card's rule.
        what: the stack or series of the dates, for messages.

    Returns:
        The window; None for a model of imagery.

    Raises:
        MissingDates: the model needs dates, and there are none.
        TooFewDates: the window holds fewer dates than the card's `min_observations`.
    """
    if card.window is None:
        return None
    if not dates:
        raise MissingDates(f"{what} has no dates, and '{card.id}' needs them")
    window = card.window.resolve(dates, start)
    if len(window.used) < card.min_observations:
        first, last = time_window_ends(card, window)
        raise TooFewDates(
            f"{what} has {len(window.used)} of its {len(dates)} dates in the window from {first} "
            f"to {last}, and '{card.id}' needs at least {card.min_observations}"
        )
    return window


def time_window_ends(card: ModelCard, window: ResolvedWindow) -> tuple[date, date]:
    """The first and the last day of a window."""
    if card.window is None:
        raise TypeError(f"'{card.id}' has no time window")
    length = card.window.steps * card.window.step_days
    if card.window.start == "last-steps":
        # The window ends on its last step and begins on its first.
        first = max(window.start, window.first_day)
        return first, shifted(window.first_day, length - card.window.step_days)
    end = shifted(window.start, length - 1)
    # One that takes every date has no length.
    return window.start, max(end, window.last or end)


def outside_time_window(
    card: ModelCard, dates: Sequence[date], window: ResolvedWindow | None
) -> tuple[StackWarning, ...]:
    """The warning that dates lie outside the time window; none if all lie inside."""
    if window is None or len(window.used) == len(dates):
        return ()
    first, last = time_window_ends(card, window)
    detail = (
        f"{len(dates) - len(window.used)} of {len(dates)} dates lie outside the window from "
        f"{first} to {last} and are not used"
    )
    return (StackWarning(code="dates_outside_window", detail=detail),)


_WHOLE_YEAR = 365
_LONGEST_GAP = 180
"""A gap of this many days or more means that the dates cover only a part of the model's span."""


def partial_season(
    card: ModelCard, dates: Sequence[date], window: ResolvedWindow | None
) -> tuple[StackWarning, ...]:
    """The warning that the dates used cover only a part of the model's span.

    Args:
        card: the model's card.
        dates: unique, ascending dates.
        window: the model's time window over them; None for a model of imagery.
    """
    if window is None or card.window is None or not window.used:
        return ()
    span = card.window.steps * card.window.step_days
    days = sorted(window.days(dates))
    if card.window.yearly:
        # All years are placed on one, so the days around the new year may be a gap as well.
        places = sorted({day % _WHOLE_YEAR for day in days})
        gaps = [b - a for a, b in pairwise([*places, places[0] + _WHOLE_YEAR])]
        span = _WHOLE_YEAR
    else:
        gaps = [b - a for a, b in pairwise([0, *days, span])]
    if max(gaps) <= _LONGEST_GAP:
        return ()
    used = [dates[t] for t in window.used]
    detail = (
        f"the {len(used)} dates used, from {min(used)} to {max(used)}, leave {max(gaps)} of the "
        f"{span} days that '{card.id}' was trained on without an image: expect more errors, and "
        "add dates of the other seasons if there are any"
    )
    return (StackWarning(code="partial_season", detail=detail),)

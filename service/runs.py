"""What a run is, and whether it can be: the request, the model and the stack held together.

model + stack + what was asked for → RasterRun, or an error before a pixel is read
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np

from models.card import ModelCard, ResolvedWindow, Task
from service.answers import JSON, Answers, answers_of
from service.engine import LoadedModel
from service.errors import MissingDates, TooFewDates
from service.patches import PatchGrid
from service.stack import Stack, StackWarning

_DEFAULT_OUTPUTS: Mapping[Task, tuple[str, ...]] = {
    "classify-pixels": ("class",),
    "forecast": ("q50",),
    "landcover": ("class",),
    "embed": (),
}


@dataclass(frozen=True, kw_only=True)
class RasterRun:
    """Everything that a run needs, whichever way it is asked for."""

    model: LoadedModel
    stack: Stack
    window: ResolvedWindow | None
    """The model's time window over the stack's dates; None for imagery."""
    outputs: tuple[str, ...] = ("class",)
    """Rasters of a classification, or quantiles of a forecast; an embedding has but one."""
    horizon: int | None = None
    """Steps ahead of a forecast; None takes the card's maximum."""
    stride: int = 64
    """Pixels between patches, 1 to the patch's side."""
    rasters: bool = True
    """Whether rasters are wanted; without, the summary alone is made."""

    @property
    def used(self) -> tuple[int, ...]:
        """Positions of the observations used, on the stack's T axis."""
        return self.window.used if self.window else tuple(range(self.stack.observations))

    @property
    def answers(self) -> Answers:
        """How the model's answers are read.

        Raises:
            InvalidRequest: an output or horizon that the model does not have.
        """
        return answers_of(self.model.card, self.outputs, horizon=self.horizon, window=self.window)

    @property
    def patches(self) -> PatchGrid:
        """Where a patch model's patches lie.

        Raises:
            InvalidRequest: a stride out of range, or a raster smaller than a patch.
        """
        return PatchGrid.over(self.stack.grid, side=self.model.card.patch or 0, stride=self.stride)

    @property
    def pixel_bytes(self) -> int:
        """What a pixel of a window takes: float32 values and a byte of validity a date."""
        return len(self.used) * (4 * len(self.stack.bands) + 1)

    @property
    def answer_bytes(self) -> int:
        """What an answer takes, as the model gives it and again as bands."""
        return 2 * 4 * int(np.prod(self.model.width))


def plan_raster(
    model: LoadedModel,
    stack: Stack,
    *,
    start: date | None = None,
    outputs: Sequence[str] | None = None,
    horizon: int | None = None,
    stride: int = 64,
    rasters: bool = True,
) -> RasterRun:
    """A run that is known to fit its model, before a pixel is read.

    Args:
        model: what answers.
        stack: its input.
        start: first day of the time window; None applies the card's rule.
        outputs: rasters or quantiles; None takes the class map or the median forecast.
        horizon: steps ahead of a forecast; None takes the card's maximum.
        stride: pixels between patches.
        rasters: whether rasters are wanted, or the summary alone.

    Raises:
        InvalidRequest: an output, horizon or stride that the model does not have, or a raster
            smaller than a patch.
        MissingDates: a pixel model, and a stack without dates.
        TooFewDates: fewer dates in the window than the model needs.
    """
    run = RasterRun(
        model=model,
        stack=stack,
        window=resolve_window(model.card, stack.dates, start, what="the stack"),
        outputs=_DEFAULT_OUTPUTS[model.card.task] if outputs is None else tuple(outputs),
        horizon=horizon,
        stride=stride,
        rasters=rasters,
    )
    check_run(run)
    return run


def check_run(run: RasterRun) -> None:
    """Refuse what the model cannot do.

    Raises:
        InvalidRequest: an output, horizon or stride that the model does not have, or a raster
            smaller than a patch.
        MissingDates: a pixel model, and no window.
        TooFewDates: fewer observations than the model needs.
    """
    card = run.model.card
    if card.modality == "pixel" and run.window is None:
        raise MissingDates(f"'{card.id}' takes a time series, and the stack has no dates")
    if len(run.used) < card.min_observations:
        raise TooFewDates(
            f"{len(run.used)} observations are used, and '{card.id}' needs at least "
            f"{card.min_observations}"
        )
    _ = run.answers
    if card.modality == "patch":
        _ = run.patches


def resolve_window(
    card: ModelCard, dates: Sequence[date], start: date | None, *, what: str
) -> ResolvedWindow | None:
    """Lay a model's time window over dates.

    Args:
        card: the model's.
        dates: unique and ascending.
        start: first day of the window; None applies the card's rule.
        what: whose dates these are, for messages.

    Returns:
        The window; None for a model of imagery.

    Raises:
        MissingDates: the model needs dates and there is none.
        TooFewDates: fewer dates in the window than the card's `min_observations`.
    """
    if card.window is None:
        return None
    if not dates:
        raise MissingDates(f"{what} has no dates, and '{card.id}' needs them")
    window = card.window.resolve(dates, start)
    if len(window.used) < card.min_observations:
        first, last = window_ends(card, window)
        raise TooFewDates(
            f"{what} has {len(window.used)} of its {len(dates)} dates in the window from {first} "
            f"to {last}, and '{card.id}' needs at least {card.min_observations}"
        )
    return window


def window_ends(card: ModelCard, window: ResolvedWindow) -> tuple[date, date]:
    """The first and the last day whose observations a window takes."""
    if card.window is None:
        raise TypeError(f"'{card.id}' has no time window")
    length = card.window.steps * card.window.step_days
    if card.window.start == "last-steps":
        # It ends on its last step, and takes nothing from before its first.
        first = max(window.start, window.first_day)
        return first, window.first_day + timedelta(days=length - card.window.step_days)
    end = window.start + timedelta(days=length - 1)
    # One that takes every date has no length.
    return window.start, max(end, window.last or end)


def outside_window(
    card: ModelCard, dates: Sequence[date], window: ResolvedWindow | None
) -> tuple[StackWarning, ...]:
    """The warning that dates are left out, where some are."""
    if window is None or len(window.used) == len(dates):
        return ()
    first, last = window_ends(card, window)
    detail = (
        f"{len(dates) - len(window.used)} of {len(dates)} dates lie outside the window from "
        f"{first} to {last} and are not used"
    )
    return (StackWarning(code="dates_outside_window", detail=detail),)


def said_of_dates(run: RasterRun) -> dict[str, JSON]:
    """The first day of the window and the dates used, as answers say them."""
    dates = [run.stack.dates[t] for t in run.used] if run.stack.dates else []
    return {
        "start": run.window.start.isoformat() if run.window else None,
        "dates_used": [day.isoformat() for day in dates],
    }

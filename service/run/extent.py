"""Places far from a model's training data: the card's `extent` against those of a request."""

from __future__ import annotations

from models.card import ModelCard
from service.errors import StackWarning
from service.grid import Grid, kilometres

NEAR_KM = 110.0
"""Distance from the training data up to which a place counts as beside it, km: the width of a
Sentinel-2 tile."""
_PART = 0.05
"""Share of a raster from which its part beyond that distance is warned of."""


def kilometres_away(card: ModelCard, place: Grid | tuple[float, float] | None) -> float | None:
    """Distance of a place from the model's training data, km.

    Args:
        card: the model's card.
        place: a grid, or longitude and latitude in degrees; None if unknown.

    Returns:
        None if the place is beside the training data, or if one of the two is unknown.
    """
    if place is None or not card.extent:
        return None
    if isinstance(place, Grid):
        away = place.kilometres_from(card.extent)
    else:
        away = float(kilometres(*place, card.extent)[0])
    return away if away is not None and away > NEAR_KM else None


def raster_outside_training(
    card: ModelCard, grid: Grid, away: float | None
) -> tuple[StackWarning, ...]:
    """The warning that a raster, or a part of it, is far from the model's training data.

    Args:
        card: the model's card.
        grid: the raster's grid.
        away: its distance, as `kilometres_away` returns it.
    """
    if away is not None or not card.extent:
        return outside_training(card, away, "the raster is")
    share = grid.share_beyond(card.extent, NEAR_KM)
    if share < _PART:
        return ()
    return _warning(card, f"about {share:.0%} of the raster is more than {NEAR_KM:.0f} km")


def outside_training(card: ModelCard, away: float | None, what: str) -> tuple[StackWarning, ...]:
    """The warning that a place is far from the model's training data; empty if it is not.

    Args:
        card: the model's card.
        away: the distance, as `kilometres_away` returns it.
        what: the place with its verb, for the message, such as `the raster is`.
    """
    if away is None:
        return ()
    rounded = round(away, -1 if away < 1000 else -2)
    return _warning(card, f"{what} about {rounded:,.0f} km")


def _warning(card: ModelCard, distance: str) -> tuple[StackWarning, ...]:
    scores = card.lowest_scores()
    detail = (
        f"{distance} from the nearest place that '{card.id}' was trained on"
        + (f"; {scores}" if scores else "")
        + f". {card.intended_use}"
    )
    return (StackWarning(code="outside_training", detail=detail.rstrip()),)

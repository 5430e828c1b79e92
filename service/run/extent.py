"""Places far from a model's training data: the card's `extent` against those of a request."""

from __future__ import annotations

from models.card import ModelCard
from service.errors import StackWarning
from service.grid import Grid, kilometres

NEAR_KM = 110.0
"""Distance from the training data up to which a place counts as beside it, km: the width of a
Sentinel-2 tile."""


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
        away = kilometres(*place, card.extent)
    return away if away is not None and away > NEAR_KM else None


def outside_training(card: ModelCard, away: float | None, what: str) -> tuple[StackWarning, ...]:
    """The warning that a place is far from the model's training data; empty if it is not.

    Args:
        card: the model's card.
        away: the distance, as `kilometres_away` returns it.
        what: the place with its verb, for the message, such as `the raster is`.
    """
    if away is None:
        return ()
    scores = card.lowest_scores()
    rounded = round(away, -1 if away < 1000 else -2)
    detail = (
        f"{what} about {rounded:,.0f} km from the nearest place that '{card.id}' was trained on"
        + (f"; {scores}" if scores else "")
        + f". {card.intended_use}"
    )
    return (StackWarning(code="outside_training", detail=detail.rstrip()),)

"""Recurrence plots, with parameters named as in pyts.

Eckmann, Kamphorst and Ruelle 1987, doi:10.1209/0295-5075/4/9/004. The parameters and their
meaning are those of `pyts.image.RecurrencePlot`; the tests compare with it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Threshold = float | Literal["point", "distance"] | None


def recurrence_plot(
    x: Tensor,
    *,
    dimension: int = 1,
    time_delay: int = 1,
    threshold: Threshold = None,
    percentage: float = 10.0,
) -> Tensor:
    """Pairwise distances between the states of a series, thresholded or not.

    Args:
        x: series (..., M).
        dimension: length of a state: `dimension` values, `time_delay` apart.
        time_delay: steps between two values of a state.
        threshold: None keeps the distances; a number marks distances below it; `point` marks those
            below the `percentage` percentile of the plot; `distance` those below `percentage`
            per cent of the largest.
        percentage: for `point` and `distance`, 0 to 100.

    Returns:
        Plots (..., M', M') with M' = M - (dimension - 1) * time_delay: distances in the unit of
        `x`, or 1.0 where they are below the threshold and 0.0 elsewhere.
    """
    if dimension == 1:
        distances = (x[..., :, None] - x[..., None, :]).abs()
    else:
        length = x.shape[-1] - (dimension - 1) * time_delay
        states = [x[..., i * time_delay : i * time_delay + length] for i in range(dimension)]
        squares = [(s[..., :, None] - s[..., None, :]).square() for s in states]
        distances = torch.stack(squares).sum(dim=0).sqrt()
    if threshold is None:
        return distances
    flat = distances.flatten(-2)
    if threshold == "point":
        limit = _percentile(flat, percentage)
    elif threshold == "distance":
        limit = flat.amax(dim=-1) * (percentage / 100.0)
    else:
        return (distances < threshold).to(x.dtype)
    return (distances < limit[..., None, None]).to(x.dtype)


def _percentile(flat: Tensor, percentage: float) -> Tensor:
    """Linearly interpolated percentile of the last axis, as NumPy's default.

    Uses `topk`, because ONNX has no operator for `torch.quantile`.
    """
    size = flat.shape[-1]
    place = (size - 1) * percentage / 100.0
    below = int(place)
    smallest = flat.topk(min(below + 2, size), dim=-1, largest=False).values
    low, high = smallest[..., below], smallest[..., min(below + 1, size - 1)]
    return low + (high - low) * (place - below)

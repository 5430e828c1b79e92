"""Losses, as pure functions in the terms of their papers, and small classes over them.

`z0` and `z1` are the projections of the two views of a place: pixels (recurrence plots) and
patches (imagery), both of unit length; row i of one is the positive of row i of the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from training.errors import TrainingError


class LossNotFinite(TrainingError):
    """The loss became NaN or infinite."""


def finite(loss: Tensor, where: str) -> float:
    """The value of a loss (), before it changes the weights.

    A step with NaN would make all weights NaN, those of the moving average too, and training would
    continue to its end without a warning.

    Args:
        loss: the loss ().
        where: names the run and the step in the error.

    Raises:
        LossNotFinite: it is NaN or infinite.
    """
    value = float(loss.detach())
    if not math.isfinite(value):
        raise LossNotFinite(
            f"{where}: the loss is {value}. The last checkpoint is from before this step, and "
            "resuming it would end here again: start a new run with a smaller learning rate "
            "(--set) or another seed"
        )
    return value


def info_nce(
    z0: Tensor, z1: Tensor, temperature: Tensor | float, excluded: Tensor | None = None
) -> Tensor:
    """Contrastive loss from z0 to z1: van den Oord et al. 2018, arXiv 1807.03748.

    The cross entropy of finding, for each row of z0, its own row among those of z1.

    Args:
        z0: unit vectors (N, P).
        z1: unit vectors (N, P).
        temperature: divides the cosines, above 0.
        excluded: True where row j of z1 is not used as a negative of row i of z0 (N, N); the
            diagonal, the positives, must be False.

    Returns:
        The loss (), in nats; log N for uninformative vectors.
    """
    logits = z0 @ z1.T / temperature
    if excluded is not None:
        logits = logits.masked_fill(excluded, -torch.inf)
    places = torch.arange(len(z0), device=z0.device)
    return nn.functional.cross_entropy(logits, places)


def symmetric_info_nce(
    z0: Tensor, z1: Tensor, temperature: Tensor | float, excluded: Tensor | None = None
) -> Tensor:
    """Mean of both directions of `info_nce` (Radford et al. 2021, arXiv 2103.00020)."""
    back = None if excluded is None else excluded.T
    return 0.5 * (info_nce(z0, z1, temperature, excluded) + info_nce(z1, z0, temperature, back))


class SymmetricInfoNCE(nn.Module):
    """`symmetric_info_nce` under a learned temperature.

    The logarithm of the inverse is learned, so that the temperature stays above 0, and clamped:
    a temperature that falls without bound lowers the loss by confidence only.

    Args:
        temperature: initial value.
        lowest: lower limit.
        highest: upper limit.
    """

    def __init__(
        self, temperature: float = 0.07, *, lowest: float = 0.02, highest: float = 1.0
    ) -> None:
        super().__init__()
        self.limits = (math.log(1.0 / highest), math.log(1.0 / lowest))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1.0 / temperature)))

    @property
    def temperature(self) -> Tensor:
        """The temperature in use ()."""
        return torch.exp(-self.log_scale.clamp(*self.limits))

    def forward(self, z0: Tensor, z1: Tensor, excluded: Tensor | None = None) -> Tensor:
        """The loss () of a batch; see `info_nce` for the arguments."""
        return symmetric_info_nce(z0, z1, self.temperature, excluded)


def same_group(groups: Tensor) -> Tensor:
    """Pairs of different rows of one group, which are not used as negatives.

    Args:
        groups: a number for each row (N), such as its field; negative where unknown, and an
            unknown group is shared with no row.

    Returns:
        Mask (N, N), symmetric, False on the diagonal.
    """
    same = (groups[:, None] == groups[None, :]) & (groups >= 0)[:, None]
    return same & ~_diagonal(len(groups), groups.device)


def near(scenes: Tensor, positions: Tensor, distance: float) -> Tensor:
    """Pairs of different rows that lie closer than `distance` in one scene.

    The patches of such pixels overlap, so that each patch fits both series.

    Args:
        scenes: number of each row's scene (N).
        positions: row and column of each pixel in its scene (N, 2).
        distance: in pixels, the larger of rows and columns (as patches overlap); 0 masks nothing.

    Returns:
        Mask (N, N), symmetric, False on the diagonal.
    """
    apart = (positions[:, None] - positions[None, :]).abs().amax(dim=-1)
    close = (apart < distance) & (scenes[:, None] == scenes[None, :])
    return close & ~_diagonal(len(scenes), scenes.device)


def alike(series: Tensor, threshold: float) -> Tensor:
    """Pairs of different rows whose series hardly differ: probably one field or one cover.

    Args:
        series: series on the regular grid (N, K, M), index units.
        threshold: root mean square difference below which two series are alike.

    Returns:
        Mask (N, N), symmetric, False on the diagonal.
    """
    flat = series.flatten(1)
    apart = torch.cdist(flat, flat) / math.sqrt(flat.shape[1])
    close = apart < threshold
    # `cdist` may round its two triangles differently.
    return (close | close.T) & ~_diagonal(len(series), series.device)


def _diagonal(size: int, device: torch.device) -> Tensor:
    return torch.eye(size, dtype=torch.bool, device=device)


def alignment(z0: Tensor, z1: Tensor) -> Tensor:
    """Mean squared distance of positive pairs (): Wang and Isola 2020, arXiv 2005.10242.

    0 is perfect; unrelated directions have 2.
    """
    return (z0 - z1).square().sum(dim=1).mean()


def uniformity(z: Tensor) -> Tensor:
    """Logarithm of the mean Gaussian potential of all pairs (): Wang and Isola 2020.

    0 if all vectors are equal (collapse); near -4 if they cover the sphere.

    Args:
        z: unit vectors (N, P), at least two.
    """
    return torch.pdist(z).square().mul(-2.0).exp().mean().log()


def pinball(
    predicted: Tensor, target: Tensor, quantiles: Sequence[float], valid: Tensor | None = None
) -> Tensor:
    """Quantile loss: Koenker and Bassett 1978, doi:10.2307/1913643.

    Args:
        predicted: quantiles (..., Q), in the unit of the target.
        target: observed values (...); any value, NaN included, where not valid.
        quantiles: the levels (Q), each in 0 to 1.
        valid: True where the target counts (...); None counts every target that is not NaN.

    Returns:
        The mean () over valid targets and quantiles; 0 if none is valid.
    """
    counts = target == target if valid is None else valid & (target == target)
    levels = predicted.new_tensor(quantiles)
    # A target of 0 where not valid: NaN times zero would make the gradient NaN.
    miss = torch.where(counts, target, 0.0)[..., None] - predicted
    loss = torch.maximum(levels * miss, (levels - 1.0) * miss)
    counted = torch.where(counts[..., None], loss, 0.0)
    return counted.sum() / (counts.sum().clamp(min=1) * len(quantiles))


def cross_entropy(networks: Sequence[Tensor], target: Tensor, smoothing: float) -> Tensor:
    """Cross entropy with smoothed labels, the mean over networks that are trained side by side.

    Args:
        networks: logits of each network (N, K).
        target: classes (N) or soft labels (N, K).
        smoothing: share of the label that is distributed over all classes.

    Returns:
        The loss (), in nats.
    """
    losses = [
        nn.functional.cross_entropy(logits.float(), target, label_smoothing=smoothing)
        for logits in networks
    ]
    return torch.stack(losses).mean()

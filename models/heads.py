"""Heads: projection, classification, forecast.

Shapes: N pixels or patches, D numbers of an embedding, K classes, M steps of the regular grid, H
steps of a forecast, S spectral indices, Q quantiles.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """Maps embeddings to the unit sphere of the contrastive loss (training only)."""

    def __init__(self, embedding: int, projection: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(embedding, embedding),
            # Embeddings are rectified, so all of them point in similar directions; without
            # centring, the contrastive loss spends its first thousand steps on undoing that.
            nn.BatchNorm1d(embedding),
            nn.ReLU(),
            nn.Linear(embedding, projection),
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        """`(N, D) -> (N, P)` of unit length."""
        return nn.functional.normalize(self.layers(embeddings), dim=-1)


class ClassificationHead(nn.Module):
    """Class logits, and probabilities under a fitted temperature.

    The temperature (Guo et al. 2017, arXiv 1706.04599) is fitted after training on the
    validation places, so that a probability is the share of cases in which the class is right.
    """

    def __init__(self, embedding: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(embedding, classes)
        self.register_buffer("temperature", torch.ones(()))

    temperature: Tensor

    def forward(self, embeddings: Tensor) -> Tensor:
        """`(N, D) -> (N, K)` logits."""
        logits: Tensor = self.linear(embeddings)
        return logits

    def probabilities(self, logits: Tensor) -> Tensor:
        """`(N, K)` logits to probabilities that sum to 1."""
        return torch.softmax(logits / self.temperature, dim=-1)


class ForecastHead(nn.Module):
    """Quantiles of the next values of each spectral index.

    The forecast is the last value of the series (persistence), plus a linear map of the whole
    series (by itself a linear regression), plus the encoder's share. The outer quantiles are
    distances from the median, so they cannot cross. `spread` scales those distances below
    and above the median for each step; it is 1 until a calibration across regions sets it.

    Args:
        embedding: D.
        steps: M.
        indices: S.
        horizon: H.
        quantiles: Q, odd, the median in the middle.
    """

    def __init__(
        self, embedding: int, *, steps: int, indices: int, horizon: int, quantiles: int
    ) -> None:
        super().__init__()
        self.shape = (horizon, indices, quantiles)
        self.series = nn.Linear(steps * indices, horizon * indices)
        self.encoder = nn.Linear(embedding, horizon * indices * quantiles)
        nn.init.zeros_(self.series.weight)
        nn.init.normal_(self.encoder.weight, std=1e-3)
        self.register_buffer("spread", torch.ones(horizon, 2))
        self.register_load_state_dict_pre_hook(_with_spread)  # type: ignore[no-untyped-call]  # torch's own

    spread: Tensor

    def forward(self, embeddings: Tensor, series: Tensor) -> Tensor:
        """Forecast.

        Args:
            embeddings: (N, D).
            series: spectral indices on the regular grid (N, S, M).

        Returns:
            Quantiles (N, H, S, Q), ascending, in index units.
        """
        horizon, indices, quantiles = self.shape
        middle = quantiles // 2
        last = series[..., -1]
        change = self.series((series - last[..., None]).flatten(1)).view(-1, horizon, indices)
        share = self.encoder(embeddings).view(-1, horizon, indices, quantiles)
        median = last[:, None] + change + share[..., middle]
        width = 0.1 * nn.functional.softplus(share)
        under, over = self.spread[:, None, :1], self.spread[:, None, 1:]
        below = median[..., None] - under * _outward(width[..., :middle].flip(-1)).flip(-1)
        above = median[..., None] + over * _outward(width[..., middle + 1 :])
        return torch.cat([below, median[..., None], above], dim=-1)


def _with_spread(head: ForecastHead, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Set the spread to 1 in the weights of earlier versions, which have none."""
    state.setdefault(f"{prefix}spread", torch.ones_like(head.spread))


def _outward(widths: Tensor) -> Tensor:
    """Cumulative sum over the last axis, written out: it has one or two entries."""
    sums = [widths[..., 0]]
    for i in range(1, widths.shape[-1]):
        sums.append(sums[-1] + widths[..., i])
    return torch.stack(sums, dim=-1)

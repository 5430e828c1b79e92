"""Baseline encoders (TempCNN, MLP) in the same graph, loop, augmentation and schedule."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.encoders import PixelEncoder, standardised, standardised_roots
from models.graph import PatchGraph, PixelGraph
from training.config import Network

_FILTERS = 64
_KERNEL = 5
_HIDDEN = 512


class _OnSeries(nn.Module):
    """Layers on the same input as the pixel encoder's."""

    layers: nn.Sequential

    def forward(
        self,
        series: Tensor,
        observed: Tensor,
        season: Tensor | None = None,
        reflectance: Tensor | None = None,
    ) -> Tensor:
        """Encode series (N, K, M) and bands (N, C, M) as (N, D); the other inputs are ignored."""
        del observed, season
        seen = standardised(series)
        if reflectance is not None:
            seen = torch.cat([seen, standardised_roots(reflectance)], dim=1)
        out: Tensor = self.layers(seen)
        return out


class TempCNN(_OnSeries):
    """Three convolutions over time and a dense layer.

    Pelletier et al. 2019, doi:10.3390/rs11050523.

    Args:
        steps: M.
        indices: K.
        bands: C, if the encoder also sees the bands; else 0.
        embedding: units of the dense layer, 256 in the paper.
        dropout: share of values dropped after each layer in training, 0.5 in the paper.
    """

    def __init__(
        self,
        *,
        steps: int,
        indices: int,
        bands: int = 0,
        embedding: int = 256,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        layers: list[nn.Module] = []
        for inputs in (indices + bands, _FILTERS, _FILTERS):
            layers += [
                nn.Conv1d(inputs, _FILTERS, _KERNEL, padding=_KERNEL // 2),
                nn.BatchNorm1d(_FILTERS),
                nn.ReLU(),
                nn.Dropout(dropout),
            ]
        self.layers = nn.Sequential(
            *layers, nn.Flatten(), *_dense(_FILTERS * steps, embedding, dropout)
        )


class MultilayerPerceptron(_OnSeries):
    """Two dense layers on the whole series.

    Args:
        steps: M.
        indices: K.
        bands: C, if the encoder also sees the bands; else 0.
        embedding: D.
        dropout: share of values dropped after each layer in training.
    """

    def __init__(
        self,
        *,
        steps: int,
        indices: int,
        bands: int = 0,
        embedding: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.layers = nn.Sequential(
            nn.Flatten(),
            *_dense((indices + bands) * steps, _HIDDEN, dropout),
            *_dense(_HIDDEN, embedding, dropout),
        )


NETWORKS = {"tempcnn": TempCNN, "mlp": MultilayerPerceptron}
NAMES = {"tempcnn": "TempCNN", "mlp": "multilayer perceptron"}


def put_network(graph: PixelGraph, network: Network) -> None:
    """Replace a graph's encoder by a baseline's; `pimc` keeps the graph's own.

    Grid, head and the length of the embedding stay the same.
    """
    if network != "pimc":
        steps, indices = graph.grid.steps, len(graph.indices.names)
        ours: PixelEncoder = graph.encoder
        replace_encoders(
            graph,
            lambda _: NETWORKS[network](
                steps=steps, indices=indices, bands=ours.bands, embedding=ours.embedding
            ),
        )


def replace_encoders(
    graph: PixelGraph | PatchGraph, make: Callable[[nn.Module], nn.Module]
) -> None:
    """Replace each encoder of a graph by one that `make` returns for it."""
    graph.add_module("encoder", make(graph.encoder))
    for pair in graph.others:
        pair[0] = make(pair[0])  # type: ignore[index,operator]  # a list, which torch types as a module


def _dense(inputs: int, outputs: int, dropout: float) -> list[nn.Module]:
    return [
        nn.Linear(inputs, outputs),
        nn.BatchNorm1d(outputs),
        nn.ReLU(),
        nn.Dropout(dropout),
    ]

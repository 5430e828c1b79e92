"""The interface of a downstream task, and what passes between tasks and the rest of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import Any, Protocol, TypeVar

from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from models.graph import PatchGraph, PixelGraph

Batch = tuple[Tensor, ...]
Graph = PixelGraph | PatchGraph
GraphT = TypeVar("GraphT", PixelGraph, PatchGraph)
Inputs = Mapping[str, NDArray[Any]]
"""Arrays by the names of a graph's inputs."""
Outputs = dict[str, NDArray[Any]]
"""Outputs on the validation places, with what scores need.

A classifier gives `logits` (N, K), `labels` (N) and `places` (N); a forecaster gives `quantiles`
(N, H, S, Q), `target` and `known` (N, H, S), and `places` (N).
"""


class Task(Protocol[GraphT]):
    """A downstream task: its data, graph, batches, loss, scores and card."""

    config: Any
    """The task's configuration."""
    regions: tuple[str, ...]
    """Regions that can be left out of training; empty where the data carry none."""
    has_linear_head: bool
    """Whether a linear probe can be the graph's head."""

    def graph(self) -> GraphT:
        """A new, untrained graph."""

    @property
    def validation(self) -> Sized:
        """The samples of the validation places that are scored."""

    @property
    def steps(self) -> int:
        """Batches per epoch."""

    def batches(self, epoch: int, rng: Generator) -> Iterator[Batch]:
        """The batches of an epoch, on the CPU."""

    def loss(self, graph: GraphT, batch: Batch) -> Tensor:
        """The loss () of a batch."""

    def finish(self, graph: GraphT) -> None:
        """Fit the calibration on the validation places, after training."""

    def outputs(self, graph: Any) -> Outputs:  # noqa: ANN401  # a graph, or its file in its place
        """Outputs of a graph on the validation places."""

    def scores(self, graph: GraphT) -> dict[str, Any]:
        """Scores on the validation places."""

    def probe(self, graph: GraphT, protocol: str) -> Outputs:
        """Outputs on the validation places of a `linear` or `knn` probe of the frozen encoder."""

    def real_inputs(self) -> Inputs:
        """Input from the validation places as the service sends it, for parity."""

    def typical_inputs(self) -> list[Inputs]:
        """Training input to calibrate the scales of an int8 variant; empty for no such variant."""

    def card_shape(self) -> dict[str, Any]:
        """The fields of a card that follow from the configuration and the legend."""

    def data(self) -> list[dict[str, Any]]:
        """The data trained on: name, use and number of samples of each source."""

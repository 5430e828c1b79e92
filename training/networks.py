"""Untrained pixel graphs from a configuration, and the card fields that describe them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from models.encoders import PixelEncoder
from models.graph import PixelGraph
from models.heads import ClassificationHead, ForecastHead
from training.baselines import put_network
from training.config import ClassifyConfig, ForecastConfig


def pixel_graph(
    config: ClassifyConfig | ForecastConfig,
    head: Callable[[int], ClassificationHead | ForecastHead],
) -> PixelGraph:
    """A new, untrained graph of as many networks as the configuration has members.

    Args:
        config: bands, indices, time window, encoder and network.
        head: makes the head of one network from the length of its embedding.
    """
    window = config.window

    def member() -> tuple[PixelEncoder, ClassificationHead | ForecastHead]:
        encoder = PixelEncoder(
            steps=window.steps,
            indices=len(config.indices),
            bands=len(config.bands) if config.reflectance else 0,
            **config.encoder.model_dump(),
        )
        return encoder, head(encoder.embedding)

    (encoder, first), *others = [member() for _ in range(config.members)]
    graph = PixelGraph(
        bands=config.bands,
        indices=config.indices,
        steps=window.steps,
        step_days=window.step_days,
        encoder=encoder,
        head=first,
        others=others,
        yearly=window.yearly,
        clarity=config.clarity,
        reflectance=config.reflectance,
    )
    put_network(graph, config.network)
    return graph


def pixel_shape(config: ClassifyConfig | ForecastConfig) -> dict[str, Any]:
    """The fields of a card that all pixel models have."""
    return {
        "modality": "pixel",
        "bands": config.bands,
        "indices": config.indices,
        "window": config.window,
        "min_observations": config.min_observations,
        "day_of_year": config.encoder.calendar,
    }

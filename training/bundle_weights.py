"""Weights of a bundle: from its float32 file back to the graph that was exported.

A bundle holds the folded graph (`training.graph_export`). Folding loses nothing but the running
statistics of the batch normalisation, so an unfolded graph computes the same, and can be exported
again under another calibration.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from models.encoders import Block, ChannelNorm, PixelEncoder
from models.graph import PixelGraph
from training.errors import TrainingError
from training.graph_export import folded
from training.task import Graph


class NotUnfolded(TrainingError):
    """A file does not hold the weights of a graph."""


def load_folded(graph: PixelGraph, file: Path) -> PixelGraph:
    """A graph with the weights of a bundle's float32 file.

    Args:
        graph: an untrained graph of the bundle's configuration, changed in place; its calibration
            stays as it is.
        file: ONNX file of the folded graph.

    Raises:
        NotUnfolded: the file holds weights of other names or shapes.
    """
    stored = {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for tensor in onnx.load(file).graph.initializer
    }
    exported = folded(graph)
    own = exported.state_dict()
    weights = {n: value for n, value in own.items() if not _calibrates(n)}
    for name, value in weights.items():
        if name not in stored or stored[name].shape != value.shape:
            raise NotUnfolded(
                f"{file.name} has no '{name}' of the shape {tuple(value.shape)}, which the "
                "configuration states: give the bundle of this configuration"
            )
    exported.load_state_dict({name: stored[name] for name in weights}, strict=False)
    with torch.no_grad():
        for (encoder, head), (source, source_head) in zip(
            _networks(graph), _networks(exported), strict=True
        ):
            _unfold(encoder, source.state_dict())
            head.load_state_dict(source_head.state_dict())
    return graph.eval()


def _calibrates(name: str) -> bool:
    """Whether a weight is of the calibration, which is not read: a new one takes its place."""
    return name.startswith(("calibration.", "grid.")) or name.endswith((".spread", ".temperature"))


def _networks(graph: Graph) -> list[tuple[nn.Module, nn.Module]]:
    """Encoder and head of each network."""
    return cast("list[tuple[nn.Module, nn.Module]]", [(graph.encoder, graph.head), *graph.others])


def _unfold(encoder: nn.Module, stored: dict[str, Tensor]) -> None:
    """Set an encoder's weights so that folding it gives the stored ones.

    Each batch normalisation becomes the identity, because the products that follow already hold
    it; a block's second product has no bias, because the next product already holds that.

    Raises:
        NotUnfolded: the encoder is not a pixel encoder on distances.
    """
    if not isinstance(encoder, PixelEncoder) or encoder.threshold is not None or not encoder.plots:
        raise NotUnfolded("only a pixel encoder on plots of distances can be unfolded")
    for norm in encoder.modules():
        if isinstance(norm, ChannelNorm):
            if norm.running_mean is None or norm.running_var is None:
                raise NotUnfolded("a normalisation without running statistics was not exported")
            norm.running_mean.zero_()
            norm.running_var.fill_(1.0 - norm.eps)
            norm.weight.fill_(1.0)
            norm.bias.zero_()
    # Folded, the plots' weights are doubled, and their sums are taken off the series' weights.
    plots = stored["plots.weight"] / 2.0
    indices = len(plots) // encoder.steps
    tokens = stored["tokens"].clone()
    sums = plots.reshape(indices, encoder.steps, -1).sum(dim=1)
    if encoder.series:
        tokens[1 : 1 + indices] += sums
    else:
        tokens = torch.cat([tokens[:1], tokens[1 + indices :]])
    encoder.row.weight.copy_(torch.cat([tokens, plots]).T)
    encoder.row.bias.copy_(stored["pixel.bias"])
    number = 0
    for i, level in enumerate(encoder.levels):
        number += isinstance(level, nn.ReLU)
        for block in level.children():
            if isinstance(block, Block):
                block.up.weight.copy_(stored[f"layers.{number}.up.weight"].T)
                block.up.bias.copy_(stored[f"layers.{number}.up.bias"])
                block.down.weight.copy_(stored[f"layers.{number}.down.weight"].T)
                block.down.bias.zero_()
                number += 1
        if i < len(encoder.joins):
            _set(encoder.joins[i], stored, f"layers.{number}")
            number += 1
    _set(next(m for m in encoder.head if isinstance(m, nn.Linear)), stored, f"layers.{number}")


def _set(layer: nn.Module, stored: dict[str, Tensor], name: str) -> None:
    if not isinstance(layer, nn.Linear):
        raise NotUnfolded(f"'{name}' is not a linear layer in this configuration")
    layer.weight.copy_(stored[f"{name}.weight"].T)
    layer.bias.copy_(stored[f"{name}.bias"])

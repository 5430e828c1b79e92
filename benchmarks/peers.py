"""Peers in PyTorch: Presto's encoder, and recurrence plots with a ResNet."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

MONTHS = 12
PRESTO_CHANNELS = 17
"""VV, VH, ten bands of Sentinel-2, two of ERA5, two of SRTM, NDVI."""
PRESTO_S2 = slice(2, 12)
STEPS = 64


class PeerMissing(RuntimeError):
    """A package that the comparison needs is not installed."""


class Presto:
    """The encoder of Presto (arXiv 2304.14065), from the package `rslearn`.

    The weights are random, because the pretrained ones would have to be downloaded and take the
    same time. The inputs are twelve months of the ten bands of Sentinel-2; all other inputs are
    masked, so that the encoder leaves out their tokens.

    Raises:
        PeerMissing: `rslearn` or `einops` is not installed.
    """

    def __init__(self) -> None:
        self._encoder = _presto_module().Presto.construct().encoder.eval()

    def __call__(self, pixels: NDArray[np.float32]) -> Tensor:
        """Embeddings (N, 128) of series (N, 12, 10)."""
        count = len(pixels)
        x = torch.zeros(count, MONTHS, PRESTO_CHANNELS)
        x[:, :, PRESTO_S2] = torch.from_numpy(pixels)
        mask = torch.ones_like(x)
        mask[:, :, PRESTO_S2] = 0
        unknown = torch.full((count, MONTHS), 9)  # Dynamic World's "missing"
        with torch.inference_mode():
            embeddings: Tensor = self._encoder(
                x, unknown, torch.zeros(count, 2), mask=mask, month=0, eval_task=True
            )
        return embeddings


def _presto_module() -> Any:
    """Presto's file, without the package's `__init__`, which imports a training framework."""
    package = importlib.util.find_spec("rslearn")
    if package is None or not package.submodule_search_locations:
        raise PeerMissing("rslearn is not installed: `make bench` installs it")
    path = f"{package.submodule_search_locations[0]}/models/presto/single_file_presto.py"
    spec = importlib.util.spec_from_file_location("single_file_presto", path)
    if spec is None or spec.loader is None:
        raise PeerMissing(
            f"the installed rslearn has no {path}: `make bench` installs one that has"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class UsualPipeline:
    """Recurrence plots of three indices by pyts, then a ResNet-18 at 64 x 64.

    Raises:
        PeerMissing: `pyts` is not installed.
    """

    def __init__(self) -> None:
        try:
            from pyts.image import RecurrencePlot
        except ImportError as error:
            raise PeerMissing("pyts is not installed: `make bench` installs it") from error
        self._plots = RecurrencePlot()
        self._network = ResNet18(inputs=3, classes=8).eval()

    def __call__(self, series: NDArray[np.float32]) -> Tensor:
        """Logits (N, 8) of series of indices (N, 3, 64)."""
        plots = np.stack([self._plots.transform(series[:, k]) for k in range(3)], axis=1)
        with torch.inference_mode():
            logits: Tensor = self._network(torch.from_numpy(plots.astype(np.float32)))
        return logits


class ResNet18(nn.Module):
    """The residual network of 18 layers (He et al. 2016, arXiv 1512.03385), its stem included."""

    def __init__(self, *, inputs: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(inputs, 64, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        ]
        before = 64
        for width in (64, 128, 256, 512):
            layers += [_Basic(before, width, stride=width // before), _Basic(width, width)]
            before = width
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W)."""
        out: Tensor = self.head(self.layers(x).mean(dim=(2, 3)))
        return out


class _Basic(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        same = stride == 1 and inputs == width
        self.shortcut: nn.Module = nn.Identity() if same else nn.Sequential(
            nn.Conv2d(inputs, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))

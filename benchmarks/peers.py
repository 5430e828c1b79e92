"""Peers in PyTorch: Presto's encoder, and recurrence plots with a ResNet."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

MONTHS = 12
PRESTO_CHANNELS = 17
"""VV, VH, ten bands of Sentinel-2, two of ERA5, two of SRTM, NDVI."""
PRESTO_S2 = slice(2, 12)
PRESTO_BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
"""Bands of Sentinel-2 in Presto's order; it takes reflectance, unitless."""
_PRESTO_NDVI = 16
STEPS = 64


class PeerMissing(RuntimeError):
    """A package that the comparison needs is not installed."""


class Presto:
    """The encoder of Presto (arXiv 2304.14065), from the package `rslearn`.

    All inputs but those given are masked, so that the encoder leaves out their tokens.

    Args:
        weights: file of the public weights; None for random ones, which take the same time.

    Raises:
        PeerMissing: `rslearn` or `einops` is not installed.
    """

    def __init__(self, weights: Path | None = None) -> None:
        presto = _presto_module().Presto.construct()
        if weights is not None:
            presto.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self._encoder = presto.encoder.eval()

    def __call__(self, pixels: NDArray[np.float32]) -> Tensor:
        """Embeddings (N, 128) of series (N, 12, 10) of the ten bands, January first."""
        x = torch.zeros(len(pixels), MONTHS, PRESTO_CHANNELS)
        x[:, :, PRESTO_S2] = torch.from_numpy(pixels)
        mask = torch.ones_like(x)
        mask[:, :, PRESTO_S2] = 0
        return self._embed(x, mask, torch.zeros(len(pixels), 2))

    def with_place(self, pixels: NDArray[np.float32], lonlat: NDArray[np.float64]) -> Tensor:
        """Embeddings (N, 128) that also see NDVI and the place, as in pretraining.

        Args:
            pixels: reflectance (N, 12, 10), January first; a band that is missing in all months of
                all pixels is NaN, and masked together with the others of its token.
            lonlat: degrees (N, 2).
        """
        x = torch.zeros(len(pixels), MONTHS, PRESTO_CHANNELS)
        mask = torch.ones_like(x)
        bands = torch.from_numpy(pixels)
        x[:, :, PRESTO_S2] = bands.nan_to_num()
        mask[:, :, PRESTO_S2] = bands.isnan().float()
        red, nir = (bands[:, :, PRESTO_BANDS.index(band)] for band in ("B04", "B08"))
        # Presto's own NDVI is 0 where both bands are.
        x[:, :, _PRESTO_NDVI] = torch.where(nir + red > 0, (nir - red) / (nir + red), 0.0)
        mask[:, :, _PRESTO_NDVI] = 0
        places = torch.from_numpy(np.ascontiguousarray(lonlat[:, ::-1], np.float32))
        return self._embed(x, mask, places)

    def _embed(self, x: Tensor, mask: Tensor, latlons: Tensor) -> Tensor:
        unknown = torch.full(x.shape[:2], 9)  # Dynamic World's "missing"
        with torch.inference_mode():
            embeddings: Tensor = self._encoder(
                x, unknown, latlons, mask=mask, month=0, eval_task=True
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

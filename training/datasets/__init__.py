"""Readers of training data: one module a source, two sample types.

A reader gives `PixelSet`s (series of reflectance) or a `PatchSet` (imagery); nothing further down
knows where they came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class PixelSet:
    """Pixel series of one source that share their dates."""

    source: str
    """Name of the data set; a key of the cards' training data."""
    bands: tuple[str, ...]
    """Sentinel-2 band names (C)."""
    dates: tuple[date, ...]
    """Acquisition dates, ascending (T)."""
    values: NDArray[np.float32]
    """Reflectance (N, T, C), unitless; NaN where missing. May be memory-mapped."""
    valid: NDArray[np.bool_]
    """True where usable (N, T)."""
    places: NDArray[np.int64]
    """The place of each pixel (N), by which splits and bootstraps are made: never by pixel."""
    validation: NDArray[np.bool_]
    """True for the pixels of the validation places (N)."""
    labels: NDArray[np.int64] | None = None
    """Codes of the source's own legend (N); None where the source has no labels."""

    def take(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> PixelSet:
        """The pixels chosen by a mask or by positions."""
        return PixelSet(
            source=self.source,
            bands=self.bands,
            dates=self.dates,
            values=self.values[chosen],
            valid=self.valid[chosen],
            places=self.places[chosen],
            validation=self.validation[chosen],
            labels=None if self.labels is None else self.labels[chosen],
        )

    def select(self, bands: tuple[str, ...]) -> PixelSet:
        """The same pixels with the bands named, in that order; ValueError where one is missing."""
        return PixelSet(
            source=self.source,
            bands=bands,
            dates=self.dates,
            values=self.values[..., [self.bands.index(b) for b in bands]],
            valid=self.valid,
            places=self.places,
            validation=self.validation,
            labels=self.labels,
        )


@dataclass(frozen=True, kw_only=True)
class PatchSet:
    """Patches of imagery."""

    source: str
    bands: tuple[str, ...]
    values: NDArray[np.uint8] | NDArray[np.float32]
    """Patches (N, C, P, P): reflectance, or uint8 that `scale` turns into reflectance."""
    scale: float
    """Reflectance = value x scale."""
    places: NDArray[np.int64]
    validation: NDArray[np.bool_]
    labels: NDArray[np.int64] | None = None
    legend: Mapping[int, str] | None = None
    """Label to name; None where the source has no labels."""

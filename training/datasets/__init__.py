"""Readers of training data: one module per source, three sample types.

A reader returns `PixelSet`s (series of reflectance), a `PatchSet` (imagery) or `Scene`s (both, of
one area); the rest of the package does not depend on the source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    """Codes of the source's own legend (N); None if the source has no labels."""
    region: str | None = None
    """Region that holds all pixels, e.g. `us-west`; None if unknown."""

    def take(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> PixelSet:
        """The pixels chosen by a mask or by positions."""
        return replace(
            self,
            values=self.values[chosen],
            valid=self.valid[chosen],
            places=self.places[chosen],
            validation=self.validation[chosen],
            labels=None if self.labels is None else self.labels[chosen],
        )

    def relabel(self, labels: NDArray[np.int64]) -> PixelSet:
        """The same pixels with other labels (N)."""
        return replace(self, labels=labels)

    def select(self, bands: tuple[str, ...]) -> PixelSet:
        """The same pixels with the bands named, in that order; ValueError if one is missing."""
        columns = [self.bands.index(b) for b in bands]
        return replace(self, bands=bands, values=self.values[..., columns])


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
    """Label to name; None if the source has no labels."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A stack over one area: every pixel's series, and the imagery around it.

    Values stay as they are stored, so that only the accessed parts of a memory-mapped stack are
    read.
    """

    source: str
    """Name of the data set; a key of the cards' training data."""
    bands: tuple[str, ...]
    """Sentinel-2 band names (C)."""
    dates: tuple[date, ...]
    """Acquisition dates, ascending (T)."""
    values: NDArray[np.generic]
    """Values as stored (T, C, H, W); may be memory-mapped."""
    scale: float
    """Reflectance = value x scale + offset."""
    offset: float = 0.0
    valid: NDArray[np.bool_] | None = None
    """True where usable (T, H, W); None: wherever a band is neither 0 nor NaN."""
    fields: NDArray[np.int64] | None = None
    """Number of the field of each pixel (H, W), -1 for none; None if fields are unknown."""
    labels: NDArray[np.int64] | None = None
    """Codes of the source's legend (H, W), -1 where unlabelled; None without labels."""
    validation: bool = False
    """Whether the whole area is a validation place."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns (H, W)."""
        return self.values.shape[2], self.values.shape[3]

    def read(
        self,
        bands: tuple[str, ...],
        rows: slice = slice(None),
        cols: slice = slice(None),
        times: NDArray[np.int64] | slice = slice(None),
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Reflectance (T, C, h, w), NaN where missing, and its validity (T, h, w).

        Raises:
            ValueError: the scene lacks a band.
        """
        stored = np.asarray(self.values[times, :, rows, cols])
        chosen = stored[:, [self.bands.index(b) for b in bands]].astype(np.float32)
        if self.valid is None:
            present = (np.nan_to_num(chosen) != 0).any(axis=1)
        else:
            present = self.valid[times, rows, cols]
        valid = present & np.isfinite(chosen).all(axis=1)
        values = chosen * np.float32(self.scale) + np.float32(self.offset)
        return np.where(valid[:, None], values, np.float32(np.nan)), valid

    def crop(self, rows: slice, cols: slice, *, validation: bool = False) -> Scene:
        """A part of the area, as views of the same memory."""

        def part(layer: NDArray[np.int64] | None) -> NDArray[np.int64] | None:
            return None if layer is None else layer[rows, cols]

        return replace(
            self,
            values=self.values[:, :, rows, cols],
            valid=None if self.valid is None else self.valid[:, rows, cols],
            fields=part(self.fields),
            labels=part(self.labels),
            validation=validation,
        )

    def pixels(self, bands: tuple[str, ...], place: int = 0) -> PixelSet:
        """All pixels as series, row by row; their place is the field if there is one."""
        values, valid = self.read(bands)
        n = valid.shape[1] * valid.shape[2]
        fields = None if self.fields is None else self.fields.reshape(n)
        return PixelSet(
            source=self.source,
            bands=bands,
            dates=self.dates,
            values=values.transpose(2, 3, 0, 1).reshape(n, len(self.dates), len(bands)),
            valid=valid.transpose(1, 2, 0).reshape(n, len(self.dates)),
            places=np.full(n, place) if fields is None else fields,
            validation=np.full(n, self.validation),
            labels=None if self.labels is None else self.labels.reshape(n),
        )

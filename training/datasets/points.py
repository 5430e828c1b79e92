"""Pixel series at points: US crops, points of four campaigns, and MODIS over Brazil.

Three archives of NumPy arrays. Each is given as `PixelSet`s whose pixels share their dates.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.datasets import PixelSet

# Side of the blocks, in degrees, by which the archives were split into places.
BLOCK_DEGREES = 0.1
_REFLECTANCE = np.float32(1e-4)
# MODIS has no Sentinel-2 bands; these are the nearest, so that the same indices apply.
_MODIS_BANDS = {"blue": "B02", "red": "B04", "nir": "B08"}


def crops_us_2021(folder: Path) -> list[PixelSet]:
    """US crops of 2021: ten-day composites in ten bands, labels are codes of USDA's CDL.

    Args:
        folder: holds `crops_us_2021_dev.npz`.
    """
    with np.load(folder / "crops_us_2021_dev.npz") as archive:
        values, valid = _reflectance(archive["reflectance"])
        return [
            PixelSet(
                source="crops_us_2021",
                bands=tuple(archive["bands"].tolist()),
                dates=tuple(date.fromisoformat(day) for day in archive["dates"]),
                values=values,
                valid=valid,
                places=blocks(archive["lonlat"]),
                validation=archive["is_val"],
                labels=archive["label"].astype(np.int64),
            )
        ]


def crops_us_legend(folder: Path) -> Mapping[int, str]:
    """Names of the CDL codes in the archive."""
    names = json.loads((folder / "labels.json").read_text())
    return {int(code): name for code, name in names.items()}


def s2_points(folder: Path) -> list[PixelSet]:
    """Points of four campaigns; labels are ESA WorldCover's classes, -1 where unknown.

    A set per campaign and dates; its `source` is `s2_points/<campaign>`.

    Args:
        folder: holds `s2_points_dev.npz`.
    """
    with np.load(folder / "s2_points_dev.npz") as archive:
        values, valid = _reflectance(archive["reflectance"])
        places = blocks(archive["lonlat"])
        cover = archive["worldcover"].astype(np.int64)
        cover[cover == 0] = -1
        bands = tuple(archive["bands"].tolist())
        return [
            PixelSet(
                source=f"s2_points/{name}",
                bands=bands,
                dates=dates,
                values=values[chosen, : len(dates)],
                valid=valid[chosen, : len(dates)],
                places=places[chosen],
                validation=archive["is_val"][chosen],
                labels=cover[chosen],
            )
            for name, dates, chosen in _same_dates(archive["source"], archive["dates"])
        ]


def modis_brazil(folder: Path) -> list[PixelSet]:
    """MODIS series of Brazil, under the names of the nearest Sentinel-2 bands.

    Labels are positions in `modis_legend`. A set per source and dates, named
    `modis_brazil/<source>`.

    Args:
        folder: holds `modis_brazil_dev.npz`.
    """
    with np.load(folder / "modis_brazil_dev.npz") as archive:
        bands = archive["bands"].tolist()
        columns = [bands.index(name) for name in _MODIS_BANDS]
        stored = archive["values"][:, :, columns].astype(np.float32)
        places = blocks(archive["lonlat"])
        labels = np.unique(archive["label"], return_inverse=True)[1].astype(np.int64)
        return [
            PixelSet(
                source=f"modis_brazil/{name}",
                bands=tuple(_MODIS_BANDS.values()),
                dates=dates,
                values=stored[chosen],
                valid=np.isfinite(stored[chosen]).all(axis=-1),
                places=places[chosen],
                validation=archive["is_val"][chosen],
                labels=labels[chosen],
            )
            for name, dates, chosen in _same_dates(archive["source"], archive["dates"])
        ]


def modis_legend(folder: Path) -> tuple[str, ...]:
    """Names of the MODIS labels, in the order that `modis_brazil` numbers them."""
    with np.load(folder / "modis_brazil_dev.npz") as archive:
        return tuple(np.unique(archive["label"]).tolist())


def blocks(lonlat: NDArray[np.float64]) -> NDArray[np.int64]:
    """Number of the block of `BLOCK_DEGREES` in which each longitude, latitude (N, 2) lies."""
    cells = np.floor((lonlat + np.array([180.0, 90.0])) / BLOCK_DEGREES).astype(np.int64)
    columns = round(360 / BLOCK_DEGREES)
    return np.asarray(cells[:, 1] * columns + cells[:, 0])


def _reflectance(
    stored: NDArray[np.integer],
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Values and validity of integers x 10,000 (N, T, C), where all bands 0 means missing."""
    valid = (stored != 0).any(axis=-1)
    values = np.where(valid[..., None], stored * _REFLECTANCE, np.float32(np.nan))
    return values.astype(np.float32), valid


def _same_dates(
    sources: NDArray[np.str_], dates: NDArray[np.str_]
) -> Iterator[tuple[str, tuple[date, ...], NDArray[np.int64]]]:
    """Source, dates and positions of the pixels that share both.

    Args:
        sources: (N).
        dates: ISO dates (N, T), padded with empty strings at the end.
    """
    keys = np.column_stack([sources.astype(dates.dtype.str.replace("U10", "U20")), dates])
    unique, group = np.unique(keys, axis=0, return_inverse=True)
    for i, (source, *days) in enumerate(unique.tolist()):
        yield source, tuple(date.fromisoformat(d) for d in days if d), np.flatnonzero(group == i)

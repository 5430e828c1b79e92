"""Pixel series at points: US crops, points of four campaigns, Victoria, Pune, Bavaria, and MODIS.

Archives of NumPy arrays. Each is given as `PixelSet`s whose pixels share their dates.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.datasets import PixelSet

# Side of the blocks, in degrees, by which the archives were split into places.
BLOCK_DEGREES = 0.1
_REFLECTANCE = np.float32(1e-4)
# The US crops lie in two states; this meridian separates them.
_US_WEST = -105.0
_CAMPAIGNS = {
    "canada_2017": "canada",
    "france_dekad": "france",
    "france_month": "corsica",
    "global_12m": "world",
}
# The declared crops of France and Corsica have no WorldCover class. The first two of a code's ten
# digits give the cover: temporary crops, grassland, trees. Permanent crops (12), mixed (25) and
# unspecified covers are left out.
_DECLARED = {11: 40, 20: 30, 40: 10, 41: 10}
# Scene classification of level 2A: vegetation, bare soil, water, unclassified.
_CLEAR_SCL = (4, 5, 6, 7)
# WorldCover's codes of the classes of `victoria_2018` and `pune_2019`, by their names there.
_VICTORIA = {
    "Bare Ground": 60,
    "Canola": 40,
    "Cereals": 40,
    "Legumes": 40,
    "Forest": 10,
    "Grassland": 30,
    "Water": 80,
    "Urban": 50,
}
_PUNE = {"Agriculture": 40, "BarrenLand": 60, "Forests": 10, "Infrastructure": 50, "Water": 80}
_BAVARIAN_CROPS, _BAVARIAN_MEADOWS = range(100, 400), range(451, 454)
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

    France and Corsica have no WorldCover class, so the declared crop gives the cover there.

    One set for each campaign and its dates; its `source` is `s2_points/<campaign>`.

    Args:
        folder: holds `s2_points_dev.npz`.
    """
    with np.load(folder / "s2_points_dev.npz") as archive:
        values, valid = _reflectance(archive["reflectance"])
        places = blocks(archive["lonlat"])
        cover = archive["worldcover"].astype(np.int64)
        declared = [
            _DECLARED.get(code // 10**8, -1) if name.startswith("france") else -1
            for name, code in zip(archive["source"], archive["crop_code"].tolist(), strict=True)
        ]
        cover = np.where(cover == 0, np.array(declared, dtype=np.int64), cover)
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
                region=_CAMPAIGNS[name],
            )
            for name, dates, chosen in _same_dates(archive["source"], archive["dates"])
        ]


def modis_brazil(folder: Path) -> list[PixelSet]:
    """MODIS series of Brazil, under the names of the nearest Sentinel-2 bands.

    Labels are positions in `modis_legend`. One set for each source and its dates; its `source` is
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
                region="brazil",
            )
            for name, dates, chosen in _same_dates(archive["source"], archive["dates"])
        ]


def us_regions(crops: PixelSet) -> list[PixelSet]:
    """The US crops as two sets, of the regions `us-west` and `us-south`; one if all are in one."""
    west = longitudes(crops.places) < _US_WEST
    sets = (
        replace(crops.take(west), region="us-west"),
        replace(crops.take(~west), region="us-south"),
    )
    return [pixels for pixels in sets if len(pixels.places)]


def victoria_2018(folder: Path) -> list[PixelSet]:
    """Victoria, Australia: 73 steps of five days in ten bands; labels are WorldCover's codes.

    Args:
        folder: holds `victoria.npz`.
    """
    with np.load(folder / "victoria.npz") as archive:
        values, valid = _reflectance(archive["reflectance"])
        names = archive["class_name"][archive["label"]].tolist()
        return [
            PixelSet(
                source="victoria_2018",
                bands=tuple(archive["bands"].tolist()),
                dates=tuple(date(2018, 1, 1) + timedelta(days=5 * i) for i in range(73)),
                values=values,
                valid=valid,
                places=archive["polygon"].astype(np.int64),
                validation=np.zeros(len(valid), dtype=bool),
                labels=np.array([_VICTORIA[name] for name in names], dtype=np.int64),
                region="victoria",
            )
        ]


def pune_2019(folder: Path) -> list[PixelSet]:
    """Around Pune, India: 73 five-day windows; labels are WorldCover's codes.

    The labels state no licence, so they may be used to evaluate a model but not to train one that
    is shipped. All pixels are in validation places, so that no training includes them by mistake.

    Args:
        folder: holds `pune_2019.npz`.
    """
    with np.load(folder / "pune_2019.npz") as archive:
        values, valid = _reflectance(archive["reflectance"])
        valid &= np.isin(archive["scl"], _CLEAR_SCL)
        return [
            PixelSet(
                source="pune_2019",
                bands=tuple(archive["bands"].tolist()),
                dates=tuple(date.fromisoformat(day) for day in archive["dates"].tolist()),
                values=np.where(valid[..., None], values, np.float32(np.nan)),
                valid=valid,
                places=archive["polygon"].astype(np.int64),
                validation=np.ones(len(valid), dtype=bool),
                labels=np.array([_PUNE[name] for name in archive["label"].tolist()]),
                region="pune",
            )
        ]


def bavaria_2018(folder: Path) -> list[PixelSet]:
    """Means of fields in Bavaria, half-months of level 1C with their clouds.

    Labels are WorldCover's codes of arable crops and meadows, -1 for other crop codes.

    Args:
        folder: holds `bavaria_fields_2018_l1c.npz`.
    """
    with np.load(folder / "bavaria_fields_2018_l1c.npz") as archive:
        stored = archive["reflectance"].astype(np.float32)
        valid = np.isfinite(stored).all(axis=-1) & (stored != 0).any(axis=-1)
        values = np.where(valid[..., None], stored * _REFLECTANCE, np.float32(np.nan))
        bands = tuple(f"B0{b[1:]}" if len(b) == 2 else b for b in archive["bands"].tolist())
        crops = archive["crop_code"]
        labels = np.where(
            np.isin(crops, _BAVARIAN_CROPS), 40, np.where(np.isin(crops, _BAVARIAN_MEADOWS), 30, -1)
        )
        fields = np.arange(len(crops))
        return [
            PixelSet(
                source="bavaria_2018",
                bands=bands,
                dates=dates,
                values=values[chosen],
                valid=valid[chosen],
                places=fields[chosen],
                validation=np.zeros(len(chosen), dtype=bool),
                labels=labels[chosen].astype(np.int64),
                region="bavaria",
            )
            for _, dates, chosen in _same_dates(
                np.full(len(crops), "bavaria_2018"), archive["dates"]
            )
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


def longitudes(places: NDArray[np.int64]) -> NDArray[np.float64]:
    """Western edge, in degrees, of blocks numbered by `blocks` (N)."""
    columns = round(360 / BLOCK_DEGREES)
    return np.asarray((places % columns) * BLOCK_DEGREES - 180.0)


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

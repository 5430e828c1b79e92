"""Synthetic scenes: fields with phenology, clouds and sensor noise, for tests and pretraining.

The greenness of a field follows a double logistic curve (Beck et al. 2006,
doi:10.1016/j.rse.2005.10.021); its reflectance mixes a soil and a leaf spectrum by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from models.formulas import YEAR
from training.datasets import PixelSet, Scene

BANDS = ("B02", "B03", "B04", "B08")
_CLOUD = np.array([0.55, 0.56, 0.57, 0.62])
_SENSOR_NOISE = 0.004


@dataclass(frozen=True, kw_only=True)
class Cover:
    """One class of ground: its seasons and its two spectra."""

    name: str
    rise: float
    """Day of the year when half of the greening is done."""
    fall: float
    """Day of the year when half of the greenness is gone; before `rise` if it spans New Year."""
    least: float
    """Greenness outside the season, 0 to 1."""
    most: float
    """Greenness in the season, 0 to 1."""
    bare: tuple[float, float, float, float]
    """Reflectance of `BANDS` at greenness 0."""
    green: tuple[float, float, float, float]
    """Reflectance of `BANDS` at greenness 1."""


_SOIL = (0.08, 0.11, 0.15, 0.23)
_LEAF = (0.025, 0.055, 0.03, 0.46)

COVERS = (
    Cover(name="winter crop", rise=85, fall=190, least=0.15, most=0.95, bare=_SOIL, green=_LEAF),
    Cover(name="summer crop", rise=160, fall=265, least=0.05, most=0.9, bare=_SOIL, green=_LEAF),
    Cover(
        name="grass",
        rise=70,
        fall=310,
        least=0.45,
        most=0.75,
        bare=_SOIL,
        green=(0.03, 0.07, 0.04, 0.4),
    ),
    Cover(
        name="broadleaf trees",
        rise=115,
        fall=290,
        least=0.35,
        most=0.95,
        bare=(0.04, 0.05, 0.06, 0.17),
        green=(0.015, 0.035, 0.018, 0.38),
    ),
    Cover(
        name="built-up",
        rise=100,
        fall=290,
        least=0.05,
        most=0.15,
        bare=(0.13, 0.15, 0.17, 0.21),
        green=_LEAF,
    ),
    Cover(
        name="water",
        rise=150,
        fall=250,
        least=0.0,
        most=0.08,
        bare=(0.045, 0.04, 0.025, 0.012),
        green=_LEAF,
    ),
)


def double_logistic(
    days: NDArray[np.float64], *, rise: float, fall: float, speed: float
) -> NDArray[np.float64]:
    """A season, 0 (outside) to 1 (inside).

    Args:
        days: days since its start of year (...).
        rise: day of half the rise.
        fall: day of half the fall, after `rise`.
        speed: steepness of both, per day.
    """

    def logistic(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return 1.0 / (1.0 + np.exp(-speed * x))

    return logistic(days - rise) - logistic(days - fall)


def make_dates(start: date, *, days: int = 365, every: int = 10) -> tuple[date, ...]:
    """Regular dates."""
    return tuple(start + timedelta(days=d) for d in range(0, days, every))


def make_scene(
    *,
    size: int = 64,
    dates: Sequence[date],
    fields: int = 24,
    seed: int,
    clouds: float = 0.3,
    covers: Sequence[Cover] = COVERS,
    validation: bool = False,
) -> Scene:
    """A scene of fields.

    Args:
        size: rows and columns, pixels.
        dates: acquisition dates (T), ascending.
        fields: number of Voronoi cells.
        seed: seed of all random draws.
        clouds: mean share of a date under cloud, 0 to 1.
        covers: the classes; a label is a position in them.
        validation: whether the scene is a validation place.

    Returns:
        The scene, with `fields` and `labels`; pixels under cloud are not valid.
    """
    rng = np.random.default_rng(seed)
    cells = _voronoi(size, fields, rng)
    chosen = rng.integers(len(covers), size=fields)
    spectra = np.stack([_field(covers[c], dates, rng) for c in chosen])  # (fields, T, C)
    values = spectra[cells].transpose(2, 3, 0, 1)  # (T, C, H, W)
    values = values * (1.0 + 0.04 * _smooth(size, 6, rng))
    values = values + rng.normal(0.0, _SENSOR_NOISE, values.shape)
    cloudy = np.stack([_cloud(size, clouds, rng) for _ in dates])
    values = np.where(cloudy[:, None], _CLOUD[:, None, None] + 0.3 * values, values)
    return Scene(
        source="synthetic",
        bands=BANDS,
        dates=tuple(dates),
        values=np.clip(values, 1e-4, None).astype(np.float32),
        scale=1.0,
        valid=~cloudy,
        fields=cells.astype(np.int64),
        labels=chosen[cells].astype(np.int64),
        validation=validation,
    )


def make_pixels(scene: Scene, *, validation: float = 0.25, seed: int = 0) -> PixelSet:
    """All pixels of a scene with labels, split by field.

    Args:
        scene: from `make_scene`.
        validation: share of the fields held out.
        seed: seed of the draw of these fields.
    """
    pixels = scene.pixels(scene.bands)
    every = np.unique(pixels.places)
    rng = np.random.default_rng(seed)
    held = rng.choice(every, size=max(1, round(validation * len(every))), replace=False)
    return replace(pixels, validation=np.isin(pixels.places, held))


def _field(cover: Cover, dates: Sequence[date], rng: Generator) -> NDArray[np.float64]:
    """Reflectance of one field (T, C): its class, with its own sowing date, vigour and soil."""
    shift = rng.normal(0.0, 8.0)
    length = (cover.fall - cover.rise) % YEAR + rng.normal(0.0, 6.0)
    day = np.array([d.timetuple().tm_yday for d in dates], dtype=np.float64)
    season = np.zeros(len(dates))
    # The season of the year before and after reach over New Year.
    for year in (-YEAR, 0.0, YEAR):
        rise = cover.rise + shift + year
        season += double_logistic(day, rise=rise, fall=rise + length, speed=rng.normal(0.09, 0.01))
    vigour = np.clip(rng.normal(1.0, 0.08), 0.7, 1.1)
    greenness = cover.least + (cover.most * vigour - cover.least) * np.clip(season, 0.0, 1.0)
    bare = np.array(cover.bare) * rng.normal(1.0, 0.12)
    green = np.array(cover.green) * rng.normal(1.0, 0.06)
    return np.asarray(bare + greenness[:, None] * (green - bare))


def _voronoi(size: int, cells: int, rng: Generator) -> NDArray[np.int64]:
    """Number of the nearest of `cells` random points, for each pixel (H, W)."""
    points = rng.uniform(0, size, (cells, 2))
    grid = np.indices((size, size)).transpose(1, 2, 0).reshape(-1, 1, 2)
    nearest = np.square(grid - points).sum(axis=-1).argmin(axis=1)
    return np.asarray(nearest.reshape(size, size), dtype=np.int64)


def _smooth(size: int, waves: int, rng: Generator) -> NDArray[np.float64]:
    """Smooth random field (H, W) of mean 0 and deviation 1: a sum of plane waves."""
    y, x = np.mgrid[:size, :size] / 64.0
    field = np.zeros((size, size))
    for _ in range(waves):
        kx, ky = rng.normal(0.0, 4.0, 2)
        field += np.cos(kx * x + ky * y + rng.uniform(0.0, 2.0 * np.pi))
    return np.asarray((field - field.mean()) / (field.std() + 1e-9))


def _cloud(size: int, share: float, rng: Generator) -> NDArray[np.bool_]:
    """Cloud mask of one date (H, W): as in real series, most are nearly clear or nearly covered."""
    if share <= 0.0:
        return np.zeros((size, size), dtype=np.bool_)
    covered = rng.beta(0.5, 0.5 * (1.0 - share) / share)
    field = _smooth(size, 8, rng)
    return np.asarray(field < np.quantile(field, covered))

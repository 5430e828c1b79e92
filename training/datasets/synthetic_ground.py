"""Synthetic series of the kinds of ground that the labelled points lack.

The labelled points were drawn on cropland, so other covers have a handful of samples, most of
them hazy. These series (trees, clearings, shrubs, built-up, bare, water, wetland) come from typical
ranges of reflectance, a season by a double logistic curve, and the disturbances of a real sensor:
snow, missed shadow, haze. The ranges of trees and clearings were adjusted while watching the
agreement on the Romania cube, and trees of dry tropical forests were added while watching Pune, so
those scores are not blind. No score is computed on these series.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from models.formulas import YEAR
from training.datasets import PixelSet
from training.datasets.synthetic import make_dates

BANDS = ("B02", "B04", "B08")
SYNTHETIC = "synthetic_ground"
"""The name of this source."""
Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Ground:
    """One kind of ground: ranges from which each pixel draws."""

    code: int
    """WorldCover's code."""
    resting: tuple[Range, Range, Range]
    """Reflectance of `BANDS` outside the season."""
    growing: tuple[Range, Range, Range]
    """Reflectance of `BANDS` in the season."""
    share: Range = (1.0, 1.0)
    """Amplitude of the season, as a share of the way to `growing`."""
    rise: Range = (80, 150)
    """Day of half the rise."""
    length: Range = (100, 220)
    """Days between half the rise and half the fall."""
    pixels: int = 200


_SNOW = (0.6, 0.58, 0.55)
_GRASS: tuple[Range, Range, Range] = ((0.03, 0.06), (0.04, 0.08), (0.25, 0.42))
_EVERGREEN: tuple[Range, Range, Range] = ((0.008, 0.03), (0.012, 0.035), (0.14, 0.27))
_RAINFOREST: tuple[Range, Range, Range] = ((0.01, 0.03), (0.015, 0.035), (0.26, 0.42))
_CLEAR_WATER: tuple[Range, Range, Range] = ((0.015, 0.07), (0.008, 0.05), (0.002, 0.03))
_TURBID_WATER: tuple[Range, Range, Range] = ((0.05, 0.12), (0.05, 0.15), (0.02, 0.09))

GROUNDS = (
    # Broad-leaved trees lose their leaves; what shows then is bark, litter and shadow.
    Ground(
        code=10,
        resting=((0.015, 0.05), (0.035, 0.085), (0.13, 0.23)),
        growing=((0.008, 0.03), (0.013, 0.03), (0.28, 0.55)),
        rise=(85, 140),
        length=(130, 220),
        pixels=400,
    ),
    # Closed stands of beech or oak: near infrared as bright as a crop's, red as dark as water's.
    Ground(
        code=10,
        resting=((0.02, 0.05), (0.045, 0.09), (0.15, 0.26)),
        growing=((0.008, 0.03), (0.012, 0.028), (0.36, 0.62)),
        rise=(95, 135),
        length=(140, 195),
        pixels=400,
    ),
    Ground(code=10, resting=_EVERGREEN, growing=((0.01, 0.03), (0.015, 0.03), (0.18, 0.32))),
    Ground(code=10, resting=_RAINFOREST, growing=_RAINFOREST),
    # Trees of dry tropical forests lose some of their leaves in the dry season.
    Ground(
        code=10,
        resting=((0.02, 0.06), (0.05, 0.12), (0.20, 0.32)),
        growing=((0.012, 0.035), (0.02, 0.045), (0.28, 0.46)),
        share=(0.3, 1.0),
        rise=(140, 200),
        length=(150, 260),
        pixels=400,
    ),
    # Clearings and rough meadows: redder than a closed canopy, most of all before the season.
    Ground(
        code=30,
        resting=((0.03, 0.06), (0.06, 0.11), (0.18, 0.28)),
        growing=((0.02, 0.05), (0.032, 0.06), (0.28, 0.50)),
        rise=(90, 150),
        length=(110, 200),
        pixels=1800,
    ),
    Ground(
        code=20,
        resting=((0.03, 0.07), (0.055, 0.13), (0.15, 0.26)),
        growing=((0.025, 0.05), (0.04, 0.08), (0.2, 0.32)),
        share=(0.2, 1.0),
    ),
    Ground(
        code=50,
        resting=((0.07, 0.22), (0.08, 0.25), (0.12, 0.33)),
        growing=_GRASS,
        share=(0.0, 0.35),
        pixels=300,
    ),
    Ground(
        code=60,
        resting=((0.06, 0.22), (0.11, 0.38), (0.17, 0.48)),
        growing=_GRASS,
        share=(0.0, 0.15),
        pixels=300,
    ),
    Ground(code=80, resting=_CLEAR_WATER, growing=_CLEAR_WATER),
    Ground(code=80, resting=_TURBID_WATER, growing=_TURBID_WATER, pixels=100),
    Ground(
        code=90,
        resting=((0.02, 0.06), (0.03, 0.08), (0.06, 0.2)),
        growing=((0.02, 0.04), (0.03, 0.06), (0.18, 0.34)),
        share=(0.4, 1.0),
    ),
)


def synthetic_ground(*, years: int = 3, seed: int = 0) -> PixelSet:
    """Five-day series of every kind of ground; labels are WorldCover's codes.

    Dates are clouded over at random, and thin cloud, view angle and noise disturb the rest; the
    ground itself is the same every year.
    """
    rng = np.random.default_rng(seed)
    dates = tuple(
        day for year in range(years) for day in make_dates(date(2019 + year, 1, 1), every=5)
    )
    day = np.array([day.timetuple().tm_yday - 1.0 for day in dates])
    values = np.concatenate([_pixels(ground, day, rng) for ground in GROUNDS])
    clear = rng.beta(2.0, 2.5, (len(values), 1))
    valid = rng.random(values.shape[:2]) < np.maximum(clear, 0.15)
    return PixelSet(
        source=SYNTHETIC,
        bands=BANDS,
        dates=dates,
        values=np.where(valid[..., None], values, np.nan).astype(np.float32),
        valid=valid,
        places=np.arange(len(values)),
        validation=np.zeros(len(values), dtype=np.bool_),
        labels=np.repeat([g.code for g in GROUNDS], [g.pixels for g in GROUNDS]).astype(np.int64),
    )


def _pixels(ground: Ground, day: NDArray[np.float64], rng: Generator) -> NDArray[np.float64]:
    """Reflectance of a ground's pixels (N, T, C)."""
    n = ground.pixels

    def draw(ranges: tuple[Range, Range, Range]) -> NDArray[np.float64]:
        """Values that correlate between bands: dark ground is dark in all (N, 1, C)."""
        low, high = np.array(ranges).T
        place = 0.6 * rng.random((n, 1, 1)) + 0.4 * rng.random((n, 1, len(low)))
        return np.asarray(low + place * (high - low))

    rise, length = rng.uniform(*ground.rise, (n, 1)), rng.uniform(*ground.length, (n, 1))
    speed = rng.uniform(0.05, 0.15, (n, 1))
    season = np.zeros((n, len(day)))
    # The season of the year before and after reach over New Year.
    for year in (-YEAR, 0.0, YEAR):
        greening = 1.0 / (1.0 + np.exp(-speed * (day - rise - year)))
        withering = 1.0 / (1.0 + np.exp(-speed * (day - rise - length - year)))
        season += greening - withering
    share = (rng.uniform(*ground.share, (n, 1)) * np.clip(season, 0.0, 1.0))[..., None]
    values = draw(ground.resting) * (1 - share) + draw(ground.growing) * share
    shape = (n, len(day), 1)
    values = values * np.exp(rng.normal(0.0, 0.06, shape))
    # Slopes that face away from the sun are darker, most of all when it stands low.
    low_sun = 0.5 + 0.5 * np.cos((day - rng.uniform(-15, 15, (n, 1))) * (2 * np.pi / YEAR))
    values = values * (1 - rng.uniform(0.0, 0.45, (n, 1, 1)) * (0.3 + 0.7 * low_sun)[..., None])
    # Snow under the trees and between the houses, on dates that scene classification calls clear.
    snowy = (low_sun > 0.7) & (rng.random((n, len(day))) < rng.uniform(0.0, 0.6, (n, 1)))
    cover = np.where(snowy, rng.uniform(0.05, 0.4, (n, len(day))), 0.0)[..., None]
    values = values * (1 - cover) + cover * np.array(_SNOW)
    # Cloud shadow that was missed.
    values = values * np.where(rng.random(shape) < 0.05, rng.uniform(0.4, 0.8, shape), 1.0)
    # Haze brightens blue most; on some dates it is thick.
    thick = np.where(rng.random(shape) < 0.08, 0.05, 0.006)
    values = values + rng.exponential(thick) * np.array([1.0, 0.7, 0.5])
    return np.asarray(np.maximum(values + rng.normal(0.0, 0.004, values.shape), 1e-4))

"""A small archive of crops in the layout of the real one, which a tiny network can learn."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path

import numpy as np

PIXELS = 192
CODES = np.array([1, 5, 176])
TINY = (
    "encoder.width=8",
    "encoder.embedding=16",
    "members=1",
    "reflectance=false",
    "optimisation.batch=32",
    "optimisation.epochs=3",
    "optimisation.average=0.5",
)
"""Settings of a network for it."""


def write_crops(folder: Path, *, states: int = 1) -> Path:
    """Crops whose class is the time of their season; a quarter of the places is validation.

    Args:
        folder: takes the archive in `crops_us_2021`.
        states: 1, or 2 for two halves in two states: the first grows code 5, and the second code
            24 in its place.
    """
    rng = np.random.default_rng(0)
    n, t = PIXELS, 36
    kind = rng.integers(3, size=n)
    season = np.exp(-0.5 * ((np.arange(t) - 10 - 7 * kind[:, None]) / 4) ** 2)
    nir, red = 0.2 + 0.25 * season, 0.15 - 0.1 * season
    bands = np.stack([red * 0.6, red, nir], axis=-1) + rng.normal(0, 0.01, (n, t, 3))
    reflectance = (np.maximum(bands, 0.001) * 10_000).astype(np.int16)
    reflectance[rng.random((n, t)) < 0.15] = 0
    lonlat = np.column_stack([-120 + 0.1 * (np.arange(n) % 16), np.full(n, 36.0)]) + 0.05
    codes = CODES[kind]
    if states == 2:
        second = np.arange(n) % 32 >= 16
        lonlat[second, 0] += 30.0
        codes = np.where(second & (kind == 1), 24, codes)
    (folder / "crops_us_2021").mkdir()
    np.savez(
        folder / "crops_us_2021" / "crops_us_2021_dev.npz",
        reflectance=reflectance,
        dates=np.array([str(date(2021, 1, 5) + timedelta(days=10 * i)) for i in range(t)]),
        bands=np.array(["B02", "B04", "B08"]),
        lonlat=lonlat,
        label=codes.astype(np.int16),
        is_val=np.arange(n) % 16 >= 12,
    )
    return folder

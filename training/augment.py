"""Augmentation of pixel series and of patches of imagery.

Everything here is a function of its arguments and a random generator, so that a seed reproduces a
batch exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class PixelAugmentation:
    """Augmentation of pixel series; 0 switches each part off."""

    drop: float = 0.4
    """Largest share of a pixel's dates dropped; the share itself is drawn for each pixel."""
    least: int = 4
    """Usable dates that dropping always leaves, if there are as many."""
    jitter: float = 2.0
    """Standard deviation of a date's shift, in days."""
    season: float = 10.0
    """Largest shift of a whole season, in days, either way."""
    noise: float = 0.005
    """Standard deviation of the noise of each value, reflectance."""
    gain: float = 0.05
    """Standard deviation of a pixel's gain, shared by its dates and bands."""


@dataclass(frozen=True, kw_only=True)
class PatchAugmentation:
    """Augmentation of patches; 0 switches each part off."""

    flip: bool = True
    """Whether patches are rotated and mirrored at random (the eight symmetries of the square)."""
    crop: float = 0.25
    """Largest share of a side that a crop cuts off; the crop is scaled back, nearest pixel."""
    closer: float = 0.0
    """Like `crop`, but with linear interpolation, which preserves the texture of single pixels
    better than doubling rows and columns."""
    wider: float = 0.0
    """Largest share of a side by which a view extends beyond its patch, which is mirrored there."""
    gain: float = 0.1
    """Standard deviation of the gain, shared by the bands."""
    band_gain: float = 0.03
    """Standard deviation of the gain of each band on its own."""
    offset: float = 0.005
    """Standard deviation of the brightness added, reflectance."""
    noise: float = 0.003
    """Standard deviation of the noise of each value, reflectance."""
    clear: float = 0.0
    """Share of the patches (B04, B03, B02) from which Rayleigh scattering is removed, so that
    level 1C imagery resembles level 2A."""
    soften: float = 0.0
    """Share of the patches that are smoothed, as resampling to another grid or a median of dates
    smooths imagery."""


NO_PIXEL_AUGMENTATION = PixelAugmentation(drop=0.0, jitter=0.0, season=0.0, noise=0.0, gain=0.0)
NO_PATCH_AUGMENTATION = PatchAugmentation(
    flip=False, crop=0.0, gain=0.0, band_gain=0.0, offset=0.0, noise=0.0
)


# Central wavelength in nm, and optical depth of the air's molecules at sea level: Bodhaine et al.
# 1999, doi:10.1175/1520-0426(1999)016<1854:ORODC>2.0.CO;2.
_AIR = {
    "B01": (443.0, 0.236), "B02": (490.0, 0.155), "B03": (560.0, 0.090), "B04": (665.0, 0.045),
    "B05": (705.0, 0.035), "B06": (740.0, 0.029), "B07": (783.0, 0.023), "B08": (842.0, 0.017),
    "B8A": (865.0, 0.016), "B09": (945.0, 0.011), "B11": (1610.0, 0.001), "B12": (2190.0, 0.0),
}  # fmt: skip
# Aerosol of a continent at 550 nm: single-scattering albedo, asymmetry, and Angstrom's exponent of
# its optical depth. "Continental average" of Hess et al. 1998,
# doi:10.1175/1520-0477(1998)079<0831:OPOAAC>2.0.CO;2.
_AEROSOL_ALBEDO = 0.925
_AEROSOL_ASYMMETRY = 0.703
_ANGSTROM = 1.11
_PATCH_BANDS = ("B04", "B03", "B02")


def drop_dates(valid: Bools, rng: Generator, *, most: float, least: int) -> Bools:
    """Mark some usable dates as missing.

    Args:
        valid: True where usable (N, T).
        rng: random generator.
        most: largest share dropped; each pixel draws its own share from 0 to this.
        least: usable dates that remain, if there are as many.

    Returns:
        A new mask (N, T), False wherever `valid` is.
    """
    share = rng.uniform(0.0, most, (len(valid), 1))
    draw = rng.random(valid.shape)
    # The `least` usable dates of a pixel with the highest draws are never dropped.
    rank = np.where(valid, draw, -1.0).argsort(axis=1)[:, ::-1].argsort(axis=1)
    return valid & ((draw >= share) | (rank < least))


def jitter_dates(days: Floats, rng: Generator, *, deviation: float) -> Floats:
    """Shift each date independently, in days (T)."""
    return days + rng.normal(0.0, deviation, days.shape).astype(np.float32)


def shift_season(days: Floats, rng: Generator, *, most: float) -> Floats:
    """Shift all dates together, by up to `most` days either way (T)."""
    return days + np.float32(rng.uniform(-most, most))


def disturb(values: Floats, rng: Generator, *, noise: float, gain: float) -> Floats:
    """Gain of each pixel and noise of each value, on reflectance (N, T, C)."""
    gains = np.exp(rng.normal(0.0, gain, (len(values), 1, 1)))
    return (values * gains + rng.normal(0.0, noise, values.shape)).astype(np.float32)


def augment_pixels(
    values: Floats, valid: Bools, days: Floats, how: PixelAugmentation, rng: Generator
) -> tuple[Floats, Bools, Floats]:
    """Augment series that share their dates.

    Args:
        values: reflectance (N, T, C); NaN stays NaN.
        valid: True where usable (N, T).
        days: days since the window's first day (T).
        how: strength of each part.
        rng: random generator.

    Returns:
        values, valid and days, augmented; all new arrays.
    """
    moved = jitter_dates(days, rng, deviation=how.jitter)
    return (
        disturb(values, rng, noise=how.noise, gain=how.gain),
        drop_dates(valid, rng, most=how.drop, least=how.least),
        shift_season(moved, rng, most=how.season),
    )


def flip(patches: Floats, rng: Generator) -> Floats:
    """One of the eight symmetries of the square for each patch (N, C, P, P)."""
    out = np.empty_like(patches)
    for i, (turns, mirrored) in enumerate(
        zip(rng.integers(4, size=len(patches)), rng.random(len(patches)) < 0.5, strict=True)
    ):
        turned = np.rot90(patches[i], turns, axes=(1, 2))
        out[i] = turned[:, :, ::-1] if mirrored else turned
    return out


def crop(patches: Floats, rng: Generator, *, most: float) -> Floats:
    """Cut off up to `most` of the sides and scale the rest back (N, C, P, P), nearest pixel."""
    side = patches.shape[-1]
    length = side * (1.0 - rng.uniform(0.0, most, len(patches)))
    corners = rng.random((2, len(patches))) * (side - length)
    steps = (np.arange(side) + 0.5) / side
    rows, cols = np.floor(corners[:, :, None] + length[:, None] * steps).astype(np.int64)
    bands = np.arange(patches.shape[1])[None, :, None, None]
    number = np.arange(len(patches))[:, None, None, None]
    return np.asarray(patches[number, bands, rows[:, None, :, None], cols[:, None, None, :]])


def zoom(patches: Floats, rng: Generator, *, closer: float, wider: float) -> Floats:
    """Zoom patches (N, C, P, P) in or out, linearly interpolated.

    Args:
        patches: reflectance (N, C, P, P).
        rng: random generator.
        closer: largest share of a side that is cut off.
        wider: largest share of a side that is added, mirrored at the edges.
    """
    n, side = len(patches), patches.shape[-1]
    scale = rng.uniform(1.0 - closer, 1.0 + wider, n)
    # The view may be off the centre by half of the length that is cut off or mirrored.
    middle = (side - 1) / 2 + (rng.random((2, n)) - 0.5) * np.abs(1.0 - scale) * side
    at = middle[..., None] + scale[:, None] * (np.arange(side) - (side - 1) / 2)
    at = (side - 1) - np.abs((side - 1) - np.abs(at))
    below = np.clip(np.floor(at).astype(np.int64), 0, side - 2)
    above = np.clip(at - below, 0.0, 1.0).astype(np.float32)
    # Share of each pixel (last axis) in each interpolated one: (2, N, P, P), rows and columns.
    share = np.zeros((2, n, side, side), np.float32)
    np.put_along_axis(share, below[..., None], 1.0 - above[..., None], axis=-1)
    np.put_along_axis(share, below[..., None] + 1, above[..., None], axis=-1)
    rows, cols = share[:, :, None]
    return np.asarray(rows @ patches @ cols.swapaxes(-1, -2))


def soften(patches: Floats, rng: Generator, *, share: float) -> Floats:
    """Smooth some patches (N, C, P, P), by up to the mean of each pixel and its eight neighbours.

    Args:
        patches: reflectance.
        rng: random generator.
        share: share of the patches that are changed, 0 to 1.
    """
    weight = rng.uniform(0.0, 1.0 / 3.0, (len(patches), 1, 1, 1))
    chosen = rng.random(weight.shape) < share
    return smooth(patches, np.where(chosen, weight, 0.0))


def smooth(patches: Floats, weight: float | NDArray[np.float64]) -> Floats:
    """Smooth patches (N, C, P, P), as resampling to another grid does.

    Args:
        patches: reflectance.
        weight: weight of each of the two neighbours in a pixel's mean, along rows and then along
            columns, 0 to 1/3; one number, or one per patch (N, 1, 1, 1). Two bilinear shifts by
            half a pixel, there and back, give 1/4.
    """
    share = np.float32(weight)
    for axis in (2, 3):
        edges = [(1, 1) if a == axis else (0, 0) for a in range(4)]
        padded = np.pad(patches, edges, mode="edge")
        before, _, after = (
            np.take(padded, np.arange(i, i + patches.shape[axis]), axis=axis) for i in range(3)
        )
        patches = (1 - 2 * share) * patches + share * (before + after)
    return patches


def brighten(patches: Floats, rng: Generator, how: PatchAugmentation) -> Floats:
    """Gain, brightness and noise, on reflectance (N, C, P, P)."""
    n, c = patches.shape[:2]
    shared = rng.normal(0.0, how.gain, (n, 1, 1, 1))
    own = rng.normal(0.0, how.band_gain, (n, c, 1, 1))
    added = rng.normal(0.0, how.offset, (n, 1, 1, 1))
    grain = rng.normal(0.0, how.noise, patches.shape)
    return (patches * np.exp(shared + own) + added + grain).astype(np.float32)


def clear_atmosphere(patches: Floats, rng: Generator, *, share: float) -> Floats:
    """Remove Rayleigh scattering from some patches: level 1C to level 2A, approximately.

    Args:
        patches: reflectance (N, 3, P, P) of B04, B03, B02.
        rng: random generator.
        share: share of the patches that are changed, 0 to 1.
    """
    cosine = rng.uniform(0.5, 0.9, (len(patches), 1, 1, 1))
    surface = to_surface(patches, cosine)
    chosen = rng.random((len(patches), 1, 1, 1)) < share
    return np.where(chosen, surface, patches).astype(np.float32)


def to_surface(patches: Floats, cosine: float | NDArray[np.float64]) -> Floats:
    """Remove Rayleigh scattering: level 1C to level 2A, approximately.

    Single scattering (Hansen and Travis 1974): `surface = (top - t / 4m) / (1 - t (1 + 1/m) / 2)`
    with the optical depth t of a band and the cosine m of the sun's zenith angle.

    Args:
        patches: reflectance (N, 3, P, P) of B04, B03, B02.
        cosine: of the sun's zenith angle, above 0 to 1; of all patches or of each (N, 1, 1, 1).

    Returns:
        Reflectance (N, 3, P, P), at least 0.
    """
    added, kept = _molecules(_of_patches(_molecule_depths(_PATCH_BANDS)), cosine)
    return np.asarray(np.maximum((patches - added) / kept, 0.0), np.float32)


def to_top(patches: Floats, cosine: float | NDArray[np.float64]) -> Floats:
    """Add Rayleigh scattering, the inverse of `to_surface`: level 2A to level 1C, approximately."""
    added, kept = _molecules(_of_patches(_molecule_depths(_PATCH_BANDS)), cosine)
    return np.asarray(patches * kept + added, np.float32)


def add_haze(patches: Floats, depth: float, cosine: float) -> Floats:
    """Add haze: aerosol between ground and sensor, seen from the zenith.

    Single scattering (Hansen and Travis 1974) with the phase function of Henyey and Greenstein
    1941.

    Args:
        patches: reflectance (N, 3, P, P) of B04, B03, B02.
        depth: optical depth of the aerosol at 550 nm; 0.1 is clear, 0.5 hazy.
        cosine: of the sun's zenith angle, above 0 to 1.
    """
    added, kept = _aerosol(depth * _of_patches(_aerosol_depths(_PATCH_BANDS)), cosine)
    return np.asarray(patches * kept + added, np.float32)


def through_air(values: Floats, bands: Sequence[str], rng: Generator) -> Floats:
    """Series as at level 1C: through the air's molecules and an aerosol that differs by date.

    Args:
        values: surface reflectance (N, T, C).
        bands: names of Sentinel-2's bands on the C axis.
        rng: random generator.
    """
    n, dates = values.shape[:2]
    cosine = rng.uniform(0.5, 0.9, (n, 1, 1))
    depth = rng.uniform(0.02, 0.3, (n, 1, 1)) * rng.uniform(0.7, 1.3, (n, dates, 1))
    layers = (
        _molecules(_molecule_depths(bands), cosine),
        _aerosol(depth * _aerosol_depths(bands), cosine),
    )
    for added, kept in layers:
        values = np.asarray(values * kept + added, np.float32)
    return values


_Layer = tuple[NDArray[Any], NDArray[Any]]
"""Reflectance of a layer of air, and the share of the ground's that passes it."""


def _molecules(depth: NDArray[Any], cosine: float | NDArray[np.float64]) -> _Layer:
    return depth / (4.0 * cosine), 1.0 - 0.5 * depth * (1.0 + 1.0 / cosine)


def _aerosol(depth: NDArray[Any], cosine: float | NDArray[np.float64]) -> _Layer:
    g, albedo = _AEROSOL_ASYMMETRY, _AEROSOL_ALBEDO
    # The sun's light is turned by 180 degrees minus the zenith angle, whose cosine is -cosine.
    phase = (1.0 - g**2) / (1.0 + g**2 + 2.0 * g * cosine) ** 1.5
    # Light that is scattered forward stays in the beam; other scattered and absorbed light leaves.
    lost = (1.0 - albedo) + albedo * (1.0 - g) / 2.0
    kept = np.exp(-lost * depth * (1.0 + 1.0 / cosine))
    return albedo * phase * depth / (4.0 * cosine), kept


def _molecule_depths(bands: Sequence[str]) -> NDArray[np.float32]:
    """Optical depths of the air's molecules (C)."""
    return np.array([_AIR[band][1] for band in bands], np.float32)


def _aerosol_depths(bands: Sequence[str]) -> NDArray[np.float32]:
    """Optical depths of an aerosol whose depth is 1 at 550 nm (C)."""
    return (np.array([_AIR[band][0] for band in bands], np.float32) / 550.0) ** -_ANGSTROM


def _of_patches(by_band: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values by band (C) in the shape of patches (1, C, 1, 1)."""
    return by_band[None, :, None, None]


def augment_patches(patches: Floats, how: PatchAugmentation, rng: Generator) -> Floats:
    """Augment patches of reflectance (N, C, P, P); returns a new array."""
    turned = flip(patches, rng) if how.flip else patches
    cut = crop(turned, rng, most=how.crop) if how.crop else turned
    if how.closer or how.wider:
        cut = zoom(cut, rng, closer=how.closer, wider=how.wider)
    seen = clear_atmosphere(cut, rng, share=how.clear) if how.clear else cut
    blurred = soften(seen, rng, share=how.soften) if how.soften else seen
    return brighten(blurred, rng, how)

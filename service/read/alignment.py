"""Alignment check: images that are shifted or mirrored relative to the other dates of a stack.

Each date is compared with the median of all dates, pixel by pixel, by the correlation of each band.
A date whose correlation becomes much higher once it is mirrored, turned or shifted does not lie
where its file states.

    pictures (T, B, s, s) → correlation with the median as they lie, and moved → dates that moved

The correlation at all shifts at once, over the pixels that both images have, is that of D.
Padfield, "Masked object registration in the Fourier domain", IEEE Transactions on Image Processing
21 (2012). docs/decisions/alignment.md has the errors that were measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.formulas import median_of_dates

Floats = NDArray[np.float32]
SIDE = 64
"""Largest side of a picture, pixels."""
_LEAST_SIDE = 20
_LEAST_PIXELS = 200
_LEAST_SHARE = 0.25
"""Least share of a picture's pixels that are compared; few pixels are alike by chance."""
FEWEST_DATES = 5
"""Fewest dates of the same pixels: the median of fewer shows little of the others."""
_NEAR = 8
"""Dates nearest in time with whose median a date is compared; crops change over a year."""
_MOST_SHIFT = 8
"""Largest shift that is searched, pixels."""
_ALIKE = 0.65
"""Least correlation of a moved image with the median."""
_MORE_ALIKE = 0.3
"""Least rise of the correlation by the move; a shift by one pixel is mostly below."""
_DISTINCT = 0.1
"""Least distance to the correlation by any other move, which periodic patterns do not have."""
_APART = 3
"""Shifts that differ by more than this are other ones, pixels."""
_SAME_EDGES = 0.35
"""Largest correlation of the edges in an image as it lies with those of the other dates."""
_EXCHANGED = "with rows and columns exchanged"
_MOVES: Mapping[str, Callable[[Floats], Floats]] = {
    "mirrored left to right": lambda one: one[..., ::-1],
    "mirrored top to bottom": lambda one: one[..., ::-1, :],
    "turned by 180 degrees": lambda one: one[..., ::-1, ::-1],
    _EXCHANGED: lambda one: one.swapaxes(-1, -2),
}


@dataclass(frozen=True, kw_only=True)
class Moved:
    """A date whose image does not lie where the other dates' images do."""

    date: int
    """Position on the T axis."""
    how: str
    """How it lies relative to the others, such as `mirrored left to right`."""
    before: float
    """Its correlation with the median as it lies, -1 to 1."""
    after: float
    """Its correlation with the median if it is moved back."""


def side(length: int) -> int:
    """The side of a picture from a window of a length, pixels: 64 or, of odd lengths, 63."""
    return length - 2 * max(0, -(-(length - SIDE) // 2))


def crop(window: NDArray[Any]) -> NDArray[Any]:
    """The middle of a window (…, h, w), `side` of each axis, as far from both ends.

    A mirrored window has the mirrored middle.
    """
    height, width = window.shape[-2:]
    top, left = (height - side(height)) // 2, (width - side(width)) // 2
    return window[..., top : height - top, left : width - left]


def find_moved(pictures: Floats, days: Sequence[int]) -> list[Moved]:
    """The dates whose images are mirrored, turned or shifted relative to the others.

    Args:
        pictures: (T, B, h, w) float32 of the same pixels, at most 64 a side, NaN where missing or
            cloudy.
        days: numbers of the days (T).

    Returns:
        The dates, ascending; none of fewer than five dates, or of small pictures.
    """
    if min(pictures.shape[-2:]) < _LEAST_SIDE or len(pictures) < FEWEST_DATES:
        return []
    return [
        moved
        for t, own in enumerate(pictures)
        if (moved := _moved(t, own, _of_near_dates(pictures, days, t)))
    ]


def _moved(t: int, own: Floats, usual: Floats) -> Moved | None:
    """How an image (B, h, w) lies relative to another; None if it lies as that does."""
    before = _correlation(own, usual)
    if not before < 1 - _MORE_ALIKE:  # it cannot rise by enough, or too few pixels are compared
        return None
    square = own.shape[-1] == own.shape[-2]
    found = [
        # -1 where moved images share too few pixels, as in a narrow area: NaN has no order.
        (np.nan_to_num(_correlation(move(own), usual), nan=-1.0), name)
        for name, move in _MOVES.items()
        if square or name != _EXCHANGED
    ]
    after, down, right, elsewhere = _best_shift(own, usual)
    found.append((after, f"shifted by {_in_words(down, right)}"))
    (best, how), (second, _) = sorted(found, reverse=True)[:2]
    if how == found[-1][1]:
        second = max(second, elsewhere)
    # Rows of fields and stripes are alike after several moves, so that none of them is known.
    if best < _ALIKE or best - before < _MORE_ALIKE or best - second < _DISTINCT:
        return None
    # Crops change what is bright, but not where fields end. A shift leaves the edges along it.
    mirrored = how in _MOVES
    if mirrored and not _correlation(_edges(own), _edges(usual)) <= _SAME_EDGES:
        return None
    return Moved(date=t, how=how, before=before, after=best)


def _edges(image: Floats) -> Floats:
    """How much each pixel (B, h, w) differs from the next ones down and right (B, h - 1, w - 1)."""
    down, right = np.diff(image, axis=-2)[..., :-1], np.diff(image, axis=-1)[..., :-1, :]
    return np.asarray(np.abs(down) + np.abs(right))


def _of_near_dates(own: Floats, days: Sequence[int], k: int) -> Floats:
    """The median (B, h, w) of the dates nearest in time to a date, without itself."""
    near = sorted((abs(days[n] - days[k]), n) for n in range(len(days)) if n != k)
    values = own[[n for _, n in near[:_NEAR]]]
    return median_of_dates(values, ~np.isnan(values))


def _correlation(own: Floats, usual: Floats) -> float:
    """Mean over the bands of the correlation of two images (B, h, w).

    NaN where they share too few pixels, or a band is constant.
    """
    both = ~np.isnan(own) & ~np.isnan(usual)
    found = []
    for band, there in enumerate(both):
        x, y = own[band][there].astype(np.float64), usual[band][there].astype(np.float64)
        if len(x) < _least(own) or np.ptp(x) == 0 or np.ptp(y) == 0:
            return float("nan")
        found.append(float(np.corrcoef(x, y)[0, 1]))
    return float(np.mean(found))


def _least(own: Floats) -> float:
    """The least number of pixels of images (…, h, w) that are compared."""
    return float(max(_LEAST_PIXELS, _LEAST_SHARE * own.shape[-1] * own.shape[-2]))


def _best_shift(own: Floats, usual: Floats) -> tuple[float, int, int, float]:
    """The shift of an image (B, h, w) at which its correlation with another is highest.

    Returns:
        The mean correlation over the bands; the rows and columns by which the image lies farther
        down and right than the other, -8 to 8; and the highest correlation at a shift that is more
        than three pixels from this one.
    """
    shape = tuple(length + _MOST_SHIFT for length in own.shape[-2:])

    def spectrum(image: NDArray[np.floating]) -> NDArray[np.complexfloating]:
        return np.asarray(np.fft.rfft2(image, shape))

    def parts(image: Floats) -> tuple[NDArray[np.complexfloating], ...]:
        there = ~np.isnan(image)
        # Numbers near 0 lose no digits when they are squared.
        level = np.nanmean(image, axis=(-2, -1), keepdims=True)
        plain = np.where(there, image - level, 0).astype(np.float64)
        return spectrum(there.astype(np.float64)), spectrum(plain), spectrum(plain * plain)

    def summed(a: NDArray[np.complexfloating], b: NDArray[np.complexfloating]) -> NDArray[Any]:
        return np.asarray(np.fft.irfft2(a * b.conj(), shape))

    (m, x, xx), (k, y, yy) = parts(own), parts(usual)
    count = np.maximum(summed(m, k), 1)
    sx, sy = summed(x, k), summed(m, y)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = (summed(xx, k) - sx * sx / count) * (summed(m, yy) - sy * sy / count)
        found = (summed(x, y) - sx * sy / count) / np.sqrt(spread)
    found = np.where((count >= _least(own)) & (spread > 0), found, -1).mean(axis=0)
    near = np.arange(-_MOST_SHIFT, _MOST_SHIFT + 1)
    at = found[np.ix_(near, near)]
    down, right = np.unravel_index(int(at.argmax()), at.shape)
    far = np.maximum.outer(
        np.abs(np.arange(len(near)) - down), np.abs(np.arange(len(near)) - right)
    )
    elsewhere = float(at[far > _APART].max())
    return float(at.max()), int(near[down]), int(near[right]), elsewhere


def _in_words(down: int, right: int) -> str:
    words = []
    if down:
        words.append(f"{abs(down)} {'pixel' if abs(down) == 1 else 'pixels'} "
                     f"{'down' if down > 0 else 'up'}")  # fmt: skip
    if right:
        words.append(f"{abs(right)} {'pixel' if abs(right) == 1 else 'pixels'} to the "
                     f"{'right' if right > 0 else 'left'}")  # fmt: skip
    return " and ".join(words)

"""Radiometry checks: whether sampled pixels are plausible reflectance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date

import numpy as np
from numpy.typing import NDArray

from service.errors import ImplausibleReflectance, StackWarning
from service.grid import Window
from service.read.geotiff import BlockCache
from service.read.reader import StackReader
from service.read.stack import Stack

PLAUSIBLE = (-0.2, 1.6)
"""Between these lies the median of the clear values of any real scene, snow and glint included."""
BASELINE_CHANGE = date(2022, 1, 25)
"""From here on ESA's Sentinel-2 products (processing baseline 04.00) hold an offset of -0.1."""
_BRIGHT_RED = 0.15
_RED_OVER_NIR = 1.3
_BASELINE_STEP = 0.05
_DARK_PERCENTILE = 2
_LARGEST_UINT8 = 255
# Nothing on Earth is so dark in its brightest tenth.
_BRIGHT_PERCENTILE = 90
_NEVER_SO_DARK = 9.9e-5


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Some pixels of some dates, and how they were made into reflectance."""

    values: NDArray[np.float32]
    """(T, C, N) reflectance, NaN where missing."""
    valid: NDArray[np.bool_]
    """(T, N): True where usable."""
    dates: tuple[date, ...]
    """(T); empty for undated imagery."""
    bands: tuple[str, ...]
    """(C) by name."""
    scale: float
    offset: float
    integer: bool
    """Whether the files hold integers."""
    offset_known: bool
    """Whether the caller or a file said an offset."""


def judge(sample: Sample, wider: Sample | None = None) -> tuple[StackWarning, ...]:
    """Warnings about a sample; none where no pixel of it is clear.

    Args:
        sample: of the dates that a run uses.
        wider: of dates on both sides of the change of baseline, used or not: a run of the later
            ones alone shows no step, and needs the warning most. None where it is `sample`.

    Raises:
        ImplausibleReflectance: the median of the clear values is outside `PLAUSIBLE`.
    """
    if not sample.valid.any():
        return ()
    clear = sample.values.transpose(0, 2, 1)[sample.valid]
    _check_median(clear, sample)
    return (*_dark(clear, sample), *_swapped(sample), *_baseline(wider or sample))


def _check_median(clear: NDArray[np.float32], sample: Sample) -> None:
    median = float(np.median(clear))
    low, high = PLAUSIBLE
    if low <= median <= high:
        return
    stored = (median - sample.offset) / sample.scale
    raise ImplausibleReflectance(
        f"the median of the clear pixels sampled is {median:.4g}, outside {low} to {high}, with "
        f"scale {sample.scale:g} and offset {sample.offset:g} (stored: {stored:.6g}); "
        f"{_likely_fix(stored, sample)}"
    )


def _likely_fix(stored: float, sample: Sample) -> str:
    if stored < 0:
        return "missing pixels seem to hold a number that no nodata tag names, or offset is wrong"
    if PLAUSIBLE[0] <= stored <= PLAUSIBLE[1]:
        return "the numbers stored look like reflectance: give scale=1 and offset=0"
    if stored <= 100:
        return "if the numbers stored are percent, give scale=0.01"
    if stored <= _LARGEST_UINT8 and sample.integer:
        return "the numbers stored look like an 8-bit picture, which is no reflectance"
    if stored * 1e-4 <= PLAUSIBLE[1]:
        return "the numbers stored look like reflectance x 10000: give scale=0.0001"
    return "give the scale and offset that make reflectance of the numbers stored"


def _dark(clear: NDArray[np.float32], sample: Sample) -> Iterator[StackWarning]:
    """A scale applied twice, by the writer and by its tag, leaves next to nothing."""
    bright = float(np.percentile(np.abs(clear), _BRIGHT_PERCENTILE))
    if bright < _NEVER_SO_DARK:
        yield StackWarning(
            code="scale_suspected",
            detail=f"nine tenths of the clear values sampled lie below {bright:.2g}, with scale "
            f"{sample.scale:g}: the numbers stored may be reflectance already (then give scale=1), "
            "or missing pixels hold a number that no nodata tag names",
        )


def _band(sample: Sample, name: str) -> NDArray[np.float32]:
    return sample.values[:, sample.bands.index(name)]


def _swapped(sample: Sample) -> Iterator[StackWarning]:
    """Land is brighter in the near infrared than in red, and water is dark in both."""
    if not {"B04", "B08"} <= set(sample.bands):
        return
    red, nir = (_band(sample, name)[sample.valid] for name in ("B04", "B08"))
    share = float(np.mean((red > _BRIGHT_RED) & (red > _RED_OVER_NIR * nir)))
    if share > 0.5:
        yield StackWarning(
            code="bands_suspected_swapped",
            detail=f"red (B04) is far brighter than near infrared (B08) in {share:.0%} of the "
            "clear pixels sampled; check the order of the bands",
        )


def _baseline(sample: Sample) -> Iterator[StackWarning]:
    """Integers from both sides of the change, and the dark end rises as if by the offset."""
    band = next((name for name in ("B02", "B04") if name in sample.bands), None)
    if band is None or sample.offset_known or not sample.integer:
        return
    sides: dict[bool, list[float]] = {False: [], True: []}
    for day, values, valid in zip(sample.dates, _band(sample, band), sample.valid, strict=False):
        if valid.any():
            dark = float(np.percentile(values[valid], _DARK_PERCENTILE))
            sides[day >= BASELINE_CHANGE].append(dark)
    if not (sides[False] and sides[True]):
        return
    # Of each side the median over dates: one hazy date does not make a step.
    before, after = (float(np.median(sides[late])) for late in (False, True))
    if after - before > _BASELINE_STEP:
        yield StackWarning(
            code="baseline_offset_suspected",
            detail=f"the dark end of {band} rises from {before:.3f} before {BASELINE_CHANGE} to "
            f"{after:.3f} from then on: the later files seem to hold Sentinel-2's offset of "
            "-0.1 (baseline 04.00), which no file and no option says",
        )


_SAMPLED_DATES = 8
_SAMPLED_SIDE = 128
# Of a raster's height and width: its middle, and the middles of its quarters.
_SAMPLED_PLACES = ((0.5, 0.5), (0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75))


def check_radiometry(
    stack: Stack, used: Sequence[int] | None = None, *, cache: BlockCache | None = None
) -> tuple[StackWarning, ...]:
    """Look at a few places on a few dates: are the numbers reflectance at all?

    Args:
        stack: the stack.
        used: positions on its T axis that a run will use; None for all.
        cache: GDAL's block cache; None leaves it as it is.

    Returns:
        `bands_suspected_swapped`, `baseline_offset_suspected`, or nothing.

    Raises:
        ImplausibleReflectance: the median of the clear values is outside -0.2 to 1.6.
        CorruptRaster: a file does not decode.
    """
    positions = sorted(range(stack.observations) if used is None else used)
    if not positions:
        return ()
    sample = _sample(stack, _sampled_dates(stack, positions), cache)
    beyond = _other_side(stack, positions)
    if not beyond or not sample.integer or stack.offset_known:
        return judge(sample)
    wider = _sample(stack, beyond, cache)
    return judge(
        sample,
        replace(
            sample,
            values=np.concatenate([sample.values, wider.values]),
            valid=np.concatenate([sample.valid, wider.valid]),
            dates=sample.dates + wider.dates,
        ),
    )


def _sample(stack: Stack, positions: Sequence[int], cache: BlockCache | None) -> Sample:
    """A few places of these dates."""
    with StackReader(stack, positions, cache=cache) as reader:
        parts = [reader.read(window) for window in _sampled_windows(stack)]
    T, C = len(positions), len(stack.bands)
    return Sample(
        values=np.concatenate([part.values.reshape(T, C, -1) for part in parts], axis=2),
        valid=np.concatenate([part.valid.reshape(T, -1) for part in parts], axis=1),
        dates=tuple(stack.dates[t] for t in positions) if stack.dates else (),
        bands=stack.bands,
        scale=stack.scale,
        offset=stack.offset,
        integer=all(
            plane.integer for acquisition in stack.acquisitions for plane in acquisition.planes
        ),
        offset_known=stack.offset_known,
    )


def _sides(stack: Stack, positions: Sequence[int]) -> tuple[list[int], list[int]]:
    """The positions before the change of baseline, and those from then on."""
    late = [t for t in positions if stack.dates and stack.dates[t] >= BASELINE_CHANGE]
    return [t for t in positions if t not in set(late)], late


def _sampled_dates(stack: Stack, positions: Sequence[int]) -> list[int]:
    """A few positions, evenly spread, and where the baseline changes as many from each side."""
    early, late = _sides(stack, positions)
    if not (early and late):
        return _spread(positions, _SAMPLED_DATES)
    return _spread(early, _SAMPLED_DATES // 2) + _spread(late, _SAMPLED_DATES // 2)


def _other_side(stack: Stack, used: Sequence[int]) -> list[int]:
    """A few dates from the side of the change of baseline on which no date is used."""
    used_sides = _sides(stack, used)
    all_sides = _sides(stack, range(stack.observations))
    if all(used_sides) or not stack.dates:
        return []
    other = all_sides[0] if used_sides[1] else all_sides[1]
    return _spread(other, _SAMPLED_DATES // 2)


def _spread(positions: Sequence[int], n: int) -> list[int]:
    """At most `n` of the positions, the middles of equal stretches."""
    n = min(n, len(positions))
    return [positions[(2 * i + 1) * len(positions) // (2 * n)] for i in range(n)]


def _sampled_windows(stack: Stack) -> list[Window]:
    """Small windows spread over the raster; one of all of it where it is small."""
    height, width = stack.grid.height, stack.grid.width
    if max(height, width) <= 2 * _SAMPLED_SIDE:
        return [Window(0, 0, width, height)]
    places = {
        (
            _sampled_stretch(down, height, stack.block[0]),
            _sampled_stretch(right, width, stack.block[1]),
        )
        for down, right in _SAMPLED_PLACES
    }
    return [Window(left, top, columns, rows) for (top, rows), (left, columns) in sorted(places)]


def _sampled_stretch(place: float, size: int, block: int) -> tuple[int, int]:
    """Start and length of a stretch about a place of an axis, within one block where it fits."""
    length = min(_SAMPLED_SIDE, size)
    middle = int(place * size)
    first = middle // block * block
    start = middle - length // 2
    if block >= length:
        start = min(max(start, first), first + block - length)
    return min(max(start, 0), size - length), length

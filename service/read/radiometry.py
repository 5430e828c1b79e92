"""Radiometry: checks and corrections of scale and offset by sampled pixels, date by date.

    stack → sample of the stored numbers → checks and corrections by file → calibrated stack

If no file states Sentinel-2's offset or the number of missing pixels, the pixels determine them. If
the pixels contradict a tag, the pixels take precedence. A warning reports each correction.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from hashlib import blake2b
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from models.formulas import median_of_dates
from service.errors import ImplausibleReflectance, StackWarning, first_names
from service.grid import Window
from service.read import alignment, clouds, gain
from service.read.geotiff import BlockCache
from service.read.reader import StackReader
from service.read.reflectance import BASELINE_OFFSET, GIVEN, days_in_words
from service.read.stack import Acquisition, MaskPlane, Plane, Stack

Floats = NDArray[np.float32]
PLAUSIBLE = (-0.2, 1.6)
"""Limits of the median of clear values in any real scene, including snow and sun glint."""
BASELINE_CHANGE = date(2022, 1, 25)
"""First day of ESA's Sentinel-2 products with an offset of -0.1 (processing baseline 04.00)."""
_BRIGHT_RED = 0.15
_RED_OVER_NIR = 1.3
_DARK_PERCENTILE = 2
# Thresholds of a date's dark end, the 2nd percentile of its clear blue and red. Without
# Sentinel-2's offset in the values, vegetation, water and shadow are below the first threshold;
# with it, no pixel is. With the offset, most dates are below the second threshold; dates above it
# are bright for another reason: clouds, snow, desert.
_NO_LONGER_DARK = 0.09
_STILL_DARK = 0.17
# If an offset is subtracted that the values do not contain, a quarter of the pixels is below this.
_TOO_DARK = -0.02
_SHARE_OF_DATES = 0.25
# Two dates show the same land under a clear sky if their pixels differ only by a constant, as
# measured by the correlation of red, the ratio of the interquartile ranges, and the interquartile
# range of the differences. docs/decisions/offset-by-pixels.md has how many real dates pass.
_ALIKE_CORRELATION = 0.6
_ALIKE_SPREAD = 1.7
_ALIKE_NOISE = 0.045
_ALIKE_PIXELS = 50
_ALIKE_DATES = 8
_OFFSET_TOLERANCE = 0.03
# The dark end of blue and of red of a date with the offset lies 0.1 above that of the dates near
# it. A date that misses this by more than the first distance is not corrected; one that misses it
# by more than the second is not warned of either.
_DOUBTFUL_TOLERANCE = 0.04
# With the offset, no pixel is below 0.1, except for reflectance below 0. Clouds hide the dark end
# of clear pixels, but their shadows show it: a few of all pixels, also cloudy ones, are enough.
_BELOW_THE_OFFSET = 0.085
_DARKEST_PIXELS = 3
# A date of which the mask leaves fewer pixels hardly counts, and its dark end may be a cloud.
_CLEAR_ENOUGH = 0.1
# Haze takes more of the contrast of red, by its interquartile range, than another season does, and
# clouds among land add to it.
_USUAL_CONTRAST = np.array([0.31, 3.0])
# Vegetation over all of a raster has less contrast than that, but its darkest pixels lie close to
# 0, so that with the offset they lie close to 0.1 in both bands, which haze rarely makes them do.
_GREEN_CONTRAST = np.array([0.1, 3.0])
_AT_THE_OFFSET = 0.112
# 0.1 in all bands lowers NDVI, which returns to that of dates near it if 0.1 is subtracted. Of few
# real dates without the offset does less of the difference remain. Such a date is named also if
# haze lifts its dark end further than the offset does, up to this distance.
_NDVI_RESTORED = 0.4
_HAZY_TOLERANCE = 0.08
# With the offset, the dark end of a date lies at least this far above that of dates near it.
_LEAST_RISE = 0.05
# Haze and thin clouds brighten some dates that have no offset. If a larger share of dates is
# bright, the offset is the likely reason.
_SHARE_OF_RAISED = 0.3
_BRIGHT_IN_ITSELF = 0.3
_STATEMENTS = ("the tag", "processing baseline")
"""Beginnings of the sources by which a file states that its values hold no offset."""
# Haze over a few fields is as even as the offset (docs/decisions/offset-by-pixels.md).
_ENOUGH_TO_APPLY = 400
# One or two hazy dates may lie 0.1 above one date near them. If there is a choice of dates without
# the offset, this many of them must confirm each date.
_ENOUGH_TO_CONFIRM = 4
_CONFIRMED_BY = 2
_MANY_DATES = 3
_MANY_PIXELS = 10_000
_LARGEST_UINT8 = 255
_LARGEST_UINT16 = 65_535
# The brightest tenth of any land is brighter than this.
_BRIGHT_PERCENTILE = 90
_NEVER_SO_DARK = 9.9e-5
# Of no real date or patch of land is the brightest tenth of the near infrared below 0.16.
_NO_LAND_SO_DARK = 0.1
# Only snow and clouds are brighter than this over a whole raster.
_NEVER_ALL_SO_BRIGHT = 0.7
# A date is in smaller units if its brightest tenth is below this share of the other dates'
# brightest tenth, and below this reflectance.
_DARKER_THAN_OTHERS = 1 / 8
_DARK_DATE = 0.05
# A date is in larger units if its brightest tenth is above this multiple of the other dates'
# brightest tenth, and above this reflectance, which clouds and snow do not reach.
_BRIGHTER_THAN_OTHERS = 4
_BRIGHT_DATE = 1.3
# A number that all bands of a pixel have at once means missing if it fills more than the first
# share of the pixels, at least that number of pixels, and less than the last share.
_FILL_SHARE = 0.005
_FILL_PIXELS = 8
_NOT_FILL_SHARE = 0.95
_TAG_IN_USE = 0.05
# Dark land that was clipped at 0 has many pixels just above 0: more than 0.4 of those at 0 on real
# scenes. A number that means missing has hardly any beside it.
_NEXT_TO_FILL = 0.01
_CLIPPED_SHARE = 0.1
_NEGATIVE_SHARE = 0.1
_FEWEST_CLEAR = 20
# The mask misses the clouds of a date on which this share of the pixels is as bright as clouds, and
# of which it marks hardly any. docs/decisions/cloud-mask.md has the share on real clear dates.
_CLOUDY_SHARE = 0.2
_HARDLY_MARKED = 0.02
# Clouds cover neighbours: the pixel sampled after one as bright as clouds mostly is so as well.
_CLOUD_BESIDE = 0.7
# A mask of several dates is inverted if what it leaves is bright this much more often than what it
# marks. On the fewest dates below, real masks of mostly cloudy series are the other way round.
_INVERTED_RATIO = 4
_FEWEST_TO_INVERT = 4
_NAMED_DATES = 12
# Two bands by which images are compared: the first ones that are there, red first, in which clouds
# are bright.
_COMPARED = ("B04", "B08", "B03", "B02")
_SAMPLED_MASKS = 16
_SAMPLED_DATES = 8
_SAMPLED_SIDE = 128
# Number of pixels sampled over all dates: percentiles of more would take longer than reading them.
_SAMPLED_PIXELS = 2**17
# Positions of samples as shares of height and width: the middle, and the middles of the quarters.
_SAMPLED_PLACES = ((0.5, 0.5), (0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75))


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Sampled pixels of each used date, as stored, and the planes with their scale and offset."""

    stored: Floats
    """(T, C, N) numbers as stored in the files, NaN where missing."""
    valid: NDArray[np.bool_]
    """(T, N): True where usable."""
    positions: tuple[int, ...]
    """(T) on the stack's T axis."""
    dates: tuple[date, ...]
    """(T); empty for undated imagery."""
    bands: tuple[str, ...]
    """(C) by name."""
    planes: tuple[tuple[Plane, ...], ...]
    """(T, C) of the first acquisition of each date."""
    places: tuple[tuple[int, ...], ...]
    """(T, …) the place in the raster of each part of the N axis; all parts have one length."""
    pictures: Floats
    """(T, K, B, h, w) the middle of each date's K places, of the bands `compared`, as stored; NaN
    where missing or not clear."""
    compared: tuple[int, ...]
    """(B) positions on the C axis of the bands by which images are compared."""

    def shared(self, t: int, u: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Positions on the N axis of two dates (n) of the same pixels, valid on both dates."""
        length = self.valid.shape[1] // len(self.places[t])
        common = [place for place in self.places[t] if place in self.places[u]]
        own, other = (
            np.concatenate(
                [np.arange(length) + self.places[date].index(place) * length for place in common]
                or [np.empty(0, np.intp)]
            )
            for date in (t, u)
        )
        both = self.valid[t, own] & self.valid[u, other]
        return own[both], other[both]

    def values(self) -> Floats:
        """Reflectance (T, C, N) float32, unitless."""
        scale = np.array([[p.scale for p in own] for own in self.planes], np.float32)
        offset = np.array([[p.offset for p in own] for own in self.planes], np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(self.stored * scale[:, :, None] + offset[:, :, None])

    def by_place(self) -> list[list[tuple[int, int]]]:
        """For each place in order: its dates, each with the place's number on that date."""
        found: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for t, places in enumerate(self.places):
            for k, place in enumerate(places):
                found[place].append((t, k))
        return [found[place] for place in sorted(found)]

    def picture(self, t: int, k: int) -> Floats:
        """Reflectance (B, h, w) of one of the pictures of a date."""
        planes = [self.planes[t][c] for c in self.compared]
        own, found = self.pictures[t, k], np.empty(self.pictures.shape[2:], np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            for b, plane in enumerate(planes):
                found[b] = own[b] * np.float32(plane.scale) + np.float32(plane.offset)
                if plane.nodata is not None:  # also a number that was found to mean missing
                    found[b][own[b] == plane.nodata] = np.nan
        return np.where(np.isfinite(found), found, np.float32(np.nan))

    def name(self, t: int) -> str:
        """File and day of a date, for messages."""
        day = f" ({self.dates[t]})" if self.dates else ""
        return f"'{self.planes[t][0].source.name}'{day}"

    def names(self, ts: Sequence[int]) -> str:
        """Files of several dates, for messages: two names and the number of others."""
        more = f" and {len(ts) - 2} more" if len(ts) > 2 else ""
        return ", ".join(self.name(t) for t in ts[:2]) + more

    def when(self, ts: Sequence[int]) -> str:
        """Several dates, for messages."""
        if not self.dates:
            return self.names(ts)
        return days_in_words([self.dates[t] for t in ts])

    def corrected(self, ts: Sequence[int], change: Callable[[Plane], Plane]) -> Sample:
        """The sample with the planes of some dates changed."""
        chosen = set(ts)
        return replace(
            self,
            planes=tuple(
                tuple(map(change, own)) if t in chosen else own for t, own in enumerate(self.planes)
            ),
        )


def calibrate(
    stack: Stack,
    used: Sequence[int] | None = None,
    *,
    cache: BlockCache | None = None,
    before_read: Callable[[], None] = lambda: None,
) -> Stack:
    """Check the files' scale, offset and nodata by sampled pixels of each date, and correct them.

    Args:
        stack: the stack.
        used: positions on the stack's T axis that a run will use; None for all.
        cache: GDAL's block cache; None does not change it.
        before_read: called before a part of a file is read; an exception that it raises ends the
            sampling.

    Returns:
        The stack with corrected scale, offset and nodata of its planes, and any of the warnings
        `offset_applied`, `baseline_offset_suspected`, `scale_suspected`, `nodata_assumed`,
        `nodata_suspected`, `bands_suspected_swapped`, `pixels_repeated`, `mask_doubted`,
        `shift_suspected`, `mask_assumed`.

    Raises:
        ImplausibleReflectance: the median of the clear values, of all dates or of one, is outside
            -0.2 to 1.6.
        CorruptRaster: a file does not decode.
    """
    positions = sorted(range(stack.observations) if used is None else used)
    if not positions:
        return stack
    stack, warnings = _decoded_by_numbers(stack, positions, cache, before_read)
    sample = _sample(stack, positions, cache, before_read)
    for correct in (_fill, _fill_of_bands, _scaled_already, _not_in_the_pixels, unstated_offset):
        sample, more = correct(sample)
        warnings += more
    warnings += _denied_offset(sample)
    if sample.valid.any():
        values = sample.values()
        clear = values.transpose(0, 2, 1)[sample.valid]
        _check_medians(sample, values, clear)
        warnings += [
            *_dark(sample, clear),
            *_darker_than_land(sample, clear),
            *_like_landsat(sample, clear),
            *_normalised(sample, values, clear),
            *_largest_numbers(sample),
            *_other_units(sample, values),
            *_other_gain(stack, sample, values),
            *_swapped(sample, values, clear),
            *_repeated(sample),
            *_mask_doubted(stack, sample, values),
            *_moved(stack, sample),
        ]
    corrected = _with_planes(stack, sample)
    stated = _offsets_in_words(corrected, positions)
    return replace(corrected, warnings=(*stack.warnings, *stated, *warnings))


def _decoded_by_numbers(
    stack: Stack,
    positions: Sequence[int],
    cache: BlockCache | None,
    before_read: Callable[[], None],
) -> tuple[Stack, list[StackWarning]]:
    """The stack with masks decoded by another meaning of their numbers, if the numbers have it."""
    some = {positions[n] for n in np.linspace(0, len(positions) - 1, _SAMPLED_MASKS).astype(int)}
    masks: dict[str, list[MaskPlane]] = defaultdict(list)
    for acquisition in stack.acquisitions:
        for mask in acquisition.masks:
            if mask.alternative and acquisition.observation in some:
                masks[mask.alternative.words].append(mask)
    warnings = []
    for words, own in masks.items():
        numbers = _numbers_of(stack, own, cache, before_read)
        other = own[0].alternative
        if other is None or not other.fits(numbers):
            continue
        stack = _with_alternative(stack, words)
        files = first_names([_quoted(mask) for mask in own], 2)
        detail = (
            f"the numbers of the cloud mask in {files} {words}: "
            "give mask=none or mask=cloud if this is wrong"
        )
        warnings.append(StackWarning(code="mask_assumed", detail=detail))
    return stack, warnings


def _quoted(mask: MaskPlane) -> str:
    """The file of a mask, for messages."""
    return f"'{mask.plane.source.name}'"


def _numbers_of(
    stack: Stack,
    masks: Sequence[MaskPlane],
    cache: BlockCache | None,
    before_read: Callable[[], None],
) -> Floats:
    """The numbers of masks at the sampled places, (places, masks, 1, h, w); 0 may be NaN."""
    plain = replace(
        stack,
        bands=("mask",),
        cloud_bands=None,
        acquisitions=tuple(
            Acquisition(observation=n, planes=(mask.plane,)) for n, mask in enumerate(masks)
        ),
    )
    with StackReader(_as_stored(plain), cache=cache, before_read=before_read) as reader:
        return np.stack([reader.read(window).values for window in _sampled_windows(stack)])


def _with_alternative(stack: Stack, words: str) -> Stack:
    """The stack whose masks of an alternative are decoded by it."""

    def decoded(mask: MaskPlane) -> MaskPlane:
        other = mask.alternative
        return replace(mask, clear=other.clear) if other and other.words == words else mask

    return replace(
        stack,
        acquisitions=tuple(
            replace(acquisition, masks=tuple(map(decoded, acquisition.masks)))
            for acquisition in stack.acquisitions
        ),
    )


def _with_planes(stack: Stack, sample: Sample) -> Stack:
    """The stack with the corrections that were made to the sample."""
    before = _first_planes(stack)
    after = dict(zip(sample.positions, sample.planes, strict=True))
    acquisitions = []
    for acquisition in stack.acquisitions:
        t = acquisition.observation
        if after.get(t, before[t]) != before[t]:
            planes = tuple(map(_as_first, acquisition.planes, before[t], after[t]))
            acquisition = replace(acquisition, planes=planes)
        acquisitions.append(acquisition)
    first = acquisitions[0].planes[0]
    return replace(stack, acquisitions=tuple(acquisitions), scale=first.scale, offset=first.offset)


def _as_first(own: Plane, before: Plane, after: Plane) -> Plane:
    """A plane with the correction of the date's first granule, if both state the same."""
    if _states(own) != _states(before):
        return replace(own, nodata=after.nodata)
    return replace(
        own,
        nodata=after.nodata,
        scale=after.scale,
        offset=after.offset,
        scale_source=after.scale_source,
        offset_source=after.offset_source,
    )


def _first_planes(stack: Stack) -> dict[int, tuple[Plane, ...]]:
    """The planes of the first granule of each observation."""
    first: dict[int, tuple[Plane, ...]] = {}
    for acquisition in stack.acquisitions:
        first.setdefault(acquisition.observation, acquisition.planes)
    return first


def _states(plane: Plane) -> tuple[object, ...]:
    return plane.scale, plane.offset, plane.scale_source, plane.offset_source


# Corrections ------------------------------------------------------------------------------------

_Corrected = tuple[Sample, list[StackWarning]]


def _fill(sample: Sample) -> _Corrected:
    """Detect a number that means missing pixels but is not in a nodata tag."""
    found: dict[float, int] = Counter()
    places: dict[float, list[int]] = defaultdict(list)
    for t, stored in enumerate(sample.stored):
        flat = stored[0][(stored == stored[0]).all(axis=0)]
        numbers, counts = np.unique(flat, return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            enough = count >= max(_FILL_PIXELS, _FILL_SHARE * stored.shape[1])
            if enough and _never_reflectance(number, sample.planes[t][0]):
                found[number] += count
                places[number].append(t)
    present = int((~np.isnan(sample.stored[:, 0])).sum())
    if not found or sum(found.values()) > _NOT_FILL_SHARE * present:
        return sample, []
    # A plane has one nodata number. A second such number is rare; its values remain and are then
    # rejected as implausible.
    number = max(found, key=lambda n: found[n])
    ts, plane = places[number], sample.planes[0][0]
    filled = (
        f"{number:g} fills all bands of {found[number] / present:.1%} of the pixels sampled, in "
        f"{sample.names(ts)}, and "
    )
    gaps = np.isnan(sample.stored).any(axis=1).sum(axis=1)
    fills = (sample.stored == number).all(axis=1).sum(axis=1)
    # A file has one nodata number. That of its tag is not in use if it marks hardly any pixel.
    tagged = [any(p.nodata not in {None, number} for p in own) for own in sample.planes]
    in_use = [
        bool(tag and gap > _TAG_IN_USE * fill)
        for tag, gap, fill in zip(tagged, gaps, fills, strict=True)
    ]
    warnings = []
    if kept := [t for t in ts if in_use[t]]:
        detail = (
            f"{filled}the nodata tag names another number, which is in use as well in "
            f"{sample.names(kept)}: correct the tag, or mask the pixels"
        )
        warnings.append(StackWarning(code="nodata_suspected", detail=detail))
    if len(kept) == len(ts):
        return sample, warnings
    native = int(number) if number.is_integer() and plane.integer else number
    changed = [
        t for t in range(len(sample.planes)) if not in_use[t] and (fills[t] or not tagged[t])
    ]
    sample = sample.corrected(changed, lambda p: replace(p, nodata=native))
    gone = np.zeros(sample.valid.shape, np.bool_)
    gone[changed] = (sample.stored[changed] == number).any(axis=1)
    sample = replace(
        sample,
        stored=np.where(gone[:, None], np.float32(np.nan), sample.stored),
        valid=sample.valid & ~gone,
    )
    tag = "no nodata tag names it"
    if any(tagged[t] for t in ts):
        tag = "the nodata tag names another number, which is not in use"
    detail = (
        f"{filled}{tag}, so these pixels count as missing: record the number with "
        f"`gdal_edit.py -a_nodata {number:g} FILE`"
    )
    return sample, [*warnings, StackWarning(code="nodata_assumed", detail=detail)]


def _fill_of_bands(sample: Sample) -> _Corrected:
    """Detect numbers that mean missing in one band of pixels whose other bands hold values.

    Such a number is the smallest of its band, fills many pixels, and has hardly any number just
    above it, unlike land so dark that it was clipped.
    """
    seen = ~np.isnan(sample.stored[:, 0])
    present = np.maximum(seen.sum(axis=1), 1)
    scale = np.array([[plane.scale for plane in own] for own in sample.planes], np.float32)
    lowest = np.where(seen[:, None], sample.stored, np.float32(np.inf)).min(axis=2)
    with np.errstate(invalid="ignore"):  # dates without any value
        above = sample.stored - lowest[:, :, None]
    some = ~(sample.stored == sample.stored[:, :1]).all(axis=1)  # all bands: `_fill`
    count = ((above == 0) & some[:, None]).sum(axis=2)
    beside = ((above > 0) & (above <= (_NEXT_TO_FILL / scale)[:, :, None])).sum(axis=2)
    many = count >= np.maximum(_FILL_PIXELS, _FILL_SHARE * present)[:, None]
    alone = beside <= _CLIPPED_SHARE * count
    found: dict[tuple[int, float], list[int]] = defaultdict(list)
    for t, c in np.argwhere(many & alone):
        number = float(lowest[t, c])
        if number == 0 or _never_reflectance(number, sample.planes[t][c]):
            found[int(c), number].append(int(t))
    if not found:
        return sample, []
    warnings = []
    stored, valid, planes = sample.stored.copy(), sample.valid.copy(), list(sample.planes)
    for (c, number), ts in found.items():
        share = float((count[:, c] / present)[ts].max())
        filled = f"{number:g} is in {sample.bands[c]} of up to {share:.1%} of the pixels sampled, "
        # A band has one nodata number. That of its tag is not in use if no pixel is missing.
        tagged = [t for t in ts if planes[t][c].nodata is not None and not seen[t].all()]
        if tagged:
            detail = (
                f"{filled}in {sample.names(tagged)}, and the nodata tag names another number, "
                "which is in use as well: correct the tag, or mask the pixels"
            )
            warnings.append(StackWarning(code="nodata_suspected", detail=detail))
        if len(tagged) == len(ts):
            continue
        native = int(number) if number.is_integer() and planes[ts[0]][c].integer else number
        # Parts that are not sampled may hold it on other dates too, if dark land does not.
        clipped = (lowest[:, c] == number) & ~alone[:, c]
        for t in set(ts) - set(tagged) | {
            t for t, own in enumerate(planes) if own[c].nodata is None and not clipped[t]
        }:
            planes[t] = tuple(
                replace(plane, nodata=native) if n == c else plane
                for n, plane in enumerate(planes[t])
            )
            gone = stored[t, c] == number
            stored[t][:, gone] = np.nan
            valid[t] &= ~gone
        detail = (
            f"{filled}in {sample.names([t for t in ts if t not in tagged])}, though their other "
            "bands hold values, and no nodata tag in use names it, so these pixels count as "
            f"missing: record the number with `gdal_edit.py -a_nodata {number:g} FILE`"
        )
        warnings.append(StackWarning(code="nodata_assumed", detail=detail))
    return replace(sample, stored=stored, valid=valid, planes=tuple(planes)), warnings


def _never_reflectance(number: float, plane: Plane) -> bool:
    """Whether a number in all bands of many pixels is a nodata number and not a measurement.

    So is what remains of 0 if Sentinel-2's offset is subtracted from missing pixels as well.
    """
    low, high = PLAUSIBLE
    reflectance = number * plane.scale + plane.offset
    shifted = math.isclose(reflectance, BASELINE_OFFSET, abs_tol=1e-6)
    return number in {-1.0, 1.0} or shifted or not low <= reflectance <= high


def _scaled_already(sample: Sample) -> _Corrected:
    """Detect floats that are reflectance already but have the scale and offset of integers."""
    ts = [
        t
        for t, stored in enumerate(sample.stored)
        if _stated_by_file(sample.planes[t][0])
        and sample.valid[t].any()
        and _bright(stored[:, sample.valid[t]]) <= PLAUSIBLE[1]
        and _bright(stored[:, sample.valid[t]] * sample.planes[t][0].scale) < 1e-3
    ]
    if not ts:
        return sample, []
    plane = sample.planes[ts[0]][0]
    detail = (
        f"the numbers stored in {sample.names(ts)} are reflectance already, so scale "
        f"{plane.scale:g} and offset {plane.offset:g} ({plane.scale_source}) are not applied; "
        "give `scale` and `offset` to apply them, or scale=1 to confirm"
    )
    sample = sample.corrected(ts, _plain)
    return sample, [StackWarning(code="scale_suspected", detail=detail)]


def _plain(plane: Plane) -> Plane:
    source = "the pixels"
    return replace(plane, scale=1.0, offset=0.0, scale_source=source, offset_source=source)


def _stated_by_file(plane: Plane) -> bool:
    return not plane.integer and plane.scale != 1 and plane.scale_source not in {None, GIVEN}


def _bright(values: Floats) -> float:
    return float(np.percentile(np.abs(values), _BRIGHT_PERCENTILE))


def _dark_bands(sample: Sample) -> list[int]:
    """The bands by whose dark end the offset is detected: those in which vegetation is dark."""
    return [sample.bands.index(name) for name in ("B02", "B04") if name in sample.bands]


def _percentiles(sample: Sample, *qs: float) -> NDArray[np.float64]:
    """Percentiles of the clear reflectance of the dark bands (Q, T, 2), by date.

    NaN for a date without enough clear pixels.
    """
    return _by_date(sample.values()[:, _dark_bands(sample)], sample.valid, *qs)


def _by_date(values: Floats, valid: NDArray[np.bool_], *qs: float) -> NDArray[np.float64]:
    """Percentiles of the clear values of each date and band, as `np.percentile` defines them.

    All dates are sorted by one call: a call of `np.percentile` for each date takes longer than
    reading a small raster.

    Args:
        values: numbers (T, C, N), not NaN where `valid`.
        valid: usable pixels (T, N).
        qs: the percentiles (Q), 0 to 100.

    Returns:
        (Q, T, C), NaN for a date with fewer than `_FEWEST_CLEAR` usable pixels.
    """
    ordered = np.sort(np.where(valid[:, None], values, np.float32(np.inf)), axis=2)
    counts = valid.sum(axis=1)
    dates = np.flatnonzero(counts >= _FEWEST_CLEAR)
    last = counts[dates] - 1
    found = np.full((len(qs), *values.shape[:2]), np.nan)
    for n, q in enumerate(qs):
        at = last * (q / 100)
        below = np.floor(at).astype(np.intp)
        lower = ordered[dates, :, below].astype(np.float64)
        upper = ordered[dates, :, np.minimum(below + 1, last)].astype(np.float64)
        found[n, dates] = lower + (upper - lower) * (at - below)[:, None]
    return found


def _by_date_of_all_bands(values: Floats, valid: NDArray[np.bool_], q: float) -> dict[int, float]:
    """A percentile of the clear values of all bands together, by position of the date.

    Args:
        values: numbers (T, C, N), not NaN where `valid`.
        valid: usable pixels (T, N).
        q: the percentile, 0 to 100.

    Returns:
        The percentile of each date with at least `_FEWEST_CLEAR` usable pixels.
    """
    (found,) = _by_date(values.reshape(len(values), 1, -1), np.tile(valid, (1, values.shape[1])), q)
    enough = np.flatnonzero(valid.sum(axis=1) >= _FEWEST_CLEAR)
    return dict(zip(enough.tolist(), found[enough, 0].tolist(), strict=True))


def _not_in_the_pixels(sample: Sample) -> _Corrected:
    """Detect an offset that a file states although it was applied to the pixels already."""
    groups: dict[tuple[float, str], list[int]] = defaultdict(list)
    for t, (plane, *_) in enumerate(sample.planes):
        if plane.offset < 0 and plane.offset_source not in {None, GIVEN} and _dark_bands(sample):
            groups[plane.offset, str(plane.offset_source)].append(t)
    if not groups:
        return sample, []
    quarter, dark = _percentiles(sample, 25, _DARK_PERCENTILE)
    warnings = []
    for (offset, source), ts in groups.items():
        against = [t for t in ts if (quarter[t] < _TOO_DARK).all()]
        # If the offset is subtracted correctly, the dark end of a date lies near 0.
        in_favour = [t for t in ts if t not in against and (dark[t] > _TOO_DARK).all()
                     and (dark[t] < _STILL_DARK + offset).all()]  # fmt: skip
        if len(against) < max(1, _SHARE_OF_DATES * len(ts)):
            continue
        without = against if len(in_favour) > len(against) else ts
        sample = sample.corrected(
            without, lambda p: replace(p, offset=0.0, offset_source="the pixels")
        )
        detail = (
            f"offset {offset:g} ({source}) is not applied to {sample.when(without)}, because blue "
            "and red of most pixels would be negative: the offset seems to have been applied to "
            f"{sample.names(without)} before; give `offset` to decide"
        )
        warnings.append(StackWarning(code="baseline_offset_suspected", detail=detail))
    return sample, warnings


def unstated_offset(sample: Sample) -> _Corrected:
    """Detect Sentinel-2's offset in files that do not state it, by the dark end of blue and red."""
    ts = [t for t, (plane, *_) in enumerate(sample.planes) if _may_hold_offset(plane)]
    bands = _dark_bands(sample)
    if not ts or not bands:
        return sample, []
    dark, *quartiles = _percentiles(sample, _DARK_PERCENTILE, 25, 75)
    contrast = np.subtract(*reversed(quartiles))[:, -1]
    warnings: list[StackWarning] = []
    without = np.flatnonzero((dark < _NO_LONGER_DARK).any(axis=1)).tolist()
    rise = _rise(sample, dark, without)
    # NDVI decides about no other dates.
    close = (np.abs(rise + BASELINE_OFFSET) <= _HAZY_TOLERANCE).all(axis=1)
    left = _ndvi_left(sample, without, np.flatnonzero(close).tolist())
    above = _above_near(sample, rise, contrast, without, left)
    for late in (False, True):
        side = [t for t in ts if (_is_late(sample, t)) is late]
        known = [t for t in side if np.isfinite(dark[t]).all()]
        if not known:
            continue
        low = [t for t in known if t in without]
        raised = [t for t in known if t not in low and (dark[t] <= _STILL_DARK).all()]
        # The dark end of few pixels on few dates may be a bright field, or haze.
        large = any(sample.valid[t].sum() >= _MANY_PIXELS for t in raised)
        sure = len(raised) >= _MANY_DATES or (late and large)
        level = f"the dark end of {' and '.join(sample.bands[c] for c in bands)}"
        median = float(np.median(dark[known][:, 0]))
        if not low and sure and len(raised) >= _SHARE_OF_DATES * len(known) and len(bands) > 1:
            lowest = float(dark[raised].min())
            source = f"the pixels: {level} is at least {lowest:.2f} on every date"
            sample = sample.corrected(side, _with_offset(source))
            continue
        others = [t for t in known if t not in low]
        probable = [
            t
            for t in others
            if above[t] <= _OFFSET_TOLERANCE and sample.valid[t].sum() >= _ENOUGH_TO_APPLY
        ]
        with_offset = _above_others(sample, without, probable)
        if with_offset:  # some of the other dates may have the offset as well
            source = "the pixels: blue and red lie 0.1 above those of other dates"
            sample = sample.corrected(with_offset, _with_offset(source))
            raised = [t for t in others if t not in with_offset]
        limits = np.where(left <= _NDVI_RESTORED, _HAZY_TOLERANCE, _DOUBTFUL_TOLERANCE)
        doubtful = [t for t in others if t not in with_offset and above[t] <= limits[t]]
        unlike_land = -BASELINE_OFFSET < median < _BRIGHT_IN_ITSELF
        all_raised = not low and not with_offset and (bool(raised) or unlike_land)
        few = 0 if with_offset else max(2, _SHARE_OF_RAISED * len(known))
        risen = any((rise[t] >= _LEAST_RISE).all() for t in others)
        some_raised = (low or with_offset) and len(raised) > few and risen
        if not some_raised and doubtful:
            raised = doubtful
        if some_raised or doubtful or (all_raised and (late or large or len(known) > 1)):
            which = raised or known
            detail = (
                f"{level} is {float(np.median(dark[which].min(axis=1))):.2f} on "
                f"{sample.when(which)}: {sample.names(which)} may hold Sentinel-2's offset of -0.1 "
                "(processing baseline 04.00 and later). Neither a tag nor a file name states it, "
                "so it is not applied: give offset=-0.1, from a date on as in "
                "offset=2022-01-25:-0.1, or offset=0 to confirm"
            )
            warnings.append(StackWarning(code="baseline_offset_suspected", detail=detail))
    return sample, warnings


def _denied_offset(sample: Sample) -> Iterator[StackWarning]:
    """Warn of dates that look as with Sentinel-2's offset though their files state the contrary.

    The statement counts, because haze on every date is possible; a few dates are not judged.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for t, (plane, *_) in enumerate(sample.planes):
        source = plane.offset_source or ""
        # Neither the request's 0, nor that of other sensors, nor what the pixels showed.
        if source.startswith(_STATEMENTS) and plane.offset == 0:
            groups[source].append(t)
    bands = _dark_bands(sample)
    if not groups or len(bands) < 2:
        return
    dark = _percentiles(sample, _DARK_PERCENTILE)[0]
    for source, ts in groups.items():
        known = [t for t in ts if np.isfinite(dark[t]).all()]
        raised = [t for t in known if (dark[t] <= _STILL_DARK).all()]
        low = any((dark[t] < _NO_LONGER_DARK).any() for t in known)
        if low or len(raised) < max(_MANY_DATES, _SHARE_OF_DATES * len(known)):
            continue
        yield StackWarning(
            code="baseline_offset_suspected",
            detail=f"the dark end of {' and '.join(sample.bands[c] for c in bands)} is at least "
            f"{float(dark[raised].min()):.2f} on {sample.when(known)}, as with Sentinel-2's offset "
            f"of -0.1, but {source} states that {sample.names(known)} do not hold it, "
            "so it is not applied: give offset=-0.1 if they do, or offset=0 to confirm",
        )


def _near(sample: Sample, t: int, without: Sequence[int]) -> list[int]:
    """The positions of the dates without the offset that are nearest to a date in time."""
    days = _day_numbers(sample)
    near = sorted((abs(days[u] - days[t]), u) for u in without if u != t)
    return [u for _, u in near[:_ALIKE_DATES]]


def _rise(sample: Sample, dark: NDArray[np.float64], without: Sequence[int]) -> NDArray[np.float64]:
    """How far the dark end of each date lies above that of dates near it, reflectance.

    Args:
        sample: the sample.
        dark: the dark end of the dark bands (T, 2), NaN without enough pixels.
        without: positions of dates without the offset, on the sample's T axis.

    Returns:
        (T, 2), NaN where there is no such date.
    """
    rise = np.full(dark.shape, np.nan)
    for t in range(len(dark)):
        if near := _near(sample, t, without):
            rise[t] = dark[t] - np.median(dark[near], axis=0)
    return rise


def _above_near(
    sample: Sample,
    rise: NDArray[np.float64],
    contrast: NDArray[np.float64],
    without: Sequence[int],
    left: NDArray[np.float64],
) -> NDArray[np.float64]:
    """How far the dark end of each date is from 0.1 above that of dates near it, reflectance.

    Args:
        sample: the sample.
        rise: how far the dark end of each date lies above that of dates near it (T, 2).
        contrast: interquartile range of the last dark band (T), NaN without enough pixels.
        without: positions of dates without the offset, on the sample's T axis.
        left: what remains of NDVI's difference after 0.1 is subtracted (T), from `_ndvi_left`.

    Returns:
        (T) the larger distance of both bands; infinite where a pixel of the date is darker than
        the offset allows, the date has another contrast, or too few pixels are clear.
    """
    values, bands = sample.values(), _dark_bands(sample)
    distance = np.full(len(values), np.inf)
    if not without or len(bands) < 2:  # in a single band, haze has the same effect as the offset
        return distance
    for t, own in enumerate(values):
        present = own[:, ~np.isnan(own).any(axis=0)]
        if not present.shape[1] or sample.valid[t].sum() < _CLEAR_ENOUGH * present.shape[1]:
            continue
        few = min(_DARKEST_PIXELS, present.shape[1]) - 1
        darkest = np.partition(present, few, axis=1)[:, few]
        if (darkest < _BELOW_THE_OFFSET).any():  # in the near infrared, water and shadow
            continue
        green = darkest[bands].max() <= _AT_THE_OFFSET
        limits = _GREEN_CONTRAST if green or left[t] <= _NDVI_RESTORED else _USUAL_CONTRAST
        near = _near(sample, t, without)
        if not near:
            continue
        least, most = np.median(contrast[near]) * limits
        if not least <= contrast[t] <= most:
            continue
        distance[t] = np.abs(rise[t] + BASELINE_OFFSET).max(initial=0)
    return np.where(np.isnan(distance), np.inf, distance)


def _ndvi_left(sample: Sample, without: Sequence[int], ts: Sequence[int]) -> NDArray[np.float64]:
    """How far NDVI returns to that of the dates near each date if 0.1 is subtracted.

    Args:
        sample: the sample.
        without: positions of dates without the offset, on the sample's T axis.
        ts: positions of the dates to judge; those without the offset are left out.

    Returns:
        (T) the share of NDVI's median difference from that of the medians by pixel over the dates
        near it which is left after 0.1 is subtracted from all bands; NaN where it is not known.
    """
    values = sample.values()
    found = np.full(len(values), np.nan)
    if "B04" not in sample.bands or "B08" not in sample.bands:
        return found
    red, nir = sample.bands.index("B04"), sample.bands.index("B08")

    def ndvi(of: Floats) -> Floats:
        return np.asarray((of[nir] - of[red]) / (of[nir] + of[red]))

    for t in sorted(set(ts) - set(without)):
        near = _near(sample, t, without)
        aligned = np.full((len(near), *values[t].shape), np.nan, np.float32)
        for k, u in enumerate(near):
            own, other = sample.shared(t, u)
            aligned[k][:, own] = values[u][:, other]
        seen = ~np.isnan(aligned[:, 0]).all(axis=0) if near else np.zeros(0, np.bool_)
        if seen.sum() < _ALIKE_PIXELS:
            continue
        others = aligned[:, :, seen]
        x, y = median_of_dates(others, ~np.isnan(others)), values[t][:, seen]
        with np.errstate(divide="ignore", invalid="ignore"):
            before, after = (
                np.nanmedian(np.abs(ndvi(one) - ndvi(x))) for one in (y, y + BASELINE_OFFSET)
            )
            found[t] = after / before
    return found


def _day_numbers(sample: Sample) -> list[int]:
    """The days of the dates; of undated imagery, the positions."""
    return [day.toordinal() for day in sample.dates] or list(range(len(sample.positions)))


def _above_others(sample: Sample, without: Sequence[int], others: Sequence[int]) -> list[int]:
    """The dates whose values contain the offset, detected by comparison with dates without it.

    A date contains the offset if it shows the same land as a date near it in time and is 0.1
    brighter in blue and red, or if it is as bright as a date that was detected in this way. Fewer
    than three such dates count only if two dates near each of them confirm it.

    Args:
        sample: the sample.
        without: positions of dates without the offset, on the sample's T axis.
        others: positions of dates that may contain the offset.

    Returns:
        Positions of the dates that contain it, ascending.
    """
    values, bands = sample.values(), _dark_bands(sample)
    if len(bands) < 2:  # in a single band, haze has the same effect as the offset
        return []
    values = values[:, bands]
    days = _day_numbers(sample)
    added = dict.fromkeys(without, 0.0)
    left, before = list(others), -1
    while len(left) != before:
        before = len(left)
        for t in tuple(left):
            near = sorted((abs(days[u] - days[t]), u) for u in added)[:_ALIKE_DATES]
            if any(_holds_more(sample, values, t, u, added[u]) for _, u in near):
                added[t] = -BASELINE_OFFSET
                left.remove(t)
    found = sorted(added.keys() - set(without))
    if len(found) >= _MANY_DATES or len(without) < _ENOUGH_TO_CONFIRM:
        return found
    return [
        t
        for t in found
        if sum(_holds_more(sample, values, t, u, 0.0) for u in _near(sample, t, without))
        >= _CONFIRMED_BY
    ]


def _holds_more(sample: Sample, values: Floats, t: int, u: int, added: float) -> bool:
    """Whether a date shows the same land as another date, and its values contain the offset.

    Args:
        sample: the sample.
        values: its reflectance in blue and red (T, 2, N) float32, unitless.
        t: position of the date on the T axis.
        u: position of the other date.
        added: the part of the offset that the other date's values contain, 0 or 0.1.
    """
    own, other = sample.shared(t, u)
    if len(own) < _ALIKE_PIXELS:
        return False
    y, x = values[t][:, own].astype(np.float64), values[u][:, other].astype(np.float64)
    spread_y, spread_x, noise = (_quartile_distance(one) for one in (y, x, y - x))
    more = np.median(y - x, axis=1) + added
    return bool(
        (np.abs(more + BASELINE_OFFSET) <= _OFFSET_TOLERANCE).all()
        and (spread_x > 0).all()
        and (spread_x <= _ALIKE_SPREAD * spread_y).all()
        and (spread_y <= _ALIKE_SPREAD * spread_x).all()
        and (noise <= _ALIKE_NOISE).all()
        and np.corrcoef(x[-1], y[-1])[0, 1] >= _ALIKE_CORRELATION
    )


def _quartile_distance(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Interquartile range of each band (C) of values (C, n)."""
    lower, upper = np.percentile(values, [25, 75], axis=1)
    return np.asarray(upper - lower)


def _with_offset(source: str) -> Callable[[Plane], Plane]:
    return lambda plane: replace(plane, offset=BASELINE_OFFSET, offset_source=source)


def _may_hold_offset(plane: Plane) -> bool:
    """Whether no source states an offset of a plane, which has floats or the scale 0.0001.

    Floats are mostly a product's integers divided by 10,000.
    """
    return plane.offset_source is None and (not plane.integer or math.isclose(plane.scale, 1e-4))


def _is_late(sample: Sample, t: int) -> bool:
    return bool(sample.dates) and sample.dates[t] >= BASELINE_CHANGE


def _offsets_in_words(stack: Stack, used: Sequence[int]) -> Iterator[StackWarning]:
    """The warnings that an offset is applied that the caller did not give."""
    by_source: dict[tuple[float, str], list[int]] = defaultdict(list)
    for acquisition in stack.acquisitions:
        plane = acquisition.planes[0]
        if acquisition.observation in set(used) and plane.offset and plane.offset_source != GIVEN:
            by_source[plane.offset, str(plane.offset_source)].append(acquisition.observation)
    for (offset, source), ts in by_source.items():
        unique = sorted(set(ts))
        days = days_in_words([stack.dates[t] for t in unique]) if stack.dates else "all images"
        yield StackWarning(
            code="offset_applied",
            detail=f"offset {offset:g} is applied to {days}, known from {source}; give `offset` "
            "to override it",
        )


def why_missing(
    stack: Stack, used: Sequence[int], least: int, *, cache: BlockCache | None = None
) -> str:
    """The reason why no pixel has enough clear observations, from a few samples.

    Args:
        stack: the stack.
        used: positions on the stack's T axis that the run used.
        least: number of clear observations that a pixel needs.
        cache: GDAL's block cache; None does not change it.
    """
    seen = clear = 0
    with StackReader(stack, sorted(used), cache=cache) as reader:
        for window in _sampled_windows(stack):
            part = reader.read(window)
            seen = max(seen, int((~np.isnan(part.values[:, 0])).sum(axis=0).max()))
            clear = max(clear, int(part.valid.sum(axis=0).max()))
    return (
        f"every pixel needs {least} clear observation{'s' if least > 1 else ''}; of the "
        f"{len(used)} dates used, the best pixel sampled has values on {seen} and is "
        f"clear on {clear} (mask: {stack.mask}); "
        + (
            "the mask leaves too few, so add clearer dates, or give mask=none to use cloudy ones"
            if seen >= least
            else "the files hold too few values, so check nodata and the area"
        )
    )


# Checks -----------------------------------------------------------------------------------------


def _check_medians(sample: Sample, values: Floats, clear: Floats) -> None:
    """Check the median of all dates, of each band, and of each date.

    Args:
        sample: the sample.
        values: its reflectance (T, C, N) float32, unitless.
        clear: the clear ones of them (n, C).

    Raises:
        ImplausibleReflectance: one of the medians is outside `PLAUSIBLE`.
    """
    # The message names a single band or file only if its median differs from that of the others.
    _check_median("the median", float(np.median(clear)), sample.planes[0][0])
    for c, name in enumerate(sample.bands):
        _check_median(f"the median of {name}", float(np.median(clear[:, c])), sample.planes[0][c])
    low, high = PLAUSIBLE
    medians = _by_date_of_all_bands(values, sample.valid, 50)
    for t, own in medians.items():
        if low <= own <= high:
            continue
        plane = sample.planes[t][0]
        stored = (own - plane.offset) / plane.scale
        raise ImplausibleReflectance(
            f"{sample.name(t)}: the median of its clear pixels sampled is {own:.4g}, outside {low} "
            f"to {high}, with scale {plane.scale:g} and offset {plane.offset:g} (stored: "
            f"{stored:.6g}), while the median of the {len(medians)} dates is "
            f"{float(np.median(list(medians.values()))):.4g}; this file is in other units than "
            f"the others: {_likely_fix(stored, plane)} for it"
        )


def _check_median(what: str, median: float, plane: Plane) -> None:
    low, high = PLAUSIBLE
    if low <= median <= high:
        return
    stored = (median - plane.offset) / plane.scale
    raise ImplausibleReflectance(
        f"{what} of the clear pixels sampled is {median:.4g}, outside {low} to {high}, with scale "
        f"{plane.scale:g} and offset {plane.offset:g} (stored: {stored:.6g}); "
        f"{_likely_fix(stored, plane)}"
    )


def _likely_fix(stored: float, plane: Plane) -> str:
    if stored < 0:
        return "missing pixels seem to hold a number that no nodata tag names, or offset is wrong"
    if PLAUSIBLE[0] <= stored <= PLAUSIBLE[1]:
        return "the numbers stored look like reflectance: give scale=1 and offset=0"
    if stored <= 100:
        return "if the numbers stored are percent, give scale=0.01"
    if stored <= _LARGEST_UINT8 and plane.integer:
        return "the numbers stored look like an 8-bit picture, which is not reflectance"
    if stored * 1e-4 <= PLAUSIBLE[1]:
        return "the numbers stored look like reflectance x 10000: give scale=0.0001"
    fix = "give the scale and offset that turn the numbers stored into reflectance"
    if plane.integer and stored <= _LARGEST_UINT16:
        return (
            f"{fix}: sensor=landsat if they are of Landsat Collection 2, or scale=0.00001526 if "
            "they fill 16 bits, as an export for viewing does"
        )
    return fix


def _dark(sample: Sample, clear: Floats) -> Iterator[StackWarning]:
    """The warning that the scale may have been applied twice: all values are nearly 0."""
    bright = _bright(clear)
    if bright < _NEVER_SO_DARK:
        yield StackWarning(
            code="scale_suspected",
            detail=f"nine tenths of the clear values sampled are below {bright:.2g}, with scale "
            f"{sample.planes[0][0].scale:g}: the numbers stored may be reflectance already (then "
            "give scale=1), or missing pixels hold a number that no nodata tag names",
        )


def _darker_than_land(sample: Sample, clear: Floats) -> Iterator[StackWarning]:
    """The warning that land is implausibly dark, such as reflectance x 1000 with the usual scale.

    Water is as dark in the near infrared, but there it is darker than blue and red.
    """
    if not {"B02", "B04", "B08"} <= set(sample.bands):
        return
    blue, red, nir = (clear[:, sample.bands.index(name)] for name in ("B02", "B04", "B08"))
    level = _bright(nir)
    land = np.median(nir) > max(np.median(red), np.median(blue)) > 0
    if land and _NEVER_SO_DARK < level < _NO_LAND_SO_DARK:
        yield StackWarning(
            code="scale_suspected",
            detail=f"nine tenths of the near infrared (B08) of the clear pixels sampled are below "
            f"{level:.2g} with scale {sample.planes[0][0].scale:g}, which is darker than land; if "
            "the numbers stored are reflectance x 1000, give scale=0.001",
        )


def _like_landsat(sample: Sample, clear: Floats) -> Iterator[StackWarning]:
    """The warning that integers without a stated scale seem to be those of Landsat.

    Collection 2 stores (reflectance + 0.2) / 0.0000275, so that black is 7273.
    """
    planes = [plane for own in sample.planes for plane in own]
    if any(not plane.integer or plane.scale_source is not None for plane in planes):
        return
    darkest = float(np.percentile(clear, _DARK_PERCENTILE))
    if darkest > _NEVER_ALL_SO_BRIGHT:
        yield StackWarning(
            code="scale_suspected",
            detail=f"nearly all clear values sampled are above {darkest:.2g} with scale "
            f"{planes[0].scale:g}, which no file states: the numbers seem to be those of Landsat "
            "Collection 2; give sensor=landsat, or scale=0.0000275 and offset=-0.2, or "
            f"scale={planes[0].scale:g} to confirm that all of it is snow or cloud",
        )


def _largest_numbers(sample: Sample) -> Iterator[StackWarning]:
    """The warning that pixels have 65535 in some of their bands: saturated or missing.

    Sentinel-2's products mark saturated pixels by it (Products Specification Document), others
    missing ones. In all bands it is found as a number that means missing.
    """
    ts, bands, share = [], set(), 0.0
    for t, own in enumerate(sample.planes):
        found = (sample.stored[t] == _LARGEST_UINT16) & sample.valid[t]
        for c, plane in enumerate(own):
            reflectance = _LARGEST_UINT16 * plane.scale + plane.offset
            if not plane.integer or plane.itemsize != 2 or reflectance <= PLAUSIBLE[1]:
                found[c] = False
        count = int(found.any(axis=0).sum())
        if count >= max(_FILL_PIXELS, _FILL_SHARE * found.shape[1]):
            ts.append(t)
            bands |= {sample.bands[c] for c in np.flatnonzero(found.any(axis=1))}
            share = max(share, count / found.shape[1])
    if ts:
        yield StackWarning(
            code="nodata_suspected",
            detail=f"{_LARGEST_UINT16}, the largest number of 16 bits, is in "
            f"{', '.join(sorted(bands))} of up to {share:.1%} of the pixels "
            f"sampled, in {sample.names(ts)}: such pixels are "
            "saturated or missing, and are read as reflectance: record the number with "
            f"`gdal_edit.py -a_nodata {_LARGEST_UINT16} FILE`",
        )


def _normalised(sample: Sample, values: Floats, clear: Floats) -> Iterator[StackWarning]:
    """The warning that the numbers were normalised, so that they are reflectance no longer.

    Standardised numbers are negative where they are below the mean. Numbers that were stretched
    from 0 to 1 have the same extremes in every band of every date; reflectance does not.
    """
    negative = float(np.mean(clear < PLAUSIBLE[0]))
    if negative > _NEGATIVE_SHARE:
        yield StackWarning(
            code="scale_suspected",
            detail=f"{negative:.0%} of the clear values sampled are below {PLAUSIBLE[0]}, which "
            "reflectance cannot be: the numbers may be standardised, as for training a network, or "
            "in other units; send reflectance, or give `scale` and `offset` that restore it",
        )
    extremes = {
        (float(band.min()), float(band.max()))
        for own, valid, planes in zip(values, sample.valid, sample.planes, strict=True)
        if valid.any() and not planes[0].integer
        for band in own[:, valid]
    }
    dates = int(sample.valid.any(axis=1).sum())
    if len(extremes) == 1 and dates * len(sample.bands) > 1:
        ((low, high),) = extremes
        if low < high and not any(plane.integer for own in sample.planes for plane in own):
            yield StackWarning(
                code="scale_suspected",
                detail=f"the values sampled of every band and date are from {low:g} to {high:g} "
                "exactly: the numbers seem to be stretched to this range, as for viewing or "
                "training, and are then not reflectance: send reflectance",
            )


def _other_units(sample: Sample, values: Floats) -> Iterator[StackWarning]:
    """The warnings that files are in smaller or larger units than the others, such as per cent."""
    levels = _by_date_of_all_bands(np.abs(values), sample.valid, _BRIGHT_PERCENTILE)
    usual = float(np.median(list(levels.values()))) if len(levels) > 2 else 0.0
    ts = [t for t, level in levels.items() if level < min(_DARK_DATE, _DARKER_THAN_OTHERS * usual)]
    if ts:
        yield StackWarning(
            code="scale_suspected",
            detail=f"{sample.names(ts)}: nine tenths of the clear values sampled are below "
            f"{max(levels[t] for t in ts):.2g}, and below {usual:.2g} on the median date: the file "
            "seems to be in other units than the others; give `scale` from a date on, or leave "
            "the file out",
        )
    least = max(_BRIGHT_DATE, _BRIGHTER_THAN_OTHERS * usual)
    ts = [t for t, level in levels.items() if usual and level > least]
    if ts:
        yield StackWarning(
            code="scale_suspected",
            detail=f"{sample.names(ts)}: a tenth of the clear values sampled are above "
            f"{min(levels[t] for t in ts):.2g}, and above {usual:.2g} on the median date: the file "
            "seems to be in other units than the others; give `scale` from a date on, or leave "
            "the file out",
        )


def _other_gain(stack: Stack, sample: Sample, values: Floats) -> Iterator[StackWarning]:
    """The warning that all bands of a date are brighter or darker by one factor, such as 2."""
    if not set(gain.BANDS) <= set(sample.bands):
        return
    at = [sample.bands.index(band) for band in gain.BANDS]
    found = gain.find_gains(
        values[:, at],
        sample.valid,
        _day_numbers(sample),
        shared=sample.shared,
        masked=stack.has_mask,
    )
    if found:
        ts = sorted(found)
        low, high = (f"{one(found.values()):.2g}" for one in (min, max))
        yield StackWarning(
            code="scale_suspected",
            detail=f"{sample.names(ts)}: all bands are about {low}{f' to {high}' * (low != high)} "
            "times as bright as on dates near it, while NDVI is the same: the file seems to be "
            "scaled differently from the others; give `scale` from a date on, or leave it out",
        )


def _swapped(sample: Sample, values: Floats, clear: Floats) -> Iterator[StackWarning]:
    """The warning that red is brighter than near infrared, which neither land nor water is.

    All dates together, or the dates on which it is so if they are fewer.
    """
    if not {"B04", "B08"} <= set(sample.bands):
        return
    at = [sample.bands.index(name) for name in ("B04", "B08")]
    share = _share_swapped(*clear[:, at].T)
    if share > 0.5:
        yield _swapped_on("", share, "")
        return
    shares = {
        t: _share_swapped(*values[t][:, sample.valid[t]][at])
        for t in range(len(values))
        if sample.valid[t].sum() >= _FEWEST_CLEAR
    }
    if ts := [t for t, own in shares.items() if own > 0.5]:
        yield _swapped_on(f"{sample.names(ts)}: ", min(shares[t] for t in ts), " of that date")


def _share_swapped(red: Floats, nir: Floats) -> float:
    return float(np.mean((red > _BRIGHT_RED) & (red > _RED_OVER_NIR * nir)))


def _swapped_on(names: str, share: float, where: str) -> StackWarning:
    return StackWarning(
        code="bands_suspected_swapped",
        detail=f"{names}red (B04) is far brighter than near infrared (B08) in {share:.0%} of the "
        f"clear pixels sampled{where}; check the order of the bands",
    )


def _repeated(sample: Sample) -> Iterator[StackWarning]:
    """Warnings about repeated pixels: a file saved twice, or an empty band.

    Bands of one date that are equal, a band of one number beside others that vary, and dates with
    equal pixels in all bands.
    """
    equal: dict[tuple[str, ...], list[int]] = defaultdict(list)
    plain: list[int] = []
    for t, (stored, valid) in enumerate(zip(sample.stored, sample.valid, strict=True)):
        own = stored[:, valid]
        if own.shape[1] < _ALIKE_PIXELS:
            continue
        varies = own.min(axis=1) < own.max(axis=1)
        if not varies.any():
            plain.append(t)
        for c in np.flatnonzero(~varies) if varies.any() else ():
            equal[sample.bands[c], f"{own[c, 0]:g}"].append(t)
        for one, other in combinations(np.flatnonzero(varies).tolist(), 2):
            if np.array_equal(own[one], own[other]):
                equal[sample.bands[one], sample.bands[other], ""].append(t)
    for what, ts in equal.items():
        words = f"all clear pixels sampled of {what[0]} are {what[1]}"
        if len(what) > 2:
            words = f"{what[0]} and {what[1]} are equal in all clear pixels sampled"
        yield _repeats(f"{sample.names(ts)}: {words}, so that a band seems to be missing or named "
                       "wrongly: check the file, or leave out that date")  # fmt: skip
    judged = int((sample.valid.sum(axis=1) >= _ALIKE_PIXELS).sum())
    if 0 < len(plain) < judged:
        yield _repeats(
            f"{sample.names(plain)}: all clear pixels sampled of each band are one number, unlike "
            "on other dates, so that the image seems to be empty: check the file, or leave out "
            "that date"
        )
    if dates := _equal_dates(sample):
        of_all = f"{len(dates)} of {len(sample.positions)} dates"
        yield _repeats(
            f"{sample.names(dates)} have the same pixels in all bands as another date ({of_all}), "
            "so that one image seems to have been saved under several dates: check them, and leave "
            "out the copies"
        )


def _equal_dates(sample: Sample) -> list[int]:
    """Positions of dates whose pixels, at some place, are those of another date there."""
    seen: dict[tuple[int, bytes], int] = {}
    found: set[int] = set()
    for t, places in enumerate(sample.places):
        length = sample.valid.shape[1] // len(places)
        for k, place in enumerate(places):
            at = slice(k * length, (k + 1) * length)
            own = sample.stored[t, :, at][:, sample.valid[t, at]]
            if own.shape[1] < _ALIKE_PIXELS or (own.min(axis=1) == own.max(axis=1)).all():
                continue
            digest = blake2b(sample.stored[t, :, at].tobytes()).digest()
            first = seen.setdefault((place, digest), t)
            if first != t:
                found |= {first, t}
    return sorted(found)


def _repeats(detail: str) -> StackWarning:
    return StackWarning(code="pixels_repeated", detail=detail)


def _mask_doubted(stack: Stack, sample: Sample, values: Floats) -> Iterator[StackWarning]:
    """The warning that a cloud mask marks nothing on dates that are as bright as clouds.

    The values of clouds are compared with those of the same pixels on the other dates, because
    snow fields and salt pans are as bright on all of them.

    Args:
        stack: the stack, for its mask.
        sample: the sample.
        values: its reflectance (T, C, N) float32, unitless.
    """
    # Without a mask there is another warning, and the mask of the series finds such clouds itself.
    if not stack.has_mask or "B02" not in sample.bands:
        return
    blue = values[:, sample.bands.index("B02")]
    seen = np.asarray(~np.isnan(values).any(axis=1))
    bright = seen & _bright_as_clouds(sample, blue)
    count = seen.sum(axis=1)
    marked = (seen & ~sample.valid).sum(axis=1)
    beside = (bright[:, :-1] & bright[:, 1:]).sum(axis=1)
    doubted = (
        (count >= _FEWEST_CLEAR)
        & (marked < _HARDLY_MARKED * count)
        & ((bright & sample.valid).sum(axis=1) >= _CLOUDY_SHARE * count)
        & (beside >= _CLOUD_BESIDE * bright[:, :-1].sum(axis=1))
    )
    ts = np.flatnonzero(doubted).tolist()
    if inverted := _inverted(bright, seen, sample.valid):
        yield StackWarning(
            code="mask_doubted",
            detail=f"the cloud mask ({stack.mask}) seems to be inverted: {inverted[0]:.0%} of the "
            "pixels sampled that it leaves are as bright in blue as clouds or snow, and "
            f"{inverted[1]:.0%} of those that it marks; check which of its numbers mean clear, or "
            "give mask=cloud to estimate a mask from the series",
        )
        return
    if not ts:
        return
    share = float((bright.sum(axis=1) / np.maximum(count, 1))[ts].min())
    days = [str(sample.dates[t]) if sample.dates else sample.name(t) for t in ts]
    yield StackWarning(
        code="mask_doubted",
        detail=f"the cloud mask ({stack.mask}) marks hardly any pixel on "
        f"{first_names(days, _NAMED_DATES)}{'' if marked.any() else ', nor on any other date'}, "
        f"although at least {share:.0%} of the pixels sampled are as bright in blue as clouds or "
        "snow there; they count as clear: check the mask's numbers, give mask=cloud to estimate a "
        "mask from the series, or leave out these dates",
    )


def _moved(stack: Stack, sample: Sample) -> Iterator[StackWarning]:
    """The warning that images are mirrored, turned or shifted relative to those of other dates."""
    days = _day_numbers(sample)
    found: dict[int, alignment.Moved] = {}
    for at in sample.by_place():
        if len(at) < alignment.FEWEST_DATES:
            continue
        pictures = np.stack([sample.picture(t, k) for t, k in at])
        if not stack.has_mask:  # clouds are still in them
            bright = clouds.brightened(pictures[:, 0])
            pictures = np.where(bright[:, None], np.float32(np.nan), pictures)
        for moved in alignment.find_moved(pictures, [days[t] for t, _ in at]):
            found.setdefault(at[moved.date][0], moved)
    if found:
        ts = sorted(found)
        moved = found[ts[0]]
        others = f" ({len(ts)} dates do not lie as the others: {sample.when(ts)})"
        yield StackWarning(
            code="shift_suspected",
            detail=f"{sample.name(ts[0])} seems to be {moved.how} relative to the dates near it: "
            f"moved back, the correlation of its pixels with theirs is {moved.after:.2f} instead "
            f"of {moved.before:.2f}{others if len(ts) > 1 else ''}; it is read as its transform "
            "states: check how the file was written, or leave out that date",
        )


def _inverted(
    bright: NDArray[np.bool_], seen: NDArray[np.bool_], valid: NDArray[np.bool_]
) -> tuple[float, float] | None:
    """The shares of bright pixels where a mask is clear and where not, if clouds are where it is.

    Args:
        bright: True (T, N) where a pixel is as bright as clouds.
        seen: True (T, N) where it has a value.
        valid: True (T, N) where the mask leaves it.
    """
    left, marked = seen & valid, seen & ~valid
    few = min(int(left.sum()), int(marked.sum())) < _ALIKE_PIXELS
    if few or int(seen.any(axis=1).sum()) < _FEWEST_TO_INVERT:
        return None
    clear, cloudy = float(bright[left].mean()), float(bright[marked].mean())
    return (clear, cloudy) if clear >= max(_CLOUDY_SHARE, _INVERTED_RATIO * cloudy) else None


def _bright_as_clouds(sample: Sample, blue: Floats) -> NDArray[np.bool_]:
    """`clouds.brightened` (T, N), each place by the dates on which it was sampled."""
    found = np.zeros(blue.shape, np.bool_)
    length = blue.shape[1] // len(sample.places[0])
    for at in sample.by_place():
        parts = [(t, slice(k * length, (k + 1) * length)) for t, k in at]
        series = clouds.brightened(np.stack([blue[part] for part in parts]))
        for part, own in zip(parts, series, strict=True):
            found[part] = own
    return found


# Sampling ---------------------------------------------------------------------------------------


def sample_bytes(stack: Stack, used: Sequence[int]) -> int:
    """Memory of the pixels that `calibrate` samples, bytes: as read, and for the checks."""
    windows = _sampled_windows(stack)
    each = _windows_per_date(windows, len(used))
    pixels = each * int(windows[0].height * windows[0].width)
    checked = 4 * 4 * _SAMPLED_PIXELS * len(stack.bands_read)
    # Pictures of two bands, as stored and of one place as reflectance.
    checked += 2 * 2 * 4 * len(used) * each * alignment.SIDE**2
    return 2 * len(used) * pixels * (4 * len(stack.bands_read) + 1) + checked


def _windows_per_date(windows: Sequence[Window], dates: int) -> int:
    """Number of windows sampled of each date."""
    return min(len(windows), max(1, _SAMPLED_DATES * len(windows) // max(1, dates)))


def _sample(
    stack: Stack,
    positions: Sequence[int],
    cache: BlockCache | None,
    before_read: Callable[[], None],
) -> Sample:
    """Sample the same number of places on every date, more of them if there are few dates."""
    windows = _sampled_windows(stack)
    each = _windows_per_date(windows, len(positions))
    plain = _as_stored(stack)
    T, C = len(positions), len(plain.bands)
    size = int(windows[0].height * windows[0].width)
    # Every n-th pixel of each place, so that a place has the same sampled pixels on all dates.
    thin = slice(None, None, max(1, T * each * size // _SAMPLED_PIXELS))
    size = len(range(size)[thin])
    compared = tuple(plain.bands.index(b) for b in _COMPARED if b in plain.bands)[:2]
    sides = alignment.side(windows[0].height), alignment.side(windows[0].width)
    pictures = np.empty((T, each, len(compared), *sides), np.float32)
    stored = np.empty((T, C, each * size), np.float32)
    valid = np.empty((T, each * size), np.bool_)
    # The dates take turns with the places, so that many dates together cover all places. All places
    # of a date are read together, because a large block may hold several of them.
    places = [tuple((t + k) % len(windows) for k in range(each)) for t in range(T)]
    for chosen in sorted({tuple(sorted(own)) for own in places}):
        ts = [t for t in range(T) if set(places[t]) == set(chosen)]
        with StackReader(
            plain, [positions[t] for t in ts], cache=cache, before_read=before_read
        ) as reader:
            parts = reader.read_together([windows[at] for at in chosen])
        for at, part in zip(chosen, parts, strict=True):
            for k, t in enumerate(ts):
                n = places[t].index(at)
                begin = n * size
                stored[t, :, begin : begin + size] = part.values[k].reshape(C, -1)[:, thin]
                valid[t, begin : begin + size] = part.valid[k].reshape(-1)[thin]
                pictures[t, n] = np.where(
                    alignment.crop(part.valid[k]),
                    alignment.crop(part.values[k][list(compared)]),
                    np.float32(np.nan),
                )
    first = _first_planes(stack)
    return Sample(
        stored=stored,
        valid=valid,
        positions=tuple(positions),
        dates=tuple(stack.dates[t] for t in positions) if stack.dates else (),
        bands=plain.bands,
        planes=tuple(first[t] for t in positions),
        places=tuple(places),
        pictures=pictures,
        compared=compared,
    )


def _as_stored(stack: Stack) -> Stack:
    """The stack without scale and offset, so that a reader returns the stored numbers."""
    return replace(
        stack,
        bands=stack.bands_read,
        cloud_bands=None,
        acquisitions=tuple(
            replace(
                acquisition,
                planes=tuple(replace(plane, scale=1.0, offset=0.0) for plane in acquisition.planes),
            )
            for acquisition in stack.acquisitions
        ),
    )


def _sampled_windows(stack: Stack) -> list[Window]:
    """Small windows distributed over the raster; one window of all of a small raster."""
    height, width = stack.grid.height, stack.grid.width
    if stack.small:
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
    """Start and length of an interval around a position of an axis, within one block if it fits."""
    length = min(_SAMPLED_SIDE, size)
    middle = int(place * size)
    first = middle // block * block
    start = middle - length // 2
    if block >= length:
        start = min(max(start, first), first + block - length)
    return min(max(start, 0), size - length), length

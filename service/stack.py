"""GeoTIFFs to a satellite image time series: opened from headers, read window by window.

    files → headers → arrangement (which band of which date is where) → Stack → windows of Sits

    geotiff.py    opens files safely, reads headers
    metadata.py   band names and dates, as people write them
    slots.py      what each file holds of each date, by layout
    layout.py     which layout it is; granules
    grid.py       CRS, transform, size; areas
    reading.py    Stack, StackReader, Sits
    radiometry.py are the numbers reflectance?

This module composes them, and is the one to import from. `open_stack` reads no pixel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from functools import lru_cache

import numpy as np
from rasterio.windows import Window

from service.errors import InvalidRequest, RasterTooLarge
from service.geotiff import Header, Placed, SourceFile, gdal_options, read_header
from service.grid import Grid
from service.layout import Arrangement, Granule, Layout, MaskRule, StackOptions, arrange
from service.metadata import SCL, tagged_number
from service.radiometry import BASELINE_CHANGE, Sample, StackWarning, judge
from service.reading import Look, Plane, Sits, Stack, StackReader, median_composite, spaced

__all__ = [
    "Grid",
    "Layout",
    "MaskRule",
    "Sits",
    "SourceFile",
    "Stack",
    "StackOptions",
    "StackReader",
    "StackWarning",
    "check_radiometry",
    "median_composite",
    "open_stack",
    "spaced",
]

INTEGER_SCALE = 0.0001
"""Scale of integer reflectance where nobody says: Sentinel-2's own."""

_SAMPLED_DATES = 8
_SAMPLED_SIDE = 128
# Of a raster's height and width: its middle, and the middles of its quarters.
_SAMPLED_PLACES = ((0.5, 0.5), (0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75))


def open_stack(
    files: Sequence[SourceFile],
    options: StackOptions,
    *,
    bands: Sequence[str],
    dated: bool = True,
    max_bytes: int,
) -> Stack:
    """Understand files as a stack, from their headers alone.

    Args:
        files: the GeoTIFFs, in the order given by the caller.
        options: what the caller said of them.
        bands: the bands needed, by Sentinel-2 name, in the order of the C axis.
        dated: whether observations need dates. Without, files that have none are observations
            of their own, in the order given.
        max_bytes: most bytes that the needed bands of all dates may decode to.

    Raises:
        NotAGeoTIFF: a file is no GeoTIFF.
        NoGeoreference: a file that is needed has no CRS or no transform.
        GridMismatch: needed files do not share one grid.
        MissingBands: a needed band is not there.
        MissingDates: a file or band has no date.
        RasterTooLarge: the stack is over `max_bytes`, or one block is beyond reason.
        InvalidRequest: the options contradict the files or themselves.
    """
    _check_options(files, options)
    headers = _headers(files)
    arranged = arrange(headers, options, bands=bands, dated=dated)
    with gdal_options():
        grid = _one_grid(arranged.used)
    keys = list(dict.fromkeys(granule.key for granule in arranged.granules))
    position = {key: number for number, key in enumerate(keys)}
    wanted = (*bands, SCL) if arranged.masked else tuple(bands)
    _check_size(arranged, grid, wanted, max_bytes)
    looks = tuple(
        Look(
            observation=position[granule.key],
            planes=tuple(_plane(*granule.planes[band], options) for band in bands),
            scl=_plane(*granule.planes[SCL], options) if arranged.masked else None,
        )
        for granule in arranged.granules
    )
    planes = [plane for look in looks for plane in look.planes]
    return Stack(
        grid=grid,
        layout=arranged.layout,
        dates=tuple(key for key in keys if isinstance(key, date)),
        bands=tuple(bands),
        scale=planes[0].scale,
        offset=planes[0].offset,
        offset_known=options.offset is not None or any(plane.offset for plane in planes),
        mask="scl" if arranged.masked else "none",
        block=(
            max(header.block[0] for header in arranged.used),
            max(header.block[1] for header in arranged.used),
        ),
        looks=looks,
        files=tuple(header.name for header in arranged.used),
        warnings=(
            *_merged(arranged.granules, len(keys)),
            *_eight_bits(arranged.granules, bands, options),
        ),
    )


def _check_options(files: Sequence[SourceFile], options: StackOptions) -> None:
    if not files:
        raise InvalidRequest.of("files", "none came, and a stack needs one at least")
    if options.scale is not None and not (np.isfinite(options.scale) and options.scale):
        raise InvalidRequest.of("scale", f"{options.scale} makes every value the same")
    if options.offset is not None and not np.isfinite(options.offset):
        raise InvalidRequest.of("offset", f"{options.offset} is no finite number")


def _headers(files: Sequence[SourceFile]) -> list[Header]:
    placed: dict[bytes, Placed] = {}
    # One after the other: what is asked of a header is asked with the GIL, and two threads that
    # wait for it take half as long again as one.
    with gdal_options():
        return [read_header(file, placed) for file in files]


def _one_grid(headers: Sequence[Header]) -> Grid:
    first, *others = headers
    grid = Grid.of(first)
    for other in others:
        # Where a georeference was worked out once, these are the same objects.
        if _place(other) != _place(first):
            grid.check_same(first.name, Grid.of(other), other.name)
    return grid


def _place(header: Header) -> tuple[object, ...]:
    return header.crs, header.transform, header.width, header.height


def _check_size(arranged: Arrangement, grid: Grid, wanted: Sequence[str], max_bytes: int) -> None:
    a_pixel = 0
    for granule in arranged.granules:
        for band in wanted:
            header, number = granule.planes[band]
            a_pixel += np.dtype(header.dtypes[number - 1]).itemsize
    decoded = a_pixel * grid.width * grid.height
    if decoded > max_bytes:
        raise RasterTooLarge(
            f"{grid.width} x {grid.height} pixels of {len(wanted)} bands in "
            f"{len(arranged.granules)} observations decode to {decoded} bytes, the limit is "
            f"{max_bytes}"
        )


def _merged(granules: Sequence[Granule], observations: int) -> tuple[StackWarning, ...]:
    if len(granules) == observations:
        return ()
    times = Counter(granule.key for granule in granules)
    twice = [str(key) for key, n in times.items() if n > 1]
    named = ", ".join(twice[:3]) + (", ..." if len(twice) > 3 else "")
    detail = (
        f"{len(granules)} observations on {observations} dates: {len(twice)} "
        f"{'dates have' if len(twice) > 1 else 'date has'} more than one ({named}); per pixel "
        "the first clear value counts"
    )
    return (StackWarning(code="merged_dates", detail=detail),)


def _eight_bits(
    granules: Sequence[Granule], bands: Sequence[str], options: StackOptions
) -> tuple[StackWarning, ...]:
    """Reflectance x 10,000 does not fit into 8 bits, and no other scale is usual."""
    planes = [granule.planes[band] for granule in granules for band in bands]
    small = (
        header
        for header, number in planes
        if header.dtypes[number - 1] in {"uint8", "int8"}
        and _said_scale(header, number - 1) is None
    )
    first = next(small, None)
    if options.scale is not None or first is None:
        return ()
    detail = (
        f"'{first.name}' holds 8-bit numbers and says no scale, so they are taken x "
        f"{INTEGER_SCALE:g}: give the scale that makes reflectance of them"
    )
    return (StackWarning(code="scale_suspected", detail=detail),)


def _plane(header: Header, number: int, options: StackOptions) -> Plane:
    at = number - 1
    dtype = np.dtype(header.dtypes[at])
    scale, offset = _radiometry(header, at, options)
    return Plane(
        source=header.source,
        number=number,
        scale=scale,
        offset=offset,
        nodata=_as_native(header.nodata[at], header.dtypes[at]),
        integer=dtype.kind in "iu",
        masked=header.masked,
        block_bytes=header.block_bytes,
    )


def _radiometry(header: Header, at: int, options: StackOptions) -> tuple[float, float]:
    """Scale and offset: as asked, else GDAL's, else a tag's, else what the number type implies."""
    tags = {**header.tags, **header.band_tags[at]}
    scale = _said_scale(header, at) if options.scale is None else options.scale
    offset = options.offset
    if offset is None and header.offsets[at] != 0:
        offset = header.offsets[at]
    if offset is None:
        offset = tagged_number(tags, "offset", "add_offset")
    # A scale of 0 would make every value the same: no scale was meant.
    usual = INTEGER_SCALE if np.dtype(header.dtypes[at]).kind in "iu" else 1.0
    return scale or usual, offset or 0.0


def _said_scale(header: Header, at: int) -> float | None:
    """The scale that a file says of a band."""
    if header.scales[at] != 1:
        return header.scales[at]
    return tagged_number({**header.tags, **header.band_tags[at]}, "scale", "scale_factor")


@lru_cache(maxsize=64)  # the bands of a stack mostly have one
def _as_native(nodata: float | None, name: str) -> int | float | None:
    """A nodata number as the raster's own type can hold it.

    None where it cannot, or where it is NaN or infinite: those are missing anyway.
    """
    if nodata is None or not np.isfinite(nodata):
        return None
    dtype = np.dtype(name)
    if dtype.kind in "iu":
        info = np.iinfo(name)
        whole = int(nodata)
        return whole if whole == nodata and info.min <= whole <= info.max else None
    with np.errstate(over="ignore"):
        rounded = float(np.asarray(nodata, dtype=np.float64).astype(dtype))
    return rounded if np.isfinite(rounded) else None


def check_radiometry(stack: Stack, used: Sequence[int] | None = None) -> tuple[StackWarning, ...]:
    """Look at a few places on a few dates: are the numbers reflectance at all?

    Args:
        stack: the stack.
        used: positions on its T axis that a run will use; None for all.

    Returns:
        `bands_suspected_swapped`, `baseline_offset_suspected`, or nothing.

    Raises:
        ImplausibleReflectance: the median of the clear values is outside -0.2 to 1.6.
        CorruptRaster: a file does not decode.
    """
    positions = sorted(range(stack.observations) if used is None else used)
    if not positions:
        return ()
    sample = _sample(stack, _sampled_dates(stack, positions))
    beyond = _other_side(stack, positions)
    if not beyond or not sample.integer or stack.offset_known:
        return judge(sample)
    wider = _sample(stack, beyond)
    return judge(
        sample,
        replace(
            sample,
            values=np.concatenate([sample.values, wider.values]),
            valid=np.concatenate([sample.valid, wider.valid]),
            dates=sample.dates + wider.dates,
        ),
    )


def _sample(stack: Stack, positions: Sequence[int]) -> Sample:
    """A few places of these dates."""
    with StackReader(stack, positions) as reader:
        parts = [reader.read(window) for window in _sampled_windows(stack)]
    T, C = len(positions), len(stack.bands)
    return Sample(
        values=np.concatenate([part.values.reshape(T, C, -1) for part in parts], axis=2),
        valid=np.concatenate([part.valid.reshape(T, -1) for part in parts], axis=1),
        dates=tuple(stack.dates[t] for t in positions) if stack.dates else (),
        bands=stack.bands,
        scale=stack.scale,
        offset=stack.offset,
        integer=all(plane.integer for look in stack.looks for plane in look.planes),
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

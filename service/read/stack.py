"""Stacks: GeoTIFFs as one satellite image time series.

    files → headers → arrangement (file of each band and date) → Stack → windows of Sits

`open_stack` reads only headers, no pixels.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import (
    InvalidRequest,
    MissingBands,
    MissingDates,
    NotAGeoTIFF,
    RasterTooLarge,
    StackWarning,
    first_names,
)
from service.grid import Grid
from service.read.arrange import Arrangement, Granule, MaskNotInAllFiles, arrange
from service.read.band_names import ALPHA
from service.read.geotiff import (
    Driver,
    FileMemory,
    Georeference,
    Header,
    SourceFile,
    gdal_options,
    not_rasters,
    read_header,
)
from service.read.layouts import Layout, StackOptions, counted
from service.read.masks import ALPHA_RULE, Alternative, Decoder, MaskRule, alpha
from service.read.metadata import (
    ignored_offsets,
    sort_files,
    with_date_lists,
    with_product,
)
from service.read.placement import AS_IT_LIES, Place, Position, Resampling, place_files
from service.read.reflectance import (
    BROWSER,
    INTEGER_SCALE,
    DatedNumber,
    calibration_of,
    number_on,
    stated_scale,
)
from service.read.sensors import Sensor, check_sensors, in_sentinel_2_terms, sensors_of

LAND_BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
"""Sentinel-2's bands of the land surface; the other three measure the atmosphere."""
# Float rasters mark missing pixels by numbers such as -3.4e38, with or without a nodata tag.
NO_VALUE = 1e30
SMALL_SIDE = 256
"""Largest side of a raster that is read whole before a run, pixels."""
_NAMED_AT_MOST = 5
KEPT_BYTES = 32 * 2**20
"""Largest memory of the pixels that one stack keeps, bytes."""


@dataclass(frozen=True, kw_only=True)
class Plane:
    """One band of one date: its position, and how its numbers become reflectance."""

    source: SourceFile
    number: int
    """Band number in the file, from 1."""
    scale: float
    offset: float
    nodata: int | float | None
    """Nodata number in the file's number type; None if there is none of that type."""
    integer: bool
    masked: bool
    """Whether the file's internal mask marks missing pixels."""
    memory: FileMemory
    block: tuple[int, int]
    """Rows and columns of a strip or tile."""
    itemsize: int
    """Bytes of a number as stored."""
    position: Position = AS_IT_LIES
    """Position of the file on the stack's grid."""
    driver: Driver = "GTiff"
    """The GDAL driver that reads the file."""
    resampling: Resampling = "bilinear"
    """Resampling if the file is warped: classes and bits take the nearest pixel."""
    scale_source: str | None = None
    offset_source: str | None = None
    """Source of scale and offset; None if nothing states them."""

    @property
    def may_be_beyond(self) -> bool:
        """Whether a value may be NaN or infinite, or become too large for reflectance."""
        # 64 bits hold less than 1e20. A scale or offset of NaN compares as false.
        return not (self.integer and abs(self.scale) * 1e20 + abs(self.offset) < NO_VALUE / 2)


@dataclass(frozen=True, kw_only=True)
class MaskPlane:
    """A cloud mask of one date."""

    plane: Plane
    clear: Decoder
    """The function from the band's numbers to True where clear."""
    missing: bool = False
    """Whether pixels that are not clear are missing, as for alpha, and not cloudy."""
    alternative: Alternative | None = None
    """Another meaning that the numbers may have."""


@dataclass(frozen=True, kw_only=True)
class Acquisition:
    """One granule of one observation."""

    observation: int
    """Position of the observation on the stack's T axis."""
    planes: tuple[Plane, ...]
    """The bands read (C), those of the stack's `cloud_bands` last."""
    masks: tuple[MaskPlane, ...] = ()
    """Cloud masks; a pixel is clear if it is clear in all of them."""

    @property
    def zero_is_missing(self) -> bool:
        """Whether zeros in all bands mean no data, and no nodata tag states it already."""
        return all(plane.nodata != 0 for plane in self.planes)


Decoded = tuple[NDArray[np.generic], NDArray[np.uint8] | None]
"""Bands of one file (n, h, w) in its own number type, and its mask (h, w)."""


class KeptPixels:
    """Numbers of a small raster's files as decoded, so that its readers decode each file once.

    The check of scale and offset reads a small raster whole, and the run reads it again: for many
    small files, opening and decoding take most of a request's time. Used by several threads.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, Decoded] = {}
        self._left = KEPT_BYTES
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[KeptPixels], tuple[()]]:
        """A copy for another process keeps nothing."""
        return KeptPixels, ()

    def find(self, read: Hashable) -> Decoded | None:
        """The numbers of a read; None if they were not kept."""
        return self._kept.get(read)

    def keep(self, read: Hashable, decoded: Decoded) -> None:
        """Keep the numbers of a read, which cannot be changed from then on.

        With more than `KEPT_BYTES` the read is not kept.
        """
        parts = [part for part in decoded if part is not None]
        size = sum(part.nbytes for part in parts)
        with self._lock:
            if size > self._left or read in self._kept:
                return
            self._left -= size
            self._kept[read] = decoded
        for part in parts:
            part.flags.writeable = False


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Files as T observations of C bands on one grid; no pixel has been read."""

    grid: Grid
    layout: Layout
    dates: tuple[date, ...]
    """Acquisition dates (T), unique and ascending; empty for undated imagery."""
    bands: tuple[str, ...]
    """The needed bands (C), in the requested order."""
    cloud_bands: tuple[str, ...] | None = None
    """Further bands that are read for the cloud mask estimated from the series and are not in
    windows; empty if it needs no further bands, None if that mask is not used."""
    scale: float
    offset: float
    """reflectance = value x scale + offset of the first file; those of other files may differ."""
    mask: str
    """The cloud masks used, such as `scl`; `none` if there is none."""
    sensor: str | None
    """The sensor of the files, several comma-separated; None if unknown."""
    block: tuple[int, int]
    """Rows and columns of the largest block on disk: windows of whole blocks decode none twice."""
    acquisitions: tuple[Acquisition, ...]
    """Granules by observation; in one observation, the first clear value in order is used."""
    area: Mapping[str, Any] | None = None
    """A polygon in the grid's CRS: pixels whose centre is outside it are missing."""
    files: tuple[str, ...]
    """Names of the files that hold a needed band; the others are left out."""
    warnings: tuple[StackWarning, ...]
    kept: KeptPixels = field(default_factory=KeptPixels, compare=False, repr=False)
    """Decoded pixels of the files; stacks made from this one by `replace` share them."""

    @property
    def small(self) -> bool:
        """Whether the check of scale and offset reads the whole raster."""
        return max(self.grid.height, self.grid.width) <= SMALL_SIDE

    @property
    def has_mask(self) -> bool:
        """Whether the files hold a cloud mask; one estimated from the series does not count."""
        return self.mask != "none" and self.cloud_bands is None

    @property
    def bands_read(self) -> tuple[str, ...]:
        """The needed bands, then those that only the cloud mask reads."""
        return (*self.bands, *(self.cloud_bands or ()))

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that hold a needed band or mask, and the descriptions of remote ones."""
        planes = (
            plane
            for one in self.acquisitions
            for plane in (*one.planes, *(mask.plane for mask in one.masks))
        )
        return tuple(dict.fromkeys(path for plane in planes for path in plane.source.paths))

    @property
    def observations(self) -> int:
        """T: the number of dates, or of images if they have no dates."""
        return self.acquisitions[-1].observation + 1


@dataclass(frozen=True, kw_only=True)
class Sits:
    """A part of a time series in memory. The last axes are (h, w) of a window or (N) of points."""

    values: NDArray[np.float32]
    """(T, C, h, w) or (T, C, N) float32 reflectance, each band of a date in one block of memory;
    NaN in all bands of a date where one of them is missing. Clouds keep their values."""
    valid: NDArray[np.bool_]
    """(T, h, w) or (T, N): True where the observation exists and is clear."""


def open_stack(
    files: Sequence[SourceFile],
    options: StackOptions,
    *,
    bands: Sequence[str],
    optional: Sequence[str] = (),
    dated: bool = True,
    max_bytes: int,
    sensors: Collection[str] = (),
    other_sensors: Mapping[str, str] = MappingProxyType({}),
    model: str = "the model",
    before_each: Callable[[], None] = lambda: None,
) -> Stack:
    """Open files as a stack, from their headers only.

    Args:
        files: the GeoTIFFs, in the order given by the caller.
        options: the request's parameters about them.
        bands: the needed bands, by Sentinel-2 name, in the order of the C axis.
        optional: further bands, which follow on the C axis if every date has them.
        dated: whether observations need dates. If not, each file without a date is an observation
            of its own, in the order given.
        max_bytes: largest decoded size of the needed bands of all dates, bytes.
        sensors: names of the sensors that may be read; empty reads any.
        other_sensors: names of further sensors that are read with a warning, and their cost.
        model: the model of these sensors, for messages.
        before_each: called before each file is opened; an exception that it raises ends the work.

    Raises:
        NotAGeoTIFF: a file is not a GeoTIFF.
        NoGeoreference: a file that is needed has no CRS or no transform.
        WrongSensor: a file is of a sensor that is neither in `sensors` nor in `other_sensors`.
        GridMismatch: needed files do not share one grid, and `grid` does not choose one.
        MissingBands: a needed band is missing.
        MissingDates: a file or band has no date.
        RasterTooLarge: the stack exceeds `max_bytes`, or a block exceeds its limit.
        InvalidRequest: the options contradict the files or each other.
    """
    _check_options(files, options)
    opened = read_headers(files, before_each)
    headers, ignored = opened.headers, opened.warnings
    options = replace(options, left_out=(*opened.left_out, *options.left_out))
    _check_rasters(files, headers)
    detected = sensors_of(headers, options.sensor)
    foreign = check_sensors(headers, detected, sensors, other_sensors, model)
    by_file = {
        header.source: sensor
        for header, (sensor, _) in zip(headers, detected, strict=True)
        if sensor
    }
    headers = [in_sentinel_2_terms(header, by_file.get(header.source)) for header in headers]
    place = Place(grid=options.grid, bbox=options.bbox, area=options.area)
    try:
        arranged = arrange(headers, options, bands=bands, optional=optional, dated=dated)
    except MaskNotInAllFiles as error:
        # A file from another place often lacks the mask as well; then the place is the fault.
        with gdal_options():
            place_files(error.files, headers, place)
        raise
    except MissingDates as error:
        if not opened.unused_dates:
            raise
        name, why = opened.unused_dates[0]
        raise MissingDates(f"{error.detail} ('{name}' is not used: {why})") from error
    bands = arranged.bands
    with gdal_options():
        placed = place_files(arranged.used, headers, place)
    grid = placed.grid
    positions = {
        id(header): position
        for header, position in zip(arranged.used, placed.positions, strict=True)
    }
    keys = list(dict.fromkeys(granule.key for granule in arranged.granules))
    position = {key: number for number, key in enumerate(keys)}
    read = (*bands, *(arranged.cloud_bands or ()))
    _check_size(arranged, grid, read, max_bytes)
    acquisitions = tuple(
        Acquisition(
            observation=position[granule.key],
            planes=tuple(
                _plane(*granule.planes[band], options, positions, granule.key, by_file)
                for band in read
            ),
            masks=_mask_planes(granule, positions),
        )
        for granule in arranged.granules
    )
    planes = [plane for acquisition in acquisitions for plane in acquisition.planes]
    return Stack(
        grid=grid,
        layout=arranged.layout,
        dates=tuple(key for key in keys if isinstance(key, date)),
        bands=bands,
        cloud_bands=arranged.cloud_bands,
        scale=planes[0].scale,
        offset=planes[0].offset,
        mask=arranged.mask,
        sensor=", ".join(
            dict.fromkeys(by_file[h.source].label for h in arranged.used if h.source in by_file)
        )
        or None,
        block=(
            max(header.block[0] for header in arranged.used),
            max(header.block[1] for header in arranged.used),
        ),
        acquisitions=acquisitions,
        area=placed.area,
        files=tuple(header.name for header in arranged.used),
        warnings=(
            *ignored,
            *foreign,
            *arranged.warnings,
            *placed.warnings,
            *_merged(arranged.granules, len(keys)),
            *_eight_bits(arranged.granules, read, options),
        ),
    )


def stack_bands(
    files: Sequence[SourceFile],
    options: StackOptions,
    before_each: Callable[[], None] = lambda: None,
) -> tuple[str, ...]:
    """The bands of reflectance that the files have at every date, by Sentinel-2 name.

    Args:
        files: the GeoTIFFs, in the order given by the caller.
        options: the request's parameters about them.
        before_each: called before each file is opened; an exception that it raises ends the work.

    Returns:
        Bands among `LAND_BANDS`, in that order, without bands that would be substituted by a twin.

    Raises:
        NotAGeoTIFF: a file is not a GeoTIFF.
        MissingDates: a file or band has no date.
        InvalidRequest: the options contradict the files or each other.
    """
    _check_options(files, options)
    headers = read_headers(files, before_each).headers
    _check_rasters(files, headers)
    detected = sensors_of(headers, options.sensor)
    headers = [
        in_sentinel_2_terms(header, sensor)
        for header, (sensor, _) in zip(headers, detected, strict=True)
    ]
    dates: dict[str, set[date | int]] = {}
    for band in LAND_BANDS:
        try:
            arranged = arrange(headers, options, bands=(band,), dated=True)
        except MissingBands:
            continue
        if not any(warning.code == "band_substituted" for warning in arranged.warnings):
            dates[band] = {granule.key for granule in arranged.granules}
    most = max(map(len, dates.values()), default=0)
    return tuple(band for band, own in dates.items() if len(own) == most)


def _check_options(files: Sequence[SourceFile], options: StackOptions) -> None:
    if not files:
        raise InvalidRequest.of("files", "at least one file is required")
    for scale in _numbers(options.scale):
        if not (np.isfinite(scale) and scale):
            raise InvalidRequest.of(
                "scale", f"{scale} is not valid: give a finite number other than 0"
            )
    for offset in _numbers(options.offset):
        if not np.isfinite(offset):
            raise InvalidRequest.of(
                "offset", f"{offset} is not a finite number: give one such as -0.1"
            )


def _check_rasters(files: Sequence[SourceFile], headers: Sequence[Header]) -> None:
    if not headers:
        raise InvalidRequest.of(
            "files",
            f"the request has metadata ('{files[0].name}') and no raster: add the .tif or .jp2 "
            "files that the metadata describes",
        )


def _numbers(given: DatedNumber | None) -> Sequence[float]:
    if given is None:
        return ()
    return (given,) if isinstance(given, int | float) else [number for _, number in given]


def _also_not_rasters(names: Sequence[str]) -> str:
    """Text about further files that are not rasters."""
    files = f"{counted(len(names), 'other file')} {'is' if len(names) == 1 else 'are'}"
    quoted = [f"'{name}'" for name in names]
    return f"; {files} not a TIFF or JP2 either: {first_names(quoted, _NAMED_AT_MOST)}"


@dataclass(frozen=True, kw_only=True)
class Headers:
    """The headers of a request's rasters, and what became of the files beside them."""

    headers: list[Header]
    """The headers, completed by the metadata files."""
    left_out: tuple[tuple[str, str], ...] = ()
    """Files that are not used, each with the reason."""
    unused_dates: tuple[tuple[str, str], ...] = ()
    """Those of them that hold dates."""
    warnings: tuple[StackWarning, ...] = ()
    """About metadata that is used or not used."""


def read_headers(
    files: Sequence[SourceFile], before_each: Callable[[], None] = lambda: None
) -> Headers:
    """The headers of the rasters, completed by the metadata files among the given files.

    Args:
        files: rasters, metadata files, and files that usually lie beside rasters.
        before_each: called before each raster; an exception that it raises ends the work.

    Raises:
        NotAGeoTIFF: a file is not a raster that the service reads, nor one that lies beside them.
        RasterTooLarge: a file declares sizes beyond the limits.
    """
    known: dict[bytes, Georeference] = {}
    # In one thread: parsing headers holds the GIL, and two threads that wait for it take 1.5 times
    # as long.
    with gdal_options():
        found = sort_files(files)
        headers = []
        for n, file in enumerate(found.rasters, start=1):
            before_each()
            try:
                headers.append(read_header(file, known))
            except NotAGeoTIFF as error:
                others = not_rasters(found.rasters[n:])
                if not others:
                    raise
                raise NotAGeoTIFF(error.detail + _also_not_rasters(others)) from error
        left_out = found.left_out
        unused_dates: tuple[tuple[str, str], ...] = ()
        warnings: tuple[StackWarning, ...] = ()
        if found.metadata:
            warnings = ignored_offsets(headers, found.metadata)
            headers = [with_product(header, found.metadata) for header in headers]
        if found.lists:
            headers, unused, assumed = with_date_lists(headers, found.lists)
            left_out, warnings = (*left_out, *unused), (*warnings, *assumed)
            unused_dates = tuple(unused)
        return Headers(
            headers=headers, left_out=left_out, unused_dates=unused_dates, warnings=warnings
        )


def _check_size(arranged: Arrangement, grid: Grid, bands: Sequence[str], max_bytes: int) -> None:
    pixel_bytes = 0
    for granule in arranged.granules:
        for band in (*bands, *(_mask_band(rule) for rule in granule.masks)):
            header, number = granule.planes[band]
            pixel_bytes += np.dtype(header.dtypes[number - 1]).itemsize
    decoded = pixel_bytes * grid.width * grid.height
    if decoded > max_bytes:
        more = max((len(granule.masks) for granule in arranged.granules), default=0)
        raise RasterTooLarge(
            f"{grid.width} x {grid.height} pixels of {len(bands) + more} bands in "
            f"{len(arranged.granules)} observations decode to {decoded} bytes, and the limit is "
            f"{max_bytes}: cut the area into parts, or send fewer dates"
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
    """The warning about 8-bit numbers: without a scale, or with steps that are coarse."""
    if options.scale is not None:
        return ()
    for granule in granules:
        for band in bands:
            header, number = granule.planes[band]
            if header.dtypes[number - 1] not in {"uint8", "int8"}:
                continue
            scale, source = stated_scale(header, number - 1)
            if scale is None:
                detail = (
                    f"'{header.name}' holds 8-bit numbers and states no scale, so they are "
                    f"multiplied by {INTEGER_SCALE:g}: give the `scale` that turns them into "
                    "reflectance"
                )
                return (StackWarning(code="scale_suspected", detail=detail),)
            if source == BROWSER:
                detail = (
                    f"'{header.name}' holds 8-bit numbers, which are reflectance in steps of "
                    f"{scale:.2g}, so that NDVI is inexact where land is dark: download the bands "
                    "as TIFF of 16 or 32 bits"
                )
                return (StackWarning(code="scale_suspected", detail=detail),)
    return ()


def _mask_band(rule: MaskRule) -> str:
    return ALPHA if rule is ALPHA_RULE else rule.band


def _mask_planes(granule: Granule, positions: Mapping[int, Position]) -> tuple[MaskPlane, ...]:
    planes = []
    for rule in granule.masks:
        header, number = granule.planes[_mask_band(rule)]
        missing = rule is ALPHA_RULE
        planes.append(
            MaskPlane(
                plane=replace(
                    _plane(header, number, StackOptions(), positions),
                    resampling="nearest",
                    nodata=None,
                ),
                clear=alpha if missing else rule.decoder(header.name),
                missing=missing,
                alternative=None if missing else rule.alternative(header.name),
            )
        )
    return tuple(planes)


def _plane(
    header: Header,
    number: int,
    options: StackOptions,
    positions: Mapping[int, Position],
    key: date | int = 0,
    sensors: Mapping[SourceFile, Sensor] = MappingProxyType({}),
) -> Plane:
    at = number - 1
    day = key if isinstance(key, date) else None
    found = calibration_of(
        header,
        at,
        scale=number_on("scale", options.scale, day, header),
        offset=number_on("offset", options.offset, day, header),
        sensor=sensors.get(header.source),
    )
    return Plane(
        source=header.source,
        number=number,
        scale=found.scale,
        offset=found.offset,
        scale_source=found.scale_source,
        offset_source=found.offset_source,
        nodata=_as_native(header.nodata[at], header.dtypes[at]),
        integer=np.dtype(header.dtypes[at]).kind in "iu",
        masked=header.masked,
        memory=header.memory,
        block=header.block,
        itemsize=np.dtype(header.dtypes[at]).itemsize,
        position=positions[id(header)],
        driver=header.driver,
    )


@lru_cache(maxsize=64)  # the bands of a stack mostly have one
def _as_native(nodata: float | None, name: str) -> int | float | None:
    """A nodata number in the raster's number type.

    None if the type cannot hold it, or if it is NaN or infinite, which are missing anyway.
    """
    if nodata is None or not np.isfinite(nodata):
        return None
    dtype = np.dtype(name)
    if dtype.kind in "iu":
        info = np.iinfo(name)
        integer = int(nodata)
        return integer if integer == nodata and info.min <= integer <= info.max else None
    with np.errstate(over="ignore"):
        rounded = float(np.asarray(nodata, dtype=np.float64).astype(dtype))
    return rounded if np.isfinite(rounded) else None

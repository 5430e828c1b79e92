"""Stated scale and offset of a band: by the request, the file or the sensor.

    reflectance = value x scale + offset

The module `radiometry` checks them by the pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date

import numpy as np

from service.errors import InvalidRequest
from service.read.band_names import of_the_browser, tagged_number, tagged_numbers
from service.read.geotiff import Header, with_full_name
from service.read.sensors import Sensor

DatedNumber = float | tuple[tuple[date | str, float], ...]
"""One number for all dates, or numbers that hold from a processing baseline on (`04.00`) or from a
date on, each in ascending order."""
INTEGER_SCALE = 0.0001
"""Scale of integer reflectance if nothing states one: that of Sentinel-2."""
BASELINE_OFFSET = -0.1
"""Offset of Sentinel-2 products of processing baseline 04.00 and later: -1000 / 10000.

Source: ESA, Sentinel-2 Products Specification Document (S2-PDGS-TAS-DI-PSD), BOA_ADD_OFFSET.
"""
GIVEN = "the parameter"
"""Source of a number that the caller gave."""
BROWSER = "a file name of the Copernicus Browser"
"""Source of the scale and offset of its exports."""
_BASELINE_WITH_OFFSET = 4.0
_QUANTIFICATION = 10_000.0
_MOST_REFLECTANCE = 2.0
"""No offset of reflectance is larger."""
_BASELINE_TEXT = re.compile(r"N?(\d{1,2}?)(?:\.(\d+)|(\d\d))?")  # 05.09, 5.09, 0509, N0509, 509
_NAMED_BASELINE = re.compile(r"_N(\d{2})(\d{2})_")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Scale and offset of one band of one file, and the source of each."""

    scale: float
    offset: float
    scale_source: str | None = None
    """Source of the scale; None if nothing states one, so that the usual scale is used."""
    offset_source: str | None = None
    """Source of the offset; None if nothing states one, so that it is 0."""


def calibration_of(
    header: Header,
    at: int,
    *,
    scale: float | None = None,
    offset: float | None = None,
    sensor: Sensor | None = None,
) -> Calibration:
    """Scale and offset of a band, from the first source that states them.

    The sources are, in this order: the request, GDAL's scale and offset, tags, Sentinel-2's
    processing baseline, the sensor, and the number type.

    Args:
        header: the file's header.
        at: position of the band in the file, from 0.
        scale: the caller's scale for this file's date.
        offset: the caller's offset for this file's date.
        sensor: the file's sensor; None if unknown.
    """
    integer = np.dtype(header.dtypes[at]).kind in "iu"
    factor, factor_source = (scale, GIVEN) if scale is not None else stated_scale(header, at)
    shift, shift_source = (offset, GIVEN) if offset is not None else _stated_offset(header, at)
    if shift is not None and factor and shift_source != GIVEN and abs(shift) > _MOST_REFLECTANCE:
        # An offset in the numbers stored: reflectance = (value + offset) x scale.
        shift *= factor
    if factor is None and sensor and sensor.scale is not None and integer:
        factor, factor_source = sensor.scale, sensor.label
        if shift is None:
            shift, shift_source = sensor.offset, sensor.label
    if shift is None and sensor and sensor.name != "sentinel-2":
        shift, shift_source = 0.0, sensor.label  # Sentinel-2 alone has such an offset
    if shift is None and integer:
        shift, shift_source = _baseline_offset(header)
    # A scale of 0 would make all values equal, so it means that no scale was set.
    return Calibration(
        scale=factor or (INTEGER_SCALE if integer else 1.0),
        offset=shift or 0.0,
        scale_source=factor_source if factor else None,
        offset_source=None if shift is None else shift_source,
    )


def stated_scale(header: Header, at: int) -> tuple[float | None, str]:
    """The scale that a file states for a band, and its source; None if it states none."""
    if header.scales[at] != 1:
        return header.scales[at], "GDAL's scale"
    tags = _tags(header, at)
    found = tagged_number(tags, "scale", "scale_factor")
    if found is not None:
        return found, "the tag `scale`"
    if steps := _steps_per_unit(tags):
        return 1 / steps, "BOA_QUANTIFICATION_VALUE"
    dtype = np.dtype(header.dtypes[at])
    if dtype.kind == "u" and of_the_browser(header.name):
        return 1 / np.iinfo(dtype).max, BROWSER
    return None, ""


def _stated_offset(header: Header, at: int) -> tuple[float | None, str]:
    if header.offsets[at] != 0:
        return header.offsets[at], "GDAL's offset"
    tags = _tags(header, at)
    found = tagged_number(tags, "offset", "add_offset")
    if found is not None:
        return found, "the tag `offset`"
    # As the product's XML and GDAL's SENTINEL2 driver name it, per band or with a band's suffix.
    added = {
        number
        for key in tags
        if key.startswith(("boa_add_offset", "radio_add_offset"))
        and (number := tagged_number(tags, key)) is not None
    }
    if len(added) == 1:
        (number,) = added
        steps = _steps_per_unit(tags) or _QUANTIFICATION
        return number / steps, f"BOA_ADD_OFFSET {number:g}"
    return (0.0, BROWSER) if of_the_browser(header.name) else (None, "")


def _steps_per_unit(tags: Mapping[str, str]) -> float | None:
    number = tagged_number(tags, "boa_quantification_value", "quantification_value")
    return number if number and number > 1 else None


def _baseline_offset(header: Header) -> tuple[float | None, str]:
    """The offset that follows from Sentinel-2's processing baseline; None if it is not known."""
    tags = dict(map(with_full_name, header.tags.items()))
    baseline = _baseline(header)
    applied = next(((k, v) for k, v in tags.items() if k.endswith("boa_offset_applied")), None)
    before = baseline is not None and baseline < _BASELINE_WITH_OFFSET
    if applied is not None and not before:  # products before 04.00 have no offset
        is_applied = applied[1].strip().lower() in {"true", "1", "yes"}
        return (0.0 if is_applied else BASELINE_OFFSET), f"the tag `{applied[0]}`"
    if baseline is None:
        return None, ""
    return (0.0 if before else BASELINE_OFFSET), f"processing baseline {baseline:05.2f}"


def _baseline(header: Header) -> float | None:
    """Sentinel-2's processing baseline by a tag or the product's name; None if neither has it."""
    tags = dict(map(with_full_name, header.tags.items()))
    tagged = next((v for k, v in tags.items() if k.endswith("processing_baseline")), "")
    named = _NAMED_BASELINE.search(header.name)
    if stated := _BASELINE_TEXT.fullmatch(tagged.strip()):
        return float(f"{stated[1]}.{stated[2] or stated[3] or 0}")
    return float(f"{named[1]}.{named[2]}") if named else None


_BY_BAND = ("scale", "scale_factor", "offset", "add_offset")


def _tags(header: Header, at: int) -> dict[str, str]:
    """The tags of a band and its file; of a file's list with a number for each band, the band's."""
    tags = dict(header.tags)
    for key in _BY_BAND:
        numbers = tagged_numbers(tags.get(key, ""))
        if len(numbers) == header.count > 1:
            tags[key] = f"{numbers[at]:.12g}"
    return {**tags, **header.band_tags[at]}


def number_on(
    name: str, given: DatedNumber | None, day: date | None, header: Header
) -> float | None:
    """The caller's number for a file's baseline or date; None if the caller gave none for it.

    Args:
        name: name of the parameter, for messages.
        given: value of the parameter.
        day: the file's date; None for undated imagery.
        header: the file's header.

    Raises:
        InvalidRequest: the number depends on the date or baseline, and the file has none.
    """
    if given is None or isinstance(given, int | float):
        return given
    by_baseline = [(float(s), number) for s, number in given if isinstance(s, str)]
    by_date = [(s, number) for s, number in given if not isinstance(s, str)]
    baseline = _baseline(header) if by_baseline else None
    if baseline is not None:
        found = next((number for since, number in reversed(by_baseline) if since <= baseline), None)
        if found is not None or not by_date:
            return found
    elif not by_date:
        raise InvalidRequest.of(
            name,
            "the number holds from a processing baseline on, but neither a tag nor the name of "
            f"'{header.name}' states its baseline: give the number from a date on as well, as in "
            f"{name}=04.00:-0.1,2022-01-25:-0.1",
        )
    if day is None:
        raise InvalidRequest.of(
            name,
            f"the number holds from a date on, but '{header.name}' has no date: give one number, "
            "or `dates`",
        )
    return next((number for since, number in reversed(by_date) if since <= day), None)


def days_in_words(days: Sequence[date]) -> str:
    """Dates, shortened to the first and last if there are many."""
    if len(days) <= 3:
        return ", ".join(map(str, days))
    return f"{len(days)} dates from {min(days)} to {max(days)}"

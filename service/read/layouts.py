"""Layouts: the bands and dates of each file.

One function per layout assigns bands and dates to files. The request's parameters take precedence
over the files' metadata. Only headers are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from typing import Any, Literal

from service.errors import InvalidRequest, MissingBands, MissingDates
from service.read.band_names import (
    ALPHA,
    CLASSI,
    CLASSI_BANDS,
    PRODUCT_BANDS,
    PRODUCT_COUNTS,
    QUALITY,
    SCL,
    UDM2,
    band_at_wavelength,
    band_in_name,
    band_of,
    behind_counts,
    behind_positions,
    calls_itself_alpha,
    ends_as_alpha,
    is_broad_nir,
    level_of,
    of_the_browser,
    only_positions,
    product_bands,
    quality_of,
    stem,
    tagged_band,
    tagged_level,
)
from service.read.dates import (
    WRITING_TAG,
    are_after_periods,
    date_of,
    date_text,
    name_contradicts,
    named_days,
    tagged_date,
    tagged_dates,
)
from service.read.geotiff import Header, with_full_name
from service.read.reflectance import DatedNumber

Layout = Literal["file-per-date", "file-per-band-and-date", "file-per-band", "single-file"]


_UDM2_BANDS = frozenset({"clear", "snow", "shadow", "cloud"})
"""Descriptions in Planet's Usable Data Mask 2, whose first band is "clear"."""


@dataclass(frozen=True, kw_only=True)
class StackOptions:
    """The request's parameters about the files; None is determined from the files."""

    layout: Layout | None = None
    dates: tuple[date, ...] | None = None
    """One date per file, per band of a file-per-band file, or per date of a single-file stack."""
    bands: tuple[str, ...] | None = None
    """Band names in the order of the bands; for files with one band, in the order of the files.
    Files with a cloud mask or with another number of bands need no name."""
    scale: DatedNumber | None = None
    offset: DatedNumber | None = None
    """reflectance = value x scale + offset; one number for all dates, or numbers from dates on."""
    sensor: str | None = None
    """A key of `sensors.BY_NAME`; None detects the sensor from the files."""
    mask: str | None = None
    """`auto`, `none`, or rules as `masks.parse_mask` reads them."""
    grid: str | None = None
    """`strict`, `finest`, a CRS and pixel size such as `EPSG:32631@10`, or a file's name."""
    bbox: tuple[float, float, float, float] | None = None
    """West, south, east, north in degrees: only this part is read."""
    left_out: tuple[tuple[str, str], ...] = ()
    """Files of the request that were left out, such as members of a zip, each with the reason."""
    area: Mapping[str, Any] | None = None
    """A GeoJSON Polygon or MultiPolygon in degrees: only this part is read."""


def _is_of_a_mask(text: str | None) -> bool:
    return band_of(text) == SCL or quality_of(text) is not None or calls_itself_alpha(text)


@dataclass(frozen=True)
class DescribedFile:
    """A header with the band names and dates in its descriptions and tags."""

    header: Header
    counted: bool = False
    """Whether the file's name only counts the bands of a stack, so that it names none."""
    by_name: bool = False
    """Whether the name of a file of one band counts, because its description is that of others."""

    @property
    def name(self) -> str:
        """The caller's name for the file."""
        return self.header.name

    @property
    def count(self) -> int:
        """Bands in the file."""
        return self.header.count

    @cached_property
    def bands(self) -> tuple[str | None, ...]:
        """The name of each band by its description or tags, also of quality bands and alpha."""
        if self.by_name:
            return (None,)
        mask = quality_of(stem(self.name)) if self.count > 1 else None
        if mask == UDM2 or {(d or "").lower() for d in self.header.descriptions} >= _UDM2_BANDS:
            return (UDM2, *[None] * (self.count - 1))
        if mask == CLASSI and self.count == len(CLASSI_BANDS):
            return CLASSI_BANDS
        if self.count == 2 and of_the_browser(self.name) and not any(self.header.descriptions):
            return (self.name_band, ALPHA)  # dataMask
        words = list(zip(self.texts, self.header.band_tags, strict=True))
        names = [
            band_at_wavelength(tags, text)
            if self.only_positions and not _is_of_a_mask(text)
            else band_of(text) or tagged_band(tags) or quality_of(text)
            for text, tags in words
        ]
        if any(is_broad_nir(text) for text in self.texts):
            names = [
                "B8A" if name == "B08" and not is_broad_nir(text) else name
                for name, (text, _) in zip(names, words, strict=True)
            ]
        for at, (text, tags) in enumerate(words):
            if names[at] is None and (
                calls_itself_alpha(text) or calls_itself_alpha(tags.get("description"))
            ):
                names[at] = ALPHA
        # GDAL assumes that the fourth of four 8-bit bands is alpha, but in a satellite image it is
        # the near infrared. It is alpha only if all other bands have a name and it has none.
        alpha = self.header.alpha
        if alpha and not words[alpha - 1][0] and sum(map(bool, names)) == self.count - 1:
            names[alpha - 1] = ALPHA
        return tuple(names)

    @cached_property
    def only_positions(self) -> bool:
        """Whether the descriptions only count the bands, as `Band 1`, `Band 2`, ..."""
        return only_positions([text for text in self.texts if not _is_of_a_mask(text)])

    @cached_property
    def texts(self) -> tuple[str | None, ...]:
        """The bands' descriptions, without positions before their names and counts of dates."""
        return self._counted_texts[0]

    @property
    def counts(self) -> tuple[int, ...] | None:
        """The number of each band's date behind its name, from 0 or 1; None without such numbers.

        They do not count if the bands have dates.
        """
        return None if any(self.days) else self._counted_texts[1]

    @cached_property
    def _counted_texts(self) -> tuple[tuple[str | None, ...], tuple[int, ...] | None]:
        return behind_counts(behind_positions(self.header.descriptions))

    @cached_property
    def days(self) -> tuple[date | None, ...]:
        """The date of each band by its tags or description; None without one."""
        words = zip(self.header.descriptions, self.header.band_tags, strict=True)
        found = [
            tagged_date(tags, self.header.tags)
            or date_of(text)
            or date_of(tags.get("description") or tags.get("name"))
            for text, tags in words
        ]
        texts = [text.replace("/", "-") for text in self.header.descriptions if text]
        if self.count > 1 and len(texts) == self.count and not any(found):
            found = named_days(texts)  # forms that count only if all bands have them
        if not any(found) and len(listed := tagged_dates(self.header.tags)) == self.count:
            return listed
        return tuple(found)

    @cached_property
    def name_band(self) -> str | None:
        """The band in the file's name, or else in its folder's name."""
        if self.counted:
            return None
        return band_in_name(self.name) or (ALPHA if ends_as_alpha(stem(self.name)) else None)

    @cached_property
    def stated_levels(self) -> tuple[tuple[str, str], ...]:
        """The levels of Sentinel-2 reflectance that tags and names state, each with its source."""
        tagged = tagged_level(dict(map(with_full_name, self.header.tags.items())))
        named = level_of(self.name)
        found = [(tagged[0], f"the tag {tagged[1]}")] if tagged else []
        return (*found, (named, "the name")) if named else tuple(found)

    @property
    def level(self) -> str | None:
        """The level of Sentinel-2 reflectance; 1C if one source states 1C and another 2A."""
        levels = {level for level, _ in self.stated_levels}
        return min(levels, default=None)

    @cached_property
    def is_a_picture(self) -> bool:
        """Whether the file has several bands, and nothing names or dates one of them."""
        return self.count > 1 and not any(self.bands) and not any(self.days)

    @property
    def product_bands(self) -> tuple[str, ...]:
        """The first bands if the file is a whole product without band names; else empty."""
        return () if any(self.bands) else product_bands(self.name, self.count)

    @property
    def own_band(self) -> str | None:
        """The band of a file with one band, by its description or by the file's name."""
        return (self.bands[0] or self.name_band) if self.count == 1 else None

    @property
    def is_mask(self) -> bool:
        """Whether the file holds only a quality band."""
        bands = {band for band in (*self.bands, self.own_band) if band}
        return bool(bands) and bands <= QUALITY | {ALPHA}

    @cached_property
    def tag_day(self) -> date | None:
        """The date in the file's tags."""
        return tagged_date(self.header.tags)

    @property
    def tag_text(self) -> str | None:
        """The text of the file's tag of the acquisition, whatever it holds."""
        return date_text(self.header.tags)

    @cached_property
    def written_day(self) -> date | None:
        """The date of the tag TIFFTAG_DATETIME, which may be the time of writing."""
        return date_of(self.header.tags.get(WRITING_TAG))

    @property
    def only_day(self) -> date | None:
        """The date of the bands, if all bands with a date have the same one."""
        days = {day for day in self.days if day}
        return days.pop() if len(days) == 1 else None


@dataclass(frozen=True, kw_only=True)
class BandAssignment:
    """The bands of one date in one file."""

    file: DescribedFile
    numbers: dict[str, int] = field(default_factory=dict)
    """Band name to its number in the file, from 1; only bands that are used."""
    day: date | None
    turn: int
    """Number of the observation, which replaces the date of undated imagery."""


@dataclass(frozen=True, kw_only=True)
class LayoutQuery:
    """The files, the request's parameters about them, and the needed bands."""

    files: tuple[DescribedFile, ...]
    dates: tuple[date, ...] | None
    names: tuple[str, ...] | None
    """Band names that the caller gave, in canonical form where they are known."""
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()
    """Bands that are used if every date has them."""
    usable: frozenset[str]
    """The needed and optional bands, their twins, the quality bands that may be used, and alpha."""

    @property
    def named(self) -> tuple[DescribedFile, ...]:
        """The files that `bands` names: those with as many bands as names, or one file per name.

        Cloud masks and files with another number of bands keep their own names.
        """
        if not self.names:
            return ()
        n = len(self.names)
        fitting = tuple(f for f in self.files if n in {f.count, f.count - _alphas(f)})
        if fitting and n > 1:
            return fitting
        if len(self.files) == n:
            return self.files
        return tuple(file for file in self.files if not file.is_mask)

    @property
    def one_band_each(self) -> tuple[DescribedFile, ...]:
        """The files that `bands` names if it has one name per file."""
        return self.files if len(self.names or ()) == len(self.files) else self.named

    def is_left_out(self, file: DescribedFile) -> bool:
        """Whether a file is a picture beside files of one band and date, such as an RGB image."""
        return file.is_a_picture and self._has_single_bands

    @cached_property
    def _has_single_bands(self) -> bool:
        return self.dates is None and any(file.own_band for file in self.files)


def _alphas(file: DescribedFile) -> int:
    """1 if the last band is alpha, which is not imagery; else 0."""
    return int(file.header.alpha == file.count or file.bands[-1] == ALPHA)


def file_per_date(query: LayoutQuery) -> list[BandAssignment]:
    """One slot per file.

    Raises:
        InvalidRequest: `bands` or `dates` do not fit the files, or a file holds a band twice.
        MissingBands: a file has as many bands as the others but no band names.
        MissingDates: there are fewer dates than files.
    """
    numbers = [(file, _bands_of_one_date(file, query)) for file in query.files]
    held = [(file, found) for file, found in numbers if found]
    files = [file for file, _ in held]
    imagery = [file for file in files if not file.is_mask]
    _check_unnamed([file for file, found in numbers if not found], imagery)
    days = _file_days(files, query)
    return [
        BandAssignment(file=file, numbers=found, day=day, turn=turn)
        for turn, ((file, found), day) in enumerate(zip(held, days, strict=True))
    ]


def _bands_of_one_date(file: DescribedFile, query: LayoutQuery) -> dict[str, int]:
    names: tuple[str | None, ...] = file.bands
    if query.names and any(file is named for named in query.named):
        names = query.names
        if len(names) == file.count - 1 and _alphas(file):
            names = (*names, ALPHA)
        if len(names) != file.count:
            raise InvalidRequest.of("bands", names_and_bands(len(names), file))
    elif not any(names):
        if file.count == 1:
            names = (file.name_band,)
        elif not query.names:
            names = file.product_bands
    numbers: dict[str, int] = {}
    for number, band in enumerate(names, start=1):
        if band in query.usable and numbers.setdefault(band, number) != number:
            raise InvalidRequest.of(
                "layout",
                f"the layout is file-per-date, but '{file.name}' holds {band} in its bands "
                f"{numbers[band]} and {number}: give layout=single-file if the file has several "
                "dates, or name its bands with `bands`",
            )
    return numbers


def _check_unnamed(ignored: Sequence[DescribedFile], used: Sequence[DescribedFile]) -> None:
    """Reject a file that has as many bands as the others but no band names."""
    counts = {file.count for file in used} - {1}
    for file in ignored:
        if file.count in counts and not any(file.bands):
            raise MissingBands(
                f"'{file.name}' has {file.count} bands like the other files, but none of them has "
                "a name: name each band in its description, or give `bands`"
            )


def _file_days(files: Sequence[DescribedFile], query: LayoutQuery) -> Sequence[date | None]:
    """The one date of each file."""
    if query.dates is not None:
        return _given_days(files, query, query.dates)
    tagged = _tag_days(files)
    named = named_days([file.name for file in files])
    written = [file.written_day for file in files]
    # Many programs store the time of writing in TIFFTAG_DATETIME. Dates in the file names therefore
    # take precedence if they distinguish the files at least as well, and a single day for several
    # files of one band is ignored.
    named_apart = None not in named and len(set(named)) > 1 and len(set(named)) >= len(set(written))
    made = are_after_periods([file.name for file in files], written)
    if named_apart or made or (len(set(written)) == 1 and _repeat_a_band(files)):
        written = [None] * len(files)
    if _is_of_writing(files, tagged, named):
        tagged = [None] * len(files)
    return [
        tag or wrote or name or file.only_day
        for file, tag, wrote, name in zip(files, tagged, written, named, strict=True)
    ]


def _is_of_writing(
    files: Sequence[DescribedFile], tagged: Sequence[date | None], named: Sequence[date | None]
) -> bool:
    """Whether one day in all files' tags is not the acquisition, because their names differ."""
    if None in tagged or None in named or len(set(tagged)) > 1 or len(set(named)) < 2:
        return False
    pairs = zip(files, tagged, strict=True)
    return _repeat_a_band(files) and all(day and name_contradicts(f.name, day) for f, day in pairs)


def days_in_conflict(files: Sequence[DescribedFile]) -> list[tuple[DescribedFile, date, date]]:
    """Files whose tags and names state different dates: the file, the tag's and the name's date.

    The date of a file's bands, by their tags or descriptions, counts like a tag of the file.

    Names without a date that varies say nothing about the acquisition.
    """
    named = named_days([file.name for file in files])
    if len({day for day in named if day}) < 2:
        return []
    both = zip(files, _tag_days(files), named, strict=True)
    return [
        (file, tag, name)
        for file, own, name in both
        if (tag := own or file.only_day) and name and name_contradicts(file.name, tag)
    ]


def stated_days(files: Sequence[DescribedFile]) -> list[date | None]:
    """The date that each file's tags, or else its name, state for the acquisition."""
    named = named_days([file.name for file in files])
    return [tag or name for tag, name in zip(_tag_days(files), named, strict=True)]


def _tag_days(files: Sequence[DescribedFile]) -> list[date | None]:
    """The date in each file's tags, also in forms that count only if all files have them."""
    days = [file.tag_day for file in files]
    texts = [file.tag_text for file in files]
    if any(days) or None in texts:
        return days
    # A slash in a tag does not separate folders.
    return named_days([(text or "").replace("/", "-") for text in texts])


def _repeat_a_band(files: Sequence[DescribedFile]) -> bool:
    """Whether several files contain the same bands."""
    bands = [file.bands if any(file.bands) else file.own_band for file in files]
    return len(set(bands)) < len(bands)


def _given_days(
    files: Sequence[DescribedFile], query: LayoutQuery, dates: tuple[date, ...]
) -> Sequence[date]:
    """The dates that the caller gave for the used files, or for all files."""
    if len(dates) == len(files) or not files:
        return dates[: len(files)]
    if len(dates) == len(query.files):
        by_file = {id(file): day for file, day in zip(query.files, dates, strict=True)}
        return [by_file[id(file)] for file in files]
    raise _wrong_number(dates, len(files), counted(len(files), "file"))


def _wrong_number(dates: Sequence[date], n: int, what: str) -> Exception:
    """The error for a wrong number of dates: `MissingDates` if there are too few."""
    detail = f"{what} but {counted(len(dates), 'date')}: give {n} dates, in order"
    return MissingDates(detail) if len(dates) < n else InvalidRequest.of("dates", detail)


def file_per_band(query: LayoutQuery) -> list[BandAssignment]:
    """One slot per band of a file.

    Raises:
        InvalidRequest: `bands` or `dates` do not fit the files, or a file holds several bands.
        MissingDates: there are fewer dates than bands in a file.
    """
    bands = _bands_of_files(query)
    held = [(file, band) for file, band in bands if band in query.usable]
    days = _band_days([file for file, _ in held], query)
    turns: Counter[str] = Counter()
    slots = []
    for (file, band), own in zip(held, days, strict=True):
        for number, day in enumerate(own, start=1):
            slots.append(
                BandAssignment(file=file, numbers={band: number}, day=day, turn=turns[band])
            )
            turns[band] += 1
    return slots


def _bands_of_files(query: LayoutQuery) -> list[tuple[DescribedFile, str]]:
    """The one band of each file; files that name no band are left out."""
    found: list[tuple[DescribedFile, str]] = []
    if query.names:
        named = query.one_band_each
        if len(query.names) != len(named):
            raise InvalidRequest.of(
                "bands",
                f"{counted(len(query.names), 'name')} but {counted(len(named), 'file')}: give one "
                "name per file, in the order of the files",
            )
        found += zip(named, query.names, strict=True)
    taken = {id(file) for file, _ in found}
    for file in query.files:
        if id(file) in taken or query.is_left_out(file):
            continue
        bands = sorted({band for band in file.bands if band and band != ALPHA})
        if len(bands) > 1:
            raise InvalidRequest.of(
                "layout",
                f"the layout is file-per-band, but '{file.name}' holds {', '.join(bands)}: give "
                "another `layout`, or leave it out",
            )
        band = bands[0] if bands else file.name_band or (ALPHA if ALPHA in file.bands else None)
        if band:
            found.append((file, band))
    return found


def _band_days(files: Sequence[DescribedFile], query: LayoutQuery) -> list[Sequence[date | None]]:
    """The dates of each file's bands."""
    singles = all(file.count == 1 for file in files)
    if query.dates is None:
        if singles:
            return [(day,) for day in _file_days(files, query)]
        named = named_days([file.name for file in files])
        return [
            (file.tag_day or name or file.days[0],) if file.count == 1 else file.days
            for file, name in zip(files, named, strict=True)
        ]
    dates = query.dates
    other = next((file for file in files if file.count != len(dates)), None)
    if other is None:
        return [_dates_of_bands(file, dates, query) for file in files]
    if singles:
        return [(day,) for day in _given_days(files, query, dates)]
    what = f"'{other.name}' has {counted(other.count, 'band')}"
    raise _wrong_number(dates, other.count, what)


def _dates_of_bands(
    file: DescribedFile, dates: tuple[date, ...], query: LayoutQuery
) -> tuple[date, ...]:
    """The caller's dates in the order of a file's bands."""
    if query.names or not in_order_of_counts(file, dates):
        return dates
    by_number = dict(zip(sorted(file.counts or ()), dates, strict=True))
    return tuple(by_number[number] for number in file.counts or ())


def single_file(query: LayoutQuery) -> list[BandAssignment]:
    """One slot per date of the one file.

    Raises:
        InvalidRequest: `bands` or `dates` do not fit the file.
        MissingDates: there are fewer dates than the file holds.
    """
    slots: list[BandAssignment] = []
    for file in query.files:
        slots += _slots_of_one_file(file, query, first_turn=len(slots))
    if query.dates is None or not slots:
        return slots
    if len(query.dates) != len(slots):
        held = f"the files hold {counted(len(slots), 'date')}"
        if len(query.files) == 1:
            only = query.files[0]
            held = f"'{only.name}' holds {counted(len(slots), 'date')} ({only.count} bands)"
        raise _wrong_number(query.dates, len(slots), held)
    return [replace(slot, day=day) for slot, day in zip(slots, query.dates, strict=True)]


def _slots_of_one_file(
    file: DescribedFile, query: LayoutQuery, *, first_turn: int
) -> list[BandAssignment]:
    """The dates of a file of dates x bands, in the order in which they appear."""
    described = all(
        day for band, day in zip(file.bands, file.days, strict=True) if band or not any(file.bands)
    )
    seen: Counter[tuple[str, date | None]] = Counter()
    found: dict[tuple[date | None, int], BandAssignment] = {}
    for number, band in enumerate(_names_in_one_file(file, query, by_day=described), start=1):
        if band not in query.usable:
            continue
        day = file.days[number - 1] if described else None
        # The k-th occurrence of a band is the k-th date, whether the file is ordered by date or by
        # band, unless the bands' names count the dates.
        key = (day, seen[band, day] if query.names or not file.counts else file.counts[number - 1])
        seen[band, day] += 1
        if key not in found:
            found[key] = BandAssignment(file=file, day=day, turn=first_turn + len(found))
        found[key].numbers[band] = number
    if len(found) == 1 and not described:
        (slot,) = found.values()
        (day,) = _file_days([file], replace(query, dates=None))
        return [replace(slot, day=day)]
    slots = list(found.values())
    if query.names is None and in_order_of_counts(file, query.dates):
        slots = [found[key] for key in sorted(found, key=lambda key: key[1])]
    listed = tagged_dates(file.header.tags)
    if not described and len(listed) == len(slots):
        slots = [replace(slot, day=day) for slot, day in zip(slots, listed, strict=True)]
    return slots


def in_order_of_counts(file: DescribedFile, dates: Sequence[date] | None) -> bool:
    """Whether the numbers behind a file's bands decide which of the caller's dates is whose.

    Programs sort names as texts: B02_1, B02_10, B02_2. Then dates in ascending order are in the
    order of the numbers and not in that of the bands.
    """
    counts = list(dict.fromkeys(file.counts or ()))
    return bool(dates) and counts != sorted(counts) and list(dates or ()) == sorted(dates or ())


def _names_in_one_file(
    file: DescribedFile, query: LayoutQuery, *, by_day: bool
) -> Sequence[str | None]:
    """The band names of a file of dates x bands, one per band."""
    names = query.names
    if names is None:
        if any(file.bands):
            return file.bands
        bands_per_date, rest = divmod(file.count, len(query.dates or ()) or 1)
        if rest == 0 and bands_per_date in PRODUCT_COUNTS:
            unnamed = [None] * (bands_per_date - len(PRODUCT_BANDS))
            return [*PRODUCT_BANDS, *unnamed] * (file.count // bands_per_date)
        return [None] * file.count
    if file.count % len(names):
        raise InvalidRequest.of("bands", names_and_bands(len(names), file))
    if not by_day or len(names) == file.count:
        return names * (file.count // len(names))
    for day, n in Counter(file.days).items():
        if n % len(names):
            what = f"{counted(len(names), 'name')} but '{file.name}' has {counted(n, 'band')}"
            raise InvalidRequest.of(
                "bands", f"{what} of {day}: give one name per band of a date, in band order"
            )
    seen: Counter[date | None] = Counter()
    ordered = []
    for day in file.days:
        ordered.append(names[seen[day] % len(names)])
        seen[day] += 1
    return ordered


def names_and_bands(n: int, file: DescribedFile) -> str:
    """Message for a number of names that differs from a file's number of bands."""
    return (
        f"{counted(n, 'name')} but '{file.name}' has {counted(file.count, 'band')}: give one name "
        "per band of a date, in band order"
    )


def counted(n: int, noun: str) -> str:
    """A number with its noun, as `1 file`, `8 files`."""
    return f"{n} {noun}{'' if n == 1 else 's'}"

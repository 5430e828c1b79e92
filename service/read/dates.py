"""Dates in tags, band descriptions and names of files.

Each function takes text and returns a date; None if the text contains none, or may be read in two
ways. This module opens no file.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from functools import partial
from itertools import pairwise

from service.read.geotiff import with_full_name

# Month names and abbreviations in English, Spanish, French, German, Italian, Portuguese and Dutch,
# without accents.
_MONTHS: Mapping[str, int] = {
    word: month
    for month, words in enumerate(
        (
            "jan january ene enero janv janvier januar jaenner janner gen gennaio janeiro januari",
            "feb february febr febrero fev fevr fevrier februar febbraio fevereiro februari",
            "mar march marzo mars marz maerz mrz marco mrt maart",
            "apr april abr abril avr avril aprile",
            "may mayo mai mag maggio maio mei",
            "jun june junio juin juni giu giugno junho",
            "jul july julio juil juillet juli lug luglio julho",
            "aug august ago agosto aout augustus",
            "sep sept september septiembre septembre set settembre setembro",
            "oct october octubre octobre okt oktober ott ottobre out outubro",
            "nov november noviembre novembre novembro",
            "dec december dic diciembre decembre dez dezember dicembre dezembro",
        ),
        start=1,
    )
    for word in words.split()
}
# Abbreviations that are also English words: "01_set_2018" may be the first set.
_ALSO_WORDS = frozenset({"set", "out"})
_YEAR = r"(?:19[7-9]|20\d)\d"
_MONTH = r"(?P<month>[A-Za-z]{3,10})\.?"
# Year first, as in 20180521, 2018-05-21, 2018_05_21, 2018:05:21, also before a time of day; and the
# day of the year, as in MODIS's A2018141, HLS's 2018141T104421 and Landsat's LC81950252018141LGN00.
_DATE = re.compile(
    rf"(?<!\d)(?P<year>{_YEAR})(?P<sep>[-_./: ]?)(?P<month>0[1-9]|1[0-2])(?P=sep)"
    r"(?P<day>0[1-9]|[12]\d|3[01])(?:(?=\D|$)|(?<=\d{8})(?=\d{6}(?:\d{3})?(?!\d)|\d{4}(?!\d)))"
    r"|(?:(?<![0-9])|(?<=(?<![0-9A-Za-z])L[A-Z]\d{7}))"
    rf"(?P<doy_year>{_YEAR})(?P<doy>[0-3]\d\d)(?!\d)",
    re.IGNORECASE,
)
# ISO's week and day of it: 2018-W21-1, 2018W211.
_WEEK_DAY = re.compile(
    rf"(?<!\d)(?P<year>{_YEAR})(?P<sep>-?)w(?P<week>[0-5]\d)(?P=sep)(?P<day>[1-7])(?![0-9A-Za-z])",
    re.IGNORECASE,
)
# The month in letters: 21May2018, 11 de enero de 2018; 2018Jan11; January 11, 2018.
_LETTERS = (
    re.compile(
        rf"(?<!\d)(?P<day>[0-3]?\d)\.?(?P<sep>[-_. ]{{0,2}})(?:de[-_. ])?{_MONTH}"
        rf"[-_. ]{{0,2}}(?:de[-_. ])?(?P<year>{_YEAR})(?!\d)"
    ),
    re.compile(rf"(?<!\d)(?P<year>{_YEAR})(?P<sep>[-_. ]?){_MONTH}[-_. ]?(?P<day>[0-3]?\d)(?!\d)"),
    re.compile(
        rf"(?<![A-Za-z]){_MONTH}(?P<sep>[-_. ]?)(?P<day>[0-3]\d|\d(?=[-_., ]))(?:st|nd|rd|th)?"
        rf"(?:,? ?|[-_.])(?P<year>{_YEAR})(?!\d)"
    ),
)
# 2018年01月11日, and the same in Korean.
_IDEOGRAPHS = re.compile(
    rf"(?<!\d)(?P<year>{_YEAR}) ?[年년] ?(?P<month>\d{{1,2}}) ?[月월] ?(?P<day>\d{{1,2}})"
)
# Forms that count only if every file has one: a day or month of one digit, the day or the month
# before the other one, a day of the year after a separator, and a year of two digits.
_SHORT = re.compile(
    r"(?<!\d)(?P<year>(?:19[7-9]|20\d)\d)(?P<sep>[-_./])(?P<month>\d{1,2})(?P=sep)"
    r"(?P<day>\d{1,2})(?!\d)"
)
# The year, the month and the day as folders, as in AWS's tiles/31/U/ES/2018/1/11/0/B04.jp2.
_FOLDERS = re.compile(
    r"(?:^|/)(?P<year>(?:19[7-9]|20\d)\d)/(?P<month>\d{1,2})/(?P<day>\d{1,2})(?=/)"
)
_DAY_FIRST = re.compile(
    r"(?<!\d)(?P<day>\d{1,2})(?P<sep>[-_./])(?P<month>\d{1,2})(?P=sep)"
    r"(?P<year>(?:19[7-9]|20\d)\d)(?!\d)"
    r"|(?<!\d)(?P<day8>\d\d)(?P<month8>\d\d)(?P<year8>(?:19[7-9]|20\d)\d)(?!\d)"
)
_ORDINAL = re.compile(rf"(?<!\d)(?P<year>{_YEAR})(?P<sep>[-_./])(?P<doy>[0-3]\d\d)(?!\d)")
# The same without a separator, and without MODIS's or AppEEARS's letters or the time of HLS.
_PLAIN_ORDINAL = re.compile(rf"(?<![0-9A-Za-z])(?P<year>{_YEAR})(?P<doy>[0-3]\d\d)(?![0-9A-Za-z])")
_SHORT_YEAR = re.compile(
    r"(?<!\d)(?P<day>\d{1,2})(?P<sep>[-_. ]?)(?P<month>[A-Za-z]{3,10})(?P=sep)(?P<year>\d\d)(?!\d)"
)
# A month, week or quarter without a day: 2018-05, 05_2018, May2018, 2018_W05, 2018Q1.
_NAMES_OF_MONTHS = "|".join(sorted(_MONTHS.keys() - _ALSO_WORDS, key=len, reverse=True))
_PERIOD = re.compile(
    rf"(?<![0-9A-Za-z])(?P<year>{_YEAR})[-_. ]?(?:w(?P<week>[0-5]\d)|q(?P<quarter>[1-4])"
    rf"|(?P<month>0[1-9]|1[0-2])|(?P<word>{_NAMES_OF_MONTHS}))(?![0-9A-Za-z])"
    r"|(?<![0-9A-Za-z])(?:w(?P<week2>[0-5]\d)|q(?P<quarter2>[1-4])|(?P<month2>0[1-9]|1[0-2])"
    rf"|(?P<word2>{_NAMES_OF_MONTHS}))[-_. ]?(?P<year2>{_YEAR})(?![0-9A-Za-z])",
    re.IGNORECASE,
)
_TIME_OF_DAY = re.compile(r"[T_ -]?\d{4}(?:\d\d)?(?!\d)")
# A time since 1970 in seconds, milliseconds, microseconds or nanoseconds, from 2001 to 2033.
_NAMED_COUNT = re.compile(r"(?<![0-9A-Za-z.])1\d{9}(?:\d{3}|\d{6}|\d{9})?(?![0-9A-Za-z])")
# Texts that resemble a date, with the reason that they are not read as one, for messages.
_UNCLEAR = (
    (_DAY_FIRST, "the day or the month may come first"),
    (_SHORT, "the last number may be a day, or count parts of the month"),
    (_ORDINAL, "it may be a day of the year or a running number"),
    (_PLAIN_ORDINAL, "it may be a day of the year or a running number"),
    (re.compile(rf"(?<!\d){_YEAR}[-_]?w\d\d(?!\d)", re.IGNORECASE), "a week without a day"),
    (re.compile(rf"(?<!\d){_YEAR}[-_]?q[1-4](?!\d)", re.IGNORECASE), "a quarter without a day"),
    (re.compile(rf"(?<!\d){_YEAR}[-_.]?(?:0[1-9]|1[0-2])(?!\d)"), "a month without a day"),
    (
        re.compile(r"(?<!\d)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?!\d)"),
        "the year may have two digits",
    ),
    (_SHORT_YEAR, "the year may come first or last"),
    (_NAMED_COUNT, "it may be a time since 1970 or a running number"),
)
# Tags of the acquisition precede tags that may hold the time of writing.
_DATE_TAGS = (
    "datetime",
    "date_time",
    "acquisition_date",
    "acquisitiondate",
    "acquisition_datetime",
    "acquisition_time",
    "acquisition",
    "date_acquired",
    "date_of_acquisition",
    "acquisitiondatetime",
    "acquisition_day",
    "acq_date",
    "acq_time",
    "acquired",
    "captured",
    "capture_date",
    "observation_date",
    "observation_time",
    "sensing_time",
    "sensing_datetime",
    "sensingtime",
    "sensingdate",
    "sensing_date",
    "sensing_start",
    "datatake_1_datatake_sensing_start",
    "datatake_sensing_start",
    "product_start_time",
    "start_datetime",
    "datetime_from",  # openEO
    "rangebeginningdate",
    "time_coverage_start",
    "system:time_start",
    "system_time_start",
    "beginposition",  # the Copernicus catalogues' search
    "time_start",
    "time_start_utc",
    "start_time",
    "start_date",
    "startdate",
    "scene_date",
    "image_date",
    "imagedate",
    "exif_datetimeoriginal",
    "datetimeoriginal",
    "date",
    "day",
    "time",
    "timestamp",
    "netcdf_dim_time",
    "netcdf_dim_t",
)
# Counts of seconds, milliseconds, microseconds or nanoseconds since 1970, by their digits, as Earth
# Engine (system:time_start), pandas and xarray write them.
_EPOCHS: Mapping[int, float] = {
    digits: unit
    for unit, sizes in ((1.0, (9, 10)), (1e-3, (12, 13)), (1e-6, (15, 16)), (1e-9, (18, 19)))
    for digits in sizes
}
_COUNT = re.compile(r"(?!19|20)[1-9][0-9]*")
_DAY_SECONDS = 86400
_PASS_SECONDS = 7200
"""Counts in names are times only if they are within this time of the day: a satellite passes at one
hour, and dates are at midnight; running numbers are at any hour."""
_EPOCH = datetime(1970, 1, 1)
_SINCE = re.compile(r"(days|hours|minutes|seconds) since ", re.IGNORECASE)
_SECONDS: Mapping[str, int] = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
WRITING_TAG = "tifftag_datetime"
"""The tag of the TIFF standard: some writers store the acquisition, others the time of writing."""


def date_of(text: str | None) -> date | None:
    """The first plausible date (1970 to 2099) in a text; None if there is none.

    In the name of a Sentinel-2 product the first date is the acquisition; later ones are the
    processing.
    """
    return next(_dates(text or ""), None)


def name_contradicts(name: str, day: date) -> bool:
    """Whether a name holds dates, and none of them is a day or less from another source's date.

    A day's difference may be that of time zones.

    Args:
        name: a file's name, with its folders.
        day: the date in the file's tags.
    """
    found = [*_dates(name), *_each(_FOLDERS, name)]
    return bool(found) and all(abs((own - day).days) > 1 for own in found)


def _dates(text: str) -> Iterator[date]:
    """Every date of a text in an unambiguous form, in order."""
    text = _plain(text)
    found = [(match, _numeric) for match in _DATE.finditer(text)]
    found += [(match, _week_day) for match in _WEEK_DAY.finditer(text)]
    found += [(match, _lettered) for form in _LETTERS for match in form.finditer(text)]
    if not text.isascii():
        found += [(match, _ymd) for match in _IDEOGRAPHS.finditer(text)]
    end = 0
    for match, read in sorted(found, key=lambda one: one[0].start()):
        if match.start() >= end and (day := read(match)) is not None:
            yield day
            end = match.end()


def _plain(text: str) -> str:
    """A text with Latin letters without accents, and usual digits in place of wide ones."""
    if text.isascii():
        return text
    letters = unicodedata.normalize("NFKC", text)
    return "".join(unicodedata.normalize("NFKD", c)[0] if c < "\u0250" else c for c in letters)


def _day(year: int, month: int, day: int) -> date | None:
    """A date; None for digits that only look like one, such as 30 February."""
    try:
        return date(year, month, day)
    except ValueError:
        return None


def _ymd(match: re.Match[str]) -> date | None:
    return _day(int(match["year"]), int(match["month"]), int(match["day"]))


def _ordinal(match: re.Match[str], year: str = "year") -> date | None:
    """The date of a year and a day of it; None if the year has no such day."""
    first = date(int(match[year]), 1, 1)
    day = first + timedelta(days=int(match["doy"]) - 1)
    return day if match["doy"] != "000" and day.year == first.year else None


def _week_day(match: re.Match[str]) -> date | None:
    try:
        return date.fromisocalendar(*(int(match[part]) for part in ("year", "week", "day")))
    except ValueError:
        return None


def _numeric(match: re.Match[str]) -> date | None:
    return _ordinal(match, "doy_year") if match["doy"] else _ymd(match)


def _lettered(match: re.Match[str]) -> date | None:
    """The date of a match whose month is a word; None if the word is not a month."""
    word = match["month"].lower()
    month = _MONTHS.get(word)
    if word in _ALSO_WORDS and (match.re is not _LETTERS[0] or match["sep"] not in {"", "-", "."}):
        return None
    if month is None:
        return None
    return _day(int(match["year"]), month, int(match["day"]))


def _each(form: re.Pattern[str], text: str) -> Iterator[date]:
    """Every date of a form with the groups year, month and day in a text."""
    return (day for match in form.finditer(text) if (day := _ymd(match)))


def _short_dates(text: str) -> Iterator[date]:
    """Dates with the year first, and day or month of one digit."""
    return _each(_SHORT, text)


def _day_first_dates(text: str, *, month_first: bool = False) -> Iterator[date]:
    """Dates with the year last: the day before the month, or the month before the day."""
    for match in _DAY_FIRST.finditer(text):
        year, month, day = (
            int(match[name] or match[f"{name}8"]) for name in ("year", "month", "day")
        )
        if month_first:
            month, day = day, month
        if found := _day(year, month, day):
            yield found


def _ordinal_dates(text: str) -> Iterator[date]:
    """Dates of a year and a day of it, separated."""
    return (day for match in _ORDINAL.finditer(text) if (day := _ordinal(match)))


def _short_year_dates(text: str) -> Iterator[date]:
    """Dates as 11-JAN-18, whose year has two digits."""
    for match in _SHORT_YEAR.finditer(_plain(text)):
        month = _MONTHS.get(match["month"].lower())
        year = int(match["year"])
        if month and (day := _day(year + (1900 if year >= 70 else 2000), month, int(match["day"]))):
            yield day


def named_days(names: Sequence[str]) -> list[date | None]:
    """The date in each file's name, determined from all names together.

    Ambiguous forms (day or month first, one digit, a separated day of the year, a year of two
    digits) count if all files have them and the files together exclude the other reading. If names
    hold several dates, the first date that differs between files is used; the file's own date
    precedes its folder's.

    Args:
        names: names with their folders, separated by `/`.

    Returns:
        One entry per name; None for a name without a date.
    """
    parts = [tuple(reversed(name.split("/"))) for name in names]

    def found(form: Callable[[str], Iterator[date]]) -> list[list[date]]:
        return [[day for part in own for day in form(part)] for own in parts]

    dates = [[*own, *_each(_FOLDERS, name)] for own, name in zip(found(_dates), names, strict=True)]
    if dates and not all(dates):
        short = found(_short_dates)
        if all(short):
            dates = [[] for _ in names] if _count_parts_of_months(names) else short
        elif not any(dates):
            dates = _unusual(names, found) or dates
    elif dates and _are_running_numbers(names, dates):
        return [None] * len(names)
    days = _told_apart(dates)
    return [None] * len(names) if are_after_periods(names, days) else days


def _unusual(
    names: Sequence[str], found: Callable[[Callable[[str], Iterator[date]]], list[list[date]]]
) -> list[list[date]]:
    """The dates of names in a form that only the names together make clear; empty without one."""
    day_first = found(_day_first_dates)
    if all(day_first):
        return day_first if _day_is_first(names) else []
    month_first = found(partial(_day_first_dates, month_first=True))
    if all(month_first):  # a day above 12 excludes the other order in some of them
        return month_first
    # Folders and files may both be parts of one: 2018/011/B04.tif.
    ordinal = [list(_ordinal_dates(name)) for name in names]
    if all(ordinal) and _are_days_of_the_year(names):
        return ordinal
    short_year = found(_short_year_dates)
    if all(short_year):
        return short_year if _year_is_last(names) else []
    counted = found(_counted_dates)
    return counted if all(counted) and _are_times(names) else []


def _day_is_first(names: Sequence[str]) -> bool:
    """Whether 05-01-2021 can only be 5 January: by a dot, or a day above 12."""
    matches = [match for name in names for match in _DAY_FIRST.finditer(name)]
    return any(m["sep"] == "." or int(m["day8"] or m["day"]) > 12 for m in matches)


def _count_parts_of_months(names: Sequence[str]) -> bool:
    """Whether the last numbers of 2018-05-1 may count decades or weeks of months, and not days.

    They then count from 1 without a gap, and have one digit also behind months of two.
    """
    matches = [match for name in names for match in _SHORT.finditer(name)]
    days = {int(match["day"]) for match in matches}
    if len(days) < 2 or any(len(match["day"]) > 1 for match in matches):
        return False
    return days == set(range(1, len(days) + 1)) or any(m["month"][0] == "0" for m in matches)


def _are_running_numbers(names: Sequence[str], dates: Sequence[Sequence[date]]) -> bool:
    """Whether 2018001, 2018002, 2018003 may be numbers of the files, and not days of the year."""
    if len(names) < 3 or any(len(own) != 1 for own in dates):
        return False
    matches = [_PLAIN_ORDINAL.search(name) for name in names]
    numbers = sorted({(m["year"], int(m["doy"])) for m in matches if m})
    counts = [number for _, number in numbers]
    if None in matches or len({year for year, _ in numbers}) > 1:
        return False
    return counts[0] <= 1 and len(counts) == counts[-1] - counts[0] + 1 > 2


def are_after_periods(names: Sequence[str], days: Sequence[date | None]) -> bool:
    """Whether dates are when composites were made: after the month, week or quarter in the name.

    Args:
        names: names of files, with their folders.
        days: a date of each file, from its name or from a tag of the time of writing.

    Returns:
        True if all names state a period, not all the same, and every date is after its period.
    """
    if None in days or len(names) < 2:
        return False
    ends = [_periods(name) for name in names]
    return (
        all(ends)
        and len(set(map(tuple, ends))) > 1
        and all(day and day > max(own) for day, own in zip(days, ends, strict=True))
    )


def _periods(name: str) -> list[date]:
    """The last day of each month, week and quarter that a name states without a day."""
    return [_period_end(match) for match in _PERIOD.finditer(_without_dates(_plain(name)))]


def _without_dates(text: str) -> str:
    """A text without its dates of year, month and day, and the times of day behind them."""
    for match in reversed(list(_DATE.finditer(text))):
        if match["day"]:
            time_of_day = _TIME_OF_DAY.match(text, match.end())
            end = time_of_day.end() if time_of_day else match.end()
            text = f"{text[: match.start()]}#{text[end:]}"
    return text


def _period_end(match: re.Match[str]) -> date:
    """The last day of a period; of a week, the last one that any way of counting gives it."""
    part = {key.rstrip("2"): value for key, value in match.groupdict().items() if value}
    year = int(part["year"])
    if "week" in part:
        return date(year, 1, 1) + timedelta(days=7 * int(part["week"]) + 6)
    if "quarter" in part:
        month = 3 * int(part["quarter"])
    else:
        month = int(part["month"]) if "month" in part else _MONTHS[part["word"].lower()]
    return date(year + month // 12, month % 12 + 1, 1) - timedelta(days=1)


def _are_days_of_the_year(names: Sequence[str]) -> bool:
    """Whether 2018-011 can only be the 11th day of 2018, and not a running number.

    Running numbers count from 0 or 1 without a gap. Other numbers often follow `_` or `.`, so there
    several days are required.
    """
    matches = [match for name in names for match in _ORDINAL.finditer(name)]
    by_year: dict[str, set[int]] = defaultdict(set)
    for match in matches:
        by_year[match["year"]].add(int(match["doy"]))
    counts_up = all(min(own) <= 1 and max(own) - min(own) < len(own) for own in by_year.values())
    usual = all(match["sep"] in "-/" for match in matches)
    return not counts_up and (usual or sum(map(len, by_year.values())) > 1)


def _year_is_last(names: Sequence[str]) -> bool:
    """Whether 11-JAN-18 is a day of 2018: the last number varies less than the first one."""
    matches = [match for name in names for match in _SHORT_YEAR.finditer(_plain(name))]
    matches = [match for match in matches if match["month"].lower() in _MONTHS]
    days, years = ({match[part] for match in matches} for part in ("day", "year"))
    return len(years) <= len(days)


def _times(text: str) -> Iterator[datetime]:
    """Every time since 1970 in a text, in order."""
    for match in _NAMED_COUNT.finditer(text):
        yield _EPOCH + timedelta(seconds=int(match[0]) * _EPOCHS[len(match[0])])


def _counted_dates(text: str) -> Iterator[date]:
    return (moment.date() for moment in _times(text))


def _are_times(names: Sequence[str]) -> bool:
    """Whether 1612346400 can only be a time: several days, all at about one time of the day."""
    moments = sorted({moment for name in names for moment in _times(name)})
    if len({moment.date() for moment in moments}) < 2:
        return False
    hours = sorted((moment - _EPOCH).seconds for moment in moments)
    gaps = [b - a for a, b in pairwise([*hours, hours[0] + _DAY_SECONDS])]
    return max(gaps) >= _DAY_SECONDS - _PASS_SECONDS


def unclear_date(name: str) -> str | None:
    """The text in a name that resembles a date, and why it is not read; None without one.

    Args:
        name: a file's name, with its folders.
    """
    text = _without_dates(_plain(name))
    for form, why in _UNCLEAR:
        for match in form.finditer(text):
            if form is not _SHORT_YEAR or match["month"].lower() in _MONTHS:
                return f"'{match[0]}': {why}"
    return None


def _told_apart(dates: Sequence[Sequence[date]]) -> list[date | None]:
    """The date of each file at the first position where the files differ.

    A later position counts if its dates differ as much and all precede those of the first.
    """
    there = [own for own in dates if own]
    shortest = min(map(len, there), default=0)
    times = [len({own[k] for own in there}) for k in range(shortest)]
    places = [k for k in range(shortest) if times[k] > 1]
    place = places[0] if places else 0
    for k in places:
        # A product is made after its acquisition, also if its name begins with that date.
        if times[k] >= times[place] and all(own[k] < own[place] for own in there):
            place = k
    return [own[place] if own else None for own in dates]


_LIST_TAGS = ("dates", "datetimes", "times", "timestamps", "acquisition_dates", "time", "date")
_LIST_MARKS = re.compile(r"[\[\](){}'\"]")


def tagged_dates(tags: Mapping[str, str]) -> tuple[date, ...]:
    """The list of dates in a file's tags (lower-case keys), separated by commas, `;` or spaces.

    Returns:
        At least two dates in order; empty if no tag is such a list.
    """
    for key in _LIST_TAGS:
        parts = re.split(r"[,;\s]+(?=\d{4})", _LIST_MARKS.sub("", tags.get(key, "")).strip())
        days = [date_of(part) for part in parts]
        if len(days) > 1 and None not in days:
            return tuple(day for day in days if day)
    return ()


def tagged_date(tags: Mapping[str, str], file: Mapping[str, str] | None = None) -> date | None:
    """The acquisition date in tags (lower-case keys), except TIFFTAG_DATETIME.

    Args:
        tags: the tags of a file or of a band.
        file: the file's tags, in which GDAL leaves the unit of a netCDF's time.
    """
    full = dict(map(with_full_name, tags.items()))
    for key in _DATE_TAGS:
        if key in full:
            units = (file or full).get(f"{key.removeprefix('netcdf_dim_')}#units")
            day = _tag_day(full[key].strip(), units)
            if day:
                return day
    return None


def _tag_day(text: str, units: str | None) -> date | None:
    if units and (since := _SINCE.match(units)) and (first := date_of(units[since.end() :])):
        try:
            seconds = float(text) * _SECONDS[since[1].lower()]
            return (datetime.combine(first, time()) + timedelta(seconds=seconds)).date()
        except (ValueError, OverflowError):
            pass  # a date in words, whatever the unit
    # Numbers from 19... and 20... on are dates without separators, or times after 2030.
    if _COUNT.fullmatch(text) and len(text) in _EPOCHS:
        return (_EPOCH + timedelta(seconds=int(text) * _EPOCHS[len(text)])).date()
    return date_of(text) or next(_ordinal_dates(text), None)


def date_text(tags: Mapping[str, str]) -> str | None:
    """The first acquisition tag (lower-case keys), whatever it holds; None without one."""
    full = dict(map(with_full_name, tags.items()))
    return next((full[key] for key in _DATE_TAGS if full.get(key)), None)

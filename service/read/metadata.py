"""Band names and dates, as people write them in descriptions, tags and file names.

Text in, a canonical name or a date out; None wherever the text does not say or contradicts
itself. Nothing here opens a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date, timedelta
from functools import lru_cache

SCL = "SCL"
"""The scene classification band of Sentinel-2 level 2A."""
# Level 1C has 13 bands and level 2A the same without B10. Two orders are in use: B8A right
# after B08, and B8A last (EuroSAT). Only B8A, B09 and what follows move: the first eight, and so
# B02, B03, B04 and B08, stand at the same places in both, which is all that is taken from here.
PRODUCT_BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08")
PRODUCT_COUNTS = frozenset({12, 13})
"""Numbers of bands of a whole Sentinel-2 product."""
_PHRASES: Mapping[tuple[str, ...], str] = {
    tuple(phrase.split()): band
    for band, phrases in {
        "B01": "coastal aerosol|coastal|aerosol|ultra blue",
        "B02": "blue",
        "B03": "green",
        "B04": "red",
        # Any red edge is B05 here where it has no number: what counts is that it is not red.
        "B05": "red edge 1|rededge 1|rededge1|red edge1|red edge|rededge|re1",
        "B06": "red edge 2|rededge 2|rededge2|red edge2|re2",
        "B07": "red edge 3|rededge 3|rededge3|red edge3|re3",
        "B08": "nir|near infrared|near infra red|nir1",
        "B8A": "nir08|nir narrow|narrow nir|nir2|nirn|red edge 4|rededge 4|rededge4|re4"
        "|narrow near infrared|near infrared narrow",
        "B09": "nir09|water vapour|water vapor",
        "B10": "cirrus|swir cirrus",
        "B11": "swir|swir 1|swir1|swir16|short wave infrared 1|shortwave infrared 1"
        "|short wave infrared|shortwave infrared",
        "B12": "swir 2|swir2|swir22|short wave infrared 2|shortwave infrared 2",
        SCL: "scl|scene classification|scene classification map|scene classification layer",
    }.items()
    for phrase in phrases.split("|")
}
_LONGEST_PHRASE = max(map(len, _PHRASES))
# What is near enough to be said of one band: "B8A - NIR", "B06 red edge".
_FAMILIES = (
    frozenset({"B05", "B06", "B07"}),
    frozenset({"B07", "B08", "B8A", "B09"}),
    frozenset({"B10", "B11", "B12"}),
)
# Text with one of these speaks of something made from bands, not of a band.
_NOT_A_BAND = re.compile(
    r"ndvi|evi2?|m?savi|m?ndwi|ndmi|nbr|ndre|gndvi|index|ratio|labels?|std(ev|dev)?|sd|var"
    r"|variance|sigma|uncertainty|error|count|quality|qa|doy"
)
_CODE = re.compile(r"b0?([1-9]|1[0-2]|8a)")
_WORD = re.compile(r"[a-z0-9]+")
_USUAL_LENGTH = 100
# Year first, as in 20180521, 2018-05-21, 2018_05_21, 2018:05:21, also before a time of day; and
# MODIS's A2018141, the day of the year.
_DATE = re.compile(
    r"(?<!\d)(?P<year>(?:19[7-9]|20\d)\d)(?P<sep>[-_./: ]?)(?P<month>0[1-9]|1[0-2])(?P=sep)"
    r"(?P<day>0[1-9]|[12]\d|3[01])(?=\d{6}(?!\d)|\d{4}(?!\d)|\D|$)"
    r"|(?<![0-9A-Za-z])A(?P<doy_year>(?:19[7-9]|20\d)\d)(?P<doy>[0-3]\d\d)(?!\d)"
)
# Acquisition before anything that may be the time of writing.
_DATE_TAGS = (
    "datetime",
    "acquisition_date",
    "acquisition_datetime",
    "acquisition_time",
    "date_acquired",
    "acquired",
    "sensing_time",
    "sensing_date",
    "datatake_1_datatake_sensing_start",
    "product_start_time",
    "start_datetime",
    "rangebeginningdate",
    "date",
    "time",
)
WRITING_TAG = "tifftag_datetime"
"""The TIFF standard's tag: the acquisition to some writers, the time of writing to others."""
_NAME_TAGS = ("name", "band_name", "bandname", "long_name", "common_name", "standard_name")


def band_of(text: str | None) -> str | None:
    """The Sentinel-2 band that a text names.

    Args:
        text: a description, a tag or a file's stem, such as `B02`, `b2`, `B08 - NIR`, `blue`,
            `T31UES_20180521T105416_B04_10m`.

    Returns:
        B01 to B12, B8A or SCL; None where the text names no band, several, or contradicts itself.
    """
    if not text:
        return None
    # The bands of a stack mostly have a few names over and over. A long text is not worth the
    # memory that it would keep.
    return _usual_band(text) if len(text) <= _USUAL_LENGTH else _band(text)


def _band(text: str) -> str | None:
    words = _WORD.findall(text.lower())
    if any(_NOT_A_BAND.fullmatch(word) for word in words):
        return None
    codes = {_canonical(match[1]) for word in words if (match := _CODE.fullmatch(word))}
    named = _phrases(words)
    if len(codes) > 1 or (not codes and len(named) != 1):
        return None
    (band,) = codes or named
    near: frozenset[str] = frozenset({band}).union(*(f for f in _FAMILIES if band in f))
    return band if named <= near else None


_usual_band = lru_cache(maxsize=1024)(_band)


def _canonical(digits: str) -> str:
    return "B8A" if digits == "8a" else f"B{int(digits):02d}"


def _phrases(words: list[str]) -> set[str]:
    """Bands named in words, the longest phrase first: "red edge" is not "red"."""
    found = set()
    at = 0
    while at < len(words):
        for length in range(min(_LONGEST_PHRASE, len(words) - at), 0, -1):
            band = _PHRASES.get(tuple(words[at : at + length]))
            if band:
                found.add(band)
                at += length - 1
                break
        at += 1
    return found


def date_of(text: str | None) -> date | None:
    """The first plausible date (1970 to 2099, year first) in a text, None where there is none.

    In a Sentinel-2 product's name the first is the acquisition; later ones tell the processing.
    """
    for match in _DATE.finditer(text or ""):
        try:
            if match["doy"]:
                new_year = date(int(match["doy_year"]), 1, 1)
                day = new_year + timedelta(days=int(match["doy"]) - 1)
                if match["doy"] == "000" or day.year != new_year.year:
                    continue
                return day
            return date(int(match["year"]), int(match["month"]), int(match["day"]))
        except ValueError:  # such as 30 February: digits that only look like a date
            continue
    return None


def tagged_date(tags: Mapping[str, str]) -> date | None:
    """The acquisition date among tags (lower-case keys), the writing tag left aside."""
    return next((day for key in _DATE_TAGS if key in tags and (day := date_of(tags[key]))), None)


def tagged_band(tags: Mapping[str, str]) -> str | None:
    """The band that a band's own tags (lower-case keys) name."""
    return next((band for key in _NAME_TAGS if (band := band_of(tags.get(key)))), None)


def tagged_number(tags: Mapping[str, str], *keys: str) -> float | None:
    """The first of the tags that is a finite number."""
    for key in keys:
        try:
            number = float(tags[key])
        except (KeyError, ValueError):
            continue
        if abs(number) < float("inf"):
            return number
    return None

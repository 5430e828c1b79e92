"""Metadata parsing: band names and dates in descriptions, tags and file names.

Each function takes text and returns a canonical name or a date; None if the text contains none or
several different ones. This module opens no file.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, timedelta
from functools import lru_cache
from itertools import pairwise

SCL = "SCL"
"""The scene classification band of Sentinel-2 level 2A."""
FMASK, QA_PIXEL, CLM, QAI, UDM2 = "FMASK", "QA_PIXEL", "CLM", "QAI", "UDM2"
CLOUD, CLDPRB, QA60 = "CLOUD", "CLDPRB", "QA60"
"""Canonical names of other providers' quality bands; `masks` decodes them."""
ALPHA = "ALPHA"
"""An alpha band, or Sentinel Hub's dataMask: zero means missing."""
QUALITY = frozenset({SCL, FMASK, QA_PIXEL, CLM, QAI, UDM2, CLOUD, CLDPRB, QA60})
"""All bands from which a cloud mask can be decoded."""
TWINS: Mapping[str, str] = {"B08": "B8A"}
"""Band name to the narrower band of similar wavelength that may replace it."""
# Level 1C has 13 bands, level 2A the same without B10. Two orders are in use: B8A right after B08,
# and B8A last (EuroSAT). The first eight bands, which include B02, B03, B04 and B08, have the same
# positions in both; only these are used.
PRODUCT_BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08")
PRODUCT_COUNTS = frozenset({12, 13})
"""Numbers of bands of a whole Sentinel-2 product."""
# sen2r writes all bands of a product but one near infrared: B08 at 10 m, and B8A, which is coarser,
# in its place at 20 and 60 m (sen2r, "Output structure and naming convention").
_SEN2R = re.compile(r"S2[A-D](?P<level>1C|2A)_\d{8}_\d{3}_[^_]*_(?:TOA|BOA)_(?P<size>\d\d)$")
_SEN2R_COUNTS: Mapping[str, int] = {"1C": 12, "2A": 11}
_PHRASES: Mapping[tuple[str, ...], str] = {
    tuple(phrase.split()): band
    for band, phrases in {
        "B01": "coastal aerosol|coastal|aerosol|ultra blue",
        "B02": "blue",
        "B03": "green",
        "B04": "red",
        # A red edge band without a number is B05; the important point is that it is not red.
        "B05": "red edge 1|rededge 1|rededge1|red edge1|red edge|rededge|re1",
        "B06": "red edge 2|rededge 2|rededge2|red edge2|re2",
        "B07": "red edge 3|rededge 3|rededge3|red edge3|re3",
        "B08": "nir|near infrared|near infra red|nir1|nir 1|broadnir|broad nir",
        "B8A": "nir08|nir narrow|narrow nir|nir2|nir 2|nirn|red edge 4|rededge 4|rededge4|re4"
        "|narrow near infrared|near infrared narrow",
        "B09": "nir09|water vapour|water vapor",
        "B10": "cirrus|swir cirrus",
        "B11": "swir|swir 1|swir1|swir16|short wave infrared 1|shortwave infrared 1"
        "|short wave infrared|shortwave infrared",
        "B12": "swir 2|swir2|swir22|short wave infrared 2|shortwave infrared 2",
        SCL: "scl|scene classification|scene classification map|scene classification layer"
        "|sceneclassification",  # Terrascope
    }.items()
    for phrase in phrases.split("|")
}
_LONGEST_PHRASE = max(map(len, _PHRASES))
# Colours in other languages, without accents. Some are parts of place names (Cabo Verde, Baton
# Rouge) or other words (vert, rot), so they name a band only if the text has no other word, except
# those of `_BESIDE`.
_FOREIGN: Mapping[tuple[str, ...], str] = {
    tuple(phrase.split()): band
    for band, phrases in {
        "B02": "bleu|bleue|blau|azul|blu|blauw|niebieski|bla|sininen|modra|mavi|kek"
        "|синии|蓝|蓝光|蓝波段|青",
        "B03": "vert|verte|grun|gruen|verde|groen|zielony|gron|vihrea|zelena|yesil|zold"
        "|зеленыи|绿|绿光|绿波段|緑",
        "B04": "rouge|roja|rossa|rot|rojo|rosso|vermelho|rood|czerwony|rod|punainen|cervena|kirmizi"
        "|piros|красныи|红|红光|红波段|赤",
        "B08": "proche infrarouge|nahes infrarot|naher infrarot|infrarrojo cercano"
        "|infrarosso vicino|vicino infrarosso|infravermelho proximo|nabij infrarood"
        "|bliska podczerwien|pir|ближнии ик|近红外|近红外波段|近赤外",
    }.items()
    for phrase in phrases.split("|")
}
# Words that may accompany a foreign colour: "Bande rouge", "Kanal 4 (rot)", "s2 rojo 10m".
_BESIDE = re.compile(
    r"bands?|band[ae]s?|bandet|kanal|canal|canale|pasmo|couleur|s2|s2[abc]|sentinel2?|l2a|l1c"
    r"|msi|boa|toa|reflectan\w*|reflekt\w*|r?[126]0m|\d+|t?\d\d[a-z]{3}|\d{8}t\d{6}"
)
# Bands whose names may occur in one text without contradiction: "B8A - NIR", "B06 red edge".
_FAMILIES = (
    frozenset({"B05", "B06", "B07"}),
    frozenset({"B07", "B08", "B8A", "B09"}),
    frozenset({"B10", "B11", "B12"}),
)
# Text with one of these words names a product that was computed from bands, not a band.
_NOT_A_BAND = re.compile(
    r"ndvi|evi2?|m?savi|m?ndwi|ndmi|nbr|ndre|gndvi|index|ratio|labels?|std(ev|dev)?|sd|var"
    r"|variance|sigma|uncertainty|error|count|quality|qa|doy"
)
_CODE = re.compile(r"b(?:and|anda|ande)?0?([1-9]|1[0-2]|8a)")
_BAND_WORD = re.compile(r"b(?:and|anda|ande)")
_NUMBER = re.compile(r"0?([1-9]|1[0-2]|8a)")
# Names of quality bands as whole words, in order of precedence. "Cloud" names a band (of sits) only
# if it is the only word.
_QUALITY_WORDS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (band, re.compile(rf"(?:^| )(?:{words})(?= |$)"))
    for band, words in (
        (QA60, "qa60"),
        (CLDPRB, "cldprb|cld prb|cloud prob(?:ability)?|cld"),
        (FMASK, "fmask"),
        (QA_PIXEL, "qa pixel"),
        (CLM, "clm"),
        (QAI, "qai"),
        (UDM2, "udm2"),
        (
            CLOUD,
            "cloud(?! (?:free|less|cover\\w*|percent\\w*|shadows?|mask(?:ed)?|removed|filled|top))",
        ),
    )
)
_PERHAPS_QUALITY = re.compile(r"qa|cl[dmo]|fmask|udm2", re.IGNORECASE)
_ALPHA = re.compile(r"alpha|data ?mask|opacity", re.IGNORECASE)
_WORD = re.compile(r"[^\W_]+")
_USUAL_LENGTH = 100
# Year first, as in 20180521, 2018-05-21, 2018_05_21, 2018:05:21, also before a time of day; the day
# of the year, as in MODIS's A2018141, HLS's 2018141T104421 and Landsat's LC81950252018141LGN00; and
# the month in letters, as in 21May2018.
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DATE = re.compile(
    r"(?<!\d)(?P<year>(?:19[7-9]|20\d)\d)(?P<sep>[-_./: ]?)(?P<month>0[1-9]|1[0-2])(?P=sep)"
    r"(?P<day>0[1-9]|[12]\d|3[01])(?=\d{6}(?!\d)|\d{4}(?!\d)|\D|$)"
    r"|(?:(?<![0-9])|(?<=(?<![0-9A-Za-z])L[A-Z]\d{7}))"
    r"(?P<doy_year>(?:19[7-9]|20\d)\d)(?P<doy>[0-3]\d\d)(?!\d)"
    r"|(?<!\d)(?P<letters_day>[0-3]?\d)[-_. ]?(?P<letters>" + "|".join(_MONTHS) + r")[a-z]{0,6}"
    r"[-_. ]?(?P<letters_year>(?:19[7-9]|20\d)\d)(?!\d)",
    re.IGNORECASE,
)
# Forms that count only if every file has one: a day or month of one digit, and the day before the
# month.
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
_SUFFIX = re.compile(r"\.(?:tiff?|jp2|j2k|img|vrt|nc|zip)$", re.IGNORECASE)
# Tags of the acquisition precede tags that may hold the time of writing.
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
"""The tag of the TIFF standard: some writers store the acquisition, others the time of writing."""
# openEO's back-ends write DESCRIPTION.
_NAME_TAGS = (
    "name",
    "band_name",
    "bandname",
    "description",
    "long_name",
    "common_name",
    "standard_name",
)


def band_of(text: str | None) -> str | None:
    """The Sentinel-2 band that a text names.

    Args:
        text: a description, a tag or a file's stem, such as `B02`, `b2`, `B08 - NIR`, `blue`,
            `T31UES_20180521T105416_B04_10m`.

    Returns:
        B01 to B12, B8A or SCL; None if the text names no band or several, or contradicts itself.
    """
    if not text:
        return None
    # The bands of a stack mostly repeat a few names. Long texts are not cached, to save memory.
    return _usual_band(text) if len(text) <= _USUAL_LENGTH else _band(text)


def _words(text: str) -> list[str]:
    """Words and numbers of a text, in lower case and without accents."""
    plain = unicodedata.normalize("NFKD", text.lower()) if not text.isascii() else text.lower()
    return _WORD.findall("".join(c for c in plain if not unicodedata.combining(c)))


def _band(text: str) -> str | None:
    words = _words(text)
    if any(_NOT_A_BAND.fullmatch(word) for word in words):
        return None
    # Digital Earth Australia counts the short-wave bands of Sentinel-2 from the cirrus band on.
    if "nbart" in words and any(word.startswith("s2") for word in words):
        joined = " ".join(words)
        if "swir 2" in joined or "swir 3" in joined:
            return "B11" if "swir 2" in joined else "B12"
    codes = {_canonical(match[1]) for word in words if (match := _CODE.fullmatch(word))}
    # "Band 4", "band_4": the number is a word of its own.
    codes |= {
        _canonical(number[1])
        for word, following in pairwise(words)
        if _BAND_WORD.fullmatch(word) and (number := _NUMBER.fullmatch(following))
    }
    named = _phrases(words) or _foreign(words)
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


def _foreign(words: list[str]) -> set[str]:
    """The band named by words of another language, if the text has no other words."""
    found = set()
    for size in (1, 2):
        for at in range(len(words) - size + 1):
            band = _FOREIGN.get(tuple(words[at : at + size]))
            rest = words[:at] + words[at + size :]
            if band and all(_BESIDE.fullmatch(word) or _CODE.fullmatch(word) for word in rest):
                found.add(band)
    return found


def is_broad_nir(text: str | None) -> bool:
    """Whether a name is FORCE's BROADNIR (B08); FORCE's NIR is then the narrow B8A.

    Source: FORCE documentation, level 2 output format, bands of Sentinel-2.
    """
    return bool(text) and "broadnir" in _words(text or "")


def quality_of(text: str | None) -> str | None:
    """The quality band that a text names, such as `QA60`, `MSK_CLDPRB_20m`, `..._CLM_R1`.

    Returns:
        A member of `QUALITY`; None if the text names none, or names a band as well.
    """
    if not text or len(text) > _USUAL_LENGTH * 3:
        return None
    if not _PERHAPS_QUALITY.search(text):
        return None
    words = " ".join(_words(text))
    return next((band for band, pattern in _QUALITY_WORDS if pattern.search(words)), None)


def calls_itself_alpha(text: str | None) -> bool:
    """Whether a description is that of an alpha band or of Sentinel Hub's dataMask."""
    return bool(text and _ALPHA.fullmatch(text.strip()))


def product_bands(name: str, count: int) -> tuple[str, ...]:
    """The first bands of a file whose bands have no names, if it is a whole Sentinel-2 product.

    Args:
        name: the file's name.
        count: number of bands of the file.

    Returns:
        The bands; empty if neither name nor number indicate such a product.
    """
    sen2r = _SEN2R.search(stem(name))
    if sen2r and count == _SEN2R_COUNTS[sen2r["level"]]:
        return (*PRODUCT_BANDS[:-1], "B08" if sen2r["size"] == "10" else "B8A")
    return PRODUCT_BANDS if count in PRODUCT_COUNTS else ()


def stem(name: str) -> str:
    """A file's name without folders and without the suffix of a raster.

    A last part such as `.B04` is not a suffix.
    """
    return _SUFFIX.sub("", name.rpartition("/")[2])


def date_of(text: str | None) -> date | None:
    """The first plausible date (1970 to 2099) in a text; None if there is none.

    In the name of a Sentinel-2 product the first date is the acquisition; later ones are the
    processing.
    """
    return next(_dates(text or ""), None)


def _dates(text: str) -> Iterator[date]:
    """Every date of a text in an unambiguous form, in order."""
    for match in _DATE.finditer(text):
        try:
            if match["doy"]:
                new_year = date(int(match["doy_year"]), 1, 1)
                day = new_year + timedelta(days=int(match["doy"]) - 1)
                if match["doy"] != "000" and day.year == new_year.year:
                    yield day
            elif match["letters"]:
                month = _MONTHS.index(match["letters"].lower()) + 1
                yield date(int(match["letters_year"]), month, int(match["letters_day"]))
            else:
                yield date(int(match["year"]), int(match["month"]), int(match["day"]))
        except ValueError:  # digits that only look like a date, such as 30 February
            continue


def _short_dates(text: str) -> Iterator[date]:
    """Dates with the year first, and day or month of one digit."""
    return _year_first(_SHORT, text)


def _year_first(form: re.Pattern[str], text: str) -> Iterator[date]:
    for match in form.finditer(text):
        try:
            yield date(int(match["year"]), int(match["month"]), int(match["day"]))
        except ValueError:
            continue


def _day_first_dates(text: str) -> Iterator[date]:
    """Dates with the day before the month."""
    for match in _DAY_FIRST.finditer(text):
        year, month, day = (match[name] or match[f"{name}8"] for name in ("year", "month", "day"))
        try:
            yield date(int(year), int(month), int(day))
        except ValueError:
            continue


def named_days(names: Sequence[str]) -> list[date | None]:
    """The date in each file's name, determined from all names together.

    Ambiguous forms (day first, one digit) count if all files have them. If names hold several
    dates, the first date that differs between files is used; the file's own date precedes its
    folder's.

    Args:
        names: names with their folders, separated by `/`.

    Returns:
        One entry per name; None for a name without a date.
    """
    parts = [tuple(reversed(name.split("/"))) for name in names]

    def found(form: Callable[[str], Iterator[date]]) -> list[list[date]]:
        return [[day for part in own for day in form(part)] for own in parts]

    dates = [
        [*own, *_year_first(_FOLDERS, name)] for own, name in zip(found(_dates), names, strict=True)
    ]
    if dates and not all(dates):
        short, day_first = found(_short_dates), found(_day_first_dates)
        if all(short):
            dates = short
        elif all(day_first) and not any(dates) and _day_is_first(names):
            dates = day_first
    return _told_apart(dates)


def _day_is_first(names: Sequence[str]) -> bool:
    """Whether 05-01-2021 can only be 5 January: by a dot, eight digits, or a day above 12."""
    matches = [match for name in names for match in _DAY_FIRST.finditer(name)]
    return any(m["day8"] or m["sep"] == "." or int(m["day"]) > 12 for m in matches)


def _told_apart(dates: Sequence[Sequence[date]]) -> list[date | None]:
    """The date of each file at the first position where the files differ."""
    there = [own for own in dates if own]
    shortest = min(map(len, there), default=0)
    place = next((k for k in range(shortest) if len({own[k] for own in there}) > 1), 0)
    return [own[place] if own else None for own in dates]


def tagged_date(tags: Mapping[str, str]) -> date | None:
    """The acquisition date in tags (lower-case keys), except TIFFTAG_DATETIME."""
    return next((day for key in _DATE_TAGS if key in tags and (day := date_of(tags[key]))), None)


def tagged_band(tags: Mapping[str, str]) -> str | None:
    """The band, or quality band, that a band's own tags (lower-case keys) name."""
    texts = [tags[key] for key in _NAME_TAGS if key in tags]
    return next((band for text in texts if (band := band_of(text) or quality_of(text))), None)


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

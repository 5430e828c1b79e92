"""Metadata parsing: band names and dates in descriptions, tags and file names.

Each function takes text and returns a canonical name or a date; None if the text contains none or
several different ones. This module opens no file.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from functools import lru_cache, partial
from itertools import pairwise

SCL = "SCL"
"""The scene classification band of Sentinel-2 level 2A."""
FMASK, QA_PIXEL, CLM, QAI, UDM2 = "FMASK", "QA_PIXEL", "CLM", "QAI", "UDM2"
CLOUD, CLDPRB, QA60 = "CLOUD", "CLDPRB", "QA60"
CFMASK, PIXEL_QA, UDM, S2CLOUDLESS = "CFMASK", "PIXEL_QA", "UDM", "S2CLOUDLESS"
CLOUD_SCORE, CLP, CLOUD_PROBABILITY, SNWPRB = "CS", "CLP", "CLOUD_PROBABILITY", "SNWPRB"
CLASSI, CLASSI_CIRRUS, CLASSI_SNOW = "MSK_CLASSI", "MSK_CLASSI_CIRRUS", "MSK_CLASSI_SNOW"
VALID, CLOUD_MASK = "VALID", "CLOUD_MASK"
"""Canonical names of other providers' quality bands; `masks` decodes them."""
CLASSI_BANDS = (CLASSI, CLASSI_CIRRUS, CLASSI_SNOW)
"""The bands of a product's file MSK_CLASSI_B00, in their order: opaque clouds, cirrus, snow."""
ALPHA = "ALPHA"
"""An alpha band, or Sentinel Hub's dataMask: zero means missing."""
QUALITY = frozenset(
    {SCL, FMASK, CFMASK, QA_PIXEL, PIXEL_QA, CLM, QAI, UDM2, UDM, S2CLOUDLESS, CLOUD_SCORE, CLP}
    | {CLOUD, CLDPRB, CLOUD_PROBABILITY, SNWPRB, QA60, *CLASSI_BANDS, VALID, CLOUD_MASK}
)
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
    r"|variance|sigma|uncertainty|error|count|quality|qa|doy|masks?|msk"
    # Reflectance of water (ACOLITE, C2RCC), which is not that of the surface.
    r"|rrs|rhown?|nlw"
)
# ACOLITE's rhos_492 (surface) and rhot_492 (top of the atmosphere), or any number with its unit.
_WAVELENGTH = re.compile(
    r"(?<![a-z])rho[st][ _](\d{3,4})(?!\d)"
    r"|(?<![\d.])(\d{3,4}(?:\.\d+)?)[ _]?n(?:m|anomet\w*)(?![a-z])",
    re.IGNORECASE,
)
# The centres of the bands of Sentinel-2 A to D, nm. No range has a band of Landsat's in the colours
# that models take; other sensors with bands in these ranges are recognised by their names.
_CENTRES: Mapping[str, tuple[float, float]] = {
    "B01": (442, 444.5),
    "B02": (489, 497.5),
    "B03": (558.5, 561.5),
    "B04": (664, 667.5),
    "B05": (703, 707.5),
    "B06": (738.5, 742),
    "B07": (779, 786),
    "B08": (832, 843),
    "B8A": (863.5, 866.5),
    "B09": (943, 946),
    "B10": (1372, 1377.5),
    "B11": (1609, 1615),
    "B12": (2185, 2203),
}
_CODE = re.compile(r"b(?:and|anda|ande)?0?([1-9]|1[0-2]|8a)")
_BAND_WORD = re.compile(r"b(?:and|anda|ande)")
_NUMBER = re.compile(r"0?([1-9]|1[0-2]|8a)")
# Names of quality bands as whole words, in order of precedence. Words that occur in other names too
# must end the name; "cloud" (of sits) may be followed by a date, and before "probability" (of Earth
# Engine) may be dates and tiles.
_QUALITY_WORDS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (band, re.compile(rf"(?:^| )(?:{words})(?= |$)"))
    for band, words in (
        # SNAP names the layers of a product quality_scene_classification and so on.
        (SCL, "(?:scl|scene ?classification) mask|quality scene classification$"),
        (QA60, "qa60"),
        (CLOUD_PROBABILITY, "s2cloudless prob(?:ability)?"),
        (S2CLOUDLESS, "s2cloudless mask"),
        (CLDPRB, "cldprb|cld prb|cloud ?prob(?:ability)?|cld|quality cloud confidence$"),
        (SNWPRB, "snwprb|snw|quality snow confidence$"),
        (CLASSI_CIRRUS, "msk classi cirrus"),
        (CLASSI_SNOW, "msk classi snow(?: ice)?"),
        (CLASSI, "msk classi"),
        (CFMASK, "cfmask|fmask4"),
        (FMASK, r"fmask|hls .*v1 \d qa$"),
        (QA_PIXEL, "qa pixel|pixel quality"),
        (PIXEL_QA, "pixel qa"),
        (CLM, "clm"),
        (CLP, "clp"),
        (QAI, "qai"),
        (UDM2, "udm2"),
        (UDM, "(?:dn )?udm1?"),
        (CLOUD_SCORE, "cs cdf|cs$"),
        (CLOUD_MASK, "cloud ?masks?|clouds|mask clouds?|cloudandcloudshadowmask"),
        (VALID, "(?:valid|clear|usable)(?: ?(?:mask|pixels?))?$"),
        (CLOUD, r"cloud(?= \d|$)"),
        (CLOUD_PROBABILITY, r"(?:^(?:\S*\d\S* )*)probability$"),
    )
)
_PERHAPS_QUALITY = re.compile(
    r"qa|quality|cl|mask|udm|cs|prob|snw|classi|valid|usable", re.IGNORECASE
)
_ALPHA = re.compile(r"alpha|data ?mask|opacity", re.IGNORECASE)
_DATA_MASK = re.compile(r"(?:^|[^a-z])data_?mask$", re.IGNORECASE)
_WORD = re.compile(r"[^\W_]+")
_USUAL_LENGTH = 100
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
    r"(?P<day>0[1-9]|[12]\d|3[01])(?=\d{6}(?!\d)|\d{4}(?!\d)|\D|$)"
    r"|(?:(?<![0-9])|(?<=(?<![0-9A-Za-z])L[A-Z]\d{7}))"
    rf"(?P<doy_year>{_YEAR})(?P<doy>[0-3]\d\d)(?!\d)",
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
_SHORT_YEAR = re.compile(
    r"(?<!\d)(?P<day>\d{1,2})(?P<sep>[-_. ]?)(?P<month>[A-Za-z]{3,10})(?P=sep)(?P<year>\d\d)(?!\d)"
)
# A time since 1970 in seconds, milliseconds, microseconds or nanoseconds, from 2001 to 2033.
_NAMED_COUNT = re.compile(r"(?<![0-9A-Za-z.])1\d{9}(?:\d{3}|\d{6}|\d{9})?(?![0-9A-Za-z])")
# Texts that resemble a date, with the reason that they are not read as one, for messages.
_UNCLEAR = (
    (_DAY_FIRST, "the day or the month may come first"),
    (_ORDINAL, "it may be a day of the year or a running number"),
    (re.compile(rf"(?<!\d){_YEAR}[-_]?w\d\d(?!\d)", re.IGNORECASE), "a week without a day"),
    (re.compile(rf"(?<!\d){_YEAR}[-_.]?(?:0[1-9]|1[0-2])(?!\d)"), "a month without a day"),
    (
        re.compile(r"(?<!\d)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?!\d)"),
        "the year may have two digits",
    ),
    (_SHORT_YEAR, "the year may come first or last"),
    (_NAMED_COUNT, "it may be a time since 1970 or a running number"),
)
_SUFFIX = re.compile(r"\.(?:tiff?|jp2|j2k|img|vrt|nc|zip)$", re.IGNORECASE)
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
    "acquired",
    "observation_date",
    "sensing_time",
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
    "time_start",
    "start_time",
    "start_date",
    "startdate",
    "scene_date",
    "image_date",
    "imagedate",
    "date",
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
"""Counts in names are times only if they lie within this time of the day: a satellite passes at one
hour, and dates are at midnight; running numbers are at any hour."""
_EPOCH = datetime(1970, 1, 1)
_SINCE = re.compile(r"(days|hours|minutes|seconds) since ", re.IGNORECASE)
_SECONDS: Mapping[str, int] = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
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

# ENVI's headers, and GDAL's domain IMAGERY. Numbers below the limit are micrometres, else nm.
_CENTRE_TAGS = ("wavelength", "central_wavelength", "center_wavelength", "central_wavelength_um")
_MOST_MICROMETRES = 20.0


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
    named |= {band for match in _WAVELENGTH.finditer(text) if (band := _at(match[1] or match[2]))}
    if len(codes) > 1 or (not codes and len(named) != 1):
        return None
    (band,) = codes or named
    near: frozenset[str] = frozenset({band}).union(*(f for f in _FAMILIES if band in f))
    return band if named <= near else None


_usual_band = lru_cache(maxsize=1024)(_band)


def _canonical(digits: str) -> str:
    return "B8A" if digits == "8a" else f"B{int(digits):02d}"


def _at(nanometres: str | float) -> str | None:
    """The band whose centre is at a wavelength, nm; None if no band of Sentinel-2 is there."""
    number = float(nanometres)
    return next((band for band, (low, high) in _CENTRES.items() if low <= number <= high), None)


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


def ends_as_alpha(text: str) -> bool:
    """Whether a file's stem ends with dataMask, as `S2_2021-01-05_dataMask`."""
    return bool(_DATA_MASK.search(text))


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
    text = _plain(text)
    found = [(match, _numeric) for match in _DATE.finditer(text)]
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
            dates = short
        elif not any(dates):
            dates = _unusual(names, found) or dates
    return _told_apart(dates)


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
    """Whether 05-01-2021 can only be 5 January: by a dot, eight digits, or a day above 12."""
    matches = [match for name in names for match in _DAY_FIRST.finditer(name)]
    return any(m["day8"] or m["sep"] == "." or int(m["day"]) > 12 for m in matches)


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
    for form, why in _UNCLEAR:
        for match in form.finditer(_plain(name)):
            if form is not _SHORT_YEAR or match["month"].lower() in _MONTHS:
                return f"'{match[0]}': {why}"
    return None


def _told_apart(dates: Sequence[Sequence[date]]) -> list[date | None]:
    """The date of each file at the first position where the files differ."""
    there = [own for own in dates if own]
    shortest = min(map(len, there), default=0)
    place = next((k for k in range(shortest) if len({own[k] for own in there}) > 1), 0)
    return [own[place] if own else None for own in dates]


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


def with_full_name(item: tuple[str, str]) -> tuple[str, str]:
    """A tag with its complete name: GDAL cuts the name of `s2:processing_baseline=04.00` at `:`."""
    key, value = item
    name, equals, rest = value.partition("=")
    return (f"{key}:{name}".lower(), rest) if equals and name.isidentifier() else item


def tagged_band(tags: Mapping[str, str]) -> str | None:
    """The band, or quality band, that a band's own tags (lower-case keys) name."""
    texts = [tags[key] for key in _NAME_TAGS if key in tags]
    named = next((band for text in texts if (band := band_of(text) or quality_of(text))), None)
    if named or (centre := tagged_number(tags, *_CENTRE_TAGS)) is None:
        return named
    return _at(centre * 1000 if centre < _MOST_MICROMETRES else centre)


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

"""Band names in descriptions, tags and names of files.

Each function takes text and returns a canonical name; None if the text contains none or several
different ones. This module opens no file.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
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
        "B02": "blue|blu",
        "B03": "green|grn",
        "B04": "red",
        # A red edge band without a number is B05; the important point is that it is not red.
        "B05": "red edge 1|rededge 1|rededge1|red edge1|red edge|rededge|re1",
        "B06": "red edge 2|rededge 2|rededge2|red edge2|re2",
        "B07": "red edge 3|rededge 3|rededge3|red edge3|re3",
        "B08": "nir|near infrared|near infra red|near ir|nir1|nir 1|broadnir|broad nir|bnr",
        "B8A": "nir08|nir narrow|narrow nir|nir2|nir 2|nirn|red edge 4|rededge 4|rededge4|re4"
        "|narrow near infrared|near infrared narrow",
        "B09": "nir09|water vapour|water vapor",
        "B10": "cirrus|swir cirrus",
        "B11": "swir|swir 1|swir1|swir16|sw1|short wave infrared 1|shortwave infrared 1"
        "|short wave infrared|shortwave infrared",
        "B12": "swir 2|swir2|swir22|sw2|short wave infrared 2|shortwave infrared 2",
        SCL: "scl|scene classification|scene classification map|scene classification layer"
        "|sceneclassification",  # Terrascope
    }.items()
    for phrase in phrases.split("|")
}
_LEVELS: Mapping[str, frozenset[str]] = {
    "1C": frozenset(
        ["l1c", "msil1c", "s2msi1c", "s2a1c", "s2b1c", "s2c1c", "s2d1c", "toa", "rhot"]
    ),
    "2A": frozenset(
        ["l2a", "msil2a", "s2msi2a", "s2a2a", "s2b2a", "s2c2a", "s2d2a", "boa", "toc", "rhos"]
    ),
}
"""Words in names of products and files that state a level."""
_LEVEL_TAGS = (
    "processing_level",
    "processing:level",
    "product_type",
    "s2:product_type",
    "product:type",
    "producttype",
    "product_uri",
    "product_id",
    "datastrip_id",
    "granule_id",
    "tifftag_imagedescription",
    "collection",
)
"""Tags in which GDAL's SENTINEL2 driver, STAC items and programs state the level."""
_LEVEL_WORD = re.compile(r"(?:level[ _-]?|l)?(1c|2a)", re.IGNORECASE)
_FORCE_NARROW = re.compile(r"_TSA_SEN2[A-Z]*_NIR(?:_|$)")
_BROWSER = re.compile(r"\d{4}-\d\d-\d\d[-_]\d\d[-:_]\d\d_.*[_ ]\(Raw\)$")
_LONGEST_PHRASE = max(map(len, _PHRASES))
# Colours in other languages, without accents. Some are parts of place names (Cabo Verde, Baton
# Rouge) or other words (vert, rot), so they name a band only if the text has no other word, except
# those of `_BESIDE`.
_FOREIGN: Mapping[tuple[str, ...], str] = {
    tuple(phrase.split()): band
    for band, phrases in {
        "B02": "bleu|bleue|blau|azul|blauw|niebieski|bla|sininen|modra|mavi|kek"
        "|синии|蓝|蓝光|蓝波段|青",
        "B03": "vert|verte|grun|gruen|verde|groen|zielony|gron|vihrea|zelena|yesil|zold"
        "|зеленыи|绿|绿光|绿波段|緑",
        "B04": "rouge|roja|rossa|rot|rojo|rosso|vermelho|rood|czerwony|rod|punainen|cervena|kirmizi"
        "|piros|красныи|红|红光|红波段|赤",
        "B08": "proche infrarouge|nahes infrarot|naher infrarot|infrarrojo cercano"
        "|infrarosso vicino|vicino infrarosso|infravermelho proximo|ivp|nabij infrarood"
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
_COMPUTED = re.compile(
    r"ndvi|evi2?|m?savi|m?ndwi|ndmi|nbr|ndre|gndvi|ndv|index|ratio|std(ev|dev)?|sd|var"
    r"|variance|sigma|uncertainty|error|count|nobs|doy|diff(erence)?|anomal(y|ies)|zscore|trend"
    r"|slope|amplitude|phase|harmonics?|residuals?|rmse|range|iqr|s?mad|skew(ness)?|kurtosis|rank"
    r"|pca|texture|glcm|contrast|entropy|asm|idm|dissimilarity|homogeneity"
)
# What products hold about a band: angles, footprints of detectors, weights, aerosol.
_ABOUT_BANDS = re.compile(
    r"(sun|view)?(zenith|azimuth)|[sv][za]a|detfoo|footprint|weights?|aot|angles?|elevation"
)
# Reflectance of water (ACOLITE, C2RCC), which is not that of the surface.
_OF_WATER = re.compile(r"rrs|rhown?|nlw")
_NOT_A_BAND = re.compile(
    rf"{_COMPUTED.pattern}|{_ABOUT_BANDS.pattern}|labels?|quality|qa|masks?|msk|{_OF_WATER.pattern}"
)
# ACOLITE's rhos_492 (surface) and rhot_492 (top of the atmosphere), or any number with its unit.
_WAVELENGTH = re.compile(
    r"(?<![a-z])rho[st][ _](\d{3,4})(?!\d)"
    r"|(?<![\d.])(\d{3,4}(?:\.\d+)?)[ _]?n(?:m|anomet\w*)(?![a-z])",
    re.IGNORECASE,
)
_MICROMETRES = re.compile(
    r"(?<![\d.])([0-2]?\.\d{2,6})[ _]?(?:[µμu]m|micromet\w*|microns?)(?![a-z])", re.IGNORECASE
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
# The word for band may follow a date without a separator: 20210105B04.
_CODE = re.compile(r"(?:band|(?:19|20)\d{6}(?:t\d{6})?)?b(?:and|anda|ande)?0{0,2}([1-9]|1[0-2]|8a)")
_APART = re.compile(r"\s*[Bb][\s_.-]0{0,2}([1-9]|1[0-2]|8[Aa])\s*")  # "B 4", "B-04"
_CODES = re.compile(r"(?:b(?:1[0-2]|8a|0?[1-9]))+")
_CODES_IN = re.compile(r"b(1[0-2]|8a|0?[1-9])")
_BAND_WORD = re.compile(r"b(?:and|anda|ande)")
_NUMBER = re.compile(r"0?([1-9]|1[0-2]|8a)")
# A number behind a word for band; a file's name, a date or a wavelength may be beside it.
_POSITION = re.compile(
    r"(?<![^\W_])(?P<word>[Bb](?:and[ae]?)?)[ _.-]?(?P<number>\d{1,3})(?![^\W_])"
)
# The position of a band before its name, as in QGIS's "Band 1: B02" and "Band 1 (B02)".
_BEFORE_NAME = re.compile(
    r"\s*[Bb](?:and[ae]?)[ _]?0*(?P<number>\d+)\s*[:=(\[-]\s*(?P<name>.*?)[\s)\]]*"
)
# A number behind or before a band's name that may count dates: B02_1, red.2, nir[3], t1_B04.
_COUNTED = (
    re.compile(
        r"(?P<rest>.*?)(?:(?<=[^\W\d_])|[ _.\-\[(]+(?:t|time|step|date)?[ _]?)"
        r"(?P<number>\d{1,3})[\])]?",
        re.IGNORECASE,
    ),
    re.compile(r"(?:t|time|step|date)?[ _]?(?P<number>\d{1,3})[ _.:-]+(?P<rest>.*)", re.IGNORECASE),
)
_UNITS = re.compile(
    r"(?<![^\W_])(?:nanomet\w*|micromet\w*|microns?|[nuµμ]m)(?![^\W_])", re.IGNORECASE
)
_NO_SENTINEL_2 = frozenset({9, 10, 11})
"""Numbers of bands named B1, B2, ... that are not Sentinel-2's."""
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
_SUFFIX = re.compile(r"\.(?:tiff?|jp2|j2k|img|vrt|nc|zip)$", re.IGNORECASE)
# openEO's back-ends write DESCRIPTION.
_NAME_TAGS = (
    "name",
    "band_name",
    "bandname",
    "description",
    "long_name",
    "common_name",
    "standard_name",
    "netcdf_varname",  # GDAL, from netCDF
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


def why_no_band(text: str | None) -> str | None:
    """The reason that a text which may hold a band's name is not read as one; None without one."""
    words = _words(text or "")
    if any(_OF_WATER.fullmatch(word) for word in words):
        return (
            "the reflectance of water, not of the surface; export the surface reflectance, such as "
            "ACOLITE's rhos"
        )
    computed = next((word for word in words if _COMPUTED.fullmatch(word)), None)
    if computed:
        return f"'{computed}' is computed from bands and is not reflectance"
    about = next((word for word in words if _ABOUT_BANDS.fullmatch(word)), None)
    return f"'{about}' describes a band and is not its reflectance" if about else None


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
    if only := _APART.fullmatch(text):
        codes.add(_canonical(only[1].lower()))
    named = _phrases(words) or _foreign(words)
    named |= _at_wavelengths(text)
    if len(codes) > 1 or (not codes and len(named) != 1):
        return None
    (band,) = codes or named
    near: frozenset[str] = frozenset({band}).union(*(f for f in _FAMILIES if band in f))
    return band if named <= near else None


def are_near(band: str, other: str) -> bool:
    """Whether names of two bands may occur for one without contradiction: B08 and B8A."""
    return band == other or any({band, other} <= family for family in _FAMILIES)


_usual_band = lru_cache(maxsize=1024)(_band)


def _canonical(digits: str) -> str:
    return "B8A" if digits == "8a" else f"B{int(digits):02d}"


def _at(nanometres: str | float) -> str | None:
    """The band whose centre is at a wavelength, nm; None if no band of Sentinel-2 is there."""
    number = float(nanometres)
    return next((band for band, (low, high) in _CENTRES.items() if low <= number <= high), None)


def _at_wavelengths(text: str) -> set[str]:
    """The bands at the wavelengths that a text states with their unit, or as ACOLITE does."""
    numbers = [float(match[1] or match[2]) for match in _WAVELENGTH.finditer(text)]
    numbers += [1000 * float(match[1]) for match in _MICROMETRES.finditer(text)]
    return {band for number in numbers if (band := _at(number))}


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


def only_positions(names: Sequence[str | None]) -> bool:
    """Whether the names of a file's bands only count them: `Band 1`, `Band 2`, ... or `b1`, `b2`.

    ENVI, ArcGIS, GDAL and Earth Engine's assets number bands so, whatever they hold, and may add
    the wavelength, or the date if the file has several. B1 to B8 and B1 to B12 are names of
    Sentinel-2 all the same; no other such series is, because B8A follows B8.

    Args:
        names: the names in band order, without those of quality bands or alpha.
    """
    found = [_position(name) for name in names]
    positions = [one for one in found if one]
    if len(names) < 2 or len(positions) < len(found):
        return False
    numbers = [number for _, number, _ in positions]
    count = max(numbers)
    # All bands of a date after each other, or all dates of a band.
    each = len(numbers) // count if count > 1 and len(numbers) % count == 0 else 0
    by_date, by_band = list(range(1, count + 1)) * each, sorted(numbers)
    if not each or numbers not in (by_date, by_band) or by_band != sorted(by_date):
        return False
    own = {word for word, _, _ in positions} == {"B"}
    same = len({rest for _, _, rest in positions}) == 1
    return same and not (own and count not in _NO_SENTINEL_2)


def behind_positions(names: Sequence[str | None]) -> tuple[str | None, ...]:
    """The names of a file's bands without the position that each of them begins with.

    QGIS, ENVI and SNAP show bands as `Band 1: B02` or `Band 1 (B02)`, and files get such texts from
    there. The number is a position if it counts the bands of the file from 1.

    Args:
        names: the names in band order.

    Returns:
        The texts behind the positions, or the names as they are if they do not all begin with their
        position, or if what follows are equal texts or the names of no band.
    """
    found = [_BEFORE_NAME.fullmatch(name or "") for name in names]
    rest = [match["name"] for match in found if match and match["name"]]
    counted = [int(match["number"]) for match in found if match] == list(range(1, len(names) + 1))
    if not counted or len(set(rest)) < len(names) or not any(map(band_of, rest)):
        return tuple(names)
    return tuple(rest)


def behind_counts(
    names: Sequence[str | None],
) -> tuple[tuple[str | None, ...], tuple[int, ...] | None]:
    """The names of a file's bands without the numbers that count its dates.

    Programs number the bands that they stack: `red_1`, `nir_1`, `red_2`, `nir_2`. Earth Engine and
    R leave the first ones as they are: `nir`, `nir_1`. As names, `nir_2` and `swir_2` would be
    other bands than `nir` and `swir`. The numbers count dates if all names have the same ones, from
    0 or 1 without a gap, and if one name with its numbers gives fewer bands than numbers. If all
    names of a file have one number, it is that of the file's date.

    Args:
        names: the names in band order, without positions before them.

    Returns:
        The names, and each band's number; the names as they are and None if the numbers do not
        count dates, and None as well if there is only one.
    """
    as_they_are = tuple(names), None
    if len(names) < 2 or not all(names):
        return as_they_are
    for form in _COUNTED:
        found = [_counted(form, name or "") for name in names]
        groups: dict[str, dict[int, str]] = defaultdict(dict)
        for (rest, number), name in zip(found, names, strict=True):
            groups[rest][number] = name or ""
        numbers = sorted(next(iter(groups.values())))
        if sum(map(len, groups.values())) < len(names):
            continue
        if any(sorted(own) != numbers for own in groups.values()):
            continue
        rests = tuple(rest for rest, _ in found)
        if len(numbers) == 1:
            if numbers[0] and any(_is_of_one_band(rest) for rest in groups):
                return rests, None
        elif numbers in (list(range(len(numbers))), list(range(1, len(numbers) + 1))) and any(
            band_of(rest) and len({band_of(name) for name in own.values()}) < len(numbers)
            for rest, own in groups.items()
        ):
            return rests, tuple(number for _, number in found)
    return as_they_are


def _counted(form: re.Pattern[str], name: str) -> tuple[str, int]:
    """A band's name and its number; 0 without one, also if the number is a part of the name."""
    match = form.fullmatch(name)
    known = band_of(name) or quality_of(name)
    if match and (band_of(match["rest"]) or quality_of(match["rest"]) or not known):
        return match["rest"], int(match["number"])
    return name, 0


def _is_of_one_band(name: str) -> bool:
    """Whether a name is that of one band, whatever the number behind it."""
    return bool(name) and None is not band_of(name) == band_of(f"{name} 1") == band_of(f"{name} 2")


def positions_in_names(names: Sequence[str]) -> frozenset[str]:
    """The names of files of one band each that only count the bands of a stack, as `..._band_10`.

    Args:
        names: the files' names with their folders.

    Returns:
        Names whose numbers are 1 to 9, 10 or 11 for files that differ in nothing else, or 1 to 8
        behind a word other than B, so that they are not Sentinel-2's; see `only_positions`.
    """
    groups: dict[str, dict[int, str]] = defaultdict(dict)
    words: set[str] = set()
    for name in names:
        own = stem(name)
        found = list(_POSITION.finditer(own))
        if found:
            last = found[-1]
            words.add(last["word"])
            rest = f"{name.rpartition('/')[0]}/{own[: last.start()]}#{own[last.end() :]}"
            groups[rest][int(last["number"])] = name
    counts = {max(group) for group in groups.values()}
    whole = all(set(group) == set(range(1, len(group) + 1)) for group in groups.values())
    known = _NO_SENTINEL_2 if words == {"B"} else _NO_SENTINEL_2 | {8}
    if not whole or not counts or not counts <= known:
        return frozenset()
    return frozenset(name for group in groups.values() for name in group.values())


def _position(name: str | None) -> tuple[str, int, str] | None:
    """The word for band, the number behind it, and the other letters of a name; None without."""
    found = list(_POSITION.finditer(name or ""))
    if len(found) != 1 or name is None:
        return None
    (match,) = found
    rest = name[: match.start()] + " " + name[match.end() :]
    letters = re.sub(r"[\W\d_]+", "", _UNITS.sub(" ", rest)).lower()
    return match["word"], int(match["number"]), letters


def is_broad_nir(text: str | None) -> bool:
    """Whether a name is FORCE's BROADNIR (B08); FORCE's NIR is then the narrow B8A.

    Source: FORCE documentation, level 2 output format, bands of Sentinel-2.
    """
    return bool(text) and "broadnir" in _words(text or "")


def band_in_name(name: str) -> str | None:
    """The band, or quality band, in a file's name, or else in its folder's name.

    FORCE's time series name the narrow near infrared of Sentinel-2 NIR, and the broad one BNR
    (FORCE documentation, time series analysis, band abbreviations).

    Args:
        name: the file's name with its folders.
    """
    *folders, _ = name.split("/")
    own = stem(name)
    band = _first_of([own])
    if band is None and not any(_NOT_A_BAND.fullmatch(word) for word in _words(own)):
        band = next((found for one in reversed(folders) if (found := _band_of_folder(one))), None)
    return TWINS["B08"] if band == "B08" and _FORCE_NARROW.search(own) else band


def _band_of_folder(name: str) -> str | None:
    """The band, or quality band, that the name of a folder states, not as the name of a place."""
    words = _words(name)
    if any(map(_CODE.fullmatch, words)) or quality_of(name):
        return _first_of([name])
    colours = [word for word in words if not _BESIDE.fullmatch(word)]
    return band_of(name) if tuple(colours) in {*_PHRASES, *_FOREIGN} else None


def _first_of(texts: Sequence[str]) -> str | None:
    """The band, or quality band, of the first text that names one."""
    return next((band for text in texts if (band := band_of(text) or quality_of(text))), None)


def of_the_browser(name: str) -> bool:
    """Whether a file's name is that of a raw band from the Copernicus Browser or EO Browser.

    Their integers are reflectance x 65535 or x 255, the largest number of the type, and their
    values are harmonised, so that they hold no offset (their source code, image download, scaling
    factor of raw bands; Sentinel Hub documentation, harmonizeValues).
    """
    return bool(_BROWSER.search(stem(name)))


def level_of(name: str) -> str | None:
    """The level of Sentinel-2 reflectance that a file's name, else one of its folders, states.

    Args:
        name: the file's name with its folders.

    Returns:
        `1C` for the top of the atmosphere, `2A` for the surface, None if neither is stated.
    """
    for part in reversed(name.split("/")):
        words = set(_words(part))
        found = [level for level, own in _LEVELS.items() if own & words]
        if len(found) == 1:
            return found[0]
    return None


def tagged_level(tags: Mapping[str, str]) -> tuple[str, str] | None:
    """The level of Sentinel-2 reflectance that tags (lower-case keys) state, and the tag.

    Returns:
        The level as `level_of` returns it, and the tag as `key=value`; None if none states it.
    """
    for key in _LEVEL_TAGS:
        text = tags.get(key, "").strip()
        word = _LEVEL_WORD.fullmatch(text)
        if level := word[1].upper() if word else level_of(text):
            return level, f"{key}={text[:80]}"
    return None


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
    """The bands of a file whose bands have no names: as its name lists them, or of a product.

    Of a whole Sentinel-2 product they are the first ones.

    Args:
        name: the file's name.
        count: number of bands of the file.

    Returns:
        The bands; empty if neither name nor number indicate them.
    """
    if listed := listed_bands(name, count):
        return listed
    sen2r = _SEN2R.search(stem(name))
    if sen2r and count == _SEN2R_COUNTS[sen2r["level"]]:
        return (*PRODUCT_BANDS[:-1], "B08" if sen2r["size"] == "10" else "B8A")
    return PRODUCT_BANDS if count in PRODUCT_COUNTS else ()


def listed_bands(name: str, count: int) -> tuple[str, ...]:
    """The bands that a file's name lists, as `x_B02_B03_B04_B08`, `x_B2B3B4B8` or `x_blue_red_nir`.

    Args:
        name: the file's name.
        count: number of bands of the file.

    Returns:
        As many different bands as the file has, at least two, in the order of the name, with only
        words that name a band between the first and the last one; else empty.
    """
    words = _words(stem(name))
    if count < 2 or any(_NOT_A_BAND.fullmatch(word) for word in words):
        return ()
    found: list[str | None] = []
    for word in words:
        codes = _CODES.fullmatch(word)
        own = [f"b{code}" for code in _CODES_IN.findall(word)] if codes else [word]
        found += [band_of(code) for code in own]
    while found and found[0] is None:
        found.pop(0)
    while found and found[-1] is None:
        found.pop()
    bands = tuple(band for band in found if band)
    return bands if len(bands) == len(found) == len(set(bands)) == count else ()


def stem(name: str) -> str:
    """A file's name without folders and without the suffix of a raster.

    A last part such as `.B04` is not a suffix.
    """
    return _SUFFIX.sub("", name.rpartition("/")[2])


def tagged_band(tags: Mapping[str, str]) -> str | None:
    """The band, or quality band, that a band's own tags (lower-case keys) name."""
    texts = [tags[key] for key in _NAME_TAGS if key in tags]
    return _first_of(texts) or band_at_wavelength(tags)


def band_at_wavelength(tags: Mapping[str, str], text: str | None = None) -> str | None:
    """The band at the wavelength that a band's tags (lower-case keys), or else a text, state."""
    if (centre := tagged_number(tags, *_CENTRE_TAGS)) is None:
        stated = _at_wavelengths(text or "")
        return stated.pop() if len(stated) == 1 else None
    return _at(centre * 1000 if centre < _MOST_MICROMETRES else centre)


def tagged_number(tags: Mapping[str, str], *keys: str) -> float | None:
    """The first of the tags that is a finite number, or a list of equal ones."""
    for key in keys:
        numbers = set(tagged_numbers(tags.get(key, "")))
        if len(numbers) == 1:
            return numbers.pop()
    return None


_LIST_MARKS = re.compile(r"[\[\](){}]")
_DECIMAL_COMMA = re.compile(r"\s*[-+]?0,\d+\s*")


def tagged_numbers(text: str) -> tuple[float, ...]:
    """The finite numbers in a tag: one, also with a decimal comma, or a list; empty without."""
    if _DECIMAL_COMMA.fullmatch(text):
        text = text.replace(",", ".")
    parts = [part for part in re.split(r"[,;\s]+", _LIST_MARKS.sub(" ", text)) if part]
    try:
        numbers = tuple(map(float, parts))
    except ValueError:
        return ()
    return numbers if all(abs(number) < float("inf") for number in numbers) else ()

"""Cloud masks: decoders of the providers' quality bands.

Each kind of band has one function. It takes the stored numbers in an array of any shape, and
returns a boolean array of that shape: True where the ground is visible, without cloud, cloud shadow
or snow. A number that is not in the band's definition is not clear. `RULES` has one row per kind,
the most complete first: `mask=auto` uses the first kind that a date has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidRequest, shown
from service.read.band_names import (
    CFMASK,
    CLASSI,
    CLASSI_BANDS,
    CLDPRB,
    CLM,
    CLOUD,
    CLOUD_MASK,
    CLOUD_PROBABILITY,
    CLOUD_SCORE,
    CLP,
    FMASK,
    PIXEL_QA,
    QA60,
    QA_PIXEL,
    QAI,
    S2CLOUDLESS,
    SCL,
    SNWPRB,
    UDM,
    UDM2,
    VALID,
)

Numbers = NDArray[Any]
Clear = NDArray[np.bool_]
Decoder = Callable[[Numbers], Clear]
CLEAR_CLASSES = range(4, 8)
"""SCL classes that count as clear: 4 vegetation, 5 bare ground, 6 water, 7 unclassified."""
CLDPRB_LIMIT = 40.0
"""Probability in per cent from which on a pixel is cloudy, if `mask` gives no number: the threshold
of s2cloudless and of Sentinel Hub's CLM."""
CLOUD_SCORE_LIMIT = 60.0
"""Cloud Score+ in per cent from which on a pixel is clear, if `mask` gives no number: the threshold
of Earth Engine's example, which names 50 to 65 as usual."""
_FULL_CLP = 255.0
QA60_EMPTY = (date(2022, 1, 25), date(2024, 2, 28))
"""First and last date on which Earth Engine's QA60 is always zero, because the products of that
time have no vector cloud mask (Earth Engine catalogue, COPERNICUS/S2_SR)."""
CLASSI_EMPTY = (date.min, date(2024, 1, 31))
"""The dates of which Earth Engine has no MSK_CLASSI: before February 2024 its pixels are masked,
and an export holds zeros (Earth Engine catalogue, COPERNICUS/S2_HARMONIZED)."""
_BITS = 16
OWN = "cloud"
"""The rule that needs no band: the mask is estimated from the series."""


def _integers(data: Numbers) -> tuple[NDArray[np.int64], Clear]:
    """The numbers as integers, and True where they are integers from 0 to 65535."""
    if data.dtype.kind == "u" and data.dtype.itemsize <= 2:
        return data.astype(np.int64), np.ones(data.shape, np.bool_)
    with np.errstate(invalid="ignore"):
        known = (data >= 0) & (data < 2**_BITS)
        integers = np.where(known, data, 0).astype(np.int64)
        return integers, known & (integers == data)


def _without(data: Numbers, bits: Sequence[int]) -> Clear:
    """True where none of the bits is set."""
    integers, known = _integers(data)
    return np.asarray(known & (integers & sum(1 << bit for bit in bits) == 0))


def _whole(decode: Decoder, band: str, file: str, data: Numbers) -> Clear:
    """Decode classes or bits.

    Raises:
        InvalidRequest: the data are fractions: scaled as if they were reflectance, or interpolated
            between classes. A class from 4 to 7 may then be a blend of cloud and nothing.
    """
    if data.dtype.kind == "f":
        fractions = data[np.isfinite(data) & (data != np.trunc(data))]
        if fractions.size:
            raise InvalidRequest.of(
                "mask",
                f"{band} of '{shown(file)}' holds {fractions[0]:.4g}, and its definition has only "
                "whole numbers: write the band as the provider delivers it, neither scaled with "
                "the reflectance nor resampled by another method than the nearest pixel, or give "
                "mask=none or mask=cloud",
            )
    return decode(data)


def scl(data: Numbers) -> Clear:
    """Sen2Cor's scene classification of Sentinel-2 level 2A: classes 4 to 7 are clear.

    Source: Sentinel-2 Products Specification Document (S2-PDGS-TAS-DI-PSD), level 2A scene
    classification: 0 no data, 1 saturated or defective, 2 dark area, 3 cloud shadow, 4 vegetation,
    5 not vegetated, 6 water, 7 unclassified, 8 cloud medium, 9 cloud high probability, 10 thin
    cirrus, 11 snow or ice.
    """
    return np.asarray((data >= CLEAR_CLASSES[0]) & (data <= CLEAR_CLASSES[-1]))


def fmask(data: Numbers) -> Clear:
    """Fmask of Harmonized Landsat Sentinel-2 (HLS), version 1.4 and 2.0: bits.

    Source: HLS Product User Guide, Version 2.0, table "Description of the bits in the one-byte
    Quality Assessment layer": 0 cirrus (reserved in 2.0), 1 cloud, 2 adjacent to cloud or shadow,
    3 cloud shadow, 4 snow or ice, 5 water, 6 and 7 aerosol level. 255 is fill.
    """
    return _without(data, (0, 1, 2, 3, 4))


def fmask_classes(data: Numbers) -> Clear:
    """Fmask as python-fmask and Digital Earth Australia (`oa_fmask`) deliver it: classes.

    Sources: python-fmask documentation, "Output": 0 null, 1 clear, 2 cloud, 3 cloud shadow, 4 snow,
    5 water; Digital Earth Australia, ga_s2am_ard_3 and ga_ls8c_ard_3, measurement `oa_fmask`, with
    the same numbers.
    """
    return np.asarray((data == 1) | (data == 5))


def qa_pixel(data: Numbers) -> Clear:
    """QA_PIXEL of Landsat 4 to 9, Collection 2: bits.

    Source: Landsat 8-9 Collection 2 Level 2 Science Product Guide (USGS LSDS-1619), table of
    QA_PIXEL: 0 fill, 1 dilated cloud, 2 cirrus, 3 cloud, 4 cloud shadow, 5 snow, 6 clear, 7 water.
    """
    return _without(data, (0, 1, 2, 3, 4, 5))


def pixel_qa(data: Numbers) -> Clear:
    """The band pixel_qa of Landsat 4 to 8, Collection 1 surface reflectance: bits.

    Source: Landsat 8 Collection 1 Land Surface Reflectance Code Product Guide (USGS LSDS-1368),
    table of pixel_qa: 0 fill, 1 clear, 2 water, 3 cloud shadow, 4 snow, 5 cloud, 6 and 7 confidence
    of cloud, 8 and 9 confidence of cirrus (3 is high), 10 terrain occlusion.
    """
    integers, _ = _integers(data)
    cirrus = (integers >> 8) & 3 == 3
    return np.asarray(_without(data, (0, 3, 4, 5, 10)) & ~cirrus)


def cfmask(data: Numbers) -> Clear:
    """Classes of CFMask (Landsat before Collection 1) and Fmask 4 (Brazil Data Cube).

    Source: USGS, Product Guide Landsat Surface Reflectance, cfmask, and Qiu et al. 2019, Fmask 4.0:
    0 clear land, 1 clear water, 2 cloud shadow, 3 snow, 4 cloud, 255 no observation.
    """
    return np.asarray((data == 0) | (data == 1))


def s2cloudless(data: Numbers) -> Clear:
    """`oa_s2cloudless_mask` of Digital Earth Australia: classes. It does not mark cloud shadows.

    Source: Digital Earth Australia, ga_s2am_ard_3, measurement `oa_s2cloudless_mask`: 0 no data,
    1 valid, 2 cloud.
    """
    return np.asarray(data == 1)


def clm(data: Numbers) -> Clear:
    """CLM of MAJA (Theia, files CLM_R1 and CLM_R2), and Sentinel Hub's CLM: zero is clear.

    Source: Theia, Sentinel-2 level 2A product format, mask CLM: 0 all clouds but the thinnest and
    all shadows, 1 all clouds but the thinnest, 2 and 3 clouds by one and by several dates, 4
    thinnest clouds, 5 and 6 shadows of clouds inside and outside the image, 7 high clouds. Sentinel
    Hub's band of the same name is 0 clear, 1 cloud, 255 no data (s2cloudless).
    """
    return np.asarray(data == 0)


def qai(data: Numbers) -> Clear:
    """QAI of FORCE level 2: bits, screened as FORCE's own default does.

    Source: FORCE documentation, "Level 2 Processing System, output format", quality assurance
    information: 0 no data, 1 and 2 cloud state (0 clear, 1 buffered, 2 opaque, 3 cirrus), 3 cloud
    shadow, 4 snow, 5 water, 6 and 7 aerosol, 8 subzero reflectance, 9 saturated.
    """
    return _without(data, (0, 1, 2, 3, 4, 8, 9))


def udm2(data: Numbers) -> Clear:
    """First band ("clear") of Planet's Usable Data Mask 2: 1 is clear.

    Source: Planet, Usable Data Masks (UDM2), band 1: 0 not clear, 1 clear of snow, shadow, haze and
    cloud.
    """
    return np.asarray(data == 1)


def udm(data: Numbers) -> Clear:
    """Planet's first Unusable Data Mask (files `..._DN_udm`), and band 8 of UDM2: zero is usable.

    Source: Planet, Unusable Data Masks (UDM), bits: 0 blackfill, 1 cloud, 2 to 7 missing or suspect
    values of single bands. It does not mark shadow, haze or snow.
    """
    return np.asarray(data == 0)


def classi(data: Numbers) -> Clear:
    """One band of MSK_CLASSI of Sentinel-2, level 1C or 2A, baseline 04.00 and later: 0 is clear.

    Source: Sentinel-2 Products Specification Document, issue 14.9, quality mask MSK_CLASSI: three
    bands of 60 m for opaque clouds, cirrus, and snow and ice areas, 1 where the pixel is of that
    class; Earth Engine Data Catalog: MSK_CLASSI_OPAQUE, MSK_CLASSI_CIRRUS, MSK_CLASSI_SNOW_ICE. The
    bands do not mark cloud shadows.
    """
    return np.asarray(data == 0)


def qa60(data: Numbers) -> Clear:
    """QA60 of Sentinel-2 on Google Earth Engine: bits.

    Source: Earth Engine Data Catalog, COPERNICUS/S2_SR_HARMONIZED, band QA60: 10 opaque clouds, 11
    cirrus clouds. See also `QA60_EMPTY`. A number without these bits, such as the zero of a nodata
    tag, is clear. The band does not mark cloud shadows.
    """
    return _without(data, (10, 11))


def cldprb(data: Numbers, limit: float = CLDPRB_LIMIT, times: float = 1) -> Clear:
    """MSK_CLDPRB of Sentinel-2 level 2A: below `limit` per cent of cloud probability is clear.

    Source: Sentinel-2 Products Specification Document, quality indicator MSK_CLDPRB: probability of
    cloud by Sen2Cor, 0 to 100 per cent. The band does not mark cloud shadows. MSK_SNWPRB is the
    same for snow. Numbers that were divided by 100 are multiplied by `times`.
    """
    return np.asarray((data >= 0) & (data * times < min(limit, 100.5)))


def probability(data: Numbers, limit: float = CLDPRB_LIMIT, full: float = 100.0) -> Clear:
    """Cloud probability by s2cloudless: below `limit` per cent is clear. Shadows are not marked.

    Sources: Earth Engine Data Catalog, COPERNICUS/S2_CLOUD_PROBABILITY, band `probability`: 0 to
    100 per cent, uint8. Sentinel Hub documentation, band CLP: 0 to 255, divided by 255 the
    probability. Digital Earth Australia, `oa_s2cloudless_prob`: 0 to 1, float32.

    Args:
        data: the numbers. Floats up to 1 are shares of one, as those of Digital Earth Australia and
            Sentinel Hub's numbers that were divided by 255; 1 itself is cloudy in either reading.
        limit: probability from which on a pixel is cloudy, per cent.
        full: number of a probability of one.
    """
    share = data / full
    if data.dtype.kind == "f":
        share = np.where((data > 0) & (data <= 1), data, share)
    return np.asarray((share >= 0) & (share <= 1) & (share * 100 < min(limit, 100.5)))


def cloud_score(data: Numbers, limit: float = CLOUD_SCORE_LIMIT) -> Clear:
    """Cloud Score+ of Earth Engine: `limit` per cent and more is clear. It also marks shadows.

    Source: Earth Engine Data Catalog, GOOGLE/CLOUD_SCORE_PLUS/V1/S2_HARMONIZED, bands `cs` and
    `cs_cdf`: 0 (not clear) to 1 (clear), float. Integers are not defined, so none is clear;
    `are_per_cent` recognises those of an export in per cent.
    """
    if data.dtype.kind != "f":
        return np.zeros(data.shape, np.bool_)
    return np.asarray((data >= limit / 100 - 1e-6) & (data <= 1))


def cloud_score_per_cent(data: Numbers, limit: float = CLOUD_SCORE_LIMIT) -> Clear:
    """Cloud Score+ that was multiplied by 100 for an export: `limit` and more, up to 100, is clear.

    No provider defines it; the stack has the warning `mask_assumed`.
    """
    return np.asarray((data >= limit - 1e-4) & (data <= 100))


def no_cloud(data: Numbers) -> Clear:
    """A band or file that is only named `cloud_mask` or `clouds`: zero is clear.

    No provider defines it. s2cloudless, eo-learn, CloudSEN12 and OmniCloudMask number clouds from 1
    on, so that zero is clear; the stack has the warning `mask_assumed`.
    """
    return np.asarray(data == 0)


def usable(data: Numbers) -> Clear:
    """A band or file that is only named `valid`, `clear` or `usable`: other than zero is clear.

    No provider defines it; the stack has the warning `mask_assumed`. 255 is usable, as in masks of
    GDAL.
    """
    with np.errstate(invalid="ignore"):
        return np.asarray(data > 0)


def alpha(data: Numbers) -> Clear:
    """An alpha band or Sentinel Hub's dataMask: zero is missing.

    Source: TIFF 6.0, ExtraSamples; Sentinel Hub documentation, `dataMask`.
    """
    return np.asarray(data != 0)


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Another meaning of a mask's numbers, which the numbers themselves decide."""

    clear: Decoder
    """The function from the numbers to True where clear."""
    fits: Callable[[Numbers], bool]
    """Whether numbers of many pixels and dates have this meaning."""
    words: str
    """What they are read as, for the warning `mask_assumed`."""


CLASSES = (
    "are those of python-fmask's classes (1 clear, 2 cloud, 3 shadow, 4 snow, 5 water) and are "
    "read as such; as the bits of HLS, no pixel would be clear"
)
SHARES = "are fractions up to 1 and are read as shares of one, not as per cent"


PER_CENT = "are up to 100 and are read as per cent, not as shares of one"


def are_per_cent(numbers: Numbers) -> bool:
    """Whether the numbers of a score from 0 to 1 are per cent.

    The largest is above 2, because cubic resampling exceeds 1, and at most 100.

    Args:
        numbers: of many pixels and dates, of any shape; NaN without a value.
    """
    known = numbers[np.isfinite(numbers) & (numbers >= 0)]
    return bool(known.size and 2 < known.max() <= 100)


def are_shares(numbers: Numbers) -> bool:
    """Whether the numbers of a probability are shares of one, and not per cent.

    They are at most 1, and some are fractions.

    Args:
        numbers: of many pixels and dates, of any shape; NaN without a value.
    """
    known = numbers[np.isfinite(numbers) & (numbers >= 0)]
    return bool(known.size and known.max() <= 1 and (known != np.trunc(known)).any())


def are_classes(numbers: Numbers) -> bool:
    """Whether the numbers of a band FMASK are python-fmask's classes, and not HLS's bits.

    Classes are 1 to 5, and 1, clear, is the most frequent of them but for clouds, and more frequent
    than 0, null. As bits, 1 is cirrus alone, which HLS 2.0 never sets, clear land is 0 or has
    aerosol bits from 64 on, and water has 32.

    Args:
        numbers: of many pixels and dates, of any shape; 0 or NaN without a value.
    """
    known = numbers[np.isfinite(numbers) & (numbers != 0) & (numbers != 255)]
    clear = int((known == 1).sum())
    return clear > 0 and clear > numbers.size - known.size and bool((known <= 5).all())


RULES: Mapping[str, tuple[str, Callable[..., Clear]]] = {
    "scl": (SCL, scl),
    "fmask": (FMASK, fmask),
    "cfmask": (CFMASK, cfmask),
    "qa_pixel": (QA_PIXEL, qa_pixel),
    "pixel_qa": (PIXEL_QA, pixel_qa),
    "clm": (CLM, clm),
    "qai": (QAI, qai),
    "udm2": (UDM2, udm2),
    "cs": (CLOUD_SCORE, cloud_score),
    OWN: (CLOUD, scl),
    "s2cloudless": (S2CLOUDLESS, s2cloudless),
    "cldprb": (CLDPRB, cldprb),
    "clp": (CLP, partial(probability, full=_FULL_CLP)),
    "probability": (CLOUD_PROBABILITY, probability),
    "msk_classi": (CLASSI, classi),
    "qa60": (QA60, qa60),
    "udm": (UDM, udm),
    "cloud_mask": (CLOUD_MASK, no_cloud),
    "valid": (VALID, usable),
    "snwprb": (SNWPRB, cldprb),
}
"""Band and decoder of each rule, by its name in the parameter `mask`. The rule `cloud` decodes the
band CLOUD of sits if the files have it; otherwise the mask is estimated from the series (`clouds`).
"""
LIMITS: Mapping[str, float] = {
    "cs": CLOUD_SCORE_LIMIT,
    "cldprb": CLDPRB_LIMIT,
    "clp": CLDPRB_LIMIT,
    "probability": CLDPRB_LIMIT,
    "snwprb": CLDPRB_LIMIT,
}
"""The rules that take a number, and the number in per cent that counts without one."""
ASSUMED: Mapping[str, str] = {
    "cloud_mask": "0 is taken as clear and every other number as cloud",
    "valid": "0 is taken as not usable and every other number as clear",
}
"""The rules whose numbers no provider defines, and how they are read."""
_NOT_AUTOMATIC = frozenset({"snwprb"})
"""Rules that mark no clouds, and are used only if they are named."""
# Parts of file names that only one provider uses.
_DEA = re.compile(r"(^|[/_])(ga_|oa_)", re.IGNORECASE)
_LANDSAT = re.compile(r"landsat|(^|[/_])l[cteo]0[4-9]_", re.IGNORECASE)
_EARTH_ENGINE = re.compile(r"msk_classi_opaque", re.IGNORECASE)
_HLS = re.compile(r"(^|[/_.])hls", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class MaskRule:
    """One requested cloud mask, such as `cldprb:40`."""

    name: str
    """A key of `RULES`."""
    limit: float | None = None
    """For the keys of `LIMITS`: the threshold in per cent; None takes the usual one."""
    further: str | None = None
    """One of the further bands of the same mask, by canonical name; None for its first band."""

    @property
    def band(self) -> str:
        """The band that the rule reads, by canonical name."""
        return self.further or RULES[self.name][0]

    @property
    def parts(self) -> tuple[MaskRule, ...]:
        """The rule, and those of the further bands of the same mask."""
        if self.band != CLASSI:
            return (self,)
        return (self, *(replace(self, further=band) for band in CLASSI_BANDS[1:]))

    def __str__(self) -> str:
        limit = LIMITS.get(self.name) if self.limit is None else self.limit
        return self.name if limit is None else f"{self.name}:{limit:g}"

    def is_empty(self, key: date | int, file: str, description: str | None) -> bool:
        """Whether the provider left the mask of a date empty, so that it marks no cloud.

        Args:
            key: the date; a number for undated imagery.
            file: the file's name, with its folders.
            description: the description of the mask's band.
        """
        if not isinstance(key, date):
            return False
        if self.name == "qa60":
            return QA60_EMPTY[0] <= key <= QA60_EMPTY[1]
        if self.name != "msk_classi":
            return False
        # Earth Engine's names; a product's file MSK_CLASSI_B00 is never empty.
        engine = _EARTH_ENGINE.search(description or file.rpartition("/")[2])
        return bool(engine) and CLASSI_EMPTY[0] <= key <= CLASSI_EMPTY[1]

    def decoder(self, file: str) -> Decoder:
        """The function that decodes the numbers of the band in one file.

        Two names have several conventions: Digital Earth Australia's fmask contains classes and
        that of HLS contains bits, and the band CLOUD of sits is the quality band of the collection
        (SCL, Fmask or QA_PIXEL).

        Args:
            file: the file's name, with its folders.

        Returns:
            The function. It raises `InvalidRequest` for fractions where the band's definition has
            only whole numbers.
        """
        if self.name in LIMITS:
            limit = LIMITS[self.name] if self.limit is None else self.limit
            return partial(RULES[self.name][1], limit=limit)
        decode = self._of_whole_numbers(file)
        return decode if self.name in ASSUMED else partial(_whole, decode, self.band, file)

    def alternative(self, file: str) -> Alternative | None:
        """Another meaning that the numbers of the band may have; None if they have only one.

        Args:
            file: the file's name, with its folders.
        """
        if self.name in {"cldprb", "snwprb"}:
            limit = LIMITS[self.name] if self.limit is None else self.limit
            shares = partial(cldprb, limit=limit, times=100)
            return Alternative(clear=shares, fits=are_shares, words=SHARES)
        if self.name == "cs":
            per_cent = partial(cloud_score_per_cent, limit=self.limit or LIMITS[self.name])
            return Alternative(clear=per_cent, fits=are_per_cent, words=PER_CENT)
        if self.name != "fmask" or _DEA.search(file) or _HLS.search(file):
            return None
        clear = partial(_whole, fmask_classes, self.band, file)
        return Alternative(clear=clear, fits=are_classes, words=CLASSES)

    def _of_whole_numbers(self, file: str) -> Decoder:
        if self.name == "fmask" and _DEA.search(file):
            return fmask_classes
        if self.name == "cloud" and _HLS.search(file):
            return fmask
        if self.name == "cloud" and _LANDSAT.search(file):
            return qa_pixel
        return RULES[self.name][1]


AUTO: tuple[MaskRule, ...] = tuple(
    MaskRule(name=name) for name in RULES if name not in _NOT_AUTOMATIC
)
"""The rules in the order of precedence of `mask=auto`."""
ALPHA_RULE = MaskRule(name="alpha")


def parse_mask(text: str | None) -> tuple[MaskRule, ...] | None:
    """Parse the parameter `mask`.

    Args:
        text: `auto`, `none`, or comma-separated rules; those of `LIMITS` may have a number.

    Returns:
        The rules, all of which a clear pixel must pass; empty for `none`; None for `auto`.

    Raises:
        InvalidRequest: a rule does not exist, or its number is not above 0 and up to 100 per cent.
    """
    if text is None or text == "auto":
        return None
    if text == "none":
        return ()
    return tuple(dict.fromkeys(_rule(part.strip()) for part in text.split(",")))


def _rule(text: str) -> MaskRule:
    name, colon, number = text.lower().partition(":")
    if name not in RULES:
        raise InvalidRequest.of(
            "mask",
            f"'{shown(text)}' is not a cloud mask: give auto, none, or any of {', '.join(RULES)}",
        )
    if not colon:
        return MaskRule(name=name)
    if name not in LIMITS:
        raise InvalidRequest.of(
            "mask",
            f"'{shown(text)}' has a number, which only {' and '.join(LIMITS)} take, as in "
            f"cldprb:40: give '{name}'",
        )
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if not 0 < limit <= 100:
        raise InvalidRequest.of(
            "mask",
            f"'{shown(text)}' is not valid: give the limit in per cent, above 0 and at most 100, "
            "as in cldprb:40",
        )
    return MaskRule(name=name, limit=limit)

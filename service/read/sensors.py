"""Sensors: the satellite sensor of a file, and its bands under Sentinel-2's names.

The sensor is detected from file names, tags and band descriptions; else it is unknown.

Sources: USGS, Landsat 8-9 Collection 2 Level 2 Science Product Guide (LSDS-1619); Vermote et al.,
MOD09 User's Guide, Collection 6; Masek et al., HLS User Guide 2.0; Planet, PlanetScope Product
Specifications.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from service.errors import StackWarning, WrongSensor, shown
from service.read.geotiff import Header


@dataclass(frozen=True, kw_only=True)
class Sensor:
    """A satellite sensor, in one of its product's forms."""

    name: str
    """Name in the parameter `sensor` and in model cards."""
    label: str
    """Name for messages."""
    bands: Mapping[int, str] | None = None
    """Band number to Sentinel-2's name; None if the sensor has Sentinel-2's names."""
    order: Mapping[int, tuple[str, ...]] | None = None
    """Band names by number of bands, for files that name none."""
    scale: float | None = None
    """reflectance = value x scale + offset of its integers, if a file states nothing."""
    offset: float = 0.0
    also: tuple[str, ...] = ()
    """Sensors of model cards that this sensor fits."""


_OLI = {1: "B01", 2: "B02", 3: "B03", 4: "B04", 5: "B08", 6: "B11", 7: "B12"}
_TM = {1: "B02", 2: "B03", 3: "B04", 4: "B08", 5: "B11", 7: "B12"}
SENTINEL_2 = Sensor(name="sentinel-2", label="Sentinel-2")
HLS_S30 = Sensor(name="hls", label="HLS S30", scale=0.0001, also=("sentinel-2",))
HLS_L30 = Sensor(name="hls", label="HLS L30", bands=_OLI, scale=0.0001, also=("landsat",))
LANDSAT = Sensor(name="landsat", label="Landsat", bands={}, scale=0.0000275, offset=-0.2)
OLI = replace(LANDSAT, label="Landsat 8 or 9", bands=_OLI)
TM = replace(LANDSAT, label="Landsat 4 to 7", bands=_TM)
# Analysis-ready Landsat of others, such as FORCE and Digital Earth Australia: reflectance x 10,000.
OLI_SCALED = replace(OLI, scale=0.0001, offset=0.0)
TM_SCALED = replace(TM, scale=0.0001, offset=0.0)
MODIS = Sensor(
    name="modis",
    label="MODIS",
    bands={1: "B04", 2: "B08", 3: "B02", 4: "B03", 6: "B11", 7: "B12"},
    scale=0.0001,
)
PLANETSCOPE = Sensor(
    name="planetscope",
    label="PlanetScope",
    order={
        4: ("B02", "B03", "B04", "B08"),
        8: ("B01", "B02", "green_i", "B03", "yellow", "B04", "B05", "B08"),
    },
    scale=0.0001,
)
BY_NAME: Mapping[str, Sensor] = {
    "sentinel-2": SENTINEL_2,
    "hls": HLS_S30,
    "landsat": LANDSAT,
    "modis": MODIS,
    "planetscope": PLANETSCOPE,
}
"""The values of the parameter `sensor`."""

_START = r"(?:^|[/._\- ])"
_END = r"(?=$|[/._\- ])"
_FIRST = r"(?:^|/)"
"""Before short words, which elsewhere in a name may be those of a place or a plot."""
# Sensors whose bands have the same colours but other wavelengths, in the names of their products.
_FOREIGN = tuple(
    (pattern, Sensor(name=name, label=label))
    for pattern, name, label in (
        (rf"{_START}(?:CBERS|CB4A?){_END}|{_START}CBERS[_\- ]?4A?{_END}", "cbers", "CBERS"),
        (rf"{_START}RE[1-5]_3A{_END}|RapidEye", "rapideye", "RapidEye"),
        (
            rf"{_START}S3[AB]_OL_|{_START}S3[AB]_OLCI{_END}|{_START}Sentinel[_\- ]?3[AB]?{_END}",
            "sentinel-3",
            "Sentinel-3",
        ),
        (rf"{_START}SPOT[_\- ]?[1-7]{_END}", "spot", "SPOT"),
        (rf"{_START}V(?:NP|J1)(?:09|43)[A-Z]?\w?\d?{_END}|{_START}VIIRS{_END}", "viirs", "VIIRS"),
        # Their narrow bands lie at the wavelengths of Sentinel-2's.
        (rf"{_START}(?:PRISMA|PRS_L\d\w?){_END}", "prisma", "PRISMA"),
        (rf"{_START}ENMAP\d*{_END}", "enmap", "EnMAP"),
        (rf"{_START}DESIS{_END}", "desis", "DESIS"),
        (rf"{_START}EMIT{_END}", "emit", "EMIT"),
        (rf"{_START}PROBA[_\- ]?V{_END}", "proba-v", "PROBA-V"),
        (rf"{_START}SPOT[_\- ]?(?:VGT|VEGETATION)\d?{_END}", "spot-vgt", "SPOT VEGETATION"),
        (rf"{_START}(?:PHR1?[AB]|PNEO\d?|Pl[eé]iades){_END}", "pleiades", "Pléiades"),
        (rf"{_START}(?:WV0?[1-4]|WorldView[_\- ]?\d?|GE01|QB02){_END}", "worldview", "WorldView"),
        (rf"{_START}(?:GF[1-7][A-D]?|Gaofen[_\- ]?\d?){_END}", "gaofen", "Gaofen"),
        (rf"{_START}(?:ssc\d+\w*|SkySat\w*){_END}", "skysat", "SkySat"),
        (rf"{_START}(?:AST_(?:L1|0[5-9])\w*|ASTER){_END}", "aster", "ASTER"),
        (rf"{_START}(?:AVHRR){_END}", "avhrr", "AVHRR"),
        (rf"{_START}(?:R2A?|Resourcesat[_\- ]?\w*)[_\- ](?:LISS|AWIFS)\w*", "liss", "Resourcesat"),
        (
            rf"{_START}S1[A-D]_(?:IW|EW|SM)_|{_START}Sentinel[_\- ]?1[A-D]?{_END}",
            "sentinel-1",
            "Sentinel-1",
        ),
        (rf"{_START}S3[AB]_SY_", "sentinel-3", "Sentinel-3"),
        (rf"{_START}(?:AMAZONIA[_\- ]?1|AMZ1){_END}", "amazonia", "Amazonia-1"),
        (rf"{_START}KOMPSAT[_\- ]?\d?A?{_END}|{_FIRST}K3A{_END}", "kompsat", "KOMPSAT"),
        (rf"{_START}VENUS[_\-]XS{_END}", "venus", "VENµS"),
        (rf"{_START}(?:DE2_(?:MS4|PM4|PSH)|DEIMOS[_\- ]?\d?){_END}", "deimos", "Deimos"),
        (rf"{_START}(?:ZY[13][A-Z\d]*|Ziyuan[_\- ]?\d?){_END}", "ziyuan", "Ziyuan"),
        (rf"{_START}HJ[12][A-F]{_END}", "huanjing", "Huanjing"),
        (
            rf"{_FIRST}SV[12](?:-\d\d)?{_END}|{_START}SuperView[_\- ]?\d?{_END}",
            "superview",
            "SuperView",
        ),
        (rf"{_START}(?:JL1\w*|Jilin[_\- ]?1\w*){_END}", "jilin", "Jilin-1"),
        (rf"{_START}(?:TH_CAT|THEOS[_\- ]?\d?){_END}", "theos", "THEOS"),
        (rf"{_START}(?:ALAV2A\w*|AVNIR[_\- ]?2?){_END}", "alos", "ALOS"),
        (rf"{_START}IRS[_\- ]?(?:P6|1[CD]|R2A?){_END}", "liss", "Resourcesat"),
        (rf"{_START}(?:wyvern|dragonette[_\- ]?\d*){_END}", "wyvern", "Wyvern"),
        (rf"{_START}(?:AVIRIS(?:[_\-]NG)?|EO1[HA]\w*|Hyperion){_END}", "aviris", "AVIRIS or EO-1"),
        (rf"{_START}(?:DJI\w*|P4M|M3M|micasense\w*){_END}", "drone", "a drone's camera"),
        (rf"{_START}NAIP{_END}|{_START}m_\d{{7}}_[ns][ew]_\d\d_", "naip", "NAIP"),
    )
)
_NAMES: tuple[tuple[re.Pattern[str], Sensor], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), sensor)
    for pattern, sensor in (
        (rf"{_START}HLS[._\- ]?S30{_END}", HLS_S30),
        (rf"{_START}HLS[._\- ]?L30{_END}", HLS_L30),
        (rf"{_START}L[CO]0[89]{_END}", OLI),
        (rf"{_START}L[ET]0[4-7]{_END}", TM),
        (rf"{_START}LS[89]{_END}", OLI_SCALED),  # sen2like
        (rf"{_START}L0[89]\.00\d{_END}", OLI),  # AppEEARS
        (rf"{_START}L0[457]\.00\d{_END}", TM),
        (rf"{_START}LND(?:0[89]|LG){_END}|{_START}ga_ls[89]c?_|{_START}LC8\d{{13}}", OLI_SCALED),
        (rf"{_START}LND0[4-7]{_END}|{_START}ga_ls[57][te]?_|{_START}L[ET][4-7]\d{{13}}", TM_SCALED),
        (rf"{_START}L[89]_OLI{_END}|{_START}landsat[_\- ]?0?[89]{_END}", OLI),  # L8_OLI: ACOLITE
        (rf"{_FIRST}L[89]{_END}|{_START}(?:LC8|OLI(?:[_\- ]?[12])?){_END}", OLI),
        (rf"{_START}L[4-7]_E?TM{_END}", TM),
        (rf"{_FIRST}L[57]{_END}|{_START}(?:LE7|LT5|ETM\+?){_END}", TM),
        (rf"{_START}(?:lndsr|ledaps|lasrc){_END}", LANDSAT),
        (rf"{_START}landsat[_\- ]?0?[4-7]{_END}", TM),
        (rf"{_START}landsat{_END}", LANDSAT),
        (rf"{_START}(?:MOD|MYD|MCD)(?:09|13|43)[A-Z]{{0,2}}\d?{_END}", MODIS),
        (rf"{_START}modis{_END}", MODIS),
        # RapidEye's products are named analytic as PlanetScope's are.
        *_FOREIGN,
        (r"AnalyticMS|PSScene|PlanetScope|SuperDove|planet_medres", PLANETSCOPE),
        (
            rf"{_START}PF[_\-](?:SR|QA){_END}|{_START}global_(?:month|quarter)ly_\d{{4}}",
            PLANETSCOPE,
        ),
        (rf"_PS_(?:normalized_)?analytic|{_START}PS2(?:_SD)?{_END}", PLANETSCOPE),
        (rf"{_START}S2[A-D]?_(?:MSIL|OPER|L[12]|\d)", SENTINEL_2),
        (rf"{_START}(?:SEN|Sentinel[_\- ]?)2[A-D]?{_END}|{_START}SEN2[LH]{_END}", SENTINEL_2),
        (rf"{_START}S2[A-D](?:1C|2A)?_", SENTINEL_2),
    )
)
# Tags in which writers name the satellite or the product.
_TAGS = (
    "spacecraft_id",
    "spacecraft_name",
    "datatake_1_spacecraft_name",
    "satellite",
    "platform",
    "constellation",
    "mission",
    "sensor",
    "landsat_product_id",
    "product_id",
    "product_uri",
    "shortname",
    "collection",
    "tifftag_imagedescription",
)
_BANDS: tuple[tuple[re.Pattern[str], Sensor], ...] = (
    (re.compile(r"sur_refl_b\d", re.IGNORECASE), MODIS),
    (re.compile(r"nadir_reflectance_band\d", re.IGNORECASE), MODIS),
    (re.compile(r"(?:^|_)SR_B\d$", re.IGNORECASE), LANDSAT),
)
_NUMBER = re.compile(r"(?:^|[^0-9a-z])b(?:and)?[_ ]?0?(\d{1,2})(?=$|[^0-9a-z])", re.IGNORECASE)
NO_BAND = "not used"
"""Description of a band that has no name of Sentinel-2's."""
ITEM_BAND = "pimc:band"
"""Tag of a band that a STAC item names, in Sentinel-2's terms whatever the sensor."""
_NAME_TAGS = ("name", "band_name", "bandname")


def sensor_of(header: Header) -> tuple[Sensor, str] | None:
    """The sensor of a file, and the metadata that names it; None if the sensor is unknown.

    Args:
        header: the file's header.
    """
    words = [(header.name, "its name")]
    words += [(header.tags[tag], f"its tag `{tag}`") for tag in _TAGS if tag in header.tags]
    for text, source in words:
        # Tags name sensors as file names do: "LANDSAT_8", "Sentinel-2A".
        if sensor := sensor_named(text):
            return _of_generation(sensor, header), source
    described = [text for text in header.descriptions if text]
    for pattern, sensor in _BANDS:
        found = next((text for text in described if pattern.search(text)), None)
        if found:
            return _of_generation(sensor, header), f"its band '{shown(found)}'"
    if {"green_i", "yellow"} <= {text.lower().replace(" ", "_") for text in described}:
        return PLANETSCOPE, "its bands"
    return None


def sensor_named(text: str) -> Sensor | None:
    """The sensor that a name of a product or satellite states; None if it states none."""
    return next((sensor for pattern, sensor in _NAMES if pattern.search(text)), None)


def band_number(text: str) -> int | None:
    """The number in a band's name, such as `SR_B5`; None without one."""
    numbers = _NUMBER.findall(text)
    return int(numbers[-1]) if numbers else None


def _of_generation(sensor: Sensor, header: Header) -> Sensor:
    """The Landsat generation by the bands alone: band 6 of TM and ETM+ is not reflectance."""
    texts = " ".join(text for text in header.descriptions if text)
    return OLI if sensor is LANDSAT and re.search(r"SR_B6\b", texts, re.IGNORECASE) else sensor


def card_names(labels: str | None) -> tuple[str, ...]:
    """The names that a model card uses for a stack's sensors.

    Args:
        labels: the stack's sensors, comma-separated; None if unknown.
    """
    known = (SENTINEL_2, HLS_S30, HLS_L30, OLI, TM, LANDSAT, MODIS, PLANETSCOPE)
    foreign = (sensor for _, sensor in _FOREIGN)
    names = {sensor.label: sensor.name for sensor in (*known, *foreign)}
    return tuple(dict.fromkeys(names[label] for label in (labels or "").split(", ") if label))


def sensors_of(
    headers: Sequence[Header], given: str | None
) -> tuple[tuple[Sensor | None, str], ...]:
    """Each file's sensor, None if unknown, and the metadata or parameter that names it.

    Args:
        headers: headers of all files.
        given: the caller's `sensor`, which takes precedence over the files.
    """
    found = [sensor_of(header) for header in headers]
    if given is None:
        return tuple(one or (None, "") for one in found)
    named = BY_NAME[given]
    return tuple(
        # A sensor's name may have several products, such as HLS S30 and L30: the file decides.
        (one[0] if one and one[0].name == named.name else named, "the parameter `sensor`")
        for one in found
    )


def check_sensors(
    headers: Sequence[Header],
    sensors: Sequence[tuple[Sensor | None, str]],
    allowed: Collection[str],
    costs: Mapping[str, str],
    model: str,
) -> tuple[StackWarning, ...]:
    """Reject files of a sensor that the model was not trained on, or warn if the card allows it.

    Args:
        headers: headers of all files.
        sensors: sensor of each file, as returned by `sensors_of`.
        allowed: the card's `sensors`; empty if it does not state them.
        costs: the card's `other_sensors`.
        model: the model, for messages.

    Raises:
        WrongSensor: a file is of another sensor; the message names the file, its sensor, the
            metadata that names it, and the model's sensors.
    """
    if not allowed:
        return ()
    other = [
        (header, sensor, source)
        for header, (sensor, source) in zip(headers, sensors, strict=True)
        if sensor and not {sensor.name, *sensor.also} & set(allowed)
    ]
    wrong = [one for one in other if one[1].name not in costs]
    if not wrong:
        return _costs(other, costs, model)
    header, sensor, source = wrong[0]
    more = f" ({len(wrong)} of {len(headers)} files are)" if len(headers) > 1 else ""
    raise WrongSensor(
        f"'{header.name}' is an image of {sensor.label}, according to {source}{more}, but "
        f"'{model}' was trained on {', '.join(allowed)}; choose a model whose card lists "
        f"'{sensor.name}' in `sensors`, or give `sensor` if the files are of another sensor"
    )


def _costs(
    other: Sequence[tuple[Header, Sensor, str]], costs: Mapping[str, str], model: str
) -> tuple[StackWarning, ...]:
    """A warning for each sensor that the card allows at a cost."""
    first = {sensor.name: (header, sensor, source) for header, sensor, source in reversed(other)}
    return tuple(
        StackWarning(
            code="other_sensor",
            detail=f"'{header.name}' is an image of {sensor.label}, according to {source}, and "
            f"'{model}' was not trained on such images; its card allows them: {costs[name]}",
        )
        for name, (header, sensor, source) in first.items()
    )


def in_sentinel_2_terms(header: Header, sensor: Sensor | None) -> Header:
    """A header with Sentinel-2's names of the bands in place of the sensor's.

    Args:
        header: the header as read.
        sensor: the file's sensor; None if unknown.
    """
    if sensor is None:
        return header
    if sensor.order and not any(header.descriptions) and header.count in sensor.order:
        return replace(header, descriptions=sensor.order[header.count])
    if sensor.bands is None:
        return header
    return replace(
        header,
        descriptions=tuple(_described(header, at, sensor.bands) for at in range(header.count)),
    )


def _described(header: Header, at: int, bands: Mapping[int, str]) -> str | None:
    tags = header.band_tags[at]
    if ITEM_BAND in tags:
        return tags[ITEM_BAND]
    texts = [header.descriptions[at], *(tags.get(tag) for tag in _NAME_TAGS)]
    if header.count == 1:
        texts.append(PurePosixPath(header.name).stem)
    for text in texts:
        number = band_number(text or "")
        if number is not None:
            return bands.get(number, NO_BAND)
    return header.descriptions[at]

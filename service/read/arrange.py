"""Arrangement: the layout of the files, and their granules by date."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import pairwise

from service.errors import (
    InvalidRequest,
    MissingBands,
    MissingDates,
    StackWarning,
    first_names,
    shown,
)
from service.read.band_names import (
    ALPHA,
    CLOUD,
    PRODUCT_BANDS,
    PRODUCT_COUNTS,
    QA60,
    QUALITY,
    TWINS,
    are_near,
    band_of,
    listed_bands,
    positions_in_names,
    quality_of,
    stem,
    why_no_band,
)
from service.read.clouds import BANDS as CLOUD_BANDS
from service.read.clouds import MIN_DATES
from service.read.dates import unclear_date
from service.read.geotiff import Header
from service.read.layouts import (
    BandAssignment,
    DescribedFile,
    Layout,
    LayoutQuery,
    StackOptions,
    counted,
    days_in_conflict,
    file_per_band,
    file_per_date,
    in_order_of_counts,
    names_and_bands,
    single_file,
    stated_days,
)
from service.read.masks import (
    ALPHA_RULE,
    ASSUMED,
    AUTO,
    CLASSI_EMPTY,
    OWN,
    QA60_EMPTY,
    MaskRule,
    parse_mask,
)
from service.read.sensors import ITEM_BAND, NO_BAND, sensor_named, sensor_of

_NAMED_AT_MOST = 5
_UNUSED_IN_FULL = 100
"""Largest number of unused files that a warning names in full; of more, it names a few per reason.
"""
_ESTIMATED = StackWarning(
    code="cloud_mask_estimated",
    detail="the cloud mask is estimated from each pixel's own series: in regions that it was not "
    "fitted on, it detected 83 % or more of the clouds in cloudy series, 57 % of the clouds in a "
    "series of eight dates in June, and hardly any thin cirrus; it classified up to 4 % of clear "
    "land and 10 % of water as cloud or shadow. A mask of the provider, such as SCL, is better",
)
"""The errors are those of docs/results.md."""


@dataclass(frozen=True, kw_only=True)
class Granule:
    """One acquisition of an area: every band of one date, from one file or several."""

    key: date | int
    """The date; a running number for undated imagery."""
    planes: Mapping[str, tuple[Header, int]]
    """Band name to the file and the number of the band in it, from 1; also quality bands."""
    masks: tuple[MaskRule, ...] = ()
    """The cloud masks that are used, whose bands are among the planes; also alpha."""


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """The files as granules with their bands and cloud masks."""

    layout: Layout
    bands: tuple[str, ...]
    """The bands that are used: the needed ones, then the optional ones that were found."""
    granules: tuple[Granule, ...]
    """The granules in the order of their keys; those of one key in the order of the files."""
    used: tuple[Header, ...]
    """Files that contain a used band or mask, in the order given."""
    mask: str
    """The cloud masks used, as the parameter `mask` names them; `none` if there is none."""
    cloud_bands: tuple[str, ...] | None = None
    """Bands that the cloud mask estimated from the series reads in addition to the needed ones;
    None if that mask is not used."""
    warnings: tuple[StackWarning, ...] = ()


_READERS: Mapping[Layout, Callable[[LayoutQuery], list[BandAssignment]]] = {
    "file-per-date": file_per_date,
    "file-per-band": file_per_band,
    "file-per-band-and-date": file_per_band,
    "single-file": single_file,
}


class MaskNotInAllFiles(InvalidRequest):
    """Some dates have a cloud mask that others lack."""

    files: tuple[Header, ...] = ()
    """Headers of the files of the needed bands."""


def arrange(
    headers: Sequence[Header],
    options: StackOptions,
    *,
    bands: Sequence[str],
    optional: Sequence[str] = (),
    dated: bool,
) -> Arrangement:
    """Determine the bands, dates and cloud masks of the files.

    Args:
        headers: headers of all files, in the order given.
        options: the request's parameters about the files.
        bands: the needed bands, by canonical name.
        optional: further bands, used if every date has them.
        dated: whether every observation needs a date.

    Raises:
        InvalidRequest: the options and the files contradict each other.
        MaskNotInAllFiles: some dates lack the cloud mask of the others.
        MissingBands: a needed band is missing, or missing on some date.
        MissingDates: a file or band has no date, or there are fewer dates than files.
    """
    rules = parse_mask(options.mask)
    may_estimate = rules is not None and MaskRule(name=OWN) in rules
    for_clouds = tuple(b for b in CLOUD_BANDS if b not in bands) if may_estimate else ()
    twins = {TWINS[band] for band in (*bands, *for_clouds) if band in TWINS}
    single = [header.name for header in headers if header.count == 1]
    counting = positions_in_names(single)
    query = LayoutQuery(
        files=_named_apart([DescribedFile(one, one.name in counting) for one in headers]),
        dates=options.dates,
        names=options.bands and tuple(map(_canonical, options.bands)),
        needed=tuple(bands),
        optional=tuple(optional),
        usable=frozenset((*bands, *for_clouds, *optional))
        | twins
        | {part.band for rule in (AUTO if rules is None else rules) for part in rule.parts}
        | {ALPHA},
    )
    layout = options.layout or _guess(query)
    slots = [slot for slot in _READERS[layout](query) if slot.numbers]
    estimated = may_estimate and not any(CLOUD in slot.numbers for slot in slots)
    if estimated:
        rules = tuple(rule for rule in rules or () if rule.name != OWN)
        query = replace(query, needed=(*query.needed, *for_clouds))
    slots, warnings = _with_twins(slots, query)
    _check_found(query, slots, for_clouds if estimated else ())
    if layout == "file-per-band" != options.layout and all(s.file.count == 1 for s in slots):
        layout = "file-per-band-and-date"
    granules = _granules(_surface_first(_finest(_with_bands(slots, query)), query), dated=dated)
    _check_complete(granules, query.needed)
    granules = _masked(granules, rules, query.needed)
    found = [b for b in optional if all(b in granule.planes for granule in granules)]
    used = {
        id(granule.planes[band][0])
        for granule in granules
        for band in (*query.needed, *found, *(_band(rule) for rule in granule.masks))
    }
    warnings += _assumed_order(layout, query, used)
    warnings += [*_dates_contradicted(query, slots), *_bands_contradicted(query)]
    warnings += [*_dates_assumed(query, slots), *_out_of_order(query, slots)]
    warnings += _top_of_atmosphere(query, used) if dated else []
    warnings += _unused(query, used, layout, options)
    warnings += [_ESTIMATED] if estimated else _missing_mask(granules, rules)
    names = dict.fromkeys(str(r) for g in granules for r in g.masks if r is not ALPHA_RULE)
    if estimated:
        names[OWN] = None
    return Arrangement(
        layout=layout,
        bands=(*bands, *found),
        granules=granules,
        used=tuple(file.header for file in query.files if id(file.header) in used),
        mask=",".join(names) or "none",
        cloud_bands=tuple(b for b in for_clouds if b not in found) if estimated else None,
        warnings=tuple(warnings),
    )


def _named_apart(files: Sequence[DescribedFile]) -> tuple[DescribedFile, ...]:
    """The files, where those of one band go by their names if all have the same description.

    Programs describe the only band of a file as B1 or Band 1, or keep the description of another
    file whose profile they copied.
    """
    single = [file for file in files if file.count == 1 and file.bands[0] and file.name_band]
    single = [f for f in single if f.bands[0] not in QUALITY | {ALPHA} and f.name_band != ALPHA]
    if len({f.bands[0] for f in single}) != 1 or len({f.name_band for f in single}) < 2:
        return tuple(files)
    named = set(map(id, single))
    return tuple(replace(f, by_name=True) if id(f) in named else f for f in files)


def _canonical(name: str) -> str:
    return band_of(name) or quality_of(name) or name.upper()


def _band(rule: MaskRule) -> str:
    return ALPHA if rule is ALPHA_RULE else rule.band


def _with_twins(
    slots: list[BandAssignment], query: LayoutQuery
) -> tuple[list[BandAssignment], list[StackWarning]]:
    """Replace a broad band by its narrow twin if no file has the broad band."""
    present = {name for slot in slots for name in slot.numbers}
    lacking = set(query.needed) - present
    if not lacking or not {TWINS.get(band) for band in lacking} <= present - set(query.needed):
        return slots, []
    warnings = []
    for band in lacking:
        twin = TWINS[band]
        slots = [
            replace(
                slot,
                numbers={band if name == twin else name: n for name, n in slot.numbers.items()},
            )
            for slot in slots
        ]
        warnings.append(
            StackWarning(
                code="band_substituted",
                detail=f"no file has {band}, so {twin}, a narrower band of similar wavelength, is "
                "used instead",
            )
        )
    return slots, warnings


def _with_bands(slots: Sequence[BandAssignment], query: LayoutQuery) -> list[BandAssignment]:
    """The slots without masks of dates that have no needed band."""
    if any(slot.day is None for slot in slots):
        return list(slots)
    days = {slot.day for slot in slots if slot.numbers.keys() & set(query.needed)}
    return [slot for slot in slots if slot.day in days]


_SIZE_WORD = re.compile(r"r?(10|20|60)m")
_BETTER: Mapping[str, str] = {"sre": "fre", "rhot": "rhos"}
"""Words in file names of products that hold a band twice, to the words of the copy that is used:
Theia's reflectance with slope correction (fre), ACOLITE's of the surface (rhos)."""
_COPIES = frozenset({*_BETTER, *_BETTER.values()})


def _finest(slots: Sequence[BandAssignment]) -> list[BandAssignment]:
    """The slots without other copies of a band: coarser ones, or those with less correction.

    Products contain 10 m bands again at 20 m, and those of Theia and ACOLITE each band twice.
    """
    copies: dict[tuple[object, ...], list[BandAssignment]] = defaultdict(list)
    for slot in slots:
        words = frozenset(word for word in _name_words(slot) if not _SIZE_WORD.fullmatch(word))
        words -= _COPIES
        single = slot.file.count == 1
        copies[tuple(slot.numbers) if single else id(slot), slot.day, words].append(slot)
    coarser: set[int] = set()
    for own in copies.values():
        sizes = [abs(slot.file.header.transform.determinant) for slot in own]
        coarser |= {
            id(slot) for slot, size in zip(own, sizes, strict=True) if size > 1.5 * min(sizes)
        }
        there = {word for slot in own for word in _name_words(slot)}
        lesser = {word for word, better in _BETTER.items() if better in there}
        coarser |= {id(slot) for slot in own if lesser & set(_name_words(slot))}
    return [slot for slot in slots if id(slot) not in coarser]


def _surface_first(slots: Sequence[BandAssignment], query: LayoutQuery) -> list[BandAssignment]:
    """The slots without imagery of level 1C on dates of which level 2A has all needed bands."""
    of_2a: dict[date | None, set[str]] = defaultdict(set)
    for slot in slots:
        if slot.file.level == "2A":
            of_2a[slot.day] |= slot.numbers.keys()
    days = {day for day, bands in of_2a.items() if bands.issuperset(query.needed)}
    return [
        slot
        for slot in slots
        if slot.day not in days or slot.file.is_mask or slot.file.level != "1C"
    ]


def _top_of_atmosphere(query: LayoutQuery, used: set[int]) -> list[StackWarning]:
    """The warning that files hold reflectance at the top of the atmosphere."""
    files = [file for file in query.files if id(file.header) in used and not file.is_mask]
    top = [file for file in files if file.level == "1C"]
    if not top:
        return _with_cirrus(query, files)
    mixed = "" if len(top) == len(files) else ", unlike the other files, so that dates differ"
    against = next((file for file in top if len(dict(file.stated_levels)) > 1), None)
    if against is not None:
        stated = " and ".join(f"{source} states {level}" for level, source in against.stated_levels)
        mixed += f"; of '{against.name}', {stated}, so check which one it is"
    detail = (
        f"{len(top)} of {counted(len(files), 'file')} ({_quoted([f.name for f in top], 2)}) hold "
        "reflectance at the top of the atmosphere (level 1C), according to "
        f"{_their_sources(top)}{mixed}; it is brighter in blue and red than that of the surface "
        "(level 2A), and NDVI is lower: give level 2A, unless the model's card names level 1C in "
        "its training data"
    )
    return [StackWarning(code="top_of_atmosphere", detail=detail)]


def _with_cirrus(query: LayoutQuery, files: Sequence[DescribedFile]) -> list[StackWarning]:
    """The warning that files are of level 1C by their bands, if nothing states a level.

    Of Sentinel-2's levels, 1C alone has B10 (cirrus); HLS S30 has it as well. A product of 13
    bands without names is of level 1C too.
    """
    if not files or any(file.level for file in files):
        return []
    named = [file for file in query.files if "B10" in {*file.bands, file.name_band}]
    found = named or [f for f in files if f.product_bands and f.count == max(PRODUCT_COUNTS)]
    sensors = {sensor and sensor.name for f in found if (sensor := sensor_named(f.name))}
    if not found or sensors - {"sentinel-2"}:
        return []
    what = "the band B10 (cirrus)" if named else f"{found[0].count} bands"
    detail = (
        f"{counted(len(found), 'file')} ({_quoted([f.name for f in found], 2)}) with {what}, which "
        "Sentinel-2 level 1C has and level 2A lacks: the reflectance seems to be that at the "
        "top of the atmosphere, which is brighter in blue and red than that of the surface, so "
        "that NDVI is lower: give level 2A, unless the model's card names level 1C in its training "
        "data"
    )
    return [StackWarning(code="top_of_atmosphere", detail=detail)]


def _their_sources(files: Sequence[DescribedFile]) -> str:
    """Where files of level 1C state it, for messages."""
    sources = {source for f in files for level, source in f.stated_levels if level == "1C"}
    tags = sorted(source.removeprefix("the tag ") for source in sources - {"the name"})
    words = [f"their tags ({first_names(tags, 2)})"] if tags else []
    return " and ".join([*words, *(["their names"] if "the name" in sources else [])])


def _dates_contradicted(
    query: LayoutQuery, slots: Sequence[BandAssignment]
) -> Iterator[StackWarning]:
    """The warning that the request or the tags date files otherwise than their names do."""
    files = list({id(slot.file): slot.file for slot in slots}.values())
    if query.dates is None:
        if other := days_in_conflict(files):
            yield _tags_contradicted(other, slots, len(files))
        return
    of_file = dict(zip(map(id, files), stated_days(files), strict=True))
    times = Counter(id(slot.file) for slot in slots)
    differing: list[tuple[BandAssignment, date]] = []
    for slot in slots:
        own = {day for n in slot.numbers.values() if (day := slot.file.days[n - 1])}
        day = of_file[id(slot.file)]
        if not own and day and times[id(slot.file)] == 1:
            own = {day}
        if own and slot.day not in own:
            differing.append((slot, min(own)))
    if differing:
        slot, stated = differing[0]
        detail = (
            f"`dates` gives {slot.day} to '{slot.file.name}', which states {stated} itself "
            f"({len(differing)} of {len(slots)} are so): `dates` is used; check that it "
            "is in the order of the files, or leave it out"
        )
        yield StackWarning(code="dates_contradicted", detail=detail)


def _dates_assumed(query: LayoutQuery, slots: Sequence[BandAssignment]) -> Iterator[StackWarning]:
    """Warnings about dates that are assumed: by numbers of bands, or by TIFFTAG_DATETIME."""
    dates = query.dates
    if dates is None:
        yield from _dated_by_writing(slots)
    if dates is None or query.names:
        return
    for file in {id(slot.file): slot.file for slot in slots}.values():
        plain = list(map(band_of, file.header.descriptions))
        moved = in_order_of_counts(file, dates)
        if not file.counts or not (moved or plain != list(map(band_of, file.texts))):
            continue
        order = sorted(file.counts) if moved else file.counts
        day_of = dict(zip(dict.fromkeys(order), dates, strict=False))
        first, last = min(day_of), max(day_of)
        detail = (
            f"the numbers {first} to {last} behind the names of the bands of '{file.name}' "
            f"('{shown(file.header.descriptions[0])}', ...) count the dates"
            f"{', whatever the order of the bands' if moved else ''}: {first} is {day_of[first]}, "
            f"{last} is {day_of[last]}; if they are parts of the names, give `bands`"
        )
        yield StackWarning(code="dates_assumed", detail=detail)
        return


def _dated_by_writing(slots: Sequence[BandAssignment]) -> Iterator[StackWarning]:
    """The warning that only the tag of the TIFF standard dates files.

    Planet and others store the acquisition in it, and most programs the time of writing.
    """
    files = list({id(slot.file): slot.file for slot in slots if slot.day is not None}.values())
    written = [
        file
        for file, stated in zip(files, stated_days(files), strict=True)
        if file.written_day and not stated and not any(file.days)
    ]
    if not written:
        return
    days = sorted(day for file in written if (day := file.written_day))
    detail = (
        f"the dates of {counted(len(written), 'file')} ({_quoted([f.name for f in written], 2)}; "
        f"{days[0]} to {days[-1]}) are those of the tag TIFFTAG_DATETIME, in which many programs "
        "store when they wrote the file: check them, and give `dates` if they are not those of the "
        "acquisition"
    )
    yield StackWarning(code="dates_assumed", detail=detail)


_DIGITS = re.compile(r"(\d+)")
_COUNT_DIGITS = 3


def _out_of_order(query: LayoutQuery, slots: Sequence[BandAssignment]) -> Iterator[StackWarning]:
    """The warning that `dates` follows the order of the files, but not that of their numbers.

    Shells and programs sort names as texts: x_1, x_10, x_2.
    """
    times = Counter(id(slot.file) for slot in slots)
    by_bands: dict[tuple[str, ...], list[BandAssignment]] = defaultdict(list)
    for slot in slots:
        if times[id(slot.file)] == 1:
            by_bands[tuple(slot.numbers)].append(slot)
    for own in by_bands.values() if query.dates else ():
        parts = [_DIGITS.split(slot.file.name) for slot in own]
        if len({tuple(part[::2]) for part in parts}) > 1 or any(
            stated_days([slot.file for slot in own])
        ):
            continue
        varying = [k for k in range(1, len(parts[0]), 2) if len({part[k] for part in parts}) > 1]
        if len(varying) != 1 or any(len(part[varying[0]]) > _COUNT_DIGITS for part in parts):
            continue
        numbered = sorted(
            (int(part[varying[0]]), slot.day or date.min, slot.file.name)
            for part, slot in zip(parts, own, strict=True)
        )
        later = next((pair for pair in pairwise(numbered) if pair[1][1] < pair[0][1]), None)
        if later:
            (_, before, first), (_, after, second) = later
            detail = (
                f"`dates` gives {before} to '{first}' and {after} to '{second}': it counts in the "
                f"order in which the {len(own)} files were sent, which is not that of their "
                "numbers; check it, or send the files in the order of their numbers"
            )
            yield StackWarning(code="dates_contradicted", detail=detail)
            return


def _tags_contradicted(
    other: Sequence[tuple[DescribedFile, date, date]], slots: Sequence[BandAssignment], count: int
) -> StackWarning:
    """The warning that the tags of files state other dates than their names."""
    file, tagged, named = other[0]
    used = next((slot.day for slot in slots if slot.file is file), None)
    detail = (
        f"'{file.name}' has the date {named} in its name and {tagged} in its tags or bands "
        f"({len(other)} of {counted(count, 'file')} are so): {used} is used; give `dates` to decide"
    )
    return StackWarning(code="dates_contradicted", detail=detail)


def _bands_contradicted(query: LayoutQuery) -> Iterator[StackWarning]:
    """The warning that the request names bands otherwise than the files do themselves."""
    names, files = query.names or (), query.named
    if query.names is None:
        yield from _names_contradicted(query)
        return
    if len(files) == len(names) and all(file.count == 1 for file in files):
        pairs = [(file, 1, name, file.own_band) for file, name in zip(files, names, strict=True)]
    else:
        pairs = [
            (file, k, name, own)
            for file in files
            if file.count == len(names)
            for k, (name, own) in enumerate(zip(names, file.bands, strict=True), start=1)
        ]
    other = [(file, k, name, own) for file, k, name, own in pairs if own and own != name]
    other = [one for one in other if not {one[2], one[3]} <= QUALITY | {ALPHA}]
    if other:
        file, k, name, own = other[0]
        detail = (
            f"`bands` names band {k} of '{file.name}' {name}, and the file itself {own} "
            f"({len(other)} of {counted(len(pairs), 'band')} are so): `bands` is used; "
            "check its order, or leave it out"
        )
        yield StackWarning(code="bands_contradicted", detail=detail)


def _names_contradicted(query: LayoutQuery) -> Iterator[StackWarning]:
    """The warning that names of files of one band contradict their descriptions or tags."""
    single = [file for file in query.files if file.count == 1 and file.bands[0]]
    single = [file for file in single if ITEM_BAND not in file.header.band_tags[0]]
    other = []
    for file in single:
        own = band_of(stem(file.name))
        if own and file.bands[0] and not are_near(own, file.bands[0]):
            found = sensor_of(file.header)
            if found is None or found[0].bands is None:  # else by the sensor's numbers
                other.append((file, own))
    if other:
        file, own = other[0]
        detail = (
            f"'{file.name}' is {own} by its name and {file.bands[0]} by its description or tags "
            f"({len(other)} of {counted(len(single), 'file')} are so): {file.bands[0]} is used; "
            "give `bands` to decide, one name per file"
        )
        yield StackWarning(code="bands_contradicted", detail=detail)


def _assumed_order(layout: Layout, query: LayoutQuery, used: set[int]) -> list[StackWarning]:
    """The warning that files without band names were read in the order of Sentinel-2 products."""
    if query.names or layout not in {"file-per-date", "single-file"}:
        return []
    unnamed = [
        file
        for file in query.files
        if id(file.header) in used and file.count > 1 and not any(file.bands)
    ]
    if not unnamed:
        return []
    order = unnamed[0].product_bands or PRODUCT_BANDS
    listed = listed_bands(unnamed[0].name, unnamed[0].count)
    whose = "as the files' names list them" if listed else "in the order of a Sentinel-2 product"
    read = [band if band in order else TWINS.get(band, band) for band in query.needed]
    needed = ", ".join(f"{band} is band {order.index(band) + 1}" for band in read if band in order)
    detail = (
        f"no band of {counted(len(unnamed), 'file')} ({_quoted([f.name for f in unnamed])}) has a "
        f"name other than its position; they are read {whose}, so that {needed}; if this order is "
        "wrong, give `bands`"
    )
    return [StackWarning(code="bands_assumed", detail=detail)]


def _unused(
    query: LayoutQuery, used: set[int], layout: Layout, options: StackOptions
) -> list[StackWarning]:
    """The warning that files are not used, by reason."""
    reasons: dict[str, list[str]] = defaultdict(list)
    given = _given_names(query, layout)
    for file in query.files:
        if id(file.header) not in used:
            reason = _reason(file, query, given.get(id(file), ()), options.mask)
            reasons[reason].append(file.name)
    for name, reason in options.left_out:
        reasons[reason].append(name)
    if not reasons:
        return []
    total = sum(map(len, reasons.values()))
    every = [file.name for file in query.files] + [name for name, _ in options.left_out]
    short = {name: name.rpartition("/")[2] for name in every}
    if len(set(short.values())) < len(every):  # B04.tif of many folders
        short = {name: name for name in every}
    most = total if total <= _UNUSED_IN_FULL else _NAMED_AT_MOST
    # The rarest reason is the least expected.
    each = "; ".join(
        f"{_quoted([short[name] for name in names], most)}: {reason}"
        for reason, names in sorted(reasons.items(), key=lambda item: len(item[1]))
    )
    sent = len(query.files) + len(options.left_out)
    detail = f"{total} of {counted(sent, 'file')} not used: {each}"
    return [StackWarning(code="files_unused", detail=detail)]


def _given_names(query: LayoutQuery, layout: Layout) -> dict[int, tuple[str, ...]]:
    """The bands that the caller named, by the id of their file."""
    names = query.names or ()
    if layout.startswith("file-per-band"):
        pairs = zip(query.one_band_each, names, strict=False)
        return {id(file): (name,) for file, name in pairs}
    return {id(file): names for file in query.named}


def _reason(file: DescribedFile, query: LayoutQuery, given: Sequence[str], mask: str | None) -> str:
    bands = [*given] or [band for band in file.bands if band and band != ALPHA]
    if not bands and file.name_band and query.is_left_out(file):
        return f"its {counted(file.count, 'band')} have neither a name nor a date"
    if not bands and file.name_band:
        bands = [file.name_band]
    bands = list(dict.fromkeys(bands))
    if not bands:
        return "names no known band"
    if set(bands) <= QUALITY:
        what = f"cloud mask {', '.join(bands)}"
        if mask == "none":
            return f"{what}, and mask=none"
        return f"{what}, and another mask is used, or no band has its date"
    if set(bands) & set(query.optional):
        return f"{', '.join(bands)}, and not every date has them"
    if not set(bands) & set(query.needed):
        return f"the model does not take {', '.join(bands)}"
    return f"{', '.join(bands)}, and other files have them"


def _missing_mask(
    granules: Sequence[Granule], rules: tuple[MaskRule, ...] | None
) -> list[StackWarning]:
    """The warning that there is no cloud mask without `mask=none`, or that one is always empty."""
    clouds = [[r for r in granule.masks if r is not ALPHA_RULE] for granule in granules]
    if rules is None and not any(clouds):
        detail = (
            "no file holds a cloud mask, so every value that is not missing counts as clear; add "
            f"SCL or another mask, give mask=cloud to estimate one from at least {MIN_DATES} "
            "dates, or give mask=none to state that the pixels are free of clouds"
        )
        return [StackWarning(code="no_cloud_mask", detail=detail)]
    return [*_empty_mask(granules, clouds), *_assumed_mask(clouds)]


def _empty_mask(
    granules: Sequence[Granule], clouds: Sequence[Sequence[MaskRule]]
) -> list[StackWarning]:
    """The warning that the provider left the only mask of some dates empty."""
    empty = [
        (granule.key, own[0])
        for granule, own in zip(granules, clouds, strict=True)
        if own and all(_is_empty(rule, granule) for rule in own)
    ]
    if not empty:
        return []
    rule = empty[0][1]
    first, last = QA60_EMPTY if rule.band == QA60 else CLASSI_EMPTY
    when = f"from {first} to {last}" if first != date.min else f"up to {last}"
    detail = (
        f"{rule.band} holds no clouds {when}, even if there were clouds: "
        f"{len({key for key, _ in empty})} of the dates have no cloud mask; add SCL or MSK_CLDPRB, "
        f"or give mask={rule.name},cloud"
    )
    return [StackWarning(code="no_cloud_mask", detail=detail)]


def _is_empty(rule: MaskRule, granule: Granule) -> bool:
    header, number = granule.planes[rule.band]
    return rule.is_empty(granule.key, header.name, header.descriptions[number - 1])


def _assumed_mask(clouds: Sequence[Sequence[MaskRule]]) -> list[StackWarning]:
    """The warning about masks whose numbers no provider defines."""
    names = dict.fromkeys(r.name for own in clouds for r in own if r.name in ASSUMED)
    if not names:
        return []
    read = "; ".join(f"in {name} {ASSUMED[name]}" for name in names)
    detail = f"no provider defines the numbers of this mask: {read}; if this is wrong, give `mask`"
    return [StackWarning(code="mask_assumed", detail=detail)]


def _guess(query: LayoutQuery) -> Layout:
    if query.names:
        return _guess_named(query, query.names)
    votes = [(file.name, vote) for file in query.files if (vote := _vote(file))]
    if len({vote for _, vote in votes}) > 1:
        (one, first), *rest = votes
        other, second = next(item for item in rest if item[1] != first)
        raise InvalidRequest.of(
            "layout", f"'{one}' looks like {first} but '{other}' like {second}: give `layout`"
        )
    if votes:
        return votes[0][1]
    if {file.name_band for file in query.files}.issuperset(query.needed):
        return "file-per-band"
    if any(file.product_bands for file in query.files):
        return "file-per-date"
    counts = {file.count for file in query.files}
    dates = len(query.dates or ())
    if dates > 1 and any(count in {n * dates for n in PRODUCT_COUNTS} for count in counts):
        return "single-file"
    named = any(file.name_band or any(file.bands) for file in query.files)
    return "file-per-band" if named else "file-per-date"


def _vote(file: DescribedFile) -> Layout | None:
    """The layout that a file's band descriptions imply; None if they fit none or several."""
    times = Counter(band for band in file.bands if band and band != ALPHA)
    if not times or file.count == 1:
        return None  # a file with one band fits two layouts: file-per-band, and a part of a date
    if len(times) == 1 and times.total() == file.count:
        return "file-per-band"
    return "single-file" if max(times.values()) > 1 else "file-per-date"


def _guess_named(query: LayoutQuery, names: tuple[str, ...]) -> Layout:
    """The layout if the caller gave the band names: by their number, then by descriptions."""
    n = len(names)
    files = query.named
    if len(files) == n > 1 and all(file.count == 1 for file in files):
        return "file-per-band"
    if len(set(names)) < n:
        return "single-file"
    other = next((file for file in files if not _has_bands(file, n)), None)
    if files and other is None:
        by_name = len(files) == n > 1 and (
            all(_vote(file) == "file-per-band" for file in files)
            or all(file.name_band for file in files)
            or all(len(set(file.days)) == n for file in files)
        )
        return "file-per-band" if by_name else "file-per-date"
    if len(files) == n:
        return "file-per-band"
    if len(files) == 1 and other is not None and other.count % n == 0:
        return "single-file"
    raise InvalidRequest.of("bands", names_and_bands(n, other or query.files[0]))


def _has_bands(file: DescribedFile, n: int) -> bool:
    """Whether a file has n bands, not counting alpha."""
    alpha = file.bands[-1] == ALPHA or file.header.alpha == file.count
    return file.count == n or (alpha and file.count == n + 1)


def _check_found(
    query: LayoutQuery, slots: Sequence[BandAssignment], for_clouds: Sequence[str]
) -> None:
    """Check that some file has each needed band, also those of the cloud mask.

    Raises:
        MissingBands: no file has one of the bands.
    """
    present = {band for slot in slots for band in slot.numbers}
    missing = [band for band in query.needed if band not in present]
    if not missing:
        return
    known = {band for file in query.files for band in (*file.bands, file.name_band) if band}
    known |= present | set(query.names or ())
    nameless = [
        text
        for file in query.files
        for band, text in zip(file.bands, file.header.descriptions, strict=True)
        if not query.names and not (band or file.name_band)
    ]
    unnamed = len(nameless)
    texts = [f"'{shown(text)}'" for text in dict.fromkeys(nameless) if text not in (None, NO_BAND)]
    found = ", ".join(sorted(known)) or "no band that is named"
    also = f" and {counted(unnamed, 'band')} without a name that is understood" if unnamed else ""
    also += _why_not_named(query) or (f" ({first_names(texts, 3)})" if texts else "")
    if set(missing) <= set(for_clouds):
        raise MissingBands(
            f"mask=cloud needs {', '.join(CLOUD_BANDS)}, and {', '.join(missing)} not found: "
            f"{counted(len(query.files), 'file')} ('{query.files[0].name}', ...) with {found}"
            f"{also}; add the band, or give another mask or mask=none"
        )
    raise MissingBands(
        f"{', '.join(missing)} not found: {counted(len(query.files), 'file')} "
        f"('{query.files[0].name}', ...) with {found}{also}; "
        "name each band in its description, or give `bands`"
    )


def _why_not_named(query: LayoutQuery) -> str:
    """Text about the first name that resembles a band's but is not read as one."""
    for file in query.files:
        if file.only_positions:
            return f" ('{shown(file.header.descriptions[0])}' only states the band's position)"
        if file.counted:
            return f" ('{shown(stem(file.name))}' only states the band's position in a stack)"
        for text in (*file.header.descriptions, stem(file.name)):
            if why := why_no_band(text):
                return f" ('{shown(text)}': {why})"
    return ""


def _granules(slots: Sequence[BandAssignment], *, dated: bool) -> tuple[Granule, ...]:
    undated = [slot for slot in slots if slot.day is None]
    if undated and dated:
        raise _missing_dates(undated, slots)
    by_key: dict[date | int, list[BandAssignment]] = defaultdict(list)
    for slot in slots:
        by_key[slot.turn if undated or slot.day is None else slot.day].append(slot)
    return tuple(
        Granule(key=key, planes=planes)
        for key, own in sorted(by_key.items(), key=lambda item: _ordinal(item[0]))
        for planes in _planes_by_granule(own)
    )


_Planes = dict[str, tuple[Header, int]]
"""Band name to the file and the number of the band in it, from 1."""


def _planes_by_granule(slots: Sequence[BandAssignment]) -> list[_Planes]:
    """The planes of each granule of one date: files without a common band form one granule.

    If a band occurs several times, the files of one granule are those whose names agree in the
    words that distinguish granules: tile, number, satellite or time. Without such words, a file is
    added to the first granule that has none of its bands.
    """
    times = Counter(band for slot in slots for band in _own(slot))
    several = [band for band, n in times.items() if n > 1 and band not in QUALITY | {ALPHA}]
    by_granule: dict[frozenset[str], list[BandAssignment]] = defaultdict(list)
    if several and all(len(_own(slot)) < len(times) for slot in slots):
        distinguishing = _distinguishing_words(slots, several)
        for slot in slots:
            by_granule[_name_words(slot) & distinguishing].append(slot)
        granules = [planes for own in by_granule.values() for planes in _merged(own)]
        most = max(times[band] for band in several)
        if len(granules) == len(by_granule) == most:
            return granules
    return _merged(slots)


def _merged(slots: Sequence[BandAssignment]) -> list[_Planes]:
    """The planes of each granule if every slot belongs to the first granule without its bands."""
    granules: list[_Planes] = []
    for slot in slots:
        granule = next((one for one in granules if not one.keys() & _own(slot)), None)
        if granule is None:
            granule = {}
            granules.append(granule)
        for band, number in slot.numbers.items():
            granule.setdefault(band, (slot.file.header, number))
    # MAJA has a mask at 10 m and one at 20 m: the second mask alone is not a granule.
    return [granule for granule in granules if granule.keys() - QUALITY - {ALPHA}] or granules


def _own(slot: BandAssignment) -> set[str]:
    """The bands of which a granule has one; a granule may have several files with one mask."""
    return slot.numbers.keys() - QUALITY - {ALPHA} or set(slot.numbers)


def _distinguishing_words(slots: Sequence[BandAssignment], bands: Sequence[str]) -> frozenset[str]:
    """Words in the names of some files of a band that other files of this band do not have."""
    found: set[str] = set()
    for band in bands:
        words = [_name_words(slot) for slot in slots if band in slot.numbers]
        found |= frozenset.union(*words) - frozenset.intersection(*words)
    return frozenset(found)


def _name_words(slot: BandAssignment) -> frozenset[str]:
    name = slot.file.name.rpartition("/")[0] + "/" + stem(slot.file.name)
    return frozenset(re.split(r"[^0-9a-z]+", name.lower()))


def _ordinal(key: date | int) -> int:
    return key if isinstance(key, int) else key.toordinal()


def _missing_dates(
    undated: Sequence[BandAssignment], slots: Sequence[BandAssignment]
) -> MissingDates:
    names = list({id(slot.file): slot.file.name for slot in undated}.values())
    all_files = len({id(slot.file) for slot in slots})
    if all_files == 1 and len(slots) > 1:
        return MissingDates(
            f"no date for the {len(undated)} dates that {_quoted(names)} holds: none in the band "
            f"descriptions or tags{_counts(undated[0].file)}{_unclear(undated)}; give `dates`, "
            f"{len(undated)} of them in the order of the bands"
        )
    bands = {slot.file.count for slot in undated}
    if min(bands) > 1 and len(undated) > all_files:
        n = f"{bands.pop()} " if len(bands) == 1 else ""
        return MissingDates(
            f"no date for the {n}bands of each of {counted(len(names), 'file')} "
            f"({_quoted(names)}): none in the band descriptions or tags{_unclear(undated)}; give "
            f"`dates`, one for each of the {n}bands in their order"
        )
    return MissingDates(
        f"no date for {len(names)} of {counted(all_files, 'file')} ({_quoted(names)}): none in "
        f"the tags, the names, the folders or the band descriptions{_written(undated)}"
        f"{_unclear(undated)}; give `dates`, one for each of the {counted(all_files, 'file')} in "
        "their order, such as dates=2018-01-05,2018-01-15"
    )


def _counts(file: DescribedFile) -> str:
    """Text about numbers that count the dates of a file's bands."""
    if not file.counts:
        return ""
    return f" (the numbers {min(file.counts)} to {max(file.counts)} in the names count the dates)"


def _written(undated: Sequence[BandAssignment]) -> str:
    """Text about the writing tag of undated files, if all of them have the same day in it."""
    days = {slot.file.written_day for slot in undated}
    day = days.pop() if len(days) == 1 else None
    return (
        f" (TIFFTAG_DATETIME is {day} in all of them, which is when they were written)"
        if day
        else ""
    )


def _unclear(undated: Sequence[BandAssignment]) -> str:
    """What the first undated file with an unusable date has instead of one, as a phrase."""
    texts = (
        text
        for slot in undated
        for text in (slot.file.tag_text, slot.file.name, *slot.file.header.descriptions)
        if text
    )
    found = next((why for text in texts if (why := unclear_date(text))), None)
    return f" ({found})" if found else ""


def _quoted(names: Sequence[str], most: int = _NAMED_AT_MOST) -> str:
    return first_names([f"'{name}'" for name in names], most)


def _check_complete(granules: Sequence[Granule], needed: Sequence[str]) -> None:
    """Check that every granule has every needed band.

    Raises:
        MissingBands: a granule lacks a band.
    """
    for granule in granules:
        missing = [band for band in needed if band not in granule.planes]
        if missing:
            names = list(dict.fromkeys(header.name for header, _ in granule.planes.values()))
            when = f"observation {granule.key + 1}" if isinstance(granule.key, int) else granule.key
            raise MissingBands(
                f"{when} has no {', '.join(missing)}, only {', '.join(sorted(granule.planes))} "
                f"({_quoted(names)}): add the band, or leave out the files of that date"
            )


def _masked(
    granules: Sequence[Granule], rules: tuple[MaskRule, ...] | None, bands: Sequence[str]
) -> tuple[Granule, ...]:
    """The granules with their cloud masks; every granule has a mask, or none has.

    Raises:
        MaskNotInAllFiles: only some granules have the mask.
    """
    found = [
        _automatic(granule)
        if rules is None
        else tuple(rule for rule in rules if rule.band in granule.planes)
        for granule in granules
    ]
    expected = 1 if rules is None else len(rules)
    complete = [len(own) == expected for own in found]
    if not all(complete) and (rules or any(complete)):
        at = complete.index(False)
        header, _ = next(iter(granules[at].planes.values()))
        needed = rules or next(own for own in found if own)
        lacking = " and ".join(rule.band for rule in needed if rule not in found[at])
        error = MaskNotInAllFiles.of(
            "mask",
            f"{sum(complete)} of {counted(len(granules), 'observation')} have the band {lacking}, "
            f"and '{header.name}' does not: add the band, or give mask=cloud to estimate a mask "
            "from the series, or mask=none",
        )
        planes = [granule.planes[band] for granule in granules for band in bands]
        error.files = tuple({id(header): header for header, _ in planes}.values())
        raise error
    return tuple(
        replace(
            granule,
            masks=(
                *(part for rule in own for part in rule.parts if part.band in granule.planes),
                *([ALPHA_RULE] if ALPHA in granule.planes else []),
            ),
        )
        for granule, own in zip(granules, found, strict=True)
    )


def _automatic(granule: Granule) -> tuple[MaskRule, ...]:
    """The most complete mask of a granule that its provider did not leave empty."""
    there = [rule for rule in AUTO if rule.band in granule.planes]
    filled = [rule for rule in there if not _is_empty(rule, granule)]
    return tuple((filled or there)[:1])

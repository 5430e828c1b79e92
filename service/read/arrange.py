"""Arrangement: which layout the files have, and their granules by date."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date

from service.errors import InvalidRequest, MissingBands, MissingDates
from service.read.geotiff import Header
from service.read.layouts import (
    BandAssignment,
    DescribedFile,
    Layout,
    LayoutQuery,
    MaskRule,
    StackOptions,
    counted,
    file_per_band,
    file_per_date,
    names_and_bands,
    single_file,
)
from service.read.metadata import PRODUCT_COUNTS, SCL, band_of

_NAMED_AT_MOST = 5


@dataclass(frozen=True, kw_only=True)
class Granule:
    """One look at the ground: every band of one date, from one file or several."""

    key: date | int
    """The date; a running number for undated imagery."""
    planes: Mapping[str, tuple[Header, int]]
    """Band name to the file and the number of the band in it, from 1."""


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """The files, understood."""

    layout: Layout
    granules: tuple[Granule, ...]
    """In the order of their keys; granules of one key in the order of the files given."""
    used: tuple[Header, ...]
    """Files that hold a band that is needed, in the order given."""
    masked: bool
    """Whether every granule has the scene classification, and it is to be used."""


_READERS: Mapping[Layout, Callable[[LayoutQuery], list[BandAssignment]]] = {
    "file-per-date": file_per_date,
    "file-per-band": file_per_band,
    "single-file": single_file,
}


def arrange(
    headers: Sequence[Header], options: StackOptions, *, bands: Sequence[str], dated: bool
) -> Arrangement:
    """Work out what the files hold.

    Args:
        headers: of all files, in the order given.
        options: what the caller said.
        bands: the bands needed, by canonical name.
        dated: whether every observation needs a date.

    Raises:
        InvalidRequest: the options and the files contradict each other.
        MissingBands: a band needed is not there, or not at every date.
        MissingDates: a file or band has no date, or there are fewer dates than files.
    """
    query = LayoutQuery(
        files=tuple(DescribedFile(header) for header in headers),
        dates=options.dates,
        names=options.bands and tuple(band_of(name) or name.upper() for name in options.bands),
        needed=tuple(bands),
        wanted=frozenset(bands) | ({SCL} if options.mask != "none" else set()),
    )
    layout = options.layout or _guess(query)
    slots = [slot for slot in _READERS[layout](query) if slot.numbers]
    _check_found(query, slots)
    granules = _granules(slots, dated=dated)
    _check_complete(granules, query.needed)
    used = {id(slot.file): slot.file.header for slot in slots}
    return Arrangement(
        layout=layout,
        granules=granules,
        used=tuple(used.values()),
        masked=_masked(granules, options.mask),
    )


def _guess(query: LayoutQuery) -> Layout:
    if query.names:
        return _guess_named(query, query.names)
    votes = {file.name: vote for file in query.files if (vote := _vote(file))}
    if len(set(votes.values())) > 1:
        (one, first), *rest = votes.items()
        other, second = next(item for item in rest if item[1] != first)
        raise InvalidRequest.of(
            "layout", f"'{one}' reads as {first} but '{other}' as {second}; say which it is"
        )
    if votes:
        return next(iter(votes.values()))
    if {file.name_band for file in query.files}.issuperset(query.needed):
        return "file-per-band"
    counts = {file.count for file in query.files}
    if counts & PRODUCT_COUNTS:
        return "file-per-date"
    dates = len(query.dates or ())
    if dates > 1 and any(count in {n * dates for n in PRODUCT_COUNTS} for count in counts):
        return "single-file"
    named = any(file.name_band or any(file.bands) for file in query.files)
    return "file-per-band" if named else "file-per-date"


def _vote(file: DescribedFile) -> Layout | None:
    """What the band descriptions say; None where they are silent or fit more than one layout."""
    times = Counter(band for band in file.bands if band)
    if not times or file.count == 1:
        return None  # one band fits as a band of its own and as a part of a date
    if len(times) == 1 and times.total() == file.count:
        return "file-per-band"
    return "single-file" if max(times.values()) > 1 else "file-per-date"


def _guess_named(query: LayoutQuery, names: tuple[str, ...]) -> Layout:
    """The layout where the caller gave the band names: numbers decide, then descriptions."""
    files, n = query.files, len(names)
    if len(set(names)) < n:
        return "single-file"
    other = next((file for file in files if file.count != n), None)
    if other is None:
        by_name = len(files) == n > 1 and (
            all(_vote(file) == "file-per-band" for file in files)
            or all(file.name_band for file in files)
            or all(len(set(file.days)) == n for file in files)
        )
        return "file-per-band" if by_name else "file-per-date"
    if len(files) == n:
        return "file-per-band"
    if len(files) == 1 and other.count % n == 0:
        return "single-file"
    raise InvalidRequest.of("bands", names_and_bands(n, other))


def _check_found(query: LayoutQuery, slots: Sequence[BandAssignment]) -> None:
    """Every needed band is somewhere."""
    there = {band for slot in slots for band in slot.numbers}
    missing = [band for band in query.needed if band not in there]
    if not missing:
        return
    known = {band for file in query.files for band in (*file.bands, file.name_band) if band}
    known |= there | set(query.names or ())
    unnamed = sum(
        not query.names and not (band or file.name_band)
        for file in query.files
        for band in file.bands
    )
    found = ", ".join(sorted(known)) or "no band that is named"
    also = f" and {counted(unnamed, 'band')} without a name that is understood" if unnamed else ""
    raise MissingBands(
        f"{', '.join(missing)} not found: {counted(len(query.files), 'file')} "
        f"('{query.files[0].name}', ...) with {found}{also}; "
        "describe the bands or give `bands`"
    )


def _granules(slots: Sequence[BandAssignment], *, dated: bool) -> tuple[Granule, ...]:
    undated = [slot for slot in slots if slot.day is None]
    if undated and dated:
        raise _missing_dates(undated, slots)
    by_key: dict[date | int, list[dict[str, tuple[Header, int]]]] = defaultdict(list)
    for slot in slots:
        key = slot.turn if undated or slot.day is None else slot.day
        acquisitions = by_key[key]
        # A file adds to the first look that has none of its bands: bands kept in files of their
        # own come together, and a second granule of the same date stays a look of its own.
        acquisition = next(
            (
                acquisition
                for acquisition in acquisitions
                if not acquisition.keys() & slot.numbers.keys()
            ),
            None,
        )
        if acquisition is None:
            acquisition = {}
            acquisitions.append(acquisition)
        acquisition.update(
            {band: (slot.file.header, number) for band, number in slot.numbers.items()}
        )
    ordered = sorted(by_key.items(), key=lambda item: _ordinal(item[0]))
    return tuple(
        Granule(key=key, planes=acquisition)
        for key, acquisitions in ordered
        for acquisition in acquisitions
    )


def _ordinal(key: date | int) -> int:
    return key if isinstance(key, int) else key.toordinal()


def _missing_dates(
    undated: Sequence[BandAssignment], slots: Sequence[BandAssignment]
) -> MissingDates:
    names = list(dict.fromkeys(slot.file.name for slot in undated))
    all_files = len({slot.file.name for slot in slots})
    return MissingDates(
        f"no date for {len(names)} of {counted(all_files, 'file')} ({_quoted(names)}): none in "
        "the tags, the file's name or the band descriptions; give `dates`"
    )


def _quoted(names: Sequence[str]) -> str:
    more = len(names) - _NAMED_AT_MOST
    shown = ", ".join(f"'{name}'" for name in names[:_NAMED_AT_MOST])
    return f"{shown} and {more} more" if more > 0 else shown


def _check_complete(granules: Sequence[Granule], needed: Sequence[str]) -> None:
    """Every granule has every needed band."""
    for granule in granules:
        missing = [band for band in needed if band not in granule.planes]
        if missing:
            names = list(dict.fromkeys(header.name for header, _ in granule.planes.values()))
            when = f"observation {granule.key + 1}" if isinstance(granule.key, int) else granule.key
            raise MissingBands(
                f"{when} has no {', '.join(missing)}, only {', '.join(sorted(granule.planes))} "
                f"({_quoted(names)})"
            )


def _masked(granules: Sequence[Granule], mask: MaskRule | None) -> bool:
    """Whether the scene classification is used: where it is there, for all or for none."""
    with_it = sum(SCL in granule.planes for granule in granules)
    if mask == "none" or (with_it == 0 and mask is None):
        return False
    if with_it == len(granules):
        return True
    without = next(granule for granule in granules if SCL not in granule.planes)
    header, _ = next(iter(without.planes.values()))
    raise InvalidRequest.of(
        "mask",
        f"the SCL band is there for {with_it} of {counted(len(granules), 'observation')}, not in "
        f"'{header.name}'; add it or say mask=none",
    )

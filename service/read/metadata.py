"""Metadata in files beside rasters: products of Sentinel-2, STAC items, requests, lists of dates.

    files → rasters, their metadata, files that are not used → completed headers

The XML of a Sentinel-2 product (MTD_MSIL2A.xml) states scale, offset and date of its bands; a STAC
item and the request.json of sentinelhub-py state them for the rasters in their folder.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from service.errors import InvalidRequest, StackWarning, first_names
from service.read.band_names import band_of, quality_of, stem
from service.read.dates import date_of, tagged_date
from service.read.geotiff import Georeference, Header, SourceFile, side_file
from service.read.sensors import ITEM_BAND
from service.read.stac import (
    AssetBand,
    asset_bands,
    band_numbers,
    contradiction,
    georeference_of_asset,
    item_tags,
    of_sentinel_2,
    with_definitions,
)

PRODUCT_FILE = re.compile(r"(^|/)(MTD_MSIL(1C|2A)|S2[A-D]_[A-Z]{4}_MTD_[A-Z0-9]+_.*)\.xml$")
"""Names of a Sentinel-2 product's XML."""
_MOST_COLLECTIONS = 8
_MOST_ITEMS = 2_000
MAX_METADATA_BYTES = 4 * 2**20
"""Largest size of a metadata file that is read, bytes."""
# Sentinel-2's number of each band in its XML.
_BAND_IDS = (
    "B01",
    "B02",
    "B03",
    "B04",
    "B05",
    "B06",
    "B07",
    "B08",
    "B8A",
    "B09",
    "B10",
    "B11",
    "B12",
)
_QUANTIFICATION = re.compile(r"<(?:L2A_)?(?:BOA_)?QUANTIFICATION_VALUE[^>]*>\s*([0-9.]{1,12})\s*<")
_OFFSET = re.compile(
    r"""<(?:BOA|RADIO)_ADD_OFFSET\s+band_id\s*=\s*["'](\d{1,2})["']\s*>\s*(-?[0-9.]{1,12})\s*<"""
)
_BASELINE = re.compile(r"<PROCESSING_BASELINE>\s*([0-9.]{1,8})\s*<")
_LEVEL = re.compile(r"<PROCESSING_LEVEL>\s*(Level-[0-9A-Za-z]{2,3})\s*<")
_SENSED = re.compile(r"<(?:DATATAKE_SENSING_START|PRODUCT_START_TIME)>\s*([0-9T:.Z-]{10,30})\s*<")


@dataclass(frozen=True, kw_only=True)
class Product:
    """Metadata of a Sentinel-2 product from its XML: scale, offsets and date."""

    root: str
    """The folder of the product, in the names of its files; empty for files without folders."""
    scale: float
    offsets: Mapping[str, float]
    """Reflectance to add by band, 0 before processing baseline 04.00."""
    baseline: str | None
    sensed: str | None
    level: str | None = None
    """Such as `Level-1C`."""

    def tags(self, name: str) -> dict[str, str]:
        """The metadata in the form of tags of one of the product's files."""
        sensed = {"datatake_1_datatake_sensing_start": self.sensed} if self.sensed else {}
        band = band_of(stem(name))
        if band not in _BAND_IDS:  # a mask
            return sensed
        tags = {"scale": f"{self.scale:g}", "offset": f"{self.offsets.get(band, 0.0):g}", **sensed}
        if self.baseline:
            tags["processing_baseline"] = self.baseline
        if self.level:
            tags["processing_level"] = self.level
        return tags


@dataclass(frozen=True, kw_only=True)
class Sorted:
    """The files of a request by what they are for."""

    rasters: tuple[SourceFile, ...]
    """Files that are read as rasters, or rejected."""
    metadata: tuple[Metadata, ...]
    """Metadata of the rasters."""
    lists: tuple[DateList, ...]
    """Lists of dates, in the order of a raster's bands."""
    left_out: tuple[tuple[str, str], ...]
    """Files beside the rasters that are not used, each with the reason."""


def sort_files(files: Sequence[SourceFile]) -> Sorted:
    """Sort files into rasters, their metadata, and files beside rasters that are not used.

    Files that usually lie beside rasters are left out only if there is a raster: alone, they are
    rejected as rasters, with a message about what they are.

    Args:
        files: the files of a request, after its zips were unpacked.
    """
    rasters: list[SourceFile] = []
    metadata: list[Metadata] = []
    lists: list[DateList] = []
    described: list[tuple[str, str]] = []
    beside: list[tuple[SourceFile, str]] = []
    collections = _collections(files)
    for file in files:
        if PRODUCT_FILE.search(file.name):
            metadata.append(_product(file))
            continue
        document = _document(file) if is_json(file.name) else {}
        if isinstance(own := document.get("collection"), str) and own in collections:
            document = dict(with_definitions(document, collections[own]))
        if items := _items(document, file.name):
            metadata += items
        elif _requested_day(document) == "":
            described.append((file.name, "a request for several days, which dates no single file"))
        elif dates := _date_list(document, file.name):
            lists.append(dates)
        elif _is_of_a_collection(document):
            reason = "a STAC Collection or Catalog, of which `item_assets` alone describe files"
            described.append((file.name, reason))
        elif (unused := side_file(file)) is not None:
            beside.append((file, unused))
        else:
            rasters.append(file)
    if not (rasters or metadata or described):
        rasters, beside = [file for file, _ in beside], []
    return Sorted(
        rasters=tuple(rasters),
        metadata=tuple(metadata),
        lists=tuple(lists),
        left_out=(*described, *((file.name, reason) for file, reason in beside)),
    )


@dataclass(frozen=True, kw_only=True)
class Described:
    """Metadata of one raster in a STAC item."""

    bands: tuple[AssetBand, ...]
    georeference: Georeference | None
    """CRS and transform; None if they are not stated."""
    ignored_offset: str | None
    """The reason why a stated offset is not applied; None if it is applied, or none is stated."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """Metadata of the rasters in a folder, from a STAC item or a request of sentinelhub-py."""

    root: str
    common: Mapping[str, str]
    """Tags of every raster in the folder."""
    assets: Mapping[str, Described]
    """Metadata of single rasters, by the last part of the raster's name."""
    paths: Mapping[str, str] = field(default_factory=dict)
    """Where the item's links lead to, by the last part, with the folders before it."""

    def tags(self, name: str) -> dict[str, str]:
        """The metadata in the form of tags of one of the rasters."""
        described = self.assets.get(name.rpartition("/")[2])
        if described is None or len(described.bands) != 1:
            return dict(self.common)
        return {**self.common, **_band_tags(described, described.bands[0])}


Metadata = Product | Item


@dataclass(frozen=True, kw_only=True)
class DateList:
    """Dates in a JSON file beside rasters whose bands are dates, as of Sentinel Hub's batch API."""

    name: str
    """Name of the JSON file."""
    key: str
    """Name of the list in it."""
    times: tuple[str, ...]
    """ISO dates in band order."""
    scale: float | None
    """`norm_factor`: the reflectance of 1; None if it is not stated."""

    @property
    def root(self) -> str:
        """The folder of the rasters."""
        return self.name.rpartition("/")[0]

    def fits(self, header: Header) -> bool:
        """Whether a raster has one band per date, and dates none of them itself."""
        return (
            header.name.rpartition("/")[0] == self.root
            and header.count == len(self.times)
            and not any(map(date_of, header.descriptions))
            and not any(tagged_date(tags, header.tags) for tags in header.band_tags)
        )


def _band_tags(described: Described, band: AssetBand) -> dict[str, str]:
    return {
        key: value
        for key, value in band.tags.items()
        if key != "offset" or described.ignored_offset is None
    }


def _items(document: Mapping[str, Any], name: str) -> list[Item]:
    """The metadata in a JSON document with a file name: of an item, or of several in a collection.

    Returns:
        At most `_MOST_ITEMS`; empty if the document states none of a raster.
    """
    root = name.rpartition("/")[0]
    several = document.get("features") if document.get("type") == "FeatureCollection" else None
    items = several if isinstance(several, list) else [document]
    if 0 < len(items) <= _MOST_ITEMS and all(map(_is_an_item, items)):
        return [_stac_item(item, root) for item in items]
    day = _requested_day(document)
    return [Item(root=root, common={"datetime": day}, assets={})] if day else []


def _is_an_item(document: object) -> bool:
    return (
        isinstance(document, dict)
        and document.get("type") == "Feature"
        and "stac_version" in document
    )


def _document(file: SourceFile) -> dict[str, Any]:
    """The object in a JSON file; empty if the file holds none."""
    try:
        with file.path.open("rb") as source:
            document = json.loads(source.read(MAX_METADATA_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _collections(files: Sequence[SourceFile]) -> dict[str, Mapping[str, Any]]:
    """The STAC Collections with `item_assets` among the files, by their id; at most a few.

    The other documents are parsed again afterwards, so that only one is in memory at a time.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for file in files:
        if len(found) == _MOST_COLLECTIONS:
            break
        if is_json(file.name):
            document = _document(file)
            if _is_of_a_collection(document) and document.get("item_assets"):
                found[str(document.get("id"))] = {"item_assets": document["item_assets"]}
    return found


def _is_of_a_collection(document: Mapping[str, Any]) -> bool:
    """Whether a JSON document is a STAC Collection or Catalog."""
    return document.get("type") in {"Collection", "Catalog"} and "stac_version" in document


_TIME = re.compile(r"\d{4}-\d\d-\d\d(T[0-9:.]{5,15}(Z|[+-]\d\d:?\d\d)?)?")
_SENTINEL_HUBS_OWN = ("userData", "userdata")


def _date_list(document: Mapping[str, Any], name: str) -> DateList | None:
    """The one list of dates in a JSON document; None if it has none, or several that differ.

    Sentinel Hub stores what an evalscript's `updateOutputMetadata` returns as userdata.json: mostly
    the dates of the scenes, as texts, as objects with one, or as JSON in a text.
    """
    inner = next((document[k] for k in _SENTINEL_HUBS_OWN if k in document), document)
    if not isinstance(inner, dict) or "type" in document or "stac_version" in document:
        return None
    found = {key: times for key, value in inner.items() if (times := _times(value))}
    if len(set(found.values())) != 1:
        return None
    key, times = next(iter(found.items()))
    factor = inner.get("norm_factor")
    scale = factor if isinstance(factor, float) and 0 < factor < 1 else None
    return DateList(name=name, key=key, times=times, scale=scale)


def _times(value: object) -> tuple[str, ...]:
    """A list of at least two ISO dates; empty if a value is anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return ()
    if not isinstance(value, list) or len(value) < 2:
        return ()
    if all(isinstance(one, dict) for one in value):
        keys = {k for one in value for k, v in one.items() if _is_time(v)}
        if len(keys) != 1:
            return ()
        (key,) = keys
        value = [one.get(key) for one in value]
    return tuple(map(str, value)) if all(map(_is_time, value)) else ()


def _is_time(value: object) -> bool:
    return isinstance(value, str) and bool(_TIME.fullmatch(value))


def is_json(name: str) -> bool:
    """Whether a name is that of a JSON file, as STAC items also are with the suffix `.geojson`."""
    return name.lower().endswith((".json", ".geojson"))


def is_metadata(file: SourceFile) -> bool:
    """Whether a JSON file describes rasters in a way that the service reads."""
    document = _document(file)
    return bool(_items(document, file.name) or _date_list(document, file.name))


def with_date_lists(
    headers: Sequence[Header], lists: Sequence[DateList]
) -> tuple[list[Header], list[tuple[str, str]], list[StackWarning]]:
    """Headers whose bands have the dates of lists beside them.

    A list counts only if each raster in its folder with several bands has one band per date.

    Args:
        headers: headers of all rasters.
        lists: lists of dates.

    Returns:
        The headers, the lists that are not used, each with the reason, and warnings about those
        that are.
    """
    left_out: list[tuple[str, str]] = []
    warnings: list[StackWarning] = []
    dated = list(headers)
    for own in lists:
        beside = [n for n, one in enumerate(headers) if one.name.rpartition("/")[0] == own.root]
        fitting = [n for n in beside if own.fits(headers[n])]
        several = [n for n in beside if headers[n].count > 1]
        n_dates = len(own.times)
        if not fitting or len(several) > len(fitting):
            reason = (
                f"its {n_dates} dates ({own.times[0][:10]}, ...) are not those of the bands of "
                f"every raster in its folder: give `dates` to use them"
            )
            left_out.append((own.name, reason))
            continue
        for n in fitting:
            header = headers[n]
            tags = tuple(
                {**band, "datetime": time}
                for band, time in zip(header.band_tags, own.times, strict=True)
            )
            scale = {"scale": f"{own.scale:.12g}"} if own.scale else {}
            dated[n] = replace(header, band_tags=tags, tags={**scale, **header.tags})
        names = [f"'{headers[n].name}'" for n in fitting]
        scaled = f", and the scale {own.scale:g} by its `norm_factor`" if own.scale else ""
        detail = (
            f"the {n_dates} bands of {first_names(names, 2)} have the "
            f"dates in `{own.key}` of '{own.name}', in its order ({own.times[0][:10]} to "
            f"{own.times[-1][:10]}){scaled}; give `dates` if this is wrong"
        )
        warnings.append(StackWarning(code="dates_assumed", detail=detail))
    return dated, left_out, warnings


def _stac_item(document: Mapping[str, Any], root: str) -> Item:
    common = item_tags(document)
    assets = document.get("assets")
    if not _is_of_one_time(document):
        common.pop("datetime", None)
    by_name: dict[str, Described] = {}
    paths: dict[str, str] = {}
    for key, asset in (assets if isinstance(assets, dict) else {}).items():
        if not isinstance(asset, dict):
            continue
        bands = asset_bands(
            asset,
            str(key),
            sentinel_2=of_sentinel_2(document),
            numbers=band_numbers(document),
        )
        path = unquote(str(asset.get("href", "")).partition("?")[0])
        paths[_file_of(path)] = path
        by_name[_file_of(path)] = Described(
            bands=bands,
            georeference=georeference_of_asset(document, asset),
            ignored_offset=contradiction(common, bands),
        )
    return Item(root=root, common=common, assets=by_name, paths=paths)


def _file_of(href: str) -> str:
    """The name of the file that a link leads to, as the file system has it."""
    return unquote(href.partition("?")[0]).rpartition("/")[2]


def _is_of_one_time(document: Mapping[str, Any]) -> bool:
    """Whether an item's date is that of all its assets.

    An item of openEO's results describes all dates of a batch job. It has no `datetime`, but a
    period, and the names of its assets hold their dates.
    """
    properties = document.get("properties")
    assets = document.get("assets")
    if not isinstance(properties, dict) or not isinstance(assets, dict):
        return True
    hrefs = [str(a.get("href", key)) for key, a in assets.items() if isinstance(a, dict)]
    days = {day for href in hrefs if (day := date_of(_file_of(href)))}
    return bool(properties.get("datetime")) or len(days) < 2


def _requested_day(document: Mapping[str, Any]) -> str | None:
    """The one day of a request to Sentinel Hub (process API or WCS).

    Returns:
        The day as tags; empty if the request covers several days, as for composites; None if the
        document is not a request.
    """
    if isinstance(document.get("request"), dict):  # newer versions keep the response as well
        document = document["request"]
    # Sentinel Hub's batch and process APIs repeat the request's body alone.
    payload: Any = (
        document if {"input", "evalscript"} <= document.keys() else document.get("payload")
    )
    if not {"url", "headers"} <= document.keys() and payload is not document:
        return None
    times = parse_qs(urlsplit(str(document.get("url", ""))).query).get("TIME", [""])[0].split("/")
    try:
        span = payload["input"]["data"][0]["dataFilter"]["timeRange"]
        times = [str(span["from"]), str(span["to"])]
    except (KeyError, IndexError, TypeError):
        pass
    days = {time[:10] for time in times}
    return times[0] if len(days) == 1 else ""


def _product(file: SourceFile) -> Product:
    """Read the needed elements of a product's XML; entities and external files are not loaded."""
    with file.path.open("rb") as source:
        text = source.read(MAX_METADATA_BYTES).decode("utf-8", "replace")
    quantification = _QUANTIFICATION.search(text)
    if not quantification or not float(quantification[1]):
        raise InvalidRequest.of(
            "files",
            f"'{file.name}' has the name of a Sentinel-2 product's metadata, but no element "
            "QUANTIFICATION_VALUE other than 0: leave the file out, and give `scale` and `offset`",
        )
    scale = 1 / float(quantification[1])
    offsets = {
        _BAND_IDS[int(number)]: float(value) * scale
        for number, value in _OFFSET.findall(text)
        if int(number) < len(_BAND_IDS)
    }
    baseline, sensed, level = (one.search(text) for one in (_BASELINE, _SENSED, _LEVEL))
    return Product(
        root=file.name.rpartition("/")[0],
        scale=scale,
        offsets=offsets,
        baseline=baseline[1] if baseline else None,
        sensed=sensed[1] if sensed else None,
        level=level[1] if level else None,
    )


def with_product(header: Header, products: Sequence[Metadata]) -> Header:
    """A header with the metadata of its product, for what the file itself does not state."""
    product = _product_of(header.name, products)
    if product is None:
        return header
    header = replace(header, tags={**product.tags(header.name), **header.tags})
    described = _described(header.name, product)
    return header if described is None else _as_described(header, described)


def ignored_offsets(
    headers: Sequence[Header], products: Sequence[Metadata]
) -> tuple[StackWarning, ...]:
    """Warnings about offsets that are not applied, because their item contradicts them."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for header in headers:
        product = _product_of(header.name, products)
        described = product and _described(header.name, product)
        if described and described.ignored_offset:
            by_reason[described.ignored_offset].append(header.name)
    return tuple(
        StackWarning(
            code="baseline_offset_suspected",
            detail=f"the STAC items of {len(names)} files ('{names[0]}', ...) state an offset, and "
            f"{reason}: the offset is not applied; give `offset` to decide",
        )
        for reason, names in by_reason.items()
    )


def _product_of(name: str, products: Sequence[Metadata]) -> Metadata | None:
    """The metadata document of a file: the one in the nearest of its folders.

    Of several items in a folder it is the one that links to the file, by as many folders as its
    link and the name have in common; None if several do equally.
    """
    own = [
        p
        for p in products
        if name.startswith(f"{p.root}/")
        or (not p.root and ("/" not in name or _is_in_a_safe(name, p) or _links_to(p, name) > 1))
    ]
    nearest = [p for p in own if len(p.root) == max(len(one.root) for one in own)]
    if len(nearest) > 1:  # as `pimc stack` writes them: an item for each file of a folder
        linked = [_links_to(p, name) for p in nearest]
        most = max(linked)
        nearest = [p for p, n in zip(nearest, linked, strict=True) if n == most > 0]
        if len(nearest) > 1 and any(p.tags(name) != nearest[0].tags(name) for p in nearest):
            return None
    return next(iter(nearest), None)


def _links_to(product: Metadata, name: str) -> int:
    """How many of the last parts of a file's name an item's link to it has; 0 without a link."""
    parts = name.split("/")
    path = product.paths.get(parts[-1]) if isinstance(product, Item) else None
    if path is None:
        return 0
    both = zip(reversed(parts), reversed(path.split("/")), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], both)))


def _is_in_a_safe(name: str, product: Metadata) -> bool:
    """Whether a file is in a folder of a product whose XML was sent without the product's own."""
    return isinstance(product, Product) and name.startswith("GRANULE/")


def _described(name: str, product: Metadata) -> Described | None:
    return product.assets.get(name.rpartition("/")[2]) if isinstance(product, Item) else None


def _as_described(header: Header, described: Described) -> Header:
    if header.crs is None and described.georeference is not None:
        header = replace(header, crs=described.georeference[0], transform=described.georeference[1])
    if len(described.bands) != header.count:
        return header
    descriptions, nodata, tags = [], [], []
    for n, band in enumerate(described.bands):
        own = header.descriptions[n]
        descriptions.append(own if band_of(own) or quality_of(own) else (band.name or own))
        nodata.append(band.nodata if header.nodata[n] is None else header.nodata[n])
        stated = {k: v for k, v in _band_tags(described, band).items() if k not in header.tags}
        if band.name:
            stated[ITEM_BAND] = band.name
        tags.append({**stated, **header.band_tags[n]})
    return replace(
        header, descriptions=tuple(descriptions), nodata=tuple(nodata), band_tags=tuple(tags)
    )

"""STAC items: their assets, the bands of each asset, and the metadata of each band.

    item (STAC 1.0 or 1.1) → assets with their bands → those that a model needs
                           → metadata in the form of a file's tags

This module opens no file and no connection. Sources: STAC specification 1.0.0 and 1.1.0; extensions
eo 1.x and 2.0, raster 1.1 and 2.0, projection 1.x and 2.0, alternate-assets 1.x.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

from affine import Affine
from rasterio.crs import CRS

from service.errors import InvalidRequest, MissingBands, first_names, shown
from service.grid import CRSError, crs_of
from service.read.band_names import (
    CLDPRB,
    CLOUD,
    TWINS,
    band_of,
    level_of,
    quality_of,
    tagged_level,
)
from service.read.masks import AUTO, MaskRule
from service.read.sensors import band_number, sensor_named

Document = Mapping[str, Any]
_ITEM_TAGS = (
    "datetime",
    "platform",
    "constellation",
    "s2:processing_baseline",
    "sentinel:processing_baseline",  # Earth Search v0, Digital Earth Africa
    "earthsearch:boa_offset_applied",
    "sentinel:boa_offset_applied",
    "processing:level",
)
_NO_IMAGE = frozenset({"thumbnail", "overview", "metadata"})
_RASTER_TYPE = re.compile(r"image/(?:tiff|vnd\.stac\.geotiff|jp2|jpeg2000)\b", re.IGNORECASE)
_RASTER_NAME = re.compile(r"\.(?:tiff?|jp2)$", re.IGNORECASE)
_METRES = re.compile(r"(?:^|[_\-])r?(\d{1,3})m$", re.IGNORECASE)
_BASELINE = re.compile(r"\d{2}\.\d{2}")
_BASELINE_WITH_OFFSET = 4.0
_NAMED_AT_MOST = 20
_UNKNOWN_SIZE = 1e6


@dataclass(frozen=True, kw_only=True)
class AssetBand:
    """One band of an asset, as the item describes it."""

    name: str | None
    """Sentinel-2's name of the band, or that of a quality band; None if it is not understood."""
    tags: Mapping[str, str]
    """Scale and offset, if the item states them."""
    nodata: float | None


@dataclass(frozen=True, kw_only=True)
class Asset:
    """A raster that an item names."""

    key: str
    """Name of the asset in the item."""
    href: str
    bands: tuple[AssetBand, ...]
    """One entry per band; a single entry if the item lists no bands."""
    metres: float
    """Pixel size in metres, by which one of several copies of a band is chosen."""
    document: Document = field(repr=False)

    @property
    def names(self) -> frozenset[str]:
        """The bands that are understood."""
        return frozenset(band.name for band in self.bands if band.name)

    @property
    def last(self) -> str:
        """The last part of its href, as a file's name."""
        return unquote(urlsplit(self.href).path).rpartition("/")[2] or self.key

    @property
    def is_jp2(self) -> bool:
        """Whether the asset is JPEG 2000, which can only be fetched as a whole."""
        kind = str(self.document.get("type", ""))
        return "jp2" in kind or "jpeg2000" in kind or self.last.lower().endswith(".jp2")


@dataclass(frozen=True, kw_only=True)
class StacItem:
    """A STAC Item: one acquisition and its assets."""

    id: str
    collection: str | None
    properties: Document = field(repr=False)
    bbox: tuple[float, float, float, float] | None
    """West, south, east, north in degrees."""
    assets: tuple[Asset, ...]
    """The rasters among its assets."""
    link: str | None
    """URL of the item."""
    not_read: tuple[str, ...] = ()
    """Formats of other assets that hold data, which the service does not read, each with a key."""
    document: Document = field(default_factory=dict, repr=False)
    """The item's JSON object."""
    base: str | None = None
    """URL to which relative hrefs refer."""
    collection_link: str | None = None
    """URL of its collection, which may describe the assets in `item_assets`."""
    note: str = ""
    """What became of the collection, for messages about missing bands."""

    def lacks(self, needed: Sequence[str]) -> bool:
        """Whether an asset for a needed band is not found."""
        try:
            self.chosen(needed, ())
        except MissingBands:
            return True
        return False

    def described_by(self, collection: Document) -> StacItem:
        """The item with what its collection's `item_assets` state of its assets.

        What the item states itself counts. STAC 1.1 has `item_assets` in every collection, 1.0 in
        the extension item-assets.
        """
        found = read_item(with_definitions(self.document, collection), "stac", self.base)
        note = f"; its collection {self.collection_link} has no `item_assets` that name them"
        return replace(found, note=note)

    def chosen(
        self,
        needed: Sequence[str],
        rules: tuple[MaskRule, ...] | None,
        optional: Sequence[str] = (),
    ) -> tuple[Asset, ...]:
        """The assets with the needed bands and the cloud masks.

        Args:
            needed: bands by Sentinel-2 name; a narrow twin replaces a band that the item lacks.
            rules: the requested masks; None takes the first kind that the item has.
            optional: further bands, taken if a separate asset contains them.

        Raises:
            MissingBands: the item lacks a band; the message names the item, the bands and its
                assets.
        """
        single = self._single()
        bands = [band if band in single else TWINS.get(band, band) for band in needed]
        found = [single[band] for band in bands if band in single]
        present = set(single)
        if len(found) < len(bands):
            together = next((a for a in self.assets if _all_in(needed, a.names)), None)
            if together is None:
                raise self._missing([band for band in needed if band not in present])
            found = [together]
            present |= together.names
        if rules is None:
            rules = next(((rule,) for rule in AUTO if rule.band in present), ())
        more = (*(part.band for rule in rules for part in rule.parts), *optional)
        found += [single[band] for band in more if band in single]
        return tuple({asset.key: asset for asset in found}.values())

    def _single(self) -> dict[str, Asset]:
        """The asset of each band with a file of its own: GeoTIFF before JPEG 2000, then finest."""
        best: dict[str, Asset] = {}
        for asset in sorted(self.assets, key=lambda one: (one.is_jp2, one.metres)):
            if len(asset.bands) == 1 and asset.bands[0].name:
                best.setdefault(asset.bands[0].name, asset)
        return best

    def _missing(self, bands: Sequence[str]) -> MissingBands:
        found = first_names([asset.key for asset in self.assets], _NAMED_AT_MOST) or "none"
        if self.not_read:
            return MissingBands(
                f"item '{self.id}' has no raster for {', '.join(bands)}, but assets as "
                f"{' and '.join(self.not_read)}, which the service does not read (it reads GeoTIFF "
                f"and JPEG 2000; rasters: {found}): take items of the same scenes in a collection "
                "of COGs, such as sentinel-2-l2a of Earth Search or Planetary Computer, or write "
                "the bands as GeoTIFFs with rioxarray's to_raster and send these"
            )
        return MissingBands(
            f"item '{self.id}' has no asset for {', '.join(bands)}; its rasters are {found}; "
            "search a collection of surface reflectance, or name the bands in `bands` or "
            f"`eo:bands` of each asset{self.note or self._no_collection}"
        )

    @property
    def _no_collection(self) -> str:
        if self.collection_link:
            return ""
        return (
            ", or in `item_assets` of its collection, to which the item has no absolute link "
            "(rel=collection)"
        )

    @property
    def source(self) -> dict[str, Any]:
        """The item as the `sources` of a result contain it."""
        stated = {
            "id": self.id,
            "collection": self.collection,
            "datetime": self.properties.get("datetime") or self.properties.get("start_datetime"),
            "href": self.link,
        }
        return {key: value for key, value in stated.items() if value is not None}

    def beside(self, names: Mapping[str, str]) -> dict[str, Any]:
        """The item that is stored beside its files, with their metadata only.

        Args:
            names: the last part of each file's name, by the asset's key.
        """
        return {
            "type": "Feature",
            "stac_version": "1.1.0",
            "id": self.id,
            "collection": self.collection,
            "properties": {k: v for k, v in self.properties.items() if not isinstance(v, list)},
            "assets": {
                asset.key: {**asset.document, "href": names[asset.key]}
                for asset in self.assets
                if asset.key in names
            },
        }


def _all_in(needed: Iterable[str], names: frozenset[str]) -> bool:
    return all(band in names or TWINS.get(band) in names for band in needed)


@dataclass(frozen=True, kw_only=True)
class Search:
    """The parameters of a search."""

    url: str
    """The API's landing page."""
    collections: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()
    bbox: tuple[float, float, float, float] | None = None
    """West, south, east, north in degrees."""
    intersects: Mapping[str, Any] | None = None
    """A GeoJSON geometry."""
    datetime: str | None = None
    """A date or an interval in STAC's form: `2021-01-01/2021-12-31`."""
    max_cloud_cover: float | None = None
    """Largest cloud cover in per cent; items without `eo:cloud_cover` are found in any case."""
    query: Mapping[str, Any] | None = None
    filter: Mapping[str, Any] | None = None
    """CQL2 as JSON."""


def read_items(document: Document, field_name: str, base: str | None = None) -> list[StacItem]:
    """The items of an ItemCollection, or a single item.

    Args:
        document: the JSON document.
        field_name: name of the parameter that contains it, for messages.
        base: URL of the document, to which relative hrefs refer.

    Raises:
        InvalidRequest: the document is neither, or an item lacks a property that STAC requires.
    """
    kind = document.get("type")
    if kind == "Feature":
        return [read_item(document, field_name, base)]
    features = document.get("features")
    if kind != "FeatureCollection" or not isinstance(features, list):
        raise InvalidRequest.of(
            field_name,
            f"neither a STAC ItemCollection nor an Item: its type is {shown(kind)!r}; for a "
            "STAC API give `url` and `collections`",
        )
    found: dict[tuple[str | None, str], StacItem] = {}
    for n, feature in enumerate(features):
        item = read_item(feature, f"{field_name}.features.{n}", base)
        found.setdefault((item.collection, item.id), item)  # pages may overlap
    return list(found.values())


def read_item(document: object, field_name: str, base: str | None = None) -> StacItem:
    """One item; the arguments are those of `read_items`.

    Raises:
        InvalidRequest: the item lacks a property that STAC requires.
    """
    if not isinstance(document, Mapping) or not isinstance(document.get("id"), str):
        raise InvalidRequest.of(field_name, "not a STAC Item: an object with `id` is required")
    name = str(document["id"])[:200]
    properties, assets = document.get("properties"), document.get("assets")
    if not isinstance(properties, Mapping) or not isinstance(assets, Mapping):
        raise InvalidRequest.of(
            field_name, f"item '{name}' is not a STAC Item: it has no `properties` or no `assets`"
        )
    link = _link(document)
    collection = document.get("collection")
    return StacItem(
        id=name,
        collection=str(collection) if collection else None,
        properties=properties,
        bbox=_bbox(document.get("bbox")),
        assets=tuple(_assets(assets, document, link or base)),
        link=link,
        not_read=_not_read(assets),
        document=document,
        base=base,
        collection_link=_link(document, "collection", link or base),
    )


def _link(document: Document, rel: str = "self", base: str | None = None) -> str | None:
    """The absolute URL of a link of a document; None without one."""
    links = document.get("links")
    for link in links if isinstance(links, list) else ():
        if isinstance(link, Mapping) and link.get("rel") == rel:
            href = link.get("href")
            if not isinstance(href, str):
                return None
            href = urljoin(base, href) if base else href
            return href if urlsplit(href).scheme else None
    return None


def with_definitions(document: Document, collection: Document) -> Document:
    """An item's document whose assets have what its collection's `item_assets` state of them."""
    definitions, assets = collection.get("item_assets"), document.get("assets")
    if not isinstance(definitions, Mapping) or not isinstance(assets, Mapping):
        return document
    described = {
        key: {**_definition(definitions, key), **asset} if isinstance(asset, Mapping) else asset
        for key, asset in assets.items()
    }
    return {**document, "assets": described}


def _definition(definitions: Document, key: object) -> Document:
    """What `item_assets` states of an asset."""
    found = definitions.get(str(key))
    return found if isinstance(found, Mapping) else {}


def _bbox(value: object) -> tuple[float, float, float, float] | None:
    if not isinstance(value, list) or len(value) not in {4, 6}:
        return None
    if not all(isinstance(number, int | float) for number in value):
        return None
    half = len(value) // 2
    return float(value[0]), float(value[1]), float(value[half]), float(value[half + 1])


def _assets(assets: Document, document: Document, base: str | None) -> Iterator[Asset]:
    sentinel_2, numbers = of_sentinel_2(document), band_numbers(document)
    for key, asset in assets.items():
        if not isinstance(asset, Mapping):
            continue
        href = _href(asset, base)
        roles = asset.get("roles")
        if href is None or (isinstance(roles, list) and _NO_IMAGE & set(map(str, roles))):
            continue
        kind, name = str(asset.get("type", "")), urlsplit(href).path
        if not (_RASTER_TYPE.match(kind) or _RASTER_NAME.search(name)):
            continue
        bands = asset_bands(asset, str(key), sentinel_2=sentinel_2, numbers=numbers)
        yield Asset(
            key=str(key),
            href=href,
            bands=bands,
            metres=_metres(asset, str(key)),
            document=asset,
        )


_OTHER_DATA: Mapping[str, re.Pattern[str]] = {
    "Zarr": re.compile(r"\bzarr\b|\.zarr(?:/|$)", re.IGNORECASE),
    "netCDF": re.compile(r"netcdf|\.nc4?$", re.IGNORECASE),
    "HDF": re.compile(r"\bx?-?hdf|\.(?:hdf|h5|he5)$", re.IGNORECASE),
    "GRIB": re.compile(r"grib|\.gri?b2?$", re.IGNORECASE),
    "Parquet": re.compile(r"parquet|\.parquet$", re.IGNORECASE),
}
"""Formats of data that are not read, by the media type or the end of the href."""


def _not_read(assets: Document) -> tuple[str, ...]:
    """The formats of an item's assets that are not read, each with the key of one of them."""
    found: dict[str, str] = {}
    for key, asset in assets.items():
        if isinstance(asset, Mapping):
            texts = (str(asset.get("type", "")), urlsplit(str(asset.get("href", ""))).path)
            for name, pattern in _OTHER_DATA.items():
                if any(map(pattern.search, texts)):
                    found.setdefault(name, f"{name} ('{shown(key, 60)}')")
    return tuple(found.values())


def _href(asset: Document, base: str | None) -> str | None:
    """The asset's href; the first HTTP URL if it has several."""
    alternate = asset.get("alternate")
    others = alternate.values() if isinstance(alternate, Mapping) else ()
    listed = [asset.get("href"), *(o.get("href") for o in others if isinstance(o, Mapping))]
    hrefs = [href for href in listed if isinstance(href, str) and href]
    if base:
        hrefs = [urljoin(base, href) for href in hrefs]
    return next((h for h in hrefs if urlsplit(h).scheme in {"http", "https"}), None) or next(
        iter(hrefs), None
    )


def _metres(asset: Document, key: str) -> float:
    """The pixel size in metres; `_UNKNOWN_SIZE` if the item does not state it."""
    bands = _lists(asset, "raster:bands", "bands")
    transform = asset.get("proj:transform")
    steps = [
        asset.get("gsd"),
        asset.get("raster:spatial_resolution"),
        *(band.get(name) for band in bands for name in ("spatial_resolution", "gsd")),
        transform[0] if isinstance(transform, list) and transform else None,
    ]
    named = _METRES.search(key)
    if named:
        steps.insert(0, float(named[1]))
    return next((float(s) for s in steps if isinstance(s, int | float) and s > 0), _UNKNOWN_SIZE)


# Metadata of an item's rasters --------------------------------------------------------------------


def of_sentinel_2(document: Document) -> bool:
    """Whether an item is of Sentinel-2, whose band names take precedence over common names."""
    properties = document.get("properties")
    stated = properties if isinstance(properties, Mapping) else {}
    texts = (stated.get("constellation"), stated.get("platform"), document.get("collection"))
    return any("sentinel-2" in str(text).lower() for text in texts)


def band_numbers(document: Document) -> Mapping[int, str] | None:
    """The bands of an item's sensor by number; None if its numbers are Sentinel-2's, or unknown."""
    properties = document.get("properties")
    stated = properties if isinstance(properties, Mapping) else {}
    texts = (document.get("id"), document.get("collection"), stated.get("platform"))
    sensor = next((found for text in texts if (found := sensor_named(str(text)))), None)
    return sensor.bands if sensor else None


def item_tags(document: Document) -> dict[str, str]:
    """The metadata of all rasters of an item, in the form of a file's tags."""
    properties = document.get("properties")
    stated = dict(properties) if isinstance(properties, Mapping) else {}
    if not stated.get("datetime") and stated.get("start_datetime"):
        stated["datetime"] = stated["start_datetime"]
    version = str(stated.get("processing:version", ""))
    if of_sentinel_2(document) and _BASELINE.fullmatch(version):  # Copernicus Data Space
        stated.setdefault("s2:processing_baseline", version)
    texts = [*(document.get(key) for key in ("collection", "id")), stated.get("title")]
    if (level := _level(stated, texts)) and of_sentinel_2(document):
        stated["processing:level"] = f"L{level}"
    return {key: str(stated[key]) for key in _ITEM_TAGS if stated.get(key) is not None}


def _level(stated: Document, texts: Iterable[object]) -> str | None:
    """The level of Sentinel-2 reflectance that an item states: 1C if its parts contradict it."""
    own = {key: str(value) for key, value in stated.items() if isinstance(value, str)}
    tagged = tagged_level(own)
    found = [tagged[0]] if tagged else []
    found += [level for text in texts if text and (level := level_of(str(text)))]
    return min(found, default=None)


def contradiction(tags: Mapping[str, str], bands: Iterable[AssetBand]) -> str | None:
    """The reason for not applying the offset that an item states for its bands; None to apply it.

    Earth Search v1 states the product's offset in `raster:bands` even if the offset has been
    subtracted from the pixels (`earthsearch:boa_offset_applied`).

    Args:
        tags: the item's tags, from `item_tags`.
        bands: the bands of an asset.
    """
    if not any(float(band.tags.get("offset", 0)) for band in bands):
        return None
    for key, value in tags.items():
        if key.endswith(":boa_offset_applied") and value.lower() == "true":
            return f"{key} is true"
        before = _BASELINE.fullmatch(value) and float(value) < _BASELINE_WITH_OFFSET
        if key.endswith(":processing_baseline") and before:
            return f"{key} is {value}, before the first with an offset"
    return None


def asset_bands(
    asset: Document, key: str, *, sentinel_2: bool, numbers: Mapping[int, str] | None = None
) -> tuple[AssetBand, ...]:
    """The bands of an asset: names, scale, offset and nodata.

    STAC 1.0 has two lists, `eo:bands` and `raster:bands`. STAC 1.1 has `bands`, whose properties
    may also be those of the asset if all bands share them.

    Args:
        asset: the asset's JSON object.
        key: name of the asset in the item.
        sentinel_2: whether names such as B04 take precedence over common names such as red.
        numbers: the bands of another sensor by number, for assets without a common name.
    """
    lists = [asset.get(name) for name in ("eo:bands", "raster:bands", "bands")]
    known = [one for one in lists if isinstance(one, list)]
    count = max((len(one) for one in known), default=0)
    shared = {k: asset[k] for k in ("nodata", "raster:scale", "raster:offset") if k in asset}
    bands = []
    for n in range(max(count, 1)):
        stated = dict(shared)
        for one in known:
            if n < len(one) and isinstance(one[n], Mapping):
                stated |= one[n]
        bands.append(
            AssetBand(
                name=_name(
                    stated, key if count <= 1 else "", sentinel_2=sentinel_2, numbers=numbers
                ),
                tags=_calibration(stated),
                nodata=_number(stated.get("nodata")),
            )
        )
    return tuple(bands)


def _name(
    stated: Document, key: str, *, sentinel_2: bool, numbers: Mapping[int, str] | None
) -> str | None:
    common = stated.get("eo:common_name") or stated.get("common_name")
    texts = [stated.get("name"), key, common]
    if common and not sentinel_2:  # another sensor's numbers are those of other bands
        texts = [common]
    known = [text for text in texts if isinstance(text, str)]
    if numbers is not None and not common:
        numbered = next((n for text in known if (n := band_number(text)) is not None), None)
        if numbered is not None:
            return numbers.get(numbered)
    found = next((band for text in known if (band := band_of(text) or quality_of(text))), None)
    # Earth Search's asset `cloud` is MSK_CLDPRB; only files of sits have a band CLOUD of classes.
    return CLDPRB if found == CLOUD else found


def _calibration(stated: Document) -> dict[str, str]:
    tags = {}
    for name in ("scale", "offset"):
        number = _number(stated.get(name, stated.get(f"raster:{name}")))
        if number is not None:
            tags[name] = f"{number:.12g}"
    return tags


def _number(value: object) -> float | None:
    """A finite number, also in a text; None for any other value, such as "nan" and "inf"."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < float("inf") else None


def _lists(asset: Document, *names: str) -> list[Document]:
    found: list[Document] = []
    for name in names:
        bands = asset.get(name)
        if isinstance(bands, list):
            found += [band for band in bands if isinstance(band, Mapping)]
    return found


def georeference_of_asset(document: Document, asset: Document) -> tuple[CRS, Affine] | None:
    """CRS and transform of an asset by the projection extension; None if they are not stated."""
    properties = document.get("properties")
    stated = {**(properties if isinstance(properties, Mapping) else {}), **asset}
    code = stated.get("proj:code") or stated.get("proj:epsg")
    numbers = stated.get("proj:transform")
    if not code or not isinstance(numbers, list) or len(numbers) not in {6, 9}:
        return None
    if not all(isinstance(number, int | float) for number in numbers):
        return None
    try:
        crs = crs_of(f"EPSG:{code}" if isinstance(code, int) else str(code))
    except CRSError:
        return None
    return crs, Affine(*numbers[:6])

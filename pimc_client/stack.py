"""Stacks from a STAC API: one GeoTIFF per date of the part that a bounding box covers.

    bbox, dates → items, page by page → by day → windows of the assets by HTTP ranges
                → `S2_YYYYMMDD.tif` with named bands, and a STAC item beside each

This module needs a network but no PIMC server; the folder is then a stack like any other. rasterio
reads the windows; `pip install 'pimc-client[stac]'` installs it.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from pimc_client.errors import StackError

if TYPE_CHECKING:
    import httpx
    import numpy as np
    from numpy.typing import NDArray

EARTH_SEARCH = "https://earth-search.aws.element84.com/v1"
"""Landing page of Earth Search, whose Sentinel-2 files are public."""
COLLECTION = "sentinel-2-l2a"
BANDS = ("B02", "B03", "B04", "B08")
"""The bands that the 10 m models read."""
SCL = "SCL"
Progress = Callable[[int, int], None]
"""Called with the number of dates that are done, and of all dates."""
_AT_ONCE = 4
_PAGE_ITEMS = 100
_MAX_PAGES = 200
_MAX_PIXELS = 25_000_000
_SCALE, _OFFSET = 0.0001, -0.1
_COLOURS: Mapping[str, str] = {
    "coastal": "B01", "blue": "B02", "green": "B03", "red": "B04", "rededge1": "B05",
    "rededge2": "B06", "rededge3": "B07", "nir": "B08", "nir08": "B8A", "nir09": "B09",
    "swir16": "B11", "swir22": "B12", "scl": SCL,
}  # fmt: skip
"""Sentinel-2 band names by asset key of Earth Search."""
_KEY = re.compile(r"(?P<band>B\d[\dA]|SCL)(?:_(?P<metres>\d{2})m)?", re.IGNORECASE)
_BASELINE = re.compile(r"\d{2}\.\d{2}")
_GDAL: Mapping[str, Any] = {
    # A COG has no side files, and GDAL would send a request for each possible one.
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_HTTP_MAX_RETRY": 4,
    "GDAL_HTTP_RETRY_DELAY": 1,
    "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
    "VSI_CACHE": True,
}
BBox = tuple[float, float, float, float]


def fetch_stack(
    folder: str | Path,
    *,
    bbox: Sequence[float],
    start: str | date,
    end: str | date,
    url: str = EARTH_SEARCH,
    collection: str = COLLECTION,
    bands: Sequence[str] = BANDS,
    max_cloud_cover: float | None = None,
    progress: Progress = lambda _done, _all: None,
) -> list[Path]:
    """Fetch a Sentinel-2 stack of an area from a STAC API.

    Only the blocks of the assets that the bounding box needs are read. Acquisitions of one day
    become one file, which takes the first value at each pixel. A date whose file exists is not
    fetched again, so that an interrupted run can be continued.

    Args:
        folder: folder for the files; created if missing.
        bbox: west, south, east, north in degrees.
        start: first day, ISO.
        end: last day, ISO.
        url: landing page of the API.
        collection: id of the collection.
        bands: Sentinel-2 bands, in the order of the files' bands; SCL is added as the last band.
        max_cloud_cover: largest `eo:cloud_cover` of an item, per cent; None takes all items.
        progress: called after each date.

    Returns:
        The files in the order of their dates. A date without any value in the box has no file.

    Raises:
        ImportError: rasterio is not installed.
        ValueError: the box, the dates or the bands are not valid.
        StackError: the API or a file cannot be read, or no item was found; the message names the
            item and the asset.
    """
    rasterio = _rasterio()
    box, span = _checked_box(bbox), _checked_span(start, end)
    wanted = (*[band.upper() for band in bands if band.upper() != SCL], SCL)
    unknown = sorted(set(wanted) - set(_COLOURS.values()))
    if unknown:
        raise ValueError(
            f"bands: {', '.join(unknown)} are not Sentinel-2 bands; give any of "
            f"{', '.join(_COLOURS.values())}"
        )
    items = _search(url, collection, box, span, max_cloud_cover)
    by_day: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for item in items:
        by_day[str(item["properties"]["datetime"])[:10]].append(item)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    grid = _Grid.of(rasterio, items, wanted, box)
    days = sorted(by_day)
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="stack") as pool:

        def one(day: str) -> Path | None:
            return _write_day(rasterio, target, day, by_day[day], wanted, grid, url)

        found: list[Path | None] = []
        try:
            for path in pool.map(one, days):
                found.append(path)
                progress(len(found), len(days))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return [path for path in found if path is not None]


def _rasterio() -> ModuleType:
    try:
        importlib.import_module("rasterio.warp")
        return importlib.import_module("rasterio")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "rasterio":
            raise
        raise ImportError(
            "fetching a stack needs rasterio, which is not installed: "
            "pip install 'pimc-client[stac]'",
            name="rasterio",
        ) from error


def _checked_box(bbox: Sequence[float]) -> BBox:
    if len(bbox) != 4 or not all(math.isfinite(number) for number in bbox):
        raise ValueError(
            f"bbox: {list(bbox)} is not four finite numbers: give west, south, east, north in "
            "degrees"
        )
    west, south, east, north = (float(number) for number in bbox)
    if not (-180 <= west < east <= 180 and -90 <= south < north <= 90):
        raise ValueError(
            f"bbox: ({west:g}, {south:g}, {east:g}, {north:g}) is not west, south, east, north in "
            "degrees, west below east and south below north"
        )
    return west, south, east, north


def _checked_span(start: str | date, end: str | date) -> str:
    days = []
    for name, day in (("start", start), ("end", end)):
        try:
            days.append(date.fromisoformat(str(day)[:10]))
        except ValueError:
            raise ValueError(f"{name}: '{day}' is not an ISO date such as 2021-01-05") from None
    if days[0] > days[1]:
        raise ValueError(f"start: {days[0]} is after the end, {days[1]}")
    return f"{days[0]}T00:00:00Z/{days[1]}T23:59:59Z"


# The API ------------------------------------------------------------------------------------------


def _search(
    url: str, collection: str, box: BBox, span: str, max_cloud_cover: float | None
) -> list[Mapping[str, Any]]:
    """The items of a search, each once."""
    import httpx

    found: dict[str, Mapping[str, Any]] = {}
    body = {
        "collections": [collection], "bbox": list(box), "datetime": span, "limit": _PAGE_ITEMS,
    }  # fmt: skip
    with httpx.Client(timeout=60, follow_redirects=True) as client:
        for page in _pages(client, f"{url.rstrip('/')}/search", body):
            for item in page:
                cover = item["properties"].get("eo:cloud_cover")
                clear = max_cloud_cover is None or not cover or cover <= max_cloud_cover
                if clear and item["properties"].get("datetime"):
                    found.setdefault(str(item["id"]), item)
    if not found:
        raise StackError(
            f"{url} has no item of '{collection}' in the box from {span[:10]}: check the box, the "
            "dates and the collection"
        )
    return sorted(found.values(), key=lambda item: str(item["properties"]["datetime"]))


def _pages(
    client: httpx.Client, url: str, body: dict[str, Any]
) -> Iterator[list[Mapping[str, Any]]]:
    """The items of each page."""
    method = "POST"
    for _ in range(_MAX_PAGES):
        document = _request(client, method, url, body)
        try:
            features = document["features"]
            links = [link for link in document.get("links", ()) if link["rel"] == "next"]
            _ = [(item["id"], item["assets"].keys(), item["properties"].get) for item in features]
        except (KeyError, TypeError, AttributeError) as error:
            raise StackError(f"{url} does not respond with STAC items: check the URL") from error
        yield features
        if not links or not features:
            return
        (link, *_) = links
        method = str(link.get("method", "GET")).upper()
        body = {**(body if link.get("merge") else {}), **(link.get("body") or {})}
        url = urljoin(url, str(link["href"]))
    raise StackError(
        f"the search at {url} has more than {_MAX_PAGES} pages: give fewer dates or a smaller box"
    )


def _request(client: httpx.Client, method: str, url: str, body: Mapping[str, Any]) -> Any:  # noqa: ANN401 (JSON)
    import httpx

    try:
        response = client.request(method, url, json=body if method == "POST" else None)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise StackError(
            f"{url} cannot be reached ({type(error).__name__}): check the URL and the network"
        ) from error
    if response.status_code != httpx.codes.OK:
        raise StackError(
            f"{url} responded HTTP {response.status_code}: {response.text[:200].strip()}"
        )
    try:
        return response.json()
    except ValueError as error:
        raise StackError(f"{url} does not respond with JSON: check the URL") from error


# Items --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asset:
    """One band of one item."""

    item: str
    key: str
    href: str
    scale: float
    offset: float | None
    """None if nothing states it."""


def _asset(item: Mapping[str, Any], band: str) -> _Asset:
    """The finest asset of a band, GeoTIFF before JPEG 2000.

    Raises:
        StackError: the item has none.
    """
    best: tuple[tuple[bool, int], str] | None = None
    for key in item["assets"]:
        match = _KEY.fullmatch(key.removesuffix("-jp2"))
        named = match["band"].upper() if match else _COLOURS.get(key.removesuffix("-jp2"))
        if named != band:
            continue
        jp2 = "jp2" in str(item["assets"][key].get("type", "")) or key.endswith("-jp2")
        order = (jp2, int((match and match["metres"]) or 0))
        if best is None or order < best[0]:
            best = (order, key)
    if best is None:
        raise StackError(
            f"item '{item['id']}' has no asset for {band}, but only "
            f"{', '.join(sorted(item['assets']))[:300]}: choose other bands, or another collection"
        )
    asset = item["assets"][best[1]]
    scale, offset = _calibration(item["properties"], asset)
    return _Asset(
        item=str(item["id"]), key=best[1], href=_href(item, asset), scale=scale, offset=offset
    )


def _href(item: Mapping[str, Any], asset: Mapping[str, Any]) -> str:
    base = next((link["href"] for link in item.get("links", ()) if link["rel"] == "self"), "")
    others = [other.get("href") for other in (asset.get("alternate") or {}).values()]
    hrefs = [urljoin(base, str(href)) for href in (asset.get("href"), *others) if href]
    href = next((h for h in hrefs if urlsplit(h).scheme in {"http", "https"}), hrefs[0])
    parts = urlsplit(href)
    if parts.scheme == "s3":
        return f"https://{parts.netloc}.s3.amazonaws.com{parts.path}"
    return href


def _calibration(
    properties: Mapping[str, Any], asset: Mapping[str, Any]
) -> tuple[float, float | None]:
    """Scale and offset of an asset: reflectance = value x scale + offset.

    Earth Search states the product's offset also where it has subtracted it
    (`earthsearch:boa_offset_applied`); before processing baseline 04.00 there is none.
    """
    stated: dict[str, Any] = {}
    for name in ("raster:bands", "bands"):
        bands = asset.get(name) or [{}]
        stated |= bands[0]
    scale = stated.get("scale", stated.get("raster:scale", asset.get("raster:scale")))
    offset = stated.get("offset", stated.get("raster:offset", asset.get("raster:offset")))
    text = str(properties.get("s2:processing_baseline") or properties.get("processing:version", ""))
    baseline = float(text) if _BASELINE.fullmatch(text) else None
    if properties.get("earthsearch:boa_offset_applied") is True or (baseline or 9) < 4:
        offset = 0.0
    elif offset is None:
        offset = None if baseline is None else _OFFSET
    return float(scale or _SCALE), None if offset is None else float(offset)


# Windows ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Grid:
    """The grid of a stack: the part of the first item's grid that covers the box."""

    crs: Any
    transform: Any
    width: int
    height: int

    @classmethod
    def of(
        cls,
        rasterio: ModuleType,
        items: Sequence[Mapping[str, Any]],
        bands: Sequence[str],
        box: BBox,
    ) -> _Grid:
        """The part of the grid that covers the box, in whole pixels.

        Raises:
            StackError: the first item's file cannot be read.
            ValueError: the box has too many pixels.
        """
        asset = _asset(items[0], bands[0])
        with rasterio.Env(**_GDAL), _opened(rasterio, asset) as file:
            bounds = rasterio.warp.transform_bounds("EPSG:4326", file.crs, *box, densify_pts=21)
            left, top = ~file.transform @ (bounds[0], bounds[3])
            right, bottom = ~file.transform @ (bounds[2], bounds[1])
            left, top, right, bottom = (
                math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom),
            )  # fmt: skip
            width, height = right - left, bottom - top
            if width * height > _MAX_PIXELS:
                raise ValueError(
                    f"bbox: {width} x {height} pixels are more than {_MAX_PIXELS}, the largest "
                    "allowed number: fetch smaller boxes"
                )
            moved = file.transform @ rasterio.Affine.translation(left, top)
            return cls(crs=file.crs, transform=moved, width=width, height=height)


def _opened(rasterio: ModuleType, asset: _Asset) -> Any:  # noqa: ANN401 (a dataset)
    """The file of an asset.

    Raises:
        StackError: the file cannot be opened; the message names the item and the asset.
    """
    try:
        return rasterio.open(asset.href)
    except rasterio.errors.RasterioError as error:
        raise _unread(asset, error) from error


def _unread(asset: _Asset, error: Exception) -> StackError:
    return StackError(
        f"item '{asset.item}', asset '{asset.key}' cannot be read from "
        f"{urlsplit(asset.href).netloc or asset.href}: {str(error)[:200]}; if the file needs a "
        "signature or a login, use a public collection such as those of Earth Search"
    )


def _read(rasterio: ModuleType, asset: _Asset, grid: _Grid, *, classes: bool) -> NDArray[np.uint16]:
    """An asset's values on the stack's grid, (H, W), uint16 as stored; 0 where it has no value."""
    import numpy as np

    with _opened(rasterio, asset) as file:
        step = ~file.transform @ grid.transform
        # Whole pixels of the same lattice are copied, and so are classes; else bilinear.
        same = (
            file.crs == grid.crs
            and math.isclose(step.a, 1, abs_tol=1e-6)
            and abs(step.c - round(step.c)) + abs(step.f - round(step.f)) < 1e-3
        )
        kinds = rasterio.enums.Resampling
        data = np.zeros((grid.height, grid.width), np.uint16)
        try:
            rasterio.warp.reproject(
                rasterio.band(file, 1),
                data,
                dst_crs=grid.crs,
                dst_transform=grid.transform,
                src_nodata=0,
                dst_nodata=0,
                resampling=kinds.nearest if same or classes else kinds.bilinear,
                tolerance=0,
            )
        except rasterio.errors.RasterioError as error:
            raise _unread(asset, error) from error
    return data


def _write_day(
    rasterio: ModuleType,
    folder: Path,
    day: str,
    items: Sequence[Mapping[str, Any]],
    bands: Sequence[str],
    grid: _Grid,
    url: str,
) -> Path | None:
    """The file of one day, fetched unless it exists; None if the box holds no value of that day."""
    import numpy as np

    path = folder / f"S2_{day.replace('-', '')}.tif"
    if path.exists():
        _check_same(rasterio, path, bands, grid)
        return path
    values = np.zeros((len(bands), grid.height, grid.width), np.uint16)
    assets = [[_asset(item, band) for band in bands] for item in items]
    first = assets[0]
    used = []
    with rasterio.Env(**_GDAL):
        for item, own in zip(items, assets, strict=True):
            empty = ~values.any(axis=0)
            if not empty.any():
                break
            read = [
                _read(rasterio, a, grid, classes=b == SCL) for a, b in zip(own, bands, strict=True)
            ]
            moved = [_as_first(data, a, f) for data, a, f in zip(read, own, first, strict=True)]
            np.copyto(values, np.stack(moved), where=empty)
            if any((empty & (data != 0)).any() for data in read):
                used.append(item)
        if not used:
            return None
        part = path.with_suffix(".part")
        _write(rasterio, part, values, bands, first, used[0], grid)
    item_path = path.with_suffix(".json")
    item_path.write_text(json.dumps(_item(path.name, used, bands, first, grid, url), indent=1))
    part.replace(path)  # last: a file of this name is complete
    return path


def _check_same(rasterio: ModuleType, path: Path, bands: Sequence[str], grid: _Grid) -> None:
    """Check that an existing file has the bands and the grid of the stack.

    Raises:
        StackError: the file has other bands or another grid.
    """
    with rasterio.open(path) as file:
        own = (file.descriptions, file.crs, file.transform, file.width, file.height)
    if own != (tuple(bands), grid.crs, grid.transform, grid.width, grid.height):
        raise StackError(
            f"{path} exists with other bands or another grid than requested: choose another "
            "folder, or remove the file"
        )


def _as_first(data: NDArray[np.uint16], asset: _Asset, first: _Asset) -> NDArray[np.uint16]:
    """Stored values of an asset, converted to the offset of the first item; 0 stays 0."""
    import numpy as np

    shift = round(((asset.offset or 0) - (first.offset or 0)) / first.scale)
    if not shift:
        return data
    moved = np.clip(data.astype(np.int32) + shift, 1, np.iinfo(np.uint16).max)
    return np.where(data == 0, 0, moved).astype(np.uint16)


def _write(
    rasterio: ModuleType,
    path: Path,
    values: NDArray[np.uint16],
    bands: Sequence[str],
    assets: Sequence[_Asset],
    item: Mapping[str, Any],
    grid: _Grid,
) -> None:
    reflectance = next(a for a, b in zip(assets, bands, strict=True) if b != SCL)
    with rasterio.open(
        path, "w", driver="GTiff", width=grid.width, height=grid.height, count=len(bands),
        dtype="uint16", crs=grid.crs, transform=grid.transform, nodata=0, compress="deflate",
        predictor=2, tiled=True, blockxsize=256, blockysize=256, interleave="band",
    ) as file:  # fmt: skip
        file.write(values)
        file.descriptions = tuple(bands)
        file.scales = tuple(1.0 if b == SCL else reflectance.scale for b in bands)
        file.offsets = tuple(0.0 if b == SCL else reflectance.offset or 0.0 for b in bands)
        file.update_tags(
            datetime=str(item["properties"]["datetime"]),
            scale=f"{reflectance.scale:g}",
            constellation="sentinel-2",
        )
        if reflectance.offset is not None:  # GDAL does not distinguish an offset of 0 from none
            file.update_tags(offset=f"{reflectance.offset:g}")


def _item(
    name: str,
    items: Sequence[Mapping[str, Any]],
    bands: Sequence[str],
    assets: Sequence[_Asset],
    grid: _Grid,
    url: str,
) -> dict[str, Any]:
    """The STAC item of a file: its bands, and links to the items that it was made from."""
    first, root = items[0], f"{url.rstrip('/')}/collections"
    covers = [item["properties"].get("eo:cloud_cover") for item in items]
    known = [cover for cover in covers if cover is not None]
    described = [
        {"name": band} if band == SCL else
        {"name": band, "raster:scale": asset.scale, "raster:offset": asset.offset or 0.0}
        for band, asset in zip(bands, assets, strict=True)
    ]  # fmt: skip
    return {
        "type": "Feature",
        "stac_version": "1.1.0",
        "stac_extensions": [
            "https://stac-extensions.github.io/eo/v2.0.0/schema.json",
            "https://stac-extensions.github.io/projection/v2.0.0/schema.json",
            "https://stac-extensions.github.io/raster/v2.0.0/schema.json",
        ],
        "id": name.removesuffix(".tif"),
        "bbox": first.get("bbox"),
        "geometry": first.get("geometry"),
        "properties": {
            "datetime": first["properties"]["datetime"],
            "constellation": "sentinel-2",
            **({"eo:cloud_cover": max(known)} if known else {}),
            "proj:code": str(grid.crs),
            "proj:shape": [grid.height, grid.width],
            "proj:transform": list(grid.transform[:6]),
        },
        "links": [
            {
                "rel": "derived_from",
                "href": f"{root}/{item.get('collection')}/items/{item['id']}",
            }
            for item in items
        ],
        "assets": {
            "data": {
                "href": f"./{name}",
                "type": "image/tiff; application=geotiff",
                "roles": ["data"],
                "nodata": 0,
                "data_type": "uint16",
                "bands": described,
            }
        },
    }

"""Kit of STAC tests: COGs of real stacks, items as providers write them, an API, a range server.

The API is stac-fastapi over a list of items; what it leaves to its backend (which items a search
means, and pages) is here. The range server counts the requested bytes.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import attr
import numpy as np
import rasterio
import rasterio.shutil
import rasterio.warp
import uvicorn
from affine import Affine
from rasterio.io import MemoryFile
from stac_fastapi.api.app import StacApi
from stac_fastapi.api.models import create_get_request_model, create_post_request_model
from stac_fastapi.extensions.pagination import TokenPaginationExtension
from stac_fastapi.extensions.query import QueryExtension
from stac_fastapi.types.config import ApiSettings
from stac_fastapi.types.core import BaseCoreClient

from tests.kits.patience import PATIENCE

Item = dict[str, Any]
BLOCK = 128
"""Rows and columns of a tile of the COGs: small, so that a window needs few of many."""


# Files ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Acquisition:
    """One date of a stack, as one COG per band; SCL at 20 m."""

    day: str
    """The time of acquisition, ISO."""
    paths: Mapping[str, Path]
    """By band: B02, B03, B04, B08, SCL."""
    bbox: list[float]
    epsg: int
    shape: list[int]
    transform: list[float]


def write_cogs(stack: Path, folder: Path, tile: str, *, raised: int = 0) -> Acquisition:
    """Split a file of a stack into COGs without names, dates or scale in them.

    Args:
        stack: one date, its bands described, SCL last.
        folder: created; where the COGs go.
        tile: the MGRS tile for the names.
        raised: added to each number that is not missing, as products since 2022 have it.
    """
    folder.mkdir(parents=True)
    with rasterio.open(stack) as file:
        data = dict(zip(file.descriptions, file.read(), strict=True))
        day = file.tags()["datetime"]
        crs, transform, shape, bounds = file.crs, file.transform, file.shape, file.bounds
    paths = {}
    for band, values in data.items():
        own, step = values, 1
        if band == "SCL":
            own, step = values[::2, ::2].astype(np.uint8), 2
        elif raised:
            own = np.where(values == 0, 0, values + raised).astype(values.dtype)
        name = f"T{tile}_{day[:10].replace('-', '')}T105031_{band}_{10 * step}m.tif"
        paths[band] = write_cog(folder / name, own, crs, transform @ transform.scale(step))
    box = rasterio.warp.transform_bounds(crs, "EPSG:4326", *bounds)
    return Acquisition(
        day=day if "T" in day else f"{day}T10:50:31",
        paths=paths,
        bbox=list(box),
        epsg=crs.to_epsg(),
        shape=list(shape),
        transform=list(transform[:6]),
    )


def write_cog(path: Path, values: np.ndarray, crs: Any, transform: Any) -> Path:
    """One band as a COG with overviews."""
    height, width = values.shape
    with MemoryFile() as memory:
        with memory.open(
            driver="GTiff", width=width, height=height, count=1, dtype=values.dtype, crs=crs,
            transform=transform, nodata=0,
        ) as file:  # fmt: skip
            file.write(values, 1)
        with memory.open() as file:
            rasterio.shutil.copy(
                file, path, driver="COG", compress="DEFLATE", blocksize=BLOCK, overview_count=2
            )
    return path


# Items, as providers write them -----------------------------------------------------------------

_COLOURS = {"B02": "blue", "B03": "green", "B04": "red", "B08": "nir"}


def write_columns(at: Acquisition, folder: Path, left: int, right: int) -> dict[str, Path]:
    """Some columns of an acquisition, as a tile that covers them has them.

    Args:
        at: its SCL has pixels of twice the size.
        folder: of the new files; it is made.
        left: first column, of the bands of 10 m.
        right: column after the last.

    Returns:
        The new files by band.
    """
    folder.mkdir()
    paths = {}
    for band, path in at.paths.items():
        step = 2 if band == "SCL" else 1
        with rasterio.open(path) as file:
            part = file.read(1)[:, left // step : right // step]
            moved = file.transform @ Affine.translation(left // step, 0)
            paths[band] = write_cog(folder / path.name, part, file.crs, moved)
    return paths


def _feature(at: Acquisition, id_: str, version: str, **rest: Any) -> Item:
    west, south, east, north = at.bbox
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    return {
        "type": "Feature",
        "stac_version": version,
        "id": id_,
        "bbox": at.bbox,
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "links": [],
        **rest,
    }


def earth_search(at: Acquisition, base: str, *, tile: str = "31UES", cloud: float = 3.0) -> Item:
    """An item of Earth Search v1, collection sentinel-2-l2a: STAC 1.0, common names as keys.

    Before processing baseline 04.00 its raster:bands state an offset of 0.
    """
    day = at.day[:10].replace("-", "")
    assets: dict[str, Any] = {}
    for band, path in at.paths.items():
        key, step = (_COLOURS[band], 1) if band in _COLOURS else ("scl", 2)
        stated = {"nodata": 0, "spatial_resolution": 10 * step}
        asset = {
            "href": f"{base}/{path.name}",
            "type": "image/tiff; application=geotiff; profile=cloud-optimized",
            "proj:shape": [side // step for side in at.shape],
            "proj:transform": [10 * step, 0, at.transform[2], 0, -10 * step, at.transform[5]],
            "roles": ["data", "reflectance"],
        }
        if step == 1:
            asset["eo:bands"] = [{"name": key, "common_name": key}]
            asset["gsd"] = 10
            stated |= {"data_type": "uint16", "scale": 0.0001, "offset": 0}
        asset["raster:bands"] = [stated]
        assets[key] = asset
        # Beside each COG stands the product's own file, in a bucket where the reader pays.
        jp2 = {"href": f"s3://sentinel-s2-l2a/tiles/{band}.jp2", "type": "image/jp2"}
        assets[f"{key}-jp2"] = {**asset, **jp2}
    three = [{"name": name, "common_name": name} for name in ("red", "green", "blue")]
    assets["visual"] = {
        "href": f"{base}/TCI.tif",
        "type": "image/tiff; application=geotiff; profile=cloud-optimized",
        "eo:bands": three,
        "roles": ["visual"],
    }
    assets["thumbnail"] = {
        "href": f"{base}/thumbnail.jpg", "type": "image/jpeg", "roles": ["thumbnail"],
    }  # fmt: skip
    return _feature(
        at,
        f"S2A_{tile}_{day}_0_L2A",
        "1.0.0",
        collection="sentinel-2-l2a",
        properties={
            "datetime": f"{at.day}Z",
            "platform": "sentinel-2a",
            "constellation": "sentinel-2",
            "eo:cloud_cover": cloud,
            "proj:epsg": at.epsg,
            "s2:processing_baseline": "02.07",
            "earthsearch:boa_offset_applied": False,
        },
        assets=assets,
    )


def planetary_computer(at: Acquisition, base: str, *, tile: str = "31UES") -> Item:
    """An item of Microsoft's Planetary Computer: STAC 1.0, band codes as keys, no raster:bands."""
    day = at.day[:10].replace("-", "")
    assets: dict[str, Any] = {}
    for band, path in at.paths.items():
        step = 2 if band == "SCL" else 1
        assets[band] = {
            "href": f"{base}/{path.name}",
            "type": "image/tiff; application=geotiff; profile=cloud-optimized",
            "proj:bbox": at.bbox,
            "proj:shape": [side // step for side in at.shape],
            "proj:transform": [10.0 * step, 0.0, at.transform[2], 0.0, -10.0 * step,
                               at.transform[5]],
            "roles": ["data"],
        }  # fmt: skip
        if step == 1:
            assets[band]["gsd"] = 10.0
            assets[band]["eo:bands"] = [{"name": band, "common_name": _COLOURS[band]}]
    assets["visual"] = {
        "href": f"{base}/TCI.tif",
        "type": "image/tiff; application=geotiff; profile=cloud-optimized",
        "eo:bands": [{"name": name} for name in ("B04", "B03", "B02")],
        "roles": ["data"],
    }
    return _feature(
        at,
        f"S2A_MSIL2A_{day}T105031_R051_T{tile}_20201011T224419",
        "1.0.0",
        collection="sentinel-2-l2a",
        properties={
            "datetime": f"{at.day}.024000Z",
            "platform": "Sentinel-2A",
            "constellation": "Sentinel 2",
            "instruments": ["msi"],
            "eo:cloud_cover": 3.2,
            "proj:epsg": at.epsg,
            "s2:processing_baseline": "02.12",
        },
        assets=assets,
    )


def copernicus(at: Acquisition, base: str, *, tile: str = "31UES") -> Item:
    """An item of the Copernicus Data Space: STAC 1.1, pixel size in the key, S3 beside HTTPS."""
    day = at.day[:10].replace("-", "")
    assets: dict[str, Any] = {}
    for band, path in at.paths.items():
        step = 2 if band == "SCL" else 1
        asset: dict[str, Any] = {
            "href": f"s3://eodata/Sentinel-2/MSI/L2A/{path.name}",
            "type": "image/tiff; application=geotiff; profile=cloud-optimized",
            "gsd": 10 * step,
            "nodata": 0,
            "data_type": "uint16" if step == 1 else "uint8",
            "proj:code": f"EPSG:{at.epsg}",
            "proj:shape": [side // step for side in at.shape],
            "proj:transform": [10 * step, 0, at.transform[2], 0, -10 * step, at.transform[5]],
            "roles": ["data"],
            "alternate": {"https": {"href": f"{base}/{path.name}"}},
        }
        if step == 1:
            asset["bands"] = [{"name": band, "eo:common_name": _COLOURS[band]}]
            asset |= {"raster:scale": 0.0001, "raster:offset": -0.1}
        assets[f"{band}_{10 * step}m"] = asset
        if step == 1:  # the product's coarser copy of the band
            coarse = {"href": f"s3://eodata/{band}_20m.tif", "gsd": 20, "alternate": {}}
            assets[f"{band}_20m"] = {**asset, **coarse}
    assets["product_metadata"] = {
        "href": f"{base}/MTD_MSIL2A.xml", "type": "application/xml", "roles": ["metadata"],
    }  # fmt: skip
    return _feature(
        at,
        f"S2A_MSIL2A_{day}T105031_N0500_R051_T{tile}_20230905T171553",
        "1.1.0",
        collection="sentinel-2-l2a",
        properties={
            "datetime": f"{at.day}.024000Z",
            "platform": "sentinel-2a",
            "constellation": "sentinel-2",
            "eo:cloud_cover": 3.21,
            "proj:code": f"EPSG:{at.epsg}",
            "processing:version": "05.00",
        },
        assets=assets,
    )


# The API ------------------------------------------------------------------------------------------


@attr.s
class Catalogue(BaseCoreClient):
    """The backend of stac-fastapi: a list of items."""

    items: list[Item] = attr.ib(factory=list)
    page: int = attr.ib(default=100)
    """Most items of one page, whatever limit is requested."""
    searches: list[Mapping[str, Any]] = attr.ib(factory=list)
    """The search parameters, page by page."""

    def post_search(self, search_request: Any, **kwargs: Any) -> dict[str, Any]:
        search = search_request
        self.searches.append(search.model_dump(mode="json", exclude_none=True))
        token = int(getattr(search, "token", None) or 0)
        found = [item for item in self.items if _matches(item, search)]
        limit = min(search.limit or 10, self.page)
        links = []
        if token + limit < len(found):
            body = {**self.searches[-1], "token": str(token + limit)}
            url = str(kwargs["request"].url)
            links = [{"rel": "next", "href": url, "method": "POST", "body": body}]
        return {
            "type": "FeatureCollection",
            "features": found[token : token + limit],
            "links": links,
            "numberMatched": len(found),
            "numberReturned": len(found[token : token + limit]),
        }

    def get_search(self, **kwargs: Any) -> dict[str, Any]:
        raise NotImplementedError

    def get_item(self, item_id: str, collection_id: str, **kwargs: Any) -> Item:
        return next(item for item in self.items if item["id"] == item_id)

    def all_collections(self, **kwargs: Any) -> dict[str, Any]:
        return {"collections": [], "links": []}

    def get_collection(self, collection_id: str, **kwargs: Any) -> dict[str, Any]:
        raise NotImplementedError

    def item_collection(self, collection_id: str, **kwargs: Any) -> dict[str, Any]:
        raise NotImplementedError


def _matches(item: Item, search: Any) -> bool:
    west, south, east, north = item["bbox"]
    if search.bbox:
        w, s, e, n = search.bbox
        if west > e or w > east or south > n or s > north:
            return False
    if search.intersects:
        (ring,) = search.intersects.coordinates
        xs, ys = [p[0] for p in ring], [p[1] for p in ring]
        if west > max(xs) or min(xs) > east or south > max(ys) or min(ys) > north:
            return False
    if search.collections and item["collection"] not in search.collections:
        return False
    if search.ids and item["id"] not in search.ids:
        return False
    day = datetime.fromisoformat(item["properties"]["datetime"])
    if (search.start_date and day < search.start_date) or (
        search.end_date and day > search.end_date
    ):
        return False
    limits = getattr(search, "query", None) or {}
    for name, rules in limits.items():
        ((rule, value),) = rules.items()
        assert rule == "lte", f"this backend does not support {rule}"
        if item["properties"][name] > value:
            return False
    return True


@contextmanager
def stac_api(items: Sequence[Item]) -> Iterator[tuple[str, Catalogue]]:
    """A STAC API over items on loopback: its landing page, and its backend."""
    extensions = [QueryExtension(), TokenPaginationExtension()]
    catalogue = Catalogue(
        items=json.loads(json.dumps(list(items))), extensions=extensions, landing_page_id="kit",
        title="Kit", description="Items of the kit",
    )  # fmt: skip
    api = StacApi(
        settings=ApiSettings(enable_response_models=False),
        client=catalogue,
        extensions=extensions,
        search_get_request_model=create_get_request_model(extensions),
        search_post_request_model=create_post_request_model(extensions),
    )
    server = uvicorn.Server(uvicorn.Config(api.app, port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the STAC API did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/", catalogue
    finally:
        server.should_exit = True
        thread.join(PATIENCE)

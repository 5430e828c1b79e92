"""Requests by STAC: items and searches, read in part over HTTP, against the same files sent."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import rasterio
import rasterio.warp
from affine import Affine
from rasterio.io import MemoryFile
from rasterio.windows import Window, from_bounds

from benchmarks.serving import served
from benchmarks.tiny_zoo import write_bundle
from pimc_client import Client, StacItems, StacSearch
from service.read.blocks import FIRST_BYTES
from tests.kits import stac as kit
from tests.kits.jobs import waited
from tests.kits.ranges import RangeServer, range_server
from tests.kits.stac import Acquisition, Catalogue, Item

pytestmark = pytest.mark.slow

FORMS = {
    "earth-search": kit.earth_search,
    "planetary-computer": kit.planetary_computer,
    "copernicus": kit.copernicus,
}
JSON = {"Accept": "application/json"}
MAX_ITEMS = 12


@dataclass(frozen=True, kw_only=True)
class World:
    """A service, a STAC API, and a range server with COGs of real stacks."""

    service: httpx.Client
    api: str
    """The landing page of the STAC API."""
    catalogue: Catalogue
    web: RangeServer
    flanders: tuple[Acquisition, ...]
    tyrol: tuple[Acquisition, ...]

    def items(self, form: str, which: Sequence[Acquisition]) -> list[Item]:
        """Items of acquisitions, as a provider writes them."""
        return [FORMS[form](at, self.url(at)) for at in which]

    def url(self, at: Acquisition) -> str:
        folder = at.paths["B04"].parent
        return f"{self.web.url}/{folder.relative_to(self.web.folder)}"

    def sent(self, which: Sequence[Acquisition], **options: Any) -> httpx.Response:
        """The response to the same files as uploads."""
        files = [
            ("files", (f"S2A_31UES_{at.day[:10]}/{path.name}", path.read_bytes()))
            for at in which
            for band, path in at.paths.items()
            if band != "B03"
        ]
        return self.service.post("/classify-pixels", files=files, data=options)

    def named(self, stac: object, headers: dict[str, str] | None = None, **options: Any) -> Any:
        body = {"stac": stac, **options}
        return self.service.post("/classify-pixels", json=body, headers=headers)


@pytest.fixture(scope="module")
def world(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("web")
    zoo = tmp_path_factory.mktemp("zoo")
    write_bundle(zoo, "pixels-landcover", "classify-pixels", "pixel")
    chips = sorted((shared_data / "flanders_2017_2018").glob("S2_*_2018*"))[::15]
    scenes = sorted((shared_data / "south_tyrol_2022").glob("S2_L2A*.tif"))[:3]
    flanders = tuple(
        kit.write_cogs(path, root / f"flanders{n}", "31UES") for n, path in enumerate(chips)
    )
    tyrol = tuple(
        kit.write_cogs(path, root / f"tyrol{n}", "32TPS") for n, path in enumerate(scenes)
    )
    with ExitStack() as stack:
        web = stack.enter_context(range_server(root))
        items = [
            kit.earth_search(at, f"{web.url}/{at.paths['B04'].parent.name}", cloud=float(10 * n))
            for n, at in enumerate(flanders)
        ]
        items += [kit.earth_search(at, f"{web.url}/tyrol{n}") for n, at in enumerate(tyrol)]
        api, catalogue = stack.enter_context(kit.stac_api(items))
        hosts = f"127.0.0.1:{httpx.URL(web.url).port},127.0.0.1:{httpx.URL(api).port}"
        service = stack.enter_context(
            served(model_dir=zoo, allowed_hosts=hosts, max_items=MAX_ITEMS)
        )
        yield World(
            service=service, api=api, catalogue=catalogue, web=web, flanders=flanders, tyrol=tyrol
        )


def collection(items: Sequence[Item]) -> dict[str, Any]:
    return {"type": "FeatureCollection", "features": list(items)}


def problem(response: httpx.Response, code: str) -> str:
    assert response.json()["code"] == code, response.text
    return str(response.json()["detail"])


def codes(response: httpx.Response) -> list[str]:
    return [warning["code"] for warning in response.json()["warnings"]]


# The same as the files sent ---------------------------------------------------------------------


@pytest.mark.parametrize("form", ["earth-search", "planetary-computer"])
def test_items_give_what_their_files_give(world: World, form: str) -> None:
    items = world.items(form, world.flanders)
    named = world.named(collection(items))
    sent = world.sent(world.flanders)
    assert (sent.status_code, named.status_code) == (200, 200), named.text
    assert named.content == sent.content
    document = world.named(collection(items), JSON).json()
    assert document["mask"] == "scl"
    assert [source["id"] for source in document["sources"]] == [item["id"] for item in items]
    assert document["sources"][0]["datetime"] == items[0]["properties"]["datetime"]


@contextmanager
def raised(world: World, shared_data: Path, name: str) -> Iterator[list[Acquisition]]:
    """The Flanders dates as products of processing baseline 04.00 and later store them."""
    chips = sorted((shared_data / "flanders_2017_2018").glob("S2_*_2018*"))[::15]
    yield [
        kit.write_cogs(path, world.web.folder / f"{name}{n}", "31UES", raised=1000)
        for n, path in enumerate(chips)
    ]


def test_the_offset_that_items_of_copernicus_state_is_applied(
    world: World, shared_data: Path
) -> None:
    with raised(world, shared_data, "cdse") as which:
        named = world.named(collection(world.items("copernicus", which)))
        response = world.named(collection(world.items("copernicus", which)), JSON)
    assert named.content == world.sent(world.flanders).content
    assert "offset_applied" in codes(response)


def test_the_offset_that_follows_from_the_processing_baseline_is_applied(
    world: World, shared_data: Path
) -> None:
    with raised(world, shared_data, "pc") as which:
        items = world.items("planetary-computer", which)
        for item in items:
            item["properties"]["s2:processing_baseline"] = "04.00"
        named = world.named(collection(items))
        response = world.named(collection(items), JSON)
    assert named.content == world.sent(world.flanders).content
    (warning,) = [w for w in response.json()["warnings"] if w["code"] == "offset_applied"]
    assert "processing baseline 04.00" in warning["detail"]


def test_an_offset_that_earth_search_has_applied_is_not_applied_again(world: World) -> None:
    """Since 2022 its raster:bands state -0.1 beside earthsearch:boa_offset_applied = true."""
    items = world.items("earth-search", world.flanders)
    for item in items:
        item["properties"] |= {
            "s2:processing_baseline": "05.09",
            "earthsearch:boa_offset_applied": True,
        }
        for asset in item["assets"].values():
            for band in asset.get("raster:bands", ()):
                band["offset"] = -0.1
    assert world.named(collection(items)).content == world.sent(world.flanders).content
    response = world.named(collection(items), JSON).json()["warnings"]
    (warning,) = [w for w in response if w["code"] == "baseline_offset_suspected"]
    assert "boa_offset_applied is true" in warning["detail"]


def test_a_job_keeps_what_was_fetched(world: World) -> None:
    items = collection(world.items("earth-search", world.flanders))
    at_once = world.named(items, JSON)
    job = world.named(items, {**JSON, "Prefer": "respond-async"})
    assert job.status_code == 202, job.text
    name = job.json()["jobID"]
    assert waited(world.service, name)["status"] == "successful"
    result = world.service.get(f"/jobs/{name}/result", headers=JSON).json()
    assert result == at_once.json()


# Only what is needed ----------------------------------------------------------------------------


def box_of(at: Acquisition, window: Window) -> list[float]:
    """West, south, east, north of a window's pixels, in degrees."""
    bounds = rasterio.windows.bounds(window, Affine(*at.transform))
    return list(rasterio.warp.transform_bounds(f"EPSG:{at.epsg}", "EPSG:4326", *bounds))


def blocks(path: Path, bounds: tuple[float, ...], *, beyond: int) -> dict[tuple[int, int], int]:
    """Offset and size of the blocks of the full resolution that an area needs, as GDAL has them."""
    with rasterio.open(path) as file:
        window = from_bounds(*bounds, transform=file.transform).round_offsets().round_lengths()
        rows = range(max(0, window.row_off - beyond), window.row_off + window.height + beyond)
        columns = range(max(0, window.col_off - beyond), window.col_off + window.width + beyond)
        found = {}
        for place, _ in file.block_windows(1):
            row, column = place
            if row * kit.BLOCK > rows[-1] or (row + 1) * kit.BLOCK <= rows[0]:
                continue
            if column * kit.BLOCK > columns[-1] or (column + 1) * kit.BLOCK <= columns[0]:
                continue
            offset, size = (
                int(file.get_tag_item(f"BLOCK_{what}_{column}_{row}", "TIFF", bidx=1))
                for what in ("OFFSET", "SIZE")
            )
            found[offset, size] = size
        return found


def test_no_more_is_read_than_directories_and_the_blocks_of_the_area(world: World) -> None:
    first = world.tyrol[0]
    bbox = box_of(first, Window(330, 340, 150, 60))
    items = world.items("earth-search", world.tyrol)
    world.web.requests.clear()
    named = world.named(collection(items), bbox=bbox)
    assert named.status_code == 200, named.text
    with MemoryFile(named.content) as memory, memory.open() as response:
        bounds = response.bounds
        assert (150, 60) < (response.width, response.height) < (300, 200)
    read = total = 0
    for at in world.tyrol:
        for band, path in at.paths.items():
            name = str(path.relative_to(world.web.folder))
            seen = [span for file, *span in world.web.requests if file == name]
            if band == "B03":  # the model does not take it
                assert seen == []
                continue
            read += world.web.bytes_of(name)
            total += path.stat().st_size
            if path.stat().st_size <= FIRST_BYTES:
                assert seen == [[0, path.stat().st_size]]
                continue
            head, *rest = sorted(seen)
            assert head == [0, FIRST_BYTES]
            # SCL is coarser, so it is warped, and the kernel reaches beyond.
            needed = blocks(path, bounds, beyond=5 if band == "SCL" else 0)
            exact = blocks(path, bounds, beyond=0)
            got = world.web.bytes_of(name) - FIRST_BYTES
            assert sum(exact.values()) <= got <= sum(needed.values()) + 8 * len(needed)
            for begin, end in rest:
                assert any(begin <= offset and offset + size <= end for offset, size in needed)
    assert read < total / 3
    sent = world.sent(world.tyrol, bbox=",".join(map(str, bbox)))
    assert named.content == sent.content


@pytest.mark.parametrize("corner", [(0, 0), (575, 805), (255, 383)])
def test_every_part_is_that_of_the_files_sent(world: World, corner: tuple[int, int]) -> None:
    row, column = corner
    bbox = box_of(world.tyrol[0], Window(column, row, 128, 128))
    items = world.items("earth-search", world.tyrol)
    named = world.named(collection(items), bbox=bbox)
    assert named.status_code == 200, named.text
    assert named.content == world.sent(world.tyrol, bbox=",".join(map(str, bbox))).content


@pytest.mark.parametrize("grid", ["EPSG:32631@30", "EPSG:3857@25", "EPSG:4326@0.001"])
def test_another_grid_reads_what_its_kernel_needs(world: World, grid: str) -> None:
    bbox = box_of(world.tyrol[0], Window(400, 200, 90, 70))
    items = world.items("earth-search", world.tyrol)
    named = world.named(collection(items), bbox=bbox, grid=grid)
    assert named.status_code == 200, named.text
    sent = world.sent(world.tyrol, bbox=",".join(map(str, bbox)), grid=grid)
    assert named.content == sent.content


def test_points_and_polygons_are_read_with_little_around_them(world: World) -> None:
    lon, lat, *_ = box_of(world.tyrol[0], Window(150, 150, 1, 1))
    place = {"type": "Point", "coordinates": [lon, lat]}
    points = {
        "type": "FeatureCollection",
        "features": [{"type": "Feature", "properties": {}, "geometry": place}],
    }
    items = collection(world.items("earth-search", world.tyrol))
    world.web.requests.clear()
    named = world.named(items, points=points)
    read = sum(end - begin for _, begin, end in world.web.requests)
    assert named.status_code == 200, named.text
    total = sum(path.stat().st_size for at in world.tyrol for path in at.paths.values())
    assert read < total / 2
    sent = world.sent(world.tyrol, points=json.dumps(points))
    assert named.json()["features"] == sent.json()["features"]
    ring = [[lon, lat], [lon + 0.002, lat], [lon + 0.002, lat + 0.002], [lon, lat]]
    polygon = {"type": "Polygon", "coordinates": [ring]}
    fields = {
        "type": "FeatureCollection",
        "features": [{"type": "Feature", "properties": {}, "geometry": polygon}],
    }
    named = world.named(items, {"Accept": "application/geo+json"}, fields=fields)
    assert named.status_code == 200, named.text
    assert named.json()["features"][0]["properties"]["pixels"] > 100
    assert len(named.json()["sources"]) == len(world.tyrol)


def test_measured_series_of_items(world: World) -> None:
    """No model: every band of the item, of the blocks around the places."""
    lon, lat, *_ = box_of(world.tyrol[0], Window(150, 150, 1, 1))
    place = {"type": "Point", "coordinates": [lon, lat]}
    feature = {"type": "Feature", "properties": {}, "geometry": place}
    body = {
        "stac": collection(world.items("earth-search", world.tyrol)),
        "points": {"type": "FeatureCollection", "features": [feature]},
    }
    response = world.service.post("/series", json=body)
    assert response.status_code == 200, response.text
    document = response.json()
    assert document["bands"] == ["B02", "B04", "B08", "B03"]
    assert document["dates"] == [at.day[:10] for at in world.tyrol]
    assert len(document["sources"]) == len(world.tyrol)


def test_own_classes_of_items_are_those_of_their_files(world: World) -> None:
    pixels = [(row, col) for row in range(4, 60, 9) for col in range(4, 60, 9)]
    with rasterio.open(world.flanders[0].paths["B04"]) as raster:
        xs, ys = zip(*(raster.xy(*pixel) for pixel in pixels), strict=True)
        places = zip(*rasterio.warp.transform(raster.crs, "EPSG:4326", xs, ys), strict=True)
    labels = [
        {
            "type": "Feature",
            "geometry": {"type": "Point", "coordinates": list(place)},
            "properties": {"class": "even" if n % 2 else "odd"},
        }
        for n, place in enumerate(places)
    ]
    features = {"type": "FeatureCollection", "features": labels}
    named = {"stac": collection(world.items("earth-search", world.flanders)), "labels": features}
    files = [
        ("files", (f"S2A_31UES_{at.day[:10]}/{path.name}", path.read_bytes()))
        for at in world.flanders
        for path in at.paths.values()
    ]
    by_stac = world.service.post("/heads", json={"name": "by-stac", **named})
    by_files = world.service.post(
        "/heads", files=files, data={"name": "by-files", "labels": json.dumps(features)}
    )
    assert (by_stac.status_code, by_files.status_code) == (201, 201), by_stac.text
    cards = [response.json()["card"] for response in (by_stac, by_files)]
    assert cards[0]["sha256"] == cards[1]["sha256"]
    assert cards[0]["metrics"] == cards[1]["metrics"]
    mapped = world.named(named["stac"], model="by-stac")
    assert mapped.status_code == 200, mapped.text
    assert mapped.headers["PIMC-Model"] == "by-stac@1.0.0"
    for name in ("by-stac", "by-files"):
        assert world.service.delete(f"/heads/{name}").status_code == 204


def test_tiles_of_one_crs_are_brought_together(world: World) -> None:
    """Two overlapping tiles, each with its own item, give what the whole scene gives."""
    at = world.tyrol[0]
    tiles = []
    for name, left, right in (("west", 0, 500), ("east", 400, 935)):
        paths = kit.write_columns(at, world.web.folder / name, left, right)
        window = Window(left, 0, right - left, at.shape[0])
        box = box_of(at, window)
        tiles.append(Acquisition(**{**vars(at), "paths": paths, "bbox": box}))
    items = [
        kit.earth_search(tile, f"{world.web.url}/{name}", tile=number)
        for tile, name, number in zip(tiles, ("west", "east"), ("32TPS", "32TQS"), strict=True)
    ]
    more = world.items("earth-search", world.tyrol[1:])
    bbox = box_of(at, Window(380, 100, 160, 90))
    named = world.named(collection([*items, *more]), bbox=bbox)
    assert named.status_code == 200, named.text
    sent = world.sent(world.tyrol, bbox=",".join(map(str, bbox)))
    assert pixels(named)[1] == pixels(sent)[1]
    assert (pixels(named)[0] == pixels(sent)[0]).all()
    assert len(np.unique(pixels(sent)[0])) > 1


def pixels(response: httpx.Response) -> tuple[np.ndarray, Affine]:
    with MemoryFile(response.content) as memory, memory.open() as file:
        return file.read(), file.transform


# Searches ---------------------------------------------------------------------------------------


def test_a_search_finds_what_the_items_are(world: World) -> None:
    world.catalogue.page = 2
    world.catalogue.searches.clear()
    search = {
        "url": world.api,
        "collections": ["sentinel-2-l2a"],
        "bbox": world.flanders[0].bbox,
        "datetime": "2018-01-01/2018-12-31",
    }
    try:
        response = world.named(search)
    finally:
        world.catalogue.page = 100
    assert response.status_code == 200, response.text
    assert response.content == world.sent(world.flanders).content
    assert len(world.catalogue.searches) == -(-len(world.flanders) // 2)  # page by page


def test_the_sdk_sends_items_and_searches(world: World) -> None:
    document = collection(world.items("earth-search", world.flanders))
    expected = world.named(document, JSON).json()["classes"]
    items = StacItems(items=document)
    search = StacSearch(
        url=world.api,
        collections=["sentinel-2-l2a"],
        bbox=world.flanders[0].bbox,
        datetime="2018-01-01/2018-12-31",
    )
    with Client(str(world.service.base_url)) as pimc:
        for files in (items, search):
            summary = pimc.classify_pixels(files, answer="summary")
            assert summary["classes"] == expected
            assert pimc.validate("classify-pixels", files)["valid"]


def test_a_search_takes_clouds_ids_and_shapes(world: World) -> None:
    west, south, east, north = world.flanders[0].bbox
    ring = [[west, south], [east, south], [east, north], [west, south]]
    search = {
        "url": world.api,
        "intersects": {"type": "Polygon", "coordinates": [ring]},
        "max_cloud_cover": 40,
    }
    world.catalogue.searches.clear()
    found = world.named(search, JSON).json()["sources"]
    assert len(found) == 5  # the n-th has 10 n per cent
    assert world.catalogue.searches[0]["query"] == {"eo:cloud_cover": {"lte": 40}}
    ids = [source["id"] for source in found][:4]
    named = world.named({"url": world.api, "ids": ids}, JSON)
    assert [source["id"] for source in named.json()["sources"]] == ids


def test_what_a_search_covers_is_what_is_read(world: World) -> None:
    bbox = box_of(world.tyrol[0], Window(300, 300, 60, 60))
    world.web.requests.clear()
    found = world.named({"url": world.api, "collections": ["sentinel-2-l2a"], "bbox": bbox})
    assert found.status_code == 200, found.text
    total = sum(path.stat().st_size for at in world.tyrol for path in at.paths.values())
    assert sum(end - begin for _, begin, end in world.web.requests) < total / 3
    items = collection(world.items("earth-search", world.tyrol))
    assert found.content == world.named(items, bbox=bbox).content


def test_an_item_collection_by_its_address(world: World) -> None:
    items = world.items("earth-search", world.flanders)
    for item in items:  # as a static catalogue has it: hrefs relative to the collection
        for asset in item["assets"].values():
            asset["href"] = asset["href"].removeprefix(f"{world.web.url}/")
    (world.web.folder / "items.json").write_text(json.dumps(collection(items)))
    named = world.named(f"{world.web.url}/items.json")
    assert named.status_code == 200, named.text
    assert named.content == world.sent(world.flanders).content


def test_bands_that_only_the_collection_names(world: World) -> None:
    """`item_assets` describe the assets of items whose own description lacks the bands."""
    items = world.items("earth-search", world.flanders)
    keys = {"blue": "first", "red": "second", "nir": "third", "scl": "fourth"}
    described = {
        key: {"eo:bands": [{"name": band}], "type": "image/tiff; application=geotiff"}
        for key, band in zip(keys.values(), ("B02", "B04", "B08", "SCL"), strict=True)
    }
    for item in items:
        own = item["assets"]
        item["assets"] = {new: {"href": own[old]["href"]} for old, new in keys.items()}
        links = [one for one in item.get("links", []) if one["rel"] != "collection"]
        item["links"] = [*links, {"rel": "collection", "href": f"{world.web.url}/collection.json"}]
    path = world.web.folder / "collection.json"
    about = {"type": "Collection", "stac_version": "1.1.0", "id": "c", "item_assets": described}
    path.write_text(json.dumps(about))
    named = world.named(collection(items), mask="scl")
    assert named.status_code == 200, named.text
    assert named.content == world.sent(world.flanders, mask="scl").content
    path.write_text(json.dumps({**about, "item_assets": {}}))
    detail = problem(world.named(collection(items)), "missing_bands")
    assert f"its collection {world.web.url}/collection.json has no `item_assets`" in detail
    for item in items:
        item["links"][-1]["href"] = "https://example.org/collection.json"
    detail = problem(world.named(collection(items)), "missing_bands")
    assert "its collection, which may name them, is not read" in detail
    assert "'example.org' is not an allowed host" in detail
    for item in items:
        del item["links"][-1]
    detail = problem(world.named(collection(items)), "missing_bands")
    assert "the item has no absolute link (rel=collection)" in detail


def test_relative_hrefs_need_a_link_to_the_item(world: World) -> None:
    (item,) = world.items("earth-search", world.flanders[:1])
    item["links"] = []
    for asset in item["assets"].values():
        asset["href"] = "./" + asset["href"].rpartition("/")[2]
    detail = problem(world.named(collection([item])), "forbidden_reference")
    assert f"item '{item['id']}', asset '" in detail
    assert ".tif' is relative, and the item has no link rel=self with an absolute URL" in detail
    assert "give absolute hrefs, add such a link, or give the URL of the item" in detail


# No other host ----------------------------------------------------------------------------------


@contextmanager
def served_by(world: World, reply: Any) -> Iterator[list[str]]:
    """The range server responds first by a function; yields the paths that were requested."""
    seen: list[str] = []

    def before(to: BaseHTTPRequestHandler) -> bool:
        seen.append(to.path)
        return bool(reply(to))

    world.web.before = before
    try:
        yield seen
    finally:
        world.web.before = lambda _: False


def send(to: BaseHTTPRequestHandler, document: object, status: int = 200, **headers: str) -> bool:
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    to.send_response(status)
    for name, value in headers.items():
        to.send_header(name, value)
    to.send_header("Content-Length", str(len(data)))
    to.end_headers()
    to.wfile.write(data)
    return True


def landing(search: str, root: str | None = None) -> dict[str, Any]:
    """A landing page whose search, or root, is elsewhere."""
    return {
        "type": "Catalog", "id": "x", "description": "x", "stac_version": "1.0.0",
        "conformsTo": ["https://api.stacspec.org/v1.0.0/core",
                       "https://api.stacspec.org/v1.0.0/item-search"],
        "links": [{"rel": "search", "href": search, "method": "POST",
                   "type": "application/geo+json"},
                  *([{"rel": "root", "href": root}] if root else [])],
    }  # fmt: skip


@pytest.mark.parametrize(
    "elsewhere",
    ["http://127.0.0.2/search", "http://localhost/search", "file:///etc/passwd",
     "http://169.254.169.254/latest", "ftp://127.0.0.1/x"],
)  # fmt: skip
def test_a_search_link_leads_nowhere_else(world: World, elsewhere: str) -> None:
    for document in (landing(elsewhere), landing(world.api, elsewhere)):
        with served_by(world, lambda to, page=document: send(to, page)):
            response = world.named({"url": f"{world.web.url}/api", "ids": ["x"]})
        problem(response, "forbidden_reference")


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_page_link_leads_nowhere_else(world: World, method: str) -> None:
    items = world.items("earth-search", world.flanders[:1])
    link = {"rel": "next", "href": "http://127.0.0.2:9/more", "method": method, "body": {}}
    page = {**collection(items), "links": [link]}

    def reply(to: BaseHTTPRequestHandler) -> bool:
        return send(to, landing(f"{world.web.url}/search") if to.command == "GET" else page)

    # The range server reads no POST of its own: this is all that it does with one.
    with posting(world), served_by(world, reply) as seen:
        response = world.named({"url": f"{world.web.url}/api", "ids": ["x"]})
    problem(response, "forbidden_reference")
    assert seen == ["/api", "/search"]


@contextmanager
def posting(world: World) -> Iterator[None]:
    """The range server takes POST as it takes GET."""
    handler = world.web.handler

    def do_post(to: BaseHTTPRequestHandler) -> None:
        to.rfile.read(int(to.headers["Content-Length"]))
        to.do_GET()  # type: ignore[attr-defined]

    handler.do_POST = do_post  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del handler.do_POST  # type: ignore[attr-defined]


def test_a_redirect_leads_nowhere_else(world: World) -> None:
    def reply(to: BaseHTTPRequestHandler) -> bool:
        return send(to, {}, 302, Location="http://127.0.0.2:9/x")

    items = collection(world.items("earth-search", world.flanders[:1]))
    with served_by(world, reply):
        for stac in (items, {"url": f"{world.web.url}/api"}, f"{world.web.url}/items.json"):
            problem(world.named(stac), "forbidden_reference")


def test_an_asset_elsewhere_is_refused_by_item_and_asset(world: World) -> None:
    (item,) = world.items("earth-search", world.flanders[:1])
    item["assets"]["red"]["href"] = "https://example.org/B04.tif"
    detail = problem(world.named(collection([item])), "forbidden_reference")
    assert f"item '{item['id']}', asset 'red'" in detail
    assert "'example.org' is not an allowed host" in detail
    (item,) = world.items("copernicus", world.flanders[:1])
    del item["assets"]["B04_10m"]["alternate"]
    detail = problem(world.named(collection([item])), "forbidden_reference")
    assert "eodata.s3.amazonaws.com" in detail


def test_references_are_off_until_allowed(tmp_path: Path) -> None:
    write_bundle(tmp_path, "pixels-landcover", "classify-pixels", "pixel")
    with served(model_dir=tmp_path) as service:
        for stac in ({"url": "http://127.0.0.1/"}, "http://127.0.0.1/x", {"type": "Feature"}):
            response = service.post("/classify-pixels", json={"stac": stac})
            assert "by reference" in problem(response, "forbidden_reference")


# What goes wrong says where and what to do ------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403, 409])
def test_an_asset_that_needs_a_signature_is_named(world: World, status: int) -> None:
    (item,) = world.items("planetary-computer", world.flanders[:1])
    with served_by(world, lambda to: send(to, b"<Error/>", status)):
        detail = problem(world.named(collection([item])), "unreachable_reference")
    assert f"item '{item['id']}', asset '" in detail
    assert "signature" in detail
    assert "planetary_computer.sign" in detail


def test_a_signed_asset_is_read_with_its_signature(world: World) -> None:
    signature = "?st=2026-01-01&se=2026-01-02&sig=a%2Bb%3D"
    # At paths of their own: requests of an earlier test may still arrive, without a signature.
    (world.web.folder / "signed").symlink_to(world.web.folder, target_is_directory=True)
    items = world.items("planetary-computer", world.flanders)
    for item in items:
        for asset in item["assets"].values():
            path = asset["href"].removeprefix(world.web.url)
            asset["href"] = f"{world.web.url}/signed{path}{signature}"
    signed, unsigned = [], []

    def reply(to: BaseHTTPRequestHandler) -> bool:
        if to.path.startswith("/signed/"):
            (signed if to.path.endswith(signature) else unsigned).append(to.path)
        return False

    with served_by(world, reply):
        named = world.named(collection(items))
    assert signed
    assert unsigned == []
    assert named.content == world.sent(world.flanders).content


def test_mistakes_are_told(world: World) -> None:
    items = world.items("earth-search", world.flanders)
    (poor,) = world.items("earth-search", world.flanders[:1])
    del poor["assets"]["nir"], poor["assets"]["nir-jp2"]
    detail = problem(world.named(collection([*items[1:], poor])), "missing_bands")
    assert f"item '{poor['id']}' has no asset for B08" in detail
    assert "blue" in detail
    detail = problem(world.named(collection(items), bbox=[10, 40, 11, 41]), "invalid_request")
    assert f"touches none of the {len(items)} items, whose extent is (3.0" in detail
    many = [{**items[0], "id": str(n)} for n in range(MAX_ITEMS + 1)]
    assert f"{MAX_ITEMS + 1} items" in problem(world.named(collection(many)), "invalid_request")
    found = world.named({"url": world.api, "collections": ["landsat"]})
    assert "finds no item" in problem(found, "invalid_request")
    assert "neither a STAC" in problem(world.named(f"{world.api}conformance"), "invalid_request")
    assert "not a STAC landing page" in problem(
        world.named({"url": f"{world.api}conformance"}), "unreachable_reference"
    )
    for stac in (
        {}, {"url": world.api, "bbox": [1, 2, 3]}, {"url": world.api, "datetime": "yesterday"},
        {"url": world.api, "datetime": "../.."}, {"type": "Polygon"}, 7, "", collection([]),
        {"url": world.api, "intersects": {"type": "Polygon"}}, {"url": world.api, "limit": 3},
        collection([7]), collection([{"id": "x"}]),
        {"url": world.api, "bbox": [1, 2, 3, 4], "intersects": {"coordinates": [1, 2]}},
    ):  # fmt: skip
        assert "stac" in problem(world.named(stac), "invalid_request")
    both = world.named(collection(items), items=[{"href": "http://127.0.0.1/x"}])
    problem(both, "invalid_request")
    assert "filter" in problem(
        world.named({"url": world.api, "filter": {"op": "=", "args": [1, 1]}}), "invalid_request"
    )


def test_more_items_than_allowed_end_a_search(world: World) -> None:
    world.catalogue.items += [
        {**world.catalogue.items[0], "id": f"more{n}"} for n in range(MAX_ITEMS)
    ]
    try:
        response = world.named({"url": world.api})
    finally:
        del world.catalogue.items[-MAX_ITEMS:]
    assert "PIMC_MAX_ITEMS" in problem(response, "invalid_request")


# The guide ---------------------------------------------------------------------------------------


def samples(language: str) -> list[str]:
    page = Path(__file__).parents[1] / "docs" / "how-to" / "stac.md"
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def here(world: World, sample: str) -> str:
    """A sample with the addresses of this machine in place of those on the page."""
    return sample.replace("https://earth-search.aws.element84.com/v1", world.api).replace(
        "http://127.0.0.1:8000", str(world.service.base_url).rstrip("/")
    )


def test_the_guides_search_and_items_do_what_they_say(world: World) -> None:
    (body,) = samples("json")
    found = world.service.post("/classify-pixels", json=json.loads(here(world, body)))
    assert found.status_code == 200, found.text
    program, _ = samples("py")  # the second is that of test_client_stack.py
    done = subprocess.run(
        [sys.executable, "-c", here(world, program)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == str(len(world.flanders))

"""Parts of remote COGs by `items`: bytes read, ranges kept for later requests, allowed buckets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from rasterio.io import MemoryFile
from rasterio.windows import Window

from benchmarks.remote import block_bytes, degrees, stack, write_cog
from benchmarks.serving import served
from benchmarks.tiny_zoo import write_zoo
from service.errors import ForbiddenReference
from service.read.blocks import FIRST_BYTES
from service.read.connect import RangeCache, Remote
from service.read.references import location_of
from service.settings import Settings
from tests.kits.marks import in_all_tests
from tests.kits.ranges import RangeServer, range_server

SIDE, BLOCK = 2048, 256


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RangeServer]:
    folder = tmp_path_factory.mktemp("web")
    write_cog(folder / "tile.tif", SIDE, BLOCK, Window(512, 512, 1024, 1024))
    with range_server(folder) as server:
        yield server


@pytest.fixture(scope="module")
def names(web: RangeServer) -> list[str]:
    return stack(web.folder, web.folder / "tile.tif", 2)


@pytest.fixture(scope="module")
def api(web: RangeServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    zoo = write_zoo(tmp_path_factory.mktemp("zoo"))
    hosts = "127.0.0.1"
    with served(model_dir=zoo, allowed_roots=(web.folder,), allowed_hosts=hosts) as client:
        yield client


def mapped(api: httpx.Client, hrefs: list[str], **options: Any) -> bytes:
    body = {"items": [{"href": href} for href in hrefs], "mask": "none", **options}
    response = api.post("/classify-pixels", content=json.dumps(body).encode(),
                        headers={"Content-Type": "application/json"})  # fmt: skip
    assert response.status_code == 200, response.text
    return response.content


@pytest.mark.parametrize(
    "window", [Window(600, 530, 300, 300), *in_all_tests(Window(512, 768, 256, 512))]
)
def test_a_part_reads_hardly_more_than_its_blocks(
    web: RangeServer, names: list[str], api: httpx.Client, window: Window
) -> None:
    web.requests.clear()
    bbox = degrees(window)
    by_url = mapped(api, [f"{web.url}/{name}" for name in names], bbox=bbox)
    assert by_url == mapped(api, [str(web.folder / name) for name in names], bbox=bbox)
    with MemoryFile(by_url) as memory, memory.open() as made:
        extent = made.bounds
        assert made.width >= window.width
    needed = block_bytes(web.folder / names[0], extent)
    for name in names:
        assert needed <= web.bytes_of(name) <= 1.3 * needed
    size = (web.folder / names[0]).stat().st_size
    assert needed < size


def test_without_a_part_the_files_come_whole(web: RangeServer, api: httpx.Client) -> None:
    folder = web.folder / "small"
    folder.mkdir()
    write_cog(folder / "tile.tif", 512, BLOCK, Window(0, 0, 512, 512))
    names = [f"small/{name}" for name in stack(folder, folder / "tile.tif", 2)]
    web.requests.clear()
    mapped(api, [f"{web.url}/{name}" for name in names])
    size = (web.folder / names[0]).stat().st_size
    assert sorted(web.requests) == sorted((name, 0, size) for name in names)


def test_ranges_of_a_tagged_file_are_kept_until_it_changes(
    web: RangeServer, names: list[str], api: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    hrefs = [f"{web.url}/{name}?kept" for name in names]
    bbox = degrees(Window(600, 600, 150, 150))

    def read() -> tuple[bytes, int]:
        web.requests.clear()
        content = mapped(api, hrefs, bbox=bbox)
        return content, sum(end - begin for _, begin, end in web.requests)

    for tag in ('"1"', '"2"'):
        monkeypatch.setattr(web, "tag", tag)
        first, all_bytes = read()
        again, of_heads = read()
        assert first == again
        assert of_heads == len(names) * FIRST_BYTES < all_bytes
    for tag in ('W/"3"', ""):
        monkeypatch.setattr(web, "tag", tag)
        assert read()[1] == read()[1] == all_bytes
    metrics = api.get("/metrics").text
    assert 'pimc_ranges_total{outcome="hit"}' in metrics
    assert 'pimc_read_bytes_total{source="fetched"}' in metrics


def test_the_cache_drops_what_was_used_least_recently() -> None:
    asked: list[str] = []
    cache = RangeCache(80, looked_up=asked.append)
    for number in range(8):
        cache.put((number,), bytes(10))
    assert cache.get((0,)) == bytes(10)
    cache.put((8,), bytes(10))
    assert cache.size == 80
    assert cache.get((1,)) is None
    assert cache.get((0,)) is not None
    cache.put((9,), bytes(11))  # more than an eighth
    assert cache.get((9,)) is None
    assert asked == ["hit", "miss", "hit", "miss"]
    assert RangeCache().largest == 0


def test_a_bucket_is_read_if_its_host_is_allowed() -> None:
    settings = Settings(allowed_hosts="tiles.s3.amazonaws.com")
    found = location_of("s3://tiles/31/U/ES/B04.tif", "items.0.href", settings)
    assert isinstance(found, Remote)
    assert str(found.url) == "https://tiles.s3.amazonaws.com/31/U/ES/B04.tif"
    for href in ("s3://other/B04.tif", "s3:///B04.tif", "s3://tiles@other/B04.tif"):
        with pytest.raises(ForbiddenReference):
            location_of(href, "items.0.href", settings)

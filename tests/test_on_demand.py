"""Remote files whose blocks are fetched when they are read: bytes at the server, equal results."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import anyio
import httpx
import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.windows import Window, bounds

from benchmarks.remote import CRS, TRANSFORM, block_bytes, degrees, stack, write_cog
from benchmarks.serving import served
from benchmarks.tiny_zoo import write_zoo
from service.api.schemas.parameter_types import Operation
from service.api.schemas.validation import read_parameters
from service.errors import Cancelled, ForbiddenReference, UnreachableReference
from service.read import on_demand
from service.read.blocks import FIRST_BYTES
from service.read.geotiff import BlockCache, SourceFile
from service.read.layouts import StackOptions
from service.read.on_demand import OnDemand
from service.read.reader import StackReader
from service.read.references import fetch_items
from service.read.stack import Stack, open_stack
from service.settings import Settings
from tests.kits.jobs import ASYNC, result, waited
from tests.kits.ranges import RangeServer, range_server

pytestmark = pytest.mark.slow

SIDE, BLOCK = 2048, 256
BANDS = ("B02", "B04", "B08")
HERE = Settings(allowed_hosts="127.0.0.1")


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RangeServer]:
    folder = tmp_path_factory.mktemp("web")
    write_cog(folder / "tile.tif", SIDE, BLOCK, Window(0, 0, SIDE, SIDE))
    with range_server(folder) as server:
        server.tag = '"1"'
        yield server


@pytest.fixture(scope="module")
def names(web: RangeServer) -> list[str]:
    return stack(web.folder, web.folder / "tile.tif", 3)


@pytest.fixture(scope="module")
def api(web: RangeServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    zoo = write_zoo(tmp_path_factory.mktemp("zoo"))
    with served(
        model_dir=zoo, allowed_roots=(web.folder,), allowed_hosts="127.0.0.1",
        memory_budget=384 * 2**20,  # windows of two blocks, as of a stack of eight dates
    ) as client:  # fmt: skip
        yield client


class Paths:
    """The files of a request, each time by URLs of its own, so that no range is in a cache."""

    _numbers = count()  # across tests, since they share the service and its cache

    def __init__(self, web: RangeServer, names: list[str]) -> None:
        self.web, self.names = web, names
        self.here = [str(web.folder / name) for name in names]

    def there(self) -> list[str]:
        number = next(self._numbers)
        return [f"{self.web.url}/{name}?{number}" for name in self.names]

    def read(self) -> list[int]:
        """Bytes that were sent of each file, since the last call."""
        sent = [self.web.bytes_of(name) for name in self.names]
        self.web.requests.clear()
        return sent

    def expected(self, response: httpx.Response) -> Any:
        """The document of a response to local files, with their names as those of remote ones."""
        return json.loads(response.text.replace(f"{str(self.web.folder).lstrip('/')}/", ""))

    @property
    def size(self) -> int:
        return Path(self.here[0]).stat().st_size


@pytest.fixture
def paths(web: RangeServer, names: list[str]) -> Paths:
    web.requests.clear()
    return Paths(web, names)


def point(column: float, row: float) -> dict[str, Any]:
    west, south, east, north = degrees(Window(column, row, 1, 1))
    at = {"type": "Point", "coordinates": [(west + east) / 2, (south + north) / 2]}
    return {"type": "Feature", "geometry": at, "properties": {}}


def field(window: Window) -> dict[str, Any]:
    west, south, east, north = degrees(window)
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    shape = {"type": "Polygon", "coordinates": [ring]}
    return {"type": "Feature", "geometry": shape, "properties": {}}


def collection(*features: dict[str, Any]) -> dict[str, Any]:
    return {"type": "FeatureCollection", "features": list(features)}


POINTS = collection(point(300, 300), point(1700, 40), point(301, 310))
FIELDS = collection(field(Window(520, 530, 40, 30)), field(Window(1400, 1300, 20, 60)))


def post(api: httpx.Client, path: str, hrefs: list[str], **body: Any) -> httpx.Response:
    items = [{"href": href} for href in hrefs]
    headers = body.pop("headers", {})
    response = api.post(path, json={"items": items, "mask": "none", **body}, headers=headers)
    assert response.status_code in {200, 201, 202}, response.text
    return response


# Requests -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "blocks"),
    [
        ("/classify-pixels", {"points": POINTS}, 2),
        ("/classify-pixels", {"fields": FIELDS}, 8),
        ("/series", {"points": POINTS}, 2),
        ("/series", {"fields": FIELDS}, 8),
    ],
)
def test_points_and_fields_read_the_blocks_around_them(
    api: httpx.Client, paths: Paths, path: str, body: dict[str, Any], blocks: int
) -> None:
    found = post(api, path, paths.there(), **body)
    read = paths.read()
    assert found.json() == paths.expected(post(api, path, paths.here, **body))
    # The sample of pixels by which scale and offset are checked lies in a few further blocks.
    largest = block_bytes(Path(paths.here[0]), bounds(Window(0, 0, BLOCK, BLOCK), TRANSFORM))
    for size in read:
        assert FIRST_BYTES < size < FIRST_BYTES + (blocks + 6) * 1.1 * largest
        assert size < 0.2 * paths.size


def test_a_validation_reads_no_more_than_a_sample(api: httpx.Client, paths: Paths) -> None:
    found = post(api, "/validate?task=classify-pixels", paths.there())
    assert found.json()["valid"], found.text
    assert max(paths.read()) < 0.2 * paths.size


def test_labels_read_the_blocks_around_them(api: httpx.Client, paths: Paths) -> None:
    labels = collection(*(point(300 + 9 * n, 300 + 7 * (n % 5)) for n in range(20)))
    for number, feature in enumerate(labels["features"]):
        feature["properties"] = {"class": "Wheat" if number % 2 else "Maize"}
    cards = []
    for name, hrefs in (("remote", paths.there()), ("local", paths.here)):
        card = post(api, "/heads", hrefs, name=name, labels=labels).json()["card"]
        cards.append(card["metrics"])
    assert cards[0] == cards[1]
    assert 0 < max(paths.read()) < 0.2 * paths.size


def test_a_job_of_points_reads_them_when_it_runs(api: httpx.Client, paths: Paths) -> None:
    accepted = post(api, "/classify-pixels", paths.there(), points=POINTS, headers=ASYNC)
    info = waited(api, accepted.json()["jobID"])
    assert info["status"] == "successful", info
    found = json.loads(result(api, info["jobID"]))
    assert found == paths.expected(post(api, "/classify-pixels", paths.here, points=POINTS))
    assert max(paths.read()) < 0.3 * paths.size


def test_requests_and_their_runs_share_one_cache(api: httpx.Client, paths: Paths) -> None:
    """A request fetches a part when it is accepted; a later run reads the same block on demand."""
    hrefs = paths.there()
    post(api, "/classify-pixels", hrefs, bbox=degrees(Window(300, 300, 40, 40)))
    blocks = {request for request in paths.web.requests if request[1] > 0}
    assert {name for name, _, _ in blocks} == set(paths.names)
    paths.web.requests.clear()
    post(api, "/classify-pixels", hrefs, points=collection(point(310, 320)))
    assert paths.web.requests  # the directories at least
    assert not blocks & set(paths.web.requests)


@pytest.mark.parametrize(
    ("task", "places", "of_places"),
    [
        ("classify-pixels", True, True),
        ("classify-pixels", False, False),
        ("series", True, True),
        ("similar", True, False),  # every pixel is compared with them
    ],
)
def test_results_of_places_are_read_on_demand(
    task: Operation, places: bool, of_places: bool
) -> None:
    given = {"points": [json.dumps(POINTS)]} if places else {}
    assert read_parameters(task, given).request(task, ()).of_places is of_places


def test_a_file_without_a_strong_tag_comes_at_once(
    api: httpx.Client, paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths.web, "tag", 'W/"1"')
    expected = paths.expected(post(api, "/classify-pixels", paths.here, points=POINTS))
    assert post(api, "/classify-pixels", paths.there(), points=POINTS).json() == expected
    assert min(paths.read()) > 0.5 * paths.size


def test_repeats_are_told_apart_by_the_files_that_they_name(
    api: httpx.Client, paths: Paths
) -> None:
    once = {**ASYNC, "Idempotency-Key": "on-demand"}
    hrefs = paths.there()
    first, again = (
        post(api, "/classify-pixels", hrefs, points=POINTS, headers=once).json() for _ in range(2)
    )
    assert first["jobID"] == again["jobID"]
    body = {"items": [{"href": h} for h in paths.there()], "mask": "none", "points": POINTS}
    other = api.post("/classify-pixels", json=body, headers=once)
    assert (other.status_code, other.json()["code"]) == (422, "invalid_request"), other.text
    waited(api, first["jobID"])  # another test would count what this job reads


# A reader -------------------------------------------------------------------------------------


@pytest.fixture
def fetching(tmp_path: Path) -> Iterator[OnDemand]:
    made = OnDemand(HERE, folder=tmp_path)
    yield made
    made.close()


@pytest.fixture(params=["strips", "tiles", "mask", "warped"])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[RangeServer, str]]:
    """A server of files of one kind."""
    folder = tmp_path / "web"
    folder.mkdir()
    random = np.random.default_rng(7)
    for month in (1, 2):
        for band in BANDS:
            side, step = (300, 20) if request.param == "warped" and band == "B02" else (600, 10)
            profile: dict[str, Any] = {
                "driver": "GTiff", "width": side, "height": side, "count": 1, "dtype": "uint16",
                "crs": CRS, "compress": "DEFLATE",
                "transform": Affine(step, 0, 600_003, 0, -step, 5_000_047)
                if request.param == "warped" and band == "B04" else
                Affine(step, 0, 600_000, 0, -step, 5_000_040),
            }  # fmt: skip
            if request.param != "strips":
                profile |= {"tiled": True, "blockxsize": 64, "blockysize": 64}
            path = folder / f"S2B_31TGM_2021{month:02d}05_0_L2A_{band}.tif"
            with (
                rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
                rasterio.open(path, "w", **profile) as file,
            ):
                file.write(random.integers(300, 4000, (1, side, side)).astype(np.uint16))
                if request.param == "mask":
                    file.write_mask(random.random((side, side)) > 0.2)
    with range_server(folder) as server:
        server.tag = '"1"'
        yield server, request.param


@dataclass
class Item:
    """A reference."""

    href: str


def remote_stack(
    server: RangeServer, names: Sequence[str], folder: Path, *, grid: str | None = None
) -> Stack:
    """The stack of files of a server, whose blocks are not here."""
    folder.mkdir()
    items = [Item(f"{server.url}/{name}?{folder.parent.name}") for name in names]
    files = anyio.run(partial(fetch_items, items, folder, HERE, on_demand=True))
    assert all(file.remote is not None for file in files)
    return open_stack(files, StackOptions(mask="none", grid=grid), bands=BANDS, max_bytes=2**30)


def test_windows_of_every_kind_of_file_are_those_of_local_files(
    kind: tuple[RangeServer, str], fetching: OnDemand, tmp_path: Path
) -> None:
    server, name = kind
    grid = "EPSG:32631@10" if name == "warped" else None
    paths = sorted(server.folder.iterdir())
    remote = remote_stack(server, [p.name for p in paths], tmp_path / "request", grid=grid)
    local = open_stack(
        [SourceFile(name=path.name, path=path) for path in paths],
        StackOptions(mask="none", grid=grid),
        bands=BANDS,
        max_bytes=2**30,
    )
    assert remote.grid == local.grid
    with (
        StackReader(remote, cache=BlockCache(remote=fetching)) as there,
        StackReader(local) as here,
    ):
        for window in (
            Window(70, 80, 100, 90), Window(90, 100, 60, 40), Window(400, 410, 180, 170),
            Window(0, 0, 600, 5), Window(0, 0, 600, 600),
        ):  # fmt: skip
            one, other = there.read(window), here.read(window)
            np.testing.assert_array_equal(one.values, other.values)
            np.testing.assert_array_equal(one.valid, other.valid)
        asked = len(server.requests)
        there.read(Window(5, 5, 500, 500))  # all of it is here
        assert len(server.requests) == asked
    assert not list(tmp_path.glob("pimc-blocks-*"))


def test_blocks_of_earlier_windows_make_room(
    web: RangeServer, names: list[str], fetching: OnDemand, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole = len(names) * (web.folder / names[0]).stat().st_size
    monkeypatch.setattr(on_demand, "_KEPT_BYTES", whole // 16)
    remote = remote_stack(web, names, tmp_path / "request")
    kept = []
    with (
        StackReader(remote, cache=BlockCache(remote=fetching)) as reader,
        rasterio.open(web.folder / names[0]) as file,
    ):
        for row in range(0, SIDE, BLOCK):
            window = Window(0, row, BLOCK, BLOCK)
            found, expected = reader.read(window), file.read(1, window=window)
            np.testing.assert_allclose(found.values[0, 0], expected / 10_000, rtol=1e-6)
            copies = tmp_path.glob("pimc-blocks-*/*")
            kept.append(sum(path.stat().st_size for path in copies))
    assert max(kept) < whole // 8
    assert any(after < before for before, after in pairwise(kept))


def test_a_file_that_was_replaced_is_an_error(
    web: RangeServer, names: list[str], fetching: OnDemand, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    remote = remote_stack(web, names, tmp_path / "request")
    monkeypatch.setattr(web, "tag", '"2"')
    with (
        StackReader(remote, cache=BlockCache(remote=fetching)) as reader,
        pytest.raises(UnreachableReference, match=r"items\.\d+\.href: .* replaced the file"),
    ):
        reader.read(Window(0, 0, 10, 10))


def test_a_process_reads_only_from_hosts_that_its_own_settings_allow(
    web: RangeServer, names: list[str], tmp_path: Path
) -> None:
    remote = remote_stack(web, names, tmp_path / "request")
    before = len(web.requests)
    elsewhere = OnDemand(Settings(allowed_hosts="data.example.org"), folder=tmp_path)
    with pytest.raises(ForbiddenReference, match="not an allowed host"):
        StackReader(remote, cache=BlockCache(remote=elsewhere))
    elsewhere.close()
    assert len(web.requests) == before


def test_a_run_that_is_cancelled_does_not_wait_for_a_server(
    web: RangeServer, names: list[str], fetching: OnDemand, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    remote = remote_stack(web, names, tmp_path / "request")
    asked, end = threading.Event(), threading.Event()

    def hang(_: BaseHTTPRequestHandler) -> bool:
        asked.set()
        end.wait()
        return True

    def cancelled() -> None:
        if asked.is_set():
            raise Cancelled("the run was cancelled")

    monkeypatch.setattr(web, "before", hang)
    cache = BlockCache(remote=fetching)
    try:
        with (
            StackReader(remote, cache=cache, before_read=cancelled) as reader,
            pytest.raises(Cancelled),
        ):
            reader.read(Window(0, 0, 10, 10))
    finally:
        end.set()

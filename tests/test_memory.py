"""Memory: one budget for all runs, from the container's limit and the files' headers."""

from __future__ import annotations

import json
import re
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import rasterio
import rasterio.warp

from benchmarks.mutations import (
    HEIGHT,
    ROWS,
    STRIP_BYTES,
    STRIPS,
    TILE_BYTES,
    TILE_HEIGHT,
    TILE_WIDTH,
    TILES,
    WIDTH,
    Directory,
    Tiff,
    edited,
)
from benchmarks.process import Served, served
from benchmarks.tiny_zoo import write_zoo
from models.registry import Registry
from service.api.schemas.validation import read_series
from service.container import usable_memory
from service.errors import Cancelled, Overloaded, RasterTooLarge
from service.infer.engine import Engine
from service.jobs.serialise import document_bytes
from service.json_memory import parsed_bytes
from service.read.geotiff import BlockCache
from service.read.layouts import StackOptions
from service.read.radiometry import calibrate
from service.read.reader import footprint
from service.read.stack import Stack, open_stack
from service.run.execute import execute
from service.run.executors import ThreadExecutor
from service.run.memory import MemoryBudget, Need
from service.run.plan import plan_request
from tests.kits.patience import PATIENCE
from tests.kits.rasters import NORTH_UP, UTM, write

BANDS = ("B02", "B04", "B08")
MIB = 2**20

# The container's limit ------------------------------------------------------------------------

V2 = "0::/app/worker\n"
V1 = "4:cpu,cpuacct:/app\n3:memory:/app\n0::/\n"
MACHINE = usable_memory(Path("/none"), Path("/none"))


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        (V2, {}, MACHINE),
        (V2, {"app/worker/memory.max": "max"}, MACHINE),
        (V2, {"app/worker/memory.max": "104857600"}, 100 * MIB),
        (V2, {"app/worker/memory.max": "max", "app/memory.max": "104857600"}, 100 * MIB),
        (V2, {"app/worker/memory.max": "9000000", "app/memory.max": "104857600"}, 9_000_000),
        ("0::/\n", {"memory.max": "104857600"}, 100 * MIB),  # as a container sees itself
        (V2, {"memory.max": "104857600"}, 100 * MIB),  # the path is the host's
        (V2, {"app/worker/memory.max": "what"}, MACHINE),
        (V1, {"memory/app/memory.limit_in_bytes": "104857600"}, 100 * MIB),
        (V1, {"memory/memory.limit_in_bytes": "104857600"}, 100 * MIB),
        (V1, {"memory/app/memory.limit_in_bytes": str(2**63 - 4096)}, MACHINE),
        (V1, {"cpu/app/memory.max": "104857600"}, MACHINE),
    ],
)
def test_the_tightest_limit_of_the_control_groups_counts(
    tmp_path: Path, own: str, files: dict[str, str], expected: int
) -> None:
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text + "\n")
    (tmp_path / "own").write_text(own)
    assert usable_memory(tmp_path / "fs", tmp_path / "own") == expected


# Taking and giving back -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Stack:
    path = tmp_path_factory.mktemp("stack") / "s_2021-01-01.tif"
    file = write(path, np.full((3, 16, 16), 2000, np.uint16), descriptions=BANDS)
    return open_stack([file], StackOptions(), bands=BANDS, max_bytes=2**30)


@pytest.fixture
def need(stack: Stack) -> Callable[[int], Need]:
    files = replace(footprint(stack, (0,)), cached=0, held=0, decoding=0, kept=0)
    return lambda size: Need(files=files, arrays=size, what="windows", remedy="Send fewer dates")


class Holder:
    """A run: a thread that holds memory until it is released."""

    def __init__(self, budget: MemoryBudget, need: Need) -> None:
        self.holds, self.end = threading.Event(), threading.Event()
        self.cancelled = threading.Event()
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(budget, need), daemon=True)
        self._thread.start()

    def _run(self, budget: MemoryBudget, need: Need) -> None:
        try:
            with budget.take(need, cancelled=self.cancelled):
                self.holds.set()
                self.end.wait()
        except Cancelled as error:
            self.error = error

    def join(self) -> None:
        self.end.set()
        self._thread.join()


def awaited(budget: MemoryBudget, count: int) -> None:
    """Wait until so many runs wait."""
    while budget.awaited != count:
        threading.Event().wait(0.001)


def test_a_run_waits_until_there_is_room_and_one_that_fits_passes_it(
    need: Callable[[int], Need],
) -> None:
    budget = MemoryBudget(100)
    first = Holder(budget, need(70))
    first.holds.wait()
    large = Holder(budget, need(60))
    awaited(budget, 1)
    small = Holder(budget, need(30))
    small.holds.wait()
    assert (budget.taken, budget.awaited, large.holds.is_set()) == (100, 1, False)
    first.join()
    large.holds.wait()
    assert (budget.taken, budget.awaited) == (90, 0)
    small.join()
    large.join()
    assert budget.taken == 0


def test_of_two_runs_that_fit_the_first_one_starts(need: Callable[[int], Need]) -> None:
    budget = MemoryBudget(100)
    first = Holder(budget, need(100))
    first.holds.wait()
    second = Holder(budget, need(60))
    awaited(budget, 1)
    third = Holder(budget, need(60))
    awaited(budget, 2)
    first.join()
    second.holds.wait()
    assert not third.holds.is_set()
    second.join()
    third.holds.wait()
    third.join()


def test_a_run_that_waits_can_be_cancelled(need: Callable[[int], Need]) -> None:
    budget = MemoryBudget(100)
    first = Holder(budget, need(100))
    first.holds.wait()
    second = Holder(budget, need(1))
    awaited(budget, 1)
    second.cancelled.set()
    second.join()
    assert isinstance(second.error, Cancelled)
    assert (budget.taken, budget.awaited) == (100, 0)
    first.join()


def test_a_request_does_not_wait_forever(need: Callable[[int], Need]) -> None:
    budget = MemoryBudget(100)
    with budget.take(need(100)):
        with pytest.raises(Overloaded, match=r"needs 1 bytes .* use 100 of 100"):
            budget.take(need(1), patience=0).__enter__()
        assert budget.awaited == 0
    with budget.take(need(100), patience=0):
        pass


def test_memory_is_given_back_after_an_error(need: Callable[[int], Need]) -> None:
    budget = MemoryBudget(100)
    with pytest.raises(ZeroDivisionError), budget.take(need(100)):
        raise ZeroDivisionError
    assert budget.taken == 0


def test_many_runs_never_hold_more_than_the_budget_and_all_end(
    need: Callable[[int], Need],
) -> None:
    budget = MemoryBudget(100)
    sizes = np.random.default_rng(5).integers(1, 101, 300).tolist()
    held, most, lock = 0, 0, threading.Lock()

    def run(size: int) -> None:
        nonlocal held, most
        with budget.take(need(size)):
            with lock:
                held += size
                most = max(most, held)
            with lock:
                held -= size

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(run, sizes))
    assert 0 < most <= 100
    assert budget.taken == 0


def test_a_run_that_can_never_fit_is_rejected_with_the_reason(
    need: Callable[[int], Need], stack: Stack
) -> None:
    with pytest.raises(RasterTooLarge, match=r"windows take 101 bytes\. Send fewer dates"):
        MemoryBudget(100).check(need(101))
    files = replace(need(1).files, held=200)
    with pytest.raises(RasterTooLarge, match=r"'s_2021-01-01\.tif', 16 x 16 .*gdal_translate"):
        MemoryBudget(100).check(replace(need(1), files=files))


def test_windows_are_a_part_of_a_small_budget() -> None:
    assert MemoryBudget(2**40).window_bytes == 32 * MIB
    assert MemoryBudget(64 * MIB).window_bytes == 2 * MIB


# What files take ------------------------------------------------------------------------------


def test_blocks_masks_and_tables_are_counted(tmp_path: Path) -> None:
    files = [
        write(
            tmp_path / f"s_2021-0{month}-01.tif",
            np.full((3, 128, 160), 2000, np.uint16),
            descriptions=BANDS,
            mask=np.full((128, 160), 255, np.uint8),
            interleave="pixel",
            tiled=True,
            blockxsize=32,
            blockysize=16,
        )
        for month in (1, 2)
    ]
    stack = open_stack(files, StackOptions(), bands=BANDS, max_bytes=2**30)
    (memory,) = {p.memory for a in stack.acquisitions for p in a.planes}
    assert memory.block == 16 * 32 * 3 * 2
    assert memory.mask == 16 * 32
    assert memory.blocks == 8 * 5 * (16 + 3 * 8)
    found = footprint(stack, (0, 1))
    assert found.cached == memory.block + memory.mask
    assert found.held == 2 * (memory.block + memory.mask + memory.blocks)
    assert found.layers == 1
    assert footprint(stack, (0,)).held == found.held // 2


def read_so_far() -> int:
    """Bytes that this process has read from files, from the page cache or not."""
    words = Path("/proc/self/io").read_text(encoding="ascii").split()
    return int(words[words.index("rchar:") + 1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs /proc/self/io")
def test_a_block_that_holds_several_sampled_places_is_decoded_once(tmp_path: Path) -> None:
    side = 1024
    random = np.random.default_rng(1).integers(1000, 5000, (3, side, side), np.uint16)
    files = [
        write(
            tmp_path / f"s_2021-0{month}-01.tif",
            random,
            descriptions=BANDS,
            interleave="pixel",
            blockysize=side,
            compress="deflate",
        )
        for month in (1, 2, 3)
    ]
    stack = open_stack(files, StackOptions(), bands=BANDS, max_bytes=2**30)
    assert stack.block == (side, side)
    before = read_so_far()
    calibrate(stack, cache=BlockCache())
    # Five places are sampled of each file, and its only block is as large as the file.
    size = sum(file.path.stat().st_size for file in files)
    assert 1 <= (read_so_far() - before) / size < 1.2


# Over a socket --------------------------------------------------------------------------------

BUDGET = 300 * MIB


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service that also reads files by reference."""
    zoo, root = write_zoo(tmp_path_factory.mktemp("zoo")), tmp_path_factory.mktemp("root")
    with served(
        PIMC_MODEL_DIR=str(zoo), PIMC_MEMORY_BUDGET=str(BUDGET), PIMC_ALLOWED_ROOTS=str(root)
    ) as running:
        yield running


def fat(path: Path, side: int) -> bytes:
    """A sound file of a few hundred kB, all pixels of all bands in one strip."""
    with rasterio.open(
        path, "w", driver="GTiff", width=side, height=side, count=3, dtype="uint16", crs=UTM,
        transform=NORTH_UP, compress="zstd", interleave="pixel", blockysize=side,
    ) as file:  # fmt: skip
        for number, band in enumerate(BANDS, start=1):
            file.set_band_description(number, band)
        file.write(np.full((3, side, side), 2000, np.uint16))
    return path.read_bytes()


def ones(path: Path, side: int) -> bytes:
    """A sound file in tiles of one pixel, which all lie in the same place."""
    write(path, np.full((3, 16, 16), 2000, np.uint16), descriptions=BANDS, interleave="pixel")

    def change(tiff: Tiff, directory: Directory) -> None:
        old = {STRIPS, STRIP_BYTES, ROWS}
        at = tiff.numbers(next(entry for entry in directory.entries if entry.tag == STRIPS))[0]
        directory.entries = [entry for entry in directory.entries if entry.tag not in old]
        for tag, value in ((WIDTH, side), (HEIGHT, side), (TILE_WIDTH, 1), (TILE_HEIGHT, 1)):
            tiff.put(directory, tag, 4, [value])
        tiff.put(directory, TILES, 4, [at] * side**2)
        tiff.put(directory, TILE_BYTES, 3, [6] * side**2)

    return edited(path.read_bytes(), change)


def corner(side: int) -> str:
    """The bounding box of the first pixels, in degrees."""
    west, north = NORTH_UP.c, NORTH_UP.f
    box = west, north - 10 * side, west + 10 * side, north
    return ",".join(map(str, rasterio.warp.transform_bounds(UTM, "EPSG:4326", *box)))


def post(service: Served, content: bytes) -> httpx.Response:
    files = [("files", (f"s_2021-0{month}-01.tif", content)) for month in (1, 2)]
    headers = {"Accept": "application/json"}
    return httpx.post(
        f"{service.url}/classify-pixels", files=files, data={"bbox": corner(30)}, headers=headers,
        timeout=PATIENCE,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("make", "side"), [(fat, 3400), (ones, 1200)])
def test_four_callers_with_large_files_stay_within_the_budget(
    service: Served, tmp_path: Path, make: Callable[[Path, int], bytes], side: int
) -> None:
    content = make(tmp_path / "a.tif", side)
    assert len(content) < 10 * MIB
    assert post(service, fat(tmp_path / "small.tif", 64)).status_code == 200
    service.forget_peak()
    before = service.peak()
    with ThreadPoolExecutor(4) as pool:
        responses = list(pool.map(lambda _: post(service, content), range(4)))
    assert [response.status_code for response in responses] == [200] * 4, responses[0].text
    grown = service.peak() - before
    # Without the budget the four take more than twice as much.
    assert grown < BUDGET + 64 * MIB, f"{grown / MIB:.0f} MiB"
    assert service.metric("pimc_memory_taken_bytes") == 0


def halves(side: int) -> str:
    """Labels of two classes: ten polygons, each of which covers most of one half of the raster."""
    features = []
    for number in range(10):
        left = (number % 2) * side // 2 + number
        corners = [(left, 0), (left, side), (left + side // 2 - 10, side), (left + 10, 0)]
        x, y = zip(*(NORTH_UP * corner for corner in (*corners, corners[0])), strict=True)
        ring = np.transpose(rasterio.warp.transform(UTM, "EPSG:4326", x, y)).tolist()
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {"class": "even" if number % 2 else "odd"},
            }
        )
    return json.dumps({"type": "FeatureCollection", "features": features})


@pytest.mark.slow
def test_labels_of_large_polygons_stay_within_the_budget(service: Served, tmp_path: Path) -> None:
    side = 1400
    content = fat(tmp_path / "a.tif", side)

    def teach(number: int) -> httpx.Response:
        files = [("files", (f"s_2021-{month:02}-01.tif", content)) for month in range(1, 5)]
        data = {"name": f"halves-{number}", "labels": halves(side)}
        return httpx.post(f"{service.url}/heads", files=files, data=data, timeout=PATIENCE)

    assert teach(0).status_code == 201
    service.forget_peak()
    before = service.peak()
    with ThreadPoolExecutor(4) as pool:
        responses = list(pool.map(teach, range(1, 5)))
    assert [response.status_code for response in responses] == [201] * 4, responses[0].text
    grown = service.peak() - before
    # The covered shares of all labels of one request take more than 120 MiB.
    assert grown < BUDGET + 64 * MIB, f"{grown / MIB:.0f} MiB"
    assert service.metric("pimc_memory_taken_bytes") == 0


@pytest.mark.slow
def test_a_block_that_can_never_fit_is_rejected_before_it_is_read(
    service: Served, tmp_path: Path
) -> None:
    response = post(service, fat(tmp_path / "a.tif", 5000))
    assert (response.status_code, response.json()["code"]) == (413, "raster_too_large")
    detail = response.json()["detail"]
    assert re.search(r"'s_2021-01-01\.tif', 5000 x 5000 pixels, decodes to 150000000 bytes", detail)
    assert "PIMC_MEMORY_BUDGET" in detail
    assert "gdal_translate -of COG" in detail
    assert service.metric("pimc_memory_budget_bytes") == BUDGET


# JSON -----------------------------------------------------------------------------------------

HEADERS = {"Content-Type": "application/json"}
ONE = (
    b'{"id":"a","dates":["2021-01-05","2021-02-05"],"B02":[0.05,0.06],"B04":[0.07,0.07],'
    b'"B08":[0.3,0.31]},'
)
DOCUMENTS = {
    "series": b'{"series":[%s]}' % (ONE * 8_000)[:-1],
    "series of many dates": b'{"series":[{"id":"a","dates":[%s],"B02":[%s],"B04":[%s],"B08":[%s]}]}'
    % (
        (b'"2021-01-05",' * 9_000)[:-1],
        *[(b"0.05125," * 9_000)[:-1]] * 3,
    ),
    "numbers of a band": b'{"series":[{"id":"a","dates":["2021-01-05"],"B02":[%s1]}]}'
    % (b"1," * 400_000),
    "fractions of a band": b'{"series":[{"id":"a","dates":["2021-01-05"],"B02":[%s1]}]}'
    % (b"1.5," * 400_000),
    "invalid series": b'{"series":[%s{}]}' % (b"{}," * 60_000),
    "unknown parameters": b"{%s}" % b",".join(b'"k%d":0' % n for n in range(120_000)),
    "items": b'{"items":[%s1]}' % (b"1," * 400_000),
    "properties": b'{"items":[{"href":"/a"}],"points":{"type":"FeatureCollection","features":'
    b'[{"type":"Feature","geometry":{"type":"Point","coordinates":[1,1]},"properties":{"a":[%s1]}}]}}'
    % (b"1," * 400_000),
    "points": b'{"items":[{"href":"/a"}],"points":{"type":"FeatureCollection","features":[%s1]}}'
    % (b"1," * 400_000),
    "fields": b'{"items":[{"href":"/a"}],"fields":{"type":"FeatureCollection","features":[{"type":'
    b'"Feature","geometry":{"type":"Polygon","coordinates":[[%s[3,50]]]}}]}}'
    % (b"[3.5,50]," * 50_000),
    "lists": b'{"items":[{"href":"/a"}],"fields":{"a":[%s[]]}}' % (b"[]," * 70_000),
    "text": b'{"items":[{"href":"%s"}]}' % ("\u00fc".encode() * 4_000_000),
}  # fmt: skip


def send(service: Served, body: bytes, path: str = "/classify-pixels") -> httpx.Response:
    return httpx.post(f"{service.url}{path}", content=body, headers=HEADERS, timeout=PATIENCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "kind"),
    [
        *(("/classify-pixels", kind) for kind in DOCUMENTS),
        *(("/heads", kind) for kind in ("series", "fields", "text")),
        *(("/processes/embed/execution", kind) for kind in ("series", "items", "text")),
    ],
)
def test_json_takes_at_most_what_is_reserved_for_it(service: Served, path: str, kind: str) -> None:
    body = DOCUMENTS[kind]
    reserved = parsed_bytes(body)
    if path.startswith("/processes"):
        body = b'{"inputs":%s}' % body
        reserved *= 2  # parsed again as the body of the task, or too large for that
    service.forget_peak()
    before = service.peak()
    response = send(service, body, path)
    assert response.status_code in {200, 403, 413, 422}, response.text
    grown = service.peak() - before
    # More than the noise of a process that has served little so far.
    assert grown < reserved + 32 * MIB, f"{grown / MIB:.0f} of {reserved / MIB:.0f} MiB"
    assert service.metric("pimc_json_bytes") == 0


@pytest.mark.slow
def test_callers_with_large_json_stay_within_the_budget(service: Served) -> None:
    """Without a bound each of them takes more than the whole budget."""
    huge = b'{"series":[{"id":"a","dates":["2021-01-05"],"B02":[%s1]}]}' % (b"1," * 15 * MIB)
    service.forget_peak()
    before = service.peak()
    with ThreadPoolExecutor(8) as pool:
        refused = list(pool.map(lambda _: send(service, huge), range(4)))
        medium = list(pool.map(lambda _: send(service, DOCUMENTS["series"]), range(8)))
    grown = service.peak() - before
    codes = {response.json()["code"] for response in refused}
    assert codes <= {"body_too_large", "overloaded"}, codes
    assert "PIMC_MEMORY_BUDGET" in refused[0].json()["detail"]
    assert {response.status_code for response in medium} <= {200, 503}
    assert 200 in {response.status_code for response in medium}
    assert grown < BUDGET + 64 * MIB, f"{grown / MIB:.0f} MiB"
    assert service.metric("pimc_json_bytes") == 0


@pytest.mark.slow
def test_json_in_a_form_stays_within_the_budget(service: Served, tmp_path: Path) -> None:
    files = [("files", ("s_2021-01-01.tif", fat(tmp_path / "a.tif", 64)))]
    service.forget_peak()
    before = service.peak()

    def form(name: str, text: str) -> httpx.Response:
        return httpx.post(
            f"{service.url}/classify-pixels", files=files, data={name: text}, timeout=PATIENCE
        )

    several = 7 * MIB
    texts = [
        ("points", '{"a":[' + "[]," * (several // 3) + "1]}"),
        ("area", "[" + "1," * (several // 2) + "1]"),
        ("dates", "x," * (several // 2)),
        ("scale", "1," * (several // 2)),
        ("outputs", "class," * (several // 6)),
        ("mask", "scl," * (several // 4)),
    ]
    with ThreadPoolExecutor(4) as pool:
        responses = list(pool.map(lambda one: form(*one), texts))
    assert {response.status_code for response in responses} <= {413, 422, 503}
    grown = service.peak() - before
    assert grown < BUDGET // 2 + 64 * MIB, f"{grown / MIB:.0f} MiB"


@pytest.mark.slow  # every allocation is traced
def test_the_series_of_a_request_are_counted(tmp_path: Path) -> None:
    count, dates = 500, 6
    one = {"dates": [f"2021-{month:02}-05" for month in range(1, dates + 1)]}
    one |= {band: [0.1] * dates for band in BANDS}
    text = json.dumps({"series": [{"id": str(n), **one} for n in range(count)]}).encode()
    cancelled = threading.Event()
    with Engine(Registry.load(write_zoo(tmp_path)), providers="cpu") as engine:
        for task in ("classify-pixels", "forecast"):
            tracemalloc.start()
            request = read_series(task, text).request(task)
            plan = plan_request(request, engine, max_raster_bytes=1, rasters=False)
            executor = ThreadExecutor()
            result = execute(plan, tmp_path, executor=executor, cancelled=cancelled)
            written = document_bytes(result.document)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert len(written) > 0
            assert peak < plan.need.total, (task, peak)
        budget = MemoryBudget(MIB)
        with pytest.raises(RasterTooLarge, match=r"500 series .* Send fewer series"):
            plan_request(request, engine, max_raster_bytes=1, rasters=False, budget=budget)

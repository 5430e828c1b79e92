"""Remote TIFFs in part: what GDAL reads of the local file is what it reads of the whole one."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import anyio
import numpy as np
import pytest
import rasterio
import rasterio.shutil
from rasterio.windows import Window

from service.errors import BodyTooLarge, InternalError, PIMCError, UnreachableReference
from service.grid import Window as GridWindow
from service.read import blocks
from service.read.blocks import FIRST_BYTES, RemoteFile, fetch_windows
from service.read.connect import Connections, Remote
from service.read.geotiff import SourceFile, gdal_options, open_geotiff, read_header
from service.settings import HostRule, Settings
from tests.kits.marks import in_all_tests
from tests.kits.ranges import RangeServer, range_server
from tests.kits.rasters import write

HEIGHT, WIDTH, SIDE = 310, 270, 64
rng = np.random.default_rng(5)
PIXELS = rng.integers(1, 4000, (3, HEIGHT, WIDTH)).astype(np.uint16)
TILED = {"tiled": True, "blockxsize": SIDE, "blockysize": SIDE}
PLAIN = {
    "strips": {"blockysize": 8},
    "strips, deflate": {"blockysize": 8, "compress": "deflate"},
    "tiles": TILED,
    "tiles, LZW": {**TILED, "compress": "lzw"},
    "tiles, packbits": {**TILED, "compress": "packbits"},
    "tiles, predictor": {**TILED, "compress": "zstd", "predictor": 2},
    "bands apart": {**TILED, "compress": "deflate", "interleave": "band"},
    "BigTIFF": {**TILED, "BIGTIFF": "YES"},
    "big endian": {**TILED, "ENDIANNESS": "BIG", "compress": "deflate"},
    "big-endian BigTIFF": {**TILED, "ENDIANNESS": "BIG", "BIGTIFF": "YES"},
    "sparse": {**TILED, "SPARSE_OK": "TRUE"},
}
COGS = {
    "COG": {"compress": "DEFLATE"},
    "COG, uncompressed": {"compress": "NONE"},
    "COG, LZW": {"compress": "LZW", "predictor": "YES"},
    "COG, masked": {"compress": "ZSTD"},
}


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RangeServer]:
    root = tmp_path_factory.mktemp("web")
    mask = np.full((HEIGHT, WIDTH), 255, np.uint8)
    mask[:100, 50:200] = 0
    for name, profile in PLAIN.items():
        pixels = PIXELS.copy()
        if name == "sparse":
            pixels[:, :128, :128] = 0
        write(root / f"{name}.tif", pixels, descriptions=["B02", "B04", "B08"], nodata=0,
              tags={"datetime": "2021-05-01"}, **profile)  # fmt: skip
    write(root / "masked.tif", PIXELS, mask=mask, compress="deflate", **TILED)
    for name, options in COGS.items():
        source = root / ("masked.tif" if "masked" in name else "tiles.tif")
        rasterio.shutil.copy(source, root / f"{name}.tif", driver="COG", blocksize=128, **options)
    with range_server(root) as server:
        yield server


def settings(**options: object) -> Settings:
    return Settings(allowed_hosts=(HostRule.read("127.0.0.1"),), **options)


def fetched(
    web: RangeServer, name: str, folder: Path, window: Window | None, **options: object
) -> RemoteFile:
    """A file opened, and with a window fetched."""
    allowed = settings(**options)

    async def fetch() -> RemoteFile:
        async with Connections(allowed) as connections:
            location = Remote.of(f"{web.url}/{name}", "the file", allowed.allowed_hosts)
            remote = RemoteFile(remote=location, path=folder / "local.tif", hint="sign it")
            await remote.open(connections)
            if window is not None and not remote.whole:
                needed = [(remote, GridWindow(*window.flatten()))]
                await fetch_windows(needed, connections, "the file")
            return remote

    return anyio.run(fetch)


@pytest.mark.parametrize("name", [*PLAIN, "masked", *COGS])
@pytest.mark.parametrize(
    "window",
    [Window(60, 70, 9, 8), *in_all_tests(Window(0, 0, 64, 64), Window(150, 201, 120, 109))],
)
def test_a_window_of_a_part_is_that_of_the_whole(
    web: RangeServer, tmp_path: Path, name: str, window: Window
) -> None:
    path = web.folder / f"{name}.tif"
    web.requests.clear()
    remote = fetched(web, path.name, tmp_path, window)
    assert not remote.whole
    with gdal_options():
        own, whole = (read_header(SourceFile(name=name, path=each)) for each in (remote.path, path))
        # All but the file itself, and what its size says of its largest block.
        other = {"source": None, "memory": own.memory.open}
        assert {**vars(own), **other} == {**vars(whole), **other}
        assert own.memory.open == whole.memory.open
        with open_geotiff(remote.path) as part, open_geotiff(path) as file:
            assert (part.read(window=window) == file.read(window=window)).all()
            assert (part.read_masks(1, window=window) == file.read_masks(1, window=window)).all()
            assert part.overviews(1) == []
    assert web.bytes_of(path.name) < path.stat().st_size
    runs = remote.runs(GridWindow(*window.flatten()))
    assert web.bytes_of(path.name) >= sum(run.end - run.begin for run in runs)


@pytest.mark.parametrize("name", [*PLAIN, *COGS])
def test_what_was_not_fetched_is_an_error_and_never_missing(
    web: RangeServer, tmp_path: Path, name: str
) -> None:
    remote = fetched(web, f"{name}.tif", tmp_path, Window(200, 250, 30, 30))
    missing = pytest.raises(rasterio.errors.RasterioIOError)
    with gdal_options(), open_geotiff(remote.path) as part, missing:
        part.read(window=Window(140, 10, 20, 20))


def test_a_small_file_and_one_of_another_kind_come_whole(web: RangeServer, tmp_path: Path) -> None:
    small = write(web.folder / "small.tif", PIXELS[:, :20, :20])
    (web.folder / "other.jp2").write_bytes(b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(3 * FIRST_BYTES))
    for name in ("small.tif", "other.jp2"):
        (tmp_path / name).mkdir()
        web.requests.clear()
        remote = fetched(web, name, tmp_path / name, Window(0, 0, 5, 5))
        assert remote.whole
        assert remote.path.read_bytes() == (web.folder / name).read_bytes()
    assert small.path.stat().st_size < FIRST_BYTES
    with pytest.raises(BodyTooLarge, match=r"as JPEG 2000, .* name the same image as a GeoTIFF"):
        fetched(web, "other.jp2", tmp_path / "other.jp2", None, max_body_bytes=2 * FIRST_BYTES)


def test_directories_at_the_end_are_found(web: RangeServer, tmp_path: Path) -> None:
    """As GDAL leaves them in a file that was edited."""
    path = web.folder / "edited.tif"
    path.write_bytes((web.folder / "tiles, LZW.tif").read_bytes())
    with rasterio.open(path, "r+") as file:
        file.update_tags(**{f"long{n}": "x" * 500 for n in range(100)})
    window = Window(100, 100, 20, 20)
    remote = fetched(web, path.name, tmp_path, window)
    assert not remote.whole
    with gdal_options(), open_geotiff(remote.path) as part, open_geotiff(path) as file:
        assert (part.read(window=window) == file.read(window=window)).all()
        assert part.tags() == file.tags()


# Servers that do not do what they should ---------------------------------------------------------


def reply(to: BaseHTTPRequestHandler, status: int, data: bytes = b"", **headers: str) -> bool:
    to.send_response(status)
    for name, value in headers.items():
        to.send_header(name.replace("_", "-"), value)
    to.send_header("Content-Length", str(len(data)))
    to.end_headers()
    to.wfile.write(data)
    return True


@pytest.fixture
def odd(web: RangeServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    monkeypatch.setattr(blocks, "_PAUSE_SECONDS", 0.0)
    yield web
    web.before = lambda _: False


def test_a_server_without_ranges_gives_the_file_whole(odd: RangeServer, tmp_path: Path) -> None:
    data = (odd.folder / "COG.tif").read_bytes()
    odd.before = lambda to: reply(to, 200, data)
    remote = fetched(odd, "COG.tif", tmp_path, Window(0, 0, 9, 9))
    assert remote.whole
    assert remote.path.read_bytes() == data
    with pytest.raises(BodyTooLarge):
        fetched(odd, "COG.tif", tmp_path, None, max_body_bytes=len(data) - 1)


def test_a_busy_server_is_asked_again(odd: RangeServer, tmp_path: Path) -> None:
    seen: list[int] = []

    def busy(to: BaseHTTPRequestHandler) -> bool:
        seen.append(1)
        return len(seen) % 3 != 0 and reply(to, 503, b"<Error>SlowDown</Error>")

    odd.before = busy
    fetched(odd, "COG.tif", tmp_path, Window(0, 0, 9, 9))
    seen.clear()
    odd.before = lambda to: reply(to, 503)
    with pytest.raises(UnreachableReference, match="status 503"):
        fetched(odd, "COG.tif", tmp_path, Window(0, 0, 9, 9))


def test_a_range_that_was_cut_off_is_asked_for_again(odd: RangeServer, tmp_path: Path) -> None:
    cut: set[str] = set()

    def once(to: BaseHTTPRequestHandler) -> bool:
        """Send half of each range the first time."""
        asked = to.headers["Range"]
        if asked in cut:
            return False
        cut.add(asked)
        first, last = map(int, asked.removeprefix("bytes=").split("-"))
        data = (odd.folder / "COG.tif").read_bytes()
        part = data[first : last + 1]
        to.send_response(206)
        to.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        to.send_header("Content-Length", str(len(part)))
        to.end_headers()
        to.wfile.write(part[: len(part) // 2])
        to.close_connection = True
        return True

    odd.before = once
    window = Window(130, 70, 9, 8)
    remote = fetched(odd, "COG.tif", tmp_path, window)
    assert len(cut) >= 2
    with gdal_options(), open_geotiff(remote.path) as part:
        assert (part.read(window=window) == PIXELS[:, 70:78, 130:139]).all()


def test_a_refusal_is_final(odd: RangeServer, tmp_path: Path) -> None:
    seen: list[int] = []

    def refuses(to: BaseHTTPRequestHandler) -> bool:
        seen.append(1)
        return reply(to, 403)

    odd.before = refuses
    with pytest.raises(UnreachableReference, match="status 403"):
        fetched(odd, "COG.tif", tmp_path, Window(0, 0, 9, 9))
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("headers", "data", "message"),
    [
        ({}, b"x" * 100, "a range other than the requested"),
        ({"Content_Range": "bytes 5-104/9000"}, b"x" * 100, "a range other than the requested"),
        ({"Content_Range": "bytes 0-99/*"}, b"x" * 100, "a range other than the requested"),
        ({"Content_Range": "lines 0-99/9000"}, b"x" * 100, "a range other than the requested"),
    ],
)
def test_another_range_than_asked_for_is_refused(
    odd: RangeServer, tmp_path: Path, headers: dict[str, str], data: bytes, message: str
) -> None:
    odd.before = lambda to: reply(to, 206, data, **headers)
    with pytest.raises(UnreachableReference, match=message):
        fetched(odd, "COG.tif", tmp_path, Window(0, 0, 9, 9))


@pytest.mark.parametrize("how", ["short", "long", "changed", "gone", "signed"])
def test_a_block_that_is_not_the_files_is_refused(
    odd: RangeServer, tmp_path: Path, how: str
) -> None:
    data = (odd.folder / "COG.tif").read_bytes()

    def respond(to: BaseHTTPRequestHandler) -> bool:
        begin, last = map(int, to.headers["Range"].removeprefix("bytes=").split("-"))
        part, first = data[begin : last + 1], begin == 0
        span = f"bytes {begin}-{last}/{len(data)}"
        if first or how in {"short", "long", "changed"}:
            if not first:
                part = {"short": part[:-50], "long": part + b"x" * 50}.get(how, part)
            tag = '"1"' if first or how != "changed" else '"2"'
            return reply(to, 206, part, Content_Range=span, ETag=tag)
        return reply(to, 404 if how == "gone" else 403)

    odd.before = respond
    expected = {
        "short": "requested bytes", "long": "more than", "changed": "replaced the file",
        "gone": "status 404", "signed": "needs a signature or a login; sign it",
    }  # fmt: skip
    with pytest.raises((UnreachableReference, BodyTooLarge), match=expected[how]):
        fetched(odd, "COG.tif", tmp_path, Window(0, 0, 9, 9))


# GDAL quotes the damaged bytes, and rasterio's logger cannot decode them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
def test_damaged_directories_give_our_errors_alone(odd: RangeServer, tmp_path: Path) -> None:
    """Whatever the bytes of a directory claim: an error of ours, a file whole, or the window."""
    data = bytearray((odd.folder / "COG.tif").read_bytes())
    path = odd.folder / "damaged.tif"
    refused = 0
    for seed in range(50):
        random = np.random.default_rng(seed)
        damaged = bytearray(data)
        for at in random.integers(4, 700, 6):
            damaged[at] = random.integers(256)
        path.write_bytes(damaged)
        try:
            remote = fetched(odd, path.name, tmp_path, Window(0, 0, 9, 9), max_body_bytes=2**20)
            with gdal_options():
                read_header(SourceFile(name="damaged", path=remote.path))
        except PIMCError:
            refused += 1
    assert refused


def test_a_stored_error_is_restored_as_the_class_that_states_its_code() -> None:
    assert blocks._Busy in UnreachableReference.__subclasses__()  # of the same code
    restored = PIMCError.of_code("unreachable_reference", "why")
    assert type(restored) is UnreachableReference
    assert restored.detail == "why"
    for code in ("internal_error", "of a later release"):
        assert type(PIMCError.of_code(code, "why")) is InternalError


def test_the_error_of_a_busy_server_reaches_another_process() -> None:
    busy = pickle.loads(pickle.dumps(blocks._Busy("why", "7")))  # noqa: S301 - ours
    assert (busy.detail, busy.after) == ("why", 7.0)

"""Hostile files: judged from headers, bounded in memory, without access to other files."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.windows import Window

from benchmarks.mutations import (
    BANDS,
    BITS,
    COMPRESSION,
    EXTRA,
    FORMAT,
    GDAL_XML,
    HEIGHT,
    PHOTOMETRIC,
    ROWS,
    SAMPLES,
    STRIP_BYTES,
    STRIPS,
    SUBFILE,
    TILE_BYTES,
    TILE_HEIGHT,
    TILE_WIDTH,
    TILES,
    WIDTH,
    Directory,
    Entry,
    Tiff,
    edited,
)
from service.errors import (
    CorruptRaster,
    InvalidRequest,
    NotAGeoTIFF,
    NotAVectorFile,
    PIMCError,
    RasterTooLarge,
)
from service.grid import crs_of
from service.read import reader as reading
from service.read.geotiff import SourceFile, gdal_options, open_geotiff
from service.read.layouts import StackOptions
from service.read.reader import StackReader
from service.read.stac import georeference_of_asset
from service.read.stack import Stack, open_stack
from service.read.vectors import read_fields
from tests.kits.forks import ran
from tests.kits.patience import PATIENCE
from tests.kits.rasters import NORTH_UP, UTM, write
from tests.kits.sockets import connections, listening

ROOT = Path(__file__).parents[1]
LIMIT = 2**34


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "a.tif"
    values = np.full((3, 16, 16), 2000, np.uint16)
    write(path, values, descriptions=BANDS, tags={"datetime": "2021-01-01"}, nodata=0)
    return path.read_bytes()


def opened(content: bytes, folder: Path, max_bytes: int = LIMIT) -> Stack:
    path = folder / "0000.tif"
    path.write_bytes(content)
    file = SourceFile(name="sent.tif", path=path)
    return open_stack([file], StackOptions(), bands=BANDS, max_bytes=max_bytes)


# Bombs --------------------------------------------------------------------------------------


def text(tiff: Tiff, directory: Directory, xml: bytes) -> None:
    entry = tiff.put(directory, GDAL_XML, 1, [0])
    entry.kind, entry.data, entry.count = 2, xml + b"\0", len(xml) + 1


def trillion(tiff: Tiff, directory: Directory) -> None:
    for tag, value in ((WIDTH, 10**6), (HEIGHT, 10**6), (ROWS, 1), (STRIPS, 0), (STRIP_BYTES, 0)):
        tiff.put(directory, tag, 4, [value])


def many_bands(tiff: Tiff, directory: Directory) -> None:
    n = 65_535
    tiff.put(directory, SAMPLES, 3, [n])
    tiff.put(directory, BITS, 3, [16] * n)
    tiff.put(directory, FORMAT, 3, [1] * n)
    tiff.put(directory, EXTRA, 3, [0] * (n - 1))
    tiff.put(directory, PHOTOMETRIC, 3, [1])


def one_strip(tiff: Tiff, directory: Directory) -> None:
    tiff.put(directory, COMPRESSION, 3, [8])
    for tag in (WIDTH, HEIGHT, ROWS):
        tiff.put(directory, tag, 4, [20_000])


def one_tile(tiff: Tiff, directory: Directory) -> None:
    directory.entries = [e for e in directory.entries if e.tag not in {STRIPS, STRIP_BYTES, ROWS}]
    tiff.put(directory, COMPRESSION, 3, [8])
    for tag in (TILE_WIDTH, TILE_HEIGHT):
        tiff.put(directory, tag, 4, [2**15])
    for tag in (TILES, TILE_BYTES):
        tiff.put(directory, tag, 4, [8] * 3)


def huge_mask(tiff: Tiff, directory: Directory) -> None:
    """A raster in small tiles, all empty, and beside it a mask in one strip."""
    side, tile = 20_000, 400
    one_tile(tiff, directory)
    for tag, value in ((WIDTH, side), (HEIGHT, side), (TILE_WIDTH, tile), (TILE_HEIGHT, tile)):
        tiff.put(directory, tag, 4, [value])
    for tag in (TILES, TILE_BYTES):
        tiff.put(directory, tag, 4, [0] * (3 * (side // tile) ** 2))
    mask = Directory(entries=[])
    for tag, kind, value in (
        (SUBFILE, 4, 4), (WIDTH, 4, side), (HEIGHT, 4, side), (BITS, 3, 1), (COMPRESSION, 3, 8),
        (PHOTOMETRIC, 3, 4), (STRIPS, 4, 8), (SAMPLES, 3, 1), (ROWS, 4, side),
        (STRIP_BYTES, 4, 100),
    ):  # fmt: skip
        tiff.put(mask, tag, kind, [value])
    tiff.directories.append(mask)


def signed_mask(tiff: Tiff, directory: Directory) -> None:
    """The same mask, its tags of the signed types that libtiff reads as well."""
    huge_mask(tiff, directory)
    for tag in (SUBFILE, WIDTH, HEIGHT, ROWS):
        (entry,) = [entry for entry in tiff.directories[-1].entries if entry.tag == tag]
        entry.kind = 9


def many_items(tiff: Tiff, directory: Directory) -> None:
    items = b"".join(b'<Item name="K%d">v</Item>' % n for n in range(50_000))
    text(tiff, directory, b"<GDALMetadata>" + items + b"</GDALMetadata>")


def long_text(tiff: Tiff, directory: Directory) -> None:
    item = b'<Item name="K">' + b"v" * 20_000_000 + b"</Item>"
    text(tiff, directory, b"<GDALMetadata>" + item + b"</GDALMetadata>")


def many_directories(tiff: Tiff, directory: Directory) -> None:
    tiff.directories += [Directory(entries=directory.entries[:4])] * 60_000


def many_overviews(tiff: Tiff, directory: Directory) -> None:
    overview = Directory(entries=[Entry(**vars(entry)) for entry in directory.entries])
    tiff.put(overview, SUBFILE, 4, [1])
    tiff.directories += [overview] * 2_000


def many_entries(tiff: Tiff, directory: Directory) -> None:
    directory.entries += [directory.entries[0]] * 60_000


def many_offsets(tiff: Tiff, directory: Directory) -> None:
    entry = tiff.put(directory, STRIPS, 4, [8])
    entry.count = 2**28


BOMBS: dict[str, Callable[[Tiff, Directory], None]] = {
    function.__name__: function
    for function in (
        trillion, many_bands, one_strip, one_tile, huge_mask, many_items, long_text,
        many_directories, many_overviews, many_entries, many_offsets,
    )
}  # fmt: skip


def sparse(folder: Path) -> bytes:
    """A file of a few kB that declares 21 GB."""
    path = folder / "sparse.tif"
    with rasterio.open(
        path, "w", driver="GTiff", width=60_000, height=60_000, count=3, dtype="uint16", crs=UTM,
        transform=NORTH_UP, tiled=True, blockxsize=2048, blockysize=2048, interleave="band",
        compress="deflate", SPARSE_OK=True,
    ) as file:  # fmt: skip
        file.update_tags(datetime="2021-01-01")
        for number, band in enumerate(BANDS, start=1):
            file.set_band_description(number, band)
    return path.read_bytes()


def inflating(sound: bytes) -> bytes:
    """A strip of 512 bytes whose stream holds 128 MiB."""
    stream = zlib.compress(bytes(2**27), 1)

    def change(tiff: Tiff, directory: Directory) -> None:
        tiff.body += stream
        tiff.put(directory, COMPRESSION, 3, [8])
        tiff.put(directory, STRIPS, 4, [len(tiff.body) - len(stream)] * 3)
        tiff.put(directory, STRIP_BYTES, 4, [len(stream)] * 3)

    return edited(sound, change)


def test_a_mask_whose_tags_are_of_other_types_is_refused(sound: bytes, tmp_path: Path) -> None:
    with pytest.raises(NotAGeoTIFF, match="of type 9"):
        opened(edited(sound, signed_mask), tmp_path)


def test_a_number_that_does_not_fit_into_its_entry_is_refused(sound: bytes, tmp_path: Path) -> None:
    def widened(tiff: Tiff, directory: Directory) -> None:
        (entry,) = [entry for entry in directory.entries if entry.tag == WIDTH]
        entry.kind = 16  # eight bytes, where a classic TIFF has room for four

    with pytest.raises(NotAGeoTIFF):
        opened(edited(sound, widened), tmp_path)


@pytest.mark.parametrize("name", BOMBS)
def test_a_header_that_declares_too_much_is_rejected_before_it_is_read(
    sound: bytes, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = edited(sound, BOMBS[name])
    monkeypatch.setattr(rasterio.DatasetReader, "read", _unread)
    with pytest.raises(RasterTooLarge, match=r"'sent\.tif'|decode to"):
        opened(content, tmp_path)


def _unread(*_: object, **__: object) -> None:
    pytest.fail("a pixel was read")


def test_a_few_kb_that_declare_21_gb_are_rejected_before_they_are_read(tmp_path: Path) -> None:
    content = sparse(tmp_path)
    assert len(content) < 40_000
    with pytest.raises(RasterTooLarge, match="decode to 21600000000 bytes"):
        opened(content, tmp_path)


# Of the whole way, as a process: a bomb that went off would be seen in its memory.
_CHILD = """
import json, resource, sys, tempfile
from pathlib import Path
sys.path[:0] = [{root!r}]
from benchmarks.serving import served
from benchmarks.tiny_zoo import write_zoo

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

folder = Path({folder!r})
with served(model_dir=write_zoo(folder / "zoo"), max_body_bytes=2**26) as api:
    sound = (folder / "sound.tif").read_bytes()
    def post(content):
        files = [("files", (f"s_2021-0{{n}}-01.tif", content)) for n in (1, 2)]
        data = {{"dates": "2021-01-01,2021-02-01"}}
        return api.post("/classify-pixels", files=files, data=data)
    post(sound)
    for path in sorted(folder.glob("bomb-*.tif")):
        content = path.read_bytes()
        before = peak()
        response = post(content)
        problem = "problem" in response.headers["content-type"]
        code = response.json()["code"] if problem else "accepted"
        print(json.dumps([path.stem[5:], code, peak() - before, len(content) // 2**20]))
"""


@pytest.mark.slow
def test_bombs_cost_no_memory_and_little_time(sound: bytes, tmp_path: Path) -> None:
    (tmp_path / "sound.tif").write_bytes(sound)
    bombs = {name: edited(sound, change) for name, change in BOMBS.items()}
    bombs |= {"sparse": sparse(tmp_path), "inflating": inflating(sound)}
    for name, content in bombs.items():
        (tmp_path / f"bomb-{name}.tif").write_bytes(content)
    child = subprocess.run(
        [sys.executable, "-c", _CHILD.format(root=str(ROOT), folder=str(tmp_path))],
        capture_output=True, text=True, timeout=PATIENCE, check=True,
    )  # fmt: skip
    found = {line[0]: line[1:] for line in map(json.loads, child.stdout.splitlines())}
    assert set(found) == set(bombs)
    for name, (code, grown, sent) in found.items():
        assert code == ("accepted" if name == "inflating" else "raster_too_large"), name
        # An upload goes through memory in pieces; this client holds it whole, and its form.
        assert grown < 60 + 8 * sent, f"{name}: {grown} MiB more for {sent} MiB sent"


def test_directories_that_lead_in_circles_end(sound: bytes, tmp_path: Path) -> None:
    def circle(tiff: Tiff, directory: Directory) -> None:
        tiff.directories[-1].next = 0

    stack = opened(edited(sound, circle), tmp_path)
    with StackReader(stack) as reader:
        assert reader.read(Window(0, 0, 16, 16)).valid.all()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_every_form_of_tiff_is_checked(tmp_path: Path, order: str, big: bool) -> None:
    path = tmp_path / "a.tif"
    how = {"ENDIANNESS": "LITTLE" if order == "<" else "BIG", "BIGTIFF": "YES" if big else "NO"}
    values = np.full((3, 16, 16), 2000, np.uint16)
    write(path, values, descriptions=BANDS, tags={"datetime": "2021-01-01"}, **how)
    assert opened(path.read_bytes(), tmp_path).dates
    for change in (many_items, many_entries, many_overviews):
        with pytest.raises(RasterTooLarge):
            opened(edited(path.read_bytes(), change), tmp_path)


def test_many_described_bands_are_accepted(tmp_path: Path) -> None:
    """As many names, scales and dates as a long single-file series has."""
    n = 1_500
    path = tmp_path / "a.tif"
    names = [f"{BANDS[k % 3]} 20{10 + k // 108:02d}-{k // 9 % 12 + 1:02d}-{k // 3 % 3 + 1:02d}"
             for k in range(n)]  # fmt: skip
    write(path, np.full((n, 2, 2), 2000, np.uint16), descriptions=names, scales=[1e-4] * n,
          offsets=[-0.1] * n)  # fmt: skip
    assert opened(path.read_bytes(), tmp_path).observations == n // 3


# Large blocks -------------------------------------------------------------------------------


@pytest.fixture
def blocky(tmp_path: Path) -> Stack:
    """Six dates, each one compressed strip with all bands together."""
    files = []
    for month in range(1, 7):
        values = np.arange(3 * 200 * 300, dtype=np.uint16).reshape(3, 200, 300) % 3000 + month
        files.append(
            write(tmp_path / f"s_2021-0{month}-01.tif", values, descriptions=BANDS,
                  compress="deflate", interleave="pixel", blockysize=200)
        )  # fmt: skip
    return open_stack(files, StackOptions(), bands=BANDS, max_bytes=LIMIT)


def test_open_files_hold_no_more_blocks_than_there_is_memory_for(
    blocky: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = blocky.acquisitions[0].planes[0].memory
    assert memory.block == 200 * 300 * 3 * 2
    window = Window(10, 10, 30, 20)
    with StackReader(blocky) as reader:
        complete = reader.read(window)
        assert len(reader._open) == 6
    monkeypatch.setattr(reading, "_MAX_HELD_BYTES", 2 * memory.open)
    with StackReader(blocky) as reader:
        for _ in range(2):
            np.testing.assert_array_equal(reader.read(window).values, complete.values)
        assert len(reader._open) == 2


def test_points_far_apart_in_a_large_block_are_not_read_as_one_window(
    blocky: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = 50_000
    monkeypatch.setattr(reading, "CELL_BYTES", budget)
    largest = 0

    class Watched(StackReader):
        def read(self, window: Window) -> reading.Sits:
            nonlocal largest
            found = super().read(window)
            largest = max(largest, found.values.nbytes)
            return found

    rows, columns = np.meshgrid(np.arange(0, 200, 9), np.arange(0, 300, 7), indexing="ij")
    with Watched(blocky) as reader:
        points = reader.read_pixels(rows.ravel(), columns.ravel())
        assert largest <= budget
        complete = StackReader.read(reader, Window(0, 0, 300, 200))
    np.testing.assert_array_equal(
        points.values, complete.values[:, :, rows.ravel(), columns.ravel()]
    )


# Nothing outside the file -------------------------------------------------------------------


@pytest.fixture
def elsewhere() -> Iterator[socket.socket]:
    """A server to which nothing may connect."""
    with listening() as server:
        yield server


@pytest.fixture
def named(sound: bytes, tmp_path: Path) -> Callable[[str], Path]:
    """A file whose metadata names another as its overviews."""

    def made(other: str) -> Path:
        item = f'<Item name="OVERVIEW_FILE" domain="OVERVIEWS">{other}</Item>'.encode()
        path = tmp_path / "0000.tif"
        xml = b"<GDALMetadata>" + item + b"</GDALMetadata>"
        path.write_bytes(edited(sound, lambda tiff, first: text(tiff, first, xml)))
        return path

    return made


_OVERVIEWS = """
import sys
import rasterio
from service.read.geotiff import gdal_options
with gdal_options() if sys.argv[2] == "ours" else rasterio.Env():
    with rasterio.open(sys.argv[1], driver="GTiff") as file:
        print(file.overviews(1))
"""


@pytest.mark.slow
@pytest.mark.parametrize("handler", ["/vsicurl/", "/vsicurl_streaming/"])
def test_no_name_in_a_file_leads_to_the_network(
    named: Callable[[str], Path], elsewhere: socket.socket, tmp_path: Path, handler: str
) -> None:
    path = named(f"{handler}http://127.0.0.1:{elsewhere.getsockname()[1]}/x.tif")

    def overviews(whose: str) -> bool:
        variables = {"GDAL_HTTP_TIMEOUT": "1", "no_proxy": "127.0.0.1"}
        ran("tests.kits.code", _OVERVIEWS, str(path), whose, variables=variables)
        return connections(elsewhere) > 0

    assert overviews("gdal's")  # so GDAL would ask, left to itself
    assert not overviews("ours")
    with pytest.raises(NotAGeoTIFF, match="names another file"):
        opened(path.read_bytes(), tmp_path)
    assert connections(elsewhere) == 0


@pytest.mark.parametrize(
    ("domain", "before"),
    [
        ("&#79;VERVIEWS", b""),
        ("OVERVIE&#x57;S", b""),
        ("&o;", b'<!DOCTYPE GDALMetadata [<!ENTITY o "OVERVIEWS">]>'),
    ],
)
def test_no_way_of_writing_the_name_passes(
    sound: bytes, tmp_path: Path, domain: str, before: bytes
) -> None:
    item = f'<Item name="OVERVIEW_FILE" domain="{domain}">/etc/passwd</Item>'.encode()
    xml = before + b"<GDALMetadata>" + item + b"</GDALMetadata>"
    content = edited(sound, lambda tiff, first: text(tiff, first, xml))
    with pytest.raises(NotAGeoTIFF, match=r"names another file|entity declaration"):
        opened(content, tmp_path)


def test_no_name_in_a_file_leads_to_another_file(
    named: Callable[[str], Path], sound: bytes, tmp_path: Path
) -> None:
    other = tmp_path / "secret.tif"
    write(other, np.full((3, 8, 8), 4000, np.uint16))
    path = named(str(other))
    with gdal_options(), open_geotiff(path) as file:
        assert file.overviews(1)  # so GDAL does read it, which is why such a file is refused
    with pytest.raises(NotAGeoTIFF, match="OVERVIEWS") as caught:
        opened(path.read_bytes(), tmp_path)
    assert "secret" not in caught.value.detail


WKT = CRS.from_epsg(32631).to_wkt()
_CLOSES_AT_ONCE = """
import socket
with socket.create_server(("127.0.0.1", 0)) as listener:
    listener.settimeout(60)
    print(listener.getsockname()[1], flush=True)
    listener.accept()[0].close()
print("connected")
"""


@pytest.mark.parametrize(
    "form",
    ["http://127.0.0.1:{port}/a", "ESRI::{path}", "{path}", "+proj=utm +zone=31 +nadgrids={path}"],
)
def test_no_crs_leads_to_a_file_or_to_the_network(
    sound: bytes, tmp_path: Path, elsewhere: socket.socket, form: str
) -> None:
    other = tmp_path / "other.wkt"
    other.write_text(WKT)
    # rasterio reads the file, or connects. It waits for a response for 10 s and holds the GIL
    # meanwhile, so that the server is another process.
    program = [sys.executable, "-S", "-c", _CLOSES_AT_ONCE]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        reads = False
        with suppress(CRSError):
            reads = bool(CRS.from_user_input(form.format(port=port, path=other)))
        if reads:
            server.kill()
        assert reads or server.stdout.read() == "connected\n"
    crs = form.format(port=elsewhere.getsockname()[1], path=other)
    path = tmp_path / "a.tif"
    path.write_bytes(sound)
    file = SourceFile(name="a.tif", path=path)
    with pytest.raises(InvalidRequest, match="EPSG:32631@10"):
        open_stack([file], StackOptions(grid=f"{crs}@10"), bands=BANDS, max_bytes=LIMIT)
    named = {"type": "name", "properties": {"name": crs}}
    fields = {"type": "FeatureCollection", "crs": named, "features": []}
    (tmp_path / "fields").write_text(json.dumps(fields))
    with pytest.raises(NotAVectorFile, match="CRS that is not known"):
        read_fields(SourceFile(name="fields", path=tmp_path / "fields"), 9)
    stated = {"proj:code": crs, "proj:transform": [10, 0, 0, 0, -10, 0]}
    assert georeference_of_asset({"properties": stated}, {}) is None
    assert connections(elsewhere) == 0


@pytest.mark.parametrize(
    "form",
    ["EPSG:32631", "epsg:32631", "urn:ogc:def:crs:EPSG::32631", "+proj=utm +zone=31",
     "http://www.opengis.net/def/crs/EPSG/0/32631",
     WKT, CRS.from_epsg(32631).to_wkt(version="WKT2_2019"),
     json.dumps(CRS.from_epsg(32631).to_dict(projjson=True))],
)  # fmt: skip
def test_a_crs_may_be_stated_in_each_form(form: str) -> None:
    assert crs_of(form) == CRS.from_epsg(32631)


def test_gdals_options_forbid_other_files() -> None:
    with gdal_options():
        options = rasterio.env.getenv()
    assert options["GDAL_DISABLE_READDIR_ON_OPEN"] == "EMPTY_DIR"
    assert options["GDAL_PAM_ENABLED"] in {"NO", False}
    assert options["GDAL_GEOREF_SOURCES"] == "INTERNAL"
    assert options["CPL_VSIL_CURL_ALLOWED_FILENAME"] == "none"


# Codecs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "compress", ["none", "packbits", "lzw", "deflate", "zstd", "lzma", "jpeg", "webp", "lerc",
                 "lerc_zstd", "lerc_deflate"],
)  # fmt: skip
def test_pixels_of_every_codec_may_be_garbage(tmp_path: Path, compress: str) -> None:
    """The header is sound, and where the pixels should be is noise: an error of ours, or values."""
    path = tmp_path / "a.tif"
    values = (np.random.default_rng(3).integers(50, 200, (3, 64, 64))).astype(np.uint8)
    write(path, values, descriptions=BANDS, tags={"datetime": "2021-01-01"}, compress=compress,
          interleave="pixel" if compress in {"jpeg", "webp"} else "band")  # fmt: skip
    content = path.read_bytes()
    tiff = Tiff.parse(content)
    strips, sizes = (tiff.directories[0].get(tag) for tag in (STRIPS, STRIP_BYTES))
    assert strips is not None
    assert sizes is not None
    rng = np.random.default_rng(5)
    rejected = 0
    for keep in (0, 2, 20, 100):
        noisy = bytearray(content)
        for at, size in zip(tiff.numbers(strips), tiff.numbers(sizes), strict=True):
            noisy[at + keep : at + size] = rng.bytes(max(0, size - keep))
        stack = opened(bytes(noisy), tmp_path)
        try:
            with StackReader(stack) as reader:
                reader.read(Window(0, 0, 64, 64))
        except CorruptRaster:
            rejected += 1
    assert rejected or compress in {"none", "packbits", "lzw", "jpeg"}


def test_a_value_outside_the_file_is_harmless(sound: bytes, tmp_path: Path) -> None:
    def beyond(tiff: Tiff, directory: Directory) -> None:
        entry = directory.get(GDAL_XML)
        assert entry is not None
        entry.raw, entry.data = True, struct.pack("<I", 2**32 - 1)

    with pytest.raises(PIMCError, match=r"sent\.tif"):
        opened(edited(sound, beyond), tmp_path)

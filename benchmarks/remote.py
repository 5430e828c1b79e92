"""Reading parts of remote COGs: bytes beyond the needed blocks, and the rate at a latency.

    python -m benchmarks.remote --out remote.json

A server on the loopback, a process of its own, returns ranges of COGs of 10980 x 10980 pixels after
a wait per request. The service maps the same area of the same files by path and by URL. Each
request by URL has URLs of its own, so that no range comes from the service's cache.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
import rasterio
import rasterio.shutil
import rasterio.warp
from affine import Affine
from rasterio.windows import Window, bounds, from_bounds

from benchmarks.serving import served

CRS = "EPSG:32631"
TRANSFORM = Affine(10, 0, 600_000, 0, -10, 5_000_040)
BANDS = ("B02", "B04", "B08")
TILE = 10_980
"""Rows and columns of a Sentinel-2 tile at 10 m."""


def write_cog(path: Path, side: int, block: int, window: Window) -> None:
    """Write a COG (side, side) uint16 with overviews, whose pixels are random inside a window.

    Args:
        path: path of the new file.
        side: rows and columns.
        block: rows and columns of a block.
        window: pixels with values from 300 to 4000, which hardly compress; all others are nodata.
    """
    shape = {"width": side, "height": side, "count": 1, "dtype": "uint16", "nodata": 0}
    tiles = {"tiled": True, "blockxsize": block, "blockysize": block, "SPARSE_OK": "TRUE"}
    plain = path.with_suffix(".plain.tif")
    with rasterio.open(
        plain, "w", driver="GTiff", crs=CRS, transform=TRANSFORM, **shape, **tiles
    ) as file:
        size = (int(window.height), int(window.width))
        values = np.random.default_rng(0).integers(300, 4000, size, dtype=np.uint16)
        file.write(values, 1, window=window)
    rasterio.shutil.copy(
        plain, path, driver="COG", blocksize=block, compress="DEFLATE", SPARSE_OK="TRUE"
    )
    plain.unlink()


def degrees(window: Window) -> list[float]:
    """West, south, east and north of a window's pixels, in degrees."""
    return list(rasterio.warp.transform_bounds(CRS, "EPSG:4326", *bounds(window, TRANSFORM)))


def block_bytes(path: Path, west_south_east_north: Sequence[float]) -> int:
    """Bytes of the blocks of the full resolution that an area of a file intersects.

    Args:
        path: a file of one band.
        west_south_east_north: the area, in the file's CRS.
    """
    with rasterio.open(path) as file:
        needed = from_bounds(*west_south_east_north, transform=file.transform)
        (top, bottom), (left, right) = needed.round_offsets().round_lengths().toranges()
        total = 0
        for (row, column), block in file.block_windows(1):
            (first, last), (begin, end) = block.toranges()
            if first < bottom and top < last and begin < right and left < end:
                tag = f"BLOCK_SIZE_{column}_{row}"
                total += int(file.get_tag_item(tag, "TIFF", bidx=1) or 0)
        return total


def stack(folder: Path, source: Path, dates: int) -> list[str]:
    """Names of files in a folder that are all the same file: a file per date and band."""
    names = []
    for number in range(dates):
        day = date(2021, 1, 5) + timedelta(days=30 * number)
        for band in BANDS:
            names.append(f"S2B_31TGM_{day:%Y%m%d}_0_L2A_{band}.tif")
            (folder / names[-1]).hardlink_to(source)
    return names


# Range server -----------------------------------------------------------------------------------


async def serve(folder: Path, latency: float) -> None:
    """Serve ranges of a folder's files until the process ends; `/sent` has the bytes sent.

    Args:
        folder: the folder.
        latency: seconds that each request for a file waits.
    """
    sent = {"bytes": 0, "requests": 0}

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                target, asked = head.split(b" ", 2)[1].decode(), {}
                for line in head.decode("latin-1").split("\r\n")[1:-2]:
                    name, _, value = line.partition(":")
                    asked[name.lower()] = value.strip()
                path = folder / target.partition("?")[0].lstrip("/")
                if target == "/sent":
                    data, status = json.dumps(sent).encode(), "200 OK\r\n"
                else:
                    await asyncio.sleep(latency)
                    begin, end = asked["range"].removeprefix("bytes=").split("-")
                    with path.open("rb") as file:
                        file.seek(int(begin))
                        data = file.read(int(end) + 1 - int(begin))
                    status = (
                        f'206 Partial Content\r\nETag: "{path.stat().st_mtime_ns}"\r\n'
                        f"Content-Range: bytes {begin}-{int(begin) + len(data) - 1}/"
                        f"{path.stat().st_size}\r\n"
                    )
                    sent["bytes"] += len(data)
                    sent["requests"] += 1
                writer.write(f"HTTP/1.1 {status}Content-Length: {len(data)}\r\n\r\n".encode())
                writer.write(data)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextmanager
def range_server(folder: Path, latency: float) -> Iterator[str]:
    """The URL of a range server that runs as a process."""
    command = [sys.executable, "-m", "benchmarks.remote", "--serve", str(folder)]
    process = subprocess.Popen(  # noqa: S603 - this module
        [*command, "--latency", str(latency)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


# Measurements -----------------------------------------------------------------------------------


def measure(
    folder: Path, names: Sequence[str], *, side: int, latency: float, repeats: int
) -> dict[str, Any]:
    """Map an area by path and by URL in turns, and count what the server sent.

    Args:
        folder: folder of the files.
        names: names of the files.
        side: rows and columns of the area.
        latency: seconds that the range server waits per request.
        repeats: number of requests of each kind.
    """
    bbox = degrees(Window(4096 + 40, 4096 + 70, side, side))
    seconds: dict[str, list[float]] = {"path": [], "url": []}
    with (
        range_server(folder, latency) as url,
        served(allowed_roots=(folder,), allowed_hosts="127.0.0.1") as api,
    ):

        def run(hrefs: Sequence[str]) -> httpx.Response:
            items = [{"href": href} for href in hrefs]
            body = {"items": items, "bbox": bbox, "mask": "none"}
            response = api.post("/classify-pixels", json=body)
            assert response.status_code == 200, response.text
            return response

        expected = run([str(folder / name) for name in names]).content
        before = httpx.get(f"{url}/sent").json()
        for number in range(repeats):
            for kind, hrefs in (
                ("path", [str(folder / name) for name in names]),
                ("url", [f"{url}/{name}?{number}" for name in names]),
            ):
                begun = time.perf_counter()
                content = run(hrefs).content
                seconds[kind].append(time.perf_counter() - begun)
                assert content == expected
        sent = httpx.get(f"{url}/sent").json()
    with rasterio.MemoryFile(expected) as memory, memory.open() as made:
        pixels, extent = made.width * made.height, made.bounds
    needed = len(names) * block_bytes(folder / names[0], extent)
    by_path, by_url = (statistics.median(seconds[kind]) for kind in ("path", "url"))
    read = (sent["bytes"] - before["bytes"]) / repeats
    return {
        "side": side,
        "pixels": pixels,
        "files": len(names),
        "latency_s": latency,
        "requests": (sent["requests"] - before["requests"]) / repeats,
        "bytes_of_blocks": needed,
        "bytes_read": read,
        "bytes_ratio": read / needed,
        "seconds_by_path": by_path,
        "seconds_by_url": by_url,
        "rate_ratio": by_path / by_url,
    }


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--latency", type=float, default=0.02, help="seconds per request")
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--dates", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    given = parser.parse_args()
    if given.serve:
        asyncio.run(serve(given.serve, given.latency))
        return
    with TemporaryDirectory(prefix="remote-") as made:
        folder = Path(made)
        source = folder / "tile.tif"
        write_cog(source, TILE, 512, Window(4096, 4096, 2048, 2048))
        names = stack(folder, source, given.dates)
        results = [
            measure(folder, names, side=side, latency=given.latency, repeats=given.repeats)
            for side in given.sides
        ]
    for result in results:
        print(json.dumps(result))
    if given.out:
        given.out.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

"""A whole `/classify-pixels` request against the bare ONNX session, in one run.

    python benchmarks/request.py [--side 512] [--dates 36]

The same pixels go through the default classifier twice: once straight into `LoadedModel.pixels`,
as arrays in memory, and once as tiled GeoTIFFs over a socket and back as a COG. What matters is
the ratio; both rates depend on the machine and on who else uses it.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import onnxruntime
import rasterio
import uvicorn
from numpy.typing import NDArray
from rasterio.transform import from_origin
from rich.console import Console
from rich.table import Table

from models.registry import ZOO, Registry
from pimc_client import Client
from service.app import create_app
from service.engine import Engine
from service.settings import Settings

BANDS = ("B02", "B04", "B08")
FIRST = date(2021, 1, 5)


def landscape(side: int, dates: int, seed: int = 0) -> NDArray[np.uint16]:
    """Fields with a season and noise: (T, 3, side, side), reflectance x 10,000."""
    rng = np.random.default_rng(seed)
    fields = np.kron(rng.uniform(0, 1, (side // 16 + 1,) * 2), np.ones((16, 16)))[:side, :side]
    out = np.empty((dates, 3, side, side), np.uint16)
    for t in range(dates):
        green = np.clip(np.sin(np.pi * (t / dates + 0.3 * fields)), 0, 1)
        clean = np.stack([0.06 - 0.02 * green, 0.12 - 0.08 * green, 0.18 + 0.3 * green])
        out[t] = (clean + rng.normal(0, 0.004, clean.shape)).clip(0.001) * 10_000
    return out


def write_stack(values: NDArray[np.uint16], days: list[date], folder: Path) -> list[Path]:
    """One tiled, deflated GeoTIFF a date, as products come."""
    paths = []
    for day, bands in zip(days, values, strict=True):
        paths.append(folder / f"S2_{day:%Y%m%d}.tif")
        with rasterio.open(
            paths[-1],
            "w",
            driver="GTiff",
            dtype="uint16",
            count=len(BANDS),
            width=bands.shape[2],
            height=bands.shape[1],
            nodata=0,
            crs="EPSG:32631",
            transform=from_origin(500_000, 5_600_000, 10, 10),
            tiled=True,
            blockxsize=256,
            blockysize=256,
            compress="deflate",
        ) as file:
            file.write(bands)
            file.descriptions = BANDS
    return paths


@contextmanager
def service() -> Iterator[str]:
    """The service on a free port, in a thread."""
    app = create_app(Settings(providers="auto"))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def bare(values: NDArray[np.uint16], days: list[date], repeats: int) -> tuple[float, str]:
    """Best seconds of the session alone, and its provider."""
    pixels = values.reshape(len(days), 3, -1).transpose(2, 0, 1) / np.float32(10_000)
    valid = np.ones(pixels.shape[:2], np.bool_)
    offsets = np.array([(d - date(days[0].year, 1, 1)).days for d in days], np.float32)
    with Engine(Registry.load(ZOO), providers="auto") as engine:
        model = engine.find(None, "classify-pixels")
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            model.pixels(pixels, valid, offsets, 1)
            seconds.append(time.perf_counter() - start)
    return min(seconds), model.provider


def whole(paths: list[Path], repeats: int) -> tuple[float, dict[str, float]]:
    """Best seconds of the request, and its stages."""
    runs = []
    with service() as url, Client(url) as pimc:
        for _ in range(repeats):
            start = time.perf_counter()
            answer = pimc.classify_pixels(paths)
            runs.append((time.perf_counter() - start, dict(answer.timing)))
    return min(runs, key=lambda run: run[0])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--dates", type=int, default=36)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    days = [FIRST + timedelta(days=10 * t) for t in range(options.dates)]
    values = landscape(options.side, options.dates)
    count = options.side**2
    with tempfile.TemporaryDirectory() as folder:
        paths = write_stack(values, days, Path(folder))
        request, stages = whole(paths, options.repeats)
    session, provider = bare(values, days, options.repeats)
    table = Table("what", "seconds", "pixels/s", box=None)
    table.add_row("bare session", f"{session:.2f}", f"{count / session:,.0f}")
    table.add_row("whole request", f"{request:.2f}", f"{count / request:,.0f}")
    console = Console()
    console.print(
        f"{options.side} x {options.side} pixels, {options.dates} dates; {provider}, "
        f"onnxruntime {onnxruntime.__version__}, {platform.machine()}, {platform.system()}"
    )
    console.print(table)
    console.print(f"request / session rate: {session / request:.2f}; stages (s): {stages}")


if __name__ == "__main__":
    main()

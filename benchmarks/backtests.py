"""Forecasts with and without a backtest, from every month of real stacks.

    series up to the first of a month ──▶ forecast, with and without `backtest` ──▶ later values

A stack is sampled at 150 pixels, which are sent as series; the service sees no date after the
start, so all targets are later than everything that the backtest was fitted to. South Tyrol has
only seven dates of one month, so no forecast starts there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray

from models.registry import Registry
from service.infer.engine import Engine
from service.infer.plots import spectral_index
from service.read.geotiff import SourceFile
from service.run.execute import execute
from service.run.executors import ThreadExecutor
from service.run.plan import plan_request
from service.run.request import RasterRequest, SeriesInput
from service.run.series import plan_series, run_series
from training.datasets.stacks import read_romania, read_stack

Floats = NDArray[np.floating[Any]]
BANDS = ("B02", "B04", "B08")
_INDICES = ("NDVI", "EVI", "SAVI")
_PIXELS = 150
_SEASON = range(4, 10)
_STEP, _YEAR = 10, 365


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Sampled pixels of a stack."""

    dates: tuple[date, ...]
    values: Floats
    """Reflectance (N, T, C), NaN where not clear."""
    lonlat: tuple[float, float] | None = None
    """Longitude and latitude in degrees; None if unknown."""

    @property
    def indices(self) -> Floats:
        """NDVI, EVI and SAVI (N, T, S), NaN where one of them is missing."""
        bands = {band: self.values[..., c] for c, band in enumerate(BANDS)}
        found = np.stack([spectral_index(name.lower(), bands) for name in _INDICES], axis=-1)
        found[~np.isfinite(found).all(axis=-1)] = np.nan
        return found


def stacks(data: Path, romania: Path | None) -> Iterator[tuple[str, Pixels]]:
    """The real stacks that are there, by name."""
    folders = {"Flanders": "flanders_2017_2018", "Hesbaye a": "hesbaye_a_monthly",
               "Hesbaye b": "hesbaye_b_monthly"}  # fmt: skip
    scenes = {n: read_stack(data / f) for n, f in folders.items() if (data / f).is_dir()}
    if romania is not None:
        scenes["Romania"] = read_romania(romania)
    for name, scene in scenes.items():
        height, width = scene.shape
        rng = np.random.default_rng(0)
        chosen = rng.choice(height * width, _PIXELS, replace=False)
        bands = [scene.bands.index(band) for band in BANDS]
        T = len(scene.dates)
        stored = scene.values[:, bands].reshape(T, len(bands), -1)[:, :, chosen]
        values = stored.transpose(2, 0, 1) * scene.scale + scene.offset
        valid = scene.valid.reshape(T, -1)[:, chosen].T
        yield name, Pixels(dates=scene.dates, values=np.where(valid[..., None], values, np.nan))


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Forecasts of one stack from one month, and the values observed later."""

    month: int
    target: Floats
    """(N, H, S), NaN where unknown."""
    before: Floats
    """Quantiles without a backtest (N, H, S, 3)."""
    after: Floats
    """Quantiles with one."""
    persistence: Floats
    """(N, H, S)."""
    last_year: Floats
    """(N, H, S), NaN where unknown."""
    seconds: tuple[float, float]
    """Without and with a backtest."""


def forecasts(engine: Engine, pixels: Pixels) -> Iterator[Scored]:
    """Forecasts from the last date before every first of a month."""
    model = next(m for m in engine.models.values() if m.card.task == "forecast")
    first, last = pixels.dates[0], pixels.dates[-1]
    for year in range(first.year, last.year + 1):
        for month in range(1, 13):
            start = date(year, month, 1)
            dates = [day for day in pixels.dates if day <= start]
            if start < last and len(dates) >= model.card.min_observations:
                scored = _forecast(model, pixels, len(dates), month)
                if scored is not None:
                    yield scored


def _forecast(model: Any, pixels: Pixels, known: int, month: int) -> Scored | None:
    dates, values = pixels.dates[:known], pixels.values[:, :known]
    usable = np.isfinite(pixels.indices)
    given = [
        SeriesInput(
            id=str(n),
            lonlat=pixels.lonlat,
            dates=dates,
            bands={
                band: [None if np.isnan(v) else float(v) for v in one[:, c]]
                for c, band in enumerate(BANDS)
            },
        )
        for n, one in enumerate(values)
    ]
    found, seconds = [], []
    for backtest in (False, True):
        begun = time.perf_counter()
        outcome = run_series(plan_series(model, given, backtest=backtest))
        seconds.append(time.perf_counter() - begun)
        found.append(np.stack([_quantiles(r, model.card.horizon) for r in outcome.results]))
    horizon, origin = model.card.horizon, dates[-1].toordinal()
    days = np.array([day.toordinal() for day in pixels.dates])
    steps = origin + _STEP * np.arange(1, horizon + 1)
    latest = np.where(usable[:, :known, 0], np.arange(known), -1).max(axis=1)
    persistence = np.where(
        (latest >= 0)[:, None], pixels.indices[np.arange(len(values)), latest], np.nan
    )
    target = _nearest(pixels.indices[:, known:], days[known:], steps, _STEP / 2)
    if not np.isfinite(target + found[0][..., 1]).any():
        return None
    return Scored(
        month=month,
        target=target,
        before=found[0],
        after=found[1],
        persistence=np.broadcast_to(persistence[:, None], target.shape),
        last_year=_nearest(pixels.indices[:, :known], days[:known], steps - _YEAR, _STEP),
        seconds=(seconds[0], seconds[1]),
    )


def _quantiles(result: dict[str, Any], horizon: int) -> Floats:
    """Quantiles (H, S, 3) of a result of the service, NaN without a prediction."""
    if result["status"] != "ok":
        return np.full((horizon, len(_INDICES), 3), np.nan)
    return np.array([[result[i][q] for q in ("q10", "q50", "q90")] for i in _INDICES]).transpose(
        2, 0, 1
    )


def _nearest(indices: Floats, days: Floats, wanted: Floats, within: float) -> Floats:
    """Indices (N, H, S) of the clear date nearest to each day, NaN where none is near."""
    gaps = np.abs(days[:, None] - wanted)  # (T, H)
    gaps = np.where(np.isfinite(indices[..., :1]), gaps[None], np.inf)  # (N, T, H)
    if not len(days):
        return np.full((len(indices), len(wanted), indices.shape[-1]), np.nan)
    best = gaps.argmin(axis=1)
    near = np.take_along_axis(gaps, best[:, None], axis=1)[:, 0] <= within
    found = np.take_along_axis(indices, best[..., None], axis=1)
    return np.where(near[..., None], found, np.nan)


def _row(name: str, of: list[Scored]) -> list[str]:
    def all_of(get: str) -> Floats:
        return np.concatenate([getattr(one, get) for one in of])

    target, before, after = all_of("target"), all_of("before"), all_of("after")
    persistence, last_year = all_of("persistence"), all_of("last_year")
    known = np.isfinite(target + before[..., 1] + persistence).all(axis=-1)
    years = known & np.isfinite(last_year).all(axis=-1)

    def rmse(guess: Floats, where: NDArray[np.bool_]) -> str:
        squared = np.square(guess - target)[where]
        return f"{np.sqrt(squared.mean(axis=0)).mean():.3f}" if len(squared) else ""

    def coverage(quantiles: Floats) -> str:
        inside = (target >= quantiles[..., 0]) & (target <= quantiles[..., 2])
        return f"{inside[known].mean():.2f}" if known.any() else ""

    return [
        name, str(int(known.sum())), coverage(before), coverage(after), rmse(before[..., 1], known),
        rmse(after[..., 1], known), rmse(persistence, known), str(int(years.sum())),
        rmse(after[..., 1], years), rmse(last_year, years),
    ]  # fmt: skip


_HEAD = (
    "| stack, start | n | coverage without | with backtest | RMSE without | with backtest | "
    "persistence | n with last year | RMSE with backtest | last year's date |"
)


def table(found: dict[str, list[Scored]]) -> Iterator[str]:
    """Rows by stack: the season, all months, and each month."""
    yield _HEAD
    yield "|---" * 10 + "|"
    for name, scored in found.items():
        by_month: dict[int, list[Scored]] = defaultdict(list)
        for one in scored:
            by_month[one.month].append(one)
        season = [one for one in scored if one.month in _SEASON]
        rows = [("April to September", season)] if season else []
        rows += [("all months", scored), *((f"month {m}", by_month[m]) for m in sorted(by_month))]
        for label, of in rows:
            yield "| " + " | ".join(_row(f"{name}, {label}", of)) + " |"


def cost(engine: Engine, files: tuple[SourceFile, ...], repeats: int = 2) -> tuple[float, float]:
    """Least CPU seconds of a raster forecast without and with a backtest, of some repeats."""
    least = [float("inf"), float("inf")]
    for _ in range(repeats):
        for n, backtest in enumerate((False, True)):
            request = RasterRequest(task="forecast", files=files, backtest=backtest)
            begun = time.process_time()
            plan = plan_request(request, engine, max_raster_bytes=2**31, rasters=True)
            with TemporaryDirectory() as folder:
                execute(plan, Path(folder), executor=ThreadExecutor(), cancelled=Event())
            least[n] = min(least[n], time.process_time() - begun)
    return least[0], least[1]


def tiled(files: list[Path], folder: Path, times: int) -> tuple[SourceFile, ...]:
    """The files of a stack, repeated `times` across and down, as COGs do in blocks of 256."""
    made = []
    for path in files:
        with rasterio.open(path) as file:
            profile, values = file.profile, file.read()
            tags, names = file.tags(), file.descriptions
        values = np.tile(values, (1, times, times))
        side = {"height": values.shape[1], "width": values.shape[2]}
        block = {"tiled": True, "blockxsize": 256, "blockysize": 256}
        with rasterio.open(folder / path.name, "w", **{**profile, **side, **block}) as file:
            file.write(values)
            file.descriptions = names
            file.update_tags(**tags)
        made.append(SourceFile(name=path.name, path=folder / path.name))
    return tuple(made)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--romania", type=Path, help="the cube of the wheel nrt 0.2.1")
    parser.add_argument(
        "--cost", type=int, nargs="*", default=[], metavar="TIMES",
        help="only time rasters with and without a backtest: Flanders repeated so often each way",
    )  # fmt: skip
    parser.add_argument("--zoo", type=Path, default=Path("models/zoo"))
    chosen = parser.parse_args()
    found = {}
    with Engine(Registry.load(chosen.zoo), providers="cpu") as engine:
        for times in chosen.cost:
            with TemporaryDirectory() as folder:
                named = sorted((chosen.data / "flanders_2017_2018").glob("S2_*.tif"))
                files = tiled(named, Path(folder), times)
                without, with_it = cost(engine, files)
            print(f"| {64 * times} x {64 * times} | {without:.2f} s | {with_it:.2f} s | "
                  f"{with_it / without:.2f} |")  # fmt: skip
        if chosen.cost:
            return
        for name, pixels in stacks(chosen.data, chosen.romania):
            found[name] = list(forecasts(engine, pixels))
    for line in table(found):
        print(line)
    seconds = np.array([one.seconds for scored in found.values() for one in scored])
    without, with_it = seconds.sum(axis=0).round(2).tolist()
    print(json.dumps({"seconds without": without, "seconds with": with_it}))


if __name__ == "__main__":
    main()

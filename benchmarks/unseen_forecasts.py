"""Forecasts on series that no bundle was trained on, of one zoo or of two beside each other.

    public series ──▶ forecasts from every month ──▶ errors, coverage and interval score

Each source is one region and mostly one year, so differences between sources say more than the
number of targets. `--worldcereal` is a folder with files of the public repository
WorldCereal/worldcereal-classification: `test_public_extractions.parquet`, `data_0.parquet` (fields
of Flanders in 2021) and the two files of the chip 0000280849BAC91C, `S2_L2A_10m*.nc` and
`S2_L2A_20m*.nc`, which only its history holds.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import rasterio
from numpy.typing import NDArray

from benchmarks.backtests import BANDS, Floats, Pixels, Scored, forecasts
from models.registry import Registry
from service.infer.engine import Engine
from training.datasets.points import bavaria_2018, pune_2019
from training.datasets.stacks import CLEAR_SCL, read_safe_folders

_MOST, _OF_A_FIELD = 200, 10
_CLEAR_BLUE = 0.16
"""Blue reflectance at the top of the atmosphere below which a mean of a field counts as clear."""
_NODATA = 65535
_MONTH_SHIFT = 14
"""Days from the first of a month to the day that its composite is dated to."""
_SEASON = range(4, 10)
_MISS = 10.0
"""Weight of the distance of a target outside the band in the interval score: 2 / (1 - 0.8)."""


def unseen(data: Path, worldcereal: Path | None) -> Iterator[tuple[str, list[Pixels]]]:
    """Sources by name, each of one or several groups of pixels with common dates.

    Args:
        data: folder of the shared data sets.
        worldcereal: folder of the further files; None leaves them out.
    """
    if worldcereal is not None:
        yield "Belgium 2019", [_chip(worldcereal)]
        yield "Flanders fields 2021", [_long(worldcereal / "data_0.parquet")]
        africa = worldcereal / "test_public_extractions.parquet"
        yield "Uganda and South Sudan 2017", [_wide(africa)]
    fields = bavaria_2018(data / "bavaria_2018")[0]
    values = fields.values[..., [fields.bands.index(band) for band in BANDS]]
    yield "Bavaria fields 2018", [_pixels(fields.dates, values, values[..., 0] < _CLEAR_BLUE)]
    cached = sorted((data / "bavaria_2018" / "sentinelhub_10m").iterdir())
    yield "Bavaria wheat 2018", [_field(folder) for folder in cached]
    scene = read_safe_folders(data / "herault_safe_2018")
    stored = scene.values[:, [scene.bands.index(band) for band in BANDS]] * scene.scale
    dates, count = scene.dates, len(scene.dates)
    values, valid = stored.reshape(count, len(BANDS), -1), scene.valid.reshape(count, -1)
    some = valid.sum(axis=0) >= count // 2
    yield "Hérault 2018", [_pixels(dates, values.transpose(2, 0, 1)[some], valid.T[some])]
    pune = pune_2019(data / "pune_2019")[0]
    columns = [pune.bands.index(band) for band in BANDS]
    yield "Pune 2019", [_pixels(pune.dates, pune.values[..., columns], pune.valid)]


def _pixels(
    dates: Sequence[date], values: Floats, valid: NDArray[np.bool_], most: int = _MOST
) -> Pixels:
    """At most some of the pixels (N, T, C), NaN where not valid (N, T)."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(values))[:most])
    kept = np.where(valid[chosen][..., None], values[chosen], np.nan)
    return Pixels(dates=tuple(dates), values=kept)


def _field(folder: Path) -> Pixels:
    """Pixels of a field as sentinelhub-py keeps them: cloud, data, B01 to B08 and further bands."""
    layers = {}
    for one in folder.iterdir():
        url = json.loads((one / "request.json").read_text())["url"]
        found = re.search(r"TIME=(\d{4}-\d\d-\d\d)", url)
        if found is None:
            raise ValueError(f"{one} states no time")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with rasterio.open(one / "response.tiff") as file:
                layers[date.fromisoformat(found[1])] = file.read([1, 2, 4, 6, 10])
    days = sorted(layers)
    stack = np.stack([layers[day] for day in days]).reshape(len(days), 5, -1).transpose(2, 0, 1)
    cloud, there, values = stack[..., 0], stack[..., 1], stack[..., 2:]
    valid = (cloud == 0) & (there == 1) & (values > 0).all(axis=-1)
    inside = valid.mean(axis=1) > 0.6
    return _pixels(days, values[inside], valid[inside], _OF_A_FIELD)


def _chip(folder: Path) -> Pixels:
    """A window of 64 x 64 pixels with one layer per date; the scene classification is at 20 m."""
    (fine,), (coarse,) = folder.glob("S2_L2A_10m*.nc"), folder.glob("S2_L2A_20m*.nc")
    values = np.stack([_layers(fine, band)[0] for band in BANDS], axis=-1) * 1e-4
    scl, days = _layers(coarse, "SCL")
    valid = np.isin(scl.repeat(2, axis=1).repeat(2, axis=2), CLEAR_SCL) & (values > 0).all(axis=-1)
    count = len(days)
    by_pixel = values.reshape(count, -1, len(BANDS)).transpose(1, 0, 2)
    return _pixels(days, by_pixel, valid.reshape(count, -1).T)


def _layers(path: Path, name: str) -> tuple[NDArray[np.generic], list[date]]:
    """A variable (T, H, W) of a netCDF file and its dates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(f"netcdf:{path}:{name}") as file:
            values, tags = file.read(), file.tags()
    since = datetime.fromisoformat(tags["timestamp#units"].removeprefix("seconds since "))
    offsets = tags["NETCDF_DIM_timestamp_VALUES"].strip("{}").split(",")
    return values, [(since + timedelta(seconds=int(s))).date() for s in offsets]


def _long(path: Path) -> Pixels:
    """Monthly composites with one row per field and month."""
    columns = [f"S2-L2A-{band}" for band in BANDS]
    rows = pq.read_table(path, columns=["sample_id", "timestamp", *columns]).to_pydict()
    ids, row = np.unique(rows["sample_id"], return_inverse=True)
    months = sorted(set(rows["timestamp"]))
    column = [months.index(month) for month in rows["timestamp"]]
    values = np.full((len(ids), len(months), len(BANDS)), np.nan)
    values[row, column] = np.stack([rows[name] for name in columns], axis=-1)
    return _composites([month.date() for month in months], values)


def _wide(path: Path) -> Pixels:
    """Monthly composites with one row per field, all of the same twelve months."""
    table = pq.read_table(path)
    first = date.fromisoformat(table["start_date"][0].as_py())
    months = [date(first.year + (first.month + i - 1) // 12, (first.month + i - 1) % 12 + 1, 1)
              for i in range(12)]  # fmt: skip
    names = [[f"OPTICAL-{band}-ts{i}-10m" for i in range(12)] for band in BANDS]
    values = np.stack([[table[n].to_numpy() for n in own] for own in names]).transpose(2, 1, 0)
    return _composites(months, values.astype(float))


def _composites(months: Sequence[date], values: Floats) -> Pixels:
    """Stored composites (N, T, C), dated to the middle of their months."""
    valid = ((values > 0) & (values != _NODATA)).all(axis=-1)
    days = [month + timedelta(days=_MONTH_SHIFT) for month in months]
    return _pixels(days, values * 1e-4, valid)


def _row(label: str, found: Sequence[Sequence[Scored]]) -> str:
    """Errors of bundles on the targets that all of them forecast."""

    def all_of(bundle: int, name: str) -> Floats:
        return np.concatenate([getattr(one, name) for one in found[bundle]])

    target, persistence = all_of(0, "target"), all_of(0, "persistence")
    made = [all_of(n, name) for name in ("before", "after") for n in range(len(found))]
    together = target + persistence + sum(quantiles[..., 1] for quantiles in made)
    known = np.isfinite(together).all(axis=-1)

    def rmse(guess: Floats) -> str:
        return f"{np.sqrt(np.square(guess - target)[known].mean(axis=0)).mean():.3f}"

    def coverage(quantiles: Floats) -> str:
        inside = (target >= quantiles[..., 0]) & (target <= quantiles[..., -1])
        return f"{inside[known].mean():.3f}"

    def interval(quantiles: Floats) -> str:
        below, above = quantiles[..., 0], quantiles[..., -1]
        outside = np.maximum(below - target, 0) + np.maximum(target - above, 0)
        return f"{(above - below + _MISS * outside)[known].mean():.3f}"

    alone, corrected = made[: len(found)], made[len(found) :]
    cells = [label, str(int(known.sum()))]
    cells += [rmse(q[..., 1]) for q in alone] + [rmse(persistence)]
    cells += [score(q) for score in (coverage, interval) for q in alone]
    cells += [coverage(q) for q in corrected] + [rmse(q[..., 1]) for q in corrected]
    return "| " + " | ".join(cells) + " |"


def table(found: dict[str, list[list[Scored]]], names: Sequence[str]) -> Iterator[str]:
    """Rows by source: all months, April to September, and each month.

    Args:
        found: forecasts by source and bundle.
        names: of the bundles.
    """

    def of_each(what: str) -> list[str]:
        return [f"{what} {name}" for name in names]

    heads = ["series, start", "n", *of_each("RMSE"), "persistence", *of_each("coverage")]
    heads += [*of_each("interval score"), *of_each("coverage with backtest")]
    heads += of_each("RMSE with backtest")
    yield "| " + " | ".join(heads) + " |"
    yield "|---" * len(heads) + "|"
    for name, bundles in found.items():
        months = sorted({one.month for one in bundles[0]})
        groups = [("all months", months)]
        groups += [("April to September", [m for m in months if m in _SEASON])]
        groups += [(f"month {month}", [month]) for month in months]
        for label, chosen in groups:
            if chosen:
                kept = [[one for one in scored if one.month in chosen] for scored in bundles]
                yield _row(f"{name}, {label}", kept)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--worldcereal", type=Path, help="folder of the further files")
    parser.add_argument("--zoo", type=Path, action="append", help="once or more often")
    chosen = parser.parse_args()
    found: dict[str, list[list[Scored]]] = {}
    names = []
    for zoo in chosen.zoo or [Path("models/zoo")]:
        with Engine(Registry.load(zoo), providers="cpu") as engine:
            card = next(m.card for m in engine.models.values() if m.card.task == "forecast")
            names.append(card.version)
            for name, groups in unseen(chosen.data, chosen.worldcereal):
                scored = [one for pixels in groups for one in forecasts(engine, pixels)]
                found.setdefault(name, []).append(scored)
    for line in table(found, names):
        print(line)


if __name__ == "__main__":
    main()

"""Forecasts on series that no bundle was trained on, of one zoo or of two beside each other.

    public series ──▶ forecasts from every month ──▶ errors, coverage and interval score

Each source is one region and mostly one year, so differences between sources say more than the
number of targets. `--public` is the folder of `training.datasets.public`. Sources that a bundle's
card names as training data are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from benchmarks.backtests import BANDS, Floats, Pixels, Scored, forecasts
from models.registry import Registry
from service.infer.engine import Engine
from training.datasets import PixelSet
from training.datasets.points import pune_2019
from training.datasets.public import BESIDE_TRAINING, further_series, unseen_series

_MOST, _OF_A_SET = 200, 40
"""Most series of a region, and of one of its sets where it has several."""
_FAR = (0.0, -90.0)
"""A place far from all training data, as those of most sources are."""
_SEASON = range(4, 10)
_MISS = 10.0
"""Weight of the distance of a target outside the band in the interval score: 2 / (1 - 0.8)."""


def unseen(
    data: Path, public: Path | None, trained: Iterable[str]
) -> Iterator[tuple[str, list[Pixels]]]:
    """Regions by name, each of one or several groups of series with common dates.

    Args:
        data: folder of the shared data sets.
        public: folder of the files of public repositories; None leaves them out.
        trained: names of the sources that a bundle was trained on.
    """
    further = [*pune_2019(data / "pune_2019"), *further_series(data, public)]
    never = list(unseen_series(public)) if public else []
    # Kept although a card may name `worldcrops`: of that source only Kenya's fields are trained on.
    new = [pixels for pixels in further if pixels.source not in set(trained)] + never
    for region, found in groupby(new, key=lambda pixels: str(pixels.region)):
        sets = list(found)
        yield region, [_some(one, _MOST if len(sets) == 1 else _OF_A_SET) for one in sets]


def _some(pixels: PixelSet, most: int) -> Pixels:
    """At most some of the series, NaN where not valid."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(pixels.places))[:most])
    part = pixels.select(BANDS).take(chosen)
    values = np.where(part.valid[..., None], part.values, np.float32(np.nan))
    lonlat = None if pixels.region in BESIDE_TRAINING else _FAR
    return Pixels(dates=part.dates, values=values, lonlat=lonlat)


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
    parser.add_argument("--public", type=Path, help="folder of files of public repositories")
    parser.add_argument("--zoo", type=Path, action="append", help="once or more often")
    chosen = parser.parse_args()
    zoos = chosen.zoo or [Path("models/zoo")]
    cards = [bundle.card for zoo in zoos if (bundle := Registry.load(zoo).default("forecast"))]
    trained = {part.name for card in cards for part in card.training_data}
    sources = list(unseen(chosen.data, chosen.public, trained))
    found: dict[str, list[list[Scored]]] = {}
    for zoo in zoos:
        with Engine(Registry.load(zoo), providers="cpu") as engine:
            for name, groups in sources:
                scored = [one for pixels in groups for one in forecasts(engine, pixels)]
                found.setdefault(name, []).append(scored)
    for line in table(found, [card.version for card in cards]):
        print(line)


if __name__ == "__main__":
    main()

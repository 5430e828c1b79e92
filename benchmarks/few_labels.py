"""Pixel embeddings with few labels, beside plain models on the raw series.

python -m benchmarks.few_labels [--data ../shared/data] [--run FOLDER ...]
                                [--presto WEIGHTS] [--out SCORES] [--markdown TABLES]

The draws of labels are those of `benchmarks.own_classes`: labels from a random half of the places;
here all pixels of the other half are tested. An embedding is frozen, standardised and given to
logistic regression. The plain models are a random forest and logistic regression on the series,
gaps interpolated, with indices: of the three bands that the shipped embedding sees, and of all
bands of the region. The settings of every model are chosen by cross-validation over places.

Each run is a folder of `python -m training pretrain`, of which the encoder alone is measured; runs
that differ in their seed alone share a row. Presto (arXiv 2304.14065) sees monthly means of all
bands and the place; its public weights are the file `data/default_model.pt` of
github.com/nasaharvest/presto. Prints the Markdown of docs/results.md; with `--out` each score is
kept, so that a stopped run resumes. Uses one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from benchmarks.own_classes import (
    REGIONS,
    Draw,
    Known,
    Region,
    draw,
    forest,
    interpolated,
    mean_text,
    regression,
    with_indices,
)
from benchmarks.peers import MONTHS, PRESTO_BANDS, Presto
from models.card import TimeWindow
from models.graph import PixelGraph
from models.indices import SpectralIndices
from models.registry import ZOO, load_bundle
from training.config import BANDS, INDICES
from training.parity import Served
from training.pretrain import CHECKPOINT, FIRST, Networks, load_networks

_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
"""C of logistic regression, on series and on embeddings."""
_BATCH = 512
_TOGETHER = ("victoria", "us-crops")
"""Regions whose mean is stated too."""

Features = NDArray[np.float32]


def _regression(known: Known) -> float:
    return regression(known, _STRENGTHS)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Features of pixels and the model that learns from them."""

    row: str
    """Name of its row in the tables; the seeds of a run share one."""
    key: str
    """Name of its scores in `--out`; it changes with the weights."""
    three: bool
    """Whether the features are of `BANDS` alone, so that it is compared with such plain models."""
    plain: bool = False
    """Whether it is one of the models with which the others are compared."""
    features: Callable[[Region], Features | None]
    """Features of all pixels of a region (N, ...); None if bands are missing."""
    fit: Callable[[Known], float] = _regression
    """Macro-F1 of the model."""


# Arms -------------------------------------------------------------------------------------------


@cache
def _filled(region: Region) -> NDArray[np.float64]:
    """All series of a region (N, T, C), gaps interpolated."""
    return interpolated(region, np.arange(len(region.values)))


def three_bands(region: Region) -> Features:
    """The bands and indices that the shipped embedding sees, at the region's dates (N, T, 6)."""
    bands = _filled(region)[..., [region.bands.index(band) for band in BANDS]]
    indices = SpectralIndices(INDICES, BANDS)(torch.from_numpy(bands)).numpy()
    return np.concatenate([bands, np.nan_to_num(indices)], axis=-1).astype(np.float32)


def all_bands(region: Region) -> Features:
    """All bands and their normalised differences, at the region's dates (N, T, C + K)."""
    return with_indices(region.bands, _filled(region))


def plain_arms() -> list[Arm]:
    """Random forest and logistic regression, on three bands and on all."""
    return [
        Arm(row=f"{model}, {bands}", key=f"{model}, {bands}", three=three, plain=True,
            features=features, fit=fit)
        for bands, three, features in (
            ("three bands", True, three_bands),
            ("all bands", False, all_bands),
        )
        for model, fit in (
            ("random forest", forest),
            ("logistic regression", _regression),
        )
    ]  # fmt: skip


def embedded(
    region: Region, graph: PixelGraph | Served, bands: Sequence[str], window: TimeWindow
) -> Features | None:
    """Embeddings of all pixels (N, D), of the dates in the time window; 0 without a clear date.

    Args:
        region: the pixels.
        graph: without a head.
        bands: what the graph takes, in order.
        window: places the dates, as the service does.
    """
    if not set(bands) <= set(region.bands):
        return None
    values = region.values[..., [region.bands.index(band) for band in bands]]
    valid = np.isfinite(values).all(axis=2)
    found: Features | None = None
    calendars, kind = np.unique(region.dates, axis=0, return_inverse=True)
    for number, calendar in enumerate(calendars):
        dates = [date.fromisoformat(day) for day in calendar]
        placed = window.resolve(dates)
        used = list(placed.used)
        days = torch.tensor([float((dates[n] - placed.first_day).days) for n in used])
        rows = np.flatnonzero(kind.ravel() == number)
        for batch in np.split(rows, range(_BATCH, len(rows), _BATCH)):
            with torch.inference_mode():
                out = graph.raw(
                    torch.from_numpy(np.nan_to_num(values[batch][:, used])),
                    torch.from_numpy(valid[batch][:, used]),
                    days,
                ).numpy()
            if found is None:
                found = np.zeros((len(values), out.shape[1]), np.float32)
            found[batch] = np.nan_to_num(out)
    return found


def _graph_arm(row: str, key: str, networks: Networks) -> Arm:
    """The encoder's own numbers: the series that follow them in a bundle are those of every run."""
    graph = networks.pixel.eval()
    grid = networks.pixel.grid
    window = TimeWindow(
        steps=grid.steps, step_days=round(float(grid.grid[1])), start="fullest-year"
    )
    bands = graph.indices.bands

    def features(region: Region) -> Features | None:
        found = embedded(region, graph, bands, window)
        return None if found is None else found[:, : graph.encoder.embedding]

    return Arm(
        row=row,
        key=key,
        three=set(bands) <= set(BANDS),
        features=features,
    )


def untrained_arm() -> Arm:
    """The encoder of the shipped embedding with random weights."""
    torch.manual_seed(0)
    networks = Networks(FIRST)
    weights = networks.pixel.state_dict().values()
    key = _digest(b"".join(value.numpy().tobytes() for value in weights))
    return _graph_arm("untrained encoder", key, networks)


def shipped_arms(folder: Path = ZOO / "embed-pixel") -> list[Arm]:
    """An embedding bundle's ONNX file, as served; then its encoder and its series, each alone."""
    bundle = load_bundle(folder)
    card = bundle.card
    length = card.training["config"]["pixel"]["embedding"]
    parts = {
        "": slice(None),
        ", encoder alone": slice(0, length),
        ", series alone": slice(length, None),
    }
    whole = cache(
        partial(embedded, graph=Served(bundle.path()), bands=card.bands, window=card.window)
    )

    def features(region: Region, part: slice) -> Features | None:
        found = whole(region)
        return None if found is None else found[:, part]

    return [
        Arm(
            row=f"{card.name} {card.version}{name}",
            key=_digest(bundle.path().read_bytes()) + name,
            three=set(card.bands) <= set(BANDS),
            features=partial(features, part=part),
        )
        for name, part in parts.items()
    ]


def run_arms(folders: Sequence[Path]) -> list[Arm]:
    """The pixel encoders of pretraining runs; a row has its first folder's name, less the seed."""
    rows: dict[str, list[Path]] = {}
    loaded = {folder: load_networks(folder / CHECKPOINT) for folder in folders}
    for folder, (config, _) in loaded.items():
        rows.setdefault(config.model_copy(update={"seed": 0}).model_dump_json(), []).append(folder)
    return [
        _graph_arm(_row_name(seeds), _digest((folder / CHECKPOINT).read_bytes()), loaded[folder][1])
        for seeds in rows.values()
        for folder in seeds
    ]


def _row_name(folders: Sequence[Path]) -> str:
    name = folders[0].name
    return name if len(folders) == 1 else re.sub(r"([-_. ]+(s|seed))?[-_. ]*\d+$", "", name) or name


def monthly(region: Region) -> NDArray[np.float64]:
    """Mean reflectance of each month's clear dates (N, 12, C); months without one interpolated."""
    months = region.dates.astype("datetime64[M]").astype(int) % MONTHS
    means = []
    for month in range(MONTHS):
        there = (months == month) & np.isfinite(region.values).all(axis=2)
        sums = np.where(there[..., None], region.values, 0).sum(axis=1, dtype=np.float64)
        count = there.sum(axis=1)[:, None]
        means.append(np.where(count > 0, sums / np.maximum(count, 1), np.nan))
    dates = np.array([f"2021-{month:02d}-15" for month in range(1, MONTHS + 1)])
    by_month = replace(
        region,
        values=np.stack(means, axis=1),
        dates=np.broadcast_to(dates, (len(region.values), MONTHS)),
    )
    return interpolated(by_month, np.arange(len(region.values)))


def presto_arm(weights: Path) -> Arm:
    """Presto's embedding of twelve months of all bands, NDVI and the place."""
    presto = Presto(weights)

    def features(region: Region) -> Features | None:
        if region.lonlat is None:
            return None
        series = np.full((len(region.values), MONTHS, len(PRESTO_BANDS)), np.nan, np.float32)
        there = [n for n, band in enumerate(PRESTO_BANDS) if band in region.bands]
        order = [region.bands.index(PRESTO_BANDS[n]) for n in there]
        series[..., there] = monthly(region)[..., order]
        lonlat = np.broadcast_to(region.lonlat, (len(series), 2))
        parts = [
            presto.with_place(series[n : n + _BATCH], lonlat[n : n + _BATCH]).numpy()
            for n in range(0, len(series), _BATCH)
        ]
        return np.concatenate(parts)

    return Arm(
        row="Presto, public weights",
        key=_digest(weights.read_bytes()),
        three=False,
        features=features,
    )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


# Scores -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Column:
    """A region and a number of labels, with its draws and the scores on them."""

    region: str
    labels: int
    draws: Sequence[Draw]
    classes: float
    """Mean number of classes of the draws."""
    scores: Mapping[str, NDArray[np.float64]]
    """Macro-F1 on each draw, by the arm's key."""

    @property
    def name(self) -> str:
        """Heading of the column."""
        return f"{self.region}, {self.labels}"


def compare(
    arms: Sequence[Arm],
    regions: Mapping[str, Callable[[], Region]],
    *,
    labels: Sequence[int],
    draws: int,
    out: Path | None,
    share: float = 0.0,
) -> list[Column]:
    """Every arm on the same draws.

    Args:
        arms: features and models.
        regions: readers of the regions by name.
        labels: numbers of labels of a class.
        draws: of each number of labels.
        out: file of scores; those that are there are not measured again.
        share: smallest share of a region's pixels; classes with fewer are left out.
    """
    kept: dict[str, float] = {}
    if out and out.exists():
        kept = json.loads(out.read_text())
    columns = []
    for name, load in regions.items():
        whole = load()
        region = _of_common_classes(whole, share)
        fewer = len(region.classes) < len(whole.classes)
        at = f"{name}, classes of {share:.1%}" if fewer else name
        drawn = {
            count: {
                f"{at}/{count}/{seed}": found
                for seed in range(draws)
                if (found := draw(region, count, seed, tested=None)) is not None
            }
            for count in labels
        }
        every = {key: one for several in drawn.values() for key, one in several.items()}
        for arm in arms:
            todo = {key: one for key, one in every.items() if f"{key}/{arm.key}" not in kept}
            x = arm.features(region) if todo else None
            if x is None:
                continue
            for key, one in todo.items():
                rows = np.concatenate([one.labels, one.tested])
                score = arm.fit(Known(region=region, drawn=one, values=x[rows]))
                kept[f"{key}/{arm.key}"] = score
                _keep(kept, out)
                print(f"{arm.row}, {key}: {score:.4f}", file=sys.stderr, flush=True)
        _filled.cache_clear()
        for count, several in drawn.items():
            if several:
                classes = [len(np.unique(region.classes[one.labels])) for one in several.values()]
                scores = {
                    arm.key: [kept.get(f"{key}/{arm.key}", np.nan) for key in several]
                    for arm in arms
                }
                columns.append(
                    Column(
                        region=name,
                        labels=count,
                        draws=list(several.values()),
                        classes=float(np.mean(classes)),
                        scores={
                            key: np.array(own)
                            for key, own in scores.items()
                            if not np.isnan(own).any()
                        },
                    )
                )
    return columns


def _of_common_classes(region: Region, share: float) -> Region:
    names, counts = np.unique(region.classes, return_counts=True)
    own = np.isin(region.classes, names[counts >= share * len(region.classes)])
    placed = region.lonlat is not None and region.lonlat.ndim == 2
    return replace(
        region,
        values=region.values[own],
        dates=region.dates[own],
        classes=region.classes[own],
        places=region.places[own],
        lonlat=region.lonlat[own] if placed else region.lonlat,
    )


def _keep(kept: Mapping[str, float], out: Path | None) -> None:
    if out:
        # Written to another file and renamed: a kill leaves the scores before.
        new = out.with_suffix(".new")
        new.write_text(json.dumps(kept, indent=0))
        new.replace(out)


# Tables -----------------------------------------------------------------------------------------


def tables(arms: Sequence[Arm], columns: Sequence[Column]) -> str:
    """The Markdown: macro-F1, and the points above the best plain model of the same bands."""
    rows: dict[str, list[Arm]] = {}
    for arm in arms:
        rows.setdefault(arm.row, []).append(arm)
    names = [column.name for column in columns]
    text = [*_head(["features", "seeds", *names])]
    for row, seeds in rows.items():
        cells = [mean_text(s.mean(axis=0).tolist()) if (s := _of(seeds, c)) is not None else "-"
                 for c in columns]  # fmt: skip
        text.append(_line([row, str(len(seeds)), *cells]))
    together = [
        (count, own)
        for count in dict.fromkeys(column.labels for column in columns)
        if (own := [c for c in columns if c.labels == count and c.region in _TOGETHER])
    ]
    text += ["", *_head(["features", *names, *(f"together, {count}" for count, _ in together)])]
    for row, seeds in rows.items():
        if seeds[0].plain:
            continue
        cells = [_points([_above(seeds, c, arms)]) for c in columns]
        cells += [_points([_above(seeds, c, arms) for c in own]) for _, own in together]
        text.append(_line([row, *cells]))
    text += ["", "Best plain models (three bands; all bands), classes and tested pixels:", ""]
    for column in columns:
        best = "; ".join(best_plain(arms, column, three=three).row for three in (True, False))
        tested = np.mean([len(one.tested) for one in column.draws])
        text.append(
            f"- {column.name} labels: {best}; {column.classes:.3g} classes, {tested:.0f} pixels, "
            f"{len(column.draws)} draws"
        )
    return "\n".join(text)


def best_plain(arms: Sequence[Arm], column: Column, *, three: bool) -> Arm:
    """The plain model with the highest mean over draws, of three bands or of all."""
    able = [arm for arm in arms if arm.plain and arm.three == three]
    return max(able, key=lambda arm: column.scores[arm.key].mean())


def _of(seeds: Sequence[Arm], column: Column) -> NDArray[np.float64] | None:
    """Scores (seeds, draws); None if they are not there."""
    if any(arm.key not in column.scores for arm in seeds):
        return None
    return np.stack([column.scores[arm.key] for arm in seeds])


def _above(seeds: Sequence[Arm], column: Column, arms: Sequence[Arm]) -> NDArray[np.float64] | None:
    """Points above the best plain model of the same bands (seeds, draws)."""
    scores = _of(seeds, column)
    if scores is None:
        return None
    best = best_plain(arms, column, three=seeds[0].three)
    return 100 * (scores - column.scores[best.key])


def _points(regions: Sequence[NDArray[np.float64] | None]) -> str:
    """Mean over regions, its standard error over draws, and its deviation over seeds."""
    there = [points for points in regions if points is not None]
    if len(there) < len(regions):
        return "-"
    by_draw = [points.mean(axis=0) for points in there]
    errors = [np.std(p, ddof=1) / np.sqrt(len(p)) if len(p) > 1 else np.nan for p in by_draw]
    # The draws of one region do not depend on those of another.
    error = np.sqrt(np.square(errors).sum()) / len(there)
    text = f"{np.mean([p.mean() for p in by_draw]):+.1f} ± {error:.1f}"
    by_seed = np.mean([points.mean(axis=1) for points in there], axis=0)
    return text if len(by_seed) == 1 else f"{text} (sd {np.std(by_seed, ddof=1):.1f})"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _head(cells: Sequence[str]) -> list[str]:
    return [_line(cells), f"|{'---|' * len(cells)}"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument(
        "--region", nargs="+", choices=REGIONS, default=["victoria", "us-crops", "pune"]
    )
    parser.add_argument("--labels", nargs="+", type=int, default=[10, 30, 100], help="of a class")
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument(
        "--share", type=float, default=0, help="of a region's pixels; rarer classes are left out"
    )
    parser.add_argument(
        "--run", nargs="+", action="extend", type=Path, default=[], help="folders of pretraining"
    )
    parser.add_argument("--presto", type=Path, help="file of Presto's public weights")
    parser.add_argument("--out", type=Path, help="JSON file of the scores, also of earlier runs")
    parser.add_argument("--markdown", type=Path, help="file for the tables, which are also printed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)  # the largest C need not converge
    folders = [folder for folder in options.run if (folder / CHECKPOINT).exists()]
    for folder in set(options.run) - set(folders):
        print(f"{folder} holds no {CHECKPOINT} and is left out", file=sys.stderr)
    arms = [*plain_arms(), untrained_arm(), *shipped_arms()]
    arms += [presto_arm(options.presto)] if options.presto else []
    arms += run_arms(folders)
    with threadpool_limits(1):
        columns = compare(
            arms,
            {name: partial(REGIONS[name], options.data) for name in options.region},
            labels=options.labels,
            draws=options.draws,
            out=options.out,
            share=options.share,
        )
    text = tables(arms, columns)
    if options.markdown:
        options.markdown.write_text(f"{text}\n")
    print(text)


if __name__ == "__main__":
    main()

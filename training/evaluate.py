"""Scores of finished runs beside naive and strong baselines, on the same split.

runs -> predictions -> scores, with intervals by bootstrap over places -> tables and cards

Each table goes into its section of `docs/results.md`, which a later evaluation replaces, and into
the card of the bundle.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import rasterio
import torch
from numpy.typing import NDArray
from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor, RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from models.card import ModelCard
from models.registry import Bundle, load_bundle
from models.timegrid import TimeGrid
from training.calibration import cross_fitted_scores, macro_f1
from training.classification import PixelClassification, in_window
from training.config import ZOO, ClassifyConfig, ForecastConfig, LandcoverConfig, difference
from training.datasets.stacks import read_romania
from training.export import write_card
from training.finetune import Task, load_finished
from training.forecasting import SCORED_CUT, PixelForecast, cut, forecast_scores
from training.landcover import PatchClassification
from training.series import SeriesTable

Floats = NDArray[np.float32] | NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Config = ClassifyConfig | ForecastConfig | LandcoverConfig
_RESAMPLES = 1000
_TREES = 200
_TREES_CODE = 10
_TREE_COVER = "tree_cover_density_2018_romania.tif"
OURS = "ours"
_INTRODUCTION = """# Results

Written by `python -m training evaluate`, which replaces its own sections. Each row was scored on
the same pixels or patches as the others of its table, in places that no training saw.
"""


@dataclass(frozen=True, kw_only=True)
class Score:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model in a table."""

    name: str
    seeds: int
    scores: Mapping[str, Score]
    """By the name of the column; mean over seeds."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """The scores of all models on one split."""

    bundle: str
    split: str
    n: int
    places: int
    rows: Sequence[Row]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A finished run, ready to predict."""

    folder: Path
    config: Config
    task: Task[Any]
    graph: Any
    metrics: Mapping[str, Any]
    label: str
    """`OURS`, or what differs from the zoo's configuration."""


def _label(config: Config) -> str:
    changes = difference(ZOO[config.name].model_dump(), config.model_dump())
    return ", ".join(f"{key} {value}" for key, value in changes.items()) or OURS


def evaluate(runs: Sequence[Path], *, zoo: Path, report: Path) -> list[Table]:
    """Score runs and their baselines; write the tables into the report and the cards.

    Args:
        runs: folders of finished runs that left the validation places out; those that differ in
            their seed alone share a row.
        zoo: folder of bundles, whose cards get the table.
        report: the Markdown file.

    Returns:
        A table for each bundle.
    """
    grouped: dict[str, list[Loaded]] = defaultdict(list)
    for folder in runs:
        run, task, graph, metrics = load_finished(folder)
        if run.everything:
            continue
        grouped[run.config.name].append(
            Loaded(
                folder=folder,
                config=run.config,
                task=task,
                graph=graph,
                metrics=metrics,
                label=_label(run.config),
            )
        )
    for name, loaded in grouped.items():
        if len({run.label for run in loaded}) == 1:
            # Nothing of ours to tell it from: whatever its configuration, it is the one we ship.
            grouped[name] = [replace(run, label=OURS) for run in loaded]
    tables = [_table(name, loaded) for name, loaded in grouped.items()]
    for table in tables:
        write_section(report, table.bundle, markdown(table))
        if (zoo / table.bundle).is_dir():
            _into_card(zoo / table.bundle, table)
    return tables


def _table(name: str, loaded: Sequence[Loaded]) -> Table:
    first = loaded[0].task
    if isinstance(first, PixelClassification):
        return _classification_table(name, loaded, first)
    if isinstance(first, PixelForecast):
        return _forecast_table(name, loaded, first)
    if isinstance(first, PatchClassification):
        return _landcover_table(name, loaded, first)
    raise TypeError(f"no table is known for {type(first).__name__}")


# Classification of pixels and of patches --------------------------------------------------------


def _classification_table(name: str, loaded: Sequence[Loaded], task: PixelClassification) -> Table:
    fit = regular_series(task.train, task.config)
    judge = regular_series(task.validation, task.config)
    labels, places = task.validation.labels, task.validation.places
    predicted = {
        title: model.fit(fit, task.train.labels).predict_proba(judge)
        for title, model in _classifiers().items()
    }
    answers = {
        title: [_spread(shares, np.unique(task.train.labels), len(task.legend))]
        for title, shares in predicted.items()
    }
    for run in loaded:
        if isinstance(run.task, PixelClassification):
            logits = run.task.logits(run.graph, run.task.validation)
            answers.setdefault(run.label, []).append(logits)
    split = "places of 0.1 degree that training never saw"
    return _classes_table(name, answers, labels, places, split)


def _landcover_table(name: str, loaded: Sequence[Loaded], task: PatchClassification) -> Table:
    forest = RandomForestClassifier(_TREES, min_samples_leaf=2, random_state=0)
    forest.fit(_colours(task, task.train), task.labels[task.train])
    shares = forest.predict_proba(_colours(task, task.validation))
    answers: dict[str, list[Floats]] = {"random forest on colours": [_logarithm(shares)]}
    for run in loaded:
        if isinstance(run.task, PatchClassification):
            answers.setdefault(run.label, []).append(run.task.logits(run.graph))
    labels = task.labels[task.validation]
    places = task.patches.places[task.validation]
    return _classes_table(name, answers, labels, places, "EuroSAT's spatial split")


def _classes_table(
    name: str, answers: Mapping[str, Sequence[Floats]], labels: Ints, places: Ints, split: str
) -> Table:
    rows = [
        Row(
            name=title,
            seeds=len(seeds),
            scores=_mean([_class_scores(logits, labels, places) for logits in seeds]),
        )
        for title, seeds in answers.items()
    ]
    return Table(bundle=name, split=split, n=len(labels), places=len(np.unique(places)), rows=rows)


def _class_scores(logits: Floats, labels: Ints, places: Ints) -> dict[str, Score]:
    predicted = logits.argmax(axis=1)
    classes = logits.shape[1]
    matrices = place_confusions(predicted, labels, places, classes)
    error = cross_fitted_scores(logits, labels, places)["expected_calibration_error"]
    return {
        "accuracy": _interval(
            matrices, lambda c: float(np.trace(c) / c.sum()), float((predicted == labels).mean())
        ),
        "macro-F1": _interval(matrices, _macro_f1, macro_f1(predicted, labels, classes)),
        "calibration error": Score(value=error, low=error, high=error),
    }


def place_confusions(predicted: Ints, labels: Ints, places: Ints, classes: int) -> Floats:
    """Confusion matrix of each place (P, K, K): the right class by the predicted one."""
    number = np.unique(places, return_inverse=True)[1]
    cells = (number * classes + labels) * classes + predicted
    counts = np.bincount(cells, minlength=(number.max() + 1) * classes**2)
    return counts.reshape(-1, classes, classes).astype(np.float64)


def _macro_f1(confusion: Floats) -> float:
    there = confusion.sum(axis=1) > 0
    both = confusion.sum(axis=0) + confusion.sum(axis=1)
    return float((2 * np.diag(confusion)[there] / both[there]).mean())


def _classifiers() -> dict[str, Any]:
    return {
        "random forest": RandomForestClassifier(_TREES, random_state=0),
        "extra trees": ExtraTreesClassifier(_TREES, random_state=0),
        "logistic regression": make_pipeline(
            StandardScaler(), LogisticRegression(C=0.1, max_iter=300)
        ),
    }


def regular_series(table: SeriesTable, config: ClassifyConfig) -> Floats:
    """What the baselines see: the indices of each pixel on the regular grid (N, S x M)."""
    window = config.window
    grid = TimeGrid(window.steps, window.step_days)
    valid = in_window(table, window.steps * window.step_days)
    indices = torch.from_numpy(table.indices).transpose(1, 2)
    series, _ = grid(indices, torch.from_numpy(valid), torch.from_numpy(table.days))
    return np.asarray(series.flatten(1).numpy())


def _colours(task: PatchClassification, chosen: Ints) -> Floats:
    """Mean, spread and quantiles of each band of patches (N, 5 C)."""
    parts = []
    for some in np.array_split(chosen, -(-len(chosen) // 512)):
        pixels = task.read(some).reshape(len(some), 3, -1)
        quantiles = np.quantile(pixels[:, :, ::7], (0.1, 0.5, 0.9), axis=2)
        parts.append(np.concatenate([pixels.mean(2), pixels.std(2), *quantiles], axis=1))
    return np.concatenate(parts)


def _spread(shares: Floats, there: Ints, classes: int) -> Floats:
    """Probabilities of the classes a baseline has seen, as logits of all (N, K)."""
    whole = np.zeros((len(shares), classes))
    whole[:, there] = shares
    return _logarithm(whole)


def _logarithm(shares: Floats) -> Floats:
    """Logits of probabilities; a forest's zeros become small."""
    return np.log(np.maximum(shares, 1e-3))


# Forecasts --------------------------------------------------------------------------------------


def _forecast_table(name: str, loaded: Sequence[Loaded], task: PixelForecast) -> Table:
    training = task.train.take(task.scored)
    past, _, ahead, seen = _cut_series(training, task)
    now, last, target, known = _cut_series(task.validation, task)
    places = task.validation.places
    answers: dict[str, list[NDArray[Any]]] = {
        "persistence": [np.broadcast_to(last[:, None], target.shape)],
        "climatology": [
            np.broadcast_to(np.nanmean(np.where(seen, ahead, np.nan), axis=0), target.shape)
        ],
        "ridge": [_regress(lambda: Ridge(1.0), past, ahead, seen, now)],
        "extra trees": [
            _regress(
                lambda: ExtraTreesRegressor(60, min_samples_leaf=3, random_state=0),
                *(past, ahead, seen, now),
            )
        ],
    }
    rows = [
        Row(name=title, seeds=1, scores=_errors(seeds[0][..., None], target, known, places))
        for title, seeds in answers.items()
    ]
    by_label: dict[str, list[dict[str, Score]]] = defaultdict(list)
    for run in loaded:
        if isinstance(run.task, PixelForecast):
            quantiles, wanted, there = run.task.predict(run.graph)
            kept = run.task.kept()
            by_label[run.label].append(_errors(quantiles, wanted, there, places[kept]))
    rows += [
        Row(name=label, seeds=len(seeds), scores=_mean(seeds)) for label, seeds in by_label.items()
    ]
    return Table(
        bundle=name,
        split=(
            "US crops of 2021, places of 0.1 degree that training never saw; 26 ten-day "
            "composites in, 10 out, clear targets, index units"
        ),
        n=int(known[..., 0].sum()),
        places=len(np.unique(places)),
        rows=rows,
    )


def _cut_series(table: SeriesTable, task: PixelForecast) -> tuple[Floats, Floats, Floats, Bools]:
    """Regular series up to the scored cut (N, S x M'), last values (N, S), targets and known."""
    window = task.config.window
    positions = np.full(len(table), SCORED_CUT)
    valid, days, _, target, known = cut(
        table, positions, window.steps, window.step_days, task.config.horizon
    )
    grid = TimeGrid(window.steps, window.step_days)
    indices = torch.from_numpy(table.indices).transpose(1, 2)
    series, _ = grid(indices, torch.from_numpy(valid), torch.from_numpy(days))
    recent = series[..., -SCORED_CUT:].nan_to_num().numpy()
    place = np.where(valid, days, -np.inf).argmax(axis=1)
    return (
        recent.reshape(len(table), -1),
        table.indices[np.arange(len(table)), place],
        target,
        known,
    )


def _regress(
    make: Callable[[], Any], past: Floats, ahead: Floats, seen: Bools, now: Floats
) -> Floats:
    """A regression for each step ahead, on the pixels whose target is known there."""
    steps = []
    for h in range(ahead.shape[1]):
        rows = seen[:, h, 0]
        steps.append(make().fit(past[rows], ahead[rows, h]).predict(now))
    return np.stack(steps, axis=1)


def _errors(quantiles: Floats, target: Floats, known: Bools, places: Ints) -> dict[str, Score]:
    """RMSE by index, their mean, and the share within the outer quantiles."""
    middle = quantiles[..., quantiles.shape[-1] // 2]
    number = np.unique(places, return_inverse=True)[1]
    indices = target.shape[-1]
    inside = (target >= quantiles[..., 0]) & (target <= quantiles[..., -1])
    sums = np.zeros((number.max() + 1, 3, indices))
    for row, part in enumerate((np.square(middle - target), np.ones(target.shape), inside)):
        np.add.at(sums[:, row], number, np.where(known, part, 0).sum(axis=1))
    scores = forecast_scores(
        np.asarray(quantiles, dtype=np.float32), np.asarray(target, dtype=np.float32), known
    )

    def rmse(c: Floats) -> Floats:
        return np.asarray(np.sqrt(c[0] / c[1]))

    out = {
        f"RMSE {index.upper()}": _interval(sums, lambda c, i=i: float(rmse(c)[i]), value)  # type: ignore[misc]  # i is bound
        for i, (index, value) in enumerate(scores["rmse"].items())
    }
    out["RMSE mean"] = _interval(sums, lambda c: float(rmse(c).mean()), scores["rmse_mean"])
    if quantiles.shape[-1] > 1:
        out["coverage"] = _interval(
            sums, lambda c: float(c[2].sum() / c[1].sum()), scores["coverage"]
        )
    return out


# The Romania cube, whose trees no training has seen ---------------------------------------------


def romania_report(folder: Path, *, zoo: Path, report: Path) -> str:
    """How far the served tree class agrees with the Copernicus tree cover of 2018.

    Args:
        folder: with `sentinel2_cube_subset_romania_10m.nc` and
            `tree_cover_density_2018_romania.tif`, from the wheel nrt==0.2.1.
        zoo: folder of bundles; the card of `pixels-landcover` takes the score.
        report: the Markdown file, which takes a section.
    """
    bundle = load_bundle(zoo / "pixels-landcover")
    agreement = tree_agreement(folder, bundle)
    text = (
        f"Pixels on which the class `Trees` of {bundle.card.id} agrees with tree cover of 50 % or "
        f"more: {agreement['agreement']:.3f} of {agreement['n']}. Tree cover holds "
        f"{agreement['tree_cover_share']:.3f} of the area, the map {agreement['map_share']:.3f}. "
        f"Calling every pixel a tree would agree on {agreement['tree_cover_share']:.3f}. "
        "No label of this area was trained on; the synthetic ground was adjusted while watching "
        "this number, so it is not blind."
    )
    write_section(report, "pixels-landcover on the Romania cube", text)
    told = {
        **bundle.card.model_dump(),
        "metrics": {**bundle.card.metrics, "romania_tree_cover_2018": agreement},
    }
    write_card(bundle.folder, ModelCard.model_validate(told))
    return text


def tree_agreement(folder: Path, bundle: Bundle) -> dict[str, Any]:
    """Agreement of a bundle's tree class with tree cover of 50 % or more, by pixel."""
    card = bundle.card
    scene = read_romania(folder / "sentinel2_cube_subset_romania_10m.nc")
    with rasterio.open(folder / _TREE_COVER) as file:
        cover = file.read(1)
    # 20 m pixels under 10 m ones, from the same corner.
    trees = np.kron(cover >= 50, np.ones((2, 2), dtype=bool))
    pixels = scene.pixels(card.bands)
    if card.window is None:
        raise ValueError(f"{card.id} has no time window")
    window = card.window.resolve(pixels.dates)
    used = list(window.used)
    session = onnxruntime.InferenceSession(bundle.path(), providers=["CPUExecutionProvider"])
    days = np.array(window.days(pixels.dates), dtype=np.float32)
    parts = [
        session.run(
            None,
            {
                "values": pixels.values[rows][:, used],
                "valid": pixels.valid[rows][:, used],
                "days": days,
            },
        )[0]
        for rows in np.array_split(np.arange(len(pixels.places)), 20)
    ]
    tree = next(c.value for c in card.classes if c.code == _TREES_CODE)
    mapped = (np.concatenate(parts).argmax(axis=1) == tree).reshape(scene.shape)
    return {
        "agreement": round(float((mapped == trees).mean()), 4),
        "n": int(trees.size),
        "tree_cover_share": round(float(trees.mean()), 4),
        "map_share": round(float(mapped.mean()), 4),
        "start": window.start.isoformat(),
    }


# Intervals and tables ---------------------------------------------------------------------------


def _interval(sums: Floats, score: Callable[[Floats], float], value: float) -> Score:
    """95 % interval of a score of sums over places, by drawing places with replacement.

    Args:
        sums: what the score needs, of each place (P, ...).
        score: of the sum over places (...).
        value: the score of all places as they are.
    """
    rng = np.random.default_rng(0)
    places = len(sums)
    drawn = [
        score(np.tensordot(rng.multinomial(places, np.full(places, 1 / places)), sums, axes=1))
        for _ in range(_RESAMPLES)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Score(value=value, low=float(low), high=float(high))


def _mean(seeds: Sequence[Mapping[str, Score]]) -> dict[str, Score]:
    return {
        key: Score(
            value=float(np.mean([s[key].value for s in seeds])),
            low=float(np.mean([s[key].low for s in seeds])),
            high=float(np.mean([s[key].high for s in seeds])),
        )
        for key in seeds[0]
    }


def markdown(table: Table) -> str:
    """A table as Markdown, with what is needed to read it."""
    columns = list(dict.fromkeys(key for row in table.rows for key in row.scores))
    lines = [
        (
            f"Split: {table.split}; n = {table.n}, {table.places} places. 95 % intervals by "
            f"{_RESAMPLES} bootstraps over places."
        ),
        "",
        "| model | seeds | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for row in table.rows:
        cells = [_cell(row.scores.get(column)) for column in columns]
        lines.append(f"| {row.name} | {row.seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(score: Score | None) -> str:
    if score is None:
        return ""
    return str(score) if score.low != score.high else f"{score.value:.3f}"


def write_section(report: Path, title: str, text: str) -> None:
    """Put a section under `## title` into a Markdown file, in place of the one it has."""
    old = report.read_text() if report.exists() else _INTRODUCTION
    section = f"## {title}\n\n{text}\n"
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    if pattern.search(old):
        new = pattern.sub(lambda _: section + "\n", old)
    else:
        new = f"{old.rstrip()}\n\n{section}"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(new.rstrip() + "\n")


def _into_card(folder: Path, table: Table) -> None:
    """The table as the card's `evaluation`."""
    card = load_bundle(folder).card
    evaluation = {
        "split": table.split,
        "n": table.n,
        "places": table.places,
        "interval": "95 %, bootstrap over places",
        "models": {
            row.name: {
                "seeds": row.seeds,
                **{key: _numbers(score) for key, score in row.scores.items()},
            }
            for row in table.rows
        },
    }
    told = {**card.model_dump(), "metrics": {**card.metrics, "evaluation": evaluation}}
    write_card(folder, ModelCard.model_validate(told))


def _numbers(score: Score) -> list[float]:
    return [round(v, 4) for v in (score.value, score.low, score.high)]

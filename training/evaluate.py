"""Evaluation: scores of finished runs and of naive and strong baselines, on the same split.

runs -> outputs, stored in their folders -> rows beside baselines -> tables, cards and run folders

Runs that differ only in their seed share a row. Each table is written into its section of
`docs/results.md`, which a later evaluation replaces, into the card of the bundle, and into the
folders of the runs, from which an export reads it.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from models.formulas import YEAR
from models.registry import Bundle, load_bundle
from models.timegrid import TimeGrid
from training import validation_outputs
from training.baselines import NAMES
from training.card import EVALUATION, same_configuration, write_card
from training.classification import PixelClassification, in_window
from training.config import (
    ZOO,
    ClassifyConfig,
    ForecastConfig,
    LandcoverConfig,
    Run,
    configuration,
    difference,
)
from training.datasets.stacks import read_romania
from training.datasets.synthetic_ground import SYNTHETIC
from training.errors import TrainingError
from training.finetune import RUN, load_finished, task_of
from training.forecasting import SCORED_CUT, PixelForecast, cut
from training.landcover import PatchClassification
from training.probe import NEIGHBOURS
from training.score_tables import Table, as_evaluation, markdown, outputs_row, sized, write_section
from training.series import SeriesTable
from training.task import Outputs

log = logging.getLogger(__name__)

Floats = NDArray[np.float32] | NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Config = ClassifyConfig | ForecastConfig | LandcoverConfig
_TREES = 200
_TREES_CODE = 10
_TREE_COVER = "tree_cover_density_2018_romania.tif"
OURS = "ours"
_PROTOCOLS = {"linear": "linear probe", "knn": f"{NEIGHBOURS} nearest neighbours"}
SPLITS = {
    "classify": "places of 0.1 degree that training never saw",
    "forecast": (
        "US crops of 2021, places of 0.1 degree that training never saw; 26 ten-day composites "
        "in, 10 out, clear targets, index units"
    ),
    "landcover": "EuroSAT's spatial split",
}


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A finished run with its outputs."""

    folder: Path
    run: Run
    outputs: Outputs


def evaluate(runs: Sequence[Path], *, zoo: Path, report: Path) -> list[Table]:
    """Score runs and their baselines; write the tables into the report and the cards.

    Args:
        runs: folders of finished runs; those that trained on the validation places are skipped,
            and those that differ only in their seed share a row.
        zoo: folder of bundles; the table goes into a bundle's card if the bundle has the
            configuration of one of the runs.
        report: the Markdown file.

    Returns:
        One table per bundle.
    """
    grouped: dict[str, list[Scored]] = defaultdict(list)
    for folder in runs:
        run = Run.model_validate_json((folder / RUN).read_bytes())
        if not run.everything:
            grouped[run.config.name].append(
                Scored(folder=folder, run=run, outputs=outputs_of(folder))
            )
    tables = [_table(name, scored) for name, scored in grouped.items()]
    for table, scored in zip(tables, grouped.values(), strict=True):
        write_section(report, table.title, markdown(table))
        evaluation = as_evaluation(table)
        for one in scored:
            (one.folder / EVALUATION).write_text(json.dumps(evaluation, indent=1))
        if (zoo / table.title).is_dir():
            _into_card(zoo / table.title, evaluation, scored)
    return tables


def outputs_of(folder: Path) -> Outputs:
    """Outputs of a finished run on the validation places; computed once, then stored.

    Raises:
        TrainingError: the run was trained on the validation places.
    """
    if not (folder / validation_outputs.FILE).exists():
        run, task, graph, _ = load_finished(folder)
        if run.everything:
            raise TrainingError(
                f"{folder.name} was trained on the validation places, so it cannot be scored "
                "there: give a run without --everything"
            )
        validation_outputs.save(task.outputs(graph), folder)
    return validation_outputs.load(folder)


def _table(name: str, scored: Sequence[Scored]) -> Table:
    # The baselines are trained on all labels, whatever share a run uses.
    first = max(scored, key=lambda s: getattr(s.run.config, "labels", 1.0)).run
    task = task_of(first)
    rows = [
        *(
            outputs_row(title, [outputs])
            for title, outputs in _BASELINES[task.config.task](task).items()
        ),
        *(outputs_row(label, [s.outputs for s in group]) for label, group in labelled(scored)),
    ]
    n, places = sized(scored[0].outputs)
    folders = " ".join(s.folder.as_posix() for s in scored)
    return Table(
        title=name,
        split=SPLITS[first.config.task],
        n=n,
        places=places,
        rows=rows,
        commands=[f"python -m training evaluate {folders}"],
    )


def labelled(scored: Sequence[Scored]) -> list[tuple[str, list[Scored]]]:
    """Runs grouped by how they differ from the zoo's configuration, ignoring the seed."""
    groups: dict[str, list[Scored]] = defaultdict(list)
    for one in scored:
        groups[label_of(one.run)].append(one)
    own = [label for label in groups if label.partition(",")[0] == OURS]
    if len(own) == 1:
        # A single configuration: it is the one that is shipped.
        return [(OURS if label in own else label, group) for label, group in groups.items()]
    return list(groups.items())


def label_of(run: Run) -> str:
    """The network, the protocol, and other differences from the zoo's configuration."""
    usual = configuration(run.config.name, run.config.task if _is_new(run.config) else None)
    changes = difference(usual.model_dump(mode="json"), run.config.model_dump(mode="json"))
    words = [NAMES.get(changes.pop("network", "pimc"), OURS)]
    if run.protocol != "finetune":
        words = [f"{_PROTOCOLS[run.protocol]} on {words[0]}"]
    if run.pretrained:
        words.append("from " + " and ".join(path.parent.name for path in run.pretrained))
    return ", ".join([*words, *(f"{key} {value}" for key, value in changes.items())])


def _is_new(config: Config) -> bool:
    return config.name not in ZOO


# Baselines --------------------------------------------------------------------------------------


def _patch_baselines(task: PatchClassification) -> dict[str, Outputs]:
    forest = RandomForestClassifier(_TREES, min_samples_leaf=2, random_state=0)
    forest.fit(_colours(task, task.train), task.labels[task.train])
    shares = forest.predict_proba(_colours(task, task.validation))
    return {"random forest on colours": task.outputs_of(_logarithm(shares))}


def _class_baselines(task: PixelClassification) -> dict[str, Outputs]:
    train, scored = (regular_series(table, task.config) for table in (task.train, task.validation))
    labels, real = task.train.labels, task.train.source != _synthetic(task.train)

    def fitted(model: Any, rows: Bools) -> Outputs:  # noqa: ANN401 - scikit-learn's have no type
        shares = model.fit(train[rows], labels[rows]).predict_proba(scored)
        return task.outputs_of(_spread(shares, np.unique(labels[rows]), len(task.legend)))

    found = {title: fitted(model, labels >= 0) for title, model in _classifiers().items()}
    if not real.all():
        forest = _classifiers()["random forest"]
        found["random forest without the synthetic ground"] = fitted(forest, real)
    return found


def _synthetic(table: SeriesTable) -> int:
    """Position of the synthetic ground among a table's sources, -1 if it has none."""
    return table.sources.index(SYNTHETIC) if SYNTHETIC in table.sources else -1


def _classifiers() -> dict[str, Any]:
    return {
        "random forest": RandomForestClassifier(_TREES, random_state=0),
        "extra trees": ExtraTreesClassifier(_TREES, random_state=0),
        "logistic regression": make_pipeline(
            StandardScaler(), LogisticRegression(C=0.1, max_iter=300)
        ),
    }


def regular_series(table: SeriesTable, config: ClassifyConfig) -> Floats:
    """Input of the baselines: the series that the encoders see of each pixel, on the regular grid.

    The indices (N, S x M), and the square roots of the bands beside them if the encoders see them.
    """
    window = config.window
    valid = in_window(table, window)
    return _on_grid(table, valid, table.days, config).reshape(len(table), -1)


def _on_grid(
    table: SeriesTable, valid: Bools, days: Floats, config: ClassifyConfig | ForecastConfig
) -> Floats:
    """Indices and, if the encoders see them, roots of the bands (N, S + C, M)."""
    window = config.window
    period = YEAR if window.yearly else None
    grid = TimeGrid(window.steps, window.step_days, period=period)
    seen = [table.indices]
    if config.reflectance:
        seen.append(np.sqrt(np.clip(table.values, 0.0, 1.0)))
    both = torch.from_numpy(np.concatenate(seen, axis=2)).transpose(1, 2)
    series, _ = grid(both, torch.from_numpy(valid), torch.from_numpy(days))
    return np.asarray(series.numpy())


def _colours(task: PatchClassification, chosen: Ints) -> Floats:
    """Mean, spread and quantiles of each band of patches (N, 5 C)."""
    parts = []
    for some in np.array_split(chosen, -(-len(chosen) // 512)):
        pixels = task.read(some).reshape(len(some), 3, -1)
        quantiles = np.quantile(pixels[:, :, ::7], (0.1, 0.5, 0.9), axis=2)
        parts.append(np.concatenate([pixels.mean(2), pixels.std(2), *quantiles], axis=1))
    return np.concatenate(parts)


def _spread(shares: Floats, there: Ints, classes: int) -> Floats:
    """Probabilities of the classes in a baseline's training data, as logits of all (N, K)."""
    spread = np.zeros((len(shares), classes))
    spread[:, there] = shares
    return _logarithm(spread)


def _logarithm(shares: Floats) -> Floats:
    """Logits of probabilities; a forest's zeros become 0.001."""
    return np.log(np.maximum(shares, 1e-3))


def _forecast_baselines(task: PixelForecast) -> dict[str, Outputs]:
    past, _, ahead, seen = _cut_series(task.train.take(task.scored), task)
    now, last, target, known = _cut_series(task.validation, task)
    mean = np.nanmean(np.where(seen, ahead, np.nan), axis=0)
    found = {
        "persistence": np.broadcast_to(last[:, None], target.shape),
        "climatology": np.broadcast_to(mean, target.shape),
        "ridge": _regress(lambda: Ridge(1.0), past, ahead, seen, now),
        "extra trees": _regress(
            # A third of the inputs at each split: at least as accurate as all of them, and faster.
            lambda: ExtraTreesRegressor(60, min_samples_leaf=3, max_features=0.33, random_state=0),
            *(past, ahead, seen, now),
        ),
    }
    rows = task.predicted()
    return {
        title: task.outputs_of(median[rows][..., None], target[rows], known[rows])
        for title, median in found.items()
    }


def _cut_series(table: SeriesTable, task: PixelForecast) -> tuple[Floats, Floats, Floats, Bools]:
    """Regular series up to the scored cut (N, (S + C) x M'), last values (N, S), targets, known."""
    window = task.config.window
    positions = np.full(len(table), SCORED_CUT)
    valid, days, _, target, known = cut(
        table, positions, window.steps, window.step_days, task.config.horizon
    )
    series = _on_grid(table, valid, days, task.config)
    recent = np.asarray(series[..., -SCORED_CUT:]).reshape(len(table), -1)
    place = np.where(valid, days, -np.inf).argmax(axis=1)
    return (
        np.where(np.isfinite(recent), recent, np.float32(0)),
        table.indices[np.arange(len(table)), place],
        target,
        known,
    )


def _regress(
    make: Callable[[], Any], past: Floats, ahead: Floats, seen: Bools, now: Floats
) -> Floats:
    """One regression per step ahead, on the pixels whose target is known there."""
    steps = []
    for h in range(ahead.shape[1]):
        rows = seen[:, h, 0]
        steps.append(make().fit(past[rows], ahead[rows, h]).predict(now))
    return np.stack(steps, axis=1)


# The naive and the classical baselines of each kind of task, by name.
_BASELINES: Mapping[str, Callable[[Any], dict[str, Outputs]]] = {
    "classify": _class_baselines,
    "forecast": _forecast_baselines,
    "landcover": _patch_baselines,
}


# The Romania cube, whose tree cover no model was trained on -------------------------------------


def romania_report(folder: Path, *, zoo: Path, report: Path) -> str:
    """Agreement of the served tree class with the Copernicus tree cover of 2018.

    Args:
        folder: holds `sentinel2_cube_subset_romania_10m.nc` and
            `tree_cover_density_2018_romania.tif`, from the wheel nrt==0.2.1.
        zoo: folder of bundles; the score is written into the card of `pixels-landcover`.
        report: the Markdown file; the score is written into a section of it.
    """
    bundle = load_bundle(zoo / "pixels-landcover")
    agreement = tree_agreement(folder, bundle)
    text = (
        f"Pixels on which the class `Trees` of {bundle.card.id} agrees with tree cover of 50 % or "
        f"more: {agreement['agreement']:.3f} of {agreement['n']}. Tree cover holds "
        f"{agreement['tree_cover_share']:.3f} of the area, the map {agreement['map_share']:.3f}. "
        f"A map of trees everywhere would agree on {agreement['tree_cover_share']:.3f}. "
        "No label of this area was used for training, but the synthetic ground was adjusted while "
        "this number was observed, so it is not a blind test."
    )
    write_section(report, "pixels-landcover on the Romania cube", text)
    fields = {
        **bundle.card.model_dump(),
        "metrics": {**bundle.card.metrics, "romania_tree_cover_2018": agreement},
    }
    write_card(bundle.folder, ModelCard.model_validate(fields))
    return text


def tree_agreement(folder: Path, bundle: Bundle) -> dict[str, Any]:
    """Agreement of a bundle's tree class with tree cover of 50 % or more, by pixel."""
    card = bundle.card
    scene = read_romania(folder / "sentinel2_cube_subset_romania_10m.nc")
    with rasterio.open(folder / _TREE_COVER) as file:
        cover = file.read(1)
    # The cover has 20 m pixels, the scene 10 m ones; both start at the same corner.
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


def _into_card(folder: Path, evaluation: Mapping[str, Any], scored: Sequence[Scored]) -> None:
    """Write the table into the card as `evaluation` if the bundle has a run's configuration."""
    card = load_bundle(folder).card
    if not any(same_configuration(card, one.run) for one in scored):
        log.info(
            "%s has another configuration than the runs: its card is unchanged; an export of a run "
            "writes the table into the new card",
            card.id,
        )
        return
    fields = {**card.model_dump(), "metrics": {**card.metrics, "evaluation": evaluation}}
    write_card(folder, ModelCard.model_validate(fields))

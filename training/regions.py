"""Leave-one-region-out evaluation: scores and calibration where a model was not trained.

configuration -> one run for each region left out -> outputs there -> calibration across regions
    -> a table in the report, and `regions.json` beside the runs for `export`

A calibration fitted near the training places is overconfident elsewhere. So a region is scored with
the calibration fitted on the other regions, on the outputs of the runs that left each of them out;
all regions have the same weight. The exported model is calibrated on all regions.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property, lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier

from models.graph import PixelGraph
from models.heads import ClassificationHead, ForecastHead
from models.registry import load_bundle
from training.bundle_weights import load_folded
from training.calibration import (
    equal_weights,
    expected_calibration_error,
    fit_spread,
    fit_temperature,
    macro_f1,
    probabilities,
)
from training.classification import PixelClassification
from training.config import Run
from training.datasets import PixelSet
from training.datasets.level2a import SEASONS, LabelledArea
from training.datasets.points import bavaria_2018, pune_2019
from training.datasets.public import BESIDE_TRAINING, covered_fields, unseen_series
from training.errors import TrainingError
from training.evaluate import regular_series
from training.finetune import WEIGHTS, finetune, is_finished, load_finished, task_of
from training.forecast_calibration import (
    Calibration,
    Forecasts,
    Nearness,
    fit_calibration,
    fit_nearness,
    write_calibration,
)
from training.forecasting import SCORED_CUT, SCORED_SOURCE, PixelForecast, cut
from training.landcover import PatchClassification
from training.legends import WORLDCOVER, brazil_sets, relabelled
from training.score_tables import write_section
from training.series import SeriesTable, tabulate
from training.task import Graph, Outputs

log = logging.getLogger(__name__)

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
REGIONS = "regions.json"
_NEARNESS = "nearness.npz"
WHOLE = "all-regions"
"""Folder of the run that leaves no region out; it scores regions that are never trained on."""
CALIBRATED = (
    "RMSE and coverage in `evaluation` are those of the networks' own forecasts, which were "
    "calibrated afterwards: `regions` has the scores where the networks were not trained, "
    "`training.calibration.validation_places` those on the validation places, before "
    "(`rmse_beside`, `coverage_beside`) and after."
)
"""What a card says about the calibration of a forecast."""
_OUTPUTS_FILE = "left_out.npz"
_EUROSAT = "eurosat"
_AREA_COLUMNS = ("accuracy", "confidence", "calibration_error")
_TREES = 200
_RESAMPLES = 200
# Number of pixels of a region whose forecasts are scored from each start.
_PIXELS = 300
# Number of the scored source's training series that a forecast's references are chosen from.
_SCORED = 3000
_YEAR = 365
# Fewest regions of classes across which a temperature is fitted: with two, each would be calibrated
# on a single other one.
_FEWEST_FOR_A_TEMPERATURE = 3
# Fewest regions on which forecasts are calibrated: one is left out in turn.
_FEWEST_REGIONS = 2
_Forecasting = Callable[[PixelForecast, PixelGraph, SeriesTable], Outputs]
_BESIDE = (
    "n", "rmse", "rmse_beside", "persistence", "rmse_where_last_year", "last_year", "coverage",
    "coverage_beside", "coverage_by_step", "by_month",
)  # fmt: skip


class NoRegions(TrainingError):
    """The data have no regions to leave out, or a folder holds no report of regions."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Parameters of an evaluation."""

    run: Run
    """The run that each region is left out of."""
    folder: Path
    """Folder of the runs, one for each region, and of `regions.json`."""
    report: Path
    """The Markdown file."""
    only: tuple[str, ...] = ()
    """Regions to leave out; all if empty."""
    baselines: bool = True
    """Whether a random forest is trained beside each run."""
    device: str = "auto"
    threads: int = 0
    command: str = ""
    """The command that reproduces the table."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Calibration and scores on the regions left out."""

    calibration: Mapping[str, Any]
    """The calibration fitted on all regions left out, for an export."""
    regions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Scores by region, for a card."""
    nearness: Nearness | None = field(default=None, compare=False)
    """References of a forecast's calibration, too large for a card; None without one."""


def evaluate_regions(plan: Plan) -> Report:
    """Train the missing runs, score every region, write the section and `regions.json`.

    Raises:
        NoRegions: the task has no regions.
    """
    task = task_of(plan.run)
    if not task.regions:
        raise NoRegions(
            f"the data of {plan.run.config.name} have no regions, so none can be left out: give a "
            "configuration of pixels, or one of land cover with --set level_2a=0.25"
        )
    names = [n for n in task.regions if n in (plan.only or (n,))]
    outputs = {name: _fold(plan, name) for name in names}
    outputs |= _never_trained_on(plan)
    kind = _KINDS[plan.run.config.task]
    report = kind.report(plan, task, outputs)
    write_report(plan, plan.run.config.name, report, kind.lines(report))
    return report


def write_report(plan: Plan, name: str, report: Report, lines: Iterator[str]) -> None:
    """Write `regions.json` and the report's section.

    Args:
        plan: the evaluation.
        name: of the bundle.
        report: calibration and scores.
        lines: text and table of the section.
    """
    document = {"calibration": report.calibration, "regions": report.regions}
    (plan.folder / REGIONS).write_text(json.dumps(document, indent=1))
    if report.nearness is not None:
        np.savez(plan.folder / _NEARNESS, **vars(report.nearness))
    title = f"{name}: regions left out"
    write_section(plan.report, title, "\n".join([*lines, "", "```sh", plan.command, "```"]))


def evaluate_bundle(bundle: Path, plan: Plan) -> Report:
    """Score a forecast bundle where it was not trained, write the section and `regions.json`.

    Its regions are those of the data sets that its card does not name. Each is scored under the
    calibration fitted on the others; that of the bundle is fitted on all. No run is trained,
    so this also calibrates weights whose runs are gone.

    Args:
        bundle: the bundle's folder.
        plan: `run` has the bundle's configuration; `only`, `baselines` and `device` do not count.

    Raises:
        NoRegions: the bundle is not a forecaster, or was trained on all data sets but one.
        NotUnfolded: its float32 file does not hold a graph of the configuration.
    """
    found = load_bundle(bundle)
    task = task_of(plan.run)
    if not isinstance(task, PixelForecast):
        raise NoRegions(f"{found.card.id} is not a forecaster: give --bundle only for forecasts")
    graph = load_folded(task.graph(), found.path("float32"))
    table = task.table
    named = np.isin(table.sources, [part.name for part in found.card.training_data])
    seen = set(np.unique(table.region[named[table.source]]).tolist())
    new = [name for i, name in enumerate(table.regions) if i not in seen]
    if len(new) < _FEWEST_REGIONS:
        raise NoRegions(
            f"{found.card.id} was trained on all regions but {len(new)}, and at least "
            f"{_FEWEST_REGIONS} other regions are required to fit and score its calibration: "
            "give further data sets"
        )
    networks = _Forecaster(task=task, graph=graph, folder=plan.folder)
    nearness = networks.nearness([task.table.regions[i] for i in sorted(seen)])
    far = {name: _uncalibrated(networks.monthly(name), nearness) for name in new}
    outputs = {**{n: networks.monthly(n) for n in new}, **networks.never_trained_on(plan.run)}
    others = [networks.monthly(name)["embedding"] for name in networks.others(new)]
    report = _calibrated_report(outputs, far, networks.near(), others, nearness, networks.task)
    write_report(plan, plan.run.config.name, report, _forecast_lines(report))
    return report


def evaluate_runs(trained: Path, without: Sequence[Path], plan: Plan) -> Report:
    """Calibrate forecasts that were trained on all regions; write section and `regions.json`.

    Their errors where they were not trained are taken from runs of the same configuration that
    left several regions out. Each of these is scored by the run that left it out, under the
    calibration fitted on the other ones. Damping and factors are fitted on all of them, the
    classifier on the embeddings of the networks that the calibration is for.

    Args:
        trained: folder of the finished run to calibrate. If it was trained on the validation
            places too, the run that it started from stands in its place there.
        without: folders of the finished runs that left regions out.
        plan: `run` gives data for evaluation only; `only`, `baselines` and `device` do not count.

    Raises:
        NoRegions: a run is not of forecasts, or the others leave out too few regions, or two of
            them the same one.
    """
    run, ours = _forecaster(trained, plan.folder)
    away: dict[str, _Forecaster] = {}
    for path in without:
        settings, networks = _forecaster(path, plan.folder)
        if twice := away.keys() & set(settings.left_out):
            raise NoRegions(
                f"{', '.join(sorted(twice))}: left out by two runs of --without; give one of them"
            )
        away |= dict.fromkeys(settings.left_out, networks)
    if len(away) < _FEWEST_REGIONS:
        raise NoRegions(
            f"{' and '.join(map(str, without))}: {len(away)} regions are left out, and at least "
            f"{_FEWEST_REGIONS} are required to fit and score a calibration: train such "
            "runs with more --left-out"
        )
    before = ours
    if run.everything:
        _, before = _forecaster(run.pretrained[0].parent, plan.folder)
    names = list(away)
    far = {name: networks.uncalibrated(name) for name, networks in away.items()}
    regions = {}
    for name, networks in away.items():
        others = [n for n in names if n != name]
        fitted = fit_calibration(
            networks.validation,
            [far[n] for n in others],
            embeddings=networks.embeddings([*others, *networks.others(names)]),
        )
        own = networks.monthly(name)
        regions[name] = _elsewhere(name, own, far[name], fitted, networks.task)
    # Networks that were trained on the validation places cannot state how far such places lie.
    nearness = before.distance
    if ours is not before:
        nearness = ours.nearness(ours.trained_on(), unit=before.distance.unit)
    fitted = fit_calibration(
        before.validation,
        list(far.values()),
        embeddings=ours.embeddings([*names, *ours.others(names)]),
        narrower=_narrower(away, before),
    )
    for name, own in ours.never_trained_on(plan.run).items():
        found = _uncalibrated(own, nearness)
        regions[name] = _elsewhere(name, own, found, fitted, ours.task)
    for name in names:
        # Places that these networks did not see, in regions that they did; most have none.
        held_out = before.held_out(name)
        if held_out is None:
            continue
        quantiles = fitted.calibrated(_uncalibrated(held_out, before.distance))
        beside = forecast_region(held_out, quantiles)
        regions[name] |= {"beside_training_places": {key: beside[key] for key in _BESIDE}}
    calibration = {
        **_calibration(fitted, before.near(), before.distance),
        "note": (
            f"{CALIBRATED} {', '.join(names)}: `regions` has the scores of a run of the same "
            "configuration that left the region out, each under the calibration fitted on the "
            "other ones; `beside_training_places` has those of the networks trained on other "
            "places of them."
        ),
    }
    report = Report(calibration=calibration, regions=regions, nearness=nearness)
    write_report(plan, plan.run.config.name, report, _runs_lines(names, regions))
    return report


@dataclass(frozen=True, kw_only=True)
class _Forecaster:
    """Networks, and their forecasts as they are kept in a folder."""

    task: PixelForecast
    graph: PixelGraph
    folder: Path

    def _kept(self, name: str, make: _Forecasting, table: SeriesTable) -> Outputs:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.npz"
        return _stored(path, partial(make, self.task, self.graph, table))

    def monthly(self, region: str) -> Outputs:
        """Forecasts of a region from every month."""
        table = self.task.table
        chosen = table.take(table.in_regions([region]))
        return self._kept(region, _forecasts_from_every_month, chosen)

    def held_out(self, region: str) -> Outputs | None:
        """The same on the region's places for validation; None if it has none."""
        table = self.task.table
        chosen = table.take(table.in_regions([region]) & table.validation)
        if not len(chosen):
            return None
        return self._kept(f"{region}-held-out", _forecasts_from_every_month, chosen)

    def never_trained_on(self, run: Run) -> dict[str, Outputs]:
        """Forecasts of the regions for evaluation only, from every month."""
        return {
            str(sets[0].region): self._kept(
                str(sets[0].region), _forecasts_from_every_month, _table_of(sets, self.task)
            )
            for sets in evaluation_sets(run)
        }

    def near(self) -> list[Outputs]:
        """Forecasts on the validation places, from the scored cut and from every month."""
        places = self.task.validation
        return [
            self._kept("validation-scored", _from_the_scored_cut, places),
            self._kept("validation-months", _forecasts_from_every_month, places),
        ]

    def trained_on(self) -> list[str]:
        """Regions of the run's training series."""
        found = np.unique(self.task.train.region)
        return [name for i, name in enumerate(self.task.train.regions) if i in found]

    @cached_property
    def distance(self) -> Nearness:
        """How far an embedding lies from the training series of all regions of the run."""
        return self.nearness(self.trained_on())

    @cached_property
    def validation(self) -> list[Forecasts]:
        """Forecasts on the validation places, as `near` has them, before calibration."""
        return [_uncalibrated(own, self.distance) for own in self.near()]

    def uncalibrated(self, region: str) -> Forecasts:
        """Forecasts of a region from every month, before calibration."""
        return _uncalibrated(self.monthly(region), self.distance)

    def embeddings(self, regions: Sequence[str]) -> tuple[list[Floats], list[Floats]]:
        """Embeddings (N, D) on the validation places, and of each region."""
        own = [o["embedding"] for o in self.near()]
        return own, [self.monthly(name)["embedding"] for name in regions]

    def nearness(self, regions: Sequence[str], unit: float | None = None) -> Nearness:
        """How far an embedding lies from the training series of regions: see `fit_nearness`."""
        near = [] if unit else [o["embedding"] for o in self.near()]
        return fit_nearness(self._training(regions), near, unit=unit)

    def _training(self, regions: Sequence[str]) -> list[Floats]:
        """Embeddings of training series, from every month of each region and as scored."""
        train = self.task.train
        kept = [
            self._kept(f"train-{name}", _forecasts_from_every_month, series)
            for name in regions
            if len(series := train.take(train.in_regions([name])))
        ]
        rows = np.random.default_rng(0).permutation(np.flatnonzero(self.task.scored))[:_SCORED]
        scored = self._kept("train-scored", _from_the_scored_cut, train.take(np.sort(rows)))
        return [o["embedding"] for o in (*kept, scored)]

    def others(self, names: Sequence[str]) -> list[str]:
        """Regions that are neither among `names` nor those of the scored source."""
        table = self.task.table
        scored = np.unique(table.region[table.source == table.sources.index(SCORED_SOURCE)])
        return [n for i, n in enumerate(table.regions) if n not in names and i not in scored]


def _forecaster(run: Path, folder: Path) -> tuple[Run, _Forecaster]:
    """A finished run, and its networks with their forecasts in a folder.

    Raises:
        NoRegions: the run is not of forecasts.
    """
    settings, task, graph, _ = load_finished(run)
    if not isinstance(task, PixelForecast):
        raise NoRegions(f"{run} is of {task.config.task}: give a run of forecasts")
    kept = folder / f"{run.name}-{zlib.crc32((run / WEIGHTS).read_bytes()):08x}"
    return settings, _Forecaster(task=task, graph=graph, folder=kept)


def _calibrated_report(
    outputs: Mapping[str, Outputs],
    far: Mapping[str, Forecasts],
    near: Sequence[Outputs],
    others: Sequence[Floats],
    nearness: Nearness,
    task: PixelForecast,
) -> Report:
    """Scores of each region under the calibration by the other ones, and the calibration by all.

    Args:
        outputs: forecasts on each region.
        far: those of them that a calibration may be fitted on.
        near: forecasts on the validation places.
        others: embeddings of further series.
        nearness: of the networks.
        task: of the networks.
    """
    places = [_uncalibrated(o, nearness) for o in near]

    def fit(names: Sequence[str]) -> Calibration:
        return fit_calibration(places, [far[n] for n in names], others)

    regions = {}
    for name, own in outputs.items():
        fitted = fit([n for n in far if n != name])
        found = _uncalibrated(own, nearness)
        regions[name] = _elsewhere(name, own, found, fitted, task)
    calibration = _calibration(fit(list(far)), near, nearness)
    return Report(calibration=calibration, regions=regions, nearness=nearness)


def _elsewhere(
    name: str, own: Outputs, found: Forecasts, fitted: Calibration, task: PixelForecast
) -> dict[str, Any]:
    """Scores of a region that is not trained on, and those where its place is unknown.

    The place is known, and far from the training data, where the bundle takes `elsewhere`.
    """
    unknown = forecast_region(own, fitted.calibrated(found))
    if name in BESIDE_TRAINING or not task.card_shape()["elsewhere"]:
        scores = unknown
    else:
        scores = forecast_region(own, fitted.calibrated(found, elsewhere=True))
    return scores | {"place_unknown": {key: unknown[key] for key in ("rmse", "coverage")}}


def _narrower(away: Mapping[str, _Forecaster], narrow: _Forecaster) -> float:
    """How much wider the own interval of networks is than that of others, where all were trained.

    The geometric mean over the networks of `away`. Each is compared on the validation places and on
    the held-out places of the regions that it was trained on.

    Args:
        away: networks by the regions that they left out.
        narrow: the others.
    """
    pairs = [
        pair
        for wide in {id(networks): networks for networks in away.values()}.values()
        for left in ([name for name, networks in away.items() if networks is wide],)
        for pair in (
            *zip(wide.near(), narrow.near(), strict=True),
            *((wide.held_out(name), narrow.held_out(name)) for name in wide.others(left)),
        )
    ]
    ratios = [_half_width(a) / _half_width(b) for a, b in pairs if a and b]
    return float(np.exp(np.mean(np.log(ratios))))


def _half_width(own: Outputs) -> float:
    """Mean half width of the networks' own interval, index units."""
    return float(np.ptp(own["quantiles"], axis=-1)[own["known"]].mean() / 2.0)


def _calibration(
    fitted: Calibration, near: Sequence[Outputs], nearness: Nearness
) -> dict[str, Any]:
    """A calibration, and its scores on forecasts of the validation places."""
    keys = ("n", "rmse", "rmse_beside", "coverage", "coverage_beside", "coverage_by_step")
    validation = [forecast_region(o, fitted.calibrated(_uncalibrated(o, nearness))) for o in near]
    return {
        "band": fitted.document(),
        "validation_places": [{key: scores[key] for key in keys} for scores in validation],
    }


def _uncalibrated(own: Outputs, nearness: Nearness) -> Forecasts:
    names = set(Forecasts.__dataclass_fields__) - {"distance"}
    distance = nearness.of(own["embedding"])
    return Forecasts(**{name: own[name] for name in names}, distance=distance)


def apply_calibration(graph: Graph, report: Report) -> None:
    """Write a calibration across regions into a graph, in place."""
    calibration = report.calibration
    if (
        report.nearness is not None
        and isinstance(graph, PixelGraph)
        and graph.calibration is not None
    ):
        write_calibration(graph.calibration, calibration["band"], report.nearness)
    for head in graph.modules():
        if isinstance(head, ClassificationHead):
            head.temperature.fill_(calibration["temperature"])
        elif isinstance(head, ForecastHead) and "spread" in calibration:
            head.spread.copy_(head.spread.new_tensor(calibration["spread"]))


def read_report(folder: Path) -> Report:
    """The report that `evaluate_regions` wrote into a folder.

    Raises:
        NoRegions: the folder holds no report.
    """
    path = folder / REGIONS
    if not path.is_file():
        raise NoRegions(f"{folder} holds no {REGIONS}: run `python -m training regions` first")
    report = Report(**json.loads(path.read_text()))
    if not (folder / _NEARNESS).is_file():
        return report
    with np.load(folder / _NEARNESS) as stored:
        nearness = Nearness(**{**stored, "unit": float(stored["unit"])})
    return replace(report, nearness=nearness)


# Runs and their outputs -------------------------------------------------------------------------


def _fold(plan: Plan, region: str) -> Outputs:
    """Outputs on a region by the run that left it out; trained and computed once."""
    folder = plan.folder / region
    _train_once(plan, plan.run.model_copy(update={"left_out": (region,)}), folder)
    return _stored(folder / _OUTPUTS_FILE, lambda: _outputs_of(folder, lambda task: task.left_out))


def _train_once(plan: Plan, run: Run, folder: Path) -> None:
    """Train a run, if it has not finished before."""
    if not is_finished(folder):
        finetune(run, folder, device=plan.device, threads=plan.threads)


def _never_trained_on(plan: Plan) -> dict[str, Outputs]:
    """Outputs on the regions that no model is trained on, by the run that leaves none out."""
    folder = plan.folder / WHOLE
    found = {}
    for pixels in evaluation_sets(plan.run):
        region = str(pixels[0].region)
        if plan.only and region not in plan.only:
            continue
        _train_once(plan, plan.run, folder)
        path = folder / f"{region}.npz"
        found[region] = _stored(path, partial(_outputs_of, folder, partial(_table_of, pixels)))
    return found


@lru_cache(maxsize=1)
def evaluation_sets(run: Run) -> list[list[PixelSet]]:
    """Regions for evaluation only, never for training; labelled if the task needs labels.

    Pune's labels state no licence. Bavaria's series are means of fields at level 1C, with clouds.
    Brazil's are of MODIS. The fields of public repositories are of one class each, or nearly.
    """
    return _KINDS[run.config.task].never_trained_on(run)


def _labelled_sets(run: Run) -> list[list[PixelSet]]:
    if getattr(run.config, "legend", "") != "worldcover":
        return []
    regions = pune_2019(run.data / "pune_2019"), bavaria_2018(run.data / "bavaria_2018")
    fields = groupby(covered_fields(run.public) if run.public else (), lambda s: s.region)
    sets = [*regions, *([*own] for _, own in fields)]
    return [*([relabelled(s, WORLDCOVER) for s in own] for own in sets), brazil_sets(run.data)]


def _series_sets(run: Run) -> list[list[PixelSet]]:
    further = unseen_series(run.public) if run.public else ()
    return [pune_2019(run.data / "pune_2019"), *([pixels] for pixels in further)]


def _table_of(sets: Sequence[PixelSet], task: PixelClassification | PixelForecast) -> SeriesTable:
    """Sets as a table of a task; for a classifier only the labelled pixels."""
    config = task.config
    table = tabulate(sets, config.window, least=config.min_observations, spectral=task.spectral)
    return table.take(table.labels >= 0) if _KINDS[config.task].labelled else table


def _outputs_of(folder: Path, of: Callable[[Any], Any]) -> Outputs:
    _, task, graph, _ = load_finished(folder)
    return _KINDS[task.config.task].outputs(task, graph, of(task))


def _stored(path: Path, make: Callable[[], Outputs]) -> Outputs:
    if not path.exists():
        np.savez(path, allow_pickle=False, **make())
    with np.load(path) as stored:
        return dict(stored)


# Classes ----------------------------------------------------------------------------------------


def _logits(task: PixelClassification, graph: Any, table: SeriesTable) -> Outputs:  # noqa: ANN401
    return {
        "logits": task.logits(graph, table),
        "labels": table.labels,
        "places": table.places,
        "temperature": _temperature(graph),
    }


def _temperature(graph: Any) -> Floats:  # noqa: ANN401 - as `_logits`
    """The temperature that a classifier's run has fitted ()."""
    return np.array(float(graph.head.temperature))


def _classes(plan: Plan, task: PixelClassification, outputs: Mapping[str, Outputs]) -> Report:
    trained = {n: o for n, o in outputs.items() if n in task.table.regions}
    enough = len(trained) >= _FEWEST_FOR_A_TEMPERATURE
    regions = {}
    for name, own in outputs.items():
        temperature = across(trained, without=name) if enough else None
        seen = np.isin(own["labels"], task.table.labels[~task.table.in_regions([name])])
        regions[name] = {
            **class_scores(own, temperature, seen),
            **(beside_forest(plan, task, name, seen) if plan.baselines else {}),
        }
    calibration = {"temperature": round(across(trained), 4)} if enough else {}
    return Report(calibration=calibration, regions=regions)


def class_scores(
    own: Outputs, temperature: float | None, seen: Bools | None = None
) -> dict[str, Any]:
    """Scores of a classifier on a region that it was not trained on, for a card.

    Args:
        own: logits (N, K), labels (N), places (N) and the `temperature` of the training regions.
        temperature: fitted on other regions left out; None takes that of the training regions.
        seen: True for pixels of classes that the training regions have (N). Only these are scored,
            and `unseen_classes` is the share of the others. None if all are.
    """
    rows = slice(None) if seen is None else seen
    logits, labels, places = (own[name][rows] for name in ("logits", "labels", "places"))
    beside = probabilities(logits, float(own["temperature"]))
    shares = beside if temperature is None else probabilities(logits, temperature)
    return {
        "n": len(labels),
        "places": len(np.unique(places)),
        "unseen_classes": round(1.0 - len(labels) / len(own["labels"]), 4),
        "accuracy": _interval(_accuracy, shares, labels, places),
        "macro_f1": round(macro_f1(shares.argmax(1), labels, logits.shape[1]), 4),
        "confidence": round(float(shares.max(axis=1).mean()), 4),
        "calibration_error": _interval(expected_calibration_error, shares, labels, places),
        "calibration_error_beside": round(expected_calibration_error(beside, labels), 4),
        "largest_class": round(float(np.bincount(labels).max() / len(labels)), 4),
    }


def across(outputs: Mapping[str, Outputs], *, without: str | None = None) -> float:
    """The temperature of least cross entropy, all regions with the same weight.

    Args:
        outputs: logits (N, K) and labels (N) by region.
        without: a region that does not count.
    """
    counted = [o for name, o in outputs.items() if name != without]
    logits = np.concatenate([o["logits"] for o in counted])
    labels = np.concatenate([o["labels"] for o in counted])
    return fit_temperature(logits, labels, equal_weights([o["labels"] for o in counted]))


def beside_forest(
    plan: Plan, task: PixelClassification, region: str, seen: Bools | None = None
) -> dict[str, dict[str, float]]:
    """Scores of a random forest that was trained on all other regions, for a card.

    Args:
        plan: the evaluation; its folder keeps the forest's probabilities.
        task: the task with the data.
        region: the region scored.
        seen: True for the pixels that are scored (N); None scores all.
    """
    path = plan.folder / f"forest-{region}.npz"
    stored = _stored(path, partial(_forest, plan.run, task, region))
    rows = slice(None) if seen is None else seen
    shares, labels = stored["shares"][rows], stored["labels"][rows]
    error = expected_calibration_error(shares, labels)
    scores = {"accuracy": _accuracy(shares, labels), "calibration_error": error}
    return {"random_forest": {name: round(value, 4) for name, value in scores.items()}}


def _forest(run: Run, task: PixelClassification, region: str) -> Outputs:
    """Probabilities (N, K) on a region by a random forest trained on all other regions."""
    away = task.table.in_regions([region])
    train = task.table.take(~away & ~task.table.validation)
    scored = task.table.take(away)
    for sets in evaluation_sets(run):
        if sets[0].region == region:
            scored = _table_of(sets, task)
    forest = RandomForestClassifier(_TREES, random_state=0)
    forest.fit(regular_series(train, task.config), train.labels)
    shares = np.zeros((len(scored), len(task.legend)))
    shares[:, forest.classes_] = forest.predict_proba(regular_series(scored, task.config))
    return {"shares": shares, "labels": scored.labels}


def _accuracy(shares: Floats, labels: Ints) -> float:
    return float((shares.argmax(axis=1) == labels).mean())


def _interval(
    score: Callable[[Floats, Ints], float], shares: Floats, labels: Ints, places: Ints
) -> list[float]:
    """A score and its 95 % interval by drawing places with replacement."""
    rng = np.random.default_rng(0)
    number = np.unique(places, return_inverse=True)[1]
    order = np.argsort(number, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(number))[:-1])
    drawn = []
    for _ in range(_RESAMPLES):
        rows = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        drawn.append(score(shares[rows], labels[rows]))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return [round(v, 4) for v in (score(shares, labels), float(low), float(high))]


def _class_lines(report: Report) -> Iterator[str]:
    calibrated = (
        "is scored with the temperature fitted on the other regions left out. Column `beside`: "
        "calibration error with the temperature fitted on validation places of the training "
        "regions."
        if report.calibration
        else "is scored with the temperature fitted on validation places of the training regions."
    )
    unseen = any(region["unseen_classes"] for region in report.regions.values())
    yield (
        f"Each region was left out of training completely, and {calibrated} "
        + (
            "`pune`, `bavaria`, `brazil` and the fields of public repositories are never trained "
            "on. "
            if "pune" in report.regions
            else ""
        )
        + (
            "Scored are the pixels of classes that the training regions have; `unseen` is the "
            "share of the others, which no model can name. "
            if unseen
            else ""
        )
        + f"Brackets hold 95 % intervals by {_RESAMPLES} bootstraps over places; one seed. The "
        "forest has the same training data."
    )
    yield ""
    yield from class_rows(report.regions)


def class_rows(regions: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Table of `class_scores` by region, with the forest's where there are any."""
    yield (
        "| region | n | places | unseen | accuracy | macro-F1 | calibration error | beside | "
        "confidence | forest: accuracy | calibration error | largest class |"
    )
    yield "|---" * 12 + "|"
    for name, r in regions.items():
        forest = r.get("random_forest", {})
        cells = (
            name,
            r["n"],
            r["places"],
            f"{r['unseen_classes']:.0%}",
            _bracketed(r["accuracy"]),
            f"{r['macro_f1']:.3f}",
            _bracketed(r["calibration_error"]),
            f"{r['calibration_error_beside']:.3f}",
            f"{r['confidence']:.3f}",
            _number(forest.get("accuracy")),
            _number(forest.get("calibration_error")),
            f"{r['largest_class']:.3f}",
        )
        yield "| " + " | ".join(map(str, cells)) + " |"


def _bracketed(score: Sequence[float]) -> str:
    value, low, high = score
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


# Patches ----------------------------------------------------------------------------------------


def _area_logits(task: PatchClassification, graph: Any, area: LabelledArea) -> Outputs:  # noqa: ANN401 - as `_logits`
    return {**task.area_outputs(graph, area), "temperature": _temperature(graph)}


def _areas(
    plan: Plan,
    task: PatchClassification,  # noqa: ARG001 - see `_Kind.report`
    outputs: Mapping[str, Outputs],
) -> Report:
    """Scores of the areas left out, and of EuroSAT's validation patches by the run on all areas."""
    folder = plan.folder / WHOLE
    _train_once(plan, plan.run, folder)
    validation = _stored(folder / f"{_EUROSAT}.npz", partial(_validation_outputs, folder))
    everything = {_EUROSAT: validation, **outputs}
    regions = {}
    for name, own in everything.items():
        regions[name] = _area_scores(own, across(everything, without=name))
        if before := _before(plan, name):
            regions[name]["before"] = _area_scores(before, float(before["temperature"]))
    return Report(calibration={"temperature": round(across(everything), 4)}, regions=regions)


def _validation_outputs(folder: Path) -> Outputs:
    _, task, graph, _ = load_finished(folder)
    return {**task.outputs(graph), "temperature": _temperature(graph)}


def _before(plan: Plan, name: str) -> Outputs | None:
    """Outputs on an area by the run that all these start from; None if they start from no run."""
    if len(plan.run.pretrained) != 1 or not is_finished(plan.run.pretrained[0].parent):
        return None
    start = plan.run.pretrained[0].parent

    def made() -> Outputs:
        if name == _EUROSAT:
            return _validation_outputs(start)
        _, _, graph, _ = load_finished(start)
        away: Any = task_of(plan.run.model_copy(update={"left_out": (name,)}))
        return _area_logits(away, graph, away.left_out)

    return _stored(plan.folder / f"before-{name}.npz", made)


def _area_scores(own: Outputs, temperature: float) -> dict[str, Any]:
    shares = probabilities(own["logits"], temperature)
    labels, places = own["labels"], own["places"]
    right = shares.argmax(axis=1) == labels
    scores: dict[str, Any] = {
        "n": len(labels),
        "places": len(np.unique(places)),
        "accuracy": round(float(right.mean()), 4),
        "confidence": round(float(shares.max(axis=1).mean()), 4),
        "calibration_error": round(expected_calibration_error(shares, labels), 4),
        "confidence_where_wrong": None
        if right.all()
        else round(float(shares[~right].max(axis=1).mean()), 4),
    }
    if "seasons" in own:
        scores["accuracy_by_season"] = {
            season: round(float(right[own["seasons"] == i].mean()), 4)
            for i, season in enumerate(SEASONS)
            if (own["seasons"] == i).any()
        }
    return scores


def _area_lines(report: Report) -> Iterator[str]:
    yield (
        "Each area of level 2A was left out of training completely, and is scored with the "
        "temperature fitted on the others and on EuroSAT's validation patches, all with the same "
        "weight; `eurosat` are these patches, by the run on all areas. Columns `before` are of the "
        "run that all start from, which saw no level 2A. A patch is a clear date or the median of "
        "a season at a place; places of an area overlap or adjoin, and dates are alike, so that "
        "each area is about one observation, whatever its number of patches."
    )
    yield ""
    yield (
        "| area | patches | places | accuracy | confidence | calibration error | by season | "
        "before: accuracy | confidence | calibration error |"
    )
    yield "|---" * 10 + "|"
    for name, r in report.regions.items():
        before = r.get("before", {})
        seasons = r.get("accuracy_by_season", {}).items()
        cells = (
            name,
            r["n"],
            r["places"],
            *(_number(r[key]) for key in _AREA_COLUMNS),
            ", ".join(f"{season} {value:.2f}" for season, value in seasons),
            *(_number(before.get(key)) for key in _AREA_COLUMNS),
        )
        yield "| " + " | ".join(map(str, cells)) + " |"


# Forecasts --------------------------------------------------------------------------------------


def _forecasts_from_every_month(
    task: PixelForecast, graph: PixelGraph, table: SeriesTable
) -> Outputs:
    """Forecasts of a region from the first day of every month that its series allow.

    Returns:
        quantiles (N, H, S, Q), target and known (N, H, S), month of the start (N), place (N),
        persistence (N, S), last_year (N, H, S), NaN where there is none.
    """
    rng = np.random.default_rng(0)
    table = table.take(np.sort(rng.permutation(len(table))[:_PIXELS]))
    parts = []
    for start in _month_starts(table):
        ordinals = table.first_day[:, None] + table.days
        positions = (table.present & (ordinals <= start)).sum(axis=1)
        rows = np.flatnonzero((positions > 0) & (positions < table.present.sum(axis=1)))
        if len(rows):
            parts.append(_forecast_from(task, graph, table.take(rows), positions[rows], start))
    return {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}


def _from_the_scored_cut(task: PixelForecast, graph: PixelGraph, table: SeriesTable) -> Outputs:
    """As `_forecasts_from_every_month`, from the scored cut of every series."""
    start = int(table.first_day[0] + table.days[0, SCORED_CUT - 1])
    return _forecast_from(task, graph, table, np.full(len(table), SCORED_CUT), start)


def _month_starts(table: SeriesTable) -> Iterator[int]:
    """Ordinals of the first days of the months that a table's dates span."""
    ordinals = (table.first_day[:, None] + table.days)[table.present]
    first, last = (date.fromordinal(int(o)) for o in (ordinals.min(), ordinals.max()))
    for year in range(first.year, last.year + 1):
        for month in range(1, 13):
            day = date(year, month, 1)
            if first < day < last:
                yield day.toordinal()


def _forecast_from(
    task: PixelForecast,
    graph: PixelGraph,
    table: SeriesTable,
    positions: Ints,
    start: int,
) -> Outputs:
    window, horizon = task.config.window, task.config.horizon
    valid, _, _, target, known = cut(table, positions, window.steps, window.step_days, horizon)
    usable = (valid.sum(axis=1) >= task.config.min_observations) & known.any(axis=(1, 2))
    table, positions, valid = table.take(usable), positions[usable], valid[usable]
    rows = np.arange(len(table))
    last_day = table.days[rows, positions - 1]
    latest = np.where(valid, table.days, -np.inf).argmax(axis=1)
    return {
        **task.evidence(graph, table, positions),
        "target": target[usable],
        "known": known[usable],
        "month": np.full(len(table), date.fromordinal(start).month),
        "places": table.places,
        "persistence": table.indices[rows, latest],
        "last_year": _a_year_before(table, last_day, window.step_days, horizon),
    }


def _a_year_before(table: SeriesTable, last_day: Floats, step_days: int, horizon: int) -> Floats:
    """Indices a year before each step ahead, NaN where no clear date is near (N, H, S)."""
    day = last_day[:, None] + np.arange(1, horizon + 1) * step_days - _YEAR
    gap = np.abs(table.days[:, None, :] - day[..., None])
    gap = np.where(table.valid[:, None], gap, np.inf)
    nearest = gap.argmin(axis=2)
    near = np.take_along_axis(gap, nearest[..., None], axis=2) <= step_days
    found = table.indices[np.arange(len(table))[:, None], nearest]
    return np.where(near, found, np.float32(np.nan))


def _forecasts(plan: Plan, task: PixelForecast, outputs: Mapping[str, Outputs]) -> Report:  # noqa: ARG001
    trained = {n: o for n, o in outputs.items() if n in task.table.regions}
    regions = {}
    for name, own in outputs.items():
        spread = spread_across({n: o for n, o in trained.items() if n != name})
        regions[name] = forecast_region(own, with_spread(own["quantiles"], spread))
    return Report(calibration={"spread": spread_across(trained).round(4).tolist()}, regions=regions)


def spread_across(outputs: Mapping[str, Outputs]) -> Floats:
    """Factors on the outer quantiles' distances from the median (H, 2), regions weighed alike."""
    return fit_spread([(o["quantiles"], o["target"], o["known"]) for o in outputs.values()])


def with_spread(quantiles: Floats, spread: Floats) -> Floats:
    """Quantiles (N, H, S, 3) with the distances below and above the median scaled (H, 2)."""
    median = np.asarray(quantiles)[..., 1:2]
    factors = np.stack([spread[:, 0], np.ones(len(spread)), spread[:, 1]], axis=-1)
    return np.asarray(median + (quantiles - median) * factors[:, None, :])


def forecast_region(own: Outputs, quantiles: Floats) -> dict[str, Any]:
    """Scores of one region's forecasts, with calibrated quantiles (N, H, S, 3)."""
    known, target, month = own["known"], own["target"], own["month"]
    raw = own["quantiles"]
    median = quantiles[..., 1]
    last_year = own["last_year"]
    both = known & np.isfinite(last_year)
    persistence = np.broadcast_to(own["persistence"][:, None], target.shape)
    by_month = {
        str(m): {
            "n": int(known[month == m].sum() // target.shape[-1]),
            "rmse": _rmse(median, target, known & _of(month, m)),
            "persistence": _rmse(persistence, target, known & _of(month, m)),
            "rmse_where_last_year": _rmse(median, target, both & _of(month, m)),
            "last_year": _rmse(last_year, target, both & _of(month, m)),
            "coverage": _coverage(quantiles, target, known & _of(month, m)),
        }
        for m in np.unique(month).tolist()
    }
    steps = np.arange(target.shape[1])
    return {
        "n": int(known.sum() // target.shape[-1]),
        "places": len(np.unique(own["places"])),
        "rmse": _rmse(median, target, known),
        "rmse_beside": _rmse(raw[..., 1], target, known),
        "persistence": _rmse(persistence, target, known),
        "rmse_where_last_year": _rmse(median, target, both),
        "last_year": _rmse(last_year, target, both),
        "coverage": _coverage(quantiles, target, known),
        "coverage_beside": _coverage(raw, target, known),
        "coverage_by_step": [
            _coverage(quantiles[:, h : h + 1], target[:, h : h + 1], known[:, h : h + 1])
            for h in steps
        ],
        "by_month": by_month,
    }


def _of(month: Ints, m: int) -> NDArray[np.bool_]:
    return np.asarray((month == m)[:, None, None])


def _rmse(median: Floats, target: Floats, known: NDArray[np.bool_]) -> float | None:
    """Mean of the indices' root mean squared errors, index units; None if no target is known."""
    if not known.any():
        return None
    errors = np.where(known, np.nan_to_num(median) - target, 0.0)
    squared = np.square(errors).sum(axis=(0, 1)) / known.sum(axis=(0, 1)).clip(1)
    return round(float(np.sqrt(squared).mean()), 4)


def _coverage(quantiles: Floats, target: Floats, known: NDArray[np.bool_]) -> float | None:
    if not known.any():
        return None
    inside = (target >= quantiles[..., 0]) & (target <= quantiles[..., -1])
    return round(float(inside[known].mean()), 4)


_HOW_SCORED = (
    "Forecasts start on the first day of every month that the series allow; targets are the "
    "clear observations as they are. RMSE is the mean of the RMSE of NDVI, EVI and SAVI. Last "
    "year is the clear date nearest to the day one year before, within ten days, if there is "
    "one; `where last year is known` is our RMSE on the same targets. `not calibrated` is of the "
    "networks' own forecasts."
)


def _forecast_lines(report: Report) -> Iterator[str]:
    yield (
        "Each region was left out of training completely, and its forecasts are calibrated on the "
        f"other regions left out. {_HOW_SCORED} `pune` and, with --public, `slovakia`, "
        "`switzerland` and `uzbekistan` are never trained on. One seed."
    )
    yield ""
    yield from _forecast_table(report.regions)


def _runs_lines(names: Sequence[str], regions: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield (
        f"{', '.join(names)}: each scored by a run of the same configuration that left it out of "
        "training, under the calibration fitted on the other ones. The other rows are of "
        f"the bundle's networks and its calibration. {_HOW_SCORED} The graph is given that "
        "the place is far from the training data (`elsewhere`), as in a request with a raster; "
        "`place unknown` has the scores without it. One seed."
    )
    yield ""
    yield from _forecast_table(regions)
    yield ""
    yield (
        "The same regions by networks that were trained on other places of them, with the "
        "bundle's calibration:"
    )
    yield ""
    beside = "beside_training_places"
    yield from _forecast_table({n: regions[n][beside] for n in names if beside in regions[n]})


def _forecast_table(regions: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    unknown = any("place_unknown" in r for r in regions.values())
    yield (
        "| region | n | RMSE | RMSE not calibrated | persistence | where last year is known | "
        "last year | coverage | by step | by month | coverage not calibrated |"
        + (" RMSE, place unknown | coverage, place unknown |" if unknown else "")
    )
    yield "|---" * (13 if unknown else 11) + "|"
    for name, r in regions.items():
        months = [m["coverage"] for m in r["by_month"].values() if m["coverage"] is not None]
        steps = [c for c in r["coverage_by_step"] if c is not None]
        cells = (
            name,
            r["n"],
            _number(r["rmse"]),
            _number(r["rmse_beside"]),
            _number(r["persistence"]),
            _number(r["rmse_where_last_year"]),
            _number(r["last_year"]),
            _number(r["coverage"]),
            f"{min(steps):.2f} to {max(steps):.2f}",
            f"{min(months):.2f} to {max(months):.2f}",
            _number(r["coverage_beside"]),
            *(_number(r["place_unknown"][key]) for key in ("rmse", "coverage") if unknown),
        )
        yield "| " + " | ".join(map(str, cells)) + " |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """How the regions of one kind of task are evaluated."""

    never_trained_on: Callable[[Run], list[list[PixelSet]]]
    labelled: bool
    """Whether only labelled pixels count."""
    outputs: Callable[[Any, Any, Any], Outputs]
    """Outputs of a task's graph on a region; takes the task, the graph and the region's samples."""
    report: Callable[[Plan, Any, Mapping[str, Outputs]], Report]
    lines: Callable[[Report], Iterator[str]]
    """Text and table of the report's section."""


_KINDS: Mapping[str, _Kind] = {
    "classify": _Kind(
        never_trained_on=_labelled_sets,
        labelled=True,
        outputs=_logits,
        report=_classes,
        lines=_class_lines,
    ),
    "landcover": _Kind(
        never_trained_on=lambda run: [],  # noqa: ARG005
        labelled=True,
        outputs=_area_logits,
        report=_areas,
        lines=_area_lines,
    ),
    "forecast": _Kind(
        never_trained_on=_series_sets,
        labelled=False,
        outputs=_forecasts_from_every_month,
        report=_forecasts,
        lines=_forecast_lines,
    ),
}

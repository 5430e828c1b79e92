"""Ablation studies: train with and without a choice, and compare the scores.

study -> arms x seeds -> runs, each trained once -> outputs -> a table in the report

The folder of a run is named after its settings, so that studies share runs, a killed study resumes,
and a changed configuration starts in a new folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from training import validation_outputs
from training.card import pretrain_command
from training.config import Protocol as RunProtocol
from training.config import (
    Run,
    UnknownSetting,
    changed,
    configuration,
    difference,
)
from training.embedding import measure_retrieval, probe_outputs
from training.errors import TrainingError
from training.evaluate import SPLITS, outputs_of
from training.finetune import finetune, is_finished
from training.pretrain import CHECKPOINT, FIRST, PretrainConfig, load_networks, pretrain
from training.pretraining_data import Places, open_sources
from training.score_tables import (
    Row,
    Score,
    Table,
    markdown,
    measured,
    outputs_row,
    sized,
    write_section,
)
from training.speed import Speed, compare, picture
from training.task import Outputs

log = logging.getLogger(__name__)

PICTURE = "size.svg"
_PROBES = "probes.json"
_CROPS = "crops"
_PATCHES = "eurosat"
# Settings of a pretraining that determine the shapes of its networks.
_NETWORKS = ("pixel", "reflectance", "patch", "projection")


class NothingToCompare(TrainingError):
    """A study does not fit a bundle, or lacks the checkpoint that it compares."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the choices that a study compares."""

    label: str
    settings: tuple[str, ...] = ()
    """Settings in the form of `--set`."""
    pretrained: bool = False
    """Whether the encoder starts from the checkpoint."""
    protocol: RunProtocol = "finetune"


@dataclass(frozen=True, kw_only=True)
class Study:
    """The choices that are compared, and the sentence that introduces their table."""

    subject: str
    arms: tuple[Arm, ...]
    pretraining: bool = False
    """Whether the arms differ in pretraining; else in finetuning."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Parameters of a study."""

    bundle: str
    """Name of the configuration that the arms change."""
    places: Places
    runs: Path
    """Folder of the runs."""
    report: Path
    """The Markdown file."""
    seeds: int = 3
    epochs: int | None = None
    """Epochs of each fine-tuning; None uses the configuration's."""
    steps: int | None = None
    """Steps of each pretraining; None uses the configuration's."""
    pretrained: Path | None = None
    """Checkpoint for the arms that start from one."""
    settings: tuple[str, ...] = ()
    """Settings of all arms."""
    device: str = "auto"
    threads: int = 1
    workers: int = 1
    """Threads that prepare a pretraining's batches ahead; their number affects the speed only."""
    command: str = ""
    """The command, for the report."""


def _sizes() -> tuple[Arm, ...]:
    shapes = (
        (64, (1, 1, 1)),
        *((width, (0, 1, 2)) for width in (24, 32, 38, 64)),
        *((width, (1, 1, 1)) for width in (24, 32, 38, 96)),
        (64, (2, 2, 2)),
    )
    return tuple(
        Arm(
            label=f"width {width}, depths {depths}",
            settings=(f"encoder.width={width}", f"encoder.depths={list(depths)}"),
        )
        for width, depths in shapes
    )


def _few_labels() -> tuple[Arm, ...]:
    ways: tuple[tuple[str, bool, RunProtocol], ...] = (
        ("from scratch", False, "finetune"),
        ("pretrained", True, "finetune"),
        ("linear probe of the pretrained", True, "linear"),
        ("nearest neighbours of the pretrained", True, "knn"),
        ("linear probe of the untrained", False, "linear"),
    )
    return tuple(
        Arm(
            label=f"{share:.0%} of the labels, {how}",
            settings=(f"labels={share}",),
            pretrained=pretrained,
            protocol=protocol,
        )
        for share in (0.01, 0.1, 1.0)
        for how, pretrained, protocol in ways
    )


_NO_STACKS: Mapping[str, tuple[str, ...]] = {
    "Flanders": ("flanders_2017_2018",),
    "Hesbaye": ("hesbaye_a_monthly", "hesbaye_b_monthly"),
}


def _sources() -> tuple[Arm, ...]:
    stacks = [stack.model_dump(mode="json") for stack in FIRST.sources.stacks]
    without = [
        Arm(
            label=f"without {name}",
            settings=(
                "sources.stacks=" + json.dumps([s for s in stacks if s["folder"] not in folders]),
            ),
        )
        for name, folders in _NO_STACKS.items()
    ]
    return (
        Arm(label="all sources"),
        *without,
        Arm(label="without Romania", settings=("sources.romania=0",)),
        Arm(label="without synthetic scenes", settings=("sources.synthetic=0",)),
        Arm(label="without series of US crops", settings=('sources.series=["s2_points"]',)),
        Arm(label="without series of points", settings=('sources.series=["crops_us_2021"]',)),
        Arm(label="without EuroSAT's imagery", settings=("sources.eurosat=false",)),
    )


STUDIES: Mapping[str, Study] = {
    "inputs": Study(
        subject="Encoders that receive the recurrence plots, the series, or both.",
        arms=(
            Arm(label="both"),
            Arm(label="plots alone", settings=("encoder.series=false", "reflectance=false")),
            Arm(label="series alone", settings=("encoder.plots=false",)),
        ),
    ),
    "threshold": Study(
        subject=(
            "Recurrence plots of distances (none) and thresholded plots. Thresholds are in "
            "standard deviations of an index (0.25); `point` marks the smallest 20 % of each plot."
        ),
        arms=(
            Arm(label="none"),
            *(Arm(label=f"{t}", settings=(f"encoder.threshold={t}",)) for t in (0.2, 0.5, 1.0)),
            Arm(
                label="point, 20 %",
                settings=('encoder.threshold="point"', "encoder.percentage=20.0"),
            ),
        ),
    ),
    "steps": Study(
        subject="Number of steps of the regular time grid. All grids cover the year.",
        arms=tuple(
            Arm(label=f"M = {m}", settings=(f"window.steps={m}",)) for m in (24, 32, 36, 48, 64)
        ),
    ),
    "labels": Study(
        subject="Effect of pretraining by the share of the labels that training uses.",
        arms=_few_labels(),
    ),
    "size": Study(subject="Accuracy, cost and speed by the size of the encoder.", arms=_sizes()),
    "networks": Study(
        subject="Our encoder and other networks, in the same graph, loop and schedule.",
        arms=(
            Arm(label="ours"),
            Arm(label="TempCNN", settings=("network=tempcnn",)),
            Arm(label="multilayer perceptron", settings=("network=mlp",)),
        ),
    ),
    "negatives": Study(
        subject="Pretraining with different choices of negatives within a batch.",
        pretraining=True,
        arms=(
            Arm(label="all but neighbours, one's own field and look-alikes (default)"),
            Arm(label="neighbours too", settings=("near=0",)),
            Arm(label="one's own field too", settings=("same_field=true",)),
            Arm(label="look-alikes too", settings=("alike=0",)),
            Arm(label="all places", settings=("near=0", "same_field=true", "alike=0")),
        ),
    ),
    "views": Study(
        subject=(
            "Pretraining with the pairs of pixel and patch, with views, or with both. Without the "
            "pairs, views of series alone train the pixel encoder and views of imagery alone the "
            "patch encoder, and the projections that retrieval uses stay untrained. All arms pass "
            "the same rows through the encoders, so that the batch statistics are the same."
        ),
        pretraining=True,
        arms=(
            Arm(label="pairs and views"),
            Arm(label="views alone", settings=("pairs_weight=0",)),
            Arm(label="pairs alone", settings=("series_weight=0", "imagery_weight=0")),
        ),
    ),
    "encoder": Study(
        subject=(
            "Pretraining of pixel encoders that receive the recurrence plots, the series, or both."
        ),
        pretraining=True,
        arms=(
            Arm(label="plots and series"),
            Arm(label="plots alone", settings=("pixel.series=false", "reflectance=false")),
            Arm(label="series alone", settings=("pixel.plots=false",)),
        ),
    ),
    "sources": Study(
        subject="Pretraining without each of its sources in turn.",
        pretraining=True,
        arms=_sources(),
    ),
}


def ablate(name: str, plan: Plan) -> str:
    """Train the missing runs of a study and write its table into the report.

    Args:
        name: name of the study, one of `STUDIES`.
        plan: parameters of the study.

    Returns:
        The section, as Markdown.

    Raises:
        NothingToCompare: the study does not fit the bundle, or its checkpoint is missing.
    """
    study = STUDIES[name]
    make = _pretraining_section if study.pretraining else _finetuning_section
    title, text = make(name, study, plan)
    text = f"{study.subject}\n\n{text}"
    write_section(plan.report, title, text)
    return f"## {title}\n\n{text}"


# Finetuning -------------------------------------------------------------------------------------


def _finetuning_section(name: str, study: Study, plan: Plan) -> tuple[str, str]:
    config = configuration(plan.bundle)
    if any(arm.pretrained for arm in study.arms) and not (
        plan.pretrained and plan.pretrained.exists()
    ):
        raise NothingToCompare(
            f"study '{name}' needs a checkpoint, and {plan.pretrained} does not exist: run "
            "`python -m training pretrain` first, or give --pretrained"
        )
    runs = {arm: [_run(arm, plan, seed) for seed in range(plan.seeds)] for arm in study.arms}
    folders = {arm: [_folder(run, plan) for run in seeds] for arm, seeds in runs.items()}
    for arm, seeds in runs.items():
        for run, folder in zip(seeds, folders[arm], strict=True):
            if not is_finished(folder):
                log.info("%s: %s, seed %d", name, arm.label, run.config.optimisation.seed)
                finetune(run, folder, device=plan.device, threads=plan.threads)
    outputs = {arm: [outputs_of(folder) for folder in seeds] for arm, seeds in folders.items()}
    rows = [outputs_row(arm.label, seeds) for arm, seeds in outputs.items()]
    if name == "size":
        rows = _with_speed(rows, {arm.label: seeds[0] for arm, seeds in folders.items()}, plan)
    epochs = next(iter(runs.values()))[0].config.optimisation.epochs
    table = _table(f"{plan.bundle}: {name}", SPLITS[config.task], rows, outputs, plan)
    notes = [f"All arms were trained for {epochs} epochs."]
    return table.title, markdown(replace(table, notes=[*notes, *table.notes])) + (
        f"\n\n![Accuracy by speed](pictures/{PICTURE})" if name == "size" else ""
    )


def _table(
    title: str,
    split: str,
    rows: Sequence[Row],
    outputs: Mapping[Arm, Sequence[Outputs]],
    plan: Plan,
) -> Table:
    n, places = sized(next(iter(outputs.values()))[0])
    return Table(
        title=title,
        split=split,
        n=n,
        places=places,
        rows=rows,
        commands=[plan.command] if plan.command else [],
        notes=[f"Settings of all arms: {', '.join(plan.settings)}."] if plan.settings else [],
    )


def _run(arm: Arm, plan: Plan, seed: int) -> Run:
    """The run of an arm."""
    config = configuration(plan.bundle)
    try:
        changed(config, arm.settings)
    except UnknownSetting as error:
        raise NothingToCompare(f"'{arm.label}' does not fit {plan.bundle}: {error}") from error
    # One network instead of an ensemble: it shows the effect of a choice at a lower cost.
    settings = [config.one_network, *plan.settings, *arm.settings, f"optimisation.seed={seed}"]
    if arm in STUDIES["labels"].arms and plan.pretrained:
        settings += _encoder_settings(plan.pretrained)
    if plan.epochs:
        settings.append(f"optimisation.epochs={plan.epochs}")
    steps = next((s for s in arm.settings if s.startswith("window.steps=")), None)
    if steps:
        if config.task != "classify":
            raise NothingToCompare(
                f"study 'steps' is for classifiers, and {plan.bundle} is for {config.task}: other "
                "steps would change a forecast's targets"
            )
        length = config.window.steps * config.window.step_days
        settings.append(f"window.step_days={-(-length // int(steps.partition('=')[2]))}")
    return Run(
        config=changed(config, settings),
        data=plan.places.data,
        pretrained=(plan.pretrained,) if arm.pretrained and plan.pretrained else (),
        protocol=arm.protocol,
    )


_SHAPE = ("width", "depths", "embedding", "plots", "series", "threshold", "percentage", "calendar")


def _encoder_settings(checkpoint: Path) -> list[str]:
    """Settings that give an encoder the shape of a pretrained one."""
    stored = torch.load(checkpoint, map_location="cpu", weights_only=True)
    config = PretrainConfig.model_validate(stored["config"])
    pixel = config.pixel.model_dump(mode="json")
    return [
        f"reflectance={json.dumps(config.reflectance)}",
        *(f"encoder.{key}={json.dumps(pixel[key])}" for key in _SHAPE),
    ]


def _folder(run: Run, plan: Plan) -> Path:
    """Folder of a run, named after its settings and distinct from every other configuration."""
    usual = configuration(plan.bundle).model_dump(mode="json")
    settings = run.config.model_dump(mode="json")
    words = [f"{key}={value}" for key, value in difference(usual, settings).items()]
    words += ["pretrained"] if run.pretrained else []
    words += [run.protocol] if run.protocol != "finetune" else []
    settings["optimisation"]["seed"] = None
    # A single checkpoint is written as in earlier versions, so that their finished runs are found.
    start = ", ".join(map(str, run.pretrained)) or "None"
    identity = [settings, start, run.protocol, str(run.data.resolve())]
    seed = run.config.optimisation.seed
    return plan.runs / plan.bundle / _named(words, identity) / f"seed-{seed}"


def _named(words: Sequence[str], identity: object) -> str:
    """A readable folder name with a digest of the configuration."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    readable = re.sub(r"[^a-z0-9=.]+", "-", "_".join(words).lower())[:60].strip("-")
    return f"{readable or 'default'}-{digest}"


def _with_speed(rows: Sequence[Row], folders: Mapping[str, Path], plan: Plan) -> list[Row]:
    """Rows with the size and speed of the exported graphs, and their picture."""
    speeds = compare(folders)
    title = f"{plan.bundle}, pixels per second of the exported graph on one CPU thread"
    picture(rows, speeds, plan.report.parent / "pictures" / PICTURE, title=title)
    return [replace(row, scores={**row.scores, **_speed_scores(speeds[row.name])}) for row in rows]


def _speed_scores(speed: Speed) -> dict[str, Score]:
    return {
        "MFLOP": measured([speed.megaflop]),
        "speed, relative": Score(value=speed.relative, low=speed.low, high=speed.high),
    }


# Pretraining ------------------------------------------------------------------------------------


def _pretraining_section(name: str, study: Study, plan: Plan) -> tuple[str, str]:
    runs = {arm: [_pretrained(arm, plan, seed) for seed in range(plan.seeds)] for arm in study.arms}
    # An arm that changes nothing, such as one that leaves out a source that was not given, would
    # repeat the first arm.
    usual = [_pretrain_folder(config, plan) for config in next(iter(runs.values()))]
    arms = [
        arm
        for i, arm in enumerate(study.arms)
        if i == 0 or [_pretrain_folder(c, plan) for c in runs[arm]] != usual
    ]
    reference = runs[study.arms[0]][0]
    for arm in arms:
        for config in runs[arm]:
            folder = _pretrain_folder(config, plan)
            if not (folder / _PROBES).exists():
                log.info("%s: %s, seed %d", name, arm.label, config.seed)
                _pretrain_and_probe(config, reference, folder, plan)
    rows, outputs = [], {}
    for arm in arms:
        folders = [_pretrain_folder(config, plan) for config in runs[arm]]
        outputs[arm] = [validation_outputs.load(folder / _CROPS) for folder in folders]
        rows.append(_probed_row(arm.label, outputs[arm], folders))
    split = (
        "linear probe of frozen pixel embeddings on US crops (17 classes), places of 0.1 degree "
        "that neither encoder nor probe has seen; EuroSAT: linear probe of frozen patch "
        "embeddings on its spatial split; retrieval: a pixel's own patch among the first five, "
        "on held-out rows and scenes of all sources"
    )
    table = _table(f"pretraining: {name}", split, rows, outputs, plan)
    command = f"default: `{pretrain_command(reference, Path('runs/pretrain'))}`"
    return table.title, markdown(
        replace(table, notes=[f"{reference.steps} steps each; {command}.", *table.notes])
    )


def _pretrained(arm: Arm, plan: Plan, seed: int) -> PretrainConfig:
    settings = [*plan.settings, *arm.settings, f"seed={seed}"]
    if plan.steps:
        settings.append(f"steps={plan.steps}")
    if plan.places.romania is None:
        settings.append("sources.romania=0")
    return changed(FIRST, settings)


def _pretrain_folder(config: PretrainConfig, plan: Plan) -> Path:
    settings = config.model_dump(mode="json")
    changes = difference(FIRST.model_dump(mode="json"), settings)
    words = [k if isinstance(v, list) else f"{k}={v}" for k, v in changes.items()]
    identity = {**settings, "seed": None, "data": str(plan.places.data.resolve())}
    return plan.runs / "pretrain" / _named(words, identity) / f"seed-{config.seed}"


def _pretrain_and_probe(
    config: PretrainConfig, reference: PretrainConfig, folder: Path, plan: Plan
) -> None:
    if plan.threads:
        torch.set_num_threads(plan.threads)
    pretrain(config, places=plan.places, folder=folder, device=plan.device, workers=plan.workers)
    _, networks = load_networks(folder / CHECKPOINT)
    # Held-out places of every source, including one that this arm was not trained on. The synthetic
    # scenes are of another seed, so no arm was trained on them.
    sources = open_sources(reference.sources, plan.places, seed=config.seed)
    for name, outputs in probe_outputs(networks, plan.places.data).items():
        (folder / name).mkdir(exist_ok=True)
        validation_outputs.save(outputs, folder / name)
    # All arms are measured on the same batches, whatever their networks are.
    shape = {name: getattr(config, name) for name in _NETWORKS}
    alike = reference.model_copy(update=shape)
    retrieval = measure_retrieval(networks, alike, sources, folder)
    (folder / _PROBES).write_text(json.dumps(retrieval, indent=1))


def _probed_row(label: str, crops: Sequence[Outputs], folders: Sequence[Path]) -> Row:
    row = outputs_row(label, crops)
    scores = {key: row.scores[key] for key in ("accuracy", "macro-F1")}
    if all((folder / _PATCHES / validation_outputs.FILE).exists() for folder in folders):
        patches = outputs_row(
            label, [validation_outputs.load(folder / _PATCHES) for folder in folders]
        )
        scores["EuroSAT accuracy"] = patches.scores["accuracy"]
    found: list[dict[str, Any]] = [json.loads((f / _PROBES).read_text())["all"] for f in folders]
    for key, title in (("pixel_to_patch_5", "pixel to patch"), ("patch_to_pixel_5", "back")):
        scores[title] = measured([one[key] for one in found])
    return replace(row, scores=scores)

"""Regions left out of the probe of an embedding, for the card of its bundle.

bundle -> embeddings of all regions -> a linear probe without each region -> scores, `regions.json`

An encoder is pretrained without labels, so a region is left out of the probe alone; the imagery of
some regions is part of the pretraining. A random forest on the pixels' series stands beside an
embedding of pixels; it also has the synthetic ground.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.card import ModelCard
from models.indices import SpectralIndices
from models.registry import load_bundle
from training.calibration import fit_temperature
from training.classification import PixelClassification, in_window
from training.datasets.eurosat import eurosat_rgb
from training.datasets.level2a import labelled_areas
from training.datasets.synthetic_ground import SYNTHETIC
from training.embedding import embed_patches
from training.errors import TrainingError
from training.finetune import task_of
from training.landcover import patch_outputs
from training.legends import WORLDCOVER, landcover_sets
from training.parity import Served
from training.probe import Labelled, joined, linear_logits
from training.regions import (
    Plan,
    Report,
    across,
    beside_forest,
    class_rows,
    class_scores,
    evaluation_sets,
    write_report,
)
from training.series import series_outputs, tabulate
from training.task import Outputs

Bools = NDArray[np.bool_]
LABELS = "pixels-landcover"
"""The bundle on whose labels an embedding of pixels is probed, and whose forest stands beside."""
_PIXELS = (
    "A linear probe (logistic regression) of the embeddings for the classes of broad land cover. "
    "Each region was left out of the probe's training completely, and its probabilities are "
    "calibrated by the temperature fitted on the other regions left out. `pune`, `bavaria` and "
    "`brazil` are never trained on. The encoder was pretrained without labels; the card names the "
    "data. The forest has the synthetic ground as well. "
)
_PATCHES = (
    "A linear probe (logistic regression) of the embeddings for EuroSAT's classes, trained on a "
    "sample of EuroSAT's training patches and on the areas of level 2A. Each area was left out of "
    "the probe's training completely; `eurosat` are the sample's validation patches. Probabilities "
    "are calibrated by the temperature fitted on the other rows. "
)


def evaluate_embedding(bundle: Path, plan: Plan) -> Report:
    """Probe a bundle's embeddings on every region left out, write the section and `regions.json`.

    Args:
        bundle: folder of a bundle of embeddings.
        plan: `run` has the configuration `LABELS`, the data and the Romania cube.

    Raises:
        TrainingError: the bundle is no embedding.
    """
    found = load_bundle(bundle)
    card = found.card
    if card.task != "embed":
        raise TrainingError(f"{card.id} is a model of {card.task}: give a bundle of embeddings")
    graph = Served(found.path("float32"))
    plan.folder.mkdir(parents=True, exist_ok=True)
    scored = _patches(graph, plan) if card.modality == "patch" else _pixels(graph, card, plan)
    report = Report(calibration={}, regions=scored)
    about = _PATCHES if card.modality == "patch" else _PIXELS
    write_report(plan, card.name, report, _lines(about, report))
    return report


def _lines(about: str, report: Report) -> Iterator[str]:
    yield about + "Column `beside`: calibration error with the temperature of validation places."
    yield ""
    yield from class_rows(report.regions)


def _pixels(graph: Served, card: ModelCard, plan: Plan) -> dict[str, dict[str, Any]]:
    if card.window is None:
        raise TrainingError(f"{card.id} states no time window")
    never = {str(sets[0].region): sets for sets in evaluation_sets(plan.run)}
    # Synthetic series are made for the classifier: a probe is trained on observed ones.
    sets = [s for s in landcover_sets(plan.run.data) if s.source != SYNTHETIC]
    sets += [s for several in never.values() for s in several]
    spectral = SpectralIndices(card.indices, card.bands)
    found = tabulate(sets, card.window, least=card.min_observations, spectral=spectral)
    table = found.take(found.labels >= 0)
    valid = in_window(table, card.window)
    data = Labelled(
        embeddings=series_outputs(graph, table.values, valid, table.days),
        labels=table.labels,
        validation=table.validation,
        places=table.places,
    )
    names = [table.regions[i] for i in np.unique(table.region)]
    trainable = ~table.in_regions(list(never))
    outputs = {
        name: _probed(data, table.in_regions([name]), trainable, len(WORLDCOVER)) for name in names
    }
    scored = _scores(outputs, {n: o for n, o in outputs.items() if n not in never})
    if plan.baselines and isinstance(task := task_of(plan.run), PixelClassification):
        for name, scores in scored.items():
            scores |= beside_forest(plan, task, name)
    return scored


def _patches(graph: Served, plan: Plan) -> dict[str, dict[str, Any]]:
    parts = {"eurosat": embed_patches(graph, eurosat_rgb(plan.run.data / "eurosat"))}
    for area in labelled_areas(plan.run.data, plan.run.romania):
        count = len(area.labels)
        parts[area.name] = Labelled(
            embeddings=patch_outputs(graph, np.arange(count), area.values.__getitem__),
            labels=area.labels,
            validation=np.zeros(count, dtype=bool),
            places=area.places,
        )
    data = joined(list(parts.values()))
    region = np.repeat(list(parts), [len(part.labels) for part in parts.values()])
    # Of EuroSAT the validation patches are left out, because no area has all of its classes.
    away = {name: (region == name) & (data.validation | (name != "eurosat")) for name in parts}
    everywhere = np.ones(len(region), dtype=bool)
    classes = int(data.labels.max()) + 1
    outputs = {name: _probed(data, rows, everywhere, classes) for name, rows in away.items()}
    return _scores(outputs, outputs)


def _probed(data: Labelled, away: Bools, trainable: Bools, classes: int) -> Outputs:
    """Logits of rows left out (`away`) by a probe of the trainable ones, and its temperature."""
    train, labels = data.part(trainable & ~away & ~data.validation)
    near = trainable & ~away & data.validation
    rest = np.concatenate([np.flatnonzero(away), np.flatnonzero(near)])
    logits = linear_logits(train, labels, data.embeddings[rest], classes)
    count = int(away.sum())
    return {
        "logits": logits[:count],
        "labels": data.labels[away],
        "places": data.places[away],
        "temperature": np.array(fit_temperature(logits[count:], data.labels[near])),
    }


def _scores(
    outputs: Mapping[str, Outputs], trained: Mapping[str, Outputs]
) -> dict[str, dict[str, Any]]:
    """Scores by region, each under the temperature fitted on the other ones in `trained`."""
    return {name: class_scores(own, across(trained, without=name)) for name, own in outputs.items()}

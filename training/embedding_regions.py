"""Regions left out of the probe of an embedding, for the card of its bundle.

bundle -> embeddings of all regions -> a linear probe without each region -> scores, `regions.json`

An encoder is pretrained without labels, so a region is left out of the probe alone; the imagery of
some regions is part of the pretraining. A random forest that is trained on the same pixels stands
beside an embedding of pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.card import ModelCard
from models.indices import SpectralIndices
from models.registry import load_bundle
from training.calibration import fit_temperature
from training.classification import PixelClassification, in_window
from training.config import configuration
from training.datasets.eurosat import eurosat_rgb
from training.datasets.level2a import labelled_areas
from training.embedding import embed_patches, patch_embeddings
from training.errors import TrainingError
from training.finetune import task_of
from training.legends import WORLDCOVER, landcover_sets
from training.parity import Served
from training.probe import Labelled, linear_logits
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
_LABELS = "pixels-landcover"
"""The bundle on whose labels an embedding of pixels is probed."""
_PIXELS = (
    "A linear probe (logistic regression) of the embeddings for the classes of broad land cover. "
    "Each region was left out of the probe's training completely, and its probabilities are "
    "calibrated by the temperature fitted on the other regions left out. `pune`, `bavaria` and "
    "`brazil` are never trained on. The encoder was pretrained without labels; the card names the "
    "data. "
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
        plan: `run` gives the data and the Romania cube; its configuration does not count.

    Raises:
        TrainingError: the bundle is no embedding.
    """
    card = load_bundle(bundle).card
    if card.task != "embed":
        raise TrainingError(f"{card.id} is a model of {card.task}: give a bundle of embeddings")
    graph = Served(load_bundle(bundle).path("float32"))
    plan = replace(plan, run=plan.run.model_copy(update={"config": configuration(_LABELS)}))
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
    never = [pixels for sets in evaluation_sets(plan.run) for pixels in sets]
    # Synthetic series are made for the classifier: a probe is trained on observed ones.
    sets = [s for s in landcover_sets(plan.run.data) if s.source != "synthetic_ground"]
    spectral = SpectralIndices(card.indices, card.bands)
    found = tabulate([*sets, *never], card.window, least=card.min_observations, spectral=spectral)
    table = found.take(found.labels >= 0)
    valid = in_window(table, card.window)
    data = Labelled(
        embeddings=series_outputs(graph, table.values, valid, table.days),
        labels=table.labels,
        validation=table.validation,
        places=table.places,
    )
    names = [name for i, name in enumerate(table.regions) if (table.region == i).any()]
    held_out = {name: table.in_regions([name]) for name in names}
    trainable = ~table.in_regions([str(pixels.region) for pixels in never])
    classes = len(WORLDCOVER)
    outputs = {name: _probed(data, away, trainable, classes) for name, away in held_out.items()}
    trained = {n: o for n, o in outputs.items() if (trainable & held_out[n]).any()}
    scored = _scores(outputs, trained)
    if plan.baselines and isinstance(task := task_of(plan.run), PixelClassification):
        for name, scores in scored.items():
            seen = np.ones(int(held_out[name].sum()), dtype=bool)
            scores |= beside_forest(plan, task, name, seen)
    return scored


def _patches(graph: Served, plan: Plan) -> dict[str, dict[str, Any]]:
    eurosat = embed_patches(graph, eurosat_rgb(plan.run.data / "eurosat"))
    parts, names = [eurosat], ["eurosat"]
    for area in labelled_areas(plan.run.data, plan.run.romania):
        count = len(area.labels)
        parts.append(
            Labelled(
                embeddings=patch_embeddings(graph, area.values),
                labels=area.labels,
                validation=np.zeros(count, dtype=bool),
                places=area.places,
            )
        )
        names.append(area.name)
    data = Labelled(
        embeddings=np.concatenate([part.embeddings for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        validation=np.concatenate([part.validation for part in parts]),
        places=np.concatenate([part.places for part in parts]),
    )
    region = np.repeat(np.arange(len(parts)), [len(part.labels) for part in parts])
    everywhere = np.ones(len(region), dtype=bool)
    classes = int(data.labels.max()) + 1
    away = {"eurosat": (region == 0) & data.validation}
    away |= {name: region == i for i, name in enumerate(names) if i}
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
    return {
        name: class_scores(
            own,
            across({n: o for n, o in trained.items() if n != name}),
            np.ones(len(own["labels"]), dtype=bool),
        )
        for name, own in outputs.items()
    }

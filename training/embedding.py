"""Embedding export: a pretrained checkpoint to the bundles `embed-pixel` and `embed-patch`.

checkpoint -> graphs without heads -> scores beside an untrained encoder -> bundles
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.card import Modality, TimeWindow
from models.graph import PatchGraph, PixelGraph
from training.card import described, megaflop, parameters, pretrain_command
from training.config import BANDS, INDICES
from training.datasets import PatchSet, PixelSet
from training.datasets.eurosat import eurosat_rgb
from training.export import write_bundle
from training.finetune import machine
from training.int8_scale import int8_of
from training.landcover import patch_outputs
from training.legends import us_crops
from training.licences import LICENCE, pretraining_data, sensed
from training.parity import Served
from training.pretrain import (
    CHECKPOINT,
    LOG_FILE,
    PATCH_BANDS,
    Networks,
    PretrainConfig,
    Pretraining,
)
from training.pretraining_data import Places, Sources, open_sources
from training.probe import Labelled, linear_logits, probe
from training.task import Outputs

log = logging.getLogger(__name__)

# Side of a served patch, and of the patches that the patch encoder is probed on.
PATCH = 64
MIN_OBSERVATIONS = 4
"""Clear observations of a pixel that is probed."""
_BATCH = 256
RETRIEVAL_BATCHES = 16
"""Batches of held-out pairs on which retrieval is measured."""
_PROBED_PATCHES = 5000


def export_embeddings(
    folder: Path,
    zoo: Path,
    *,
    places: Places,
    version: str | None = None,
    modalities: Collection[Modality] = ("pixel", "patch"),
) -> list[Path]:
    """Score a finished pretraining run and write its bundles.

    Args:
        folder: the run's folder.
        zoo: folder of bundles; those of the same names are replaced.
        places: paths of the data.
        version: version of the bundles; None keeps the version of the bundles replaced, or starts
            at 1.0.0.
        modalities: `pixel` writes `embed-pixel`, `patch` writes `embed-patch`.

    Returns:
        The folders of the bundles.

    Raises:
        ParityError: ONNX Runtime and torch differ.
    """
    stored = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)
    config = PretrainConfig.model_validate(stored["config"])
    networks = Networks(config)
    networks.restore(stored)
    networks.eval()
    sources = open_sources(config.sources, places, seed=config.seed)
    data = pretraining_data(sources.counts())
    run = _Finished(
        config=config,
        networks=networks,
        untrained=_untrained(config),
        pairs=measure_retrieval(networks, config, sources, folder),
        fields={"task": "embed", "licence": LICENCE, "training_data": data, **sensed(data)},
        facts=_training_facts(config, stored, folder, modalities),
    )
    write = {"pixel": _write_pixels, "patch": _write_patches}
    return [write[kind](run, zoo, places.data, version) for kind in write if kind in modalities]


@dataclass(frozen=True, kw_only=True)
class _Finished:
    """A finished run, and what the cards of its bundles share."""

    config: PretrainConfig
    networks: Networks
    untrained: Networks
    pairs: Mapping[str, Any]
    """Retrieval scores."""
    fields: Mapping[str, Any]
    """Fields of both cards."""
    facts: Mapping[str, Any]
    """Facts about the training, for the field `training`."""


def _write_pixels(run: _Finished, zoo: Path, data: Path, version: str | None) -> Path:
    config, graph = run.config, pixel_graph(run.networks)
    crops = us_crops(data)
    embedded = embed_crops(graph, crops)
    scores = probe(embedded)
    # The encoder's own numbers come first.
    encoder, series = np.split(embedded.embeddings, [config.pixel.embedding], axis=1)
    return write_bundle(
        graph,
        zoo / "embed-pixel",
        fields={
            **run.fields,
            **described("embed-pixel"),
            "modality": "pixel",
            "bands": BANDS,
            "indices": INDICES,
            "window": _window(config),
            "day_of_year": False,
            "min_observations": config.min_observations,
            "embedding": embedded.embeddings.shape[1],
            "embedding_int8": int8_of({"US crops": embedded})[0],
            "metrics": {
                "crops_us_2021": {
                    "split": "validation blocks of 0.1 degree; labels are USDA's map",
                    "pretrained": scores,
                    "untrained": probe(embed_crops(pixel_graph(run.untrained), crops)),
                    "encoder_alone": probe(replace(embedded, embeddings=encoder)),
                    "series_alone": probe(replace(embedded, embeddings=series)),
                },
                "retrieval": run.pairs,
            },
            "training": {**run.facts, **_size(graph, _pixel_example())},
        },
        real=_real_pixels(crops, crops.validation),
        typical=[_real_pixels(crops, ~crops.validation)],
        version=version,
        loss=lambda file: _loss(scores, probe(embed_crops(Served(file), crops))),
    )


def _write_patches(run: _Finished, zoo: Path, data: Path, version: str | None) -> Path:
    config, graph = run.config, PatchGraph(encoder=run.networks.patch, head=None).eval()
    eurosat = eurosat_rgb(data / "eurosat")
    embedded = embed_patches(graph, eurosat)
    scores = probe(embedded)
    untrained = PatchGraph(encoder=run.untrained.patch, head=None)
    return write_bundle(
        graph,
        zoo / "embed-patch",
        fields={
            **run.fields,
            **described("embed-patch"),
            "modality": "patch",
            "bands": PATCH_BANDS,
            "patch": PATCH,
            "day_of_year": False,
            "min_observations": 1,
            "embedding": config.patch.embedding,
            "embedding_int8": int8_of({"EuroSAT": embedded})[0],
            "metrics": {
                "eurosat": {
                    "split": "EuroSAT's spatial split; 5,000 random patches of both sides",
                    "pretrained": scores,
                    "untrained": probe(embed_patches(untrained, eurosat)),
                },
                "retrieval": run.pairs,
            },
            "training": {
                **run.facts,
                **_size(graph, [torch.rand(1, len(PATCH_BANDS), PATCH, PATCH)]),
            },
        },
        real={"patches": _reflectance(eurosat, np.flatnonzero(eurosat.validation)[:64])},
        version=version,
        loss=lambda file: _loss(scores, probe(embed_patches(Served(file), eurosat))),
    )


def _loss(full: Mapping[str, Any], reduced: Mapping[str, Any]) -> dict[str, float]:
    """Change of a linear probe's scores; negative is worse."""
    before, after = full["linear_probe"], reduced["linear_probe"]
    return {name: round(after[name] - before[name], 4) for name in ("accuracy", "macro_f1")}


def pixel_graph(networks: Networks) -> PixelGraph:
    """The pixel graph as it is served: without a head, the output is the embedding."""
    return networks.pixel.eval()


def measure_retrieval(
    networks: Networks, config: PretrainConfig, sources: Sources, folder: Path
) -> Mapping[str, Any]:
    """Retrieval on each source's held-out places, on the median image and without augmentation.

    Args:
        networks: the trained networks.
        config: the run's configuration.
        sources: the run's data.
        folder: the run's folder; nothing is written.
    """
    scores: dict[str, Any] = {
        "candidates": config.groups * config.per_group,
        "chance": round(1.0 / (config.groups * config.per_group), 4),
        "note": (
            "rows of each scene that training never saw, median image; candidates of all sources "
            f"or of one alone; candidates closer than {config.near:g} pixels left out"
        ),
    }
    several = config.model_copy(update={"measured_batches": RETRIEVAL_BATCHES})
    for name in ("all", *sorted({s.source for s in sources.held_out})):
        part = replace(sources, held_out=[s for s in sources.held_out if name in {"all", s.source}])
        run = Pretraining(several, part, folder, torch.device("cpu"))
        run.networks.load_state_dict(networks.state_dict())
        scores[name] = {key: round(value, 4) for key, value in run.measure().items()}
    return scores


def probe_outputs(networks: Networks, data: Path) -> dict[str, Outputs]:
    """Outputs of linear probes of both encoders on the validation places.

    Args:
        networks: the trained networks.
        data: folder of the data sets; EuroSAT is optional.
    """
    embedded = {"crops": embed_crops(pixel_graph(networks), us_crops(data))}
    if (data / "eurosat").is_dir():
        graph = PatchGraph(encoder=networks.patch, head=None)
        embedded["eurosat"] = embed_patches(graph, eurosat_rgb(data / "eurosat"))
    outputs: dict[str, Outputs] = {}
    for name, part in embedded.items():
        train, labels = part.part(~part.validation)
        rest, truth = part.part(part.validation)
        logits = linear_logits(train, labels, rest, int(part.labels.max()) + 1)
        places = part.places[part.validation]
        outputs[name] = {"logits": logits, "labels": truth, "places": places}
    return outputs


def embed_crops(graph: PixelGraph | Served, crops: PixelSet) -> Labelled:
    """Embeddings of the labelled US crops with enough observations."""
    labels = crops.labels if crops.labels is not None else np.full(len(crops.values), -1)
    pixels = crops.select(BANDS)
    rows = np.flatnonzero((labels >= 0) & (pixels.valid.sum(axis=1) >= MIN_OBSERVATIONS))
    part = pixels.take(rows)
    days = _days(part)
    parts = []
    with torch.inference_mode():
        for i in range(0, len(rows), _BATCH):
            batch = slice(i, i + _BATCH)
            values, valid = (torch.from_numpy(a[batch]) for a in (part.values, part.valid))
            parts.append(graph.raw(values, valid, days).numpy())
    return Labelled(
        embeddings=np.concatenate(parts),
        labels=labels[rows],
        validation=part.validation,
        places=part.places,
    )


def embed_patches(graph: PatchGraph | Served, patches: PatchSet, *, seed: int = 0) -> Labelled:
    """Embeddings of a random sample of EuroSAT."""
    rng = np.random.default_rng(seed)
    most = min(_PROBED_PATCHES, len(patches.values))
    chosen = np.sort(rng.permutation(len(patches.values))[:most])
    labels = patches.labels if patches.labels is not None else np.full(len(patches.values), -1)
    return Labelled(
        embeddings=patch_outputs(graph, chosen, partial(_reflectance, patches)),
        labels=labels[chosen],
        validation=patches.validation[chosen],
        places=patches.places[chosen],
    )


def _reflectance(patches: PatchSet, chosen: NDArray[np.int64]) -> NDArray[np.float32]:
    return patches.values[chosen].astype(np.float32) * np.float32(patches.scale)


def _days(pixels: PixelSet) -> torch.Tensor:
    first = pixels.dates[0].replace(day=1)
    return torch.tensor([float((day - first).days) for day in pixels.dates])


def _real_pixels(crops: PixelSet, of: NDArray[np.bool_]) -> dict[str, NDArray[Any]]:
    chosen = np.random.default_rng(0).permutation(np.flatnonzero(of))[:1024]
    part = crops.select(BANDS).take(chosen)
    return {"values": part.values, "valid": part.valid, "days": _days(part).numpy()}


def _untrained(config: PretrainConfig) -> Networks:
    torch.manual_seed(config.seed + 1)
    return Networks(config).eval()


def last_row(folder: Path) -> dict[str, float]:
    """The last row of a run's log."""
    with (folder / LOG_FILE).open(newline="") as file:
        *_, last = csv.DictReader(file)
    return {name: round(float(value), 5) for name, value in last.items() if value}


def _window(config: PretrainConfig) -> TimeWindow:
    return TimeWindow(
        steps=config.steps_per_window, step_days=config.step_days, start="fullest-year"
    )


def _pixel_example() -> tuple[torch.Tensor, ...]:
    """Input of one pixel: values, valid and days of a year of ten-day composites."""
    dates = 36
    return (
        torch.rand(1, dates, len(BANDS)),
        torch.ones(1, dates, dtype=torch.bool),
        torch.arange(dates) * 10.0,
    )


def _size(graph: PixelGraph | PatchGraph, example: Sequence[torch.Tensor]) -> dict[str, float]:
    return {
        "parameters": parameters(graph.encoder),
        "megaflop": round(megaflop(graph, example), 2),
    }


def _training_facts(
    config: PretrainConfig,
    stored: Mapping[str, Any],
    folder: Path,
    modalities: Collection[Modality],
) -> dict[str, Any]:
    export = f"python -m training embed {folder.as_posix()} --romania CUBE"
    if len(modalities) == 1:
        export += f" --modality {next(iter(modalities))}"
    return {
        "command": f"{pretrain_command(config, folder)} && {export}",
        "config": config.model_dump(mode="json"),
        "seed": config.seed,
        "steps": stored["step"],
        "seconds": stored["seconds"],
        "machine": machine(),
        "torch": torch.__version__,
        "log": last_row(folder),
    }

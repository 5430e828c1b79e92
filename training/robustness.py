"""Robustness of a land-cover run: accuracy on imagery that differs from what it was trained on.

EuroSAT is level 1C imagery of clear days. The validation patches are changed as another processing
level, haze or light would change them, and real level 2A imagery is scored beside: the labelled
areas of `training.datasets.level2a` that the run was not trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from models.graph import PatchGraph
from training.augment import add_haze, smooth, to_surface, to_top
from training.calibration import expected_calibration_error, probabilities
from training.card import ROBUSTNESS
from training.config import Run
from training.datasets.eurosat import eurosat_ms
from training.datasets.level2a import SEASONS, labelled_areas
from training.errors import TrainingError
from training.finetune import load_finished
from training.landcover import PatchClassification
from training.score_tables import write_section

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Scores = dict[str, dict[str, float | int]]
"""Number of patches, accuracy, mean confidence and calibration error by imagery."""
TITLE = "landcover-eurosat on other imagery"
# Most validation patches that are changed, drawn evenly: each condition takes a minute on a CPU.
_MOST_PATCHES = 1500
# Cosine of the sun's zenith angle in the middle latitudes: of a day in spring, and of June.
_SUN = 0.7
_JUNE_SUN = 0.88
_CONDITIONS: Mapping[str, Callable[[Floats], Floats]] = {
    "validation patches as they are (level 1C)": lambda x: x,
    "the same without Rayleigh scattering (as level 2A)": lambda x: to_surface(x, _SUN),
    "the same in haze (optical depth 0.3)": lambda x: add_haze(x, 0.3, _SUN),
    "the same in thick haze (optical depth 0.6)": lambda x: add_haze(x, 0.6, _SUN),
    "the same smoothed slightly (weight 0.15)": lambda x: smooth(x, 0.15),
    "the same smoothed as by resampling (weight 0.25)": lambda x: smooth(x, 0.25),
    "the same 15 % darker": lambda x: x * np.float32(0.85),
    "the same 15 % brighter": lambda x: x * np.float32(1.15),
}
_INTRODUCTION = (
    "Accuracy on imagery that differs from EuroSAT's. The validation patches are a sample of those "
    "that the run left out, changed by a plain model of the atmosphere (single scattering, the sun "
    "44 degrees high). Level 2A imagery counts where the run was not trained on it; "
    "`training/datasets/level2a.py` lists the places and how they were labelled. All clear dates "
    "count, and neighbouring dates are alike: a difference of a few points there means little."
)


class NotLandcover(TrainingError):
    """A run that cannot be scored on other imagery: of another task, or without held-out places."""


def measure_robustness(folder: Path, *, report: Path) -> Scores:
    """Score a run on other imagery; write a section of the report, and a file for the card.

    Args:
        folder: folder of a finished land-cover run that left the validation places out.
        report: the Markdown file.

    Raises:
        NotLandcover: the run is of another task, or trained on the validation places.
    """
    run, task, graph, _ = load_finished(folder)
    if not isinstance(task, PatchClassification) or run.everything:
        trained = " on every place" if run.everything else ""
        raise NotLandcover(
            f"{folder} is a run of {run.config.task}{trained}: give a land-cover run that left the "
            "validation places out"
        )
    scores = {
        title: _scores(graph, patches, labels) for title, patches, labels in _imagery(task, run)
    }
    (folder / ROBUSTNESS).write_text(json.dumps(scores, indent=1))
    write_section(report, TITLE, _markdown(scores, folder))
    return scores


def _imagery(task: PatchClassification, run: Run) -> Iterator[tuple[str, Floats, Ints]]:
    """Each kind of imagery that there is: its description, patches (N, 3, P, P), classes (N)."""
    some = task.validation[:: -(-len(task.validation) // _MOST_PATCHES)]
    for title, change in _CONDITIONS.items():
        yield title, change(task.read(some)), task.labels[some]
    if task.geotiffs.is_dir():
        raw = eurosat_ms(task.geotiffs, task.geotiffs.parent)
        chosen = np.flatnonzero(raw.validation)
        if raw.labels is not None and len(chosen):
            patches = np.asarray(raw.values[chosen], np.float32)
            yield "validation patches as GeoTIFFs (level 1C)", patches, raw.labels[chosen]
    for area in labelled_areas(run.data, run.romania):
        if area.name in task.regions and area.name not in run.left_out:
            continue
        for i, season in enumerate(SEASONS):
            seen = np.flatnonzero((area.seasons == i) & (area.dates == 1))
            if len(seen):
                labels = area.labels[seen]
                yield f"{area.name}, {season} (level 2A)", area.values[seen], labels
                if area.name == "south_tyrol":
                    risen = to_top(area.values[seen], _JUNE_SUN)
                    yield "the same with Rayleigh scattering", risen, labels


def _scores(graph: PatchGraph, patches: Floats, labels: Ints) -> dict[str, float | int]:
    if graph.head is None:
        raise TypeError("a graph without a head has no classes")
    with torch.inference_mode():
        parts = np.array_split(patches, -(-len(patches) // 256))
        logits = np.concatenate([graph.raw(torch.from_numpy(part)).numpy() for part in parts])
    shares = probabilities(logits, float(graph.head.temperature))
    return {
        "n": len(labels),
        "accuracy": round(float((shares.argmax(axis=1) == labels).mean()), 4),
        "confidence": round(float(shares.max(axis=1).mean()), 4),
        "expected_calibration_error": round(expected_calibration_error(shares, labels), 4),
    }


def _markdown(scores: Scores, folder: Path) -> str:
    lines = [
        _INTRODUCTION,
        "",
        "| imagery | n | accuracy | mean confidence | calibration error |",
        "|---|---|---|---|---|",
        *(
            f"| {title} | {found['n']} | {found['accuracy']:.3f} | {found['confidence']:.3f} | "
            f"{found['expected_calibration_error']:.3f} |"
            for title, found in scores.items()
        ),
        "",
        "```sh",
        f"python -m training robustness {folder.as_posix()}",
        "```",
    ]
    return "\n".join(lines)

"""Robustness of a land-cover run: accuracy on imagery that differs from what it was trained on.

EuroSAT is level 1C imagery of clear days. The validation patches are changed as another processing
level, haze or light would change them, and real level 2A imagery is scored beside: two areas whose
patches were labelled by eye, one of them in all seasons.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from models.graph import PatchGraph
from training.augment import add_haze, to_surface, to_top
from training.calibration import expected_calibration_error, probabilities
from training.card import ROBUSTNESS
from training.datasets import Scene
from training.datasets.eurosat import CLASSES, RGB, eurosat_ms
from training.datasets.stacks import read_stack
from training.errors import TrainingError
from training.finetune import load_finished
from training.landcover import PatchClassification
from training.score_tables import write_section

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Scores = dict[str, dict[str, float | int]]
"""Number of patches, accuracy, mean confidence and calibration error by imagery."""
TITLE = "landcover-eurosat on other imagery"
_SIDE = 64
# Most validation patches that are changed, drawn evenly: each condition takes a minute on a CPU.
_MOST_PATCHES = 1500
# Cosine of the sun's zenith angle in the middle latitudes: of a day in spring, and of June.
_SUN = 0.7
_JUNE_SUN = 0.88
# Largest share of a patch that may be cloudy or missing.
_MOST_CLOUDY = 0.02
_CONDITIONS: Mapping[str, Callable[[Floats], Floats]] = {
    "validation patches as they are (level 1C)": lambda x: x,
    "the same without Rayleigh scattering (as level 2A)": lambda x: to_surface(x, _SUN),
    "the same in haze (optical depth 0.3)": lambda x: add_haze(x, 0.3, _SUN),
    "the same in thick haze (optical depth 0.6)": lambda x: add_haze(x, 0.6, _SUN),
    "the same 15 % darker": lambda x: x * np.float32(0.85),
    "the same 15 % brighter": lambda x: x * np.float32(1.15),
}
# Patches of `south_tyrol_2022` (row and column of 64 x 64 pixels, from the north-west) that one
# class fills or characterises. Labelled by eye, before a model was run on them, with what is known
# of the area: Bolzano, its industrial zone, the rivers, the wooded slopes, and the orchards and
# vineyards of the Adige valley.
SOUTH_TYROL: Mapping[str, tuple[tuple[int, int], ...]] = {
    "Forest": (
        *((1, 4), (1, 5), (1, 10), (2, 1), (6, 10), (6, 11), (7, 9)),
        *((7, 11), (8, 8), (8, 9), (9, 9), (9, 11), (10, 11)),
    ),
    "Residential": ((3, 7), (4, 7), (4, 8), (5, 6)),
    "Industrial": ((7, 6), (8, 5), (8, 6), (9, 5)),
    "PermanentCrop": ((4, 0), (4, 1), (4, 2), (5, 1), (5, 2), (6, 0), (7, 0), (9, 1)),
    "River": ((6, 1), (7, 3), (9, 3), (10, 3)),
}
# An area of large arable fields: the four corners of `hesbaye_a_monthly` are all `AnnualCrop`.
_ARABLE = "AnnualCrop"
_SEASONS = {"winter": (12, 1, 2), "spring": (3, 4, 5), "summer": (6, 7, 8), "autumn": (9, 10, 11)}
_INTRODUCTION = (
    "Accuracy on imagery that differs from EuroSAT's. The validation patches are a sample of those "
    "that the run left out, changed by a plain model of the atmosphere (single scattering, the sun "
    "44 degrees high). The patches of South Tyrol (33 places) and Hesbaye (4) were labelled by "
    "eye; `training/robustness.py` lists them. All clear dates count, and neighbouring dates are "
    "alike: a difference of a few points there means little."
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
        title: _scores(graph, patches, labels)
        for title, patches, labels in _imagery(task, run.data)
    }
    (folder / ROBUSTNESS).write_text(json.dumps(scores, indent=1))
    write_section(report, TITLE, _markdown(scores, folder))
    return scores


def _imagery(task: PatchClassification, data: Path) -> Iterator[tuple[str, Floats, Ints]]:
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
    if (data / "south_tyrol_2022").is_dir():
        patches, labels = _south_tyrol(read_stack(data / "south_tyrol_2022"))
        yield "South Tyrol, June 2022 (level 2A)", patches, labels
        yield "the same with Rayleigh scattering", to_top(patches, _JUNE_SUN), labels
    if (data / "hesbaye_a_monthly").is_dir():
        corners = _corners(read_stack(data / "hesbaye_a_monthly"))
        for season, months in _SEASONS.items():
            chosen_patches = [patch for day, patch in corners if day.month in months]
            if chosen_patches:
                labels = np.full(len(chosen_patches), CLASSES.index(_ARABLE))
                yield f"Hesbaye, {season} (level 2A)", np.stack(chosen_patches), labels


def _south_tyrol(scene: Scene) -> tuple[Floats, Ints]:
    """The labelled patches of all clear dates (N, 3, P, P) and their classes (N)."""
    patches: list[Floats] = []
    labels: list[int] = []
    for name, places in SOUTH_TYROL.items():
        for row, col in places:
            clear = _clear(scene, row * _SIDE, col * _SIDE)
            patches += [patch for _, patch in clear]
            labels += [CLASSES.index(name)] * len(clear)
    return np.stack(patches), np.array(labels)


def _corners(scene: Scene) -> list[tuple[date, Floats]]:
    """Clear patches (3, P, P) in the four corners of an area, with their dates."""
    last_row, last_col = (length - _SIDE for length in scene.shape)
    places = [(row, col) for row in (0, last_row) for col in (0, last_col)]
    return [found for row, col in places for found in _clear(scene, row, col)]


def _clear(scene: Scene, row: int, col: int) -> list[tuple[date, Floats]]:
    """Patches (3, P, P) of the clear dates; single missing pixels get their band's median."""
    values, valid = scene.read(RGB, slice(row, row + _SIDE), slice(col, col + _SIDE))
    clear = np.flatnonzero((~valid).mean(axis=(1, 2)) <= _MOST_CLOUDY)
    medians = np.nanmedian(values[clear], axis=(2, 3), keepdims=True)
    filled = np.where(np.isnan(values[clear]), medians, values[clear]).astype(np.float32)
    return [(scene.dates[i], patch) for i, patch in zip(clear, filled, strict=True)]


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

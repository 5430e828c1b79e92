"""Outputs of a run on the validation places, stored with its weights, and their scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.calibration import cross_fitted_scores
from training.classification import PixelClassification
from training.forecasting import PixelForecast, forecast_scores
from training.landcover import PatchClassification

Outputs = dict[str, NDArray[Any]]
"""Of a classifier `logits` (N, K), `labels` (N), `places` (N); of a forecaster `quantiles`
(N, H, S, Q), `target` and `known` (N, H, S), `places` (N)."""
AnyTask = PixelClassification | PixelForecast | PatchClassification
FILE = "outputs.npz"


def outputs_on_validation(task: AnyTask, graph: Any) -> Outputs:  # noqa: ANN401  # of the task's kind
    """A graph's outputs on the validation places."""
    if isinstance(task, PixelForecast):
        quantiles, target, known = task.predict(graph)
        return forecasts(task, quantiles, target, known)
    if isinstance(task, PixelClassification):
        return classes(task, task.logits(graph, task.validation))
    return classes(task, task.logits(graph))


def classes(task: PixelClassification | PatchClassification, logits: NDArray[Any]) -> Outputs:
    """Logits (N, K) of the validation places, with their labels."""
    if isinstance(task, PixelClassification):
        labels, places = task.validation.labels, task.validation.places
    else:
        labels, places = task.labels[task.validation], task.patches.places[task.validation]
    return {"logits": logits, "labels": labels, "places": places}


def forecasts(
    task: PixelForecast, quantiles: NDArray[Any], target: NDArray[Any], known: NDArray[Any]
) -> Outputs:
    """Quantiles (N, H, S, Q) of the validation places, with the observed values."""
    places = task.validation.places[task.kept()]
    return {"quantiles": quantiles, "target": target, "known": known, "places": places}


def scores_of(answers: Outputs) -> dict[str, Any]:
    """Scores of outputs; a median without other quantiles has no coverage."""
    if "logits" in answers:
        return cross_fitted_scores(answers["logits"], answers["labels"], answers["places"])
    scores = forecast_scores(answers["quantiles"], answers["target"], answers["known"])
    if answers["quantiles"].shape[-1] == 1:
        del scores["coverage"]
    return scores


def keep(answers: Outputs, folder: Path) -> None:
    """Store outputs in a run's folder."""
    np.savez(folder / FILE, allow_pickle=False, **answers)


def load(folder: Path) -> Outputs:
    """Outputs stored by `keep`."""
    with np.load(folder / FILE) as stored:
        return dict(stored)

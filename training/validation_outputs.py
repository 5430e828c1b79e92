"""Outputs of a run on the validation places, stored with its weights, and their scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from training.calibration import cross_fitted_scores
from training.forecasting import forecast_scores
from training.task import Outputs

FILE = "outputs.npz"


def scores_of(outputs: Outputs) -> dict[str, Any]:
    """Scores of outputs; a median without other quantiles has no coverage."""
    if "logits" in outputs:
        return cross_fitted_scores(outputs["logits"], outputs["labels"], outputs["places"])
    scores = forecast_scores(outputs["quantiles"], outputs["target"], outputs["known"])
    if outputs["quantiles"].shape[-1] == 1:
        del scores["coverage"]
    return scores


def save(outputs: Outputs, folder: Path) -> None:
    """Store outputs in a run's folder."""
    np.savez(folder / FILE, allow_pickle=False, **outputs)


def load(folder: Path) -> Outputs:
    """Outputs stored by `save`."""
    with np.load(folder / FILE) as stored:
        return dict(stored)

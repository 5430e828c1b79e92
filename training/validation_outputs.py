"""Outputs of a run on the validation places, stored with its weights, and their scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from training.calibration import cross_fitted_scores
from training.forecasting import forecast_scores
from training.task import Outputs

FILE = "outputs.npz"


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

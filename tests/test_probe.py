"""Probes of frozen embeddings."""

from __future__ import annotations

import numpy as np
import pytest

from training.probe import Labelled, probe, score

pytestmark = pytest.mark.slow


def blobs(apart: float, *, seed: int = 0) -> Labelled:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, 400)
    centres = rng.normal(size=(3, 8)) * apart
    return Labelled(
        embeddings=(centres[labels] + rng.normal(size=(400, 8))).astype(np.float32),
        labels=labels,
        validation=np.arange(400) >= 300,
        places=np.arange(400) // 10,
    )


def test_probes_find_what_is_there_and_nothing_else():
    found = probe(blobs(8.0), resamples=20)
    assert found["linear_probe"]["accuracy"] > 0.98
    assert found["knn_15"]["accuracy"] > 0.95
    nothing = probe(blobs(0.0), resamples=20)
    assert nothing["linear_probe"]["accuracy"] == pytest.approx(1 / 3, abs=0.15)
    assert (found["n_train"], found["n_validation"]) == (300, 100)


def test_probes_learn_from_training_places_alone():
    data = blobs(8.0)
    shuffled = data.labels.copy()
    shuffled[:300] = np.random.default_rng(1).permutation(shuffled[:300])
    spoilt = Labelled(
        embeddings=data.embeddings,
        labels=shuffled,
        validation=data.validation,
        places=data.places,
    )
    assert probe(spoilt, resamples=20)["linear_probe"]["accuracy"] < 0.7


def test_scores_are_their_definitions_and_intervals_are_by_place():
    truth = np.array([0, 0, 1, 1, 1, 2])
    predicted = np.array([0, 1, 1, 1, 0, 2])
    places = np.array([0, 0, 1, 1, 2, 2])
    scores = score(truth, predicted, places, resamples=500, seed=0)
    assert scores["accuracy"] == pytest.approx(4 / 6, abs=1e-4)
    # F1 of each class: 2 tp / (2 tp + fp + fn) = 2/4, 4/6, 2/2.
    assert scores["macro_f1"] == pytest.approx((0.5 + 4 / 6 + 1.0) / 3, abs=1e-4)
    # Places are half right, all right, half right: no resample can leave 0.5 to 1.
    low, high = scores["accuracy_95"]
    assert 0.5 <= low < scores["accuracy"] < high <= 1.0

"""Retrieval accuracy and the signs of collapse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.retrieval import pair_scores, retrieval_accuracy, spread

pytestmark = pytest.mark.slow


def unit(n: int, p: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, p, generator=generator), dim=1)


@pytest.mark.parametrize("k", [1, 3])
def test_accuracy_is_the_share_of_own_rows_among_the_nearest(k):
    z0 = unit(40, 6, 0)
    z1 = torch.nn.functional.normalize(z0 + 1.5 * unit(40, 6, 1), dim=1)
    order = np.argsort(-(z0.numpy() @ z1.numpy().T), axis=1)[:, :k]
    expected = np.mean([i in order[i] for i in range(40)])
    assert 0.1 < expected < 1.0
    assert retrieval_accuracy(z0, z1, k=k) == pytest.approx(expected)


def test_excluded_rows_are_no_candidates():
    z0 = torch.eye(3)
    z1 = torch.eye(3)[[0, 2, 1]]  # rows 1 and 2 are mistaken for one another
    assert retrieval_accuracy(z0, z1) == pytest.approx(1 / 3)
    excluded = torch.zeros(3, 3, dtype=torch.bool)
    excluded[1, 2] = True
    # Row 1 is spared its rival, but its own row is no nearer than row 0: a tie is a miss.
    assert retrieval_accuracy(z0, z1, excluded) == pytest.approx(1 / 3)
    excluded[1, 0] = True
    assert retrieval_accuracy(z0, z1, excluded) == pytest.approx(2 / 3)


def test_collapsed_embeddings_have_no_accuracy_and_no_spread():
    z = torch.ones(16, 8) / 8**0.5
    scores = pair_scores(z, z, z, z)
    assert scores.pixel_to_patch == 0.0
    assert scores.patch_to_pixel_5 == 0.0
    assert scores.alignment == pytest.approx(0.0)
    assert scores.uniformity_pixel == pytest.approx(0.0, abs=1e-5)
    assert scores.spread_patch == pytest.approx(0.0, abs=1e-5)


def test_random_embeddings_are_spread():
    assert spread(unit(2000, 64, 0) * 3.0) == pytest.approx(1.0, abs=0.02)

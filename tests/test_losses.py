"""The losses equal slow, plain references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from training.losses import (
    SymmetricInfoNCE,
    alignment,
    alike,
    info_nce,
    near,
    pinball,
    same_group,
    symmetric_info_nce,
    uniformity,
)


def unit(n: int, p: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, p, generator=generator), dim=1)


def slow_info_nce(z0, z1, temperature, excluded=None) -> float:
    total = 0.0
    for i in range(len(z0)):
        scores = {
            j: math.exp(sum(a * b for a, b in zip(z0[i], z1[j], strict=True)) / temperature)
            for j in range(len(z1))
            if excluded is None or not excluded[i][j]
        }
        total -= math.log(scores[i] / sum(scores.values()))
    return total / len(z0)


@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize("masked", [False, True])
def test_info_nce_equals_its_definition(temperature, masked):
    z0, z1 = unit(9, 5, 0), unit(9, 5, 1)
    excluded = None
    if masked:
        excluded = torch.rand(9, 9, generator=torch.Generator().manual_seed(2)) < 0.4
        excluded.fill_diagonal_(fill_value=False)
    there = slow_info_nce(
        z0.tolist(), z1.tolist(), temperature, None if excluded is None else excluded.tolist()
    )
    back = slow_info_nce(
        z1.tolist(), z0.tolist(), temperature, None if excluded is None else excluded.T.tolist()
    )
    assert info_nce(z0, z1, temperature, excluded).item() == pytest.approx(there, rel=1e-5)
    both = symmetric_info_nce(z0, z1, temperature, excluded).item()
    assert both == pytest.approx((there + back) / 2, rel=1e-5)


def test_uninformative_vectors_have_a_loss_of_log_n():
    z = torch.ones(16, 4) / 2.0
    assert info_nce(z, z, 0.1).item() == pytest.approx(math.log(16))


def test_an_excluded_negative_gets_no_gradient():
    z0, z1 = unit(4, 3, 0), unit(4, 3, 1).requires_grad_()
    excluded = torch.zeros(4, 4, dtype=torch.bool)
    excluded[:3, 3] = True  # nobody is compared with row 3 but row 3 itself
    loss = info_nce(z0, z1, 0.2, excluded)
    (gradient,) = torch.autograd.grad(loss, z1)
    others = info_nce(z0[3:], z1[3:], 0.2)  # one row alone: no negatives, no gradient
    assert others.item() == pytest.approx(0.0, abs=1e-6)
    rows = z0[3] @ z1.detach().T / 0.2
    share = torch.softmax(rows, 0)[3]
    expected = (share - 1.0) * z0[3] / 0.2 / 4
    torch.testing.assert_close(gradient[3], expected)


def test_temperature_is_learned_within_its_limits():
    loss = SymmetricInfoNCE(0.1, lowest=0.05, highest=0.5)
    assert loss.temperature.item() == pytest.approx(0.1)
    z = unit(8, 4, 0)
    optimizer = torch.optim.SGD(loss.parameters(), lr=50.0)
    for _ in range(50):
        optimizer.zero_grad()
        loss(z, z).backward()
        optimizer.step()
    # Perfect pairs call for ever more confidence; the limit holds it.
    assert loss.temperature.item() == pytest.approx(0.05)


def test_same_group_excludes_the_row_itself_and_unknown_groups():
    mask = same_group(torch.tensor([3, -1, 3, -1, 5]))
    assert mask.nonzero().tolist() == [[0, 2], [2, 0]]


def test_near_is_measured_within_a_scene():
    scenes = torch.tensor([0, 0, 0, 1])
    positions = torch.tensor([[0, 0], [3, 3], [0, 8], [0, 1]])
    mask = near(scenes, positions, 4)
    assert mask.nonzero().tolist() == [[0, 1], [1, 0]]
    assert not near(scenes, positions, 0).any()


def test_alike_is_the_root_mean_square_difference():
    series = torch.rand(6, 3, 12, generator=torch.Generator().manual_seed(0))
    series[4] = series[1] + 0.01
    mask = alike(series, 0.011)
    assert mask.nonzero().tolist() == [[1, 4], [4, 1]]
    assert not alike(series, 0.009).any()


def test_alignment_and_uniformity_are_their_definitions():
    z0, z1 = unit(7, 4, 0), unit(7, 4, 1)
    a, b = z0.numpy().astype(np.float64), z1.numpy().astype(np.float64)
    assert alignment(z0, z1).item() == pytest.approx(np.mean(np.sum((a - b) ** 2, 1)), rel=1e-5)
    potentials = [math.exp(-2.0 * np.sum((a[i] - a[j]) ** 2)) for i in range(7) for j in range(i)]
    assert uniformity(z0).item() == pytest.approx(math.log(np.mean(potentials)), rel=1e-5)
    assert uniformity(torch.ones(5, 4) / 2.0).item() == pytest.approx(0.0, abs=1e-6)


def test_pinball_is_its_definition_on_valid_targets():
    rng = np.random.default_rng(0)
    predicted, target = rng.normal(size=(5, 4, 3)), rng.normal(size=(5, 4))
    valid = rng.random((5, 4)) < 0.7
    target[~valid] = np.nan
    levels = (0.1, 0.5, 0.9)
    expected = [
        max(q * (target[i, j] - predicted[i, j, k]), (q - 1) * (target[i, j] - predicted[i, j, k]))
        for i, j in np.argwhere(valid)
        for k, q in enumerate(levels)
    ]
    tensors = torch.tensor(predicted), torch.tensor(target)
    assert pinball(*tensors, levels).item() == pytest.approx(np.mean(expected))
    assert pinball(*tensors, levels, torch.tensor(valid)).item() == pytest.approx(np.mean(expected))


def test_pinball_is_least_at_the_quantile():
    sample = torch.linspace(0, 1, 1001)
    guesses = torch.linspace(0, 1, 101)
    losses = torch.stack([pinball(g.expand(1001, 1), sample, (0.9,)) for g in guesses])
    assert guesses[losses.argmin()].item() == pytest.approx(0.9, abs=0.011)


def test_pinball_without_a_valid_target_is_zero_and_harmless():
    predicted = torch.zeros(3, 1, requires_grad=True)
    loss = pinball(predicted, torch.full((3,), torch.nan), (0.5,))
    loss.backward()
    assert loss.item() == 0.0
    assert predicted.grad is not None
    assert (predicted.grad == 0).all()

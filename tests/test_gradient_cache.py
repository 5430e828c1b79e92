"""Gradients computed chunk by chunk equal those of the whole batch."""

from __future__ import annotations

import torch
from torch import nn

from training.gradient_cache import Side, backward
from training.losses import SymmetricInfoNCE


class Two(nn.Module):
    def __init__(self, *, normed: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(16) if normed else nn.Identity()
        self.left = nn.Sequential(nn.Linear(5, 16), norm, nn.Tanh(), nn.Dropout(dropout))
        self.right = nn.Linear(7, 16)
        self.loss = SymmetricInfoNCE(0.2)
        self.sizes: list[int] = []

    def sides(self, x: torch.Tensor, y: torch.Tensor) -> list[Side]:
        def encode(network: nn.Module, rows: torch.Tensor) -> torch.Tensor:
            self.sizes.append(len(rows))
            return nn.functional.normalize(network(rows), dim=1)

        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
        return [
            Side(encode=lambda rows: encode(self.left, x[order[rows]]), size=len(x), order=order),
            Side(encode=lambda rows: encode(self.right, y[rows]), size=len(y)),
        ]

    def gradients(self) -> list[torch.Tensor]:
        return [p.grad.clone() for p in self.parameters() if p.grad is not None]


def inputs(n: int = 22) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 5, generator=generator), torch.randn(n, 7, generator=generator)


def run(network: Two, chunk: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    network.zero_grad()
    torch.manual_seed(7)
    loss = backward(
        network.sides(*inputs()), lambda z: network.loss(z[0], z[1]), network=network, chunk=chunk
    )
    return loss, network.gradients()


def test_chunks_give_the_gradient_of_the_whole_batch():
    network = Two()
    x, y = inputs()
    z = [nn.functional.normalize(n(v), dim=1) for n, v in ((network.left, x), (network.right, y))]
    plain = network.loss(*z)
    plain.backward()
    expected = network.gradients()
    assert len(expected) == 5  # two layers and the temperature
    for chunk in (5, 11, 22, 100):
        network.sizes.clear()
        loss, found = run(network, chunk)
        assert max(network.sizes) <= chunk
        torch.testing.assert_close(loss, plain.detach())
        torch.testing.assert_close(found, expected)


def test_dropout_is_the_same_in_both_passes():
    network = Two(dropout=0.5)
    seen: list[torch.Tensor] = []
    network.left.register_forward_hook(lambda _m, _i, out: seen.append(out.detach()))
    run(network, chunk=8)
    first, second = seen[:3], seen[3:]
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert any((part == 0).any() for part in first)


def test_statistics_are_updated_once():
    chunked, plain = Two(normed=True), Two(normed=True)
    run(chunked, chunk=11)
    for rows in (slice(0, 11), slice(11, 22)):
        plain.sides(*inputs())[0].encode(rows)
    torch.testing.assert_close(chunked.left[1].running_mean, plain.left[1].running_mean)
    torch.testing.assert_close(chunked.left[1].running_var, plain.left[1].running_var)
    assert chunked.left[1].momentum == plain.left[1].momentum

"""Gradients of a large batch in the memory of a small one.

A contrastive loss compares every row with every other, so its batch cannot simply be split. But
the loss depends on the encoders only through the embeddings: its gradient at the embeddings is
computed first and then carried into the encoders chunk by chunk (Gao et al. 2021, arXiv
2101.06983). Memory holds one chunk's activations; the price is a second forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_BatchNorms = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a loss: rows that an encoder turns into embeddings."""

    encode: Callable[[slice], Tensor]
    """Embeddings (n, D) of a slice of the rows, in the order of `order`."""
    size: int
    """Rows (N)."""
    order: Tensor | None = None
    """Row of the batch that is encoded at each position (N); None for the batch's own order."""

    def restored(self, embeddings: Tensor) -> Tensor:
        """Embeddings (N, D) in the batch's own order."""
        return embeddings if self.order is None else embeddings[self.order.argsort()]


def backward(
    sides: Sequence[Side],
    loss: Callable[[Sequence[Tensor]], Tensor],
    *,
    network: nn.Module,
    chunk: int,
) -> Tensor:
    """Add the gradients of a loss over value batches to the parameters.

    With batch normalisation a chunk is normalised by its own statistics, so chunks should be
    shuffled, and the result is that of the value batch only up to these statistics.

    Args:
        sides: the sides that the loss compares.
        loss: takes the embeddings of each side (N, D), returns a scalar; may have parameters of
            its own.
        network: holds every module that the sides run, for its batch statistics.
        chunk: number of rows that an encoder processes at once.

    Returns:
        The loss (), detached.
    """
    if all(side.size <= chunk for side in sides):
        value = loss([side.restored(side.encode(slice(0, side.size))) for side in sides])
        torch.autograd.backward(value)
        return value.detach()
    states: list[list[tuple[Tensor, list[Tensor]]]] = []
    embeddings = []
    with torch.no_grad(), _frozen_statistics(network):
        for side in sides:
            parts, seen = [], []
            for rows in _chunks(side.size, chunk):
                seen.append(_random_state())
                parts.append(side.encode(rows))
            states.append(seen)
            embeddings.append(torch.cat(parts))
    leaves = [part.requires_grad_() for part in embeddings]
    value = loss([side.restored(leaf) for side, leaf in zip(sides, leaves, strict=True)])
    torch.autograd.backward(value)
    for side, leaf, seen in zip(sides, leaves, states, strict=True):
        if leaf.grad is None:
            continue
        for rows, state in zip(_chunks(side.size, chunk), seen, strict=True):
            _set_random_state(state)  # so that dropout drops the same units as in the first pass
            torch.autograd.backward(side.encode(rows), leaf.grad[rows])
    return value.detach()


def _chunks(size: int, chunk: int) -> Iterator[slice]:
    for start in range(0, size, chunk):
        yield slice(start, min(start + chunk, size))


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all()


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    torch.cuda.set_rng_state_all(state[1])


@contextmanager
def _frozen_statistics(network: nn.Module) -> Iterator[None]:
    """Do not update running batch statistics in this pass: the second pass updates them, once."""
    norms = [m for m in network.modules() if isinstance(m, _BatchNorms)]
    momenta = [m.momentum for m in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

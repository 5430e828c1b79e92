"""Label-free measures of paired embeddings: retrieval accuracy and collapse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.losses import alignment, uniformity


@dataclass(frozen=True, kw_only=True)
class PairScores:
    """Measures of one batch of pairs."""

    pixel_to_patch: float
    """Share of the pixels whose own patch is the nearest; 1/N by chance."""
    patch_to_pixel: float
    pixel_to_patch_5: float
    """Share of the pixels whose own patch is among the nearest five."""
    patch_to_pixel_5: float
    alignment: float
    """Mean squared distance of a pair, 0 to 4; smaller is better."""
    uniformity_pixel: float
    """0 if all projections are equal (collapse), down to about -4."""
    uniformity_patch: float
    spread_pixel: float
    """Standard deviation of the unit embeddings' entries x sqrt(D): 0 collapsed, 1 spread."""
    spread_patch: float


def retrieval_accuracy(z0: Tensor, z1: Tensor, excluded: Tensor | None = None, k: int = 1) -> float:
    """Share of rows of z0 whose own row of z1 is among the k nearest by cosine.

    Args:
        z0: unit vectors (N, P).
        z1: unit vectors (N, P).
        excluded: True where row j of z1 is not a candidate for row i (N, N); never on the diagonal.
        k: number of nearest rows that count.
    """
    cosines = z0 @ z1.T
    if excluded is not None:
        cosines = cosines.masked_fill(excluded, -torch.inf)
    own = cosines.diagonal()
    # Ties count as misses: a collapsed encoder produces only ties.
    better = (cosines >= own[:, None]).sum(dim=1) - 1
    return (better < k).float().mean().item()


def spread(embeddings: Tensor) -> float:
    """Standard deviation of unit embeddings' entries, times sqrt(D), averaged over entries."""
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    return float(unit.std(dim=0).mean() * unit.shape[1] ** 0.5)


def pair_scores(
    z0: Tensor, z1: Tensor, pixels: Tensor, patches: Tensor, excluded: Tensor | None = None
) -> PairScores:
    """Measure a batch of pairs.

    Args:
        z0: projections of the pixels (N, P), of unit length.
        z1: projections of the patches (N, P), of unit length.
        pixels: embeddings (N, D).
        patches: embeddings (N, D).
        excluded: pairs that are not candidates (N, N).
    """
    back = None if excluded is None else excluded.T
    return PairScores(
        pixel_to_patch=retrieval_accuracy(z0, z1, excluded),
        patch_to_pixel=retrieval_accuracy(z1, z0, back),
        pixel_to_patch_5=retrieval_accuracy(z0, z1, excluded, k=5),
        patch_to_pixel_5=retrieval_accuracy(z1, z0, back, k=5),
        alignment=alignment(z0, z1).item(),
        uniformity_pixel=uniformity(z0).item(),
        uniformity_patch=uniformity(z1).item(),
        spread_pixel=spread(pixels),
        spread_patch=spread(patches),
    )

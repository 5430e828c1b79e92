"""Spectral indices in the graph: a torch module over the formulas in `models.formulas`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.formulas import FORMULAS, INDEX_LIMIT, SMALLEST_DENOMINATOR


class SpectralIndices(nn.Module):
    """Computes spectral indices from bands: `(..., C, ...) -> (..., K, ...)`.

    Numerators and denominators are weighted sums of the bands, so that one matrix product computes
    those of all indices. A graph computes its other sums of bands in the same product.

    Args:
        names: indices to compute (K), keys of `FORMULAS`.
        bands: names of the bands of the input (C), in order.

    Attributes:
        weights: of each band in each numerator, then in each denominator (2K, C).

    Raises:
        KeyError: an index is unknown, or needs a band that is missing.
    """

    def __init__(self, names: Sequence[str], bands: Sequence[str]) -> None:
        super().__init__()
        self.names, self.bands = tuple(names), tuple(bands)
        # With all bands 0 a formula returns its constant; with a single band 1, that band's weight.
        light = torch.cat([torch.zeros(1, len(bands)), torch.eye(len(bands))])
        columns = dict(zip(bands, light.unbind(dim=1), strict=True))
        parts = []
        for needs, formula in (FORMULAS[name] for name in names):
            parts.append(torch.stack(formula(*(columns[band] for band in needs))))
        terms = torch.stack(parts, dim=1).flatten(0, 1)
        self.register_buffer("weights", terms[:, 1:] - terms[:, :1], persistent=False)
        self.register_buffer("constants", terms[len(names) :, 0], persistent=False)

    weights: Tensor
    constants: Tensor

    def forward(self, values: Tensor, dim: int = -1) -> Tensor:
        """Compute the indices.

        Args:
            values: reflectance, unitless; NaN where missing.
            dim: axis of the bands.

        Returns:
            Indices, on the axis of the bands, -1.5 to 1.5; NaN where a band is missing or the
            formula's denominator is at most `SMALLEST_DENOMINATOR`.
        """
        sums = values.movedim(dim, -1) @ self.weights.to(values.dtype).T
        ratios, denominators = self.ratios(sums, dim=-1)
        # Not `denominators <= limit`: a comparison with NaN is false, and NaN must give NaN.
        known = denominators > SMALLEST_DENOMINATOR
        return torch.where(known, ratios, torch.nan).movedim(-1, dim)

    def ratios(self, sums: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Indices from the products of bands and `weights`.

        Args:
            sums: the products, 2K on one axis.
            dim: that axis.

        Returns:
            Indices, -1.5 to 1.5, with any value where the denominator is NaN or at most
            `SMALLEST_DENOMINATOR`; and the denominators.
        """
        numerators, denominators = torch.split(sums, len(self.names), dim=dim)
        shape = [-1] + [1] * (sums.ndim - 1 - dim % sums.ndim)
        denominators = denominators + self.constants.to(sums.dtype).view(shape)
        return (numerators / denominators).clamp(-INDEX_LIMIT, INDEX_LIMIT), denominators

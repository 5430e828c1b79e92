"""Spectral indices, by name.

Formulas are those of the Awesome Spectral Indices catalogue (Montero et al. 2023,
doi:10.1038/s41597-023-02096-0), on Sentinel-2 bands as reflectance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# name -> (bands, formula). The formula takes the bands in that order and returns the numerator and
# the denominator, so that one place guards the division. Both are weighted sums of the bands; the
# denominator may add a constant: see `SpectralIndices`.
_Formula = Callable[..., tuple[Tensor, Tensor]]


def _normalized_difference(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a - b, a + b


FORMULAS: dict[str, tuple[tuple[str, ...], _Formula]] = {
    # Rouse et al. 1974
    "ndvi": (("B08", "B04"), _normalized_difference),
    # Huete et al. 2002, doi:10.1016/S0034-4257(02)00096-2: G = 2.5, C1 = 6, C2 = 7.5, L = 1
    "evi": (
        ("B08", "B04", "B02"),
        lambda nir, red, blue: (2.5 * (nir - red), nir + 6.0 * red - 7.5 * blue + 1.0),
    ),
    # Huete 1988, doi:10.1016/0034-4257(88)90106-X: L = 0.5
    "savi": (("B08", "B04"), lambda nir, red: (1.5 * (nir - red), nir + red + 0.5)),
    # Gitelson and Merzlyak 1994
    "ndrei": (("B08", "B05"), _normalized_difference),
    # Gao 1996, doi:10.1016/S0034-4257(96)00067-3
    "ndmi": (("B08", "B11"), _normalized_difference),
    # Key and Benson 2006
    "nbr": (("B08", "B12"), _normalized_difference),
}

# With a denominator this small an index is meaningless: EVI's passes through zero over bright
# blue targets (cloud, snow).
SMALLEST_DENOMINATOR = 0.05
"""An index is missing if its denominator is at most this."""
# Clear land lies well inside; values outside come from cloud edges and sun glint.
_LIMIT = 1.5


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
        return (numerators / denominators).clamp(-_LIMIT, _LIMIT), denominators

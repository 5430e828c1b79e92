"""Bayesian smoothing of class probabilities by their neighbourhood.

Camara et al. 2024, Bayesian Inference for Post-Processing of Remote-Sensing Image Classification,
Remote Sensing 16(23), 4572, doi:10.3390/rs16234572; the values of its parameters are the defaults
of `sits_smooth`.

For each class k, the logit x of a pixel is an observation of its true logit with the variance
sigma² (the smoothness). The prior comes from the neighbourhood: mean m and variance s² of the half
of the neighbours' logits that are largest for k. The prior uses half of the neighbours, not all, to
preserve edges: a pixel at the border of two areas has enough neighbours in its own area. The
posterior expectation

    E = s² / (s² + sigma²) · x + sigma² / (s² + sigma²) · m

is close to m where the neighbours agree, and close to x where they do not.

Two things differ from `sits_smooth` (sits 1.5, read in its source). It mirrors the raster at its
edges, so that pixels there count several times; here a neighbourhood ends at the edge. It gives a
pixel without a prediction the mean of its neighbours; here such a pixel stays without. It also
stores probabilities in steps of 1e-4, and not divided by their sum, which changes no class.

Shapes: K classes, h w rows and columns of a window.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Floats = NDArray[np.float32]
SMOOTHNESS = 20.0
"""sigma², the variance of a pixel's own logit."""
FRACTION = 0.5
"""Share of the neighbours from which the prior is computed."""
MAX_RADIUS = 10
"""Largest radius of a neighbourhood, pixels."""
_MARGIN = 1e-4
"""Distance from 0 and 1 to which probabilities are clipped, as in sits: logits are then finite."""
_SORTED_AT_ONCE = 2**22
"""Number of neighbours' logits that are sorted at once, which bounds the memory."""


def smoothed(probabilities: Floats, radius: int) -> Floats:
    """Class probabilities smoothed by their neighbourhoods.

    Args:
        probabilities: class probabilities, 0 to 1, of a window and the `radius` pixels around it
            (K, h + 2 radius, w + 2 radius) float32; NaN for pixels without a prediction and for
            positions outside the raster.
        radius: radius of the square neighbourhood in pixels, 1 to `MAX_RADIUS`; the side of the
            neighbourhood is 2 radius + 1 pixels.

    Returns:
        Probabilities (K, h, w) float32 that sum to 1 over K; NaN for pixels without a prediction.
    """
    K, height, width = probabilities.shape
    h, w, side = height - 2 * radius, width - 2 * radius, 2 * radius + 1
    clipped = np.clip(probabilities, _MARGIN, 1 - _MARGIN)
    logits = np.log(clipped) - np.log1p(-clipped)
    out = np.empty((K, h, w), np.float32)
    rows = max(1, _SORTED_AT_ONCE // (side * side * w))
    for k in range(K):
        around = sliding_window_view(logits[k], (side, side))
        for top in range(0, h, rows):
            part = around[top : top + rows].reshape(-1, side * side)
            own = logits[k, radius + top : radius + min(top + rows, h), radius : radius + w]
            out[k, top : top + rows] = _posterior(own.reshape(-1), part).reshape(own.shape)
    chances = 1 / (1 + np.exp(-out))
    result: Floats = chances / chances.sum(axis=0)
    return result


def _posterior(own: Floats, around: Floats) -> Floats:
    """Posterior expectation (N) of logits (N) with neighbours (N, side²), NaN where missing."""
    # Descending, and NaN last.
    ordered = -np.sort(-around, axis=1)
    present = (~np.isnan(around)).sum(axis=1)
    count = np.maximum(1, np.ceil(FRACTION * present)).astype(np.intp)
    used = np.arange(around.shape[1]) < count[:, None]
    chosen = np.where(used, ordered, np.float32(0))
    mean = chosen.sum(axis=1, dtype=np.float64) / count
    deviation = np.where(used, chosen - mean[:, None], 0.0)
    variance = (deviation**2).sum(axis=1) / np.maximum(1, count - 1)
    weight = variance / (variance + SMOOTHNESS)
    return np.asarray(weight * own + (1 - weight) * mean, np.float32)

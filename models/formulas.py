"""Formulas and constants that code with torch and code without it share.

The formulas of the graph's first stages (spectral indices such as NDVI, the regular grid,
recurrence plots) are used by the torch modules, by the graph of own classes and by the NumPy copy
of recurrence plots. The formula of int8 embeddings is used by the service, which writes them, and
by training, which measures their loss; the median over dates by the service's reading and by its
inference, which share no code of their own. Index formulas are those of
the Awesome Spectral Indices catalogue (Montero et al. 2023, doi:10.1038/s41597-023-02096-0), on
Sentinel-2 bands as reflectance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The bands in the order of the names; the numerator and the denominator, so that one place guards
# the division. Both are weighted sums of the bands; the denominator may add a constant: see
# `models.indices.SpectralIndices`. Tensors and arrays alike.
Formula = Callable[..., tuple[Any, Any]]


def _normalized_difference(a: Any, b: Any) -> tuple[Any, Any]:  # noqa: ANN401 - tensors or arrays
    return a - b, a + b


FORMULAS: Mapping[str, tuple[tuple[str, ...], Formula]] = {
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
"""Name to its bands and its formula."""

# With a denominator this small an index is meaningless: EVI's passes through zero over bright
# blue targets (cloud, snow).
SMALLEST_DENOMINATOR = 0.05
"""An index is missing if its denominator is at most this."""
# Clear land lies well inside; values outside come from cloud edges and sun glint.
INDEX_LIMIT = 1.5
"""Largest absolute value of an index."""

# Typical mean and standard deviation of vegetation indices over cropland. They are constants, not
# measured for each data set, so that all bundles compute the same plot of a series.
INDEX_CENTER = 0.3
INDEX_SPREAD = 0.25

# Constants of the kernel regression: see `models.timegrid.TimeGrid`.
NARROW = 0.45
"""Standard deviation of the Gaussian, in steps."""
WIDE = 2.0
"""Half width of the Cauchy kernel, in steps."""
WIDE_HEIGHT = 1e-3
"""Height of the Cauchy kernel, of the Gaussian's."""
# Clipped, because products with subnormal numbers are far slower.
FAR = 60.0
"""The Gaussian is clipped at e to minus this, 1e-26: negligible against the wide kernel."""
YEAR = 365.25
"""Days after which a yearly grid repeats."""

INT8_STEPS = 127
"""Largest absolute value of an embedding as int8; -128 is left for nodata."""


def int8_steps(embeddings: NDArray[np.float32], scale: float) -> NDArray[np.float32]:
    """The nearest steps of int8, -127 to 127, in the shape of the embeddings; NaN stays NaN.

    Args:
        embeddings: any shape, float32.
        scale: value of one step.
    """
    steps = np.rint(embeddings / np.float32(scale))
    return np.asarray(np.clip(steps, -INT8_STEPS, INT8_STEPS), np.float32)


def median_of_dates(values: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The median over the valid dates, NaN where none is.

    Args:
        values: (T, …) float32, not NaN where valid.
        valid: True where usable (T, …); it broadcasts against the values.

    Returns:
        The shape of the values without T.
    """
    # Unusable dates are sorted last, so the median's position follows from the number of the
    # others. NumPy's nanmedian is an order of magnitude slower along a short axis.
    ordered = np.sort(np.where(valid, values, np.float32(np.inf)), axis=0)
    count = valid.sum(axis=0)[None]
    low = np.take_along_axis(ordered, np.maximum(count - 1, 0) // 2, axis=0)
    high = np.take_along_axis(ordered, np.minimum(count // 2, len(ordered) - 1), axis=0)
    return np.asarray(np.where(count > 0, (low + high) / 2, np.float32(np.nan))[0])

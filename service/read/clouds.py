"""Cloud mask estimated from the series, for stacks without a quality band: `mask=cloud`.

Each pixel is compared with its own series: a cloud is brighter in blue, whiter and less green than
the pixel usually is, and a cloud shadow is darker in the near infrared. Two logistic functions of
these comparisons, one for clouds and one for shadows, decide whether a value is clear. Neighbouring
pixels are not used, so windows of any size give the same result.

    blue, red, near infrared (T, N) → quantiles over T → comparisons → cloud, shadow → clear (T, N)

The mask does not detect thin cirrus, which is invisible in these bands. The measured errors are in
docs/decisions/cloud-mask.md.

Sources: O. Hagolle et al., "A multi-temporal method for cloud detection, applied to FORMOSAT-2,
VENuS, LANDSAT and SENTINEL-2 images", Remote Sensing of Environment 114 (2010), compare blue with
the pixel's own clear dates; Z. Zhu and C. E. Woodcock, "Automated cloud, cloud shadow, and snow
detection in multitemporal Landsat data", Remote Sensing of Environment 152 (2014), do so with the
near infrared of shadows.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
BANDS = ("B02", "B04", "B08")
"""The bands that the mask reads: blue, red, near infrared."""
MIN_DATES = 6
"""Smallest number of dates, of a stack and of a pixel, to estimate a pixel's usual reflectance."""
_BATCH = 2**17
"""Numbers of a band that are processed at once, so that intermediate results stay in the caches."""
# Quantiles over the dates that approximate a pixel's reflectance without clouds and shadows.
_BLUE_QUANTILE, _NIR_QUANTILE = 0.2, 0.25
_CLOUD_BLUE, _CLOUD_GAIN = np.float32(0.18), np.float32(2)
"""Least blue of a pixel that is as bright as a cloud, and least ratio to its usual blue."""
_USUAL_BLUE = np.float32(0.15)
"""Stands for the usual blue of a pixel that is seen on one date alone."""
_FLOOR = np.float32(0.01)
"""Added to two reflectances before they are divided, so that noise on dark pixels has no weight."""

# Weights of the comparisons by name; "" is the constant. A weighted sum above 0 is a cloud or a
# shadow. `python -m benchmarks.clouds` fits the weights and measures the errors.
CLOUD: Mapping[str, float] = {
    "": -3.819,
    "blue": 12.094,
    "ndvi": -2.663,
    "colour": -6.204,
    "blue_gain": 1.595,
}
SHADOW: Mapping[str, float] = {
    "": -0.108,
    "nir": -24.636,
    "ndvi": 3.134,
    "usual_blue": 4.916,
    "blue_gain": 2.236,
    "nir_gain": -3.37,
}


def clear(
    blue: Floats,
    red: Floats,
    nir: Floats,
    seen: Bools,
    cloud: Mapping[str, float] = CLOUD,
    shadow: Mapping[str, float] = SHADOW,
) -> Bools:
    """True where the ground is visible, without cloud and cloud shadow.

    Args:
        blue: reflectance (T, …) float32, unitless, 0 to 1 and above; NaN where missing.
        red: reflectance in red, of the same shape.
        nir: reflectance in near infrared, of the same shape.
        seen: True (T, …) where a value exists and no other mask has excluded it.
        cloud: weights of the comparisons; a weighted sum above 0 is a cloud.
        shadow: weights of the comparisons; a weighted sum above 0 is a cloud shadow.

    Returns:
        True (T, …) where `seen` and clear. A pixel that is `seen` on fewer than `MIN_DATES` dates
        is clear on none of them.
    """
    T = len(seen)
    found = np.zeros(seen.shape, np.bool_)
    flat = found.reshape(T, -1)
    bands = [band.reshape(T, -1) for band in (blue, red, nir)]
    usable = seen.reshape(T, -1)
    step = max(1, _BATCH // max(T, 1))
    for begin in range(0, flat.shape[1], step):
        part = slice(begin, begin + step)
        own = usable[:, part]
        compared = comparisons(bands[0][:, part], bands[1][:, part], bands[2][:, part], own)
        clouded = (_weighted(compared, cloud) > 0) | (_weighted(compared, shadow) > 0)
        flat[:, part] = own & ~clouded & (own.sum(axis=0) >= MIN_DATES)
    return found


def brightened(blue: Floats) -> Bools:
    """True where a pixel is as bright in blue as clouds or snow, and not so on its other dates.

    It needs no other band and two dates, but finds no shadow and no thin cloud: it serves to check
    a mask, not as one.

    Args:
        blue: reflectance (T, …) float32, unitless; NaN where missing.

    Returns:
        True (T, …) where blue is above 0.18 and twice that of the pixel's darker dates; of a pixel
        with a value on one date, above 0.3.
    """
    seen = ~np.isnan(blue)
    usual = np.where(seen.sum(axis=0) > 1, _quantile(blue, seen, _BLUE_QUANTILE), _USUAL_BLUE)
    return np.asarray(seen & (blue > _CLOUD_BLUE) & (blue > _CLOUD_GAIN * usual))


def comparisons(blue: Floats, red: Floats, nir: Floats, seen: Bools) -> dict[str, Floats]:
    """Comparisons of each pixel with its own series, from which the mask is computed.

    Args:
        blue: reflectance (T, N) float32, unitless.
        red: reflectance in red, of the same shape.
        nir: reflectance in near infrared, of the same shape.
        seen: True (T, N) where the values are used.

    Returns:
        Arrays (T, N) float32 by name; values where `seen` is False are meaningless.
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        ndvi = np.clip((nir - red) / np.maximum(nir + red, np.float32(1e-3)), -1, 1)
        usual_blue = _quantile(blue, seen, _BLUE_QUANTILE)
        usual_nir = _quantile(nir, seen, _NIR_QUANTILE)
        return {
            "blue": blue,
            "nir": nir,
            "ndvi": ndvi,
            "colour": np.abs(blue - red) / np.maximum(blue + red, np.float32(0.02)),
            "usual_blue": np.broadcast_to(usual_blue, blue.shape),
            "blue_gain": _gain(blue, usual_blue),
            "nir_gain": _gain(nir, usual_nir),
        }


def _weighted(compared: Mapping[str, Floats], weights: Mapping[str, float]) -> Floats:
    """The weighted sum (T, N) of comparisons."""
    total = np.full_like(compared["blue"], weights[""])
    for name, weight in weights.items():
        if name:
            total += np.float32(weight) * compared[name]
    return total


def _gain(values: Floats, usual: Floats) -> Floats:
    """Logarithm of the ratio (T, N) of values (T, N) to the usual values (N), -3 to 4."""
    usual = np.maximum(usual, 0) + _FLOOR
    return np.asarray(np.clip(np.log((np.maximum(values, 0) + _FLOOR) / usual), -3, 4))


def _quantile(values: Floats, seen: Bools, share: float) -> Floats:
    """A quantile (N) over the dates `seen`: the value at the lower rank, not interpolated."""
    ordered = np.sort(np.where(seen, values, np.float32(np.inf)), axis=0)
    rank = (share * np.maximum(seen.sum(axis=0) - 1, 0)).astype(np.intp)
    return np.asarray(np.take_along_axis(ordered, rank[None], axis=0)[0])

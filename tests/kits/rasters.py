"""Writes small GeoTIFFs for tests, with plain rasterio."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from rasterio.windows import Window

from service.read.geotiff import SourceFile

UTM = "EPSG:32631"
NORTH_UP = Affine(10, 0, 500_000, 0, -10, 5_600_000)


def write(
    path: Path,
    bands: np.ndarray,
    *,
    descriptions: Sequence[str | None] = (),
    tags: dict[str, str] | None = None,
    band_tags: dict[int, dict[str, str]] | None = None,
    scales: Sequence[float] = (),
    offsets: Sequence[float] = (),
    mask: np.ndarray | None = None,
    **profile: Any,
) -> SourceFile:
    """Write bands (n, h, w) in their own number type; the name of the file is the caller's."""
    profile = {"crs": UTM, "transform": NORTH_UP, **profile}
    count, height, width = bands.shape
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(
            path,
            "w",
            driver="GTiff",
            width=width,
            height=height,
            count=count,
            dtype=bands.dtype,
            **profile,
        ) as file,
    ):
        file.write(bands)
        for number, text in enumerate(descriptions, start=1):
            if text:
                file.set_band_description(number, text)
        file.update_tags(**(tags or {}))
        for number, own in (band_tags or {}).items():
            file.update_tags(number, **own)
        if scales:
            file.scales = scales
        if offsets:
            file.offsets = offsets
        if mask is not None:
            file.write_mask(mask)
    return SourceFile(name=path.name, path=path)


def crop(path: Path, window: Window, to: Path | None = None) -> Path:
    """A part of a GeoTIFF in place of it, or at another path; its names, tags and scales stay."""
    with rasterio.open(path) as file:
        bands = file.read(window=window)
        profile = {**file.profile, "width": window.width, "height": window.height}
        profile["transform"] = file.window_transform(window)
        numbers = file.indexes
        band_tags = {number: file.tags(number) for number in numbers}
        kept = (file.descriptions, file.scales, file.offsets, file.tags())
    # Blocks larger than the part would be refused.
    for key in ("blockxsize", "blockysize", "tiled"):
        profile.pop(key, None)
    made = to or path
    with rasterio.open(made, "w", **profile) as file:
        file.write(bands)
        file.descriptions, file.scales, file.offsets = kept[:3]
        file.update_tags(**kept[3])
        for number, own in band_tags.items():
            file.update_tags(number, **own)
    return made

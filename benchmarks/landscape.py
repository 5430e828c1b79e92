"""Synthetic stacks: fields with a season, noise and clouds, as GeoTIFFs and as forms of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.transform import from_origin
from rasterio.windows import Window

BANDS = ("B02", "B03", "B04", "B08")
PIXEL_BANDS = ("B02", "B04", "B08")
FIRST = date(2021, 1, 5)
# As long as those of httpx, requests and curl: a short one takes three times as long to find.
BOUNDARY = "6f1e2b0c9d8a47e3b5c4f7a1d2e3c4b5"
FORM = f"multipart/form-data; boundary={BOUNDARY}"
_TILE = 256
_FIELD = 16
_CLOUD = 9
"""SCL's class of clouds of high probability."""
_VEGETATION = 4


def days(dates: int) -> list[date]:
    """Dates over one year, from its fifth day."""
    return [FIRST + timedelta(days=(350 * t) // max(1, dates - 1)) for t in range(dates)]


def landscape(side: int, dates: int, seed: int = 0, *, noise: float = 0.004) -> NDArray[np.uint16]:
    """Fields with a season and noise: (T, 4, side, side), reflectance x 10,000."""
    rng = np.random.default_rng(seed)
    blocks = rng.uniform(0, 1, (side // _FIELD + 1,) * 2)
    fields = np.kron(blocks, np.ones((_FIELD, _FIELD)))[:side, :side]
    out = np.empty((dates, len(BANDS), side, side), np.uint16)
    for t in range(dates):
        green = np.clip(np.sin(np.pi * (t / dates + 0.3 * fields)), 0, 1)
        clean = np.stack(
            [0.06 - 0.02 * green, 0.09 - 0.03 * green, 0.12 - 0.08 * green, 0.18 + 0.3 * green]
        )
        out[t] = (clean + rng.normal(0, noise, clean.shape)).clip(0.001) * 10_000
    return out


def write_stack(
    folder: Path,
    side: int,
    dates: int,
    *,
    scl: bool = False,
    bands: Sequence[str] = PIXEL_BANDS,
    seed: int = 0,
    noise: float = 0.004,
    **profile: Any,
) -> list[Path]:
    """One tiled, deflated GeoTIFF per date, as products are delivered.

    The landscape is made once for one tile and repeated, so that most of the time for a large
    stack is compression.

    Args:
        folder: folder of the files.
        side: width and height in pixels.
        dates: number of files.
        scl: whether each file also has a scene classification, a quarter of it clouds.
        bands: bands to write, some of `BANDS`.
        seed: seed of the landscape.
        noise: standard deviation of the reflectance; with 0, files are small.
        profile: further creation options of the GTiff driver.
    """
    tile = min(side, _TILE)
    values = landscape(tile, dates, seed, noise=noise)
    rng = np.random.default_rng(seed + 1)
    paths = []
    names = (*bands, "SCL") if scl else tuple(bands)
    for day, reflectance in zip(days(dates), values, strict=True):
        layers = [reflectance[BANDS.index(name)] for name in bands]
        if scl:
            cloudy = np.kron(rng.random((tile // _FIELD + 1,) * 2) < 0.25, np.ones((_FIELD,) * 2))
            layers.append(np.where(cloudy[:tile, :tile] > 0, _CLOUD, _VEGETATION))
        block = np.stack(layers).astype(np.uint16)
        paths.append(folder / f"S2_{day:%Y%m%d}.tif")
        options = {
            "tiled": True, "blockxsize": _TILE, "blockysize": _TILE, "compress": "deflate",
        }  # fmt: skip
        with rasterio.open(
            paths[-1],
            "w",
            driver="GTiff",
            dtype="uint16",
            count=len(names),
            width=side,
            height=side,
            nodata=0,
            crs="EPSG:32631",
            transform=from_origin(500_000, 5_600_000, 10, 10),
            **{**options, **profile},
        ) as file:
            for row in range(0, side, tile):
                for col in range(0, side, tile):
                    h, w = min(tile, side - row), min(tile, side - col)
                    file.write(block[:, :h, :w], window=Window(col, row, w, h))
            file.descriptions = names
    return paths


def form(files: Mapping[str, bytes], fields: Mapping[str, str] | None = None) -> bytes:
    """A body of type `FORM`: files of a stack by name, and parameters."""
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n'.encode()
        for name, text in (fields or {}).items()
    ]
    for name, content in files.items():
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="{name}"'
        parts.append(f"{head}\r\n\r\n".encode() + content + b"\r\n")
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()

"""EuroSAT: 64 x 64 patches of Sentinel-2 in ten land-cover classes (Helber et al. 2019).

The RGB version as JPEGs in zips with a spatial split, and the multispectral GeoTIFFs.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

import numpy as np
import rasterio
from numpy.typing import NDArray
from PIL import Image

from training.datasets import PatchSet
from training.errors import TrainingError

CLASSES = (
    "AnnualCrop",
    "Forest",
    "HerbaceousVegetation",
    "Highway",
    "Industrial",
    "Pasture",
    "PermanentCrop",
    "Residential",
    "River",
    "SeaLake",
)
RGB = ("B04", "B03", "B02")
# The JPEGs hold reflectance x 10,000 clipped at 2750, as 0 to 255.
JPEG_SCALE = 0.275 / 255.0
# The GeoTIFFs hold reflectance x 10,000, level 1C, in this order.
MS_BANDS = (
    *("B01", "B02", "B03", "B04", "B05", "B06", "B07"),
    *("B08", "B09", "B10", "B11", "B12", "B8A"),
)
MS_SCALE = 1e-4


class EuroSATError(TrainingError):
    """A EuroSAT folder lacks patches that its lists name, or holds files of another shape."""


def eurosat_rgb(folder: Path) -> PatchSet:
    """The RGB patches that `train.txt` and `val.txt` list: the spatial split.

    A JPEG does not state its location, so each patch is a place of its own.

    Args:
        folder: holds the lists and zips with `<Class>/<Class>_<n>.jpg`.

    Raises:
        EuroSATError: a listed patch is in none of the zips.
    """
    lists = [_lines(folder / name) for name in ("train.txt", "val.txt")]
    names = [name for part in lists for name in part]
    images = _images(folder.glob("*.zip"), names)
    missing = [name for name in names if name not in images]
    if missing:
        raise EuroSATError(
            f"the zips of {folder} lack {len(missing)} patches of train.txt and val.txt, such as "
            f"{missing[0]}: download the missing zips"
        )
    return PatchSet(
        source="eurosat",
        bands=RGB,
        values=np.stack([images[name] for name in names]),
        scale=JPEG_SCALE,
        places=np.arange(len(names)),
        validation=np.arange(len(names)) >= len(lists[0]),
        labels=_labels(names),
        legend=dict(enumerate(CLASSES)),
    )


def eurosat_ms(folder: Path, listed: Path, *, bands: tuple[str, ...] = RGB) -> PatchSet:
    """The multispectral GeoTIFFs of a folder, as reflectance.

    Args:
        folder: holds `<Class>_<n>.tif` of 13 bands.
        listed: folder of `train.txt` and `val.txt`; patches in neither are left out.
        bands: the bands to read.

    Raises:
        EuroSATError: a file does not have 13 bands.
    """
    split = {Path(name).stem: False for name in _lines(listed / "train.txt")}
    split |= {Path(name).stem: True for name in _lines(listed / "val.txt")}
    paths = [path for path in sorted(folder.glob("*.tif")) if path.stem in split]
    values = np.stack([_geotiff(path, bands) for path in paths])
    return PatchSet(
        source="eurosat",
        bands=bands,
        values=values,
        scale=1.0,
        places=np.arange(len(paths)),
        validation=np.array([split[path.stem] for path in paths]),
        labels=_labels(path.name for path in paths),
        legend=dict(enumerate(CLASSES)),
    )


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line]


def _labels(names: Iterable[str]) -> NDArray[np.int64]:
    return np.array([CLASSES.index(name.rpartition("_")[0]) for name in names], dtype=np.int64)


def _images(zips: Iterable[Path], names: Iterable[str]) -> Mapping[str, NDArray[np.uint8]]:
    """The named patches (C, P, P), by name."""
    requested = set(names)
    images: dict[str, NDArray[np.uint8]] = {}
    for path in sorted(zips):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.namelist():
                name = PurePosixPath(entry).name
                if name in requested:
                    with Image.open(io.BytesIO(archive.read(entry))) as image:
                        images[name] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    return images


def _geotiff(path: Path, bands: tuple[str, ...]) -> NDArray[np.float32]:
    """Reflectance (C, P, P) of one file."""
    with rasterio.open(path) as file:
        if file.count != len(MS_BANDS):
            raise EuroSATError(
                f"{path} has {file.count} bands, and the multispectral EuroSAT has "
                f"{len(MS_BANDS)}: give files of that version"
            )
        stored = file.read([MS_BANDS.index(b) + 1 for b in bands])
    return np.asarray(stored * np.float32(MS_SCALE), dtype=np.float32)

"""GeoTIFF stacks: a folder with one file per date becomes a `Scene`.

This reader takes folders of this layout and the Romania cube. The service's reader
(`service/read/`) takes more layouts and reads windows; this one reads a whole area into memory,
with the values as stored.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray

from training.datasets import Scene
from training.errors import TrainingError

# Scene classification of Sentinel-2 level 2A: vegetation, bare soil, water, unclassified.
CLEAR_SCL = (4, 5, 6, 7)
_DATE = re.compile(r"(?<!\d)((?:19|20)\d{2})[-_]?(0[1-9]|1[0-2])[-_]?(0[1-9]|[12]\d|3[01])(?!\d)")
# The netCDF names of the Romania cube.
_NETCDF_BANDS = {"B02": "B2", "B03": "B3", "B04": "B4", "B08": "B8"}
_DAYS_SINCE = re.compile(r"days since (\d{4}-\d{2}-\d{2})")


class StackError(TrainingError):
    """A folder or file is not a stack; the message names it and the reason."""


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One file: the observation of one date."""

    day: date
    bands: tuple[str, ...]
    values: NDArray[np.generic]
    """(C, H, W), as stored."""
    missing: NDArray[np.bool_]
    """(H, W): nodata, or zero in every band."""
    scale: float


def read_stack(
    folder: Path,
    *,
    source: str | None = None,
    offset: float = 0.0,
    labels: Path | None = None,
    validation: bool = False,
) -> Scene:
    """Read a folder with one GeoTIFF per date.

    The date is the `datetime` tag, else a date in the file name; files with neither (labels) are
    ignored. Files of one date are merged: the first clear value of a pixel counts. A band described
    as SCL determines which pixels are usable.

    Args:
        folder: holds the files.
        source: name of the data set; None uses the folder's name.
        offset: added after scaling, -0.1 for level 2A of baseline 04.00 and later that still
            holds the offset.
        labels: raster of codes on the same grid.
        validation: whether the area is a validation place.

    Raises:
        StackError: no file has a date, or files differ in size or bands.
    """
    layers = [layer for path in sorted(folder.glob("*.tif")) if (layer := _layer(path))]
    if not layers:
        raise StackError(
            f"{folder} has no GeoTIFF with a date in its tags or its name: give a folder of files "
            "such as S2_2018-01-05.tif"
        )
    first = layers[0]
    for layer in layers:
        if layer.bands != first.bands or layer.values.shape != first.values.shape:
            raise StackError(
                f"{folder}: {layer.day} has {layer.values.shape[1:]} pixels of {layer.bands}, but "
                f"{first.day} has {first.values.shape[1:]} of {first.bands}: give a folder whose "
                "files have the same bands and size"
            )
    days = sorted({layer.day for layer in layers})
    merged = [_merge([layer for layer in layers if layer.day == day]) for day in days]
    bands = tuple(b for b in first.bands if b != "SCL")
    chosen = [first.bands.index(b) for b in bands]
    return Scene(
        source=source or folder.name,
        bands=bands,
        dates=tuple(days),
        values=np.stack([values[chosen] for values, _ in merged]),
        scale=first.scale,
        offset=offset,
        valid=np.stack([valid for _, valid in merged]),
        labels=None if labels is None else _read_labels(labels),
        validation=validation,
    )


def read_romania(path: Path, *, validation: bool = False) -> Scene:
    """Read the Romania cube: `sentinel2_cube_subset_romania_10m.nc` of the wheel `nrt==0.2.1`.

    The file has no geotransform that GDAL understands, so GDAL would assume bottom-up and flip it.
    In file order its first row is the northernmost, as in the tree cover raster of the same wheel.

    Raises:
        StackError: the file is not that cube.
    """
    try:
        # The missing geotransform is handled here, so the warning would mislead the caller.
        with rasterio.Env(GDAL_NETCDF_BOTTOMUP="NO"), warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            layers = {name: _read_variable(path, name) for name in (*_NETCDF_BANDS.values(), "SCL")}
            days = _netcdf_dates(path)
    except rasterio.errors.RasterioIOError as error:
        raise StackError(
            f"{path} is not the Romania cube ({error}): give sentinel2_cube_subset_romania_10m.nc "
            "of the wheel nrt 0.2.1"
        ) from error
    return Scene(
        source="romania",
        bands=tuple(_NETCDF_BANDS),
        dates=days,
        values=np.stack([layers[name] for name in _NETCDF_BANDS.values()], axis=1),
        scale=1e-4,
        valid=np.isin(layers["SCL"], CLEAR_SCL),
        validation=validation,
    )


def read_safe_folders(folder: Path) -> Scene:
    """Read B02, B03, B04 and B08 at 10 m of all Sentinel-2 L2A SAFE folders of one area.

    The scene classification at 20 m determines which pixels are usable.

    Args:
        folder: holds the SAFE folders, at any depth.

    Raises:
        StackError: there is no SAFE folder, or a band is missing.
    """
    products = {}
    for path in sorted(folder.rglob("*_SCL_20m.jp2")):
        found = _DATE.search(path.name)
        if found is not None:
            products[date(*(int(part) for part in found.groups()))] = path
    if not products:
        raise StackError(
            f"{folder} has no SAFE folder with a scene classification (*_SCL_20m.jp2): give a "
            "folder of level 2A products"
        )
    bands = tuple(_NETCDF_BANDS)
    values, valid = [], []
    for day in sorted(products):
        stored = np.stack([_safe_band(products[day], band) for band in bands])
        with rasterio.open(products[day]) as file:
            scl = file.read(1).repeat(2, axis=0).repeat(2, axis=1)
        height, width = stored.shape[1:]
        # An odd number of pixels at 10 m leaves half a pixel at 20 m, which the file may lack.
        grown = np.pad(scl, ((0, 1), (0, 1)), mode="edge")[:height, :width]
        values.append(stored)
        valid.append(np.isin(grown, CLEAR_SCL) & (stored != 0).all(axis=0))
    return Scene(
        source=folder.name,
        bands=bands,
        dates=tuple(sorted(products)),
        values=np.stack(values),
        scale=1e-4,
        valid=np.stack(valid),
    )


def _safe_band(scl: Path, band: str) -> NDArray[np.generic]:
    paths = list((scl.parents[1] / "R10m").glob(f"*_{band}_10m.jp2"))
    if len(paths) != 1:
        raise StackError(
            f"{scl.parents[3].name} has {len(paths)} files of {band} at 10 m, not 1: unpack the "
            "product again"
        )
    with rasterio.open(paths[0]) as file:
        values: NDArray[np.generic] = file.read(1)
    return values


def split_north(scene: Scene, share: float) -> tuple[Scene, ...]:
    """Hold out the northern rows of an area as a validation place of its own.

    The two parts share no pixel, and a patch that reaches over the edge of its part is mirrored
    there, so that no imagery of one part is used in the other.

    Args:
        scene: the area.
        share: share of the rows that is held out, 0 to 1; 0 uses all rows for training.
    """
    rows = round(scene.shape[0] * share)
    if rows == 0:
        return (scene,)
    every = slice(None)
    return (
        scene.crop(slice(rows, None), every),
        scene.crop(slice(0, rows), every, validation=True),
    )


def _layer(path: Path) -> _Layer | None:
    with rasterio.open(path) as file:
        stamp = file.tags().get("datetime") or path.stem
        found = _DATE.search(stamp)
        if found is None:
            return None
        values = file.read()
        scales = set(file.scales)
        scale = float(file.tags().get("scale", scales.pop() if len(scales) == 1 else 1.0))
        if scale == 1.0 and np.issubdtype(values.dtype, np.integer):
            scale = 1e-4
        names = tuple(name or f"band {i}" for i, name in enumerate(file.descriptions, start=1))
        bands = tuple(_band_name(name) for name in names)
        spectral = values[[i for i, b in enumerate(bands) if b != "SCL"]]
        missing = (np.nan_to_num(spectral) == 0).all(axis=0)
        if file.nodata is not None:
            missing |= (spectral == file.nodata).any(axis=0)
    year, month, day = (int(part) for part in found.groups())
    return _Layer(
        day=date(year, month, day), bands=bands, values=values, missing=missing, scale=scale
    )


def _band_name(described: str) -> str:
    """`B2` and `b02` become `B02`; other names stay, in upper case."""
    plain = re.fullmatch(r"[Bb](\d)", described)
    return f"B0{plain[1]}" if plain else described.upper()


def _merge(layers: Sequence[_Layer]) -> tuple[NDArray[np.generic], NDArray[np.bool_]]:
    values = layers[0].values.copy()
    valid = _usable(layers[0])
    for layer in layers[1:]:
        better = _usable(layer) & ~valid
        values[:, better] = layer.values[:, better]
        valid |= better
    return values, valid


def _usable(layer: _Layer) -> NDArray[np.bool_]:
    if "SCL" not in layer.bands:
        return ~layer.missing
    return ~layer.missing & np.isin(layer.values[layer.bands.index("SCL")], CLEAR_SCL)


def _read_labels(path: Path) -> NDArray[np.int64]:
    with rasterio.open(path) as file:
        codes: NDArray[np.int64] = file.read(1).astype(np.int64)
        if file.nodata is not None:
            codes[codes == int(file.nodata)] = -1
        return codes


def _read_variable(path: Path, name: str) -> NDArray[np.generic]:
    with rasterio.open(f"netcdf:{path}:{name}") as file:
        values: NDArray[np.generic] = file.read()
        return values


def _netcdf_dates(path: Path) -> tuple[date, ...]:
    with rasterio.open(f"netcdf:{path}:B2") as file:
        tags = file.tags()
    since = _DAYS_SINCE.match(tags.get("time#units", ""))
    if since is None:
        raise StackError(
            f"{path} does not count its time in days since a date: give "
            "sentinel2_cube_subset_romania_10m.nc of the wheel nrt 0.2.1"
        )
    start = date.fromisoformat(since[1])
    offsets = tags["NETCDF_DIM_time_VALUES"].strip("{}").split(",")
    return tuple(start + timedelta(days=int(days)) for days in offsets)

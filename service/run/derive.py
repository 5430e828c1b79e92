"""Derived maps: a finished result cleaned, without reading the stack or running the model again.

class.tif [+ probabilities.tif] → smoothed → sieved → another class map or its polygons
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from service.errors import InvalidRequest
from service.grid import Window
from service.infer.smooth import smoothed
from service.run.clean import read_around
from service.run.windows import WINDOW_BYTES, windows
from service.write.cog import RasterWriter, StoredRaster, open_stored
from service.write.polygons import write_polygons
from service.write.predictions import NO_CLASS, POLYGONS, Layer, decided
from service.write.sieve import sieved

_COPIES = 4
_BLOCK = (256, 256)


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """How a finished map is cleaned."""

    smooth: int = 0
    """Radius in pixels; 0 smooths nothing."""
    min_area: float = 0.0
    """Hectares; 0 joins nothing."""

    @property
    def name(self) -> str:
        """Part of a file name that tells this cleaning from others."""
        return f"s{self.smooth}-a{self.min_area!r}"


def check_derivable(
    files: Mapping[str, Path], how: Cleaning, *, smoothed_by: int, most_pixels: int
) -> None:
    """Check that a result holds what a derived map is made of.

    Args:
        files: of the result, by output name.
        how: the requested cleaning.
        smoothed_by: radius by which the result was smoothed when it was made.
        most_pixels: pixels that a derived map may have.

    Raises:
        InvalidRequest: it does not, or the map is too large to be made while the client waits.
    """
    if "class" not in files:
        raise InvalidRequest.of("min_area", "the job has no class map: run it with outputs=class")
    if how.smooth and smoothed_by:
        raise InvalidRequest.of("smooth", f"the job's map is smoothed already, by {smoothed_by}")
    if how.smooth and "probabilities" not in files:
        raise InvalidRequest.of(
            "smooth",
            "the job kept no probabilities: run it with outputs=class,probabilities, or smooth",
        )
    with open_stored(files["class"]) as raster:
        pixels = raster.grid.width * raster.grid.height
    if pixels > most_pixels:
        raise InvalidRequest.of(
            "min_area",
            f"a map of {pixels} pixels is not cleaned while a client waits, which is done up to "
            f"{most_pixels} (PIMC_SYNC_MAX_PIXELS): run the job with smooth and min_area",
        )


def derive_map(files: Mapping[str, Path], how: Cleaning, output: str, path: Path) -> None:
    """Write the cleaned class map of a result, or its polygons.

    Args:
        files: of the result, as `check_derivable` accepts them.
        how: the requested cleaning.
        output: `class` or `polygons`.
        path: of the file to write.

    Raises:
        InvalidRequest: more areas than can be joined or written.
        InsufficientStorage: the disk is full.
    """
    with open_stored(files["class"]) as raster:
        grid, legend, tags = raster.grid, raster.legend, raster.tags
        whole = Window(0, 0, grid.width, grid.height)
        classes = raster.pixels.read(whole)[0].astype(np.uint8)
    if how.smooth:
        with open_stored(files["probabilities"]) as probabilities:
            classes = _smoothed_classes(probabilities, how.smooth)
    if how.min_area:
        classes = sieved(classes, grid.hectares(whole), how.min_area)
    layer = Layer(name="class", bands=("class",), legend=legend)
    with TemporaryDirectory(dir=path.parent) as name:
        folder = Path(name)
        with RasterWriter(folder, grid, (layer,), tags) as writer:
            writer.write(whole, {"class": classes[None]})
            finished = writer.finish()["class"]
        if output == POLYGONS:
            write_polygons(finished, grid, legend, path)
        else:
            finished.replace(path)


def _smoothed_classes(probabilities: StoredRaster, radius: int) -> np.ndarray:
    grid = probabilities.grid
    classes = np.full((grid.height, grid.width), NO_CLASS, np.uint8)
    count = len(probabilities.pixels.read(Window(0, 0, 1, 1)))
    for window in windows(grid, _BLOCK, _COPIES * 4 * count, WINDOW_BYTES):
        _, around = read_around(probabilities.pixels, grid, window, radius)
        found = decided(smoothed(around, radius).reshape(count, -1).T)[0]
        classes[window.toslices()] = found.reshape(window.height, window.width)
    return classes

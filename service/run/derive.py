"""Derived maps: a finished class map smoothed, sieved and outlined without running the model again.

class.tif [+ probabilities.tif] → smoothed → sieved → another class map or its polygons
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from models.card import LegendClass
from service.errors import InvalidRequest
from service.grid import Window
from service.infer.smooth import Floats, smoothed
from service.run.clean import read_around
from service.run.executors import check
from service.run.memory import Need
from service.run.windows import WINDOW_BYTES, windows
from service.write.cog import RasterWriter, StoredRaster, finishing_bytes, open_stored
from service.write.polygons import polygon_bytes, write_polygons
from service.write.predictions import (
    NO_CLASS,
    POLYGONS,
    Layer,
    classes_with_confidence,
    probabilities_of_bytes,
)
from service.write.sieve import sieve_bytes, sieved

_COPIES = 4
_PIXEL_BYTES = 12
"""Memory per pixel: the class map as read, cleaned and as written, and its hectares in float64."""
_BLOCK = (256, 256)


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """Parameters with which a finished map is cleaned; the defaults leave it as it is."""

    smooth: int = 0
    """Radius of the smoothing in pixels; 0 does not smooth."""
    min_area: float = 0.0
    """Hectares below which an area joins a neighbour; 0 joins none."""

    @property
    def name(self) -> str:
        """Part of a file name, different for each combination of parameters."""
        return f"s{self.smooth}-a{self.min_area!r}"


def check_derivable(
    files: Mapping[str, Path], cleaning: Cleaning, *, smoothed_by: int, most_pixels: int
) -> None:
    """Check that a map can be derived from a finished result.

    Args:
        files: files of the result, by output name.
        cleaning: the requested cleaning.
        smoothed_by: radius in pixels by which the run smoothed the result; 0 if it did not.
        most_pixels: largest number of pixels of a derived map.

    Raises:
        InvalidRequest: the result does not contain the class map or the probabilities, was smoothed
            by the run, or is too large to be cleaned while the client waits.
    """
    if "class" not in files:
        raise InvalidRequest.of("min_area", "the job has no class map: run it with outputs=class")
    if cleaning.smooth and smoothed_by:
        raise InvalidRequest.of(
            "smooth",
            f"the job's map is smoothed already, with smooth={smoothed_by}: leave out `smooth`, or "
            "run the job without it",
        )
    if cleaning.smooth and "probabilities" not in files:
        raise InvalidRequest.of(
            "smooth",
            "the job has no probabilities, from which a map is smoothed: run it with "
            "outputs=class,probabilities, or with `smooth`",
        )
    with open_stored(files["class"]) as raster:
        pixels = raster.grid.width * raster.grid.height
    if pixels > most_pixels:
        raise InvalidRequest.of(
            "min_area",
            f"the map has {pixels} pixels, and maps of at most {most_pixels} are cleaned while the "
            "client waits (PIMC_SYNC_MAX_PIXELS): run the job with `smooth` and `min_area` instead",
        )


def derivation_need(files: Mapping[str, Path], cleaning: Cleaning, output: str) -> Need:
    """The memory of `derive_map`.

    Args:
        files: files of the result by output name, checked with `check_derivable`.
        cleaning: the requested cleaning.
        output: `class` or `polygons`.
    """
    with open_stored(files["class"]) as raster:
        grid, legend = raster.grid, raster.legend
    pixels = grid.width * grid.height
    steps = [finishing_bytes(_layer(legend), grid)]
    if cleaning.smooth:
        steps.append(WINDOW_BYTES)
    if cleaning.min_area:
        steps.append(sieve_bytes(pixels))
    if output == POLYGONS:
        steps.append(polygon_bytes(pixels))
    return Need(
        arrays=_PIXEL_BYTES * pixels + max(steps),
        what=f"the class map of {pixels} pixels and its areas",
        remedy="Run the job for a part of the raster (`bbox`)",
    )


def _layer(legend: tuple[LegendClass, ...]) -> Layer:
    return Layer(name="class", bands=("class",), legend=legend)


def derive_map(
    files: Mapping[str, Path],
    cleaning: Cleaning,
    output: str,
    path: Path,
    *,
    cancelled: threading.Event | None = None,
) -> None:
    """Write the cleaned class map of a result, or its polygons.

    Args:
        files: files of the result by output name, checked with `check_derivable`.
        cleaning: the requested cleaning.
        output: `class` or `polygons`.
        path: the file to write.
        cancelled: an event that ends the work when it is set.

    Raises:
        Cancelled: `cancelled` was set.
        InvalidRequest: the map has more areas than can be joined or written.
        InsufficientStorage: the disk is full.
    """
    with open_stored(files["class"]) as raster:
        grid, legend, tags = raster.grid, raster.legend, raster.tags
        everything = Window(0, 0, grid.width, grid.height)
        classes = raster.pixels.read(everything)[0].astype(np.uint8)
    if cleaning.smooth:
        with open_stored(files["probabilities"]) as probabilities:
            classes = _smoothed_classes(probabilities, cleaning.smooth, cancelled)
    if cleaning.min_area:
        classes = sieved(
            classes,
            grid.hectares(everything),
            cleaning.min_area,
            check=lambda: check(cancelled),
        )
    with TemporaryDirectory(dir=path.parent) as name:
        folder = Path(name)
        with RasterWriter(folder, grid, (_layer(legend),), tags) as writer:
            writer.write(everything, {"class": classes[None]})
            finished = writer.finish()["class"]
        if output == POLYGONS:
            write_polygons(finished, grid, legend, path, lambda: check(cancelled))
        else:
            finished.replace(path)


def stored_probabilities(raster: StoredRaster, window: Window) -> Floats:
    """Probabilities (K, h, w) float32 of a window of a result; of bytes, with sum 1 over K."""
    values = raster.pixels.read(window)
    return probabilities_of_bytes(values) if values.dtype == np.uint8 else values


def _smoothed_classes(
    probabilities: StoredRaster, radius: int, cancelled: threading.Event | None
) -> np.ndarray:
    grid = probabilities.grid
    classes = np.full((grid.height, grid.width), NO_CLASS, np.uint8)
    count = len(probabilities.pixels.read(Window(0, 0, 1, 1)))
    for window in windows(grid, _BLOCK, _COPIES * 4 * count, WINDOW_BYTES):
        check(cancelled)
        read = partial(stored_probabilities, probabilities)
        _, around = read_around(read, grid, window, radius)
        found = classes_with_confidence(smoothed(around, radius).reshape(count, -1).T)[0]
        classes[window.toslices()] = found.reshape(window.height, window.width)
    return classes

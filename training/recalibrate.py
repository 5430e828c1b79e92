"""Recalibration: a new temperature for a finished bundle, without training again.

bundle + calibration across regions -> the same weights under another temperature -> bundle
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from models.card import ModelCard
from models.registry import load_bundle, sha256_of
from training.card import write_card
from training.errors import TrainingError
from training.export import VersionNotRaised, replaced_bundle
from training.regions import read_report

_TEMPERATURE = "head.temperature"


class NotCalibrated(TrainingError):
    """The bundle has no temperature to replace, or the regions give none."""


def recalibrate(folder: Path, *, regions: Path, version: str) -> Path:
    """Write the temperature fitted across regions into every file of a classifier's bundle.

    A temperature does not reorder probabilities, so the predicted classes stay the same, and so
    does the measured loss of each variant.

    Args:
        folder: the bundle's folder; replaced completely or not at all.
        regions: folder written by `python -m training regions`, for networks of the bundle's
            shape.
        version: version of the new bundle.

    Raises:
        NotCalibrated: the bundle or the regions have no temperature.
        VersionNotRaised: the bundle already has this version.
        NoRegions: the folder `regions` holds no report.
    """
    card, report = load_bundle(folder).card, read_report(regions)
    if "temperature" not in report.calibration:
        raise NotCalibrated(
            f"{regions} holds no temperature: give the folder of a classifier's regions"
        )
    if card.version == version:
        raise VersionNotRaised(f"the bundle already is {card.id}: give another --version")
    with replaced_bundle(folder) as new:
        variants = []
        for variant in card.variants:
            path = new / variant.file
            _set_temperature(folder / variant.file, path, report.calibration["temperature"])
            changes = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
            variants.append(variant.model_copy(update=changes))
        fields = {
            **card.model_dump(),
            "version": version,
            "regions": report.regions,
            "training": {**card.training, "calibration": report.calibration},
            "variants": [variant.model_dump() for variant in variants],
            "sha256": variants[0].sha256,
        }
        write_card(new, ModelCard.model_validate(fields))
    return folder


def _set_temperature(source: Path, target: Path, temperature: float) -> None:
    model = onnx.load(source)
    found = [tensor for tensor in model.graph.initializer if tensor.name == _TEMPERATURE]
    if not found:
        raise NotCalibrated(
            f"{source.name} has no {_TEMPERATURE}: only a classifier can be recalibrated"
        )
    value = np.array(temperature, dtype=numpy_helper.to_array(found[0]).dtype)
    found[0].CopyFrom(numpy_helper.from_array(value, _TEMPERATURE))
    onnx.save(model, target)

"""A new calibration for a finished bundle, without training it again.

bundle + calibration across regions -> the same weights under another temperature -> bundle
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from models.card import ModelCard
from models.registry import load_bundle, sha256_of
from training.card import write_card
from training.errors import TrainingError
from training.export import VersionNotRaised
from training.regions import read_report

_TEMPERATURE = "head.temperature"


class NotCalibrated(TrainingError):
    """A bundle without a temperature, or regions without one."""


def recalibrate(folder: Path, *, regions: Path, version: str) -> Path:
    """Give every file of a classifier's bundle the temperature fitted across regions.

    The classes predicted stay the same, because a temperature orders no probabilities anew; what
    each variant loses stays with them.

    Args:
        folder: the bundle's; replaced completely or not at all.
        regions: folder of `python -m training regions`, of networks of the bundle's shape.
        version: of the new bundle.

    Raises:
        NotCalibrated: the bundle or the regions have no temperature.
        VersionNotRaised: the bundle is of this version already.
        NoRegions: the folder of regions holds none.
    """
    card, report = load_bundle(folder).card, read_report(regions)
    if "temperature" not in report.calibration:
        raise NotCalibrated(f"{regions} holds no temperature: give the regions of a classifier")
    if card.version == version:
        raise VersionNotRaised(f"{card.id} exists: give another --version")
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        variants = []
        for variant in card.variants:
            path = new / variant.file
            _set_temperature(folder / variant.file, path, report.calibration["temperature"])
            changes = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
            variants.append(variant.model_copy(update=changes))
        told = {
            **card.model_dump(),
            "version": version,
            "regions": report.regions,
            "training": {**card.training, "calibration": report.calibration},
            "variants": [variant.model_dump() for variant in variants],
            "sha256": variants[0].sha256,
        }
        write_card(new, ModelCard.model_validate(told))
        load_bundle(new)
        new.chmod(0o755)
        shutil.rmtree(folder)
        new.replace(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return folder


def _set_temperature(source: Path, target: Path, temperature: float) -> None:
    model = onnx.load(source)
    found = [tensor for tensor in model.graph.initializer if tensor.name == _TEMPERATURE]
    if not found:
        raise NotCalibrated(f"{source.name} has no {_TEMPERATURE}: only classifiers have one")
    value = np.array(temperature, dtype=numpy_helper.to_array(found[0]).dtype)
    found[0].CopyFrom(numpy_helper.from_array(value, _TEMPERATURE))
    onnx.save(model, target)

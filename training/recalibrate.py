"""Recalibration of a finished bundle, without training again.

bundle + calibration across regions -> the same weights under another calibration -> bundle
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from models.card import ModelCard
from models.registry import load_bundle, sha256_of
from training.bundle_weights import load_folded
from training.card import write_card
from training.config import Run
from training.errors import TrainingError
from training.export import (
    check_new_version,
    measured_loss,
    replace_card,
    replaced_bundle,
    write_bundle,
)
from training.finetune import task_of
from training.regions import CALIBRATED, Report, apply_calibration, read_report

_TEMPERATURE = "head.temperature"


class NotCalibrated(TrainingError):
    """The bundle has no temperature to replace, or the regions give none."""


def recalibrate(folder: Path, *, regions: Path, version: str, data: Path | None = None) -> Path:
    """Write the calibration fitted across regions into every file of a bundle.

    A temperature does not reorder probabilities, so the predicted classes stay the same. Medians of
    forecasts change where a pixel is unlike the training data. A classifier's files are changed in
    place; a forecaster is exported again, with the calibration in its graph. Of regions
    without a calibration (embeddings, and classes that few regions share) the card takes the
    scores, and the files stay as they are.

    Args:
        folder: the bundle's folder; replaced completely or not at all.
        regions: folder written by `python -m training regions`, for networks of the bundle's
            shape.
        version: version of the new bundle.
        data: folder of the data sets, on which a forecaster's files are compared.

    Raises:
        NotCalibrated: the bundle or the regions have no calibration of the other's kind.
        NotUnfolded: a forecaster's float32 file does not hold a graph of its configuration.
        VersionNotRaised: the bundle already has this version.
        NoRegions: the folder `regions` holds no report.
    """
    card, report = load_bundle(folder).card, read_report(regions)
    check_new_version(card, version)
    if not report.calibration:
        scored = card.model_copy(update={"regions": report.regions, "version": version})
        replace_card(folder, scored)
        return folder
    if card.task == "forecast":
        return _with_calibration(folder, card, report, version=version, data=data or Path())
    if "temperature" not in report.calibration:
        raise NotCalibrated(
            f"{regions} has no temperature of a classifier's regions: give the folder that "
            "'python -m training regions' wrote for a classifier"
        )
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


def _with_calibration(
    folder: Path, card: ModelCard, report: Report, *, version: str, data: Path
) -> Path:
    if "band" not in report.calibration:
        raise NotCalibrated(
            "the regions have no calibration of forecasts: run `python -m training regions` with "
            "--bundle, and give the folder of that run"
        )
    run = run_of_card(card, data)
    task = task_of(run)
    graph = load_folded(task.graph(), load_bundle(folder).path("float32"))
    apply_calibration(graph, report)
    full = task.outputs(graph)
    fields = {
        **card.model_dump(),
        "regions": report.regions,
        "metrics": {**card.metrics, "band": CALIBRATED},
        "training": {**card.training, "calibration": report.calibration},
    }
    return write_bundle(
        graph,
        folder,
        fields=fields,
        real=task.real_inputs(),
        typical=task.typical_inputs(),
        version=version,
        loss=lambda file: measured_loss(full, task, file),
    )


def run_of_card(card: ModelCard, data: Path) -> Run:
    """A run of a bundle's configuration, as its card states it."""
    return Run.model_validate({"config": card.training["config"], "data": data})


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

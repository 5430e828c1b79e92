"""Export: finished runs to bundles, as ONNX checked against torch, and a card.

run -> graph -> ONNX -> parity on random and on real input -> variants, each with its loss of
    accuracy -> card -> bundle, written completely or not at all
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.card import (
    CARD_FILE,
    OUTPUTS,
    REFLECTANCE,
    ModelCard,
    Precision,
    Variant,
    input_names,
)
from models.registry import load_bundle, sha256_of
from training import validation_outputs
from training.card import (
    EVALUATION,
    ROBUSTNESS,
    card_fields,
    described,
    megaflop,
    parameters,
    same_configuration,
    write_card,
)
from training.config import Run
from training.errors import TrainingError
from training.finetune import WEIGHTS, load_finished
from training.graph_export import folded, in_half, quantise
from training.licences import sensed
from training.onnx_export import OPSET, to_onnx
from training.parity import HALF_TOLERANCE, Served, check_parity, check_parity_int8, random_inputs
from training.regions import CALIBRATED, apply_calibration, read_report
from training.task import Graph, Inputs, Outputs, Task
from training.validation_outputs import scores_of

MODEL_FILE = "model.onnx"
HALF_FILE = "model.float16.onnx"
INT8_FILE = "model.int8.onnx"


class VersionNotRaised(TrainingError):
    """Another model would take the name and version of an existing bundle."""


def export_run(
    folder: Path,
    zoo: Path,
    *,
    name: str | None = None,
    version: str | None = None,
    regions: Path | None = None,
) -> Path:
    """Turn a finished run into a bundle.

    Args:
        folder: the run's folder.
        zoo: folder of bundles; the bundle of the same name is replaced.
        name: name of the bundle; None uses the configuration's name.
        version: version of the bundle; None keeps the version of the bundle replaced, or starts at
            1.0.0.
        regions: folder written by `python -m training regions`; its calibration goes into the
            graph, its scores into the card. None leaves both out.

    Returns:
        The bundle's folder.

    Raises:
        NoRegions: the folder `regions` holds no report.
        NoGraph: the run is of a probe that has no graph.
        ParityError: ONNX Runtime and torch differ.
        VersionNotRaised: the bundle to replace has this version, but is another model.
    """
    run, task, graph, metrics = load_finished(folder)
    name = name or run.config.name
    real = task.real_inputs()
    fields = card_fields(run, task, metrics, name)
    fields["metrics"] |= _evaluations(folder, zoo / name, run)
    if regions is not None:
        report = read_report(regions)
        apply_calibration(graph, report)
        fields["regions"] = report.regions
        calibration = dict(report.calibration)
        if "band" in calibration:
            fields["metrics"]["band"] = calibration.pop("note", CALIBRATED)
        fields["training"]["calibration"] = calibration
    one = [
        torch.from_numpy(real[name] if name == "days" else real[name][:1])
        for name in _inputs(fields)
    ]
    size = {"parameters": parameters(graph), "megaflop": round(megaflop(graph, one), 2)}
    stored = (folder / validation_outputs.FILE).exists()
    full = validation_outputs.load(folder) if stored else task.outputs(graph)
    return write_bundle(
        graph,
        zoo / name,
        fields={**fields, "training": {**fields["training"], **size}},
        real=real,
        typical=task.typical_inputs(),
        version=version,
        loss=lambda file: measured_loss(full, task, file),
    )


def write_bundle(
    graph: Graph,
    folder: Path,
    *,
    fields: Mapping[str, Any],
    real: Inputs,
    typical: Sequence[Inputs] = (),
    version: str | None = None,
    loss: Callable[[Path], Mapping[str, float]] | None = None,
) -> Path:
    """Export a graph and write the bundle, completely or not at all.

    Args:
        graph: in evaluation mode, on the CPU.
        folder: the bundle's folder; replaced if it exists.
        fields: the card's fields, except `version`, `variants` and `sha256`.
        real: input on which parity is checked, in addition to random input.
        typical: training input to calibrate the scales of an int8 variant; if empty, no int8
            variant is written.
        version: version of the bundle; None keeps the version of the bundle replaced, or starts at
            1.0.0.
        loss: measures how the scores change with a reduced graph's file; None writes float32 only,
            because a card states the loss of each variant.

    Raises:
        ParityError: ONNX Runtime and torch differ.
        VersionNotRaised: the bundle to replace has this version, but is another model.
    """
    with replaced_bundle(folder) as new:
        path = new / MODEL_FILE
        _export(folded(graph), path, fields)
        difference = check_parity(graph, path, real)
        variants = [_variant("float32", path, {})]
        version = _version(folder, version, variants[0].sha256)
        if loss is not None:
            half = new / HALF_FILE
            _export(in_half(graph), half, fields, reflectance=np.float16)
            check_parity(graph, half, real, tolerance=HALF_TOLERANCE)
            variants.append(_variant("float16", half, loss(half)))
        if loss is not None and typical:
            apart, small = new / "apart.onnx", new / INT8_FILE
            _export(folded(graph, "int8"), apart, fields)
            quantise(apart, small, typical)
            apart.unlink()
            check_parity_int8(graph, small, real)
            variants.append(_variant("int8", small, loss(small)))
        card = ModelCard.model_validate(
            {
                **fields,
                "version": version,
                "training": {**fields["training"], "parity_with_torch": difference},
                "variants": tuple(variants),
                "sha256": variants[0].sha256,
            }
        )
        write_card(new, card)
    return folder


@contextmanager
def replaced_bundle(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of a bundle's, once it holds a bundle that loads.

    Args:
        folder: the bundle's folder; replaced completely or, if the context fails, not at all.

    Raises:
        BundleError: the bundle in the new folder does not load.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield new
        load_bundle(new)
        new.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        new.replace(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def replace_card(folder: Path, card: ModelCard) -> None:
    """Give a bundle another card; its files stay as they are.

    Args:
        folder: the bundle's folder; replaced completely or not at all.
        card: of the same files.
    """
    with replaced_bundle(folder) as new:
        for variant in card.variants:
            shutil.copy2(folder / variant.file, new / variant.file)
        write_card(new, card)


def describe(folder: Path, *, version: str) -> Path:
    """Write the description, and what is known of the training data, into a bundle's card again.

    The ONNX files stay as they are.

    Args:
        folder: the bundle's folder; its card is replaced completely or not at all.
        version: version of the new bundle.

    Raises:
        UnknownData: the card names a data set that `training.licences` lacks.
        VersionNotRaised: the bundle already has this version.
    """
    card = load_bundle(folder).card
    check_new_version(card, version)
    changes = {**described(card.name), **sensed(card.training_data), "version": version}
    replace_card(folder, ModelCard.model_validate({**card.model_dump(), **changes}))
    return folder


def _inputs(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a graph's inputs, from the fields of its card."""
    taken = {name: bool(fields.get(name)) for name in ("day_of_year", "elsewhere")}
    return input_names(fields["modality"], **taken)


def _export(
    graph: Graph,
    path: Path,
    fields: Mapping[str, Any],
    *,
    reflectance: type[np.floating[Any]] = np.float32,
) -> None:
    example = next(random_inputs(graph, _inputs(fields)))
    to_onnx(
        graph,
        path,
        inputs=list(example),
        output=OUTPUTS[fields["task"]],
        example=[
            torch.from_numpy(array.astype(reflectance) if name in REFLECTANCE else array)
            for name, array in example.items()
        ],
    )


def _variant(name: Precision, path: Path, loss: Mapping[str, float]) -> Variant:
    return Variant(
        name=name,
        file=path.name,
        sha256=sha256_of(path),
        bytes=path.stat().st_size,
        opset=OPSET,
        loss=dict(loss),
    )


def check_new_version(card: ModelCard, version: str | None) -> None:
    """Check that a changed bundle gets another version than its present one.

    Raises:
        VersionNotRaised: the versions are equal.
    """
    if card.version == version:
        raise VersionNotRaised(
            f"the bundle has the version {version} ({card.id}), and the changed bundle needs "
            "another one: give a --version above it"
        )


def _version(folder: Path, requested: str | None, sha256: str) -> str:
    """Version of a bundle that is written into a folder.

    Predictions carry the model's version, so two models under one version could not be
    distinguished.
    """
    if not (folder / CARD_FILE).exists():
        return requested or "1.0.0"
    old = ModelCard.model_validate_json((folder / CARD_FILE).read_bytes())
    if old.version == (requested or old.version) and old.sha256 != sha256:
        raise VersionNotRaised(
            f"{old.id} exists and is another model: give a --version other than {old.version}"
        )
    return requested or old.version


def _evaluations(run_folder: Path, bundle: Path, run: Run) -> dict[str, Any]:
    """The evaluations of a run as a card's metrics, by name; empty if there are none.

    `python -m training evaluate` and `robustness` store them in the run's folder. A run that was
    trained on every place has none of its own: it takes those of the run it starts from, or else
    those of the bundle it replaces if that bundle has the same configuration.
    """
    folders = [run_folder]
    if run.everything and [path.name for path in run.pretrained] == [WEIGHTS]:
        folders.append(run.pretrained[0].parent)
    old: dict[str, Any] = {}
    if (bundle / CARD_FILE).exists():
        card = ModelCard.model_validate_json((bundle / CARD_FILE).read_bytes())
        old = card.metrics if same_configuration(card, run) else {}
    found = {}
    for name, file in (("evaluation", EVALUATION), ("robustness", ROBUSTNESS)):
        stored = next((folder / file for folder in folders if (folder / file).exists()), None)
        if stored:
            found[name] = json.loads(stored.read_text())
        elif old.get(name):
            found[name] = old[name]
    return found


def measured_loss(full: Outputs, task: Task[Any], file: Path) -> dict[str, float]:
    """Change of each score on the validation places; negative is worse.

    Args:
        full: outputs of the graph in float32.
        task: gives the validation places.
        file: ONNX file of the reduced graph.
    """
    before, after = scores_of(full), scores_of(task.outputs(Served(file)))
    signs = {"accuracy": 1, "macro_f1": 1, "rmse_mean": -1}
    return {
        name: round(sign * (after[name] - before[name]), 4)
        for name, sign in signs.items()
        if name in before
    }

"""Export: finished runs to bundles, as ONNX checked against torch, and a card.

run -> graph -> ONNX -> parity on random and on real input -> variants, each with what it loses
    -> card -> bundle, whole or not at all
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.card import CARD_FILE, OUTPUTS, REFLECTANCE, ModelCard, Precision, Variant
from models.registry import load_bundle, sha256_of
from training import validation_outputs as kept
from training.card import EVALUATION, card_fields, made_alike, megaflop, parameters, write_card
from training.config import Run
from training.errors import TrainingError
from training.finetune import WEIGHTS, load_finished
from training.graph_export import folded, in_half, quantise
from training.onnx_export import OPSET, to_onnx
from training.parity import HALF_TOLERANCE, Served, check_parity, check_parity_int8, random_inputs
from training.regions import apply_calibration, read_report
from training.task import Graph, Inputs, Outputs, Task
from training.validation_outputs import scores_of

MODEL_FILE = "model.onnx"
HALF_FILE = "model.float16.onnx"
INT8_FILE = "model.int8.onnx"


class VersionNotRaised(TrainingError):
    """Another model would take the name and version of a bundle that is there."""


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
        folder: of the run.
        zoo: folder of bundles; the bundle of the same name is replaced.
        name: of the bundle; the configuration's where None.
        version: of the bundle; None keeps that of the bundle replaced, or begins at 1.0.0.
        regions: folder of `python -m training regions`, whose calibration the graph takes, and
            whose scores the card.

    Returns:
        The bundle's folder.

    Raises:
        NoRegions: that folder holds none.
        NoGraph: a run of nearest neighbours.
        ParityError: ONNX Runtime and torch differ.
        VersionNotRaised: the bundle replaced is of this version and another model.
    """
    run, task, graph, metrics = load_finished(folder)
    told = name or run.config.name
    real = task.real_inputs()
    fields = card_fields(run, task, metrics, told)
    fields["metrics"] |= _evaluation(folder, zoo / told, run)
    if regions is not None:
        report = read_report(regions)
        apply_calibration(graph, report.calibration)
        fields["regions"] = report.regions
        fields["training"]["calibration"] = report.calibration
    one = [
        torch.from_numpy(array if name == "days" else array[:1])
        for name, array in real.items()
        if name != "day_of_year" or fields["day_of_year"]
    ]
    size = {"parameters": parameters(graph), "megaflop": round(megaflop(graph, one), 2)}
    stored = (folder / kept.FILE).exists()
    full = kept.load(folder) if stored else task.outputs(graph)
    return write_bundle(
        graph,
        zoo / told,
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
    """Export a graph and write the bundle, whole or not at all.

    Args:
        graph: in evaluation mode, on the CPU.
        folder: the bundle's; replaced where it exists.
        fields: of the card, but for `version`, `variants` and `sha256`.
        real: input on which parity is checked, in addition to random input.
        typical: input of training from which an int8 variant finds its scales; without, there is
            none.
        version: of the bundle; None keeps that of the bundle replaced, or begins at 1.0.0.
        loss: measures what a reduced graph's file loses; None writes float32 alone, for no variant
            goes out unmeasured.

    Raises:
        ParityError: ONNX Runtime and torch differ.
        VersionNotRaised: the bundle replaced is of this version and another model.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        path = new / MODEL_FILE
        _export(folded(graph), path, fields)
        off = check_parity(graph, path, real)
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
                "training": {**fields["training"], "parity_with_torch": off},
                "variants": tuple(variants),
                "sha256": variants[0].sha256,
            }
        )
        write_card(new, card)
        load_bundle(new)
        new.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        new.replace(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return folder


def _export(
    graph: Graph,
    path: Path,
    fields: Mapping[str, Any],
    *,
    reflectance: type[np.floating[Any]] = np.float32,
) -> None:
    example = next(random_inputs(graph, dayed=fields["day_of_year"]))
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


def _version(folder: Path, told: str | None, sha256: str) -> str:
    """The version of a bundle that takes a folder.

    Outputs name the model's version: two models under one version could not be told apart.
    """
    if not (folder / CARD_FILE).exists():
        return told or "1.0.0"
    old = ModelCard.model_validate_json((folder / CARD_FILE).read_bytes())
    if old.version == (told or old.version) and old.sha256 != sha256:
        raise VersionNotRaised(
            f"{old.id} is another model than this one: give a --version other than {old.version}"
        )
    return told or old.version


def _evaluation(run_folder: Path, bundle: Path, run: Run) -> dict[str, Any]:
    """The evaluation of a run, if there is one.

    It is stored in the folder of an evaluated run. A run on every place has none of its own; it
    has that of the run it starts from, or keeps that of the bundle it replaces, if that has the
    same configuration.
    """
    folders = [run_folder]
    if run.everything and [path.name for path in run.pretrained] == [WEIGHTS]:
        folders.append(run.pretrained[0].parent)
    for folder in folders:
        if (folder / EVALUATION).exists():
            return {"evaluation": json.loads((folder / EVALUATION).read_text())}
    if not (bundle / CARD_FILE).exists():
        return {}
    old = ModelCard.model_validate_json((bundle / CARD_FILE).read_bytes())
    found = old.metrics.get("evaluation")
    return {"evaluation": found} if found and made_alike(old, run) else {}


def measured_loss(full: Outputs, task: Task[Any], file: Path) -> dict[str, float]:
    """Change of each score on the validation places; negative is worse.

    Args:
        full: outputs of the graph in float32.
        task: with the validation places.
        file: the reduced graph.
    """
    before, after = scores_of(full), scores_of(task.outputs(Served(file)))
    signs = {"accuracy": 1, "macro_f1": 1, "rmse_mean": -1}
    return {
        name: round(sign * (after[name] - before[name]), 4)
        for name, sign in signs.items()
        if name in before
    }

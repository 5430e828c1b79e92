"""Finished runs become bundles: the graph as ONNX, checked against torch, and a card.

run -> graph -> ONNX -> parity on random and on real input -> card -> bundle, whole or not at all
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim

from models.card import (
    CARD_FILE,
    OUTPUTS,
    LegendClass,
    ModelCard,
    TrainingData,
    Variant,
)
from models.graph import PatchGraph
from models.registry import load_bundle, sha256_of
from training.classification import PixelClassification
from training.config import (
    BANDS,
    INDICES,
    ZOO,
    ClassifyConfig,
    ForecastConfig,
    LandcoverConfig,
    Run,
    difference,
)
from training.datasets.eurosat import CLASSES, RGB
from training.finetune import RUN, WEIGHTS, Graph, Task, load_finished
from training.forecasting import PixelForecast
from training.landcover import PatchClassification
from training.legends import CDL, WORLDCOVER, legend_classes
from training.terms import LICENCE, TERMS

OPSET = 20
# Largest difference between ONNX Runtime and torch that a bundle may have.
TOLERANCE = 1e-4
MODEL_FILE = "model.onnx"
_EUROSAT_COLORS = {
    "AnnualCrop": "#f5c542",
    "Forest": "#1b6b2f",
    "HerbaceousVegetation": "#a8c66c",
    "Highway": "#4d4d4d",
    "Industrial": "#8e44ad",
    "Pasture": "#d4e157",
    "PermanentCrop": "#c77b30",
    "Residential": "#e74c3c",
    "River": "#4fa3e0",
    "SeaLake": "#0b4f9c",
}
Inputs = Mapping[str, NDArray[Any]]


class ParityError(Exception):
    """The exported graph does not answer as torch does."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a card says that neither the configuration nor the run knows."""

    version: str
    text: str
    default: bool = False


DESCRIPTIONS: Mapping[str, Description] = {
    "pixels-crops-us": Description(
        version="1.0.0",
        text=(
            "Crops of the United States by a calendar year of B02, B04 and B08: the 17 codes of "
            "the Cropland Data Layer with at least 100 pixels in the data. Trained on California "
            "and Arkansas in 2021 and on labels that are themselves a map; elsewhere, in other "
            "years and for other crops it is untested, and it answers with one of its classes "
            "whatever it sees."
        ),
    ),
    "pixels-landcover": Description(
        version="1.0.0",
        default=True,
        text=(
            "Broad land cover by any year of B02, B04 and B08, after ESA WorldCover's classes, on "
            "monthly to five-day series that begin on any day. Most labels are cropland and "
            "grassland; trees, shrubs, built-up, bare, water and wetland have few, and the labels "
            "are themselves maps (WorldCover about 77 % right). Orchards and vineyards were left "
            "out, for WorldCover maps them as trees in one place and as crops in another; so were "
            "mangroves (two samples), snow and moss (none). Synthetic series of the rare classes "
            "were added for training, never for a score. Shrubs, built-up, bare, water and wetland "
            "are weak; treat them as hints."
        ),
    ),
    "forecast-vi": Description(
        version="1.0.0",
        default=True,
        text=(
            "The next ten ten-day values of NDVI, EVI and SAVI with a band from the 10 % to the "
            "90 % quantile, from up to 320 days of B02, B04 and B08. It knows the day of the "
            "year, not the weather or the place."
        ),
    ),
    "landcover-eurosat": Description(
        version="1.0.0",
        default=True,
        text=(
            "EuroSAT's ten classes of 64 x 64 patches from red, green and blue, trained from "
            "scratch. Reflectance above 0.275 counts as 0.275, as in EuroSAT's images, which are "
            "of Europe and level 1C."
        ),
    ),
}


def export_run(folder: Path, zoo: Path, *, name: str | None = None) -> Path:
    """Turn a finished run into a bundle.

    Args:
        folder: of the run.
        zoo: folder of bundles; the bundle of the same name is replaced.
        name: of the bundle; the configuration's where None.

    Returns:
        The bundle's folder.

    Raises:
        ParityError: ONNX Runtime answers unlike torch.
    """
    run, task, graph, metrics = load_finished(folder)
    told = name or run.config.name
    real = _real_inputs(task)
    fields = card_fields(run, task, metrics, told)
    one = [
        torch.from_numpy(array if name == "days" else array[:1])
        for name, array in real.items()
        if name != "day_of_year" or fields["day_of_year"]
    ]
    size = {"parameters": parameters(graph), "megaflop": round(megaflop(graph, one), 2)}
    return write_bundle(
        graph,
        zoo / told,
        fields={**fields, "training": {**fields["training"], **size}},
        real=real,
    )


def write_bundle(graph: Graph, folder: Path, *, fields: Mapping[str, Any], real: Inputs) -> Path:
    """Export a graph and write the bundle, whole or not at all.

    Args:
        graph: in evaluation mode, on the CPU.
        folder: the bundle's; replaced where it exists.
        fields: of the card, but for `variants` and `sha256`.
        real: input on which parity is checked beside random input.

    Raises:
        ParityError: ONNX Runtime answers unlike torch.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        path = new / MODEL_FILE
        example = next(_random_inputs(graph, dayed=fields["day_of_year"]))
        to_onnx(
            graph,
            path,
            inputs=list(example),
            output=OUTPUTS[fields["task"]],
            example=[torch.from_numpy(array) for array in example.values()],
        )
        off = check_parity(graph, path, real)
        digest = sha256_of(path)
        variant = Variant(
            name="float32",
            file=MODEL_FILE,
            sha256=digest,
            bytes=path.stat().st_size,
            opset=OPSET,
        )
        training = {**fields["training"], "parity_with_torch": off}
        card = ModelCard.model_validate(
            {**fields, "training": training, "variants": (variant,), "sha256": digest}
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


def write_card(folder: Path, card: ModelCard) -> None:
    """Write a bundle's card."""
    (folder / CARD_FILE).write_text(card.model_dump_json(indent=1) + "\n")


# Axes of each input that are dynamic, by the letters of the graph's docstring.
_AXES: Mapping[str, tuple[str, ...]] = {
    "values": ("N", "T"),
    "valid": ("N", "T"),
    "days": ("T",),
    "day_of_year": ("N",),
    "patches": ("N",),
}


def to_onnx(
    graph: nn.Module,
    path: Path,
    *,
    inputs: Sequence[str],
    output: str,
    example: Sequence[Tensor],
) -> None:
    """Write a graph as ONNX, dynamic in N and T.

    Args:
        graph: in evaluation mode, on the CPU.
        path: the file.
        inputs: names of the graph's inputs, in order.
        output: name of its output.
        example: one input of each name, with at least two pixels and two dates.

    Raises:
        ParityError: torch made no ONNX program.
    """
    axes = {"N": Dim("N", min=1), "T": Dim("T", min=1)}
    with warnings.catch_warnings():
        # The exporter warns that axes of one letter are one axis, which is what is meant, and of
        # what it uses of torch itself.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message=".*axis name.*", category=UserWarning)
        program = torch.onnx.export(
            graph,
            tuple(example),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=tuple(
                {place: axes[letter] for place, letter in enumerate(_AXES[name])} for name in inputs
            ),
            verbose=False,
        )
    if program is None:
        raise ParityError("torch made no ONNX program")
    onnx.save(_plain(program.model_proto), path)


def _plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without what the exporter notes for its own debugging: stack traces, paths, guards."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    for tensor in model.graph.initializer:
        del tensor.metadata_props[:]
        tensor.doc_string = ""
    del model.graph.metadata_props[:]
    del model.metadata_props[:]
    return model


def check_parity(graph: Graph, path: Path, real: Inputs) -> float:
    """Largest difference between ONNX Runtime and torch, on random input and on real.

    Raises:
        ParityError: it is over `TOLERANCE`, or a NaN is where torch has none or the reverse.
    """
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    worst = 0.0
    for inputs in (*_random_inputs(graph, dayed="day_of_year" in names), real):
        got = session.run(None, {name: inputs[name] for name in names})[0]
        with torch.inference_mode():
            want = graph(*(torch.from_numpy(inputs[name]) for name in names)).numpy()
        if got.shape != want.shape or (np.isnan(got) != np.isnan(want)).any():
            raise ParityError(f"{path.name}: {got.shape} of ONNX Runtime, {want.shape} of torch")
        worst = max(worst, float(np.nan_to_num(np.abs(got - want)).max()))
    if worst > TOLERANCE:
        raise ParityError(f"{path.name} is {worst:.1e} off torch, {TOLERANCE} is allowed")
    return worst


def _random_inputs(graph: Graph, *, dayed: bool) -> Iterator[dict[str, NDArray[Any]]]:
    """Random inputs: many dates, one pixel, one date, missing values, pixels with nothing."""
    rng = np.random.default_rng(0)
    if isinstance(graph, PatchGraph):
        for n in (3, 1, 17):
            yield {"patches": rng.uniform(-0.05, 0.5, (n, len(RGB), 64, 64)).astype(np.float32)}
        return
    for n, t in ((5, 7), (1, 40), (6, 1), (1, 1), (64, 73)):
        values = rng.uniform(0.01, 0.6, (n, t, len(BANDS))).astype(np.float32)
        valid = rng.random((n, t)) < 0.7
        values[~valid] = np.nan
        # Invalid numbers must not count, and one pixel of several has nothing at all.
        values[0, 0], valid[0, -1] = 3.0, True
        valid[0, 0] = t == 1
        if n > 1:
            valid[1] = False
        inputs: dict[str, NDArray[Any]] = {
            "values": values,
            "valid": valid,
            "days": np.sort(rng.uniform(0, 360, t)).astype(np.float32),
        }
        if dayed:
            inputs["day_of_year"] = rng.integers(1, 367, n).astype(np.float32)
        yield inputs


def _real_inputs(task: Task[Any]) -> Inputs:
    """Validation input of a task that shares its dates, as the service would give it."""
    if isinstance(task, PatchClassification):
        patches = task.read(task.validation[:64])
        return {"patches": patches}
    if isinstance(task, PixelClassification | PixelForecast):
        table = task.validation
        alike = np.flatnonzero((table.days == table.days[0]).all(axis=1))[:256]
        part = table.take(alike)
        return {
            "values": np.where(part.valid[..., None], part.values, np.float32(np.nan)),
            "valid": part.valid,
            "days": part.days[0],
            "day_of_year": np.ones(len(part), dtype=np.float32),
        }
    raise TypeError(f"no real input is known for {type(task).__name__}")


def card_fields(run: Run, task: Task[Any], metrics: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The card of a run, but for its files."""
    config = run.config
    about = DESCRIPTIONS.get(name) or Description(
        version="1.0.0", text=f"{name}: a bundle finetuned for {config.task}."
    )
    return {
        "name": name,
        "version": about.version,
        "description": about.text,
        "default": about.default,
        "licence": LICENCE,
        "metrics": _metrics(config, metrics["scores"]),
        "training_data": _training_data(task),
        "training": training_facts(run, metrics),
        "day_of_year": False,
        **_shape_fields(config),
    }


def _shape_fields(config: ClassifyConfig | ForecastConfig | LandcoverConfig) -> dict[str, Any]:
    if isinstance(config, LandcoverConfig):
        return {
            "task": "landcover",
            "modality": "patch",
            "bands": RGB,
            "patch": config.patch,
            "min_observations": 1,
            "classes": tuple(
                LegendClass(value=i, name=name, color=_EUROSAT_COLORS[name])
                for i, name in enumerate(CLASSES)
            ),
        }
    pixel = {
        "modality": "pixel",
        "bands": BANDS,
        "indices": INDICES,
        "window": config.window,
        "min_observations": config.min_observations,
        "day_of_year": config.encoder.calendar,
    }
    if isinstance(config, ForecastConfig):
        return {
            **pixel,
            "task": "forecast",
            "horizon": config.horizon,
            "quantiles": config.quantiles,
        }
    legend = CDL if config.legend == "cdl" else WORLDCOVER
    return {**pixel, "task": "classify-pixels", "classes": legend_classes(legend)}


_SPLITS = {
    "classify": "places of 0.1 degree that training never saw; labels are maps, not field surveys",
    "forecast": (
        "US crops of 2021 in places of 0.1 degree that training never saw; the first 26 ten-day "
        "composites in, the next ten out; clear targets only, index units"
    ),
    "landcover": "EuroSAT's spatial split: scenes that training never saw",
}


def _metrics(
    config: ClassifyConfig | ForecastConfig | LandcoverConfig, scores: Mapping[str, Any]
) -> dict[str, Any]:
    if not scores:
        return {"validation": "none: trained on every place"}
    return {"validation": {"split": _SPLITS[config.task], **scores}}


def _training_data(task: Task[Any]) -> tuple[TrainingData, ...]:
    return tuple(
        TrainingData(
            name=part["name"],
            use=part["use"],
            n=part["n"],
            licence=TERMS[part["name"]].licence,
            source=TERMS[part["name"]].source,
        )
        for part in task.data()
    )


def training_facts(run: Run, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """How a run was made: commands, configuration, seed, time, machine."""
    return {
        "command": " && ".join(commands(run)),
        "config": json.loads(run.config.model_dump_json()),
        "places": "all" if run.everything else "all but the validation places",
        "seed": run.config.optimisation.seed,
        "seconds_of_last_command": metrics["seconds"],
        "machine": machine(),
        "torch": torch.__version__,
    }


def commands(run: Run, folder: Path | None = None) -> list[str]:
    """What to call to make a run again, the runs that it starts from first.

    Args:
        run: what was told.
        folder: of the run, where a later one starts from it; None leaves the default.
    """
    name = run.config.name
    words = ["python -m training finetune", name]
    earlier: list[str] = []
    if folder:
        words += ["--run", folder.as_posix()]
    if run.pretrained:
        words += ["--pretrained", run.pretrained.as_posix()]
        told = run.pretrained.parent / RUN
        # A pretraining run tells its own command; a finetuning one is part of this.
        if run.pretrained.name == WEIGHTS and told.is_file():
            before = Run.model_validate_json(told.read_bytes())
            earlier = commands(before, run.pretrained.parent)
    if run.everything:
        words.append("--everything")
    if name in ZOO:
        usual, now = (config.model_dump(mode="json") for config in (ZOO[name], run.config))
        words += [f"--set {key}={json.dumps(v)}" for key, v in difference(usual, now).items()]
        words += [f"--seed {run.config.optimisation.seed}"] if run.config.optimisation.seed else []
    return [*earlier, " ".join(words)]


def machine() -> str:
    """What this machine is, in a few words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} shared CPU cores, {platform.machine()}"


def parameters(network: nn.Module) -> int:
    """Weights of a network."""
    return sum(p.numel() for p in network.parameters())


def megaflop(graph: Graph, inputs: Sequence[Tensor]) -> float:
    """Floating-point operations of one forward pass, in millions, a multiply-add as two.

    Args:
        graph: the whole graph; what is counted are its matrix products and convolutions.
        inputs: of one pixel or patch.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        graph(*inputs)
    return float(counter.get_total_flops()) / 1e6

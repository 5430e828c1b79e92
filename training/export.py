"""Finished runs become bundles: the graph as ONNX, checked against torch, and a card.

run -> graph -> ONNX -> parity on random and on real input -> variants, each with what it loses
    -> card -> bundle, whole or not at all
"""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    REFLECTANCE,
    LegendClass,
    ModelCard,
    Precision,
    TrainingData,
    Variant,
)
from models.encoders import PixelEncoder
from models.graph import PatchGraph, PixelGraph
from models.registry import load_bundle, sha256_of
from training import answers as kept
from training.answers import Answers, AnyTask, answer, scores_of
from training.classification import PixelClassification
from training.config import (
    BANDS,
    INDICES,
    ZOO,
    ClassifyConfig,
    ForecastConfig,
    LandcoverConfig,
    Run,
    configuration,
    difference,
)
from training.datasets.eurosat import CLASSES, RGB
from training.finetune import RUN, WEIGHTS, Graph, load_finished, machine
from training.forecasting import PixelForecast
from training.landcover import PatchClassification
from training.legends import CDL, WORLDCOVER, legend_classes
from training.pretrain import CHECKPOINT, FIRST, PretrainConfig
from training.terms import LICENCE, pretraining_data, training_data
from training.variants import Inputs, folded, in_half, quantise

OPSET = 20
# Largest difference between ONNX Runtime and torch that a bundle may have.
TOLERANCE = 1e-4
# Of a float16 variant: three decimal digits, and the softmax in float32.
HALF_TOLERANCE = 2e-2
# Of an int8 variant, on real input and in the mean: its scales fit no other, and a single number
# may well be off by more.
INT8_TOLERANCE = 2e-2
# Pixels that int8 finds its scales from, and how many of those of one set of dates.
_TYPICAL = 4096
_TYPICAL_ALIKE = 1024
MODEL_FILE = "model.onnx"
HALF_FILE = "model.float16.onnx"
INT8_FILE = "model.int8.onnx"
EVALUATION = "evaluation.json"
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


class ParityError(Exception):
    """The exported graph does not answer as torch does."""


class VersionNotRaised(Exception):
    """Another model would take the name and version of a bundle that is there."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a card says that neither the configuration nor the run knows."""

    text: str
    default: bool = False


DESCRIPTIONS: Mapping[str, Description] = {
    "pixels-crops-us": Description(
        text=(
            "Crops of the United States by a calendar year of B02, B04 and B08: the 17 codes of "
            "the Cropland Data Layer with at least 100 pixels in the data. Trained on California "
            "and Arkansas in 2021 and on labels that are themselves a map; elsewhere, in other "
            "years and for other crops it is untested, and it answers with one of its classes "
            "whatever it sees."
        ),
    ),
    "pixels-crops-us-20m": Description(
        text=(
            "Crops of the United States as `pixels-crops-us` has them, for stacks that carry the "
            "20 m bands too: red-edge and shortwave indices stand beside the vegetation indices. "
            "The same places, the same year, the same limits."
        ),
    ),
    "pixels-crops-us-small": Description(
        text=(
            "Crops of the United States as `pixels-crops-us` has them, at a quarter of the cost: "
            "one network instead of three. The same places, the same year, the same limits."
        ),
    ),
    "pixels-landcover": Description(
        default=True,
        text=(
            "Broad land cover by a year of B02, B04 and B08 or several, after ESA WorldCover's "
            "classes, on monthly to five-day series that begin on any day. All dates given are "
            "used, laid on one year: with several years the map is of what stayed, and `start` "
            "keeps to the year that begins there. A pixel is of the cover that holds most of it. "
            "Most labels are cropland and "
            "grassland; trees, shrubs, built-up, bare, water and wetland have few, and the labels "
            "are themselves maps (WorldCover about 77 % right). Orchards and vineyards were left "
            "out, for WorldCover maps them as trees in one place and as crops in another; so were "
            "mangroves (two samples), snow and moss (none). Synthetic series of the rare classes "
            "were added for training, never for a score. Shrubs, built-up, bare, water and wetland "
            "are weak; treat them as hints."
        ),
    ),
    "forecast-vi": Description(
        default=True,
        text=(
            "The next ten ten-day values of NDVI, EVI and SAVI with a band from the 10 % to the "
            "90 % quantile, from up to 320 days of B02, B04 and B08. It knows the day of the "
            "year, not the weather or the place."
        ),
    ),
    "landcover-eurosat": Description(
        default=True,
        text=(
            "EuroSAT's ten classes of 64 x 64 patches from red, green and blue, trained from "
            "scratch. Reflectance above 0.275 counts as 0.275, as in EuroSAT's images, which are "
            "of Europe and level 1C."
        ),
    ),
}


def export_run(
    folder: Path, zoo: Path, *, name: str | None = None, version: str | None = None
) -> Path:
    """Turn a finished run into a bundle.

    Args:
        folder: of the run.
        zoo: folder of bundles; the bundle of the same name is replaced.
        name: of the bundle; the configuration's where None.
        version: of the bundle; None keeps that of the bundle replaced, or begins at 1.0.0.

    Returns:
        The bundle's folder.

    Raises:
        NoGraph: a run of nearest neighbours.
        ParityError: ONNX Runtime answers unlike torch.
        VersionNotRaised: the bundle replaced is of this version and another model.
    """
    run, task, graph, metrics = load_finished(folder)
    told = name or run.config.name
    real = _real_inputs(task)
    fields = card_fields(run, task, metrics, told)
    fields["metrics"] |= _evaluation(folder, zoo / told, run)
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
        # Of other networks nobody looked at what int8 makes of them.
        typical=_typical_inputs(task) if isinstance(graph.encoder, PixelEncoder) else (),
        version=version,
        loss=lambda file: measured_loss(
            kept.load(folder) if (folder / kept.FILE).exists() else answer(task, graph), task, file
        ),
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
        real: input on which parity is checked beside random input.
        typical: input of training from which an int8 variant finds its scales; without, there is
            none.
        version: of the bundle; None keeps that of the bundle replaced, or begins at 1.0.0.
        loss: measures what a reduced graph's file loses; None writes float32 alone, for no variant
            goes out unmeasured.

    Raises:
        ParityError: ONNX Runtime answers unlike torch.
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
    example = next(_random_inputs(graph, dayed=fields["day_of_year"]))
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

    Answers name the model's version: two models under one version could not be told apart.
    """
    if not (folder / CARD_FILE).exists():
        return told or "1.0.0"
    old = ModelCard.model_validate_json((folder / CARD_FILE).read_bytes())
    if old.version == (told or old.version) and old.sha256 != sha256:
        raise VersionNotRaised(
            f"{old.id} is another model than this one: say a --version other than {old.version}"
        )
    return told or old.version


def _evaluation(run_folder: Path, bundle: Path, run: Run) -> dict[str, Any]:
    """The evaluation of a run beside the baselines, where there is one.

    It lies beside a run that was evaluated. One that trained on every place can have none; it has
    that of the run it goes on from, or keeps that of the bundle it replaces, where that was made
    alike.
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


def made_alike(card: ModelCard, run: Run) -> bool:
    """Whether a bundle was trained under a run's configuration, seed and name apart."""
    if "config" not in card.training:
        return False
    # As a configuration, not as text: a setting that is new since then has its default.
    was = Run.model_validate({"config": card.training["config"], "data": run.data}).config
    return not difference(was.model_dump(mode="json"), run.config.model_dump(mode="json"))


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
    with warnings.catch_warnings(), _quiet():
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter logs of its own passes: hundreds of lines a graph."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


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


class Served:
    """A bundle's file in the place of its graph: a task scores what is served.

    Args:
        path: the ONNX file.
    """

    def __init__(self, path: Path) -> None:
        self.session = open_cpu(path)
        self.names = [i.name for i in self.session.get_inputs()]

    def eval(self) -> Served:
        """A file knows no training."""
        return self

    def raw(self, *inputs: Tensor) -> Tensor:
        """Quantiles, or logarithms of probabilities, in the order of the inputs.

        Args:
            inputs: as the graph takes them; days may be each pixel's own (N, T), though the file
                takes one list for all: pixels of the same days are answered together.
        """
        feeds = {n: x.numpy() for n, x in zip(self.names, inputs, strict=False)}
        groups = [np.arange(len(inputs[0]))]
        days = feeds.get("days")
        if days is not None and days.ndim == 2:
            kind = np.unique(days, axis=0, return_inverse=True)[1].ravel()
            groups = [np.flatnonzero(kind == k) for k in range(kind.max() + 1)]
        parts = [self._run(feeds, rows) for rows in groups]
        order = np.argsort(np.concatenate(groups))
        return torch.from_numpy(np.concatenate(parts)[order])

    def _run(self, feeds: Inputs, rows: NDArray[np.int64]) -> NDArray[Any]:
        given = {name: x[rows] for name, x in feeds.items() if name != "days"}
        if "days" in feeds:
            given["days"] = feeds["days"][rows[0]] if feeds["days"].ndim == 2 else feeds["days"]
        (output,) = self.session.get_outputs()
        answer = np.asarray(self.session.run(None, _fed(self.session, given))[0])
        return np.log(np.maximum(answer, 1e-9)) if output.name == "probabilities" else answer


def measured_loss(full: Answers, task: AnyTask, file: Path) -> dict[str, float]:
    """Change of each score on the validation places; negative is worse.

    Args:
        full: what the graph answers in float32.
        task: with the validation places.
        file: the reduced graph.
    """
    before, after = scores_of(full), scores_of(answer(task, Served(file)))
    signs = {"accuracy": 1, "macro_f1": 1, "rmse_mean": -1}
    return {
        name: round(sign * (after[name] - before[name]), 4)
        for name, sign in signs.items()
        if name in before
    }


def check_parity_int8(graph: Graph, path: Path, real: Inputs) -> float:
    """Mean difference between an int8 graph in ONNX Runtime and torch, on real input.

    Raises:
        ParityError: it is more than `INT8_TOLERANCE`, or a NaN is where torch has none or the
            reverse, be it on random input.
    """
    session = open_cpu(path)
    for inputs in _random_inputs(graph, dayed=_dayed(session)):
        _difference(graph, session, inputs, path.name)
    off = float(np.nan_to_num(_difference(graph, session, real, path.name)).mean())
    if off > INT8_TOLERANCE:
        raise ParityError(f"{path.name} is {off:.1e} off torch, {INT8_TOLERANCE} is allowed")
    return off


def check_parity(graph: Graph, path: Path, real: Inputs, *, tolerance: float = TOLERANCE) -> float:
    """Largest difference between ONNX Runtime and torch, on random input and on real.

    Args:
        graph: in float32.
        path: the ONNX file, of whatever precision.
        real: real input; parity is checked on random input too.
        tolerance: what the difference may be.

    Raises:
        ParityError: it is more, or a NaN is where torch has none or the reverse.
    """
    session = open_cpu(path)
    worst = 0.0
    for inputs in (*_random_inputs(graph, dayed=_dayed(session)), real):
        worst = max(
            worst, float(np.nan_to_num(_difference(graph, session, inputs, path.name)).max())
        )
    if worst > tolerance:
        raise ParityError(f"{path.name} is {worst:.1e} off torch, {tolerance} is allowed")
    return worst


def _dayed(session: onnxruntime.InferenceSession) -> bool:
    return "day_of_year" in {i.name for i in session.get_inputs()}


def _difference(
    graph: Graph, session: onnxruntime.InferenceSession, inputs: Inputs, name: str
) -> NDArray[np.float32]:
    """How far ONNX Runtime's answers lie from torch's, NaN where neither has a number.

    As a share of the largest number where that is above 1, as an embedding's may be.
    """
    names = [i.name for i in session.get_inputs()]
    got = session.run(None, _fed(session, {name: inputs[name] for name in names}))[0]
    with torch.inference_mode():
        want = graph(*(torch.from_numpy(inputs[name]) for name in names)).numpy()
    if got.shape != want.shape or (np.isnan(got) != np.isnan(want)).any():
        raise ParityError(f"{name}: {got.shape} of ONNX Runtime, {want.shape} of torch")
    largest = max(1.0, float(np.nan_to_num(np.abs(want)).max()))
    return np.asarray(np.abs(got - want) / largest, np.float32)


def _fed(session: onnxruntime.InferenceSession, inputs: Inputs) -> Inputs:
    """Inputs with the reflectance in the precision that a graph takes."""
    half = {i.name for i in session.get_inputs() if i.type == "tensor(float16)"}
    return {name: x.astype(np.float16) if name in half else x for name, x in inputs.items()}


def open_cpu(path: Path) -> onnxruntime.InferenceSession:
    """A session on the CPU, with as many threads as torch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Without it, products of int8 overflow on a processor that has no instructions for them; the
    # service, which takes int8 only where there are, does without, for it makes them half as fast.
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def pixel_inputs(graph: PixelGraph, n: int, dates: int) -> dict[str, NDArray[Any]]:
    """Random input of a pixel graph, by name: n pixels with some dates missing."""
    rng = np.random.default_rng(0)
    shape = (n, dates, len(graph.indices.bands))
    inputs: dict[str, NDArray[Any]] = {
        "values": rng.uniform(0.01, 0.6, shape).astype(np.float32),
        "valid": rng.random((n, dates)) < 0.8,
        "days": np.linspace(0, graph.grid.steps * 10, dates, dtype=np.float32),
    }
    if getattr(graph.encoder, "calendar", False):
        inputs["day_of_year"] = np.ones(n, dtype=np.float32)
    return inputs


def _random_inputs(graph: Graph, *, dayed: bool) -> Iterator[dict[str, NDArray[Any]]]:
    """Random inputs: many dates, one pixel, one date, missing values, pixels with nothing."""
    rng = np.random.default_rng(0)
    if isinstance(graph, PatchGraph):
        for n in (3, 1, 17):
            yield {"patches": rng.uniform(-0.05, 0.5, (n, len(RGB), 64, 64)).astype(np.float32)}
        return
    for n, t in ((5, 7), (1, 40), (6, 1), (1, 1), (64, 73)):
        values = rng.uniform(0.01, 0.6, (n, t, len(graph.indices.bands))).astype(np.float32)
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


def _real_inputs(task: AnyTask) -> Inputs:
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


def _typical_inputs(task: AnyTask) -> list[Inputs]:
    """Training input as the service would give it: pixels of the same dates together.

    Empty for imagery, whose convolutions gain nothing from int8.
    """
    if isinstance(task, PatchClassification):
        return []
    table = task.train
    rng = np.random.default_rng(0)
    kind = np.unique(table.days, axis=0, return_inverse=True)[1].ravel()
    found: list[Inputs] = []
    taken = 0
    # The larger sets first: they hold most of what is seen.
    for k in np.argsort(-np.bincount(kind), kind="stable"):
        rows = rng.permutation(np.flatnonzero(kind == k))[:_TYPICAL_ALIKE]
        part = table.take(rows)
        seen = part.present.any(axis=0)
        found.append(
            {
                "values": np.where(part.valid[..., None], part.values, np.float32(np.nan))[:, seen],
                "valid": part.valid[:, seen],
                "days": part.days[0, seen],
                "day_of_year": rng.integers(1, 367, len(part)).astype(np.float32),
            }
        )
        taken += len(part)
        if taken >= _TYPICAL:
            break
    return found


def card_fields(run: Run, task: AnyTask, metrics: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The card of a run, but for its files."""
    config = run.config
    about = DESCRIPTIONS.get(name) or Description(
        text=f"{name}: a bundle finetuned for {config.task}."
    )
    return {
        "name": name,
        "description": about.text,
        "default": about.default,
        "licence": LICENCE,
        "metrics": _metrics(config, metrics),
        "training_data": _training_data(run, task),
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
        "bands": BANDS if isinstance(config, ForecastConfig) else config.bands,
        "indices": INDICES if isinstance(config, ForecastConfig) else config.indices,
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


_CHOSEN = "epoch_chosen_on_the_validation_places"
_SPLITS = {
    "classify": "places of 0.1 degree that training never saw; labels are maps, not field surveys",
    "forecast": (
        "US crops of 2021 in places of 0.1 degree that training never saw; the first 26 ten-day "
        "composites in, the next ten out; clear targets only, index units"
    ),
    "landcover": "EuroSAT's spatial split: scenes that training never saw",
}


def _metrics(
    config: ClassifyConfig | ForecastConfig | LandcoverConfig, metrics: Mapping[str, Any]
) -> dict[str, Any]:
    scores = metrics["scores"]
    if not scores:
        return {"validation": "none: trained on every place"}
    split = _SPLITS[config.task]
    if _CHOSEN in metrics:
        split += f"; they chose the epoch ({metrics[_CHOSEN]}), so the scores flatter somewhat"
    return {"validation": {"split": split, **scores}}


def _training_data(run: Run, task: AnyTask) -> tuple[TrainingData, ...]:
    """What a run learned from, and before it the pretraining that it started from."""
    return (
        *pretraining_data(_learned_from(run)),
        *(training_data(**part) for part in task.data()),
    )


def _learned_from(run: Run) -> dict[str, int]:
    """How much of each source the pretrainings behind a run learned from."""
    found: dict[str, int] = {}
    for checkpoint in run.pretrained:
        if earlier := _run_of(checkpoint):
            found |= _learned_from(earlier)
        elif stored := _pretraining(checkpoint):
            found |= stored["learned_from"]
    return found


def _run_of(weights: Path) -> Run | None:
    """The run that left some weights, where it still lies beside them."""
    told = weights.parent / RUN
    if weights.name != WEIGHTS or not told.is_file():
        return None
    return Run.model_validate_json(told.read_bytes())


def _pretraining(checkpoint: Path) -> dict[str, Any] | None:
    """What a checkpoint holds, where it is that of a pretraining.

    Raises:
        ValueError: it does not tell what it learned from.
    """
    if checkpoint.name != CHECKPOINT or not checkpoint.is_file():
        return None
    stored: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if "pixel_encoder" not in stored or "config" not in stored:
        return None
    if "learned_from" not in stored:
        raise ValueError(
            f"{checkpoint} does not tell what it learned from, which a card must: it was made by "
            "an earlier version, so pretrain anew"
        )
    return stored


def training_facts(run: Run, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """How a run was made: commands, configuration, seed, log, time, machine."""
    return {
        "command": " && ".join(commands(run)),
        "config": json.loads(run.config.model_dump_json()),
        "protocol": run.protocol,
        "places": "all" if run.everything else "all but the validation places",
        "seed": run.config.optimisation.seed,
        "log": {key: metrics[key] for key in ("epochs", "loss", _CHOSEN) if key in metrics},
        "seconds_of_last_command": metrics["seconds"],
        "machine": _machine_of(metrics),
        "torch": torch.__version__,
    }


def _machine_of(metrics: Mapping[str, Any]) -> str:
    """The machine that trained; runs that did not note it were trained where they are exported."""
    threads = f", {metrics['threads']} threads" if "threads" in metrics else ""
    return str(metrics.get("machine", machine())) + threads.replace(" 1 threads", " one thread")


def commands(run: Run, folder: Path | None = None) -> list[str]:
    """What to call to make a run again, the runs that it starts from first.

    Args:
        run: what was told.
        folder: of the run, where a later one starts from it; None leaves the default.
    """
    config = run.config
    words = ["python -m training finetune", config.name]
    earlier: list[str] = []
    new = config.name not in ZOO
    if new:
        words += ["--task", config.task]
    if folder:
        words += ["--run", folder.as_posix()]
    for checkpoint in run.pretrained:
        words += ["--pretrained", checkpoint.as_posix()]
        earlier += [c for c in _commands_before(checkpoint) if c not in earlier]
    if run.everything:
        words.append("--everything")
    if run.protocol != "finetune":
        words += ["--protocol", run.protocol]
    usual = configuration(config.name, config.task if new else None)
    changes = difference(usual.model_dump(mode="json"), config.model_dump(mode="json"))
    words += _as_settings(changes)
    words += [f"--seed {config.optimisation.seed}"] if config.optimisation.seed else []
    return [*earlier, " ".join(words)]


def _commands_before(checkpoint: Path) -> list[str]:
    """What makes a checkpoint: a pretraining, or a run and those that it starts from."""
    if earlier := _run_of(checkpoint):
        return commands(earlier, checkpoint.parent)
    stored = _pretraining(checkpoint)
    if stored is None:
        return []
    return [pretrain_command(PretrainConfig.model_validate(stored["config"]), checkpoint.parent)]


def pretrain_command(config: PretrainConfig, folder: Path) -> str:
    """What to call to pretrain again; CUBE and PASTIS stand for where these data lie."""
    usual, now = (c.model_dump(mode="json") for c in (FIRST, config))
    words = ["python -m training pretrain --threads 1", f"--run {folder.as_posix()}"]
    words += ["--romania CUBE"] if config.sources.romania else []
    words += ["--pastis PASTIS"] if config.sources.pastis else []
    words += _as_settings(difference(usual, now))
    words += [f"--set seed={config.seed}"] if config.seed != FIRST.seed else []
    return " ".join(words)


def _as_settings(changes: Mapping[str, Any]) -> list[str]:
    return [f"--set {shlex.quote(f'{key}={json.dumps(v)}')}" for key, v in changes.items()]


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

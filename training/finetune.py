"""Fine-tuning: one training loop for classification, forecasting and land cover.

task (data -> batches -> loss) -> fit (optimise, average, checkpoint) -> finish (calibrate, score)

A task gives the graph, the batches, the loss and the scores; the loop is the same for all tasks, on
CPU and GPU. A killed run resumes to the same weights: a checkpoint is written after every epoch and
every two minutes within one, and the random numbers of an epoch depend only on the seed and the
epoch's number. A run under the protocol `linear` or `knn` trains no encoder: see `training.probe`.
"""

from __future__ import annotations

import copy
import csv
import itertools
import json
import logging
import os
import pickle
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models.encoders import EfficientNetLite0
from models.forecast_calibration import EARLIER_PREFIXES
from training.classification import PixelClassification
from training.config import Optimisation, Run, starts_from_imagenet
from training.errors import TrainingError
from training.forecasting import PixelForecast
from training.imagenet import imagenet_weights, load_imagenet_weights
from training.landcover import PatchClassification
from training.losses import finite
from training.probe import put_linear_head
from training.task import Graph, GraphT, Task
from training.validation_outputs import load, save, scores_of

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"
WEIGHTS = "weights.pt"
METRICS = "metrics.json"
RUN = "run.json"
LOG = "log.csv"
KEEP_SECONDS = 120.0
"""Training time between two checkpoints within an epoch: the most that a killed run repeats."""
# The task of each kind of configuration.
_TASKS: Mapping[str, Callable[[Any], Task[Any]]] = {
    "classify": lambda run: PixelClassification(
        run.config, run.data, everything=run.everything, left_out=run.left_out
    ),
    "forecast": lambda run: PixelForecast(
        run.config,
        run.data,
        everything=run.everything,
        left_out=run.left_out,
        romania=run.romania,
        public=run.public,
    ),
    "landcover": lambda run: PatchClassification(
        run.config,
        run.data,
        everything=run.everything,
        left_out=run.left_out,
        romania=run.romania,
    ),
}


class CheckpointMismatch(TrainingError):
    """A checkpoint whose configuration differs from the run's, or without the needed encoder."""


class NothingToStopOn(TrainingError):
    """Early stopping in a run that trains on the validation places too."""


class NotLeftOut(TrainingError):
    """A region to leave out that the data do not have, or without which nothing can be scored."""


class ManyEncoders(TrainingError):
    """A probe needs one encoder, and the configuration has several."""


class NoGraph(TrainingError):
    """A run of nearest neighbours has scores but no graph to load or export."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A finished run."""

    graph: Graph | None
    """With the averaged weights, in evaluation mode, on the CPU; None for nearest neighbours."""
    scores: Mapping[str, Any]
    folder: Path


@dataclass(kw_only=True)
class _Reached:
    """How far a run has come, as its checkpoint states."""

    epoch: int = 0
    """Finished epochs."""
    step: int = 0
    """Finished steps of the next epoch."""
    loss: float = 0.0
    """Sum of the losses of these steps."""
    random: tuple[Tensor, ...] = ()
    """States of torch's generators after these steps: of the CPU and, on a GPU, of the GPU."""
    seconds: float = 0.0
    """Training time so far, of all calls."""
    best: dict[str, Any] | None = None
    """Score, epoch and weights of the best epoch, if training may stop early."""


def task_of(run: Run) -> Task[Any]:
    """The task that a run's configuration names, with its data loaded."""
    return _TASKS[run.config.task](run)


def new_graph(run: Run, task: Task[Any]) -> Any:  # noqa: ANN401  # of the task's kind
    """A run's graph before training, its weights by the run's seed."""
    torch.manual_seed(run.config.optimisation.seed)
    graph = task.graph()
    if len(run.pretrained) == 1:
        load_encoder(graph, run.pretrained[0])
    elif run.pretrained:
        join_networks(graph, run.pretrained)
    return graph


def start_from_imagenet(graph: Graph) -> None:
    """Load ImageNet weights into each EfficientNet-Lite0 encoder of a graph."""
    # `others` are pairs of an encoder and a head; only encoders can be of this kind.
    for module in (graph.encoder, *graph.others.modules()):
        if isinstance(module, EfficientNetLite0):
            load_imagenet_weights(module, imagenet_weights())


def finetune(run: Run, folder: Path, *, device: str = "auto", threads: int = 0) -> Finished:
    """Train, calibrate and score; resumes an earlier call with the same folder.

    Args:
        run: configuration, data and checkpoints of the run.
        folder: folder for checkpoints, log and scores.
        device: `auto`, `cpu` or `cuda`.
        threads: CPU threads of torch; 0 uses torch's default.

    Raises:
        CheckpointMismatch: the folder holds a run of another configuration.
        ManyEncoders: a linear or nearest-neighbour probe of a configuration with several encoders.
        NothingToStopOn: the run stops early but leaves no validation places out of training.
        NoGraph: a probe without a graph is trained on every place, which leaves nothing to score.
        NoImageNetWeights: the run starts from ImageNet weights, which are not installed.
        NotLeftOut: the data have no region of a name in `left_out`, or no validation places beside
            the regions left out.
    """
    if threads:
        torch.set_num_threads(threads)
    if run.protocol != "finetune" and run.config.networks > 1:
        one = run.config.one_network
        raise ManyEncoders(
            f"protocol {run.protocol} needs a single encoder, and {run.config.name} has "
            f"{run.config.networks}: give --set {one}"
        )
    if run.everything and run.config.optimisation.patience:
        raise NothingToStopOn(
            "--patience needs validation places, and --everything trains on all of them: give only "
            "one of the two"
        )
    chosen = "cuda" if device == "auto" and torch.cuda.is_available() else device
    where = torch.device("cpu" if chosen == "auto" else chosen)
    _same_run(run, folder)
    task = task_of(run)
    _check_regions(run, task)
    graph = new_graph(run, task)
    if not run.pretrained and starts_from_imagenet(run.config):
        start_from_imagenet(graph)
    # Created only now, so that a run that fails to start leaves no folder behind.
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN).write_text(run.model_dump_json(indent=1))
    started = time.monotonic()
    facts: dict[str, Any] = {}
    if run.protocol == "finetune":
        graph = fit(task, graph, run.config.optimisation, folder, where)
        facts = _log_summary(folder)
    elif run.protocol == "linear" and task.has_linear_head:
        put_linear_head(cast("Any", task), graph)
    else:
        _probe(run, task, graph, folder)
        graph = None
    if graph is not None:
        if not run.everything:
            # A temperature fitted on training places is too low, so a run on every place keeps the
            # temperature of the run that it starts from.
            task.finish(graph)
        torch.save(graph.state_dict(), folder / WEIGHTS)
    scores = _scores(run, task, graph, folder)
    summary = {
        "scores": scores,
        "data": task.data(),
        "seconds": round(time.monotonic() - started, 1),
        **facts,
        "machine": machine(where),
        "threads": torch.get_num_threads(),
    }
    (folder / METRICS).write_text(json.dumps(summary, indent=1))
    return Finished(graph=graph, scores=scores, folder=folder)


def _check_regions(run: Run, task: Task[Any]) -> None:
    """Check that the regions to leave out exist, and that places to score remain.

    Raises:
        NotLeftOut: one does not exist, or none remain.
    """
    for name in run.left_out:
        if name not in task.regions:
            regions = ", ".join(task.regions) or "none"
            raise NotLeftOut(
                f"'{name}' is not a region of the data of {run.config.name}, whose regions "
                f"are: {regions}"
            )
    # Without validation places no temperature is fitted and nothing is scored.
    if run.left_out and not run.everything and not len(task.validation):
        raise NotLeftOut(
            f"without {', '.join(run.left_out)} the data of {run.config.name} have no validation "
            "places: leave out fewer regions"
        )


def _probe(run: Run, task: Task[Any], graph: Graph, folder: Path) -> None:
    """Store the outputs of a probe that has no graph."""
    if run.everything:
        raise NoGraph(
            f"protocol {run.protocol} of a {run.config.task} run gives only scores, and "
            "--everything leaves no places to score: give only one of the two"
        )
    save(task.probe(graph, run.protocol), folder)


def _scores(run: Run, task: Any, graph: Graph | None, folder: Path) -> dict[str, Any]:  # noqa: ANN401  # a task of the graph's kind
    if run.everything:
        return {}
    found: dict[str, Any] = scores_of(load(folder)) if graph is None else task.scores(graph)
    return found


def fit(
    task: Task[GraphT], graph: GraphT, how: Optimisation, folder: Path, device: torch.device
) -> GraphT:
    """Optimise the weights.

    Returns:
        The graph with the averaged weights of the last epoch, or of the best epoch if training
        stops early; in evaluation mode, on the CPU.
    """
    graph = graph.to(device)
    start = copy.deepcopy(graph.state_dict()) if how.keep else {}
    average = AveragedModel(
        graph,
        multi_avg_fn=get_ema_multi_avg_fn(how.average),  # type: ignore[no-untyped-call]  # torch's own
        use_buffers=True,
    )
    optimizer = AdamW(graph.parameters(), lr=how.learning_rate, weight_decay=how.weight_decay)
    schedule = OneCycleLR(
        optimizer,
        how.learning_rate,
        total_steps=how.epochs * task.steps,
        pct_start=how.warm_up,
    )
    state = {"graph": graph, "average": average, "optimizer": optimizer, "schedule": schedule}
    reached = _resume(state, folder)
    last = min(how.stop or how.epochs, how.epochs)
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()) as progress:
        bar = progress.add_task(folder.name, total=last, completed=reached.epoch)
        while reached.epoch < last:
            best = reached.best
            if best and how.patience and reached.epoch - best["epoch"] >= how.patience:
                log.info("%s: stopped early; best epoch %d", folder.name, best["epoch"])
                break
            loss = _epoch(task, state, how, reached, folder, device)
            row = {"epoch": reached.epoch, "loss": round(loss, 5)}
            if how.patience:
                started = time.monotonic()
                reached.best, row["score"] = _better(best, task, average.module, reached.epoch)
                reached.seconds += time.monotonic() - started
            _keep(state, folder, reached)
            _log(folder, {**row, "seconds": round(reached.seconds, 1)})
            progress.update(bar, advance=1, description=f"{folder.name} loss {loss:.4f}")
    graph.load_state_dict(reached.best["weights"] if reached.best else average.module.state_dict())
    if how.statistics:
        measure_statistics(task, graph, how, device)
    if how.keep:
        graph.load_state_dict(mixed(start, graph.state_dict(), how.keep))
    return graph.cpu().eval()


def mixed(start: Mapping[str, Tensor], end: Mapping[str, Tensor], keep: float) -> dict[str, Tensor]:
    """Weighted mean of the weights and statistics of two networks of one shape, by name.

    Args:
        start: weights before training.
        end: weights after it; counters stay as they are here.
        keep: weight of `start`, 0 to 1.
    """
    return {
        name: value.lerp(start[name], keep) if value.is_floating_point() else value
        for name, value in end.items()
    }


def measure_statistics(
    task: Task[GraphT], graph: GraphT, how: Optimisation, device: torch.device
) -> None:
    """Measure the mean and variance of each batch normalisation again, for the weights as they are.

    Averaged weights need it: Izmailov et al. 2018, arXiv 1803.05407, section 3.2.

    Args:
        task: gives the batches; those after the last epoch are used.
        graph: changed in place.
        how: `statistics` is the number of batches.
        device: the graph's device.
    """
    norms = [layer for layer in graph.modules() if isinstance(layer, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    graph.train()
    rng = np.random.default_rng((how.seed, how.epochs))
    with torch.no_grad():
        for batch in itertools.islice(task.batches(how.epochs, rng), how.statistics):
            task.loss(graph, tuple(part.to(device) for part in batch))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    graph.eval()


def _better(
    best: dict[str, Any] | None, task: Task[Any], averaged: nn.Module, epoch: int
) -> tuple[dict[str, Any], float]:
    """The best weights so far, this epoch's included, and this epoch's score.

    The score of a classifier is the mean of accuracy and macro-F1; that of a forecaster is the
    negative error.
    """
    graph = copy.deepcopy(averaged).cpu().eval()
    scores = task.scores(graph)
    if "rmse_mean" in scores:
        score = -float(scores["rmse_mean"])
    else:
        score = (float(scores["accuracy"]) + float(scores["macro_f1"])) / 2
    if best is None or score > best["score"]:
        best = {"score": score, "epoch": epoch, "weights": graph.state_dict()}
    return best, round(score, 5)


def _epoch(
    task: Task[Any],
    state: Mapping[str, Any],
    how: Optimisation,
    reached: _Reached,
    folder: Path,
    device: torch.device,
) -> float:
    """The rest of a pass over the task's batches; the mean loss of the whole pass."""
    graph: Graph = state["graph"]
    graph.train()
    # A function of the seed and the epoch only, so that a resumed run draws the same batches.
    torch.manual_seed(how.seed * 100_003 + reached.epoch)
    batches = task.batches(reached.epoch, np.random.default_rng((how.seed, reached.epoch)))
    if reached.step:
        # The finished batches are drawn again, because later ones depend on them.
        next(itertools.islice(batches, reached.step, reached.step), None)
        _set_random_states(reached.random, device)
    mixed = how.bfloat16 or device.type == "cuda"
    kept = counted = time.monotonic()
    for batch in batches:
        moved = tuple(part.to(device, non_blocking=True) for part in batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            loss = task.loss(graph, moved)
        value = finite(loss, f"{folder.name}, epoch {reached.epoch + 1}, step {reached.step + 1}")
        state["optimizer"].zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own signature
        nn.utils.clip_grad_norm_(graph.parameters(), how.clip)
        state["optimizer"].step()
        state["schedule"].step()
        state["average"].update_parameters(graph)
        reached.step += 1
        reached.loss += value
        now = time.monotonic()
        reached.seconds += now - counted
        counted = now
        if now - kept >= KEEP_SECONDS:
            reached.random = _random_states(device)
            _keep(state, folder, reached)
            kept = now
    mean = reached.loss / task.steps
    reached.epoch, reached.step, reached.loss, reached.random = reached.epoch + 1, 0, 0.0, ()
    return mean


def _random_states(device: torch.device) -> tuple[Tensor, ...]:
    """States of torch's generators: of the CPU and, if it is another device, of the device."""
    cpu = torch.get_rng_state()
    return (cpu, torch.cuda.get_rng_state(device)) if device.type == "cuda" else (cpu,)


def _set_random_states(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def load_encoder(graph: Graph, checkpoint: Path) -> None:
    """Load a pretrained encoder into a graph.

    From an earlier run with a graph of the same shape, all weights are loaded, including head and
    temperature. From a graph with more networks, the first networks are loaded. From a graph of
    another shape, each encoder starts from that of the same network, or else from the first.

    Args:
        graph: changed in place.
        checkpoint: checkpoint of a pretraining, or weights of an earlier run.

    Raises:
        CheckpointMismatch: the checkpoint has no encoder of the graph's kind, or one of another
            shape.
    """
    key = f"{graph.modality}_encoder"
    stored = load_checkpoint(checkpoint)
    own, shapes = _shapes(graph.state_dict()), _shapes(stored)
    beyond = {
        name
        for name in shapes.keys() - own.keys()
        if not name.startswith("others.") and not _added_later(name)
    }
    # A calibration that earlier versions did not store, or stored in another shape, has its
    # default: it must not decide which networks are loaded.
    expected = {name for name in own if shapes.get(name) == own[name] or not _added_later(name)}
    if not beyond and all(shapes.get(name) == own[name] for name in expected):
        graph.load_state_dict({name: stored[name] for name in expected})
        return
    prefix = "encoder."
    finetuned = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    if key not in stored and not finetuned:
        raise CheckpointMismatch(
            f"{checkpoint} has no '{key}', only {sorted(stored)}: give a checkpoint of a "
            "pretraining, or the weights of a run of the same task"
        )
    first = stored.get(key, finetuned)
    encoders = (graph.encoder, *(pair[0] for pair in getattr(graph, "others", ())))
    for network, encoder in enumerate(encoders):
        prefix, _ = _prefixes(network)
        same = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
        weights = same or first
        _same_shapes(checkpoint, weights, encoder.state_dict())
        encoder.load_state_dict(weights)


def join_networks(graph: Graph, weights: Sequence[Path]) -> None:
    """Fill a graph with the networks of earlier runs, in their order, heads included.

    Args:
        graph: changed in place.
        weights: weights of runs of the same task; each holds one network or several.

    Raises:
        CheckpointMismatch: more or fewer networks than the graph's, or other shapes.
    """
    joined: dict[str, Tensor] = {}
    count = 0
    for path in weights:
        stored = load_checkpoint(path)
        i = 0
        while any(name.startswith(_prefixes(i)) for name in stored):
            for old, new in zip(_prefixes(i), _prefixes(count), strict=True):
                here = {k: v for k, v in stored.items() if k.startswith(old)}
                joined |= {new + k.removeprefix(old): v for k, v in here.items()}
            i, count = i + 1, count + 1
    names = " and ".join(path.as_posix() for path in weights)
    expected = 1 + len(graph.others)
    if count != expected:
        raise CheckpointMismatch(
            f"{names} hold {count} networks, but the configuration has {expected}: give as many "
            "--pretrained networks, or change --set members"
        )
    _same_shapes(names, joined, graph.state_dict())
    graph.load_state_dict(joined)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Contents of a checkpoint, on the CPU.

    Raises:
        CheckpointMismatch: the file is not a checkpoint.
        OSError: the file cannot be read.
    """
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointMismatch(
            f"{path} is not a checkpoint: give a checkpoint.pt or weights.pt of a run"
        ) from error
    if not isinstance(stored, dict):
        raise CheckpointMismatch(
            f"{path} holds no weights by name: give a checkpoint.pt or weights.pt of a run"
        )
    return stored


def _same_shapes(origin: Path | str, stored: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Check that stored weights have the names and shapes of a network's own.

    Raises:
        CheckpointMismatch: a weight is missing, unknown or of another shape.
    """
    given, expected = _shapes(stored), _shapes(own)
    for name in (*expected, *given):
        if given.get(name) != expected.get(name) and not _added_later(name):
            raise CheckpointMismatch(
                f"{origin} does not fit: '{name}' is {_size(given.get(name))} there and "
                f"{_size(expected.get(name))} in this configuration; --set the encoder's width, "
                "depths and embedding to those of the checkpoint"
            )


def _added_later(name: str) -> bool:
    """Whether a weight is of a forecast's calibration, which earlier versions did not store."""
    return name.endswith(".spread") or name.startswith(("calibration.", *EARLIER_PREFIXES))


def _size(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape)) or "a number"


def _prefixes(network: int) -> tuple[str, str]:
    """Prefixes of a network's weights in a graph: of its encoder and of its head."""
    if not network:
        return "encoder.", "head."
    return f"others.{network - 1}.0.", f"others.{network - 1}.1."


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    sizes = {name: getattr(value, "shape", None) for name, value in state.items()}
    return {name: None if size is None else tuple(size) for name, size in sizes.items()}


def load_finished(folder: Path) -> tuple[Run, Task[Any], Any, dict[str, Any]]:
    """Load a finished run: its settings, task, graph and metrics.

    Raises:
        NoGraph: the run is of a probe that has no graph.
    """
    run = Run.model_validate_json((folder / RUN).read_bytes())
    if not (folder / WEIGHTS).exists():
        raise NoGraph(
            f"{folder.name} has only scores and no graph, because its protocol is {run.protocol}: "
            "give a run of the protocol finetune"
        )
    task = task_of(run)
    # The checkpoint that the run started from is not needed and may have been removed.
    graph = new_graph(run.model_copy(update={"pretrained": ()}), task)
    graph.load_state_dict(torch.load(folder / WEIGHTS, weights_only=True))
    return run, task, graph.eval(), json.loads((folder / METRICS).read_text())


def is_finished(folder: Path) -> bool:
    """Whether a run is finished: its metrics are written last."""
    return (folder / METRICS).exists()


def _same_run(run: Run, folder: Path) -> None:
    """Check that a folder holds no run of another configuration.

    Raises:
        CheckpointMismatch: the folder holds one.
    """
    path = folder / RUN
    # Compared as values, not as text: settings added since then have their defaults.
    if path.exists() and Run.model_validate_json(path.read_bytes()) != run:
        raise CheckpointMismatch(
            f"{folder} holds a run of another configuration; give another --run"
        )


def _resume(state: Mapping[str, Any], folder: Path) -> _Reached:
    """Load the checkpoint, if there is one."""
    path = folder / CHECKPOINT
    if not path.exists():
        return _Reached()
    stored = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in state.items():
        part.load_state_dict(stored.pop(name))
    # Checkpoints of earlier versions were written after epochs only and hold fewer fields.
    reached = _Reached(**stored)
    log.info("%s: resuming after epoch %d, step %d", folder.name, reached.epoch, reached.step)
    return reached


def _keep(state: Mapping[str, Any], folder: Path, reached: _Reached) -> None:
    """Write a checkpoint."""
    stored: dict[str, Any] = {name: part.state_dict() for name, part in state.items()}
    path = folder / CHECKPOINT
    # Written to another file and renamed: a kill leaves the last complete one.
    torch.save(stored | vars(reached), path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def _log(folder: Path, row: Mapping[str, float]) -> None:
    path = folder / LOG
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if fresh:
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())


def _log_summary(folder: Path) -> dict[str, Any]:
    """Summary of a training's log."""
    with (folder / LOG).open() as file:
        rows = list(csv.DictReader(file))
    facts: dict[str, Any] = {
        "seconds": float(rows[-1]["seconds"]),
        "epochs": int(rows[-1]["epoch"]),
        "loss": float(rows[-1]["loss"]),
    }
    best = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True).get("best")
    if best:
        # The epoch was chosen by its score on the validation places, which the card must state.
        facts["epoch_chosen_on_the_validation_places"] = best["epoch"]
    return facts


def machine(device: torch.device | None = None) -> str:
    """Short description of this machine: the GPU if one is used, else the CPU."""
    if device.type == "cuda" if device else torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} shared CPU cores, {platform.machine()}"

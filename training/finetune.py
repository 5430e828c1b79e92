"""Trains a graph for a downstream task: one loop for classify, forecast and landcover.

task (data -> batches -> loss) -> fit (optimise, average, checkpoint) -> finish (calibrate, score)

A task is what differs: its graph, its batches, its loss and its scores. The loop is the same, on
CPU and GPU, and goes on where a killed run stopped: every epoch leaves a checkpoint, and the
chance of an epoch depends on the seed and the epoch's number alone.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.random import Generator
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models.graph import PatchGraph, PixelGraph
from training.classification import PixelClassification
from training.config import ClassifyConfig, ForecastConfig, Optimisation, Run
from training.forecasting import PixelForecast
from training.landcover import PatchClassification

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"
WEIGHTS = "weights.pt"
METRICS = "metrics.json"
RUN = "run.json"
LOG = "log.csv"
Batch = tuple[Tensor, ...]
Graph = PixelGraph | PatchGraph


GraphT = TypeVar("GraphT", PixelGraph, PatchGraph)


class Task(Protocol[GraphT]):
    """What a downstream task adds to the loop."""

    def graph(self) -> GraphT:
        """A new, untrained graph."""

    @property
    def steps(self) -> int:
        """Batches an epoch."""

    def batches(self, epoch: int, rng: Generator) -> Iterator[Batch]:
        """The batches of an epoch, on the CPU."""

    def loss(self, graph: GraphT, batch: Batch) -> Tensor:
        """The loss () of a batch."""

    def finish(self, graph: GraphT) -> None:
        """Fit what is fitted after training, on the validation places."""

    def scores(self, graph: GraphT) -> dict[str, Any]:
        """Scores on the validation places."""

    def data(self) -> list[dict[str, Any]]:
        """What it trains on: name, use and number of samples of each source."""


class CheckpointMismatch(Exception):
    """A checkpoint of another configuration than the run's, or without the encoder wanted."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run that came to its end."""

    graph: Graph
    """With the averaged weights, in evaluation mode, on the CPU."""
    scores: Mapping[str, Any]
    folder: Path


def task_of(run: Run) -> Task[Any]:
    """The task that a run's configuration names, with its data loaded."""
    if isinstance(run.config, ClassifyConfig):
        return PixelClassification(run.config, run.data, everything=run.everything)
    if isinstance(run.config, ForecastConfig):
        return PixelForecast(run.config, run.data, everything=run.everything)
    return PatchClassification(run.config, run.data, everything=run.everything)


def finetune(run: Run, folder: Path, *, device: str = "auto", threads: int = 0) -> Finished:
    """Train, calibrate and score; goes on where an earlier call with the same folder stopped.

    Args:
        run: what to train.
        folder: where checkpoints, log and scores are kept.
        device: `auto`, `cpu` or `cuda`.
        threads: of torch on the CPU; 0 leaves torch's choice.

    Raises:
        CheckpointMismatch: the folder holds a run of another configuration.
    """
    if threads:
        torch.set_num_threads(threads)
    chosen = "cuda" if device == "auto" and torch.cuda.is_available() else device
    where = torch.device("cpu" if chosen == "auto" else chosen)
    folder.mkdir(parents=True, exist_ok=True)
    _same_run(run, folder)
    task = task_of(run)
    torch.manual_seed(run.config.optimisation.seed)
    graph = task.graph()
    if run.pretrained:
        load_encoder(graph, run.pretrained)
    graph = fit(task, graph, run.config.optimisation, folder, where)
    task.finish(graph)
    torch.save(graph.state_dict(), folder / WEIGHTS)
    scores = {} if run.everything else task.scores(graph)
    summary = {"scores": scores, "data": task.data(), "seconds": _seconds(folder)}
    (folder / METRICS).write_text(json.dumps(summary, indent=1))
    return Finished(graph=graph, scores=scores, folder=folder)


def fit(
    task: Task[GraphT], graph: GraphT, how: Optimisation, folder: Path, device: torch.device
) -> GraphT:
    """Optimise the weights.

    Returns:
        The graph with the averaged weights, in evaluation mode, on the CPU.
    """
    graph = graph.to(device)
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
    first, spent = _resume(state, folder)
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()) as progress:
        bar = progress.add_task(folder.name, total=how.epochs, completed=first)
        for epoch in range(first, how.epochs):
            started = time.monotonic()
            loss = _epoch(task, state, how, epoch, device)
            spent += time.monotonic() - started
            _keep(state, folder, epoch + 1, spent)
            _log(folder, {"epoch": epoch + 1, "loss": round(loss, 5), "seconds": round(spent, 1)})
            progress.update(bar, advance=1, description=f"{folder.name} loss {loss:.4f}")
    graph.load_state_dict(average.module.state_dict())
    return graph.cpu().eval()


def _epoch(
    task: Task[Any], state: Mapping[str, Any], how: Optimisation, epoch: int, device: torch.device
) -> float:
    """One pass over the task's batches; the mean loss."""
    graph: Graph = state["graph"]
    graph.train()
    # Of the seed and the epoch alone, so that a resumed run draws what the whole one would.
    torch.manual_seed(how.seed * 100_003 + epoch)
    rng = np.random.default_rng((how.seed, epoch))
    total = 0.0
    for batch in task.batches(epoch, rng):
        moved = tuple(part.to(device, non_blocking=True) for part in batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = task.loss(graph, moved)
        state["optimizer"].zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own signature
        nn.utils.clip_grad_norm_(graph.parameters(), how.clip)
        state["optimizer"].step()
        state["schedule"].step()
        state["average"].update_parameters(graph)
        total += loss.item()
    return total / task.steps


def load_encoder(graph: Graph, checkpoint: Path) -> None:
    """Put an encoder that was trained before under a graph's head.

    Args:
        graph: whose encoder is replaced.
        checkpoint: of a pretraining, or the weights of an earlier run.

    Raises:
        CheckpointMismatch: no encoder of the graph's kind in the checkpoint, or another shape.
    """
    key = "pixel_encoder" if isinstance(graph, PixelGraph) else "patch_encoder"
    stored = torch.load(checkpoint, map_location="cpu", weights_only=True)
    prefix = "encoder."
    finetuned = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    if key not in stored and not finetuned:
        raise CheckpointMismatch(f"{checkpoint.name} holds {sorted(stored)}, not '{key}'")
    try:
        graph.encoder.load_state_dict(stored.get(key, finetuned))
    except RuntimeError as error:
        raise CheckpointMismatch(f"{checkpoint.name}: {error}") from error


def load_finished(folder: Path) -> tuple[Run, Task[Any], Any, dict[str, Any]]:
    """A finished run again: what it was told, its task, its graph and its metrics."""
    run = Run.model_validate_json((folder / RUN).read_bytes())
    task = task_of(run)
    graph = task.graph()
    graph.load_state_dict(torch.load(folder / WEIGHTS, weights_only=True))
    return run, task, graph.eval(), json.loads((folder / METRICS).read_text())


def _same_run(run: Run, folder: Path) -> None:
    path = folder / RUN
    told = run.model_dump_json(indent=1)
    if path.exists() and path.read_text() != told:
        raise CheckpointMismatch(f"{folder} holds a run of another configuration; choose another")
    path.write_text(told)


def _resume(state: Mapping[str, Any], folder: Path) -> tuple[int, float]:
    """Load the checkpoint, if there is one; epochs done and seconds spent."""
    path = folder / CHECKPOINT
    if not path.exists():
        return 0, 0.0
    stored = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in state.items():
        part.load_state_dict(stored[name])
    log.info("%s: goes on after epoch %d", folder.name, stored["epoch"])
    return stored["epoch"], stored["seconds"]


def _keep(state: Mapping[str, Any], folder: Path, epoch: int, seconds: float) -> None:
    stored = {name: part.state_dict() for name, part in state.items()}
    path = folder / CHECKPOINT
    # Written beside and renamed: a kill in between leaves the last whole one.
    torch.save({**stored, "epoch": epoch, "seconds": seconds}, path.with_suffix(".new"))
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


def _seconds(folder: Path) -> float:
    with (folder / LOG).open() as file:
        return float(list(csv.DictReader(file))[-1]["seconds"])

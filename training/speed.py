"""Size and speed of exported pixel graphs, compared in one run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from models.card import OUTPUTS
from training.card import megaflop
from training.finetune import load_finished
from training.onnx_export import to_onnx
from training.parity import pixel_inputs
from training.score_tables import Row

_PIXELS = 256
_DATES = 36
_ROUNDS = 60
_MARKERS = {"accuracy": "o", "macro-F1": "s"}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Size and speed of one graph."""

    megaflop: float
    """MFLOP per pixel; a multiply-add counts as two."""
    relative: float
    """Pixels per second relative to the first graph: the median over rounds."""
    low: float
    """2.5 % quantile over rounds."""
    high: float


def compare(folders: Mapping[str, Path]) -> dict[str, Speed]:
    """Speed of the graphs of finished runs in ONNX Runtime, on one CPU thread.

    In each round every graph runs once, so that other load on the machine affects all equally.

    Args:
        folders: folders of the runs, by name; the first is the reference of the others.
    """
    sizes: dict[str, float] = {}
    sessions = {}
    with tempfile.TemporaryDirectory() as temporary:
        for i, (name, folder) in enumerate(folders.items()):
            _, task, graph, _ = load_finished(folder)
            one, two = (pixel_inputs(graph, n, _DATES) for n in (1, 2))
            sizes[name] = megaflop(graph, [torch.from_numpy(a) for a in one.values()])
            path = Path(temporary) / f"{i}.onnx"
            to_onnx(
                graph,
                path,
                inputs=list(two),
                output=OUTPUTS[task.card_shape()["task"]],
                example=[torch.from_numpy(a) for a in two.values()],
            )
            many = pixel_inputs(graph, _PIXELS, _DATES)
            sessions[name] = (_session(path), many)
    seconds = _seconds(list(sessions.values()))
    ratios = seconds[:, :1] / seconds
    middle, low, high = np.quantile(ratios, (0.5, 0.025, 0.975), axis=0)
    return {
        name: Speed(
            megaflop=sizes[name], relative=float(middle[i]), low=float(low[i]), high=float(high[i])
        )
        for i, name in enumerate(sessions)
    }


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _seconds(
    sessions: Sequence[tuple[onnxruntime.InferenceSession, Mapping[str, Any]]],
) -> NDArray[np.float64]:
    """Seconds of each round and session (R, S), without the first rounds, which warm up."""
    rows = []
    for _ in range(_ROUNDS + 3):
        row = []
        for session, feeds in sessions:
            started = time.perf_counter()
            session.run(None, feeds)
            row.append(time.perf_counter() - started)
        rows.append(row)
    return np.array(rows[3:])


def picture(rows: Sequence[Row], speeds: Mapping[str, Speed], path: Path, *, title: str) -> None:
    """Draw scores over speed, with the Pareto front.

    Args:
        rows: rows with the scores `accuracy` and `macro-F1`.
        speeds: speeds by the names of the rows.
        path: the SVG file to write.
        title: title of the picture.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    # Otherwise each drawing would have new random ids, and the same table a different file.
    mpl.rcParams["svg.hashsalt"] = "pimc"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for column, marker in _MARKERS.items():
        points = [(speeds[r.name].relative, r.scores[column]) for r in rows]
        x, y = [p[0] for p in points], [p[1].value for p in points]
        spread = [p[1].spread or 0.0 for p in points]
        drawn = axes.errorbar(x, y, yerr=spread, fmt=marker, label=column, capsize=3)
        front = _front(list(zip(x, y, strict=True)))
        axes.plot(*zip(*front, strict=True), color=drawn[0].get_color(), alpha=0.4)
        for row, a, b in zip(rows, x, y, strict=True):
            axes.annotate(row.name, (a, b), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set_xlabel("pixels per second, relative to the default")
    axes.set_ylabel("score on the validation places (bars: standard deviation over seeds)")
    axes.set_title(title, fontsize=10)
    axes.legend(loc="center right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto-optimal points, sorted by the first coordinate."""
    best: list[tuple[float, float]] = []
    for point in sorted(points, reverse=True):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best[::-1]

"""Parity: an ONNX file in ONNX Runtime against its torch graph, on random and on real input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.graph import PatchGraph, PixelGraph
from training.datasets.eurosat import RGB
from training.task import Graph, Inputs

# Largest allowed difference between ONNX Runtime and torch in float32.
TOLERANCE = 1e-4
# The same for a float16 variant, which has three decimal digits and a softmax in float32. The fifty
# layers of EfficientNet-Lite0 differ by up to 0.025 on a patch between two classes and by 1e-3 on
# others; the card states the change of the scores.
HALF_TOLERANCE = 3e-2
# Largest allowed mean difference of an int8 variant on real input. Its scales fit real input only,
# and a single value may differ by more.
INT8_TOLERANCE = 2e-2
_REMEDY = "do not serve the file; export it again with the versions in constraints.txt"


class ParityError(Exception):
    """The outputs of the exported graph and of torch differ."""


class Served:
    """An ONNX file with the interface of a graph, so that a task scores the file that is served.

    Args:
        path: the ONNX file.
    """

    def __init__(self, path: Path) -> None:
        self.session = open_cpu(path)
        self.names = _names(self.session)

    def eval(self) -> Served:
        """Do nothing: an ONNX file has no training mode."""
        return self

    def raw(self, *inputs: Tensor) -> Tensor:
        """Quantiles, or logarithms of probabilities, in the order of the pixels.

        Args:
            inputs: inputs of the graph. `days` may also be (N, T), although the file takes (T):
                pixels with the same days run together.
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
        values = np.asarray(self.session.run(None, _fed(self.session, given))[0])
        return np.log(np.maximum(values, 1e-9)) if output.name == "probabilities" else values


def check_parity_int8(graph: Graph, path: Path, real: Inputs) -> float:
    """Mean difference between an int8 graph in ONNX Runtime and torch, on real input.

    Raises:
        ParityError: the difference is more than `INT8_TOLERANCE`; or, on real or random input, one
            of the two has NaN where the other does not.
    """
    session = open_cpu(path)
    for inputs in random_inputs(graph, _names(session)):
        _difference(graph, session, inputs, path.name)
    mean = float(np.nan_to_num(_difference(graph, session, real, path.name)).mean())
    if mean > INT8_TOLERANCE:
        raise ParityError(
            f"{path.name} differs from torch by {mean:.1e} on average, and at most "
            f"{INT8_TOLERANCE} is allowed: {_REMEDY}"
        )
    return mean


def check_parity(graph: Graph, path: Path, real: Inputs, *, tolerance: float = TOLERANCE) -> float:
    """Largest difference between ONNX Runtime and torch, on random and on real input.

    Args:
        graph: the graph in float32.
        path: the ONNX file, of any precision.
        real: real input; parity is checked on random input too.
        tolerance: largest allowed difference.

    Raises:
        ParityError: the difference is larger, or one of the two has NaN where the other does not.
    """
    session = open_cpu(path)
    worst = 0.0
    for inputs in (*random_inputs(graph, _names(session)), real):
        worst = max(
            worst, float(np.nan_to_num(_difference(graph, session, inputs, path.name)).max())
        )
    if worst > tolerance:
        raise ParityError(
            f"{path.name} differs from torch by {worst:.1e}, and at most {tolerance} is allowed: "
            f"{_REMEDY}"
        )
    return worst


def _names(session: onnxruntime.InferenceSession) -> list[str]:
    return [i.name for i in session.get_inputs()]


def _difference(
    graph: Graph, session: onnxruntime.InferenceSession, inputs: Inputs, name: str
) -> NDArray[np.float32]:
    """Absolute difference of ONNX Runtime's and torch's outputs, NaN where both have NaN.

    Relative to the largest value if that is above 1, as an embedding's may be.
    """
    names = _names(session)
    served = session.run(None, _fed(session, {name: inputs[name] for name in names}))[0]
    with torch.inference_mode():
        expected = graph(*(torch.from_numpy(inputs[name]) for name in names)).numpy()
    if served.shape != expected.shape:
        raise ParityError(
            f"{name}: ONNX Runtime returns the shape {served.shape}, but torch returns "
            f"{expected.shape}: {_REMEDY}"
        )
    if (np.isnan(served) != np.isnan(expected)).any():
        raise ParityError(
            f"{name}: ONNX Runtime and torch return NaN for different inputs: {_REMEDY}"
        )
    largest = max(1.0, float(np.nan_to_num(np.abs(expected)).max()))
    return np.asarray(np.abs(served - expected) / largest, np.float32)


def _fed(session: onnxruntime.InferenceSession, inputs: Inputs) -> Inputs:
    """Inputs with the reflectance in the precision of the graph's input."""
    half = {i.name for i in session.get_inputs() if i.type == "tensor(float16)"}
    return {name: x.astype(np.float16) if name in half else x for name, x in inputs.items()}


def open_cpu(path: Path) -> onnxruntime.InferenceSession:
    """A session on the CPU, with as many threads as torch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Without this option, int8 products overflow on a CPU that has no instructions for them. The
    # service does not set it, because it halves the speed; it uses int8 only on CPUs that have the
    # instructions.
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


def random_inputs(graph: Graph, names: Sequence[str]) -> Iterator[dict[str, NDArray[Any]]]:
    """Random inputs: many dates, one pixel, one date, missing values, pixels without a date.

    Args:
        graph: takes them.
        names: of the inputs, in the graph's order.
    """
    rng = np.random.default_rng(0)
    if isinstance(graph, PatchGraph):
        for n in (3, 1, 17):
            yield {"patches": rng.uniform(-0.05, 0.5, (n, len(RGB), 64, 64)).astype(np.float32)}
        return
    for n, t in ((5, 7), (1, 40), (6, 1), (1, 1), (64, 73)):
        values = rng.uniform(0.01, 0.6, (n, t, len(graph.indices.bands))).astype(np.float32)
        valid = rng.random((n, t)) < 0.7
        values[~valid] = np.nan
        # Invalid values must not count, and one of several pixels has no valid date.
        values[0, 0], valid[0, -1] = 3.0, True
        valid[0, 0] = t == 1
        if n > 1:
            valid[1] = False
        inputs: dict[str, NDArray[Any]] = {
            "values": values,
            "valid": valid,
            "days": np.sort(rng.uniform(0, 360, t)).astype(np.float32),
            "day_of_year": rng.integers(1, 367, n).astype(np.float32),
            "elsewhere": rng.integers(0, 2, n).astype(np.float32),
        }
        yield {name: inputs[name] for name in names}

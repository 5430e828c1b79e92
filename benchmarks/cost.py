"""Cost of a graph in floating-point operations, counted from the graph itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv"})
_UNKNOWN = frozenset({"Einsum", "ConvTranspose", "LSTM", "GRU", "RNN", "Attention"})


@dataclass(frozen=True)
class Product:
    """A matrix product, (rows, inner) x (inner, columns), for all pixels of a run."""

    rows: float
    """Rows per pixel."""
    inner: int
    columns: int

    @property
    def flop(self) -> float:
        """Multiplications and additions for one pixel."""
        return 2.0 * self.rows * self.inner * self.columns


def products_of(path: Path, feeds: Mapping[str, NDArray[Any]], count: int) -> list[Product]:
    """The matrix products of a graph for one pixel.

    The graph runs once with the inputs and outputs of each product as graph outputs, so that the
    shapes are those of a real run. Other operations (indices, plots, normalisation) are not
    counted.

    Args:
        path: file of a float32 graph.
        feeds: the graph's input for `count` pixels.
        count: number of pixels (N).

    Raises:
        ValueError: the graph holds products of a kind that is not counted.
    """
    model = onnx.load(path)
    unknown = {node.op_type for node in model.graph.node} & _UNKNOWN
    if unknown or model.functions:
        kinds = ", ".join(sorted(unknown)) or "functions"
        raise ValueError(f"the operations of {path.name} cannot be counted: it holds {kinds}")
    nodes = [node for node in model.graph.node if node.op_type in _PRODUCTS]
    shapes = {init.name: tuple(init.dims) for init in model.graph.initializer}
    shapes |= {name: array.shape for name, array in feeds.items()}
    names = [name for node in nodes for name in (node.input[0], node.input[1], node.output[0])]
    missing = list(dict.fromkeys(name for name in names if name not in shapes))
    outputs = {output.name for output in model.graph.output}
    model.graph.output.extend(
        helper.make_empty_tensor_value_info(name) for name in missing if name not in outputs
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    arrays = session.run(missing, dict(feeds))
    shapes |= {name: array.shape for name, array in zip(missing, arrays, strict=True)}
    return [_product(node, shapes, count) for node in nodes]


def _product(node: Any, shapes: Mapping[str, Sequence[int]], count: int) -> Product:
    first, second, out = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
    if node.op_type == "Conv":
        inner, columns = int(np.prod(second[1:])), out[1]
    else:
        turned = next((a.i for a in node.attribute if a.name == "transA"), 0)
        inner, columns = first[0] if turned else first[-1], out[-1]
    return Product(rows=int(np.prod(out)) / columns / count, inner=inner, columns=columns)

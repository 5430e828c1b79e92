"""Inputs of the benchmarks: plausible pixels, and graphs of a single matrix product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from service.infer.model import LoadedModel
from service.infer.session import CPU

PIXELS = 4096
DATES = 36

# Input and output types of a product by kind, if not float32.
_ENDS: Mapping[str, tuple[int, int]] = {
    "float16": (TensorProto.FLOAT16, TensorProto.FLOAT16),
    "int8-alone": (TensorProto.UINT8, TensorProto.INT32),
}


def pixels_input(model: LoadedModel, count: int, dates: int = DATES) -> dict[str, NDArray[Any]]:
    """Plausible reflectance in the form of the graph's inputs, every date clear."""
    random = np.random.default_rng(0)
    feeds: dict[str, NDArray[Any]] = {
        "values": random.uniform(0.02, 0.4, (count, dates, len(model.card.bands))),
        "valid": np.ones((count, dates), np.bool_),
        "days": np.linspace(0, 355, dates),
        "day_of_year": np.ones(count),
        "elsewhere": np.zeros(count),
    }
    return {
        name: feeds[name] if name == "valid" else feeds[name].astype(np.float32)
        for name in model.card.inputs
    }


def product_session(
    constants: Mapping[str, NDArray[Any]],
    *,
    threads: int,
    kind: str = "float32",
    provider: str = CPU,
) -> onnxruntime.InferenceSession:
    """A graph of one product, a x b, with a constant b.

    Args:
        constants: `b`, (inner, columns) float32, or float16 for that kind.
        threads: number of the session's threads.
        kind: `float32`; `float16`; `int8`, where the graph quantises the activations as ONNX
            Runtime's dynamic quantisation does; or `int8-alone`, where the input is quantised.
        provider: execution provider of the session.
    """
    b = constants["b"]
    plain = kind in {"float32", "float16"}
    scale = np.float32(np.abs(b).max() / 127)
    rounded = np.clip(np.round(b / scale), -127, 127).astype(np.int8)
    initializers = [numpy_helper.from_array(b if plain else rounded, "b")]
    into, out = _ENDS.get(kind, (TensorProto.FLOAT, TensorProto.FLOAT))
    if plain:
        nodes = [helper.make_node("MatMul", ["a", "b"], ["out"])]
    elif kind == "int8-alone":
        nodes = [helper.make_node("MatMulInteger", ["a", "b"], ["out"])]
    else:
        initializers.append(numpy_helper.from_array(np.asarray(scale), "b_scale"))
        nodes = [
            helper.make_node("DynamicQuantizeLinear", ["a"], ["qa", "a_scale", "a_zero"]),
            helper.make_node("MatMulInteger", ["qa", "b", "a_zero"], ["product"]),
            helper.make_node("Cast", ["product"], ["real"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["a_scale", "b_scale"], ["both"]),
            helper.make_node("Mul", ["real", "both"], ["out"]),
        ]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("a", into, ["M", b.shape[0]])],
        [helper.make_tensor_value_info("out", out, ["M", b.shape[1]])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[provider])

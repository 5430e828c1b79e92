"""Tiny bundles, whose predictions can be computed by hand.

Every pixel model predicts from the mean over a pixel's valid dates, band by band (B02, B04, B08);
every patch model predicts from the mean over the patch (B04, B03, B02). The bundles have the names
of the zoo's, so that they replace them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, checker, helper, numpy_helper

from models.registry import sha256_of

SHARPNESS = 20.0
"""Probabilities are softmax(SHARPNESS x mean)."""
STEP = 0.01
"""Each step ahead of a forecast adds this to the mean."""
ELSEWHERE = 0.25
"""A forecast of a bundle that takes `elsewhere` is higher by this where it is 1."""
SPREAD = 0.1
"""Distance of q10 and q90 from q50."""
HORIZON = 3
INT8_SCALE = 0.002
"""Scale of embeddings as int8: the largest value is 0.254, which some reflectances exceed."""
PIXEL_BANDS = ("B02", "B04", "B08")
PATCH_BANDS = ("B04", "B03", "B02")
CLASSES = ("first", "second", "third")


def _constant(name: str, value: Any) -> Any:
    return numpy_helper.from_array(np.asarray(value), name)


def _pixel_mean() -> tuple[list[Any], list[Any]]:
    """Nodes from values and valid to `mean` (N, C), NaN without a valid date."""
    nodes = [
        helper.make_node("Unsqueeze", ["valid", "last"], ["usable"]),
        helper.make_node("Where", ["usable", "values", "zero"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "dates"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["valid"], ["ones"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["ones", "dates"], ["count"], keepdims=1),
        helper.make_node("Div", ["sum", "count"], ["mean"]),
    ]
    constants = [
        _constant("last", np.array([2], np.int64)),
        _constant("dates", np.array([1], np.int64)),
        _constant("zero", np.float32(0)),
    ]
    return nodes, constants


def _patch_mean() -> tuple[list[Any], list[Any]]:
    nodes = [helper.make_node("ReduceMean", ["patches", "sides"], ["mean"], keepdims=0)]
    return nodes, [_constant("sides", np.array([2, 3], np.int64))]


def _head(task: str, wide: int) -> tuple[list[Any], list[Any], list[Any]]:
    """Nodes and constants from `mean` to the task's output, and the output's shape."""
    if task == "embed" and wide == 1:
        return [helper.make_node("Identity", ["mean"], ["embedding"])], [], ["N", 3]
    if task == "embed":
        mixtures = np.random.default_rng(0).random((3, 3 * wide), np.float32)
        nodes = [helper.make_node("MatMul", ["mean", "mixtures"], ["embedding"])]
        return nodes, [_constant("mixtures", mixtures)], ["N", 3 * wide]
    if task == "forecast":
        steps = STEP * np.arange(1, HORIZON + 1)[:, None] + [-SPREAD, 0, SPREAD]
        nodes = [
            helper.make_node("Unsqueeze", ["mean", "around"], ["wide"]),
            helper.make_node("Add", ["wide", "steps"], ["quantiles"]),
        ]
        constants = [
            _constant("around", np.array([1, 3], np.int64)),
            _constant("steps", steps[None, :, None].astype(np.float32)),
        ]
        return nodes, constants, ["N", HORIZON, 3, 3]
    nodes = [
        helper.make_node("Mul", ["mean", "sharpness"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    return nodes, [_constant("sharpness", np.float32(SHARPNESS))], ["N", 3]


def _brittle() -> tuple[list[Any], list[Any]]:
    """A graph that runs for four dates, as in the warm-up, and fails for any other number."""
    nodes = [
        helper.make_node("Reshape", ["values", "four"], ["flat"]),
        helper.make_node("Slice", ["flat", "from", "to", "axis"], ["mean"]),
    ]
    constants = [
        _constant("four", np.array([-1, 4 * 3], np.int64)),
        _constant("from", np.array([0], np.int64)),
        _constant("to", np.array([3], np.int64)),
        _constant("axis", np.array([1], np.int64)),
    ]
    return nodes, constants


def _graph(task: str, modality: str, *, brittle: bool, wide: int, elsewhere: bool) -> Any:
    if modality == "patch":
        body, constants = _patch_mean()
        inputs = [helper.make_tensor_value_info("patches", TensorProto.FLOAT, ["N", 3, 64, 64])]
    else:
        body, constants = _brittle() if brittle else _pixel_mean()
        inputs = [
            helper.make_tensor_value_info("values", TensorProto.FLOAT, ["N", "T", 3]),
            helper.make_tensor_value_info("valid", TensorProto.BOOL, ["N", "T"]),
            helper.make_tensor_value_info("days", TensorProto.FLOAT, ["T"]),
        ]
    head, more, shape = _head(task, wide)
    name = head[-1].output[0]
    if elsewhere:
        inputs.append(helper.make_tensor_value_info("elsewhere", TensorProto.FLOAT, ["N"]))
        head[-1].output[0] = "here"
        head += [
            helper.make_node("Unsqueeze", ["elsewhere", "wider"], ["there"]),
            helper.make_node("Mul", ["there", "higher"], ["raised"]),
            helper.make_node("Add", ["here", "raised"], [name]),
        ]
        more += [
            _constant("wider", np.array([1, 2, 3], np.int64)),
            _constant("higher", np.float32(ELSEWHERE)),
        ]
    output = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    graph = helper.make_graph([*body, *head], "tiny", inputs, [output], [*constants, *more])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    checker.check_model(model)
    return model


def write_bundle(
    root: Path,
    name: str,
    task: str,
    modality: str,
    *,
    brittle: bool = False,
    wide: int = 1,
    elsewhere: bool = False,
    **card: Any,
) -> Path:
    """Write one bundle under `root`.

    Args:
        root: folder of the bundles.
        name: its name.
        task: its task.
        modality: `pixel` or `patch`.
        brittle: whether it fails on other shapes than its own.
        wide: dimensions of an embedding per band; above 1, each is a mixture of the means.
        elsewhere: whether a forecast takes `elsewhere`.
        card: entries that replace those of its card.
    """
    folder = root / name
    folder.mkdir(parents=True)
    file = folder / "model.onnx"
    file.write_bytes(
        _graph(task, modality, brittle=brittle, wide=wide, elsewhere=elsewhere).SerializeToString()
    )
    sha = sha256_of(file)
    pixel = modality == "pixel"
    content: dict[str, Any] = {
        "name": name,
        "version": "0.0.1",
        "task": task,
        "modality": modality,
        "description": "a graph for tests",
        "bands": PIXEL_BANDS if pixel else PATCH_BANDS,
        "elsewhere": elsewhere,
        "min_observations": 2 if pixel else 1,
        "default": True,
        "licence": "CC0-1.0",
        "sha256": sha,
        "variants": [
            {
                "name": "float32",
                "file": file.name,
                "sha256": sha,
                "bytes": file.stat().st_size,
                "opset": 18,
            }
        ],
    }
    if pixel:
        rule = "last-steps" if task == "forecast" else "calendar-year"
        content["window"] = {"steps": 36, "step_days": 10, "start": rule}
        content["indices"] = ("ndvi", "evi", "savi")
    else:
        content["patch"] = 64
    if task in {"classify-pixels", "landcover"}:
        colors = ("#112233", "#445566", "#778899")
        content["classes"] = [
            {"value": value, "name": label, "color": colors[value]}
            for value, label in enumerate(CLASSES)
        ]
    if task == "forecast":
        content |= {"horizon": HORIZON, "quantiles": (0.1, 0.5, 0.9)}
    if task == "embed":
        content["embedding"] = 3 * wide
        content["embedding_int8"] = {"scale": INT8_SCALE}
    (folder / "card.json").write_text(json.dumps(content | card))
    return folder


def write_zoo(root: Path) -> Path:
    """A bundle for each default of the zoo, and one that fails on other shapes than its own."""
    write_bundle(root, "pixels-landcover", "classify-pixels", "pixel")
    write_bundle(root, "forecast-vi", "forecast", "pixel")
    write_bundle(root, "landcover-eurosat", "landcover", "patch")
    write_bundle(root, "embed-pixel", "embed", "pixel")
    write_bundle(root, "embed-patch", "embed", "patch")
    write_bundle(root, "pixels-brittle", "classify-pixels", "pixel", brittle=True, default=False)
    return root

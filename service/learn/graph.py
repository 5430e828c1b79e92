"""The ONNX graph of a user's own classes: reflectance → regular series → features → head.

    values (N, T, C), valid (N, T), days (T) → regular series (N, C, M) → bands and indices ─┐
                                             → an embedding's own graph ────────────────────┴→ head

The same graph computes the features for fitting a head and for serving it, so that they cannot
differ. The time grid is that of `models.timegrid` with a period of one year.

Shapes: N pixels, T dates, C bands, M steps of the regular grid, D features, K classes, n labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, compose, helper, numpy_helper

from models.card import OUTPUTS, PIXEL_INPUTS
from models.formulas import FAR, NARROW, WIDE, WIDE_HEIGHT, YEAR

_OPSET = 20
_OLDEST = 18
"""Oldest operator set that has the operators of this module."""
_IR_VERSION = 10
STEPS = 36
STEP_DAYS = 10
_TINY = 1e-6
_ROW = STEPS + STEPS // 2
"""Number of features of a band or an index: its series, then its values by rank."""
FEATURES = OUTPUTS["embed"]
"""Name of the features in a graph: the output of an `embed` bundle, as which the graph is loaded
while a head is fitted."""
_MAX_BRIGHTNESS = 1e3
"""Sum of a date's bands from which on the date is not usable, like one with NaN."""
_SMALLEST_SUM = 0.05
"""Smallest denominator of an index: over dark water, a ratio of two small numbers is noise."""
_DARK = 0.03
"""Reflectance below which features grow linearly with it, and above which with its logarithm."""

INDICES: Mapping[str, tuple[str, str]] = {
    "ndvi": ("B08", "B04"),
    "ndwi": ("B03", "B08"),
    "ndmi": ("B08", "B11"),
    "nbr": ("B08", "B12"),
    "ndrei": ("B08", "B05"),
    "ndti": ("B11", "B12"),
    "ngrdi": ("B03", "B04"),
}
"""Normalised differences (a - b) / (a + b), by their names in the Awesome Spectral Indices
catalogue (Montero et al. 2023, doi:10.1038/s41597-023-02096-0)."""


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """A model whose embedding is a part of the features."""

    model: bytes
    """Content of its ONNX file in float32."""
    bands: tuple[str, ...]
    """Names of the bands that it takes, in order."""
    length: int
    """D, the length of its embedding."""

    @property
    def opset(self) -> int | None:
        """Operator set of its graph; None if the graph cannot become part of another."""
        model = onnx.load_from_string(self.model)
        sets = {entry.domain: entry.version for entry in model.opset_import}
        if model.functions or set(sets) - {""} or sets.get("", 0) < _OLDEST:
            return None
        return int(sets[""])


@dataclass(frozen=True, kw_only=True)
class Head:
    """A classifier with a Cauchy and a linear kernel (see `service.learn.kernel`).

    logits = weights / (1 + |scaled - support|² / width) + features · linear + bias
    """

    columns: NDArray[np.intp]
    """The features (d) that the Cauchy kernel takes."""
    mean: NDArray[np.float64]
    """Mean (d), which is subtracted from them."""
    scale: NDArray[np.float64]
    """Scale (d), by which the difference is multiplied."""
    support: NDArray[np.float64]
    """Scaled features of the labelled pixels (n, d)."""
    weights: NDArray[np.float64]
    """Weights (n, K) of the labelled pixels in the logit of each class."""
    width: float
    """Squared distance at which the Cauchy kernel is a half."""
    linear: NDArray[np.float64]
    """Weights (D, K) of all features in the logit of each class."""
    bias: NDArray[np.float64]
    """A summand (K) of the logits."""


def indices_of(bands: Sequence[str]) -> tuple[str, ...]:
    """Names of the indices that can be computed from bands."""
    return tuple(name for name, needs in INDICES.items() if set(needs) <= set(bands))


def series_length(bands: Sequence[str]) -> int:
    """Number of features of the series: see `_series`."""
    return (2 * len(bands) + len(indices_of(bands))) * _ROW


def columns_of(
    bands: Sequence[str], *, series: bool, embedding: Embedding | None
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The features that the Cauchy kernel takes, and those that the linear one takes.

    Distances are taken between asinh of the bands, sums between the bands themselves; both take
    indices and the embedding. The arguments are those of `feature_graph`.
    """
    length = series_length(bands) if series else 0
    edge = len(bands) * _ROW if series else 0
    columns = np.arange(length + (0 if embedding is None else embedding.length))
    return np.delete(columns, np.s_[edge : 2 * edge]), columns[edge:]


@dataclass(kw_only=True)
class _Builder:
    """Nodes and constants of a graph under construction."""

    nodes: list[Any] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)

    def constant(self, name: str, value: Any, kind: Any = np.float32) -> str:  # noqa: ANN401
        self.constants[name] = numpy_helper.from_array(np.asarray(value, kind), name)
        return name

    def add(
        self,
        kind: str,
        inputs: Sequence[str],
        output: str | Sequence[str],
        **options: Any,  # noqa: ANN401 - attributes of the operator
    ) -> str:
        """Add a node and return the name of its first output, which is the node's name, too."""
        outputs = [output] if isinstance(output, str) else list(output)
        node = helper.make_node(kind, list(inputs), outputs, name=outputs[0], **options)
        self.nodes.append(node)
        return outputs[0]


def feature_graph(bands: Sequence[str], *, series: bool, embedding: Embedding | None) -> bytes:
    """A graph whose output is the features (N, D): the series, then the embedding.

    Args:
        bands: names of the stack's bands (C), which the graph takes in this order.
        series: whether the regular series of bands (asinh of reflectance) and indices, and their
            values by rank, are features.
        embedding: model whose embedding is a feature; None for none. `bands` must contain its
            bands.

    Returns:
        The serialised model. Its output `FEATURES` is float32, NaN for a pixel without a usable
        date.
    """
    build = _Builder()
    parts = [_series(build, bands)] if series else []
    if embedding is not None:
        parts.append(_embedded(build, bands, embedding))
    if len(parts) == 1:
        build.add("Identity", parts, FEATURES)
    else:
        build.add("Concat", parts, FEATURES, axis=1)
    length = series_length(bands) if series else 0
    length += 0 if embedding is None else embedding.length
    opset = None if embedding is None else embedding.opset
    return _model(build, len(bands), FEATURES, length, opset or _OPSET)


def with_head(features: bytes, head: Head) -> bytes:
    """A feature graph followed by a head, whose output is class probabilities.

    Args:
        features: a serialised model of `feature_graph`.
        head: a head fitted to its features.

    Returns:
        The serialised model, with the inputs and the output of a `classify-pixels` bundle.
    """
    model = onnx.load_from_string(features)
    bands = model.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    build = _Builder(
        nodes=list(model.graph.node),
        constants={tensor.name: tensor for tensor in model.graph.initializer},
    )
    kinds = head.weights.shape[1]
    build.constant("h_columns", head.columns, np.int64)
    build.add("Gather", [FEATURES, "h_columns"], "h_taken", axis=1)
    build.add("Sub", ["h_taken", build.constant("h_mean", head.mean)], "h_centred")
    build.add("Mul", ["h_centred", build.constant("h_scale", head.scale)], "h_scaled")
    # |a - b|² = |a|² + |b|² - 2 ab needs one matrix product. Rounding may make it slightly
    # negative, which is harmless. It is not clipped, because a clip turns the NaN of a cloudy pixel
    # into a number.
    build.add("Mul", ["h_scaled", "h_scaled"], "h_squares")
    build.constant("h_axis", [1], np.int64)
    build.add("ReduceSum", ["h_squares", "h_axis"], "h_length", keepdims=1)
    build.constant("h_support", -2.0 * head.support.T)
    build.add("MatMul", ["h_scaled", "h_support"], "h_product")
    build.constant("h_lengths", (head.support**2).sum(axis=1)[None])
    build.add("Add", ["h_product", "h_lengths"], "h_partial")
    build.add("Add", ["h_partial", "h_length"], "h_distance")
    build.add("Div", ["h_distance", build.constant("h_width", head.width)], "h_relative")
    build.add("Add", ["h_relative", build.constant("h_one", 1.0)], "h_farness")
    build.add("Reciprocal", ["h_farness"], "h_kernel")
    build.add("MatMul", ["h_kernel", build.constant("h_weights", head.weights)], "h_curved")
    build.add("MatMul", [FEATURES, build.constant("h_linear", head.linear)], "h_sum")
    build.add("Add", ["h_sum", build.constant("h_bias", head.bias)], "h_straight")
    build.add("Add", ["h_curved", "h_straight"], "h_logits")
    output = OUTPUTS["classify-pixels"]
    build.add("Softmax", ["h_logits"], output, axis=1)
    return _model(build, bands, output, kinds, model.opset_import[0].version)


def _series(build: _Builder, bands: Sequence[str]) -> str:
    """Add the features of the regular series, flattened (N, (2 C + I) * 3 M / 2).

    The rows are asinh of the bands, the bands, and the indices. Brightness varies by factors (sun,
    moisture, thin clouds), which a logarithm turns into sums; without it, a distance between two
    pixels is mainly that of their brightest dates. asinh also takes values around 0.

    Each row is followed by its values by rank, which do not depend on the season in which a value
    occurs, as classes that differ by place do, for example in the date of sowing: means of two
    neighbouring ranks, so that they weigh half as much as the series.
    """
    usable = _usable(build)
    weight = _weights(build)
    build.add("Unsqueeze", [usable, build.constant("last", [2], np.int64)], "usable_bands")
    build.add("Where", ["usable_bands", "values", build.constant("zero", 0.0)], "seen")
    build.add("Transpose", ["seen"], "by_band", perm=[0, 2, 1])
    build.add("MatMul", ["by_band", weight], "weighted")
    build.add("Cast", [usable], "present", to=TensorProto.FLOAT)
    build.add("MatMul", ["present", weight], "total")
    build.add("Unsqueeze", ["total", build.constant("middle", [1], np.int64)], "totals")
    # 0 / 0 is NaN for a pixel without a usable date.
    build.add("Div", ["weighted", "totals"], "regular")
    names = indices_of(bands)
    parts = ["regular"]
    if names:
        position = {band: number for number, band in enumerate(bands)}
        first = build.constant("first", [position[INDICES[n][0]] for n in names], np.int64)
        second = build.constant("second", [position[INDICES[n][1]] for n in names], np.int64)
        build.add("Gather", ["regular", first], "a", axis=1)
        build.add("Gather", ["regular", second], "b", axis=1)
        build.add("Sub", ["a", "b"], "difference")
        build.add("Add", ["a", "b"], "sum")
        build.add("Max", ["sum", build.constant("least", _SMALLEST_SUM)], "denominator")
        build.add("Div", ["difference", "denominator"], "ratio")
        build.add("Clip", ["ratio", build.constant("low", -1.0), build.constant("high", 1.0)],
                  "index")  # fmt: skip
        parts.append("index")
        build.add("Concat", parts, "shown", axis=1)
    else:
        build.add("Identity", parts, "shown")
    build.constant("all_steps", [STEPS], np.int64)
    build.add("TopK", ["shown", "all_steps"], ["ranked", "ranks"], axis=2, largest=0)
    build.constant("pairs", [0, 0, STEPS // 2, 2], np.int64)
    build.add("Reshape", ["ranked", "pairs"], "ranked_pairs")
    build.constant("pair", [3], np.int64)
    build.add("ReduceMean", ["ranked_pairs", "pair"], "by_rank", keepdims=0)
    build.add("Concat", ["shown", "by_rank"], "seasonal_and_ranked", axis=2)
    build.constant("flat", [0, (len(bands) + len(names)) * _ROW], np.int64)
    build.add("Reshape", ["seasonal_and_ranked", "flat"], "plain")
    build.constant("column", [1], np.int64)
    build.constant("first_column", [0], np.int64)
    build.constant("after_bands", [len(bands) * _ROW], np.int64)
    build.add("Slice", ["plain", "first_column", "after_bands", "column"], "reflectance")
    return build.add("Concat", [_compressed(build, "reflectance"), "plain"], "series", axis=1)


def _compressed(build: _Builder, reflectance: str) -> str:
    """Add log(reflectance + sqrt(reflectance² + _DARK²)), asinh(reflectance / _DARK) + log(_DARK).

    ONNX Runtime has no Asinh for CUDA.
    """
    build.add("Mul", [reflectance, reflectance], "square_of_reflectance")
    build.add("Add", ["square_of_reflectance", build.constant("dark", _DARK**2)], "legs")
    build.add("Sqrt", ["legs"], "hypotenuse")
    build.add("Add", [reflectance, "hypotenuse"], "stretched")
    # The sum of a large negative reflectance is rounded to 0.
    build.add("Add", ["stretched", build.constant("tiny", _TINY)], "above_zero")
    return build.add("Log", ["above_zero"], "compressed")


def _usable(build: _Builder) -> str:
    """Add the mask (N, T) of dates that are valid and whose bands are all numbers."""
    build.add("ReduceSum", ["values", build.constant("bands", [2], np.int64)], "bright", keepdims=0)
    build.add("Abs", ["bright"], "brightness")
    # A comparison with NaN is false.
    build.add("Less", ["brightness", build.constant("beyond", _MAX_BRIGHTNESS)], "finite")
    return build.add("And", ["valid", "finite"], "usable")


def _weights(build: _Builder) -> str:
    """Add the weight of each date in each step (T, M)."""
    build.add("Unsqueeze", ["days", build.constant("after", [1], np.int64)], "day")
    build.constant("grid", np.arange(STEPS) * STEP_DAYS)
    build.add("Sub", ["day", "grid"], "away")
    year = build.constant("year", YEAR)
    build.add("Div", ["away", year], "years")
    build.add("Floor", ["years"], "whole_years")
    build.add("Mul", ["whole_years", year], "before")
    build.add("Sub", ["away", "before"], "within")
    build.add("Sub", [year, "within"], "around")
    build.add("Min", ["within", "around"], "distance")
    build.add("Mul", ["distance", "distance"], "square")
    build.constant("to_narrow", -0.5 / (NARROW * STEP_DAYS) ** 2)
    build.add("Mul", ["square", "to_narrow"], "falling")
    build.add("Max", ["falling", build.constant("far", -FAR)], "clipped")
    build.add("Exp", ["clipped"], "narrow")
    build.add("Mul", ["square", build.constant("to_wide", (WIDE * STEP_DAYS) ** -2)], "spread")
    build.add("Add", ["spread", build.constant("one", 1.0)], "broad")
    build.add("Div", [build.constant("height", WIDE_HEIGHT), "broad"], "wide")
    return build.add("Add", ["narrow", "wide"], "weight")


def _embedded(build: _Builder, bands: Sequence[str], embedding: Embedding) -> str:
    """Add the embedding (N, D) of the same pixels, with all dates projected onto one year."""
    model = compose.add_prefix(onnx.load_from_string(embedding.model), "e_")
    positions = build.constant("e_bands", [list(bands).index(b) for b in embedding.bands], np.int64)
    values, valid, days = (f"e_{name}" for name in PIXEL_INPUTS)
    build.add("Gather", ["values", positions], values, axis=2)
    build.add("Identity", ["valid"], valid)
    # The embedding's time grid has no period, so `days` is taken modulo 365.
    year = build.constant("e_year", 365.0)
    build.add("Div", ["days", year], "e_years")
    build.add("Floor", ["e_years"], "e_whole_years")
    build.add("Mul", ["e_whole_years", year], "e_before")
    build.add("Sub", ["days", "e_before"], days)
    build.nodes += model.graph.node
    build.constants |= {tensor.name: tensor for tensor in model.graph.initializer}
    return f"e_{OUTPUTS['embed']}"


def _model(build: _Builder, bands: int, output: str, width: int, opset: int) -> bytes:
    kinds = (TensorProto.FLOAT, TensorProto.BOOL, TensorProto.FLOAT)
    shapes: tuple[list[str | int | None], ...] = (["N", "T", bands], ["N", "T"], ["T"])
    inputs = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in zip(PIXEL_INPUTS, kinds, shapes, strict=True)
    ]
    end = helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", width])
    graph = helper.make_graph(
        build.nodes, "own-classes", inputs, [end], list(build.constants.values())
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=_IR_VERSION
    )
    return bytes(model.SerializeToString())

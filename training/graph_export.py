"""Graph export: the same function in fewer operations (folding) or fewer bits (float16, int8)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor, nn

from models.card import Precision
from models.encoders import Block, ChannelNorm, PixelEncoder, standardised, token_parts
from models.recurrence import recurrence_plot
from training.baselines import replace_encoders
from training.task import Graph, Inputs

# A product with fewer inputs gains nothing from int8, because its input must be quantised first.
_FEWEST_INPUTS = 16
_PRODUCTS = {"Gemm", "MatMul"}
# Share of a matrix's values that its int8 scale covers, at each end.
_KEPT = 0.9999
# End of the names of nodes that hold a series as it was before int8.
_UNROUNDED = "_unrounded"


class _Product(nn.Module):
    """Matrix product plus bias; the input is reshaped to rows as long as the weights are high."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = _constant(weight)
        self.bias = _constant(bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(R, I)`, or the same values in other rows, `-> (R', O)`."""
        return torch.addmm(self.bias, x.reshape(-1, self.weight.shape[0]), self.weight)


class _Added(nn.Module):
    """A product that is added to a matrix.

    In float32 that is one operation (Gemm). An int8 product cannot add a matrix. If its sum is in
    float32 (`apart`), the weights are negated and the product is subtracted, because ONNX Runtime
    would otherwise merge product and sum into a Gemm before it looks for products to quantise.
    """

    def __init__(self, weight: Tensor, *, apart: bool = False) -> None:
        super().__init__()
        self.weight = _constant(-weight if apart else weight)
        self.apart = apart

    def forward(self, there: Tensor, x: Tensor) -> Tensor:
        """`(R, O), (R, I) -> (R, O)`."""
        if self.apart:
            return there - torch.mm(x, self.weight)
        return torch.addmm(there, x, self.weight)


class _FoldedBlock(nn.Module):
    """A block whose second product is added to its input: in one operation, in int8 in two."""

    def __init__(self, up: _Product, down: _Added | _Product) -> None:
        super().__init__()
        self.up = up
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x))
        if isinstance(self.down, _Added):
            out: Tensor = self.down(x, hidden)
            return out
        added: Tensor = x + self.down(hidden)
        return added


class FoldedEncoder(nn.Module):
    """A pixel encoder in evaluation mode, computed in fewer operations.

    Batch normalisation becomes part of the product that follows. The bias of a block's second
    product becomes part of the next product, so that the block's sum is part of its product. The
    rows of the plots are made in the order in which they are multiplied, and not copied into the
    tokens. A term that all steps of a pixel share is not added to each step: it is the weight of
    a feature that is 1 in all steps, so that each pixel has its own weights for its tokens.

    Distances are not computed. Because |a - b| = 2 max(a, b) - a - b, the product with the
    distances is a product with the larger values, plus a and b times the sums of the weights. That
    takes one pass over the plots instead of two. In int8 it also allows to round a series before
    its plots are made, because the larger of two rounded numbers is the rounded larger one. Float16
    keeps the distances, because the terms that cancel here are many times larger than the result.

    Args:
        encoder: in evaluation mode.
        precision: of the exported encoder. For int8, a block's sum stays separate from its product,
            so that both are computed in int8; and NaN is restored at the end, because int8 has no
            NaN.
    """

    def __init__(self, encoder: PixelEncoder, precision: Precision = "float32") -> None:
        super().__init__()
        self.embedding = encoder.embedding
        apart = self.apart = precision == "int8"
        self.calendar, self.series = encoder.calendar, encoder.series
        self.threshold, self.percentage = encoder.threshold, encoder.percentage
        weight, bias = _linear(encoder.row)
        steps = encoder.steps if encoder.plots else 0
        beside = 1 + encoder.bands + 2 * encoder.calendar
        # K of the other rows belong to the series, and K * M to the plots.
        indices = (len(weight) - beside) // (encoder.series + steps)
        beside += indices * encoder.series
        tokens, plots = weight[:beside], weight[beside:]
        if apart and len(plots):
            plots = _in_int8(plots)
        self.larger = encoder.plots and encoder.threshold is None and precision != "float16"
        if self.larger:
            # The series' weights come second, after the weight of `observed`.
            own = tokens[1 : 1 + indices] if encoder.series else torch.zeros(indices, len(bias))
            own = own - plots.reshape(indices, steps, -1).sum(dim=1)
            tokens = torch.cat([tokens[:1], own, tokens[1 + indices * encoder.series :]])
            self.series = True
            self.pixel = _Product(-plots, bias)
            plots = 2.0 * plots
        else:
            tokens = torch.cat([tokens, bias[None]])
        self.tokens = _constant(tokens)
        self.plots = _Added(plots, apart=apart) if encoder.plots else None
        layers: list[nn.Module] = []
        # Sum of the second products' biases that must still be added to every row.
        owed = torch.zeros(encoder.row.out_features)
        for i, level in enumerate(encoder.levels):
            if isinstance(level, nn.ReLU):
                layers.append(nn.ReLU())
            for block in level.children():
                if not isinstance(block, Block):
                    raise TypeError(f"a {type(block).__name__} cannot be folded")
                scale, shift = _affine(block.norm)
                up = block.up.weight.T
                bias = block.up.bias + (scale * owed + shift) @ up
                first, second = _Product(scale[:, None] * up, bias), block.down.weight.T
                if apart:
                    layers.append(_FoldedBlock(first, _Product(second, block.down.bias)))
                else:
                    layers.append(_FoldedBlock(first, _Added(second)))
                    owed = owed + block.down.bias
            if i < len(encoder.joins):
                weight, bias = _linear(encoder.joins[i])
                layers.append(_Product(weight, bias + _repeated(owed, weight) @ weight))
                owed = torch.zeros(weight.shape[1])
        *_, last, norm, _ = encoder.head
        scale, shift = _affine(norm)
        weight, bias = _linear(last)
        bias = (bias + _repeated(owed, weight) @ weight) * scale + shift
        weight = weight * scale
        self.layers = nn.Sequential(*layers, _Product(weight, bias), nn.ReLU())

    def forward(
        self,
        series: Tensor,
        observed: Tensor,
        season: Tensor | None = None,
        reflectance: Tensor | None = None,
    ) -> Tensor:
        """Encode pixels, as `PixelEncoder` does."""
        levels = standardised(series)
        tokens = token_parts(
            levels if self.series else None,
            observed,
            season if self.calendar else None,
            reflectance,
        )
        weights: Tensor = self.tokens
        if self.larger:
            alike = self.pixel(levels.flatten(1))[:, None]
            weights = torch.cat([weights.expand(alike.shape[0], -1, -1), alike], dim=1)
        tokens.append(torch.ones_like(observed))
        x = (torch.cat(tokens, dim=1).transpose(1, 2) @ weights).flatten(0, 1)
        if self.plots is not None:
            x = self.plots(x, self._rows(levels))
        # The first product reshapes its input, which joins steps.
        out: Tensor = self.layers(x)
        return out + 0.0 * series.flatten(1)[:, :1] if self.apart else out

    def _rows(self, levels: Tensor) -> Tensor:
        """Rows of the plots of all indices, one per step: (N, K, M) -> (N * M, K * M).

        With `larger`, a row holds the larger value of each pair instead of its distance.
        """
        indices, steps = levels.shape[1:]
        if self.larger:
            plots = torch.maximum(levels.transpose(1, 2)[..., None], levels[:, None])
        elif self.threshold is None:
            plots = (levels.transpose(1, 2)[..., None] - levels[:, None]).abs()
        else:
            plots = recurrence_plot(
                levels, threshold=self.threshold, percentage=self.percentage
            ).transpose(1, 2)
        return plots.reshape(-1, indices * steps)


def _in_int8(weight: Tensor) -> Tensor:
    """Weights (I, O) rounded as int8 holds them, with one scale per column.

    Sums of weights are taken of the rounded ones, so that the rounding error is multiplied by
    distances and not by the larger values that stand in for them.
    """
    scale = weight.abs().amax(dim=0).clamp(min=torch.finfo(weight.dtype).tiny) / 127
    return (weight / scale).round() * scale


def _constant(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().clone().contiguous(), requires_grad=False)


def _linear(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weights (I, O) and bias (O) of a linear layer."""
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"a {type(layer).__name__} cannot be folded")
    return layer.weight.T, layer.bias


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Factor and summand of batch normalisation with its running statistics."""
    if not isinstance(norm, ChannelNorm) or norm.running_mean is None or norm.running_var is None:
        raise TypeError("only batch normalisation with running statistics can be folded")
    scale: Tensor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def _repeated(row: Tensor, weight: Tensor) -> Tensor:
    """A row, repeated once for each of the rows that a product with these weights joins."""
    return row.repeat(len(weight) // len(row))


def folded(graph: Graph, precision: Precision = "float32") -> Graph:
    """The graph with its pixel encoders folded; other encoders stay as they are."""

    def fold(encoder: nn.Module) -> nn.Module:
        if isinstance(encoder, PixelEncoder):
            return FoldedEncoder(encoder, precision)
        return encoder

    new = copy.deepcopy(graph)
    with torch.no_grad():
        replace_encoders(new, fold)
    return new.eval()


class HalfPrecision(nn.Module):
    """An encoder in float16 between a graph and a head in float32.

    The grid and the head stay in float32: the grid's wide kernel has weights of 1e-3 and less,
    which float16 rounds to 0, and a softmax costs little.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder.half()

    def forward(
        self,
        first: Tensor,
        second: Tensor | None = None,
        third: Tensor | None = None,
        fourth: Tensor | None = None,
    ) -> Tensor:
        """Encode; the exporter needs each input as a parameter of its own."""
        inputs = [None if x is None else x.half() for x in (first, second, third, fourth)]
        while inputs[-1] is None:  # inputs that this encoder may not have
            inputs.pop()
        out: Tensor = self.encoder(*inputs)
        return out.float()


def in_half(graph: Graph) -> Graph:
    """The graph with its encoder in float16; inputs and outputs stay float32."""
    half = folded(graph, "float16")
    replace_encoders(half, HalfPrecision)
    return half.eval()


def quantise(source: Path, target: Path, typical: Sequence[Inputs]) -> None:
    """Compute the encoder's products and sums in int8, with scales that are fixed in advance.

    Weights have one scale per column; activations have one per matrix, which covers all but the
    outermost values of typical input. Indices, grid, head and the first small product stay
    float32.

    Args:
        source: a graph folded for int8.
        target: the file to write.
        typical: inputs of the graph, from which the scales are determined.
    """
    model = onnx.load(source)
    weights = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    products = [
        node
        for node in model.graph.node
        if node.op_type in _PRODUCTS and _is_encoders(node.input[1], weights)
    ]
    made = {node.output[0] for node in products}
    chosen = [
        node
        for node in model.graph.node
        if node in products
        or node.op_type == "Relu"
        or (node.op_type == "Add" and made & {*node.input})
    ]
    kinds = {node.op_type for node in chosen}
    with _quiet():
        quantize_static(
            source,
            target,
            _Batches(typical, [i.name for i in model.graph.input]),
            quant_format=QuantFormat.QDQ,
            # A ReLU before an int8 product is implicit in a scale that begins at 0.
            op_types_to_quantize=sorted(kinds),
            nodes_to_exclude=[
                node.name
                for node in model.graph.node
                if node.op_type in kinds and node not in chosen
            ],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={
                "OpTypesToExcludeOutputQuantization": ["MatMul"],
                "TensorQuantOverrides": _widths(model, chosen, typical),
            },
        )
    model = onnx.load(target)
    _round_before_plots(model.graph)
    onnx.checker.check_model(model)
    onnx.save(model, target)


def _widths(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], typical: Sequence[Inputs]
) -> dict[str, list[dict[str, np.float32]]]:
    """Range of the scale of each matrix around some nodes, in the quantiser's form.

    Outliers are clipped: one in a million would stretch the scale of all other values.
    """
    graph = onnx.ModelProto()
    graph.CopyFrom(model)
    names = {name: None for node in nodes for name in (*node.input, *node.output)}
    for known in (*model.graph.initializer, *model.graph.input):
        names.pop(known.name, None)
    del graph.graph.output[:]
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    given = [i.name for i in session.get_inputs()]
    found = [session.run(None, {name: inputs[name] for name in given}) for inputs in typical]
    widths = {}
    for name, *arrays in zip(names, *found, strict=True):
        numbers = np.concatenate([array.ravel() for array in arrays])
        least, most = np.nanquantile(numbers, [1.0 - _KEPT, _KEPT])
        widths[name] = [{"rmin": np.float32(min(least, 0)), "rmax": np.float32(max(most, 0))}]
    return widths


class _Batches(CalibrationDataReader):  # type: ignore[misc]  # it comes without types
    """Typical input, in the quantiser's form."""

    def __init__(self, batches: Sequence[Inputs], names: Sequence[str]) -> None:
        self._next = iter([{name: batch[name] for name in names} for batch in batches])

    def get_next(self) -> dict[str, Any] | None:
        return next(self._next, None)


def _round_before_plots(graph: onnx.GraphProto) -> None:
    """Round series before taking the larger of each pair of their values, not after.

    One number per step is rounded instead of M, and the plots are made and read in bytes. All
    other nodes of the encoder that read the series see them rounded too, because all three terms of
    |a - b| = 2 max(a, b) - a - b must have the same error. An embedding that continues with the
    series holds them as they were.
    """
    made_by = {name: node for node in graph.node for name in node.output}
    for rounding in [node for node in graph.node if node.op_type == "QuantizeLinear"]:
        rows = made_by.get(rounding.input[0])
        larger = made_by.get(rows.input[0]) if rows is not None else None
        if rows is None or larger is None or larger.op_type != "Max":
            continue
        views = [larger]
        for side in larger.input:
            while (view := made_by[side]).op_type in {"Unsqueeze", "Transpose"}:
                views.append(view)
                side = view.input[0]  # until the series, of which both sides are views
        series = views[-1].input[0]
        _show_unrounded(graph, series)
        step = rounding.input[1:]
        rounded, restored = f"{series}_whole", f"{series}_near"
        for node in graph.node:
            if node.name.endswith(_UNROUNDED):
                continue
            seen = rounded if node in views else restored
            node.input[:] = [seen if name == series else name for name in node.input]
        place = list(graph.node).index(made_by[series]) + 1
        make = onnx.helper.make_node
        graph.node.insert(place, make("QuantizeLinear", [series, *step], [rounded]))
        graph.node.insert(place + 1, make("DequantizeLinear", [rounded, *step], [restored]))
        rows.output[0] = rounding.output[0]
        graph.node.remove(rounding)
    # The recorded types of intermediate values are not correct any more.
    del graph.value_info[:]


def _show_unrounded(graph: onnx.GraphProto, series: str) -> None:
    """Give an output that is joined of several parts a flat copy of the series of its own."""
    made_by = {name: node for node in graph.node for name in node.output}
    joined = made_by[graph.output[0].name]
    if joined.op_type != "Concat":
        return
    for n, part in enumerate(joined.input):
        flat = made_by[part]
        if flat.input[0] != series:
            continue
        copy_of = onnx.NodeProto()
        copy_of.CopyFrom(flat)
        copy_of.name = f"{part}{_UNROUNDED}"
        copy_of.output[0] = joined.input[n] = copy_of.name
        graph.node.insert(list(graph.node).index(joined), copy_of)


def _is_encoders(name: str, weights: Mapping[str, Sequence[int]]) -> bool:
    """Whether these are weights of an encoder's product that gains from int8.

    The product shared by all steps of a pixel (`.pixel.`) has one row per pixel and stays float32.
    """
    of_encoder = name.startswith("encoder.") or (name.startswith("others.") and ".0." in name)
    gains = name in weights and weights[name][0] >= _FEWEST_INPUTS and ".pixel." not in name
    return of_encoder and gains


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings that the quantiser logs for each matrix."""
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)

"""The exported graph: the outputs of the trained graph, at lower cost."""

from __future__ import annotations

import copy
from datetime import date
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from models.card import Precision
from models.encoders import ChannelNorm, PatchEncoder, PixelEncoder
from models.graph import PatchGraph, PixelGraph
from models.heads import ClassificationHead, ForecastHead
from training.bundle_weights import NotUnfolded, load_folded
from training.config import BANDS, INDICES
from training.graph_export import FoldedEncoder, folded, quantise
from training.onnx_export import to_onnx
from training.parity import (
    ParityError,
    check_parity,
    check_parity_int8,
    open_cpu,
    pixel_inputs,
)

BATCH = 300


def pixel_graph(
    members: int = 1,
    *,
    task: str = "classify",
    yearly: bool = False,
    clarity: float = 0.0,
    with_series: bool = False,
    **encoder: Any,
) -> PixelGraph:
    """A graph whose normalisation has statistics of its own, as after training."""
    torch.manual_seed(1)
    encoder = {"width": 16, "embedding": 32, "calendar": task == "forecast", **encoder}

    def member() -> tuple[PixelEncoder, Any]:
        head: nn.Module | None = None
        if task == "classify":
            head = ClassificationHead(32, 5)
        elif task == "forecast":
            head = ForecastHead(32, steps=36, indices=3, horizon=4, quantiles=3)
        return PixelEncoder(**encoder), head

    (first, head), *others = (member() for _ in range(members))
    graph = PixelGraph(
        bands=BANDS,
        indices=INDICES,
        steps=36,
        step_days=10,
        encoder=first,
        head=head,
        others=others,
        yearly=yearly,
        clarity=clarity,
        reflectance=bool(encoder.get("bands")),
        with_series=with_series,
    )
    for norm in graph.modules():
        if isinstance(norm, ChannelNorm):
            nn.init.normal_(norm.running_mean, std=0.5)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.normal_(norm.weight, mean=1.0, std=0.3)
            nn.init.normal_(norm.bias, std=0.3)
    return graph.eval()


def round_plots(graph: PixelGraph) -> None:
    """Weights of the plots as int8 holds them: what is summed there is summed of these."""
    for each in (graph.encoder, *(pair[0] for pair in graph.others)):
        beside = 1 + each.bands + 2 * each.calendar + 3 * each.series
        weight = each.row.weight.data[:, beside:]
        if each.plots:
            step = weight.abs().max(dim=1, keepdim=True).values / 127
            weight.copy_(torch.round(weight / step) * step)


def outputs_of(graph: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = graph(*(torch.from_numpy(array) for array in inputs.values()))
    return out


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"depths": (0, 1, 2), "bands": 3},
        {"depths": (2, 0, 1)},
        {"members": 2, "bands": 3},
        {"task": "forecast"},
        {"task": "embed"},
        {"task": "embed", "with_series": True, "bands": 3},
        {"plots": False},
        {"series": False},
        {"threshold": 0.5},
        {"threshold": "point", "percentage": 20.0},
    ],
    ids=str,
)
def test_a_folded_graph_equals_the_graph(options: dict[str, Any], precision: Precision) -> None:
    graph = pixel_graph(**options)
    if precision == "int8":
        round_plots(graph)
    inputs = pixel_inputs(graph, 40, 30)
    inputs["valid"][3] = False
    expected = outputs_of(graph, inputs)
    assert torch.isnan(expected[3]).all()
    got = outputs_of(folded(graph, precision), inputs)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=2e-5, equal_nan=True)
    # The one that was trained is as it was.
    assert isinstance(graph.encoder, PixelEncoder)


def test_a_folded_graph_holds_only_products_and_sums() -> None:
    kinds = {type(module) for module in FoldedEncoder(pixel_graph().encoder).modules()}
    assert not kinds & {nn.Linear, nn.Dropout, ChannelNorm}


def test_imagery_has_nothing_to_fold() -> None:
    graph = PatchGraph(encoder=PatchEncoder(width=8), head=ClassificationHead(256, 3)).eval()
    patches = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(folded(graph)(patches), graph(patches))


# Each file is of a graph with several of the options, as an export takes seconds.


def write(graph: PixelGraph, path: Path, precision: Precision = "float32") -> None:
    inputs = pixel_inputs(graph, 3, 9)
    example = [torch.from_numpy(array) for array in inputs.values()]
    to_onnx(folded(graph, precision), path, inputs=list(inputs), output="out", example=example)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[PixelGraph, Path]:
    """A graph of two networks, and its int8 file; beside that, `apart.onnx` before int8."""
    graph = pixel_graph(members=2, bands=3, depths=(0, 1, 2), yearly=True, clarity=40.0)
    folder = tmp_path_factory.mktemp("int8")
    write(graph, folder / "apart.onnx", "int8")
    quantise(folder / "apart.onnx", folder / "int8.onnx", [pixel_inputs(graph, BATCH, 30)])
    return graph, folder / "int8.onnx"


def calibrated_forecast(width: int = 16) -> PixelGraph:
    """Two networks, and a calibration that depends on the pixel."""
    graph = pixel_graph(members=2, task="forecast", bands=3, depths=(0, 1, 2), width=width)
    assert graph.calibration is not None
    graph.calibration.weight.copy_(torch.linspace(-1, 1, 32))
    graph.calibration.damping.fill_(0.3)
    graph.calibration.far.fill_(1.5)
    graph.calibration.power.fill_(0.5)
    nn.init.normal_(graph.calibration.projection, std=0.3)
    nn.init.normal_(graph.calibration.references)
    return graph


@pytest.fixture(scope="module")
def forecast(tmp_path_factory: pytest.TempPathFactory) -> tuple[PixelGraph, Path]:
    """A graph of forecasts and its file."""
    graph, path = calibrated_forecast(), tmp_path_factory.mktemp("bundle") / "model.onnx"
    write(graph, path)
    return graph, path


@pytest.fixture(scope="module")
def crops(shared_data: Path) -> dict[str, Any]:
    """Real pixels as a graph takes them."""
    with np.load(shared_data / "crops_us_2021" / "crops_us_2021_dev.npz") as file:
        raw = file["reflectance"][::64]
        dates = [date.fromisoformat(d) for d in file["dates"]]
        places = [list(file["bands"]).index(b) for b in BANDS]
    return {
        "values": (raw[..., places] / 10_000).astype(np.float32),
        "valid": ~(raw == 0).all(-1),
        "days": np.array([(d - date(2021, 1, 1)).days for d in dates], np.float32),
        "day_of_year": np.full(len(raw), 274.0, np.float32),
    }


@pytest.mark.slow
class TestFiles:
    """Files predict what torch does, of other numbers of pixels and dates than the example has."""

    def test_classes_of_dates_in_several_years(
        self, small: tuple[PixelGraph, Path], crops: dict[str, Any]
    ) -> None:
        graph = copy.deepcopy(small[0])
        round_plots(graph)  # as the file has them that int8 is made from
        days = crops["days"] + 365.25 * (np.arange(len(crops["days"])) % 4)
        for real in (crops, {**crops, "days": days.astype(np.float32)}):
            check_parity(graph, small[1].with_name("apart.onnx"), real)

    def test_forecasts(self, forecast: tuple[PixelGraph, Path], crops: dict[str, Any]) -> None:
        graph, path = forecast
        check_parity(graph, path, crops)
        for name in ("damping", "far", "power"):  # what the calibration adds is in the file
            other = copy.deepcopy(graph)
            getattr(other.calibration, name).fill_(0.8)
            with pytest.raises(ParityError):
                check_parity(other, path, crops)

    def test_embeddings(self, tmp_path: Path, crops: dict[str, Any]) -> None:
        graph = pixel_graph(task="embed", with_series=True, bands=3)
        write(graph, tmp_path / "model.onnx")
        check_parity(graph, tmp_path / "model.onnx", crops)

    def test_int8_embeddings_hold_the_series_unrounded(self, tmp_path: Path) -> None:
        graph = pixel_graph(task="embed", with_series=True, bands=3)
        inputs = pixel_inputs(graph, BATCH, 30)
        write(graph, tmp_path / "apart.onnx", "int8")
        quantise(tmp_path / "apart.onnx", tmp_path / "int8.onnx", [inputs])
        inputs["valid"][3] = False
        found = open_cpu(tmp_path / "int8.onnx").run(None, inputs)[0]
        expected = outputs_of(graph, inputs).numpy()
        assert np.isnan(found[3]).all()
        np.testing.assert_allclose(found[:, 32:], expected[:, 32:], atol=1e-5, equal_nan=True)
        assert 0.0 < np.nanmax(np.abs(found[:, :32] - expected[:, :32])) < 0.5


@pytest.mark.slow
class TestBundleWeights:
    def test_the_graph_of_a_file_computes_what_was_exported(
        self, forecast: tuple[PixelGraph, Path]
    ) -> None:
        graph, path = forecast
        torch.manual_seed(7)
        again = calibrated_forecast()
        for weight in again.parameters():
            nn.init.normal_(weight)
        again = load_folded(again, path)
        inputs = pixel_inputs(graph, 20, 30)
        expected = outputs_of(graph, inputs)
        torch.testing.assert_close(outputs_of(again, inputs), expected, atol=1e-4, rtol=0)
        twice = outputs_of(folded(again), inputs)
        torch.testing.assert_close(twice, expected, atol=1e-4, rtol=0)

    def test_a_file_of_another_shape_is_named(self, forecast: tuple[PixelGraph, Path]) -> None:
        with pytest.raises(NotUnfolded, match=r"model\.onnx has no .* of the shape"):
            load_folded(calibrated_forecast(width=12), forecast[1])
        assert onnx.load(forecast[1]).graph.initializer


@pytest.mark.slow
def test_the_encoders_products_are_in_int8_and_no_others(small: tuple[PixelGraph, Path]) -> None:
    model = onnx.load(small[1])
    whole = {tensor.name for tensor in model.graph.initializer if tensor.data_type == 3}
    # Of each network: the plots, two joins, the head, and two in each of three blocks.
    assert sum("weight_quantized" in name for name in whole) == 2 * 10
    assert not any("head.linear" in name or ".tokens." in name for name in whole)
    # No rectifier is left between two products, for the scale of what follows begins at nought.
    assert not any(node.op_type == "Relu" and "layers" in node.name for node in model.graph.node)


@pytest.mark.slow
def test_sums_around_blocks_are_in_int8(small: tuple[PixelGraph, Path]) -> None:
    model = onnx.load(small[1])
    made_by = {name: node.op_type for node in model.graph.node for name in node.output}
    read_by = {name: node.op_type for node in model.graph.node for name in node.input}
    sums = [
        node
        for node in model.graph.node
        if node.op_type == "Add"
        and {made_by.get(name) for name in node.input} == {"DequantizeLinear"}
    ]
    # Of each network: one for each of three blocks.
    assert len(sums) == 2 * 3
    assert {read_by[node.output[0]] for node in sums} <= {"QuantizeLinear", "Reshape"}


def scales(path: Path) -> dict[str, float]:
    """Scales of what is multiplied, by name."""
    return {
        tensor.name: float(onnx.numpy_helper.to_array(tensor))
        for tensor in onnx.load(path).graph.initializer
        if tensor.name.endswith("_scale") and not tensor.dims
    }


@pytest.mark.slow
def test_an_outlier_does_not_stretch_the_scales(
    small: tuple[PixelGraph, Path], tmp_path: Path
) -> None:
    graph, path = small
    inputs = pixel_inputs(graph, 600, 30)
    meadow = np.array([0.04, 0.05, 0.35], np.float32)
    inputs["values"] = meadow + 0.1 * (inputs["values"] - 0.3)
    quantise(path.with_name("apart.onnx"), tmp_path / "meadow.onnx", [inputs])
    inputs["values"][0, 10] = (0.02, 0.6, 0.05)  # as bare and red as no ground is
    inputs["valid"][0, 10] = True
    quantise(path.with_name("apart.onnx"), tmp_path / "odd.onnx", [inputs])
    before, after = scales(tmp_path / "meadow.onnx"), scales(tmp_path / "odd.onnx")
    assert before.keys() == after.keys()
    for name, scale in before.items():
        assert after[name] == pytest.approx(scale, rel=0.3), name


def source(made_by: dict[str, onnx.NodeProto], name: str) -> str:
    """Name of the array that a matrix is a view of."""
    while made_by[name].op_type in {"Unsqueeze", "Transpose"}:
        name = made_by[name].input[0]
    return name


@pytest.mark.slow
def test_series_are_rounded_before_their_plots_are_made(small: tuple[PixelGraph, Path]) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(small[1]), strict_mode=True)
    made_by = {name: node for node in model.graph.node for name in node.output}
    # Both networks read the same plots.
    (plots,) = (node for node in model.graph.node if node.op_type == "Max")
    series = {source(made_by, name) for name in plots.input}
    assert len(series) == 1
    rounding = made_by[series.pop()]
    assert rounding.op_type == "QuantizeLinear"
    # Whatever else reads the series reads them rounded.
    readers = [node for node in model.graph.node if rounding.input[0] in node.input]
    assert readers == [rounding]
    types = {info.name: info.type.tensor_type.elem_type for info in model.graph.value_info}
    assert types[plots.output[0]] == onnx.TensorProto.UINT8


@pytest.mark.slow
def test_int8_predictions_are_close_to_float32(small: tuple[PixelGraph, Path]) -> None:
    graph, path = small
    inputs = pixel_inputs(graph, BATCH, 30)
    expected = outputs_of(graph, inputs).numpy()
    got = open_cpu(path).run(None, inputs)[0]
    off = np.abs(got - expected)
    assert 0 < off.mean() < 0.1 * np.abs(expected - expected.mean(axis=0)).mean()
    assert check_parity_int8(graph, path, inputs) == pytest.approx(off.mean(), rel=0.3)


@pytest.mark.slow
def test_int8_returns_nan_for_pixels_without_a_date(small: tuple[PixelGraph, Path]) -> None:
    graph, path = small
    inputs = pixel_inputs(graph, 9, 30)
    inputs["valid"][[2, 5]] = False
    session = open_cpu(path)
    together = session.run(None, inputs)[0]
    assert np.isnan(together).all(axis=1).nonzero()[0].tolist() == [2, 5]
    # Scales are fixed: a pixel's prediction does not depend on its neighbours in the batch.
    for i in (0, 4):
        alone = {n: a if n == "days" else a[i : i + 1] for n, a in inputs.items()}
        np.testing.assert_allclose(session.run(None, alone)[0][0], together[i], atol=1e-6)

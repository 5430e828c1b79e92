"""The band of a forecast by how far a pixel lies from the training data, and a bundle's weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from models.band import ForecastBand, relative_disagreement
from models.encoders import ChannelNorm, PixelEncoder
from models.graph import PixelGraph
from models.heads import ForecastHead
from training.band import Band, Forecasts, apply_band, fit_band
from training.bundle_weights import NotUnfolded, load_folded
from training.config import BANDS, INDICES
from training.graph_export import folded
from training.onnx_export import to_onnx
from training.parity import pixel_inputs

R, N, H, S, D = 3, 40, 4, 3, 16


def outputs_of(rng: np.random.Generator) -> np.ndarray:
    """Quantiles of R networks (R, N, H, S, 3)."""
    medians = rng.uniform(0.2, 0.8, (1, N, H, S)) + rng.normal(0, 0.03, (R, N, H, S))
    below, above = rng.uniform(0.02, 0.2, (2, R, N, H, S))
    return np.stack([medians - below, medians, medians + above], axis=-1)


class TestBand:
    def test_it_changes_nothing_until_it_is_calibrated(self) -> None:
        rng = np.random.default_rng(0)
        outputs = torch.from_numpy(outputs_of(rng))
        band = ForecastBand(D, H)
        after = band(outputs, torch.from_numpy(rng.normal(size=(N, D))))
        torch.testing.assert_close(after, outputs.mean(dim=0))

    def test_the_graph_computes_what_the_calibration_computes(self) -> None:
        rng = np.random.default_rng(1)
        outputs, embedding = outputs_of(rng), rng.normal(size=(N, D))
        mean = outputs.mean(axis=0)
        apart = outputs[..., 1].std(axis=0).mean(axis=(1, 2))
        half = (mean[..., 2] - mean[..., 0]).mean(axis=(1, 2)) / 2
        found = Forecasts(
            quantiles=mean,
            disagreement=apart / half,
            embedding=embedding,
            target=mean[..., 1],
            known=np.ones((N, H, S), bool),
        )
        calibrated = Band(
            weight=rng.normal(size=D).round(3),
            bias=0.25,
            near=np.array([[0.9, 1.1]] * H),
            far=rng.uniform(1.2, 2.0, (H, 2)).round(3),
        )
        band = ForecastBand(D, H)
        apply_band(band, calibrated.document())
        after = band(torch.from_numpy(outputs), torch.from_numpy(embedding)).numpy()
        np.testing.assert_allclose(after, calibrated.scaled(found), atol=1e-5)
        np.testing.assert_allclose(after[..., 1], mean[..., 1])
        assert (np.diff(after, axis=-1) > 0).all()

    def test_one_network_does_not_disagree(self) -> None:
        outputs = torch.from_numpy(outputs_of(np.random.default_rng(2))[:1])
        assert (relative_disagreement(outputs) == 0).all()

    def test_weights_of_an_earlier_version_are_not_calibrated(self) -> None:
        graph = forecast_graph()
        state = {n: v for n, v in graph.state_dict().items() if not n.startswith("band.")}
        assert graph.band is not None
        graph.band.far.fill_(2.0)
        graph.load_state_dict(state)
        assert (graph.band.far == 1).all()


def forecasts(rng: np.random.Generator, domain: float, error: float, n: int = 1500) -> Forecasts:
    """Forecasts whose band is right for an error of 0.1; `domain` moves the embedding."""
    median = rng.uniform(0.2, 0.8, (n, H, S))
    half = 0.1 * 1.2815516
    return Forecasts(
        quantiles=np.stack([median - half, median, median + half], axis=-1),
        disagreement=rng.uniform(0.05, 0.1, n) * error / 0.1,
        embedding=rng.normal(size=(n, D)) + domain * np.array([1.0] * 4 + [0.0] * (D - 4)),
        target=median + rng.normal(0, error, median.shape),
        known=rng.random(median.shape) < 0.8,
    )


def coverage(band: Band, found: Forecasts) -> float:
    after = band.scaled(found)
    inside = (found.target >= after[..., 0]) & (found.target <= after[..., 2])
    return float(inside[found.known].mean())


class TestFit:
    def test_the_band_is_right_near_and_in_regions_not_fitted_on(self) -> None:
        rng = np.random.default_rng(0)
        near = [forecasts(rng, -1.5, 0.1)]
        far = [forecasts(rng, 1.5, error) for error in (0.17, 0.2)]
        band = fit_band(near, far)
        assert coverage(band, forecasts(rng, -1.5, 0.1)) == pytest.approx(0.8, abs=0.02)
        # Wider than 0.8 by design: a further region differs from those fitted on.
        assert 0.78 < coverage(band, forecasts(rng, 1.5, 0.185)) < 0.88
        assert coverage(band, forecasts(rng, -1.5, 0.185)) < 0.7

    def test_networks_that_disagree_widen_the_band(self) -> None:
        rng = np.random.default_rng(1)
        band = fit_band([forecasts(rng, -1.5, 0.1)], [forecasts(rng, 1.5, 0.2)])
        sure, unsure = forecasts(rng, 1.5, 0.2), forecasts(rng, 1.5, 0.3)
        widths = [np.ptp(band.scaled(found), axis=-1).mean() for found in (sure, unsure)]
        assert widths[1] > 1.1 * widths[0]

    def test_regions_have_the_same_weight_whatever_their_size(self) -> None:
        rng = np.random.default_rng(2)
        near, small = [forecasts(rng, -1.5, 0.1)], forecasts(rng, 1.5, 0.3, n=400)
        large = forecasts(rng, 1.5, 0.15, n=4000)
        thinned = Forecasts(**{name: value[:400] for name, value in vars(large).items()})
        both, alike = fit_band(near, [small, large]), fit_band(near, [small, thinned])
        assert both.far == pytest.approx(alike.far, rel=0.1)


def forecast_graph(width: int = 8) -> PixelGraph:
    """Two networks whose normalisation has statistics of its own, as after training."""
    torch.manual_seed(1)

    def member() -> tuple[PixelEncoder, ForecastHead]:
        encoder = PixelEncoder(width=width, embedding=D, calendar=True, bands=3, depths=(0, 1, 2))
        return encoder, ForecastHead(D, steps=36, indices=3, horizon=H, quantiles=3)

    (encoder, head), other = member(), member()
    graph = PixelGraph(
        bands=BANDS, indices=INDICES, steps=36, step_days=10, encoder=encoder, head=head,
        others=[other], reflectance=True,
    )  # fmt: skip
    for norm in graph.modules():
        if isinstance(norm, ChannelNorm):
            torch.nn.init.normal_(norm.running_mean, std=0.5)
            torch.nn.init.uniform_(norm.running_var, 0.5, 2.0)
            torch.nn.init.normal_(norm.weight, mean=1.0, std=0.3)
            torch.nn.init.normal_(norm.bias, std=0.3)
    return graph.eval()


@pytest.mark.slow
class TestBundleWeights:
    @pytest.fixture(scope="class")
    def exported(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[PixelGraph, Path]:
        graph, path = forecast_graph(), tmp_path_factory.mktemp("bundle") / "model.onnx"
        inputs = pixel_inputs(graph, 3, 9)
        given = [torch.from_numpy(x) for x in inputs.values()]
        to_onnx(folded(graph), path, inputs=list(inputs), output="quantiles", example=given)
        return graph, path

    def test_the_graph_of_a_file_computes_what_was_exported(
        self, exported: tuple[PixelGraph, Path]
    ) -> None:
        graph, path = exported
        torch.manual_seed(7)
        again = forecast_graph()
        for weight in again.parameters():
            torch.nn.init.normal_(weight)
        again = load_folded(again, path)
        given = [torch.from_numpy(x) for x in pixel_inputs(graph, 20, 30).values()]
        with torch.no_grad():
            torch.testing.assert_close(again(*given), graph(*given), atol=1e-4, rtol=0)
            twice = folded(again)
            torch.testing.assert_close(twice(*given), graph(*given), atol=1e-4, rtol=0)

    def test_a_file_of_another_shape_is_named(self, exported: tuple[PixelGraph, Path]) -> None:
        with pytest.raises(NotUnfolded, match=r"model\.onnx holds no .* of the shape"):
            load_folded(forecast_graph(width=12), exported[1])
        assert onnx.load(exported[1]).graph.initializer

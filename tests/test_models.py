"""The graph, part by part and whole, against independent references."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from models.encoders import PatchEncoder, PixelEncoder
from models.formulas import FORMULAS, INDEX_CENTER, INDEX_SPREAD
from models.graph import PatchGraph, PixelGraph
from models.heads import ClassificationHead, ForecastHead, ProjectionHead
from models.indices import SpectralIndices
from models.recurrence import recurrence_plot
from models.timegrid import TimeGrid

BANDS = ("B02", "B04", "B08")
INDICES = ("ndvi", "evi", "savi")


def random_series(n: int, t: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reflectance with a third of the dates missing as NaN, but for the first."""
    rng = torch.Generator().manual_seed(seed)
    values = torch.rand(n, t, 3, generator=rng) * 0.5 + 0.02
    valid = torch.rand(n, t, generator=rng) > 0.33
    valid[:, 0] = True
    values[~valid] = torch.nan
    days = torch.sort(torch.randperm(350, generator=rng)[:t]).values.float()
    return values, valid, days


def pixel_graph(
    head: ClassificationHead | ForecastHead | None = None, *, calendar: bool = False
) -> PixelGraph:
    torch.manual_seed(0)
    encoder = PixelEncoder(steps=36, width=16, embedding=32, calendar=calendar)
    graph = PixelGraph(
        bands=BANDS, indices=INDICES, steps=36, step_days=10, encoder=encoder, head=head
    )
    return graph.eval()


def class_graph(members: int = 1, **options: Any) -> PixelGraph:
    torch.manual_seed(0)
    bands = 3 if options.get("reflectance") else 0
    (encoder, head), *others = [
        (PixelEncoder(width=16, embedding=32, bands=bands), ClassificationHead(32, 5))
        for _ in range(members)
    ]
    return PixelGraph(
        bands=BANDS,
        indices=INDICES,
        steps=36,
        step_days=10,
        encoder=encoder,
        head=head,
        others=others,
        **options,
    ).eval()


class TestSpectralIndices:
    def test_equal_the_published_formulas(self) -> None:
        rng = np.random.default_rng(0)
        blue, red, nir = rng.uniform(0.01, 0.5, (3, 200))
        got = SpectralIndices(INDICES, BANDS)(torch.tensor(np.stack([blue, red, nir], -1))).numpy()
        ndvi = (nir - red) / (nir + red)
        evi = np.clip(2.5 * (nir - red) / (nir + 6 * red - 7.5 * blue + 1), -1.5, 1.5)
        evi[nir + 6 * red - 7.5 * blue + 1 <= 0.05] = np.nan
        savi = 1.5 * (nir - red) / (nir + red + 0.5)
        np.testing.assert_allclose(got, np.stack([ndvi, evi, savi], -1), atol=1e-12)

    @pytest.mark.parametrize("name", FORMULAS)
    def test_sums_of_weighted_bands_are_the_formula(self, name: str) -> None:
        needs, formula = FORMULAS[name]
        bands = ("B01", *sorted(needs))
        values = torch.rand(50, len(bands), dtype=torch.float64) * 0.4 + 0.05
        numerator, denominator = formula(*(values[:, bands.index(band)] for band in needs))
        expected = (numerator / denominator).clamp(-1.5, 1.5)
        expected[denominator <= 0.05] = torch.nan
        got = SpectralIndices((name,), bands)(values)
        torch.testing.assert_close(got[:, 0], expected, equal_nan=True)

    @pytest.mark.parametrize("missing", range(3))
    def test_a_missing_band_is_nan_and_not_zero(self, missing: int) -> None:
        values = torch.tensor([0.1, 0.1, 0.4])
        values[missing] = torch.nan
        got = SpectralIndices(("evi",), BANDS)(values)
        assert torch.isnan(got).all()

    def test_a_vanishing_denominator_is_missing(self) -> None:
        # Bright blue cloud: 0.3 + 6 * 0.3 - 7.5 * 0.42 + 1 = -0.05.
        got = SpectralIndices(INDICES, BANDS)(torch.tensor([0.42, 0.3, 0.3]))
        assert torch.isnan(got).tolist() == [False, True, False]

    def test_bands_are_found_by_name(self) -> None:
        values = torch.tensor([0.05, 0.07, 0.31])
        turned = SpectralIndices(INDICES, BANDS[::-1])(values.flip(0))
        torch.testing.assert_close(turned, SpectralIndices(INDICES, BANDS)(values))

    def test_an_index_without_its_bands_is_an_error(self) -> None:
        with pytest.raises(KeyError):
            SpectralIndices(("ndmi",), BANDS)


class TestTimeGrid:
    def test_equals_a_plain_loop(self) -> None:
        grid = TimeGrid(12, 30.0)
        _, valid, days = random_series(4, 9)
        x = torch.rand(4, 2, 9)
        series, observed = grid(x.masked_fill(~valid[:, None], torch.nan), valid, days)
        for n in range(4):
            for m in range(12):
                gap = (days[valid[n]] - 30.0 * m).numpy()
                narrow = np.exp(-0.5 * (gap / 13.5) ** 2)
                weight = narrow + 1e-3 / (1 + (gap / 60.0) ** 2)
                expected = (x[n][:, valid[n]].numpy() * weight).sum(-1) / weight.sum()
                np.testing.assert_allclose(series[n, :, m], expected, rtol=1e-4)
                density = narrow.sum()
                np.testing.assert_allclose(observed[n, 0, m], density / (density + 0.5), atol=1e-5)

    def test_a_regular_clear_series_stays_what_it_is(self) -> None:
        x = torch.sin(torch.arange(36) / 6.0)[None, None]
        days = torch.arange(36) * 10.0
        series, observed = TimeGrid(36, 10.0)(x, torch.ones(1, 36, dtype=torch.bool), days)
        assert (series - x).abs().max() < 0.03
        assert observed.min() > 0.6

    def test_no_step_is_empty_even_with_one_distant_date(self) -> None:
        series, observed = TimeGrid(36, 10.0)(
            torch.full((1, 1, 1), 0.7), torch.tensor([[True]]), torch.tensor([0.0])
        )
        torch.testing.assert_close(series, torch.full((1, 1, 36), 0.7))
        assert observed[0, 0, -1] < 1e-20

    def test_a_pixel_without_dates_is_nan_and_does_not_affect_others(self) -> None:
        valid = torch.tensor([[False, False], [True, False]])
        series, _ = TimeGrid(4, 10.0)(torch.rand(2, 1, 2), valid, torch.tensor([0.0, 10.0]))
        assert torch.isnan(series[0]).all()
        assert torch.isfinite(series[1]).all()

    def test_a_periodic_grid_places_all_years_on_one(self) -> None:
        _, valid, days = random_series(4, 30)
        x = torch.rand(4, 2, 30)
        grid = TimeGrid(36, 10.0, period=365.25)
        years = torch.arange(30) % 5
        folded, seen = grid(x, valid, days)
        spread, seen_again = grid(x, valid, days + years * 365.25)
        torch.testing.assert_close(folded, spread, atol=1e-3, rtol=0)
        torch.testing.assert_close(seen, seen_again, atol=1e-3, rtol=0)

    def test_the_ends_of_a_periodic_grid_are_neighbours(self) -> None:
        # One date, a day before the year begins anew.
        one = torch.full((1, 1, 1), 0.7), torch.tensor([[True]]), torch.tensor([364.25])
        _, stretch = TimeGrid(36, 10.0)(*one)
        _, year = TimeGrid(36, 10.0, period=365.25)(*one)
        assert stretch[0, 0, 0] < 1e-20
        assert year[0, 0, 0] > 0.6

    def test_dates_of_low_weight_affect_only_their_neighbours(self) -> None:
        x = torch.tensor([[[0.2, 0.8, 0.8]]])
        valid = torch.ones(1, 3, dtype=torch.bool)
        days = torch.tensor([10.0, 11.0, 200.0])
        worth = torch.tensor([[1.0, 1e-3, 1e-3]])
        grid = TimeGrid(36, 10.0)
        alike, seen = grid(x, valid, days)
        series, seen_again = grid(x, valid, days, worth)
        assert alike[0, 0, 1] > 0.45
        assert series[0, 0, 1] == pytest.approx(0.2, abs=2e-3)
        # Nothing better is near, so that it decides there as before.
        assert series[0, 0, 20] == pytest.approx(0.8, abs=1e-2)
        torch.testing.assert_close(seen, seen_again)


@pytest.mark.slow
class TestRecurrencePlot:
    @pytest.mark.parametrize("threshold", [None, 0.2, "point", "distance"])
    @pytest.mark.parametrize(("dimension", "time_delay"), [(1, 1), (2, 1), (3, 4)])
    def test_equals_pyts(self, threshold: object, dimension: int, time_delay: int) -> None:
        x = np.random.default_rng(3).uniform(-1, 1, (7, 36))
        from pyts.image import RecurrencePlot  # takes seconds

        expected = RecurrencePlot(
            dimension=dimension, time_delay=time_delay, threshold=threshold, percentage=13
        ).transform(x)
        got = recurrence_plot(
            torch.tensor(x),
            dimension=dimension,
            time_delay=time_delay,
            threshold=threshold,  # type: ignore[arg-type]  # parametrised
            percentage=13,
        )
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-6)

    @pytest.mark.parametrize("percentage", [0.0, 10.0, 50.0, 100.0])
    def test_point_threshold_at_the_ends(self, percentage: float) -> None:
        x = np.random.default_rng(4).uniform(-1, 1, (3, 12))
        from pyts.image import RecurrencePlot

        expected = RecurrencePlot(threshold="point", percentage=percentage).transform(x)
        got = recurrence_plot(torch.tensor(x), threshold="point", percentage=percentage)
        np.testing.assert_array_equal(got.numpy(), expected)


class TestHeads:
    def test_quantiles_never_cross(self) -> None:
        torch.manual_seed(0)
        head = ForecastHead(8, steps=36, indices=3, horizon=10, quantiles=5)
        torch.nn.init.normal_(head.encoder.weight, std=3.0)
        out = head(torch.randn(50, 8), torch.randn(50, 3, 36))
        assert out.shape == (50, 10, 3, 5)
        assert (out.diff(dim=-1) >= 0).all()

    def test_an_untrained_forecast_is_persistence(self) -> None:
        head = ForecastHead(8, steps=36, indices=3, horizon=10, quantiles=3)
        with torch.no_grad():
            head.series.bias.zero_()
            head.encoder.weight.zero_()
            head.encoder.bias.zero_()
        series = torch.randn(5, 3, 36)
        out = head(torch.randn(5, 8), series)
        torch.testing.assert_close(out[..., 1], series[:, None, :, -1].expand(5, 10, 3))

    def test_temperature_changes_confidence_and_not_the_class(self) -> None:
        head = ClassificationHead(8, 5)
        logits = torch.randn(20, 5)
        sharp = head.probabilities(logits)
        head.temperature.fill_(4.0)
        flat = head.probabilities(logits)
        assert (sharp.argmax(-1) == flat.argmax(-1)).all()
        assert (flat.max(-1).values < sharp.max(-1).values).all()

    def test_projections_have_unit_length(self) -> None:
        out = ProjectionHead(8, 4)(torch.randn(6, 8))
        torch.testing.assert_close(out.norm(dim=-1), torch.ones(6))


class TestGraph:
    def test_missing_dates_do_not_matter(self) -> None:
        """Values where a date is not valid do not change the prediction."""
        graph = pixel_graph(ClassificationHead(32, 5))
        values, valid, days = random_series(6, 14)
        keep = torch.ones(14, dtype=torch.bool)
        keep[[3, 8]] = False
        valid[:, ~keep] = False
        expected = graph(values[:, keep], valid[:, keep], days[keep])
        for fill in (torch.nan, torch.inf, 0.0, 1e30):
            spoilt = values.masked_fill(~valid[..., None], fill)
            torch.testing.assert_close(graph(spoilt, valid, days), expected, atol=1e-5, rtol=0)

    def test_a_nan_marked_valid_is_missing(self) -> None:
        graph = pixel_graph(ClassificationHead(32, 5))
        values, valid, days = random_series(2, 8)
        expected = graph(values, valid, days)
        torch.testing.assert_close(graph(values, torch.ones_like(valid), days), expected)

    def test_order_of_dates_and_pixels_does_not_matter(self) -> None:
        graph = pixel_graph(ClassificationHead(32, 5))
        values, valid, days = random_series(6, 14)
        expected = graph(values, valid, days)
        turned = graph(values.flip(0, 1), valid.flip(0, 1), days.flip(0)).flip(0)
        torch.testing.assert_close(turned, expected, atol=1e-5, rtol=0)

    def test_a_pixel_without_dates_predicts_nan_and_does_not_affect_others(self) -> None:
        graph = pixel_graph(ClassificationHead(32, 5))
        values, valid, days = random_series(3, 8)
        expected = graph(values, valid, days)
        valid[1] = False
        got = graph(values, valid, days)
        assert torch.isnan(got[1]).all()
        torch.testing.assert_close(got[[0, 2]], expected[[0, 2]])

    def test_indices_stay_in_float32_where_the_encoder_is_trained_in_bfloat16(self) -> None:
        graph = pixel_graph(ClassificationHead(32, 5))
        values, valid, days = random_series(6, 14)
        valid[0, 1:] = False  # one date far from most steps: in bfloat16 no step has a weight
        expected = graph.regular(values, valid, days)
        with torch.autocast("cpu", torch.bfloat16):
            got = graph.regular(values, valid, days)
            assert graph.encoder(got[0], got[1]).dtype == torch.bfloat16
            assert graph(values, valid, days).isfinite().all()
        for series, before in zip(got, expected, strict=True):
            assert series is before or (series.dtype == torch.float32 and series.equal(before))

    def test_calendar_graph_sees_the_season(self) -> None:
        graph = pixel_graph(None, calendar=True)
        values, valid, days = random_series(2, 8)
        winter = graph(values, valid, days, torch.full((2,), 1.0))
        summer = graph(values, valid, days, torch.full((2,), 182.0))
        year_on = graph(values, valid, days, torch.full((2,), 366.25))
        assert (winter - summer).abs().max() > 1e-3
        torch.testing.assert_close(winter, year_on, atol=1e-4, rtol=0)

    def test_an_embedding_with_series_continues_with_what_the_encoder_sees(self) -> None:
        torch.manual_seed(0)
        encoder = PixelEncoder(steps=36, width=16, embedding=32, bands=3)
        common = {"bands": BANDS, "indices": INDICES, "steps": 36, "step_days": 10}
        common |= {"encoder": encoder, "reflectance": True}
        alone = PixelGraph(**common, head=None).eval()
        both = PixelGraph(**common, head=None, with_series=True).eval()
        values, valid, days = random_series(6, 14)
        found = both(values, valid, days)
        series, _, reflectance = both.regular(values, valid, days)
        assert found.shape == (6, 32 + 6 * 36)
        torch.testing.assert_close(found[:, :32], alone(values, valid, days))
        levels = (series - INDEX_CENTER) / INDEX_SPREAD
        torch.testing.assert_close(found[:, 32 : 32 + 3 * 36].reshape(6, 3, 36), levels)
        # Roots of reflectance: in the order of reflectance, within the range of the levels.
        roots = found[:, 32 + 3 * 36 :].reshape(6, 3, 36)
        assert roots.flatten().argsort().equal(reflectance.clamp(0, 1).flatten().argsort())
        assert roots.abs().max() < 4
        with pytest.raises(ValueError, match="give no head"):
            PixelGraph(**common, head=ClassificationHead(32, 5), with_series=True)


class TestWhatTheGridIsGiven:
    def test_a_hazy_date_next_to_a_clear_one_has_little_weight(self) -> None:
        clear = torch.tensor([0.03, 0.03, 0.40]).expand(1, 36, 3).clone()
        hazy = clear.clone()
        hazy[:, ::2] += torch.tensor([0.25, 0.2, 0.1])
        days, valid = torch.arange(36) * 5.0, torch.ones(1, 36, dtype=torch.bool)

        def ndvi(graph: PixelGraph) -> torch.Tensor:
            return graph.regular(hazy, valid, days)[0][0, 0, 2:16]

        expected = class_graph().regular(clear, valid, days)[0][0, 0, 2:16]
        assert (ndvi(class_graph()) - expected).abs().max() > 0.1
        torch.testing.assert_close(ndvi(class_graph(clarity=40.0)), expected, atol=0.02, rtol=0)

    def test_nothing_underflows_under_snow(self) -> None:
        snow = torch.full((2, 5, 3), 0.95)
        days, valid = torch.arange(5) * 3.0, torch.ones(2, 5, dtype=torch.bool)
        graph = class_graph(clarity=60.0, reflectance=True)
        assert torch.isfinite(graph(snow, valid, days)).all()

    def test_bands_follow_the_indices(self) -> None:
        values, valid, days = random_series(4, 20)
        plain, seen, none = class_graph().regular(values, valid, days)
        series, observed, bands = class_graph(reflectance=True).regular(values, valid, days)
        assert none is None
        torch.testing.assert_close(series, plain)
        torch.testing.assert_close(observed, seen)
        # A date whose index cannot be computed is missing in all.
        usable = valid & torch.isfinite(SpectralIndices(INDICES, BANDS)(values)).all(dim=-1)
        expected, _ = TimeGrid(36, 10)(values.transpose(1, 2), usable, days)
        torch.testing.assert_close(bands, expected)

    def test_ground_of_equal_index_and_double_brightness_is_distinguished(self) -> None:
        values, valid, days = random_series(4, 20)
        graph = PixelGraph(
            bands=BANDS,
            indices=("ndvi",),
            steps=36,
            step_days=10,
            encoder=PixelEncoder(indices=1, width=16, embedding=32, bands=3),
            head=None,
            reflectance=True,
        ).eval()
        assert not torch.allclose(graph(values, valid, days), graph(0.5 * values, valid, days))


class TestSeveralNetworks:
    def test_the_output_is_the_mean_of_the_networks(self) -> None:
        graph, series = class_graph(3), random_series(4, 20)
        alone = []
        for encoder, head in ((graph.encoder, graph.head), *graph.others):
            single = PixelGraph(
                bands=BANDS, indices=INDICES, steps=36, step_days=10, encoder=encoder, head=head
            ).eval()
            alone.append(single.raw(*series))
        assert not torch.allclose(alone[0], alone[1])
        torch.testing.assert_close(graph.raw(*series), sum(alone) / 3)
        torch.testing.assert_close(graph(*series), torch.softmax(sum(alone) / 3, dim=-1))


class TestSymmetries:
    @pytest.mark.slow
    def test_the_output_does_not_depend_on_the_patchs_orientation(self) -> None:
        patches = torch.rand(2, 3, 64, 64)
        turned = torch.from_numpy(np.rot90(patches.numpy(), axes=(2, 3)).copy())
        with torch.no_grad():
            plain, mean = patch_graph(views=1), patch_graph(views=8)
            assert not torch.allclose(plain(patches), plain(turned), atol=1e-6)
            torch.testing.assert_close(mean(patches), mean(turned))
            torch.testing.assert_close(mean(patches), mean(patches.flip(-1)))

    @pytest.mark.slow
    def test_networks_share_the_symmetries_among_them(self) -> None:
        graph = patch_graph(views=8, members=2)
        patches = torch.rand(2, 3, 64, 64)
        calls = {0: 0, 1: 0}
        encoders = [graph.encoder, graph.others[0][0]]
        for i, encoder in enumerate(encoders):
            encoder.register_forward_hook(lambda *_, i=i: calls.update({i: calls[i] + 1}))
        with torch.no_grad():
            got = graph.raw(patches)
            assert calls == {0: 4, 1: 4}
            # With the same weights, both predict what one network predicts from all eight patches.
            graph.others.load_state_dict(
                {
                    **{f"0.0.{k}": v for k, v in graph.encoder.state_dict().items()},
                    **{f"0.1.{k}": v for k, v in graph.head.state_dict().items()},
                }
            )
            alone = PatchGraph(encoder=graph.encoder, head=graph.head, views=8).eval()
            torch.testing.assert_close(graph.raw(patches), alone.raw(patches))
            assert not torch.allclose(got, alone.raw(patches))

    def test_training_uses_the_patch_in_its_orientation(self) -> None:
        graph = patch_graph(views=8)
        patches = torch.rand(2, 3, 64, 64)
        graph.train()
        for module in graph.modules():
            if isinstance(module, torch.nn.Dropout | torch.nn.BatchNorm2d):
                module.eval()
        with torch.no_grad():
            torch.testing.assert_close(graph.raw(patches), patch_graph(views=1).raw(patches))


class TestContrast:
    def test_brightness_of_a_patch_does_not_change_its_contrast(self) -> None:
        """The stem's input holds each band twice: scaled, and standardised by the patch."""
        patches = np.random.default_rng(0).uniform(0.05, 0.1, (2, 3, 64, 64)).astype(np.float32)
        for light in (patches, patches * 2.0, patches + 0.1):
            seen = stem_input(torch.from_numpy(light))
            np.testing.assert_allclose(seen[:, :3], light / 0.1375 - 1.0, atol=1e-5)
            bands = light / 0.1375
            off = bands - bands.mean(axis=(2, 3), keepdims=True)
            expected = off / (bands.std(axis=(2, 3), keepdims=True) + 0.03)
            np.testing.assert_allclose(seen[:, 3:], expected, atol=1e-4)

    def test_a_patch_of_one_colour_has_no_contrast(self) -> None:
        assert not stem_input(torch.full((1, 3, 64, 64), 0.07))[:, 3:].abs().max() > 1e-4

    def test_networks_predict_their_mean(self) -> None:
        graph = patch_graph(members=2)
        patches = torch.rand(2, 3, 64, 64)
        with torch.no_grad():
            first, second = graph.each(patches)
            torch.testing.assert_close(graph.raw(patches), (first + second) / 2)
        assert not torch.allclose(first, second)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_finest_level_has_the_configured_stride(stride: int) -> None:
    encoder = PatchEncoder(width=8, stride=stride).eval()
    shapes: list[torch.Size] = []
    encoder.stem.register_forward_hook(lambda _, __, output: shapes.append(output.shape))
    with torch.no_grad():
        encoder(torch.rand(2, 3, 64, 64))
    assert shapes == [(2, 8, 64 // stride, 64 // stride)]


def stem_input(patches: torch.Tensor) -> torch.Tensor:
    encoder = PatchEncoder(width=8, contrast=True).eval()
    seen: list[torch.Tensor] = []
    encoder.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        encoder(patches)
    return seen[0]


def patch_graph(
    *, views: int = 1, contrast: bool = False, members: int = 1, stride: int = 2
) -> PatchGraph:
    torch.manual_seed(0)
    (encoder, head), *others = [
        (
            PatchEncoder(width=8, embedding=16, contrast=contrast, stride=stride),
            ClassificationHead(16, 10),
        )
        for _ in range(members)
    ]
    # Far enough from zero that classes differ.
    for _, each in ((encoder, head), *others):
        torch.nn.init.normal_(each.linear.weight)
    return PatchGraph(encoder=encoder, head=head, others=others, views=views).eval()

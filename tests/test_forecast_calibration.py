"""Forecasts calibrated by how much a pixel is like the training data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from models.encoders import PixelEncoder
from models.forecast_calibration import (
    ForecastCalibration,
    anchors_of,
    relative_disagreement,
)
from models.graph import PixelGraph
from models.heads import ForecastHead
from training.config import BANDS, INDICES, ZOO, Run, changed
from training.datasets import PixelSet
from training.finetune import finetune, load_encoder, load_finished
from training.forecast_calibration import (
    Calibration,
    Forecasts,
    Nearness,
    fit_calibration,
    fit_nearness,
    write_calibration,
)
from training.forecasting import SCORED_SOURCE
from training.networks import pixel_graph
from training.regions import (
    NoRegions,
    Plan,
    _forecasts_from_every_month,
    evaluate_runs,
    forecast_region,
    read_report,
)
from training.series import tabulate

R, N, H, S, D = 3, 40, 4, 3, 16


def outputs_of(rng: np.random.Generator) -> np.ndarray:
    """Quantiles of R networks (R, N, H, S, 3)."""
    medians = rng.uniform(0.2, 0.8, (1, N, H, S)) + rng.normal(0, 0.03, (R, N, H, S))
    below, above = rng.uniform(0.02, 0.2, (2, R, N, H, S))
    return np.stack([medians - below, medians, medians + above], axis=-1)


class TestCalibration:
    def test_it_changes_nothing_until_it_is_calibrated(self) -> None:
        rng = np.random.default_rng(0)
        outputs = torch.from_numpy(outputs_of(rng))
        embedding, anchors = rng.normal(size=(N, D)), rng.uniform(0.2, 0.8, (N, 2, S))
        after = ForecastCalibration(D)(outputs, *map(torch.from_numpy, (embedding, anchors)))
        torch.testing.assert_close(after, outputs.mean(dim=0))

    def test_the_graph_computes_what_the_calibration_computes(self) -> None:
        rng = np.random.default_rng(1)
        outputs, embedding = outputs_of(rng), rng.normal(size=(N, D))
        nearness = fit_nearness([rng.normal(size=(500, D))], [rng.normal(size=(50, D))])
        # Half of the pixels lie nearer than the closest that counts, or further than the farthest.
        embedding *= np.repeat([0.5, 1.0, 1.5, 20.0], N // 4)[:, None]
        mean = outputs.mean(axis=0)
        apart = outputs[..., 1].std(axis=0).mean(axis=(1, 2))
        half = (mean[..., 2] - mean[..., 0]).mean(axis=(1, 2)) / 2
        found = Forecasts(
            quantiles=mean,
            disagreement=apart / half,
            embedding=embedding,
            anchors=rng.uniform(0.2, 0.8, (N, 2, S)),
            distance=nearness.of(embedding),
            target=mean[..., 1],
            known=np.ones((N, H, S), bool),
        )
        fitted = Calibration(
            weight=rng.normal(size=D).round(3),
            bias=0.25,
            near=0.9,
            far=1.4,
            damping=np.array([0.3, 0.1]),
            damping_elsewhere=np.array([0.25, 0.2]),
        )
        calibration = ForecastCalibration(D)
        write_calibration(calibration, fitted.document(), nearness)
        after = calibration(*map(torch.from_numpy, (outputs, embedding, found.anchors))).numpy()
        np.testing.assert_allclose(after, fitted.calibrated(found), atol=1e-5)
        assert len(np.unique(found.distance)) > N // 4
        # The median moves towards the anchors, and never by more than the damping.
        full = 0.3 * found.anchors[:, :1] + 0.1 * found.anchors[:, 1:] - 0.4 * mean[..., 1]
        share = (after[..., 1] - mean[..., 1]) / full
        assert (share > -1e-3).all()
        assert (share < 1.0 + 1e-3).all()
        assert np.ptp(share) > 0.5
        assert (np.diff(after, axis=-1) > 0).all()
        # Of pixels whose place is elsewhere, whatever their embedding.
        far = np.arange(N) % 2 == 0
        given = (outputs, embedding, found.anchors, far.astype(outputs.dtype))
        told = calibration(*map(torch.from_numpy, given)).numpy()
        expected = fitted.calibrated(found, elsewhere=True)
        np.testing.assert_allclose(told[far], expected[far], atol=1e-5)
        np.testing.assert_allclose(told[~far], after[~far], atol=1e-6)
        moved = 0.25 * found.anchors[:, :1] + 0.2 * found.anchors[:, 1:] + 0.55 * mean[..., 1]
        np.testing.assert_allclose(told[far, ..., 1], moved[far], atol=1e-5)

    def test_a_stored_calibration_without_damping_damps_nothing(self) -> None:
        rng = np.random.default_rng(3)
        fitted = fit_calibration([forecasts(rng, -1.5, 0.1)], [forecasts(rng, 1.5, 0.2)])
        later = {"damping", "damping_elsewhere"}
        earlier = {name: v for name, v in fitted.document().items() if name not in later}
        calibration = ForecastCalibration(D)
        calibration.damping.fill_(1.0)
        calibration.damping_elsewhere.fill_(1.0)
        write_calibration(calibration, earlier, fit_nearness([rng.normal(size=(50, D))], unit=1.0))
        assert (calibration.damping == 0).all()
        assert (calibration.damping_elsewhere == 0).all()
        assert calibration.far == pytest.approx(fitted.far, abs=1e-4)

    def test_the_anchors_are_the_last_value_and_the_mean_of_what_was_observed(self) -> None:
        series = torch.tensor([[[0.2, 0.9, 0.4], [0.1, 0.9, 0.3]]])
        observed = torch.tensor([[[1.0, 0.0, 1.0]]])
        expected = torch.tensor([[[0.4, 0.3], [0.3, 0.2]]])
        torch.testing.assert_close(anchors_of(series, observed), expected)
        missing = anchors_of(torch.full((1, 2, 3), torch.nan), torch.zeros(1, 1, 3))
        assert missing.isnan().all()

    def test_one_network_does_not_disagree(self) -> None:
        outputs = torch.from_numpy(outputs_of(np.random.default_rng(2))[:1])
        assert (relative_disagreement(outputs) == 0).all()

    def test_weights_of_an_earlier_version_are_not_calibrated(self) -> None:
        graph = PixelGraph(
            bands=BANDS,
            indices=INDICES,
            steps=36,
            step_days=10,
            encoder=PixelEncoder(width=8, embedding=D, calendar=True),
            head=ForecastHead(D, steps=36, indices=3, horizon=H, quantiles=3),
        )
        state = {n: v for n, v in graph.state_dict().items() if not n.startswith("calibration.")}
        assert graph.calibration is not None
        graph.calibration.far.fill_(2.0)
        graph.load_state_dict(state)
        assert (graph.calibration.far == 1).all()
        # The calibration had other names.
        for number, name in enumerate(("band.far", "interval.far")):
            graph.load_state_dict(state | {name: torch.full((), 3.0 + number)})
            assert (graph.calibration.far == 3 + number).all()

    def test_a_calibration_of_an_earlier_shape_does_not_cost_networks(self, tmp_path: Path) -> None:
        config = changed(ZOO["forecast-vi"], ["encoder.width=8", "encoder.embedding=16"])
        assert config.members > 1

        def graph() -> PixelGraph:
            shape = {"steps": 36, "indices": len(INDICES), "horizon": H, "quantiles": 3}
            return pixel_graph(config, lambda length: ForecastHead(length, **shape))

        earlier, later = graph(), graph()
        stored = earlier.state_dict()
        # Earlier factors were by step and side.
        stored |= {"band.near": torch.ones(H, 2), "band.no_more": torch.ones(1)}
        torch.save(stored, tmp_path / "weights.pt")
        load_encoder(later, tmp_path / "weights.pt")
        expected = earlier.state_dict()
        for name, value in later.state_dict().items():
            torch.testing.assert_close(value, expected[name], msg=name)


def forecasts(
    rng: np.random.Generator, domain: float, error: float, n: int = 1500, distance: float = 1.0
) -> Forecasts:
    """Forecasts whose interval is right for an error of 0.1; `domain` moves the embedding."""
    median = rng.uniform(0.2, 0.8, (n, H, S))
    half = 0.1 * 1.2815516
    return Forecasts(
        quantiles=np.stack([median - half, median, median + half], axis=-1),
        disagreement=rng.uniform(0.05, 0.1, n) * error / 0.1,
        embedding=rng.normal(size=(n, D)) + domain * np.array([1.0] * 4 + [0.0] * (D - 4)),
        anchors=rng.uniform(0.2, 0.8, (n, 2, S)),
        distance=np.full(n, distance),
        target=median + rng.normal(0, error, median.shape),
        known=rng.random(median.shape) < 0.8,
    )


def coverage(fitted: Calibration, found: Forecasts, *, elsewhere: bool = False) -> float:
    after = fitted.calibrated(found, elsewhere=elsewhere)
    inside = (found.target >= after[..., 0]) & (found.target <= after[..., 2])
    return float(inside[found.known].mean())


class TestFit:
    def test_the_band_is_right_near_and_in_regions_not_fitted_on(self) -> None:
        rng = np.random.default_rng(0)
        near = [forecasts(rng, -1.5, 0.1)]
        far = [forecasts(rng, 1.5, error) for error in (0.17, 0.2)]
        fitted = fit_calibration(near, far)
        assert coverage(fitted, forecasts(rng, -1.5, 0.1)) == pytest.approx(0.8, abs=0.02)
        assert coverage(fitted, forecasts(rng, 1.5, 0.185)) == pytest.approx(0.8, abs=0.04)
        assert coverage(fitted, forecasts(rng, -1.5, 0.185)) < 0.7

    def test_networks_that_disagree_widen_the_band(self) -> None:
        rng = np.random.default_rng(1)
        fitted = fit_calibration([forecasts(rng, -1.5, 0.1)], [forecasts(rng, 1.5, 0.2)])
        sure, unsure = forecasts(rng, 1.5, 0.2), forecasts(rng, 1.5, 0.3)
        widths = [np.ptp(fitted.calibrated(found), axis=-1).mean() for found in (sure, unsure)]
        assert widths[1] > 1.1 * widths[0]

    def test_series_unlike_the_training_series_have_a_wider_interval(self) -> None:
        rng = np.random.default_rng(4)
        fitted = fit_calibration(
            [forecasts(rng, -1.5, 0.1)], [forecasts(rng, 1.5, 0.2, distance=1.6)]
        )
        like, unlike = (forecasts(rng, 1.5, 0.2, distance=d) for d in (1.0, 1.6))
        widths = [np.ptp(fitted.calibrated(found), axis=-1).mean() for found in (like, unlike)]
        assert widths[1] > 1.2 * widths[0]
        assert coverage(fitted, unlike) == pytest.approx(0.8, abs=0.04)

    def test_networks_with_a_narrower_band_have_larger_factors_elsewhere(self) -> None:
        rng = np.random.default_rng(5)
        near, far = [forecasts(rng, -1.5, 0.1)], [forecasts(rng, 1.5, 0.2)]
        plain, corrected = fit_calibration(near, far), fit_calibration(near, far, narrower=1.1)
        assert corrected.far == pytest.approx(1.1 * plain.far)
        assert corrected.near == plain.near

    def test_the_damping_is_the_share_of_the_anchors_in_other_regions(self) -> None:
        rng = np.random.default_rng(6)

        def region(last: float, mean: float, n: int) -> Forecasts:
            """Series that are nearer to the anchors than predicted, by shares."""
            found = forecasts(rng, 1.5, 0.02, n=n, distance=1.8)
            truth = found.damped(np.array([last, mean])).quantiles[..., 1]
            return replace(found, target=truth + rng.normal(0, 0.02, truth.shape))

        near, far = [region(0.0, 0.0, 1500)], [region(0.2, 0.1, 400), region(0.4, 0.1, 4000)]
        fitted = fit_calibration(near, far)
        np.testing.assert_allclose(fitted.damping_elsewhere, [0.3, 0.1], atol=0.02)
        # At this distance a pixel whose place is unknown takes half of its shares.
        np.testing.assert_allclose(fitted.damping, [0.6, 0.2], atol=0.04)
        away = fit_calibration(near, [region(-0.05, 0.3, 400)])
        assert away.damping_elsewhere[0] == 0.0
        assert 0.2 < away.damping_elsewhere[1] < 0.3
        for part in far:
            plain_error, error = (
                np.abs(quantiles[..., 1] - part.target).mean()
                for quantiles in (part.quantiles, fitted.calibrated(part, elsewhere=True))
            )
            assert error < plain_error

    def test_regions_have_the_same_weight_whatever_their_size(self) -> None:
        rng = np.random.default_rng(2)
        near, small = [forecasts(rng, -1.5, 0.1)], forecasts(rng, 1.5, 0.3, n=400)
        large = forecasts(rng, 1.5, 0.15, n=4000)
        thinned = Forecasts(**{name: value[:400] for name, value in vars(large).items()})
        both, alike = fit_calibration(near, [small, large]), fit_calibration(near, [small, thinned])
        assert both.far == pytest.approx(alike.far, rel=0.1)


class TestNearness:
    def test_series_like_those_of_training_are_nearer_than_others(self) -> None:
        rng = np.random.default_rng(0)
        training = [rng.normal(size=(2000, D)), rng.normal(3.0, 1.0, (200, D))]
        nearness = fit_nearness(training, [rng.normal(size=(300, D))])
        seen, other, unlike = (
            np.median(nearness.of(rng.normal(centre, 1.0, (300, D)))) for centre in (0, 3, -4)
        )
        assert seen == pytest.approx(1.0, abs=0.1)
        # A small region of the training counts as much as a large one.
        assert other < 1.3
        assert unlike > 1.5

    def test_the_unit_of_other_networks_is_kept(self) -> None:
        rng = np.random.default_rng(1)
        training, near = [rng.normal(size=(800, D))], [rng.normal(size=(300, D))]
        own = fit_nearness(training, near)
        seen = fit_nearness([*training, *near], unit=2.0 * own.unit)
        assert seen.unit == 2.0 * own.unit
        assert np.median(seen.of(near[0])) < np.median(own.of(near[0]))


def season(source: str, region: str, peak: int, n: int = 48, years: int = 2) -> PixelSet:
    """Pixels with a season that is highest at a day of the year.

    Every fourth is for validation, except in Hesbaye.
    """
    rng = np.random.default_rng(peak)
    dates = tuple(date(2020, 1, 5) + timedelta(days=10 * i) for i in range(36 * years))
    days = np.array([day.timetuple().tm_yday for day in dates])
    height = rng.uniform(0.6, 1.4, (n, 1)) * np.exp(-0.5 * ((days - peak) / 50) ** 2)
    bands = np.stack([0.06 - 0.03 * height, 0.1 - 0.05 * height, 0.2 + 0.2 * height], axis=-1)
    values = (bands + rng.normal(0, 0.004, bands.shape)).clip(0.005).astype(np.float32)
    return PixelSet(
        source=source,
        bands=BANDS,
        dates=dates,
        values=values,
        valid=rng.random(values.shape[:2]) < 0.9,
        places=np.arange(n),
        validation=(np.arange(n) % 4 == 0) & (region != "hesbaye"),
        region=region,
    )


@pytest.mark.slow
class TestRuns:
    """Networks of all regions, calibrated by a run that left some out."""

    @pytest.fixture(scope="class")
    def runs(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
        folder = tmp_path_factory.mktemp("runs")
        sets = [
            season(SCORED_SOURCE, "us-west", 190, years=1),
            season("flanders_2017_2018", "flanders", 150),
            season("hesbaye_a_monthly", "hesbaye", 170),
            season("s2_points", "world", 220),
        ]
        settings = ["encoder.width=8", "encoder.embedding=16", "members=2"]
        settings += ["optimisation.epochs=2", "optimisation.batch=32"]
        config = changed(ZOO["forecast-vi"], settings)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("training.forecasting.series_sets", lambda *_: sets)
            patch.setattr("training.regions.pune_2019", lambda _: [season("pune", "pune", 260)])
            first = Run(config=config, data=folder)
            left_out = {"without": ("flanders", "hesbaye"), "one": ("flanders",)}
            left_out |= {"other": ("world",), "first": ()}
            for name, regions in left_out.items():
                run = first.model_copy(update={"left_out": regions})
                finetune(run, folder / name, device="cpu", threads=1)
            weights = (folder / "first" / "weights.pt",)
            last = first.model_copy(update={"pretrained": weights, "everything": True})
            finetune(last, folder / "last", device="cpu", threads=1)
            yield folder

    def plan(self, runs: Path) -> Plan:
        run = Run.model_validate_json((runs / "last" / "run.json").read_bytes())
        report = runs / "results.md"
        return Plan(run=run, folder=runs / "regions", report=report, command="the command")

    def test_regions_are_scored_by_the_run_that_did_not_see_them(self, runs: Path) -> None:
        plan = self.plan(runs)
        report = evaluate_runs(runs / "last", [runs / "without"], plan)
        assert list(report.regions) == ["flanders", "hesbaye", "pune"]
        _, task, graph, _ = load_finished(runs / "without")
        there = task.table.take(task.table.in_regions(["flanders"]))
        away = _forecasts_from_every_month(task, graph, there)
        flanders = report.regions["flanders"]
        own = forecast_region(away, away["quantiles"])
        assert (flanders["rmse_beside"], flanders["coverage_beside"]) == (
            own["rmse"],
            own["coverage"],
        )
        # Damped towards persistence, as Hesbaye suggests.
        assert flanders["rmse"] != own["rmse"]
        # One place in four, by networks that were trained on the others.
        beside = flanders["beside_training_places"]
        assert beside["n"] < 0.5 * flanders["n"]
        assert beside["rmse"] != flanders["rmse"]
        assert "beside_training_places" not in report.regions["hesbaye"]
        # The interval of the bundle, around the forecasts of its own networks.
        _, task, graph, _ = load_finished(runs / "last")
        pune = tabulate([season("pune", "pune", 260)], task.config.window, least=6)
        made = _forecasts_from_every_month(task, graph, pune)
        nearness = report.nearness
        assert isinstance(nearness, Nearness)
        names = set(Forecasts.__dataclass_fields__) - {"distance"}
        distance = nearness.of(made["embedding"])
        found = Forecasts(**{name: made[name] for name in names}, distance=distance)
        stored = dict(report.calibration["band"])
        assert (stored.pop("disagreement"), stored.pop("power")) == (6.0, 0.5)
        arrays = {
            name: np.asarray(stored[name]) for name in ("weight", "damping", "damping_elsewhere")
        }
        fitted = Calibration(**{**stored, **arrays})
        scores = report.regions["pune"]
        known = coverage(fitted, found, elsewhere=True)
        assert scores["coverage"] == pytest.approx(known, abs=2e-3)
        unknown = coverage(fitted, found)
        assert scores["place_unknown"]["coverage"] == pytest.approx(unknown, abs=2e-3)
        text = (runs / "results.md").read_text()
        assert f"| flanders | {flanders['n']} | {flanders['rmse']:.3f} |" in text
        assert f"| flanders | {beside['n']} | {beside['rmse']:.3f} |" in text
        again = read_report(plan.folder)
        assert again == report
        assert again.nearness is not None
        np.testing.assert_array_equal(again.nearness.references, nearness.references)

    def test_the_validation_places_are_scored_by_the_run_that_did_not_see_them(
        self, runs: Path
    ) -> None:
        report = evaluate_runs(runs / "last", [runs / "without"], self.plan(runs))
        before, after = (load_finished(runs / name) for name in ("first", "last"))
        scored = before[3]["scores"]["rmse_mean"]
        assert report.calibration["validation_places"][0]["rmse_beside"] == scored
        assert scored != after[1].scores(after[2])["rmse_mean"]

    def test_each_region_is_scored_by_the_run_that_left_it_out(self, runs: Path) -> None:
        report = evaluate_runs(runs / "last", [runs / "one", runs / "other"], self.plan(runs))
        assert list(report.regions) == ["flanders", "world", "pune"]
        for name, region in (("one", "flanders"), ("other", "world")):
            _, task, graph, _ = load_finished(runs / name)
            there = task.table.take(task.table.in_regions([region]))
            away = _forecasts_from_every_month(task, graph, there)
            own = forecast_region(away, away["quantiles"])
            assert report.regions[region]["rmse_beside"] == own["rmse"]
            assert report.regions[region]["rmse"] != own["rmse"]

    def test_a_run_that_left_one_region_out_is_named(self, runs: Path) -> None:
        with pytest.raises(NoRegions, match="one: 1 regions are left out"):
            evaluate_runs(runs / "last", [runs / "one"], self.plan(runs))

    def test_a_region_that_two_runs_left_out_is_named(self, runs: Path) -> None:
        with pytest.raises(NoRegions, match="flanders: left out by two runs"):
            evaluate_runs(runs / "last", [runs / "without", runs / "one"], self.plan(runs))

"""Regions held out whole, and calibration across regions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.tiny_zoo import write_bundle
from models.heads import ForecastHead
from models.registry import load_bundle
from tests.kits.exports import exported_once, float32_alone, folder_of_run
from tests.kits.small_crops import TINY, write_crops
from training.calibration import fit_spread, fit_temperature
from training.classification import PixelClassification
from training.config import ZOO, Run, changed
from training.datasets import PixelSet
from training.datasets.points import (
    bavaria_2018,
    crops_us_2021,
    pune_2019,
    s2_points,
    us_regions,
    victoria_2018,
)
from training.embedding_regions import evaluate_embedding
from training.errors import TrainingError
from training.export import VersionNotRaised, export_run
from training.finetune import NotLeftOut, finetune, load_finished
from training.forecasting import PixelForecast
from training.landcover import PatchClassification
from training.legends import WORLDCOVER, brazil_sets, landcover_sets, relabelled
from training.recalibrate import recalibrate
from training.regions import (
    NoRegions,
    Plan,
    across,
    evaluate_regions,
    evaluation_sets,
    forecast_region,
    read_report,
    with_spread,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def shared_exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with exported_once(folder_of_run(tmp_path_factory)):
        yield


@pytest.fixture(scope="module")
def landcover(shared_data: Path) -> list[PixelSet]:
    return landcover_sets(shared_data)


class TestRegions:
    def test_a_region_left_out_is_whole_and_never_trained_on(self, shared_data: Path) -> None:
        task = PixelClassification(ZOO["pixels-landcover"], shared_data, left_out=("canada",))
        canada = task.table.regions.index("canada")
        assert (task.left_out.region == canada).all()
        assert len(task.left_out) == (task.table.region == canada).sum() > 2000
        assert canada not in task.train.region
        assert canada not in task.validation.region

    def test_a_forecast_leaves_out_a_region_of_several_sources(self, shared_data: Path) -> None:
        task = PixelForecast(ZOO["forecast-vi"], shared_data, left_out=("hesbaye",))
        sources = {task.table.sources[i] for i in np.unique(task.left_out.source)}
        assert sources == {"hesbaye_a_monthly", "hesbaye_b_monthly"}
        assert task.table.regions.index("hesbaye") not in task.train.region

    def test_a_calendar_shift_moves_the_season_of_all_series_but_the_scored_ones(
        self, shared_data: Path
    ) -> None:
        config = ZOO["forecast-vi"]
        tasks = [
            PixelForecast(config.model_copy(update={"calendar_shift": share}), shared_data)
            for share in (0.0, 1.0)
        ]
        scored = np.flatnonzero(tasks[0].scored)[:200]
        others = np.flatnonzero(~tasks[0].scored)[:200]
        for rows, alike in ((scored, 1.0), (others, 1 / 365)):
            plain, shifted = (
                task._tensors(part, part.present.sum(axis=1) // 2, np.random.default_rng(0))
                for task in tasks
                for part in (task.train.take(rows),)
            )
            values, valid, days, season, target, known = zip(plain, shifted, strict=True)
            for before, after in (values, valid, days, target, known):
                np.testing.assert_array_equal(before, after)
            assert ((season[1] >= 1) & (season[1] <= 366)).all()
            assert (season[0] == season[1]).float().mean() <= alike + 0.02
            assert (season[0] == season[1]).all() == (alike == 1.0)

    def test_without_a_region_to_score_nothing_is_trained(
        self, shared_data: Path, tmp_path: Path
    ) -> None:
        both = ("us-west", "us-south")
        run = Run(config=ZOO["forecast-vi"], data=shared_data, left_out=both)
        with pytest.raises(NotLeftOut, match="leave out fewer regions"):
            finetune(run, tmp_path / "run", device="cpu", threads=1)
        assert not (tmp_path / "run").exists()

    def test_the_us_regions_are_two_states(
        self, shared_data: Path, landcover: list[PixelSet]
    ) -> None:
        sets = [s for s in landcover if s.source == "crops_us_2021"]
        assert [s.region for s in sets] == ["us-west", "us-south"]
        with np.load(shared_data / "crops_us_2021" / "crops_us_2021_dev.npz") as archive:
            west = archive["lonlat"][:, 0] < -110
        assert [len(s.places) for s in sets] == [west.sum(), (~west).sum()]

    def test_pune_is_evaluated_on_and_never_trained_on(
        self, shared_data: Path, landcover: list[PixelSet]
    ) -> None:
        assert all(s.region != "pune" for s in landcover)
        (pixels,) = pune_2019(shared_data / "pune_2019")
        assert pixels.validation.all()
        run = Run(config=ZOO["pixels-landcover"], data=shared_data)
        never = [sets[0].region for sets in evaluation_sets(run)]
        assert never == ["pune", "bavaria", "brazil"]
        assert {s.region for s in landcover}.isdisjoint(never)

    def test_a_task_without_regions_is_an_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = Run(config=ZOO["landcover-eurosat"], data=tmp_path)
        # Without its data, which take seconds to read.
        empty = object.__new__(PatchClassification)
        empty.regions = ()
        monkeypatch.setattr("training.regions.task_of", lambda _: empty)
        with pytest.raises(NoRegions, match="landcover-eurosat"):
            evaluate_regions(Plan(run=run, folder=tmp_path, report=tmp_path / "r.md"))


class TestClasses:
    @pytest.fixture(scope="class")
    def plan(self, tmp_path_factory: pytest.TempPathFactory) -> Plan:
        """An evaluation of crops of two states, each with a class of its own."""
        root = tmp_path_factory.mktemp("states")
        run = Run(config=changed(ZOO["pixels-crops-us"], TINY), data=write_crops(root, states=2))
        return Plan(
            run=run, folder=root / "runs", report=root / "results.md", device="cpu", threads=1
        )

    def test_classes_that_only_a_region_has_are_counted_and_not_scored(self, plan: Plan) -> None:
        plan.report.write_text("# Results\n")
        report = evaluate_regions(plan)
        assert report.calibration == {}
        task = PixelClassification(plan.run.config, plan.run.data, left_out=("us-west",))
        west = report.regions["us-west"]
        known = np.isin(task.left_out.labels, task.train.labels)
        assert 0 < known.sum() < len(known)
        assert west["n"] == known.sum()
        assert west["unseen_classes"] == pytest.approx(1 - known.mean(), abs=1e-4)
        assert west["random_forest"]["accuracy"] > 0.9
        table = plan.report.read_text()
        assert "| us-west | " in table
        assert "which no model can name" in table

    def test_scores_are_those_of_the_run_that_left_the_region_out(self, plan: Plan) -> None:
        report = evaluate_regions(plan)
        _, task, graph, _ = load_finished(plan.folder / "us-south")
        assert {task.table.regions[i] for i in np.unique(task.train.region)} == {"us-west"}
        known = np.isin(task.left_out.labels, task.train.labels)
        logits = task.logits(graph, task.left_out)[known]
        right = logits.argmax(axis=1) == task.left_out.labels[known]
        assert report.regions["us-south"]["accuracy"][0] == pytest.approx(right.mean(), abs=1e-4)

    def test_a_bundle_takes_scores_without_a_calibration_as_its_files_are(
        self, plan: Plan, tmp_path: Path
    ) -> None:
        evaluate_regions(plan)
        with float32_alone():
            bundle = export_run(plan.folder / "us-west", tmp_path, name="mine", version="1.0.0")
        before = load_bundle(bundle).card
        recalibrate(bundle, regions=plan.folder, version="1.0.1")
        after = load_bundle(bundle).card
        assert set(after.regions) == {"us-west", "us-south"}
        assert (after.version, after.sha256) == ("1.0.1", before.sha256)
        assert after.training == before.training


class TestEmbeddings:
    def test_a_probe_is_scored_on_the_region_that_it_did_not_see(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Against logistic regression on the embeddings that ONNX Runtime gives."""
        data = write_crops(tmp_path)
        (crops,) = crops_us_2021(data / "crops_us_2021")
        west = relabelled(crops, WORLDCOVER, {1: 40, 5: 30, 176: 10})
        far = np.arange(len(west.places)) % 16 >= 8
        west, south = west.take(~far), replace(west.take(far), region="us-south")
        west = replace(west, region="us-west", validation=np.arange(len(west.places)) % 4 == 0)
        monkeypatch.setattr("training.embedding_regions.landcover_sets", lambda _: [west, south])
        monkeypatch.setattr("training.embedding_regions.evaluation_sets", lambda _: [])
        bundle = write_bundle(tmp_path, "embed-mine", "embed", "pixel")
        report = tmp_path / "results.md"
        report.write_text("# Results\n")
        run = Run(config=ZOO["pixels-landcover"], data=data)
        plan = Plan(run=run, folder=tmp_path / "runs", report=report, baselines=False)
        found = evaluate_embedding(bundle, plan)
        assert found.calibration == {}
        assert read_report(plan.folder).regions == found.regions

        session = onnxruntime.InferenceSession(load_bundle(bundle).path("float32"))
        days = np.array([(day - date(2021, 1, 1)).days for day in crops.dates], np.float32)

        def embedded(pixels: PixelSet) -> np.ndarray:
            fed = {"values": np.nan_to_num(pixels.values), "valid": pixels.valid, "days": days}
            return np.asarray(session.run(None, fed)[0])

        train = west.take(~west.validation)
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        probe.fit(embedded(train), train.labels)
        right = probe.predict(embedded(south)) == south.labels
        assert found.regions["us-south"]["accuracy"][0] == pytest.approx(right.mean(), abs=0.01)
        assert "| us-south | 96 | " in report.read_text()

    def test_a_classifier_is_no_embedding(self, tmp_path: Path) -> None:
        bundle = write_bundle(tmp_path, "mine", "classify-pixels", "pixel")
        run = Run(config=ZOO["pixels-landcover"], data=tmp_path)
        plan = Plan(run=run, folder=tmp_path / "runs", report=tmp_path / "results.md")
        with pytest.raises(TrainingError, match="give a bundle of embeddings"):
            evaluate_embedding(bundle, plan)


class TestReaders:
    def test_victoria_has_the_codes_of_its_names(self, shared_data: Path) -> None:
        (pixels,) = victoria_2018(shared_data / "victoria_2018")
        with np.load(shared_data / "victoria_2018" / "victoria.npz") as archive:
            names = archive["class_name"][archive["label"]]
            stored = archive["reflectance"]
        assert pixels.labels is not None
        assert {WORLDCOVER[c][0] for c in np.unique(pixels.labels).tolist()} == {
            "Trees", "Grass", "Crops", "Built-up", "Bare or sparse vegetation", "Water",
        }  # fmt: skip
        np.testing.assert_array_equal(pixels.labels == 80, names == "Water")
        np.testing.assert_allclose(pixels.values[3, 5], stored[3, 5] / 10_000, atol=1e-6)
        assert pixels.dates[-1] == date(2018, 1, 1) + timedelta(days=360)

    def test_pune_is_valid_where_its_scene_classification_is_clear(self, shared_data: Path) -> None:
        (pixels,) = pune_2019(shared_data / "pune_2019")
        with np.load(shared_data / "pune_2019" / "pune_2019.npz") as archive:
            scl, zero = archive["scl"], (archive["reflectance"] == 0).all(-1)
        clear = (scl >= 4) & (scl <= 7) & ~zero
        np.testing.assert_array_equal(pixels.valid, clear)
        assert np.isnan(pixels.values[~clear]).all()

    def test_bavaria_distinguishes_arable_crops_and_meadows(self, shared_data: Path) -> None:
        sets = bavaria_2018(shared_data / "bavaria_2018")
        with np.load(shared_data / "bavaria_2018" / "bavaria_fields_2018_l1c.npz") as archive:
            crops = archive["crop_code"]
        labels = np.concatenate([s.labels for s in sets if s.labels is not None])
        assert (labels == 30).sum() == np.isin(crops, (451, 452, 453)).sum()
        assert (labels == 40).sum() == ((crops >= 100) & (crops < 400)).sum()
        assert sets[0].bands[1] == "B02"

    def test_brazil_has_the_cover_that_its_labels_name(self, shared_data: Path) -> None:
        found = np.concatenate([s.labels for s in brazil_sets(shared_data) if s.labels is not None])
        with np.load(shared_data / "modis_brazil" / "modis_brazil_dev.npz") as archive:
            names = archive["label"]
        position = {code: i for i, code in enumerate(WORLDCOVER)}
        grass = np.isin(names, ["Pasto", "Pasture", "Cerrado_Campo"])
        assert (found == position[30]).sum() == grass.sum() > 400
        assert (found == -1).sum() == (names == "Cerrado").sum()
        crops = np.char.startswith(names, "Soja") | np.char.startswith(names, "Soy")
        assert (found == position[40]).sum() > crops.sum()

    def test_declared_crops_give_the_cover_where_worldcover_has_none(
        self, shared_data: Path
    ) -> None:
        with np.load(shared_data / "s2_points" / "s2_points_dev.npz") as archive:
            french = np.char.startswith(archive["source"], "france")
            grass = (french & (archive["crop_code"] // 10**8 == 20)).sum()
        found = sum(
            (s.labels == 30).sum()
            for s in s2_points(shared_data / "s2_points")
            if s.region in {"france", "corsica"} and s.labels is not None
        )
        assert found == grass > 100

    def test_the_meridian_between_the_states_splits_places(self) -> None:
        places = np.array([1260 * 3600 + 600, 1260 * 3600 + 900])  # 120 and 90 degrees west
        crops = PixelSet(
            source="crops_us_2021",
            bands=("B02",),
            dates=(date(2021, 1, 1),),
            values=np.zeros((2, 1, 1), np.float32),
            valid=np.ones((2, 1), bool),
            places=places,
            validation=np.zeros(2, bool),
        )
        west, south = us_regions(crops)
        assert (west.places.tolist(), south.places.tolist()) == ([places[0]], [places[1]])


class TestCalibration:
    def test_weights_are_repetitions(self) -> None:
        rng = np.random.default_rng(0)
        logits, labels = rng.normal(size=(300, 4)), rng.integers(4, size=300)
        times = rng.integers(1, 4, size=300)
        weighed = fit_temperature(logits, labels, times)
        repeated = fit_temperature(np.repeat(logits, times, axis=0), np.repeat(labels, times))
        assert weighed == pytest.approx(repeated, rel=1e-4)

    def test_regions_have_equal_weight_whatever_their_size(self) -> None:
        rng = np.random.default_rng(1)
        sure = {"logits": 6 * np.eye(3)[rng.integers(3, size=900)], "labels": np.zeros(900, int)}
        sure["labels"] = sure["logits"].argmax(1)
        wrong = {"logits": 6 * np.eye(3)[rng.integers(3, size=100)], "labels": np.zeros(100, int)}
        one = across({"sure": sure, "wrong": wrong})
        half = {k: v[:100] for k, v in sure.items()}
        assert one == pytest.approx(across({"sure": half, "wrong": wrong}), rel=0.02)

    def test_the_band_holds_four_fifths_after_it(self) -> None:
        rng = np.random.default_rng(0)
        n, steps = 4000, 3
        true = np.array([0.05, 0.1, 0.2])[:, None]
        median = rng.uniform(0.2, 0.8, (n, steps, 2))
        target = median + rng.normal(size=(n, steps, 2)) * true
        predicted = np.stack([median - 0.06, median, median + 0.06], axis=-1)
        known = rng.random((n, steps, 2)) < 0.7
        spread = fit_spread([(predicted, target, known)])
        after = with_spread(predicted, spread)
        for h in range(steps):
            seen = known[:, h]
            below = (target[:, h] < after[:, h, :, 0])[seen].mean()
            above = (target[:, h] > after[:, h, :, 2])[seen].mean()
            assert (below, above) == (pytest.approx(0.1, abs=0.005), pytest.approx(0.1, abs=0.005))

    def test_a_step_without_targets_keeps_its_band(self) -> None:
        predicted = np.tile([0.1, 0.2, 0.3], (5, 2, 1, 1))
        known = np.zeros((5, 2, 1), bool)
        known[:, 0] = True
        spread = fit_spread([(predicted, np.full((5, 2, 1), 0.25), known)])
        assert spread[1].tolist() == [1.0, 1.0]

    def test_the_graph_scales_what_the_calibration_scales(self) -> None:
        torch.manual_seed(0)
        head = ForecastHead(8, steps=6, indices=2, horizon=3, quantiles=3)
        inputs = torch.randn(5, 8), torch.rand(5, 2, 6)
        before = head(*inputs).detach().numpy()
        spread = np.array([[2.0, 0.5], [1.0, 1.0], [3.0, 1.5]])
        head.spread.copy_(torch.tensor(spread))
        after = head(*inputs).detach().numpy()
        np.testing.assert_allclose(after, with_spread(before, spread), atol=1e-6)

    def test_weights_of_an_earlier_version_have_a_spread_of_one(self) -> None:
        head = ForecastHead(8, steps=6, indices=2, horizon=3, quantiles=3)
        state = {name: value for name, value in head.state_dict().items() if name != "spread"}
        head.spread.fill_(2.0)
        head.load_state_dict(state)
        assert (head.spread == 1).all()


def test_a_regions_forecast_is_scored_beside_persistence_and_last_year() -> None:
    rng = np.random.default_rng(0)
    n, steps = 50, 2
    target = rng.uniform(0.2, 0.8, (n, steps, 3))
    median = target + 0.1
    own = {
        "quantiles": np.stack([median - 0.2, median, median + 0.05], axis=-1),
        "target": target,
        "known": np.ones((n, steps, 3), bool),
        "month": np.repeat([4, 7], 25),
        "places": np.arange(n) % 5,
        "persistence": target[:, 0] - 0.3,
        "last_year": np.where(np.arange(n)[:, None, None] < 25, target + 0.2, np.nan),
    }
    scores = forecast_region(own, own["quantiles"])
    assert scores["rmse"] == pytest.approx(0.1, abs=1e-4)
    assert scores["last_year"] == pytest.approx(0.2, abs=1e-4)
    assert scores["by_month"]["7"]["last_year"] is None
    assert scores["coverage"] == 1.0
    first = np.sqrt(np.square(own["persistence"][:, None] - target).mean(axis=(0, 1))).mean()
    assert scores["persistence"] == pytest.approx(float(first), abs=1e-4)
    narrow = forecast_region(own, with_spread(own["quantiles"], np.full((steps, 2), 0.1)))
    assert (narrow["coverage"], narrow["coverage_beside"]) == (0.0, 1.0)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run of small crops, and a folder of regions made of it by hand."""
    root = tmp_path_factory.mktemp("regions")
    data = write_crops(root)
    run = Run(config=changed(ZOO["pixels-crops-us"], TINY), data=data)
    finetune(run, root / "run", device="cpu", threads=1)
    folder = root / "regions"
    folder.mkdir()
    document = {"calibration": {"temperature": 2.5}, "regions": {"us-west": {"accuracy": 0.5}}}
    (folder / "regions.json").write_text(json.dumps(document))
    return root / "run", folder


class TestExport:
    @pytest.fixture(scope="class")
    def plain(self, evaluated: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A bundle without calibration across regions."""
        return export_run(
            evaluated[0], tmp_path_factory.mktemp("zoo"), name="mine", version="1.0.0"
        )

    def test_a_bundle_takes_the_calibration_and_the_scores(
        self,
        evaluated: tuple[Path, Path],
        plain: Path,
        tmp_path: Path,
    ) -> None:
        run, folder = evaluated
        with float32_alone():
            predicted = export_run(run, tmp_path, name="told", regions=folder)
        card = load_bundle(predicted).card
        assert card.regions == {"us-west": {"accuracy": 0.5}}
        assert card.training["calibration"] == {"temperature": 2.5}
        assert load_bundle(plain).card.regions == {}
        assert card.sha256 != load_bundle(plain).card.sha256

    def test_a_bundle_is_calibrated_anew_without_training(
        self, evaluated: tuple[Path, Path], plain: Path, tmp_path: Path
    ) -> None:
        run, folder = evaluated
        bundle = shutil.copytree(plain, tmp_path / "mine")
        first = load_bundle(bundle)
        old = {
            v.name: onnxruntime.InferenceSession(first.path(v.name)) for v in first.card.variants
        }
        recalibrate(bundle, regions=folder, version="1.1.0")
        card = load_bundle(bundle).card
        assert (card.version, card.regions) == ("1.1.0", {"us-west": {"accuracy": 0.5}})
        _, task, graph, _ = load_finished(run)
        inputs, temperature = dict(task.real_inputs()), float(graph.head.temperature)
        del inputs["day_of_year"], inputs["elsewhere"]
        for variant in card.variants:
            new = onnxruntime.InferenceSession(load_bundle(bundle).path(variant.name))
            half = variant.name == "float16"
            fed = {**inputs, "values": inputs["values"].astype(np.float16 if half else np.float32)}
            earlier, later = (np.asarray(s.run(None, fed)[0]) for s in (old[variant.name], new))
            np.testing.assert_array_equal(later.argmax(axis=1), earlier.argmax(axis=1))
            # A temperature is a power of the odds, as far as float32 holds them.
            odds, new_odds = (p / p.max(axis=1, keepdims=True) for p in (earlier, later))
            predicted = odds > 1e-6
            np.testing.assert_allclose(
                new_odds[predicted], odds[predicted] ** (temperature / 2.5), atol=5e-3
            )
            assert later.max(axis=1).mean() < earlier.max(axis=1).mean()
        with pytest.raises(VersionNotRaised, match=r"mine@1\.1\.0"):
            recalibrate(bundle, regions=folder, version="1.1.0")

    def test_a_folder_without_regions_is_named(
        self, evaluated: tuple[Path, Path], tmp_path: Path
    ) -> None:
        with pytest.raises(NoRegions, match="python -m training regions"):
            read_report(tmp_path)
        with pytest.raises(NoRegions):
            export_run(evaluated[0], tmp_path, name="mine", regions=tmp_path)

"""Fine-tuning, export and evaluation on small data in the archives' layout."""

from __future__ import annotations

import csv
import itertools
import json
import shlex
import shutil
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

from benchmarks.serving import served
from models.encoders import PatchEncoder, PixelEncoder
from models.graph import PatchGraph, PixelGraph
from models.heads import ClassificationHead
from models.registry import Registry, load_bundle
from tests.kits.exports import exported_once, float32_alone, folder_of_run
from tests.kits.small_crops import TINY, write_crops
from training.__main__ import app
from training.baselines import MultilayerPerceptron, TempCNN
from training.calibration import (
    cross_fitted_scores,
    expected_calibration_error,
    fit_temperature,
    macro_f1,
    probabilities,
)
from training.card import UnknownOrigin, card_fields, commands
from training.classification import PixelClassification
from training.config import (
    BANDS,
    INDICES,
    ZOO,
    ClassifyConfig,
    EfficientNetLite0Config,
    PatchEncoderConfig,
    PixelEncoderConfig,
    Run,
    changed,
    configuration,
)
from training.errors import TrainingError
from training.evaluate import evaluate
from training.export import VersionNotRaised, export_run
from training.finetune import (
    CHECKPOINT,
    CheckpointMismatch,
    ManyEncoders,
    NoGraph,
    NothingToStopOn,
    finetune,
    fit,
    load_encoder,
    load_finished,
    new_graph,
    task_of,
)
from training.graph_export import in_half
from training.landcover import cut_mix
from training.legends import CDL
from training.losses import LossNotFinite
from training.parity import ParityError, check_parity, pixel_inputs
from training.pretrain import PretrainConfig, pretrain
from training.pretraining_data import Places, SourcesConfig
from training.score_tables import outputs_row, place_confusions, write_section
from training.validation_outputs import load

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def shared_exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with exported_once(folder_of_run(tmp_path_factory)):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_crops(tmp_path_factory.mktemp("data"))


def tiny_run(data: Path, **fields: object) -> Run:
    config = changed(ZOO["pixels-crops-us"], TINY)
    return Run.model_validate({"config": config.model_dump(), "data": data, **fields})


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    finetune(tiny_run(data), folder, device="cpu", threads=1)
    return folder


def finished_data(folder: Path) -> Path:
    return Run.model_validate_json((folder / "run.json").read_bytes()).data


class Interrupted(PixelClassification):
    """A task that dies in its second epoch, after some steps."""

    after = 0

    def batches(self, epoch: int, rng: np.random.Generator) -> Iterator[tuple[torch.Tensor, ...]]:
        if epoch != 1:
            yield from super().batches(epoch, rng)
            return
        yield from itertools.islice(super().batches(epoch, rng), self.after)
        raise InterruptedError


class TestFinetune:
    def test_learns_and_logs_every_epoch(self, finished: Path) -> None:
        with (finished / "log.csv").open() as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file)]
        assert len(losses) == 3
        assert losses[-1] < losses[0]

    @pytest.mark.parametrize("after", [0, 2])
    def test_a_killed_run_resumes_to_the_same_weights(
        self,
        data: Path,
        finished: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        after: int,
    ) -> None:
        monkeypatch.setattr("training.finetune.KEEP_SECONDS", 0.0)
        run = tiny_run(data)
        how = run.config.optimisation
        cpu = torch.device("cpu")
        dying = Interrupted(run.config, data)
        dying.after = after
        assert dying.steps > 2
        for task in (dying, PixelClassification(run.config, data)):
            torch.manual_seed(how.seed)
            try:
                graph = fit(task, task.graph(), how, tmp_path, cpu)
            except InterruptedError:
                kept = torch.load(tmp_path / CHECKPOINT, weights_only=True)
                assert (kept["epoch"], kept["step"]) == (1, after)
        expected = torch.load(finished / "weights.pt", weights_only=True)
        for name, weights in graph.state_dict().items():
            if name != "head.temperature":  # fitted after the last epoch
                torch.testing.assert_close(weights, expected[name], msg=name)
        losses = [
            [row["loss"] for row in csv.DictReader((folder / "log.csv").read_text().splitlines())]
            for folder in (tmp_path, finished)
        ]
        assert losses[0] == losses[1]

    def test_a_loss_that_is_no_number_ends_the_run_and_leaves_the_checkpoint(
        self, data: Path, tmp_path: Path
    ) -> None:
        run = tiny_run(data)

        class Broken(PixelClassification):
            epoch = 0

            def batches(
                self, epoch: int, rng: np.random.Generator
            ) -> Iterator[tuple[torch.Tensor, ...]]:
                self.epoch = epoch
                yield from super().batches(epoch, rng)

            def loss(self, graph: PixelGraph, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
                return super().loss(graph, batch) * (np.nan if self.epoch == 1 else 1.0)

        task = Broken(run.config, data)
        with pytest.raises(LossNotFinite, match="epoch 2, step 1: the loss is nan"):
            fit(task, task.graph(), run.config.optimisation, tmp_path, torch.device("cpu"))
        kept = torch.load(tmp_path / CHECKPOINT, weights_only=True)
        assert kept["epoch"] == 1
        assert all(w.isfinite().all() for w in kept["graph"].values() if w.is_floating_point())

    def test_another_configuration_is_rejected_in_the_same_folder(
        self, data: Path, finished: Path
    ) -> None:
        with pytest.raises(CheckpointMismatch):
            finetune(tiny_run(data, everything=True), finished, device="cpu")

    def test_validation_places_are_trained_on_only_with_everything(self, data: Path) -> None:
        task = task_of(tiny_run(data))
        held = set(task.validation.places.tolist())
        assert held
        assert held.isdisjoint(task.train.places.tolist())
        assert held < set(task_of(tiny_run(data, everything=True)).train.places.tolist())

    def test_a_share_of_the_labels_is_taken_place_by_place(self, data: Path) -> None:
        run = tiny_run(data)
        config = changed(run.config, ["labels=0.25"])
        complete = task_of(run).train
        few = PixelClassification(config, data).train
        assert len(few) == round(0.25 * len(complete))
        assert len(set(few.places.tolist())) <= 4

    def test_early_stopping_keeps_the_best_epoch_and_goes_on_after_a_kill(
        self, data: Path, tmp_path: Path
    ) -> None:
        # A rate at which nothing is learned: no epoch is better than the first.
        config = changed(
            tiny_run(data).config,
            ["optimisation.epochs=9", "optimisation.patience=2", "optimisation.learning_rate=0"],
        )
        run = Run(config=config, data=data)
        finetune(run, tmp_path, device="cpu", threads=1)
        with (tmp_path / "log.csv").open() as file:
            rows = list(csv.DictReader(file))
        scores = [float(row["score"]) for row in rows]
        best = int(np.argmax(scores)) + 1
        assert len(rows) == best + 2 < 9
        metrics = json.loads((tmp_path / "metrics.json").read_text())
        assert metrics["epoch_chosen_on_the_validation_places"] == best
        # Called again, it does not train further.
        finetune(run, tmp_path, device="cpu", threads=1)
        with (tmp_path / "log.csv").open() as file:
            assert len(list(csv.DictReader(file))) == len(rows)

    def test_early_stopping_needs_places_left_out(self, data: Path, tmp_path: Path) -> None:
        config = changed(tiny_run(data).config, ["optimisation.patience=2"])
        with pytest.raises(NothingToStopOn):
            finetune(Run(config=config, data=data, everything=True), tmp_path, device="cpu")

    @pytest.mark.parametrize(
        ("network", "encoder"), [("tempcnn", TempCNN), ("mlp", MultilayerPerceptron)]
    )
    def test_a_baselines_network_goes_through_the_same_loop(
        self, data: Path, tmp_path: Path, network: str, encoder: type
    ) -> None:
        config = changed(
            tiny_run(data).config, [f"network={network}", "members=2", "optimisation.epochs=1"]
        )
        finetune(Run(config=config, data=data), tmp_path, device="cpu", threads=1)
        _, _, graph, _ = load_finished(tmp_path)
        assert isinstance(graph.encoder, encoder)
        assert all(isinstance(pair[0], encoder) for pair in graph.others)

    def test_starts_from_a_pretrained_encoder(self, data: Path, tmp_path: Path) -> None:
        graph = task_of(tiny_run(data)).graph()
        torch.manual_seed(7)
        other = PixelEncoder(width=8, embedding=16)
        torch.save({"pixel_encoder": other.state_dict()}, tmp_path / "pretrained.pt")
        load_encoder(graph, tmp_path / "pretrained.pt")
        torch.testing.assert_close(graph.encoder.row.weight, other.row.weight)
        torch.save({"patch_encoder": {}}, tmp_path / "other.pt")
        with pytest.raises(CheckpointMismatch, match="pixel_encoder"):
            load_encoder(graph, tmp_path / "other.pt")
        wide = PixelEncoder(width=16, embedding=16)
        torch.save({"pixel_encoder": wide.state_dict()}, tmp_path / "wide.pt")
        with pytest.raises(CheckpointMismatch, match="does not fit"):
            load_encoder(graph, tmp_path / "wide.pt")

    def test_a_run_on_every_place_starts_from_all_weights_of_an_earlier_run(
        self, data: Path, finished: Path, tmp_path: Path
    ) -> None:
        earlier = torch.load(finished / "weights.pt", weights_only=True)
        run = tiny_run(data, pretrained=(finished / "weights.pt",), everything=True)
        graph = new_graph(run, task_of(run))
        for name, weights in graph.state_dict().items():
            torch.testing.assert_close(weights, earlier[name], msg=name)
        done = finetune(run, tmp_path, device="cpu", threads=1)
        later = torch.load(tmp_path / "weights.pt", weights_only=True)
        assert not torch.equal(later["head.linear.weight"], earlier["head.linear.weight"])
        # No place was left out to fit it on, so it is the earlier run's.
        assert later["head.temperature"] == earlier["head.temperature"]
        assert done.scores == {}


class TestProtocols:
    """The encoder of the finished run, frozen."""

    def run(self, data: Path, finished: Path, protocol: str) -> Run:
        return tiny_run(data, pretrained=(finished / "weights.pt",), protocol=protocol)

    def test_a_linear_probe_is_scikit_learns_and_a_graph(
        self, data: Path, finished: Path, tmp_path: Path
    ) -> None:
        run = self.run(data, finished, "linear")
        finetune(run, tmp_path, device="cpu", threads=1)
        _, task, graph, metrics = load_finished(tmp_path)
        frozen = torch.load(finished / "weights.pt", weights_only=True)
        for name, weights in graph.encoder.state_dict().items():
            torch.testing.assert_close(weights, frozen[f"encoder.{name}"], msg=name)
        train, labels = task.embeddings(graph, training=True)
        rest, truth = task.embeddings(graph, training=False)
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, tol=1e-3, max_iter=2000))
        expected = model.fit(train, labels).predict(rest)
        assert (task.logits(graph, task.validation).argmax(axis=1) == expected).mean() > 0.98
        assert metrics["scores"]["accuracy"] == pytest.approx((expected == truth).mean(), abs=0.03)

    def test_nearest_neighbours_give_only_scores(
        self, data: Path, finished: Path, tmp_path: Path
    ) -> None:
        done = finetune(self.run(data, finished, "knn"), tmp_path / "knn", device="cpu", threads=1)
        assert done.graph is None
        assert done.scores["accuracy"] > 0.6
        with pytest.raises(NoGraph):
            export_run(tmp_path / "knn", tmp_path / "zoo")

    def test_a_probe_is_of_one_encoder(self, data: Path, tmp_path: Path) -> None:
        config = changed(tiny_run(data).config, ["members=2"])
        with pytest.raises(ManyEncoders):
            finetune(Run(config=config, data=data, protocol="knn"), tmp_path, device="cpu")


class TestExport:
    @pytest.fixture(scope="class")
    def zoo(self, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        zoo = tmp_path_factory.mktemp("zoo")
        export_run(finished, zoo)
        return zoo

    def test_the_bundle_is_one_the_service_loads(self, zoo: Path) -> None:
        registry = Registry.load(zoo)
        assert not registry.refused
        card = registry.bundles["pixels-crops-us"].card
        assert [c.code for c in card.classes] == list(CDL)
        assert card.training["seed"] == 0
        assert card.metrics["validation"]["n"] > 0
        assert {d.use for d in card.training_data} == {"labels", "validation"}

    def test_the_file_equals_torch(self, zoo: Path, finished: Path) -> None:
        _, task, graph, _ = load_finished(finished)
        part = task.validation.take(np.arange(9))
        session = onnxruntime.InferenceSession(
            zoo / "pixels-crops-us" / "model.onnx", providers=["CPUExecutionProvider"]
        )
        got = session.run(None, {"values": part.values, "valid": part.valid, "days": part.days[0]})[
            0
        ]
        with torch.inference_mode():
            expected = graph(
                *(torch.from_numpy(a) for a in (part.values, part.valid, part.days[0]))
            )
        np.testing.assert_allclose(got, expected.numpy(), atol=1e-5)

    def test_the_file_holds_no_path_of_the_machine(self, zoo: Path) -> None:
        path = zoo / "pixels-crops-us" / "model.onnx"
        model = onnx.load(path)
        assert not any(node.metadata_props for node in model.graph.node)
        assert str(Path(__file__).parents[1]).encode() not in path.read_bytes()

    def test_the_card_lists_float16_with_its_loss(self, zoo: Path) -> None:
        bundle = load_bundle(zoo / "pixels-crops-us")
        half = next(v for v in bundle.card.variants if v.name == "float16")
        assert set(half.loss) == {"accuracy", "macro_f1"}
        assert half.bytes < bundle.card.variants[0].bytes
        both = [
            onnxruntime.InferenceSession(bundle.path(name), providers=["CPUExecutionProvider"])
            for name in ("float32", "float16")
        ]
        rng = np.random.default_rng(1)
        inputs = {
            "values": rng.uniform(0.01, 0.6, (9, 20, 3)).astype(np.float32),
            "valid": rng.random((9, 20)) < 0.7,
            "days": np.arange(20, dtype=np.float32) * 17,
        }
        # No date at all; and one date alone, which the grid's wide kernel carries to all steps:
        # its weights are smaller than float16 can hold.
        inputs["valid"][0] = False
        inputs["valid"][1] = np.arange(20) == 19
        kinds = [session.get_inputs()[0].type for session in both]
        assert kinds == ["tensor(float)", "tensor(float16)"]
        full = both[0].run(None, inputs)[0]
        halved = {**inputs, "values": inputs["values"].astype(np.float16)}
        less = both[1].run(None, halved)[0]
        assert less.dtype == np.float32
        assert np.isnan(less[0]).all()
        assert np.isfinite(less[1:]).all()
        np.testing.assert_allclose(less[1:], full[1:], atol=5e-3)

    def test_the_card_lists_int8_with_its_loss(self, zoo: Path) -> None:
        bundle = load_bundle(zoo / "pixels-crops-us")
        less = next(v for v in bundle.card.variants if v.name == "int8")
        assert set(less.loss) == {"accuracy", "macro_f1"}
        assert sorted(p.name for p in bundle.path().parent.glob("*.onnx")) == [
            "model.float16.onnx",
            "model.int8.onnx",
            "model.onnx",
        ]

    def test_another_model_needs_another_version(
        self, zoo: Path, data: Path, finished: Path, tmp_path: Path
    ) -> None:
        run = tiny_run(data, pretrained=(finished / "weights.pt",), protocol="linear")
        finetune(run, tmp_path / "other", device="cpu", threads=1)
        shutil.copytree(zoo, tmp_path / "zoo")
        with pytest.raises(VersionNotRaised, match=r"1\.0\.0"):
            export_run(tmp_path / "other", tmp_path / "zoo")
        assert [p.name for p in (tmp_path / "zoo").iterdir()] == ["pixels-crops-us"]
        load_bundle(tmp_path / "zoo" / "pixels-crops-us")

    def test_the_card_describes_the_training(self, zoo: Path) -> None:
        facts = load_bundle(zoo / "pixels-crops-us").card.training
        assert facts["log"]["epochs"] == 3
        assert facts["log"]["loss"] > 0
        assert facts["seconds_of_last_command"] > 0
        assert facts["machine"].endswith("one thread")
        assert "--set encoder.width=8" in facts["command"]

    def test_a_users_bundle_is_served_without_code(self, zoo: Path, finished: Path) -> None:
        _, task, graph, _ = load_finished(finished)
        part = task.validation.take(np.arange(3))
        series = [
            {
                "id": str(i),
                "dates": [str(date.fromordinal(int(part.first_day[i] + d))) for d in part.days[i]],
                **{
                    band: [
                        float(v) if ok else None
                        for v, ok in zip(part.values[i, :, c], part.valid[i], strict=True)
                    ]
                    for c, band in enumerate(("B02", "B04", "B08"))
                },
            }
            for i in range(3)
        ]
        body = {"series": series, "model": "pixels-crops-us@1.0.0"}
        with served(model_dir=zoo) as http:
            response = http.post("/classify-pixels", json=body).json()
        with torch.inference_mode():
            inputs = (part.values, part.valid, part.days[0])
            expected = graph(*(torch.from_numpy(a) for a in inputs)).argmax(dim=1)
        names = [name for name, _ in CDL.values()]
        assert response["model"] == body["model"]
        assert [r["class"] for r in response["results"]] == [names[i] for i in expected]

    def test_a_graph_that_differs_from_its_file_is_rejected(
        self, zoo: Path, finished: Path
    ) -> None:
        _, task, graph, _ = load_finished(finished)
        with torch.no_grad():
            graph.head.linear.bias[0] += 0.5
        part = task.validation.take(np.arange(3))
        real = {"values": part.values, "valid": part.valid, "days": part.days[0]}
        with pytest.raises(ParityError, match="differs from torch"):
            check_parity(graph, zoo / "pixels-crops-us" / "model.onnx", real)

    def test_evaluation_writes_tables_and_keeps_the_card_valid(
        self, zoo: Path, finished: Path, tmp_path: Path
    ) -> None:
        report = tmp_path / "results.md"
        report.write_text("# Results\n\n## Another\n\nkept\n")
        other = tmp_path / "seed-1"
        settings = [*TINY, "optimisation.seed=1", "optimisation.epochs=1"]
        config = changed(ZOO["pixels-crops-us"], settings)
        # As if it had been trained as long: what is looked at is how seeds meet in a row.
        finetune(Run(config=config, data=finished_data(finished)), other, device="cpu", threads=1)
        stored = json.loads((other / "run.json").read_text())
        stored["config"]["optimisation"]["epochs"] = 3
        (other / "run.json").write_text(json.dumps(stored))
        (table,) = evaluate([finished, other], zoo=zoo, report=report)
        ours = next(row for row in table.rows if row.name == "ours")
        each = [cross_fitted_scores(**load(folder))["accuracy"] for folder in (finished, other)]
        assert ours.seeds == 2
        assert ours.scores["accuracy"].value == pytest.approx(np.mean(each), abs=1e-4)
        assert ours.scores["accuracy"].spread == pytest.approx(np.std(each, ddof=1), abs=1e-4)
        assert {"random forest", "extra trees", "logistic regression"} < {
            row.name for row in table.rows
        }
        text = report.read_text()
        assert "kept" in text
        assert "| random forest | 1 |" in text
        models = load_bundle(zoo / "pixels-crops-us").card.metrics["evaluation"]["models"]
        value, low, high = models["random forest"]["accuracy"]
        assert low <= value <= high
        # A run of another configuration does not evaluate the bundle.
        stored["config"]["optimisation"]["epochs"] = 4
        (other / "run.json").write_text(json.dumps(stored))
        evaluate([other], zoo=zoo, report=tmp_path / "other.md")
        assert (tmp_path / "other.md").exists()
        assert load_bundle(zoo / "pixels-crops-us").card.metrics["evaluation"]["models"] == models
        # Exported again, the bundle keeps what was measured of it.
        again = shutil.copytree(zoo, tmp_path / "again")
        with float32_alone():
            export_run(finished, again)
        assert "evaluation" in load_bundle(again / "pixels-crops-us").card.metrics
        # A run that goes on from it on every place can have no score, and has that one.
        config = tiny_run(finished_data(finished)).model_copy(
            update={"pretrained": (finished / "weights.pt",), "everything": True}
        )
        finetune(config, tmp_path / "all", device="cpu", threads=1)
        with float32_alone():
            export_run(tmp_path / "all", tmp_path / "new")
        metrics = load_bundle(tmp_path / "new" / "pixels-crops-us").card.metrics
        assert metrics["evaluation"]["models"] == models
        assert metrics["validation"] == "none: trained on every place"


class TestCalibration:
    def test_ece_and_f1_equal_plain_computations(self) -> None:
        rng = np.random.default_rng(0)
        shares = rng.dirichlet(np.ones(4), 500)
        labels = rng.integers(4, size=500)
        confidence, right = shares.max(1), shares.argmax(1) == labels
        expected = 0.0
        for low in np.arange(15) / 15:
            inside = (confidence >= low) & (confidence < low + 1 / 15)
            if inside.any():
                expected += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
        assert expected_calibration_error(shares, labels) == pytest.approx(expected, abs=1e-6)
        got = macro_f1(shares.argmax(1), labels, 4)
        assert got == pytest.approx(f1_score(labels, shares.argmax(1), average="macro"))

    def test_the_temperature_corrects_overconfidence(self) -> None:
        rng = np.random.default_rng(0)
        logits = rng.normal(size=(4000, 5)) * 1.5
        drawn = [rng.choice(5, p=p) for p in probabilities(logits)]
        labels = np.array(drawn)
        assert fit_temperature(logits * 3, labels) == pytest.approx(3, rel=0.1)

    def test_confusions_of_places_sum_to_the_whole(self) -> None:
        rng = np.random.default_rng(0)
        labels, predicted = rng.integers(3, size=(2, 100))
        matrices = place_confusions(predicted, labels, rng.integers(9, size=100), 3)
        complete = np.zeros((3, 3))
        np.add.at(complete, (labels, predicted), 1)
        np.testing.assert_array_equal(matrices.sum(axis=0), complete)

    def test_intervals_are_of_places_drawn_with_replacement(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("training.score_tables.RESAMPLES", 40)
        rng = np.random.default_rng(0)
        places, labels = np.arange(120) % 12, rng.integers(4, size=120)
        seeds = [
            {"logits": rng.normal(size=(120, 4)), "labels": labels, "places": places}
            for _ in range(2)
        ]
        draws = np.random.default_rng(0)
        members = [np.flatnonzero(places == place) for place in range(12)]
        drawn: dict[str, list[float]] = {"accuracy": [], "macro-F1": []}
        for _ in range(40):
            often = draws.multinomial(12, np.full(12, 1 / 12))
            chosen = np.concatenate([np.tile(m, n) for m, n in zip(members, often, strict=True)])
            truth, found = labels[chosen], [s["logits"][chosen].argmax(axis=1) for s in seeds]
            drawn["accuracy"].append(np.mean([(f == truth).mean() for f in found]))
            classes = np.unique(truth)
            drawn["macro-F1"].append(
                np.mean([f1_score(truth, f, labels=classes, average="macro") for f in found])
            )
        row = outputs_row("a", seeds)
        for name, values in drawn.items():
            score = row.scores[name]
            assert (score.low, score.high) == pytest.approx(np.quantile(values, (0.025, 0.975)))


class TestCommand:
    def test_settings_change_the_configuration(self) -> None:
        config = changed(
            ZOO["pixels-crops-us"], ["encoder.plots=false", "optimisation.learning_rate=1e-4"]
        )
        assert isinstance(config, ClassifyConfig)
        assert not config.encoder.plots
        assert config.optimisation.learning_rate == 1e-4
        assert config.legend == "cdl"

    def test_a_new_name_takes_a_tasks_configuration(self) -> None:
        assert configuration("my-crops", "classify").name == "my-crops"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["finetune", "nothing-known"], "--task"),
            (["finetune", "pixels-crops-us", "--set", "epoch=3"], "no setting"),
            (["finetune", "pixels-crops-us", "--set", "optimisation.epochs=few"], "integer"),
            (["finetune", "pixels-crops-us", "--set", "labels.share=1"], "no setting"),
            (["finetune", "pixels-crops-us", "--set", "labels.share=1"], "optimisation"),
            (["finetune", "pixels-crops-us", "--set", "encoder.wide=1"], "encoder.width"),
            (["finetune", "pixels-crops-us", "--data", "nowhere"], "nowhere"),
            (["evaluate", "no-such-run"], "no-such-run"),
            (["regions", "landcover-eurosat", "--data", "nowhere"], "nowhere"),
            (["pretrain", "--data", "nowhere"], "has no GeoTIFF"),
        ],
    )
    def test_a_users_mistake_is_one_sentence(
        self,
        arguments: list[str],
        message: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert message in result.output
        assert isinstance(result.exception, SystemExit)
        assert not list(tmp_path.rglob("run.json"))

    def test_a_checkpoint_that_does_not_fit_names_what_differs(
        self, data: Path, tmp_path: Path
    ) -> None:
        torch.save({"pixel_encoder": PixelEncoder(width=16).state_dict()}, tmp_path / "wide.pt")
        (tmp_path / "text.pt").write_text("no checkpoint")
        call = ["finetune", "pixels-crops-us", "--data", str(data), "--run", str(tmp_path / "run")]
        for setting in TINY:
            call += ["--set", setting]
        wide = CliRunner().invoke(app, [*call, "--pretrained", str(tmp_path / "wide.pt")])
        assert (wide.exit_code, "width" in wide.output) == (2, True)
        assert isinstance(wide.exception, SystemExit)
        for name in ("text.pt", "missing.pt"):
            outcome = CliRunner().invoke(app, [*call, "--pretrained", str(tmp_path / name)])
            assert (outcome.exit_code, name in outcome.output.replace("\n", "")) == (2, True), (
                outcome.output
            )

    def test_finetune_prints_its_scores(self, data: Path, tmp_path: Path) -> None:
        settings = [f"--set={s}" for s in (*TINY, "optimisation.epochs=1", "optimisation.seed=2")]
        result = CliRunner().invoke(
            app,
            [
                *("finetune", "pixels-crops-us", "--data", str(data)),
                *("--run", str(tmp_path / "run"), "--device", "cpu", *settings),
            ],
        )
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout[result.stdout.index("{") :])["n"] > 0
        # Without --seed, the seed is that of the setting.
        run = Run.model_validate_json((tmp_path / "run" / "run.json").read_bytes())
        assert run.config.optimisation.seed == 2


def test_cut_mix_shares_labels_by_area() -> None:
    patches = np.arange(6, dtype=np.float32)[:, None, None, None] * np.ones((1, 3, 16, 16))
    patches = patches.astype(np.float32)
    target = np.eye(6, dtype=np.float32)
    mixed, labels = cut_mix(patches, target, np.random.default_rng(3))
    np.testing.assert_allclose(labels.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(mixed.mean(axis=(1, 2, 3)), labels @ np.arange(6), atol=1e-4)


def test_a_section_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    report = tmp_path / "results.md"
    for title, text in (("a", "first"), ("b", "second"), ("a", "third")):
        write_section(report, title, text)
    got = report.read_text()
    assert "first" not in got
    assert got.index("third") < got.index("second")


def test_the_commands_of_a_run_reproduce_it(tmp_path: Path) -> None:
    """The command has the differences from the zoo's configuration, after the pretrained run."""
    usual = ZOO["landcover-eurosat"]
    first = Run(config=usual, data=tmp_path)
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "run.json").write_text(first.model_dump_json())
    shorter = usual.model_copy(
        update={"optimisation": usual.optimisation.model_copy(update={"epochs": 3})}
    )
    weights = tmp_path / "first" / "weights.pt"
    found = commands(Run(config=shorter, data=tmp_path, pretrained=weights))
    call = "python -m training finetune landcover-eurosat"
    assert found == [
        f"{call} --run {tmp_path}/first",
        f"{call} --pretrained {weights} --set optimisation.epochs=3",
    ]


@pytest.mark.parametrize(
    "encoder", [EfficientNetLite0Config(zoom=1.5), PatchEncoderConfig(width=32, contrast=True)]
)
@pytest.mark.parametrize("base", ["landcover-eurosat", "my-cover"])
def test_the_commands_of_either_patch_encoder_are_accepted(
    tmp_path: Path, base: str, encoder: EfficientNetLite0Config | PatchEncoderConfig
) -> None:
    """The settings in a command make the run's configuration, whatever the usual encoder is."""
    usual = configuration(base, "landcover")
    others = (PatchEncoderConfig(), EfficientNetLite0Config())
    config = usual.model_copy(update={"encoder": encoder, "others": others})
    (command,) = commands(Run(config=config, data=tmp_path))
    words = shlex.split(command)
    settings = [after for word, after in itertools.pairwise(words) if word == "--set"]
    assert changed(usual, settings) == config


TINY_PRETRAINING = PretrainConfig(
    steps=2,
    groups=2,
    per_group=8,
    measured_batches=1,
    series_views=0,
    imagery_views=0,
    side=16,
    pixel=PixelEncoderConfig(width=8, embedding=16),
    patch=PatchEncoderConfig(width=8, depths=(0, 0, 0, 1), embedding=16),
    seed=5,
    sources=SourcesConfig(stacks=(), synthetic=1, series=(), eurosat=False),
)


def test_half_precision_keeps_every_input_in_its_place() -> None:
    """An encoder without a calendar but with bands gets the bands as bands."""
    torch.manual_seed(0)
    graph = PixelGraph(
        bands=BANDS,
        indices=INDICES,
        steps=36,
        step_days=10,
        encoder=PixelEncoder(width=16, embedding=32, bands=3),
        head=ClassificationHead(32, 5),
        reflectance=True,
    ).eval()
    inputs = pixel_inputs(graph, 20, 30)
    tensors = [torch.from_numpy(inputs[name]) for name in ("values", "valid", "days")]
    with torch.inference_mode():
        np.testing.assert_allclose(in_half(graph)(*tensors), graph(*tensors), atol=0.01)


@pytest.mark.parametrize(
    ("name", "task", "more"),
    [("pixels-crops-us", None, "labels=0.5"), ("my-crops", "classify", "optimisation.seed=3")],
)
def test_the_commands_of_a_chain_are_read_as_that_chain(
    data: Path, tmp_path: Path, name: str, task: str | None, more: str
) -> None:
    """The commands in a card reproduce its configuration, for every combination of options."""
    folder = tmp_path / "pretrained"
    pretrain(TINY_PRETRAINING, places=Places(data=data), folder=folder, device="cpu")
    run = Run(
        config=changed(configuration(name, task), [*TINY, more]),
        data=data,
        pretrained=folder / "checkpoint.pt",
        everything=True,
        protocol="linear",
    )
    before, last = commands(run)
    call = [*shlex.split(last)[3:], "--data", str(data), "--run", str(tmp_path / "again")]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    assert Run.model_validate_json((tmp_path / "again" / "run.json").read_bytes()) == run
    # The folder holds a pretraining: one of another configuration would be refused.
    result = CliRunner().invoke(app, [*shlex.split(before)[3:], "--data", str(data)])
    assert result.exit_code == 0, result.output


def test_a_card_names_the_data_of_its_pretraining(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pretrained"
    pretrain(TINY_PRETRAINING, places=Places(data=data), folder=folder, device="cpu")
    first = tiny_run(data, pretrained=folder / "checkpoint.pt")
    finetune(first, tmp_path / "first", device="cpu", threads=1)
    last = tiny_run(data, pretrained=tmp_path / "first" / "weights.pt", everything=True)
    task, scratch = task_of(first), tiny_run(data)
    metrics = {"seconds": 1.0, "scores": {}}
    for run, learned in ((first, True), (last, True), (scratch, False)):
        entries = card_fields(run, task, metrics, "mine")["training_data"]
        before = {part.name: part.n for part in entries if part.use.startswith("pretraining")}
        # One synthetic scene; its part that is held out is another scene.
        assert before == ({"synthetic": 64 * 64} if learned else {})
        assert {part.name for part in entries if part.use == "labels"} == {"crops_us_2021"}


def test_a_pretraining_without_its_sources_is_an_error(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pretrained"
    pretrain(TINY_PRETRAINING, places=Places(data=data), folder=folder, device="cpu")
    checkpoint = folder / "checkpoint.pt"
    stored = torch.load(checkpoint, weights_only=True)
    del stored["learned_from"]  # as an earlier version left it
    torch.save(stored, checkpoint)
    run = tiny_run(data, pretrained=checkpoint)
    with pytest.raises(UnknownOrigin, match=r"checkpoint\.pt does not state its training data"):
        card_fields(run, task_of(run), {"seconds": 1.0, "scores": {}}, "mine")


def test_one_network_starts_from_the_first_of_several(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pairs = [(PatchEncoder(width=8, embedding=16), ClassificationHead(16, 3)) for _ in range(3)]
    (encoder, head), *others = pairs[:2]
    several = PatchGraph(encoder=encoder, head=head, others=others)
    several.head.temperature.fill_(1.5)
    torch.save(several.state_dict(), tmp_path / "weights.pt")
    alone = PatchGraph(encoder=pairs[2][0], head=pairs[2][1])
    load_encoder(alone, tmp_path / "weights.pt")
    patches = torch.rand(2, 3, 32, 32)
    for graph in (several, alone):
        graph.eval()
    with torch.no_grad():
        first, second = several.each(patches)
        torch.testing.assert_close(alone.raw(patches), first)
        assert not torch.allclose(first, second)
    assert alone.head.temperature == 1.5


def test_encoders_of_several_networks_are_not_loaded_from_the_first_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)

    def graph(classes: int) -> PatchGraph:
        pairs = [
            (PatchEncoder(width=8, embedding=16), ClassificationHead(16, classes)) for _ in range(2)
        ]
        (encoder, head), *others = pairs
        return PatchGraph(encoder=encoder, head=head, others=others)

    earlier, later = graph(3), graph(5)
    torch.save(earlier.state_dict(), tmp_path / "weights.pt")
    load_encoder(later, tmp_path / "weights.pt")
    pairs = [(earlier.encoder, later.encoder), (earlier.others[0][0], later.others[0][0])]
    for stored, loaded in pairs:
        for name, value in loaded.state_dict().items():
            torch.testing.assert_close(value, stored.state_dict()[name])


def test_seeds_that_were_scored_on_different_places_make_no_row() -> None:
    scored = {"logits": np.eye(2), "labels": np.array([0, 1]), "places": np.array([0, 1])}
    other = {**scored, "places": np.array([0, 2])}
    assert outputs_row("a", [scored, scored]).seeds == 2
    with pytest.raises(TrainingError, match="were scored on different places: give runs"):
        outputs_row("a", [scored, other])

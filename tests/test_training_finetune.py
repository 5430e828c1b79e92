"""Runs of finetuning, export and evaluation on small data written in the archives' layout."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from sklearn.metrics import f1_score
from typer.testing import CliRunner

from models.encoders import PixelEncoder
from models.registry import Registry, load_bundle
from training.__main__ import app, changed, configuration
from training.calibration import (
    expected_calibration_error,
    fit_temperature,
    macro_f1,
    probabilities,
)
from training.classification import PixelClassification
from training.config import ZOO, ClassifyConfig, Run
from training.evaluate import evaluate, place_confusions, write_section
from training.export import ParityError, check_parity, commands, export_run
from training.finetune import (
    CHECKPOINT,
    CheckpointMismatch,
    finetune,
    fit,
    load_encoder,
    load_finished,
    task_of,
)
from training.landcover import cut_mix
from training.legends import CDL

TINY = [
    "encoder.width=8",
    "encoder.embedding=16",
    "optimisation.batch=32",
    "optimisation.epochs=3",
    "optimisation.average=0.5",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops whose class is the height of their season, in the layout of the archive."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    n, codes, t = 192, np.array([1, 5, 176]), 36
    kind = rng.integers(3, size=n)
    season = np.exp(-0.5 * ((np.arange(t) - 10 - 7 * kind[:, None]) / 4) ** 2)
    nir, red = 0.2 + 0.25 * season, 0.15 - 0.1 * season
    bands = np.stack([red * 0.6, red, nir], axis=-1) + rng.normal(0, 0.01, (n, t, 3))
    reflectance = (np.maximum(bands, 0.001) * 10_000).astype(np.int16)
    reflectance[rng.random((n, t)) < 0.15] = 0
    lonlat = np.column_stack([-120 + 0.1 * (np.arange(n) % 16), np.full(n, 36.0)]) + 0.05
    (folder / "crops_us_2021").mkdir()
    np.savez(
        folder / "crops_us_2021" / "crops_us_2021_dev.npz",
        reflectance=reflectance,
        dates=np.array([str(date(2021, 1, 5) + timedelta(days=10 * i)) for i in range(t)]),
        bands=np.array(["B02", "B04", "B08"]),
        lonlat=lonlat,
        label=codes[kind].astype(np.int16),
        is_val=np.arange(n) % 16 >= 12,
    )
    return folder


def tiny_run(data: Path, **fields: object) -> Run:
    config = changed(ZOO["pixels-crops-us"], TINY)
    return Run.model_validate({"config": config.model_dump(), "data": data, **fields})


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    finetune(tiny_run(data), folder, device="cpu")
    return folder


class Interrupted(PixelClassification):
    """A task that dies as its second epoch begins."""

    def batches(self, epoch: int, rng: np.random.Generator) -> Iterator[tuple[torch.Tensor, ...]]:
        if epoch == 1:
            raise InterruptedError
        return super().batches(epoch, rng)


class TestFinetune:
    def test_learns_and_logs_every_epoch(self, finished: Path) -> None:
        with (finished / "log.csv").open() as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file)]
        assert len(losses) == 3
        assert losses[-1] < losses[0]

    def test_a_killed_run_goes_on_to_the_same_weights(
        self, data: Path, finished: Path, tmp_path: Path
    ) -> None:
        run = tiny_run(data)
        how = run.config.optimisation
        cpu = torch.device("cpu")
        for task in (Interrupted(run.config, data), PixelClassification(run.config, data)):
            torch.manual_seed(how.seed)
            try:
                graph = fit(task, task.graph(), how, tmp_path, cpu)
            except InterruptedError:
                kept = torch.load(tmp_path / CHECKPOINT, weights_only=True)
                assert kept["epoch"] == 1
        want = torch.load(finished / "weights.pt", weights_only=True)
        for name, weights in graph.state_dict().items():
            if name != "head.temperature":  # fitted after the last epoch
                torch.testing.assert_close(weights, want[name], msg=name)

    def test_another_configuration_is_refused_in_the_same_folder(
        self, data: Path, finished: Path
    ) -> None:
        with pytest.raises(CheckpointMismatch):
            finetune(tiny_run(data, everything=True), finished, device="cpu")

    def test_trains_on_no_validation_place_unless_told(self, data: Path) -> None:
        task = task_of(tiny_run(data))
        held = set(task.validation.places.tolist())
        assert held
        assert held.isdisjoint(task.train.places.tolist())
        assert held < set(task_of(tiny_run(data, everything=True)).train.places.tolist())

    def test_a_share_of_the_labels_is_taken_place_by_place(self, data: Path) -> None:
        run = tiny_run(data)
        config = changed(run.config, ["labels=0.25"])
        whole = task_of(run).train
        few = PixelClassification(config, data).train
        assert len(few) == round(0.25 * len(whole))
        assert len(set(few.places.tolist())) <= 4

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
        with pytest.raises(CheckpointMismatch, match="size mismatch"):
            load_encoder(graph, tmp_path / "wide.pt")


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

    def test_the_file_answers_as_torch_does(self, zoo: Path, finished: Path) -> None:
        _, task, graph, _ = load_finished(finished)
        part = task.validation.take(np.arange(9))
        session = onnxruntime.InferenceSession(
            zoo / "pixels-crops-us" / "model.onnx", providers=["CPUExecutionProvider"]
        )
        got = session.run(None, {"values": part.values, "valid": part.valid, "days": part.days[0]})[
            0
        ]
        with torch.inference_mode():
            want = graph(*(torch.from_numpy(a) for a in (part.values, part.valid, part.days[0])))
        np.testing.assert_allclose(got, want.numpy(), atol=1e-5)

    def test_the_file_tells_nothing_of_the_machine(self, zoo: Path) -> None:
        path = zoo / "pixels-crops-us" / "model.onnx"
        model = onnx.load(path)
        assert not any(node.metadata_props for node in model.graph.node)
        assert str(Path(__file__).parents[1]).encode() not in path.read_bytes()

    def test_a_graph_unlike_its_file_is_refused(self, zoo: Path, finished: Path) -> None:
        _, task, graph, _ = load_finished(finished)
        with torch.no_grad():
            graph.head.linear.bias[0] += 0.5
        part = task.validation.take(np.arange(3))
        real = {"values": part.values, "valid": part.valid, "days": part.days[0]}
        with pytest.raises(ParityError, match="off torch"):
            check_parity(graph, zoo / "pixels-crops-us" / "model.onnx", real)

    def test_evaluation_writes_tables_and_keeps_the_card_valid(
        self, zoo: Path, finished: Path, tmp_path: Path
    ) -> None:
        report = tmp_path / "results.md"
        report.write_text("# Results\n\n## Another\n\nkept\n")
        (table,) = evaluate([finished], zoo=zoo, report=report)
        assert {"random forest", "extra trees", "logistic regression"} < {
            row.name for row in table.rows
        }
        text = report.read_text()
        assert "kept" in text
        assert "| random forest | 1 |" in text
        models = load_bundle(zoo / "pixels-crops-us").card.metrics["evaluation"]["models"]
        value, low, high = models["random forest"]["accuracy"]
        assert low <= value <= high


class TestCalibration:
    def test_ece_and_f1_equal_plain_computations(self) -> None:
        rng = np.random.default_rng(0)
        shares = rng.dirichlet(np.ones(4), 500)
        labels = rng.integers(4, size=500)
        confidence, right = shares.max(1), shares.argmax(1) == labels
        want = 0.0
        for low in np.arange(15) / 15:
            inside = (confidence >= low) & (confidence < low + 1 / 15)
            if inside.any():
                want += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
        assert expected_calibration_error(shares, labels) == pytest.approx(want, abs=1e-6)
        got = macro_f1(shares.argmax(1), labels, 4)
        assert got == pytest.approx(f1_score(labels, shares.argmax(1), average="macro"))

    def test_the_temperature_mends_overconfidence(self) -> None:
        rng = np.random.default_rng(0)
        logits = rng.normal(size=(4000, 5)) * 1.5
        drawn = [rng.choice(5, p=p) for p in probabilities(logits)]
        labels = np.array(drawn)
        assert fit_temperature(logits * 3, labels) == pytest.approx(3, rel=0.1)

    def test_confusions_of_places_sum_to_the_whole(self) -> None:
        rng = np.random.default_rng(0)
        labels, predicted = rng.integers(3, size=(2, 100))
        matrices = place_confusions(predicted, labels, rng.integers(9, size=100), 3)
        whole = np.zeros((3, 3))
        np.add.at(whole, (labels, predicted), 1)
        np.testing.assert_array_equal(matrices.sum(axis=0), whole)


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
        ],
    )
    def test_a_wrong_argument_is_told(self, arguments: list[str], message: str) -> None:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert message in result.output

    def test_finetune_prints_its_scores(self, data: Path, tmp_path: Path) -> None:
        settings = [f"--set={s}" for s in (*TINY, "optimisation.epochs=1")]
        result = CliRunner().invoke(
            app,
            [
                *("finetune", "pixels-crops-us", "--data", str(data)),
                *("--run", str(tmp_path / "run"), "--device", "cpu", *settings),
            ],
        )
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout[result.stdout.index("{") :])["n"] > 0


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


def test_the_commands_of_a_run_make_it_again(tmp_path: Path) -> None:
    """What differs from the zoo's configuration is said, and the run it starts from comes first."""
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

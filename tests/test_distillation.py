"""Teachers: a run learns the mean prediction of finished runs beside the labels."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.kits.small_crops import TINY, write_crops
from training.__main__ import app
from training.calibration import probabilities
from training.card import UnknownOrigin, card_fields, commands
from training.classification import PixelClassification
from training.config import ZOO, Run, changed
from training.finetune import (
    CheckpointMismatch,
    UnfitTeacher,
    finetune,
    load_finished,
)
from training.forecasting import PixelForecast

pytestmark = pytest.mark.slow

# Another width and number of networks, and few steps: a teacher that is far from the labels.
LARGER = ("encoder.width=16", "members=2", "optimisation.epochs=1", "optimisation.seed=7")


def run_of(data: Path, *settings: str, **fields: object) -> Run:
    config = changed(ZOO["pixels-crops-us"], [*TINY, *settings])
    return Run.model_validate({"config": config.model_dump(), "data": data, **fields})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_crops(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def teachers(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    folder = tmp_path_factory.mktemp("teachers")
    for name, settings in (("one", LARGER), ("two", (*LARGER, "optimisation.seed=8"))):
        finetune(run_of(data, *settings), folder / name, device="cpu", threads=1)
    return folder / "one", folder / "two"


@pytest.fixture(scope="module")
def taught(
    data: Path, teachers: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("students") / "taught"
    run = run_of(data, "distil=1", "optimisation.epochs=30", teachers=teachers)
    finetune(run, folder, device="cpu", threads=1)
    return folder


def predicted(folder: Path, *, calibrated: bool) -> np.ndarray:
    """Probabilities of the validation places (N, K)."""
    _, task, graph, _ = load_finished(folder)
    temperature = float(graph.head.temperature) if calibrated else 1.0
    return probabilities(task.outputs(graph)["logits"], temperature)


def test_a_student_approaches_its_teachers(
    data: Path, teachers: tuple[Path, ...], taught: Path, tmp_path: Path
) -> None:
    alone = run_of(data, "optimisation.epochs=30")
    finetune(alone, tmp_path / "alone", device="cpu", threads=1)
    expected = np.mean([predicted(folder, calibrated=True) for folder in teachers], axis=0)

    def apart(folder: Path) -> float:
        """Kullback-Leibler divergence from the teachers, nats."""
        own = predicted(folder, calibrated=False)
        return float((expected * np.log(expected / own)).sum(axis=1).mean())

    assert apart(taught) < 0.5 * apart(tmp_path / "alone")


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_loss_is_the_weighted_mean_of_both(
    data: Path, teachers: tuple[Path, ...], share: float
) -> None:
    run = run_of(data, f"distil={share}", "adjust=0.5", "members=2", teachers=teachers)
    task = PixelClassification(run.config, data)
    torch.manual_seed(0)
    graph = task.graph().eval()
    batch = next(iter(task.batches(0, np.random.default_rng(0))))
    soft = torch.softmax(torch.randn(len(batch[-1]), len(task.legend)), dim=1)
    own = task.loss(graph, batch).item()
    with torch.no_grad():
        logs = [torch.log_softmax(x, dim=1).numpy() for x in graph.each(*batch[:-1])]
    entropy = -np.mean([(soft.numpy() * log).sum(axis=1) for log in logs])
    expected = (1 - share) * own + share * entropy
    assert task.loss(graph, batch, soft).item() == pytest.approx(expected, rel=1e-5)


def test_a_forecaster_learns_quantiles_on_every_step() -> None:
    config = changed(
        ZOO["forecast-vi"],
        ["distil=1", "members=1", "encoder.width=8", "encoder.embedding=16", "horizon=2"],
    )
    task = PixelForecast.__new__(PixelForecast)  # without its data, which are large
    task.config = config
    torch.manual_seed(0)
    graph = task.graph().eval()
    n, dates = 4, 12
    inputs = (
        torch.rand(n, dates, 3) * 0.3 + 0.05,
        torch.ones(n, dates, dtype=torch.bool),
        torch.arange(dates) * 20.0 + torch.zeros(n, 1),
        torch.full((n,), 40.0),
    )
    target, unknown = torch.zeros(n, 2, 3), torch.zeros(n, 2, 3, dtype=torch.bool)
    with torch.no_grad():
        (own,) = graph.each(*inputs)
    taught = own + 0.1
    loss = task.loss(graph, (*inputs, target, unknown), taught)
    # Smooth-L1 of 0.1 beyond 0.01: the distance less half of 0.01.
    assert loss.item() == pytest.approx(0.1 - 0.005, rel=1e-4)
    loss.backward()
    with torch.no_grad():
        for weight in graph.parameters():
            if weight.grad is not None:
                weight -= 1e-3 * weight.grad
        (after,) = graph.each(*inputs)
    assert (after - taught).abs().mean() < (own - taught).abs().mean()


def test_the_card_states_the_teachers(data: Path, taught: Path, teachers: tuple[Path, ...]) -> None:
    run, task, _, metrics = load_finished(taught)
    *before, last = commands(run)
    assert [shlex.split(text)[6] for text in before] == [folder.as_posix() for folder in teachers]
    words = shlex.split(last)
    given = [after for word, after in itertools.pairwise(words) if word == "--teacher"]
    assert given == [folder.as_posix() for folder in teachers]
    assert "distil=1.0" in words
    assert last in card_fields(run, task, metrics, "mine")["training"]["command"]


def test_the_commands_of_a_taught_run_are_read_as_that_run(
    data: Path, taught: Path, tmp_path: Path
) -> None:
    run = load_finished(taught)[0]
    call = [*shlex.split(commands(run)[-1])[3:], "--data", str(data), "--device", "cpu"]
    result = CliRunner().invoke(app, [*call, "--run", str(tmp_path / "again")])
    assert result.exit_code == 0, result.output
    assert Run.model_validate_json((tmp_path / "again" / "run.json").read_bytes()) == run
    again, first = (
        torch.load(folder / "weights.pt", weights_only=True)
        for folder in (tmp_path / "again", taught)
    )
    torch.testing.assert_close(again, first)


def test_a_killed_run_resumes_with_the_same_teachers_only(
    data: Path,
    teachers: tuple[Path, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = tmp_path / "teacher"
    own.mkdir()
    for path in teachers[0].iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    run = run_of(data, teachers=(own,))
    finetune(run, tmp_path / "undisturbed", device="cpu", threads=1)

    def killed(*_: Any) -> None:
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr("training.finetune._log", killed)  # after the checkpoint of the first epoch
        with pytest.raises(InterruptedError):
            finetune(run, tmp_path / "killed", device="cpu", threads=1)
    weights = own / "weights.pt"
    kept = weights.read_bytes()
    stored = torch.load(weights, weights_only=True)
    stored["head.linear.bias"] += 1.0
    torch.save(stored, weights)
    with pytest.raises(CheckpointMismatch, match="weights of the teachers have changed"):
        finetune(run, tmp_path / "killed", device="cpu", threads=1)
    with pytest.raises(CheckpointMismatch, match="another configuration"):
        finetune(run_of(data), tmp_path / "killed", device="cpu", threads=1)
    weights.write_bytes(kept)
    finetune(run, tmp_path / "killed", device="cpu", threads=1)
    ended, expected = (
        torch.load(tmp_path / name / "weights.pt", weights_only=True)
        for name in ("killed", "undisturbed")
    )
    torch.testing.assert_close(ended, expected)


def stored_run(folder: Path, run: Run) -> Path:
    """A folder that looks like that of a finished run."""
    folder.mkdir()
    (folder / "run.json").write_text(run.model_dump_json())
    (folder / "metrics.json").write_text("{}")
    (folder / "weights.pt").touch()
    return folder


def test_the_card_names_the_data_of_a_teacher(data: Path, tmp_path: Path) -> None:
    folder = stored_run(tmp_path / "teacher", run_of(data))
    used = [
        {"name": name, "use": "labels", "n": n}
        for name, n in (("crops_us_2021", 9), ("eurosat", 8))
    ]
    (folder / "metrics.json").write_text(json.dumps({"data": used}))
    run = run_of(data, teachers=(folder,))
    task, metrics = PixelClassification(run.config, data), {"seconds": 1.0, "scores": {}}
    entries = card_fields(run, task, metrics, "mine")["training_data"]
    assert [(part.name, part.n) for part in entries if "teacher" in part.use] == [("eurosat", 8)]
    shutil.rmtree(folder)
    with pytest.raises(UnknownOrigin, match="is not there any more"):
        card_fields(run, task, metrics, "mine")


def test_a_teacher_that_does_not_fit_is_refused_in_one_sentence(data: Path, tmp_path: Path) -> None:
    everything = stored_run(tmp_path / "all", run_of(data, everything=True))
    made = {
        "task": Run(config=ZOO["landcover-eurosat"], data=data),
        "legend": Run(config=ZOO["pixels-landcover"], data=data),
        "bands": Run(config=ZOO["pixels-crops-us-20m"], data=data),
        "window": run_of(data, "window.steps=24", "window.step_days=15"),
        "validation places": run_of(data, everything=True),
        # What a teacher has learned, it passes on.
        "learned from the validation": run_of(data, teachers=(everything,)),
        "on which this run is scored": run_of(data, pretrained=(everything / "weights.pt",)),
    }
    for number, (message, run) in enumerate(made.items()):
        folder = stored_run(tmp_path / f"teacher-{number}", run)
        with pytest.raises(UnfitTeacher, match=message):
            finetune(run_of(data, teachers=(folder,)), tmp_path / "student", device="cpu")
    with pytest.raises(UnfitTeacher, match="not the folder of a finished run"):
        finetune(run_of(data, teachers=(tmp_path / "none",)), tmp_path / "student", device="cpu")
    usual = stored_run(tmp_path / "usual", run_of(data))
    away = run_of(data, teachers=(usual,), left_out=("us-west",))
    with pytest.raises(UnfitTeacher, match=r"us-west.*leaves out"):
        finetune(away, tmp_path / "student", device="cpu")
    with pytest.raises(UnfitTeacher, match="protocol linear"):
        finetune(
            run_of(data, teachers=(usual,), protocol="linear"), tmp_path / "student", device="cpu"
        )
    assert not (tmp_path / "student").exists()
    forecast = Run(config=ZOO["forecast-vi"], data=data)
    shorter = stored_run(
        tmp_path / "shorter",
        forecast.model_copy(update={"config": changed(forecast.config, ["horizon=5"])}),
    )
    with pytest.raises(UnfitTeacher, match=r"another horizon \(5\)"):
        finetune(
            forecast.model_copy(update={"teachers": (shorter,)}), tmp_path / "student", device="cpu"
        )


def test_a_run_on_every_place_learns_from_one_of_its_kind(data: Path, tmp_path: Path) -> None:
    finetune(run_of(data, *LARGER, everything=True), tmp_path / "large", device="cpu", threads=1)
    run = run_of(data, "optimisation.epochs=1", everything=True, teachers=(tmp_path / "large",))
    done = finetune(run, tmp_path / "small", device="cpu", threads=1)
    assert done.graph is not None
    assert all(torch.isfinite(weight).all() for weight in done.graph.parameters())

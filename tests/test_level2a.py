"""Labelled patches of level 2A: what a window shows, how areas are drawn, left out and scored."""

from __future__ import annotations

import io
import json
import zipfile
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import onnxruntime
import pyogrio
import pytest
import rasterio
import shapely
import torch
from PIL import Image
from rasterio.features import rasterize
from rasterio.transform import from_origin
from rasterio.warp import transform_geom
from typer.testing import CliRunner

from models.registry import load_bundle
from tests.kits.exports import float32_alone
from training.__main__ import app
from training.augment import NO_PATCH_AUGMENTATION
from training.calibration import fit_temperature, probabilities
from training.card import card_fields, commands
from training.config import LandcoverConfig, Optimisation, PatchEncoderConfig, Run
from training.datasets import Scene
from training.datasets.eurosat import CLASSES, RGB
from training.datasets.level2a import (
    HERAULT,
    SIDE,
    TREE_COVER,
    draw_weights,
    joined,
    labelled_areas,
    observed,
    season_of,
)
from training.datasets.stacks import StackError, read_romania, read_safe_folders
from training.export import export_run
from training.finetune import finetune, load_finished, task_of
from training.landcover import NoLabelledArea
from training.regions import WHOLE, Plan, across, evaluate_regions, read_report

pytestmark = pytest.mark.slow

BANDS = ("B02", "B03", "B04", "B08")


def scene(values: np.ndarray, valid: np.ndarray, dates: tuple[date, ...]) -> Scene:
    return Scene(source="s", bands=BANDS, dates=dates, values=values, scale=1e-4, valid=valid)


class TestObserved:
    def test_clear_dates_and_the_medians_of_seasons(self) -> None:
        rng = np.random.default_rng(0)
        # Winter begins with December, so that these four dates are of one season.
        winter = (date(2019, 12, 5), date(2020, 1, 5), date(2020, 2, 5), date(2020, 2, 25))
        dates = (*winter, date(2020, 6, 1), date(2020, 7, 1))
        values = rng.integers(100, 3000, (6, 4, 70, 80)).astype(np.uint16)
        valid = np.ones((6, 70, 80), bool)
        valid[1, :, 40:] = False  # half cloudy: in the median, but no patch of its own
        valid[4, 20:60, 20:60] = False
        found = list(observed(scene(values, valid, dates), (3, 10)))
        alone = [i for i in range(6) if i not in (1, 4)]
        assert [(season, n) for season, n, _ in found[:-1]] == [
            (season_of(dates[i]), 1) for i in alone
        ]
        window = values[:, [2, 1, 0], 3 : 3 + SIDE, 10 : 10 + SIDE] / 10_000
        for (_, _, patch), i in zip(found, alone, strict=False):
            np.testing.assert_allclose(patch, window[i], rtol=1e-6)
        season, n, median = found[-1]
        assert (season, n) == (0, 4)
        left, right = np.median(window[:4], axis=0), np.median(window[[0, 2, 3]], axis=0)
        # Column 40 of the scene is column 30 of the window.
        np.testing.assert_allclose(median[:, :, :30], left[:, :, :30], rtol=1e-5)
        np.testing.assert_allclose(median[:, :, 30:], right[:, :, 30:], rtol=1e-5)

    def test_single_missing_pixels_are_filled_with_the_median(self) -> None:
        values = np.full((1, 4, 64, 64), 500, np.uint16)
        values[:, :, ::2] = 700
        valid = np.ones((1, 64, 64), bool)
        valid[0, 5, 5] = False
        ((_, _, patch),) = observed(scene(values, valid, (date(2020, 4, 1),)), (0, 0))
        assert np.isfinite(patch).all()
        assert patch[0, 5, 5] == pytest.approx(0.07)
        valid[0, :2] = False
        assert list(observed(scene(values, valid, (date(2020, 4, 1),)), (0, 0))) == []


def stack(folder: Path, side: int, first: date, levels: list[tuple[int, int, int]]) -> None:
    """One GeoTIFF for each month, whose bands B02, B03, B04 have these levels, with texture."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(levels))
    for number, colour in enumerate(levels):
        day = first + timedelta(days=31 * number)
        shape = {"height": side, "width": side, "count": 4, "dtype": "uint16", "nodata": 0}
        grid = {"crs": "EPSG:32631", "transform": from_origin(500000, 5600000, 10, 10)}
        with rasterio.open(folder / f"S2_{day:%Y%m%d}.tif", "w", "GTiff", **shape, **grid) as file:
            for i, level in enumerate((*colour, 3000)):
                file.write(rng.normal(level, 40, (side, side)).astype(np.uint16), i + 1)
                file.set_band_description(i + 1, BANDS[i])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small EuroSAT, and two areas of level 2A in the layout of the real ones."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "eurosat").mkdir()
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 200, (len(CLASSES), 3))
    lists: dict[str, list[str]] = {"train": [], "val": []}
    with zipfile.ZipFile(folder / "eurosat" / "small.zip", "w") as archive:
        for label, name in enumerate(CLASSES):
            for number in range(6):
                patch = np.clip(colours[label] + rng.normal(0, 8, (64, 64, 3)), 0, 255)
                file = io.BytesIO()
                Image.fromarray(patch.astype(np.uint8)).save(file, "JPEG")
                archive.writestr(f"{name}/{name}_{number}.jpg", file.getvalue())
                lists["val" if number > 3 else "train"].append(f"{name}_{number}.jpg")
    for split, names in lists.items():
        (folder / "eurosat" / f"{split}.txt").write_text("\n".join(names))
    stack(folder / "hesbaye_a_monthly", 101, date(2021, 3, 1), [(500, 700, 900)] * 3)
    stack(folder / "south_tyrol_2022", 12 * 64, date(2022, 6, 1), [(200, 400, 300)])
    return folder


def config(**changes: object) -> LandcoverConfig:
    return LandcoverConfig(
        name="my-cover",
        encoder=PatchEncoderConfig(width=4, depths=(0, 1, 0, 1), embedding=16, stride=2),
        optimisation=Optimisation(epochs=1, batch=8, learning_rate=3e-3),
        views=1,
        mix=0.0,
        small_epochs=0.0,
        level_2a=0.25,
        augmentation=NO_PATCH_AUGMENTATION,
    ).model_copy(update=changes)


class TestBatches:
    def test_a_share_of_each_batch_is_level_2a_and_an_area_left_out_is_never_drawn(
        self, data: Path
    ) -> None:
        task = task_of(Run(config=config(), data=data))
        assert task.regions == ("south_tyrol", "hesbaye")
        away = task_of(Run(config=config(), data=data, left_out=("south_tyrol",)))
        assert away.left_out is not None
        assert set(np.unique(away.left_out.labels)) == {
            CLASSES.index(c)
            for c in ("Forest", "Residential", "Industrial", "PermanentCrop", "River")
        }
        own = {patch.tobytes() for patch in away.areas.values}
        others = {patch.tobytes() for patch in away.left_out.values}
        assert not own & others
        for one, drawn in ((task, own | others), (away, own)):
            batches = list(one.batches(0, np.random.default_rng(0)))
            assert len(batches) == 40 // 8
            for patches, target in batches:
                assert len(patches) == len(target) == 8
                labelled = [p.tobytes() in drawn for p in patches.numpy()]
                assert labelled == [False] * 6 + [True] * 2

    def test_classes_of_areas_and_places_of_a_class_are_drawn_alike(self, data: Path) -> None:
        areas = labelled_areas(data)
        weights, together = draw_weights(areas), joined(areas)
        area = np.repeat([0, 1], [len(a.labels) for a in areas])
        cells = {
            (a, label): weights[(area == a) & (together.labels == label)].sum()
            for a in (0, 1)
            for label in np.unique(together.labels[area == a])
        }
        np.testing.assert_allclose(list(cells.values()), 1 / len(cells))
        forest = together.labels == CLASSES.index("Forest")
        places = np.bincount(together.places[forest], weights[forest])
        places = places[places > 0]
        np.testing.assert_allclose(places, places[0])
        assert weights.sum() == pytest.approx(1.0)

    def test_an_epoch_may_draw_a_share_of_the_patches(self, data: Path) -> None:
        task = task_of(Run(config=config(drawn=0.6), data=data))
        assert len(list(task.batches(0, np.random.default_rng(0)))) == task.steps == 3

    def test_a_share_of_level_2a_without_an_area_is_an_error(
        self, data: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "eurosat").symlink_to(data / "eurosat")
        with pytest.raises(NoLabelledArea, match="level_2a"):
            task_of(Run(config=config(), data=tmp_path))
        with pytest.raises(NoLabelledArea):
            task_of(Run(config=config(), data=data, left_out=("south_tyrol", "hesbaye")))
        assert task_of(Run(config=config(level_2a=0.0), data=tmp_path)).regions == ()

    def test_the_training_data_of_the_areas_are_stated(self, data: Path) -> None:
        task = task_of(Run(config=config(), data=data, left_out=("south_tyrol",)))
        # Three months in spring, and their median, at each place.
        places = len(np.unique(task.areas.places))
        entry = {"name": "hesbaye_a_monthly", "use": "labels, level 2A", "n": 4 * places}
        assert [part for part in task.data() if part["name"] != "eurosat"] == [entry]


class TestLeftOut:
    def call(self, data: Path, folder: Path, *regions: str) -> list[str]:
        fields = config().model_dump(mode="json", exclude={"task", "name"})
        settings = [f"--set={name}={json.dumps(value)}" for name, value in fields.items()]
        named = [f"--left-out={region}" for region in regions]
        options = ["--data", str(data), "--run", str(folder), "--device", "cpu"]
        return ["finetune", "my-cover", "--task", "landcover", *named, *options, *settings]

    def test_the_command_leaves_regions_out_and_the_card_states_it(
        self, data: Path, tmp_path: Path
    ) -> None:
        result = CliRunner().invoke(app, self.call(data, tmp_path, "south_tyrol"))
        assert result.exit_code == 0, result.output
        run, task, _, metrics = load_finished(tmp_path)
        assert run == Run(config=config(), data=data, left_out=("south_tyrol",))
        assert task.left_out is not None
        assert " --left-out south_tyrol " in commands(run)[-1]
        training = card_fields(run, task, metrics, "mine")["training"]
        assert training["places"] == "all but the validation places and the regions south_tyrol"

    def test_a_region_that_the_data_do_not_have_is_one_sentence(
        self, data: Path, tmp_path: Path
    ) -> None:
        result = CliRunner().invoke(app, self.call(data, tmp_path / "run", "nowhere"))
        assert result.exit_code == 2
        assert "'nowhere' is not a region of the data of my-cover" in result.output
        assert "south_tyrol, hesbaye" in result.output
        assert isinstance(result.exception, SystemExit)
        assert not (tmp_path / "run").exists()


def test_areas_are_left_out_in_turn_and_their_calibration_goes_into_the_bundle(
    data: Path, tmp_path: Path
) -> None:
    first = Run(config=config(level_2a=0.0), data=data)
    finetune(first, tmp_path / "first", device="cpu", threads=1)
    run = Run(config=config(), data=data, pretrained=(tmp_path / "first" / "weights.pt",))
    plan = Plan(
        run=run,
        folder=tmp_path / "regions",
        report=tmp_path / "results.md",
        device="cpu",
        threads=1,
        command="the command",
    )
    report = evaluate_regions(plan)
    assert list(report.regions) == ["eurosat", "south_tyrol", "hesbaye"]
    outputs = {}
    for name in ("south_tyrol", "hesbaye"):
        left, task, graph, _ = load_finished(tmp_path / "regions" / name)
        assert left.left_out == (name,)
        outputs[name] = task.area_outputs(graph, task.left_out)
    _, task, graph, _ = load_finished(tmp_path / "regions" / WHOLE)
    outputs["eurosat"] = task.outputs(graph)
    # Each area has the same weight, whatever its number of patches.
    counts = [len(o["labels"]) for o in outputs.values()]
    weights = np.concatenate([np.full(n, 1 / n) for n in counts])
    logits, labels = (
        np.concatenate([o[key] for o in outputs.values()]) for key in ("logits", "labels")
    )
    temperature = fit_temperature(logits, labels, weights)
    assert report.calibration["temperature"] == pytest.approx(temperature, rel=1e-3)
    found, own = report.regions["hesbaye"], outputs["hesbaye"]
    shares = probabilities(
        own["logits"], across({n: o for n, o in outputs.items() if n != "hesbaye"})
    )
    assert found["accuracy"] == pytest.approx((shares.argmax(1) == own["labels"]).mean(), abs=1e-4)
    assert found["confidence"] == pytest.approx(shares.max(1).mean(), abs=1e-4)
    assert list(found["accuracy_by_season"]) == ["spring"]
    _, _, start, _ = load_finished(tmp_path / "first")
    before = task.area_outputs(start, labelled_areas(data)[1])
    right = (before["logits"].argmax(1) == before["labels"]).mean()
    assert found["before"]["accuracy"] == pytest.approx(right, abs=1e-4)
    row = f"| hesbaye | {found['n']} | {found['places']} | {found['accuracy']:.3f} |"
    assert row in (tmp_path / "results.md").read_text()
    assert read_report(tmp_path / "regions").regions == json.loads(json.dumps(report.regions))

    final = tmp_path / "final"
    finetune(run.model_copy(update={"everything": True}), final, device="cpu", threads=1)
    with float32_alone():
        bundle = load_bundle(export_run(final, tmp_path / "zoo", regions=tmp_path / "regions"))
    assert bundle.card.regions["hesbaye"]["accuracy"] == found["accuracy"]
    assert bundle.card.training["calibration"] == report.calibration
    trained = {part.name: part.use for part in bundle.card.training_data if "2A" in part.use}
    assert set(trained) == {"hesbaye_a_monthly", "south_tyrol_2022"}
    _, task, graph, _ = load_finished(final)
    patches = task.read(task.validation[:5])
    with torch.inference_mode():
        raw = graph.eval().raw(torch.from_numpy(patches)).numpy()
    np.testing.assert_allclose(
        bundle_outputs(bundle.path("float32"), patches),
        probabilities(raw, report.calibration["temperature"]),
        atol=1e-4,
    )


def bundle_outputs(path: Path, patches: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(path).run(None, {"patches": patches})[0]


class TestRealAreas:
    def test_every_window_is_clear_on_some_date_and_lies_in_its_area(
        self, shared_data: Path, romania: tuple[Path, Path]
    ) -> None:
        if not (shared_data / "hesbaye_a_monthly").is_dir():
            pytest.skip(f"the stacks are not in {shared_data}")
        areas = {area.name: area for area in labelled_areas(shared_data, romania[0])}
        assert list(areas) == ["south_tyrol", "hesbaye", "herault", "romania"]
        for area in areas.values():
            assert area.values.shape[1:] == (len(RGB), SIDE, SIDE)
            assert np.isfinite(area.values).all()
            assert -0.01 < np.quantile(area.values, 0.01) < np.quantile(area.values, 0.99) < 0.6
            assert sum(area.sources.values()) == len(area.labels)
        assert (areas["romania"].labels == CLASSES.index("Forest")).all()
        assert len(np.unique(areas["romania"].seasons)) == 3  # no clear date in winter
        assert len(np.unique(areas["hesbaye"].seasons)) == 4

    def test_forests_of_romania_are_windows_of_trees(self, romania: tuple[Path, Path]) -> None:
        cube, trees = romania
        assert trees.name == TREE_COVER
        (area,) = labelled_areas(Path("nowhere"), cube)
        with rasterio.open(trees) as file:
            cover = np.kron(file.read(1), np.ones((2, 2)))
        values, valid = read_romania(cube).read(RGB)
        clear = valid.all(axis=(1, 2)).argmax()
        shown = {patch.tobytes() for patch in area.values}
        windows = [
            (row, col)
            for row in range(100 - SIDE + 1)
            for col in range(100 - SIDE + 1)
            if values[clear, :, row : row + SIDE, col : col + SIDE].tobytes() in shown
        ]
        assert windows
        for row, col in windows:
            assert (cover[row : row + SIDE, col : col + SIDE] >= 50).mean() >= 0.7

    def test_windows_of_herault_are_covered_by_parcels_of_their_class(
        self, shared_data: Path
    ) -> None:
        folder = shared_data / "herault_safe_2018"
        if not folder.is_dir():
            pytest.skip(f"herault_safe_2018 is not in {shared_data}")
        with rasterio.open(next(folder.rglob("*_B04_10m.jp2"))) as file:
            crs, grid, shape = file.crs, file.transform, file.shape
        facts, _, shapes, (crops,) = pyogrio.raw.read(
            folder / "reference_data" / "france_data_2018.shp", columns=["EC_hcat_n"]
        )
        outlines = transform_geom(
            facts["crs"], crs, [shapely.geometry.mapping(s) for s in shapely.from_wkb(shapes)]
        )
        for name, words in (
            ("PermanentCrop", ("vine",)),
            ("AnnualCrop", ("wheat", "cereal", "fallow")),
        ):
            inside = rasterize(
                [
                    (outline, 1)
                    for outline, crop in zip(outlines, crops.astype(str), strict=True)
                    if any(word in crop for word in words)
                ],
                out_shape=shape,
                transform=grid,
            )
            for row, col in HERAULT[name]:
                assert inside[row : row + SIDE, col : col + SIDE].mean() >= 0.5

    def test_safe_folders_are_read_like_their_files(self, shared_data: Path) -> None:
        folder = shared_data / "herault_safe_2018"
        if not folder.is_dir():
            pytest.skip(f"herault_safe_2018 is not in {shared_data}")
        found = read_safe_folders(folder)
        assert found.shape == (353, 232)
        day = found.dates.index(date(2018, 1, 23))
        (blue,) = folder.rglob("*_20180123T104329_B02_10m.jp2")
        (scl,) = folder.rglob("*_20180123T104329_SCL_20m.jp2")
        with rasterio.open(blue) as file:
            stored = file.read(1)
        with rasterio.open(scl) as file:
            classes = file.read(1)
        values, valid = found.read(("B02",))
        clear = np.isin(classes, (4, 5, 6, 7))
        np.testing.assert_array_equal(
            values[day, 0][valid[day]], (stored * np.float32(1e-4))[valid[day]]
        )
        assert not valid[day][stored == 0].any()
        sure = clear[:100, :150] & (stored[1:200:2, 1:300:2] > 0)
        assert valid[day][1:200:2, 1:300:2][sure].all()
        assert not valid[day][:200:2, :300:2][~clear[:100, :150]].any()

    def test_a_folder_without_products_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(StackError, match="no SAFE folder"):
            read_safe_folders(tmp_path)

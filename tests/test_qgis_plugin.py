"""The QGIS plugin in real QGIS, offscreen, against the service itself over a socket."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import geopandas
import httpx
import numpy as np
import pytest
import rasterio
import shapely

from benchmarks.serving import served
from tests.kits.gate import HELD, Gate, zoo_with_a_held_model
from tests.kits.jobs import stack
from tests.kits.patience import PATIENCE
from tests.kits.programs import qgis_python
from tests.kits.rasters import NORTH_UP, UTM

pytestmark = pytest.mark.slow

PLUGIN = Path(__file__).parents[1] / "qgis"
# Drives the dialog as a person does, and prints what it shows and which layers there are.
DRIVE = """
import json, os, sys, time
from pathlib import Path
from qgis.core import QgsApplication, QgsProject, QgsRasterLayer, QgsVectorLayer
QgsApplication.setPrefixPath("/usr", True)
application = QgsApplication([], True)
application.initQgis()
plugin, url, task, model, cancel, places, chosen, folder, *paths = sys.argv[1:]
sys.path.insert(0, plugin)
from pimc.dialog import PimcDialog

if places:
    layer = QgsVectorLayer(places, "places")
    assert layer.isValid(), places
    layer.selectByIds([int(n) for n in chosen.split()])
    QgsProject.instance().addMapLayer(layer)
for path in paths:
    layer = QgsRasterLayer(path, Path(path).stem)
    assert layer.isValid(), path
    QgsProject.instance().addMapLayer(layer)
dialog = PimcDialog()
dialog.url.setText(url)
dialog.folder.setFilePath(folder)
dialog.connect_button.click()
texts = [dialog.text.text()]
if dialog.run_button.isEnabled():
    dialog.task.setCurrentIndex(dialog.task.findData(task))
    if model:
        dialog.model.setCurrentText(model)
    dialog.selected.setChecked(bool(chosen))
    dialog.run_button.click()
    while not dialog.run_button.isEnabled():
        application.processEvents()
        if texts[-1] != dialog.text.text():
            texts.append(dialog.text.text())
        if cancel and "running" in texts[-1]:
            dialog.stop()
        time.sleep(0.01)
    texts.append(dialog.text.text())
    dialog.grab().save(os.path.join(folder, "dialog.png"))
layers = []
for layer in dialog.run.layers if dialog.run else []:
    entries = [e.label for e in getattr(layer.renderer(), "classes", list)()]
    layers.append([layer.name(), layer.isValid(), layer.renderer().type(), entries])
print(json.dumps({"texts": texts, "layers": layers, "model": dialog.model.currentText()}),
      flush=True)
os._exit(0)  # without its own way out, which fails after Python has freed the layers
"""


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with served(model_dir=zoo_with_a_held_model(tmp_path_factory.mktemp("zoo"))) as client:
        yield client


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("stack")
    stack(folder, 64, 96)
    return sorted(folder.iterdir())


def driven(
    url: object, paths: list[Path], folder: Path, *, task: str, model: str = "", cancel: str = "",
    places: Path | None = None, chosen: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Texts of the dialog, and the layers that it has added.

    Args:
        url: address of the service.
        paths: files whose layers are in the project.
        folder: of the results.
        task: the task to run.
        model: the model; "" for the one that the dialog proposes.
        cancel: whether the run is cancelled; "" for no.
        places: a file whose layer of points or polygons is in the project.
        chosen: ids of the selected features; "" sends all of them.
    """
    command = ["-c", DRIVE, PLUGIN, str(url), task, model, cancel, places or "", chosen, folder]
    done = subprocess.run(
        [qgis_python(), *command, *paths],
        env={"QT_QPA_PLATFORM": "offscreen", "HOME": str(folder), "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_stack_becomes_styled_layers(
    api: httpx.Client, paths: list[Path], tmp_path: Path
) -> None:
    found = driven(api.base_url, paths, tmp_path, task="classify-pixels", model="pixels-landcover")
    assert found["texts"][-1].startswith("Added 2 layer(s) from ")
    card = api.get("/models/pixels-landcover").json()
    names = [one["name"] for one in card["classes"]]
    by_name = {name: rest for name, *rest in found["layers"]}
    assert by_name["class (classify-pixels)"] == [True, "paletted", names]
    valid, kind, _ = by_name["confidence (classify-pixels)"]
    assert (valid, kind) == (True, "singlebandpseudocolor")
    assert (tmp_path / "dialog.png").stat().st_size > 1000


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two fields on the stack, in another CRS than it."""
    path = tmp_path_factory.mktemp("places") / "places.gpkg"
    shapes = [
        shapely.box(*NORTH_UP @ (x, y + 9), *NORTH_UP @ (x + 9, y)) for x, y in ((5, 5), (60, 40))
    ]
    frame = geopandas.GeoDataFrame(geometry=shapes, crs=UTM).to_crs("EPSG:3035")
    frame.to_file(path, driver="GPKG")
    return path


def similarity(api: httpx.Client, paths: list[Path], places: Path) -> np.ndarray:
    """The map that the service itself returns for a file of places."""
    files: list[Any] = [("files", (path.name, path.read_bytes())) for path in paths]
    response = api.post("/similar", files=[*files, ("fields", places.read_bytes())])
    with rasterio.MemoryFile(response.content) as memory, memory.open() as raster:
        return np.asarray(raster.read(1))


@pytest.mark.parametrize("chosen", ["", "2"])
def test_similarity_to_the_features_of_a_layer(
    api: httpx.Client, paths: list[Path], places: Path, tmp_path: Path, chosen: str
) -> None:
    found = driven(api.base_url, paths, tmp_path, task="similar", places=places, chosen=chosen)
    assert found["texts"][-1].startswith("Added 1 layer(s) from "), found
    assert found["model"] == "embed-pixel"
    ((name, valid, kind, _),) = found["layers"]
    assert (name, valid, kind) == ("similarity (similar)", True, "singlebandpseudocolor")
    expected = places
    if chosen:
        expected = tmp_path / "chosen.gpkg"
        geopandas.read_file(places, fid_as_index=True).loc[[2]].to_file(expected, driver="GPKG")
    (file,) = tmp_path.glob("*/similarity.tif")
    with rasterio.open(file) as raster:
        # The edges of the fields are straight in another CRS, so that shares differ a little.
        np.testing.assert_allclose(raster.read(1), similarity(api, paths, expected), atol=1e-3)


def test_similarity_needs_a_layer_of_places(
    api: httpx.Client, paths: list[Path], places: Path, tmp_path: Path
) -> None:
    found = driven(api.base_url, paths, tmp_path, task="similar")
    assert found["texts"][-1].startswith("Add a layer of points or polygons to the project")
    found = driven(api.base_url, paths, tmp_path, task="similar", places=places, chosen="9")
    assert found["texts"][-1] == (
        "The layer 'places' has no selected features: select some, or clear 'Selected features "
        "only'."
    )
    assert found["layers"] == []


def test_the_services_problem_is_shown(
    api: httpx.Client, paths: list[Path], tmp_path: Path
) -> None:
    found = driven(api.base_url, paths[:1], tmp_path, task="classify-pixels")
    assert found["layers"] == []
    assert found["texts"][-1].startswith("Too few dates: ")


def test_a_run_is_cancelled(
    api: httpx.Client, gate: Gate, paths: list[Path], tmp_path: Path
) -> None:
    with gate.held():
        found = driven(
            api.base_url, paths, tmp_path, task="classify-pixels", model=HELD, cancel="yes"
        )
    assert found["texts"][-1] == "cancelled"
    assert api.get("/jobs").json()["jobs"][0]["status"] == "dismissed"


def test_a_service_that_is_not_there_is_named(paths: list[Path], tmp_path: Path) -> None:
    found = driven("http://127.0.0.1:9", paths, tmp_path, task="classify-pixels")
    assert "http://127.0.0.1:9 cannot be reached" in found["texts"][0]

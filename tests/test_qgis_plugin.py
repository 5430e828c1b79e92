"""The QGIS plugin in real QGIS, offscreen, against the service itself over a socket."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.serving import served
from tests.kits.gate import HELD, Gate, zoo_with_a_held_model
from tests.kits.jobs import stack
from tests.kits.patience import PATIENCE
from tests.kits.programs import qgis_python

pytestmark = pytest.mark.slow

PLUGIN = Path(__file__).parents[1] / "qgis"
# Drives the dialog as a person does, and prints what it shows and which layers there are.
DRIVE = """
import json, os, sys, time
from pathlib import Path
from qgis.core import QgsApplication, QgsProject, QgsRasterLayer
QgsApplication.setPrefixPath("/usr", True)
application = QgsApplication([], True)
application.initQgis()
plugin, url, task, model, cancel, folder, *paths = sys.argv[1:]
sys.path.insert(0, plugin)
from pimc.dialog import PimcDialog

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
print(json.dumps({"texts": texts, "layers": layers}), flush=True)
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
    url: object, paths: list[Path], folder: Path, *, task: str, model: str = "", cancel: str = ""
) -> dict[str, Any]:
    done = subprocess.run(
        [qgis_python(), "-c", DRIVE, PLUGIN, str(url), task, model, cancel, folder, *paths],
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
    assert found["texts"][-1].startswith("Added 2 layers")
    card = api.get("/models/pixels-landcover").json()
    names = [one["name"] for one in card["classes"]]
    by_name = {name: rest for name, *rest in found["layers"]}
    assert by_name["class (classify-pixels)"] == [True, "paletted", names]
    valid, kind, _ = by_name["confidence (classify-pixels)"]
    assert (valid, kind) == (True, "singlebandpseudocolor")
    assert (tmp_path / "dialog.png").stat().st_size > 1000


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

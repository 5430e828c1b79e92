"""The plugin's dialog: layers, task, model, service, progress."""

from __future__ import annotations

import tempfile
from pathlib import Path

from qgis.core import (
    QgsApplication,
    QgsMapLayerProxyModel,
    QgsProject,
    QgsRasterLayer,
    QgsSettings,
)
from qgis.gui import QgsAuthConfigSelect, QgsFileWidget, QgsMapLayerComboBox
from qgis.PyQt.QtCore import Qt
from qgis.PyQt.QtWidgets import (
    QCheckBox,
    QComboBox,
    QDialog,
    QFormLayout,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QListWidget,
    QListWidgetItem,
    QProgressBar,
    QPushButton,
    QVBoxLayout,
)

from .places import as_geojson
from .run import Run
from .service import Service, ServiceError

TASKS = {
    "classify-pixels": "Class of every pixel",
    "forecast": "Forecast of NDVI, EVI and SAVI",
    "landcover": "Land cover of patches",
    "similar": "Similarity to places",
}
OUTPUTS = {"classify-pixels": "class,confidence", "landcover": "class,confidence"}
_URL, _AUTH = "pimc/url", "pimc/auth"


class PimcDialog(QDialog):
    """Chooses what is sent, and follows the run."""

    def __init__(self, parent=None) -> None:  # noqa: ANN001 - a QWidget
        super().__init__(parent)
        self.setWindowTitle("PIMC")
        self.run: Run | None = None
        settings = QgsSettings()
        self.layers = QListWidget()
        self.url = QLineEdit(settings.value(_URL, "http://127.0.0.1:8000"))
        self.auth = QgsAuthConfigSelect()
        self.auth.setConfigId(settings.value(_AUTH, ""))
        self.connect_button = QPushButton("Connect")
        self.task = QComboBox()
        for name, text in TASKS.items():
            self.task.addItem(text, name)
        self.model = QComboBox()
        self.places = QgsMapLayerComboBox()
        self.places.setFilters(
            QgsMapLayerProxyModel.PointLayer | QgsMapLayerProxyModel.PolygonLayer
        )
        self.selected = QCheckBox("Selected features only")
        self.folder = QgsFileWidget()
        self.folder.setStorageMode(QgsFileWidget.GetDirectory)
        self.folder.setFilePath(tempfile.mkdtemp(prefix="pimc-"))
        self.progress = QProgressBar()
        self.text = QLabel("Connect to a service first.")
        self.text.setWordWrap(True)
        self.text.setTextInteractionFlags(Qt.TextSelectableByMouse)
        self.run_button = QPushButton("Run")
        self.run_button.setEnabled(False)
        self.cancel_button = QPushButton("Cancel")
        self.cancel_button.setEnabled(False)
        self._lay_out()
        self.connect_button.clicked.connect(self.load_models)
        self.task.currentIndexChanged.connect(self._offer_models)
        self.run_button.clicked.connect(self.start)
        self.cancel_button.clicked.connect(self.stop)
        self._cards: list[dict] = []
        self._defaults: dict[str, str] = {}
        self.refresh_layers()

    def refresh_layers(self) -> None:
        """List the raster layers whose files are on this machine, those selected before kept."""
        chosen = set(self.files())
        self.layers.clear()
        for layer in QgsProject.instance().mapLayers().values():
            path = Path(layer.source())
            if not isinstance(layer, QgsRasterLayer) or not path.is_file():
                continue
            item = QListWidgetItem(layer.name())
            item.setData(Qt.UserRole, str(path))
            item.setFlags(item.flags() | Qt.ItemIsUserCheckable)
            item.setCheckState(Qt.Checked if not chosen or path in chosen else Qt.Unchecked)
            self.layers.addItem(item)

    def files(self) -> list[Path]:
        """Files of the checked layers."""
        items = (self.layers.item(at) for at in range(self.layers.count()))
        return [Path(item.data(Qt.UserRole)) for item in items if item.checkState() == Qt.Checked]

    def service(self) -> Service:
        """The service of the address entered."""
        return Service(self.url.text().strip(), self.auth.configId())

    def load_models(self) -> None:
        """Connect to the service and list its models."""
        try:
            self._cards, self._defaults = self.service().models()
        except ServiceError as error:
            self.run_button.setEnabled(False)
            self.text.setText(str(error))
            return
        settings = QgsSettings()
        settings.setValue(_URL, self.url.text().strip())
        settings.setValue(_AUTH, self.auth.configId())
        self._offer_models()
        self.run_button.setEnabled(True)
        self.text.setText(f"{len(self._cards)} models at {self.url.text().strip()}")

    def start(self) -> None:
        """Send the checked layers."""
        files = self.files()
        if not files:
            self.text.setText("Check at least one layer.")
            return
        task = self.task.currentData()
        fields = {"model": self.model.currentText()}
        if task in OUTPUTS:
            fields["outputs"] = OUTPUTS[task]
        try:
            places = self._chosen_places() if task == "similar" else None
        except ValueError as error:
            self.text.setText(str(error))
            return
        folder = Path(self.folder.filePath())
        folder.mkdir(parents=True, exist_ok=True)
        self.run = Run(self.service(), task, files, fields, folder, places)
        self.run.message.connect(self.text.setText)
        self.run.progressChanged.connect(lambda percent: self.progress.setValue(int(percent)))
        self.run.taskCompleted.connect(self._done)
        self.run.taskTerminated.connect(self._done)
        self.run_button.setEnabled(False)
        self.cancel_button.setEnabled(True)
        QgsApplication.taskManager().addTask(self.run)

    def stop(self) -> None:
        """Cancel the run."""
        if self.run is not None:
            self.run.cancel()

    def _done(self) -> None:
        self.run_button.setEnabled(True)
        self.cancel_button.setEnabled(False)
        self.progress.setValue(0)
        if self.run is None or self.run.error:
            self.text.setText(self.run.error if self.run else "")
        else:
            self.text.setText(
                f"Added {len(self.run.rasters)} layer(s) from {self.run.rasters[0].parent}"
            )

    def _offer_models(self) -> None:
        task = self.task.currentData()
        is_similar = task == "similar"
        self.places.setEnabled(is_similar)
        self.selected.setEnabled(is_similar)
        # Similarity compares the embeddings of pixels, so it takes the models of /embed.
        served = "embed" if is_similar else task
        cards = [card for card in self._cards if card["task"] == served]
        if is_similar:
            cards = [card for card in cards if card["modality"] == "pixel"]
        self.model.clear()
        self.model.addItems([card["name"] for card in cards])
        self.model.setCurrentText(self._defaults.get(served, ""))

    def _chosen_places(self) -> bytes:
        layer = self.places.currentLayer()
        if layer is None:
            raise ValueError(
                "Add a layer of points or polygons to the project: every pixel is compared with "
                "its features."
            )
        return as_geojson(layer, self.selected.isChecked())

    def _lay_out(self) -> None:
        server = QHBoxLayout()
        server.addWidget(self.url)
        server.addWidget(self.connect_button)
        form = QFormLayout()
        form.addRow("Layers, one or more per date", self.layers)
        form.addRow("Service", server)
        form.addRow("API key (method API Header, X-API-Key)", self.auth)
        form.addRow("Task", self.task)
        form.addRow("Model", self.model)
        places = QHBoxLayout()
        places.addWidget(self.places)
        places.addWidget(self.selected)
        form.addRow("Places to compare with", places)
        form.addRow("Folder of results", self.folder)
        buttons = QHBoxLayout()
        buttons.addWidget(self.run_button)
        buttons.addWidget(self.cancel_button)
        page = QVBoxLayout(self)
        page.addLayout(form)
        page.addWidget(self.progress)
        page.addWidget(self.text)
        page.addLayout(buttons)

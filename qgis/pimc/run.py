"""A run as a QGIS task: upload, wait, download, styled layers."""

from __future__ import annotations

import io
import time
import zipfile
from pathlib import Path

from qgis.core import QgsFeedback, QgsProject, QgsRasterLayer, QgsTask
from qgis.PyQt.QtCore import pyqtSignal

from .service import Service, ServiceError

LOOK_SECONDS = 0.5
RUNNING = {"accepted", "running"}


class Run(QgsTask):
    """Runs a task of the service on files, and adds its rasters to the project.

    Args:
        service: the service; its feedback is replaced by the task's own.
        task: such as `classify-pixels`.
        files: of the stack.
        fields: further parameters.
        folder: existing folder of the results.
        places: GeoJSON of the places of a similarity run.
    """

    message = pyqtSignal(str)
    """Text about the current step of the run."""

    def __init__(
        self,
        service: Service,
        task: str,
        files: list[Path],
        fields: dict[str, str],
        folder: Path,
        places: bytes | None = None,
    ) -> None:
        super().__init__(f"PIMC: {task}", QgsTask.CanCancel)
        self._feedback = QgsFeedback()
        self._service = Service(service.url, service.auth, self._feedback)
        self._task = task
        self._files = files
        self._fields = fields
        self._folder = folder
        self._places = places
        self._job = ""
        self.error = ""
        self.rasters: list[Path] = []
        self.layers: list[QgsRasterLayer] = []

    def run(self) -> bool:
        """The work, outside QGIS's main thread. Returns whether it succeeded."""
        try:
            return self._run()
        except (ServiceError, OSError, zipfile.BadZipFile) as error:
            self.error = "cancelled" if self.isCanceled() else str(error)
            return False

    def cancel(self) -> None:
        """Cancel the upload or the job."""
        self._feedback.cancel()
        super().cancel()

    def finished(self, result: bool) -> None:
        """Add the rasters as layers, in QGIS's main thread."""
        if not result:
            return
        for path in self.rasters:
            # QGIS applies the style of the same name beside the raster.
            layer = QgsRasterLayer(str(path), f"{path.stem} ({self._task})")
            QgsProject.instance().addMapLayer(layer)
            self.layers.append(layer)

    def _run(self) -> bool:
        self.message.emit("Sending the files")
        self._job = self._service.submit(self._task, self._files, self._fields, self._places)
        while (info := self._service.job(self._job))["status"] in RUNNING:
            if self.isCanceled():
                Service(self._service.url, self._service.auth).dismiss(self._job)
                self.error = "cancelled"
                return False
            self.message.emit(f"Job {self._job}: {info['status']}, {info['progress']} %")
            self.setProgress(info["progress"])
            time.sleep(LOOK_SECONDS)
        if info["status"] != "successful":
            self.error = self._service.problem(self._job) or f"the job was {info['status']}"
            return False
        self.message.emit("Fetching the result")
        folder = self._folder / self._job
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(io.BytesIO(self._service.result(self._job))) as result:
            for name in result.namelist():
                (folder / Path(name).name).write_bytes(result.read(name))
        self.rasters = sorted(folder.glob("*.tif"))
        return True

"""The plugin: an entry in the Raster menu that opens the dialog."""

from __future__ import annotations

from qgis.PyQt.QtWidgets import QAction

from .dialog import PimcDialog

_MENU = "PIMC"


class PimcPlugin:
    """The plugin, which QGIS creates when it loads.

    Args:
        iface: QGIS's interface.
    """

    def __init__(self, iface) -> None:  # noqa: ANN001 - a QgisInterface
        self._iface = iface
        self._action: QAction | None = None
        self._dialog: PimcDialog | None = None

    def initGui(self) -> None:  # noqa: N802 - QGIS's name
        """Add the menu entry."""
        self._action = QAction("Classify or forecast a time series…", self._iface.mainWindow())
        self._action.triggered.connect(self.open)
        self._iface.addPluginToRasterMenu(_MENU, self._action)

    def unload(self) -> None:
        """Remove the menu entry."""
        self._iface.removePluginRasterMenu(_MENU, self._action)

    def open(self) -> None:
        """Show the dialog with the project's current layers."""
        if self._dialog is None:
            self._dialog = PimcDialog(self._iface.mainWindow())
        self._dialog.refresh_layers()
        self._dialog.show()

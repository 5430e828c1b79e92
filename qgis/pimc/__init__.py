"""QGIS plugin: raster layers of a time series in, styled results of a PIMC service out."""

from __future__ import annotations


def classFactory(iface):  # noqa: ANN001, ANN201, N802 - QGIS's name and types
    """The plugin, as QGIS loads it."""
    from .plugin import PimcPlugin

    return PimcPlugin(iface)

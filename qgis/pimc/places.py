"""Places of a similarity run: the points or polygons of a layer as GeoJSON."""

from __future__ import annotations

from qgis.core import QgsJsonExporter, QgsVectorLayer

_DIGITS = 9
"""Decimals of a degree: a tenth of a millimetre."""


def as_geojson(layer: QgsVectorLayer, selected: bool) -> bytes:
    """Features of a layer as a GeoJSON FeatureCollection, in longitude and latitude.

    Args:
        layer: a layer of points or polygons.
        selected: whether only its selected features are taken.

    Raises:
        ValueError: the layer has no such features.
    """
    features = list(layer.selectedFeatures() if selected else layer.getFeatures())
    if not features:
        which = "selected features" if selected else "features"
        remedy = "select some, or clear 'Selected features only'" if selected else "choose another"
        raise ValueError(f"The layer '{layer.name()}' has no {which}: {remedy}.")
    exporter = QgsJsonExporter(layer, _DIGITS)
    exporter.setIncludeAttributes(False)  # the service needs shapes and ids
    return exporter.exportFeatures(features).encode()

"""Serves the bundles: GeoTIFFs in, maps, forecasts and labels out."""

import os

# ONNX Runtime sends usage data and writes a session id to the temporary folder when it is imported.
# The service sends no data about its use; an administrator may set the variable otherwise.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

"""Serves the bundles: GeoTIFFs in, maps, forecasts and labels out."""

import os

# ONNX Runtime reports its use, and leaves a session id in the temporary folder as it is imported.
# What the service does is nobody's business but its administrator's, who may set this otherwise.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

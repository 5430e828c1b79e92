"""GeoTIFFs to windows of reflectance: headers → stack → windows."""

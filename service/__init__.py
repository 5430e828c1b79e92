"""Serves the bundles: GeoTIFFs in, maps, forecasts and labels out."""

"""Predictions to files: COGs, legends, polygons, tables of fields, STAC items."""

"""Predictions to files: layers, COGs, legends."""

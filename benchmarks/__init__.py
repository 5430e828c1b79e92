"""Measurements: load, and speed against the machine's limit and against what others use."""

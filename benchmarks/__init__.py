"""Benchmarks: load, and speed against the machine's limit and against peers."""

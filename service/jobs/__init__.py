"""Durable background jobs: killing the process loses none."""

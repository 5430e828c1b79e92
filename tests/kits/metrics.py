"""Metrics of a service."""

from __future__ import annotations

import httpx


def metric(api: httpx.Client, line: str) -> float:
    """The value of a metric, by its name and labels; 0 if it has none yet."""
    found = [text for text in api.get("/metrics").text.splitlines() if text.startswith(line + " ")]
    return float(found[0].rpartition(" ")[2]) if found else 0.0

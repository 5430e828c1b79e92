"""Debian's Chromium, as benchmarks and tests start it."""

from __future__ import annotations

import shutil

# Without the background flags Chromium calls its maker's hosts at every start.
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium_path() -> str | None:
    """Path of Chromium; None if it is not installed."""
    return shutil.which("chromium")

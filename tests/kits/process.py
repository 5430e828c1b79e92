"""Services that run as processes of their own."""

from __future__ import annotations

import re

RUNNING = re.compile(r"running on http://\S*?:(\d+)")
"""The line of a log that names the port."""

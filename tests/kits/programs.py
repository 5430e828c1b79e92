"""System programs that tests need: without one a test is skipped, and in CI it fails."""

from __future__ import annotations

import os

import pytest


def require(found: object, program: str, package: str) -> None:
    """Go on if a program was found; else skip the test, or fail it where CI should have it.

    Args:
        found: anything true if the program is there.
        program: its name, for the message.
        package: the Debian package that has it; `.ci/run` installs it.
    """
    if found:
        return
    message = f"needs {program} (Debian: {package})"
    if os.environ.get("CI"):
        pytest.fail(f"{message}, which .ci/run installs")
    pytest.skip(message)

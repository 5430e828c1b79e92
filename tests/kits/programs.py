"""System programs that tests need: without one a test is skipped, and in CI it fails."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def require(found: object, program: str, package: str) -> None:
    """Skip the test if a program is missing; in CI, which should have it, fail the test.

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


def qgis_python() -> Path:
    """The system's Python with QGIS's bindings. Skips the test without them, in CI as well."""
    python = Path("/usr/bin/python3")
    check = [python, "-c", "import qgis.gui"]
    if not python.exists() or subprocess.run(check, check=False, capture_output=True).returncode:
        pytest.skip("needs QGIS with its Python bindings (Debian: qgis python3-qgis)")
    return python


def self_signed(folder: Path, host: str) -> Path:
    """Write `cert.pem` and `key.pem` for a host into a folder, by openssl. Returns the folder."""
    openssl = shutil.which("openssl")
    require(openssl, "the openssl command", "openssl")
    options = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    options += f" -subj /CN={host} -addext subjectAltName=DNS:{host}"
    command = [str(openssl), *options.split(), "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder

"""Bills of materials of the images: CycloneDX JSON with licences, in build/sbom.

    python scripts/sbom.py [NAME ...]

For each lock file in docker/locked (or each one named, such as `service-cpu`), the script installs
the locked wheels by hash into an environment of its own, as the Dockerfile does, and `cyclonedx-py`
reads their metadata. The built-in models are listed with licence and sha256 from their cards. A
package that states no licence is an error.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "docker" / "locked"
TARGET = ROOT / "build" / "sbom"

# The validation of the document checks each address by a general parser of IRIs, which takes most
# of the time. Here an address has to be a URI reference (RFC 3986), by a regular expression.
_CYCLONEDX = """
import runpy, sys, types
from rfc3986_validator import validate_rfc3986

grammar = types.ModuleType("rfc3987_syntax")
grammar.is_valid_syntax = lambda term, text: bool(validate_rfc3986(text, rule="URI_reference"))
sys.modules[grammar.__name__] = grammar
runpy.run_module("cyclonedx_py", run_name="__main__")
"""


def installed(lock: Path, folder: Path) -> Path:
    """Create an environment of exactly the packages of a lock file; returns its Python.

    Raises:
        subprocess.CalledProcessError: a wheel is missing, or differs from the locked one.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet",
         "--disable-pip-version-check", "--require-hashes", "--no-deps", "--only-binary=:all:",
         "--requirement", str(lock)],
        check=True,
    )  # fmt: skip
    return python


def bill(python: Path, zoo: Path) -> dict[str, Any]:
    """The packages of an environment and the models of a zoo, as CycloneDX 1.6.

    Raises:
        subprocess.CalledProcessError: `cyclonedx-py` fails, or its document does not validate.
    """
    done = subprocess.run(
        [sys.executable, "-c", _CYCLONEDX, "environment", "--spec-version", "1.6",
         "--output-reproducible", str(python)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    _state_licences(found["components"], python)
    found["components"] += [_model(path) for path in sorted(zoo.glob("*/card.json"))]
    return found


def _state_licences(components: list[dict[str, Any]], python: Path) -> None:
    """Add the licences that `cyclonedx-py` leaves out: those that are not SPDX identifiers."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    folder = subprocess.run(
        [str(python), "-c", code], stdout=subprocess.PIPE, text=True, check=True
    )
    stated = {
        package.metadata["Name"]: package.metadata.get("License", "")
        for package in distributions(path=[folder.stdout.strip()])
    }
    for part in components:
        if not part.get("licenses") and (words := stated.get(part["name"])):
            part["licenses"] = [{"license": {"name": words}}]


def _model(path: Path) -> dict[str, Any]:
    card = json.loads(path.read_text())
    return {
        "type": "machine-learning-model",
        "bom-ref": f"model:{card['name']}@{card['version']}",
        "name": card["name"],
        "version": card["version"],
        "description": card["description"],
        "licenses": [{"license": {"name": card["licence"]}}],
        "hashes": [{"alg": "SHA-256", "content": card["sha256"]}],
    }


def unlicensed(bill: dict[str, Any]) -> list[str]:
    """Names of the components that state no licence."""
    return [part["name"] for part in bill["components"] if not part.get("licenses")]


def main(names: Sequence[str]) -> int:
    """Write a bill for each lock file; returns the exit status."""
    TARGET.mkdir(parents=True, exist_ok=True)
    failed = 0
    for lock in sorted(LOCKS.glob("*.txt")):
        if names and lock.stem not in names:
            continue
        folder = Path(tempfile.mkdtemp(prefix="sbom-"))
        try:
            # The training image holds the same zoo as the service images.
            found = bill(installed(lock, folder), ROOT / "models" / "zoo")
        finally:
            shutil.rmtree(folder)
        path = TARGET / f"{lock.stem}.cdx.json"
        path.write_text(json.dumps(found, indent=2) + "\n")
        print(f"{path.relative_to(ROOT)}: {len(found['components'])} components")
        for name in unlicensed(found):
            failed = 1
            print(f"{lock.stem}: {name} states no licence", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

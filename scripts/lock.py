"""Write `docker/locked/*.txt`: every package of the images with its version and sha256.

    python scripts/lock.py

pip resolves the extras of pyproject.toml under constraints.txt, for CPython 3.11 on Linux x86-64,
and reports each wheel that it would install, with the sha256 that the index states. Nothing is
installed. pip's configuration on this machine is not used (`--isolated`), so that the wheels are
those of the public index. The Dockerfiles install the files with `--require-hashes`, so a wheel
that was replaced on an index stops the build.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docker" / "locked"
_HEAD = """\
# From pyproject.toml and constraints.txt by `make lock`, for CPython 3.11 on Linux x86-64.
# Installed with `pip install --require-hashes --no-deps`.
"""


def locks() -> dict[str, list[str]]:
    """The requirements of each lock file, by the file's name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    served = [*extras["service"], *extras["cluster"], *extras["tracing"]]
    return {
        "service-cpu": served,
        "service-gpu": [*served, "onnxruntime-gpu[cuda,cudnn]"],
        "training": extras["training"],
    }


def resolve(requirements: Sequence[str]) -> str:
    """The text of a lock file.

    Raises:
        SystemExit: this Python is not CPython 3.11 on Linux, as in the images.
        subprocess.CalledProcessError: pip finds no set of wheels.
    """
    if sys.version_info[:2] != (3, 11) or sys.platform != "linux":
        sys.exit("the lock files are for CPython 3.11 on Linux x86-64: run this script there")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--isolated", "install", "--dry-run",
         "--ignore-installed", "--quiet", "--disable-pip-version-check", "--only-binary=:all:",
         "--report=-", f"--constraint={ROOT / 'constraints.txt'}", *requirements],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    lines = []
    for package in json.loads(done.stdout)["install"]:
        about, hashes = package["metadata"], package["download_info"]["archive_info"]["hashes"]
        name = about["name"].lower().replace("_", "-")
        lines.append(f"{name}=={about['version']} \\\n    --hash=sha256:{hashes['sha256']}\n")
    return _HEAD + "".join(sorted(lines))


def main() -> None:
    """Write the files."""
    FOLDER.mkdir(exist_ok=True)
    for name, requirements in locks().items():
        text = resolve(requirements)
        (FOLDER / f"{name}.txt").write_text(text)
        print(f"docker/locked/{name}.txt: {text.count('--hash')} packages")


if __name__ == "__main__":
    main()

"""What a finished root file system holds, and what it must not."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from dockerfile import RehearsalError
from rootfs import Image, enclosed

_COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "ld", "as", "make", "nvcc")


def look(image: Image, may_miss: Iterable[str]) -> None:
    """Print the environment's size and which of Debian's packages its wheels link to.

    Args:
        image: What was built.
        may_miss: Shared libraries that only the machine that serves has.

    Raises:
        RehearsalError: there is a compiler or, where it serves, torch or a shared library missing.
    """
    environment = "/opt/venv"
    size = subprocess.check_output(["du", "-sm", "--apparent-size", f"{image.root}{environment}"])
    print(f"environment: {size.split()[0].decode()} MB")
    folders = [image.root / f for f in ("bin", "usr/bin", "usr/local/bin", "opt/venv/bin")]
    wrong = [f"a compiler: {p}" for f in folders for c in _COMPILERS if (p := f / c).exists()]
    missing, outside = _libraries(image, environment)
    print("linked from Debian:", ", ".join(sorted(_owners(image, outside))))
    print("linked and not there:", ", ".join(sorted(missing)) or "nothing")
    if image.health:  # it serves; CUDA's torch comes with plug-ins for fabrics that few have
        wrong += [f"torch: {p}" for p in image.root.glob("opt/venv/lib/*/site-packages/torch")]
        wrong += [f"no {n}, which {by} links to" for n, by in missing.items() if n not in may_miss]
    if wrong:
        raise RehearsalError("\n".join(wrong))


def _libraries(image: Image, folder: str) -> tuple[dict[str, str], set[str]]:
    """Of the shared libraries in a folder: what they miss, by name, and what they find outside."""
    find = f"find {folder} -name '*.so*' -type f -exec ldd {{}} + 2>/dev/null || true"
    command = enclosed(image, ["sh", "-c", find], environment=image.environment)
    missing, outside, by = {}, set(), ""
    for line in subprocess.check_output(command, text=True).splitlines():
        if not line.startswith("\t"):
            by = Path(line.rstrip(":")).name
        elif "not found" in line:
            name = line.split()[0]
            # What a wheel brings in its own *.libs is found through the module that loads it.
            if not list(image.root.glob(f"{folder[1:]}/lib/python*/site-packages/*.libs/{name}")):
                missing[name] = by
        elif match := re.search(r"=> (/(?!opt/venv)\S+)", line):
            outside.add(match[1])
    return missing, outside


def _owners(image: Image, files: Iterable[str]) -> set[str]:
    # Debian's packages still say /lib where a root file system has /usr/lib.
    patterns = [f"*{Path(file).name}" for file in files]
    command = enclosed(image, ["dpkg", "--search", *patterns], environment=image.environment)
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return {line.partition(":")[0] for line in found.splitlines()}

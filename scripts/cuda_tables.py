"""Write the tables that `tests/test_cuda_coverage.py` reads: CUDA's kernels and libraries.

    pip download --no-deps --dest wheels -r <(grep ^nvidia- constraints.txt)
    python scripts/cuda_tables.py wheels

Run it after a change of the pinned onnxruntime-gpu or of the CUDA packages. It needs gcc, nm and
the pinned onnxruntime-gpu, but no GPU and no CUDA.

`tests/cuda_kernels.csv` lists the kernels that the CUDA provider of the installed ONNX Runtime
registers. The source is `get_all_opkernel_def`, from which ONNX Runtime generates its
`docs/OperatorKernels.md`. A provider registers its kernels when its shared library is loaded. Here
the libraries that it links to are stubs: each of their functions returns 0, "success".

`tests/cuda_libraries.csv` lists the shared libraries in the downloaded wheels.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path

import onnxruntime

TESTS = Path(__file__).parents[1] / "tests"
CAPI = Path(onnxruntime.__file__).parent / "capi"
PROVIDERS = ("cuda", "tensorrt")  # listing the kernels of one loads both
# Undefined functions whose library the provider does not name: pattern of their names by library.
_UNVERSIONED = {
    "libcudnn.so.9": r"cudnn",
    "libcuda.so.1": r"cu[A-Z]",
    "libnvonnxparser.so.10": r"\w*NvOnnxParser",
    "libnvinfer.so.10": r"createInfer|getInfer|getLogger|getPlugin|initLib|_ZN8nvinfer",
}
# CUDA's functions that must do more than return 0.
_BODIES = {
    "cudaMalloc": "(void **p, size_t n) { *p = calloc(1, n + 1); return 0; }",
    "cudaGetDeviceCount": "(int *n) { *n = 1; return 0; }",
    "cudaMemGetInfo": "(size_t *a, size_t *b) { *a = *b = 1ul << 34; return 0; }",
    "cudaGetErrorString": '() { return (long)"stub"; }',
    "cudaGetErrorName": '() { return (long)"stub"; }',
    "cublasCreate_v2": "(void **p) { *p = calloc(1, 4096); return 0; }",
    "cublasLtCreate": "(void **p) { *p = calloc(1, 4096); return 0; }",
    "cudnnCreate": "(void **p) { *p = calloc(1, 4096); return 0; }",
    "cudaStreamCreateWithFlags": "(void **p) { *p = calloc(1, 4096); return 0; }",
}
_LIST = """
import csv, sys
from onnxruntime.capi import _pybind_state
rows = csv.writer(sys.stdout, lineterminator="\\n")
for kernel in _pybind_state.get_all_opkernel_def():
    if kernel.provider == "CUDAExecutionProvider" and not kernel.domain:
        types = ";".join(
            f"{name}={' '.join(sorted(t.removeprefix('tensor(').removesuffix(')') for t in kinds))}"
            for name, kinds in sorted(kernel.type_constraints.items())
        )
        rows.writerow([kernel.op_name, *kernel.version_range, types])
"""


def undefined() -> dict[str, set[str]]:
    """Functions that the providers import, by the library that they are imported from."""
    found: dict[str, set[str]] = defaultdict(set)
    for provider in PROVIDERS:
        library = CAPI / f"libonnxruntime_providers_{provider}.so"
        needed = subprocess.check_output(["readelf", "-d", library], text=True)
        for name in re.findall(r"\(NEEDED\).*\[(lib(?:cu|nv)\S+)\]", needed):
            found[name] |= set()
        text = subprocess.check_output(["nm", "-D", "--undefined-only", library], text=True)
        for symbol in re.findall(r"^\s+[Uw] (\S+)$", text, flags=re.MULTILINE):
            name, _, version = symbol.partition("@")
            if version.startswith("lib"):
                found[version].add(name)
            elif not version:
                for library_name, beginning in _UNVERSIONED.items():
                    if re.match(beginning, name):
                        found[library_name].add(name)
    return found


def stub(folder: Path, library: str, functions: set[str]) -> None:
    """Build a shared library of this name, with functions that return 0."""
    lines = ["#include <stdlib.h>"]
    lines += [f"long {name}{_BODIES.get(name, '() { return 0; }')}" for name in sorted(functions)]
    source, versions = folder / f"{library}.c", folder / f"{library}.map"
    source.write_text("\n".join(lines) + "\n")
    versions.write_text(f"{library} {{ global: *; }};\n")
    command = ["gcc", "-w", "-fno-builtin", "-shared", "-fPIC", "-o", folder / library, source]
    linking = [f"-Wl,-soname,{library}", f"-Wl,--version-script={versions}"]
    subprocess.check_call([*command, *linking])


def kernels() -> str:
    """The CUDA provider's kernels of the default domain, as lines of CSV, sorted."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for library, functions in undefined().items():
            stub(folder, library, functions)
        text = subprocess.check_output(
            [sys.executable, "-c", _LIST],
            text=True,
            env={**os.environ, "LD_LIBRARY_PATH": str(folder)},
        )
    return "".join(sorted(set(text.splitlines(keepends=True))))


def libraries(wheels: Path) -> list[tuple[str, str, str]]:
    """Package, version and name of each shared library in a folder of wheels."""
    found: list[tuple[str, str, str]] = []
    for wheel in wheels.glob("nvidia_*.whl"):
        package, version, *_ = wheel.name.split("-")
        names = [Path(entry).name for entry in zipfile.ZipFile(wheel).namelist()]
        shared = [name for name in names if re.search(r"\.so(\.\d+)*$", name)]
        found += [(package.replace("_", "-"), version, name) for name in shared]
    return sorted(found)


def main(wheels: Path) -> None:
    """Write both tables."""
    head = f"# onnxruntime-gpu {onnxruntime.__version__}, by scripts/cuda_tables.py\n"
    (TESTS / "cuda_kernels.csv").write_text(f"{head}operator,first,last,types\n{kernels()}")
    with (TESTS / "cuda_libraries.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("package", "version", "library"))
        rows.writerows(libraries(wheels))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""CUDA without a device: every operator has a kernel there, every library a pinned wheel.

A node without a kernel in a session's first provider falls back to the CPU in silence, with a copy
there and back. The tables beside this file are those of the pinned packages: see
`scripts/cuda_tables.py`.
"""

from __future__ import annotations

import csv
import ctypes
import re
import struct
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import onnx
import onnxruntime
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "tests" / "cuda_kernels.csv"
LIBRARIES = ROOT / "tests" / "cuda_libraries.csv"
PROVIDER = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
DRIVER = "libcuda.so.1"
NO_END = 2**31 - 1
GRAPHS = sorted((ROOT / "models" / "zoo").glob("*/*.onnx"))
# The service loads int8 files on a CPU alone (`service.infer.session.pick_variant`).
ON_CUDA = [path for path in GRAPHS if "int8" not in path.name]
Types = Mapping[str, str]


def pinned() -> dict[str, str]:
    text = (ROOT / "constraints.txt").read_text()
    return dict(re.findall(r"^([\w-]+)==(\S+)$", text, flags=re.MULTILINE))


class Kernel:
    """One row of the table: versions of an operator and, by constraint, types."""

    def __init__(self, row: Mapping[str, str]) -> None:
        self.first, self.last = int(row["first"]), int(row["last"])
        pairs = (part.split("=") for part in row["types"].split(";") if part)
        self.types = {name: set(kinds.split()) for name, kinds in pairs}

    def serves(self, since: int, types: Types) -> bool:
        """Whether it computes an operator of a version with these types.

        As ONNX Runtime's registry has it: a kernel without a last version is of its first one
        alone, because a later one may compute something else.
        """
        versions = since == self.first or (self.first < since <= self.last and self.last != NO_END)
        return versions and all(
            types[name] in kinds for name, kinds in self.types.items() if name in types
        )


@pytest.fixture(scope="module")
def kernels() -> dict[str, list[Kernel]]:
    lines = [line for line in KERNELS.read_text().splitlines() if not line.startswith("#")]
    found: dict[str, list[Kernel]] = {}
    for row in csv.DictReader(lines):
        found.setdefault(row["operator"], []).append(Kernel(row))
    return found


def kind(number: int) -> str:
    """A tensor type as the table names it."""
    return onnx.TensorProto.DataType.Name(number).lower()


def node_types(node: onnx.NodeProto, schema: onnx.defs.OpSchema, known: Types) -> dict[str, str]:
    """Type of each type parameter and of each formal parameter of a node."""
    found: dict[str, str] = {}
    for names, formal in ((node.input, schema.inputs), (node.output, schema.outputs)):
        for i, name in enumerate(names):
            if name:
                parameter = formal[min(i, len(formal) - 1)]  # the last may be variadic
                found[parameter.name] = found[parameter.type_str] = known[name]
    return found


def uncovered(path: Path, kernels: Mapping[str, list[Kernel]]) -> set[tuple[str, str]]:
    """Operators of a graph that no kernel serves, each with the type of its first input."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, data_prop=True)
    (opset,) = (entry.version for entry in model.opset_import if entry.domain == "")
    graph = model.graph
    known = {tensor.name: kind(tensor.data_type) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        known[value.name] = kind(value.type.tensor_type.elem_type)
    missing = set()
    for node in graph.node:
        assert node.domain == "", f"{node.op_type} is of the domain {node.domain}"
        schema = onnx.defs.get_schema(node.op_type, opset, "")
        types = node_types(node, schema, known)
        rows = kernels.get(node.op_type, [])
        if not any(row.serves(schema.since_version, types) for row in rows):
            missing.add((node.op_type, known[node.input[0]]))
    return missing


def test_the_tables_are_of_the_pinned_packages() -> None:
    versions = pinned()
    head = KERNELS.read_text().partition("\n")[0]
    assert f"onnxruntime-gpu {versions['onnxruntime-gpu']}," in head
    with LIBRARIES.open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        assert versions[row["package"]] == row["version"], row["package"]


@pytest.mark.parametrize("path", ON_CUDA, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_operator_has_a_cuda_kernel(path: Path, kernels: dict[str, list[Kernel]]) -> None:
    assert not uncovered(path, kernels)


@pytest.mark.parametrize(
    "path", [p for p in GRAPHS if "int8" in p.name], ids=lambda p: p.parent.name
)
def test_the_table_finds_what_int8_graphs_lack_on_cuda(
    path: Path, kernels: dict[str, list[Kernel]]
) -> None:
    # CUDA has no largest of two bytes, and reads no int32 biases: the reason that int8 is for CPUs.
    assert uncovered(path, kernels) == {("Max", "uint8"), ("DequantizeLinear", "int32")}


def test_a_kernel_without_an_end_is_of_its_first_version_alone() -> None:
    row = {"first": "13", "last": str(NO_END), "types": "T=float"}
    assert Kernel(row).serves(13, {"T": "float"})
    assert not Kernel(row).serves(14, {"T": "float"})
    assert Kernel({**row, "last": "15"}).serves(14, {"T": "float"})
    assert not Kernel({**row, "last": "15"}).serves(14, {"T": "float16"})
    assert not Kernel({**row, "last": "15"}).serves(16, {"T": "float"})


def needed(library: Path) -> list[str]:
    """Names of the shared libraries that a 64-bit ELF file links to (its NEEDED entries)."""
    data = library.read_bytes()
    if data[:5] != b"\x7fELF\x02":
        raise ValueError(f"{library.name} is not a 64-bit ELF file")
    start, size, count = (
        struct.unpack_from("<Q", data, 32)[0],
        *struct.unpack_from("<HH", data, 54),
    )
    headers = [struct.unpack_from("<IIQQQQQQ", data, start + i * size) for i in range(count)]
    load, dynamic = 1, 2
    (place, length) = next((h[2], h[5]) for h in headers if h[0] == dynamic)
    entries = [struct.unpack_from("<qQ", data, place + i) for i in range(0, length, 16)]
    address = next(value for tag, value in entries if tag == 5)  # DT_STRTAB
    strings = next(
        address - h[3] + h[2] for h in headers if h[0] == load and h[3] <= address < h[3] + h[5]
    )
    names = (strings + value for tag, value in entries if tag == 1)  # DT_NEEDED
    return [data[name : data.index(b"\0", name)].decode() for name in names]


@pytest.fixture(scope="module")
def provider() -> Path:
    if not PROVIDER.exists():
        pytest.skip("onnxruntime is installed without its CUDA provider")
    return PROVIDER


def wheels() -> dict[str, str]:
    """The package that holds each of CUDA's libraries."""
    with LIBRARIES.open() as file:
        return {row["library"]: row["package"] for row in csv.DictReader(file)}


def test_the_cuda_provider_finds_its_libraries_in_the_pinned_wheels(provider: Path) -> None:
    names, pinned_in = needed(provider), wheels()
    assert DRIVER in names
    assert {"libcudart.so.13", "libcublas.so.13"} <= set(names)
    for name in names:
        if name not in pinned_in and name != DRIVER:
            ctypes.CDLL(name)  # of the system: loads here, or raises with its name


def test_libraries_that_are_loaded_later_are_in_the_pinned_wheels_too(provider: Path) -> None:
    # cuDNN, cuFFT and NVRTC are opened when a kernel first needs them; `preload_dlls` lists them.
    listed = {Path(*parts).name for parts in onnxruntime._get_nvidia_dll_paths(is_windows=False)}
    assert "libcudnn.so.9" in listed
    assert listed <= set(wheels())


def test_the_installed_wheels_hold_those_libraries(provider: Path) -> None:
    package_of = wheels()
    expected = {name for name in needed(provider) if name in package_of}
    assert expected
    for name in sorted(expected):
        try:
            files = metadata.files(package_of[name]) or []
        except metadata.PackageNotFoundError:
            pytest.skip(f"{package_of[name]} is not installed: an environment for CPUs")
        assert name in {Path(file).name for file in files}

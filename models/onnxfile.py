"""What an ONNX file says of itself, read before any runtime loads it. No onnx package: wire format.

An ONNX file is one protobuf message, and a message is a run of fields, each a number and a value.
Only the few fields are followed that lead to the opsets and to the places of the weights. Source:
onnx.proto3 for the numbers, Protocol Buffers' "Encoding" for the format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MODEL_GRAPH, _MODEL_OPSETS = 7, 8
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2
_TENSOR_EXTERNAL, _ENTRY_VALUE = 13, 2
# The fields that lead from a message to a tensor, by the kind of message: to what kind each leads.
_WAYS: Mapping[str, Mapping[int, str]] = {
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "function": {7: "node"},
}
_MODEL_FUNCTIONS = 25
_DEEPEST = 32


class NotONNX(ValueError):
    """The bytes are no protobuf message with a graph."""


@dataclass(frozen=True, kw_only=True)
class ONNXFile:
    """What the file needs of a runtime, and whether it is whole."""

    opsets: Mapping[str, int]
    """Version of each operator set, by domain; ONNX's own is ''."""
    external: tuple[str, ...]
    """Weights that lie in other files: what is said of where, one entry a value."""


def inspect_onnx(content: bytes) -> ONNXFile:
    """Read the opsets and the external weights of an ONNX file.

    Raises:
        NotONNX: it is not one.
    """
    opsets: dict[str, int] = {}
    external: list[str] = []
    graphs = 0
    for number, value in _fields(memoryview(content)):
        if number == _MODEL_OPSETS and isinstance(value, memoryview):
            said = dict(_fields(value))
            domain = said.get(_OPSET_DOMAIN, b"")
            version = said.get(_OPSET_VERSION, 0)
            if isinstance(domain, int) or not isinstance(version, int):
                raise NotONNX("an opset has no domain and version")
            opsets[bytes(domain).decode(errors="replace")] = version
        elif number in {_MODEL_GRAPH, _MODEL_FUNCTIONS} and isinstance(value, memoryview):
            graphs += number == _MODEL_GRAPH
            external += _external(value, "graph" if number == _MODEL_GRAPH else "function", 0)
    if not (graphs and opsets):
        raise NotONNX("there is no graph with an opset")
    return ONNXFile(opsets=opsets, external=tuple(external))


def _external(message: memoryview, kind: str, depth: int) -> list[str]:
    if depth > _DEEPEST:
        raise NotONNX(f"graphs within graphs, more than {_DEEPEST} deep")
    found: list[str] = []
    for number, value in _fields(message):
        if not isinstance(value, memoryview):
            continue
        if kind == "tensor" and number == _TENSOR_EXTERNAL:
            said = dict(_fields(value)).get(_ENTRY_VALUE, b"")
            found.append(bytes(said).decode(errors="replace") if not isinstance(said, int) else "")
        elif number in _WAYS.get(kind, {}):
            found += _external(value, _WAYS[kind][number], depth + 1)
    return found


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Each field's number and value: an integer, or the bytes as they lie."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == _VARINT:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if wire == _BYTES:
            length, at = _varint(message, at)
        elif wire in {_FIXED64, _FIXED32}:
            length = 8 if wire == _FIXED64 else 4
        else:
            raise NotONNX(f"no field has the type {wire}")
        if at + length > len(message):
            raise NotONNX("a field ends beyond its message")
        yield key >> 3, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise NotONNX("a number does not end")

"""Exports of graphs of one structure, made once per test run: each takes seconds of tracing."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import pytest
import torch
from onnx.numpy_helper import from_array, to_array
from torch import Tensor, nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

from training import export
from training.onnx_export import to_onnx

# Each export lists the operators that torch can translate anew, which takes a second. A static
# method that calls the class method once takes its place, so the types of the two differ.
ONNXRegistry.from_torchlib = staticmethod(  # type: ignore[method-assign, assignment]
    functools.cache(ONNXRegistry.from_torchlib)
)


def folder_of_run(factory: pytest.TempPathFactory) -> Path:
    """A folder that the processes of a test run share."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exports"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def exported_once(folder: Path) -> Iterator[None]:
    """A context in which bundles take the ONNX file of a graph of equal structure, if there is one.

    The file receives the weights of the graph. That it computes what the graph computes is checked
    anew for each bundle, as of any export.

    Args:
        folder: contains the files.
    """

    def shared(graph: nn.Module, path: Path, **how: Any) -> None:
        stored = folder / f"{_structure(graph, how)}.onnx"
        with stored.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not stored.exists():
                to_onnx(graph, stored, **how)
                torch.save(graph.state_dict(), stored.with_suffix(".pt"))
            if not _with_weights(stored, graph, path):
                to_onnx(graph, path, **how)

    with patch.object(export, "to_onnx", shared):
        yield


def _with_weights(stored: Path, graph: nn.Module, path: Path) -> bool:
    """Write a stored file with a graph's weights; False where an equal tensor is not in the file.

    The exporter computes some weights beforehand: these cannot be exchanged by name.
    """
    before = torch.load(stored.with_suffix(".pt"), weights_only=True)
    model = onnx.load(stored)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, weights in graph.state_dict().items():
        if torch.equal(weights, before[name]):
            continue
        tensor = tensors.get(name)
        if tensor is None or not np.array_equal(to_array(tensor), before[name].numpy()):
            return False
        tensor.CopyFrom(from_array(weights.detach().contiguous().numpy(), name))
    onnx.save(model, path)
    return True


@contextmanager
def float32_alone() -> Iterator[None]:
    """A context in which bundles have no float16 and no int8 file, each of which takes seconds.

    It is for tests that look at a card only.
    """
    write = export.write_bundle

    def alone(graph: Any, folder: Path, **how: Any) -> Path:
        return write(graph, folder, **{**how, "loss": None, "typical": ()})

    with patch.object(export, "write_bundle", alone):
        yield


def _structure(graph: nn.Module, how: dict[str, Any]) -> str:
    """Hash of a graph's modules, their options and shapes, and of how it is exported."""
    example = [(tensor.shape, tensor.dtype) for tensor in how["example"]]
    digest = hashlib.sha256(repr((how["inputs"], how["output"], example)).encode())
    weights = set(graph.state_dict())
    for name, module in graph.named_modules():
        digest.update(f"{name} {type(module).__qualname__}".encode())
        tensors = {**module._parameters, **module._buffers}
        for key, value in sorted({**vars(module), **tensors}.items()):
            if isinstance(value, Tensor):
                digest.update(f"{key} {value.dtype} {value.shape}".encode())
                if f"{name}.{key}".removeprefix(".") not in weights:
                    digest.update(value.detach().contiguous().numpy().tobytes())
            elif isinstance(value, bool | int | float | str | tuple):
                digest.update(f"{key} {value}".encode())
    return digest.hexdigest()

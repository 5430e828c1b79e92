"""Exports of equal graphs, made once per test run: each takes torch seconds of tracing."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from torch import Tensor, nn

from training import export
from training.onnx_export import to_onnx


def folder_of_run(factory: pytest.TempPathFactory) -> Path:
    """A folder that the processes of a test run share."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exports"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def exported_once(folder: Path) -> Iterator[None]:
    """A context in which bundles take the ONNX file of an equal graph, if there is one.

    That the file computes what the graph computes is checked anew for each bundle.

    Args:
        folder: contains the files.
    """

    def shared(graph: nn.Module, path: Path, **how: Any) -> None:
        stored = folder / f"{_content(graph, how)}.onnx"
        with stored.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not stored.exists():
                to_onnx(graph, path, **how)
                shutil.copy(path, stored)
                return
        shutil.copy(stored, path)

    with patch.object(export, "to_onnx", shared):
        yield


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


def _content(graph: nn.Module, how: dict[str, Any]) -> str:
    """Hash of a graph: its modules, their options and weights, and how it is exported."""
    example = [(tensor.shape, tensor.dtype) for tensor in how["example"]]
    digest = hashlib.sha256(repr((how["inputs"], how["output"], example)).encode())
    for name, module in graph.named_modules():
        digest.update(f"{name} {type(module).__qualname__}".encode())
        tensors = {**module._parameters, **module._buffers}
        for key, value in sorted({**vars(module), **tensors}.items()):
            if isinstance(value, Tensor):
                digest.update(f"{key} {value.dtype} {value.shape}".encode())
                digest.update(value.detach().contiguous().numpy().tobytes())
            elif isinstance(value, bool | int | float | str | tuple):
                digest.update(f"{key} {value}".encode())
    return digest.hexdigest()

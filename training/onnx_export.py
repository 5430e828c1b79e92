"""Torch graphs as ONNX files, dynamic in pixels and dates."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim

OPSET = 20


class ExportFailed(Exception):
    """Torch returned no ONNX program for a graph."""


# Axes of each input that are dynamic, by the letters of the graph's docstring.
_AXES: Mapping[str, tuple[str, ...]] = {
    "values": ("N", "T"),
    "valid": ("N", "T"),
    "days": ("T",),
    "day_of_year": ("N",),
    "elsewhere": ("N",),
    "patches": ("N",),
}


def to_onnx(
    graph: nn.Module,
    path: Path,
    *,
    inputs: Sequence[str],
    output: str,
    example: Sequence[Tensor],
) -> None:
    """Write a graph as ONNX, dynamic in N and T.

    Args:
        graph: in evaluation mode, on the CPU.
        path: the file to write.
        inputs: names of the graph's inputs, in order.
        output: name of the graph's output.
        example: one input of each name, with at least two pixels and two dates.

    Raises:
        ExportFailed: torch made no ONNX program.
    """
    axes = {"N": Dim("N", min=1), "T": Dim("T", min=1)}
    with warnings.catch_warnings(), _quiet():
        # The exporter warns that axes of one letter are one axis, which is intended. It also warns
        # about its own use of torch.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message=".*axis name.*", category=UserWarning)
        program = torch.onnx.export(
            graph,
            tuple(example),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=tuple(
                {place: axes[letter] for place, letter in enumerate(_AXES[name])} for name in inputs
            ),
            verbose=False,
        )
    if program is None:
        raise ExportFailed("torch returned no ONNX program for this graph")
    onnx.save(_plain(program.model_proto), path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's log of its own passes: hundreds of lines per graph."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove the exporter's debugging notes: stack traces, paths, guards."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    for tensor in model.graph.initializer:
        del tensor.metadata_props[:]
        tensor.doc_string = ""
    del model.graph.metadata_props[:]
    del model.metadata_props[:]
    return model

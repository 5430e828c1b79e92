"""ONNX Runtime sessions: provider, variant and memory options, checks against the card.

Only this module uses ONNX Runtime's private interface (`onnxruntime_pybind11_state`, last tested
with 1.24). The package catches ONNX Runtime's exceptions and raises the service's own.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import logging
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state

from models.card import REFLECTANCE, ModelCard, Precision
from models.registry import Bundle, BundleError
from service.infer.cpus import multiplies_int8
from service.settings import SettingsError

_LOG = logging.getLogger(__name__)

Providers = Literal["auto", "cuda", "cpu"]
PrecisionChoice = Literal["auto", "float32"]
Floats = NDArray[np.float32]
CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TOLERATED_LOSS = 0.003
"""Loss of any metric from which on a reduced-precision variant is not used: 0.3 points."""
ORT_ERRORS: tuple[type[Exception], ...] = (
    # The runtime's own exceptions share no base class but Exception.
    *(
        kind
        for kind in vars(onnxruntime_pybind11_state).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ),
    ValueError,  # from its Python layer, and from `model`: an array of the wrong shape
)
_SHRINK_SECONDS = 10.0


class ArenaShrinking:
    """Run options that make one run every few seconds shrink the CPU memory arena.

    A batch of many dates or of patches makes the arena grow; shrinking it returns the unused blocks
    to the system. Allocating them again takes 1 to 2 ms. The sessions of an engine share one arena
    and therefore one `ArenaShrinking`. Thread-safe.

    Args:
        seconds: seconds between two runs that shrink the arena.
    """

    def __init__(self, seconds: float = _SHRINK_SECONDS) -> None:
        self._seconds = seconds
        self._next = 0.0
        self._lock = threading.Lock()
        self._shrinking = onnxruntime.RunOptions()
        self._shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def options(self) -> onnxruntime.RunOptions | None:
        """Options for the next run; None for a run that does not shrink the arena."""
        now = time.monotonic()
        with self._lock:
            if now < self._next:
                return None
            self._next = now + self._seconds
            return self._shrinking


class ProviderUnavailable(SettingsError):
    """CUDA is required but not available, so the service does not start."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """An ONNX Runtime session whose inputs and output match the model card."""

    session: onnxruntime.InferenceSession
    output: str
    """Name of the graph's only output."""
    kinds: Mapping[str, type[np.generic]]
    """NumPy type of each input, by name."""
    variant: Precision
    """The variant that was loaded."""
    shrinking: ArenaShrinking
    """Shared by the sessions of an engine."""

    @property
    def provider(self) -> str:
        """The execution provider that the session uses."""
        return str(self.session.get_providers()[0])

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Floats:
        """Run the graph once, without holding the GIL.

        Args:
            feeds: the inputs (N, …) by name; converted to the types that the graph takes.

        Returns:
            The graph's output (N, …) float32.

        Raises:
            Exception: one of `ORT_ERRORS`.
        """
        inputs = {n: np.ascontiguousarray(x, self.kinds[n]) for n, x in feeds.items()}
        options = self.shrinking.options() if self.provider == CPU else None
        (output,) = self.session.run([self.output], inputs, options)
        return np.asarray(output, np.float32)


def open_session(
    bundle: Bundle,
    provider: str,
    precision: PrecisionChoice = "auto",
    *,
    shrinking: ArenaShrinking | None = None,
) -> Session:
    """Load the variant for a provider, and check it against the card.

    ONNX Runtime may create the session on another provider: see `Session.provider`.

    Args:
        bundle: a verified bundle.
        provider: the requested provider.
        precision: `float32` always loads the float32 file; `auto` see `pick_variant`.
        shrinking: shared by the sessions of an engine; None creates one.

    Raises:
        BundleError: the file does not load, or its inputs or output differ from the card.
    """
    card = bundle.card
    variant = "float32" if precision == "float32" else pick_variant(card, provider)
    requested: list[Any] = [CPU] if provider == CPU else [(CUDA, _cuda_options()), CPU]
    try:
        session = onnxruntime.InferenceSession(
            bundle.path(variant), sess_options=_session_options(provider), providers=requested
        )
    except ORT_ERRORS as error:
        raise BundleError(_load_error(bundle, variant, error)) from error
    # Otherwise ONNX Runtime silently replaces the session of a failing device by one on the CPU.
    session.disable_fallback()
    _check_signature(session, card)
    kinds = {node.name: _KINDS[node.type] for node in session.get_inputs()}
    return Session(
        session=session,
        output=card.output,
        kinds=kinds,
        variant=variant,
        shrinking=shrinking or ArenaShrinking(),
    )


def pick_variant(card: ModelCard, provider: str) -> Precision:
    """The variant to load: float16 on CUDA, int8 on a CPU with int8 instructions, else float32.

    A variant without a measured loss, or with a loss of `TOLERATED_LOSS` or more in any metric, is
    never used.
    """
    if provider != CUDA and not multiplies_int8():
        return "float32"
    reduced: Precision = "float16" if provider == CUDA else "int8"
    for variant in card.variants:
        if variant.name == reduced:
            worst = min(variant.loss.values(), default=0.0)
            if variant.loss and worst > -TOLERATED_LOSS:
                return reduced
    return "float32"


def _load_error(bundle: Bundle, variant: Precision, error: Exception) -> str:
    """Message for a file that does not load, without the runtime's message, which names paths."""
    where = f"bundle '{bundle.card.name}': {bundle.path(variant).name}"
    opset = re.search(
        r"Opset (\d+) is under development.*support for domain ai\.onnx is till opset (\d+)",
        str(error),
        re.DOTALL,
    )
    if opset is None:
        return f"{where}: the {variant} file cannot be loaded; the server's log states the cause"
    return (
        f"{where} has opset {opset[1]}, but ONNX Runtime {onnxruntime.__version__} supports at "
        f"most {opset[2]}: export the graph with an earlier opset"
    )


# Type and rank that each input must have; reflectance may also be float16.
_INPUTS: Mapping[str, tuple[type[np.generic], int]] = {
    "values": (np.float32, 3),
    "valid": (np.bool_, 2),
    "days": (np.float32, 1),
    "day_of_year": (np.float32, 1),
    "elsewhere": (np.float32, 1),
    "patches": (np.float32, 4),
}
_KINDS: Mapping[str, type[np.generic]] = {
    "tensor(float16)": np.float16,
    "tensor(float)": np.float32,
    "tensor(bool)": np.bool_,
}


def _check_signature(session: onnxruntime.InferenceSession, card: ModelCard) -> None:
    """Check a graph's inputs and output against its card.

    Raises:
        BundleError: they differ.
    """
    where = f"bundle '{card.name}'"
    found = {node.name: node for node in session.get_inputs()}
    if set(found) != set(card.inputs):
        raise BundleError(
            f"{where}: the graph takes {_listed(found)}, but the card states "
            f"{_listed(card.inputs)}: export graph and card together"
        )
    outputs = [node.name for node in session.get_outputs()]
    if outputs != [card.output]:
        raise BundleError(
            f"{where}: the graph returns {_listed(outputs)}, but the card states {card.output}: "
            "export graph and card together"
        )
    for name, node in found.items():
        kind, rank = _INPUTS[name]
        graph_kind = _KINDS.get(node.type)
        half = graph_kind is np.float16 and name in REFLECTANCE
        if not (graph_kind is kind or half) or len(node.shape) != rank:
            raise BundleError(
                f"{where}: '{name}' is a {node.type} with {len(node.shape)} axes, but must be "
                f"{kind.__name__} with {rank}: change the graph"
            )
    name, axis = ("values", 2) if card.modality == "pixel" else ("patches", 1)
    shape = found[name].shape
    if shape[axis] not in {len(card.bands)} | _symbols(shape):
        raise BundleError(
            f"{where}: '{name}' has shape {shape}, but axis {axis} must hold the card's "
            f"{len(card.bands)} bands: change the graph or the card"
        )


def _symbols(shape: list[int | str | None]) -> set[int | str | None]:
    """The symbolic axes of a shape; only the warm-up shows whether their lengths fit."""
    return {length for length in shape if not isinstance(length, int)}


def _listed(names: Any) -> str:  # noqa: ANN401 - any iterable of names
    return ", ".join(sorted(names))


def _session_options(provider: str) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    # The runtime also raises its errors; printed on stderr, they would break the JSON log.
    options.log_severity_level = 4
    # Two single-threaded runs on halves of a batch are faster than one run on two threads: the
    # layers are small, and splitting each of them costs more than it gains.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    # A spinning thread takes the CPU from the reader, the writer and other requests.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    if provider == CPU:
        # The arena has one lock. With the runtime's memory patterns (on by default) a run locks
        # the arena once instead of once per layer, so that two threads wait less for each other:
        # 5 to 9 % more pixels per second. The runtime stores a pattern of 2 KB for every shape of
        # input, which is why `model` pads the last batch to one of a few sizes.
        _share_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
    return options


@functools.cache
def _share_arena() -> None:
    """Share one memory arena between the CPU sessions of the process.

    By default each session has an arena of its own and keeps the memory of its largest batch. After
    one run each, the seven models of the zoo took 783 MB with separate arenas and 477 MB with a
    shared one, at the same speed.
    """
    onnxruntime.create_and_register_allocator(
        onnxruntime.OrtMemoryInfo(
            "Cpu",
            onnxruntime_pybind11_state.OrtAllocatorType.ORT_ARENA_ALLOCATOR,
            0,
            onnxruntime_pybind11_state.OrtMemType.DEFAULT,
        ),
        None,  # of the default size
    )


def _cuda_options() -> dict[str, str]:
    # CUDA graphs are not used: a CUDA graph has a fixed shape, and T changes with each stack. Input
    # is not bound to the device: it comes from the CPU and is used once, so that binding it would
    # copy as many bytes.
    return {
        # EXHAUSTIVE, the default, times every algorithm for each new shape, which takes seconds
        # for a request with a new T. HEURISTIC takes cuDNN's choice without timing.
        "cudnn_conv_algo_search": "HEURISTIC",
        # TF32 rounds each factor to ten bits, which loses the difference of two bands that are
        # 0.001 apart. Products that may be rounded are in float16 already.
        "use_tf32": "0",
        # Grow by the requested size: the default doubles the arena, and takes memory that other
        # processes on the device need.
        "arena_extend_strategy": "kSameAsRequested",
    }


def provider_to_request(providers: Providers) -> str:
    """The execution provider to request for sessions, by the setting and the installed software.

    Args:
        providers: `auto`, `cuda` or `cpu`.

    Raises:
        ProviderUnavailable: `cuda` is required, and ONNX Runtime or the driver does not offer it.
    """
    if providers == "cpu":
        return CPU
    if CUDA not in onnxruntime.get_available_providers():
        if providers == "cuda":
            raise ProviderUnavailable(
                "CUDA is required (PIMC_PROVIDERS=cuda), but this build of ONNX Runtime has only "
                f"{', '.join(onnxruntime.get_available_providers())}: install onnxruntime-gpu, "
                "or set PIMC_PROVIDERS=auto"
            )
        return CPU
    if not _has_driver():  # otherwise ONNX Runtime prints errors about missing libraries
        if providers == "cuda":
            raise ProviderUnavailable(
                "CUDA is required (PIMC_PROVIDERS=cuda), but NVIDIA's driver is not installed: "
                "install it, or set PIMC_PROVIDERS=auto"
            )
        return CPU
    if hasattr(onnxruntime, "preload_dlls"):
        # The loader does not search the wheels of CUDA and cuDNN. `preload_dlls` prints the names
        # of missing libraries.
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            onnxruntime.preload_dlls()
        _LOG.debug("preloading CUDA: %s", printed.getvalue().strip())
    return CUDA


def _has_driver() -> bool:
    """Whether NVIDIA's driver is installed, whatever else is missing."""
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    return True

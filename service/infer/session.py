"""ONNX Runtime sessions: provider, variant and memory options, checks against the card.

ONNX Runtime's private interface (`onnxruntime_pybind11_state`, last tested with 1.24) is used in
this module alone, and its exceptions leave the package as ours.
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
"""A reduced precision may cost this much of any metric: 0.3 points of a share."""
ORT_ERRORS: tuple[type[Exception], ...] = (
    # The runtime's own exceptions share no base class but Exception.
    *(
        kind
        for kind in vars(onnxruntime_pybind11_state).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ),
    ValueError,  # from its Python layer, and from `_one`: an array of the wrong shape
)
_SHRINK_SECONDS = 10.0


class ArenaShrinking:
    """Run options by which, every few seconds, one run shrinks the CPU memory arena.

    The arena then returns what no other run holds: the blocks by which a batch of many dates or of
    patches made it grow. Asking for memory again costs a millisecond or two. An engine owns one,
    for all of its sessions share one arena. Safe for many threads.
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
    """CUDA was demanded and cannot be had; the service must not start."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """A session whose inputs and output are the card's."""

    session: onnxruntime.InferenceSession
    output: str
    """Name of the one output."""
    kinds: Mapping[str, type[np.generic]]
    """What the graph takes, by input."""
    variant: Precision
    """The ONNX file that was loaded."""
    shrinking: ArenaShrinking

    @property
    def provider(self) -> str:
        """The execution provider that the session really got."""
        return str(self.session.get_providers()[0])

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Floats:
        """One run; the GIL is free meanwhile. Input that stays on a device would be bound here."""
        given = {n: np.ascontiguousarray(x, self.kinds[n]) for n, x in feeds.items()}
        options = self.shrinking.options() if self.provider == CPU else None
        (answer,) = self.session.run([self.output], given, options)
        return np.asarray(answer, np.float32)


def open_session(
    bundle: Bundle,
    provider: str,
    precision: PrecisionChoice = "auto",
    *,
    shrinking: ArenaShrinking | None = None,
) -> Session:
    """Load the variant that suits a provider, and check it against the card.

    The session may get less than it asks for: ask it.

    Args:
        bundle: verified.
        provider: to ask for.
        precision: `float32` takes that file whatever else there is.
        shrinking: of all sessions of an engine; None makes one.

    Raises:
        BundleError: the file does not load, or its inputs or output are not the card's.
    """
    card = bundle.card
    variant = "float32" if precision == "float32" else pick_variant(card, provider)
    asked: list[Any] = [CPU] if provider == CPU else [(CUDA, _cuda_options()), CPU]
    try:
        session = onnxruntime.InferenceSession(
            bundle.path(variant), sess_options=_session_options(provider), providers=asked
        )
    except ORT_ERRORS as error:
        raise BundleError(_why_not(bundle, variant, error)) from error
    # Else a failing device is answered from a new CPU session, behind everybody's back.
    session.disable_fallback()
    _check_ends(session, card)
    kinds = {node.name: _KINDS[node.type] for node in session.get_inputs()}
    return Session(
        session=session,
        output=card.output,
        kinds=kinds,
        variant=variant,
        shrinking=shrinking or ArenaShrinking(),
    )


def pick_variant(card: ModelCard, provider: str) -> Precision:
    """The variant to load where it costs nearly nothing: float16 on CUDA, int8 on a fitting CPU.

    A variant whose loss nobody measured, or whose measured loss reaches `TOLERATED_LOSS` in any
    metric, is never taken; float32 otherwise.
    """
    if provider != CUDA and not multiplies_int8():
        return "float32"
    wish: Precision = "float16" if provider == CUDA else "int8"
    for variant in card.variants:
        if variant.name == wish:
            worst = min(variant.loss.values(), default=0.0)
            if variant.loss and worst > -TOLERATED_LOSS:
                return wish
    return "float32"


def _why_not(bundle: Bundle, variant: Precision, error: Exception) -> str:
    """What to say of a file that does not load; the runtime's own words name paths."""
    where = f"bundle '{bundle.card.name}': {bundle.path(variant).name}"
    opset = re.search(
        r"Opset (\d+) is under development.*support for domain ai\.onnx is till opset (\d+)",
        str(error),
        re.DOTALL,
    )
    if opset is None:
        return f"{where}: {variant} does not load, the log says why"
    return (
        f"{where} is of opset {opset[1]}, and ONNX Runtime {onnxruntime.__version__} takes none "
        f"above {opset[2]}"
    )


# Kind and rank of each input, as the engine feeds them; reflectance may be float16 too.
_INPUTS: Mapping[str, tuple[type[np.generic], int]] = {
    "values": (np.float32, 3),
    "valid": (np.bool_, 2),
    "days": (np.float32, 1),
    "day_of_year": (np.float32, 1),
    "patches": (np.float32, 4),
}
_KINDS: Mapping[str, type[np.generic]] = {
    "tensor(float16)": np.float16,
    "tensor(float)": np.float32,
    "tensor(bool)": np.bool_,
}


def _check_ends(session: onnxruntime.InferenceSession, card: ModelCard) -> None:
    """See that a graph takes and returns what its card says.

    Raises:
        BundleError: it does not.
    """
    where = f"bundle '{card.name}'"
    found = {node.name: node for node in session.get_inputs()}
    if set(found) != set(card.inputs):
        raise BundleError(
            f"{where}: the graph takes {_listed(found)}, the card says {_listed(card.inputs)}"
        )
    outputs = [node.name for node in session.get_outputs()]
    if outputs != [card.output]:
        raise BundleError(
            f"{where}: the graph returns {_listed(outputs)}, the card says {card.output}"
        )
    for name, node in found.items():
        kind, rank = _INPUTS[name]
        told = _KINDS.get(node.type)
        half = told is np.float16 and name in REFLECTANCE
        if not (told is kind or half) or len(node.shape) != rank:
            raise BundleError(
                f"{where}: '{name}' is a {node.type} of {len(node.shape)} axes, and is fed "
                f"{kind.__name__} of {rank}"
            )
    name, axis = ("values", 2) if card.modality == "pixel" else ("patches", 1)
    shape = found[name].shape
    if shape[axis] not in {len(card.bands)} | _symbols(shape):
        raise BundleError(
            f"{where}: '{name}' is {shape}, the card has {len(card.bands)} bands on axis {axis}"
        )


def _symbols(shape: list[int | str | None]) -> set[int | str | None]:
    """The axes of any length: the warm-up alone can tell whether they fit."""
    return {length for length in shape if not isinstance(length, int)}


def _listed(names: Any) -> str:  # noqa: ANN401 - any iterable of names
    return ", ".join(sorted(names))


def _session_options(provider: str) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    # What fails comes as an exception; said on stderr as well, it would be no line of the log.
    options.log_severity_level = 4
    # Two single-threaded runs on halves of a batch beat one run on two threads: the layers are
    # small, and splitting each of them costs more than it gains.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    # A spinning thread takes the CPU from the reader and the writer, and from other callers.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    if provider == CPU:
        # The arena is one lock. With the runtime's memory patterns, which stay on, a run takes it
        # once for all its layers, and two threads wait less for each other: 5 to 9 % more pixels.
        # A pattern of 2 KB is kept for every shape ever seen, so last batches have few sizes.
        _share_memory()
        options.add_session_config_entry("session.use_env_allocators", "1")
    return options


@functools.cache
def _share_memory() -> None:
    """One arena for the sessions of the process, which ONNX Runtime holds as one environment.

    Each session has one of its own by default, and keeps what its largest batch ever took: the
    zoo's seven took 783 MB once each had run, and with one between them 477, as fast as before.
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
    # No CUDA graphs: one is of one shape, input and output at fixed addresses, and T changes with
    # each caller's stack. Nor is input bound by hand: it comes from the CPU and is used once, so
    # that a run copies no more than binding would.
    return {
        # EXHAUSTIVE, the default, times every algorithm anew for each shape: seconds for a
        # caller with a new T. HEURISTIC asks cuDNN, in no time.
        "cudnn_conv_algo_search": "HEURISTIC",
        # TF32 keeps ten bits of what is multiplied, so that of two bands a thousandth apart no
        # difference is left. Products that may be rounded are in float16 anyway.
        "use_tf32": "0",
        # Grow by what is asked for: the default doubles, and takes memory from other processes.
        "arena_extend_strategy": "kSameAsRequested",
    }


def wanted(providers: Providers) -> str:
    """The provider to ask sessions for."""
    if providers == "cpu":
        return CPU
    if CUDA not in onnxruntime.get_available_providers():
        if providers == "cuda":
            raise ProviderUnavailable(
                "CUDA is demanded, but this build of ONNX Runtime offers only "
                + ", ".join(onnxruntime.get_available_providers())
            )
        return CPU
    if not _has_driver():  # asking all the same would print ONNX Runtime's alarm about libraries
        if providers == "cuda":
            raise ProviderUnavailable("CUDA is demanded, but NVIDIA's driver is not installed")
        return CPU
    if hasattr(onnxruntime, "preload_dlls"):
        # CUDA and cuDNN that came as wheels lie on no loader path. What it cannot find it prints.
        with contextlib.redirect_stdout(io.StringIO()) as said:
            onnxruntime.preload_dlls()
        _LOG.debug("preloading CUDA: %s", said.getvalue().strip())
    return CUDA


def _has_driver() -> bool:
    """Whether NVIDIA's driver is installed, whatever else is missing."""
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    return True

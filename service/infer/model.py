"""A loaded model: pixels or patches in batches through its session.

    values (N, T, C) → batches of one size → session → predictions (N, …)

On a CPU the batches of one call run in parallel on a small pool of threads, each as one
single-threaded session run. On CUDA they run one after the other. The last batch is padded, so that
few input shapes occur. A batch that runs out of memory is halved, and the run continues. After any
other failure of the device, the batch is retried once; if it fails again, the call raises.

Shapes: N pixels or patches, T dates, C bands; predictions have K classes, or H steps x S spectral
indices x Q quantiles, or D numbers of an embedding.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import nullcontext
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.card import ModelCard, Precision
from models.registry import BundleError
from service.errors import InternalError
from service.infer.session import CPU, CUDA, ORT_ERRORS, Floats, Session

_LOG = logging.getLogger(__name__)

# On a CPU a batch must fit into the caches, and each operation of the graph has an overhead of some
# microseconds. Measured on two threads with 2 MiB of level-2 cache each, µs per pixel of
# `pixels-landcover` / `pixels-crops-us` in batches of 128, 256, 512: float32 11.0, 11.5, 12.0 /
# 49.7, 52.8, 62.2; int8, with bytes for most floats, 7.45, 6.92, 6.29 / 26.8, 25.4, 25.2. A patch
# takes 2.7 ms alone and 2.1 ms in batches of 8 to 32. A GPU needs thousands of pixels per batch;
# the sizes for CUDA are not measured yet.
PIXEL_BATCH: Mapping[str, int] = {CPU: 128, CUDA: 8192}
INT8_BATCH = 512
PATCH_BATCH: Mapping[str, int] = {CPU: 8, CUDA: 512}
_SMALLEST_BATCH = {"pixel": 64, "patch": 1}
"""Smallest batch when a call is split so that each thread gets one, by modality."""
_WARM_UP = 3
"""Pixels or patches of the warm-up: more than one, so that a fixed batch axis is detected."""
# NumPy raises MemoryError when a batch is assembled.
_RUN_ERRORS: tuple[type[Exception], ...] = (*ORT_ERRORS, MemoryError)
_MAX_DEVIATION = 0.05
"""Largest allowed mean difference between device and CPU, relative to the largest output."""
_ROUNDING = 0.01
"""Tolerance of the warm-up's checks: float16 has three digits."""
_RECHECKED = 16
"""Pixels or patches that are checked on the CPU if a device returns NaN or infinity."""
Observe = Callable[[str, int, float], None]
"""Called after a batch with the model's id, the batch's pixels or patches, and seconds."""


def unobserved(model: str, size: int, seconds: float) -> None:
    """An `Observe` that does nothing."""


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One call of a model: its inputs, and the array that takes the predictions."""

    inputs: Mapping[str, NDArray[Any]]
    """Inputs with one row per pixel or patch (N, …), by name."""
    shared: Mapping[str, NDArray[Any]]
    """Inputs that are the same for all pixels, by name."""
    predictions: Floats
    """Predictions (N, …), written batch by batch."""

    @classmethod
    def of(
        cls,
        inputs: Mapping[str, NDArray[Any]],
        shared: Mapping[str, NDArray[Any]],
        width: tuple[int, ...],
    ) -> _Call:
        """A call whose array of predictions (N, *width) is not initialised."""
        count = len(next(iter(inputs.values())))
        return cls(inputs=inputs, shared=shared, predictions=np.empty((count, *width), np.float32))

    def __len__(self) -> int:
        return len(self.predictions)


class LoadedModel:
    """A bundle loaded into a session and run once.

    Args:
        card: the bundle's card.
        session: the bundle's session, checked against the card.
        pool: threads that run batches on the CPU.
        threads: number of threads of the pool.
        device: lock that a call holds while its batches run on CUDA.
        reference: on CUDA, a session of the same model on the CPU, with which the device's output
            is compared; None on the CPU.
        observe: called after each batch.
        folder: the bundle's folder.

    Raises:
        BundleError: the warm-up fails, or returns values that are impossible for the card's task.
    """

    def __init__(
        self,
        card: ModelCard,
        session: Session,
        *,
        pool: ThreadPoolExecutor,
        device: threading.Lock,
        threads: int = 1,
        reference: Session | None = None,
        observe: Observe = unobserved,
        folder: Path | None = None,
    ) -> None:
        self._observe = observe
        self.card = card
        self.folder = folder
        """The bundle's folder; None for a model that is not on disk."""
        self.provider = session.provider
        self.variant: Precision = session.variant
        self.width = prediction_shape(card)
        """Trailing shape of a prediction: (K,), (H, S, Q) or (D,)."""
        sizes = PIXEL_BATCH if card.modality == "pixel" else PATCH_BATCH
        self._batch = INT8_BATCH if self.variant == "int8" else sizes[self.provider]
        self._session = session
        self._pool = pool
        self._threads = threads
        self._device = device
        self._reference = reference
        self.failing = False
        """Whether the last run failed on the device, also when it was retried."""
        self._seconds_each: float | None = None
        self._warm_up()

    @property
    def chunk(self) -> int:
        """Number of pixels or patches per call that keeps every thread busy."""
        if self.provider == CUDA:
            return self._batch * 4
        return 8192 if self.card.modality == "pixel" else 128

    def seconds_each(self) -> float:
        """Seconds per pixel or patch with all threads busy, measured at the first call.

        It is the time of one batch of random, plausible reflectance on few dates.

        Raises:
            InternalError: ONNX Runtime failed.
        """
        if self._seconds_each is None:
            on_device = self.provider == CUDA
            sample = _sample(self.card, self._batch)
            try:
                with self._device if on_device else nullcontext():
                    self._session.run(sample)  # the first batch of a size may compile kernels
                    begun = time.perf_counter()
                    self._session.run(sample)
                    spent = time.perf_counter() - begun
            except _RUN_ERRORS as error:
                raise InternalError(f"model '{self.card.id}' failed to run") from error
            self._seconds_each = spent / self._batch / (1 if on_device else self._threads)
        return self._seconds_each

    def pixels(
        self,
        values: Floats,
        valid: NDArray[np.bool_],
        days: NDArray[np.float32],
        day_of_year: int | Floats | None = None,
        *,
        elsewhere: bool | NDArray[np.bool_] = False,
    ) -> Floats:
        """Predict for pixels.

        Args:
            values: reflectance (N, T, C) float32, unitless, 0 to 1, bands in the card's order; any
                value or NaN where not valid.
            valid: True where usable (N, T).
            days: days since the time window's first day (T) float32.
            day_of_year: day of the year of the time window's first day, 1 to 366, one for all
                pixels or one per pixel (N). Required if the card has `day_of_year`.
            elsewhere: whether the pixels are far from the places of the training data, one for all
                pixels or one per pixel (N); for a model whose card has `elsewhere`.

        Returns:
            Probabilities (N, K), quantiles (N, H, S, Q) or embeddings (N, D), float32; NaN for a
            pixel without a usable date.

        Raises:
            InternalError: ONNX Runtime failed, or `day_of_year` is missing.
        """
        inputs: dict[str, NDArray[Any]] = {
            "values": np.asarray(values, np.float32),
            "valid": np.asarray(valid, np.bool_),
        }
        if self.card.day_of_year:
            if day_of_year is None:
                raise InternalError(f"model '{self.card.id}' needs the day of the year")
            inputs["day_of_year"] = np.full(len(values), day_of_year, np.float32)
        if self.card.elsewhere:
            inputs["elsewhere"] = np.full(len(values), elsewhere, np.float32)
        shared = {"days": np.ascontiguousarray(days, np.float32)}
        return self._run(_Call.of(inputs, shared, self.width))

    def patches(self, patches: Floats) -> Floats:
        """Predict for patches.

        Args:
            patches: reflectance (N, C, P, P) float32, unitless, 0 to 1, bands in the card's order.

        Returns:
            Probabilities (N, K) or embeddings (N, D), float32.

        Raises:
            InternalError: ONNX Runtime failed.
        """
        return self._run(_Call.of({"patches": np.asarray(patches, np.float32)}, {}, self.width))

    def _run(self, call: _Call) -> Floats:
        on_device = self.provider == CUDA
        run = self._run_on_device if on_device else self._run_on_threads
        try:
            run(call)
            if on_device:
                self._recheck(call)
        except _RUN_ERRORS as error:
            self.failing = on_device
            # The runtime's message goes to the log as the cause, not to the client.
            raise InternalError(f"model '{self.card.id}' failed to run") from error
        self.failing = False
        return call.predictions

    def _run_on_threads(self, call: _Call) -> None:
        size = self._batch
        while len(call) < size * self._threads and size > _SMALLEST_BATCH[self.card.modality]:
            size //= 2
        batches = [
            # In the caller's context, so that a line of the log names the request.
            self._pool.submit(copy_context().run, self._run_halving, call, part)
            for part in _parts(len(call), size)
        ]
        _, pending = wait(batches, return_when=FIRST_EXCEPTION)
        for batch in pending:
            batch.cancel()
        for batch in batches:
            if not batch.cancelled():
                batch.result()

    def _run_halving(self, call: _Call, part: slice) -> None:
        """Run one batch; if it runs out of memory, run its halves instead."""
        size = part.stop - part.start
        try:
            self._run_batch(call, part)
        except _RUN_ERRORS as error:
            if not _is_out_of_memory(error) or size == 1:
                raise
        else:
            return
        # Outside the handler, which would keep the failed batch's memory.
        _LOG.warning("out of memory; a batch of %d is halved", size)
        middle = part.start + size // 2
        self._run_halving(call, slice(part.start, middle))
        self._run_halving(call, slice(middle, part.stop))

    def _run_on_device(self, call: _Call) -> None:
        with self._device:
            start, retried = 0, False
            while start < len(call):
                stop = min(start + self._batch, len(call))
                try:
                    self._run_batch(call, slice(start, stop))
                except _RUN_ERRORS as error:
                    if _is_out_of_memory(error) and self._batch > 1:
                        self._batch //= 2
                        _LOG.warning("out of device memory; batches are now of %d", self._batch)
                    elif retried:
                        raise
                    else:
                        retried = True
                        _LOG.warning("a run failed on the device; retrying", exc_info=error)
                else:
                    start = stop

    def _recheck(self, call: _Call) -> None:
        """Run a few pixels or patches again on the CPU if the device returns NaN or infinity.

        NaN is the prediction for a pixel without a usable date. The NaN of a device that fails
        silently would be mistaken for that of a cloudy pixel.

        Raises:
            ValueError: the CPU returns numbers where the device returns NaN or infinity.
        """
        if self._reference is None:
            return
        finite = np.isfinite(call.predictions.reshape(len(call), -1)).all(axis=1)
        empty = np.flatnonzero(~finite)
        rows = empty[_has_input(call.inputs, empty)][:_RECHECKED]
        if rows.size == 0:
            return
        inputs = {name: array[rows] for name, array in call.inputs.items()}
        expected = self._reference.run({**inputs, **call.shared})
        if np.isfinite(expected).all(axis=tuple(range(1, expected.ndim))).any():
            raise ValueError(
                f"{self.provider} returns NaN or infinity where the CPU returns numbers"
            )

    def _run_batch(self, call: _Call, part: slice) -> None:
        count = part.stop - part.start
        size = _padded(count, self._batch)
        # Each batch copies its own rows, so that the pool's threads share that work.
        feeds = {name: _repeat_last(array[part], size) for name, array in call.inputs.items()}
        begun = time.perf_counter()
        output = self._session.run({**feeds, **call.shared})
        self._observe(self.card.id, count, time.perf_counter() - begun)
        if output.shape != (size, *self.width):
            # Otherwise predictions could be assigned to the wrong pixels.
            raise ValueError(f"the output has shape {output.shape}, not {(size, *self.width)}")
        call.predictions[part] = output[:count]

    def _warm_up(self) -> None:
        """Run once, so that the first request is not slower and a wrong card is detected.

        Raises:
            BundleError: the run fails, or its output does not match the card.
        """
        where = f"bundle '{self.card.name}'"
        sample = _sample(self.card, _WARM_UP)
        try:
            output = self._session.run(sample)
            expected = output if self._reference is None else self._reference.run(sample)
        except _RUN_ERRORS as error:
            raise BundleError(
                f"{where}: the model failed on random input; the server's log states the cause"
            ) from error
        if output.shape != (_WARM_UP, *self.width):
            raise BundleError(
                f"{where}: '{self.card.output}' has shape {output.shape[1:]} per "
                f"{self.card.modality}, but the card states {self.width}: change the card "
                "or the graph"
            )
        fault = _output_fault(output, self.card)
        if fault:
            raise BundleError(f"{where}: for a plausible {self.card.modality}, {fault}")
        if np.abs(output - expected).mean() > _MAX_DEVIATION * np.abs(expected).max():
            raise BundleError(
                f"{where}: the outputs on {self.provider} differ from those on the CPU: set "
                "PIMC_PRECISION=float32 or PIMC_PROVIDERS=cpu"
            )


def prediction_shape(card: ModelCard) -> tuple[int, ...]:
    """Shape of the prediction for one pixel or patch: (K,), (H, S, Q) or (D,)."""
    if card.task == "forecast":
        return (card.horizon or 0, len(card.indices), len(card.quantiles))
    if card.task == "embed":
        return (card.embedding or 0,)
    return (len(card.classes),)


def _output_fault(output: Floats, card: ModelCard) -> str | None:
    """The reason why an output is impossible for the card's task; None if it is possible."""
    if not np.isfinite(output).all():
        return f"'{card.output}' holds NaN or infinity"
    if card.task == "forecast" and (np.diff(output, axis=-1) < -_ROUNDING).any():
        return "the quantiles do not ascend"
    if card.output == "probabilities" and (
        (output < -_ROUNDING).any() or (np.abs(output.sum(axis=1) - 1) > _ROUNDING).any()
    ):
        return f"probabilities sum to {output.sum(axis=1)[0]:.4g}, not to 1"
    return None


def _sample(card: ModelCard, count: int) -> dict[str, NDArray[Any]]:
    """Inputs of the graph with random, plausible reflectance for `count` pixels or patches."""
    random = np.random.default_rng(0)
    if card.modality == "patch":
        side = card.patch or 0
        shape = (count, len(card.bands), side, side)
        return {"patches": random.uniform(0.0, 0.4, shape).astype(np.float32)}
    window = card.window
    dates = max(card.min_observations, 4)
    length = window.steps * window.step_days if window else dates
    feeds = {
        "values": random.uniform(0.02, 0.4, (count, dates, len(card.bands))).astype(np.float32),
        "valid": np.ones((count, dates), np.bool_),
        "days": np.linspace(0, length - 1, dates, dtype=np.float32),
        "day_of_year": np.ones(count, np.float32),
        "elsewhere": np.zeros(count, np.float32),
    }
    return {name: feeds[name] for name in card.inputs}


def _has_input(inputs: Mapping[str, NDArray[Any]], rows: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Whether each of the given rows (n) has usable input."""
    if "patches" in inputs:
        return np.asarray(np.isfinite(inputs["patches"][rows]).all(axis=(1, 2, 3)))
    finite = np.isfinite(inputs["values"][rows]).all(axis=2)
    return np.asarray((finite & inputs["valid"][rows]).any(axis=1))


def _parts(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _padded(count: int, batch: int) -> int:
    """The next power of two, at most the batch size: few shapes occur, and little is wasted."""
    return min(1 << (count - 1).bit_length(), batch)


def _repeat_last(array: NDArray[Any], size: int) -> NDArray[Any]:
    missing = size - len(array)
    return array if missing <= 0 else np.concatenate([array, array[-1:].repeat(missing, axis=0)])


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return any(words in text for words in _OUT_OF_MEMORY)


# Messages of ONNX Runtime's arena, CUDA, C++, cuBLAS and cuDNN.
_OUT_OF_MEMORY = (
    "failed to allocate memory", "smaller than requested bytes", "out of memory", "bad_alloc",
    "bad allocation", "alloc_failed", "allocation_failed",
)  # fmt: skip

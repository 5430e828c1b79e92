"""A loaded model: pixels or patches in batches through its session.

    values (N, T, C) → batches of one size → session → predictions (N, …)

On a CPU the batches of one call run side by side on a small pool of threads, each with a
single-threaded session run; on CUDA they run one after the other. The last batch is padded, so that
there are few shapes. If a batch runs out of memory, it is halved and the run continues; any other
device fault is retried once and then raised.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.card import ModelCard, Precision
from models.registry import BundleError
from service.errors import InternalError
from service.infer.session import CPU, CUDA, ORT_ERRORS, Floats, Session

_LOG = logging.getLogger(__name__)

# On a CPU a batch must stay in the caches, and each of its operations costs some microseconds.
# Measured on two threads with 2 MiB of level-2 cache each, µs per pixel of `pixels-landcover` /
# `pixels-crops-us` in batches of 128, 256, 512: float32 11.0, 11.5, 12.0 / 49.7, 52.8, 62.2; int8,
# with bytes for most floats, 7.45, 6.92, 6.29 / 26.8, 25.4, 25.2. A patch takes 2.7 ms alone, 2.1
# in batches of 8 to 32. A device needs thousands of pixels; its sizes are not measured yet.
PIXEL_BATCH: Mapping[str, int] = {CPU: 128, CUDA: 8192}
INT8_BATCH = 512
PATCH_BATCH: Mapping[str, int] = {CPU: 8, CUDA: 512}
_FEWEST = {"pixel": 64, "patch": 1}
"""Smallest batch when a call is split so that each thread has one."""
_WARM_UP = 3
"""Pixels or patches of the warm-up: more than one, so that a fixed batch axis is detected."""
# MemoryError comes from NumPy, when a batch is assembled.
_FAULTS: tuple[type[Exception], ...] = (*ORT_ERRORS, MemoryError)
_ADRIFT = 0.05
"""Largest allowed mean difference between device and CPU, relative to the largest output."""
_ROUGHLY = 0.01  # float16 has three digits
_RECHECKED = 16
"""Pixels or patches that are checked on the CPU if a device returns NaN or infinity."""


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One call of a model: its inputs, and the array that takes the predictions."""

    inputs: Mapping[str, NDArray[Any]]
    """Inputs with one row per pixel or patch (N, …), by name."""
    shared: Mapping[str, NDArray[Any]]
    """Inputs that all pixels share, by name."""
    predictions: Floats
    """(N, …), filled batch by batch."""

    @classmethod
    def of(
        cls,
        inputs: Mapping[str, NDArray[Any]],
        shared: Mapping[str, NDArray[Any]],
        width: tuple[int, ...],
    ) -> _Call:
        """A call with uninitialised predictions of a width."""
        count = len(next(iter(inputs.values())))
        return cls(inputs=inputs, shared=shared, predictions=np.empty((count, *width), np.float32))

    def __len__(self) -> int:
        return len(self.predictions)


class LoadedModel:
    """One bundle's warm session.

    Args:
        card: of the bundle.
        session: its checked session.
        pool: threads for batches on the CPU.
        threads: number of these threads.
        device: held while batches run on CUDA.
        reference: on CUDA, the same model on the CPU, to check the device against.

    Raises:
        BundleError: the warm-up fails, or returns values that the card's task cannot have.
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
    ) -> None:
        self.card = card
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
        """Whether the last run failed on the device, the retry included."""
        self._warm_up()

    @property
    def chunk(self) -> int:
        """Pixels or patches per call that keep every thread busy."""
        if self.provider == CUDA:
            return self._batch * 4
        return 8192 if self.card.modality == "pixel" else 128

    def pixels(
        self,
        values: Floats,
        valid: NDArray[np.bool_],
        days: NDArray[np.float32],
        day_of_year: int | Floats | None = None,
    ) -> Floats:
        """Predict for pixels.

        Args:
            values: reflectance (N, T, C), unitless, bands in the card's order; any value, NaN
                included, where not valid.
            valid: True where usable (N, T).
            days: days since the window's first day (T).
            day_of_year: day of the year of the first day, 1 to 366, one for all or (N). Needed
                only by a model whose card has `day_of_year`.

        Returns:
            Probabilities (N, K), quantiles (N, H, S, Q) or embeddings (N, D); NaN for a pixel
            without a usable date.

        Raises:
            InternalError: the runtime failed.
        """
        inputs: dict[str, NDArray[Any]] = {
            "values": np.asarray(values, np.float32),
            "valid": np.asarray(valid, np.bool_),
        }
        if self.card.day_of_year:
            if day_of_year is None:
                raise InternalError(f"model '{self.card.id}' needs the day of the year")
            inputs["day_of_year"] = np.full(len(values), day_of_year, np.float32)
        shared = {"days": np.ascontiguousarray(days, np.float32)}
        return self._run(_Call.of(inputs, shared, self.width))

    def patches(self, patches: Floats) -> Floats:
        """Predict for patches.

        Args:
            patches: reflectance (N, C, P, P), unitless, bands in the card's order.

        Returns:
            Probabilities (N, K) or embeddings (N, D).

        Raises:
            InternalError: the runtime failed.
        """
        return self._run(_Call.of({"patches": np.asarray(patches, np.float32)}, {}, self.width))

    def _run(self, call: _Call) -> Floats:
        on_device = self.provider == CUDA
        run = self._run_on_device if on_device else self._run_on_threads
        try:
            run(call)
            if on_device:
                self._recheck(call)
        except _FAULTS as error:
            self.failing = on_device
            # The runtime's message goes to the log as the cause, not to the client.
            raise InternalError(f"model '{self.card.id}' failed to run") from error
        self.failing = False
        return call.predictions

    def _run_on_threads(self, call: _Call) -> None:
        size = self._batch
        while len(call) < size * self._threads and size > _FEWEST[self.card.modality]:
            size //= 2
        jobs = [self._pool.submit(self._in_halves, call, part) for part in _parts(len(call), size)]
        _, waiting = wait(jobs, return_when=FIRST_EXCEPTION)
        for job in waiting:
            job.cancel()
        for job in jobs:
            if not job.cancelled():
                job.result()

    def _in_halves(self, call: _Call, part: slice) -> None:
        """Run one batch, halved as often as memory requires."""
        size = part.stop - part.start
        try:
            self._run_batch(call, part)
        except _FAULTS as error:
            if not _is_out_of_memory(error) or size == 1:
                raise
        else:
            return
        # After the handler, so that the failed batch is freed first.
        _LOG.warning("out of memory; a batch of %d is halved", size)
        middle = part.start + size // 2
        self._in_halves(call, slice(part.start, middle))
        self._in_halves(call, slice(middle, part.stop))

    def _run_on_device(self, call: _Call) -> None:
        with self._device:
            start, retried = 0, False
            while start < len(call):
                stop = min(start + self._batch, len(call))
                try:
                    self._run_batch(call, slice(start, stop))
                except _FAULTS as error:
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
        """Check on the CPU a few pixels or patches for which the device returns NaN or infinity.

        NaN is the prediction for a pixel without a usable date. NaN from a device that fails
        silently would look the same, as if the pixel were cloudy.

        Raises:
            ValueError: the CPU returns numbers for them.
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
        # Reordered per batch, so that the threads share the work and none waits for all of it.
        feeds = {name: _repeat_last(array[part], size) for name, array in call.inputs.items()}
        output = self._session.run({**feeds, **call.shared})
        if output.shape != (size, *self.width):
            # Otherwise another pixel's prediction could be taken for this one's.
            raise ValueError(f"the output has shape {output.shape}, not {(size, *self.width)}")
        call.predictions[part] = output[:count]

    def _warm_up(self) -> None:
        """Run once, so that the first request does not wait and a wrong card is detected."""
        where = f"bundle '{self.card.name}'"
        sample = _sample(self.card, _WARM_UP)
        try:
            answer = self._session.run(sample)
            told = answer if self._reference is None else self._reference.run(sample)
        except _FAULTS as error:
            raise BundleError(f"{where}: the warm-up failed; the log has the cause") from error
        if answer.shape != (_WARM_UP, *self.width):
            raise BundleError(
                f"{where}: '{self.card.output}' has shape {answer.shape[1:]} per "
                f"{self.card.modality}, but the card states {self.width}"
            )
        wrong = _impossible(answer, self.card)
        if wrong:
            raise BundleError(f"{where}: for a plausible {self.card.modality}, {wrong}")
        if np.abs(answer - told).mean() > _ADRIFT * np.abs(told).max():
            raise BundleError(f"{where}: the outputs on {self.provider} differ from the CPU's")


def prediction_shape(card: ModelCard) -> tuple[int, ...]:
    """Shape of the prediction for one pixel or patch: (K,), (H, S, Q) or (D,)."""
    if card.task == "forecast":
        return (card.horizon or 0, len(card.indices), len(card.quantiles))
    if card.task == "embed":
        return (card.embedding or 0,)
    return (len(card.classes),)


def _impossible(answer: Floats, card: ModelCard) -> str | None:
    """The fault of a prediction that no model of this task may have; None if there is none."""
    if not np.isfinite(answer).all():
        return f"'{card.output}' holds NaN or infinity"
    if card.task == "forecast" and (np.diff(answer, axis=-1) < -_ROUGHLY).any():
        return "the quantiles do not ascend"
    if card.output == "probabilities" and (
        (answer < -_ROUGHLY).any() or (np.abs(answer.sum(axis=1) - 1) > _ROUGHLY).any()
    ):
        return f"probabilities sum to {answer.sum(axis=1)[0]:.4g}, not to 1"
    return None


def _sample(card: ModelCard, count: int) -> dict[str, NDArray[Any]]:
    """Plausible reflectance, to check that the graph runs."""
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
    }
    return {name: feeds[name] for name in card.inputs}


def _has_input(inputs: Mapping[str, NDArray[Any]], rows: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Whether each of these rows has usable input (n)."""
    if "patches" in inputs:
        finite = np.isfinite(inputs["patches"][rows])
        return np.asarray(finite.reshape(len(finite), -1).all(axis=1))
    finite = np.isfinite(inputs["values"][rows]).all(axis=2)
    return np.asarray((finite & inputs["valid"][rows]).any(axis=1))


def _parts(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _padded(count: int, batch: int) -> int:
    """The next power of two, at most the batch: few shapes, so few plans and little waste."""
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

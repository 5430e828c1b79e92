"""ONNX Runtime: one warm session a bundle, and batches through it.

    values (N, T, C) → batches of one size → session → answers (N, …)

On a CPU the batches of one call run side by side on a small pool of threads, each with a
single-threaded session run; on CUDA they run one after the other. The last one is padded, so that
there are few shapes. Out of memory, a batch is halved and the run goes on; any other fault of a
device is tried once more and then reported. ONNX Runtime is not imported anywhere else, and its
exceptions leave this module as ours.
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
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state

from models.card import REFLECTANCE, Modality, ModelCard, Precision, Task
from models.registry import Bundle, BundleError, Registry
from service.cpus import multiplies_int8, usable_cpus
from service.errors import InternalError, UnknownModel, WrongTask
from service.settings import SettingsError

Providers = Literal["auto", "cuda", "cpu"]
Wish = Literal["auto", "float32"]
Floats = NDArray[np.float32]

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

# On a CPU, what is in use at once must stay in the caches, and each operation of a batch costs some
# microseconds. Two threads, 2 MiB of second-level cache each, us a pixel of `pixels-landcover` /
# `pixels-crops-us` in batches of 128, 256, 512: float32 11.0, 11.5, 12.0 / 49.7, 52.8, 62.2; int8,
# with bytes for most floats, 7.45, 6.92, 6.29 / 26.8, 25.4, 25.2. A patch takes 2.7 ms alone, 2.1
# in batches of 8 to 32. A device wants thousands of pixels; its sizes are not measured yet.
PIXEL_BATCH: Mapping[str, int] = {CPU: 128, CUDA: 8192}
INT8_BATCH = 512
PATCH_BATCH: Mapping[str, int] = {CPU: 8, CUDA: 512}
_FEWEST = {"pixel": 64, "patch": 1}
"""Of a batch that is cut smaller so that each thread has one."""

TOLERATED_LOSS = 0.003
"""A reduced precision may cost this much of any metric: 0.3 points of a share."""

_LOG = logging.getLogger(__name__)
_WARM_UP = 3
"""Pixels or patches of the warm-up: more than one, so that a fixed batch axis shows."""
_ORT_ERRORS: tuple[type[Exception], ...] = (
    # The runtime's own exceptions share no base class but Exception.
    *(
        kind
        for kind in vars(onnxruntime_pybind11_state).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ),
    ValueError,  # from its Python layer, and from `_one`: an array of the wrong shape
)


# The last from numpy, where a batch is put together.
_FAULTS: tuple[type[Exception], ...] = (*_ORT_ERRORS, MemoryError)
_ADRIFT = 0.05
"""A device may answer the sample this far from the CPU, on average, as a share of the largest."""
_ROUGHLY = 0.01  # float16 has three digits
_RECHECKED = 16
"""Pixels or patches that are asked of the CPU where a device answers no number."""
# A run after which the arena returns what no other run holds: the blocks that a batch of many dates
# or of patches made it grow by. Each costs a millisecond or two of asking for memory again.
_GIVING_BACK = onnxruntime.RunOptions()
_GIVING_BACK.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
_GIVE_BACK_SECONDS = 10.0


class _Turn:
    """A turn that comes every so many seconds, for whoever asks first."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = 0.0
        self._lock = threading.Lock()

    def taken(self) -> bool:
        """Whether the turn had come, and is the caller's."""
        now = time.monotonic()
        with self._lock:
            if now < self._next:
                return False
            self._next = now + self._seconds
            return True


_TURN_TO_GIVE_BACK = _Turn(_GIVE_BACK_SECONDS)


class ProviderUnavailable(SettingsError):
    """CUDA was demanded and cannot be had; the service must not start."""


class Engine:
    """Every bundle of a registry, loaded and warm.

    Args:
        registry: verified bundles.
        providers: `auto` takes CUDA where a session really gets it; `cuda` demands it; `cpu`.
        threads: threads that run batches on the CPU, for all models and callers together;
            None takes the CPUs that this process may use, `usable_cpus`.
        precision: `auto` takes variants that lose next to nothing; `float32` none.

    Raises:
        ProviderUnavailable: `cuda` is demanded and a session does not get it.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        providers: Providers = "auto",
        threads: int | None = None,
        precision: Wish = "auto",
    ) -> None:
        self.registry = registry
        self._precision = precision
        self.threads = threads or usable_cpus()
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="infer")
        # One call at a time on the device: two would take turns anyway and double its memory.
        self._device = threading.Lock()
        provider = _wanted(providers)
        models: dict[str, LoadedModel] = {}
        refused: dict[str, str] = dict(registry.refused)
        try:
            for name, bundle in registry.bundles.items():
                try:
                    models[name] = self._load(bundle, provider)
                except BundleError as error:
                    refused[name] = str(error)
                    # With what the runtime said: it names paths, which callers need not see.
                    _LOG.error("%s", error, exc_info=error)
                    continue
                if models[name].provider != provider:
                    if providers == "cuda":
                        raise ProviderUnavailable(  # noqa: TRY301 - the pool must be closed
                            f"CUDA is demanded, but the session of '{name}' runs on "
                            f"{models[name].provider}: the driver, CUDA or cuDNN does not load"
                        )
                    _LOG.warning("CUDA is offered but no session gets it; serving on the CPU")
                    provider = CPU  # asking again for each bundle would fail as slowly
        except BaseException:
            self.close()
            raise
        self.models: Mapping[str, LoadedModel] = models
        self.refused: Mapping[str, str] = refused
        """Bundles that are not served, with the reason, the registry's refusals included."""

    @property
    def provider(self) -> str:
        """The execution provider in use, as the sessions say: CUDA only where all got it."""
        on_cuda = bool(self.models) and all(m.provider == CUDA for m in self.models.values())
        return CUDA if on_cuda else CPU

    @property
    def failing(self) -> list[str]:
        """Models whose last run failed on the device, as `name@version`."""
        return sorted(model.card.id for model in self.models.values() if model.failing)

    def find(
        self, reference: str | None, task: Task, modality: Modality | None = None
    ) -> LoadedModel:
        """The model of a `name` or `name@version`, or the task's default.

        Raises:
            UnknownModel: none of that name and version, or none for the task, is served.
            WrongTask: the model serves another task or modality.
        """
        if reference is None:
            bundle = self.registry.default(task, modality)
        else:
            bundle = self.registry.find(reference)
        model = self.models.get(bundle.card.name) if bundle else None
        if model is None:
            raise UnknownModel(self._why_unknown(reference, task, bundle))
        card = model.card
        if card.task != task:
            raise WrongTask(f"model '{card.id}' serves {card.task}, and {task} was asked for")
        if modality not in {None, card.modality}:
            raise WrongTask(
                f"model '{card.id}' takes {card.modality} input, and modality {modality} was "
                "asked for"
            )
        return model

    def close(self) -> None:
        """Let the threads go; a call in progress still ends."""
        # Batches not begun are not cancelled: who waits for one taken back here waits for ever.
        self._pool.shutdown(wait=True)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self, bundle: Bundle, provider: str) -> LoadedModel:
        session = open_session(bundle, provider, self._precision)
        if session.provider != provider:
            # The variant and the options of CUDA are not those of the CPU.
            session = open_session(bundle, session.provider, self._precision)
        on_device = session.provider == CUDA
        reference = open_session(bundle, CPU, self._precision) if on_device else None
        return LoadedModel(
            bundle.card,
            session,
            pool=self._pool,
            threads=self.threads,
            device=self._device,
            reference=reference,
        )

    def _why_unknown(self, reference: str | None, task: Task, bundle: Bundle | None) -> str:
        if bundle and bundle.card.name in self.refused:
            return f"model '{bundle.card.id}' could not be loaded: {self.refused[bundle.card.name]}"
        served = ", ".join(sorted(m.card.id for m in self.models.values())) or "none"
        asked = f"no model '{reference}'" if reference else f"no model serves {task}"
        return f"{asked}; there are: {served}"


class LoadedModel:
    """One bundle's warm session.

    Args:
        card: what the bundle says of itself.
        session: its checked session.
        pool: threads for batches on the CPU.
        threads: how many these are.
        device: held while batches run on CUDA.
        reference: on CUDA, the same model on the CPU, to judge the device by.

    Raises:
        BundleError: the warm-up fails, or answers what the card's task cannot mean.
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
        self.width = answer_shape(card)
        """Trailing shape of an answer: (K,), (H, S, Q) or (D,)."""
        sizes = PIXEL_BATCH if card.modality == "pixel" else PATCH_BATCH
        self._batch = INT8_BATCH if self.variant == "int8" else sizes[self.provider]
        self._session = session
        self._pool = pool
        self._threads = threads
        self._device = device
        self._reference = reference
        self.failing = False
        """Whether the last run failed on the device, in spite of a second try."""
        self._warm_up()

    @property
    def chunk(self) -> int:
        """Pixels or patches worth handing over at once: enough to keep every thread busy."""
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
        """Answers for pixels.

        Args:
            values: reflectance (N, T, C), unitless, bands as the card orders them; anything,
                NaN too, where not valid.
            valid: True where usable (N, T).
            days: days since the window's first day (T).
            day_of_year: the first day's place in its year, 1 to 366, of all or of each (N).
                Only a model whose card says `day_of_year` needs it.

        Returns:
            Probabilities (N, K), quantiles (N, H, S, Q) or embeddings (N, D); NaN for a pixel
            without a usable date.

        Raises:
            InternalError: the runtime failed.
        """
        each: dict[str, NDArray[Any]] = {
            "values": np.asarray(values, np.float32),
            "valid": np.asarray(valid, np.bool_),
        }
        if self.card.day_of_year:
            if day_of_year is None:
                raise InternalError(f"model '{self.card.id}' needs the day of the year")
            each["day_of_year"] = np.full(len(values), day_of_year, np.float32)
        return self._run(each, {"days": np.ascontiguousarray(days, np.float32)})

    def patches(self, patches: Floats) -> Floats:
        """Answers for patches.

        Args:
            patches: reflectance (N, C, P, P), unitless, bands as the card orders them.

        Returns:
            Probabilities (N, K) or embeddings (N, D).

        Raises:
            InternalError: the runtime failed.
        """
        return self._run({"patches": np.asarray(patches, np.float32)}, {})

    def _run(self, each: Mapping[str, NDArray[Any]], shared: Mapping[str, NDArray[Any]]) -> Floats:
        count = len(next(iter(each.values())))
        out = np.empty((count, *self.width), np.float32)
        on_device = self.provider == CUDA
        run = self._run_on_device if on_device else self._run_on_threads
        try:
            run(each, shared, out)
            if on_device:
                self._recheck(each, shared, out)
        except _FAULTS as error:
            self.failing = on_device
            # What the runtime says is for the log, as the cause, not for the caller.
            raise InternalError(f"model '{self.card.id}' failed to run") from error
        self.failing = False
        return out

    def _run_on_threads(
        self, each: Mapping[str, NDArray[Any]], shared: Mapping[str, NDArray[Any]], out: Floats
    ) -> None:
        size = self._batch
        while len(out) < size * self._threads and size > _FEWEST[self.card.modality]:
            size //= 2
        jobs = [
            self._pool.submit(self._in_halves, each, shared, out, part)
            for part in _parts(len(out), size)
        ]
        _, waiting = wait(jobs, return_when=FIRST_EXCEPTION)
        for job in waiting:
            job.cancel()
        for job in jobs:
            if not job.cancelled():
                job.result()

    def _in_halves(
        self,
        each: Mapping[str, NDArray[Any]],
        shared: Mapping[str, NDArray[Any]],
        out: Floats,
        part: slice,
    ) -> None:
        """One batch, or as many smaller ones as memory asks for."""
        size = part.stop - part.start
        try:
            self._one(each, shared, out, part)
        except _FAULTS as error:
            if not _is_out_of_memory(error) or size == 1:
                raise
        else:
            return
        # After the handler, so that what failed is let go first.
        _LOG.warning("out of memory; a batch of %d goes on in halves", size)
        middle = part.start + size // 2
        self._in_halves(each, shared, out, slice(part.start, middle))
        self._in_halves(each, shared, out, slice(middle, part.stop))

    def _run_on_device(
        self, each: Mapping[str, NDArray[Any]], shared: Mapping[str, NDArray[Any]], out: Floats
    ) -> None:
        with self._device:
            start, tried_again = 0, False
            while start < len(out):
                stop = min(start + self._batch, len(out))
                try:
                    self._one(each, shared, out, slice(start, stop))
                except _FAULTS as error:
                    if _is_out_of_memory(error) and self._batch > 1:
                        self._batch //= 2
                        _LOG.warning("out of device memory; batches are now of %d", self._batch)
                    elif tried_again:
                        raise
                    else:
                        tried_again = True
                        _LOG.warning("a run failed on the device; once more", exc_info=error)
                else:
                    start = stop

    def _recheck(
        self, each: Mapping[str, NDArray[Any]], shared: Mapping[str, NDArray[Any]], out: Floats
    ) -> None:
        """Ask the CPU about a few of those that the device answers with no number.

        NaN is the answer for a pixel without a usable date. From a device that fails silently it
        would pass for that, and a hole in the map for clouds.

        Raises:
            ValueError: the CPU has numbers for them.
        """
        if self._reference is None:
            return
        empty = np.flatnonzero(~np.isfinite(out.reshape(len(out), -1)).all(axis=1))
        rows = empty[_has_input(each, empty)][:_RECHECKED]
        if rows.size == 0:
            return
        told = self._reference.run({**{name: a[rows] for name, a in each.items()}, **shared})
        if np.isfinite(told).all(axis=tuple(range(1, told.ndim))).any():
            raise ValueError(f"{self.provider} answers no numbers where the CPU does")

    def _one(
        self,
        each: Mapping[str, NDArray[Any]],
        shared: Mapping[str, NDArray[Any]],
        out: Floats,
        part: slice,
    ) -> None:
        count = part.stop - part.start
        size = _padded(count, self._batch)
        # Put into the graph's order by batch: the threads share it, and none waits for the whole.
        feeds = {name: _repeat_last(array[part], size) for name, array in each.items()}
        answer = self._session.run({**feeds, **shared})
        if answer.shape != (size, *self.width):
            # Else another pixel's answer could pass for this one's.
            raise ValueError(f"{answer.shape} answered, {(size, *self.width)} expected")
        out[part] = answer[:count]

    def _warm_up(self) -> None:
        """Run once, so that the first caller does not wait and a false card does not pass."""
        where = f"bundle '{self.card.name}'"
        sample = _sample(self.card, _WARM_UP)
        try:
            answer = self._session.run(sample)
            told = answer if self._reference is None else self._reference.run(sample)
        except _FAULTS as error:
            raise BundleError(f"{where}: the warm-up failed, the log says how") from error
        if answer.shape != (_WARM_UP, *self.width):
            raise BundleError(
                f"{where}: '{self.card.output}' answers {answer.shape[1:]} a "
                f"{self.card.modality}, the card says {self.width}"
            )
        wrong = _impossible(answer, self.card)
        if wrong:
            raise BundleError(f"{where}: for a plausible {self.card.modality}, {wrong}")
        if np.abs(answer - told).mean() > _ADRIFT * np.abs(told).max():
            raise BundleError(f"{where}: {self.provider} does not answer as the CPU does")


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

    @property
    def provider(self) -> str:
        """The execution provider that the session really got."""
        return str(self.session.get_providers()[0])

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Floats:
        """One run; the GIL is free meanwhile. Input that stays on a device would be bound here."""
        given = {n: np.ascontiguousarray(x, self.kinds[n]) for n, x in feeds.items()}
        on_cpu = self.provider == CPU
        options = _GIVING_BACK if on_cpu and _TURN_TO_GIVE_BACK.taken() else None
        (answer,) = self.session.run([self.output], given, options)
        return np.asarray(answer, np.float32)


def open_session(bundle: Bundle, provider: str, precision: Wish = "auto") -> Session:
    """Load the variant that suits a provider, and check it against the card.

    The session may get less than it asks for: ask it.

    Args:
        bundle: verified.
        provider: to ask for.
        precision: `float32` takes that file whatever else there is.

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
    except _ORT_ERRORS as error:
        raise BundleError(_why_not(bundle, variant, error)) from error
    # Else a failing device is answered from a new CPU session, behind everybody's back.
    session.disable_fallback()
    _check_ends(session, card)
    kinds = {node.name: _KINDS[node.type] for node in session.get_inputs()}
    return Session(session=session, output=card.output, kinds=kinds, variant=variant)


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


def answer_shape(card: ModelCard) -> tuple[int, ...]:
    """Shape of the answer for one pixel or patch: (K,), (H, S, Q) or (D,)."""
    if card.task == "forecast":
        return (card.horizon or 0, len(card.indices), len(card.quantiles))
    if card.task == "embed":
        return (card.embedding or 0,)
    return (len(card.classes),)


def _why_not(bundle: Bundle, variant: Precision, error: Exception) -> str:
    """What to say of a file that does not load; the runtime's own words name paths."""
    where = f"bundle '{bundle.card.name}': {bundle.path(variant).name}"
    newest = re.search(r"support for domain ai\.onnx is till opset (\d+)", str(error))
    if newest is None:
        return f"{where}: {variant} does not load, the log says why"
    opset = next(v.opset for v in bundle.card.variants if v.name == variant)
    return (
        f"{where} is of opset {opset}, and ONNX Runtime {onnxruntime.__version__} takes none above "
        f"{newest[1]}"
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


def _impossible(answer: Floats, card: ModelCard) -> str | None:
    """What no model of this task may answer for a plausible input, None where all is well."""
    if not np.isfinite(answer).all():
        return f"'{card.output}' holds NaN or infinity"
    if card.task == "forecast" and (np.diff(answer, axis=-1) < -_ROUGHLY).any():
        return "the quantiles do not ascend"
    if card.output == "probabilities" and (
        (answer < -_ROUGHLY).any() or (np.abs(answer.sum(axis=1) - 1) > _ROUGHLY).any()
    ):
        return f"probabilities sum to {answer.sum(axis=1)[0]:.4g}, not to 1"
    return None


def _symbols(shape: list[int | str | None]) -> set[int | str | None]:
    """The axes of any length: the warm-up alone can tell whether they fit."""
    return {length for length in shape if not isinstance(length, int)}


def _listed(names: Any) -> str:  # noqa: ANN401 - any iterable of names
    return ", ".join(sorted(names))


def _sample(card: ModelCard, count: int) -> dict[str, NDArray[Any]]:
    """Input of plausible reflectance, only to see that the graph runs."""
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


def _has_input(each: Mapping[str, NDArray[Any]], rows: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Whether there is anything to answer from, for each row asked about."""
    if "patches" in each:
        finite = np.isfinite(each["patches"][rows])
        return np.asarray(finite.reshape(len(finite), -1).all(axis=1))
    finite = np.isfinite(each["values"][rows]).all(axis=2)
    return np.asarray((finite & each["valid"][rows]).any(axis=1))


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


def _wanted(providers: Providers) -> str:
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


# As ONNX Runtime's arena, CUDA, C++, cuBLAS and cuDNN put it.
_OUT_OF_MEMORY = (
    "failed to allocate memory", "smaller than requested bytes", "out of memory", "bad_alloc",
    "bad allocation", "alloc_failed", "allocation_failed",
)  # fmt: skip

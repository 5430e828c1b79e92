"""Workers of a cluster: windows of a pass, computed in a process of Dask.

    service: pass ──pickle, without its models──▶ file in the folder of the run
    worker:  file, window ──▶ pass with the worker's own models ──▶ Stages ──▶ arrays

A worker has one set of sessions for all passes. It loads them from its own settings, so that a pass
names its model, and the worker refuses a pass whose model is not, byte for byte, its own.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distributed import Worker, WorkerPlugin, get_worker

from models.registry import BundleError, load_bundle
from service.errors import ForbiddenReference, PIMCError, UnknownModel
from service.grid import Window
from service.infer.engine import Engine, load_models
from service.infer.model import LoadedModel
from service.read.drivers import keep_needed_drivers
from service.read.geotiff import BlockCache, SourceFile
from service.read.references import check_again
from service.run.passes import Pass, Stages
from service.run.windows import Arrays
from service.settings import Settings, project_version, read_settings

_LOG = logging.getLogger(__name__)
_WORKPLACE = "pimc_workplace"
"""Attribute of Dask's worker that has its `Workplace`."""
_finding = threading.Lock()
_IDLE_SECONDS = 30.0
"""Seconds after which the files of a pass without a window are closed."""


class Refused(Exception):
    """A worker cannot compute windows of a pass, but another worker may.

    Args:
        detail: the reason, with both sides and the worker.
        worker: address of the worker.
        error: error of the run if all workers refuse; None if the run waits for other workers.
    """

    def __init__(self, detail: str, worker: str, error: PIMCError | None = None) -> None:
        super().__init__(detail, worker, error)
        self.detail = detail
        self.worker = worker
        self.error = error


@dataclass(frozen=True, kw_only=True)
class ModelReference:
    """A loaded model, as a pass names it."""

    id: str
    """`name@version`."""
    sha256: str
    """Of the bundle's float32 file."""
    variant: str
    """The loaded variant, such as `int8`."""
    variant_sha256: str
    provider: str
    folder: Path | None
    """The bundle's folder in the service."""

    @classmethod
    def of(cls, model: LoadedModel) -> ModelReference:
        """The reference to a model."""
        files = {variant.name: variant.sha256 for variant in model.card.variants}
        return cls(
            id=model.card.id,
            sha256=model.card.sha256,
            variant=model.variant,
            variant_sha256=files[model.variant],
            provider=model.provider,
            folder=model.folder,
        )

    def same(self, other: ModelReference) -> bool:
        """Whether two processes have the same model: the folder may differ."""
        return str(self) == str(other)

    def __str__(self) -> str:
        return (
            f"{self.id} with sha256 {self.sha256}, as {self.variant} with sha256 "
            f"{self.variant_sha256} on {self.provider}"
        )


@dataclass(frozen=True, kw_only=True)
class PassFile:
    """A pass as workers find it: a pickled file in the shared folder."""

    path: Path
    sha256: str
    """Of the file: a worker unpickles nothing but what the service wrote."""
    state: Path
    """The service's `PIMC_STATE_DIR`, which is the worker's as well."""
    version: str
    """Of the project that the service runs."""


@dataclass(frozen=True, kw_only=True)
class Computed:
    """The result of one window."""

    arrays: Arrays
    worker: str
    """Address of the worker."""
    read: float
    """Seconds of reading."""
    infer: float
    """Seconds of everything after reading."""


def packed(work: Pass) -> bytes:
    """A pass as bytes, with references in the place of its models."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump(work)
    return buffer.getvalue()


def compute(file: PassFile, window: tuple[int, int, int, int]) -> Computed:
    """The task of one window, in a thread of a worker.

    Args:
        file: the pass.
        window: first column and row, width and height.

    Raises:
        Refused: this worker differs from the service.
        Exception: an exception of a stage, unchanged.
    """
    return workplace_of(get_worker()).compute(file, Window(*window))


class ModelsPlugin(WorkerPlugin):  # type: ignore[misc]
    """Loads the models of a worker when it joins, so that its first window does not wait."""

    name = "pimc"
    idempotent = True

    def setup(self, worker: Worker) -> None:
        """Begin to load; called by Dask."""
        workplace_of(worker)


def workplace_of(worker: Worker) -> Workplace:
    """The models of a worker, loaded once however many services and plugins there are."""
    with _finding:
        found: Workplace | None = getattr(worker, _WORKPLACE, None)
        if found is None:
            keep_needed_drivers()
            found = Workplace(worker.address, worker.state.nthreads)
            setattr(worker, _WORKPLACE, found)
        return found


@dataclass(kw_only=True)
class _OpenPass:
    """A pass in a worker, and its files: one set for each thread that has computed a window."""

    work: Pass
    free: list[tuple[ExitStack, Stages]] = field(default_factory=list)
    busy: int = 0
    """Number of windows being computed."""
    used: float = 0.0
    """When the last window ended, by the monotonic clock."""


class Workplace:
    """The models, open passes and settings of a worker. Thread-safe.

    Args:
        address: of the worker.
        threads: number of threads that compute windows.
    """

    def __init__(self, address: str, threads: int) -> None:
        self._address = address
        self._cache = BlockCache()
        self._passes: dict[str, _OpenPass] = {}
        self._own: dict[str, LoadedModel] = {}
        self._lock = threading.Lock()
        # In a thread of its own: the worker's event loop must answer the scheduler meanwhile.
        loader = ThreadPoolExecutor(1, thread_name_prefix="models")
        self._loaded = loader.submit(self._load, threads)
        loader.shutdown(wait=False)
        threading.Thread(target=self._close_idle, name="idle", daemon=True).start()

    @staticmethod
    def _load(threads: int) -> tuple[Settings, Engine]:
        settings = read_settings()
        return settings, load_models(settings, threads=threads)

    def compute(self, file: PassFile, window: Window) -> Computed:
        """Compute a window of a pass.

        Raises:
            Refused: this worker differs from the service.
            Exception: an exception of a stage, unchanged.
        """
        try:
            with self._stages(file) as stages:
                begun = time.perf_counter()
                values = stages.read(window)
                read = time.perf_counter()
                arrays = stages.to_arrays(window, stages.infer(values))
                return Computed(
                    arrays=arrays,
                    worker=self._address,
                    read=read - begun,
                    infer=time.perf_counter() - read,
                )
        except Refused as refused:
            _LOG.error("%s", refused.detail)
            raise
        except Exception:
            _LOG.exception("a window failed")  # the service does not get the cause of the error
            raise

    @contextmanager
    def _stages(self, file: PassFile) -> Iterator[Stages]:
        """Stages of a pass, for one thread; its files stay open for the next window."""
        with self._lock:
            found = self._passes.get(file.sha256)
            if found is None:
                found = self._passes[file.sha256] = _OpenPass(work=self._unpacked(file))
            found.busy += 1
            free = found.free.pop() if found.free else None
        try:
            if free is None:
                files = ExitStack()
                free = files, files.enter_context(found.work.open(self._cache, None))
            yield free[1]
        finally:
            with self._lock:
                found.busy -= 1
                found.used = time.monotonic()
                if free is not None:
                    found.free.append(free)

    def _close_idle(self) -> None:
        """Close the files of passes that have ended, which the service removes."""
        while True:
            time.sleep(_IDLE_SECONDS / 4)
            with self._lock:
                oldest = time.monotonic() - _IDLE_SECONDS
                idle = [k for k, p in self._passes.items() if not p.busy and p.used < oldest]
                closed = [self._passes.pop(key) for key in idle]
            for files in [files for one in closed for files, _ in one.free]:
                try:
                    files.close()
                except Exception:  # noqa: BLE001 - the other passes are closed in any case
                    _LOG.exception("files of a pass cannot be closed")

    def _unpacked(self, file: PassFile) -> Pass:
        """The pass of a file, checked, with this worker's models."""
        try:
            settings, engine = self._loaded.result()
        except Exception as error:
            raise self._refused(f"cannot load its models: {error}") from error
        if file.version != project_version():
            raise self._refused(
                f"has version {project_version()} of this project, and the service has "
                f"{file.version}: start it from the service's image"
            )
        state = settings.state_folder
        if state != file.state:
            raise self._refused(
                f"has PIMC_STATE_DIR={state}, and the service has {file.state}: both must be the "
                "same shared folder, at the same path"
            )
        try:
            content = file.path.read_bytes()
        except OSError as error:
            raise self._refused(
                f"cannot read {file.path} ({error.strerror}), which the service has written: both "
                "must share PIMC_STATE_DIR, with the same user"
            ) from error
        if hashlib.sha256(content).hexdigest() != file.sha256:
            raise self._refused(f"reads other bytes in {file.path} than the service has written")
        work: Pass = _Unpickler(io.BytesIO(content), self, engine, state).load()
        try:
            check_again(
                [SourceFile(name=path.name, path=path) for path in work.paths],
                state,
                settings.allowed_roots,
            )
        except ForbiddenReference as error:
            raise self._refused(
                "does not find a file of the request under its allowed roots "
                f"({', '.join(map(str, settings.allowed_roots)) or 'none'}): its "
                "PIMC_ALLOWED_ROOTS must be that of the service, with the same files",
                error,
            ) from error
        return work

    def model(self, wanted: ModelReference, engine: Engine, state: Path) -> LoadedModel:
        """The worker's model of a reference.

        Raises:
            Refused: the worker has another one, or none.
        """
        name = wanted.id.partition("@")[0]
        found = engine.models.get(name)
        if wanted.folder is not None and wanted.folder.is_relative_to(state):
            found = self._own_model(wanted, wanted.folder, engine)
        if found is None:
            why = engine.refused.get(name, "no bundle has that name")
            raise self._refused(f"does not have model {wanted}, which the service has: {why}")
        own = ModelReference.of(found)
        if not own.same(wanted):
            raise self._refused(
                f"has model {own}, and the service has {wanted}: both need the same bundles "
                "(PIMC_MODEL_DIR), PIMC_PRECISION and kind of processor"
            )
        return found

    def _own_model(self, wanted: ModelReference, folder: Path, engine: Engine) -> LoadedModel:
        """A model that a caller has made; it lies in the shared folder."""
        key = f"{folder} {wanted}"
        if key not in self._own:
            try:
                self._own[key] = engine.load(load_bundle(folder))
            except (BundleError, OSError) as error:
                gone = UnknownModel(f"model '{wanted.id}' was removed while the job ran")
                raise self._refused(f"cannot load model {wanted}: {error}", gone) from error
        return self._own[key]

    def _refused(self, why: str, error: PIMCError | None = None) -> Refused:
        return Refused(f"worker {self._address} {why}", self._address, error)


class _Pickler(pickle.Pickler):
    """Pickles references in the place of models."""

    def persistent_id(self, value: object) -> ModelReference | None:
        """See `pickle`."""
        return ModelReference.of(value) if isinstance(value, LoadedModel) else None


class _Unpickler(pickle.Unpickler):
    """Finds a worker's models in the place of references."""

    def __init__(self, file: io.BytesIO, place: Workplace, engine: Engine, state: Path) -> None:
        super().__init__(file)
        self._place = place
        self._engine = engine
        self._state = state

    def persistent_load(self, reference: Any) -> LoadedModel:  # noqa: ANN401 - see `pickle`
        """See `pickle`."""
        return self._place.model(reference, self._engine, self._state)

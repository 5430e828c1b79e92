"""Workers of a cluster: windows of a pass, computed in a process of Dask.

    service: pass ──pickle, without its models and files──▶ file in the storage of the jobs
    worker:  file, window ──▶ pass with the worker's models and files ──▶ Stages ──▶ arrays

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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distributed import Worker, WorkerPlugin, get_worker

from models.registry import BundleError, load_bundle
from service.errors import ForbiddenReference, Overloaded, PIMCError, UnknownModel
from service.grid import Window
from service.infer.engine import Engine, load_models
from service.infer.model import LoadedModel
from service.read.drivers import keep_needed_drivers
from service.read.geotiff import BlockCache, SourceFile
from service.read.on_demand import OnDemand
from service.read.references import check_again
from service.run.passes import Pass, Stages
from service.run.shared import ReadStorage, Stored, StoredFiles
from service.run.windows import Arrays
from service.settings import Settings, SettingsError, project_version, read_settings
from service.tracing import Attribute, Traces, span

_LOG = logging.getLogger(__name__)
_WORKPLACE = "pimc_workplace"
"""Attribute of Dask's worker that has its `Workplace`."""
_finding = threading.Lock()
_IDLE_SECONDS = 30.0
"""Seconds after which the files of a pass without a window are closed."""
_UNBOUNDED = 2**62


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
    """SHA-256 of the bundle's float32 file."""
    variant: str
    """The loaded variant, such as `int8`."""
    variant_sha256: str
    provider: str
    key: str | None = None
    """Key of the bundle in the storage if a caller has made the model, else None."""

    @classmethod
    def of(cls, model: LoadedModel, key: str | None = None) -> ModelReference:
        """The reference to a model, whose bundle has this key in the storage."""
        files = {variant.name: variant.sha256 for variant in model.card.variants}
        return cls(
            id=model.card.id,
            sha256=model.card.sha256,
            variant=model.variant,
            variant_sha256=files[model.variant],
            provider=model.provider,
            key=key,
        )

    def same(self, other: ModelReference) -> bool:
        """Whether two processes have the same model, wherever its bundle is."""
        return str(self) == str(other)

    def __str__(self) -> str:
        return (
            f"{self.id} with sha256 {self.sha256}, as {self.variant} with sha256 "
            f"{self.variant_sha256} on {self.provider}"
        )


@dataclass(frozen=True, kw_only=True)
class PassFile:
    """A pass as workers find it: a pickled file in the storage that all share."""

    key: str
    sha256: str
    """SHA-256 of the file, so that a worker unpickles only files that the service wrote."""
    storage: str
    """Name of the service's storage, which is the worker's as well."""
    opener: Callable[[Settings], ReadStorage]
    """Opens the worker's storage."""
    version: str
    """Version of the project that the service runs."""


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


def packed(work: Pass, key: Callable[[Path], str | None]) -> bytes:
    """A pass as bytes, with references in the place of its models and of the job's files.

    Args:
        work: the pass.
        key: see `SharedPass.key`.
    """
    buffer = io.BytesIO()
    _Pickler(buffer, key).dump(work)
    return buffer.getvalue()


def compute(
    file: PassFile, window: tuple[int, int, int, int], trace: str | None = None
) -> Computed:
    """The task of one window, in a thread of a worker.

    Args:
        file: the pass.
        window: first column and row, width and height.
        trace: the service's span, as the value of `traceparent`; None does not trace the window.

    Raises:
        Refused: this worker differs from the service.
        Exception: an exception of a stage, unchanged.
    """
    return workplace_of(get_worker()).compute(file, Window(*window), trace)


class ModelsPlugin(WorkerPlugin):  # type: ignore[misc]
    """Loads the models of a worker when it joins, so that its first window does not wait."""

    name = "pimc"
    idempotent = True

    def setup(self, worker: Worker) -> None:
        """Begin to load; called by Dask."""
        workplace_of(worker)

    def teardown(self, worker: Worker) -> None:
        """Send the spans that have ended; called by Dask when the worker closes."""
        workplace_of(worker).flush()


def workplace_of(worker: Worker) -> Workplace:
    """The models of a worker, loaded once however many services and plugins there are."""
    with _finding:
        found: Workplace | None = getattr(worker, _WORKPLACE, None)
        if found is None:
            keep_needed_drivers()
            scratch = Path(worker.local_directory)
            found = Workplace(worker.address, worker.state.nthreads, scratch)
            setattr(worker, _WORKPLACE, found)
        return found


@dataclass(kw_only=True)
class _OpenPass:
    """A pass in a worker, and its files: one set for each thread that has computed a window."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while the pass is read, and its files are copied from a bucket."""
    work: Pass | None = None
    """The pass once it was read."""
    files: StoredFiles | None = None
    free: list[tuple[ExitStack, Stages]] = field(default_factory=list)
    busy: int = 0
    """Number of windows being computed."""
    used: float = 0.0
    """When the last window ended, by the monotonic clock."""


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """Settings, models and files that a worker loads once."""

    settings: Settings
    engine: Engine
    cache: BlockCache
    traces: Traces


class Workplace:
    """The models, open passes and settings of a worker. Thread-safe.

    Args:
        address: of the worker.
        threads: number of threads that compute windows.
        scratch: folder for copies of files; None takes the system's.
    """

    def __init__(self, address: str, threads: int, scratch: Path | None = None) -> None:
        self._address = address
        self._scratch = scratch
        self._storage: ReadStorage | None = None
        self._passes: dict[str, _OpenPass] = {}
        self._own: dict[str, LoadedModel] = {}
        self._lock = threading.Lock()
        # In a thread of its own: the worker's event loop must respond to the scheduler meanwhile.
        loader = ThreadPoolExecutor(1, thread_name_prefix="models")
        self._loading = loader.submit(self._load, threads)
        loader.shutdown(wait=False)
        threading.Thread(target=self._close_idle, name="idle", daemon=True).start()

    def _load(self, threads: int) -> _Loaded:
        settings = read_settings()
        # The service has accepted the job with all its blocks, and nothing here keeps them.
        fetching = settings.model_copy(update={"max_body_bytes": _UNBOUNDED})
        return _Loaded(
            settings=settings,
            engine=load_models(settings, threads=threads),
            cache=BlockCache(remote=OnDemand(fetching, folder=self._scratch)),
            traces=Traces(enabled=settings.tracing, version=project_version()),
        )

    def flush(self) -> None:
        """Send the spans that have ended."""
        if self._loading.done() and self._loading.exception() is None:
            self._loading.result().traces.flush()

    def compute(self, file: PassFile, window: Window, trace: str | None = None) -> Computed:
        """Compute a window of a pass; `trace` is as for `compute`.

        Raises:
            Refused: this worker differs from the service.
            Exception: an exception of a stage, unchanged.
        """
        try:
            with self._traced(window, trace), self._stages(file) as stages:
                begun = time.perf_counter()
                with span("read"):
                    values = stages.read(window)
                read = time.perf_counter()
                with span("infer"):
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

    def _traced(self, window: Window, trace: str | None) -> AbstractContextManager[None]:
        """The span of a window, in the trace of its job."""
        if trace is None:
            return nullcontext()
        attributes: dict[str, Attribute] = {
            "pimc.worker": self._address,
            "pimc.columns": f"{window.col_off}+{window.width}",
            "pimc.rows": f"{window.row_off}+{window.height}",
        }
        return self._here().traces.continued("window", trace, attributes)

    def _here(self) -> _Loaded:
        """The loaded settings, models and files.

        Raises:
            Refused: it cannot be loaded.
        """
        try:
            return self._loading.result()
        except Exception as error:
            raise self._refused(f"cannot load its models: {error}") from error

    @contextmanager
    def _stages(self, file: PassFile) -> Iterator[Stages]:
        """Stages of a pass, for one thread; its files stay open for the next window."""
        here = self._here()
        with self._lock:
            found = self._passes.setdefault(file.sha256, _OpenPass())
            found.busy += 1
        free = None
        try:
            with found.lock:
                if found.work is None:
                    found.work = self._unpacked(file, found, here)
            with self._lock:
                free = found.free.pop() if found.free else None
            if free is None:
                files = ExitStack()
                try:
                    stages = files.enter_context(found.work.open(here.cache, None))
                except ForbiddenReference as error:
                    hosts = ", ".join(map(str, here.settings.allowed_hosts)) or "none"
                    raise self._refused(
                        "is not allowed to read from a host of the request, but only from "
                        f"{hosts}: its PIMC_ALLOWED_HOSTS must be that of the service",
                        error,
                    ) from error
                free = files, stages
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
            for one in closed:
                for files, _ in one.free:
                    try:
                        files.close()
                    except Exception:  # noqa: BLE001 - the other passes are closed in any case
                        _LOG.exception("files of a pass cannot be closed")
                if one.files is not None:
                    one.files.close()

    def _unpacked(self, file: PassFile, into: _OpenPass, here: _Loaded) -> Pass:
        """The pass of a file, checked, with this worker's models and the job's files."""
        settings = here.settings
        if file.version != project_version():
            raise self._refused(
                f"has version {project_version()} of this project, and the service has "
                f"{file.version}: start it from the service's image"
            )
        storage = self._storage_of(file, settings)
        try:
            content = storage.read(file.key)
        except (OSError, Overloaded) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise self._refused(
                f"cannot read {file.key} in {storage.name} ({reason}), which the service has "
                "written: both must share PIMC_STATE_DIR, with the same user, or PIMC_STORAGE_URL"
            ) from error
        if hashlib.sha256(content).hexdigest() != file.sha256:
            raise self._refused(
                f"reads other bytes in {file.key} in {storage.name} than the service has written: "
                "both must share PIMC_STATE_DIR or PIMC_STORAGE_URL"
            )
        if into.files is None:
            into.files = StoredFiles(storage, settings.state_folder, self._scratch)
        files = into.files
        try:
            work: Pass = _Unpickler(io.BytesIO(content), self, here.engine, files).load()
            files.bring(work.paths)
        except Overloaded as error:
            raise self._refused(f"cannot read the job's files: {error}") from error
        try:
            check_again(
                [SourceFile(name=path.name, path=path) for path in work.paths],
                files.root,
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

    def _storage_of(self, file: PassFile, settings: Settings) -> ReadStorage:
        """The worker's storage, which must be that of the service."""
        with self._lock:
            if self._storage is None:
                try:
                    self._storage = file.opener(settings)
                except SettingsError as error:
                    raise self._refused(f"cannot open its storage: {error}") from error
            storage = self._storage
        if storage.name != file.storage:
            raise self._refused(
                f"has the files of jobs in {storage.name}, and the service in {file.storage}: "
                "both need the same PIMC_STATE_DIR, a shared folder at the same path, or the same "
                "PIMC_STORAGE_URL"
            )
        return storage

    def model(self, wanted: ModelReference, engine: Engine, files: StoredFiles) -> LoadedModel:
        """The worker's model of a reference.

        Raises:
            Refused: the worker has another one, or none.
        """
        name = wanted.id.partition("@")[0]
        found = engine.models.get(name)
        if wanted.key is not None:
            found = self._own_model(wanted, files.path(wanted.key), engine, files)
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

    def _own_model(
        self, wanted: ModelReference, folder: Path, engine: Engine, files: StoredFiles
    ) -> LoadedModel:
        """A model that a caller has made; its bundle is in the storage."""
        key = str(wanted)
        if key not in self._own:
            files.bring([folder])
            try:
                self._own[key] = engine.load(load_bundle(folder))
            except (BundleError, OSError) as error:
                gone = UnknownModel(f"model '{wanted.id}' was removed while the job ran")
                raise self._refused(f"cannot load model {wanted}: {error}", gone) from error
        return self._own[key]

    def _refused(self, why: str, error: PIMCError | None = None) -> Refused:
        return Refused(f"worker {self._address} {why}", self._address, error)


class _Pickler(pickle.Pickler):
    """Pickles references in the place of models and of the job's files."""

    def __init__(self, file: io.BytesIO, key: Callable[[Path], str | None]) -> None:
        super().__init__(file, protocol=5)
        self._key = key

    def persistent_id(self, value: object) -> ModelReference | Stored | None:
        """See `pickle`."""
        if isinstance(value, LoadedModel):
            folder = value.folder
            return ModelReference.of(value, None if folder is None else self._key(folder))
        if isinstance(value, Path):
            key = self._key(value)
            return None if key is None else Stored(key)
        return None


class _Unpickler(pickle.Unpickler):
    """Finds a worker's models and files in the place of references."""

    def __init__(
        self, file: io.BytesIO, place: Workplace, engine: Engine, files: StoredFiles
    ) -> None:
        super().__init__(file)
        self._place = place
        self._engine = engine
        self._files = files

    def persistent_load(self, reference: Any) -> LoadedModel | Path:  # noqa: ANN401 - see `pickle`
        """See `pickle`."""
        if isinstance(reference, Stored):
            return self._files.path(reference.key)
        return self._place.model(reference, self._engine, self._files)

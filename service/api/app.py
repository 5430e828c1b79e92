"""Application factory: settings in, ASGI application out."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from anyio import to_thread
from fastapi import FastAPI
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from models.registry import ZOO
from service.api.admission import Admission
from service.api.auth import ApiKeys, Refusals
from service.api.dependencies import AppState, SharedText
from service.api.middleware import (
    HeadMiddleware,
    LingeringCloseMiddleware,
    RateLimitMiddleware,
    RequestRecordMiddleware,
    RootPathMiddleware,
    SecurityHeadersMiddleware,
    SlowClientMiddleware,
)
from service.api.openapi import DESCRIPTION, DocumentedApp
from service.api.problems import add_handlers, fault
from service.api.quotas import Allowances, Quotas
from service.api.routes import heads as head_routes
from service.api.routes import health, home, models, processes, series, tasks, validate
from service.api.routes import jobs as job_routes
from service.api.scratch import Scratch
from service.api.sending import Downloads
from service.errors import PIMCError
from service.infer.engine import load_models
from service.jobs.callbacks import CallbackSender
from service.jobs.database import database_of
from service.jobs.heads import HeadStore
from service.jobs.runner import JobRunner
from service.jobs.s3 import storage_for
from service.jobs.shared import SharedJobFiles
from service.jobs.store import JobStore
from service.read.connect import RangeCache, Remotes
from service.read.geotiff import BlockCache
from service.read.on_demand import RANGE_CACHE_BYTES, OnDemand
from service.run.executors import ThreadExecutor
from service.run.memory import MemoryBudget
from service.settings import Settings, SettingsError, project_version, read_settings
from service.telemetry import Metrics
from service.tracing import Traces

if TYPE_CHECKING:
    from service.run.cluster import ClusterExecutor

_LOG = logging.getLogger(__name__)
_ROUTERS = (
    tasks.router,
    series.router,
    validate.router,
    job_routes.router,
    processes.router,
    models.router,
    head_routes.router,
    health.router,
    home.router,
)


def create_app(
    settings: Settings | None = None,
    jobs: JobStore | None = None,
    *,
    built_in: Path | None = ZOO,
) -> FastAPI:
    """Create the service as an ASGI application; its lifespan loads the models.

    Args:
        settings: the settings; None reads them from the environment.
        jobs: store of the state directory, which the lifespan closes; None lets the lifespan open
            it.
        built_in: folder of the bundles that are served beside those of `settings.model_dir`; None
            serves those of `settings.model_dir` alone.

    Raises:
        SettingsError: the environment holds invalid settings.
    """
    settings = settings or read_settings()
    metrics = Metrics(per_key=settings.private and settings.needs_key)
    metrics.build(project_version())
    metrics.watch_disk(state=settings.state_folder, scratch=Path(tempfile.gettempdir()))
    traces = Traces(enabled=settings.tracing, version=project_version())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(to_thread.run_sync, traces.close)
            store = await to_thread.run_sync(open_jobs, settings) if jobs is None else jobs
            stack.push_async_callback(to_thread.run_sync, store.close)
            # The port opens only once every bundle is loaded and warm, or rejected.
            engine = await to_thread.run_sync(
                partial(load_models, settings, built_in=built_in, observe=metrics.batch)
            )
            stack.push_async_callback(to_thread.run_sync, engine.close)
            metrics.provider(engine.provider)
            heads = await to_thread.run_sync(
                partial(
                    HeadStore,
                    settings.state_folder,
                    engine,
                    most=settings.max_heads,
                    jobs=store if store.shared else None,
                )
            )
            keys = await to_thread.run_sync(_load_keys, settings, store, heads)
            metrics.watch_keys(keys.valid)
            scratch = await to_thread.run_sync(Scratch)
            stack.push_async_callback(to_thread.run_sync, scratch.close)
            closing = threading.Event()
            ranges = RangeCache(RANGE_CACHE_BYTES, looked_up=metrics.range_looked_up)
            on_demand = OnDemand(
                settings, folder=scratch.folder, cache=ranges, received=metrics.fetched
            )
            stack.push_async_callback(to_thread.run_sync, on_demand.close)
            cache = BlockCache(decoded=metrics.decoded, remote=on_demand)
            metrics.watch_cache(lambda: cache.size, lambda: ranges.size)
            budget = MemoryBudget(settings.memory_budget)
            metrics.watch_memory(
                limit=budget.limit,
                taken=lambda: budget.taken,
                awaited=lambda: budget.awaited,
            )
            executor = ThreadExecutor(in_flight=metrics.windows)
            callbacks = CallbackSender(
                store.outbox,
                settings,
                document=partial(
                    job_routes.callback_body,
                    jobs=store,
                    root_path=(settings.root_path or "").rstrip("/"),
                ),
                metrics=metrics,
                closing=closing,
            )
            on_cluster = await to_thread.run_sync(
                _on_cluster, settings, store, executor, metrics, closing
            )
            runner = JobRunner(
                store,
                engine,
                metrics,
                max_raster_bytes=settings.max_raster_bytes,
                max_fields=settings.max_fields,
                roots=settings.allowed_roots,
                workers=settings.job_workers,
                turn_seconds=settings.job_turn_seconds,
                ttl=settings.job_ttl,
                closing=closing,
                cache=cache,
                budget=budget,
                executor=executor if on_cluster is None else on_cluster,
                callbacks=callbacks,
                refresh=heads.refresh,
                traces=traces,
                loops={} if on_cluster is None else {"cluster": on_cluster.cluster.run},
            )
            allowances = Allowances(settings, keys)
            admission = Admission(
                settings.max_concurrency,
                upload_rate=settings.upload_rate,
                spool_bytes=settings.spool_bytes,
                memory_bytes=budget.document_bytes,
                most_requests=allowances.requests,
                given_up=metrics.upload_given_up,
            )
            metrics.watch_admission(
                run_slots=settings.max_concurrency,
                held=lambda: admission.runs.held,
                awaited=lambda: admission.runs.awaited,
                uploads=lambda: admission.uploads,
                spooled=lambda: admission.spooled,
                parsed=lambda: admission.parsed,
            )
            await to_thread.run_sync(runner.start)
            stack.push_async_callback(to_thread.run_sync, runner.join)
            stack.callback(closing.set)
            app.state.pimc = AppState(
                settings=settings,
                engine=engine,
                admission=admission,
                downloads=Downloads(
                    most=settings.max_downloads,
                    most_per_caller=settings.max_downloads_per_caller,
                    changed=metrics.downloads,
                    rejected=metrics.download_rejected,
                ),
                quotas=Quotas(allowances, store.usage, admission),
                metrics=metrics,
                scrapes=SharedText(metrics.text),
                keys=keys,
                refusals=Refusals(metrics.key_refused),
                jobs=store,
                heads=heads,
                cache=cache,
                budget=budget,
                executor=executor,
                remotes=Remotes(cache=ranges, received=metrics.fetched),
                cluster=None if on_cluster is None else on_cluster.cluster.state,
                scratch=scratch,
                runner=runner,
                closing=closing,
            )
            yield

    app = DocumentedApp(
        title="PIMC",
        version=project_version(),
        description=DESCRIPTION,
        lifespan=lifespan,
        openapi_url=None,  # `routes.home` serves it, and PIMC_PRIVATE can close it
        docs_url=None,  # `routes.home` serves the page with its own Content-Security-Policy
        redoc_url=None,
        # A redirect from `/jobs/` to `/jobs` would repeat the host that the request names.
        redirect_slashes=False,
    )
    app.state.metrics = metrics
    for router in _ROUTERS:
        app.include_router(router)
    add_handlers(app)
    # Middleware that is added later wraps the earlier ones. The request record responds to
    # unexpected errors, and its response needs the security headers too; the checks of slow clients
    # concern the socket only.
    app.add_middleware(HeadMiddleware)
    app.add_middleware(RateLimitMiddleware, exceeded=metrics.quota_exceeded)
    app.add_middleware(RequestRecordMiddleware, metrics=metrics, on_fault=fault, traces=traces)
    app.add_middleware(SecurityHeadersMiddleware)
    app.add_middleware(SlowClientMiddleware, stall_seconds=settings.send_seconds)
    app.add_middleware(LingeringCloseMiddleware)
    if settings.root_path:
        _check_root_path(settings.root_path)
        app.add_middleware(RootPathMiddleware, root_path=settings.root_path)
    if settings.trusted_proxies:
        app.add_middleware(
            ProxyHeadersMiddleware, trusted_hosts=[str(one) for one in settings.trusted_proxies]
        )
    return app


def _check_root_path(root_path: str) -> None:
    """Check that the root path is not the beginning of a path of the service.

    Raises:
        SettingsError: the root path is ambiguous.
    """
    paths = [getattr(route, "path", "") for router in _ROUTERS for route in router.routes]
    if any(f"{path}/".startswith(f"{root_path}/") for path in paths):
        raise SettingsError(
            f"PIMC_ROOT_PATH: {root_path} is the beginning of a path of the service itself; choose "
            "another prefix"
        )


def open_jobs(settings: Settings) -> JobStore:
    """Open and lock the state directory, and open the storage.

    Raises:
        SettingsError: one of them is not usable, or another service uses it.
    """
    return JobStore(
        settings.state_folder,
        ttl=settings.job_ttl,
        max_waiting=settings.max_jobs,
        database_url=database_of(settings),
        storage=storage_for(settings),
    )


def _on_cluster(
    settings: Settings,
    store: JobStore,
    here: ThreadExecutor,
    metrics: Metrics,
    closing: threading.Event,
) -> ClusterExecutor | None:
    """The executor of jobs on a cluster; None without `PIMC_DASK_SCHEDULER`.

    Raises:
        SettingsError: the packages of clusters are not installed.
    """
    if settings.dask_scheduler is None:
        return None
    try:
        from service.run.cluster import Cluster, ClusterExecutor
    except ImportError as error:
        raise SettingsError(
            f"PIMC_DASK_SCHEDULER needs packages that are not installed ({error}): pip install "
            "--editable '.[service,cluster]'"
        ) from error
    cluster = Cluster(settings.dask_scheduler, closing)
    metrics.watch_cluster(
        workers=lambda: cluster.state().workers,
        threads=lambda: cluster.state().threads,
        refused=lambda: len(cluster.state().refused),
    )
    return ClusterExecutor(
        cluster=cluster,
        files=SharedJobFiles(state=settings.state_folder, storage=store.storage),
        window_seconds=settings.dask_window_seconds,
        here=here,
        in_flight=metrics.windows,
        counted=metrics.cluster_window,
    )


def _load_keys(settings: Settings, store: JobStore, heads: HeadStore) -> ApiKeys:
    """Load the API keys; if a key gains a name in the file, its jobs and models move to the name.

    Raises:
        SettingsError: the key file cannot be used.
    """

    def adopt(names: Mapping[str, str]) -> None:
        store.adopt(names)
        heads.adopt(names)

    keys = ApiKeys(
        (key.get_secret_value() for key in settings.api_keys),
        file=settings.api_keys_file,
        adopt=adopt,
    )
    try:
        keys.load()
    except (ValueError, PIMCError, OSError) as error:
        raise SettingsError(
            f"PIMC_API_KEYS_FILE: {settings.api_keys_file} cannot be used: {error}"
        ) from error
    return keys

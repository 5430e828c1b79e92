"""Application state and per-request resources, as FastAPI dependencies."""

# No `from __future__ import annotations` here: FastAPI and pydantic need the types at run time.
import asyncio
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import anyio
from anyio import to_thread
from fastapi import Depends, Header, Request, Security
from fastapi.security import APIKeyHeader, HTTPBearer

from service.api.admission import PATIENCE, Admission
from service.api.auth import (
    ApiKeys,
    Refusals,
    address_of,
    check_reached_address,
    given_key,
    share_of,
)
from service.api.negotiation import ASYNC, UPGRADE, prefers
from service.api.quotas import Quotas, Rate
from service.api.scratch import Scratch
from service.api.sending import READERS, Downloads
from service.api.uploads import Limits
from service.errors import Overloaded, Unauthorized
from service.infer.engine import Engine
from service.jobs.heads import HeadStore
from service.jobs.runner import JobRunner
from service.jobs.storage import StorageUnreachable
from service.jobs.store import JobStore
from service.read.connect import Remotes
from service.read.geotiff import BlockCache
from service.run.executors import ClusterState, ThreadExecutor
from service.run.memory import MemoryBudget, Need
from service.settings import Settings
from service.telemetry import Metrics


class SharedText:
    """A text that is made for each request, up to a rate.

    Making it takes the event loop, and anyone may request it. Beyond the rate (a burst, then one
    text per interval), requests wait and share the next text. It is made after the last of them
    arrived, so that no response is out of date.

    Args:
        make: makes the text.
        interval: seconds between two texts, beyond the burst.
        burst: number of texts that may follow each other at once.
    """

    def __init__(
        self, make: Callable[[], bytes], *, interval: float = 0.1, burst: int = 20
    ) -> None:
        self._make = make
        self._interval = interval
        self._rate = Rate(burst * interval)
        self._next: asyncio.Task[bytes] | None = None

    async def latest(self) -> bytes:
        """The text as of now or later."""
        if self._next is None:
            seconds = self._rate.wait(self._interval, asyncio.get_running_loop().time())
            if seconds == 0.0:
                return self._make()
            self._next = asyncio.create_task(self._later(seconds))
        # A client that leaves does not cancel the text of the others.
        return await asyncio.shield(self._next)

    async def _later(self, seconds: float) -> bytes:
        await asyncio.sleep(seconds)
        self._next = None
        return self._make()


@dataclass(frozen=True, kw_only=True)
class AppState:
    """Application state, created by the lifespan as `app.state.pimc`."""

    settings: Settings
    engine: Engine
    admission: Admission
    downloads: Downloads
    quotas: Quotas
    metrics: Metrics
    scrapes: SharedText
    """The metrics as text."""
    keys: ApiKeys
    refusals: Refusals
    jobs: JobStore
    heads: HeadStore
    cache: BlockCache
    budget: MemoryBudget
    executor: ThreadExecutor
    """Runs synchronous requests."""
    cluster: Callable[[], ClusterState] | None
    """Returns the state of the cluster that runs jobs; None without one."""
    remotes: Remotes
    """State that requests which read from other hosts share."""
    scratch: Scratch
    """Temporary files of synchronous requests."""
    runner: JobRunner
    closing: threading.Event
    """Set when the service begins to stop; new requests are rejected from then on."""

    def reserve(self, need: Need) -> AbstractContextManager[None]:
        """Reserve memory while a file is made from a result."""
        return self.budget.take(need, patience=PATIENCE)

    @property
    def limits(self) -> Limits:
        """Limits of a request body."""
        return Limits(
            body_bytes=self.settings.max_body_bytes,
            seconds=self.settings.upload_seconds,
            rate=self.settings.upload_rate,
        )


async def app_state(request: Request) -> AppState:
    """The application state."""
    state = request.app.state.pimc
    if not isinstance(state, AppState):
        raise TypeError("app.state.pimc is not set: the application's lifespan has not started")
    return state


def root_of(request: Request) -> str:
    """The path prefix that a proxy adds to the service's paths; empty without one."""
    return str(request.scope.get("root_path", "")).rstrip("/")


async def own_folder(
    request: Request, app: Annotated[AppState, Depends(app_state)]
) -> AsyncIterator[Path]:
    """A folder for the request's files, which exists until the response is sent or has failed.

    If the client prefers a job, the folder is in the state directory, so that the job's files can
    be moved. Replicas copy them: a directory that they share cannot show which requests ended with
    a replica.
    """
    becomes_a_job = prefers(request.headers.getlist("prefer"))
    async for folder in _folder(app, (becomes_a_job and app.jobs.requests) or app.scratch.folder):
        yield folder


async def job_folder(app: Annotated[AppState, Depends(app_state)]) -> AsyncIterator[Path]:
    """As `own_folder`, in the state directory: only the body states whether a job is made."""
    async for folder in _folder(app, app.jobs.requests or app.scratch.folder):
        yield folder


async def _folder(app: AppState, parent: Path) -> AsyncIterator[Path]:
    """A temporary folder in `parent`."""
    intake = app.admission.intake
    make = partial(tempfile.mkdtemp, prefix="request-", dir=parent)
    folder = Path(await to_thread.run_sync(make, limiter=intake))
    try:
        yield folder
    finally:
        # Shielded, so that a cancelled request leaves no file.
        with anyio.CancelScope(shield=True):
            remove = partial(shutil.rmtree, folder, ignore_errors=True)
            await to_thread.run_sync(remove, limiter=intake)


# These two check nothing: they make Swagger UI prompt for a key and send it.
_BEARER = HTTPBearer(
    auto_error=False, description="an API key of the server; required if the server has keys"
)
_API_KEY = APIKeyHeader(name="X-API-Key", auto_error=False)


async def known_caller(
    request: Request,
    app: Annotated[AppState, Depends(app_state)],
    _bearer: Annotated[object, Security(_BEARER)],
    _key: Annotated[object, Security(_API_KEY)],
) -> str | None:
    """Check the API key, if keys are set.

    Returns:
        The caller's id, stable for a key; None if no keys are set.

    Raises:
        Unauthorized: the key is missing, wrong or expired.
    """
    check_reached_address(request.scope, app.settings)
    await app.keys.refresh()
    try:
        request.state.caller = app.keys.check(request.headers)
    except Unauthorized:
        if given_key(request.headers):
            await app.refusals.refused(address_of(request.scope))
        raise
    if app.heads.shared:
        try:
            await to_thread.run_sync(app.heads.refresh, request.state.caller or "")
        except StorageUnreachable:
            raise  # the caller has a model that is not here yet
        except Overloaded:
            pass  # without the database, the models already loaded are served
    return request.state.caller  # type: ignore[no-any-return]


async def known_if_private(request: Request, app: Annotated[AppState, Depends(app_state)]) -> None:
    """Check the API key of a path that needs one only with `PIMC_PRIVATE`.

    Raises:
        Unauthorized: `PIMC_PRIVATE` is set, and the key is missing, wrong or expired.
    """
    if app.settings.private:
        await known_caller(request, app, None, None)


@dataclass(frozen=True, kw_only=True)
class RequestPreferences:
    """Preferences in a task's headers, other than the response type."""

    respond_async: bool
    """Whether the client prefers a job."""
    upgrade: bool
    """Whether a later version of the model may run the job."""
    idempotency_key: str | None
    """Value of `Idempotency-Key`; None without the header."""

    @property
    def of_a_job(self) -> str:
        """The preferences that a job follows, as the value of `Preference-Applied`."""
        applied = {ASYNC: self.respond_async, UPGRADE: self.upgrade}
        return ", ".join(name for name, is_applied in applied.items() if is_applied)


async def request_preferences(
    request: Request,
    prefer: Annotated[
        str | None,
        Header(
            description="`respond-async`: return 202 and a job at once; `model-upgrade`: a later "
            "version of the model may run the job"
        ),
    ] = None,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=255,
            pattern=r"^[!-~]+$",
            description="a repeat with the same key returns the first request's job",
        ),
    ] = None,
) -> RequestPreferences:
    """Parse the preferences; `Prefer` may be repeated."""
    del prefer  # a parameter for the OpenAPI document only
    preferred = request.headers.getlist("prefer")
    return RequestPreferences(
        respond_async=prefers(preferred, ASYNC),
        upgrade=prefers(preferred, UPGRADE),
        idempotency_key=idempotency_key,
    )


App = Annotated[AppState, Depends(app_state)]
Folder = Annotated[Path, Depends(own_folder)]
JobFolder = Annotated[Path, Depends(job_folder)]
Preferences = Annotated[RequestPreferences, Depends(request_preferences)]
KNOWN_CALLER = Depends(known_caller)
KNOWN_IF_PRIVATE = Depends(known_if_private)
Caller = Annotated[str | None, Depends(known_caller)]
"""The caller's id, None if no keys are set. Checked once per request."""


async def reader(request: Request, app: App, caller: Caller) -> AsyncIterator[None]:
    """Count the request as a download until the response is sent or has failed.

    Raises:
        Overloaded: the caller, or all callers together, have too many downloads.
    """
    with app.downloads.slot(share_of(caller, request.scope)):
        request.scope[READERS] = app.downloads.readers
        yield


READER = Depends(reader)

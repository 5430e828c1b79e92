"""Client disconnects: a run is cancelled once its client has disconnected."""

from __future__ import annotations

import asyncio
import threading
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Protocol, TypeVar

import anyio
from anyio import to_thread
from starlette.requests import Request

from service.errors import Cancelled

Result_co = TypeVar("Result_co", covariant=True)
Result = TypeVar("Result")


class Run(Protocol[Result_co]):
    """Work that can be cancelled."""

    def __call__(self, *, cancelled: threading.Event) -> Result_co:
        """Do it; stop soon once `cancelled` is set."""
        ...


async def run_watched(
    request: Request, run: Run[Result], *, slot: AbstractAsyncContextManager[None]
) -> Result:
    """Wait for a run slot, then run in a thread for as long as the client stays connected.

    Args:
        request: its body must have been read to the end.
        run: called with `cancelled`, an event that is set once the client has disconnected.
        slot: entered before the run, left after it.

    Raises:
        Cancelled: the client disconnected before the run began, or the run stopped for it.
    """
    gone = threading.Event()
    waiting = anyio.CancelScope()
    watcher = asyncio.create_task(_once_gone(request, gone, waiting))
    try:
        async with AsyncExitStack() as held:
            with waiting:
                await held.enter_async_context(slot)
            if gone.is_set():
                raise Cancelled("the client disconnected before the run began")
            return await to_thread.run_sync(lambda: run(cancelled=gone))
    finally:
        # Also if this task was cancelled, as at a shutdown.
        gone.set()
        watcher.cancel()


async def _once_gone(request: Request, gone: threading.Event, waiting: anyio.CancelScope) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    gone.set()
    waiting.cancel()

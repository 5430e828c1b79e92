"""The two ways of losing a caller: one who leaves, one who stops reading."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Protocol, TypeVar

import anyio
from anyio import to_thread
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.executors import Cancelled

Result_co = TypeVar("Result_co", covariant=True)
Result = TypeVar("Result")

STALL_SECONDS = 60.0
"""How long an answer may make no headway at all."""
SLOWEST_BYTES = 16 * 2**10
"""Bytes a second of an answer that a caller must take on average, beyond those seconds."""


class Run(Protocol[Result_co]):
    """Work that can be told to stop."""

    def __call__(self, *, cancelled: threading.Event) -> Result_co:
        """Do it; stop soon once `cancelled` is set."""
        ...


async def run_watched(
    request: Request, run: Run[Result], *, place: AbstractAsyncContextManager[None]
) -> Result:
    """Wait for a place and run in a thread, for as long as somebody waits for it.

    Args:
        request: its body must have been read to the end.
        run: called with `cancelled`, an event that is set once nobody waits any more.
        place: entered before the run, left after it.

    Raises:
        Cancelled: the caller left before the run began, or the run stopped for it.
    """
    gone = threading.Event()
    waiting = anyio.CancelScope()
    watcher = asyncio.create_task(_once_gone(request, gone, waiting))
    try:
        async with AsyncExitStack() as held:
            with waiting:
                await held.enter_async_context(place)
            if gone.is_set():
                raise Cancelled("the caller left before the run began")
            return await to_thread.run_sync(lambda: run(cancelled=gone))
    finally:
        # Also where this task was cancelled, as at a shutdown: then nobody waits either.
        gone.set()
        watcher.cancel()


async def _once_gone(request: Request, gone: threading.Event, waiting: anyio.CancelScope) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    gone.set()
    waiting.cancel()


class ReadersPace:
    """ASGI middleware: gives an answer up once its caller takes nothing of it, or too little.

    Else a caller who never reads would keep the answer's files for as long as the socket stays
    open, and many of them would fill the disk.

    Args:
        app: the ring inside.
        stall_seconds: how long an answer may make no headway.
        slowest: bytes a second that must be taken on average, beyond `stall_seconds`.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        stall_seconds: float = STALL_SECONDS,
        slowest: float = SLOWEST_BYTES,
    ) -> None:
        self._app = app
        self._stall_seconds = stall_seconds
        self._slowest = slowest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the call on, with an eye on the pace of its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun: float | None = None
        sent = 0
        # Cancelled from inside, so that everything opened for the answer is closed on the way out;
        # the server then finds it unfinished and closes the connection.
        answering = anyio.CancelScope()

        async def send_in_time(message: Message) -> None:
            nonlocal begun, sent
            begun = begun or time.monotonic()
            left = begun + self._stall_seconds + sent / self._slowest - time.monotonic()
            with anyio.move_on_after(min(left, self._stall_seconds)) as taking:
                await send(message)
                sent += len(message.get("body", b""))
            if taking.cancelled_caught:
                answering.cancel()
                await anyio.lowlevel.checkpoint()

        with answering:
            await self._app(scope, receive, send_in_time)

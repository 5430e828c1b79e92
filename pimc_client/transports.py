"""How requests reach the service: retries, body pieces, the way through a proxy.

The only module that imports httpx when it is imported; `client` loads it with the first client,
so that `import pimc_client` stays quick.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx

from pimc_client.bodies import Body
from pimc_client.calls import Request
from pimc_client.errors import ConnectionFailed, TimedOut, TransportError
from pimc_client.retry import RETRIED_STATUS, RetryPolicy, seconds_to_wait

BROKEN = (httpx.NetworkError, httpx.ConnectTimeout, httpx.RemoteProtocolError)
"""What is retried: no connection, or one that broke off. Not a service that is slow to answer:
it is at work, and a second request would double the work."""

_REPEATABLE = "pimc_client.repeatable"
_CONNECT_SECONDS = 10.0


class RetryTransport(httpx.BaseTransport):
    """Sends a request again after a broken connection or a 503, where its body can be repeated.

    Args:
        transport: what sends.
        policy: how often and after how long.
        sleep: what waits.
    """

    def __init__(
        self,
        transport: httpx.BaseTransport,
        policy: RetryPolicy | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._transport = transport
        self._policy = policy or RetryPolicy()
        self._sleep = sleep

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send, and send again."""
        tries, repeatable = 0, _repeatable(request)
        while True:
            tries += 1
            try:
                response = self._transport.handle_request(request)
            except BROKEN:
                pause = self._policy.pause(tries) if repeatable else None
                if pause is None:
                    raise
            else:
                pause = _pause(self._policy, tries, response) if repeatable else None
                if pause is None:
                    return response
                response.close()
            self._sleep(pause)

    def close(self) -> None:
        """Close the transport beneath."""
        self._transport.close()


class AsyncRetryTransport(httpx.AsyncBaseTransport):
    """`RetryTransport`, awaited."""

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport,
        policy: RetryPolicy | None = None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._transport = transport
        self._policy = policy or RetryPolicy()
        self._sleep = sleep

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send, and send again."""
        tries, repeatable = 0, _repeatable(request)
        while True:
            tries += 1
            try:
                response = await self._transport.handle_async_request(request)
            except BROKEN:
                pause = self._policy.pause(tries) if repeatable else None
                if pause is None:
                    raise
            else:
                pause = _pause(self._policy, tries, response) if repeatable else None
                if pause is None:
                    return response
                await response.aclose()
            await self._sleep(pause)

    async def aclose(self) -> None:
        """Close the transport beneath."""
        await self._transport.aclose()


def _repeatable(request: httpx.Request) -> bool:
    # Of a request that was not built here, only bytes in memory surely repeat.
    in_memory = isinstance(request.stream, httpx.ByteStream)
    return bool(request.extensions.get(_REPEATABLE, in_memory))


def _pause(policy: RetryPolicy, tries: int, response: httpx.Response) -> float | None:
    """Seconds until the next try, None where the response is the last."""
    if response.status_code != RETRIED_STATUS:
        return None
    return policy.pause(tries, seconds_to_wait(response.headers.get("retry-after")))


class AsyncBody:
    """A body whose files are read by a thread, so that the event loop goes on.

    Iterating twice gives the same bytes twice.
    """

    def __init__(self, body: Body) -> None:
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        sent = 0
        pieces = self._body.pieces()
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece
            sent += len(piece)
            self._body.report(sent)


def extensions(request: Request) -> dict[str, bool]:
    """What the retry must know of a request, in httpx's terms."""
    return {_REPEATABLE: request.repeatable()}


def proxy_for(url: str) -> str | None:
    """The proxy that the environment names for a URL.

    httpx would look for it itself, but not where it is given a transport.
    """
    parts = urlsplit(url)
    if proxy_bypass(parts.hostname or ""):
        return None
    proxies = getproxies()
    return proxies.get(parts.scheme) or proxies.get("all")


def timeouts(seconds: float | httpx.Timeout | None) -> httpx.Timeout:
    """Patient with a service at work, impatient with one that is not there."""
    if isinstance(seconds, httpx.Timeout):
        return seconds
    return httpx.Timeout(seconds, connect=_CONNECT_SECONDS, pool=None)


@contextmanager
def our_errors(base_url: str) -> Iterator[None]:
    """Raise httpx's errors as ours.

    Raises:
        TimedOut: the service was silent for too long.
        ConnectionFailed: it was not reached, or the connection broke off.
    """
    try:
        yield
    except httpx.TimeoutException as error:
        raise TimedOut(f"{base_url} did not answer in time ({_named(error)})") from error
    except httpx.TransportError as error:
        raise ConnectionFailed(f"{base_url} cannot be reached ({_named(error)})") from error
    except httpx.HTTPError as error:
        raise TransportError(f"{base_url}: {_named(error)}") from error


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__

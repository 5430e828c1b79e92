"""Retries as an httpx transport: broken connections and responses 429 and 503."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import httpx

from pimc_client.http import is_broken, is_repeatable, pause_before_retry
from pimc_client.retry import RetryPolicy


class AsyncRetryTransport(httpx.AsyncBaseTransport):
    """Sends a request again after a broken connection, a 429 or a 503, if its body can be repeated.

    Args:
        transport: the transport that sends.
        policy: how often and after how long.
        sleep: the function that waits, given seconds.
    """

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
        """Send the request, and send it again as the policy allows."""
        tries, repeatable = 0, is_repeatable(request)
        while True:
            tries += 1
            try:
                response = await self._transport.handle_async_request(request)
            except httpx.TransportError as error:
                again = repeatable and is_broken(error)
                pause = pause_before_retry(self._policy, tries, None) if again else None
                if pause is None:
                    raise
            else:
                pause = pause_before_retry(self._policy, tries, response) if repeatable else None
                if pause is None:
                    return response
                await response.aclose()
            await self._sleep(pause)

    async def aclose(self) -> None:
        """Close the transport that sends."""
        await self._transport.aclose()

"""httpx helpers that both transports and both clients share: errors, time limits, proxy.

Only this module and the two transport modules import httpx. They are imported when the first client
is created, so that `import pimc_client` is quick.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx

from pimc_client.errors import ConnectionFailed, TimedOut, TransportError
from pimc_client.requests import Request
from pimc_client.retry import RETRIED, RetryPolicy, seconds_to_wait

_BROKEN = (httpx.NetworkError, httpx.ConnectTimeout, httpx.RemoteProtocolError)
# A proxy that refuses, such as 407 without a password, refuses again.
_REFUSAL = re.compile(r"4\d\d\b")

_REPEATABLE = "pimc_client.repeatable"
_CONNECT_SECONDS = 10.0


def is_broken(error: httpx.TransportError) -> bool:
    """Whether a request is sent again after an error: the connection failed or broke.

    A read timeout is not retried, because the server is still working, and a second request would
    double the work. A proxy that does not reach the server (502, or SOCKS) has sent nothing to it.
    """
    if isinstance(error, httpx.ProxyError):
        return not _REFUSAL.match(str(error))
    return isinstance(error, _BROKEN)


def is_repeatable(request: httpx.Request) -> bool:
    """Whether sending the request again sends the same bytes."""
    # A request that was not built by this package is certainly repeatable only if it is in memory.
    in_memory = isinstance(request.stream, httpx.ByteStream)
    return bool(request.extensions.get(_REPEATABLE, in_memory))


def pause_before_retry(
    policy: RetryPolicy, tries: int, response: httpx.Response | None
) -> float | None:
    """Seconds until the next try.

    Args:
        policy: how often and after how long a request is sent again.
        tries: number of times that the request was sent.
        response: the server's response; None if the connection broke.

    Returns:
        The pause, None if there is no next try.
    """
    if response is None:
        return policy.pause(tries)
    if response.status_code not in RETRIED and not _is_of_a_gateway(response):
        return None
    return policy.pause(tries, seconds_to_wait(response.headers.get("retry-after")))


def _is_of_a_gateway(response: httpx.Response) -> bool:
    """Whether a proxy or gateway wrote a 502 because it did not reach the server."""
    kind = response.headers.get("content-type", "")
    return response.status_code == 502 and "json" not in kind


def extensions(request: Request) -> dict[str, bool]:
    """Data of a request for the retry transport, as httpx's `extensions`."""
    return {_REPEATABLE: request.repeatable()}


def proxy_for(url: str) -> str | None:
    """The proxy for a URL by the environment (`HTTP_PROXY`, `NO_PROXY`, …), None without one.

    httpx reads the environment itself, but not if it is given a transport.
    """
    parts = urlsplit(url)
    if proxy_bypass(parts.hostname or ""):
        return None
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    # Other programs also accept `proxy:3128` without a scheme.
    return proxy if proxy is None or "://" in proxy else f"http://{proxy}"


def timeouts(seconds: float | httpx.Timeout | None) -> httpx.Timeout:
    """Time limits: `seconds` for reading and for writing, 10 s for connecting."""
    if isinstance(seconds, httpx.Timeout):
        return seconds
    return httpx.Timeout(seconds, connect=_CONNECT_SECONDS, pool=None)


@contextmanager
def translated_errors(base_url: str, proxy: str | None) -> Iterator[None]:
    """Raise httpx's errors as this package's errors.

    Args:
        base_url: the server's base URL.
        proxy: the proxy of the requests, None without one.

    Raises:
        TimedOut: the server sent nothing for longer than the time limit.
        ConnectionFailed: the server was not reached, or the connection broke.
        TransportError: the connection failed for another reason.
    """
    route = "" if proxy is None else f" through the proxy {_without_password(proxy)}"
    hint = (
        ""
        if proxy is None
        else f"; the environment names this proxy: unset HTTP_PROXY, HTTPS_PROXY and ALL_PROXY, or "
        f"add {urlsplit(base_url).hostname} to NO_PROXY, to connect directly"
    )
    try:
        yield
    except httpx.TimeoutException as error:
        raise TimedOut(
            f"{base_url} did not respond in time{route} ({_named(error)}){hint}"
        ) from error
    except httpx.TransportError as error:
        raise ConnectionFailed(
            f"{base_url} cannot be reached{route} ({_named(error)}){hint}"
        ) from error
    except httpx.HTTPError as error:
        raise TransportError(f"{base_url}: {_named(error)}") from error


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__

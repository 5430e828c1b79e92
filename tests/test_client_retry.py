"""Retries: conditions, delays, and the same body byte for byte."""

from __future__ import annotations

import asyncio
import io
import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest

from pimc_client import (
    ConnectionFailed,
    InternalError,
    InvalidRequest,
    Overloaded,
    Series,
    ServiceError,
    TimedOut,
)
from pimc_client.async_retry_transport import AsyncRetryTransport
from pimc_client.retry import RetryPolicy, seconds_to_wait
from pimc_client.retry_transport import RetryTransport
from tests.kits.client import Reply, connected, serving, without_pauses
from tests.kits.patience import soon

KINDS = pytest.mark.parametrize("kind", ["sync", "async"])
AT_ONCE = pytest.mark.usefixtures("at_once")
OVERLOADED = b'{"code": "overloaded", "status": 503, "detail": "4 of 4 places taken"}'


@pytest.fixture
def at_once() -> Iterator[None]:
    with without_pauses():
        yield


def overloaded(retry_after="0"):
    return Reply(503, OVERLOADED, {"Retry-After": retry_after, "Content-Type": "application/json"})


def too_many(retry_after="0"):
    body = b'{"code": "too_many_requests", "status": 429, "detail": "50 of 50 jobs"}'
    return Reply(429, body, {"Retry-After": retry_after, "Content-Type": "application/json"})


def one_after_another(*replies):
    left = list(replies)
    return lambda _request: left.pop(0) if len(left) > 1 else left[0]


def stack(folder):
    """Every kind of file that can be sent again, one of them larger than a piece."""
    first = folder / "2021-01-05.tif"
    first.write_bytes(os.urandom(700_000))
    second = folder / "second.tif"
    second.write_bytes(os.urandom(1000))
    opened = second.open("rb")
    opened.seek(10)  # only the rest of the file must be sent
    return [first, opened, ("third.tif", b"in memory"), io.BytesIO(b"a stream")], opened


@AT_ONCE
@KINDS
@pytest.mark.parametrize(
    "failure", [overloaded(), too_many(), Reply(drop=True)], ids=["503", "429", "dropped"]
)
def test_a_retry_sends_the_same_body(tmp_path, kind, failure):
    files, opened = stack(tmp_path)
    with opened, serving(one_after_another(failure, failure, Reply())) as (url, received):
        with connected(kind, url) as client:
            client.classify_pixels(files, answer="summary", dates="2021-01-05")
        assert len(received) == 3
        first, *others = received
        assert all(other.body == first.body for other in others)
        assert all(other.headers == first.headers for other in others)
        assert int(first.headers["content-length"]) == len(first.body)
        content = (tmp_path / "2021-01-05.tif").read_bytes()
        assert first.body.count(content) == 1
        assert first.body.count((tmp_path / "second.tif").read_bytes()[10:]) == 1
        assert (tmp_path / "second.tif").read_bytes() not in first.body
        assert not opened.closed


@AT_ONCE
@KINDS
def test_a_retry_sends_the_same_json(kind):
    with (
        serving(one_after_another(overloaded(), Reply(body=b'{"results": []}'))) as (
            url,
            received,
        ),
        connected(kind, url) as client,
    ):
        client.classify_series(
            [Series(id="a", dates=["2021-01-01"], B02=[0.1], B04=[0.1], B08=[0.3])]
        )
    assert len(received) == 2
    assert received[0].body == received[1].body


@KINDS
def test_a_file_that_cannot_be_rewound_is_sent_once(kind):
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as pipe:
        os.write(writer, b"only once")
        os.close(writer)
        with (
            serving(lambda _: overloaded()) as (url, received),
            connected(kind, url) as client,
            pytest.raises(Overloaded),
        ):
            client.classify_pixels(pipe)
    assert len(received) == 1
    assert received[0].headers["transfer-encoding"] == "chunked"
    assert b"only once" in received[0].body


@KINDS
@pytest.mark.parametrize(
    ("status", "code", "error"),
    [(422, "invalid_request", InvalidRequest), (500, "internal_error", InternalError)],
)
def test_no_other_error_is_retried(kind, status, code, error):
    reply = Reply(status, f'{{"code": "{code}", "detail": "no"}}'.encode())
    with (
        serving(lambda _: reply) as (url, received),
        connected(kind, url) as client,
        pytest.raises(error),
    ):
        client.classify_pixels(("a.tif", b"x"))
    assert len(received) == 1


@AT_ONCE
@KINDS
def test_after_the_last_retry_the_error_has_retry_after(kind):
    with serving(lambda _: overloaded()) as (url, received), connected(kind, url, retries=2) as c:
        with pytest.raises(Overloaded) as caught:
            c.models()
        assert len(received) == 3
        assert caught.value.retry_after == 0


@KINDS
def test_a_retry_after_beyond_the_limit_is_an_error_at_once(kind):
    with serving(lambda _: overloaded("7200")) as (url, received), connected(kind, url) as client:
        with pytest.raises(Overloaded) as caught:
            client.models()
        assert len(received) == 1
        assert caught.value.retry_after == 7200


@KINDS
def test_readiness_is_requested_once(kind):
    body = b'{"code": "not_ready", "status": 503, "detail": "loading forecast-vi"}'
    reply = Reply(503, body, {"Retry-After": "1"})
    with serving(lambda _: reply) as (url, received), connected(kind, url) as client:
        found = client.ready()
    assert not found
    assert found.detail == "loading forecast-vi"
    assert len(received) == 1


@KINDS
def test_no_server_is_a_connection_error(kind):
    with serving(lambda _: Reply()) as (url, _):
        pass  # The port was free and is free again, so no server listens on it.
    with connected(kind, url, retries=0) as client, pytest.raises(ConnectionFailed) as caught:
        client.models()
    assert url in str(caught.value)
    assert isinstance(caught.value.__cause__, httpx.ConnectError)


@KINDS
def test_a_read_timeout_is_not_retried(kind):
    release = threading.Event()

    def slow(_request):
        release.wait()
        return Reply()

    with serving(slow) as (url, received):
        with connected(kind, url, timeout=0.1) as client, pytest.raises(TimedOut):
            client.models()
        assert soon(lambda: received)  # the server may read the request after its client has left
        release.set()
    assert len(received) == 1


def test_negative_retries_are_an_error():
    with pytest.raises(ValueError, match="-1"):
        RetryPolicy(retries=-1)


def test_pauses_grow_to_a_limit_and_are_never_shorter_than_retry_after():
    policy = RetryPolicy(retries=9, first_pause=1.0, longest_pause=10.0)
    for tries in range(1, 10):
        bound = min(10.0, 2.0 ** (tries - 1))
        pauses = [policy.pause(tries) for _ in range(50)]
        assert all(bound / 2 <= pause <= bound for pause in pauses)
        assert len(set(pauses)) > 1
        assert all(3.0 <= policy.pause(tries, 3.0) <= 4.0 for _ in range(50))
    assert policy.pause(10) is None
    assert policy.pause(1, 10.5) is None
    assert policy.pause(1, 10.0) == 10.0


def test_retry_after_is_read_as_seconds_or_as_a_date():
    assert seconds_to_wait("12") == 12.0
    assert seconds_to_wait(None) is None
    assert seconds_to_wait("soon") is None
    later = datetime.now(UTC) + timedelta(hours=1)
    assert seconds_to_wait(format_datetime(later, usegmt=True)) == pytest.approx(3600, abs=30)
    assert seconds_to_wait("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0


def script(*outcomes):
    """A transport that responds or fails by a list of outcomes."""
    left = list(outcomes)

    def handle(_request):
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return httpx.Response(outcome, headers={"Retry-After": "2"} if outcome == 503 else {})

    return httpx.MockTransport(handle)


@KINDS
@pytest.mark.parametrize(
    ("failure", "waits"),
    [
        (httpx.ProxyError("502 Bad Gateway"), 1),
        (httpx.ProxyError("Proxy Server could not connect: Host unreachable."), 1),
        (httpx.ProxyError("407 Proxy Authentication Required"), None),
        (httpx.ConnectError("[Errno 111] Connection refused"), 1),
        (httpx.UnsupportedProtocol("ftp"), None),
    ],
)
def test_a_proxy_that_does_not_reach_the_server_is_tried_again(kind, failure, waits):
    waited = []
    if kind == "sync":
        with httpx.Client(transport=RetryTransport(script(failure, 200), sleep=waited.append)) as c:
            outcome = outcome_of(lambda: c.post("http://x/", content=b"bytes"))
    else:

        async def wait(seconds):
            waited.append(seconds)

        async def go():
            transport = AsyncRetryTransport(script(failure, 200), sleep=wait)
            async with httpx.AsyncClient(transport=transport) as client:
                return await client.post("http://x/", content=b"bytes")

        outcome = outcome_of(lambda: asyncio.run(go()))
    assert (outcome, len(waited)) == ((200, waits) if waits else (type(failure), 0))


def outcome_of(send):
    try:
        return send().status_code
    except httpx.TransportError as error:
        return type(error)


@AT_ONCE
@KINDS
def test_a_502_of_a_gateway_is_retried_and_one_of_the_server_is_not(kind):
    ok = Reply(200, b'{"models": [], "defaults": {}}', {"Content-Type": "application/json"})
    page = Reply(502, b"<html>", {"Content-Type": "text/html"})
    with (
        serving(one_after_another(page, ok)) as (url, received),
        connected(kind, url) as client,
    ):
        client.models()
    assert len(received) == 2
    body = b'{"code": "unreachable_reference", "status": 502, "detail": "no"}'
    own = Reply(502, body, {"Content-Type": "application/problem+json"})
    with (
        serving(one_after_another(own, ok)) as (url, received),
        connected(kind, url) as client,
        pytest.raises(ServiceError),
    ):
        client.models()
    assert len(received) == 1


@KINDS
def test_the_transport_works_with_plain_httpx_and_waits_for_retry_after(kind):
    waits = []
    policy = RetryPolicy(retries=3, first_pause=0.5, longest_pause=60.0)
    inner = script(503, httpx.ConnectError("no"), httpx.ReadError("cut"), 200)
    if kind == "sync":
        with httpx.Client(transport=RetryTransport(inner, policy, waits.append)) as client:
            status = client.post("http://x/", content=b"bytes").status_code
    else:

        async def wait(seconds):
            waits.append(seconds)

        async def go():
            transport = AsyncRetryTransport(inner, policy, wait)
            async with httpx.AsyncClient(transport=transport) as client:
                return (await client.post("http://x/", content=b"bytes")).status_code

        status = asyncio.run(go())
    assert status == 200
    assert len(waits) == 3
    assert 2.25 <= waits[0] <= 2.5
    assert 0.5 <= waits[1] <= 1.0
    assert 1.0 <= waits[2] <= 2.0


def test_a_body_of_unknown_repeatability_is_sent_once():
    transport = RetryTransport(script(503, 200), sleep=lambda _: None)
    with httpx.Client(transport=transport) as client:
        assert client.post("http://x/", content=iter([b"once"])).status_code == 503

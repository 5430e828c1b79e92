"""Request heads and connections are bounded; everything over a real socket."""

from __future__ import annotations

import contextlib
import json
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.serving import served
from benchmarks.tiny_zoo import write_zoo
from tests.kits.metrics import metric
from tests.kits.patience import PATIENCE, soon
from tests.kits.sockets import response_of

SERIES = {
    "series": [
        {
            "id": "a",
            "dates": [f"2021-0{month}-05" for month in range(1, 6)],
            "B02": [0.05] * 5,
            "B04": [0.05] * 5,
            "B08": [0.3] * 5,
        }
    ]
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def api(zoo: Path) -> Iterator[httpx.Client]:
    with served(model_dir=zoo) as client:
        yield client


def connected(api: httpx.Client) -> socket.socket:
    return socket.create_connection(("127.0.0.1", api.base_url.port), timeout=PATIENCE)


def rest_of(connection: socket.socket) -> bytes:
    """Everything until the server closes the connection."""
    parts = []
    try:
        while part := connection.recv(2**16):
            parts.append(part)
    except ConnectionResetError:
        pass  # the server closed before it had read everything
    return b"".join(parts)


def problem(response: bytes) -> tuple[int, str]:
    head, _, body = response.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    found = json.loads(body)
    assert found["status"] == int(head.split()[1])
    return found["status"], found["code"]


def flood(connection: socket.socket, piece: bytes, most: int) -> int:
    """How many bytes the server takes before it closes the connection."""
    sent = 0
    try:
        while sent < most:
            connection.sendall(piece)
            sent += len(piece)
    except OSError:
        pass
    return sent


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n", b"X-Filler: " + b"a" * 1000 + b"\r\n"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX-One: ", b"a" * 2**16),
        (b"GET / HTTP/1.1\r\n", b"X-Many: a\r\n" * 1000),
    ],
    ids=["many headers", "one header", "short headers"],
)
def test_a_flood_of_headers_is_cut_off(api: httpx.Client, begin: bytes, piece: bytes) -> None:
    with connected(api) as connection:
        connection.sendall(begin)
        # The socket's buffers take some megabytes that the server never reads.
        assert flood(connection, piece, 2**27) < 2**26
    assert api.get("/health/live").status_code == 200
    assert metric(api, 'pimc_connections_given_up_total{reason="header_too_large"}') >= 1


def test_a_head_a_little_over_the_limit_is_a_problem_response(api: httpx.Client) -> None:
    with connected(api) as connection:
        head = b"GET /health/live HTTP/1.1\r\nHost: a\r\nX-One: " + b"a" * 2**16 + b"\r\n\r\n"
        connection.sendall(head)
        assert problem(rest_of(connection)) == (431, "header_too_large")


def test_many_rejected_heads_of_one_address_are_delayed(
    zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond ten of them; a client would otherwise keep the event loop busy with such heads."""
    monkeypatch.setattr("service.api.auth._FIRST_PAUSE", 3600.0)
    monkeypatch.setattr("service.api.auth._LONGEST_PAUSE", 3600.0)
    with served(model_dir=zoo) as api, contextlib.ExitStack() as held:
        head = b"GET /health/live HTTP/1.1\r\nHost: a\r\nX-One: " + b"a" * 2**16 + b"\r\n\r\n"
        for _ in range(10):
            with connected(api) as connection:
                connection.sendall(head)
                assert problem(rest_of(connection)) == (431, "header_too_large")
        late = held.enter_context(connected(api))
        late.sendall(head)
        reason = 'pimc_connections_given_up_total{reason="header_too_large"}'
        assert soon(lambda: metric(api, reason) == 11)
        assert api.get("/health/live").status_code == 200
        assert select.select([late], [], [], 0)[0] == []


def test_a_head_below_the_limit_passes(api: httpx.Client) -> None:
    assert api.get("/health/live", headers={"X-One": "a" * 60_000}).status_code == 200


def test_a_complete_request_in_one_read_is_not_a_long_head(api: httpx.Client) -> None:
    with connected(api) as connection:
        filler = json.dumps({**SERIES, "filler": "a" * 100_000}).encode()
        connection.sendall(
            b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(filler) + filler
        )
        assert problem(rest_of(connection)) == (422, "invalid_request")


def test_a_long_target_is_a_problem_response(api: httpx.Client) -> None:
    with connected(api) as connection:
        connection.sendall(b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n")
        assert problem(rest_of(connection)) == (414, "uri_too_long")


def test_a_request_that_is_not_http_is_a_problem_response(api: httpx.Client) -> None:
    with connected(api) as connection:
        connection.sendall(b"\x16\x03\x01 a handshake of TLS\r\n\r\n")
        assert problem(rest_of(connection)) == (400, "malformed_request")


def half_a_head(api: httpx.Client, *before: bytes) -> bytes:
    """The response to half a head, after the responses to whole requests.

    On a busy machine the server may close the connection before the half arrives, as it closes an
    idle one, without a response: then another connection is tried.
    """
    found: list[bytes] = []

    def once() -> bool:
        with connected(api) as connection, contextlib.suppress(ConnectionError):
            for request in before:
                connection.sendall(request)
                if not response_of(connection).startswith(b"HTTP/1.1 200"):
                    return False
            connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nX-")
            found.append(rest_of(connection))
        return any(found)

    assert soon(once)
    return found[-1]


@pytest.fixture(scope="module")
def hasty(zoo: Path) -> Iterator[httpx.Client]:
    """A service that waits half a second for a head."""
    with served(model_dir=zoo, head_seconds=0.5) as client:
        yield client


@pytest.mark.slow
def test_an_incomplete_or_missing_head_is_ended_in_time(hasty: httpx.Client) -> None:
    assert problem(half_a_head(hasty)) == (408, "head_stalled")
    with connected(hasty) as silent:
        assert rest_of(silent) == b""


@pytest.mark.slow
def test_a_second_request_of_a_connection_has_its_time_too(hasty: httpx.Client) -> None:
    request = b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n"
    assert problem(half_a_head(hasty, request)) == (408, "head_stalled")


@pytest.mark.slow
def test_idle_connections_are_closed_so_that_health_is_served(zoo: Path) -> None:
    with served(
        model_dir=zoo, max_connections=40, max_connections_per_address=40, head_seconds=300
    ) as api:
        idle = [connected(api) for _ in range(100)]
        try:
            assert api.get("/health/live").status_code == 200
            assert metric(api, "pimc_connections") <= 40
            assert metric(api, 'pimc_connections_given_up_total{reason="idle"}') >= 60
            # The oldest were closed, the latest are still served.
            assert idle[0].recv(1) == b""
            idle[-1].sendall(b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n")
            assert idle[-1].recv(100).startswith(b"HTTP/1.1 200")
        finally:
            for connection in idle:
                connection.close()


@pytest.mark.slow
def test_a_connection_is_rejected_if_all_have_requests(zoo: Path) -> None:
    # Bodies that never come hold each of them.
    begin = b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    with served(model_dir=zoo, max_connections_per_address=3) as api:
        busy = [connected(api) for _ in range(3)]
        try:
            for connection in busy:
                # The interim response shows that the request has begun.
                head = begin + b"Content-Length: 100\r\nExpect: 100-continue\r\n\r\n"
                connection.sendall(head)
                assert connection.recv(100).startswith(b"HTTP/1.1 100")
            with connected(api) as late:
                assert problem(rest_of(late)) == (503, "overloaded")
        finally:
            for connection in busy:
                connection.close()


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_an_offer_of_another_protocol_is_ignored_and_the_body_kept(
    api: httpx.Client, apart: bool, chunked: bool
) -> None:
    """As Java's HttpClient and `curl --http2` send every request."""
    body = json.dumps(SERIES).encode()
    length = b"Content-Length: %d\r\n" % len(body)
    if chunked:
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        length = b"Transfer-Encoding: chunked\r\n"
    head = (
        b"POST /embed HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\n"
        b"Upgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
        b"Content-Type: application/json\r\n" + length + b"\r\n"
    )
    with connected(api) as connection:
        if apart:
            connection.sendall(head)
            connection.sendall(body)
        else:
            connection.sendall(head + body)
        response = response_of(connection)
        assert response.startswith(b"HTTP/1.1 200"), response
        # And the connection serves the next request.
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert b"200 OK" in rest_of(connection)

"""Load test: fifty clients of every kind for ten minutes; failures, memory growth, leftovers.

    python -m benchmarks.load [--seconds 600] [--callers 50] [--beside NAME ...] [--out FILE]

The service runs in a separate process. The clients request maps from 1 x 1 to 512 x 512, series,
points, summaries and zips; some disconnect half way, some send or read slowly or never read, some
send invalid requests. Another process requests health and metrics. The run passes if every valid
request succeeds, no file remains, and memory does not grow: docs/explanation/reliability.md has the
numbers. With `--beside`, the clients are measured twice: alone, and while clients from another
address use up connections, memory or run slots.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import json
import multiprocessing
import random
import select
import socket
import statistics
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.landscape import BANDS, BOUNDARY, FORM, days, form, write_stack
from benchmarks.process import Sampler, Served, machine, served
from benchmarks.strangers import STRANGERS

MOST_RESIDENT = 1_500_000_000
"""Largest allowed resident memory of the service, bytes."""
MOST_GROWTH = 0.05
"""Largest growth of the mean memory from the first to the last third after two minutes."""
MOST_SLOWDOWN = 1.5
"""Largest ratio of the clients' median times with other clients to those without."""
SLOWEST_PROBE = 0.100
"""Seconds within which 99 of 100 health and metrics responses must arrive."""

_TIMEOUT = 1800.0
_PROBES = ("/health/live", "/health/ready", "/metrics")
_NEW = "/health/live on a new connection"
"""As most health checks are: the server must accept the connection first."""
_DATES = 12
_OVERLOADED = 503
_DEAF_SECONDS = 10.0
"""Seconds for which a client that never reads keeps its connection."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One kind of request."""

    name: str
    path: str
    body: bytes
    kind: str = FORM
    accept: str = "*/*"
    status: int = 200
    """Expected status, unless the service is at capacity."""
    code: str | None = None
    """Expected error code, if it must be rejected."""
    weight: float = 1.0
    behaviour: str = "plain"
    """Behaviour of the client; a key of `_BEHAVIOURS`."""
    key: str | None = None
    """API key; None sends none."""


Outcomes = Mapping[str, Mapping[str, int]]
"""Number of each outcome, by what they are outcomes of."""


@dataclass
class Tally:
    """Outcome of the requests; many threads add to it."""

    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Number of each outcome, by kind of request."""
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Seconds of the successful responses, by kind of request."""
    refused_seconds: list[float] = field(default_factory=list)
    """Seconds from the first byte sent until `overloaded` arrived, while the body is being sent."""
    failures: list[str] = field(default_factory=list)
    """Unexpected outcomes."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(
        self, request: Request, outcome: str, seconds: float, failure: str | None = None
    ) -> None:
        """Count one request."""
        with self.lock:
            self.outcomes[request.name][outcome] += 1
            if outcome == "overloaded":
                self.refused_seconds.append(seconds)
            elif failure is None:
                self.seconds[request.name].append(seconds)
            if failure is not None:
                self.failures.append(f"{request.name}: {failure}")

    def so_far(self) -> Outcomes:
        """A copy of the outcomes."""
        with self.lock:
            return {name: dict(counts) for name, counts in self.outcomes.items()}


@dataclass(frozen=True, kw_only=True)
class Report:
    """Results of a run."""

    machine: Mapping[str, str]
    seconds: float
    callers: int
    outcomes: Outcomes
    medians: Mapping[str, float]
    """Median seconds of a successful response, by kind of request."""
    failures: Sequence[str]
    leftovers: Sequence[str]
    """Temporary files left after all clients disconnected."""
    running: float
    """Runs in flight, and jobs queued or running, after all clients disconnected."""
    refused_p99: float
    """Seconds until `overloaded` arrived."""
    resident: Sequence[float]
    """Resident memory in bytes, one value per second."""
    probes: Mapping[str, Sequence[float]]
    """Seconds of each health and metrics response."""
    unready: int = 0
    """Number of responses of /health/ready that reported the server as not ready."""
    beside: Outcomes = field(default_factory=dict)
    """Responses to the others beside the clients, by their name."""

    @property
    def growth(self) -> float:
        """Mean memory of the last third after two minutes over that of the first, less 1.

        The mean of one minute differs from the next one's by up to 6 %, as requests do. 0 for runs
        of less than four minutes.
        """
        if len(self.resident) < 240:
            return 0.0
        third = (len(self.resident) - 120) // 3
        first, last = self.resident[120 : 120 + third], self.resident[-third:]
        return statistics.fmean(last) / statistics.fmean(first) - 1

    @property
    def faults(self) -> list[str]:
        """Reasons why the run fails on any machine."""
        found = list(dict.fromkeys(self.failures))
        if self.leftovers:
            found.append(f"{len(self.leftovers)} temporary files left: {self.leftovers[:5]}")
        if self.running:
            found.append(f"{self.running:g} runs or jobs left after all clients disconnected")
        if max(self.resident) > MOST_RESIDENT:
            found.append(
                f"{max(self.resident) / 1e6:.0f} MB in memory, more than {MOST_RESIDENT / 1e6:.0f}"
            )
        return found

    @property
    def delays(self) -> list[str]:
        """Reasons why the run fails on an otherwise idle machine."""
        found = []
        if self.growth > MOST_GROWTH:
            found.append(f"memory grew by {self.growth:.1%} from the first to the last third")
        for path, seconds in self.probes.items():
            if percentile(seconds, 0.99) > SLOWEST_PROBE:
                found.append(
                    f"{path}: 99 of 100 responses within {percentile(seconds, 0.99) * 1e3:.0f} ms, "
                    f"not {SLOWEST_PROBE * 1e3:.0f}"
                )
        return found


def percentile(numbers: Sequence[float], share: float) -> float:
    """Quantile of numbers; NaN if there are none."""
    ordered = sorted(numbers)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


# Requests -----------------------------------------------------------------------------------


def requests(largest: int = 512) -> list[Request]:
    """Every kind of request, made once; the clients send the same bytes repeatedly.

    Args:
        largest: side of the largest raster in pixels.
    """
    with tempfile.TemporaryDirectory() as folder:
        sides = [side for side in (1, 7, 64, 128, 256, 512) if side <= largest]
        stacks = {side: _stack(Path(folder), side) for side in sides}
    small, middle, large = stacks[64], stacks[min(128, largest)], stacks[largest]
    tiff, zipped, text = "image/tiff", "application/zip", "application/json"
    more = {"outputs": "class,confidence,entropy,probabilities"}
    pixels, forecast = "/classify-pixels", "/forecast"
    good = [
        Request(name=f"map {side} x {side}", path=pixels, body=form(files), accept=tiff,
            weight=min(8.0, 60_000 / side**2))
        for side, files in stacks.items()
    ]  # fmt: skip
    good += [
        Request(name="summary", path=pixels, body=form(middle), accept=text, weight=3),
        Request(name="zip", path=pixels, body=form(middle, more), accept=zipped, weight=3),
        Request(name="points", path=pixels, body=form(middle, {"points": _points(40)}), weight=4),
        Request(name="forecast", path=forecast, body=form(small), weight=3),
        Request(name="embed pixels", path="/embed", body=form(stacks[7], {"modality": "pixel"})),
        Request(name="embed patches", path="/embed", body=form(middle, {"modality": "patch"})),
        Request(name="landcover", path="/landcover", body=form(middle, {"stride": "16"}), weight=2),
        Request(name="landcover large", path="/landcover", body=form(large), weight=0.5),
        _series("series of 1", pixels, 1, weight=8),
        _series("series of 300", pixels, 300, weight=2),
        _series("forecast series", forecast, 20, weight=4),
    ]
    behaviours = [
        Request(
            name="leaves while sending", path=pixels, body=form(large), behaviour="half", weight=3
        ),
        Request(
            name="leaves while waiting", path=pixels, body=form(large), behaviour="leave", weight=4
        ),
        Request(name="sends slowly", path=pixels, body=form(small), behaviour="drip", weight=2),
        Request(
            name="reads slowly", path=pixels, body=form(middle, more), behaviour="sip", weight=2
        ),
        Request(
            name="never reads", path=pixels, body=form(middle, more), behaviour="deaf", weight=1
        ),
    ]
    return good + behaviours + _invalid(small)


def _invalid(files: Mapping[str, bytes]) -> list[Request]:
    name, first = next(iter(files.items()))
    pixels = "/classify-pixels"
    third = len(first) // 3
    corrupt = {**files, name: first[:third] + bytes(third) + first[2 * third :]}
    bad = [
        ("not a TIFF", form({"a.tif": b"not a raster at all"}), "not_a_geotiff"),
        ("corrupt", form(corrupt), "corrupt_raster"),
        ("one date", form({name: first}), "too_few_dates"),
        ("invalid parameter", form(files, {"scale": "much"}), "invalid_request"),
        ("unknown model", form(files, {"model": "no-such"}), "unknown_model"),
        ("bands unknown", form(files, {"bands": "B01,B05,B09,B10,SCL"}), "missing_bands"),
        ("scaled twice", form(files, {"scale": "1"}), "implausible_reflectance"),
    ]
    status = {"unknown_model": 404}
    return [
        Request(
            name=name, path=pixels, body=body, code=code, status=status.get(code, 422), weight=0.7
        )
        for name, body, code in bad
    ]


def _stack(root: Path, side: int) -> dict[str, bytes]:
    folder = root / str(side)
    folder.mkdir()
    return {
        p.name: p.read_bytes() for p in write_stack(folder, side, _DATES, bands=BANDS, scl=True)
    }


def _points(count: int) -> str:
    """GeoJSON points around the stacks' upper left corner: some inside, some outside."""
    rng = random.Random(0)
    features = [
        {
            "type": "Feature",
            "properties": {},
            "geometry": {
                "type": "Point",
                "coordinates": [3.0 + rng.uniform(0, 0.01), 50.55 - rng.uniform(0, 0.008)],
            },
        }
        for _ in range(count)
    ]
    return json.dumps({"type": "FeatureCollection", "features": features})


def _series(name: str, path: str, count: int, weight: float) -> Request:
    rng = random.Random(count)
    when = [day.isoformat() for day in days(_DATES)]
    series = [
        {
            "id": str(n),
            "dates": when,
            "B02": [round(rng.uniform(0.03, 0.06), 4) for _ in when],
            "B04": [round(rng.uniform(0.04, 0.10), 4) for _ in when],
            "B08": [round(rng.uniform(0.2, 0.4), 4) for _ in when],
        }
        for n in range(count)
    ]
    text = json.dumps({"series": series}).encode()
    return Request(name=name, path=path, body=text, kind="application/json", weight=weight)


# Clients ------------------------------------------------------------------------------------


Response = tuple[http.client.HTTPResponse, bytes]


class Gone(Exception):
    """The client disconnected on purpose, without a response."""


def _plain(connection: http.client.HTTPConnection, request: Request) -> Response:
    return _read(_sent(connection, request))


def _half(connection: http.client.HTTPConnection, request: Request) -> Response:
    with contextlib.suppress(OSError):  # rejected as overloaded, and disconnected while sending
        _send(connection, request, request.body[: len(request.body) // 2])
        time.sleep(random.uniform(0, 0.5))
    raise Gone


def _leave(connection: http.client.HTTPConnection, request: Request) -> Response:
    with contextlib.suppress(OSError):
        _send(connection, request, request.body)
        time.sleep(random.uniform(0, 3))
    raise Gone


def _drip(connection: http.client.HTTPConnection, request: Request) -> Response:
    """The body in forty pieces, over some four seconds."""
    return _read(_sent(connection, request, size=-(-len(request.body) // 40), rest=0.1))


def _sip(connection: http.client.HTTPConnection, request: Request) -> Response:
    """Read the response in small pieces with pauses, then the rest."""
    response = _with_tiny_buffer(connection, request)
    body = b""
    for _ in range(20):
        body += response.read(2**10)
        time.sleep(0.1)
    return response, body + response.read()


def _deaf(connection: http.client.HTTPConnection, request: Request) -> Response:
    response = _with_tiny_buffer(connection, request)
    if response.status != request.status:
        return _read(response)
    time.sleep(_DEAF_SECONDS)
    raise Gone


def _with_tiny_buffer(
    connection: http.client.HTTPConnection, request: Request
) -> http.client.HTTPResponse:
    """The response to a request, over a socket with a tiny receive buffer."""
    connection.connect()
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
    return _sent(connection, request)


def _sent(
    connection: http.client.HTTPConnection, request: Request, size: int = 2**17, rest: float = 0.0
) -> http.client.HTTPResponse:
    """Send a request piece by piece until a response arrives, as curl does."""
    _send(connection, request, b"")
    for at in range(0, len(request.body), size):
        if select.select([connection.sock], [], [], rest)[0]:
            break
        connection.send(request.body[at : at + size])
    return connection.getresponse()


def _read(response: http.client.HTTPResponse) -> Response:
    return response, response.read()


def _send(connection: http.client.HTTPConnection, request: Request, body: bytes) -> None:
    """Send the head of a request, with the length of the whole body, and a part of the body."""
    connection.putrequest("POST", request.path)
    for name, value in _headers(request).items():
        connection.putheader(name, value)
    connection.putheader("Content-Length", str(len(request.body)))
    connection.endheaders(body)


def _headers(request: Request) -> dict[str, str]:
    key = {} if request.key is None else {"X-API-Key": request.key}
    return {"Content-Type": request.kind, "Accept": request.accept, **key}


Behaviour = Callable[[http.client.HTTPConnection, Request], Response]
_BEHAVIOURS: Mapping[str, Behaviour] = {
    "plain": _plain, "half": _half, "leave": _leave, "drip": _drip, "sip": _sip, "deaf": _deaf,
}  # fmt: skip


def call(service: Served, request: Request, tally: Tally) -> bool:
    """Send one request; whether the service had a free slot."""
    begun = time.perf_counter()
    connection = http.client.HTTPConnection(service.host, service.port, timeout=_TIMEOUT)
    try:
        response, body = _BEHAVIOURS[request.behaviour](connection, request)
    except Gone:
        tally.add(request, "left", time.perf_counter() - begun)
        return True
    except (OSError, http.client.HTTPException) as error:
        tally.add(request, "broken", 0.0, f"{type(error).__name__}: {error}")
        return True
    finally:
        connection.close()
    seconds = time.perf_counter() - begun
    if response.status == _OVERLOADED and _code(body) == "overloaded":
        wait = response.headers.get("Retry-After", "")
        tally.add(request, "overloaded", seconds, None if wait.isdigit() else "no Retry-After")
        return False
    outcome = f"{response.status} {_code(body) or ''}".strip()
    wrong = None if response.status == request.status else f"{outcome}: {body[:300]!r}"
    tally.add(request, outcome, seconds, wrong or _fault_of(request, response, body))
    return True


def _fault_of(request: Request, response: http.client.HTTPResponse, body: bytes) -> str | None:
    """The fault of a response with the right status."""
    if request.code is not None:
        return None if _code(body) == request.code else f"code {_code(body)}, not {request.code}"
    kind = response.headers.get("Content-Type", "")
    if kind.startswith("image/tiff"):
        return None if body[:4] in (b"II*\0", b"II+\0") else "no TIFF"
    if kind == "application/zip":
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            return archive.testzip()
    return None if json.loads(body) else "an empty document"


def _code(body: bytes) -> str | None:
    with contextlib.suppress(ValueError):
        document = json.loads(body)
        return document.get("code") if isinstance(document, dict) else None
    return None


def _caller(
    service: Served,
    kinds: Sequence[Request],
    first: Sequence[Request],
    tally: Tally,
    over: threading.Event,
    seed: int,
) -> None:
    """Send the requests `first`, then drawn ones: so even a short run has each kind."""
    rng = random.Random(seed)
    weights = [request.weight for request in kinds]
    waiting = list(first)
    while not over.is_set():
        request = waiting.pop() if waiting else rng.choices(kinds, weights)[0]
        try:
            accepted = call(service, request, tally)
        except Exception as error:  # noqa: BLE001 - a thread that dies silently would hide a fault
            tally.add(request, "caller failed", 0.0, repr(error))
            continue
        if not accepted:  # earlier than `Retry-After`, but not at once
            time.sleep(rng.uniform(0.5, 1.5))


# Others beside the clients --------------------------------------------------------------------


Other = Callable[[Served, threading.Event, Counter[str]], None]
"""Uses up what it can until the event is set, and counts the responses."""
_DRIPS = 40
_DRIP_BYTES = 64 * 2**10 // 60
"""Bytes that each slow upload sends per second."""


def dripping(service: Served, over: threading.Event, counts: Counter[str]) -> None:
    """Forty uploads of 64 KiB per minute each; an upload that the server ends is started again."""
    head = (
        f"POST /classify-pixels HTTP/1.1\r\nHost: here\r\nContent-Type: {FORM}\r\n"
        f"X-API-Key: {_OTHER_KEY}\r\nContent-Length: {2**31}\r\n\r\n--{BOUNDARY}\r\n"
    ).encode()
    drips: list[socket.socket] = []
    while not over.is_set():
        for _ in range(_DRIPS - len(drips)):
            connection = socket.create_connection(
                (service.host, service.port), _TIMEOUT, source_address=("127.0.0.2", 0)
            )
            connection.sendall(head)
            drips.append(connection)
        time.sleep(1)
        for drip in list(drips):
            if response := _refused(drip):
                counts[response] += 1
                drips.remove(drip)
                drip.close()
    for drip in drips:
        drip.close()


def _refused(drip: socket.socket) -> str | None:
    """Send the next bytes of an upload; returns the status if the server has ended it."""
    try:
        if select.select([drip], [], [], 0)[0]:
            return drip.recv(2**12).split(b"\r\n")[0].decode()[9:12] or "closed"
        drip.sendall(bytes(_DRIP_BYTES))
    except OSError:
        return "closed"
    return None


_HOGS = 16
_PREFERENCES = ({}, {"Prefer": "respond-async"})


def hogs(service: Served, over: threading.Event, counts: Counter[str]) -> None:
    """Sixteen clients of one key that send maps and jobs as fast as they are rejected."""
    with tempfile.TemporaryDirectory() as folder:
        body = form(_stack(Path(folder), 256))
    headers = {"Content-Type": FORM, "X-API-Key": _OTHER_KEY}

    def send(preference: Mapping[str, str]) -> None:
        while not over.is_set():
            connection = http.client.HTTPConnection(service.host, service.port, timeout=_TIMEOUT)
            try:
                connection.request("POST", "/classify-pixels", body, {**headers, **preference})
                response = connection.getresponse()
                response.read()
                counts[str(response.status)] += 1
            except OSError:
                counts["broken"] += 1
            finally:
                connection.close()

    threads = [
        threading.Thread(target=send, args=(_PREFERENCES[number % 2],)) for number in range(_HOGS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


_OTHER_KEY = "key-of-the-others"
OTHERS: Mapping[str, Other] = {
    "dripping": dripping,
    "hogs": hogs,
    **{name: partial(stranger, key=_OTHER_KEY) for name, stranger in STRANGERS.items()},
}
NEED_KEYS = frozenset({"hogs"})
"""Further clients that the service can distinguish from the measured ones only by their API key."""


# The probe ----------------------------------------------------------------------------------


def _probe(host: str, port: int, out: Connection) -> None:
    """Request health and metrics in a separate process until stopped, at least once.

    A server at 9 of 10 queue slots is not ready, which does not count as a failure beside clients
    that send more than it can take; so these responses are counted.
    """
    found: dict[str, list[float]] = {path: [] for path in (*_PROBES, _NEW)}
    unready = 0
    connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT)
    stopped = False
    while not stopped:
        for path in _PROBES:
            begun = time.perf_counter()
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
            found[path].append(time.perf_counter() - begun)
            if response.status == 503 and json.loads(body).get("code") == "not_ready":
                unready += 1
            elif response.status != 200:
                out.send(f"{path} returned {response.status}")
                return
        begun = time.perf_counter()
        with contextlib.closing(http.client.HTTPConnection(host, port, timeout=_TIMEOUT)) as new:
            new.request("GET", "/health/live")
            new.getresponse().read()
        found[_NEW].append(time.perf_counter() - begun)
        stopped = out.poll(0.03)
    out.send((found, unready))


# All together -------------------------------------------------------------------------------


def run(
    seconds: float,
    callers: int,
    kinds: Sequence[Request],
    beside: Sequence[str] = (),
    *,
    keys: bool = False,
    enough: Callable[[Outcomes, Outcomes], bool] | None = None,
    **settings: str,
) -> Report:
    """Start a service, run all clients, and inspect what is left.

    Args:
        seconds: time in which the clients send requests, at most.
        callers: number of clients.
        kinds: the requests that the clients send.
        beside: names of `OTHERS` that run at the same time.
        keys: whether each client, and the others together, have an API key of their own.
        enough: given the outcomes so far, of the clients by kind of request and of the others by
            name: whether the run may end before its time; None for never.
        settings: environment variables of the service.
    """
    others: dict[str, Counter[str]] = {name: Counter() for name in beside}
    tally = Tally()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    about = machine()
    named = [f"key-of-client-{seed}" if keys else None for seed in range(callers)]
    if keys:
        settings["PIMC_API_KEYS"] = ",".join([*filter(None, named), _OTHER_KEY])
    with served(**settings) as service:
        probe = context.Process(target=_probe, args=(service.host, service.port, there))
        probe.start()
        over = threading.Event()
        threads = []
        for seed, key in enumerate(named):
            own = [replace(kind, key=key) for kind in kinds]
            sent = (service, own, own[seed::callers], tally, over, seed)
            threads.append(threading.Thread(target=_caller, args=sent))
        strangers = {
            name: threading.Thread(target=OTHERS[name], args=(service, over, others[name]))
            for name in beside
        }
        if "unread" in strangers:
            # Its one job comes first: the others use up what their common key may use.
            strangers["unread"].start()
            while strangers["unread"].is_alive() and not others["unread"]:
                time.sleep(0.1)
        threads += [thread for name, thread in strangers.items() if name != "unread"]
        with Sampler(take=service.resident) as resident:
            for thread in threads:
                thread.start()
            begun = time.monotonic()
            while (left := begun + seconds - time.monotonic()) > 0:
                if enough and enough(tally.so_far(), others):
                    break
                time.sleep(min(0.2, left))
            over.set()
            lasted = time.monotonic() - begun
        here.send("stop")
        probes = here.recv()
        probe.join()
        for thread in (*threads, *strangers.values()):
            thread.join()
        running = _settle(service)
        if isinstance(probes, str):
            tally.failures.append(probes)
            probes = {path: [] for path in _PROBES}, 0
        seconds_of, unready = probes
        if unready and not beside:
            tally.failures.append(f"/health/ready returned 503 {unready} times")
        tally.failures += _errors(service.log)
        return Report(
            machine=about,
            seconds=lasted,
            callers=callers,
            outcomes=tally.so_far(),
            medians={name: statistics.median(s) for name, s in tally.seconds.items()},
            failures=tally.failures,
            leftovers=service.leftovers(),
            running=running,
            refused_p99=percentile(tally.refused_seconds, 0.99),
            resident=[number for _, number in resident.samples],
            probes=seconds_of,
            unready=unready,
            beside={name: dict(counts) for name, counts in others.items()},
        )


def slowdown(alone: Report, beside: Report) -> float:
    """Ratio of the clients' median times with other clients to those without, median over kinds."""
    both = alone.medians.keys() & beside.medians.keys()
    return statistics.median(beside.medians[name] / alone.medians[name] for name in both)


def _settle(service: Served) -> float:
    """Wait up to five minutes until no run, job or temporary file is left; the runs and jobs left.

    Between two queued jobs no run is in flight, so that runs alone do not show the end.
    """
    until = time.monotonic() + 300
    while True:
        running = service.metric("pimc_runs_in_flight") + sum(
            service.metric("pimc_jobs", f'status="{status}"') for status in ("accepted", "running")
        )
        if time.monotonic() > until or not (running or service.leftovers()):
            return running
        time.sleep(0.2)


def _errors(log: Path) -> list[str]:
    """Errors in the service's log, except those of clients that stopped reading."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    errors = [f"log: {entry['message']}" for entry in lines if entry["level"] == "error"]
    return [line for line in errors if "without completing response" not in line]


def show(report: Report) -> None:
    """Print the report."""
    console = Console()
    console.print(", ".join(f"{name} {value}" for name, value in report.machine.items()))
    table = Table("request", "outcomes", "median s", box=None)
    for name, counts in report.outcomes.items():
        text = ", ".join(f"{count} x {outcome}" for outcome, count in sorted(counts.items()))
        table.add_row(name, text, f"{report.medians.get(name, float('nan')):.2f}")
    console.print(table)
    for name, counts in report.beside.items():
        text = ", ".join(f"{count} x {outcome}" for outcome, count in sorted(counts.items()))
        console.print(f"beside them, {name}: {text or 'no response'}")
    total = sum(sum(counts.values()) for counts in report.outcomes.values())
    refused = sum(counts.get("overloaded", 0) for counts in report.outcomes.values())
    console.print(
        f"{total} requests by {report.callers} clients in {report.seconds:.0f} s; {refused} were "
        f"rejected as overloaded, 99 of 100 within {report.refused_p99 * 1e3:.0f} ms"
    )
    for path, seconds in report.probes.items():
        half, most = percentile(seconds, 0.5), percentile(seconds, 0.99)
        console.print(
            f"{path}: {len(seconds)} times, median {half * 1e3:.1f} ms, 99 of 100 within "
            f"{most * 1e3:.1f} ms, longest {max(seconds, default=0) * 1e3:.0f} ms"
        )
    if report.unready:
        console.print(
            f"/health/ready reported {report.unready} times that the server is at capacity"
        )
    minutes = [report.resident[at : at + 60] for at in range(0, len(report.resident), 60)]
    means = ", ".join(f"{statistics.fmean(minute) / 1e6:.0f}" for minute in minutes)
    console.print(f"memory by minute (MB): {means}; most {max(report.resident) / 1e6:.0f}")
    console.print(f"first to last third after two minutes: {report.growth:+.1%}")
    for line in (*report.faults, *report.delays):
        console.print(f"[red]FAULT[/red] {line}")


def main() -> int:
    """Measure and print; the exit status states whether it passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--callers", type=int, default=50)
    parser.add_argument(
        "--beside", nargs="+", choices=OTHERS, default=(), help="others that run at the same time"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    kinds = requests()
    keys = not NEED_KEYS.isdisjoint(options.beside)
    rounds = [(), options.beside] if options.beside else [()]
    reports = [run(options.seconds, options.callers, kinds, names, keys=keys) for names in rounds]
    for report in reports:
        show(report)
    if options.out:
        options.out.write_text(json.dumps([asdict(report) for report in reports], indent=1))
    slower = slowdown(reports[0], reports[-1])
    if options.beside:
        Console().print(f"median times with the others: {slower:.2f} times those without")
    failed = any(report.faults or report.delays for report in reports)
    return 1 if failed or slower > MOST_SLOWDOWN else 0


if __name__ == "__main__":
    sys.exit(main())

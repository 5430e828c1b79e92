"""Metrics and logs."""

from __future__ import annotations

import gc
import io
import json
import logging
import logging.config
import re
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from service.api.middleware import RequestRecordMiddleware, sane_request_id
from service.run.executors import ThreadExecutor
from service.telemetry import JsonFormatter, Metrics, log_config


def counted(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of the text, by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    }


def small_app(metrics: Metrics) -> Starlette:
    async def fine(request: Request) -> Response:
        logging.getLogger("inside").info("working", extra={"step": 3})
        return PlainTextResponse(request.state.request_id)

    async def broken(request: Request) -> Response:
        raise RuntimeError("the inside, which nobody outside may see")

    async def half(request: Request) -> Response:
        async def pieces():
            yield b"begun"
            raise RuntimeError("cut off")

        return StreamingResponse(pieces())

    app = Starlette(
        routes=[Route("/fine/{id}", fine), Route("/broken", broken), Route("/half", half)]
    )
    app.add_middleware(
        RequestRecordMiddleware,
        metrics=metrics,
        on_fault=lambda request: PlainTextResponse("fault", status_code=500),
    )
    return app


def client_of(app: Starlette) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.fixture
def lines():
    """The lines logged meanwhile, parsed."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.removeHandler(handler)
    root.setLevel(level)


@pytest.mark.parametrize("given", ["abc-1", "A.b_c-9", "x" * 64])
def test_a_valid_request_id_is_kept(given: str) -> None:
    assert sane_request_id(given) == given


@pytest.mark.parametrize("given", [None, "", "x" * 65, "a b", "a\nb", "-a", "é", '{"a":1}'])
def test_any_other_id_is_replaced(given: str | None) -> None:
    assert re.fullmatch(r"[0-9a-f]{32}", sane_request_id(given))


async def ask(app: Starlette, path: str, **headers: str) -> httpx.Response:
    async with client_of(app) as client:
        return await client.get(path, headers=headers)


@pytest.mark.anyio
async def test_a_request_is_named_logged_and_counted(lines) -> None:
    metrics = Metrics()
    response = await ask(small_app(metrics), "/fine/7", **{"X-Request-ID": "mine"})
    assert response.headers["X-Request-ID"] == "mine" == response.text
    inside, record = [
        line for line in lines() if line["logger"] in {"inside", "service.api.middleware"}
    ]
    assert (inside["message"], inside["step"], inside["request_id"]) == ("working", 3, "mine")
    assert record["request_id"] == "mine"
    assert (record["method"], record["path"], record["status"]) == ("GET", "/fine/7", 200)
    assert record["ms"] >= 0
    found = counted(metrics)
    labels = (("method", "GET"), ("route", "/fine/{id}"), ("status", "200"))
    assert found["pimc_requests_total", labels] == 1
    assert found["pimc_request_seconds_count", (("route", "/fine/{id}"),)] == 1


@pytest.mark.anyio
async def test_a_fault_is_an_internal_error_and_its_stack_is_logged(lines) -> None:
    metrics = Metrics()
    response = await ask(small_app(metrics), "/broken")
    assert (response.status_code, response.text) == (500, "fault")
    assert response.headers["X-Request-ID"]
    (fault,) = [line for line in lines() if line["level"] == "error"]
    assert "the inside, which nobody outside may see" in fault["stack"]
    assert fault["request_id"] == response.headers["X-Request-ID"]


@pytest.mark.anyio
async def test_a_partly_sent_response_is_cut_off_after_a_fault(lines) -> None:
    with pytest.raises(RuntimeError, match="cut off"):
        await ask(small_app(Metrics()), "/half")
    assert any("cut off" in line.get("stack", "") for line in lines())


@pytest.mark.anyio
async def test_unknown_paths_and_methods_make_no_new_series() -> None:
    metrics = Metrics()
    app = small_app(metrics)
    async with client_of(app) as client:
        for number in range(5):
            await client.get(f"/no/{number}")
            await client.request(f"ODD{number}", "/no")
    labels = [dict(labels) for name, labels in counted(metrics) if name == "pimc_requests_total"]
    assert {label["route"] for label in labels} == {"unmatched"}
    assert {label["method"] for label in labels} == {"GET", "OTHER"}


def test_two_applications_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.ran(task="forecast", pixels=10, stages={"read": 0.5, "infer": 2.0, "write": 0.0})
    assert counted(one)["pimc_pixels_total", (("task", "forecast"),)] == 10
    assert counted(one)["pimc_stage_seconds_sum", (("stage", "infer"), ("task", "forecast"))] == 2
    assert not [name for name, _ in counted(other) if name == "pimc_pixels_total"]


def test_gauges_go_up_and_down() -> None:
    metrics = Metrics()
    metrics.provider("CPUExecutionProvider")
    metrics.windows(3)
    metrics.windows(-1)
    with metrics.run():
        found = counted(metrics)
    assert counted(metrics)["pimc_runs_in_flight", ()] == 0
    assert found["pimc_provider_info", (("provider", "CPUExecutionProvider"),)] == 1
    assert found["pimc_runs_in_flight", ()] == 1
    assert found["pimc_windows_in_flight", ()] == 2


@pytest.mark.parametrize("fails_at", [None, 2])
def test_windows_in_flight_come_back_to_none(fails_at: int | None) -> None:
    metrics = Metrics()
    seen = []

    def infer(item: int) -> int:
        seen.append(counted(metrics)["pimc_windows_in_flight", ()])
        if item == fails_at:
            raise ValueError("this window fails")
        return item

    def run() -> None:
        ThreadExecutor(in_flight=metrics.windows).run(
            range(5), read=lambda item: item, infer=infer, write=lambda item, response: None
        )

    if fails_at is None:
        run()
    else:
        with pytest.raises(ValueError, match="this window fails"):
            run()
    assert min(seen) >= 1
    assert counted(metrics)["pimc_windows_in_flight", ()] == 0


def test_a_log_record_is_always_one_line() -> None:
    record = logging.makeLogRecord(
        {"name": "n", "levelname": "INFO", "msg": "a\nb %s", "args": ("c",)}
    )
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert json.loads(line)["message"] == "a\nb c"


def test_a_log_record_is_bounded_whatever_a_client_sent() -> None:
    long = "x" * 100_000
    try:
        int(long)
    except ValueError as error:
        stack = (type(error), ValueError(long), error.__traceback__)
    record = logging.makeLogRecord(
        {"name": "n", "levelname": "INFO", "msg": "%s", "args": (long,), "exc_info": stack}
    )
    record.path = long
    entry = json.loads(JsonFormatter().format(record))
    assert max(len(entry["message"]), len(entry["path"])) < 5_000
    assert len(entry["stack"]) < 33_000
    assert entry["stack"].startswith("Traceback")


def test_the_servers_own_log_is_json_too() -> None:
    config = log_config("warning")
    assert config["root"] == {"level": "WARNING", "handlers": ["stderr"]}
    # No handler of its own, so messages of uvicorn take the same way.
    assert all("handlers" not in logger for logger in config["loggers"].values())
    logging.config.DictConfigurator(config)  # what dictConfig would refuse, this refuses


@pytest.fixture
def no_collections() -> Iterator[None]:
    """No garbage is collected, which the metrics would count."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collections")
def test_the_text_of_the_metrics_is_that_of_the_library() -> None:
    metrics = Metrics(per_key=True)
    strange = 'a "name" \\ of\ntwo lines'
    for status in (200, 503):
        metrics.request_completed(
            route="/jobs", method="GET", status=status, seconds=0.3, model=strange, key="ä"
        )
    metrics.ran(task="embed", pixels=3, stages={"read": 1e-9, "infer": 12.5})
    metrics.build("1.0")
    expected = [
        line
        for line in generate_latest(metrics._registry).decode().splitlines()
        if "_created" not in line
    ]

    def stable(lines: list[str]) -> list[str]:
        """Without the values that change by themselves."""
        return [line.split()[0] if line.startswith("process_") else line for line in lines]

    for _ in range(2):
        found = metrics.text().decode().splitlines()
        assert stable(found) == stable(expected)

"""What a call does, step by step, without doing it.

A flow yields each request that it wants made and is sent the reply; what it returns is the
answer. `Client` and `AsyncClient` differ in nothing but how they make a request and wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

from pimc_client.answers import (
    Embedding,
    Forecast,
    Model,
    Models,
    PixelClass,
    Raster,
    Rasters,
    Readiness,
    Results,
)
from pimc_client.calls import (
    ANYTHING,
    Reply,
    Request,
    build_cancel,
    build_job,
    build_jobs,
    build_model,
    build_models,
    build_raster,
    build_ready,
    build_result,
    build_series,
    submitted,
)
from pimc_client.errors import (
    JobDismissed,
    JobFailed,
    NotFound,
    ResultNotReady,
    ServiceError,
    UnexpectedAnswer,
    UnknownJob,
    WaitTimedOut,
)
from pimc_client.inputs import Files, Series, Task
from pimc_client.jobs import JobHandle, JobProgress, JobState
from pimc_client.parse import (
    Answer,
    Record,
    checked,
    embedding,
    forecast,
    parse_answer,
    parse_job,
    parse_json,
    parse_model,
    parse_models,
    parse_ready,
    parse_series,
    pixel_class,
)

T = TypeVar("T")
R = TypeVar("R", PixelClass, Forecast, Embedding)
Flow: TypeAlias = Generator[Request, Reply, T]

_ACCEPTED, _NO_CONTENT = 202, 204
_FIRST_PAUSE, _LONGEST_PAUSE, _SLOWER = 0.2, 5.0, 1.5  # seconds between two looks at a job


def _exchange(request: Request) -> Flow[Reply]:
    return checked((yield request))


def raster(task: Task, files: Files, **options: Any) -> Flow[Answer]:  # noqa: ANN401 (see `build_raster`)
    """Send imagery and get the answer, also where the service makes a job of it."""
    request = build_raster(task, files, **options)
    output = _single(options.get("outputs"))
    reply = yield from _exchange(request)
    if reply.status == _ACCEPTED:  # Larger than what the service answers while we hold the line.
        state = parse_job(parse_json(reply))
        handle: JobHandle[Answer] = JobHandle(state, accept=request.accept, output=output)
        return (yield from wait(handle))
    return (yield from _with_legend(parse_answer(reply, task, output)))


def submit(
    task: Task,
    files: Files,
    *,
    idempotency_key: str | None = None,
    **options: Any,  # noqa: ANN401 (see `build_raster`)
) -> Flow[JobHandle[Answer]]:
    """Send imagery and get a job."""
    request = submitted(build_raster(task, files, **options), idempotency_key)
    reply = yield from _exchange(request)
    if reply.status != _ACCEPTED:
        reply.body.close()
        raise UnexpectedAnswer(
            f"the service answered HTTP {reply.status} at once instead of making a job: "
            "does it know jobs?"
        )
    state = parse_job(parse_json(reply))
    return JobHandle(state, accept=request.accept, output=_single(options.get("outputs")))


def _single(outputs: object) -> str | None:
    return outputs if isinstance(outputs, str) else None


def _with_legend(answer: Answer) -> Flow[Answer]:
    """The same answer; a class map that says nothing of its legend has the model's."""
    found = answer.get("class") if isinstance(answer, Rasters) else answer
    if isinstance(found, Raster) and found.name == "class" and not found.legend and found.model:
        # A map without a legend is worth more than none, so a failure here is no failure.
        try:
            found.legend = (yield from model(found.model)).legend
        except (ServiceError, UnexpectedAnswer):
            found.legend = {}
    return answer


def series(
    task: Task,
    given: Iterable[Series],
    read: Callable[[Record], R],
    **options: Any,  # noqa: ANN401 (see `build_series`)
) -> Flow[Results[R]]:
    """Send series and get a result for each."""
    reply = yield from _exchange(build_series(task, given, **options))
    return parse_series(reply, read)


def classify_series(given: Iterable[Series], **options: Any) -> Flow[Results[PixelClass]]:  # noqa: ANN401 (see `build_series`)
    """A class for each series."""
    return series("classify-pixels", given, pixel_class, **options)


def forecast_series(given: Iterable[Series], **options: Any) -> Flow[Results[Forecast]]:  # noqa: ANN401 (see `build_series`)
    """A forecast for each series."""
    return series("forecast", given, forecast, **options)


def embed_series(given: Iterable[Series], **options: Any) -> Flow[Results[Embedding]]:  # noqa: ANN401 (see `build_series`)
    """An embedding for each series."""
    return series("embed", given, embedding, **options)


def models() -> Flow[Models]:
    """The registry."""
    return parse_models(parse_json((yield from _exchange(build_models()))))


def model(reference: str) -> Flow[Model]:
    """One card."""
    return parse_model(parse_json((yield from _exchange(build_model(reference)))))


def ready() -> Flow[Readiness]:
    """Whether the service can answer."""
    return parse_ready((yield build_ready()))


# --- jobs -----------------------------------------------------------------------------------------


def jobs() -> Flow[list[JobHandle[Answer]]]:
    """Every job."""
    document = parse_json((yield from _exchange(build_jobs())))
    states = [parse_job(job) for job in document.get("jobs", ())]
    return [JobHandle(state, accept=ANYTHING) for state in states]


def job(job_id: str) -> Flow[JobHandle[Answer]]:
    """One job."""
    return JobHandle((yield from _state(job_id)), accept=ANYTHING)


def _state(job_id: str, *, delay: float = 0.0) -> Flow[JobState]:
    reply = yield from _exchange(build_job(job_id, delay=delay))
    return parse_job(parse_json(reply))


def refresh(handle: JobHandle[Any]) -> Flow[None]:
    """Hear of the job anew."""
    handle.state = yield from _state(handle.id)


def wait(
    handle: JobHandle[Any], progress: JobProgress | None = None, timeout: float | None = None
) -> Flow[Answer]:
    """Look at the job, ever less often, until it has ended; then its result."""
    deadline = None if timeout is None else time.monotonic() + timeout
    told, pause = None, _FIRST_PAUSE
    while True:
        if progress is not None and handle.progress != told:
            told = handle.progress
            progress(told)
        if handle.done:
            return (yield from result(handle))
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise WaitTimedOut(
                    f"job {handle.id} is {handle.status} at {handle.progress:g} % after "
                    f"{timeout:g} s; it goes on",
                    job_id=handle.id,
                )
            pause = min(pause, left)
        handle.state = yield from _state(handle.id, delay=pause)
        pause = min(pause * _SLOWER, _LONGEST_PAUSE)


def result(handle: JobHandle[Any], output: str | None = None) -> Flow[Answer]:
    """The job's result, or one output of it."""
    accept = handle.accept if output is None else ANYTHING
    try:
        reply = yield from _exchange(build_result(handle.id, accept=accept, output=output))
    except (ResultNotReady, NotFound, UnknownJob) as error:
        # The service says that there is no result; the job's state tells why.
        reason = _ended_badly(handle.state)
        if reason is None:
            raise
        raise reason from error
    answer = parse_answer(reply, handle.task, output or handle.output)
    return (yield from _with_legend(answer))


def _ended_badly(state: JobState) -> Exception | None:
    said = f": {state.message}" if state.message else ""
    if state.status == "failed":
        return JobFailed(f"job {state.id} failed{said}", job_id=state.id)
    if state.status == "dismissed":
        return JobDismissed(f"job {state.id} was cancelled{said}", job_id=state.id)
    return None


def cancel(handle: JobHandle[Any]) -> Flow[None]:
    """End the job."""
    reply = yield from _exchange(build_cancel(handle.id))
    if reply.status == _NO_CONTENT:
        reply.body.close()
        handle.state = replace(handle.state, status="dismissed")
    else:
        handle.state = parse_job(parse_json(reply))

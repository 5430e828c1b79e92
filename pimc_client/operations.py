"""Operations: the steps of each client method, without input or output.

An operation is a generator: it yields each request to send, receives the response, and returns the
method's result. `Client` and `AsyncClient` differ only in how they send a request and wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

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
from pimc_client.inputs import Fields, Files, Points, Runnable, Series, Task
from pimc_client.requests import (
    ANYTHING,
    GEOJSON,
    Request,
    Response,
    build_cancel,
    build_head,
    build_head_of_series,
    build_head_removal,
    build_heads,
    build_job,
    build_jobs,
    build_model,
    build_models,
    build_raster,
    build_ready,
    build_result,
    build_series,
    submitted,
    validated,
)
from pimc_client.responses import (
    Record,
    TaskResult,
    checked,
    embedding,
    forecast,
    parse_heads,
    parse_job,
    parse_json,
    parse_measured,
    parse_model,
    parse_models,
    parse_ready,
    parse_result,
    parse_series,
    parse_taught,
    pixel_class,
)
from pimc_client.results import (
    Embedding,
    Forecast,
    JobHandle,
    JobProgress,
    JobState,
    Measured,
    Model,
    Models,
    PixelClass,
    Raster,
    Rasters,
    Readiness,
    Results,
    Taught,
)

T = TypeVar("T")
R = TypeVar("R")
Operation: TypeAlias = Generator[Request, Response, T]

_ACCEPTED, _NO_CONTENT = 202, 204
_FIRST_PAUSE, _LONGEST_PAUSE, _SLOWER = 0.2, 5.0, 1.5  # seconds between two polls of a job


def _exchange(request: Request) -> Operation[Response]:
    return checked((yield request))


def raster(
    task: Runnable,
    files: Files,
    *,
    job_progress: JobProgress | None = None,
    **options: Any,  # noqa: ANN401 (see `build_raster`)
) -> Operation[TaskResult]:
    """Send imagery and return the result, even if the server runs the request as a job.

    Args:
        task: the task.
        files: the stack.
        job_progress: called with the percentage done if the server runs the request as a job.
        **options: as for `build_raster`.
    """
    request = build_raster(task, files, **options)
    output = _single(options.get("outputs"))
    response = yield from _exchange(request)
    if response.status == _ACCEPTED:  # Too large for a synchronous response.
        state = parse_job(parse_json(response))
        handle: JobHandle[TaskResult] = JobHandle(state, accept=request.accept, output=output)
        return (yield from wait(handle, job_progress))
    return (yield from _with_legend(parse_result(response, task, output)))


def similar(
    files: Files,
    *,
    points: Points | None = None,
    fields: Fields | None = None,
    job_progress: JobProgress | None = None,
    **options: Any,  # noqa: ANN401 (see `build_raster`)
) -> Operation[TaskResult]:
    """Send imagery and return how similar every pixel is to places.

    Raises:
        ValueError: neither points nor fields, or both.
    """
    _check_places(points, fields, "to compare every pixel with")
    return raster(
        "similar", files, points=points, fields=fields, job_progress=job_progress, **options
    )


def _check_places(points: Points | None, fields: Fields | None, purpose: str) -> None:
    if (points is None) == (fields is None):
        count = "neither is" if points is None else "both are"
        raise ValueError(f"{count} given: give either points or fields, the places {purpose}")


def measure(
    files: Files,
    *,
    points: Points | None = None,
    fields: Fields | None = None,
    **options: Any,  # noqa: ANN401 (see `build_raster`)
) -> Operation[Measured]:
    """Send imagery and return the measured series of points or fields.

    Raises:
        ValueError: neither points nor fields are given, or both.
    """
    _check_places(points, fields, "to measure")
    request = build_raster("series", files, points=points, fields=fields, **options)
    return parse_measured((yield from _exchange(request)))


def validate(
    task: Runnable,
    files: Files,
    **options: Any,  # noqa: ANN401 (see `build_raster`)
) -> Operation[dict[str, Any]]:
    """Send imagery and return the server's validation: errors, warnings and an estimate."""
    request = validated(build_raster(task, files, **options), task)
    return parse_json((yield from _exchange(request)))


def validate_series(
    task: Task,
    given: Iterable[Series],
    **options: Any,  # noqa: ANN401 (see `build_series`)
) -> Operation[dict[str, Any]]:
    """Send series and return the server's validation."""
    request = validated(build_series(task, given, **options), task)
    return parse_json((yield from _exchange(request)))


def submit(
    task: Runnable,
    files: Files,
    *,
    idempotency_key: str | None = None,
    **options: Any,  # noqa: ANN401 (see `build_raster`)
) -> Operation[JobHandle[TaskResult]]:
    """Send imagery and return a job."""
    request = submitted(build_raster(task, files, **options), idempotency_key)
    response = yield from _exchange(request)
    if response.status != _ACCEPTED:
        response.body.close()
        raise UnexpectedAnswer(
            f"the server responded HTTP {response.status} instead of 202 with a job: check the "
            "base URL"
        )
    state = parse_job(parse_json(response))
    return JobHandle(state, accept=request.accept, output=_single(options.get("outputs")))


def _single(outputs: object) -> str | None:
    return outputs if isinstance(outputs, str) else None


def _with_legend(result: TaskResult) -> Operation[TaskResult]:
    """The same result; a class map without a legend gets the legend of its model."""
    found = result.get("class") if isinstance(result, Rasters) else result
    if isinstance(found, Raster) and found.name == "class" and not found.legend and found.model:
        # The map is useful without its legend, so an error here is not raised.
        try:
            found.legend = (yield from model(found.model)).legend
        except (ServiceError, UnexpectedAnswer):
            found.legend = {}
    return result


def series(
    task: Task,
    given: Iterable[Series],
    read: Callable[[Record], R],
    **options: Any,  # noqa: ANN401 (see `build_series`)
) -> Operation[Results[R]]:
    """Send series and return one result for each."""
    response = yield from _exchange(build_series(task, given, **options))
    return parse_series(response, read)


def classify_series(given: Iterable[Series], **options: Any) -> Operation[Results[PixelClass]]:  # noqa: ANN401 (see `build_series`)
    """A class for each series."""
    return series("classify-pixels", given, pixel_class, **options)


def forecast_series(given: Iterable[Series], **options: Any) -> Operation[Results[Forecast]]:  # noqa: ANN401 (see `build_series`)
    """A forecast for each series."""
    return series("forecast", given, forecast, **options)


def embed_series(given: Iterable[Series], **options: Any) -> Operation[Results[Embedding]]:  # noqa: ANN401 (see `build_series`)
    """An embedding for each series."""
    return series("embed", given, embedding, **options)


def models() -> Operation[Models]:
    """The model registry."""
    return parse_models(parse_json((yield from _exchange(build_models()))))


def model(reference: str) -> Operation[Model]:
    """A model's card."""
    return parse_model(parse_json((yield from _exchange(build_model(reference)))))


def teach(name: str, files: Files, labels: Fields, **options: Any) -> Operation[Taught]:  # noqa: ANN401 (see `build_head`)
    """Make a model of own classes from a stack and labels."""
    request = build_head(name, files, labels, **options)
    return parse_taught(parse_json((yield from _exchange(request))))


def teach_series(
    name: str,
    given: Iterable[Series],
    classes: Iterable[str],
    **options: Any,  # noqa: ANN401 (see `build_head_of_series`)
) -> Operation[Taught]:
    """Make a model of own classes from labelled series."""
    request = build_head_of_series(name, given, classes, **options)
    return parse_taught(parse_json((yield from _exchange(request))))


def own_models() -> Operation[tuple[Model, ...]]:
    """The caller's own models."""
    return parse_heads(parse_json((yield from _exchange(build_heads()))))


def delete_model(name: str) -> Operation[None]:
    """Remove one of the caller's own models."""
    (yield from _exchange(build_head_removal(name))).body.close()


def ready() -> Operation[Readiness]:
    """Whether the server is ready."""
    return parse_ready((yield build_ready()))


# --- jobs -----------------------------------------------------------------------------------------


def jobs() -> Operation[list[JobHandle[TaskResult]]]:
    """All jobs."""
    document = parse_json((yield from _exchange(build_jobs())))
    states = [parse_job(job) for job in document.get("jobs", ())]
    return [JobHandle(state, accept=ANYTHING) for state in states]


def job(job_id: str) -> Operation[JobHandle[TaskResult]]:
    """One job."""
    return JobHandle((yield from _state(job_id)), accept=ANYTHING)


def _state(job_id: str, *, delay: float = 0.0) -> Operation[JobState]:
    response = yield from _exchange(build_job(job_id, delay=delay))
    return parse_job(parse_json(response))


def refresh(handle: JobHandle[Any]) -> Operation[None]:
    """Read the state of the job again."""
    handle.state = yield from _state(handle.id)


def wait(
    handle: JobHandle[Any], progress: JobProgress | None = None, timeout: float | None = None
) -> Operation[TaskResult]:
    """Poll the job, with growing pauses, until it has finished; then return its result."""
    deadline = None if timeout is None else time.monotonic() + timeout
    reported, pause = None, _FIRST_PAUSE
    while True:
        if progress is not None and handle.progress != reported:
            reported = handle.progress
            progress(reported)
        if handle.done:
            return (yield from result(handle))
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise WaitTimedOut(
                    f"job {handle.id} is {handle.status} at {handle.progress:g} % after "
                    f"{timeout:g} s and continues to run; call wait again, or cancel",
                    job_id=handle.id,
                )
            pause = min(pause, left)
        handle.state = yield from _state(handle.id, delay=pause)
        pause = min(pause * _SLOWER, _LONGEST_PAUSE)


def result(
    handle: JobHandle[Any],
    output: str | None = None,
    *,
    smooth: int | None = None,
    min_area: float | None = None,
) -> Operation[TaskResult]:
    """The job's result, or one output of it, as it is or cleaned."""
    accept = handle.accept if output is None else ANYTHING
    try:
        response = yield from _exchange(
            build_result(handle.id, accept=accept, output=output, smooth=smooth, min_area=min_area)
        )
    except (ResultNotReady, NotFound, UnknownJob) as error:
        # The server has no result; the job's state has the reason.
        reason = _unsuccessful(handle.state)
        if reason is None:
            raise
        raise reason from error
    found = parse_result(response, handle.task, output or handle.output)
    return (yield from _with_legend(found))


def item(handle: JobHandle[Any]) -> Operation[Mapping[str, Any]]:
    """The STAC Item of the job's rasters."""
    request = build_result(handle.id, accept=GEOJSON, output="item.json")
    return parse_json((yield from _exchange(request)))


def _unsuccessful(state: JobState) -> Exception | None:
    reason = f": {state.message}" if state.message else ""
    if state.status == "failed":
        return JobFailed(f"job {state.id} failed{reason}", job_id=state.id)
    if state.status == "dismissed":
        return JobDismissed(f"job {state.id} was cancelled{reason}", job_id=state.id)
    return None


def cancel(handle: JobHandle[Any]) -> Operation[None]:
    """Cancel the job."""
    response = yield from _exchange(build_cancel(handle.id))
    if response.status == _NO_CONTENT:
        response.body.close()
        handle.state = replace(handle.state, status="dismissed")
    else:
        handle.state = parse_job(parse_json(response))

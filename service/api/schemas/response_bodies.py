"""JSON bodies of responses: problems, summaries, jobs, processes, models, health."""

from datetime import date, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from models.card import ModelCard


class Problem(BaseModel):
    """A problem document (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    trace_id: Annotated[
        str | None,
        Field(description="trace of the request, if it sent `traceparent` or the server traces"),
    ] = None
    errors: Annotated[
        list[dict[str, str]] | None,
        Field(
            description="with `invalid_request`: `field` and `detail` of each parameter that is "
            "not valid"
        ),
    ] = None
    violated_policies: Annotated[
        list[str] | None,
        Field(
            alias="violated-policies",
            description="with `too_many_requests`: names of the quotas that are used up",
        ),
    ] = None


class WarningEntry(BaseModel):
    """A finding about the input that does not stop the run."""

    code: str
    detail: str


IntendedUse = Annotated[str, Field(description="what the model's results are good for")]


class SummaryResponse(BaseModel):
    """The summary of a raster's result."""

    model_config = ConfigDict(extra="allow")

    model: str
    intended_use: IntendedUse = ""
    warnings: list[WarningEntry]


class SeriesResponse(BaseModel):
    """One result per series, in the order of the request."""

    model_config = ConfigDict(extra="allow")

    model: str
    intended_use: IntendedUse = ""
    results: list[dict[str, Any]]
    warnings: list[WarningEntry]


class PointsResponse(BaseModel):
    """A GeoJSON FeatureCollection of the requested points, results in `properties`."""

    model_config = ConfigDict(extra="allow")

    type: Literal["FeatureCollection"]
    features: list[dict[str, Any]]
    model: str
    intended_use: IntendedUse = ""
    warnings: list[WarningEntry]


class MeasuredResponse(BaseModel):
    """A GeoJSON FeatureCollection of points or fields; `properties` hold lists by date."""

    model_config = ConfigDict(extra="allow")

    type: Literal["FeatureCollection"]
    features: list[dict[str, Any]]
    dates: list[date]
    bands: list[str]
    indices: list[str]
    warnings: list[WarningEntry]


class Seconds(BaseModel):
    """Estimated duration of a run in seconds, from the last runs of the task on this server."""

    shortest: float
    longest: float
    runs: Annotated[
        int,
        Field(
            description="number of runs that the range is taken from; 0 before the first run of "
            "the task for the same kind (raster, points, fields or series) since the server's "
            "start: a rough range, from the time of one batch of the model"
        ),
    ]


class Estimate(BaseModel):
    """Estimated size, memory and duration of a request's run."""

    pixels: Annotated[
        int,
        Field(
            description="pixels, points or series to predict for; for fields the pixels of the "
            "windows that hold one"
        ),
    ]
    dates: Annotated[int, Field(description="dates of a raster that are used")]
    read_bytes: Annotated[
        int,
        Field(
            description="size of the values that are read of the dates and bands used, bytes; for "
            "points the most that may be read"
        ),
    ]
    memory_bytes: Annotated[int, Field(description="memory that the run takes at once, bytes")]
    becomes_a_job: Annotated[
        bool, Field(description="whether the request becomes a job even without `Prefer`")
    ]
    seconds: Annotated[
        Seconds | None,
        Field(description="null if a caller's own model was removed meanwhile"),
    ]


class ValidationResponse(BaseModel):
    """Result of the validation of a request."""

    valid: bool
    task: str
    model: str | None = None
    problem: Annotated[
        dict[str, Any] | None,
        Field(
            description="the error with which the request would be rejected: `code`, `detail`, "
            "`errors`"
        ),
    ] = None
    problems: Annotated[
        list[dict[str, Any]],
        Field(description="`problem`, and those that the request has besides"),
    ] = []
    warnings: list[WarningEntry] = []
    estimate: Estimate | None = None


class Link(BaseModel):
    """A link to another resource."""

    href: str
    rel: str
    type: str | None = None
    title: str | None = None


class JobInfo(BaseModel):
    """A job's status, as `statusInfo` of OGC API - Processes. Times are UTC."""

    jobID: str  # noqa: N815 - the standard's name
    type: Literal["process"] = "process"
    processID: Annotated[str, Field(description="the task")]  # noqa: N815 - the standard's name
    status: Literal["accepted", "running", "successful", "failed", "dismissed"]
    message: Annotated[str | None, Field(description="reason why the job failed")] = None
    progress: Annotated[
        int, Field(ge=0, le=100, description="progress in per cent; never decreases")
    ]
    created: datetime
    started: datetime | None
    finished: datetime | None
    updated: datetime
    links: list[Link]


class CallbackSecret(BaseModel):
    """The secrets with which the caller verifies callbacks."""

    secret: Annotated[
        str, Field(description="of this caller, as libraries of Standard Webhooks take it")
    ]
    secrets: Annotated[
        list[str],
        Field(description="every secret that callbacks are signed with, while one is replaced"),
    ]


class JobList(BaseModel):
    """The caller's jobs, newest first."""

    jobs: list[JobInfo]
    links: list[Link]


class LandingPage(BaseModel):
    """Where the parts of the API are."""

    title: str
    description: str
    links: list[Link]


class Conformance(BaseModel):
    """The classes of standards that the server conforms to."""

    conformsTo: list[str]  # noqa: N815 - the standard's name


class ProcessSummary(BaseModel):
    """A process: a task of the service."""

    id: str
    version: str
    title: str
    description: str
    keywords: list[str]
    jobControlOptions: list[Literal["sync-execute", "async-execute", "dismiss"]]  # noqa: N815 - the standard's name
    outputTransmission: list[Literal["value", "reference"]]  # noqa: N815 - the standard's name
    links: list[Link]


class ProcessList(BaseModel):
    """The processes."""

    processes: list[ProcessSummary]
    links: list[Link]


class ProcessInput(BaseModel):
    """An input of a process."""

    title: str
    description: str
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    minOccurs: int  # noqa: N815 - the standard's name
    maxOccurs: int | Literal["unbounded"]  # noqa: N815 - the standard's name


class ProcessOutput(BaseModel):
    """An output of a process."""

    title: str
    description: str
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class ProcessDescription(ProcessSummary):
    """A process with its inputs and outputs."""

    inputs: dict[str, ProcessInput]
    outputs: dict[str, ProcessOutput]


class HeadResponse(BaseModel):
    """A model that was made from labels."""

    model: Annotated[str, Field(description="`name@version`")]
    card: ModelCard
    warnings: list[WarningEntry]


class HeadList(BaseModel):
    """The caller's own models."""

    heads: list[ModelCard]


class ModelList(BaseModel):
    """All models, and the default model of each task."""

    models: list[ModelCard]
    defaults: dict[str, str]


class Live(BaseModel):
    """The process runs."""

    status: Literal["live"] = "live"


class ReadyStatus(BaseModel):
    """The service is ready; with `PIMC_PRIVATE`, all that a client without a key receives."""

    status: Literal["ready"] = "ready"


class ClusterReady(BaseModel):
    """The cluster that runs the windows of jobs."""

    scheduler: Annotated[str, Field(description="address of the Dask scheduler")]
    workers: Annotated[int, Field(description="number of workers that compute windows")]
    threads: Annotated[int, Field(description="number of threads of these workers")]
    refused: Annotated[
        dict[str, str], Field(description="workers that differ from the service, with the reason")
    ]
    fault: Annotated[
        str | None,
        Field(description="why jobs wait; synchronous requests do not use the cluster"),
    ]


class Ready(ReadyStatus):
    """Every default model is loaded and warm."""

    provider: Annotated[str, Field(description="the execution provider in use")]
    models: Annotated[list[str], Field(description="each as `name@version`")]
    defaults: dict[str, str]
    refused: Annotated[
        dict[str, str], Field(description="bundles that are not served, each with the reason")
    ]
    workers: Annotated[int, Field(description="number of jobs that can run at once")]
    disk_free: Annotated[
        dict[str, int],
        Field(
            description="bytes free on the disk of jobs (`state`) and of temporary files "
            "(`scratch`)"
        ),
    ]
    cluster: Annotated[
        ClusterReady | None, Field(description="null if jobs run in the service")
    ] = None

"""The client, for code that waits."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack, cast, overload

from pimc_client import flows
from pimc_client.answers import (
    Embedding,
    Forecast,
    Model,
    Models,
    PixelClass,
    PointResult,
    Raster,
    Rasters,
    Readiness,
    Results,
    Summary,
    new_file,
)
from pimc_client.calls import Reply, Request
from pimc_client.connection import base_url_of, client_headers
from pimc_client.flows import Flow
from pimc_client.inputs import (
    AnswerKind,
    ClassOutput,
    ClassOutputs,
    Files,
    JobOptions,
    Modality,
    Points,
    QuantileOutputs,
    Series,
    SeveralOutputs,
    StackOptions,
    Task,
    WindowOptions,
)
from pimc_client.jobs import JobHandle, JobProgress
from pimc_client.parse import Answer
from pimc_client.retry import RetryPolicy

if TYPE_CHECKING:
    from datetime import date

    import httpx

T = TypeVar("T")


class Client:
    """A connection to the service; close it, or use it as a context manager.

    Safe to share between threads. Every method raises a `ServiceError` where the service says no
    and a `TransportError` where no answer comes. Imagery is sent piece by piece from disk, and
    large answers go to disk, so memory does not grow with the files.

    Args:
        base_url: where the service is, such as `http://127.0.0.1:8000`, with any path before it.
        api_key: the key, where the service asks for one.
        timeout: seconds that the service may be silent; None waits for ever. Connecting alone has
            10 seconds. An `httpx.Timeout` says each apart.
        transport: what sends, in place of the network: for tests and special connections.
        retries: how often a request that found no connection, or no place in an overloaded
            service, is sent again. Files that cannot be rewound are sent once.

    Raises:
        ValueError: a base URL that is none.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout: float | httpx.Timeout | None = 600.0,
        transport: httpx.BaseTransport | None = None,
        retries: int = 3,
    ) -> None:
        import httpx

        from pimc_client.transports import RetryTransport, proxy_for, timeouts

        self._base_url = base_url_of(base_url)
        inner = transport or httpx.HTTPTransport(proxy=proxy_for(self._base_url))
        self._http = httpx.Client(
            base_url=self._base_url,
            headers=client_headers(api_key),
            timeout=timeouts(timeout),
            transport=RetryTransport(inner, RetryPolicy(retries=retries)),
        )

    # Imagery --------------------------------------------------------------------------------------

    @overload
    def classify_pixels(
        self,
        files: Files,
        *,
        outputs: ClassOutput | None = None,
        points: None = None,
        answer: Literal["raster"] = "raster",
        **options: Unpack[WindowOptions],
    ) -> Raster: ...
    @overload
    def classify_pixels(
        self,
        files: Files,
        *,
        outputs: SeveralOutputs,
        points: None = None,
        answer: Literal["raster"] = "raster",
        **options: Unpack[WindowOptions],
    ) -> Rasters: ...
    @overload
    def classify_pixels(
        self,
        files: Files,
        *,
        outputs: ClassOutputs | None = None,
        points: None = None,
        answer: Literal["summary"],
        **options: Unpack[WindowOptions],
    ) -> Summary: ...
    @overload
    def classify_pixels(
        self,
        files: Files,
        *,
        outputs: ClassOutputs | None = None,
        points: Points,
        answer: Literal["raster"] = "raster",
        **options: Unpack[WindowOptions],
    ) -> Results[PointResult[PixelClass]]: ...
    def classify_pixels(
        self,
        files: Files,
        *,
        outputs: ClassOutputs | None = None,
        points: Points | None = None,
        answer: AnswerKind = "raster",
        **options: Unpack[WindowOptions],
    ) -> Answer:
        """A class for every pixel of a satellite image time series.

        Args:
            files: the GeoTIFF stack: paths, open binary files, `(name, bytes)`, or references.
            outputs: `class` (the default), `confidence`, `entropy` or `probabilities`; one as
                text, or a list.
            points: answer for these pixels alone.
            answer: `summary` for numbers in place of a raster.
            **options: how to read the files, see `StackOptions`; `start` of the time window;
                `progress` of the upload.

        Returns:
            A `Raster`; `Rasters` by name where `outputs` is a list; a `Summary`; or with `points`
            a result for each.
        """
        return self.run(
            flows.raster(
                "classify-pixels", files, outputs=outputs, points=points, answer=answer, **options
            )
        )

    @overload
    def forecast(
        self,
        files: Files,
        *,
        horizon: int | None = None,
        outputs: QuantileOutputs | None = None,
        points: None = None,
        answer: Literal["raster"] = "raster",
        **options: Unpack[WindowOptions],
    ) -> Raster: ...
    @overload
    def forecast(
        self,
        files: Files,
        *,
        horizon: int | None = None,
        outputs: QuantileOutputs | None = None,
        points: None = None,
        answer: Literal["summary"],
        **options: Unpack[WindowOptions],
    ) -> Summary: ...
    @overload
    def forecast(
        self,
        files: Files,
        *,
        horizon: int | None = None,
        outputs: QuantileOutputs | None = None,
        points: Points,
        answer: Literal["raster"] = "raster",
        **options: Unpack[WindowOptions],
    ) -> Results[PointResult[Forecast]]: ...
    def forecast(
        self,
        files: Files,
        *,
        horizon: int | None = None,
        outputs: QuantileOutputs | None = None,
        points: Points | None = None,
        answer: AnswerKind = "raster",
        **options: Unpack[WindowOptions],
    ) -> Answer:
        """The next values of NDVI, EVI and SAVI for every pixel.

        Args:
            files: the GeoTIFF stack, as for `classify_pixels`.
            horizon: how many steps ahead; else as far as the model reaches.
            outputs: any of `q10`, `q50` (the default) and `q90`.
            points: answer for these pixels alone.
            answer: `summary` for numbers in place of a raster.
            **options: as for `classify_pixels`.

        Returns:
            A `Raster` whose bands are `NDVI_2021-11-05_q50` and so on; a `Summary`; or with
            `points` a result for each.
        """
        return self.run(
            flows.raster(
                "forecast",
                files,
                horizon=horizon,
                outputs=outputs,
                points=points,
                answer=answer,
                **options,
            )
        )

    @overload
    def landcover(
        self,
        files: Files,
        *,
        stride: int | None = None,
        outputs: ClassOutput | None = None,
        points: None = None,
        answer: Literal["raster"] = "raster",
        **options: Unpack[StackOptions],
    ) -> Raster: ...
    @overload
    def landcover(
        self,
        files: Files,
        *,
        stride: int | None = None,
        outputs: SeveralOutputs,
        points: None = None,
        answer: Literal["raster"] = "raster",
        **options: Unpack[StackOptions],
    ) -> Rasters: ...
    @overload
    def landcover(
        self,
        files: Files,
        *,
        stride: int | None = None,
        outputs: ClassOutputs | None = None,
        points: None = None,
        answer: Literal["summary"],
        **options: Unpack[StackOptions],
    ) -> Summary: ...
    @overload
    def landcover(
        self,
        files: Files,
        *,
        stride: int | None = None,
        outputs: ClassOutputs | None = None,
        points: Points,
        answer: Literal["raster"] = "raster",
        **options: Unpack[StackOptions],
    ) -> Results[PointResult[PixelClass]]: ...
    def landcover(
        self,
        files: Files,
        *,
        stride: int | None = None,
        outputs: ClassOutputs | None = None,
        points: Points | None = None,
        answer: AnswerKind = "raster",
        **options: Unpack[StackOptions],
    ) -> Answer:
        """EuroSAT land-cover labels from imagery, a label for each patch of 64 x 64 pixels.

        Args:
            files: imagery of one date or many, as for `classify_pixels`.
            stride: pixels between labelled patches, 1 to 64 (the default); fewer is denser.
            outputs: as for `classify_pixels`.
            points: answer for the patches at these points alone.
            answer: `summary` for numbers in place of a raster.
            **options: as for `classify_pixels`, without `start`.

        Returns:
            As `classify_pixels`, on a grid `stride` times coarser.
        """
        return self.run(
            flows.raster(
                "landcover",
                files,
                stride=stride,
                outputs=outputs,
                points=points,
                answer=answer,
                **options,
            )
        )

    @overload
    def embed(
        self,
        files: Files,
        *,
        modality: Modality | None = None,
        stride: int | None = None,
        points: None = None,
        answer: Literal["raster"] = "raster",
        **options: Unpack[WindowOptions],
    ) -> Raster: ...
    @overload
    def embed(
        self,
        files: Files,
        *,
        modality: Modality | None = None,
        stride: int | None = None,
        points: None = None,
        answer: Literal["summary"],
        **options: Unpack[WindowOptions],
    ) -> Summary: ...
    @overload
    def embed(
        self,
        files: Files,
        *,
        modality: Modality | None = None,
        stride: int | None = None,
        points: Points,
        answer: Literal["raster"] = "raster",
        **options: Unpack[WindowOptions],
    ) -> Results[PointResult[Embedding]]: ...
    def embed(
        self,
        files: Files,
        *,
        modality: Modality | None = None,
        stride: int | None = None,
        points: Points | None = None,
        answer: AnswerKind = "raster",
        **options: Unpack[WindowOptions],
    ) -> Answer:
        """The PIMC embedding of every pixel or patch.

        Args:
            files: the GeoTIFF stack, as for `classify_pixels`.
            modality: `pixel` (the default), from the time series; `patch`, from imagery.
            stride: pixels between patches, for `patch` alone.
            points: answer for these places alone.
            answer: `summary` for numbers in place of a raster.
            **options: as for `classify_pixels`; `start` for `pixel` alone.

        Returns:
            A `Raster` with a band for each dimension; a `Summary`; or with `points` a result for
            each.
        """
        return self.run(
            flows.raster(
                "embed",
                files,
                modality=modality,
                stride=stride,
                points=points,
                answer=answer,
                **options,
            )
        )

    # Series ---------------------------------------------------------------------------------------

    def classify_series(
        self,
        series: Iterable[Series],
        *,
        model: str | None = None,
        start: date | str | None = None,
    ) -> Results[PixelClass]:
        """A class for each series, in order.

        Args:
            series: pixels or fields through time.
            model: `name` or `name@version`; else the default of `classify-pixels`.
            start: first day of the model's time window; else the card's rule.
        """
        return self.run(flows.classify_series(series, model=model, start=start))

    def forecast_series(
        self,
        series: Iterable[Series],
        *,
        horizon: int | None = None,
        model: str | None = None,
        start: date | str | None = None,
    ) -> Results[Forecast]:
        """The next values of each series, in order.

        Args:
            series: pixels or fields through time.
            horizon: how many steps ahead; else as far as the model reaches.
            model: `name` or `name@version`; else the default of `forecast`.
            start: first day of the model's time window; else the card's rule.
        """
        return self.run(flows.forecast_series(series, horizon=horizon, model=model, start=start))

    def embed_series(
        self,
        series: Iterable[Series],
        *,
        model: str | None = None,
        start: date | str | None = None,
    ) -> Results[Embedding]:
        """The embedding of each series, in order.

        Args:
            series: pixels or fields through time.
            model: `name` or `name@version`; else the default of `embed`.
            start: first day of the model's time window; else the card's rule.
        """
        return self.run(flows.embed_series(series, model=model, start=start))

    # Jobs -----------------------------------------------------------------------------------------

    @overload
    def submit(
        self,
        task: Task,
        files: Files,
        *,
        outputs: ClassOutput | QuantileOutputs | None = None,
        points: None = None,
        answer: Literal["raster"] = "raster",
        **options: Unpack[JobOptions],
    ) -> Job[Raster]: ...
    @overload
    def submit(
        self,
        task: Literal["classify-pixels", "landcover"],
        files: Files,
        *,
        outputs: SeveralOutputs,
        points: None = None,
        answer: Literal["raster"] = "raster",
        **options: Unpack[JobOptions],
    ) -> Job[Rasters]: ...
    @overload
    def submit(
        self,
        task: Task,
        files: Files,
        *,
        outputs: ClassOutputs | QuantileOutputs | None = None,
        points: None = None,
        answer: Literal["summary"],
        **options: Unpack[JobOptions],
    ) -> Job[Summary]: ...
    @overload
    def submit(
        self,
        task: Task,
        files: Files,
        *,
        outputs: ClassOutputs | QuantileOutputs | None = None,
        points: Points,
        answer: Literal["raster"] = "raster",
        **options: Unpack[JobOptions],
    ) -> Job[Results[PointResult[Any]]]: ...
    def submit(
        self,
        task: Task,
        files: Files,
        *,
        outputs: ClassOutputs | QuantileOutputs | None = None,
        points: Points | None = None,
        answer: AnswerKind = "raster",
        **options: Unpack[JobOptions],
    ) -> Job[Any]:
        """Start a task and come back for its result later.

        Args:
            task: `classify-pixels`, `forecast`, `landcover` or `embed`.
            files: the GeoTIFF stack, as for `classify_pixels`.
            outputs: as for the task's own method.
            points: as for the task's own method.
            answer: as for the task's own method.
            **options: those of the task's own method, and `idempotency_key`.

        Returns:
            The job; `wait` gives what the task's own method would have given.
        """
        flow = flows.submit(task, files, outputs=outputs, points=points, answer=answer, **options)
        return Job(self, self.run(flow))

    def job(self, job_id: str) -> Job[Answer]:
        """A job by its id, such as one that another program submitted."""
        return Job(self, self.run(flows.job(job_id)))

    def jobs(self) -> list[Job[Answer]]:
        """Every job that the service has."""
        return [Job(self, handle) for handle in self.run(flows.jobs())]

    # The service ----------------------------------------------------------------------------------

    def models(self) -> Models:
        """The models that the service has, and which answers where none is named."""
        return self.run(flows.models())

    def model(self, name: str) -> Model:
        """One model's card, by `name` or `name@version`."""
        return self.run(flows.model(name))

    def ready(self) -> Readiness:
        """Whether the service can answer; true or false, with what it says of itself."""
        return self.run(flows.ready())

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client of {self._base_url}>"

    # Doing what flows say -------------------------------------------------------------------------

    def run(self, flow: Flow[T]) -> T:
        """Make the requests of a flow and give it the replies; every method is one such run."""
        try:
            request = next(flow)
            while True:
                time.sleep(request.delay)
                request = flow.send(self._send(request))
        except StopIteration as end:
            return cast("T", end.value)

    def _send(self, request: Request) -> Reply:
        from pimc_client.transports import extensions, our_errors

        body = new_file()
        try:
            with (
                our_errors(self._base_url),
                self._http.stream(
                    request.method,
                    request.path,
                    headers=request.all_headers(),
                    content=request.body,
                    extensions=extensions(request),
                ) as response,
            ):
                for piece in response.iter_bytes():
                    body.write(piece)
        except BaseException:
            body.close()
            raise
        return Reply(status=response.status_code, headers=response.headers, body=body)


class Job(JobHandle[T]):
    """A run that goes on in the service."""

    def __init__(self, client: Client, handle: JobHandle[Any]) -> None:
        super().__init__(handle.state, accept=handle.accept, output=handle.output)
        self._client = client

    def refresh(self) -> Job[T]:
        """Ask the service how the job stands."""
        self._client.run(flows.refresh(self))
        return self

    def wait(self, progress: JobProgress | None = None, timeout: float | None = None) -> T:
        """Wait until the job has ended.

        Args:
            progress: called with the percentage done whenever it has changed.
            timeout: seconds to wait at most; None waits for ever.

        Returns:
            The result.

        Raises:
            ServiceError: what went wrong in the job.
            JobFailed: it failed and the service does not say why.
            JobDismissed: it was cancelled.
            WaitTimedOut: it goes on; `wait` may be called again.
        """
        answer = self._client.run(flows.wait(self, progress, timeout))
        return cast("T", answer)

    @overload
    def result(self) -> T: ...
    @overload
    def result(self, output: str) -> Raster: ...
    def result(self, output: str | None = None) -> T | Raster:
        """The result of a job that has ended, or one output of it.

        Raises:
            ResultNotReady: it has not ended.
            ServiceError, JobFailed, JobDismissed: as `wait`.
        """
        answer = self._client.run(flows.result(self, output))
        return cast("T", answer)

    def cancel(self) -> None:
        """End the job; what it has done is lost."""
        self._client.run(flows.cancel(self))

"""The client, for code that awaits. The same as `client`, but for how it sends and waits."""

from __future__ import annotations

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


class AsyncClient:
    """`Client`, with every method awaited.

    Files are read by threads, so that the event loop goes on while they are sent. Needs asyncio.

    Args:
        base_url: as for `Client`.
        api_key: as for `Client`.
        timeout: as for `Client`.
        transport: as for `Client`, one of httpx's asynchronous ones.
        retries: as for `Client`.

    Raises:
        ValueError: a base URL that is none.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout: float | httpx.Timeout | None = 600.0,
        transport: httpx.AsyncBaseTransport | None = None,
        retries: int = 3,
    ) -> None:
        import httpx

        from pimc_client.transports import AsyncRetryTransport, proxy_for, timeouts

        self._base_url = base_url_of(base_url)
        inner = transport or httpx.AsyncHTTPTransport(proxy=proxy_for(self._base_url))
        self._http = httpx.AsyncClient(
            base_url=self._base_url,
            headers=client_headers(api_key),
            timeout=timeouts(timeout),
            transport=AsyncRetryTransport(inner, RetryPolicy(retries=retries)),
        )

    # Imagery --------------------------------------------------------------------------------------

    @overload
    async def classify_pixels(
        self,
        files: Files,
        *,
        outputs: ClassOutput | None = None,
        points: None = None,
        answer: Literal["raster"] = "raster",
        **options: Unpack[WindowOptions],
    ) -> Raster: ...
    @overload
    async def classify_pixels(
        self,
        files: Files,
        *,
        outputs: SeveralOutputs,
        points: None = None,
        answer: Literal["raster"] = "raster",
        **options: Unpack[WindowOptions],
    ) -> Rasters: ...
    @overload
    async def classify_pixels(
        self,
        files: Files,
        *,
        outputs: ClassOutputs | None = None,
        points: None = None,
        answer: Literal["summary"],
        **options: Unpack[WindowOptions],
    ) -> Summary: ...
    @overload
    async def classify_pixels(
        self,
        files: Files,
        *,
        outputs: ClassOutputs | None = None,
        points: Points,
        answer: Literal["raster"] = "raster",
        **options: Unpack[WindowOptions],
    ) -> Results[PointResult[PixelClass]]: ...
    async def classify_pixels(
        self,
        files: Files,
        *,
        outputs: ClassOutputs | None = None,
        points: Points | None = None,
        answer: AnswerKind = "raster",
        **options: Unpack[WindowOptions],
    ) -> Answer:
        """`Client.classify_pixels`, awaited."""
        return await self.run(
            flows.raster(
                "classify-pixels", files, outputs=outputs, points=points, answer=answer, **options
            )
        )

    @overload
    async def forecast(
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
    async def forecast(
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
    async def forecast(
        self,
        files: Files,
        *,
        horizon: int | None = None,
        outputs: QuantileOutputs | None = None,
        points: Points,
        answer: Literal["raster"] = "raster",
        **options: Unpack[WindowOptions],
    ) -> Results[PointResult[Forecast]]: ...
    async def forecast(
        self,
        files: Files,
        *,
        horizon: int | None = None,
        outputs: QuantileOutputs | None = None,
        points: Points | None = None,
        answer: AnswerKind = "raster",
        **options: Unpack[WindowOptions],
    ) -> Answer:
        """`Client.forecast`, awaited."""
        return await self.run(
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
    async def landcover(
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
    async def landcover(
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
    async def landcover(
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
    async def landcover(
        self,
        files: Files,
        *,
        stride: int | None = None,
        outputs: ClassOutputs | None = None,
        points: Points,
        answer: Literal["raster"] = "raster",
        **options: Unpack[StackOptions],
    ) -> Results[PointResult[PixelClass]]: ...
    async def landcover(
        self,
        files: Files,
        *,
        stride: int | None = None,
        outputs: ClassOutputs | None = None,
        points: Points | None = None,
        answer: AnswerKind = "raster",
        **options: Unpack[StackOptions],
    ) -> Answer:
        """`Client.landcover`, awaited."""
        return await self.run(
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
    async def embed(
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
    async def embed(
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
    async def embed(
        self,
        files: Files,
        *,
        modality: Modality | None = None,
        stride: int | None = None,
        points: Points,
        answer: Literal["raster"] = "raster",
        **options: Unpack[WindowOptions],
    ) -> Results[PointResult[Embedding]]: ...
    async def embed(
        self,
        files: Files,
        *,
        modality: Modality | None = None,
        stride: int | None = None,
        points: Points | None = None,
        answer: AnswerKind = "raster",
        **options: Unpack[WindowOptions],
    ) -> Answer:
        """`Client.embed`, awaited."""
        return await self.run(
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

    async def classify_series(
        self,
        series: Iterable[Series],
        *,
        model: str | None = None,
        start: date | str | None = None,
    ) -> Results[PixelClass]:
        """`Client.classify_series`, awaited."""
        return await self.run(flows.classify_series(series, model=model, start=start))

    async def forecast_series(
        self,
        series: Iterable[Series],
        *,
        horizon: int | None = None,
        model: str | None = None,
        start: date | str | None = None,
    ) -> Results[Forecast]:
        """`Client.forecast_series`, awaited."""
        return await self.run(
            flows.forecast_series(series, horizon=horizon, model=model, start=start)
        )

    async def embed_series(
        self,
        series: Iterable[Series],
        *,
        model: str | None = None,
        start: date | str | None = None,
    ) -> Results[Embedding]:
        """`Client.embed_series`, awaited."""
        return await self.run(flows.embed_series(series, model=model, start=start))

    # Jobs -----------------------------------------------------------------------------------------

    @overload
    async def submit(
        self,
        task: Task,
        files: Files,
        *,
        outputs: ClassOutput | QuantileOutputs | None = None,
        points: None = None,
        answer: Literal["raster"] = "raster",
        **options: Unpack[JobOptions],
    ) -> AsyncJob[Raster]: ...
    @overload
    async def submit(
        self,
        task: Literal["classify-pixels", "landcover"],
        files: Files,
        *,
        outputs: SeveralOutputs,
        points: None = None,
        answer: Literal["raster"] = "raster",
        **options: Unpack[JobOptions],
    ) -> AsyncJob[Rasters]: ...
    @overload
    async def submit(
        self,
        task: Task,
        files: Files,
        *,
        outputs: ClassOutputs | QuantileOutputs | None = None,
        points: None = None,
        answer: Literal["summary"],
        **options: Unpack[JobOptions],
    ) -> AsyncJob[Summary]: ...
    @overload
    async def submit(
        self,
        task: Task,
        files: Files,
        *,
        outputs: ClassOutputs | QuantileOutputs | None = None,
        points: Points,
        answer: Literal["raster"] = "raster",
        **options: Unpack[JobOptions],
    ) -> AsyncJob[Results[PointResult[Any]]]: ...
    async def submit(
        self,
        task: Task,
        files: Files,
        *,
        outputs: ClassOutputs | QuantileOutputs | None = None,
        points: Points | None = None,
        answer: AnswerKind = "raster",
        **options: Unpack[JobOptions],
    ) -> AsyncJob[Any]:
        """`Client.submit`, awaited."""
        flow = flows.submit(task, files, outputs=outputs, points=points, answer=answer, **options)
        return AsyncJob(self, await self.run(flow))

    async def job(self, job_id: str) -> AsyncJob[Answer]:
        """A job by its id, such as one that another program submitted."""
        return AsyncJob(self, await self.run(flows.job(job_id)))

    async def jobs(self) -> list[AsyncJob[Answer]]:
        """Every job that the service has."""
        return [AsyncJob(self, handle) for handle in await self.run(flows.jobs())]

    # The service ----------------------------------------------------------------------------------

    async def models(self) -> Models:
        """The models that the service has, and which answers where none is named."""
        return await self.run(flows.models())

    async def model(self, name: str) -> Model:
        """One model's card, by `name` or `name@version`."""
        return await self.run(flows.model(name))

    async def ready(self) -> Readiness:
        """Whether the service can answer; true or false, with what it says of itself."""
        return await self.run(flows.ready())

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<AsyncClient of {self._base_url}>"

    # Doing what flows say -------------------------------------------------------------------------

    async def run(self, flow: Flow[T]) -> T:
        """Make the requests of a flow and give it the replies; every method is one such run."""
        import asyncio  # slow to import, and who uses `Client` needs none of it

        try:
            request = next(flow)
            while True:
                await asyncio.sleep(request.delay)
                request = flow.send(await self._send(request))
        except StopIteration as end:
            return cast("T", end.value)

    async def _send(self, request: Request) -> Reply:
        from pimc_client.transports import AsyncBody, extensions, our_errors

        body = new_file()
        content = None if request.body is None else AsyncBody(request.body)
        try:
            with our_errors(self._base_url):
                async with self._http.stream(
                    request.method,
                    request.path,
                    headers=request.all_headers(),
                    content=content,
                    extensions=extensions(request),
                ) as response:
                    async for piece in response.aiter_bytes():
                        body.write(piece)
        except BaseException:
            body.close()
            raise
        return Reply(status=response.status_code, headers=response.headers, body=body)


class AsyncJob(JobHandle[T]):
    """A run that goes on in the service."""

    def __init__(self, client: AsyncClient, handle: JobHandle[Any]) -> None:
        super().__init__(handle.state, accept=handle.accept, output=handle.output)
        self._client = client

    async def refresh(self) -> AsyncJob[T]:
        """Ask the service how the job stands."""
        await self._client.run(flows.refresh(self))
        return self

    async def wait(self, progress: JobProgress | None = None, timeout: float | None = None) -> T:
        """`Job.wait`, awaited."""
        answer = await self._client.run(flows.wait(self, progress, timeout))
        return cast("T", answer)

    @overload
    async def result(self) -> T: ...
    @overload
    async def result(self, output: str) -> Raster: ...
    async def result(self, output: str | None = None) -> T | Raster:
        """`Job.result`, awaited."""
        answer = await self._client.run(flows.result(self, output))
        return cast("T", answer)

    async def cancel(self) -> None:
        """End the job; what it has done is lost."""
        await self._client.run(flows.cancel(self))

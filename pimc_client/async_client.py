"""The asynchronous client: `AsyncClient` and `AsyncJob`, which need asyncio.

The synchronous client, `client.py`, is generated from this file by
`scripts/generate_sync_client.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack, cast, overload

from pimc_client import operations
from pimc_client.inputs import (
    AnswerKind,
    ClassOptions,
    ClassOutputs,
    Date,
    EmbeddingType,
    Fields,
    Files,
    JobOptions,
    LabelOptions,
    Modality,
    Points,
    QuantileOutputs,
    RasterOutput,
    Runnable,
    Series,
    SeveralOutputs,
    SimilarOutput,
    Task,
    WindowOptions,
)
from pimc_client.operations import Operation
from pimc_client.requests import Request, Response, base_url_of, client_headers
from pimc_client.responses import TaskResult
from pimc_client.results import (
    Embedding,
    Forecast,
    JobHandle,
    JobProgress,
    Measured,
    Model,
    Models,
    PixelClass,
    PointResult,
    Raster,
    Rasters,
    Readiness,
    Results,
    Summary,
    Table,
    Taught,
    new_file,
)
from pimc_client.retry import RetryPolicy

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")


class AsyncClient:
    """A connection to the server; close it, or use it as a context manager.

    The synchronous client may be shared between threads, the asynchronous one between the tasks of
    one event loop. Every method raises a `ServiceError` if the server responds with an error, and a
    `TransportError` if no response arrives. Imagery is read from disk piece by piece, and large
    results are stored on disk, so memory does not grow with the files.

    Args:
        base_url: the server's address, such as `http://127.0.0.1:8000`, with any path before the
            API's own.
        api_key: the API key, if the server requires one.
        timeout: seconds without a byte from the server after which `TimedOut` is raised; None
            waits forever. Connecting is limited to 10 seconds. An `httpx.Timeout` sets each limit.
        transport: an httpx transport that replaces the network, for tests and special connections.
        retries: how often a request is sent again if the connection fails or the server is at
            capacity. Files that cannot be rewound are sent only once.

    Raises:
        ValueError: the base URL is not valid.
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

        from pimc_client.async_retry_transport import AsyncRetryTransport
        from pimc_client.http import proxy_for, timeouts

        self._base_url = base_url_of(base_url)
        self._proxy = None if transport else proxy_for(self._base_url)
        inner = transport or httpx.AsyncHTTPTransport(proxy=self._proxy)
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
        outputs: Literal["polygons"],
        points: None = None,
        fields: None = None,
        answer: Literal["raster"] = "raster",
        **options: Unpack[ClassOptions],
    ) -> Table: ...
    @overload
    async def classify_pixels(
        self,
        files: Files,
        *,
        outputs: RasterOutput | None = None,
        points: None = None,
        fields: None = None,
        answer: Literal["raster"] = "raster",
        **options: Unpack[ClassOptions],
    ) -> Raster: ...
    @overload
    async def classify_pixels(
        self,
        files: Files,
        *,
        outputs: SeveralOutputs,
        points: None = None,
        fields: None = None,
        answer: Literal["raster"] = "raster",
        **options: Unpack[ClassOptions],
    ) -> Rasters: ...
    @overload
    async def classify_pixels(
        self,
        files: Files,
        *,
        outputs: ClassOutputs | None = None,
        points: None = None,
        fields: None = None,
        answer: Literal["summary"],
        **options: Unpack[ClassOptions],
    ) -> Summary: ...
    @overload
    async def classify_pixels(
        self,
        files: Files,
        *,
        outputs: ClassOutputs | None = None,
        points: Points,
        fields: None = None,
        answer: Literal["raster"] = "raster",
        **options: Unpack[ClassOptions],
    ) -> Results[PointResult[PixelClass]]: ...
    @overload
    async def classify_pixels(
        self,
        files: Files,
        *,
        outputs: ClassOutputs | None = None,
        points: None = None,
        fields: Fields,
        answer: Literal["raster"] = "raster",
        **options: Unpack[ClassOptions],
    ) -> Table: ...
    async def classify_pixels(
        self,
        files: Files,
        *,
        outputs: ClassOutputs | None = None,
        points: Points | None = None,
        fields: Fields | None = None,
        answer: AnswerKind = "raster",
        **options: Unpack[ClassOptions],
    ) -> TaskResult:
        """Predict a class for every pixel of a satellite image time series.

        Args:
            files: the stack: paths of files, folders or zips, patterns, open binary files,
                `(name, bytes)`, references, `StacItems` or a `StacSearch`.
            outputs: `class` (the default), `confidence`, `entropy`, `probabilities`, `attribution`
                (of `classify_pixels`: how much each date mattered, a band per date) or
                `polygons` (one per connected area of the map); one name, or a list of names.
            points: return results only for these pixels: pairs of longitude and latitude,
                GeoJSON, or the path of a GeoJSON or CSV file.
            fields: return one result for each of these polygons: GeoJSON, the path of a GeoJSON,
                GeoParquet or GeoPackage file in any CRS, or a GeoPandas object.
            answer: `summary` returns a summary instead of a raster.
            **options: how the files are read: `model`, `layout`, `dates`, `bands`, `scale`,
                `offset`, `mask`; the first day of the time window, `start`; how the map is
                cleaned: `smooth`, a radius in pixels within which probabilities of neighbours
                count, and `min_area`, hectares below which an area joins a neighbour; `dtype`,
                `uint8` for `probabilities` in a quarter of the size or less; and `progress`,
                called during the upload with the bytes sent and the total.

        Returns:
            A `Raster`; `Rasters` by name if `outputs` is a list, `polygons` among their files; a
            `Summary`; with `points` one result for each; or for `polygons` and with `fields` a
            `Table`.

        Raises:
            ServiceError: the server responded with an error; each error code has its own class.
            TransportError: no response arrived.
            ValueError, TypeError, FileNotFoundError: an argument is not valid; nothing was sent.
        """
        return await self.run(
            operations.raster(
                "classify-pixels",
                files,
                outputs=outputs,
                points=points,
                fields=fields,
                answer=answer,
                **options,
            )
        )

    @overload
    async def forecast(
        self,
        files: Files,
        *,
        horizon: int | None = None,
        backtest: bool | None = None,
        outputs: QuantileOutputs | None = None,
        points: None = None,
        fields: None = None,
        answer: Literal["raster"] = "raster",
        **options: Unpack[WindowOptions],
    ) -> Raster: ...
    @overload
    async def forecast(
        self,
        files: Files,
        *,
        horizon: int | None = None,
        backtest: bool | None = None,
        outputs: QuantileOutputs | None = None,
        points: None = None,
        fields: None = None,
        answer: Literal["summary"],
        **options: Unpack[WindowOptions],
    ) -> Summary: ...
    @overload
    async def forecast(
        self,
        files: Files,
        *,
        horizon: int | None = None,
        backtest: bool | None = None,
        outputs: QuantileOutputs | None = None,
        points: Points,
        fields: None = None,
        answer: Literal["raster"] = "raster",
        **options: Unpack[WindowOptions],
    ) -> Results[PointResult[Forecast]]: ...
    @overload
    async def forecast(
        self,
        files: Files,
        *,
        horizon: int | None = None,
        backtest: bool | None = None,
        outputs: QuantileOutputs | None = None,
        points: None = None,
        fields: Fields,
        answer: Literal["raster"] = "raster",
        **options: Unpack[WindowOptions],
    ) -> Table: ...
    async def forecast(
        self,
        files: Files,
        *,
        horizon: int | None = None,
        backtest: bool | None = None,
        outputs: QuantileOutputs | None = None,
        points: Points | None = None,
        fields: Fields | None = None,
        answer: AnswerKind = "raster",
        **options: Unpack[WindowOptions],
    ) -> TaskResult:
        """Forecast NDVI, EVI and SAVI for every pixel.

        Args:
            files: the GeoTIFF stack, as for `classify_pixels`.
            horizon: number of steps ahead; the model's maximum if left out.
            backtest: True forecasts from earlier dates of the same stack as well, reports the
                errors and corrects the forecast by them; False does not. If left out, rasters and
                fields with enough history are backtested.
            outputs: any of `q10`, `q50` (the default) and `q90`.
            points: return results only for these pixels, as for `classify_pixels`.
            fields: return one result for each polygon, as for `classify_pixels`.
            answer: `summary` returns a summary instead of a raster.
            **options: as for `classify_pixels`.

        Returns:
            A `Raster` whose bands are `NDVI_2021-11-05_q50` and so on; a `Summary`; with `points`
            one result for each, or with `fields` a `Table`.
        """
        return await self.run(
            operations.raster(
                "forecast",
                files,
                horizon=horizon,
                backtest=backtest,
                outputs=outputs,
                points=points,
                fields=fields,
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
        outputs: Literal["polygons"],
        points: None = None,
        answer: Literal["raster"] = "raster",
        **options: Unpack[LabelOptions],
    ) -> Table: ...
    @overload
    async def landcover(
        self,
        files: Files,
        *,
        stride: int | None = None,
        outputs: RasterOutput | None = None,
        points: None = None,
        answer: Literal["raster"] = "raster",
        **options: Unpack[LabelOptions],
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
        **options: Unpack[LabelOptions],
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
        **options: Unpack[LabelOptions],
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
        **options: Unpack[LabelOptions],
    ) -> Results[PointResult[PixelClass]]: ...
    async def landcover(
        self,
        files: Files,
        *,
        stride: int | None = None,
        outputs: ClassOutputs | None = None,
        points: Points | None = None,
        answer: AnswerKind = "raster",
        **options: Unpack[LabelOptions],
    ) -> TaskResult:
        """Predict EuroSAT land-cover labels from imagery, one for each patch of 64 x 64 pixels.

        Args:
            files: imagery of one date or many, as for `classify_pixels`.
            stride: pixels between labelled patches, 1 to 64 (the default).
            outputs: as for `classify_pixels`.
            points: return results only for the patches at these points, as for
                `classify_pixels`.
            answer: `summary` returns a summary instead of a raster.
            **options: as for `classify_pixels`, without `start`, `smooth` and `min_area`.

        Returns:
            As `classify_pixels`, on a grid `stride` times coarser.
        """
        return await self.run(
            operations.raster(
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
        dtype: EmbeddingType | None = None,
        stride: int | None = None,
        points: None = None,
        fields: None = None,
        answer: Literal["raster"] = "raster",
        **options: Unpack[WindowOptions],
    ) -> Raster: ...
    @overload
    async def embed(
        self,
        files: Files,
        *,
        modality: Modality | None = None,
        dtype: EmbeddingType | None = None,
        stride: int | None = None,
        points: None = None,
        fields: None = None,
        answer: Literal["summary"],
        **options: Unpack[WindowOptions],
    ) -> Summary: ...
    @overload
    async def embed(
        self,
        files: Files,
        *,
        modality: Modality | None = None,
        dtype: EmbeddingType | None = None,
        stride: int | None = None,
        points: Points,
        fields: None = None,
        answer: Literal["raster"] = "raster",
        **options: Unpack[WindowOptions],
    ) -> Results[PointResult[Embedding]]: ...
    @overload
    async def embed(
        self,
        files: Files,
        *,
        modality: Modality | None = None,
        dtype: EmbeddingType | None = None,
        stride: int | None = None,
        points: None = None,
        fields: Fields,
        answer: Literal["raster"] = "raster",
        **options: Unpack[WindowOptions],
    ) -> Table: ...
    async def embed(
        self,
        files: Files,
        *,
        modality: Modality | None = None,
        dtype: EmbeddingType | None = None,
        stride: int | None = None,
        points: Points | None = None,
        fields: Fields | None = None,
        answer: AnswerKind = "raster",
        **options: Unpack[WindowOptions],
    ) -> TaskResult:
        """Compute the PIMC embedding of every pixel or patch.

        Args:
            files: the GeoTIFF stack, as for `classify_pixels`.
            modality: `pixel` (the default), from the time series; `patch`, from imagery.
            dtype: `float32` (the default), or `int8`, a quarter of the size: `values` of the
                raster multiplies by the scale that the file holds.
            stride: pixels between patches; only for `patch`.
            points: return results only for these places, as for `classify_pixels`.
            fields: return one result for each polygon, as for `classify_pixels`.
            answer: `summary` returns a summary instead of a raster.
            **options: as for `classify_pixels`; `start` only for `pixel`.

        Returns:
            A `Raster` with a band for each dimension; a `Summary`; with `points` one result for
            each, or with `fields` a `Table`.
        """
        return await self.run(
            operations.raster(
                "embed",
                files,
                modality=modality,
                dtype=dtype,
                stride=stride,
                points=points,
                fields=fields,
                answer=answer,
                **options,
            )
        )

    @overload
    async def similar(
        self,
        files: Files,
        *,
        points: Points | None = None,
        fields: Fields | None = None,
        outputs: SimilarOutput | None = None,
        answer: Literal["raster"] = "raster",
        **options: Unpack[WindowOptions],
    ) -> Raster: ...
    @overload
    async def similar(
        self,
        files: Files,
        *,
        points: Points | None = None,
        fields: Fields | None = None,
        outputs: list[SimilarOutput] | tuple[SimilarOutput, ...],
        answer: Literal["raster"] = "raster",
        **options: Unpack[WindowOptions],
    ) -> Rasters: ...
    @overload
    async def similar(
        self,
        files: Files,
        *,
        points: Points | None = None,
        fields: Fields | None = None,
        outputs: SimilarOutput | None = None,
        answer: Literal["summary"],
        **options: Unpack[WindowOptions],
    ) -> Summary: ...
    async def similar(
        self,
        files: Files,
        *,
        points: Points | None = None,
        fields: Fields | None = None,
        outputs: SimilarOutput | list[SimilarOutput] | tuple[SimilarOutput, ...] | None = None,
        answer: AnswerKind = "raster",
        **options: Unpack[WindowOptions],
    ) -> TaskResult:
        """Compute how similar the embedding of every pixel is to those of places.

        Args:
            files: the GeoTIFF stack, as for `classify_pixels`.
            points: the places: pairs of longitude and latitude, GeoJSON, or the path of a GeoJSON
                or CSV file.
            fields: the places: GeoJSON, the path of a GeoJSON, GeoParquet or GeoPackage file of
                points or polygons in any CRS, or a GeoPandas object. Give either points or fields.
            outputs: `similarity` (the default), the cosine similarity to the most similar place;
                `similarities`, a band for each place; or a list of both.
            answer: `summary` returns a summary instead of a raster.
            **options: as for `classify_pixels`; `model` is a model of `embed` on pixels.

        Returns:
            A `Raster` of cosine similarities, -1 to 1; `Rasters` by name if `outputs` is a list;
            or a `Summary`.
        """
        return await self.run(
            operations.similar(
                files, points=points, fields=fields, outputs=outputs, answer=answer, **options
            )
        )

    # Series ---------------------------------------------------------------------------------------

    async def measure(
        self,
        files: Files,
        *,
        points: Points | None = None,
        fields: Fields | None = None,
        plots: bool = False,
        **options: Unpack[WindowOptions],
    ) -> Measured:
        """Read the series of points or fields from a stack, without a prediction.

        Args:
            files: the GeoTIFF stack, as for `classify_pixels`.
            points: the pixels to read, as for `classify_pixels`.
            fields: the polygons to read, as for `classify_pixels`: the mean over their clear
                pixels. Give either points or fields.
            plots: add the recurrence plots of each point or field, as the model receives them.
            **options: as for `classify_pixels`; `model` and `start` are those of the plots.

        Returns:
            Reflectance, NDVI, EVI and SAVI by date, and the share of clear pixels, of each point
            or field.

        Raises:
            ValueError: neither points nor fields are given, or both.
        """
        return await self.run(
            operations.measure(files, points=points, fields=fields, plots=plots, **options)
        )

    async def classify_series(
        self,
        series: Iterable[Series],
        *,
        model: str | None = None,
        start: Date | None = None,
    ) -> Results[PixelClass]:
        """Predict a class for each series, in order.

        Args:
            series: pixels or fields through time.
            model: `name` or `name@version`; if left out, the default of `classify-pixels`.
            start: first day of the model's time window; the rule on the card if left out.
        """
        return await self.run(operations.classify_series(series, model=model, start=start))

    async def forecast_series(
        self,
        series: Iterable[Series],
        *,
        horizon: int | None = None,
        backtest: bool | None = None,
        model: str | None = None,
        start: Date | None = None,
    ) -> Results[Forecast]:
        """Forecast each series, in order.

        Args:
            series: pixels or fields through time.
            horizon: number of steps ahead; the model's maximum if left out.
            backtest: True forecasts from earlier dates of the series as well, and corrects the
                forecasts by the errors.
            model: `name` or `name@version`; if left out, the default of `forecast`.
            start: first day of the model's time window; the rule on the card if left out.
        """
        return await self.run(
            operations.forecast_series(
                series, horizon=horizon, backtest=backtest, model=model, start=start
            )
        )

    async def embed_series(
        self,
        series: Iterable[Series],
        *,
        model: str | None = None,
        start: Date | None = None,
    ) -> Results[Embedding]:
        """Compute the embedding of each series, in order.

        Args:
            series: pixels or fields through time.
            model: `name` or `name@version`; if left out, the default of `embed`.
            start: first day of the model's time window; the rule on the card if left out.
        """
        return await self.run(operations.embed_series(series, model=model, start=start))

    # Jobs -----------------------------------------------------------------------------------------

    @overload
    async def submit(
        self,
        task: Literal["similar"],
        files: Files,
        *,
        outputs: SimilarOutput | None = None,
        points: Points | None = None,
        fields: Fields | None = None,
        answer: Literal["raster"] = "raster",
        **options: Unpack[JobOptions],
    ) -> AsyncJob[Raster]: ...
    @overload
    async def submit(
        self,
        task: Task,
        files: Files,
        *,
        outputs: RasterOutput | QuantileOutputs | None = None,
        points: None = None,
        fields: None = None,
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
        fields: None = None,
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
        fields: None = None,
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
        fields: None = None,
        answer: Literal["raster"] = "raster",
        **options: Unpack[JobOptions],
    ) -> AsyncJob[Results[PointResult[Any]]]: ...
    @overload
    async def submit(
        self,
        task: Task,
        files: Files,
        *,
        outputs: ClassOutputs | QuantileOutputs | None = None,
        points: None = None,
        fields: Fields,
        answer: Literal["raster"] = "raster",
        **options: Unpack[JobOptions],
    ) -> AsyncJob[Table]: ...
    async def submit(
        self,
        task: Runnable,
        files: Files,
        *,
        outputs: ClassOutputs | QuantileOutputs | SimilarOutput | None = None,
        points: Points | None = None,
        fields: Fields | None = None,
        answer: AnswerKind = "raster",
        **options: Unpack[JobOptions],
    ) -> AsyncJob[Any]:
        """Start a task as a background job.

        Args:
            task: `classify-pixels`, `forecast`, `landcover`, `embed` or `similar`.
            files: the GeoTIFF stack, as for `classify_pixels`.
            outputs: as for the task's own method.
            points: as for the task's own method.
            fields: as for the task's own method.
            answer: as for the task's own method.
            **options: as for the task's own method, `idempotency_key`, and `subscriber`, the
                addresses that the job calls when it ends.

        Returns:
            The job; its `wait` returns the result that the task's own method would return.
        """
        operation = operations.submit(
            task, files, outputs=outputs, points=points, fields=fields, answer=answer, **options
        )
        return AsyncJob(self, await self.run(operation))

    async def validate(
        self,
        task: Runnable,
        files: Files,
        *,
        outputs: ClassOutputs | QuantileOutputs | SimilarOutput | None = None,
        points: Points | None = None,
        fields: Fields | None = None,
        **options: Unpack[JobOptions],
    ) -> dict[str, Any]:
        """Check a request without running it.

        Args:
            task: `classify-pixels`, `forecast`, `landcover`, `embed` or `similar`.
            files: the GeoTIFF stack, as for `classify_pixels`.
            outputs: as for the task's own method.
            points: as for the task's own method.
            fields: as for the task's own method.
            **options: those of the task's own method.

        Returns:
            `valid`; the `problem` with which the server would reject the request, or the `warnings`
            and an `estimate` of pixels, dates, bytes and seconds.
        """
        return await self.run(
            operations.validate(
                task, files, outputs=outputs, points=points, fields=fields, **options
            )
        )

    async def validate_series(
        self,
        task: Task,
        series: Iterable[Series],
        *,
        horizon: int | None = None,
        backtest: bool | None = None,
        model: str | None = None,
        start: Date | None = None,
    ) -> dict[str, Any]:
        """Check a request of series without running it.

        Args:
            task: `classify-pixels`, `forecast` or `embed`.
            series: pixels or fields through time.
            horizon: as for `forecast_series`.
            backtest: as for `forecast_series`.
            model: as for the task's own method.
            start: as for the task's own method.

        Returns:
            As `validate` does.
        """
        return await self.run(
            operations.validate_series(
                task, series, horizon=horizon, backtest=backtest, model=model, start=start
            )
        )

    async def job(self, job_id: str) -> AsyncJob[TaskResult]:
        """A job by its id, for example one that another program submitted.

        Raises:
            UnknownJob: this API key has no job of that id.
        """
        return AsyncJob(self, await self.run(operations.job(job_id)))

    async def jobs(self) -> list[AsyncJob[TaskResult]]:
        """All jobs of this API key on the server."""
        return [AsyncJob(self, handle) for handle in await self.run(operations.jobs())]

    # Own classes ----------------------------------------------------------------------------------

    async def teach(
        self,
        name: str,
        files: Files,
        labels: Fields,
        *,
        description: str | None = None,
        embedding: str | None = None,
        **options: Unpack[WindowOptions],
    ) -> Taught:
        """Make a model of own classes from labelled pixels, for `classify_pixels`.

        Args:
            name: name of the new model: lower-case letters, digits and hyphens.
            files: the GeoTIFF stack, as for `classify_pixels`. The model uses every band that the
                stack has at every date.
            labels: points or polygons with a property `class`; labels with the same property
                `place` are held out together in scoring. GeoJSON, the path of a GeoJSON,
                GeoPackage or GeoParquet file, or a GeoPandas object.
            description: description of the model, for its card.
            embedding: a model such as `embed-pixel`, whose embedding is tried as features too.
            **options: how the files are read, except `model`.

        Returns:
            The model's card, with its scores on held-out places, and warnings.

        Raises:
            TooFewLabels: there are fewer than two classes, or fewer than five usable labels of one.
            NameTaken: a model of that name exists.
        """
        operation = operations.teach(
            name, files, labels, description=description, embedding=embedding, **options
        )
        return await self.run(operation)

    async def teach_series(
        self,
        name: str,
        series: Iterable[Series],
        classes: Iterable[str],
        *,
        places: Iterable[str] | None = None,
        description: str | None = None,
        embedding: str | None = None,
        start: Date | None = None,
    ) -> Taught:
        """Make a model of own classes from labelled series, as `teach` does from a stack.

        Args:
            name: name of the new model, as for `teach`.
            series: pixels or fields; the model uses the bands that all of them have.
            classes: the class of each series.
            places: the place of each series; series of one place are held out together in scoring.
                If left out, each series counts as a place.
            description: description of the model, for its card.
            embedding: as for `teach`.
            start: first day of the time window; all dates if left out.

        Returns:
            The model's card, with its scores on held-out places, and warnings.

        Raises:
            TooFewLabels, NameTaken: as for `teach`.
            ValueError: the numbers of series, classes and places differ.
        """
        operation = operations.teach_series(
            name, series, classes, places=places, description=description, embedding=embedding,
            start=start,
        )  # fmt: skip
        return await self.run(operation)

    async def own_models(self) -> tuple[Model, ...]:
        """The models of own classes that belong to this API key."""
        return await self.run(operations.own_models())

    async def delete_model(self, name: str) -> None:
        """Remove a model of own classes that belongs to this API key.

        Raises:
            UnknownModel: this API key has no model of that name.
        """
        await self.run(operations.delete_model(name))

    # The server -----------------------------------------------------------------------------------

    async def models(self) -> Models:
        """The server's models, and the default of each task."""
        return await self.run(operations.models())

    async def model(self, name: str) -> Model:
        """One model's card, by `name` or `name@version`."""
        return await self.run(operations.model(name))

    async def ready(self) -> Readiness:
        """Readiness of the server; true in a condition if it is ready, else with the reason."""
        return await self.run(operations.ready())

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<AsyncClient of {self._base_url}>"

    # Running operations ---------------------------------------------------------------------------

    async def run(self, operation: Operation[T]) -> T:
        """Run an operation: send its requests and pass it the responses."""
        import asyncio  # slow to import, and `import pimc_client` need not wait for it

        try:
            request = next(operation)
            while True:
                await asyncio.sleep(request.delay)
                request = operation.send(await self._send(request))
        except StopIteration as end:
            return cast("T", end.value)

    async def _send(self, request: Request) -> Response:
        from pimc_client.http import extensions, translated_errors

        body = new_file()
        try:
            with translated_errors(self._base_url, self._proxy):
                async with self._http.stream(
                    request.method,
                    request.path,
                    headers=request.all_headers(),
                    content=request.acontent(),
                    extensions=extensions(request),
                ) as response:
                    async for piece in response.aiter_bytes():
                        body.write(piece)
        except BaseException:
            body.close()
            raise
        return Response(status=response.status_code, headers=response.headers, body=body)


class AsyncJob(JobHandle[T]):
    """A job on the server."""

    def __init__(self, client: AsyncClient, handle: JobHandle[Any]) -> None:
        super().__init__(handle.state, accept=handle.accept, output=handle.output)
        self._client = client

    async def refresh(self) -> AsyncJob[T]:
        """Read the job's state from the server."""
        await self._client.run(operations.refresh(self))
        return self

    async def wait(self, progress: JobProgress | None = None, timeout: float | None = None) -> T:
        """Wait until the job has finished.

        Args:
            progress: called with the percentage done, each time it has changed.
            timeout: the longest wait in seconds; None waits forever.

        Returns:
            The result.

        Raises:
            ServiceError: the job failed with this error.
            JobFailed: the job failed, and the server gives no reason.
            JobDismissed: the job was cancelled.
            WaitTimedOut: the job is still running; `wait` may be called again.
        """
        return cast("T", await self._client.run(operations.wait(self, progress, timeout)))

    @overload
    async def result(self) -> T: ...
    @overload
    async def result(
        self, output: str, *, smooth: int | None = None, min_area: float | None = None
    ) -> Raster: ...
    async def result(
        self,
        output: str | None = None,
        *,
        smooth: int | None = None,
        min_area: float | None = None,
    ) -> T | Raster:
        """The result of a job that has finished, or one output of it.

        Args:
            output: name of one output, such as `confidence`; all of the result if left out.
            smooth: only for `class`: radius of the smoothing of the finished map, in pixels; the
                job must have the output `probabilities`.
            min_area: only for `class`: areas below this size, in hectares, join a neighbour.

        Raises:
            ResultNotReady: the job has not finished.
            ServiceError, JobFailed, JobDismissed: as for `wait`.
        """
        operation = operations.result(self, output, smooth=smooth, min_area=min_area)
        return cast("T", await self._client.run(operation))

    async def item(self) -> Mapping[str, Any]:
        """The STAC Item of the job's rasters, its assets linked to the server.

        Raises:
            NotFound: the result is not a raster.
            ResultNotReady: the job has not finished.
        """
        return await self._client.run(operations.item(self))

    async def cancel(self) -> None:
        """Cancel the job; its unfinished work is lost."""
        await self._client.run(operations.cancel(self))

"""The `pimc` command: the client's methods as subcommands."""

# No `from __future__ import annotations` here: typer needs the types at run time.
import functools
import inspect
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

try:
    import typer
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.table import Column
    from rich.table import Table as TextTable
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in {"typer", "rich"}:
        raise
    sys.exit(
        "the pimc command needs typer and rich, which are not installed: "
        "pip install 'pimc-client[command]'"
    )

from pimc_client import operations
from pimc_client.client import Client
from pimc_client.errors import PIMCError
from pimc_client.inputs import (
    EmbeddingType,
    Layout,
    Modality,
    ProbabilityType,
    Runnable,
    Sensor,
    Series,
    Task,
)
from pimc_client.requests import __version__
from pimc_client.responses import TaskResult
from pimc_client.results import (
    JobHandle,
    Measured,
    Raster,
    Rasters,
    Results,
    Summary,
    Table,
    Taught,
    check_table,
)
from pimc_client.stack import BANDS, COLLECTION, EARTH_SEARCH, fetch_stack
from pimc_client.tables import csv_text, flat_record, series_of_file
from pimc_client.uploads import decoded_name

T = TypeVar("T")

app = typer.Typer(
    name="pimc",
    help="Land cover and vegetation forecasts from satellite image time series.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
jobs_app = typer.Typer(
    help="List the server's jobs, show one, fetch its result, or cancel it.",
    invoke_without_command=True,
)
app.add_typer(jobs_app, name="jobs")

STANDARD_OUTPUT = Path("-")
_SERIES_SUFFIXES = frozenset({".csv", ".json"})

# Arguments and options, in the order in which help lists them.
Stack = Annotated[
    list[Path],
    typer.Argument(
        metavar="FILE...",
        help="GeoTIFFs of the stack: files, folders (all rasters in them), zips, or patterns such "
        "as 'stack/*.tif'.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="File to write, or folder if several outputs are requested; '-' writes to standard "
        "output.",
    ),
]
ClassOutputs = Annotated[
    str | None,
    typer.Option(
        "--output",
        help="Comma-separated: class (default), confidence, entropy, probabilities, polygons; with "
        "classify-pixels also attribution, a band per date.",
    ),
]
Quantiles = Annotated[
    str | None, typer.Option("--output", help="Comma-separated: q10, q50 (default), q90.")
]
PlacesFile = Annotated[
    Path | None,
    typer.Option(
        "--points",
        help="GeoJSON or CSV file of points (columns lon and lat, in degrees).",
        exists=True,
        dir_okay=False,
    ),
]
AsSummary = Annotated[
    bool, typer.Option("--summary", help="Return a summary as JSON instead of a raster.")
]
PointsFile = Annotated[
    Path | None,
    typer.Option(
        "--points",
        help="GeoJSON or CSV file of points (columns lon and lat, in degrees): return results of "
        "only these pixels, as JSON.",
        exists=True,
        dir_okay=False,
    ),
]
AsJob = Annotated[
    bool, typer.Option("--job", help="Start a background job and print its id; see 'pimc jobs'.")
]
ModelName = Annotated[
    str | None, typer.Option("--model", help="name or name@version, from 'pimc models'.")
]
LayoutOption = Annotated[
    Layout | None,
    typer.Option(
        "--layout",
        help="How dates and bands are distributed over the files; default: detected from them.",
    ),
]
Dates = Annotated[
    str | None,
    typer.Option(
        "--dates",
        help="ISO dates, comma-separated: one per file, per band of a file-per-band file, or per "
        "date of a single file; default: read from tags, names and descriptions.",
    ),
]
Bands = Annotated[
    str | None,
    typer.Option(
        "--bands",
        help="Sentinel-2 band names, comma-separated, in band order; default: read from tags, "
        "names and descriptions.",
    ),
]
Scale = Annotated[
    str | None,
    typer.Option(
        "--scale",
        help="Reflectance = value x scale + offset; 2022-01-25:0.0001 applies from that date on.",
    ),
]
Offset = Annotated[
    str | None,
    typer.Option(
        "--offset",
        help="Reflectance = value x scale + offset; 2022-01-25:-0.1 applies from that date on, "
        "04.00:-0.1 from that processing baseline on.",
    ),
]
Mask = Annotated[
    str | None,
    typer.Option(
        "--mask",
        help="How cloudy pixels are identified: auto (default) by the masks in the files, none "
        "only by nodata, or comma-separated rules: scl, fmask, qa_pixel, clm, qai, udm2, cloud, "
        "cldprb:40, clp:40, cs:60, qa60 and others. If the files hold no mask, cloud computes one "
        "from the series.",
    ),
]
SensorOption = Annotated[
    Sensor | None,
    typer.Option(
        "--sensor", help="Satellite sensor; default: detected from names, tags and bands."
    ),
]
GridOption = Annotated[
    str | None,
    typer.Option(
        "--grid",
        help="Output grid: strict, finest, a CRS and pixel size such as EPSG:32631@10, or the name "
        "of the file whose grid is used.",
    ),
]
BBox = Annotated[
    str | None,
    typer.Option(
        "--bbox",
        help="west,south,east,north in degrees: only this part is read and returned.",
    ),
]
AreaFile = Annotated[
    Path | None,
    typer.Option(
        "--area",
        help="GeoJSON file of one polygon: only this part is read and returned.",
        exists=True,
        dir_okay=False,
    ),
]
Start = Annotated[
    str | None,
    typer.Option(
        "--start",
        help="First day of the model's time window, as ISO date; default: by the card's rule.",
    ),
]
Stride = Annotated[
    int | None, typer.Option("--stride", help="Pixels between patches, 1 to 64 (default).")
]
Horizon = Annotated[
    int | None, typer.Option("--horizon", help="Steps ahead; default: the model's maximum.")
]
Backtest = Annotated[
    bool | None,
    typer.Option(
        "--backtest/--no-backtest",
        help="Test the forecast on earlier dates of the same input and correct it; default: "
        "rasters and fields with enough history.",
        show_default=False,
    ),
]
ModalityOption = Annotated[
    Modality | None,
    typer.Option("--modality", help="Embeddings of pixel time series (default) or of patches."),
]
DtypeOption = Annotated[
    EmbeddingType | None,
    typer.Option("--dtype", help="Number type of embeddings; int8 takes a quarter of the space."),
]
ProbabilityDtypeOption = Annotated[
    ProbabilityType | None,
    typer.Option(
        "--dtype", help="Number type of probabilities; uint8 takes a quarter of the space or less."
    ),
]
Smooth = Annotated[
    int | None,
    typer.Option(
        "--smooth",
        help="Radius in pixels: probabilities of neighbours count before the class is taken.",
    ),
]
MinArea = Annotated[
    float | None,
    typer.Option(
        "--min-area",
        help="Hectares: smaller areas join the neighbour with the longest shared edge.",
    ),
]
FieldsFile = Annotated[
    Path | None,
    typer.Option(
        "--fields",
        help="GeoJSON, GeoParquet or GeoPackage file of fields, in any CRS.",
        exists=True,
        dir_okay=False,
    ),
]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
URL_HELP = "Base URL of the server; also accepted after the subcommand."
KEY_HELP = "API key, if the server requires one; also accepted after the subcommand."
TIMEOUT_HELP = "Seconds to wait without a byte from the server; also accepted after the subcommand."


class UsageError(ValueError):
    """Options exclude each other, or an output path cannot be written."""


def main() -> None:
    """Run the command; an error is printed on one line, with status 2 for wrong usage, else 1."""
    try:
        app()
    except UsageError as error:
        typer.echo(f"pimc: {error}", err=True)
        sys.exit(2)
    # `ValueError`, `OSError` and a damaged zip concern the user's input or files; `ImportError`
    # concerns a library to install, for example for a SOCKS proxy.
    except (PIMCError, OSError, ValueError, ImportError, zipfile.BadZipFile) as error:
        sys.exit(f"pimc: {' '.join(str(error).split())}")


# --- options that subcommands share ---------------------------------------------------------------


def _with(**shared: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the options of other functions to a subcommand.

    Args:
        **shared: functions whose parameters become options; the return value of each becomes the
            subcommand's argument of that name.
    """
    signatures = {name: inspect.signature(function) for name, function in shared.items()}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command).parameters.values()
        added = [p for signature in signatures.values() for p in signature.parameters.values()]
        parameters = {p.name: p for p in [*own, *added] if p.name not in shared}

        @functools.wraps(command)
        def run(**values: Any) -> None:  # noqa: ANN401 (any option)
            mine = {p.name: values[p.name] for p in own if p.name in values}
            given = {
                name: function(**{key: values[key] for key in signatures[name].parameters})
                for name, function in shared.items()
            }
            command(**mine, **given)

        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined] # `inspect` reads it
            [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters.values()]
        )
        return run

    return decorate


def _version(requested: bool) -> None:
    if requested:
        typer.echo(f"pimc {__version__}")
        raise typer.Exit


@app.callback()
def connection(
    context: typer.Context,
    url: Annotated[str, typer.Option(envvar="PIMC_URL", help=URL_HELP)] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(envvar="PIMC_API_KEY", help=KEY_HELP)] = None,
    timeout: Annotated[float, typer.Option(help=TIMEOUT_HELP, min=0)] = 600.0,
    version: Annotated[  # noqa: ARG001 (its callback has done the work)
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Land cover and vegetation forecasts from satellite image time series."""
    context.obj = {"url": url, "api_key": api_key, "timeout": timeout}


def _client(
    context: typer.Context,
    url: Annotated[str | None, typer.Option(help="Base URL of the server.")] = None,
    api_key: Annotated[str | None, typer.Option(help="API key.")] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds to wait without a byte from the server.", min=0)
    ] = None,
) -> Client:
    """A client; options after the subcommand take precedence over those before it."""
    after = {"url": url, "api_key": api_key, "timeout": timeout}
    given: dict[str, Any] = {
        name: context.obj[name] if value is None else value for name, value in after.items()
    }
    context.obj |= given  # passes the options of `jobs --url …` to the subcommands of `jobs`
    options = {"api_key": given["api_key"], "timeout": given["timeout"]}
    client: Client = context.with_resource(Client(given["url"], **options))
    return client


def _reading(
    model: ModelName = None,
    layout: LayoutOption = None,
    dates: Dates = None,
    bands: Bands = None,
    scale: Scale = None,
    offset: Offset = None,
    mask: Mask = None,
    sensor: SensorOption = None,
    grid: GridOption = None,
    bbox: BBox = None,
    area: AreaFile = None,
) -> dict[str, Any]:
    """The options of every raster request."""
    return {
        "model": model, "layout": layout, "dates": dates, "bands": bands, "scale": scale,
        "offset": offset, "mask": mask, "sensor": sensor, "grid": grid, "bbox": bbox, "area": area,
    }  # fmt: skip


class _Delivery:
    """Destination of a result, checked before anything is sent.

    Raises:
        UsageError: the output options exclude each other, or the path cannot be written.
    """

    def __init__(
        self,
        out: Out = None,
        summary: AsSummary = False,
        points: PointsFile = None,
        job: AsJob = False,
    ) -> None:
        self.out, self.summary, self.points, self.job = out, summary, points, job

    def check(self, outputs: str | list[str] | None) -> None:
        """Reject options that exclude each other, and a path that cannot be written."""
        if self.summary and self.points is not None:
            raise UsageError("--summary and --points exclude each other: leave one out")
        if self.job:
            if self.out is not None:
                raise UsageError(
                    "--job prints the id of a job that has no result yet: leave out -o, and later "
                    "run 'pimc jobs result ID -o FILE'"
                )
            return
        if not self.is_raster:
            if self.out is not None and self.out != STANDARD_OUTPUT:
                _check_file(self.out)
            return
        if self.out is None:
            raise UsageError(
                "the result is a raster: name the file to write with -o, or use --summary, "
                "--points or --job"
            )
        _check_raster_target(self.out, several=isinstance(outputs, list))
        if outputs == "polygons" and self.out != STANDARD_OUTPUT:
            check_table(self.out)

    @property
    def is_raster(self) -> bool:
        """Whether the result is one raster or several."""
        return not self.summary and self.points is None


@app.command("classify-pixels")
@_with(delivery=_Delivery, reading=_reading, client=_client)
def classify_pixels(
    files: Stack,
    *,
    delivery: _Delivery,
    output: ClassOutputs = None,
    smooth: Smooth = None,
    min_area: MinArea = None,
    dtype: ProbabilityDtypeOption = None,
    start: Start = None,
    reading: dict[str, Any],
    client: Client,
) -> None:
    """Predict a class for every pixel of a satellite image time series."""
    options = {
        "smooth": smooth, "min_area": min_area, "dtype": dtype, "start": start, **reading
    }  # fmt: skip
    _raster(client, "classify-pixels", files, delivery, _outputs(output), **options)


@app.command()
@_with(delivery=_Delivery, reading=_reading, client=_client)
def forecast(
    files: Stack,
    *,
    delivery: _Delivery,
    output: Quantiles = None,
    horizon: Horizon = None,
    backtest: Backtest = None,
    start: Start = None,
    reading: dict[str, Any],
    client: Client,
) -> None:
    """Forecast NDVI, EVI and SAVI for every pixel."""
    # Quantiles are bands of one file, so several quantiles are still one output.
    options = {"horizon": horizon, "backtest": backtest, "start": start, **reading}
    _raster(client, "forecast", files, delivery, output, **options)


@app.command()
@_with(delivery=_Delivery, reading=_reading, client=_client)
def landcover(
    files: Stack,
    *,
    delivery: _Delivery,
    output: ClassOutputs = None,
    stride: Stride = None,
    dtype: ProbabilityDtypeOption = None,
    reading: dict[str, Any],
    client: Client,
) -> None:
    """Predict EuroSAT land-cover labels from imagery, one per patch of 64 x 64 pixels."""
    options = {"stride": stride, "dtype": dtype, **reading}
    _raster(client, "landcover", files, delivery, _outputs(output), **options)


@app.command()
@_with(delivery=_Delivery, reading=_reading, client=_client)
def embed(
    files: Stack,
    *,
    delivery: _Delivery,
    modality: ModalityOption = None,
    dtype: DtypeOption = None,
    stride: Stride = None,
    start: Start = None,
    reading: dict[str, Any],
    client: Client,
) -> None:
    """Compute the PIMC embedding of every pixel or patch."""
    options = {
        "modality": modality, "dtype": dtype, "stride": stride, "start": start, **reading
    }  # fmt: skip
    _raster(client, "embed", files, delivery, None, **options)


@app.command()
@_with(reading=_reading, client=_client)
def similar(
    files: Stack,
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="GeoTIFF to write; a folder for several outputs.",
        ),
    ] = None,
    polygons: Annotated[
        Path | None,
        typer.Option(
            "--fields",
            help="GeoJSON, GeoParquet or GeoPackage file of points or polygons, in any CRS.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    points: PlacesFile = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            help="similarity (default): to the most similar place; similarities: a band for each "
            "place; or both, comma-separated.",
        ),
    ] = None,
    job: Annotated[bool, typer.Option("--job", help="Start a job and print its id.")] = False,
    start: Start = None,
    reading: dict[str, Any],
    client: Client,
) -> None:
    """Compute how similar the embedding of every pixel is to those of points or fields."""
    if (polygons is None) == (points is None):
        count = "neither is" if points is None else "both are"
        raise UsageError(
            f"--fields and --points: {count} given; give one of them, the fields or points to "
            "compare with"
        )
    if job == (out is not None):
        raise UsageError("give either -o, the file to write, or --job")
    outputs = _outputs(output)
    if out is not None:
        _check_raster_target(out, several=isinstance(outputs, list))
    given = {"fields": polygons, "points": points, "outputs": outputs, "start": start, **reading}
    with _bars() as bars:
        given["progress"] = bars.uploaded
        if job:
            begun: JobHandle[Any] = client.run(operations.submit("similar", files, **given))
        else:
            found = client.run(operations.similar(files, job_progress=bars.computed, **given))
    if job:
        typer.echo(begun.id)
        return
    _print_warnings(found)
    _deliver(found, out)


@app.command()
@_with(reading=_reading, client=_client)
def fields(
    files: Stack,
    polygons: Annotated[
        Path,
        typer.Argument(
            help="GeoJSON, GeoParquet or GeoPackage file of fields, in any CRS.",
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ],
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="File to write: .csv, .geojson, .gpkg or .parquet; default: print GeoJSON.",
        ),
    ] = None,
    task: Annotated[
        Literal["classify-pixels", "forecast", "embed"],
        typer.Option("--task", help="The task to run for each field."),
    ] = "classify-pixels",
    horizon: Horizon = None,
    dtype: DtypeOption = None,
    backtest: Backtest = None,
    start: Start = None,
    reading: dict[str, Any],
    client: Client,
) -> None:
    """Run a task on each field of a file: one row per polygon, with its id and properties."""
    if out is not None and out != STANDARD_OUTPUT:
        _check_file(out)
        check_table(out)
    options = {"horizon": horizon, "dtype": dtype, "backtest": backtest, "start": start, **reading}
    with _bars() as bars:
        operation = operations.raster(
            task, files, fields=polygons, progress=bars.uploaded, job_progress=bars.computed,
            **options,
        )  # fmt: skip
        result = client.run(operation)
    _print_warnings(result)
    _deliver(result, out)


@app.command()
@_with(reading=_reading, client=_client)
def validate(
    task: Annotated[
        Literal["classify-pixels", "forecast", "landcover", "embed", "similar"],
        typer.Argument(
            help="classify-pixels, forecast, landcover, embed or similar.", show_default=False
        ),
    ],
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="GeoTIFFs of the stack, as for the task; or one CSV or JSON file of series, as "
            "for 'pimc series'.",
            show_default=False,
        ),
    ],
    *,
    polygons: FieldsFile = None,
    points: PointsFile = None,
    output: Annotated[
        str | None, typer.Option("--output", help="Comma-separated outputs, as for the task.")
    ] = None,
    smooth: Smooth = None,
    min_area: MinArea = None,
    horizon: Horizon = None,
    backtest: Backtest = None,
    stride: Stride = None,
    modality: ModalityOption = None,
    dtype: Annotated[
        Literal["float32", "int8", "uint8"] | None,
        typer.Option("--dtype", help="Number type of embeddings or probabilities."),
    ] = None,
    start: Start = None,
    reading: dict[str, Any],
    client: Client,
) -> None:
    """Check a request without running it: problem, warnings, and an estimate of its size."""
    options = {
        "fields": polygons, "points": points, "outputs": _outputs(output), "smooth": smooth,
        "min_area": min_area, "horizon": horizon, "backtest": backtest, "stride": stride,
        "modality": modality, "dtype": dtype, "start": start, **reading,
    }  # fmt: skip
    with _bars() as bars:
        if len(files) == 1 and files[0].suffix.lower() in _SERIES_SUFFIXES:
            found = client.run(_validation_of_series(task, files[0], options))
        else:
            operation = operations.validate(task, files, progress=bars.uploaded, **options)
            found = client.run(operation)
    _print_json(found)
    if not found["valid"]:
        raise typer.Exit(1)


def _validation_of_series(
    task: Runnable, file: Path, options: Mapping[str, Any]
) -> operations.Operation[dict[str, Any]]:
    """The validation of a file of series.

    Raises:
        UsageError: the task takes no series, or an option is one of imagery.
    """
    if task == "landcover" or task == "similar":
        raise UsageError(f"{task} takes imagery, and {file} holds series: give GeoTIFFs")
    of_series = {"model", "start", "horizon", "backtest"}
    given = {name: value for name, value in options.items() if value is not None}
    if others := sorted(given.keys() - of_series):
        raise UsageError(
            f"{', '.join(others)}: for imagery only, and {file} holds series: leave out "
            f"{'it' if len(others) == 1 else 'them'}"
        )
    return operations.validate_series(task, _series_in(file), **given)


def _series_in(file: Path) -> list[Series]:
    """The series of a CSV or JSON file.

    Raises:
        ValueError: the file is not of this form, or a value is not a number.
    """
    try:
        return [
            Series(id=s.id, dates=s.dates, lon=s.lonlat[0], lat=s.lonlat[1], **s.bands)
            for s in series_of_file(file)
        ]
    except TypeError as error:
        raise ValueError(f"{file}: {error}") from error


@app.command()
@_with(reading=_reading, client=_client)
def measure(
    files: Stack,
    *,
    polygons: FieldsFile = None,
    points: PlacesFile = None,
    plots: Annotated[
        bool, typer.Option("--plots", help="Add the recurrence plots, as the model receives them.")
    ] = False,
    start: Start = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="File to write: .csv with one row per point or field and date, or GeoJSON; "
            "default: print GeoJSON.",
        ),
    ] = None,
    reading: dict[str, Any],
    client: Client,
) -> None:
    """Read reflectance, NDVI, EVI and SAVI by date of fields or points, without a prediction."""
    if (polygons is None) == (points is None):
        count = "neither is" if polygons is None else "both are"
        raise UsageError(
            f"--fields and --points: {count} given; give one of them, the fields or points to "
            "measure"
        )
    if out is not None and out != STANDARD_OUTPUT:
        _check_file(out)
    with _bars() as bars:
        found = client.run(
            operations.measure(
                files, fields=polygons, points=points, plots=plots, start=start,
                progress=bars.uploaded, **reading,
            )
        )  # fmt: skip
    _print_warnings(found)
    if out is None or out == STANDARD_OUTPUT:
        _print_json(found.document)
    else:
        typer.echo(_shown(found.save(out)), err=True)


@app.command()
def stack(
    *,
    bbox: Annotated[
        str, typer.Option("--bbox", help="west,south,east,north in degrees.", show_default=False)
    ],
    start: Annotated[
        str, typer.Option("--start", help="First day, as ISO date.", show_default=False)
    ],
    end: Annotated[str, typer.Option("--end", help="Last day, as ISO date.", show_default=False)],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Folder of the stack: one GeoTIFF per date, and a STAC item beside each. Dates "
            "that the folder holds already are not fetched again.",
            file_okay=False,
            show_default=False,
        ),
    ],
    stac: Annotated[
        str, typer.Option("--stac", envvar="PIMC_STAC_URL", help="Landing page of the STAC API.")
    ] = EARTH_SEARCH,
    collection: Annotated[
        str, typer.Option("--collection", help="Id of the collection in the API.")
    ] = COLLECTION,
    bands: Annotated[
        str, typer.Option("--bands", help="Comma-separated Sentinel-2 bands; SCL is added.")
    ] = ",".join(BANDS),
    max_cloud_cover: Annotated[
        float | None,
        typer.Option(
            "--max-cloud-cover",
            help="Largest cloud cover of an image, in per cent; cloudier images are left out.",
            min=0,
            max=100,
        ),
    ] = None,
) -> None:
    """Fetch a Sentinel-2 stack of an area from a STAC API; needs a network, but no server."""
    try:
        box = [float(number) for number in bbox.split(",")]
    except ValueError:
        raise UsageError(f"--bbox: '{bbox}' is not west,south,east,north in degrees") from None
    with _bars() as bars:
        paths = fetch_stack(
            out, bbox=box, start=start, end=end, url=stac, collection=collection,
            bands=bands.split(","), max_cloud_cover=max_cloud_cover, progress=bars.fetched,
        )  # fmt: skip
    typer.echo(f"{len(paths)} dates in {out}", err=True)


@app.command()
@_with(client=_client)
def series(
    task: Annotated[
        Literal["classify-pixels", "forecast", "embed"],
        typer.Argument(help="classify-pixels, forecast or embed.", show_default=False),
    ],
    file: Annotated[
        Path,
        typer.Argument(
            help="CSV with one row per observation (columns id, date, and one per band, such as "
            "B02; also lon and lat, in degrees), or JSON with a list of series.",
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ],
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="File to write: CSV if it ends in .csv, else JSON; default: print."
        ),
    ] = None,
    model: ModelName = None,
    horizon: Horizon = None,
    backtest: Backtest = None,
    start: Start = None,
    client: Client,
) -> None:
    """Run a task on pixel or field series of a file, without a raster."""
    if out is not None and out != STANDARD_OUTPUT:
        _check_file(out)
    if horizon is not None and task != "forecast":
        raise UsageError(f"--horizon is an option of forecast, not of {task}: leave it out")
    given = _series_in(file)
    if backtest is not None and task != "forecast":
        raise UsageError(f"--backtest is an option of forecast, not of {task}: leave it out")
    options = {"horizon": horizon, "backtest": backtest} if task == "forecast" else {}
    found = client.run(operations.series(task, given, dict, model=model, start=start, **options))
    _print_warnings(found)
    _write_records(found, out)


# --- own classes ----------------------------------------------------------------------------------


@app.command()
@_with(reading=_reading, client=_client)
def teach(
    name: Annotated[
        str,
        typer.Argument(
            help="Name of the new model: lower-case letters, digits and hyphens.",
            show_default=False,
        ),
    ],
    files: Stack,
    *,
    labels: Annotated[
        Path,
        typer.Option(
            "--labels",
            "-l",
            help="GeoJSON, GeoPackage or GeoParquet file of points or polygons with a property "
            "'class'; labels with the same property 'place' are held out together in scoring.",
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ],
    description: Annotated[
        str | None, typer.Option("--description", help="Description of the model, for its card.")
    ] = None,
    embedding: Annotated[
        str | None,
        typer.Option(
            "--embedding",
            help="Model such as embed-pixel, whose embedding is tried as features too.",
        ),
    ] = None,
    start: Start = None,
    as_json: AsJSON = False,
    reading: dict[str, Any],
    client: Client,
) -> None:
    """Make a model of own classes from labels, for 'pimc classify-pixels --model NAME'."""
    if reading.pop("model") is not None:
        raise UsageError("--model is not an option of teach: leave it out; NAME is the new model")
    with _bars() as bars:
        operation = operations.teach(
            name, files, labels, description=description, embedding=embedding, start=start,
            progress=bars.uploaded, **reading,
        )  # fmt: skip
        found = client.run(operation)
    _print_warnings(found)
    if as_json:
        _print_json(found.model.card)
        return
    metrics = found.model.metrics
    interval = metrics["macro_f1_interval"]  # labels of a single place have none
    between = "" if interval is None else f" ({interval[0]:.2f} to {interval[1]:.2f})"
    typer.echo(
        f"{found.model.id}: macro-F1 {metrics['macro_f1']:.2f}{between}, accuracy "
        f"{metrics['accuracy']:.2f}, on {metrics['split']}"
    )
    rows = [
        (entry.name, str(metrics["labels"][entry.name]), "" if f1 is None else f"{f1:.2f}")
        for entry, f1 in zip(found.model.classes, metrics["f1"], strict=True)
    ]
    _print_table(("class", "labels", "F1"), rows)


@app.command()
@_with(client=_client)
def forget(
    name: Annotated[
        str, typer.Argument(help="Name of a model made with 'pimc teach'.", show_default=False)
    ],
    *,
    client: Client,
) -> None:
    """Remove a model of your own classes."""
    client.delete_model(name)
    typer.echo(f"{name} removed")


# --- jobs -----------------------------------------------------------------------------------------

JobId = Annotated[str, typer.Argument(metavar="ID", help="Id of the job.", show_default=False)]


@jobs_app.callback()
@_with(client=_client)
def jobs(context: typer.Context, *, as_json: AsJSON = False, client: Client) -> None:
    """List the server's jobs, show one, fetch its result, or cancel it."""
    if context.invoked_subcommand is not None:
        return
    listed = client.jobs()
    if as_json:
        _print_json([dict(job.state.document) for job in listed])
        return
    rows = [
        (
            job.id,
            job.task,
            job.status,
            f"{job.progress:g} %",
            f"{job.state.created:%Y-%m-%d %H:%M}" if job.state.created else "",
        )
        for job in listed
    ]
    _print_table(("id", "task", "status", "progress", "created"), rows)


@jobs_app.command("show")
@_with(client=_client)
def show_job(job: JobId, *, client: Client) -> None:
    """Print a job's state as JSON."""
    _print_json(dict(client.job(job).state.document))


@jobs_app.command("result")
@_with(client=_client)
def job_result(
    job: JobId,
    *,
    out: Out = None,
    output: Annotated[
        str | None, typer.Option("--output", help="One output of several, such as confidence.")
    ] = None,
    smooth: Annotated[
        int | None,
        typer.Option(
            "--smooth",
            help="With --output class: radius of the smoothing of the finished map, in pixels.",
        ),
    ] = None,
    min_area: Annotated[
        float | None,
        typer.Option(
            "--min-area",
            help="With --output class: areas below this size, in hectares, join a neighbour.",
        ),
    ] = None,
    client: Client,
) -> None:
    """Wait for a job and write its result: rasters to a file or folder, JSON to the terminal."""
    if out is not None:
        _check_raster_target(out, several=False)
    if output is None and (smooth or min_area):
        raise UsageError("--smooth and --min-area need --output class: add it, or leave them out")
    found = client.job(job)
    with _bars() as bars:
        result = found.wait(progress=bars.computed)
    if output is not None:
        result = found.result(output, smooth=smooth, min_area=min_area)
    if isinstance(result, Raster | Rasters) and out is None:
        raise UsageError("the result is a raster: name the file to write with -o")
    _print_warnings(result)
    _deliver(result, out)


@jobs_app.command("cancel")
@_with(client=_client)
def cancel_job(job: JobId, *, client: Client) -> None:
    """Cancel a job; its unfinished work is lost."""
    found = client.job(job)
    found.cancel()
    typer.echo(f"{found.id} {found.status}")


# --- the server -----------------------------------------------------------------------------------


@app.command()
@_with(client=_client)
def models(*, as_json: AsJSON = False, client: Client) -> None:
    """List the server's models."""
    served = client.models()
    if as_json:
        _print_json([dict(card.card) for card in served])
        return
    tasks = {name: task for task, name in served.defaults.items()}
    rows = [
        (
            card.id,
            card.task,
            " ".join(card.bands),
            str(len(card.classes) or ""),
            tasks.get(card.name, ""),
        )
        for card in served
    ]
    _print_table(("model", "task", "bands", "classes", "default of"), rows, wrapped="bands")


@app.command()
@_with(client=_client)
def model(
    name: Annotated[
        str, typer.Argument(help="name or name@version, from 'pimc models'.", show_default=False)
    ],
    *,
    client: Client,
) -> None:
    """Print a model's card as JSON."""
    _print_json(client.model(name).card)


@app.command()
@_with(client=_client)
def ready(*, client: Client) -> None:
    """Check that the server is ready; exits with status 1 if it is not."""
    found = client.ready()
    if not found:
        sys.exit(f"pimc: not ready: {found.detail}")
    typer.echo(f"ready on {found.provider}: {', '.join(found.models)}")


# --- running a task -------------------------------------------------------------------------------


def _outputs(text: str | None) -> str | list[str] | None:
    """One output as text, several as a list: the arguments of `Client`."""
    names = [] if text is None else [name.strip() for name in text.split(",")]
    return names if len(names) > 1 else (names[0] if names else None)


def _raster(
    client: Client,
    task: Task,
    files: Sequence[Path],
    delivery: _Delivery,
    outputs: str | list[str] | None,
    **options: Any,  # noqa: ANN401 (any option of `build_raster`)
) -> None:
    """Send a task's files, and write or print the result."""
    delivery.check(outputs)
    given = {
        **options,
        "outputs": outputs,
        "points": delivery.points,
        "answer": "summary" if delivery.summary else "raster",
    }
    with _bars() as bars:
        given["progress"] = bars.uploaded
        if delivery.job:
            job: JobHandle[Any] = client.run(operations.submit(task, files, **given))
        else:
            result = client.run(operations.raster(task, files, job_progress=bars.computed, **given))
    if delivery.job:
        typer.echo(job.id)
        return
    _print_warnings(result)
    _deliver(result, delivery.out)


def _check_raster_target(out: Path, *, several: bool) -> None:
    if out == STANDARD_OUTPUT:
        if sys.stdout.isatty():
            raise UsageError(
                "-o - writes the file to standard output, which is a terminal: redirect it, as in "
                "'-o - > class.tif'"
            )
    elif several:
        _check_folder(out)
    elif not out.is_dir():  # in a folder, the file is named after the output
        _check_file(out)


def _check_folder(out: Path) -> None:
    if out.suffix.lower() in {".tif", ".tiff"} or (out.exists() and not out.is_dir()):
        raise UsageError(
            f"-o {_shown(out)} is a file, but several outputs are written into a folder: name a "
            "folder"
        )
    # `save` creates the missing folders below the first one that exists.
    existing = next(parent for parent in [out, *out.absolute().parents] if parent.exists())
    if not os.access(existing, os.W_OK):
        raise UsageError(f"-o {_shown(out)}: no permission to write in {_shown(existing)}")


def _check_file(out: Path) -> None:
    folder = out.absolute().parent
    if out.is_dir():
        raise UsageError(f"-o {_shown(out)} is a folder: name a file")
    if not folder.is_dir():
        raise UsageError(
            f"-o {_shown(out)}: the folder {_shown(folder)} does not exist: create it first"
        )
    if not os.access(folder, os.W_OK):
        raise UsageError(f"-o {_shown(out)}: no permission to write in {_shown(folder)}")
    if _is_others_raster(out):
        raise UsageError(
            f"-o {_shown(out)} is a TIFF that PIMC did not write, perhaps an input: name another "
            "file, or delete it first"
        )


def _is_others_raster(path: Path) -> bool:
    """Whether a file is a TIFF without PIMC's tags, which a result must not replace."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(_TAGS_WITHIN)
    return head.startswith((b"II*", b"MM\0*", b"II+", b"MM\0+")) and b"PIMC_" not in head


_TAGS_WITHIN = 2**18
"""Bytes from the beginning of a result within which its tags are."""


def _deliver(result: TaskResult, out: Path | None) -> None:
    if isinstance(result, Summary):
        _write_text(_json(dict(result)), out)
    elif isinstance(result, Results):
        _write_records([{"lon": p.lon, "lat": p.lat, **p.properties} for p in result], out)
    elif isinstance(result, Table):
        if out is None or out == STANDARD_OUTPUT:
            _print_json(result.document)
        else:
            _print_saved([result.save(out)], result)
    elif out == STANDARD_OUTPUT:
        result.copy_to(sys.stdout.buffer)
    elif out is not None:
        _save(result, out)


def _save(result: Raster | Rasters, out: Path) -> None:
    if isinstance(result, Rasters):
        _check_folder(out)  # the number of a job's outputs is known only from its result
        saved = result.save(out)
    else:
        saved = [result.save(out / f"{result.name}.tif" if out.is_dir() else out)]
    _print_saved(saved, result)


def _print_saved(paths: Sequence[Path], result: Raster | Rasters | Table) -> None:
    for path in paths:
        typer.echo(f"{_shown(path)} ({result.model})")


def _write_records(records: list[dict[str, Any]], out: Path | None) -> None:
    if out is not None and out.suffix.lower() == ".csv":
        _write_text(csv_text([flat_record(record) for record in records]), out)
    else:
        _write_text(_json(records), out)


def _write_text(text: str, out: Path | None) -> None:
    if out is None or out == STANDARD_OUTPUT:
        typer.echo(text)
        return
    out.write_text(text if text.endswith("\n") else f"{text}\n", encoding="utf-8")
    typer.echo(_shown(out), err=True)


def _json(document: object) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False)


def _print_json(document: object) -> None:
    typer.echo(_json(document))


def _print_warnings(result: TaskResult | Results[Any] | Measured | Taught) -> None:
    for warning in result.warnings:
        typer.echo(f"pimc: {warning}", err=True)


def _print_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], wrapped: str | None = None
) -> None:
    """Print a table without cutting off words: on a narrow terminal, the table is wider.

    Args:
        header: names of the columns.
        rows: cells of each row.
        wrapped: the column whose cells may take several lines.
    """
    columns = [Column(name, no_wrap=name != wrapped) for name in header]
    table = TextTable(*columns, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    widths = [
        max(len(part) for cell in cells for part in (cell.split() if name == wrapped else [cell]))
        for name, cells in zip(header, zip(header, *rows, strict=True), strict=True)
    ]
    console = Console()
    console.width = max(console.width, sum(width + 2 for width in widths))
    console.print(table)


def _shown(path: Path) -> str:
    """A path that any terminal can print."""
    return decoded_name(str(path))


class _Bars:
    """Progress bars on the terminal, for the upload and for a job."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._bar = bars.add_task("connecting", total=None, measure="")

    def uploaded(self, sent: int, total: int | None) -> None:
        """Show the progress of the upload."""
        if sent == total:
            self._bars.update(self._bar, description="computing", measure="")
            return
        size = "" if total is None else f" of {total / 1e6:.1f}"
        measure = f"{sent / 1e6:.1f}{size} MB"
        self._bars.update(
            self._bar, description="sending", completed=sent, total=total, measure=measure
        )

    def fetched(self, done: int, dates: int) -> None:
        """Show the progress of a stack."""
        self._bars.update(
            self._bar,
            description="fetching",
            completed=done,
            total=dates,
            measure=f"{done} of {dates} dates",
        )

    def computed(self, percent: float) -> None:
        """Show the progress of a job."""
        self._bars.update(
            self._bar,
            description="computing",
            completed=percent,
            total=100,
            measure=f"{percent:g} %",
        )


@contextmanager
def _bars(console: Console | None = None) -> Iterator[_Bars]:
    console = console or Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[measure]}"),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bars:
        yield _Bars(bars)


if __name__ == "__main__":
    main()

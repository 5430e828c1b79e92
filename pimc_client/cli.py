"""The `pimc` command: one subcommand for each method of `Client`."""

# No `from __future__ import annotations` here: typer needs the types at run time.
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from pimc_client import __version__, flows
from pimc_client.answers import Raster, Rasters, Results, Summary
from pimc_client.bodies import Progress as Report
from pimc_client.client import Client
from pimc_client.inputs import Layout, MaskRule, Modality, Task
from pimc_client.parse import Answer

app = typer.Typer(
    name="pimc",
    help="Land cover and vegetation forecasts from satellite image time series.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Files = Annotated[
    list[Path], typer.Argument(help="The GeoTIFF stack.", exists=True, dir_okay=False)
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="File to write; a folder where several are asked for."),
]
Outputs = Annotated[
    str | None,
    typer.Option("--output", help="Any of class, confidence, entropy, probabilities; with commas."),
]
Quantiles = Annotated[
    str | None, typer.Option("--output", help="Any of q10, q50, q90; with commas.")
]
InNumbers = Annotated[bool, typer.Option("--summary", help="Print numbers, as JSON.")]
PointsFile = Annotated[
    Path | None,
    typer.Option(
        "--points",
        help="GeoJSON file of points: answer for these alone, as JSON.",
        exists=True,
        dir_okay=False,
    ),
]
ModelName = Annotated[str | None, typer.Option("--model", help="name or name@version.")]
LayoutOption = Annotated[Layout | None, typer.Option("--layout", help="What a file holds.")]
Dates = Annotated[str | None, typer.Option("--dates", help="ISO dates, with commas.")]
Bands = Annotated[
    str | None, typer.Option("--bands", help="Sentinel-2 bands in band order, with commas.")
]
Scale = Annotated[float | None, typer.Option("--scale", help="Reflectance = value x scale + …")]
Offset = Annotated[float | None, typer.Option("--offset", help="… offset.")]
Mask = Annotated[MaskRule | None, typer.Option("--mask", help="How clouds are told.")]
Start = Annotated[str | None, typer.Option("--start", help="First day of the model's window.")]
Stride = Annotated[int | None, typer.Option("--stride", help="Pixels between patches.")]
Horizon = Annotated[int | None, typer.Option("--horizon", help="Steps ahead.")]
ModalityOption = Annotated[
    Modality | None, typer.Option("--modality", help="From time series or from imagery.")
]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"pimc {__version__}")
        raise typer.Exit


@app.callback()
def connect(
    context: typer.Context,
    url: Annotated[
        str, typer.Option(envvar="PIMC_URL", help="Where the service is.")
    ] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option(envvar="PIMC_API_KEY", help="The key, where it asks for one.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds that the service may be silent.", min=0)
    ] = 600.0,
    version: Annotated[  # noqa: ARG001 (its callback has done the work)
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Land cover and vegetation forecasts from satellite image time series."""
    context.obj = context.with_resource(Client(url, api_key=api_key, timeout=timeout))


@app.command("classify-pixels")
def classify_pixels(
    context: typer.Context,
    files: Files,
    out: Out = None,
    output: Outputs = None,
    summary: InNumbers = False,
    points: PointsFile = None,
    model: ModelName = None,
    layout: LayoutOption = None,
    dates: Dates = None,
    bands: Bands = None,
    scale: Scale = None,
    offset: Offset = None,
    mask: Mask = None,
    start: Start = None,
) -> None:
    """A class for every pixel of a satellite image time series."""
    _raster(context, "classify-pixels", files, out, points, summary=summary, options={
        "outputs": _outputs(output), "model": model, "layout": layout, "dates": dates,
        "bands": bands, "scale": scale, "offset": offset, "mask": mask, "start": start,
    })  # fmt: skip


@app.command()
def forecast(
    context: typer.Context,
    files: Files,
    out: Out = None,
    horizon: Horizon = None,
    output: Quantiles = None,
    summary: InNumbers = False,
    points: PointsFile = None,
    model: ModelName = None,
    layout: LayoutOption = None,
    dates: Dates = None,
    bands: Bands = None,
    scale: Scale = None,
    offset: Offset = None,
    mask: Mask = None,
    start: Start = None,
) -> None:
    """The next values of NDVI, EVI and SAVI for every pixel."""
    _raster(context, "forecast", files, out, points, summary=summary, options={
        "outputs": _outputs(output), "horizon": horizon, "model": model, "layout": layout,
        "dates": dates, "bands": bands, "scale": scale, "offset": offset, "mask": mask,
        "start": start,
    })  # fmt: skip


@app.command()
def landcover(
    context: typer.Context,
    files: Files,
    out: Out = None,
    stride: Stride = None,
    output: Outputs = None,
    summary: InNumbers = False,
    points: PointsFile = None,
    model: ModelName = None,
    layout: LayoutOption = None,
    dates: Dates = None,
    bands: Bands = None,
    scale: Scale = None,
    offset: Offset = None,
    mask: Mask = None,
) -> None:
    """EuroSAT land-cover labels from imagery."""
    _raster(context, "landcover", files, out, points, summary=summary, options={
        "outputs": _outputs(output), "stride": stride, "model": model, "layout": layout,
        "dates": dates, "bands": bands, "scale": scale, "offset": offset, "mask": mask,
    })  # fmt: skip


@app.command()
def embed(
    context: typer.Context,
    files: Files,
    out: Out = None,
    modality: ModalityOption = None,
    stride: Stride = None,
    summary: InNumbers = False,
    points: PointsFile = None,
    model: ModelName = None,
    layout: LayoutOption = None,
    dates: Dates = None,
    bands: Bands = None,
    scale: Scale = None,
    offset: Offset = None,
    mask: Mask = None,
    start: Start = None,
) -> None:
    """The PIMC embedding of every pixel or patch."""
    _raster(context, "embed", files, out, points, summary=summary, options={
        "modality": modality, "stride": stride, "model": model, "layout": layout,
        "dates": dates, "bands": bands, "scale": scale, "offset": offset, "mask": mask,
        "start": start,
    })  # fmt: skip


@app.command()
def models(context: typer.Context, as_json: AsJSON = False) -> None:
    """The models that the service has."""
    served = _client(context).models()
    if as_json:
        _print_json([dict(card.card) for card in served])
        return
    tasks = {name: task for task, name in served.defaults.items()}
    table = Table("model", "task", "bands", "classes", "default of")
    for card in served:
        default = tasks.get(card.name, "")
        table.add_row(
            card.id, card.task, " ".join(card.bands), str(len(card.classes) or ""), default
        )
    Console().print(table)


@app.command()
def model(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="name or name@version.")],
) -> None:
    """A model's card, as JSON."""
    _print_json(_client(context).model(name).card)


@app.command()
def ready(context: typer.Context) -> None:
    """Whether the service can answer; exits 1 where it cannot."""
    found = _client(context).ready()
    if not found:
        sys.exit(f"pimc: not ready: {found.detail}")
    typer.echo(f"ready on {found.provider}: {', '.join(found.models)}")


def _client(context: typer.Context) -> Client:
    return cast("Client", context.obj)


def _outputs(text: str | None) -> str | list[str] | None:
    """One output as text, several as a list, as `Client` has it."""
    names = [] if text is None else [name.strip() for name in text.split(",")]
    return names if len(names) > 1 else (names[0] if names else None)


def _raster(
    context: typer.Context,
    task: Task,
    files: Sequence[Path],
    out: Path | None,
    points: Path | None,
    *,
    summary: bool,
    options: Mapping[str, Any],
) -> None:
    """Send a task's files, and write or print the answer."""
    prints = summary or points is not None
    if prints == (out is not None):
        say = "prints: leave -o out" if prints else "is a file: say where with -o"
        raise typer.BadParameter(f"the answer {say}")
    where = None if points is None else json.loads(points.read_text(encoding="utf-8"))
    with _upload_bar() as report:
        answer = _client(context).run(
            flows.raster(
                task,
                files,
                points=where,
                answer="summary" if summary else "raster",
                progress=report,
                **options,
            )
        )
    for warning in answer.warnings:
        typer.echo(f"pimc: {warning}", err=True)
    _deliver(answer, out)


def _deliver(answer: Answer, out: Path | None) -> None:
    if isinstance(answer, Summary):
        _print_json(dict(answer))
    elif isinstance(answer, Results):
        _print_json([{"lon": p.lon, "lat": p.lat, **p.properties} for p in answer])
    elif out is not None:
        _save(answer, out)


def _save(answer: Raster | Rasters, out: Path) -> None:
    saved = [answer.save(out)] if isinstance(answer, Raster) else answer.save(out)
    for path in saved:
        typer.echo(f"{path} ({answer.model})")


def _print_json(document: object) -> None:
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


@contextmanager
def _upload_bar() -> Iterator[Report]:
    """A bar on the terminal while files are sent, then a sign of life while the service works."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bars:
        bar = bars.add_task("sending", total=None)

        def report(sent: int, total: int | None) -> None:
            doing = "computing" if sent == total else "sending"
            bars.update(bar, completed=sent, total=total, description=doing)

        yield report

"""`python -m training`: pretrain, embed, finetune, evaluate, export."""

import json
import logging
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.logging import RichHandler

from training.config import ZOO, ClassifyConfig, ForecastConfig, LandcoverConfig, Run

Config = ClassifyConfig | ForecastConfig | LandcoverConfig
Told = TypeVar("Told", bound=BaseModel)

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Makes bundles.")

RUNS = Path("runs")
BUNDLES = Path("models/zoo")
Data = Annotated[Path, typer.Option(help="Folder of the data sets.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Threads = Annotated[
    int, typer.Option(help="CPU threads; 0 leaves torch's choice. 1 is fastest on a busy machine.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting of the configuration, as optimisation.epochs=5."),
]


@app.callback()
def _main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler()])


@app.command()
def pretrain(
    *,
    data: Data = Path("../shared/data"),
    run: Annotated[Path, typer.Option(help="Folder of checkpoints and logs.")] = RUNS / "pretrain",
    romania: Annotated[Path | None, typer.Option(help="The Romania cube of nrt 0.2.1.")] = None,
    pastis: Annotated[Path | None, typer.Option(help="A PASTIS folder.")] = None,
    device: Device = "auto",
    threads: Threads = 0,
    workers: Annotated[int, typer.Option(help="Threads that make batches ahead.")] = 1,
    settings: Settings = None,
) -> None:
    """Train both encoders without labels; goes on where a killed run stopped."""
    from training.pretrain import FIRST
    from training.pretrain import pretrain as train
    from training.sources import Places

    _use_threads(threads)
    config = changed(FIRST, settings or [])
    places = Places(data=data, romania=romania, pastis=pastis)
    train(config, places=places, folder=run, device=device, workers=workers)


@app.command()
def finetune(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(ZOO)}, or a new name.")],
    *,
    data: Data = Path("../shared/data"),
    run: Annotated[Path | None, typer.Option(help="Folder of the run; runs/<name>.")] = None,
    task: Annotated[
        str | None, typer.Option(help="classify, forecast or landcover, for a new name.")
    ] = None,
    pretrained: Annotated[
        Path | None, typer.Option(help="Checkpoint with the encoder to start from.")
    ] = None,
    everything: Annotated[
        bool, typer.Option(help="Train on the validation places too; no score is reported.")
    ] = False,
    seed: int = 0,
    device: Device = "auto",
    threads: Threads = 0,
    settings: Settings = None,
) -> None:
    """Train a graph for a downstream task; goes on where a killed run stopped."""
    from training.finetune import finetune as train

    config: Config = changed(
        configuration(name, task), [*(settings or []), f"optimisation.seed={seed}"]
    )
    told = Run(config=config, data=data, pretrained=pretrained, everything=everything)
    done = train(told, run or RUNS / name, device=device, threads=threads)
    Console().print_json(json.dumps(dict(done.scores)))


@app.command()
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    *,
    zoo: Annotated[Path, typer.Option(help="Folder of bundles, for their cards.")] = BUNDLES,
    report: Annotated[Path, typer.Option(help="The Markdown file.")] = Path("docs/results.md"),
    romania: Annotated[
        Path | None,
        typer.Option(help="Folder with the Romania cube and its tree cover raster (nrt 0.2.1)."),
    ] = None,
    threads: Threads = 0,
) -> None:
    """Score runs beside the baselines; write docs/results.md and the cards."""
    from training.evaluate import evaluate as score
    from training.evaluate import markdown, romania_report

    _use_threads(threads)
    for table in score(runs, zoo=zoo, report=report):
        Console().print(markdown(table), markup=False)
    if romania:
        Console().print(romania_report(romania, zoo=zoo, report=report), markup=False)


@app.command()
def export(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    *,
    zoo: Annotated[Path, typer.Option(help="Folder that takes the bundles.")] = BUNDLES,
    name: Annotated[str | None, typer.Option(help="Name of the bundle, for one run.")] = None,
) -> None:
    """Turn finished runs into bundles: ONNX checked against torch, and a card."""
    from training.export import export_run

    if name and len(runs) > 1:
        raise typer.BadParameter(f"--name {name} names one bundle, not {len(runs)}")
    for folder in runs:
        Console().print(str(export_run(folder, zoo, name=name)))


@app.command()
def embed(
    run: Annotated[Path, typer.Argument(help="Folder of a finished pretraining run.")],
    *,
    data: Data = Path("../shared/data"),
    romania: Annotated[Path | None, typer.Option(help="The Romania cube of nrt 0.2.1.")] = None,
    pastis: Annotated[Path | None, typer.Option(help="A PASTIS folder.")] = None,
    zoo: Annotated[Path, typer.Option(help="Folder that takes the bundles.")] = BUNDLES,
    threads: Threads = 0,
) -> None:
    """Turn a pretraining run into embed-pixel and embed-patch: probes, retrieval, ONNX, cards."""
    from training.embedding import export_embeddings
    from training.sources import Places

    _use_threads(threads)
    places = Places(data=data, romania=romania, pastis=pastis)
    for folder in export_embeddings(run, zoo, places=places):
        Console().print(str(folder))


def configuration(name: str, task: str | None) -> Config:
    """The zoo's configuration of a name, or of the first of a task under a new name."""
    if name in ZOO:
        if task not in {None, ZOO[name].task}:
            raise typer.BadParameter(f"{name} is for {ZOO[name].task}, not {task}")
        return ZOO[name]
    for config in ZOO.values():
        if config.task == task:
            return config.model_copy(update={"name": name})
    raise typer.BadParameter(f"{name} is not one of {', '.join(ZOO)}: say its --task")


def changed(config: Told, settings: list[str]) -> Told:
    """A configuration with some settings changed.

    Args:
        config: what to change.
        settings: each `dotted.name=value`, the value in JSON or plain text.
    """
    told: dict[str, Any] = config.model_dump(mode="json")
    for setting in settings:
        name, _, text = setting.partition("=")
        *outer, last = name.split(".")
        place = told
        for key in outer:
            place = place.get(key, {})
        if last not in place:
            raise typer.BadParameter(f"'{name}' is no setting of {type(config).__name__}")
        try:
            place[last] = json.loads(text)
        except json.JSONDecodeError:
            place[last] = text
    return type(config).model_validate(told)


def _use_threads(threads: int) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    app()

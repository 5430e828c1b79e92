"""`python -m training`: pretrain, embed, finetune, evaluate, ablate, export."""

import json
import logging
import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.logging import RichHandler
from typer.core import TyperGroup

from models.card import Modality
from models.registry import BundleError, load_bundle
from training.config import ZOO, Run, changed, configuration
from training.errors import TrainingError


class OneSentence(TyperGroup):
    """Command group that prints a user's mistake as one sentence and exits with status 2."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401  # typer's own context, which it keeps private
        """Run a command; an error that the user can correct is printed without a traceback."""
        try:
            return super().invoke(ctx)
        except (TrainingError, BundleError) as error:
            message = str(error)
        except OSError as error:
            message = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        Console(stderr=True).print(f"Error: {message}", markup=False, soft_wrap=True)
        raise typer.Exit(2)


app = typer.Typer(
    cls=OneSentence,
    no_args_is_help=True,
    add_completion=False,
    help="Train, evaluate and export models.",
)

RUNS = Path("runs")
BUNDLES = Path("models/zoo")
Data = Annotated[Path, typer.Option(help="Folder of the data sets.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Threads = Annotated[
    int, typer.Option(help="CPU threads; 0 uses torch's default. 1 is fastest on a busy machine.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="A setting of the configuration, such as optimisation.epochs=5; repeatable."
    ),
]
Public = Annotated[
    Path | None,
    typer.Option(
        help="Folder of series of public repositories, for forecasts and for the regions of "
        "pixels-landcover: see docs/how-to/train.md."
    ),
]
Version = Annotated[
    str | None,
    typer.Option(
        help="Version of the bundle; give a new one if another model of this name exists."
    ),
]


class Protocol(StrEnum):
    """Whether all weights are trained, or a frozen encoder is probed."""

    finetune = "finetune"
    linear = "linear"
    knn = "knn"


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
    workers: Annotated[int, typer.Option(help="Threads that prepare batches ahead.")] = 1,
    settings: Settings = None,
) -> None:
    """Pretrain both encoders without labels; resumes a killed run."""
    from training.pretrain import FIRST
    from training.pretrain import pretrain as train
    from training.pretraining_data import Places

    _use_threads(threads)
    config = changed(FIRST, settings or [])
    places = Places(data=data, romania=romania, pastis=pastis)
    train(config, places=places, folder=run, device=device, workers=workers)


@app.command()
def finetune(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(ZOO)}, or a new name.")],
    *,
    data: Data = Path("../shared/data"),
    run: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run; runs/<name> by default, with the seed if it is above 0."
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="classify, forecast or landcover; required for a new name.")
    ] = None,
    pretrained: Annotated[
        list[Path] | None,
        typer.Option(
            help="Checkpoint with the encoder to start from; repeatable with the weights of "
            "several runs, whose networks are then joined."
        ),
    ] = None,
    romania: Annotated[
        Path | None, typer.Option(help="The Romania cube of nrt 0.2.1, for forecasts.")
    ] = None,
    public: Public = None,
    left_out: Annotated[
        list[str] | None,
        typer.Option(help="Leave this region out of training; repeatable."),
    ] = None,
    everything: Annotated[
        bool, typer.Option(help="Train on the validation places too; no score is reported.")
    ] = False,
    protocol: Annotated[
        Protocol,
        typer.Option(help="Train all weights, or freeze the encoder and probe its embeddings."),
    ] = Protocol.finetune,
    patience: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after this many epochs without a better validation score."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the run; 0 by default.")] = None,
    device: Device = "auto",
    threads: Threads = 0,
    settings: Settings = None,
) -> None:
    """Train a graph for a downstream task; resumes a killed run."""
    from training.finetune import finetune as train

    options = {"seed": seed, "patience": patience}
    given = [f"optimisation.{name}={n}" for name, n in options.items() if n is not None]
    config = changed(configuration(name, task), [*(settings or []), *given])
    settled = Run(
        config=config,
        data=data,
        pretrained=tuple(pretrained or ()),
        everything=everything,
        protocol=protocol.value,
        left_out=tuple(left_out or ()),
        romania=romania,
        public=public,
    )
    words = [name, *([protocol.value] if protocol != Protocol.finetune else [])]
    seeded = config.optimisation.seed
    words += [f"seed-{seeded}"] if seeded else []
    done = train(settled, run or RUNS / "-".join(words), device=device, threads=threads)
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
    """Score runs and baselines; write docs/results.md and the cards."""
    from training.evaluate import evaluate as score
    from training.evaluate import romania_report
    from training.score_tables import markdown

    _use_threads(threads)
    for table in score(runs, zoo=zoo, report=report):
        Console().print(markdown(table), markup=False, soft_wrap=True)
    if romania:
        Console().print(romania_report(romania, zoo=zoo, report=report), markup=False)


@app.command()
def robustness(
    run: Annotated[Path, typer.Argument(help="Folder of a finished land-cover run.")],
    *,
    report: Annotated[Path, typer.Option(help="The Markdown file.")] = Path("docs/results.md"),
    threads: Threads = 0,
) -> None:
    """Score a land-cover run on level 2A imagery, in haze, and in other light and seasons."""
    from training.robustness import measure_robustness

    _use_threads(threads)
    Console().print_json(json.dumps(measure_robustness(run, report=report)))


@app.command()
def regions(
    name: Annotated[str, typer.Argument(help="A bundle's name, e.g. pixels-landcover.")],
    *,
    data: Data = Path("../shared/data"),
    run: Annotated[
        Path | None, typer.Option(help="Folder of the runs; runs/regions/<name> by default.")
    ] = None,
    baselines: Annotated[
        bool, typer.Option(help="Train a random forest beside each run of a classifier.")
    ] = True,
    only: Annotated[
        list[str] | None, typer.Option(help="Leave out only this region; repeatable.")
    ] = None,
    pretrained: Annotated[
        Path | None, typer.Option(help="Checkpoint with the encoder to start from.")
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            help="A finished bundle to score without training: forecasts are also calibrated on "
            "the regions that the bundle was not trained on, embeddings are probed."
        ),
    ] = None,
    trained: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a finished run of forecasts to calibrate by the runs of --without."
        ),
    ] = None,
    without: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of a finished run of the same configuration that left regions out "
            "(finetune --left-out); repeatable."
        ),
    ] = None,
    romania: Annotated[Path | None, typer.Option(help="The Romania cube of nrt 0.2.1.")] = None,
    public: Public = None,
    report: Annotated[Path, typer.Option(help="The Markdown file.")] = Path("docs/results.md"),
    device: Device = "auto",
    threads: Threads = 1,
    settings: Settings = None,
) -> None:
    """Hold each region out in turn: train the missing runs, score, calibrate across regions."""
    from training.embedding_regions import LABELS, evaluate_embedding
    from training.recalibrate import run_of_card
    from training.regions import Plan, evaluate_bundle, evaluate_regions, evaluate_runs

    if (trained is None) != (not without) or (bundle and trained):
        raise typer.BadParameter(
            "give --trained and --without together, and neither of them with --bundle"
        )

    card = load_bundle(bundle).card if bundle else None
    embeds = card is not None and card.task == "embed"
    config = changed(configuration(LABELS if embeds else name), settings or [])
    if card:
        _use_threads(threads)
    if card and not embeds:
        config = run_of_card(card, data).config
    started = (pretrained,) if pretrained else ()
    words = [f"--pretrained {pretrained.as_posix()}"] if pretrained else []
    words += [f"--bundle {bundle.as_posix()}"] if bundle else []
    words += [f"--trained {trained.as_posix()}"] if trained else []
    words += [f"--without {path.as_posix()}" for path in without or []]
    words += ["--romania CUBE"] if romania else []
    words += ["--public PUBLIC"] if public else []
    words += [f"--set {shlex.quote(setting)}" for setting in settings or []]
    plan = Plan(
        run=Run(config=config, data=data, pretrained=started, romania=romania, public=public),
        folder=run or RUNS / "regions" / name,
        report=report,
        only=tuple(only or ()),
        baselines=baselines,
        device=device,
        threads=threads,
        command=" ".join([f"python -m training regions {name}", *words]),
    )
    if trained and without:
        _use_threads(threads)
        done = evaluate_runs(trained, without, plan)
    elif bundle:
        done = evaluate_embedding(bundle, plan) if embeds else evaluate_bundle(bundle, plan)
    else:
        done = evaluate_regions(plan)
    Console().print_json(json.dumps({"calibration": done.calibration, "regions": done.regions}))


@app.command()
def ablate(
    study: Annotated[
        str,
        typer.Argument(
            help="Name of the study, such as inputs or labels: see docs/how-to/train.md."
        ),
    ],
    *,
    bundle: Annotated[
        str, typer.Option(help="Bundle whose configuration the study varies.")
    ] = "pixels-crops-us",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm.")] = 3,
    epochs: Annotated[int | None, typer.Option(help="Epochs of each fine-tuning.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of each pretraining.")] = None,
    pretrained: Annotated[
        Path, typer.Option(help="Checkpoint for arms that start from one.")
    ] = RUNS / "pretrain" / "checkpoint.pt",
    data: Data = Path("../shared/data"),
    romania: Annotated[Path | None, typer.Option(help="The Romania cube of nrt 0.2.1.")] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = RUNS / "ablations",
    report: Annotated[Path, typer.Option(help="The Markdown file.")] = Path("docs/results.md"),
    device: Device = "auto",
    threads: Threads = 1,
    workers: Annotated[
        int, typer.Option(help="Threads that prepare a pretraining's batches ahead.")
    ] = 1,
    settings: Settings = None,
) -> None:
    """Run an ablation study: train the missing runs and write the table."""
    from training.ablation import STUDIES, Plan
    from training.ablation import ablate as run_study
    from training.pretraining_data import Places

    if study not in STUDIES:
        raise typer.BadParameter(f"'{study}' is not one of {', '.join(STUDIES)}")
    given = {"bundle": bundle, "seeds": seeds, "epochs": epochs, "steps": steps}
    words = [f"--{name} {value}" for name, value in given.items() if value is not None]
    if any(arm.pretrained for arm in STUDIES[study].arms):
        words.append(f"--pretrained {pretrained.as_posix()}")
    words += ["--romania CUBE"] if romania and STUDIES[study].pretraining else []
    words += [f"--set {shlex.quote(setting)}" for setting in settings or []]
    plan = Plan(
        bundle=bundle,
        places=Places(data=data, romania=romania),
        runs=runs,
        report=report,
        seeds=seeds,
        epochs=epochs,
        steps=steps,
        pretrained=pretrained,
        settings=tuple(settings or ()),
        device=device,
        threads=threads,
        workers=workers,
        command=" ".join([f"python -m training ablate {study}", *words]),
    )
    Console().print(run_study(study, plan), markup=False, soft_wrap=True)


@app.command()
def export(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    *,
    zoo: Annotated[Path, typer.Option(help="Folder that takes the bundles.")] = BUNDLES,
    name: Annotated[str | None, typer.Option(help="Name of the bundle, for one run.")] = None,
    version: Version = None,
    regions: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a `regions` run; its calibration and scores go into the bundle."
        ),
    ] = None,
) -> None:
    """Turn finished runs into bundles: ONNX checked against torch, variants, and a card."""
    from training.export import export_run

    if name and len(runs) > 1:
        raise typer.BadParameter(
            f"--name {name} is for one run, and {len(runs)} runs are given: export them one by one"
        )
    for folder in runs:
        Console().print(str(export_run(folder, zoo, name=name, version=version, regions=regions)))


@app.command()
def recalibrate(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    *,
    data: Data = Path("../shared/data"),
    regions: Annotated[
        Path, typer.Option(help="Folder of a `regions` run of the bundle's configuration.")
    ],
    version: Annotated[str, typer.Option(help="Version of the new bundle.")],
) -> None:
    """Write the calibration across regions, and the scores, into a bundle without training it."""
    from training.recalibrate import recalibrate as refit

    Console().print(str(refit(bundle, regions=regions, version=version, data=data)))


@app.command()
def describe(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    *,
    version: Annotated[str, typer.Option(help="Version of the new bundle.")],
) -> None:
    """Write the description, and what is known of the training data, into a card again."""
    from training.export import describe as write_again

    Console().print(str(write_again(bundle, version=version)))


@app.command("int8")
def measure_int8(
    bundles: Annotated[list[Path], typer.Argument(help="Folders of bundles of embeddings.")],
    *,
    data: Data = Path("../shared/data"),
    report: Annotated[Path, typer.Option(help="The Markdown file.")] = Path("docs/results.md"),
    version: Annotated[
        str | None,
        typer.Option(
            help="Version of new bundles whose cards state the scale; without it bundles stay as "
            "they are, and the scale on their cards is measured."
        ),
    ] = None,
    threads: Threads = 0,
) -> None:
    """Compare int8 with float32 embeddings on the probes, and write the table."""
    from training.embedding_int8 import measure_int8 as measure

    _use_threads(threads)
    text = measure(bundles, data=data, report=report, version=version)
    Console().print(text, markup=False, soft_wrap=True)


@app.command()
def embed(
    run: Annotated[Path, typer.Argument(help="Folder of a finished pretraining run.")],
    *,
    data: Data = Path("../shared/data"),
    romania: Annotated[Path | None, typer.Option(help="The Romania cube of nrt 0.2.1.")] = None,
    pastis: Annotated[Path | None, typer.Option(help="A PASTIS folder.")] = None,
    zoo: Annotated[Path, typer.Option(help="Folder that takes the bundles.")] = BUNDLES,
    modality: Annotated[
        Modality | None, typer.Option(help="The only bundle to write; both are without it.")
    ] = None,
    version: Version = None,
    threads: Threads = 0,
) -> None:
    """Turn a pretraining run into embed-pixel and embed-patch: probes, retrieval, ONNX, cards."""
    from training.embedding import export_embeddings
    from training.pretraining_data import Places

    _use_threads(threads)
    places = Places(data=data, romania=romania, pastis=pastis)
    modalities: tuple[Modality, ...] = (modality,) if modality else get_args(Modality)
    written = export_embeddings(run, zoo, places=places, version=version, modalities=modalities)
    for folder in written:
        Console().print(str(folder))


def _use_threads(threads: int) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    app()

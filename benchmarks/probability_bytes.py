"""Loss of `dtype=uint8` for probabilities: accuracy, smoothed maps and disk, on real stacks.

python -m benchmarks.probability_bytes [--data ../shared/data]

Every stack is classified twice by the service, as jobs with the outputs `class` and
`probabilities`: as float32 and as uint8. Compared are the probabilities as they are read to smooth
a map, the maps that both jobs give for `GET /jobs/{id}/result/class?smooth=…`, and the sizes of
`probabilities.tif`. Prints the Markdown of docs/results.md; takes a few minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.serving import served
from models.registry import ZOO
from pimc_client import Client
from pimc_client.inputs import JobOptions, ProbabilityType
from service.grid import Window
from service.run.derive import stored_probabilities
from service.write.cog import open_stored
from service.write.predictions import NO_CLASS

RADII = (1, 2, 5)
HEAD = (
    "| stack | model | classes | pixels | largest error | mean error | other class after smooth=1 "
    "| 2 | 5 | smoothing with radius 2 changes | float32, bytes | uint8, bytes | share |"
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A stack and the model that classifies it."""

    stack: str
    paths: Sequence[Path]
    task: Literal["classify-pixels", "landcover"]
    model: str


def cases(data: Path) -> list[Case]:
    """The real stacks that models of the zoo classify."""
    flanders = sorted((data / "flanders_2017_2018").glob("S2_L2A_2018*.tif"))
    tyrol = sorted((data / "south_tyrol_2022").glob("S2_L2A_2022-*.tif"))
    pixels = {
        "Flanders 2018": flanders,
        "Hesbaye b": sorted((data / "hesbaye_b_monthly").glob("*.tif")),
        "Hérault 2018": [data / "herault_safe_2018" / "eodata"],
    }
    found = [
        Case(stack=name, paths=paths, task="classify-pixels", model=model)
        for name, paths in pixels.items()
        for model in ("pixels-landcover", "pixels-crops-us")
    ]
    return [
        *found,
        Case(stack="South Tyrol", paths=tyrol, task="landcover", model="landcover-eurosat"),
    ]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A finished job."""

    probabilities: NDArray[np.float32]
    """(K, H, W), as they are read to smooth the map."""
    maps: tuple[NDArray[np.uint8], ...]
    """Class maps (H, W): as predicted, then smoothed with each of `RADII`."""
    size: int
    """Bytes of `probabilities.tif`."""


def stored(client: Client, case: Case, folder: Path, dtype: ProbabilityType) -> Stored:
    """Classify a stack as a job, and read what it gives."""
    options: JobOptions = {"model": case.model, "dtype": dtype}
    if case.task == "landcover":
        options["stride"] = 8
    job = client.submit(case.task, case.paths, outputs=["class", "probabilities"], **options)
    job.wait()
    plain = job.result("class")
    smooth = [job.result("class", smooth=radius).array for radius in RADII]
    path = folder / f"{job.id}.tif"
    size = job.result("probabilities").save(path).stat().st_size
    with open_stored(path) as raster:
        grid = raster.grid
        values = stored_probabilities(raster, Window(0, 0, grid.width, grid.height))
    return Stored(probabilities=values, maps=(plain.array, *smooth), size=size)


def row(case: Case, exact: Stored, rounded: Stored) -> str:
    """The row of a stack in the table."""
    np.testing.assert_array_equal(exact.maps[0], rounded.maps[0])
    there = exact.maps[0] != NO_CLASS
    error = np.abs(exact.probabilities - rounded.probabilities)[:, there]
    changed = [
        float((one != other)[there].mean())
        for one, other in zip(exact.maps[1:], rounded.maps[1:], strict=True)
    ]
    smoothing = float((exact.maps[0] != exact.maps[1 + RADII.index(2)])[there].mean())
    cells = [
        case.stack,
        case.model,
        len(exact.probabilities),
        int(there.sum()),
        f"{error.max():.4f}",
        f"{error.mean():.5f}",
        *(f"{share:.2%}" for share in changed),
        f"{smoothing:.2%}",
        exact.size,
        rounded.size,
        f"{rounded.size / exact.size:.2f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    options = parser.parse_args()
    print(HEAD)
    print("|" + "---|" * (HEAD.count("|") - 1))
    with (
        TemporaryDirectory() as name,
        served(model_dir=ZOO) as http,
        Client(str(http.base_url), timeout=None) as client,
    ):
        for case in cases(options.data):
            exact = stored(client, case, Path(name), "float32")
            rounded = stored(client, case, Path(name), "uint8")
            print(row(case, exact, rounded), flush=True)


if __name__ == "__main__":
    main()

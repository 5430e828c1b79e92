"""False alarms and finds of the warning `shift_suspected` on real stacks.

python -m benchmarks.alignment --romania CUBE.nc [--data ../shared/data]

Of random series of each stack, with clouds masked by SCL and without a mask: how many dates are
named although nothing was moved, and what share is named of the dates that were. Prints the
Markdown of docs/decisions/alignment.md. The Romania cube (`sentinel2_cube_subset_romania_10m.nc`)
comes from `pip download --no-deps nrt==0.2.1`. Takes two minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray

from service.read import alignment, clouds
from service.read.masks import scl as clear_by_scl

Floats = NDArray[np.float32]
SIZES = (5, 6, 12, 24, 200)
REPEATS = 10
MOVES: dict[str, Callable[[Floats], Floats]] = {
    "mirrored": lambda one: one[..., ::-1],
    "turned by 180°": lambda one: one[..., ::-1, ::-1],
    "6 down, 7 left": lambda one: np.roll(one, (6, -7), (-2, -1)),
    "3 down, 2 right": lambda one: np.roll(one, (3, 2), (-2, -1)),
    "1 down": lambda one: np.roll(one, 1, -2),
}


def read_stacks(data: Path, romania: Path) -> Iterator[tuple[str, Floats]]:
    """Stacks (T, 3, h, w) of red, near infrared (reflectance) and SCL, 4 where there is none."""
    flanders = sorted((data / "flanders_2017_2018").glob("S2_L2A_*.tif"))
    yield "Flanders", np.stack([_described(path) for path in flanders])
    tyrol = sorted((data / "south_tyrol_2022").glob("S2_L2A_2022-*.tif"))
    images = np.stack([_described(path) for path in tyrol])
    yield "South Tyrol", images[..., 350:478, 450:578]
    for name in ("a", "b"):
        folder = data / f"hesbaye_{name}_monthly"
        yield f"Hesbaye {name}", np.stack([_described(p) for p in sorted(folder.glob("*.tif"))])
    with rasterio.open(f"netcdf:{romania}:B4") as red, rasterio.open(f"netcdf:{romania}:B8") as nir:
        bands = [red.read() * np.float32(1e-4), nir.read() * np.float32(1e-4)]
    with rasterio.open(f"netcdf:{romania}:SCL") as file:
        yield "Romania", np.stack([*bands, file.read()], axis=1).astype(np.float32)
    images = []
    for path in sorted((data / "herault_safe_2018").rglob("*_B04_10m.jp2")):
        bands = []
        for band in ("B04", "B08"):
            with rasterio.open(str(path).replace("B04", band)) as file:
                bands.append(file.read(1)[:230, :350] * np.float32(1e-4))
        images.append(np.stack([*bands, np.full_like(bands[0], 4)]))
    yield "Hérault", np.stack(images)


def _described(path: Path) -> Floats:
    with rasterio.open(path) as file:
        names = list(file.descriptions)
        bands = [file.read(names.index(b) + 1) * np.float32(1e-4) for b in ("B04", "B08")]
        mask = file.read(names.index("SCL") + 1) if "SCL" in names else np.full_like(bands[0], 4)
    return np.stack([*bands, mask]).astype(np.float32)


def pictures_of(stack: Floats, *, masked: bool) -> Floats:
    """Pictures (T, 2, h, w) as the service compares them, NaN where missing or cloudy."""
    images = alignment.crop(stack)
    bands = images[:, :2].copy()
    gone = (bands <= 0).any(axis=1)
    if masked:
        gone |= ~clear_by_scl(images[:, 2])
    bands[np.broadcast_to(gone[:, None], bands.shape)] = np.nan
    return bands[np.isnan(bands[:, 0]).mean(axis=(1, 2)) < 0.95]


def named(pictures: Floats, days: list[int], *, masked: bool) -> set[int]:
    """The dates that are named."""
    if not masked:
        bright = clouds.brightened(pictures[:, 0])
        pictures = np.where(bright[:, None], np.float32(np.nan), pictures)
    return {moved.date for moved in alignment.find_moved(pictures, days)}


def measure(pictures: Floats, *, masked: bool) -> list[str]:
    """Cells: dates judged, dates named wrongly, and the share named of each kind of move."""
    random = np.random.default_rng(0)
    judged = wrong = 0
    found: dict[str, list[bool]] = {kind: [] for kind in MOVES}
    for size in SIZES:
        for _ in range(REPEATS):
            n = min(size, len(pictures))
            days = sorted(random.choice(len(pictures), n, replace=False).tolist())
            own = pictures[days]
            judged += n
            wrong += len(named(own, days, masked=masked))
            if n < size:
                continue
            for kind, move in MOVES.items():
                t, changed = int(random.integers(n)), own.copy()
                changed[t] = move(own[t])
                found[kind].append(t in named(changed, days, masked=masked))
    return [str(judged), str(wrong), *(f"{np.mean(own):.2f}" for own in found.values())]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--romania", type=Path, required=True)
    options = parser.parse_args()
    print(f"| stack | mask | dates judged | named wrongly | {' | '.join(MOVES)} |")
    print("|---" * (len(MOVES) + 4) + "|")
    for name, stack in read_stacks(options.data, options.romania):
        has_scl = bool((stack[:, 2] != 4).any())
        for masked in (True, False) if has_scl else (False,):
            cells = measure(pictures_of(stack, masked=masked), masked=masked)
            print(f"| {name} | {'SCL' if masked else 'none'} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

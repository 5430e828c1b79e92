"""Sentinel-2's offset in parts of real stacks: how often it is found, missed and falsely applied.

python -m benchmarks.offsets --romania CUBE.nc [--data ../shared/data] [--draws 16]

Random square parts of random dates of each stack, with clouds masked by SCL and without a mask.
Each part is judged as it is, without the offset, and with 0.1 added to some of its dates, as in
products of baseline 04.00. Prints the Markdown of docs/decisions/offset-by-pixels.md, in a minute
on one core. The Romania cube comes from `pip download --no-deps nrt==0.2.1`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.clouds import read_composites, read_regions
from service.read.geotiff import FileMemory, SourceFile
from service.read.masks import scl as clear_by_scl
from service.read.radiometry import BASELINE_CHANGE, Sample, unstated_offset
from service.read.reflectance import BASELINE_OFFSET
from service.read.stack import Plane

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
BANDS = ("B02", "B04", "B08")
SIDES = (8, 16, 24, 32, 48, 64)
"""Rows and columns of a part, pixels."""
LENGTHS = (4, 12, 24, 60)
"""Dates of a part."""
CHANGES = ("all dates", "from 2022-01-25", "half of the dates", "one clear date")
COLUMNS = {"flanders": 64, "south tyrol": 935, "herault": 232, "romania": 100, "pune": 93}
"""Columns of the regions whose pixels are in one row; Pune's are points, ordered by field."""
_CLEAR = 0.3


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """A real stack without the offset."""

    name: str
    mask: str
    values: Floats
    """(T, 3, H, W) reflectance in blue, red and near infrared; NaN where missing."""
    clear: Bools
    """(T, H, W): True where usable."""
    dates: tuple[date, ...]
    """(T), ascending."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What the rules did with one part of a stack."""

    stack: str
    mask: str
    side: int
    dates: int
    change: str
    """One of `CHANGES`; empty if nothing was changed."""
    outcome: str
    """`silent`, `suspected`, `applied`, or `wrong` if applied to a date without the offset."""
    applied: int
    """Number of dates with the offset to which it was applied."""
    holding: int
    """Number of dates with the offset."""


def read_stacks(data: Path, romania: Path) -> Iterator[Scenes]:
    """Every stack, with the mask SCL, where there is one, and without a mask."""
    for name, region in read_regions(data, romania).items():
        width = COLUMNS[name]
        rows = region.scl.shape[1] // width
        ts = [t for t, day in enumerate(region.dates) if day not in region.dates[:t]]
        values = region.values[ts][..., : rows * width].reshape(len(ts), 3, rows, width)
        clear = clear_by_scl(region.scl[ts][:, : rows * width]).reshape(len(ts), rows, width)
        dates = tuple(region.dates[t] for t in ts)
        yield _scenes(name, "SCL", values, clear, dates)
        yield _scenes(name, "none", values, np.ones_like(clear), dates)
    for name, values, dates in read_composites(data):
        yield _scenes(name, "none", values, np.ones_like(values[:, 0], np.bool_), dates)


def _scenes(name: str, mask: str, values: Floats, clear: Bools, dates: tuple[date, ...]) -> Scenes:
    seen = (values > 0).all(axis=1)
    values = np.where(seen[:, None], values, np.float32(np.nan))
    return Scenes(name=name, mask=mask, values=values, clear=clear & seen, dates=dates)


def judge(
    scenes: Scenes,
    ts: Sequence[int],
    rows: slice,
    columns: slice,
    change: str,
    random: np.random.Generator,
) -> Judged:
    """Judge one part of a stack.

    Args:
        scenes: the stack.
        ts: positions of the part's dates on the T axis, ascending.
        rows: rows of the part.
        columns: columns of the part.
        change: one of `CHANGES`, to add 0.1 to these dates; empty to change nothing.
        random: chooses the dates that are changed.
    """
    values = scenes.values[list(ts), :, rows, columns].copy()
    clear = scenes.clear[list(ts), rows, columns].reshape(len(ts), -1)
    dates = [scenes.dates[t] for t in ts]
    holds = np.zeros(len(ts), np.bool_)
    if change == "all dates":
        holds[:] = True
    elif change == "from 2022-01-25":
        holds[len(ts) // 2 :] = True
        later = BASELINE_CHANGE - dates[len(ts) // 2]
        dates = [day + later for day in dates]
    elif change == "half of the dates":
        holds[random.permutation(len(ts))[: len(ts) // 2]] = True
    elif change:
        enough = np.flatnonzero(clear.mean(axis=1) >= _CLEAR)
        holds[random.permutation(enough)[:1]] = True
    values[holds] -= np.float32(BASELINE_OFFSET)
    sample, warnings = unstated_offset(_sampled(values.reshape(len(ts), 3, -1), clear, dates))
    applied = np.array([own[0].offset != 0 for own in sample.planes])
    outcome = "suspected" if warnings else "silent"
    if applied.any():
        outcome = "wrong" if (applied & ~holds).any() else "applied"
    return Judged(
        stack=scenes.name,
        mask=scenes.mask,
        side=rows.stop - rows.start,
        dates=len(ts),
        change=change,
        outcome=outcome,
        applied=int((applied & holds).sum()),
        holding=int(holds.sum()),
    )


def _sampled(values: Floats, clear: Bools, dates: Sequence[date]) -> Sample:
    """The sample of a small raster, which is read whole.

    Args:
        values: reflectance (T, 3, N); NaN where missing.
        clear: usable pixels (T, N).
        dates: (T).
    """
    plane = Plane(
        source=SourceFile(name="part.tif", path=Path("part.tif")),
        number=1,
        scale=1e-4,
        offset=0.0,
        nodata=0,
        integer=True,
        masked=False,
        memory=FileMemory(block=0, blocks=0),
        block=(64, 64),
        itemsize=2,
    )
    return Sample(
        stored=values * np.float32(1e4),
        valid=clear,
        positions=tuple(range(len(dates))),
        dates=tuple(dates),
        bands=BANDS,
        planes=((plane,) * len(BANDS),) * len(dates),
        places=((0,),) * len(dates),
        pictures=np.empty((len(dates), 1, 0, 0, 0), np.float32),
        compared=(),
    )


def measure(scenes: Scenes, draws: int) -> Iterator[Judged]:
    """Judge random parts of a stack: each without the offset, and with one of `CHANGES`."""
    random = np.random.default_rng(0)
    size = scenes.clear.shape[1:]
    for side in SIDES:
        for n in range(draws):
            length = min(LENGTHS[n % len(LENGTHS)], len(scenes.dates))
            ts = sorted(random.choice(len(scenes.dates), length, replace=False).tolist())
            top, left = (int(random.integers(most - side + 1)) for most in size)
            part = slice(top, top + side), slice(left, left + side)
            yield judge(scenes, ts, *part, "", random)
            change = CHANGES[n // len(LENGTHS) % len(CHANGES)]
            yield judge(scenes, ts, *part, change, random)


def table(judged: Sequence[Judged], name: str, key: Callable[[Judged], str]) -> Iterator[str]:
    """Lines of Markdown: for each value of a key, the shares of the outcomes in per cent."""
    yield (
        f"| {name} | sound parts | silent | suspected | applied "
        "| parts with the offset | silent | suspected | applied | to a sound date | dates applied |"
    )
    yield "|---" * 11 + "|"
    for value in dict.fromkeys(map(key, judged)):
        cells = [value]
        own = [one for one in judged if key(one) == value]
        sound = [one for one in own if not one.change]
        count = Counter(one.outcome for one in sound)
        cells += [str(len(sound)), *(_share(count[o], len(sound)) for o in ("silent", "suspected"))]
        cells.append(_share(count["wrong"], len(sound)))
        changed = [one for one in own if one.change and one.holding]
        count = Counter(one.outcome for one in changed)
        outcomes = ("silent", "suspected", "applied", "wrong")
        cells += [str(len(changed)), *(_share(count[o], len(changed)) for o in outcomes)]
        cells.append(
            _share(sum(one.applied for one in changed), sum(one.holding for one in changed))
        )
        yield f"| {' | '.join(cells)} |"


def _share(part: int, whole: int) -> str:
    """A share in per cent; empty where there is nothing."""
    return f"{100 * part / whole:.1f} %" if whole else ""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--romania", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=16, help="parts per stack, mask and side")
    options = parser.parse_args()
    judged = [
        one
        for scenes in read_stacks(options.data, options.romania)
        for one in measure(scenes, options.draws)
    ]
    for name, key in (
        ("mask", lambda one: one.mask),
        ("side, mask", lambda one: f"{one.side}, {one.mask}"),
        ("stack, mask", lambda one: f"{one.stack}, {one.mask}"),
        ("dates", lambda one: str(one.dates)),
        ("change", lambda one: one.change or "none"),
    ):
        print("\n".join(table(judged, name, key)), end="\n\n", flush=True)


if __name__ == "__main__":
    main()

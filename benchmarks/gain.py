"""False alarms and finds of a date of another gain (`scale_suspected`) on real stacks.

python -m benchmarks.gain --romania CUBE.nc [--data ../shared/data]

Of random series of each stack, with clouds masked by SCL and without a mask: in how many series a
date is named although nothing was changed, and what share is found of dates whose values were
multiplied by 2 or 0.5, with at least 30 % of the pixels clear. Prints the Markdown of
docs/decisions/gain-by-pixels.md. The Romania cube comes from `pip download --no-deps nrt==0.2.1`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.clouds import read_composites, read_regions
from service.read.gain import find_gains
from service.read.masks import scl as clear_by_scl

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
SIZES = (4, 8, 24, 60, 200)
REPEATS = 8
CHANGED = 4
FACTORS = (2, 0.5)
_PIXELS = 1300
_CLEAR = 0.3


def read_stacks(data: Path, romania: Path) -> Iterator[tuple[str, str, Floats, Bools, list[int]]]:
    """Name, mask, reflectance (T, 3, N) in blue, red and near infrared, usable (T, N), days."""
    for name, region in read_regions(data, romania).items():
        thin = slice(None, None, max(1, region.scl.shape[1] // _PIXELS))
        values, seen = region.values[..., thin], region.seen[:, thin]
        days = [day.toordinal() for day in region.dates]
        yield name, "SCL", values, seen & clear_by_scl(region.scl[:, thin]), days
        yield name, "none", values, seen, days
    for name, images, dates in read_composites(data):
        values = images.reshape(len(dates), len(images[0]), -1)[..., ::8]
        days = [day.toordinal() for day in dates]
        yield name, "none", values, (values > 0).all(axis=1), days


def measure(values: Floats, valid: Bools, days: list[int], *, masked: bool) -> list[str]:
    """Cells: series, series with a date named wrongly, changed dates, shares found and misled."""
    random = np.random.default_rng(0)
    series = wrong = 0
    found: list[bool] = []
    misled: list[bool] = []
    for size in SIZES:
        for _ in range(REPEATS if size < len(days) else 1):
            n = min(size, len(days))
            ts = sorted(random.choice(len(days), n, replace=False).tolist())
            own, usable = values[ts], valid[ts]

            def named(changed: Floats, ts: list[int] = ts, usable: Bools = usable) -> set[int]:
                def shared(t: int, u: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
                    both = np.flatnonzero(usable[t] & usable[u])
                    return both, both

                at = [days[t] for t in ts]
                return set(find_gains(changed, usable, at, shared=shared, masked=masked))

            series += 1
            wrong += bool(named(own))
            clear = np.flatnonzero(usable.mean(axis=1) >= _CLEAR)
            for t in random.permutation(clear)[:CHANGED].tolist():
                for factor in FACTORS:
                    changed = own.copy()
                    changed[t] *= np.float32(factor)
                    names = named(changed)
                    found.append(t in names)
                    misled.append(bool(names - {t}))
    return [
        str(series),
        str(wrong),
        str(len(found)),
        f"{np.mean(found):.2f}",
        f"{np.mean(misled):.2f}",
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--romania", type=Path, required=True)
    options = parser.parse_args()
    print("| stack | mask | series | sound dates named | dates changed | named | another named |")
    print("|---|---|---|---|---|---|---|")
    for name, mask, values, valid, days in read_stacks(options.data, options.romania):
        cells = measure(values, valid, days, masked=mask != "none")
        print(f"| {name} | {mask} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

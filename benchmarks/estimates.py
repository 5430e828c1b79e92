"""Seconds of requests beside the estimates of `POST /validate`.

    python -m benchmarks.estimates [--side 512] [--dates 24] [--runs 3] [--out estimates.json]

A service in this process classifies rasters of half the side a few times; these runs calibrate it.
Then each request is validated, sent, and timed: rasters of half, the same and twice the side,
fields and points. `pixels`, `dates` and bytes of an estimate are exact, which tests check; seconds
depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import rasterio
import rasterio.warp

from benchmarks.fields import write_fields
from benchmarks.landscape import write_stack
from benchmarks.process import machine
from benchmarks.serving import served

_FIELDS = 100
_POINTS = 100


@dataclass(frozen=True, kw_only=True)
class Estimated:
    """One request: its estimate, and what it took."""

    what: str
    shortest: float
    """Lower end of the estimate, seconds."""
    longest: float
    """Upper end of the estimate, seconds."""
    stages: tuple[float, float]
    """The longest stage, and all stages together, by `Server-Timing`, seconds."""
    seconds: float
    """From the request to the end of the response, by the clock."""

    @property
    def holds(self) -> bool:
        """Whether the run's time lies in the range, between its longest stage and their sum."""
        least, most = self.stages
        return self.shortest <= most and least <= self.longest


def measure(side: int, dates: int, runs: int) -> list[Estimated]:
    """Calibrate a service, then validate, send and time each request.

    Args:
        side: width and height of the middle raster, pixels.
        dates: dates of the stacks.
        runs: number of runs of each kind before.
    """
    found = []
    with TemporaryDirectory() as name, served(sync_max_pixels=(2 * side) ** 2) as api:
        folder = Path(name)
        stacks = {size: _stack(folder, size, dates) for size in (side // 2, side, 2 * side)}
        cases: list[tuple[str, int, dict[str, Any]]] = [
            *((f"raster of {size} x {size}", size, {}) for size in stacks),
            (f"{_FIELDS} fields of {side} x {side}", side, {"fields": _fields(folder, side)}),
            (f"{_POINTS} points of {side} x {side}", side, {"points": _points(stacks[side][0])}),
        ]
        for _, size, data in [cases[0], *cases[3:]]:
            for _ in range(runs):
                _post(api, "/classify-pixels", stacks[size], data)
        for what, size, data in cases:
            answer = _post(api, "/validate?task=classify-pixels", stacks[size], data).json()
            range_ = answer["estimate"]["seconds"]
            begun = time.perf_counter()
            response = _post(api, "/classify-pixels", stacks[size], data)
            found.append(
                Estimated(
                    what=what,
                    shortest=range_["shortest"],
                    longest=range_["longest"],
                    stages=_stages(response.headers["Server-Timing"]),
                    seconds=time.perf_counter() - begun,
                )
            )
    return found


def _stack(folder: Path, side: int, dates: int) -> Sequence[Path]:
    here = folder / str(side)
    here.mkdir()
    return write_stack(here, side, dates)


def _fields(folder: Path, side: int) -> str:
    return write_fields(folder / "fields.geojson", side, _FIELDS).path.read_text()


def _points(raster: Path) -> str:
    """Points along the diagonal of a raster, as GeoJSON."""
    with rasterio.open(raster) as file:
        places = [
            file.xy(n * file.height // _POINTS, n * file.width // _POINTS) for n in range(_POINTS)
        ]
        lons, lats = rasterio.warp.transform(file.crs, "EPSG:4326", *zip(*places, strict=True))
    features = [
        {"type": "Feature", "properties": {}, "geometry": {"type": "Point", "coordinates": [*at]}}
        for at in zip(lons, lats, strict=True)
    ]
    return json.dumps({"type": "FeatureCollection", "features": features})


def _post(
    api: httpx.Client, path: str, stack: Sequence[Path], data: dict[str, Any]
) -> httpx.Response:
    files = [("files", (one.name, one.read_bytes())) for one in stack]
    response = api.post(path, files=files, data=data)
    response.raise_for_status()
    return response


def _stages(header: str) -> tuple[float, float]:
    """The longest stage and the sum of the stages of `Server-Timing`, seconds."""
    seconds = [float(part.partition("dur=")[2]) / 1000 for part in header.split(",")]
    return max(seconds), sum(seconds)


def main() -> None:
    """Measure and print, as Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", type=int, default=512, help="side of the middle raster, pixels")
    parser.add_argument("--dates", type=int, default=24, help="dates of the stacks")
    parser.add_argument("--runs", type=int, default=3, help="runs of each kind before")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    found = measure(options.side, options.dates, options.runs)
    print("| request | estimate, s | stages, s | by the clock, s | holds |")
    print("|---|---|---|---|---|")
    for one in found:
        print(
            f"| {one.what} | {one.shortest:.2f} to {one.longest:.2f} | {one.stages[0]:.2f} to "
            f"{one.stages[1]:.2f} | {one.seconds:.2f} | {'yes' if one.holds else 'no'} |"
        )
    if options.out:
        document = {"machine": machine(), "requests": [asdict(one) for one in found]}
        options.out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()

"""Cost of results per field, beside the class map of the same stack.

    python -m benchmarks.fields [--side 2048] [--dates 36] [--fields 10000] [--pairs 2]
    python -m benchmarks.fields --memory [--side 1024] [--dates 36] [--fields 100000]
        [--task forecast]

Both run in this process, in turns on one engine: the class map as a COG, and the class of each
field with shares and areas. Fields are quadrilaterals of irregular shape that cover about half of
the raster, in another CRS than it. Processor time is that of all threads; it also holds on a
machine that others use.

With `--memory` a service runs as a process, and its peak of memory is measured while it returns the
result of each task for the fields, and for a hundredth of them; beside it is what the run reserves
of `PIMC_MEMORY_BUDGET`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

import httpx
import numpy as np
import rasterio.warp
import shapely

from benchmarks import process
from benchmarks.landscape import write_stack
from models.registry import ZOO, Registry
from service.infer.engine import Engine
from service.read.geotiff import SourceFile
from service.run.execute import execute
from service.run.executors import ThreadExecutor
from service.run.plan import plan_request
from service.run.request import RasterRequest

_WEST, _NORTH, _PIXEL = 500_000.0, 5_600_000.0, 10.0
"""Corner and pixel size of the stacks of `write_stack`, m in EPSG:32631."""


def write_fields(path: Path, side: int, count: int) -> SourceFile:
    """A GeoJSON file of fields, one in each cell of a square lattice, in degrees.

    Args:
        path: the file to write.
        side: width and height of the raster in pixels.
        count: least number of fields; the next square is written.
    """
    random = np.random.default_rng(0)
    cells = int(np.ceil(np.sqrt(count)))
    size = side * _PIXEL / cells
    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1)]) * 0.7 + 0.15
    rows, columns = np.mgrid[:cells, :cells].reshape(2, -1)
    shapes = corners + random.uniform(-0.14, 0.14, (len(rows), 4, 2))
    xs = _WEST + (columns[:, None] + shapes[..., 0]) * size
    ys = _NORTH - (rows[:, None] + shapes[..., 1]) * size
    lon, lat = rasterio.warp.transform("EPSG:32631", "EPSG:4326", xs.ravel(), ys.ravel())
    rings = np.stack([lon, lat], axis=1).reshape(-1, 4, 2)
    features = [
        {
            "type": "Feature",
            "id": number,
            "properties": {"name": f"field {number}"},
            "geometry": json.loads(shapely.to_geojson(shapely.Polygon(ring))),
        }
        for number, ring in enumerate(rings)
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return SourceFile(name=path.name, path=path)


def timed(engine: Engine, request: RasterRequest, folder: Path) -> tuple[float, float, int]:
    """Seconds by the clock and of processor time of a request, and the pixels with a result."""
    clock, processor = time.perf_counter(), time.process_time()
    plan = plan_request(request, engine, max_raster_bytes=2**40, rasters=True)
    result = execute(plan, folder, executor=ThreadExecutor(), cancelled=Event())
    took = time.perf_counter() - clock, time.process_time() - processor
    return (*took, result.pixels)


def compare(files: Sequence[SourceFile], fields: SourceFile, pairs: int) -> None:
    """Run the pairs, and print each of them and the medians of the ratios."""
    plain = RasterRequest(task="classify-pixels", files=tuple(files), outputs=("class",))
    parcels = RasterRequest(
        task="classify-pixels", files=tuple(files), fields=fields, outputs=("class",)
    )
    ratios = []
    with Engine(Registry.load(ZOO), providers="cpu") as engine:
        for number in range(pairs):
            # The order changes, so that what else the machine does affects both alike.
            order = (("map", plain), ("fields", parcels))
            took = {}
            for name, request in order if number % 2 == 0 else order[::-1]:
                with TemporaryDirectory() as folder:
                    took[name] = timed(engine, request, Path(folder))
                clock, processor, pixels = took[name]
                print(
                    f"{name}: {clock:.1f} s, {processor:.1f} s of processor time, {pixels} pixels",
                    flush=True,
                )
            ratios.append([took["fields"][k] / took["map"][k] for k in (0, 1)])
    by_clock, by_processor = (statistics.median(column) for column in zip(*ratios, strict=True))
    print(f"fields / map: {by_clock:.2f} by the clock, {by_processor:.2f} by processor time")


_RESULTS = (
    ("classify-pixels", "application/geo+json"),
    ("classify-pixels", "text/csv"),
    ("classify-pixels", "application/vnd.apache.parquet"),
    ("forecast", "application/geo+json"),
    ("forecast", "text/csv"),
    ("embed", "application/geo+json"),
)


def measure_memory(
    files: Sequence[SourceFile], fields: Sequence[SourceFile], task: str | None
) -> None:
    """Print the peak of memory of a service for results per field, as Markdown.

    Args:
        files: the stack.
        fields: files of fields, the smallest first.
        task: the only task; None measures all.
    """
    print("| task | result | fields | result, MB | peak, MB | before, MB | reserved, MB |")
    print("|---|---|---|---|---|---|---|")
    stack = [("files", (file.name, file.path.read_bytes())) for file in files]
    with (
        process.served(PIMC_MAX_FIELDS=str(10**6)) as service,  # a square may be a few more
        httpx.Client(base_url=service.url, timeout=None) as client,  # noqa: S113 - runs take minutes
    ):
        for name, result in _RESULTS:
            for file in fields if task in {None, name} else ():
                before = service.resident()
                service.forget_peak()
                content = file.path.read_bytes()
                sent = [*stack, ("fields", (file.name, content))]
                response = client.post(f"/{name}", files=sent, headers={"Accept": result})
                response.raise_for_status()
                peak, count = service.peak(), content.count(b'"Feature"')
                checked = client.post(f"/validate?task={name}", files=sent).json()
                reserved = checked["estimate"]["memory_bytes"]
                sizes = (len(response.content), peak, before, reserved)
                megabytes = " | ".join(f"{size / 1e6:.0f}" for size in sizes)
                print(f"| {name} | {result} | {count:,} | {megabytes} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", type=int, default=2048, help="side of the raster, pixels")
    parser.add_argument("--dates", type=int, default=36, help="dates of the stack")
    parser.add_argument("--fields", type=int, default=10_000, help="number of fields")
    parser.add_argument("--pairs", type=int, default=2, help="pairs of runs")
    parser.add_argument("--memory", action="store_true", help="measure memory, not time")
    parser.add_argument("--task", help="with --memory: the only task")
    options = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_stack(folder, options.side, options.dates, scl=True)
        files = [SourceFile(name=path.name, path=path) for path in paths]
        fields = write_fields(folder / "fields.geojson", options.side, options.fields)
        if options.memory:
            few = write_fields(folder / "few.geojson", options.side, options.fields // 100)
            measure_memory(files, (few, fields), options.task)
        else:
            compare(files, fields, options.pairs)


if __name__ == "__main__":
    main()

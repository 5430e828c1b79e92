"""Everything that `make bench` measures, as a table and as JSON.

python -m benchmarks [--out bench.json] [--side 2048] [--largest 4096]
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from benchmarks import device, request, session
from benchmarks.process import machine


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=8, help="of each candidate beside the session"
    )
    parser.add_argument("--side", type=int, default=2048, help="of the raster asked for")
    parser.add_argument("--largest", type=int, default=8192, help="of the raster for memory")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    began = time.perf_counter()
    console = Console()
    about = machine()
    console.print("\n".join(f"{name}: {value}" for name, value in about.items()))
    console.rule("the session, the machine and the peers")
    compared = session.compare(options.rounds)
    session.show(compared, console)
    console.rule("the session on a CUDA device")
    on_device = device.measure(options.rounds)
    device.show(on_device, console)
    console.rule("whole requests")
    requests = request.compare(options.side)
    request.show(requests, console)
    console.rule("start")
    started = request.start()
    request.show_start(started, console)
    console.rule("memory")
    memory = request.memory((1024, options.largest))
    request.show_memory(memory, console)
    console.print(f"all in {time.perf_counter() - began:.0f} s")
    if options.out:
        found = {
            "machine": about,
            "session": asdict(compared),
            "device": asdict(on_device) if on_device else None,
            "requests": [asdict(one) for one in requests],
            "start": {name: asdict(taken) for name, taken in started.items()},
            "memory": memory,
        }
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

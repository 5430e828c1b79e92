"""`make bench`: all measurements, as tables and as JSON.

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
    parser.add_argument("--rounds", type=int, default=8, help="number of rounds of each candidate")
    parser.add_argument(
        "--side", type=int, default=2048, help="side of the raster of a request, pixels"
    )
    parser.add_argument(
        "--largest", type=int, default=8192, help="side of the raster of the memory test, pixels"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
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
    console.print(f"total: {time.perf_counter() - began:.0f} s")
    if options.out:
        results = {
            "machine": about,
            "session": asdict(compared),
            "device": asdict(on_device) if on_device else None,
            "requests": [asdict(one) for one in requests],
            "start": {name: asdict(taken) for name, taken in started.items()},
            "memory": memory,
        }
        options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

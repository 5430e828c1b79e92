"""Fuzzing: mutated GeoTIFFs through the real service, on a real socket.

    python -m benchmarks.fuzz [--cases 10000] [--first 0] [--workers 2]

Each worker is a process that runs a service and sends it one case after another. A crash in C ends
only that process, and is reported with the seed of its case. A case fails if the process dies, if
no response arrives within the limit, if the status is 5xx, or if the response discloses internals
of the service. The last line of the output is the report as JSON; the exit status is 1 if a case
failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx

from benchmarks.mutations import Case, case, sound_files
from benchmarks.serving import served
from benchmarks.tiny_zoo import write_zoo

LIMIT_SECONDS = 60.0
# Settings of a service that accepts uploads from strangers on a small machine.
SETTINGS = {"max_raster_bytes": 64 * 2**20, "max_body_bytes": 8 * 2**20, "max_concurrency": 1}
_INTERNALS = re.compile(
    rb"Traceback|site-packages|\.py\b|rasterio|CPLE_|numpy|onnx|0x[0-9a-f]{6,}|pimc-|/tmp|"
    rb"/(?:home|root|usr|var|work|proc)/|\d{4}\.tif"
)


@dataclass(kw_only=True)
class Report:
    """Outcome of the cases."""

    cases: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    slowest_seed: int = -1
    peak_mb: int = 0
    """Largest resident memory of a worker, in MiB."""
    codes: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)


def main() -> None:
    """Run the requested cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--limit", type=float, default=LIMIT_SECONDS, help="seconds a case may take"
    )
    parser.add_argument("--keep", type=Path, help="folder for the files of cases that fail")
    options = parser.parse_args()
    begun = time.monotonic()
    report = Report()
    shares = [range(options.first + n, options.first + options.cases, options.workers)
              for n in range(options.workers)]  # fmt: skip
    lock = threading.Lock()
    threads = [
        threading.Thread(target=_watch, args=(list(share), report, lock, options.limit))
        for share in shares
    ]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        os.environ["TMPDIR"] = folder
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        left = [path.name for path in Path(folder).glob("pimc-*/request-*")]
    report.seconds = round(time.monotonic() - begun, 1)
    if left:
        report.failures.append({"seed": None, "why": f"temporary files were left: {left[:5]}"})
    if options.keep:
        _save(report, options.keep)
    print(json.dumps({**vars(report), "codes": dict(report.codes.most_common())}))
    sys.exit(1 if report.failures else 0)


def _watch(seeds: list[int], report: Report, lock: threading.Lock, limit: float) -> None:
    """Run these cases in workers; replace a worker that has died or hangs."""
    context = multiprocessing.get_context("spawn")
    while seeds:
        ours, theirs = context.Pipe()
        worker = context.Process(target=work, args=(theirs, seeds), daemon=True)
        worker.start()
        theirs.close()
        why = _collect(ours, worker, seeds, report, lock, limit)
        if why:
            with lock:
                report.cases += 1
                report.failures.append({"seed": seeds[0], "why": why})
            print(f"seed {seeds[0]}: {why}", file=sys.stderr)
            del seeds[0]
        else:
            worker.join(60)  # it cleans up after its last response
        worker.kill()
        worker.join()


def _collect(
    ours: Connection, worker: BaseProcess, seeds: list[int], report: Report, lock: threading.Lock,
    limit: float,
) -> str:  # fmt: skip
    """Collect results until all are there or the worker stops; the reason if it stops."""
    patience = limit + 60  # the first case waits for the service to start
    while seeds:
        if not ours.poll(patience):
            return f"no response within {limit:g} s"
        patience = limit
        try:
            result = ours.recv()
        except EOFError:
            worker.join()
            return f"the process died: exit code {worker.exitcode}"
        if result is None:
            continue  # the service is ready
        with lock:
            report.cases += 1
            report.codes[result["code"]] += 1
            report.peak_mb = max(report.peak_mb, result["peak_mb"])
            if result["seconds"] > report.slowest:
                report.slowest, report.slowest_seed = result["seconds"], seeds[0]
            if result["why"]:
                report.failures.append({"seed": seeds[0], "why": result["why"]})
                print(f"seed {seeds[0]}: {result['why']}", file=sys.stderr)
        del seeds[0]
    return ""


def work(theirs: Connection, seeds: list[int]) -> None:
    """Worker process: a service, and the cases one after another."""
    with tempfile.TemporaryDirectory(prefix="fuzz-files-") as folder:
        sound = sound_files(Path(folder))
        with served(model_dir=write_zoo(Path(folder) / "zoo"), **SETTINGS) as client:
            theirs.send(None)
            for seed in seeds:
                theirs.send(_one(client, case(seed, sound)))


def _one(client: httpx.Client, sent: Case) -> dict[str, Any]:
    begun = time.monotonic()
    response = client.post(
        f"/{sent.task}",
        files=[("files", file) for file in sent.files],
        data=dict(sent.fields),
        headers={"Accept": sent.accept},
    )
    seconds = round(time.monotonic() - begun, 3)
    kind = response.headers.get("content-type", "")
    code = response.json().get("code", "200") if "problem" in kind else str(response.status_code)
    return {
        "code": code,
        "seconds": seconds,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "why": fault_of(response, sent),
    }


def fault_of(response: httpx.Response, sent: Case) -> str:
    """The fault of a response, empty if there is none."""
    if response.status_code >= 500:
        return f"{response.status_code} ({sent.description}, {sent.task}): {response.text[:300]}"
    kind = response.headers.get("content-type", "")
    if not kind.startswith(
        ("application/json", "application/problem+json", "application/geo+json")
    ):
        return ""
    # The response may repeat text of the request: a name, a date.
    text = response.content
    for name, _ in sent.files:
        text = text.replace(name.rpartition("/")[2].encode(), b"")
    for value in sent.fields.values():
        text = text.replace(value.encode(), b"")
    found = _INTERNALS.search(text)
    return f"discloses internals ({found[0]!r}): {response.text[:300]}" if found else ""


def _save(report: Report, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        sound = sound_files(Path(scratch))
    for failure in report.failures:
        if failure["seed"] is None:
            continue
        for number, (_, content) in enumerate(case(failure["seed"], sound).files):
            (folder / f"{failure['seed']}-{number}.tif").write_bytes(content)


if __name__ == "__main__":
    main()

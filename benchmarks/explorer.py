"""The explorer in headless Chromium: first picture, frames per second, memory of a large result.

    python -m benchmarks.explorer [--demo demo/stack] [--side 2048] [--large 10980]

Frames are those of `requestAnimationFrame` while the mouse and the keyboard move the map and its
sliders, without a GPU. The map with a side of `--side` is a run of the tiny land-cover model on a
synthetic stack, chosen and run in the page. The large one is a class map that takes the place of a
small job's result on disk, so that only reading and drawing it is measured, not the run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import rasterio
from affine import Affine
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright
from rich.console import Console
from rich.table import Table

from benchmarks.browser import OPTIONS, chromium_path
from benchmarks.landscape import write_stack
from benchmarks.process import ROOT, Served, machine, peak_memory, served
from benchmarks.tiny_zoo import write_zoo
from models.registry import ZOO, Registry
from service.grid import Grid, Window
from service.write.cog import RasterWriter
from service.write.predictions import Layer

_SECONDS = 4.0
"""Seconds of each interaction."""
_PATIENCE_MS = 600_000
_VIEW = ViewportSize(width=1400, height=900)
_RESULT = ".leaflet-result-pane canvas"
_RECORD = """() => {
    const times = [];
    globalThis.frameTimes = times;
    globalThis.recording = true;
    const tick = (time) => {
        times.push(time);
        if (globalThis.recording) requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
}"""
_STOP = "() => { globalThis.recording = false; return globalThis.frameTimes; }"


@dataclass(frozen=True, kw_only=True)
class Frames:
    """Frames during an interaction."""

    per_second: float
    """Mean."""
    slow: float
    """Share of frames that took more than 20 ms, 0 to 1."""
    longest: float
    """Longest time between two frames, milliseconds."""


@dataclass(frozen=True, kw_only=True)
class Large:
    """A large result in the page."""

    file: int
    """Size of its COG, bytes."""
    first: float
    """Seconds from opening its link until it is on the map."""
    read: int
    """Bytes of the file that the page received, by the end."""
    peak: int
    """Peak resident memory of the page's process, bytes."""
    before: int
    """Peak resident memory before the result is opened, bytes."""


@contextmanager
def _chromium() -> Iterator[Browser]:
    path = chromium_path()
    if path is None:
        raise SystemExit("needs Chromium (Debian: chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        yield browser
        browser.close()


def _opened(browser: Browser, url: str) -> Page:
    page = browser.new_context(viewport=_VIEW).new_page()
    page.set_default_timeout(_PATIENCE_MS)
    page.goto(url)
    page.wait_for_selector("html[data-ready=yes]")
    return page


def _middle(page: Page) -> tuple[float, float]:
    """The middle of the map, pixels of the page."""
    box = page.locator("#map").bounding_box()
    if box is None:
        raise RuntimeError("the map is not shown")
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def first_picture(browser: Browser, url: str) -> dict[str, float]:
    """Seconds until the page is ready, and from "Open the demo" to its first picture."""
    started = time.perf_counter()
    page = _opened(browser, url)
    ready = time.perf_counter()
    page.click("#open-demo")
    page.wait_for_selector(".leaflet-picture-pane canvas")
    shown = time.perf_counter()
    page.context.close()
    return {"ready": ready - started, "picture": shown - ready}


def interactions(browser: Browser, url: str, stack: list[Path]) -> dict[str, Frames]:
    """Run a task on a stack in the page, and move its result."""
    page = _opened(browser, url)
    page.set_input_files("#files", stack)
    page.wait_for_selector(".leaflet-picture-pane canvas")
    page.wait_for_selector("#findings .hint")
    page.click("#run")
    page.wait_for_selector(_RESULT)
    x, y = _middle(page)

    def pan(step: int) -> None:
        angle = step / 15
        page.mouse.move(x + 200 * np.sin(angle), y + 150 * np.sin(1.7 * angle))

    def zoom(step: int) -> None:
        page.mouse.wheel(0, -120 if step // 4 % 2 == 0 else 120)
        page.wait_for_timeout(100)  # as fast as a hand turns a wheel

    def slide(selector: str) -> Callable[[int], None]:
        page.focus(selector)
        return lambda step: page.keyboard.press("ArrowLeft" if step // 60 % 2 else "ArrowRight")

    page.mouse.move(x, y)
    page.mouse.down()
    found = {"pan": _frames(page, pan)}
    page.mouse.up()
    found["zoom"] = _frames(page, zoom)
    found["opacity"] = _frames(page, slide("#opacity"))
    found["swipe"] = _frames(page, slide("#swipe"))
    page.context.close()
    return found


def _frames(page: Page, act: Callable[[int], None]) -> Frames:
    """Frames while an action is repeated."""
    page.evaluate(_RECORD)
    end, step = time.perf_counter() + _SECONDS, 0
    while time.perf_counter() < end:
        act(step)
        step += 1
    times = np.array(page.evaluate(_STOP))
    gaps = np.diff(times)
    return Frames(
        per_second=1000 / float(gaps.mean()),
        slow=float((gaps > 20).mean()),
        longest=float(gaps.max()),
    )


def large_result(
    browser: Browser, service: Served, state: Path, stack: list[Path], side: int
) -> Large:
    """Open a large class map by its link, zoom to its pixels and move over it."""
    page = _opened(browser, service.url)
    page.set_input_files("#files", stack)
    page.wait_for_selector("#findings .hint")
    page.click("#run")
    page.wait_for_selector(_RESULT)
    link = page.url
    page.context.close()
    (path,) = (state / "jobs" / link.partition("job=")[2]).glob("result-*/class.tif")
    _write_classes(path, side)
    page = _opened(browser, service.url)
    before = max(map(peak_memory, _renderers(browser)))
    received: list[int] = []
    page.on(
        "response",
        lambda response: (
            received.append(int(response.headers.get("content-length", 0)))
            if response.url.endswith("/result/class")
            else None
        ),
    )
    page.goto("about:blank")
    started = time.perf_counter()
    page.goto(link)
    page.wait_for_selector(_RESULT)
    first = time.perf_counter() - started
    x, y = _middle(page)
    page.focus("#map")
    for _ in range(6):
        page.keyboard.press("+")
        page.wait_for_timeout(300)
    for turn in range(40):
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x - 300, y - (200 if turn % 2 else -200), steps=10)
        page.mouse.up()
    for _ in range(6):
        page.keyboard.press("-")
        page.wait_for_timeout(300)
    peak = max(map(peak_memory, _renderers(browser)))
    page.context.close()
    return Large(
        file=path.stat().st_size, first=first, read=sum(received), peak=peak, before=before
    )


def _write_classes(path: Path, side: int) -> None:
    """Replace a result by a class map of fields of 16 pixels, as the service writes one."""
    classes = Registry.load(ZOO).bundles["pixels-landcover"].card.classes
    with rasterio.open(path) as file:
        tags = {name: value for name, value in file.tags().items() if name.startswith("PIMC_MODEL")}
        crs, transform = file.crs, file.transform
    grid = Grid(crs=crs, transform=Affine(*transform), width=side, height=side)
    rng = np.random.default_rng(0)
    tile = np.kron(rng.integers(0, len(classes), (32, 32)), np.ones((16, 16))).astype(np.uint8)
    noisy = rng.random(tile.shape) < 0.05
    tile[noisy] = rng.integers(0, len(classes), noisy.sum())
    row = np.tile(tile, (1, -(-side // 512)))[:, :side]
    layer = Layer(name="class", bands=("class",), legend=classes)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        with RasterWriter(Path(folder), grid, (layer,), tags) as writer:
            for top in range(0, side, 512):
                height = min(512, side - top)
                window = Window(0, top, side, height)
                writer.write(window, {"class": row[None, :height]})
            made = writer.finish()["class"]
        made.replace(path)


def _renderers(browser: Browser) -> list[int]:
    """Process ids of the browser's pages."""
    session = browser.new_browser_cdp_session()
    found = session.send("SystemInfo.getProcessInfo")["processInfo"]
    session.detach()
    return [int(process["id"]) for process in found if process["type"] == "renderer"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--demo", type=Path, default=ROOT / "demo" / "stack", help="folder of the demo's stack"
    )
    parser.add_argument("--side", type=int, default=2048, help="side of the map to move, pixels")
    parser.add_argument("--large", type=int, default=10980, help="side of the large map, pixels")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    if not options.demo.is_dir():
        parser.error(f"{options.demo} is not a folder: `make demo` makes it, or give --demo")
    console = Console()
    console.print("\n".join(f"{name}: {value}" for name, value in machine().items()))
    with tempfile.TemporaryDirectory(prefix="explorer-") as own:
        zoo, state, stacks = (Path(own) / name for name in ("zoo", "state", "stacks"))
        for folder in (zoo, state, stacks / "side", stacks / "small"):
            folder.mkdir(parents=True)
        stack = write_stack(stacks / "side", options.side, 4)
        small = write_stack(stacks / "small", 64, 4)
        settings = {
            "PIMC_MODEL_DIR": str(write_zoo(zoo)),
            "PIMC_STATE_DIR": str(state),
            "PIMC_DEMO_DIR": str(options.demo),
        }
        with served(**settings) as service, _chromium() as browser:
            rounds = [first_picture(browser, service.url) for _ in range(3)]
            picture = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
            frames = interactions(browser, service.url, stack)
            large = large_result(browser, service, state, small, options.large)
    console.print(
        f"page ready in {picture['ready']:.2f} s, first picture of the demo "
        f"{picture['picture']:.2f} s later"
    )
    table = Table("interaction", "frames per second", "over 20 ms", "longest")
    for name, one in frames.items():
        table.add_row(name, f"{one.per_second:.1f}", f"{one.slow:.1%}", f"{one.longest:.0f} ms")
    console.print(table)
    console.print(
        f"{options.large} x {options.large}: shown after {large.first:.2f} s, "
        f"{large.read / 1e6:.1f} of {large.file / 1e6:.1f} MB read; peak memory of the page "
        f"{large.peak / 1e6:.0f} MB, {large.before / 1e6:.0f} MB before"
    )
    if options.out:
        results = {
            "machine": machine(),
            "picture": picture,
            "frames": {name: asdict(one) for name, one in frames.items()},
            "large": asdict(large),
        }
        options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

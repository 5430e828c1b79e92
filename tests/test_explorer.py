"""The explorer page in a real browser, against the service itself over a socket."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import rasterio
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Route, expect
from pyproj import Transformer

from benchmarks.serving import served
from tests.kits.browser import chromium, emptied, open_page, tab_of
from tests.kits.gate import HELD, Gate, held_model, zoo_with_a_held_model
from tests.kits.jobs import stack
from tests.kits.sockets import HTTPServer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stack of eight dates; its files are the demo."""
    made = tmp_path_factory.mktemp("stack")
    stack(made, 64, 96, dates=8)
    return made


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[httpx.Client]:
    zoo = held_model(tmp_path_factory.mktemp("zoo"))
    with served(built_in=True, model_dir=zoo, demo_dir=folder) as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as made:
        yield made


@pytest.fixture(scope="module")
def only_tab(browser: Browser) -> Page:
    return tab_of(browser)


@pytest.fixture
def tab(only_tab: Page) -> Page:
    """An empty tab."""
    return emptied(only_tab)


@pytest.fixture
def page(tab: Page, api: httpx.Client) -> Page:
    """A tab with the page of the service."""
    open_page(tab, str(api.base_url))
    return tab


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A service that requires a key."""
    zoo = zoo_with_a_held_model(tmp_path_factory.mktemp("zoo"))
    with served(model_dir=zoo, api_keys=("sesame",)) as client:
        yield client


def choose(page: Page, folder: Path) -> None:
    page.set_input_files("#files", sorted(folder.glob("*.tif")))
    page.wait_for_selector(".leaflet-picture-pane canvas")


def run(page: Page, *, model: str | None = HELD) -> None:
    """Run the page's task by a tiny model, which is done at once; None for the page's choice."""
    if model is not None:
        page.select_option("#model", model)
    page.click("#run")
    page.wait_for_selector(".leaflet-result-pane canvas")


def wait_until(page: Page, expression: str, arg: object = None) -> None:
    """Wait for an expression or a function of `arg` to be true.

    Playwright's `wait_for_function` evaluates text within the page once its first look fails, which
    the page's policy forbids.
    """
    while not page.evaluate(expression, arg):
        page.wait_for_timeout(20)


# As Base64: a message from the browser takes microseconds for each number of an array.
PIXELS = """c => {
    const values = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
    let text = '';
    for (const value of values) text += String.fromCharCode(value);
    return [c.width, c.height, btoa(text)];
}"""


def decoded(canvas: tuple[int, int, str]) -> np.ndarray[Any, Any]:
    """The pixels (h, w, 4) of a canvas, given what `PIXELS` returns."""
    width, height, text = canvas
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(height, width, 4)


def colours(page: Page, pane: str) -> np.ndarray[Any, Any]:
    """The pixels (h, w, 4) of a layer's canvas."""
    return decoded(page.eval_on_selector(f".leaflet-{pane}-pane canvas", PIXELS))


def coloured(path: Path, *, overview: int | None = None) -> np.ndarray[Any, Any]:
    """A class map (h, w, 4) in the colours of its file, at full resolution or an overview."""
    options = {} if overview is None else {"overview_level": overview}
    with rasterio.open(path, **options) as file:
        classes, legend = file.read(1), file.colormap(1)
    table = np.array([legend[value] for value in range(256)], np.uint8)
    return np.asarray(table[classes])


def downloaded(page: Page) -> Path:
    """The GeoTIFF of the result, by the page's button."""
    with page.expect_download() as download:
        page.click("text=GeoTIFF (COG)")
    return download.value.path()


def accessible(page: Page) -> None:
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


# From a stack to a map ------------------------------------------------------------------------


def test_from_the_demo_to_a_map_a_pixel_and_a_file(page: Page, folder: Path) -> None:
    page.click("#open-demo")
    page.wait_for_selector(".leaflet-picture-pane canvas")
    expect(page.locator("#stack-facts")).to_contain_text("8 files")
    expect(page.locator("#stack-facts")).to_contain_text("from 2021-01-01 to 2021-08-01")
    expect(page.locator("#findings")).to_contain_text("8 dates")
    expect(page.locator("#findings")).to_contain_text("no_cloud_mask")
    run(page, model=None)
    # Each pixel has the colour that the model's card gives to the class in the file.
    np.testing.assert_array_equal(colours(page, "result"), coloured(downloaded(page)))
    with page.expect_download() as download:
        page.click("text=Zip with QGIS style")
    assert download.value.suggested_filename == "result.zip"
    expect(page.locator("#result-body")).to_contain_text("no_cloud_mask")
    expect(page.locator("#result-body > .hint")).to_contain_text("A first look at broad land cover")
    expect(page.locator("#model-text")).to_contain_text("A first look at broad land cover")
    page.click("#map", position={"x": 300, "y": 300})
    page.wait_for_selector("#pixel-body .chart")
    expect(page.locator("#pixel-body .plots canvas")).to_have_count(3)
    expect(page.locator("#pixel-body table")).to_contain_text("%")
    expect(page.locator("#pixel-body .attribution rect")).to_have_count(8)
    accessible(page)


def test_the_demo_shows_a_date_before_all_are_downloaded(page: Page) -> None:
    delayed: list[Route] = []
    page.route("**/explorer/demo/scene_2021-08-01.tif", lambda route: delayed.append(route))
    page.click("#open-demo")
    page.wait_for_selector(".leaflet-picture-pane canvas")
    expect(page.locator("#run")).to_be_disabled()
    first(page, delayed).continue_()
    expect(page.locator("#stack-facts")).to_contain_text("8 files")
    expect(page.locator("#run")).to_be_enabled()


def test_a_forecast_is_shown_with_its_backtest(page: Page, tmp_path: Path) -> None:
    stack(tmp_path, 16, 16, dates=12)
    choose(page, tmp_path)
    page.select_option("#task", "forecast")
    run(page, model=None)
    expect(page.locator("#band option")).to_have_count(30)
    assert colours(page, "result").shape == (16, 16, 4)
    summary = page.locator("#result-body .backtest")
    expect(summary).to_contain_text("This forecast")
    expect(summary).to_contain_text("Last value")
    expect(page.locator("#result-body")).to_contain_text("Backtest on the past of this stack")
    page.click("#map", position={"x": 300, "y": 300})
    expect(page.locator("#pixel-body")).to_contain_text("Backtest on the past of this pixel")
    # The numbers are those of the response.
    shown = page.locator("#pixel-body .backtest td.number").first.inner_text()
    note = page.locator("#pixel-body figcaption", has_text="Backtest").inner_text()
    assert float(shown) > 0
    assert re.search(r"[1-9]\d* values from [1-9]\d* forecasts", note), note


def test_pixels_similar_to_a_pixel_are_mapped(page: Page, folder: Path) -> None:
    choose(page, folder)
    page.click("#map", position={"x": 300, "y": 300})
    page.click("text=Find pixels similar to this pixel")
    expect(page.locator("#band")).to_have_text("similarity")
    page.wait_for_selector(".leaflet-result-pane canvas")
    assert colours(page, "result").shape == (64, 96, 4)
    where = page.locator("#pixel-body .hint").first.inner_text()
    lon, lat = map(float, re.findall(r"-?\d+\.\d+", where))
    with rasterio.open(downloaded(page)) as file:
        there = Transformer.from_crs("EPSG:4326", file.crs, always_xy=True)
        (value,) = next(file.sample([there.transform(lon, lat)]))
        similarity = file.read(1)
    assert value == pytest.approx(1, abs=1e-5)
    assert similarity.min() < 0.999


def test_a_large_result_is_drawn_in_parts(page: Page, tmp_path: Path) -> None:
    stack(tmp_path, 32, 2304, dates=8)
    choose(page, tmp_path)
    run(page)
    path = downloaded(page)
    # The whole map is the first overview that is small enough for one canvas.
    whole = colours(page, "result")
    assert whole.shape == (16, 1152, 4)
    np.testing.assert_array_equal(whole, coloured(path, overview=0))
    assert page.locator(".leaflet-result-pane .leaflet-tile").count() == 0
    page.focus("#map")
    for _ in range(3):
        page.keyboard.press("+")
    page.wait_for_selector(".leaflet-result-pane .leaflet-tile-loaded")
    wait_until(
        page,
        "() => !document.querySelector("
        "'.leaflet-result-pane .leaflet-tile:not(.leaflet-tile-loaded)')",
    )
    tiles = page.eval_on_selector_all(
        ".leaflet-result-pane .leaflet-tile",
        f"all => all.map(c => [{{...c.dataset}}, ({PIXELS})(c)])",
    )
    expected = coloured(path)
    assert tiles
    for place, canvas in tiles:
        assert place["level"] == "0"
        left, top = int(place["left"]), int(place["top"])
        found = decoded(canvas)
        part = expected[top : top + len(found), left : left + len(found)]
        np.testing.assert_array_equal(found[: part.shape[0], : part.shape[1]], part)
    for _ in range(3):
        page.keyboard.press("-")
    expect(page.locator(".leaflet-result-pane .leaflet-tile")).to_have_count(0)


def test_a_picture_of_a_large_file_takes_every_nth_pixel(page: Page, tmp_path: Path) -> None:
    stack(tmp_path, 40, 2304, dates=1)
    choose(page, tmp_path)
    found = colours(page, "picture").astype(int)
    assert found.shape == (18, 1024, 4)
    with rasterio.open(tmp_path / "scene_2021-01-01.tif") as file:
        blue = file.read(1)
    rows = ((np.arange(18) + 0.5) * 40 / 18).astype(int)
    columns = ((np.arange(1024) + 0.5) * 2304 / 1024).astype(int)
    taken = blue[np.ix_(rows, columns)].ravel()
    # The colour rises with the value, whatever the stretch.
    assert (np.diff(found[..., 2].ravel()[np.argsort(taken, kind="stable")]) >= 0).all()
    assert np.ptp(found[..., 2]) == 255


def test_the_picture_follows_the_date(page: Page, folder: Path) -> None:
    choose(page, folder)
    first = colours(page, "picture")
    page.fill("#date", "5")
    expect(page.locator("#date-text")).to_have_text("2021-06-01")
    wait_until(
        page,
        "first => document.querySelector('.leaflet-picture-pane canvas')"
        ".getContext('2d').getImageData(0, 0, 1, 1).data.join() !== first",
        arg=",".join(str(value) for value in first[0, 0]),
    )


def test_a_past_run_opens_by_its_link(page: Page, folder: Path) -> None:
    choose(page, folder)
    run(page)
    link, drawn = page.url, colours(page, "result")
    assert "#job=" in link
    open_page(emptied(page), link)
    page.wait_for_selector(".leaflet-result-pane canvas")
    np.testing.assert_array_equal(colours(page, "result"), drawn)


def test_opacity_and_swipe(page: Page, folder: Path) -> None:
    choose(page, folder)
    run(page)
    page.fill("#opacity", "30")
    page.fill("#swipe", "50")
    pane = page.locator(".leaflet-result-pane")
    expect(pane).to_have_css("opacity", "0.3")
    expect(pane).not_to_have_css("clip", "auto")


def test_fields_are_drawn_and_described(page: Page, folder: Path, tmp_path: Path) -> None:
    choose(page, folder)
    with rasterio.open(next(folder.glob("*.tif"))) as file:
        west, south, east, north = file.bounds
        crs = file.crs
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    back = Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    ring = [list(back.transform(*place)) for place in ring]
    field = {
        "type": "Feature",
        "properties": {"farm": "north"},
        "geometry": {"type": "Polygon", "coordinates": [ring]},
    }
    path = tmp_path / "fields.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [field]}))
    page.set_input_files("#fields", path)
    page.select_option("#model", HELD)
    page.click("#run")
    page.wait_for_selector(".leaflet-result-pane path")
    page.click("#map", position={"x": 400, "y": 400})
    expect(page.locator("#pixel-body")).to_contain_text("north")
    expect(page.locator("#pixel-body")).to_contain_text("hectares")
    page.click("text=Find pixels similar to this field")
    expect(page.locator("#band")).to_have_text("similarity")
    page.wait_for_selector(".leaflet-result-pane canvas")


def test_labelled_places_become_a_model(page: Page, folder: Path) -> None:
    choose(page, folder)
    page.check("#labelling")
    for name, x in (("left", 250), ("right", 450)):
        page.fill("#class-name", name)
        for n in range(6):
            page.click("#map", position={"x": x + 12 * n, "y": 300 + 40 * n})
    expect(page.locator("#label-counts")).to_have_text("left6right6")
    page.fill("#head-name", "two-sides")
    page.click("#teach-run")
    expect(page.locator("#teach-score")).to_contain_text("'two-sides' is ready: macro-F1")
    expect(page.locator("#model")).to_have_value("two-sides")
    run(page, model=None)
    expect(page.locator("#legend")).to_have_text("leftright")


# What goes wrong ------------------------------------------------------------------------------


def test_a_bad_file_shows_the_services_problem(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "2021-01-05.tif"
    path.write_bytes(b"<html>not a raster</html>")
    page.set_input_files("#files", path)
    # The service examines the stack before anything runs.
    expect(page.locator("#problem")).to_contain_text("would reject this stack")
    expect(page.locator("#problem")).to_contain_text("2021-01-05.tif")
    page.click("#run")
    expect(page.locator("#problem")).not_to_contain_text("would reject this stack")
    expect(page.locator("#problem")).to_contain_text("2021-01-05.tif")
    accessible(page)


def test_a_run_is_cancelled(page: Page, gate: Gate, folder: Path) -> None:
    choose(page, folder)
    page.select_option("#model", HELD)
    with gate.held():
        page.click("#run")
        page.wait_for_url("**/#job=*")
        page.click("#cancel")
        expect(page.locator("#result-body")).to_contain_text("cancelled")
    expect(page.locator("#jobs")).to_contain_text("dismissed")


def test_a_lost_connection_is_retried(page: Page, gate: Gate, folder: Path) -> None:
    choose(page, folder)
    page.select_option("#model", HELD)
    lost = threading.Event()

    def lose(route: Any) -> None:
        lost.set()
        route.abort()

    with gate.held():
        page.click("#run")
        page.wait_for_url("**/#job=*")
        page.route("**/jobs/*", lose)
        expect(page.locator("#status")).to_contain_text("Retrying")
        assert lost.is_set()
        page.unroute("**/jobs/*")
    page.wait_for_selector(".leaflet-result-pane canvas")


def test_an_api_key_is_requested(tab: Page, keyed: httpx.Client, folder: Path) -> None:
    tab.goto(str(keyed.base_url))
    expect(tab.locator("#key-dialog")).to_be_visible()
    tab.fill("#key", "wrong")
    tab.keyboard.press("Enter")
    expect(tab.locator("#key-reason")).to_contain_text("does not accept")
    tab.fill("#key", "sesame")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("html[data-ready=yes]")
    choose(tab, folder)
    run(tab)


def first(page: Page, delayed: list[Route]) -> Route:
    """The first delayed request, waited for: its event may come after a later request's reply."""
    while not delayed:
        page.wait_for_timeout(20)
    return delayed[0]


@contextmanager
def wrong_key_given(page: Page, keyed: httpx.Client) -> Iterator[list[Route]]:
    """The first key given to the page is refused; one of its two requests is delayed."""
    page.goto(str(keyed.base_url))
    expect(page.locator("#key-dialog")).to_be_visible()
    delayed: list[Route] = []
    page.route("**/heads", lambda route: delayed.append(route), times=1)
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-reason")).to_contain_text("does not accept")
    yield delayed
    page.wait_for_selector("html[data-ready=yes]")


def test_a_second_refusal_leaves_what_is_being_typed(tab: Page, keyed: httpx.Client) -> None:
    with wrong_key_given(tab, keyed) as delayed:
        tab.fill("#key", "sesame")
        with tab.expect_response("**/heads"):
            first(tab, delayed).continue_()
        expect(tab.locator("#key")).to_have_value("sesame")
        tab.keyboard.press("Enter")


def test_a_refused_key_that_was_replaced_opens_no_dialog(tab: Page, keyed: httpx.Client) -> None:
    with wrong_key_given(tab, keyed) as delayed:
        tab.fill("#key", "sesame")
        tab.keyboard.press("Enter")
        expect(tab.locator("#key-dialog")).to_be_hidden()
        first(tab, delayed).continue_()


def test_a_key_replaced_while_a_refusal_is_read_opens_no_dialog(
    tab: Page, keyed: httpx.Client
) -> None:
    with wrong_key_given(tab, keyed) as delayed:
        tab.fill("#key", "sesame")
        tab.evaluate(
            """() => {
                const read = Blob.prototype.text;
                const released = new Promise((resolve) => { window.release = resolve; });
                Blob.prototype.text = function () {
                    Blob.prototype.text = read;
                    window.reading = true;
                    return released.then(() => read.call(this));
                };
            }"""
        )
        first(tab, delayed).continue_()
        wait_until(tab, "window.reading")
        tab.keyboard.press("Enter")
        expect(tab.locator("#key-dialog")).to_be_hidden()
        wait_until(tab, "sessionStorage.getItem('pimc-api-key') === 'sesame'")
        tab.evaluate("window.release()")


# For everybody --------------------------------------------------------------------------------


def test_by_keyboard_alone(page: Page) -> None:
    def reach(selector: str) -> None:
        for _ in range(60):
            if page.evaluate("s => document.activeElement?.matches(s)", selector):
                return
            page.keyboard.press("Tab")
        pytest.fail(f"{selector} cannot be reached")

    reach("#open-demo")
    page.keyboard.press("Enter")
    page.wait_for_selector(".leaflet-picture-pane canvas")
    expect(page.locator("#run")).to_be_enabled()
    reach("#run")
    page.keyboard.press("Enter")
    page.wait_for_selector(".leaflet-result-pane canvas")
    reach("#map")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    page.wait_for_selector("#pixel-body .chart")


def test_at_the_width_of_a_phone(tab: Page, api: httpx.Client, folder: Path) -> None:
    tab.set_viewport_size({"width": 380, "height": 800})
    open_page(tab, str(api.base_url))
    choose(tab, folder)
    run(tab)
    width = tab.evaluate("document.documentElement.scrollWidth")
    assert width <= 380
    grounds = set()
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        grounds.add(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
        accessible(tab)
    assert len(grounds) == 2


def test_nothing_comes_from_elsewhere(tab: Page, api: httpx.Client) -> None:
    requested: list[str] = []
    messages: list[str] = []

    def request_seen(request: Request) -> None:
        requested.append(request.url)

    def message_seen(message: ConsoleMessage) -> None:
        messages.append(message.text)

    tab.on("request", request_seen)
    tab.on("console", message_seen)
    here = str(api.base_url)
    open_page(tab, here)
    tab.remove_listener("request", request_seen)
    tab.remove_listener("console", message_seen)
    assert any(url.endswith(".js") for url in requested)
    assert all(url.startswith((here, "data:")) for url in requested), requested
    assert not [text for text in messages if "Content Security Policy" in text]


@dataclass
class _Tiles:
    """A server of tiles, each in one colour."""

    url: str
    requests: list[tuple[int, int, int]] = field(default_factory=list)
    """Zoom, column and row of each requested tile."""
    referers: set[str | None] = field(default_factory=set)

    @staticmethod
    def colour(z: int, x: int, y: int) -> tuple[int, int, int]:
        """The colour of a tile, which differs between neighbours."""
        return 37 * x % 256, 91 * y % 256, 10 * z


@pytest.fixture
def tiles() -> Iterator[_Tiles]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            z, x, y = map(int, re.findall(r"\d+", self.path))
            made.requests.append((z, x, y))
            made.referers.add(self.headers.get("Referer"))
            content = io.BytesIO()
            Image.new("RGB", (256, 256), _Tiles.colour(z, x, y)).save(content, "PNG")
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.end_headers()
            self.wfile.write(content.getvalue())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        made = _Tiles(url=f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield made
        server.shutdown()


def test_a_background_map_is_drawn_in_the_crs_of_the_stack(
    tab: Page, tmp_path: Path, folder: Path, tiles: _Tiles
) -> None:
    with served(
        model_dir=held_model(tmp_path),
        explorer_tiles=f"{tiles.url}/{{z}}/{{x}}/{{y}}.png",
        explorer_attribution="Tiles <of> the test",
    ) as api:
        open_page(tab, str(api.base_url))
        expect(tab.locator("#attribution")).to_have_text("Background map: Tiles <of> the test")
        choose(tab, folder)
        tab.wait_for_selector(".leaflet-background-pane .leaflet-tile-loaded")
        wait_until(
            tab,
            "() => !document.querySelector("
            "'.leaflet-background-pane canvas:not(.leaflet-tile-loaded)')",
        )
        picture = tab.locator(".leaflet-picture-pane canvas").bounding_box()
        view = tab.locator("#map").bounding_box()
        screen = np.array(Image.open(io.BytesIO(tab.screenshot())).convert("RGB")).astype(int)
    assert picture is not None
    assert view is not None
    assert tiles.referers == {f"{api.base_url}/"}
    (zoom,) = {z for z, _, _ in tiles.requests}
    with rasterio.open(next(folder.glob("*.tif"))) as file:
        bounds, crs = file.bounds, file.crs
    scale = (bounds.right - bounds.left) / picture["width"]
    to_mercator = Transformer.from_crs(crs, "EPSG:3857", always_xy=True)
    half = np.pi * 6378137
    compared = 0
    for x in np.arange(view["x"] + 60, view["x"] + view["width"] - 5, 23):
        for y in np.arange(view["y"] + 5, picture["y"] - 5, 17):
            there = to_mercator.transform(
                bounds.left + (x + 0.5 - picture["x"]) * scale,
                bounds.top - (y + 0.5 - picture["y"]) * scale,
            )
            position = np.array([there[0] + half, half - there[1]]) / (2 * half) * 2**zoom
            if (np.abs(position % 1 - 0.5) > 0.48).any():
                continue  # at the edge of a tile two colours mix
            column, row = position.astype(int)
            colour = tiles.colour(zoom, int(column), int(row))
            np.testing.assert_allclose(screen[int(y), int(x)], colour, atol=2)
            compared += 1
    assert compared > 100


def test_only_the_origin_of_the_tiles_is_allowed(
    tmp_path: Path, api: httpx.Client, tiles: _Tiles
) -> None:
    html = {"Accept": "text/html"}

    def images(client: httpx.Client) -> str:
        policy = client.get("/", headers=html).headers["content-security-policy"]
        return next(rule for rule in policy.split("; ") if rule.startswith("img-src"))

    assert images(api) == "img-src 'self' data:"
    assert "pimc-background" not in api.get("/", headers=html).text
    with served(
        model_dir=held_model(tmp_path),
        explorer_tiles=f"{tiles.url}/{{z}}/{{x}}/{{y}}.png?a=1&b=2",
        explorer_attribution='"quoted"',
    ) as with_tiles:
        assert images(with_tiles) == f"img-src 'self' data: {tiles.url}"
        assert 'data-attribution="&quot;quoted&quot;"' in with_tiles.get("/", headers=html).text


# Coordinates ----------------------------------------------------------------------------------


def test_coordinates_are_those_of_proj(page: Page) -> None:
    for epsg in (4326, 3857, 3035, 32631, 32760):
        places = places_of(epsg)
        there = Transformer.from_crs("EPSG:4326", f"EPSG:{epsg}", always_xy=True)
        expected = np.stack(there.transform(*places.T), axis=1)
        found, back = page.evaluate(
            """async ([epsg, places]) => {
                const { projection } = await import(new URL("explorer/geo.js", document.baseURI));
                const { fromLonLat, toLonLat } = projection(epsg);
                const found = places.map((place) => fromLonLat(...place));
                return [found, found.map((place) => toLonLat(...place))];
            }""",
            [epsg, places.tolist()],
        )
        about = f"EPSG:{epsg}"
        atol = 1e-8 if epsg == 4326 else 0.001
        np.testing.assert_allclose(found, expected, atol=atol, err_msg=about)
        np.testing.assert_allclose(back, places, atol=1e-8, err_msg=about)


def places_of(epsg: int) -> np.ndarray[Any, Any]:
    """Random longitudes and latitudes (50, 2) in the area of a CRS."""
    random = np.random.default_rng(epsg)
    zone = epsg % 100 if epsg > 32600 and epsg != 4326 else 31
    south = epsg > 32700
    lon = 6.0 * zone - 183 + random.uniform(-3, 3, 50)
    lat = random.uniform(-80, 0, 50) if south else random.uniform(0, 84, 50)
    if epsg == 3035:
        lon, lat = random.uniform(-20, 40, 50), random.uniform(30, 70, 50)
    return np.stack([lon, lat], axis=1)

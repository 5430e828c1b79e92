"""The explorer page in a real browser, against the service itself over a socket."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import rasterio
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Route, expect
from pyproj import Transformer

from benchmarks.serving import served
from tests.kits.browser import chromium, opened
from tests.kits.gate import HELD, Gate, held_model, zoo_with_a_held_model
from tests.kits.jobs import stack

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
    with served(model_dir=zoo, demo_dir=folder) as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as made:
        yield made


@pytest.fixture
def page(browser: Browser, api: httpx.Client) -> Iterator[Page]:
    made = opened(browser, str(api.base_url))
    yield made
    made.context.close()


def choose(page: Page, folder: Path) -> None:
    page.set_input_files("#files", sorted(folder.glob("*.tif")))
    page.wait_for_selector(".leaflet-picture-pane canvas")


def run(page: Page) -> None:
    page.click("#run")
    page.wait_for_selector(".leaflet-result-pane canvas")


def colours(page: Page, pane: str) -> np.ndarray[Any, Any]:
    """The pixels (h, w, 4) of a layer's canvas."""
    width, height, values = page.eval_on_selector(
        f".leaflet-{pane}-pane canvas",
        "c => [c.width, c.height, "
        "[...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]",
    )
    return np.array(values, np.uint8).reshape(height, width, 4)


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
    run(page)
    # Each pixel has the colour that the model's card gives to the class in the file.
    with page.expect_download() as download:
        page.click("text=GeoTIFF (COG)")
    with rasterio.open(download.value.path()) as file:
        classes, legend = file.read(1), file.colormap(1)
    expected = np.array([legend[value] for value in classes.ravel()], np.uint8)
    np.testing.assert_array_equal(colours(page, "result"), expected.reshape(*classes.shape, 4))
    with page.expect_download() as download:
        page.click("text=Zip with QGIS style")
    assert download.value.suggested_filename == "result.zip"
    expect(page.locator("#result-body")).to_contain_text("no_cloud_mask")
    page.click("#map", position={"x": 300, "y": 300})
    page.wait_for_selector("#pixel-body .chart")
    expect(page.locator("#pixel-body .plots canvas")).to_have_count(3)
    expect(page.locator("#pixel-body table")).to_contain_text("%")
    expect(page.locator("#pixel-body .attribution rect")).to_have_count(8)
    accessible(page)


def test_the_picture_follows_the_date(page: Page, folder: Path) -> None:
    choose(page, folder)
    first = colours(page, "picture")
    page.fill("#date", "5")
    expect(page.locator("#date-text")).to_have_text("2021-06-01")
    page.wait_for_function(
        "first => document.querySelector('.leaflet-picture-pane canvas')"
        ".getContext('2d').getImageData(0, 0, 1, 1).data.join() !== first",
        arg=",".join(str(value) for value in first[0, 0]),
    )


def test_a_past_run_opens_by_its_link(page: Page, browser: Browser, folder: Path) -> None:
    choose(page, folder)
    run(page)
    assert "#job=" in page.url
    again = opened(browser, page.url)
    again.wait_for_selector(".leaflet-result-pane canvas")
    np.testing.assert_array_equal(colours(again, "result"), colours(page, "result"))
    again.context.close()


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
    page.click("#run")
    page.wait_for_selector(".leaflet-result-pane path")
    page.click("#map", position={"x": 400, "y": 400})
    expect(page.locator("#pixel-body")).to_contain_text("north")
    expect(page.locator("#pixel-body")).to_contain_text("hectares")


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
    run(page)
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


def test_an_api_key_is_requested(browser: Browser, tmp_path: Path, folder: Path) -> None:
    with served(model_dir=zoo_with_a_held_model(tmp_path / "zoo"), api_keys=("sesame",)) as keyed:
        context = browser.new_context()
        page = context.new_page()
        page.goto(str(keyed.base_url))
        expect(page.locator("#key-dialog")).to_be_visible()
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-reason")).to_contain_text("does not accept")
        page.fill("#key", "sesame")
        page.keyboard.press("Enter")
        page.wait_for_selector("html[data-ready=yes]")
        choose(page, folder)
        run(page)
        context.close()


def first(page: Page, delayed: list[Route]) -> Route:
    """The first delayed request, waited for: its event may come after a later request's reply."""
    while not delayed:
        page.wait_for_timeout(20)
    return delayed[0]


@contextmanager
def wrong_key_given(browser: Browser, tmp_path: Path) -> Iterator[tuple[Page, list[Route]]]:
    """A page whose first key is refused; one of the two requests with that key is delayed."""
    with served(model_dir=zoo_with_a_held_model(tmp_path / "zoo"), api_keys=("sesame",)) as keyed:
        context = browser.new_context()
        page = context.new_page()
        page.goto(str(keyed.base_url))
        expect(page.locator("#key-dialog")).to_be_visible()
        delayed: list[Route] = []
        page.route("**/heads", lambda route: delayed.append(route), times=1)
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-reason")).to_contain_text("does not accept")
        yield page, delayed
        page.wait_for_selector("html[data-ready=yes]")
        context.close()


def test_a_second_refusal_leaves_what_is_being_typed(browser: Browser, tmp_path: Path) -> None:
    with wrong_key_given(browser, tmp_path) as (page, delayed):
        page.fill("#key", "sesame")
        with page.expect_response("**/heads"):
            first(page, delayed).continue_()
        expect(page.locator("#key")).to_have_value("sesame")
        page.keyboard.press("Enter")


def test_a_refused_key_that_was_replaced_opens_no_dialog(browser: Browser, tmp_path: Path) -> None:
    with wrong_key_given(browser, tmp_path) as (page, delayed):
        page.fill("#key", "sesame")
        page.keyboard.press("Enter")
        expect(page.locator("#key-dialog")).to_be_hidden()
        first(page, delayed).continue_()


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


@pytest.mark.parametrize("dark", [False, True])
def test_at_the_width_of_a_phone(
    browser: Browser, api: httpx.Client, folder: Path, dark: bool
) -> None:
    page = opened(browser, str(api.base_url), width=380, height=800, dark=dark)
    choose(page, folder)
    run(page)
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 380
    accessible(page)
    page.context.close()


def test_nothing_comes_from_elsewhere(browser: Browser, api: httpx.Client) -> None:
    context = browser.new_context()
    page = context.new_page()
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    policies = []
    page.on("console", lambda message: policies.append(message.text))
    page.goto(str(api.base_url))
    page.wait_for_selector("html[data-ready=yes]")
    here = str(api.base_url)
    assert all(url.startswith((here, "data:")) for url in requested), requested
    assert not [text for text in policies if "Content Security Policy" in text]
    context.close()


# Coordinates ----------------------------------------------------------------------------------


@pytest.mark.parametrize("epsg", [4326, 3857, 3035, 32631, 32760])
def test_coordinates_are_those_of_proj(page: Page, epsg: int) -> None:
    random = np.random.default_rng(epsg)
    zone = epsg % 100 if epsg > 32600 and epsg != 4326 else 31
    south = epsg > 32700
    lon = 6.0 * zone - 183 + random.uniform(-3, 3, 50)
    lat = random.uniform(-80, 0, 50) if south else random.uniform(0, 84, 50)
    if epsg == 3035:
        lon, lat = random.uniform(-20, 40, 50), random.uniform(30, 70, 50)
    there = Transformer.from_crs("EPSG:4326", f"EPSG:{epsg}", always_xy=True)
    expected = np.stack(there.transform(lon, lat), axis=1)
    found, back = page.evaluate(
        """async ([epsg, places]) => {
            const { projection } = await import(new URL("explorer/geo.js", document.baseURI));
            const { fromLonLat, toLonLat } = projection(epsg);
            const found = places.map((place) => fromLonLat(...place));
            return [found, found.map((place) => toLonLat(...place))];
        }""",
        [epsg, np.stack([lon, lat], axis=1).tolist()],
    )
    np.testing.assert_allclose(found, expected, atol=1e-8 if epsg == 4326 else 0.001)
    np.testing.assert_allclose(back, np.stack([lon, lat], axis=1), atol=1e-8)

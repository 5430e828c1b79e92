"""A real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Page, expect, sync_playwright

from benchmarks.browser import OPTIONS, chromium_path
from tests.kits.patience import PATIENCE
from tests.kits.programs import require

_PATIENCE_MS = 1000 * PATIENCE
_BLANK = "about:blank"


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser; skips the test where Chromium is missing, but never in CI."""
    found = chromium_path()
    require(found, "Chromium", "chromium")
    with sync_playwright() as playwright:
        expect.set_options(timeout=_PATIENCE_MS)
        browser = playwright.chromium.launch(executable_path=found, args=OPTIONS)
        browser.on("context", lambda made: made.set_default_timeout(_PATIENCE_MS))
        try:
            yield browser
        finally:
            browser.close()


def tab_of(browser: Browser) -> Page:
    """An empty tab in a session of its own; a script's failure fails the test."""
    page = browser.new_context(reduced_motion="reduce", accept_downloads=True).new_page()
    page.on("pageerror", _fail)
    return page


def emptied(page: Page) -> Page:
    """A tab as good as new: blank, without routes or stored values, of a wide light window.

    A new tab in a new session costs Chromium a process, which takes twice the time of a page.
    """
    page.unroute_all(behavior="ignoreErrors")
    if page.url != _BLANK:
        page.evaluate("() => { localStorage.clear(); sessionStorage.clear(); }")
        page.goto(_BLANK)
    page.context.clear_cookies()
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 1400, "height": 900})
    return page


def open_page(page: Page, url: str) -> None:
    """Open an address and wait until its scripts are ready."""
    page.goto(url)
    page.wait_for_selector("html[data-ready=yes]")


def _fail(error: Exception) -> None:
    raise AssertionError(f"a script of the page failed: {error}")

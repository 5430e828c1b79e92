"""A real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Page, expect, sync_playwright

from benchmarks.browser import OPTIONS, chromium_path
from tests.kits.patience import PATIENCE
from tests.kits.programs import require

_PATIENCE_MS = 1000 * PATIENCE


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


def opened(
    browser: Browser, url: str, *, width: int = 1400, height: int = 900, dark: bool = False
) -> Page:
    """The page at an address, once its scripts are ready; a script's failure fails the test."""
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if dark else "light",
        reduced_motion="reduce",
        accept_downloads=True,
    )
    page = context.new_page()
    page.on("pageerror", _fail)
    page.goto(url)
    page.wait_for_selector("html[data-ready=yes]")
    return page


def _fail(error: Exception) -> None:
    raise AssertionError(f"a script of the page failed: {error}")

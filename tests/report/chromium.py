"""Chromium without a network, for tests of pages that are opened from disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@contextmanager
def chromium() -> Iterator[Browser]:
    """The Chromium of this machine; skips the test if there is none."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip("needs Chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, path: Path, address: str = "", **options: Any) -> Iterator[Page]:
    """A page from disk in a fresh tab.

    At the end, the page must have had no error, and have asked for nothing but itself.
    """
    errors: list[str] = []
    requests: list[str] = []
    viewport = options.pop("viewport", {"width": 1280, "height": 900})
    context = browser.new_context(offline=True, viewport=viewport, **options)
    context.set_default_timeout(5000)
    tab = context.new_page()
    tab.on("console", lambda said: errors.append(said.text))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(path.as_uri() + address)
    yield tab
    context.close()
    assert errors == []
    outside = [url for url in requests if not url.startswith("data:image/")]
    assert {url.split("#")[0] for url in outside} == {path.as_uri()}

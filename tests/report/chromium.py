"""Chromium without a network, for tests of pages that are opened from disk."""

from __future__ import annotations

import os
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
    """The Chromium of this machine; without one, the test is skipped, but in CI it fails."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs Chromium: make browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@contextmanager
def new_tab(browser: Browser, **options: Any) -> Iterator[Page]:
    """A tab of its own.

    At the end, its pages must have had no error, and have asked for nothing but themselves.
    """
    said: list[str] = []
    viewport = options.pop("viewport", {"width": 1280, "height": 900})
    context = browser.new_context(offline=True, viewport=viewport, **options)
    context.set_default_timeout(5000)
    tab = context.new_page()
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: said.extend(_outside(request.url)))
    yield tab
    context.close()
    assert said == []


def open_page(tab: Page, path: Path, address: str = "") -> None:
    """Open a page from disk afresh, at an address within it."""
    tab.goto("about:blank")
    tab.goto(path.as_uri() + address)


def _outside(url: str) -> list[str]:
    return [] if url.startswith(("file:", "data:image/", "about:blank")) else [f"asked for {url}"]

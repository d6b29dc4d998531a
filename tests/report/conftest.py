"""A browser, and a tab that shows the page of a module's fixture ``path``, opened afresh."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from tests.report.chromium import chromium, new_tab, open_page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def shared_tab(browser: Browser) -> Iterator[Page]:
    with new_tab(browser) as tab:
        yield tab


@pytest.fixture
def tab(shared_tab: Page, path: Path) -> Page:
    open_page(shared_tab, path)
    return shared_tab

"""The site builds without a warning, its tutorials run, and its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
TUTORIALS = sorted(path.stem for path in (ROOT / "docs" / "tutorials").glob("*.md"))


class _Page(HTMLParser):
    """The links of a page, and what they may point to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if given.get("id"):
            self.anchors.add(str(given["id"]))
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))
        if tag in ("img", "script") and given.get("src"):
            self.links.append(str(given["src"]))
        if tag == "link" and given.get("rel") == "stylesheet":
            self.links.append(str(given["href"]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as ``make docs`` builds it."""
    out = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", out],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-5000:]
    return out


def test_every_tutorial_shows_what_it_printed(site: Path) -> None:
    assert len(TUTORIALS) >= 7
    for name in TUTORIALS:
        source = (ROOT / "docs" / "tutorials" / f"{name}.md").read_text()
        page = (site / "tutorials" / name / "index.html").read_text()
        assert page.count('class="language-python highlight"') == source.count("```python\n"), name
        assert page.count('class="language-bash highlight"') == source.count("```bash\n"), name
        assert 'class="language-text highlight"' in page, name
        for unwanted in ("Traceback", "%%bash", str(ROOT), "Warning", "\x1b"):
            assert unwanted not in page, (name, unwanted)


def test_pictures_of_tutorials_are_shown(site: Path) -> None:
    for name in ("own_images", "pretrained"):
        page = (site / "tutorials" / name / "index.html").read_text()
        assert page.count('src="data:image/webp;base64,') > 3 * 8, name
    for name in ("sae_lens",):
        page = _Page(site / "tutorials" / name / "index.html")
        pictures = [link for link in page.links if link.startswith("../../images/tutorials-")]
        assert pictures
        for picture in pictures:
            content = (site / "tutorials" / name / picture).resolve().read_bytes()
            assert content.startswith(b"\x89PNG")


def test_what_the_tests_hide_is_not_shown_and_tabs_stay_together(site: Path) -> None:
    assert not [p for p in site.rglob("*.html") if "invisible-code-block" in p.read_text()]
    assert 'data-tabs="1:4"' in (site / "finetuning" / "index.html").read_text()


def test_formulas_are_typeset(site: Path) -> None:
    page = (site / "mathematics" / "index.html").read_text()
    formulas = re.findall("<math.*?</math>", page, re.DOTALL)
    assert len(formulas) >= 8
    assert not any("\\" in formula for formula in formulas), "a command that nothing knows"
    assert "arithmatex" not in page


def test_every_link_within_the_site_leads_somewhere(site: Path) -> None:
    pages = {path: _Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) > 20
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{path.relative_to(site)}: {link}"
            if parts.fragment and target.suffix == ".html":
                found = pages[target].anchors
                assert unquote(parts.fragment) in found, f"{path.relative_to(site)}: {link}"

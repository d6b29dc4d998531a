"""docs/recipe.md shows what the benchmark found."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.recipes import markdown

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "recipe.md").read_text()
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("recipes-*.json"))


def test_the_page_shows_every_result() -> None:
    assert re.findall(r"<!-- table: (\S+) -->", PAGE)
    assert {path.stem for path in RESULTS} == set(re.findall(r"<!-- table: (\S+) -->", PAGE))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_table_is_what_was_measured(path: Path) -> None:
    assert markdown(json.loads(path.read_text())) in PAGE

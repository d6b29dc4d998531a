"""docs/patches.md shows what the benchmark found."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.patches import markdown

ROOT = Path(__file__).parents[1]
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "patches.json").read_text())


def test_the_table_is_what_was_measured() -> None:
    assert markdown(RESULTS) in (ROOT / "docs" / "patches.md").read_text()


def test_every_seed_of_every_recipe_was_measured() -> None:
    assert len(RESULTS["runs"]) == 12
    assert all(len(runs) == 3 for runs in RESULTS["runs"].values())

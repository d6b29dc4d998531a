"""The page of evidence, and the README's numbers on photographs, are what was measured."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

from benchmarks import evidence
from monoloss_plugin.reproduce import EXPERIMENTS

ROOT = Path(__file__).parents[1]


def test_the_page_is_what_its_results_give() -> None:
    assert evidence.page() == evidence.PAGE.read_text()


def test_every_experiment_has_results_on_the_page() -> None:
    there = {path.stem for path in evidence.RESULTS.glob("*.json")}
    assert there == EXPERIMENTS.keys()
    for name in there:
        found = json.loads((evidence.RESULTS / f"{name}.json").read_text())
        assert f"**{EXPERIMENTS[name].tables(found)[0].title}**" in evidence.PAGE.read_text()


def test_the_text_of_the_page_has_no_number_that_was_measured() -> None:
    prose = re.sub(r"\{[{%#].*?[}%#]\}", "", evidence.TEMPLATE.read_text(), flags=re.DOTALL)
    kept = prose[prose.index("# Evidence") : prose.index("## The code agrees")]
    kept = re.sub(r"```.*?```", "", kept, flags=re.DOTALL)
    assert re.findall(r"\d\.\d{2,}", kept) == []


@pytest.mark.parametrize(
    ("name", "measure", "digits"),
    [
        *((name, "r2", 3) for name in ("plain", "recommended", "MonoLoss")),
        *((name, "monoscore_adjusted", 3) for name in ("plain", "recommended", "MonoLoss")),
        *((name, "adjusted/lite2", 3) for name in ("plain", "recommended")),
        *((name, "purity_binary", 3) for name in ("plain", "recommended")),
        *((name, "dead_latents", 0) for name in ("plain", "recommended")),
        ("data points", "r2", 3),
        ("data points", "monoscore_adjusted", 3),
    ],
)
def test_the_readme_tells_what_was_measured(name, measure, digits) -> None:
    found = json.loads((evidence.RESULTS / "figure4.json").read_text())["encoders"]["lite0"]
    runs = {**found["batchtopk"]["at k"], **found["baselines"]["at k"]}[name]
    (told,) = re.findall(r"On photographs \(.*?\n\n", (ROOT / "README.md").read_text(), re.DOTALL)
    assert f"{statistics.fmean(run[measure] for run in runs):.{digits}f}" in told


def test_a_table_as_markdown() -> None:
    table = evidence.Table("A title", ("", "x"), [("a|b", "1"), ("c", "2")], "A note.")
    assert evidence.markdown(table) == (
        "**A title**\n\n|  | x |\n|---|---|\n| a\\|b | 1 |\n| c | 2 |\n\nA note."
    )

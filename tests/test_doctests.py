"""Every example in a docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    for path in [*(ROOT / "monoloss_plugin").rglob("*.py"), *(ROOT / "adapters").glob("*.py")]
)
HOSTS = {path.parent.name for path in (ROOT / "tests/hosts").glob("*/requirements.txt")}
"""Adapters whose hosts are not installed here; tests/hosts run their examples."""
MODULES = sorted({m if m.startswith("monoloss") else f"monoloss_plugin.{m}" for m in MODULES})
MODULES = [m for m in MODULES if not (".adapters." in m and m.rpartition(".")[2] in HOSTS)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


def test_modules_of_the_core_have_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in ("functional", "metrics", "losses", "evaluation", "adapters.sae_lens"):
        module = importlib.import_module(f"monoloss_plugin.{name}")
        assert any(test.examples for test in finder.find(module)), name

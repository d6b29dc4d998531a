"""The scripts on the hosts' pages: one screen each, and they run. tests/hosts run the others."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples/hosts").glob("*.py"))
ELSEWHERE = {f"with_{p.parent.name}" for p in (ROOT / "tests/hosts").glob("*/requirements.txt")}

SHORTER = {"with_language_models": ["3"]}
"""Arguments that make a script's run a short one."""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_one_screen_and_on_its_page(script) -> None:
    text = script.read_text()
    docstring = ast.get_docstring(ast.parse(text), clean=False) or ""
    lines = text.replace(docstring, "").splitlines()
    assert len([line for line in lines if line.strip(' "')]) <= 30
    assert f"python examples/hosts/{script.name}" in docstring
    page = ROOT / "docs/hosts" / f"{script.stem.removeprefix('with_')}.md"
    shown = {"with_own_loop": ROOT / "docs/hosts/any_torch.md"}.get(script.stem, page)
    assert f'--8<-- "examples/hosts/{script.name}"' in shown.read_text()


@pytest.mark.parametrize(
    "script", [s for s in SCRIPTS if s.stem not in ELSEWHERE], ids=lambda path: path.stem
)
def test_a_script_runs_and_prints_a_score(script, tmp_path) -> None:
    command = [sys.executable, script, *SHORTER.get(script.stem, [])]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "MonoScore" in done.stdout

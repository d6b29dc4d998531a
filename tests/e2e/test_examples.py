"""The examples run as they stand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
QUICK = ["--seeds", "1", "--epochs", "1"]
"""Of the examples that compare trainings."""


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_and_prints_a_score(example: Path, tmp_path: Path) -> None:
    command = [sys.executable, example, *(QUICK if example.stem.startswith("finetune") else [])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "monoscore" in done.stdout.lower()

"""The examples run as they stand, with small settings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub.server import OWNER_TOKEN

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {
    "custom_host": ["--steps", "50"],
    "extract_features": ["--steps", "50"],
    "finetune_hf": ["--epochs", "1"],
    "finetune_timm": ["--epochs", "1"],
    "publish": ["alice/digits", "--upload"],
    "sae_lens_train": ["--steps", "50"],
    "score_pretrained": [],
    "train_recipe": ["--epochs", "10"],
}
"""The arguments of every example."""


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_example_runs_and_prints_a_score(name: str, tmp_path: Path, hub) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *SMALL[name]],
        cwd=tmp_path,
        env={**os.environ, "HF_TOKEN": OWNER_TOKEN},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "monoscore" in done.stdout.lower()


@pytest.mark.parametrize("name", SMALL)
def test_example_names_itself_right(name: str) -> None:
    assert f"python examples/{name}.py" in (EXAMPLES / f"{name}.py").read_text().split('"""')[1]

"""The script and the blocks of the library's page run as they stand, with fewer steps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from dictionary_learning.training import trainSAE

from tests.hosts.dictionary_learning.conftest import make_config, make_trainer, stream
from tests.pages import py_blocks

SCRIPT = Path(__file__).parents[3] / "examples/hosts/with_dictionary_learning.py"


def test_the_page_s_script_trains_and_prints_scores(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    exec(SCRIPT.read_text().replace("1000", "150"), {})
    found = re.findall(r"^lam [.\d]+: MonoScore ([.\d]+)", capsys.readouterr().out, re.MULTILINE)
    without, with_loss = map(float, found)
    assert 0 < without < with_loss < 1


@pytest.mark.filterwarnings("ignore:sae. R².*worse than the mean")  # after 20 steps
def test_every_block_of_the_page_runs(tmp_path, monkeypatch, digits) -> None:
    monkeypatch.chdir(tmp_path)
    names = {
        "torch": torch,
        "trainer_cfg": make_config("topk", steps=1200),
        "trainer": make_trainer("topk", steps=1200),
        "new_trainer": lambda: make_trainer("topk", steps=1200),
        "data": stream(digits),
        "second_encoder": torch.square,
        "trainSAE": trainSAE,
    }
    for block in py_blocks("docs/hosts/dictionary_learning.md"):
        names["config"] = make_config("topk", steps=1200)  # trainSAE takes the trainer out
        exec(block.replace("10_000", "20"), names)
    assert names["trainer"].scheduler.last_epoch > 200

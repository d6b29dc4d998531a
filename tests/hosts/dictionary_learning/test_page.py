"""The example and the blocks of the library's page run as they stand, with fewer steps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from dictionary_learning.training import trainSAE

from tests.hosts.dictionary_learning.conftest import make_config, make_trainer, stream

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/hosts/dictionary_learning.md"
EXAMPLE = "examples/hosts/with_dictionary_learning.py"


def test_the_example_trains_and_prints_a_score(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / EXAMPLE).read_text()
    assert f"python {EXAMPLE}" in text
    _, code = text.split('"""\n\n', 1)
    assert len(code.splitlines()) <= 30
    exec(compile(code.replace("1000", "150"), EXAMPLE, "exec"), {})
    found = re.findall(r"^lam [.\d]+: MonoScore ([.\d]+)", capsys.readouterr().out, re.MULTILINE)
    without, with_loss = map(float, found)
    assert 0 < without < with_loss < 1


@pytest.mark.filterwarnings("ignore:sae. R².*worse than the mean")  # after 20 steps
def test_every_block_of_the_page_runs(tmp_path, monkeypatch, digits):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert f'--8<-- "{EXAMPLE}"\n' in blocks
    blocks.remove(f'--8<-- "{EXAMPLE}"\n')
    assert len(blocks) > 4
    names = {
        "torch": torch,
        "trainer_cfg": make_config("topk", steps=1200),
        "trainer": make_trainer("topk", steps=1200),
        "new_trainer": lambda: make_trainer("topk", steps=1200),
        "data": stream(digits),
        "second_encoder": torch.square,
        "trainSAE": trainSAE,
    }
    for block in blocks:
        names["config"] = make_config("topk", steps=1200)  # trainSAE takes the trainer out
        exec(block.replace("10_000", "20"), names)

"""``monoloss reproduce``: where its features come from, and what it says of bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from monoloss_plugin import cli, load_features
from monoloss_plugin.cli.reproduce import _NAMES
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.reproduce import EXPERIMENTS, extracted, features_in, saes


def invoke(*arguments: object):
    return CliRunner().invoke(cli.app, ["reproduce", *map(str, arguments)])


@pytest.fixture
def small(monkeypatch) -> None:
    monkeypatch.setattr(saes, "_STEPS", 8)
    monkeypatch.setattr(saes, "_EPOCHS", 1.0)
    monkeypatch.setattr(saes, "_MOST", {"num_latents": 32, "k": 4, "batch_size": 256})


def test_the_command_knows_every_experiment() -> None:
    assert tuple(EXPERIMENTS) == _NAMES


def test_it_prints_the_paper_s_table_beside_its_own(small, tmp_path) -> None:
    shown = invoke("table1", "--features", "digits", "--seeds", 1, "--out", tmp_path)
    assert shown.exit_code == 0, shown.output
    assert "0.723" in shown.stdout  # binary purity of ViT, BatchTopK with MonoLoss, in the paper
    found = json.loads((tmp_path / "table1.json").read_text())
    ours = found["encoders"]["digits"]["batchtopk"]["at k"]["MonoLoss"][0]["purity_binary"]
    assert f"{ours:.3f}" in shown.stdout


def test_features_of_a_folder_have_its_name(tmp_path) -> None:
    rows = load_features("digits", "train")
    for split in ("train", "test"):
        rows.dataset.save_to_disk(str(tmp_path / "mine" / split))
    name, found = features_in(tmp_path / "mine")
    assert name == "mine"
    assert torch.equal(found.held_out.tensor(), rows.tensor())


def test_the_bundled_features_are_found_by_their_splits() -> None:
    name, found = features_in("digits")
    assert (name, len(found.train), len(found.held_out)) == ("digits", 1198, 599)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["figure9", "--out", "x"], "expected one of"),
        (["figure4", "--out", "x"], "needs features"),
        (["figure4", "--out", "x", "--features", "./nowhere"], "no such folder"),
        (["figure4", "--out", "x", "--features", "{empty}"], "expected train and one of"),
        (["figure4", "--out", "x", "--encoder", "vit-l16"], "needs --data"),
        (["figure4", "--out", "x", "--features", "digits", "--splits", "a"], "expected TRAIN,TEST"),
        (["figure4", "--out", "x", "--features", "digits", "--scale", "big"], "expected one of"),
        (["figure4", "--out", "x", *["--features", "digits"] * 2], "two are called 'digits'"),
        (["figure4", "--out", "{file}", "--features", "digits"], "is a file; give a folder"),
    ],
)
def test_bad_input_gets_one_line(arguments, said, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    places = {"empty": tmp_path / "empty", "file": tmp_path / "file"}
    shown = invoke(*(str(one).format(**places) for one in arguments))
    assert shown.exit_code != 0
    assert said in shown.output.replace("\n", " ")
    assert "Traceback" not in shown.output


def test_images_become_features_once(tmp_path) -> None:
    pixels = (load_digits().images[:20] * (255 / 16)).round().astype(np.uint8)
    columns = {"image": [Image.fromarray(one) for one in pixels], "label": [0, 1] * 10}
    images = dict.fromkeys(("train", "held_out"), Dataset.from_dict(columns))
    first = extracted(images, "efficientnet-lite0", tmp_path, 32)
    assert first.train.width == 1280
    assert isinstance(first.held_out, FeatureSet)
    modified = [path.stat().st_mtime_ns for path in Path(tmp_path).rglob("*.arrow")]
    extracted(images, "efficientnet-lite0", tmp_path, 32)
    assert [path.stat().st_mtime_ns for path in Path(tmp_path).rglob("*.arrow")] == modified

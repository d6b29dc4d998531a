"""``monoloss publish``, ``pretrained`` and ``convert`` as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from monoloss_plugin import cli, load_features, load_pretrained
from monoloss_plugin.hub.bundled import folder_of
from tests.convert.test_monoloss import K, save, untied
from tests.hub.server import OWNER_TOKEN, Fault

REPO = "alice/vision-saes"
MODELS = folder_of("digits") / "models"
WITH, WITHOUT = MODELS / "batchtopk-256-monoloss-0.003", MODELS / "batchtopk-256"


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def held_out(tmp_path):
    """A folder of features, as extraction leaves it."""
    folder = tmp_path / "held-out"
    features = load_features("digits", "held_out")
    described = features.dataset.cast(features.dataset.features)
    described.info.description = json.dumps(features.record)
    described.save_to_disk(folder)
    return folder


def test_one_command_publishes_a_measured_sae(held_out, tmp_path, hub) -> None:
    command = [sys.executable, "-m", "monoloss_plugin", "publish", "sae", WITH, REPO]
    options = ["--features", held_out, "--baseline", WITHOUT, "--license", "mit"]
    environment = {**os.environ, "HF_TOKEN": OWNER_TOKEN, "COLUMNS": "200"}
    done = subprocess.run(
        [*map(str, command), *map(str, options)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"uploaded to {hub.url}/{REPO} (commit " in done.stdout
    assert f"load it: SAE.from_pretrained('{REPO}', '{WITH.name}')" in done.stdout
    assert OWNER_TOKEN not in done.stdout + done.stderr
    record, bundled = load_pretrained(REPO).record, load_pretrained("digits").record
    for name, value in bundled.metrics.items():
        assert record.metrics[name] == pytest.approx(value, rel=1e-6)
    for name, value in bundled.baseline.items():
        assert record.baseline[name] == pytest.approx(value, rel=1e-6)
    assert record.encoder == bundled.encoder
    assert hub.files(REPO)[f"{WITH.name}/curves.png"].startswith(b"\x89PNG")
    shown = run("pretrained", REPO)
    assert shown.exit_code == 0
    assert WITH.name in shown.output
    assert "monoloss 0.003" in shown.output
    assert "0.967" in shown.output


def test_a_dry_run_lists_files_and_sizes(held_out, hub) -> None:
    shown = run("publish", "sae", WITH, REPO, "--name", "small", "--dry-run")
    assert shown.exit_code == 0, shown.output
    size = (WITH / "sae_weights.safetensors").stat().st_size
    assert f"small/sae_weights.safetensors │ {size / 1000:.1f} kB" in shown.output
    assert "dry run: " in shown.output
    shown = run("publish", "features", held_out, "alice/digits", "--dry-run")
    assert "data/held_out-00000-of-00001.parquet" in shown.output
    assert not hub.repos


def test_features(held_out, hub, tmp_path) -> None:
    shown = run("publish", "features", held_out, "alice/digits", "--private", "--tag", "digits")
    assert shown.exit_code == 0, shown.output
    assert "split='held_out'" in shown.output
    assert hub.repos["dataset", "alice/digits"].private
    assert len(load_features("alice/digits")) == 599
    again = run("publish", "features", held_out, "alice/digits")
    assert "has all of it already" in again.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["publish", "sae", "none", REPO], "no such folder: none"),
        (["publish", "sae", WITH, "digits"], "repo_id: expected 'user/name'"),
        (["publish", "sae", WITH, REPO, "--name", "../x"], "sae_id: expected names"),
        (["publish", "sae", WITH, REPO, "--baseline", WITHOUT], "--baseline: needs --features"),
        (["publish", "sae", WITH, REPO, "--features", "none"], "no feature dataset in none"),
        (["publish", "sae", WITH, "bob/saes"], "may not write to bob/saes"),
        (["publish", "features", "none", REPO], "no feature dataset in none"),
        (["pretrained", "digit"], "one of digits, which are bundled"),
        (["pretrained", "alice/none"], "knows no repository alice/none"),
        (["pretrained", "./none"], "no such folder: none"),
        (["convert", "none.pt", "out", "--from", "monoloss"], "no such file: none.pt"),
        (["convert", "none.pt", "out", "--from", "keras"], "got 'keras'"),
    ],
)
def test_errors_come_without_a_traceback(arguments, said, hub, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = run(*arguments)
    assert shown.exit_code == 1
    assert shown.exception is None or isinstance(shown.exception, SystemExit)
    assert said in str(shown.exception.code)
    assert not hub.repos


def test_an_interrupted_command_says_to_run_it_again(hub) -> None:
    hub.faults.append(Fault("POST", "/commit/", "drop"))
    shown = run("publish", "sae", WITH, REPO)
    assert "run it again: what has arrived is not sent twice" in str(shown.exception.code)
    assert run("publish", "sae", WITH, REPO).exit_code == 0


def test_convert_and_publish(tmp_path, hub) -> None:
    checkpoint = save(tmp_path / "authors.pt", untied(), "batch_topk", topk_k=K)
    refused = run("convert", checkpoint, tmp_path / "out", "--from", "monoloss")
    assert "features: a BatchTopK checkpoint" in str(refused.exception.code)
    assert not (tmp_path / "out").exists()
    features = load_features("digits", "train")
    features.dataset.save_to_disk(tmp_path / "train")
    options = ["--from", "monoloss", "--features", tmp_path / "train"]
    done = run("convert", checkpoint, tmp_path / "out", *options)
    assert done.output == f"jumprelu, 64 to 48 latents: {tmp_path / 'out'}\n"
    again = run("convert", checkpoint, tmp_path / "out", *options)
    assert "is there already; give a new folder" in str(again.exception.code)
    assert run("publish", "sae", tmp_path / "out", REPO).exit_code == 0
    loaded = load_pretrained(REPO)
    assert loaded.sae_id == "jumprelu-48-monoloss-0.0003"
    assert loaded.record.lam == 3e-4
    assert loaded.record.converted_from == "the MonoLoss authors' code"
    x = torch.nn.functional.normalize(features.tensor().float(), dim=1)
    assert float((loaded.sae.encode(x) > 0).float().sum(1).mean()) == pytest.approx(K, abs=0.2)
    card = hub.files(REPO)["README.md"].decode()
    assert "Converted from a checkpoint of the MonoLoss authors' code." in card

"""``monoloss publish``, ``pretrained`` and ``convert`` as a user runs them."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from tqdm.auto import tqdm
from typer.testing import CliRunner

from monoloss_plugin import cli, load_features, load_pretrained
from monoloss_plugin.cli import output
from monoloss_plugin.hub.repository import bundled_folder
from tests.convert.test_monoloss import K, save, untied
from tests.hub.server import OWNER_TOKEN, Fault

REPO = "alice/vision-saes"
MODELS = bundled_folder("digits") / "models"
WITH, WITHOUT = MODELS / "batchtopk-256-monoloss-0.003", MODELS / "batchtopk-256"


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture
def held_out(tmp_path):
    """A folder of features, as extraction leaves it."""
    folder = tmp_path / "held-out"
    features = load_features("digits", "held_out")
    described = features.dataset.cast(features.dataset.features)
    described.info.description = json.dumps(features.record.to_dict())
    described.save_to_disk(folder)
    return folder


def test_one_command_publishes_a_measured_sae(held_out, hub) -> None:
    options = ["--features", held_out, "--baseline", WITHOUT, "--license", "mit"]
    done = run("publish", "sae", WITH, REPO, *options)
    assert done.exit_code == 0, done.stderr
    assert f"uploaded to {hub.url}/{REPO} (commit " in done.stdout
    assert f"load it: SAE.from_pretrained('{REPO}', '{WITH.name}')" in done.stdout
    assert OWNER_TOKEN not in done.output
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
    assert "has all files already" in again.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["publish", "sae", "none", REPO], "no such folder: none"),
        (["publish", "sae", WITH, "digits"], "repo_id: expected 'user/name'"),
        (["publish", "sae", WITH, REPO, "--name", "../x"], "sae_id: expected names"),
        (["publish", "sae", WITH, REPO, "--features", "none"], "no feature dataset in none"),
        (["publish", "sae", WITH, "bob/saes"], "don't have the rights to write to bob/saes"),
        (["publish", "features", "none", REPO], "no feature dataset in none"),
        (["pretrained", "digit"], "one of digits, photos, which are bundled"),
        (["pretrained", "alice/none"], "knows no repository alice/none"),
        (["pretrained", "./none"], "no such folder: none"),
        (["convert", "none.pt", "out", "--from", "monoloss"], "no such file: none.pt"),
    ],
)
def test_a_failure_is_one_line_and_exit_code_1(arguments, said, hub, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = run(*arguments)
    assert (shown.exit_code, shown.stdout) == (1, "")
    (line,) = shown.stderr.splitlines()
    assert line.startswith("monoloss: ")
    assert said in line
    assert not hub.repos


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Usage"),
        (["nothing"], "No such command"),
        (["pretrained"], "Missing argument"),
        (["pretrained", "digits", "--nothing"], "No such option"),
        (["convert", "none.pt", "out", "--from", "keras"], "got 'keras'"),
        (["convert", "a", "b", "--from", "monoloss", "--top-k", "x"], "Invalid value"),
        (["publish", "sae", WITH, REPO, "--baseline", WITHOUT], "needs --features"),
    ],
)
def test_wrong_use_ends_with_2(arguments, said) -> None:
    shown = run(*arguments)
    assert shown.exit_code == 2
    assert said in shown.output


def test_json_is_one_object_and_nothing_else(held_out, tmp_path, hub) -> None:
    published = run("publish", "sae", WITH, REPO, "--features", held_out, "--json")
    content = json.loads(published.stdout)
    assert content["commit"] == hub.repos["model", REPO].refs["main"]
    assert f"{WITH.name}/cfg.json" in [file["path"] for file in content["files"]]
    (listed,) = json.loads(run("pretrained", REPO, "--json").stdout)["saes"]
    assert (listed["sae_id"], listed["record"]["inputs"]) == (WITH.name, "unit norm")
    failed = run("pretrained", "alice/none", "--json")
    assert (failed.exit_code, failed.stdout) == (1, "")


def test_quiet_prints_nothing_but_errors(held_out, hub) -> None:
    done = run("publish", "sae", WITH, REPO, "--features", held_out, "--quiet")
    assert (done.exit_code, done.output) == (0, "")
    assert load_pretrained(REPO).record.metrics
    hub.put("mallory/mixed", {"one/cfg.json": b"{", "one/sae_weights.safetensors": b"x"})
    failed = run("pretrained", "mallory/mixed", "--quiet")
    assert failed.exit_code == 1
    assert failed.output == "monoloss: mallory/mixed holds no SAE in SAELens's format\n"


def test_progress_in_a_pipe_is_lines_without_control_signs(held_out, hub, monkeypatch) -> None:
    done = run("publish", "sae", WITH, REPO, "--features", held_out, "--dry-run")
    progress = [line for line in done.stderr.splitlines() if line.startswith("Evaluating")]
    assert 1 <= len(progress) <= 2
    assert "100%" in progress[-1]
    assert all(c.isprintable() for c in done.stderr.replace("\n", ""))


def test_a_bar_that_is_told_often_writes_seldom(monkeypatch, capsys) -> None:
    monkeypatch.setattr(output, "monotonic", iter(range(10_000)).__next__)
    with output._directed_output(quiet=False, as_json=False):
        for number in (bar := tqdm(range(300), mininterval=0, leave=True)):
            bar.set_postfix(loss=number)
    lines = capsys.readouterr().err.splitlines()
    assert 10 < len(lines) < 30
    assert "300/300" in lines[-1]


def test_names_are_never_cut_off_in_a_pipe(hub) -> None:
    name = "batchtopk-" + "9" * 180
    hub.put("mallory/long", {f"{name}/{path.name}": path.read_bytes() for path in WITH.iterdir()})
    assert name in run("pretrained", "mallory/long").stdout


def test_what_a_terminal_would_obey_is_shown_as_text(hub, tmp_path, monkeypatch) -> None:
    """Names and texts of strangers: a record, a folder, an error."""
    evil = "\x1b[2J\x1b]0;title\x07\u202e\r"
    record = json.loads((WITH / "monoloss.json").read_text())
    record["losses"][0]["name"] = evil
    files = {f"one/{path.name}": path.read_bytes() for path in WITH.iterdir()}
    hub.put("mallory/saes", files | {"one/monoloss.json": json.dumps(record).encode()})
    monkeypatch.chdir(tmp_path)
    (tmp_path / evil).mkdir()
    (tmp_path / evil / "cfg.json").write_text("{}")
    (tmp_path / evil / "sae_weights.safetensors").write_text(evil)
    hub.put(
        "mallory/left", files | {"two/cfg.json": evil.encode(), "two/sae_weights.safetensors": b""}
    )
    for arguments in (
        ["pretrained", "mallory/saes"],
        ["pretrained", "mallory/left"],
        ["publish", "sae", evil, REPO],
        ["convert", evil, "out", "--from", "dictionary-learning"],
    ):
        shown = run(*arguments)
        assert all(c.isprintable() for c in shown.output.replace("\n", "")), shown.output
    assert r"\x1b[2J\x1b]0;title" in run("pretrained", "mallory/saes").output


def test_ctrl_c_is_one_line_and_130(hub, monkeypatch) -> None:
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", interrupted)
    shown = run("publish", "sae", WITH, REPO)
    assert shown.exit_code == 130
    assert shown.stderr == "monoloss: stopped; start it again to go on\n"


def test_an_interrupted_command_says_to_run_it_again(hub) -> None:
    hub.faults.append(Fault("POST", "/commit/", "drop"))
    shown = run("publish", "sae", WITH, REPO)
    assert "run it again: files that have arrived are not transferred again" in shown.stderr
    assert run("publish", "sae", WITH, REPO).exit_code == 0


def test_convert_and_publish(tmp_path, hub) -> None:
    checkpoint = save(tmp_path / "authors.pt", untied(), "batch_topk", topk_k=K)
    refused = run("convert", checkpoint, tmp_path / "out", "--from", "monoloss")
    assert "features: a BatchTopK checkpoint" in refused.stderr
    assert not (tmp_path / "out").exists()
    features = load_features("digits", "train")
    features.dataset.save_to_disk(tmp_path / "train")
    options = ["--from", "monoloss", "--features", tmp_path / "train"]
    done = run("convert", checkpoint, tmp_path / "out", *options)
    assert done.stdout == f"jumprelu, 64 to 48 latents: {tmp_path / 'out'}\n"
    again = run("convert", checkpoint, tmp_path / "out", *options)
    assert "is there already; give a new folder" in again.stderr
    assert run("publish", "sae", tmp_path / "out", REPO).exit_code == 0
    loaded = load_pretrained(REPO)
    assert loaded.sae_id == "jumprelu-48-monoloss-0.0003"
    assert loaded.record.lam == 3e-4
    assert loaded.record.converted_from == "the MonoLoss authors' code"
    x = torch.nn.functional.normalize(features.tensor().float(), dim=1)
    assert float((loaded.sae.encode(x) > 0).float().sum(1).mean()) == pytest.approx(K, abs=0.2)
    card = hub.files(REPO)["README.md"].decode()
    assert "Converted from a checkpoint of the MonoLoss authors' code." in card


def test_a_warning_is_one_line_without_the_code_that_it_comes_from(capsys) -> None:
    with output._directed_output(quiet=False, as_json=False):
        warnings.warn("features: these are \x1b[2J strange", stacklevel=1)
    assert capsys.readouterr().err == "features: these are \\x1b[2J strange\n"
    with output._directed_output(quiet=True, as_json=False):
        warnings.warn("more", stacklevel=1)
    assert capsys.readouterr().err == ""

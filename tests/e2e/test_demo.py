"""``monoloss demo`` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sae_lens import SAE
from typer.testing import CliRunner

from monoloss_plugin import __version__, cli
from monoloss_plugin.demo import digits, run
from monoloss_plugin.demo.architectures import ARCHITECTURES
from monoloss_plugin.saes.baselines import QUICK

pytestmark = pytest.mark.xdist_group("demo")  # one process runs it in full


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One seed of the real thing, in a process of its own."""
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-c", "from monoloss_plugin.cli import main; main()", "demo"]
    done = subprocess.run(
        [*command, "--seeds", "1", "--out", str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_monoloss_makes_held_out_latents_more_monosemantic_and_pure(full_run) -> None:
    out, _ = full_run
    results = json.loads((out / "results.json").read_text())
    (without,), (with_loss,) = (results["runs"][one] for one in ("without", "with"))
    assert with_loss["monoscore"] > without["monoscore"] + 0.05
    assert with_loss["monoscore_defined"] > without["monoscore_defined"] + 0.05
    assert with_loss["purity_binary"] > without["purity_binary"] + 0.05
    assert with_loss["monoscore_adjusted"] > without["monoscore_adjusted"] + 0.05
    assert with_loss["r2"] > without["r2"] - 0.02
    assert set(results["runs"]) - {"without", "with"} == set(QUICK)
    assert results["encoder_accuracy"] > 0.85


def test_the_table_shows_what_the_results_say(full_run) -> None:
    out, printed = full_run
    results = json.loads((out / "results.json").read_text())
    for label in ("R²", "MonoScore, defined", "purity, binary", "L0", "dead latents", "seconds"):
        assert label in printed
    for one in ("without", "with", *QUICK):
        assert f"│ {results['runs'][one][0]['purity_binary']:.3f}" in printed
        assert one in printed


def test_pictures_saes_and_a_page_of_both_are_left(full_run) -> None:
    out, printed = full_run
    for name in ("curves.png", "trade-off.png", "same_rank.png", "same_latent.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert "<title>without and with</title>" in page
    for baseline in QUICK:
        assert baseline in page
    assert f"open in a browser: {out / 'report.html'}" in printed.replace("\n", "")
    sae = SAE.load_from_disk(out / "seed-0" / "with")
    assert sae.cfg.metadata.monoloss["terms"]["monoloss"]["lam"] == 3e-3
    assert SAE.load_from_disk(out / "seed-0" / "without").cfg.metadata.monoloss is None


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> digits.DigitFeatures:
    """Features of an encoder that is hardly trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "_EPOCHS", 2)
        return digits.digit_features(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("arch", [a for a in ARCHITECTURES if a != "batchtopk"])
def test_every_architecture_runs(arch, data, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(run, "digit_features", lambda out: data)
    monkeypatch.setattr(run, "_STEPS", 100)
    result = CliRunner().invoke(
        cli.app, ["demo", "--arch", arch, "--seeds", "1", "--out", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert runs["with"][0]["monoscore"] != runs["without"][0]["monoscore"]


def test_regularizers_alone_and_over_two_seeds(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(digits, "_EPOCHS", 2)
    monkeypatch.setattr(run, "_STEPS", 100)
    mine, out = tmp_path / "mine", tmp_path / "out"
    for folder in (mine, out):
        folder.mkdir()
    (mine / "thesis").write_text("all of it")
    for name in (
        "curves.png",
        "results.json",
        "report.html",
    ):  # somebody has put links where files go
        (out / name).symlink_to(mine / "thesis")
    for name in ("images", "encoder", "features", "seed-0"):
        (out / name).symlink_to(mine)
    arguments = ["demo", "--lam", "0", "--seeds", "2", "--out", str(out)]
    arguments += ["--regularizer", "off-support-l1=0.5", "--regularizer", "l1_l2_ratio"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert [file.name for file in mine.iterdir()] == ["thesis"]
    assert (mine / "thesis").read_text() == "all of it"
    results = json.loads((out / "results.json").read_text())
    assert [(term["name"], term["lam"]) for term in results["terms"]] == [
        ("off_support_l1", 0.5),
        ("l1_l2_ratio", 0.002),
    ]
    assert len(results["runs"]["with"]) == 2
    assert len(results["runs"]["data points"]) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arch", "sigmoid"], "expected one of batchtopk"),
        (["--lam", "-1"], "lam: expected a finite weight"),
        (["--lam", "nan"], "lam: expected a finite weight"),
        (["--lam", "0"], "nothing to compare"),
        (["--seeds", "0"], "greater than or equal to 1"),
        (["--regularizer", "l3"], "got 'l3'"),
        (["--regularizer", "l1_l2_ratio=much"], "could not convert"),
        (["--regularizer", "l1_l2_ratio", "--regularizer", "l1_l2_ratio"], "each regularizer once"),
        (["--arch", "jumprelu", "--regularizer", "l1_l2_ratio"], "needs a Top-k selection"),
    ],
)
def test_bad_options_are_named_before_any_work(arguments, said, tmp_path) -> None:
    result = CliRunner().invoke(
        cli.app, ["demo", *arguments, "--out", str(tmp_path / "out")], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 2
    assert said in result.output
    assert not (tmp_path / "out").exists()


def test_help_and_version() -> None:
    assert "Compare SAEs" in CliRunner().invoke(cli.app, ["demo", "--help"]).output
    assert CliRunner().invoke(cli.app, ["--version"]).output.strip() == __version__

"""``train``: a folder that others can load, whatever happens on the way."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from typer.testing import CliRunner

from monoloss_plugin import MonoLoss, cli, load_features, load_pretrained
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.losses import StepTensors, TermValue
from monoloss_plugin.training import Recipe, get_recipe, train
from monoloss_plugin.training import run as run_module

SMALL = {"num_latents": 32, "k": 4, "batch_size": 256, "epochs": 5}


@pytest.fixture(scope="module")
def digits() -> FeatureSet:
    return load_features("digits", "train")


@pytest.fixture(scope="module")
def held_out() -> FeatureSet:
    return load_features("digits", "held_out")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return SAE.load_from_disk(folder).state_dict()


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_the_folder_holds_the_sae_and_its_measures(digits, held_out, tmp_path) -> None:
    recipe = get_recipe("recommended", digits, **SMALL)
    trained = train(digits, recipe, out=tmp_path, held_out=held_out, baselines=["data points"])
    sae = SAE.load_from_disk(tmp_path)
    assert evaluate(sae, held_out).summary() == evaluate(trained.sae, held_out).summary()
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(saved["runs"]) == ["trained", "data points"]
    assert saved["runs"]["trained"] == [pytest.approx(evaluate(sae, held_out).summary())]
    assert sae.cfg.metadata.monoloss["inputs"] == "unit norm"
    assert sae.cfg.metadata.monoloss["terms"]["monoloss"]["lam"] == recipe.terms[0].lam
    assert not (tmp_path / "checkpoint").exists()


def test_without_held_out_features_a_tenth_is_held_out(digits, tmp_path) -> None:
    trained = train(digits, Recipe(**SMALL), out=tmp_path, baselines=())
    assert trained.recipe == Recipe(**SMALL).fitted_to(1078, 64)
    assert trained.comparison.evaluations["trained"][0].monoscore.num_samples == 120
    rest, tenth = run_module.split(digits, seed=0)
    ids = [set(one.ids_of(torch.arange(len(one)))) for one in (rest, tenth)]
    assert not ids[0] & ids[1]
    assert len(ids[0] | ids[1]) == len(digits)


@dataclass(frozen=True)
class InterruptedAt(MonoLoss):
    """MonoLoss, with a Ctrl-C in the middle of some step."""

    steps: tuple[int, ...] = ()
    seen = 0

    def compute_loss(self, step: StepTensors) -> TermValue:
        if InterruptedAt.seen in self.steps:
            os.kill(os.getpid(), signal.SIGINT)
        InterruptedAt.seen += 1
        return super().compute_loss(step)


def test_a_run_that_is_interrupted_goes_on_as_if_nothing_had_happened(digits, tmp_path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    term = InterruptedAt(lam=0.2, lam_units="nmse", name="monoloss")
    recipe = Recipe(**SMALL, terms=(term,), from_data=True, warm_up=0.9)
    train(digits, recipe, out=whole, baselines=())
    InterruptedAt.seen = 0
    stopped = Recipe(
        **SMALL,
        terms=(InterruptedAt(lam=0.2, lam_units="nmse", name="monoloss", steps=(2, 11)),),
        from_data=True,
        warm_up=0.9,
    )
    handler = signal.getsignal(signal.SIGINT)
    for done in (4, 13):  # the first step has weight 0, and does not count
        with pytest.raises(KeyboardInterrupt):
            train(digits, stopped, out=parts, baselines=())
        assert [path.name for path in (parts / "checkpoint").iterdir() if path.is_dir()] == [
            str(done)
        ]
        assert signal.getsignal(signal.SIGINT) is handler
    train(digits, stopped, out=parts, baselines=())
    assert_same_weights(whole, parts)


def test_checkpoints_are_saved_now_and_then(digits, tmp_path, monkeypatch) -> None:
    saved: list[int] = []
    save = run_module.Checkpoints.save

    def counted(self, trainer) -> None:
        saved.append(trainer.n_training_steps)
        save(self, trainer)

    monkeypatch.setattr(run_module, "_SAVE_EVERY", 0.0)
    monkeypatch.setattr(run_module.Checkpoints, "save", counted)
    train(digits, Recipe(**SMALL), out=tmp_path, baselines=())
    assert saved == list(range(20))


def test_the_seed_decides_everything(digits, tmp_path) -> None:
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        train(digits, Recipe(**SMALL, seed=seed), out=tmp_path / name, baselines=())
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    assert not torch.equal(weights(tmp_path / "one")["W_dec"], weights(tmp_path / "three")["W_dec"])


def test_a_folder_with_another_run_is_refused(digits, tmp_path) -> None:
    train(digits, Recipe(**SMALL), out=tmp_path / "done", baselines=())
    with pytest.raises(FileExistsError, match="holds a trained SAE already"):
        train(digits, Recipe(**SMALL), out=tmp_path / "done")
    InterruptedAt.seen = 0
    term = InterruptedAt(lam=0.2, lam_units="nmse", steps=(0,))
    with pytest.raises(KeyboardInterrupt):
        train(digits, Recipe(**SMALL, terms=(term,)), out=tmp_path / "half")
    with pytest.raises(ValueError, match=r"other settings \(seed was 0, is now 1\)"):
        train(digits, Recipe(**SMALL, terms=(term,), seed=1), out=tmp_path / "half")


def test_a_folder_with_files_of_others_is_refused_and_left_alone(digits, tmp_path) -> None:
    for name in ("cfg.json", "checkpoint/1000/thesis.tex"):
        out = tmp_path / name.replace("/", "-")
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("mine")
        with pytest.raises(FileExistsError, match="holds other files"):
            train(digits, Recipe(**SMALL), out=out, baselines=())
        assert [path for path in out.rglob("*") if path.is_file()] == [out / name]
        assert (out / name).read_text() == "mine"


def test_ctrl_c_in_the_last_step_counts(digits, tmp_path) -> None:
    InterruptedAt.seen = 0
    term = InterruptedAt(lam=0.2, lam_units="nmse", steps=(18,))  # the first step has weight 0
    recipe = Recipe(**SMALL, terms=(term,))
    with pytest.raises(KeyboardInterrupt):
        train(digits, recipe, out=tmp_path, baselines=())
    train(digits, recipe, out=tmp_path, baselines=())


def test_a_run_is_bound_to_its_held_out_features(digits, held_out, tmp_path) -> None:
    InterruptedAt.seen = 0
    recipe = Recipe(**SMALL, terms=(InterruptedAt(lam=0.2, lam_units="nmse", steps=(0,)),))
    with pytest.raises(KeyboardInterrupt):
        train(digits, recipe, out=tmp_path, held_out=held_out)
    with pytest.raises(ValueError, match=r"other settings \(held_out was"):
        train(digits, recipe, out=tmp_path, held_out=held_out.select(torch.arange(100)))


def test_the_tenth_that_is_held_out_is_not_called_training_data(digits, recwarn) -> None:
    _, tenth = run_module.split(digits, seed=0)
    evaluate(load_pretrained("digits").sae, tenth)
    assert not [w for w in recwarn if "train" in str(w.message)]


def test_bad_input_is_named(digits, held_out, tmp_path) -> None:
    with pytest.raises(TypeError, match="features: expected a FeatureSet, got Tensor"):
        train(torch.randn(9, 4), Recipe(), out=tmp_path)
    with pytest.raises(TypeError, match="recipe: expected a Recipe, got str"):
        train(digits, "recommended", out=tmp_path)
    with pytest.raises(ValueError, match="held_out: expected width 64, got 3"):
        train(digits, Recipe(), out=tmp_path, held_out=FeatureSet.from_tensors(torch.randn(5, 3)))
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"out: .* is a file"):
        train(digits, Recipe(), out=tmp_path / "file")


def monoloss(*arguments: object):
    return CliRunner().invoke(cli.app, [*map(str, arguments)], env={"COLUMNS": "200"})


ON = ["digits:train", "--held-out", "digits:held_out"]
SIZES = ["--latents", 32, "--epochs", 5, "--batch-size", 256]


def test_the_command_trains_and_others_take_its_folder(tmp_path) -> None:
    out = tmp_path / "sae"
    shown = monoloss("train", *ON, "--out", out, *SIZES, "--k", 4, "--lam", 0.3, "--json")
    assert shown.exit_code == 0, shown.output
    assert next(iter(json.loads(shown.stdout)["runs"])) == "trained"
    assert SAE.load_from_disk(out).cfg.metadata.monoloss["terms"]["monoloss"]["lam"] == 0.3
    measured = monoloss("evaluate", out, "--features", "digits:held_out", "--quick")
    assert measured.exit_code == 0, measured.output
    listed = monoloss("publish", "sae", out, "alice/digits", "--dry-run")
    assert listed.exit_code == 0, listed.output
    again = monoloss("train", *ON, "--out", out, *SIZES)
    assert again.exit_code == 1
    assert "holds a trained SAE already" in again.output


def test_the_command_says_what_it_trained(tmp_path) -> None:
    shown = monoloss("train", *ON, "--out", tmp_path / "sae", *SIZES, "--recipe", "plain")
    assert shown.exit_code == 0, shown.output
    assert "batchtopk, 32 latents, k 8, 5 epochs of batches of 256, seed 0; losses: none" in (
        shown.stdout
    )
    wrong = monoloss("train", *ON, "--out", tmp_path / "b", "--recipe", "plain", "--lam", 1)
    assert wrong.exit_code == 1
    assert "this recipe has no loss term" in wrong.output


def test_wandb_gets_saelens_s_logs(tmp_path, monkeypatch) -> None:
    import wandb

    logged: dict[str, object] = {}
    begun: list[object] = []
    monkeypatch.setattr(wandb, "init", lambda project, **_: begun.append(project))
    monkeypatch.setattr(wandb, "log", lambda entries, **_: logged.update(entries))
    shown = monoloss("train", *ON, "--out", tmp_path / "sae", *SIZES, "--wandb", "photos")
    assert shown.exit_code == 0, shown.output
    assert begun == ["photos"]
    assert {"losses/mse_loss", "losses/monoloss", "metrics/monoscore"} <= set(logged)

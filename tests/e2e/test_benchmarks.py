"""The benchmark program, at a size that says nothing about speed."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import finetune_case, over_seeds, patch_extraction, recipes
from benchmarks.data import Shape
from benchmarks.setting import Setting

ROOT = Path(__file__).parents[2]
SMALL = ["--batch", "4096", "--width", "4", "--latents", "32", "--k", "2", "--device", "cpu"]


def test_the_benchmark_runs_and_writes_what_it_found(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *SMALL, "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found) >= {"machine", "agreement", "loss", "step", "memory", "score"}
    assert found["machine"]["torch"]
    for way in found["agreement"]["errors"].values():
        assert max(way.values()) < 1e-5
    for name in ("loss", "score", "evaluation"):
        for seconds in found[name]["seconds"].values():
            assert 0 < seconds["quartiles"][0] <= seconds["median"] <= seconds["quartiles"][1]
    assert found["score"]["says"] in done.stdout


def test_the_features_are_benchmarked(tmp_path: Path) -> None:
    cases = ["--cases", "loading", "feeding", "extraction_memory"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *SMALL, *cases, "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found["loading"]["times faster than LMDB"]) >= {"x[perm] in memory"}
    assert 0 < found["feeding"]["share"] < 1
    assert found["feeding"]["cumulative seconds"]["_train_step"] > 0
    assert min(found["extraction_memory"]["MiB"].values()) > 100
    assert found["loading"]["says"] in done.stdout


def test_a_step_of_fine_tuning_is_benchmarked(monkeypatch) -> None:
    monkeypatch.setattr(finetune_case, "MODEL", "resnet18")
    monkeypatch.setattr(finetune_case, "PIXELS", 32)
    monkeypatch.setattr(finetune_case, "BATCH", 8)
    found = finetune_case.finetuning(Setting(torch.device("cpu"), False, Shape()))
    assert len(found["seconds"]["with MonoLoss"]["runs"]) == 3
    assert 0 < found["the term alone over a step"]["median"] < 1
    assert "the term alone" in found["says"]


def test_an_example_is_run_over_weights_and_seeds(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "toy.py").write_text(
        "import sys\n"
        "given = dict(zip(sys.argv[1::2], sys.argv[2::2]))  # --lam, --seed\n"
        "print('Epoch 1 of the host')\n"
        "print('score', float(given['--lam']) + int(given['--seed']))\n"
    )
    monkeypatch.setattr(over_seeds, "EXAMPLES", tmp_path)
    out = tmp_path / "runs.json"
    arguments = ["toy", "--lam", "0", "0.5", "--seeds", "3", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["over_seeds", *arguments])
    over_seeds.main()
    assert "| score | 1.000 ± 1.000 | 1.500 ± 1.000 |" in capsys.readouterr().out
    assert json.loads(out.read_text())["runs"]["0.5"] == [{"score": s + 0.5} for s in range(3)]
    (tmp_path / "toy.py").write_text("# --seed\nprint('nothing')\n")
    with pytest.raises(ValueError, match="printed no number"):
        over_seeds.main()


def test_recipes_are_compared_and_not_trained_twice(tmp_path: Path, monkeypatch, capsys) -> None:
    made: list[str] = []
    make_trainer = recipes.make_trainer

    def counted(batches, recipe):
        made.append(recipe.architecture)
        return make_trainer(batches, recipe)

    monkeypatch.setattr(recipes, "make_trainer", counted)
    sizes = "--latents 32 --k 4 --batch-size 256 --epochs 25 --seeds 0"
    where = f"--name digits --out {tmp_path / 'runs'} --results {tmp_path / 'found.json'}"
    arguments = [*f"digits:train digits:held_out {sizes} {where} --runs".split(), "plain"]
    for runs in ([], [recipes.SHUFFLED, "from data, MonoLoss 0.4"]):
        monkeypatch.setattr("sys.argv", ["recipes", *arguments, *runs])
        recipes.main()
    assert len(made) == 3
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["runs"])[:3] == ["plain", recipes.SHUFFLED, "from data, MonoLoss 0.4"]
    assert all(
        run["l0"] == pytest.approx(4, rel=0.02) for (run,) in list(found["runs"].values())[:3]
    )
    assert recipes.markdown(found) in capsys.readouterr().out


def test_the_extraction_of_patches_is_benchmarked() -> None:
    sizes = {"model": "vit_tiny_patch16_224", "images": 4, "rounds": 1, "batch": 2, "device": "cpu"}
    found = patch_extraction.speed(argparse.Namespace(**sizes))
    assert found["share of the encoder's speed"]["patches"]["median"] > 0
    assert found["images a second"]["encoder alone"] > 0
    assert "patches" in found["says"]
    peak = patch_extraction.peak_memory(3)
    assert 50 < peak["own"] < peak["with pages of files"]

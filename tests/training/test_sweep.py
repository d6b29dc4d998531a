"""``sweep``: the weight of a loss, chosen by short runs."""

from __future__ import annotations

import json
import math

import pytest
from typer.testing import CliRunner

from monoloss_plugin import cli, load_features
from monoloss_plugin.comparison import Comparison
from monoloss_plugin.training import Recipe, Run, Sweep, get_recipe, sweep

SIZES = {"num_latents": 32, "k": 4, "batch_size": 256, "epochs": 50}


def found(points: dict[str, tuple[float, float]], runs: list[Run], cost: float = 0.01) -> Sweep:
    measured = {
        name: [{"r2": r2, "monoscore_adjusted": score}] for name, (r2, score) in points.items()
    }
    return Sweep(Comparison(measured, {}, [], []), runs, steps=100, cost=cost)


def test_the_front_and_the_suggestion_follow_their_definitions() -> None:
    runs = [Run("a", 0.0, 8), Run("b", 0.1, 8), Run("c", 0.2, 8), Run("d", 0.4, 8)]
    points = {"a": (0.80, 0.1), "b": (0.81, 0.3), "c": (0.795, 0.2), "d": (0.70, 0.9)}
    one = found({**points, "PCA": (0.9, 0.05), "data points": (0.69, 0.5)}, runs)
    assert one.front() == ["PCA", "b", "d"]  # all others are beaten in both
    assert one.suggested() == 0.2  # 0.795 is at least 99 % of 0.8
    assert found(points, runs, cost=0.2).suggested() == 0.4
    assert found({**points, "b": (math.nan, 0.3)}, runs).front() == ["a", "c", "d"]


def test_each_k_has_its_own_suggestion() -> None:
    runs = [Run("a", 0.0, 4), Run("b", 0.1, 4), Run("c", 0.0, 8), Run("d", 0.1, 8)]
    points = {"a": (0.5, 0.1), "b": (0.4, 0.3), "c": (0.9, 0.2), "d": (0.9, 0.9)}
    assert [found(points, runs).suggested(k) for k in (None, 4, 8)] == [0.0, 0.0, 0.1]


@pytest.mark.parametrize("r2", [-0.5, 0.0, math.nan])
def test_the_smallest_weight_is_suggested_if_no_other_will_do(r2) -> None:
    runs = [Run("a", 0.0, 8), Run("b", 0.1, 8)]
    assert found({"a": (r2, 0.1), "b": (-9.0, 0.3)}, runs).suggested() == 0.0


def test_a_bad_folder_is_found_before_the_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("monoloss_plugin.training.sweep", lambda *_, **__: pytest.fail("it ran"))
    (tmp_path / "file").write_text("")
    shown = CliRunner().invoke(cli.app, f"sweep digits:train --out {tmp_path}/file/x".split())
    assert shown.exit_code == 1
    assert "Not a directory" in shown.output


def test_short_runs_over_the_weight() -> None:
    features, held_out = (load_features("digits", split) for split in ("train", "held_out"))
    recipe = get_recipe("recommended", features, **SIZES)
    swept = sweep(
        features, recipe, lams=[0.0, 20.0], seconds=3, held_out=held_out, baselines=["PCA"]
    )
    assert swept.steps >= 100
    without, strong = (swept.comparison.runs[run.name][0] for run in swept.runs)
    assert strong["monoscore_adjusted"] > without["monoscore_adjusted"]
    assert strong["r2"] < without["r2"]
    assert without["l0"] == pytest.approx(4, rel=0.1)
    assert swept.suggested() == 0.0
    assert list(swept.comparison.runs) == ["lam 0", "lam 20", "PCA"]
    assert json.loads(json.dumps(swept.to_dict()))["suggested"] == {"4": 0.0}
    assert swept.plot().get_title() == f"{swept.steps} steps, held-out features"


def test_the_command_writes_numbers_and_a_figure(tmp_path) -> None:
    shown = CliRunner().invoke(
        cli.app,
        f"sweep digits:train --held-out digits:held_out --latents 32 --k 4 --lam 0 --lam 0.2 "
        f"--epochs 25 --minutes 0.05 --out {tmp_path}".split(),
        env={"COLUMNS": "200"},
    )
    assert shown.exit_code == 0, shown.output
    assert "largest weight at k 4 that costs at most 0.01 of R²" in shown.stdout
    assert json.loads((tmp_path / "sweep.json").read_text())["steps"] == 100
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_named() -> None:
    features = load_features("digits", "train")
    recipe = get_recipe("recommended", features, **SIZES)
    with pytest.raises(ValueError, match="recipe: expected one with a loss term"):
        sweep(features, Recipe(**SIZES))
    with pytest.raises(ValueError, match=r"lams: expected weights that differ in three digits"):
        sweep(features, recipe, lams=[0.1, 0.10001])
    for ks in ([], [4, 4]):
        with pytest.raises(ValueError, match="ks: expected different numbers"):
            sweep(features, recipe, ks=ks)
    with pytest.raises(ValueError, match="k: expected at most the number of latents, 32, got 40"):
        sweep(features, recipe, ks=[4, 40])
    with pytest.raises(ValueError, match="seconds: expected a finite number above 0"):
        sweep(features, recipe, seconds=0)
    standard = get_recipe("recommended", features, architecture="standard")
    with pytest.raises(ValueError, match="ks: standard has no k"):
        sweep(features, standard, ks=[4])

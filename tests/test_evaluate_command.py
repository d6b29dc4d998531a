"""``monoloss evaluate`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from monoloss_plugin import cli, load_features, load_pretrained
from monoloss_plugin.evaluation import Evaluation, evaluate
from monoloss_plugin.hub.repository import bundled_folder

ON = ["--features", "digits:held_out", "--train", "digits:train"]


def run(*arguments: object):
    return CliRunner().invoke(cli.app, ["evaluate", *map(str, arguments)], env={"COLUMNS": "200"})


def test_an_sae_is_measured_as_evaluate_measures_it() -> None:
    shown = run("digits", *ON, "--quick", "--json")
    assert shown.exit_code == 0, shown.output
    expected = evaluate(load_pretrained("digits").sae, load_features("digits", "held_out"))
    assert json.loads(shown.stdout)["runs"] == {"digits": [pytest.approx(expected.summary())]}
    assert "effective" not in shown.stdout


def test_saes_side_by_side_with_everything_that_is_written(tmp_path: Path) -> None:
    folder = bundled_folder("digits") / "models" / "batchtopk-256"
    out = tmp_path / "out"
    shown = run(
        "digits:batchtopk-256-monoloss-0.003", "--against", folder, *ON, "--match-l0", "--out", out
    )
    assert shown.exit_code == 0, shown.output
    for said in ("MonoScore above chance", "by labels", "best 16 latents", "near twin", "R² at 2"):
        assert said in shown.stdout
    runs = json.loads((out / "comparison.json").read_text())["runs"]
    first, second = (of[0]["l0"] for of in runs.values())
    assert first == pytest.approx(second, rel=0.03)
    loaded = Evaluation.load(out / "latents" / "digits-batchtopk-256-monoloss-0.003")
    assert loaded.num_latents == 256
    for name in ("curves", "trade-off", "scores", "support", "density"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_another_space_and_a_baseline(tmp_path: Path) -> None:
    features = load_features("digits", "held_out")
    path = tmp_path / "other.npy"
    import numpy as np

    np.save(path, features.tensor().float().numpy()[:, ::-1].copy())
    shown = run("digits", *ON, "--space", f"mirrored={path}", "--json")
    assert shown.exit_code == 0, shown.output
    (found,) = json.loads(shown.stdout)["runs"]["digits"]
    # The same cosines in another order of dimensions.
    assert found["adjusted/mirrored"] == pytest.approx(found["monoscore_adjusted"], abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["./nothing", *ON], 1, "sae: no such folder: nothing"),
        (["digits:nothing", *ON], 1, "nothing"),
        (["digits", "--features", "./nothing"], 1, "nothing"),
        (["digits", "--features", "digits:nothing"], 1, "split: digits has no nothing"),
        (["digits"], 2, "Missing option '--features'"),
        (["digits", *ON, "--space", "other"], 2, "expected NAME=FOLDER"),
        (["digits", *ON, "--against", "digits"], 2, "named twice"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], code: int, said: str) -> None:
    shown = run(*arguments)
    assert shown.exit_code == code
    assert said in shown.output
    assert "Traceback" not in shown.output

"""``monoloss evaluate`` as a user runs it."""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path

import pytest
import torch
from sae_lens import SAE, TopKTrainingSAE, TopKTrainingSAEConfig
from typer.testing import CliRunner

from monoloss_plugin import cli, load_features, load_pretrained
from monoloss_plugin.evaluation import Evaluation, evaluate
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.hub.repository import bundled_folder
from tests.adapters.conftest import make_trainer

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


def test_patches_are_measured_in_patches_and_images(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, num_images in (("train", 40), ("held_out", 30)):
        labels = torch.arange(num_images) % 3
        x = torch.randn(num_images, 9, 8, generator=generator)
        x[:, :6] += 3 * torch.eye(8)[labels][:, None]
        FeatureSet.from_tensors(x, labels).dataset.save_to_disk(str(tmp_path / name))
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=8, d_sae=16, k=2))
    batches = FeatureSet.open(tmp_path / "train").tensor().split(120)
    make_trainer(sae, cycle(batches), steps=3).fit()
    sae.save_inference_model(str(tmp_path / "sae"))
    features, out = tmp_path / "held_out", tmp_path / "out"
    shown = run(
        f"{tmp_path}/sae", "--features", features, "--train", tmp_path / "train", "--baselines",
        "--match-l0", "--space", f"itself={features}", "--out", out,
    )  # fmt: skip
    assert shown.exit_code == 0, shown.output
    for said in (
        "Moran's I",
        "images by largest patch",
        "share of an image's patches",
        "by itself",
    ):
        assert said in shown.stdout
    found = Evaluation.load(next((out / "latents").glob("*sae")))
    assert found.images.num_images == 30
    assert found.monoscore.num_samples == 270
    assert (out / "support.png").read_bytes().startswith(b"\x89PNG")
    quick = run(f"{tmp_path}/sae", "--features", features, "--quick", "--json")
    (summary,) = json.loads(quick.stdout)["runs"][f"{tmp_path}/sae"]
    expected = evaluate(SAE.load_from_disk(tmp_path / "sae"), FeatureSet.open(features))
    assert summary == pytest.approx(expected.summary())


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

"""What ``monoloss publish`` measures."""

from __future__ import annotations

import pytest

from monoloss_plugin import load_features, load_pretrained
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.hub.measuring import measure
from monoloss_plugin.hub.record import SAERecord
from monoloss_plugin.saes import make_baseline


def first(rows: int, split: str) -> FeatureSet:
    features = load_features("digits", split)
    return FeatureSet(features.dataset.select(range(rows)), features.record)


@pytest.mark.parametrize("inputs", ["unit norm", "as they are"])
def test_all_are_measured_on_features_as_the_sae_takes_them(inputs, tmp_path) -> None:
    sae = load_pretrained("digits").sae
    sae.cfg.metadata["monoloss"] = {"inputs": inputs}
    sae.save_model(tmp_path)
    SAERecord(inputs=inputs).write(tmp_path)
    train, held_out = first(300, "train"), first(100, "held_out")
    found = measure(tmp_path, held_out, baseline=tmp_path, train=train)
    scaled = inputs == "unit norm"
    expected = evaluate(sae, held_out, normalize=scaled)
    assert found["evaluation"].r2 == pytest.approx(expected.r2, rel=1e-6)
    assert found["baseline"].r2 == pytest.approx(expected.r2, rel=1e-6)
    sizes = {"num_latents": expected.num_latents, "l0": max(1, round(expected.l0))}
    control = make_baseline("PCA", train, normalize=scaled, **sizes)
    score = evaluate(control, held_out, normalize=scaled).r2
    assert found["controls"]["PCA"].r2 == pytest.approx(score, rel=1e-6)
    with_images = measure(tmp_path, held_out, find_images=True)["evaluation"]
    assert with_images.evaluation.summary() == found["evaluation"].summary()
    assert with_images.top.rows.shape == (256, 6)

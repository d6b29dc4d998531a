"""The SAE of photographs that comes with the package is what its record says."""

from __future__ import annotations

import pytest

from monoloss_plugin import load_features, load_pretrained
from monoloss_plugin.comparison import compare
from monoloss_plugin.features.encoders import SHORT_NAMES


def test_its_sample_scores_what_its_record_says_of_all_images() -> None:
    loaded, held_out = load_pretrained("photos"), load_features("photos", "held_out")
    train = load_features("photos", "train")
    found = compare(
        {"photos": loaded.sae}, held_out, train=train, baselines=["random directions"], groups=()
    )
    (run,), (control,) = found.runs["photos"], found.runs["random directions"]
    for measure, difference in {
        "r2": 0.01,
        "monoscore_adjusted": 0.02,
        "purity_adjusted": 0.1,
    }.items():
        # 1,000 of the 10,000 images
        expected = loaded.record.metrics[measure]
        assert run[measure] == pytest.approx(expected, abs=difference), measure
        assert run[measure] > control[measure] + 0.1, measure
    assert run["l0"] == pytest.approx(loaded.record.metrics["l0"], abs=0.5)


def test_its_record_names_encoder_images_and_controls() -> None:
    record = load_pretrained("photos").record
    assert f"timm:{record.encoder['name']}" == SHORT_NAMES["efficientnet-lite0"].name
    assert record.dataset["name"] == "cifar10"
    assert record.evaluated_on["samples"] == 10_000
    assert set(record.controls) == {"random directions", "data points", "PCA"}
    assert record.lam == 0.8


def test_training_and_held_out_images_are_different_ones() -> None:
    ids = [set(load_features("photos", one).dataset["image_id"]) for one in ("train", "held_out")]
    assert len(ids[0]) == len(ids[1]) == 1000
    assert not ids[0] & ids[1]

"""The authors' checkpoints, against their forward formulas written down again here."""

from __future__ import annotations

import argparse
import pickle

import pytest
import torch
from torch import Tensor

from monoloss_plugin.batch import Batch
from monoloss_plugin.convert import from_monoloss
from monoloss_plugin.features import FeatureSet
from tests.convert.conftest import LATENTS, WIDTH

K = 5


def untied(**more: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    decoder = torch.nn.functional.normalize(torch.randn(LATENTS, WIDTH, generator=generator), dim=1)
    return {
        "W_enc": decoder.T + 0.1 * torch.randn(WIDTH, LATENTS, generator=generator),
        "W_dec": decoder,
        "b_enc": 0.1 * torch.randn(LATENTS, generator=generator),
        "b_dec": 0.05 * torch.randn(WIDTH, generator=generator),
        **more,
    }


def topk_state(tied: bool) -> dict[str, Tensor]:
    given = untied()
    state = {
        "pre_bias": given["b_dec"],
        "latent_bias": given["b_enc"],
        "encoder.weight": given["W_enc"].T.contiguous(),
        "stats_last_nonzero": torch.zeros(LATENTS, dtype=torch.long),
    }
    return state if tied else {**state, "decoder.weight": given["W_dec"].T.contiguous()}


def scaled(x: Tensor, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Zero mean and unit deviation of each sample, and what undoes it."""
    if not normalize:
        return x, torch.zeros(()), torch.ones(())
    mean = x.mean(1, keepdim=True)
    deviation = (x - mean).std(1, keepdim=True)
    return (x - mean) / (deviation + 1e-5), mean, deviation


def save(path, state, model_type, **config):
    config = {"model_type": model_type, "n_latents": LATENTS, "mono_coef": 3e-4, **config}
    torch.save({"model_state_dict": state, "config": config, "epoch": 50}, path)
    return path


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_topk(tied, normalize, tmp_path, digits, assert_same) -> None:
    state = topk_state(tied)
    path = save(tmp_path / "topk.pt", state, "topk", topk_k=K, normalize=normalize)
    x, mean, deviation = scaled(digits, normalize)
    pre_acts = (x - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]
    values, kept = pre_acts.topk(K, dim=1)
    latents = torch.zeros_like(pre_acts).scatter(1, kept, values.relu())
    decoder = state["encoder.weight"] if tied else state["decoder.weight"].T
    out = (latents @ decoder + state["pre_bias"]) * deviation + mean
    sae = from_monoloss(path)
    assert_same(sae, digits, latents, out)
    assert sae.cfg.metadata.monoloss["terms"]["monoloss"]["lam_units"] == "nmse"


@pytest.mark.parametrize("normalize", [False, True])
def test_vanilla(normalize, tmp_path, digits, assert_same) -> None:
    state = untied()
    path = save(tmp_path / "vanilla.pt", state, "vanilla", normalize=normalize)
    x, mean, deviation = scaled(digits, normalize)
    latents = ((x - state["b_dec"]) @ state["W_enc"] + state["b_enc"]).relu()
    out = (latents @ state["W_dec"] + state["b_dec"]) * deviation + mean
    assert_same(from_monoloss(path), digits, latents, out)


@pytest.mark.parametrize("normalize", [False, True])
def test_jumprelu(normalize, tmp_path, digits, assert_same) -> None:
    state = untied(**{"jumprelu.log_threshold": torch.linspace(-4, -0.5, LATENTS)})
    path = save(tmp_path / "jump.pt", state, "jumprelu", normalize=normalize)
    x, mean, deviation = scaled(digits, normalize)
    pre_acts = (x @ state["W_enc"] + state["b_enc"]).relu()
    latents = pre_acts * (pre_acts > state["jumprelu.log_threshold"].exp())
    out = (latents @ state["W_dec"] + state["b_dec"]) * deviation + mean
    assert_same(from_monoloss(path), digits, latents, out)


def batchtopk(state: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    acts = ((x - state["b_dec"]) @ state["W_enc"] + state["b_enc"]).relu()
    values, kept = acts.flatten().topk(K * len(x))
    latents = torch.zeros(acts.numel()).scatter(0, kept, values).reshape(acts.shape)
    return latents, latents @ state["W_dec"] + state["b_dec"]


def test_batchtopk_is_the_same_on_the_batch_that_sets_the_threshold(
    tmp_path, digits, assert_same
) -> None:
    state = untied()
    path = save(tmp_path / "batch.pt", state, "batch_topk", topk_k=K, normalize=False)
    latents, out = batchtopk(state, digits)
    sae = from_monoloss(path, features=digits)
    assert_same(sae, digits, latents, out)
    assert sae.cfg.metadata.monoloss["terms"]["monoloss"]["lam"] == 3e-4


def test_batchtopk_keeps_k_a_sample_on_average_over_batches(tmp_path, digits) -> None:
    path = save(tmp_path / "batch.pt", untied(), "BatchTopKSAE", topk_k=K)
    batches = [Batch(part) for part in digits.split(256)]
    few = from_monoloss(path, features=batches)
    kept = float((few.encode(digits) > 0).sum()) / len(digits)
    assert abs(kept - K) < 0.1
    thresholds = [from_monoloss(path, features=b.features).threshold[0].item() for b in batches]
    assert few.threshold[0].item() == pytest.approx(sum(thresholds) / len(thresholds), rel=1e-6)


def test_features_that_do_not_fit_are_named(tmp_path, digits) -> None:
    path = save(tmp_path / "batch.pt", untied(), "batch_topk", topk_k=torch.tensor(5.0))
    for features, error, said in (
        (digits[:, :7], ValueError, "features: expected width 64, the checkpoint's, got 7"),
        (digits[:0], ValueError, "expected at least one sample"),
        ([], ValueError, "expected at least one sample"),
        (["a"], TypeError, "features: expected a tensor.* got str"),
    ):
        with pytest.raises(error, match=said):
            from_monoloss(path, features=features)
    assert from_monoloss(path, features=[digits[:256], digits[256:512]]).cfg.d_sae == LATENTS


def test_settings_that_a_command_line_left_as_words(tmp_path, digits) -> None:
    for word, expected in (("true", "layer_norm"), ("False", "none"), ("", "none")):
        path = save(tmp_path / "v.pt", untied(), "vanilla", normalize=word, mono_coef="0.0003")
        sae = from_monoloss(path)
        assert sae.cfg.normalize_activations == expected
        assert sae.cfg.metadata.monoloss["terms"]["monoloss"]["lam"] == 3e-4
    with pytest.raises(ValueError, match="expected a finite number as mono_coef, got 'much'"):
        from_monoloss(save(tmp_path / "v.pt", untied(), "vanilla", mono_coef="much"))


def test_batchtopk_whose_batches_have_fewer_active_keeps_them_all(tmp_path, digits) -> None:
    state = untied(b_enc=torch.full((LATENTS,), -0.3))
    path = save(tmp_path / "batch.pt", state, "batch_topk", topk_k=LATENTS)
    few = digits[:7]
    sae = from_monoloss(path, features=few)
    active = ((few - state["b_dec"]) @ state["W_enc"] + state["b_enc"]) > 0
    assert 0 < int(active.sum()) < active.numel()
    assert torch.equal(sae.encode(few) > 0, active)


class Stranger:
    """Something that only a pickle can hold."""

    def __reduce__(self):
        return print, ("this must never be printed",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model_state_dict": {}}, "expected a checkpoint with model_state_dict and config"),
        ({"model_state_dict": {}, "config": []}, "expected a dict as config"),
        ({"model_state_dict": {}, "config": {"model_type": "gated"}}, "got 'gated'"),
        ({"model_state_dict": {}, "config": {"model_type": "topk"}}, "expected a state dict"),
        ({"model_state_dict": untied(), "config": {"model_type": "topk"}}, "no encoder.weight"),
        (
            {"model_state_dict": topk_state(True), "config": {"model_type": "topk"}},
            "expected a topk_k of 1 to 48, got None",
        ),
        (
            {"model_state_dict": untied(extra=torch.ones(1)), "config": {"model_type": "vanilla"}},
            "extra: tensors that this format does not have",
        ),
        (
            {"model_state_dict": untied(W_dec=torch.ones(3, 4)), "config": {"model_type": "relu"}},
            r"got \(64, 48\) and \(3, 4\)",
        ),
        (
            {"model_state_dict": untied(), "config": {"model_type": "relu", "n_latents": 9}},
            "n_latents = 9",
        ),
        (
            {"model_state_dict": untied(), "config": {"model_type": "batch_topk", "topk_k": 2}},
            "features: a BatchTopK checkpoint stores no threshold",
        ),
        (
            {"model_state_dict": untied(), "config": argparse.Namespace(a=1)},
            "it holds argparse.Namespace. Nothing else is unpickled",
        ),
        ({"model_state_dict": Stranger(), "config": {}}, "Nothing else is unpickled"),
        (
            {
                "model_state_dict": {**topk_state(True), "decoder.weight": torch.ones(48, 64)},
                "config": {"model_type": "topk", "topk_k": 2},
            },
            r"got \(64, 48\) and \(64, 48\)",
        ),
    ],
)
def test_other_content_is_named(content, said, tmp_path, capsys) -> None:
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=said):
        from_monoloss(tmp_path / "checkpoint.pt")
    assert "this must never" not in capsys.readouterr().out


def test_other_files_are_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        from_monoloss(tmp_path / "nothing.pt")
    for content in (b"", b"text", pickle.dumps(Stranger())):
        (tmp_path / "file.pt").write_bytes(content)
        with pytest.raises(ValueError, match="is not a checkpoint"):
            from_monoloss(tmp_path / "file.pt")


def test_a_feature_set_gives_the_threshold_of_its_batches_of_unit_norm(tmp_path, digits) -> None:
    path = save(tmp_path / "batch.pt", untied(), "batch_topk", topk_k=K)
    scaled_up = FeatureSet.from_tensors(7 * digits)
    of_set = from_monoloss(path, features=scaled_up).threshold
    assert of_set.allclose(from_monoloss(path, features=digits).threshold, rtol=1e-5)

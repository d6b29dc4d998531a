"""Another selection changes which latents are active, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sklearn.metrics import r2_score

from monoloss_plugin import load_features, load_pretrained
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureBatches
from monoloss_plugin.saes import (
    effective_latents,
    k_robustness,
    pre_activations,
    selection,
    with_k,
    with_l0,
)

SHAPE = {"d_in": 12, "d_sae": 50}


def randomised(sae):
    """The SAE with random weights, whose decoder rows have different norms."""
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 3)
        if hasattr(sae, "threshold"):
            sae.threshold.abs_()
    return sae.requires_grad_(False)


def topk(rescale: bool = False, **options):
    return TopKSAE(TopKSAEConfig(k=7, rescale_acts_by_decoder_norm=rescale, **SHAPE, **options))


def topk_in_training(rescale: bool = True):
    config = TopKTrainingSAEConfig(k=7, rescale_acts_by_decoder_norm=rescale, **SHAPE)
    return TopKTrainingSAE(config)


def jumprelu():
    return randomised(JumpReLUSAE(JumpReLUSAEConfig(**SHAPE)))


def gated():
    return randomised(GatedSAE(GatedSAEConfig(**SHAPE)))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(400, 12)


@pytest.fixture(scope="module")
def held_out():
    return load_features("digits", "held_out")


def active(latents) -> float:
    return (latents > 0).sum(1).double().mean().item()


@pytest.mark.parametrize(
    ("make", "rescaled"),
    [
        (topk, False),
        (lambda: topk(rescale=True), True),
        (topk_in_training, True),
        (jumprelu, False),
        (lambda: StandardSAE(StandardSAEConfig(**SHAPE)), False),
    ],
)
def test_pre_activations_are_what_the_formula_says(make, rescaled, x) -> None:
    sae = randomised(make())
    w, b = sae.W_enc.numpy(), sae.b_enc.numpy()
    centre = sae.b_dec.numpy() if sae.cfg.apply_b_dec_to_input else 0
    expected = np.maximum((x.numpy() - centre) @ w + b, 0)
    if rescaled:
        expected = expected * np.linalg.norm(sae.W_dec.numpy(), axis=1)
    np.testing.assert_allclose(pre_activations(sae, x), expected, atol=1e-5)
    assert not sae.hook_sae_acts_pre._forward_hooks


@pytest.mark.parametrize(
    "make", [topk, lambda: topk(rescale=True), topk_in_training, lambda: topk_in_training(False)]
)
def test_with_its_own_k_a_topk_sae_stays_the_same_bit_for_bit(make, x) -> None:
    sae = randomised(make())
    same = with_k(sae, 7)
    assert torch.equal(same.encode(x), sae.encode(x))
    assert torch.equal(same.decode(same.encode(x)), sae.decode(sae.encode(x)))
    assert same.cfg is sae.cfg


@pytest.mark.parametrize("k", [1, 5, 50])
def test_with_k_keeps_the_largest_of_each_sample(k, x) -> None:
    sae = jumprelu()
    found, pre = with_k(sae, k).encode(x), pre_activations(sae, x)
    for kept, given in zip(found.tolist(), pre.tolist(), strict=True):
        largest = sorted(range(50), key=given.__getitem__)[-k:]
        assert kept == [given[i] if i in largest else 0 for i in range(50)]


def test_one_threshold_is_saelens_s_jumprelu(x) -> None:
    sae = randomised(topk())
    pre = pre_activations(sae, x)
    largest = np.sort(pre.numpy().ravel())[::-1]
    jump = JumpReLUSAE(JumpReLUSAEConfig(**SHAPE))
    jump.load_state_dict(
        {**sae.state_dict(), "threshold": torch.full((50,), float(largest[1999:2001].mean()))}
    )
    found = with_l0(sae, x, 5.0).encode(x)
    assert active(found) == 5.0
    assert torch.equal(found, jump.encode(x))


def test_with_its_own_l0_a_jumprelu_sae_stays_the_same_bit_for_bit(x, held_out) -> None:
    for sae, given in ((jumprelu(), x), (load_pretrained("digits").sae, held_out)):
        same = with_l0(sae, given, evaluate(sae, given).l0)
        unit = given if given is x else torch.nn.functional.normalize(given.tensor().float(), dim=1)
        assert torch.equal(same.encode(unit), sae.encode(unit))


@pytest.mark.parametrize("l0", [2, 6.5, 20])
def test_a_threshold_is_added_to_a_jumprelu_s_own(l0, x) -> None:
    sae = jumprelu()
    found, pre = with_l0(sae, x, l0).encode(x), pre_activations(sae, x)
    assert active(found) == pytest.approx(l0, rel=0.01)
    margins, kept = pre - sae.threshold, found > 0
    assert torch.equal(found, pre * kept)
    assert margins[kept].min() > margins[~kept & (pre > 0)].max()


@pytest.mark.parametrize("l0", [3, 8, 12])
@pytest.mark.parametrize("sae_id", ["batchtopk-256", "batchtopk-256-monoloss-0.003"])
def test_an_evaluation_has_the_l0_that_was_asked_for(l0, sae_id, held_out) -> None:
    sae = load_pretrained("digits", sae_id).sae
    assert evaluate(with_l0(sae, held_out, l0), held_out).l0 == pytest.approx(l0, rel=0.01)


def test_the_threshold_of_many_samples_comes_from_some(x, monkeypatch) -> None:
    monkeypatch.setattr(selection, "_SAMPLES", 200)
    in_order = x[x[:, 0].argsort()]  # the first 200 would give another threshold
    found = with_l0(jumprelu(), in_order, 6).encode(in_order)
    assert active(found) != 6
    assert active(found) == pytest.approx(6, rel=0.05)


def test_an_l0_that_no_threshold_gives_is_an_error(x) -> None:
    sae = jumprelu()
    most = active(pre_activations(sae, x))
    assert active(with_l0(sae, x, most).encode(x)) == most
    with pytest.raises(ValueError, match=f"l0: expected at most {most:.4g}, the mean number of"):
        with_l0(sae, x, most + 0.1)
    with pytest.raises(ValueError, match="l0: no threshold gives 3, because many"):
        with_l0(constant_sae(), x, 3)
    for wrong in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="l0: expected a number above 0"):
            with_l0(sae, x, wrong)
    with pytest.raises(TypeError, match="l0: expected a number"):
        with_l0(sae, x, "8")  # type: ignore[arg-type]


def constant_sae():
    """All pre-activations are 1."""
    sae = topk()
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.fill_(1)
    return sae


@pytest.mark.parametrize(
    ("make", "called"),
    [
        (gated, "gated"),
        (
            lambda: BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=7, **SHAPE)),
            "batchtopk; save a BatchTopK SAE with save_inference_model",
        ),
        (lambda: "my-sae", "str"),
    ],
)
def test_an_sae_without_pre_activations_to_choose_from_is_named(make, called, x) -> None:
    with pytest.raises(TypeError, match=f"sae: expected a SAELens SAE of the .* got .*{called}"):
        pre_activations(make(), x)


def test_another_sae_can_only_have_fewer_latents(x) -> None:
    sae = gated()
    own = sae.encode(x)
    kept = own.topk(3, dim=1)
    expected = torch.zeros_like(own).scatter(1, kept.indices, kept.values)
    assert torch.equal(with_k(sae, 3).encode(x), expected)
    assert torch.equal(with_k(sae, 50).encode(x), own)
    assert active(with_l0(sae, x, active(own) / 2).encode(x)) == pytest.approx(
        active(own) / 2, rel=0.01
    )
    with pytest.raises(ValueError, match="l0: expected at most"):
        with_l0(sae, x, active(own) * 1.1)
    l0 = round(active(own))
    assert list(k_robustness(sae, x)) == [round(active(own) / 4), round(active(own) / 2), l0]
    with pytest.raises(ValueError, match=f"ks: expected at most {l0} for this SAE, got {l0 + 1}"):
        k_robustness(sae, x, [l0 + 1])


def test_r2_at_other_ks_is_scikit_learn_s(held_out) -> None:
    sae = load_pretrained("digits").sae
    x = torch.nn.functional.normalize(held_out.tensor().float(), dim=1)
    found = k_robustness(sae, held_out)
    assert list(found) == [2, 4, 8, 16, 33]  # its L0 is 8.25
    for k, r2 in found.items():
        reselected = with_k(sae, k)
        expected = r2_score(x.numpy(), reselected.decode(reselected.encode(x)).numpy())
        assert r2 == pytest.approx(expected, abs=1e-6)
    assert found[8] == max(found.values())
    assert list(k_robustness(sae, held_out, [16, 8])) == [8, 16]


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
def test_ks_go_with_saes_that_scale_their_inputs(norm, x) -> None:
    sae = randomised(topk(normalize_activations=norm))
    expected = r2_score(x.numpy(), sae(x).numpy())
    assert k_robustness(sae, x, [3, 7])[7] == pytest.approx(expected, abs=1e-5)


def test_ks_beyond_all_latents_are_left_out(x) -> None:
    assert list(k_robustness(randomised(topk()), x[:5])) == [2, 4, 7, 14, 28]
    many = TopKSAE(TopKSAEConfig(k=40, **SHAPE))
    with torch.no_grad():
        many.b_enc.fill_(10)  # all pre-activations are positive
    assert list(k_robustness(many, x)) == [10, 20, 40]
    with pytest.raises(ValueError, match="ks: expected at most 50 for this SAE, got 51"):
        k_robustness(many, x, [51])
    with pytest.raises(ValueError, match="k: expected at most 50 latents, got 51"):
        with_k(many, 51).encode(x)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        with_k(many, 0)


class FixedLatents:
    """An SAE of another library, which gives these latents for samples 0, 1, ..."""

    def __init__(self, latents) -> None:
        self.latents = latents

    def encode(self, x):
        return self.latents

    def decode(self, latents):
        return latents


@pytest.mark.parametrize("sparse", [False, True])
def test_effective_latents_are_counted_as_in_a_loop(sparse) -> None:
    latents = torch.rand(60, 20) * (torch.rand(60, 20) < 0.2)
    latents[3] = 0
    latents[4] = torch.tensor([2.0] * 5 + [0.0] * 15)
    counts = [sum(a) ** 2 / sum(v * v for v in a) if any(a) else 0 for a in latents.tolist()]
    assert counts[4] == pytest.approx(5)
    given = latents.to_sparse() if sparse else latents
    found = effective_latents(FixedLatents(given), torch.rand(60, 2))
    assert found == pytest.approx(sum(counts) / 60, rel=1e-6)


def test_features_are_scaled_as_in_an_evaluation(held_out) -> None:
    sae = load_pretrained("digits").sae
    raw = held_out.tensor().float()
    unit = torch.nn.functional.normalize(raw, dim=1)
    expected = effective_latents(sae, unit, normalize=False)
    assert effective_latents(sae, held_out) == pytest.approx(expected, rel=1e-5)
    assert effective_latents(sae, raw * 9) == pytest.approx(expected, rel=1e-5)  # as it records
    assert effective_latents(sae, raw * 9, normalize=False) != pytest.approx(expected, rel=0.1)


def test_features_that_do_not_fit_are_named(held_out) -> None:
    sae = load_pretrained("digits").sae
    with pytest.raises(ValueError, match=r"features: expected \(N, 64\) for this SAE, got \(5, 3"):
        effective_latents(sae, torch.rand(5, 3))
    with pytest.raises(ValueError, match="features: expected at least one sample"):
        effective_latents(sae, torch.rand(0, 64))
    with pytest.raises(ValueError, match="features: contains NaN"):
        effective_latents(sae, torch.full((2, 64), float("nan")))
    with pytest.raises(TypeError, match="features: expected a tensor or a FeatureSet, got"):
        effective_latents(sae, FeatureBatches(held_out, batch_size=100))  # type: ignore[arg-type]

"""Data-point initialisation of SAELens's training SAEs."""

from __future__ import annotations

import math

import pytest
import torch
from sae_lens import Transcoder, TranscoderConfig
from sae_lens.registry import get_sae_training_class
from torch.nn.functional import cosine_similarity, normalize

from monoloss_plugin import init_from_data, load_features
from monoloss_plugin.features import FeatureBatches

ARCHITECTURES = {
    "topk": {"k": 4},
    "batchtopk": {"k": 4},
    "matryoshka_batchtopk": {"k": 4, "matryoshka_widths": [16, 64]},
    "abstopk": {"k": 4},
    "jumprelu": {},
    "standard": {},
    "gated": {},
}


def new_sae(architecture: str = "batchtopk", width: int = 16, **options):
    sae_class, config = get_sae_training_class(architecture)
    options = {**ARCHITECTURES[architecture], **options}
    return sae_class(config(d_in=width, d_sae=64, **options))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(100, 16) + 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_latents_are_different_samples_minus_the_mean(architecture, x) -> None:
    sae = new_sae(architecture)
    norms = sae.W_dec.norm(dim=1), sae.W_enc.norm(dim=0)
    init_from_data(sae, x)
    centred = normalize(x - x.mean(0))
    cosines = normalize(sae.W_dec.detach()) @ centred.T
    best = cosines.max(dim=1)
    assert best.values.min() > 1 - 1e-5
    assert len(best.indices.unique()) == 64
    assert torch.allclose(normalize(sae.W_enc.T), normalize(sae.W_dec), atol=1e-6)
    assert torch.allclose(sae.b_dec, x.mean(0), atol=1e-5)
    for before, after in zip(norms, (sae.W_dec.norm(dim=1), sae.W_enc.norm(dim=0)), strict=True):
        assert torch.allclose(before, after, rtol=1e-5)


def test_the_seed_chooses_the_samples(x) -> None:
    saes = [new_sae() for _ in range(3)]
    for sae, seed in zip(saes, (0, 0, 1), strict=True):
        init_from_data(sae, x, seed=seed)
    assert torch.allclose(saes[0].W_dec, saes[1].W_dec)
    assert not torch.allclose(saes[0].W_dec, saes[2].W_dec)


def test_an_encoder_that_does_not_subtract_b_dec_gets_a_bias(x) -> None:
    one, other = new_sae("standard"), new_sae("standard", apply_b_dec_to_input=False)
    other.load_state_dict(one.state_dict())
    for sae in (one, other):
        init_from_data(sae, x)
    assert torch.allclose(one.encode(x), other.encode(x), atol=1e-5)


def test_without_center_directions_are_the_samples_and_b_dec_stays(x) -> None:
    sae = new_sae()
    init_from_data(sae, x, center=False)
    assert (normalize(sae.W_dec.detach()) @ normalize(x).T).max(dim=1).values.min() > 1 - 1e-5
    assert not sae.b_dec.any()


def test_a_blend_lies_between_the_sample_and_a_random_direction(x) -> None:
    pure, mixed = new_sae(), new_sae()
    init_from_data(pure, x)
    init_from_data(mixed, x, blend=0.8)
    cosines = cosine_similarity(pure.W_dec, mixed.W_dec)
    # The sine of the angle between p and 0.8 p + 0.2 r is at most 0.2 / 0.8.
    assert cosines.min() >= math.sqrt(1 - 0.25**2) - 1e-5
    assert cosines.mean() < 0.99


@pytest.mark.parametrize("kind", ["constant_norm_rescale", "expected_average_only_in"])
def test_the_mean_is_scaled_as_saelens_scales_the_inputs(kind, x) -> None:
    sae = new_sae("standard", normalize_activations=kind)
    init_from_data(sae, x)
    root = math.sqrt(16)
    per_sample = kind == "constant_norm_rescale"
    scaled = normalize(x) * root if per_sample else x * root / x.norm(dim=1).mean()
    assert torch.allclose(sae.b_dec, scaled.mean(0), atol=1e-5)


def test_a_feature_set_is_scaled_to_unit_norm_as_batches_are() -> None:
    features = load_features("digits", "train")
    sae = new_sae(width=64)
    init_from_data(sae, features)
    unit = torch.cat([batch.features for batch in FeatureBatches(features, drop_last=False)])
    assert torch.allclose(sae.b_dec, unit.mean(0), atol=1e-5)


def test_the_core_works_on_weight_tensors(x) -> None:
    module = torch.nn.Module()
    module.W_enc, module.W_dec = torch.randn(16, 8), torch.randn(8, 16)
    module.b_enc, module.b_dec = torch.zeros(8), torch.zeros(16)
    init_from_data(module, x)
    assert torch.allclose(module.b_enc, -module.b_dec @ module.W_enc, atol=1e-5)


def test_bad_input_is_named(x) -> None:
    with pytest.raises(ValueError, match="features: expected at least 64 samples"):
        init_from_data(new_sae(), x[:63])
    with pytest.raises(ValueError, match="features: expected width 16 as the SAE's, got 8"):
        init_from_data(new_sae(), x[:, :8])
    with pytest.raises(ValueError, match="blend: expected above 0 and at most 1, got 0"):
        init_from_data(new_sae(), x, blend=0)
    with pytest.raises(TypeError, match="sae: expected a SAELens training SAE"):
        init_from_data(torch.nn.Linear(2, 2), x)
    with pytest.raises(TypeError, match="features: expected a tensor or a FeatureSet"):
        init_from_data(new_sae(), "photos")
    with pytest.raises(ValueError, match="NaN"):
        init_from_data(new_sae(), x * float("nan"))
    for kind in ("layer_norm", "covariance_whitening"):
        with pytest.raises(ValueError, match=f"cannot follow normalize_activations='{kind}'"):
            init_from_data(new_sae("standard", normalize_activations=kind), x)
    with pytest.raises(ValueError, match="reconstructs something else than its input"):
        init_from_data(
            Transcoder(TranscoderConfig(d_in=16, d_out=16, d_sae=64, apply_b_dec_to_input=False)), x
        )

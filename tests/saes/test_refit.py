"""Refitting a decoder: least squares with a prior, latents that stay, and no loss of R²."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sae_lens import (
    SAE,
    AbsTopKSAE,
    AbsTopKSAEConfig,
    AbsTopKTrainingSAE,
    AbsTopKTrainingSAEConfig,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatchingPursuitSAE,
    MatchingPursuitSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    Transcoder,
    TranscoderConfig,
)

from monoloss_plugin import load_features, load_pretrained, refit_decoder
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.hub.record import record_in
from monoloss_plugin.saes import Refit, refit, with_k

D, M = 64, 96
FREE = {"apply_b_dec_to_input": False}
TIED = {"apply_b_dec_to_input": True}
SAES = {
    "standard": (StandardSAE, StandardSAEConfig, TIED),
    "standard, training": (StandardTrainingSAE, StandardTrainingSAEConfig, TIED),
    "topk": (TopKSAE, TopKSAEConfig, {"k": 8, **TIED}),
    "topk, rescaled": (
        TopKSAE,
        TopKSAEConfig,
        {"k": 8, "rescale_acts_by_decoder_norm": True, **TIED},
    ),
    "topk, training": (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": 8, **TIED}),
    "topk, sparse": (
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
        {"k": 5, "use_sparse_activations": True, **FREE},
    ),
    "abstopk": (AbsTopKSAE, AbsTopKSAEConfig, {"k": 8, **TIED}),
    "abstopk, training": (AbsTopKTrainingSAE, AbsTopKTrainingSAEConfig, {"k": 8, **TIED}),
    "batchtopk, training": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": 8, **TIED}),
    "matryoshka, training": (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        {"k": 8, "matryoshka_widths": [32, 96], **FREE},
    ),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, TIED),
    "jumprelu, training": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, TIED),
    "gated": (GatedSAE, GatedSAEConfig, TIED),
    "gated, training": (GatedTrainingSAE, GatedTrainingSAEConfig, TIED),
    "layer norm": (StandardSAE, StandardSAEConfig, {"normalize_activations": "layer_norm", **TIED}),
    "constant norm": (
        TopKSAE,
        TopKSAEConfig,
        {"k": 8, "normalize_activations": "constant_norm_rescale", **TIED},
    ),
}
every_sae = pytest.mark.parametrize("name", SAES)


@pytest.fixture(scope="module")
def x():
    return torch.nn.functional.normalize(load_features("digits", "held_out").tensor().float())


def made(name: str, dtype: torch.dtype = torch.float64) -> SAE:
    """An SAE with decoder rows of different norms, and biases that are not zero."""
    cls, config, options = SAES[name]
    torch.manual_seed(0)
    sae = cls(config(d_in=D, d_sae=M, dtype=str(dtype).removeprefix("torch."), **options))
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(M, 1) + 0.5)
        for key, value in sae.named_parameters():
            if key.startswith("b_") or key in ("r_mag", "threshold"):
                value.add_(0.05 * torch.rand_like(value))
    return sae


def refitted(sae: SAE, *args, **options) -> Refit:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "sae: a BatchTopK SAE in training")
        return refit_decoder(sae, *args, normalize=False, **options)


def latents_of(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return sae.encode(x).to_dense()


@every_sae
def test_latents_stay_and_r2_on_the_samples_of_the_fit_rises(name, x) -> None:
    sae = made(name)
    kept, before = latents_of(sae, x), evaluate_quietly(sae, x)
    found = refitted(sae, x, held_out=x)
    assert found.kept
    assert found.r2_after > found.r2_before + 0.01
    torch.testing.assert_close(latents_of(sae, x), kept, rtol=1e-9, atol=1e-12)
    after = evaluate_quietly(sae, x)
    assert (before.r2, after.r2) == pytest.approx((found.r2_before, found.r2_after), abs=1e-9)
    assert after.l0 == before.l0 > 0
    torch.testing.assert_close(after.monoscore.scores, before.monoscore.scores, equal_nan=True)


def evaluate_quietly(sae: SAE, x: torch.Tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return evaluate(sae, x, normalize=False)


@every_sae
def test_it_is_least_squares_with_a_prior(name, x) -> None:
    """The decoder minimises ||X - [A 1] W||² + λ ||W - W0||², which numpy solves in one system."""
    sae = made(name)
    a = latents_of(sae, x).numpy()
    targets = sae.run_time_activation_norm_fn_in(x.double()).numpy()
    # What a latent of 1 adds to the reconstruction, on the SAE's own scale.
    seen = []
    handle = sae.hook_sae_recons.register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        sae.run_time_activation_norm_fn_in(torch.rand(M + 1, D).double())
        sae.decode(torch.cat((torch.eye(M), torch.zeros(1, M))).double())
        start = (seen[0][:-1] - seen[0][-1]).numpy()
        penalty = 0.1 * np.square(a - a.mean(0)).sum(0).mean()
        refitted(sae, x, held_out=x, ridge=0.1)
        sae.run_time_activation_norm_fn_in(torch.rand(M + 1, D).double())
        seen.clear()
        sae.decode(torch.cat((torch.eye(M), torch.zeros(1, M))).double())
    handle.remove()
    left = np.block([[a, np.ones((len(a), 1))], [np.sqrt(penalty) * np.eye(M), np.zeros((M, 1))]])
    right = np.concatenate((targets, np.sqrt(penalty) * start))
    expected = np.linalg.lstsq(left, right, rcond=None)[0]
    np.testing.assert_allclose(seen[0][-1], expected[-1], atol=1e-8)
    np.testing.assert_allclose(seen[0][:-1] - seen[0][-1], expected[:-1], atol=1e-8)


@pytest.mark.parametrize("name", ["topk, rescaled", "jumprelu", "gated", "abstopk"])
def test_a_loaded_sae_is_the_refitted_one(name, x, tmp_path) -> None:
    sae = made(name, torch.float32)
    assert refitted(sae, x, held_out=x).kept
    sae.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert torch.equal(loaded.encode(x), sae.encode(x))
    assert torch.equal(loaded(x), sae(x))


@pytest.mark.parametrize("name", ["topk, training", "jumprelu, training", "batchtopk, training"])
def test_what_training_saves_for_others_has_the_latents_of_an_sae_without_refit(
    name, x, tmp_path
) -> None:
    plain, changed = made(name, torch.float32), made(name, torch.float32)
    if name.startswith("batchtopk"):
        for sae in (plain, changed):
            sae.topk_threshold.fill_(0.002)
    assert refitted(changed, x, held_out=x).kept
    loaded = []
    for number, sae in enumerate((plain, changed)):
        sae.save_inference_model(tmp_path / str(number))
        loaded.append(SAE.load_from_disk(tmp_path / str(number)))
    torch.testing.assert_close(loaded[1].encode(x), loaded[0].encode(x), rtol=1e-4, atol=1e-5)
    assert loaded[1].encode(x).any()
    assert evaluate_quietly(loaded[1], x).r2 > evaluate_quietly(loaded[0], x).r2


@pytest.mark.parametrize("name", ["topk, rescaled", "gated", "layer norm"])
def test_a_refit_that_would_hurt_is_undone(name, x) -> None:
    sae = made(name, torch.float32)
    assert refitted(sae, x, held_out=x).kept
    sae.cfg.metadata.monoloss = {"inputs": "as they are"}
    weights = {key: value.clone() for key, value in sae.state_dict().items()}
    cfg, settings = sae.cfg, sae.cfg.to_dict()
    noise = torch.randn(200, D, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match=r"held-out R² would be .* stays as it was") as seen:
        found = refit_decoder(sae, noise, held_out=x, normalize=False)
    assert seen[0].filename == __file__
    assert not found.kept
    assert found.r2_after < found.r2_before
    assert sae.cfg is cfg
    assert sae.cfg.to_dict() == settings
    assert all(torch.equal(value, weights[key]) for key, value in sae.state_dict().items())


def test_an_error_while_it_judges_leaves_the_sae_as_it_was(x, monkeypatch) -> None:
    sae = made("topk, rescaled")
    kept, calls = sae.W_enc.clone(), []

    def fail_the_second_time(*args) -> float:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return 0.0

    monkeypatch.setattr(refit, "_r2", fail_the_second_time)
    with pytest.raises(KeyboardInterrupt):
        refitted(sae, x)
    assert torch.equal(sae.W_enc, kept)
    assert sae.cfg.rescale_acts_by_decoder_norm


def test_it_is_recorded_beside_what_is_known(x) -> None:
    one, other = made("topk, rescaled"), made("topk, rescaled")
    other.cfg = one.cfg
    one.cfg.metadata.monoloss = {"inputs": "as they are"}
    found = refit_decoder(one, x, ridge=0.5, held_out=x)
    done = {"ridge": 0.5, "r2_before": found.r2_before, "r2_after": found.r2_after, "samples": 599}
    assert one.cfg.metadata.monoloss == {"inputs": "as they are", "refit": done}
    assert record_in(one).refit == done
    assert other.cfg.rescale_acts_by_decoder_norm
    assert "refit" not in other.cfg.metadata.monoloss


def test_the_bundled_sae_gains_and_keeps_its_latents() -> None:
    train, held_out = (load_features("digits", split) for split in ("train", "held_out"))
    sae = load_pretrained("digits", "batchtopk-256-monoloss-0.003").sae
    before = evaluate(sae, held_out)
    found = refit_decoder(sae, train, held_out=held_out)
    after = evaluate(sae, held_out)
    assert found == (pytest.approx(0.9666, abs=1e-4), pytest.approx(0.9673, abs=1e-4), True)
    assert (before.r2, after.r2) == pytest.approx(found[:2], abs=1e-6)
    torch.testing.assert_close(after.monoscore.scores, before.monoscore.scores, equal_nan=True)


def test_by_default_a_tenth_is_held_out(x, monkeypatch) -> None:
    fitted, judged = [], []
    original = refit._r2, refit._solved
    monkeypatch.setattr(refit, "_r2", lambda *a: judged.append(a[2]) or original[0](*a))
    monkeypatch.setattr(refit, "_solved", lambda *a: fitted.append(a[2]) or original[1](*a))
    refitted(made("standard"), x)
    assert len(judged[0]) == 59
    assert sorted(torch.cat((fitted[0], judged[0])).tolist()) == list(range(599))


@pytest.mark.parametrize("name", ["topk, rescaled", "jumprelu", "topk, sparse"])
def test_a_wide_dictionary_is_fine_tuned_to_nearly_the_same(name, x, monkeypatch) -> None:
    exact, tuned = made(name, torch.float32), made(name, torch.float32)
    expected = refitted(exact, x, held_out=x)
    monkeypatch.setattr(refit, "WIDEST", M - 1)
    monkeypatch.setattr(refit, "_MINI_BATCH", 16)
    kept = latents_of(tuned, x)
    found = refitted(tuned, x, held_out=x)
    torch.testing.assert_close(latents_of(tuned, x), kept, rtol=1e-4, atol=1e-5)
    gain, most = (one.r2_after - one.r2_before for one in (found, expected))
    assert 0.8 * most < gain
    assert found.kept


def test_a_batchtopk_sae_in_training_is_refitted_with_a_warning(x) -> None:
    with pytest.warns(UserWarning, match="selects over each batch") as seen:
        refit_decoder(made("batchtopk, training"), x, held_out=x)
    assert seen[0].filename == __file__


def test_bad_input_is_named(x) -> None:
    sae = made("standard")
    for ridge in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="ridge: expected a finite number above 0"):
            refit_decoder(sae, x, ridge=ridge)
    with pytest.raises(ValueError, match=r"features: expected at least 20 samples .* got 19"):
        refit_decoder(sae, x[:19])
    with pytest.raises(ValueError, match=r"features: expected \(N, 64\)"):
        refit_decoder(sae, x[:, :5])
    with pytest.raises(TypeError, match="sae: expected an SAE with encode and decode"):
        refit_decoder("sae", x)
    pursuit = MatchingPursuitSAE(MatchingPursuitSAEConfig(d_in=D, d_sae=M))
    transcoder = Transcoder(TranscoderConfig(d_in=D, d_sae=M, d_out=3, apply_b_dec_to_input=False))
    for other, kind in ((pursuit, "matching_pursuit"), (transcoder, "transcoder")):
        with pytest.raises(TypeError, match=f"sae: expected a SAELens SAE of .* got {kind}"):
            refit_decoder(other, x)
    with pytest.raises(TypeError, match="sae: expected a SAELens SAE of"):
        refit_decoder(with_k(sae, 3), x)
    sae.turn_on_forward_pass_hook_z_reshaping()
    with pytest.raises(ValueError, match="turn_off_forward_pass_hook_z_reshaping"):
        refit_decoder(sae, x)

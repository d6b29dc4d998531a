"""Baselines are SAELens's SAEs, whose directions are what their names say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sae_lens import SAE
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge

from monoloss_plugin import load_features, load_pretrained, publish_sae
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureBatches
from monoloss_plugin.hub.record import record_in
from monoloss_plugin.saes import BASELINES, make_baseline
from monoloss_plugin.saes.decoder import RIDGE
from tests.hub.server import OWNER_TOKEN

KINDS = tuple(BASELINES)


@pytest.fixture(scope="module")
def train():
    return load_features("digits", "train")


@pytest.fixture(scope="module")
def held_out():
    return load_features("digits", "held_out")


@pytest.fixture(scope="module")
def unit(train):
    x = train.tensor().double()
    return (x / x.norm(dim=1, keepdim=True)).numpy()


def encoder_rows(sae) -> np.ndarray:
    return sae.W_enc.detach().double().numpy().T


def digits_baseline(kind, train, **options):
    return make_baseline(kind, train, **{"num_latents": 256, "l0": 8, **options})


@pytest.mark.parametrize("selection", ["topk", "threshold"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_baseline_is_saelens_s_sae_and_has_its_l0(
    kind, selection, train, unit, held_out, tmp_path
) -> None:
    sae = digits_baseline(kind, train, selection=selection)
    assert sae.cfg.architecture() == {"topk": "topk", "threshold": "jumprelu"}[selection]
    assert evaluate(sae, torch.from_numpy(unit)).l0 == pytest.approx(8, rel=0.01)
    sae.save_model(str(tmp_path))
    loaded = SAE.load_from_disk(str(tmp_path))
    expected = evaluate(sae, held_out).summary()
    assert evaluate(loaded, held_out).summary() == expected
    assert loaded.cfg.metadata.monoloss == {"inputs": "unit norm", "directions": kind, "seed": 0}
    assert record_in(loaded).inputs == "unit norm"
    assert expected["r2"] > 0.5


@pytest.mark.parametrize("selection", ["topk", "threshold"])
def test_the_decoder_is_ridge_regression_on_the_training_features(selection, train, unit) -> None:
    sae = digits_baseline("data points", train, selection=selection)
    with torch.no_grad():
        a = sae.encode(torch.from_numpy(unit).float()).double().numpy()
    penalty = RIDGE * np.square(a - a.mean(0)).sum(0).mean()
    expected = Ridge(alpha=penalty, solver="svd").fit(a, unit)
    np.testing.assert_allclose(sae.W_dec.detach(), expected.coef_.T, atol=1e-4)
    np.testing.assert_allclose(sae.b_dec.detach(), expected.intercept_, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_subtracts_the_mean(kind, train, unit) -> None:
    sae = digits_baseline(kind, train)
    expected = -encoder_rows(sae) @ unit.mean(0)
    np.testing.assert_allclose(sae.b_enc.detach(), expected, atol=1e-4)


def test_data_points_are_different_samples_minus_the_mean(train, unit) -> None:
    centred = unit - unit.mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    seen = []
    for seed in (0, 1):
        cosines = encoder_rows(digits_baseline("data points", train, seed=seed)) @ centred.T
        np.testing.assert_allclose(cosines.max(1), 1, atol=1e-6)
        seen.append(set(cosines.argmax(1)))
        assert len(seen[-1]) == 256
    assert seen[0] != seen[1]


def test_random_directions_are_unit_vectors_of_a_seed_alone(train, held_out) -> None:
    found = encoder_rows(digits_baseline("random directions", train))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert np.abs(found @ found.T - np.eye(256)).max() < 0.7
    assert np.array_equal(found, encoder_rows(digits_baseline("random directions", held_out)))
    other = encoder_rows(digits_baseline("random directions", train, seed=1))
    assert np.abs(found - other).max() > 0.1


def test_pca_has_each_component_with_both_signs_and_dead_latents_beyond(train, unit) -> None:
    sae = digits_baseline("PCA", train)
    found, components = encoder_rows(sae), PCA().fit(unit).components_
    # Later components of nearly equal variance may turn into each other in float32.
    cosines = (found[0:60:2] * components[:30]).sum(1)
    np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-4)
    np.testing.assert_array_equal(found[1:128:2], -found[0:128:2])
    for beyond in (found[128:], sae.b_enc[128:].detach(), sae.W_dec[128:].detach()):
        assert not beyond.any()
    few = encoder_rows(digits_baseline("PCA", train, num_latents=9))
    np.testing.assert_array_equal(few, found[:9])


def test_ica_finds_sources_that_were_mixed() -> None:
    generator = np.random.default_rng(0)
    sources, mixing = generator.laplace(size=(4000, 6)), generator.normal(size=(6, 6))
    x = torch.from_numpy(sources @ mixing + 3)
    sae = make_baseline("ICA", x, num_latents=15, l0=2, normalize=False)
    encoder = encoder_rows(sae)
    found = x.numpy() @ encoder.T + sae.b_enc.detach().numpy()
    np.testing.assert_array_equal(encoder[1:12:2], -encoder[0:12:2])
    np.testing.assert_allclose(found[:, :12].std(0), 1, atol=1e-3)
    assert not encoder[12:].any()
    correlations = np.abs(np.corrcoef(found[:, 0:12:2].T, sources.T)[:6, 6:])
    assert sorted(correlations.argmax(1)) == list(range(6))
    assert correlations.max(1).min() > 0.99


def test_k_means_has_the_directions_of_centres_from_the_mean(train, unit) -> None:
    found = encoder_rows(digits_baseline("k-means", train, num_latents=20))
    x = unit.astype(np.float32)
    expected = MiniBatchKMeans(20, random_state=0, n_init=1).fit(x).cluster_centers_ - unit.mean(0)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "monoscore", "purity", "r2"),
    [("data points", 0.84, 0.90, 0.93), ("random directions", 0.46, 0.78, 0.93)],
)
def test_baselines_on_the_digits_score_what_was_measured_apart(
    kind, monoscore, purity, r2, train, held_out
) -> None:
    found = evaluate(digits_baseline(kind, train), held_out).summary()
    assert found["monoscore"] == pytest.approx(monoscore, abs=0.02)
    assert found["purity_binary"] == pytest.approx(purity, abs=0.02)
    assert found["r2"] == pytest.approx(r2, abs=0.01)
    trained = evaluate(load_pretrained("digits").sae, held_out).summary()
    assert trained["r2"] > found["r2"]
    assert trained["monoscore"] < found["monoscore"]


@pytest.mark.parametrize("kind", KINDS)
def test_scaled_tensors_and_unscaled_sets_give_the_same_sae(kind, train, held_out) -> None:
    expected = digits_baseline(kind, train, num_latents=30)
    stored = train.tensor().float()
    found = digits_baseline(kind, stored, num_latents=30)
    for name, weight in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name
    scores = evaluate(found, held_out).summary()
    with pytest.warns(UserWarning, match="features: scaled to unit norm"):
        again = evaluate(found, held_out.tensor().float() * 7, held_out.labels).summary()
    assert again == pytest.approx(scores, rel=1e-3)


def test_features_as_they_are_stay_so(train, held_out) -> None:
    sae = digits_baseline("data points", train, normalize=False)
    assert sae.cfg.metadata.monoloss["inputs"] == "as they are"
    stored = train.tensor().float()
    centred = torch.nn.functional.normalize(stored - stored.mean(0), dim=1).double()
    assert (torch.from_numpy(encoder_rows(sae)) @ centred.T).amax(1).min() > 1 - 1e-6
    assert evaluate(sae, held_out).r2 > 0.9


def test_a_baseline_can_be_published(train, held_out, hub, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", OWNER_TOKEN)
    sae = digits_baseline("k-means", train, num_latents=32)
    publish_sae(sae, "alice/baselines", evaluation=evaluate(sae, held_out), features=held_out)
    loaded = load_pretrained("alice/baselines")
    assert loaded.record.inputs == "unit norm"
    assert loaded.record.losses == []
    assert evaluate(loaded.sae, held_out).summary() == evaluate(sae, held_out).summary()


def test_bad_input_is_named(train) -> None:
    with pytest.raises(ValueError, match="kind: expected one of"):
        digits_baseline("NMF", train)
    with pytest.raises(ValueError, match="selection: expected one of"):
        digits_baseline("PCA", train, selection="batchtopk")
    for kind in ("data points", "k-means"):
        with pytest.raises(ValueError, match=r"features: expected at least .* got 1198"):
            digits_baseline(kind, train, num_latents=1199)
    with pytest.raises(TypeError, match=r"l0: expected an integer, got 8\.5"):
        digits_baseline("PCA", train, l0=8.5)
    with pytest.raises(ValueError, match="l0: expected at most num_latents, 256, got 300"):
        digits_baseline("PCA", train, l0=300)
    with pytest.raises(ValueError, match=r"l0: expected at most .* mean number of positive"):
        digits_baseline("PCA", train, l0=200, selection="threshold")
    with pytest.raises(TypeError, match="features: expected a tensor or a FeatureSet"):
        digits_baseline("PCA", FeatureBatches(train, batch_size=100))
    with pytest.raises(ValueError, match="features: contains NaN"):
        digits_baseline("PCA", torch.full((300, 4), float("nan")))

"""The decoder in closed form is scikit-learn's ridge regression."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from monoloss_plugin import load_features, load_pretrained
from monoloss_plugin.saes import ridge_decoder


@pytest.fixture(scope="module")
def real():
    """Latents of a trained SAE, 98 of them dead on these samples, and its features."""
    x = torch.nn.functional.normalize(load_features("digits", "held_out").tensor().float(), dim=1)
    with torch.no_grad():
        return load_pretrained("digits").sae.encode(x), x


def random_latents(rows: int, width: int, share: float) -> torch.Tensor:
    values = torch.rand(rows, width)
    return values * (torch.rand(rows, width) < share)


def with_sklearn(latents, targets, ridge: float):
    a = latents.double().numpy()
    penalty = ridge * np.square(a - a.mean(0)).sum(0).mean()
    return Ridge(alpha=penalty, solver="svd").fit(a, targets.double().numpy())


@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("batch_size", [50, 599])
def test_it_is_scikit_learn_s_ridge_on_real_latents(real, ridge, batch_size) -> None:
    latents, x = real
    pairs = zip(latents.split(batch_size), x.split(batch_size), strict=True)
    found = ridge_decoder(pairs, ridge=ridge)
    expected = with_sklearn(latents, x, ridge)
    np.testing.assert_allclose(found.W_dec, expected.coef_.T, atol=1e-9)
    np.testing.assert_allclose(found.b_dec, expected.intercept_, atol=1e-9)


@pytest.mark.parametrize("share", [0.02, 0.5])
@pytest.mark.parametrize("mkl", [True, False])
def test_sparse_and_dense_latents_give_the_same(share, mkl, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    latents, x = random_latents(300, 150, share), torch.randn(300, 5)
    expected = with_sklearn(latents, x, 1e-2)
    for given in (latents, latents.to_sparse()):
        np.testing.assert_allclose(ridge_decoder([(given, x)]).W_dec, expected.coef_.T, atol=1e-9)


def test_a_latent_that_never_fires_gets_a_row_of_zeros(real) -> None:
    latents, x = real
    dead = latents.sum(0) == 0
    found = ridge_decoder([(latents, x)])
    assert 50 < int(dead.sum()) < 200
    assert torch.equal((found.W_dec == 0).all(1), dead)
    none = ridge_decoder([(torch.zeros(8, 3), x[:8])])
    assert not none.W_dec.any()
    torch.testing.assert_close(none.b_dec, x[:8].double().mean(0))


def test_a_large_offset_of_the_targets_goes_into_the_intercept() -> None:
    latents, x = random_latents(200, 10, 0.5), torch.randn(200, 5).double()
    near, far = (ridge_decoder([(latents, x + offset)]) for offset in (0, 2.0**30))
    torch.testing.assert_close(far.W_dec, near.W_dec, atol=1e-6, rtol=0)
    torch.testing.assert_close(far.b_dec - 2.0**30, near.b_dec, atol=1e-6, rtol=0)


def test_bad_input_is_named() -> None:
    a, x = torch.rand(4, 3), torch.rand(4, 2)
    for ridge in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="ridge: expected a finite number above 0"):
            ridge_decoder([(a, x)], ridge=ridge)
    with pytest.raises(TypeError, match="ridge: expected a number"):
        ridge_decoder([(a, x)], ridge="a little")  # type: ignore[arg-type]
    for none in ([], [(a[:0], x[:0])]):
        with pytest.raises(ValueError, match="batches: expected at least one sample"):
            ridge_decoder(none)
    with pytest.raises(ValueError, match=r"batches: expected widths \(3, 2\)"):
        ridge_decoder([(a, x), (a[:, :2], x)])
    with pytest.raises(ValueError, match="targets: contains NaN"):
        ridge_decoder([(a, x / 0 * 0)])
    twins = torch.tensor([[0.0, 0.0], [0.0, 0.0], [2.0, 2.0], [2.0, 2.0]])
    with pytest.raises(ValueError, match="ridge: 1e-300 is too small"):
        ridge_decoder([(twins, x)], ridge=1e-300)

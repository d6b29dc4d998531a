"""The sparse way to a batch's scores against the definition, autograd and the dense way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from monoloss_plugin import _checks, functional
from monoloss_plugin.kernels import gradient, support
from monoloss_plugin.kernels.batch import batch_scores
from monoloss_plugin.sums import UnitEmbeddings
from tests import oracle

CASES = oracle.activation_cases()


def coo_of(latents: Tensor) -> Tensor:
    """Latents as COO with their entries out of order, as SAELens's TopK makes them."""
    indices = latents.detach().nonzero().T.flip(1)
    return torch.sparse_coo_tensor(
        indices, latents[tuple(indices)], latents.shape, check_invariants=True
    )


def gradient_by_autograd(latents: Tensor, embeddings: Tensor) -> Tensor:
    """Gradient of the summed scores by autograd through the pairwise definition, in float64."""
    a = latents.double().requires_grad_()
    scores = functional.monoscore_pairwise(a, embeddings, undefined=math.nan)
    (gradient,) = torch.autograd.grad(scores.nan_to_num().sum(), a)
    return gradient.nan_to_num()


@pytest.mark.parametrize("case", CASES)
def test_the_active_entries_have_the_gradient_of_the_definition(
    case: str, embeddings: Tensor, way: str
) -> None:
    a = CASES[case].clone().requires_grad_()
    batch = batch_scores(a, embeddings, "active")
    (gradient,) = torch.autograd.grad(batch.scores.sum(), a)
    expected = gradient_by_autograd(CASES[case], embeddings)
    scale = expected.abs().amax(0).clamp(min=1e-300)
    active = CASES[case] != 0
    torch.testing.assert_close(
        (gradient.double() / scale)[active], (expected / scale)[active], atol=1e-5, rtol=0.0
    )
    scores = oracle.monoscore_by_loops(CASES[case], embeddings)
    np.testing.assert_allclose(batch.scores.detach(), np.nan_to_num(scores), atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_listed_zeros_have_the_gradient_of_the_definition_too(
    case: str, embeddings: Tensor, way: str
) -> None:
    a = CASES[case].clone().requires_grad_()
    band = torch.rand(a.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    (gradient,) = torch.autograd.grad(batch_scores(a, embeddings, band).scores.sum(), a)
    expected = gradient_by_autograd(CASES[case], embeddings)
    scale = expected.abs().amax(0).clamp(min=1e-300)
    needed = (CASES[case] != 0) | band
    assert (CASES[case][band] == 0).any() or case in (
        "dense",
        "signed",
        "shifted",
        "constant latents",
    )
    torch.testing.assert_close(
        (gradient.double() / scale)[needed], (expected / scale)[needed], atol=1e-5, rtol=0.0
    )


def test_only_the_needed_entries_get_a_gradient(embeddings: Tensor, way: str) -> None:
    a = CASES["sparse"].clone().requires_grad_()
    (everywhere,) = torch.autograd.grad(functional.monoloss(a, embeddings), a, retain_graph=True)
    (active,) = torch.autograd.grad(functional.monoloss(a, embeddings, gradient_at="active"), a)
    zeros = CASES["sparse"] == 0
    assert (everywhere[zeros] != 0).any()
    torch.testing.assert_close(active[~zeros], everywhere[~zeros])
    assert (active[zeros] == 0).all()
    band = torch.rand(a.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    (banded,) = torch.autograd.grad(functional.monoloss(a, embeddings, gradient_at=band), a)
    torch.testing.assert_close(banded, everywhere.masked_fill(zeros & ~band, 0.0))


def test_stored_zeros_of_coo_latents_follow_gradient_at(embeddings: Tensor) -> None:
    a = CASES["sparse"]
    every = torch.ones_like(a).nonzero().T
    zeros, band = a == 0, torch.arange(a.numel()).reshape(a.shape) % 3 == 0
    found = {}
    for name, gradient_at in (("all", "all"), ("active", "active"), ("band", band)):
        values = a.flatten().clone().requires_grad_()
        coo = torch.sparse_coo_tensor(every, values, a.shape, check_invariants=True)
        functional.monoloss(coo, embeddings, gradient_at=gradient_at).backward()
        found[name] = values.grad.view_as(a)
    assert (found["all"][zeros] != 0).any()
    torch.testing.assert_close(found["active"], found["all"].masked_fill(zeros, 0.0))
    torch.testing.assert_close(found["band"], found["all"].masked_fill(zeros & ~band, 0.0))


def outside_the_strongest(latents: Tensor) -> Tensor:
    """Each latent's activation above its minimum, without that of its strongest sample (M,)."""
    above = latents.double() - latents.double().amin(0)
    return above.sum(0) - above.amax(0)


def test_a_latent_that_is_hardly_defined_pulls_ten_times_as_hard_as_the_median_at_most(
    embeddings: Tensor, way: str
) -> None:
    a = CASES["sparse"].clone()
    for latent, faint in enumerate((1e-1, 1e-2, 1e-4)):  # one strong sample, and two faint ones
        a[:, latent] = 0
        a[:3, latent] = torch.tensor([1.0, faint, 0.7 * faint])
    a.requires_grad_()
    batch = batch_scores(a, embeddings, "active")
    (gradient,) = torch.autograd.grad(batch.scores.sum(), a)
    unbounded = gradient_by_autograd(a.detach(), embeddings).masked_fill(a.detach() == 0, 0.0)
    outside = outside_the_strongest(a.detach())
    share = (outside / (outside.median() / 10)).clamp(max=1)
    assert (share[1:3] < 1).all()
    assert share[3:].min() == 1
    # The direction is the definition's, the length is bounded, and scores stay what they are.
    torch.testing.assert_close(gradient.double(), unbounded * share, rtol=2e-3, atol=1e-6)
    assert unbounded.abs().amax(0)[2] > 500
    assert gradient.abs().max() <= 4 / (outside.median() / 10)
    scores = oracle.monoscore_by_loops(a, embeddings)
    np.testing.assert_allclose(batch.scores.detach(), scores, atol=5e-3)


@pytest.mark.parametrize("case", CASES)
def test_coo_latents_give_the_loss_and_gradient_of_dense_ones_and_stay_sparse(
    case: str, embeddings: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = CASES[case].clone().requires_grad_()
    expected = functional.monoloss(dense, embeddings)
    expected.backward()

    def refuse(self: Tensor, *_: object) -> Tensor:
        raise AssertionError("made dense")

    source = CASES[case].clone().requires_grad_()
    coo = coo_of(source)
    monkeypatch.setattr(Tensor, "to_dense", refuse)
    loss = functional.monoloss(coo, embeddings)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert source.grad is not None
    assert dense.grad is not None
    on = CASES[case] != 0
    scale = dense.grad.abs().amax(0).clamp(min=1e-36)
    torch.testing.assert_close(
        (source.grad / scale)[on], (dense.grad / scale)[on], atol=1e-5, rtol=0.0
    )


def test_coo_latents_with_duplicate_and_zero_entries(embeddings: Tensor) -> None:
    a = CASES["sparse"]
    once = coo_of(a)
    twice = torch.sparse_coo_tensor(
        once._indices().repeat(1, 2),
        torch.cat((0.25 * once._values(), 0.75 * once._values())),
        a.shape,
        check_invariants=True,
    )
    zeros = (a[:, :4] == 0).nonzero().T
    padded = torch.sparse_coo_tensor(
        torch.cat((once._indices(), zeros), dim=1),
        torch.cat((once._values(), torch.zeros(zeros.shape[1]))),
        a.shape,
        check_invariants=True,
    )
    for given in (twice, padded):
        torch.testing.assert_close(
            functional.monoloss(given, embeddings), functional.monoloss(a, embeddings)
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gradients_come_in_the_latents_dtype(
    dtype: torch.dtype, embeddings: Tensor, way: str
) -> None:
    a = CASES["sparse"].to(dtype).requires_grad_()
    functional.monoloss(a, embeddings, gradient_at="active").backward()
    assert a.grad is not None
    assert a.grad.dtype == dtype
    exact = CASES["sparse"].to(dtype).double().requires_grad_()
    functional.monoloss(exact, embeddings, gradient_at="active").backward()
    on = CASES["sparse"] > 0
    rounding = 4 * torch.finfo(dtype).eps if dtype.itemsize < 4 else 1e-12
    torch.testing.assert_close(
        a.grad[on].double(), exact.grad[on], rtol=rounding, atol=rounding * 1e-2
    )


def test_gradcheck_of_the_sparse_way_in_float64() -> None:
    generator = torch.Generator().manual_seed(3)
    a = torch.rand(9, 5, dtype=torch.float64, generator=generator)
    on = torch.rand(9, 5, generator=generator) < 0.6
    e = torch.randn(9, 4, dtype=torch.float64, generator=generator)
    rows, columns = on.nonzero(as_tuple=True)
    weights = torch.randn(5, dtype=torch.float64, generator=generator)

    def of_values(values: Tensor) -> Tensor:
        latents = torch.zeros(9, 5, dtype=torch.float64).index_put((rows, columns), values)
        return (batch_scores(latents.to_sparse(), e).scores * weights).sum()

    assert torch.autograd.gradcheck(of_values, a[on].requires_grad_())


def test_sparse_latents_are_told_from_dense_ones() -> None:
    generator = torch.Generator().manual_seed(4)
    few = (torch.rand(500, 300, generator=generator) - 0.99).relu()
    many = (torch.rand(500, 300, generator=generator) - 0.5).relu()
    assert support.is_sparse(few)
    assert not support.is_sparse(many)
    assert support.is_sparse(many.to_sparse())
    assert not support.is_sparse(few, also=many > 0)  # a wide band is dense work
    for period in (2, 7, 8, 32):
        periodic = many.clone()
        periodic[::period] = 0
        assert not support.is_sparse(periodic)


@pytest.mark.parametrize("sparse_way", [False, True])
def test_large_batches_that_are_all_alike_cost_little_accuracy(sparse_way, monkeypatch) -> None:
    monkeypatch.setattr(support, "SPARSE_BELOW", 1.0 if sparse_way else -1.0)
    a = (torch.rand(16_384, 4, generator=torch.Generator().manual_seed(8)) < 0.9).float()
    assert functional.monoloss(a, torch.full((16_384, 8), 0.1)).item() == pytest.approx(0, abs=1e-5)


def test_a_nan_shows_in_the_loss(embeddings: Tensor, way: str) -> None:
    a = CASES["sparse"].clone()
    a[3, 2] = math.nan
    assert functional.monoloss(a, embeddings, gradient_at="active").isnan()


def test_a_second_derivative_is_refused(embeddings: Tensor, way: str) -> None:
    a = CASES["sparse"].clone().requires_grad_()
    for latents in (a, coo_of(a)):
        loss = functional.monoloss(latents, embeddings, gradient_at="active")
        (gradient,) = torch.autograd.grad(loss, a, create_graph=True)
        with pytest.raises(RuntimeError, match=r"once_differentiable|not require grad"):
            gradient.sum().backward()


def test_training_through_a_relu_needs_the_active_gradient_alone(
    embeddings: Tensor, way: str
) -> None:
    encoder = torch.randn(7, 30, generator=torch.Generator().manual_seed(5)).requires_grad_()
    gradients = []
    for gradient_at in ("all", "active"):
        latents = (embeddings @ encoder - 2).relu()
        loss = functional.monoloss(latents, embeddings, gradient_at=gradient_at)
        gradients.extend(torch.autograd.grad(loss, encoder))
    torch.testing.assert_close(*gradients)


def test_the_sparse_way_does_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no values: whatever reads one raises."""
    for module in (_checks, support):
        monkeypatch.setattr(module, "looks_are_free", lambda _: False)
    # Fake tensors know no CSR; the product that it stands for reads no value.
    monkeypatch.setattr(
        gradient, "products_at", lambda rows, _, w, h: (h[rows] * w[: len(rows)]).sum(1)
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        values = torch.rand(50, requires_grad=True)
        entries = torch.zeros(50, dtype=torch.int64)
        offsets = torch.zeros(101, dtype=torch.int64)
        latents = support.Support(entries, entries, offsets, values, num_rows=64)
        unit = UnitEmbeddings.of(torch.rand(64, 16), torch.float32)
        batch = gradient.with_sparse_gradient(latents, *gradient.terms_of(latents, unit))
        batch.scores.sum().backward()
    assert values.grad is not None
    assert values.grad.shape == (50,)

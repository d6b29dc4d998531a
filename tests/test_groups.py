"""Pairs within a group are left out: every form against the definition that skips them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from monoloss_plugin import MonoLoss, MonoScore, functional
from monoloss_plugin.kernels import support
from monoloss_plugin.kernels.batch import batch_scores
from monoloss_plugin.kernels.support import support_of
from monoloss_plugin.losses import StepTensors
from tests import oracle
from tests.oracle import embeddings_with_a_zero
from tests.test_kernels import coo_of

CASES = oracle.activation_cases()
GROUPS = torch.arange(40) * 7 % 11 - 5
"""Eleven groups of three or four samples, in no order."""


@pytest.mark.parametrize("case", CASES)
def test_pairwise_and_linear_scores_skip_pairs_within_a_group(case: str, way: str) -> None:
    a, e = CASES[case], embeddings_with_a_zero()
    expected = oracle.monoscore_by_loops(a, e, GROUPS)
    pairwise = functional.monoscore_pairwise(a, e, undefined=math.nan, groups=GROUPS)
    linear = functional.monoscore(a, e, undefined=math.nan, groups=GROUPS)
    np.testing.assert_allclose(pairwise.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(linear.numpy(), expected, atol=1e-6)
    assert not np.allclose(expected, oracle.monoscore_by_loops(a, e), equal_nan=True) or (
        case == "one sample each"
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["dense", "coo", "support"])
@pytest.mark.parametrize("at_once", [1, 4, 11])
def test_batches_of_whole_groups_give_the_same_scores(
    case: str, form: str, at_once: int, embeddings: Tensor, way: str
) -> None:
    a, parts = CASES[case], [MonoScore(), MonoScore()]
    for number, groups in enumerate(GROUPS.unique().split(at_once)):
        rows = torch.isin(GROUPS, groups).nonzero().squeeze(1)
        latents = {"dense": lambda x: x, "coo": coo_of, "support": support_of}[form](a[rows])
        parts[number % 2].update(latents, embeddings[rows], GROUPS[rows])
    parts[0].merge(parts[1])
    expected = oracle.monoscore_by_loops(a, embeddings, GROUPS)
    result = parts[0].compute()
    np.testing.assert_allclose(result.scores, np.nan_to_num(expected), atol=1e-6)
    np.testing.assert_array_equal(result.defined, ~np.isnan(expected))
    assert result.num_samples == 40


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("form", "gradient_at"),
    [("dense", "all"), ("dense", "active"), ("dense", "band"), ("coo", "all"), ("coo", "active")],
)
def test_the_gradient_is_that_of_the_definition(
    case: str, form: str, gradient_at: str, embeddings: Tensor, way: str
) -> None:
    a = CASES[case].clone().requires_grad_()
    band = torch.rand(a.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    needed = {"all": torch.ones_like(band), "active": a != 0, "band": (a != 0) | band}[gradient_at]
    if form == "coo":  # which stores these alone
        needed = a != 0
    given = {"band": band}.get(gradient_at, gradient_at)
    latents = a if form == "dense" else a.to_sparse()
    batch = batch_scores(latents, embeddings, given, GROUPS)
    (gradient,) = torch.autograd.grad(batch.scores.sum(), a)
    expected = gradient_by_autograd(CASES[case], embeddings)
    scale = expected.abs().amax(0).clamp(min=1e-300)
    torch.testing.assert_close(
        (gradient.double() / scale)[needed], (expected / scale)[needed], atol=2e-5, rtol=0.0
    )
    assert (gradient[~needed] == 0).all()
    scores = oracle.monoscore_by_loops(CASES[case], embeddings, GROUPS)
    np.testing.assert_allclose(batch.scores.detach(), np.nan_to_num(scores), atol=1e-5)


def gradient_by_autograd(latents: Tensor, embeddings: Tensor) -> Tensor:
    a = latents.double().requires_grad_()
    scores = functional.monoscore_pairwise(a, embeddings, undefined=math.nan, groups=GROUPS)
    (gradient,) = torch.autograd.grad(scores.nan_to_num().sum(), a)
    return gradient.nan_to_num()


def test_samples_that_are_groups_of_their_own_give_the_usual_score(embeddings: Tensor) -> None:
    a, alone = CASES["signed"], torch.arange(40)
    with_groups = MonoScore()
    with_groups.update(a, embeddings, alone)
    plain = MonoScore()
    plain.update(a, embeddings)
    torch.testing.assert_close(
        with_groups.compute().tensors(), plain.compute().tensors(), rtol=1e-5, atol=1e-6
    )


def test_groups_that_share_an_embedding_score_as_their_sums(way: str) -> None:
    """Patches that are compared by their image: what counts is the image's total activation."""
    a, e = CASES["sparse"], embeddings_with_a_zero()
    _, image = GROUPS.unique(return_inverse=True)
    of_images = e[:11]
    pooled = torch.zeros(11, 12).index_add_(0, image, a)
    torch.testing.assert_close(
        functional.monoscore(a, of_images[image], groups=image),
        functional.monoscore(pooled, of_images),
    )


@pytest.mark.parametrize("rest", [1e-1, 1e-3, 1e-5])
def test_one_group_with_nearly_all_of_the_activation_costs_no_accuracy(rest: float) -> None:
    generator = torch.Generator().manual_seed(1)
    e = torch.randn(90, 16, generator=generator)
    a = torch.rand(90, 4, generator=generator) * (torch.arange(4) * 20 > torch.arange(90)[:, None])
    a[80:] = rest * torch.rand(10, 4, generator=generator)
    groups = torch.where(torch.arange(90) < 80, 0, torch.arange(90))
    expected = oracle.monoscore_by_loops(a, e, groups)
    np.testing.assert_allclose(functional.monoscore(a, e, groups=groups), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_latent_that_is_active_in_one_group_has_no_score(dtype: torch.dtype, way: str) -> None:
    a = torch.zeros(200, 30, dtype=dtype)
    a[:150] = torch.rand(150, 30, generator=torch.Generator().manual_seed(3), dtype=dtype)
    groups = torch.where(torch.arange(200) < 150, 0, torch.arange(200))
    e = torch.randn(200, 5, dtype=dtype)
    metric = MonoScore()
    metric.update(a, e, groups)
    assert metric.compute().num_defined == 0
    assert not batch_scores(a, e, "all", groups).defined.any()
    assert functional.monoloss(a, e, groups=groups).item() == 1


def test_chance_is_the_mean_over_shuffles_of_groups_and_within_them() -> None:
    generator = torch.Generator().manual_seed(5)
    groups = torch.arange(48) // 4
    e = torch.randn(12, 6, generator=generator)[groups] + torch.randn(48, 6, generator=generator)
    a = (torch.randn(12, 3, generator=generator)[groups] + torch.rand(48, 3)).relu()
    metric = MonoScore()
    metric.update(a, e, groups)
    blocks, scores = a.view(12, 4, 3), []
    for _ in range(4000):
        shuffled = blocks[torch.randperm(12, generator=generator)]
        order = torch.rand(12, 4, generator=generator).argsort(1)
        shuffled = shuffled.gather(1, order.unsqueeze(2).expand(-1, -1, 3)).flatten(0, 1)
        scores.append(functional.monoscore_pairwise(shuffled, e, groups=groups))
    found, mean = metric.compute(), torch.stack(scores).mean(0)
    np.testing.assert_allclose(mean, [found.chance] * 3, atol=5e-3)
    assert found.p_values.isnan().all()
    assert (found.z_scores == 0).all()


def test_an_image_s_active_patches_are_compared_by_their_mean(way: str) -> None:
    a, e = CASES["sparse"], embeddings_with_a_zero()
    _, image = GROUPS.unique(return_inverse=True)
    expected = []
    for k in range(12):
        active = [i for i in range(11) if (a[image == i, k] > 0).any()]
        means = [e[(image == i) & (a[:, k] > 0)].mean(0) for i in active]
        totals = torch.stack([a[image == i, k].sum() for i in active])
        # The images that it does not activate have activation 0, so their embeddings do not count.
        totals, means = torch.cat((totals, totals.new_zeros(1))), torch.stack([*means, means[0]])
        expected.append(functional.monoscore_pairwise(totals.unsqueeze(1), means)[0])
    term = MonoLoss(lam=1, patches="active")
    x = a.clone().requires_grad_()
    value, metrics = term.compute_loss(StepTensors(x, e.flip(0), images=GROUPS, features=e))
    assert metrics["monoscore"].item() == pytest.approx(float(sum(expected)) / 12, abs=1e-6)
    torch.testing.assert_close(term(a, e, images=GROUPS), value.detach())
    (gradient,) = torch.autograd.grad(value, x)
    assert (gradient[a == 0] == 0).all()
    numeric, step = torch.zeros(5), 1e-2
    places = (a > 0.5).nonzero()[:5]
    for number, (i, k) in enumerate(places):
        more, less = a.double().clone(), a.double().clone()
        more[i, k] += step
        less[i, k] -= step
        difference = term(more, e.double(), images=GROUPS) - term(less, e.double(), images=GROUPS)
        numeric[number] = difference / (2 * step)
    torch.testing.assert_close(gradient[places[:, 0], places[:, 1]], numeric, rtol=1e-2, atol=1e-4)


def test_a_latent_that_alone_is_active_has_its_images_compared(embeddings: Tensor) -> None:
    a = torch.zeros(40, 3)
    a[:, 1] = 1 + torch.arange(40) % 2
    loss = MonoLoss(lam=1, patches="active")(a, embeddings, images=torch.arange(40))
    active = functional.monoscore(
        torch.cat((a, a[:1] * 0)), torch.cat((embeddings, embeddings[:1]))
    )
    assert loss.item() == pytest.approx(1 - active[1].item(), abs=1e-6)


def test_monoloss_chooses_what_patches_are_compared_by(embeddings: Tensor) -> None:
    a, own, of_images = CASES["sparse"], embeddings, embeddings.roll(1, 0)
    step = StepTensors(a, of_images, images=GROUPS, features=own)
    for term, expected in (
        (MonoLoss(1), functional.monoloss(a, of_images, groups=GROUPS)),
        (MonoLoss(1, patches="own"), functional.monoloss(a, own, groups=GROUPS)),
        (MonoLoss(1, within_images=True), functional.monoloss(a, of_images)),
        (MonoLoss(1, patches="own", within_images=True), functional.monoloss(a, own)),
    ):
        torch.testing.assert_close(term.compute_loss(step).value, expected)
    with pytest.raises(ValueError, match=r"patches: 'own' is for .* embeddings=batches.samples_of"):
        MonoLoss(1, patches="own").compute_loss(StepTensors(a, own))
    with pytest.raises(ValueError, match=r"patches: expected one of \['image', 'own', 'active'\]"):
        MonoLoss(1, patches="whole")
    with pytest.raises(ValueError, match="within_images: with patches='active'"):
        MonoLoss(1, patches="active", within_images=True)


def test_a_training_step_does_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # Fake tensors have shapes and no values. Have them taken for an accelerator's.
    monkeypatch.setattr(support, "looks_are_free", lambda _: False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        a = torch.rand(40, 1000, requires_grad=True)
        functional.monoloss(a, torch.rand(40, 7), gradient_at="active", groups=GROUPS).backward()
    assert a.grad is not None


@pytest.mark.parametrize("wrong", [torch.arange(39), torch.arange(41)])
def test_groups_of_another_number_are_refused(wrong: Tensor, embeddings: Tensor) -> None:
    for function in (functional.monoscore, functional.monoscore_pairwise, functional.monoloss):
        with pytest.raises(ValueError, match="groups: expected 40, one for each"):
            function(CASES["sparse"], embeddings, groups=wrong)
    metric = MonoScore()
    metric.update(CASES["sparse"], embeddings)
    before = metric.compute()
    with pytest.raises(ValueError, match="groups"):
        metric.update(CASES["sparse"], embeddings, wrong)
    torch.testing.assert_close(metric.compute().tensors(), before.tensors(), equal_nan=True)
    with pytest.raises(TypeError, match="groups: expected integers"):
        functional.monoloss(CASES["sparse"], embeddings, groups=wrong.float())

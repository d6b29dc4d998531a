"""The formulas against the definitions written as loops, and their gradients against autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from monoloss_plugin import functional
from monoloss_plugin.kernels import support
from monoloss_plugin.kernels.batch import batch_scores
from tests import oracle
from tests.oracle import embeddings_with_a_zero

CASES = oracle.activation_cases()


@pytest.mark.parametrize("case", CASES)
def test_pairwise_and_linear_scores_equal_the_definition(case: str, way: str) -> None:
    a, e = CASES[case], embeddings_with_a_zero()
    expected = oracle.monoscore_by_loops(a, e)
    pairwise = functional.monoscore_pairwise(a, e, undefined=math.nan)
    linear = functional.monoscore(a, e, undefined=math.nan)
    np.testing.assert_allclose(pairwise.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(linear.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_batch_loss_equals_one_minus_the_mean_defined_score(case: str, way: str) -> None:
    a, e = CASES[case], embeddings_with_a_zero()
    scores = oracle.monoscore_by_loops(a, e)
    expected = 1.0 if np.isnan(scores).all() else 1 - np.nanmean(scores)
    assert functional.monoloss(a, e).item() == pytest.approx(expected, abs=1e-6)
    defined = batch_scores(a, e).defined
    np.testing.assert_array_equal(defined.numpy(), ~np.isnan(scores))


@pytest.mark.parametrize("case", CASES)
def test_closed_form_gradient_equals_autograd_through_the_pairwise_form(
    case: str, way: str
) -> None:
    e = embeddings_with_a_zero()
    a = CASES[case].clone().requires_grad_()
    (closed_form,) = torch.autograd.grad(functional.monoloss(a, e), a)
    # Weigh the latents as the loss does: by one over the number of the defined ones.
    a64 = CASES[case].double().requires_grad_()
    scores = functional.monoscore_pairwise(a64, e, undefined=math.nan)
    (by_autograd,) = torch.autograd.grad(-scores.nan_to_num().sum(), a64)
    by_autograd = by_autograd.nan_to_num() / (~scores.isnan()).sum().clamp(min=1)
    # float32 sums: errors are relative to the largest entry of a latent's gradient.
    scale = by_autograd.abs().amax(0).clamp(min=1e-300)
    torch.testing.assert_close(
        closed_form.double() / scale, by_autograd / scale, atol=1e-5, rtol=0.0
    )


def test_gradient_passes_gradcheck_in_float64_where_no_activations_tie() -> None:
    generator = torch.Generator().manual_seed(2)
    a = torch.rand(9, 5, dtype=torch.float64, generator=generator).requires_grad_()
    e = torch.randn(9, 4, dtype=torch.float64, generator=generator)
    weights = torch.randn(5, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(lambda x: (batch_scores(x, e).scores * weights).sum(), a)


def test_blocks_of_columns_do_not_change_the_result() -> None:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(32, 2500, generator=generator).relu().requires_grad_()  # ten blocks, one short
    e = torch.randn(32, 8, generator=generator)
    batch = batch_scores(a, e)
    (together,) = torch.autograd.grad(batch.scores.sum(), a)
    for start in range(0, 2500, 100):
        part = a.detach()[:, start : start + 100].requires_grad_()
        alone = batch_scores(part, e)
        (gradient,) = torch.autograd.grad(alone.scores.sum(), part)
        torch.testing.assert_close(alone.scores, batch.scores[start : start + 100])
        torch.testing.assert_close(gradient, together[:, start : start + 100])


@pytest.mark.parametrize(
    ("latents", "embeddings"),
    [
        (torch.zeros(6, 4), torch.randn(6, 3)),
        (torch.full((6, 4), 2.0), torch.randn(6, 3)),
        (torch.rand(1, 4), torch.randn(1, 3)),
        (torch.eye(4), torch.randn(4, 3)),
        (torch.rand(0, 4), torch.randn(0, 3)),
        (torch.rand(5, 0), torch.randn(5, 3)),
    ],
    ids=[
        "no latent active",
        "constant latents",
        "a batch of one",
        "one sample a latent",
        "no samples",
        "no latents",
    ],
)
def test_loss_of_a_batch_without_a_defined_latent_is_one_with_zero_gradient(
    latents: Tensor, embeddings: Tensor, way: str
) -> None:
    a = latents.requires_grad_()
    loss = functional.monoloss(a, embeddings)
    loss.backward()
    assert loss.item() == 1.0
    assert a.grad is not None
    assert (a.grad == 0).all()


def test_zero_embeddings_alone_give_score_zero_and_no_nan_gradient(way: str) -> None:
    a = torch.rand(8, 3).requires_grad_()
    loss = functional.monoloss(a, torch.zeros(8, 5))
    loss.backward()
    assert loss.item() == pytest.approx(1.0, abs=1e-6)
    assert a.grad is not None
    assert a.grad.isfinite().all()


def test_scores_do_not_depend_on_the_scale_of_activations_or_embeddings() -> None:
    a, e = CASES["sparse"], embeddings_with_a_zero()
    per_latent = torch.logspace(-6, 6, a.shape[1])
    torch.testing.assert_close(
        functional.monoscore(a * per_latent, e * 1e-25), functional.monoscore(a, e)
    )


def test_embeddings_beyond_float32_s_range(way: str) -> None:
    a, e = CASES["sparse"], embeddings_with_a_zero().double()
    for scale in (1e200, 1e-200):
        torch.testing.assert_close(functional.monoloss(a, e * scale), functional.monoloss(a, e))
        torch.testing.assert_close(functional.monoscore(a, e * scale), functional.monoscore(a, e))


def test_leading_dimensions_are_flattened() -> None:
    a, e = CASES["sparse"], embeddings_with_a_zero()
    folded_a, folded_e = a.reshape(5, 8, -1), e.reshape(5, 8, -1)
    torch.testing.assert_close(functional.monoscore(folded_a, folded_e), functional.monoscore(a, e))
    torch.testing.assert_close(functional.monoloss(folded_a, folded_e), functional.monoloss(a, e))
    for sparse_dims in (1, 2, 3):
        sparse = folded_a.to_sparse(sparse_dims)
        torch.testing.assert_close(functional.monoloss(sparse, folded_e), functional.monoloss(a, e))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_stay_in_float32_under_autocast(dtype: torch.dtype, way: str) -> None:
    generator = torch.Generator().manual_seed(4)
    a = torch.rand(4096, 8, generator=generator).to(dtype).requires_grad_()
    e = torch.randn(4096, 16, generator=generator) + 0.3
    exact = 1 - functional.monoscore(a.float(), e).mean()
    with torch.autocast("cpu", dtype=dtype):
        loss = functional.monoloss(a, e, gradient_at="active")
        loss.backward()
    assert loss.dtype == torch.float32
    assert a.grad is not None
    assert a.grad.dtype == dtype
    assert loss.item() == pytest.approx(exact.item(), abs=1e-6)


@pytest.mark.slow
def test_compiled_loss_and_gradient_equal_eager_ones() -> None:
    a, e = CASES["sparse"], embeddings_with_a_zero()
    eager, compiled = a.clone().requires_grad_(), a.clone().requires_grad_()
    functional.monoloss(eager, e).backward()
    loss = torch.compile(functional.monoloss, fullgraph=True)(compiled, e)
    loss.backward()
    torch.testing.assert_close(loss, functional.monoloss(a, e))
    torch.testing.assert_close(compiled.grad, eager.grad)


def test_no_gradient_flows_into_the_embeddings() -> None:
    a, e = CASES["sparse"].clone().requires_grad_(), embeddings_with_a_zero().requires_grad_()
    functional.monoloss(a, e).backward()
    assert e.grad is None


def test_evaluation_refuses_nan_and_training_shows_it_in_the_loss() -> None:
    a, e = CASES["dense"].clone(), embeddings_with_a_zero()
    a[3, 4] = math.nan
    with pytest.raises(ValueError, match="latents: contains NaN or infinite"):
        functional.monoscore(a, e)
    assert functional.monoloss(a, e).isnan()
    e[2, 2] = math.inf
    with pytest.raises(ValueError, match="embeddings: contains NaN or infinite"):
        functional.monoscore(CASES["dense"], e)


def test_gradient_at_names_what_is_wrong() -> None:
    a, e = torch.rand(4, 3), torch.rand(4, 2)
    with pytest.raises(ValueError, match=r"gradient_at: expected one of \['all', 'active'\]"):
        functional.monoloss(a, e, gradient_at="some")  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"gradient_at: expected a dense bool tensor, got torch\.float32"
    ):
        functional.monoloss(a, e, gradient_at=a)
    with pytest.raises(TypeError, match=r"gradient_at: expected a dense bool tensor"):
        functional.monoloss(a, e, gradient_at=(a > 0.5).to_sparse())
    with pytest.raises(ValueError, match=r"gradient_at: expected shape \(4, 3\) to match latents"):
        functional.monoloss(a, e, gradient_at=torch.ones(3, 4, dtype=torch.bool))


@pytest.mark.parametrize("function", [functional.monoscore, functional.monoloss])
def test_numpy_arrays_and_lists_work_as_tensors_do(function) -> None:
    a, e = CASES["sparse"], embeddings_with_a_zero()
    torch.testing.assert_close(function(a.numpy(), e.numpy()), function(a, e))
    frozen = a.numpy().copy()
    frozen.flags.writeable = False
    torch.testing.assert_close(function(frozen, e.tolist()), function(a, e))


@pytest.mark.parametrize("function", [functional.monoscore, functional.monoloss])
def test_bad_shapes_and_dtypes_are_named(function) -> None:
    a, e = CASES["dense"], embeddings_with_a_zero()
    with pytest.raises(ValueError, match=r"embeddings: expected \(40, d\).*got \(39, 7\)"):
        function(a, e[:-1])
    with pytest.raises(TypeError, match=r"latents: expected a floating-point.*int64"):
        function(a.long(), e)
    with pytest.raises(ValueError, match=r"latents: expected at least 2 dimensions"):
        function(a[0], e[0])
    with pytest.raises(TypeError, match=r"embeddings: expected a tensor, a numpy array or a list"):
        function(a, {"e": e})


@pytest.fixture
def pre_activations() -> tuple[Tensor, Tensor]:
    """Signed pre-activations (6, 9) and a Top-3 selection of each row; one row never positive."""
    z = torch.randn(6, 9, generator=torch.Generator().manual_seed(5))
    z[:, 7:] -= 10  # two units that are never selected
    z[4] = -z[4].abs() - 1
    acts = torch.zeros_like(z).scatter(1, z.topk(3).indices, z.topk(3).values.relu())
    return z, acts > 0


@pytest.mark.parametrize("units", ["batch_active", "all"])
@pytest.mark.parametrize("rectify", [True, False])
def test_regularizers_equal_their_definitions(pre_activations, units, rectify) -> None:
    z, selected = pre_activations
    used = z.relu() if rectify else z
    every_unit = units == "all"
    assert functional.off_support_l1(
        z, selected, units=units, rectify=rectify
    ).item() == pytest.approx(oracle.off_support_l1_by_loops(used, selected, every_unit), rel=1e-6)
    assert functional.l1_l2_ratio(
        z, selected, units=units, rectify=rectify
    ).item() == pytest.approx(oracle.l1_l2_ratio_by_loops(used, selected, every_unit), rel=1e-6)


def test_off_support_l1_moves_only_unselected_entries_of_active_units(pre_activations) -> None:
    z, selected = pre_activations
    z = z.abs().requires_grad_()
    functional.off_support_l1(z, selected).backward()
    assert z.grad is not None
    expected = (~selected & selected.any(0)) / len(z)
    torch.testing.assert_close(z.grad, expected)


def test_l1_l2_ratio_is_scale_free_and_has_autograd_s_gradient(pre_activations) -> None:
    z, selected = pre_activations
    ratio = functional.l1_l2_ratio
    torch.testing.assert_close(ratio(z * 1e25, selected), ratio(z, selected))
    torch.testing.assert_close(ratio(z * 1e-25, selected), ratio(z, selected))
    z64 = z.abs().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ratio(x, selected), z64)


def test_a_sample_without_active_units_contributes_zero_and_no_nan() -> None:
    z = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    selected = torch.tensor([[False, False], [True, True]])
    loss = functional.l1_l2_ratio(z, selected)
    loss.backward()
    assert loss.item() == pytest.approx(1.4 / 2)
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert (z.grad[0] == 0).all()


def test_a_sample_of_denormal_activations_counts_as_zero() -> None:
    z = torch.tensor([[1e-40, 2e-40], [3.0, 4.0]], requires_grad=True)
    loss = functional.l1_l2_ratio(z, torch.ones(2, 2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == pytest.approx(1.4 / 2)
    assert z.grad is not None
    assert (z.grad[0] == 0).all()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("units", ["batch_active", "all"])
@pytest.mark.parametrize("function", [functional.off_support_l1, functional.l1_l2_ratio])
def test_regularizers_of_an_empty_batch_are_zero(function, units, shape) -> None:
    z = torch.rand(shape, requires_grad=True)
    loss = function(z, torch.ones(shape, dtype=torch.bool), units=units)
    loss.backward()
    assert loss.item() == 0
    assert z.grad is not None


def test_regularizer_options_divide_as_they_say(pre_activations) -> None:
    z, selected = pre_activations
    active = int(selected.any(0).sum())
    total = functional.off_support_l1(z, selected)
    mean = functional.off_support_l1(z, selected, over_units="mean")
    torch.testing.assert_close(mean, total / active)
    ratio = functional.l1_l2_ratio(z, selected)
    normalized = functional.l1_l2_ratio(z, selected, normalize=True)
    torch.testing.assert_close(normalized, ratio / math.sqrt(active))


@pytest.mark.parametrize("function", [functional.off_support_l1, functional.l1_l2_ratio])
def test_regularizers_name_what_is_wrong(pre_activations, function) -> None:
    z, selected = pre_activations
    with pytest.raises(TypeError, match=r"selected: expected a dense bool tensor"):
        function(z, selected.float())
    with pytest.raises(ValueError, match=r"selected: expected shape \(6, 9\)"):
        function(z, selected[:, :3])
    with pytest.raises(ValueError, match=r"units: expected one of .*'batch_active', 'all'"):
        function(z, selected, units="some")


@pytest.mark.parametrize("case", CASES)
def test_class_purity_equals_the_definition(case: str, way: str) -> None:
    a = CASES[case]
    labels = torch.randint(0, 4, (40,), generator=torch.Generator().manual_seed(6))
    binary, weighted = oracle.purity_by_loops(a, labels)
    purity = functional.class_purity(a, labels, num_classes=5)
    np.testing.assert_allclose(purity.binary.numpy(), binary, rtol=1e-12)
    np.testing.assert_allclose(purity.weighted.numpy(), weighted, rtol=1e-6)


def test_purity_of_equal_counts_takes_the_lowest_label() -> None:
    a = torch.tensor([[1.0], [3.0]])
    purity = functional.class_purity(a, torch.tensor([2, 1]), num_classes=3)
    assert purity.binary.item() == 0.5
    assert purity.weighted.item() == 0.75


def test_purity_names_what_is_wrong() -> None:
    a = torch.rand(4, 3)
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 3\).*\[0, 3\]"):
        functional.class_purity(a, torch.arange(4), num_classes=3)
    with pytest.raises(TypeError, match="labels: expected integers"):
        functional.class_purity(a, torch.zeros(4), num_classes=3)
    with pytest.raises(ValueError, match=r"labels: expected shape \(4,\)"):
        functional.class_purity(a, torch.arange(3), num_classes=3)
    with pytest.raises(ValueError, match="latents: contains NaN"):
        functional.class_purity(a.fill_(math.nan), torch.arange(4), num_classes=4)


def test_no_training_step_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have shapes and no values: whatever reads one (a sync on a GPU) raises."""
    # They are on the CPU, where a look is free; have them taken for an accelerator's.
    monkeypatch.setattr(support, "looks_are_free", lambda _: False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        a = torch.rand(64, 1000, requires_grad=True)
        e = torch.rand(64, 16)
        selected = a.detach() > 0.5
        loss = functional.monoloss(a, e)
        loss = loss + functional.off_support_l1(a, selected) + functional.l1_l2_ratio(a, selected)
        loss.backward()
        with pytest.raises(DataDependentOutputException):
            loss.item()
    assert a.grad is not None
    assert a.grad.shape == (64, 1000)

"""Chance levels: the closed forms equal shuffles, and what is random is not called significant."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from monoloss_plugin import MonoScore, chance, functional, load_features
from monoloss_plugin.kernels.support import support_of
from monoloss_plugin.metrics import MonoScoreResult
from tests import oracle

CASES = oracle.activation_cases()
ORDINARY = ["sparse", "dense", "signed", "shifted", "huge", "tiny", "dead latents"]


def scored(a: Tensor, e: Tensor, sizes: list[int] | None = None) -> MonoScoreResult:
    metric = MonoScore()
    for rows in torch.arange(len(a)).split(sizes or [len(a)]):
        metric.update(a[rows], e[rows])
    return metric.compute()


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """(599, 64): real features, in ten clusters."""
    return load_features("digits", "held_out").tensor().float()


@pytest.fixture(scope="module")
def clusters() -> Tensor:
    """(3000, 64): thirty clusters, and a direction that all samples share."""
    generator = torch.Generator().manual_seed(0)
    centres = 1.5 * torch.randn(30, 64, generator=generator)
    noise = 0.8 + torch.randn(3000, 64, generator=generator)
    return centres[torch.randint(30, (3000,), generator=generator)] + noise


@pytest.mark.parametrize("case", ["sparse", "dense", "signed", "shifted", "one sample each"])
def test_chance_and_z_are_the_mean_and_deviations_over_every_order(case: str, way: str) -> None:
    a, e = CASES[case][:6].double(), oracle.embeddings_with_a_zero()[:6].double()
    orders = torch.tensor(list(itertools.permutations(range(6))))
    every = torch.stack([functional.monoscore_pairwise(a[order], e) for order in orders])
    result = scored(a, e)
    expected, spread = every.mean(0), every.std(0, correction=0)
    own = functional.monoscore_pairwise(a, e)
    for k in result.defined.nonzero().flatten().tolist():
        assert result.chance == pytest.approx(float(expected[k]), abs=1e-12)
        assert float(result.z_scores[k]) == pytest.approx(
            float((own[k] - expected[k]) / spread[k]), rel=1e-7, abs=1e-9
        )
    assert (result.z_scores[~result.defined] == 0).all()


@pytest.mark.parametrize("kind", ["sparse", "dense", "signed", "far above zero", "heavy"])
def test_closed_forms_agree_with_two_thousand_shuffles(kind: str, digits: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(599, 4, generator=generator)
    a = {
        "sparse": (normal - 1.5).relu(),
        "dense": normal.abs(),
        "signed": normal,
        "far above zero": 100 + normal,
        "heavy": (2 * normal).exp() * (normal > 0.5),
    }[kind]
    result = scored(a, digits)
    shuffled = functional.monoscore_shuffled(a, digits, shuffles=2000)
    np.testing.assert_allclose(shuffled.mean(0), result.chance, atol=3e-3)
    spread = (result.scores - result.chance) / result.z_scores
    np.testing.assert_allclose(shuffled.std(0) / spread, 1.0, atol=0.08)
    share = (shuffled >= result.scores).double().mean(0)
    np.testing.assert_allclose(result.p_values, share, atol=0.06)


def random_latents(kind: str, num_rows: int, generator: torch.Generator) -> Tensor:
    """Return latents (N, M) that know nothing of the samples."""
    if kind == "dense":
        return torch.rand(num_rows, 4000, generator=generator)
    active = {"sparse": 60, "rare": 8, "as rare as tested": 5}[kind]
    order = torch.rand(num_rows, 10_000, generator=generator).argsort(0)
    heights = torch.rand(num_rows, 10_000, generator=generator)
    heights = 0.9 + 0.2 * heights if kind == "as rare as tested" else heights.log().neg()
    return torch.where(order < active, heights, 0.0)


@pytest.mark.parametrize("kind", ["dense", "sparse", "rare", "as rare as tested"])
@pytest.mark.parametrize("of", ["digits", "clusters"])
def test_random_latents_are_at_chance(kind: str, of: str, request: pytest.FixtureRequest) -> None:
    e = request.getfixturevalue(of)[:1500]
    result = scored(random_latents(kind, len(e), torch.Generator().manual_seed(2)), e)
    assert abs(result.mean_adjusted) < 0.01
    tested = ~result.p_values.isnan()
    assert tested.double().mean() > 0.4
    false_positives = float((result.p_values[tested] < 0.01).double().mean())
    assert false_positives <= 0.013
    assert int(result.significant().sum()) <= 1
    if kind == "sparse":  # a normal tail would not do
        assert float((result.z_scores > 2.326).double().mean()) > false_positives


def test_latents_that_know_the_class_are_significant_if_enough_samples_carry_them(
    digits: Tensor,
) -> None:
    labels = load_features("digits", "held_out").labels
    assert labels is not None
    a = torch.nn.functional.one_hot(labels).float()
    few = torch.zeros(599, 10)
    for label in range(10):
        few[(labels == label).nonzero().flatten()[:3], label] = 1.0
    result = scored(torch.cat((a, few), 1), digits)
    assert result.significant()[:10].all()
    assert (result.adjusted[:10] > 0.3).all()
    assert result.p_values[10:].isnan().all()  # three samples are too few to tell
    assert result.support.tolist() == [*a.sum(0).long().tolist(), *[3] * 10]


@pytest.mark.parametrize("case", ORDINARY)
def test_batches_in_any_form_give_the_same_chance(case: str, embeddings: Tensor) -> None:
    a = CASES[case]
    whole = scored(a.double(), embeddings.double())
    merged, metric = MonoScore(), MonoScore()
    for rows in torch.arange(40).split([1, 13, 20, 6]):
        part = MonoScore()
        part.update(support_of(a[rows]), embeddings[rows])
        merged.merge(part)
        metric.update(a[rows].to_sparse(), embeddings[rows])
    for found in (metric.compute(), merged.compute(), scored(a, embeddings)):
        assert found.chance == pytest.approx(whole.chance, abs=1e-6)
        np.testing.assert_allclose(found.z_scores, whole.z_scores, atol=2e-3, rtol=2e-3)
        np.testing.assert_allclose(found.p_values, whole.p_values, atol=1e-3)
        assert found.support.tolist() == whole.support.tolist()


def test_p_values_are_those_of_a_pearson_three_distribution() -> None:
    z, skewness = torch.meshgrid(
        torch.linspace(-2, 12, 15).double(),
        torch.tensor([0.0, 1e-5, 0.01, 0.3, 1.0, 2.5]).double(),
        indexing="ij",
    )
    expected = scipy.stats.pearson3.sf(z.numpy(), skewness.numpy())
    np.testing.assert_allclose(chance._tail(z, skewness), expected, rtol=1e-3, atol=1e-30)


@pytest.mark.parametrize("alpha", [0.01, 0.2])
def test_significance_is_benjamini_and_hochbergs(alpha: float) -> None:
    generator = np.random.default_rng(0)
    p = np.concatenate((generator.random(400), generator.random(100) / 500))
    generator.shuffle(p)
    adjusted = scipy.stats.false_discovery_control(p)
    with_untested = torch.tensor(np.insert(p, [0, 3, 500], np.nan))
    found = chance.significant(with_untested, alpha).numpy()
    np.testing.assert_array_equal(np.delete(found, [0, 4, 502]), adjusted <= alpha)
    assert not found[[0, 4, 502]].any()
    assert not chance.significant(torch.full((3,), torch.nan), alpha).any()


def test_per_firing_weighs_a_latent_by_how_often_it_is_active() -> None:
    a = torch.zeros(40, 2)
    a[:30, 0], a[[1, 2], 1] = 1.0, 1.0
    e = torch.randn(40, 7)
    result = scored(a, e)
    first, second = result.scores.tolist()
    assert result.mean_per_firing == pytest.approx((30 * first + 2 * second) / 32)


@pytest.mark.parametrize("rows", [2, 3])
def test_a_few_samples_are_not_tested(rows: int) -> None:
    result = scored(torch.rand(rows, 5), torch.randn(rows, 4))
    assert result.p_values.isnan().all()
    assert not result.significant().any()


def test_samples_that_are_all_alike_tell_nothing() -> None:
    result = scored(torch.rand(50, 5), torch.ones(50, 4))
    assert result.chance == pytest.approx(1.0)
    assert (result.z_scores == 0).all()
    assert result.adjusted.abs().max() < 1e-3
    assert not result.significant().any()


def test_embeddings_wider_than_a_block_of_columns_give_the_same_z(
    monkeypatch: pytest.MonkeyPatch, embeddings: Tensor
) -> None:
    expected = scored(CASES["sparse"], embeddings)
    monkeypatch.setattr(chance, "_COLUMNS_AT_ONCE", 3)  # of seven
    monkeypatch.setattr(chance, "_ROWS_AT_ONCE", 16)
    torch.testing.assert_close(scored(CASES["sparse"], embeddings).z_scores, expected.z_scores)


def test_very_wide_embeddings_have_chance_but_no_z(monkeypatch: pytest.MonkeyPatch) -> None:
    a, e = torch.rand(50, 5), torch.randn(50, 9)
    expected = scored(a, e)
    monkeypatch.setattr(chance, "WIDEST", 8)
    metric = MonoScore()
    metric.update(a, e)
    loaded = MonoScore()
    loaded.load_state_dict(metric.state_dict())
    loaded.merge(metric)
    result = metric.compute()
    assert result.chance == expected.chance
    torch.testing.assert_close(result.adjusted, expected.adjusted)
    assert (result.z_scores == 0).all()
    assert result.p_values.isnan().all()
    assert loaded.compute().num_samples == 100


def test_arguments_are_checked(embeddings: Tensor) -> None:
    result = scored(CASES["sparse"], embeddings)
    for alpha in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match="alpha: expected a number between 0 and 1"):
            result.significant(alpha)
    with pytest.raises(ValueError, match="shuffles: expected"):
        functional.monoscore_shuffled(CASES["sparse"], embeddings, shuffles=0)

"""Streaming metrics: any batching, merging, order or number of ranks gives the one-shot result."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import r2_score
from torch import Tensor

from monoloss_plugin import ClassPurity, MonoScore, functional
from monoloss_plugin.kernels.support import support_of
from monoloss_plugin.metrics import R2
from tests import oracle

CASES = oracle.activation_cases()


def streamed(a: Tensor, e: Tensor, sizes: list[int]) -> MonoScore:
    metric = MonoScore()
    for rows in torch.arange(len(a)).split(sizes):
        metric.update(a.index_select(0, rows), e[rows])
    return metric


# float32 data is multiplied in float32 and summed up in float64.
PRECISIONS = [(torch.float32, 1e-6), (torch.float64, 1e-9)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("case", CASES)
def test_streamed_scores_equal_the_definition(
    case: str, dtype: torch.dtype, tolerance: float, embeddings: Tensor, way: str
) -> None:
    result = streamed(CASES[case].to(dtype), embeddings, [1, 13, 20, 6]).compute()
    expected = oracle.monoscore_by_loops(CASES[case], embeddings)
    np.testing.assert_array_equal(result.defined.numpy(), ~np.isnan(expected))
    np.testing.assert_allclose(result.scores.numpy(), np.nan_to_num(expected), atol=tolerance)
    assert result.num_samples == 40


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["dense", "sparse", "merged"])
def test_mean_embeddings_equal_loops(case: str, form: str, embeddings: Tensor, way: str) -> None:
    a = CASES[case]
    if form == "merged":  # the minimum of the second shard may be lower
        metric = streamed(a[:17], embeddings[:17], [8, 9])
        metric.merge(streamed(a[17:], embeddings[17:], [23]))
    else:
        given = a.to_sparse() if form == "sparse" else a
        metric = streamed(given, embeddings, [1, 13, 20, 6])
    means = metric.mean_embeddings()
    assert means.dtype == torch.float32
    expected = oracle.mean_embeddings_by_loops(a, embeddings)
    np.testing.assert_allclose(means.numpy(), expected, atol=2e-6)
    never = (a == a.amin(0)).all(0)
    assert (means[never] == 0).all()
    units = [row / (np.linalg.norm(row) or 1.0) for row in embeddings.double().numpy()]
    np.testing.assert_allclose(metric.mean_embedding().numpy(), np.mean(units, 0), atol=1e-6)


@pytest.mark.parametrize("sizes", [[40], [1, 13, 20, 6], [1] * 40], ids=str)
@pytest.mark.parametrize("others", [1e-1, 1e-3, 1e-5])
def test_one_sample_with_nearly_all_of_the_activation_costs_no_accuracy(
    others: float, sizes: list[int], embeddings: Tensor, way: str
) -> None:
    a = others * CASES["sparse"]
    a[torch.arange(12), torch.arange(12)] = 3.0
    result = streamed(a, embeddings, sizes).compute()
    expected = oracle.monoscore_by_loops(a, embeddings)
    np.testing.assert_allclose(result.scores.numpy(), expected, atol=1e-6)


def test_long_columns_cost_no_accuracy(way: str) -> None:
    generator = torch.Generator().manual_seed(7)
    a = torch.rand(60_000, 3, generator=generator)
    e = torch.randn(60_000, 8, generator=generator) + 0.5
    exact = functional.monoscore(a.double(), e.double())
    np.testing.assert_allclose(functional.monoscore(a, e), exact, atol=1e-6)


@pytest.mark.parametrize("form", ["whole", "batches", "support"])
def test_many_samples_that_are_all_alike_cost_little_accuracy(form: str, way: str) -> None:
    """The hardest case for float32 sums, whose rounding then never averages out."""
    a = (torch.rand(60_000, 4, generator=torch.Generator().manual_seed(8)) < 0.9).float()
    e = torch.full((60_000, 8), 0.1)
    metric = MonoScore()
    if form == "support":
        metric.update(support_of(a), e)
    else:
        for rows in torch.arange(len(a)).split(60_000 if form == "whole" else 2048):
            metric.update(a[rows], e[rows])
    np.testing.assert_allclose(metric.compute().scores, 1.0, atol=5e-6)


@pytest.mark.parametrize("scale", [1e38, 1e-36])
def test_activations_at_the_ends_of_float32(scale: float, embeddings: Tensor, way: str) -> None:
    a = CASES["sparse"] * scale
    scores = streamed(a, embeddings, [13, 27]).compute().scores
    exact = oracle.monoscore_by_loops(a, embeddings)  # of a as it was rounded
    np.testing.assert_allclose(scores, np.nan_to_num(exact), atol=1e-6)


def test_a_range_that_is_no_normal_number_counts_as_constant_everywhere(
    embeddings: Tensor, way: str
) -> None:
    a = (CASES["sparse"] * 1e-40).requires_grad_()
    loss = functional.monoloss(a, embeddings)
    loss.backward()
    assert loss.item() == 1.0
    assert (a.grad == 0).all()
    for scores in (functional.monoscore, functional.monoscore_pairwise):
        assert (scores(a.detach(), embeddings) == 0).all()
    assert streamed(a.detach(), embeddings, [40]).compute().num_defined == 0
    assert functional.monoloss(a.detach().double(), embeddings.double()).item() == 1.0


def test_a_support_must_match_its_embeddings(embeddings: Tensor) -> None:
    a = CASES["sparse"]
    metric = streamed(a, embeddings, [40])
    before = metric.compute()
    for rows, message in ((41, "expected 40 rows"), (39, "expected 40 rows")):
        with pytest.raises(ValueError, match=f"embeddings: {message} to match latents, got {rows}"):
            metric.update(support_of(a), torch.rand(rows, 7))
    with pytest.raises(TypeError, match="embeddings: expected a floating-point tensor"):
        metric.update(support_of(a), torch.ones(40, 7, dtype=torch.int64))
    assert metric.compute().num_samples == before.num_samples
    torch.testing.assert_close(metric.compute().scores, before.scores, rtol=0, atol=0)


def test_a_metric_begun_in_inference_mode_goes_on_outside(embeddings: Tensor, way: str) -> None:
    a, labels = CASES["sparse"], torch.arange(40) % 4
    metric, purity = MonoScore(), ClassPurity(4)
    with torch.inference_mode():
        metric.update(a[:9] * 1, embeddings[:9] * 1)
        purity.update(a[:9] * 1, labels[:9] * 1)
    metric.update(a[9:], embeddings[9:])
    purity.update(a[9:], labels[9:])
    expected = functional.monoscore(a, embeddings).double()
    torch.testing.assert_close(metric.compute().scores, expected, atol=1e-6, rtol=0.0)
    torch.testing.assert_close(purity.compute(), functional.class_purity(a, labels, 4))


def test_a_batch_of_a_wider_dtype_may_set_the_minimum(embeddings: Tensor, way: str) -> None:
    a = CASES["shifted"].double()
    a[3] -= 0.1 / 3
    metric = MonoScore()
    metric.update(a[:20], embeddings[:20])
    metric.update(a[20:].float(), embeddings[20:])
    rounded = torch.cat((a[:20], a[20:].float().double()))
    expected = oracle.monoscore_by_loops(rounded, embeddings)
    np.testing.assert_allclose(metric.compute().scores, expected, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_sparse_batches_give_what_dense_ones_do(case: str, embeddings: Tensor) -> None:
    a, labels = CASES[case], torch.arange(40) % 4
    dense, sparse = MonoScore(), MonoScore()
    purity, sparse_purity = ClassPurity(4), ClassPurity(4)
    for rows in torch.arange(40).split([1, 13, 20, 6]):
        dense.update(a[rows], embeddings[rows])
        sparse.update(a[rows].to_sparse(), embeddings[rows])
        purity.update(a[rows], labels[rows])
        sparse_purity.update(a[rows].to_sparse(), labels[rows])
    torch.testing.assert_close(sparse.compute().scores, dense.compute().scores, atol=1e-6, rtol=0.0)
    torch.testing.assert_close(sparse.compute().defined, dense.compute().defined)
    torch.testing.assert_close(sparse_purity.compute(), purity.compute(), equal_nan=True)


def test_a_wide_dictionary_goes_in_blocks(monkeypatch, embeddings: Tensor) -> None:
    a = CASES["sparse"]
    whole = functional.monoscore(a.to_sparse(), embeddings)
    monkeypatch.setattr("monoloss_plugin.kernels.support._LATENTS_AT_ONCE", 5)
    torch.testing.assert_close(functional.monoscore(a.to_sparse(), embeddings), whole)


def test_a_minimum_that_falls_with_every_batch_costs_no_accuracy(way: str) -> None:
    generator = torch.Generator().manual_seed(2)
    falling = torch.linspace(1000, 999, 40).unsqueeze(1)
    a = falling + 1e-3 * torch.rand(40, 6, generator=generator)
    e = torch.randn(40, 5, generator=generator)
    scores = streamed(a, e, [1] * 40).compute().scores
    np.testing.assert_allclose(scores.numpy(), oracle.monoscore_by_loops(a, e), atol=1e-6)


# Values that float32 holds exactly and whose products neither overflow nor vanish.
values = st.one_of(st.just(0.0), st.integers(-64, 64).map(lambda i: i / 8))


@st.composite
def datasets(draw) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """Latents, embeddings, a split of the samples and an order of the parts."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    rows, latents, width = sum(sizes), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    numbers = draw(
        st.lists(values, min_size=rows * (latents + width), max_size=rows * (latents + width))
    )
    table = torch.tensor(numbers).reshape(rows, latents + width)
    order = draw(st.permutations(range(len(sizes))))
    return table[:, :latents], table[:, latents:], sizes, order


@given(datasets())
@settings(max_examples=150, deadline=None)
def test_batching_merging_and_order_do_not_matter(data) -> None:
    a, e, sizes, order = data
    expected = oracle.monoscore_by_loops(a, e)
    in_batches = streamed(a, e, sizes).compute()

    shards = [streamed(x, y, [len(x)]) for x, y in zip(a.split(sizes), e.split(sizes), strict=True)]
    merged = MonoScore()
    for i in order:
        merged.merge(shards[i])
    permutation = torch.randperm(len(a))
    shuffled = streamed(a[permutation], e[permutation], sizes).compute()

    sparse = streamed(a.to_sparse(), e, sizes).compute()

    for result in (in_batches, merged.compute(), shuffled, sparse):
        np.testing.assert_array_equal(result.defined.numpy(), ~np.isnan(expected))
        np.testing.assert_allclose(result.scores.numpy(), np.nan_to_num(expected), atol=1e-6)


@given(datasets(), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_purity_does_not_depend_on_batching_or_merging(data, num_classes: int) -> None:
    a, _, sizes, order = data
    labels = torch.arange(len(a)) % num_classes
    shards = []
    for latents, y in zip(a.split(sizes), labels.split(sizes), strict=True):
        shards.append(ClassPurity(num_classes))
        shards[-1].update(latents, y)
    merged = ClassPurity(num_classes)
    for i in order:
        merged.merge(shards[i])
    binary, weighted = oracle.purity_by_loops(a, labels)
    np.testing.assert_allclose(merged.compute().binary.numpy(), binary)
    np.testing.assert_allclose(merged.compute().weighted.numpy(), weighted)


def test_reported_means_follow_both_conventions(embeddings: Tensor) -> None:
    result = streamed(CASES["dead latents"], embeddings, [40]).compute()
    scores = oracle.monoscore_by_loops(CASES["dead latents"], embeddings)
    assert result.num_defined == 9
    assert result.mean == pytest.approx(np.nansum(scores) / 12, abs=1e-7)
    assert result.mean_defined == pytest.approx(np.nanmean(scores), abs=1e-7)
    curve = result.curve()
    assert (curve.diff() <= 0).all()
    assert curve.sum().item() == pytest.approx(np.nansum(scores), abs=1e-6)


def test_updates_leave_the_caller_s_tensors_alone() -> None:
    a = torch.rand(8, 3, dtype=torch.float64) + 1
    e = torch.randn(8, 4, dtype=torch.float64)
    before = a.clone(), e.clone()
    MonoScore().update(a, e)
    torch.testing.assert_close((a, e), before, rtol=0, atol=0)


def test_a_refused_batch_leaves_the_metric_as_it_was(embeddings: Tensor) -> None:
    a = CASES["sparse"]
    metric = streamed(a, embeddings, [40])
    before = metric.compute().scores
    bad = a.clone()
    bad[0, 0] = math.inf
    with pytest.raises(ValueError, match="latents: contains NaN or infinite"):
        metric.update(bad, embeddings)
    with pytest.raises(ValueError, match="latents: expected width 12 as in earlier batches, got 5"):
        metric.update(a[:, :5], embeddings)
    torch.testing.assert_close(metric.compute().scores, before, rtol=0, atol=0)


def test_state_round_trips_through_a_file_without_unpickling(
    tmp_path: Path, embeddings: Tensor
) -> None:
    a, labels = CASES["sparse"], torch.arange(40) % 4
    score, purity = streamed(a, embeddings, [40]), ClassPurity(4)
    purity.update(a, labels)
    torch.save([score.state_dict(), purity.state_dict()], tmp_path / "state.pt")
    score_state, purity_state = torch.load(tmp_path / "state.pt", weights_only=True)
    loaded_score, loaded_purity = MonoScore(), ClassPurity(4)
    loaded_score.load_state_dict(score_state)
    loaded_purity.load_state_dict(purity_state)
    torch.testing.assert_close(loaded_score.compute().scores, score.compute().scores)
    torch.testing.assert_close(loaded_purity.compute(), purity.compute())
    with pytest.raises(ValueError, match="missing"):
        loaded_score.load_state_dict({"u": torch.zeros(3)})


def test_a_saved_state_does_not_change_with_later_updates(embeddings: Tensor) -> None:
    a, labels = CASES["sparse"], torch.arange(40) % 4
    score, purity = streamed(a, embeddings, [40]), ClassPurity(4)
    purity.update(a, labels)
    states = score.state_dict(), purity.state_dict()
    expected = score.compute().scores.clone(), purity.compute()
    score.update(a.flip(0), embeddings)
    purity.update(a.flip(0), labels)
    loaded_score, loaded_purity = MonoScore(), ClassPurity(4)
    loaded_score.load_state_dict(states[0])
    loaded_purity.load_state_dict(states[1])
    torch.testing.assert_close(loaded_score.compute().scores, expected[0], rtol=0, atol=0)
    torch.testing.assert_close(loaded_purity.compute(), expected[1], rtol=0, atol=0)


def test_empty_metrics_say_so() -> None:
    for metric in (MonoScore(), ClassPurity(3), R2()):
        with pytest.raises(ValueError, match="no data yet"):
            metric.compute()
    for mean in (MonoScore().mean_embeddings, MonoScore().mean_embedding):
        with pytest.raises(ValueError, match="no data yet"):
            mean()


def _reduce_on_a_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    a, e = CASES["shifted"], torch.randn(40, 7, generator=torch.Generator().manual_seed(1))
    labels, parts = torch.arange(40) % 4, (slice(0, 25), slice(25, 40))
    score, purity = MonoScore(), ClassPurity(4)

    def update() -> None:
        score.update(a[parts[rank]], e[parts[rank]])
        purity.update(a[parts[rank]] - 100.005, labels[parts[rank]])

    wider = MonoScore()
    wider.update(torch.rand(4, 3 + rank), torch.rand(4, 2))
    with pytest.raises(ValueError, match=r"latents and embeddings: \(3, 2\), \(4, 2\)"):
        wider.all_reduce_()
    more_classes = ClassPurity(2 + rank)
    more_classes.update(torch.rand(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"numbers of classes and latents: \(2, 3\), \(3, 3\)"):
        more_classes.all_reduce_()
    if rank == 0:  # the other rank has nothing yet
        update()
    for _ in range(2):  # what all ranks hold counts once
        score.all_reduce_()
        purity.all_reduce_()
    if rank == 1:  # and goes on with what comes
        update()
    score.all_reduce_()
    purity.all_reduce_()
    torch.save((score.state_dict(), purity.state_dict()), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_all_reduce_gives_every_rank_the_whole_result(tmp_path: Path) -> None:
    mp.start_processes(_reduce_on_a_rank, (str(tmp_path),), nprocs=2, start_method="spawn")
    a, e = CASES["shifted"], torch.randn(40, 7, generator=torch.Generator().manual_seed(1))
    scores = functional.monoscore(a, e).double()
    purity = functional.class_purity(a - 100.005, torch.arange(40) % 4, 4)
    for rank in range(2):
        score_state, purity_state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        metric, class_purity = MonoScore(), ClassPurity(4)
        metric.load_state_dict(score_state)
        class_purity.load_state_dict(purity_state)
        torch.testing.assert_close(metric.compute().scores, scores, atol=1e-7, rtol=0)
        assert metric.compute().num_samples == 40
        whole = streamed(a, e, [40]).compute()
        assert metric.compute().chance == pytest.approx(whole.chance, abs=1e-12)
        for name in ("z_scores", "p_values", "support", "largest"):
            found = getattr(metric.compute(), name)
            torch.testing.assert_close(found, getattr(whole, name), atol=1e-4, rtol=1e-4)
        found = class_purity.compute()
        for name in ("binary", "weighted", "dominant"):
            torch.testing.assert_close(getattr(found, name), getattr(purity, name))
        assert class_purity.state_dict()["samples"].sum(0).tolist() == [10] * 4


def test_r2_equals_scikit_learn_s_over_dimensions_that_vary() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(50, 6, generator=generator) * 0.01 + 100
    x[:, 2] = 0.1  # constant
    x_hat = x + 0.005 * torch.randn(50, 6, generator=generator)
    metric, shard = R2(), R2()
    metric.update(x[:20], x_hat[:20])
    shard.update(x[20:27], x_hat[20:27])
    shard.update(x[27:], x_hat[27:])
    metric.merge(shard)
    varying = [0, 1, 3, 4, 5]
    expected = r2_score(x[:, varying].double().numpy(), x_hat[:, varying].double().numpy())
    assert metric.compute() == pytest.approx(expected, rel=1e-9)


def test_purity_of_a_thousand_classes_stays_within_its_stated_memory() -> None:
    purity = ClassPurity(1000)
    purity.update(torch.rand(4, 8192), torch.tensor([0, 999, 5, 5]))
    held = sum(tensor.nbytes for tensor in purity.state_dict().values())
    assert 16 * 1000 * 8192 <= held < 16.1 * 1000 * 8192


@pytest.mark.parametrize("case", ["sparse", "shifted"])
@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_coo])
def test_a_batch_larger_than_a_chunk_gives_the_same_sums(
    case: str, layout: torch.layout, monkeypatch, embeddings: Tensor, way: str
) -> None:
    a, labels = CASES[case], torch.arange(40) % 4
    whole, purity = functional.monoscore(a, embeddings), functional.class_purity(a, labels, 4)
    for name in ("_ELEMENTS", "_SPARSE_ELEMENTS"):
        monkeypatch.setattr(f"monoloss_plugin._chunks.{name}", 12 * 7)  # 7 rows a chunk
    given = a if layout == torch.strided else a.to_sparse()
    torch.testing.assert_close(functional.monoscore(given, embeddings), whole)
    torch.testing.assert_close(functional.class_purity(given, labels, 4), purity)

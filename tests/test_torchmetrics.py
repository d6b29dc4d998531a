"""The torchmetrics shells: the library's own protocol, our numbers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torchmetrics import MetricCollection

from monoloss_plugin import functional
from monoloss_plugin.torchmetrics import ClassPurity, MonoScore
from tests import oracle

A = oracle.activation_cases()["dead latents"]
E = torch.randn(40, 7, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(40) % 4


def test_values_equal_the_one_shot_functions() -> None:
    scores = functional.monoscore(A, E).double()
    expected = {"mean": scores.mean(), "mean_defined": scores[scores != 0].mean(), "none": scores}
    for reduction, value in expected.items():
        metric = MonoScore(reduction)
        metric.update(A[:15], E[:15])
        metric.update(A[15:], E[15:])
        torch.testing.assert_close(metric.compute(), value, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="reduction: expected one of"):
        MonoScore("sum")


def test_forward_gives_the_batch_s_value_and_keeps_the_whole() -> None:
    metric = MonoScore("none")
    metric(A[:15], E[:15])
    batch = metric(A[15:], E[15:])
    torch.testing.assert_close(batch.float(), functional.monoscore(A[15:], E[15:]))
    torch.testing.assert_close(metric.compute().float(), functional.monoscore(A, E))
    metric.reset()
    metric.update(A[:15], E[:15])
    torch.testing.assert_close(metric.compute().float(), functional.monoscore(A[:15], E[:15]))
    assert metric.state_dict() == {}
    torch.testing.assert_close(copy.deepcopy(metric).compute(), metric.compute())


def test_collections_keep_metrics_apart() -> None:
    collection = MetricCollection({"all": MonoScore(), "defined": MonoScore("mean_defined")})
    collection.update(A, E)
    values = collection.compute()
    torch.testing.assert_close(values["defined"], values["all"] * 12 / 9)  # three are dead


def _sync_on_a_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    part = slice(0, 25) if rank == 0 else slice(25, 40)
    score, purity = MonoScore("none"), ClassPurity(4)
    score.update(A[part], E[part])
    purity.update(A[part], LABELS[part])
    first = score.compute()
    own = functional.monoscore(A[part], E[part])
    kept_own = torch.allclose(score._state.compute().scores.float(), own)
    score.update(A[part], E[part])
    second = score.compute()
    torch.save((first, second, purity.compute(), kept_own), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_compute_covers_all_ranks_and_each_goes_on_with_its_own(tmp_path: Path) -> None:
    mp.start_processes(_sync_on_a_rank, (str(tmp_path),), nprocs=2, start_method="spawn")
    once = functional.monoscore(A, E).double()
    twice = functional.monoscore(torch.cat([A, A]), torch.cat([E, E])).double()
    purity = functional.class_purity(A, LABELS, 4)
    for rank in range(2):
        first, second, classes, kept_own = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(first, once, atol=1e-6, rtol=0)
        torch.testing.assert_close(second, twice, atol=1e-6, rtol=0)
        torch.testing.assert_close(classes["purity_binary"], purity.binary.nanmean())
        assert kept_own

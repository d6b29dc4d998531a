"""The global batch of several processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from monoloss_plugin import MonoLoss
from monoloss_plugin.finetuning import LatentRecorder, gather_rows, insert_mono_layer
from tests.processes import leave_together

SPLITS = {"equal": (12, 12), "unequal": (17, 7)}


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    insert_mono_layer(model, "2", width=24, relu=True)
    return model, torch.randn(24, 6), torch.randn(24, 5)


def gradients_of(model, x, h, gather):
    recorder, loss = LatentRecorder(model), MonoLoss(lam=0.1, lam_units="raw")
    logits = model(x)
    latents = recorder.take()
    if gather:
        latents, h = gather_rows(latents), gather_rows(h)
    value = loss(latents, h, gradient_at=recorder.gradient_at)
    (value + 0 * logits.sum()).backward()  # DDP waits for every parameter of its output
    inner = getattr(model, "module", model)
    return value.item(), [p.grad.clone() for p in inner.parameters() if p.grad is not None]


MISFITS = {
    "width": lambda rank: torch.ones(2, 3 + rank),
    "dtype": lambda rank: torch.ones(2, 3, dtype=(torch.float32, torch.float64)[rank]),
    "no float": lambda rank: torch.ones(2, 3, dtype=(torch.float32, torch.int64)[rank]),
    "dimensions": lambda rank: torch.ones((2, 3, 1)[: 2 + rank]),
    "gradients": lambda rank: torch.ones(2, 3, requires_grad=rank == 0),
}


def refusal_of(rows) -> str:
    with pytest.raises(ValueError, match=r"^rows: expected \(B, d\) of one d and dtype") as caught:
        gather_rows(rows)
    return str(caught.value)


def work(rank, world, port, out) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    found = {}
    for name, sizes in SPLITS.items():
        model, x, h = make()
        parallel = DistributedDataParallel(model)
        first = sum(sizes[:rank])
        rows = slice(first, first + sizes[rank])
        found[name] = gradients_of(parallel, x[rows], h[rows], gather=True)
    own = torch.ones(2, 3, requires_grad=True)
    gathered, kept = gather_rows(own), torch.ones(4, 3, requires_grad=True)
    ((gathered + kept) ** 2).sum().backward()
    assert torch.equal(kept.grad, torch.full((4, 3), 4.0))  # which the reduction must not touch
    assert torch.equal(own.grad, torch.full((2, 3), 8.0))
    said = {name: refusal_of(rows(rank)) for name, rows in MISFITS.items()}
    torch.save((found, said), f"{out}/{rank}.pt")
    leave_together()


def test_two_processes_give_the_gradient_of_one_and_agree_first(tmp_path, free_port) -> None:
    mp.spawn(work, (2, free_port, str(tmp_path)), nprocs=2)
    value, expected = gradients_of(*make(), gather=False)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for gradients, _ in ranks:
        for found_value, found in gradients.values():
            assert found_value == pytest.approx(value, abs=1e-6)
            assert len(found) == len(expected)
            for one, other in zip(found, expected, strict=True):
                assert (one - other).abs().max() <= 1e-5 * other.abs().max().clamp(min=1e-3)
    said, of_other = (refusals for _, refusals in ranks)
    assert said == of_other
    assert "rank 0: 2 dimensions, width 3" in said["width"]
    assert "rank 1: 2 dimensions, width 4" in said["width"]
    assert "torch.float64" in said["dtype"]


def test_one_process_is_left_alone() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(rows) is rows

"""Batches of several processes as one, with exact gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of every process, in the order of ranks, differentiably.

    Each process then computes the same loss over the global batch. Gradients of a process's own
    rows are summed over what every process makes of them; where they are averaged over processes
    afterwards, as DistributedDataParallel does, the result is the gradient of that one loss.

    Args:
        rows: (B, d); B may differ from process to process.

    Returns:
        (sum of B, d); the rows themselves where there is one process.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows)
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        world, rank = dist.get_world_size(), dist.get_rank()
        own = torch.tensor([len(rows)], device=rows.device)
        sizes = [torch.zeros_like(own) for _ in range(world)]
        dist.all_gather(sizes, own)
        counts = [int(size) for size in sizes]
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(parts, padded)
        ctx.first, ctx.count = sum(counts[:rank]), counts[rank]
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)  # others may hold this one
        dist.all_reduce(total)
        return total[ctx.first : ctx.first + ctx.count]

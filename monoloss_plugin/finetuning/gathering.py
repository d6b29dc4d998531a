"""Gather the batches of several processes into one, with exact gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from monoloss_plugin._checks import FLOATS, as_tensor
from monoloss_plugin._ranks import gather_numbers


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of every process, in the order of ranks, differentiably.

    Each process can then compute the same loss over the global batch. A process's own rows get the
    sum of the gradients from all processes. If gradients are then averaged over processes, as
    DistributedDataParallel does, the result is the gradient of that one loss.

    Args:
        rows: (B, d), floating-point; B may differ between processes.

    Returns:
        (sum of B, d); with one process, the rows themselves.

    Raises:
        TypeError: the rows are not a tensor or an array.
        ValueError: on every process, if the processes have rows of different widths or dtypes, or
            if only some of them have gradients.
    """
    rows = as_tensor(rows, "rows")
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    dtype = FLOATS.index(rows.dtype) if rows.dtype in FLOATS else -1
    trained = rows.requires_grad and torch.is_grad_enabled()
    own = [rows.shape[0] if rows.ndim else 0, rows.ndim, rows.shape[-1] if rows.ndim else 0]
    own += [dtype, int(trained)]
    every = gather_numbers(own, rows.device) if several else [own]
    if len({tuple(kind) for _, *kind in every}) > 1 or rows.ndim != 2 or dtype < 0:
        raise ValueError(f"rows: expected (B, d) of one d and dtype, got {_describe(every)}")
    if not several:
        return rows
    gathered: Tensor = _GatherRows.apply(rows, [count for count, *_ in every])
    return gathered


def _describe(every: list[list[int]]) -> str:
    return "; ".join(
        f"rank {rank}: {ndim} dimensions, width {width}, "
        f"{FLOATS[dtype] if dtype >= 0 else 'no floating-point numbers'}, "
        f"{'with' if trained else 'without'} gradients"
        for rank, (_, ndim, width, dtype, trained) in enumerate(every)
    )


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        rank = dist.get_rank()
        padded = rows.new_zeros((max(counts), rows.shape[1]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        ctx.first, ctx.count = sum(counts[:rank]), counts[rank]
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Autograd may use this gradient elsewhere, so it must not change in place.
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[ctx.first : ctx.first + ctx.count], None

"""What ranks tell each other before they exchange tensors.

A collective call on tensors of different shapes or dtypes hangs or aborts. So ranks first exchange
a few numbers that describe their tensors. All ranks see the same numbers, so if these do not agree,
all ranks raise the same error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def gather_numbers(
    numbers: Sequence[int], device: torch.device, group: dist.ProcessGroup | None = None
) -> list[list[int]]:
    """Return the numbers of every rank, in the order of ranks. All give equally many integers."""
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    said: list[list[int]] = torch.stack(every).tolist()
    return said

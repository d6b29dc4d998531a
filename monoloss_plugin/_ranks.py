"""What the processes of a group tell each other before they exchange data.

A collective call on tensors of different shapes or dtypes hangs or aborts. So each rank first says
what it has; all see the same answers, and all raise the same error where these do not agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def gather_numbers(
    numbers: Sequence[int], device: torch.device, group: dist.ProcessGroup | None = None
) -> list[list[int]]:
    """Return what every rank says, in the order of ranks: equally many integers each."""
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    said: list[list[int]] = torch.stack(every).tolist()
    return said

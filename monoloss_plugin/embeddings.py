"""The similarity space: embeddings as unit vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_rows(embeddings: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return h = e / ||e|| and ||h||², which is 1, or 0 where e is zero.

    Embeddings are constants of MonoScore (a frozen encoder's output): no gradient flows into them.

    Args:
        embeddings: (N, d), any floating dtype.
        dtype: of the result.

    Returns:
        h (N, d) and ||h||² (N,).
    """
    e = embeddings.detach()
    if e.dtype == torch.float16 and dtype != torch.float16:
        e = e.to(dtype)  # whose range holds the squares of any float16
    else:
        e = e.to(torch.promote_types(e.dtype, dtype))
        # Dividing by the largest entry first keeps the squares of huge and tiny rows in range.
        largest = e.abs().amax(dim=1, keepdim=True)
        e = (e / largest.masked_fill(largest == 0, 1.0)).to(dtype)
    norm = torch.linalg.vector_norm(e, dim=1, keepdim=True)
    zero = norm == 0
    return e.div_(norm.masked_fill(zero, 1.0)), (~zero).squeeze(1).to(dtype)

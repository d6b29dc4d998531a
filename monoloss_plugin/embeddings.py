"""Embeddings as unit vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_rows(embeddings: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return h = e / ||e|| and ||h||², which is 1, or 0 for a zero embedding.

    Embeddings come from a frozen encoder, so they get no gradient.

    Args:
        embeddings: (N, d), any floating dtype.
        dtype: of the result.

    Returns:
        h (N, d) and ||h||² (N,).
    """
    e = embeddings.detach()
    if e.shape[1] == 0:  # a vector without dimensions is zero
        return e.to(dtype), e.new_zeros(len(e), dtype=dtype)
    if e.dtype == torch.float16 and dtype in (torch.float32, torch.float64):
        h = e.to(dtype)  # wide enough for any float16's square
    else:
        e = e.to(torch.promote_types(e.dtype, dtype))
        # Divide by the largest entry first, so that squares of huge and tiny rows stay in range.
        # It is found from both ends, because the absolute values would be a copy of everything.
        largest = torch.maximum(e.amax(dim=1, keepdim=True), -e.amin(dim=1, keepdim=True))
        h = torch.div(e, _or_one(largest)).to(dtype)
    norm = torch.linalg.vector_norm(h, dim=1, keepdim=True)
    return h.div_(_or_one(norm)), (norm != 0).squeeze(1).to(dtype)


def _or_one(divisor: Tensor) -> Tensor:
    return divisor.masked_fill(divisor == 0, 1.0)

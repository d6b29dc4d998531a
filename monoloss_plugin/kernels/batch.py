"""The choice among the ways to score a batch: by layout, density, and what the caller knows."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from monoloss_plugin.embeddings import unit_rows
from monoloss_plugin.kernels.dense import dense_scores, dense_statistics
from monoloss_plugin.kernels.sparse import sparse_scores, sparse_statistics
from monoloss_plugin.kernels.statistics import BatchScores
from monoloss_plugin.kernels.support import is_sparse, support_of

GradientAt = Literal["all", "active"] | Tensor
"""Which entries of dense latents need a gradient.

- "all": every entry.
- "active": those that are not zero; exact where the activation function passes no gradient to the
  others (ReLU, TopK, BatchTopK, a gate).
- a (B, M) bool tensor: those that are not zero, and these (JumpReLU's band around its threshold).

Where fewer than all are needed, the others may get one or may not. COO latents have a gradient at
their stored entries, whatever is said here.
"""


def batch_scores(
    latents: Tensor, embeddings: Tensor, gradient_at: GradientAt = "all"
) -> BatchScores:
    """Return MonoScore over a batch, differentiable in ``latents`` by the closed form.

    Sums are taken in float32, or in float64 where the latents are float64, whatever autocast says.
    On an accelerator nothing here waits for it, but for COO latents that are not coalesced.

    Args:
        latents: (B, M), dense or sparse COO.
        embeddings: (B, d); constants.
        gradient_at: which entries need a gradient.
    """
    dtype = torch.promote_types(latents.dtype, torch.float32)
    if latents.numel() == 0:  # no samples or no latents: nothing is defined
        dense = latents if latents.layout == torch.strided else latents.to_dense()
        nothing = dense.to(dtype).sum(0)
        return BatchScores(nothing, torch.zeros_like(nothing, dtype=torch.bool))
    also = gradient_at if isinstance(gradient_at, Tensor) else None
    with torch.autocast(latents.device.type, enabled=False):
        h, q = unit_rows(embeddings, dtype)
        if not is_sparse(latents, also):
            return dense_scores(latents, h, q, dense_statistics(latents, h, q))
        every_entry = also is None and gradient_at == "all" and latents.layout == torch.strided
        if every_entry and latents.requires_grad and torch.is_grad_enabled():
            return dense_scores(
                latents, h, q, sparse_statistics(support_of(latents.detach()), h, q)
            )
        return sparse_scores(support_of(latents, also), h, q)

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
"""Which entries of the latents get a gradient; the others get none, whatever the device or density.

- "all": every entry.
- "active": those that are not zero; exact where the activation function passes no gradient to the
  others (ReLU, TopK, BatchTopK, a gate).
- a (B, M) bool tensor: those that are not zero, and these (JumpReLU's band around its threshold).

Sparse COO latents can have a gradient at their stored entries alone.
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
        gradient_at: which entries get a gradient.
    """
    dtype = torch.promote_types(latents.dtype, torch.float32)
    if latents.numel() == 0:  # no samples or no latents: nothing is defined
        dense = latents if latents.layout == torch.strided else latents.to_dense()
        nothing = dense.to(dtype).sum(0)
        return BatchScores(nothing, torch.zeros_like(nothing, dtype=torch.bool))
    also = gradient_at if isinstance(gradient_at, Tensor) else None
    everywhere = also is None and gradient_at == "all"
    with torch.autocast(latents.device.type, enabled=False):
        h, q = unit_rows(embeddings, dtype)
        if not is_sparse(latents, also):
            statistics = dense_statistics(latents, h, q)
            return dense_scores(latents, h, q, statistics, everywhere=everywhere, also=also)
        stored = latents.layout == torch.sparse_coo
        if everywhere and not stored and latents.requires_grad and torch.is_grad_enabled():
            statistics = sparse_statistics(support_of(latents.detach()), h, q)
            return dense_scores(latents, h, q, statistics)
        support = support_of(latents, also)
        if stored and not everywhere:
            support = support.constant_zeros(also)
        return sparse_scores(support, h, q)

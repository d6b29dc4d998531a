"""MonoScore of one batch, with a gradient: chooses the dense or the sparse way."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from monoloss_plugin.kernels.gradient import terms_of, with_dense_gradient, with_sparse_gradient
from monoloss_plugin.kernels.support import Support, is_sparse, support_of
from monoloss_plugin.sums import Scores, UnitEmbeddings

GradientAt = Literal["all", "active"] | Tensor
"""Which entries of the latents get a gradient. It means the same on every device and layout.

- "all": every entry.
- "active": the entries that are not zero. This is exact if the activation function passes no
  gradient to zeros (ReLU, TopK, BatchTopK, a gate).
- a (B, M) bool tensor: the entries that are not zero, and the entries of this mask (such as
  JumpReLU's band around its threshold).

Sparse COO latents can only have a gradient at the entries that they store.
"""


def batch_scores(latents: Tensor, embeddings: Tensor, gradient_at: GradientAt = "all") -> Scores:
    """Return MonoScore over a batch, differentiable in ``latents`` by the closed form.

    Sums are float32, or float64 if the latents are, also under autocast. On an accelerator nothing
    here waits for the device, unless COO latents are not coalesced.

    Args:
        latents: (B, M), dense or sparse COO.
        embeddings: (B, d); constants.
        gradient_at: which entries get a gradient.
    """
    dtype = torch.promote_types(latents.dtype, torch.float32)
    stored = latents.layout == torch.sparse_coo
    if latents.numel() == 0:  # no samples or no latents: nothing is defined
        nothing = (latents.to_dense() if stored else latents).to(dtype).sum(0)
        return Scores(nothing, torch.zeros_like(nothing, dtype=torch.bool))
    also = gradient_at if isinstance(gradient_at, Tensor) else None
    everywhere = also is None and gradient_at == "all"
    with torch.autocast(latents.device.type, enabled=False):
        unit = UnitEmbeddings.of(embeddings, dtype)
        if not is_sparse(latents, also):
            terms, defined = terms_of(latents.detach(), unit)
            return with_dense_gradient(latents, terms, defined, everywhere, also)
        if everywhere and not stored and latents.requires_grad and torch.is_grad_enabled():
            # Sparse latents are quick to sum, but zeros that are not listed want a gradient too.
            terms, defined = terms_of(support_of(latents.detach()), unit)
            return with_dense_gradient(latents, terms, defined, True, None)
        support: Support = support_of(latents, also)
        if stored and not everywhere:
            support = support.constant_zeros(also)
        terms, defined = terms_of(support, unit)
        return with_sparse_gradient(support, terms, defined)

"""MonoScore of one batch, with a gradient: chooses the dense or the sparse way."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from monoloss_plugin.groups import active_means, as_groups
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


def batch_scores(
    latents: Tensor,
    embeddings: Tensor,
    gradient_at: GradientAt = "all",
    groups: Tensor | None = None,
) -> Scores:
    """Return MonoScore over a batch, differentiable in ``latents`` by the closed form.

    Sums are float32, or float64 if the latents are, also under autocast. On an accelerator nothing
    here waits for the device, unless COO latents are not coalesced.

    Args:
        latents: (B, M), dense or sparse COO.
        embeddings: (B, d); constants.
        gradient_at: which entries get a gradient.
        groups: (B,) integers: pairs within a group are left out.
    """
    dtype = torch.promote_types(latents.dtype, torch.float32)
    stored = latents.layout == torch.sparse_coo
    if latents.numel() == 0:  # no samples or no latents: nothing is defined
        nothing = (latents.to_dense() if stored else latents).to(dtype).sum(0)
        return Scores(nothing, torch.zeros_like(nothing, dtype=torch.bool))
    also = gradient_at if isinstance(gradient_at, Tensor) else None
    everywhere = also is None and gradient_at == "all"
    with torch.autocast(latents.device.type, enabled=False):
        if groups is not None:
            groups = as_groups(groups, len(latents))
        unit = UnitEmbeddings.of(embeddings, dtype, groups)
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


def scores_by_active_means(
    latents: Tensor, features: Tensor, groups: Tensor, gradient_at: GradientAt = "all"
) -> Scores:
    """Return MonoScore over the groups of a batch, differentiable in ``latents``.

    A group is compared by the mean features of its samples that activate the latent
    (:func:`~monoloss_plugin.groups.active_means`). Latents that are zero get no gradient, but in a
    mask. An accelerator waits for the number of active latents.

    Args:
        latents: (B, M), at least 0; dense or sparse COO.
        features: (B, d), of the samples; constants.
        groups: (B,) integers.
        gradient_at: which entries get a gradient.
    """
    dtype = torch.promote_types(latents.dtype, torch.float32)
    if latents.numel() == 0:
        return batch_scores(latents, features)
    also = gradient_at if isinstance(gradient_at, Tensor) else None
    with torch.autocast(latents.device.type, enabled=False):
        of = as_groups(groups, len(latents)).to(latents.device)
        entries = support_of(latents, also)
        support, means = active_means(entries, features.detach().to(dtype), of)
        terms, defined = terms_of(support, UnitEmbeddings.of(means, dtype))
        return with_sparse_gradient(support, terms, defined)

"""The closed-form gradient of MonoScore over one batch.

With the sums of :mod:`monoloss_plugin.sums`, of ã rescaled to [0, 1], a latent's gradient at sample
i is

    g_i = pull / scale · (h_i·w - ã_i q_i - MS (u - ã_i)),     pull = 2 / (u² - v).

The minimum depends on the latents too. So the samples that attain it share the sum of g over all
samples, with the opposite sign, in equal parts, as autograd does for ``amin``. That sum is

    Σ_i g_i = pull / scale · (w·Σ h - p - MS (N u - r)).

The score does not depend on the maximum, and embeddings are constants. If samples come in groups,
A_i and Z_i of :mod:`monoloss_plugin.groups` take the place of ã_i and ã_i q_i in g_i.

Source: derived from Nasiri-Sarvi et al. 2026, eq. 2; the tests compare it with autograd.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from monoloss_plugin._checks import may_hold_any
from monoloss_plugin.groups import similarities_within, summed_within, within_entries
from monoloss_plugin.kernels.support import Support, products_at
from monoloss_plugin.sums import (
    CONSTANT_BELOW,
    Scores,
    UnitEmbeddings,
    column_blocks,
    dense_sums,
    monoscore_from_sums,
    range_of,
    rescaled,
    sparse_sums,
)

HARDEST_PULL = 10.0
"""A latent's gradient is bounded by this many times the bound of the median latent's gradient.

At one activation, |dMS/da| <= 4/r, where r is the latent's activation outside its strongest sample.
As r goes to 0 the score stays the same, and the gradient grows without bound. Such a latent is
active on hardly more than one sample; it would take a clipped step for itself alone, and its
gradient is mostly rounding. So if r is less than a tenth of the median latent's, the gradient is
multiplied by r over that tenth. Scores and the gradient's direction do not change.
"""


class Terms(NamedTuple):
    """What the gradient of a batch needs besides the latents."""

    h: Tensor
    """(N, d)"""
    q: Tensor
    """(N,)"""
    sum_h: Tensor
    """(d,)"""
    lowest: Tensor
    """(M,)"""
    scale: Tensor
    """(M,): max - min, or 1 for a constant latent."""
    u: Tensor
    """(M,)"""
    p: Tensor
    """(M,)"""
    r: Tensor
    """(M,)"""
    w: Tensor
    """(M, d)"""
    scores: Tensor
    """(M,)"""
    pull: Tensor
    """(M,): 2 / (u² - v), or less for a latent that is hardly defined; 0 if it is undefined."""
    groups: Tensor | None
    """(N,), or None."""

    def column_sums(self) -> Tensor:
        """Return each latent's Σ_i (h_i·w - ã_i q_i - MS (u - ã_i)), (M,)."""
        return self.w @ self.sum_h - self.p - self.scores * (len(self.h) * self.u - self.r)


@torch.no_grad()
def terms_of(latents: Tensor | Support, unit: UnitEmbeddings) -> tuple[Terms, Tensor]:
    """Return the gradient's terms, with the scores, and which latents are defined (M,)."""
    lowest, highest = (end.to(unit.h.dtype) for end in range_of(latents))
    span = highest - lowest
    # "not (small)" lets a NaN through to the score.
    scale = torch.where(~(span <= CONSTANT_BELOW), span, 1.0)
    if isinstance(latents, Support):
        sums = sparse_sums(latents, unit, lowest, scale)
    else:
        sums = dense_sums(latents, unit, lowest, scale)
    scores, defined = monoscore_from_sums(sums, span / scale)
    pull = 2 / sums.weight_of_pairs.masked_fill(~defined, 1.0)
    # Rescaled, the strongest sample is 1. The strongest group has about the root of v.
    strongest = 1 if unit.groups is None else sums.v.sqrt()
    pull = torch.where(defined, pull * _restraint(sums.u - strongest, scale, defined), 0.0)
    of_samples = unit.h, unit.q, unit.sums.sum_h
    of_latents = lowest, scale, sums.u, sums.p, sums.r, sums.w, scores, pull
    return Terms(*of_samples, *of_latents, unit.groups), defined


def _restraint(outside: Tensor, scale: Tensor, defined: Tensor) -> Tensor:
    """Return what to multiply each latent's gradient by (M,), from 0 to 1; see HARDEST_PULL.

    ``outside`` (M,) is the rescaled activation outside the latent's strongest sample or group.
    """
    outside = outside.clamp(min=0) * scale
    # Undefined latents become nan. To leave them out would make an accelerator wait for a shape.
    median = torch.where(defined, outside, torch.nan).nanmedian()
    return (outside * (HARDEST_PULL / median)).clamp(max=1)


def with_dense_gradient(
    latents: Tensor, terms: Terms, defined: Tensor, everywhere: bool, also: Tensor | None
) -> Scores:
    """Return the scores, with the gradient of dense latents.

    Args:
        latents: (N, M).
        terms: of these latents.
        defined: (M,) bool.
        everywhere: every entry gets a gradient; or else only those that are not zero.
        also: (N, M) bool: more entries that get one.
    """
    scores: Tensor = _DenseGradient.apply(latents, everywhere, also, *terms)
    return Scores(scores, defined)


def with_sparse_gradient(support: Support, terms: Terms, defined: Tensor) -> Scores:
    """Return the scores, with the gradient of the listed entries."""
    entries = (support.rows, support.columns, support.offsets)
    scores: Tensor = _SparseGradient.apply(support.values, *entries, *terms)
    return Scores(scores, defined)


class _DenseGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, latents: Tensor, everywhere: bool, also: Tensor | None, *terms: Any
    ) -> Tensor:
        ctx.save_for_backward(latents, also, *terms)
        ctx.everywhere = everywhere
        return Terms(*terms).scores.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        latents, also, *saved = ctx.saved_tensors
        terms = Terms(*saved)
        gradient = torch.empty_like(latents)
        with torch.autocast(latents.device.type, enabled=False):
            groups = terms.groups
            similar = None if groups is None else similarities_within(terms.h, groups)
            pull, column_sums = upstream[0] * terms.pull / terms.scale, terms.column_sums()
            for block in column_blocks(latents):
                a = rescaled(latents[:, block], terms.lowest[block], terms.scale[block])
                at_minimum = a == 0
                part = terms.h @ terms.w[block].T
                part -= terms.scores[block] * terms.u[block]
                if groups is None or similar is None:
                    part += a.mul_(terms.scores[block] - terms.q.unsqueeze(1))
                else:
                    part += terms.scores[block] * summed_within(a, groups) - similar @ a
                share = column_sums[block] / at_minimum.sum(0, dtype=a.dtype)
                part -= torch.mul(at_minimum, share, out=a)
                part *= pull[block]
                if not ctx.everywhere:
                    zero = latents[:, block] == 0
                    part.masked_fill_(zero if also is None else zero & ~also[:, block], 0.0)
                gradient[:, block] = part
        return gradient, *((2 + len(terms)) * [None])


class _SparseGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        rows: Tensor,
        columns: Tensor,
        offsets: Tensor,
        *terms: Any,
    ) -> Tensor:
        ctx.save_for_backward(values, rows, columns, offsets, *terms)
        return Terms(*terms).scores.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        values, rows, columns, offsets, *saved = ctx.saved_tensors
        terms = Terms(*saved)
        with torch.autocast(values.device.type, enabled=False):

            def of_latents(value: Tensor) -> Tensor:
                return value.index_select(0, columns)

            a = rescaled(values, of_latents(terms.lowest), of_latents(terms.scale))
            gradient = products_at(rows, offsets, terms.w, terms.h)
            gradient -= of_latents(terms.scores * terms.u)
            if terms.groups is None:
                gradient += a * (of_latents(terms.scores) - terms.q.index_select(0, rows))
            else:
                support = Support(rows, columns, offsets, values, len(terms.h))
                weight, similarity = within_entries(support, a, terms.h, terms.groups)
                gradient += weight * of_latents(terms.scores) - similarity
            at_minimum = a == 0
            # A usual batch has its minima at zeros, which are not listed.
            if may_hold_any(at_minimum):
                listed = torch.zeros_like(terms.u).index_add_(0, columns, at_minimum.to(a.dtype))
                unlisted = torch.where(terms.lowest == 0, len(terms.h) - offsets.diff(), 0)
                share = terms.column_sums() / (listed + unlisted).clamp(min=1)
                gradient -= at_minimum * of_latents(share)
            gradient *= of_latents(upstream[0] * terms.pull / terms.scale)
        return gradient.to(values.dtype), *((3 + len(terms)) * [None])

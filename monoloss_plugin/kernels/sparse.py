"""MonoScore of one batch of sparse latents: every sum, and the gradient, over the support alone.

The sums over a latent's entries are those of :mod:`monoloss_plugin.kernels.dense`. Zeros that are
not listed matter in two places. Where activations are negative, the minimum lies below them, and
every one of them is ã = drop > 0: the sums are completed from n, Σ h and Σ q. And the gradient's
column sum, which the rows at the minimum share, runs over all rows:

    Σ_i (h_i·w - ã_i q_i - MS (u - ã_i)) = Σ h · w - Σ ã q - MS (n - 1) u.

So the gradient is the dense one at every listed entry. Whether that is enough is the caller's
knowledge: a ReLU, a TopK or a BatchTopK passes no gradient to entries that are zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from monoloss_plugin._checks import may_hold_any
from monoloss_plugin.kernels.statistics import BatchScores, Raised, Range, Statistics
from monoloss_plugin.kernels.support import Support, products_at


def sparse_statistics(support: Support, h: Tensor, q: Tensor) -> Statistics:
    """Return the statistics of sparse latents, with no gradient.

    Args:
        support: the latents' entries.
        h: (N, d) unit embeddings, in the dtype of the sums.
        q: (N,): ||h||².
    """
    with torch.no_grad():
        return _Sums(support, h, q).statistics


def sparse_scores(support: Support, h: Tensor, q: Tensor) -> BatchScores:
    """Return the scores, with the gradient of the listed entries.

    Args:
        support: the latents' entries; their values carry the gradient.
        h: (N, d), as in :func:`sparse_statistics`.
        q: (N,), as there.
    """
    with torch.no_grad():
        sums = _Sums(support, h, q)
    scores: Tensor = _SparseScores.apply(support.values, sums)
    return BatchScores(scores, sums.statistics.defined)


class _Sums:
    """The rescaled entries of a batch and the statistics of its latents."""

    def __init__(self, support: Support, h: Tensor, q: Tensor) -> None:
        self.support = support
        self.h = h
        self.q = q
        lowest, highest = (end.to(h.dtype) for end in support.extremes())
        self.range = Range.between(lowest, highest)
        # Entries are measured from zero, or from the minimum where every sample has one: activity
        # far above zero then loses nothing to rounding.
        complete = support.complete()
        base = torch.where(complete, lowest, 0.0)
        self.drop = torch.where(complete, 0.0, -lowest) / self.range.scale
        columns = support.columns
        self.a = (support.values.to(h.dtype) - base[columns]) / self.range.scale[columns]
        self.statistics = self._statistics()

    def _statistics(self) -> Statistics:
        a, q = self.a, self.q[self.support.rows]
        squares = a.square()
        u, v = self.support.sums(a), self.support.sums(squares)
        t, w = self.support.sums(squares * q), self.support.weighted_sums(a, self.h)
        if may_hold_any(self.drop):  # some minimum lies below zero
            n, sum_q, p = self.support.num_rows, self.q.sum(), self.support.sums(a * q)
            u, v, t, _ = Raised.by(self.drop, n, sum_q, u=u, v=v, t=t, p=p)
            w = torch.addr(w, self.drop, self.h.sum(0))
        return Statistics.of(self.range, u, v, t, w)

    def shifted(self) -> Tensor:
        """Return ã of the entries (E,)."""
        return self.a + self.drop[self.support.columns]

    def share_at_minimum(self, shifted: Tensor) -> Tensor | None:
        """Return the gradient's column sum over the number of rows at the minimum (M,).

        None where no entry is at its latent's minimum: the usual batch, whose zeros are unlisted.
        """
        support, (_, u, w, scores, _, _) = self.support, self.statistics
        at_minimum = shifted == 0
        if not may_hold_any(at_minimum):
            return None
        q = self.q[support.rows]
        unlisted_q = self.q.sum() - support.sums(q)
        p = support.sums(shifted * q) + self.drop * unlisted_q
        column_sum = w @ self.h.sum(0) - p - scores * (support.num_rows - 1) * u
        unlisted = torch.where(self.drop == 0, support.num_rows - support.counts(), 0)
        attained = support.sums(at_minimum.to(u.dtype)) + unlisted
        return column_sum / attained.clamp(min=1)


class _SparseScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, sums: _Sums) -> Tensor:
        support, (range_, u, w, scores, _, weight) = sums.support, sums.statistics
        shifted = sums.shifted()
        ctx.save_for_backward(
            shifted,
            sums.h,
            sums.q,
            support.rows,
            support.columns,
            support.offsets,
            u,
            w,
            scores,
            weight / range_.scale,
            sums.share_at_minimum(shifted),
        )
        ctx.dtype = values.dtype
        return scores.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        a, h, q, rows, columns, offsets, u, w, scores, weight, share = ctx.saved_tensors
        with torch.autocast(a.device.type, enabled=False):
            gradient = products_at(rows, offsets, w, h)
            gradient -= (scores * u)[columns]
            gradient += a * (scores[columns] - q[rows])
            if share is not None:
                gradient -= (a == 0) * share[columns]
            gradient *= (upstream[0] * weight)[columns]
        return gradient.to(ctx.dtype), None

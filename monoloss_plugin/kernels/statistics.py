"""What every way of scoring a batch ends in: from a latent's sums to its score."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_DEFINED_ABOVE = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Smallest den of activations rescaled to [0, 1] that is more than rounding noise.

den is small only where one sample holds nearly all of a latent's activation: u² - v and ||w||² - t
then cancel, and at 1e-5 a float32 score is still good to about one percent.
"""


CONSTANT_BELOW = torch.finfo(torch.float32).tiny
"""A latent whose range over the samples is at most this, 1.2e-38, counts as constant.

Its gradient, which grows as one over the range, would be beyond float32.
"""

HARDEST_PULL = 10.0
"""A latent's gradient may be bounded by this many times what the median latent's is bounded by.

At one activation, |dMS/da| <= 4/r, where r is the latent's activation outside its strongest sample.
As r goes to 0 the score stays what it is, and the gradient grows without bound: such a latent, seen
on hardly more than one sample, would take a clipped step for itself alone, and blow rounding up.
So where r is less than a tenth of the median latent's, the gradient is scaled down, by r over that
tenth. No score and no direction changes.
"""


class BatchScores(NamedTuple):
    """MonoScore of each latent over one batch."""

    scores: Tensor
    """(M,), 0 where undefined; differentiable in the latents."""
    defined: Tensor
    """(M,) bool: the latent has a score in this batch."""


class Range(NamedTuple):
    """The range of each latent over a batch."""

    lowest: Tensor
    """(M,)"""
    scale: Tensor
    """(M,): max - min, or 1 where that is zero."""
    varies: Tensor
    """(M,) bool"""

    @classmethod
    def between(cls, lowest: Tensor, highest: Tensor) -> Range:
        """Return the range of latents from their smallest and largest values (M,)."""
        span = highest - lowest
        # NaN activations compare as False; "not (small)" lets them through to the logged value.
        varies = ~(span <= CONSTANT_BELOW)
        return cls(lowest, torch.where(varies, span, 1.0), varies)


class Statistics(NamedTuple):
    """A batch's sums over ã, activations rescaled to [0, 1], and what follows from them."""

    range: Range
    u: Tensor
    """(M,): Σ ã"""
    w: Tensor
    """(M, d): Σ ã h"""
    scores: Tensor
    """(M,): MonoScore, 0 where undefined."""
    defined: Tensor
    """(M,) bool"""
    weight: Tensor
    """(M,): 2 / den, 0 where undefined: dMS/dã = weight · (h·w - ã q - MS (u - ã)).

    Less than that for a latent that is hardly defined (see :data:`HARDEST_PULL`)."""

    @classmethod
    def of(cls, range_: Range, u: Tensor, v: Tensor, t: Tensor, w: Tensor) -> Statistics:
        """Conclude from the sums u, v, t (M,) and w (M, d)."""
        denominator = u.square() - v
        defined = ~(denominator <= _DEFINED_ABOVE[u.dtype]) & range_.varies
        safe = torch.where(defined, denominator, 1.0)
        scores = torch.where(defined, (torch.linalg.vector_norm(w, dim=1).square() - t) / safe, 0.0)
        weight = torch.where(defined, 2.0 / safe * _restraint(range_, u, defined), 0.0)
        return cls(range_, u, w, scores, defined, weight)


def _restraint(range_: Range, u: Tensor, defined: Tensor) -> Tensor:
    """Return what to scale each latent's gradient by (M,), from 0 to 1."""
    outside = (u - 1).clamp(min=0) * range_.scale  # rescaled, the strongest sample is 1
    # With nan for the others, so that no shape depends on a value.
    median = torch.where(defined, outside, torch.nan).nanmedian()
    return (outside * (HARDEST_PULL / median)).clamp(max=1)


class Raised(NamedTuple):
    """Sums over ã + drop."""

    u: Tensor
    """(M,): Σ ã"""
    v: Tensor
    """(M,): Σ ã²"""
    t: Tensor
    """(M,): Σ ã² q"""
    p: Tensor
    """(M,): Σ ã q"""

    @classmethod
    def by(
        cls,
        drop: Tensor,
        n: Tensor | int,
        sum_q: Tensor,
        *,
        u: Tensor,
        v: Tensor,
        t: Tensor,
        p: Tensor,
    ) -> Raised:
        """Return the sums u, v, t, p (M,) after the minimum fell by ``drop`` (M,), at n samples.

        w becomes w + drop Σ h.
        """
        return cls(
            u=u + drop * n,
            v=v + drop * (2 * u + drop * n),
            t=t + drop * (2 * p + drop * sum_q),
            p=p + drop * sum_q,
        )

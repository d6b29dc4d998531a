"""MonoScore of one batch of dense latents, with its closed-form gradient.

With ã = (a - min) / (max - min) over the batch and the sums of :mod:`monoloss_plugin.moments`,

    dMS/da_i = 2 / ((max - min) den) · (h_i·w - ã_i q_i - MS (u - ã_i)),   den = u² - v,

and the sum of the column, with the opposite sign, on the rows that attain the minimum (shared
equally among them, as autograd does for ``amin``). MS does not depend on the maximum.

Latents are taken in a few blocks of columns, so that what is rescaled, squared or cast exists for
one block of about an eighth at a time; only the gradient has the size of the activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from monoloss_plugin.kernels.products import weighted_embeddings
from monoloss_plugin.kernels.statistics import BatchScores, Range, Statistics

_BLOCKS = 8
_NARROWEST_BLOCK = 256


def dense_statistics(latents: Tensor, h: Tensor, q: Tensor) -> Statistics:
    """Return the statistics of latents (B, M), from one matrix product.

    Args:
        latents: (B, M), neither empty.
        h: (B, d) unit embeddings, in the dtype of the sums.
        q: (B,): ||h||².
    """
    parts = []
    for block in _blocks(latents):
        columns = latents[:, block].detach()
        range_ = Range.between(columns.amin(0).to(h.dtype), columns.amax(0).to(h.dtype))
        a = _rescaled(columns, range_.lowest, range_.scale)
        u, w = a.sum(0), weighted_embeddings(a, h)
        squares = a.square()
        parts.append((*range_, u, squares.sum(0), q @ squares, w))
    lowest, scale, varies, u, v, t, w = (torch.cat(part) for part in zip(*parts, strict=True))
    return Statistics.of(Range(lowest, scale, varies), u, v, t, w)


def dense_scores(
    latents: Tensor,
    h: Tensor,
    q: Tensor,
    statistics: Statistics,
    *,
    everywhere: bool = True,
    also: Tensor | None = None,
) -> BatchScores:
    """Return the scores with the gradient of entries of latents (B, M).

    Args:
        latents: (B, M).
        h: (N, d), as in :func:`dense_statistics`.
        q: (N,), as there.
        statistics: of these latents, from whichever way.
        everywhere: every entry gets a gradient; or else those that are not zero.
        also: (B, M) bool: besides those, zeros that get one.
    """
    range_, u, w, scores, defined, weight = statistics
    differentiable: Tensor = _DenseScores.apply(
        latents, h, q, range_.lowest, range_.scale, u, w, scores, weight, everywhere, also
    )
    return BatchScores(differentiable, defined)


class _DenseScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        latents: Tensor,
        h: Tensor,
        q: Tensor,
        lowest: Tensor,
        scale: Tensor,
        u: Tensor,
        w: Tensor,
        scores: Tensor,
        weight: Tensor,
        everywhere: bool,
        also: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(latents, h, q, lowest, scale, u, w, scores, weight, also)
        ctx.everywhere = everywhere
        return scores.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        latents, h, q, lowest, scale, u, w, scores, weight, also = ctx.saved_tensors
        gradient = torch.empty_like(latents)
        factor = upstream[0] * weight / scale
        with torch.autocast(latents.device.type, enabled=False):
            for block in _blocks(latents):
                a = _rescaled(latents[:, block], lowest[block], scale[block])
                part = _gradient(a, h, q, u[block], w[block], scores[block], factor[block])
                if not ctx.everywhere:
                    zero = latents[:, block] == 0
                    part.masked_fill_(zero if also is None else zero & ~also[:, block], 0.0)
                gradient[:, block] = part
        return gradient, *(10 * [None])


def _blocks(latents: Tensor) -> list[slice]:
    """Column ranges of ``latents``, a handful however wide it is."""
    width = max(_NARROWEST_BLOCK, -(-latents.shape[1] // _BLOCKS))
    return [slice(start, start + width) for start in range(0, latents.shape[1], width)]


def _rescaled(latents: Tensor, lowest: Tensor, scale: Tensor) -> Tensor:
    return latents.to(lowest.dtype).sub(lowest).div_(scale)


def _gradient(
    a: Tensor, h: Tensor, q: Tensor, u: Tensor, w: Tensor, scores: Tensor, factor: Tensor
) -> Tensor:
    """Return the gradient of a block of rescaled latents (B, m), which it uses up."""
    at_minimum = a == 0
    gradient = h @ w.T
    gradient -= scores * u
    gradient += a.mul_(scores - q.unsqueeze(1))
    shares = gradient.sum(0) / at_minimum.sum(0, dtype=a.dtype)
    gradient -= torch.mul(at_minimum, shares, out=a)
    return gradient.mul_(factor)

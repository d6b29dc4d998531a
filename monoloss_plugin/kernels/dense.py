"""MonoScore of one batch of dense latents, with its closed-form gradient.

With ã = (a - min) / (max - min) over the batch and the sums of :mod:`monoloss_plugin.moments`,

    dMS/da_i = 2 / ((max - min) den) · (h_i·w - ã_i q_i - MS (u - ã_i)),   den = u² - v,

and the sum of the column, with the opposite sign, on the rows that attain the minimum (shared
equally among them, as autograd does for ``amin``). MS does not depend on the maximum.

Latents are taken in a few blocks of columns, so that what is rescaled, squared or cast exists for
one block of about an eighth at a time; only the gradient has the size of the activations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from monoloss_plugin.embeddings import unit_rows

_BLOCKS = 8
_NARROWEST_BLOCK = 256
_DEFINED_ABOVE = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Smallest den of activations rescaled to [0, 1] that is more than rounding noise.

den is small only where one sample holds nearly all of a latent's activation: u² - v and ||w||² - t
then cancel, and at 1e-5 a float32 score is still good to about one percent.
"""


class BatchScores(NamedTuple):
    """MonoScore of each latent over one batch."""

    scores: Tensor
    """(M,), 0 where undefined; differentiable in the latents."""
    defined: Tensor
    """(M,) bool: the latent has a score in this batch."""


def batch_scores(latents: Tensor, embeddings: Tensor) -> BatchScores:
    """Return MonoScore over a batch, differentiable in ``latents`` by the closed form.

    Sums are taken in float32, or in float64 where the latents are float64, whatever autocast says.
    Nothing here waits for the device.

    Args:
        latents: (B, M) dense.
        embeddings: (B, d); constants.
    """
    dtype = torch.promote_types(latents.dtype, torch.float32)
    if latents.numel() == 0:  # no samples or no latents: nothing is defined
        nothing = latents.to(dtype).sum(0)
        return BatchScores(nothing, torch.zeros_like(nothing, dtype=torch.bool))
    with torch.autocast(latents.device.type, enabled=False):
        h, q = unit_rows(embeddings, dtype)
        scores, defined = _DenseScores.apply(latents, h, q)
    return BatchScores(scores, defined)


class _DenseScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        latents: Tensor,
        h: Tensor,
        q: Tensor,
    ) -> tuple[Tensor, Tensor]:
        parts = [_block_forward(latents[:, block], h, q) for block in _blocks(latents)]
        lowest, scale, u, w, weight, scores, defined = (
            torch.cat([part[i] for part in parts]) for i in range(7)
        )
        ctx.save_for_backward(latents, h, q, lowest, scale, u, w, weight, scores)
        ctx.mark_non_differentiable(defined)
        return scores, defined

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        latents, h, q, lowest, scale, u, w, weight, scores = ctx.saved_tensors
        gradient = torch.empty_like(latents)
        with torch.autocast(latents.device.type, enabled=False):
            for block in _blocks(latents):
                gradient[:, block] = _block_backward(
                    latents[:, block],
                    h,
                    q,
                    lowest[block],
                    scale[block],
                    u[block],
                    w[block],
                    scores[block],
                    upstream[0][block] * weight[block],
                )
        return gradient, None, None


def _blocks(latents: Tensor) -> list[slice]:
    """Column ranges of ``latents``, a handful however wide it is."""
    width = max(_NARROWEST_BLOCK, -(-latents.shape[1] // _BLOCKS))
    return [slice(start, start + width) for start in range(0, latents.shape[1], width)]


def _rescaled(latents: Tensor, lowest: Tensor, scale: Tensor) -> Tensor:
    return latents.to(lowest.dtype).sub(lowest).div(scale)


def _block_forward(latents: Tensor, h: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    lowest = latents.amin(0).to(h.dtype)
    span = latents.amax(0).to(h.dtype) - lowest
    varies = span > torch.finfo(h.dtype).tiny
    scale = torch.where(varies, span, 1.0)

    a = _rescaled(latents, lowest, scale)
    u = a.sum(0)
    w = a.T @ h
    squares = a.square()
    v = squares.sum(0)
    t = q @ squares

    denominator = u.square() - v
    # NaN activations compare as False; "not (small)" lets them through to the logged value.
    defined = ~(denominator <= _DEFINED_ABOVE[h.dtype]) & ~(span <= torch.finfo(h.dtype).tiny)
    safe = torch.where(defined, denominator, 1.0)
    scores = torch.where(defined, (w.square().sum(1) - t) / safe, 0.0)
    weight = torch.where(defined, 2.0 / (safe * scale), 0.0)
    return lowest, scale, u, w, weight, scores, defined


def _block_backward(
    latents: Tensor,
    h: Tensor,
    q: Tensor,
    lowest: Tensor,
    scale: Tensor,
    u: Tensor,
    w: Tensor,
    scores: Tensor,
    weight: Tensor,
) -> Tensor:
    a = _rescaled(latents, lowest, scale)
    at_minimum = a == 0
    gradient = h @ w.T
    gradient -= scores * u
    gradient += a.mul_(scores - q.unsqueeze(1))
    gradient -= at_minimum * (gradient.sum(0) / at_minimum.sum(0))
    return gradient.mul_(weight)

"""The MonoLoss paper's algorithms for MonoScore, and a third way, in plain torch.

They are written from the paper's text. Experiments and benchmarks compare this package with them.

Source: Nasiri-Sarvi et al. 2026, sections 3.1, 3.2 and 3.4.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

EPSILON = 1e-8
"""What the algorithms divide by at least."""


def pairwise_monoscore(latents: Tensor, embeddings: Tensor, block: int = 256) -> Tensor:
    """Return MonoScore (M,) by Algorithm 1: each sample against blocks of the samples after it.

    Args:
        latents: (N, M), dense.
        embeddings: (N, d).
        block: B_pair, the number of samples in a block; the paper does not give it.
    """
    lowest, highest = range_over([latents])
    a = (latents - lowest) / (highest - lowest).clamp(min=EPSILON)
    h = normalize(embeddings, dim=1)
    numerator, denominator = torch.zeros_like(lowest), torch.zeros_like(lowest)
    for n in range(len(a) - 1):
        for start in range(n + 1, len(a), block):
            products = a[start : start + block] * a[n]
            numerator += (h[start : start + block] @ h[n]) @ products
            denominator += products.sum(0)
    return numerator / denominator.clamp(min=EPSILON)


def pairwise_by_products(latents: Tensor, embeddings: Tensor, block: int = 1024) -> Tensor:
    """Return MonoScore (M,) by its definition, as matrix products of blocks of samples.

    It is no algorithm of the paper. It does the same arithmetic as Algorithm 1, in a form that
    hardware is made for: how much of a gain over Algorithm 1 comes from the order N alone?

    Args:
        latents: (N, M), dense.
        embeddings: (N, d).
        block: number of samples in a block. Memory grows with block · N.
    """
    lowest, highest = range_over([latents])
    a = (latents - lowest) / (highest - lowest).clamp(min=EPSILON)
    h = normalize(embeddings, dim=1)
    numerator, denominator = torch.zeros_like(lowest), torch.zeros_like(lowest)
    for start in range(0, len(a), block):
        anchors = a[start : start + block]
        # Row i of a block pairs its sample with those after it: the part above the diagonal.
        similarity = (h[start : start + block] @ h[start:].T).triu(1)
        numerator += (anchors * (similarity @ a[start:])).sum(0)
        denominator += (anchors * (torch.ones_like(similarity).triu(1) @ a[start:])).sum(0)
    return numerator / denominator.clamp(min=EPSILON)


def two_pass_monoscore(batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return MonoScore (M,) by Algorithm 2: a pass for the range, and one for the sums.

    Args:
        batches: of latents (B, M), dense, and embeddings (B, d).
    """
    lowest, highest = range_over(latents for latents, _ in batches)
    sums = LinearSums(lowest, highest, batches[0][1].shape[1])
    for latents, embeddings in batches:
        sums.add(latents, embeddings)
    return sums.scores()


def range_over(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest activation of each latent (M,) over batches (B, M)."""
    lowest: Tensor | None = None
    highest: Tensor | None = None
    for latents in batches:
        low, high = latents.amin(0), latents.amax(0)
        lowest = low if lowest is None else torch.minimum(lowest, low)
        highest = high if highest is None else torch.maximum(highest, high)
    assert lowest is not None
    assert highest is not None
    return lowest, highest


class LinearSums:
    """u, v and w of Algorithm 2 over batches, for latents of a known range (M,)."""

    def __init__(self, lowest: Tensor, highest: Tensor, width: int) -> None:
        self.lowest = lowest
        self.span = (highest - lowest).clamp(min=EPSILON)
        self.u, self.v = torch.zeros_like(lowest), torch.zeros_like(lowest)
        self.w = lowest.new_zeros(len(lowest), width)

    def add(self, latents: Tensor, embeddings: Tensor) -> None:
        """Add a batch: latents (B, M) and embeddings (B, d)."""
        a = (latents - self.lowest) / self.span
        self.u += a.sum(0)
        self.v += a.square().sum(0)
        self.w += a.T @ normalize(embeddings, dim=1)

    def scores(self) -> Tensor:
        """Return MonoScore (M,) of all batches; 0 where undefined."""
        numerator = (self.w.square().sum(1) - self.v) / 2
        denominator = (self.u.square() - self.v) / 2
        return torch.where(
            denominator > 0, numerator / denominator.clamp(min=EPSILON), torch.zeros_like(self.u)
        )

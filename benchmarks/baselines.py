"""The papers' algorithms, written from the papers' text in plain torch: what we are measured by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

_EPSILON = 1e-8


def pairwise_monoscore(latents: Tensor, embeddings: Tensor, block: int = 256) -> Tensor:
    """Algorithm 1: anchors one by one, each against blocks of the samples after it."""
    lowest, highest = latents.amin(0), latents.amax(0)
    a = (latents - lowest) / (highest - lowest).clamp(min=_EPSILON)
    h = normalize(embeddings, dim=1)
    numerator, denominator = torch.zeros_like(lowest), torch.zeros_like(lowest)
    for n in range(len(a) - 1):
        for start in range(n + 1, len(a), block):
            products = a[start : start + block] * a[n]
            numerator += (h[start : start + block] @ h[n]) @ products
            denominator += products.sum(0)
    return numerator / denominator.clamp(min=_EPSILON)


def two_pass_monoscore(batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Algorithm 2, over latents in memory: a pass for the range, and one for the sums."""
    lowest, highest = _range(latents for latents, _ in batches)
    sums = _LinearSums(lowest, highest, batches[0][1].shape[1])
    for latents, embeddings in batches:
        sums.add(latents, embeddings)
    return sums.scores()


def two_pass_evaluation(
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
    num_classes: int,
) -> dict[str, Tensor]:
    """Every metric of the papers, with a second pass through the encoder for Algorithm 2."""
    lowest, highest = _range(encode(x) for x, _ in batches)
    sums = _LinearSums(lowest, highest, batches[0][0].shape[1])
    width, num_latents = batches[0][0].shape[1], len(lowest)
    counts = lowest.new_zeros(num_classes, num_latents)
    activation = lowest.new_zeros(num_classes, num_latents)
    active = lowest.new_zeros(num_latents)
    error, total, squares = (lowest.new_zeros(width) for _ in range(3))
    samples = 0
    for x, labels in batches:
        latents = encode(x)
        sums.add(latents, x)
        on = (latents > 0).to(latents.dtype)
        active += on.sum(0)
        counts.index_add_(0, labels, on)
        activation.index_add_(0, labels, latents)
        error += (x - decode(latents)).square().sum(0)
        total += x.sum(0)
        squares += x.square().sum(0)
        samples += len(x)
    dominant = counts.argmax(0, keepdim=True)
    return {
        "monoscore": sums.scores(),
        "purity_binary": counts.gather(0, dominant).squeeze(0) / counts.sum(0),
        "purity_weighted": activation.gather(0, dominant).squeeze(0) / activation.sum(0),
        "r2": (1 - error / (squares - total.square() / samples)).mean(),
        "l0": active.sum() / samples,
    }


def batch_loss(latents: Tensor, embeddings: Tensor) -> Tensor:
    """MonoLoss of a batch by Algorithm 2: a min-max normalised copy, a product, and autograd."""
    lowest, highest = latents.amin(0), latents.amax(0)
    a = (latents - lowest) / (highest - lowest).clamp(min=_EPSILON)
    h = normalize(embeddings, dim=1)
    u, v, w = a.sum(0), a.square().sum(0), a.T @ h
    numerator = (w.square().sum(1) - v) / 2
    denominator = (u.square() - v) / 2
    active = denominator > _EPSILON
    if not bool(active.any()):
        return 1 + 0 * latents.sum()
    return 1 - (numerator[active] / denominator[active]).mean()


def _range(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    lowest: Tensor | None = None
    highest: Tensor | None = None
    for latents in batches:
        low, high = latents.amin(0), latents.amax(0)
        lowest = low if lowest is None else torch.minimum(lowest, low)
        highest = high if highest is None else torch.maximum(highest, high)
    assert lowest is not None
    assert highest is not None
    return lowest, highest


class _LinearSums:
    """u, v and w of Algorithm 2 over batches."""

    def __init__(self, lowest: Tensor, highest: Tensor, width: int) -> None:
        self.lowest = lowest
        self.span = (highest - lowest).clamp(min=_EPSILON)
        self.u, self.v = torch.zeros_like(lowest), torch.zeros_like(lowest)
        self.w = lowest.new_zeros(len(lowest), width)

    def add(self, latents: Tensor, embeddings: Tensor) -> None:
        a = (latents - self.lowest) / self.span
        self.u += a.sum(0)
        self.v += a.square().sum(0)
        self.w += a.T @ normalize(embeddings, dim=1)

    def scores(self) -> Tensor:
        numerator = (self.w.square().sum(1) - self.v) / 2
        denominator = (self.u.square() - self.v) / 2
        return torch.where(
            denominator > 0, numerator / denominator.clamp(min=_EPSILON), torch.zeros_like(self.u)
        )

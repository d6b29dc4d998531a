"""The papers' algorithms, written from the papers' text in plain torch: what we are measured by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn.functional import normalize

from monoloss_plugin.reproduce.algorithms import EPSILON, LinearSums, range_over


def two_pass_evaluation(
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
    num_classes: int,
) -> dict[str, Tensor]:
    """Every metric of the papers, with a second pass through the encoder for Algorithm 2."""
    lowest, highest = range_over(encode(x) for x, _ in batches)
    sums = LinearSums(lowest, highest, batches[0][0].shape[1])
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
    a = (latents - lowest) / (highest - lowest).clamp(min=EPSILON)
    h = normalize(embeddings, dim=1)
    u, v, w = a.sum(0), a.square().sum(0), a.T @ h
    numerator = (w.square().sum(1) - v) / 2
    denominator = (u.square() - v) / 2
    active = denominator > EPSILON
    if not bool(active.any()):
        return 1 + 0 * latents.sum()
    return 1 - (numerator[active] / denominator[active]).mean()

"""What a step of fine-tuning must come to, written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from monoloss_plugin import functional
from monoloss_plugin.finetuning import LatentRecorder


class ByHand(NamedTuple):
    """What a fine-tuning step must come to."""

    loss: float
    scores: Tensor
    """The MonoLoss of each micro-batch."""
    gradients: dict[str, Tensor]


def step_by_hand(
    model: nn.Module,
    run: Callable[[nn.Module], Tensor],
    target: Tensor,
    h: Tensor,
    *,
    lam: float = 0.5,
    micro: int | None = None,
    entropy: bool = True,
) -> ByHand:
    """Cross-entropy over all samples, and ``lam`` times the mean of the micro-batches' MonoLoss."""
    recorder = LatentRecorder(model)
    logits = run(model)
    size = micro or len(h)
    parts = zip(recorder.take().split(size), h.split(size), strict=True)
    scores = torch.stack([functional.monoloss(a, e) for a, e in parts])
    loss = lam * scores.mean()
    if entropy:
        loss = loss + nn.functional.cross_entropy(logits, target)
    loss.backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
    return ByHand(loss.item(), scores.detach(), gradients)

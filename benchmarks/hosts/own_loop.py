"""A step of a training loop of one's own, with a TopK SAE in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.data import Shape, features
from monoloss_plugin import MonoLoss, attach

SHAPE = Shape(latents=4096, k=32)


class TopK(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        kept = z.relu().topk(SHAPE.k, dim=-1)
        return torch.zeros_like(z).scatter(-1, kept.indices, kept.values)


def make_step(attached: bool) -> Callable[[], object]:
    """Return a function that trains one step, with MonoLoss or without."""
    sae = nn.Sequential(
        nn.Linear(SHAPE.width, SHAPE.latents), TopK(), nn.Linear(SHAPE.latents, SHAPE.width)
    )
    x = features(SHAPE.batch, SHAPE, torch.device("cpu"))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4)
    loss = MonoLoss(lam=3e-4)
    term = attach(sae, loss, latents="1", reduction="mean", gradient_at="active")
    if not attached:
        term.remove()

    def step() -> None:
        optimizer.zero_grad()
        error = (sae(x) - x).square().mean()
        (error + term() if attached else error).backward()
        optimizer.step()

    return step

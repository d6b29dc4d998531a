"""A step of overcomplete's train_sae, with its BatchTopKSAE."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from overcomplete.sae import BatchTopKSAE, train_sae
from torch import Tensor

from benchmarks.data import Shape, features
from monoloss_plugin import MonoLoss
from monoloss_plugin.adapters.overcomplete import add_loss

SHAPE = Shape(latents=4096, k=32)


def mse(x: Tensor, x_hat: Tensor, *more: Tensor) -> Tensor:
    return (x - x_hat).square().mean()


def make_step(attached: bool) -> Callable[[], object]:
    """Return a function that trains one step, with MonoLoss or without."""
    sae = BatchTopKSAE(SHAPE.width, SHAPE.latents, top_k=SHAPE.k * SHAPE.batch)
    x = features(SHAPE.batch, SHAPE, torch.device("cpu"))
    criterion = add_loss(mse, MonoLoss(lam=3e-4)) if attached else mse
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4)
    return partial(train_sae, sae, [x], criterion, optimizer, nb_epochs=1, monitoring=0)

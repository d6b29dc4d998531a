"""A step of SAELens's trainer, with its BatchTopK SAE."""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat

import torch

from benchmarks.data import Shape, features
from benchmarks.setting import Setting
from benchmarks.trainer import batchtopk_trainer
from monoloss_plugin import MonoLoss
from monoloss_plugin.adapters.sae_lens import add_loss

SHAPE = Shape(latents=4096, k=32)


def make_step(attached: bool) -> Callable[[], object]:
    """Return a function that trains one step, with MonoLoss or without."""
    setting = Setting(torch.device("cpu"), False, SHAPE)
    x = features(SHAPE.batch, SHAPE, setting.device)
    trainer = batchtopk_trainer(setting, repeat(x))
    if attached:
        add_loss(trainer, MonoLoss(lam=3e-4))
    return lambda: trainer.step(x)

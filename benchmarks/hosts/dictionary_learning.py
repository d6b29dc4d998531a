"""A step of dictionary_learning's BatchTopKTrainer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch
from dictionary_learning.trainers import BatchTopKTrainer

from benchmarks.data import Shape, features
from monoloss_plugin import MonoLoss
from monoloss_plugin.adapters.dictionary_learning import add_loss

SHAPE = Shape(latents=4096, k=32)
STEPS = 1_000_000


def make_step(attached: bool) -> Callable[[], object]:
    """Return a function that trains one step, with MonoLoss or without."""
    trainer = BatchTopKTrainer(
        steps=STEPS,
        activation_dim=SHAPE.width,
        dict_size=SHAPE.latents,
        k=SHAPE.k,
        layer=0,
        lm_name="benchmark",
        seed=0,
        device="cpu",
    )
    if attached:
        add_loss(trainer, MonoLoss(lam=3e-4))
    x, steps = features(SHAPE.batch, SHAPE, torch.device("cpu")), count()
    return lambda: trainer.update(next(steps), x)

"""Small configs for every trainer of the library, and its own loop on the digits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from dictionary_learning.trainers import (
    BatchTopKTrainer,
    GatedAnnealTrainer,
    GatedSAETrainer,
    JumpReluTrainer,
    PAnnealTrainer,
    StandardTrainer,
    TopKTrainer,
)
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
from dictionary_learning.training import trainSAE
from torch import Tensor

BATCH = 128
_TOP_K = {"k": 6, "threshold_start_step": 5}
_L1 = {"l1_penalty": 0.03, "sparsity_warmup_steps": None}
_ANNEALED = {
    "initial_sparsity_penalty": 0.03,
    "sparsity_warmup_steps": None,
    "anneal_start": 5,
    "p_end": 0.9,
    "n_sparsity_updates": 3,
}
TRAINERS: dict[str, dict[str, Any]] = {
    "standard": {"trainer": StandardTrainer, **_L1},
    "april": {"trainer": StandardTrainerAprilUpdate, **_L1},
    "topk": {"trainer": TopKTrainer, **_TOP_K},
    "batchtopk": {"trainer": BatchTopKTrainer, **_TOP_K},
    "matryoshka": {
        "trainer": MatryoshkaBatchTopKTrainer,
        "group_fractions": [0.25, 0.25, 0.5],
        **_TOP_K,
    },
    "jumprelu": {
        "trainer": JumpReluTrainer,
        "sparsity_warmup_steps": None,
        "target_l0": 8.0,
        "bandwidth": 0.1,
    },
    "gated": {"trainer": GatedSAETrainer, **_L1},
    "gated annealed": {"trainer": GatedAnnealTrainer, **_ANNEALED},
    "annealed": {"trainer": PAnnealTrainer, **_ANNEALED},
}
TOP_K = ["topk", "batchtopk", "matryoshka"]


def make_config(name: str, steps: int = 20, **options: Any) -> dict[str, Any]:
    """What trainSAE wants."""
    return {
        **TRAINERS[name],
        "steps": steps,
        "activation_dim": 64,
        "dict_size": 96,
        "layer": 0,
        "lm_name": "digits",
        "lr": 3e-3,
        "warmup_steps": 0,
        "device": "cpu",
        "seed": 0,
        **options,
    }


def make(config: dict[str, Any]) -> Any:
    """The trainer of a config, as trainSAE makes it."""
    options = copy.copy(config)
    torch.manual_seed(0)  # JumpReluTrainer does not use its seed
    return options.pop("trainer")(**options)


def make_trainer(name: str, steps: int = 20, **options: Any) -> Any:
    return make(make_config(name, steps, **options))


def stream(x: Tensor) -> Iterator[Tensor]:
    """Batches without end, each its own tensor: trainSAE scales them in place."""
    order = torch.Generator().manual_seed(0)
    while True:
        yield x[torch.randint(len(x), (BATCH,), generator=order)]


def train(config: dict[str, Any], x: Tensor, **options: Any) -> Any:
    """Run the library's own loop, and return the trainer that it made."""
    made = []
    trainer_class, config = config["trainer"], copy.copy(config)
    config["trainer"] = lambda **given: made.append(trainer_class(**given)) or made[0]
    torch.manual_seed(0)
    trainSAE(stream(x), [config], steps=config["steps"], device="cpu", **options)
    return made[0]

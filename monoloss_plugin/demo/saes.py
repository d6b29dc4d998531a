"""Train SAEs on the digits' features with SAELens's own trainer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

import monoloss_plugin.adapters.sae_lens  # noqa: F401  # gives SAETrainer its add_loss
from monoloss_plugin.demo.architectures import ARCHITECTURES, NUM_LATENTS
from monoloss_plugin.features import FeatureBatches, FeatureSet
from monoloss_plugin.losses import LossTerm

# After the adapter, whose import error names the extra to install.
from sae_lens import SAETrainer  # isort: skip
from sae_lens.config import LoggingConfig, SAETrainerConfig  # isort: skip
from sae_lens.registry import get_sae_training_class  # isort: skip

_STEPS = 1500
_BATCH = 256
_LEARNING_RATE = 1e-3


def train_sae(
    features: FeatureSet, architecture: str, terms: Sequence[LossTerm], *, seed: int, folder: Path
) -> float:
    """Train an SAE, save it for inference, and return the seconds that training took.

    Args:
        features: N images of width d_in.
        architecture: a key of :data:`~monoloss_plugin.demo.architectures.ARCHITECTURES`.
        terms: the terms to add to the host's loss; none for the baseline.
        seed: of the weights and the order of batches, the same with and without terms.
        folder: where SAELens writes the inference model, for ``SAE.load_from_disk``.
    """
    torch.manual_seed(seed)
    sae_class, config_class = get_sae_training_class(architecture)
    sae = sae_class(
        config_class(d_in=features.width, d_sae=NUM_LATENTS, **ARCHITECTURES[architecture])
    )
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=_STEPS * _BATCH,
            train_batch_size_samples=_BATCH,
            lr=_LEARNING_RATE,
            lr_end=_LEARNING_RATE,
            dead_feature_window=300,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=FeatureBatches(features, batch_size=_BATCH, seed=seed).tensors(),
    )
    for term in terms:
        trainer.add_loss(term)
    started = time.perf_counter()
    trainer.fit()
    seconds = time.perf_counter() - started
    sae.save_inference_model(folder)
    return seconds

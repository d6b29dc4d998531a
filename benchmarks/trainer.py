"""SAELens's own trainer of a BatchTopK SAE of the benchmark's sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, SAETrainer
from sae_lens.config import LoggingConfig, SAETrainerConfig
from torch import Tensor

from benchmarks.setting import Setting


def batchtopk_trainer(
    setting: Setting, batches: Iterator[Tensor], samples: int = 10**9
) -> SAETrainer[Any, Any]:
    """Return a trainer over batches, for so many samples."""
    torch.manual_seed(0)
    shape = setting.shape
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=shape.width, d_sae=shape.latents, k=shape.k, device=str(setting.device)
        )
    )
    config = SAETrainerConfig(
        total_training_samples=samples,
        train_batch_size_samples=shape.batch,
        lr_end=3e-4,
        device=str(setting.device),
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(cfg=config, sae=sae, data_provider=batches)

"""Small real SAEs on real images: scikit-learn's digits, 1,797 images of 64 pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens import SAETrainer, TrainingSAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sklearn.datasets import load_digits
from torch import Tensor

from monoloss_plugin.adapters import sae_lens as adapter  # noqa: F401  # gives add_loss

BATCH = 128
D_SAE = 96

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "batchtopk": {"k": 6},
    "topk": {"k": 6},
    # SAELens cannot train sparse activations with decoder-norm rescaling on a CPU.
    "topk sparse": {
        "k": 6,
        "use_sparse_activations": True,
        "rescale_acts_by_decoder_norm": False,
    },
    "jumprelu": {"l0_coefficient": 0.02, "jumprelu_bandwidth": 0.1},
    "standard": {"l1_coefficient": 0.02},
    "matryoshka_batchtopk": {"k": 6, "matryoshka_widths": [32, 96]},
    "gated": {"l1_coefficient": 0.02},
}


def make_sae(architecture: str, **options: Any) -> TrainingSAE[Any]:
    torch.manual_seed(0)
    name = architecture.split()[0]
    sae_class, config_class = sae_lens.registry.get_sae_training_class(name)
    options = {**ARCHITECTURES.get(architecture, {}), **options}
    return sae_class(config_class(d_in=64, d_sae=D_SAE, **options))


def stream(images: Tensor, seed: int = 0) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield images[torch.randint(len(images), (BATCH,), generator=generator)]


def make_trainer(
    sae: TrainingSAE[Any], batches: Iterator[Any], steps: int = 60, **options: Any
) -> SAETrainer[Any, Any]:
    return SAETrainer(cfg=trainer_config(steps, **options), sae=sae, data_provider=batches)


def trainer_config(steps: int, **options: Any) -> SAETrainerConfig:
    return SAETrainerConfig(
        total_training_samples=steps * BATCH,
        train_batch_size_samples=BATCH,
        lr=3e-3,
        lr_end=3e-3,
        n_batches_for_norm_estimate=4,
        logger=LoggingConfig(log_to_wandb=False),
        **options,
    )


@pytest.fixture(scope="session")
def images() -> Tensor:
    """(1797, 64) unit-norm images, centred first so that they are not all alike."""
    pixels = torch.tensor(load_digits().data, dtype=torch.float32)
    return torch.nn.functional.normalize(pixels - pixels.mean(0), dim=1)


@pytest.fixture(scope="session")
def digit_labels() -> Tensor:
    return torch.tensor(load_digits().target)

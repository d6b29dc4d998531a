"""SAELens's own training script on image features, with one line of ours."""

import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, SAETrainer
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sklearn.datasets import load_digits

import monoloss_plugin.adapters.sae_lens  # noqa: F401  # gives SAETrainer its add_loss
from monoloss_plugin import MonoLoss
from monoloss_plugin.evaluation import evaluate

digits = load_digits()
pixels = torch.tensor(digits.data, dtype=torch.float32)
principal = torch.linalg.svd(pixels - pixels.mean(0), full_matrices=False).Vh[:32]
features = torch.nn.functional.normalize((pixels - pixels.mean(0)) @ principal.T, dim=1)


def batches():
    while True:
        yield features[torch.randint(len(features), (512,))]


torch.manual_seed(0)
sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=32, d_sae=256, k=8))
trainer = SAETrainer(
    cfg=SAETrainerConfig(
        total_training_samples=512 * 500,
        train_batch_size_samples=512,
        lr=1e-3,
        lr_end=1e-3,
        logger=LoggingConfig(log_to_wandb=False),
    ),
    sae=sae,
    data_provider=batches(),
)

trainer.add_loss(MonoLoss(lam=3e-3), warm_up_steps=100)  # <- the one line

trainer.fit()
result = evaluate(sae, features, torch.tensor(digits.target))
for name, value in result.summary().items():
    print(f"{name:20} {value:.3f}")

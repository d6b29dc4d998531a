"""SAELens's own training script on image features, with one line of ours.

python examples/sae_lens_train.py [--lam 3e-3] [--steps 1500] [--out FOLDER]

Features: handwritten digits as a small vision transformer sees them, which come with the package.
"""

import argparse

import torch
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, SAETrainer
from sae_lens.config import LoggingConfig, SAETrainerConfig

import monoloss_plugin.adapters.sae_lens  # noqa: F401  # <- gives SAETrainer its add_loss
from monoloss_plugin import MonoLoss, load_features
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import FeatureBatches

options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
options.add_argument("--lam", type=float, default=3e-3, help="weight; 0 trains without")
options.add_argument("--steps", type=int, default=1500)
options.add_argument("--seed", type=int, default=0)
options.add_argument("--out", default="sae", help="folder of the SAE")
given = options.parse_args()

torch.manual_seed(given.seed)
batches = FeatureBatches(load_features("digits", "train"), batch_size=256, seed=given.seed)
sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=64, d_sae=256, k=8))
trainer = SAETrainer(
    cfg=SAETrainerConfig(
        total_training_samples=256 * given.steps,
        train_batch_size_samples=256,
        dead_feature_window=300,  # in so short a run
        lr=1e-3,
        lr_end=1e-3,
        logger=LoggingConfig(log_to_wandb=False),
    ),
    sae=sae,
    data_provider=batches.tensors(),
)

trainer.add_loss(MonoLoss(lam=given.lam), warm_up_steps=100)  # <- the one line

trainer.fit().save_inference_model(given.out)
sae = SAE.load_from_disk(given.out)  # as everybody loads it, without this package too
held_out = load_features("digits", "held_out")
for name, value in evaluate(sae, held_out).summary().items():
    print(f"{name:20} {value:.3f}")

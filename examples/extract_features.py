"""From a folder of images to a SAELens SAE, scored with its own features.

python examples/extract_features.py [FOLDER ENCODER] [--out FOLDER] [--steps N]

Without arguments: handwritten digits, with their pixels as features.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, SAETrainer
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sklearn.datasets import load_digits
from torchvision.transforms.functional import pil_to_tensor

import monoloss_plugin.adapters.sae_lens  # noqa: F401  # gives SAETrainer its add_loss
from monoloss_plugin import MonoLoss
from monoloss_plugin.evaluation import evaluate
from monoloss_plugin.features import Encoder, FeatureBatches, FeatureSet, extract

options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
options.add_argument("folder", nargs="?", type=Path, help="of images; its subfolders are classes")
options.add_argument("encoder", nargs="?", help="see monoloss extract --help")
options.add_argument("--steps", type=int, default=1500)
options.add_argument("--out", type=Path, default="extracted", help="folder of the results")
given = options.parse_args()
if given.folder and not given.encoder:
    options.error("FOLDER needs an ENCODER, such as clip-vit-l14")

folder, encoder = given.folder, given.encoder
if encoder is None:
    folder, digits = given.out / "images", load_digits()
    for number, image in enumerate(digits.images):
        path = folder / str(digits.target[number]) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype("uint8")).save(path)
    # A model of your own: here pixels, less their mean over the image.
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LayerNorm(64))
    encoder = Encoder(model, lambda i: pil_to_tensor(i) / 255, model, {"name": "pixels"}, "L")

extract(folder, encoder, given.out / "features")  # <- images to features; goes on if killed
features = FeatureSet.open(given.out / "features")
batches = FeatureBatches(features, batch_size=min(256, len(features)))  # <- features to batches

trainer = SAETrainer(
    cfg=SAETrainerConfig(
        total_training_samples=given.steps * batches.batch_size,
        train_batch_size_samples=batches.batch_size,
        dead_feature_window=300,  # in so short a run
        lr=1e-3,
        lr_end=1e-3,
        logger=LoggingConfig(log_to_wandb=False),
    ),
    sae=BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=features.width, d_sae=512, k=8)),
    data_provider=batches.tensors(),
)
trainer.add_loss(MonoLoss(lam=3e-4))
trainer.fit().save_inference_model(given.out / "sae")
sae = SAE.load_from_disk(given.out / "sae")
for name, value in evaluate(sae, features).summary().items():
    print(f"{name:20} {value:.3f}")

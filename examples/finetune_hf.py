"""Fine-tune a small ViT with Hugging Face's Trainer, without and with MonoLoss.

python examples/finetune_hf.py [--seeds 3] [--epochs 20] [--lam 0.1]

Both start from the same ViT, trained for a few epochs on the plain task. Similarities come from
frozen features of the same images, as a column of the dataset.
"""

import argparse
import statistics
from tempfile import mkdtemp

import torch
from datasets import Dataset
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification
from transformers.utils import logging

import monoloss_plugin.adapters.transformers as adapter
from monoloss_plugin import MonoLoss, MonoScore, load_features
from monoloss_plugin.finetuning import LatentRecorder, aligned_embeddings

logging.set_verbosity_error()
options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
options.add_argument("--seeds", type=int, default=3)
options.add_argument("--epochs", type=int, default=20)
options.add_argument("--lam", type=float, default=0.1)
given = options.parse_args()


def images_of(split):
    """Images, classes, and what a frozen encoder makes of the same images."""
    features, digits = load_features("digits", split), load_digits()
    ids = features.image_ids(torch.arange(len(features)))
    numbers = [int(image_id.split("/")[1].removesuffix(".png")) for image_id in ids]
    columns = {
        "pixel_values": (digits.images[numbers][:, None] / 16).astype("float32"),
        "labels": digits.target[numbers],
        "embeddings": aligned_embeddings(features, ids).numpy(),  # <- by image_id
    }
    return Dataset.from_dict(columns).with_format("torch")


train, held_out = images_of("train"), images_of("held_out")


def fit(model, epochs, seed, loss=None):
    arguments = TrainingArguments(
        mkdtemp(),
        num_train_epochs=epochs,
        per_device_train_batch_size=128,
        learning_rate=1e-3,
        seed=seed,
        report_to=[],
        save_strategy="no",
        logging_strategy="epoch",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=train)
    trainer.log = lambda *_, **__: None
    if loss is not None:
        trainer.add_loss(loss, embeddings="embeddings")  # <- the line to add
    return trainer.train().metrics["train_runtime"] / epochs


@torch.no_grad()
def measured(model):
    """Accuracy, mean MonoScore, and on how many images the median latent is positive."""
    score = MonoScore()
    with LatentRecorder(model.eval().cpu()) as recorder:
        right = model(held_out["pixel_values"][:]).logits.argmax(1) == held_out["labels"][:]
        latents = recorder.take()
    score.update(latents, held_out["embeddings"][:])
    positive = (latents > 0).sum(0).float()
    return float(right.float().mean()), score.compute().mean, float(positive.median())


config = ViTConfig(
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=256,
    image_size=8,
    patch_size=2,
    num_channels=1,
    num_labels=10,
)
rows = {"without": [], "with": []}
for seed in range(given.seeds):
    for name in rows:
        torch.manual_seed(seed)
        model = ViTForImageClassification(config)
        fit(model, 5, seed)
        adapter.insert_mono_layer(model, width=128, relu=True)  # <- twice the width: exact start
        loss = MonoLoss(lam=given.lam, units="raw") if name == "with" else None
        seconds = fit(model, given.epochs, seed, loss)
        rows[name].append((*measured(model), seconds))

print(f"\nViT on {len(held_out)} held-out digits, mean ± standard deviation, lam {given.lam}")
print(f"{'':34}{'without':>18}{'with MonoLoss':>18}")
labels = ("accuracy", "mean MonoScore", f"median images of {len(held_out)}", "seconds an epoch")
for number, label in enumerate(labels):
    cells = []
    for name in rows:
        values = [row[number] for row in rows[name]]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        cells.append(f"{statistics.fmean(values):.3f} ± {spread:.3f}")
    print(f"{label:34}" + "".join(f"{cell:>18}" for cell in cells))

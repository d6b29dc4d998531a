"""Fine-tune a small ViT with Hugging Face's Trainer and MonoLoss, on handwritten digits.

python examples/finetune_hf.py [--lam 0.1] [--seed 0] [--epochs 20]    # --lam 0: without

The ViT has been trained on the plain task before. Similarities come from frozen features of the
same images, as a column of the dataset.
"""

import argparse
from tempfile import mkdtemp

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import monoloss_plugin.adapters.transformers as adapter  # <- gives Trainer its add_loss
from monoloss_plugin import MonoLoss, MonoScore, load_features
from monoloss_plugin.features.digits import digit_images
from monoloss_plugin.finetuning import LatentRecorder, aligned_embeddings

options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
options.add_argument("--lam", type=float, default=0.1, help="weight; 0 trains without")
options.add_argument("--seed", type=int, default=0)
options.add_argument("--epochs", type=int, default=20)
given = options.parse_args()


def images_of(split):
    features = load_features("digits", split)
    columns = {
        "pixel_values": digit_images(features)[:, None].numpy(),
        "labels": features.labels,
        "embeddings": aligned_embeddings(features, features.dataset["image_id"][:]).numpy(),
    }
    return Dataset.from_dict(columns).with_format("torch")


def trainer_of(model, epochs):
    arguments = TrainingArguments(
        mkdtemp(),
        num_train_epochs=epochs,
        per_device_train_batch_size=128,
        learning_rate=1e-3,
        seed=given.seed,
        report_to=[],
        save_strategy="no",
        logging_strategy="epoch",
    )
    return Trainer(model, arguments, train_dataset=train)


torch.manual_seed(given.seed)
train, held_out = images_of("train"), images_of("held_out")
size = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
images = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
model = ViTForImageClassification(ViTConfig(**size, intermediate_size=256, **images))
trainer_of(model, epochs=5).train()

adapter.insert_mono_layer(model, width=128, relu=True)  # <- twice the width: changes nothing
trainer = trainer_of(model, given.epochs)
if given.lam:
    loss = MonoLoss(lam=given.lam, lam_units="raw")
    trainer.add_loss(loss, embeddings="embeddings")  # <- the line to add
seconds = trainer.train().metrics["train_runtime"] / given.epochs

score = MonoScore()
with torch.no_grad(), LatentRecorder(model.eval().cpu()) as recorder:
    right = model(held_out["pixel_values"][:]).logits.argmax(1) == held_out["labels"][:]
    latents = recorder.take()
score.update(latents, held_out["embeddings"][:])
print(f"accuracy {right.float().mean():.4f}")
print(f"monoscore {score.compute().mean:.4f}")
print(f"images_of_the_median_latent {(latents > 0).sum(0).float().median():.0f}")
print(f"seconds_an_epoch {seconds:.3f}")

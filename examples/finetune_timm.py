"""Fine-tune a small ResNet of timm on handwritten digits, without and with MonoLoss.

python examples/finetune_timm.py [--seeds 3] [--epochs 20] [--lam 0.1]

Both start from the same ResNet, trained for a few epochs on the plain task. Similarities come from
frozen features of the same images, found by image_id.
"""

import argparse
import statistics
import time

import timm
import torch
from sklearn.datasets import load_digits
from timm.task import ClassificationTask
from torch.utils.data import DataLoader, TensorDataset

import monoloss_plugin.adapters.timm as adapter
from monoloss_plugin import MonoLoss, MonoScore, load_features
from monoloss_plugin.finetuning import LatentRecorder, WithEmbeddings, aligned_embeddings

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
    images = torch.tensor(digits.images[numbers]).float()[:, None] / 16
    images = torch.nn.functional.interpolate(images, scale_factor=4)
    h = aligned_embeddings(features, ids)  # <- by image_id, as with any dataset of one's own
    return WithEmbeddings(TensorDataset(images, torch.tensor(digits.target[numbers])), h)


train, held_out = images_of("train"), images_of("held_out")


def fit(model, epochs, loss=None):
    task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), verbose=False)
    if loss is not None:
        task.add_loss(loss)  # <- the line to add
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    model.train()
    started = time.perf_counter()
    for _ in range(epochs):
        for images, target, h in DataLoader(train, batch_size=128, shuffle=True, drop_last=True):
            extra = {} if loss is None else {"embeddings": h}
            task(images, target, **extra)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    return (time.perf_counter() - started) / epochs


@torch.no_grad()
def measured(model):
    """Accuracy, mean MonoScore, and on how many images the median latent is positive."""
    score, right, positive = MonoScore(), 0, 0
    model.eval()
    with LatentRecorder(model) as recorder:
        for images, target, h in DataLoader(held_out, batch_size=256):
            right += int((model(images).argmax(1) == target).sum())
            latents = recorder.take()
            score.update(latents, h)
            positive += (latents > 0).sum(0)
    return right / len(held_out), score.compute().mean, float(positive.float().median())


rows = {"without": [], "with": []}
for seed in range(given.seeds):
    for name in rows:
        torch.manual_seed(seed)
        model = timm.create_model(
            "resnet18", num_classes=10, in_chans=1, channels=(16, 32, 64, 128), stem_width=16
        )
        fit(model, epochs=5)
        adapter.insert_mono_layer(model, relu=True)  # <- before the head; starts as identity
        loss = MonoLoss(lam=given.lam, units="raw") if name == "with" else None
        seconds = fit(model, given.epochs, loss)
        rows[name].append((*measured(model), seconds))

print(f"\nResNet on {len(held_out)} held-out digits, mean ± standard deviation, lam {given.lam}")
print(f"{'':34}{'without':>18}{'with MonoLoss':>18}")
labels = ("accuracy", "mean MonoScore", f"median images of {len(held_out)}", "seconds an epoch")
for number, label in enumerate(labels):
    cells = []
    for name in rows:
        values = [row[number] for row in rows[name]]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        cells.append(f"{statistics.fmean(values):.3f} ± {spread:.3f}")
    print(f"{label:34}" + "".join(f"{cell:>18}" for cell in cells))

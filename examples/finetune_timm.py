"""Fine-tune a small ResNet of timm on handwritten digits with MonoLoss.

python examples/finetune_timm.py [--lam 0.1] [--seed 0] [--epochs 20]    # --lam 0: without

The ResNet has been trained on the plain task before. Similarities come from frozen features of the
same images, found by image_id.
"""

import argparse
import time

import timm
import torch
from timm.task import ClassificationTask
from torch.utils.data import DataLoader, TensorDataset

import monoloss_plugin.adapters.timm as adapter  # <- gives TrainingTask its add_loss
from monoloss_plugin import MonoLoss, MonoScore, load_features
from monoloss_plugin.features.digits import digit_images
from monoloss_plugin.finetuning import LatentRecorder, WithEmbeddings, aligned_embeddings

options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
options.add_argument("--lam", type=float, default=0.1, help="weight; 0 trains without")
options.add_argument("--seed", type=int, default=0)
options.add_argument("--epochs", type=int, default=20)
given = options.parse_args()


def images_of(split):
    features = load_features("digits", split)
    images = torch.nn.functional.interpolate(digit_images(features)[:, None], scale_factor=4)
    data = TensorDataset(images, features.labels)
    h = aligned_embeddings(features, features.dataset["image_id"][:])
    return WithEmbeddings(data, h)  # <- the frozen encoder's embedding of each image


def fit(model, epochs, lam=0.0):
    task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), verbose=False)
    if lam:
        task.add_loss(MonoLoss(lam=lam, lam_units="raw"))  # <- the line to add
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    started = time.perf_counter()
    for _ in range(epochs):
        for images, target, h in DataLoader(train, batch_size=128, shuffle=True, drop_last=True):
            task(images, target, **({"embeddings": h} if lam else {}))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    return (time.perf_counter() - started) / epochs


torch.manual_seed(given.seed)
train, held_out = images_of("train"), images_of("held_out")
size = {"channels": (16, 32, 64, 128), "stem_width": 16}
model = timm.create_model("resnet18", num_classes=10, in_chans=1, **size).train()
fit(model, epochs=5)
adapter.insert_mono_layer(model, relu=True)  # <- before the head; changes nothing at first
seconds = fit(model, given.epochs, given.lam)

score = MonoScore()
with torch.no_grad(), LatentRecorder(model.eval()) as recorder:
    images, target, h = next(iter(DataLoader(held_out, batch_size=len(held_out))))
    accuracy = (model(images).argmax(1) == target).float().mean()
    latents = recorder.take()
score.update(latents, h)
print(f"accuracy {accuracy:.4f}")
print(f"monoscore {score.compute().mean:.4f}")
print(f"images_of_the_median_latent {(latents > 0).sum(0).float().median():.0f}")
print(f"seconds_an_epoch {seconds:.3f}")

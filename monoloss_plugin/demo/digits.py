"""Real images that ship in a package, and features of them from a small vision transformer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from monoloss_plugin._optional import missing_extra
from monoloss_plugin.embeddings import unit_rows

try:
    from sklearn.datasets import load_digits
    from timm.models.vision_transformer import VisionTransformer
    from tqdm.auto import tqdm
except ModuleNotFoundError as error:
    raise missing_extra(error, "demo") from error

WIDTH = 64
_TRAIN_SHARE = 2 / 3
_EPOCHS = 30
_BATCH = 64
_LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class DigitFeatures:
    """scikit-learn's 1,797 handwritten digits as a frozen encoder sees them."""

    images: Tensor
    """(N, 8, 8) grey, in [0, 1]."""
    labels: Tensor
    """(N,) the digit, 0 to 9."""
    features: Tensor
    """(N, 64) the encoder's pre-logits, unit norm."""
    train: Tensor
    """Indices that the encoder and the dictionaries are trained on."""
    held_out: Tensor
    """Indices that neither has seen."""
    accuracy: float
    """The encoder's accuracy on the held-out images."""


def digit_features(seed: int = 0) -> DigitFeatures:
    """Train a small timm vision transformer on a split of the digits and take its features.

    Args:
        seed: of the split, the weights and the order of batches.
    """
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    cut = int(_TRAIN_SHARE * len(images))
    train, held_out = order[:cut], order[cut:]

    pixels = images.unsqueeze(1)
    encoder = _train_encoder(pixels[train], labels[train], seed)
    with torch.no_grad():
        pre_logits = encoder.forward_head(encoder.forward_features(pixels), pre_logits=True)
        predicted = encoder.head(pre_logits[held_out]).argmax(1)
    features, _ = unit_rows(pre_logits, torch.float32)
    accuracy = float((predicted == labels[held_out]).float().mean())
    return DigitFeatures(images, labels, features, train, held_out, accuracy)


def _train_encoder(pixels: Tensor, labels: Tensor, seed: int) -> VisionTransformer:
    torch.manual_seed(seed)
    encoder = VisionTransformer(
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        embed_dim=WIDTH,
        depth=3,
        num_heads=4,
    )
    steps = _EPOCHS * -(-len(pixels) // _BATCH)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps)
    with tqdm(total=steps, desc="Training the encoder", unit="step") as bar:
        for _ in range(_EPOCHS):
            for batch in torch.randperm(len(pixels)).split(_BATCH):
                loss = torch.nn.functional.cross_entropy(encoder(pixels[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return encoder.eval()

"""scikit-learn's handwritten digits, and their features from a small vision transformer.

The steps are those for any images: files in class folders, an encoder by its name, extraction.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from monoloss_plugin._optional import missing_extra

try:
    import numpy as np
    import timm
    from PIL import Image
    from sklearn.datasets import load_digits
    from timm.models import save_for_hf
    from tqdm.auto import tqdm
except ModuleNotFoundError as error:
    raise missing_extra(error, "demo") from error

from monoloss_plugin._places import without
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.features.digits import digit_files
from monoloss_plugin.features.extraction import extract

WIDTH = 64
SPLITS = ("train", "held-out")
_TRAIN_SHARE = 2 / 3
_EPOCHS = 30
_BATCH = 64
_LEARNING_RATE = 2e-3
_ENCODER: dict[str, Any] = {
    "num_classes": 10,
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "embed_dim": WIDTH,
    "depth": 3,
    "num_heads": 4,
}
_PREPROCESSING = {"input_size": (1, 8, 8), "mean": (0.0,), "std": (1.0,), "crop_pct": 1.0}


@dataclass(frozen=True)
class DigitFeatures:
    """scikit-learn's 1,797 handwritten digits as a frozen encoder sees them."""

    train: FeatureSet
    """Features of the images that the encoder and the SAEs are trained on."""
    held_out: FeatureSet
    """Features of images that neither of them has seen."""
    held_out_images: Tensor
    """(N, 8, 8) grey, in [0, 1], in the order of the held-out features."""
    accuracy: float
    """The encoder's accuracy on the held-out images."""


def digit_features(out: Path, seed: int = 0) -> DigitFeatures:
    """Write the digits as image files, train a small encoder on a split, and extract features.

    Args:
        out: folder for the images, the encoder and the feature sets. Those of an earlier call are
            replaced.
        seed: of the split, the weights and the order of batches.
    """
    for earlier in ("images", "encoder", "features"):
        without(out / earlier)
    digits = load_digits()
    grey = (digits.images * (255 / 16)).round().astype(np.uint8)
    pixels, labels = torch.tensor(grey)[:, None] / 255, torch.tensor(digits.target)
    files = digit_files(digits.target)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = int(_TRAIN_SHARE * len(files))
    # Extraction takes files in the order of their names.
    train, held_out = (sorted(part, key=files.__getitem__) for part in (order[:cut], order[cut:]))
    for split, numbers in zip(SPLITS, (train, held_out), strict=True):
        for number in numbers:
            path = out / "images" / split / files[number]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(grey[number]).save(path)
    encoder = _train_encoder(pixels[train], labels[train], seed)
    save_for_hf(encoder, str(out / "encoder"), model_args=_ENCODER)
    sets = []
    for split in SPLITS:
        folder = out / "features" / split
        extract(out / "images" / split, f"timm:local-dir:{out / 'encoder'}", folder, workers=0)
        sets.append(FeatureSet.open(folder))
    with torch.no_grad():
        right = encoder(pixels[held_out]).argmax(1) == labels[held_out]
    return DigitFeatures(sets[0], sets[1], pixels[held_out].squeeze(1), float(right.float().mean()))


def _train_encoder(pixels: Tensor, labels: Tensor, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    encoder: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", pretrained_cfg_overlay=_PREPROCESSING, **_ENCODER
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

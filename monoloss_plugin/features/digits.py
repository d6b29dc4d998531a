"""The images of scikit-learn's handwritten digits, whose features come with this package."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from monoloss_plugin._optional import missing_extra

try:
    from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    raise missing_extra(error, "referee") from error

from monoloss_plugin.features.feature_set import FeatureSet


def digit_images(features: FeatureSet) -> Tensor:
    """Return the images that the digits' features come from.

    Args:
        features: from ``load_features("digits", split)``, which are bundled, or from the demo.

    Returns:
        (N, 8, 8) grey, in [0, 1], in the order of the features.

    Raises:
        ValueError: the set has no image_id, or an image_id that no digit has.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    ids = features.ids_of(torch.arange(len(features)))
    if ids is None:
        raise ValueError("features: the set has no image_id to find the digits by")
    digits = load_digits()
    numbers = {file: number for number, file in enumerate(digit_files(digits.target))}
    if unknown := [image_id for image_id in ids if image_id not in numbers]:
        raise ValueError(f"features: no digit has the image_id {unknown[0]!r}")
    images = digits.images[[numbers[image_id] for image_id in ids]]
    return torch.tensor(images / 16, dtype=torch.float32)


def digit_files(labels: Iterable[int]) -> list[str]:
    """Return each digit's image_id: its file, in the folder of its class."""
    return [f"{label}/{number:04d}.png" for number, label in enumerate(labels)]

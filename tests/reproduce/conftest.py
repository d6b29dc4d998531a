"""Two encoders of the digits, and SAEs that take a second to train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from monoloss_plugin import load_features
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.reproduce import Features, Setting, saes


def projected(features: FeatureSet) -> FeatureSet:
    """The same images as another encoder might see them: a random projection."""
    directions = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    return FeatureSet.from_tensors(
        features.tensor().float() @ directions,
        labels=features.labels,
        ids=features.dataset["image_id"][:],
        classes=features.classes,
    )


@pytest.fixture(scope="session")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """Experiments share its folder, as they do in earnest."""
    digits = Features(load_features("digits", "train"), load_features("digits", "held_out"))
    other = Features(*map(projected, digits))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saes, "_STEPS", 12)
        patch.setattr(saes, "_EPOCHS", 1.0)
        patch.setattr(saes, "_MOST", {"num_latents": 64, "k": 8, "batch_size": 256})
        folder: Path = tmp_path_factory.mktemp("reproduce")
        yield Setting(folder, {"digits": digits, "other": other}, seeds=(0, 1))

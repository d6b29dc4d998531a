"""Encoders from timm."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor

from monoloss_plugin.features.encoders.encoder import Tower, as_pair
from monoloss_plugin.features.encoders.packaged import load_in_order


def load(
    name: str,
    revision: str | None,
    *,
    image_size: int | None = None,
    weights: dict[str, Tensor] | None = None,
) -> Tower:
    """Load a timm model without its classifier: a name of timm, ``hf-hub:`` or ``local-dir:``.

    Args:
        name: what timm calls it.
        revision: of a Hub repository.
        image_size: side of the square that the model sees; by default its own.
        weights: take these instead of timm's own; see :func:`.load_in_order`.
    """
    if revision is not None:
        name = f"{name}@{revision}"
    if weights is None:
        model: Any = timm.create_model(name, pretrained=True, num_classes=0)
    else:
        model = timm.create_model(name)
        load_in_order(model, weights)
        model.reset_classifier(0)
    model.eval()
    data = resolve_model_data_config(model)
    if image_size is not None:
        data["input_size"] = (data["input_size"][0], image_size, image_size)
        with torch.no_grad():
            model(torch.zeros(1, *data["input_size"]))  # fails if the model takes only its own
    tokens: Any = model.forward_features
    return Tower(
        model=model,
        preprocess=create_transform(**data, is_training=False),
        pooled=model,
        tokens=tokens,
        prefix_tokens=getattr(model, "num_prefix_tokens", 0),
        channels_last=getattr(model, "output_fmt", "NCHW") == "NHWC",
        class_token=has_class_token(model),
        patch_size=patch_size_of(model),
        mode="L" if data["input_size"][0] == 1 else "RGB",
        record={"preprocessing": data},
    )


def has_class_token(model: Any) -> bool:
    """Say whether the first of a timm model's tokens is a class token, and not a register."""
    return getattr(model, "cls_token", True) is not None


def patch_size_of(model: Any) -> tuple[int, int] | None:
    """Return height and width in pixels of a timm model's patches; None if it has none."""
    embed = getattr(model, "patch_embed", None)
    if embed is not None and hasattr(embed, "feat_ratio"):
        height, width = embed.feat_ratio(as_scalar=False)
        return int(height), int(width)
    return as_pair(getattr(embed, "patch_size", None))

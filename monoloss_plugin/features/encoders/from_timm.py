"""Encoders from timm."""

from __future__ import annotations

from typing import Any

import timm
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform

from monoloss_plugin.features.encoders.encoder import Tower


def load(name: str, revision: str | None) -> Tower:
    """Load a timm model without its classifier: a name of timm, ``hf-hub:`` or ``local-dir:``."""
    if revision is not None:
        name = f"{name}@{revision}"
    model = timm.create_model(name, pretrained=True, num_classes=0).eval()
    data = resolve_model_data_config(model)
    tokens: Any = model.forward_features
    return Tower(
        model=model,
        preprocess=create_transform(**data, is_training=False),
        pooled=model,
        tokens=tokens,
        prefix_tokens=getattr(model, "num_prefix_tokens", 0),
        channels_last=getattr(model, "output_fmt", "NCHW") == "NHWC",
        mode="L" if data["input_size"][0] == 1 else "RGB",
        record={"preprocessing": data},
    )

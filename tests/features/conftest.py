"""Encoders of each library from tiny configs, saved locally, and folders of images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_digits
from timm.models import save_for_hf
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from monoloss_plugin.features.encoders import Encoder

SIZE = 16
"""Pixels of the tiny encoders' inputs."""

_TRANSFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": SIZE,
    "patch_size": 4,
}
_TEXT = {**_TRANSFORMER, "vocab_size": 20, "max_position_embeddings": 8}


def _transformers_models() -> dict[str, transformers.PreTrainedModel]:
    t = transformers
    towers = {"text_config": _TEXT, "vision_config": _TRANSFORMER}
    return {
        "clip": t.CLIPModel(t.CLIPConfig(**towers, projection_dim=24)),
        "siglip": t.SiglipModel(t.SiglipConfig(**towers)),
        "siglip2": t.Siglip2Model(
            t.Siglip2Config(
                text_config=_TEXT,
                vision_config={**_TRANSFORMER, "num_patches": 16},
            )
        ),
        "vit": t.ViTModel(t.ViTConfig(**_TRANSFORMER)),
        "vit-classifier": t.ViTForImageClassification(t.ViTConfig(**_TRANSFORMER, num_labels=10)),
        "dinov2": t.Dinov2Model(t.Dinov2Config(**_TRANSFORMER, mlp_ratio=2)),
        "swin": t.SwinModel(
            t.SwinConfig(
                image_size=SIZE,
                patch_size=2,
                embed_dim=8,
                depths=[1, 1],
                num_heads=[1, 2],
                window_size=4,
            )
        ),
    }


_PROCESSORS = {
    "clip": "CLIPImageProcessor",
    "siglip": "SiglipImageProcessor",
    "siglip2": "Siglip2ImageProcessor",
    "dinov2": "BitImageProcessor",
}


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of encoders: transformers/KIND, timm/KIND, open_clip/vit."""
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    for kind, model in _transformers_models().items():
        folder = root / "transformers" / kind
        model.save_pretrained(folder)
        processor = getattr(transformers, _PROCESSORS.get(kind, "ViTImageProcessor"))
        size = {"height": SIZE, "width": SIZE}
        if kind in ("clip", "dinov2"):
            arguments = {"size": {"shortest_edge": SIZE}, "crop_size": size}
        elif kind == "siglip2":
            arguments = {"patch_size": 4, "max_num_patches": 16}
        else:
            arguments = {"size": size}
        processor(**arguments).save_pretrained(folder)

    for architecture, arguments in {
        "vit_tiny_patch16_224": {
            "img_size": SIZE,
            "patch_size": 4,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
        },
        "resnet18": {"channels": (8, 8, 16, 32), "layers": (1, 1, 1, 1), "stem_width": 8},
        "swin_tiny_patch4_window7_224": {
            "img_size": SIZE,
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 8,
            "depths": (1, 1),
            "num_heads": (1, 2),
        },
    }.items():
        model = timm.create_model(architecture, num_classes=10, **arguments)
        model.pretrained_cfg |= {"input_size": (3, SIZE, SIZE), "crop_pct": 1.0}
        save_for_hf(model, root / "timm" / architecture.split("_")[0], model_args=arguments)

    config = {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": SIZE,
            "layers": 2,
            "width": 32,
            "patch_size": 4,
            "head_width": 16,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
    }
    clip = open_clip.CLIP(**config)
    folder = root / "open_clip" / "vit"
    folder.mkdir(parents=True)
    described = {
        "model_cfg": config,
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    torch.save(clip.state_dict(), folder / "open_clip_pytorch_model.bin")
    return root


@pytest.fixture(scope="session")
def digit_images() -> list[Image.Image]:
    """The first 60 of scikit-learn's digits as 8-bit grey images."""
    pixels = (load_digits().images[:60] * (255 / 16)).round().astype(np.uint8)
    return [Image.fromarray(p) for p in pixels]


@pytest.fixture
def pixels() -> Encoder:
    """An encoder that needs no library: the grey pixels of an image, in [0, 1]."""
    flat = nn.Flatten()
    return Encoder(flat, lambda image: pil_to_tensor(image) / 255, flat, {"name": "pixels"}, "L")


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """150 digits as PNG and JPEG files in class folders, with damaged ones among them."""
    digits = load_digits()
    root = tmp_path / "images"
    for number in range(150):
        pixels = (digits.images[number] * (255 / 16)).round().astype(np.uint8)
        image = Image.fromarray(pixels).resize((20, 24))
        if number % 3 == 0:
            image = image.convert(("RGB", "RGBA", "P")[number // 3 % 3])
        folder = root / f"digit-{digits.target[number]}"
        folder.mkdir(parents=True, exist_ok=True)
        suffix = "jpg" if number % 2 and image.mode in ("L", "RGB") else "png"
        image.save(folder / f"{number:03d}.{suffix}")
    whole = (root / "digit-4" / "004.png").read_bytes()
    (root / "digit-4" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (root / "digit-7" / "empty.jpg").write_bytes(b"")
    (root / "digit-7" / "text.jpeg").write_text("not an image")
    (root / "digit-7" / "notes.txt").write_text("not meant to be one")
    return root


BAD = {"digit-4/truncated.png", "digit-7/empty.jpg", "digit-7/text.jpeg"}
"""What of :func:`image_folder` cannot be read."""

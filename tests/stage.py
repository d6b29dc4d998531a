"""What the documents' snippets speak of, in small: a trainer, models, folders, checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from datasets import Dataset
from lightning import LightningModule
from PIL import Image
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    HookedSAETransformer,
    LanguageModelSAERunnerConfig,
)
from sae_lens.config import LoggingConfig, SAETrainerConfig
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from benchmarks.language_models import BEGIN, HOOK, make_model, read_rows
from monoloss_plugin import load_features
from monoloss_plugin.features.digits import digit_images
from monoloss_plugin.hub.repository import bundled_folder
from tests.convert.test_monoloss import save, untied

BATCH = 128


def features(split: str = "train") -> Tensor:
    """(N, 64) of unit norm."""
    return torch.nn.functional.normalize(load_features("digits", split).tensor().float(), dim=1)


def labels(split: str = "train") -> Tensor:
    found = load_features("digits", split).labels
    assert found is not None
    return found


def sae_lens() -> tuple[SAETrainerConfig, BatchTopKTrainingSAE, Iterator[Tensor]]:
    """``cfg``, ``sae`` and ``batches`` of a run of 20 steps."""
    cfg = SAETrainerConfig(
        total_training_samples=20 * BATCH,
        train_batch_size_samples=BATCH,
        lr=1e-3,
        lr_end=1e-3,
        n_batches_for_norm_estimate=4,
        logger=LoggingConfig(log_to_wandb=False),
    )
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=64, d_sae=96, k=6))
    x = features()

    def batches() -> Iterator[Tensor]:
        while True:
            yield x[torch.randint(len(x), (BATCH,))]

    return cfg, sae, batches()


def language_model() -> tuple[
    LanguageModelSAERunnerConfig[Any], Dataset, HookedSAETransformer, Tensor
]:
    """``cfg`` of a run of 8 steps, ``dataset``, ``model`` and ``rows`` of tokens (N, 16)."""
    rows = read_rows(vocabulary=200, context=16)[:400]
    model = make_model(rows, vocabulary=200, width=32, steps=20)
    cfg = LanguageModelSAERunnerConfig(
        sae=BatchTopKTrainingSAEConfig(d_in=32, d_sae=96, k=6),
        hook_name=HOOK,
        context_size=16,
        training_tokens=8 * 256,
        train_batch_size_tokens=256,
        n_batches_in_buffer=64,
        exclude_special_tokens=[BEGIN],
        output_path="sae-of-tokens",
        logger=LoggingConfig(log_to_wandb=False),
    )
    return cfg, Dataset.from_dict({"tokens": rows.tolist()}), model, rows


def hugging_face(*columns: str) -> tuple[Any, TrainingArguments, Dataset]:
    """``model``, ``args`` and ``data``, of 64 images with these columns of embeddings."""
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=10,
    )
    args = TrainingArguments("runs", max_steps=2, save_strategy="no", report_to=[], use_cpu=True)
    data = {
        "pixel_values": digit_images(load_features("digits", "held_out"))[:64, None].numpy(),
        "labels": labels("held_out")[:64].numpy(),
        **{name: features("held_out")[:64].numpy() for name in columns},
    }
    return ViTForImageClassification(config), args, Dataset.from_dict(data).with_format("torch")


def resnet() -> Any:
    """Of timm, for (B, 1, 32, 32) images of 10 classes."""
    size = {"channels": (8, 8, 16, 16), "stem_width": 8}
    return timm.create_model("resnet18", num_classes=10, in_chans=1, **size)


def images(count: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """``images`` for the ResNet, ``target`` and embeddings ``h``."""
    pixels = digit_images(load_features("digits", "held_out"))[:count, None]
    larger = torch.nn.functional.interpolate(pixels, scale_factor=4)
    return larger, labels("held_out")[:count], features("held_out")[:count]


def lightning() -> tuple[LightningModule, DataLoader[Any]]:
    """``module`` with a ``model.fc``, and a ``loader`` of (images, target, h)."""

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = resnet()

        def training_step(self, batch: Any) -> Tensor:
            return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Module(), DataLoader([images()], batch_size=None)


def latents() -> tuple[Tensor, Tensor, Tensor]:
    """``latents``, ``embeddings`` and a ``reconstruction_loss``."""
    _, sae, batches = sae_lens()
    x = next(batches)
    encoded = sae.encode(x)
    return encoded, x, (sae.decode(encoded) - x).square().mean()


def photos_and_encoder(folder: str = "photos", start: int = 0) -> None:
    """Make a folder of 80 images, and ``encoder``, a model of timm's."""
    pixels = digit_images(load_features("digits", "held_out"))
    for number, image in enumerate(pixels[start : start + 80], start):
        path = Path(folder) / str(int(labels("held_out")[number])) / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255).byte().numpy()).save(path)
    size = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 64, "depth": 1}
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=10, num_heads=2, **size)
    encoder.pretrained_cfg |= {"input_size": (1, 8, 8), "crop_pct": 1.0}
    save_for_hf(encoder, "encoder", model_args={"num_heads": 2, **size})


def saes() -> None:
    """Make folders of SAEs, and of the features that they take."""
    bundled = bundled_folder("digits") / "models"
    shutil.copytree(bundled / "batchtopk-256-monoloss-0.003", "my-sae")
    shutil.copytree(bundled / "batchtopk-256", "my-sae-without")
    for split, folder in (("train", "features"), ("held_out", "held-out")):
        if not Path(folder).exists():
            load_features("digits", split).dataset.save_to_disk(folder)


def checkpoints() -> None:
    """Make a checkpoint of each library that ``monoloss convert`` reads."""
    save(Path("checkpoint.pt"), untied(), "batch_topk", topk_k=5)
    # As dictionary_learning and overcomplete name them; the libraries are not installed here.
    dictionary = {
        "encoder.weight": torch.randn(48, 64),
        "encoder.bias": torch.zeros(48),
        "decoder.weight": torch.randn(64, 48),
        "b_dec": torch.zeros(64),
        "k": torch.tensor(5),
        "threshold": torch.tensor(0.1),
    }
    Path("trainer_0").mkdir()
    torch.save(dictionary, "trainer_0/ae.pt")
    Path("trainer_0/config.json").write_text('{"trainer": {"dict_class": "BatchTopKSAE", "k": 5}}')
    state = {
        "encoder.final_block.0.weight": torch.randn(48, 64),
        "encoder.final_block.0.bias": torch.zeros(48),
        "dictionary._weights": torch.randn(48, 64),
        "dictionary.multiplier": torch.tensor(1.0),
    }
    torch.save(state, "sae.pt")
    Path("layers.3").mkdir()
    coder = {
        "encoder.weight": torch.randn(48, 64),
        "encoder.bias": torch.zeros(48),
        "W_dec": torch.randn(48, 64),
        "b_dec": torch.zeros(64),
    }
    save_file(coder, "layers.3/sae.safetensors")
    Path("layers.3/cfg.json").write_text('{"activation": "topk", "k": 5, "d_in": 64}')

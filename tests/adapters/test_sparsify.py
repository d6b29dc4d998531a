"""The sparsify adapter on sparsify's own trainer, with a small language model and real text."""

from __future__ import annotations

import copy
import json
import logging
import os
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # before sparsify is imported: there is no GPU here

import sparsify
from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer

from monoloss_plugin import L1L2Ratio, MonoLoss, MonoScore, OffSupportL1, functional
from monoloss_plugin.adapters import sparsify as adapter
from monoloss_plugin.adapters.sparsify import add_loss, last_metrics
from monoloss_plugin.batch import Batch

WIDTH, LATENTS, K = 32, 96, 6
BATCH, LENGTH = 8, 32

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "topk": {},
    "groupmax": {"activation": "groupmax"},
    "multi_topk": {"multi_topk": True},
    "skip": {"skip_connection": True},
    "transcoder": {"transcode": True},
    "skip transcoder": {"transcode": True, "skip_connection": True},
}


@pytest.fixture(scope="module")
def model() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 64, "vocab_size": 128}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shape, **layers, initializer_range=0.2)).eval()


def tokens(steps: int) -> Dataset:
    """Letters of Python's documentation, which ships with Python."""
    text = "\n".join(topics.values()).encode("ascii", "replace")[: steps * BATCH * LENGTH]
    ids = torch.tensor(list(text)).view(-1, LENGTH)
    return Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")


@pytest.fixture(scope="module")
def data() -> Dataset:
    return tokens(60)


def make_trainer(
    model: GPTNeoXForCausalLM,
    data: Dataset,
    architecture: str = "topk",
    steps: int = 20,
    sae: dict[str, Any] | None = None,
    **options: Any,
) -> Trainer:
    options = {
        "hookpoints": ["layers.1.mlp"],
        "optimizer": "adam",
        "lr": 3e-3,
        "lr_warmup_steps": 0,
        "log_to_wandb": False,
        "save_every": 10**6,
        "save_dir": "saved",
        **options,
    }
    coder = SparseCoderConfig(
        num_latents=LATENTS, k=K, **{**ARCHITECTURES[architecture], **(sae or {})}
    )
    cfg = TrainConfig(coder, batch_size=BATCH, **options)
    return Trainer(cfg, data.select(range(steps * BATCH)), model)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


if __name__ == "__main__":
    pass

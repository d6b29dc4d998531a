"""A step of sparsify's own trainer, on a language model of one layer at GPT-2's width."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXModel

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "0" if torch.cuda.is_available() else "1")
from sparsify import SparseCoderConfig, TrainConfig, Trainer

from monoloss_plugin import MonoLoss
from monoloss_plugin.adapters.sparsify import add_loss

WIDTH, LATENTS, K = 768, 4096, 32
TEXTS, LENGTH = 16, 128


class OneBatch(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The same batch of Python's documentation, whatever the trainer has seen of it."""

    def __init__(self) -> None:
        text = "\n".join(topics.values()).encode("ascii", "replace")
        self.tokens = torch.tensor(list(text[: TEXTS * LENGTH])).view(TEXTS, LENGTH)

    def __len__(self) -> int:
        return TEXTS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index]}

    def select(self, _: range) -> OneBatch:
        """Return what is left to train on."""
        return self


def make_step(attached: bool) -> Callable[[], object]:
    """Return one step of the trainer, with MonoLoss or without."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": 12,
    }
    model = GPTNeoXModel(GPTNeoXConfig(**shape, num_hidden_layers=1, vocab_size=128))
    cfg = TrainConfig(
        SparseCoderConfig(num_latents=LATENTS, k=K),
        batch_size=TEXTS,
        hookpoints=["layers.0"],
        log_to_wandb=False,
    )
    with redirect_stdout(io.StringIO()):
        trainer = Trainer(cfg, OneBatch(), model.eval())
    if attached:
        add_loss(trainer, MonoLoss(lam=3e-4))
    trainer.save = lambda: None  # which ends every run

    def step() -> None:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            trainer.fit()  # one batch is all there is

    return step

"""What MonoLoss adds to a step of fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.task import ClassificationTask

from benchmarks.setting import Found, Setting
from monoloss_plugin import MonoLoss
from monoloss_plugin.adapters.timm import add_loss, insert_mono_layer
from monoloss_plugin.reproduce.timing import alternate, ratio, summarise

MODEL, BATCH, PIXELS, EMBEDDING = "resnet50", 64, 224, 512
"""The paper's ResNet; CLIP-ViT-B/32, its similarity space, gives 512 numbers an image."""


def finetuning(setting: Setting) -> Found:
    """A step of timm's task with MonoLoss against one without, and the term by itself."""
    torch.manual_seed(0)
    images = torch.randn(BATCH, 3, PIXELS, PIXELS, device=setting.device)
    target = torch.arange(BATCH, device=setting.device) % 1000
    h = torch.randn(BATCH, EMBEDDING, device=setting.device)
    plain, with_loss = (_task(setting) for _ in range(2))
    add_loss(with_loss, MonoLoss(lam=0.1, lam_units="raw"))
    width = plain.get_trainable_module().get_classifier().in_features  # type: ignore[union-attr, operator]
    latents = torch.randn(BATCH, width, device=setting.device).relu_().requires_grad_()
    loss = MonoLoss(lam=0.1, lam_units="raw")

    def term() -> None:
        latents.grad = None
        loss(latents, h, gradient_at="active").backward()

    ways: dict[str, Callable[[], Any]] = {
        "without": lambda: _step(plain, images, target),
        "with MonoLoss": lambda: _step(with_loss, images, target, embeddings=h),
        "the term alone": term,
    }
    seconds = alternate(ways, setting.rounds(3, 9), setting.device)
    more = ratio(seconds["with MonoLoss"], seconds["without"])
    alone = ratio(seconds["the term alone"], seconds["without"])
    medians = {name: summarise(runs)["median"] for name, runs in seconds.items()}
    low, high = (100 * (q - 1) for q in more["quartiles"])
    return {
        "seconds": {name: summarise(runs) for name, runs in seconds.items()},
        "with over without": more,
        "the term alone over a step": alone,
        "target": "at most 1 % more",
        "says": f"{medians['without']:.2f} s without, {medians['with MonoLoss']:.2f} s with: "
        f"{100 * (more['median'] - 1):+.2f} % round by round ({low:+.2f} % to {high:+.2f} %); the "
        f"term alone {1000 * medians['the term alone']:.2f} ms, {100 * alone['median']:.3f} %",
    }


def _task(setting: Setting) -> ClassificationTask:
    torch.manual_seed(0)
    model = timm.create_model(MODEL)
    insert_mono_layer(model, relu=True)
    task = ClassificationTask(model.to(setting.device).train(), verbose=False)
    return task


def _step(task: ClassificationTask, *arguments: Any, **more: Any) -> None:
    task.zero_grad()
    task(*arguments, **more)["loss"].backward()

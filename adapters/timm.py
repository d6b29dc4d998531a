"""MonoLoss in timm's training tasks.

Importing this module is the opt-in: it gives ``TrainingTask`` a method ``add_loss``, so that a
script around timm's own tasks takes one line more::

    import monoloss_plugin.adapters.timm
    insert_mono_layer(model)                          # of monoloss_plugin.finetuning
    task = ClassificationTask(model, criterion)
    task.add_loss(MonoLoss(lam=0.1, lam_units="raw"), embeddings=frozen_encoder)

Add the loss before ``task.compile()``. For loops without a task, see
:class:`~monoloss_plugin.finetuning.LatentRecorder`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from monoloss_plugin._checks import as_rows, as_tensor, looks_are_free
from monoloss_plugin._optional import missing_extra
from monoloss_plugin.finetuning import insert_mono_layer, load_with_mono_layer
from monoloss_plugin.finetuning.alignment import Frozen
from monoloss_plugin.finetuning.attached import AttachedTerm, Attachment, require_embeddings
from monoloss_plugin.losses import LossHandle, LossTerm

try:
    from timm.data.mixup import FastCollateMixup, Mixup
    from timm.task import TrainingTask
except ModuleNotFoundError as error:
    raise missing_extra(error, "vision") from error

__all__ = [
    "LossHandle",
    "add_loss",
    "insert_mono_layer",
    "load_with_mono_layer",
    "mix_with_embeddings",
]


def add_loss(
    task: TrainingTask,
    loss: LossTerm,
    *,
    embeddings: Callable[[Tensor], Tensor] | None = None,
    latents: str | nn.Module | None = None,
    warm_up_steps: int = 0,
    sync: bool = False,
) -> LossHandle:
    """Add a loss term to a timm training task.

    The task's result gets the term in its ``loss``, the weighted term under its own name, and the
    batch's mean MonoScore as ``monoscore``. Without gradients, as in evaluation, nothing is added.

    Args:
        task: such as timm's ``ClassificationTask``; it is not changed but for this instance.
        loss: such as ``MonoLoss(lam=0.1, lam_units="raw")``.
        embeddings: a frozen encoder, or any callable, from the batch's images to (B, d). It sees
            images as the model does: mixed by mixup, its embeddings are those of the mixed images.
            Without one, give them in each call: ``task(images, target, embeddings=h)``.
        latents: the layer whose output they are, or its path; by default the model's MonoLayer.
        warm_up_steps: the weight grows linearly from 0 over this many calls since it was added;
            timm's checkpoints do not keep their number.
        sync: over the global batch of all processes, with its exact gradient.

    Returns:
        A handle whose ``remove()`` undoes it.

    Raises:
        TypeError: not a timm task, loss term or embeddings.
        ValueError: no such layer; a term of that name is there already; units other than "raw"; no
            MonoLayer and no layer named; or a task that is compiled already.
    """
    if not isinstance(task, TrainingTask):
        raise TypeError(f"task: expected a timm TrainingTask, got {type(task).__name__}")
    AttachedTerm.check(loss, warm_up_steps, latents, sync)
    if embeddings is not None:
        require_embeddings(embeddings)
    attachment = _Attachment.find(task, loss.name)
    model = task.get_trainable_module()
    if model is None:
        raise ValueError(f"task: {type(task).__name__} has no model to train")
    attached = AttachedTerm(
        loss,
        model,
        embeddings=None if embeddings is None else Frozen(embeddings, model),
        latents=latents,
        warm_up_steps=warm_up_steps,
        sync=sync,
    )
    return (attachment or _Attachment(task)).add(attached)


def mix_with_embeddings(
    mixup: Mixup, images: Any, target: Any, embeddings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply timm's mixup or cutmix to images, targets and precomputed embeddings alike.

    A mixed image is a bit of both; so is what it is similar to. Its embedding is the mean of the
    two unit embeddings, with the weights that the targets get.

    Args:
        mixup: of timm; of any mode, not the collating one nor for several labels an image.
        images: (B, C, H, W), changed in place as timm does.
        target: (B,) classes.
        embeddings: (B, d).

    Returns:
        Images, soft targets (B, classes), and embeddings (B, d).

    Raises:
        TypeError: arguments of another kind.
        ValueError: a collating mixup or one for several labels, images that are not
            (B, C, H, W), targets that are not (B,) classes, or embeddings of another number of
            rows.

    Source: timm's ``Mixup``; each sample's own number as its class shows what it was mixed of.
    """
    if not isinstance(mixup, Mixup):
        raise TypeError(f"mixup: expected timm's Mixup, got {type(mixup).__name__}")
    if isinstance(mixup, FastCollateMixup) or mixup.multi_label:
        raise ValueError("mixup: expected timm's Mixup, which mixes batches of single labels")
    images, target = as_tensor(images, "images"), as_tensor(target, "target")
    embeddings = as_rows(embeddings, "embeddings")
    if images.ndim != 4:
        raise ValueError(f"images: expected (B, C, H, W), got {tuple(images.shape)}")
    if target.ndim != 1 or target.is_floating_point():
        raise ValueError(f"target: expected (B,) classes, got {tuple(target.shape)}")
    if len(embeddings) != len(images):
        raise ValueError(f"embeddings: expected {len(images)} rows, got {len(embeddings)}")
    classes, smoothing = mixup.num_classes, mixup.label_smoothing
    of_classes = (target >= 0) & (target < classes)
    if looks_are_free(target) and not bool(of_classes.all()):
        raise ValueError(f"target: expected classes from 0 to {classes - 1}, as mixup has them")
    numbers = torch.arange(len(images), device=target.device)
    mixup.num_classes, mixup.label_smoothing = len(images), 0.0
    try:
        images, shares = mixup(images, numbers)
    finally:
        mixup.num_classes, mixup.label_smoothing = classes, smoothing
    plain = torch.full((len(target), classes), smoothing / classes, device=target.device)
    plain.scatter_(1, target[:, None], 1.0 - smoothing + smoothing / classes)
    unit = nn.functional.normalize(embeddings.float(), dim=1)
    return images, shares @ plain, shares.to(unit) @ unit


class _Attachment(Attachment):
    def __init__(self, task: TrainingTask) -> None:
        self._forward = task.forward
        super().__init__(task, {"forward": self.forward})

    def forward(
        self, input: Tensor, target: Any, *rest: Any, embeddings: Tensor | None = None, **more: Any
    ) -> dict[str, Tensor]:
        """Return the task's result, with the terms where gradients are wanted."""
        result: dict[str, Tensor] = self._forward(input, target, *rest, **more)
        if not torch.is_grad_enabled():
            return result
        result = dict(result)
        for name, term in self.terms.items():
            given = term.embeddings(input) if term.embeddings is not None else embeddings
            if given is None:
                raise ValueError(
                    f"{name}: no embeddings; call task(images, target, embeddings=...), or give "
                    "add_loss a frozen encoder"
                )
            of_step = term(given)
            result["loss"] = result["loss"] + of_step.weighted
            result.update(of_step.metrics)
        return result


if getattr(TrainingTask, "add_loss", add_loss) is add_loss:
    TrainingTask.add_loss = add_loss  # type: ignore[attr-defined]

"""MonoLoss in timm's training tasks.

Import this module to opt in. It gives ``TrainingTask`` a method ``add_loss``, so a script around
timm's own tasks takes one more line::

    import monoloss_plugin.adapters.timm
    insert_mono_layer(model)                          # of monoloss_plugin.finetuning
    task = ClassificationTask(model, criterion)
    task.add_loss(MonoLoss(lam=0.1, lam_units="raw"), embeddings=frozen_encoder)

Add the loss before ``task.compile()``. For a loop without a task, see
:class:`~monoloss_plugin.finetuning.LatentRecorder`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from monoloss_plugin._checks import as_rows, as_tensor, looks_are_free
from monoloss_plugin.attaching import Attachment, give_add_loss, require_embeddings
from monoloss_plugin.finetuning import insert_mono_layer, load_with_mono_layer
from monoloss_plugin.finetuning.embeddings import Frozen
from monoloss_plugin.finetuning.latent_term import LatentTerm
from monoloss_plugin.hosts import check_version, failed_import
from monoloss_plugin.losses import LossHandle, LossTerm

try:
    from timm.data.mixup import FastCollateMixup, Mixup
    from timm.task import TrainingTask
except ImportError as error:
    raise failed_import(error, "timm") from error

__all__ = [
    "LossHandle",
    "add_loss",
    "insert_mono_layer",
    "load_with_mono_layer",
    "mix_with_embeddings",
]


check_version("timm")


def add_loss(
    task: TrainingTask,
    loss: LossTerm,
    *,
    embeddings: Callable[[Tensor], Tensor] | None = None,
    latents: str | nn.Module | None = None,
    warm_up_steps: int = 0,
    start: int = 0,
    sync: bool = False,
) -> LossHandle:
    """Add a loss term to a timm training task.

    The task's result has the term in its ``loss``, the weighted term under its own name, and the
    batch's mean MonoScore as ``monoscore``. Without gradients, as in evaluation, nothing is added.

    Args:
        task: such as timm's ``ClassificationTask``. Only this instance changes.
        loss: such as ``MonoLoss(lam=0.1, lam_units="raw")``.
        embeddings: a frozen encoder, or any callable, from the batch's images to (B, d). It sees
            the images that the model sees: after mixup, the mixed ones. If you leave it out, pass
            embeddings in each call: ``task(images, target, embeddings=h)``.
        latents: the layer that gives the latents, or its path; by default the model's MonoLayer.
        warm_up_steps: the weight grows linearly from 0 over this many calls, counted from now.
            timm's checkpoints do not keep the count.
        start: the weight is 0 for this many calls; the warm-up counts from there. A task does not
            know how long you train, so it takes no share of the run.
        sync: compute the term over the global batch of all processes, with its exact gradient.

    Returns:
        A handle; call its ``remove()`` to take the term away.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: there is no such layer, or no MonoLayer and you name no layer; a term of that
            name is attached already; ``lam_units`` is not "raw"; the task is compiled already; or
            ``start`` is a share of the run.
    """
    if not isinstance(task, TrainingTask):
        raise TypeError(f"task: expected a timm TrainingTask, got {type(task).__name__}")
    attached = LatentTerm(loss, warm_up_steps, start=start, latents=latents, sync=sync)
    attached.first_step(float("inf"))  # an error for a share, before anything changes
    if embeddings is not None:
        require_embeddings(embeddings)
    Attachment.require_free(task, loss.name)
    model = task.get_trainable_module()
    if model is None:
        raise ValueError(f"task: {type(task).__name__} has no model to train")
    if embeddings is not None:
        attached.embeddings = Frozen(embeddings, model)
    attached.begin(model)
    return _Attachment.of(task).add(attached, attached.stop)


class _Attachment(Attachment[LatentTerm]):
    """The terms of one task."""

    host = "timm"
    replaces = ("forward",)

    def forward(
        self,
        inner: Callable[..., dict[str, Tensor]],
        input: Tensor,
        target: Any,
        *rest: Any,
        embeddings: Tensor | None = None,
        **more: Any,
    ) -> dict[str, Tensor]:
        """Return the task's result; with gradients, add the terms to it."""
        result = inner(input, target, *rest, **more)
        if not torch.is_grad_enabled():
            return result
        result = dict(result)
        for name, attached in self.terms.items():
            given = embeddings if attached.embeddings is None else attached.embeddings(input)
            if given is None:
                raise ValueError(
                    f"{name}: no embeddings; call task(images, target, embeddings=...), or give "
                    "add_loss a frozen encoder"
                )
            of_step = attached.compute(given)
            result["loss"] = result["loss"] + of_step.weighted
            result.update(of_step.metrics)
        return result


def mix_with_embeddings(
    mixup: Mixup, images: Any, target: Any, embeddings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply timm's mixup or cutmix to images, targets and precomputed embeddings.

    A mixed image is partly one image and partly another. Its embedding is the mean of their two
    unit embeddings, with the weights that the targets get.

    Args:
        mixup: timm's ``Mixup`` in any mode, but not ``FastCollateMixup`` and not ``multi_label``.
        images: (B, C, H, W); timm changes them in place.
        target: (B,) classes.
        embeddings: (B, d).

    Returns:
        Images, soft targets (B, classes), and embeddings (B, d).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the mixup is one of those, or an argument has the wrong shape.
    """
    if not isinstance(mixup, Mixup):
        raise TypeError(f"mixup: expected timm's Mixup, got {type(mixup).__name__}")
    if isinstance(mixup, FastCollateMixup) or mixup.multi_label:
        raise ValueError("mixup: expected timm's Mixup, for batches with one label an image")
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
    # With its own number as its class, each sample's target says what it is mixed from.
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


give_add_loss(TrainingTask, add_loss)

"""MonoLoss in Hugging Face's own ``Trainer``.

Importing this module is the opt-in: it gives ``Trainer`` a method ``add_loss``::

    import monoloss_plugin.adapters.transformers
    insert_mono_layer(model)                          # of monoloss_plugin.finetuning, before peft
    trainer = Trainer(model, args, train_dataset=data)
    trainer.add_loss(MonoLoss(lam=0.1, lam_units="raw"), embeddings="embeddings")

The term attaches to one Trainer instance, at methods that the host itself calls: ``compute_loss``,
whose result it adds to; ``prediction_step``, which must not see the embeddings; and ``log``. The
scale under gradient accumulation is the host's own rule. And ``from_pretrained`` warns where a
model was saved with a MonoLayer, which only ``load_with_mono_layer`` loads.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from monoloss_plugin._optional import missing_extra
from monoloss_plugin.finetuning import insert_mono_layer, load_with_mono_layer
from monoloss_plugin.finetuning.alignment import Frozen
from monoloss_plugin.finetuning.attached import AttachedTerm, Attachment, require_embeddings
from monoloss_plugin.finetuning.mono_layer import warn_of_lost_layer
from monoloss_plugin.losses import LossHandle, LossTerm

try:
    from transformers import PreTrainedModel, Trainer
except ModuleNotFoundError as error:
    raise missing_extra(error, "vision") from error

__all__ = ["LossHandle", "add_loss", "insert_mono_layer", "load_with_mono_layer"]


def add_loss(
    trainer: Trainer,
    loss: LossTerm,
    *,
    embeddings: str | nn.Module | Callable[[dict[str, Any]], Tensor],
    latents: str | nn.Module | None = None,
    warm_up_steps: int = 0,
    sync: bool = False,
) -> LossHandle:
    """Add a loss term to a Hugging Face ``Trainer``.

    The term is added in training only, and logged with the host's loss: its weighted value under
    its name, and the mean MonoScore of the batches, averaged over the steps of this process. Under
    gradient accumulation it is the mean over the micro-batches of a step, each scored by itself.

    Args:
        trainer: it is not changed but for this instance.
        loss: such as ``MonoLoss(lam=0.1, lam_units="raw")``.
        embeddings: the column of the dataset that has them, (d,) a sample, which the model does
            not get to see (to be added before training, which drops other columns); or a frozen
            encoder, a module from ``pixel_values`` to (B, d); or any callable from the batch's
            inputs, a dict, to (B, d).
        latents: the layer whose output they are, or its path; by default the model's MonoLayer.
        warm_up_steps: the weight grows linearly from 0 over this many optimizer steps.
        sync: over the global batch of all processes, with its exact gradient.

    Returns:
        A handle whose ``remove()`` undoes it.

    Raises:
        TypeError: not a Trainer, loss term or embeddings.
        ValueError: no such layer; a term of that name is there already; units other than "raw"; no
            MonoLayer and no layer named; or a Trainer with ``DataParallel``.

    Warns:
        UserWarning: training has ended; while training, it ends before the warm-up does.
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(f"trainer: expected a transformers Trainer, got {type(trainer).__name__}")
    AttachedTerm.check(loss, warm_up_steps, latents, sync)
    require_embeddings(embeddings, "a column's name")
    if trainer.args.n_gpu > 1:
        raise ValueError(
            "trainer: uses DataParallel, whose copies of the model keep their latents to "
            "themselves; start it with torchrun, a process for each GPU"
        )
    if trainer.model is None or trainer.model_init is not None:
        raise ValueError(
            "trainer: makes its model anew when it trains (model_init), without the layer and its "
            "hook; give it a model"
        )
    attachment = _Attachment.find(trainer, loss.name)
    source: Callable[[dict[str, Any]], Any]
    if isinstance(embeddings, str):
        source = _Column(embeddings)
    elif isinstance(embeddings, nn.Module):
        source = _OfPixels(Frozen(embeddings, trainer.model))
    else:
        source = Frozen(embeddings, trainer.model)
    attached = AttachedTerm(
        loss,
        trainer.model,
        embeddings=source,
        latents=latents,
        warm_up_steps=warm_up_steps,
        sync=sync,
    )
    if trainer.state.global_step and not trainer.is_in_train:
        warnings.warn(
            f"{loss.name}: training has ended, so the term does nothing unless train() is called "
            "again",
            stacklevel=2,
        )
    attachment = attachment or _Attachment(trainer)
    if isinstance(embeddings, str):
        # Or the host would drop the column as one that the model does not take.
        trainer._set_signature_columns_if_needed()
        columns: Any = trainer._signature_columns
        if embeddings not in columns:
            columns.append(embeddings)
            attachment.columns.add(embeddings)
    return attachment.add(attached)


@dataclass(frozen=True)
class _OfPixels:
    """Gives a frozen module the images of a batch."""

    embed: Frozen

    def __call__(self, inputs: dict[str, Any]) -> Any:
        if "pixel_values" not in inputs:
            raise ValueError(f"embeddings: no pixel_values in the batch, only {', '.join(inputs)}")
        return self.embed(inputs["pixel_values"])


@dataclass(frozen=True)
class _Column:
    """Takes the embeddings out of a batch."""

    name: str

    def __call__(self, inputs: dict[str, Any]) -> Any:
        if self.name not in inputs:
            raise ValueError(
                f"embeddings: the batch has no column {self.name!r}, only {', '.join(inputs)}; a "
                "data collator of your own must keep it, and the loss be added before training"
            )
        return inputs[self.name]


class _Attachment(Attachment):
    """What one Trainer carries: its terms, and what they came to since the last log."""

    def __init__(self, trainer: Trainer) -> None:
        self.columns: set[str] = set()
        """What the batches have for the terms, and the model must not see."""
        self.sums: dict[str, tuple[Tensor, int]] = {}
        """Of each metric, and of how many steps."""
        self.step = 0
        self._trainer = trainer
        super().__init__(trainer, _methods(trainer, self))

    def after_removal(self) -> None:
        sources = (other.embeddings for other in self.terms.values())
        wanted = {one.name for one in sources if isinstance(one, _Column)}
        columns: Any = self._trainer._signature_columns
        for column in self.columns - wanted:
            if column in columns:
                columns.remove(column)
        # A training that is under way goes on to get the column, which the model must not see.
        if not self.columns:
            super().after_removal()

    def log(self, metrics: Mapping[str, Tensor], step: int) -> None:
        if step < self.step:  # another run, which has nothing to do with what is left of the last
            self.sums.clear()
        self.step = step
        for name, value in metrics.items():
            total, count = self.sums.get(name, (torch.zeros_like(value), 0))
            self.sums[name] = total + value.detach(), count + 1

    def means(self) -> dict[str, float]:
        """Return the means since the last time, and begin anew."""
        means = {name: float(total) / count for name, (total, count) in self.sums.items()}
        self.sums.clear()
        return means

    def without_columns(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in inputs.items() if key not in self.columns}


def _methods(trainer: Trainer, attachment: _Attachment) -> dict[str, Any]:
    """Return what goes over the host's methods on this instance."""
    compute_loss, predict, log = trainer.compute_loss, trainer.prediction_step, trainer.log

    def compute_loss_with_terms(
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        terms = attachment.terms if torch.is_grad_enabled() else {}
        embeddings = {n: t.embeddings(inputs) for n, t in terms.items() if t.embeddings}
        found = compute_loss(
            model,
            attachment.without_columns(inputs),
            return_outputs=return_outputs,
            num_items_in_batch=num_items_in_batch,
        )
        if not terms:
            return found
        loss: Any
        loss, outputs = found if return_outputs else (found, None)
        scale, step = _scale(trainer, num_items_in_batch), trainer.state.global_step
        metrics: dict[str, Tensor] = {}
        for name, term in terms.items():
            of_step = term(embeddings[name], step, trainer.state.max_steps)
            loss = loss + scale * of_step.weighted
            metrics |= of_step.metrics
        attachment.log(metrics, step)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(model: nn.Module, inputs: dict[str, Any], *rest: Any, **more: Any) -> Any:
        return predict(model, attachment.without_columns(inputs), *rest, **more)

    def log_with_terms(logs: dict[str, float], *rest: Any, **more: Any) -> None:
        if "loss" in logs:  # what the host logs in training
            logs = {**logs, **attachment.means()}
        log(logs, *rest, **more)

    return {
        "compute_loss": compute_loss_with_terms,
        "prediction_step": prediction_step,
        "log": log_with_terms,
    }


def _scale(trainer: Trainer, num_items_in_batch: Any) -> float:
    """What makes a micro-batch's term its share of a step's mean.

    Where the host takes its own loss for scaled already (the model has divided it by the items of
    the whole step), it does not divide what it gets by the number of micro-batches; then we do.
    """
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        by_model = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        scaled = by_model or trainer.compute_loss_func is not None
    if not scaled:
        return 1.0
    steps = getattr(
        trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps
    )
    return 1.0 / float(steps)


if getattr(Trainer, "add_loss", add_loss) is add_loss:
    Trainer.add_loss = add_loss  # type: ignore[attr-defined]


def _with_warning(from_pretrained: Any) -> Any:
    @wraps(from_pretrained)
    def warning(cls: Any, *arguments: Any, **options: Any) -> Any:
        found = from_pretrained(cls, *arguments, **options)
        warn_of_lost_layer(found[0] if isinstance(found, tuple) else found)
        return found

    return classmethod(warning)


_model: Any = PreTrainedModel
if not hasattr(_model, "_warns_of_lost_mono_layer"):  # or a reload would wrap it twice
    _model._warns_of_lost_mono_layer = True
    _model.from_pretrained = _with_warning(_model.from_pretrained.__func__)

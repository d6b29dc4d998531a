"""MonoLoss in Hugging Face's own ``Trainer``.

Import this module to opt in. It gives ``Trainer`` a method ``add_loss``::

    import monoloss_plugin.adapters.transformers
    insert_mono_layer(model)                          # of monoloss_plugin.finetuning, before peft
    trainer = Trainer(model, args, train_dataset=data)
    trainer.add_loss(MonoLoss(lam=0.1, lam_units="raw"), embeddings="embeddings")

The term attaches to one Trainer, at methods that the host calls: ``compute_loss`` returns the loss,
``prediction_step`` must not show the embeddings to the model, and ``log`` writes the logs. Under
gradient accumulation the term follows the host's own rule. Also, ``from_pretrained`` warns if a
model was saved with a MonoLayer: only ``load_with_mono_layer`` loads it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from monoloss_plugin.attaching import Attachment, give_add_loss, require_embeddings
from monoloss_plugin.finetuning import insert_mono_layer, load_with_mono_layer
from monoloss_plugin.finetuning.embeddings import Column, Frozen
from monoloss_plugin.finetuning.latent_term import LatentTerm
from monoloss_plugin.finetuning.mono_layer import warn_of_lost_layer
from monoloss_plugin.hosts import check_version, failed_import
from monoloss_plugin.losses import LossHandle, LossTerm

try:
    from transformers import PreTrainedModel, Trainer
except ImportError as error:
    raise failed_import(error, "transformers") from error

__all__ = ["LossHandle", "add_loss", "insert_mono_layer", "load_with_mono_layer"]

check_version("transformers")

_HINT = "; a data collator of your own must keep it, and you must add the loss before training"


def add_loss(
    trainer: Trainer,
    loss: LossTerm,
    *,
    embeddings: str | nn.Module | Callable[[dict[str, Any]], Tensor],
    latents: str | nn.Module | None = None,
    warm_up_steps: int = 0,
    start: int | float = 0,
    sync: bool = False,
) -> LossHandle:
    """Add a loss term to a Hugging Face ``Trainer``.

    The term is added in training only. It is logged with the host's loss: the weighted term under
    its name, and the batch's mean MonoScore, both averaged over the steps of this process. Under
    gradient accumulation the term of a step is the mean over its micro-batches; each is scored by
    itself.

    Args:
        trainer: only this instance changes.
        loss: such as ``MonoLoss(lam=0.1, lam_units="raw")``.
        embeddings: a column of the dataset with (d,) for each sample, which the model does not see
            (add the loss before training, which drops unknown columns); or a frozen encoder, a
            module from ``pixel_values`` to (B, d); or any callable from the batch's inputs, a dict,
            to (B, d).
        latents: the layer that gives the latents, or its path; by default the model's MonoLayer.
        warm_up_steps: the weight grows linearly from 0 over this many optimizer steps.
        start: the weight is 0 before this optimizer step (an int), or before this share of the run
            (a float below 1); the warm-up counts from there.
        sync: compute the term over the global batch of all processes, with its exact gradient.

    Returns:
        A handle; call its ``remove()`` to take the term away.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: there is no such layer, or no MonoLayer and you name no layer; a term of that
            name is attached already; ``lam_units`` is not "raw"; or the Trainer uses
            ``DataParallel`` or ``model_init``.

    Warns:
        UserWarning: training has ended; in training, it ends before the start or the warm-up does.
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(f"trainer: expected a transformers Trainer, got {type(trainer).__name__}")
    attached = LatentTerm(loss, warm_up_steps, start=start, latents=latents, sync=sync)
    require_embeddings(embeddings, "a column's name")
    if trainer.args.n_gpu > 1:
        raise ValueError(
            "trainer: uses DataParallel, whose copies of the model keep their latents to "
            "themselves; start it with torchrun, one process for each GPU"
        )
    if trainer.model is None or trainer.model_init is not None:
        raise ValueError(
            "trainer: makes a new model when it trains (model_init), without the layer and its "
            "hook; give it a model"
        )
    Attachment.require_free(trainer, loss.name)
    if isinstance(embeddings, str):
        attached.embeddings = Column(embeddings, _HINT)
    else:
        pixels = Column("pixel_values") if isinstance(embeddings, nn.Module) else None
        attached.embeddings = Frozen(embeddings, trainer.model, takes=pixels)
    attached.begin(trainer.model)
    if trainer.state.global_step and not trainer.is_in_train:
        warnings.warn(
            f"{loss.name}: training has ended, so the term does nothing unless you call train() "
            "again",
            stacklevel=2,
        )
    attachment = _Attachment.of(trainer)
    if isinstance(embeddings, str):
        attachment.keep_column(embeddings)

    def undo() -> None:
        attached.stop()
        attachment.drop_unused_columns()

    return attachment.add(attached, undo)


class _Attachment(Attachment[LatentTerm]):
    """The terms of one Trainer, and their metrics since the last log."""

    host = "transformers"
    replaces = ("compute_loss", "prediction_step", "log")

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.columns: set[str] = set()
        """Columns that batches contain for the terms, and that the model must not see."""
        self.sums: dict[str, tuple[Tensor, int]] = {}
        """For each metric its sum, and over how many steps."""
        self.step = 0

    def keep_column(self, name: str) -> None:
        """Have the host keep a column that the model does not take; by default it drops it."""
        self.target._set_signature_columns_if_needed()
        if name not in self.target._signature_columns:
            self.target._signature_columns.append(name)
            self.columns.add(name)

    def drop_unused_columns(self) -> None:
        """Have the host drop the columns that no term reads any more."""
        sources = (attached.embeddings for attached in self.terms.values())
        used = {source.key for source in sources if isinstance(source, Column)}
        for column in self.columns - used:
            if column in self.target._signature_columns:
                self.target._signature_columns.remove(column)

    def is_needed(self) -> bool:
        """Return whether there are terms or columns: a run goes on loading a dropped column."""
        return bool(self.terms or self.columns)

    def compute_loss(
        self,
        inner: Callable[..., Any],
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return what the host returns; with gradients, add the terms to its loss."""
        terms = self.terms if torch.is_grad_enabled() else {}
        embeddings = {n: t.embeddings(inputs) for n, t in terms.items() if t.embeddings}
        returned = inner(
            model,
            self._without_columns(inputs),
            return_outputs=return_outputs,
            num_items_in_batch=num_items_in_batch,
        )
        if not terms:
            return returned
        loss: Any
        loss, outputs = returned if return_outputs else (returned, None)
        scale, state = _scale(self.target, num_items_in_batch), self.target.state
        for name, attached in terms.items():
            of_step = attached.compute(embeddings[name], state.global_step, state.max_steps)
            loss = loss + scale * of_step.weighted
            self._add_to_sums(of_step.metrics)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        inner: Callable[..., Any],
        model: nn.Module,
        inputs: dict[str, Any],
        *rest: Any,
        **more: Any,
    ) -> Any:
        """Evaluate without the embeddings."""
        return inner(model, self._without_columns(inputs), *rest, **more)

    def log(
        self, inner: Callable[..., None], logs: dict[str, float], *rest: Any, **more: Any
    ) -> None:
        """Log the metrics' means since the last log together with the host's training loss."""
        if "loss" in logs:
            means = {name: float(total) / count for name, (total, count) in self.sums.items()}
            self.sums.clear()
            logs = {**logs, **means}
        inner(logs, *rest, **more)

    def _add_to_sums(self, metrics: Mapping[str, Tensor]) -> None:
        step = self.target.state.global_step
        if step < self.step:  # another run: drop what the last run did not log
            self.sums.clear()
        self.step = step
        for name, value in metrics.items():
            total, count = self.sums.get(name, (torch.zeros_like(value), 0))
            self.sums[name] = total + value.detach(), count + 1

    def _without_columns(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in inputs.items() if key not in self.columns}


def _scale(trainer: Trainer, num_items_in_batch: Any) -> float:
    """Return what a micro-batch's term is multiplied by to be its share of the step's mean.

    The host divides a loss by the number of micro-batches, unless the model or the loss function
    has divided it by the items of the whole step already. Then we must divide the term.
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


give_add_loss(Trainer, add_loss)


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

"""MonoLoss in your own LightningModule, by a callback.

::

    loss = MonoLoss(lam=0.1, lam_units="raw")
    callback = MonoLossCallback(loss, embeddings=lambda batch: batch[2])
    Trainer(callbacks=[callback]).fit(module, loader)

During ``fit`` the callback adds the term to the loss that the module's ``training_step`` returns.
After it the module is as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from monoloss_plugin.attaching import Attachment, require_embeddings
from monoloss_plugin.finetuning.embeddings import Column, Frozen
from monoloss_plugin.finetuning.latent_term import LatentTerm
from monoloss_plugin.hosts import check_version, failed_import
from monoloss_plugin.losses import LossHandle, LossTerm

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise failed_import(error, "lightning") from error

__all__ = ["MonoLossCallback"]


check_version("lightning")


class MonoLossCallback(Callback):
    """Adds a loss term to a LightningModule's training step.

    Lightning does gradient accumulation, precision and strategies: it divides the step's loss
    together with the term. The weighted term is logged under its name, and the batch's mean
    MonoScore as ``monoscore``.

    Args:
        loss: such as ``MonoLoss(lam=0.1, lam_units="raw")``.
        embeddings: maps the batch to (B, d): a callable, a frozen encoder that takes the batch, or
            the key of a batch that is a dict.
        latents: the layer that gives the latents, or its path in the module; by default its
            MonoLayer.
        warm_up_steps: the weight grows linearly from 0 over this many optimizer steps.
        start: the weight is 0 before this optimizer step (an int), or before this share of the fit
            (a float below 1); the warm-up counts from there.
        sync: compute the term over the global batch of all processes, with its exact gradient.

    Raises:
        TypeError: an argument has the wrong type; in ``fit``, the training step returns no loss.
        ValueError: ``lam_units`` is not "raw"; in ``fit``, the module optimizes manually, there is
            no such layer, a callback adds a term of the same name, or ``start`` is a share and the
            fit has no known end.

    Warns:
        UserWarning: in ``fit``, you added the callback too late, no step was trained, or training
            ends before the start or the warm-up does.
    """

    def __init__(
        self,
        loss: LossTerm,
        *,
        embeddings: str | Callable[[Any], Any],
        latents: str | nn.Module | None = None,
        warm_up_steps: int = 0,
        start: int | float = 0,
        sync: bool = False,
    ) -> None:
        require_embeddings(embeddings, "a key of the batch")
        source = Column(embeddings) if isinstance(embeddings, str) else Frozen(embeddings)
        self._attached = LatentTerm(
            loss, warm_up_steps, source, start=start, latents=latents, sync=sync
        )
        self._handle: LossHandle | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Add the term to the module."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise ValueError(
                "module: it optimizes manually (automatic_optimization=False); add the loss in its "
                "training_step, with a LatentRecorder"
            )
        self._remove()
        Attachment.require_free(pl_module, self._attached.term.name)
        self._attached.begin(pl_module)
        self._handle = _Attachment.of(pl_module).add(self._attached, self._attached.stop)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Warn if the callback came too late to be set up."""
        if self._handle is None:
            warnings.warn(
                f"{self._attached.term.name}: you added the callback after fit() began, so it does "
                "nothing in this fit; give it to Trainer(callbacks=[...])",
                stacklevel=2,
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the term, and warn if no step was trained."""
        if self._handle is not None and not self._attached.calls:
            warnings.warn(
                f"{self._attached.term.name}: fit() ended without a training step, so the term did "
                "nothing; had training ended already?",
                stacklevel=2,
            )
        self._remove()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove the term if the fit fails."""
        self._remove()

    def _remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class _Attachment(Attachment[LatentTerm]):
    """The terms of one module, one for each callback."""

    host = "lightning"
    replaces = ("training_step",)

    def training_step(self, inner: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Return what the module's own step returns, with the terms added to its loss."""
        output = inner(*arguments, **options)
        if output is None:  # Lightning skips the batch
            return None
        loss = output.get("loss") if isinstance(output, dict) else output
        if not isinstance(loss, Tensor):
            got = type(output).__name__
            raise TypeError(f"training_step: expected a loss or a dict with one, got {got}")
        batch = arguments[0] if arguments else options["batch"]
        trainer = self.target.trainer
        for attached in self.terms.values():
            assert attached.embeddings is not None
            of_step = attached.compute(
                attached.embeddings(batch), trainer.global_step, trainer.estimated_stepping_batches
            )
            for name, value in of_step.metrics.items():
                self.target.log(name, value.float(), batch_size=1)
            loss = loss + of_step.weighted
        return {**output, "loss": loss} if isinstance(output, dict) else loss

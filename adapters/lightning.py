"""MonoLoss in a LightningModule of your own: a callback.

::

    loss = MonoLoss(lam=0.1, lam_units="raw")
    callback = MonoLossCallback(loss, embeddings=lambda batch: batch[2])
    Trainer(callbacks=[callback]).fit(module, loader)

The callback adds the term to what the module's ``training_step`` returns while it fits, and gives
the module back as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from types import MethodType
from typing import Any

from torch import Tensor, nn

from monoloss_plugin._optional import missing_extra
from monoloss_plugin.finetuning.alignment import Frozen
from monoloss_plugin.finetuning.attached import AttachedTerm, Replaced, require_embeddings
from monoloss_plugin.losses import LossTerm

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise missing_extra(error, "lightning") from error

__all__ = ["MonoLossCallback"]


class MonoLossCallback(Callback):
    """Adds a loss term to a LightningModule's training step.

    Gradient accumulation, precision and strategies are the host's: it divides the step's loss,
    term and all. The weighted term is logged under its name, and the batch's mean MonoScore.

    Args:
        loss: such as ``MonoLoss(lam=0.1, lam_units="raw")``.
        embeddings: from the batch to (B, d): a callable, a frozen encoder that takes the batch, or
            the key of a batch that is a dict.
        latents: the layer whose output they are, or its path in the module; by default its
            MonoLayer.
        warm_up_steps: the weight grows linearly from 0 over this many optimizer steps.
        sync: over the global batch of all processes, with its exact gradient.

    Raises:
        TypeError: not a loss term or embeddings; while fitting, a training step that returns no
            loss.
        ValueError: units other than "raw"; while fitting, a module that optimizes by itself, or no
            MonoLayer and no layer named.

    Warns:
        UserWarning: while fitting, the callback was added too late, no step is trained, or training
            ends before the warm-up does.
    """

    def __init__(
        self,
        loss: LossTerm,
        *,
        embeddings: str | Callable[[Any], Any],
        latents: str | nn.Module | None = None,
        warm_up_steps: int = 0,
        sync: bool = False,
    ) -> None:
        require_embeddings(embeddings, "a key of the batch")
        AttachedTerm.check(loss, warm_up_steps, latents, sync)
        self._key = embeddings if isinstance(embeddings, str) else None
        self._embeddings = self._by_key if isinstance(embeddings, str) else Frozen(embeddings, None)
        self._options: dict[str, Any] = {
            "latents": latents,
            "warm_up_steps": warm_up_steps,
            "sync": sync,
        }
        self._loss = loss
        self._attached: AttachedTerm | None = None
        self._replaced: Replaced | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap the training step."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise ValueError(
                "module: optimizes by itself (automatic_optimization=False); add the loss in its "
                "training_step, with a LatentRecorder"
            )
        self._attached = AttachedTerm(self._loss, pl_module, **self._options)
        step = pl_module.training_step

        # The host looks at its parameters to know what to call it with.
        @wraps(step.__func__ if isinstance(step, MethodType) else step)
        def training_step(*arguments: Any, **more: Any) -> Any:
            return self._with_term(trainer, pl_module, step(*arguments, **more), arguments, more)

        self._replaced = Replaced(pl_module, {"training_step": training_step})

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Warn where the callback came too late to be set up."""
        if self._attached is None:
            warnings.warn(
                f"{self._loss.name}: the callback was added after fit() began, so it does nothing "
                "in this fit; give it to Trainer(callbacks=[...])",
                stacklevel=2,
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module back as it was, and warn where there was nothing to train."""
        if self._attached is not None and not self._attached.calls:
            warnings.warn(
                f"{self._loss.name}: fit() ended without a training step, so the term did nothing; "
                "had training ended already?",
                stacklevel=2,
            )
        self._give_back()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the module back where the host does not come to its end."""
        self._give_back()

    def _give_back(self) -> None:
        if self._attached is not None and self._replaced is not None:
            self._attached.recorder.remove()
            self._replaced.undo()
            self._attached = self._replaced = None

    def _with_term(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        output: Any,
        arguments: tuple[Any, ...],
        more: Mapping[str, Any],
    ) -> Any:
        if output is None:  # the host skips the batch
            return None
        loss = output.get("loss") if isinstance(output, dict) else output
        if not isinstance(loss, Tensor):
            got = type(output).__name__
            raise TypeError(f"training_step: expected a loss or a dict with one, got {got}")
        assert self._attached is not None
        batch = arguments[0] if arguments else more["batch"]
        of_step = self._attached(
            self._embeddings(batch), trainer.global_step, trainer.estimated_stepping_batches
        )
        for name, value in of_step.metrics.items():
            pl_module.log(name, value.float(), batch_size=1)
        loss = loss + of_step.weighted
        return {**output, "loss": loss} if isinstance(output, dict) else loss

    def _by_key(self, batch: Any) -> Any:
        if not isinstance(batch, Mapping) or self._key not in batch:
            has = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(f"embeddings: the batch has no {self._key!r}; it is or has {has}")
        return batch[self._key]

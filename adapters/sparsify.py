"""MonoLoss and the Top-k regularizers in EleutherAI sparsify's own trainer.

Import this module to opt in. It gives ``sparsify.Trainer`` a method ``add_loss``::

    import monoloss_plugin.adapters.sparsify
    trainer = Trainer(cfg, dataset, model)
    handle = trainer.add_loss(MonoLoss(lam=3e-4), warm_up_steps=1000)
    trainer.fit()

A term attaches to the SAEs and transcoders in ``trainer.saes``. In training, the FVU that each of
them returns has the gradient of FVU and terms together, and the value of the FVU alone: the host's
logs and ``save_best`` see what they always see. Works with eai-sparsify 1.3.2 and later 1.

Without a GPU, set the environment variable ``SPARSIFY_DISABLE_TRITON=1`` before you import
sparsify: where triton is installed, its decoder needs a GPU.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from monoloss_plugin.attaching import AttachedTerm, Attachment, give_add_loss, require_embeddings
from monoloss_plugin.hosts import check_version, failed_import, moved_seam
from monoloss_plugin.losses import LossHandle, LossTerm
from monoloss_plugin.other_saes import sparse_latents
from monoloss_plugin.sae_terms import Embeddings, LamConversion, SaeTerms

try:
    from sparsify import SparseCoder, Trainer
except ImportError as error:
    raise failed_import(error, "sparsify") from error

__all__ = ["LossHandle", "add_loss", "last_metrics"]

check_version("sparsify")
logger = logging.getLogger(__name__)

_RECORD = "monoloss_terms.json"
"""What lam became and the inputs' scale, in the folder of each SAE that the host saves."""


def add_loss(
    trainer: Any,
    loss: LossTerm,
    *,
    warm_up_steps: int = 0,
    start: int | float = 0,
    embeddings: Embeddings | None = None,
    saes: Iterable[str] | None = None,
) -> LossHandle:
    """Add a loss term to a sparsify trainer, before or during training.

    Steps are steps of the optimizer: with ``grad_acc_steps=4``, one is four batches. With
    ``micro_acc_steps``, the term is computed for each chunk of a batch, and averaged.

    Args:
        trainer: a ``sparsify.Trainer`` with ``loss_fn="fvu"``.
        loss: the term, such as ``MonoLoss(lam=3e-4)``.
        warm_up_steps: the weight grows linearly from 0 over this many steps.
        start: the weight is 0 before this step (an int), or before this share of the run (a float
            below 1); the warm-up counts from there.
        embeddings: a function from the SAE's input (B, d_in), a transcoder's too, to the similarity
            space (B, d) of the same tokens. By default that input itself. If it returns a
            :class:`~monoloss_plugin.batch.Batch` with ``embeddings`` and ``images``, pairs within
            an image (or any other group) are left out.
        saes: the names in ``trainer.saes`` to attach to; all by default.

    Returns:
        A handle; call its ``remove()`` to take the term away.

    Raises:
        TypeError: the trainer or the loss has the wrong type.
        ValueError: a term of that name is attached already, the trainer's ``loss_fn`` is "ce" or
            "kl", or an argument is out of range.

    Warns:
        UserWarning: training has ended, or it ends before the start or the warm-up does.
    """
    attached = AttachedTerm(loss, warm_up_steps, embeddings, start=start)
    if embeddings is not None:
        require_embeddings(embeddings)
    found = _find_saes(trainer, saes)
    if trainer.cfg.loss_fn != "fvu":
        raise ValueError(
            f"trainer: {loss.name} is added to each SAE's own loss, which a trainer with "
            f"loss_fn={trainer.cfg.loss_fn!r} does not use; train with loss_fn='fvu'"
        )
    for coder in found.values():
        Attachment.require_free(coder, loss.name)
    _warn_of_no_effect(trainer, attached)
    attachments = {name: _Attachment.of(coder) for name, coder in found.items()}
    of_trainer = _TrainerAttachment.of(trainer)
    of_trainer.coders |= attachments
    handles = []
    for name, attachment in attachments.items():
        attachment.name, attachment.trainer = name, ref(trainer)
        handles.append(attachment.add(attached))

    def remove() -> None:
        for handle in handles:
            handle.remove()
        of_trainer.release()

    return LossHandle(loss.name, remove)


def last_metrics(trainer: Any) -> dict[str, dict[str, float]]:
    """Return what the terms measured in the last step, by the name of the SAE.

    For MonoLoss these are ``monoloss``, the weighted term, ``monoscore``, the mean MonoScore of the
    latents that have a score in the batch, and ``monoscore_defined``, how many have.

    Raises:
        TypeError: the trainer is not a ``sparsify.Trainer``.
    """
    _require_trainer(trainer)
    attachment = _TrainerAttachment.on(trainer)
    coders = {} if attachment is None else attachment.coders
    return {name: coder.metrics() for name, coder in coders.items() if coder.terms}


def _require_trainer(trainer: Any) -> None:
    if not isinstance(trainer, Trainer):
        got = trainer.__name__ if isinstance(trainer, type) else type(trainer).__name__
        raise TypeError(f"trainer: expected a sparsify.Trainer, got {got}")


def _find_saes(trainer: Any, saes: Iterable[str] | None) -> dict[str, SparseCoder]:
    """Return the SAEs of this process to attach to, by name."""
    _require_trainer(trainer)
    if saes is not None and (isinstance(saes, str) or not isinstance(saes, Iterable)):
        raise TypeError(f"saes: expected a list of names, got {saes!r}")
    # With distribute_modules, other processes train the other hookpoints.
    hookpoints, seeds = trainer.cfg.hookpoints, trainer.cfg.init_seeds
    every = [f"{h}/seed{s}" for h in hookpoints for s in seeds] if len(seeds) > 1 else hookpoints
    names = list(every) if saes is None else list(saes)
    if not names or not set(names) <= set(every):
        raise ValueError(f"saes: expected some of {list(every)}, got {names}")
    return {name: trainer.saes[name] for name in names if name in trainer.saes}


def _num_steps(trainer: Trainer) -> int:
    """Return how many steps the optimizer will do, as the host counts whole batches."""
    return int(len(trainer.dataset) // trainer.cfg.batch_size // trainer.cfg.grad_acc_steps)


def _steps_done(trainer: Trainer) -> int:
    """Return how many steps the optimizer has done; the host's own counter counts batches."""
    return int(trainer.global_step // trainer.cfg.grad_acc_steps)


def _warn_of_no_effect(trainer: Trainer, attached: AttachedTerm) -> None:
    """Warn if training has ended, or will end before the term has its full weight."""
    steps, done = _num_steps(trainer), _steps_done(trainer)
    if 0 < steps <= done:
        warnings.warn(
            f"{attached.term.name}: training has ended ({done} of {steps} steps), so the term does "
            "nothing; add it before fit()",
            stacklevel=3,
        )
    else:
        attached.warn_of_long_warm_up(steps, done)


class _TrainerAttachment(Attachment[AttachedTerm]):
    """Gives the terms' scale back to the SAEs of a resumed trainer."""

    host = "sparsify"
    replaces = ("load_state",)

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.coders: dict[str, _Attachment] = {}

    def load_state(self, inner: Callable[[str], None], path: str) -> None:
        """Load the host's state, and what the checkpoint records about the terms."""
        inner(path)
        for name, attachment in self.coders.items():
            file = Path(path) / name / _RECORD
            attachment.computed.record = json.loads(file.read_text()) if file.exists() else {}

    def is_needed(self) -> bool:
        """Return whether some SAE carries a term."""
        return any(attachment.terms for attachment in self.coders.values())

    def release(self) -> None:
        """Restore the host's method, if no SAE carries a term any more."""
        if self._replaced and not self.is_needed():
            self._give_back()


class _Attachment(Attachment[AttachedTerm]):
    """The terms of one SAE or transcoder."""

    host = "sparsify"
    replaces = ("forward", "encode", "save_to_disk")

    def __init__(self, coder: SparseCoder) -> None:
        super().__init__(coder)
        if "total_variance" not in signature(type(coder).forward).parameters:
            raise moved_seam("sparsify", "SparseCoder.forward(total_variance=...)")
        self.computed = SaeTerms(LamConversion("sparsify", "fvu", logger))
        self.name = ""
        # A copy of the SAE must not copy the trainer, its model and its data.
        self.trainer: Callable[[], Trainer | None] = lambda: None
        self._encodings: list[Any] | None = None

    def forward(
        self, inner: Callable[..., Any], x: Tensor, y: Tensor | None = None, **options: Any
    ) -> Any:
        """Give the output's FVU the gradient of the terms too."""
        trainer = self.trainer()
        trains = torch.is_grad_enabled() and options.get("total_variance") is not None
        if not self.terms or not trains or trainer is None:
            return inner(x, y, **options)
        # With multi_topk, the host returns other activations, which have no gradient.
        with self._keep_encodings() as encodings:
            output = inner(x, y, **options)
        acts, indices = encodings[0]
        total = self.computed.add_up(
            self.terms.values(),
            sparse_latents(acts, indices, self.target.num_latents),
            x,
            targets=x if y is None else y,
            step=_steps_done(trainer),
            steps=_num_steps(trainer),
            pre_acts=self._pre_acts(x),
            gradient_at="active",
        )
        self._log(trainer)
        if not total.requires_grad:
            return output
        # The chunks of a batch share its FVU, and the host divides by their number all the same.
        total = total / trainer.cfg.micro_acc_steps
        return output._replace(fvu=output.fvu + (total - total.detach()).to(output.fvu.dtype))

    def encode(self, inner: Callable[[Tensor], Any], x: Tensor) -> Any:
        """Keep what the encoder selects."""
        encoding = inner(x)
        if self._encodings is not None:
            self._encodings.append((encoding.top_acts, encoding.top_indices))
        return encoding

    def save_to_disk(self, inner: Callable[[Path | str], None], path: Path | str) -> None:
        """Save the SAE, and beside it what lam became and the inputs' scale."""
        inner(path)
        if self.computed.record:
            (Path(path) / _RECORD).write_text(json.dumps(self.computed.record, indent=1))

    def metrics(self) -> dict[str, float]:
        """Return the last step's metrics."""
        return {name: float(value) for name, value in self.computed.metrics.items()}

    @contextmanager
    def _keep_encodings(self) -> Iterator[list[Any]]:
        """Collect what the encoder gives."""
        encodings: list[Any] = []
        self._encodings = encodings
        try:
            yield encodings
        finally:
            self._encodings = None

    def _pre_acts(self, x: Tensor) -> Tensor | None:
        """Return the activations (N, M) before ReLU and selection, if a term needs them.

        The host's own pass no gradient to the encoder.
        """
        coder = self.target
        if not any(attached.term.needs_selection for attached in self.terms.values()):
            return None
        z: Tensor = coder.encoder(x.to(coder.dtype) if coder.cfg.transcode else x - coder.b_dec)
        return z

    def _log(self, trainer: Trainer) -> None:
        """Add the metrics to the row that the host will send to Weights & Biases at this step."""
        step, left = divmod(trainer.global_step + 1, trainer.cfg.grad_acc_steps)
        due = left == 0 and (step + 1) % trainer.cfg.wandb_log_frequency == 0
        wandb: Any = sys.modules.get("wandb")
        if due and trainer.cfg.log_to_wandb and getattr(wandb, "run", None) is not None:
            metrics = {f"{key}/{self.name}": value for key, value in self.metrics().items()}
            wandb.log(metrics, step=step)


give_add_loss(Trainer, add_loss)

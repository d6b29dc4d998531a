"""MonoLoss and the Top-k regularizers in SAELens's own trainers.

Import this module to opt in. It gives SAELens's trainers and training runners a method
``add_loss``, and :func:`add_loss` does the same for a training SAE::

    import monoloss_plugin.adapters.sae_lens
    trainer = SAETrainer(cfg=cfg, sae=sae, data_provider=batches)
    handle = trainer.add_loss(MonoLoss(lam=3e-4), warm_up_steps=1000)

A term attaches to one SAE, at methods that the host calls: ``training_forward_pass`` returns the
loss and what is logged, and ``get_coefficients`` gives the coefficients to schedule. The host's
classes and other SAEs do not change. Works with SAELens 6.53.1 and later 6.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from monoloss_plugin._checks import as_rows, looks_are_free
from monoloss_plugin._places import as_path, require_file
from monoloss_plugin.attaching import (
    AttachedTerm,
    Attachment,
    StepTerm,
    give_add_loss,
    require_embeddings,
)
from monoloss_plugin.hosts import check_version, failed_import
from monoloss_plugin.kernels.batch import GradientAt
from monoloss_plugin.kernels.support import is_sparse, sampled_rows
from monoloss_plugin.losses import LossHandle, LossTerm, StepTensors
from monoloss_plugin.sae_terms import Embeddings, LamConversion, tensors_of_sae

try:
    from sae_lens import (
        AbsTopKTrainingSAE,
        GatedTrainingSAE,
        JumpReLUTrainingSAE,
        LanguageModelSAETrainingRunner,
        MatryoshkaBatchTopKTrainingSAE,
        SAETrainer,
        StandardTrainingSAE,
        TopKTrainingSAE,
        TrainingSAE,
    )
    from sae_lens.constants import SAE_CFG_FILENAME, TRAINER_STATE_FILENAME
    from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner
    from sae_lens.saes.batchtopk_sae import BatchTopK
    from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput, TrainStepOutput
    from sae_lens.saes.topk_sae import TopK
    from sae_lens.synthetic import SyntheticSAERunner
    from sae_lens.training.activation_scaler import ActivationScaler
    from sae_lens.training.multi_sae_trainer import MultiSAETrainer
    from sae_lens.training.optim import CoefficientScheduler
except ImportError as error:
    raise failed_import(error, "sae_lens") from error

__all__ = ["LossHandle", "add_loss", "strip_checkpoint"]

check_version("sae_lens")
logger = logging.getLogger(__name__)

_METADATA = "monoloss"


def add_loss(
    target: Any,
    loss: LossTerm,
    *,
    warm_up_steps: int = 0,
    start: int | float = 0,
    embeddings: Embeddings | None = None,
    saes: Iterable[str] | None = None,
) -> LossHandle:
    """Add a loss term to a SAELens trainer, runner or training SAE.

    The host shows the term under its name in its losses, progress bar and logs. Its schedule and
    checkpoints contain the coefficient: 0 before the start, then ``lam`` times the warm-up. The
    metric ``<name>_weight`` is the weight applied: the coefficient, converted to the host's loss.

    Args:
        target: an ``SAETrainer`` or ``MultiSAETrainer`` (before or during training), a
            ``LanguageModelSAETrainingRunner``, ``MultiSAETrainingRunner`` or
            ``SyntheticSAERunner`` (before ``run``), or a ``TrainingSAE`` (before you make its
            trainer).
        loss: the term, such as ``MonoLoss(lam=3e-4)``.
        warm_up_steps: the coefficient grows linearly from 0 over this many steps.
        start: the coefficient is 0 before this step (an int), or before this share of the trainer's
            ``total_training_steps`` (a float below 1); the warm-up counts from there. Only for a
            trainer or a ``LanguageModelSAETrainingRunner``.
        embeddings: a function from the SAE's input (B, d_in), un-whitened where SAELens whitens it,
            to the similarity space (B, d) of the same samples. By default that input itself. If
            samples are patches of images, the function returns a
            :class:`~monoloss_plugin.batch.Batch` with ``embeddings`` and ``images``:
            ``FeatureBatches.samples_of`` does. Pairs within an image are then left out.
        saes: for a target with several SAEs, the names of those to attach to; all by default.

    Returns:
        A handle; call its ``remove()`` to take the term away.

    Raises:
        TypeError: the target or the loss has the wrong type.
        ValueError: a term of that name is attached already, the architecture does not give the term
            what it needs, the target cannot start a term late, or an argument is out of range.

    Warns:
        UserWarning: training has ended, or it ends before the start or the warm-up does.

    Examples:
        >>> from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
        >>> from monoloss_plugin import MonoLoss
        >>> sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=8, d_sae=16, k=2))
        >>> handle = add_loss(sae, MonoLoss(lam=3e-4), warm_up_steps=100)
        >>> sae.get_coefficients()
        {'monoloss': TrainCoefficientConfig(value=0.0003, warm_up_steps=100)}
        >>> handle.remove()
        >>> sae.get_coefficients()
        {}
    """
    attached = AttachedTerm(loss, warm_up_steps, embeddings, start=start)
    if embeddings is not None:
        require_embeddings(embeddings)
    found = _find_saes(target, saes)
    for sae, owner in found:
        _check(sae, owner, attached)
    _warn_of_no_effect(target, attached)
    handles = [_attach(sae, owner, attached) for sae, owner in found]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return LossHandle(loss.name, remove)


def strip_checkpoint(checkpoint: str | Path) -> list[str]:
    """Rewrite a training checkpoint so that you can resume it without its loss terms.

    SAELens restores every coefficient in a checkpoint. It stops with a ``KeyError`` if the run has
    no coefficient of that name. To go on *with* the terms, leave the checkpoint as it is and call
    ``add_loss`` before ``load_trainer_state``.

    Args:
        checkpoint: a folder written by ``SAETrainer.save_checkpoint``, or the subfolder of one SAE
            in a ``MultiSAETrainer`` checkpoint.

    Returns:
        The names that were removed; empty if there were none.

    Raises:
        FileNotFoundError: the folder is not a training checkpoint.
        TypeError: the argument is not a path.
    """
    folder = as_path(checkpoint, "checkpoint")
    state_path = folder / TRAINER_STATE_FILENAME
    require_file(state_path, "checkpoint")
    state = torch.load(state_path, map_location="cpu", weights_only=True)
    schedules = state["coefficient_schedulers"]
    terms = _saved_record(folder).get("terms", {})
    removed = [name for name in terms if schedules.pop(name, None) is not None]
    if removed:
        partial = state_path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, state_path)
    return removed


_Owner: TypeAlias = SAETrainer[Any, Any] | LanguageModelSAETrainingRunner
"""What can undo the whitening of an SAE's inputs."""


def _find_saes(
    target: Any, saes: Iterable[str] | None
) -> list[tuple[TrainingSAE[Any], _Owner | None]]:
    """Return the SAEs to attach to, each with its trainer or the runner that will make one."""
    if saes is not None and (isinstance(saes, str) or not isinstance(saes, Iterable)):
        raise TypeError(f"saes: expected a list of names, got {saes!r}")
    if isinstance(target, (MultiSAETrainer, MultiSAETrainingRunner)):
        trainers = target.trainers if isinstance(target, MultiSAETrainer) else {}
        names = list(target.saes) if saes is None else list(saes)
        if not names or not set(names) <= set(target.saes):
            raise ValueError(f"saes: expected some of {list(target.saes)}, got {names}")
        return [(target.saes[name], trainers.get(name)) for name in names]
    if saes is not None:
        raise ValueError(f"saes: only for a target with several SAEs, not {type(target).__name__}")
    if isinstance(target, (SAETrainer, LanguageModelSAETrainingRunner)):
        return [(target.sae, target)]
    if isinstance(target, (SyntheticSAERunner, TrainingSAE)):
        return [(target if isinstance(target, TrainingSAE) else target.sae, None)]
    raise TypeError(
        "target: expected a SAELens SAETrainer, MultiSAETrainer, training runner or TrainingSAE, "
        f"got {type(target).__name__}"
    )


def _warn_of_no_effect(target: Any, attached: AttachedTerm) -> None:
    """Warn if training has ended, or will end before the term has its full weight."""
    steps = getattr(target.cfg, "total_training_steps", None)
    if steps is None:  # an SAE alone, which does not know its trainer
        return
    done = getattr(target, "n_training_samples", None)  # a runner has not begun
    if done is not None and done >= target.cfg.total_training_samples:
        warnings.warn(
            f"{attached.term.name}: training has ended ({done} of "
            f"{target.cfg.total_training_samples} samples), so the term does nothing; add it "
            "before fit()",
            stacklevel=3,
        )
    else:
        attached.warn_of_long_warm_up(steps, getattr(target, "n_training_steps", 0))


def _check(sae: TrainingSAE[Any], owner: _Owner | None, attached: AttachedTerm) -> None:
    """Raise ValueError if the term cannot work on this SAE, before anything changes."""
    term, architecture = attached.term, sae.cfg.architecture()
    Attachment.require_free(sae, term.name)
    if term.name in sae.get_coefficients():
        raise ValueError(
            f"{term.name}: SAELens has a coefficient of this name; give the term another name"
        )
    if term.needs_selection and not isinstance(sae, TopKTrainingSAE):
        raise ValueError(
            f"{term.name}: needs a Top-k selection (topk, batchtopk, matryoshka_batchtopk, "
            f"abstopk); the architecture {architecture!r} has none"
        )
    if term.needs_nonnegative and isinstance(sae, AbsTopKTrainingSAE):
        remedy = "; use rectify=False" if term.needs_selection else ""
        raise ValueError(
            f"{term.name}: reads 0 as 'not active', but {architecture!r} activations are signed"
            f"{remedy}"
        )
    # The host makes a schedule without a start from what the SAE gives it.
    if attached.start and owner is None:
        raise ValueError(
            f"start: {term.name} cannot start late here, because SAELens makes the schedule "
            "itself; add the loss to the SAETrainer or MultiSAETrainer"
        )
    # Whitening makes cosine similarities meaningless. Only the trainer can undo it.
    whitened = sae.cfg.normalize_activations == "covariance_whitening"
    compares_inputs = term.needs_embeddings and attached.embeddings is None
    if whitened and compares_inputs and owner is None:
        raise ValueError(
            f"{term.name}: with normalize_activations='covariance_whitening' the SAE sees "
            "whitened inputs, whose similarities mean nothing; add the loss to the SAETrainer, "
            "which can undo the whitening, or give embeddings="
        )


def _attach(sae: TrainingSAE[Any], owner: _Owner | None, attached: AttachedTerm) -> LossHandle:
    """Attach a term to one SAE."""
    attachment, name = _Attachment.of(sae), attached.term.name
    if owner is None:
        return attachment.add(attached)
    if isinstance(owner, LanguageModelSAETrainingRunner):
        return attachment.add(attached, _RunnerAttachment.of(owner).add(attached).remove)
    attachment.scaler = owner.activation_scaler
    owner.coefficient_schedulers[name] = _Schedule(attached, owner)
    return attachment.add(attached, lambda: owner.coefficient_schedulers.pop(name, None))


class _Schedule(CoefficientScheduler):  # type: ignore[misc]
    """The coefficient of one term in one trainer: the host's, with a start."""

    def __init__(self, attached: AttachedTerm, trainer: SAETrainer[Any, Any]) -> None:
        super().__init__(warm_up_steps=attached.warm_up_steps, final_value=attached.term.lam)
        self.attached, self.trainer = attached, trainer
        self.added_at = 0
        """How many steps the trainer had done at this schedule's first step."""

    @property
    def value(self) -> float:
        """The coefficient of the next step."""
        # The trainer may load a checkpoint before the first step. After it we count ourselves: a
        # checkpoint that the host writes in a step has counted the step here, but not there.
        added_at = self.added_at if self.current_step else self.trainer.n_training_steps
        steps = self.trainer.cfg.total_training_steps
        return self.attached.weight_at(added_at + self.current_step, steps, added_at)

    def step(self) -> float:
        """Count a step."""
        if not self.current_step:
            self.added_at = self.trainer.n_training_steps
        self.current_step += 1
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {**super().state_dict(), "added_at": self.added_at}


class _Attachment(Attachment[AttachedTerm]):
    """The terms of one SAE."""

    host = "sae_lens"
    replaces = ("training_forward_pass", "get_coefficients", "load_weights_from_checkpoint")

    def __init__(self, sae: TrainingSAE[Any]) -> None:
        super().__init__(sae)
        self.scaler: ActivationScaler | None = None
        self.conversion = LamConversion("SAELens", "sum", logger)
        # Two SAEs may share one config object. What we record is about this one.
        sae.cfg = copy.copy(sae.cfg)
        sae.cfg.metadata = copy.deepcopy(sae.cfg.metadata)

    def training_forward_pass(
        self, inner: Callable[..., TrainStepOutput], step_input: TrainStepInput
    ) -> TrainStepOutput:
        """Add every term to the output's loss, losses and metrics."""
        output = inner(step_input)
        self._add_terms(step_input, output)
        return output

    def get_coefficients(
        self, inner: Callable[[], dict[str, Any]]
    ) -> dict[str, float | TrainCoefficientConfig]:
        """Return the host's coefficients and the terms'."""
        coefficients = dict(inner())
        for name, attached in self.terms.items():
            # The host's schedule knows no start. With NaN, a trainer that never gets ours fails.
            lam = math.nan if attached.start else attached.term.lam
            coefficients[name] = TrainCoefficientConfig(lam, attached.warm_up_steps)
        return coefficients

    def load_weights_from_checkpoint(
        self, inner: Callable[..., None], checkpoint_path: Path | str
    ) -> None:
        """Load weights, and what the checkpoint records about its terms."""
        inner(checkpoint_path)
        checkpoint = Path(checkpoint_path)
        # The host reads only the weights here, so a folder without a config is enough for it.
        has_config = (checkpoint / SAE_CFG_FILENAME).is_file()
        record = _saved_record(checkpoint) if has_config else {}
        if record:
            self.target.cfg.metadata[_METADATA] = record

    # A compiled SAE calls this uncompiled, at one graph break: there is nothing here to fuse with
    # the host's graph, and first steps and logging are Python's business.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _add_terms(self, step_input: TrainStepInput, output: TrainStepOutput) -> None:
        if not self.terms:
            return
        self.conversion.begin_step(step_input.n_training_steps)
        for name, attached in self.terms.items():
            if name in output.losses:
                raise ValueError(
                    f"{name}: SAELens has a loss of this name; give the term another name"
                )
            weight = self._weight(attached, step_input, output)
            output.metrics[f"{name}_weight"] = weight
            # At weight 0 the term is only measured: on the steps that the host logs, and without a
            # gradient, so that the run stays bit-identical to the host's own.
            if weight == 0 and not getattr(step_input, "is_logging_step", True):
                output.losses[name] = torch.zeros_like(output.loss)
                continue
            weighted, metrics = StepTerm.of(
                attached.term, self._step_tensors(attached, output), weight
            )
            if weight != 0:
                output.loss = output.loss + weighted
            output.losses[name] = weighted
            del metrics[name]  # the host logs it with its losses
            output.metrics.update(metrics)

    def _weight(
        self, attached: AttachedTerm, step_input: TrainStepInput, output: TrainStepOutput
    ) -> float:
        """Return the coefficient of this step, converted to the host's loss."""
        sae, name = self.target, attached.term.name
        coefficient = step_input.coefficients.get(name)
        late = attached.warm_up_steps or attached.start
        if late and (coefficient is None or math.isnan(coefficient)):
            raise ValueError(
                f"{name}: this trainer has no schedule for the term's start and warm-up, because "
                "you added the loss to its SAE or to another trainer; remove it with its handle, "
                "and add the loss to the trainer instead"
            )
        if sae.cfg.metadata[_METADATA] is None:
            sae.cfg.metadata[_METADATA] = {}
        # A Matryoshka SAE adds up one squared error for each nested width.
        nested = isinstance(sae, MatryoshkaBatchTopKTrainingSAE)
        factor = self.conversion.factor(
            attached,
            as_rows(output.sae_in, "sae_in"),
            sae.cfg.metadata[_METADATA],
            times=len(sae.cfg.matryoshka_widths) if nested else 1,
        )
        return float(attached.term.lam if coefficient is None else coefficient) * factor

    def _step_tensors(self, attached: AttachedTerm, output: TrainStepOutput) -> StepTensors:
        """Return what the term needs of this step, and no more."""
        inputs = output.sae_in
        gradient_at: GradientAt = "all"
        if attached.term.needs_embeddings:
            if self.scaler is not None and self.scaler.whitening is not None:
                inputs = self.scaler.unscale(inputs)
            latents = as_rows(output.feature_acts, "feature_acts", keep_sparse=True)
            gradient_at = _gradient_at(self.target, latents, output.hidden_pre)
        return tensors_of_sae(
            attached,
            output.feature_acts,
            inputs,
            pre_acts=output.hidden_pre,
            gradient_at=gradient_at,
        )


class _RunnerAttachment(Attachment[AttachedTerm]):
    """Gives the terms the scaler and the schedules of the trainer that a runner makes."""

    host = "sae_lens"
    replaces = ("run_trainer_with_interruption_handling",)

    def run_trainer_with_interruption_handling(
        self, inner: Callable[..., Any], trainer: SAETrainer[Any, Any]
    ) -> Any:
        """Start training."""
        _Attachment.of(trainer.sae).scaler = trainer.activation_scaler
        for name, attached in self.terms.items():
            made, ours = trainer.coefficient_schedulers[name], _Schedule(attached, trainer)
            # The host has set what a checkpoint keeps of ours as attributes of its own schedule.
            state = {key: getattr(made, key, value) for key, value in ours.state_dict().items()}
            ours.load_state_dict(state)
            trainer.coefficient_schedulers[name] = ours
        return inner(trainer)


def _gradient_at(sae: TrainingSAE[Any], latents: Tensor, hidden_pre: Tensor) -> GradientAt:
    """Return which latents pass a gradient on. We know it for SAELens's own architectures only."""
    if not type(sae).__module__.startswith("sae_lens."):
        return "all"
    if isinstance(sae, JumpReLUTrainingSAE):
        return _jumprelu_band(sae, latents, as_rows(hidden_pre, "hidden_pre").detach())
    activated = isinstance(sae, (TopKTrainingSAE, StandardTrainingSAE, GatedTrainingSAE))
    blocks_zeros = isinstance(sae.activation_fn, (nn.ReLU, TopK, BatchTopK))
    return "active" if activated and blocks_zeros else "all"


def _jumprelu_band(sae: JumpReLUTrainingSAE, latents: Tensor, pre_acts: Tensor) -> GradientAt:
    """Return where the straight-through estimator passes gradients to the threshold."""

    def band(pre_acts: Tensor) -> Tensor:
        # In the pre-activations' own dtype and order, so that the edge rounds as the host's does.
        threshold: Tensor = sae.threshold.detach().to(pre_acts.dtype)
        return (pre_acts - threshold).div_(sae.bandwidth).abs_() <= 0.5

    if not looks_are_free(pre_acts):
        return "all"
    few = sampled_rows(len(pre_acts))
    return band(pre_acts) if is_sparse(latents[few], band(pre_acts[few])) else "all"


def _saved_record(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint records about the terms it was trained with."""
    config = json.loads((checkpoint / SAE_CFG_FILENAME).read_text())
    record: dict[str, Any] = config.get("metadata", {}).get(_METADATA) or {}
    return record


for _host in (
    SAETrainer,
    MultiSAETrainer,
    LanguageModelSAETrainingRunner,  # SAETrainingRunner is a subclass
    MultiSAETrainingRunner,
    SyntheticSAERunner,
):
    give_add_loss(_host, add_loss)

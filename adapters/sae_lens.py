"""MonoLoss and the Top-k regularizers in SAELens's own trainers.

Importing this module is the opt-in: it gives ``SAETrainer`` and ``MultiSAETrainer`` a method
``add_loss``, and :func:`add_loss` does the same for a training SAE or a runner::

    import monoloss_plugin.adapters.sae_lens
    trainer = SAETrainer(cfg=cfg, sae=sae, data_provider=batches)
    handle = trainer.add_loss(MonoLoss(lam=3e-4), warm_up_steps=1000)

A term attaches to one SAE instance, at the two methods that the host itself calls:
``training_forward_pass``, whose output carries the loss and what is logged, and
``get_coefficients``, from which the host builds its coefficient schedules. The host's classes and
other SAEs stay as they are. Works with SAELens 6.53.1 and later 6.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from monoloss_plugin._checks import as_rows, looks_are_free
from monoloss_plugin._optional import missing_extra
from monoloss_plugin._places import as_path, require_file
from monoloss_plugin.finetuning.attached import (
    check_term,
    require_embeddings,
    warn_of_long_warm_up,
)
from monoloss_plugin.kernels.batch import GradientAt
from monoloss_plugin.kernels.support import is_sparse, sampled_rows
from monoloss_plugin.losses import LossHandle, LossTerm, StepTensors, lam_factor

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
except ModuleNotFoundError as error:
    raise missing_extra(error, "sae-lens") from error

__all__ = ["LossHandle", "add_loss", "strip_checkpoint"]

logger = logging.getLogger(__name__)

Embeddings = Callable[[Tensor], Tensor]
"""From the SAE's input (B, d_in) of a step to another similarity space (B, d) of the same rows."""

_ATTACHMENT = "_monoloss_attachment"
_METADATA = "monoloss"


def add_loss(
    target: Any,
    loss: LossTerm,
    *,
    warm_up_steps: int = 0,
    embeddings: Embeddings | None = None,
    saes: Iterable[str] | None = None,
) -> LossHandle:
    """Add a loss term to a SAELens trainer, runner or training SAE.

    The term appears under its name in the host's losses, progress bar and logs, its coefficient in
    the host's schedule as ``lam`` (times the warm-up), and the weight applied, after conversion to
    the host's loss, among the metrics as ``<name>_weight``. Its checkpoints restore it.

    Args:
        target: an ``SAETrainer`` or ``MultiSAETrainer`` (before or during training), a
            ``LanguageModelSAETrainingRunner``, ``MultiSAETrainingRunner`` or
            ``SyntheticSAERunner`` (before ``run``), or a ``TrainingSAE`` (before its trainer is
            made).
        loss: the term, such as ``MonoLoss(lam=3e-4)``.
        warm_up_steps: the coefficient grows linearly from 0 over this many steps.
        embeddings: function from the SAE's input (B, d_in), un-whitened where SAELens whitens it,
            to the similarity space (B, d) of the same samples. By default that input itself.
        saes: for a target with several SAEs, the names of those to attach to; all by default.

    Returns:
        A handle whose ``remove()`` undoes it.

    Raises:
        TypeError: a target or loss of another kind.
        ValueError: a term of that name is there already, the architecture lacks what the term
            needs, or an argument is out of range.

    Warns:
        UserWarning: training has ended, or ends before the warm-up does.

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
    check_term(loss, warm_up_steps)
    if embeddings is not None:
        require_embeddings(embeddings)
    attached = _Attached(loss, warm_up_steps, embeddings)
    places = _places(target, saes)
    for place in places:
        _check(place, attached)
    _warn_of_no_effect(target, attached)
    undo = [_attach(place, attached) for place in places]

    def remove() -> None:
        for step in undo:
            step()

    return LossHandle(loss.name, remove)


def strip_checkpoint(checkpoint: str | Path) -> list[str]:
    """Rewrite a training checkpoint so that it resumes without the terms it was trained with.

    SAELens restores every coefficient that a checkpoint names, and fails with a ``KeyError`` where
    the run has none of that name. Use this where the terms are no longer wanted; to go on with
    them, call ``add_loss`` before ``load_trainer_state`` instead.

    Args:
        checkpoint: a folder written by ``SAETrainer.save_checkpoint``, or one SAE's subfolder of
            a ``MultiSAETrainer`` checkpoint.

    Returns:
        The names removed; empty where there was nothing to do.

    Raises:
        FileNotFoundError: not a training checkpoint.
        TypeError: not a path.
    """
    folder = as_path(checkpoint, "checkpoint")
    state_path = folder / TRAINER_STATE_FILENAME
    require_file(state_path, "checkpoint")
    state = torch.load(state_path, map_location="cpu", weights_only=True)
    terms = _saved_record(folder).get("terms", {})
    schedules = state["coefficient_schedulers"]
    removed = [name for name in terms if schedules.pop(name, None) is not None]
    if removed:
        partial = state_path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, state_path)
    return removed


@dataclass
class _Attached:
    """A term and how it was attached, to one or several SAEs."""

    term: LossTerm
    warm_up_steps: int
    embeddings: Embeddings | None
    conversion_shown: bool = False


@dataclass
class _Place:
    """One SAE to attach to, and its trainer where there is one already."""

    sae: TrainingSAE[Any]
    trainer: SAETrainer[Any, Any] | None = None
    runner: LanguageModelSAETrainingRunner | None = None
    """A runner that will make the trainer, and hand it to a method of its own before training."""


@dataclass
class _Attachment:
    """What one SAE carries: its terms, and the instance methods that ours replaced, if any."""

    terms: dict[str, _Attached] = field(default_factory=dict)
    replaced: dict[str, Any] = field(default_factory=dict)
    scaler: ActivationScaler | None = None
    mean_square_norm: float | None = None
    announced: set[str] = field(default_factory=set)
    last_step: int = 0

    def inner(self, sae: TrainingSAE[Any], method: str) -> Callable[..., Any]:
        """The host's method beneath ours: an instance attribute (a compiled one) or the class's."""
        inner: Callable[..., Any] = self.replaced[method] or MethodType(
            getattr(type(sae), method), sae
        )
        return inner


def _places(target: Any, saes: Iterable[str] | None) -> list[_Place]:
    if saes is not None and (isinstance(saes, str) or not isinstance(saes, Iterable)):
        raise TypeError(f"saes: expected a list of names, got {saes!r}")
    if isinstance(target, (MultiSAETrainer, MultiSAETrainingRunner)):
        trainers = target.trainers if isinstance(target, MultiSAETrainer) else {}
        names = list(target.saes) if saes is None else list(saes)
        unknown = [name for name in names if name not in target.saes]
        if unknown or not names:
            raise ValueError(f"saes: expected some of {list(target.saes)}, got {names}")
        return [_Place(target.saes[name], trainers.get(name)) for name in names]
    if saes is not None:
        raise ValueError(f"saes: only for a target with several SAEs, not {type(target).__name__}")
    if isinstance(target, SAETrainer):
        return [_Place(target.sae, target)]
    if isinstance(target, LanguageModelSAETrainingRunner):
        return [_Place(target.sae, runner=target)]
    if isinstance(target, SyntheticSAERunner):
        return [_Place(target.sae)]
    if isinstance(target, TrainingSAE):
        return [_Place(target)]
    raise TypeError(
        "target: expected a SAELens SAETrainer, MultiSAETrainer, training runner or TrainingSAE, "
        f"got {type(target).__name__}"
    )


def _warn_of_no_effect(target: Any, attached: _Attached) -> None:
    """Warn where training is over, or will be before the term has its full weight."""
    name, steps = attached.term.name, getattr(target.cfg, "total_training_steps", None)
    if steps is None:  # an SAE alone, which knows of no trainer
        return
    done = getattr(target, "n_training_samples", None)  # a runner has not begun
    if done is not None and done >= target.cfg.total_training_samples:
        warnings.warn(
            f"{name}: training has ended ({done} of {target.cfg.total_training_samples} samples), "
            "so the term does nothing; add it before fit()",
            stacklevel=3,
        )
    else:
        left = steps - getattr(target, "n_training_steps", 0)
        warn_of_long_warm_up(name, attached.warm_up_steps, left)


def _check(place: _Place, attached: _Attached) -> None:
    """Raise where the term cannot work on this SAE, before anything is changed."""
    sae, term = place.sae, attached.term
    architecture = sae.cfg.architecture()
    attachment: _Attachment | None = sae.__dict__.get(_ATTACHMENT)
    if attachment is not None and term.name in attachment.terms:
        raise ValueError(
            f"{term.name}: a term of this name is attached already; remove it with its handle, or "
            f"give this one another name, {type(term).__name__}(..., name=...)"
        )
    if term.name in sae.get_coefficients():
        raise ValueError(
            f"{term.name}: the name of one of SAELens's own coefficients; take another"
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
    whitened = sae.cfg.normalize_activations == "covariance_whitening"
    own_space = term.needs_embeddings and attached.embeddings is None
    # Whitening makes cosine similarities meaningless; only the trainer can undo it.
    if whitened and own_space and place.trainer is None and place.runner is None:
        raise ValueError(
            f"{term.name}: with normalize_activations='covariance_whitening' the SAE sees "
            "whitened inputs, whose similarities mean nothing; add the loss to the SAETrainer, "
            "which can undo the whitening, or give embeddings="
        )


def _attach(place: _Place, attached: _Attached) -> Callable[[], None]:
    """Attach to one SAE; return what undoes it."""
    sae, name = place.sae, attached.term.name
    attachment = _wrap(sae)
    attachment.terms[name] = attached
    if place.trainer is not None:
        attachment.scaler = place.trainer.activation_scaler
        place.trainer.coefficient_schedulers[name] = CoefficientScheduler(
            warm_up_steps=attached.warm_up_steps, final_value=attached.term.lam
        )
    elif place.runner is not None:
        _pass_on_scaler(place.runner)

    def undo() -> None:
        if attachment.terms.get(name) is not attached:
            return
        del attachment.terms[name]
        if place.trainer is not None:
            place.trainer.coefficient_schedulers.pop(name, None)
        if not attachment.terms:
            _unwrap(sae, attachment)

    return undo


def _wrap(sae: TrainingSAE[Any]) -> _Attachment:
    """Put our methods over the host's on this instance, once."""
    if _ATTACHMENT in sae.__dict__:
        existing: _Attachment = sae.__dict__[_ATTACHMENT]
        return existing
    attachment = _Attachment()
    # Two SAEs may share one config object; what we record must not speak of the other.
    sae.cfg = copy.copy(sae.cfg)
    sae.cfg.metadata = copy.deepcopy(sae.cfg.metadata)
    # Into __dict__, past nn.Module's registration; bound methods follow a deepcopy to the copy.
    sae.__dict__[_ATTACHMENT] = attachment
    for method, ours in _METHODS.items():
        attachment.replaced[method] = sae.__dict__.get(method)
        sae.__dict__[method] = MethodType(ours, sae)
    return attachment


def _unwrap(sae: TrainingSAE[Any], attachment: _Attachment) -> None:
    """Give back the host's methods where ours are still outermost.

    A method that was compiled after we attached holds ours inside; it stays, and passes through.
    """
    remaining = False
    for method, ours in _METHODS.items():
        if getattr(sae.__dict__.get(method), "__func__", None) is not ours:
            remaining = True
        elif attachment.replaced[method] is None:
            del sae.__dict__[method]
        else:
            sae.__dict__[method] = attachment.replaced[method]
    if not remaining:
        del sae.__dict__[_ATTACHMENT]


def _pass_on_scaler(runner: LanguageModelSAETrainingRunner) -> None:
    """Have the runner show its trainer's scaler to the attachment when it starts training."""
    if "run_trainer_with_interruption_handling" in runner.__dict__:
        return
    start = runner.run_trainer_with_interruption_handling

    def start_with_scaler(trainer: SAETrainer[Any, Any]) -> Any:
        attachment: _Attachment | None = trainer.sae.__dict__.get(_ATTACHMENT)
        if attachment is not None:
            attachment.scaler = trainer.activation_scaler
        return start(trainer)

    runner.__dict__["run_trainer_with_interruption_handling"] = start_with_scaler


def _training_forward_pass(self: TrainingSAE[Any], step_input: TrainStepInput) -> TrainStepOutput:
    attachment: _Attachment = self.__dict__[_ATTACHMENT]
    output = attachment.inner(self, "training_forward_pass")(step_input)
    _add_terms(self, attachment, step_input, output)
    return output


def _get_coefficients(self: TrainingSAE[Any]) -> dict[str, float | TrainCoefficientConfig]:
    attachment: _Attachment = self.__dict__[_ATTACHMENT]
    coefficients = dict(attachment.inner(self, "get_coefficients")())
    for name, attached in attachment.terms.items():
        coefficients[name] = TrainCoefficientConfig(attached.term.lam, attached.warm_up_steps)
    return coefficients


def _load_weights_from_checkpoint(self: TrainingSAE[Any], checkpoint_path: Path | str) -> None:
    attachment: _Attachment = self.__dict__[_ATTACHMENT]
    attachment.inner(self, "load_weights_from_checkpoint")(checkpoint_path)
    record = _saved_record(Path(checkpoint_path))
    if record:
        self.cfg.metadata[_METADATA] = record


_METHODS: dict[str, Callable[..., Any]] = {
    "training_forward_pass": _training_forward_pass,
    "get_coefficients": _get_coefficients,
    "load_weights_from_checkpoint": _load_weights_from_checkpoint,
}


# The closed-form gradient leaves nothing to fuse across the host's graph, and names, first steps
# and logging are Python's business: a compiled SAE calls this as it is, at one graph break.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _add_terms(
    sae: TrainingSAE[Any],
    attachment: _Attachment,
    step_input: TrainStepInput,
    output: TrainStepOutput,
) -> None:
    """Add every term to the output's loss, losses and metrics."""
    if not attachment.terms:
        return
    if step_input.n_training_steps < attachment.last_step:  # another run, perhaps on other data
        attachment.mean_square_norm = None
        attachment.announced.clear()
    attachment.last_step = step_input.n_training_steps
    inputs = as_rows(output.sae_in, "sae_in")
    for name, attached in attachment.terms.items():
        if name in output.losses:
            raise ValueError(f"{name}: the name of one of SAELens's own losses; take another")
        term = attached.term
        weight = _coefficient(step_input, attached) * _factor(
            sae, attachment, attached, inputs, step_input.n_training_steps
        )
        output.metrics[f"{name}_weight"] = weight
        # At weight 0 the term is only measured, where the host logs it, and without a gradient, so
        # that the host's run stays what it was.
        if weight == 0 and not getattr(step_input, "is_logging_step", True):
            output.losses[name] = torch.zeros_like(output.loss)
            continue
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0):
            value, metrics = term.compute_loss(_step_tensors(sae, attachment, attached, output))
            weighted = weight * value
        if weight != 0:
            output.loss = output.loss + weighted
        output.losses[name] = weighted
        output.metrics.update(metrics)


def _step_tensors(
    sae: TrainingSAE[Any], attachment: _Attachment, attached: _Attached, output: TrainStepOutput
) -> StepTensors:
    """Return what the term asks of this step, and no more."""
    term = attached.term
    latents = as_rows(output.feature_acts, "feature_acts", keep_sparse=True)
    step = StepTensors(latents, embeddings=as_rows(output.sae_in, "sae_in"))
    if term.needs_embeddings:
        step = step._replace(
            embeddings=_similarity_space(attachment, attached, step.embeddings),
            gradient_at=_gradient_at(sae, latents, output.hidden_pre),
        )
    if term.needs_selection:
        step = step._replace(
            pre_acts=as_rows(output.hidden_pre, "hidden_pre"),
            selected=as_rows(latents.detach(), "feature_acts") != 0,
        )
    return step


def _gradient_at(sae: TrainingSAE[Any], latents: Tensor, hidden_pre: Tensor) -> GradientAt:
    """Which latents pass a gradient on, as far as SAELens's own architectures tell."""
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
        # In the pre-activations' own dtype and order, so that the edge is rounded as the host's.
        threshold: Tensor = sae.threshold.detach().to(pre_acts.dtype)
        return (pre_acts - threshold).div_(sae.bandwidth).abs_() <= 0.5

    if not looks_are_free(pre_acts):
        return "all"
    few = sampled_rows(len(pre_acts))
    return band(pre_acts) if is_sparse(latents[few], band(pre_acts[few])) else "all"


def _coefficient(step_input: TrainStepInput, attached: _Attached) -> float:
    """Today's lam from the host's schedule."""
    name = attached.term.name
    if name in step_input.coefficients:
        return float(step_input.coefficients[name])
    if attached.warm_up_steps:
        raise ValueError(
            f"{name}: this trainer was made before the loss was added to its SAE, so it has no "
            "schedule for the warm-up; add the loss to the trainer instead"
        )
    return float(attached.term.lam)


def _similarity_space(attachment: _Attachment, attached: _Attached, inputs: Tensor) -> Tensor:
    scaler = attachment.scaler
    if scaler is not None and scaler.whitening is not None:
        inputs = scaler.unscale(inputs)
    if attached.embeddings is None:
        return inputs
    return as_rows(attached.embeddings(inputs), "embeddings")


def _factor(
    sae: TrainingSAE[Any],
    attachment: _Attachment,
    attached: _Attached,
    inputs: Tensor,
    n_training_steps: int,
) -> float:
    """What lam is multiplied by in SAELens, whose squared error is summed over d_in.

    The input's scale is read once, from the first batch: the one time that a step waits for the
    device. It is kept in the SAE's metadata, so that a resumed run goes on with the same weight.
    """
    term = attached.term
    if term.lam_units == "raw":
        factor = 1.0
    else:
        if attachment.mean_square_norm is None:
            record = sae.cfg.metadata[_METADATA] or {}
            known = record.get("input_mean_square_norm") if n_training_steps > 0 else None
            attachment.mean_square_norm = known or float(
                inputs.detach().float().square().sum(1).mean()
            )
        factor = lam_factor(
            term.lam_units,
            width=inputs.shape[1],
            mean_square_norm=attachment.mean_square_norm,
            reduction="sum",
            degree=term.degree,
        )
        if isinstance(sae, MatryoshkaBatchTopKTrainingSAE):
            # One squared error for each nested width, added up.
            factor *= len(sae.cfg.matryoshka_widths)
    if term.name not in attachment.announced:
        attachment.announced.add(term.name)
        _announce(sae, attachment, attached, factor)
    return factor


def _announce(
    sae: TrainingSAE[Any], attachment: _Attachment, attached: _Attached, factor: float
) -> None:
    """Say what lam became, visibly the first time, and write it into the SAE's metadata."""
    term = attached.term
    show = not attached.conversion_shown and not math.isclose(factor, 1.0, rel_tol=1e-3)
    attached.conversion_shown |= show
    logger.log(
        logging.WARNING if show else logging.INFO,
        "%s: lam %g is measured against %r. SAELens sums its loss over d_in = %d and sees a mean "
        "squared input norm of %s, so the weight in its loss is %g times that: %g",
        term.name,
        term.lam,
        term.lam_units,
        sae.cfg.d_in,
        attachment.mean_square_norm,
        factor,
        term.lam * factor,
    )
    record = dict(sae.cfg.metadata[_METADATA] or {})
    record["input_mean_square_norm"] = attachment.mean_square_norm
    record["terms"] = {
        **record.get("terms", {}),
        term.name: {
            "term": type(term).__name__,
            **asdict(term),
            "warm_up_steps": attached.warm_up_steps,
            "factor": factor,
        },
    }
    sae.cfg.metadata[_METADATA] = record


def _saved_record(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of the terms it was trained with."""
    config = json.loads((checkpoint / SAE_CFG_FILENAME).read_text())
    record: dict[str, Any] = config.get("metadata", {}).get(_METADATA) or {}
    return record


for _host in (SAETrainer, MultiSAETrainer):
    if getattr(_host, "add_loss", add_loss) is not add_loss:
        logger.warning("%s has an add_loss of its own; use add_loss(trainer, ...)", _host.__name__)
    else:
        _host.add_loss = add_loss

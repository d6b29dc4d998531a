"""MonoLoss and the Top-k regularizers in the trainers of dictionary_learning.

For ``trainSAE``, add the loss to a trainer's config; in a loop of your own, to a trainer::

    config = add_loss(config, MonoLoss(lam=3e-4))
    trainSAE(data, [config], steps=10_000)

    handle = add_loss(trainer, MonoLoss(lam=3e-4))
    trainer.update(step, x)

A term attaches to one trainer, at its method ``loss``, and is recorded in its ``config``. The
latents are what ``trainer.ae.encode`` returns. The host's classes and other trainers do not change.
Works with dictionary_learning 0.1, and with the copy of it that sae-for-vlm contains.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor

from monoloss_plugin._places import kind_of
from monoloss_plugin.attaching import AttachedTerm, Attachment, require_embeddings
from monoloss_plugin.hosts import check_version, failed_import, moved_seam
from monoloss_plugin.kernels.batch import GradientAt
from monoloss_plugin.losses import LossHandle, LossTerm
from monoloss_plugin.sae_terms import Embeddings, LamConversion, SaeTerms

try:
    from dictionary_learning.trainers.trainer import SAETrainer
except ImportError as error:
    raise failed_import(error, "dictionary_learning") from error

__all__ = ["LossHandle", "add_loss"]

check_version("dictionary_learning")
logger = logging.getLogger(__name__)

_METADATA = "monoloss"

# By name, since sae-for-vlm's copy of the library spells some otherwise, and not every version of
# the library has every module.
_TOP_K = (
    "TopKTrainer",
    "BatchTopKTrainer",
    "MatryoshkaBatchTopKTrainer",
    "MatroyshkaBatchTopKTrainer",
)
_TRAINERS = (
    "StandardTrainer",
    "StandardTrainerAprilUpdate",
    *_TOP_K,
    "JumpReluTrainer",
    "GatedSAETrainer",
    "GatedAnnealTrainer",
    "PAnnealTrainer",
)
_ACTIVE_ONLY = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "MatroyshkaBatchTopKSAE",
)
"""The dictionaries that pass no gradient to a latent that is zero."""


@overload
def add_loss(
    target: Mapping[str, Any],
    loss: LossTerm,
    *,
    warm_up_steps: int = 0,
    start: int | float = 0,
    embeddings: Embeddings | None = None,
) -> dict[str, Any]: ...


@overload
def add_loss(
    target: SAETrainer,
    loss: LossTerm,
    *,
    warm_up_steps: int = 0,
    start: int | float = 0,
    embeddings: Embeddings | None = None,
) -> LossHandle: ...


def add_loss(
    target: Any,
    loss: LossTerm,
    *,
    warm_up_steps: int = 0,
    start: int | float = 0,
    embeddings: Embeddings | None = None,
) -> LossHandle | dict[str, Any]:
    """Add a loss term to a trainer of dictionary_learning, or to a config for ``trainSAE``.

    The host logs the term under its name with its other losses, and the term's own metrics. The
    trainer's ``config``, which the host writes to ``config.json``, records the term under
    ``"monoloss"``.

    Args:
        target: a trainer's config, with the trainer's class under ``"trainer"`` as ``trainSAE``
            wants it; or a trainer, before or during training.
        loss: the term, such as ``MonoLoss(lam=3e-4)``.
        warm_up_steps: the weight grows linearly from 0 over this many steps.
        start: the weight is 0 before this step (an int), or before this share of the trainer's
            ``steps`` (a float below 1); the warm-up counts from there.
        embeddings: a function from the SAE's input (B, d_in), as the trainer gets it, to the
            similarity space (B, d) of the same samples. By default that input itself. If samples
            are patches of images, the function returns a
            :class:`~monoloss_plugin.batch.Batch` with ``embeddings`` and ``images``:
            ``FeatureBatches.samples_of`` does. Pairs within an image are then left out.

    Returns:
        For a config, a new config whose trainer has the term; the given one does not change. For a
        trainer, a handle; call its ``remove()`` to take the term away.

    Raises:
        TypeError: the target or the loss has the wrong type.
        ValueError: a term of that name is attached already, the trainer does not give the term
            what it needs, a config names no trainer, or an argument is out of range; in the first
            step, the latents of a ``dict_class`` of your own are negative.
        RuntimeError: the trainer's methods are not where this version of the host has them.

    Warns:
        UserWarning: training ends before the start or the warm-up does.

    Examples:
        >>> from dictionary_learning.trainers import TopKTrainer
        >>> from monoloss_plugin import MonoLoss
        >>> sizes = {"activation_dim": 8, "dict_size": 16, "k": 2, "steps": 100, "warmup_steps": 10}
        >>> names = {"layer": 0, "lm_name": "example", "device": "cpu"}
        >>> config = add_loss({"trainer": TopKTrainer, **sizes, **names}, MonoLoss(lam=3e-4))
        >>> trainer = config["trainer"](**sizes, **names)
        >>> trainer.config["monoloss"]["terms"]["monoloss"]["lam"]
        0.0003
        >>> handle = add_loss(trainer, MonoLoss(lam=1e-4, name="second"), start=0.5)
        >>> handle.remove()
    """
    attached = AttachedTerm(loss, warm_up_steps, embeddings, start=start)
    if embeddings is not None:
        require_embeddings(embeddings)
    if isinstance(target, Mapping):
        return _add_to_config(target, attached)
    if isinstance(target, type):
        raise TypeError(
            f"target: expected a trainer or its config, got the class {target.__name__}; give the "
            "config that you pass to trainSAE, or an instance"
        )
    return _add_to_trainer(target, attached)


@dataclass(frozen=True)
class _TrainerWithTerms:
    """What a config has in the place of its trainer's class: it makes one, and adds the terms."""

    trainer_class: type
    terms: tuple[AttachedTerm, ...]

    def __call__(self, **options: Any) -> Any:
        trainer = self.trainer_class(**options)
        for attached in self.terms:
            _attach(trainer, replace(attached), options["steps"])
        return trainer


def _add_to_config(config: Mapping[str, Any], attached: AttachedTerm) -> dict[str, Any]:
    """Return a config whose trainer has one more term."""
    if "trainer" not in config:
        raise ValueError(
            "target: the config has no 'trainer'. trainSAE removes it from the configs that it "
            "gets, so make a new config for every run"
        )
    found, name = config["trainer"], attached.term.name
    if not isinstance(found, _TrainerWithTerms):
        if not isinstance(found, type):
            raise TypeError(f"target['trainer']: expected a trainer's class, got {kind_of(found)}")
        found = _TrainerWithTerms(found, ())
    _check(found.trainer_class, attached)
    if any(other.term.name == name for other in found.terms):
        raise ValueError(
            f"{name}: the config has a term of this name already; give the new term another name, "
            "such as MonoLoss(..., name='monoloss_2')"
        )
    attached.warn_of_long_warm_up(config.get("steps", -1))
    return {**config, "trainer": replace(found, terms=(*found.terms, attached))}


def _add_to_trainer(trainer: Any, attached: AttachedTerm) -> LossHandle:
    """Attach a term to a trainer that exists."""
    _check(type(trainer), attached)
    Attachment.require_free(trainer, attached.term.name)
    attached.added_at = trainer.scheduler.last_epoch
    steps = getattr(trainer, "steps", math.inf)  # GatedSAETrainer does not keep them
    attached.warn_of_long_warm_up(steps, attached.added_at)
    return _attach(trainer, attached, steps)


def _check(trainer_class: type, attached: AttachedTerm) -> None:
    """Raise an error if the term cannot work with such a trainer, before anything changes."""
    names = {parent.__name__ for parent in trainer_class.__mro__}
    if not issubclass(trainer_class, SAETrainer) or names.isdisjoint(_TRAINERS):
        raise TypeError(
            "target: expected a config with a trainer of dictionary_learning, or such a trainer "
            f"({', '.join(_TRAINERS)}), got {trainer_class.__name__}"
        )
    if attached.term.needs_selection and names.isdisjoint(_TOP_K):
        raise ValueError(
            f"{attached.term.name}: needs a Top-k selection ({', '.join(_TOP_K[:3])}); "
            f"{trainer_class.__name__} has none"
        )


def _attach(trainer: Any, attached: AttachedTerm, steps: float) -> LossHandle:
    """Attach a term to one trainer, which will train for so many steps."""
    for name in ("encode", "decode"):
        if not callable(getattr(trainer.ae, name, None)):
            raise moved_seam("dictionary_learning", f"{type(trainer.ae).__name__}.{name}")
    attachment = _Attachment.of(trainer)
    attachment.steps = min(attachment.steps, steps)
    return attachment.add(attached, lambda: attachment.forget(attached.term.name))


class _Attachment(Attachment[AttachedTerm]):
    """The terms of one trainer."""

    host = "dictionary_learning"
    replaces = ("loss",)

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self.steps: float = math.inf
        self.sum = SaeTerms(LamConversion("dictionary_learning", "sum", logger))
        # `config` is a property, which only a class can replace.
        self._own_class = type(trainer)
        trainer.__class__ = _class_with_record(self._own_class)

    def forget(self, name: str) -> None:
        """Undo what is left of a term that is removed."""
        self.sum.record.get("terms", {}).pop(name, None)
        if not self.terms:
            self.target.__class__ = self._own_class

    def loss(
        self, inner: Callable[..., Any], x: Tensor, step: int, logging: bool = False, **options: Any
    ) -> Any:
        """Add the terms to the loss if it has a gradient, or to what the host logs."""
        with _recorded_calls(self.target.ae) as calls:
            output = inner(x, step=step, logging=logging, **options)
        if not self.terms or not (logging or torch.is_grad_enabled()):
            return output
        total = self._add_up(calls, x, step)
        if not logging:
            return output + total
        losses = output[-1]
        for name, value in self.sum.metrics.items():
            if name in losses:
                raise ValueError(
                    f"{name}: {type(self.target).__name__} logs a loss of this name; give the term "
                    "another name"
                )
            losses[name] = value.item()
        if "loss" in losses:
            losses["loss"] += total.item()
        return output

    def _add_up(self, calls: Mapping[str, Any], x: Tensor, step: int) -> Tensor:
        """Return the sum of the weighted terms."""
        trainer = self.target
        latents, pre_acts = _latents_in(calls, trainer)
        active_only = type(trainer.ae).__name__ in _ACTIVE_ONLY
        gradient_at: GradientAt = "active" if active_only else "all"
        total: Tensor = self.sum.add_up(
            self.terms.values(),
            latents,
            x,
            step=step,
            steps=self.steps,
            pre_acts=pre_acts,
            gradient_at=gradient_at,
            times=_mean_group_weight(trainer),
        )
        return total

    @property
    def record(self) -> dict[str, Any]:
        """What the trainer's config says about its terms, as JSON can write it."""
        known = self.sum.record
        terms = {
            name: known.get("terms", {}).get(name, attached.options)
            for name, attached in self.terms.items()
        }
        record: dict[str, Any] = json.loads(json.dumps({**known, "terms": terms}, default=str))
        return record


def _class_with_record(trainer_class: Any) -> Any:
    """Return a subclass, of the same name, whose ``config`` also records the terms."""

    def config(self: Any) -> dict[str, Any]:
        found = super(made, self).config
        return {**found, _METADATA: _Attachment.of(self).record}

    names = {key: getattr(trainer_class, key) for key in ("__module__", "__qualname__", "__doc__")}
    made: Any = type(
        trainer_class.__name__, (trainer_class,), {**names, "config": property(config)}
    )
    return made


@contextmanager
def _recorded_calls(ae: Any) -> Iterator[dict[str, Any]]:
    """Record what the first ``ae.encode`` returns, and what the first ``ae.decode`` gets."""
    calls: dict[str, Any] = {}
    encode, decode = ae.encode, ae.decode
    before = {name: ae.__dict__[name] for name in ("encode", "decode") if name in ae.__dict__}

    def recorded_encode(*arguments: Any, **options: Any) -> Any:
        encoded = encode(*arguments, **options)
        calls.setdefault("encoded", encoded)
        return encoded

    def recorded_decode(latents: Tensor, *arguments: Any, **options: Any) -> Any:
        calls.setdefault("decoded", latents)
        return decode(latents, *arguments, **options)

    ae.__dict__.update(encode=recorded_encode, decode=recorded_decode)
    try:
        yield calls
    finally:
        del ae.__dict__["encode"], ae.__dict__["decode"]
        ae.__dict__.update(before)


def _latents_in(calls: Mapping[str, Any], trainer: Any) -> tuple[Tensor, Tensor | None]:
    """Return the latents (..., M), and the last of what ``encode`` returns beside them."""
    if "encoded" in calls:
        encoded = calls["encoded"]
        return (encoded[0], encoded[-1]) if isinstance(encoded, tuple) else (encoded, None)
    if "decoded" not in calls:
        called = f"call of ae.encode or ae.decode in {type(trainer).__name__}.loss"
        raise moved_seam("dictionary_learning", called)
    # JumpReluTrainer computes the latents itself, and lets a negative one pass if its threshold is
    # negative; ae.encode does not. Unlike relu and clamp, this passes the gradient at zero.
    latents = calls["decoded"]
    return latents.masked_fill(latents < 0, 0.0), None


def _mean_group_weight(trainer: Any) -> float:
    """Return how many squared errors the loss adds up: 1, or of a Matryoshka trainer its share.

    It takes the mean, over the active groups, of each one's squared error times its weight.
    """
    weights = getattr(trainer, "group_weights", None)
    if weights is None:
        return 1.0
    active = weights[: trainer.ae.active_groups]
    return float(sum(active) / len(active))

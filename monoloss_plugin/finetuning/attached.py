"""A loss term on a layer's output, as every fine-tuning trainer's adapter attaches it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from monoloss_plugin._checks import as_rows
from monoloss_plugin._places import kind_of
from monoloss_plugin.finetuning.gathering import gather_rows
from monoloss_plugin.finetuning.recorder import LatentRecorder, require_layer, requires_gradient
from monoloss_plugin.losses import LossHandle, LossTerm, StepTensors

if TYPE_CHECKING:
    from typing_extensions import Self

_ATTACHMENT = "_monoloss_attachment"
_RESERVED = ("loss", "output", "epoch", "grad_norm", "learning_rate")
"""What hosts call what they log or return."""


@dataclass(frozen=True)
class TermOfStep:
    """What a term comes to in one step."""

    weighted: Tensor
    """Scalar to add to the loss, weight and warm-up included."""
    metrics: dict[str, Tensor]
    """Scalars to log: the weighted term under its name, and what it says of itself."""


def check_term(term: Any, warm_up_steps: Any) -> None:
    """Raise TypeError or ValueError unless a host can take a term and its warm-up."""
    if not isinstance(term, LossTerm):
        raise TypeError(
            f"loss: expected a loss term such as MonoLoss(lam=0.1), got {kind_of(term)}"
        )
    wanted = f"warm_up_steps: expected an integer of at least 0, got {warm_up_steps!r}"
    if isinstance(warm_up_steps, bool) or not isinstance(warm_up_steps, int):
        raise TypeError(wanted)
    if warm_up_steps < 0:
        raise ValueError(wanted)


def warn_of_long_warm_up(name: str, warm_up_steps: int, steps: float) -> None:
    """Warn where training ends before a term has its full weight."""
    if warm_up_steps > steps >= 0:  # a host that does not know may say -1
        warnings.warn(
            f"{name}: warm_up_steps={warm_up_steps} is longer than the {steps} steps of training "
            "that are left, so the term never gets its full weight lam",
            stacklevel=4,
        )


class AttachedTerm:
    """A loss term, and where its latents and embeddings come from.

    Args:
        term: such as ``MonoLoss(lam=0.1, lam_units="raw")``.
        model: what it is attached to.
        embeddings: from what the host has to (B, d).
        latents: a layer of the model or its path; by default its MonoLayer.
        warm_up_steps: the weight grows from 0 over this many steps.
        sync: over the global batch of all processes.

    Raises:
        TypeError: not a loss term.
        ValueError: a term that needs what fine-tuning does not have.
    """

    def __init__(
        self,
        term: LossTerm,
        model: nn.Module,
        *,
        embeddings: Callable[[Any], Any] | None = None,
        latents: str | nn.Module | None = None,
        warm_up_steps: int = 0,
        sync: bool = False,
    ) -> None:
        self.check(term, warm_up_steps, latents, sync)
        self.term, self.warm_up_steps, self.sync = term, warm_up_steps, sync
        self.embeddings = embeddings
        self.calls = 0
        self.recorder = LatentRecorder(model, latents)

    @staticmethod
    def check(term: Any, warm_up_steps: Any, latents: Any, sync: Any) -> None:
        """Raise what the class raises, before there is a model."""
        check_term(term, warm_up_steps)
        require_layer(latents)
        if not isinstance(sync, bool):
            raise TypeError(f"sync: expected True or False, got {sync!r}")
        if term.name in _RESERVED:
            raise ValueError(f"name: {term.name!r} is the host's own; take another")
        if term.needs_selection:
            raise ValueError(f"{term.name}: needs the activations before a Top-k SAE's selection")
        if term.lam_units != "raw":
            raise ValueError(
                f"{term.name}: lam is measured against {term.lam_units!r}, a reconstruction "
                "loss, and there is none here; use lam_units='raw'"
            )

    def __call__(
        self, embeddings: Any, step: int | None = None, steps: float = float("inf")
    ) -> TermOfStep:
        """Return the term of the last forward pass.

        Args:
            embeddings: (B, d) of the same samples; constants.
            step: how many steps have been done, for the warm-up; by default how many calls.
            steps: how many there will be, as far as the host knows.

        Raises:
            RuntimeError: no forward pass since the last time.
            TypeError: embeddings that are not floating-point numbers.
            ValueError: latents or embeddings that do not fit.
        """
        latents = requires_gradient(self.recorder.take(), self.term.name)
        given = as_rows(embeddings, "embeddings").detach().to(latents.device)
        if len(given) != len(latents):
            raise ValueError(
                f"embeddings: expected {len(latents)} rows, one a sample, got {len(given)}"
            )
        if self.sync:
            latents, given = gather_rows(latents), gather_rows(given)
        step_tensors = StepTensors(latents, given, gradient_at=self.recorder.gradient_at)
        value, metrics = self.term.compute_loss(step_tensors)
        if not self.calls:
            warn_of_long_warm_up(self.term.name, self.warm_up_steps, steps)
        step = self.calls if step is None else step
        self.calls += 1
        warm = min(1.0, step / self.warm_up_steps) if self.warm_up_steps else 1.0
        weighted = self.term.lam * warm * value
        said = {self.term.name: weighted.detach(), **metrics}
        return TermOfStep(weighted, {name: torch.as_tensor(v) for name, v in said.items()})


class Replaced:
    """Attributes that were put over an object's own, and what was there before.

    Args:
        target: the object.
        attributes: by name.
    """

    def __init__(self, target: Any, attributes: dict[str, Any]) -> None:
        self._target = target
        self._before = {n: target.__dict__[n] for n in attributes if n in target.__dict__}
        self._names = list(attributes)
        target.__dict__.update(attributes)

    def undo(self) -> None:
        """Give the object back what it had."""
        for name in self._names:
            self._target.__dict__.pop(name, None)
        self._target.__dict__.update(self._before)


class Attachment:
    """The terms of one object of a host, such as a trainer, and what was put over its methods.

    Args:
        target: the object.
        methods: what goes over its own, by name.
    """

    def __init__(self, target: Any, methods: dict[str, Any]) -> None:
        self.terms: dict[str, AttachedTerm] = {}
        self._replaced = Replaced(target, methods | {_ATTACHMENT: self})

    @classmethod
    def find(cls, target: Any, name: str) -> Self | None:
        """Return what an object carries, if it does.

        Raises:
            ValueError: there is a term of that name.
        """
        found: Self | None = target.__dict__.get(_ATTACHMENT)
        if found is not None and name in found.terms:
            raise ValueError(f"{name}: a term of this name is attached already; remove it first")
        return found

    def add(self, attached: AttachedTerm) -> LossHandle:
        """Add a term; return what removes it."""
        name = attached.term.name
        self.terms[name] = attached

        def undo() -> None:
            if self.terms.get(name) is attached:
                del self.terms[name]
                attached.recorder.remove()
                self.after_removal()

        return LossHandle(name, undo)

    def after_removal(self) -> None:
        """Give the object back its methods after the last term."""
        if not self.terms:
            self._replaced.undo()


def require_embeddings(given: Any, column: str = "") -> None:
    """Raise TypeError unless embeddings are something to call, or, where it may be, a column."""
    named = bool(column) and isinstance(given, str) and given != ""
    if not named and (isinstance(given, type) or not callable(given)):
        wanted = f"{column}, or a frozen encoder to call" if column else "a frozen encoder to call"
        got = repr(given) if isinstance(given, (str, type)) else type(given).__name__
        raise TypeError(f"embeddings: expected {wanted}, got {got}")

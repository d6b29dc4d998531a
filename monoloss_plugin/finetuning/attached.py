"""A loss term on a layer's output, as every fine-tuning trainer's adapter attaches it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from monoloss_plugin._checks import as_rows
from monoloss_plugin.finetuning.gathering import gather_rows
from monoloss_plugin.finetuning.recorder import LatentRecorder, requires_gradient
from monoloss_plugin.losses import LossTerm, StepTensors

_RESERVED = ("loss", "output", "epoch", "grad_norm", "learning_rate")
"""What hosts call what they log or return."""


@dataclass(frozen=True)
class TermOfStep:
    """What a term comes to in one step."""

    weighted: Tensor
    """Scalar to add to the loss, weight and warm-up included."""
    metrics: dict[str, Tensor]
    """Scalars to log: the weighted term under its name, and what it says of itself."""


class AttachedTerm:
    """A loss term, and where its latents come from.

    Args:
        term: such as ``MonoLoss(lam=0.1, lam_units="raw")``.
        model: what it is attached to.
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
        latents: str | nn.Module | None = None,
        warm_up_steps: int = 0,
        sync: bool = False,
    ) -> None:
        self.check(term, warm_up_steps)
        self.term, self.warm_up_steps, self.sync = term, warm_up_steps, sync
        self.recorder = LatentRecorder(model, latents)

    @staticmethod
    def check(term: LossTerm, warm_up_steps: int) -> None:
        """Raise what the class raises, before there is a model."""
        if not isinstance(term, LossTerm):
            got = f"the class {term.__name__}" if isinstance(term, type) else type(term).__name__
            raise TypeError(
                f"loss: expected a loss term such as MonoLoss(lam=0.1, lam_units='raw'), got {got}"
            )
        if isinstance(warm_up_steps, bool) or not isinstance(warm_up_steps, int):
            raise TypeError(f"warm_up_steps: expected an integer, got {warm_up_steps!r}")
        if warm_up_steps < 0:
            raise ValueError(f"warm_up_steps: expected at least 0, got {warm_up_steps}")
        if term.name in _RESERVED:
            raise ValueError(f"name: {term.name!r} is the host's own; take another")
        if term.needs_selection:
            raise ValueError(f"{term.name}: needs the activations before a Top-k SAE's selection")
        if term.lam_units != "raw":
            raise ValueError(
                f"{term.name}: lam is measured against {term.lam_units!r}, a reconstruction "
                "loss, and there is none here; use lam_units='raw'"
            )

    def __call__(self, embeddings: Tensor, step: int) -> TermOfStep:
        """Return the term of the last forward pass.

        Args:
            embeddings: (B, d) of the same samples; constants.
            step: how many steps have been done, for the warm-up.

        Raises:
            RuntimeError: no forward pass since the last time.
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


def require_embeddings(given: Any, what: str) -> None:
    """Raise TypeError unless embeddings are a column's name or something to call."""
    if given is None or not (isinstance(given, str) or callable(given)):
        raise TypeError(
            f"embeddings: expected {what}, or a frozen encoder to call, got {type(given).__name__}"
        )

"""A loss term on the output of one layer of a model: what every fine-tuning adapter attaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from monoloss_plugin._checks import as_rows, require_flag
from monoloss_plugin.attaching import AttachedTerm, StepTerm
from monoloss_plugin.finetuning.gathering import gather_rows
from monoloss_plugin.finetuning.recorder import LatentRecorder, require_layer
from monoloss_plugin.losses import StepTensors

_RESERVED = ("loss", "output", "epoch", "grad_norm", "learning_rate")
"""Names that hosts already use in their logs and results."""


@dataclass
class LatentTerm(AttachedTerm):
    """A loss term on the latents that a layer gives."""

    latents: str | nn.Module | None = None
    """The layer or its path; by default the model's MonoLayer."""
    sync: bool = False
    """Compute the term over the global batch of all processes."""
    recorder: LatentRecorder | None = None
    calls: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        term = self.term
        require_layer(self.latents)
        require_flag(self.sync, "sync")
        if term.name in _RESERVED:
            raise ValueError(
                f"name: hosts use {term.name!r} in their logs; give the term another name"
            )
        if term.needs_selection:
            raise ValueError(f"{term.name}: needs the activations before a Top-k SAE's selection")
        if term.lam_units != "raw":
            raise ValueError(
                f"{term.name}: lam is measured against {term.lam_units!r}, a reconstruction "
                "loss, and there is none here; use lam_units='raw'"
            )

    def begin(self, model: nn.Module) -> None:
        """Begin to record the layer of this model; raises as :class:`LatentRecorder`."""
        self.recorder, self.calls = LatentRecorder(model, self.latents), 0

    def stop(self) -> None:
        """Take the recorder's hook away."""
        if self.recorder is not None:
            self.recorder.remove()
            self.recorder = None

    def compute(
        self, embeddings: Any, step: int | None = None, steps: float = float("inf")
    ) -> StepTerm:
        """Return the term for the last forward pass.

        Args:
            embeddings: (B, d) of the same samples; they get no gradient.
            step: how many steps are done, for the schedule; by default how many calls.
            steps: how many steps there will be, if the host knows.

        Raises:
            ValueError: the latents carry no gradient, the rows do not match, or ``start`` is a
                share of an unknown number of steps.
        """
        assert self.recorder is not None
        latents = self.recorder.take()
        if torch.is_grad_enabled() and not latents.requires_grad:
            raise ValueError(
                f"{self.term.name}: its latents carry no gradient: the layer and everything before "
                "it is frozen, or the layer is inside a checkpointed block"
            )
        given = as_rows(embeddings, "embeddings").detach().to(latents.device)
        if len(given) != len(latents):
            raise ValueError(
                f"embeddings: expected {len(latents)} rows, one for each sample, got {len(given)}"
            )
        if self.sync:
            latents, given = gather_rows(latents), gather_rows(given)
        step_tensors = StepTensors(latents, given, gradient_at=self.recorder.gradient_at)
        if not self.calls:
            self.warn_of_long_warm_up(steps)
        weight = self.weight_at(self.calls if step is None else step, steps)
        self.calls += 1
        return StepTerm.of(self.term, step_tensors, weight)

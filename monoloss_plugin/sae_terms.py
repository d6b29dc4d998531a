"""What the adapters of SAE trainers share: lam's conversion, and the terms of a step.

A host's own schedule, logs and checkpoints stay the host's. :class:`SaeTerms` is for a host that
has none.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from monoloss_plugin._checks import as_rows
from monoloss_plugin.attaching import AttachedTerm, StepTerm
from monoloss_plugin.batch import Batch
from monoloss_plugin.kernels.batch import GradientAt
from monoloss_plugin.losses import LossTerm, Reduction, StepTensors, lam_factor

Embeddings = Callable[[Tensor], Tensor | Batch]
"""Maps the SAE's input (B, d_in) of a step to another similarity space (B, d) of the same rows; or
to the batch of the same rows, which says also which images they are patches of."""


def tensors_of_sae(
    attached: AttachedTerm,
    latents: Tensor,
    inputs: Tensor,
    *,
    pre_acts: Tensor | None = None,
    gradient_at: GradientAt = "all",
) -> StepTensors:
    """Return what a term needs of an SAE's step, and no more.

    Args:
        attached: the term. Its ``embeddings`` maps the inputs to another similarity space, or to a
            :class:`~monoloss_plugin.batch.Batch` that says also which images they are patches of.
        latents: (..., M), dense or sparse COO.
        inputs: (..., d_in), what the SAE reconstructs.
        pre_acts: (..., M), the activations before a Top-k selection. The latents that are not zero
            are what it selects.
        gradient_at: which latents pass a gradient on.
    """
    inputs = as_rows(inputs, "inputs")
    latents = as_rows(latents, "latents", keep_sparse=True)
    step = StepTensors(latents, embeddings=inputs)
    if attached.term.needs_embeddings:
        embeddings: Any = inputs
        if attached.embeddings is not None:
            embeddings = attached.embeddings(inputs)
            if isinstance(embeddings, Batch):
                step = step._replace(images=embeddings.images)
                embeddings = embeddings.similarity
            embeddings = as_rows(embeddings, "embeddings")
        step = step._replace(embeddings=embeddings, features=inputs, gradient_at=gradient_at)
    if attached.term.needs_selection and pre_acts is not None:
        step = step._replace(
            pre_acts=as_rows(pre_acts, "pre_acts"),
            selected=as_rows(latents.detach(), "latents") != 0,
        )
    return step


_REDUCTIONS = {
    "sum": "the sum of the squared error over an input's {width} entries",
    "mean": "the mean of the squared error over an input's {width} entries",
    "fvu": "the squared error over an input's {width} entries, divided by the variance {variance}",
}


@dataclass
class LamConversion:
    """Converts lam to the weight in one host's loss, logs the result once, and records it."""

    host: str
    """What the log calls the host."""
    reduction: Reduction
    """How the host reduces its squared error over the input's width."""
    logger: logging.Logger
    _mean_square_norm: float | None = None
    _variance: float | None = None
    _announced: dict[str, AttachedTerm] = field(default_factory=dict)
    _step: int = 0

    def begin_step(self, step: int) -> None:
        """Take note of the host's step. If it went back, this is another run: measure again."""
        if step < self._step:
            self._mean_square_norm = None
            self._announced.clear()
        self._step = step

    def factor(
        self, attached: AttachedTerm, inputs: Tensor, record: dict[str, Any], times: float = 1.0
    ) -> float:
        """Return what the host's loss multiplies lam by.

        The input's scale is read from the first batch. This is the only time that a step waits for
        the device.

        Args:
            attached: the term.
            inputs: (B, d), what the host reconstructs.
            record: what the host's checkpoints keep. A resumed run goes on with its scale; the
                conversion is written into it.
            times: how many squared errors the host adds up.
        """
        term, factor = attached.term, 1.0
        if term.lam_units != "raw":
            if self._mean_square_norm is None:
                self._measure(inputs.detach().float(), record if self._step > 0 else {})
            assert self._mean_square_norm is not None
            factor = times * lam_factor(
                term.lam_units,
                width=inputs.shape[1],
                mean_square_norm=self._mean_square_norm,
                reduction=self.reduction,
                variance=self._variance,
                degree=term.degree,
            )
        if self._announced.get(term.name) is not attached:  # another may have had this name
            self._announced[term.name] = attached
            self._announce(attached, factor, inputs.shape[1], record)
        return factor

    def _measure(self, inputs: Tensor, known: Mapping[str, Any]) -> None:
        """Measure the inputs' scale, or take what a checkpoint knows."""
        norm = known.get("input_mean_square_norm") or inputs.square().sum(1).mean()
        self._mean_square_norm = float(norm)
        if self.reduction == "fvu":
            variance = known.get("input_variance")
            self._variance = float(variance or (inputs - inputs.mean(0)).square().sum(1).mean())

    def _announce(
        self, attached: AttachedTerm, factor: float, width: int, record: dict[str, Any]
    ) -> None:
        """Log what lam became, as a warning the first time, and record it."""
        term = attached.term
        show = not attached.conversion_shown and not math.isclose(factor, 1.0, rel_tol=1e-3)
        attached.conversion_shown |= show
        self.logger.log(
            logging.WARNING if show else logging.INFO,
            "%s: lam %g is measured against %r. %s takes %s, and the inputs' mean squared norm is "
            "%s. So the weight in its loss is %g times lam: %g%s",
            term.name,
            term.lam,
            term.lam_units,
            self.host,
            _REDUCTIONS[self.reduction].format(width=width, variance=self._variance),
            self._mean_square_norm,
            factor,
            term.lam * factor,
            f". Samples are compared by {attached.compared_by}" if term.needs_embeddings else "",
        )
        record["input_mean_square_norm"] = self._mean_square_norm
        if self._variance is not None:
            record["input_variance"] = self._variance
        record.setdefault("terms", {})[term.name] = {**attached.options, "factor": factor}


@dataclass
class SaeTerms:
    """Computes the terms of an SAE in a host that has no schedule and no logs of its own."""

    conversion: LamConversion
    record: dict[str, Any] = field(default_factory=dict)
    """What lam became, and the inputs' scale. A checkpoint that keeps it lets a run go on."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Scalars of the last step, by name."""
    steps: int = 0
    """How many steps are done, if the host does not say."""
    _checked: bool = False
    """The latents of the first step were seen to fit the terms."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: how many steps are done, and what lam became."""
        return {"steps": self.steps, "record": self.record}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the run that saved this state."""
        self.steps, self.record = int(state["steps"]), dict(state["record"])

    # Compiling would gain nothing: the schedule and the logs are plain Python.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def add_up(
        self,
        terms: Iterable[AttachedTerm],
        latents: Tensor,
        inputs: Tensor,
        *,
        step: int | None = None,
        steps: float = math.inf,
        pre_acts: Tensor | None = None,
        gradient_at: GradientAt = "all",
        times: float = 1.0,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Return the sum of the weighted terms, to add to the host's loss.

        Args:
            terms: the terms.
            latents: (..., M), dense or sparse COO.
            inputs: (..., d_in), what the SAE reads.
            step: how many steps are done; by default how often this was called.
            steps: how many steps there will be, if the host knows.
            pre_acts: (..., M), the activations before a Top-k selection.
            gradient_at: which latents pass a gradient on.
            times: how many squared errors the host adds up.
            targets: (..., d_out), what a transcoder reconstructs; an SAE reconstructs its inputs.

        Raises:
            ValueError: ``start`` is a share of an unknown number of steps, shapes do not match, or
                in the first step the latents are negative and a term reads 0 as "not active".
        """
        terms = list(terms)
        for term in (attached.term for attached in terms if not self._checked):
            if term.needs_nonnegative:
                require_nonnegative(latents, term)
        self._checked = True
        step = self.steps if step is None else step
        self.steps = step + 1
        self.conversion.begin_step(step)
        self.metrics = {}
        rows = as_rows(inputs, "inputs")
        reconstructed = rows if targets is None else as_rows(targets, "targets")
        total = torch.zeros((), dtype=torch.promote_types(latents.dtype, torch.float32))
        total = total.to(latents.device)
        for attached in terms:
            factor = self.conversion.factor(attached, reconstructed, self.record, times)
            weight = attached.weight_at(step, steps) * factor
            tensors = tensors_of_sae(
                attached, latents, rows, pre_acts=pre_acts, gradient_at=gradient_at
            )
            weighted, metrics = StepTerm.of(attached.term, tensors, weight)
            if weight:
                total = total + weighted
            self.metrics.update(metrics)
        return total


def require_nonnegative(latents: Tensor, term: LossTerm) -> None:
    """Raise ValueError for signed latents. The device waits: ask in a run's first step alone."""
    values = latents.detach()
    values = values.coalesce().values() if values.layout == torch.sparse_coo else values
    if bool((values < 0).any()):
        raise ValueError(
            f"{term.name}: reads 0 as 'not active', but these latents are negative in places; it "
            "needs latents after an activation function such as ReLU"
        )

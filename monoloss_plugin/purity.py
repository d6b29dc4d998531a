"""Class purity, from sums over the samples of each class, and its chance level.

Purity is high by chance where a latent is active on few samples: the class that is most frequent
among them was chosen after looking. So the samples of each class are dealt to two halves in turn.
The dominant class is taken from one half, and the purity from the other, and the other way round.
A latent that knows nothing of the classes then gets the share of the chosen class on average:

    adjusted = (purity - share) / (1 - share)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from monoloss_plugin._checks import as_labels, as_rows, as_tensor, require_finite
from monoloss_plugin._chunks import parts_of
from monoloss_plugin.kernels.support import Support


class Purity(NamedTuple):
    """Class purity of each latent, in float64; NaN for a latent that is never active."""

    binary: Tensor
    """(M,): share of a latent's active samples that are of its dominant class."""
    weighted: Tensor
    """(M,): share of a latent's activation that is on samples of its dominant class."""
    adjusted: Tensor
    """(M,): binary purity above chance: 0 for a latent that knows nothing of the classes, 1 for one
    of a single class. NaN if either half of the samples has none that activates the latent."""
    dominant: Tensor
    """(M,) int64: the class with most active samples, the lowest of equals; -1 if never active."""

    @property
    def mean_binary(self) -> float:
        """Mean over the latents that are ever active, as in the paper's Table 1."""
        return float(self.binary.nanmean())

    @property
    def mean_weighted(self) -> float:
        """Mean over the latents that are ever active, as in the paper's Table 1."""
        return float(self.weighted.nanmean())

    @property
    def mean_adjusted(self) -> float:
        """Mean over the latents that have one."""
        return float(self.adjusted.nanmean())


class ClassSums(NamedTuple):
    """How often and how strongly each latent is active in each class.

    Updates change the tensors in place. They take 16 bytes for each class and latent.
    """

    counts: Tensor
    """(2, C, M) int32: in each half, the number of samples on which the latent is active."""
    activations: Tensor
    """(C, M) float64: the sum of the latent's activations."""
    samples: Tensor
    """(2, C) int64: the number of samples in each half."""

    @classmethod
    @torch.inference_mode(False)  # or the sums could not be updated outside it
    def zeros(cls, num_classes: int, num_latents: int, device: torch.device | str) -> ClassSums:
        """Return the sums over no samples."""
        shape = (num_classes, num_latents)
        return cls(
            torch.zeros((2, *shape), dtype=torch.int32, device=device),
            torch.zeros(shape, dtype=torch.float64, device=device),
            torch.zeros((2, num_classes), dtype=torch.int64, device=device),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(C, M)."""
        num_classes, num_latents = self.activations.shape
        return num_classes, num_latents

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name."""
        return self._asdict()

    @torch.no_grad()
    def add_(self, latents: Tensor | Support, labels: Tensor) -> None:
        """Add samples: latents (..., M), dense or sparse, and integer labels (...).

        Raises:
            TypeError: latents not floating, or labels not integer.
            ValueError: shapes that do not match, a label outside the classes, NaN or infinite
                values. The sums are then unchanged.
        """
        given = latents if isinstance(latents, Support) else as_tensor(latents, "latents")
        a = given if isinstance(given, Support) else as_rows(given, "latents", keep_sparse=True)
        labels = as_labels(labels)
        num_classes, num_latents = self.shape
        if a.shape[1] != num_latents:
            raise ValueError(f"latents: expected width {num_latents}, got {a.shape[1]}")
        if labels.shape != given.shape[:-1]:
            raise ValueError(
                f"labels: expected shape {tuple(given.shape[:-1])} to match latents, "
                f"got {tuple(labels.shape)}"
            )
        if labels.numel() == 0:
            return
        y = labels.flatten().to(a.device, torch.int64)
        lowest, highest = int(y.min()), int(y.max())
        if lowest < 0 or highest >= num_classes:
            raise ValueError(
                f"labels: expected values in [0, {num_classes}), got a range of "
                f"[{lowest}, {highest}]"
            )
        parts = list(parts_of(a))
        for _, part in parts:
            require_finite(part.values if isinstance(part, Support) else part, "latents")
        halves = self._deal_(y)
        for rows, part in parts:
            of_half, of_class = halves[rows] * num_classes + y[rows], y[rows]
            if isinstance(part, Support):
                of_half = of_half[part.rows] * num_latents + part.columns
                of_class = of_class[part.rows] * num_latents + part.columns
                counts, activations = self.counts.view(-1), self.activations.view(-1)
                positive = part.values.clamp(min=0)
            else:
                counts, activations = self.counts.flatten(0, 1), self.activations
                positive = part.clamp(min=0)
            counts.index_add_(0, of_half, (positive > 0).to(torch.int32))
            activations.index_add_(0, of_class, positive.double())

    def _deal_(self, labels: Tensor) -> Tensor:
        """Return the half of each sample (N,): the samples of a class are dealt in turn."""
        num_classes = self.samples.shape[1]
        ordered, order = labels.sort(stable=True)
        counts = labels.bincount(minlength=num_classes)
        place = torch.arange(len(labels), device=labels.device)
        in_class = place - (counts.cumsum(0) - counts)[ordered]
        seen = self.samples.sum(0)[ordered]
        halves = torch.empty_like(labels)
        halves[order] = (seen + in_class) % 2
        self.samples.view(-1).add_(
            (halves * num_classes + labels).bincount(minlength=2 * num_classes)
        )
        return halves


@torch.no_grad()
def purity_from_sums(sums: ClassSums) -> Purity:
    """Return each latent's purity.

    The dominant class is the one with most active samples; ties go to the lowest label.
    """
    counts = sums.counts[0] + sums.counts[1]
    dominant = counts.argmax(0)

    def share(of: Tensor) -> Tensor:
        return of.gather(0, dominant[None]).squeeze(0).double() / _sum(of)

    never = _sum(counts) == 0
    return Purity(
        share(counts),
        share(sums.activations),
        adjusted_from_sums(sums),
        dominant.masked_fill(never, -1),
    )


def adjusted_from_sums(sums: ClassSums) -> Tensor:
    """Return purity above chance (M,).

    The dominant class comes from one half of the samples and the purity from the other, and the
    other way round.
    """
    active = above = torch.zeros_like(sums.activations[0])
    for chosen_from, tested_on in ((0, 1), (1, 0)):
        chosen = sums.counts[chosen_from].argmax(0)
        has_one = _sum(sums.counts[chosen_from]) > 0
        tested, samples = sums.counts[tested_on], sums.samples[tested_on].double()
        share = samples[chosen] / samples.sum()
        firings = _sum(tested) * has_one
        hits = tested.gather(0, chosen[None]).squeeze(0) * has_one
        active = active + firings
        # Each way by its own share: one ratio of sums would be too high for latents with few
        # active samples, because the class that one half chose is a hit in the other.
        above = above + torch.where(has_one, (hits - firings * share) / (1 - share), 0.0)
    return above / active


def _sum(of_classes: Tensor) -> Tensor:
    """Return the sum over classes (M,), in float64. Integers are quick to sum in their own type."""
    return of_classes.sum(0, dtype=of_classes.dtype).double()

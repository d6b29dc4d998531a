"""Class purity, from sums over the samples of each class."""

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

    @property
    def mean_binary(self) -> float:
        """Mean over the latents that are ever active, as in the paper's Table 1."""
        return float(self.binary.nanmean())

    @property
    def mean_weighted(self) -> float:
        """Mean over the latents that are ever active, as in the paper's Table 1."""
        return float(self.weighted.nanmean())


class ClassSums(NamedTuple):
    """How often and how strongly each latent is active in each class.

    Updates change the tensors in place. They take 12 bytes for each class and latent.
    """

    counts: Tensor
    """(C, M) int32: number of samples on which the latent is active."""
    activations: Tensor
    """(C, M) float64: the sum of the latent's activations."""

    @classmethod
    @torch.inference_mode(False)  # or the sums could not be updated outside it
    def zeros(cls, num_classes: int, num_latents: int, device: torch.device | str) -> ClassSums:
        """Return the sums over no samples."""
        shape = (num_classes, num_latents)
        return cls(
            torch.zeros(shape, dtype=torch.int32, device=device),
            torch.zeros(shape, dtype=torch.float64, device=device),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(C, M)."""
        num_classes, num_latents = self.counts.shape
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
        for rows, part in parts:
            if isinstance(part, Support):
                cells = y[rows][part.rows] * num_latents + part.columns
                counts, activations = self.counts.view(-1), self.activations.view(-1)
                positive = part.values.clamp(min=0)
            else:
                cells, (counts, activations) = y[rows], self
                positive = part.clamp(min=0)
            counts.index_add_(0, cells, (positive > 0).to(torch.int32))
            activations.index_add_(0, cells, positive.double())


@torch.no_grad()
def purity_from_sums(sums: ClassSums) -> Purity:
    """Return the share of each latent's sums that its dominant class holds.

    The dominant class is the one with most active samples; ties go to the lowest label.
    """
    dominant = sums.counts.argmax(0, keepdim=True)

    def share(of: Tensor) -> Tensor:
        return (of.gather(0, dominant).double() / of.sum(0).double()).squeeze(0)

    return Purity(share(sums.counts), share(sums.activations))

"""Class purity from sums over classes, which add across batches, shards and ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from monoloss_plugin._checks import as_labels, as_rows, as_tensor, require_finite
from monoloss_plugin._chunks import parts_of
from monoloss_plugin.kernels.support import Support


class Purity(NamedTuple):
    """Class purity of each latent, in float64; NaN where a latent is never active."""

    binary: Tensor
    """(M,): share of a latent's active samples that are of its dominant class."""
    weighted: Tensor
    """(M,): the same share of its activation."""

    @property
    def mean_binary(self) -> float:
        """Mean over the latents that are ever active, as the paper's Table 1 reports it."""
        return float(self.binary.nanmean())

    @property
    def mean_weighted(self) -> float:
        """Mean over the latents that are ever active, as the paper's Table 1 reports it."""
        return float(self.weighted.nanmean())


class ClassSums:
    """How often and how strongly each latent is active in each class.

    Args:
        num_classes: C.
        num_latents: M.
        device: where the sums live: 12 bytes for each class and latent.
    """

    NAMES = ("counts", "activations")

    def __init__(
        self, num_classes: int, num_latents: int, device: torch.device | str = "cpu"
    ) -> None:
        shape = (num_classes, num_latents)
        self.counts = torch.zeros(shape, dtype=torch.int32, device=device)
        self.activations = torch.zeros(shape, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update_(self, latents: Tensor | Support, labels: Tensor) -> None:
        """Take up latents (N, M) and integer labels (N,); the sums change only if both are sound.

        Raises:
            TypeError: latents not floating, or labels not integer.
            ValueError: shapes that do not match, a label outside the classes, NaN or infinite
                values.
        """
        given = latents if isinstance(latents, Support) else as_tensor(latents, "latents")
        shape = given.shape
        a = given
        if not isinstance(a, Support):
            a = as_rows(a, "latents", keep_sparse=True)
        labels = as_labels(labels)
        num_classes, num_latents = self.counts.shape
        if a.shape[1] != num_latents:
            raise ValueError(f"latents: expected width {num_latents}, got {a.shape[1]}")
        if labels.shape != shape[:-1]:
            raise ValueError(
                f"labels: expected shape {tuple(shape[:-1])} to match latents, "
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
                self._add_support(part, y[rows])
            else:
                self._add_dense(part, y[rows])

    def _add_support(self, part: Support, y: Tensor) -> None:
        positive = part.values.clamp(min=0)
        cells = y[part.rows] * part.num_latents + part.columns
        self.counts.view(-1).index_add_(0, cells, (positive > 0).to(torch.int32))
        self.activations.view(-1).index_add_(0, cells, positive.double())

    def _add_dense(self, part: Tensor, y: Tensor) -> None:
        positive = part.clamp(min=0)
        self.counts.index_add_(0, y, (positive > 0).to(torch.int32))
        self.activations.index_add_(0, y, positive.double())

    @torch.no_grad()
    def purity(self) -> Purity:
        """Return the purity of every latent."""
        dominant = self.counts.argmax(0, keepdim=True)  # of equals the first, the lowest label

        def share(sums: Tensor) -> Tensor:
            return (sums.gather(0, dominant).double() / sums.sum(0).double()).squeeze(0)

        return Purity(share(self.counts), share(self.activations))

"""Samples, as every part of the package takes and gives them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """B samples, or one, whose tensors then have no first dimension.

    Examples:
        >>> import torch
        >>> batch = Batch(torch.eye(2), labels=torch.tensor([0, 1]))
        >>> batch.similarity is batch.features
        True
    """

    features: Tensor
    """(B, d_in), what the SAE takes."""
    embeddings: Tensor | None = None
    """(B, d), the similarity space of the same samples; None where it is the features."""
    labels: Tensor | None = None
    """(B,) integer classes; -1 where a sample has none."""
    ids: list[str] | None = None
    """The samples' ids."""
    rows: Tensor | None = None
    """(B,) int64 on the CPU, where in their feature set the samples are."""

    @property
    def similarity(self) -> Tensor:
        """(B, d), what samples are compared by: the embeddings, or the features without any."""
        return self.features if self.embeddings is None else self.embeddings

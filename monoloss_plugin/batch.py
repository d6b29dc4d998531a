"""A batch of samples. Every part of the package takes and returns this class."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """B samples; or one sample, whose tensors have no first dimension.

    Examples:
        >>> import torch
        >>> batch = Batch(torch.eye(2), labels=torch.tensor([0, 1]))
        >>> batch.similarity is batch.features
        True
    """

    features: Tensor
    """(B, d_in): the SAE's input."""
    embeddings: Tensor | None = None
    """(B, d): what samples are compared by; None if that is the features."""
    labels: Tensor | None = None
    """(B,) integer classes; -1 for a sample without a class."""
    ids: list[str] | None = None
    """The samples' ids."""
    rows: Tensor | None = None
    """(B,) int64 on the CPU: the rows of the samples in their feature set."""
    images: Tensor | None = None
    """(B,) int64 on the CPU: which image each sample is a patch of. Patches of one image are not
    compared. None if each sample is an image of its own."""
    places: Tensor | None = None
    """(B,) int16 on the CPU: each patch's place in its image's grid, row after row; -1 for a class
    token. None if samples are no patches."""
    grids: Tensor | None = None
    """(B, 2) int16 on the CPU: the height and width, in patches, of the grid of each patch's image.
    None if samples are no patches, or the grids are not known."""

    @property
    def similarity(self) -> Tensor:
        """(B, d): what samples are compared by; the features if there are no embeddings."""
        return self.features if self.embeddings is None else self.embeddings

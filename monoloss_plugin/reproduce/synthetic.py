"""Features made up for measurements of time and memory, where no real ones are needed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def clustered_features(rows: int, width: int, seed: int = 0) -> Tensor:
    """Return unit vectors (rows, width) around a hundred directions, as an encoder's would be."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(100, width, generator=generator)
    nearest = torch.randint(100, (rows,), generator=generator)
    return normalize(centres[nearest] + torch.randn(rows, width, generator=generator), dim=1)

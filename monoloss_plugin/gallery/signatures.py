"""Which latents are active on the same samples: their activations, projected to a few numbers.

Give every sample n a random vector g_n of ±1. Then the cosine of the signatures

    s_j = Σ_n (a_nj - mean a_j) g_n

of two latents is close to the correlation of their activations: the estimate has a standard
deviation of at most 1 / sqrt(512) = 0.044 (Johnson & Lindenstrauss 1984). It needs one pass, memory
of 512 numbers for each latent, and works for the latents of two SAEs too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from monoloss_plugin.gallery.reservoir import hashes
from monoloss_plugin.kernels.support import Support

WIDTH = 512


class Signatures:
    """Sums from which the signatures of M latents follow. Only positive activations count."""

    def __init__(self, num_latents: int, device: torch.device) -> None:
        self._projected = torch.zeros(num_latents, WIDTH, device=device)
        self._sums = torch.zeros(num_latents, device=device)
        self._total = torch.zeros(WIDTH, device=device)
        self._count = 0

    def add(self, rows: Tensor, activations: Tensor | Support) -> None:
        """Add samples: row numbers (B,) and activations (B, M)."""
        columns = torch.arange(WIDTH, device=rows.device)
        signs = torch.where(hashes(rows.unsqueeze(1), columns) < 0.5, -1.0, 1.0)
        if isinstance(activations, Support):
            positive = activations.values.float().clamp(min=0)
            self._projected += activations.weighted_sums(positive, signs)
            self._sums += activations.sums(positive)
        else:
            positive = activations.float().clamp(min=0)
            self._projected += positive.T @ signs
            self._sums += positive.sum(0)
        self._total += signs.sum(0)
        self._count += len(rows)

    def compute(self) -> Tensor:
        """Return the signatures (M, 512), float32, on the CPU; about zero for a constant latent."""
        means = (self._sums / max(1, self._count)).unsqueeze(1)
        return (self._projected - means * self._total).cpu()

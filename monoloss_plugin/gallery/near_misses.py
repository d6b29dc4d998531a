"""Samples that look like those of a latent, and do not activate it."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from monoloss_plugin._chunks import row_chunks
from monoloss_plugin.embeddings import unit_rows
from monoloss_plugin.gallery.reservoir import Band, hashes_of_rows

CANDIDATES = 1 << 14
_COSINES = 1 << 24
"""Cosines per chunk, about: 64 MiB."""


class Candidates:
    """A random choice of up to 16,384 samples, with their embeddings and active latents.

    Near misses are the most similar of them: the most similar of all samples, if there are no more.
    """

    def __init__(self, num_latents: int, device: torch.device) -> None:
        self.num_latents = num_latents
        self.rows = torch.empty(0, dtype=torch.int64, device=device)
        self.keys = torch.empty(0, dtype=torch.float64, device=device)
        self.embeddings: Tensor | None = None
        self.active = torch.empty(0, -(-num_latents // 8), dtype=torch.uint8, device=device)

    def add(self, rows: Tensor, embeddings: Tensor, active: Tensor) -> None:
        """Add B samples.

        Args:
            rows: (B,) row numbers.
            embeddings: (B, d)
            active: (B, M / 8) their active latents, as :func:`pack_active` returns them.
        """
        keys = hashes_of_rows(rows)
        new = self._may_stay(keys)
        unit = unit_rows(embeddings[new], torch.float32)[0].float()
        held = unit if self.embeddings is None else torch.cat((self.embeddings, unit))
        rows, keys = torch.cat((self.rows, rows[new])), torch.cat((self.keys, keys[new]))
        active = torch.cat((self.active, active[new]))
        if len(rows) > CANDIDATES:
            keys, order = keys.topk(CANDIDATES, largest=False)
            rows, held, active = rows[order], held[order], active[order]
        self.rows, self.keys, self.embeddings, self.active = rows, keys, held, active

    def near_misses(self, means: Tensor, count: int) -> Band:
        """Return, for each latent, the samples most similar to its mean embedding (M, d).

        A latent that is never active has none.
        """
        assert self.embeddings is not None  # add came first
        directions, squares = unit_rows(means, torch.float32)
        directions, alive = directions.to(self.embeddings.device).float(), (squares > 0).cpu()
        shape = self.num_latents, min(count, len(self.rows))
        found = Band(torch.full(shape, -1), torch.zeros(shape))
        for part in row_chunks(self.num_latents, len(self.rows), _COSINES):
            cosines = directions[part] @ self.embeddings.T
            cosines.masked_fill_(unpack_active(self.active, part).T, -torch.inf)
            best = cosines.topk(shape[1], 1)
            there = (best.values > -torch.inf).cpu() & alive[part].unsqueeze(1)
            found.rows[part] = self.rows[best.indices].cpu().masked_fill(~there, -1)
            found.values[part] = best.values.cpu().masked_fill(~there, 0.0)
        return found

    def _may_stay(self, keys: Tensor) -> Tensor:
        """Return which samples (B,) bool are among the candidates, or may come to be."""
        if len(self.keys) < CANDIDATES:
            return torch.ones_like(keys, dtype=torch.bool)
        return keys <= self.keys.max()


def pack_active(active: Tensor) -> Tensor:
    """Return which latents are active on B samples, (B, M) bool, as (B, M / 8) uint8.

    So memory does not depend on how many latents are active on a sample.
    """
    bits = F.pad(active, (0, -active.shape[1] % 8)).view(torch.uint8)
    packed = bits[:, ::8].clone()
    for place in range(1, 8):
        packed |= bits[:, place::8] << place
    return packed


def unpack_active(packed: Tensor, latents: slice) -> Tensor:
    """Return which of some latents are active on B samples, (B, m) bool."""
    first = latents.start // 8
    some = packed[:, first : -(-latents.stop // 8), None]
    bits = (some >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1
    return bits.flatten(1)[:, latents.start - 8 * first : latents.stop - 8 * first].bool()

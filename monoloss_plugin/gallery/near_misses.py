"""Samples that look like those of a latent, and do not activate it."""

from __future__ import annotations

import torch
from torch import Tensor

from monoloss_plugin._chunks import row_chunks
from monoloss_plugin.embeddings import unit_rows
from monoloss_plugin.gallery.reservoir import Band, Entries, hashes_of_rows

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
        self._active: list[tuple[Tensor, Tensor]] = []

    def add_samples(self, rows: Tensor, embeddings: Tensor) -> None:
        """Add samples: row numbers (B,) and embeddings (B, d)."""
        keys = hashes_of_rows(rows)
        new = self._may_stay(keys)
        unit = unit_rows(embeddings[new], torch.float32)[0].float()
        held = unit if self.embeddings is None else torch.cat((self.embeddings, unit))
        rows, keys = torch.cat((self.rows, rows[new])), torch.cat((self.keys, keys[new]))
        if len(rows) > CANDIDATES:
            keys, order = keys.topk(CANDIDATES, largest=False, sorted=True)
            rows, held = rows[order], held[order]
        self.rows, self.keys, self.embeddings = rows, keys, held

    def add_active(self, entries: Entries) -> None:
        """Add the positive activations of samples that were added."""
        kept = entries.where(self._may_stay(hashes_of_rows(entries.rows)))
        self._active.append((kept.rows, kept.latents))

    def near_misses(self, means: Tensor, count: int) -> Band:
        """Return, for each latent, the samples most similar to its mean embedding (M, d).

        A latent that is never active has none.
        """
        assert self.embeddings is not None  # add_samples came first
        directions, squares = unit_rows(means, torch.float32)
        directions, alive = directions.to(self.embeddings.device).float(), (squares > 0).cpu()
        latents, samples = self._active_by_latent()
        shape = self.num_latents, min(count, len(self.rows))
        found = Band(torch.full(shape, -1), torch.zeros(shape))
        for part in row_chunks(self.num_latents, len(self.rows), _COSINES):
            cosines = directions[part] @ self.embeddings.T
            bounds = torch.tensor([part.start, part.stop], device=latents.device)
            first, last = torch.searchsorted(latents, bounds).tolist()
            cosines[latents[first:last] - part.start, samples[first:last]] = -torch.inf
            best = cosines.topk(shape[1], 1)
            there = (best.values > -torch.inf).cpu() & alive[part].unsqueeze(1)
            found.rows[part] = self.rows[best.indices].cpu().masked_fill(~there, -1)
            found.values[part] = best.values.cpu().masked_fill(~there, 0.0)
        return found

    def _may_stay(self, keys: Tensor) -> Tensor:
        """Return which samples (B,) bool are among the candidates, or may come to be."""
        if len(self.keys) < CANDIDATES:
            return torch.ones_like(keys, dtype=torch.bool)
        return keys <= self.keys[-1]

    def _active_by_latent(self) -> tuple[Tensor, Tensor]:
        """Return the candidates' active latents, ascending, and the candidates, by number."""
        rows, latents = (torch.cat(of) for of in zip(*self._active, strict=True))
        in_order, order = self.rows.sort()
        place = torch.searchsorted(in_order, rows).clamp(max=len(in_order) - 1)
        known = in_order[place] == rows
        latents, by_latent = latents[known].sort(stable=True)
        return latents, order[place[known]][by_latent]

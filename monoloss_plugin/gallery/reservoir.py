"""A few samples of every latent, kept from a stream of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Entries(NamedTuple):
    """E activations, in any order."""

    latents: Tensor
    """(E,) int64"""
    rows: Tensor
    """(E,) int64: the samples' row numbers."""
    values: Tensor
    """(E,) float32"""

    def where(self, mask: Tensor) -> Entries:
        """Return the entries of a mask (E,)."""
        chosen = mask.nonzero().squeeze(1)
        return Entries(*(one.index_select(0, chosen) for one in self))

    def hashes(self) -> Tensor:
        """Return a number in [0, 1) for each entry, (E,) float64: as good as random, but fixed."""
        return hashes(self.rows, self.latents)


class Band(NamedTuple):
    """A few samples of each of M latents, in order, on the CPU."""

    rows: Tensor
    """(M, K) int64: row numbers; -1 where a latent has fewer."""
    values: Tensor
    """(M, K) float32: activations; of near misses, cosines with the latent's mean embedding."""

    def without(self, other: Band) -> Band:
        """Return the samples that another band of the same latents does not have, in order."""
        twice = (self.rows.unsqueeze(2) == other.rows.unsqueeze(1)).any(2)
        return strongest_first(self.rows.masked_fill(twice, -1), self.values)


def strongest_first(rows: Tensor, values: Tensor) -> Band:
    """Return samples (M, K) as a band; equal values go by row, and missing rows, -1, to the end."""
    rows, values = rows.cpu(), values.cpu()
    rows, order = rows.sort(1)
    values = values.gather(1, order).masked_fill(rows < 0, -torch.inf)
    values, order = values.sort(stable=True, dim=1, descending=True)
    return Band(rows.gather(1, order), values.masked_fill(values == -torch.inf, 0.0))


class Reservoir:
    """Keeps, of each of M latents, the K entries with the largest keys, in memory of M x K.

    The result is exact, and does not depend on how the entries were cut into batches: of equal
    keys, the lowest row is kept. With activations as keys, these are the top samples of a latent;
    with hashes, a random sample of its samples.

    Examples:
        >>> best = Reservoir(1, 2, torch.device("cpu"))
        >>> zeros, rows = torch.zeros(3, dtype=torch.int64), torch.arange(3)
        >>> values = torch.tensor([1.0, 3.0, 2.0])
        >>> best.add(Entries(zeros, rows, values), values)
        >>> best.rows.tolist()
        [[1, 2]]
    """

    def __init__(self, num_latents: int, size: int, device: torch.device) -> None:
        shape = num_latents, size
        self.keys = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)
        """(M, K), descending; minus infinity where a latent has fewer entries."""
        self.rows = torch.full(shape, -1, dtype=torch.int64, device=device)
        """(M, K): row numbers; -1 where a latent has fewer entries."""
        self.values = torch.zeros(shape, dtype=torch.float32, device=device)
        """(M, K)"""

    @torch.no_grad()
    def add(self, entries: Entries, keys: Tensor) -> None:
        """Add entries with their keys (E,), which are finite. A row comes once for each latent."""
        size, keys = self.keys.shape[1], keys.double()
        # Most entries of a long stream stop here.
        may_stay = keys >= self.keys[:, -1].index_select(0, entries.latents)
        entries, keys = entries.where(may_stay), keys[may_stay]
        if not len(keys):
            return
        touched = entries.latents.unique()
        held = self.keys[touched].flatten()
        keys = torch.cat((held, keys))
        columns = torch.cat((touched.repeat_interleave(size), entries.latents))
        rows = torch.cat((self.rows[touched].flatten(), entries.rows))
        values = torch.cat((self.values[touched].flatten(), entries.values))

        order = _order(columns, keys, rows)
        columns = columns[order]
        starts = torch.searchsorted(columns, touched)
        counts = torch.searchsorted(columns, touched, right=True) - starts
        rank = torch.arange(len(columns), device=columns.device)
        rank -= starts.repeat_interleave(counts)
        kept = rank < size
        place, order = (columns[kept], rank[kept]), order[kept]
        self.keys[place], self.rows[place], self.values[place] = (
            keys[order],
            rows[order],
            values[order],
        )


def _order(columns: Tensor, keys: Tensor, rows: Tensor) -> Tensor:
    """Return the order by column, then by falling key, then by row."""
    order = rows.argsort(stable=True)
    order = order[keys[order].argsort(descending=True, stable=True)]
    return order[columns[order].argsort(stable=True)]


def hashes_of_rows(rows: Tensor) -> Tensor:
    """Return a number in [0, 1) for each row (B,), float64: as good as random, but fixed."""
    return hashes(rows, torch.full_like(rows, -1))


def hashes(first: Tensor, second: Tensor) -> Tensor:
    """Return a number in [0, 1) for each pair of integers, float64: as good as random, but fixed.

    It takes two rounds of SplitMix64's steps.
    """
    mixed = first * 0x9E3779B97F4A7C1 + second * 0x6A09E667F3BCC909 + 0x1F83D9ABFB41BD6B
    for factor in (0x58476D1CE4E5B9B1, 0x14D049BB133111EB):
        mixed = (mixed ^ ((mixed >> 29) & 0x7FFFFFFFF)) * factor
    return ((mixed >> 11) & ((1 << 53) - 1)).double() / (1 << 53)

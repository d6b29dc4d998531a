"""Sparse latents as a list of their entries, sorted by latent.

In a TopK SAE about one latent in a hundred is active on a sample. With the entries of each latent
side by side, MonoScore's sums cost a hundredth too: sums over entries, and one ``embedding_bag``.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from monoloss_plugin._checks import looks_are_free

SUMMED_AT_ONCE = 256
"""At most this many terms of a float32 sum are added one after another.

Rounding of equal terms is biased: 16,384 of them err by 8e-5, 256 by 9e-7 (measured).
"""

DOMINANT = 0.9
"""An entry that holds more than this share of its latent's sum is multiplied in float64."""

_HUGE = 1e30
"""Sums beyond this, or below its inverse, leave float32's range."""
_ENTRIES_AT_ONCE = 4096
SPARSE_BELOW = 1 / 16
"""The sparse way is taken if at most this share of the entries is not zero.

At the MonoLoss paper's sizes on 2 CPU cores, the sparse way is 6.6 times faster at a share of
1/128, 1.6 times at 1/16, and no faster at 1/8.
"""
_SAMPLED_ROWS = 64
_LATENTS_AT_ONCE = 512


@dataclass(frozen=True)
class Support:
    """E entries of latents (N, M), sorted by latent.

    Every entry that is not listed is zero. A listed entry may be zero too.
    """

    rows: Tensor
    """(E,) int64: each entry's sample."""
    columns: Tensor
    """(E,) int64, ascending: each entry's latent."""
    offsets: Tensor
    """(M + 1,) int64: where each latent's entries start; the last is E."""
    values: Tensor
    """(E,) activations; differentiable if the latents were."""
    num_rows: int
    """N."""

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Support:
        """Return entries that are sorted by latent, of latents (N, M)."""
        bounds = torch.arange(shape[1] + 1, device=columns.device)
        return cls(rows, columns, torch.searchsorted(columns, bounds), values, shape[0])

    @property
    def num_latents(self) -> int:
        """M."""
        return len(self.offsets) - 1

    @property
    def shape(self) -> tuple[int, int]:
        """(N, M)."""
        return self.num_rows, self.num_latents

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """The device of the entries."""
        return self.values.device

    def counts(self) -> Tensor:
        """Return the number of entries of each latent (M,)."""
        return self.offsets.diff()

    def sums(self, of_entries: Tensor) -> Tensor:
        """Return the sum of ``of_entries`` (E,) over each latent's entries (M,)."""
        zeros = of_entries.new_zeros(self.num_latents, dtype=torch.float64)
        return zeros.index_add_(0, self.columns, of_entries.double()).to(of_entries.dtype)

    def of_latents(self, values: Tensor) -> Tensor:
        """Return, for each entry, its latent's value of ``values`` (M,), as (E,)."""
        return values.index_select(0, self.columns)  # several times faster than values[columns]

    def extremes(self) -> tuple[Tensor, Tensor]:
        """Return each latent's lowest and highest activation (M,), also of zeros not listed.

        Without samples, the lowest is infinity and the highest is minus infinity.
        """
        values = self.values.detach()
        listed = [
            torch.full_like(self.offsets[1:], start, dtype=values.dtype).scatter_reduce_(
                0, self.columns, values, how
            )
            for start, how in ((torch.inf, "amin"), (-torch.inf, "amax"))
        ]
        complete = self.complete()
        lowest = torch.where(complete, listed[0], listed[0].clamp(max=0))
        highest = torch.where(complete, listed[1], listed[1].clamp(min=0))
        return lowest, highest

    def complete(self) -> Tensor:
        """Return which latents have an entry for every sample, (M,) bool."""
        return self.counts() == self.num_rows

    def constant_zeros(self, but: Tensor | None = None) -> Support:
        """Return the same entries, without a gradient for zeros outside a mask (N, M).

        COO latents may store entries that are zero.
        """
        passes = self.values.detach() != 0
        if but is not None:
            passes |= but[self.rows, self.columns]
        return replace(self, values=torch.where(passes, self.values, self.values.detach()))

    def of_samples(self, kept: Tensor) -> Support:
        """Return the entries of the samples of a mask (N,), which are numbered anew."""
        listed = kept[self.rows]
        rows = (kept.cumsum(0) - 1)[self.rows[listed]]
        shape = int(kept.sum()), self.num_latents
        return Support.of(rows, self.columns[listed], self.values[listed], shape)

    def by_sample(self) -> Tensor:
        """Return the latents as a sparse CSR tensor (N, M), without their gradient."""
        rows, order = self.rows.sort(stable=True)
        bounds = torch.arange(self.num_rows + 1, device=rows.device)
        return _csr(
            torch.searchsorted(rows, bounds),
            self.columns[order],
            self.values.detach()[order],
            self.shape,
        )

    def by_latent(self, at_once: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield blocks of latents, and each block as a sparse CSR tensor (m, N), no gradient."""
        values = self.values.detach()
        bounds = [*self.offsets[::at_once].tolist(), len(self.rows)]
        for start, first, last in zip(
            range(0, self.num_latents, at_once), bounds, bounds[1:], strict=False
        ):
            offsets = self.offsets[start : start + at_once + 1] - first
            shape = len(offsets) - 1, self.num_rows
            block = _csr(offsets, self.rows[first:last], values[first:last], shape)
            yield slice(start, start + at_once), block

    def weighted_sums(self, weights: Tensor, embeddings: Tensor) -> Tensor:
        """Return Σ weight · embedding over each latent's entries.

        Args:
            weights: (E,), of the embeddings' dtype.
            embeddings: (N, d).

        Returns:
            (M, d).
        """
        return bags(self.rows, self.offsets, weights, embeddings)

    def add_weighted_sums_(self, total: Tensor, weights: Tensor, embeddings: Tensor) -> Tensor:
        """Add Σ weight · embedding over each latent's entries to ``total``, and return it.

        Products are taken in the embeddings' dtype, except where they would cost accuracy: if one
        entry holds nearly all of its latent's sum, or if a sum leaves float32's range.

        Args:
            total: (M, d) float64.
            weights: (E,) float64.
            embeddings: (N, d).
        """
        magnitudes = weights.abs()
        sums = self.sums(magnitudes)
        if bool(((sums > _HUGE) | ((sums > 0) & (sums < 1 / _HUGE))).any()):
            embeddings = embeddings.double()
        dominant = magnitudes > DOMINANT * self.of_latents(sums)
        for entries in dominant.nonzero().squeeze(1).split(_ENTRIES_AT_ONCE):
            added = weights[entries].unsqueeze(1) * embeddings[self.rows[entries]]
            total.index_add_(0, self.columns[entries], added)
        weights = weights.masked_fill(dominant, 0.0).to(embeddings.dtype)
        # Block by block: what is added stays in the cache, and there is no second (M, d) array.
        starts = range(0, self.num_latents, _LATENTS_AT_ONCE)
        bounds = [*self.offsets[::_LATENTS_AT_ONCE].tolist(), len(self.rows)]
        for start, first, last in zip(starts, bounds, bounds[1:], strict=False):
            offsets = self.offsets[start : start + _LATENTS_AT_ONCE + 1] - first
            total[start : start + _LATENTS_AT_ONCE] += bags(
                self.rows[first:last], offsets, weights[first:last], embeddings, total.dtype
            )
        return total


def bags(
    rows: Tensor,
    offsets: Tensor,
    weights: Tensor,
    embeddings: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return Σ weight · embedding of each bag of entries. Long bags are added up in ``dtype``."""

    def summed(starts: Tensor) -> Tensor:
        return F.embedding_bag(
            rows,
            embeddings,
            starts,
            mode="sum",
            per_sample_weights=weights,
            include_last_offset=True,
        )

    # embedding_bag adds one term after another. Split long bags, if looking for them is free.
    if not looks_are_free(rows) or int(offsets.diff().max()) <= SUMMED_AT_ONCE:
        return summed(offsets)
    pieces = offsets.diff().div(SUMMED_AT_ONCE, rounding_mode="floor") + 1
    bag = torch.arange(len(pieces)).repeat_interleave(pieces)
    within = torch.arange(len(bag)) - (pieces.cumsum(0) - pieces)[bag]
    starts = torch.cat((offsets[bag] + SUMMED_AT_ONCE * within, offsets[-1:]))
    parts = summed(starts)
    sums = parts.new_zeros(len(pieces), parts.shape[1], dtype=dtype)
    return sums.index_add_(0, bag, parts.to(sums.dtype))


def products_at(rows: Tensor, offsets: Tensor, of_latents: Tensor, of_samples: Tensor) -> Tensor:
    """Return, for each entry, the product of its latent's vector and its sample's vector.

    Args:
        rows: (E,), of a :class:`Support`.
        offsets: (M + 1,), of the same.
        of_latents: (M, d).
        of_samples: (N, d).

    Returns:
        (E,)
    """
    zeros = of_latents.new_zeros(len(rows))
    pattern = _csr(offsets, rows, zeros, (len(of_latents), len(of_samples)))
    products: Tensor = torch.sparse.sampled_addmm(pattern, of_latents, of_samples.T, beta=0.0)
    return products.values()


def _csr(offsets: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    _silence_csr_warning()
    return torch.sparse_csr_tensor(offsets, columns, values, shape, check_invariants=False)


@functools.cache
def _silence_csr_warning() -> None:
    """Use up torch's only warning that its CSR tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = torch.zeros(1, dtype=torch.int64)
        torch.sparse_csr_tensor(
            torch.arange(2), one, torch.zeros(1), (1, 1), check_invariants=False
        )


def support_of(latents: Tensor, also: Tensor | None = None) -> Support:
    """Return the non-zero entries of latents; their values carry the gradient.

    Args:
        latents: (N, M), dense or sparse COO.
        also: (N, M) bool: more entries of dense latents to list, whatever their value.
    """
    if latents.layout == torch.sparse_coo:
        latents = latents.coalesce()
        (rows, columns), values = latents.indices(), latents.values()
    else:
        flat = latents.flatten()
        entries = _entries_of(flat.detach(), also)
        values = flat.index_select(0, entries)
        rows = entries.div(latents.shape[1], rounding_mode="floor")
        columns = entries - rows * latents.shape[1]
    columns, order = columns.sort(stable=True)
    shape = latents.shape[0], latents.shape[1]
    return Support.of(rows.index_select(0, order), columns, values.index_select(0, order), shape)


def is_sparse(latents: Tensor, also: Tensor | None = None) -> bool:
    """Return whether the sparse way is faster for latents (N, M).

    On a CPU this looks at a few rows, so it may be wrong if rows differ much; both ways give the
    same numbers. On an accelerator a look would make the device wait, so only COO latents count.
    """
    if latents.layout == torch.sparse_coo:
        return True
    if not looks_are_free(latents) or latents.numel() == 0:
        return False
    rows = sampled_rows(len(latents))
    listed = latents.detach()[rows]
    if also is not None:
        listed = (listed != 0) | also[rows]
    return int(listed.count_nonzero()) <= SPARSE_BELOW * listed.numel()


def sampled_rows(num_rows: int) -> Tensor:
    """Return a few rows to look at, spread evenly but not at regular steps."""
    if num_rows <= _SAMPLED_ROWS:
        return torch.arange(num_rows)
    golden_ratio = (5**0.5 - 1) / 2
    spread = torch.arange(1, _SAMPLED_ROWS + 1, dtype=torch.float64) * golden_ratio % 1
    return (spread * num_rows).long()


def _entries_of(flat: Tensor, also: Tensor | None) -> Tensor:
    """Return the indices, in ascending order, where ``flat`` is not zero or ``also`` is true."""
    if also is not None:
        return ((flat != 0) | also.flatten()).nonzero().squeeze(1)
    aligned = flat.is_contiguous() and flat.storage_offset() % 2 == len(flat) % 2 == 0
    if flat.dtype != torch.float32 or not aligned:
        return flat.nonzero().squeeze(1)
    # Most neighbours are both zero. To look at two at a time, as eight bytes, takes half as long.
    two_by_two = flat.view(torch.int64)
    pairs = two_by_two.nonzero().squeeze(1)
    on = two_by_two.take(pairs).view(torch.float32).nonzero().squeeze(1)
    return 2 * pairs.index_select(0, on >> 1) + (on & 1)

"""MonoScore's sums over any number of samples, in one pass.

The minimum of a latent is known only when the data ends. So the sums are held for the lowest
activation seen so far, and raised when a lower one comes (:meth:`Sums.raise_by_`). The paper's
evaluation (Nasiri-Sarvi et al. 2026, Algorithm 2) needs a first pass for the minimum and maximum.
The maximum does not change the score; it is kept to tell which latents are defined.

Products are taken in the data's dtype, chunk by chunk, and added up in float64. If samples come in
groups, products are float64 too: the pairs within a group may be nearly all of a latent's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from monoloss_plugin._checks import may_hold_any, require_finite
from monoloss_plugin._chunks import parts_of
from monoloss_plugin.chance import ChanceSums
from monoloss_plugin.groups import as_groups
from monoloss_plugin.kernels.support import DOMINANT, Support
from monoloss_plugin.sums import (
    SampleSums,
    Sums,
    UnitEmbeddings,
    dense_sums,
    range_of,
    sparse_sums,
)

_LARGE = 1e12
"""Squares of activations beyond this, or below its inverse, leave float32's range."""


class Moments(NamedTuple):
    """The sums over the samples seen so far, in float64. Updates change the tensors in place."""

    samples: SampleSums
    sums: Sums
    lowest: Tensor
    """(M,): each latent's lowest activation so far, which ã is measured from."""
    highest: Tensor
    """(M,)"""
    active: Tensor
    """(M,): the number of samples with a positive activation."""
    chance: ChanceSums | None
    """None if only the score is wanted."""

    @classmethod
    @torch.inference_mode(False)  # or the sums could not be updated outside it
    def zeros(
        cls, num_latents: int, width: int, device: torch.device | str, *, chance: bool
    ) -> Moments:
        """Return the moments of no samples, for M latents and embeddings of a width."""
        like = torch.zeros(0, dtype=torch.float64, device=device)
        return cls(
            SampleSums.of(like.new_zeros(0, width), like),
            Sums.zeros(num_latents, width, like),
            lowest=like.new_full((num_latents,), torch.inf),
            highest=like.new_full((num_latents,), -torch.inf),
            active=like.new_zeros(num_latents),
            chance=ChanceSums.zeros(num_latents, width, like) if chance else None,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(M, d)."""
        num_latents, width = self.sums.w.shape
        return num_latents, width

    @property
    def span(self) -> Tensor:
        """(M,): the range of each latent's activations."""
        return self.highest - self.lowest

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name."""
        of_latents = {"lowest": self.lowest, "highest": self.highest, "active": self.active}
        chance = self.chance._asdict() if self.chance else {}
        return {**self.samples._asdict(), **self.sums._asdict(), **of_latents, **chance}

    @torch.inference_mode(False)
    @torch.no_grad()
    def add_(
        self, latents: Tensor | Support, embeddings: Tensor, groups: Tensor | None = None
    ) -> None:
        """Add samples: latents (N, M), embeddings (N, d), and groups (N,), which come whole.

        Raises:
            ValueError: NaN or infinite values, or groups of another number; the moments are then
                unchanged.
        """
        if groups is not None:
            groups = as_groups(groups, len(embeddings)).cpu()
            if not isinstance(latents, Support):  # whole groups in each part
                groups, order = groups.sort(stable=True)
                order = order.to(latents.device)
                latents = latents.index_select(0, order)
                embeddings = embeddings.index_select(0, order)
        parts = list(parts_of(latents, groups))
        if not parts:
            return
        ranges = [range_of(part) for _, part in parts]
        lowest = torch.stack([low for low, _ in ranges]).amin(0).double()
        highest = torch.stack([high for _, high in ranges]).amax(0).double()
        require_finite(lowest, "latents")
        require_finite(highest, "latents")
        require_finite(embeddings, "embeddings")

        self.lower_to_(torch.minimum(self.lowest, lowest))
        torch.maximum(self.highest, highest, out=self.highest)
        for (rows, part), (_, highest) in zip(parts, ranges, strict=True):
            e = embeddings[rows]
            if groups is not None:
                of_part = groups[rows] - groups[rows].min()
                unit = UnitEmbeddings.of(e, torch.float64, of_part)
            else:
                wide = torch.promote_types(torch.promote_types(part.dtype, e.dtype), torch.float32)
                unit = UnitEmbeddings.exactly_of(e, wide)
            for total, added in zip(self.samples, unit.sums, strict=True):
                total.add_(added)
            self.active.add_(_active_counts(part))
            if self.chance:
                self.chance.add_(part, unit, self.lowest)
            if isinstance(part, Support):
                _add_(self.sums, sparse_sums(part, unit, self.lowest, add_to=self.sums.w))
            else:
                self._add_dense_(part, highest, unit)

    def _add_dense_(self, part: Tensor, highest: Tensor, unit: UnitEmbeddings) -> None:
        lowest = self.lowest.to(unit.h.dtype)
        if bool((lowest != self.lowest).any()):  # a batch of a wider dtype has set it
            lowest, unit = self.lowest, unit._replace(h=unit.h.double())
        sums = dense_sums(part, unit._replace(q=unit.q.to(lowest.dtype)), lowest)
        # A float32 product errs by 1e-7 of Σ ã. If one sample holds nearly all of that, u² - v
        # and ||w||² - t cancel, and the error would show: take such latents again in float64.
        highest = highest.to(lowest.dtype) - lowest
        inexact = (highest > DOMINANT * sums.u) | (highest > _LARGE) | (highest < 1 / _LARGE)
        again = (inexact & (highest > 0)).nonzero().squeeze(1)
        for sum_ in sums:
            sum_[again] = 0
        _add_(self.sums, sums)
        if len(again):
            exact = unit._replace(h=unit.h.double())
            sums = dense_sums(part[:, again], exact, self.lowest[again])
            for total, added in zip(self.sums, sums, strict=True):
                total.index_add_(0, again, added)

    @torch.no_grad()
    def lower_to_(self, lowest: Tensor) -> None:
        """Measure ã from ``lowest`` (M,), which is at most the lowest activation so far."""
        drop = (self.lowest - lowest).nan_to_num_(nan=0.0, posinf=0.0)  # inf: no samples so far
        self.lowest.copy_(lowest)
        # Most batches lower nothing. A look is free on a CPU; on an accelerator it would cost more
        # than raising the sums by zero.
        if may_hold_any(drop):
            if self.chance:
                self.chance.raise_by_(drop, self.sums.u, self.sums.v, self.samples.n)
            self.sums.raise_by_(drop, self.samples)


def _active_counts(latents: Tensor | Support) -> Tensor:
    """Return on how many samples each latent is active (M,)."""
    if isinstance(latents, Support):
        return latents.sums((latents.values > 0).double())
    return (latents > 0).sum(0)


def moments_of(latents: Tensor, embeddings: Tensor, groups: Tensor | None = None) -> Moments:
    """Return the moments, without those of chance, of latents (N, M) and embeddings (N, d)."""
    moments = Moments.zeros(latents.shape[1], embeddings.shape[1], latents.device, chance=False)
    moments.add_(latents, embeddings, groups)
    return moments


def _add_(totals: Sums, sums: Sums) -> None:
    for total, added in zip(totals, sums, strict=True):
        if added is not total:  # sparse_sums adds to w by itself
            total.add_(added)

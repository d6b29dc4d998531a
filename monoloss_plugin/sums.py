"""MonoScore's sums over samples, and the score that follows from them.

Take one latent with activations a over N samples, and embeddings e of the same samples:

    ã = a - min a      the activation above the latent's minimum
    h = e / ||e||      the unit embedding; a zero embedding stays zero
    q = ||h||²         1, or 0 for a zero embedding

    u = Σ ã      v = Σ ã²      t = Σ ã² q      p = Σ ã q      w = Σ ã h

    MonoScore = (||w||² - t) / (u² - v)

||w||² is Σ ã_n ã_m h_n·h_m over all pairs (n, m), and t is the part of it where n = m. So the
numerator is the weighted similarity of all pairs of different samples. The denominator is the
weight of the same pairs. The score does not use p; a falling minimum does (:meth:`Sums.raise_by_`).

If samples come in groups, such as the patches of images, the pairs within a group are left out too
(:mod:`monoloss_plugin.groups`). Then, with the size s of a sample's group, and H = Σ h over it,

    q = h·H      v = Σ ã A      t = Σ ã Z      r = Σ ã s

Without groups s is 1, H is h, A is ã, and Z is ã q, so these are the same sums.

Every way to compute MonoScore and MonoLoss uses the functions of this file. To add a sum, add a
field to :class:`Sums`, and a line for it to ``raise_by_``, :func:`dense_sums` and
:func:`sparse_sums`; or a field to :class:`SampleSums`, and a term to ``SampleSums.of``. Merging,
reduction over ranks, saving and loading then include it.

Source: Nasiri-Sarvi et al. 2026, eq. 2 and Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from monoloss_plugin._checks import looks_are_free, may_hold_any
from monoloss_plugin.embeddings import unit_rows
from monoloss_plugin.groups import similarities_within, summed_within, within_sums
from monoloss_plugin.kernels.support import SUMMED_AT_ONCE, Support

CONSTANT_BELOW = torch.finfo(torch.float32).tiny
"""A latent whose range over the samples is at most 1.2e-38 counts as constant.

The gradient grows as one over the range, and would overflow float32 below this.
"""

DEFINED_ABOVE = {torch.float32: 1e-5, torch.float64: 1e-12}
"""A latent has a score if u² - v exceeds this, for activations rescaled to [0, 1]. It must exceed
this share of v too, which is more only if samples come in groups.

u² - v is small only if one sample, or one group, holds nearly all of a latent's activation. Both
differences of the score are then mostly rounding. At 1e-5 a float32 score is still right to about
one percent.
"""

_ROWS_IN_CACHE = 512
_BLOCKS = 8
_NARROWEST_BLOCK = 256


class SampleSums(NamedTuple):
    """Sums over samples that are the same for every latent."""

    n: Tensor
    """(): number of samples."""
    sum_h: Tensor
    """(d,): Σ h."""
    sum_q: Tensor
    """(): Σ q."""
    sum_s: Tensor
    """(): Σ s, the number of ordered pairs within groups, a sample with itself included: n, if each
    sample is a group of its own."""

    @classmethod
    def of(cls, h: Tensor, q: Tensor, s: Tensor | None = None) -> SampleSums:
        """Return the sums of unit embeddings (N, d), their q (N,), and their groups' sizes (N,)."""
        n = q.new_full((), len(q))
        return cls(n, h.sum(0), q.sum(), n.clone() if s is None else s.sum())


class UnitEmbeddings(NamedTuple):
    """The embeddings of some samples, as unit vectors."""

    h: Tensor
    """(N, d) unit embeddings."""
    q: Tensor
    """(N,): ||h||²; or h·H, if there are groups."""
    sums: SampleSums
    groups: Tensor | None = None
    """(N,) int64, below N: the group of each sample. None if each is its own."""
    s: Tensor | None = None
    """(N,): the size of each sample's group. None if there are no groups."""

    @classmethod
    def of(
        cls, embeddings: Tensor, dtype: torch.dtype, groups: Tensor | None = None
    ) -> UnitEmbeddings:
        """Return embeddings (N, d) as unit vectors, with all sums in ``dtype``.

        Args:
            embeddings: (N, d).
            dtype: of the result.
            groups: (N,), as :func:`~monoloss_plugin.groups.as_groups` returns them.
        """
        h, q = unit_rows(embeddings, dtype)
        if groups is None:
            return cls(h, q, SampleSums.of(h, q))
        groups = groups.to(h.device, non_blocking=True)
        q = (h * summed_within(h, groups)).sum(1)
        s = summed_within(torch.ones_like(q), groups)
        return cls(h, q, SampleSums.of(h, q, s), groups, s)

    @classmethod
    def exactly_of(cls, embeddings: Tensor, dtype: torch.dtype) -> UnitEmbeddings:
        """Return embeddings (N, d) as unit vectors, with q and all sums in float64.

        These are the q and the sums of h as it was rounded. So ||w||² - t of a single sample is
        zero, and not the 1e-7 by which h misses unit length.
        """
        h, _ = unit_rows(embeddings, dtype)
        squares, sums = [], []
        for rows in h.split(_ROWS_IN_CACHE):
            exact = rows.double()
            squares.append(exact.square().sum(1))
            sums.append(SampleSums.of(exact, squares[-1]))
        totals = (torch.stack(parts).sum(0) for parts in zip(*sums, strict=True))
        return cls(h, torch.cat(squares), SampleSums(*totals))


class Sums(NamedTuple):
    """Sums over samples, for each of M latents; ã may be divided by a scale."""

    u: Tensor
    """(M,): Σ ã."""
    v: Tensor
    """(M,): Σ ã²."""
    t: Tensor
    """(M,): Σ ã² q."""
    p: Tensor
    """(M,): Σ ã q."""
    r: Tensor
    """(M,): Σ ã s; u, if there are no groups."""
    w: Tensor
    """(M, d): Σ ã h."""

    @classmethod
    def zeros(cls, num_latents: int, width: int, like: Tensor) -> Sums:
        """Return the sums over no samples, with the dtype and device of ``like``."""
        of_latents = cls(*(like.new_zeros(num_latents) for _ in cls._fields))
        return of_latents._replace(w=like.new_zeros(num_latents, width))

    @property
    def weight_of_pairs(self) -> Tensor:
        """(M,): u² - v, the sum of ã_n ã_m over all pairs of different samples (or groups)."""
        return self.u.square() - self.v

    def raise_by_(self, drop: Tensor, samples: SampleSums) -> None:
        """Replace every ã by ã + drop, in place: the minimum has fallen by ``drop`` (M,).

        All added terms are non-negative, so nothing cancels.

        Args:
            drop: (M,), at least 0.
            samples: the sums of the same samples.
        """
        n, sum_h, sum_q, sum_s = samples
        self.v.add_(drop * (2 * self.r + drop * sum_s))
        self.r.add_(drop * sum_s)
        self.u.add_(drop * n)
        self.t.add_(drop * (2 * self.p + drop * sum_q))
        self.p.add_(drop * sum_q)
        self.w.addr_(drop, sum_h)


class Scores(NamedTuple):
    """MonoScore of M latents."""

    scores: Tensor
    """(M,), in [-1, 1]; 0 where undefined."""
    defined: Tensor
    """(M,) bool: at least one pair of samples activates the latent, by more than rounding."""


def monoscore_from_sums(sums: Sums, span: Tensor) -> Scores:
    """Return MonoScore = (||w||² - t) / (u² - v).

    Args:
        sums: of each latent.
        span: (M,), max ã - min ã, on the scale of the sums.

    Returns:
        The scores, and which latents have one.

    Examples:
        Two samples with the activations 1 and 3, whose embeddings have a cosine of 0.6:

        >>> from torch import tensor
        >>> h = tensor([[1.0, 0.0], [0.6, 0.8]])
        >>> sums = dense_sums(tensor([[1.0], [3.0]]), UnitEmbeddings.of(h, h.dtype), tensor([0.0]))
        >>> monoscore_from_sums(sums, span=tensor([3.0])).scores
        tensor([0.6000])
    """
    numerator = _squared_norms(sums.w) - sums.t
    denominator = sums.weight_of_pairs
    # "not (small)" instead of "large": a NaN then passes, and shows in the loss that is logged.
    small = denominator <= DEFINED_ABOVE[span.dtype] * torch.maximum(span.square(), sums.v)
    defined = ~small & ~(span <= CONSTANT_BELOW)
    scores = numerator / denominator.masked_fill(~defined, 1.0)
    return Scores(scores.masked_fill(~defined, 0.0), defined)


def _squared_norms(w: Tensor) -> Tensor:
    if w.dtype == torch.float64:  # without a square root: equal terms of the score cancel exactly
        return torch.einsum("md,md->m", w, w)
    norms: Tensor = torch.linalg.vector_norm(w, dim=1)  # six times faster, for a training step
    return norms.square()


def dense_sums(
    latents: Tensor, unit: UnitEmbeddings, lowest: Tensor, scale: Tensor | None = None
) -> Sums:
    """Return the sums of dense latents.

    Args:
        latents: (N, M).
        unit: the embeddings of the same samples.
        lowest: (M,), at most each latent's minimum, in the dtype of the embeddings.
        scale: (M,), what to divide ã by; nothing by default.
    """
    h, q, _, groups, s = unit
    similar = None if groups is None else similarities_within(h, groups)
    parts = []
    for block in column_blocks(latents):
        a = rescaled(latents[:, block], lowest[block], None if scale is None else scale[block])
        u, p, w = a.sum(0), q @ a, weighted_embeddings(a, h)
        if groups is None or s is None or similar is None:
            squares = a.square_()
            parts.append(Sums(u, v=squares.sum(0), t=q @ squares, p=p, r=u.clone(), w=w))
            continue
        v, t = (a * summed_within(a, groups)).sum(0), (a * (similar @ a)).sum(0)
        parts.append(Sums(u, v, t, p, r=s @ a, w=w))
    return Sums(*(torch.cat(blocks) for blocks in zip(*parts, strict=True)))


def sparse_sums(
    support: Support,
    unit: UnitEmbeddings,
    lowest: Tensor,
    scale: Tensor | None = None,
    *,
    add_to: Tensor | None = None,
) -> Sums:
    """Return the sums of sparse latents, from their entries.

    Entries are measured from zero, or from the minimum if every sample has an entry: a latent that
    is active far above zero then loses nothing to rounding. If activations are negative, the zeros
    that are not listed lie above the minimum too, and the sums are raised to hold them.

    Args:
        support: the entries of latents (N, M).
        unit: the embeddings of the same samples.
        lowest: (M,), at most each latent's minimum; the sums but w have its dtype.
        scale: (M,), what to divide ã by; nothing by default.
        add_to: (M, d) float64 to add w to, in place. This saves a second array of that size.
    """
    complete = support.complete()
    base = torch.where(complete, lowest, 0.0)
    drop = torch.where(complete, 0.0, -lowest)
    a = rescaled(support.values, support.of_latents(base))
    if scale is not None:
        a, drop = a.div_(support.of_latents(scale)), drop / scale
    if add_to is None:
        w = support.weighted_sums(a, unit.h)
    else:
        w = support.add_weighted_sums_(add_to, a, unit.h)
    u, q = support.sums(a), unit.q.to(a.dtype).index_select(0, support.rows)
    if unit.groups is None or unit.s is None:
        squares, r = a.square(), u.clone()
        v, t, p = (support.sums(entries) for entries in (squares, squares * q, a * q))
    else:
        v, t = within_sums(support, a, unit.h.to(a.dtype), unit.groups)
        s = unit.s.to(a.dtype).index_select(0, support.rows)
        p, r = support.sums(a * q), support.sums(a * s)
    sums = Sums(u, v, t, p, r, w)
    if may_hold_any(drop):
        sums.raise_by_(drop, unit.sums)
    return sums


def range_of(latents: Tensor | Support) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest activation of each latent (M,)."""
    if isinstance(latents, Support):
        return latents.extremes()
    return latents.amin(0), latents.amax(0)


def column_blocks(latents: Tensor) -> Iterator[slice]:
    """Yield column ranges of latents (N, M), a handful however wide they are.

    Copies of the latents (rescaled, squared, cast) then exist for one block at a time.
    """
    width = max(_NARROWEST_BLOCK, -(-latents.shape[1] // _BLOCKS))
    for start in range(0, max(1, latents.shape[1]), width):
        yield slice(start, start + width)


def rescaled(latents: Tensor, lowest: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return ã = (latents - lowest) / scale as a new tensor, in the dtype of ``lowest``."""
    a = latents.to(lowest.dtype).sub(lowest)
    return a if scale is None else a.div_(scale)


def weighted_embeddings(a: Tensor, h: Tensor) -> Tensor:
    """Return w = Σ a h over samples, (M, d), of activations (N, M) and embeddings (N, d)."""
    # An accelerator sums by tiles, and many small products would only cost launches.
    if not looks_are_free(a) or len(a) <= SUMMED_AT_ONCE:
        return a.T @ h
    w = a.new_zeros(a.shape[1], h.shape[1])
    for rows, embeddings in zip(a.split(SUMMED_AT_ONCE), h.split(SUMMED_AT_ONCE), strict=True):
        w += rows.T @ embeddings  # not addmm_, which goes on from w inside the product
    return w

"""What MonoScore would be by chance: its distribution over shuffles of a latent's activations.

Shuffle a latent's activations over the samples, so that they no longer know what is in a sample.
The score's mean over all shuffles is the mean cosine of all pairs of different samples, the same
for every latent:

    chance = A_s / n(n-1),                      A_s = ||H||² - Q,  H = Σ h,  Q = Σ ||h||²

Its variance has a closed form too (Mantel 1967). With c = Σ ã³ and f = Σ ã⁴ of a latent, and
C = Σ h hᵀ of the samples:

    A_w = u² - v      B_w = v² - f           D_w = u²v - 2uc + f
                      B_s = ||C||² - Q       D_s = HᵀCH - 2||H||² + Q

    E[MS²] = (2 B_w B_s / n(n-1)
              + 4 (D_w - B_w)(D_s - B_s) / n(n-1)(n-2)
              + (A_w² + 2B_w - 4D_w)(A_s² + 2B_s - 4D_s) / n(n-1)(n-2)(n-3)) / A_w²

The distribution is skewed: w = Σ ã h of shuffled activations is nearly normal, so ||w||² is a
weighted sum of squares. With the mean μ and the covariance Σ of h, and s = v - u²/n, its third
central moment is nearly 8 s³ tr Σ³ + 24 s² u² μᵀΣ²μ. A Pearson III distribution with these three
moments gives the p-values. A normal one would not do: where the samples form clusters, it calls up
to three of a hundred random latents significant at one percent.

If samples come in groups whose pairs are left out (:mod:`monoloss_plugin.groups`), chance is the
mean cosine of all pairs of samples of different groups. That is the mean over shuffles that move
the activations of a group as a whole to another of the same size, and then shuffle them within it.
There are no z-scores and p-values then: the samples of a group are not independent.

Source: derived for this package; the tests compare it with shuffles. The approach is that of
Josse, Pagès & Husson 2008 for the RV coefficient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from monoloss_plugin._checks import may_hold_any
from monoloss_plugin.kernels.support import Support
from monoloss_plugin.sums import (
    SampleSums,
    Sums,
    UnitEmbeddings,
    column_blocks,
    rescaled,
)

WIDEST = 4096
"""C is kept for embeddings of at most this width (134 MB), or there are no z-scores."""

CARRIED_BY = 4.0
"""A latent is tested if u²/v, the number of samples that carry its activation, is at least this.

With fewer the approximation fails; random latents with more are significant at one percent in 0.1
to 1.1 % of cases (measured on sparse, dense and heavy-tailed activations, and clustered samples).
"""

_ROWS_AT_ONCE = 2048
"""At most this many products are added up in float32, for C alone: the score needs less error."""

_COLUMNS_AT_ONCE = 256
"""C is symmetric: block by block, half of it need not be computed."""

_NO_SPREAD = 1e-14
"""A variance of the score below this is rounding: a score is right to 1e-7 at best."""


class ChanceSums(NamedTuple):
    """What chance needs beside the sums of the score, in float64. Updates change it in place."""

    c: Tensor
    """(M,): Σ ã³."""
    f: Tensor
    """(M,): Σ ã⁴."""
    gram: Tensor
    """(d, d): C = Σ h hᵀ, on and below the diagonal; (0, 0) if d exceeds :data:`WIDEST`."""

    @classmethod
    def zeros(cls, num_latents: int, width: int, like: Tensor) -> ChanceSums:
        """Return the sums over no samples, with the dtype and device of ``like``."""
        kept = width if width <= WIDEST else 0
        return cls(
            like.new_zeros(num_latents), like.new_zeros(num_latents), like.new_zeros(kept, kept)
        )

    def add_(self, latents: Tensor | Support, unit: UnitEmbeddings, lowest: Tensor) -> None:
        """Add samples: latents (N, M), their embeddings, and the minima (M,) in float64."""
        for h in unit.h.split(_ROWS_AT_ONCE):
            for start in range(0, len(self.gram), _COLUMNS_AT_ONCE):
                columns = slice(start, start + _COLUMNS_AT_ONCE)
                self.gram[start:, columns] += h[:, start:].T @ h[:, columns]
        if isinstance(latents, Support):
            self._add_sparse_(latents, unit.sums, lowest)
            return
        for block in column_blocks(latents):
            a = rescaled(latents[:, block], lowest[block])
            squares = a.square()
            self.c[block] += a.mul_(squares).sum(0)
            self.f[block] += squares.square_().sum(0)

    def _add_sparse_(self, support: Support, samples: SampleSums, lowest: Tensor) -> None:
        complete = support.complete()
        base = torch.where(complete, lowest, 0.0)
        a = rescaled(support.values, support.of_latents(base))
        squares = a.square()
        cubes, fourths = support.sums(a * squares), support.sums(squares.square())
        part = ChanceSums(cubes, fourths, self.gram)
        drop = torch.where(complete, 0.0, -lowest)
        if may_hold_any(drop):
            part.raise_by_(drop, support.sums(a), support.sums(squares), samples.n)
        self.c.add_(part.c)
        self.f.add_(part.f)

    def raise_by_(self, drop: Tensor, u: Tensor, v: Tensor, n: Tensor) -> None:
        """Replace every ã by ã + drop, in place.

        Args:
            drop: (M,), at least 0.
            u: (M,), Σ ã before that.
            v: (M,), Σ ã² before that.
            n: (), the number of samples.
        """
        self.f.add_(drop * (4 * self.c + drop * (6 * v + drop * (4 * u + drop * n))))
        self.c.add_(drop * (3 * v + drop * (3 * u + drop * n)))


class Chance(NamedTuple):
    """The distribution of MonoScore over shuffles."""

    mean: Tensor
    """(), of every latent."""
    z_scores: Tensor
    """(M,): how many standard deviations a latent's score is above the mean; 0 if it has none."""
    p_values: Tensor
    """(M,): the share of shuffles with at least this score; NaN for a latent that is not tested."""


def chance_of(
    scores: Tensor, defined: Tensor, samples: SampleSums, sums: Sums, more: ChanceSums
) -> Chance:
    """Return what the scores (M,) of defined latents (M,) would be by chance, from all sums."""
    n, sum_h, q, within = samples
    u, v = sums.u, sums.v
    gram = more.gram.tril() + more.gram.tril(-1).T
    all_pairs, pairs = sum_h @ sum_h - q, n.square() - within
    mean = all_pairs / pairs.clamp(min=1)
    nothing = torch.zeros_like(scores)
    if not len(gram) or float(n) < 4 or bool(within > n):
        return Chance(mean, nothing, torch.full_like(scores, torch.nan))

    # Of the samples: the mean product of two similarities that share both samples, one, or none.
    both = gram.square().sum() - q
    one = sum_h @ gram @ sum_h - 2 * sum_h @ sum_h + q
    triples, quadruples = pairs * (n - 2), pairs * (n - 2) * (n - 3)
    same_pair, shared = both / pairs, (one - both) / triples
    # E[none] - mean², without the difference of two numbers that are nearly equal.
    none_above = mean.square() * (4 * n - 6) / ((n - 2) * (n - 3))
    none_above = none_above + (2 * both - 4 * one) / quadruples
    apart = mean.square() + none_above

    weight = sums.weight_of_pairs.masked_fill(~defined, 1.0)
    of_both = (v.square() - more.f) / weight.square()
    of_one = (u.square() * v - 2 * u * more.c + more.f) / weight.square()
    variance = 2 * of_both * (same_pair - 2 * shared + apart)
    variance = variance + 4 * of_one * (shared - apart) + none_above
    varies = defined & (variance > _NO_SPREAD)
    spread = variance.masked_fill(~varies, 1.0).sqrt()
    z = ((scores - mean) / spread).masked_fill(~varies, 0.0)

    centre = sum_h / n
    covariance = gram / n - torch.outer(centre, centre)
    projected = covariance @ centre
    varied = (v - u.square() / n).clamp(min=0)
    third = 8 * varied.pow(3) * (covariance @ covariance * covariance).sum()
    third = third + 24 * (varied * u).square() * (projected @ projected)
    p = _tail(z, third / (weight * spread).pow(3))
    tested = varies & (u.square() >= CARRIED_BY * v)
    return Chance(mean, z, p.masked_fill(~tested, torch.nan))


def _tail(z: Tensor, skewness: Tensor) -> Tensor:
    """Return P(Z >= z) of a Pearson III variable with mean 0, variance 1 and a skewness >= 0."""
    skewed = skewness > 1e-3
    skewness = skewness.masked_fill(~skewed, 1.0)
    shape = 4 / skewness.square()
    gamma = torch.special.gammaincc(shape, (shape + 2 * z / skewness).clamp(min=0))
    return torch.where(skewed, gamma, torch.special.erfc(z / 2**0.5) / 2)


def significant(p_values: Tensor, alpha: float) -> Tensor:
    """Return which of the p-values (M,) are significant; NaN stands for "not tested".

    Among these, at most a share ``alpha`` is expected to be there by chance (Benjamini & Hochberg
    1995).
    """
    order = p_values.argsort()  # NaN comes last
    tested = (~p_values.isnan()).sum()
    rank = torch.arange(1, len(p_values) + 1, device=p_values.device)
    passes = p_values[order] <= alpha * rank / tested
    # Up to the last that passes, all are significant.
    kept = passes.flip(0).cummax(0).values.flip(0)
    return torch.zeros_like(passes).index_put_((order,), kept)

"""The sufficient statistics of MonoScore: update in one pass, merge in any order, score.

With ã = a - min a, unit embeddings h and q = ||h||² (1, or 0 for a zero embedding), a latent's
score needs only

    u = Σ ã,   v = Σ ã²,   t = Σ ã² q,   w = Σ ã h,
    MS = (||w||² - t) / (u² - v).

The minimum is not known until the data ends. When it falls by δ, every ã grows by δ, and the sums
follow from n, H = Σ h, Q = Σ q and p = Σ ã q:

    u += n δ,   v += 2 δ u + n δ²,   t += 2 δ p + δ² Q,   p += δ Q,   w += δ H.

What is added to u, v, t and p is non-negative, so nothing cancels in them, and one pass over the
data is enough where the paper's evaluation (Nasiri-Sarvi et al. 2026, Algorithm 2) first
takes a pass for the minimum and maximum. The maximum only rescales ã, which leaves MS as it is; it
is kept to tell which latents are defined.
"""

from __future__ import annotations

import torch
from torch import Tensor

from monoloss_plugin._checks import may_hold_any, require_finite
from monoloss_plugin._chunks import parts_of
from monoloss_plugin.embeddings import unit_rows
from monoloss_plugin.kernels.products import weighted_embeddings
from monoloss_plugin.kernels.statistics import CONSTANT_BELOW, Raised
from monoloss_plugin.kernels.support import Support

DEFINED_ABOVE = 1e-12
"""A latent has a score where u² - v, of activations rescaled to [0, 1], exceeds this.

Below it the difference is rounding noise of float64 sums.
"""


_DOMINANT = 0.9
"""Share of a latent's activation in one chunk beyond which one sample is added in float64.

Products are taken in the data's dtype, chunk by chunk, and added up in float64. A float32 product
errs by 1e-7 of Σ ã; where one sample holds nearly all of that, u² - v and ||w||² - t cancel and
the error would show. With that sample apart, it is 1e-7 of the rest, and so is the denominator:
scores are good to about 1e-6 whatever the activations.
"""
_LARGE = 1e12
"""Activations beyond this, or below its inverse, have float32 squares out of range."""
_HUGE = 1e30
"""Activations beyond this, or below its inverse, have float32 sums out of range."""
_ENTRIES_AT_ONCE = 4096
_ROWS_IN_CACHE = 512


class Moments:
    """The statistics of M latents over the samples seen so far, in float64.

    Args:
        num_latents: M.
        width: d, the embeddings' width.
        device: where the statistics live.
    """

    @torch.inference_mode(False)  # or the sums could not be updated outside it
    def __init__(self, num_latents: int, width: int, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.n = zeros()
        self.sum_q = zeros()  # Q
        self.sum_h = zeros(width)  # H, (d,)
        self.lowest = torch.full_like(zeros(num_latents), torch.inf)  # (M,)
        self.highest = torch.full_like(zeros(num_latents), -torch.inf)  # (M,)
        self.u = zeros(num_latents)  # (M,)
        self.v = zeros(num_latents)  # (M,)
        self.t = zeros(num_latents)  # (M,)
        self.p = zeros(num_latents)  # (M,)
        self.w = zeros(num_latents, width)  # (M, d)

    SUMS = ("n", "sum_q", "sum_h", "u", "v", "t", "p", "w")
    """The statistics that add up once two parts share their lowest values."""

    NAMES = (*SUMS, "lowest", "highest")

    @property
    def num_latents(self) -> int:
        """M."""
        return self.w.shape[0]

    @property
    def width(self) -> int:
        """d, of the embeddings."""
        return self.w.shape[1]

    @torch.inference_mode(False)
    @torch.no_grad()
    def update_(self, latents: Tensor | Support, embeddings: Tensor) -> None:
        """Take up a batch: latents (N, M) and embeddings (N, d), both finite.

        Raises:
            ValueError: NaN or infinite values; the statistics are then unchanged.
        """
        parts = list(parts_of(latents))
        if not parts:
            return
        ranges = [_range_of(part) for _, part in parts]
        batch_lowest = torch.stack([lowest for lowest, _ in ranges]).amin(0)
        batch_highest = torch.stack([highest for _, highest in ranges]).amax(0)
        require_finite(batch_lowest, "latents")
        require_finite(batch_highest, "latents")
        require_finite(embeddings, "embeddings")

        self.lower_to_(torch.minimum(self.lowest, batch_lowest))
        self.highest = torch.maximum(self.highest, batch_highest)
        for rows, part in parts:
            e = embeddings[rows]
            values = part.values if isinstance(part, Support) else part
            h, _ = unit_rows(e, _product_dtype(values, e))
            sum_h, q = _exact_sum_and_squares(h)
            self.n += len(e)
            self.sum_q += q.sum()
            self.sum_h += sum_h
            if isinstance(part, Support):
                self._add_support(part, h, q, sum_h)
            else:
                self._add_dense(part, h, q)

    def _add_support(self, part: Support, h: Tensor, q: Tensor, sum_h: Tensor) -> None:
        """Add sparse latents: entries from zero, or from the minimum where none is missing."""
        columns, complete = part.columns, part.complete()
        a = part.values.double()
        if may_hold_any(complete):
            a = a - torch.where(complete, self.lowest, 0.0)[columns]
        squares, entry_q = a.square(), q[part.rows]
        u, v = part.sums(a), part.sums(squares)
        t, p = part.sums(squares * entry_q), part.sums(a * entry_q)

        extreme = (self.highest > _HUGE) | (self.lowest < -_HUGE)
        extreme |= (self.highest > 0) & (self.highest < 1 / _HUGE)
        if bool(extreme.any()):  # float32 sums would leave its range
            h = h.double()
        weights = a.to(h.dtype)
        # One sample alone has a² near u²; only then are the entries themselves looked through.
        if bool((v > _DOMINANT**2 * u.square()).any()):
            dominant = a > _DOMINANT * u[columns]
            weights = weights.masked_fill(dominant, 0.0)
            for entries in dominant.nonzero().squeeze(1).split(_ENTRIES_AT_ONCE):
                added = a[entries].unsqueeze(1) * h[part.rows[entries]]  # in float64
                self.w.index_add_(0, columns[entries], added)
        part.add_weighted_sums_(self.w, weights, h)

        # Where activations are negative, the zeros that are not listed lie above the minimum.
        drop = torch.where(complete, 0.0, -self.lowest)
        if may_hold_any(drop):
            u, v, t, p = Raised.by(drop, part.num_rows, q.sum(), u=u, v=v, t=t, p=p)
            self.w.addr_(drop, sum_h)
        for name, sums in zip("uvtp", (u, v, t, p), strict=True):
            getattr(self, name).add_(sums)

    def _add_dense(self, part: Tensor, h: Tensor, q: Tensor) -> None:
        """Add dense latents by one matrix product."""
        lowest = self.lowest.to(h.dtype)
        if bool((lowest != self.lowest).any()):  # set by a batch of a wider dtype
            lowest, h = self.lowest, h.double()
        a = part.to(h.dtype, copy=True).sub_(lowest)
        highest = a.amax(0)
        u, v, t, p, w = _sums(a, h, q.to(h.dtype))
        strange = (highest > _DOMINANT * u) | (highest > _LARGE) | (highest < 1 / _LARGE)
        exact = (strange & (highest > 0)).nonzero().squeeze(1)
        for name, sums in zip("uvtpw", (u, v, t, p, w), strict=True):
            sums[exact] = 0
            getattr(self, name).add_(sums)
        if len(exact):
            a = part[:, exact].double().sub_(self.lowest[exact])
            for name, sums in zip("uvtpw", _sums(a, h.double(), q), strict=True):
                getattr(self, name).index_add_(0, exact, sums)

    @torch.no_grad()
    def merge_(self, other: Moments) -> None:
        """Take up what another part of the data gave; ``other`` stays as it is.

        Raises:
            ValueError: other numbers of latents or another embedding width.
        """
        if (other.num_latents, other.width) != (self.num_latents, self.width):
            raise ValueError(
                f"other: expected statistics of {self.num_latents} latents and embeddings of "
                f"width {self.width}, got {other.num_latents} and {other.width}"
            )
        part = other.copy_to(self.w.device)
        lowest = torch.minimum(self.lowest, part.lowest)
        self.lower_to_(lowest)
        part.lower_to_(lowest)
        self.highest = torch.maximum(self.highest, part.highest)
        for name in self.SUMS:
            getattr(self, name).add_(getattr(part, name))

    @torch.no_grad()
    def lower_to_(self, lowest: Tensor) -> None:
        """Rewrite the sums for a minimum that is ``lowest`` (M,), at most the one held."""
        drop = (self.lowest - lowest).nan_to_num_(nan=0.0, posinf=0.0)  # inf: no data so far
        self.lowest = lowest
        # On a CPU the look is free and spares the pass over w that most batches do not need;
        # on an accelerator the look would cost more than the pass.
        if not may_hold_any(drop):
            return
        self.u, self.v, self.t, self.p = Raised.by(
            drop, self.n, self.sum_q, u=self.u, v=self.v, t=self.t, p=self.p
        )
        self.w.addr_(drop, self.sum_h)

    @torch.no_grad()
    def score(self) -> tuple[Tensor, Tensor]:
        """Return MonoScore (M,) in float64, 0 where undefined, and where it is defined (M,)."""
        span = self.highest - self.lowest
        denominator = self.u.square() - self.v
        defined = (span > CONSTANT_BELOW) & (denominator > DEFINED_ABOVE * span.square())
        numerator = torch.einsum("md,md->m", self.w, self.w) - self.t
        scores = numerator / denominator.masked_fill(~defined, 1.0)
        return scores.masked_fill(~defined, 0.0), defined

    def copy_to(self, device: torch.device | str) -> Moments:
        """Return an independent copy on ``device``."""
        copy = Moments(0, 0, device)
        for name in self.NAMES:
            setattr(copy, name, getattr(self, name).detach().clone().to(device))
        return copy

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the statistics, by name."""
        return {name: getattr(self, name).detach().clone() for name in self.NAMES}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> Moments:
        """Rebuild from :meth:`state_dict`.

        Raises:
            ValueError: a statistic is missing.
        """
        missing = [name for name in cls.NAMES if name not in state]
        if missing:
            raise ValueError(f"state: expected the entries {list(cls.NAMES)}, missing {missing}")
        moments = cls(0, 0)
        for name in cls.NAMES:
            setattr(moments, name, state[name].detach().clone())
        return moments


def _exact_sum_and_squares(h: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ h (d,) and ||h||² (N,) in float64, of h (N, d) as it was rounded.

    So that ||w||² - t of a single sample is zero, and not the 1e-7 by which h misses unit length.
    """
    sum_h = torch.zeros(h.shape[1], dtype=torch.float64, device=h.device)
    squares = []
    for rows in h.split(_ROWS_IN_CACHE):
        exact = rows.double()
        sum_h += exact.sum(0)
        squares.append(exact.square().sum(1))
    return sum_h, torch.cat(squares)


def _product_dtype(latents: Tensor, embeddings: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(latents.dtype, embeddings.dtype), torch.float32)


def _range_of(part: Tensor | Support) -> tuple[Tensor, Tensor]:
    if isinstance(part, Support):
        lowest, highest = part.extremes()
    else:
        lowest, highest = part.amin(0), part.amax(0)
    return lowest.double(), highest.double()


def _sums(a: Tensor, h: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return u, v, t, p (M,) and w (M, d) of a = ã (N, M), which it uses up."""
    u, p, w = a.sum(0), q @ a, weighted_embeddings(a, h)
    squares = a.square_()
    return u, squares.sum(0), q @ squares, p, w

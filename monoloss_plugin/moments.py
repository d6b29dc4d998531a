"""The sufficient statistics of MonoScore: update in one pass, merge in any order, score.

With ã = a - min a, unit embeddings h and q = ||h||² (1, or 0 for a zero embedding), a latent's
score needs only

    u = Σ ã,   v = Σ ã²,   t = Σ ã² q,   w = Σ ã h,
    MS = (||w||² - t) / (u² - v).

The minimum is not known until the data ends. When it falls by δ, every ã grows by δ, and the sums
follow from n, H = Σ h, Q = Σ q and p = Σ ã q:

    u += n δ,   v += 2 δ u + n δ²,   t += 2 δ p + δ² Q,   p += δ Q,   w += δ H.

All terms are non-negative multiples of what is already there, so nothing cancels, and one pass
over the data is enough where the paper's evaluation (Nasiri-Sarvi et al. 2026, Algorithm 2) first
takes a pass for the minimum and maximum. The maximum only rescales ã, which leaves MS as it is; it
is kept to tell which latents are defined.
"""

from __future__ import annotations

import torch
from torch import Tensor

from monoloss_plugin._checks import looks_are_free, require_finite
from monoloss_plugin._chunks import row_chunks
from monoloss_plugin.embeddings import unit_rows

DEFINED_ABOVE = 1e-12
"""A latent has a score where u² - v, of activations rescaled to [0, 1], exceeds this.

Below it the difference is rounding noise of float64 sums.
"""


class Moments:
    """The statistics of M latents over the samples seen so far, in float64.

    Args:
        num_latents: M.
        width: d, the embeddings' width.
        device: where the statistics live.
    """

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
        return self.w.shape[0]

    @property
    def width(self) -> int:
        return self.w.shape[1]

    @torch.no_grad()
    def update_(self, latents: Tensor, embeddings: Tensor) -> None:
        """Take up a batch: latents (N, M) and embeddings (N, d), both finite.

        Raises:
            ValueError: NaN or infinite values; the statistics are then unchanged.
        """
        if len(latents) == 0:
            return
        batch_lowest, batch_highest = latents.amin(0), latents.amax(0)
        require_finite(batch_lowest, "latents")
        require_finite(batch_highest, "latents")
        require_finite(embeddings.abs().amax(dim=1), "embeddings")

        self.lower_to_(torch.minimum(self.lowest, batch_lowest.double()))
        self.highest = torch.maximum(self.highest, batch_highest.double())
        for chunk in row_chunks(len(latents), self.num_latents):
            a = latents[chunk].to(torch.float64, copy=True).sub_(self.lowest)
            h, q = unit_rows(embeddings[chunk], torch.float64)
            self.n += len(a)
            self.sum_q += q.sum()
            self.sum_h += h.sum(0)
            self.u += a.sum(0)
            self.p += q @ a
            self.w.addmm_(a.T, h)
            squares = a.square_()
            self.v += squares.sum(0)
            self.t += q @ squares

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
        if looks_are_free(drop) and not bool(drop.any()):
            return
        self.v += drop * (2 * self.u + drop * self.n)
        self.u += drop * self.n
        self.t += drop * (2 * self.p + drop * self.sum_q)
        self.p += drop * self.sum_q
        self.w.addr_(drop, self.sum_h)

    @torch.no_grad()
    def score(self) -> tuple[Tensor, Tensor]:
        """Return MonoScore (M,) in float64, 0 where undefined, and where it is defined (M,)."""
        span = self.highest - self.lowest
        denominator = self.u.square() - self.v
        defined = (span > 0) & (denominator > DEFINED_ABOVE * span.square())
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
        """Return the statistics by name."""
        return {name: getattr(self, name) for name in self.NAMES}

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

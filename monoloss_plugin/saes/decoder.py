"""The decoder that reconstructs best from given latents, in closed form.

    W_dec = (G + λI)⁻¹ K,  b_dec = mean x - (mean a) W_dec

G (M, M) is the covariance sum Σ (a - mean a)(a - mean a)ᵀ of the latents, and K (M, d) is the
same of latents and targets. So one pass over batches is enough.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from monoloss_plugin._checks import paired_rows, require_finite, require_number
from monoloss_plugin.kernels.support import Support, is_sparse, support_of

RIDGE = 1e-2
"""The default penalty, in units of the mean of G's diagonal.

For the five baselines of 256 latents on the bundled digits, held-out R² is at most 0.005 below that
of the best of 1e-6, 1e-5, ..., 1. With 1e-6 it is up to 0.07 below: k-means has many similar
latents.
"""

_LATENTS_AT_ONCE = 64
"""So many rows of G for 8,192 latents are 4 MiB. Blocks that leave the cache take twice as long."""


class Decoder(NamedTuple):
    """A linear map from latents to features: x̂ = a W_dec + b_dec."""

    W_dec: Tensor
    """(M, d), float64."""
    b_dec: Tensor
    """(d,), float64."""


@torch.no_grad()
def ridge_decoder(batches: Iterable[tuple[Tensor, Tensor]], *, ridge: float = RIDGE) -> Decoder:
    """Fit a decoder to latents and targets by ridge regression with an intercept.

    It minimises Σ ||x - a W - b||² + λ ||W||² over all samples, with λ = ridge * mean(diag G). The
    intercept is not penalised. A latent that never fires gets a row of zeros.

    Sums are float64. G takes 8 M² bytes, 0.5 GB for 8,192 latents, and is solved in place.
    With k active latents per sample, sparse batches cost k² additions per sample for G.

    Args:
        batches: pairs of latents (B, M), dense or sparse COO, and targets (B, d); floating, finite.
        ridge: the penalty, in units of the mean of G's diagonal; above 0.

    Returns:
        The decoder, on the device of the batches.

    Raises:
        TypeError: a batch is not floating, or ``ridge`` is not a number.
        ValueError: shapes that do not match, no samples, NaN or infinite values, or ``ridge`` is
            not above 0, or too small for latents that depend on each other.

    Examples:
        >>> latents = torch.tensor([[0.0], [1.0], [2.0]])
        >>> fitted = ridge_decoder([(latents, 3 * latents + 5)], ridge=1e-9)
        >>> round(fitted.W_dec.item(), 3), round(fitted.b_dec.item(), 3)
        (3.0, 5.0)
    """
    require_ridge(ridge)
    sums: _Sums | None = None
    for latents, targets in batches:
        a, x = paired_rows(latents, targets, keep_sparse=True)
        listed = support_of(a) if is_sparse(a) else a
        require_finite(listed.values if isinstance(listed, Support) else listed, "latents")
        require_finite(x, "targets")
        sums = sums or _Sums.zeros(a.shape[1], x)
        if (a.shape[1], x.shape[1]) != sums.cross.shape:
            raise ValueError(
                f"batches: expected widths {tuple(sums.cross.shape)} of latents and targets as in "
                f"earlier batches, got {(a.shape[1], x.shape[1])}"
            )
        sums = sums.plus(listed, x)
    if sums is None or not sums.n:
        raise ValueError("batches: expected at least one sample, got none")
    return _solve(sums, ridge)


def require_ridge(ridge: float) -> None:
    """Raise an error for a penalty that is not a finite number above 0."""
    require_number(ridge, "ridge")
    if not 0 < ridge < float("inf"):
        raise ValueError(f"ridge: expected a finite number above 0, got {ridge}")


class _Sums(NamedTuple):
    """Float64 sums over n samples, of targets minus a shift that keeps large offsets exact."""

    n: int
    shift: Tensor  # (d,)
    latents: Tensor  # (M,)
    targets: Tensor  # (d,)
    gram: Tensor  # (M, M), changed in place: there is no memory for a second one
    cross: Tensor  # (M, d)

    @classmethod
    def zeros(cls, num_latents: int, targets: Tensor) -> _Sums:
        zeros = targets.new_zeros(num_latents, num_latents, dtype=torch.float64)
        shift = targets.double().mean(0) if len(targets) else targets.new_zeros(targets.shape[1])
        none = torch.zeros_like(shift)
        cross = zeros.new_zeros(num_latents, targets.shape[1])
        return cls(0, shift, zeros[0].clone(), none, zeros, cross)

    def plus(self, a: Tensor | Support, x: Tensor) -> _Sums:
        x = x.double() - self.shift
        if isinstance(a, Support):
            a = replace(a, values=a.values.double())
            self._add_listed(a, x)
            added = a.sums(a.values)
        else:
            a = a.double()
            self.gram.addmm_(a.T, a)
            self.cross.addmm_(a.T, x)
            added = a.sum(0)
        n, latents, targets = self.n + len(x), self.latents + added, self.targets + x.sum(0)
        return self._replace(n=n, latents=latents, targets=targets)

    def _add_listed(self, a: Support, x: Tensor) -> None:
        # Only MKL multiplies two sparse matrices into a dense one.
        sparse = a.device.type == "cpu" and torch.backends.mkl.is_available()
        samples = a.by_sample() if sparse else a.by_sample().to_dense()
        for latents, part in a.by_latent(_LATENTS_AT_ONCE):
            self.gram[latents].addmm_(part, samples)
            self.cross[latents].addmm_(part, x)


def _solve(sums: _Sums, ridge: float) -> Decoder:
    mean_a, mean_x = sums.latents / sums.n, sums.targets / sums.n
    gram = sums.gram.addr_(sums.latents, mean_a, alpha=-1)
    cross = sums.cross.addr_(sums.latents, mean_x, alpha=-1)
    scale = gram.diagonal().mean()
    gram.diagonal().add_(torch.where(scale > 0, ridge * scale, 1.0))  # 1 if no latent ever fires
    # In place, in the column order that LAPACK wants: there is no memory for a second matrix.
    factor, failed = gram.T, torch.empty((), dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    if failed:
        raise ValueError(f"ridge: {ridge} is too small for these latents; try {RIDGE}")
    half = torch.linalg.solve_triangular(factor, cross, upper=False)
    weights = torch.linalg.solve_triangular(factor.T, half, upper=True)
    return Decoder(weights, mean_x + sums.shift - mean_a @ weights)

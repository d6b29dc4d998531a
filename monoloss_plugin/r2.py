"""R²: how much of the features' variance a reconstruction explains."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from monoloss_plugin._checks import as_rows, require_finite
from monoloss_plugin._chunks import row_chunks
from monoloss_plugin._places import kind_of

_IN_CACHE = 1 << 18
"""This many elements in float64 are 2 MiB."""


class Deviations(NamedTuple):
    """Sums over n samples of targets x and reconstructions x̂, in float64."""

    n: int
    mean: Tensor
    """(d,): mean x."""
    deviation: Tensor
    """(d,): Σ (x - mean x)²."""
    error: Tensor
    """(d,): Σ (x - x̂)²."""


def deviations_of(x: Tensor, x_hat: Tensor) -> Deviations:
    """Return the sums over targets (N, d) and reconstructions (N, d)."""
    exact = x.double()
    mean = exact.mean(0)
    error = (exact - x_hat).square_().sum(0)
    return Deviations(len(x), mean, (exact - mean).square_().sum(0), error)


def merged(one: Deviations, other: Deviations) -> Deviations:
    """Return the sums over two parts of the data, without loss of accuracy (Chan et al. 1983)."""
    n = one.n + other.n
    step = other.mean - one.mean
    return Deviations(
        n,
        mean=one.mean + step * (other.n / n),
        deviation=one.deviation + other.deviation + step.square() * (one.n * other.n / n),
        error=one.error + other.error,
    )


def r2_from_deviations(sums: Deviations) -> float:
    """Return the mean of 1 - Σ (x - x̂)² / Σ (x - mean x)² over the dimensions that vary."""
    # A constant dimension leaves rounding noise of the order (1e-16 x)². One float32 step in a
    # million samples is still 1e-21 of Σ x².
    scale = sums.deviation + sums.n * sums.mean.square()
    varies = sums.deviation > 1e-28 * scale
    return float((1 - sums.error[varies] / sums.deviation[varies]).mean())


class R2:
    """Coefficient of determination of reconstructions, averaged over feature dimensions.

    R² = mean_j (1 - Σ_n (x_nj - x̂_nj)² / Σ_n (x_nj - mean x_j)²) over the dimensions j of non-zero
    variance. Long streams and large offsets cost no accuracy.

    Examples:
        >>> r2 = R2()
        >>> r2.update(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [1.0]]))
        >>> r2.compute()
        0.5

    Source: Nasiri-Sarvi et al. 2026, appendix B.
    """

    def __init__(self) -> None:
        self._sums: Deviations | None = None

    @property
    def n(self) -> int:
        """Number of samples seen."""
        return self._sums.n if self._sums else 0

    @torch.no_grad()
    def update(self, targets: Tensor, reconstructions: Tensor) -> None:
        """Add a batch: targets x and reconstructions x̂, both (B, d), floating and finite.

        Raises:
            TypeError: an argument is not a floating-point tensor.
            ValueError: shapes that do not match, or NaN or infinite values.
        """
        x = as_rows(targets, "targets")
        x_hat = as_rows(reconstructions, "reconstructions")
        width = len(self._sums.mean) if self._sums else x.shape[1]
        if x.shape != x_hat.shape or x.shape[1] != width:
            raise ValueError(
                f"targets, reconstructions: expected both of shape {(len(x), width)}, "
                f"got {tuple(x.shape)} and {tuple(x_hat.shape)}"
            )
        for name, given in (("targets", x), ("reconstructions", x_hat)):
            require_finite(given, name)
        for rows in row_chunks(x.shape[0], x.shape[1], _IN_CACHE):
            self._add(deviations_of(x[rows], x_hat[rows]))

    def merge(self, other: R2) -> None:
        """Add what another metric has seen; ``other`` does not change."""
        if not isinstance(other, R2):
            raise TypeError(f"other: expected an R2, got {kind_of(other)}")
        if other._sums:
            self._add(other._sums)

    def _add(self, sums: Deviations) -> None:
        self._sums = merged(self._sums, sums) if self._sums else sums

    def compute(self) -> float:
        """Return R²; NaN if no dimension varies.

        Raises:
            ValueError: no data yet.
        """
        if self._sums is None:
            raise ValueError("R2.compute: no data yet; call update first")
        return r2_from_deviations(self._sums)

"""Streaming metrics: feed batches, merge shards, reduce over ranks, compute.

Plain classes that hold state; the mathematics is in :mod:`monoloss_plugin.moments` and
:mod:`monoloss_plugin.purity`. Every metric can be saved with ``torch.save(metric.state_dict())``
and loaded with ``weights_only=True``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from monoloss_plugin._checks import (
    as_rows,
    as_tensor,
    paired_rows,
    require_at_least,
    require_finite,
)
from monoloss_plugin._chunks import row_chunks
from monoloss_plugin._ranks import gather_numbers
from monoloss_plugin.kernels.support import Support
from monoloss_plugin.moments import Moments
from monoloss_plugin.purity import ClassSums, Purity


@dataclass(frozen=True)
class MonoScoreResult:
    """MonoScore of M latents over a dataset."""

    scores: Tensor
    """(M,) float64, in [-1, 1]; 0 where undefined."""
    defined: Tensor
    """(M,) bool: at least one pair of samples co-activates the latent, by more than rounding."""
    num_samples: int
    """Number of samples seen."""

    @property
    def mean(self) -> float:
        """Mean over all latents, undefined ones counting 0 (Nasiri-Sarvi et al. 2026)."""
        return float(self.scores.mean())

    @property
    def mean_defined(self) -> float:
        """Mean over the defined latents alone (Pach et al. 2025); NaN where there are none."""
        return float(self.scores[self.defined].mean())

    @property
    def num_defined(self) -> int:
        """Number of latents that have a score."""
        return int(self.defined.sum())

    def curve(self) -> Tensor:
        """Return the scores in decreasing order (M,): the paper's MonoScore curve."""
        return self.scores.sort(descending=True).values


class MonoScore:
    """MonoScore of every latent of an SAE, in one pass over any amount of data.

    Memory is one (M, d) float64 array and does not grow with the number of samples. Batches,
    shards and ranks may come in any order.

    Examples:
        >>> metric = MonoScore()
        >>> metric.update(torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        >>> metric.update(torch.tensor([[0.0]]), torch.tensor([[0.0, 1.0]]))
        >>> metric.compute().mean
        1.0

    Source: Nasiri-Sarvi et al. 2026, eq. 2 and Algorithm 2; Pach et al. 2025.
    """

    def __init__(self) -> None:
        self.moments: Moments | None = None
        self._counted_elsewhere = False

    def update(self, latents: Tensor | Support, embeddings: Tensor) -> None:
        """Take up a batch.

        Args:
            latents: (B, M), floating, finite; dense, sparse COO, or the
                :class:`~monoloss_plugin.kernels.support.Support` that several metrics share.
            embeddings: (B, d), floating, finite.

        Raises:
            TypeError: an argument is not a floating-point tensor.
            ValueError: shapes that do not match each other or earlier batches, or NaN or infinite
                values; the metric is then unchanged.
        """
        a: Tensor | Support
        if isinstance(latents, Support):
            a, e = latents, as_rows(embeddings, "embeddings")
            if len(e) != a.num_rows:
                raise ValueError(
                    f"embeddings: expected {a.num_rows} rows to match latents, got {len(e)}"
                )
        else:
            a, e = paired_rows(latents, embeddings, keep_sparse=True)
        held = self._own()
        moments = held or Moments(a.shape[1], e.shape[1], a.device)
        for name, got, wanted in (
            ("latents", a.shape[1], moments.num_latents),
            ("embeddings", e.shape[1], moments.width),
        ):
            if got != wanted:
                raise ValueError(
                    f"{name}: expected width {wanted} as in earlier batches, got {got}"
                )
        moments.update_(a, e)
        self.moments, self._counted_elsewhere = moments, False

    def merge(self, other: MonoScore) -> None:
        """Take up what another metric has seen; ``other`` stays as it is.

        Raises:
            ValueError: the two saw latents or embeddings of different widths.
        """
        _require_metric(other, MonoScore)
        if other.moments is None:
            return
        held = self._own()
        if held is None:
            held = other.moments.copy_to(other.moments.w.device)
        else:
            held.merge_(other.moments)
        self.moments, self._counted_elsewhere = held, False

    def _own(self) -> Moments | None:
        """Return what this rank counts: not its copy of what all ranks hold."""
        return None if self._counted_elsewhere else self.moments

    def all_reduce_(self, group: dist.ProcessGroup | None = None) -> None:
        """Make every rank hold the statistics of all ranks, by all-reduce.

        Moves one (M, d) array a rank, however many ranks there are. Ranks that saw no data take
        part. You may call it again: what all ranks hold counts once. After more updates, call it
        again before you compute.

        Raises:
            ValueError: no rank has seen any data, or ranks saw latents or embeddings of different
                widths; on every rank alike.
        """
        held = self._own()
        device = self.moments.w.device if self.moments is not None else _collective_device(group)
        shape = None if held is None else (held.num_latents, held.width)
        shape = _agreed("MonoScore", "latents and embeddings of widths", shape, device, group)
        moments = held or Moments(*shape, device)
        moments.lower_to_(_reduced(moments.lowest, "MIN", group))
        moments.highest = _reduced(moments.highest, "MAX", group)
        for name in Moments.SUMS:
            setattr(moments, name, _reduced(getattr(moments, name), "SUM", group))
        self.moments, self._counted_elsewhere = moments, dist.get_rank(group) != 0

    def compute(self) -> MonoScoreResult:
        """Return the scores of everything seen so far.

        Raises:
            ValueError: no data yet.
        """
        moments = _seen(self.moments, "MonoScore")
        scores, defined = moments.score()
        return MonoScoreResult(scores, defined, int(moments.n))

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the state, by name; empty before the first batch."""
        return {} if self.moments is None else self.moments.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a saved state.

        Raises:
            ValueError: an entry is missing.
        """
        _require_state(state)
        self.moments = Moments.from_state_dict(state) if state else None
        self._counted_elsewhere = False


class ClassPurity:
    """Class purity of every latent, binary and weighted, in one pass.

    Holds 12 bytes for each class and latent: 98 MB for 1,000 classes and 8,192 latents.

    Args:
        num_classes: number of classes; labels are in [0, num_classes).

    Raises:
        ValueError: num_classes below 1.

    Examples:
        >>> purity = ClassPurity(num_classes=2)
        >>> purity.update(torch.tensor([[2.0], [1.0], [1.0]]), torch.tensor([0, 0, 1]))
        >>> purity.compute().mean_weighted
        0.75

    Source: Nasiri-Sarvi et al. 2026, section 4.1.
    """

    def __init__(self, num_classes: int) -> None:
        require_at_least(1, num_classes, "num_classes")
        self.num_classes = num_classes
        self.sums: ClassSums | None = None
        self._counted_elsewhere = False

    def update(self, latents: Tensor | Support, labels: Tensor) -> None:
        """Take up a batch.

        Args:
            latents: (B, M), floating, finite; dense, sparse COO, or a ``Support``. Only positive
                activations count.
            labels: (B,) integer.

        Raises:
            TypeError: latents not floating, or labels not integer.
            ValueError: shapes that do not match each other or earlier batches, a label outside
                the classes, NaN or infinite values; the metric is then unchanged.
        """
        a = latents if isinstance(latents, Support) else as_tensor(latents, "latents")
        sums = self._own()
        if sums is None:
            sums = ClassSums(self.num_classes, (0, *a.shape)[-1], a.device)
        sums.update_(a, labels)
        self.sums, self._counted_elsewhere = sums, False

    def merge(self, other: ClassPurity) -> None:
        """Take up what another metric has seen; ``other`` stays as it is.

        Raises:
            ValueError: other numbers of classes or latents.
        """
        _require_metric(other, ClassPurity)
        if other.sums is None:
            return
        held = self._own()
        num_classes, num_latents = other.sums.counts.shape
        wanted = num_latents if held is None else held.counts.shape[1]
        if (num_classes, num_latents) != (self.num_classes, wanted):
            raise ValueError(
                f"other: expected {self.num_classes} classes and {wanted} latents, "
                f"got {num_classes} and {num_latents}"
            )
        sums = held or ClassSums(num_classes, num_latents, other.sums.counts.device)
        for name in ClassSums.NAMES:
            mine = getattr(sums, name)
            mine.add_(getattr(other.sums, name).to(mine.device))
        self.sums, self._counted_elsewhere = sums, False

    def _own(self) -> ClassSums | None:
        """Return what this rank counts: not its copy of what all ranks hold."""
        return None if self._counted_elsewhere else self.sums

    def all_reduce_(self, group: dist.ProcessGroup | None = None) -> None:
        """Make every rank hold the sums of all ranks, by all-reduce.

        You may call it again, as for :meth:`MonoScore.all_reduce_`.

        Raises:
            ValueError: no rank has seen any data, or ranks have different numbers of classes or
                latents; on every rank alike.
        """
        held = self._own()
        device = self.sums.counts.device if self.sums is not None else _collective_device(group)
        shape = None if held is None else (self.num_classes, held.counts.shape[1])
        shape = _agreed("ClassPurity", "numbers of classes and latents", shape, device, group)
        sums = held or ClassSums(*shape, device)
        for name in ClassSums.NAMES:
            setattr(sums, name, _reduced(getattr(sums, name), "SUM", group))
        self.sums, self._counted_elsewhere = sums, dist.get_rank(group) != 0

    def compute(self) -> Purity:
        """Return the purity of every latent over everything seen so far.

        Raises:
            ValueError: no data yet.
        """
        return _seen(self.sums, "ClassPurity").purity()

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the state, by name; empty before the first batch."""
        if self.sums is None:
            return {}
        return {name: getattr(self.sums, name).detach().clone() for name in ClassSums.NAMES}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a saved state.

        Raises:
            ValueError: an entry is missing, or the number of classes is another.
        """
        _require_state(state)
        self._counted_elsewhere = False
        if not state:
            self.sums = None
            return
        missing = [name for name in ClassSums.NAMES if name not in state]
        if missing:
            raise ValueError(f"state: expected the entries {ClassSums.NAMES}, missing {missing}")
        num_classes, num_latents = state["counts"].shape
        if num_classes != self.num_classes:
            raise ValueError(f"state: expected {self.num_classes} classes, got {num_classes}")
        self.sums = ClassSums(num_classes, num_latents, state["counts"].device)
        for name in ClassSums.NAMES:
            setattr(self.sums, name, state[name].detach().clone())


_IN_CACHE = 1 << 18
"""This many elements in float64 are 2 MiB."""


class R2:
    """Coefficient of determination of reconstructions, mean over feature dimensions.

    R² = mean_j (1 - Σ_n (x_nj - x̂_nj)² / Σ_n (x_nj - mean x_j)²) over the dimensions j of non-zero
    variance. Means and squared deviations are merged in float64 (Chan et al. 1983), so long
    streams and large offsets cost no accuracy.

    Examples:
        >>> r2 = R2()
        >>> r2.update(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [1.0]]))
        >>> r2.compute()
        0.5

    Source: Nasiri-Sarvi et al. 2026, appendix B.
    """

    def __init__(self) -> None:
        self.n = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.deviation = torch.zeros(0, dtype=torch.float64)
        self.error = torch.zeros(0, dtype=torch.float64)

    @torch.no_grad()
    def update(self, targets: Tensor, reconstructions: Tensor) -> None:
        """Take up a batch: targets x and reconstructions x̂, both (B, d), floating and finite.

        Raises:
            TypeError: an argument is not a floating-point tensor.
            ValueError: shapes that do not match, or NaN or infinite values.
        """
        x = as_rows(targets, "targets")
        x_hat = as_rows(reconstructions, "reconstructions")
        if x.shape != x_hat.shape or (self.n and x.shape[1] != len(self.mean)):
            wanted = (len(x), len(self.mean) if self.n else x.shape[1])
            raise ValueError(
                f"targets, reconstructions: expected both of shape {wanted}, "
                f"got {tuple(x.shape)} and {tuple(x_hat.shape)}"
            )
        for name, given in (("targets", x), ("reconstructions", x_hat)):
            require_finite(given, name)
        for rows in row_chunks(x.shape[0], x.shape[1], _IN_CACHE):
            exact = x[rows].double()
            mean, error = exact.mean(0), (exact - x_hat[rows]).square_().sum(0)
            self._merge(len(exact), mean, (exact - mean).square_().sum(0), error)

    def merge(self, other: R2) -> None:
        """Take up what another metric has seen; ``other`` stays as it is."""
        _require_metric(other, R2)
        if other.n:
            self._merge(other.n, other.mean, other.deviation, other.error)

    def _merge(self, n: int, mean: Tensor, deviation: Tensor, error: Tensor) -> None:
        if self.n == 0:
            self.mean, self.deviation, self.error = (torch.zeros_like(mean) for _ in range(3))
        total = self.n + n
        step = mean - self.mean
        self.deviation = self.deviation + deviation + step.square() * (self.n * n / total)
        self.mean = self.mean + step * (n / total)
        self.error = self.error + error
        self.n = total

    def compute(self) -> float:
        """Return R²; NaN where no dimension varies.

        Raises:
            ValueError: no data yet.
        """
        if self.n == 0:
            raise ValueError("R2.compute: no data yet; call update first")
        # A constant dimension leaves rounding noise of the order (1e-16 x)²; one float32 step in
        # a million samples is still 1e-21 of Σ x².
        scale = self.deviation + self.n * self.mean.square()
        varies = self.deviation > 1e-28 * scale
        return float((1 - self.error[varies] / self.deviation[varies]).mean())


_State = TypeVar("_State")


def _seen(state: _State | None, name: str) -> _State:
    if state is None:
        raise ValueError(f"{name}.compute: no data yet; call update first")
    return state


def _require_metric(other: object, kind: type) -> None:
    if not isinstance(other, kind):
        raise TypeError(f"other: expected a {kind.__name__}, got {type(other).__name__}")


def _require_state(state: object) -> None:
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        got = type(state).__name__
        raise TypeError(f"state: expected tensors by name, as state_dict gives them, got {got}")


def _agreed(
    metric: str,
    what: str,
    shape: tuple[int, int] | None,
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> tuple[int, int]:
    """Return the shape of the ranks' state, of which a rank without data has none.

    Raises:
        ValueError: none has data, or two have different shapes; on every rank.
    """
    said = {(a, b) for a, b in gather_numbers(shape or (0, 0), device, group)} - {(0, 0)}
    if not said:
        raise ValueError(f"{metric}.all_reduce_: no rank has seen any data")
    if len(said) > 1:
        found = ", ".join(map(str, sorted(said)))
        raise ValueError(f"{metric}.all_reduce_: ranks have different {what}: {found}")
    return said.pop()


def _collective_device(group: dist.ProcessGroup | None) -> torch.device:
    """Where a rank without data keeps its part: the current GPU under NCCL, else the CPU."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _reduced(value: Tensor, operation: str, group: dist.ProcessGroup | None) -> Tensor:
    result = value.clone()
    dist.all_reduce(result, op=getattr(dist.ReduceOp, operation), group=group)
    return result

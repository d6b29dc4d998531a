"""Streaming metrics: feed batches, merge shards, reduce over ranks, compute.

These classes hold state. The mathematics is in :mod:`monoloss_plugin.sums` and
:mod:`monoloss_plugin.purity`. Save a metric with ``torch.save(metric.state_dict(), path)``, and
load it with ``metric.load_state_dict(torch.load(path, weights_only=True))``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from monoloss_plugin._checks import (
    as_rows,
    as_tensor,
    paired_rows,
    require_at_least,
    require_number,
)
from monoloss_plugin.chance import ChanceSums, chance_of, significant
from monoloss_plugin.kernels.support import Support
from monoloss_plugin.moments import Moments
from monoloss_plugin.purity import ClassSums, Purity, purity_from_sums
from monoloss_plugin.r2 import R2 as R2
from monoloss_plugin.streaming import StreamingMetric
from monoloss_plugin.sums import SampleSums, Sums, monoscore_from_sums


@dataclass(frozen=True)
class MonoScoreResult:
    """MonoScore of M latents over a dataset, and what it would be by chance."""

    scores: Tensor
    """(M,) float64, in [-1, 1]; 0 where undefined."""
    defined: Tensor
    """(M,) bool: at least one pair of samples activates the latent, by more than rounding."""
    support: Tensor
    """(M,) int64: the number of samples on which the latent is active (above zero)."""
    largest: Tensor
    """(M,) float64: the latent's largest activation."""
    z_scores: Tensor
    """(M,) float64: how many standard deviations the score is above chance.

    The deviation is that of the score over all shuffles of the latent's activations. Its
    distribution is skewed, so z is not normal: test with :attr:`p_values`. 0 where undefined, and
    for embeddings wider than 4,096, and for samples in groups.
    """
    p_values: Tensor
    """(M,) float64: the share of shuffles that give at least this score.

    Nearly so: see :mod:`monoloss_plugin.chance`. For the exact share of a few latents, use
    :func:`functional.monoscore_shuffled <monoloss_plugin.functional.monoscore_shuffled>`. NaN for
    a latent that is not tested, because fewer than four samples carry its activation, or because
    samples come in groups.
    """
    chance: float
    """The mean score of shuffled activations: the mean cosine of all pairs of samples. If they come
    in groups, of all pairs of different groups."""
    num_samples: int
    """Number of samples seen."""

    @property
    def mean(self) -> float:
        """Mean over all latents; an undefined score counts as 0 (Nasiri-Sarvi et al. 2026)."""
        return float(self.scores.mean())

    @property
    def mean_defined(self) -> float:
        """Mean over the defined latents (Pach et al. 2025); NaN if there are none."""
        return float(self.scores[self.defined].mean())

    @property
    def mean_per_firing(self) -> float:
        """Mean over all firings: each defined latent counts as often as it is active.

        In :attr:`mean_defined`, a latent that is active on three samples counts as much as one that
        is active on three thousand, and MonoLoss makes many latents rare.
        """
        firings = self.support.double() * self.defined
        return float((self.scores @ firings) / firings.sum())

    @property
    def adjusted(self) -> Tensor:
        """(M,): (score - chance) / (1 - chance), as in the adjusted Rand index.

        0 is what shuffled activations get, 1 is perfect; 0 where undefined.
        """
        room = 1 - self.chance
        above = (self.scores - self.chance) / room if room > 0 else torch.zeros_like(self.scores)
        return above.masked_fill(~self.defined, 0.0)

    @property
    def mean_adjusted(self) -> float:
        """Mean of :attr:`adjusted` over the defined latents; NaN if there are none."""
        return float(self.adjusted[self.defined].mean())

    @property
    def num_defined(self) -> int:
        """Number of latents that have a score."""
        return int(self.defined.sum())

    def significant(self, alpha: float = 0.01) -> Tensor:
        """Return which latents score above chance, (M,) bool.

        Of these latents, at most a share ``alpha`` is expected to be there by chance (Benjamini &
        Hochberg 1995, over the latents that are tested).

        Raises:
            ValueError: alpha is not between 0 and 1.
        """
        require_number(alpha, "alpha")
        if not 0 < alpha < 1:
            raise ValueError(f"alpha: expected a number between 0 and 1, got {alpha}")
        return significant(self.p_values, alpha)

    def curve(self) -> Tensor:
        """Return the scores in decreasing order (M,): the paper's MonoScore curve."""
        return self.scores.sort(descending=True).values

    def cpu(self) -> MonoScoreResult:
        """Return the same result on the CPU."""
        moved: dict[str, Any] = {name: value.cpu() for name, value in self.tensors().items()}
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is known of each latent, (M,) tensors by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


class MonoScore(StreamingMetric[Moments]):
    """MonoScore of every latent of an SAE, and its chance level, in one pass over any data.

    The memory is one (M, d) and one (d, d) float64 array, whatever the number of samples. Batches,
    shards and ranks may come in any order.

    Examples:
        >>> metric = MonoScore()
        >>> metric.update(torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        >>> metric.update(torch.tensor([[0.0]]), torch.tensor([[0.0, 1.0]]))
        >>> metric.compute().mean
        1.0

    Source: Nasiri-Sarvi et al. 2026, eq. 2 and Algorithm 2; Pach et al. 2025.
    """

    REDUCED_BY: ClassVar = {
        **dict.fromkeys((*SampleSums._fields, *Sums._fields), "sum"),
        "lowest": "min",
        "highest": "max",
        **dict.fromkeys(("active", *ChanceSums._fields), "sum"),
    }
    SIZES = "widths of latents and embeddings"
    SIZED_BY = "w"

    def _zeros(self, shape: tuple[int, int], device: torch.device) -> Moments:
        return Moments.zeros(*shape, device, chance=True)

    def _lower_to_(self, state: Moments, minima: dict[str, Tensor]) -> None:
        state.lower_to_(minima["lowest"])

    def update(
        self, latents: Tensor | Support, embeddings: Tensor, groups: Tensor | None = None
    ) -> None:
        """Add a batch.

        Args:
            latents: (B, M), floating, finite; dense, sparse COO, or the
                :class:`~monoloss_plugin.kernels.support.Support` that several metrics share.
            embeddings: (B, d), floating, finite.
            groups: (B,) integers: pairs of samples of one group, such as the patches of an image,
                are left out. A group must come in one batch.

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
        moments = self._own((a.shape[1], e.shape[1]), a.device)
        for name, got, wanted in zip(
            ("latents", "embeddings"), (a.shape[1], e.shape[1]), moments.shape, strict=True
        ):
            if got != wanted:
                raise ValueError(
                    f"{name}: expected width {wanted} as in earlier batches, got {got}"
                )
        moments.add_(a, e, groups)
        self._keep(moments)

    def compute(self) -> MonoScoreResult:
        """Return the scores of everything seen so far.

        Raises:
            ValueError: no data yet.
        """
        moments = self._seen()
        samples, sums = moments.samples, moments.sums
        scores, defined = monoscore_from_sums(sums, moments.span)
        assert moments.chance is not None  # the metric always keeps these sums
        chance = chance_of(scores, defined, samples, sums, moments.chance)
        return MonoScoreResult(
            scores,
            defined,
            support=moments.active.long(),
            largest=moments.highest.clone(),
            z_scores=chance.z_scores,
            p_values=chance.p_values,
            chance=float(chance.mean),
            num_samples=int(samples.n),
        )

    def mean_embeddings(self) -> Tensor:
        """Return the mean unit embedding of each latent, weighted by its activations.

        This is w / u of :mod:`monoloss_plugin.sums`: each sample counts by how far it activates the
        latent above the latent's minimum. A mean is shorter than 1 unless all of these samples are
        alike.

        Returns:
            (M, d) float32; zero for a latent that is never above its minimum, such as a dead one.

        Raises:
            ValueError: no data yet.
        """
        sums = self._seen().sums
        return (sums.w / sums.u.masked_fill(sums.u == 0, 1.0).unsqueeze(1)).float()

    def mean_embedding(self) -> Tensor:
        """Return the mean unit embedding (d,) of all samples, in float32.

        Raises:
            ValueError: no data yet.
        """
        samples = self._seen().samples
        return (samples.sum_h / samples.n).float()


class ClassPurity(StreamingMetric[ClassSums]):
    """Class purity of every latent, binary, weighted and above chance, in one pass.

    The memory is 16 bytes for each class and latent: 131 MB for 1,000 classes and 8,192 latents.
    Purity above chance deals the samples to two halves in the order in which they come; in another
    order it differs a little.

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

    REDUCED_BY: ClassVar = dict.fromkeys(ClassSums._fields, "sum")
    SIZES = "numbers of classes and latents"
    SIZED_BY = "activations"

    def __init__(self, num_classes: int) -> None:
        require_at_least(1, num_classes, "num_classes")
        super().__init__()
        self.num_classes = num_classes

    def _zeros(self, shape: tuple[int, int], device: torch.device) -> ClassSums:
        return ClassSums.zeros(*shape, device)

    def _check_sizes(self, shape: tuple[int, ...], argument: str) -> None:
        if shape[0] != self.num_classes:
            raise ValueError(f"{argument}: expected {self.num_classes} classes, got {shape[0]}")

    def update(self, latents: Tensor | Support, labels: Tensor) -> None:
        """Add a batch.

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
        sums = self._own((self.num_classes, (0, *a.shape)[-1]), a.device)
        sums.add_(a, labels)
        self._keep(sums)

    def compute(self) -> Purity:
        """Return the purity of every latent over everything seen so far.

        Raises:
            ValueError: no data yet.
        """
        return purity_from_sums(self._seen())

    def class_counts(self) -> Tensor:
        """Return how many samples of each class activate each latent (C, M), int64.

        Raises:
            ValueError: no data yet.
        """
        return self._seen().counts.sum(0)

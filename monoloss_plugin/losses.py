"""The loss terms that adapters attach to a host: MonoLoss and the two Top-k regularizers.

A term is a frozen dataclass: a weight, a name for the host's logs, and its options. It holds no
state and no parameters, so it never enters a state dict.

What ``lam`` means: the papers' weights are right for the papers' reconstruction loss. If a host
reduces its loss in another way, or its inputs have another scale, the same trade-off needs another
weight. ``lam_units`` names the reconstruction loss that ``lam`` is measured against. Adapters
multiply ``lam`` by :func:`lam_factor`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, get_args

from torch import Tensor

from monoloss_plugin import functional
from monoloss_plugin._checks import (
    paired_rows,
    require_at_least,
    require_choice,
    require_flag,
    require_number,
)
from monoloss_plugin.functional import Units
from monoloss_plugin.kernels.batch import GradientAt, batch_scores, scores_by_active_means
from monoloss_plugin.sums import Scores

LamUnits = Literal["mse", "nmse", "raw"]
"""The reconstruction loss that a weight is measured against.

- "mse": mean over elements of (x - x̂)², inputs of unit norm (the MonoLoss paper's BatchTopK,
  JumpReLU and ReLU SAEs: lam 3e-5 to 7e-4).
- "nmse": ||x - x̂||² / ||x||², which does not depend on scale (the paper's TopK SAEs: lam 0.09 to
  0.9).
- "raw": the host's loss as it is (fine-tuning, or your own tuning).
"""

Reduction = Literal["sum", "mean", "fvu"]
"""How a host makes one number of its squared errors.

- "sum": their sum over an input's elements, averaged over samples.
- "mean": their mean over elements and samples.
- "fvu": their sum over elements and samples, divided by the inputs' total variance (the fraction of
  variance unexplained).
"""

PatchSimilarity = Literal["image", "own", "active"]
"""What MonoLoss compares patches of images by.

- "image": the pooled embedding of the whole image.
- "own": the patch's own features.
- "active": the mean over the patches of the image that activate the latent.
"""


class StepTensors(NamedTuple):
    """What a host gives a term in one training step."""

    latents: Tensor
    """(B, M) activations, dense or sparse COO."""
    embeddings: Tensor
    """(B, d): what the same samples are compared by."""
    pre_acts: Tensor | None = None
    """(B, M) activations before the Top-k selection, if the architecture has one."""
    selected: Tensor | None = None
    """(B, M) bool: the entries that the selection keeps."""
    gradient_at: GradientAt = "all"
    """The entries that get a gradient: "all", "active", or the active ones and a (B, M) mask."""
    images: Tensor | None = None
    """(B,) int64: which image each sample is a patch of; None if samples are images."""
    features: Tensor | None = None
    """(B, d_in): of patches, their own features; ``embeddings`` are those of their images."""


class TermValue(NamedTuple):
    """A term's value in one step."""

    value: Tensor
    """Scalar, before the weight."""
    metrics: dict[str, Tensor]
    """Scalars to log, by name."""


@dataclass(frozen=True)
class LossHandle:
    """What ``add_loss`` returns. Call :meth:`remove` to take the term away again."""

    name: str
    """Name of the term in the host's logs."""
    _undo: Callable[[], None] = field(repr=False)

    def remove(self) -> None:
        """Remove the term, so that the host trains as without it. A second call does nothing."""
        self._undo()


@dataclass(frozen=True)
class LossTerm(ABC):
    """A weighted term that an adapter adds to a host's loss. Subclass it to write your own.

    Args:
        lam: weight, finite and at least 0.
        lam_units: the reconstruction loss that lam is measured against: "mse", "nmse" or "raw".
        name: the name in the host's losses, coefficients and logs.

    Raises:
        TypeError: lam is not a number.
        ValueError: lam is negative or not finite, or an option is unknown.
    """

    lam: float
    lam_units: LamUnits = field(default="mse", kw_only=True)
    name: str = field(default="", kw_only=True)

    needs_selection: ClassVar[bool] = False
    """The term needs ``pre_acts`` and ``selected``, which only Top-k architectures have."""
    needs_embeddings: ClassVar[bool] = True
    """The term reads ``embeddings``."""
    degree: ClassVar[int] = 0
    """How the value grows with the activations: 0 not at all, 1 in proportion."""

    def __post_init__(self) -> None:
        require_number(self.lam, "lam")
        if not 0 <= self.lam < float("inf"):
            raise ValueError(f"lam: expected a finite weight of at least 0, got {self.lam}")
        if not isinstance(self.name, str):
            raise TypeError(f"name: expected a string, got {type(self.name).__name__}")
        if not self.name:
            raise ValueError("name: expected a name for the host's logs, got an empty one")
        require_choice(self.lam_units, "lam_units", get_args(LamUnits))

    @property
    def needs_nonnegative(self) -> bool:
        """The term takes 0 to mean "not active", so it is wrong for signed activations."""
        return False

    def compared_by(self, embeddings: str) -> str:
        """Return what the term compares samples by, in words, if they have these embeddings."""
        return embeddings

    @abstractmethod
    def compute_loss(self, step: StepTensors) -> TermValue:
        """Return the value before the weight. It must not make the device wait."""


@dataclass(frozen=True)
class MonoLoss(LossTerm):
    """MonoLoss: rewards latents that are active on samples that are alike.

    Give ``MonoLoss(lam=3e-4)`` to an adapter's ``add_loss``. In a training loop of your own, call
    it: you get ``lam * functional.monoloss(latents, embeddings)``.

    Args:
        lam: weight; the paper uses 3e-5 to 7e-4 ("mse") and 0.09 to 0.9 ("nmse").
        lam_units: the reconstruction loss that lam is measured against: "mse" (default), "nmse" or
            "raw". Adapters use it; if you call the loss yourself, lam is used as it is.
        patches: what patches of images are compared by: "image" (default), the image's embedding;
            "own", the patch's features; or "active", the mean over the image's patches that
            activate the latent. Only for samples that are patches.
        within_images: count pairs of patches of one image too. By default they are left out: that
            two patches of an image are alike says nothing about a latent.
        name: the name in the host's logs. To attach several, give each a name of its own.

    Examples:
        >>> import torch
        >>> loss = MonoLoss(lam=0.5)
        >>> latents = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
        >>> loss(latents, images).item()  # each latent fires on two images with nothing in common
        0.5

    Source: Nasiri-Sarvi et al. 2026, section 3.3 and eq. 3.
    """

    patches: PatchSimilarity = field(default="image", kw_only=True)
    within_images: bool = field(default=False, kw_only=True)
    name: str = field(default="monoloss", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self.patches, "patches", get_args(PatchSimilarity))
        require_flag(self.within_images, "within_images")
        if self.patches == "active" and self.within_images:
            raise ValueError(
                "within_images: with patches='active' an image is one sample, which has no pairs "
                "within it"
            )

    @property
    def needs_nonnegative(self) -> bool:
        """Always."""
        return True

    def compared_by(self, embeddings: str) -> str:
        """Return these embeddings, or what ``patches`` puts in their place."""
        return {
            "image": embeddings,
            "own": "each patch's own features",
            "active": "the mean features of an image's active patches",
        }[self.patches]

    def __call__(
        self,
        latents: Tensor,
        embeddings: Tensor,
        *,
        gradient_at: GradientAt = "all",
        images: Tensor | None = None,
    ) -> Tensor:
        """Return ``lam * MonoLoss`` of latents (B, M) and embeddings (B, d).

        If your latents come from a ReLU, TopK or BatchTopK, pass ``gradient_at="active"``. You get
        the same training, many times faster on a CPU (see :func:`functional.monoloss`). If samples
        are patches, pass ``images`` (B,), and as embeddings what ``patches`` says: those of the
        images, or the patches' own features.
        """
        if self.patches == "active":
            step = StepTensors(latents, embeddings, None, None, gradient_at, images, embeddings)
            return self.lam * self.compute_loss(step).value
        groups = None if self.within_images else images
        return self.lam * functional.monoloss(
            latents, embeddings, gradient_at=gradient_at, groups=groups
        )

    def compute_loss(self, step: StepTensors) -> TermValue:
        """Return the loss, the mean MonoScore, and how many latents the mean is taken over."""
        batch = self._scores(step)
        value = functional.monoloss_from_scores(batch)
        prefix = "" if self.name == "monoloss" else f"{self.name}_"
        metrics = {
            f"{prefix}monoscore": 1 - value.detach(),
            f"{prefix}monoscore_defined": batch.defined.sum(),
        }
        return TermValue(value, metrics)

    def _scores(self, step: StepTensors) -> Scores:
        embeddings = step.embeddings
        if self.patches != "image":
            if step.images is None or step.features is None:
                raise ValueError(
                    f"patches: {self.patches!r} is for samples that are patches, and this host "
                    "does not say of which images; give embeddings=batches.samples_of, of the "
                    "FeatureBatches of a set of patches"
                )
            embeddings = step.features
        latents, embeddings = paired_rows(step.latents, embeddings, keep_sparse=True)
        if self.patches == "active" and step.images is not None:
            return scores_by_active_means(latents, embeddings, step.images, step.gradient_at)
        groups = None if self.within_images else step.images
        return batch_scores(latents, embeddings, step.gradient_at, groups)


@dataclass(frozen=True)
class _TopKRegularizer(LossTerm):
    """What the two regularizers share: their inputs, and the units of their weight."""

    units: Units = field(default="batch_active", kw_only=True)
    rectify: bool = field(default=True, kw_only=True)
    lam_units: LamUnits = field(default="nmse", kw_only=True)

    needs_selection: ClassVar[bool] = True
    needs_embeddings: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self.units, "units", get_args(Units))
        require_flag(self.rectify, "rectify")

    @property
    def needs_nonnegative(self) -> bool:
        """If the pre-activations are rectified."""
        return self.rectify

    @abstractmethod
    def _value(self, pre_acts: Tensor, selected: Tensor) -> Tensor:
        """Return the penalty before the weight."""

    def __call__(self, pre_acts: Tensor, selected: Tensor) -> Tensor:
        """Return ``lam`` times the penalty of pre_acts (B, M) and selected (B, M) bool."""
        return self.lam * self._value(pre_acts, selected)

    def compute_loss(self, step: StepTensors) -> TermValue:
        """Return the penalty.

        Raises:
            ValueError: the host gives no pre-activations or no selection.
        """
        if step.pre_acts is None or step.selected is None:
            raise ValueError(
                f"{self.name}: needs the activations before a Top-k selection and the selected "
                "entries; this host or architecture has none"
            )
        return TermValue(self._value(step.pre_acts, step.selected), {})


@dataclass(frozen=True)
class OffSupportL1(_TopKRegularizer):
    """L1 penalty on the activations that the Top-k selection leaves out.

    Args:
        lam: weight.
        units: "batch_active" (default) penalises the units that are selected at least once in the
            batch; "all" penalises every unit.
        rectify: use relu(pre-activations); False uses the pre-activations as they are.
        over_units: the "sum" over units (default), or their "mean".
        lam_units: the reconstruction loss that lam is measured against: "nmse" by default, since we
            do not know the paper's weights. This penalty grows with the activations, so adapters
            also divide its weight by the root mean square norm of the input.
        name: the name in the host's logs.

    Source: Jacquier et al. 2026, Regularizer 1; see :func:`functional.off_support_l1`.
    """

    over_units: Literal["sum", "mean"] = field(default="sum", kw_only=True)
    name: str = field(default="off_support_l1", kw_only=True)

    degree: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self.over_units, "over_units", ("sum", "mean"))

    def _value(self, pre_acts: Tensor, selected: Tensor) -> Tensor:
        return functional.off_support_l1(
            pre_acts,
            selected,
            units=self.units,
            rectify=self.rectify,
            over_units=self.over_units,
        )


@dataclass(frozen=True)
class L1L2Ratio(_TopKRegularizer):
    """L1/L2-ratio penalty on the activations before the Top-k selection, for fewer large ones.

    Args:
        lam: weight.
        units: "batch_active" (default) uses the units that are selected at least once in the batch;
            "all" uses every unit.
        rectify: use relu(pre-activations); False uses the pre-activations as they are.
        normalize: divide by the square root of the number of units, so that 1 is the largest value.
        lam_units: the reconstruction loss that lam is measured against: "nmse" by default, since we
            do not know the paper's weights.
        name: the name in the host's logs.

    Source: Jacquier et al. 2026, Regularizer 2; see :func:`functional.l1_l2_ratio`.
    """

    normalize: bool = field(default=False, kw_only=True)
    name: str = field(default="l1_l2_ratio", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_flag(self.normalize, "normalize")

    def _value(self, pre_acts: Tensor, selected: Tensor) -> Tensor:
        return functional.l1_l2_ratio(
            pre_acts,
            selected,
            units=self.units,
            rectify=self.rectify,
            normalize=self.normalize,
        )


def lam_factor(
    lam_units: LamUnits,
    *,
    width: int,
    mean_square_norm: float,
    reduction: Reduction,
    variance: float | None = None,
    degree: int = 0,
) -> float:
    """Return what to multiply ``lam`` by in a host, to keep the paper's trade-off.

    Let the inputs have mean squared norm X, variance V and width d. The host's loss is then this
    many times the paper's loss on inputs of unit norm:

    | the host takes | "mse" | "nmse" |
    |---|---|---|
    | the sum over d, the mean over samples | d·X | X |
    | the mean over both | X | X/d |
    | the fraction of variance unexplained | d·X/V | X/V |

    A term of degree 1 grows with the activations, so it has itself grown by sqrt(X).

    Args:
        lam_units: what lam is measured against; "raw" gives 1.
        width: d, the width of the SAE's input.
        mean_square_norm: X, the mean of ||x||² over samples, for x as in the host's loss.
        reduction: how the host reduces its squared error: see :data:`Reduction`.
        variance: V, the mean of ||x - mean||² over samples; only for "fvu".
        degree: of the term, 0 or 1.

    Raises:
        TypeError: width or degree is not an integer, or X is not a number.
        ValueError: an unknown option, or X or V is not positive.

    Examples:
        >>> round(3e-4 * lam_factor("mse", width=768, mean_square_norm=1.0, reduction="sum"), 4)
        0.2304

    Source: Nasiri-Sarvi et al. 2026, eq. 3 and appendix B; derivation in docs/lam.md.
    """
    require_choice(lam_units, "lam_units", get_args(LamUnits))
    require_choice(reduction, "reduction", get_args(Reduction))
    require_at_least(1, width, "width")
    require_number(mean_square_norm, "mean_square_norm")
    require_at_least(0, degree, "degree")
    if lam_units == "raw":
        return 1.0
    if not 0 < mean_square_norm < float("inf"):
        raise ValueError(
            f"mean_square_norm: expected a positive finite number, got {mean_square_norm}"
        )
    if reduction == "fvu" and not (variance is not None and 0 < variance < float("inf")):
        raise ValueError(f"variance: expected a positive finite number for 'fvu', got {variance}")
    per_sample = {"sum": 1.0, "mean": 1 / width, "fvu": 1 / (variance or 1.0)}[reduction]
    per_sample *= mean_square_norm
    host_loss = per_sample * width if lam_units == "mse" else per_sample
    return float(host_loss / mean_square_norm ** (degree / 2))

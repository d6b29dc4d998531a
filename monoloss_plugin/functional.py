"""The formulas, as pure functions.

MonoScore's equation and its code, side by side:

    ã = a - min a                       a = latents - latents.amin(0)
    h = e / ||e||                       h = embeddings / embeddings.norm(dim=1, keepdim=True)
    u = Σ ã,  v = Σ ã²,  w = Σ ã h      u, v, w = a.sum(0), a.square().sum(0), a.T @ h
    MS = (||w||² - v) / (u² - v)        (w.square().sum(1) - v) / (u.square() - v)

:mod:`monoloss_plugin.sums` holds these sums once for dense and once for sparse latents, and the
score that follows from them. It also takes care of a zero embedding, for which v becomes
t = Σ ã² ||h||² in the numerator. :func:`monoscore` and :func:`monoloss` use these functions, and so
do the classes :class:`monoloss_plugin.MonoScore` and :class:`monoloss_plugin.MonoLoss`.

Everywhere: N samples (B in a batch), M latents, embeddings of width d. All dimensions before the
last are flattened, so (B, T, M) latents go with (B, T, d) embeddings. Numpy arrays and lists work
as tensors do.

Sources: MonoLoss, Nasiri-Sarvi et al. 2026 (arXiv 2602.12403); MonoScore, Pach et al. 2025;
Beyond the Hard Budget, Jacquier et al. 2026 (arXiv 2606.27321).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from monoloss_plugin._checks import (
    as_rows,
    as_tensor,
    paired_rows,
    require_at_least,
    require_choice,
    require_finite,
    require_flag,
    require_number,
)
from monoloss_plugin.embeddings import unit_rows
from monoloss_plugin.groups import as_groups
from monoloss_plugin.kernels.batch import GradientAt, batch_scores
from monoloss_plugin.moments import moments_of
from monoloss_plugin.purity import ClassSums, Purity, purity_from_sums
from monoloss_plugin.sums import CONSTANT_BELOW, Scores, monoscore_from_sums

Units = Literal["batch_active", "all"]

_SHUFFLED = 1 << 24
"""Activations that are shuffled at once: 64 MiB in float32."""


def monoscore(
    latents: Tensor,
    embeddings: Tensor,
    *,
    undefined: float = 0.0,
    groups: Tensor | None = None,
) -> Tensor:
    """MonoScore of every latent, in time linear in the number of samples.

    MS_k = (||w_k||² - t_k) / (u_k² - v_k) with u = Σ ã, v = Σ ã², t = Σ ã²||h||², w = Σ ã h over
    the samples, ã = a - min a and h = e / ||e||. It is the mean cosine similarity of all pairs of
    samples, weighted by the product of their activations.

    Sums are taken in chunks and added up in float64, so memory does not grow with N. There is no
    gradient: to train, use :func:`monoloss`. For data that comes in batches, use
    :class:`monoloss_plugin.MonoScore`.

    Args:
        latents: (N, M), floating, finite; dense, or sparse COO; non-negative if 0 means "not
            active".
        embeddings: (N, d), floating, finite; a zero embedding is similar to nothing.
        undefined: the value for a latent that no pair of samples activates.
        groups: (N,) integers, such as the images that patches are of: pairs of samples of one group
            are left out (:mod:`monoloss_plugin.groups`).

    Returns:
        (M,), in [-1, 1], in the latents' dtype but at least float32.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes that do not match, or NaN or infinite values.

    Examples:
        >>> a = torch.tensor([[1.0, 0.0], [1.0, 3.0], [0.0, 3.0]])
        >>> e = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> monoscore(a, e)
        tensor([1., 0.])

        The same in plain code; these embeddings are unit vectors:

        >>> x = a - a.amin(0)
        >>> u, v, w = x.sum(0), x.square().sum(0), x.T @ e
        >>> (w.square().sum(1) - v) / (u.square() - v)
        tensor([1., 0.])

    Source: Nasiri-Sarvi et al. 2026, eq. 2 and Algorithm 2.
    """
    require_number(undefined, "undefined")
    a, e = paired_rows(latents, embeddings, keep_sparse=True)
    moments = moments_of(a, e, groups)
    scores, defined = monoscore_from_sums(moments.sums, moments.span)
    dtype = torch.promote_types(a.dtype, torch.float32)
    return scores.masked_fill(~defined, float(undefined)).to(dtype)


def monoscore_pairwise(
    latents: Tensor,
    embeddings: Tensor,
    *,
    undefined: float = 0.0,
    groups: Tensor | None = None,
) -> Tensor:
    """MonoScore by its definition, over all pairs of samples: what the other forms must equal.

    MS_k = Σ_{n<m} ã_nk ã_mk h_n·h_m / Σ_{n<m} ã_nk ã_mk, with the activations ã of each latent
    rescaled to [0, 1]. It is computed in float64, and autograd can differentiate it. Time and
    memory grow with N²: use :func:`monoscore` for data of any size.

    Args:
        latents: (N, M), floating, finite.
        embeddings: (N, d), floating, finite.
        undefined: the value for a latent whose denominator is zero.
        groups: (N,) integers: pairs of samples of one group are left out.

    Returns:
        (M,) in float64.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes that do not match, or NaN or infinite values.

    Examples:
        >>> a = torch.tensor([[1.0, 0.0], [1.0, 3.0], [0.0, 3.0]])
        >>> e = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> monoscore_pairwise(a, e)
        tensor([1., 0.], dtype=torch.float64)

    Source: Pach et al. 2025; Nasiri-Sarvi et al. 2026, eq. 1 and 2 and Algorithm 1.
    """
    require_number(undefined, "undefined")
    a, e = paired_rows(latents, embeddings)
    require_finite(a, "latents")
    require_finite(e, "embeddings")
    a = a.double()
    h, _ = unit_rows(e, torch.float64)
    pairs = 1 - torch.eye(len(a), dtype=torch.float64, device=a.device)
    if groups is not None:
        of = as_groups(groups, len(a)).to(a.device)
        pairs = (of.unsqueeze(1) != of).double()
    similarity = (h @ h.T) * pairs

    lowest, highest = a.amin(0), a.amax(0)
    span = highest - lowest
    normalised = (a - lowest) / torch.where(span > 0, span, 1.0)
    numerator = (normalised * (similarity @ normalised)).sum(0) / 2
    denominator = (normalised * (pairs @ normalised)).sum(0) / 2
    defined = (denominator > 0) & (span > CONSTANT_BELOW)
    return torch.where(
        defined, numerator / torch.where(defined, denominator, 1.0), float(undefined)
    )


def monoscore_shuffled(
    latents: Tensor, embeddings: Tensor, *, shuffles: int = 2000, seed: int = 0
) -> Tensor:
    """MonoScore of every latent with its activations shuffled over the samples, many times.

    Use it to test a few latents without any approximation. The share of shuffles that give at least
    the latent's own score is its p-value. For all latents at once there are
    :attr:`MonoScoreResult.p_values <monoloss_plugin.metrics.MonoScoreResult.p_values>`, which cost
    nothing. Time grows with shuffles x N x M x d.

    Args:
        latents: (N, M), floating, finite; a few latents.
        embeddings: (N, d), floating, finite.
        shuffles: how many.
        seed: of the shuffles.

    Returns:
        (shuffles, M), in the latents' dtype but at least float32; 0 where undefined.

    Raises:
        TypeError: an argument is not a floating-point tensor, or not an integer.
        ValueError: shapes that do not match, NaN or infinite values, or no shuffles.

    Examples:
        >>> a = torch.eye(10)[:, :1] + torch.eye(10)[:, 1:2]  # active on two samples
        >>> e = torch.eye(5).repeat_interleave(2, dim=0)      # which are alike: 1 of 9 pairs is
        >>> shuffled = monoscore_shuffled(a, e, shuffles=500)
        >>> share = (shuffled >= monoscore(a, e)).float().mean()
        >>> 0.07 < share < 0.15
        tensor(True)
    """
    require_at_least(1, shuffles, "shuffles")
    require_at_least(0, seed, "seed")
    a, e = paired_rows(latents, embeddings)
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, min(shuffles, _SHUFFLED // max(1, a.numel())))
    scores = []
    for start in range(0, shuffles, at_once):
        count = min(at_once, shuffles - start)
        orders = torch.stack([torch.randperm(len(a), generator=generator) for _ in range(count)])
        shuffled = a[orders.T.to(a.device)]  # (N, count, M)
        scores.append(monoscore(shuffled.flatten(1), e).view(count, -1))
    return torch.cat(scores)


def monoloss(
    latents: Tensor,
    embeddings: Tensor,
    *,
    gradient_at: GradientAt = "all",
    groups: Tensor | None = None,
) -> Tensor:
    """MonoLoss of a batch: one minus the mean MonoScore of the latents that have one in it.

    L = 1 - (1/|K|) Σ_{k in K} MS_k. K are the latents that have a score in this batch: u² - v, of
    activations rescaled to [0, 1], exceeds 1e-5 (1e-12 in float64). L is 1 if K is empty.

    The gradient in the latents is the closed form of :mod:`monoloss_plugin.kernels.gradient`. It is
    scaled down for a latent that is active on hardly more than one sample, whose gradient would
    have no bound otherwise (:data:`~monoloss_plugin.kernels.gradient.HARDEST_PULL`). Embeddings get
    no gradient.

    Sums are float32 or wider under autocast. Nothing makes an accelerator wait, and dense
    activations are never copied whole. Values are not checked here: a NaN shows in the result.

    If your latents come from a ReLU, TopK or BatchTopK, pass ``gradient_at="active"``. You get the
    same training, many times faster on a CPU: these pass no gradient to latents that are zero.
    Otherwise leave it out.

    Args:
        latents: (B, M), floating; dense, or sparse COO.
        embeddings: (B, d), floating.
        gradient_at: the entries that get a gradient. "all" (default); "active", the entries that
            are not zero; or a (B, M) bool tensor of more entries besides the active ones, such as
            JumpReLU's band around its threshold. The value of the loss is the same.
        groups: (B,) integers, such as the images that patches are of: pairs of samples
            of one group are left out (:mod:`monoloss_plugin.groups`).

    Returns:
        Scalar in [0, 2], float32 or wider.

    Raises:
        TypeError: an argument is not a floating-point tensor, or ``gradient_at`` is not bool.
        ValueError: shapes that do not match, or an unknown option.

    Examples:
        >>> a = torch.tensor([[1.0, 0.0], [1.0, 3.0], [0.0, 3.0]], requires_grad=True)
        >>> e = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> monoloss(a, e).item()
        0.5

    Source: Nasiri-Sarvi et al. 2026, section 3.3 (the loss that eq. 3 adds to the base loss).
    """
    latents = as_tensor(latents, "latents")
    if isinstance(gradient_at, str):
        require_choice(gradient_at, "gradient_at", ("all", "active"))
    else:
        gradient_at = _mask_rows(gradient_at, "gradient_at", latents, "latents")
    a, e = paired_rows(latents, embeddings, keep_sparse=True)
    return monoloss_from_scores(batch_scores(a, e, gradient_at, groups))


def monoloss_from_scores(scores: Scores) -> Tensor:
    """Return MonoLoss: one minus the mean score of the defined latents.

    Args:
        scores: (M,) and (M,) bool, of one batch; undefined scores are 0.

    Returns:
        Scalar; 1 if no latent is defined.
    """
    # A sum of everything instead of boolean indexing, which would make an accelerator wait.
    return 1 - scores.scores.sum() / scores.defined.sum().clamp(min=1)


def off_support_l1(
    pre_acts: Tensor,
    selected: Tensor,
    *,
    units: Units = "batch_active",
    rectify: bool = True,
    over_units: Literal["sum", "mean"] = "sum",
) -> Tensor:
    """L1 penalty on what the Top-k selection leaves out.

    L = (1/B) Σ_i Σ_{j in A, (i,j) not in S} |z_ij|. z are the activations before the selection, S
    are the selected entries, and A are the units that are selected at least once in the batch.

    The paper's abstract says this much. What it leaves open is an option here.

    Args:
        pre_acts: (B, M), floating: the activations before the Top-k selection.
        selected: (B, M) bool: the entries that the selection keeps.
        units: "batch_active" penalises only A; "all" penalises every unit.
        rectify: use z = relu(pre_acts), as in an architecture with a ReLU. False uses pre_acts as
            they are, and penalises negative ones too.
        over_units: take the "sum" over units, or their "mean".

    Returns:
        Scalar, float32 or wider; differentiable in ``pre_acts``.

    Raises:
        TypeError: pre_acts not floating, or selected not bool.
        ValueError: shapes that do not match, or an unknown option.

    Examples:
        >>> z = torch.tensor([[3.0, 1.0, 2.0], [1.0, 5.0, 4.0]])
        >>> kept = torch.tensor([[True, False, False], [False, True, False]])
        >>> off_support_l1(z, kept).item()
        1.0
        >>> off_support_l1(z, kept, units="all").item()
        4.0

    Source: Jacquier et al. 2026, Regularizer 1.
    """
    require_choice(over_units, "over_units", ("sum", "mean"))
    z, kept, active = _before_selection(pre_acts, selected, units, rectify)
    if z.numel() == 0:  # no samples or no units
        return z.sum()
    penalised = z.abs().masked_fill(kept | ~active, 0.0)
    per_sample = penalised.sum(1)
    if over_units == "mean":
        per_sample = per_sample / active.sum().clamp(min=1)
    return per_sample.mean()


def l1_l2_ratio(
    pre_acts: Tensor,
    selected: Tensor,
    *,
    units: Units = "batch_active",
    rectify: bool = True,
    normalize: bool = False,
) -> Tensor:
    """Ratio of L1 to L2 norm, which does not depend on scale: small if few units hold the code.

    L = (1/B) Σ_i ||z_i,A||_1 / ||z_i,A||_2, between 1 (one unit) and sqrt(|A|) (all units alike).
    z are the activations before the Top-k selection, and A are the units that are selected at least
    once in the batch. A sample with no z_i,A above 1.2e-38 contributes 0 and gets no gradient.

    Args:
        pre_acts: (B, M), floating: the activations before the Top-k selection.
        selected: (B, M) bool: the entries that the selection keeps.
        units: "batch_active" uses only A; "all" uses every unit.
        rectify: use z = relu(pre_acts), as in an architecture with a ReLU. False uses pre_acts as
            they are.
        normalize: divide by sqrt(|A|), so that the largest value is 1.

    Returns:
        Scalar, float32 or wider; differentiable in ``pre_acts``.

    Raises:
        TypeError: pre_acts not floating, or selected not bool.
        ValueError: shapes that do not match, or an unknown option.

    Examples:
        >>> z = torch.tensor([[3.0, 4.0, 9.0]])
        >>> kept = torch.tensor([[True, True, False]])
        >>> round(l1_l2_ratio(z, kept).item(), 4)
        1.4

    Source: Jacquier et al. 2026, Regularizer 2.
    """
    require_flag(normalize, "normalize")
    z, _, active = _before_selection(pre_acts, selected, units, rectify)
    if z.numel() == 0:
        return z.sum()
    magnitude = z.abs().masked_fill(~active, 0.0)
    # The ratio does not depend on a sample's scale: divide by it, so that squares stay in range.
    largest = magnitude.detach().amax(1, keepdim=True)
    # The gradient grows as one over the norm, and overflows float32 if that is no normal number.
    empty = largest <= CONSTANT_BELOW
    magnitude = (magnitude / largest.masked_fill(empty, 1.0)).masked_fill(empty, 0.0)
    l2 = magnitude.square().sum(1).masked_fill(empty.squeeze(1), 1.0).sqrt()
    ratio = (magnitude.sum(1) / l2).mean()
    return ratio / active.sum().clamp(min=1).sqrt() if normalize else ratio


def class_purity(latents: Tensor, labels: Tensor, num_classes: int) -> Purity:
    """Class purity of every latent: binary, weighted, and above chance.

    binary = |N*_k| / |N_k| and weighted = Σ_{N*_k} a / Σ_{N_k} a. N_k are the samples for which
    latent k is positive, and N*_k are the samples of its dominant class: the class with most
    samples in N_k. Ties go to the lowest label. Purity above chance takes the class from one half
    of the samples and the purity from the other (:mod:`monoloss_plugin.purity`).

    Args:
        latents: (N, M), floating, finite; dense, or sparse COO; only positive activations count.
        labels: (N,) integer, in [0, num_classes).
        num_classes: number of classes.

    Returns:
        Three (M,) tensors in float64, NaN for a latent that is never active; and the dominant
        classes (M,).

    Raises:
        TypeError: latents not floating or labels not integer.
        ValueError: shapes that do not match, a label outside the classes, NaN or infinite values.

    Examples:
        >>> a = torch.tensor([[2.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
        >>> purity = class_purity(a, torch.tensor([0, 0, 1]), num_classes=2)
        >>> purity.binary, purity.weighted, purity.dominant
        (tensor([0.6667, nan], dtype=torch.float64), tensor([0.7500, nan], dtype=torch.float64),
         tensor([ 0, -1]))

    Source: Nasiri-Sarvi et al. 2026, section 4.1.
    """
    require_at_least(1, num_classes, "num_classes")
    a = as_rows(latents, "latents", keep_sparse=True)
    sums = ClassSums.zeros(num_classes, a.shape[1], a.device)
    sums.add_(latents, labels)
    return purity_from_sums(sums)


def _mask_rows(value: Tensor, name: str, of: Tensor, of_name: str) -> Tensor:
    """Return a mask with the shape of a tensor (..., M) as (N, M)."""
    mask = as_tensor(value, name)
    if mask.dtype != torch.bool or mask.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense bool tensor, got {mask.dtype}, {mask.layout}")
    if mask.shape != of.shape:
        raise ValueError(
            f"{name}: expected shape {tuple(of.shape)} to match {of_name}, got {tuple(mask.shape)}"
        )
    return mask.to(of.device).flatten(0, -2)


def _before_selection(
    pre_acts: Tensor, selected: Tensor, units: Units, rectify: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return z (B, M) in float32 or wider, the selected entries (B, M), the units to use (M,)."""
    require_choice(units, "units", ("batch_active", "all"))
    require_flag(rectify, "rectify")
    pre_acts = as_tensor(pre_acts, "pre_acts")
    z = as_rows(pre_acts, "pre_acts")
    kept = _mask_rows(selected, "selected", pre_acts, "pre_acts")
    active = kept.any(0) if units == "batch_active" else kept.new_ones(kept.shape[1])
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return (z.relu() if rectify else z), kept, active

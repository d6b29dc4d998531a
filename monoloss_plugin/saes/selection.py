"""The same SAE with another selection of its latents, to compare SAEs at equal sparsity.

An SAE computes a pre-activation for each latent, and then selects the latents that may be active.
The functions here exchange the selection: the k largest of each sample (:func:`with_k`), or one
threshold for all latents that gives a wanted L0 (:func:`with_l0`). The weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from monoloss_plugin._checks import as_list, as_rows, require_at_least, require_number
from monoloss_plugin._places import kind_of
from monoloss_plugin._sae import SAE
from monoloss_plugin.metrics import R2
from monoloss_plugin.other_saes import OtherSAE, as_sae
from monoloss_plugin.saes.rows import BATCH, Rows

if TYPE_CHECKING:
    from monoloss_plugin.features import FeatureSet

_KNOWN = ("standard", "topk", "jumprelu")
"""SAELens's architectures whose active latents are rectified pre-activations."""

_BUDGETS = (1 / 4, 1 / 2, 1, 2, 4)
_SAMPLES = 8192
_TOLERANCE = 0.01


def pre_activations(sae: Any, x: Tensor) -> Tensor:
    """Return what an SAE's selection chooses from: its rectified pre-activations.

    Where the SAE multiplies them by the norms of the decoder's rows before it selects
    (``cfg.rescale_acts_by_decoder_norm``), so does this function.

    Args:
        sae: a SAELens SAE of the architecture standard, topk or jumprelu (SAELens loads a saved
            BatchTopK SAE as a jumprelu); or an SAE of overcomplete or sparsify, as
            :func:`~monoloss_plugin.other_saes.as_sae` gives it.
        x: (B, d_in), on the scale that the SAE takes.

    Returns:
        (B, M), zero or positive.

    Raises:
        TypeError: an SAE of another kind.
    """
    if isinstance(sae, OtherSAE):
        return sae.pre_activations(x)
    if not _has_pre_activations(sae):
        raise TypeError(
            f"sae: expected a SAELens SAE of the architecture {', '.join(_KNOWN)}, got "
            f"{architecture_of(sae) or kind_of(sae)}; save a BatchTopK SAE with "
            "save_inference_model and use what SAE.load_from_disk gives"
        )
    seen: list[Tensor] = []
    # The hook point's output is the same in every architecture and in SAEs in training.
    handle = sae.hook_sae_acts_pre.register_forward_hook(lambda *call: seen.append(call[2]))
    try:
        sae.encode(x)
    finally:
        handle.remove()
    found = seen[0]
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        found = found * sae.W_dec.norm(dim=-1)
    return found.relu()


class Reselected(nn.Module):
    """An SAE with another selection of its latents. ``evaluate`` takes it like any other.

    It shares the weights of the SAE that it is made from. It is for measurements, not for training.
    """

    def __init__(self, sae: SAE, select: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.sae = sae
        self.select = select

    @property
    def cfg(self) -> Any:
        """The SAE's own ``cfg``; None if it has none."""
        return getattr(self.sae, "cfg", None)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Return the selected latents (B, M) of features (B, d_in)."""
        return self.select(_candidates(self.sae, x))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the SAE's own reconstruction (B, d_in) of latents (B, M)."""
        return self.sae.decode(latents)


def with_k(sae: SAE, k: int) -> Reselected:
    """Return the SAE with the k largest rectified pre-activations of each sample as its latents.

    A sample with fewer than k positive pre-activations has fewer than k active latents. If the SAE
    has no pre-activations that :func:`pre_activations` can return, the k largest of its own latents
    are kept. So a k above its L0 changes little.

    Raises:
        TypeError: ``k`` is not an integer.
        ValueError: ``k`` is below 1; or, when you encode, above the number of latents.

    Source: Jacquier et al. 2026 (arXiv 2606.27321): an SAE at another k than it was trained with.
    """
    require_at_least(1, k, "k")
    return Reselected(_original(sae), partial(_keep_largest, k=k))


@torch.no_grad()
def with_l0(
    sae: SAE, features: Tensor | FeatureSet, l0: float, *, normalize: bool | None = None
) -> Reselected:
    """Return the SAE with one threshold for all latents, so that its mean L0 is ``l0``.

    A latent is active where its rectified pre-activation is positive and above θ. For a JumpReLU
    SAE, θ is added to the latent's own threshold: if ``l0`` is the SAE's own L0, nothing changes.
    If the SAE has no pre-activations that :func:`pre_activations` can return, θ applies to its own
    latents, which can only become fewer.

    Args:
        sae: any SAE with ``encode`` and ``decode``.
        features: a feature set, or (N, d_in). θ is set on them, or on 8,192 random ones of more.
        l0: mean number of active latents per sample, to 1 %.
        normalize: as in :func:`~monoloss_plugin.evaluation.evaluate`.

    Raises:
        TypeError: features of another kind, or ``l0`` is not a number.
        ValueError: no threshold gives this L0: too few pre-activations are positive, or many are
            equal; or features that the SAE cannot take.
    """
    sae = _original(sae)
    sample = Rows.for_sae(sae, features, normalize).sample(_SAMPLES, seed=0)
    found = (_candidates(sae, x) for x in sample.split(BATCH))
    theta = threshold_for_l0((_margins(sae, c)[c > 0] for c in found), len(sample), l0)
    return Reselected(sae, lambda c: c * (_margins(sae, c) > theta))


def threshold_for_l0(values: Iterable[Tensor], num_samples: int, l0: float) -> float:
    """Return a threshold that ``l0`` values per sample exceed on average, to 1 %.

    Args:
        values: all values that a threshold may keep, in tensors (V,) of any length.
        num_samples: number of samples that the values come from.
        l0: wanted number of values per sample.

    Raises:
        TypeError: ``l0`` is not a number.
        ValueError: there is no such threshold.

    Examples:
        >>> threshold_for_l0([torch.tensor([1.0, 4.0]), torch.tensor([2.0])], 2, l0=1.0)
        1.5
    """
    require_number(l0, "l0")
    if not l0 > 0:
        raise ValueError(f"l0: expected a number above 0, got {l0}")
    every = torch.cat([batch.flatten() for batch in values])
    wanted = max(1, round(min(l0 * num_samples, len(every) + 1)))
    if wanted > len(every):
        raise ValueError(
            f"l0: expected at most {len(every) / num_samples:.4g}, the mean number of positive "
            f"pre-activations, got {l0}"
        )
    largest = every.topk(min(wanted + 1, len(every))).values
    last = largest[wanted - 1]
    following = largest[wanted] if len(every) > wanted else last - last.abs()
    # Halfway between them, so that rounding in another batch size changes nothing.
    middle = (last + following) / 2
    theta = float(middle if middle < last else following)
    kept = int((every > theta).sum())
    if abs(kept - l0 * num_samples) > max(0.5, _TOLERANCE * l0 * num_samples):
        raise ValueError(
            f"l0: no threshold gives {l0}, because many pre-activations are equal; the nearest "
            f"found is {kept / num_samples:.4g}"
        )
    return theta


@torch.no_grad()
def k_robustness(
    sae: SAE,
    features: Tensor | FeatureSet,
    ks: Sequence[int] | None = None,
    *,
    normalize: bool | None = None,
) -> dict[int, float]:
    """Return the R² of an SAE that keeps the k' largest latents of each sample, for several k'.

    Args:
        sae: any SAE with ``encode`` and ``decode``; see :func:`with_k`.
        features: a feature set, or (N, d_in).
        ks: the k'. By default a quarter, a half, once, twice and four times the SAE's L0 on these
            features. If the SAE has no pre-activations to choose from, k' ends at its L0.
        normalize: as in :func:`~monoloss_plugin.evaluation.evaluate`.

    Returns:
        R² for each k', in ascending order.

    Raises:
        TypeError: features of another kind, or ``ks`` are not integers.
        ValueError: a k' is below 1 or above what the SAE can choose from; or features that the SAE
            cannot take.

    Source: Jacquier et al. 2026 (arXiv 2606.27321).
    """
    rows = Rows.for_sae(sae, features, normalize)
    l0, most = l0_and_width(sae, rows)
    sae = _original(sae)
    if not _has_pre_activations(sae):
        most = max(1, round(l0))
    if ks is None:
        ks = [k for k in (max(1, round(l0 * share)) for share in _BUDGETS) if k <= most]
    for k in as_list(ks, "ks"):
        require_at_least(1, k, "ks")
        if k > most:
            raise ValueError(f"ks: expected at most {most} for this SAE, got {k}")
    found = {k: R2() for k in sorted(ks)}
    for x in rows.batches():
        for k, r2 in found.items():
            # Encode for each k: SAELens's decode needs what the last encode noted of its inputs.
            reselected = with_k(sae, k)
            r2.update(x, reselected.decode(reselected.encode(x)))
    return {k: r2.compute() for k, r2 in found.items()}


@torch.no_grad()
def effective_latents(
    sae: SAE, features: Tensor | FeatureSet, *, normalize: bool | None = None
) -> float:
    """Return the effective number of latents that carry a sample's code, averaged over samples.

    It is (Σ |a|)² / Σ a², the squared ratio of L1 and L2 norm: k if k latents are equally active,
    near 1 if one holds nearly everything, 0 for a sample without an active latent.

    Args:
        sae: any SAE with ``encode``.
        features: a feature set, or (N, d_in).
        normalize: as in :func:`~monoloss_plugin.evaluation.evaluate`.

    Raises:
        TypeError: features of another kind.
        ValueError: features that the SAE cannot take.

    Source: Jacquier et al. 2026 (arXiv 2606.27321), which penalises L1/L2.
    """
    rows = Rows.for_sae(sae, features, normalize)
    total = 0.0
    for x in rows.batches():
        a = as_rows(sae.encode(x), "sae.encode(features)")
        l1 = torch.linalg.vector_norm(a, 1, dim=1, dtype=torch.float64)
        l2 = torch.linalg.vector_norm(a, 2, dim=1, dtype=torch.float64)
        total += float((l1 / torch.where(l2 > 0, l2, 1.0)).square().sum())
    return total / len(rows)


def _original(sae: SAE) -> SAE:
    """Return the SAE itself: a second selection takes the place of the first."""
    return sae.sae if isinstance(sae, Reselected) else as_sae(sae)


def architecture_of(sae: Any) -> str | None:
    """Return the name of a SAELens SAE's architecture; None for anything else."""
    named = getattr(getattr(sae, "cfg", None), "architecture", None)
    return str(named()) if callable(named) else None


def _has_pre_activations(sae: Any) -> bool:
    # A Reselected shows the cfg of its SAE, and has no hook point.
    known = architecture_of(sae) in _KNOWN and hasattr(sae, "hook_sae_acts_pre")
    return known or isinstance(sae, OtherSAE)


def _candidates(sae: SAE, x: Tensor) -> Tensor:
    """Return what a selection may choose from (B, M): zero or positive, dense."""
    if _has_pre_activations(sae):
        return pre_activations(sae, x)
    return as_rows(sae.encode(x), "sae.encode(features)").relu()


def _keep_largest(candidates: Tensor, k: int) -> Tensor:
    if k > candidates.shape[-1]:
        raise ValueError(f"k: expected at most {candidates.shape[-1]} latents, got {k}")
    kept = candidates.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(candidates).scatter_(-1, kept.indices, kept.values)


def _margins(sae: Any, candidates: Tensor) -> Tensor:
    """Return by how much candidates (B, M) exceed their latent's own threshold, if it has one."""
    return candidates - sae.threshold if architecture_of(sae) == "jumprelu" else candidates


def l0_and_width(sae: SAE, rows: Rows) -> tuple[float, int]:
    """Return the mean number of active latents per sample, and the number of latents."""
    active, width = 0, 0
    for x in rows.batches():
        latents = as_rows(sae.encode(x), "sae.encode(features)")
        active, width = active + int((latents > 0).sum()), latents.shape[1]
    return active / len(rows), width

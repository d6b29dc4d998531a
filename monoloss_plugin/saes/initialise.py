"""Data-point initialisation: the latents of an SAE start as random training samples.

A direction is a sample minus the mean of all samples, scaled to unit length:

    W_dec[k] ∝ d_k,  W_enc = W_decᵀ (up to scale),  b_dec = mean x,
    d_k = unit(blend · unit(x_k - mean x) + (1 - blend) · unit(g_k)),  g_k Gaussian

So every latent starts where there is data, and few are born dead. The idea is Anthropic's and
P. Peigné's; saev blends the directions with random ones. That centring alone keeps latents alive
is explained in arXiv 2605.31518.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from monoloss_plugin._checks import require_at_least, require_flag, require_number
from monoloss_plugin._places import kind_of
from monoloss_plugin.embeddings import unit_rows
from monoloss_plugin.saes.rows import Rows, require_samples

if TYPE_CHECKING:
    from monoloss_plugin.features import FeatureSet

_WEIGHTS = ("W_enc", "W_dec", "b_dec")
_ENCODER_BIASES = ("b_enc", "b_gate", "b_mag")


def data_directions(
    rows: Rows, count: int, *, mean: Tensor, seed: int, blend: float = 1.0
) -> Tensor:
    """Return unit directions (count, d) from random samples minus a point, without replacement.

    Args:
        rows: the samples.
        count: number of directions, at most the number of samples.
        mean: the point (d,) to subtract.
        seed: of the samples and of the random directions.
        blend: share of the sample in a direction; the rest is a random direction.

    Raises:
        ValueError: there are fewer samples than directions.
    """
    require_samples(rows, count)
    directions = unit_directions(rows.sample(count, seed) - mean)
    if blend == 1:
        return directions
    generator = torch.Generator().manual_seed(seed)
    random = unit_directions(
        torch.randn(count, rows.width, generator=generator, dtype=torch.float64)
    )
    return unit_directions(blend * directions + (1 - blend) * random.to(directions))


@torch.no_grad()
def init_from_data(
    sae: Any,
    features: Tensor | FeatureSet,
    *,
    seed: int = 0,
    center: bool = True,
    blend: float = 1.0,
    normalize: bool | None = None,
) -> None:
    """Start the latents of an untrained SAE as training samples, in place.

    It sets the directions of ``W_dec`` and ``W_enc``, and with ``center`` also ``b_dec``. If the
    SAE does not subtract ``b_dec`` from its input, ``b_enc`` does so instead. Norms, thresholds
    and everything else stay as the SAE had them.

    Args:
        sae: a SAELens training SAE before its training, or any module with ``W_enc`` (d, M),
            ``W_dec`` (M, d), ``b_dec`` (d,), and ``b_enc`` (M,) if it does not subtract ``b_dec``.
        features: training features: a feature set, or (N, d) with N >= M.
        seed: of the choice of samples.
        center: subtract the mean of the features from samples, and make it ``b_dec``. If you leave
            it out, directions are the samples themselves, and ``b_dec`` stays.
        blend: share of the sample in each direction, above 0; the rest is a random direction.
        normalize: scale features to unit norm. By default yes for a feature set, as
            ``FeatureBatches`` does, and no for a tensor.

    Raises:
        TypeError: an SAE without these weights, features of another kind, or an option of the wrong
            type.
        ValueError: features of another width; fewer samples than latents; a ``blend`` that is not
            above 0 and at most 1; NaN or infinite features; an SAE with layer norm or whitening; or
            one that reconstructs something else than its input.

    Examples:
        >>> from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
        >>> sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=4, d_sae=8, k=2))
        >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
        >>> init_from_data(sae, x)
        >>> bool(torch.allclose(sae.b_dec, x.mean(0)))
        True

    Source: proposed by Anthropic and by P. Peigné; see the module.
    """
    _require_autoencoder(sae)
    require_at_least(0, seed, "seed")
    require_flag(center, "center")
    require_number(blend, "blend")
    if not 0 < blend <= 1:
        raise ValueError(f"blend: expected above 0 and at most 1, got {blend}")
    if normalize is None:
        normalize = hasattr(features, "every_row")
    require_flag(normalize, "normalize")
    rows = Rows.of(features, normalize, sae.W_dec.device)
    if rows.width != sae.W_dec.shape[1]:
        raise ValueError(
            f"features: expected width {sae.W_dec.shape[1]} as the SAE's, got {rows.width}"
        )
    rows, scale = _as_the_encoder_sees_them(rows, sae)
    mean = rows.mean() if center else sae.b_dec.new_zeros(rows.width, dtype=torch.float64)
    directions = data_directions(rows, len(sae.W_dec), mean=mean, seed=seed, blend=blend)
    for weight in (sae.W_dec, sae.W_enc.T):
        weight.copy_(directions * weight.norm(dim=1, keepdim=True))
    if not center:
        return
    mean = (scale * mean).to(sae.b_dec)
    sae.b_dec.copy_(mean)
    if not getattr(getattr(sae, "cfg", None), "apply_b_dec_to_input", False):
        for name in _ENCODER_BIASES:
            if hasattr(sae, name):
                getattr(sae, name).copy_(-mean @ sae.W_enc)


def _require_autoencoder(sae: Any) -> None:
    if not all(isinstance(getattr(sae, name, None), Tensor) for name in _WEIGHTS):
        raise TypeError(
            f"sae: expected a SAELens training SAE, or a module with {', '.join(_WEIGHTS)}, got "
            f"{kind_of(sae)}"
        )
    if sae.W_enc.shape != sae.W_dec.T.shape or hasattr(getattr(sae, "cfg", None), "d_out"):
        raise ValueError(
            "sae: it reconstructs something else than its input, so its decoder cannot start from "
            "its input's samples"
        )


def _as_the_encoder_sees_them(rows: Rows, sae: Any) -> tuple[Rows, float]:
    """Return rows, and the number to multiply them by, as the SAE will normalise its input."""
    kind = getattr(getattr(sae, "cfg", None), "normalize_activations", "none")
    if kind == "none":
        return rows, 1.0
    if kind == "constant_norm_rescale":  # every sample gets the norm sqrt(d)
        return replace(rows, unit_norm=True), math.sqrt(rows.width)
    if kind == "expected_average_only_in":  # the norm is sqrt(d) on average
        total = sum(float(x.norm(dim=1).double().sum()) for x in rows.batches())
        return rows, math.sqrt(rows.width) * len(rows) / total
    raise ValueError(
        f"sae: init_from_data cannot follow normalize_activations={kind!r}; use "
        "'none' with features of unit norm, 'constant_norm_rescale' or 'expected_average_only_in'"
    )


def unit_directions(directions: Tensor) -> Tensor:
    """Return directions (n, d) of unit length, float64."""
    return unit_rows(directions, torch.float64)[0]

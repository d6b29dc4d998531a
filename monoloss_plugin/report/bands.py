"""The samples that show a latent over its whole range of activation."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from monoloss_plugin._checks import require_at_least


class ActivationBands(NamedTuple):
    """Samples that activate a latent, strongest first within each band."""

    top: Tensor
    middle: Tensor
    bottom: Tensor
    num_active: int
    """Number of samples that activate the latent."""


def activation_bands(activations: Tensor, count: int = 5) -> ActivationBands:
    """Return the samples that activate a latent most, in the middle, and least.

    Only positive activations count. If there are fewer than three times ``count``, the bands
    overlap. If there are fewer than ``count``, the bands are shorter.

    Args:
        activations: (N,), of one latent.
        count: samples per band.

    Raises:
        ValueError: activations of more than one latent, or count below 1.

    Examples:
        >>> import torch
        >>> bands = activation_bands(torch.tensor([0.0, 3.0, 1.0, 2.0]), count=1)
        >>> bands.top.tolist(), bands.middle.tolist(), bands.bottom.tolist()
        ([1], [3], [2])

    Source: Nasiri-Sarvi et al. 2026, section 4.1, figures 3 and 5.
    """
    if activations.ndim != 1:
        raise ValueError(
            f"activations: expected (N,) of one latent, got shape {tuple(activations.shape)}"
        )
    require_at_least(1, count, "count")
    num_active = int((activations > 0).sum())
    order = activations.argsort(descending=True, stable=True)[:num_active]
    start = max(0, (num_active - count) // 2)
    bottom = order[max(0, num_active - count) :]
    return ActivationBands(order[:count], order[start : start + count], bottom, num_active)

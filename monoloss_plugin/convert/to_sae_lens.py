"""A SAELens SAE from tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monoloss_plugin._checks import require_finite
from monoloss_plugin._optional import missing_extra

try:
    from sae_lens import SAE
    from sae_lens.registry import get_sae_class
except ModuleNotFoundError as error:
    raise missing_extra(error, "sae-lens") from error


def sae_of(
    architecture: str,
    tensors: dict[str, Tensor],
    *,
    converted_from: str,
    terms: dict[str, Any] | None = None,
    **settings: Any,
) -> SAE[Any]:
    """Return an inference SAE of SAELens with these tensors.

    Args:
        architecture: ``standard``, ``topk``, ``jumprelu`` or ``gated``.
        tensors: by SAELens's names, such as ``W_enc`` (d_in, d_sae) and ``W_dec`` (d_sae, d_in).
        converted_from: the library that they come from, for the SAE's metadata.
        terms: loss terms it was trained with, for the SAE's metadata.
        settings: of the architecture's configuration, such as ``k``.

    Raises:
        ValueError: a tensor that is not finite.
    """
    for key, tensor in tensors.items():
        require_finite(tensor, f"source: {key}")
    sae_class, config_class = get_sae_class(architecture)
    d_sae, d_in = tensors["W_dec"].shape
    config = config_class(d_in=d_in, d_sae=d_sae, device="meta", **settings)
    config.metadata["monoloss"] = {"converted_from": converted_from, "terms": terms or {}}
    sae: SAE[Any] = sae_class(config)
    sae.cfg.device = "cpu"
    sae.load_state_dict({k: t.clone() for k, t in tensors.items()}, strict=True, assign=True)
    return sae.to(torch.device("cpu")).eval()


def just_below(threshold: Tensor) -> Tensor:
    """Return the next smaller numbers: SAELens's ``>`` lets pass what ``>=`` of the given does."""
    return torch.nextafter(threshold, torch.full_like(threshold, -torch.inf))

"""Build a SAELens SAE from tensors."""

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


def build_sae(
    architecture: str,
    tensors: dict[str, Tensor],
    *,
    converted_from: str,
    terms: dict[str, Any] | None = None,
    **settings: Any,
) -> SAE[Any]:
    """Return a SAELens SAE for inference.

    Args:
        architecture: ``standard``, ``topk``, ``jumprelu`` or ``gated``.
        tensors: by SAELens's names, such as ``W_enc`` (d_in, d_sae) and ``W_dec`` (d_sae, d_in).
            ``threshold`` may be one number for all latents.
        converted_from: the library that they come from, for the SAE's metadata.
        terms: the loss terms that the SAE was trained with, for its metadata.
        settings: more settings of the architecture, such as ``k``.

    Raises:
        ValueError: a tensor is not finite, missing, or of another shape.
    """
    for name, tensor in tensors.items():
        require_finite(tensor, f"source: {name}")
    d_sae, d_in = tensors["W_dec"].shape
    sae_class, config_class = get_sae_class(architecture)
    config = config_class(d_in=d_in, d_sae=d_sae, device="meta", **settings)
    config.metadata["monoloss"] = {"converted_from": converted_from, "terms": terms or {}}
    sae: SAE[Any] = sae_class(config)
    sae.cfg.device = "cpu"
    if "threshold" in tensors and not tensors["threshold"].ndim:
        tensors = {**tensors, "threshold": tensors["threshold"].expand(d_sae)}
    own = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    try:
        sae.load_state_dict(own, strict=True, assign=True)
    except RuntimeError as error:  # which lists what is missing or of another shape
        raise ValueError(f"source: {error}") from None
    return sae.to(torch.device("cpu")).eval()

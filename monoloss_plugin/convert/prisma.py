"""SAEs of ViT-Prisma: a folder with ``config.json`` and a state dict."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from monoloss_plugin._places import as_path, require_file
from monoloss_plugin.convert.checkpoint import (
    SAE_LENS,
    build_sae,
    read_checkpoint,
    read_count,
    read_tensors,
)

if TYPE_CHECKING:
    from sae_lens import SAE

_CONFIG = "config.json"
_GATED = {name: name for name in ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag")}


def from_prisma(source: str | os.PathLike[str]) -> SAE[Any]:
    """Convert an SAE of ViT-Prisma.

    Args:
        source: a file with a state dict, such as ``weights.pt``, beside its ``config.json``.

    Returns:
        An SAE with the same latents and reconstruction, for one vector a sample: standard (ReLU or
        TopK) or gated, with or without layer normalisation of the inputs.

    Raises:
        FileNotFoundError: there is no such file, or no ``config.json`` beside it.
        ValueError: SAELens has no such architecture, or the file holds more than tensors and plain
            values. Files that ``save_model`` wrote hold the library's config: save their
            ``state_dict`` alone.
    """
    path = as_path(source, "source")
    require_file(path, "source")
    require_file(path.parent / _CONFIG, "source")
    try:
        config = json.loads((path.parent / _CONFIG).read_text(encoding="utf-8"))
        architecture = config["architecture"]
        activation = config.get("activation_fn_str", "relu")
        normalize = config.get("normalize_activations") or "none"
        k = (config.get("activation_fn_kwargs") or {}).get("k")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"source: {_CONFIG} is not a config of ViT-Prisma") from None
    if normalize not in ("none", "layer_norm") or config.get("is_transcoder"):
        raise ValueError("source: a transcoder, or another normalisation than layer_norm")
    state = read_checkpoint(path)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    settings: dict[str, Any] = {"normalize_activations": normalize}
    match architecture, activation:
        case "standard" | "vanilla", "relu":
            tensors = read_tensors(state, SAE_LENS)
            return build_sae("standard", tensors, converted_from="vit-prisma", **settings)
        case "standard" | "vanilla", "topk":
            tensors = read_tensors(state, SAE_LENS)
            settings["k"] = read_count(k, "k", len(tensors["W_dec"]))
            return build_sae("topk", tensors, converted_from="vit-prisma", **settings)
        case "gated", "relu":
            tensors = read_tensors(state, _GATED, ignored="b_enc")
            return build_sae("gated", tensors, converted_from="vit-prisma", **settings)
    raise ValueError(
        f"source: SAELens has no architecture like {architecture!r} with {activation!r}"
    )

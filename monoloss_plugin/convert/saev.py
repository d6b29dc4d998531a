"""SAEs of ``saev``: a line of JSON, and a state dict after it."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import torch

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

_THRESHOLD = {"threshold": "activation.threshold"}


def from_saev(source: str | os.PathLike[str]) -> SAE[Any]:
    """Convert a checkpoint of saev, ``sae.pt``.

    Args:
        source: the file, of any of the library's schemas that name their activation (2 to 5), or
            of the first, which had ReLU alone.

    Returns:
        An SAE with the latents and reconstruction of the checkpoint's SAE in ``eval`` mode. A TopK
        SAE of saev keeps its k largest latents even where they are negative; here those are 0.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not such a checkpoint, or its BatchTopK has no threshold, as before
            schema 5.
    """
    path = as_path(source, "source")
    require_file(path, "source")
    with path.open("rb") as file:
        line = file.readline()
    activation, params = _activation(line, path.name)
    state = read_checkpoint(path, start=len(line))
    names = SAE_LENS | (_THRESHOLD if activation == "BatchTopK" else {})
    tensors = read_tensors(state, names)
    settings: dict[str, Any] = {"apply_b_dec_to_input": False}
    if activation == "Relu":
        return build_sae("standard", tensors, converted_from="saev", **settings)
    if activation == "TopK":
        settings["k"] = read_count(params.get("top_k"), "top_k", len(tensors["W_dec"]))
        return build_sae("topk", tensors, converted_from="saev", **settings)
    tensors["threshold"] = torch.as_tensor(tensors["threshold"]).clamp(min=0)
    return build_sae("jumprelu", tensors, converted_from="saev", **settings)


def _activation(line: bytes, name: str) -> tuple[str, dict[str, Any]]:
    """Return the activation that a checkpoint's first line names, and its parameters."""
    try:
        header = json.loads(line)
        if "schema" not in header and "exp_factor" in header:
            return "Relu", {}
        if header["schema"] not in (2, 3, 4, 5):
            raise ValueError
        activation = header["cfg"]["activation"]
        found, params = activation["cls"], activation["params"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"source: {name} does not begin with a line of JSON that says its activation, as "
            "saev's checkpoints of schema 2 to 5 do"
        ) from None
    if found not in ("Relu", "TopK", "BatchTopK") or not isinstance(params, dict):
        raise ValueError(f"source: expected the activation Relu, TopK or BatchTopK, got {found!r}")
    return found, params

"""SAEs of EleutherAI's ``sparsify``: a folder with ``cfg.json`` and ``sae.safetensors``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from monoloss_plugin._places import as_path, kind_of, require_file
from monoloss_plugin.convert.checkpoint import build_sae, read_count, read_tensors

if TYPE_CHECKING:
    from sae_lens import SAE

_CONFIG, _WEIGHTS, _TERMS = "cfg.json", "sae.safetensors", "monoloss_terms.json"
_NAMES = {
    "W_enc": "encoder.weight.T",
    "W_dec": "W_dec",
    "b_enc": "encoder.bias",
    "b_dec": "b_dec",
}
"""For each of SAELens's names, the name in a state dict."""


def from_sparsify(source: nn.Module | str | os.PathLike[str]) -> SAE[Any]:
    """Convert a TopK SAE of sparsify. A module does not change.

    Args:
        source: a ``SparseCoder``, or the folder of one, with ``cfg.json`` and ``sae.safetensors``.

    Returns:
        An SAE with the latents and reconstruction of the source. If our adapter trained it, the
        folder says with which losses, and the SAE's metadata too.

    Raises:
        TypeError: the source is neither a ``SparseCoder`` nor a path.
        FileNotFoundError: there is no such folder or file.
        ValueError: SAELens has no such architecture (groupmax, a transcoder, a skip connection), or
            the files are not those of a ``SparseCoder``.
    """
    terms: dict[str, Any] = {}
    if isinstance(source, nn.Module):
        if "SparseCoder" not in [one.__name__ for one in type(source).__mro__]:
            raise TypeError(
                f"source: expected a SparseCoder of sparsify or a folder, got {kind_of(source)}"
            )
        config = dict(vars(source.cfg))
        state = {name: tensor.cpu() for name, tensor in source.state_dict().items()}
    else:
        folder = as_path(source, "source", "a SparseCoder of sparsify or a folder")
        config = _read_json(folder / _CONFIG)
        state = _read_weights(folder / _WEIGHTS)
        if (folder / _TERMS).is_file():
            terms = _read_json(folder / _TERMS).get("terms", {})
    _require_supported(config)
    tensors = read_tensors(state, _NAMES)
    k = read_count(config.get("k"), "k", len(tensors["W_dec"]))
    return build_sae("topk", tensors, converted_from="sparsify", terms=terms, k=k)


def _require_supported(config: dict[str, Any]) -> None:
    """Raise ValueError if SAELens has no SAE that computes the same."""
    activation = config.get("activation", "topk")  # older versions know no other
    unsupported = {
        f"the activation {activation!r}": activation != "topk",
        "signed latents": config.get("signed"),
        "transcoders that keep the k largest latents": config.get("transcode"),
        "a skip connection in a TopK SAE": config.get("skip_connection"),
    }
    for what, given in unsupported.items():
        if given:
            raise ValueError(f"source: SAELens has no architecture with {what}")


def _read_json(path: Path) -> dict[str, Any]:
    require_file(path, "source")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"source: {path.name} is not a JSON object")
    return content


def _read_weights(path: Path) -> dict[str, Tensor]:
    require_file(path, "source")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"source: {path.name} is not a safetensors file: {error}") from error

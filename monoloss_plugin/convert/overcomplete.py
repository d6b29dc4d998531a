"""SAEs of ``overcomplete``: modules, or their state dicts. The library has no format of its own."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from monoloss_plugin._checks import require_text
from monoloss_plugin._places import as_path
from monoloss_plugin.convert.checkpoint import build_sae, read_checkpoint, read_count, read_tensors

if TYPE_CHECKING:
    from sae_lens import SAE

_KINDS = ("BatchTopKSAE", "TopKSAE", "JumpSAE", "SAE")
_NAMES = {
    "W_enc": "encoder.final_block.0.weight.T",
    "W_dec": "dictionary._weights",
    "b_enc": "encoder.final_block.0.bias",
    "multiplier": "dictionary.multiplier",
}
"""For each of SAELens's names, and the dictionary's multiplier, the name in a state dict."""
_UNSUPPORTED = ("QSAE", "MpSAE", "OMPSAE")


def from_overcomplete(
    source: nn.Module | str | os.PathLike[str],
    *,
    sae_class: str | None = None,
    top_k: int | None = None,
    threshold: float | None = None,
) -> SAE[Any]:
    """Convert a trained SAE of overcomplete. A module does not change.

    Args:
        source: an ``SAE``, ``TopKSAE``, ``BatchTopKSAE``, ``JumpSAE`` or one of their archetypal
            forms, with a linear encoder, which may have batch normalisation or be tied to its
            dictionary. Or a file with its state dict, for the library's defaults: a plain linear
            encoder and a dictionary of l2 norm. The other arguments say what a state dict does not
            keep.
        sae_class: for a state dict, the module's class.
        top_k: for the state dict of a TopKSAE.
        threshold: for the state dict of a BatchTopKSAE, the module's ``running_threshold``.

    Returns:
        An SAE with the module's codes and reconstruction in ``eval`` mode. It takes (N, d_in): if
        the module's inputs have more dimensions, flatten their tokens or pixels to rows.

    Raises:
        TypeError: the source is neither a module of overcomplete nor a file.
        FileNotFoundError: there is no such file.
        ValueError: SAELens has no such architecture, a BatchTopKSAE has no threshold, or the file
            is not a state dict of the class.
    """
    if isinstance(source, nn.Module):
        classes = type(source).__mro__
        kind = _kind([c.__name__ for c in classes if c.__module__.startswith("overcomplete.")])
        # In eval mode the dictionary is normalised and fused; a module in training writes to it.
        frozen: Any = copy.deepcopy(source).cpu().eval()
        tensors = _read_module(frozen, kind)
        top_k = getattr(frozen, "top_k", None)
        threshold = getattr(frozen, "running_threshold", None)
    else:
        require_text(sae_class, "sae_class")
        path = as_path(source, "source", "an SAE of overcomplete or a file")
        kind = _kind([sae_class or "none given"])
        tensors = _read_state(path, kind)
    if kind == "JumpSAE":
        tensors["threshold"] = tensors["threshold"].exp()
    elif kind == "BatchTopKSAE":
        if threshold is None:
            raise ValueError(
                "threshold: a BatchTopKSAE needs the module's running_threshold. A state dict does "
                "not keep it, and a module has one only after it ran on training data"
            )
        tensors["threshold"] = torch.as_tensor(threshold).detach().float().cpu()
    tensors["b_dec"] = torch.zeros(tensors["W_dec"].shape[1])
    if kind == "TopKSAE":
        k = read_count(top_k, "top_k", len(tensors["W_dec"]))
        return build_sae("topk", tensors, converted_from="overcomplete", k=k)
    if "threshold" not in tensors:
        return build_sae("standard", tensors, converted_from="overcomplete")
    # overcomplete keeps codes >= the threshold, SAELens those above it: take the number below.
    below = torch.tensor(-torch.inf)
    tensors["threshold"] = torch.nextafter(tensors["threshold"], below)
    return build_sae("jumprelu", tensors, converted_from="overcomplete")


def _kind(names: list[str]) -> str:
    """Return which kind of SAE a class is, from its own and its bases' names."""
    if unsupported := [name for name in names if name in _UNSUPPORTED]:
        raise ValueError(
            f"source: SAELens has no architecture like overcomplete's {unsupported[0]}"
        )
    for name in names:
        kind = name.removeprefix("RA")  # an archetypal form
        if kind in _KINDS:
            return kind
    got = names[0] if names else "a module that is not overcomplete's"
    raise ValueError(f"sae_class: expected one of {', '.join(_KINDS)}, got {got}")


def _read_module(frozen: Any, kind: str) -> dict[str, Tensor]:
    """Return a module's tensors by SAELens's names."""
    dictionary = frozen.get_dictionary().detach().float()
    weight, bias = _read_encoder(frozen.encoder, dictionary)
    tensors = {"W_enc": weight.T, "W_dec": dictionary, "b_enc": bias}
    if kind == "JumpSAE":
        tensors["threshold"] = frozen.thresholds.detach().float()
    return tensors


def _read_state(path: Path, kind: str) -> dict[str, Tensor]:
    """Return a state dict's tensors by SAELens's names."""
    names = _NAMES | ({"threshold": "thresholds"} if kind == "JumpSAE" else {})
    tensors = read_tensors(read_checkpoint(path), names)
    dictionary = tensors["W_dec"]
    dictionary = dictionary / (dictionary.norm(dim=1, keepdim=True) + 1e-8)
    tensors["W_dec"] = dictionary * tensors.pop("multiplier").exp()
    return tensors


def _read_encoder(encoder: Any, dictionary: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight (M, d_in) and bias (M,) of a linear encoder that a ReLU follows."""
    kind = type(encoder).__name__
    if kind == "TieableEncoder":
        weight = dictionary if encoder.tied_to is not None else encoder.weight.detach().float()
        bias = encoder.bias
        return weight, torch.zeros(len(weight)) if bias is None else bias.detach().float()
    if kind == "MLPEncoder" and not len(encoder.mlp_blocks):
        linear, norm = encoder.final_block
        if not isinstance(encoder.final_activation, nn.ReLU):
            after = type(encoder.final_activation).__name__
            raise ValueError(f"source: SAELens's encoders end in a ReLU, this one in {after}")
        if isinstance(norm, nn.BatchNorm1d) and norm.affine and norm.track_running_stats:
            linear = nn.utils.fusion.fuse_linear_bn_eval(linear, norm)
            norm = nn.Identity()
        if isinstance(norm, nn.Identity):
            return linear.weight.detach().float(), linear.bias.detach().float()
        kind = f"MLPEncoder with {type(norm).__name__}"
    raise ValueError(
        f"source: SAELens's encoders are linear, and this one is a {kind} with several layers or "
        "a normalisation that cannot be folded in"
    )

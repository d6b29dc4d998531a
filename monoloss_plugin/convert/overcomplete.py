"""SAEs of ``overcomplete``: live modules, or their state dicts; it has no format of its own."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from monoloss_plugin._checks import require_text
from monoloss_plugin._optional import missing_extra
from monoloss_plugin._places import as_path
from monoloss_plugin.convert.checkpoint import Weights, read_checkpoint, whole
from monoloss_plugin.convert.to_sae_lens import just_below, sae_of

try:
    from sae_lens import SAE
except ModuleNotFoundError as error:
    raise missing_extra(error, "sae-lens") from error

_LIBRARY = "overcomplete"
_KINDS = ("BatchTopKSAE", "TopKSAE", "JumpSAE", "SAE")
_NO_LIKE = ("QSAE", "MpSAE", "OMPSAE")


@dataclass(frozen=True)
class _Parts:
    """What an SAE of overcomplete computes with in ``eval`` mode."""

    dictionary: Tensor
    """(M, d_in)."""
    encoder: Tensor
    """(M, d_in)."""
    bias: Tensor
    """(M,)."""
    thresholds: Tensor | None = None
    """Codes from it on pass; for the two kinds that have one."""


def from_overcomplete(
    source: nn.Module | str | os.PathLike[str],
    *,
    sae_class: str | None = None,
    top_k: int | None = None,
    threshold: float | None = None,
) -> SAE[Any]:
    """Convert a trained SAE of overcomplete; a module stays as it is.

    Args:
        source: an ``SAE``, ``TopKSAE``, ``BatchTopKSAE``, ``JumpSAE`` or one of their archetypal
            forms, with a linear encoder (also with batch normalisation, or tied to its dictionary).
            Or a file of its state dict, for a plain linear encoder and a dictionary of l2 norm
            (the library's defaults); what a state dict does not keep, the other arguments say.
        sae_class: of a state dict, its module's class.
        top_k: of a TopKSAE's state dict.
        threshold: of a BatchTopKSAE's state dict, the module's ``running_threshold``.

    Returns:
        An SAE with the module's codes and reconstruction in ``eval`` mode, for inputs (N, d_in):
        tokens and pixels of an input that has more dimensions are its rows.

    Raises:
        TypeError: neither a module of overcomplete nor a file.
        FileNotFoundError: no such file.
        ValueError: one that SAELens has no like of, a BatchTopKSAE without its threshold, or a file
            that is no state dict of the class.
    """
    if isinstance(source, nn.Module):
        kind = _require_kind(
            [c.__name__ for c in type(source).__mro__ if c.__module__.startswith("overcomplete.")]
        )
        # In eval mode the dictionary is normalised and fused; in training mode, asking writes it.
        frozen: Any = copy.deepcopy(source).cpu().eval()
        parts = _of_module(frozen, kind)
        top_k = getattr(frozen, "top_k", None)
    else:
        require_text(sae_class, "sae_class")
        path = as_path(source, "source", "an SAE of overcomplete or a file")
        kind = _require_kind([sae_class or "none given"])
        parts = _of_state(path, kind, threshold)
    tensors = {
        "W_enc": parts.encoder.T.contiguous(),
        "W_dec": parts.dictionary.contiguous(),
        "b_enc": parts.bias,
        "b_dec": torch.zeros(parts.dictionary.shape[1]),
    }
    if kind == "TopKSAE":
        k = whole(top_k, "top_k", len(parts.dictionary))
        return sae_of("topk", tensors, converted_from=_LIBRARY, k=k)
    if parts.thresholds is None:
        return sae_of("standard", tensors, converted_from=_LIBRARY)
    tensors["threshold"] = just_below(parts.thresholds)
    return sae_of("jumprelu", tensors, converted_from=_LIBRARY)


def _require_kind(names: list[str]) -> str:
    """Return which of the kinds a class is, from its own and its bases' names."""
    if found := [name for name in names if name in _NO_LIKE]:
        raise ValueError(f"source: SAELens has no architecture like overcomplete's {found[0]}")
    for name in names:
        kind = name.removeprefix("RA")
        if kind in _KINDS:
            return kind
    got = names[0] if names else "a module that is not overcomplete's"
    raise ValueError(f"sae_class: expected one of {', '.join(_KINDS)}, got {got}")


def _of_module(frozen: Any, kind: str) -> _Parts:
    dictionary = frozen.get_dictionary().detach().float()
    encoder, bias = _encoder(frozen.encoder, dictionary)
    if kind == "JumpSAE":
        return _Parts(dictionary, encoder, bias, frozen.thresholds.detach().float().exp())
    if kind == "BatchTopKSAE":
        if frozen.running_threshold is None:
            raise ValueError(
                "source: this BatchTopKSAE has no running_threshold yet; run it on training data"
            )
        running = torch.as_tensor(frozen.running_threshold).detach().float().cpu()
        return _Parts(dictionary, encoder, bias, running.expand_as(bias).contiguous())
    return _Parts(dictionary, encoder, bias)


def _of_state(path: Path, kind: str, threshold: float | None) -> _Parts:
    weights = Weights(read_checkpoint(path), path.name)
    dictionary = weights.take_matrix("dictionary._weights")
    dictionary = dictionary / (dictionary.norm(dim=1, keepdim=True) + 1e-8)
    dictionary = dictionary * weights.take("dictionary.multiplier", shape=()).exp()
    encoder = weights.take("encoder.final_block.0.weight", shape=tuple(dictionary.shape))
    bias = weights.take("encoder.final_block.0.bias", shape=(len(dictionary),))
    thresholds = None
    if kind == "JumpSAE":
        thresholds = weights.take("thresholds", shape=tuple(bias.shape)).exp()
    elif kind == "BatchTopKSAE":
        if threshold is None:
            raise ValueError(
                "threshold: a BatchTopKSAE's state dict does not keep it; give the module's "
                "running_threshold"
            )
        thresholds = torch.full_like(bias, threshold)
    weights.finish()
    return _Parts(dictionary, encoder, bias, thresholds)


def _encoder(encoder: Any, dictionary: Tensor) -> tuple[Tensor, Tensor]:
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
        weight, bias = linear.weight.detach().float(), linear.bias.detach().float()
        if isinstance(norm, nn.Identity):
            return weight, bias
        if isinstance(norm, nn.BatchNorm1d) and norm.running_var is not None:
            scale = _scale(norm)
            shift = torch.zeros_like(scale) if norm.bias is None else norm.bias.detach().float()
            return weight * scale[:, None], (bias - norm.running_mean) * scale + shift
        kind = f"MLPEncoder with {type(norm).__name__}"
    raise ValueError(
        f"source: SAELens's encoders are linear, and this one is a {kind} of several layers or a "
        "normalisation that cannot be folded in"
    )


def _scale(norm: nn.BatchNorm1d) -> Tensor:
    assert norm.running_var is not None
    scale = (norm.running_var.float() + norm.eps).rsqrt()
    return scale if norm.weight is None else scale * norm.weight.detach().float()

"""Dictionaries of ``dictionary_learning``: a folder with ``ae.pt`` and ``config.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monoloss_plugin._checks import require_text
from monoloss_plugin._optional import missing_extra
from monoloss_plugin._places import as_path
from monoloss_plugin.convert.checkpoint import Weights, read_checkpoint, whole
from monoloss_plugin.convert.to_sae_lens import sae_of

try:
    from sae_lens import SAE
except ModuleNotFoundError as error:
    raise missing_extra(error, "sae-lens") from error

_WEIGHTS, _CONFIG = "ae.pt", "config.json"


def from_dictionary_learning(
    source: str | os.PathLike[str], *, dict_class: str | None = None
) -> SAE[Any]:
    """Convert a dictionary that ``dictionary_learning`` (or sae-for-vlm, which uses it) has saved.

    Args:
        source: the folder, or its ``ae.pt``.
        dict_class: the dictionary's class, such as ``"BatchTopKSAE"``; by default as
            ``config.json`` says.

    Returns:
        An SAE with the latents and reconstruction that the dictionary has when the library loads
        it: with the threshold where it stores one (BatchTopK, Matryoshka), and a standard one with
        a decoder of unit norm.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: a class that SAELens has no like of, tensors that do not fit it, or a file that
            holds more than tensors and plain values.
    """
    require_text(dict_class, "dict_class")
    path = as_path(source, "source")
    path = path / _WEIGHTS if path.is_dir() else path
    config = _config(path.parent / _CONFIG)
    name = dict_class or config.get("dict_class")
    if name is None:
        raise ValueError(f"source: no {_CONFIG} beside it says trainer.dict_class; give dict_class")
    if name not in _CLASSES:
        raise ValueError(f"dict_class: expected one of {', '.join(_CLASSES)}, got {name!r}")
    weights = Weights(read_checkpoint(path), path.name)
    architecture, tensors, settings = _CLASSES[name](weights)
    weights.finish()
    if architecture == "topk":
        k = settings.get("k", config.get("k"))
        settings["k"] = whole(k, "k", len(tensors["W_dec"]))
    return sae_of(architecture, tensors, converted_from="dictionary_learning", **settings)


_Parts = tuple[str, dict[str, Tensor], dict[str, Any]]
"""Architecture, tensors and settings in SAELens's terms."""


def _config(path: Path) -> dict[str, Any]:
    """Return what a config says of its trainer; nothing where there is none."""
    if not path.is_file():
        return {}
    try:
        trainer = json.loads(path.read_text(encoding="utf-8"))["trainer"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"source: {path.name} says nothing of a trainer") from error
    if not isinstance(trainer, dict):
        raise ValueError(f"source: {path.name} says nothing of a trainer")
    return trainer


def _linear(weights: Weights, b_enc: str, b_dec: str) -> dict[str, Tensor]:
    encoder = weights.take_matrix("encoder.weight")
    d_sae, d_in = encoder.shape
    return {
        "W_enc": encoder.T.contiguous(),
        "W_dec": weights.take("decoder.weight", shape=(d_in, d_sae)).T.contiguous(),
        "b_enc": weights.take(b_enc, shape=(d_sae,)),
        "b_dec": weights.take(b_dec, shape=(d_in,)),
    }


def _standard(weights: Weights) -> _Parts:
    tensors = _linear(weights, "encoder.bias", "bias")
    # The library makes the decoder's norms 1 when it loads this class, and the latents larger.
    norms = tensors["W_dec"].norm(dim=1)
    if not torch.allclose(norms, torch.ones_like(norms)):
        tensors["W_dec"] = tensors["W_dec"] / norms[:, None]
        tensors["W_enc"] = tensors["W_enc"] * norms
        tensors["b_enc"] = tensors["b_enc"] * norms
    return "standard", tensors, {}


def _standard_of_april(weights: Weights) -> _Parts:
    tensors = _linear(weights, "encoder.bias", "decoder.bias")
    return "standard", tensors, {"apply_b_dec_to_input": False}


def _gated(weights: Weights) -> _Parts:
    encoder = weights.take_matrix("encoder.weight")
    d_sae, d_in = encoder.shape
    tensors = {
        "W_enc": encoder.T.contiguous(),
        "W_dec": weights.take("decoder.weight", shape=(d_in, d_sae)).T.contiguous(),
        "b_dec": weights.take("decoder_bias", shape=(d_in,)),
        "b_gate": weights.take("gate_bias", shape=(d_sae,)),
        "b_mag": weights.take("mag_bias", shape=(d_sae,)),
        "r_mag": weights.take("r_mag", shape=(d_sae,)),
    }
    return "gated", tensors, {}


def _topk(weights: Weights) -> _Parts:
    if "threshold" in weights:  # of older checkpoints it is missing; the default encode ignores it
        weights.take("threshold", shape=())
    stored = {"k": weights.take_number("k")} if "k" in weights else {}
    return "topk", _linear(weights, "encoder.bias", "b_dec"), stored


def _batchtopk(weights: Weights) -> _Parts:
    weights.drop("k")
    threshold = weights.take("threshold", shape=())
    tensors = _linear(weights, "encoder.bias", "b_dec")
    tensors["threshold"] = threshold.expand_as(tensors["b_enc"]).contiguous()
    return "jumprelu", tensors, {}


def _matryoshka(weights: Weights) -> _Parts:
    weights.drop("k")
    weights.drop("group_sizes")
    threshold = weights.take("threshold", shape=())
    tensors = weights.take_plain()
    tensors["threshold"] = threshold.expand_as(tensors["b_enc"]).contiguous()
    return "jumprelu", tensors, {}


def _jumprelu(weights: Weights) -> _Parts:
    tensors = weights.take_plain()
    tensors["threshold"] = weights.take("threshold", shape=tuple(tensors["b_enc"].shape))
    return "jumprelu", tensors, {"apply_b_dec_to_input": False}


_CLASSES: dict[str, Callable[[Weights], _Parts]] = {
    "AutoEncoder": _standard,
    "AutoEncoderNew": _standard_of_april,
    "GatedAutoEncoder": _gated,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batchtopk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
    "JumpReluAutoEncoder": _jumprelu,
}

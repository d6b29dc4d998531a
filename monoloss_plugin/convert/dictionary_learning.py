"""Dictionaries of ``dictionary_learning``: a folder with ``ae.pt`` and ``config.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from monoloss_plugin._optional import missing_extra
from monoloss_plugin.convert.checkpoint import Weights, read_checkpoint
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
        An SAE with the latents and reconstruction that the dictionary has outside training: where
        it stores a threshold for that (BatchTopK, Matryoshka), with the threshold.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: a class that SAELens has no like of, tensors that do not fit it, or a file that
            holds more than tensors and plain values.
    """
    path = Path(source)
    path = path / _WEIGHTS if path.is_dir() else path
    name = dict_class or _class_in(path.parent / _CONFIG)
    if name not in _CLASSES:
        raise ValueError(f"dict_class: expected one of {', '.join(_CLASSES)}, got {name!r}")
    weights = Weights(read_checkpoint(path), path.name)
    architecture, tensors, settings = _CLASSES[name](weights)
    weights.finish()
    return sae_of(architecture, tensors, converted_from="dictionary_learning", **settings)


_Parts = tuple[str, dict[str, Tensor], dict[str, Any]]
"""Architecture, tensors and settings in SAELens's terms."""


def _class_in(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(
            f"source: no {_CONFIG} in {path.parent}, so dict_class must say what it is"
        )
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["trainer"]["dict_class"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"source: {path.name} says no trainer.dict_class") from error


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
    return "standard", _linear(weights, "encoder.bias", "bias"), {}


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
    k = int(weights.take("k", shape=()))
    return "topk", _linear(weights, "encoder.bias", "b_dec"), {"k": k}


def _batchtopk(weights: Weights) -> _Parts:
    weights.take("k", shape=())
    threshold = weights.take("threshold", shape=())
    tensors = _linear(weights, "encoder.bias", "b_dec")
    tensors["threshold"] = threshold.expand_as(tensors["b_enc"]).contiguous()
    return "jumprelu", tensors, {}


def _matryoshka(weights: Weights) -> _Parts:
    weights.take("k", shape=())
    weights.take("group_sizes")
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

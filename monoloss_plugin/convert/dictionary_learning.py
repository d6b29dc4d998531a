"""Dictionaries of ``dictionary_learning``: a folder with ``ae.pt`` and ``config.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from monoloss_plugin._checks import require_text
from monoloss_plugin._places import as_path
from monoloss_plugin.convert.building import build_sae
from monoloss_plugin.convert.checkpoint import Weights, read_checkpoint, read_count

if TYPE_CHECKING:
    from sae_lens import SAE

_WEIGHTS, _CONFIG = "ae.pt", "config.json"


def from_dictionary_learning(
    source: str | os.PathLike[str], *, dict_class: str | None = None
) -> SAE[Any]:
    """Convert a dictionary of ``dictionary_learning``, or of sae-for-vlm, which uses that library.

    Args:
        source: the folder, or its ``ae.pt``.
        dict_class: the dictionary's class, such as ``"BatchTopKSAE"``; by default the class that
            ``config.json`` names.

    Returns:
        An SAE with the latents and reconstruction of the dictionary as the library loads it:
        BatchTopK and Matryoshka use the stored threshold, and a standard one has a decoder of unit
        norm.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: SAELens has no such architecture, the tensors do not fit the class, or the file
            holds more than tensors and plain values.
    """
    require_text(dict_class, "dict_class")
    path = as_path(source, "source")
    path = path / _WEIGHTS if path.is_dir() else path
    config = _trainer_config(path.parent / _CONFIG)
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
        settings["k"] = read_count(k, "k", len(tensors["W_dec"]))
    return build_sae(architecture, tensors, converted_from="dictionary_learning", **settings)


class _Parts(NamedTuple):
    """A dictionary in SAELens's terms."""

    architecture: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any]


def _trainer_config(path: Path) -> dict[str, Any]:
    """Return what a config says about the trainer; nothing if there is no config."""
    if not path.is_file():
        return {}
    try:
        trainer = json.loads(path.read_text(encoding="utf-8"))["trainer"]
    except (ValueError, KeyError, TypeError):
        trainer = None
    if not isinstance(trainer, dict):
        raise ValueError(f"source: {path.name} says nothing of a trainer")
    return trainer


def _linear(weights: Weights, **vectors: str) -> dict[str, Tensor]:
    encoder = weights.take_matrix("encoder.weight")
    decoder = weights.take("decoder.weight", shape=tuple(encoder.T.shape)).T
    return {"W_enc": encoder.T, "W_dec": decoder, **weights.take_vectors(decoder, **vectors)}


def _standard(weights: Weights) -> _Parts:
    tensors = _linear(weights, b_enc="encoder.bias", b_dec="bias")
    # When the library loads this class, it scales the decoder's rows to norm 1, and the latents up.
    norms = tensors["W_dec"].norm(dim=1)
    if not torch.allclose(norms, torch.ones_like(norms)):
        tensors["W_dec"] = tensors["W_dec"] / norms[:, None]
        tensors["W_enc"] = tensors["W_enc"] * norms
        tensors["b_enc"] = tensors["b_enc"] * norms
    return _Parts("standard", tensors, {})


def _standard_of_april(weights: Weights) -> _Parts:
    tensors = _linear(weights, b_enc="encoder.bias", b_dec="decoder.bias")
    return _Parts("standard", tensors, {"apply_b_dec_to_input": False})


def _gated(weights: Weights) -> _Parts:
    vectors = {"b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"}
    return _Parts("gated", _linear(weights, b_dec="decoder_bias", **vectors), {})


def _topk(weights: Weights) -> _Parts:
    weights.drop("threshold")  # the default encode ignores it; older checkpoints lack it
    stored = {"k": weights.take_number("k")} if "k" in weights else {}
    return _Parts("topk", _linear(weights, b_enc="encoder.bias", b_dec="b_dec"), stored)


def _batchtopk(weights: Weights) -> _Parts:
    weights.drop("k")
    tensors = _linear(weights, b_enc="encoder.bias", b_dec="b_dec")
    tensors["threshold"] = weights.take("threshold", shape=())
    return _Parts("jumprelu", tensors, {})


def _matryoshka(weights: Weights) -> _Parts:
    weights.drop("k", "group_sizes")
    tensors = weights.take_sae_lens()
    tensors["threshold"] = weights.take("threshold", shape=())
    return _Parts("jumprelu", tensors, {})


def _jumprelu(weights: Weights) -> _Parts:
    tensors = weights.take_sae_lens()
    tensors |= weights.take_vectors(tensors["W_dec"], threshold="threshold")
    return _Parts("jumprelu", tensors, {"apply_b_dec_to_input": False})


_CLASSES: dict[str, Callable[[Weights], _Parts]] = {
    "AutoEncoder": _standard,
    "AutoEncoderNew": _standard_of_april,
    "GatedAutoEncoder": _gated,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batchtopk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
    "JumpReluAutoEncoder": _jumprelu,
}

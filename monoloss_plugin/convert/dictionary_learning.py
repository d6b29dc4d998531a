"""Dictionaries of ``dictionary_learning``: a folder with ``ae.pt`` and ``config.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from monoloss_plugin._checks import require_text
from monoloss_plugin._places import as_path
from monoloss_plugin.convert.checkpoint import (
    SAE_LENS,
    build_sae,
    read_checkpoint,
    read_count,
    read_tensors,
)

if TYPE_CHECKING:
    from sae_lens import SAE

_WEIGHTS, _CONFIG = "ae.pt", "config.json"


class _Format(NamedTuple):
    """How one of the library's classes stores its tensors, and what it is in SAELens."""

    architecture: str
    names: dict[str, str]
    """For each of SAELens's names, the library's; see :func:`read_tensors`."""
    settings: Mapping[str, Any] = MappingProxyType({})
    ignored: str = ""


_LINEAR = {"W_enc": "encoder.weight.T", "W_dec": "decoder.weight.T"}
_TOPK = {**_LINEAR, "b_enc": "encoder.bias", "b_dec": "b_dec"}
_GATES = {"b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"}
_THRESHOLD = {"threshold": "threshold"}
_RAW_INPUT = {"apply_b_dec_to_input": False}

_FORMATS = {
    "AutoEncoder": _Format("standard", {**_TOPK, "b_dec": "bias"}),
    "AutoEncoderNew": _Format("standard", {**_TOPK, "b_dec": "decoder.bias"}, _RAW_INPUT),
    "GatedAutoEncoder": _Format("gated", {**_LINEAR, **_GATES, "b_dec": "decoder_bias"}),
    # The default encode ignores the threshold, and older checkpoints lack it.
    "AutoEncoderTopK": _Format("topk", _TOPK, ignored="k|threshold"),
    "BatchTopKSAE": _Format("jumprelu", _TOPK | _THRESHOLD, ignored="k"),
    "MatryoshkaBatchTopKSAE": _Format("jumprelu", SAE_LENS | _THRESHOLD, ignored="k|group_sizes"),
    "JumpReluAutoEncoder": _Format("jumprelu", SAE_LENS | _THRESHOLD, _RAW_INPUT),
}
# As sae-for-vlm's copy of the library spells it.
_FORMATS["MatroyshkaBatchTopKSAE"] = _FORMATS["MatryoshkaBatchTopKSAE"]


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
    if name not in _FORMATS:
        raise ValueError(f"dict_class: expected one of {', '.join(_FORMATS)}, got {name!r}")
    architecture, names, settings, ignored = _FORMATS[name]
    state = read_checkpoint(path)
    tensors = read_tensors(state, names, ignored)
    if architecture == "topk":
        k = read_count(state.get("k", config.get("k")), "k", len(tensors["W_dec"]))
        settings = {**settings, "k": k}
    sae = build_sae(
        architecture,
        tensors,
        converted_from="dictionary_learning",
        terms=_terms(config.get("monoloss")),
        **settings,
    )
    if name == "AutoEncoder":  # the library does this when it loads this class
        sae.fold_W_dec_norm()
    return sae


def _terms(record: Any) -> dict[str, Any]:
    """Return the loss terms that our adapter records in a trainer's config."""
    terms = record.get("terms") if isinstance(record, dict) else None
    return terms if isinstance(terms, dict) else {}


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

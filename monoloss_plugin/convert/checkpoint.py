"""Read checkpoints that other libraries wrote with ``torch.save``, and build SAELens SAEs."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monoloss_plugin._checks import require_finite, visible
from monoloss_plugin._optional import missing_extra
from monoloss_plugin._places import require_file

try:
    from sae_lens import SAE
    from sae_lens.registry import get_sae_class
except ModuleNotFoundError as error:
    raise missing_extra(error, "sae-lens") from error

_REFUSED_CLASS = re.compile(r"GLOBAL (\S+)")
"""How torch's error names the class that it refuses to unpickle."""

SAE_LENS = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
"""The names of a state dict that has SAELens's own."""


def read_checkpoint(path: Path, start: int = 0) -> Any:
    """Read tensors and plain values. Nothing that could run code is unpickled.

    ``start`` is the byte of the file at which they begin.
    """
    require_file(path, "source")
    try:
        with path.open("rb") as file:
            file.seek(start)
            content = io.BytesIO(file.read()) if start else path
        return torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises all kinds for a damaged or foreign file
        refused = _REFUSED_CLASS.search(str(error))
        held = f"; it holds {visible(refused[1])}" if refused else ""
        raise ValueError(
            f"source: {path.name} is not a checkpoint of tensors and plain values{held}. Nothing "
            "else is unpickled, since that could run any code. If the file is yours, load it in "
            "its own library, and save only its state_dict, numbers and strings"
        ) from error


def read_tensors(
    state: Any, names: Mapping[str, str | tuple[str, ...]], ignored: str = ""
) -> dict[str, Tensor]:
    """Return the tensors of a state dict as float32, by SAELens's names.

    Args:
        state: the state dict.
        names: for each of SAELens's names, the name in the state dict; or several names, of which
            the first that it has is read. ``.T`` after a name says that the matrix is stored
            transposed.
        ignored: a pattern of the names that the forward pass does not use. Any other tensor that
            is left over means that this is another format.
    """
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"source: expected a state dict, got {type(state).__name__}")
    tensors: dict[str, Tensor] = {}
    unread = {str(key) for key in state}
    for name, given in names.items():
        options = (given,) if isinstance(given, str) else given
        chosen = next((one for one in options if one.removesuffix(".T") in state), options[0])
        key = chosen.removesuffix(".T")
        if key not in state:
            raise ValueError(f"source: no {key} in it; it has {_listed(set(map(str, state)))}")
        tensor = state[key]
        if not isinstance(tensor, Tensor) or tensor.is_complex():
            got = getattr(tensor, "dtype", type(tensor).__name__)
            raise ValueError(f"source: expected a tensor of numbers as {key}, got {got}")
        tensor = tensor.detach().float()
        tensors[name] = tensor.mT if chosen != key and tensor.ndim == 2 else tensor
        unread.discard(key)
    w_enc, w_dec = tensors["W_enc"], tensors["W_dec"]
    if w_enc.ndim != 2 or not w_enc.numel() or w_dec.shape != w_enc.mT.shape:
        raise ValueError(
            "source: expected an encoder (d_in, d_sae) and a decoder (d_sae, d_in), got "
            f"{tuple(w_enc.shape)} and {tuple(w_dec.shape)}"
        )
    unread = {key for key in unread if not re.fullmatch(ignored, key)}
    if unread:
        raise ValueError(f"source: {_listed(unread)}: tensors that this format does not have")
    return tensors


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


def read_count(value: Any, name: str, most: int) -> int:
    """Return a whole number from 1 to ``most``, stored as an int, a float or a tensor of one."""
    given = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    plain = isinstance(given, (int, float)) and not isinstance(given, bool)
    if not plain or given != given // 1 or not 1 <= given <= most:
        raise ValueError(f"source: expected a {name} of 1 to {most}, got {value!r}")
    return int(given)


def _listed(keys: set[str]) -> str:
    return visible(", ".join(sorted(keys)[:12]))

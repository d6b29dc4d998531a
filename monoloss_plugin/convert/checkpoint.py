"""Read checkpoints that other libraries wrote with ``torch.save``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monoloss_plugin._checks import require_finite, visible
from monoloss_plugin._places import require_file

_REFUSED_CLASS = re.compile(r"GLOBAL (\S+)")
"""How torch's error names the class that it refuses to unpickle."""


def read_checkpoint(path: Path) -> Any:
    """Read tensors and plain values. Nothing that could run code is unpickled.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: the file is not a checkpoint, or holds objects of other classes.
    """
    require_file(path, "source")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises all kinds for a damaged or foreign file
        refused = _REFUSED_CLASS.search(str(error))
        held = f"; it holds {visible(refused[1])}" if refused else ""
        raise ValueError(
            f"source: {path.name} is not a checkpoint of tensors and plain values{held}. Nothing "
            "else is unpickled, since that could run any code. If the file is yours, load it in "
            "its own library, and save only its state_dict, numbers and strings"
        ) from error


def read_count(value: Any, name: str, most: int) -> int:
    """Return a whole number from 1 to ``most``, stored as an int, a float or a tensor of one.

    Raises:
        ValueError: the value is something else.
    """
    given = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    plain = isinstance(given, (int, float)) and not isinstance(given, bool)
    if not plain or given != given // 1 or not 1 <= given <= most:
        raise ValueError(f"source: expected a {name} of 1 to {most}, got {value!r}")
    return int(given)


class Weights:
    """A state dict from which each tensor is taken once, so that none is overlooked.

    Args:
        state: tensors by name.
        name: the checkpoint's name, for errors.
        ignored: the first letters of names that the forward pass does not use.

    Raises:
        ValueError: the state dict is empty or of another kind. From the methods: a tensor is
            missing, not a finite tensor of numbers, or of another shape.
    """

    def __init__(self, state: Any, name: str, ignored: tuple[str, ...] = ()) -> None:
        if not isinstance(state, Mapping) or not state:
            raise ValueError(f"{name}: expected a state dict, got {type(state).__name__}")
        self._left = {k: v for k, v in state.items() if not str(k).startswith(ignored or ("\0",))}
        self._name = name

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def take(self, key: str, *, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return a tensor as float32."""
        if key not in self._left:
            raise ValueError(f"{self._name}: no {key} in it; it has {self._names_left()}")
        tensor = self._left.pop(key)
        if not isinstance(tensor, Tensor) or tensor.is_complex():
            got = getattr(tensor, "dtype", type(tensor).__name__)
            raise ValueError(f"{self._name}: expected a tensor of numbers as {key}, got {got}")
        if shape is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{self._name}: {key} is {tuple(tensor.shape)}, expected {shape}")
        values = tensor.detach().float()
        require_finite(values, f"{self._name}: {key}")
        return values

    def take_number(self, key: str) -> float:
        """Return a number, stored as it is or as a tensor."""
        if isinstance(self._left.get(key), (int, float)):
            return float(self._left.pop(key))
        return float(self.take(key, shape=()))

    def take_matrix(self, key: str) -> Tensor:
        """Return a tensor of two dimensions as float32."""
        tensor = self.take(key)
        if tensor.ndim != 2 or not tensor.numel():
            raise ValueError(f"{self._name}: {key} is {tuple(tensor.shape)}, expected a matrix")
        return tensor

    def take_vectors(self, w_dec: Tensor, **names: str) -> dict[str, Tensor]:
        """Return vectors by SAELens's names, given the decoder (d_sae, d_in) and their own names.

        Of SAELens's vectors ``b_dec`` has d_in entries, and every other has d_sae.
        """
        d_sae, d_in = w_dec.shape
        return {
            sae_lens: self.take(own, shape=(d_in if sae_lens == "b_dec" else d_sae,))
            for sae_lens, own in names.items()
        }

    def take_sae_lens(self) -> dict[str, Tensor]:
        """Return the tensors of a state dict that has SAELens's own names and shapes."""
        encoder = self.take_matrix("W_enc")
        decoder = self.take("W_dec", shape=tuple(encoder.T.shape))
        vectors = self.take_vectors(decoder, b_enc="b_enc", b_dec="b_dec")
        return {"W_enc": encoder, "W_dec": decoder, **vectors}

    def drop(self, *keys: str) -> None:
        """Leave out what the forward pass does not need, if it is there."""
        for key in keys:
            self._left.pop(key, None)

    def finish(self) -> None:
        """Raise ValueError if tensors are left over: this is another format."""
        if self._left:
            left = self._names_left()
            raise ValueError(f"{self._name}: {left}: tensors that this format does not have")

    def _names_left(self) -> str:
        return visible(", ".join(sorted(map(str, self._left))[:12]))

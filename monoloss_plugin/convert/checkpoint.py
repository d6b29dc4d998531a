"""Checkpoints that others have written with ``torch.save``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monoloss_plugin._checks import require_finite, visible
from monoloss_plugin._places import require_file

_GLOBAL = re.compile(r"GLOBAL (\S+)")
"""Where torch names what it will not unpickle."""


def read_checkpoint(path: Path) -> Any:
    """Read tensors and plain values; nothing that would run code is unpickled.

    Raises:
        FileNotFoundError, IsADirectoryError: no such file.
        ValueError: not a checkpoint, or one that holds objects of other classes.
    """
    require_file(path, "source")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file makes torch.load raise all kinds
        found = _GLOBAL.search(str(error))
        held = f" (it holds {visible(found[1])})" if found else ""
        raise ValueError(
            f"source: {path.name} is no checkpoint of tensors and plain values, and what else it "
            f"may hold{held} is not unpickled, since that could run any code; where it is yours, "
            "load it in its own library, and save its state_dict, numbers and strings alone"
        ) from error


def whole(value: Any, name: str, most: int) -> int:
    """Return a whole number from 1 to ``most``, given as an int, a float or a tensor of one.

    Raises:
        ValueError: something else.
    """
    given = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    plain = isinstance(given, (int, float)) and not isinstance(given, bool)
    if not plain or given != given // 1 or not 1 <= given <= most:
        raise ValueError(f"source: expected a {name} of 1 to {most}, got {value!r}")
    return int(given)


class Weights:
    """A state dict that is used up tensor by tensor, so that none is overlooked.

    Args:
        state: by name.
        name: of the checkpoint, for errors.
        ignored: names and beginnings of names of tensors that the forward pass does not use.
    """

    def __init__(self, state: Any, name: str, ignored: tuple[str, ...] = ()) -> None:
        if not isinstance(state, Mapping) or not state:
            raise ValueError(f"{name}: expected a state dict, got {type(state).__name__}")
        self._left = {k: v for k, v in state.items() if not str(k).startswith(ignored or ("\0",))}
        self._name = name

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def take(self, key: str, *, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return a tensor as float32.

        Raises:
            ValueError: not there, not a tensor of numbers, or of another shape.
        """
        if key not in self._left:
            has = self._named_left()
            raise ValueError(f"{self._name}: no {key} in it; it has {has}")
        tensor = self._left.pop(key)
        if not isinstance(tensor, Tensor) or tensor.is_complex():
            got = getattr(tensor, "dtype", type(tensor).__name__)
            raise ValueError(f"{self._name}: expected a tensor of numbers as {key}, got {got}")
        if shape is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{self._name}: {key} is {tuple(tensor.shape)}, expected {shape}")
        values = tensor.detach().float().contiguous()
        require_finite(values, f"{self._name}: {key}")
        return values

    def drop(self, key: str) -> None:
        """Leave out what the forward pass does not need, if it is there."""
        self._left.pop(key, None)

    def take_number(self, key: str) -> float:
        """Return a number, stored as it is or as a tensor.

        Raises:
            ValueError: not there, or neither.
        """
        if isinstance(self._left.get(key), (int, float)):
            return float(self._left.pop(key))
        return float(self.take(key, shape=()))

    def take_matrix(self, key: str) -> Tensor:
        """Return a tensor of two dimensions as float32.

        Raises:
            ValueError: as :meth:`take`, or of another number of dimensions.
        """
        tensor = self.take(key)
        if tensor.ndim != 2 or not tensor.numel():
            raise ValueError(f"{self._name}: {key} is {tuple(tensor.shape)}, expected a matrix")
        return tensor

    def take_plain(self) -> dict[str, Tensor]:
        """Return ``W_enc``, ``W_dec``, ``b_enc`` and ``b_dec``, which are SAELens's names too.

        Raises:
            ValueError: as :meth:`take`.
        """
        encoder = self.take_matrix("W_enc")
        d_in, d_sae = encoder.shape
        return {
            "W_enc": encoder,
            "W_dec": self.take("W_dec", shape=(d_sae, d_in)),
            "b_enc": self.take("b_enc", shape=(d_sae,)),
            "b_dec": self.take("b_dec", shape=(d_in,)),
        }

    def finish(self) -> None:
        """Raise ValueError where tensors are left over: this is another format."""
        if self._left:
            left = self._named_left()
            raise ValueError(f"{self._name}: {left}: tensors that this format does not have")

    def _named_left(self) -> str:
        return visible(", ".join(sorted(map(str, self._left))[:12]))

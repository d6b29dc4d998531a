"""Memory for batches, used again when nothing refers to it any more.

The system hands out a batch's megabytes as fresh pages, and faulting them in costs more than
filling them. A page that has been used before costs nothing.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from monoloss_plugin._optional import missing_extra

try:
    import numpy as np
except ModuleNotFoundError as error:
    raise missing_extra(error, "hub") from error

_KEPT = 4


class Buffers:
    """Tensors (rows, width) on the CPU over memory that comes back when the last of them is gone.

    A tensor's storage holds a view of the memory made for it alone; all that shares the storage,
    such as slices or what autograd has saved, keeps it. When the view goes, the memory is free.

    Args:
        rows: at most so many a tensor.
        width: of a row.
        dtype: of the tensors.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype) -> None:
        self.rows, self.width, self.dtype = rows, width, dtype
        self._free: list[np.ndarray[Any, Any]] = []

    def empty(self, rows: int) -> Tensor:
        """Return an uninitialised tensor (rows, width)."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty((self.rows, self.width), str(self.dtype).removeprefix("torch."))
        view = memory[:rows]
        weakref.finalize(view, self._take_back, memory).atexit = False
        return torch.from_numpy(view)

    def _take_back(self, memory: np.ndarray[Any, Any]) -> None:
        if len(self._free) < _KEPT:
            self._free.append(memory)

    def __reduce__(self) -> tuple[Any, ...]:
        return Buffers, (self.rows, self.width, self.dtype)

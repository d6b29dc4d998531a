"""Rows of a feature column, gathered from where they lie: no copy of the column is made."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from monoloss_plugin._optional import missing_extra

try:
    import numpy as np
    import pyarrow as pa
except ModuleNotFoundError as error:
    raise missing_extra(error, "hub") from error

_TYPES = {"halffloat": np.float16, "float": np.float32, "double": np.float64}


class Rows:
    """A column of fixed-length lists as a matrix (N, d) whose rows can be gathered.

    Arrow keeps a column in pieces: one a record batch, with other columns between them, in one or
    several mapped files. A single view over the stretch of addresses from the first piece to the
    last makes a gather one call, however many pieces there are. What lies between the pieces may
    not be memory at all; it is never read, since only rows of the pieces are ever asked for.

    Args:
        column: of fixed-length lists of floats, without missing values.

    Raises:
        ValueError: a column of another type, or missing values.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        kind = column.type
        if not pa.types.is_fixed_size_list(kind) or str(kind.value_type) not in _TYPES:
            raise ValueError(
                f"features: expected a column of fixed-length lists of floats, got {kind}"
            )
        if column.null_count:
            raise ValueError(f"features: {column.null_count} rows have no features")
        self.width: int = kind.list_size
        dtype = np.dtype(_TYPES[str(kind.value_type)])
        self.dtype: torch.dtype = getattr(torch, str(dtype))
        pieces = [_aligned(piece.flatten(), dtype) for piece in column.chunks if len(piece)]
        lengths = [len(piece) // self.width for piece in pieces]
        self.num_rows: int = sum(lengths)
        self._starts = torch.tensor(lengths, dtype=torch.int64).cumsum(0) - torch.tensor(lengths)

        addresses = [
            piece.to_numpy(zero_copy_only=True).__array_interface__["data"][0] for piece in pieces
        ]
        first = min(addresses, default=0)
        end = max((a + p.nbytes for a, p in zip(addresses, pieces, strict=True)), default=0)
        apart = torch.tensor([a - first for a in addresses], dtype=torch.int64) // dtype.itemsize
        self._row_0 = apart - self._starts * self.width
        """Where row 0 would lie if each piece reached back to it, in values."""
        stretch = pa.foreign_buffer(first, end - first, base=pieces)
        self._windows = _windows(np.frombuffer(stretch, dtype), self.width)

    def __len__(self) -> int:
        return self.num_rows

    def take(self, numbers: Tensor, out: Tensor | None = None) -> Tensor:
        """Return a copy of some rows.

        Args:
            numbers: (B,) int64 in any order, on the CPU.
            out: (B, d) where to put it.

        Returns:
            (B, d) in the column's dtype.

        Raises:
            IndexError: a number that is not from 0 to N - 1.
        """
        if not len(numbers):
            return torch.empty((0, self.width), dtype=self.dtype)
        lowest, highest = numbers.aminmax()
        if lowest < 0 or highest >= self.num_rows:
            raise IndexError(f"rows {int(lowest)} to {int(highest)} of {self.num_rows}")
        row_0 = self._row_0
        if len(self._starts) > 1:
            row_0 = row_0[torch.searchsorted(self._starts, numbers, right=True) - 1]
        return torch.index_select(self._windows, 0, numbers * self.width + row_0, out=out)


def _aligned(piece: pa.Array, dtype: np.dtype[Any]) -> pa.Array:
    """Return a piece that lies whole numbers of values from any other, as Arrow's own do."""
    if piece.null_count:
        raise ValueError(f"features: {piece.null_count} values are missing within rows")
    values = piece.to_numpy(zero_copy_only=True)
    address: int = values.__array_interface__["data"][0]
    return piece if address % dtype.itemsize == 0 else pa.array(values.copy())


def _windows(values: np.ndarray[Any, Any], width: int) -> Tensor:
    """Return overlapping rows, one that starts at each value."""
    with warnings.catch_warnings():
        # A mapped file cannot be written to; nothing here does, and only copies are given out.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        flat = torch.from_numpy(values)
    return flat.as_strided((max(0, len(flat) - width + 1), width), (1, 1))

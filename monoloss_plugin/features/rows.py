"""Rows of a feature column, gathered from where they lie: no copy of the column is made."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from monoloss_plugin._optional import missing_extra

try:
    import numpy as np
    import pyarrow as pa
except ModuleNotFoundError as error:
    raise missing_extra(error, "hub") from error

_TYPES = {"halffloat": np.float16, "float": np.float32, "double": np.float64}


class _Region(NamedTuple):
    """A stretch of memory, such as a mapped file, that holds rows anywhere in it."""

    windows: Tensor
    """(values - d + 1, d): overlapping, so that any row of it starts at any value."""


class Rows:
    """A column of fixed-length lists as a matrix (N, d) whose rows can be gathered.

    An Arrow file keeps a column in pieces, with other columns between them. All pieces of one
    memory-mapped file are read through a single view of that file, so a gather is one call per
    file and not one per piece.

    Args:
        column: of fixed-length lists of floats, without missing values.

    Raises:
        TypeError: a column of another type.
        ValueError: missing values.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        kind = column.type
        if not pa.types.is_fixed_size_list(kind) or str(kind.value_type) not in _TYPES:
            raise TypeError(
                f"features: expected a column of fixed-length lists of floats, got {kind}"
            )
        if column.null_count:
            raise ValueError(f"features: {column.null_count} rows have no features")
        self.width: int = kind.list_size
        dtype = np.dtype(_TYPES[str(kind.value_type)])
        regions: dict[int, int] = {}
        self._regions: list[_Region] = []
        starts, region_of, first_value = [], [], []
        self.num_rows = 0
        for piece in column.chunks:
            if len(piece) == 0:
                continue
            values = piece.flatten().to_numpy(zero_copy_only=True)
            whole = _whole_buffer(piece.flatten().buffers()[1], dtype.itemsize)
            if whole.address not in regions:
                regions[whole.address] = len(self._regions)
                self._regions.append(_Region(_windows(whole, dtype, self.width)))
            starts.append(self.num_rows)
            region_of.append(regions[whole.address])
            first_value.append((values.ctypes.data - whole.address) // dtype.itemsize)
            self.num_rows += len(piece)
        self.dtype: torch.dtype = getattr(torch, str(dtype))
        self._starts = torch.tensor(starts, dtype=torch.int64)
        self._region_of = torch.tensor(region_of, dtype=torch.int64)
        # Where row 0 of the matrix would lie if a piece reached back that far.
        self._origin = torch.tensor(first_value, dtype=torch.int64) - self._starts * self.width

    def __len__(self) -> int:
        return self.num_rows

    def take(self, numbers: Tensor) -> Tensor:
        """Return a copy of some rows.

        Args:
            numbers: (B,) int64, from 0 to N - 1, in any order, on the CPU.

        Returns:
            (B, d) in the column's dtype.
        """
        if len(self._starts) == 1:
            return self._regions[0].windows.index_select(0, numbers * self.width + self._origin[0])
        piece = torch.searchsorted(self._starts, numbers, right=True) - 1
        offset = numbers * self.width + self._origin[piece]
        if len(self._regions) == 1:
            return self._regions[0].windows.index_select(0, offset)
        region, order = self._region_of[piece].sort()
        offset = offset[order]
        found = torch.empty((len(numbers), self.width), dtype=self.dtype)
        cuts = torch.searchsorted(region, torch.arange(len(self._regions) + 1)).tolist()
        for one, start, end in zip(self._regions, cuts[:-1], cuts[1:], strict=True):
            if start < end:
                torch.index_select(one.windows, 0, offset[start:end], out=found[start:end])
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return found.index_select(0, back)

    def span(self, start: int, end: int) -> Tensor:
        """Return a copy of consecutive rows, read in the order they lie in."""
        return self.take(torch.arange(start, min(end, self.num_rows)))


def _whole_buffer(buffer: pa.Buffer, itemsize: int) -> pa.Buffer:
    """Return the memory that a buffer is a part of: the mapped file, if it is of one."""
    whole = buffer
    while whole.parent is not None and (buffer.address - whole.parent.address) % itemsize == 0:
        whole = whole.parent
    return whole


def _windows(buffer: pa.Buffer, dtype: np.dtype, width: int) -> Tensor:
    values = np.frombuffer(buffer, dtype=dtype, count=buffer.size // dtype.itemsize)
    with warnings.catch_warnings():
        # A mapped file cannot be written to; nothing here does, and only copies are given out.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        flat = torch.from_numpy(values)
    return flat.as_strided((len(flat) - width + 1, width), (1, 1))

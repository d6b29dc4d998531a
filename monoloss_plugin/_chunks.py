"""Rows in chunks, so that what is cast or shifted for float64 sums exists for one at a time."""

from __future__ import annotations

from collections.abc import Iterator

_ELEMENTS = 1 << 23
"""About this many activations a chunk: 64 MiB in float64."""


def row_chunks(rows: int, width: int) -> Iterator[slice]:
    """Yield slices that cover ``rows`` rows of ``width`` elements."""
    step = max(1, _ELEMENTS // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, start + step)

"""Rows in chunks, so that temporary copies exist for one chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from monoloss_plugin.kernels.support import Support, is_sparse, support_of

_ELEMENTS = 1 << 23
"""Dense activations per chunk, about: 32 MiB in float32."""
_SPARSE_ELEMENTS = 1 << 25
"""The same for sparse activations. Their entries take about 80 MiB if one in 16 is active."""

_ROWS = 1 << 14
"""Rows per chunk, at most. The sums of chunks are added up in float64."""


def row_chunks(rows: int, width: int, elements: int) -> Iterator[slice]:
    """Yield slices that cover ``rows`` rows of a width, with about ``elements`` elements each."""
    step = max(1, min(_ROWS, elements // max(1, width)))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def parts_of(latents: Tensor | Support) -> Iterator[tuple[slice, Tensor | Support]]:
    """Yield chunks of latents (N, M) in the form that is fastest to sum.

    Args:
        latents: dense, sparse COO, or their support.

    Yields:
        The rows of the chunk, and its latents: dense, or a support.
    """
    if isinstance(latents, Support):
        if latents.num_rows:
            yield slice(0, latents.num_rows), latents
        return
    sparse = is_sparse(latents)
    num_rows, num_latents = latents.shape
    chunks = row_chunks(num_rows, num_latents, _SPARSE_ELEMENTS if sparse else _ELEMENTS)
    if latents.layout == torch.sparse_coo:
        latents = latents.coalesce()
    for rows in chunks:
        part = _rows_of(latents, rows)
        yield rows, support_of(part) if sparse else part


def _rows_of(latents: Tensor, rows: slice) -> Tensor:
    if rows == slice(0, latents.shape[0]):
        return latents
    if latents.layout == torch.strided:
        return latents[rows]
    indices = latents.indices()
    bounds = torch.tensor([rows.start, rows.stop], device=indices.device)
    first, last = torch.searchsorted(indices[0].contiguous(), bounds).tolist()
    start = torch.tensor([[rows.start], [0]], device=indices.device)
    return torch.sparse_coo_tensor(
        indices[:, first:last] - start,
        latents.values()[first:last],
        (rows.stop - rows.start, latents.shape[1]),
        is_coalesced=True,
        check_invariants=False,
    )

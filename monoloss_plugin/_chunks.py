"""Rows in chunks, so that temporary copies exist for one chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from monoloss_plugin.kernels.support import Support, is_sparse, support_of

_ELEMENTS = 1 << 23
"""Dense activations per chunk, about: 32 MiB in float32."""
_SPARSE_ELEMENTS = 1 << 25
"""The same for sparse activations. Their entries take about 80 MiB if one in 16 is active."""

_ROWS = 1 << 14
"""Rows per chunk, at most. The sums of chunks are added up in float64."""

_ROWS_OF_GROUPS = 1 << 11
"""The same for samples in groups: the similarities of all pairs of a chunk are in memory."""


def row_chunks(rows: int, width: int, elements: int) -> Iterator[slice]:
    """Yield slices that cover ``rows`` rows of a width, with about ``elements`` elements each."""
    step = max(1, min(_ROWS, elements // max(1, width)))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def whole_groups(starts: Tensor, at_once: int) -> Iterator[slice]:
    """Yield slices of consecutive groups with at most so many rows together, or of one group.

    Args:
        starts: (G + 1,) int64 on the CPU: the first row of each group; the last is the number of
            rows.
        at_once: rows.
    """
    group = 0
    while group < len(starts) - 1:
        last = int(torch.searchsorted(starts, starts[group] + at_once, right=True)) - 1
        first, group = group, max(last, group + 1)
        yield slice(first, group)


def parts_of(
    latents: Tensor | Support, groups: Tensor | None = None
) -> Iterator[tuple[slice, Tensor | Support]]:
    """Yield chunks of latents (N, M) in the form that is fastest to sum.

    Args:
        latents: dense, sparse COO, or their support.
        groups: (N,) in ascending order: dense and COO latents are cut between groups only.

    Yields:
        The rows of the chunk, and its latents: dense, or a support.
    """
    if isinstance(latents, Support):
        if latents.num_rows:
            yield slice(0, latents.num_rows), latents
        return
    sparse = is_sparse(latents)
    num_rows, num_latents = latents.shape
    elements = _SPARSE_ELEMENTS if sparse else _ELEMENTS
    chunks = row_chunks(num_rows, num_latents, elements)
    if groups is not None:
        at_once = max(1, min(_ROWS_OF_GROUPS, elements // max(1, num_latents)))
        starts = F.pad(groups.bincount().cumsum(0), (1, 0))
        bounds = ((starts[some.start], starts[some.stop]) for some in whole_groups(starts, at_once))
        chunks = (slice(int(first), int(last)) for first, last in bounds)
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

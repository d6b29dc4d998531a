"""In which order rows become batches: a function of seed and epoch alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

Shuffle = Literal["all", "buffer", "none"]

_BLOCK = 4096
"""Consecutive rows that a shuffle buffer reads at once."""


class Order:
    """The order of N rows in every epoch.

    Args:
        num_rows: N.
        batch_rows: rows a batch.
        shuffle: ``"all"``, a random permutation; ``"buffer"``, blocks of consecutive rows in a
            random order, and the rows of every ``buffer_rows`` of them in a random order; or
            ``"none"``.
        seed: of the orders.
        drop_last: leave out a last, incomplete batch.
        buffer_rows: rows of a shuffle buffer.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        batch_rows: int,
        shuffle: Shuffle,
        seed: int,
        drop_last: bool,
        buffer_rows: int,
    ) -> None:
        self.num_rows, self.batch_rows, self.shuffle = num_rows, batch_rows, shuffle
        self.seed, self.drop_last = seed, drop_last
        self.buffer_rows = max(_BLOCK, buffer_rows // _BLOCK * _BLOCK)
        self._of_epoch = lru_cache(maxsize=2)(self._permuted)

    @property
    def num_batches(self) -> int:
        """Batches an epoch."""
        rows = self.num_rows if self.drop_last else self.num_rows + self.batch_rows - 1
        return rows // self.batch_rows

    def rows(self, epoch: int, batch: int) -> Tensor:
        """Return the rows of a batch, (batch_rows,) or fewer in a last one."""
        start = batch * self.batch_rows
        end = min(start + self.batch_rows, self.num_rows)
        if self.shuffle == "none":
            return torch.arange(start, end)
        _, order = self._of_epoch(epoch)
        return order[start:end]

    def coming(self, epoch: int, batch: int, first: bool) -> Iterator[tuple[int, int]]:
        """Yield spans of rows (start, end) to read now, a buffer ahead of this batch.

        Args:
            epoch: from 0.
            batch: the one about to be read.
            first: whether nothing has been read ahead yet.
        """
        if self.shuffle != "buffer":
            return
        blocks, _ = self._of_epoch(epoch)
        start = batch * self.batch_rows
        end = start + self.batch_rows + 2 * self.buffer_rows
        start = start // self.buffer_rows * self.buffer_rows if first else end - self.batch_rows
        for place in range(-(-start // _BLOCK), min(-(-end // _BLOCK), len(blocks))):
            row = int(blocks[place]) * _BLOCK
            yield row, min(row + _BLOCK, self.num_rows)

    def identity(self) -> dict[str, Any]:
        """Return what the order depends on."""
        identity = {
            "rows": self.num_rows,
            "batch_rows": self.batch_rows,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "drop_last": self.drop_last,
        }
        return identity | ({"buffer_rows": self.buffer_rows} if self.shuffle == "buffer" else {})

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_of_epoch"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._of_epoch = lru_cache(maxsize=2)(self._permuted)

    def _permuted(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the order of blocks, for a buffer, and of rows."""
        # Seed 0's second epoch must not be seed 1's first.
        mixed = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(mixed[:7], "big"))
        if self.shuffle == "all":
            return torch.empty(0), torch.randperm(self.num_rows, generator=generator)
        blocks = torch.randperm(-(-self.num_rows // _BLOCK), generator=generator)
        rows = (blocks[:, None] * _BLOCK + torch.arange(_BLOCK)).flatten()
        rows = rows[rows < self.num_rows]
        buffers = rows.split(self.buffer_rows)
        return blocks, torch.cat([b[torch.randperm(len(b), generator=generator)] for b in buffers])

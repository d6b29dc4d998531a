"""An encoder on its device, which finds out how many images to encode at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import default_collate

from monoloss_plugin.features.encoders import Encoder
from monoloss_plugin.features.images import Prepared, map_tensors
from monoloss_plugin.features.shards import EncodedRows, Unreadable

logger = logging.getLogger(__name__)

Precision = Literal["bfloat16", "float16"]

_SECONDS = 5.0
"""About as long as a batch may take, so that work is saved often."""
_FIRST_BATCH, _LARGEST_BATCH, _LARGEST_ON_A_GPU = 8, 256, 1024


class BatchEncoder:
    """Encodes batches of images on a device.

    If no batch size is given, it starts small, and doubles while a batch of twice the size would
    take less than five seconds. If a batch does not fit a GPU's memory, the size is halved for
    good.

    Args:
        encoder: is moved to the device.
        probe: the encoder's input of one image, to learn the width of the features.
        device: where it runs.
        dtype: of the features.
        autocast: its precision; float32 if None.
        batch_size: how many images to encode at once.

    Raises:
        ValueError: the encoder does not give one vector for each image.
    """

    def __init__(
        self,
        encoder: Encoder,
        probe: Any,
        device: torch.device,
        dtype: torch.dtype,
        autocast: Precision | None = None,
        batch_size: int | None = None,
    ) -> None:
        encoder.model.to(device).eval()
        self.device, self.dtype, self._forward = device, dtype, encoder.forward
        self._precision = None if autocast is None else getattr(torch, autocast)
        self._largest = _LARGEST_ON_A_GPU if device.type == "cuda" else _LARGEST_BATCH
        if batch_size is not None:
            self._largest = batch_size
        self.batch_size = batch_size or min(_FIRST_BATCH, self._largest)
        """The size of the next batch."""
        self.width = self._features(default_collate([probe])).shape[1]
        """d, the length of a feature vector."""

    def encode(self, batch: Prepared) -> EncodedRows:
        """Encode a batch. Images whose features are not finite become unreadable."""
        features = self._in_parts(batch.inputs, len(batch.readable))
        finite = features.isfinite().all(1)
        error = f"features not finite as {self.dtype}; float32 or no autocast may help"
        marked = list(zip(batch.readable, finite.tolist(), strict=True))
        bad = [Unreadable(row.number, row.image_id, error) for row, kept in marked if not kept]
        rows = [row for row, kept in marked if kept]
        return EncodedRows(
            batch.rows,
            features[finite].numpy(),
            [row.label for row in rows],
            [row.image_id for row in rows],
            [*batch.unreadable, *bad],
        )

    def _in_parts(self, inputs: Any, count: int) -> Tensor:
        """Return the features (B, d) of B inputs; a batch is cut if the memory is short."""
        parts = [torch.empty((0, self.width), dtype=self.dtype)]
        start = 0
        while start < count:
            size = min(self.batch_size, count - start)
            part = map_tensors(_slice(start, start + size), inputs)
            try:
                started = time.perf_counter()
                parts.append(self._features(part).cpu())  # which waits for a GPU
            except torch.cuda.OutOfMemoryError:
                if size == 1:
                    raise
                self.batch_size = self._largest = size // 2
                logger.warning("%d images do not fit the memory; encoding %d", size, size // 2)
                continue
            start += size
            seconds = (time.perf_counter() - started) / size
            if self.batch_size < self._largest and 2 * self.batch_size * seconds < _SECONDS:
                self.batch_size = min(2 * self.batch_size, self._largest)
        return torch.cat(parts)

    @torch.inference_mode()
    def _features(self, inputs: Any) -> Tensor:
        """Return the features (B, d) of a batch, on the device."""
        moved = map_tensors(lambda tensor: tensor.to(self.device, non_blocking=True), inputs)
        with torch.autocast(self.device.type, self._precision, enabled=self._precision is not None):
            features = self._forward(moved)
        if features.ndim != 2:
            raise ValueError(f"encoder: expected features (B, d), got {tuple(features.shape)}")
        return features.to(self.dtype)


def _slice(start: int, stop: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor[start:stop]

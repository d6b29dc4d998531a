"""An encoder on its device, which finds out how many images to encode at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from monoloss_plugin.features.encoders import Encoder, PatchTokens
from monoloss_plugin.features.images import Prepared, map_tensors
from monoloss_plugin.features.patch_encoding import check_tokens, pack
from monoloss_plugin.features.shards import EncodedPatches, EncodedRows, Unreadable

logger = logging.getLogger(__name__)

Precision = Literal["bfloat16", "float16"]

_SECONDS = 5.0
"""About as long as a batch may take, so that work is saved often."""
_FIRST_BATCH, _LARGEST_BATCH, _LARGEST_ON_A_GPU = 8, 256, 1024
_MOST_BYTES = 256 << 20
"""Bytes of patches that a batch may have, where no batch size is given."""


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
        keep_patches: how many patches of each image to keep, if the encoder gives patches.

    Raises:
        ValueError: the encoder gives neither one vector for each image nor patches; or
            ``keep_patches`` is given, and it gives no patches.
    """

    def __init__(
        self,
        encoder: Encoder,
        probe: Any,
        device: torch.device,
        dtype: torch.dtype,
        autocast: Precision | None = None,
        batch_size: int | None = None,
        keep_patches: int | None = None,
    ) -> None:
        encoder.model.to(device).eval()
        self.device, self.dtype, self._forward = device, dtype, encoder.forward
        self._precision = None if autocast is None else getattr(torch, autocast)
        self._largest = _LARGEST_ON_A_GPU if device.type == "cuda" else _LARGEST_BATCH
        if batch_size is not None:
            self._largest = batch_size
        self.batch_size = batch_size or min(_FIRST_BATCH, self._largest)
        """The size of the next batch."""
        found = self._outputs(default_collate([probe]))
        is_tokens = isinstance(found, PatchTokens)
        self.width: int = (found.features if is_tokens else found).shape[-1]
        """d, the length of a feature vector."""
        self.patches: dict[str, Any] = {}
        """What the record says of patches; empty if there is one vector for each image."""
        self.vectors_of_image = 1
        """How many vectors of an image are stored; of padded images, at most."""
        self._keep = keep_patches
        if not is_tokens:
            if keep_patches is not None:
                raise ValueError(
                    "keep_patches: this encoder gives one vector for each image; load it with "
                    "output='patches' or 'cls+patches'"
                )
            return
        self._describe(found)
        if batch_size is None:
            of_image = self.vectors_of_image * self.width * dtype.itemsize
            self._largest = max(1, min(self._largest, _MOST_BYTES // of_image))
            self.batch_size = min(self.batch_size, self._largest)

    def _describe(self, tokens: PatchTokens) -> None:
        """Note what the record says of patches like these."""
        count, kept = tokens.features.shape[1], self._keep
        if kept is not None and kept >= count:
            kept = self._keep = None
        has_class_token = tokens.class_token is not None
        self.patches = {
            "grid": None if isinstance(tokens.grid, Tensor) else list(tokens.grid),
            "kept": kept,
            "class_token": has_class_token,
        }
        self.vectors_of_image = (kept or count) + has_class_token

    def encode(self, batch: Prepared) -> EncodedRows:
        """Encode a batch. Images whose features are not finite become unreadable."""
        numbers = [row.number for row in batch.readable]
        features, finite, patches = _joined(self._in_parts(batch.inputs, numbers))
        error = f"features not finite as {self.dtype}; float32 or no autocast may help"
        marked = list(zip(batch.readable, finite.tolist(), strict=True))
        bad = [Unreadable(row.number, row.image_id, error) for row, kept in marked if not kept]
        rows = [row for row, kept in marked if kept]
        if bad:
            features = features[finite if patches is None else finite.repeat(patches.counts)]
            patches = None if patches is None else patches.select(finite)
        return EncodedRows(
            batch.rows,
            features,
            [row.label for row in rows],
            [row.image_id for row in rows],
            [*batch.unreadable, *bad],
            patches,
        )

    def _in_parts(self, inputs: Any, numbers: Sequence[int]) -> list[_Part]:
        """Encode B inputs, of some rows of the source; a batch is cut if the memory is short."""
        count = len(numbers)
        parts = [] if count else [self._nothing()]
        start = 0
        while start < count:
            size = min(self.batch_size, count - start)
            part = map_tensors(_slice(start, start + size), inputs)
            try:
                started = time.perf_counter()
                parts.append(self._encode(part, numbers[start : start + size]))
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
        return parts

    @torch.inference_mode()
    def _encode(self, inputs: Any, numbers: Sequence[int]) -> _Part:
        """Encode a batch that fits the memory, and wait for the device."""
        found = self._outputs(inputs)
        if not isinstance(found, PatchTokens):
            features = found.to(self.dtype).cpu()
            return _Part(features.numpy(), features.isfinite().all(1).numpy(), None)
        if self.patches.get("grid") not in (None, list(found.grid)):
            raise ValueError(
                f"encoder: expected the grid {tuple(self.patches['grid'])} of the first image, got "
                f"{found.grid}; give grids as a tensor (B, 2) if images differ"
            )
        features, finite, patches = pack(found, self.dtype, numbers, self._keep)
        return _Part(features.numpy(), finite, patches)

    @torch.inference_mode()
    def _outputs(self, inputs: Any) -> Any:
        """Return the features (B, d) of a batch or its patches, on the device."""
        moved = map_tensors(lambda tensor: tensor.to(self.device, non_blocking=True), inputs)
        with torch.autocast(self.device.type, self._precision, enabled=self._precision is not None):
            found = self._forward(moved)
        if isinstance(found, PatchTokens):
            check_tokens(found)
        elif found.ndim != 2:
            raise ValueError(
                "encoder: expected features (B, d), or PatchTokens for patches, got "
                f"{tuple(found.shape)}"
            )
        return found

    def _nothing(self) -> _Part:
        """Return what becomes of no image."""
        features, none = np.empty((0, self.width), _numpy_type(self.dtype)), np.empty(0, bool)
        if not self.patches:
            return _Part(features, none, None)
        counts, grids = np.empty(0, np.int64), np.empty((0, 2), np.int16)
        return _Part(features, none, EncodedPatches(counts, np.empty(0, np.int16), grids, features))


class _Part(NamedTuple):
    """What became of some images, on the CPU."""

    features: np.ndarray[Any, Any]
    """(B, d), or (n, d), all their patches."""
    finite: np.ndarray[Any, Any]
    """(B,) whether an image has no other values."""
    patches: EncodedPatches | None


def _joined(parts: Sequence[_Part]) -> _Part:
    """Return parts as one; a single part is not copied."""
    if len(parts) == 1:
        return parts[0]
    features, finite = (np.concatenate([part[i] for part in parts]) for i in range(2))
    several = [part.patches for part in parts if part.patches is not None]
    joined = EncodedPatches(*map(np.concatenate, zip(*several, strict=True))) if several else None
    return _Part(features, finite, joined)


def _numpy_type(dtype: torch.dtype) -> np.dtype[Any]:
    return np.dtype(str(dtype).removeprefix("torch."))


def _slice(start: int, stop: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor[start:stop]

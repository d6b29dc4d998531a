"""An encoder at work: on its device, in its precision, as many images at once as fit."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from typing import Any, Literal

import torch
from torch import Tensor, nn

from monoloss_plugin._optional import missing_extra
from monoloss_plugin.features.encoders import Encoder

try:
    import psutil
except ModuleNotFoundError as error:
    raise missing_extra(error, "vision") from error

logger = logging.getLogger(__name__)

Precision = Literal["bfloat16", "float16"]

_SECONDS = 5.0
"""About as long as a batch may take: what a kill can lose."""
_RECENT = 4
"""Batches whose best speed counts, so that one that had to wait changes nothing."""
_LARGEST_BATCH, _LARGEST_ON_A_GPU = 256, 1024


class Forward:
    """An encoder on its device: from a batch of inputs to features on the CPU."""

    def __init__(
        self,
        encoder: Encoder,
        device: torch.device,
        autocast: Precision | None,
    ) -> None:
        self.encoder, self.device = encoder, device
        self.model: nn.Module = encoder.model.to(device).eval()
        self.precision = None if autocast is None else getattr(torch, autocast)
        self.fits = sys.maxsize
        """Images at once, of which the device's memory is known to hold no more."""

    @torch.inference_mode()
    def __call__(self, inputs: Any) -> Tensor:
        """Return the features (B, d) of a batch, in float32."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            features = self.encoder.forward(to_device(inputs, self.device))
        if features.ndim != 2:
            raise ValueError(f"encoder: expected features (B, d), got {tuple(features.shape)}")
        return features.float()

    def in_parts(self, inputs: Any, size: int) -> Tensor:
        """Encode a batch, in halves where the device's memory is too small for all of it."""
        try:
            return self(inputs)
        except torch.cuda.OutOfMemoryError:
            if size == 1:
                raise
            torch.cuda.empty_cache()
            logger.warning("encoding %d images at once does not fit; encoding halves", size)
        half = size // 2
        self.fits = min(self.fits, half)
        return torch.cat(
            (
                self.in_parts(part_of(inputs, slice(0, half)), half),
                self.in_parts(part_of(inputs, slice(half, size)), size - half),
            )
        )


class BatchSize:
    """How many images at once: as many as fit the memory and take a few seconds at most.

    Args:
        most: what fits the memory.
        seconds: an image takes, to begin with. None: ``most`` is asked for, whatever it takes.
    """

    def __init__(self, most: int, seconds: float | None = None) -> None:
        self.most = self.now = most
        self.adapts = seconds is not None
        self._recent: deque[float] = deque(maxlen=_RECENT)
        if seconds is not None:
            self.measured(1, seconds)

    def measured(self, images: int, seconds: float) -> None:
        """Take up what a batch took, from the end of the one before to its own."""
        if self.adapts:
            self._recent.append(seconds / images)
            self.now = _power_of_two(min(self.most, _SECONDS / min(self._recent)))


def fitting_batch_size(forward: Forward, probe: Any) -> BatchSize:
    """Return a batch size of at most what fits the free memory, to be measured on the way.

    On a GPU a small batch's peak is measured. Elsewhere the peak is taken to be four times the
    largest output of any module: without gradients, little more is alive at once.
    """
    outputs = [0]

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append(output.nbytes)

    forward(batch_of(probe, 2))
    handles = [m.register_forward_hook(note) for m in forward.model.modules()]
    if forward.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(forward.device)
        held = torch.cuda.memory_allocated(forward.device)
    started = time.perf_counter()
    forward(batch_of(probe, 2))
    seconds = (time.perf_counter() - started) / 2
    for handle in handles:
        handle.remove()
    if forward.device.type == "cuda":
        image_bytes = (torch.cuda.max_memory_allocated(forward.device) - held) / 2
        free, _ = torch.cuda.mem_get_info(forward.device)
        largest = _LARGEST_ON_A_GPU
    else:
        image_bytes, free = 4 * max(outputs) / 2, psutil.virtual_memory().available
        largest = _LARGEST_BATCH
    return BatchSize(_power_of_two(min(largest, 0.5 * free / max(image_bytes, 1))), seconds)


def _power_of_two(number: float) -> int:
    """Return the largest power of two up to a number, and at least 1."""
    return 1 << max(0, int(number).bit_length() - 1)


def batch_of(probe: Any, count: int) -> Any:
    """Return a batch of the same input over and over."""
    if isinstance(probe, dict):
        return {name: batch_of(one, count) for name, one in probe.items()}
    return torch.stack([torch.as_tensor(probe)] * count)


def part_of(inputs: Any, rows: slice) -> Any:
    """Return some rows of a tensor, or of each of a dict of tensors."""
    if isinstance(inputs, dict):
        return {name: one[rows] for name, one in inputs.items()}
    return inputs[rows]


def to_device(inputs: Any, device: torch.device) -> Any:
    """Move a tensor, or a dict of tensors."""
    if isinstance(inputs, dict):
        return {name: to_device(one, device) for name, one in inputs.items()}
    return inputs.to(device, non_blocking=True)

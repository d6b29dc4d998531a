"""An encoder on its device: its precision, and how many images it takes at once."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import psutil
import torch
from torch import Tensor, nn

from monoloss_plugin.features.encoders import Encoder

logger = logging.getLogger(__name__)

Precision = Literal["bfloat16", "float16"]

_SECONDS = 5.0
"""About as long as a batch may take, so that work is saved often."""
_RECENT = 4
"""The fastest of so many batches counts, so that one that had to wait changes nothing."""
_LARGEST_BATCH, _LARGEST_ON_A_GPU = 256, 1024


class Forward:
    """An encoder on its device: from a batch of inputs to features.

    Args:
        encoder: is moved to the device.
        device: where it runs.
        autocast: its precision; float32 if None.
        dtype: of the features.
    """

    def __init__(
        self,
        encoder: Encoder,
        device: torch.device,
        autocast: Precision | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.encoder, self.device, self.dtype = encoder, device, dtype
        self.model: nn.Module = encoder.model.to(device).eval()
        self.precision = None if autocast is None else getattr(torch, autocast)
        self.most = sys.maxsize
        """How many images fit the device's memory, as far as is known."""

    @torch.inference_mode()
    def __call__(self, inputs: Any) -> Tensor:
        """Return the features (B, d) of a batch, on the device."""
        moved = map_tensors(lambda tensor: tensor.to(self.device, non_blocking=True), inputs)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            features = self.encoder.forward(moved)
        if features.ndim != 2:
            raise ValueError(f"encoder: expected features (B, d), got {tuple(features.shape)}")
        return features.to(self.dtype)

    def in_parts(self, inputs: Any, size: int) -> Tensor:
        """Encode a batch; if it does not fit the device's memory, encode its halves."""
        try:
            return self(inputs)
        except torch.cuda.OutOfMemoryError:
            if size == 1:
                raise
            torch.cuda.empty_cache()
            logger.warning("encoding %d images at once does not fit; encoding halves", size)
        half = size // 2
        self.most = min(self.most, half)
        first, second = (
            map_tensors(lambda t: t[:half], inputs),
            map_tensors(lambda t: t[half:], inputs),
        )
        return torch.cat((self.in_parts(first, half), self.in_parts(second, size - half)))


class BatchSize:
    """How many images to encode at once: what fits the memory, and takes a few seconds at most.

    Args:
        most: how many fit the memory.
        seconds: what one image takes, to begin with. If None, the size stays ``most``, however
            long it takes.
    """

    def __init__(self, most: int, seconds: float | None = None) -> None:
        self.now = most
        """The size of the next batch."""
        self._most, self._adapts = most, seconds is not None
        self._recent: deque[float] = deque(maxlen=_RECENT)
        if seconds is not None:
            self.measured(1, seconds)

    def measured(self, images: int, seconds: float, most: int = sys.maxsize) -> None:
        """Adapt to what a batch took.

        Args:
            images: its size.
            seconds: from the end of the batch before it to its own end.
            most: how many images fit the memory, as far as is known by now.
        """
        if self._adapts:
            self._recent.append(seconds / images)
            self._most = min(self._most, most)
            self.now = _power_of_two(min(self._most, _SECONDS / min(self._recent)))


def fitting_batch_size(forward: Forward, probe: Any) -> BatchSize:
    """Return a batch size that fits the free memory, and adapts to the speed that is measured.

    What an image needs is taken to be four times the largest output of any module: without
    gradients, little more is alive at once.

    Args:
        forward: the encoder.
        probe: its input of one image.
    """
    outputs = [1]

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append(output.nbytes // 2)

    two = repeated(probe, 2)
    forward(two)  # the first pass sets libraries up, and is slow
    handles = [module.register_forward_hook(note) for module in forward.model.modules()]
    started = time.perf_counter()
    forward(two).cpu()  # which waits for a GPU
    seconds = (time.perf_counter() - started) / 2
    for handle in handles:
        handle.remove()
    if forward.device.type == "cuda":
        (free, _), largest = torch.cuda.mem_get_info(forward.device), _LARGEST_ON_A_GPU
    else:
        free, largest = psutil.virtual_memory().available, _LARGEST_BATCH
    return BatchSize(_power_of_two(min(largest, 0.5 * free / (4 * max(outputs)))), seconds)


def _power_of_two(number: float) -> int:
    """Return the largest power of two that is not above a number, and at least 1."""
    return 1 << max(0, int(number).bit_length() - 1)


def repeated(one: Any, count: int) -> Any:
    """Return a batch of the same input over and over."""
    return map_tensors(lambda tensor: torch.stack([torch.as_tensor(tensor)] * count), one)


def map_tensors(function: Callable[[Any], Any], inputs: Any) -> Any:
    """Apply a function to a tensor, or to each tensor of a dict; None stays None."""
    if inputs is None:
        return None
    if isinstance(inputs, dict):
        return {name: map_tensors(function, one) for name, one in inputs.items()}
    return function(inputs)

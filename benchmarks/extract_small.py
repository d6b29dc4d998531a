"""Extract from so many small images, and print the peak memory of it in MiB.

A process of its own, which imports nothing that extraction does not: ``python -m
benchmarks.extract_small 1000``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from monoloss_plugin.features.encoders import Encoder
from monoloss_plugin.features.extraction import extract


def pixels_of(image: Any) -> Tensor:
    """Return an image as it is, in [0, 1]."""
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255).permute(2, 0, 1)


def peak_memory(images: int) -> float:
    """Extract, all in this process, and return its peak resident memory in MiB."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 768))
    encoder = Encoder(model, pixels_of, model, {"name": "a projection"})
    pixels = np.random.default_rng(0).integers(0, 255, (100, 32, 32, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "images"
        source.mkdir()
        for number in range(images):
            Image.fromarray(pixels[number % 100]).save(source / f"{number:07d}.png")
        extract(source, encoder, Path(folder) / "out", batch_size=64, workers=0, progress=False)
    # getrusage would begin with the peak of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    print(peak_memory(int(sys.argv[1])))

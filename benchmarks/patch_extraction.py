"""Measure the extraction of patches: ``python -m benchmarks.patch_extraction``.

Speed: images a second from JPEG images in memory to a patch set on disk, against the encoder alone
on tensors that are ready, in turns in one process. The encoder is a vision transformer of timm with
random weights and a grid of 14 x 14. Memory: the peak of two processes, one with four times as many
images as the other.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image
from PIL import Image as Pillow
from torch import Tensor

from monoloss_plugin.features.encoders import Encoder, PatchTokens
from monoloss_plugin.features.extraction import extract

SIDE, PATCH = 224, 16
GRID = SIDE // PATCH, SIDE // PATCH
_NOW = "/proc/self/status"


def photos(count: int) -> Dataset:
    """Return synthetic JPEG images of 500 x 375 pixels, in memory."""
    generator = np.random.default_rng(0)
    images = []
    for _ in range(min(count, 64)):
        coarse = Pillow.fromarray(generator.integers(0, 256, (24, 32, 3), np.uint8))
        content = io.BytesIO()
        coarse.resize((500, 375), Pillow.Resampling.BICUBIC).save(content, "JPEG", quality=90)
        images.append({"bytes": content.getvalue(), "path": None})
    few = Dataset.from_dict({"image": images}, features=Features({"image": Image()}))
    return few.select([number % len(images) for number in range(count)])


def transformer(name: str) -> dict[str, Encoder]:
    """Return a vision transformer's patches, and its mean over them, by output."""
    # Imported here, since the processes whose memory is measured need none of it.
    import timm

    from monoloss_plugin.features.encoders.encoder import encoder_of
    from monoloss_plugin.features.encoders.from_timm import tower_of

    torch.manual_seed(0)
    tower = tower_of(timm.create_model(name, num_classes=0).eval())
    outputs = {output: encoder_of(tower, output, None) for output in ("patches", "mean")}
    for one in outputs.values():
        one.model.requires_grad_(False)
    return outputs


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Return images a second of each way, and their ratios to the encoder alone."""
    from monoloss_plugin.reproduce.timing import alternate, ratio, summarise

    device = torch.device(options.device)
    encoders, images = transformer(options.model), photos(options.images)
    model: Any = encoders["patches"].model.to(device)
    inputs = torch.stack([encoders["patches"].preprocess(row["image"]) for row in images])
    running: dict[str, list[float]] = {output: [] for output in encoders}
    with tempfile.TemporaryDirectory() as folder:
        fresh = (Path(folder) / str(run) for run in itertools.count())

        def extracting(output: str) -> None:
            done = extract(
                images,
                encoders[output],
                next(fresh),
                batch_size=options.batch,
                device=device,
                progress=False,
            )
            # Without what it does once: the weights' checksum, and one image to learn the width.
            running[output].append(done.seconds)

        def alone() -> None:
            with torch.inference_mode():
                for part in inputs.split(options.batch):
                    model.forward_features(part.to(device))

        ways = {
            "encoder alone": alone,
            "patches": lambda: extracting("patches"),
            "mean": lambda: extracting("mean"),
        }
        seconds = {**alternate(ways, options.rounds, device, warm_up=False), **running}
    shares = {output: ratio(seconds["encoder alone"], seconds[output]) for output in encoders}
    rates = {way: options.images / summarise(runs)["median"] for way, runs in seconds.items()}
    return {
        "model": options.model,
        "images": options.images,
        "seconds": {way: summarise(runs) for way, runs in seconds.items()},
        "images a second": rates,
        "share of the encoder's speed": shares,
        "says": f"encoder alone {rates['encoder alone']:.1f} images a second; "
        + "; ".join(
            f"{output} {rates[output]:.1f}, {100 * share['median']:.1f} %"
            for output, share in shares.items()
        ),
    }


def pixels_of(image: Any) -> Tensor:
    """Return the middle of an image, in [0, 1]."""
    cut = np.asarray(image)[:SIDE, :SIDE].astype(np.float32) / 255
    return torch.from_numpy(cut).permute(2, 0, 1)


def patches_of(inputs: Tensor) -> PatchTokens:
    """Return the pixels of each patch, (B, 196, 768)."""
    cut = inputs.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
    return PatchTokens(cut.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2), GRID)


def peak_memory(count: int) -> dict[str, float]:
    """Extract the pixels of patches, and return this process's peaks in MiB.

    Memory of its own is what it cannot give back; the rest are pages of files, which it can.
    """
    own = [0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            own[0] = max(own[0], _status("RssAnon"))

    encoder = Encoder(torch.nn.Identity(), pixels_of, patches_of, {"name": "pixels"})
    images = photos(count)
    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    with tempfile.TemporaryDirectory() as folder:
        extract(images, encoder, Path(folder) / "out", batch_size=32, workers=0, progress=False)
    done.set()
    watching.join()
    return {"own": own[0] / 1024, "with pages of files": _status("VmHWM") / 1024}


def _status(name: str) -> int:
    return int(Path(_NOW).read_text().split(f"{name}:")[1].split()[0])


def memory(images: int) -> dict[str, Any]:
    """Return the peaks of a process with so many images, and of one with four times as many."""
    peaks = {}
    for count in (images, 4 * images):
        command = [sys.executable, "-m", "benchmarks.patch_extraction", "--peak", str(count)]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[count] = json.loads(ran.stdout.splitlines()[-1])
    few, many = (peak["own"] for peak in peaks.values())
    listed = ", ".join(f"{peak['own']:.0f} MiB for {count} images" for count, peak in peaks.items())
    return {"MiB": peaks, "says": f"peak {listed}: {100 * (many / few - 1):+.1f} %"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_small_patch16_224", help="of timm")
    parser.add_argument("--images", type=int, default=256, help="of each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--memory-images", type=int, default=1000, help="of the smaller process")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak is not None:
        print(json.dumps(peak_memory(options.peak)))
        return
    started = time.perf_counter()
    found = {"speed": speed(options)}
    print(f"speed: {found['speed']['says']}", flush=True)
    found["memory"] = memory(options.memory_images)
    print(f"memory: {found['memory']['says']}")
    print(f"{time.perf_counter() - started:.0f} s")
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

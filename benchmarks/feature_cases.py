"""Cases of the features: loading them, waiting for them, and extracting them."""

from __future__ import annotations

import cProfile
import itertools
import pstats
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import lmdb
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from benchmarks.data import features
from benchmarks.setting import Found, Setting
from benchmarks.trainer import batchtopk_trainer
from monoloss_plugin.features import FeatureBatches, FeatureRecord, FeatureSet, store
from monoloss_plugin.features.encoders import Encoder
from monoloss_plugin.features.extraction import extract
from monoloss_plugin.features.shards import EncodedRows, ShardWriter, features_schema
from monoloss_plugin.reproduce.timing import alternate, ratio, summarise

_LMDB, _PLAIN = "LMDB, 4 workers", "x[perm] in memory"


def loading(setting: Setting) -> Found:
    """An epoch of shuffled batches against one LMDB record an image and against ``x[perm]``."""
    rows, shape = 200_000 if setting.full else 20_000, setting.shape
    x = features(rows, shape, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "lmdb"
        _write_lmdb(database, x)
        sets = {}
        for dtype in ("float32", "float16"):
            _write_set(Path(folder) / dtype, x.to(getattr(torch, dtype)))
            sets[dtype] = FeatureSet.open(Path(folder) / dtype)
        size = shape.batch

        def plain() -> None:
            order = torch.randperm(rows)
            for start in range(0, rows - size + 1, size):
                x[order[start : start + size]]

        def ours(dtype: str, normalize: bool) -> Callable[[], None]:
            batches = FeatureBatches(sets[dtype], batch_size=size, normalize=normalize)

            def run() -> None:
                for _ in batches:
                    pass

            return run

        ways = {
            _PLAIN: plain,
            "float16, unit norm": ours("float16", True),
            "float32, unit norm": ours("float32", True),
            "float32, as it is": ours("float32", False),
        }
        seconds = alternate(ways, setting.rounds(5, 9), torch.device("cpu"))
        records = _LmdbRecords(str(database), rows)
        loader = DataLoader(records, batch_size=size, shuffle=True, num_workers=4, drop_last=True)
        way = {_LMDB: lambda: _drain(loader)}
        # Apart from the others: what forks leaves every page to be faulted in again.
        seconds |= alternate(way, setting.rounds(2, 5), torch.device("cpu"))
    faster = {
        name: ratio(seconds[_LMDB], [median(runs)] * len(seconds[_LMDB]))
        for name, runs in seconds.items()
        if name != _LMDB
    }
    of_plain = {
        name: ratio(seconds[_PLAIN], runs)
        for name, runs in seconds.items()
        if name not in (_LMDB, _PLAIN)
    }
    taken = {name: median(runs) for name, runs in seconds.items()}
    said = [f"{_LMDB}: {taken[_LMDB]:.2f} s an epoch"]
    for name in faster:
        share = f", {100 * of_plain[name]['median']:.0f} % of x[perm]" if name in of_plain else ""
        said.append(
            f"{name}: {taken[name]:.3f} s, {faster[name]['median']:.0f} times faster{share}"
        )
    return {
        "rows": rows,
        "seconds": {name: summarise(runs) for name, runs in seconds.items()},
        "times faster than LMDB": faster,
        "share of x[perm]'s speed": of_plain,
        "target": "10 times faster than LMDB; what counts is the waiting in training (feeding)",
        "says": f"{rows} x {shape.width}; " + "; ".join(said),
    }


def feeding(setting: Setting) -> Found:
    """What share of a SAELens BatchTopK run goes by waiting for :class:`FeatureBatches`."""
    shape, steps = setting.shape, 40 if setting.full else 4
    x = features(4 * shape.batch, shape, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        _write_set(Path(folder) / "set", x.half())
        batches = FeatureBatches(
            FeatureSet.open(Path(folder) / "set"), batch_size=shape.batch, device=setting.device
        )
        trainer = batchtopk_trainer(setting, batches.tensors(), steps * shape.batch)
        profile = cProfile.Profile()
        profile.runcall(trainer.fit)
    of = {name: taken for (_, _, name), (_, _, _, taken, _) in pstats.Stats(profile).stats.items()}  # type: ignore[attr-defined]
    shown = {name: of[name] for name in ("fit", "_train_step", "tensors")}
    share = shown["tensors"] / shown["fit"]
    return {
        "steps": steps,
        "cumulative seconds": shown,
        "share": share,
        "target": "under 2 %",
        "says": f"{100 * share:.2f} % of {shown['fit']:.1f} s for {steps} steps "
        f"({1000 * shown['tensors'] / steps:.2f} ms a batch)",
    }


class _Model(NamedTuple):
    """A vision transformer and how many images of it fit a benchmark on a CPU."""

    width: int
    layers: int
    heads: int
    patch: int
    images: int
    batch: int


_MODELS = {
    "ViT-L/14": _Model(1024, 24, 16, patch=14, images=48, batch=16),  # the paper's
    "ViT-B/32": _Model(768, 12, 12, patch=32, images=256, batch=32),
}


def extraction(setting: Setting) -> Found:
    """Extraction from JPEG files against a bare loop of the encoder over tensors in memory."""
    found = {}
    for name, size in _MODELS.items():
        if setting.full or name == "ViT-B/32":
            seconds = _extract_and_loop(setting, size)
            found[name] = {
                "images": size.images,
                "seconds": {way: summarise(taken) for way, taken in seconds.items()},
                "share": ratio(seconds["bare loop"], seconds["extract"]),
                "images a second": size.images / summarise(seconds["extract"])["median"],
            }
    return {
        "encoders": found,
        "target": "95 % of the bare loop's images a second",
        "says": "; ".join(
            f"{name}: {100 * one['share']['median']:.1f} % at {one['images a second']:.2f} a second"
            for name, one in found.items()
        ),
    }


def _extract_and_loop(setting: Setting, size: _Model) -> dict[str, list[float]]:
    encoder = _clip(size)
    encoder.model.to(setting.device)
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        _write_photos(images, size.images)
        inputs = torch.stack([encoder.preprocess(Image.open(p)) for p in sorted(images.iterdir())])
        fresh = (Path(folder) / f"{run}" for run in itertools.count())

        def extracting() -> None:
            done = extract(
                images,
                encoder,
                next(fresh),
                batch_size=size.batch,
                device=setting.device,
                progress=False,
            )
            # Without what it does once: the weights' checksum, and one image to learn the width.
            running.append(done.seconds)

        def bare() -> None:
            with torch.inference_mode():
                for part in inputs.split(size.batch):
                    encoder.forward(part.to(setting.device)).half().cpu()

        running: list[float] = []
        ways = {"bare loop": bare, "extract": extracting}
        seconds = alternate(ways, setting.rounds(2, 3), setting.device, warm_up=False)
        return {**seconds, "extract": running}


def extraction_memory(setting: Setting) -> Found:
    """Peak memory of extraction from few images and from ten times as many."""
    peaks = {}
    for images in (4_000, 40_000) if setting.full else (1_000, 10_000):
        command = [sys.executable, "-m", "benchmarks.extract_small", str(images)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[images] = float(done.stdout.split()[-1])
    few, many = peaks.values()
    return {
        "MiB": peaks,
        "target": "flat",
        "says": "peak "
        + ", ".join(f"{peak:.0f} MiB for {images} images" for images, peak in peaks.items())
        + f": {100 * (many / few - 1):+.1f} %",
    }


class _LmdbRecords(Dataset[Tensor]):
    """One record an image, normalised as it is read: the MonoLoss paper's appendix B."""

    def __init__(self, path: str, rows: int) -> None:
        self.path, self.rows = path, rows
        self.database: Any = None

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, number: int) -> Tensor:
        if self.database is None:  # opened by each worker
            self.database = lmdb.open(self.path, readonly=True, lock=False, readahead=False)
        with self.database.begin() as transaction:
            record = transaction.get(b"%08d" % number)
        x = torch.from_numpy(np.frombuffer(record, np.float32).copy())
        return normalize(x, dim=0)


def _write_lmdb(path: Path, x: Tensor) -> None:
    size = 4 * x.nbytes + (1 << 26)
    with lmdb.open(str(path), map_size=size) as database, database.begin(write=True) as written:
        for number, row in enumerate(x.numpy()):
            written.put(b"%08d" % number, row.tobytes())


def _write_set(folder: Path, x: Tensor) -> None:
    """Write features as :func:`extract` would."""
    dtype = str(x.dtype).removeprefix("torch.")
    store.begin(folder, FeatureRecord(dtype=dtype, width=x.shape[1]))
    with store.claim(folder, "all"):
        store.note_total(folder, len(x))
        schema = features_schema(x.shape[1], dtype, True, None)
        writer = ShardWriter(folder, schema, save_every=60.0)
        for part in torch.arange(len(x)).split(1024):
            rows = range(int(part[0]), int(part[-1]) + 1)
            ids = [f"{row:08d}.jpg" for row in rows]
            writer.add(EncodedRows(rows, x[part].numpy(), [0] * len(rows), ids))
        writer.save()
    store.complete(folder)


def _write_photos(folder: Path, count: int) -> None:
    """Write JPEG files of the size of ImageNet's: parts of two photographs."""
    folder.mkdir()
    photos = load_sample_images().images
    generator = np.random.default_rng(0)
    for number in range(count):
        top, left = int(generator.integers(0, 50)), int(generator.integers(0, 140))
        part = photos[number % 2][top : top + 375, left : left + 500]
        Image.fromarray(part).save(folder / f"{number:05d}.jpg", quality=90)


class _Processed:
    def __init__(self) -> None:
        self.processor = CLIPImageProcessor()

    def __call__(self, image: Any) -> Tensor:
        pixels: Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels


def _clip(size: _Model) -> Encoder:
    """Return CLIP's image tower with random weights."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        patch_size=size.patch,
        projection_dim=768,
    )
    model = CLIPVisionModelWithProjection(config).eval()

    def forward(pixels: Tensor) -> Tensor:
        embeddings: Tensor = model(pixel_values=pixels).image_embeds
        return embeddings

    return Encoder(model, _Processed(), forward, {"name": "random weights"})


def _drain(loader: DataLoader[Tensor]) -> None:
    for _ in loader:
        pass

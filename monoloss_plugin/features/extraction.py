"""From images to a feature dataset: one pass of a frozen encoder, interruptible and shared."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from monoloss_plugin._checks import require_choice
from monoloss_plugin._optional import missing_extra
from monoloss_plugin.features import shards
from monoloss_plugin.features.encoders import Encoder, Output, load_encoder
from monoloss_plugin.features.encoders.encoder import weights_sha256
from monoloss_plugin.features.images import (
    Loaded,
    Preparation,
    batches_by_number,
    batches_of_stream,
    in_batches,
    said,
    to_device,
    without_infinite,
)
from monoloss_plugin.features.sources import Row, Source, open_source

try:
    import datasets
    import psutil
    from tqdm.auto import tqdm
except ModuleNotFoundError as error:
    raise missing_extra(error, "vision") from error

logger = logging.getLogger(__name__)

Precision = Literal["bfloat16", "float16"]

_STREAM_SHARD = 16_384
_SHARDS = 32
"""About as many shards a source of known size: enough to share, few enough to read fast."""
_LARGEST_SHARD = 65_536
_ROUND = 1024
_TRIED = 1000
"""So many images may be unreadable before the first that is."""
_VERSIONS = ("monoloss_plugin", "torch", "datasets", "pillow")
_SECONDS = 5.0
"""About as long as a batch may take: what a kill can lose."""
_LARGEST_BATCH = {"cuda": 1024}
_LARGEST_BATCH_ELSEWHERE = 256


class TooManyUnreadableError(RuntimeError):
    """More images could not be read than the run may leave out."""


@dataclass(frozen=True)
class Extraction:
    """What a run of :func:`extract` did."""

    folder: Path
    images: int
    """Images encoded in this run."""
    rows: int
    """Images in the folder's finished shards, other processes' and earlier runs' included."""
    unreadable: list[dict[str, Any]]
    """Row, id and error of every image left out of those shards."""
    complete: bool
    """Whether every shard is there; if not, other processes are still at theirs."""
    seconds: float


def extract(
    source: Any,
    encoder: str | Encoder,
    out: str | os.PathLike[str],
    *,
    split: str | None = None,
    config: str | None = None,
    streaming: bool = False,
    image: str | None = None,
    label: str | None = None,
    image_id: str | None = None,
    source_revision: str | None = None,
    output: Output | None = None,
    layer: str | None = None,
    revision: str | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    autocast: Precision | None = None,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    shard: tuple[int, int] | None = None,
    shard_size: int | None = None,
    max_unreadable: int = 100,
    progress: bool = True,
) -> Extraction:
    """Encode every image of a source once and store the features as a ``datasets`` folder.

    The folder has the columns ``features`` (fixed-length lists), ``label`` where the source has
    one (-1 where an image has none) and ``image_id``, in the source's order, unnormalised. A run
    that is killed goes on where it was when it is started again with the same arguments.

    Args:
        source: see :func:`~monoloss_plugin.features.sources.open_source`, which also takes
            ``split``, ``config``, ``streaming``, ``image``, ``label``, ``image_id`` and
            ``source_revision`` (as ``revision``).
        encoder: a name for :func:`~monoloss_plugin.features.encoders.load_encoder`, which also
            takes ``output``, ``layer`` and ``revision``; or an :class:`Encoder`.
        out: the folder.
        dtype: of the stored features.
        autocast: run the encoder in this precision; float32 by default.
        device: of the encoder; by default a GPU where there is one, ``LOCAL_RANK``'s under
            torchrun.
        batch_size: images at once; by default what fits the memory that is free.
        workers: processes that decode and preprocess (threads for a stream); 0 for none.
        shard: ``(i, n)``: take every n-th shard from the i-th on, where n processes or machines
            share the work, ``RANK`` and ``WORLD_SIZE`` under torchrun. Each has a share of the
            images to decode and encode; a stream is read by each in full.
        shard_size: images a shard.
        max_unreadable: how many images to leave out before the run stops: unreadable ones, and
            those whose features are not finite in ``dtype``.
        progress: show images a second and the time left.

    Returns:
        What was done; :func:`~monoloss_plugin.features.FeatureSet.open` opens the folder.

    Raises:
        SettingsError: the folder was begun with other settings.
        TooManyUnreadableError: past ``max_unreadable``; the features so far are kept.
        ValueError: an argument out of its range, or no images.
        BusyError: another process is at the same share.
    """
    require_choice(dtype, "dtype", ("float16", "float32"))
    if autocast is not None:
        require_choice(autocast, "autocast", ("bfloat16", "float16"))
    for name, given, least in (
        ("batch_size", batch_size, 1),
        ("shard_size", shard_size, 1),
        ("workers", workers, 0),
        ("max_unreadable", max_unreadable, 0),
    ):
        if given is not None and given < least:
            raise ValueError(f"{name}: expected at least {least}, got {given}")
    share = _share(shard)
    images = open_source(
        source,
        split=split,
        config=config,
        revision=source_revision,
        streaming=streaming,
        image=image,
        label=label,
        image_id=image_id,
    )
    if isinstance(encoder, str):
        encoder = load_encoder(encoder, revision=revision, output=output, layer=layer)
    elif (output, layer, revision) != (None, None, None):
        raise ValueError("output, layer, revision: these choose of an encoder given by name")
    place = _device(device)
    forward = _Forward(encoder, place, autocast)
    prepare = Preparation(encoder.preprocess, encoder.mode)
    probe = _first_readable(images, prepare)
    width = forward(_batch_of(probe, 1)).shape[1]

    size = shard_size or _shard_size(images.num_images)
    folder = Path(out)
    settings = {
        "format": 1,
        "encoder": _described(encoder),
        "source": images.record,
        "dtype": dtype,
        "autocast": autocast,
        "width": width,
        "shard_size": size,
        "versions": {name: version(name) for name in _VERSIONS},
    }
    shards.begin(folder, settings)
    if shards.is_complete(folder) and shards.damaged(folder):
        shards.reopen(folder)
    if images.num_images is not None:
        shards.note_source_rows(folder, images.num_images)
    schema = shards.features_schema(width, dtype, images.label is not None, images.classes)
    started, encoded = time.perf_counter(), 0
    if not shards.is_complete(folder):
        run = _Run(
            folder,
            images,
            schema,
            shard_size=size,
            share=share,
            max_unreadable=max_unreadable,
        )
        batch_size = batch_size or fitting_batch_size(forward, probe)
        workers = _workers(place) if workers is None else workers
        if images.num_images is None:
            batches = run.of_stream(prepare, batch_size, workers)
        else:
            batches = batches_by_number(
                images,
                prepare,
                run.by_number(batch_size),
                workers=workers,
                pin_memory=place.type == "cuda",
            )
        try:
            with _bar(run, progress) as shown:
                encoded = run.encode(forward, shown(batches), getattr(torch, dtype))
        finally:
            run.close()
        shards.complete(folder)
    done = shards.finished(folder)
    return Extraction(
        folder=folder,
        images=encoded,
        rows=sum(s.rows for s in done.values()),
        unreadable=[one for _, s in sorted(done.items()) for one in s.unreadable],
        complete=shards.is_complete(folder),
        seconds=time.perf_counter() - started,
    )


class _Forward:
    """An encoder on its device: from a batch of inputs to features on the CPU."""

    def __init__(
        self,
        encoder: Encoder,
        device: torch.device,
        autocast: Literal["bfloat16", "float16"] | None,
    ) -> None:
        self.encoder, self.device = encoder, device
        self.model: nn.Module = encoder.model.to(device).eval()
        self.precision = None if autocast is None else getattr(torch, autocast)

    @torch.inference_mode()
    def __call__(self, inputs: Any) -> Tensor:
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
        return torch.cat(
            (
                self.in_parts(_part_of(inputs, slice(0, half)), half),
                self.in_parts(_part_of(inputs, slice(half, size)), size - half),
            )
        )


class _Run:
    """This process's share of an extraction."""

    def __init__(
        self,
        folder: Path,
        source: Source,
        schema: datasets.Features,
        *,
        shard_size: int,
        share: tuple[int, int],
        max_unreadable: int,
    ) -> None:
        self.folder, self.source, self.schema = folder, source, schema
        self.shard_size, self.max_unreadable = shard_size, max_unreadable
        self.part, self.parts = share
        self.source_rows = source.num_images or shards.source_rows(folder)
        self.finished = shards.finished(folder)
        self.writers = {
            number: shards.ShardWriter(folder, number, schema)
            for number in shards.begun(folder)
            if self._is_mine(number)
        }
        self.unreadable = [one for record in self.finished.values() for one in record.unreadable]
        self.unreadable += [one for writer in self.writers.values() for one in writer.unreadable]
        self.before = sum(writer.done for writer in self.writers.values()) + sum(
            record.source_rows for n, record in self.finished.items() if n % self.parts == self.part
        )
        """Rows of this share that earlier runs have done."""

    @property
    def rows_of_share(self) -> int:
        """Rows of the source in this share, for a source of known size."""
        assert self.source_rows is not None
        starts = range(self.part * self.shard_size, self.source_rows, self.parts * self.shard_size)
        return sum(min(self.shard_size, self.source_rows - start) for start in starts)

    def encode(self, forward: _Forward, batches: Iterator[Loaded], stored: torch.dtype) -> int:
        """Encode and write what is missing, and return how many images that was."""
        encoded = 0
        width = self.schema["features"].length
        self._check_unreadable()
        self._finish_whole()
        for loaded in batches:
            if not self._is_mine(loaded.numbers[0] // self.shard_size):
                continue  # read ahead, before another process finished it
            features = torch.empty((0, width), dtype=stored)
            if loaded.inputs is not None:
                features = forward.in_parts(loaded.inputs, len(loaded.ids)).to(stored).cpu()
                encoded += len(features)
                loaded, features = without_infinite(loaded, features)
            self._write(loaded, features)
        self._finish_whole()
        return encoded

    def by_number(self, batch_size: int) -> Iterator[list[int]]:
        """Yield batches of this share's rows that are not done, each within a shard."""
        assert self.source_rows is not None
        resumed = {number: writer.done for number, writer in self.writers.items()}
        for number in range(self.part, -(-self.source_rows // self.shard_size), self.parts):
            if self._is_mine(number) and not shards.is_finished(self.folder, number):
                start = number * self.shard_size
                end = min(start + self.shard_size, self.source_rows)
                yield from in_batches(range(start + resumed.get(number, 0), end), batch_size)

    def of_stream(self, prepare: Preparation, batch_size: int, workers: int) -> Iterator[Loaded]:
        """Yield batches of a stream's rows that are this share's and not done."""
        resumed = {number: writer.done for number, writer in self.writers.items()}

        def wanted(row: int) -> bool:
            number, within = divmod(row, self.shard_size)
            return self._is_mine(number) and within >= resumed.get(number, 0)

        first = next(n for n in itertools.count(self.part, self.parts) if self._is_mine(n))
        if self.source_rows is not None and first * self.shard_size >= self.source_rows:
            return iter(())
        return batches_of_stream(
            self.source,
            prepare,
            wanted,
            start=first * self.shard_size + resumed.get(first, 0),
            batch_size=batch_size,
            shard_size=self.shard_size,
            workers=workers,
            ended=self._stream_ended,
        )

    def close(self) -> None:
        """Leave unfinished shards for another run."""
        for writer in self.writers.values():
            writer.close()

    def _is_mine(self, number: int) -> bool:
        return number % self.parts == self.part and number not in self.finished

    def _write(self, loaded: Loaded, features: Tensor) -> None:
        number = loaded.numbers[0] // self.shard_size
        if number not in self.writers:
            writer = shards.ShardWriter(self.folder, number, self.schema)
            if shards.is_finished(self.folder, number):  # looked for under the writer's lock
                writer.discard()
                self.finished = shards.finished(self.folder)
                return
            self.writers[number] = writer
        writer = self.writers[number]
        writer.add(
            features.numpy(), loaded.labels, loaded.ids, len(loaded.numbers), loaded.unreadable
        )
        self.unreadable += loaded.unreadable
        self._check_unreadable()
        self._finish_if_whole(writer)

    def _check_unreadable(self) -> None:
        if len(self.unreadable) > self.max_unreadable:
            last = "; ".join(f"{bad['image_id']} ({bad['error']})" for bad in self.unreadable[-3:])
            raise TooManyUnreadableError(
                f"{len(self.unreadable)} images left out, more than max_unreadable="
                f"{self.max_unreadable}, the last of them {last}. Features so far are kept."
            )

    def _finish_whole(self) -> None:
        for writer in list(self.writers.values()):
            self._finish_if_whole(writer)

    def _finish_if_whole(self, writer: shards.ShardWriter) -> None:
        whole = self.shard_size
        if self.source_rows is not None:
            whole = min(whole, self.source_rows - writer.number * self.shard_size)
        if writer.done == whole:
            self.finished[writer.number] = writer.finish()
            del self.writers[writer.number]

    def _stream_ended(self, rows: int) -> None:
        self.source_rows = rows
        shards.note_source_rows(self.folder, rows)


def fitting_batch_size(forward: _Forward, probe: Any) -> int:
    """Return a power of two of images that fit the free memory and take a few seconds at most.

    On a GPU a small batch's peak is measured. Elsewhere the peak is taken to be four times the
    largest output of any module: without gradients, little more is alive at once.
    """
    outputs = [0]

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append(output.nbytes)

    forward(_batch_of(probe, 2))
    handles = [m.register_forward_hook(note) for m in forward.model.modules()]
    if forward.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(forward.device)
        held = torch.cuda.memory_allocated(forward.device)
    started = time.perf_counter()
    forward(_batch_of(probe, 2))
    seconds = (time.perf_counter() - started) / 2
    for handle in handles:
        handle.remove()
    if forward.device.type == "cuda":
        image_bytes = (torch.cuda.max_memory_allocated(forward.device) - held) / 2
        free, _ = torch.cuda.mem_get_info(forward.device)
    else:
        image_bytes, free = 4 * max(outputs) / 2, psutil.virtual_memory().available
    largest = _LARGEST_BATCH.get(forward.device.type, _LARGEST_BATCH_ELSEWHERE)
    fits = min(largest, _SECONDS / seconds, 0.5 * free / max(image_bytes, 1))
    return 1 << max(0, int(fits).bit_length() - 1)


def _first_readable(source: Source, prepare: Preparation) -> Any:
    """Return the encoder's input of one image, to learn the features' width from.

    Raises:
        ValueError: none of the first images could be read.
    """
    first = None
    rows: Iterator[Row]
    if source.num_images is None:
        rows = (row for _, row in source.stream(0))
    else:
        rows = (source[number] for number in range(source.num_images))
    for row in itertools.islice(rows, _TRIED):
        prepared = prepare(row)
        if not isinstance(prepared, Exception):
            return prepared
        first = first or f"{row.image_id}: {said(prepared, row)}"
    if first is None:
        raise ValueError("source: expected at least one image, got an empty stream")
    raise ValueError(f"source: not one of the first images could be read; {first}")


def _described(encoder: Encoder) -> dict[str, Any]:
    """Return an encoder's record, which tells its weights."""
    record = {**encoder.record, "mode": encoder.mode}
    if "weights_sha256" not in record:
        record["weights_sha256"] = weights_sha256(encoder.model)
    return record


def _share(shard: tuple[int, int] | None) -> tuple[int, int]:
    if shard is None:
        shard = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    part, parts = shard
    if not 0 <= part < parts:
        raise ValueError(f"shard: expected (i, n) with 0 <= i < n, got {shard}")
    return part, parts


def _device(device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def _workers(device: torch.device) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # An encoder on the CPU needs the cores itself; one process decodes ahead of it.
    return min(16, cores or 1) if device.type != "cpu" else 1


def _shard_size(num_images: int | None) -> int:
    if num_images is None:
        return _STREAM_SHARD
    return min(_LARGEST_SHARD, max(1, -(-num_images // (_SHARDS * _ROUND))) * _ROUND)


def _batch_of(probe: Any, count: int) -> Any:
    """Return a batch of the same input over and over."""
    if isinstance(probe, dict):
        return {name: _batch_of(one, count) for name, one in probe.items()}
    return torch.stack([torch.as_tensor(probe)] * count)


def _part_of(inputs: Any, rows: slice) -> Any:
    if isinstance(inputs, dict):
        return {name: one[rows] for name, one in inputs.items()}
    return inputs[rows]


@contextmanager
def _bar(run: _Run, shown: bool) -> Iterator[Callable[[Iterator[Loaded]], Iterator[Loaded]]]:
    """Yield what passes batches on and shows how far they are, once each is written."""
    total = None
    if run.source_rows is not None:
        total = run.rows_of_share
    with tqdm(
        total=total, initial=run.before, desc="Extracting", unit=" images", disable=not shown
    ) as bar:

        def passing(batches: Iterator[Loaded]) -> Iterator[Loaded]:
            for loaded in batches:
                yield loaded
                bar.update(len(loaded.numbers))
                if run.unreadable:
                    bar.set_postfix(unreadable=len(run.unreadable))

        yield passing

"""From images to a feature set: one pass of a frozen encoder, which may be killed and shared."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from monoloss_plugin._checks import (
    as_device,
    require_at_least,
    require_choice,
    require_number,
    require_share,
)
from monoloss_plugin._optional import missing_extra
from monoloss_plugin._places import as_path, kind_of
from monoloss_plugin.features import store
from monoloss_plugin.features.encoders import Encoder, load_encoder
from monoloss_plugin.features.encoders.encoder import weights_sha256
from monoloss_plugin.features.record import FeatureRecord
from monoloss_plugin.features.sources import Row, Source, open_source

try:  # what only extraction needs
    from tqdm.auto import tqdm

    from monoloss_plugin.features import images
    from monoloss_plugin.features.forward import (
        BatchSize,
        Forward,
        Precision,
        fitting_batch_size,
        repeated,
    )
except ModuleNotFoundError as error:
    raise missing_extra(error, "vision") from error

__all__ = ["Extraction", "TooManyUnreadableError", "extract"]

_TRIED = 1000
"""Give up if so many images at the beginning are all unreadable."""
_BLOCK = 16_384
"""Rows of a stream that one process takes at a time, where several share it."""
_VERSIONS = ("monoloss_plugin", "torch", "datasets", "pillow")


class TooManyUnreadableError(RuntimeError):
    """More images were left out than ``max_unreadable`` allows."""


@dataclass(frozen=True)
class Extraction:
    """What a run of :func:`extract` did."""

    folder: Path
    images: int
    """Number of images that this run encoded."""
    rows: int
    """Number of images in the folder, with those of other processes and earlier runs."""
    unreadable: list[store.Unreadable]
    """The images that were left out of the folder."""
    classes: list[str] | None
    """Names of the labels' classes; None where labels have no names."""
    complete: bool
    """Whether the set is complete. If not, other shares of it are not done yet."""
    seconds: float


def extract(
    source: Source | Any,
    encoder: Encoder | str,
    out: str | os.PathLike[str],
    *,
    dtype: Literal["float16", "float32"] = "float16",
    autocast: Precision | None = None,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    shard: tuple[int, int] | None = None,
    save_every: float = 60.0,
    max_unreadable: int = 100,
    progress: bool = True,
) -> Extraction:
    """Encode every image of a source once, and store the features in a folder.

    ``datasets.load_from_disk`` opens the folder. Its columns are ``features`` (lists of fixed
    length, not normalised), ``label`` where the source has one (-1 where an image has none), and
    ``image_id``. The rows have the order of the source.

    If the run is killed, start it again with the same arguments, and it continues.

    Args:
        source: images from :func:`open_source`, or anything that :func:`open_source` takes: a
            ``Path`` or a string such as ``"./photos"``, the name of a Hub dataset, or a
            ``datasets`` object.
        encoder: an :class:`Encoder`, or a name that :func:`load_encoder` takes.
        out: the folder.
        dtype: of the stored features.
        autocast: run the encoder in this precision instead of float32.
        device: of the encoder. By default a GPU if there is one, with the number ``LOCAL_RANK``
            under torchrun.
        batch_size: images to encode at once. By default as many as fit the free memory and take a
            few seconds at most.
        workers: processes that decode and preprocess images (threads for a stream).
        shard: ``(i, n)``: do the i-th of n shares of the work, where several processes or machines
            divide it. Under torchrun, by default ``RANK`` and ``WORLD_SIZE``. Every process reads
            all of a stream, but decodes and encodes only its share.
        save_every: save the features after so many seconds. A killed run loses at most this much
            work, and the batch it was at.
        max_unreadable: stop if more images than this must be left out, because they cannot be read
            or because their features are not finite in ``dtype``.
        progress: show a progress bar.

    Returns:
        What was done. Open the folder with :meth:`FeatureSet.open`.

    Raises:
        SettingsError: the folder was begun with other settings.
        TooManyUnreadableError: too many images were left out. The features so far are saved.
        TypeError, ValueError: an argument is wrong, or there are no images.
        BusyError: another process works on the same share.

    Examples:
        >>> from monoloss_plugin.features import extract, load_encoder, open_source
        >>> photos = open_source("./photos", split="train")  # doctest: +SKIP
        >>> clip = load_encoder("clip-vit-l14", output="cls")  # doctest: +SKIP
        >>> extract(photos, clip, "features/train")  # doctest: +SKIP
    """
    require_choice(dtype, "dtype", ("float16", "float32"))
    if autocast is not None:
        require_choice(autocast, "autocast", ("bfloat16", "float16"))
    for name, given, least in (
        ("batch_size", batch_size, 1),
        ("workers", workers, 0),
        ("max_unreadable", max_unreadable, 0),
    ):
        if given is not None:
            require_at_least(least, given, name)
    require_number(save_every, "save_every")
    if not save_every >= 0:
        raise ValueError(f"save_every: expected seconds, 0 or more, got {save_every}")
    share = _share(shard)
    folder = as_path(out, "out")
    opened = source if isinstance(source, Source) else open_source(source)
    if isinstance(encoder, str):
        encoder = load_encoder(encoder)
    elif not isinstance(encoder, Encoder):
        raise TypeError(f"encoder: expected an Encoder or a name, got {kind_of(encoder)}")
    forward = Forward(encoder, _device(device), autocast, getattr(torch, dtype))
    prepare = images.Preparation(encoder.preprocess, encoder.mode)
    probe = _first_readable(opened, prepare)
    width = forward(repeated(probe, 1)).shape[1]
    settings = FeatureRecord(
        encoder=_record_of(encoder),
        source=opened.record,
        dtype=dtype,
        autocast=autocast,
        width=width,
        versions={name: version(name) for name in _VERSIONS},
    )
    store.begin(folder, settings)
    store.repair(folder)
    started, encoded = time.perf_counter(), 0
    if not store.is_complete(folder):
        with store.claim(folder, f"share-{share[0]}-of-{share[1]}"):
            schema = store.features_schema(width, dtype, opened.label is not None, opened.classes)
            encoded = _encode_share(
                opened,
                share,
                prepare,
                forward,
                BatchSize(batch_size) if batch_size else fitting_batch_size(forward, probe),
                store.ShardWriter(folder, schema, save_every),
                workers=_workers(forward.device) if workers is None else workers,
                max_unreadable=max_unreadable,
                progress=progress,
            )
    complete = store.complete(folder)
    done = store.progress_of(folder)
    return Extraction(
        folder=folder,
        images=encoded,
        rows=done.rows,
        unreadable=done.unreadable,
        classes=opened.classes,
        complete=complete,
        seconds=time.perf_counter() - started,
    )


def _encode_share(
    source: Source,
    share: tuple[int, int],
    prepare: images.Preparation,
    forward: Forward,
    size: BatchSize,
    writer: store.ShardWriter,
    *,
    workers: int,
    max_unreadable: int,
    progress: bool,
) -> int:
    """Encode and save what a share lacks, and return how many images that was."""
    if source.num_images is not None:
        store.note_total(writer.folder, source.num_images)
    total = store.total_rows(writer.folder) or sys.maxsize
    missing = store.missing_rows(writer.folder, _rows_of_share(source, share, total))
    unreadable = store.progress_of(writer.folder).unreadable
    _check_unreadable(unreadable, max_unreadable)
    left = None if total == sys.maxsize else list(missing)
    if left == []:
        return 0
    if source.num_images is not None:
        pin_memory = forward.device.type == "cuda"
        batches = images.batches_by_number(
            source, prepare, left or (), size, workers=workers, pin_memory=pin_memory
        )
    else:
        stream = _read_to_end(source, writer.folder)
        batches = images.batches_of_stream(stream, prepare, left or missing, size, workers=workers)
    rows = None if left is None else sum(map(len, left))
    with tqdm(total=rows, desc="Extracting", unit=" images", disable=not progress) as bar:
        return _encode(batches, forward, size, writer, unreadable, max_unreadable, bar)


def _encode(
    batches: Iterator[images.Prepared],
    forward: Forward,
    size: BatchSize,
    writer: store.ShardWriter,
    unreadable: list[store.Unreadable],
    max_unreadable: int,
    bar: Any,
) -> int:
    """Encode and save batches, and return how many images were encoded."""
    encoded, started = 0, time.perf_counter()
    try:
        for batch in batches:
            if store.is_complete(writer.folder):  # other processes have done these rows too
                break
            features = torch.empty((0, writer.width), dtype=forward.dtype)
            if batch.inputs is not None:
                features = forward.in_parts(batch.inputs, len(batch.readable)).cpu()
                encoded += len(features)
                batch, features = images.without_infinite(batch, features)
            writer.add(
                batch.rows,
                features.numpy(),
                [row.label for row in batch.readable],
                [row.image_id for row in batch.readable],
                batch.unreadable,
            )
            unreadable += batch.unreadable
            _check_unreadable(unreadable, max_unreadable)
            ended = time.perf_counter()
            size.measured(len(batch.rows), ended - started, forward.most)
            started = ended
            bar.update(len(batch.rows))
            if unreadable:
                bar.set_postfix(unreadable=len(unreadable))
    finally:
        writer.save()
    return encoded


def _rows_of_share(source: Source, share: tuple[int, int], total: int) -> Iterable[range]:
    """Return the i-th of n equal parts of a source; of a stream, every n-th block."""
    part, parts = share
    if source.num_images is not None:
        return [range(part * total // parts, (part + 1) * total // parts)]
    starts = range(part * _BLOCK, total, parts * _BLOCK)
    return (range(start, min(start + _BLOCK, total)) for start in starts)


def _read_to_end(source: Source, folder: Path) -> Iterator[Row]:
    """Yield a stream's rows from the first that no process has done, and note their number."""
    first = next(store.missing_rows(folder, [range(sys.maxsize)])).start
    row = None
    # The row before is read too: if the stream ends with it, its end is seen.
    for row in source.stream(max(0, first - 1)):
        yield row
    if row is not None:
        store.note_total(folder, row.number + 1)


def _check_unreadable(unreadable: list[store.Unreadable], most: int) -> None:
    if len(unreadable) > most:
        last = "; ".join(f"{one.image_id} ({one.error})" for one in unreadable[-3:])
        raise TooManyUnreadableError(
            f"{len(unreadable)} images left out, more than max_unreadable={most}, the last of them "
            f"{last}. Features so far are saved."
        )


def _first_readable(source: Source, prepare: images.Preparation) -> Any:
    """Return the encoder's input of the first readable image, to try the encoder on.

    Raises:
        ValueError: none of the first images can be read.
    """
    said = None
    for row in itertools.islice(source.stream(), _TRIED):
        prepared = prepare(row)
        if not isinstance(prepared, Exception):
            return prepared
        said = said or f"{row.image_id}: {images.describe_error(prepared, row)}"
    if said is None:
        raise ValueError("source: expected at least one image, got an empty stream")
    raise ValueError(f"source: not one of the first images could be read; {said}")


def _record_of(encoder: Encoder) -> dict[str, Any]:
    """Return an encoder's record, with the checksum of its weights."""
    record = {**encoder.record, "mode": encoder.mode}
    if "weights_sha256" not in record:
        record["weights_sha256"] = weights_sha256(encoder.model)
    return record


def _share(shard: tuple[int, int] | None) -> tuple[int, int]:
    if shard is None:
        shard = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return require_share(shard)


def _device(device: torch.device | str | None) -> torch.device:
    if device is not None:
        return as_device(device)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def _workers(device: torch.device) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # An encoder on the CPU needs the cores itself; one process decodes ahead of it.
    return min(16, cores or 1) if device.type != "cpu" else 1

"""From images to a feature set: one pass of a frozen encoder, which may be killed and shared."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from monoloss_plugin._checks import (
    device_or_gpu,
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
from monoloss_plugin.features.shards import (
    EncodedRows,
    ShardWriter,
    Unreadable,
    features_schema,
    missing_rows,
)
from monoloss_plugin.features.sources import Row, Source, open_source

try:  # what only extraction needs
    from tqdm.auto import tqdm

    from monoloss_plugin.features.batch_encoder import BatchEncoder, Precision
    from monoloss_plugin.features.images import ImageLoader, describe_error
except ModuleNotFoundError as error:
    raise missing_extra(error, "vision") from error

__all__ = ["Extraction", "TooManyUnreadableError", "extract"]

_TRIED = 1000
"""Give up if so many images at the beginning are all unreadable."""
_BLOCK = 16_384
"""Rows of a stream that one process takes at a time, where several share it."""
_AT_A_TIME = 1000
"""Images of a stream, for which the size on disk is said."""
_VERSIONS = ("monoloss_plugin", "torch", "datasets", "pillow")


logger = logging.getLogger(__name__)


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
    unreadable: list[Unreadable]
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
    keep_patches: int | None = None,
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

    An encoder loaded with ``output="patches"`` or ``"cls+patches"`` gives a patch set: ``features``
    is then a list of such lists, and there are the columns ``places``, ``grid`` and ``pooled``.
    Before it starts, the size on disk is logged.

    If the run is killed, start it again with the same arguments, and it continues.

    Args:
        source: images from :func:`open_source`, or anything that :func:`open_source` takes: a
            ``Path`` or a string such as ``"./photos"``, the name of a Hub dataset, or a
            ``datasets`` object.
        encoder: an :class:`Encoder`, or a name that :func:`load_encoder` takes.
        out: the folder.
        dtype: of the stored features.
        keep_patches: store so many patches of each image, chosen at random by the image's row,
            and its class token. The mean is still over all its patches. By default all are stored.
        autocast: run the encoder in this precision instead of float32.
        device: of the encoder. By default a GPU if there is one, with the number ``LOCAL_RANK``
            under torchrun.
        batch_size: images to encode at once. By default it grows while a batch takes less than a
            few seconds, up to 256 images on a CPU and 1,024 on a GPU. If a batch does not fit the
            GPU's memory, its halves are encoded.
        workers: processes that decode and preprocess images.
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
        TypeError, ValueError: an argument is wrong, there are no images, or the disk is too small
            for their patches.
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
        ("keep_patches", keep_patches, 1),
    ):
        if given is not None:
            require_at_least(least, given, name)
    require_number(save_every, "save_every")
    if not save_every >= 0:
        raise ValueError(f"save_every: expected seconds, 0 or more, got {save_every}")
    share, folder, on = _share(shard), as_path(out, "out"), device_or_gpu(device)
    opened = source if isinstance(source, Source) else open_source(source)
    if isinstance(encoder, str):
        encoder = load_encoder(encoder)
    elif not isinstance(encoder, Encoder):
        raise TypeError(f"encoder: expected an Encoder or a name, got {kind_of(encoder)}")
    if workers is None:
        workers = _workers(on)
    loader = ImageLoader(opened, encoder.preprocess, encoder.mode, workers, on.type == "cuda")
    probe = _first_readable(loader)
    on_device = BatchEncoder(
        encoder, probe, on, getattr(torch, dtype), autocast, batch_size, keep_patches
    )
    settings = FeatureRecord(
        encoder=_record_of(encoder),
        source=opened.record,
        dtype=dtype,
        autocast=autocast,
        patches=on_device.patches,
        width=on_device.width,
        versions={name: version(name) for name in _VERSIONS},
    )
    if on_device.patches and not store.is_complete(folder):
        _say_size(opened, on_device, folder, share)
    store.begin(folder, settings)
    store.repair(folder)
    started, images = time.perf_counter(), 0
    if not store.is_complete(folder):
        with store.claim(folder, f"share-{share[0]}-of-{share[1]}"):
            schema = features_schema(
                on_device.width,
                dtype,
                opened.label is not None,
                opened.classes,
                patches=bool(on_device.patches),
            )
            left = _rows_left(opened, folder, share)
            images = _save(
                _encode(loader, on_device, folder, left),
                ShardWriter(folder, schema, save_every),
                max_unreadable,
                tqdm(total=_total(left), desc="Extracting", unit=" images", disable=not progress),
            )
    complete = store.complete(folder)
    return Extraction(
        folder=folder,
        images=images,
        rows=store.count_rows(folder),
        unreadable=store.unreadable_of(folder),
        classes=opened.classes,
        complete=complete,
        seconds=time.perf_counter() - started,
    )


def _say_size(source: Source, encoder: BatchEncoder, folder: Path, share: tuple[int, int]) -> None:
    """Log how much disk the patches of a source take, and how much there is.

    Raises:
        ValueError: there is not enough for a source whose size is known.
    """
    dtype = str(encoder.dtype).removeprefix("torch.")
    vectors, width, item = encoder.vectors_of_image, encoder.width, encoder.dtype.itemsize
    of_image = vectors * (width * item + 2) + width * item  # also their places, and their mean
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    free, total = shutil.disk_usage(there).free, source.num_images
    images = _AT_A_TIME if total is None else total
    logger.info(
        "%s images x %d patches x %d take %s as %s%s; %s are free on the disk of %s",
        f"{images:,}" if total is not None else f"each {images:,}",
        *(vectors, width, _bytes(images * of_image), dtype),
        "" if share[1] > 1 else ", and for a short time at the end as much again",
        *(_bytes(free), folder),
    )
    if total is None:
        return
    left = sum(map(len, missing_rows(folder, _rows_of_share(source, share, total))))
    needed = of_image * (left + (total if share[1] == 1 else 0))
    if needed > free:
        narrower = "" if dtype == "float16" else ", dtype='float16' takes half of it"
        raise ValueError(
            f"out: {_bytes(needed)} are needed on the disk of {folder} for {vectors} patches of "
            f"each image as {dtype}, and {_bytes(free)} are free; keep_patches= stores fewer "
            f"patches of each image{narrower}"
        )


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _rows_left(source: Source, folder: Path, share: tuple[int, int]) -> Iterable[range]:
    """Return the rows of a share that no shard has: a list, or without end for a stream."""
    if source.num_images is not None:
        store.note_total(folder, source.num_images)
    total = store.total_rows(folder)
    left = missing_rows(folder, _rows_of_share(source, share, total or sys.maxsize))
    return left if total is None else list(left)


def _total(spans: Iterable[range]) -> int | None:
    return sum(map(len, spans)) if isinstance(spans, list) else None


def _encode(
    loader: ImageLoader, encoder: BatchEncoder, folder: Path, left: Iterable[range]
) -> Iterator[EncodedRows]:
    """Encode the rows that are left, batch by batch."""
    if not left or store.is_complete(folder):
        return

    def size() -> int:
        return encoder.batch_size

    stream = None if loader.source.num_images is not None else _read_on(loader.source, folder)
    for batch in loader.batches(left, size, stream):
        if store.is_complete(folder):  # other processes have done these rows too
            return
        yield encoder.encode(batch)


def _save(
    batches: Iterable[EncodedRows], writer: ShardWriter, max_unreadable: int, bar: Any
) -> int:
    """Save batches, and return how many images were encoded."""
    images, unreadable = 0, store.unreadable_of(writer.folder)
    with bar:
        _check_unreadable(unreadable, max_unreadable)
        try:
            for batch in batches:
                writer.add(batch)
                images += len(batch.ids)
                unreadable += batch.unreadable
                bar.update(len(batch.rows))
                if unreadable:
                    bar.set_postfix(unreadable=len(unreadable))
                _check_unreadable(unreadable, max_unreadable)
        finally:
            writer.save()
    return images


def _rows_of_share(source: Source, share: tuple[int, int], total: int) -> Iterator[range]:
    """Yield the rows of a share: the i-th of n equal parts, or of a stream every n-th block."""
    part, parts = share
    size = _BLOCK if source.num_images is None else -(-total // parts)
    for start in range(part * size, total, parts * size):
        yield range(start, min(start + size, total))


def _read_on(source: Source, folder: Path) -> Iterator[Row]:
    """Yield a stream's rows from the first that no process has done; at its end, note the total."""
    first = next(missing_rows(folder, [range(sys.maxsize)])).start
    row = None
    # The row before is read too: if the stream ends with it, its end is seen.
    for row in source.stream(max(0, first - 1)):
        yield row
    if row is not None:
        store.note_total(folder, row.number + 1)


def _check_unreadable(unreadable: list[Unreadable], most: int) -> None:
    if len(unreadable) > most:
        last = "; ".join(f"{one.image_id} ({one.error})" for one in unreadable[-3:])
        raise TooManyUnreadableError(
            f"{len(unreadable)} images left out, more than max_unreadable={most}, the last of them "
            f"{last}. Features so far are saved."
        )


def _first_readable(loader: ImageLoader) -> Any:
    """Return the encoder's input of the first readable image, to try the encoder on.

    Raises:
        ValueError: none of the first images can be read.
    """
    said = None
    for row in itertools.islice(loader.source.stream(), _TRIED):
        prepared = loader.prepare(row)
        if not isinstance(prepared, Exception):
            return prepared
        said = said or f"{row.image_id}: {describe_error(prepared, row)}"
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


def _workers(device: torch.device) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # An encoder on the CPU needs the cores itself; one process decodes ahead of it.
    return min(16, cores or 1) if device.type != "cpu" else 1

"""From images to a feature dataset: one pass of a frozen encoder, interruptible and shared."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from monoloss_plugin._checks import as_device, require_at_least, require_choice, require_share
from monoloss_plugin._optional import missing_extra
from monoloss_plugin.features import shards, whole
from monoloss_plugin.features.encoders import Encoder, Output, load_encoder
from monoloss_plugin.features.encoders.encoder import weights_sha256
from monoloss_plugin.features.forward import (
    BatchSize,
    Forward,
    Precision,
    batch_of,
    fitting_batch_size,
)
from monoloss_plugin.features.images import Loaded, Preparation, batches_by_number, said
from monoloss_plugin.features.share import Share, TooManyUnreadableError
from monoloss_plugin.features.sources import Row, Source, open_source

try:
    from tqdm.auto import tqdm
except ModuleNotFoundError as error:
    raise missing_extra(error, "vision") from error

__all__ = ["Extraction", "TooManyUnreadableError", "extract"]

_STREAM_SHARD = 16_384
_SHARDS = 32
"""About as many shards a source of known size: enough to share, few enough to read fast."""
_LARGEST_SHARD = 65_536
_ROUND = 1024
_TRIED = 1000
"""So many images may be unreadable before the first that is."""
_VERSIONS = ("monoloss_plugin", "torch", "datasets", "pillow")


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
    classes: list[str] | None
    """Names of the labels' classes; None where labels have none."""
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
        source: images, as :func:`~monoloss_plugin.features.sources.open_source` takes them: a
            ``Path`` or a string such as ``"./photos"``, ``open-images:FOLDER``, a Hub dataset's
            name, or a ``datasets`` object.
        encoder: a name for :func:`~monoloss_plugin.features.encoders.load_encoder`, or an
            :class:`Encoder`.
        out: the folder.
        split: of the source.
        config: of a Hub dataset.
        streaming: read a Hub dataset without downloading it first.
        image: column of images; found by its type by default.
        label: column of labels, in the same way.
        image_id: column of ids, in the same way; without one, row numbers and file names.
        source_revision: commit, tag or branch of a Hub dataset.
        output: ``"pooled"``, ``"cls"`` or ``"mean"``, as ``load_encoder`` takes it.
        layer: name of a module whose output to take.
        revision: commit of the encoder's weights.
        dtype: of the stored features.
        autocast: run the encoder in this precision; float32 by default.
        device: of the encoder; by default a GPU where there is one, ``LOCAL_RANK``'s under
            torchrun.
        batch_size: images at once; by default what fits the memory that is free and takes a few
            seconds at most, measured on the way.
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
        if given is not None:
            require_at_least(least, given, name)
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
    forward = Forward(encoder, place, autocast)
    prepare = Preparation(encoder.preprocess, encoder.mode)
    probe = _first_readable(images, prepare)
    width = forward(batch_of(probe, 1)).shape[1]

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
    if shards.is_complete(folder) and whole.damaged(folder):
        whole.reopen(folder)
    if images.num_images is not None:
        shards.note_source_rows(folder, images.num_images)
    schema = shards.features_schema(width, dtype, images.label is not None, images.classes)
    started, encoded = time.perf_counter(), 0
    if not shards.is_complete(folder):
        run = Share(
            folder,
            images,
            schema,
            shard_size=size,
            share=share,
            batch_size=BatchSize(batch_size) if batch_size else fitting_batch_size(forward, probe),
            max_unreadable=max_unreadable,
        )
        workers = _workers(place) if workers is None else workers
        if images.num_images is None:
            batches = run.of_stream(prepare, workers)
        else:
            batches = batches_by_number(
                images,
                prepare,
                run.by_number(),
                workers=workers,
                pin_memory=place.type == "cuda",
            )
        try:
            with _bar(run, progress) as shown:
                encoded = run.encode(forward, shown(batches), getattr(torch, dtype))
        finally:
            run.close()
    whole.complete(folder)
    done = shards.finished(folder)
    return Extraction(
        folder=folder,
        images=encoded,
        rows=sum(s.rows for s in done.values()),
        unreadable=[one for _, s in sorted(done.items()) for one in s.unreadable],
        classes=images.classes,
        complete=shards.is_complete(folder),
        seconds=time.perf_counter() - started,
    )


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


def _shard_size(num_images: int | None) -> int:
    if num_images is None:
        return _STREAM_SHARD
    return min(_LARGEST_SHARD, max(1, -(-num_images // (_SHARDS * _ROUND))) * _ROUND)


@contextmanager
def _bar(run: Share, shown: bool) -> Iterator[Callable[[Iterator[Loaded]], Iterator[Loaded]]]:
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

"""Images on their way to an encoder: decoded, preprocessed and put into batches beside it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from monoloss_plugin.features.forward import BatchSize, map_tensors
from monoloss_plugin.features.sources import Row, Source
from monoloss_plugin.features.store import Unreadable


@dataclass(frozen=True)
class Prepared:
    """A batch of consecutive source rows, ready for the encoder."""

    rows: range
    """The rows of the source, readable or not."""
    inputs: Any
    """The encoder's inputs of the readable images; None if there are none."""
    readable: list[Row]
    """The readable images, without their content."""
    unreadable: list[Unreadable]

    def pin_memory(self, *_: Any) -> Prepared:
        """Pin the inputs; a DataLoader calls this."""
        return replace(self, inputs=map_tensors(lambda tensor: tensor.pin_memory(), self.inputs))


def decode(row: Row, mode: str) -> Image.Image:
    """Return an image in a PIL mode, turned upright by its EXIF.

    Raises:
        Exception: whatever the decoder raises on a damaged or missing file.
    """
    path = row.image["path"]
    if row.image["bytes"] is None:
        if path is None:
            raise ValueError("no image here, or a file whose name is not UTF-8")
        if os.path.exists(path) and not os.path.isfile(path):  # reading it might never end
            raise ValueError("not a regular file, but a pipe, a device, a socket or a folder")
    image: Image.Image = datasets.Image().decode_example(row.image)
    if image.mode.startswith("I"):  # 16 bits, which PIL would cut off at 255
        if image.getextrema()[1] > 65535:  # type: ignore[operator]
            raise ValueError(f"grey values above 65535 in a {image.mode} image")
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point grey values, whose range is not known")
    return image.convert(mode)


@dataclass(frozen=True)
class Preparation:
    """Turns rows into the encoder's inputs. An error of one image never reaches the others."""

    preprocess: Callable[[Any], Any]
    mode: str
    """The PIL mode that the preprocessing takes."""

    def __call__(self, row: Row) -> Any:
        """Return the encoder's input of an image, or the exception that it raised."""
        try:
            return self.preprocess(decode(row, self.mode))
        except Exception as error:  # a decoder may raise anything on a damaged file
            return error

    def batch(self, rows: Sequence[Row], prepared: Sequence[Any]) -> Prepared:
        """Put rows, and what became of each, into a batch."""
        inputs, readable, unreadable = [], [], []
        for row, one in zip(rows, prepared, strict=True):
            if isinstance(one, Exception):
                unreadable.append(Unreadable(row.number, row.image_id, describe_error(one, row)))
            else:
                inputs.append(one)
                readable.append(row._replace(image={}))
        numbers = range(rows[0].number, rows[-1].number + 1)
        return Prepared(numbers, default_collate(inputs) if inputs else None, readable, unreadable)


def describe_error(error: Exception, row: Row) -> str:
    """Return an error's kind and text, without the place of the file on this machine."""
    text = str(error).replace(row.image["path"] or "\0", row.image_id)
    return f"{type(error).__name__}: {text}"[:300]


class _Batches(Dataset[Prepared]):
    """Batches by their rows' numbers, so that a worker of a DataLoader makes a batch at once."""

    def __init__(self, source: Source, prepare: Preparation) -> None:
        self.source, self.prepare = source, prepare

    def __getitem__(self, numbers: range) -> Prepared:
        rows = [self.source[number] for number in numbers]
        return self.prepare.batch(rows, [self.prepare(row) for row in rows])


def batches_by_number(
    source: Source,
    prepare: Preparation,
    spans: Iterable[range],
    batch_size: BatchSize,
    *,
    workers: int,
    pin_memory: bool,
) -> Iterator[Prepared]:
    """Yield batches of some spans of rows, in order, prepared by worker processes."""
    loader = DataLoader(
        _Batches(source, prepare),
        sampler=_numbers_of_batches(spans, batch_size),  # whatever __getitem__ takes
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
    )
    yield from loader


def _numbers_of_batches(spans: Iterable[range], batch_size: BatchSize) -> Iterator[range]:
    """Yield the numbers of each batch's rows; the size is asked for when a batch is."""
    for span in spans:
        while span:
            numbers, span = span[: batch_size.now], span[batch_size.now :]
            yield numbers


def batches_of_stream(
    stream: Iterable[Row],
    prepare: Preparation,
    spans: Iterable[range],
    batch_size: BatchSize,
    *,
    workers: int,
) -> Iterator[Prepared]:
    """Yield batches of some spans of a stream's rows, in order, prepared by threads.

    The stream is read once, in this process. Threads are enough, since decoding does not hold
    Python's lock.
    """
    waiting: deque[tuple[list[Row], list[Future[Any]]]] = deque()

    def next_batch() -> Prepared:
        rows, futures = waiting.popleft()
        return prepare.batch(rows, [future.result() for future in futures])

    with ThreadPoolExecutor(max(1, workers)) as threads:
        for rows in _rows_of_batches(stream, spans, batch_size):
            waiting.append((rows, [threads.submit(prepare, row) for row in rows]))
            if len(waiting) > 2:
                yield next_batch()
        while waiting:
            yield next_batch()


def _rows_of_batches(
    stream: Iterable[Row], spans: Iterable[range], batch_size: BatchSize
) -> Iterator[list[Row]]:
    """Yield the rows of each batch. The stream is read to its end."""
    left = iter(spans)
    span = next(left, None)
    rows: list[Row] = []
    for row in stream:
        while span is not None and row.number >= span.stop:
            span = next(left, None)
        if span is not None and row.number >= span.start:
            rows.append(row)
            if len(rows) >= batch_size.now or row.number + 1 == span.stop:
                yield rows
                rows = []
    if rows:
        yield rows


def without_infinite(batch: Prepared, features: Tensor) -> tuple[Prepared, Tensor]:
    """Leave out the images whose features are not finite, and list them as unreadable."""
    finite = features.isfinite().all(1)
    if bool(finite.all()):
        return batch, features
    error = f"features not finite as {features.dtype}; float32 or no autocast may help"
    marked = list(zip(batch.readable, finite.tolist(), strict=True))
    bad = [
        Unreadable(row.number, row.image_id, error) for row, is_finite in marked if not is_finite
    ]
    kept = [row for row, is_finite in marked if is_finite]
    return replace(batch, readable=kept, unreadable=batch.unreadable + bad), features[finite]

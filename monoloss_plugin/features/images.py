"""Images on their way to an encoder: decoded, preprocessed and put into batches beside it."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from monoloss_plugin.features.shards import Unreadable
from monoloss_plugin.features.sources import Row, Source

_GAP = 1.5
"""How much larger than wanted an image is decoded at least, to be resized well afterwards."""


@dataclass(frozen=True)
class Prepared:
    """A batch of consecutive source rows, ready for the encoder."""

    rows: range
    inputs: Any
    """The encoder's inputs of the readable images; None if there are none."""
    readable: list[Row]
    """The readable images, without their content."""
    unreadable: list[Unreadable]

    def pin_memory(self, *_: Any) -> Prepared:
        """Pin the inputs; a DataLoader calls this."""
        return replace(self, inputs=map_tensors(Tensor.pin_memory, self.inputs))


def map_tensors(function: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    """Apply a function to a tensor, or to each tensor of a dict; None stays None."""
    if isinstance(inputs, dict):
        return {name: map_tensors(function, one) for name, one in inputs.items()}
    return None if inputs is None else function(inputs)


def decode(row: Row, mode: str, least: int | None = None) -> Image.Image:
    """Return an image in a PIL mode, turned upright by its EXIF.

    Args:
        row: its bytes, or the path of its file.
        mode: the PIL mode.
        least: a smaller image will do, with this many pixels on its longer side. JPEG files are
            then decoded at a half, a quarter or an eighth of their size, which is faster.

    Raises:
        Exception: whatever the decoder raises on a damaged or missing file.
    """
    content, path = row.image["bytes"], row.image["path"]
    if content is None:
        if path is None:
            raise ValueError("no image here, or a file whose name is not UTF-8")
        if not os.path.exists(path):  # in an archive or on the web, or there is none
            return to_mode(datasets.Image().decode_example(row.image), mode)
        if not os.path.isfile(path):  # reading it might never end
            raise ValueError("not a regular file, but a pipe, a device, a socket or a folder")
    with Image.open(path if content is None else io.BytesIO(content)) as image:
        if least is not None and max(image.size) > least:
            share = _GAP * least / max(image.size)
            image.draft(None, (int(image.width * share) or 1, int(image.height * share) or 1))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return to_mode(image, mode)


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Return an image in a PIL mode; 16-bit grey values become 8-bit ones.

    Raises:
        ValueError: the range of its grey values is not known.
    """
    if image.mode.startswith("I"):  # 16 bits, which PIL would cut off at 255
        if image.getextrema()[1] > 65535:  # type: ignore[operator]
            raise ValueError(f"grey values above 65535 in a {image.mode} image")
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point grey values, whose range is not known")
    return image.convert(mode)


def describe_error(error: Exception, row: Row) -> str:
    """Return an error's kind and text, without the place of the file on this machine."""
    text = str(error).replace(row.image["path"] or "\0", row.image_id)
    return f"{type(error).__name__}: {text}"[:300]


@dataclass(frozen=True)
class ImageLoader(Dataset[Prepared]):
    """Makes batches of a source's images, in processes that run beside the encoder."""

    source: Source
    preprocess: Callable[[Any], Any]
    mode: str
    """The PIL mode that the preprocessing takes."""
    workers: int
    pin_memory: bool = False

    def prepare(self, row: Row) -> Any:
        """Return the encoder's input of an image, or the exception that it raised."""
        try:
            return self.preprocess(decode(row, self.mode))
        except Exception as error:  # a decoder may raise anything on a damaged file
            return error

    def __getitem__(self, wanted: range | list[Row]) -> Prepared:
        """Make the batch of some rows, given by their numbers or, of a stream, themselves."""
        rows = [self.source[one] if isinstance(one, int) else one for one in wanted]
        return _batch(rows, [self.prepare(row) for row in rows])

    def batches(
        self, spans: Iterable[range], batch_size: Callable[[], int], stream: Iterable[Row] | None
    ) -> Iterator[Prepared]:
        """Yield batches of some spans of rows, in order.

        Args:
            spans: of row numbers; of a stream, there may be no end of them.
            batch_size: is asked for the size of each batch.
            stream: the rows of a source that has no rows by number. They are read in this process,
                and only once.
        """
        numbers = _cut(spans, batch_size)
        yield from DataLoader(
            self,
            sampler=numbers if stream is None else _take(iter(stream), numbers),
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            prefetch_factor=4 if self.workers else None,
        )


def _batch(rows: Sequence[Row], prepared: Sequence[Any]) -> Prepared:
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


def _cut(spans: Iterable[range], batch_size: Callable[[], int]) -> Iterator[range]:
    """Yield the row numbers of each batch."""
    for span in spans:
        while span:
            size = batch_size()
            yield span[:size]
            span = span[size:]


def _take(stream: Iterator[Row], batches: Iterable[range]) -> Iterator[list[Row]]:
    """Yield the rows of each batch from a stream, until it ends."""
    for numbers in batches:
        rows = []
        for row in stream:
            if row.number >= numbers.start:
                rows.append(row)
            if row.number == numbers[-1]:
                break
        if not rows:
            return
        yield rows

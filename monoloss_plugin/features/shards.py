"""Shards: the features of a set in the making, in files of consecutive rows of the source.

A shard's name says its rows and the beginning of its SHA-256:
``0000000000-0000004096-7c39a0e1.arrow`` holds what became of rows 0 to 4,095. It is an Arrow stream
with the columns of the set. The metadata of its schema lists the images that were left out.
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Features, Value
from datasets import List as Lists
from huggingface_hub.utils.sha import sha_fileobj

from monoloss_plugin.features.patches import nested_lists, patch_columns

PARTS = "parts"
"""The folder of the shards, in the folder of the set."""
_LARGEST = 4_096
"""Rows of a shard at most, since it is collected in memory."""
_LARGEST_OF_PATCHES = 64 << 20
"""Bytes of a shard of patches at most, but for the last batch."""
_NAME = re.compile(r"(\d{10})-(\d{10})-([0-9a-f]{8})\.arrow")
_LEFT_OUT = b"unreadable"


@dataclass(frozen=True)
class Unreadable:
    """An image that was left out."""

    row: int
    """Its row in the source."""
    image_id: str
    error: str


class EncodedPatches(NamedTuple):
    """Which patches some images have."""

    counts: np.ndarray[Any, Any]
    """(B,) how many patches each image has, with its class token."""
    places: np.ndarray[Any, Any]
    """(n,) int16: the place of each patch; -1 for a class token."""
    grids: np.ndarray[Any, Any]
    """(B, 2) int16: height and width of each image's grid."""
    pooled: np.ndarray[Any, Any]
    """(B, d), the mean over all the image's patches, also those that are not kept."""

    def select(self, images: np.ndarray[Any, Any]) -> EncodedPatches:
        """Return those of some images, given as a mask (B,)."""
        patches = images.repeat(self.counts)
        return EncodedPatches(
            self.counts[images], self.places[patches], self.grids[images], self.pooled[images]
        )


class EncodedRows(NamedTuple):
    """What became of consecutive rows of the source."""

    rows: range
    features: np.ndarray[Any, Any]
    """(B, d), of the images that could be read; or (n, d), all their patches."""
    labels: Sequence[int | None]
    """(B,), of the same images."""
    ids: Sequence[str]
    """(B,), of the same images."""
    unreadable: Sequence[Unreadable] = ()
    """The other images."""
    patches: EncodedPatches | None = None
    """Which patches the features are; None if there is one vector for each image."""

    def columns(self) -> dict[str, Any]:
        """Return the columns of the images, as Arrow or plain lists; features without a copy."""
        columns: dict[str, Any] = {
            "label": [-1 if label is None else label for label in self.labels],
            "image_id": list(self.ids),
        }
        if self.patches is None:
            return {**columns, "features": fixed_lists(self.features)}
        counts, places, grids, pooled = self.patches
        return {
            **columns,
            "features": nested_lists(self.features, counts),
            "places": nested_lists(places, counts),
            "grid": fixed_lists(grids),
            "pooled": fixed_lists(pooled),
        }


class Shard(NamedTuple):
    """A shard's file, and what its name says."""

    path: Path
    rows: range
    sha256: str
    """The beginning of the file's checksum."""

    def unreadable(self) -> list[Unreadable]:
        """Return the images that were left out."""
        with pa.memory_map(str(self.path)) as file, pa.ipc.open_stream(file) as stream:
            listed = json.loads(stream.schema.metadata[_LEFT_OUT])
        return [Unreadable(**one) for one in listed]


def shards_in(folder: Path) -> list[Shard]:
    """Return the shards of a set, in order. Of two that overlap, the later one is left out."""
    found: list[Shard] = []
    for path in sorted((folder / PARTS).glob("*.arrow")):
        name = _NAME.fullmatch(path.name)
        if name and path.is_file() and not path.is_symlink():
            shard = Shard(path, range(int(name[1]), int(name[2])), name[3])
            if not found or shard.rows.start >= found[-1].rows.stop:
                found.append(shard)
    return found


def missing_rows(folder: Path, spans: Iterable[range]) -> Iterator[range]:
    """Yield the parts of some spans of source rows that no shard covers.

    Args:
        folder: of the set.
        spans: in order; there may be no end of them.
    """
    finished = [shard.rows for shard in shards_in(folder)]
    for span in spans:
        at = span.start
        for rows in finished:
            if rows.start >= span.stop:
                break
            if rows.start > at:
                yield range(at, rows.start)
            at = max(at, rows.stop)
        if at < span.stop:
            yield range(at, span.stop)


class ShardWriter:
    """Collects rows, and saves them as a shard now and then.

    Args:
        folder: of the set.
        schema: the columns, from :func:`features_schema`.
        save_every: seconds of work that a killed process may lose.
    """

    def __init__(self, folder: Path, schema: Features, save_every: float) -> None:
        self.folder, self._schema, self._save_every = folder, schema.arrow_schema, save_every
        self._batches: list[EncodedRows] = []
        self._saved = time.perf_counter()

    def add(self, batch: EncodedRows) -> None:
        """Add rows. If they do not follow the rows before, a new shard begins."""
        if self._batches and batch.rows.start != self._batches[-1].rows.stop:
            self.save()
        self._batches.append(batch)
        waited = time.perf_counter() - self._saved
        count = batch.rows.stop - self._batches[0].rows.start
        size = sum(one.features.nbytes for one in self._batches if one.patches is not None)
        if waited >= self._save_every or count >= _LARGEST or size >= _LARGEST_OF_PATCHES:
            self.save()

    def save(self) -> None:
        """Save what was added since the last time."""
        if not self._batches:
            return
        batches = self._batches
        left_out = json.dumps([asdict(one) for batch in batches for one in batch.unreadable])
        schema = self._schema.with_metadata({**self._schema.metadata, _LEFT_OUT: left_out.encode()})
        made = unfinished(self.folder)
        with pa.OSFile(str(made), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
            for batch in batches if batches[0].patches is not None else [_together(batches)]:
                columns = batch.columns()
                stream.write_table(pa.table({name: columns[name] for name in schema.names}, schema))
        start, stop = batches[0].rows.start, batches[-1].rows.stop
        (self.folder / PARTS).mkdir(exist_ok=True)  # another process may have completed the set
        put(made, self.folder / PARTS / f"{start:010d}-{stop:010d}-{sha256_of(made)[:8]}.arrow")
        self._batches, self._saved = [], time.perf_counter()


def _together(batches: Sequence[EncodedRows]) -> EncodedRows:
    """Return batches of one vector for each image as one."""
    return EncodedRows(
        range(batches[0].rows.start, batches[-1].rows.stop),
        np.concatenate([batch.features for batch in batches]),
        [label for batch in batches for label in batch.labels],
        [image_id for batch in batches for image_id in batch.ids],
    )


def features_schema(
    width: int, dtype: str, labelled: bool, classes: list[str] | None, *, patches: bool = False
) -> Features:
    """Return the columns of a set: features or those of patches, perhaps label, and image_id."""
    columns: dict[str, Any] = {"features": Lists(Value(dtype), length=width)}
    if patches:
        columns = patch_columns(dtype, width)
    if labelled:
        columns["label"] = ClassLabel(names=classes) if classes is not None else Value("int64")
    return Features({**columns, "image_id": Value("string")})


def fixed_lists(features: np.ndarray[Any, Any]) -> pa.FixedSizeListArray:
    """Return vectors (B, d) as an Arrow column, without a copy."""
    return pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])


def unfinished(folder: Path) -> Path:
    """Return a new name for a file or folder that is not finished."""
    return folder / f".unfinished-{uuid.uuid4().hex}"


def put(made: Path, path: Path) -> None:
    """Give a finished file its name, once all of it is on disk. It replaces a file of that name."""
    with made.open("r+b") as content:
        os.fsync(content.fileno())
    os.replace(made, path)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as content:
        return sha_fileobj(content).hex()

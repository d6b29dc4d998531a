"""One process's share of an extraction: which rows it encodes, and into which shards."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from monoloss_plugin._optional import missing_extra
from monoloss_plugin.features import shards
from monoloss_plugin.features.forward import BatchSize, Forward
from monoloss_plugin.features.images import (
    Loaded,
    Preparation,
    batches_of_stream,
    in_batches,
    without_infinite,
)
from monoloss_plugin.features.sources import Source

try:
    import datasets
except ModuleNotFoundError as error:
    raise missing_extra(error, "vision") from error


class TooManyUnreadableError(RuntimeError):
    """More images could not be read than the run may leave out."""


class Share:
    """This process's share of an extraction."""

    def __init__(
        self,
        folder: Path,
        source: Source,
        schema: datasets.Features,
        *,
        shard_size: int,
        share: tuple[int, int],
        batch_size: BatchSize,
        max_unreadable: int,
    ) -> None:
        self.folder, self.source, self.schema = folder, source, schema
        self.shard_size, self.max_unreadable = shard_size, max_unreadable
        self.batch_size = batch_size
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

    def encode(self, forward: Forward, batches: Iterator[Loaded], stored: torch.dtype) -> int:
        """Encode and write what is missing, and return how many images that was."""
        encoded = 0
        width = self.schema["features"].length
        self._check_unreadable()
        self._finish_whole()
        started = time.perf_counter()
        for loaded in batches:
            if not self._is_mine(loaded.numbers[0] // self.shard_size):
                continue  # read ahead, before another process finished it
            features = torch.empty((0, width), dtype=stored)
            if loaded.inputs is not None:
                features = forward.in_parts(loaded.inputs, len(loaded.ids)).to(stored).cpu()
                encoded += len(features)
                loaded, features = without_infinite(loaded, features)
            self._write(loaded, features)
            ended = time.perf_counter()
            self.batch_size.most = min(self.batch_size.most, forward.fits)
            self.batch_size.measured(len(loaded.numbers), ended - started)
            started = ended
        self._finish_whole()
        return encoded

    def by_number(self) -> Iterator[Sequence[int]]:
        """Yield batches of this share's rows that are not done, each within a shard."""
        assert self.source_rows is not None
        resumed = {number: writer.done for number, writer in self.writers.items()}
        for number in range(self.part, -(-self.source_rows // self.shard_size), self.parts):
            if self._is_mine(number) and not shards.is_finished(self.folder, number):
                start = number * self.shard_size
                end = min(start + self.shard_size, self.source_rows)
                rows = range(start + resumed.get(number, 0), end)
                yield from in_batches(rows, self.batch_size)

    def of_stream(self, prepare: Preparation, workers: int) -> Iterator[Loaded]:
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
            batch_size=self.batch_size,
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

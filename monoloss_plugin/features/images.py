"""Images on their way to an encoder: read, decoded and preprocessed beside the encoding."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from monoloss_plugin.features.forward import BatchSize
from monoloss_plugin.features.sources import Row, Source, decode


class Loaded(NamedTuple):
    """A batch of source rows, ready to be encoded."""

    numbers: Sequence[int]
    """Every row's number in the source, readable or not."""
    inputs: Any
    """The encoder's inputs of the readable ones; None if there is none."""
    readable: list[int]
    """The numbers of the readable ones."""
    labels: list[int | None]
    ids: list[str]
    unreadable: list[dict[str, Any]]


class Preparation:
    """Decodes and preprocesses; what goes wrong with an image stays with that image."""

    def __init__(self, preprocess: Callable[[Any], Any], mode: str) -> None:
        self.preprocess, self.mode = preprocess, mode

    def __call__(self, row: Row) -> Any:
        """Return the encoder's input of an image, or the exception that it raised."""
        try:
            return self.preprocess(decode(row, self.mode))
        except Exception as error:  # a decoder may raise anything on a damaged file
            return error

    def batch(self, numbers: Sequence[int], rows: Sequence[Row], prepared: Sequence[Any]) -> Loaded:
        """Put a batch together, with the unreadable apart."""
        kept, unreadable = [], []
        for place, (row, one) in enumerate(zip(rows, prepared, strict=True)):
            if isinstance(one, Exception):
                bad = {"row": numbers[place], "image_id": row.image_id, "error": said(one, row)}
                unreadable.append(bad)
            else:
                kept.append(place)
        return Loaded(
            numbers,
            default_collate([prepared[i] for i in kept]) if kept else None,
            [numbers[i] for i in kept],
            [rows[i].label for i in kept],
            [rows[i].image_id for i in kept],
            unreadable,
        )


def said(error: Exception, row: Row) -> str:
    """Name an error without the place of the file on this machine."""
    text = str(error).replace(row.image["path"] or "\0", row.image_id)
    return f"{type(error).__name__}: {text}"[:300]


class _Batches(Dataset[Loaded]):
    """Batches of rows as a dataset, so that a DataLoader's workers make whole batches."""

    def __init__(self, source: Source, prepare: Preparation) -> None:
        self.source, self.prepare = source, prepare

    def __getitem__(self, numbers: Sequence[int]) -> Loaded:
        rows = [self.source[number] for number in numbers]
        return self.prepare.batch(numbers, rows, [self.prepare(row) for row in rows])


def batches_by_number(
    source: Source,
    prepare: Preparation,
    batches: Iterable[Sequence[int]],
    *,
    workers: int,
    pin_memory: bool,
) -> Iterator[Loaded]:
    """Yield batches of rows in their order, prepared by worker processes."""
    loader = DataLoader(
        _Batches(source, prepare),
        sampler=batches,  # any iterable of what __getitem__ takes
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
    )
    yield from loader


def batches_of_stream(
    source: Source,
    prepare: Preparation,
    wanted: Callable[[int], bool],
    *,
    start: int,
    batch_size: BatchSize,
    shard_size: int,
    workers: int,
    ended: Callable[[int], Any],
) -> Iterator[Loaded]:
    """Yield batches of the wanted rows of a stream, prepared by threads.

    A stream is read once, in this process; decoding leaves Python's lock alone.

    Args:
        source: of streamed rows.
        prepare: what makes an image an input.
        wanted: whether to take a row, by its number.
        start: the first row.
        batch_size: of each batch; a batch stays within a shard.
        shard_size: source rows a shard.
        workers: threads.
        ended: called with the number of rows when the stream has ended; not if it ended before
            ``start``, since then its number is not known here.
    """
    waiting: deque[tuple[list[int], list[Row], list[Any]]] = deque()
    last = -1

    def in_groups() -> Iterator[list[tuple[int, Row]]]:
        nonlocal last
        group: list[tuple[int, Row]] = []
        # From a row before: to see that it is there, if the stream ends with it.
        for number, row in source.stream(max(0, start - 1)):
            last = number
            if group and (len(group) >= batch_size.now or number % shard_size == 0):
                yield group
                group = []
            if number >= start and wanted(number):
                group.append((number, row))
        if group:
            yield group

    with ThreadPoolExecutor(max(1, workers)) as threads:
        for group in in_groups():
            numbers, rows = [n for n, _ in group], [r for _, r in group]
            waiting.append((numbers, rows, [threads.submit(prepare, row) for row in rows]))
            if len(waiting) > 2:
                yield _made(prepare, waiting.popleft())
        while waiting:
            yield _made(prepare, waiting.popleft())
    if last >= 0:
        ended(last + 1)


def _made(prepare: Preparation, parts: tuple[list[int], list[Row], list[Any]]) -> Loaded:
    numbers, rows, futures = parts
    return prepare.batch(numbers, rows, [future.result() for future in futures])


def in_batches(numbers: Sequence[int], batch_size: BatchSize) -> Iterator[Sequence[int]]:
    """Yield runs of at most so many numbers as fit when each is asked for."""
    start = 0
    while start < len(numbers):
        run = numbers[start : start + batch_size.now]
        yield run
        start += len(run)


def without_infinite(loaded: Loaded, features: Tensor) -> tuple[Loaded, Tensor]:
    """Leave out images whose features are not finite, and list them as unreadable."""
    finite = features.isfinite().all(1).tolist()
    if all(finite):
        return loaded, features
    error = f"features not finite as {features.dtype}; float32 or no autocast may help"
    unreadable = list(loaded.unreadable)
    kept = []
    for place, is_finite in enumerate(finite):
        if is_finite:
            kept.append(place)
            continue
        said = {"row": loaded.readable[place], "image_id": loaded.ids[place], "error": error}
        unreadable.append(said)
    good = loaded._replace(
        readable=[loaded.readable[i] for i in kept],
        labels=[loaded.labels[i] for i in kept],
        ids=[loaded.ids[i] for i in kept],
        unreadable=unreadable,
    )
    return good, features[kept]

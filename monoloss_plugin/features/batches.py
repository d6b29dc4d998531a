"""Shuffled training batches from feature sets, at the speed of memory."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from monoloss_plugin._checks import (
    as_device,
    require_at_least,
    require_choice,
    require_flag,
    require_share,
)
from monoloss_plugin.batch import Batch
from monoloss_plugin.embeddings import unit_rows
from monoloss_plugin.features.buffers import Buffers
from monoloss_plugin.features.feature_set import FeatureSet, rows_in_common
from monoloss_plugin.features.order import Order, Shuffle
from monoloss_plugin.features.record import FeatureRecord

_REMEMBERED = 64
"""Batches that :meth:`FeatureBatches.embeddings_of` finds again; a reader may be so far ahead."""
_ROUNDING = 1e-2
"""More than a trainer's bfloat16 changes a value, far less than separates two images."""


class FeatureBatches(torch.utils.data.IterableDataset[Batch]):
    """Shuffled batches of a feature set, and of others aligned with it.

    Iterating gives one epoch of :class:`~monoloss_plugin.batch.Batch`, on the device asked for; the
    next time, another. Features are float32, and so are embeddings: unit vectors of the
    embeddings' sets, or without any the features.
    :meth:`tensors` is an endless iterator of features alone, SAELens's data provider. The order
    depends on seed and epoch alone. Where a batch comes from a disk or goes to a GPU, the next is
    on its way while one is at work.

    Args:
        features: what the SAE reads.
        embeddings: feature sets of the same images whose similarities MonoLoss and MonoScore are
            to use, matched by ``image_id``. Several make an ensemble: their cosine similarities
            are averaged. By default the features themselves.
        batch_size: B.
        shuffle: ``"all"``, every epoch in a random order; ``"buffer"``, for sets larger than
            memory: blocks of consecutive rows are read in a random order, and shuffled within a
            buffer of ``buffer_rows``; ``"none"``, in the set's order.
        seed: of the order.
        drop_last: leave out the last, incomplete batch of an epoch.
        normalize: scale features to unit norm, in float32; a zero vector stays zero.
        ids: give the ids with each batch.
        device: where batches go.
        resident: hold the whole set on that device in its stored type; by default on a GPU where
            it takes at most half of the free memory. On the CPU it makes a copy in memory.
        buffer_rows: rows of a shuffle buffer; the system keeps two of them in its file cache.
        shard: ``(i, n)``: the i-th of n processes that share each epoch; all take equally many
            batches.

    Raises:
        TypeError: not feature sets.
        ValueError: an argument out of its range, sets without an image in common, or fewer images
            than a batch needs.

    Examples:
        >>> from datasets import Dataset, Features, Sequence, Value
        >>> columns = Features({"features": Sequence(Value("float32"), length=2)})
        >>> some = Dataset.from_dict({"features": [[3.0, 4.0], [0.0, 2.0]]}, features=columns)
        >>> batches = FeatureBatches(FeatureSet(some), batch_size=2, shuffle="none")
        >>> for batch in batches:
        ...     print(len(batch.features), float(batch.features.norm(dim=1).mean()))
        2 1.0
    """

    def __init__(
        self,
        features: FeatureSet,
        *,
        embeddings: FeatureSet | Sequence[FeatureSet] = (),
        batch_size: int = 2048,
        shuffle: Shuffle = "all",
        seed: int = 0,
        drop_last: bool = True,
        normalize: bool = True,
        ids: bool = False,
        device: torch.device | str = "cpu",
        resident: bool | None = None,
        buffer_rows: int = 1 << 17,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        several: Any = embeddings if isinstance(embeddings, (list, tuple)) else [embeddings]
        others: list[FeatureSet] = list(several)
        for name, given in (("features", features), *(("embeddings", one) for one in others)):
            if not isinstance(given, FeatureSet):
                raise TypeError(
                    f"{name}: expected a FeatureSet, got {type(given).__name__}; FeatureSet.open "
                    "reads folders and files, FeatureSet.from_tensors takes arrays"
                )
        for name, flag in (("drop_last", drop_last), ("normalize", normalize), ("ids", ids)):
            require_flag(flag, name)
        if resident is not None:
            require_flag(resident, "resident")
        require_choice(shuffle, "shuffle", ("all", "buffer", "none"))
        for name, number in (("batch_size", batch_size), ("buffer_rows", buffer_rows)):
            require_at_least(1, number, name)
        if resident and shuffle == "buffer":
            raise ValueError("resident: a set that is held in memory needs no shuffle buffer")
        self.features, self.batch_size, self.normalize = features, batch_size, normalize
        self.ids, self.device = ids, as_device(device)
        self.shard = require_share(shard)
        matched = rows_in_common(features, others)
        self.num_rows = len(features) if matched is None else len(matched[0])
        """Images that every set has."""
        self.order = Order(
            self.num_rows,
            batch_rows=batch_size * shard[1],
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            buffer_rows=buffer_rows,
        )
        if self.num_rows == 0:
            raise ValueError("features: expected at least one image, got an empty set")
        if len(self) == 0:
            raise ValueError(
                f"batch_size: expected at most {self.num_rows // shard[1]} of {self.num_rows} "
                f"images over {shard[1]} process(es), got {batch_size}; or drop_last=False"
            )
        numbers = matched if matched is not None else [None] * (1 + len(others))
        self._read, *self._read_others = [
            _Reader(
                one,
                of_one,
                batch_size,
                self.device,
                shuffle != "buffer" and _held(one, self.device, resident),
            )
            for one, of_one in zip([features, *others], numbers, strict=True)
        ]
        self._epoch = self._next = 0
        self._resumed = False
        self._given: Batch | None = None
        self._samples: deque[_Sample] = deque(maxlen=_REMEMBERED)

    def __len__(self) -> int:
        """Batches an epoch, of this process."""
        return self.order.num_batches

    @property
    def num_classes(self) -> int | None:
        """Number of the labels' classes; None without labels."""
        return self.features.num_classes

    @property
    def record(self) -> FeatureRecord:
        """What the feature set says of itself."""
        return self.features.record

    @property
    def epoch(self) -> int:
        """The epoch under way, from 0."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch: for workers of a DataLoader, which do not advance this."""
        self._epoch, self._next, self._resumed = epoch, 0, False

    def __iter__(self) -> Iterator[Batch]:
        """Yield an epoch; after :meth:`load_state_dict`, what is left of the one under way."""
        if self._next > 0 and not self._resumed:
            self._epoch, self._next = self._epoch + 1, 0
        self._resumed = False
        epoch = self._epoch
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        numbers = range(self._next + first, len(self), step)
        made = self._made_ahead(epoch, numbers) if self._waits else self._made(epoch, numbers)
        for number in numbers:
            batch = next(made)
            self._epoch, self._next = epoch, number + 1
            yield batch
            del batch  # its memory can be the next one's
        self._epoch, self._next = epoch + 1, 0

    def tensors(self) -> Iterator[Tensor]:
        """Yield features (B, d) without end: ``SAETrainer(data_provider=batches.tensors())``."""
        while True:
            for batch in self:
                self._given = batch
                few = _some(batch.features).clone()
                self._samples.append(_Sample(self._epoch, self._next - 1, few))
                yield batch.features

    def embeddings_of(self, features: Tensor) -> Tensor:
        """Return the embeddings of a batch that :meth:`tensors` gave.

        For ``trainer.add_loss(MonoLoss(lam=3e-4), embeddings=batches.embeddings_of)``. The batch is
        known by its values, all of them, so a trainer may fetch batches ahead. It may also move
        them, change their type or multiply them by one positive number, but not mix their rows.

        Args:
            features: (B, d) one of the last 64 batches given.

        Returns:
            (B, d') on the same device.

        Raises:
            ValueError: it is none of them.
        """
        if self._given is not None and _is_multiple(features, self._given.features):
            return self._given.similarity.to(features.device)
        few = _some(features)
        for sample in reversed(tuple(self._samples)):
            if _is_multiple(few, sample.features):
                batch = self._make(sample.epoch, sample.number)
                if _is_multiple(features, batch.features):
                    self._given = batch
                    return batch.similarity.to(features.device)
        raise ValueError(
            f"embeddings: these {len(features)} rows are none of the last {len(self._samples)} "
            "batches that tensors() gave in this process; train with data_provider="
            "batches.tensors(), and let nothing between mix or cut its batches"
        )

    def every_row(self, batch_size: int) -> Iterator[Batch]:
        """Yield every row of this process once, in the set's order, beside the epochs."""
        rows_here = torch.arange(self.num_rows)[self.shard[0] :: self.shard[1]]
        for rows in rows_here.split(min(batch_size, self.batch_size)):
            yield self._batch_of(rows)

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what it depends on.

        A position in this process: of a DataLoader with workers, which have their own, count the
        batches yourself.
        """
        return {**self._identity(), "epoch": self._epoch, "batch": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where a state was taken.

        Raises:
            ValueError: the state is of another set or other settings.
        """
        for name, here in self._identity().items():
            if state.get(name) != here:
                raise ValueError(
                    f"state: {name} was {state.get(name)!r} when it was taken, is {here!r} here"
                )
        self._epoch, self._next = int(state["epoch"]), int(state["batch"])
        self._resumed = True

    def _identity(self) -> dict[str, Any]:
        read = {"features": self.features.fingerprint(), "normalize": self.normalize}
        return {**self.order.identity(), **read, "shard": list(self.shard)}

    @property
    def _waits(self) -> bool:
        """Whether making a batch waits for a disk or a device more than it computes.

        Where it does not, a second thread would only take the trainer's cores.
        """
        copies = any(read.held is None for read in (self._read, *self._read_others))
        return self.order.shuffle == "buffer" or (self.device.type != "cpu" and copies)

    def _made(self, epoch: int, numbers: range) -> Iterator[Batch]:
        return (self._read_and_make(epoch, number, number == numbers[0]) for number in numbers)

    def _made_ahead(self, epoch: int, numbers: range) -> Iterator[Batch]:
        """Make the next batch while this one is used."""
        with ThreadPoolExecutor(1, "feature-batches") as thread:
            coming: deque[Future[Batch]] = deque()
            for number in numbers:
                first = number == numbers[0]
                coming.append(thread.submit(self._read_and_make, epoch, number, first))
                if len(coming) > 1:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()

    def _read_and_make(self, epoch: int, number: int, first: bool) -> Batch:
        for start, end in self.order.coming(epoch, number, first):
            self._read.warm(start, end)
            for read in self._read_others:
                read.warm(start, end)
        return self._make(epoch, number)

    def _make(self, epoch: int, number: int) -> Batch:
        return self._batch_of(self.order.rows(epoch, number)[self.shard[0] :: self.shard[1]])

    def _batch_of(self, rows: Tensor) -> Batch:
        features = self._read(rows, self.normalize)
        unit = [read(rows, True) for read in self._read_others]
        of_set = self._read.numbers(rows)
        labels = None if self.features.labels is None else self.features.labels[of_set]
        return Batch(
            features,
            # The cosine of concatenated unit vectors is the mean of their cosines.
            embeddings=torch.cat(unit, 1) / math.sqrt(len(unit)) if unit else features,
            labels=None if labels is None else labels.to(self.device),
            ids=self.features.ids_of(of_set) if self.ids else None,
            rows=of_set,
        )


class _Sample(NamedTuple):
    """What is kept of a batch, to know it again and to make it again."""

    epoch: int
    number: int
    features: Tensor
    """Some of its rows."""


def _some(rows: Tensor) -> Tensor:
    return rows[:: max(1, len(rows) // 4)]


def _is_multiple(rows: Tensor, given: Tensor) -> bool:
    """Say whether rows are those given times one positive number, up to a rounding."""
    if rows.shape != given.shape:
        return False
    given = given.to(rows.device, torch.float32)
    norm = torch.linalg.vector_norm(given)
    rows = rows.detach().float() * (norm / torch.linalg.vector_norm(rows.detach().float()))
    near_zero = norm / math.sqrt(given.numel())
    return bool(((rows - given).abs() <= _ROUNDING * (given.abs() + near_zero)).all())


class _Reader:
    """Reads rows of one set onto a device, from the memory map or from a copy held there."""

    def __init__(
        self,
        features: FeatureSet,
        matched: Tensor | None,
        batch_size: int,
        device: torch.device,
        resident: bool,
    ) -> None:
        self.features, self.matched, self.device = features, matched, device
        self.held: Tensor | None = None
        if resident:
            whole = features.tensor() if matched is None else features.take(matched)
            self.held = whole.to(device)
        self._stored = Buffers(batch_size, features.width, features.dtype)
        self._unit = Buffers(batch_size, features.width, torch.float32)

    def __call__(self, rows: Tensor, normalize: bool) -> Tensor:
        """Return rows (B,) of what the sets have in common: (B, d) in float32."""
        stored = self._gather(rows)
        if not normalize:
            return stored.float()
        out = None
        if self.device.type == "cpu":
            in_place = stored.dtype == torch.float32
            out = stored if in_place else self._unit.empty(len(rows))
        return unit_rows(stored, torch.float32, out=out)[0]

    def _gather(self, rows: Tensor) -> Tensor:
        """Return rows (B, d) on the device in the stored type."""
        if self.held is not None:
            place = self._stored.empty(len(rows)) if self.device.type == "cpu" else None
            return torch.index_select(self.held, 0, rows.to(self.device), out=place)
        if self.device.type == "cuda":
            shape = (len(rows), self.features.width)
            pinned = torch.empty(shape, dtype=self.features.dtype, pin_memory=True)
            found = self.features.take(self.numbers(rows), pinned)
            return found.to(self.device, non_blocking=True)
        place = self._stored.empty(len(rows))
        return self.features.take(self.numbers(rows), place).to(self.device)

    def numbers(self, rows: Tensor) -> Tensor:
        """Return the rows' numbers in this set."""
        return rows if self.matched is None else self.matched[rows]

    def warm(self, start: int, end: int) -> None:
        """Read consecutive rows in their order, so that the system has them in memory."""
        if self.held is None and start < end:
            self.features.take(self.numbers(torch.arange(start, end)))


def _held(features: FeatureSet, device: torch.device, wanted: bool | None) -> bool:
    if wanted is not None or device.type != "cuda":
        return bool(wanted)
    free, _ = torch.cuda.mem_get_info(device)
    return len(features) * features.width * features.dtype.itemsize <= free // 2

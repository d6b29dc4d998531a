"""Shuffled training batches from feature sets."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import groupby
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from monoloss_plugin._checks import (
    as_device,
    require_at_least,
    require_choice,
    require_flag,
    require_share,
)
from monoloss_plugin._chunks import whole_groups
from monoloss_plugin.batch import Batch
from monoloss_plugin.embeddings import unit_rows
from monoloss_plugin.features.feature_set import FeatureSet
from monoloss_plugin.features.matching import rows_in_common
from monoloss_plugin.features.patches import cumulative, image_of, spans

Shuffle = Literal["all", "buffer", "images", "none"]

_BLOCK = 4096
"""A shuffle buffer reads so many consecutive rows at a place."""
_REMEMBERED = 64
"""Batches that :meth:`FeatureBatches.samples_of` can find. A trainer may fetch ahead."""
_ROUNDING = 1e-2
"""Rounding to bfloat16 changes a value by less; two images differ by far more."""


class FeatureBatches(torch.utils.data.IterableDataset[Batch]):
    """Shuffled batches of a feature set, with embeddings from other sets if you like.

    A loop over it is one epoch of :class:`~monoloss_plugin.batch.Batch`; the next loop is the next
    epoch, in another order. Features are float32. Embeddings are float32 unit vectors; without
    ``embeddings`` they are the features. The order depends only on the seed and the epoch.
    :meth:`tensors` gives features alone without end, as SAELens's ``data_provider``.

    Of a patch set, the rows are patches: batches have patches of many images. Each has its image's
    label, and its image's embedding: that of another set, or the mean over the image's patches.

    Args:
        features: what the SAE reads.
        embeddings: one or several other feature sets of the same images. MonoLoss and MonoScore
            then compare images by these. Images are matched by ``image_id``. The cosine
            similarities of several sets are averaged.
        batch_size: B.
        shuffle: ``"all"`` shuffles the whole set. ``"buffer"`` is for sets larger than memory: it
            reads blocks of consecutive rows in a random order, ``buffer_rows`` rows at a time, and
            shuffles these. ``"images"`` shuffles the images of a patch set, and keeps the patches
            of each together. Give a multiple of the patches of an image as ``batch_size``, or
            batches cut images. ``"none"`` keeps the order of the set.
        seed: another seed gives another order.
        drop_last: leave out the last batch of an epoch if it is not full.
        normalize: scale features to unit norm; a zero vector stays zero.
        device: the device of the batches.
        resident: keep all the sets on the device, in their stored type. The default is to do so on
            a GPU if they take at most half of its free memory. On the CPU this makes a copy.
        buffer_rows: rows of a shuffle buffer. Two buffers are in memory: one in use, and the next.
        shard: ``(i, n)``: this is the i-th of n processes that share each epoch. All get the same
            number of batches.

    Raises:
        TypeError: ``features`` or ``embeddings`` are not feature sets.
        ValueError: an argument is out of its range, the sets have no image in common, or there are
            fewer images than one batch needs.

    Examples:
        >>> features = FeatureSet.from_tensors([[3.0, 4.0], [0.0, 2.0]])
        >>> for batch in FeatureBatches(features, batch_size=2, shuffle="none"):
        ...     print(batch.features.norm(dim=1))
        tensor([1., 1.])
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
                    f"{name}: expected a FeatureSet, got {type(given).__name__}; use "
                    "FeatureSet.open for a folder or a file, FeatureSet.from_tensors for arrays"
                )
        require_flag(drop_last, "drop_last")
        require_flag(normalize, "normalize")
        if resident is not None:
            require_flag(resident, "resident")
        require_choice(shuffle, "shuffle", get_args(Shuffle))
        require_at_least(1, batch_size, "batch_size")
        require_at_least(1, buffer_rows, "buffer_rows")
        if resident and shuffle == "buffer":
            raise ValueError("resident: a set that is kept in memory needs no shuffle buffer")
        self.features, self.batch_size, self.normalize = features, batch_size, normalize
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.device, self.shard = as_device(device), require_share(shard)
        self.epoch = 0
        """The current epoch, from 0."""
        self._others = others
        self._matched = rows_in_common(features, others)
        self.num_images = len(self._matched[0])
        """Number of images that every set has."""
        self._common = _Common.of(features, self._matched[0])
        self.num_rows = self.num_images if self._common is None else int(self._common.starts[-1])
        """Number of rows of these images: themselves, or their patches."""
        of_images = [one.images for one in others]
        self._sets: list[FeatureSet] = [features, *of_images]
        self._of_images: list[FeatureSet] = []
        if self._common is not None:
            self._sets, self._of_images = [features], of_images or [features.images]
        self._batch_rows = batch_size * shard[1]
        """Rows of a batch of all processes together."""
        self._read_at_once = max(1, buffer_rows // self._batch_rows) if shuffle == "buffer" else 1
        self._buffer_rows = self._read_at_once * self._batch_rows
        if self.num_rows == 0:
            raise ValueError("features: expected at least one image, got an empty set")
        if len(self) == 0:
            raise ValueError(
                f"batch_size: expected at most {self.num_rows // shard[1]} of {self.num_rows} "
                f"{'images' if self._common is None else 'patches'} over {shard[1]} process(es), "
                f"got {batch_size}; or drop_last=False"
            )
        if resident is None:
            resident = shuffle != "buffer" and _fit_in_half(
                [*self._sets, *self._of_images], self.device
            )
        self._held = self._read([torch.arange(self.num_rows)]) if resident else None
        # On the CPU a second thread would take a core from the trainer.
        self._reads_ahead = shuffle == "buffer" or (self.device.type != "cpu" and not resident)
        self._next = 0
        self._resumed = False
        self._shuffled: tuple[int, Tensor, Tensor] | None = None
        self._last: Batch | None = None
        self._recent: deque[_Given] = deque(maxlen=_REMEMBERED)

    def __len__(self) -> int:
        """Return the number of batches in an epoch of this process."""
        rows = self.num_rows if self.drop_last else self.num_rows + self._batch_rows - 1
        return rows // self._batch_rows

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None if there are no labels."""
        return self.features.num_classes

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch. A DataLoader with workers needs this before each epoch."""
        self.epoch, self._next, self._resumed = epoch, 0, False

    def __iter__(self) -> Iterator[Batch]:
        """Yield one epoch, or the rest of one after :meth:`load_state_dict`."""
        if self._next > 0 and not self._resumed:
            self.epoch, self._next = self.epoch + 1, 0
        self._resumed = False
        epoch = self.epoch
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        numbers = range(self._next + first, len(self), step)
        for number, batch in zip(numbers, self._batches(epoch, numbers), strict=True):
            self.epoch, self._next = epoch, number + 1
            yield batch
        self.epoch, self._next = epoch + 1, 0

    def tensors(self) -> Iterator[Tensor]:
        """Yield features (B, d) without end: ``SAETrainer(data_provider=batches.tensors())``."""
        while True:
            for batch in self:
                self._last = batch
                few = _some_rows(batch.features).clone()
                self._recent.append(_Given(self.epoch, self._next - 1, few))
                yield batch.features

    @property
    def compared_by(self) -> str:
        """What samples are compared by, in words: the embeddings, or else the features."""
        return " and ".join(one.images.compared_by for one in self._others or [self.features])

    def embeddings_of(self, features: Tensor) -> Tensor:
        """Return the embeddings of a batch that :meth:`tensors` gave.

        Pass the method on: ``trainer.add_loss(MonoLoss(lam=3e-4),
        embeddings=batches.embeddings_of)``. It recognises a batch by its values. So a trainer may
        fetch batches ahead, move them to a device, change their type, or multiply them by one
        positive number. It must not mix rows.

        Args:
            features: (B, d), one of the last 64 batches.

        Returns:
            (B, d') on the device of ``features``.

        Raises:
            ValueError: the features are none of these batches, or patches.
        """
        if self._common is not None:
            raise ValueError(
                "embeddings: these batches have patches; pass embeddings=batches.samples_of, which "
                "also tells their images"
            )
        return self.samples_of(features).similarity

    def samples_of(self, features: Tensor) -> Batch:
        """Return the whole batch that :meth:`tensors` gave: embeddings, labels and images.

        It is found as :meth:`embeddings_of` finds it. Pass the method on if you train on patches:
        ``trainer.add_loss(MonoLoss(lam=3e-4), embeddings=batches.samples_of)``.

        Args:
            features: (B, d), one of the last 64 batches.

        Returns:
            The batch, with features, embeddings and labels on the device of ``features``.

        Raises:
            ValueError: the features are none of these batches.
        """
        batch, device = self._find(features), features.device
        return batch._replace(
            features=batch.features.to(device),
            embeddings=None if batch.embeddings is None else batch.embeddings.to(device),
            labels=None if batch.labels is None else batch.labels.to(device),
        )

    def _find(self, features: Tensor) -> Batch:
        """Return the batch of :meth:`tensors` with these features."""
        if self._last is not None and _is_multiple(features, self._last.features):
            return self._last
        few = _some_rows(features)
        for given in reversed(tuple(self._recent)):
            if _is_multiple(few, given.features):
                batch = self._batch(self._rows(given.epoch, given.number))
                if _is_multiple(features, batch.features):
                    self._last = batch
                    return batch
        raise ValueError(
            f"embeddings: these {len(features)} rows are none of the last {len(self._recent)} "
            "batches that tensors() gave in this process; train with data_provider="
            "batches.tensors(), and do not mix or cut its batches"
        )

    def every_row(self, batch_size: int) -> Iterator[Batch]:
        """Yield every row of this process once, in the order of the set, whatever the shuffle.

        Of a patch set, a batch has whole images, as in :meth:`FeatureSet.every_row`.
        """
        batch_size = min(batch_size, self.batch_size)
        if self._common is not None:
            mine = torch.arange(self.num_images)[self.shard[0] :: self.shard[1]]
            starts = cumulative(self._common.starts.diff()[mine])
            for some in whole_groups(starts, batch_size):
                yield self._batch(self._common.rows_of(mine[some]))
            return
        mine = torch.arange(self.num_rows)[self.shard[0] :: self.shard[1]]
        for rows in mine.split(batch_size):
            yield self._batch(rows)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of this process, and the settings that it is valid for.

        With the workers of a DataLoader, count the batches yourself: each worker has its own.
        """
        return {**self._settings(), "epoch": self.epoch, "batch": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where the state was taken.

        Raises:
            ValueError: the state is of another set or other settings.
        """
        for name, here in self._settings().items():
            if state.get(name) != here:
                raise ValueError(
                    f"state: {name} was {state.get(name)!r} when it was taken, is {here!r} here"
                )
        self.epoch, self._next = int(state["epoch"]), int(state["batch"])
        self._resumed = True

    def _settings(self) -> dict[str, Any]:
        buffer = {"buffer_rows": self._buffer_rows} if self.shuffle == "buffer" else {}
        return {
            "rows": self.num_rows,
            "batch_rows": self._batch_rows,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "drop_last": self.drop_last,
            **buffer,
            "features": self.features.fingerprint(),
            "normalize": self.normalize,
            "shard": list(self.shard),
        }

    def _rows(self, epoch: int, number: int) -> Tensor:
        """Return which rows in common are in a batch of this process."""
        if self.shuffle == "images" and self._common is not None:
            whole = self._in_shuffled_images(epoch, number)
            return whole.tensor_split(self.shard[1])[self.shard[0]]
        order = epoch_order(self.num_rows, self.shuffle, self.seed, epoch, self._buffer_rows)
        whole = order[number * self._batch_rows :][: self._batch_rows]
        return whole[self.shard[0] :: self.shard[1]].clone()

    def _in_shuffled_images(self, epoch: int, number: int) -> Tensor:
        """Return which rows in common are in a batch of all processes, by shuffled images."""
        assert self._common is not None
        if self._shuffled is None or self._shuffled[0] != epoch:
            order = epoch_order(self.num_images, "all", self.seed, epoch, 0)
            self._shuffled = epoch, order, cumulative(self._common.starts.diff()[order])
        _, order, starts = self._shuffled
        first = number * self._batch_rows
        at = torch.arange(first, min(first + self._batch_rows, self.num_rows))
        image = image_of(starts, at)
        return self._common.starts[order[image]] + at - starts[image]

    def _batches(self, epoch: int, numbers: range) -> Iterator[Batch]:
        """Yield batches by their numbers. The batches of one shuffle buffer are read at once."""
        together = groupby(numbers, lambda number: number // self._read_at_once)
        groups = ([self._rows(epoch, number) for number in group] for _, group in together)
        read = _one_ahead if self._reads_ahead else map
        for batches, held in read(lambda rows: (rows, self._held or self._read(rows)), groups):
            for rows in batches:
                yield self._batch(rows, held)

    def _read(self, batches: list[Tensor]) -> _Held:
        """Read the rows of some batches from each set, in the order of the set if several."""
        rows = batches[0] if len(batches) == 1 else torch.cat(batches).sort().values
        if self._common is None:
            taken = zip(self._sets, self._matched, strict=True)
            return _Held(rows, [one.take(matched[rows]).to(self.device) for one, matched in taken])
        values = [self.features.take(self._common.in_set(rows)).to(self.device)]
        images = image_of(self._common.starts, rows).unique()
        taken = zip(self._of_images, self._matched[1:] or self._matched, strict=True)
        embeddings = [one.take(matched[images]).to(self.device) for one, matched in taken]
        return _Held(rows, values, _Held(images, embeddings))

    def _batch(self, rows: Tensor, held: _Held | None = None) -> Batch:
        """Make a batch of some of the rows in common, from memory if they are there."""
        held = held or self._held or self._read([rows])
        x, *others = held.pick(rows)
        in_set = rows
        if self._common is None:
            in_set = self._matched[0][rows]
        else:
            assert held.of_images is not None
            in_set = self._common.in_set(rows)
            others = held.of_images.pick(image_of(self._common.starts, rows))
        features = _unit(x) if self.normalize else x.float()
        # The cosine of concatenated unit vectors is the mean of their cosines.
        unit = [_unit(one) / math.sqrt(len(others)) for one in others]
        batch = self.features.batch_of(in_set, features, torch.cat(unit, 1) if unit else features)
        return batch._replace(labels=None if batch.labels is None else batch.labels.to(self.device))


class _Common(NamedTuple):
    """The images of a patch set that every set has. Its rows are their patches, in this order."""

    starts: Tensor
    """(n + 1,) the first row of each image; the last is the number of rows."""
    first: Tensor
    """(n,) the first row of each image in the patch set itself."""

    @classmethod
    def of(cls, features: FeatureSet, images: Tensor) -> _Common | None:
        """Return some of the images of a patch set; None for a set without patches."""
        if features.patches is None:
            return None
        starts = features.patches.starts
        return cls(cumulative(starts.diff()[images]), starts[images])

    def in_set(self, rows: Tensor) -> Tensor:
        """Return which rows of the patch set some rows (B,) are."""
        image = image_of(self.starts, rows)
        return self.first[image] + rows - self.starts[image]

    def rows_of(self, images: Tensor) -> Tensor:
        """Return the rows of some of the images (B,), image after image."""
        return spans(self.starts[images], self.starts[images + 1])


class _Held(NamedTuple):
    """Rows in memory, on the device."""

    rows: Tensor
    """(n,) which of the rows in common they are; in ascending order, or those of one batch."""
    values: list[Tensor]
    """From each set (n, d), in its stored type."""
    of_images: _Held | None = None
    """Of patches, the images that they belong to, with their embeddings."""

    def pick(self, rows: Tensor) -> list[Tensor]:
        """Return some of the rows from each set."""
        if rows is self.rows:
            return self.values
        found = torch.searchsorted(self.rows, rows)
        return [one.index_select(0, found.to(one.device)) for one in self.values]


class _Given(NamedTuple):
    """Enough of a batch to recognise it and to read it again."""

    epoch: int
    number: int
    features: Tensor
    """Some of its rows."""


@lru_cache(maxsize=2)  # every batch of an epoch asks for it, which is 8 bytes a row
def epoch_order(num_rows: int, shuffle: Shuffle, seed: int, epoch: int, buffer_rows: int) -> Tensor:
    """Return the order of N rows (N,) in an epoch. Do not write to it: it is kept.

    With ``"buffer"``, every ``buffer_rows`` in it are blocks of consecutive rows, shuffled.
    """
    if shuffle == "none":
        return torch.arange(num_rows)
    # Seed 0's second epoch must not be seed 1's first.
    mixed = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(mixed[:7], "big"))
    if shuffle == "all":
        return torch.randperm(num_rows, generator=generator)
    blocks = torch.randperm(-(-num_rows // _BLOCK), generator=generator)
    rows = (blocks[:, None] * _BLOCK + torch.arange(_BLOCK)).flatten()
    buffers = rows[rows < num_rows].split(buffer_rows)
    return torch.cat([b[torch.randperm(len(b), generator=generator)] for b in buffers])


def _one_ahead(make: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Yield what ``map`` would; a thread makes the next one while one is used."""
    with ThreadPoolExecutor(1, "feature-batches") as thread:
        coming: deque[Future[Any]] = deque()
        for item in items:
            coming.append(thread.submit(make, item))
            if len(coming) > 1:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _unit(rows: Tensor) -> Tensor:
    return unit_rows(rows, torch.float32)[0]


def _some_rows(rows: Tensor) -> Tensor:
    return rows[:: max(1, len(rows) // 4)]


def _is_multiple(rows: Tensor, given: Tensor) -> bool:
    """Say whether rows are the given ones times one positive number, up to rounding."""
    if rows.shape != given.shape:
        return False
    given = given.to(rows.device, torch.float32)
    rows = rows.detach().float()
    norm, other = torch.linalg.vector_norm(given), torch.linalg.vector_norm(rows)
    if not bool(norm and other):
        return not bool(norm or other)
    rows = rows * (norm / other)
    near_zero = norm / math.sqrt(given.numel())
    return bool(((rows - given).abs() <= _ROUNDING * (given.abs() + near_zero)).all())


def _fit_in_half(sets: Sequence[FeatureSet], device: torch.device) -> bool:
    """Say whether sets take at most half of the free memory of a GPU."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return sum(len(one) * one.width * one.dtype.itemsize for one in sets) <= free // 2

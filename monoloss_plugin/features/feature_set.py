"""A feature dataset, opened: features of N images, their labels and their ids."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monoloss_plugin._checks import as_labels
from monoloss_plugin._optional import missing_extra
from monoloss_plugin.batch import Batch
from monoloss_plugin.features import arrays, store
from monoloss_plugin.features.record import FeatureRecord
from monoloss_plugin.features.rows import Rows

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    from datasets import ClassLabel, Dataset, load_from_disk
except ModuleNotFoundError as error:
    raise missing_extra(error, "hub") from error


logger = logging.getLogger(__name__)

_LARGEST_LABEL = 1 << 16
"""Labels without names are classes below this; an id among them would ask for gigabytes."""


class FeatureSet(torch.utils.data.Dataset[Batch]):
    """Features of N images, read from the memory map of a ``datasets.Dataset``.

    As a map-style ``torch`` dataset it gives :class:`~monoloss_plugin.batch.Batch`; a
    ``DataLoader`` asks it for whole batches at once. For training,
    :class:`~monoloss_plugin.features.FeatureBatches` is faster.

    Args:
        dataset: with a column ``features`` of fixed-length lists, and ``label`` and ``image_id``
            where there are any.
        record: what is known of the features, a :class:`FeatureRecord` or a dict of its fields; by
            default read from the dataset's description.

    Raises:
        TypeError: not a ``datasets.Dataset``, or features of another type.
        ValueError: no column ``features``, or missing values in it.
    """

    def __init__(
        self, dataset: Dataset, record: FeatureRecord | Mapping[str, Any] | None = None
    ) -> None:
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"dataset: expected a datasets.Dataset, got {type(dataset).__name__}; "
                "FeatureSet.open takes a folder or a file, FeatureSet.from_tensors takes arrays"
            )
        if "features" not in dataset.column_names:
            raise ValueError(
                f"dataset: expected a column 'features', found {', '.join(dataset.column_names)}"
            )
        # A selection or shuffle of a dataset is a list of rows beside it; written out here.
        selected = getattr(dataset, "_indices", None) is not None
        self.dataset = dataset.flatten_indices() if selected else dataset
        table = self.dataset.data
        self._rows = Rows(table.column("features"))
        self.ids: pa.ChunkedArray | None = None
        """(N,) ids of the images as an Arrow column; None where the set has none."""
        if "image_id" in dataset.column_names:
            self.ids = table.column("image_id").cast(pa.string())
        self.labels: Tensor | None = None
        """(N,) int64, -1 where an image has none; None where no image has one."""
        if "label" in dataset.column_names:
            column = table.column("label")
            if not pa.types.is_integer(column.type):
                raise TypeError(f"label: expected integers, got {column.type}")
            filled = pc.fill_null(column.cast(pa.int64()), -1)
            labels = torch.tensor(filled.to_numpy())
            if self.classes is not None and bool((labels >= len(self.classes)).any()):
                raise ValueError(
                    f"label: expected numbers below {len(self.classes)}, of the classes that have "
                    f"names, got {int(labels.max())}"
                )
            self.labels = labels if bool((labels >= 0).any()) else None
        if record is None:
            record = FeatureRecord.from_json(dataset.info.description or "")
        self.record = record if isinstance(record, FeatureRecord) else FeatureRecord.of(record)
        """Encoder, source and settings that the set was made with."""

    @classmethod
    def open(cls, source: str | os.PathLike[str] | Dataset) -> FeatureSet:
        """Open features that are there already.

        Nothing is ever unpickled. In a file or a dataset the features may be called ``features``,
        ``x`` or ``embeddings``, classes ``labels``, ids ``ids``; in a file also ``classes``, the
        names of the classes.

        Args:
            source: a folder that :func:`~monoloss_plugin.features.extract` or
                ``Dataset.save_to_disk`` has written; a file ``.npy``, ``.npz``, ``.pt``,
                ``.safetensors`` or ``.parquet``; or a ``datasets.Dataset``.

        Raises:
            TypeError: a source of another kind.
            FileNotFoundError: no such folder or file, or no feature dataset in it.
            ValueError: its extraction is not complete, files of it are missing or damaged, or it is
                not clear what the features are.
        """
        if isinstance(source, Dataset):
            return cls(arrays.fitted(source))
        if not isinstance(source, (str, os.PathLike)):
            raise TypeError(
                "source: expected a folder, a file or a datasets.Dataset, got "
                f"{type(source).__name__}; FeatureSet.from_tensors takes arrays"
            )
        path = Path(source).expanduser()
        if path.is_file():
            return cls(arrays.read_file(path))
        if not store.is_complete(path) and (path / store.SETTINGS).exists():
            raise ValueError(
                f"source: the extraction into {path} is not complete; run it again to go on"
            )
        if store.is_complete(path) and (problems := store.damaged(path)):
            raise ValueError(
                f"source: {path} is damaged ({problems[0]}); run its extraction again to repair it"
            )
        if not (path / store.STATE).exists():
            raise FileNotFoundError(f"source: no feature dataset in {path}")
        try:
            dataset = load_from_disk(str(path))
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise ValueError(f"source: {path} is no dataset that can be read: {error}") from error
        return cls(dataset)

    @classmethod
    def from_tensors(
        cls,
        x: Any,
        labels: Any = None,
        ids: Any = None,
        *,
        classes: Sequence[str] | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> FeatureSet:
        """Take features that you have as tensors, numpy arrays or lists; floats are not copied.

        Args:
            x: (N, d) floats, as the encoder gives them; bfloat16 becomes float32.
            labels: (N,) integer classes, -1 where a row has none, or names of classes.
            ids: (N,) by which to match sets of the same images.
            classes: names of the classes, the i-th that of label i.
            record: what is known of the features, such as ``{"encoder": {"name": "my ViT"},
                "source": {"name": "my photos", "split": "train"}}``. Sets of other sources or
                splits are not matched with these.

        Raises:
            TypeError: x not floating, or labels neither integers nor names.
            ValueError: other shapes, NaN or infinite values, or a label beyond the classes.

        Examples:
            >>> FeatureSet.from_tensors([[3.0, 4.0], [0.0, 2.0]], labels=["cat", "dog"]).classes
            ['cat', 'dog']
        """
        return cls(arrays.dataset_of(x, labels, ids, classes, record))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def width(self) -> int:
        """d, the length of a feature vector."""
        return self._rows.width

    @property
    def dtype(self) -> torch.dtype:
        """Type of the stored features."""
        return self._rows.dtype

    @property
    def classes(self) -> list[str] | None:
        """Names of the labels' classes, where they have names."""
        feature = self.dataset.features.get("label")
        return list(feature.names) if isinstance(feature, ClassLabel) else None

    def take(self, numbers: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the features (B, d) of some rows (B,), in the stored type; in ``out`` if given.

        Raises:
            IndexError: a number that is not from 0 to N - 1.
            TypeError: numbers that are no integers.
            ValueError: not one number a row.
        """
        rows = as_labels(numbers, "numbers")
        if rows.ndim != 1 or rows.layout != torch.strided:
            raise ValueError(f"numbers: expected (B,), got {tuple(rows.shape)}, {rows.layout}")
        return self._rows.take(rows, out)

    def tensor(self) -> Tensor:
        """Return every row (N, d) in the stored type, in memory."""
        return self._rows.take(torch.arange(len(self)))

    def ids_of(self, numbers: Tensor) -> list[str] | None:
        """Return the ids of some rows (B,)."""
        if self.ids is None:
            return None
        found: list[str] = self.ids.take(pa.array(numbers.numpy())).to_pylist()
        return found

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self)

    @property
    def num_classes(self) -> int | None:
        """Number of the labels' classes; None without labels.

        Raises:
            ValueError: labels without names that are too large to be numbers of classes.
        """
        if self.labels is None:
            return None
        if self.classes is not None:
            return len(self.classes)
        largest = int(self.labels.max())
        if largest >= _LARGEST_LABEL:
            raise ValueError(
                f"label: expected classes from 0 to {_LARGEST_LABEL - 1}, got {largest}; number "
                "the classes from 0, or give their names"
            )
        return largest + 1

    def every_row(self, batch_size: int = 2048) -> Iterator[Batch]:
        """Yield every row once, in order, as it is stored but in float32 or wider."""
        for rows in torch.arange(len(self)).split(batch_size):
            x = self.take(rows)
            labels = None if self.labels is None else self.labels[rows]
            yield Batch(x.to(torch.promote_types(x.dtype, torch.float32)), labels=labels, rows=rows)

    def __getitem__(self, number: int) -> Batch:
        if not -len(self) <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        row = torch.tensor([number % len(self)])
        labels = None if self.labels is None else self.labels[row][0]
        return Batch(self.take(row)[0], labels=labels, ids=self.ids_of(row), rows=row[0])

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        """Return a whole batch: pass ``collate_fn=lambda batch: batch`` to a DataLoader."""
        rows = torch.as_tensor(numbers)
        labels = None if self.labels is None else self.labels[rows]
        return Batch(self.take(rows), labels=labels, ids=self.ids_of(rows), rows=rows)

    def fingerprint(self) -> str:
        """Return a checksum of some of its rows, by which to tell it from another set."""
        rows = torch.linspace(0, max(0, len(self) - 1), min(len(self), 64)).round().long()
        content = self.take(rows.clamp(max=len(self) - 1)).numpy().tobytes()
        return hashlib.sha256(content).hexdigest()[:16]

    def __reduce__(self) -> tuple[Any, ...]:
        # To another process goes where the rows lie, not the rows.
        return FeatureSet, (self.dataset, self.record)

    def __repr__(self) -> str:
        return f"FeatureSet({len(self)} x {self.width}, {self.dtype})"


def rows_in_common(first: FeatureSet, others: Sequence[FeatureSet]) -> list[Tensor] | None:
    """Match feature sets of the same images by their ids.

    Args:
        first: the set whose order counts.
        others: sets to match with it.

    Returns:
        For each set, its rows (n,) of the images that all of them have, in the first one's order;
        None where they match row by row.

    Raises:
        ValueError: sets of different sources or splits, no image in common, an id that occurs
            twice, or sets without ids that are not equally long.
    """
    sets = [first, *others]
    for one in others:
        _require_same_source(first, one)
    if any(one.ids is None for one in sets):
        if len({len(one) for one in sets}) > 1:
            sizes = ", ".join(str(len(one)) for one in sets)
            raise ValueError(
                f"embeddings: sets without image_id must be equally long, got {sizes} rows"
            )
        logger.warning("sets without image_id are taken to hold the same images in the same order")
        return None
    if all(one.ids.equals(first.ids) for one in others):  # type: ignore[union-attr]
        return None
    for one in sets:
        if pc.count_distinct(one.ids).as_py() < len(one):
            raise ValueError("image_id: an id occurs twice; sets can only be matched by unique ids")
    found = [pc.index_in(first.ids, value_set=one.ids.combine_chunks()) for one in others]  # type: ignore[union-attr]
    everywhere = torch.ones(len(first), dtype=torch.bool)
    for column in found:
        everywhere &= torch.tensor(pc.is_valid(column).to_numpy())
    if not bool(everywhere.any()):
        raise ValueError("embeddings: the sets have no image in common")
    rows = everywhere.nonzero().squeeze(1)
    matched = [torch.tensor(pc.fill_null(column, 0).to_numpy())[rows].long() for column in found]
    return [rows, *matched]


def _require_same_source(one: FeatureSet, other: FeatureSet) -> None:
    """Raise ValueError where two sets are of different images, which may have the same ids."""
    sources: list[dict[str, Any]] = [known.record.source for known in (one, other)]
    if not all(sources):
        return
    names = ["kind", "name", "config", "split"]
    checksums = ["ids_sha256", "sample_sha256"]
    if sources[0].get("kind") == "open-images":  # whose ids are the same in every part of it
        checksums = []
    elif len({source.get("images") is None for source in sources}) > 1:
        checksums = []  # the sample of a stream is its beginning
    differing = [name for name in names if sources[0].get(name) != sources[1].get(name)]
    differing += [
        name
        for name in checksums
        if all(name in source for source in sources) and sources[0][name] != sources[1][name]
    ]
    if differing:
        said = [f"{source.get('name')} (split {source.get('split')})" for source in sources]
        raise ValueError(
            f"embeddings: expected the images that the features are of, {said[0]}, got "
            f"{said[1]}; their records differ in {', '.join(differing)}. Images of different "
            "sources may have the same ids. If you know that they are the same images, open one "
            "set without its record: FeatureSet(other.dataset, record={})"
        )

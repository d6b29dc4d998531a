"""A feature set: the features of N images, with their labels and ids."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, Dataset, load_from_disk
from torch import Tensor

from monoloss_plugin._checks import as_labels
from monoloss_plugin._places import kind_of
from monoloss_plugin.batch import Batch
from monoloss_plugin.features import arrays
from monoloss_plugin.features.record import FeatureRecord
from monoloss_plugin.features.store import SETTINGS, STATE, damaged, is_complete

_LARGEST_LABEL = 1 << 16
"""Classes without names must be below this. A larger label is probably an id."""


class FeatureSet(torch.utils.data.Dataset[Batch]):
    """The features of N images, read from a ``datasets.Dataset`` without a copy.

    It is also a map-style ``torch`` dataset of :class:`~monoloss_plugin.batch.Batch`. For training,
    use :class:`~monoloss_plugin.features.FeatureBatches`, which is faster than a ``DataLoader``.

    Args:
        dataset: it needs a column ``features`` of fixed-length lists. Columns ``label`` and
            ``image_id`` are optional.
        record: says how the features were made, as a :class:`FeatureRecord` or a dict of its
            fields. By default it is read from the dataset's description.

    Raises:
        TypeError: ``dataset`` is not a ``datasets.Dataset``, or its labels are not integers.
        ValueError: there is no column ``features``, it has missing values, or it does not hold
            fixed-length lists of floats.
    """

    width: int
    """d, the length of a feature vector."""
    dtype: torch.dtype
    """Type of the stored features."""
    num_rows: int
    """N, the number of images."""
    classes: list[str] | None
    """Names of the classes; None if they have no names."""
    labels: Tensor | None
    """(N,) int64, -1 where an image has no label; None if no image has one."""
    ids: pa.ChunkedArray | None
    """(N,) ids of the images as an Arrow column of strings; None if the set has no ids."""
    record: FeatureRecord
    """Encoder, source and settings that made the set."""

    def __init__(
        self, dataset: Dataset, record: FeatureRecord | Mapping[str, Any] | None = None
    ) -> None:
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"dataset: expected a datasets.Dataset, got {type(dataset).__name__}; "
                "use FeatureSet.open for a folder or a file, FeatureSet.from_tensors for arrays"
            )
        if "features" not in dataset.column_names:
            raise ValueError(
                f"dataset: expected a column 'features', found {', '.join(dataset.column_names)}"
            )
        if getattr(dataset, "_indices", None) is not None:
            # select() and shuffle() keep only a list of row numbers; this writes the rows.
            dataset = dataset.flatten_indices()
        self.dataset, self.num_rows = dataset, len(dataset)
        table = dataset.data
        column = table.column("features")
        self._pieces = _views(column)
        self._starts = np.cumsum([0, *(len(piece) for piece in self._pieces)])[:-1]
        self.width = column.type.list_size
        self._stored = np.dtype(column.type.value_type.to_pandas_dtype())
        self.dtype = getattr(torch, self._stored.name)
        kind = dataset.features.get("label")
        self.classes = list(kind.names) if isinstance(kind, ClassLabel) else None
        self.labels = self.ids = None
        if "label" in dataset.column_names:
            self.labels = _labels(table.column("label"), self.classes)
        if "image_id" in dataset.column_names:
            self.ids = table.column("image_id").cast(pa.string())
        if record is None:
            record = FeatureRecord.from_json(dataset.info.description or "")
        self.record = FeatureRecord.of(record)

    @classmethod
    def open(cls, source: str | os.PathLike[str] | Dataset) -> FeatureSet:
        """Open a folder, a file or a dataset of features. Nothing is ever unpickled.

        Args:
            source: a folder of :func:`~monoloss_plugin.features.extract` or of
                ``Dataset.save_to_disk``; a file ``.npy``, ``.npz``, ``.pt``, ``.safetensors`` or
                ``.parquet``; or a ``datasets.Dataset``. In a file or a dataset the features may
                also be called ``x`` or ``embeddings``, the labels ``labels``, the ids ``ids``. A
                file may hold the names of the classes as ``classes``.

        Raises:
            TypeError: ``source`` is something else.
            FileNotFoundError: the folder or file does not exist, or the folder holds no features.
            ValueError: the extraction is not finished, files are missing or damaged, or it is not
                clear which array holds the features.
        """
        if isinstance(source, Dataset):
            return cls(arrays.with_standard_columns(source))
        if not isinstance(source, (str, os.PathLike)):
            raise TypeError(
                "source: expected a folder, a file or a datasets.Dataset, got "
                f"{type(source).__name__}; use FeatureSet.from_tensors for arrays"
            )
        path = Path(source).expanduser()
        if path.is_file():
            return cls(arrays.read_file(path))
        if is_complete(path):
            if problems := damaged(path):
                raise ValueError(
                    f"source: {path} is damaged ({problems[0]}); run its extraction again to "
                    "repair it"
                )
        elif (path / SETTINGS).exists():
            raise ValueError(
                f"source: the extraction into {path} is not complete; run it again to go on"
            )
        if not (path / STATE).exists():
            raise FileNotFoundError(f"source: no feature dataset in {path}")
        try:
            dataset = load_from_disk(str(path))
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise ValueError(f"source: the dataset in {path} cannot be read: {error}") from error
        return cls(dataset)

    @classmethod
    def from_tensors(
        cls,
        x: Any,
        labels: Any = None,
        ids: Any = None,
        *,
        classes: Sequence[str] | None = None,
        record: FeatureRecord | Mapping[str, Any] | None = None,
    ) -> FeatureSet:
        """Make a feature set from tensors, numpy arrays or lists. Floats are not copied.

        Args:
            x: (N, d) floats, as the encoder gives them; bfloat16 becomes float32.
            labels: (N,) integer classes, -1 where a row has none; or (N,) names of classes.
            ids: (N,) names of the images. Sets of the same images are matched by them.
            classes: names of the classes; label i means the i-th.
            record: says how the features were made, such as ``{"encoder": {"name": "my ViT"},
                "source": {"name": "my photos", "split": "train"}}``. A set of another source or
                split is then not matched with this one.

        Raises:
            TypeError: ``x`` does not hold floats, or labels are neither integers nor names.
            ValueError: a shape is wrong, ``x`` holds NaN or infinite values, or a label has no
                class.

        Examples:
            >>> FeatureSet.from_tensors([[3.0, 4.0], [0.0, 2.0]], labels=["cat", "dog"]).classes
            ['cat', 'dog']
        """
        return cls(arrays.dataset_of(x, labels, ids, classes, record))

    def __len__(self) -> int:
        return self.num_rows

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None if there are no labels.

        Raises:
            ValueError: the classes have no names, and a label is too large to be a class.
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

    @property
    def compared_by(self) -> str:
        """What samples of this set are compared by, in words: features of its encoder."""
        return f"features of {self.record.encoder.get('name') or 'an encoder without a name'}"

    def take(self, numbers: Tensor) -> Tensor:
        """Return a copy of some rows.

        Args:
            numbers: (B,) row numbers in any order.

        Returns:
            (B, d) in the stored type.

        Raises:
            IndexError: a number is not between 0 and N - 1.
            TypeError: the numbers are not integers.
            ValueError: ``numbers`` does not have one dimension.
        """
        given = as_labels(numbers, "numbers")
        if given.ndim != 1 or given.layout != torch.strided:
            raise ValueError(f"numbers: expected (B,), got {tuple(given.shape)}, {given.layout}")
        rows = given.long().numpy()
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"numbers: rows {rows.min()} to {rows.max()} of a set of {len(self)}")
        if len(self._pieces) == 1:
            return torch.from_numpy(self._pieces[0].take(rows, axis=0))
        of_piece = np.searchsorted(self._starts, rows, side="right") - 1
        in_piece = rows - self._starts[of_piece]
        # A join of bytes is fast for any number of pieces, and a set has one for each 1,000 rows.
        joined = bytearray().join(
            [
                self._pieces[piece][row]
                for piece, row in zip(of_piece.tolist(), in_piece.tolist(), strict=True)
            ]
        )
        return torch.from_numpy(np.frombuffer(joined, self._stored).reshape(-1, self.width))

    def tensor(self) -> Tensor:
        """Return every row (N, d) in the stored type, in memory."""
        return self.take(torch.arange(len(self)))

    def select(self, numbers: Tensor) -> FeatureSet:
        """Return a feature set of some rows, in the order of ``numbers`` (B,). It is a copy."""
        return FeatureSet(self.dataset.select(numbers.tolist()), self.record)

    def ids_of(self, numbers: Tensor) -> list[str] | None:
        """Return the ids of some rows (B,); None if the set has no ids."""
        if self.ids is None:
            return None
        found: list[str] = self.ids.take(pa.array(numbers.numpy())).to_pylist()
        return found

    def batch_of(self, rows: Tensor, features: Tensor) -> Batch:
        """Return the features (B, d) of some rows (B,) as a batch with their labels."""
        return Batch(features, labels=None if self.labels is None else self.labels[rows], rows=rows)

    def every_row(self, batch_size: int = 2048) -> Iterator[Batch]:
        """Yield every row once, in order. Features are float32 or wider, and not normalised."""
        wide = torch.promote_types(self.dtype, torch.float32)
        for rows in torch.arange(len(self)).split(batch_size):
            yield self.batch_of(rows, self.take(rows).to(wide))

    def __getitem__(self, number: int) -> Batch:
        if not -len(self) <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        row = torch.tensor(number % len(self))
        features, ids = self.take(row[None])[0], self.ids_of(row[None])
        return self.batch_of(row, features)._replace(ids=ids)

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        """Return a whole batch: pass ``collate_fn=lambda batch: batch`` to a DataLoader."""
        rows = torch.as_tensor(numbers)
        return self.batch_of(rows, self.take(rows))._replace(ids=self.ids_of(rows))

    def fingerprint(self) -> str:
        """Return a checksum of 64 rows. Two different sets have different ones."""
        rows = torch.linspace(0, max(0, len(self) - 1), min(len(self), 64)).round().long()
        content = self.take(rows.clamp(max=len(self) - 1)).numpy().tobytes()
        return hashlib.sha256(content).hexdigest()[:16]

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process opens the same files. The rows are not sent to it.
        return FeatureSet, (self.dataset, self.record)

    def __repr__(self) -> str:
        return f"FeatureSet({len(self)} x {self.width}, {self.dtype})"


def require_set(one: Any, name: str) -> None:
    """Raise TypeError unless an argument of this name is a feature set."""
    if not isinstance(one, FeatureSet):
        raise TypeError(
            f"{name}: expected a FeatureSet, got {kind_of(one)}; FeatureSet.from_tensors makes one "
            "of arrays, and FeatureSet.open of files and datasets"
        )


def _views(column: pa.ChunkedArray) -> list[np.ndarray[Any, Any]]:
    """Return each piece of a column of fixed-length lists as an array (n, d), without a copy.

    Arrow keeps a column in pieces, one for each record batch of its files.
    """
    kind = column.type
    if not pa.types.is_fixed_size_list(kind) or not pa.types.is_floating(kind.value_type):
        raise ValueError(f"features: expected a column of fixed-length lists of floats, got {kind}")
    if column.null_count:
        raise ValueError(f"features: {column.null_count} rows have no features")
    views = []
    for piece in column.chunks:
        values = piece.flatten()
        if values.null_count:
            raise ValueError(f"features: {values.null_count} values are missing within rows")
        view = values.to_numpy(zero_copy_only=True).reshape(len(piece), kind.list_size)
        views.append(np.require(view, requirements="A"))  # copies only at an odd address
    return views


def _labels(column: pa.ChunkedArray, classes: list[str] | None) -> Tensor | None:
    """Return labels (N,) with -1 where there is none; None if no row has one."""
    if not pa.types.is_integer(column.type):
        raise TypeError(f"label: expected integers, got {column.type}")
    labels = torch.tensor(pc.fill_null(column.cast(pa.int64()), -1).to_numpy())
    if classes is not None and bool((labels >= len(classes)).any()):
        raise ValueError(
            f"label: expected numbers below {len(classes)}, since {len(classes)} classes have "
            f"names, got {int(labels.max())}"
        )
    return labels if bool((labels >= 0).any()) else None

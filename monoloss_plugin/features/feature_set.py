"""A feature set: the features of N images or of their patches, with labels and ids."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, Dataset, load_from_disk
from torch import Tensor

from monoloss_plugin._checks import as_labels
from monoloss_plugin._chunks import whole_groups
from monoloss_plugin._places import kind_of
from monoloss_plugin.batch import Batch
from monoloss_plugin.features import arrays
from monoloss_plugin.features.patches import (
    CLASS_TOKEN,
    Patches,
    StoredPatches,
    has_patches,
    image_of,
)
from monoloss_plugin.features.record import FeatureRecord
from monoloss_plugin.features.store import SETTINGS, STATE, damaged, is_complete

_LARGEST_LABEL = 1 << 16
"""Classes without names must be below this. A larger label is probably an id."""


class FeatureSet(torch.utils.data.Dataset[Batch]):
    """The features of N images, read from a ``datasets.Dataset`` without a copy.

    In a patch set each image has several features, one for each of its patches. Its rows are the
    patches, image after image. Everything that takes or gives rows counts patches; only
    :meth:`select` counts images. :attr:`images` is the set of one feature for each image.

    It is also a map-style ``torch`` dataset of :class:`~monoloss_plugin.batch.Batch`. For training,
    use :class:`~monoloss_plugin.features.FeatureBatches`, which is faster than a ``DataLoader``.

    Args:
        dataset: it needs a column ``features`` of fixed-length lists. Columns ``label`` and
            ``image_id`` are optional. A patch set has one row for each image, with a list of such
            lists, and with the columns ``places``, ``grid`` and ``pooled``.
        record: says how the features were made, as a :class:`FeatureRecord` or a dict of its
            fields. By default it is read from the dataset's description.

    Raises:
        TypeError: ``dataset`` is not a ``datasets.Dataset``, or its labels are not integers.
        ValueError: there is no column ``features``, it has missing values, or it does not hold
            fixed-length lists of floats; or a column of a patch set is missing or does not fit.
    """

    width: int
    """d, the length of a feature vector."""
    dtype: torch.dtype
    """Type of the stored features."""
    num_rows: int
    """The number of rows: of images, or of all their patches."""
    classes: list[str] | None
    """Names of the classes; None if they have no names."""
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
        if record is None:
            record = FeatureRecord.from_json(dataset.info.description or "")
        self.record = FeatureRecord.of(record)
        self._of_patches: StoredPatches | None = None
        self._images: FeatureSet | None = None
        self._are_means = False
        if has_patches(dataset):
            self._of_patches = StoredPatches(dataset)
            vectors = self._of_patches.vectors
            self.num_rows = int(self._of_patches.starts[-1])
            self._images = FeatureSet(_pooled(dataset), self.record.of_pooled())
            self._images._are_means = True
            self.classes, self.ids = self._images.classes, self._images.ids
            self._image_labels = self._images.labels
        else:
            if getattr(dataset, "_indices", None) is not None:
                # select() and shuffle() keep only a list of row numbers; this writes the rows.
                dataset = dataset.flatten_indices()
            vectors, self.num_rows = dataset.data.column("features"), len(dataset)
            kind = dataset.features.get("label")
            self.classes = list(kind.names) if isinstance(kind, ClassLabel) else None
            self._image_labels = self.ids = None
            if "label" in dataset.column_names:
                self._image_labels = _labels(dataset.data.column("label"), self.classes)
            if "image_id" in dataset.column_names:
                self.ids = dataset.data.column("image_id").cast(pa.string())
        self.dataset = dataset
        self._pieces = _views(vectors)
        self._starts = np.cumsum([0, *(len(piece) for piece in self._pieces)])[:-1]
        self.width = vectors.type.list_size
        self._stored = np.dtype(vectors.type.value_type.to_pandas_dtype())
        self.dtype = getattr(torch, self._stored.name)
        if self._images is not None:
            self._check_patches(self._images)

    def _check_patches(self, images: FeatureSet) -> None:
        """Check that a patch set has a mean of each image, and complete its record."""
        if images.width != self.width:
            raise ValueError(f"pooled: expected width {self.width} as features, got {images.width}")
        if not self.record.patches and self.patches is not None:
            self.record = replace(self.record, patches=_describe(self.patches))

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
        grid: tuple[int, int] | None = None,
        record: FeatureRecord | Mapping[str, Any] | None = None,
    ) -> FeatureSet:
        """Make a feature set from tensors, numpy arrays or lists. Floats are not copied.

        Args:
            x: (N, d) floats, as the encoder gives them; bfloat16 becomes float32. Or (N, P, d), the
                P patches of each image, row after row of its grid, without class tokens.
            labels: (N,) integer classes, -1 where an image has none; or (N,) names of classes.
            ids: (N,) names of the images. Sets of the same images are matched by them.
            classes: names of the classes; label i means the i-th.
            grid: height and width of each image's grid of patches. By default it is a square.
            record: says how the features were made, such as ``{"encoder": {"name": "my ViT"},
                "source": {"name": "my photos", "split": "train"}}``. A set of another source or
                split is then not matched with this one.

        Raises:
            TypeError: ``x`` does not hold floats, or labels are neither integers nor names.
            ValueError: a shape is wrong, ``x`` holds NaN or infinite values, a label has no class,
                or P patches make no such grid.

        Examples:
            >>> FeatureSet.from_tensors([[3.0, 4.0], [0.0, 2.0]], labels=["cat", "dog"]).classes
            ['cat', 'dog']
        """
        return cls(arrays.dataset_of(x, labels, ids, classes, record, grid=grid))

    def __len__(self) -> int:
        return self.num_rows

    @cached_property
    def patches(self) -> Patches | None:
        """Which patches each image has; None for a set of one feature for each image."""
        return None if self._of_patches is None else self._of_patches.read()

    @property
    def num_images(self) -> int:
        """The number of images N."""
        return self.num_rows if self._images is None else self._images.num_rows

    @property
    def images(self) -> FeatureSet:
        """The set with one feature for each image: the mean over its patches, or this set itself.

        It is a view of the column ``pooled``. Compare, look up and match images by it.
        """
        return self if self._images is None else self._images

    def image_of(self, rows: Tensor) -> Tensor:
        """Return the image (B,) of each of some rows (B,): itself, or the image of the patch."""
        if self._of_patches is None:
            return rows
        return image_of(self._of_patches.starts, rows)

    @cached_property
    def labels(self) -> Tensor | None:
        """(rows,) int64: the class of each row's image, -1 for none; None if no image has one."""
        if self._of_patches is None or self._image_labels is None:
            return self._image_labels
        return self._image_labels.repeat_interleave(self._of_patches.starts.diff())

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None if there are no labels.

        Raises:
            ValueError: the classes have no names, and a label is too large to be a class.
        """
        if self._image_labels is None:
            return None
        if self.classes is not None:
            return len(self.classes)
        largest = int(self._image_labels.max())
        if largest >= _LARGEST_LABEL:
            raise ValueError(
                f"label: expected classes from 0 to {_LARGEST_LABEL - 1}, got {largest}; number "
                "the classes from 0, or give their names"
            )
        return largest + 1

    @property
    def compared_by(self) -> str:
        """What samples of this set are compared by, in words: features of its encoder."""
        name = self.record.encoder.get("name") or "an encoder without a name"
        means = ", the mean over the patches of each image" if self._are_means else ""
        return f"features of {name}{means}"

    def take(self, numbers: Tensor) -> Tensor:
        """Return a copy of some rows.

        Args:
            numbers: (B,) row numbers in any order.

        Returns:
            (B, d) in the stored type.

        Raises:
            IndexError: a number is not that of a row.
            TypeError: the numbers are not integers.
            ValueError: ``numbers`` does not have one dimension.
        """
        given = as_labels(numbers, "numbers")
        if given.ndim != 1 or given.layout != torch.strided:
            raise ValueError(f"numbers: expected (B,), got {tuple(given.shape)}, {given.layout}")
        rows = given.long().numpy()
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"numbers: rows {rows.min()} to {rows.max()} of a set of {len(self)}")
        if self._of_patches is not None:
            rows = self._of_patches.find(torch.from_numpy(rows)).numpy()
        if len(self._pieces) == 1:
            return torch.from_numpy(self._pieces[0].take(rows, axis=0))
        of_piece = np.searchsorted(self._starts, rows, side="right") - 1
        in_piece = rows - self._starts[of_piece]
        # Consecutive rows, such as the patches of an image, are copied at once.
        ends = np.flatnonzero((np.diff(rows) != 1) | (np.diff(of_piece) != 0)) + 1
        firsts = np.concatenate([[0], ends])[: len(rows)]
        counts = np.diff(firsts, append=len(rows))
        runs = zip(
            of_piece[firsts].tolist(), in_piece[firsts].tolist(), counts.tolist(), strict=True
        )
        # A join of bytes is fast for any number of pieces, and a set has one for each 1,000 rows.
        joined = bytearray().join(
            [self._pieces[piece][row : row + count] for piece, row, count in runs]
        )
        return torch.from_numpy(np.frombuffer(joined, self._stored).reshape(-1, self.width))

    def tensor(self) -> Tensor:
        """Return every row (N, d) in the stored type, in memory."""
        return self.take(torch.arange(len(self)))

    def select(self, numbers: Tensor) -> FeatureSet:
        """Return a feature set of some images, in the order of ``numbers`` (B,).

        It is a copy. For a patch set only the means are copied.
        """
        return FeatureSet(self.dataset.select(as_labels(numbers, "numbers").tolist()), self.record)

    def ids_of(self, numbers: Tensor) -> list[str] | None:
        """Return the ids of the images of some rows (B,); None if the set has no ids."""
        if self.ids is None:
            return None
        found: list[str] = self.ids.take(pa.array(self.image_of(numbers).numpy())).to_pylist()
        return found

    def batch_of(self, rows: Tensor, features: Tensor, embeddings: Tensor | None = None) -> Batch:
        """Return the features (B, d) of some rows (B,) as a batch with all that is known of them.

        Patches get the features of their images as embeddings, unless others are given.
        """
        images = self.image_of(rows)
        labels = None if self._image_labels is None else self._image_labels[images]
        if self.patches is None:
            return Batch(features, embeddings, labels, rows=rows)
        if embeddings is None:
            embeddings = self._of_images(images)
        places, grids = self.patches.places[rows], self.patches.grids[images]
        return Batch(features, embeddings, labels, None, rows, images, places, grids)

    def _of_images(self, images: Tensor) -> Tensor:
        """Return the features (B, d) of some images (B,), each of which may occur many times."""
        some, which = torch.unique(images, return_inverse=True)
        return self.images.take(some).to(_wide(self.dtype))[which]

    def every_row(self, batch_size: int = 2048) -> Iterator[Batch]:
        """Yield every row once, in order. Features are float32 or wider, and not normalised.

        The patches of an image are never cut: a batch has as many whole images as have at most
        ``batch_size`` patches together, or one image.
        """
        for rows in self._in_order(batch_size):
            yield self.batch_of(rows, self.take(rows).to(_wide(self.dtype)))

    def _in_order(self, batch_size: int) -> Iterator[Tensor]:
        """Yield the rows of each batch of :meth:`every_row`."""
        if self._of_patches is None:
            yield from torch.arange(len(self)).split(batch_size)
            return
        starts = self._of_patches.starts
        for some in whole_groups(starts, batch_size):
            yield torch.arange(int(starts[some.start]), int(starts[some.stop]))

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
        of = "" if self._images is None else f" of {self.num_images} images"
        return f"FeatureSet({len(self)} x {self.width}{of}, {self.dtype})"


def require_set(one: Any, name: str) -> None:
    """Raise TypeError unless an argument of this name is a feature set."""
    if not isinstance(one, FeatureSet):
        raise TypeError(
            f"{name}: expected a FeatureSet, got {kind_of(one)}; FeatureSet.from_tensors makes one "
            "of arrays, and FeatureSet.open of files and datasets"
        )


def _pooled(dataset: Dataset) -> Dataset:
    """Return the images of a patch set as a dataset of one vector for each, without a copy."""
    columns = [name for name in ("pooled", "label", "image_id") if name in dataset.column_names]
    return dataset.select_columns(columns).rename_column("pooled", "features")


def _describe(patches: Patches) -> dict[str, Any]:
    """Return what a record says of patches."""
    same = bool(patches.num_images) and bool((patches.grids == patches.grids[:1]).all())
    return {
        "grid": patches.grids[0].tolist() if same else None,
        "kept": None if patches.are_whole else int(patches.starts.diff().max()),
        "class_token": bool((patches.places == CLASS_TOKEN).any()),
    }


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


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

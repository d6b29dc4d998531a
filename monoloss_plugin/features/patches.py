"""Which patches each image of a patch set has, and how its dataset stores them.

A patch set has one row for each image, with the columns::

    features   the image's patches, a list of P vectors of length d
    places     of each patch its place in the image's grid, row after row; -1 for a class token
    grid       height and width of that grid, in patches
    pooled     (d,) the mean over all the image's patches, without the class token
    label, image_id    as in a set of one vector for each image
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, Value
from datasets import List as Lists
from torch import Tensor

PATCH_COLUMNS = ("places", "grid", "pooled")
"""Columns that a patch set has beside ``features``, ``label`` and ``image_id``."""
CLASS_TOKEN = -1
"""The place of a class token."""
LARGEST_GRID = (1 << 15) - 1
"""Patches of a grid at most, since places are stored as int16."""
_IMAGES_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class Patches:
    """Which patches each of N images has.

    The rows of a patch set are patches, image after image.

    Examples:
        >>> patches = Patches.whole(num_images=2, grid=(1, 3))
        >>> patches.image_of(torch.tensor([0, 2, 3]))
        tensor([0, 0, 1])
        >>> patches.rows_of(torch.tensor([1]))
        tensor([3, 4, 5])
    """

    starts: Tensor
    """(N + 1,) int64: the first row of each image; the last is the number of rows."""
    places: Tensor
    """(rows,) int16: the place of each patch in its image's grid, row after row; -1 for a class
    token."""
    grids: Tensor
    """(N, 2) int16: height and width of each image's grid, in patches."""

    @classmethod
    def whole(cls, num_images: int, grid: tuple[int, int]) -> Patches:
        """Return the patches of images that have every place of one grid, in order."""
        size = grid[0] * grid[1]
        return cls(
            torch.arange(num_images + 1) * size,
            torch.arange(size, dtype=torch.int16).repeat(num_images),
            torch.tensor([grid], dtype=torch.int16).repeat(num_images, 1),
        )

    @property
    def num_images(self) -> int:
        """Number of images N."""
        return len(self.starts) - 1

    def image_of(self, rows: Tensor) -> Tensor:
        """Return the image (B,) of each of some rows (B,), as int64."""
        return image_of(self.starts, rows)

    def rows_of(self, images: Tensor) -> Tensor:
        """Return the rows (n,) of some images (B,), image after image."""
        return spans(self.starts[images], self.starts[images + 1])

    @cached_property
    def are_whole(self) -> bool:
        """Whether every image has each place of its grid once, and perhaps a class token."""
        for first in range(0, self.num_images, _IMAGES_AT_ONCE):
            images = torch.arange(first, min(first + _IMAGES_AT_ONCE, self.num_images))
            places = self.places[self.starts[images[0]] : self.starts[images[-1] + 1]].long()
            counts = self.starts[images + 1] - self.starts[images]
            image = torch.arange(len(images)).repeat_interleave(counts)
            in_grid = places != CLASS_TOKEN
            places, image = places[in_grid], image[in_grid]
            sizes = self.grids[images].long().prod(1)
            beyond = (places >= sizes[image]) | (places < 0)
            distinct = (image * (LARGEST_GRID + 1) + places).unique()
            if bool(beyond.any()) or len(distinct) < len(places):
                return False
            if not torch.equal(image.bincount(minlength=len(images)), sizes):
                return False
        return True


def image_of(starts: Tensor, rows: Tensor) -> Tensor:
    """Return the image (B,) of each row (B,), if images begin at ``starts`` (N + 1,)."""
    return torch.searchsorted(starts, rows, right=True) - 1


def cumulative(counts: Tensor) -> Tensor:
    """Return where each of N images begins, by how many rows it has, and where the last ends."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def spans(starts: Tensor, stops: Tensor) -> Tensor:
    """Return the numbers from each start (B,) to its stop (B,), one after another."""
    counts = stops - starts
    before = counts.cumsum(0) - counts
    return torch.arange(int(counts.sum())) + (starts - before).repeat_interleave(counts)


def grid_of(num_patches: int, grid: Any = None) -> tuple[int, int]:
    """Return the grid (height, width) of P patches: the given one, or a square.

    Raises:
        TypeError: ``grid`` is not a pair of integers.
        ValueError: the grid does not have P places, it is not given and P is not a square number,
            or there are too many.
    """
    if grid is None:
        side = round(num_patches**0.5)
        if side * side != num_patches or not side:
            raise ValueError(
                f"grid: {num_patches} patches are no square; give their grid, as in "
                "FeatureSet.from_tensors(x, grid=(height, width)), and leave out class tokens"
            )
        grid = side, side
    pair = tuple(grid) if isinstance(grid, (tuple, list)) else ()
    if [type(side) for side in pair] != [int, int]:
        raise TypeError(f"grid: expected (height, width), two integers, got {grid!r}")
    if min(pair) < 1 or pair[0] * pair[1] != num_patches:
        raise ValueError(
            f"grid: expected a height and a width of {num_patches} patches, got {pair}"
        )
    if num_patches > LARGEST_GRID:
        raise ValueError(f"grid: expected at most {LARGEST_GRID} patches, got {num_patches}")
    return pair[0], pair[1]


def has_patches(dataset: Dataset) -> bool:
    """Say whether the features of a dataset are lists of vectors."""
    kind = dataset.data.column("features").type
    return _is_list(kind) and (
        _is_list(kind.value_type) or pa.types.is_fixed_size_list(kind.value_type)
    )


def patch_columns(dtype: str, width: int) -> dict[str, Any]:
    """Return the types of the columns of a patch set but label and image_id."""
    vector = Lists(Value(dtype), length=width)
    return {
        "features": Lists(vector),
        "places": Lists(Value("int16")),
        "grid": Lists(Value("int16"), length=2),
        "pooled": vector,
    }


def nested_lists(values: np.ndarray[Any, Any], counts: np.ndarray[Any, Any]) -> pa.ListArray:
    """Return rows (n,) or (n, d) as an Arrow column of lists of them, without a copy.

    Args:
        values: the rows of the first list, then those of the second, and so on.
        counts: (N,) how many rows each list has.
    """
    items = pa.array(values.reshape(-1))
    if values.ndim > 1:
        items = pa.FixedSizeListArray.from_arrays(items, values.shape[1])
    ends = np.concatenate([[0], np.cumsum(counts)])
    return pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), items)


class StoredPatches:
    """The patches of some of the rows of a dataset, all of which stay where they are.

    Args:
        dataset: of a patch set.

    Raises:
        ValueError: a column is missing, or has values that are missing or of another type.
    """

    def __init__(self, dataset: Dataset) -> None:
        table = dataset.data
        if missing := [name for name in PATCH_COLUMNS if name not in table.column_names]:
            raise ValueError(
                f"dataset: expected columns {', '.join(PATCH_COLUMNS)} beside features of several "
                f"vectors, found no {missing[0]}; FeatureSet.open adds them if the patches of each "
                "image make one grid"
            )
        features, self._places, self._grid = (
            table.column(name) for name in ("features", "places", "grid")
        )
        for name, column in (("places", self._places), ("grid", self._grid)):
            if column.null_count or not pa.types.is_integer(getattr(column.type, "value_type", 0)):
                raise ValueError(f"{name}: expected lists of integers, got {column.type}")
        if features.null_count:
            raise ValueError(f"features: {features.null_count} images have no features")
        self.vectors = pa.chunked_array(
            [piece.flatten() for piece in features.chunks], features.type.value_type
        )
        """The vectors of all rows of the dataset, without a copy."""
        if not bool((_counts(self._grid) == 2).all()):
            raise ValueError("grid: expected a height and a width of each image")
        counts = _counts(features)
        if not torch.equal(counts, _counts(self._places)):
            raise ValueError("places: expected one for each patch; some images have more or fewer")
        indices = getattr(dataset, "_indices", None)  # of a dataset after select() or shuffle()
        self._images: Tensor | None = None
        first = counts.cumsum(0) - counts
        if indices is not None:
            self._images = torch.tensor(indices.column(0).to_numpy().astype(np.int64))
            first, counts = first[self._images], counts[self._images]
        self._first = first
        if not bool((counts > 0).all()):
            raise ValueError("features: expected at least one patch of each image")
        self.starts = cumulative(counts)
        """(N + 1,) as :attr:`Patches.starts`."""

    def find(self, rows: Tensor) -> Tensor:
        """Return which of the vectors some rows (B,) are."""
        if self._images is None:
            return rows
        image = image_of(self.starts, rows)
        return self._first[image] + rows - self.starts[image]

    def read(self) -> Patches:
        """Read the places and grids of the rows."""
        places = _flat(self._places)
        grids = _flat(self._grid).view(-1, 2)
        if self._images is not None:
            counts = self.starts.diff()
            places, grids = places[spans(self._first, self._first + counts)], grids[self._images]
        return Patches(self.starts, places, grids)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _counts(column: pa.ChunkedArray) -> Tensor:
    return torch.tensor(pc.list_value_length(column).to_numpy().astype(np.int64))


def _flat(column: pa.ChunkedArray) -> Tensor:
    """Return the int16 values of a column of lists, one after another."""
    pieces = [piece.flatten().cast(pa.int16()).to_numpy() for piece in column.chunks]
    return torch.tensor(np.concatenate([np.empty(0, np.int16), *pieces]))

"""Arrays, and files of other formats, as the dataset of a feature set."""

from __future__ import annotations

import json
import pickle
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Value
from datasets import Sequence as Rows
from safetensors.torch import load_file
from torch import Tensor

from monoloss_plugin._checks import as_labels, as_list, as_rows, as_tensor, require_finite
from monoloss_plugin._places import kind_of
from monoloss_plugin.features.patches import (
    PATCH_COLUMNS,
    grid_of,
    has_patches,
    nested_lists,
    patch_columns,
)
from monoloss_plugin.features.record import FeatureRecord
from monoloss_plugin.features.shards import features_schema, fixed_lists

_COLUMNS = {
    "features": ("features", "x", "embeddings", "embedding"),
    "label": ("label", "labels", "y"),
    "image_id": ("image_id", "ids", "id"),
}
"""Columns of a feature set, and the names that they may have in a file or a dataset."""
_READERS: dict[str, Any] = {
    ".npy": lambda path: np.load(path, mmap_mode="r", allow_pickle=False),
    ".npz": lambda path: dict(np.load(path, allow_pickle=False)),
    ".pt": lambda path: torch.load(path, map_location="cpu", weights_only=True, mmap=True),
    ".safetensors": load_file,
    ".parquet": lambda path: Dataset.from_parquet(str(path)),
}


def dataset_of(
    x: Any, labels: Any, ids: Any, classes: Any, record: Any, *, grid: Any = None
) -> Dataset:
    """Return arrays as a dataset over the same memory; see :meth:`FeatureSet.from_tensors`."""
    shape = tuple(as_tensor(x, "x").shape)
    rows = as_rows(x, "x").detach().cpu()
    if len(shape) not in (2, 3) or shape[-1] == 0:
        raise ValueError(
            "x: expected (N, d), one vector for each image, or (N, P, d), one for each patch of "
            f"each image, got shape {shape}"
        )
    if len(shape) == 2 and grid is not None:
        raise ValueError(f"grid: expected none for one vector of each image, got {grid!r}")
    require_finite(rows, "x")
    values = (rows.float() if rows.dtype == torch.bfloat16 else rows).numpy()
    known = FeatureRecord.of({} if record is None else record)
    columns: dict[str, Any] = {"features": fixed_lists(values)}
    if len(shape) == 3:
        grid = grid_of(shape[1], grid)
        columns = _patch_columns(values.reshape(shape), grid)
        known = replace(known, patches={"grid": list(grid), "kept": None, "class_token": False})
    classes = None if classes is None else [str(name) for name in as_list(classes, "classes")]
    if labels is not None:
        numbers, classes = _label_numbers(labels, classes)
        columns["label"] = pa.array(numbers.numpy())
    if ids is not None:
        columns["image_id"] = pa.array([str(one) for one in as_list(ids, "ids")], pa.string())
    for name, column in (("labels", "label"), ("ids", "image_id")):
        if column in columns and len(columns[column]) != shape[0]:
            raise ValueError(
                f"{name}: expected {shape[0]}, one for each row of x, got {len(columns[column])}"
            )
    schema = features_schema(
        shape[-1], str(values.dtype), labels is not None, classes, patches=len(shape) == 3
    )
    schema = Features({name: schema[name] for name in columns})
    return Dataset(
        pa.table(columns).cast(schema.arrow_schema),
        DatasetInfo(description=json.dumps(known.to_dict()), features=schema),
        fingerprint=uuid.uuid4().hex[:16],  # datasets would hash every value to make one
    )


def _patch_columns(x: np.ndarray[Any, Any], grid: tuple[int, int]) -> dict[str, Any]:
    """Return the columns of patches (N, P, d) of one grid, without a copy of the patches."""
    images, size, _ = x.shape
    each = np.full(images, size)
    wide = np.promote_types(x.dtype, np.float32)
    places = np.tile(np.arange(size, dtype=np.int16), images)
    return {
        "features": nested_lists(x.reshape(images * size, -1), each),
        "places": nested_lists(places, each),
        "grid": fixed_lists(np.tile(np.array(grid, np.int16), (images, 1))),
        "pooled": fixed_lists(x.mean(axis=1, dtype=wide).astype(x.dtype)),
    }


def read_file(path: Path) -> Dataset:
    """Read features from a file of arrays or of a table; see :meth:`FeatureSet.open`."""
    if path.suffix not in _READERS:
        raise ValueError(
            f"source: expected a folder or a file that ends in {', '.join(_READERS)}, got {path}"
        )
    try:
        found = _READERS[path.suffix](path)
    except Exception as error:  # the readers raise all kinds of errors for a damaged file
        reason = str(error).partition("\n")[0]
        if isinstance(error, pickle.UnpicklingError):  # its text says how to unpickle all the same
            reason = "it holds more than tensors, lists and strings"
        raise ValueError(
            f"source: {path} cannot be read: {reason}. Nothing is unpickled; save features as an "
            "array of floats, labels as integers, and ids as strings"
        ) from error
    if isinstance(found, Dataset):
        return with_standard_columns(found)
    by_name = found if isinstance(found, Mapping) else {"features": found}
    shapes = {
        name: str(tuple(value.shape)) if hasattr(value, "shape") else kind_of(value)
        for name, value in by_name.items()
    }
    chosen = _choose_columns(shapes, str(path))
    x, labels, ids = (by_name.get(chosen.get(column, "")) for column in _COLUMNS)
    return dataset_of(x, labels, ids, by_name.get("classes"), None)


def with_standard_columns(dataset: Dataset) -> Dataset:
    """Return a dataset whose columns have the names and types of a feature set."""
    chosen = _choose_columns({n: str(kind) for n, kind in dataset.features.items()}, "the dataset")
    renamed = {name: column for column, name in chosen.items() if name != column}
    added = [name for name in PATCH_COLUMNS if name in dataset.column_names]
    dataset = dataset.select_columns([*chosen.values(), *added]).rename_columns(renamed)
    if dataset.features.get("label") == Value("string"):
        dataset = dataset.class_encode_column("label")
    if has_patches(dataset):
        return _with_patch_columns(dataset, added)
    if added:
        dataset = dataset.remove_columns(added)
    kind = dataset.data.column("features").type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return dataset
    column = dataset.with_format("arrow")[:]["features"]
    width = _one_length(column, "rows of one length", "values")
    features = dataset.features.copy()
    features["features"] = Rows(features["features"].feature, length=width)
    return dataset.cast(features)


def _with_patch_columns(dataset: Dataset, added: list[str]) -> Dataset:
    """Return a dataset of lists of vectors with the columns and types of a patch set."""
    column = dataset.with_format("arrow")[:]["features"]
    vectors = pa.chunked_array([piece.flatten() for piece in column.chunks], column.type.value_type)
    width = _one_length(vectors, "vectors of one length", "values")
    if len(added) == len(PATCH_COLUMNS):
        wanted = patch_columns(str(vectors.type.value_type.to_pandas_dtype().__name__), width)
        features = Features({**dataset.features, **wanted})
        return dataset if features == dataset.features else dataset.cast(features)
    size = _one_length(column, "a whole grid of patches for each image", "patches")
    pieces = [piece.flatten().to_numpy(zero_copy_only=False) for piece in vectors.chunks]
    x = np.concatenate(pieces).reshape(len(column), size, width)
    kind, found = dataset.features.get("label"), dataset.with_format("arrow")[:]
    return dataset_of(
        x,
        pc.fill_null(found["label"], -1).to_numpy() if "label" in found.column_names else None,
        found["image_id"].to_pylist() if "image_id" in found.column_names else None,
        kind.names if isinstance(kind, ClassLabel) else None,
        FeatureRecord.from_json(dataset.info.description or ""),
    )


def _one_length(column: pa.ChunkedArray, wanted: str, of: str) -> int:
    """Return the length that all lists of a column have."""
    ends = pc.min_max(pc.list_value_length(column)).as_py()
    if ends["min"] != ends["max"]:
        raise ValueError(f"features: expected {wanted}, got {ends['min']} to {ends['max']} {of}")
    return int(ends["max"] or 0)


def _choose_columns(found: Mapping[str, str], where: str) -> dict[str, str]:
    """Return the name that each column of a feature set has in a file or a dataset.

    ``found`` has the names there, each with its shape or type, which the error shows.
    """
    chosen: dict[str, str] = {}
    for column, names in _COLUMNS.items():
        fitting = [name for name in names if name in found]
        if column == "features" and not fitting and len(found) == 1:
            fitting = list(found)
        if len(fitting) > 1 or (column == "features" and not fitting):
            listed = ", ".join(f"{name} {found[name]}" for name in list(found)[:12])
            raise ValueError(
                f"source: expected one of {', '.join(names)} in {where}, found {listed or 'none'}; "
                "pass the arrays themselves to FeatureSet.from_tensors"
            )
        if fitting:
            chosen[column] = fitting[0]
    return chosen


def _label_numbers(labels: Any, classes: list[str] | None) -> tuple[Tensor, list[str] | None]:
    """Return labels as numbers (N,), and the names of their classes."""
    listed = labels if isinstance(labels, Tensor) and labels.ndim else as_list(labels, "labels")
    if len(listed) and isinstance(listed[0], str):
        classes = sorted(set(listed)) if classes is None else classes
        if unknown := set(listed).difference(classes):
            raise ValueError(f"labels: expected names of the classes, got {min(unknown)!r}")
        listed = ClassLabel(names=classes).str2int(listed)
    numbers = as_labels(listed).cpu().long()
    if numbers.ndim != 1:
        raise ValueError(f"labels: expected (N,), got {tuple(numbers.shape)}")
    if len(numbers) and int(numbers.min()) < -1:
        raise ValueError(
            f"labels: expected a class, or -1 for a row without one, got {int(numbers.min())}"
        )
    return numbers, classes

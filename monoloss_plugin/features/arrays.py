"""Features that were made elsewhere: arrays, and files of them, as the dataset of a feature set."""

from __future__ import annotations

import json
import logging
import pickle
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monoloss_plugin._checks import as_labels, as_list, as_rows, as_tensor, require_finite
from monoloss_plugin._optional import missing_extra
from monoloss_plugin._places import kind_of
from monoloss_plugin.features.record import FeatureRecord
from monoloss_plugin.features.store import features_schema, fixed_lists

try:
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    from datasets import Dataset, DatasetInfo, Value
    from datasets import Sequence as Rows
    from datasets.exceptions import DatasetGenerationError
    from safetensors import SafetensorError
    from safetensors.torch import load_file
except ModuleNotFoundError as error:
    raise missing_extra(error, "hub") from error

logger = logging.getLogger(__name__)

_COLUMNS = {
    "features": ("features", "x", "embeddings", "embedding"),
    "label": ("label", "labels", "y"),
    "image_id": ("image_id", "ids", "id"),
}
"""What each column of a feature set may be called elsewhere."""
_CLASSES = "classes"
_SHOWN = 12
"""Names of a file's arrays that an error lists."""


def dataset_of(
    x: Any, labels: Any, ids: Any, classes: Any, record: Mapping[str, Any] | None
) -> Dataset:
    """Return arrays as a dataset over the same memory; see :meth:`FeatureSet.from_tensors`."""
    rows = as_rows(x, "x").detach().cpu()
    if as_tensor(x, "x").ndim != 2:
        raise ValueError(
            f"x: expected (N, d), one vector an image, got shape {tuple(as_tensor(x, 'x').shape)}; "
            "pool tokens first, or make each a row"
        )
    if rows.shape[1] == 0:
        raise ValueError("x: expected (N, d) with at least one dimension, got none")
    if record is not None and not isinstance(record, Mapping):
        raise TypeError(f"record: expected a dict, got {kind_of(record)}")
    require_finite(rows, "x")
    values = (rows.float() if rows.dtype == torch.bfloat16 else rows).numpy()
    columns: dict[str, Any] = {"features": fixed_lists(values)}
    classes = None if classes is None else [str(name) for name in as_list(classes, "classes")]
    if labels is not None:
        numbers, classes = _numbers(labels, classes, len(rows))
        columns["label"] = pa.array(numbers.numpy())
    if ids is not None:
        columns["image_id"] = pa.array([str(one) for one in as_list(ids, "ids")], pa.string())
        _require_one_each(len(columns["image_id"]), "ids", len(rows))
    schema = features_schema(values.shape[1], str(values.dtype), labels is not None, classes)
    schema = type(schema)({name: schema[name] for name in columns})
    return Dataset(
        pa.table(columns).cast(schema.arrow_schema),
        DatasetInfo(
            description=json.dumps(FeatureRecord.of(record or {}).to_dict()), features=schema
        ),
        fingerprint=uuid.uuid4().hex[:16],  # or datasets would hash every value for one
    )


def read_file(path: Path) -> Dataset:
    """Read features from a file of arrays, or of a table.

    Raises:
        ValueError: another kind of file, one that cannot be read without unpickling it, or one in
            which it is not clear what the features are.
    """
    if path.suffix not in _READERS:
        raise ValueError(
            f"source: expected a folder or a file that ends in {', '.join(_READERS)}, got {path}"
        )
    try:
        found = _READERS[path.suffix](path)
    except _UNREADABLE as error:
        said = "it holds more than tensors, lists and strings"
        if not isinstance(error, pickle.UnpicklingError):  # whose text says how to run it
            said = str(error).partition("\n")[0]
        raise ValueError(
            f"source: {path} cannot be read: {said}. Nothing is unpickled; save features as an "
            "array of floats, labels as integers, and ids as strings"
        ) from error
    if isinstance(found, Dataset):
        return fitted(found)
    if not isinstance(found, Mapping):
        found = {"features": found}
    chosen = _chosen({name: _shape(value) for name, value in found.items()}, str(path))
    x, labels, ids = (found.get(chosen.get(column, "")) for column in _COLUMNS)
    return dataset_of(x, labels, ids, found.get(_CLASSES), None)


def fitted(dataset: Dataset) -> Dataset:
    """Return a dataset with the columns of a feature set, whatever they are called in it.

    Raises:
        ValueError: it is not clear which are the features, or they are not equally long.
    """
    chosen = _chosen({name: str(kind) for name, kind in dataset.features.items()}, "the dataset")
    renamed = {name: column for column, name in chosen.items() if name != column}
    dataset = dataset.select_columns(list(chosen.values())).rename_columns(renamed)
    features = dataset.features.copy()
    if features.get("label") == Value("string"):
        dataset = dataset.class_encode_column("label")
        features = dataset.features.copy()
    kind = dataset.data.column("features").type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return dataset
    column = dataset.with_format("arrow")[:]["features"]
    ends = pc.min_max(pc.list_value_length(column)).as_py()
    if ends["min"] != ends["max"]:
        raise ValueError(
            f"features: expected rows of one length, got {ends['min']} to {ends['max']} values"
        )
    features["features"] = Rows(features["features"].feature, length=ends["max"])
    return dataset.cast(features)


def _chosen(there: Mapping[str, str], where: str) -> dict[str, str]:
    """Return which of the names that are there is which column."""
    chosen: dict[str, str] = {}
    for column, names in _COLUMNS.items():
        fitting = [name for name in names if name in there]
        if column == "features" and not fitting and len(there) == 1:
            fitting = list(there)
        if len(fitting) > 1 or (column == "features" and not fitting):
            listed = ", ".join(f"{name} {there[name]}" for name in list(there)[:_SHOWN])
            raise ValueError(
                f"source: expected one of {', '.join(names)} in {where}, found {listed or 'none'}; "
                "give the arrays themselves to FeatureSet.from_tensors"
            )
        if fitting:
            chosen[column] = fitting[0]
    unused = [name for name in there if name not in (*chosen.values(), _CLASSES)]
    if unused:
        logger.info("%s: %s not read as features, labels or ids", where, ", ".join(unused))
    return chosen


def _numbers(labels: Any, classes: list[str] | None, count: int) -> tuple[Tensor, list[str] | None]:
    """Return labels (N,) as numbers, and the names of their classes."""
    listed = labels if isinstance(labels, Tensor) and labels.ndim else as_list(labels, "labels")
    if len(listed) and isinstance(listed[0], str):
        classes = sorted(set(listed)) if classes is None else classes
        number = {name: i for i, name in enumerate(classes)}
        unknown = sorted(set(listed) - set(number))
        if unknown:
            raise ValueError(f"labels: expected names of the classes, got {unknown[0]!r}")
        listed = [number[name] for name in listed]
    numbers = as_labels(listed).cpu()
    _require_one_each(numbers.shape, "labels", count)
    if count and int(numbers.min()) < -1:
        raise ValueError(f"labels: expected -1 (none) or a class, got {int(numbers.min())}")
    return numbers.long(), classes


def _require_one_each(given: Any, name: str, count: int) -> None:
    if given not in (count, (count,)):
        got = given if isinstance(given, int) else tuple(given)
        raise ValueError(f"{name}: expected {count}, one for each row of x, got {got}")


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if hasattr(value, "shape") else type(value).__name__


def _read_npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


_READERS: dict[str, Any] = {
    ".npy": lambda path: np.load(path, mmap_mode="r", allow_pickle=False),
    ".npz": _read_npz,
    ".pt": lambda path: torch.load(path, map_location="cpu", weights_only=True, mmap=True),
    ".safetensors": load_file,
    ".parquet": lambda path: Dataset.from_parquet(str(path)),
}
_UNREADABLE = (
    DatasetGenerationError,
    EOFError,
    OSError,
    RuntimeError,
    SafetensorError,
    ValueError,
    pickle.UnpicklingError,
)

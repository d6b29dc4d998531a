"""Find the images of a feature set: where its user says, or where its record says."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from monoloss_plugin._places import kind_of, local_path
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.features.files import OPEN_IMAGES_SPLITS
from monoloss_plugin.features.sources import HUB_NAMES, OPEN_IMAGES, Source, open_source
from monoloss_plugin.gallery.matching import match_by_id

logger = logging.getLogger(__name__)

DIGITS = "scikit-learn's copy of the UCI handwritten digits"
"""What the record of the bundled digits says."""

_ERRORS = (ConnectionError, FileNotFoundError, TypeError, ValueError)
"""What ``open_source`` raises."""
_ABOVE = 3
"""How many folders above the features are searched for the folder of the images."""


def open_place(place: Any, record: dict[str, Any]) -> Source:
    """Open images where the user says they are, with the split and columns of a record.

    Args:
        place: as :func:`~monoloss_plugin.features.open_source` takes it, or a ``DatasetDict``.
        record: the source in the record of the features; may be empty.

    Raises:
        TypeError, ValueError, FileNotFoundError, ConnectionError: as ``open_source``, but the
            errors speak of ``images``.
    """
    split = _split_of(record)
    if isinstance(place, (DatasetDict, IterableDatasetDict)):
        if split not in place:
            raise ValueError(
                f"images: a dataset with the splits {', '.join(place)}, and the features say "
                f"{split!r}; pass one of its splits"
            )
        place = place[split]
    if isinstance(place, (Dataset, IterableDataset)):
        known = set(place.column_names or ())
        return _open(place, {n: c for n, c in _columns(record).items() if c in known})
    if not isinstance(place, (str, os.PathLike)):
        raise TypeError(
            "images: expected a folder, the name of a Hub dataset, a dataset, a list of images or "
            f"an array, got {kind_of(place)}"
        )
    if isinstance(place, str) and place.startswith(OPEN_IMAGES):
        return _open(place, {"split": split if split in OPEN_IMAGES_SPLITS else None})
    folder = local_path(place)
    if folder is None:
        same = record.get("kind") == "hub" and record.get("name") == HUB_NAMES.get(
            str(place), place
        )
        return _open(place, _hub_options(record) if same else {"split": split})
    if record.get("kind") == "open-images":
        return open_place(f"{OPEN_IMAGES}{folder}", record)
    if (folder / "dataset_dict.json").exists():
        return _open(folder, {"split": split, **_columns(record)})
    if (folder / "state.json").exists():
        return _open(folder, _columns(record))
    # The folder itself may have been extracted, or the one above it with a split.
    inside = [name for name in (split, record.get("name")) if _is_folder(folder, name)]
    return _open(folder, {"split": inside[0] if inside else None})


def find_source(features: FeatureSet) -> tuple[Source, Sequence[int]]:
    """Return the images that the record of a feature set tells of, and their numbers (N,).

    Raises:
        ValueError: the record does not tell enough.
        FileNotFoundError: the images are not where they may be.
    """
    record = features.record.source
    kind, name = record.get("kind"), record.get("name")
    if kind == "hub" and _is_on_hub(name):
        logger.info(
            "opening the images of the features, the Hub dataset %s; it is downloaded if it is not "
            "in the cache",
            name,
        )
        source = _open(name, _hub_options(record))
        return source, match_by_id(source, features)
    if not record:
        raise ValueError(
            "images: the features do not say which images they come from; pass the images, as a "
            "folder, the name of a Hub dataset, or a list"
        )
    tried = list(_candidates(features, str(name))) if kind in ("folder", "dataset") else []
    refused = ""
    for folder in tried:
        try:
            source = open_place(folder, record)
            return source, match_by_id(source, features)
        except (ValueError, OSError) as error:
            refused = f"; {folder} does not hold them ({str(error).removeprefix('images: ')})"
    told = f"{kind} {name!r}" + (f", split {_split_of(record)!r}" if _split_of(record) else "")
    wanted = f'"{OPEN_IMAGES}FOLDER"' if kind == "open-images" else "a folder or a dataset"
    raise FileNotFoundError(
        f"images: the features come from {told}, which is not in the current folder and not beside "
        f"the features{refused}; pass the images, such as {wanted}"
    )


def _candidates(features: FeatureSet, name: str) -> Iterator[Path]:
    """Yield folders that may hold the images: those of a name, here and above the features."""
    near = [Path.cwd()]
    for file in features.dataset.cache_files[:1]:
        near += Path(file["filename"]).resolve().parents[: _ABOVE + 1]
    for folder in dict.fromkeys(near):
        if folder.name == name:
            yield folder
        if _is_folder(folder, name):
            yield folder / name


def _is_folder(folder: Path, name: Any) -> bool:
    """Return whether a name from a record is that of a folder inside another."""
    plain = isinstance(name, str) and name not in ("", ".", "..") and os.path.basename(name) == name
    return plain and "\0" not in name and (folder / name).is_dir()


def _is_on_hub(name: Any) -> bool:
    """Return whether a name from a record is one on the Hub, and not a place on this machine."""
    plain = isinstance(name, str) and name != "" and not name.startswith(OPEN_IMAGES)
    return plain and local_path(name) is None


def _hub_options(record: dict[str, Any]) -> dict[str, Any]:
    options = {name: record.get(name) for name in ("config", "revision")}
    return {"split": _split_of(record), **options, **_columns(record)}


def _columns(record: dict[str, Any]) -> dict[str, str]:
    """Return the columns of image and id that the features were extracted from."""
    if record.get("kind") not in ("hub", "dataset"):
        return {}
    return {name: record[name] for name in ("image", "image_id") if record.get(name)}


def _split_of(record: dict[str, Any]) -> str | None:
    split = record.get("split")
    return None if split == "None" else split  # what str() makes of a dataset without a split


def _open(place: Any, options: dict[str, Any]) -> Source:
    try:
        return open_source(place, **options)
    except _ERRORS as error:
        text = str(error)
        if text.startswith("split: "):
            text += "; or pass open_source(..., split=...)"
        kind = next(kind for kind in _ERRORS if isinstance(error, kind))
        raise kind(f"images: {text.removeprefix('source: ')}") from error

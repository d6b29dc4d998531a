"""Image files in folders, as a dataset of their paths."""

from __future__ import annotations

import csv
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, Image, Value

logger = logging.getLogger(__name__)

_SUFFIXES = {".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm"}
_SUFFIXES |= {".tif", ".tiff", ".webp"}
"""Files of these names are images; others in a folder are left alone."""
OPEN_IMAGES_SPLITS = ("train", "validation", "test")
_SPLIT = re.compile(
    r"(train|training|test|testing|val|valid|validation|dev|eval|evaluation|held[-_]?out)[-_]?\d*",
    re.IGNORECASE,
)
"""Folders of these names are splits, not classes."""


def image_folder(folder: Path, split: str | None) -> tuple[Dataset, dict[str, Any]]:
    """Return the images of a folder, with its class folders as labels, and their record.

    Raises:
        ValueError: there are no images, the split does not exist, or the folders are splits.
    """
    root = folder if split is None else folder / split
    if not root.is_dir():
        raise ValueError(f"split: no folder {split!r} in {folder}")
    names = sorted(_image_files(root))
    if not names:
        raise ValueError(f"source: no image files in {root}")
    folders = sorted({_text(name.split("/", 1)[0]) for name in names if "/" in name})
    if folders and all(_SPLIT.fullmatch(name) for name in folders):
        raise ValueError(
            f"source: the folders in {root} are splits, not classes: {', '.join(folders)}. Take "
            f"one at a time: split={folders[0]!r} in Python, --split {folders[0]} as a command"
        )
    classes = folders if all("/" in name for name in names) else None
    if classes is not None and len(classes) == 1:
        logger.warning(
            "every image in %s is in the folder %r, which makes one class; if it is not a class, "
            "take %s itself",
            *(root, classes[0], root / classes[0]),
        )
    record = {"kind": "folder", "name": folder.resolve().name, "split": split}
    return _of_files(root, names, names, classes, record)


def _image_files(root: Path) -> Iterator[str]:
    """Yield the paths of image files under a folder, relative to it."""
    seen = {os.path.realpath(root)}
    for directory, folders, files in os.walk(root, followlinks=True):
        inside = Path(directory).relative_to(root).as_posix()
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(directory, name))
            if real in seen:  # a link that leads in a circle, or to a folder that was read before
                folders.remove(name)
            seen.add(real)
        for name in files:
            if os.path.splitext(name)[1].lower() in _SUFFIXES and not name.startswith("."):
                yield name if inside == "." else f"{inside}/{name}"


def open_images(root: Path, split: str | None) -> tuple[Dataset, dict[str, Any]]:
    """Return the images of a split of Open Images V7, and their record.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no such split, or no image of it.
    """
    if split not in OPEN_IMAGES_SPLITS:
        raise ValueError(f"split: expected one of {', '.join(OPEN_IMAGES_SPLITS)}, got {split!r}")
    if not root.is_dir():
        raise FileNotFoundError(f"source: no such folder: {root}")
    # CVDF's archives unpack to train_0 ... train_f; FiftyOne puts images into train/data.
    folders = [root / split, *sorted(root.glob(f"{split}_?"))]
    files = {
        os.path.splitext(os.path.basename(name))[0]: (folder / name).relative_to(root).as_posix()
        for folder in folders
        if folder.is_dir()
        for name in _image_files(folder)
    }
    ids, listing = sorted(files), None
    if (found := _open_images_listing(root, split)) is not None:
        listing, listed = found
        ids = [image_id for image_id in listed if image_id in files]
        counts = len(ids), len(listed)
        logger.info("Open Images %s: found %d of %d images in %s", split, *counts, listing)
    if not ids:
        raise ValueError(f"source: no images of split {split!r} in {root}")
    record = {"kind": "open-images", "name": "Open Images V7", "split": split, "listing": listing}
    return _of_files(root, [files[image_id] for image_id in ids], ids, None, record)


def _open_images_listing(root: Path, split: str) -> tuple[str, list[str]] | None:
    """Return the name of a CSV file with columns ImageID and Subset, and the ids of a split."""
    places = [root, root / "metadata", root / split, root / split / "metadata"]
    found = [path for place in places for path in sorted(place.glob("*.csv"))]
    for path in sorted(found, key=lambda path: split not in path.name):
        with path.open(newline="") as lines:
            rows = csv.DictReader(lines)
            if {"ImageID", "Subset"} <= set(rows.fieldnames or ()):
                ids = dict.fromkeys(row["ImageID"] for row in rows if row["Subset"] == split)
                return path.name, list(ids)
    return None


def _of_files(
    root: Path,
    names: Sequence[str],
    ids: Sequence[str],
    classes: list[str] | None,
    record: dict[str, Any],
) -> tuple[Dataset, dict[str, Any]]:
    """Return image files as a dataset of their paths, and their record with a checksum of ids."""
    ids = [_text(image_id) for image_id in ids]
    paths = [str(root / name) for name in names]
    # Arrow cannot hold a path that is not UTF-8.
    held = pa.array((path if _text(path) == path else None for path in paths), pa.string())
    nothing = pa.nulls(len(paths), pa.binary())
    columns: dict[str, Any] = {
        "image": pa.StructArray.from_arrays([nothing, held], names=["bytes", "path"]),
        "image_id": pa.array(ids, pa.string()),
    }
    features = {"image": Image(decode=False), "image_id": Value("string")}
    if classes is not None:
        number = {name: i for i, name in enumerate(classes)}
        labels = (number[_text(name.split("/", 1)[0])] for name in names)
        columns["label"] = pa.array(labels, pa.int64())
        features["label"] = ClassLabel(names=classes)
    rows = Dataset(pa.table(columns).cast(Features(features).arrow_schema))
    return rows, {**record, "ids_sha256": hashlib.sha256("\n".join(ids).encode()).hexdigest()}


def _text(name: str) -> str:
    """Return a file's name with escapes for what UTF-8 cannot hold."""
    return name.encode(errors="backslashreplace").decode()

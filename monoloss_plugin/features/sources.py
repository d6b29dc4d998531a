"""Where images come from: a folder, Open Images V7, or a Hugging Face dataset.

Every source is read through ``datasets``: rows of an undecoded image, its label and its id.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from monoloss_plugin._optional import missing_extra
from monoloss_plugin._places import local_hint, local_path
from monoloss_plugin.features.files import image_folder, open_images
from monoloss_plugin.hub.names import require_hub_name
from monoloss_plugin.hub.repository import api

try:
    import numpy as np
    from datasets import (
        ClassLabel,
        Dataset,
        DatasetDict,
        Image,
        IterableDataset,
        IterableDatasetDict,
        Value,
        load_dataset,
        load_from_disk,
    )
    from datasets import config as datasets_config
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    from PIL import Image as PILImage
except ModuleNotFoundError as error:
    raise missing_extra(error, "vision") from error

OPEN_IMAGES = "open-images:"
HUB_NAMES = {
    "imagenet-1k": "ILSVRC/imagenet-1k",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
}
"""Datasets of the paper by short names."""

_SAMPLE, _HEAD = 256, 16
"""Rows of a dataset, and of a stream's beginning, that identify it."""
_TIMEOUT = 10.0
"""Seconds that the Hub has to say whether it has a dataset."""
_LABELS = ("label", "fine_label", "labels")
_IDS = ("image_id", "id", "file_name", "filename")


class Row(NamedTuple):
    """One image, undecoded."""

    image: dict[str, Any]
    """Its bytes or its path, as ``datasets.Image`` decodes them."""
    label: int | None
    image_id: str


@dataclass(frozen=True)
class Source:
    """Images in a fixed order."""

    rows: Dataset | IterableDataset
    image: str
    """Name of the image column."""
    label: str | None
    image_id: str | None
    record: dict[str, Any] = field(default_factory=dict)
    """What the feature set says of where its images come from."""

    @property
    def num_images(self) -> int | None:
        """Number of images, readable or not; None for a stream."""
        return None if isinstance(self.rows, IterableDataset) else len(self.rows)

    @property
    def classes(self) -> list[str] | None:
        """Names of the labels' classes."""
        feature = self.rows.features[self.label] if self.label is not None else None
        return feature.names if isinstance(feature, ClassLabel) else None

    def __getitem__(self, number: int) -> Row:
        if isinstance(self.rows, IterableDataset):
            raise TypeError("a stream has no rows by number")
        return self._row(number, self.rows[number])

    def stream(self, start: int) -> Iterator[tuple[int, Row]]:
        """Yield the rows from a number on, each with its number."""
        if isinstance(self.rows, Dataset):
            raise TypeError("rows by number need no stream")
        for number, row in enumerate(self.rows.skip(start), start):
            yield number, self._row(number, row)

    def _row(self, number: int, row: dict[str, Any]) -> Row:
        image = row[self.image] or {"bytes": None, "path": None}
        label = None if self.label is None else row[self.label]
        named = row[self.image_id] if self.image_id is not None else None
        if named is None:
            # Names of files may repeat where datasets keeps them without their folders.
            file = os.path.basename(image["path"] or "")
            named = f"{number}:{file}" if file else number
        return Row(image, label, str(named))


def open_source(
    source: str | os.PathLike[str] | Dataset | IterableDataset,
    *,
    split: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    image: str | None = None,
    label: str | None = None,
    image_id: str | None = None,
) -> Source:
    """Open a source of images.

    Args:
        source: a folder of images, as a ``Path`` or such as ``"./photos"``, whose subfolders, if
            every image is in one, are the classes; a folder of ``Dataset.save_to_disk``;
            ``open-images:FOLDER`` in Open Images V7's layout; any other string is a name on the
            Hub (``imagenet-1k``, ``cifar10``, ``cifar100`` for short); or a ``datasets`` object.
        split: of the dataset; of a folder, the subfolder of that name.
        config: the configuration of a Hub dataset.
        revision: a commit, tag or branch of a Hub dataset.
        streaming: read a Hub dataset as it comes instead of downloading it first.
        image: the image column; by default the only one of that type.
        label: the label column, of classes or integers (or strings, which become classes); by
            default one named ``label`` or ``fine_label``, or the only one that holds classes.
        image_id: the column of ids; by default ``image_id``, ``id`` or ``file_name``, else the
            images' numbers and file names.

    Raises:
        TypeError: a source of another kind.
        ValueError: no images there, a column or split that is not there, or a string that is no
            name on the Hub.
        FileNotFoundError: no such folder, or no such dataset on the Hub.
        ConnectionError: the Hub cannot be reached, and ``datasets`` has it not in its cache.
        PermissionError: the Hub asks for a token, or for its conditions to be accepted.
    """
    if isinstance(source, (Dataset, IterableDataset)):
        record = {"kind": "dataset", "name": source.info.dataset_name, "split": str(source.split)}
        return _of_dataset(source, record, image, label, image_id)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            "source: expected a folder, the name of a Hub dataset, a datasets.Dataset or an "
            f"IterableDataset, got {type(source).__name__}"
        )
    if isinstance(source, str) and source.startswith(OPEN_IMAGES):
        root = Path(source.removeprefix(OPEN_IMAGES)).expanduser()
        return _of_files(*open_images(root, split))
    folder = local_path(source)
    if folder is None:
        name = HUB_NAMES.get(str(source), str(source))
        rows = _one_split(_from_hub(name, config, split, revision, streaming), split)
        record = {
            "kind": "hub",
            "name": name,
            "config": rows.info.config_name,
            "split": split or str(rows.split),
            "revision": revision,
        }
        return _of_dataset(rows, record, image, label, image_id)
    if not folder.is_dir():
        raise FileNotFoundError(f"source: no such folder: {folder}")
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        rows = _one_split(load_from_disk(str(folder)), split)
        record = {"kind": "dataset", "name": folder.name, "split": split}
        return _of_dataset(rows, record, image, label, image_id)
    return _of_files(*image_folder(folder, split))


def _from_hub(
    name: str, config: str | None, split: str | None, revision: str | None, streaming: bool
) -> Any:
    """Load a dataset of the Hub, or, where the Hub cannot be reached, of the cache of datasets."""
    hint = local_hint(name) or f"; for a folder, write './{name}'"

    def load() -> Any:
        return load_dataset(name, config, split=split, revision=revision, streaming=streaming)

    try:
        require_hub_name(name, "source")
    except ValueError:
        raise ValueError(
            "source: expected a folder, such as './photos', or the name of a Hub dataset, such as "
            f"'user/name', got {name!r}{hint}"
        ) from None
    try:  # first, since load_dataset asks a Hub that cannot be reached again and again
        api(None).repo_info(name, repo_type="dataset", revision=revision, timeout=_TIMEOUT)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        error.append_to_message(hint)
        raise
    except Exception:  # of several HTTP libraries, as the version of the Hub's client uses them
        online = datasets_config.HF_HUB_OFFLINE
        datasets_config.HF_HUB_OFFLINE = True
        try:
            return load()
        except (OSError, ValueError):
            pass
        finally:
            datasets_config.HF_HUB_OFFLINE = online
        raise
    return load()


def decode(row: Row, mode: str) -> PILImage.Image:
    """Return an image as an encoder's preprocessing takes it, upright by its EXIF.

    Raises:
        Exception: whatever a damaged or missing file makes the decoder raise.
    """
    path = row.image["path"]
    if row.image["bytes"] is None:
        if path is None:
            raise ValueError("no image here, or a file whose name is not UTF-8")
        if os.path.exists(path) and not os.path.isfile(path):  # reading it might never end
            raise ValueError("not a regular file, but a pipe, a device, a socket or a folder")
    image: PILImage.Image = Image().decode_example(row.image)
    if image.mode.startswith("I"):  # 16 bits, which PIL would cut off at 255
        if image.getextrema()[1] > 65535:  # type: ignore[operator]
            raise ValueError(f"grey values above 65535 in a {image.mode} image")
        image = PILImage.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point grey values, whose range is not known")
    return image.convert(mode)


def _one_split(rows: Any, split: str | None) -> Any:
    if not isinstance(rows, (DatasetDict, IterableDatasetDict)):
        return rows
    if split is None and len(rows) == 1:
        return next(iter(rows.values()))
    if split not in rows:
        raise ValueError(f"split: expected one of {', '.join(rows)}, got {split!r}")
    return rows[split]


def _of_dataset(
    rows: Dataset | IterableDataset,
    record: dict[str, Any],
    image: str | None,
    label: str | None,
    image_id: str | None,
) -> Source:
    features = rows.features
    if features is None:
        raise ValueError("source: this stream does not say its columns; give it features")
    for argument, column in (("image", image), ("label", label), ("image_id", image_id)):
        if column is not None and column not in features:
            raise ValueError(
                f"{argument}: no column {column!r}; there are {', '.join(sorted(features))}"
            )
    if image is None:
        images = [name for name, kind in features.items() if isinstance(kind, Image)]
        if len(images) != 1:
            raise ValueError(
                f"image: expected one image column to choose by itself, found {images or 'none'} "
                f"among {', '.join(sorted(features))}"
            )
        (image,) = images
    if label is None:
        classes = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
        named = [name for name in _LABELS if name in features and _are_labels(features[name])]
        label = named[0] if named else classes[0] if len(classes) == 1 else None
    if image_id is None:
        image_id = next((name for name in _IDS if name in features), None)
    columns = [image, *(name for name in (label, image_id) if name is not None)]
    rows = rows.with_format(None).select_columns(list(dict.fromkeys(columns)))
    rows = rows.cast_column(image, Image(decode=False))
    if label is not None and not _are_labels(features[label]):
        if not isinstance(rows, Dataset) or features[label] != Value("string"):
            raise ValueError(
                f"label: expected classes or integers in column {label!r}, got {features[label]}"
            )
        rows = rows.class_encode_column(label)
    record = {**record, "image": image, "label": label, "image_id": image_id}
    if isinstance(rows, Dataset):
        record["images"] = len(rows)
        if len(rows) == 0:
            raise ValueError("source: expected at least one image, got an empty dataset")
    source = Source(rows, image, label, image_id, record)
    record["sample_sha256"] = _sample_sha256(source)
    return source


def _are_labels(kind: Any) -> bool:
    return isinstance(kind, ClassLabel) or (
        isinstance(kind, Value) and kind.dtype.startswith(("int", "uint"))
    )


def _sample_sha256(source: Source) -> str:
    """Return a checksum of some rows: other images, or the same in another order, have another."""
    if isinstance(source.rows, Dataset):
        count = len(source.rows)
        numbers = sorted({i * (count - 1) // _SAMPLE for i in range(_SAMPLE + 1)})
        rows: Iterator[Row] = (source[number] for number in numbers)
    else:
        rows = (row for _, row in itertools.islice(source.stream(0), _HEAD))
    digest = hashlib.sha256()
    for row in rows:
        content = row.image["bytes"] or os.path.basename(row.image["path"] or "").encode()
        digest.update(hashlib.sha256(content).digest())
        digest.update(f"{row.label} {row.image_id}".encode())
    return digest.hexdigest()


def _of_files(rows: Dataset, record: dict[str, Any]) -> Source:
    label = "label" if "label" in rows.features else None
    return Source(rows, "image", label, "image_id", record)

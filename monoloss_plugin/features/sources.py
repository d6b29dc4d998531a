"""Where images come from: a folder, Open Images V7, or a Hugging Face dataset.

Every source is read through ``datasets``, as rows of an undecoded image, its label and its id.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

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
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from monoloss_plugin._places import as_path, kind_of, local_hint, local_path
from monoloss_plugin.features.files import image_folder, open_images

OPEN_IMAGES = "open-images:"
HUB_NAMES = {
    "imagenet-1k": "ILSVRC/imagenet-1k",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
}
"""Short names of the paper's datasets."""

_SAMPLE, _HEAD = 256, 16
"""How many rows of a dataset, and of the beginning of a stream, identify it."""
_TIMEOUT = 10.0
"""Seconds that the Hub has to say whether it has a dataset."""
_LABELS = ("label", "fine_label", "labels")
_IDS = ("image_id", "id", "file_name", "filename")


class Row(NamedTuple):
    """One image, not decoded."""

    number: int
    """Its row in the source."""
    image: dict[str, Any]
    """Its bytes or its path, as ``datasets.Image`` decodes them."""
    label: int | None
    image_id: str


@dataclass(frozen=True)
class Source:
    """Images in a fixed order, as :func:`open_source` opens them."""

    rows: Dataset | IterableDataset
    image: str
    """Name of the image column."""
    label: str | None
    """Name of the label column; None if there is none."""
    image_id: str | None
    """Name of the id column; None if there is none."""
    record: dict[str, Any] = field(default_factory=dict)
    """What the feature set says about its images: kind, name, split, checksums."""

    @property
    def num_images(self) -> int | None:
        """Number of images, readable or not; None for a stream."""
        return None if isinstance(self.rows, IterableDataset) else len(self.rows)

    @property
    def classes(self) -> list[str] | None:
        """Names of the labels' classes; None where labels have no names."""
        feature = self.rows.features[self.label] if self.label is not None else None
        return feature.names if isinstance(feature, ClassLabel) else None

    def __getitem__(self, number: int) -> Row:
        if isinstance(self.rows, IterableDataset):
            raise TypeError("a stream has no rows by number; take them from stream()")
        return self._row(number, self.rows[number])

    def ids(self) -> list[str]:
        """Return the id of every image, without reading the images.

        Raises:
            TypeError: the source is a stream.
        """
        if isinstance(self.rows, IterableDataset):
            raise TypeError("a stream does not tell its ids; take them from the rows of stream()")
        names = self.rows.flatten()[f"{self.image}.path"][:]
        given = [None] * len(names) if self.image_id is None else self.rows[self.image_id][:]
        return list(map(_image_id, range(len(names)), given, names))

    def stream(self, start: int = 0) -> Iterator[Row]:
        """Yield the rows from a number on."""
        if isinstance(self.rows, Dataset):
            return map(self.__getitem__, range(start, len(self.rows)))
        return itertools.starmap(self._row, enumerate(self.rows.skip(start), start))

    def _row(self, number: int, row: dict[str, Any]) -> Row:
        image = row[self.image] or {"bytes": None, "path": None}
        label = None if self.label is None else row[self.label]
        image_id = row[self.image_id] if self.image_id is not None else None
        return Row(number, image, label, _image_id(number, image_id, image["path"]))


def _image_id(number: int, given: Any, path: str | None) -> str:
    """Return the id of an image: what the id column says, or else its row and file."""
    if given is None:
        # File names may repeat, since datasets keeps them without their folders.
        file = os.path.basename(path or "")
        given = f"{number}:{file}" if file else number
    return str(given)


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
        source: one of these:

            - a folder of images, as a ``Path`` or a string such as ``"./photos"``. If every image
              is in a subfolder, the subfolders are the classes;
            - a folder of ``Dataset.save_to_disk``;
            - ``open-images:FOLDER``, a folder in Open Images V7's layout;
            - any other string, the name of a dataset on the Hub, or ``imagenet-1k``, ``cifar10`` or
              ``cifar100`` for short;
            - a ``datasets`` object.
        split: of the dataset; of a folder, the subfolder of that name.
        config: the configuration of a Hub dataset.
        revision: a commit, tag or branch of a Hub dataset.
        streaming: read a Hub dataset as it arrives, instead of downloading it first.
        image: the image column; by default the only one.
        label: the label column, with classes, integers, or strings (which become classes). By
            default the one named ``label`` or ``fine_label``, or else the only one with classes.
        image_id: the id column. By default the one named ``image_id``, ``id`` or ``file_name``; if
            there is none, ids are made of row numbers and file names.

    Raises:
        TypeError: a source of another kind.
        ValueError: there are no images, the column or split does not exist, or the string cannot
            be the name of a Hub dataset.
        FileNotFoundError: there is no such folder, or no such dataset on the Hub.
        ConnectionError: the Hub cannot be reached, and the dataset is not in the cache.
    """
    if isinstance(source, (Dataset, IterableDataset)):
        rows, name = source, source.info.dataset_name
        record = {"kind": "dataset", "name": name, "split": str(source.split)}
    elif not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            "source: expected a folder, the name of a Hub dataset, a datasets.Dataset or an "
            f"IterableDataset, got {kind_of(source)}"
        )
    elif isinstance(source, str) and source.startswith(OPEN_IMAGES):
        rows, record = open_images(as_path(source.removeprefix(OPEN_IMAGES), "source"), split)
    elif (folder := local_path(source)) is None:
        name = HUB_NAMES.get(str(source), str(source))
        options = {"name": config, "split": split, "revision": revision, "streaming": streaming}
        rows = _one_split(_from_hub(name, options), split)
        record = {
            "kind": "hub",
            "name": name,
            "config": rows.info.config_name,
            "split": split or str(rows.split),
            "revision": revision,
        }
    elif not folder.is_dir():
        raise FileNotFoundError(f"source: no such folder: {folder}")
    elif (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        rows = _one_split(load_from_disk(str(folder)), split)
        record = {"kind": "dataset", "name": folder.name, "split": split}
    else:
        rows, record = image_folder(folder, split)
    return _with_columns(rows, record, image, label, image_id)


def _from_hub(name: str, options: dict[str, Any]) -> Any:
    """Load a dataset from the Hub, or from the cache of ``datasets`` if the Hub does not answer."""
    hint = local_hint(name) or f"; for a folder, write './{name}'"
    unreachable = ""
    try:  # load_dataset would ask a Hub that does not answer again and again
        HfApi().repo_info(name, repo_type="dataset", revision=options["revision"], timeout=_TIMEOUT)
    except HFValidationError:
        raise ValueError(
            "source: expected a folder, such as './photos', or the name of a Hub dataset, such as "
            f"'user/name', got {name!r}{hint}"
        ) from None
    except (GatedRepoError, RevisionNotFoundError):
        raise
    except HfHubHTTPError as error:
        if isinstance(error, RepositoryNotFoundError) or error.response.status_code == 404:
            raise FileNotFoundError(
                f"source: the Hub has no dataset {name}, or shows it only with a token; log in "
                f"with `hf auth login`, or set HF_TOKEN{hint}"
            ) from error
        if error.response.status_code < 500:
            raise
        unreachable = f"it answered {error.response.status_code}"
    except Exception as error:  # of the HTTP client that huggingface_hub uses
        unreachable = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
    if not unreachable:
        return load_dataset(name, **options)
    online = datasets_config.HF_HUB_OFFLINE
    datasets_config.HF_HUB_OFFLINE = True
    try:
        return load_dataset(name, **options)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"source: the Hub could not be reached ({unreachable}), and {name} is not in the "
            f"cache of datasets{hint}"
        ) from error
    finally:
        datasets_config.HF_HUB_OFFLINE = online


def _one_split(rows: Any, split: str | None) -> Any:
    if not isinstance(rows, (DatasetDict, IterableDatasetDict)):
        return rows
    if split is None and len(rows) == 1:
        return next(iter(rows.values()))
    if split not in rows:
        raise ValueError(f"split: expected one of {', '.join(rows)}, got {split!r}")
    return rows[split]


def _with_columns(
    rows: Dataset | IterableDataset,
    record: dict[str, Any],
    image: str | None,
    label: str | None,
    image_id: str | None,
) -> Source:
    """Find the columns that are not given, and describe the images in the record."""
    features = rows.features
    if features is None:
        raise ValueError("source: this stream does not name its columns; give it features")
    found = ", ".join(sorted(features))
    for argument, column in (("image", image), ("label", label), ("image_id", image_id)):
        if column is not None and column not in features:
            raise ValueError(f"{argument}: no column {column!r}; there are {found}")
    if image is None:
        images = [name for name, kind in features.items() if isinstance(kind, Image)]
        if len(images) != 1:
            raise ValueError(
                f"image: expected one image column, found {images or 'none'} among {found}"
            )
        (image,) = images
    if label is None:
        classes = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
        named = [name for name in _LABELS if name in features and _are_labels(features[name])]
        label = named[0] if named else classes[0] if len(classes) == 1 else None
    if image_id is None:
        image_id = next((name for name in _IDS if name in features), None)
    columns = sorted({name for name in (image, label, image_id) if name is not None})
    rows = rows.with_format(None).select_columns(columns)
    rows = rows.cast_column(image, Image(decode=False))
    if label is not None and not _are_labels(features[label]):
        if not isinstance(rows, Dataset) or features[label] != Value("string"):
            raise ValueError(
                f"label: expected classes or integers in column {label!r}, got {features[label]}"
            )
        rows = rows.class_encode_column(label)
    source = Source(rows, image, label, image_id)
    if source.num_images == 0:
        raise ValueError("source: expected at least one image, got an empty dataset")
    names = {"image": image, "label": label, "image_id": image_id, "images": source.num_images}
    return replace(source, record={**record, **names, "sample_sha256": _sample_sha256(source)})


def _are_labels(kind: Any) -> bool:
    return isinstance(kind, ClassLabel) or (
        isinstance(kind, Value) and kind.dtype.startswith(("int", "uint"))
    )


def _sample_sha256(source: Source) -> str:
    """Return a checksum of some rows, which differs for other images and for another order."""
    rows: Iterator[Row]
    if source.num_images is None:
        rows = itertools.islice(source.stream(), _HEAD)
    else:
        last = source.num_images - 1
        rows = map(source.__getitem__, sorted({i * last // _SAMPLE for i in range(_SAMPLE + 1)}))
    digest = hashlib.sha256()
    for row in rows:
        content = row.image["bytes"] or os.path.basename(row.image["path"] or "").encode()
        digest.update(hashlib.sha256(content).digest())
        digest.update(f"{row.label} {row.image_id}".encode())
    return digest.hexdigest()

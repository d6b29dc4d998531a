"""Publish a feature dataset."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from monoloss_plugin._checks import require_text, visible
from monoloss_plugin._places import as_path, kind_of
from monoloss_plugin.features import FeatureRecord, FeatureSet
from monoloss_plugin.hub.cards import images_on_hub, parse_card
from monoloss_plugin.hub.dataset_card import dataset_card
from monoloss_plugin.hub.features import DEFAULT, Split, read_records, split_of
from monoloss_plugin.hub.names import (
    require_config,
    require_hub_name,
    require_split,
    require_texts,
)
from monoloss_plugin.hub.repository import Repository, repository_in
from monoloss_plugin.hub.upload import Destination, Publication, upload

_SHARD = 500 << 20  # bytes
_COLUMNS = ("features", "label", "image_id")
"""The columns that are published. Other columns may hold anything."""

_DATA_FILES = (".arrow", ".csv", ".json", ".jsonl", ".parquet", ".txt", ".zip", ".tar")


def publish_features(
    features: FeatureSet | Dataset | str | os.PathLike[str],
    repo_id: str,
    *,
    split: str | None = None,
    config: str = DEFAULT,
    license: str | None = None,
    source_dataset: str | None = None,
    tags: Sequence[str] = (),
    private: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    token: str | bool | None = None,
) -> Publication:
    """Publish features to a dataset repository of the Hub, beside the splits that are there.

    :func:`load_features` loads them as a ``FeatureSet``, and ``datasets.load_dataset(repo_id,
    split=...)`` as a dataset. This function first writes Parquet files to a temporary folder, which
    takes as much disk as the features. All files arrive in one commit. After an interruption, run
    it again; it sends only what is missing.

    Args:
        features: a feature set, a ``datasets.Dataset`` with a column ``features``, or the folder of
            one.
        repo_id: ``user/name``.
        split: the split's name; by default that of the source, or else ``"train"``.
        config: a name that tells the features of several encoders in one repository apart.
        license: for the card, such as ``"cc-by-4.0"``. The images' licence may bind you.
        source_dataset: the images' repository on the Hub, for the card; by default from the
            features' record.
        tags: more tags for the card.
        private: make a new repository private.
        overwrite: replace a split of the same name.
        dry_run: upload nothing, and return what would be uploaded.
        token: by default the one you are logged in with.

    Returns:
        The files with their sizes, and the commit.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a name cannot be one; there are no features; or the repository holds other data.
        FileExistsError: the repository has other features under this name.
        FileNotFoundError: there is no such folder, or no feature dataset in it.
        PermissionError, Exception: as :func:`publish_sae`.
    """
    to = Destination(repo_id, "dataset", private, overwrite, dry_run, token)
    tags = require_texts(tags, "tags")
    texts = {"split": split, "license": license, "source_dataset": source_dataset}
    for argument, given in texts.items():
        require_text(given, argument)
    require_config(config)
    features = _open(features)
    if not len(features):
        raise ValueError("features: expected at least one row, got none")
    name = Split(config, require_split(split or features.record.source.get("split") or "train"))
    source = source_dataset or images_on_hub(features.record.source)
    metadata = {
        "license": license,
        "tags": tags,
        "source_datasets": [require_hub_name(source, "source_dataset")] if source else [],
    }
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_features(features, root, name)

        def write_card(existing: str, there: Repository | None) -> str:
            records = {}
            if there is not None:
                _require_room(there, existing)
                records = read_records(there)
            records |= read_records(repository_in(root, repo_id))
            _require_same_columns(records, name)
            return dataset_card(existing, repo_id, records, metadata)

        def owns(path: str) -> bool:
            return path == name.record_path or split_of(path)[0] == name

        return upload(root, to, name.split, owns=owns, write_card=write_card)


def write_features(features: FeatureSet, root: Path, split: Split) -> None:
    """Write a split's Parquet files and record below ``root``. Same features give same files."""
    columns = [name for name in _COLUMNS if name in features.dataset.column_names]
    rows = features.dataset.select_columns(columns)
    size = len(features) * features.width * features.dtype.itemsize
    count = max(1, -(-size // _SHARD))
    (root / split.record_path).parent.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        part = rows.shard(num_shards=count, index=number, contiguous=True)
        part.to_parquet(str(root / split.shard_path(number, count)))
    record = {
        **features.record.to_dict(),
        "rows": len(features),
        "width": features.width,
        "dtype": str(features.dtype).removeprefix("torch."),
        "columns": {name: str(rows.features[name]) for name in columns},
    }
    content = json.dumps(record, indent=1, sort_keys=True)
    (root / split.record_path).write_text(f"{content}\n", encoding="utf-8")


def _open(features: FeatureSet | Dataset | str | os.PathLike[str]) -> FeatureSet:
    if isinstance(features, FeatureSet):
        return features
    if isinstance(features, (str, os.PathLike)):
        return FeatureSet.open(as_path(features, "features"))
    if not isinstance(features, Dataset):
        raise TypeError(f"features: expected a feature set, got {kind_of(features)}")
    return FeatureSet(features)


def _require_room(there: Repository, card: str) -> None:
    """Raise ValueError where new files would keep ``datasets`` from reading the old ones."""
    splits = {split_of(path)[0] for path in there.sizes} - {None}
    records = {split.record_path for split in splits if split}
    others = [
        path
        for path in there.sizes
        if path.endswith(_DATA_FILES) and path not in records and not split_of(path)[0]
    ]
    foreign = [path for path in others if not path.endswith(".parquet")]
    if foreign:
        raise ValueError(
            f"repo_id: {there.name} holds {visible(foreign[0])}, and datasets reads files of one "
            "kind from a repository; choose another repository"
        )
    if others and "configs" not in parse_card(card).data:
        raise ValueError(
            f"repo_id: {there.name} holds {visible(others[0])}, which datasets finds as long as "
            "the card names no files; name it in the card's configs first, or choose another "
            "repository"
        )


def _require_same_columns(records: dict[Split, FeatureRecord], new: Split) -> None:
    """Raise ValueError where splits of one configuration would have different columns."""
    columns = records[new].columns
    for split, record in records.items():
        if split.config == new.config and (record.columns or columns) != columns:
            raise ValueError(
                f"features: their columns are not those of {split.split}, which is in the same "
                f"configuration ({columns} and {record.columns}); choose another config"
            )

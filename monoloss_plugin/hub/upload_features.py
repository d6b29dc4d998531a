"""Publish a feature dataset."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from monoloss_plugin._checks import as_list, require_text, visible
from monoloss_plugin._places import as_path, kind_of
from monoloss_plugin.features import FeatureRecord, FeatureSet
from monoloss_plugin.hub.cards import (
    escape,
    hub_id,
    merge_card,
    parse_card,
    settings_table,
    table,
)
from monoloss_plugin.hub.features import DEFAULT, Split, read_records, split_of
from monoloss_plugin.hub.names import require_config, require_hub_name, require_split
from monoloss_plugin.hub.repository import Repository, repository_in
from monoloss_plugin.hub.upload import Destination, Publication, upload

_SHARD = 500 << 20  # bytes
_COLUMNS = ("features", "label", "image_id")
"""The columns that are published. Other columns may hold anything."""

_TAGS = ["image-features", "embeddings", "sparse-autoencoder", "monoloss"]

_ABOUT = """\
Features of images from a frozen encoder, one vector per image, for training and measuring sparse
autoencoders. Published with monoloss_plugin; any reader of Parquet can read them.

## Splits"""

_COLUMNS_AND_LICENCE = """\
## Columns

`features`: the vectors, not normalised. `label`: if the images have labels. `image_id`.

## Licence

The images and the encoder have licences of their own. The licence in this card's metadata, if there
is one, is the publisher's word for the features alone.

## Load
"""

_LOAD = """\
```python
from datasets import load_dataset

dataset = load_dataset("{repo_id}"{config}, split="{split}")
```

For training and measuring SAEs:

```python
from monoloss_plugin import load_features

features = load_features("{repo_id}", "{split}"{config_argument})
```"""


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

    Raises:
        FileExistsError: the repository has other features under this name.
        FileNotFoundError: there is no such folder, or no feature dataset in it.
        TypeError, ValueError: an argument is wrong, or the repository holds other data.
        PermissionError, Exception: as :func:`publish_sae`.
    """
    to = Destination(repo_id, "dataset", private, overwrite, dry_run, token)
    tags = as_list(tags, "tags")
    require_text(split, "split")
    require_text(license, "license")
    require_text(source_dataset, "source_dataset")
    require_config(config)
    features = _open(features)
    if not len(features):
        raise ValueError("features: expected at least one row, got none")
    name = Split(config, require_split(split or features.record.source.get("split") or "train"))
    source = source_dataset or hub_id(features.record.source)
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
            return _card(existing, repo_id, records, metadata)

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
    if foreign or (others and "configs" not in parse_card(card).data):
        raise ValueError(
            f"repo_id: {there.name} holds {visible((foreign or others)[0])}, which datasets could "
            "not read any more beside these files; choose another repository, or, if all its files "
            "are Parquet, name them in the card's configs first"
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


def _card(
    existing: str,
    repo_id: str,
    records: Mapping[Split, FeatureRecord],
    metadata: Mapping[str, Any],
) -> str:
    """Return the card of a repository that will hold these splits."""
    splits = sorted(records)
    first = splits[0]
    rows = [_row(split, records[split]) for split in splits]
    configs: dict[str, list[Split]] = {}
    for split in splits:
        configs.setdefault(split.config, []).append(split)
    parts = [
        _ABOUT,
        table(("configuration", "split", "size", "type", "encoder", "images"), rows),
        *(_encoder(config, records[of_config[0]]) for config, of_config in configs.items()),
        _COLUMNS_AND_LICENCE,
        _LOAD.format(
            repo_id=repo_id,
            split=first.split,
            config="" if first.config == DEFAULT else f', "{first.config}"',
            config_argument="" if first.config == DEFAULT else f', config="{first.config}"',
        ),
    ]
    ours = {
        **metadata,
        "tags": [*_TAGS, *metadata["tags"]],
        "task_categories": ["image-feature-extraction"],
        "configs": [
            {
                "config_name": config,
                "data_files": [{"split": one.split, "path": one.pattern} for one in of_config],
            }
            for config, of_config in configs.items()
        ],
    }
    if existing:
        card = parse_card(existing)
        # push_to_hub writes the splits' sizes there, and load_dataset fails when they are old.
        card.data.pop("dataset_info", None)
        existing = str(card.content)
    return merge_card(existing, repo_id, parts, ours)


def _row(split: Split, record: FeatureRecord) -> list[str]:
    return [
        f"`{split.config}`",
        f"`{split.split}`",
        escape(f"{record.rows or '?'} x {record.width or '?'}"),
        escape(record.dtype or ""),
        escape(record.encoder.get("name", "not said")),
        escape(record.source.get("name", "not said")),
    ]


def _encoder(config: str, record: FeatureRecord) -> str:
    parts = [f"## Encoder of `{config}`", settings_table(record.encoder)]
    preprocessing = record.encoder.get("preprocessing")
    if isinstance(preprocessing, Mapping) and preprocessing:
        steps = {name: str(step) for name, step in preprocessing.items() if step is not None}
        parts += ["Preprocessing, in the words of its library:", settings_table(steps)]
    return "\n\n".join(parts)

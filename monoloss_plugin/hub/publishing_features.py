"""Publish a feature dataset."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from monoloss_plugin._checks import require_text, visible
from monoloss_plugin._optional import missing_extra
from monoloss_plugin._places import as_path, kind_of
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.hub.cards import images_on_hub, opened
from monoloss_plugin.hub.dataset_card import PublishedSplit, dataset_card
from monoloss_plugin.hub.feature_repository import (
    DEFAULT,
    config_folder,
    features_in,
    is_of,
    ours,
    record_file,
    shard_file,
)
from monoloss_plugin.hub.names import (
    require_config,
    require_hub_name,
    require_repo_id,
    require_split,
    require_texts,
)
from monoloss_plugin.hub.publication import Existing, Publication, Staged, Target, publish
from monoloss_plugin.hub.repository import of_folder, of_hub
from monoloss_plugin.hub.staging import staging

try:
    from datasets import Dataset
except ModuleNotFoundError as error:
    raise missing_extra(error, "hub") from error

_SHARD = 500 << 20  # bytes
_COLUMNS = ("features", "label", "image_id")
"""What is published; other columns may hold anything."""

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
    """Publish features to a dataset repository of the Hub, beside what is there.

    ``datasets.load_dataset(repo_id, split=...)`` gives them back, and :func:`load_features` as a
    ``FeatureSet``. They are written as Parquet files to a temporary folder first, which takes as
    much disk as the features; all files arrive in one commit. Run again after an interruption, it
    sends what has not arrived.

    Args:
        features: a feature set, a ``datasets.Dataset`` with a column ``features``, or the folder of
            one.
        repo_id: ``user/name``.
        split: its name there; by default the source's own split, else ``"train"``.
        config: tells sets of several encoders in one repository apart.
        license: such as ``"cc-by-4.0"``, for the card. The images' licence may bind you.
        source_dataset: the images' repository on the Hub, for the card; by default what the
            features' record says.
        tags: more tags for the card.
        private: make a new repository private.
        overwrite: replace a split of this name.
        dry_run: upload nothing, and say what would be.
        token: by default the one that the machine is logged in with.

    Returns:
        The files with their sizes, and the commit.

    Raises:
        TypeError: a dataset of another kind.
        ValueError: not a repository's, split's or configuration's name, or no features in it.
        FileExistsError: other features of that name are there.
        FileNotFoundError: no such folder, or no feature dataset in it.
        PermissionError: no token, or one that may not write there; or a private repository is asked
            for, and it is public.
        ConnectionError: the Hub cannot be reached.
    """
    require_repo_id(repo_id)
    require_config(config)
    tags = require_texts(tags, "tags")
    for argument, given in (
        ("split", split),
        ("license", license),
        ("source_dataset", source_dataset),
    ):
        require_text(given, argument)
    features = _opened(features)
    if not len(features):
        raise ValueError("features: expected at least one row, got none")
    split = require_split(split or features.record.source.get("split") or "train")
    source = source_dataset or images_on_hub(features.record.source)
    metadata = {
        "license": license,
        "tags": tags,
        "source_datasets": [require_hub_name(source, "source_dataset")] if source else [],
    }
    with staging() as staged:
        stage_features(features, staged, config=config, split=split)
        card = _Card(staged, repo_id, config, metadata, token)
        done = publish(
            Staged(staged, lambda path: is_of(path, config, split), card),
            Target(repo_id, "dataset", private, token, overwrite, dry_run),
            f"Publish {split}" if config == DEFAULT else f"Publish {split} of {config}",
        )
        return replace(done, name=split)


def stage_features(features: FeatureSet, root: Path, *, config: str, split: str) -> None:
    """Write a split's Parquet files and record below ``root``, the same for the same features."""
    (root / config_folder(config)).mkdir(parents=True, exist_ok=True)
    columns = [name for name in _COLUMNS if name in features.dataset.column_names]
    rows = features.dataset.select_columns(columns)
    size = len(features) * features.width * features.dtype.itemsize
    count = max(1, -(-size // _SHARD))
    for number in range(count):
        part = rows.shard(num_shards=count, index=number, contiguous=True)
        part.to_parquet(str(root / shard_file(config, split, number, count)))
    record = {
        **features.record.to_dict(),
        "rows": len(features),
        "width": features.width,
        "dtype": str(features.dtype).removeprefix("torch."),
        "columns": {name: str(rows.features[name]) for name in columns},
    }
    (root / record_file(config, split)).write_text(
        json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )


@dataclass(frozen=True)
class _Card:
    """Makes the card of a repository from what it holds and what is added."""

    staged: Path
    repo_id: str
    config: str
    metadata: Mapping[str, Any]
    token: str | bool | None

    def __call__(self, existing: Existing) -> str:
        added = {(c, s): record for c, s, record in features_in(of_folder(self.staged))}
        every = dict(added)
        if existing.commit is not None:
            self._require_room(existing)
            there = of_hub(self.repo_id, "dataset", existing.commit, token=self.token)
            every = {(c, s): record for c, s, record in features_in(there)} | added
        (given,) = added.values()
        for (config, split), record in every.items():
            columns = record.columns or given.columns
            if config == self.config and columns != given.columns:
                raise ValueError(
                    f"dataset: its columns are not those of {split}, with which it would share a "
                    f"configuration ({given.columns} and {columns}); give another config"
                )
        splits = [
            PublishedSplit(c, s, f"{config_folder(c)}/{s}-*.parquet", record)
            for (c, s), record in sorted(every.items(), key=lambda one: one[0])
        ]
        return dataset_card(existing.card, self.repo_id, splits, self.metadata)

    def _require_room(self, existing: Existing) -> None:
        """Raise ValueError where our files would keep ``datasets`` from others it reads now."""
        features = ours(existing.hashes)
        others = [p for p in existing.hashes if p.endswith(_DATA_FILES) and p not in features]
        foreign = [path for path in others if not path.endswith(".parquet")]
        if foreign:
            raise ValueError(
                f"repo_id: {self.repo_id} holds {visible(foreign[0])}, and datasets reads "
                "files of one kind from a repository; take another one"
            )
        if others and "configs" not in opened(existing.card).data:
            raise ValueError(
                f"repo_id: {self.repo_id} holds {visible(others[0])}, which datasets finds "
                "as long as the card names no files; name it in the card's configs first, or take "
                "another one"
            )


def _opened(features: FeatureSet | Dataset | str | os.PathLike[str]) -> FeatureSet:
    if isinstance(features, FeatureSet):
        return features
    if isinstance(features, (str, os.PathLike)):
        return FeatureSet.open(as_path(features, "features"))
    if not isinstance(features, Dataset):
        raise TypeError(f"features: expected a feature set, got {kind_of(features)}")
    return FeatureSet(features)

"""Publish a feature dataset."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from monoloss_plugin._optional import missing_extra
from monoloss_plugin.features import FeatureSet
from monoloss_plugin.hub.cards import images_on_hub
from monoloss_plugin.hub.dataset_card import PublishedSplit, dataset_card
from monoloss_plugin.hub.feature_repository import (
    DEFAULT,
    features_in,
    folder_of,
    is_of,
    record_file,
    shard_file,
)
from monoloss_plugin.hub.names import require_config, require_repo_id, require_split
from monoloss_plugin.hub.publication import Existing, Publication, Staged, publish
from monoloss_plugin.hub.repository import of_folder, of_hub

try:
    from datasets import Dataset
except ModuleNotFoundError as error:
    raise missing_extra(error, "hub") from error

_SHARD = 500 << 20  # bytes


def publish_features(
    dataset: FeatureSet | Dataset | str | os.PathLike[str],
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
        dataset: a feature set, a ``datasets.Dataset`` with a column ``features``, or the folder of
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
    features = _opened(dataset)
    split = require_split(split or features.record.get("source", {}).get("split") or "train")
    source = source_dataset or images_on_hub(features.record.get("source", {}))
    metadata = {
        "license": license,
        "tags": list(tags),
        "source_datasets": [source] if source else [],
    }
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder)
        stage_features(features, staged, config=config, split=split)
        done = publish(
            Staged(
                staged,
                lambda path: is_of(path, config, split),
                _Card(staged, repo_id, metadata, token),
            ),
            repo_id,
            "dataset",
            message=f"Publish {split}" if config == DEFAULT else f"Publish {split} of {config}",
            private=private,
            token=token,
            overwrite=overwrite,
            dry_run=dry_run,
        )
        return replace(done, name=split)


def stage_features(features: FeatureSet, root: Path, *, config: str, split: str) -> None:
    """Write a split's Parquet files and record below ``root``, the same for the same features."""
    (root / folder_of(config)).mkdir(parents=True, exist_ok=True)
    size = len(features) * features.width * features.dtype.itemsize
    count = max(1, -(-size // _SHARD))
    for number in range(count):
        part = features.dataset.shard(num_shards=count, index=number, contiguous=True)
        part.to_parquet(str(root / shard_file(config, split, number, count)))
    record = {
        **{key: value for key, value in features.record.items() if key != "shards"},
        "rows": len(features),
        "width": features.width,
        "dtype": str(features.dtype).removeprefix("torch."),
    }
    (root / record_file(config, split)).write_text(
        json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )


@dataclass(frozen=True)
class _Card:
    """Makes the card of a repository from what it holds and what is added."""

    staged: Path
    repo_id: str
    metadata: Mapping[str, Any]
    token: str | bool | None

    def __call__(self, existing: Existing) -> str:
        every = {}
        if existing.commit is not None:
            there = of_hub(self.repo_id, "dataset", existing.commit, token=self.token)
            every = {(c, s): record for c, s, record in features_in(there)}
        every |= {(c, s): record for c, s, record in features_in(of_folder(self.staged))}
        splits = [
            PublishedSplit(c, s, f"{folder_of(c)}/{s}-*.parquet", record)
            for (c, s), record in sorted(every.items(), key=lambda one: one[0])
        ]
        return dataset_card(existing.card, self.repo_id, splits, self.metadata)


def _opened(dataset: FeatureSet | Dataset | str | os.PathLike[str]) -> FeatureSet:
    if isinstance(dataset, FeatureSet):
        return dataset
    if isinstance(dataset, (str, os.PathLike)):
        return FeatureSet.open(dataset)
    return FeatureSet(dataset)

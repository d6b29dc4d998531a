"""Features in a repository: Parquet files and a record for each split, and how they are loaded."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from monoloss_plugin._checks import require_text
from monoloss_plugin._optional import missing_extra
from monoloss_plugin.features import FeatureRecord, FeatureSet
from monoloss_plugin.hub.bundled import open_named
from monoloss_plugin.hub.names import DATA, is_inside
from monoloss_plugin.hub.repository import Repository

try:
    from datasets import Dataset, NamedSplit
    from datasets.exceptions import DatasetGenerationError
except ModuleNotFoundError as error:
    raise missing_extra(error, "hub") from error

logger = logging.getLogger(__name__)

DEFAULT = "default"
_PARQUET = re.compile(r"(.+)/(\w+(?:\.\w+)*)-(\d{5})-of-(\d{5})\.parquet")


def load_features(
    repo_id: str | os.PathLike[str],
    split: str | None = None,
    *,
    config: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> FeatureSet:
    """Load a published split of features.

    Only JSON and Parquet are read. What was loaded once is loaded from the cache where the Hub
    cannot be reached.

    Args:
        repo_id: ``user/name`` on the Hub; ``"digits"``, which is bundled; or a folder laid out like
            a repository, as a ``Path`` or a string such as ``"./folder"``.
        split: such as ``"train"``; may be left out where there is only one.
        config: which of the repository's feature sets, where there are several.
        revision: a branch, tag or commit.
        token: to read a private repository; by default the one the machine is logged in with.
        cache_dir: by default the Hub's own cache and that of ``datasets``.
        local_files_only: do not ask the Hub.

    Returns:
        The features, memory-mapped, for :class:`~monoloss_plugin.features.FeatureBatches` and
        :func:`~monoloss_plugin.evaluation.evaluate`.

    Raises:
        TypeError: an argument of another kind.
        FileNotFoundError: no such repository, split or configuration.
        ValueError: several of them and none is chosen, Parquet files without features, or
            labels beyond the classes that they name.
        PermissionError: the Hub asks for a token, or for its conditions to be accepted.
        ConnectionError: the Hub cannot be reached, and the features are not in the cache.

    Examples:
        >>> load_features("digits", "train")
        FeatureSet(1198 x 64, torch.float16)
    """
    require_text(split, "split")
    require_text(config, "config")
    repository = open_named(
        repo_id,
        "dataset",
        revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    config, split = _chosen(repository, config, split)
    paths = shards(repository)[config, split]
    record_path = record_file(config, split)
    has_record = record_path in repository
    folder = repository.fetch([*paths, record_path] if has_record else paths)
    try:
        dataset = Dataset.from_parquet(
            [str(folder / path) for path in paths],
            split=NamedSplit(split),
            cache_dir=None if cache_dir is None else str(cache_dir),
        )
    except (ValueError, DatasetGenerationError) as error:
        reason = error.__cause__ or error
        raise ValueError(f"{repository.name}: {paths[0]} is not Parquet: {reason}") from error
    record = _record(repository, record_path) if has_record else None
    try:
        return FeatureSet(dataset, record)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{repository.name}: {paths[0]}: {error}") from error


def config_folder(config: str) -> str:
    """Return the folder of a configuration's files."""
    return DATA if config == DEFAULT else config


def record_file(config: str, split: str) -> str:
    """Return the path of a split's record."""
    return f"{config_folder(config)}/{split}.json"


def shard_file(config: str, split: str, number: int, count: int) -> str:
    """Return the path of one of a split's Parquet files."""
    return f"{config_folder(config)}/{split}-{number:05d}-of-{count:05d}.parquet"


class _Named(NamedTuple):
    """What the path of a Parquet file says."""

    config: str
    split: str
    files: int
    """How many there are of that split."""


def _named(path: str) -> _Named | None:
    """Return what a path says; None for files of another layout."""
    match = _PARQUET.fullmatch(path)
    # A folder of the default's name would be taken for the default's own folder.
    if not match or match[1] == DEFAULT or not is_inside(path):
        return None
    config = DEFAULT if match[1] == DATA else match[1]
    return _Named(config, match[2], int(match[4]))


def shards(repository: Repository) -> dict[tuple[str, str], list[str]]:
    """Return the Parquet files of each configuration and split that is there completely."""
    found: dict[_Named, list[str]] = {}
    for path in sorted(repository.sizes):
        named = _named(path)
        if named:
            found.setdefault(named, []).append(path)
    return {(n.config, n.split): paths for n, paths in found.items() if len(paths) == n.files}


def is_of(path: str, config: str, split: str) -> bool:
    """Say whether a file belongs to a configuration's split."""
    named = _named(path)
    if named:
        return (named.config, named.split) == (config, split)
    return path == record_file(config, split)


def _chosen(repository: Repository, config: str | None, split: str | None) -> tuple[str, str]:
    there = list(shards(repository))
    if not there:
        raise FileNotFoundError(
            f"repo_id: {repository.name} holds no features as Parquet files of this layout; open "
            "another dataset with datasets.load_dataset and FeatureSet"
        )
    fitting = [one for one in there if config in (None, one[0]) and split in (None, one[1])]
    said = ", ".join(s if c == DEFAULT else f"{s} of {c}" for c, s in there)
    if not fitting:
        wanted = " of ".join(part for part in (split, config) if part)
        raise FileNotFoundError(f"split: {repository.name} has no {wanted}; it has {said}")
    if len(fitting) > 1:
        argument = "config" if len({c for c, _ in fitting}) > 1 else "split"
        raise ValueError(f"{argument}: {repository.name} has several: {said}")
    return fitting[0]


def ours(paths: Iterable[str]) -> set[str]:
    """Return which files are features in our layout, and the records that belong to them."""
    found: set[str] = set()
    for path in paths:
        named = _named(path)
        if named:
            found |= {path, record_file(named.config, named.split)}
    return found


def features_in(repository: Repository) -> list[tuple[str, str, FeatureRecord]]:
    """Return configuration, split and record of all features; records that are none are said."""
    found = list(shards(repository))
    paths = [record_file(*one) for one in found]
    paths_there = [p for p in paths if p in repository and repository.is_short(p)]
    if paths_there:
        repository.fetch(paths_there)
    return [
        (config, split, _record(repository, path) if path in repository else FeatureRecord())
        for (config, split), path in zip(found, paths, strict=True)
    ]


def _record(repository: Repository, path: str) -> FeatureRecord:
    try:
        return FeatureRecord.of(repository.json(path))
    except ValueError as error:
        logger.warning("%s/%s is left out: %s", repository.name, path, error)
        return FeatureRecord()

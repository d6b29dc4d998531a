"""Features in a repository: which files are which split, and how to load one."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, NamedSplit
from datasets.exceptions import DatasetGenerationError

from monoloss_plugin._checks import require_text
from monoloss_plugin.features import FeatureRecord, FeatureSet
from monoloss_plugin.hub.names import DATA, is_inside
from monoloss_plugin.hub.repository import Place, Repository, open_repository, read_json

logger = logging.getLogger(__name__)

DEFAULT = "default"
_PARQUET = re.compile(r"(.+)/(\w+(?:\.\w+)*)-\d{5}-of-(\d{5})\.parquet")


class Split(NamedTuple):
    """The name of a split. It says where the split's files are."""

    config: str
    split: str

    @property
    def record_path(self) -> str:
        """The path of the JSON file that names encoder and images."""
        return f"{self._start}.json"

    @property
    def pattern(self) -> str:
        """A pattern of the paths of the Parquet files."""
        return f"{self._start}-*.parquet"

    def shard_path(self, number: int, count: int) -> str:
        """Return the path of one of ``count`` Parquet files."""
        return f"{self._start}-{number:05d}-of-{count:05d}.parquet"

    @property
    def _start(self) -> str:
        return f"{DATA if self.config == DEFAULT else self.config}/{self.split}"

    def __str__(self) -> str:
        return self.split if self.config == DEFAULT else f"{self.split} of {self.config}"


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
    """Load a published split of features, memory-mapped.

    This function reads only JSON and Parquet. What you have loaded once comes from the cache where
    the Hub cannot be reached.

    Args:
        repo_id: ``user/name`` on the Hub; ``"digits"``, which is bundled; or a folder laid out like
            a repository, as a ``Path`` or a string such as ``"./folder"``.
        split: such as ``"train"``. You can leave it out if there is only one.
        config: which of the repository's feature sets, if there are several.
        revision: a branch, tag or commit.
        token: to read a private repository; by default the one you are logged in with.
        cache_dir: a folder instead of the Hub's own cache and that of ``datasets``.
        local_files_only: do not ask the Hub; read its cache.

    Raises:
        FileNotFoundError: there is no such folder, split or configuration.
        ValueError: there are several splits and you chose none; or the Parquet files hold no
            features, or labels beyond the classes that they name.
        Exception: what ``huggingface_hub`` raises, such as its ``RepositoryNotFoundError``.

    Examples:
        >>> load_features("digits", "train")
        FeatureSet(1198 x 64, torch.float16)
    """
    require_text(split, "split")
    require_text(config, "config")
    repository = open_repository(
        Place(repo_id, "dataset", revision, token, cache_dir, local_files_only)
    )
    chosen = _choose(repository, config, split)
    paths = splits_in(repository)[chosen]
    wanted = [path for path in (*paths, chosen.record_path) if path in repository.sizes]
    folder = repository.download(wanted)
    try:
        dataset = Dataset.from_parquet(
            [str(folder / path) for path in paths],
            split=NamedSplit(chosen.split),
            cache_dir=None if cache_dir is None else str(cache_dir),
        )
        return FeatureSet(dataset, _read_record(folder / chosen.record_path))
    except (TypeError, ValueError, DatasetGenerationError) as error:
        reason = error.__cause__ or error
        raise ValueError(f"{repository.name}: {paths[0]}: {reason}") from error


def splits_in(repository: Repository) -> dict[Split, list[str]]:
    """Return the splits of a repository whose Parquet files are all there, with their paths."""
    found: dict[tuple[Split, int], list[str]] = {}
    for path in sorted(repository.sizes):
        split, count = split_of(path)
        if split is not None:
            found.setdefault((split, count), []).append(path)
    return {split: paths for (split, count), paths in found.items() if len(paths) == count}


def split_of(path: str) -> tuple[Split | None, int]:
    """Return the split that a Parquet file belongs to, and the split's number of files."""
    match = _PARQUET.fullmatch(path)
    # A folder called "default" would be taken for the default configuration.
    if not match or match[1] == DEFAULT or not is_inside(path):
        return None, 0
    return Split(DEFAULT if match[1] == DATA else match[1], match[2]), int(match[3])


def read_records(repository: Repository) -> dict[Split, FeatureRecord]:
    """Return what each split of a repository says of its encoder and images."""
    paths = {split: split.record_path for split in splits_in(repository)}
    folder = repository.download(path for path in paths.values() if path in repository.sizes)
    return {split: _read_record(folder / path) for split, path in paths.items()}


def _read_record(path: Path) -> FeatureRecord:
    """Read a record; an empty one where there is none, or, with a warning, something else."""
    try:
        return FeatureRecord.of(read_json(path)) if path.is_file() else FeatureRecord()
    except ValueError as error:
        logger.warning("a record of features is left out: %s", error)
        return FeatureRecord()


def _choose(repository: Repository, config: str | None, split: str | None) -> Split:
    """Return the split to load; the repository has it."""
    there = list(splits_in(repository))
    if not there:
        raise FileNotFoundError(
            f"repo_id: {repository.name} holds no features as Parquet files of this layout; open "
            "another dataset with datasets.load_dataset and FeatureSet"
        )
    names = ", ".join(map(str, there))
    fitting = [one for one in there if config in (None, one.config) and split in (None, one.split)]
    if not fitting:
        wanted = " of ".join(part for part in (split, config) if part)
        raise FileNotFoundError(f"split: {repository.name} has no {wanted}; it has {names}")
    if len(fitting) > 1:
        argument = "config" if len({one.config for one in fitting}) > 1 else "split"
        raise ValueError(f"{argument}: {repository.name} has several: {names}")
    return fitting[0]

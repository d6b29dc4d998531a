"""Features in a repository: which files are which split, how to load one, and publish one."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, NamedSplit
from datasets.exceptions import DatasetGenerationError

from monoloss_plugin._checks import require_text, visible
from monoloss_plugin._places import as_path, kind_of
from monoloss_plugin.features import FeatureRecord, FeatureSet
from monoloss_plugin.features.patches import PATCH_COLUMNS
from monoloss_plugin.hub import names
from monoloss_plugin.hub.cards import escape, hub_id, merge_card, parse_card, settings_table, table
from monoloss_plugin.hub.repository import (
    Place,
    Repository,
    open_repository,
    page_of,
    read_json,
    repository_in,
)
from monoloss_plugin.hub.upload import Destination, Plan, Publication, plan_upload, send

logger = logging.getLogger(__name__)

DEFAULT = "default"
"""The configuration that needs no name."""

_PARQUET = re.compile(r"(.+)/(\w+(?:\.\w+)*)-\d{5}-of-(\d{5})\.parquet")

_SHARD = 500 << 20  # bytes of a Parquet file
COLUMNS = ("features", "label", "image_id")
"""The columns that are published. Other columns may hold anything."""

_DATA_FILES = (".arrow", ".csv", ".json", ".jsonl", ".parquet", ".txt", ".zip", ".tar")
"""Endings of files that ``datasets`` may read."""

_TAGS = ["image-features", "embeddings", "sparse-autoencoder", "monoloss"]

_ABOUT = """\
Features of images from a frozen encoder, one vector per {sample}, for training and measuring sparse
autoencoders. Published with monoloss_plugin; any reader of Parquet can read them.

## Splits"""

_SAES = "SAEs that take these features:"

_COLUMNS = """\
## Columns

`features`: the vectors, not normalised. `label`: if the images have labels. `image_id`.
"""

_OF_PATCHES = """
Where a row has patches, its `features` are a list of vectors. `places`: where each patch lies in
the image's grid, row after row; -1 for a class token. `grid`: its height and width. `pooled`: the
mean over all the image's patches, without the class token.
"""

_LICENCE = """
## Licence

The images and the encoder have licences of their own. The licence in this card's metadata, if there
is one, is the publisher's word for the features alone.

## Load
"""

_LOAD = """\
```python
from datasets import load_dataset

dataset = load_dataset("{repo_id}", "{config}", split="{split}")
```

For training and measuring SAEs:

```python
from monoloss_plugin import load_features

features = load_features("{repo_id}", "{split}", config="{config}")
```"""


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
        return f"{names.DATA if self.config == DEFAULT else self.config}/{self.split}"

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
        repo_id: ``user/name`` on the Hub; ``"digits"`` or ``"photos"``, which are bundled; or a
            folder laid out like a repository, as a ``Path`` or a string such as ``"./folder"``.
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
    if not match or match[1] == DEFAULT or not names.is_inside(path):
        return None, 0
    return Split(DEFAULT if match[1] == names.DATA else match[1], match[2]), int(match[3])


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
            f"repo_id: {repository.name} holds no features as Parquet files of this layout; open a "
            "folder of monoloss extract with FeatureSet.open, and another dataset with "
            "datasets.load_dataset and FeatureSet"
        )
    shown = ", ".join(map(str, there))
    fitting = [one for one in there if config in (None, one.config) and split in (None, one.split)]
    if not fitting:
        wanted = " of ".join(part for part in (split, config) if part)
        raise FileNotFoundError(f"split: {repository.name} has no {wanted}; it has {shown}")
    if len(fitting) > 1:
        argument = "config" if len({one.config for one in fitting}) > 1 else "split"
        raise ValueError(f"{argument}: {repository.name} has several: {shown}")
    return fitting[0]


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
    tags = names.require_texts(tags, "tags")
    require_text(split, "split")
    require_text(license, "license")
    if source_dataset is not None:
        names.require_hub_name(source_dataset, "source_dataset")
    names.require_config(config)
    features = _open(features)
    if not len(features):
        raise ValueError("features: expected at least one row, got none")
    name = Split(
        config, names.require_split(split or features.record.source.get("split") or "train")
    )
    source = source_dataset or hub_id(features.record.source)
    metadata = {
        "license": license,
        "tags": tags,
        "source_datasets": [source],
    }
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_features(features, root, name)
        return send(plan_features(repository_in(root, repo_id), to, metadata), name.split)


def plan_features(
    added: Repository, to: Destination, metadata: Mapping[str, Any], *, saes: str = ""
) -> Plan:
    """Plan to upload the splits of a local repository, beside those that are there.

    Args:
        added: their files, in a local folder.
        to: the repository of the Hub.
        metadata: license, tags and images for the card's metadata.
        saes: the repository of SAEs that the card links to, if any.
    """
    new = read_records(added)

    def write_card(existing: str, there: Repository | None) -> str:
        records = {}
        if there is not None:
            _require_room(there, existing)
            records = read_records(there)
        records |= new
        for split in new:
            _require_same_columns(records, split)
        return _card(existing, to.repo_id, records, metadata, saes)

    def owns(path: str) -> bool:
        return split_of(path)[0] in new or path in {split.record_path for split in new}

    return plan_upload(added, to, owns=owns, write_card=write_card)


def write_features(features: FeatureSet, root: Path, split: Split) -> None:
    """Write a split's Parquet files and record below ``root``. Same features give same files."""
    known = COLUMNS if features.patches is None else (*COLUMNS, *PATCH_COLUMNS)
    columns = [name for name in known if name in features.dataset.column_names]
    rows = features.dataset.select_columns(columns)
    size = len(features) * features.width * features.dtype.itemsize
    count = max(1, -(-size // _SHARD))
    (root / split.record_path).parent.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        part = rows.shard(num_shards=count, index=number, contiguous=True)
        part.to_parquet(str(root / split.shard_path(number, count)))
    record = {
        **features.record.to_dict(),
        "rows": features.num_images,
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
        both_known = bool(columns and record.columns)
        if split.config == new.config and both_known and record.columns != columns:
            raise ValueError(
                f"features: their columns are not those of {split.split}, which is in the same "
                f"configuration ({columns} and {record.columns}); choose another config"
            )


def _card(
    existing: str,
    repo_id: str,
    records: Mapping[Split, FeatureRecord],
    metadata: Mapping[str, Any],
    saes: str,
) -> str:
    """Return the card of a repository that will hold these splits.

    It links to the SAEs if there are any, or as the card did before.
    """
    splits = sorted(records)
    rows = []
    for split in splits:
        record = records[split]
        named = (origin.get("name", "not said") for origin in (record.encoder, record.source))
        cells = (_size_of(record), record.dtype or "", *named)
        rows.append([f"`{split.config}`", f"`{split.split}`", *map(escape, cells)])
    configs: dict[str, list[Split]] = {}
    for split in splits:
        configs.setdefault(split.config, []).append(split)
    linked = [line for line in existing.splitlines() if line.startswith(_SAES)]
    if saes:
        linked = [f"{_SAES} [`{saes}`]({page_of(saes, 'model')})."]
    samples = sorted({"patch" if record.patches else "image" for record in records.values()})
    columns = _COLUMNS + (_OF_PATCHES if "patch" in samples else "")
    parts = [
        _ABOUT.format(sample=" or ".join(samples)),
        table(("configuration", "split", "size", "type", "encoder", "images"), rows),
        *linked,
        *(_encoder(config, records[of_config[0]]) for config, of_config in configs.items()),
        columns + _LICENCE,
        _LOAD.format(repo_id=repo_id, split=splits[0].split, config=splits[0].config),
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


def _size_of(record: FeatureRecord) -> str:
    """Say how many images a split has, how many patches each has, and the width of a vector."""
    sizes: list[Any] = [record.rows, record.width]
    if record.patches:
        grid, kept = record.patches.get("grid"), record.patches.get("kept")
        count = kept or (grid and grid[0] * grid[1])
        sizes.insert(1, count and count + bool(record.patches.get("class_token")))
    return " x ".join(str(size or "?") for size in sizes)


def _encoder(config: str, record: FeatureRecord) -> str:
    parts = [f"## Encoder of `{config}`", settings_table(record.encoder)]
    if record.patches:
        parts.append(f"Patches of each image: {record.describe_patches()}.")
    preprocessing = record.encoder.get("preprocessing")
    if isinstance(preprocessing, Mapping) and preprocessing:
        steps = {name: str(step) for name, step in preprocessing.items() if step is not None}
        parts += ["Preprocessing, in the words of its library:", settings_table(steps)]
    return "\n\n".join(parts)

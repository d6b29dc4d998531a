"""The files of a collection: which of a folder's files are published, and checks of them.

A collection is a folder with two repositories in it, each laid out as it will be on the Hub::

    models/SAE_ID/           one folder for each SAE: cfg.json, sae_weights.safetensors, ...
    datasets/CONFIG/         SPLIT-00000-of-00001.parquet, ... and SPLIT.json for each split

``data`` is the CONFIG that needs no name. ``load_pretrained`` and ``load_features`` read either
repository before it is published.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.parquet as pq

from monoloss_plugin._checks import visible
from monoloss_plugin._places import require_folder
from monoloss_plugin.features.patches import PATCH_COLUMNS
from monoloss_plugin.hub.features import COLUMNS, Split, read_records, splits_in
from monoloss_plugin.hub.illustrations import (
    CURVES,
    LATENTS,
    REPORT,
    require_picture,
    require_report,
)
from monoloss_plugin.hub.record import read_record
from monoloss_plugin.hub.repository import Repository, read_json, repository_in
from monoloss_plugin.hub.sae_files import FILES
from monoloss_plugin.hub.saes import (
    CONFIG,
    WEIGHTS,
    file_of,
    load_folder,
    read_sparsity,
    sae_ids,
)

logger = logging.getLogger(__name__)

MODELS, DATASETS = "models", "datasets"

_LAYOUT = (
    f"a collection has {MODELS}/SAE_ID/{CONFIG} and {WEIGHTS} for each SAE, and "
    f"{DATASETS}/CONFIG/SPLIT-00000-of-00001.parquet for its features"
)

_MACHINE_PATH = re.compile(
    r"^~?/\w"  # the whole text
    r"|[\s:='\"(]~?/[\w.-]+/[\w.-]"  # such as local-dir:/home/me; a single / may be "or"
    r"|\b[A-Za-z]:\\|^\\\\|\bfile:/"
)


def open_saes(collection: Path) -> Repository:
    """Check a collection's SAEs, and return the files of them that are published.

    Every SAE is loaded once.

    Raises:
        FileNotFoundError, NotADirectoryError: no such folder, or no SAE in its ``models``.
        ValueError: a file is not what its name says, holds a path of this machine, or is a link; an
            SAE's settings do not fit its weights; or only one of the two is there.
    """
    require_folder(collection, "folder")
    there = _files(collection, MODELS)
    ids = [] if there is None else sae_ids(there)
    if there is None or not ids:
        raise FileNotFoundError(f"folder: {collection} holds no SAE in {MODELS}/; {_LAYOUT}")
    wanted = {file_of(sae_id, file) for sae_id in ids for file in FILES}
    saes = _select(there, wanted, lambda path: PurePosixPath(path).name in (CONFIG, WEIGHTS))
    assert saes.folder is not None
    for sae_id in ids:
        _check_sae(saes.folder / sae_id)
    _require_no_machine_paths(saes)
    return saes


def open_features(collection: Path) -> Repository | None:
    """Check a collection's features, and return their files; None if there are none.

    Raises:
        ValueError: a split is not complete, its Parquet files hold other columns than features or
            another number of rows than its record says, or as :func:`open_saes`.
    """
    there = _files(collection, DATASETS)
    if there is None:
        return None
    splits = splits_in(there)
    wanted = {path for paths in splits.values() for path in paths}
    wanted |= {split.record_path for split in splits}
    features = _select(there, wanted, lambda path: path.endswith(".parquet"))
    for split, record in read_records(features).items():
        _check_split(features, split, splits[split], record.rows)
    _require_no_machine_paths(features)
    return features if splits else None


def _files(collection: Path, part: str) -> Repository | None:
    """List the files of one of the two repositories; None if there is no such folder."""
    folder = collection / part
    if not folder.is_dir():
        return None
    for path in folder.rglob("*"):
        if path.is_symlink():  # to something that nobody may mean to publish
            raise ValueError(f"folder: {path} is a link; give the file or folder itself")
    return repository_in(folder, str(folder))


def _select(
    there: Repository, wanted: Collection[str], is_needed: Callable[[str], bool]
) -> Repository:
    """Return the files that are wanted, with a warning if there are others.

    Raises:
        ValueError: a file that is needed does not belong to any SAE or split.
    """
    left = [path for path in there.sizes if path not in wanted and not _is_hidden(path)]
    for path in filter(is_needed, left):
        raise ValueError(
            f"folder: {there.name}/{visible(path)} belongs to no SAE and no split that is complete "
            f"and has a plain name; {_LAYOUT}"
        )
    if left:
        shown = ", ".join(map(visible, left[:4])) + ", ..." * (len(left) > 4)
        logger.warning("not published, because no SAE or split needs it: %s", shown)
    sizes = {path: size for path, size in there.sizes.items() if path in wanted}
    return Repository(there.name, sizes, there.folder)


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _check_sae(folder: Path) -> None:
    """Raise an error unless an SAE's folder holds what others will be able to read."""
    name = str(folder)
    sae = load_folder(folder, name)
    read_record(folder, name)
    read_sparsity(folder, name, sae.cfg.d_sae)
    for picture in (folder / CURVES, folder / LATENTS):
        if picture.exists():
            require_picture(picture)
    if (folder / REPORT).exists():
        require_report(folder / REPORT)


def _check_split(
    features: Repository, split: Split, paths: Iterable[str], rows: int | None
) -> None:
    """Raise ValueError unless a split's Parquet files hold features, as many as its record says."""
    assert features.folder is not None
    found = 0
    for path in paths:
        name = f"{features.name}/{path}"
        try:
            with pq.ParquetFile(features.folder / path) as file:
                columns, found = file.schema_arrow.names, found + file.metadata.num_rows
        except (OSError, ValueError) as error:
            raise ValueError(f"{name}: not a Parquet file: {error}") from error
        of_patches = PATCH_COLUMNS if set(PATCH_COLUMNS) <= set(columns) else ()
        if "features" not in columns or set(columns) - {*COLUMNS, *of_patches}:
            raise ValueError(
                f"{name}: expected the columns {', '.join(COLUMNS)}, or only the first, got "
                f"{visible(', '.join(columns))}"
            )
    if rows not in (None, found):
        raise ValueError(
            f"{features.name}: {split.record_path} says {rows} rows, but the Parquet files of "
            f"{split} hold {found}"
        )


def _require_no_machine_paths(repository: Repository) -> None:
    """Raise ValueError if settings or a record name a path of somebody's machine."""
    assert repository.folder is not None
    for path in repository.sizes:
        if path.endswith(".json"):
            for key, text in _texts(read_json(repository.folder / path)):
                if _MACHINE_PATH.search(text):
                    raise ValueError(
                        f"folder: {repository.name}/{path} would publish a path of this machine: "
                        f"{visible(key)} is {visible(text)!r}; write a name there instead"
                    )


def _texts(value: Any, key: str = "") -> Iterable[tuple[str, str]]:
    """Yield every text of a JSON value, with the name of the entry that holds it."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, one in value.items():
            yield key or "a name", name
            yield from _texts(one, name)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one, key)

"""The folder of a feature set: how it is begun, completed, checked, repaired and joined.

While an extraction runs, the folder holds::

    extraction.json                              the settings: encoder, source, dtype, width
    parts/0000000000-0000004096-7c39a0e1.arrow   a shard (see shards.py)
    parts/total.json                             the number of rows in the source, once known
    parts/share-0-of-2.lock                      locked by the process that works on this share
    .unfinished-*                                what a process is writing at the moment

When the shards cover every row, ``datasets`` writes them as one dataset, and ``parts/`` goes::

    extraction.json
    data-00000-of-00002.arrow, ...               the rows, in the order of the source
    state.json, dataset_info.json                what ``datasets.load_from_disk`` reads first
    features.json                                the set's record, and a checksum of every file

Four rules keep the folder sound:

- Every file appears whole, by a rename, and ``features.json`` comes last. So a process may be
  killed at any moment. It loses the shard that it was collecting, and nothing else.
- What is left to do is never noted. It is the gaps between the shards. So processes need not agree
  on how they divide the work.
- A folder belongs to one set of settings. A run with other settings is refused, and so is a folder
  that holds something else.
- A link that lies in the folder is replaced or refused. Nothing is ever written through it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetInfo,
    NamedSplit,
    are_progress_bars_disabled,
    concatenate_datasets,
    disable_progress_bars,
    enable_progress_bars,
)
from filelock import FileLock, Timeout

from monoloss_plugin._checks import as_list
from monoloss_plugin._places import as_path
from monoloss_plugin.features.record import FeatureRecord
from monoloss_plugin.features.shards import (
    PARTS,
    Unreadable,
    missing_rows,
    put,
    sha256_of,
    shards_in,
    unfinished,
)

SETTINGS, RECORD, STATE = "extraction.json", "features.json", "state.json"

_TOTAL = f"{PARTS}/total.json"
_FORMAT = 2
_LARGEST_FILE = 500 << 20
"""Bytes of a data file at most."""
_SPLIT = re.compile(r"\w+(\.\w+)*")
"""Names of splits that ``datasets`` accepts."""
_WAIT = 6.0
"""Seconds to wait for a lock: the workers of a killed process may hold it for 5 seconds more."""

logger = logging.getLogger(__name__)


class SettingsError(ValueError):
    """The folder was begun with other settings, or it holds something else."""


class BusyError(RuntimeError):
    """Another process is doing the same work."""


@dataclass(frozen=True)
class File:
    """What a file must be like."""

    bytes: int
    sha256: str
    """Its checksum, or the beginning of it."""

    def problem_of(self, path: Path, *, read: bool) -> str | None:
        """Say what is wrong with a file; compare its checksum too if it is to be ``read``."""
        if not path.is_file():
            return "missing"
        if path.stat().st_size != self.bytes:
            return f"{path.stat().st_size} bytes instead of {self.bytes}"
        if read and not sha256_of(path).startswith(self.sha256):
            return "altered, its checksum differs"
        return None


@dataclass(frozen=True)
class Contents:
    """What ``features.json`` says of a complete set."""

    record: FeatureRecord
    files: dict[str, File]
    """Every other file but the settings, by its name."""
    unreadable: list[Unreadable]

    @classmethod
    def read(cls, folder: Path) -> Contents:
        """Read the file.

        Raises:
            ValueError: it was cut or overwritten, or has another version's format.
        """
        content = read_json(folder / RECORD)
        if content.get("format") != _FORMAT:
            raise ValueError(
                f"{folder} was written by another version of monoloss_plugin; extract it again, or "
                "open it with FeatureSet(datasets.load_from_disk(folder))"
            )
        files = {name: File(one["bytes"], one["sha256"]) for name, one in content["files"].items()}
        unreadable = [Unreadable(**one) for one in content["left_out"]]
        return cls(FeatureRecord.of(content), files, unreadable)

    def write(self, folder: Path) -> None:
        """Write the file."""
        files = {name: asdict(file) for name, file in self.files.items()}
        left_out = [asdict(one) for one in self.unreadable]
        lists = {"files": files, "left_out": left_out}
        write_json(folder, RECORD, {"format": _FORMAT, **self.record.to_dict(), **lists})


def begin(folder: Path, settings: FeatureRecord) -> None:
    """Claim a new folder for some settings, or check that it was begun with the same.

    Raises:
        SettingsError: it was begun with others, or it holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / PARTS).is_symlink():
        raise SettingsError(f"out: {folder / PARTS} is a link, which is not followed; delete it")
    path = folder / SETTINGS
    given = json.loads(json.dumps({"format": _FORMAT, **settings.to_dict()}))
    # Listed before the settings are looked for: another process may begin the same set now.
    others = [one for one in folder.iterdir() if not one.name.startswith(".") and one != path]
    if not path.exists():
        if others:
            raise SettingsError(f"out: {folder} holds something else; give an empty or new folder")
        write_json(folder, SETTINGS, given)
    there = read_json(path)
    versions = there.pop("versions", None), given.pop("versions", None)
    if versions[0] != versions[1]:
        logger.warning("%s was begun with %s; going on with %s", folder, *versions)
    if there != given:
        differing = "; ".join(_differences(there, given))
        raise SettingsError(
            f"out: {folder} was begun with other settings ({differing}); "
            "give those again, or another folder"
        )


def _differences(there: Any, given: Any, name: str = "") -> Iterable[str]:
    if isinstance(there, dict) and isinstance(given, dict):
        for key in sorted(there.keys() | given.keys()):
            yield from _differences(there.get(key), given.get(key), f"{name}.{key}".strip("."))
    elif there != given:
        yield f"{name}: {there!r} there, {given!r} now"


@contextlib.contextmanager
def claim(folder: Path, task: str, *, forever: bool = False) -> Iterator[None]:
    """Do a task in a folder while no other process does the same one.

    The system gives the lock back when a process ends, even when it is killed.

    Args:
        folder: of the set.
        task: a name for it, such as ``share-0-of-2``.
        forever: wait for another process as long as it takes, not only a few seconds.

    Raises:
        BusyError: another process is still at it.
    """
    path = folder / PARTS / f"{task}.lock"
    path.parent.mkdir(exist_ok=True)
    if path.is_symlink():
        raise ValueError(f"{path} is a link, which is not followed; delete it")
    try:
        lock = FileLock(path, timeout=-1 if forever else _WAIT).acquire()
    except Timeout as error:
        raise BusyError(
            f"another process holds {path}; stop it first, or give each process its own share"
        ) from error
    with lock:
        yield


def note_total(folder: Path, rows: int) -> None:
    """Write down how many rows the source has, if that is not known yet."""
    if total_rows(folder) is None:
        write_json(folder, _TOTAL, rows)


def total_rows(folder: Path) -> int | None:
    """Return how many rows the source has; None if no process has seen its end."""
    try:
        return int(read_json(folder / _TOTAL))
    except FileNotFoundError:
        return Contents.read(folder).record.source_rows if is_complete(folder) else None


def unreadable_of(folder: Path) -> list[Unreadable]:
    """Return the images that were left out of a set so far."""
    if is_complete(folder):
        return Contents.read(folder).unreadable
    return [one for shard in shards_in(folder) for one in shard.unreadable()]


def count_rows(folder: Path) -> int:
    """Return how many feature vectors a set has so far."""
    if is_complete(folder):
        return Contents.read(folder).record.rows or 0
    return sum(len(shard.rows) for shard in shards_in(folder)) - len(unreadable_of(folder))


def is_complete(folder: Path) -> bool:
    """Say whether a folder is a complete feature set."""
    return (folder / RECORD).exists()


def complete(folder: Path) -> bool:
    """Make the set if its shards cover every row, and say whether it is complete.

    Raises:
        ValueError: not one image gave features.
    """
    if not is_complete(folder):
        total = total_rows(folder)
        if total is None or any(missing_rows(folder, [range(total)])):
            return False
        try:
            with claim(folder, "complete", forever=True):
                if not is_complete(folder):
                    _write_set(folder, total)
        except FileNotFoundError:  # another process has made the set, and removed the lock
            if not is_complete(folder):
                raise
    for left in (folder / PARTS, *folder.glob(".unfinished-*")):  # by processes that were killed
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    return True


def _write_set(folder: Path, total: int) -> None:
    """Write the files of a complete set from its shards."""
    unreadable = unreadable_of(folder)
    record = replace(
        FeatureRecord.of(read_json(folder / SETTINGS)),
        rows=total - len(unreadable),
        source_rows=total,
        unreadable=len(unreadable),
    )
    if not record.rows:
        why = f"; {unreadable[0].image_id}: {unreadable[0].error}" if unreadable else ""
        raise ValueError(f"source: not one of its images gave features{why}")
    split = record.source.get("split")
    description = json.dumps(record.to_dict())
    shards = concatenate_datasets([Dataset.from_file(str(one.path)) for one in shards_in(folder)])
    dataset = Dataset(
        shards.data,
        DatasetInfo(description=description, features=shards.features),
        NamedSplit(split) if split and _SPLIT.fullmatch(split) else None,
        # By default it would depend on how the rows were divided into shards.
        fingerprint=hashlib.sha256(description.encode()).hexdigest()[:16],
    )
    made = unfinished(folder)
    with _without_progress_bars():
        dataset.save_to_disk(made, max_shard_size=_LARGEST_FILE)
    paths = sorted(made.iterdir())
    files = {path.name: File(path.stat().st_size, sha256_of(path)) for path in paths}
    for path in paths:
        put(path, folder / path.name)
    Contents(record, files, unreadable).write(folder)


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def files_of(folder: Path) -> dict[str, File]:
    """Return the files of a set, complete or in the making, by their names in the folder."""
    if is_complete(folder):
        return Contents.read(folder).files
    return {
        f"{PARTS}/{shard.path.name}": File(shard.path.stat().st_size, shard.sha256)
        for shard in shards_in(folder)
    }


def damaged(folder: Path) -> list[str]:
    """Return what is missing, cut or altered in a complete set. Data is judged by its size."""
    return _problems(folder, lambda path: path.suffix == ".json", lambda _: None)


def verify(
    folder: str | os.PathLike[str], advance: Callable[[int], Any] = lambda _: None
) -> list[str]:
    """Compare a folder's files with their checksums.

    Args:
        folder: a feature set, complete or in the making.
        advance: called with the size of each file, once it is compared.

    Returns:
        One line for each file that is missing, cut or altered; an empty list if all is well.

    Raises:
        FileNotFoundError: there is no feature set.
        ValueError: the file that holds the checksums was cut or overwritten.
    """
    folder = as_path(folder, "folder")
    _require_settings(folder, "folder")
    return _problems(folder, lambda _: True, advance)


def _problems(
    folder: Path, reads: Callable[[Path], bool], advance: Callable[[int], Any]
) -> list[str]:
    problems = []
    for name, file in files_of(folder).items():
        path = folder / name
        if problem := file.problem_of(path, read=reads(path)):
            problems.append(f"{name}: {problem}")
        advance(file.bytes)
    return problems


def repair(folder: Path) -> None:
    """Delete what is damaged, so that an extraction makes it again: a shard, or a complete set."""
    if not is_complete(folder):
        for problem in verify(folder):
            (folder / problem.split(":")[0]).unlink()
    elif damaged(folder):
        with claim(folder, "complete", forever=True):
            if is_complete(folder) and (problems := damaged(folder)):  # no process was quicker
                logger.warning("%s is damaged (%s); making all of it again", folder, problems[0])
                files = Contents.read(folder).files
                for name in (RECORD, *files):
                    (folder / name).unlink(missing_ok=True)


def join(folder: str | os.PathLike[str], others: Iterable[str | os.PathLike[str]]) -> bool:
    """Copy what other machines extracted from the same source into one folder.

    Args:
        folder: a new one, or one that was begun with the same settings.
        others: folders of feature sets that are not complete.

    Returns:
        Whether the set in the folder is complete now.

    Raises:
        FileNotFoundError: there is no feature set in one of the others.
        SettingsError: the folders have different settings.
        ValueError: one of the others is complete, or a file differs from its checksum.
        BusyError: another process is completing the set.
    """
    folder = as_path(folder, "folder")
    given = [as_path(one, "others") for one in as_list(others, "others")]
    if not given:
        raise ValueError("others: expected at least one folder, got none")
    for other in given:
        _require_settings(other, "others")
        if is_complete(other):
            raise ValueError(f"others: {other} is complete already; open it as it is")
        begin(folder, FeatureRecord.of(read_json(other / SETTINGS)))
        if is_complete(folder):
            continue
        (folder / PARTS).mkdir(exist_ok=True)
        for shard in shards_in(other):
            made = unfinished(folder)
            shutil.copyfile(shard.path, made)
            if not sha256_of(made).startswith(shard.sha256):
                made.unlink()
                raise ValueError(
                    f"others: {shard.path} differs from its checksum; run its extraction again"
                )
            put(made, folder / PARTS / shard.path.name)
        if (total := total_rows(other)) is not None:
            note_total(folder, total)
    return complete(folder)


def _require_settings(folder: Path, argument: str) -> None:
    if not (folder / SETTINGS).exists():
        raise FileNotFoundError(f"{argument}: no feature dataset in {folder}: it has no {SETTINGS}")


def write_json(folder: Path, name: str, content: Any) -> None:
    """Write a file of JSON into a folder, so that it is there whole or not at all."""
    made = unfinished(folder)
    made.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    put(made, folder / name)


def read_json(path: Path) -> Any:
    """Read a file of settings or of a record.

    Raises:
        ValueError: it was cut or overwritten.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path} was cut or overwritten ({error}); delete it and run the extraction again"
        ) from error

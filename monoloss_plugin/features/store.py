"""The folder of a feature set: how it is written, completed, checked, repaired and joined.

While an extraction runs, the folder holds::

    extraction.json                       the settings: encoder, source, dtype, width
    parts/0000000000-0000004096.arrow     a shard: the features of source rows 0 to 4,095
    parts/0000000000-0000004096.json      its record: rows, bytes, SHA-256, images left out
    parts/total.json                      the number of rows in the source, once it is known
    parts/share-0-of-2.lock               locked by the process that works on this share

When the shards cover every row, they become one dataset, and ``parts/`` goes::

    extraction.json
    data-00000-of-00002.arrow, ...        the rows, in the order of the source
    state.json, dataset_info.json         what ``datasets.load_from_disk`` reads first
    features.json                         the set's record, and a checksum of every other file

Four rules keep the folder sound:

- Every file appears whole, by a rename. A shard exists once its record does, and the set is
  complete once ``features.json`` exists; both are written last. So a process may be killed at any
  moment. It loses the shard that it was collecting, and nothing else.
- What is left to do is never noted. It is the gaps between the shards. Of two shards that overlap,
  the one that starts later is ignored. So processes need not agree on how they divide the work.
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
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from datasets import (
    ClassLabel,
    Dataset,
    DatasetInfo,
    Features,
    NamedSplit,
    Value,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from datasets import Sequence as Lists

from monoloss_plugin._checks import as_list
from monoloss_plugin._places import as_path
from monoloss_plugin.features.record import FeatureRecord

SETTINGS, RECORD = "extraction.json", "features.json"
STATE, INFO = "state.json", "dataset_info.json"

_PARTS, _TOTAL = "parts", "total.json"
_FORMAT = 2
_LARGEST_SHARD = 4_096
"""Rows of a shard at most, since it is collected in memory."""
_LARGEST_FILE = 500 << 20
"""About as many bytes a data file of a complete set."""
_READ = 1 << 20
_SPLIT = re.compile(r"\w+(\.\w+)*")
"""Names of splits that ``datasets`` accepts."""

logger = logging.getLogger(__name__)


class SettingsError(ValueError):
    """The folder was begun with other settings, or it holds something else."""


class BusyError(RuntimeError):
    """Another process is doing the same work."""


@dataclass(frozen=True)
class Unreadable:
    """An image that was left out."""

    row: int
    """Its row in the source."""
    image_id: str
    error: str


@dataclass(frozen=True)
class Shard:
    """A file of features, and the rows of the source that it stands for."""

    start: int
    """The first row of the source."""
    stop: int
    """The row after the last one."""
    rows: int
    """Number of rows in the file: those of the source without the unreadable ones."""
    bytes: int
    sha256: str
    unreadable: list[Unreadable] = field(default_factory=list)

    @property
    def part(self) -> str:
        """Path of the file in the folder until the set is complete."""
        return part_name(self.start, self.stop)

    @classmethod
    def of_file(
        cls, path: Path, start: int, stop: int, rows: int, unreadable: list[Unreadable]
    ) -> Shard:
        """Describe a file that was written."""
        return cls(start, stop, rows, path.stat().st_size, sha256_of(path), unreadable)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Shard:
        """Make a shard from JSON's types."""
        unreadable = [Unreadable(**one) for one in content["unreadable"]]
        return cls(**{**content, "unreadable": unreadable})


def part_name(start: int, stop: int) -> str:
    """Return the path of a shard's file in the folder until the set is complete."""
    return f"{_PARTS}/{start:010d}-{stop:010d}.arrow"


@dataclass(frozen=True)
class Contents:
    """What ``features.json`` says of a complete set."""

    record: FeatureRecord
    shards: dict[str, Shard]
    """The data files by name, in order."""
    sha256: dict[str, str]
    """Checksums of the files that ``datasets`` reads first."""

    @classmethod
    def read(cls, folder: Path) -> Contents:
        """Read them from a complete folder.

        Raises:
            ValueError: the file was cut or overwritten, or has another version's format.
        """
        content = read_json(folder / RECORD)
        if content.get("format") != _FORMAT:
            raise ValueError(
                f"{folder} was written by another version of monoloss_plugin; extract it again, or "
                "open it with FeatureSet(datasets.load_from_disk(folder))"
            )
        shards = {name: Shard.of(one) for name, one in content["shards"].items()}
        return cls(FeatureRecord.of(content), shards, content["sha256"])

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the file."""
        shards = {name: asdict(shard) for name, shard in self.shards.items()}
        record = {"format": _FORMAT, **self.record.to_dict()}
        return {**record, "shards": shards, "sha256": self.sha256}


def begin(folder: Path, settings: FeatureRecord) -> None:
    """Claim a new folder for some settings, or check that it was begun with the same.

    Raises:
        SettingsError: it was begun with others, or it holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    given = json.loads(json.dumps({"format": _FORMAT, **settings.to_dict()}))
    # Listed before the settings are looked for: another process may begin the same set now.
    others = [one for one in folder.iterdir() if not one.name.startswith(".") and one != path]
    if not path.exists():
        if others:
            raise SettingsError(f"out: {folder} holds something else; give an empty or new folder")
        _write_json(path, given, "settings")
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
    if (folder / _PARTS).is_symlink():
        raise SettingsError(f"out: {folder / _PARTS} is a link, which is not followed; delete it")


def _differences(there: Any, given: Any, name: str = "") -> Iterable[str]:
    if isinstance(there, dict) and isinstance(given, dict):
        for key in sorted(there.keys() | given.keys()):
            yield from _differences(there.get(key), given.get(key), f"{name}.{key}".strip("."))
    elif there != given:
        yield f"{name}: {there!r} there, {given!r} now"


@contextlib.contextmanager
def claim(folder: Path, task: str, *, wait: bool = False) -> Iterator[None]:
    """Do a task in a folder while no other process does the same one.

    The system gives the lock back when a process ends, even when it is killed. Where it has no
    locks, as on some network file systems, nothing is checked.

    Args:
        folder: of the set.
        task: a name for it, such as ``share-0-of-2``.
        wait: until another process has done it, instead of raising an error.

    Raises:
        BusyError: another process is at it.
    """
    parts = folder / _PARTS
    parts.mkdir(exist_ok=True)
    path = parts / f"{task}.lock"
    if path.is_symlink():
        raise ValueError(f"{path} is a link, which is not followed; delete it")
    with open(path, "ab") as file:
        if _is_locked(file, wait):  # then what has this task's name is a killed process's
            for left in parts.glob(f".{task}-*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield


def _is_locked(file: BinaryIO, wait: bool) -> bool:
    """Lock a file for this process, and say whether the system could."""
    try:
        import fcntl
    except ModuleNotFoundError:
        return False
    try:
        # A lock of the process, unlike flock's: worker processes that outlive it hold none.
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        raise BusyError(
            f"another process holds {file.name}; stop it first, or give each process its own share"
        ) from error
    except OSError:
        return False
    return True


def features_schema(width: int, dtype: str, labelled: bool, classes: list[str] | None) -> Features:
    """Return the columns of a feature set: features, label where there is one, image_id."""
    columns: dict[str, Any] = {"features": Lists(Value(dtype), length=width)}
    if labelled:
        columns["label"] = ClassLabel(names=classes) if classes is not None else Value("int64")
    return Features({**columns, "image_id": Value("string")})


def fixed_lists(features: np.ndarray[Any, Any]) -> pa.FixedSizeListArray:
    """Return vectors (B, d) as an Arrow column, without a copy."""
    return pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])


class ShardWriter:
    """Collects consecutive rows, and saves them as a shard now and then.

    Args:
        folder: of the set.
        task: what this process has claimed.
        schema: the columns.
        save_every: seconds of work that a killed process may lose.
    """

    def __init__(self, folder: Path, task: str, schema: Features, save_every: float) -> None:
        self.folder, self._task, self._save_every = folder, task, save_every
        self.width: int = schema["features"].length
        self._schema = schema.arrow_schema
        self._batches: list[tuple[range, pa.RecordBatch, Sequence[Unreadable]]] = []
        self._saved = time.perf_counter()

    def add(
        self,
        rows: range,
        features: np.ndarray[Any, Any],
        labels: Sequence[int | None],
        ids: Sequence[str],
        unreadable: Sequence[Unreadable] = (),
    ) -> None:
        """Add a batch.

        Args:
            rows: of the source. If they do not follow the rows before, a new shard begins.
            features: (B, d) of the images that could be read.
            labels: (B,) of the same images.
            ids: (B,) of the same images.
            unreadable: the other images.
        """
        if self._batches and rows.start != self._batches[-1][0].stop:
            self.save()
        columns = {"features": fixed_lists(features), "image_id": pa.array(ids, pa.string())}
        if "label" in self._schema.names:
            columns["label"] = pa.array([-1 if y is None else y for y in labels], pa.int64())
        arrays = [columns[name] for name in self._schema.names]
        batch = pa.record_batch(arrays, schema=self._schema)
        self._batches.append((rows, batch, unreadable))  # at once, so that a Ctrl-C splits nothing
        waited = time.perf_counter() - self._saved
        if waited >= self._save_every or rows.stop - self._batches[0][0].start >= _LARGEST_SHARD:
            self.save()

    def save(self) -> None:
        """Save what was added since the last time. If the set is complete by now, do nothing."""
        if not self._batches or is_complete(self.folder):
            return
        start, stop = self._batches[0][0].start, self._batches[-1][0].stop
        path = self.folder / part_name(start, stop)
        table = pa.Table.from_batches([batch for _, batch, _ in self._batches]).combine_chunks()
        with (
            _replacing(path, self._task) as file,
            pa.ipc.new_stream(file, self._schema) as stream,
        ):
            stream.write_table(table)
        unreadable = [one for *_, unreadable in self._batches for one in unreadable]
        shard = Shard.of_file(path, start, stop, table.num_rows, unreadable)
        _write_record(self.folder, shard, self._task)
        self._batches, self._saved = [], time.perf_counter()


def note_total(folder: Path, rows: int) -> None:
    """Write down how many rows the source has, if that is not known yet."""
    if total_rows(folder) is None:
        _write_json(folder / _PARTS / _TOTAL, rows, "total")


def total_rows(folder: Path) -> int | None:
    """Return how many rows the source has; None if no process has seen its end."""
    with contextlib.suppress(FileNotFoundError):
        return int(read_json(folder / _PARTS / _TOTAL))
    return Contents.read(folder).record.source_rows if is_complete(folder) else None


def recorded_shards(folder: Path) -> dict[str, Shard]:
    """Return every shard that has a record, by the path of its file in the folder."""
    shards = []
    for path in sorted((folder / _PARTS).glob("*-*.json")):
        with contextlib.suppress(FileNotFoundError):  # another process completes the set
            shards.append(Shard.of(read_json(path)))
    # Looked for last: the shards' own records are there until it is.
    if is_complete(folder):
        return Contents.read(folder).shards
    return {shard.part: shard for shard in shards}


def finished_shards(folder: Path) -> list[Shard]:
    """Return the shards whose files are there in full, in order, without those that overlap."""
    finished: list[Shard] = []
    for name, shard in sorted(recorded_shards(folder).items(), key=lambda one: one[1].start):
        overlaps = bool(finished) and shard.start < finished[-1].stop
        if not overlaps and _size_of(folder / name) == shard.bytes:
            finished.append(shard)
    return finished


def missing_rows(shards: Sequence[Shard], spans: Iterable[range]) -> Iterator[range]:
    """Yield the parts of some spans that no shard covers.

    Args:
        shards: in order, without overlap.
        spans: of source rows, in order; there may be no end of them.
    """
    for span in spans:
        at = span.start
        for shard in shards:
            if shard.start >= span.stop:
                break
            if shard.start > at:
                yield range(at, shard.start)
            at = max(at, shard.stop)
        if at < span.stop:
            yield range(at, span.stop)


def is_complete(folder: Path) -> bool:
    """Say whether a folder is a complete feature set."""
    return (folder / RECORD).exists()


def complete(folder: Path) -> bool:
    """Make the set if its shards cover every row, and say whether it is complete.

    Raises:
        ValueError: not one image could be read.
    """
    if not is_complete(folder):
        total = total_rows(folder)
        if total is None or any(missing_rows(finished_shards(folder), [range(total)])):
            return False
        with claim(folder, "complete", wait=True):
            if not is_complete(folder):
                _save_dataset(folder, total)
    shutil.rmtree(folder / _PARTS, ignore_errors=True)
    for left in folder.glob(".settings-*"):
        left.unlink(missing_ok=True)
    return True


def _save_dataset(folder: Path, total: int) -> None:
    """Write the files of a complete set from its shards."""
    shards = finished_shards(folder)
    record = replace(
        FeatureRecord.of(read_json(folder / SETTINGS)),
        rows=sum(shard.rows for shard in shards),
        source_rows=total,
        unreadable=sum(len(shard.unreadable) for shard in shards),
    )
    if not record.rows:
        raise ValueError("source: not one of its images could be read")
    groups = _grouped(shards)
    with pa.OSFile(str(folder / shards[0].part)) as part:
        schema = pa.ipc.open_stream(part).schema
    saved = folder / _PARTS / f".complete-{uuid.uuid4().hex[:8]}"
    _save_empty_dataset(saved, schema, record, len(groups), [shard.sha256 for shard in shards])
    files = {}
    for path, group in zip(sorted(saved.glob("data-*.arrow")), groups, strict=True):
        files[path.name] = _merge_shards(folder, group, schema, path)
    sha256 = {name: sha256_of(saved / name) for name in (STATE, INFO)}
    _write_json(saved / RECORD, Contents(record, files, sha256).to_dict(), "complete")
    for old in folder.glob("data-*.arrow"):  # of a set that was damaged
        old.unlink()
    for name in (*files, STATE, INFO, RECORD):
        _put(saved / name, folder / name)


def _grouped(shards: Iterable[Shard]) -> list[list[Shard]]:
    """Return shards in groups: each becomes one file."""
    groups: list[list[Shard]] = []
    size = 0
    for shard in shards:
        if not groups or size + shard.bytes > _LARGEST_FILE:
            groups.append([])
            size = 0
        groups[-1].append(shard)
        size += shard.bytes
    return groups


def _save_empty_dataset(
    folder: Path, schema: pa.Schema, record: FeatureRecord, files: int, shards: list[str]
) -> None:
    """Let ``datasets`` write the folder of a dataset, with data files that are still empty."""
    description = json.dumps(record.to_dict())
    split = record.source.get("split")
    empty = Dataset(
        schema.empty_table(),
        DatasetInfo(description=description, features=Features.from_arrow_schema(schema)),
        NamedSplit(split) if split and _SPLIT.fullmatch(split) else None,
        fingerprint=hashlib.sha256("".join(shards).encode()).hexdigest()[:16],
    )
    with contextlib.ExitStack() as afterwards:
        if not are_progress_bars_disabled():
            disable_progress_bars()
            afterwards.callback(enable_progress_bars)
        empty.save_to_disk(folder, num_shards=files)


def _merge_shards(folder: Path, shards: Sequence[Shard], schema: pa.Schema, path: Path) -> Shard:
    """Write shards one after another into a file. Only one batch at a time is in memory."""
    with pa.ipc.new_stream(str(path), schema) as stream:
        for shard in shards:
            with pa.OSFile(str(folder / shard.part)) as part:
                for batch in pa.ipc.open_stream(part):
                    stream.write_batch(batch)
    unreadable = [one for shard in shards for one in shard.unreadable]
    rows = sum(shard.rows for shard in shards)
    return Shard.of_file(path, shards[0].start, shards[-1].stop, rows, unreadable)


def damaged(folder: Path, checksum: Callable[[Path], str] | None = None) -> list[str]:
    """Return what is missing, cut or altered in a folder, a line for each file.

    Args:
        folder: of the set.
        checksum: computes those of the data files. Without it they are judged by their size.
    """
    problems = []
    if is_complete(folder):
        for name, sha256 in Contents.read(folder).sha256.items():
            if not (folder / name).exists():
                problems.append(f"{name}: missing")
            elif sha256_of(folder / name) != sha256:
                problems.append(f"{name}: altered, its checksum differs")
    for name, shard in recorded_shards(folder).items():
        size = _size_of(folder / name)
        if size is None:
            problems.append(f"{name}: missing")
        elif size != shard.bytes:
            problems.append(f"{name}: {size} bytes instead of {shard.bytes}")
        elif checksum is not None and checksum(folder / name) != shard.sha256:
            problems.append(f"{name}: altered, its checksum differs")
    return sorted(problems)


def verify(
    folder: str | os.PathLike[str], advance: Callable[[int], Any] = lambda _: None
) -> list[str]:
    """Compare a folder's files with their checksums.

    Args:
        folder: a feature set, complete or in the making.
        advance: called with the number of bytes read.

    Returns:
        One line for each file that is missing, cut or altered; an empty list if all is well.

    Raises:
        FileNotFoundError: there is no feature set.
        ValueError: a file that holds the checksums was cut or overwritten.
    """
    folder = as_path(folder, "folder")
    _require_settings(folder, "folder")
    return damaged(folder, lambda path: sha256_of(path, advance))


def reopen_damaged(folder: Path) -> None:
    """If a complete set is damaged, make shards of its undamaged files, to be completed again."""
    if not (is_complete(folder) and damaged(folder)):
        return
    with claim(folder, "complete", wait=True):
        if not (is_complete(folder) and damaged(folder)):  # another process was quicker
            return
        contents = Contents.read(folder)
        _write_json(folder / _PARTS / _TOTAL, contents.record.source_rows, "complete")
        for name, shard in contents.shards.items():
            if _size_of(folder / name) == shard.bytes:
                _write_record(folder, shard, "complete")
                os.replace(folder / name, folder / shard.part)
        (folder / RECORD).unlink()


def join(folder: str | os.PathLike[str], others: Iterable[str | os.PathLike[str]]) -> bool:
    """Copy into one folder what other folders with the same settings have of the features.

    Args:
        folder: where the shards go; a new one, or one with the same settings.
        others: folders of feature sets, complete or in the making.

    Returns:
        Whether the folder is complete now.

    Raises:
        FileNotFoundError: there is no feature set in one of the others.
        SettingsError: the folders have different settings.
        ValueError: a file differs from its checksum.
        BusyError: another process is joining into this folder.
    """
    folder = as_path(folder, "folder")
    given = [as_path(one, "others") for one in as_list(others, "others")]
    if not given:
        raise ValueError("others: expected at least one folder, got none")
    for other in given:
        _require_settings(other, "others")
        begin(folder, FeatureRecord.of(read_json(other / SETTINGS)))
        if is_complete(folder):
            continue
        with claim(folder, "join"):
            finished = finished_shards(folder)
            for name, shard in recorded_shards(other).items():
                if any(missing_rows(finished, [range(shard.start, shard.stop)])):
                    _copy_shard(other / name, folder, shard)
            if (total := total_rows(other)) is not None:
                note_total(folder, total)
    return complete(folder)


def _copy_shard(path: Path, folder: Path, shard: Shard) -> None:
    """Copy a shard's file into a folder.

    Raises:
        ValueError: the file differs from its checksum.
    """
    copy = folder / shard.part
    with path.open("rb") as original, _replacing(copy, "join") as file:
        shutil.copyfileobj(original, file)
    if sha256_of(copy) != shard.sha256:  # without a record, the copy does not count
        raise ValueError(
            f"{path} differs from its checksum; delete it and run its extraction again"
        )
    _write_record(folder, shard, "join")


def _require_settings(folder: Path, argument: str) -> None:
    if not (folder / SETTINGS).exists():
        raise FileNotFoundError(f"{argument}: no feature dataset in {folder}: it has no {SETTINGS}")


def sha256_of(path: Path, advance: Callable[[int], Any] = lambda _: None) -> str:
    """Return the SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as content:
        while part := content.read(_READ):
            digest.update(part)
            advance(len(part))
    return digest.hexdigest()


def _size_of(path: Path) -> int | None:
    """Return a file's size; None if there is no file."""
    return path.stat().st_size if path.is_file() else None


@contextlib.contextmanager
def _replacing(path: Path, task: str) -> Iterator[BinaryIO]:
    """Open a file that gets its name when all of it is on disk. What had the name is replaced."""
    made = path.parent / f".{task}-{uuid.uuid4().hex[:8]}"
    with open(made, "xb") as file:
        yield file
    _put(made, path)


def _put(made: Path, path: Path) -> None:
    """Give a file another name once all of it is on disk."""
    with made.open("r+b") as content:
        os.fsync(content.fileno())
    os.replace(made, path)


def _write_json(path: Path, content: Any, task: str) -> None:
    with _replacing(path, task) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def _write_record(folder: Path, shard: Shard, task: str) -> None:
    _write_json((folder / shard.part).with_suffix(".json"), asdict(shard), task)


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

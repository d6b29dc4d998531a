"""The folder of a feature set: how it is written, completed, checked, repaired and joined.

While an extraction runs, the folder holds::

    extraction.json                              the settings: encoder, source, dtype, width
    parts/0000000000-0000004096-7c39a0e1.arrow   a shard: the features of source rows 0 to 4,095
    parts/total.json                             the number of rows in the source, once known
    parts/share-0-of-2.lock                      locked by the process that works on this share
    .unfinished-*                                what a process is writing at the moment

A shard's name ends in the beginning of its SHA-256. Images that could not be read are listed in the
schema of its Arrow table. When the shards cover every row, ``datasets`` writes them as one dataset,
and ``parts/`` goes::

    extraction.json
    data-00000-of-00002.arrow, ...               the rows, in the order of the source
    state.json, dataset_info.json                what ``datasets.load_from_disk`` reads first
    features.json                                the set's record, and a checksum of every file

Four rules keep the folder sound:

- Every file appears whole, by a rename, and ``features.json`` comes last. So a process may be
  killed at any moment. It loses the shard that it was collecting, and nothing else.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

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
    concatenate_datasets,
    disable_progress_bars,
    enable_progress_bars,
)
from datasets import List as Lists
from filelock import FileLock, Timeout
from huggingface_hub.utils.sha import sha_fileobj

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
"""Bytes of a data file at most."""
_NAME = re.compile(r"(\d{10})-(\d{10})-([0-9a-f]{8})\.arrow")
_SPLIT = re.compile(r"\w+(\.\w+)*")
"""Names of splits that ``datasets`` accepts."""
_UNREADABLE = b"unreadable"
_WAIT = 6.0
"""Seconds to wait for a lock: the workers of a killed process may hold it for 5 seconds more."""

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
    """Consecutive rows of the source that were encoded."""

    rows: range
    """Rows of the source."""
    table: pa.Table
    """The features of the rows that could be read, mapped from a file."""
    unreadable: list[Unreadable]
    """The other rows."""


@dataclass(frozen=True)
class Progress:
    """How much of a set there is."""

    rows: int
    """Number of rows with features."""
    unreadable: list[Unreadable]
    """Images that were left out."""


@dataclass(frozen=True)
class DataFile:
    """What ``features.json`` says of another file of a complete set."""

    bytes: int
    sha256: str
    rows: int = 0
    """Rows of the dataset in it."""


@dataclass(frozen=True)
class Contents:
    """What ``features.json`` says of a complete set."""

    record: FeatureRecord
    files: dict[str, DataFile]
    """Every other file by its name, the data files in order."""
    unreadable: list[Unreadable] = field(default_factory=list)

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
        files = {name: DataFile(**file) for name, file in content["files"].items()}
        unreadable = [Unreadable(**one) for one in content["left_out"]]
        return cls(FeatureRecord.of(content), files, unreadable)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the file."""
        files = {name: asdict(file) for name, file in self.files.items()}
        left_out = [asdict(one) for one in self.unreadable]
        return {"format": _FORMAT, **self.record.to_dict(), "files": files, "left_out": left_out}


def begin(folder: Path, settings: FeatureRecord) -> None:
    """Claim a new folder for some settings, or check that it was begun with the same.

    Raises:
        SettingsError: it was begun with others, or it holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / _PARTS).is_symlink():
        raise SettingsError(f"out: {folder / _PARTS} is a link, which is not followed; delete it")
    path = folder / SETTINGS
    given = json.loads(json.dumps({"format": _FORMAT, **settings.to_dict()}))
    # Listed before the settings are looked for: another process may begin the same set now.
    others = [one for one in folder.iterdir() if not one.name.startswith(".") and one != path]
    if not path.exists():
        if others:
            raise SettingsError(f"out: {folder} holds something else; give an empty or new folder")
        _write_json(folder, SETTINGS, given)
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
def claim(folder: Path, task: str) -> Iterator[None]:
    """Do a task in a folder while no other process does the same one.

    The system gives the lock back when a process ends, even when it is killed.

    Args:
        folder: of the set.
        task: a name for it, such as ``share-0-of-2``.

    Raises:
        BusyError: another process is at it.
    """
    path = folder / _PARTS / f"{task}.lock"
    path.parent.mkdir(exist_ok=True)
    if path.is_symlink():
        raise ValueError(f"{path} is a link, which is not followed; delete it")
    try:
        lock = FileLock(path, timeout=_WAIT).acquire()
    except Timeout as error:
        raise BusyError(
            f"another process holds {path}; stop it first, or give each process its own share"
        ) from error
    with lock:
        yield


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
        schema: the columns.
        save_every: seconds of work that a killed process may lose.
    """

    def __init__(self, folder: Path, schema: Features, save_every: float) -> None:
        self.folder, self._save_every = folder, save_every
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
        rows = range(self._batches[0][0].start, self._batches[-1][0].stop)
        table = pa.Table.from_batches([batch for _, batch, _ in self._batches])
        unreadable = [one for *_, unreadable in self._batches for one in unreadable]
        write_shard(self.folder, Shard(rows, table, unreadable))
        self._batches, self._saved = [], time.perf_counter()


def write_shard(folder: Path, shard: Shard) -> None:
    """Write a shard of a set in the making."""
    listed = json.dumps([asdict(one) for one in shard.unreadable]).encode()
    table = shard.table.combine_chunks().replace_schema_metadata(
        {**(shard.table.schema.metadata or {}), _UNREADABLE: listed}
    )
    made = _unfinished(folder)
    with pa.OSFile(str(made), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    start, stop = shard.rows.start, shard.rows.stop
    _put(made, folder / _PARTS / f"{start:010d}-{stop:010d}-{sha256_of(made)[:8]}.arrow")


def read_shard(path: Path) -> Shard:
    """Read a shard of a set in the making, mapped from its file."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        table = stream.read_all()
    listed = json.loads(table.schema.metadata[_UNREADABLE])
    return Shard(rows_of(path), table, [Unreadable(**one) for one in listed])


def rows_of(path: Path) -> range:
    """Return the source rows of a shard in the making."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return range(int(match[1]), int(match[2]))


def finished_shards(folder: Path) -> list[Path]:
    """Return the files of the shards in the making, in order, without those that overlap."""
    finished: list[Path] = []
    for path in sorted((folder / _PARTS).glob("*.arrow")):
        is_shard = _NAME.fullmatch(path.name) and path.is_file() and not path.is_symlink()
        if is_shard and (not finished or rows_of(path).start >= rows_of(finished[-1]).stop):
            finished.append(path)
    return finished


def note_total(folder: Path, rows: int) -> None:
    """Write down how many rows the source has, if that is not known yet."""
    if total_rows(folder) is None:
        _write_json(folder, f"{_PARTS}/{_TOTAL}", rows)


def total_rows(folder: Path) -> int | None:
    """Return how many rows the source has; None if no process has seen its end."""
    with contextlib.suppress(FileNotFoundError):
        return int(read_json(folder / _PARTS / _TOTAL))
    return Contents.read(folder).record.source_rows if is_complete(folder) else None


def progress_of(folder: Path) -> Progress:
    """Return how much of a set there is."""
    if is_complete(folder):
        contents = Contents.read(folder)
        return Progress(contents.record.rows or 0, contents.unreadable)
    paths = finished_shards(folder)
    unreadable = [one for path in paths for one in read_shard(path).unreadable]
    return Progress(sum(len(rows_of(path)) for path in paths) - len(unreadable), unreadable)


def missing_rows(folder: Path, spans: Iterable[range]) -> Iterator[range]:
    """Yield the parts of some spans of source rows that no shard covers.

    Args:
        folder: of a set in the making.
        spans: in order; there may be no end of them.
    """
    finished = [rows_of(path) for path in finished_shards(folder)]
    for span in spans:
        at = span.start
        for rows in finished:
            if rows.start >= span.stop:
                break
            if rows.start > at:
                yield range(at, rows.start)
            at = max(at, rows.stop)
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
        if total is None or any(missing_rows(folder, [range(total)])):
            return False
        with claim(folder, "complete"):
            if not is_complete(folder):
                _save_dataset(folder, total)
    for left in (folder / _PARTS, *folder.glob(".unfinished-*")):  # by processes that were killed
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    return True


def _save_dataset(folder: Path, total: int) -> None:
    """Write the files of a complete set from its shards."""
    paths = finished_shards(folder)
    shards = [read_shard(path) for path in paths]
    unreadable = [one for shard in shards for one in shard.unreadable]
    record = replace(
        FeatureRecord.of(read_json(folder / SETTINGS)),
        rows=sum(len(shard.table) for shard in shards),
        source_rows=total,
        unreadable=len(unreadable),
    )
    if not record.rows:
        raise ValueError("source: not one of its images could be read")
    split = record.source.get("split")
    schema = Features.from_arrow_schema(shards[0].table.schema)
    description = json.dumps(record.to_dict())
    dataset = Dataset(
        concatenate_datasets([Dataset.from_file(str(path)) for path in paths]).data,
        DatasetInfo(description=description, features=schema),
        NamedSplit(split) if split and _SPLIT.fullmatch(split) else None,
        # By default it would depend on how the rows were divided into shards.
        fingerprint=hashlib.sha256(description.encode()).hexdigest()[:16],
    )
    made = _unfinished(folder)
    with _without_progress_bars():
        dataset.save_to_disk(made, max_shard_size=_LARGEST_FILE)
    files = {path.name: _describe(path) for path in sorted(made.iterdir())}
    for name in files:
        _put(made / name, folder / name)
    for old in folder.glob("data-*.arrow"):  # of a set that was damaged
        if old.name not in files:
            old.unlink()
    _write_json(folder, RECORD, Contents(record, files, unreadable).to_dict())


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _describe(path: Path) -> DataFile:
    rows = len(Dataset.from_file(str(path))) if path.suffix == ".arrow" else 0
    return DataFile(path.stat().st_size, sha256_of(path), rows)


def damaged(folder: Path) -> list[str]:
    """Return what is missing, cut or altered in a complete set. Data is judged by its size."""
    problems = []
    for name, file in Contents.read(folder).files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif not file.rows and sha256_of(path) != file.sha256:
            problems.append(f"{name}: altered, its checksum differs")
        elif path.stat().st_size != file.bytes:
            problems.append(f"{name}: {path.stat().st_size} bytes instead of {file.bytes}")
    return problems


def files_of(folder: Path) -> list[Path]:
    """Return the files that hold features, of a set that is complete or in the making."""
    if not is_complete(folder):
        return finished_shards(folder)
    return [folder / name for name, file in Contents.read(folder).files.items() if file.rows]


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
    contents = Contents.read(folder) if is_complete(folder) else None
    problems = damaged(folder) if contents else []
    bad = {problem.split(":")[0] for problem in problems}
    for path in files_of(folder):
        name = path.relative_to(folder).as_posix()
        if name not in bad:
            expected = contents.files[name].sha256 if contents else path.stem[-8:]
            if not sha256_of(path).startswith(expected):
                problems.append(f"{name}: altered, its checksum differs")
            advance(path.stat().st_size)
    return sorted(problems)


def repair(folder: Path) -> None:
    """Delete what is damaged, so that an extraction makes it again.

    Of a complete set, the undamaged files become shards in the making again.
    """
    if not is_complete(folder):
        for problem in verify(folder):
            (folder / problem.split(":")[0]).unlink()
    elif damaged(folder):
        with claim(folder, "complete"):
            if is_complete(folder) and damaged(folder):  # no other process was quicker
                for shard in _shards_of(folder):
                    write_shard(folder, shard)
                total = Contents.read(folder).record.source_rows
                _write_json(folder, f"{_PARTS}/{_TOTAL}", total)
                (folder / RECORD).unlink()


def _shards_of(folder: Path) -> Iterator[Shard]:
    """Yield what can be read of a set, complete or in the making, as shards."""
    if not is_complete(folder):
        yield from map(read_shard, finished_shards(folder))
        return
    contents = Contents.read(folder)
    total = contents.record.source_rows or 0
    readable = np.setdiff1d(np.arange(total), [one.row for one in contents.unreadable])
    ends = np.cumsum([contents.files[path.name].rows for path in files_of(folder)])
    bounds = [0, *readable[ends[:-1]].tolist(), total]
    for path, start, stop in zip(files_of(folder), bounds, bounds[1:], strict=False):
        if path.is_file() and path.stat().st_size == contents.files[path.name].bytes:
            unreadable = [one for one in contents.unreadable if start <= one.row < stop]
            yield Shard(range(start, stop), Dataset.from_file(str(path)).data.table, unreadable)


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
        if problems := verify(other):
            raise ValueError(
                f"others: {other / problems[0]}; delete it and run its extraction again"
            )
        with claim(folder, "join"):
            for shard in _shards_of(other):
                if any(missing_rows(folder, [shard.rows])):
                    write_shard(folder, shard)
            if (total := total_rows(other)) is not None:
                note_total(folder, total)
    return complete(folder)


def _require_settings(folder: Path, argument: str) -> None:
    if not (folder / SETTINGS).exists():
        raise FileNotFoundError(f"{argument}: no feature dataset in {folder}: it has no {SETTINGS}")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as content:
        return sha_fileobj(content).hex()


def _put(made: Path, path: Path) -> None:
    """Give a file its name once all of it is on disk. What had the name is replaced."""
    with made.open("r+b") as content:
        os.fsync(content.fileno())
    os.replace(made, path)


def _unfinished(folder: Path) -> Path:
    """Return a new name for a file or folder that is not finished."""
    return folder / f".unfinished-{uuid.uuid4().hex}"


def _write_json(folder: Path, name: str, content: Any) -> None:
    made = _unfinished(folder)
    made.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _put(made, folder / name)


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

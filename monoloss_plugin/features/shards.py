"""A feature dataset on disk, written so that it can be interrupted anywhere.

A folder holds rows of the source in shards of equal size::

    extraction.json     the settings; a run with others is refused
    data-00002.journal  a shard in the making: every batch so far, each with its checksum
    data-00001.arrow    a finished shard: one Arrow record batch
    data-00001.json     its record: rows, bytes, checksum, unreadable images
    source_rows.json    how many rows there are in all, once that is known
    state.json, dataset_info.json, features.json     written last, when every shard is there

``datasets.load_from_disk`` opens the finished folder. Every file but a journal appears whole or not
at all, by a rename; of a journal only its last, unfinished batch can be lost. Nothing is written
through a link that lies in the folder. Shards belong to
ranges of the source, so processes that take different ones share a folder without locks, and
whichever of them sees the last one finished completes the folder; doing so twice does no harm.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from monoloss_plugin._optional import missing_extra
from monoloss_plugin.features.journal import Journal

try:
    import numpy as np
    import pyarrow as pa
    from datasets import ClassLabel, Features, Value
    from datasets import Sequence as Rows
except ModuleNotFoundError as error:
    raise missing_extra(error, "hub") from error

SETTINGS, RECORD = "extraction.json", "features.json"
STATE, INFO = "state.json", "dataset_info.json"
SOURCE_ROWS = "source_rows.json"
_READ = 1 << 20
_UNFINISHED = re.compile(r"\..+\.unfinished-(?P<machine>.*)-(?P<process>\d+)-[0-9a-f]{8}")
"""Names of files that :func:`replacing` writes."""

logger = logging.getLogger(__name__)


class SettingsError(ValueError):
    """A folder was begun with other settings, or holds something else."""


@dataclass
class ShardRecord:
    """What is known of a finished shard."""

    number: int
    source_rows: int
    """Images of the source it covers, readable or not."""
    rows: int
    """Images in it."""
    bytes: int
    sha256: str
    unreadable: list[dict[str, Any]] = field(default_factory=list)
    """Row in the source, id and error of each image that could not be read."""

    @property
    def file(self) -> str:
        """Name of its file."""
        return f"{_stem(self.number)}.arrow"

    @property
    def record_file(self) -> str:
        """Name of the file that this record is kept in until the folder is complete."""
        return f"{_stem(self.number)}.json"


def features_schema(width: int, dtype: str, labelled: bool, classes: list[str] | None) -> Features:
    """Return the columns of a feature dataset: features, label where there is one, image_id."""
    columns: dict[str, Any] = {"features": Rows(Value(dtype), length=width)}
    if labelled:
        columns["label"] = ClassLabel(names=classes) if classes is not None else Value("int64")
    return Features({**columns, "image_id": Value("string")})


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Claim a folder for some settings, or see that it is theirs.

    Raises:
        SettingsError: it was begun with others, or holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    path = folder / SETTINGS
    others = [p for p in folder.iterdir() if not p.name.startswith(".") and p != path]
    if not path.exists():
        if others:
            raise SettingsError(f"out: {folder} holds something else; give an empty or new folder")
        write_json(path, settings)
    there = read_json(path)
    given = json.loads(json.dumps(settings))
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


def finished(folder: Path) -> dict[int, ShardRecord]:
    """Return the finished shards of a folder by number."""
    record = folder / RECORD
    listed = []
    for path in folder.glob("data-*.json"):
        with contextlib.suppress(FileNotFoundError):  # another process completes the folder
            listed.append(read_json(path))
    if record.exists():  # looked for last: until it is there, so are the shards' own records
        listed = read_json(record)["shards"]
    return {shard["number"]: ShardRecord(**shard) for shard in listed}


def is_finished(folder: Path, number: int) -> bool:
    """Say whether a shard is there, whoever has written it."""
    return (folder / f"{_stem(number)}.json").exists() or is_complete(folder)


def begun(folder: Path) -> list[int]:
    """Return the numbers of the shards that have a journal, in order."""
    return sorted(int(path.stem.split("-")[1]) for path in folder.glob("data-*.journal"))


def is_complete(folder: Path) -> bool:
    """Say whether a folder is a finished feature dataset."""
    return (folder / RECORD).exists()


class ShardWriter:
    """Writes one shard; goes on where an interrupted one stopped.

    Raises:
        BusyError: another process is writing it.
    """

    def __init__(self, folder: Path, number: int, schema: Features) -> None:
        self.folder, self.number = folder, number
        self.schema = schema.arrow_schema
        self.done = 0
        """Source rows that are written, or known to be unreadable."""
        self.unreadable: list[dict[str, Any]] = []
        self._batches: list[pa.RecordBatch] = []
        self._journal = Journal(folder / f"{_stem(number)}.journal")
        for batch, said in self._journal.read():
            self._take(batch, said)

    def add(
        self,
        features: np.ndarray[Any, Any],
        labels: Sequence[int | None],
        ids: Sequence[str],
        source_rows: int,
        unreadable: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Write a batch: features (B, d), and how many source rows it stands for."""
        columns = {"features": fixed_lists(features), "image_id": pa.array(ids, pa.string())}
        if "label" in self.schema.names:
            columns["label"] = pa.array([-1 if y is None else y for y in labels], pa.int64())
        batch = pa.record_batch([columns[n] for n in self.schema.names], schema=self.schema)
        said = {"source_rows": source_rows, "unreadable": list(unreadable)}
        self._journal.append(batch, said)
        self._take(batch, said)

    def finish(self) -> ShardRecord:
        """Turn the journal into a finished shard, in one record batch."""
        table = pa.Table.from_batches(self._batches, schema=self.schema)
        whole = table.combine_chunks().to_batches() or [
            pa.RecordBatch.from_pylist([], schema=self.schema)
        ]
        path = self.folder / f"{_stem(self.number)}.arrow"
        # Another process may have finished it in the meantime.
        with replacing(path, unless=lambda: is_finished(self.folder, self.number)) as sink:
            with pa.ipc.new_stream(sink, self.schema) as writer:
                for batch in whole:
                    writer.write_batch(batch)
            sink.flush()
            record = ShardRecord(
                number=self.number,
                source_rows=self.done,
                rows=table.num_rows,
                bytes=sink.tell(),
                sha256=sha256_of(Path(sink.name)),
                unreadable=self.unreadable,
            )
        if not is_finished(self.folder, self.number):
            write_json(self.folder / record.record_file, asdict(record))
        self._journal.remove()
        return record

    def discard(self) -> None:
        """Give the shard up: it is there already."""
        self._journal.remove()

    def close(self) -> None:
        """Leave the journal for another time."""
        self._journal.close()

    def _take(self, batch: pa.RecordBatch, said: dict[str, Any]) -> None:
        self._batches.append(batch)
        self.done += said["source_rows"]
        self.unreadable += said["unreadable"]


def note_source_rows(folder: Path, rows: int) -> None:
    """Write down how many rows the whole source has, once that is known."""
    if not is_complete(folder) and source_rows(folder) is None:
        write_json(folder / SOURCE_ROWS, rows)


def source_rows(folder: Path) -> int | None:
    """Return how many rows the whole source has; None where no process has seen its end."""
    for name in (SOURCE_ROWS, RECORD):
        with contextlib.suppress(FileNotFoundError):
            noted = read_json(folder / name)
            return int(noted if name == SOURCE_ROWS else noted["source_rows"])
    return None


def sha256_of(path: Path, advance: Callable[[int], Any] = lambda _: None) -> str:
    """Return the SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as content:
        while part := content.read(_READ):
            digest.update(part)
            advance(len(part))
    return digest.hexdigest()


def fixed_lists(features: np.ndarray[Any, Any]) -> pa.FixedSizeListArray:
    """Return vectors (B, d) as an Arrow column, without a copy."""
    return pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])


def _stem(number: int) -> str:
    return f"data-{number:05d}"


@contextlib.contextmanager
def replacing(path: Path, unless: Callable[[], bool] = lambda: False) -> Iterator[BinaryIO]:
    """Open a file that takes a name when it is whole and on disk, whatever had the name before.

    Args:
        path: the name.
        unless: asked at the end; where it says so, the name is left alone.
    """
    # Not the process's number alone: machines that share a folder may have the same.
    maker = f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    unfinished = path.with_name(f".{path.name}.unfinished-{maker}")
    try:
        with open(unfinished, "xb") as file:  # a link of that name would be an error
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not unless():
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def sweep(folder: Path, *, everything: bool = False) -> None:
    """Delete the unfinished files of this machine's killed processes, or everyone's."""
    for path in folder.glob(".*"):
        made = _UNFINISHED.fullmatch(path.name)
        if made and (
            everything
            or (made["machine"] == platform.node() and not _is_running(int(made["process"])))
        ):
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if os.name != "posix":  # elsewhere a look would end the process
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def write_json(path: Path, content: Any) -> None:
    """Write a file that is there whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a file that :func:`write_json` has written.

    Raises:
        ValueError: it was cut or overwritten.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path} was cut or overwritten ({error}); delete it and run the extraction again"
        ) from error

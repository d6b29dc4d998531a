"""A feature dataset as a whole: completed from its shards, repaired, joined and verified."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from monoloss_plugin._checks import as_list
from monoloss_plugin._optional import missing_extra
from monoloss_plugin._places import as_path
from monoloss_plugin.features.shards import (
    INFO,
    RECORD,
    SETTINGS,
    SOURCE_ROWS,
    STATE,
    begin,
    finished,
    is_complete,
    note_source_rows,
    read_json,
    replacing,
    sha256_of,
    source_rows,
    sweep,
    write_json,
)

try:
    import pyarrow as pa
    from datasets import Features
except ModuleNotFoundError as error:
    raise missing_extra(error, "hub") from error

_SPLIT = r"\w+(\.\w+)*"
"""What datasets takes for the name of a split."""


def complete(folder: Path) -> bool:
    """Complete a folder if every shard is there, and say whether it is complete.

    Raises:
        ValueError: there is not one row in it.
    """
    if not is_complete(folder) and not _write_rest(folder):
        return is_complete(folder)
    # What the shards' making has left, in this run and in killed ones.
    for pattern in ("data-*.json", "data-*.journal", SOURCE_ROWS):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    sweep(folder, everything=True)
    return True


def _write_rest(folder: Path) -> bool:
    """Write what comes last if every shard is there, and say whether it is."""
    settings = read_json(folder / SETTINGS)
    shards = finished(folder)
    rows = source_rows(folder)
    if rows is None or len(shards) < -(-rows // settings["shard_size"]):
        return False
    ordered = [shards[number] for number in sorted(shards)]
    if not any(shard.rows for shard in ordered):
        raise ValueError("source: not one of its images could be read")
    with pa.memory_map(str(folder / ordered[0].file)) as first:
        schema = Features.from_arrow_schema(pa.ipc.open_stream(first).schema)
    record = {**settings, "rows": sum(s.rows for s in ordered), "source_rows": rows}
    record["unreadable"] = sum(len(s.unreadable) for s in ordered)
    fingerprint = hashlib.sha256("".join(shard.sha256 for shard in ordered).encode())
    split = settings.get("source", {}).get("split")
    # What datasets itself writes in save_to_disk, for its load_from_disk.
    state: dict[str, Any] = {
        "_data_files": [{"filename": shard.file} for shard in ordered if shard.rows],
        "_fingerprint": fingerprint.hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split if split and re.fullmatch(_SPLIT, split) else None,
    }
    write_json(folder / STATE, state)
    info = {"description": json.dumps(record), "features": schema.to_dict()}
    write_json(folder / INFO, info)
    record["files"] = {name: sha256_of(folder / name) for name in (STATE, INFO)}
    write_json(folder / RECORD, {**record, "shards": [asdict(shard) for shard in ordered]})
    return True


def damaged(folder: Path) -> list[str]:
    """Return what is missing or altered in a complete folder; of shards, by their sizes."""
    written = read_json(folder / RECORD).get("files", {}) if is_complete(folder) else {}
    problems = []
    for name in (STATE, INFO):
        if not (folder / name).exists():
            problems.append(f"{name}: missing")
        elif name in written and sha256_of(folder / name) != written[name]:
            problems.append(f"{name}: altered, its checksum differs")
    for _, shard in sorted(finished(folder).items()):
        path = folder / shard.file
        if not path.exists():
            problems.append(f"{shard.file}: missing")
        elif path.stat().st_size != shard.bytes:
            problems.append(f"{shard.file}: {path.stat().st_size} bytes instead of {shard.bytes}")
    return problems


def reopen(folder: Path) -> None:
    """Make a complete folder incomplete again by the shards that are missing or cut short."""
    bad = {problem.split(":")[0] for problem in damaged(folder)}
    record = read_json(folder / RECORD)
    for shard in finished(folder).values():
        if shard.file not in bad:
            write_json(folder / shard.record_file, asdict(shard))
    write_json(folder / SOURCE_ROWS, record["source_rows"])
    (folder / RECORD).unlink(missing_ok=True)


def _require_settings(folder: Path, argument: str) -> None:
    if not (folder / SETTINGS).exists():
        raise FileNotFoundError(f"{argument}: no feature dataset in {folder}: it has no {SETTINGS}")


def join(folder: str | os.PathLike[str], others: Iterable[str | os.PathLike[str]]) -> bool:
    """Copy the finished shards of other folders of the same settings into one.

    Returns:
        Whether the folder is complete with them.

    Raises:
        FileNotFoundError: no feature dataset in one of them.
        SettingsError: a folder of other settings.
        ValueError: a shard that is not as it was written.
    """
    folder = as_path(folder, "folder")
    parts = [as_path(one, "others") for one in as_list(others, "others")]
    if not parts:
        raise ValueError("others: expected at least one folder, got none")
    for other in parts:
        _require_settings(other, "others")
        begin(folder, read_json(other / SETTINGS))
        known = finished(folder)
        for number, shard in finished(other).items():
            if number in known:
                continue
            with (
                (other / shard.file).open("rb") as original,
                replacing(folder / shard.file) as copy,
            ):
                shutil.copyfileobj(original, copy)
                copy.flush()
                if sha256_of(Path(copy.name)) != shard.sha256:
                    raise ValueError(
                        f"{other / shard.file} is not as it was written; delete it and run its "
                        "extraction again"
                    )
            write_json(folder / shard.record_file, asdict(shard))
        rows = source_rows(other)
        if rows is not None:
            note_source_rows(folder, rows)
    return complete(folder)


def verify(
    folder: str | os.PathLike[str], advance: Callable[[int], Any] = lambda _: None
) -> list[str]:
    """Compare a folder's files with their checksums.

    Args:
        folder: a feature dataset, complete or in the making.
        advance: called with the number of bytes read.

    Returns:
        What is wrong, a line for each file; nothing where all is well.

    Raises:
        FileNotFoundError: no feature dataset there.
        ValueError: ``features.json``, which has the checksums, was cut or overwritten.
    """
    folder = as_path(folder, "folder")
    _require_settings(folder, "folder")
    problems = damaged(folder)
    if not is_complete(folder):  # what is written last may be missing
        problems = [problem for problem in problems if problem.startswith("data-")]
    bad = {problem.split(":")[0] for problem in problems}
    for _, shard in sorted(finished(folder).items()):
        if shard.file not in bad and sha256_of(folder / shard.file, advance) != shard.sha256:
            problems.append(f"{shard.file}: altered, its checksum differs")
    return sorted(problems)

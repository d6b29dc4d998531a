"""A file of record batches that are safe as soon as they are written.

Each is a frame: the length of its content and the CRC-32 of it, 8 bytes together, then the content,
an Arrow stream of one batch with what was said of it as metadata. Reading stops at the first frame
that is cut short or does not match its checksum; writing goes on from there.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from monoloss_plugin._optional import missing_extra

try:
    import pyarrow as pa
except ModuleNotFoundError as error:
    raise missing_extra(error, "hub") from error

_HEADER = struct.Struct("<II")


class BusyError(RuntimeError):
    """Another process is at this work."""


class Journal:
    """A journal, opened to be read and then written on.

    Raises:
        BusyError: another process has it open.
        ValueError: a link has its name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(path, "a+b", opener=_opened)  # noqa: SIM115  # held until close
        except OSError as error:
            if path.is_symlink():
                raise ValueError(f"{path} is a link, which is not followed; delete it") from error
            raise
        self._lock()

    def read(self) -> Iterator[tuple[pa.RecordBatch, dict[str, Any]]]:
        """Yield every whole batch and what was said of it, and cut off what comes after."""
        self._file.seek(0)
        end = 0
        while len(header := self._file.read(_HEADER.size)) == _HEADER.size:
            length, checksum = _HEADER.unpack(header)
            content = self._file.read(length)
            if len(content) < length or not length or zlib.crc32(content) != checksum:
                break
            with pa.ipc.open_stream(content) as reader:
                batch, metadata = reader.read_next_batch_with_custom_metadata()
            yield batch, json.loads(metadata[b"said"])
            end = self._file.tell()
        self._file.truncate(end)

    def append(self, batch: pa.RecordBatch, said: dict[str, Any]) -> None:
        """Write a batch at the end."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch, custom_metadata={"said": json.dumps(said)})
        content = sink.getvalue()
        self._file.write(_HEADER.pack(content.size, zlib.crc32(content)))
        self._file.write(content)
        self._file.flush()

    def close(self) -> None:
        """Leave it for another time."""
        self._file.close()

    def remove(self) -> None:
        """Delete it: its content is elsewhere."""
        self.path.unlink(missing_ok=True)
        self._file.close()

    def _lock(self) -> None:
        try:
            import fcntl
        except ModuleNotFoundError:  # a system without such locks
            return
        try:
            # A lock of the process, unlike flock's: worker processes that outlive it hold none.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise BusyError(
                f"another process is writing {self.path}; stop it first, or give each process "
                "its own share"
            ) from error
        except OSError:  # some network file systems have none either
            return


def _opened(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)

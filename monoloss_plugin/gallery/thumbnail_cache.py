"""Thumbnails kept between calls, in one SQLite file. If it cannot be used, nothing is kept."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from huggingface_hub import cached_assets_path

logger = logging.getLogger(__name__)

T = TypeVar("T")

_AT_ONCE = 500
"""How many thumbnails are read or written at once; old versions of SQLite take up to 999."""
_PATIENCE = 10.0
"""Seconds to wait for another process that writes."""
_LARGEST = 2 << 30
"""A file of more bytes than this is begun anew."""


class ThumbnailCache:
    """Thumbnails by their keys. Several processes may use the same file.

    A damaged file is deleted. If the file cannot be read or written, it is left alone, and nothing
    is found or kept.

    Args:
        file: by default in the cache of ``huggingface_hub``.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._connection: sqlite3.Connection | None = None
        self._added: list[tuple[str, bytes]] = []
        try:
            if file is None:
                file = cached_assets_path("monoloss_plugin", "thumbnails") / "thumbnails.sqlite3"
            self.file = file
            if self.file.is_file() and self.file.stat().st_size > _LARGEST:
                self.file.unlink()
        except (OSError, ValueError) as error:
            logger.debug("thumbnails are not kept: %s", error)
            return
        self._connect()
        if self._connection is None:
            self._connect()  # the file was damaged, and is gone now

    def get(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Return the thumbnails that are kept, by their keys."""
        found: dict[str, bytes] = {}
        for start in range(0, len(keys), _AT_ONCE):
            some = keys[start : start + _AT_ONCE]
            marks = ",".join("?" * len(some))
            query = f"SELECT key, content FROM thumbnails WHERE key IN ({marks})"
            found |= self._try(lambda db, q=query, k=some: dict(db.execute(q, k).fetchall())) or {}  # type: ignore[misc]
        return found

    def add(self, key: str, thumbnail: bytes) -> None:
        """Keep a thumbnail. It is written with some others, or by :meth:`close`."""
        self._added.append((key, thumbnail))
        if len(self._added) == _AT_ONCE:
            self._write()

    def close(self) -> None:
        """Write what was added, and close the file."""
        self._write()
        self._disconnect()

    def _write(self) -> None:
        insert = "INSERT OR REPLACE INTO thumbnails VALUES (?, ?)"

        def write(connection: sqlite3.Connection) -> None:
            with connection:  # one transaction
                connection.executemany(insert, self._added)

        self._try(write)
        self._added = []

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._connection = sqlite3.connect(self.file, timeout=_PATIENCE)
        self._try(
            lambda db: db.execute(
                "CREATE TABLE IF NOT EXISTS thumbnails (key TEXT PRIMARY KEY, content BLOB)"
            )
        )

    def _try(self, action: Callable[[sqlite3.Connection], T]) -> T | None:
        """Do something with the file; if that fails, use the file no more."""
        if self._connection is None:
            return None
        try:
            return action(self._connection)
        except sqlite3.Error as error:
            logger.debug("thumbnails are not kept in %s: %s", self.file, error)
            self._disconnect()
            if not isinstance(error, sqlite3.OperationalError):  # damaged, and not just locked
                with contextlib.suppress(OSError):
                    self.file.unlink()
            return None

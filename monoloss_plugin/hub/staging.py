"""The temporary folder that a publication is written to, gone even where its run was killed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # a system without such locks; what is killed there stays
    _HAS_LOCKS = False
else:
    _HAS_LOCKS = True

_PREFIX = "monoloss-publish-"
_ATTEMPTS = 3


@contextmanager
def staging() -> Iterator[Path]:
    """Yield a new folder, and delete it at the end; what killed runs have left goes first.

    A run locks its folder. However the run ends, the system lets go of the lock.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if (lock := _locked(left)) is not None:
            _remove(left, lock)
    for _ in range(_ATTEMPTS):
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        lock = _locked(folder)
        if folder.is_dir():  # nobody has swept it before it was locked
            break
    try:
        yield folder
    finally:
        _remove(folder, lock)


def _locked(folder: Path) -> int | None:
    """Lock a folder of this user's own; None where another run has it, or there are no locks."""
    if not _HAS_LOCKS:
        return None
    try:
        # A link that somebody has planted among temporary files is not followed.
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if os.fstat(opened).st_uid == os.getuid():
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return opened
    except OSError:
        pass
    os.close(opened)
    return None


def _remove(folder: Path, lock: int | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)

"""Where a thing is: a file or folder here, or a repository on the Hub.

One rule, in every function and command: a ``Path``, or a string that starts with ``./``, ``../``,
``/`` or ``~``, is local; every other string is a name on the Hub. What lies in the working folder
never changes what a name means. Functions that take only files take any string as a path.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

_LOCAL = ("./", "../", "/", "~")


def local_path(place: str | os.PathLike[str]) -> Path | None:
    """Return the path of a local place, ``~`` expanded; None for a name on the Hub.

    Examples:
        >>> local_path("./photos")
        PosixPath('photos')
        >>> local_path("user/name") is None
        True
    """
    if isinstance(place, str) and not place.startswith(_LOCAL) and place not in (".", ".."):
        return None
    return as_path(place, "place", "a name or a path")


def as_path(place: Any, argument: str, expected: str = "a path") -> Path:
    """Return the path of what can only be local, ``~`` expanded.

    Raises:
        TypeError: neither a string nor a path; the error names the argument.
        ValueError: an empty string, or one with a NUL.
    """
    require_place(place, argument, expected)
    return Path(place).expanduser()


def require_place(place: Any, argument: str, expected: str = "a name or a path") -> None:
    """Raise an error for what is neither a name nor a path.

    Raises:
        TypeError, ValueError: as :func:`as_path`.
    """
    if not isinstance(place, (str, os.PathLike)):
        raise TypeError(f"{argument}: expected {expected}, got {kind_of(place)}")
    if place == "" or "\0" in os.fspath(place):
        raise ValueError(f"{argument}: expected {expected}, got {os.fspath(place)!r}")


def kind_of(value: Any) -> str:
    """Return what to call a value of the wrong kind in an error."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def require_file(path: Path, argument: str) -> None:
    """Raise FileNotFoundError or IsADirectoryError where a path is no file."""
    if path.is_dir():
        raise IsADirectoryError(f"{argument}: {path} is a folder; give a file")
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: no such file: {path}")


def require_folder(path: Path, argument: str) -> None:
    """Raise FileNotFoundError or NotADirectoryError where a path is no folder."""
    if path.is_file():
        raise NotADirectoryError(f"{argument}: {path} is a file; give a folder")
    if not path.is_dir():
        raise FileNotFoundError(f"{argument}: no such folder: {path}")


def local_hint(name: str) -> str:
    """Return what to add to an error about a Hub name that is a path here too; else nothing."""
    plain = name.rstrip("/")
    if not plain or not Path(plain).exists():
        return ""
    return f"; for the local {plain!r}, write './{plain}'"


def without(path: Path) -> Path:
    """Return a path to write to, once what an earlier run has left there is gone.

    A symbolic link is removed and not followed, wherever it leads.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    return path

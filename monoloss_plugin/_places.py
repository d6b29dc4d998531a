"""Local paths and names on the Hub.

One rule holds in every function and command. A ``Path``, or a string that starts with ``./``,
``../``, ``/`` or ``~``, is local. Every other string is a name on the Hub, whatever the working
folder holds. A function that takes only files reads any string as a path.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

_LOCAL = ("./", "../", "/", "~")


def local_path(place: str | os.PathLike[str]) -> Path | None:
    """Return a local place as a path, with ``~`` expanded; None for a name on the Hub.

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
    """Return a string or a path as a local path, with ``~`` expanded.

    Raises:
        TypeError: neither a string nor a path.
        ValueError: an empty string, or a string with a NUL character.
    """
    require_place(place, argument, expected)
    return Path(place).expanduser()


def require_place(place: Any, argument: str, expected: str = "a name or a path") -> None:
    """Raise an error if ``place`` is neither a name nor a path.

    Raises:
        TypeError, ValueError: as :func:`as_path`.
    """
    if not isinstance(place, (str, os.PathLike)):
        raise TypeError(f"{argument}: expected {expected}, got {kind_of(place)}")
    if place == "" or "\0" in os.fspath(place):
        raise ValueError(f"{argument}: expected {expected}, got {os.fspath(place)!r}")


def kind_of(value: Any) -> str:
    """Return the type of a value, as an error calls it."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def require_file(path: Path, argument: str) -> None:
    """Raise FileNotFoundError or IsADirectoryError if a path is not a file."""
    if path.is_dir():
        raise IsADirectoryError(f"{argument}: {path} is a folder; give a file")
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: no such file: {path}")


def require_folder(path: Path, argument: str) -> None:
    """Raise FileNotFoundError or NotADirectoryError if a path is not a folder."""
    if path.is_file():
        raise NotADirectoryError(f"{argument}: {path} is a file; give a folder")
    if not path.is_dir():
        raise FileNotFoundError(f"{argument}: no such folder: {path}")


def local_hint(name: str) -> str:
    """Return a hint for an error about a Hub name, if there is a local path of that name."""
    plain = name.rstrip("/")
    if not plain or not Path(plain).exists():
        return ""
    return f"; for the local {plain!r}, write './{plain}'"


def without(path: Path) -> Path:
    """Delete what an earlier run left at a path, and return the path.

    If it is a symbolic link, only the link is deleted.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    return path

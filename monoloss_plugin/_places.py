"""Where a thing is: a file or folder here, or a repository on the Hub.

One rule, in every function and command: a ``Path``, or a string that starts with ``./``, ``../``,
``/`` or ``~``, is local; every other string is a name on the Hub. What lies in the working folder
never changes what a name means. Functions that take only files take any string as a path.
"""

from __future__ import annotations

import os
from pathlib import Path

_LOCAL = ("./", "../", "/", "~")


def local_path(place: str | os.PathLike[str]) -> Path | None:
    """Return the path of a local place, ``~`` expanded; None for a name on the Hub.

    Examples:
        >>> local_path("./photos")
        PosixPath('photos')
        >>> local_path("user/name") is None
        True
    """
    if isinstance(place, str):
        if not place.startswith(_LOCAL) and place not in (".", ".."):
            return None
    elif not isinstance(place, os.PathLike):
        raise TypeError(f"expected a name or a path, got {type(place).__name__}")
    return Path(place).expanduser()


def local_hint(name: str) -> str:
    """Return what to add to an error about a Hub name that is a path here too; else nothing."""
    plain = name.rstrip("/")
    if not plain or not Path(plain).exists():
        return ""
    return f"; for the local {plain!r}, write './{plain}'"

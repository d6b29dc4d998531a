"""Optional dependencies: an import that fails says what to install."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version


def missing_extra(error: ModuleNotFoundError, extra: str) -> ModuleNotFoundError:
    """Return an error that says what to install for the missing module.

    It names the libraries themselves, as this package's own metadata list them: that works from a
    checkout, a wheel's file, a git address and an index alike, and never asks an index for a
    package of our name.

    Where the library is there but fails by itself (its error names no module), that is said.
    """
    if error.name is None:
        return ModuleNotFoundError(f"cannot be imported as it is installed: {error}")
    every = _requirements(extra)
    wanted = [one for one in every if not _is_installed(one)] or every or [error.name]
    command = " ".join(f"'{one}'" for one in wanted)
    return ModuleNotFoundError(
        f"needs {error.name}, which is not installed: pip install {command}", name=error.name
    )


def _requirements(extra: str) -> list[str]:
    """Return what an extra requires, the extras in it resolved, as they are in the metadata."""
    try:
        every = requires("monoloss_plugin") or []
    except PackageNotFoundError:  # imported from a folder, not installed
        return []
    lines = [[part.strip() for part in line.split(";")] for line in every]
    return [line[0] for line in lines if f"extra == '{extra}'" in line[-1].replace('"', "'")]


def _is_installed(requirement: str) -> bool:
    try:
        version(re.split(r"[^\w.-]", requirement)[0])
    except PackageNotFoundError:
        return False
    return True

"""Optional dependencies: if an import fails, the error says what to install."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version


def missing_extra(error: ModuleNotFoundError, extra: str) -> ModuleNotFoundError:
    """Return an error that says what to install for the missing module.

    It names the libraries of the extra, from this package's metadata, and not the extra. This works
    for every way to install this package, and pip never looks for our name in an index.

    If the library is installed but cannot be imported (its error names no module), it says so.
    """
    if error.name is None:
        return ModuleNotFoundError(f"an installed library cannot be imported: {error}")
    command = install_command(extra) or f"pip install '{error.name}'"
    return ModuleNotFoundError(
        f"needs {error.name}, which is not installed: {command}", name=error.name
    )


def install_command(extra: str) -> str:
    """Return the command that installs what is missing of an extra; empty if nothing is known."""
    every = _requirements(extra)
    wanted = [one for one in every if not _is_installed(one)] or every
    return "pip install " + " ".join(f"'{one}'" for one in wanted) if wanted else ""


def _requirements(extra: str) -> list[str]:
    """Return what an extra requires, from the package's metadata."""
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

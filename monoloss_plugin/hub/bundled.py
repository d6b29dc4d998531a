"""What a name stands for: a repository of the Hub, a folder, or what comes with the package."""

from __future__ import annotations

import os
from pathlib import Path

from monoloss_plugin._checks import require_text
from monoloss_plugin._places import local_hint, local_path, require_place
from monoloss_plugin.hub.repository import Kind, Repository, of_folder, of_hub

_FOLDER = Path(__file__).parent / "bundled_data"

BUNDLED = {"digits": "batchtopk-256-monoloss-0.003"}
"""Names that need no network, each with the SAE that it stands for by default."""


def folder_of(name: str) -> Path:
    """Return where a bundled name's repositories lie: ``models`` and ``datasets``."""
    return _FOLDER / name


def open_named(
    repo_id: str | os.PathLike[str],
    kind: Kind,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Repository:
    """Open a repository by its name on the Hub, a bundled name, or a local folder.

    Raises:
        TypeError: an argument of another kind.
        FileNotFoundError: no such folder or repository, or a name that is neither.
        ValueError, PermissionError, ConnectionError: as
            :func:`~monoloss_plugin.hub.repository.of_hub`.
    """
    require_place(repo_id, "repo_id")
    require_text(revision, "revision")
    if cache_dir is not None:
        require_place(cache_dir, "cache_dir")
    folder = local_path(repo_id)
    if folder is not None:
        return of_folder(folder)
    name = str(repo_id)
    if name in BUNDLED:
        return of_folder(folder_of(name) / f"{kind}s", name)
    hint = local_hint(name)
    if "/" not in name:
        raise FileNotFoundError(
            f"repo_id: expected 'user/name', a folder, or one of {', '.join(BUNDLED)}, which are "
            f"bundled; got {name!r}{hint}"
        )
    try:
        return of_hub(
            name,
            kind,
            revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    except (OSError, ValueError) as error:
        if not hint:
            raise
        raise type(error)(f"{error}{hint}") from error

"""What a name stands for: a repository of the Hub, a folder, or what comes with the package."""

from __future__ import annotations

from pathlib import Path

from monoloss_plugin.hub.repository import Kind, Repository, of_folder, of_hub

_FOLDER = Path(__file__).parent / "bundled_data"

BUNDLED = {"digits": "batchtopk-256-monoloss-0.003"}
"""Names that need no network, each with the SAE that it stands for by default."""


def folder_of(name: str) -> Path:
    """Return where a bundled name's repositories lie: ``models`` and ``datasets``."""
    return _FOLDER / name


def open_named(
    repo_id: str | Path,
    kind: Kind,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Repository:
    """Open a repository by its name on the Hub, a bundled name, or the ``Path`` of a folder.

    Raises:
        FileNotFoundError: no such folder or repository, or a name that is neither.
        ValueError, PermissionError, ConnectionError: as
            :func:`~monoloss_plugin.hub.repository.of_hub`.
    """
    if isinstance(repo_id, Path):
        return of_folder(repo_id)
    if repo_id in BUNDLED:
        return of_folder(folder_of(repo_id) / f"{kind}s", repo_id)
    if isinstance(repo_id, str) and "/" not in repo_id:
        raise FileNotFoundError(
            f"repo_id: expected 'user/name', a Path, or one of {', '.join(BUNDLED)}, which are "
            f"bundled; got {repo_id!r}"
        )
    return of_hub(
        repo_id,
        kind,
        revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )

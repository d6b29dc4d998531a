"""The files of a repository at one commit: on the Hub, in its cache, or in a folder."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from monoloss_plugin import __version__
from monoloss_plugin._optional import missing_extra
from monoloss_plugin._places import require_folder
from monoloss_plugin.hub.errors import explained
from monoloss_plugin.hub.names import require_repo_id, require_token

try:
    from huggingface_hub import HfApi, snapshot_download
except ModuleNotFoundError as error:
    raise missing_extra(error, "hub") from error

Kind = Literal["model", "dataset"]

_LARGEST_JSON = 16 << 20  # bytes; no settings or record is longer

_NO_FILE = "no file has this name/"


class Repository:
    """What a repository holds at one commit, and of that what is already at hand.

    Args:
        name: what to call it in a message.
        commit: None for a folder.
        sizes: bytes of each file, by its path below the root.
        get: has files at hand, and returns the folder they lie in.
    """

    def __init__(
        self, name: str, commit: str | None, sizes: dict[str, int], get: Callable[[list[str]], Path]
    ) -> None:
        self.name, self.commit, self.sizes = name, commit, sizes
        self._get = get
        self._folder: Path | None = None
        self._here: set[str] = set()

    def fetch(self, paths: Iterable[str]) -> Path:
        """Have files at hand, and return the folder that they lie in by their paths.

        Raises:
            FileNotFoundError: a file that is not there.
            ValueError: settings longer than any of ours.
            ConnectionError: the Hub cannot be reached.
        """
        wanted = [path for path in paths if path not in self._here]
        for path in wanted:
            if path not in self.sizes:
                raise FileNotFoundError(f"{self.name} has no file {path}")
            if path.endswith(".json") and not self.is_short(path):
                raise ValueError(f"{self.name}/{path}: {_too_long(self.sizes[path])}")
        if wanted or self._folder is None:
            self._folder = self._get(wanted)
            self._here.update(wanted)
        return self._folder

    def json(self, path: str) -> dict[str, Any]:
        """Read a JSON object.

        Raises:
            ValueError: not one, or longer than any of ours.
        """
        return read_json(self.fetch([path]) / path)

    def is_short(self, path: str) -> bool:
        """Say whether a file is no longer than settings are."""
        return self.sizes[path] <= _LARGEST_JSON

    def __contains__(self, path: str) -> bool:
        return path in self.sizes


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ValueError: not a JSON object, or longer than any of ours.
    """
    if path.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"{path}: {_too_long(path.stat().st_size)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def of_folder(folder: Path, name: str | None = None) -> Repository:
    """Take a folder for a repository.

    Raises:
        FileNotFoundError, NotADirectoryError: no such folder.
    """
    require_folder(folder, "repo_id")
    return Repository(name or str(folder), None, _sizes(folder), lambda _: folder)


def of_hub(
    repo_id: str,
    kind: Kind,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Repository:
    """Look at a repository of the Hub; where the Hub cannot be reached, at what the cache has.

    Args:
        repo_id: ``user/name``.
        kind: of the repository.
        revision: a branch, tag or commit; the main branch by default.
        token: by default the one that the machine is logged in with.
        cache_dir: by default the Hub's own cache.
        local_files_only: look in the cache only.

    Raises:
        FileNotFoundError: no such repository, or, without the Hub, none in the cache.
        ValueError: not a repository's name, or no such revision.
        PermissionError: a gated repository.
        ConnectionError: the Hub cannot be reached, and nothing is in the cache.
    """
    require_repo_id(repo_id)
    token = require_token(token)
    place: dict[str, Any] = {"repo_id": repo_id, "repo_type": kind, "cache_dir": cache_dir}

    def cached() -> Repository:
        folder = Path(
            snapshot_download(
                **place, revision=revision, local_files_only=True, allow_patterns=[_NO_FILE]
            )
        )
        return Repository(repo_id, folder.name, _sizes(folder), lambda _: folder)

    if local_files_only:
        try:
            return cached()
        except FileNotFoundError:
            raise FileNotFoundError(f"repo_id: {repo_id} is not in the cache") from None
    try:
        with explained(repo_id):
            info: Any = api(token).repo_info(
                repo_id, repo_type=kind, revision=revision, files_metadata=True
            )
    except ConnectionError as error:
        try:
            return cached()
        except FileNotFoundError:
            raise ConnectionError(f"{error}, and {repo_id} is not in the cache") from error
    commit = str(info.sha)

    def download(paths: list[str]) -> Path:
        patterns = [glob.escape(path) for path in paths]
        with explained(repo_id):
            folder = Path(
                snapshot_download(**place, revision=revision, token=token, allow_patterns=patterns)
            )
            if folder.name != commit:  # committed to since; the first look counts
                folder = Path(
                    snapshot_download(
                        **place, revision=commit, token=token, allow_patterns=patterns
                    )
                )
        return folder

    sizes = {file.rfilename: int(file.size or 0) for file in info.siblings or ()}
    return Repository(repo_id, commit, sizes, download)


def api(token: str | bool | None) -> HfApi:
    """Return the Hub's client, under our name.

    Raises:
        PermissionError: what is given for a token is none.
    """
    return HfApi(
        token=require_token(token), library_name="monoloss_plugin", library_version=__version__
    )


def _too_long(size: int) -> str:
    return f"{size} bytes, more than any settings take"


def _sizes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }

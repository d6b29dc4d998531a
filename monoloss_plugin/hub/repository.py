"""The files of a repository: on the Hub, in the Hub's cache, or in a local folder."""

from __future__ import annotations

import glob
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub import errors as hub_errors

from monoloss_plugin import __version__
from monoloss_plugin._checks import require_text
from monoloss_plugin._places import local_hint, local_path, require_folder, require_place
from monoloss_plugin.hub.names import require_repo_id, require_token

Kind = Literal["model", "dataset"]

BUNDLED = {"digits": "batchtopk-256-monoloss-0.003", "photos": "recommended-512"}
"""The names that come with the package, each with the SAE that it loads by default."""

_LARGEST_JSON = 16 << 20  # bytes; no settings and no record are longer
_NO_FILE = "no file has this name/"
"""A pattern for no file at all; without one, the client takes every file."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where to find a repository: the arguments that every loading function takes."""

    repo_id: str | os.PathLike[str]
    kind: Kind
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False

    def snapshot(self, revision: str | None, paths: list[str], *, local: bool = False) -> Path:
        """Return the folder of a revision in the Hub's cache, with these files downloaded."""
        return Path(
            snapshot_download(
                str(self.repo_id),
                repo_type=self.kind,
                revision=revision,
                token=require_token(self.token),
                cache_dir=None if self.cache_dir is None else str(self.cache_dir),
                local_files_only=local,
                allow_patterns=[glob.escape(path) for path in paths] or [_NO_FILE],
            )
        )


@dataclass(frozen=True)
class Repository:
    """The files of a repository at one commit. Nothing is downloaded before :meth:`download`."""

    name: str
    """What errors call it."""
    sizes: Mapping[str, int]
    """The size of each file in bytes, by its path."""
    folder: Path | None = None
    """Where the files are; None where they must be downloaded."""
    commit: str | None = None
    """None for a local folder."""
    place: Place | None = None
    """Where to download them from."""
    info: Any = None
    """The Hub's own description of the repository."""

    def download(self, paths: Iterable[str]) -> Path:
        """Return a folder with these files. JSON that is longer than settings is left out."""
        if self.folder is not None:
            return self.folder
        assert self.place is not None
        wanted = []
        for path in paths:
            if path.endswith(".json") and self.sizes[path] > _LARGEST_JSON:
                size = self.sizes[path]
                logger.warning("%s/%s is left out: %s bytes of settings", self.name, path, size)
            else:
                wanted.append(path)
        # By its branch first, so that the cache knows the branch when the Hub cannot be reached.
        folder = self.place.snapshot(self.place.revision, wanted)
        if folder.name != self.commit:  # somebody has committed since this object was made
            folder = self.place.snapshot(self.commit, wanted)
        return folder


def open_repository(place: Place) -> Repository:
    """List the files of a repository: a local folder, a bundled name, or one of the Hub.

    Where the Hub cannot be reached, or fails, the files in the cache are listed. If there are none,
    the client's own error is raised.
    """
    require_place(place.repo_id, "repo_id")
    require_text(place.revision, "revision")
    if place.cache_dir is not None:
        require_place(place.cache_dir, "cache_dir")
    name = str(place.repo_id)
    folder = local_path(place.repo_id)
    if folder is None and name in BUNDLED:
        folder = bundled_folder(name) / f"{place.kind}s"
    if folder is not None:
        return repository_in(folder, name)
    if name.count("/") != 1:
        raise FileNotFoundError(
            f"repo_id: expected 'user/name', a folder, or one of {', '.join(BUNDLED)}, which are "
            f"bundled; got {name!r}{local_hint(name)}"
        )
    require_repo_id(name)
    if place.local_files_only:
        return _in_cache(place)
    try:
        return ask_hub(place)
    except (hub_errors.RepositoryNotFoundError, hub_errors.RevisionNotFoundError) as error:
        error.append_to_message(local_hint(name))
        raise
    except Exception:  # of several HTTP libraries, as the version of the Hub's client uses them
        try:
            return _in_cache(place)
        except hub_errors.LocalEntryNotFoundError:
            pass
        raise


def repository_in(folder: Path, name: str) -> Repository:
    """List the files of a local folder."""
    require_folder(folder, "repo_id")
    return Repository(name, _sizes(folder), folder)


def ask_hub(place: Place) -> Repository:
    """List the files of a repository on the Hub; raise the client's own error if that fails."""
    info: Any = api(place.token).repo_info(
        str(place.repo_id), repo_type=place.kind, revision=place.revision, files_metadata=True
    )
    sizes = {file.rfilename: int(file.size or 0) for file in info.siblings or ()}
    return Repository(str(place.repo_id), sizes, None, str(info.sha), place, info)


def bundled_folder(name: str) -> Path:
    """Return the folder of a bundled name; it holds ``models`` and ``datasets``."""
    return Path(__file__).parent / "bundled_data" / name


def api(token: str | bool | None) -> HfApi:
    """Return the Hub's client; it tells the Hub this package's name and version."""
    return HfApi(
        token=require_token(token), library_name="monoloss_plugin", library_version=__version__
    )


def page_of(repo_id: str, kind: Kind) -> str:
    """Return the address of a repository's page on the Hub."""
    return f"{api(None).endpoint}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise ValueError for a file that holds something else, or too much."""
    size = path.stat().st_size
    if size > _LARGEST_JSON:
        raise ValueError(f"{path}: {size} bytes, more than any settings take")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _in_cache(place: Place) -> Repository:
    folder = place.snapshot(place.revision, [], local=True)
    return Repository(str(place.repo_id), _sizes(folder), folder, folder.name)


def _sizes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }

"""Put a staged folder into a repository of the Hub: in one commit, and nothing overwritten."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monoloss_plugin._optional import missing_extra
from monoloss_plugin.hub.errors import ChangedMeanwhileError, explained
from monoloss_plugin.hub.repository import Kind, api

try:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import RepositoryNotFoundError
except ModuleNotFoundError as error:
    raise missing_extra(error, "hub") from error

CARD = "README.md"

_ATTEMPTS = 3
_READ = 1 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedFile:
    """A file to upload."""

    path: str
    """Below the repository's root."""
    size: int
    """Bytes."""
    change: str
    """"new", "changed", "same" (there already, not uploaded), or "gone" (to be deleted)."""


@dataclass(frozen=True)
class Publication:
    """What was published, or would be."""

    repo_id: str
    url: str
    files: list[PlannedFile]
    commit: str | None
    """None for a dry run."""
    name: str = ""
    """Of the dictionary, or of the split, in the repository."""

    @property
    def size(self) -> int:
        """Bytes to upload."""
        return sum(file.size for file in self.files if file.change in ("new", "changed"))


@dataclass(frozen=True)
class Existing:
    """What a repository holds before something is published to it."""

    commit: str | None = None
    """None where there is no such repository yet."""
    private: bool | None = None
    hashes: dict[str, str] = field(default_factory=dict)
    """Of each file: SHA-256 of one in large storage, else git's own."""
    card: str = ""


@dataclass(frozen=True)
class Staged:
    """What is to be published: files below a folder, and how the card changes for them."""

    folder: Path
    owns: Callable[[str], bool]
    """Whether a path belongs to what is published, and to nothing else there."""
    card: Callable[[Existing], str]
    """From what is there to the new card; called again where somebody commits meanwhile."""


def publish(
    staged: Staged,
    repo_id: str,
    kind: Kind,
    *,
    message: str,
    private: bool,
    token: str | bool | None,
    overwrite: bool,
    dry_run: bool,
) -> Publication:
    """Upload in one commit what a repository does not have yet.

    Interrupted anywhere, it leaves the repository as it was; large files that have arrived are not
    sent again.

    Raises:
        FileExistsError: something else lies there under the same names.
        PermissionError: no token, or one that may not do this; or a public repository where a
            private one is asked for.
        ConnectionError: the Hub cannot be reached.
    """
    for attempt in range(_ATTEMPTS):
        existing = _look(repo_id, kind, token, dry_run)
        if private and existing.private is False:
            raise PermissionError(
                f"private: {repo_id} is there already, and public; make it private on its "
                "settings page first, or take another name"
            )
        (staged.folder / CARD).write_text(staged.card(existing), encoding="utf-8")
        files = _plan(staged, existing)
        clashes = [f.path for f in files if f.change in ("changed", "gone") and f.path != CARD]
        if clashes and not overwrite:
            raise FileExistsError(
                f"repo_id: {repo_id} has another {', '.join(clashes[:4])} already; publish under "
                "another name, or with overwrite to replace what is there"
            )
        url = _url(repo_id, kind)
        changes = [file for file in files if file.change != "same"]
        if dry_run or not changes:
            return Publication(repo_id, url, files, None if dry_run else existing.commit)
        try:
            with explained(repo_id, writing=True):
                commit = _commit(staged, existing, changes, repo_id, kind, message, private, token)
        except ChangedMeanwhileError:
            if attempt == _ATTEMPTS - 1:
                raise
            logger.info("%s has changed in the meantime; looking at it again", repo_id)
            continue
        return Publication(repo_id, url, files, commit)
    raise AssertionError("unreachable")


def _look(repo_id: str, kind: Kind, token: str | bool | None, dry_run: bool) -> Existing:
    try:
        with explained(repo_id):
            return _there(repo_id, kind, token)
    except ConnectionError as error:
        if not dry_run:
            raise
        logger.warning("%s; listing what is uploaded where %s is new", error, repo_id)
        return Existing()


def _there(repo_id: str, kind: Kind, token: str | bool | None) -> Existing:
    client = api(token)
    try:
        info: Any = client.repo_info(repo_id, repo_type=kind, files_metadata=True)
    except RepositoryNotFoundError:
        return Existing()
    hashes = {
        file.rfilename: file.lfs["sha256"] if file.lfs else file.blob_id or ""
        for file in info.siblings or ()
    }
    card = ""
    if CARD in hashes:
        path = client.hf_hub_download(repo_id, CARD, repo_type=kind, revision=info.sha)
        card = Path(path).read_text(encoding="utf-8-sig")
    return Existing(info.sha, info.private, hashes, card)


def _plan(staged: Staged, existing: Existing) -> list[PlannedFile]:
    paths = sorted(path for path in staged.folder.rglob("*") if path.is_file())
    files, given = [], set()
    for path in paths:
        name = path.relative_to(staged.folder).as_posix()
        given.add(name)
        there = existing.hashes.get(name)
        change = "new" if there is None else "same" if there in _hashes(path) else "changed"
        files.append(PlannedFile(name, path.stat().st_size, change))
    left = sorted(path for path in existing.hashes if staged.owns(path) and path not in given)
    return [*files, *(PlannedFile(path, 0, "gone") for path in left)]


def _commit(
    staged: Staged,
    existing: Existing,
    changes: list[PlannedFile],
    repo_id: str,
    kind: Kind,
    message: str,
    private: bool,
    token: str | bool | None,
) -> str:
    client, parent = api(token), existing.commit
    if parent is None:
        client.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True)
        parent = client.repo_info(repo_id, repo_type=kind).sha
    operations: list[Any] = [
        CommitOperationDelete(file.path)
        if file.change == "gone"
        else CommitOperationAdd(file.path, staged.folder / file.path)
        for file in changes
    ]
    done = client.create_commit(
        repo_id, operations, commit_message=message, repo_type=kind, parent_commit=parent
    )
    return str(done.oid)


def _hashes(path: Path) -> tuple[str, str]:
    """Return a file's SHA-256, and git's hash of it."""
    size = path.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as content:
        while part := content.read(_READ):
            sha256.update(part)
            git.update(part)
    return sha256.hexdigest(), git.hexdigest()


def _url(repo_id: str, kind: Kind) -> str:
    return f"{api(None).endpoint}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"

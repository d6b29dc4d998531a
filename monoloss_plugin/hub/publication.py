"""Put a staged folder into a repository of the Hub: in one commit, and nothing overwritten."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from monoloss_plugin._checks import require_flag
from monoloss_plugin._optional import missing_extra
from monoloss_plugin.hub.errors import ChangedMeanwhileError, explained
from monoloss_plugin.hub.repository import Kind, api

try:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, RepoCard
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
    """Of the SAE, or of the split, in the repository."""

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


@dataclass(frozen=True)
class Target:
    """Where something is published, and how."""

    repo_id: str
    kind: Kind
    private: bool
    token: str | bool | None
    overwrite: bool
    dry_run: bool

    def __post_init__(self) -> None:
        for name in ("private", "overwrite", "dry_run"):
            require_flag(getattr(self, name), name)

    @property
    def url(self) -> str:
        """Of the repository's page."""
        prefix = "datasets/" if self.kind == "dataset" else ""
        return f"{api(None).endpoint}/{prefix}{self.repo_id}"


def publish(staged: Staged, target: Target, message: str) -> Publication:
    """Upload in one commit what a repository does not have yet.

    Interrupted anywhere, it leaves the repository as it was, or empty where there was none; large
    files that have arrived are not sent again.

    Raises:
        FileExistsError: something else lies there under the same names.
        PermissionError: no token, or one that may not do this; or a public repository where a
            private one is asked for.
        ValueError: the Hub finds the card's metadata wrong.
        ConnectionError: the Hub cannot be reached.
    """
    for attempt in range(_ATTEMPTS):
        existing, files = _prepared(staged, target)
        if existing.commit is None and not target.dry_run:
            with explained(target.repo_id, writing=True):
                _create(staged, target)
            # Once more: somebody else may have made it, and put something there.
            existing, files = _prepared(staged, target)
        changes = [file for file in files if file.change != "same"]
        if target.dry_run or not changes:
            commit = None if target.dry_run else existing.commit
            return Publication(target.repo_id, target.url, files, commit)
        try:
            with explained(target.repo_id, writing=True):
                commit = _commit(staged, existing, changes, target, message)
        except ChangedMeanwhileError:
            if attempt == _ATTEMPTS - 1:
                raise
            logger.info("%s has changed in the meantime; looking at it again", target.repo_id)
            continue
        return Publication(target.repo_id, target.url, files, commit)
    raise AssertionError("unreachable")


def _prepared(staged: Staged, target: Target) -> tuple[Existing, list[PlannedFile]]:
    """Write the card for what is there now, and say which files it takes."""
    existing = _look(target)
    if target.private and existing.private is False:
        raise PermissionError(
            f"private: {target.repo_id} is there already, and public; make it private on its "
            "settings page first, or take another name"
        )
    (staged.folder / CARD).write_text(staged.card(existing), encoding="utf-8")
    files = _plan(staged, existing)
    clashes = [f.path for f in files if f.change in ("changed", "gone") and f.path != CARD]
    if clashes and not target.overwrite:
        raise FileExistsError(
            f"repo_id: {target.repo_id} has another {', '.join(clashes[:4])} already; publish "
            "under another name, or with overwrite to replace what is there"
        )
    return existing, files


def _look(target: Target) -> Existing:
    try:
        with explained(target.repo_id):
            return _there(target)
    except ConnectionError as error:
        if not target.dry_run:
            raise
        said = "%s; listing what is uploaded where %s is new"
        logger.warning(said, error, target.repo_id)
        return Existing()


def _there(target: Target) -> Existing:
    client = api(target.token)
    repo_id, kind = target.repo_id, target.kind
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
        try:
            card = Path(path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{CARD}: that of {repo_id} is not UTF-8; mend it first") from error
    return Existing(info.sha, info.private, hashes, card)


def _plan(staged: Staged, existing: Existing) -> list[PlannedFile]:
    paths = sorted(path for path in staged.folder.rglob("*") if path.is_file())
    files, given = [], set()
    for path in paths:
        name = path.relative_to(staged.folder).as_posix()
        given.add(name)
        for parent in PurePosixPath(name).parents:
            if str(parent) in existing.hashes:
                raise FileExistsError(f"repo_id: a file {parent} is there, where {name} should go")
        there = existing.hashes.get(name)
        change = "new" if there is None else "same" if there in _hashes(path) else "changed"
        files.append(PlannedFile(name, path.stat().st_size, change))
    left = sorted(path for path in existing.hashes if staged.owns(path) and path not in given)
    return [*files, *(PlannedFile(path, 0, "gone") for path in left)]


def _create(staged: Staged, target: Target) -> None:
    # What the Hub would refuse in the card, before anything is made.
    RepoCard.load(staged.folder / CARD).validate(repo_type=target.kind)
    api(target.token).create_repo(
        target.repo_id,
        repo_type=target.kind,
        private=target.private or None,  # an organization may have a rule of its own
        exist_ok=True,
    )


def _commit(
    staged: Staged,
    existing: Existing,
    changes: list[PlannedFile],
    target: Target,
    message: str,
) -> str:
    operations: list[Any] = [
        CommitOperationDelete(file.path)
        if file.change == "gone"
        else CommitOperationAdd(file.path, staged.folder / file.path)
        for file in changes
    ]
    done = api(target.token).create_commit(
        target.repo_id,
        operations,
        commit_message=message,
        repo_type=target.kind,
        parent_commit=existing.commit,
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

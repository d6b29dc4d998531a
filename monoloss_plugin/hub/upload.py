"""Upload a folder to a repository of the Hub in one commit, without overwriting anything."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, RepoCard
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from monoloss_plugin._checks import require_flag
from monoloss_plugin.hub.cards import CARD
from monoloss_plugin.hub.names import require_repo_id
from monoloss_plugin.hub.repository import Kind, Place, Repository, api, ask_hub

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedFile:
    """A file of a publication."""

    path: str
    """Its path in the repository."""
    size: int
    """Number of bytes."""
    change: str
    """"new", "changed", "same" (it is there already), or "gone" (it will be deleted)."""


@dataclass(frozen=True)
class Publication:
    """What was published, or what a dry run would publish."""

    repo_id: str
    url: str
    files: list[PlannedFile]
    commit: str | None
    """None for a dry run."""
    name: str = ""
    """The name of the SAE, or of the split, in the repository."""

    @property
    def size(self) -> int:
        """Number of bytes to upload."""
        return sum(file.size for file in self.files if file.change in ("new", "changed"))


@dataclass(frozen=True)
class Destination:
    """The repository to upload to, and what is allowed there."""

    repo_id: str
    kind: Kind
    private: bool
    overwrite: bool
    dry_run: bool
    token: str | bool | None

    def __post_init__(self) -> None:
        require_repo_id(self.repo_id)
        for name in ("private", "overwrite", "dry_run"):
            require_flag(getattr(self, name), name)


def upload(
    folder: Path,
    to: Destination,
    name: str,
    *,
    owns: Callable[[str], bool],
    write_card: Callable[[str, Repository | None], str],
) -> Publication:
    """Upload a folder, and the repository's card, in one commit.

    Files that are there already are not sent. An interruption at any point leaves the repository as
    it was, or empty if it is new.

    Args:
        folder: its files have the paths that they get in the repository.
        to: where to upload them.
        name: the name of the SAE or split, for the commit and the result.
        owns: says whether a path belongs to this SAE or split. Such a file is deleted from the
            repository if the folder does not have it.
        write_card: makes the new card from the card's text and the repository, if there is one.
    """
    there = _look_at(to)
    if to.private and there is not None and there.info.private is False:
        raise PermissionError(
            f"private: {to.repo_id} is there already, and public; make it private on its settings "
            "page first, or choose another name"
        )
    (folder / CARD).write_text(write_card(_card_of(there), there), encoding="utf-8")
    files = _plan(folder, there, owns)
    clashes = [f.path for f in files if f.change in ("changed", "gone") and f.path != CARD]
    if clashes and not to.overwrite:
        raise FileExistsError(
            f"repo_id: {to.repo_id} has another {', '.join(clashes[:4])} already; publish under "
            "another name, or pass overwrite to replace it"
        )
    commit = None if there is None else there.commit
    changes = [file for file in files if file.change != "same"]
    if changes and not to.dry_run:
        commit = _commit(folder, changes, to, commit, f"Publish {name}")
    page = f"datasets/{to.repo_id}" if to.kind == "dataset" else to.repo_id
    url = f"{api(None).endpoint}/{page}"
    return Publication(to.repo_id, url, files, None if to.dry_run else commit, name)


def _look_at(to: Destination) -> Repository | None:
    """Return the repository as it is now; None if there is none."""
    try:
        return ask_hub(Place(to.repo_id, to.kind, token=to.token))
    except RepositoryNotFoundError:
        return None
    except Exception as error:  # of several HTTP libraries, as the client's version uses them
        if not to.dry_run:
            raise
        said = "the Hub did not answer (%s); this is what a new repository %s would get"
        logger.warning(said, error, to.repo_id)
        return None


def _card_of(repository: Repository | None) -> str:
    if repository is None or CARD not in repository.sizes:
        return ""
    try:
        return (repository.download([CARD]) / CARD).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{CARD}: the card of {repository.name} is not UTF-8; mend it") from error


def _plan(
    folder: Path, repository: Repository | None, owns: Callable[[str], bool]
) -> list[PlannedFile]:
    """Compare the folder with the repository."""
    there = {file.rfilename: file for file in repository.info.siblings} if repository else {}
    planned = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        for parent in map(str, PurePosixPath(name).parents):
            if parent in there:
                raise FileExistsError(f"repo_id: a file {parent} is there, where {name} should go")
        change = "new"
        if name in there:
            change = "same" if _is_same(path, there[name]) else "changed"
        planned[name] = PlannedFile(name, path.stat().st_size, change)
    gone = sorted(path for path in there if owns(path) and path not in planned)
    return [*planned.values(), *(PlannedFile(path, 0, "gone") for path in gone)]


def _is_same(path: Path, there: Any) -> bool:
    """Compare a local file with the checksum that the Hub has of one."""
    if not there.lfs:
        return git_hash(path.read_bytes()) == str(there.blob_id)
    with path.open("rb") as content:
        return sha_fileobj(content).hex() == str(there.lfs["sha256"])


def _commit(
    folder: Path, changes: list[PlannedFile], to: Destination, parent: str | None, message: str
) -> str:
    """Make the commit, and first the repository if there is none; return the commit's hash."""
    client = api(to.token)
    if parent is None:
        # Before a repository is made, because the Hub may reject the card.
        RepoCard.load(folder / CARD).validate(repo_type=to.kind)
        # Without private, an organization's own rule decides. A repository that somebody else has
        # made in the meantime is an error: it was not looked at.
        client.create_repo(to.repo_id, repo_type=to.kind, private=to.private or None)
        parent = str(client.repo_info(to.repo_id, repo_type=to.kind).sha)
    operations = [
        CommitOperationDelete(file.path)
        if file.change == "gone"
        else CommitOperationAdd(file.path, folder / file.path)
        for file in changes
    ]
    done = client.create_commit(
        to.repo_id, operations, commit_message=message, repo_type=to.kind, parent_commit=parent
    )
    return str(done.oid)

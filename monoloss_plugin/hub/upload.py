"""Upload files to a repository of the Hub in one commit, without overwriting anything."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, RepoCard
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from monoloss_plugin._checks import require_flag
from monoloss_plugin.hub.cards import CARD
from monoloss_plugin.hub.names import require_repo_id
from monoloss_plugin.hub.repository import Kind, Place, Repository, api, ask_hub, page_of

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
    """The name of the SAE, or of the split, in the repository; or how many there are."""

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


@dataclass(frozen=True)
class Plan:
    """An upload that has not begun. Making it has raised every error that one can know before."""

    to: Destination
    files: list[PlannedFile]
    content: Mapping[str, Path | bytes]
    """What each file will hold, by its path in the repository."""
    parent: str | None
    """The commit to build on; None if there is no repository yet."""


def plan_upload(
    added: Repository,
    to: Destination,
    *,
    owns: Callable[[str], bool],
    write_card: Callable[[str, Repository | None], str],
) -> Plan:
    """Compare local files with a repository of the Hub, and make its card.

    Args:
        added: the files to upload, in a local folder, with the paths that they get.
        to: where to upload them.
        owns: says whether a path belongs to what is uploaded. Such a file is deleted from the
            repository if it is not among the files.
        write_card: makes the new card from the card's text and the repository, if there is one.
    """
    there = _look_at(to)
    if to.private and there is not None and there.info.private is False:
        raise PermissionError(
            f"private: {to.repo_id} is there already, and public; make it private on its settings "
            "page first, or choose another name"
        )
    assert added.folder is not None
    content: dict[str, Path | bytes] = {path: added.folder / path for path in added.sizes}
    content[CARD] = write_card(_card_of(there), there).encode("utf-8")
    files = _compare(content, there, owns)
    clashes = [f.path for f in files if f.change in ("changed", "gone") and f.path != CARD]
    if clashes and not to.overwrite:
        raise FileExistsError(
            f"repo_id: {to.repo_id} has another {', '.join(clashes[:4])} already; publish under "
            "another name, or pass overwrite to replace it"
        )
    return Plan(to, files, content, None if there is None else there.commit)


def send(plan: Plan, name: str) -> Publication:
    """Carry out a plan in one commit; for a dry run, only tell what it would do.

    Files that are there already are not sent. An interruption at any point leaves the repository as
    it was, or empty if it is new.

    Args:
        plan: what to send.
        name: the name of the SAE or split, for the commit and the result.
    """
    to, commit = plan.to, plan.parent
    changes = [file for file in plan.files if file.change != "same"]
    if changes and not to.dry_run:
        commit = _commit(plan, changes, f"Publish {name}")
    url = page_of(to.repo_id, to.kind)
    return Publication(to.repo_id, url, plan.files, None if to.dry_run else commit, name)


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


def _compare(
    content: Mapping[str, Path | bytes], repository: Repository | None, owns: Callable[[str], bool]
) -> list[PlannedFile]:
    """Compare files with those of the repository."""
    there = {file.rfilename: file for file in repository.info.siblings} if repository else {}
    planned = []
    for name, held in sorted(content.items()):
        for parent in map(str, PurePosixPath(name).parents):
            if parent in there:
                raise FileExistsError(f"repo_id: a file {parent} is there, where {name} should go")
        change = "new"
        if name in there:
            change = "same" if _is_same(held, there[name]) else "changed"
        size = len(held) if isinstance(held, bytes) else held.stat().st_size
        planned.append(PlannedFile(name, size, change))
    gone = sorted(path for path in there if owns(path) and path not in content)
    return [*planned, *(PlannedFile(path, 0, "gone") for path in gone)]


def _is_same(held: Path | bytes, there: Any) -> bool:
    """Compare a file's content with the checksum that the Hub has of one."""
    with io.BytesIO(held) if isinstance(held, bytes) else held.open("rb") as content:
        if not there.lfs:
            return git_hash(content.read()) == str(there.blob_id)
        return sha_fileobj(content).hex() == str(there.lfs["sha256"])


def _commit(plan: Plan, changes: list[PlannedFile], message: str) -> str:
    """Make the commit, and first the repository if there is none; return the commit's hash."""
    to, parent = plan.to, plan.parent
    client = api(to.token)
    if parent is None:
        # Before a repository is made, because the Hub may reject the card.
        card = plan.content[CARD]
        assert isinstance(card, bytes)
        RepoCard(card.decode("utf-8")).validate(repo_type=to.kind)
        # Without private, an organization's own rule decides. A repository that somebody else has
        # made in the meantime is an error: it was not looked at.
        client.create_repo(to.repo_id, repo_type=to.kind, private=to.private or None)
        parent = str(client.repo_info(to.repo_id, repo_type=to.kind).sha)
    operations = [
        CommitOperationDelete(file.path)
        if file.change == "gone"
        else CommitOperationAdd(file.path, plan.content[file.path])
        for file in changes
    ]
    done = client.create_commit(
        to.repo_id, operations, commit_message=message, repo_type=to.kind, parent_commit=parent
    )
    return str(done.oid)

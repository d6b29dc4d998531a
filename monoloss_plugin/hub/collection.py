"""Publish a whole collection: SAEs, their features, and a page of the Hub that links to both."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from monoloss_plugin._checks import require_flag, require_text
from monoloss_plugin._places import as_path
from monoloss_plugin.hub.cards import hub_id
from monoloss_plugin.hub.collection_files import open_features, open_saes
from monoloss_plugin.hub.features import plan_features, read_records
from monoloss_plugin.hub.names import features_beside, require_texts
from monoloss_plugin.hub.repository import api
from monoloss_plugin.hub.saes import list_saes
from monoloss_plugin.hub.upload import Destination, Publication, send
from monoloss_plugin.hub.upload_sae import plan_saes

_ABOUT = "Sparse autoencoders with their records and scores, and the features that they take."
_OF_SAES = "The SAEs, in SAELens's format. The card compares them."
_OF_FEATURES = "The features that the SAEs take, as Parquet files."


@dataclass(frozen=True)
class PublishedCollection:
    """What was published of a collection, or what a dry run would publish."""

    saes: Publication
    features: Publication | None
    """None if the collection has no features, or if they were left out."""
    page: str | None = None
    """The address of the collection's page; None for a dry run, or if it could not be made."""

    @property
    def repositories(self) -> list[Publication]:
        """The repositories that the page links to."""
        return [self.saes, *([] if self.features is None else [self.features])]

    @property
    def size(self) -> int:
        """Number of bytes to upload."""
        return sum(repository.size for repository in self.repositories)


class CollectionPageError(RuntimeError):
    """All files are published, but the collection's page could not be made."""

    def __init__(self, published: PublishedCollection, reason: object) -> None:
        places = " and ".join(repository.url for repository in published.repositories)
        super().__init__(
            f"all files are published ({places}), but the page that links to them could not be "
            f"made: {reason}; run it again to make the page, which sends no file twice"
        )
        self.published = published
        """What was published."""


def publish_all(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    features: bool = True,
    license: str | None = None,
    tags: Sequence[str] = (),
    private: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    token: str | bool | None = None,
) -> PublishedCollection:
    """Publish a folder of SAEs and features, and a page of the Hub that links to both.

    The folder holds two repositories, laid out as they will be on the Hub::

        models/SAE_ID/      what publish_sae publishes of an SAE: cfg.json and
                            sae_weights.safetensors, and perhaps sparsity.safetensors,
                            monoloss.json, curves.png, latents.png and report.html
        datasets/CONFIG/    of each encoder's features, SPLIT-00000-of-00001.parquet (and so on)
                            and SPLIT.json; CONFIG is "data" if they need no name

    ``load_pretrained("./folder/models", sae_id)`` and ``load_features("./folder/datasets", split,
    config=config)`` read it before it is published.

    The SAEs go to the repository ``user/name`` in one commit, the features to the dataset
    ``user/name-features`` in another, and the page gets the title ``name``. Everything is checked
    before anything is sent. Files are published as they are; other files in the folder are not
    published, with a warning in the log. Nothing that is on the Hub is overwritten unless you ask
    for it. After an interruption, run it again; it sends only what is missing.

    Args:
        folder: the collection.
        repo_id: ``user/name``.
        features: also publish the features, if there are any.
        license: for both cards, such as ``"mit"``. The images' licence may bind you.
        tags: more tags for both cards.
        private: make new repositories private. A new page is private if the SAEs' repository is.
        overwrite: replace SAEs and splits of the same name.
        dry_run: upload nothing, and return what would be uploaded; where the Hub cannot be
            reached, what new repositories would get.
        token: by default the one you are logged in with.

    Raises:
        CollectionPageError: everything is published, but the page could not be made. It has what
            was published as ``published``, and the Hub's error as its cause.
        FileExistsError: a repository has another SAE or split of the same name.
        FileNotFoundError, NotADirectoryError: there is no such folder, or no SAE in its ``models``.
        PermissionError: ``private`` is asked for, but a repository is there and public.
        TypeError, ValueError: an argument is wrong; an SAE's settings do not fit its weights, or
            another file is not what its name says; a settings file or a record has a path of this
            machine in it; or a file is a link.
        Exception: what ``huggingface_hub`` raises, as :func:`publish_sae`.
    """
    to = Destination(repo_id, "model", private, overwrite, dry_run, token)
    beside = replace(to, repo_id=features_beside(repo_id), kind="dataset")
    require_flag(features, "features")
    tags = require_texts(tags, "tags")
    require_text(license, "license")
    collection = as_path(folder, "folder")
    saes = open_saes(collection)
    sets = open_features(collection) if features else None

    records = [one.record for one in list_saes(saes)]
    images = [hub_id(record.dataset) for record in records]
    metadata = {"license": license, "tags": tags}
    planned = None
    if sets is not None:
        splits = read_records(sets)
        sources = _each_once(hub_id(record.source) for record in splits.values())
        of_sets = {**metadata, "source_datasets": sources}
        planned = plan_features(sets, beside, of_sets, saes=repo_id)
        images = [beside.repo_id, *images]
    of_saes = {
        **metadata,
        "base_model": _each_once(hub_id(record.encoder) for record in records),
        "datasets": _each_once(images),
    }
    plan = plan_saes(saes, to, of_saes)
    # The features first, so that the SAEs' card never links to what is not there.
    done = None if planned is None else send(planned, _count(len(splits), "split"))
    published = PublishedCollection(send(plan, _count(len(records), "SAE")), done)
    if dry_run:
        return published
    try:
        return replace(published, page=_make_page(published, token))
    except Exception as error:  # of several HTTP libraries, as the client's version uses them
        raise CollectionPageError(published, error) from error


def _each_once(names: Iterable[str | None]) -> list[str]:
    """Return the names that are known, without repetitions."""
    return list(dict.fromkeys(name for name in names if name))


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _make_page(published: PublishedCollection, token: str | bool | None) -> str:
    """Make the collection's page unless it is there, add what is missing, return its address."""
    client = api(token)
    repo_id = published.saes.repo_id
    user, _, name = repo_id.partition("/")
    page = client.create_collection(
        name,
        namespace=user,
        description=_ABOUT,
        # An organization's rule may have made it private without our asking.
        private=bool(client.model_info(repo_id).private),
        exists_ok=True,
    )
    add = partial(client.add_collection_item, page.slug, exists_ok=True)
    add(repo_id, "model", note=_OF_SAES)
    if published.features is not None:
        add(published.features.repo_id, "dataset", note=_OF_FEATURES)
    return page.url

"""Load SAEs that others have published."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor

from monoloss_plugin._checks import as_device, require_text
from monoloss_plugin._optional import missing_extra
from monoloss_plugin.hub import sae_folder
from monoloss_plugin.hub.bundled import BUNDLED, open_named
from monoloss_plugin.hub.names import is_inside, is_pickle, require_inside
from monoloss_plugin.hub.record import RECORD, SAERecord, record_from
from monoloss_plugin.hub.repository import Repository
from monoloss_plugin.hub.sae_folder import CONFIG, SPARSITY, WEIGHTS, refused

try:
    from sae_lens import SAE
except ModuleNotFoundError as error:
    raise missing_extra(error, "sae-lens") from error

logger = logging.getLogger(__name__)

ROOT = "."
"""The ``sae_id`` of an SAE that lies at the root of its repository."""


@dataclass(frozen=True)
class Pretrained:
    """An SAE, loaded."""

    sae: SAE[Any]
    """SAELens's own SAE, for inference."""
    record: SAERecord
    """What it was trained with, on what, and what it scored; empty where nothing was published."""
    repo_id: str
    sae_id: str
    revision: str | None
    """The commit it comes from; None where it does not come from the Hub."""
    sparsity: Tensor | None
    """(M,) log10 of the share of samples on which each latent is active, where published."""


@dataclass(frozen=True)
class Listed:
    """An SAE of a repository, not loaded."""

    sae_id: str
    architecture: str
    """What it was trained as; a ``batchtopk`` is a ``jumprelu`` when it is loaded."""
    d_in: int
    d_sae: int
    record: SAERecord
    size: int
    """Bytes to download."""


def load_pretrained(
    repo_id: str | os.PathLike[str],
    sae_id: str | None = None,
    revision: str | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: str | torch.dtype | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Pretrained:
    """Load a published SAE.

    Only JSON and safetensors are read, and its settings are compared with the weights before memory
    is taken. What was loaded once is loaded from the cache where the Hub cannot be reached.

    Args:
        repo_id: ``user/name`` on the Hub; ``"digits"``, which is bundled; or a folder laid out like
            a repository, as a ``Path`` or a string such as ``"./folder"``.
        sae_id: which of its SAEs; may be left out where there is only one, and of
            ``"digits"``, which then gives the one with MonoLoss.
        revision: a branch, tag or commit of the repository.
        device: where to load it.
        dtype: of the parameters, such as ``"float32"``; as stored by default.
        token: to read a private repository; by default the one the machine is logged in with.
        cache_dir: by default the Hub's own cache.
        local_files_only: do not ask the Hub.

    Raises:
        TypeError: an argument of another kind.
        FileNotFoundError: no such repository, SAE or bundled name.
        ValueError: several SAEs and no ``sae_id``, no such revision, a device that is not there,
            or an SAE that is not what it says, or whose weights are not finite.
        PermissionError: the Hub asks for a token, or for its conditions to be accepted.
        ConnectionError: the Hub cannot be reached, and the SAE is not in the cache.

    Examples:
        >>> loaded = load_pretrained("digits")
        >>> loaded.record.lam, loaded.sae.cfg.d_sae
        (0.003, 256)
    """
    dtype, device = _dtype_name(dtype), as_device(device)
    repository = open_named(
        repo_id,
        "model",
        revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    sae_id = _chosen(repository, repo_id, sae_id)
    folder = repository.fetch(p for p in _paths(sae_id) if p in repository) / sae_id
    name = repository.name if sae_id == ROOT else f"{repository.name}/{sae_id}"
    record = _record(repository, sae_id)
    sae = sae_folder.load(folder, name, device=str(device), dtype=dtype)
    own = sae.cfg.metadata["monoloss"] or {}
    if record.inputs and isinstance(own, dict):  # published before the SAE itself said so
        sae.cfg.metadata["monoloss"] = {"inputs": record.inputs, **own}
    return Pretrained(
        sae=sae,
        record=record,
        repo_id=str(repo_id),
        sae_id=sae_id,
        revision=repository.commit,
        sparsity=sae_folder.sparsity_of(folder, name, sae.cfg.d_sae),
    )


def list_pretrained(
    repo_id: str | os.PathLike[str],
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> list[Listed]:
    """List the SAEs of a repository, by name, without their weights.

    Args:
        repo_id: as for :func:`load_pretrained`.
        revision: as there.
        token: as there.
        cache_dir: as there.
        local_files_only: as there.

    Raises:
        TypeError, FileNotFoundError, ValueError, PermissionError, ConnectionError: as there.

    Examples:
        >>> for one in list_pretrained("digits"):
        ...     print(one.sae_id, one.record.lam)
        batchtopk-256 0.0
        batchtopk-256-monoloss-0.003 0.003
    """
    repository = open_named(
        repo_id,
        "model",
        revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    return listed(repository)


def listed(repository: Repository) -> list[Listed]:
    """List the SAEs of a repository that is open; one that cannot be read is only said."""
    found = []
    ids = sae_ids(repository)
    files = [path for i in ids for path in (at(i, CONFIG), at(i, RECORD)) if path in repository]
    short = [path for path in files if repository.is_short(path)]
    if short:
        repository.fetch(short)
    for sae_id in ids:
        with _said(f"{repository.name}/{sae_id}"):
            config = repository.json(at(sae_id, CONFIG))
            record = SAERecord()
            with _said(f"the record of {repository.name}/{sae_id}"):
                record = _record(repository, sae_id)
            size = sum(repository.sizes.get(path, 0) for path in _paths(sae_id))
            found.append(
                Listed(
                    sae_id=sae_id,
                    architecture=sae_folder.trained_as(config),
                    d_in=sae_folder.size_in(config, "d_in", sae_id),
                    d_sae=sae_folder.size_in(config, "d_sae", sae_id),
                    record=record,
                    size=size,
                )
            )
    return found


@contextmanager
def _said(name: str) -> Iterator[None]:
    """Leave out what of a repository is not what it should be, and say so."""
    try:
        yield
    except ValueError as error:
        logger.warning("%s is left out: %s", name, error)


def sae_ids(repository: Repository) -> list[str]:
    """Return the names of the SAEs of a repository: folders with settings and weights."""
    files = (PurePosixPath(path) for path in repository.sizes)
    ids = (str(file.parent) for file in files if file.name == CONFIG)
    whole = (i for i in ids if all(at(i, file) in repository for file in (CONFIG, WEIGHTS)))
    return sorted(sae_id for sae_id in whole if sae_id == ROOT or is_inside(sae_id))


def _dtype_name(dtype: Any) -> str | None:
    """Return a dtype's name, as SAELens takes it."""
    name = str(dtype).removeprefix("torch.")
    found = getattr(torch, name, None)
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype: expected one such as 'float32', got {dtype!r}")
    return None if dtype is None else name


def _chosen(repository: Repository, repo_id: str | os.PathLike[str], sae_id: str | None) -> str:
    """Return the name of the SAE to load, which is there."""
    require_text(sae_id, "sae_id")
    there = sae_ids(repository)
    has = f"it has {_some(there)}" if there else "it has none"
    if sae_id is None:
        sae_id = BUNDLED.get(repo_id) if isinstance(repo_id, str) else None
        if sae_id is None and len(there) == 1:
            return there[0]
        if sae_id is None and there:
            raise ValueError(f"sae_id: {repository.name} has several SAEs: {_some(there)}")
        if sae_id is None:
            raise FileNotFoundError(
                f"repo_id: {repository.name} holds no SAE{_pickles(repository, '')}"
            )
    if sae_id != ROOT:
        require_inside(sae_id, "sae_id")
    if sae_id not in there:
        raise FileNotFoundError(
            f"sae_id: {repository.name} has no SAE {sae_id!r}; {has}"
            f"{_pickles(repository, sae_id + '/')}"
        )
    return sae_id


def _pickles(repository: Repository, prefix: str) -> str:
    return refused(sorted(p for p in repository.sizes if p.startswith(prefix) and is_pickle(p)))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def at(sae_id: str, file: str) -> str:
    """Return the path of an SAE's file."""
    return file if sae_id == ROOT else f"{sae_id}/{file}"


def _paths(sae_id: str) -> list[str]:
    """Return what is read of an SAE, and nothing else is."""
    return [at(sae_id, file) for file in (CONFIG, WEIGHTS, SPARSITY, RECORD)]


def _record(repository: Repository, sae_id: str) -> SAERecord:
    path = at(sae_id, RECORD)
    if path not in repository:
        return SAERecord()
    return record_from(repository.json(path), f"{repository.name}/{path}")

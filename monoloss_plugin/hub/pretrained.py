"""Load published SAEs, and list the SAEs of a repository."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor

from monoloss_plugin._checks import as_device, require_text
from monoloss_plugin.hub import sae_folder
from monoloss_plugin.hub.names import is_inside, require_inside
from monoloss_plugin.hub.record import RECORD, SAERecord, read_record
from monoloss_plugin.hub.repository import BUNDLED, Place, Repository, open_repository, read_json
from monoloss_plugin.hub.sae_folder import CONFIG, SPARSITY, WEIGHTS

logger = logging.getLogger(__name__)

ROOT = "."
"""The ``sae_id`` of an SAE at the root of its repository."""


@dataclass(frozen=True)
class Pretrained:
    """A loaded SAE, and what is known about it."""

    sae: SAE[Any]
    """SAELens's own SAE, for inference."""
    record: SAERecord
    """What it was trained with, on which data, and what it scored; empty if nobody published it."""
    repo_id: str
    sae_id: str
    revision: str | None
    """The commit that it comes from; None if it does not come from the Hub."""
    sparsity: Tensor | None
    """(M,) log10 of the share of samples on which each latent is active, if it was published."""


@dataclass(frozen=True)
class Listed:
    """An SAE of a repository, without its weights."""

    sae_id: str
    architecture: str
    """What it was trained as. SAELens loads a ``batchtopk`` as a ``jumprelu``."""
    d_in: int
    d_sae: int
    record: SAERecord
    size: int
    """Number of bytes to download."""


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

    This function reads only JSON and safetensors. It compares the SAE's settings with its weights
    before it takes memory for them. What you have loaded once comes from the cache where the Hub
    cannot be reached.

    Args:
        repo_id: ``user/name`` on the Hub; ``"digits"``, which is bundled; or a folder laid out like
            a repository, as a ``Path`` or a string such as ``"./folder"``.
        sae_id: which of the repository's SAEs. You can leave it out if there is only one; for
            ``"digits"`` you then get the one with MonoLoss.
        revision: a branch, tag or commit of the repository.
        device: where to load the SAE.
        dtype: the type of the parameters, such as ``"float32"``; as stored by default.
        token: to read a private repository; by default the one you are logged in with.
        cache_dir: a folder instead of the Hub's own cache.
        local_files_only: do not ask the Hub; read its cache.

    Raises:
        FileNotFoundError: there is no such folder, SAE or bundled name.
        ValueError: there are several SAEs and no ``sae_id``; the device cannot be used; or the
            SAE's files do not fit together, or its weights are not finite.
        Exception: what ``huggingface_hub`` raises, such as its ``RepositoryNotFoundError`` and
            ``GatedRepoError``.

    Examples:
        >>> loaded = load_pretrained("digits")
        >>> loaded.record.lam, loaded.sae.cfg.d_sae
        (0.003, 256)
    """
    dtype, device = _dtype_name(dtype), as_device(device)
    repository = open_repository(
        Place(repo_id, "model", revision, token, cache_dir, local_files_only)
    )
    default = BUNDLED.get(repo_id) if isinstance(repo_id, str) else None
    sae_id = _choose(repository, default if sae_id is None else sae_id)
    folder = repository.download(p for p in _paths(sae_id) if p in repository.sizes) / sae_id
    name = repository.name if sae_id == ROOT else f"{repository.name}/{sae_id}"
    record = read_record(folder, name)
    sae = sae_folder.load(folder, name, device=str(device), dtype=dtype)
    sparsity = sae_folder.read_sparsity(folder, name, sae.cfg.d_sae)
    return Pretrained(sae, record, str(repo_id), sae_id, repository.commit, sparsity)


def list_pretrained(
    repo_id: str | os.PathLike[str],
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> list[Listed]:
    """List the SAEs of a repository by name, without downloading their weights.

    An SAE whose settings cannot be read is left out, with a warning in the log. The arguments and
    errors are those of :func:`load_pretrained`.

    Examples:
        >>> for one in list_pretrained("digits"):
        ...     print(one.sae_id, one.record.lam)
        batchtopk-256 0.0
        batchtopk-256-monoloss-0.003 0.003
    """
    return list_saes(
        open_repository(Place(repo_id, "model", revision, token, cache_dir, local_files_only))
    )


def list_saes(repository: Repository) -> list[Listed]:
    """List the SAEs of a repository; one that cannot be read is left out, with a warning."""
    ids = _sae_ids(repository)
    settings = [file_of(sae_id, file) for sae_id in ids for file in (CONFIG, RECORD)]
    folder = repository.download(path for path in settings if path in repository.sizes)
    found = []
    for sae_id in ids:
        try:
            config = read_json(folder / file_of(sae_id, CONFIG))
            one = Listed(
                sae_id=sae_id,
                architecture=sae_folder.trained_as(config),
                d_in=sae_folder.size_in(config, "d_in", sae_id),
                d_sae=sae_folder.size_in(config, "d_sae", sae_id),
                record=read_record(folder / sae_id, sae_id),
                size=sum(repository.sizes.get(path, 0) for path in _paths(sae_id)),
            )
        except (FileNotFoundError, ValueError) as error:
            logger.warning("%s/%s is left out: %s", repository.name, sae_id, error)
        else:
            found.append(one)
    return found


def file_of(sae_id: str, file: str) -> str:
    """Return the path of an SAE's file in its repository."""
    return file if sae_id == ROOT else f"{sae_id}/{file}"


def _paths(sae_id: str) -> list[str]:
    """Return the files that are read of an SAE; no other file is."""
    return [file_of(sae_id, file) for file in (CONFIG, WEIGHTS, SPARSITY, RECORD)]


def _sae_ids(repository: Repository) -> list[str]:
    """Return the folders that hold both settings and weights."""
    configs = (path for path in map(PurePosixPath, repository.sizes) if path.name == CONFIG)
    ids = (str(config.parent) for config in configs)
    complete = (i for i in ids if file_of(i, WEIGHTS) in repository.sizes)
    return sorted(sae_id for sae_id in complete if sae_id == ROOT or is_inside(sae_id))


def _choose(repository: Repository, sae_id: str | None) -> str:
    """Return the name of the SAE to load; the repository has it."""
    require_text(sae_id, "sae_id")
    there = _sae_ids(repository)
    shown = ", ".join(there[:10]) + (f" and {len(there) - 10} more" if len(there) > 10 else "")
    if sae_id is None:
        if not there:
            hint = sae_folder.pickle_hint(repository.sizes)
            raise FileNotFoundError(f"repo_id: {repository.name} holds no SAE{hint}")
        if len(there) > 1:
            raise ValueError(f"sae_id: {repository.name} has several SAEs: {shown}")
        return there[0]
    if sae_id != ROOT:
        require_inside(sae_id, "sae_id")
    if sae_id not in there:
        below = (path for path in repository.sizes if path.startswith(f"{sae_id}/"))
        raise FileNotFoundError(
            f"sae_id: {repository.name} has no SAE {sae_id!r}; it has {shown or 'none'}"
            f"{sae_folder.pickle_hint(below)}"
        )
    return sae_id


def _dtype_name(dtype: Any) -> str | None:
    """Return the name of a dtype, as SAELens takes it."""
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype: expected one such as 'float32', got {dtype!r}")
    return name

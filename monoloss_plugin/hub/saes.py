"""SAEs in a repository or folder: load them, list them, and check them before they take memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY, get_sae_class
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from monoloss_plugin._checks import as_device, require_finite, require_text, visible
from monoloss_plugin.hub.names import is_inside, require_inside
from monoloss_plugin.hub.record import RECORD, SAERecord, read_record
from monoloss_plugin.hub.repository import BUNDLED, Place, Repository, open_repository, read_json

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS, SPARSITY = SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME

_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
"""Endings of files that may hold pickled objects, which can run any code when they are read."""

_WIDEST = 1 << 31

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
        repo_id: ``user/name`` on the Hub; ``"digits"`` or ``"photos"``, which are bundled; or a
            folder laid out like a repository, as a ``Path`` or a string such as ``"./folder"``.
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
        Exception: what ``huggingface_hub`` raises, such as its ``RepositoryNotFoundError``.

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
    sae = load_folder(folder, name, device=str(device), dtype=dtype)
    sparsity = read_sparsity(folder, name, sae.cfg.d_sae)
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
    ids = sae_ids(repository)
    settings = [file_of(sae_id, file) for sae_id in ids for file in (CONFIG, RECORD)]
    folder = repository.download(path for path in settings if path in repository.sizes)
    found = []
    for sae_id in ids:
        try:
            config = read_json(folder / file_of(sae_id, CONFIG))
            one = Listed(
                sae_id=sae_id,
                architecture=trained_as(config),
                d_in=_size_in(config, "d_in", sae_id),
                d_sae=_size_in(config, "d_sae", sae_id),
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


def sae_ids(repository: Repository) -> list[str]:
    """Return the folders that hold both settings and weights."""
    configs = (path for path in map(PurePosixPath, repository.sizes) if path.name == CONFIG)
    ids = (str(config.parent) for config in configs)
    complete = (i for i in ids if file_of(i, WEIGHTS) in repository.sizes)
    return sorted(sae_id for sae_id in complete if sae_id == ROOT or is_inside(sae_id))


def _choose(repository: Repository, sae_id: str | None) -> str:
    """Return the name of the SAE to load; the repository has it."""
    require_text(sae_id, "sae_id")
    there = sae_ids(repository)
    shown = ", ".join(there[:10]) + ", ..." * (len(there) > 10)
    if sae_id is None:
        if not there:
            hint = _pickle_hint(repository.sizes)
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
            f"{_pickle_hint(below)}"
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


def load_folder(
    folder: Path, name: str, *, device: str = "cpu", dtype: str | None = None
) -> SAE[Any]:
    """Check a folder's files, and load its SAE; errors call it by ``name``."""
    _check_folder(folder, name)
    try:
        sae: SAE[Any] = SAE.load_from_disk(folder, device=device, dtype=dtype)
    except Exception as error:  # before SAELens 6, settings say too little to be checked in full
        raise ValueError(f"{name}: SAELens cannot load it: {error!r}") from error
    for key, tensor in sae.state_dict().items():
        require_finite(tensor, f"{name}/{WEIGHTS}: {key}")
    if sae.cfg.normalize_activations == "expected_average_only_in":
        said = "%s: its weights do not include the scale of its inputs; scale them as in training"
        logger.warning(said, name)
    return sae


def write_folder(sae: SAE[Any], folder: Path) -> None:
    """Write an SAE for inference, so that plain SAELens can load it."""
    if sae.cfg.normalize_activations in ("expected_average_only_in", "covariance_whitening"):
        raise ValueError(
            f"sae: its normalize_activations is still {sae.cfg.normalize_activations!r}, so "
            "everyone who loads it would have to scale the inputs in the same way. "
            "SAETrainer.fit folds the scale into the weights when it ends"
        )
    if isinstance(sae, TrainingSAE):
        sae.save_inference_model(folder)
    else:
        sae.save_model(folder)


def _check_folder(folder: Path, name: str) -> None:
    """Raise an error unless an SAE's settings fit its weights. Reads only the weights' header."""
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            there = (path.name for path in folder.iterdir())
            raise FileNotFoundError(f"{name}: no {file} in it{_pickle_hint(there)}")
    config = read_json(folder / CONFIG)
    shapes = _shapes(folder / WEIGHTS, name)
    architecture = str(config.get("architecture", "standard"))
    if architecture not in SAE_CLASS_REGISTRY:
        known = f"SAELens knows {', '.join(SAE_CLASS_REGISTRY)}"
        if architecture in SAE_TRAINING_CLASS_REGISTRY:
            known = "this is a training checkpoint; give what save_inference_model writes"
        raise ValueError(f"{name}: architecture {architecture!r}; {known}")
    d_in, d_sae = _size_in(config, "d_in", name), _size_in(config, "d_sae", name)
    # Only a transcoder says d_out.
    d_out = _size_in(config, "d_out" if "d_out" in config else "d_in", name)
    if shapes.get("W_dec", (d_sae, d_out)) != (d_sae, d_out):
        raise ValueError(
            f"{name}: {CONFIG} says d_sae = {d_sae} and d_in = {d_in}, but {WEIGHTS} holds a W_dec "
            f"of {shapes['W_dec']}"
        )
    metadata = config.get("metadata")
    if not isinstance(metadata, dict) or "sae_lens_version" not in metadata:
        return  # before SAELens 6, settings do not say all that its classes need
    expected = _expected_shapes(architecture, config, name)
    wrong = sorted(k for k in expected.keys() | shapes if expected.get(k) != shapes.get(k))
    if wrong:
        key, thresholds = wrong[0], {"topk_threshold", "log_threshold"}
        hint = f"; is this a training checkpoint of {architecture!r}?"
        raise ValueError(
            f"{name}: {CONFIG} asks for {visible(key)} of {expected.get(key, 'no shape')}, but "
            f"{WEIGHTS} holds {shapes.get(key, 'none')}{hint if thresholds & set(wrong) else ''}"
        )


def read_sparsity(folder: Path, name: str, d_sae: int) -> Tensor | None:
    """Return log10 of the share of samples on which each latent is active (M,), if it was saved."""
    path = folder / SPARSITY
    if not path.is_file():
        return None
    found = _shapes(path, name).get("sparsity", "nothing of that name")
    if found != (d_sae,):
        raise ValueError(f"{name}/{SPARSITY}: expected sparsity of ({d_sae},), found {found}")
    return load_file(path)["sparsity"]


def trained_as(config: dict[str, Any]) -> str:
    """Return the architecture that an SAE was trained as, by its settings."""
    metadata = config.get("metadata")
    trained = metadata.get("training_architecture") if isinstance(metadata, dict) else None
    return str(trained or config.get("architecture", "standard"))


def _size_in(config: dict[str, Any], key: str, name: str) -> int:
    """Return a size from an SAE's settings; raise ValueError unless it is a positive integer."""
    size = config.get(key)
    if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < _WIDEST:
        raise ValueError(f"{name}: {CONFIG} says {key} = {size!r}; expected a positive integer")
    return size


def _pickle_hint(paths: Iterable[str]) -> str:
    """Return what an error adds where pickles are found instead of weights; else nothing."""
    pickles = sorted(path for path in paths if path.lower().endswith(_PICKLES))
    if not pickles:
        return ""
    return (
        f"; {visible(', '.join(pickles[:3]))} would have to be unpickled, which can run any "
        "code, so it is not read: convert a checkpoint that you trust with `monoloss convert`"
    )


def _shapes(path: Path, name: str) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as tensors:
            keys = tensors.keys()
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in keys}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{name}/{path.name}: not a safetensors file: {error}") from error


def _expected_shapes(
    architecture: str, config: dict[str, Any], name: str
) -> dict[str, tuple[int, ...]]:
    """Return the tensors that SAELens will look for, from an SAE that takes no memory."""
    sae_class, config_class = get_sae_class(architecture)
    try:
        empty = sae_class(config_class.from_dict({**config, "device": "meta"}))
    except Exception as error:  # a stranger's settings can make SAELens fail in many ways
        raise ValueError(f"{name}: SAELens cannot make this {architecture} SAE: {error}") from error
    return {key: tuple(tensor.shape) for key, tensor in empty.state_dict().items()}

"""An SAE as a folder: SAELens's own format, checked before it is loaded or published."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monoloss_plugin._checks import require_finite, visible
from monoloss_plugin._optional import missing_extra
from monoloss_plugin.hub.names import is_pickle
from monoloss_plugin.hub.repository import read_json

try:
    from sae_lens import SAE, TrainingSAE
    from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
    from sae_lens.registry import (
        SAE_CLASS_REGISTRY,
        SAE_TRAINING_CLASS_REGISTRY,
        get_sae_class,
    )
    from safetensors import SafetensorError, safe_open
except ModuleNotFoundError as error:
    raise missing_extra(error, "sae-lens") from error

CONFIG, WEIGHTS, SPARSITY = SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME

_WIDEST = 1 << 31
_SPARSITY = "sparsity"
"""SAELens's name of the tensor."""

logger = logging.getLogger(__name__)


def check(folder: Path, name: str) -> None:
    """See that a folder holds an SAE whose settings fit its weights.

    Reads the settings and the weights' header; no memory is taken for weights.

    Args:
        folder: with ``cfg.json`` and ``sae_weights.safetensors``.
        name: of the SAE, for the error.

    Raises:
        FileNotFoundError: one of the two is missing.
        ValueError: not SAELens's format, an architecture that SAELens cannot load, or sizes that
            do not fit the weights.
    """
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            pickles = sorted(path.name for path in folder.iterdir() if is_pickle(path.name))
            raise FileNotFoundError(f"{name}: no {file} in it{refused(pickles)}")
    config = read_json(folder / CONFIG)
    shapes = _shapes(folder / WEIGHTS, name)
    architecture = _architecture(config, name)
    d_in, d_sae = size_in(config, "d_in", name), size_in(config, "d_sae", name)
    d_out = size_in(config, "d_out", name) if "d_out" in config else d_in  # a transcoder's own
    if shapes.get("W_dec", (d_sae, d_out)) != (d_sae, d_out):
        raise ValueError(
            f"{name}: {CONFIG} says d_sae = {d_sae} and d_in = {d_in}, but {WEIGHTS} holds a W_dec "
            f"of {shapes['W_dec']}"
        )
    if _is_of_version_6(config):
        expected = _expected_shapes(architecture, config, name)
        if expected != shapes:
            wrong = sorted(k for k in expected.keys() | shapes if expected.get(k) != shapes.get(k))
            k = wrong[0]
            raise ValueError(
                f"{name}: {CONFIG} asks for {visible(k)} of {expected.get(k, 'no shape')}, "
                f"but {WEIGHTS} holds {shapes.get(k, 'none')}{_hint(architecture, wrong)}"
            )


def refused(pickles: list[str]) -> str:
    """Return what to say of pickles that lie where weights should be; nothing for none."""
    if not pickles:
        return ""
    return (
        f"; {visible(', '.join(pickles[:3]))} would have to be unpickled, which can run any "
        "code, and is not read: convert a checkpoint that you trust with `monoloss convert`"
    )


def load(folder: Path, name: str, *, device: str = "cpu", dtype: str | None = None) -> SAE[Any]:
    """Check a folder, and load its SAE with SAELens.

    Raises:
        FileNotFoundError, ValueError: as :func:`check`, or weights that are not finite.
    """
    check(folder, name)
    try:
        sae: SAE[Any] = SAE.load_from_disk(folder, device=device, dtype=dtype)
    except Exception as error:  # of settings before SAELens 6, only the sizes are compared above
        raise ValueError(f"{name}: SAELens cannot load it: {error!r}") from error
    for key, tensor in sae.state_dict().items():
        require_finite(tensor, f"{name}/{WEIGHTS}: {key}")
    if sae.cfg.normalize_activations == "expected_average_only_in":
        logger.warning(
            "%s: its inputs' scale was never folded into the weights; it takes inputs that are "
            "scaled as in its training",
            name,
        )
    return sae


def write(sae: SAE[Any], folder: Path) -> None:
    """Write an SAE for inference: what ``SAE.from_pretrained`` of plain SAELens loads.

    Raises:
        ValueError: the scale of its inputs is not folded in yet.
    """
    if sae.cfg.normalize_activations in ("expected_average_only_in", "covariance_whitening"):
        raise ValueError(
            f"sae: its normalize_activations is still {sae.cfg.normalize_activations!r}: who loads "
            "it would have to scale the inputs in the same way. SAETrainer.fit folds this into the "
            "weights when it ends"
        )
    if isinstance(sae, TrainingSAE):
        sae.save_inference_model(folder)
    else:
        sae.save_model(folder)


def sparsity_of(folder: Path, name: str, d_sae: int) -> Tensor | None:
    """Return log10 of the share of samples on which each latent is active (M,), where known.

    Raises:
        ValueError: not a safetensors file, or one that holds something else.
    """
    path = folder / SPARSITY
    if not path.is_file():
        return None
    shapes = _shapes(path, name)
    if shapes.get(_SPARSITY) != (d_sae,):
        found = shapes.get(_SPARSITY, "nothing of that name")
        raise ValueError(f"{name}/{SPARSITY}: expected {_SPARSITY} of ({d_sae},), found {found}")
    with _opened(path, path.name) as tensors:
        return torch.as_tensor(tensors.get_tensor(_SPARSITY))


def note_inputs(folder: Path, inputs: str) -> None:
    """Write into an SAE's own metadata what it takes, for those who load it with SAELens alone."""
    config = read_json(folder / CONFIG)
    metadata = config["metadata"]
    metadata["monoloss"] = {**(metadata.get("monoloss") or {}), "inputs": inputs}
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")


def trained_as(config: dict[str, Any]) -> str:
    """Return the architecture that an SAE's settings say it was trained as."""
    metadata = config.get("metadata")
    trained = metadata.get("training_architecture") if isinstance(metadata, dict) else None
    return str(trained or config.get("architecture", "standard"))


def _opened(path: Path, name: str) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{name}: not a safetensors file: {error}") from error


def _shapes(path: Path, name: str) -> dict[str, tuple[int, ...]]:
    with _opened(path, f"{name}/{path.name}") as tensors:
        return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118


def _architecture(config: dict[str, Any], name: str) -> str:
    architecture = config.get("architecture", "standard")
    if architecture in SAE_CLASS_REGISTRY:
        return str(architecture)
    if architecture in SAE_TRAINING_CLASS_REGISTRY:
        raise ValueError(
            f"{name}: a training checkpoint of {architecture!r}, which SAELens cannot load for "
            "inference; take the folder that save_inference_model writes, or the SAE itself"
        )
    raise ValueError(
        f"{name}: architecture {architecture!r}; SAELens knows {', '.join(SAE_CLASS_REGISTRY)}"
    )


def size_in(config: dict[str, Any], key: str, name: str) -> int:
    """Return a size that an SAE's settings say.

    Raises:
        ValueError: not a positive integer.
    """
    size = config.get(key)
    if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < _WIDEST:
        raise ValueError(f"{name}: {CONFIG} says {key} = {size!r}; expected a positive integer")
    return size


def _is_of_version_6(config: dict[str, Any]) -> bool:
    metadata = config.get("metadata")
    return isinstance(metadata, dict) and "sae_lens_version" in metadata


def _expected_shapes(
    architecture: str, config: dict[str, Any], name: str
) -> dict[str, tuple[int, ...]]:
    """Return the tensors that SAELens will look for, from an SAE without memory."""
    sae_class, config_class = get_sae_class(architecture)
    try:
        empty = sae_class(config_class.from_dict({**config, "device": "meta"}))
    except Exception as error:  # whatever settings of a stranger make SAELens trip over
        raise ValueError(f"{name}: SAELens cannot make this {architecture} SAE: {error}") from error
    return {key: tuple(tensor.shape) for key, tensor in empty.state_dict().items()}


def _hint(architecture: str, wrong: list[str]) -> str:
    if any(key in ("topk_threshold", "log_threshold") for key in wrong):
        return f"; is this a training checkpoint of {architecture!r}?"
    return ""

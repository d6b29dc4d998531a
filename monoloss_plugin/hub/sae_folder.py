"""An SAE as a folder in SAELens's own format, checked before it is loaded or published."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sae_lens import SAE, TrainingSAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY, get_sae_class
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from monoloss_plugin._checks import require_finite, visible
from monoloss_plugin.hub.repository import read_json

CONFIG, WEIGHTS, SPARSITY = SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME

_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
"""Endings of files that may hold pickled objects, which can run any code when they are read."""

_WIDEST = 1 << 31

logger = logging.getLogger(__name__)


def load(folder: Path, name: str, *, device: str = "cpu", dtype: str | None = None) -> SAE[Any]:
    """Check a folder with :func:`check`, and load its SAE. Errors call it by ``name``.

    Raises:
        FileNotFoundError, ValueError: the check fails, or the weights are not finite.
    """
    check(folder, name)
    try:
        sae: SAE[Any] = SAE.load_from_disk(folder, device=device, dtype=dtype)
    except Exception as error:  # before SAELens 6, settings say too little to be checked in full
        raise ValueError(f"{name}: SAELens cannot load it: {error!r}") from error
    for key, tensor in sae.state_dict().items():
        require_finite(tensor, f"{name}/{WEIGHTS}: {key}")
    if sae.cfg.normalize_activations == "expected_average_only_in":
        logger.warning(
            "%s: the scale of its inputs was never folded into the weights; scale the inputs as "
            "in its training",
            name,
        )
    return sae


def write(sae: SAE[Any], folder: Path) -> None:
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


def check(folder: Path, name: str) -> None:
    """Raise an error unless an SAE's settings fit its weights. Reads only the weights' header."""
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            there = (path.name for path in folder.iterdir())
            raise FileNotFoundError(f"{name}: no {file} in it{pickle_hint(there)}")
    config = read_json(folder / CONFIG)
    shapes = _shapes(folder / WEIGHTS, name)
    architecture = str(config.get("architecture", "standard"))
    if architecture not in SAE_CLASS_REGISTRY:
        known = f"SAELens knows {', '.join(SAE_CLASS_REGISTRY)}"
        if architecture in SAE_TRAINING_CLASS_REGISTRY:
            known = "this is a training checkpoint; give what save_inference_model writes"
        raise ValueError(f"{name}: architecture {architecture!r}; {known}")
    d_in, d_sae = size_in(config, "d_in", name), size_in(config, "d_sae", name)
    d_out = size_in(config, "d_out", name) if "d_out" in config else d_in  # only transcoders say it
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


def size_in(config: dict[str, Any], key: str, name: str) -> int:
    """Return a size from an SAE's settings; raise ValueError unless it is a positive integer."""
    size = config.get(key)
    if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < _WIDEST:
        raise ValueError(f"{name}: {CONFIG} says {key} = {size!r}; expected a positive integer")
    return size


def pickle_hint(paths: Iterable[str]) -> str:
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

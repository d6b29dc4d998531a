"""Checkpoints of the MonoLoss authors' training code.

Their layout follows the paper's appendix B and the public SAE implementations that it builds on:
Bussmann et al. 2024 for BatchTopK, vanilla ReLU and JumpReLU, Gao et al. 2024 for TopK.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from monoloss_plugin._checks import as_rows
from monoloss_plugin._places import as_path
from monoloss_plugin.batch import Batch
from monoloss_plugin.convert.checkpoint import (
    SAE_LENS,
    build_sae,
    read_checkpoint,
    read_count,
    read_tensors,
)

if TYPE_CHECKING:
    from sae_lens import SAE

    from monoloss_plugin.features import FeatureSet

_TOPK = {
    "W_enc": "encoder.weight.T",
    # An encoder that the decoder is tied to is stored once, or twice.
    "W_dec": ("decoder.weight.T", "decoder.linear.weight", "encoder.weight"),
    "b_enc": "latent_bias",
    "b_dec": "pre_bias",
}
_NAMES: dict[str, dict[str, Any]] = {
    "batchtopk": SAE_LENS,
    "topk": _TOPK,
    "jumprelu": SAE_LENS | {"threshold": "jumprelu.log_threshold"},
    "vanilla": SAE_LENS,
}
"""For each kind and each of SAELens's names, the name in the checkpoint."""
_COUNTERS = "(num_batches_not_active|stats_|latents_|activation).*"
"""What the forward pass does not use, such as counters of dead latents."""
_BATCH = 2048
"""The paper's batch size. BatchTopK selects among the activations of one batch."""
_MOST_BATCHES = 32

Features: TypeAlias = "Tensor | Iterable[Batch] | FeatureSet"


def from_monoloss(source: str | os.PathLike[str], *, features: Features | None = None) -> SAE[Any]:
    """Convert a checkpoint of the MonoLoss authors.

    A BatchTopK checkpoint keeps the largest ``topk_k`` times B activations of each batch, and
    stores no threshold. SAELens needs a threshold, which it applies to every sample alone. It is
    set from features: with one batch, so that exactly the same activations are kept; with several
    batches, to the mean of their thresholds.

    Args:
        source: a file with ``model_state_dict`` and ``config``.
        features: for BatchTopK, which needs them: features like those that the SAE was trained on.
            A tensor (N, d_in), which is taken in batches of 2,048, the paper's; or batches; or a
            feature set, of which 32 such batches are taken, scaled to unit norm.

    Returns:
        An SAE with the checkpoint's latents and reconstruction.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not such a checkpoint, or holds more than tensors and plain values;
            or it is a BatchTopK checkpoint and you give no features.

    Source: Nasiri-Sarvi et al. 2026, appendix B.
    """
    checkpoint = read_checkpoint(as_path(source, "source"))
    if not isinstance(checkpoint, Mapping) or not {"model_state_dict", "config"} <= set(checkpoint):
        raise ValueError("source: expected a checkpoint with model_state_dict and config")
    config = checkpoint["config"]
    if not isinstance(config, Mapping):
        raise ValueError(f"source: expected a dict as config, got {type(config).__name__}")
    kind = re.sub("[_-]|sae$", "", str(config.get("model_type")).lower())
    kind = "vanilla" if kind == "relu" else kind
    if kind not in _NAMES:
        raise ValueError(f"source: expected a model_type of {', '.join(_NAMES)}, got {kind!r}")
    tensors = read_tensors(checkpoint["model_state_dict"], _NAMES[kind], _COUNTERS)
    settings: dict[str, Any] = {
        "converted_from": "the MonoLoss authors' code",
        "terms": _terms(config, kind),
        # Each sample gets zero mean and unit deviation over its dimensions; decoding undoes it.
        "normalize_activations": "layer_norm" if _is_true(config.get("normalize")) else "none",
    }
    if kind == "jumprelu":
        tensors["threshold"] = tensors["threshold"].exp()
        # The only one of the four that does not subtract the decoder's bias from its input.
        settings["apply_b_dec_to_input"] = False
    latents, said = len(tensors["W_dec"]), config.get("n_latents")
    if said is not None and said != latents:
        raise ValueError(f"source: its config says n_latents = {said}, its weights have {latents}")
    k = read_count(config.get("topk_k"), "topk_k", latents) if "topk" in kind else 0
    if kind == "topk":
        settings["k"] = k
    if kind == "batchtopk":
        if features is None:
            raise ValueError(
                "features: a BatchTopK checkpoint stores no threshold; give features such as it "
                "was trained on, to set one from"
            )
        tensors["threshold"] = _threshold(build_sae("standard", tensors, **settings), k, features)
    architecture = {"batchtopk": "jumprelu", "vanilla": "standard"}.get(kind, kind)
    return build_sae(architecture, tensors, **settings)


def _is_true(setting: Any) -> bool:
    """Return whether a setting is on; a command line may have stored it as a word."""
    return setting.lower() in ("true", "yes", "1") if isinstance(setting, str) else bool(setting)


def _terms(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return MonoLoss as the SAELens adapter would record it; nothing for a baseline."""
    given = config.get("mono_coef") or 0
    try:
        lam = float(given)
    except (TypeError, ValueError):
        lam = math.nan
    if not math.isfinite(lam):
        raise ValueError(f"source: expected a finite number as mono_coef, got {given!r}")
    if lam <= 0:
        return {}
    # For TopK the paper measures the weight against another reconstruction loss.
    units = "nmse" if kind == "topk" else "mse"
    return {"monoloss": {"term": "MonoLoss", "name": "monoloss", "lam": lam, "lam_units": units}}


@torch.no_grad()
def _threshold(sae: SAE[Any], k: int, features: Features) -> Tensor:
    """Return the threshold between kept and dropped activations, averaged over batches."""
    between = []
    for batch in _batches(features):
        if batch.shape[1] != sae.cfg.d_in:
            raise ValueError(
                f"features: expected width {sae.cfg.d_in}, the checkpoint's, got {batch.shape[1]}"
            )
        activations = sae.encode(batch).flatten()
        kept = min(k * len(batch), len(activations) - 1)
        *_, last, first_left_out = activations.topk(kept + 1).values.double().tolist()
        middle = float(torch.tensor((last + first_left_out) / 2, dtype=torch.float32))
        between.append(middle if middle < last else first_left_out)
    if not between:
        raise ValueError("features: expected at least one sample, got none")
    return torch.tensor(sum(between) / len(between), dtype=torch.float32)


def _batches(features: Features) -> Iterator[Tensor]:
    from monoloss_plugin.features import FeatureBatches, FeatureSet

    batches: Iterable[Any]
    if isinstance(features, FeatureSet):
        size = min(_BATCH, len(features))
        batches = islice(FeatureBatches(features, batch_size=size), _MOST_BATCHES)
    elif isinstance(features, Tensor):
        batches = as_rows(features, "features").split(_BATCH)
    else:
        batches = features
    for batch in batches:
        rows = as_rows(getattr(batch, "features", batch), "features").float()
        if len(rows):
            yield rows
